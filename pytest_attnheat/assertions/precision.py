"""Assertions about the numbers of an attention function: its output and its gradients.

The subject has the signature of `torch.nn.functional.scaled_dot_product_attention`. Only options
that the caller gives are passed on, so `function(query, key, value)` will do.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ..attention.call import Call
from ..attention.vocabulary import DECLARED_FULLY_MASKED, DeclaredFullyMasked
from ..inputs import misuse, one_of, positive
from .behaviour.reading import as_function
from .precision_calls import (
    Criteria,
    Function,
    asking,
    called,
    check_by_differences,
    check_criteria,
    described_call,
    runner,
    said,
)
from .precision_judging import judge_call


def assert_matches_reference(
    function: Function,
    query: Tensor | Call,
    key: Tensor | None = None,
    value: Tensor | None = None,
    *,
    attn_mask: Tensor | None = None,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
    fully_masked: DeclaredFullyMasked = "zero",
    reference: Function | None = None,
    factor: float = 2.0,
    gradients: bool = True,
    training: bool = False,
    seed: int = 0,
    rows: int | None = None,
    **arguments: Any,
) -> None:
    """Assert that a function is scaled dot-product attention, as exactly as its dtype allows.

    Its output and the gradients of query, key, value and a float mask that requires one are
    compared with attention in float64. Every element is judged: it may be off by `factor` times
    what the roundings of a plain computation in the same dtype may come to at that element, see
    `pytest_attnheat.assertions.precision_judgement`. NaN and inf never pass where the reference is
    finite.

    Nothing of the caller's changes: gradients are taken of copies (with the same strides), and
    no `.grad` is written.

    Args:
        function: Called as `function(query, key, value, **options)`, with those of the options
            attn_mask, is_causal, scale and enable_gqa that differ from their defaults. It returns
            the output (..., query_len, value_dim), or a tuple that begins with it. Or an
            `AttentionSpec`, which says how it is called and what it does of itself.
        query: (..., query_len, head_dim) in float16, bfloat16, float32 or float64. Or, for an
            `AttentionSpec`, a whole `Call`, as `attention_cases` draws it, and nothing else of it.
        key: (..., key_len, head_dim), of fewer heads with `enable_gqa`.
        value: (..., key_len, value_dim), likewise.
        attn_mask: Boolean, True where a query may attend; or floats that are added to the
            scores, where -inf forbids. Broadcastable to (..., query_len, key_len).
        is_causal: Whether a query may only attend up to its own position, from the top left.
        scale: What the products of queries and keys are multiplied with; 1 / sqrt(head_dim) by
            default.
        enable_gqa: Whether each head of keys and values serves a group of query heads that
            follow one another, as by `repeat_interleave`.
        fully_masked: What the output is for a query that may attend to no key: ``"zero"``
            (exactly), ``"uniform"`` (the mean of all values), ``"nan"`` (there and only there),
            or ``"undefined"`` (not judged). No gradient flows back from ``"zero"``. For the
            others, the gradient of the output is zero there, which no gradient may turn into
            NaN; but with ``"nan"`` and ``"undefined"`` the gradient of such a query is not
            judged, and NaN passes in those of the keys and values of its map.
        reference: A function to compare with in place of attention, called with the same options
            in float64, and in the dtype of the inputs for the plain computation. Rows are then
            judged by their largest number, which is coarser.
        factor: How many times the rounding of a plain computation is allowed.
        gradients: Whether gradients are compared.
        training: Allow a subject that draws random numbers: each call starts from `seed`.
        seed: Seed of the gradient of the output, and of random numbers that the subject draws.
        rows: How many rows are judged, about, of a call that is too long to be judged as a whole:
            the first, the last, those beside blocks and beside 2^15 and 2^16, and others drawn
            from `seed`. The function is called at its full length; the gradient of its output is
            zero elsewhere, and the gradients of all keys and values are judged by the share of
            these rows. It is called once more with values that count, so that keys that are lost
            or read twice show, and are named; also where that is no fewer than all rows, as in
            decoding. None for all rows, and nothing is counted.
        arguments: More options for the function, and for `reference`. Those that are fields of
            `Call` say what is to be computed besides: softcap, sinks, alibi, bias, score_mod,
            may_see, window, chunk, prefix, sink_keys, documents, lengths, alignment. They are
            passed on if the signature of the function has them.

    Raises:
        AssertionError: Some element is off by more. The message names the tensor and the worst
            place, with both errors, and a likely cause.
        TypeError: The function is not callable or returns no tensor, an input is no dense float
            tensor, or the dtypes differ.
        ValueError: Shapes do not fit, an input has no elements or holds NaN or inf, an option is
            out of range, two calls with the same inputs differ, or `reference` gives NaN or inf
            where it is compared with.

    Examples:
        >>> q, k, v = torch.randn(3, 1, 2, 6, 16).unbind()
        >>> assert_matches_reference(F.scaled_dot_product_attention, q, k, v, is_causal=True)
    """
    __tracebackhide__ = True
    given = {"attn_mask": attn_mask, "is_causal": is_causal, "scale": scale,
             "enable_gqa": enable_gqa, **arguments}  # fmt: skip
    _compare(
        "assert_matches_reference", (function, reference), (query, key, value), given,
        Criteria(factor, training, seed, rows=None if rows is None else positive("rows", rows)),
        fully_masked, gradients=gradients,
    )  # fmt: skip


def assert_gradients_match(
    function: Function,
    query: Tensor | Call,
    key: Tensor | None = None,
    value: Tensor | None = None,
    *,
    attn_mask: Tensor | None = None,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
    fully_masked: DeclaredFullyMasked = "zero",
    reference: Function | None = None,
    factor: float = 2.0,
    training: bool = False,
    seed: int = 0,
    rows: int | None = None,
    **arguments: Any,
) -> None:
    """Assert that the gradients of a function are those of scaled dot-product attention.

    As `assert_matches_reference`, without a word about the output: its arguments and what it
    raises are the same. The gradient of `attn_mask` is compared if it is of floats and requires
    one. An input that no gradient reaches breaks it, unless its gradient is zero.

    With `dropout_p` there is no reference: from one seed the same weights are dropped in every
    call, and gradients are compared with differences of the output (float64 or float32).
    """
    __tracebackhide__ = True
    given = {"attn_mask": attn_mask, "is_causal": is_causal, "scale": scale,
             "enable_gqa": enable_gqa, **arguments}  # fmt: skip
    if share := given.get("dropout_p"):
        subject = as_function(function, (query, key, value), said(given))
        check_by_differences("assert_gradients_match", subject, share, seed)
        return
    _compare(
        "assert_gradients_match", (function, reference), (query, key, value), given,
        Criteria(factor, training, seed, rows=None if rows is None else positive("rows", rows)),
        fully_masked, output=False,
    )  # fmt: skip


def _compare(
    assertion: str,
    functions: tuple[Function, Function | None],
    inputs: tuple[Tensor | Call, Tensor | None, Tensor | None],
    given: dict[str, Any],
    criteria: Criteria,
    fully_masked: DeclaredFullyMasked,
    *,
    gradients: bool = True,
    output: bool = True,
) -> None:
    __tracebackhide__ = True
    function, reference = functions
    if reference is not None and not callable(reference):
        raise TypeError(misuse("reference", type(reference).__name__, "a function, or None"))
    check_criteria(criteria)
    one_of("fully_masked", fully_masked, DECLARED_FULLY_MASKED)
    run_reference, shape = None, None
    # The caller may be in inference mode or under no_grad; autograd needs neither.
    with torch.inference_mode(False), torch.enable_grad():
        if isinstance(inputs[0], Call):
            given = {**given, "reference": reference}
            described, call, names = described_call(function, inputs, given)
            run, expected = asking(described), described.expected()
            criteria = replace(criteria, tolerance=described.tolerance or 0.0)
            run_reference = None if expected is None else asking(expected)
        else:
            subject, call, run = called(function, inputs, given)
            call = replace(call, fully_masked=fully_masked)
            own = {"attn_mask": given.get("attn_mask"), "sinks": call.sinks}
            names = ["query", "key", "value"]
            names += [n for n, one in own.items() if one is not None and one.requires_grad]
            if reference is not None:
                run_reference = runner(replace(subject, function=reference))
            shape = None if subject.mask is None else tuple(subject.mask.shape)
        if criteria.rows is not None and reference is not None:
            accepted = "None with rows=: these are judged by attention in float64"
            raise ValueError(misuse("reference", "a function", accepted))
        judge_call(
            assertion, run, call, replace(criteria, reference=run_reference),
            names=names if gradients else [], code=function, output=output, mask_shape=shape,
        )  # fmt: skip
