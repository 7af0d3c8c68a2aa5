"""Products of tensors in any spelling, what is done to scores, and the record of attention."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from numbers import Number
from typing import Any

import torch
from torch import Tensor

from pytest_attnheat.attention.vocabulary import hides, permits
from pytest_attnheat.capture.record import AttentionRecord
from pytest_attnheat.capture.tags import Scores, Shaping, Tag, without_factor
from pytest_attnheat.capture.watching import Args, Keywords, Watcher, argument
from pytest_attnheat.inputs import broadcasts


def changed(scores: Scores, name: str, args: Args, kwargs: Keywords, place: int) -> Scores:
    """What scores are after one more step; strange after a step that is not understood."""
    base = base_of(name)
    words = scores.strange or f"went through {base}, which is not understood"
    strange = replace(scores, strange=words, lost=True)
    other = next((a for index, a in enumerate(args) if index != place), kwargs.get("other"))
    if base in FACTORS:
        factor = factor_of(name, args, kwargs, place)
        return strange if factor is None else _multiplied(scores, factor)
    if base in ("add", "radd", "sub") and not kwargs:
        if base == "sub" and place == 1:
            return strange
        if not isinstance(other, Tensor) or other.ndim == 0 or _is_shift(other, scores):
            # All keys alike: no softmax feels it, unless a sink joins that it was not added to.
            return replace(scores, shifted=True)
        return _biased(scores, other if base != "sub" else -other, args[place].shape, strange)
    if base == "tanh":
        before = (scores.bias, scores.mask, scores.softcap, scores.sinks)
        first = all(one is None for one in before) and not scores.shifted
        return replace(scores, softcap=1.0) if first else strange
    if base in ("masked_fill", "where") and scores.sinks is None:
        return _hidden(scores, strange, base, args, kwargs, place)
    if base in _SHUFFLES:
        return replace(strange, kept=False)
    return scores if base in _HARMLESS else strange


def _multiplied(scores: Scores, factor: float) -> Scores:
    bias, sinks = (None if t is None else t * factor for t in (scores.bias, scores.sinks))
    return replace(
        scores,
        scale=scores.scale * factor,
        steps=(*scores.steps, factor),
        softcap=None if scores.softcap is None else abs(scores.softcap * factor),
        bias=bias,
        sinks=sinks,
    )


def _is_shift(other: Tensor, scores: Scores) -> bool:
    return other.shape[-1:] == (1,) and scores.right.shape[-2] != 1


def _biased(scores: Scores, more: Tensor, shape: torch.Size, strange: Scores) -> Scores:
    """Scores of a shape to which something was added."""
    if scores.sinks is not None:
        return strange
    bias = None if scores.bias is None else _relaid(scores.bias, shape)
    if bias is None and scores.bias is not None:
        return strange
    return replace(scores, bias=(more if bias is None else bias + more).detach())


def _relaid(tensor: Tensor, shape: torch.Size) -> Tensor | None:
    """What was told while batch and heads were one axis, or two, as it is now; None if unclear."""
    if broadcasts(tensor.shape, shape):
        return tensor
    lead, own = shape[:-2], tensor.shape[:-2]
    if len(own) == 1 and own[0] == lead.numel():
        return tensor.view(*lead, *tensor.shape[-2:])
    if len(own) == 2 and len(lead) == 1 and own[0] > 0 and lead[0] % own[0] == 0:
        return tensor.expand(own[0], lead[0] // own[0], -1, -1).flatten(0, 1)
    return None


def joined(scores: Scores, sinks: Tensor) -> Scores:
    """Scores to whose keys one column was joined."""
    if scores.shifted or scores.sinks is not None:
        return replace(scores, strange="were shifted before a sink joined them")
    return replace(scores, sinks=sinks.detach())


FACTORS = ("mul", "div", "truediv", "multiply", "divide", "rmul")


def factor_of(name: str, args: Args, kwargs: Keywords, place: int) -> float | None:
    """The number that a function multiplies its tensor by; None if it does something else."""
    base = base_of(name)
    if base not in FACTORS or ("div" in base and place == 1):
        return None
    other = next((a for index, a in enumerate(args) if index != place), kwargs.get("other"))
    factor = number_of(other)
    if factor is None or factor == 0 or not math.isfinite(factor):
        return None
    return 1 / factor if "div" in base else factor


def base_of(name: str) -> str:
    """The name of a function without what marks operators and what works in place."""
    return name.strip("_").removeprefix("i") if name.startswith("__") else name.rstrip("_")


# What moves scores about, though their number stays.
_SHUFFLES = {
    "getitem", "flip", "fliplr", "flipud", "roll", "rot90", "gather", "index_select", "sort",
    "take_along_dim", "narrow", "slice",
}  # fmt: skip
# What changes no softmax.
_HARMLESS = {"nan_to_num", "detach", "contiguous"}


def _hidden(
    scores: Scores, strange: Scores, base: str, args: Args, kwargs: Keywords, place: int
) -> Scores:
    if base == "masked_fill":
        mask, fill = argument(args, kwargs, 1, "mask"), argument(args, kwargs, 2, "value")
        seen = ~mask if isinstance(mask, Tensor) and mask.dtype == torch.bool else None
    else:
        condition, fill = args[0], args[3 - place] if len(args) > 2 else None
        bools = isinstance(condition, Tensor) and condition.dtype == torch.bool
        seen = (condition if place == 1 else ~condition) if bools else None
    if seen is None or not _hides(fill):
        number = None if seen is None else number_of(fill)
        return strange if number is None else filled(scores, number)
    return also_masked(scores, seen, fill)


def also_masked(scores: Scores, seen: Tensor, fill: object) -> Scores:
    """Scores of which some more are hidden, by a number or by numbers."""
    number = number_of(fill)
    soft = scores.soft or number is None or math.isfinite(number)
    return replace(scores, soft=soft, mask=seen if scores.mask is None else scores.mask & seen)


def filled(scores: Scores, number: float) -> Scores:
    """Scores of which some were replaced by a number that hides nothing."""
    return replace(scores, strange=scores.strange or f"were filled with {number:g} in places")


def _hides(fill: object) -> bool:
    """Whether scores that are overwritten by this get no weight."""
    if isinstance(fill, Tensor):
        known = fill.numel() > 0 and fill.dtype != torch.bool and not fill.is_meta
        return known and not bool(permits(fill).any())
    value = number_of(fill)
    return value is not None and hides(value)


def number_of(value: object) -> float | None:
    """A Python number, or a tensor of one that is on the CPU."""
    if isinstance(value, Number) and not isinstance(value, complex):
        return float(value)  # type: ignore[arg-type]
    if isinstance(value, Tensor) and value.numel() == 1 and value.device.type == "cpu":
        return float(value.detach())
    return None


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
        moves: How `left` was made of its operand, to do the same with another: axes to permute
            (None for none), and whether a row was added.
    """

    left: Tensor
    right: Tensor
    output: Tensor
    left_source: Tensor
    right_source: Tensor
    scale: float = 1.0
    added: Tensor | None = None
    left_axes: tuple[int, ...] | None = None
    right_axes: tuple[int, ...] | None = None
    row_added: bool = False

    def turned(self) -> Product:
        """The same product read from the right: output.mT = right.mT @ left.mT."""
        return Product(
            self.right.mT, self.left.mT, self.output.mT, self.right_source, self.left_source,
            self.scale, None, _swapped(self.right_axes, self.right.ndim),
            _swapped(self.left_axes, self.left.ndim),
        )  # fmt: skip

    @property
    def left_as_it_is(self) -> bool:
        """Whether `left` has the axes of its operand, in their order."""
        return self.left_axes in (None, tuple(range(self.left.ndim)))

    def like_left(self, tensor: Tensor) -> Tensor:
        """A tensor in the layout of the left operand, in that of `left`."""
        if self.left_axes is not None:
            tensor = tensor.permute(self.left_axes)
        return tensor.unsqueeze(-2) if self.row_added else tensor


