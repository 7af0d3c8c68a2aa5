"""`diagnose`: what a wrong implementation of attention computes instead.

Its answers to small cases are compared with attention that carries each known defect, and then
with two defects at once. What reproduces every answer to within rounding is named; where nothing
does, it is said what was excluded, and where the error is.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from pytest_attnheat.contract.defects import DEFECTS, Defect
from pytest_attnheat.contract.matching import (
    NOWHERE,
    Explanation,
    Search,
    errors,
    explain_alone,
    explain_by_constant,
    explain_in_pairs,
    measure,
    nearly,
    rounding,
)
from pytest_attnheat.contract.plan import Case, Plan, carry_out
from pytest_attnheat.contract.probing import (
    Blueprint,
    Probe,
    ask,
    blueprints,
    in_dtype,
    probe,
    with_identity,
)
from pytest_attnheat.contract.spec import (
    AttentionSpec,
    CausalAlignment,
    LostRows,
    as_spec,
)
from pytest_attnheat.heatmaps.terminal import format_heatmap
from pytest_attnheat.scoring import seed_number

if TYPE_CHECKING:
    from pytest_attnheat.heatmaps.figure import HeatmapFigure

# Not float64 first: code that computes some steps in float32 is not wrong in float32.
_DTYPES = ("float32", "float64", "float16", "bfloat16")
# Above so many weights in all cases, pairs take too long.
_MOST_WEIGHTS_IN_PAIRS = 40_000
# Maps in a message.
_MOST_ROWS, _MOST_KEYS = 8, 16
_LISTED = 4
# An explanation that leaves more than this of the error is not worth naming.
_EXPLAINS = 0.2


@dataclass(frozen=True, eq=False)
class Diagnosis:
    """What an implementation computes.

    Attributes:
        subject: Its name.
        dtype: The dtype in which it was diagnosed, or in all of which it is correct.
        healthy: Whether correct attention reproduces every answer.
        defects: The names of the defects that together reproduce every answer; none if it is
            healthy or if no known defect does.
        alternatives: Other defects that reproduce them as well, or nearly: these cases cannot
            tell them apart.
        residual: The worst relative rms over the cases: of the defects named, or of correct
            attention where none are.
        next_best: That of the best explanation that is excluded; inf if there is none.
        next_best_defects: Its defects.
        constant: The constant that was fitted, if one of the defects has one.
        sentence: What it computes.
        where: Which "cases", "heads", "batch" entries, "queries" ... are wrong, and which are not.
        excluded: The known defects that were compared and do not reproduce the answers.
        unseen: The known defects that would change nothing in these cases.
        refused: Why cases were not answered, by name.
        notes: What was noticed besides, and is no defect.
        compared: How many plans were compared.
        expected_weights: (batch, heads, query_len, key_len) of correct attention on the case that
            `case` names, float64.
        inferred_weights: What the subject uses as weights there, found by values that are an
            identity matrix; None where it cannot be asked.
        case: The case that is shown.
        place: The worst map in it: (batch, head).
    """

    subject: str
    dtype: str
    healthy: bool
    defects: tuple[str, ...] = ()
    alternatives: tuple[tuple[str, ...], ...] = ()
    residual: float = 0.0
    next_best: float = math.inf
    next_best_defects: tuple[str, ...] = ()
    constant: float | None = None
    sentence: str = ""
    where: dict[str, str] = field(default_factory=dict)
    excluded: tuple[str, ...] = ()
    unseen: tuple[str, ...] = ()
    refused: dict[str, str] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    compared: int = 0
    expected_weights: Tensor | None = None
    inferred_weights: Tensor | None = None
    case: str = ""
    place: tuple[int, int] = (0, 0)

    def __str__(self) -> str:
        """The message: the sentence, where, what else it might be, and the weights as text."""
        lines = [f"diagnose: {self.sentence}"]
        entries = {
            **self.where,
            "or": "; ".join(" and ".join(names) for names in self.alternatives),
            "next best": self._next_best(),
            "note": "; ".join(self.notes),
            "refused": "; ".join(f"{name} ({why})" for name, why in self.refused.items()),
            "compared": self._compared(),
        }
        width = max((len(name) for name, text in entries.items() if text), default=0) + 2
        lines += [f"  {name:<{width}}{text}" for name, text in entries.items() if text]
        if not self.healthy:
            lines += [f"  {line}".rstrip() for line in self._triptych()]
        return "\n".join(lines)

    def draw(self) -> HeatmapFigure:
        """Draw the weights: what is expected, what was inferred, and the difference.

        Returns:
            A figure of `show_heatmaps`; the expected weights alone where none were inferred.

        Raises:
            ValueError: There are no weights, as for a healthy subject.
        """
        from pytest_attnheat.heatmaps.figure import show_heatmaps

        maps = self._maps()
        if not maps:
            raise ValueError(f"{self.subject}: there are no weights to draw; it is healthy")
        return show_heatmaps(
            torch.stack(list(maps.values())).unsqueeze(0),
            xlabel="Keys",
            ylabel="Queries",
            titles=list(maps),
            title=f"{self.subject}: {self.case}, batch {self.place[0]}, head {self.place[1]}",
            figsize=None,
            cmap="RdBu_r",
            vmin=-1.0,
            vmax=1.0,
        )

    def _next_best(self) -> str:
        if self.healthy or not self.next_best_defects or math.isinf(self.next_best):
            return ""
        if not self.defects and self.next_best > _EXPLAINS * self.residual:
            return ""
        return f"{' and '.join(self.next_best_defects)}, residual {_number(self.next_best)}"

    def _compared(self) -> str:
        if not self.compared:
            return ""
        text = f"{self.compared} ways of being wrong"
        if self.unseen:
            text += f"; {len(self.unseen)} defects change nothing in the cases that were answered"
        return text

    def _maps(self) -> dict[str, Tensor]:
        if self.expected_weights is None:
            return {}
        maps = {"expected": self.expected_weights[self.place]}
        if self.inferred_weights is not None:
            maps["inferred"] = self.inferred_weights[self.place]
            maps["difference"] = maps["inferred"] - maps["expected"]
        return maps

    def _triptych(self) -> list[str]:
        maps = self._maps()
        if not maps:
            return []
        blocks = []
        for name, weights in maps.items():
            part = weights[:_MOST_ROWS, :_MOST_KEYS]
            shown = part.abs() if name == "difference" else part
            title = "|difference|" if name == "difference" else name
            notes = None if name != "difference" else [""] * part.shape[0]
            blocks.append(format_heatmap(shown, title=title, notes=notes).splitlines())
        place = f"{self.case}, head {list(self.place)}"
        return [f"{place}: weights as inferred from the output", *_side_by_side(blocks)]


def _side_by_side(blocks: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(map(len, block)) for block in blocks]
    rows = zip(*blocks, strict=True)
    return [
        "   ".join(f"{text:<{width}}" for text, width in zip(row, widths, strict=True)).rstrip()
        for row in rows
    ]


def diagnose(subject: AttentionSpec | Callable[..., Any], *, seed: int = 0) -> Diagnosis:
    """Tell what an implementation of attention computes instead.

    It is called on about 20 small cases, in float64 where it takes that, else in the next finer
    dtype it declares; where it is correct, in the other dtypes as well. Its answers are compared
    with attention that carries each of the known defects, and if none reproduces them with pairs.
    Cases that it refuses with an exception are noted. Nothing is compared more closely than
    rounding allows (see `contract.matching`).

    Args:
        subject: A specification, or a callable with the signature of
            `torch.nn.functional.scaled_dot_product_attention`.
        seed: The seed of the inputs, and of the subject's own randomness.

    Returns:
        The diagnosis; `print` it.

    Raises:
        TypeError: The subject cannot be called, or the seed is not a whole number.
        ValueError: The subject answered no case at all; its first refusal is quoted.
    """
    spec = as_spec(subject)
    seed = seed_number(seed)
    sound: dict[str, float] = {}
    refused: dict[str, str] = {}
    last: Diagnosis | None = None
    for name in (name for name in _DTYPES if name in spec.dtypes):
        with _one_thread(), torch.random.fork_rng(devices=_cuda(spec)):
            torch.manual_seed(seed)
            probes, refused_here = _answers(spec, seed, getattr(torch, name))
            if not probes:
                refused[name] = next(iter(refused_here.values()), "")
                continue
            last = _diagnosed(spec, seed, probes, refused_here)
        if not last.healthy:
            return replace(last, notes=(*last.notes, *_sound_elsewhere(sound)))
        sound[name] = last.residual
    if last is None:
        reasons = "; ".join(f"{name}: {why}" for name, why in refused.items())
        raise ValueError(f"diagnose: {spec.name} answered no case ({reasons})")
    residuals = ", ".join(f"{_number(residual)} in {name}" for name, residual in sound.items())
    return replace(
        last,
        dtype=", ".join(sound),
        refused={**last.refused, **refused},
        residual=max(sound.values()),
        sentence=f"{spec.name} is attention as declared; residual {residuals}",
    )


def diagnose_output(
    output: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    mask: Tensor | None = None,
    causal: CausalAlignment | None = None,
    window: tuple[int, int] | None = None,
    scale: float | None = None,
    fully_masked: LostRows = "zero",
    name: str = "output",
) -> Diagnosis:
    """Tell what made a given output, from its own inputs.

    Fewer defects can be told apart than by `diagnose`, which chooses its inputs: those that
    reproduce the output equally well are all named.

    Args:
        output: (batch, heads, query_len, value_dim)
        query: (batch, heads, query_len, head_dim)
        key: (batch, key_heads, key_len, head_dim); heads are a multiple of key_heads.
        value: (batch, key_heads, key_len, value_dim)
        mask: Boolean, True where a query may attend, broadcastable to the weights.
        causal: What it should be: `"top_left"` or `"bottom_right"`; None for not causal.
        window: How many keys before and after its own position a query should attend to.
        scale: What scores should be multiplied by; head_dim ** -0.5 by default.
        fully_masked: What rows without permitted keys should be.
        name: What the output is called.

    Returns:
        The diagnosis. There are no inferred weights.

    Raises:
        TypeError: A tensor is not one of floating point numbers, or the mask is not boolean.
        ValueError: Shapes do not fit.
    """
    _check_tensors(output, query, key, value, mask)
    case = Case(
        name=name,
        query=query.detach().double().cpu(),
        key=key.detach().double().cpu(),
        value=value.detach().double().cpu(),
        mask=None if mask is None else mask.detach().cpu(),
        causal=causal is not None,
        alignment=causal or "top_left",
        window=window,
        scale=scale,
        fully_masked=fully_masked,
    )
    given = output.detach().double().cpu()
    probes = [Probe(case, given, output.dtype, rounding(output.dtype))]
    with _one_thread():
        return _explained(name, probes, {})


@contextmanager
def _one_thread() -> Iterator[None]:
    """Thousands of small tensors: threads would cost several times what they save."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _check_tensors(
    output: Tensor, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None
) -> None:
    tensors = {"output": output, "query": query, "key": key, "value": value}
    for name, tensor in tensors.items():
        if not isinstance(tensor, Tensor) or not tensor.is_floating_point():
            raise TypeError(f"{name} must be a tensor of floating point numbers")
        if tensor.ndim != 4:
            raise ValueError(
                f"{name} must be (batch, heads, length, width); got {tuple(tensor.shape)}"
            )
    wanted = (*query.shape[:3], value.shape[3])
    fits = (
        output.shape == wanted
        and query.shape[3] == key.shape[3]
        and key.shape[:3] == value.shape[:3]
        and query.shape[0] == key.shape[0]
        and query.shape[1] % key.shape[1] == 0
    )
    if not fits or output.numel() == 0:
        shapes = ", ".join(f"{name} {tuple(tensor.shape)}" for name, tensor in tensors.items())
        raise ValueError(f"shapes do not fit together: {shapes}")
    if mask is not None and mask.dtype != torch.bool:
        raise TypeError(f"mask must be boolean, True where a query may attend; got {mask.dtype}")
    if mask is not None:
        torch.broadcast_to(mask, (*query.shape[:3], key.shape[2]))


