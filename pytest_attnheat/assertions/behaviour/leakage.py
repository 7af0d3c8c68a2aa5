"""No output depends on what it must not see, and each depends on what it must see."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal, TypeAlias, get_args

import torch
from torch import Tensor

from pytest_attnheat.assertions.behaviour.difference import check_relative
from pytest_attnheat.assertions.behaviour.leak_message import describe, describe_not_finite
from pytest_attnheat.assertions.behaviour.leak_search import Search
from pytest_attnheat.assertions.behaviour.reading import as_subject
from pytest_attnheat.assertions.behaviour.subject import check_count, settled
from pytest_attnheat.assertions.behaviour.visibility import Stated
from pytest_attnheat.attention.vocabulary import Alignment, Side
from pytest_attnheat.callables import borrowed
from pytest_attnheat.inputs import misuse, positive

Method: TypeAlias = Literal["perturbation", "gradient", "nan"]

_BY_DEFAULT: tuple[Method, ...] = ("perturbation", "gradient")


def assert_no_leakage(
    subject: Callable[..., Any],
    *inputs: Tensor,
    causal: bool | None = None,
    alignment: Alignment = "top_left",
    lengths: Sequence[int] | Tensor | None = None,
    side: Side = "right",
    documents: Tensor | None = None,
    may_see: Tensor | None = None,
    must_see: bool = True,
    by: Method | Sequence[Method] | None = None,
    passes: int = 4,
    tolerance: float | None = None,
    seed: int = 0,
    training: bool = False,
    **arguments: Any,
) -> None:
    """Assert that no output depends on what it must not see, and each on what it must see.

    It does not look at the weights: the inputs that an output must not see are
    replaced, and the output must stay what it was. In each pass every batch entry
    (and head) has another observer, from which all that it must not see is
    hidden, so that a few passes judge many of them: more with a larger batch. Half of the
    batch (and of the heads, and of the queries) is replaced as well, and the other half must
    not change. The gradients of an observer per batch entry are 0 exactly where it may not look.

    Args:
        subject: An attention function, called as `subject(query, key, value, **arguments)`, or a
            module that maps a sequence to a sequence, called as `subject(inputs,
            **arguments)`; see `SequenceModel` for how it takes a padding mask.
        *inputs: Query, key and value of an attention function, (..., length, width); or the
            one input of a module: floats (batch, length, width) or token ids (batch, length).
        causal: Whether a token of a sequence may not see later ones. By default so, but only
            if no other argument says what may be seen: a padded language model needs
            `causal=True` beside `lengths`. An attention function is told by its own `is_causal`.
        alignment: What `is_causal=True` means to an attention function.
        lengths: How many tokens of each batch entry are real, (batch,). The others are
            padding, which the module is told through its mask; their own outputs mean nothing.
        side: The side the padding is on.
        documents: The document of each token, (batch, length) whole numbers: several are packed
            into one sequence, and none may see another. Telling the module is up to `arguments`.
        may_see: What may be seen beyond these, boolean, broadcastable to (batch, length,
            length), or for an attention function to (..., query_len, key_len), in place of what
            `attn_mask` and `is_causal` say. Of a module with several layers: what may be seen
            through all of them.
        must_see: Whether an output that does not depend on what it may see is an error too.
        by: `"perturbation"` (other inputs), `"gradient"`, `"nan"` (NaN in what must
            not be seen; PyTorch's own kernels let it through, since 0 * NaN is NaN), or several.
            By default the first two, or the first where the subject is not differentiable.
        passes: In how many passes observers are judged.
        tolerance: By what part of its size an output may change. By default 2 eps of its
            dtype: the shapes are the same, so nothing is added up in another order.
        seed: Where observers and replacements are drawn from.
        training: Allow a subject that is random, and repeat every call from the seed.
        **arguments: Further arguments of every call: `attn_mask`, `is_causal`, `src_mask` ...

    Raises:
        Failure: An output depends on what it must not see, or on nothing that it must
            see. The message names both, the worst and the first, and draws the dependence.
        TypeError: The subject is not callable, or an input is not a tensor of numbers.
        ValueError: Shapes do not fit; nothing is forbidden; the subject answers at random; or
            `by="gradient"` is passed and it is not differentiable.

    Example:
        >>> assert_no_leakage(F.scaled_dot_product_attention, query, key, value, is_causal=True)
        >>> assert_no_leakage(language_model, token_ids)
    """
    __tracebackhide__ = True
    methods = _methods(by)
    passes = positive("passes", passes)
    check_count(inputs, "assert_no_leakage")
    stated = Stated(causal, alignment, lengths, side, documents, may_see)
    called, claim = as_subject(subject, inputs, arguments, seed=seed if training else None).claim(
        stated
    )
    with borrowed(subject, *inputs, seed=seed), torch.no_grad():
        base = settled(subject, called.run, training=training, seed=seed)
        allowed = check_relative(tolerance, base.dtype, strict=True)
        search = Search(called, claim, base, allowed=allowed, passes=passes, seed=seed)
        broken = search.not_finite()
        if bool(broken.any()):
            raise describe_not_finite(search, broken)
        fault = search.first_fault(methods, optional=by is None, must_see=must_see)
        if fault is not None:
            raise describe(fault, search)


def _methods(by: object) -> tuple[Method, ...]:
    if by is None:
        return _BY_DEFAULT
<<<<<<< HEAD
    given, known = (by,) if isinstance(by, str) else by, get_args(Method)
    if not isinstance(given, Sequence) or not given or any(one not in known for one in given):
        raise ValueError(misuse("by", repr(by), f"{known}, one or several"))
    return tuple(given)
=======
    ways = (by,) if isinstance(by, str) else by
    if not isinstance(ways, Sequence) or not ways or any(w not in get_args(Way) for w in ways):
        raise ValueError(f"by: got {by!r}; accepted are {get_args(Way)}, one or several")
    return tuple(ways)


def _refuse(**given: object) -> None:
    for name, value in given.items():
        if value is not None:
            raise ValueError(
                f"{name}: an attention function is told what may be seen by attn_mask= and "
                "is_causal=, or say may_see="
            )


def _of_function(
    subject: object,
    inputs: Sequence[Tensor],
    arguments: dict[str, Any],
    alignment: Alignment,
    may_see: Tensor | None,
    seed: int,
) -> FunctionScene:
    function = as_function(subject, inputs, arguments)
    shape = (*function.leading, function.query.shape[-2], function.key.shape[-2])
    if may_see is not None:
        seen = permitted(may_see, shape).to(function.query.device)
        rules = [Rule(seen, _because("which may_see forbids"))]
        return FunctionScene(function, seen, rules, seed)
    rules = []
    first = shape[-1] - shape[-2] if alignment == "bottom_right" else 0
    if function.arguments.get("is_causal"):
        mask = causal_mask(*shape[-2:], alignment=alignment, device=function.query.device)
        rules.append(Rule(mask, _in_the_future(first)))
    if function.arguments.get("attn_mask") is not None:
        rules.append(
            Rule(permitted(arguments["attn_mask"], shape), _because("which attn_mask forbids"))
        )
    return FunctionScene(function, function.may_see(alignment), rules, seed)


@dataclass(frozen=True)
class _Stated:
    """What the caller says that a token of a sequence may see."""

    causal: bool | None
    lengths: Sequence[int] | Tensor | None
    side: Side
    documents: Tensor | None
    may_see: Tensor | None


def _of_sequence(
    subject: object, inputs: Tensor, arguments: dict[str, Any], stated: _Stated, seed: int
) -> SequenceScene:
    sequence = as_sequence(subject, inputs, arguments)
    batch, length = sequence.inputs.shape[:2]
    device = sequence.inputs.device
    rules: list[Rule] = []
    real = judged = None
    if stated.lengths is not None:
        real = padding_mask(stated.lengths, length, side=stated.side, device=device)[:, 0, 0]
        if len(real) != batch:
            raise ValueError(f"lengths: got {len(real)} of them for a batch of {batch}")
        if bool(real.all()):
            raise ValueError(
                f"lengths: got {real.sum(-1).tolist()}, which leaves no padding in sequences of "
                f"{length} tokens; accepted are lengths of which one is smaller"
            )
        if not (stated.causal and stated.side == "right"):
            check_takes_mask(sequence.model)
        judged = real
        rules.append(Rule(real.unsqueeze(-2), _padding(real.sum(-1).tolist())))
    if stated.documents is not None:
        documents = _documents(stated.documents, (batch, length)).to(device)
        same = documents.unsqueeze(-1) == documents.unsqueeze(-2)
        rules.append(Rule(same, _of_document(documents)))
    others = (stated.lengths, stated.documents, stated.may_see)
    assumed = stated.causal is None and all(other is None for other in others)
    if stated.causal or assumed:
        mask = causal_mask(length, alignment="top_left", device=device)
        rules.append(Rule(mask, _in_the_future(0)))
    if stated.may_see is not None:
        mask = permitted(stated.may_see, (batch, length, length)).to(device)
        rules.append(Rule(mask, _because("which may_see forbids")))
    may_see = torch.ones((), dtype=torch.bool, device=device)
    for rule in rules:
        may_see = may_see & rule.allowed
    may_see = may_see.expand(batch, length, length)
    if judged is None:
        judged = torch.ones(batch, length, dtype=torch.bool, device=device)
    return SequenceScene(sequence, may_see, judged, rules, real=real, assumed=assumed, seed=seed)


def _documents(documents: object, shape: tuple[int, int]) -> Tensor:
    if not isinstance(documents, Tensor) or documents.is_floating_point():
        given = documents.dtype if isinstance(documents, Tensor) else type(documents).__name__
        raise TypeError(f"documents: got {given}; accepted is a tensor of whole numbers")
    try:
        return documents.expand(shape)
    except RuntimeError:
        raise ValueError(
            f"documents: shape {tuple(documents.shape)} does not broadcast to (batch, length) "
            f"{shape}"
        ) from None


def _because(words: str) -> Callable[[tuple[int, ...], int], str]:
    return lambda observer, place: words


def _in_the_future(first: int) -> Callable[[tuple[int, ...], int], str]:
    def because(observer: tuple[int, ...], place: int) -> str:
        steps = place - observer[-1] - first
        word = {1: "one", 2: "two"}.get(steps, str(steps))
        return f"{word} step{'s' * (steps != 1)} in its future"

    return because


def _padding(lengths: list[int]) -> Callable[[tuple[int, ...], int], str]:
    return lambda observer, place: (
        f"padding (of its sequence {lengths[observer[0]]} tokens are real)"
    )


def _of_document(documents: Tensor) -> Callable[[tuple[int, ...], int], str]:
    def because(observer: tuple[int, ...], place: int) -> str:
        own, other = documents[observer], documents[observer[0], place]
        return f"of document {int(other)}, its own is {int(own)}"

    return because
>>>>>>> wip-device
