"""Attention written out: a softmax, or what does its work, whose result multiplies a value.

Each result of a function gets a tag of where it comes from (see `tags`). When tagged weights are
multiplied by something that is not a parameter, that is attention; the softmax of a classifier
multiplies nothing, and that of a router runs over an axis of a parameter.

Each source here is called before the function, and what it returns after it, with the result.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from numbers import Number
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from pytest_attnheat.capture.sources.numbers import rows_are_distributions, sample_of, seen_in
from pytest_attnheat.capture.sources.products import Product, read_product
from pytest_attnheat.capture.sources.reading import tell
from pytest_attnheat.capture.tags import Origin, Scores, Tag, coarser
from pytest_attnheat.capture.watching import After, Args, Function, Keywords, Source, Watcher
from pytest_attnheat.capture.watching import argument as given

_PRODUCTS = {"matmul", "bmm", "baddbmm", "einsum", "mm"}
_SHARES = {"softmax", "_softmax", "_safe_softmax", "sigmoid"}
_DROPOUTS = {"dropout", "feature_dropout", "native_dropout"}
# What leaves each element in its place.
_COPIES = {
    "contiguous", "clone", "to", "float", "half", "bfloat16", "double", "type", "type_as", "detach",
    "cpu", "cuda", "data", "alias", "_to_copy",
}  # fmt: skip
_TURNS = {"transpose", "swapaxes", "swapdims", "permute", "movedim", "moveaxis", "t", "mT", "T"}
# What moves elements about, by no other number than those of their places.
_MOVES = _TURNS | {
    "view", "reshape", "flatten", "unflatten", "_unsafe_view", "view_as", "reshape_as",
    "unsqueeze", "squeeze", "expand", "expand_as", "broadcast_to", "getitem", "narrow", "select",
    "slice", "index_select", "flip", "fliplr", "flipud", "roll", "split", "chunk", "unbind",
    "tensor_split", "repeat", "repeat_interleave", "gather", "take_along_dim", "diagonal", "unfold",
    "rot90", "tile",
}  # fmt: skip
_PARTS = {"getitem", "narrow", "select", "slice", "index_select"}
# Pairs of numbers: of queries and keys that are rotated.
_PAIRS = {"view_as_complex", "view_as_real"}
_JOINS = {"cat", "concat", "concatenate", "stack"}
FACTORS = ("mul", "div", "multiply", "divide")
# After these, scores are weights that lack but their sum.
_EXPONENTIALS = {"exp", "exp2", "log_softmax"}


def source_of(name: str, func: Function) -> Source | None:
    """Return the source for a function of a name."""
    if name == "__get__":
        name = getattr(getattr(func, "__self__", None), "__name__", "")
        if name not in _TURNS | {"data"}:
            return None
    base = base_of(name)
    for names, source in _SOURCES:
        if base in names:
            return partial(source, base)
    return None if base in _SILENT else partial(_anything, base)


def base_of(name: str) -> str:
    """The name of a function without what marks operators, what works in place and overloads."""
    name = name.split(".")[0]
    if name.startswith("__"):
        bare = name.strip("_")
        bare = bare[1:] if bare[1:] in _OPERATORS else bare  # on the right, or in place
        return _OPERATORS.get(bare, name)
    return name.rstrip("_")


# Operators, and the functions that they are.
_OPERATORS = {"truediv": "div"} | {
    name: name for name in ("add", "sub", "mul", "pow", "matmul", "neg", "getitem", "setitem")
}
# Called often, and nothing comes of them.
_SILENT = {
    "size", "dim", "numel", "stride", "is_floating_point", "is_complex", "item", "tolist",
    "data_ptr", "is_contiguous", "layer_norm", "embedding", "__set__", "__bool__", "__len__",
    "__repr__", "__format__", "__float__", "__int__", "__index__", "element_size", "get_device",
    "nelement", "_is_view",
    "ndim", "requires_grad_", "eq", "ne", "lt", "le", "gt", "ge", "isnan", "isinf", "arange",
    # The result has but the shape of the argument.
    "full_like", "zeros_like", "ones_like", "empty_like", "rand_like", "randn_like",
    "randint_like", "new_zeros", "new_ones", "new_full", "new_empty", "new_tensor",
}  # fmt: skip


# Products.


def _multiplied(
    base: str, watcher: Watcher, func: Function, args: Args, kwargs: Keywords
) -> After | None:
    return lambda output: _product(watcher, read_product(base, args, kwargs, output), output)


def _product(watcher: Watcher, product: Product | None, output: Tensor) -> None:
    """Tag the result of a product, or tell of attention."""
    if product is None:
        return
    turned = product.turned()
    left, right = (watcher.tags[t] for t in (product.left_source, product.right_source))
    if left is not None and right is not None and left.weights and right.weights:
        # Somebody follows attention through layers: weights again, and no value.
        watcher.tags[output] = Tag(weights=True, source=left.source)
        watcher.found(left.softmaxes + right.softmaxes)
        return
    mixed = left if right is None or not right.weights else right
    source = product.left_source if mixed is left else product.right_source
    if mixed is not None and mixed.weights and _mixes_heads(product, source, output):
        watcher.tags[output] = Tag(weights=True, source=mixed.source, softmaxes=mixed.softmaxes)
        return
    for candidate in (product, turned):
        if _is_attention(watcher, candidate):
            tell(watcher, candidate)
            return
    scores = _scores(watcher, product)
    if not _is_parameter(product.right_source):
        watcher.tags[output] = Tag(scores=scores)
    elif scores.columns.shape[-1] > 1:
        watcher.tags[output] = Tag(parametric=True)


def _scores(watcher: Watcher, product: Product) -> Scores:
    """What goes along with the result of a product, in the layout of that."""
    factors = watcher.tags.factor(product.left_source), watcher.tags.factor(product.right_source)
    shape, zero = product.output.shape, product.output.new_zeros([1] * product.output.ndim)
    if product.added is not None:
        zero = product.added.detach().expand(shape)
    origin = Origin(product.left.detach(), product.right.mT.detach(), factors)
    (scores,) = Scores.of(origin, zero, product.output.dtype).moved(shape, product.back)
    return replace(scores, steps=() if product.scale == 1 else (product.scale,))


def _is_parameter(tensor: Tensor) -> bool:
    """Whether a tensor is a parameter, or a view of one."""
    return isinstance(tensor, nn.Parameter) or isinstance(tensor._base, nn.Parameter)


def _mixes_heads(product: Product, weights: Tensor, output: Tensor) -> bool:
    """Whether weights are multiplied by a parameter, heads by heads."""
    other = product.right_source if weights is product.left_source else product.left_source
    return _is_parameter(other) and output.shape == weights.shape and weights.ndim > 2


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
    watcher.tags[product.left_source] = _made_weights(tag, product.left_source)
    return True


def _made_weights(tag: Tag, weights: Tensor) -> Tag:
    """The tag of scores that became weights step by step."""
    assert tag.scores is not None
    sample = sample_of(tag.scores, weights.detach().log(), -1)
    return replace(tag, weights=True, source="rows that sum to 1", sample=sample)


def _projected(
    base: str, watcher: Watcher, func: Function, args: Args, kwargs: Keywords
) -> After | None:
    weight, source = given(args, kwargs, 1, "weight"), given(args, kwargs, 0, "input")
    tag = watcher.tags[source]

    def after(output: Tensor) -> None:
        if tag is not None and tag.weights and tag.turned and output.shape == source.shape:
            watcher.tags[output] = replace(tag, scores=None, clean=None)  # Heads are mixed.
        elif isinstance(weight, nn.Parameter) and weight.ndim == 2 and weight.shape[0] > 1:
            watcher.tags[output] = Tag(parametric=True)

    return after


# Weights.


def _shared(
    base: str, watcher: Watcher, func: Function, args: Args, kwargs: Keywords
) -> After | None:
    source = given(args, kwargs, 0, "input", kwargs.get("self"))
    if not isinstance(source, Tensor):
        return None
    tag = watcher.tags[source] or Tag()
    sigmoid = base == "sigmoid"
    dim = source.ndim - 1 if sigmoid else given(args, kwargs, 1, "dim")
    dim = source.ndim - 1 if dim is None else dim % max(source.ndim, 1)
    if sigmoid and tag.scores is None:
        return None  # A gate.
    if tag.parametric and dim == source.ndim - 1:
        return None  # A classifier or a router.
    scores = tag.scores or seen_in(source.detach(), dim)
    sample = None if scores is None else sample_of(scores, source.detach(), dim)
    # Logits of pairs, as of images and texts, have no batch axis: they are not waited for.
    waits = tag.scores is not None and not tag.weights and source.ndim > 2

    def after(output: Tensor) -> None:
        watcher.tags[output] = Tag(
            before=tag.before, scores=scores, weights=True, dtype=output.dtype, sample=sample,
            source="sigmoid" if sigmoid else "softmax",
            softmaxes=watcher.expect() if waits else tag.softmaxes,
        )  # fmt: skip

    return after


def _dropped(
    base: str, watcher: Watcher, func: Function, args: Args, kwargs: Keywords
) -> After | None:
    source = given(args, kwargs, 0, "input")
    tag = watcher.tags[source]
    if tag is None:
        return None
    probability = float(given(args, kwargs, 1, "p", 0.5))
    dropping = bool(given(args, kwargs, 2, "training", True)) and probability > 0
    if not tag.weights and tag.scores is not None and dropping and rows_are_distributions(source):
        tag = _made_weights(tag, source)
    if tag.weights and dropping:
        in_place = given(args, kwargs, 3, "inplace", _is_in_place(func))
        clean = source.detach().clone() if in_place else source.detach()
        tag = replace(tag, clean=clean if tag.clean is None else tag.clean, dropout=probability)

    def after(output: Any) -> None:
        result = output[0] if isinstance(output, tuple) else output
        if result is not source or dropping:
            watcher.tags[result] = tag

    return after


# What moves tensors, or changes them.


def _copied(
    base: str, watcher: Watcher, func: Function, args: Args, kwargs: Keywords
) -> After | None:
    tag = watcher.tags[args[0]] if args else None
    if tag is None:
        watcher.tags.use(*args[:1])
        return None

    def after(output: Tensor) -> None:
        if output is not args[0] and output.is_floating_point():
            clean = None if tag.clean is None else func(tag.clean, *args[1:], **kwargs)
            scores = None if tag.scores is None else tag.scores.cast(output)
            watcher.tags[output] = replace(tag, clean=clean, scores=scores)

    return after


def _moved(
    base: str, watcher: Watcher, func: Function, args: Args, kwargs: Keywords
) -> After | None:
    source = args[0] if args else None
    tag = watcher.tags[source]
    if tag is None:
        watcher.tags.use(source)
        if not isinstance(source, Tensor) or source.ndim != 4:
            return None
    assert isinstance(source, Tensor)
    shape = source.shape  # A function in place changes it.
    turns = base in _TURNS
    # What repeats cannot be viewed in every shape in which its whole can.
    moving = Tensor.reshape if base in ("view", "_unsafe_view") else _out_of_place(func, base)

    def move(tensor: Tensor) -> Any:
        others = args[1:], kwargs
        if tensor.device != source.device:  # An index is needed where the tensor is.
            others = tree_map_only(Tensor, lambda one: one.to(tensor.device), others)
        return moving(tensor, *others[0], **others[1])

    def after(output: Any) -> None:
        results = [output] if isinstance(output, Tensor) else list(output)
        if tag is None:
            before = None if turns or len(results) != 1 else _before(shape, results[0])
            if before is not None:
                watcher.tags[results[0]] = Tag(before=before)
            return
        of_each = [tag.scores] * len(results)
        if tag.scores is not None:
            of_each = list(tag.scores.moved(shape, move))
        cleans = [None] * len(results) if tag.clean is None else move(tag.clean)
        cleans = [cleans] if isinstance(cleans, Tensor) else cleans
        for made, scores, clean in zip(results, of_each, cleans, strict=True):
            before = None if turns else _before(shape, made)
            parametric = tag.parametric and made.ndim > 0 and made.shape[-1] == shape[-1]
            watcher.tags[made] = replace(
                tag, scores=scores, clean=clean, parametric=parametric and not turns,
                turned=tag.turned or (tag.weights and turns),
                before=before or (tag.before if made.shape == shape else None),
                sink=_sink(tag, source, made) if base in _PARTS else tag.sink,
            )  # fmt: skip

    return after


def _before(shape: torch.Size, output: Tensor) -> tuple[int, ...] | None:
    """The shape of a 4-D tensor of which batch and heads, or heads and queries, were joined."""
    if len(shape) != 4 or shape[-1:] != output.shape[-1:] or 0 in shape:
        return None
    if output.ndim == 3 and tuple(output.shape) == (shape[0] * shape[1], *shape[2:]):
        return tuple(shape)
    packs = output.ndim == 4 and shape[2] == 1 and output.shape[0] == shape[0]
    return tuple(shape) if packs and output.shape[1] * output.shape[2] == shape[1] else None


def _sink(tag: Tag, source: Tensor, made: Tensor) -> tuple[Tensor, Tensor] | None:
    """The weights and scores of a last column that has no key, of which the others are left."""
    scores = tag.scores
    if not tag.weights or scores is None or tag.sink is not None:
        return tag.sink
    same = made.data_ptr() == source.data_ptr() and made.stride() == source.stride()
    if not same or made.shape != (*source.shape[:-1], source.shape[-1] - 1):
        return None
    if bool((scores.columns[..., -1:] >= 0).any()):
        return None
    whole = source if tag.clean is None else tag.clean
    return whole[..., -1:].detach(), scores.zero[..., -1:]


def _paired(
    base: str, watcher: Watcher, func: Function, args: Args, kwargs: Keywords
) -> After | None:
    factor = watcher.tags.factor(args[0]) if args else 1.0
    if factor == 1:
        return None
    return lambda output: watcher.tags.__setitem__(output, Tag(factor=factor))


def _anything(
    base: str, watcher: Watcher, func: Function, args: Args, kwargs: Keywords
) -> After | None:
    """Element by element: what comes out of tagged tensors of the same shape is tagged."""
    watcher.tags.use(*args[:3])
    tags = [watcher.tags[one] for one in (*args[:3], *kwargs.values())]
    number = factor_of(base, args, kwargs)
    if number is None and not any(tags):
        return None
    place = next((i for i, t in enumerate(tags) if t and (t.weights or t.scores)), None)
    if place is None:
        return lambda output: _follow(watcher, base, number, tags, args, output)
    tag, every = tags[place], [*args[:3], *kwargs.values()]
    assert tag is not None
    source, shape = every[place], every[place].shape

    def after(output: Any) -> None:
        if not isinstance(output, Tensor) or not output.is_floating_point():
            return
        same = output.ndim >= len(shape) and output.shape[-2:] == shape[-2:]
        if tag.weights and same:
            watcher.tags[output] = _used(tag, func, base, args, kwargs, source, output)
        elif not tag.weights and tag.scores is not None and _is_pointwise(base):
            changed = _changed(tag.scores, watcher, func, base, args, kwargs, number, output)
            watcher.tags[output] = replace(tag, scores=changed, parametric=False)

    return after


def _used(
    tag: Tag, func: Function, base: str, args: Args, kwargs: Keywords, source: Tensor,
    output: Tensor,
) -> Tag:  # fmt: skip
    """What the model makes of its weights is what it uses; and of those before dropout, too."""
    clean = tag.clean
    if clean is not None:
        of_clean = _exchanged(args, kwargs, lambda one: clean if one is source else one)
        clean = _out_of_place(func, base)(*of_clean[0], **of_clean[1])
    scores = tag.scores if output.shape[:-2] == source.shape[:-2] else None
    return replace(tag, clean=clean, scores=scores, sink=None)


def _changed(
    scores: Scores, watcher: Watcher, func: Function, base: str, args: Args, kwargs: Keywords,
    number: float | None, output: Tensor,
) -> Scores:  # fmt: skip
    """What goes along with scores after one more function, element by element."""
    if scores.done or base in _EXPONENTIALS:
        return replace(scores, done=True)

    def if_zero(one: Any) -> Any:
        tag = watcher.tags[one] if one is not output else None
        if tag is None or tag.scores is None or tag.scores.origin is not scores.origin:
            return scores.zero if one is output else one
        return tag.scores.zero

    zero, softcap = scores.zero, scores.softcap
    if not _is_shift(base, scores, args, output):
        of_zero = _exchanged(args, kwargs, if_zero)
        zero = _out_of_place(func, base)(*of_zero[0], **of_zero[1])
        zero = zero[(None,) * (output.ndim - zero.ndim)]
    if number is not None:
        softcap = None if softcap is None else abs(softcap * number)
    elif base == "tanh" and softcap is None:
        softcap = 1.0
    return replace(
        scores,
        zero=zero.detach(),
        steps=scores.steps if number is None else (*scores.steps, number),
        softcap=softcap,
        went=(*scores.went, base),
        coarsest=coarser(scores.coarsest, output.dtype),
    )


def _is_shift(base: str, scores: Scores, args: Args, output: Tensor) -> bool:
    """Whether something was added to whole rows that a sink has joined: no softmax feels it."""
    if base not in ("add", "sub") or output.ndim == 0:
        return False
    whole = any(isinstance(one, Tensor) and one.shape[-1:] == (1,) for one in args[:2])
    return whole and bool((scores.columns[..., -1:] < 0).all())


def _exchanged(
    args: Args, kwargs: Keywords, change: Callable[[Any], Any]
) -> tuple[list[Any], Keywords]:
    """Arguments with some of them changed; `out` is left out."""
    return [change(one) for one in args], {
        name: change(one) for name, one in kwargs.items() if name != "out"
    }


def _out_of_place(func: Function, base: str) -> Function:
    """A function, or its like that does not work in place."""
    return getattr(Tensor, base) if _is_in_place(func) and hasattr(Tensor, base) else func


def _is_in_place(func: Function) -> bool:
    name = str(getattr(func, "__name__", "")).split(".")[0]
    if name.startswith("__"):
        return name.startswith("__i") and name != "__invert__"
    return name.endswith("_")


def _is_pointwise(base: str) -> bool:
    packet = getattr(torch.ops.aten, base, None)
    if packet is None:
        return False
    return base in _EXPONENTIALS or any(
        torch.Tag.pointwise in getattr(packet, one).tags for one in packet.overloads()
    )


# A part or a turn of a tensor, in which each number is one that it had, or its negative.
_LINEAR = _MOVES | {"neg"}


def _follow(
    watcher: Watcher, base: str, number: float | None, tags: list[Tag | None], args: Args,
    output: Any,
) -> None:  # fmt: skip
    """Keep track of the number that queries or keys were multiplied by, as they are rotated."""
    factors = [1.0 if tag is None else tag.factor for tag in tags]
    factor = math.prod(factors)
    if number is not None:
        factor *= number
    elif base in ("add", "sub"):
        factor = factors[0] if len(set(factors)) == 1 else math.nan
    elif factor != 1 and base not in _LINEAR and base not in FACTORS:
        factor = math.nan
    parametric = any(tag is not None and tag.parametric for tag in tags)
    for made in output if isinstance(output, tuple | list) else (output,):
        if not isinstance(made, Tensor) or not made.is_floating_point():
            continue
        like = any(
            isinstance(one, Tensor) and one.shape[-2:] == made.shape[-2:] for one in args[:3]
        )
        if factor != 1 or (parametric and like):
            watcher.tags[made] = Tag(factor=factor, parametric=parametric and like)


def factor_of(base: str, args: Args, kwargs: Keywords) -> float | None:
    """The number that a function multiplies its tensor by; None if it does something else."""
    if base not in FACTORS or len(args) + len(kwargs) != 2:
        return None
    first, second = (*args, *kwargs.values())[:2]
    number = number_of(second)
    if number is None and base in ("mul", "multiply"):
        number = number_of(first)
    if number is None or number == 0 or not math.isfinite(number):
        return None
    return 1 / number if base in ("div", "divide") else number


def number_of(value: object) -> float | None:
    """A Python number, or a tensor of one that is on the CPU."""
    if isinstance(value, Number) and not isinstance(value, complex):
        return float(value)  # type: ignore[arg-type]
    if isinstance(value, Tensor) and value.numel() == 1 and value.device.type == "cpu":
        return float(value.detach())
    return None


def _joined(
    base: str, watcher: Watcher, func: Function, args: Args, kwargs: Keywords
) -> After | None:
    """`stack` and `cat`: weights of several heads side by side are weights."""
    parts = given(args, kwargs, 0, "tensors", ())
    watcher.tags.use(*parts)
    tags = [watcher.tags[one] for one in parts]
    first = next((tag for tag in tags if tag is not None and (tag.scores or tag.weights)), None)
    if not any(tags):
        return None

    def after(output: Tensor) -> None:
        if first is None:
            factors = {1.0 if tag is None else tag.factor for tag in tags}
            factor = factors.pop() if len(factors) == 1 else math.nan
            watcher.tags[output] = Tag(factor=factor)
        elif all(tag is not None and tag.weights for tag in tags):
            cleans = [one if tag is None or tag.clean is None else tag.clean
                      for one, tag in zip(parts, tags, strict=True)]  # fmt: skip
            softmaxes = tuple(number for tag in tags if tag is not None for number in tag.softmaxes)
            watcher.tags[output] = Tag(
                weights=True, source=first.source, dropout=first.dropout, softmaxes=softmaxes,
                clean=func(cleans, *args[1:], **kwargs) if first.dropout else None,
            )  # fmt: skip
        elif first.scores is not None and not first.weights:
            dim = given(args, kwargs, 1, "dim", 0)
            scores = _beside(first.scores, parts, tags, lambda some: func(some, dim=dim))
            watcher.tags[output] = replace(first, scores=scores, parametric=False)

    return after


def _beside(
    scores: Scores, parts: Any, tags: list[Tag | None], join: Callable[[list[Tensor]], Tensor]
) -> Scores:
    """What goes along with scores to which something else was joined: sinks, for instance."""
    every = []
    for part, tag in zip(parts, tags, strict=True):
        own = tag.scores if tag is not None else None
        if own is not None and own.origin is scores.origin:
            every.append([t.expand(part.shape) for t in (own.rows, own.columns, own.zero)])
            continue
        # -1 for what is no product, -2 for another one.
        nothing = scores.rows.new_full((), -1 if own is None else -2).expand(part.shape)
        every.append(
            [nothing, nothing, part.detach() if own is None else own.zero.expand(part.shape)]
        )
    rows, columns, zero = (join(list(of)) for of in zip(*every, strict=True))
    return replace(scores, rows=rows, columns=columns, zero=zero.to(scores.zero.dtype))


def _overwritten(
    base: str, watcher: Watcher, func: Function, args: Args, kwargs: Keywords
) -> After | None:
    """`tensor[index] = value`."""
    source, index, value = args
    tag = watcher.tags[source]
    if tag is None:
        return None

    def after(output: Any) -> None:
        clean, scores = tag.clean, tag.scores
        if clean is not None:
            clean = clean.clone()
            clean[index] = value
        elif scores is not None and not tag.weights:
            zero = scores.zero.expand(source.shape).clone()
            zero[index] = value
            scores = replace(scores, zero=zero, went=(*scores.went, base))
        watcher.tags[source] = replace(tag, clean=clean, scores=scores)

    return after


_SOURCES: tuple[tuple[set[str], Callable[..., After | None]], ...] = (
    (_PRODUCTS, _multiplied),
    ({"linear"}, _projected),
    (_SHARES, _shared),
    (_DROPOUTS, _dropped),
    (_COPIES, _copied),
    (_MOVES, _moved),
    (_PAIRS, _paired),
    (_JOINS, _joined),
    ({"setitem"}, _overwritten),
)
