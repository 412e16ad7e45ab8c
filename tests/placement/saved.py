"""A value as a file, in the form that the file's name says."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch


def saved(path: Path, value: Any) -> Path:
    if path.suffix == ".npz":
        np.savez(path, **value)
    elif path.suffix == ".npy":
        np.save(path, value)
    elif path.suffix == ".pt":
        torch.save(value, path)
    else:
        path.write_text(value if isinstance(value, str) else json.dumps(value))
    return path
