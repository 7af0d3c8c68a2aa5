"""No output depends on what it must not see, and each depends on what it must see."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal, TypeAlias, get_args

import torch
from torch import Tensor

from ...attention.vocabulary import Alignment, Side
from ...callables import borrowed
from ...inputs import misuse, positive
from .leak_message import describe, describe_not_finite
from .leak_search import Search
from .memory import claims_of
from .reading import as_subject
from .subject import check_count, check_relative, settled
from .visibility import Stated

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
    judged: Callable[[str], object] | None = None,
    **arguments: Any,
) -> None:
    """Assert that no output depends on what it must not see, and each on what it must see.

    It does not look at the weights: the inputs that an output must not see are
    replaced, and the output must stay what it was. In each pass every batch entry
    (and head) has another observer, from which all that it must not see is
    hidden, so that a few passes judge many of them: more with a larger batch. Half of the
    batch (and of the heads, and of the queries) is replaced as well, and the other half must
    not change. The gradients of an observer per batch entry are 0 exactly where it may not look;
    of a model, so are those of all that may see no more than another observer does.

    Of a long sequence a part is judged: which, moves with the seed. `judged=print` says how much.

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
            Of a module with a memory, how many elements of the memory are.
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
        passes: In how many passes observers are judged; of a large model one in four is a backward
            pass, if gradients are asked. A function, or a model of which
            a call is a matter of milliseconds, has up to 32.
        tolerance: By what part of its size an output may change. By default 2 eps of its
            dtype: the shapes are the same, so nothing is added up in another order.
        seed: Where observers and replacements are drawn from.
        training: Allow a subject that is random, and repeat every call from the seed.
        judged: Called with a sentence that says how many outputs a pass has judged, for instance
            `print`, or the `append` of a list.
        **arguments: Further arguments of every call: `attn_mask`, `is_causal`, `src_mask` ...

    Raises:
        Failure: An output depends on what it must not see, or on nothing that it must
            see. The message names both, the worst and the first, and draws the dependence.
        TypeError: The subject or `judged` is not callable, or an input is no tensor of numbers.
        ValueError: Shapes do not fit; nothing is forbidden; the subject answers at random; or
            `by="gradient"` is passed and it is not differentiable.

    Examples:
        >>> assert_no_leakage(F.scaled_dot_product_attention, query, key, value, is_causal=True)
        >>> assert_no_leakage(language_model, token_ids)
    """
    __tracebackhide__ = True
    methods = _methods(by)
    passes = positive("passes", passes)
    if judged is not None and not callable(judged):
        raise TypeError(misuse("judged", repr(judged), "what takes a sentence, such as print"))
    check_count(inputs, "assert_no_leakage")
    stated = Stated(causal, alignment, lengths, side, documents, may_see)
    whole = as_subject(subject, inputs, arguments, seed=seed if training else None)
    with borrowed(subject, *inputs, seed=seed), torch.no_grad():
        for called, claim in claims_of(whole, stated):
            base = settled(subject, called.run, training=training, seed=seed)
            allowed = check_relative(tolerance, base.dtype, strict=True)
            search = Search(called, claim, base, allowed=allowed, passes=passes, seed=seed)
            broken = search.not_finite()
            if bool(broken.any()):
                raise describe_not_finite(search, broken)
            wanted = must_see and claim.must_see
            fault = search.first_fault(methods, optional=by is None, must_see=wanted)
            if fault is not None:
                raise describe(fault, search)
            if judged is not None:
                judged(f"assert_no_leakage: {search.says_what_it_judged()}")


def _methods(by: object) -> tuple[Method, ...]:
    if by is None:
        return _BY_DEFAULT
    given, known = (by,) if isinstance(by, str) else by, get_args(Method)
    if not isinstance(given, Sequence) or not given or any(one not in known for one in given):
        raise ValueError(misuse("by", repr(by), f"{known}, one or several"))
    return tuple(given)
