"""Where PyTorch's fused encoder code would have run, had nobody watched."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

Tell = Callable[[str], None]


def would_take_fast_path(module: nn.Module, args: tuple[Any, ...]) -> bool:
    """Whether a module called with these positional arguments would run fused code.

    Follows the conditions in `nn.MultiheadAttention.forward` and
    `nn.TransformerEncoderLayer.forward`; what is given by keyword is taken to be fit for it.
    """
    if module.training or not torch.backends.mha.get_fastpath_enabled():
        return False
    if torch.is_autocast_enabled():
        return False
    if isinstance(module, nn.TransformerEncoderLayer):
        return _encoder_layer(module) and _fit(module, args[:1])
    if isinstance(module, nn.MultiheadAttention):
        same = len(args) < 3 or (args[0] is args[1] is args[2])
        unmasked = len(args) < 4 or args[3] is None or not args[3].is_floating_point()
        return same and unmasked and _attention(module) and _fit(module, args[:1])
    return False


def note_fast_paths(module: nn.Module, name: str, args: tuple[Any, ...], tell: Tell) -> None:
    """Tell of a module that would have run fused code."""
    if would_take_fast_path(module, args):
        tell(f"{name}: PyTorch's fast path was off while it was watched")


def _attention(module: nn.MultiheadAttention) -> bool:
    return (
        module.num_heads % 2 == 0
        and module.batch_first
        and module.bias_k is None
        and not module.add_zero_attn
        and module._qkv_same_embed_dim
        and module.in_proj_bias is not None
    )


def _encoder_layer(module: nn.TransformerEncoderLayer) -> bool:
    hooked = any(m._forward_hooks or m._forward_pre_hooks for m in module.modules())
    return (
        _attention(module.self_attn)
        and bool(module.activation_relu_or_gelu)
        and module.norm1.eps == module.norm2.eps
        and not hooked
    )


def _fit(module: nn.Module, inputs: tuple[Any, ...]) -> bool:
    """Whether the input is batched, and no gradient is wanted."""
    given = [tensor for tensor in inputs if isinstance(tensor, Tensor)]
    if any(tensor.ndim != 3 for tensor in given):
        return False
    tensors = [*given, *module.parameters()]
    return not (torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors))
