"""Loads, topologies and traces for the laws."""

from __future__ import annotations

import numpy as np
from hypothesis import strategies as st

from placement import LoadTrace, Topology


@st.composite
def topologies(draw: st.DrawFn, num_experts: int, *, uneven: bool = True) -> Topology:
    """Room for every expert, often for copies; ranks of uneven slots and speeds."""
    ranks = draw(st.integers(1, 6))
    least = -(-num_experts // ranks)
    if uneven:
        slots_R = tuple(draw(st.integers(0, least + 2)) for _ in range(ranks))
        slots_R = (*slots_R[:-1], max(slots_R[-1], num_experts - sum(slots_R[:-1])))
    else:
        slots_R = (least + draw(st.integers(0, 2)),) * ranks
    speed_R = tuple(draw(st.sampled_from([1.0, 1.0, 0.5, 2.0])) for _ in range(ranks)) if uneven else ()
    return Topology(slots_R=slots_R, ranks_per_node=draw(st.integers(1, ranks)), speed_R=speed_R)


@st.composite
def loads(draw: st.DrawFn, *, windows: int = 1, layers: int = 2, most_experts: int = 9) -> LoadTrace:
    """Small whole loads, zeros and ties among them."""
    num_experts = draw(st.integers(1, most_experts))
    cells = windows * layers * num_experts
    flat = draw(st.lists(st.sampled_from([0, 0, 1, 2, 3, 5, 5, 40]), min_size=cells, max_size=cells))
    load_WLE = np.array(flat, dtype=np.float64).reshape(windows, layers, num_experts)
    load_WLE[0, :, 0] += load_WLE.sum(axis=(0, 2)) == 0
    return LoadTrace(load_WLE=load_WLE)


def choices(seed: int, *, tokens: int, layers: int, experts: int, top_k: int, follows: float = 0.7) -> LoadTrace:
    """A generated trace in which an expert has a favourite successor, and experts differ in load."""
    random = np.random.default_rng(seed)
    popular_LE = random.lognormal(0.0, 0.7, (layers, experts))
    next_LE = np.stack([random.permutation(experts) for _ in range(layers)])
    expert_TLK = np.zeros((tokens, layers, top_k), dtype=np.int64)
    for token in range(tokens):
        for layer in range(layers):
            chosen: list[int] = []
            if layer:
                chosen = [int(next_LE[layer, e]) for e in expert_TLK[token, layer - 1] if random.random() < follows]
            weight_E = popular_LE[layer].copy()
            weight_E[chosen] = 0.0
            rest = random.choice(experts, top_k - len(chosen), replace=False, p=weight_E / weight_E.sum())
            expert_TLK[token, layer] = [*chosen, *rest.tolist()]
    return LoadTrace.from_choices(expert_TLK, num_experts=experts)


def coactive(seed: int, *, tokens: int, layers: int, experts: int, top_k: int, bands: int) -> LoadTrace:
    """A generated trace in which the experts of a band are chosen together; bands differ by layer."""
    random = np.random.default_rng(seed)
    band_LE = np.stack([random.permutation(np.arange(experts) % bands) for _ in range(layers)])
    own_TLE = random.integers(bands, size=(tokens, layers, 1)) == band_LE
    chance_TLE = np.where(own_TLE, 0.8 * bands / experts, 0.2 / (experts - experts // bands))
    # The top k of log p + Gumbel noise are k draws without replacement.
    drawn_TLE = np.log(chance_TLE) + random.gumbel(size=chance_TLE.shape)
    return LoadTrace.from_choices(np.argsort(-drawn_TLE, axis=2)[:, :, :top_k], num_experts=experts)


def drawn_loads(seed: int, *, windows: int = 1, layers: int = 4, experts: int = 32, spread: float = 1.0) -> LoadTrace:
    """Lognormal loads; windows of one trace wander from a common mean."""
    random = np.random.default_rng(seed)
    mean_LE = random.lognormal(0.0, spread, (layers, experts))
    return LoadTrace(load_WLE=mean_LE * random.lognormal(0.0, 0.3 * (windows > 1), (windows, layers, experts)) * 1000)
