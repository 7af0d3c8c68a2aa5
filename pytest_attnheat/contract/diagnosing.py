"""`diagnose`: what a wrong implementation of attention computes instead.

Its answers to small cases are compared with attention that carries each known defect, and then
with two defects at once. What reproduces every answer to within rounding is named; where nothing
does, it is said what was excluded, and where the error is.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ..attention.defects import DEFECTS, Defect
from ..attention.outcomes import finite
from ..attention.plan import Plan, carry_out
from ..attention.tolerance import answer_tolerance
from ..callables import always_compiled, random_kept, seed_all
from ..capture.record import AttentionRecord
from ..capture.trace import Trace
from ..inputs import dtype_name, misuse, seed_number
from .captured import diagnose_records
from .diagnosis import Diagnosis, residual_text
from .examination import Examination
from .explaining import explained, filled
from .matching import Explanation, errors, measure
from .probing import Probe, ask, blueprints, inferred_weights, one_thread, probe, with_identity
from .ready import as_spec
from .returned import with_returned
from .searching import Search
from .spec import AttentionSpec

# Not float64 first: code that computes some steps in float32 is not wrong in float32.
_DTYPES = ("float32", "float64", "float16", "bfloat16")
# Calls of each case: at first, and at most where much is dropped.
_FEWEST, _MOST = 30, 150
# Of about 100 000 numbers that are dropped or not.
_SHARE_KNOWN_TO = 0.01
# Cases with more weights are left out.
_LARGE = 2000
_BY_NAME = {defect.name: defect for defect in DEFECTS}


def diagnose(
    subject: AttentionSpec | Callable[..., Any] | Trace | AttentionRecord, *, seed: int = 0
) -> Diagnosis:
    """Tell what an implementation of attention computes instead.

    It is called on about 20 small cases, in float64 where it takes that, else in the next finer
    dtype it declares; where it is correct, in the other dtypes as well. Its answers are compared
    with attention that carries each of the known defects, and if none reproduces them with pairs.
    Cases that it refuses with an exception are noted. Nothing is compared more closely than
    rounding allows (see `contract.matching`).

    What was captured is not called: each attention in it is judged by its own queries, keys,
    values, mask and output, and the first that is not what they make is diagnosed. A block is
    called once, on its inputs, and what happens inside is captured. What was captured should be
    scaled and windowed as the specification says, by default by head_dim ** -0.5 and not at all.

    Args:
        subject: A specification, or a callable with the signature of
            `torch.nn.functional.scaled_dot_product_attention`; or what `capture_attention`
            recorded, a trace or a record.
        seed: The seed of the inputs, and of the subject's own randomness.

    Returns:
        The diagnosis; `print` it.

    Raises:
        TypeError: The subject cannot be called, or the seed is not a whole number.
        ValueError: The subject answered no case at all; its first refusal is quoted. Nothing
            that was captured can be judged. A function has a reference of its own: known defects
            are those of attention as it is declared.
    """
    spec = as_spec(subject)
    if spec.is_captured or spec.is_block:
        return diagnose_records(spec)
    if spec.reference is not None:
        accepted = "None: known defects are those of attention as declared; use check_attention"
        raise ValueError(misuse("reference", "a function", accepted))
    seed = seed_number(seed)
    sound: dict[str, float] = {}
    refused: dict[str, str] = {}
    last: Diagnosis | None = None
    asked = 0
    for name in (name for name in _DTYPES if name in spec.dtypes):
        with (
            one_thread(),
            always_compiled(spec.subject),
            random_kept([torch.device(one) for one in (spec.devices or ())[:1]]),
        ):
            seed_all(seed)
            device = torch.device((spec.devices or ("cpu",))[0])
            examination = Examination(spec, getattr(torch, name), device, seed)
            probes, refused_here = _answers(examination)
            if not probes:
                refused[name] = next(iter(refused_here.values()), "")
                continue
            last = _diagnosed(spec, probes, refused_here)
        if not last.healthy:
            elsewhere = [f"correct in {', '.join(sound)}"] if sound else []
            return replace(last, notes=(*last.notes, *elsewhere))
        sound[name], asked = last.residual, max(asked, len(probes))
    if last is None:
        reasons = "; ".join(f"{name}: {why}" for name, why in refused.items())
        raise ValueError(f"diagnose: {spec.name} answered no case ({reasons})")
    residuals = ", ".join(
        f"{residual_text(residual)} in {name}" for name, residual in sound.items()
    )
    return replace(
        last,
        dtype=", ".join(sound),
        refused={**last.refused, **refused},
        residual=max(sound.values()),
        sentence=f"{spec.name} is attention as declared in the {asked} cases that were asked; "
        f"residual {residuals}",
    )


# --- asking


def _answers(examination: Examination) -> tuple[list[Probe], dict[str, str]]:
    """Ask the subject all cases; return its answers, and why others were refused."""
    probes, refused = [], {}
    tolerance = max(answer_tolerance(examination.dtype), examination.spec.tolerance or 0.0)
    for blueprint in blueprints(examination.spec, examination.dtype):
        answer = probe(examination, blueprint, tolerance)
        if isinstance(answer, Probe):
            probes.append(answer)
        elif answer is not None and blueprint.judged:
            refused[blueprint.name] = answer
    return probes, refused


def _diagnosed(spec: AttentionSpec, probes: Sequence[Probe], refused: dict[str, str]) -> Diagnosis:
    first = probes[0]
    again = ask(spec, first.case, first.dtype)
    if not torch.equal(torch.nan_to_num(again), torch.nan_to_num(first.output)):
        random = _at_random(spec, probes, again, refused)
        if random is not None:
            return random
    judged = [one for one in probes if one.judged]
    diagnosis = explained(spec.name, judged, refused, partial(inferred_weights, spec), keep=True)
    if diagnosis.healthy:
        diagnosis = _with_faults(with_returned(diagnosis, spec, judged), judged)
    notes = [_garbage_note(one) for one in probes if not one.judged]
    return replace(diagnosis, notes=tuple(note for note in notes if note))


def _with_faults(diagnosis: Diagnosis, probes: Sequence[Probe]) -> Diagnosis:
    """Return the diagnosis of a subject whose output is right, and say what it does to a cache."""
    wrong = {one.case.name: one.fault for one in probes if one.fault is not None}
    if not wrong:
        return diagnosis
    fault = next(iter(wrong.values()))
    return replace(
        diagnosis,
        healthy=False,
        defects=(fault.name,),
        where={"wrong": f"the cache after {', '.join(wrong)}"},
        sentence=f"{diagnosis.subject} gives the output of attention as declared, but in its cache "
        f"{fault.sentence}",
    )


def _garbage_note(one: Probe) -> str:
    """A word about NaN in masked keys, which no plan of a healthy subject needs to feel."""
    if bool(one.output.isfinite().all()):
        return ""
    (defect,) = (defect for defect in DEFECTS if defect.seen == "garbage")
    return f"{defect.name}: it {defect.sentence.removeprefix('that ')}"


# --- a subject that gives another answer when asked again: dropout, beside a defect or not
#
# Values that are an identity matrix give single weights as outputs. With dropout each of them is,
# in one call after another, either 0 or always the same number; so what it is without dropout, but
# for one common factor, can be put together from a few calls and compared with the known defects.


def _at_random(
    spec: AttentionSpec, probes: Sequence[Probe], again: Tensor, refused: dict[str, str]
) -> Diagnosis | None:
    """Return the diagnosis of a subject that answers differently, None where that is rounding."""
    first = probes[0]
    error, allowed = errors(replace(first, output=again))
    before, _ = errors(first)
    if bool((error <= allowed).all()) and bool((before <= allowed).all()):
        return None
    between = float((again - first.output).square().mean().sqrt())
    diagnosis = Diagnosis(
        spec.name, dtype_name(first.dtype), healthy=False, residual=between,
        sentence=f"{spec.name} gives another output when called again",
        where={"wrong": f"two calls with the same inputs differ by {residual_text(between)} (rms)"},
        refused=refused, expected_weights=carry_out(Plan(), first.case).weights,
        inferred_weights=inferred_weights(spec, first), case=first.case.name,
    )  # fmt: skip
    zero = first.output == 0
    if bool((zero.any(-1) & ~zero.all(-1)).any()):  # those of weights that are dropped never are
        sentence = f"{diagnosis.sentence}: single numbers of it are 0, as if it were dropped out"
        return replace(diagnosis, sentence=sentence)
    found = _without_dropout(spec, probes)
    return diagnosis if found is None else _named(diagnosis, *found)


def _named(diagnosis: Diagnosis, share: float, whole: Sequence[Probe]) -> Diagnosis:
    """Name the dropout, and what else reproduces the answers without it."""
    search = Search(whole, keep=True)
    singles = [Explanation(fit=measure(whole)), *search.singles]
    fitted = search.by_constant(singles, factors=True)
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


def _without_dropout(
    spec: AttentionSpec, probes: Sequence[Probe]
) -> tuple[float, list[Probe]] | None:
    """Return the share that is dropped, and what the subject answers where nothing is."""
    whole: list[Probe] = []
    dropped = counted = 0.0
    for one in probes:
        if not one.judged or math.prod(one.case.shape) > _LARGE:
            continue
        for case, _ in with_identity(spec, one):
            rounded = replace(one, case=case)
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
            wanted = _enough(_dropped(finite(torch.stack(runs))), runs[0].numel())
    known = torch.stack(runs).isfinite()
    if not bool((known == known[0]).all()):
        return None
    numbers = finite(torch.stack(runs))
    chosen = numbers.abs().argmax(0, keepdim=True)
    largest = numbers.gather(0, chosen)[0]
    off = (numbers - largest).abs() > answer_tolerance(one.dtype) * largest.abs()
    if bool((off & (numbers != 0)).any()):
        return None
    return _dropped(numbers), torch.where(known[0], largest, runs[0])


def _dropped(runs: Tensor) -> float:
    """The share of zeros among the numbers that are not always 0."""
    kept = runs != 0
    ever = kept.any(0)
    return 1.0 - float(kept[:, ever].double().mean()) if bool(ever.any()) else 0.0


def _enough(share: float, numbers: int) -> int:
    """How many calls it takes until hardly any of some numbers was dropped in all of them."""
    if share <= 0.0:
        return _FEWEST
    # The last factor: a hundred cases, and one in a thousand.
    calls = math.log(1e-5 / numbers) / math.log(min(share, 0.999))
    return max(_FEWEST, min(_MOST, math.ceil(calls)))
