"""How inputs may lie in memory."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TypeAlias

import torch
from torch import Tensor

from pytest_attnheat.assertions.behaviour.functions import MASK

Tensors: TypeAlias = Mapping[str, Tensor]
_Layout: TypeAlias = Callable[[str, Tensor], Tensor | None]

_PERMUTED = {4: "(batch, length, heads, width)", 3: "(length, batch, width)"}


@dataclass(frozen=True)
class Trial:
    """Some inputs in another layout.

    Attributes:
        what: Names them and the layout.
        names: Which inputs.
        laid: All inputs.
    """

    what: str
    names: Sequence[str]
    laid: Tensors


def contiguous(tensors: Tensors) -> dict[str, Tensor]:
    """Copy tensors, so that nothing is written into those of the caller."""
    return {
        name: tensor.clone(memory_format=torch.contiguous_format)
        for name, tensor in tensors.items()
    }


def trials(given: Tensors) -> Iterator[Trial]:
    """List the layouts of each input alone and of all together."""
    groups = [[name] for name in given]
    if len(given) > 1:
        groups.append(list(given))
    for layout, make in [*_LAYOUTS.items(), *_expansions(given)]:
        for names in groups:
            made = {name: make(name, given[name]) for name in names}
            laid = {name: tensor for name, tensor in made.items() if tensor is not None}
            if laid:
                said = f"{_listed(list(laid))} {layout.format(_order_of(given, laid))}"
                yield Trial(said, list(laid), {**contiguous(given), **laid})
    packed = packed_together(given)
    if packed:
        names = list(packed)
        said = f"{_listed(names)} packed in one projection (batch, length, heads and widths)"
        yield Trial(said, names, {**contiguous(given), **packed})


def _listed(names: list[str]) -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"


def _order_of(given: Tensors, laid: Tensors) -> str:
    """The order in which permuted dimensions lie in memory."""
    ndim = given[next(iter(laid))].ndim
    return _PERMUTED.get(ndim, "(..., length, heads, width)")


def _permuted(name: str, tensor: Tensor) -> Tensor | None:
    if tensor.ndim < 3 or name == MASK or 1 in tensor.shape[-3:-1]:
        return None
    return tensor.transpose(-3, -2).contiguous().transpose(-3, -2)


def _transposed(name: str, tensor: Tensor) -> Tensor | None:
    return None if 1 in tensor.shape[-2:] else tensor.mT.contiguous().mT


def _stepped(name: str, tensor: Tensor) -> Tensor | None:
    # What lies between would change the output if it were read.
    between = ~tensor if tensor.dtype == torch.bool else tensor.flip(-1)
    if tensor.is_floating_point():
        between = (-10 * between - 1).nan_to_num()
    return torch.stack([tensor, between], -2)[..., 0, :]


def _shifted(name: str, tensor: Tensor) -> Tensor | None:
    memory = torch.cat([tensor.flatten()[-1:], tensor.flatten()])
    return memory[1:].view(tensor.shape)


def _expansions(given: Tensors) -> Iterator[tuple[str, _Layout]]:
    """The layouts with stride 0: over the batch, over heads as grouped attention, over length."""
    for dim in range(max(tensor.ndim for tensor in given.values()) - 1):
        yield f"expanded over dimension {dim}, with stride 0", partial(_expanded, dim)


def _expanded(dim: int, name: str, tensor: Tensor) -> Tensor | None:
    if dim >= tensor.ndim - 1 or tensor.shape[dim] == 1:
        return None
    return tensor.narrow(dim, 0, 1).contiguous().expand(tensor.shape)


def packed_together(given: Tensors) -> Tensors:
    """Query, key and value as `projection.view(batch, length, 3, heads, width).unbind(2)`.

    Nothing where their lengths differ: then one projection cannot have made them.
    """
    names = [name for name in ("query", "key", "value") if name in given]
    # The heads of grouped attention may differ in number; they lie side by side in memory.
    headed = [given[name].ndim > 3 for name in names]
    turned = [
        given[name].transpose(-3, -2) if heads else given[name].unsqueeze(-2)
        for name, heads in zip(names, headed, strict=True)
    ]
    if len({tensor.shape[:-2] for tensor in turned}) != 1 or len(names) < 3:
        return {}
    widths = [tensor.shape[-2:].numel() for tensor in turned]
    packed = torch.cat([tensor.flatten(-2) for tensor in turned], -1)
    parts = torch.split(packed, widths, -1)
    views = [
        part.view(*part.shape[:-1], *like.shape[-2:])
        for part, like in zip(parts, turned, strict=True)
    ]
    return {
        name: view.transpose(-3, -2) if heads else view.squeeze(-2)
        for name, view, heads in zip(names, views, headed, strict=True)
    }


# In words, and how; None where a tensor cannot lie so.
_LAYOUTS: dict[str, _Layout] = {
    "permuted from {}": _permuted,
    "transposed, the last dimension not contiguous": _transposed,
    "sliced, every second row of a larger tensor": _stepped,
    "at a storage offset of one element": _shifted,
}


def read_at(tensor: Tensor, offset: int | None) -> Tensor | None:
    """The same memory, read without its strides, or from another offset with them."""
    if offset is not None:
        return tensor.as_strided(tensor.shape, tensor.stride(), offset)
    held = tensor.untyped_storage().nbytes() // tensor.element_size() - tensor.storage_offset()
    if held < tensor.numel():
        return None
    strides = [math.prod(tensor.shape[dim + 1 :]) for dim in range(tensor.ndim)]
    return tensor.as_strided(tensor.shape, strides)
