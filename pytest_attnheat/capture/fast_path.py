"""Where PyTorch's fused encoder code would have run, had nobody watched."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

_LAYER = ("src", "src_mask", "src_key_padding_mask", "is_causal")
_ATTENTION = ("query", "key", "value", "key_padding_mask", "need_weights", "attn_mask")


def would_take_fast_path(
    module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], hooked: set[nn.Module]
) -> bool:
    """Whether a module, called like this, would run fused code if nobody watched.

    Follows the conditions in `nn.MultiheadAttention.forward` and
    `nn.TransformerEncoderLayer.forward`.

    Args:
        module: Any module.
        args: Its positional arguments.
        kwargs: Its keyword arguments.
        hooked: The modules that had hooks of the user.
    """
    if not isinstance(module, nn.TransformerEncoderLayer | nn.MultiheadAttention):
        return False
    if module.training or not torch.backends.mha.get_fastpath_enabled():
        return False
    if torch.is_autocast_enabled():
        return False
    if isinstance(module, nn.TransformerEncoderLayer):
        given = {**dict(zip(_LAYER, args, strict=False)), **kwargs}
        return _encoder_layer(module, hooked) and _fit(module, given.get("src"))
    given = {**dict(zip(_ATTENTION, args, strict=False)), **kwargs}
    masks = [given.get("attn_mask"), given.get("key_padding_mask")]
    if any(mask is not None and mask.is_floating_point() for mask in masks):
        return False
    same = given.get("query") is given.get("key") is given.get("value")
    return same and _attention(module) and _fit(module, given.get("query"))


def _attention(module: nn.MultiheadAttention) -> bool:
    return (
        module.num_heads % 2 == 0
        and module.batch_first
        and module.bias_k is None
        and not module.add_zero_attn
        and module._qkv_same_embed_dim
        and module.in_proj_bias is not None
    )


def _encoder_layer(module: nn.TransformerEncoderLayer, hooked: set[nn.Module]) -> bool:
    return (
        _attention(module.self_attn)
        and bool(module.activation_relu_or_gelu)
        and module.norm1.eps == module.norm2.eps
        and not any(part in hooked for part in module.modules())
    )


def _fit(module: nn.Module, given: Any) -> bool:
    """Whether the input is batched and of the module's dtype, and no gradient is wanted."""
    if not isinstance(given, Tensor) or given.ndim != 3:
        return False
    tensors = [given, *module.parameters()]
    if any(tensor.dtype != given.dtype for tensor in tensors):
        return False
    return not (torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors))
