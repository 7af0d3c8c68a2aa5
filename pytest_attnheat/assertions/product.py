"""Weights, a value and the output that they are said to make, seen in shapes that broadcast."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from pytest_attnheat.assertions.claims import Index
from pytest_attnheat.assertions.scan import evenly, mask_at
from pytest_attnheat.attention.tolerance import row_rounding
from pytest_attnheat.inputs import Operand, as_weights, misuse

# What a cause may miss, in units of what rounding does to a row.
_SLACK = 4.0
# The channels that a sample holds.
CHANNELS = 32
# Fewer elements than this may agree by chance.
ENOUGH = 8

_DIMENSIONS = {
    "weights": "(..., queries, keys)",
    "value": "(..., keys, value_dim)",
    "output": "(..., queries, value_dim)",
}
_ACCEPTED = """one of
  weights (..., queries, keys), value (..., keys, value_dim), output (..., queries, value_dim)
  value (..., value_heads, keys, value_dim), where value_heads divide the heads of the weights
  weights (batch, queries, keys) that all heads of value (batch, heads, keys, value_dim) share
  with value of four dimensions, output merged: (batch, queries, heads * value_dim)"""


@dataclass(frozen=True)
class Product:
    """Weights, value and output.

    Attributes:
        weights: Seen as ``(*leading, queries, keys)``, with size 1 where they are shared.
        value: Seen as ``(*leading, keys, value_dim)``, with size 1 where heads are grouped.
        output: Seen as ``(*leading, queries, value_dim)``.
        given: The output as the caller passed it.
        merged: Whether heads are merged in it.
        grouped: Whether the last leading dimension of all three is that of a group.
        worst: The element of `output` that is farthest off, once it is known.
    """

    weights: Operand
    value: Operand
    output: Operand
    given: Operand
    merged: bool
    grouped: bool
    worst: Index = ()

    @classmethod
    def read(cls, weights: object, value: object, output: object) -> Product:
        """Read what the caller passed.

        Raises:
            TypeError: An argument is not a dense float tensor or array, or they lie on different
                devices.
            ValueError: An argument is empty, or the shapes do not fit.
        """
        operands = {
            name: as_weights(given, name, _DIMENSIONS[name])
            for name, given in (("weights", weights), ("value", value), ("output", output))
        }
        devices = {name: operand.device for name, operand in operands.items()}
        names = ", ".join(operands)
        if len(set(devices.values())) > 1:
            on = ", ".join(f"{name} on {device}" for name, device in devices.items())
            raise TypeError(misuse(names, on, "three on one device"))
        # A NumPy array that torch cannot share has views of its own.
        viewable = [
            operand if isinstance(operand, torch.Tensor) else given
            for operand, given in zip(operands.values(), (weights, value, output), strict=True)
        ]
        try:
            w, v, o, merged, grouped = _see(*viewable)
        except _MisfitError:
            shapes = ", ".join(str(tuple(operand.shape)) for operand in operands.values())
            raise ValueError(misuse(names, shapes, _ACCEPTED)) from None
        given = operands["output"]
        return cls(as_weights(w), as_weights(v), as_weights(o), given, merged, grouped)

    @property
    def coarsest(self) -> torch.dtype:
        """The dtype with the largest steps."""
        dtypes = (self.weights.dtype, self.value.dtype, self.output.dtype)
        return max(dtypes, key=lambda dtype: torch.finfo(dtype).eps)

    @property
    def rounding(self) -> float:
        """What rounding does to the sum of a row, in the coarsest dtype."""
        return row_rounding(self.coarsest, self.weights.shape[-1])

    @property
    def slack(self) -> float:
        """What rounding may do where a cause is looked for, as a part of |weights| @ |value|."""
        return _SLACK * self.rounding

    @property
    def head_dims(self) -> int:
        """How many of the last leading dimensions count heads."""
        return 2 if self.grouped else 1

    def index_given(self, index: Index) -> Index:
        """Return an index into `output` as an index into the output that was given."""
        *leading, query, channel = index
        if self.grouped:
            *leading, value_head, member = leading
            leading.append(value_head * self.output.shape[-3] + member)
        if self.merged:
            *batch, head = leading
            return (*batch, query, head * self.output.shape[-1] + channel)
        return (*leading, query, channel)

    def take(self, leading: Index, queries: torch.Tensor, channels: int = CHANNELS) -> Sample:
        """Return one map in float64: some queries, all keys, at most so many channels."""
        value_dim = self.output.shape[-1]
        some = torch.tensor(evenly(value_dim, channels), device="cpu")
        place = tuple(slice(i, i + 1) for i in leading)
        every_query, every_key = (slice(0, size) for size in self.weights.shape[-2:])
        every_channel = slice(0, value_dim)
        weights = gather(self.weights, (*place, every_query, every_key), queries, -2)
        value = gather(self.value, (*place, every_key, every_channel), some, -1)
        output = gather(self.output, (*place, every_query, every_channel), queries, -2)
        # A key without weight is not felt, whatever its value.
        value = value.nan_to_num(nan=0.0, posinf=0.0, neginf=0.0)
        return Sample(weights, value, output[:, some], self.slack)


@dataclass(frozen=True)
class Sample:
    """Weights ``(n, keys)``, value ``(keys, c)`` and output ``(n, c)`` of one map."""

    weights: torch.Tensor
    value: torch.Tensor
    output: torch.Tensor
    slack: float

    def made_by(self, weights: torch.Tensor, value: torch.Tensor, factor: float = 1.0) -> bool:
        """Tell whether the output is another product, within rounding."""
        expected = factor * (weights @ value)
        size = abs(factor) * (weights.abs() @ value.abs())
        enough = self.output.numel() >= ENOUGH and bool((expected != 0).any())
        return enough and bool(((self.output - expected).abs() <= self.slack * size).all())


class _MisfitError(Exception):
    """Shapes that do not fit together."""


def _see(weights: Any, value: Any, output: Any) -> tuple[Any, Any, Any, bool, bool]:
    """Return views of shapes that broadcast, whether heads are merged and whether grouped."""
    shared = weights.ndim == 3 and value.ndim == 4
    if shared:
        weights = weights[:, None]
    merged = weights.ndim == 4 and output.ndim == 3
    if merged:
        output = _split(output, -1, value.shape[-1]).swapaxes(1, 2)
    grouped = not shared and weights.ndim == value.ndim > 2
    grouped = grouped and value.shape[-3] < weights.shape[-3] == output.shape[-3]
    if grouped:
        members = weights.shape[-3] // value.shape[-3]
        weights, output = _split(weights, -3, members), _split(output, -3, members)
        value = value[..., None, :, :]
    leading = tuple(output.shape[:-2])
    (query_len, key_len), value_dim = weights.shape[-2:], value.shape[-1]
    wanted = (
        (*((leading[0], 1) if shared else leading), query_len, key_len),
        (*((*leading[:-1], 1) if grouped else leading), key_len, value_dim),
        (*leading, query_len, value_dim),
    )
    if wanted != tuple(tuple(x.shape) for x in (weights, value, output)):
        raise _MisfitError
    return weights, value, output, merged, grouped


def _split(array: Any, dim: int, inner: int) -> Any:
    """Return a view in which a dimension is two, the second of size `inner`."""
    shape = list(array.shape)
    at = dim % len(shape)
    if shape[at] % inner:
        raise _MisfitError
    return array.reshape(*shape[:at], shape[at] // inner, inner, *shape[at + 1 :])


def gather(
    operand: Operand, index: tuple[slice, ...], numbers: torch.Tensor, dim: int
) -> torch.Tensor:
    """Return a map with only some numbers of a dimension, one at a time: the map may be large."""
    parts = []
    for number in numbers.tolist():
        spans = list(index)
        spans[dim] = slice(number, number + 1)
        part = mask_at(operand, tuple(spans)).double().cpu()
        parts.append(part.reshape(part.shape[-2:]))
    return torch.cat(parts, dim)
