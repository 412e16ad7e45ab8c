"""The dual of balanced routing: what prices cost, where they are best, and how far from it they are.

Balanced routing, as a linear programme: choose x between 0 and 1 to keep the most score, K experts a token and the same
C = T * K / E tokens an expert. Its dual, in the prices q of the experts alone, is convex:

    D(q) = sum over tokens of the K largest (score - q)  +  C * sum of q

D is never less than what any balanced choice keeps, and its least value is the programme's. Adding one number to all
prices changes nothing. With the tokens' own prices p put back, D is least in p, q held, where p is between the K-th and
the (K+1)-th largest of the token's (score - q), and least in q, p held, where q is between two neighbours among the
expert's (score - p): the (floor(C)+1)-th and the ceil(C)-th largest, which are one where C is no whole number. Here are
the ends of both.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from einops import rearrange
from torch import Tensor

from routing.choice import NOWHERE, Choice

INF = float("inf")


class Ends(NamedTuple):
    """The least and the greatest of the prices that are all best."""

    lower: Tensor
    upper: Tensor

    @property
    def middle(self) -> Tensor:
        return (self.lower + self.upper) / 2


def token_ends(priced_TE: Tensor, top_k: int) -> Ends:
    """The best prices of each token, given score less price. -> lower_T, upper_T

    Of a token that takes every expert any low price will do; it gets the greatest.
    """
    best_TK = priced_TE.topk(min(top_k + 1, priced_TE.shape[1]), dim=1).values
    return Ends(best_TK[:, -1], best_TK[:, top_k - 1])


def token_lower(priced_TE: Tensor, top_k: int) -> Tensor:
    """The lower of `token_ends`, quicker."""
    return priced_TE.topk(min(top_k + 1, priced_TE.shape[1]), dim=1, sorted=False).values.amin(dim=1)


def expert_ends(margin_ET: Tensor, top_k: int, valid_T: Tensor | None = None) -> Ends:
    """The best prices of each expert, given score less the token's price. -> lower_E, upper_E

    top_k < E. Without tokens the prices are -inf. margin_ET should lie in memory as it is named: to look through a
    column takes several times as long.
    """
    num_experts, num_tokens = margin_ET.shape
    if valid_T is not None:
        return _ends_among_valid(margin_ET, top_k, valid_T)
    if num_tokens == 0 or num_tokens * top_k % num_experts:
        lower_E = expert_lower(margin_ET, top_k)
        return Ends(lower_E, lower_E)
    lower_E, upper_E = _best(margin_ET, top_k).topk(2, dim=1, largest=False).values.unbind(dim=1)
    return Ends(lower_E, upper_E)


def expert_lower(margin_ET: Tensor, top_k: int, valid_T: Tensor | None = None) -> Tensor:
    """The lower of `expert_ends`, quicker."""
    num_experts, num_tokens = margin_ET.shape
    if valid_T is not None:
        return _ends_among_valid(margin_ET, top_k, valid_T).lower
    if num_tokens == 0:
        return margin_ET.new_full((num_experts,), -INF)
    return _best(margin_ET, top_k).amin(dim=1)


def _best(margin_ET: Tensor, top_k: int) -> Tensor:
    """The floor(C) + 1 largest of each expert, in no order: to sort all of them takes several times as long."""
    num_experts, num_tokens = margin_ET.shape
    return margin_ET.topk(num_tokens * top_k // num_experts + 1, dim=1, sorted=False).values


def _ends_among_valid(margin_ET: Tensor, top_k: int, valid_T: Tensor) -> Ends:
    """How many tokens there are is known on the device alone, so everything is sorted and the ends picked out."""
    num_experts, num_tokens = margin_ET.shape
    if num_tokens == 0:
        none_E = margin_ET.new_full((num_experts,), -INF)
        return Ends(none_E, none_E)
    sorted_ET = margin_ET.masked_fill(~valid_T, -INF).sort(dim=1, descending=True).values
    rows = valid_T.sum() * top_k
    rank_2 = torch.stack([rows // num_experts, (rows - 1) // num_experts]).clamp(min=0)
    lower_E, upper_E = sorted_ET.index_select(1, rank_2).unbind(dim=1)
    return Ends(lower_E, upper_E)


def check_top_k(num_experts: int, top_k: int) -> None:
    if not 1 <= top_k <= num_experts:
        raise ValueError(f"no prices balance top_k={top_k} of {num_experts} experts; use 1 <= top_k <= num_experts")


def transposed(score_TE: Tensor) -> Tensor:
    """score_ET, laid out for `expert_ends`."""
    return rearrange(score_TE, "t e -> e t").contiguous()


def or_standing(quoted_E: Tensor, price_E: Tensor, valid_T: Tensor | None) -> Tensor:
    """The prices quoted; the standing ones if every token is padding."""
    return quoted_E if valid_T is None else torch.where(valid_T.any(), quoted_E, price_E)


def count_tokens(num_tokens: int, valid_T: Tensor | None) -> Tensor | int:
    return num_tokens if valid_T is None else valid_T.sum()


def dual_value(score_TE: Tensor, price_E: Tensor, top_k: int, valid_T: Tensor | None = None) -> Tensor:
    """D at these prices. -> a float64 scalar"""
    score_TE, price_E = score_TE.detach().double(), price_E.double()
    kept_T = (score_TE - price_E).topk(top_k, dim=1).values.sum(dim=1)
    if valid_T is not None:
        kept_T = kept_T.where(valid_T, 0.0)
    tokens = count_tokens(score_TE.shape[0], valid_T)
    return kept_T.sum() + price_E.sum() * (tokens * top_k / score_TE.shape[1])


def dual_gap(
    score_TE: Tensor, price_E: Tensor, top_k: int, *, kept: float | Tensor, valid_T: Tensor | None = None
) -> Tensor:
    """By how much D exceeds `kept`, relative to it: 0 proves both to be optimal. -> a float64 scalar

    kept: the score that some balanced choice keeps. `optimize` finds one with the prices; HiGHS finds the best. The
    score kept by the choice at these prices will not do unless it is balanced: the gap would be too small, or negative.
    """
    return dual_value(score_TE, price_E, top_k, valid_T) / kept - 1


def kept_score(choice: Choice) -> Tensor:
    """The score of the rows chosen, over that of every token's best k. -> a float64 scalar; 1 without tokens"""
    score_TE = choice.score_TE.detach().double()
    best_T = score_TE.topk(choice.k, dim=1).values.sum(dim=1)
    if choice.valid_T is not None:
        best_T = best_T.where(choice.valid_T, 0.0)
    chosen_N = score_TE[choice.token_N, choice.expert_N.clamp(min=0)].where(choice.expert_N != NOWHERE, 0.0)
    best = best_T.sum()
    return torch.where(best != 0, chosen_N.sum() / best, 1.0)


