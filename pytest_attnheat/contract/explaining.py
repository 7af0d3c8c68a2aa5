"""What reproduces the answers of a subject, and where its error lives: cases, heads, rows."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ..attention.defects import Defect
from ..attention.plan import Case, Plan, carry_out
from ..inputs import dtype_name
from .diagnosis import EXPLAINS, Diagnosis, number_list, residual_text
from .matching import Explanation, errors, measure, nearly, wrong_rows
from .observing import observed
from .probing import Probe, WeightsOf
from .searching import Search

_MOST_TIES = 4
_LISTED = 4
_LONG = 100


def explained(
    name: str,  # What answered
    probes: Sequence[Probe],  # What it was asked, and answered
    refused: dict[str, str],  # Why other cases were not answered, by name
    weights: WeightsOf = lambda one: None,  # What it used as weights
    *,
    search: bool = True,  # Whether to look for what it is instead, if it is wrong
    keep: bool = False,  # Keep what defects give, for the next subject that is asked them
) -> Diagnosis:
    """Say what reproduces the answers: correct attention, a defect, two, or nothing."""
    dtype = dtype_name(probes[0].dtype)
    correct = Explanation(fit=measure(probes))
    base = Diagnosis(name, dtype, correct.reproduces, residual=correct.fit.residual)
    if correct.reproduces:
        sentence = f"{name} is attention as declared; residual {residual_text(base.residual)}"
        return replace(base, sentence=sentence, refused=refused)
    if not search:
        return replace(base, sentence=f"{name} is not attention as declared", refused=refused)
    diagnosis = replace(base, refused=refused, where=where_wrong(probes), **shown(weights, probes))
    if all(bool(one.output.isnan().all()) for one in probes):
        return replace(
            diagnosis,
            sentence=f"{name} gives nan and nothing else, as many mistakes in its mask or in its "
            "scores make it: by which, these numbers do not tell",
        )
    if correct.fit.excess <= nearly(probes):
        # Any small change might explain that, so none is named.
        return replace(
            diagnosis,
            sentence=f"{name} is off by {correct.fit.excess:.2g} times what rounding may do, too "
            f"little to tell by what; residual {residual_text(correct.fit.residual)}",
        )
    found, explanations = _search(probes, keep=keep)
    fitting, near, others = _sorted(explanations, nearly(probes))
    diagnosis = replace(diagnosis, compared=found.compared, unseen=tuple(found.unseen))
    if not fitting:
        diagnosis = replace(diagnosis, shows=observed(weights, probes))
        return _unexplained(diagnosis, correct, [*near, *others])
    best, *rest = fitting
    alternatives = _unique(one.names for one in [*rest, *near])
    # The correct plan is another explanation as well: one that is excluded. What is named and
    # something more, or in another form, is no other.
    named = [set(names) for names in (best.names, *alternatives)]
    excluded = [one for one in others if not any(names <= set(one.names) for names in named)]
    best_other = min([*excluded, correct], key=lambda one: one.fit.residual)
    return replace(
        diagnosis, defects=best.names,
        alternatives=tuple(names for names in alternatives if set(names) != set(best.names)),
        residual=best.fit.residual, next_best=best_other.fit.residual,
        next_best_defects=best_other.names or ("correct attention",), constant=best.constant,
        excluded=_excluded(explanations, [best.names, *alternatives]),
        sentence=_sentence(name, best, rest, best_other),
    )  # fmt: skip


def _search(probes: Sequence[Probe], *, keep: bool) -> tuple[Search, list[Explanation]]:
    """Look for one defect, a constant, one in some cases alone, two, one and a constant, more."""
    search = Search(probes, keep=keep)
    found = list(search.singles)
    fitted: list[Explanation] = []

    def with_constant() -> list[Explanation]:
        fitted.extend(search.by_constant(search.singles))
        return fitted

    attempts: tuple[Callable[[], list[Explanation]], ...] = (
        lambda: search.by_constant([Explanation()]), search.in_some_cases, search.in_pairs,
        with_constant, lambda: search.step_by_step(fitted),
    )  # fmt: skip
    for attempt in attempts:
        if any(one.reproduces for one in found):
            break
        found += attempt()
    return search, found


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
    alone = {one.names for one in fitting}
    fitting = [
        one
        for one in fitting
        if not any((simple,) in alone for d in one.defects for simple in d.form_of.split())
    ]
    # Coarse steps explain less exactly than others: they come last.
    fitting.sort(key=lambda one: (len(one.defects), sum(d.seen != "exactly" for d in one.defects)))
    others.sort(key=lambda one: one.fit.residual)
    unique = {one.names: one for one in reversed(fitting)}
    return list(reversed(unique.values())), near, others


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
    # Two defects or a constant come near to much that they have nothing to do with.
    alone = [one for one in explanations if len(one.defects) == 1 and one.constant is None]
    nearest = min(alone, key=lambda one: one.fit.residual, default=correct)
    sentence = (
        f"{diagnosis.subject} is not attention as declared (residual "
        f"{residual_text(correct.fit.residual)}), and no known defect gives its output"
    )
    if any(len(one.defects) > 1 for one in explanations):
        sentence += ", nor any pair of them that was tried"
    # What takes away only a part of the error explains nothing.
    if nearest.fit.residual <= EXPLAINS * correct.fit.residual and not diagnosis.shows:
        sentence += f"; most of the error is that of {_described(nearest)} (residual "
        sentence += f"{residual_text(nearest.fit.residual)})"
    # Rounding spares no head.
    if not {"heads", "batch"} & set(diagnosis.where) and (coarse := _as_if_coarse(diagnosis)):
        sentence += f"; {coarse}"
    return replace(
        diagnosis, next_best=nearest.fit.residual, next_best_defects=nearest.names,
        excluded=_excluded(explanations, []), sentence=sentence,
    )  # fmt: skip


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
    where = ", in each case in which it is wrong," if best.partly else ""
    text = f"{name}{where} equals {_described(best)}"
    if rest:
        ties = "; or ".join(_described(one) for one in rest[:_MOST_TIES])
        text += f" (or, which these cases cannot tell apart: {ties})"
    text += f"; residual {residual_text(best.fit.residual)}"
    if math.isfinite(other.fit.residual):
        text += f", next best {residual_text(other.fit.residual)}"
    return text


def _described(one: Explanation) -> str:
    if one.names == ("scale_missing", "temperature"):
        return f"attention whose scores are multiplied by {one.constant:.6g}, whatever head_dim is"
    parts = [filled(defect, one.constant) for defect in one.defects]
    return f"attention {', and '.join(parts)}"


def filled(defect: Defect, constant: float | None) -> str:
    """Return the sentence of a defect, with its constant filled in."""
    return defect.sentence.format(constant=math.nan if constant is None else constant)


# --- where the error lives


def where_wrong(probes: Sequence[Probe]) -> dict[str, str]:
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
    return f"only {number_list(noun, union)} of {most}"


def _queries(one: Probe, rows: Tensor) -> str:
    """Which queries are wrong in the first wrong case, where it is not all of them."""
    queries = _indices(rows.any(0).any(0))
    query_len = one.case.shape[2]
    if len(queries) == query_len:
        return ""
    return f"only {number_list('query', queries)} of {query_len} in {one.case.name}"


def _pattern(wrong: Sequence[Probe], right: Sequence[str], probes: Sequence[Probe]) -> str:
    """What the wrong cases have in common that no right one has."""
    features: dict[str, Callable[[Case], bool]] = {
        "with long inputs": lambda case: case.shape[3] > _LONG,
        "with a mask": lambda case: case.mask is not None,
        "causal": lambda case: case.causal,
        "causal with a mask": lambda case: case.causal and case.mask is not None,
        "with fewer key heads than heads": lambda case: case.key.shape[1] < case.query.shape[1],
        "with other lengths of queries and keys": lambda case: case.shape[2] != case.shape[3],
        "with rows that are fully masked": lambda case: case.has_empty_rows,
        "with large scores": lambda case: case.name.startswith("large scores"),
        "with a scale= of its own": lambda case: case.scale_given,
    }
    cases = [one.case for one in probes if one.case.name in right]
    common = [text for text, has in features.items() if all(has(one.case) for one in wrong)]
    if not cases or len(wrong) < 2 or not common:  # of one case, anything might be what matters
        return ""
    for text in common:
        if not any(features[text](case) for case in cases):
            return f"all of the wrong cases are {text}, and none of the right ones"
    return ""


def _listed(names: Sequence[str]) -> str:
    shown = ", ".join(names[:_LISTED])
    return f"{shown} and {len(names) - _LISTED} more cases" if len(names) > _LISTED else shown


def shown(weights: WeightsOf, probes: Sequence[Probe]) -> dict[str, Any]:
    """The weights of the smallest wrong case that has finite numbers, if there is one."""
    wrong = [one for one in probes if bool(wrong_rows(one).any())]
    wrong.sort(key=lambda one: not bool(one.output.isfinite().all()))
    one = wrong[0]
    result = carry_out(Plan(), one.case)
    error, allowed = errors(one)
    ratio = torch.nan_to_num(error / allowed).amax(-1)
    batch, head = divmod(int(ratio.argmax()), ratio.shape[1])
    return {
        "expected_weights": result.weights,
        "inferred_weights": weights(one),
        "case": one.case.name,
        "place": (batch, head),
    }
