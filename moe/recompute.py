"""Replays: a decision made in forward is found again when activation checkpointing runs the forward a second time.

Deciding again would be wrong, not only slow: a recomputed score may differ in its last bit, a tie then falls the other
way, and rows would go elsewhere than the saved activations say. So a decision is kept with the checkpoint that encloses
the call, for as long as that checkpoint lives, and the recomputation takes it from there, call by call in order.

Both of torch's checkpoints are recognised on the call stack, as is any other that is an autograd.Function running the
model in its forward and again in its backward (Megatron's and DeepSpeed's are):

    reentrant      the function's ctx is the same object in its forward and in its backward
    non-reentrant  torch's checkpoint frame, found in forward through the running `checkpoint(...)` call or the saved-
                   tensor hooks it set, in backward through its unpack hook
"""

from __future__ import annotations

import sys
from dataclasses import dataclass, field
from types import FrameType
from typing import Generic, TypeVar

import torch
from torch.autograd.function import FunctionCtx
from torch.utils.checkpoint import _CheckpointFrame

T = TypeVar("T")
_ATTRIBUTE = "_evenmoe_replays"


@dataclass(eq=False)
class _Tape(Generic[T]):
    """What one layer decided in one checkpoint, call by call, and how far each backward has replayed it."""

    kept: list[T] = field(default_factory=list)
    played: dict[int, int] = field(default_factory=dict)


class Replays(Generic[T]):
    """The decisions of one layer that may be wanted again. `find` before deciding, `keep` after."""

    def find(self) -> T | None:
        """The decision this recomputation must repeat; None if this call is not a recomputation."""
        task = torch._C._current_graph_task_id()
        if task == -1:
            return None
        _, source = _enclosing()
        tape: _Tape[T] | None = getattr(source, _ATTRIBUTE, {}).get(self)
        if tape is None:
            return None
        index = tape.played.get(task, 0)
        if index >= len(tape.kept):
            raise RuntimeError(
                f"the recomputation called this layer {index + 1} times, its forward {len(tape.kept)} times; a "
                f"checkpointed function must do the same thing twice"
            )
        tape.played[task] = index + 1
        return tape.kept[index]

    def keep(self, decision: T) -> None:
        """Keep a decision for every checkpoint that encloses this call and may run it again."""
        for checkpoint in _enclosing()[0]:
            tapes: dict[Replays[T], _Tape[T]] | None = getattr(checkpoint, _ATTRIBUTE, None)
            if tapes is None:
                tapes = {}
                setattr(checkpoint, _ATTRIBUTE, tapes)
            tapes.setdefault(self, _Tape()).kept.append(decision)


def _enclosing() -> tuple[list[object], object | None]:
    """The checkpoints being recorded around this call, from the inside out, up to the one being recomputed, if any."""
    recording: list[object] = []
    if (hooked := _hooked_frame()) is not None:
        recording.append(hooked)
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        code = frame.f_code
        if code.co_name == "unpack_hook" and "frame" in code.co_freevars:
            checkpoint = frame.f_locals["frame"]
            if isinstance(checkpoint, _CheckpointFrame):
                return recording, checkpoint
        elif code.co_name == "checkpoint" and "gen" in code.co_varnames:
            generator = frame.f_locals.get("gen")
            running = getattr(generator, "gi_frame", None)
            checkpoint = running.f_locals.get("new_frame") if running is not None else None
            if isinstance(checkpoint, _CheckpointFrame) and checkpoint not in recording:
                recording.append(checkpoint)
        elif code.co_name in ("forward", "backward") and code.co_varnames[:1] == ("ctx",):
            ctx = frame.f_locals.get("ctx")
            if isinstance(ctx, FunctionCtx):
                if code.co_name == "backward":
                    return recording, ctx
                recording.append(ctx)
        frame = frame.f_back
    return recording, None


def _hooked_frame() -> _CheckpointFrame | None:
    """The non-reentrant checkpoint whose hooks are set right now, however it was entered."""
    hooks = torch._C._autograd._top_saved_tensors_default_hooks(False)
    if hooks is None:
        return None
    pack = hooks[0]
    cells = dict(zip(pack.__code__.co_freevars, pack.__closure__ or ())) if hasattr(pack, "__code__") else {}
    frame = cells["frame"].cell_contents if "frame" in cells else None
    return frame if isinstance(frame, _CheckpointFrame) else None
