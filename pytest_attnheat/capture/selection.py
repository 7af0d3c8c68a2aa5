"""What may be asked for of a capture, a trace or a record: layers, heads, queries, a dtype."""

from __future__ import annotations

import operator
from collections.abc import Iterable, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..inputs import misuse, whole_number

if TYPE_CHECKING:
    from .record import AttentionRecord

# What may be selected: a number, several, or a slice.
Selection = int | slice | Sequence[int]


def matches(layer: str, patterns: Sequence[str] | None) -> bool:
    """Whether a layer, or a module around it, is matched by one of the patterns; None for all."""
    if patterns is None:
        return True
    return any(fnmatchcase(layer, p) or fnmatchcase(layer, f"{p}.*") for p in patterns)


def checked_patterns(layers: Any) -> Sequence[str] | None:
    """Return names and patterns of layers as a sequence; None for all."""
    if layers is None:
        return None
    refusal = misuse("layers", repr(layers), "one or more names of layers, or patterns of them")
    patterns = [layers] if isinstance(layers, str) else layers
    names = isinstance(patterns, list | tuple | set | frozenset)
    if not names or not all(isinstance(pattern, str) for pattern in patterns):
        raise TypeError(refusal)
    if not patterns:
        raise ValueError(refusal)
    return sorted(patterns) if isinstance(patterns, set | frozenset) else list(patterns)


def selection(name: str, wanted: Any) -> slice | list[int]:
    """Return a selection of heads or queries as a slice or whole numbers."""
    if isinstance(wanted, slice):
        return wanted
    numbers = wanted.tolist() if isinstance(wanted, Tensor) else wanted
    if not isinstance(numbers, Iterable) or isinstance(numbers, str | bytes | Mapping):
        numbers = [numbers]
    numbers = list(numbers)
    if any(isinstance(number, bool) or not hasattr(number, "__index__") for number in numbers):
        raise TypeError(misuse(name, repr(wanted), "a number, several, or a slice"))
    return [operator.index(number) for number in numbers]


def chosen(name: str, wanted: Selection, count: int, layer: str) -> list[int]:
    """Return the numbers that a selection means, of `count` in a layer."""
    asked = selection(name, wanted)
    numbers = list(range(count))[asked] if isinstance(asked, slice) else asked
    if not numbers or not all(-count <= number < count for number in numbers):
        accepted = f"numbers from 0 to {count - 1}, or a slice of them{within(layer)}"
        raise ValueError(misuse(name, repr(wanted), accepted))
    return [number % count for number in numbers]


def within(layer: str) -> str:
    """Return " in layer ...", to be added to what is accepted there; nothing without a name."""
    return f" in layer {layer}" if layer else ""


def batch_entry(wanted: object, count: int) -> int:
    """Return the number of a batch entry, of `count`; negative ones count from the end."""
    number = whole_number("batch", wanted, least=-count)
    if number >= count:
        raise ValueError(misuse("batch", number, f"a whole number from {-count} to {count - 1}"))
    return number % count


def float_dtype(dtype: object) -> torch.dtype:
    """Return a dtype for weights; TypeError if it is none of floating point."""
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
        raise TypeError(misuse("dtype", repr(dtype), "a dtype such as torch.float32"))
    return dtype


# What is listed of a record.
COLUMNS = ("layer", "source", "shape", "residual")


def listed(record: AttentionRecord) -> tuple[str, str, str, str]:
    """Return what a list of records says of one."""
    source, residual = record.source, record.unverified or f"{record.residual:.1e}"
    if not (record.unverified or record.trusted):
        residual += f"  > {record.tolerance:.0e}!"
    source += f", some {record.part}" if record.part else ""
    return record.layer, source, str(record.shape_here), residual


def taken(
    tensor: Tensor | None, dim: int, numbers: Tensor, *, broadcast: bool = False
) -> Tensor | None:
    """Take some of a dimension; where `broadcast`, a size of 1 stands for all."""
    if tensor is None or (broadcast and tensor.shape[dim] == 1):
        return tensor
    return tensor.index_select(dim, numbers.to(tensor.device))
