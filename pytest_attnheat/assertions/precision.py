"""Assertions about the numbers of an attention function: its output and its gradients.

The subject has the signature of `torch.nn.functional.scaled_dot_product_attention`. Only options
that the caller gives are passed on, so `function(query, key, value)` will do.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from pytest_attnheat.assertions.behaviour.reading import as_function
from pytest_attnheat.assertions.precision_calls import (
    Criteria,
    Function,
    Run,
    asking,
    called,
    check_by_differences,
    check_call,
    check_criteria,
    copies,
    described_call,
    gradients,
    handed,
    run_once,
    runner,
    said,
)
from pytest_attnheat.assertions.precision_judgement import Context, Judgement, check, judge
from pytest_attnheat.attention import computation
from pytest_attnheat.attention.call import Call
from pytest_attnheat.attention.scoring import draw
from pytest_attnheat.attention.vocabulary import (
    DECLARED_FULLY_MASKED,
    HIDDEN_FROM,
    DeclaredFullyMasked,
)
from pytest_attnheat.callables import borrowed
from pytest_attnheat.inputs import misuse, one_of

# Of a reference function given by the caller, only the size of its rows is known.
_OWN_REFERENCE = 8.0


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
        "assert_matches_reference",
        (function, reference),
        (query, key, value),
        given,
        Criteria(factor, training, seed),
        fully_masked,
        gradients=gradients,
    )


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
        "assert_gradients_match",
        (function, reference),
        (query, key, value),
        given,
        Criteria(factor, training, seed),
        fully_masked,
        output=False,
    )


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
        judge_call(
            assertion, run, call, replace(criteria, reference=run_reference),
            names=names if gradients else [], code=function, output=output, mask_shape=shape,
        )  # fmt: skip


def judge_call(
    assertion: str,
    run: Run,
    call: Call,
    criteria: Criteria,
    *,
    names: Sequence[str],
    code: object,
    output: bool = True,
    mask_shape: tuple[int, ...] | None = None,
    explain: bool = True,
) -> None:
    """Judge what a subject gives for a call, by attention in float64 or another reference.

    Args:
        assertion: What the failure is called.
        run: Calls the subject.
        call: What it is asked, without the gradient of the output.
        criteria: How it is judged.
        names: The results whose gradients are judged: query, key, value, attn_mask, sinks.
        code: The subject itself, whose modules and random state are left as they were.
        output: Whether the output is judged.
        mask_shape: The shape of the mask as the caller has it, which places are named by.
        explain: Whether a failure looks for what was computed instead, which takes time.
    """
    __tracebackhide__ = True
    check_call(call)
    with torch.inference_mode(False), torch.enable_grad():
        masked_rows = _masked_rows(call)
        upstream = _upstream(call, criteria.seed, masked_rows) if names else None
        call = replace(call, upstream=upstream)
        found = run_once(run, call, names, code, training=criteria.training, seed=criteria.seed)
        expected, plain = _expected(call, criteria, names, code)
        if criteria.reference is not None:
            _check_reference(expected, call, masked_rows)
        judgements = [
            _judge(name, found[name], expected, plain[name], call, criteria, masked_rows)
            for name in ["output", *names]
        ]
        if mask_shape is not None:
            judgements = [
                replace(one, shape=mask_shape) if one.name == "attn_mask" else one
                for one in judgements
            ]
        context = Context(
            call=call,
            unit=expected.unit,
            fully_masked=masked_rows,
            top_score=expected.top_score,
            factor=criteria.factor,
            tolerance=criteria.tolerance,
            repeat=f"seed={criteria.seed}",
            broken=[one.name for one in judgements if bool(one.broken.any())],
            # Beside a reference of the caller's no mistake is known.
            explain=explain and criteria.reference is None,
            found=found,
        )
        check(assertion, judgements if output else judgements[1:], context)


def _masked_rows(call: Call) -> Tensor:
    """Which queries may attend to nothing, (..., query_len); a sink is something."""
    shape = (*call.query.shape[:-1], call.key_len)
    rows = ~call.visible().expand(shape).any(-1)
    if call.sinks is None:
        return rows
    return rows & (call.sinks == -math.inf)[:, None].to(rows.device)


def _upstream(call: Call, seed: int, masked_rows: Tensor) -> Tensor:
    """The gradient of the output: Gaussian, in the dtype of the inputs.

    Zero for a query without any key, unless its output is zero: what flows back from there
    depends on how the mask is made, and is no property of attention. Zero also for a query whose
    every key is forbidden by a finite number: its weights are rounding, which would excuse
    any gradient of keys and values.
    """
    shape = (*call.query.shape[:-1], call.value.shape[-1])
    drawn = draw("gradient of the output", seed, *shape).to(call.query)
    without = torch.zeros_like(masked_rows)
    if call.bias is not None:
        scores = (*call.query.shape[:-1], call.key_len)
        without = ~call.visible(HIDDEN_FROM).expand(scores).any(-1) & ~masked_rows
    without = without if call.fully_masked == "zero" else without | masked_rows
    return drawn.masked_fill(without.unsqueeze(-1), 0.0)


def _expected(
    call: Call, criteria: Criteria, names: Sequence[str], code: object
) -> tuple[computation.Reference, dict[str, Tensor]]:
    """The reference in float64, and what a plain computation gives."""
    if criteria.reference is not None:
        return _callers_reference(criteria.reference, call, names, code)
    return computation.reference(call), computation.plain(call)


def _callers_reference(
    run: Run, call: Call, names: Sequence[str], code: object
) -> tuple[computation.Reference, dict[str, Tensor]]:
    """The caller's own reference, in float64 and in the dtype of the inputs."""

    def compute(dtype: torch.dtype) -> dict[str, Tensor]:
        leaves = copies(call, names, dtype)
        output = run(handed(call, leaves))
        found = {"output": output.detach(), **gradients(output, leaves, call.upstream, names)}
        return {
            name: torch.zeros_like(leaves[name]).double() if tensor is None else tensor.double()
            for name, tensor in found.items()
        }

    with borrowed((run, code), call.query, call.key, call.value):
        exact, plain = compute(torch.float64), compute(call.query.dtype)
    info = torch.finfo(call.query.dtype)
    # Places without a number are refused, or not judged: they allow nothing.
    scale = {
        name: (info.eps / 2 * _OWN_REFERENCE * tensor.abs().amax(-1, keepdim=True))
        .add(info.smallest_normal * info.eps)
        .expand(tensor.shape)
        .nan_to_num(nan=0.0)
        for name, tensor in exact.items()
    }
    return computation.Reference(exact, scale, scale, info.eps / 2), plain


