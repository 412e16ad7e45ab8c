"""Attendance: hooks on a model, its optimisers and the functions that clip, which tell the examiners; and off again."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim.optimizer import Optimizer, register_optimizer_step_pre_hook

import moe.clip
from moe.doctor.block import Block, Said
from moe.doctor.examiner import Examiner, Heard

Undo = Callable[[], object]


class Attendance:
    """From its making until `close`. It reads and never writes, so the run's numbers stay as they are to the bit."""

    def __init__(self, model: nn.Module, blocks: Sequence[Block], examiners: Sequence[Examiner]) -> None:
        self.blocks, self.examiners = tuple(blocks), tuple(examiners)
        self.steps = 0
        self._own = {id(p) for p in model.parameters()}
        self._resting = True  # no forward since the last step
        self._mask: Tensor | None = None
        inner = model.module if isinstance(model, DistributedDataParallel) else model
        self._names = list(inspect.signature(inner.forward).parameters)
        self._undo: list[Undo] = []
        self._attach(inner)

    def close(self) -> None:
        while self._undo:
            self._undo.pop()()

    def _attach(self, inner: nn.Module) -> None:
        undo = self._undo
        undo.append(inner.register_forward_pre_hook(self._begins, with_kwargs=True).remove)
        undo.append(inner.register_forward_hook(self._ends).remove)
        for block in self.blocks:
            undo.append(block.module.register_forward_pre_hook(self._entering(block), prepend=True).remove)
            undo.extend(block.listen(self._telling(block)))
            # always: torch stops a recomputation in the middle of a forward, once it has what it wants
            undo.append(block.module.register_forward_hook(self._leaving(block), always_call=True).remove)
        undo.append(register_optimizer_step_pre_hook(self._steps).remove)
        for original in (torch.nn.utils.clip_grad.clip_grad_norm_, moe.clip.clip_grad_norm):
            undo.append(replaced(original, self._clipping(original)))

    def _begins(self, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        pad = getattr(getattr(module, "config", None), "pad_token_id", None)
        self._mask = mask_of(dict(zip(self._names, args)) | kwargs, pad)

    def _ends(self, module: nn.Module, args: Any, out: Any) -> None:
        self._mask = None
        for examiner in self.examiners:
            examiner.guarded(examiner.outer)(out, module.training)

    def _entering(self, block: Block) -> Callable[..., None]:
        def enter(module: nn.Module, args: Any) -> None:
            again = recomputing()
            if self._resting and not again and module.training:  # an evaluation may come before prices are settled
                self._resting = False
                for examiner in self.examiners:
                    examiner.guarded(examiner.opens)()
            for examiner in self.examiners:
                examiner.guarded(examiner.enters)(block, again)

        return enter

    def _leaving(self, block: Block) -> Callable[..., None]:
        def leave(module: nn.Module, args: Any, out: Any) -> None:
            for examiner in self.examiners:
                examiner.guarded(examiner.leaves)(block, recomputing())

        return leave

    def _telling(self, block: Block) -> Callable[[Said], None]:
        def tell(said: Said) -> None:
            again = recomputing()
            tokens = next((len(part) for part in (said.x_TD, said.chosen_TE) if part is not None), 0)
            mask_T = None if again else aligned(self._mask, tokens, block.sequence_first)
            real_T = said.real_T if mask_T is None else mask_T
            heard = Heard(block, said, real_T, said.real_T is not None, again, block.module.training)
            with torch.no_grad():
                for examiner in self.examiners:
                    examiner.guarded(examiner.hears)(heard)

        return tell

    def _steps(self, optimizer: Optimizer, *_: Any) -> None:
        held = [p for group in optimizer.param_groups for p in group["params"]]
        if self._resting or not any(id(p) in self._own for p in held):
            return
        self._resting = True
        self.steps += 1
        for examiner in self.examiners:
            examiner.guarded(examiner.steps)(held)

    def _clipping(self, original: Callable[..., Any]) -> Callable[..., Any]:
        signature = inspect.signature(original)

        def clip(*args: Any, **kwargs: Any) -> Any:
            bound = signature.bind(*args, **kwargs)
            bound.apply_defaults()
            first = next(iter(bound.arguments))
            what = bound.arguments[first]
            if isinstance(what, nn.Module):
                parameters: list[Tensor] = list(what.parameters())
            else:  # an iterator, perhaps, that lasts for one reading
                parameters = bound.arguments[first] = [what] if isinstance(what, Tensor) else list(what)
            mine = any(id(p) in self._own for p in parameters)
            for examiner in self.examiners if mine else ():
                examiner.guarded(examiner.clips)(parameters, float(bound.arguments["norm_type"]))
            norm = original(*bound.args, **bound.kwargs)
            for examiner in self.examiners if mine else ():
                examiner.guarded(examiner.clipped)(float(norm))
            return norm

        return clip


def recomputing() -> bool:
    """Within a backward: a forward there is not the first of its kind."""
    return torch._C._current_graph_task_id() != -1


def mask_of(named: dict[str, Any], pad: int | None) -> Tensor | None:
    """[B, S], False for padding, as far as the arguments of the model tell; None if they do not.

    attention_mask: 0 for padding. valid: False for padding. Without them, tokens at an end of a sequence that are the
    padding token and have no label.
    """
    for name in ("attention_mask", "valid"):
        mask = named.get(name)
        if isinstance(mask, Tensor) and mask.ndim <= 2 and _tells_padding(mask):
            return mask != 0
    ids, labels = named.get("input_ids"), named.get("labels")
    if pad is None or not (isinstance(ids, Tensor) and isinstance(labels, Tensor) and ids.shape == labels.shape):
        return None
    idle = (ids == pad) & (labels == -100)
    tail = idle.flip(-1).long().cumprod(-1).flip(-1) + idle.long().cumprod(-1)
    run = tail.bool()
    return ~run if bool((run.sum(-1) >= 2).any()) and ids.ndim == 2 else None


def _tells_padding(mask: Tensor) -> bool:
    """Neither something to add to scores, which is 0 where nothing is masked, nor who attends to whom."""
    causal = (
        mask.ndim == 2
        and mask.shape[0] == mask.shape[1] > 1
        and torch.equal(mask, mask.tril())
        and bool(mask[-1].all())
    )
    return bool((mask >= 0).all()) and bool((mask > 0).any()) and not causal


def aligned(mask: Tensor | None, tokens: int, sequence_first: bool) -> Tensor | None:
    """A line for each token of the router, where there are as many."""
    if mask is None or mask.numel() != tokens:
        return None
    return (mask.mT if sequence_first and mask.ndim == 2 else mask).reshape(-1)


def replaced(original: Callable[..., Any], replacement: Callable[..., Any]) -> Undo:
    """In every module that has it by name. -> a function that puts it back, also where it was taken up since"""

    def swap(old: object, new: object) -> None:
        for module in list(sys.modules.values()):
            names = getattr(module, "__dict__", None)
            for name in [name for name, value in list((names or {}).items()) if value is old]:
                names[name] = new  # type: ignore[index]

    swap(original, replacement)
    return lambda: swap(replacement, original)