# --- asking


def _cuda(spec: AttentionSpec) -> list[torch.device]:
    """The device whose generator the subject may use besides that of the CPU."""
    devices = [torch.device(name) for name in (spec.devices or ())[:1]]
    return [device for device in devices if device.type == "cuda"]


def _answers(
    spec: AttentionSpec, seed: int, dtype: torch.dtype
) -> tuple[list[Probe], dict[str, str]]:
    """Ask the subject all cases; return its answers, and why others were refused."""
    probes, refused = [], {}
    tolerance = _tolerance(spec, dtype)
    for blueprint in blueprints(spec):
        answer = probe(spec, blueprint, seed, dtype, tolerance)
        if isinstance(answer, Probe):
            probes.append(answer)
        elif _worth_a_word(spec, blueprint):
            refused[blueprint.name] = answer
    return probes, refused


def _tolerance(spec: AttentionSpec, dtype: torch.dtype) -> float:
    own = spec.tolerance or 0.0
    coarser = torch.finfo(dtype).eps / torch.finfo(torch.float32).eps
    return max(rounding(dtype), own * max(coarser, 1.0))


def _worth_a_word(spec: AttentionSpec, blueprint: Blueprint) -> bool:
    """Whether a refusal is worth a word: grouped heads are only where they are declared."""
    return blueprint.judged and (blueprint.name != "grouped heads" or spec.grouped is True)