def _check_reference(expected: computation.Reference, call: Call, masked_rows: Tensor) -> None:
    """Refuse a reference of the caller's that is NaN or infinite where it is compared with."""
    for name, exact in expected.exact.items():
        bad = ~exact.isfinite()
        if call.fully_masked in ("nan", "undefined"):
            bad = bad & ~_excused(name, exact, masked_rows, call)
        if bool(bad.any()):
            place = ", ".join(map(str, bad.nonzero()[0].tolist()))
            whose = "output" if name == "output" else f"gradient of {name}"
            got = f"{float(exact[bad][0])} in its {whose} at [{place}] in float64"
            accepted = "a function that gives finite numbers where they are compared with"
            if name == "output" and not bool((bad & ~masked_rows.unsqueeze(-1)).any()):
                accepted += (
                    " (there, a query may attend to no key, and "
                    f'fully_masked="{call.fully_masked}" is declared; if NaN is meant, '
                    'fully_masked="nan")'
                )
            raise ValueError(misuse("reference", got, accepted))


def _excused(name: str, exact: Tensor, masked_rows: Tensor, call: Call) -> Tensor:
    """Where a query that may attend to nothing, and is not zero, may leave NaN."""
    if name in ("output", "query"):
        return masked_rows.unsqueeze(-1).expand(exact.shape)
    # NaN of such a row spreads to all keys of its map, as 0 * NaN.
    return _touched(exact, masked_rows, call)


def _judge(
    name: str,
    found: Tensor | None,
    expected: computation.Reference,
    plain: Tensor,
    call: Call,
    criteria: Criteria,
    masked_rows: Tensor,
) -> Judgement:
    """Lay one tensor beside its reference, after saying what is expected of fully masked rows."""
    exact, scale, least = (of[name] for of in (expected.exact, expected.scale, expected.least))
    judged = torch.ones_like(exact, dtype=torch.bool)
    rows = masked_rows.unsqueeze(-1)
    if call.fully_masked in ("nan", "undefined"):
        if name in ("output", "query"):
            keep = name == "output" and call.fully_masked == "nan"
            judged = judged if keep else judged & ~rows
            exact = exact.masked_fill(rows, math.nan) if keep else exact
        else:
            unknown = exact.isnan() if found is None else found.isnan() | exact.isnan()
            judged = ~(unknown & _excused(name, exact, masked_rows, call))
    elif call.fully_masked == "zero" and name == "output":
        scale, least = (tensor.masked_fill(rows, 0.0) for tensor in (scale, least))
    return judge(
        name,
        found,
        exact,
        plain,
        scale,
        least,
        factor=criteria.factor,
        tolerance=criteria.tolerance,
        dtype=call.query.dtype,
        judged=judged,
    )


def _touched(gradient: Tensor, masked_rows: Tensor, call: Call) -> Tensor:
    """Which maps of a gradient of keys, values or mask have a query without any key."""
    maps = masked_rows.any(-1)
    if gradient.shape[:-2] == maps.shape:
        return maps[..., None, None]
    if call.group > 1 and gradient.shape[:-2] == call.key.shape[:-2]:
        return maps.reshape(*call.key.shape[:-2], call.group).any(-1)[..., None, None]
    return maps.any()
