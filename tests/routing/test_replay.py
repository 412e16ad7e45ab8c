"""What was chosen is chosen again, by expert id, and what would have flipped is counted."""

from __future__ import annotations

import copy
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from routing import LossFree, Router, Routes, Sigmoid, Weigh, flips, record_routes, replay_routes

pytestmark = pytest.mark.fast


class Two(nn.Module):
    """Two routers, the second of which sees what the first made of its input."""

    def __init__(self, top_k: tuple[int, int] = (2, 3)) -> None:
        super().__init__()
        options = {"score": Sigmoid(), "weigh": Weigh(normalize=True), "balancer": LossFree(step=0.01)}
        self.first, self.second = (Router(8, 16, k, **options) for k in top_k)  # type: ignore[arg-type]

    def forward(self, x_TD: Tensor, valid_T: Tensor | None = None) -> Tensor:
        y_T = self.first(x_TD, valid_T).weight_N.view(len(x_TD), -1).amax(dim=1)
        weight_N: Tensor = self.second(x_TD * (1.0 + y_T[:, None]), valid_T).weight_N
        return weight_N


def model(seed: int = 0) -> Two:
    torch.manual_seed(seed)
    return Two()


def batch(tokens: int = 256) -> Tensor:
    return torch.randn(tokens, 8, generator=torch.Generator().manual_seed(1))


def test_a_record_is_what_was_chosen_by_expert_id() -> None:
    two, x = model(), batch()
    with record_routes(two) as log:
        two(x)
    assert log.taken.expert_TLK.shape == (256, 2, 3)
    assert np.array_equal(log.taken.expert_TLK[:, 0, :2], two.first(x).expert_TK.numpy())
    assert (log.taken.expert_TLK[:, 0, 2] == -1).all()
    assert np.array_equal(log.wanted.expert_TLK, log.taken.expert_TLK)
    with record_routes(two) as log:
        pass
    assert log.taken.expert_TLK.shape[0] == 0


def test_a_replay_repeats_the_choice_and_weighs_with_its_own_scores() -> None:
    engine, trainer, x = model(0), model(1), batch()
    with record_routes(engine) as said:
        engine(x)
    with replay_routes(trainer, said.taken), record_routes(trainer) as log:
        weight_N = trainer(x)
    assert np.array_equal(log.taken.expert_TLK, said.taken.expert_TLK)
    assert flips(log.wanted, log.taken).token > 0.9, "two models at random want different experts"
    assert flips(said.taken, log.taken).token == 0.0
    weight_N.square().sum().backward()
    assert trainer.second.weight.grad is not None
    assert not torch.equal(weight_N, engine(x))
    with record_routes(trainer) as after:
        trainer(x)
    assert np.array_equal(after.taken.expert_TLK, after.wanted.expert_TLK), "outside of the replay it is itself again"


def test_a_replay_may_be_cut_into_other_batches() -> None:
    engine, x = model(), batch()
    with record_routes(engine) as said:
        engine(x)
    trainer = model(1)
    with replay_routes(trainer, said.taken), record_routes(trainer) as log:
        for some in torch.split(x, [100, 1, 155]):
            trainer(some)
    assert np.array_equal(log.taken.expert_TLK, said.taken.expert_TLK)


def test_precision_flips_choices_and_a_replay_takes_the_flips_away() -> None:
    exact = model().double()
    low, x = copy.deepcopy(exact).bfloat16(), batch(4096)
    with record_routes(low) as engine:
        low(x.bfloat16())
    with record_routes(exact) as alone:
        exact(x.double())
    with replay_routes(exact, engine.taken), record_routes(exact) as made:
        exact(x.double())
    plain = flips(engine.taken, alone.taken)
    assert 0 < plain.token < 0.2
    assert flips(engine.taken, made.taken).token == 0.0
    assert 0 < flips(made.wanted, made.taken).token < 0.2


