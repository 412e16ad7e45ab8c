"""The router's decision in Triton: from scores and prices to the experts of each token, their weights and the loads.

A priced score and its expert become one whole number, in the order of the scores and then of the experts, so a maximum
finds both, equals go to the lowest expert, and no answer depends on how a reduction is cut. Import it through
`routing.launch`, which knows whether Triton is there.
"""

from __future__ import annotations

import triton
import triton.language as tl

TAKEN = tl.constexpr(-(2**63))  # below every number that a score can become


@triton.jit
def in_order(x):
    """fp32 -> int32 in the same order: both zeros are equal, and NaN is above all else, as in torch.topk"""
    bits = tl.where(x == 0.0, 0.0, x).to(tl.int32, bitcast=True)
    size = bits & 0x7FFFFFFF
    return tl.where(size > 0x7F800000, 0x7FFFFFFF, tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits))


@triton.jit
def decide(
    score, price, valid, expert, weight, load, tokens, experts, stride_t, stride_e, scale,
    PADDED: tl.constexpr, WHOLE: tl.constexpr, NORMALIZED: tl.constexpr, TOP_K: tl.constexpr, CHOICES: tl.constexpr,
    TOKENS: tl.constexpr, EXPERTS: tl.constexpr,
):  # fmt: skip
    """expert_tk = the k-th best of score_te - price_e. WHOLE: weight_tk, and load_e with whatever it held before; a
    token of padding has expert -1, weight 0 and no part in the load."""
    t = tl.program_id(0).to(tl.int64) * TOKENS + tl.arange(0, TOKENS)
    e = tl.arange(0, EXPERTS)
    live, known = t < tokens, e < experts
    row = score + t * stride_t
    priced = tl.load(row[:, None] + e.to(tl.int64)[None, :] * stride_e, mask=live[:, None] & known[None, :], other=0.0)
    priced -= tl.load(price + e, mask=known, other=0.0)[None, :]
    left = (in_order(priced).to(tl.int64) << 32) | (EXPERTS - 1 - e)[None, :]
    left = tl.where(known[None, :], left, TAKEN)
    k = tl.arange(0, CHOICES)
    chosen = tl.zeros((TOKENS, CHOICES), tl.int64)
    for i in range(TOP_K):
        best = tl.max(left, 1)
        left = tl.where(left == best[:, None], TAKEN, left)
        chosen = tl.where(k[None, :] == i, (EXPERTS - 1 - (best & (EXPERTS - 1)))[:, None], chosen)
    at = t[:, None] * TOP_K + k[None, :]
    there = live[:, None] & (k < TOP_K)[None, :]
    if WHOLE:
        if PADDED:
            live = live & (tl.load(valid + t, mask=live, other=0) != 0)
        count = tl.sum(((left == TAKEN) & known[None, :] & live[:, None]).to(tl.int64), 0)
        tl.atomic_add(load + e, count, mask=count > 0, sem="relaxed")  # whole numbers: in any order the same
        by = tl.load(row[:, None] + chosen * stride_e, mask=there & live[:, None], other=0.0)
        if NORMALIZED:
            by = by / (tl.sum(by, 1) + 1e-20)[:, None]
        tl.store(weight + at, by * scale, mask=there)
        chosen = tl.where(live[:, None], chosen, -1)
    tl.store(expert + at, chosen, mask=there)
