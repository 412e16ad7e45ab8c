"""The exact optimum of balanced routing, by HiGHS: the yardstick of every balancer."""

from __future__ import annotations

from typing import NamedTuple

import highspy
import numpy as np
from numpy.typing import NDArray

Matrix = NDArray[np.float64]
TINY = 1e-9


class Optimum(NamedTuple):
    value: float
    x_TE: Matrix
    price_E: Matrix


def optimum(score_TE: Matrix, top_k: int, near_E: Matrix | None = None) -> Optimum:
    """The most score that x between 0 and 1 keeps with K experts a token and T * K / E tokens an expert.

    HiGHS takes minutes for the whole of it. But of most pairs it is plain at any sensible prices, near_E, that they are
    chosen or not. So it solves the rest, and then every pair is checked at the prices that it found: none that was
    taken for chosen may lose by it, none that was left out may gain. Where one does, more pairs are left to HiGHS. So
    the answer is the optimum of all, whatever prices it began from.
    """
    num_tokens, num_experts = score_TE.shape
    capacity = num_tokens * top_k / num_experts
    near_E = np.zeros(num_experts) if near_E is None else near_E
    priced_TE = np.sort(score_TE - near_E, axis=1)
    middle_T = (priced_TE[:, -top_k] + priced_TE[:, -min(top_k + 1, num_experts)]) / 2
    gain_TE = score_TE - near_E - middle_T[:, None]
    doubt = np.sort(np.abs(gain_TE).ravel())[min(2 * num_tokens, gain_TE.size - 1)]
    while True:
        open_TE, fixed_TE = np.abs(gain_TE) <= doubt, (gain_TE > doubt).astype(np.float64)
        x_TE, left, price_T, price_E = _solve(
            score_TE, open_TE, fixed_TE, top_k - fixed_TE.sum(axis=1), capacity - fixed_TE.sum(axis=0)
        )
        gain_now_TE = score_TE - price_T[:, None] - price_E
        wrong = np.any(gain_now_TE[~open_TE & (fixed_TE == 0)] > TINY) or np.any(gain_now_TE[fixed_TE == 1] < -TINY)
        if left <= TINY and not wrong:
            return Optimum(float((score_TE * x_TE).sum()), x_TE, price_E)
        assert not open_TE.all(), "HiGHS has the whole programme and did not solve it"
        doubt = doubt * 2 if doubt > 0 else TINY


def _solve(
    score_TE: Matrix, open_TE: NDArray[np.bool_], fixed_TE: Matrix, need_T: Matrix, room_E: Matrix
) -> tuple[Matrix, float, Matrix, Matrix]:
    """The open pairs' programme, with paid escapes so that it always has a solution. -> x_TE, escaped, prices"""
    num_tokens, num_experts = score_TE.shape
    token_N, expert_N = np.nonzero(open_TE)
    rows, columns = num_tokens + num_experts, len(token_N)
    penalty = 10 * float(np.abs(score_TE).max()) + 1
    escape_R = np.arange(rows)
    model = highspy.HighsLp()
    model.num_col_, model.num_row_ = columns + 2 * rows, rows
    model.sense_ = highspy.ObjSense.kMaximize
    model.col_cost_ = np.concatenate([score_TE[token_N, expert_N], np.full(2 * rows, -penalty)])
    model.col_lower_ = np.zeros(columns + 2 * rows)
    model.col_upper_ = np.concatenate([np.ones(columns), np.full(2 * rows, np.inf)])
    model.row_lower_ = model.row_upper_ = np.concatenate([need_T, room_E])
    model.a_matrix_.format_ = highspy.MatrixFormat.kColwise
    model.a_matrix_.start_ = np.concatenate([np.arange(columns) * 2, 2 * columns + np.arange(2 * rows + 1)])
    model.a_matrix_.index_ = np.concatenate(
        [np.stack([token_N, num_tokens + expert_N], axis=1).ravel(), escape_R, escape_R]
    )
    model.a_matrix_.value_ = np.concatenate([np.ones(2 * columns), np.ones(rows), -np.ones(rows)])
    solver = highspy.Highs()
    solver.setOptionValue("output_flag", False)
    solver.setOptionValue("threads", 1)
    solver.passModel(model)
    solver.run()
    assert solver.getModelStatus() == highspy.HighsModelStatus.kOptimal
    solution = solver.getSolution()
    value_C, price_R = np.array(solution.col_value), np.array(solution.row_dual)
    x_TE = fixed_TE.copy()
    x_TE[token_N, expert_N] = value_C[:columns]
    return x_TE, float(value_C[columns:].sum()), price_R[:num_tokens], price_R[num_tokens:]
