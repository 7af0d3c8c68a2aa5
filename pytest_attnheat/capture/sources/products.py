"""Products of tensors in any spelling, read as one of matrices."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from pytest_attnheat.capture.watching import Args, Keywords

Move = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Product:
    """output = scale * left @ right + added.

    Attributes:
        left: (..., rows, inner)
        right: (..., inner, columns)
        output: (..., rows, columns)
        left_source: The operand that `left` is a view of.
        right_source: The operand that `right` is a view of.
        scale: A factor.
        added: What was added.
        left_of: Brings a tensor in the layout of the left operand into that of `left`.
        right_of: The same on the right.
        back: Brings a tensor in the layout of `output` into that of what the function returned.
    """

    left: Tensor
    right: Tensor
    output: Tensor
    left_source: Tensor
    right_source: Tensor
    scale: float = 1.0
    added: Tensor | None = None
    left_of: Move = lambda tensor: tensor
    right_of: Move = lambda tensor: tensor
    back: Move = lambda tensor: tensor

    def turned(self) -> Product:
        """The same product read from the right: output.mT = right.mT @ left.mT."""
        return Product(
            self.right.mT, self.left.mT, self.output.mT, self.right_source, self.left_source,
            self.scale, None, lambda tensor: self.right_of(tensor).mT,
            lambda tensor: self.left_of(tensor).mT, lambda tensor: self.back(tensor.mT),
        )  # fmt: skip


def read_product(name: str, args: Args, kwargs: Keywords, output: object) -> Product | None:
    """Read a call of matmul, bmm, baddbmm or einsum; None if it is not a product of matrices."""
    if not isinstance(output, Tensor):
        return None
    if name == "einsum":
        return _einsum(args, output)
    added, scale = None, 1.0
    operands = [*args, *(v for k, v in kwargs.items() if k in _OPERANDS)]
    if name == "baddbmm":
        if kwargs.get("beta", 1) != 1:
            return None
        added, *operands = operands
        scale = float(kwargs.get("alpha", 1))
    if len(operands) < 2 or not all(isinstance(t, Tensor) and t.ndim >= 1 for t in operands[:2]):
        return None
    left, right = operands[:2]
    if not left.is_floating_point() or left.ndim == right.ndim == 1:
        return None
    if left.ndim == 1:  # One row, which has no axis of its own.
        row, back = partial(torch.unsqueeze, dim=-2), partial(torch.squeeze, dim=-2)
        return Product(row(left), right, row(output), left, right, left_of=row, back=back)
    if right.ndim == 1:
        column, back = partial(torch.unsqueeze, dim=-1), partial(torch.squeeze, dim=-1)
        return Product(left, column(right), column(output), left, right, right_of=column, back=back)
    return Product(left, right, output, left, right, scale, added)


_OPERANDS = ("input", "self", "other", "mat2", "batch1", "batch2", "tensor2")


def _einsum(args: tuple[Any, ...], output: Tensor) -> Product | None:
    """Two operands with one axis summed: batch axes, one of rows, one of columns."""
    if not args or not isinstance(args[0], str):
        return None
    operands = args[1] if len(args) == 2 and isinstance(args[1], list | tuple) else args[1:]
    if len(operands) != 2:
        return None
    named = _letters(args[0], operands, output)
    if named is None:
        return None
    left, right, out = named
    inner = [c for c in left if c in right and c not in out]
    batch = [c for c in out if c in left and c in right]
    rows = [c for c in out if c in left and c not in right]
    columns = [c for c in out if c in right and c not in left]
    if len(columns) > 1 and len(rows) == 1:
        swapped = ",".join(reversed(args[0].partition("->")[0].split(",")))
        return _einsum((f"{swapped}->{args[0].partition('->')[2]}", *reversed(operands)), output)
    if len(inner) != 1 or len(columns) != 1:
        return None
    if len(left) != len(batch) + len(rows) + 1 or len(right) != len(batch) + 2:
        return None
    # Groups of queries that share keys: the right operand has no axis for them.
    groups, rows = rows[:-1], rows[-1:]
    lead = [c for c in out if c in batch or c in groups]
    left_axes = tuple(left.index(c) for c in [*lead, *rows, *inner])
    right_axes = tuple(right.index(c) for c in [*batch, *inner, *columns])
    order = [out.index(c) for c in [*lead, *rows, *columns]]

    def left_of(tensor: Tensor) -> Tensor:
        tensor = tensor.permute(left_axes)
        return tensor if rows else tensor.unsqueeze(-2)  # One query, which has no axis of its own.

    def right_of(tensor: Tensor) -> Tensor:
        tensor = tensor.permute(right_axes)
        for place in (lead.index(c) for c in lead if c in groups):
            tensor = tensor.unsqueeze(place)
        return tensor

    def back(tensor: Tensor) -> Tensor:
        tensor = tensor if rows else tensor.squeeze(-2)
        return tensor.permute([order.index(axis) for axis in range(len(order))])

    a, b = operands
    made = output.permute(order)
    made = made if rows else made.unsqueeze(-2)
    return Product(
        left_of(a), right_of(b), made, a, b, left_of=left_of, right_of=right_of, back=back
    )


def _letters(
    equation: str, operands: Any, output: Tensor
) -> tuple[list[str], list[str], list[str]] | None:
    """The names of the axes of both operands and the output; an ellipsis written out."""
    inputs, arrow, out = equation.replace(" ", "").partition("->")
    parts = inputs.split(",")
    if not arrow or len(parts) != 2:
        return None
    spare = [c for c in "ABCDEFGHIJKLMNOPQRSTUVWXYZ" if c not in equation]
    dots = max((t.ndim - len(p.replace("...", "")) for t, p in zip(operands, parts, strict=True)
                if "..." in p), default=0)  # fmt: skip
    named = []
    for part, tensor in zip([*parts, out], [*operands, output], strict=True):
        missing = tensor.ndim - len(part.replace("...", ""))
        letters = list(part.replace("...", "".join(spare[dots - missing : dots])))
        if len(set(letters)) != tensor.ndim:
            return None
        named.append(letters)
    return named[0], named[1], named[2]