# --- explaining


def _diagnosed(
    spec: AttentionSpec, seed: int, probes: Sequence[Probe], refused: dict[str, str]
) -> Diagnosis:
    first = probes[0]
    again = ask(spec, first.case, first.dtype)
    if not torch.equal(torch.nan_to_num(again), torch.nan_to_num(first.output)):
        random = _random(spec, first, again, refused)
        if random is not None:
            return random
    judged = [one for one in probes if one.judged]
    diagnosis = _explained(spec.name, judged, refused, spec)
    notes = [_garbage_note(one) for one in probes if not one.judged]
    return replace(diagnosis, notes=tuple(note for note in notes if note))


def _explained(
    name: str,
    probes: Sequence[Probe],
    refused: dict[str, str],
    spec: AttentionSpec | None = None,
) -> Diagnosis:
    """Say what reproduces the answers: correct attention, a defect, two, or nothing."""
    dtype = str(probes[0].dtype).removeprefix("torch.")
    correct = Explanation((), Plan(), measure(Plan(), probes))
    base = Diagnosis(name, dtype, correct.reproduces, residual=correct.fit.residual)
    if correct.reproduces:
        sentence = f"{name} is attention as declared; residual {_number(base.residual)}"
        return replace(base, sentence=sentence, refused=refused)
    diagnosis = replace(base, refused=refused, where=_where(probes), **_shown(spec, probes))
    if correct.fit.excess <= nearly(probes):
        return _almost(diagnosis, correct)
    search, explanations = _search(probes, keep=spec is not None)
    fitting, near, others = _sorted(explanations, nearly(probes))
    diagnosis = replace(diagnosis, compared=search.compared, unseen=tuple(search.unseen))
    if not fitting:
        return _unexplained(diagnosis, correct, [*near, *others])
    # The correct plan is another explanation as well: one that is excluded.
    best_other = min([*others, correct], key=lambda one: one.fit.residual)
    best, *rest = fitting
    alternatives = _unique(one.names for one in [*rest, *near])
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
        f"do, too little to tell by what; residual {_number(correct.fit.residual)}",
    )


