"""The record of attention that was written out, from what went along with its weights."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor

from ...attention.vocabulary import permits
from ..record import AttentionRecord
from ..shaping import Shaping
from ..tags import Scores, Tag, before_of, coarser, doubt_of, without_factor, without_repetition
from ..watching import Taken, Watcher
from .products import Product, explained, sample_of


@dataclass(frozen=True)
class Attended:
    """An attention that was told: what made it, and the records of it."""

    tag: Tag
    product: Product
    taken: list[Taken]


def tell(watcher: Watcher, product: Product) -> Attended | None:
    """Tell the recorders of a product of weights and values."""
    tag = watcher.tags[product.left_source]
    assert tag is not None
    alike = _repeat_beside(product)
    product = _spread(product)
    within = attended_of(watcher.tags[product.right_source])
    if tag.part is None:
        watcher.found(tag.softmaxes)
        if within is not None and _is_linear(tag, within.tag):
            return _tell_linear(watcher, tag, product, within)
        return _told(watcher, tag, product, **alike)
    attended = _told(watcher, tag, product, **alike, **_OF_SOME_KEYS)
    if attended is None:
        return None
    # The model may add the other parts to this one in place.
    own = replace(product, output=product.output.clone())
    tag.parts[tag.part[0]] = replace(attended, product=own)
    if sum(one.product.left.shape[-1] for one in tag.parts.values()) < tag.part[1]:
        return attended
    watcher.found(tag.softmaxes)
    return _told(watcher, replace(tag, scores=None, clean=None), _together(tag.parts))


# Scores of some keys make other weights than they had among all.
_OF_SOME_KEYS: dict[str, Any] = {
    "part": "keys", "strange": "were cut into parts by their keys", "mask_lost": True,
    "given_mask": None, "bias": None, "scale": None, "softcap": None, "sinks": None,
}  # fmt: skip


def mark_blocks(pieces: list[tuple[Tensor, Attended]], axis: int) -> None:
    """Mark attentions as blocks of queries, if outputs were put beside one another as such."""
    # Heads may be put together as well, along an axis of their own, and batch entries along the
    # first.
    tensor, first = pieces[0]
    *lead, queries, _width = first.product.output.shape
    shapes = {one.product.left.shape[-2:] for _, one in pieces}
    axis %= tensor.ndim
    within = 0 < axis < tensor.ndim - 1 and math.prod(tensor.shape[:axis]) == math.prod(lead)
    if within and (len(shapes) > 1 or (axis == tensor.ndim - 2 and tensor.shape[axis] == queries)):
        for _, one in pieces:
            for taken in one.taken:
                taken.mark("queries")


def _told(watcher: Watcher, tag: Tag, product: Product, **known: Any) -> Attended | None:
    clean = product.left if tag.clean is None else product.left_of(tag.clean)
    if not clean.is_floating_point() or clean.shape != product.left.shape or clean.is_meta:
        watcher.miss(tag.source, "its weights were changed in a way that is not understood")
        return None
    record, used = _record(watcher, tag, product, clean)
    return Attended(tag, product, watcher.tell(replace(record, **known), used))


def attended_of(tag: Tag | None) -> Attended | None:
    """Return the attention that a tensor is the result of."""
    found = None if tag is None else tag.attended
    return found if isinstance(found, Attended) else None


def _is_linear(outer: Tag, inner: Tag) -> bool:
    """Whether neither weights are made of queries times keys: q.softmax @ (k.softmax.mT @ v)."""
    origins = [tag.scores is not None and tag.scores.origin is None for tag in (outer, inner)]
    return all(origins) and outer.source == inner.source == "softmax"


def _tell_linear(watcher: Watcher, tag: Tag, product: Product, inner: Attended) -> Attended | None:
    """Tell of linear attention, by the weights that it implies, in place of its inner half."""
    for taken in inner.taken:
        taken.undo()
    weights = product.left @ inner.product.left
    value = inner.product.right.expand(*weights.shape[:-2], -1, -1)
    whole = Product(weights, value, product.output, weights, inner.product.right_source)
    bare = Tag(source="linear attention", dropout=tag.dropout or inner.tag.dropout)
    return _told(watcher, bare, whole, kind="linear")


def _together(parts: dict[int, Attended]) -> Product:
    """One product of parts of the keys."""
    for one in parts.values():
        for taken in one.taken:
            taken.undo()
    products = [parts[start].product for start in sorted(parts)]
    lead = products[0].output.shape[:-2]
    left = torch.cat([one.left for one in products], -1)
    right = torch.cat([one.right.expand(*lead, -1, -1) for one in products], -2)
    output = sum((one.output for one in products[1:]), products[0].output)
    return Product(left, right, output, left, right)


def tell_divided(watcher: Watcher, product: Product, divisor: Any) -> None:
    """Tell of weights that their sum divides after they multiplied the value, if it does."""
    tag, left = watcher.tags[product.left_source], product.left
    sums = left.sum(-1, keepdim=True)
    whole = product.back(sums.expand(product.output.shape))
    if tag is None or tag.scores is None or not isinstance(divisor, Tensor):
        return
    if not torch.allclose(whole, divisor.expand_as(whole), rtol=1e-3):
        return
    sample = sample_of(tag.scores, product.left_source.detach().log(), -1)
    tag = replace(tag, source="exp, divided by its sum afterwards", sample=sample)
    product = _spread(replace(product, left=left / sums, output=product.output / sums))
    _told(watcher, tag, product)


def _repeat_beside(product: Product) -> dict[str, str]:
    """The doubt about weights that repeat along an axis of values: it may be one of channels."""
    weights, lead = product.left.shape[:-2], product.output.shape[:-2]
    sizes = zip(reversed(weights), reversed(lead[1:]), strict=False)
    if len(weights) >= len(lead) - 1 > 0 and all(a == b for a, b in sizes):
        return {}
    repeat = len(lead) > 1 and lead[1:].numel() > 1
    return {"doubt": "its weights repeat along an axis that may be no head"} if repeat else {}


def _spread(product: Product) -> Product:
    """The product with weights that have all leading axes of the values."""
    lead, left_of = product.output.shape[:-2], product.left_of

    def spread(tensor: Tensor) -> Tensor:
        return tensor.expand(*lead, -1, -1)

    return replace(
        product, left=spread(product.left), left_of=lambda tensor: spread(left_of(tensor))
    )


@dataclass
class _Known:
    """What is known of the scores of an attention."""

    query: Tensor | None = None
    key: Tensor | None = None
    mask: Tensor | None = None
    bias: Tensor | None = None
    sinks: Tensor | None = None
    soft: bool = False
    strange: str = ""
    doubt: str = ""
    lost: bool = False


def _kind(tag: Tag) -> Literal["attention", "pooling", "mixed"]:
    if tag.mixed:
        return "mixed"
    return "pooling" if tag.scores is not None and tag.scores.origin is None else "attention"


def _record(
    watcher: Watcher, tag: Tag, product: Product, clean: Tensor
) -> tuple[AttentionRecord, Tensor]:
    scores, used = tag.scores, product.left
    origin = None if scores is None else scores.origin
    sources = tag, watcher.tags[product.right_source], origin
    shaping = Shaping.of(used, before_of(sources), watcher.heads)
    factors = () if origin is None else origin.factors
    numbers = factors if scores is None else (*factors, *scores.steps)
    scale = math.prod(number for number in numbers if not math.isnan(number))
    known = _known(tag, product, shaping, math.prod(scores.steps) if scores is not None else 1.0)
    exact = scores is not None and not known.strange
    record = AttentionRecord(
        layer="", source=tag.source, kind=_kind(tag),
        doubt=shaping.doubt or known.doubt or doubt_of(sources, used),
        shape=shaping.weights_shape(*used.shape[-2:]),
        dtype=coarser(used.dtype, tag.dtype or used.dtype, product.output.dtype), query=known.query,
        key=known.key, value=shaping.keys(product.right), output=shaping.queries(product.output),
        given_mask=known.mask, soft_mask=known.soft, bias=known.bias,
        scale=scale if exact else None, scale_steps=() if scores is None else scores.steps,
        scaled_before=factors, softcap=scores.softcap if exact and scores is not None else None,
        sinks=known.sinks,
        sink_weights=None if tag.sink is None else shaping.queries(tag.sink[0])[..., 0],
        strange=known.strange, mask_lost=known.lost, dropout=tag.dropout,
        kept_weights=shaping.queries(clean),
    )  # fmt: skip
    return record, shaping.queries(used)


def _known(tag: Tag, product: Product, shaping: Shaping, scale: float) -> _Known:
    scores = tag.scores
    unknown = "are not known as a product of queries and keys"
    if scores is None:
        return _Known(strange=unknown, lost=True)
    shape = product.left_source.shape
    if not all(_broadcasts(t, shape) for t in (scores.rows, scores.columns, scores.zero)):
        return _Known(strange="changed their shape in a way that is not understood", lost=True)
    known = _Known(strange=unknown)
    added = _added(tag, scores, product, shaping)
    fits = alike = torch.ones((), dtype=torch.bool, device=added.zero.device)
    if tag.sample is not None:
        fits, alike = explained(scores, tag.sample, scale)
    # One wait for the device.
    fits, alike, hides, soft, felt, per_head = torch.stack([fits, alike, *added.flags]).tolist()
    if tag.sample is not None:
        went = ", ".join(dict.fromkeys(scores.went)) or "a softmax"
        understood = fits and alike
        known.strange = "" if understood else f"went through {went}, which is not understood"
        known.lost = not alike
        _find_operands(known, scores, product, shaping)
    if hides and not known.lost:
        known.mask, known.soft = shaping.mask(added.seen), soft
    if not known.strange and not per_head:
        known.strange = "were joined by what is not one number per head"
    if not known.strange:
        known.sinks = added.sinks
        known.bias = shaping.mask(added.visible) if felt else None
    return known


def _broadcasts(tensor: Tensor, shape: torch.Size) -> bool:
    return tensor.ndim == len(shape) and all(
        a in (1, b) for a, b in zip(tensor.shape, shape, strict=True)
    )


def _find_operands(known: _Known, scores: Scores, product: Product, shaping: Shaping) -> None:
    """Find queries and keys by their numbers, in the layout of the weights."""
    assert scores.origin is not None
    whole = (tensor.expand(product.left_source.shape) for tensor in (scores.rows, scores.columns))
    rows, columns = (product.left_of(tensor) for tensor in whole)
    left, right = scores.origin.left, scores.origin.right
    of_left, of_right = scores.origin.factors
    if not (_repeats(rows, -1) and _repeats(columns, -2)):
        rows, columns, left, right = columns, rows, right, left
        of_left, of_right = of_right, of_left
    query = key = None
    if _repeats(rows, -1) and _repeats(columns, -2):
        query = _taken(left, rows[..., 0])
        key = _taken(right, _of_heads(columns[..., 0, :], shaping))
    if query is None or key is None:
        known.strange = known.strange or "were moved in a way that is not understood"
        known.doubt = "which of its axes are queries is not known"
        return
    known.query = without_factor(shaping.queries(query), of_left)
    known.key = without_factor(key, of_right)


def _of_heads(numbers: Tensor, shaping: Shaping) -> Tensor:
    """Numbers (..., key_len) of keys as (batch, key_heads, key_len): some heads may share them."""
    numbers = numbers.reshape(shaping.batch, -1, numbers.shape[-1])
    heads = numbers.shape[1]
    for group in range(heads, 1, -1):
        if heads % group == 0:
            grouped = numbers.view(shaping.batch, heads // group, group, -1)
            if _repeats(grouped, 2):
                return grouped[:, :, 0]
    return numbers


def _repeats(tensor: Tensor, axis: int) -> bool:
    if tensor.stride(axis) == 0 or tensor.shape[axis] == 1:
        return True
    return bool((tensor == tensor.narrow(axis, 0, 1)).all())


def _taken(operand: Tensor, numbers: Tensor) -> Tensor | None:
    """Rows of an operand by their numbers, (..., numbers, width); None if some have none."""
    flat, width = numbers.flatten(), operand.shape[-1]
    if len(flat) == operand.shape[:-1].numel() and bool(
        (flat == torch.arange(len(flat), device=flat.device)).all()
    ):
        return operand.reshape(*numbers.shape, width)
    if bool((flat < 0).any()):
        return None
    return operand.reshape(-1, width)[flat].view(*numbers.shape, width)


@dataclass
class _Added:
    """What the scores would be if their product were zero: mask, bias and sinks."""

    zero: Tensor  # That, broadcastable to the weights
    seen: Tensor  # Where it hides no key
    sinks: Tensor | None  # (heads,), or None
    # On the device: whether it hides any key, by a finite number, whether it is felt elsewhere, and
    # whether sinks are one number per head
    flags: list[Tensor]

    @property
    def visible(self) -> Tensor:
        """What is added where no key is hidden."""
        return self.zero.masked_fill(~self.seen, 0.0)


def _added(tag: Tag, scores: Scores, product: Product, shaping: Shaping) -> _Added:
    source = product.left_source.shape
    zero = without_repetition(product.left_of(scores.zero.expand(source)))
    if zero.numel() == 0:
        zero = zero.new_zeros([1] * zero.ndim)
    seen = permits(zero)
    # No softmax feels a number that is the same for all keys ...
    low, high = zero.masked_fill(~seen, math.inf), zero.masked_fill(~seen, -math.inf)
    felt = low.amin(-1) < high.amax(-1)
    sinks, per_head = None, torch.ones_like(felt.any())
    if tag.sink is not None:
        column = shaping.queries(tag.sink[1].expand(*source[:-1], 1))
        sinks = column[0, :, 0, 0]
        per_head = (column == sinks[:, None, None]).all()
        felt = zero.masked_fill(~seen, 0.0) != 0  # ... but sinks do that joined afterwards.
    flags = [(~seen).any(), (~seen & zero.isfinite()).any(), felt.any(), per_head]
    return _Added(zero, seen, sinks, flags)
