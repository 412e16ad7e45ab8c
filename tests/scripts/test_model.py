"""The model from a cache is the model."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from scripts.serving.cache import Cache, Spots
from tests.scripts.serving import SHAPE, model_of

pytestmark = pytest.mark.fast
MODEL = model_of()
SLOTS = 3
SHARES = st.lists(st.floats(0, 1), min_size=SLOTS, max_size=SLOTS)
LENGTHS = st.lists(st.integers(1, SHAPE.length), min_size=SLOTS, max_size=SLOTS)


@settings(max_examples=20, deadline=None)
@given(lives=st.lists(LENGTHS, min_size=1, max_size=2), portions=st.lists(SHARES, max_size=4), seed=st.integers(0, 99))
def test_sequences_read_in_any_portions_side_by_side_are_as_if_each_was_read_at_once(
    lives: list[list[int]], portions: list[list[float]], seed: int
) -> None:
    """In slots that were used before, by sequences that were shorter or longer."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        cache = MODEL.cache(SLOTS)
        for lengths in lives:
            texts = [torch.randint(256, (length,), generator=generator) for length in lengths]
            for text, logits_TV in zip(texts, read(texts, [*portions, [1.0] * SLOTS], cache), strict=True):
                torch.testing.assert_close(logits_TV, MODEL(text[None])[0], rtol=1e-10, atol=1e-10)


def read(texts: list[torch.Tensor], portions: list[list[float]], cache: Cache) -> list[torch.Tensor]:
    """Of what is left of each text, this share at a time. -> its logits"""
    done, parts = [0] * SLOTS, []
    for shares in portions:
        take = [round(share * (len(text) - at)) for text, at, share in zip(texts, done, shares, strict=True)]
        spots = Spots(
            torch.arange(SLOTS).repeat_interleave(torch.tensor(take)),
            torch.cat([torch.arange(at, at + n) for at, n in zip(done, take, strict=True)]),
        )
        byte_T = torch.cat([text[at : at + n] for text, at, n in zip(texts, done, take, strict=True)])
        parts.append(MODEL.extend(byte_T, spots, cache).split(take))
        done = [at + n for at, n in zip(done, take, strict=True)]
    return [torch.cat(of_one) for of_one in zip(*parts, strict=True)]
