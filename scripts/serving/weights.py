"""A model that scripts.train trained, spread over any number of ranks, as it generates: at its standing prices."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch

from moe import Loop, checkpoint
from moe.comm import Group
from placement import Plan
from routing import Assigner, AtHome, Unpriced
from scripts.model import Bytes, Shape
from scripts.train import MODEL, SHAPE


def shape_of(folder: Path) -> Shape:
    """Of the model trained into a folder, without what only training needs."""
    if not (folder / MODEL).exists():
        raise ValueError(f"{folder} holds no model; train one to the end: python -m scripts.train -o {folder}")
    shape: Shape = torch.load(folder / SHAPE, weights_only=False)
    return replace(shape, moe=replace(shape.moe, balancer=Unpriced(), losses=(), compute=Loop()))


def load_model(
    folder: Path,
    group: Group = None,
    plan: Plan | None = None,
    *,
    assigner: Assigner = AtHome(),
    dtype: torch.dtype = torch.float32,
) -> Bytes:
    """plan: where the experts shall live, None for round robin."""
    shape = shape_of(folder)
    model = Bytes(replace(shape, moe=replace(shape.moe, assigner=assigner)), group, plan)
    checkpoint.load(folder / MODEL, model, group=group)
    return model.to(dtype).eval()