def _swapped(axes: tuple[int, ...] | None, ndim: int) -> tuple[int, ...]:
    axes = tuple(range(ndim)) if axes is None else axes
    return (*axes[:-2], axes[-1], axes[-2])


def read_product(name: str, args: Args, kwargs: Keywords, output: object) -> Product | None:
    """Read a call of matmul, bmm, baddbmm or einsum; None if it is not a product of matrices."""
    name = name.split(".")[0]
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
        made = output.unsqueeze(-2)
        return Product(left.unsqueeze(-2), right, made, left, right, row_added=True)
    if right.ndim == 1:
        return Product(left, right.unsqueeze(-1), output.unsqueeze(-1), left, right)
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
    a, b = operands
    made = output.permute(tuple(out.index(c) for c in [*lead, *rows, *columns]))
    left_view, right_view, row_added = a.permute(left_axes), b.permute(right_axes), not rows
    for place in (lead.index(c) for c in lead if c in groups):
        right_view = right_view.unsqueeze(place)
    if row_added:  # One query, which has no axis of its own.
        left_view, made = left_view.unsqueeze(-2), made.unsqueeze(-2)
    return Product(
        left_view, right_view, made, a, b,
        left_axes=left_axes, right_axes=right_axes, row_added=row_added,
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


def tell(watcher: Watcher, product: Product) -> None:
    """Tell the recorders of a product of weights and values."""
    tag = watcher.tags[product.left_source]
    assert tag is not None
    clean = product.left if tag.clean is None else product.like_left(tag.clean)
    watcher.found(tag.softmaxes)
    if not clean.is_floating_point() or clean.shape != product.left.shape or clean.is_meta:
        watcher.miss(tag.source, "its weights were changed in a way that is not understood")
        return
    watcher.tell(tag.source, lambda: _record(watcher, tag, product, clean))


def _record(
    watcher: Watcher, tag: Tag, product: Product, clean: Tensor
) -> tuple[AttentionRecord, Tensor]:
    scores, used = tag.scores, product.left
    shaping = Shaping.of_weights(used, _before(watcher, tag, product), watcher.heads)
    key_len = used.shape[-1]
    query = key = sinks = None
    if scores is not None and scores.kept and product.left_as_it_is:
        query, key = _operands(scores, shaping, used)
    mask, bias, column = (_masking(scores, shaping, used, n) for n in ("mask", "bias", "sinks"))
    strange, lost = ("", False) if scores is None else (scores.strange, scores.lost)
    if scores is None or query is None:
        strange, lost = strange or "are not known as a product of queries and keys", True
    elif (scores.mask is None) != (mask is None) or (scores.bias is None) != (bias is None):
        # Told in a layout of which nothing is known here: windows, for instance.
        query = key = None
        strange, lost = "were masked in a layout that is not understood", True
    elif scores.sinks is not None and not strange:
        sinks = None if column is None else _per_head(column.expand(-1, shaping.heads, -1, -1))
        strange = "" if sinks is not None else "were joined by what is not one number per head"
    exact = scores is not None and not strange
    record = AttentionRecord(
        layer="",
        source=tag.source,
        shape=shaping.weights_shape(used.shape[-2], key_len),
        dtype=max(used.dtype, tag.dtype or used.dtype, key=lambda dtype: torch.finfo(dtype).eps),
        query=query,
        key=key,
        value=shaping.keys(product.right),
        output=shaping.queries(product.output),
        given_mask=mask,
        soft_mask=scores is not None and scores.soft,
        bias=bias,
        scale=scores.scale if exact and scores is not None else None,
        scale_steps=() if scores is None else scores.steps,
        scaled_before=() if scores is None else scores.factors,
        softcap=scores.softcap if exact and scores is not None else None,
        sinks=sinks,
        sink_weights=None if tag.sink is None else shaping.queries(tag.sink)[..., 0],
        strange=strange,
        mask_lost=lost and mask is bias is None,
        dropout=tag.dropout,
        kept_weights=shaping.queries(clean),
    )
    return record, shaping.queries(used)


def _per_head(column: Tensor) -> Tensor | None:
    """One number per head of what is (batch, heads, query_len, 1); None if it is more."""
    own = column[0, :, 0, 0]
    return own if bool((column == own[:, None, None]).all()) else None


def _before(watcher: Watcher, tag: Tag, product: Product) -> tuple[int, ...] | None:
    """The shape (batch, heads, ...) that some tensor of this attention had before it was 3-D."""
    sources = [tag, watcher.tags[product.right_source]]
    if tag.scores is not None:
        sources += [watcher.tags[tag.scores.left], watcher.tags[tag.scores.right]]
    return next((t.before for t in sources if t is not None and t.before is not None), None)


def _operands(
    scores: Scores, shaping: Shaping, used: Tensor
) -> tuple[Tensor | None, Tensor | None]:
    left, right = scores.left, scores.right
    if left.shape[-2] != used.shape[-2] or right.shape[-2] != used.shape[-1]:
        return None, None
    lead = used.shape[:-2]
    if left.shape[:-2].numel() != lead.numel():
        return None, None
    if right.shape[:-2].numel() == lead.numel():
        right = right.reshape(*lead, *right.shape[-2:])
    of_left, of_right = scores.factors
    query = without_factor(shaping.queries(left), of_left)
    return query, without_factor(shaping.keys(right), of_right)


def _masking(scores: Scores | None, shaping: Shaping, used: Tensor, what: str) -> Tensor | None:
    if scores is None or not scores.kept:
        return None
    tensor: Tensor | None = getattr(scores, what)
    if tensor is None:
        return None
    whole = shaping.weights_shape(used.shape[-2], used.shape[-1])
    if tensor.ndim == 3 and used.ndim == 4 and tensor.shape[0] == used.shape[0] * used.shape[1]:
        # Told while batch and heads were one axis.
        tensor = tensor.view(*used.shape[:2], *tensor.shape[1:])
    fits = broadcasts(tensor.shape, used.shape) or broadcasts(tensor.shape, whole)
    return shaping.mask(tensor) if fits else None
