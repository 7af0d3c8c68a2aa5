"""Attention written out: a softmax, or what does its work, whose result multiplies a value.

Each result of a function gets a tag of where it comes from (see `tags`). When tagged weights are
multiplied by something that is not a parameter, that is attention; the softmax of a classifier
multiplies nothing, and that of a router what experts made.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

from torch import Tensor, nn

from ..tags import Origin, Scores, Tag, before_of, mixed
from ..watching import After, Call, Function, Source, Watcher
from . import moved
from .products import Product, read_product, read_sum, rows_are_distributions, sample_of, seen_in
from .reading import tell

_PRODUCTS = {"matmul", "bmm", "baddbmm", "einsum", "mm", "mv", "tensordot"}
_SHARES = {"softmax", "_softmax", "_safe_softmax", "sigmoid"}
_DROPOUTS = {"dropout", "feature_dropout", "native_dropout"}


def source_of(name: str, func: Function) -> Source | None:
    """Return the source for a function of a name."""
    if name == "__get__":
        name = getattr(getattr(func, "__self__", None), "__name__", "")
        if name not in moved.PROPERTIES:
            return None
    base = moved.base_of(name)
    for names, source in _SOURCES:
        if base in names:
            return partial(source, base)
    return None if base in moved.SILENT else partial(moved.anything, base)


def _multiplied(base: str, call: Call) -> After:
    def after(output: Any) -> None:
        product = read_product(base, call.args, call.kwargs, output)
        if product is not None:
            _product(call.watcher, product, output)
            return
        every = [one for given in call.args for one in _listed(given)]
        tag = next((t for t in map(call.watcher.tags.__getitem__, every) if t and t.weights), None)
        if tag is not None and not tag.routes:
            call.watcher.miss(tag.source, f"its result went into {base}, which cannot be read")

    return after


def _listed(given: Any) -> list[Any]:
    return list(given) if isinstance(given, tuple | list) else [given]


def _convolved(base: str, call: Call) -> After | None:
    call.watcher.note("convolution")
    source = call.given(0, "input")
    tag, follow = call.watcher.tags[source], moved.anything(base, call)
    if tag is None or not tag.weights or follow is None:
        return follow

    def after(output: Any) -> None:
        follow(output)
        if (now := call.watcher.tags[output]) is not None:
            call.watcher.tags[output] = mixed(now)  # heads, or keys

    return after


def _summed(base: str, call: Call) -> After | None:
    """The sum of two tensors that were multiplied element by element."""
    source = call.given(0, "input")
    tag, dim = call.watcher.tags[source], call.given(1, "dim")
    dim = dim[0] if isinstance(dim, tuple | list) and len(dim) == 1 else dim
    if tag is None or tag.operands is None or not isinstance(dim, int):
        if tag is None or tag.weights or tag.scores is not None or tag.factor == 1:
            return None
        # Pooled queries: a number that divides them may be the scale, or make a mean of the sum.
        return lambda output: call.watcher.tags.put(output, Tag(factor=math.nan))
    (a, b), keepdim = tag.operands, bool(call.given(2, "keepdim", False))

    def after(output: Tensor) -> None:
        product = read_sum(a, b, dim % source.ndim, output.squeeze(dim) if keepdim else output)
        if product is not None and keepdim:
            back = product.back
            product = replace(product, back=lambda tensor: back(tensor).unsqueeze(dim))
        if product is not None:
            _product(call.watcher, product, output)

    return after


def _product(watcher: Watcher, product: Product, output: Tensor) -> None:
    """Tag the result of a product, or tell of attention."""
    left, right = (watcher.tags[t] for t in (product.left_source, product.right_source))
    if left is not None and right is not None and left.weights and right.weights:
        # Somebody follows attention through layers: weights again, and no value.
        watcher.tags[output] = Tag(weights=True, source=left.source)
        watcher.found(left.softmaxes + right.softmaxes)
        return
    for weights, other in ((left, product.right_source), (right, product.left_source)):
        if weights is not None and weights.weights and _mixes_heads(other, product, output):
            watcher.tags[output] = mixed(weights)
            return
    for candidate in (product, product.turned()):
        if _is_attention(watcher, candidate):
            watcher.tags[output] = Tag(attended=tell(watcher, candidate))
            return
    watcher.note("product")
    scores = _scores(watcher, product)
    if not _is_parameter(product.right_source):
        exponential = left is not None and left.scores is not None and left.scores.done
        divided = product if exponential else None
        watcher.tags[output] = Tag(scores=scores, unnormalised=divided)
    elif scores.columns.shape[-1] > 1:
        watcher.tags[output] = Tag(parametric=True)
    else:
        watcher.tags[output] = Tag(of_experts=True)


def _scores(watcher: Watcher, product: Product) -> Scores:
    """What goes along with the result of a product, in the layout of that."""
    factors = watcher.tags.factor(product.left_source), watcher.tags.factor(product.right_source)
    shape, zero = product.output.shape, product.output.new_zeros([1] * product.output.ndim)
    if product.added is not None:
        zero = product.added.detach().expand(shape)
    sources = watcher.tags[product.left_source], watcher.tags[product.right_source]
    windows = any(tag is not None and tag.windows for tag in sources)
    left, right = product.left.detach(), product.right.mT.detach()
    origin = Origin(left, right, factors, before_of(sources), windows)
    (scores,) = Scores.of(origin, zero, product.output.dtype).moved(shape, product.back)
    return replace(scores, steps=() if product.scale == 1 else (product.scale,))


def _is_parameter(tensor: Tensor) -> bool:
    """Whether a tensor is a parameter, or a view of one."""
    return isinstance(tensor, nn.Parameter) or isinstance(tensor._base, nn.Parameter)


def _mixes_heads(other: Tensor, product: Product, output: Tensor) -> bool:
    """Whether weights are multiplied by a parameter, heads by heads."""
    weights = product.left_source if other is product.right_source else product.right_source
    return _is_parameter(other) and output.shape == weights.shape and weights.ndim > 2


def _is_attention(watcher: Watcher, product: Product) -> bool:
    """Whether the left of a product is weights, and the right is values."""
    tag = watcher.tags[product.left_source]
    if tag is None or _is_parameter(product.right_source):
        return False
    if tag.weights:
        return not tag.routes or _may_be_positions(watcher, product)
    if tag.scores is None:
        return False
    # Neither softmax nor sigmoid, but made of a product, and each row is a distribution.
    if not rows_are_distributions(product.left):
        return False
    watcher.tags[product.left_source] = _made_weights(tag, product.left_source)
    return True


def _may_be_positions(watcher: Watcher, product: Product) -> bool:
    """Whether weights that a layer made run over positions: experts are beside one another."""
    tag = watcher.tags[product.right_source]
    return product.right_source.ndim > 2 and (tag is None or not tag.of_experts)


def _made_weights(tag: Tag, weights: Tensor) -> Tag:
    """The tag of scores that became weights step by step."""
    assert tag.scores is not None
    sample = sample_of(tag.scores, weights.detach().log(), -1)
    return replace(tag, weights=True, source="rows that sum to 1", sample=sample)


def _projected(base: str, call: Call) -> After | None:
    weight, source = call.given(1, "weight"), call.given(0, "input")
    tag, tags = call.watcher.tags[source], call.watcher.tags

    def after(output: Tensor) -> None:
        if tag is not None and tag.weights and tag.turned and output.shape == source.shape:
            tags[output] = mixed(tag)
        elif isinstance(weight, nn.Parameter) and weight.ndim == 2 and weight.shape[0] > 1:
            tags[output] = Tag(parametric=True)

    return after


def _shared(base: str, call: Call) -> After | None:
    source = call.given(0, "input", call.kwargs.get("self"))
    if not isinstance(source, Tensor) or not source.is_floating_point():
        return None
    tag, sigmoid = call.watcher.tags[source] or Tag(), base == "sigmoid"
    dim = None if sigmoid else call.given(1, "dim")
    dim = source.ndim - 1 if dim is None else dim % max(source.ndim, 1)
    # Over its classes, what a layer made may weigh experts.
    routes = tag.parametric and dim == source.ndim - 1
    if sigmoid and (tag.scores is None or routes):
        return None  # A gate.
    scores = tag.scores or seen_in(source.detach(), dim)
    sample = None if scores is None else sample_of(scores, source.detach(), dim)
    # Logits of pairs, as of images and texts, have no batch axis: they are not waited for.
    waits = tag.scores is not None and not tag.weights and source.ndim > 2

    def after(output: Tensor) -> None:
        call.watcher.tags[output] = Tag(
            before=tag.before, scores=scores, weights=True, dtype=output.dtype, sample=sample,
            source="sigmoid" if sigmoid else "softmax", routes=routes,
            softmaxes=call.watcher.expect() if waits else tag.softmaxes,
        )  # fmt: skip

    return after


def _dropped(base: str, call: Call) -> After | None:
    source = call.given(0, "input")
    tag = call.watcher.tags[source]
    if tag is None:
        return None
    probability = float(call.given(1, "p", 0.5))
    dropping = bool(call.given(2, "training", True)) and probability > 0
    if not tag.weights and tag.scores is not None and dropping and rows_are_distributions(source):
        tag = _made_weights(tag, source)
    if tag.weights and dropping:
        in_place = call.given(3, "inplace", moved.is_in_place(call.func))
        clean = source.detach().clone() if in_place else source.detach()
        tag = replace(tag, clean=clean if tag.clean is None else tag.clean, dropout=probability)

    def after(output: Any) -> None:
        result = output[0] if isinstance(output, tuple) else output
        if result is not source or dropping:
            call.watcher.tags[result] = tag

    return after


_SOURCES: tuple[tuple[set[str], Callable[[str, Call], After | None]], ...] = (
    (_PRODUCTS, _multiplied), ({"sum"}, _summed),
    ({"conv1d", "conv2d", "conv3d", "adaptive_avg_pool2d"}, _convolved), ({"linear"}, _projected),
    (_SHARES, _shared), (_DROPOUTS, _dropped), *moved.SOURCES,
)  # fmt: skip
