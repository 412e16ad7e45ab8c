"""Kernels in Triton: rows to experts, the experts' matmuls with the gather in them, and rows back to tokens.

Which rows are whose is read on the device, from end_A, where each expert's rows end: a grid is as large as the shapes
could need, and a program that finds no rows for itself ends at once. Everything is added in fp32, in a fixed order and
without atomics, so that two runs agree to the bit. Import it through `moe.fused`, which knows whether Triton is there.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def find_tile(end_A, experts, tile, EXPERTS: tl.constexpr, ROWS: tl.constexpr):
    """Tiles are counted through the experts, so many rows each. -> expert, the tile's first row, the expert's end; a
    tile past the last one ends where it begins."""
    lane = tl.arange(0, EXPERTS)
    end = tl.load(end_A + lane, mask=lane < experts, other=0)
    start = tl.load(end_A + lane - 1, mask=(lane > 0) & (lane < experts), other=0)
    tiles = tl.where(lane < experts, (end - start + ROWS - 1) // ROWS, 0)
    until = tl.cumsum(tiles, 0)
    expert = tl.sum((until <= tile).to(tl.int32), 0)
    first = tl.sum(tl.where(lane == expert, start + (tile - until + tiles) * ROWS, 0), 0)
    return expert.to(tl.int64), first, tl.sum(tl.where(lane == expert, end, 0), 0)


@triton.jit
def find_place(columns, tiles, COLUMNS: tl.constexpr, GROUP: tl.constexpr):
    """Neighbours share an expert's columns and few tiles, which then stay in the cache. -> tile, first column"""
    blocks = tl.cdiv(columns, COLUMNS)
    group = tl.program_id(0) // (GROUP * blocks)
    within = tl.program_id(0) % (GROUP * blocks)
    wide = min(GROUP, tiles - group * GROUP)
    return group * GROUP + within % wide, within // wide * COLUMNS


@triton.jit
def find_rows(index, first, last, INDEXED: tl.constexpr, ROWS: tl.constexpr):
    """-> m, whether there is such a row, and where it lies"""
    m = first + tl.arange(0, ROWS)
    live = m < last
    at = tl.load(index + m, mask=live, other=0) if INDEXED else m
    return m.to(tl.int64), live, at.to(tl.int64)


@triton.jit
def dot(a, b, acc, WIDE: tl.constexpr):
    """WIDE: for Triton's interpreter, which cannot multiply bf16. The products are the same."""
    if WIDE:
        a, b = a.to(tl.float32), b.to(tl.float32)
    return tl.dot(a, b, acc, input_precision="ieee")


@triton.jit
def multiply(row, live, weight, known, inner, stride, acc, INNER: tl.constexpr, WIDE: tl.constexpr):
    """acc + row weight^T. row: pointers to the first entries of rows; weight: to those of columns, `stride` apart."""
    k = tl.arange(0, INNER)
    for start in range(0, inner, INNER):
        here = start + k < inner
        a = tl.load(row[:, None] + (start + k)[None, :], mask=live[:, None] & here[None, :], other=0.0)
        b = tl.load(weight[None, :] + (start + k)[:, None] * stride, mask=here[:, None] & known[None, :], other=0.0)
        acc = dot(a, b, acc, WIDE)
    return acc


