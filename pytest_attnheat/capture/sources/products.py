"""Products of tensors in any spelling, read as one of matrices; and what numbers tell of scores."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from string import ascii_lowercase, ascii_uppercase
from typing import Any

import torch
from torch import Tensor

from ...attention.vocabulary import permits
from ..tags import Sample, Scores, coarser
from ..watching import Args, Keywords

Move = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Product:
    """output = scale * left @ right + added."""

    left: Tensor  # (..., rows, inner)
    right: Tensor  # (..., inner, columns)
    output: Tensor  # (..., rows, columns)
    left_source: Tensor  # The operand that `left` is a view of
    right_source: Tensor  # The operand that `right` is a view of
    scale: float = 1.0  # A factor
    added: Tensor | None = None  # What was added
    left_of: Move = lambda tensor: tensor  # Brings the left operand in the layout of `left`
    right_of: Move = lambda tensor: tensor  # The same on the right
    back: Move = lambda tensor: tensor  # Brings `output` in the layout of what was returned

    def turned(self) -> Product:
        """The same product read from the right: output.mT = right.mT @ left.mT."""
        return Product(
            self.right.mT, self.left.mT, self.output.mT, self.right_source, self.left_source,
            self.scale, None, lambda tensor: self.right_of(tensor).mT,
            lambda tensor: self.left_of(tensor).mT, lambda tensor: self.back(tensor.mT),
        )  # fmt: skip


def read_product(name: str, args: Args, kwargs: Keywords, output: object) -> Product | None:
    """Read a call of matmul, bmm, baddbmm or einsum; None if it is not a product of matrices."""
    if not isinstance(output, Tensor) or not output.is_floating_point():
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
    if name == "tensordot":
        return _tensordot(left, right, kwargs.get("dims", operands[2:3]), output)
    if left.ndim == right.ndim == 1:
        return None
    if left.ndim == 1:  # One row, which has no axis of its own.
        row, back = partial(torch.unsqueeze, dim=-2), partial(torch.squeeze, dim=-2)
        return Product(row(left), right, row(output), left, right, left_of=row, back=back)
    if right.ndim == 1:
        column, back = partial(torch.unsqueeze, dim=-1), partial(torch.squeeze, dim=-1)
        return Product(left, column(right), column(output), left, right, right_of=column, back=back)
    return Product(left, right, output, left, right, scale, added)


_OPERANDS = ("input", "self", "other", "mat2", "batch1", "batch2", "tensor2", "a", "b", "vec")


def _tensordot(left: Tensor, right: Tensor, dims: Any, output: Tensor) -> Product | None:
    """A product over one axis of each operand, without batch axes."""
    dims = dims[0] if isinstance(dims, list) and len(dims) == 1 else dims
    if isinstance(dims, int):
        axes = (-1, 0) if dims == 1 else ()
    else:
        axes = tuple(one[0] if isinstance(one, list | tuple) else one for one in dims)
        axes = () if any(isinstance(one, list | tuple) and len(one) != 1 for one in dims) else axes
    if len(axes) != 2 or left.shape[axes[0]] != right.shape[axes[1]]:
        return None
    a, b = list(ascii_lowercase[: left.ndim]), list(ascii_uppercase[: right.ndim])
    b[axes[1]] = a[axes[0]]
    out = [c for c in (*a, *b) if c != a[axes[0]]]
    return _read(out, output, _Operand(left, a), _Operand(right, b))


def read_sum(a: Tensor, b: Tensor, dim: int, output: Tensor) -> Product | None:
    """Read `(a * b).sum(dim)`, of tensors that broadcast; None if it is not one of matrices."""
    ndim = max(a.ndim, b.ndim)
    sizes = [(1,) * (ndim - one.ndim) + tuple(one.shape) for one in (a, b)]
    if sizes[0][dim] != sizes[1][dim] or output.ndim != ndim - 1:
        return None
    operands = []
    for tensor, own, other in zip((a, b), sizes, reversed(sizes), strict=True):
        repeated = [axis for axis in range(ndim) if own[axis] == 1 != other[axis]]
        letters = [c for axis, c in enumerate(ascii_lowercase[:ndim]) if axis not in repeated]
        operands.append(_Operand(tensor, letters, partial(_without, axes=repeated, ndim=ndim)))
    out = [c for c in ascii_lowercase[:ndim] if c != ascii_lowercase[dim % ndim]]
    return _read(out, output, *operands)


def _without(tensor: Tensor, axes: list[int], ndim: int) -> Tensor:
    return tensor[(None,) * (ndim - tensor.ndim)].squeeze(axes)


def _einsum(args: Args, output: Tensor) -> Product | None:
    if not args or not isinstance(args[0], str):
        return None
    operands = args[1] if len(args) == 2 and isinstance(args[1], list | tuple) else args[1:]
    if len(operands) != 2:
        return None
    named = _letters(args[0], operands, output)
    return None if named is None else _read(named[2], output, *map(_Operand, operands, named))


@dataclass(frozen=True)
class _Operand:
    """A tensor, the names of the axes that it has once it is laid, and how it is."""

    source: Tensor
    letters: list[str]
    lay: Move = lambda tensor: tensor


def _read(out: list[str], output: Tensor, a: _Operand, b: _Operand) -> Product | None:
    """Two operands with one axis summed, as a product of matrices or, from the right, not."""
    # There are batch axes, one of rows, one of columns, and perhaps groups of rows.
    return _matrices(a, b, out, output) or _matrices(b, a, out, output)


def _matrices(a: _Operand, b: _Operand, out: list[str], output: Tensor) -> Product | None:
    left, right = a.letters, b.letters
    inner = [c for c in left if c in right and c not in out]
    batch = [c for c in out if c in left and c in right]
    rows = [c for c in out if c in left and c not in right]
    columns = [c for c in out if c in right and c not in left]
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
        tensor = a.lay(tensor).permute(left_axes)
        return tensor if rows else tensor.unsqueeze(-2)  # One query, which has no axis of its own.

    def right_of(tensor: Tensor) -> Tensor:
        tensor = b.lay(tensor).permute(right_axes)
        for place in (lead.index(c) for c in lead if c in groups):
            tensor = tensor.unsqueeze(place)
        return tensor

    def back(tensor: Tensor) -> Tensor:
        tensor = tensor if rows else tensor.squeeze(-2)
        return tensor.permute([order.index(axis) for axis in range(len(order))])

    made = output.permute(order)
    return Product(
        left_of(a.source), right_of(b.source), made if rows else made.unsqueeze(-2),
        a.source, b.source, left_of=left_of, right_of=right_of, back=back,
    )  # fmt: skip


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


# So many rows of what a softmax was given are explained, in so many of their columns.
_ROWS, _COLUMNS = 8, 256
# Of so many roundings of its dtype a score may be off; it is one product and a few steps.
_ROUNDINGS = 8.0
# Matrices may be multiplied with less than float32 has, on accelerators.
_REDUCED = 2.0**-10


def rows_are_distributions(tensor: Tensor) -> bool:
    """Whether nothing is negative and each row sums to one, or to zero."""
    if not tensor.is_floating_point() or tensor.numel() == 0 or tensor.is_meta:
        return False
    # What is none shows in the first row, as a rule, and each look waits for the device.
    first = tensor[(0,) * (tensor.ndim - 1)]
    return bool(_like_shares(first).all()) and bool(_like_shares(tensor).all() & tensor.any())


def _like_shares(rows: Tensor) -> Tensor:
    sums = rows.sum(-1, dtype=torch.float32)
    near = ((sums - 1).abs() < 1e-2) | (sums == 0)
    return near & (rows.amin(-1) >= 0)


def seen_in(given: Tensor, dim: int) -> Scores | None:
    """What numbers alone tell of scores that were not made of a product: what they hide."""
    if given.ndim == 0 or given.is_meta:
        return None
    shape = [1] * given.ndim
    shape[dim] = given.shape[dim]
    columns = torch.arange(given.shape[dim], device="cpu").view(shape)
    zero, seen = given.new_zeros([1] * given.ndim), permits(given)
    if not bool(seen.all()):
        zero = given.masked_fill(seen, 0.0)
    return Scores(None, torch.zeros_like(columns), columns, zero, coarsest=given.dtype)


def sample_of(scores: Scores, given: Tensor, dim: int) -> Sample | None:
    """Take some rows of what a softmax over an axis was given."""
    if scores.origin is None or given.numel() == 0 or given.is_meta:
        return None
    tensors = given, scores.rows, scores.columns, scores.zero
    whole = [tensor.expand(given.shape).movedim(dim, -1) for tensor in tensors]
    *lead, keys = whole[0].shape
    rows, index = _some(math.prod(lead), _ROWS), [_some(keys, _COLUMNS)]
    for size in reversed(lead):
        index.insert(0, (rows % size)[:, None])
        rows = rows // size
    return Sample(*(tensor[tuple(index)] for tensor in whole))


def _some(count: int, most: int) -> Tensor:
    """Numbers up to a count, of which the first and the last are always among them."""
    return torch.linspace(0, count - 1, min(count, most), device="cpu").round().long()


def explained(scores: Scores, sample: Sample, scale: float) -> tuple[Tensor, Tensor]:
    """Return whether a scale, a cap and what was added explain scores, and what hides keys does."""
    # Nobody waits yet for the device to say so.
    assert scores.origin is not None
    given, zero, device = sample.given.double(), sample.zero.double(), sample.given.device
    columns = sample.columns.to(device, non_blocking=True)
    sides = (scores.origin.left, sample.rows), (scores.origin.right, sample.columns)
    left, right = (operand.reshape(-1, operand.shape[-1])[numbers.clamp(min=0)].double()
                   for operand, numbers in sides)  # fmt: skip
    made = scale * (left * right).sum(-1)
    size = (left * right).abs().sum(-1) * abs(scale)
    if scores.softcap is not None:
        made = scores.softcap * (made / scores.softcap).tanh()
    made = torch.where(columns >= 0, made, 0.0) + zero
    seen, meant = permits(given), permits(zero)
    both = seen & meant & given.isfinite() & made.isfinite()
    # No softmax feels a number that is the same for all keys.
    off = given - made
    mean = torch.where(both, off, 0.0).sum(-1, keepdim=True) / both.sum(-1, keepdim=True).clamp(1)
    eps = torch.finfo(coarser(scores.coarsest, sample.given.dtype)).eps
    eps = max(eps, 0.0 if device.type == "cpu" else _REDUCED)
    felt = (given.abs() + zero.abs() + size + 1).nan_to_num_(nan=0.0, posinf=0.0)
    largest = torch.where(both, felt, 0.0).amax(-1, keepdim=True)
    near = (off - mean).abs() <= _ROUNDINGS * eps * (felt + largest)
    top = torch.where(meant, made, -torch.inf).amax(-1, keepdim=True)
    vanished = scores.done & given.isneginf() & (made < top - 80)
    strange = (made.isnan() & given.isnan()) | vanished | (columns < -1)
    return (near | ~both | strange).all(), ((seen == meant) | near | strange).all()