class Change(NamedTuple):
    """What a step of the prices does to D, in two parts whose sum it is.

    linear: sum of step * (C - load): what it would do if no token changed its mind. Negative for a step towards
    balance. switching: what tokens gain by changing it, never negative. D falls while the gain is smaller than that.
    """

    linear: Tensor
    switching: Tensor


def dual_change(score_TE: Tensor, price_E: Tensor, step_E: Tensor, top_k: int) -> Change:
    """D(price + step) - D(price), split. Float64 scalars.

    A token leaves expert j for expert i only if step_j >= step_i: nobody moves to where prices rose more.
    """
    score_TE, price_E, step_E = score_TE.detach().double(), price_E.double(), step_E.double()
    num_tokens, num_experts = score_TE.shape
    priced_TE = score_TE - price_E - step_E
    before_TK = (score_TE - price_E).topk(top_k, dim=1).indices
    load_E = score_TE.new_zeros(num_experts).index_add(0, before_TK.flatten(), score_TE.new_ones(before_TK.numel()))
    linear = (step_E * (num_tokens * top_k / num_experts - load_E)).sum()
    after_T = priced_TE.topk(top_k, dim=1).values.sum(dim=1)
    return Change(linear, (after_T - priced_TE.gather(1, before_TK).sum(dim=1)).sum())
