"""Measuring the expert matrices on this machine: seconds for so many rows, for the simulator."""

from __future__ import annotations

import platform
import time
from collections.abc import Callable, Sequence
from importlib.util import find_spec

import numpy as np

from placement.simulate import ExpertShape, GemmCurve


def calibrate(
    shape: ExpertShape, rows: Sequence[int], *, repeats: int = 5, done: Callable[[int], None] = lambda rows: None
) -> GemmCurve:
    """Medians of `repeats` runs for each number of rows, after one to warm up. torch and its GPU where there are any.

    done is told each number of rows once it is measured.
    """
    ascending = sorted(set(rows))
    if len(ascending) < 2 or ascending[0] < 1:
        raise ValueError(f"calibrate needs two different numbers of rows or more, each at least 1; got {list(rows)}")
    run, source = _torch(shape) if find_spec("torch") else _numpy(shape)
    seconds = []
    for count in ascending:
        run(count)
        times = []
        for _ in range(repeats):
            start = time.perf_counter()
            run(count)
            times.append(time.perf_counter() - start)
        seconds.append(float(np.median(times)))
        done(count)
    sizes = f"{shape.matrices} matrices of {shape.dim} x {shape.hidden}"
    source = f"measured: {source}, {sizes}"
    return GemmCurve(rows=tuple(ascending), seconds=tuple(seconds), source=source, dim=shape.dim, hidden=shape.hidden)


def _torch(shape: ExpertShape) -> tuple[Callable[[int], None], str]:
    import torch

    gpu = torch.cuda.is_available()
    device, dtype = ("cuda", torch.bfloat16) if gpu else ("cpu", torch.float32)
    up = torch.ones(shape.dim, shape.hidden, device=device, dtype=dtype)
    down = torch.ones(shape.hidden, shape.dim, device=device, dtype=dtype)

    def run(rows: int) -> None:
        x = torch.ones(rows, shape.dim, device=device, dtype=dtype)
        for _ in range(shape.matrices - 1):
            hidden = x @ up
        _ = hidden @ down if shape.matrices > 1 else x @ up
        if gpu:
            torch.cuda.synchronize()

    name = torch.cuda.get_device_name() if gpu else f"{platform.machine()} CPU, {torch.get_num_threads()} threads"
    return run, f"torch {torch.__version__}, {str(dtype).removeprefix('torch.')}, {name}"


def _numpy(shape: ExpertShape) -> tuple[Callable[[int], None], str]:
    up, down = np.ones((shape.dim, shape.hidden), np.float32), np.ones((shape.hidden, shape.dim), np.float32)

    def run(rows: int) -> None:
        x = np.ones((rows, shape.dim), np.float32)
        for _ in range(shape.matrices - 1):
            hidden = x @ up
        _ = hidden @ down if shape.matrices > 1 else x @ up

    return run, f"numpy {np.__version__}, float32, {platform.machine()} CPU"
