"""`flex_attention`, with its score_mod and block mask."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx

from ...attention.call import ScoreMod
from ...inputs import wide_dtype
from ..record import AttentionRecord
from ..watching import After, Call

SOURCE = "flex_attention"


def see(call: Call) -> After:
    """Tell what the operator behind `flex_attention` was given."""
    # It has: query, key, value, score_mod, the parts of the block mask (its last part says of each
    # pair whether it may attend), scale, and options of the kernel.

    def after(result: Any) -> None:
        call.watcher.tell(_record(call.args, result[0]))

    return after


def _record(args: tuple[Any, ...], output: Tensor) -> AttentionRecord:
    query, key, value, score_mod, block_mask, scale = args[:6]
    mask_mod, blocks = block_mask[-1], block_mask[2]
    batch, heads, query_len, _ = query.shape
    shape = (batch, heads, query_len, key.shape[-2])
    is_none = getattr(score_mod, "__name__", "") == "_identity"
    return AttentionRecord(
        layer="", source=SOURCE, shape=shape, dtype=query.dtype, query=query, key=key, value=value,
        output=output, given_mask=_dense(mask_mod, blocks.shape[:2], shape, query.device),
        scale=float(scale), scale_steps=(float(scale),),
        score_mod=None if is_none else _of_many(_frozen(score_mod, query)),
    )  # fmt: skip


def _dense(
    mask_mod: Callable[..., Tensor],
    of: tuple[int, ...],
    shape: tuple[int, int, int, int],
    device: torch.device,
) -> Tensor | None:
    """The mask that the block mask stands for; None where everything may be attended to."""
    from torch._dynamo._trace_wrapped_higher_order_op import TransformGetItemToIndex
    from torch.nn.attention.flex_attention import create_mask

    if getattr(mask_mod, "__name__", "") in ("noop_mask", "_noop_mask"):
        return None
    batch, heads = of
    # As newer versions do it themselves.
    with torch._C._EnableTorchFunction(), TransformGetItemToIndex():
        mask: Tensor = create_mask(mask_mod, batch, heads, shape[2], shape[3], device=str(device))
    return None if bool(mask.all()) else mask


def _frozen(score_mod: Callable[..., Tensor], query: Tensor) -> Callable[..., Tensor]:
    """The operations of a score_mod, with copies of the tensors that it reads."""
    score = torch.zeros((), dtype=wide_dtype(query.dtype), device=query.device)
    numbers = [torch.zeros((), dtype=torch.int32, device=query.device) for _ in range(4)]
    try:
        from torch._dynamo._trace_wrapped_higher_order_op import TransformGetItemToIndex

        # As flex_attention itself traces it.
        with torch.no_grad(), torch._C._EnableTorchFunction(), TransformGetItemToIndex():
            graph = make_fx(score_mod)(score, *numbers)
    except Exception:  # It does what cannot be traced, as nothing that can be compiled does.
        return score_mod
    stores: tuple[dict[str, Any], ...] = (graph._parameters, graph._buffers, vars(graph))
    for held in stores:
        for name, value in held.items():
            if isinstance(value, Tensor):
                held[name] = value.detach().clone()
    return graph


def _of_many(score_mod: Callable[..., Tensor]) -> ScoreMod:
    """Let a score_mod, which takes one score, take many."""

    def change(*given: Tensor) -> Tensor:
        shape = given[0].shape  # that of the scores, to which the numbers broadcast
        scores, *numbers = (one.expand(shape).flatten() for one in given)
        return torch.vmap(score_mod)(scores, *(of.to(torch.int32) for of in numbers)).view(shape)

    return change
