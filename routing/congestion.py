"""Congestion: how strongly a router turns tokens away from busy experts. numpy, offline.

The model: expert j is worth u_j - gamma * rho_j to a token, plus Gumbel noise, where u is its mean logit and rho its
share of the assignments. At equilibrium rho_j is proportional to exp(u_j - gamma * rho_j): tokens follow the logits,
less a price that is linear in the load. Then u_j - ln(rho_j) is a line in rho_j of slope gamma, which is the estimator:
Cov(u - ln rho, rho) / Var(rho). The Switch loss alpha * E * sum f P has the price alpha * E * f_j, so alpha * E of
gamma is explicit; the rest is implicit: whatever else the training did to even the load.

Tokens of several types (G of them, with weights w) share the load but not the logits: rho_gj is proportional to
exp(u_gj - gamma * rho_j), and rho = sum_g w_g rho_g.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

FloatArray = NDArray[np.float64]
IntArray = NDArray[np.int64]


@dataclass(frozen=True, kw_only=True)
class Congestion:
    """gamma with its bootstrap interval [low, high], and how much of it a loss of known coefficient explains."""

    gamma: float
    low: float
    high: float
    explicit: float

    @property
    def implicit(self) -> float:
        return self.gamma - self.explicit


def explicit_gamma(coefficient: float, num_experts: int) -> float:
    """What the Switch loss with this coefficient adds to gamma, a unit of loss taken for a unit of logit."""
    if not (0 <= coefficient < np.inf and num_experts >= 1):
        raise ValueError(f"use a coefficient >= 0 and at least one expert; got {coefficient} and {num_experts}")
    return coefficient * num_experts


def gamma_of(utility_E: ArrayLike, share_E: ArrayLike) -> float:
    """gamma of one type of token, from mean logits and shares, all of them positive."""
    utility_GE, share_GE = _table("utility_E", utility_E, 1)[None], _table("share_E", share_E, 1)[None]
    return gamma_of_types(utility_GE, share_GE, np.ones(1))


def gamma_of_types(utility_GE: ArrayLike, share_GE: ArrayLike, weight_G: ArrayLike) -> float:
    """gamma of several types of token: each gives a line of the same slope over the shared load, weighed by its tokens.

    utility_GE: mean logit of each expert over the type's tokens. share_GE: shares of the type's assignments, all
    positive. weight_G: each type's share of the tokens.
    """
    utility_GE, share_GE = _table("utility_GE", utility_GE, 2), _table("share_GE", share_GE, 2)
    weight_G = _weights(weight_G, utility_GE, share_GE)
    if share_GE.min() <= 0:
        raise ValueError(
            "a share is 0, and its logarithm infinite; give counts to `congestion`, or leave that expert out"
        )
    return float(_slope(utility_GE, share_GE / share_GE.sum(axis=1, keepdims=True), weight_G))


def congestion(
    utility_BE: ArrayLike,
    load_BE: ArrayLike,
    *,
    coefficient: float = 0.0,
    resamples: int = 1000,
    confidence: float = 0.95,
    seed: int = 0,
) -> Congestion:
    """gamma of one layer from B batches, with an interval from drawing whole batches again and again.

    utility_BE: mean logit of each expert over a batch's tokens. load_BE: rows of each expert in a batch. A batch counts
    by its rows. coefficient: of the Switch loss, 0 without one. An expert without a row is given one, for it has a
    logarithm then; where many have none, gamma is a guess.
    """
    utility_BE, load_BE = _table("utility_BE", utility_BE, 2), _table("load_BE", load_BE, 2)
    if utility_BE.shape != load_BE.shape:
        raise ValueError(f"utility_BE and load_BE must have one shape; got {utility_BE.shape} and {load_BE.shape}")
    rows_B = load_BE.sum(axis=1)
    if load_BE.min() < 0 or rows_B.min() <= 0:
        raise ValueError("load_BE counts rows: none may be negative, and every batch must have some")
    if len(load_BE) < 2:
        raise ValueError("an interval needs at least 2 batches; cut the tokens into more, or use gamma_of")
    if resamples < 2 or not 0 < confidence < 1:
        raise ValueError(f"use resamples >= 2 and a confidence between 0 and 1; got {resamples} and {confidence}")
    # A row of times says how often each batch is taken; the first takes each once.
    batches = len(load_BE)
    drawn = np.random.default_rng(seed).multinomial(batches, np.full(batches, 1 / batches), size=resamples)
    times_NB = np.vstack([np.ones(batches), drawn])
    load_NE, rows_N = times_NB @ load_BE, times_NB @ rows_B
    utility_NE = (times_NB * rows_B) @ utility_BE / rows_N[:, None]
    gamma_N = _slope(utility_NE[:, None], _shares(load_NE)[:, None], np.ones(1))
    low, high = np.quantile(gamma_N[1:], [(1 - confidence) / 2, (1 + confidence) / 2])
    explicit = explicit_gamma(coefficient, load_BE.shape[1])
    return Congestion(gamma=float(gamma_N[0]), low=float(low), high=float(high), explicit=explicit)


def equilibrium(utility_E: ArrayLike, gamma: float) -> FloatArray:
    """The shares at which rho_j is proportional to exp(u_j - gamma * rho_j); there is one such rho. -> share_E."""
    share_GE = equilibrium_of_types(_table("utility_E", utility_E, 1)[None], np.ones(1), gamma)
    share_E: FloatArray = share_GE[0]
    return share_E


def equilibrium_of_types(utility_GE: ArrayLike, weight_G: ArrayLike, gamma: float) -> FloatArray:
    """The shares of each type at the common equilibrium. -> share_GE; the load is weight_G @ share_GE.

    The load is the x at which sum_g w_g ln sum_j exp(u_gj - gamma x_j) + gamma |x|^2 / 2 is least: its gradient is
    gamma (x - rho(x)). It is strictly convex, so Newton steps, halved while they do not go down far enough, reach it.
    """
    utility_GE = _table("utility_GE", utility_GE, 2)
    weight_G = _weights(weight_G, utility_GE, utility_GE)
    if not 0 <= gamma < np.inf:
        raise ValueError(f"gamma={gamma}; below 0 tokens would seek crowds, and the equilibrium is not unique")
    # To first order the load is softmax(u / (1 + gamma / E)), and that is about a line in u.
    experts = utility_GE.shape[1]
    load_E = 1 / experts + (weight_G @ utility_GE) / (experts + gamma)
    for _ in range(200):
        share_GE, best_G = _respond(utility_GE, gamma * load_E)
        excess_E = load_E - weight_G @ share_GE
        if np.abs(excess_E).max() < 1e-14:
            return share_GE
        curve_EE = np.eye(experts) + gamma * (np.diag(weight_G @ share_GE) - (share_GE.T * weight_G) @ share_GE)
        step_E = np.linalg.solve(curve_EE, excess_E)
        value = weight_G @ best_G + gamma * load_E @ load_E / 2
        size, descent = 1.0, gamma * excess_E @ step_E
        while size > 1e-10:
            trial_E = load_E - size * step_E
            trial = weight_G @ _respond(utility_GE, gamma * trial_E)[1] + gamma * trial_E @ trial_E / 2
            if trial <= value - 1e-4 * size * descent + 1e-12 * abs(value):
                break
            size /= 2
        load_E = load_E - size * step_E
    # Where gamma is so large that rounding of the load is felt, it stops short of the last digit.
    if np.abs(excess_E).max() > 1e-9:
        span = f"{utility_GE.min():g} to {utility_GE.max():g}"
        raise ValueError(f"no equilibrium found for gamma={gamma:g} and utilities from {span}; are they logits?")
    return share_GE


def token_types(logit_TE: ArrayLike, types: int, *, seed: int = 0, rounds: int = 50) -> IntArray:
    """k-means over the tokens' logits. -> type_T, numbers below `types`; the same seed gives the same types."""
    logit_TE = _table("logit_TE", logit_TE, 2)
    if not 1 <= types <= len(logit_TE):
        raise ValueError(f"{len(logit_TE)} tokens cannot be sorted into {types} types; use 1 to as many as tokens")
    rng = np.random.default_rng(seed)
    centre_GE = logit_TE[[int(rng.integers(len(logit_TE)))]]
    nearest_T = _distance_TG(logit_TE, centre_GE)[:, 0]
    for _ in range(types - 1):
        # A token is the next centre with a chance that grows with its squared distance from those there are.
        total = nearest_T.sum()
        chance_T = nearest_T / total if total > 0 else np.full(len(logit_TE), 1 / len(logit_TE))
        centre_GE = np.vstack([centre_GE, logit_TE[rng.choice(len(logit_TE), p=chance_T)]])
        nearest_T = np.minimum(nearest_T, _distance_TG(logit_TE, centre_GE[-1:])[:, 0])
    type_T = np.full(len(logit_TE), -1)
    for _ in range(rounds):
        before_T, type_T = type_T, _distance_TG(logit_TE, centre_GE).argmin(axis=1)
        if np.array_equal(before_T, type_T):
            break
        for group in range(types):
            if (mine_T := type_T == group).any():
                centre_GE[group] = logit_TE[mine_T].mean(axis=0)
    return type_T.astype(np.int64)


