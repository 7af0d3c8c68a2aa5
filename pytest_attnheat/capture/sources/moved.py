"""What moves and changes tensors: what goes along with them is moved and changed by the same."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cache, partial
from numbers import Number
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

from ..shaping import in_windows, joined, still_joined
from ..tags import Scores, Tag, coarser, mixed
from ..watching import After, Call, Function
from .reading import attended_of, mark_blocks, tell_divided

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
_FACTORS = ("mul", "div", "multiply", "divide")
# Of groups that an index tells.
_SUMS_OF_GROUPS = {"index_add", "scatter_add", "scatter_reduce", "index_put"}
# After these, scores are weights that lack but their sum.
_EXPONENTIALS = {"exp", "exp2", "log_softmax"}


# Of the properties of tensors, those that matter.
PROPERTIES = _TURNS | {"data"}


def base_of(name: str) -> str:
    """The name of a function without its module and what marks operators, and what is in place."""
    name = name.split(".")[0].removeprefix("special_")
    if name.startswith("__"):
        bare = name.strip("_")
        bare = bare[1:] if bare[1:] in _OPERATORS else bare  # on the right, or in place
        return _OPERATORS.get(bare, name)
    return name.rstrip("_")


# Operators, and the functions that they are.
_OPERATORS = {"truediv": "div"} | {
    name: name for name in ("add", "sub", "mul", "pow", "matmul", "neg", "getitem", "setitem")
}
_NOTHING = Tag()
# Called often, and nothing comes of them.
SILENT = {
    "size", "dim", "numel", "stride", "is_floating_point", "is_complex", "item", "tolist",
    "data_ptr", "is_contiguous", "layer_norm", "embedding", "__set__", "__bool__", "__len__",
    "__repr__", "__format__", "__float__", "__int__", "__index__", "element_size", "get_device",
    "nelement", "_is_view",
    "ndim", "requires_grad_", "eq", "ne", "lt", "le", "gt", "ge", "isnan", "isinf", "arange",
    # The result has but the shape of the argument.
    "full_like", "zeros_like", "ones_like", "empty_like", "rand_like", "randn_like",
    "randint_like", "new_zeros", "new_ones", "new_full", "new_empty", "new_tensor",
}  # fmt: skip


def _copied(base: str, call: Call) -> After | None:
    """The same numbers in another dtype, on another device or in other memory."""
    tags, source = call.watcher.tags, call.given(0, "input")
    tag = tags[source]
    if tag is None:
        tags.use(source)
        return None

    def after(output: Tensor) -> None:
        if output is not source and output.is_floating_point():
            clean = None if tag.clean is None else tag.clean.to(output.device, output.dtype)
            scores = None if tag.scores is None else tag.scores.cast(output)
            tags[output] = replace(tag, clean=clean, scores=scores)

    return after


def _moved(base: str, call: Call) -> After | None:
    tags, source = call.watcher.tags, call.given(0, "input")
    tag = tags[source]
    if tag is None:
        tags.use(source)
        if not isinstance(source, Tensor) or not 3 <= source.ndim <= 5:
            return None
        if base in _TURNS:
            return None if source.ndim != 4 else partial(_turned, call)
    shape, turns = source.shape, base in _TURNS  # A function in place changes the shape.
    # What repeats cannot be viewed in every shape in which its whole can.
    moving = Tensor.reshape if base in ("view", "_unsafe_view") else _out_of_place(call.func, base)

    def move(tensor: Tensor) -> Any:
        others = call.args[1:], call.kwargs
        if tensor.device != source.device:  # An index is needed where the tensor is.
            others = tree_map_only(Tensor, lambda one: one.to(tensor.device), others)
        return moving(tensor, *others[0], **others[1])

    def after(output: Any) -> None:
        results = [output] if isinstance(output, Tensor) else list(output)
        own = tag or _NOTHING
        none = [None] * len(results)
        of_each = none if own.scores is None else own.scores.moved(shape, move)
        cleans = none if own.clean is None else move(own.clean)
        cleans = [cleans] if isinstance(cleans, Tensor) else cleans
        for made, scores, clean in zip(results, of_each, cleans, strict=True):
            alone = not turns and len(results) == 1
            before = joined(shape, made) if alone else None
            windows = alone and len(shape) >= 3 and in_windows(shape, made)
            if tag is None and before is None and not windows:
                continue
            last = not turns and made.shape[-1:] == shape[-1:]
            tags[made] = replace(
                own, scores=scores, clean=clean, parametric=own.parametric and last,
                turned=own.turned or (own.weights and turns),
                before=before or still_joined(own.before, shape, made),
                windows=windows or (own.windows and made.shape[-1:] == shape[-1:]),
                **(_cut(own, source, made) if base in _PARTS and own.weights else {}),
            )  # fmt: skip

    return after


def _turned(call: Call, output: Any) -> None:
    """Remember that the first axis, of the batch in most code, was put behind another."""
    first, second = output.stride()[:2]
    if 0 < first < second and 1 not in output.shape[:2]:
        call.watcher.tags[output] = Tag(windows=True)


def _cut(tag: Tag, source: Tensor, made: Tensor) -> dict[str, Any]:
    """What is known of weights of some of the keys: without their sink, or one of several parts."""
    scores, keys = tag.scores, source.shape[-1]
    same = made.stride() == source.stride() and made.shape[:-1] == source.shape[:-1]
    if scores is None or not same or made.shape[-1] == keys:
        return {}
    start = (made.storage_offset() - source.storage_offset()) // max(source.stride(-1), 1)
    last = scores.columns[..., -1:]
    if start == 0 and made.shape[-1] == keys - 1 and bool((last < 0).all()):
        whole = source if tag.clean is None else tag.clean
        return {"sink": (whole[..., -1:].detach(), scores.zero[..., -1:])}
    return {"part": (start, keys)}


def _paired(base: str, call: Call) -> After | None:
    tags = call.watcher.tags
    factor = tags.factor(call.given(0, "input"))
    return None if factor == 1 else lambda output: tags.put(output, Tag(factor=factor))


def anything(base: str, call: Call) -> After | None:
    """Element by element: what comes out of tagged tensors of the same shape is tagged."""
    most = 4 if base in _SUMS_OF_GROUPS else 3
    tags, every = call.watcher.tags, [*call.args[:most], *call.kwargs.values()]
    tags.use(*every)
    known = [tags[one] for one in every]
    grouped = [tag.grouped if tag is not None else "" for tag in known]
    plain = not any(tag is not None and (tag.scores or tag.weights) for tag in known)
    if any(grouped) or (base == "exp" and plain):
        if (now := _of_groups(call, base, grouped)) != "":
            return lambda output: tags.put(output, Tag(grouped=now))
        known = [None if tag and tag.grouped and tag.scores is None else tag for tag in known]
    number = _factor_of(base, every)
    if number is None and not any(known):
        return (lambda output: _outer(call, every, output)) if base in _FACTORS[:2] else None
    place = next((i for i, t in enumerate(known) if t and (t.weights or t.scores)), None)
    if place is None:
        return lambda output: _follow(call, base, number, known, every, output)
    tag, source = known[place] or Tag(), every[place]
    shape = source.shape
    others = (t for t, one in zip(known, every, strict=True) if one is not source and t)
    several = any(t.weights and t.scores is not None for t in others)

    def after(output: Any) -> None:
        if not isinstance(output, Tensor) or not output.is_floating_point():
            return
        if tag.unnormalised is not None and base in ("div", "divide"):
            tell_divided(call.watcher, tag.unnormalised, every[1])
        same = output.ndim >= len(shape) and output.shape[-2:] == shape[-2:]
        if tag.weights and same:
            clean = tag.clean
            if clean is not None:
                clean = _repeated(call, base, lambda one: clean if one is source else one)
            grown = output.shape[:-2] != shape[:-2]
            if several:  # as in the difference of two softmaxes
                call.watcher.tags[output] = mixed(tag)
                return
            of = tuple(one for one in every if isinstance(one, Tensor)) if grown else ()
            tags[output] = replace(
                tag, clean=clean, scores=None if grown else tag.scores, sink=None,
                operands=(of[0], of[1]) if len(of) == 2 else None,
            )  # fmt: skip
        elif tag.weights or not _is_pointwise(base):
            _outer(call, every, output)
        elif tag.scores is not None:
            scores = _changed(tag.scores, call, base, number, output)
            tags[output] = replace(tag, scores=scores, parametric=False)

    return after


def _of_groups(call: Call, base: str, grouped: list[str]) -> str:
    """What comes next in a softmax over groups of elements, as the edges of a graph."""
    if base in ("div", "divide") and grouped[:2] == ["exp", "sums"]:
        why = "its rows are groups of elements, as the edges of a graph are, and no matrix"
        call.watcher.miss("exp, divided by its sums", why)
    if base in ("add", "clamp", "clamp_min"):
        return grouped[0] if grouped[0] == "sums" else ""
    return "exp" if base == "exp" else "sums" if base in _SUMS_OF_GROUPS else ""


def _outer(call: Call, every: list[Any], output: Any) -> None:
    """Remember two tensors that broadcast in their product: its sum may be one of matrices."""
    if len(every) != 2 or not all(isinstance(one, Tensor) and one.ndim for one in every):
        return
    a, b = every
    grown = [one.shape != output.shape for one in every]
    tags = [call.watcher.tags[one] for one in every]
    if all(grown) or (any(grown) and any(tag is not None and tag.weights for tag in tags)):
        call.watcher.tags[output] = Tag(operands=(a, b))


def _changed(scores: Scores, call: Call, base: str, number: float | None, output: Tensor) -> Scores:
    """What goes along with scores after one more function, element by element."""
    if scores.done or base in _EXPONENTIALS:
        return replace(scores, done=True)

    def if_zero(one: Any) -> Any:
        tag = call.watcher.tags[one] if one is not output else None
        if tag is None or tag.scores is None or tag.scores.origin is not scores.origin:
            return scores.zero if one is output else one
        return tag.scores.zero

    zero, softcap = scores.zero, scores.softcap
    if not _is_shift(base, scores, call, output):
        zero = _repeated(call, base, if_zero)
        zero = zero[(None,) * (output.ndim - zero.ndim)]
    if number is not None:
        softcap = None if softcap is None else abs(softcap * number)
    elif base == "tanh" and softcap is None:
        softcap = 1.0
    return replace(
        scores, zero=zero, steps=scores.steps if number is None else (*scores.steps, number),
        softcap=softcap, went=(*scores.went, base), coarsest=coarser(scores.coarsest, output.dtype),
    )  # fmt: skip


def _is_shift(base: str, scores: Scores, call: Call, output: Tensor) -> bool:
    """Whether something was added to whole rows that a sink has joined: no softmax feels it."""
    if base not in ("add", "sub") or output.ndim == 0:
        return False
    whole = any(isinstance(one, Tensor) and one.shape[-1:] == (1,) for one in call.args[:2])
    return whole and bool((scores.columns[..., -1:] < 0).all())


def _repeated(call: Call, base: str, change: Callable[[Any], Any]) -> Any:
    """What the function makes of changed arguments, in memory of its own."""
    kwargs = {name: change(one) for name, one in call.kwargs.items() if name != "out"}
    return _out_of_place(call.func, base)(*map(change, call.args), **kwargs)


def _out_of_place(func: Function, base: str) -> Function:
    """A function, or its like that does not work in place."""
    return getattr(Tensor, base) if is_in_place(func) and hasattr(Tensor, base) else func


def is_in_place(func: Function) -> bool:
    """Whether a function changes its first argument, as far as its name tells."""
    name = str(getattr(func, "__name__", "")).split(".")[0]
    return name.startswith("__i") if name.startswith("__") else name.endswith("_")


@cache
def _is_pointwise(base: str) -> bool:
    packet = getattr(torch.ops.aten, base, None)
    of = () if packet is None else (getattr(packet, name) for name in packet.overloads())
    return base in _EXPONENTIALS or any(torch.Tag.pointwise in overload.tags for overload in of)


def _follow(
    call: Call, base: str, number: float | None, known: list[Tag | None], every: list[Any],
    output: Any,
) -> None:  # fmt: skip
    """Keep track of what queries or keys were multiplied by, and of their axes, as they rotate."""
    if base == "add" and len(known) == 2 and all(map(attended_of, known)):  # Parts of an attention.
        call.watcher.tags[output] = known[1] or Tag()
        return
    factors = [1.0 if tag is None else tag.factor for tag in known]
    factor = math.prod(factors)
    if number is not None:
        factor *= number
    elif base in ("add", "sub"):
        factor = factors[0] if len(set(factors)) == 1 else math.nan
    elif factor != 1 and base != "neg" and base not in _FACTORS:
        factor = math.nan
    parametric = any(tag is not None and tag.parametric for tag in known)
    for made in output if isinstance(output, tuple | list) else (output,):
        if isinstance(made, Tensor) and made.is_floating_point():
            shapes = [one.shape[-2:] for one in every if isinstance(one, Tensor)]
            classes = parametric and made.shape[-2:] in shapes
            axes = _axes(known, every, made)
            if factor != 1 or classes or axes.before or axes.windows:
                call.watcher.tags[made] = Tag(
                    factor=factor, parametric=classes, before=axes.before, windows=axes.windows
                )


def _axes(known: list[Tag | None], every: Sequence[Any], made: Tensor) -> Tag:
    """The tag of what has the axes of the result but for its width, if its axes are known."""
    both = zip(known, every, strict=True)
    named = ((tag, one) for tag, one in both if tag is not None and (tag.before or tag.windows))
    return next((tag for tag, one in named if one.shape[:-1] == made.shape[:-1]), Tag())


def _factor_of(base: str, every: list[Any]) -> float | None:
    """The number that a function multiplies its tensor by; None if it does something else."""
    if base not in _FACTORS or len(every) != 2:
        return None
    number = _number_of(every[1])
    if number is None and base in ("mul", "multiply"):
        number = _number_of(every[0])
    if number is None or number == 0 or not math.isfinite(number):
        return None
    return 1 / number if base in ("div", "divide") else number


def _number_of(value: object) -> float | None:
    """A Python number, or a tensor of one that is on the CPU."""
    if isinstance(value, Number) and not isinstance(value, complex):
        return float(value)  # type: ignore[arg-type]
    if isinstance(value, Tensor) and value.numel() == 1 and value.device.type == "cpu":
        return float(value.detach())
    return None


def _joined(base: str, call: Call) -> After | None:
    """`stack` and `cat`: weights of several heads side by side are weights."""
    tags, parts = call.watcher.tags, call.given(0, "tensors", ())
    tags.use(*parts)
    known = [tags[one] for one in parts]
    first = next((tag for tag in known if tag is not None and (tag.scores or tag.weights)), None)
    found = map(attended_of, known)
    pieces = [(one, of) for one, of in zip(parts, found, strict=True) if of is not None]
    if base != "stack" and len(pieces) > 1:
        mark_blocks(pieces, call.given(1, "dim", 0))
    if base == "stack" and first is None:
        return lambda output: tags.put(output, Tag(of_experts=True))
    if not any(known):
        return None

    def after(output: Tensor) -> None:
        if first is None:
            factors = {1.0 if tag is None else tag.factor for tag in known}
            axes = _axes(known, parts, output)
            tags[output] = Tag(
                factor=factors.pop() if len(factors) == 1 else math.nan,
                before=axes.before, windows=axes.windows,
            )  # fmt: skip
        elif all(tag is not None and tag.weights for tag in known):
            cleans = [one if tag is None or tag.clean is None else tag.clean
                      for one, tag in zip(parts, known, strict=True)]  # fmt: skip
            softmaxes = (number for tag in known if tag is not None for number in tag.softmaxes)
            tags[output] = Tag(
                weights=True, source=first.source, dropout=first.dropout,
                softmaxes=tuple(softmaxes), clean=join(cleans) if first.dropout else None,
            )  # fmt: skip
        elif first.scores is not None and not first.weights:
            scores = _beside(first.scores, parts, known, join)
            tags[output] = replace(first, scores=scores, parametric=False)

    def join(some: list[Tensor]) -> Any:
        return call.func(some, dim=call.given(1, "dim", 0))

    return after


def _beside(
    scores: Scores, parts: Any, known: list[Tag | None], join: Callable[[list[Tensor]], Tensor]
) -> Scores:
    """What goes along with scores to which something else was joined: sinks, for instance."""
    every = []
    for part, tag in zip(parts, known, strict=True):
        own = tag.scores if tag is not None else None
        if own is not None and own.origin is scores.origin:
            every.append([own.rows, own.columns, own.zero])
        else:  # -1 for what is no product, -2 for another one.
            nothing = scores.rows.new_full((), -1 if own is None else -2)
            every.append([nothing, nothing, part.detach() if own is None else own.zero])
        every[-1] = [tensor.expand(part.shape) for tensor in every[-1]]
    rows, columns, zero = (join(list(of)) for of in zip(*every, strict=True))
    return replace(scores, rows=rows, columns=columns, zero=zero.to(scores.zero.dtype))


def _overwritten(base: str, call: Call) -> After | None:
    """`tensor[index] = value`."""
    source, index, value = call.args
    tag = call.watcher.tags[source]
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
        call.watcher.tags[source] = replace(tag, clean=clean, scores=scores)

    return after


SOURCES: tuple[tuple[set[str], Callable[[str, Call], After | None]], ...] = (
    (_COPIES, _copied), (_MOVES, _moved), (_PAIRS, _paired), (_JOINS, _joined),
    ({"setitem"}, _overwritten),
)  # fmt: skip
