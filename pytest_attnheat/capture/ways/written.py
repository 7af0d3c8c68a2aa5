"""Attention written out: a softmax, or what does its work, whose result multiplies a value.

Each result of a function gets a tag of where it comes from (see `tags`). When tagged weights are
multiplied by something that is no parameter, that is attention; a classifier's softmax multiplies
nothing, and that of a router runs over an axis of a parameter.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from numbers import Number
from typing import Any

import torch
from torch import Tensor, nn
from torch._C._functorch import is_functorch_wrapped_tensor

from pytest_attnheat.capture.record import HIDDEN_BELOW
from pytest_attnheat.capture.tags import Scores, Tag
from pytest_attnheat.capture.watching import Watcher, Way
from pytest_attnheat.capture.ways.products import Product, read_product, tell

_PRODUCTS = {"matmul", "__matmul__", "bmm", "baddbmm", "einsum", "mm"}
_SHARES = {"softmax", "_softmax", "_safe_softmax", "sigmoid"}
_DROPOUTS = {"dropout", "dropout_", "feature_dropout", "native_dropout"}
# What moves elements about, or changes their dtype.
_MOVES = {
    "view", "reshape", "flatten", "unflatten", "_unsafe_view", "view_as", "reshape_as",
    "transpose", "swapaxes", "swapdims", "permute", "movedim", "t", "mT", "T", "unsqueeze",
    "squeeze", "expand", "contiguous", "clone", "to", "float", "half", "bfloat16", "double",
    "type", "type_as", "detach", "cpu", "cuda", "requires_grad_", "alias", "_to_copy",
}  # fmt: skip
# Those of them after which the axes are no longer those of a product.
_TURNS = {"transpose", "swapaxes", "swapdims", "permute", "movedim", "t", "mT", "T"}


def way_of(name: str, func: Callable[..., Any]) -> Way | None:
    """Return the way for a function of a name."""
    if name == "__get__":
        name = getattr(getattr(func, "__self__", None), "__name__", "")
        return _moved if name in _MOVES else None
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


# Called often, and nothing comes of them.
_SILENT = {
    "size", "dim", "numel", "stride", "is_floating_point", "is_complex", "__len__", "item",
    "tolist", "data_ptr", "is_contiguous", "layer_norm", "embedding", "__set__", "__bool__",
    "__repr__", "__format__", "element_size", "get_device", "nelement", "_is_view",
    # The result has but the shape of the argument.
    "full_like", "zeros_like", "ones_like", "empty_like", "rand_like", "randn_like",
    "randint_like", "new_zeros", "new_ones", "new_full", "new_empty", "new_tensor",
}  # fmt: skip


def _multiplied(
    watcher: Watcher, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Any:
    output = func(*args, **kwargs)
    product = read_product(getattr(func, "__name__", ""), args, kwargs, output)
    if product is None:
        return output
    turned = product.turned()
    left, right = (watcher.tags[t] for t in (product.left_source, product.right_source))
    if left is not None and right is not None and left.weights and right.weights:
        # Somebody follows attention through layers: weights again, and no value.
        watcher.tags[output] = Tag(weights=True, way=left.way)
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
        scores = Scores(made.left, made.right.mT, made.scale, product.added, kept=kept is not None)
        watcher.tags[output] = Tag(scores=scores)
    return output


def _is_parameter(tensor: Tensor) -> bool:
    """Whether a tensor is a parameter, or a view of one."""
    return isinstance(tensor, nn.Parameter) or isinstance(tensor._base, nn.Parameter)


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
    watcher.tags[product.left_source] = replace(tag, weights=True, way="rows that sum to 1")
    return True


def rows_are_distributions(tensor: Tensor) -> bool:
    """Whether nothing is negative and each row sums to one, or to zero."""
    if not tensor.is_floating_point() or tensor.numel() == 0 or tensor.is_meta:
        return False
    if is_functorch_wrapped_tensor(tensor):
        return False
    with torch.no_grad():
        first = tensor[(0,) * (tensor.ndim - 1)]
        for part in (first, tensor):
            sums = part.sum(-1, dtype=torch.float32)
            near = ((sums - 1).abs() < 1e-2) | (sums == 0)
            if not bool((near & (part.amin(-1) >= 0)).all()):
                return False
    return bool((sums != 0).any())


def _projected(
    watcher: Watcher, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Any:
    output = func(*args, **kwargs)
    weight = args[1] if len(args) > 1 else kwargs.get("weight")
    if isinstance(weight, nn.Parameter) and weight.ndim == 2 and weight.shape[0] > 1:
        watcher.tags[output] = Tag(parametric=True)
    return output


def _shared(
    watcher: Watcher, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Any:
    output = func(*args, **kwargs)
    source = args[0] if args else kwargs.get("input", kwargs.get("self"))
    if not isinstance(source, Tensor) or not isinstance(output, Tensor):
        return output
    tag = watcher.tags[source] or Tag()
    name = getattr(func, "__name__", "").split(".")[0].lstrip("_")
    sigmoid = name == "sigmoid"
    if sigmoid and tag.scores is None:
        return output  # A gate.
    if tag.parametric and _is_last(args, kwargs, source.ndim, always=sigmoid):
        return output  # A classifier or a router.
    watcher.tags[output] = Tag(
        before=tag.before, scores=tag.scores, weights=True, way="sigmoid" if sigmoid else "softmax"
    )
    return output


def _is_last(args: tuple[Any, ...], kwargs: dict[str, Any], ndim: int, *, always: bool) -> bool:
    dim = kwargs.get("dim", args[1] if len(args) > 1 else -1)
    return always or dim is None or dim % ndim == ndim - 1


def _dropped(
    watcher: Watcher, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Any:
    source = args[0] if args else kwargs.get("input")
    tag = watcher.tags[source]
    probability = float(kwargs.get("p", args[1] if len(args) > 1 else 0.5))
    training = kwargs.get("training", args[2] if len(args) > 2 else True)
    dropping = bool(training) and probability > 0
    if tag is not None and not tag.weights and tag.scores is not None and dropping:
        assert isinstance(source, Tensor)
        if rows_are_distributions(source):
            tag = replace(tag, weights=True, way="rows that sum to 1")
    clean = None if tag is None else tag.clean
    if clean is None and tag is not None and tag.weights and dropping:
        in_place = kwargs.get("inplace", args[3] if len(args) > 3 else _is_in_place(func))
        clean = source.detach().clone() if in_place else source  # type: ignore[union-attr]
    output = func(*args, **kwargs)
    result = output[0] if isinstance(output, tuple) else output
    if tag is None or (result is source and not dropping):
        return output
    if tag.weights and dropping:
        tag = replace(tag, clean=clean, dropout=probability)
    watcher.tags[result] = tag
    return output


def _moved(
    watcher: Watcher, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Any:
    output = func(*args, **kwargs)
    source = args[0] if args else None
    if not isinstance(source, Tensor) or not isinstance(output, Tensor) or output is source:
        return output
    tag = watcher.tags[source]
    before = _before(source, output)
    if tag is None:
        if before is not None:
            watcher.tags[output] = Tag(before=before)
        return output
    clean = tag.clean
    if clean is not None:
        clean = func(clean, *args[1:], **kwargs)
    scores = tag.scores
    if scores is not None and _turns(func):
        scores = replace(scores, kept=False)
    parametric = tag.parametric and output.ndim > 0 and output.shape[-1] == source.shape[-1]
    watcher.tags[output] = replace(
        tag, clean=clean, scores=scores, parametric=parametric and not _turns(func),
        before=before or (tag.before if output.shape == source.shape else None),
    )  # fmt: skip
    return output


def _turns(func: Callable[..., Any]) -> bool:
    name = getattr(func, "__name__", "")
    if name == "__get__":
        name = getattr(getattr(func, "__self__", None), "__name__", "")
    return name.split(".")[0] in _TURNS


def _before(source: Tensor, output: Tensor) -> tuple[int, ...] | None:
    """The shape of a 4-D tensor of which batch and heads, or heads and queries, were joined."""
    if source.ndim != 4 or source.shape[-1:] != output.shape[-1:] or source.numel() == 0:
        return None
    shape = tuple(source.shape)
    if output.ndim == 3 and tuple(output.shape) == (shape[0] * shape[1], *shape[2:]):
        return shape
    packs = output.ndim == 4 and shape[2] == 1 and output.shape[0] == shape[0]
    return shape if packs and output.shape[1] * output.shape[2] == shape[1] else None


def _anything(
    watcher: Watcher, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Any:
    """Element by element: what comes out of tagged tensors of the same shape is tagged."""
    place, tag = _first_tagged(watcher, args)
    output = func(*args, **kwargs)
    if tag is None or not isinstance(output, Tensor):
        return output
    source = args[place]
    if output.ndim < source.ndim or output.shape[-2:] != source.shape[-2:]:
        return output
    if not output.is_floating_point():
        return output
    if tag.weights:
        # What the model makes of its weights is what it uses.
        clean = None if tag.clean is None else _again(func, args, kwargs, place, tag.clean)
        watcher.tags[output] = replace(tag, clean=clean)
    elif tag.scores is not None:
        name = getattr(func, "__name__", "").split(".")[0]
        scores = _changed(tag.scores, name, args, kwargs, place)
        watcher.tags[output] = replace(tag, scores=scores)
    else:
        watcher.tags[output] = tag
    return output


def _overwritten(
    watcher: Watcher, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Any:
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
        scores, fill = replace(tag.scores, exact=False), _number(value)
        if fill is not None and fill <= HIDDEN_BELOW:
            seen = torch.ones(source.shape, dtype=torch.bool, device=source.device)
            seen[index] = False
            scores = _seen(tag.scores, seen)
        watcher.tags[source] = replace(tag, scores=scores)
    return output


def _again(
    func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], place: int,
    clean: Tensor,
) -> Tensor | None:  # fmt: skip
    """What a function makes of the weights before dropout, as it did of those after it."""
    given: list[Any] = list(args)
    given[place] = clean.detach().clone() if _is_in_place(func) else clean
    with torch.no_grad():
        result = func(*given, **{name: given for name, given in kwargs.items() if name != "out"})
    return result if isinstance(result, Tensor) else None


def _is_in_place(func: Callable[..., Any]) -> bool:
    name = getattr(func, "__name__", "").split(".")[0]
    dunder = name.startswith("__")
    return name.startswith("__i") and name != "__invert__" if dunder else name.endswith("_")


def _first_tagged(watcher: Watcher, args: tuple[Any, ...]) -> tuple[int, Tag | None]:
    tags = [watcher.tags[argument] for argument in args[:3]]
    for place, tag in enumerate(tags):
        if tag is not None and (tag.scores is not None or tag.weights):
            return place, tag
    return next(((place, tag) for place, tag in enumerate(tags) if tag is not None), (0, None))


def _changed(
    scores: Scores, name: str, args: tuple[Any, ...], kwargs: dict[str, Any], place: int
) -> Scores:
    """What scores are after one more step; not exact after a step that is not understood."""
    base = name.strip("_").removeprefix("i") if name.startswith("__") else name.rstrip("_")
    other = next((a for index, a in enumerate(args) if index != place), kwargs.get("other"))
    if base in ("mul", "div", "truediv", "multiply", "divide", "rmul"):
        factor = _number(other)
        if factor is None or (base in ("div", "truediv", "divide") and place == 1):
            return replace(scores, exact=False)
        factor = 1 / factor if "div" in base and factor else factor
        bias = None if scores.bias is None else scores.bias * factor
        return replace(scores, scale=scores.scale * factor, bias=bias)
    if base in ("add", "radd", "sub") and not kwargs:
        if not isinstance(other, Tensor) or other.shape[-1:] == (1,) or other.ndim == 0:
            return scores if place == 0 or base != "sub" else replace(scores, exact=False)
        if base == "sub" and place == 1:
            return replace(scores, exact=False)
        more = other if base != "sub" else -other
        bias = more if scores.bias is None else scores.bias + more
        return replace(scores, bias=bias.detach())
    if base in ("masked_fill", "where"):
        return _hidden(scores, base, args, kwargs, place)
    if base in _SHUFFLES:
        return replace(scores, exact=False, kept=False)
    return scores if base in _HARMLESS else replace(scores, exact=False)


# What moves scores to other places, though their number stays.
_SHUFFLES = {
    "getitem", "flip", "fliplr", "flipud", "roll", "rot90", "gather", "index_select", "sort",
    "take_along_dim", "narrow", "slice",
}  # fmt: skip
# What changes no softmax.
_HARMLESS = {"nan_to_num", "detach", "contiguous"}


def _hidden(
    scores: Scores, base: str, args: tuple[Any, ...], kwargs: dict[str, Any], place: int
) -> Scores:
    if base == "masked_fill":
        mask, fill = kwargs.get("mask", args[1] if len(args) > 1 else None), None
        fill = kwargs.get("value", args[2] if len(args) > 2 else None)
        seen = ~mask if isinstance(mask, Tensor) and mask.dtype == torch.bool else None
    else:
        condition, fill = args[0], args[3 - place] if len(args) > 2 else None
        bools = isinstance(condition, Tensor) and condition.dtype == torch.bool
        seen = (condition if place == 1 else ~condition) if bools else None
    if seen is None or not _hides(fill):
        return replace(scores, exact=False)
    return _seen(scores, seen)


def _seen(scores: Scores, seen: Tensor) -> Scores:
    return replace(scores, mask=seen if scores.mask is None else scores.mask & seen)


def _hides(fill: object) -> bool:
    """Whether scores that are overwritten by this get no weight."""
    if isinstance(fill, Tensor):
        return fill.numel() > 0 and not fill.is_meta and bool((fill <= HIDDEN_BELOW).all())
    value = _number(fill)
    return value is not None and value <= HIDDEN_BELOW


def _number(value: object) -> float | None:
    """A Python number, or a tensor of one that is on the CPU."""
    if isinstance(value, Number) and not isinstance(value, complex):
        return float(value)  # type: ignore[arg-type]
    if isinstance(value, Tensor) and value.numel() == 1 and value.device.type == "cpu":
        return float(value.detach())
    return None