def types_table(
    logit_TE: ArrayLike, expert_TK: ArrayLike, type_T: ArrayLike
) -> tuple[FloatArray, FloatArray, FloatArray]:
    """(utility_GE, share_GE, weight_G) of tokens sorted into types, as gamma_of_types wants them.

    expert_TK: -1 for a choice not made. An expert that no token of a type chose is given one row of it.
    """
    logit_TE, expert_TK, type_T = _table("logit_TE", logit_TE, 2), np.asarray(expert_TK), np.asarray(type_T)
    tokens, num_experts = logit_TE.shape
    if expert_TK.ndim != 2 or len(expert_TK) != tokens or type_T.shape != (tokens,):
        raise ValueError(
            f"expert_TK must be [{tokens}, choices] and type_T [{tokens}], as the logits have tokens; "
            f"got {expert_TK.shape} and {type_T.shape}"
        )
    if expert_TK.size and not -1 <= expert_TK.min() <= expert_TK.max() < num_experts:
        raise ValueError(f"expert_TK holds {expert_TK.min()} to {expert_TK.max()}; use -1 to {num_experts - 1}")
    if type_T.dtype.kind not in "iu" or expert_TK.dtype.kind not in "iu" or type_T.min() < 0:
        raise ValueError(f"types and experts are whole numbers from 0 on; got {type_T.dtype} and {expert_TK.dtype}")
    tokens_G = np.bincount(type_T)
    if (empty := np.flatnonzero(tokens_G == 0)).size:
        raise ValueError(f"no token is of type {int(empty[0])}; number the types without gaps")
    utility_GE = np.zeros((len(tokens_G), num_experts))
    np.add.at(utility_GE, type_T, logit_TE)
    token_N, choice_N = np.nonzero(expert_TK >= 0)
    load_GE = np.zeros_like(utility_GE)
    np.add.at(load_GE, (type_T[token_N], expert_TK[token_N, choice_N]), 1)
    return utility_GE / tokens_G[:, None], _shares(load_GE), tokens_G / tokens


