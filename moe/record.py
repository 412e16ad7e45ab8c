"""Recorder: the choices of a model's layers, kept as a LoadTrace for the planner."""

from __future__ import annotations

from collections.abc import Callable
from types import TracebackType
from typing import Self

import numpy as np
from numpy.typing import NDArray
from torch import nn

from moe.layer import MoE
from placement import LoadTrace
from routing import NOWHERE, Assignment, Choice


class Recorder:
    """Listens to every MoE layer of a model, from its making until `close`, or within a `with`.

        with Recorder(model) as recorder:
            for name, batch in batches:
                model(batch)
                recorder.end_window(name)
        recorder.trace().save("trace.npz")

    What each token of this rank chose in every layer is copied to the host, once a layer and forward: meant for traces
    of some minutes, not for every step of a run.
    """

    def __init__(self, model: nn.Module) -> None:
        self.layers = [module for module in model.modules() if isinstance(module, MoE)]
        if not self.layers:
            raise ValueError("the model has no MoE layer to record")
        self._handles = [layer.observe(self._listener(number)) for number, layer in enumerate(self.layers)]
        self._heard: list[list[NDArray[np.int64]]] = [[] for _ in self.layers]
        self._windows: list[list[int]] = [[] for _ in self.layers]
        self._names: list[str] = []

    def end_window(self, name: str = "") -> None:
        """What is heard from now on belongs to the next window. Windows of one name are one scenario."""
        self._names.append(name)

    def close(self) -> None:
        for handle in self._handles:
            handle.remove()

    def trace(self) -> LoadTrace:
        """Everything heard in windows that have ended."""
        columns = [self._column(layer) for layer in range(len(self.layers))]
        tokens = {len(window_T) for _, window_T in columns}
        if len(tokens) != 1 or tokens == {0}:
            raise ValueError(
                f"the layers heard {[len(window_T) for _, window_T in columns]} tokens in {len(self._names)} windows "
                f"that ended; call every layer once for each token, and end_window() after each window"
            )
        most = max(expert_TK.shape[1] for expert_TK, _ in columns)
        expert_TLK = np.stack([_widened(expert_TK, most) for expert_TK, _ in columns], axis=1).astype(np.int32)
        real_T = (expert_TLK != NOWHERE).any(axis=(1, 2))  # padding chose nothing
        return LoadTrace.from_choices(
            expert_TLK[real_T],
            num_experts=max(layer.config.num_experts for layer in self.layers),
            window_T=columns[0][1][real_T],
            name_W=self._names if any(self._names) else (),
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _listener(self, number: int) -> Callable[[Choice, Assignment], None]:
        def listen(choice: Choice, assignment: Assignment) -> None:
            self._heard[number].append(_table(choice))
            self._windows[number].append(len(self._names))

        return listen

    def _column(self, layer: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """expert_TK of one layer, and the window of each token."""
        heard = [(heard, w) for heard, w in zip(self._heard[layer], self._windows[layer]) if w < len(self._names)]
        if not heard:
            return np.empty((0, 1), dtype=np.int64), np.empty(0, dtype=np.int64)
        window_T = np.concatenate([np.full(len(expert_TK), window) for expert_TK, window in heard])
        most = max(expert_TK.shape[1] for expert_TK, _ in heard)
        return np.concatenate([_widened(expert_TK, most) for expert_TK, _ in heard]), window_T


def _table(choice: Choice) -> NDArray[np.int64]:
    """A line for each token, with the experts it went to, -1 after the last; a token may have gone to none."""
    if choice.top_k is not None:
        return choice.expert_TK.cpu().numpy()
    token_N, expert_N = choice.token_N.cpu().numpy(), choice.expert_N.cpu().numpy()
    token_N, expert_N = token_N[expert_N != NOWHERE], expert_N[expert_N != NOWHERE]
    order_N = np.argsort(token_N, kind="stable")
    token_N, expert_N = token_N[order_N], expert_N[order_N]
    count_T = np.bincount(token_N, minlength=choice.num_tokens)
    place_N = np.arange(len(token_N)) - np.repeat(np.cumsum(count_T) - count_T, count_T)
    expert_TK = np.full((choice.num_tokens, max(int(count_T.max(initial=0)), 1)), NOWHERE, dtype=np.int64)
    expert_TK[token_N, place_N] = expert_N
    return expert_TK


def _widened(expert_TK: NDArray[np.int64], most: int) -> NDArray[np.int64]:
    return np.pad(expert_TK, ((0, 0), (0, most - expert_TK.shape[1])), constant_values=NOWHERE)
