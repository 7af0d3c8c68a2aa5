"""Judging what a subject gives for a call, by attention in float64 or by a caller's reference."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ..attention import computation
from ..attention.call import Call
from ..attention.outcomes import rms
from ..attention.scoring import draw
from ..attention.vocabulary import HIDDEN_FROM
from ..callables import borrowed
from ..failure import Checked, Failure, Place
from ..inputs import misuse
from .precision_calls import Criteria, Run, check_call, copies, gradients, handed, run_once
from .precision_elements import Judgement, judge
from .precision_judgement import Context, check
from .precision_rows import (
    BESIDE,
    Runs,
    chosen_rows,
    of_rows,
    signs_like,
    suspects,
    weights_of_runs,
)

# Of a reference function given by the caller, only the size of its rows is known.
_OWN_REFERENCE = 8.0
# By how many times more rounding may move those of one that computes in float64 alone, so that it
# does not show what rounding its steps does, of which there may be more than attention has.
_STEPS_UNKNOWN = 16.0


def judge_call(
    assertion: str,  # What the failure is called
    run: Run,  # Calls the subject
    call: Call,  # What it is asked, without the gradient of the output
    criteria: Criteria,  # How it is judged
    *,
    names: Sequence[str],  # The results whose gradients are judged
    code: object,  # The subject itself, whose modules and random state are left as they were
    output: bool = True,  # Whether the output is judged
    mask_shape: tuple[int, ...] | None = None,  # The caller's, which places are named by
    explain: bool = True,  # Whether a failure looks for what was computed instead, which takes time
) -> None:
    """Judge what a subject gives for a call, by attention in float64 or another reference."""
    __tracebackhide__ = True
    check_call(call)
    with torch.inference_mode(False), torch.enable_grad():
        whole, rows, repeat = call, None, f"seed={criteria.seed}"
        if criteria.rows is not None:
            rows = chosen_rows(call.query_len, call.key_len, criteria.rows, criteria.seed)
            repeat = f"rows={criteria.rows}, {repeat}"
        if few := rows is not None and len(rows) < call.query_len:
            call = of_rows(call, rows)
            names, explain = [name for name in names if name != "attn_mask"], False
        masked_rows = _masked_rows(call)
        upstream = _upstream(call, criteria.seed, masked_rows) if names else None
        call = replace(call, upstream=upstream)
        if rows is not None:
            _judge_rows(assertion, run, (whole, call), rows, criteria, names, code, output=output)
        if few:
            return
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
        # Beside a reference of the caller's no mistake is known.
        explain = explain and criteria.reference is None
        context = Context(
            call=call, found=found, unit=expected.unit, fully_masked=masked_rows, repeat=repeat,
            top_score=expected.top_score, factor=criteria.factor, tolerance=criteria.tolerance,
            broken=[one.name for one in judgements if bool(one.broken.any())], explain=explain,
        )  # fmt: skip
        check(assertion, judgements if output else judgements[1:], context)


def _judge_rows(
    assertion: str,  # What the failure is called
    run: Run,  # Calls the subject
    calls: tuple[Call, Call],  # The whole, and the rows, with the gradient of their output
    rows: Sequence[int],  # Their numbers
    criteria: Criteria,  # How they are judged
    names: Sequence[str],  # The results whose gradients are judged
    code: object,  # The subject itself
    *,
    output: bool,  # Whether the output is judged
) -> None:
    """Judge some rows of a call that is made as a whole."""
    # Of all rows, only the weights of runs of keys are: the rest is judged as ever.
    __tracebackhide__ = True
    whole, call = calls
    numbers, repeat = torch.tensor(rows, device=call.query.device), f"seed={criteria.seed}"
    repeat = f"rows={criteria.rows}, {repeat}: rows {', '.join(map(str, rows[:8]))} ..."
    masked_rows = _masked_rows(call)

    def judged(name: str, found: Tensor | None, expected: Any, call: Call) -> Judgement:
        of_queries = name in ("output", "query")
        part = found[..., numbers, :] if of_queries and found is not None else found
        one = _judge(name, part, expected[0], expected[1][name], call, criteria, masked_rows)
        return replace(one, rows=rows, length=whole.query_len) if of_queries else one

    def ask(given: Call, asked: Sequence[str]) -> dict[str, Tensor | None]:
        return run_once(
            run, given, asked, code, training=criteria.training, seed=criteria.seed,
            beside=BESIDE if criteria.surrounded else 0,
        )  # fmt: skip

    def spread(upstream: Tensor | None) -> Tensor | None:
        if upstream is None:
            return None
        every = upstream.new_zeros(*whole.query.shape[:-1], whole.value.shape[-1])
        every[..., numbers, :] = upstream
        return every

    def context(found: Mapping[str, Tensor | None], several: list[Judgement], more: str) -> Context:
        return Context(
            call=call, found=found, unit=expected[0].unit, fully_masked=masked_rows,
            top_score=expected[0].top_score, factor=criteria.factor, tolerance=criteria.tolerance,
            repeat=repeat + more, broken=[one.name for one in several if bool(one.broken.any())],
            explain=False,
        )  # fmt: skip

    def valued(value: Tensor) -> tuple[Call, Tensor]:
        """Ask with other values: return the call of the rows, and the whole output."""
        output = ask(replace(whole, value=value, upstream=None), [])["output"]
        assert output is not None
        return replace(call, value=value, upstream=None), output

    def count(runs: Runs) -> Judgement:
        own, output = valued(runs.value(whole.value))
        return judged("output", output, _expected(own, criteria, [], code), own)

    def unread(runs: Runs) -> str:
        """Name single keys that leave no signs; of an output that is off, keys of any run."""
        own, output = valued(signs_like(whole.value, criteria.seed))
        one = judged("output", output, _expected(own, criteria, [], code), own)
        off = (one.found - one.exact).nan_to_num().masked_fill(masked_rows.unsqueeze(-1), 0.0)
        few = suspects(own, off)
        said = "" if few is None else few.lost(count, 1.0)
        return said or (runs.lost(count) if bool(one.broken.any()) else "")

    if whole.value.shape[-1] > 1:
        runs = Runs.of(whole.key_len, whole.value.shape[-1])
        counting, asked = runs.value(whole.value), [name for name in names if name == "query"]
        above = runs.upstream(call.upstream) if asked and call.upstream is not None else None
        own = replace(call, value=counting, upstream=above)
        given = replace(whole, value=counting, upstream=spread(above))
        found = ask(given, asked)
        expected = _expected(own, criteria, asked, code)
        one, *slopes = [judged(name, found[name], expected, own) for name in ["output", *asked]]
        failure = None
        if output:
            failure = weights_of_runs(
                assertion, one, runs, repeat, count=count, surrounded=criteria.surrounded
            )
        if failure is not None:
            raise failure
        if output and criteria.reference is None and (said := unread(runs)):
            raise Failure(assertion, said, tensor=one.checked, repeat=repeat)
        check(assertion, slopes, context(found, slopes, "; values that count runs of keys"))
    if len(rows) == whole.query_len:
        return
    whole = replace(whole, upstream=spread(call.upstream))
    found = ask(whole, names)
    expected = _expected(call, criteria, names, code)
    judgements = [judged(name, found[name], expected, call) for name in ["output", *names]]
    several = judgements if output else judgements[1:]
    check(assertion, several, context(found, judgements, ""))
    _check_others(assertion, found, whole, numbers, repeat)


def _check_others(
    assertion: str, found: Mapping[str, Tensor | None], whole: Call, rows: Tensor, repeat: str
) -> None:
    """Ask of the other rows what is known of them: no NaN, and no gradient."""
    __tracebackhide__ = True
    others = torch.ones(whole.query_len, dtype=torch.bool, device=rows.device)
    others[rows] = False
    output, slope = found["output"], found.get("query")
    assert output is not None
    wrong = {"output": ~output.isfinite() & others[:, None]}
    if whole.fully_masked in ("nan", "undefined"):
        wrong = {}
    if slope is not None:
        wrong["query"] = (slope != 0) & others[:, None]
    for name, where in wrong.items():
        if not bool(where.any()):
            continue
        at = tuple(where.nonzero()[0].tolist())
        tensor = output if name == "output" else found[name]
        assert tensor is not None
        title = name if name == "output" else f"{name}.grad"
        text = f"{title}[{', '.join(map(str, at))}] is {float(tensor[at]):.6g}"
        claim = "elements of the output are NaN or infinite, in rows that were not chosen"
        if name == "query":
            claim = "elements of the gradient of query are not zero, in rows without a gradient"
        raise Failure(
            assertion, claim, broken=int(where.sum()), of=where.numel(),
            first=Place(text, at, float(tensor[at]), title), tensor=Checked.of(tensor),
            repeat=repeat,
        )  # fmt: skip


def _masked_rows(call: Call) -> Tensor:
    """Which queries may attend to nothing, (..., query_len); a sink is something."""
    shape = (*call.query.shape[:-1], call.key_len)
    rows = ~call.visible().expand(shape).any(-1)
    if call.sinks is None:
        return rows
    return rows & (call.sinks == -math.inf)[:, None].to(rows.device)


def _upstream(call: Call, seed: int, masked_rows: Tensor) -> Tensor:
    """The gradient of the output: Gaussian, in the dtype of the inputs."""
    # Zero for a query without any key, unless its output is zero: what flows back from there
    # depends on how the mask is made, and is no property of attention. Zero also for a query whose
    # every key is forbidden by a finite number: its weights are rounding, which would excuse any
    # gradient of keys and values.
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
    fits = exact["output"].shape == (*call.query.shape[:-1], call.value.shape[-1])
    attention = computation.reference(call) if fits else None
    # Its features may be of ordinary size where queries and keys are small.
    query, key = (t / rms(t.flatten()).clamp(1e-30, 1.0) for t in (call.query, call.key))
    sized = replace(call, query=query, key=key)
    cancelling = computation.reference(sized).scale if fits else {}
    plain, unknown = _rounded(plain, exact, call, attention)
    info = torch.finfo(call.query.dtype)

    def scale(name: str, tensor: Tensor) -> Tensor:
        times = _OWN_REFERENCE * (_STEPS_UNKNOWN if name in unknown else 1)
        own = info.eps / 2 * times * tensor.abs().amax(-1, keepdim=True)
        own = own.add(info.smallest_normal * info.eps).expand(tensor.shape)
        # What is small because large terms cancel is off by their rounding, as in attention.
        terms = cancelling.get(name)
        if terms is not None and terms.shape == own.shape:
            own = torch.maximum(own, terms.amax(-1, keepdim=True))
        return own.nan_to_num(nan=0.0)  # places without a number allow nothing

    scales = {name: scale(name, tensor) for name, tensor in exact.items()}
    return computation.Reference(exact, scales, scales, info.eps / 2), plain


def _rounded(
    plain: dict[str, Tensor],
    exact: dict[str, Tensor],
    call: Call,
    attention: computation.Reference | None,
) -> tuple[dict[str, Tensor], set[str]]:
    """What a reference gives in the dtype of the inputs, where it computes in that."""
    # Where it computes in float64 whatever it is given, its steps are unknown: each number may be
    # off by a multiple of the most that one of its map is off in plain attention. Their names are
    # returned as well.
    eps, ordinary = torch.finfo(call.query.dtype).eps, dict[str, Tensor]()
    found, unknown = dict(plain), set[str]()
    if attention is None:
        return found, unknown
    for name, tensor in plain.items():
        own = tensor - exact[name]
        if not tensor.numel() or not bool((own.abs() <= eps * exact[name].abs().amax()).all()):
            continue
        unknown.add(name)
        ordinary = ordinary or computation.plain(call)
        rounded, right = ordinary.get(name), attention.exact.get(name)
        if rounded is not None and right is not None and rounded.shape == tensor.shape:
            off = (rounded.double() - right).abs()
            most = _STEPS_UNKNOWN * off.nan_to_num(0.0).amax((-2, -1), keepdim=True)
            found[name] = exact[name] + most
    return found, unknown


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
        name, found, exact, plain, scale, least, factor=criteria.factor,
        tolerance=criteria.tolerance, dtype=call.query.dtype, judged=judged,
    )  # fmt: skip


def _touched(gradient: Tensor, masked_rows: Tensor, call: Call) -> Tensor:
    """Which maps of a gradient of keys, values or mask have a query without any key."""
    maps = masked_rows.any(-1)
    if gradient.shape[:-2] == maps.shape:
        return maps[..., None, None]
    if call.group > 1 and gradient.shape[:-2] == call.key.shape[:-2]:
        return maps.reshape(*call.key.shape[:-2], call.group).any(-1)[..., None, None]
    return maps.any()