@triton.jit
def times(
    source, index, weight, bias, end_A, out, experts, tiles, columns, inner, stride_e, stride_n, stride_k,
    INDEXED: tl.constexpr, BIASED: tl.constexpr, EXPERTS: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
    INNER: tl.constexpr, GROUP: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """out_m = weight_e source(index_m) + bias_e"""
    tile, column = find_place(columns, tiles, COLUMNS, GROUP)
    expert, first, last = find_tile(end_A, experts, tile, EXPERTS, ROWS)
    if first >= last:
        return
    m, live, at = find_rows(index, first, last, INDEXED, ROWS)
    n = column + tl.arange(0, COLUMNS)
    known = n < columns
    acc = tl.zeros((ROWS, COLUMNS), tl.float32)
    acc = multiply(
        source + at * inner, live, weight + expert * stride_e + n.to(tl.int64) * stride_n, known, inner, stride_k, acc,
        INNER, WIDE,
    )  # fmt: skip
    if BIASED:
        acc += tl.load(bias + expert * columns + n, mask=known, other=0.0).to(tl.float32)[None, :]
    tl.store(out + m[:, None] * columns + n[None, :], acc, mask=live[:, None] & known[None, :])


@triton.jit
def gated(
    source, index, weight, bias, end_A, h, out, experts, tiles, columns, inner, stride_e, stride_n, stride_k,
    INDEXED: tl.constexpr, BIASED: tl.constexpr, KEEP: tl.constexpr, EXPERTS: tl.constexpr, ROWS: tl.constexpr,
    COLUMNS: tl.constexpr, INNER: tl.constexpr, GROUP: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """h_m = weight_e source(index_m) + bias_e, out_m = silu(gate) up, where h = (gate, up) is kept or not. Both halves
    are made side by side, from rows that are read once."""
    tile, column = find_place(columns, tiles, COLUMNS, GROUP)
    expert, first, last = find_tile(end_A, experts, tile, EXPERTS, ROWS)
    if first >= last:
        return
    m, live, at = find_rows(index, first, last, INDEXED, ROWS)
    n = column + tl.arange(0, COLUMNS)
    known = n < columns
    row = source + at * inner
    left = weight + expert * stride_e + n.to(tl.int64) * stride_n
    gate = tl.zeros((ROWS, COLUMNS), tl.float32)
    up = tl.zeros((ROWS, COLUMNS), tl.float32)
    k = tl.arange(0, INNER)
    for start in range(0, inner, INNER):
        here = start + k < inner
        there = here[:, None] & known[None, :]
        a = tl.load(row[:, None] + (start + k)[None, :], mask=live[:, None] & here[None, :], other=0.0)
        b = left[None, :] + (start + k)[:, None] * stride_k
        gate = dot(a, tl.load(b, mask=there, other=0.0), gate, WIDE)
        up = dot(a, tl.load(b + columns * stride_n, mask=there, other=0.0), up, WIDE)
    if BIASED:
        beside = bias + expert * 2 * columns + n
        gate += tl.load(beside, mask=known, other=0.0).to(tl.float32)[None, :]
        up += tl.load(beside + columns, mask=known, other=0.0).to(tl.float32)[None, :]
    there = live[:, None] & known[None, :]
    if KEEP:
        kept = h + m[:, None] * (2 * columns) + n[None, :]
        tl.store(kept, gate, mask=there)
        tl.store(kept + columns, up, mask=there)
    tl.store(out + m[:, None] * columns + n[None, :], gate * tl.sigmoid(gate) * up, mask=there)


@triton.jit
def gated_back(
    source, index, weight, end_A, h, scale, dh, out, dot, experts, tiles, columns, inner, rows, stride_e, stride_n,
    stride_k, INDEXED: tl.constexpr, SCALED: tl.constexpr, EXPERTS: tl.constexpr, ROWS: tl.constexpr,
    COLUMNS: tl.constexpr, INNER: tl.constexpr, GROUP: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """s_m = down_e^T source(index_m), dh_m = act'(h_m)^T scale_m s_m, out_m = scale_m a_m, and <s_m, a_m> in parts, one
    for each block of columns."""
    tile, column = find_place(columns, tiles, COLUMNS, GROUP)
    expert, first, last = find_tile(end_A, experts, tile, EXPERTS, ROWS)
    if first >= last:
        return
    m, live, at = find_rows(index, first, last, INDEXED, ROWS)
    n = column + tl.arange(0, COLUMNS)
    known = n < columns
    s = tl.zeros((ROWS, COLUMNS), tl.float32)
    s = multiply(
        source + at * inner, live, weight + expert * stride_e + n.to(tl.int64) * stride_n, known, inner, stride_k, s,
        INNER, WIDE,
    )  # fmt: skip
    there = live[:, None] & known[None, :]
    kept = m[:, None] * (2 * columns) + n[None, :]
    gate = tl.load(h + kept, mask=there, other=0.0).to(tl.float32)
    up = tl.load(h + kept + columns, mask=there, other=0.0).to(tl.float32)
    sigmoid = tl.sigmoid(gate)
    silu = gate * sigmoid
    if SCALED:
        tl.store(dot + column // COLUMNS * rows + m, tl.sum(s * silu * up, 1), mask=live)
        by = tl.load(scale + m, mask=live, other=0.0)[:, None]
    else:
        by = 1.0
    tl.store(out + m[:, None] * columns + n[None, :], by * silu * up, mask=there)
    tl.store(dh + kept, by * s * up * (sigmoid + silu * (1.0 - sigmoid)), mask=there)
    tl.store(dh + kept + columns, by * s * silu, mask=there)


@triton.jit
def outer(
    left, left_index, right, right_index, end_A, out, lefts, rights, LEFT: tl.constexpr, RIGHT: tl.constexpr,
    ROWS: tl.constexpr, LEFTS: tl.constexpr, RIGHTS: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """out_e = sum over m of e of left(left_index_m) right(right_index_m)^T; zeros for an expert without rows"""
    expert = tl.program_id(1).to(tl.int64)
    blocks = tl.cdiv(lefts, LEFTS)
    i = tl.program_id(0) % blocks * LEFTS + tl.arange(0, LEFTS)
    j = tl.program_id(0) // blocks * RIGHTS + tl.arange(0, RIGHTS)
    start = tl.load(end_A + expert - 1, mask=expert > 0, other=0)
    end = tl.load(end_A + expert)
    acc = tl.zeros((LEFTS, RIGHTS), tl.float32)
    for first in range(start, end, ROWS):
        _, live, at = find_rows(left_index, first, end, LEFT, ROWS)
        a = tl.load(left + at[None, :] * lefts + i[:, None], mask=live[None, :] & (i < lefts)[:, None], other=0.0)
        _, live, at = find_rows(right_index, first, end, RIGHT, ROWS)
        b = tl.load(right + at[:, None] * rights + j[None, :], mask=live[:, None] & (j < rights)[None, :], other=0.0)
        acc = dot(a, b, acc, WIDE)
    at = expert * lefts * rights + i.to(tl.int64)[:, None] * rights + j[None, :]
    tl.store(out + at, acc, mask=(i < lefts)[:, None] & (j < rights)[None, :])


@triton.jit
def permute(source, index, out, width, WIDTH: tl.constexpr):
    """out_m = source(index_m), or zeros where the index is negative"""
    m = tl.program_id(0).to(tl.int64)
    d = tl.program_id(1) * WIDTH + tl.arange(0, WIDTH)
    at = tl.load(index + m).to(tl.int64)
    row = tl.load(source + at * width + d, mask=d < tl.where(at < 0, 0, width), other=0.0)
    tl.store(out + m * width + d, row, mask=d < width)


@triton.jit
def combine(row, place, weight, out, width, TOP_K: tl.constexpr, WEIGHTED: tl.constexpr, WIDTH: tl.constexpr):
    """out_t = sum over k of weight_tk row(place_tk), in the order of k; a negative place is no row"""
    t = tl.program_id(0).to(tl.int64)
    d = tl.program_id(1) * WIDTH + tl.arange(0, WIDTH)
    acc = tl.zeros((WIDTH,), tl.float32)
    for k in tl.static_range(TOP_K):
        at = tl.load(place + t * TOP_K + k).to(tl.int64)
        term = tl.load(row + at * width + d, mask=d < tl.where(at < 0, 0, width), other=0.0).to(tl.float32)
        if WEIGHTED:
            term *= tl.load(weight + t * TOP_K + k)
        acc += term
    tl.store(out + t * width + d, acc, mask=d < width)


@triton.jit
def combine_back(
    dout, row, place, weight, drow, dweight, width, TOP_K: tl.constexpr, CHOICES: tl.constexpr, WIDTH: tl.constexpr
):
    """drow(place_tk) = weight_tk dout_t, dweight_tk = <row(place_tk), dout_t>. No two places are the same row."""
    t = tl.program_id(0).to(tl.int64)
    k = tl.arange(0, CHOICES)
    at = tl.load(place + t * TOP_K + k, mask=k < TOP_K, other=-1).to(tl.int64)
    by = tl.load(weight + t * TOP_K + k, mask=k < TOP_K, other=0.0)
    dot = tl.zeros((CHOICES,), tl.float32)
    for start in range(0, width, WIDTH):
        d = start + tl.arange(0, WIDTH)
        there = (at >= 0)[:, None] & (d < width)[None, :]
        dy = tl.load(dout + t * width + d, mask=d < width, other=0.0).to(tl.float32)[None, :]
        beside = at[:, None] * width + d[None, :]
        dot += tl.sum(tl.load(row + beside, mask=there, other=0.0).to(tl.float32) * dy, 1)
        tl.store(drow + beside, by[:, None] * dy, mask=there)
    tl.store(dweight + t * TOP_K + k, dot, mask=k < TOP_K)