def _search(probes: Sequence[Probe], *, keep: bool) -> tuple[Search, list[Explanation]]:
    """Look for one defect, for a constant, for two defects, for a defect and a constant."""
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
    return alone, found + constants


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
        f"{_number(correct.fit.residual)}), and no known defect gives its output"
    )
    if any(len(one.defects) > 1 for one in explanations):
        sentence += ", nor any two of them"
    # What takes away only a part of the error explains nothing.
    if nearest.fit.residual <= _EXPLAINS * correct.fit.residual:
        sentence += f"; most of the error is that of {_described(nearest)} (residual "
        sentence += f"{_number(nearest.fit.residual)})"
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
        ties = "; or ".join(_described(one) for one in rest[:_LISTED])
        text += f" (or, which these cases cannot tell apart: {ties})"
    text += f"; residual {_number(best.fit.residual)}"
    if math.isfinite(other.fit.residual):
        text += f", next best {_number(other.fit.residual)}"
    return text


def _described(one: Explanation) -> str:
    parts = [_filled(defect, one.constant) for defect in one.defects]
    return f"attention {', and '.join(parts)}"


def _filled(defect: Defect, constant: float | None) -> str:
    return defect.sentence.format(constant=math.nan if constant is None else constant)


def _number(number: float) -> str:
    return f"{number:.1e}" if number < 0.01 else f"{number:.2g}"


