"""The planner of LLEP (arXiv 2601.17111), as somebody has it in a file of their own: none of its code is here.

    --llep PATH              the file that defines compute_llep_lpt_plan, as its authors' llep/gpt_oss_llep.py does
    --llep PATH:FUNCTION     another function of the same arguments

Its arguments, by name: global_expert_counts (a tensor [E], int64), ep_size, ep_rank where it has one,
num_local_experts, max_tokens_factor, min_tokens_per_gemm; experts live in order. What it returns has gpu_loads, a
number for each rank.
"""

from __future__ import annotations

import importlib
import inspect
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

Plan = Callable[[torch.Tensor, int], Any]
FUNCTION = "compute_llep_lpt_plan"


def planner_at(spec: str, *, headroom: float, min_chunk: int) -> Plan:
    """-> (count_E, ranks) -> its plan. ValueError if there is no such planner."""
    where, _, name = spec.partition(":")
    path, name = Path(where).resolve(), name or FUNCTION
    if not path.is_file():
        raise ValueError(f"--llep {spec}: there is no file {path}; name the file that defines {name}")
    try:
        plan = getattr(_module(path), name)
        ranked = "ep_rank" in inspect.signature(plan).parameters
    except (ImportError, AttributeError, TypeError) as error:
        raise ValueError(f"--llep {spec}: {type(error).__name__}: {error}; expected a function {name}") from None

    def planned(count_E: torch.Tensor, ranks: int) -> Any:
        return plan(
            global_expert_counts=count_E,
            ep_size=ranks,
            num_local_experts=len(count_E) // ranks,
            max_tokens_factor=headroom,
            min_tokens_per_gemm=min_chunk,
            **({"ep_rank": 0} if ranked else {}),
        )

    return planned


def peak(plan: Any) -> float:
    """The most rows of a rank by their mean."""
    load_R = torch.as_tensor(plan.gpu_loads, dtype=torch.float64)
    return float(load_R.max() / load_R.mean())


def _module(path: Path) -> Any:
    """Imported as part of the package that it lies in, if it lies in one."""
    folder, names = path.parent, [path.stem]
    while (folder / "__init__.py").exists():
        folder, names = folder.parent, [folder.name, *names]
    sys.path.insert(0, str(folder))
    try:
        return importlib.import_module(".".join(names))
    finally:
        sys.path.remove(str(folder))