def test_padding_chooses_nothing_and_does_not_count() -> None:
    two, x = model(), batch(8)
    valid_T = torch.arange(8) < 6
    with record_routes(two) as log:
        two(x, valid_T)
    assert (log.taken.expert_TLK[6:] == -1).all()
    with replay_routes(two, log.taken), record_routes(two) as again:
        two(x, valid_T)
    assert np.array_equal(again.wanted.expert_TLK, log.taken.expert_TLK)
    other = Routes(
        expert_TLK=(log.taken.expert_TLK + 1) % 16 * (log.taken.expert_TLK >= 0) - (log.taken.expert_TLK < 0)
    )
    assert flips(log.taken, other).token == 1.0


tables = st.integers(0, 2**32 - 1).map(
    lambda seed: np.random.default_rng(seed).permuted(np.tile(np.arange(5), (7, 3, 1)), axis=-1)[..., :2]
)


@given(tables, tables)
@settings(deadline=None)
def test_flips_are_the_tokens_whose_sets_differ(one: np.ndarray, two: np.ndarray) -> None:
    got = flips(Routes(expert_TLK=one), Routes(expert_TLK=two))
    differ_TL = np.array([[set(one[t, i]) != set(two[t, i]) for i in range(3)] for t in range(7)])
    lost_TL = np.array([[len(set(one[t, i]) - set(two[t, i])) for i in range(3)] for t in range(7)])
    np.testing.assert_allclose(got.token_L, differ_TL.mean(axis=0))
    np.testing.assert_allclose(got.row_L, lost_TL.mean(axis=0) / 2)
    assert got.token == pytest.approx(differ_TL.any(axis=1).mean())
    assert flips(Routes(expert_TLK=one), Routes(expert_TLK=one[..., ::-1])).token == 0.0


def test_routes_survive_a_file(tmp_path: Path) -> None:
    table = np.random.default_rng(0).integers(-1, 16, (9, 2, 3))
    Routes(expert_TLK=table).save(tmp_path / "routes.npz")
    assert np.array_equal(Routes.load(tmp_path / "routes.npz").expert_TLK, table)


def test_what_does_not_fit_is_named() -> None:
    two, x = model(), batch(4)
    with pytest.raises(ValueError, match=r"got \(4, 2\) of int64"):
        Routes(expert_TLK=np.zeros((4, 2), np.int64))
    with pytest.raises(ValueError, match="3 layers, the model 2 routers"), replay_routes(two, _zeros(4, 3)):
        pass
    with (
        pytest.raises(ValueError, match="expert 16 was chosen in layer 0, whose router has 16"),
        replay_routes(two, Routes(expert_TLK=_zeros(4, 2).expert_TLK + 16)),
    ):
        pass
    with (
        pytest.raises(ValueError, match="layer 0 is called for token 4; the routes are of 3"),
        replay_routes(two, _zeros(3, 2)),
    ):
        two(x)
    with (
        pytest.raises(ValueError, match="layer 0 was called for 4 tokens, the routes are of 5"),
        replay_routes(two, _zeros(5, 2)),
    ):
        two(x)
    with pytest.raises(ValueError, match="has no Router"), record_routes(nn.Linear(1, 1)):
        pass
    with pytest.raises(ValueError, match=r"\(4, 2, 3\) and \(5, 2, 3\)"):
        flips(_zeros(4, 2), _zeros(5, 2))
    with record_routes(two) as log:
        two.first(x)
    with pytest.raises(ValueError, match=r"heard \[4, 0\] tokens"):
        _ = log.taken


def test_a_bare_router_in_a_checkpoint_is_refused() -> None:
    two, x = model(), batch(4).requires_grad_()
    with replay_routes(two, _zeros(4, 2)):
        y = checkpoint(two, x, use_reentrant=False)
        with pytest.raises(ValueError, match="MoE repeats its choices"):
            y.sum().backward()


def _zeros(tokens: int, layers: int) -> Routes:
    return Routes(expert_TLK=np.zeros((tokens, layers, 3), np.int64))
