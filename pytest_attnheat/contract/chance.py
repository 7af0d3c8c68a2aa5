"""A subject that answers the same question in two ways: dropout, beside another defect or not.

Values that are an identity matrix give single weights as outputs. With dropout each of them is, in
one call after another, either 0 or always the same number; so what it is without dropout, but for
one common factor, can be put together from a few calls and compared with the known defects.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from pytest_attnheat.attention.defects import DEFECTS, Defect
from pytest_attnheat.attention.plan import Plan, carry_out
from pytest_attnheat.attention.tolerance import answer_tolerance
from pytest_attnheat.contract.explaining import filled
from pytest_attnheat.contract.findings import Diagnosis, number_text
from pytest_attnheat.contract.matching import (
    Explanation,
    errors,
    explain_alone,
    explain_by_constant,
    measure,
)
from pytest_attnheat.contract.probing import Probe, ask, in_dtype, with_identity
from pytest_attnheat.contract.spec import AttentionSpec
from pytest_attnheat.contract.whereabouts import inferred_weights

# Calls of each case: at first, and at most where much is dropped.
_FEWEST, _MOST = 30, 150
# Of about 100 000 numbers that are dropped or not.
_SHARE_KNOWN_TO = 0.01
# Cases with more weights are left out.
_LARGE = 2000
_BY_NAME = {defect.name: defect for defect in DEFECTS}


def by_chance(
    spec: AttentionSpec, probes: Sequence[Probe], again: Tensor, refused: dict[str, str]
) -> Diagnosis | None:
    """Return the diagnosis of a subject that answers in two ways, None where that is rounding.

    Args:
        spec: The subject.
        probes: Its answers.
        again: Its answer to the first case when asked a second time.
        refused: Why other cases were not answered.
    """
    first = probes[0]
    error, allowed = errors(Plan(), replace(first, output=again))
    before, _ = errors(Plan(), first)
    if bool((error <= allowed).all()) and bool((before <= allowed).all()):
        return None
    between = float((again - first.output).square().mean().sqrt())
    diagnosis = Diagnosis(
        spec.name,
        str(first.dtype).removeprefix("torch."),
        healthy=False,
        residual=between,
        sentence=f"{spec.name} gives another output when called again",
        where={"wrong": f"two calls with the same inputs differ by {number_text(between)} (rms)"},
        refused=refused,
        expected_weights=carry_out(Plan(), first.case).weights,
        inferred_weights=inferred_weights(spec, first),
        case=first.case.name,
    )
    if _drops_outputs(first.output):
        sentence = f"{diagnosis.sentence}: single numbers of it are 0, as if it were dropped out"
        return replace(diagnosis, sentence=sentence)
    found = _without_dropout(spec, probes)
    return diagnosis if found is None else _named(diagnosis, *found)


def _named(diagnosis: Diagnosis, share: float, whole: Sequence[Probe]) -> Diagnosis:
    """Name the dropout, and what else reproduces the answers without it."""
    search = explain_alone(whole)
    correct = Explanation((), Plan(), measure(Plan(), whole))
    singles = [correct, *search.explanations]
    factor = [_BY_NAME["output_factor"]]
    fitted = explain_by_constant(whole, singles, factor)
    fitting = [replace(one, constant=1.0) for one in singles if one.reproduces]
    fitting += [replace(one, defects=one.defects[:-1]) for one in fitted if one.reproduces]
    fitting = [one for one in fitting if _is_plausible(one.constant, share)]
    if not fitting:
        return replace(diagnosis, compared=search.compared)
    fitting.sort(key=lambda one: len(one.defects))
    best, *others = (_with_dropout(one) for one in fitting)
    names = [one.names for one in others if len(one.names) == len(best.names)]
    dropout, *beside = (filled(defect, best.constant) for defect in best.defects)
    assert fitting[0].constant is not None
    text = ", and ".join([f"attention {dropout}", *beside])
    return replace(
        diagnosis,
        defects=best.names,
        alternatives=tuple(dict.fromkeys(one for one in names if one != best.names)),
        residual=best.fit.residual,
        constant=best.constant,
        compared=search.compared,
        sentence=f"{diagnosis.sentence}: it equals {text}; every weight is 0 or "
        f"{fitting[0].constant:.6g} times what it should be (is it in training mode?)",
    )


def _with_dropout(one: Explanation) -> Explanation:
    """Name dropout first; the factor of the weights that are kept is 1 / (1 - p), or 1."""
    assert one.constant is not None
    name = "dropout_in_eval" if one.constant > 1.0 + 1e-3 else "dropout_not_rescaled"
    defects: tuple[Defect, ...] = (_BY_NAME[name], *one.defects)
    return replace(one, defects=defects, constant=1.0 - 1.0 / one.constant)


def _is_plausible(factor: float | None, share: float) -> bool:
    """Whether a factor is that of dropout: none, or the one that makes up for the share."""
    if factor is None:
        return False
    return abs(factor - 1.0) <= 1e-3 or abs(1.0 - 1.0 / factor - share) <= _SHARE_KNOWN_TO


def _drops_outputs(output: Tensor) -> bool:
    """Whether single numbers of a row are 0: those of weights that are dropped never are."""
    zero = output == 0
    return bool((zero.any(-1) & ~zero.all(-1)).any())


def _without_dropout(
    spec: AttentionSpec, probes: Sequence[Probe]
) -> tuple[float, list[Probe]] | None:
    """Return the share that is dropped, and what the subject answers where nothing is."""
    whole: list[Probe] = []
    dropped = counted = 0.0
    for one in probes:
        if not one.judged or math.prod(one.case.shape) > _LARGE:
            continue
        for case, _ in with_identity(one.case):
            rounded = replace(one, case=in_dtype(case, one.dtype))
            together = _together(spec, rounded)
            if together is None:
                return None
            share, output = together
            numbers = int(((output != 0) & output.isfinite()).sum())
            dropped, counted = dropped + share * numbers, counted + numbers
            whole.append(replace(rounded, output=output))
    return (dropped / counted, whole) if counted else None


def _together(spec: AttentionSpec, one: Probe) -> tuple[float, Tensor] | None:
    """Put an answer together from several calls; None where they differ by more than dropout."""
    runs: list[Tensor] = []
    wanted = _FEWEST
    while len(runs) < wanted:
        try:
            runs.append(ask(spec, one.case, one.dtype))
        except Exception:  # it takes no such values
            return None
        if len(runs) == _FEWEST:
            wanted = _enough(_dropped(_numbers(runs)), runs[0].numel())
    finite = torch.stack(runs).isfinite()
    if not bool((finite == finite[0]).all()):
        return None
    numbers = _numbers(runs)
    chosen = numbers.abs().argmax(0, keepdim=True)
    largest = numbers.gather(0, chosen)[0]
    off = (numbers - largest).abs() > answer_tolerance(one.dtype) * largest.abs()
    if bool((off & (numbers != 0)).any()):
        return None
    return _dropped(numbers), torch.where(finite[0], largest, runs[0])


def _numbers(runs: Sequence[Tensor]) -> Tensor:
    return torch.nan_to_num(torch.stack(list(runs)), nan=0.0, posinf=0.0, neginf=0.0)


def _dropped(runs: Tensor) -> float:
    """The share of zeros among the numbers that are not always 0."""
    kept = runs != 0
    ever = kept.any(0)
    return 1.0 - float(kept[:, ever].double().mean()) if bool(ever.any()) else 0.0


def _enough(share: float, numbers: int) -> int:
    """How many calls it takes until hardly any of some numbers was dropped in all of them."""
    if share <= 0.0:
        return _FEWEST
    # The last factor: a hundred cases, and one chance in a thousand.
    calls = math.log(1e-5 / numbers) / math.log(min(share, 0.999))
    return max(_FEWEST, min(_MOST, math.ceil(calls)))
