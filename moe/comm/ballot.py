"""Ballot: two numbers of each rank that ride along with the counts of a step, so that all ranks change over to another
epoch after the same step, without a message more."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray


class Ballot:
    """epoch: the one this rank is in. ready: the one it could change over to, 0 for none. It is set between two steps
    and stays for a whole step, however many layers carry it."""

    WORDS = 2

    def __init__(self, epoch: int) -> None:
        self.epoch, self.ready = epoch, 0
        self.agreed = 0

    def hear(self, word_RW: NDArray[np.int64]) -> None:
        """Every rank's words. agreed: the epoch that all are ready for, else 0."""
        epoch_R, ready_R = word_RW[:, 0], word_RW[:, 1]
        if (epoch_R != self.epoch).any():
            raise RuntimeError(f"ranks are in epochs {epoch_R.tolist()}, not in one; this is a bug, please report it")
        self.agreed = int(ready_R[0]) if (ready_R == ready_R[0]).all() else 0