def _sound_elsewhere(sound: Iterable[str]) -> tuple[str, ...]:
    names = ", ".join(sound)
    return (f"correct in {names}",) if names else ()


# --- where


def _where(probes: Sequence[Probe]) -> dict[str, str]:
    """Say which cases are wrong, and what wrong rows have in common within them."""
    wrong: list[tuple[Probe, Tensor]] = []
    right: list[str] = []
    for one in probes:
        rows = _wrong_rows(one)
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


def _wrong_rows(one: Probe) -> Tensor:
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
    return f"only {noun} {_ranges(union)} of {most}"


def _queries(one: Probe, rows: Tensor) -> str:
    """Which queries are wrong in the first wrong case, where it is not all of them."""
    queries = _indices(rows.any(0).any(0))
    query_len = one.case.shape[2]
    if len(queries) == query_len:
        return ""
    return f"only queries {_ranges(queries)} of {query_len} in {one.case.name}"


def _ranges(numbers: Sequence[int]) -> str:
    if len(numbers) > 2 and list(numbers) == list(range(numbers[0], numbers[-1] + 1)):
        return f"{numbers[0]}..{numbers[-1]}"
    return ", ".join(map(str, numbers))


def _pattern(wrong: Sequence[Probe], right: Sequence[str], probes: Sequence[Probe]) -> str:
    """What the wrong cases have in common that no right one has."""
    features: dict[str, Callable[[Case], bool]] = {
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


# --- weights


def _shown(spec: AttentionSpec | None, probes: Sequence[Probe]) -> dict[str, Any]:
    """The weights of the smallest wrong case that has finite numbers, if there is one."""
    wrong = [one for one in probes if bool(_wrong_rows(one).any())]
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


# --- what no plan reproduces


def _random(
    spec: AttentionSpec, first: Probe, again: Tensor, refused: dict[str, str]
) -> Diagnosis | None:
    """The diagnosis of a subject that answers the same question in two ways, None by rounding."""
    error, allowed = errors(Plan(), replace(first, output=again))
    before, _ = errors(Plan(), first)
    if bool((error <= allowed).all()) and bool((before <= allowed).all()):
        return None
    weights = inferred_weights(spec, first)
    expected = carry_out(Plan(), first.case).weights
    kept = None if weights is None else _kept(weights, expected, rounding(first.dtype))
    between = float((again - first.output).square().mean().sqrt())
    text = f"{spec.name} gives another output when called again"
    defects: tuple[str, ...] = ()
    constant = None
    if kept is not None:
        constant = 1.0 - 1.0 / kept
        rescaled = kept > 1.0 + 1e-3
        defects = ("dropout_in_eval" if rescaled else "dropout_not_rescaled",)
        (defect,) = (one for one in DEFECTS if one.name == defects[0])
        text += f": it equals attention {_filled(defect, constant)}; every weight is 0 or "
        text += f"{kept:.6g} times what it should be (is it in training mode?)"
    return Diagnosis(
        spec.name,
        str(first.dtype).removeprefix("torch."),
        healthy=False,
        defects=defects,
        residual=between,
        constant=constant,
        sentence=text,
        where={"wrong": f"two calls with the same inputs differ by {_number(between)} (rms)"},
        refused=refused,
        expected_weights=expected,
        inferred_weights=weights,
        case=first.case.name,
    )


def _kept(weights: Tensor, expected: Tensor, tolerance: float) -> float | None:
    """The factor of the weights that dropout kept, None where it is not the same for all."""
    kept = weights != 0
    if bool(kept.all()) or not bool(kept.any()):
        return None
    factors = weights[kept] / expected[kept]
    factor = float(factors.median())
    slack = 50 * tolerance * factor
    return factor if bool(((factors - factor).abs() <= slack).all()) and factor > 0 else None


def _garbage_note(one: Probe) -> str:
    """A word about NaN in masked keys, which no plan of a healthy subject needs to feel."""
    if bool(one.output.isfinite().all()):
        return ""
    (defect,) = (defect for defect in DEFECTS if defect.seen == "garbage")
    return f"{defect.name}: it {defect.sentence.removeprefix('that ')}"