def _slope(utility_NGE: FloatArray, share_NGE: FloatArray, weight_G: FloatArray) -> FloatArray:
    """Cov(u - ln rho_g, rho) / Var(rho), the covariance weighed over types. [..., G, E] -> [...]."""
    load_NE = weight_G @ share_NGE
    apart_NE = load_NE - load_NE.mean(axis=-1, keepdims=True)
    variance_N = np.square(apart_NE).sum(axis=-1)
    # Shares add to 1, so rounding alone leaves a variance of some 1e-32.
    if variance_N.min() <= 1e-28:
        raise ValueError("the loads are exactly even: any gamma explains them; use batches whose loads differ")
    pull_NE = weight_G @ (utility_NGE - np.log(share_NGE))
    slope_N: FloatArray = (pull_NE * apart_NE).sum(axis=-1) / variance_N
    return slope_N


def _shares(load_NE: FloatArray) -> FloatArray:
    floored_NE = np.maximum(load_NE, 1.0)
    shares_NE: FloatArray = floored_NE / floored_NE.sum(axis=-1, keepdims=True)
    return shares_NE


def _respond(utility_GE: FloatArray, price_E: FloatArray) -> tuple[FloatArray, FloatArray]:
    """How each type spreads at these prices, and the log of its sum of exponentials."""
    worth_GE = utility_GE - price_E
    top_G = worth_GE.max(axis=1)
    exp_GE = np.exp(worth_GE - top_G[:, None])
    sum_G = exp_GE.sum(axis=1)
    return exp_GE / sum_G[:, None], top_G + np.log(sum_G)


def _distance_TG(logit_TE: FloatArray, centre_GE: FloatArray) -> FloatArray:
    squared_TG = (
        np.square(logit_TE).sum(axis=1)[:, None] - 2 * logit_TE @ centre_GE.T + np.square(centre_GE).sum(axis=1)
    )
    distance_TG: FloatArray = np.maximum(squared_TG, 0.0)
    return distance_TG


def _table(name: str, values: ArrayLike, ndim: int) -> FloatArray:
    try:
        table = np.asarray(values, dtype=np.float64)
    except (TypeError, ValueError):
        raise ValueError(f"{name} must be a table of numbers, every row of one length") from None
    if table.ndim != ndim or 0 in table.shape:
        raise ValueError(f"{name} needs {ndim} axes, none of them empty; got shape {table.shape}")
    if not np.isfinite(table).all():
        raise ValueError(f"{name} holds a number that is not finite; leave out what was not measured")
    return table


def _weights(weight_G: ArrayLike, utility_GE: FloatArray, share_GE: FloatArray) -> FloatArray:
    weight = _table("weight_G", weight_G, 1)
    if utility_GE.shape != share_GE.shape or len(weight) != len(utility_GE):
        raise ValueError(
            f"utilities {utility_GE.shape}, shares {share_GE.shape} and {len(weight)} weights must agree in types and "
            f"experts"
        )
    if weight.min() < 0 or weight.sum() <= 0:
        raise ValueError(f"weights must be >= 0 and not all 0; got {weight.tolist()}")
    weights: FloatArray = weight / weight.sum()
    return weights
