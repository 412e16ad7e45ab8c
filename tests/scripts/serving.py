"""A small model and a few requests, and what one process answers, byte by byte, without a cache."""

from __future__ import annotations

import functools
from dataclasses import replace
from typing import NamedTuple

import torch

from moe import Loop, MoEConfig
from moe.comm import Group
from placement import Plan
from routing import Assignment, Choice
from scripts.model import Bytes, Shape
from scripts.serving.requests import Arrivals, Drift, Poisson, Request, stream
from scripts.text import by_package

SHAPE = Shape(moe=MoEConfig(dim=16, hidden=16, num_experts=8, top_k=2, compute=Loop()), layers=2, heads=2, length=32)


def model_of(group: Group = None, plan: Plan | None = None, *, top_k: int = 2) -> Bytes:
    """The same weights on any number of ranks. Untrained, and stirred, so that answers are not one byte repeated."""
    torch.manual_seed(3)
    model = Bytes(replace(SHAPE, moe=replace(SHAPE.moe, top_k=top_k)), group, plan).double().eval()
    with torch.no_grad():
        for layer in model.layers:
            layer.out.weight.mul_(3)
            layer.moe.experts.down.mul_(8)
    return model


def requests_of(count: int = 14, arrivals: Arrivals = Poisson(rate=1.0), seed: int = 0) -> tuple[Request, ...]:
    texts = {name: text[:4096] for name, text in _texts().items()}
    return stream(texts, count, arrivals, Drift(period=4), prompt=(1, 20), new_tokens=(1, 12), seed=seed)


class Page(NamedTuple):
    """margin: how close the closest decision of all was, between two bytes or between two experts."""

    answer: bytes
    margin: float


@torch.no_grad()
def by_the_book(model: Bytes, request: Request) -> Page:
    """The whole sequence again for every byte."""
    margins: list[float] = []

    def hear(choice: Choice, assignment: Assignment) -> None:
        best_TE = choice.score_TE.sort(dim=-1, descending=True).values
        margins.append(float((best_TE[:, choice.k - 1] - best_TE[:, choice.k]).min()))

    handles = [layer.moe.observe(hear) for layer in model.layers]
    text = request.prompt
    for _ in range(request.new_tokens):
        logits_V = model(torch.tensor([list(text)]))[0, -1]
        first, second = logits_V.topk(2).values.tolist()
        margins.append(first - second)
        text += bytes([int(logits_V.argmax())])
    for handle in handles:
        handle.remove()
    return Page(text[len(request.prompt) :], min(margins))


@functools.cache
def pages(top_k: int = 2) -> dict[int, Page]:
    model = model_of(top_k=top_k)
    return {request.id: by_the_book(model, request) for request in requests_of()}


def book(top_k: int = 2) -> dict[int, bytes]:
    return {number: page.answer for number, page in pages(top_k).items()}


@functools.cache
def _texts() -> dict[str, torch.Tensor]:
    return by_package()
