"""Attention written out: a softmax, or what does its work, whose result multiplies a value.

Each result of a function gets a tag of where it comes from (see `tags`). When tagged weights are
multiplied by something that is not a parameter, that is attention; the softmax of a classifier
multiplies nothing, and that of a router runs over an axis of a parameter.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch._C._functorch import is_functorch_wrapped_tensor

from pytest_attnheat.attention.vocabulary import hides
from pytest_attnheat.capture.sources.products import (
    FACTORS,
    Product,
    also_masked,
    base_of,
    changed,
    factor_of,
    filled,
    joined,
    number_of,
    read_product,
    tell,
)
from pytest_attnheat.capture.tags import Scores, Tag
from pytest_attnheat.capture.watching import Args, Function, Keywords, Source, Watcher, argument

_PRODUCTS = {"matmul", "__matmul__", "bmm", "baddbmm", "einsum", "mm"}
_SHARES = {"softmax", "_softmax", "_safe_softmax", "sigmoid"}
_DROPOUTS = {"dropout", "dropout_", "feature_dropout", "native_dropout"}
# What moves elements about, or changes their dtype.
_MOVES = {
    "view", "reshape", "flatten", "unflatten", "_unsafe_view", "view_as", "reshape_as",
    "transpose", "swapaxes", "swapdims", "permute", "movedim", "t", "mT", "T", "unsqueeze",
    "squeeze", "expand", "contiguous", "clone", "to", "float", "half", "bfloat16", "double",
    "type", "type_as", "detach", "cpu", "cuda", "requires_grad_", "alias", "_to_copy",
    "view_as_complex", "view_as_real",
}  # fmt: skip
# Those of them after which the axes are no longer those of a product.
_TURNS = {"transpose", "swapaxes", "swapdims", "permute", "movedim", "t", "mT", "T"}


def source_of(name: str, func: Function) -> Source | None:
    """Return the source for a function of a name."""
    if name == "__get__":
        return _moved if _name(func) in _MOVES else None
    if name in _PRODUCTS:
        return _multiplied
    if name in ("linear",):
        return _projected
    if name in _SHARES:
        return _shared
    if name in _DROPOUTS:
        return _dropped
    if name in _MOVES:
        return _moved
    if name == "__setitem__":
        return _overwritten
    return None if name in _SILENT else _anything


def _name(func: Function) -> str:
    """The name of a function, of a property that is read, or of an operator without overload."""
    name = getattr(func, "__name__", "")
    if name == "__get__":
        name = getattr(getattr(func, "__self__", None), "__name__", "")
    return str(name).split(".")[0]


# Called often, and nothing comes of them.
_SILENT = {
    "size", "dim", "numel", "stride", "is_floating_point", "is_complex", "__len__", "item",
    "tolist", "data_ptr", "is_contiguous", "layer_norm", "embedding", "__set__", "__bool__",
    "__repr__", "__format__", "element_size", "get_device", "nelement", "_is_view",
    # The result has but the shape of the argument.
    "full_like", "zeros_like", "ones_like", "empty_like", "rand_like", "randn_like",
    "randint_like", "new_zeros", "new_ones", "new_full", "new_empty", "new_tensor",
}  # fmt: skip


def _multiplied(watcher: Watcher, func: Function, args: Args, kwargs: Keywords) -> Any:
    output = func(*args, **kwargs)
    product = read_product(getattr(func, "__name__", ""), args, kwargs, output)
    if product is None:
        return output
    turned = product.turned()
    left, right = (watcher.tags[t] for t in (product.left_source, product.right_source))
    if left is not None and right is not None and left.weights and right.weights:
        # Somebody follows attention through layers: weights again, and no value.
        watcher.tags[output] = Tag(weights=True, source=left.source)
        watcher.found(left.softmaxes + right.softmaxes)
        return output
    mixed = left if right is None or not right.weights else right
    source = product.left_source if mixed is left else product.right_source
    if mixed is not None and mixed.weights and _mixes_heads(product, source, output):
        watcher.tags[output] = Tag(weights=True, source=mixed.source, softmaxes=mixed.softmaxes)
        return output
    for candidate in (product, turned):
        if _is_attention(watcher, candidate):
            tell(watcher, candidate)
            return output
    if _is_parameter(product.right_source):
        watcher.tags[output] = Tag(parametric=True)
    elif not _is_parameter(product.left_source):
        kept = next((one for one in (product, turned) if _same_axes(one.output, output)), None)
        made = kept or product
        factors = watcher.tags.factor(made.left_source), watcher.tags.factor(made.right_source)
        scores = Scores(
            made.left,
            made.right.mT,
            made.scale * math.prod(f for f in factors if not math.isnan(f)),
            () if made.scale == 1 else (made.scale,),
            bias=product.added,
            kept=kept is not None,
            factors=factors,
        )
        watcher.tags[output] = Tag(scores=scores)
    return output


def _is_parameter(tensor: Tensor) -> bool:
    """Whether a tensor is a parameter, or a view of one."""
    return isinstance(tensor, nn.Parameter) or isinstance(tensor._base, nn.Parameter)


def _mixes_heads(product: Product, weights: Tensor, output: Tensor) -> bool:
    """Whether weights are multiplied by a parameter, heads by heads."""
    other = product.right_source if weights is product.left_source else product.left_source
    return _is_parameter(other) and output.shape == weights.shape and weights.ndim > 2


def _same_axes(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and a.stride() == b.stride()


def _is_attention(watcher: Watcher, product: Product) -> bool:
    """Whether the left of a product is weights, and the right is values."""
    tag = watcher.tags[product.left_source]
    if tag is None or _is_parameter(product.right_source):
        return False
    if tag.weights:
        return True
    if tag.scores is None:
        return False
    # Neither softmax nor sigmoid, but made of a product, and each row is a distribution.
    if not rows_are_distributions(product.left):
        return False
    watcher.tags[product.left_source] = replace(tag, weights=True, source="rows that sum to 1")
    return True


def rows_are_distributions(tensor: Tensor) -> bool:
    """Whether nothing is negative and each row sums to one, or to zero."""
    if not tensor.is_floating_point() or tensor.numel() == 0 or tensor.is_meta:
        return False
    if is_functorch_wrapped_tensor(tensor):
        return False
    with torch.no_grad():
        # What is none shows in the first row, as a rule, and each look waits for the device.
        first = tensor[(0,) * (tensor.ndim - 1)]
        return bool(_like_shares(first).all()) and bool(_like_shares(tensor).all() & tensor.any())


def _like_shares(rows: Tensor) -> Tensor:
    sums = rows.sum(-1, dtype=torch.float32)
    near = ((sums - 1).abs() < 1e-2) | (sums == 0)
    return near & (rows.amin(-1) >= 0)


def _projected(watcher: Watcher, func: Function, args: Args, kwargs: Keywords) -> Any:
    output = func(*args, **kwargs)
    weight, source = argument(args, kwargs, 1, "weight"), argument(args, kwargs, 0, "input")
    tag = watcher.tags[source]
    if tag is not None and tag.weights and tag.turned and output.shape == source.shape:
        watcher.tags[output] = replace(tag, scores=None, clean=None)  # Heads are mixed.
    elif isinstance(weight, nn.Parameter) and weight.ndim == 2 and weight.shape[0] > 1:
        watcher.tags[output] = Tag(parametric=True)
    return output


def _shared(watcher: Watcher, func: Function, args: Args, kwargs: Keywords) -> Any:
    output = func(*args, **kwargs)
    source = argument(args, kwargs, 0, "input", kwargs.get("self"))
    if not isinstance(source, Tensor) or not isinstance(output, Tensor):
        return output
    tag = watcher.tags[source] or Tag()
    sigmoid = _name(func).lstrip("_") == "sigmoid"
    if sigmoid and tag.scores is None:
        return output  # A gate.
    if tag.parametric and _is_last(args, kwargs, source.ndim, always=sigmoid):
        return output  # A classifier or a router.
    # Logits of pairs, as of images and texts, have no batch axis: they are not waited for.
    waits = tag.scores is not None and not tag.weights and source.ndim > 2
    watcher.tags[output] = Tag(
        before=tag.before, scores=tag.scores, weights=True, dtype=output.dtype,
        source="sigmoid" if sigmoid else "softmax",
        softmaxes=watcher.expect() if waits else tag.softmaxes,
    )  # fmt: skip
    return output


def _is_last(args: Args, kwargs: Keywords, ndim: int, *, always: bool) -> bool:
    dim = argument(args, kwargs, 1, "dim", -1)
    return always or dim is None or dim % ndim == ndim - 1


def _dropped(watcher: Watcher, func: Function, args: Args, kwargs: Keywords) -> Any:
    source = argument(args, kwargs, 0, "input")
    tag = watcher.tags[source]
    probability = float(argument(args, kwargs, 1, "p", 0.5))
    training = argument(args, kwargs, 2, "training", True)
    dropping = bool(training) and probability > 0
    if tag is not None and not tag.weights and tag.scores is not None and dropping:
        assert isinstance(source, Tensor)
        if rows_are_distributions(source):
            tag = replace(tag, weights=True, source="rows that sum to 1")
    clean = None if tag is None else tag.clean
    if clean is None and tag is not None and tag.weights and dropping:
        in_place = argument(args, kwargs, 3, "inplace", _is_in_place(func))
        clean = source.detach().clone() if in_place else source
    output = func(*args, **kwargs)
    result = output[0] if isinstance(output, tuple) else output
    if tag is None or (result is source and not dropping):
        return output
    if tag.weights and dropping:
        tag = replace(tag, clean=clean, dropout=probability)
    watcher.tags[result] = tag
    return output


def _moved(watcher: Watcher, func: Function, args: Args, kwargs: Keywords) -> Any:
    output = func(*args, **kwargs)
    source = args[0] if args else None
    if not isinstance(source, Tensor) or not isinstance(output, Tensor) or output is source:
        return output
    tag = watcher.tags[source]
    before = _before(source, output)
    if tag is None:
        watcher.tags.use(source)
        if before is not None:
            watcher.tags[output] = Tag(before=before)
        return output
    clean = tag.clean
    if clean is not None:
        clean = func(clean, *args[1:], **kwargs)
    scores = tag.scores
    if scores is not None and _turns(func):
        scores = replace(scores, kept=False)
    turned = tag.turned or (tag.weights and _turns(func))
    parametric = tag.parametric and output.ndim > 0 and output.shape[-1] == source.shape[-1]
    watcher.tags[output] = replace(
        tag, clean=clean, scores=scores, parametric=parametric and not _turns(func), turned=turned,
        before=before or (tag.before if output.shape == source.shape else None),
    )  # fmt: skip
    return output


def _turns(func: Function) -> bool:
    return _name(func) in _TURNS


def _before(source: Tensor, output: Tensor) -> tuple[int, ...] | None:
    """The shape of a 4-D tensor of which batch and heads, or heads and queries, were joined."""
    if source.ndim != 4 or source.shape[-1:] != output.shape[-1:] or source.numel() == 0:
        return None
    shape = tuple(source.shape)
    if output.ndim == 3 and tuple(output.shape) == (shape[0] * shape[1], *shape[2:]):
        return shape
    packs = output.ndim == 4 and shape[2] == 1 and output.shape[0] == shape[0]
    return shape if packs and output.shape[1] * output.shape[2] == shape[1] else None


def _anything(watcher: Watcher, func: Function, args: Args, kwargs: Keywords) -> Any:
    """Element by element: what comes out of tagged tensors of the same shape is tagged."""
    if args and isinstance(args[0], list | tuple):
        return _joined(watcher, func, args, kwargs)
    watcher.tags.use(*args[:3])
    place, tag = _first_tagged(watcher, args)
    output = func(*args, **kwargs)
    name = _name(func)
    if tag is None or not (tag.weights or tag.scores):
        _follow(watcher, name, args, kwargs, place, tag, output)
        return output
    if not isinstance(output, Tensor):
        return output
    source = args[place]
    if tag.weights and _is_part(func, output, source):
        clean = None if tag.clean is None else func(tag.clean, *args[1:], **kwargs)
        without = _without_sink(tag, source, output)
        watcher.tags[output] = replace(
            without or replace(tag, scores=None, before=None), clean=clean
        )
        return output
    if not _has_axes_of(output, source) or not output.is_floating_point():
        return output
    if tag.weights:
        # What the model makes of its weights is what it uses.
        clean = None if tag.clean is None else _again(func, args, kwargs, place, tag.clean)
        watcher.tags[output] = replace(tag, clean=clean, sink=None)
    elif tag.scores is not None:
        scores = changed(tag.scores, name, args, kwargs, place)
        watcher.tags[output] = replace(tag, scores=scores)
    return output


def _has_axes_of(output: Tensor, source: Tensor) -> bool:
    return output.ndim >= source.ndim and output.shape[-2:] == source.shape[-2:]


def _without_sink(tag: Tag, source: Tensor, output: Tensor) -> Tag | None:
    """What is known of weights of which the last key was left out, if that is their sink."""
    scores = tag.scores
    if scores is None or scores.sinks is None or tag.sink is not None:
        return None
    last = output.shape == (*source.shape[:-1], scores.right.shape[-2])
    same = last and output.data_ptr() == source.data_ptr() and output.stride() == source.stride()
    whole = source if tag.clean is None else tag.clean
    return replace(tag, sink=whole[..., -1:].detach()) if same else None


# A part or a turn of a tensor, in which each number is one that it had, or its negative.
_LINEAR = {
    "getitem", "narrow", "select", "slice", "index_select", "neg", "flip", "roll", "split", "chunk",
    "unbind", "tensor_split", "repeat_interleave", "repeat",
}  # fmt: skip


def _follow(
    watcher: Watcher, name: str, args: Args, kwargs: Keywords, place: int, tag: Tag | None,
    output: Any,
) -> None:  # fmt: skip
    """Keep track of the number that queries or keys were multiplied by, as they are rotated."""
    number = factor_of(name, args, kwargs, place)
    factors = [watcher.tags.factor(one) for one in args[:3]]
    base, factor = base_of(name), math.prod(factors)
    if number is not None:
        factor *= number
    elif base in ("add", "radd", "sub", "rsub"):
        factor = factors[0] if len(set(factors)) == 1 else math.nan
    elif factor != 1 and base not in _LINEAR and (base not in FACTORS or place):
        factor = math.nan
    for made in output if isinstance(output, tuple | list) else (output,):
        if not isinstance(made, Tensor) or not made.is_floating_point():
            continue
        if tag is not None and _has_axes_of(made, args[place]):
            watcher.tags[made] = replace(tag, factor=factor)
        elif factor != 1:
            watcher.tags[made] = Tag(factor=factor)


def _is_part(func: Function, output: Tensor, source: Tensor) -> bool:
    """Whether a part of weights is taken: without a sink, of some heads, of some queries."""
    parts = _name(func).strip("_") in ("getitem", "narrow", "select", "slice", "index_select")
    return parts and output.is_floating_point() and output.shape != source.shape


def _joined(watcher: Watcher, func: Function, args: Args, kwargs: Keywords) -> Any:
    """`stack` and `cat`: weights of several heads side by side are weights."""
    output = func(*args, **kwargs)
    watcher.tags.use(*args[0])
    parts, tags = args[0], [watcher.tags[one] for one in args[0]]
    if not isinstance(output, Tensor) or not any(tags):
        return output
    first = tags[0]
    if all(t is not None and t.weights for t in tags):
        assert first is not None
        cleans = [one if t is None or t.clean is None else t.clean
                  for one, t in zip(parts, tags, strict=True)]  # fmt: skip
        clean = func(cleans, *args[1:], **kwargs) if first.dropout else None
        softmaxes = tuple(number for tag in tags if tag is not None for number in tag.softmaxes)
        watcher.tags[output] = Tag(
            weights=True, source=first.source, dropout=first.dropout, clean=clean,
            softmaxes=softmaxes,
        )  # fmt: skip
    elif first is not None and first.scores is not None and not first.weights:
        keys = first.scores.right.shape[-2]
        if len(parts) == 2 and output.shape == (*parts[0].shape[:-1], keys + 1):
            watcher.tags[output] = replace(first, scores=joined(first.scores, parts[1]))
    elif all(t is None or not (t.weights or t.scores) for t in tags):
        factors = {watcher.tags.factor(one) for one in parts}
        watcher.tags[output] = Tag(factor=factors.pop() if len(factors) == 1 else math.nan)
    return output


def _overwritten(watcher: Watcher, func: Function, args: Args, kwargs: Keywords) -> Any:
    """`tensor[index] = value`."""
    output = func(*args, **kwargs)
    source, index, value = args
    tag = watcher.tags[source]
    if tag is None:
        return output
    if tag.clean is not None:
        clean = tag.clean.detach().clone()
        clean[index] = value
        watcher.tags[source] = replace(tag, clean=clean)
    elif tag.scores is not None and not tag.weights:
        fill = number_of(value)
        if fill is not None and hides(fill):
            seen = torch.ones(source.shape, dtype=torch.bool, device=source.device)
            seen[index] = False
            scores = also_masked(tag.scores, seen, fill)
        elif fill is not None:
            scores = filled(tag.scores, fill)
        else:
            scores = replace(tag.scores, strange="were written to", lost=True)
        watcher.tags[source] = replace(tag, scores=scores)
    return output


def _again(
    func: Function, args: Args, kwargs: Keywords, place: int,
    clean: Tensor,
) -> Tensor | None:  # fmt: skip
    """What a function makes of the weights before dropout, as it did of those after it."""
    given: list[Any] = list(args)
    given[place] = clean.detach().clone() if _is_in_place(func) else clean
    with torch.no_grad():
        result = func(*given, **{name: given for name, given in kwargs.items() if name != "out"})
    return result if isinstance(result, Tensor) else None


def _is_in_place(func: Function) -> bool:
    name = _name(func)
    dunder = name.startswith("__")
    return name.startswith("__i") and name != "__invert__" if dunder else name.endswith("_")


def _first_tagged(watcher: Watcher, args: Args) -> tuple[int, Tag | None]:
    tags = [watcher.tags[argument] for argument in args[:3]]
    for place, tag in enumerate(tags):
        if tag is not None and (tag.scores is not None or tag.weights):
            return place, tag
    return next(((place, tag) for place, tag in enumerate(tags) if tag is not None), (0, None))
