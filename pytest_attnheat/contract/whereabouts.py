"""Where the error of a subject lives: in which cases, heads, rows, and what its weights are."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from pytest_attnheat.attention.plan import Case, Plan, carry_out
from pytest_attnheat.contract.matching import errors
from pytest_attnheat.contract.probing import Probe, ask, in_dtype, with_identity
from pytest_attnheat.contract.spec import AttentionSpec

_LISTED = 4
_LONG = 100


def whereabouts(probes: Sequence[Probe]) -> dict[str, str]:
    """Say which cases are wrong, and what wrong rows have in common within them."""
    wrong: list[tuple[Probe, Tensor]] = []
    right: list[str] = []
    for one in probes:
        rows = wrong_rows(one)
        if bool(rows.any()):
            wrong.append((one, rows))
        else:
            right.append(one.case.name)
    total = sum(rows.numel() for _, rows in wrong)
    count = sum(int(rows.sum()) for _, rows in wrong)
    where = {
        "wrong": f"{count} of {total} rows in {_listed([one.case.name for one, _ in wrong])}",
        "right": _listed(right),
    }
    first, rows = wrong[0]
    where["heads"] = _only("head", [_indices(rows.any(-1).any(0)) for _, rows in wrong], wrong, 1)
    where["batch"] = _only(
        "batch entry", [_indices(rows.any(-1).any(1)) for _, rows in wrong], wrong, 0
    )
    where["queries"] = _queries(first, rows)
    where["pattern"] = _pattern([one for one, _ in wrong], right, probes)
    return {name: text for name, text in where.items() if text}


def wrong_rows(one: Probe) -> Tensor:
    """Return which rows of an answer are wrong, (batch, heads, query_len)."""
    error, allowed = errors(Plan(), one)
    return error > allowed


def _indices(flags: Tensor) -> list[int]:
    return flags.nonzero().flatten().tolist()


def _only(
    noun: str, found: Sequence[list[int]], wrong: Sequence[tuple[Probe, Tensor]], dim: int
) -> str:
    """Say which heads or batch entries are wrong, where the same few are in every case."""
    several = [
        (indices, one.case.shape[dim])
        for indices, (one, _) in zip(found, wrong, strict=True)
        if one.case.shape[dim] > 1
    ]
    if not several or any(len(indices) == size for indices, size in several):
        return ""
    union = sorted({index for indices, _ in several for index in indices})
    most = max(size for _, size in several)
    return f"only {_numbers(noun, union, most)}"


def _queries(one: Probe, rows: Tensor) -> str:
    """Which queries are wrong in the first wrong case, where it is not all of them."""
    queries = _indices(rows.any(0).any(0))
    query_len = one.case.shape[2]
    if len(queries) == query_len:
        return ""
    return f"only {_numbers('queries', queries, query_len)} in {one.case.name}"


def _numbers(noun: str, numbers: Sequence[int], size: int) -> str:
    """Say which of some numbers below a size they are, in a few ranges or by their count."""
    breaks = [i for i in range(1, len(numbers)) if numbers[i] != numbers[i - 1] + 1]
    edges = [0, *breaks, len(numbers)]
    runs = [numbers[first:stop] for first, stop in pairwise(edges)]
    if len(runs) > _LISTED:
        return f"{len(numbers)} of {size} {noun} ({numbers[0]} to {numbers[-1]})"
    texts = [f"{run[0]}..{run[-1]}" if len(run) > 2 else ", ".join(map(str, run)) for run in runs]
    return f"{noun} {', '.join(texts)} of {size}"


def _pattern(wrong: Sequence[Probe], right: Sequence[str], probes: Sequence[Probe]) -> str:
    """What the wrong cases have in common that no right one has."""
    features: dict[str, Callable[[Case], bool]] = {
        "with long inputs": lambda case: case.shape[3] > _LONG,
        "with a mask": lambda case: case.mask is not None,
        "causal": lambda case: case.causal,
        "causal with a mask": lambda case: case.causal and case.mask is not None,
        "with fewer key heads than heads": lambda case: case.key.shape[1] < case.query.shape[1],
        "with other lengths of queries and keys": lambda case: case.shape[2] != case.shape[3],
        "with rows that are fully masked": lambda case: case.name == "fully masked row",
        "with large scores": lambda case: case.name.startswith("large scores"),
        "with a scale= of its own": lambda case: case.scale_given,
    }
    cases = [one.case for one in probes if one.case.name in right]
    if not cases:
        return ""
    for text, has in features.items():
        if all(has(one.case) for one in wrong) and not any(has(case) for case in cases):
            return f"wrong in every case {text}, right in every other"
    for text, has in features.items():
        if all(has(one.case) for one in wrong):
            return f"wrong only in cases {text}"
    return ""


def _listed(names: Sequence[str]) -> str:
    shown = ", ".join(names[:_LISTED])
    return f"{shown} and {len(names) - _LISTED} more cases" if len(names) > _LISTED else shown


def shown(spec: AttentionSpec | None, probes: Sequence[Probe]) -> dict[str, Any]:
    """The weights of the smallest wrong case that has finite numbers, if there is one."""
    wrong = [one for one in probes if bool(wrong_rows(one).any())]
    wrong.sort(key=lambda one: not bool(one.output.isfinite().all()))
    one = wrong[0]
    result = carry_out(Plan(), one.case)
    error, allowed = errors(Plan(), one)
    ratio = torch.nan_to_num(error / allowed).amax(-1)
    batch, head = divmod(int(ratio.argmax()), ratio.shape[1])
    inferred = None if spec is None else inferred_weights(spec, one)
    return {
        "expected_weights": result.weights,
        "inferred_weights": inferred,
        "case": one.case.name,
        "place": (batch, head),
    }


def inferred_weights(spec: AttentionSpec, one: Probe) -> Tensor | None:
    """Return what a subject uses as weights on a case, (batch, heads, query_len, key_len).

    Its output for values that are an identity matrix: the weights, as long as the output is a sum
    of values. None where the subject refuses such values.
    """
    weights = torch.zeros(one.case.shape, dtype=torch.float64)
    for case, columns in with_identity(one.case):
        try:
            output = ask(spec, in_dtype(case, one.dtype), one.dtype)
        except Exception:
            return None
        weights[..., columns] = output[..., : columns.stop - columns.start]
    return weights
