"""Counting what tokens chose: loads, who follows whom from layer to layer, who is chosen together."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from placement.arrays import FloatArray


def loads(expert_TLK: NDArray[np.int32], window_T: NDArray[np.int64], windows: int, num_experts: int) -> FloatArray:
    """load_WLE: rows sent to each expert; -1 is a choice not made."""
    _, layers, _ = expert_TLK.shape
    token_N, layer_N, choice_N = np.nonzero(expert_TLK >= 0)
    cell_N = (window_T[token_N] * layers + layer_N) * num_experts + expert_TLK[token_N, layer_N, choice_N]
    count_N = np.bincount(cell_N, minlength=windows * layers * num_experts)
    return count_N.reshape(windows, layers, num_experts).astype(np.float64)


def follow(expert_TLK: NDArray[np.int32], num_experts: int) -> FloatArray:
    """pair_LEE: each token spreads a mass of 1 over its (choice here, choice next) pairs of each layer and the next."""
    layers = expert_TLK.shape[1]
    pair_LEE = np.zeros((layers - 1, num_experts, num_experts))
    for layer in range(layers - 1):
        here_TK, next_TK = expert_TLK[:, layer].astype(np.int64), expert_TLK[:, layer + 1].astype(np.int64)
        made_TKK = (here_TK >= 0)[:, :, None] & (next_TK >= 0)[:, None, :]
        mass_TKK = made_TKK / np.maximum(made_TKK.sum(axis=(1, 2), keepdims=True), 1)
        cell_TKK = here_TK[:, :, None] * num_experts + next_TK[:, None, :]
        counted = np.bincount(cell_TKK[made_TKK], weights=mass_TKK[made_TKK], minlength=num_experts**2)
        pair_LEE[layer] = counted.reshape(num_experts, num_experts)
    return pair_LEE


def together(expert_TLK: NDArray[np.int32], num_experts: int) -> FloatArray:
    """together_LEE: how many tokens chose experts e and f both; 0 for e = f."""
    tokens, layers, _ = expert_TLK.shape
    together_LEE = np.zeros((layers, num_experts, num_experts))
    for layer in range(layers):
        chosen_TE = np.zeros((tokens, num_experts), dtype=np.float32)
        token_N, choice_N = np.nonzero(expert_TLK[:, layer] >= 0)
        chosen_TE[token_N, expert_TLK[token_N, layer, choice_N]] = 1.0
        together_LEE[layer] = chosen_TE.T @ chosen_TE
        np.fill_diagonal(together_LEE[layer], 0.0)
    return together_LEE
