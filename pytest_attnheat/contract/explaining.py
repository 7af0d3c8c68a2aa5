"""What reproduces the answers of a subject: correct attention, a defect, two, or nothing."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import replace

import torch

from pytest_attnheat.attention.defects import Defect
from pytest_attnheat.attention.plan import Plan
from pytest_attnheat.contract.findings import EXPLAINS, Diagnosis, number_text
from pytest_attnheat.contract.matching import (
    NOWHERE,
    Explanation,
    Search,
    explain_alone,
    explain_by_constant,
    explain_in_pairs,
    measure,
    nearly,
)
from pytest_attnheat.contract.probing import Probe
from pytest_attnheat.contract.spec import AttentionSpec
from pytest_attnheat.contract.stepwise import explain_step_by_step
from pytest_attnheat.contract.whereabouts import shown, whereabouts

# Above so many weights in all cases, pairs take too long.
_MOST_WEIGHTS_IN_PAIRS = 40_000
_MOST_TIES = 4


def explained(
    name: str,
    probes: Sequence[Probe],
    refused: dict[str, str],
    spec: AttentionSpec | None = None,
    *,
    search: bool = True,
) -> Diagnosis:
    """Say what reproduces the answers: correct attention, a defect, two, or nothing."""
    dtype = str(probes[0].dtype).removeprefix("torch.")
    correct = Explanation((), Plan(), measure(Plan(), probes))
    base = Diagnosis(name, dtype, correct.reproduces, residual=correct.fit.residual)
    if correct.reproduces:
        sentence = f"{name} is attention as declared; residual {number_text(base.residual)}"
        return replace(base, sentence=sentence, refused=refused)
    if not search:
        return replace(base, sentence=f"{name} is not attention as declared", refused=refused)
    diagnosis = replace(base, refused=refused, where=whereabouts(probes), **shown(spec, probes))
    if correct.fit.excess <= nearly(probes):
        return _almost(diagnosis, correct)
    searched, explanations = _search(probes, keep=spec is not None)
    fitting, near, others = _sorted(explanations, nearly(probes))
    diagnosis = replace(diagnosis, compared=searched.compared, unseen=tuple(searched.unseen))
    if not fitting:
        return _unexplained(diagnosis, correct, [*near, *others])
    best, *rest = fitting
    alternatives = _unique(one.names for one in [*rest, *near])
    # The correct plan is another explanation as well: one that is excluded. What is named and
    # something more, or made in another way, is no other.
    named = [set(names) for names in (best.names, *alternatives)]
    excluded = [one for one in others if not any(names <= set(one.names) for names in named)]
    best_other = min([*excluded, correct], key=lambda one: one.fit.residual)
    return replace(
        diagnosis,
        defects=best.names,
        alternatives=tuple(names for names in alternatives if set(names) != set(best.names)),
        residual=best.fit.residual,
        next_best=best_other.fit.residual,
        next_best_defects=best_other.names or ("correct attention",),
        constant=best.constant,
        excluded=_excluded(explanations, [best.names, *alternatives]),
        sentence=_sentence(name, best, rest, best_other),
    )


def _almost(diagnosis: Diagnosis, correct: Explanation) -> Diagnosis:
    """A subject that is hardly wrong: any small change might explain that, so none is named."""
    return replace(
        diagnosis,
        sentence=f"{diagnosis.subject} is off by {correct.fit.excess:.2g} times what rounding may "
        f"do, too little to tell by what; residual {number_text(correct.fit.residual)}",
    )


def _search(probes: Sequence[Probe], *, keep: bool) -> tuple[Search, list[Explanation]]:
    """Look for one defect, a constant, two defects, a defect and a constant, more defects."""
    alone = explain_alone(probes, keep=keep)
    found = list(alone.explanations)
    if any(one.reproduces for one in found):
        return alone, found
    constants = explain_by_constant(probes, [Explanation((), Plan(), NOWHERE)])
    found += constants
    alone.compared += len(constants)
    small = sum(math.prod(one.case.shape) for one in probes) <= _MOST_WEIGHTS_IN_PAIRS
    if any(one.reproduces for one in found) or not small:
        return alone, found
    found += explain_in_pairs(probes, alone)
    if any(one.reproduces for one in found):
        return alone, found
    constants = explain_by_constant(probes, alone.explanations)
    alone.compared += len(constants)
    found += constants
    if any(one.reproduces for one in constants):
        return alone, found
    return alone, found + explain_step_by_step(probes, alone, constants)


def _sorted(
    explanations: Iterable[Explanation], limit: float
) -> tuple[list[Explanation], list[Explanation], list[Explanation]]:
    """Split into what reproduces the answers, what nearly does, and what is excluded."""
    fitting: list[Explanation] = []
    near: list[Explanation] = []
    others: list[Explanation] = []
    for one in explanations:
        kind = fitting if one.reproduces else near if one.fit.excess <= limit else others
        kind.append(one)
    # Coarse steps explain less exactly than others: they come last.
    fitting.sort(key=lambda one: (len(one.defects), _roughness(one)))
    others.sort(key=lambda one: one.fit.residual)
    unique = {one.names: one for one in reversed(fitting)}
    return list(reversed(unique.values())), near, others


def _roughness(one: Explanation) -> int:
    return sum(defect.seen != "exactly" for defect in one.defects)


def _unique(names: Iterable[tuple[str, ...]]) -> list[tuple[str, ...]]:
    seen: dict[tuple[str, ...], tuple[str, ...]] = {}
    for one in names:
        seen.setdefault(tuple(sorted(one)), one)
    return list(seen.values())


def _excluded(
    explanations: Sequence[Explanation], named: Iterable[tuple[str, ...]]
) -> tuple[str, ...]:
    kept = {name for names in named for name in names}
    singles = [one.names[0] for one in explanations if len(one.names) == 1]
    return tuple(dict.fromkeys(name for name in singles if name not in kept))


def _unexplained(
    diagnosis: Diagnosis, correct: Explanation, explanations: Sequence[Explanation]
) -> Diagnosis:
    nearest = min(explanations, key=lambda one: one.fit.residual, default=correct)
    sentence = (
        f"{diagnosis.subject} is not attention as declared (residual "
        f"{number_text(correct.fit.residual)}), and no known defect gives its output"
    )
    if any(len(one.defects) > 1 for one in explanations):
        sentence += ", nor any two of them"
    # What takes away only a part of the error explains nothing.
    if nearest.fit.residual <= EXPLAINS * correct.fit.residual:
        sentence += f"; most of the error is that of {_described(nearest)} (residual "
        sentence += f"{number_text(nearest.fit.residual)})"
    if coarse := _as_if_coarse(diagnosis):
        sentence += f"; {coarse}"
    return replace(
        diagnosis,
        next_best=nearest.fit.residual,
        next_best_defects=nearest.names,
        excluded=_excluded(explanations, []),
        sentence=sentence,
    )


def _as_if_coarse(diagnosis: Diagnosis) -> str:
    """What the size of the error says, where correct attention is nearly right."""
    for name in ("float32", "float16", "bfloat16"):
        eps = torch.finfo(getattr(torch, name)).eps
        if torch.finfo(getattr(torch, diagnosis.dtype)).eps < eps >= diagnosis.residual / 4:
            return (
                f"the error is as small as if some step were done in {name}; if that is meant, "
                f"leave {diagnosis.dtype} out of dtypes="
            )
    return ""


def _sentence(name: str, best: Explanation, rest: Sequence[Explanation], other: Explanation) -> str:
    text = f"{name} equals {_described(best)}"
    if rest:
        ties = "; or ".join(_described(one) for one in rest[:_MOST_TIES])
        text += f" (or, which these cases cannot tell apart: {ties})"
    text += f"; residual {number_text(best.fit.residual)}"
    if math.isfinite(other.fit.residual):
        text += f", next best {number_text(other.fit.residual)}"
    return text


def _described(one: Explanation) -> str:
    parts = [filled(defect, one.constant) for defect in one.defects]
    return f"attention {', and '.join(parts)}"


def filled(defect: Defect, constant: float | None) -> str:
    """Return the sentence of a defect, with its constant filled in."""
    return defect.sentence.format(constant=math.nan if constant is None else constant)
