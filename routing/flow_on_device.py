"""Flow on the device of the tables: what Assignment.flow_RRE says, of fixed shapes and with nothing read back."""

from __future__ import annotations

import torch
from torch import Tensor


def flow_on_device(count_RE: Tensor, quota_RE: Tensor) -> Tensor:
    """Rows going [source, destination, expert]. A rank computes its own rows first; the rest of an expert's rows lie on
    a line in source order, the rest of its quotas on the same line, and where two intervals overlap rows flow."""
    kept_RE = torch.minimum(count_RE, quota_RE)
    end_DE = (quota_RE - kept_RE).cumsum(dim=0)
    start_DE = end_DE - (quota_RE - kept_RE)
    last_SE = (count_RE - kept_RE).cumsum(dim=0)
    first_SE = last_SE - (count_RE - kept_RE)
    flow_SDE = torch.minimum(end_DE, last_SE[:, None]) - torch.maximum(start_DE, first_SE[:, None])
    flow_SDE = flow_SDE.clamp(min=0)
    flow_SDE.diagonal(dim1=0, dim2=1).add_(kept_RE.T)
    return flow_SDE
