"""Padding left out: what an attention mask marks goes to no expert, is counted in no load, and moves no price.

transformers' blocks are not told of the mask and route padding as if it were text. The results of tokens that are not
padding do not depend on it, as attention does not look there; what the model returns at padding is another nothing.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from moe.integrations.huggingface.router import HostRouter


class Unhooked:
    """remove() takes out what leave_padding_out put in."""

    def __init__(self, handles: tuple[RemovableHandle, ...]) -> None:
        self._handles = handles

    def remove(self) -> None:
        for handle in self._handles:
            handle.remove()


def leave_padding_out(model: nn.Module) -> Unhooked:
    """Of a model after parallelize_experts: from now on its forward hands the mask on to its MoE blocks.

    attention_mask: [sequences, tokens], with those in a cache first, as transformers' generate gives it. Any other kind
    of mask, or none, says nothing of padding, and all tokens are routed.
    """
    routers = [module for module in model.modules() if isinstance(module, HostRouter)]
    if not routers:
        raise ValueError("the experts of this model are not spread; call parallelize_experts first")

    def begin(module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        valid_T = _valid(args, kwargs)
        for router in routers:
            router.valid_T = valid_T

    def end(module: nn.Module, args: Any, out: Any) -> None:
        for router in routers:
            router.valid_T = None  # a recomputation repeats what was decided

    return Unhooked(
        (
            model.register_forward_pre_hook(begin, with_kwargs=True),
            model.register_forward_hook(end, always_call=True),
        )
    )


def _valid(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Tensor | None:
    """-> [T], False for padding, of the tokens that are not in a cache"""
    mask = kwargs.get("attention_mask", args[1] if len(args) > 1 else None)
    tokens = next((kwargs[name] for name in ("input_ids", "inputs_embeds") if kwargs.get(name) is not None), None)
    if tokens is None and args:
        tokens = args[0]
    if not isinstance(mask, Tensor) or not isinstance(tokens, Tensor) or mask.ndim != 2:
        return None
    return mask[:, mask.shape[1] - tokens.shape[1] :].bool().reshape(-1)
