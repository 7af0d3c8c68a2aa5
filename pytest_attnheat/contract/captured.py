"""What a trace tells: whether each attention in it is what its queries, keys and values make."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ..assertions.behaviour.sequences import SequenceModel
from ..assertions.rows import assert_row_stochastic
from ..attention.chunks import index_of
from ..attention.tolerance import answer_tolerance, row_tolerance
from ..attention.vocabulary import DeclaredFullyMasked, both
from ..callables import borrowed, exits_as_errors, modules_in
from ..capture import CaptureError
from ..capture.capturing import capture_attention
from ..capture.record import AttentionRecord, Statistics
from ..capture.trace import Trace
from ..failure import Failure, Place, number_text
from .asking import model_of
from .diagnosis import Diagnosis, residual_text
from .examination import Skipped
from .explaining import explained, shown, where_wrong
from .held import Held, held_to
from .matching import Explanation, measure
from .probing import Probe, one_thread
from .searching import Search
from .spec import AttentionSpec

# Above so many weights a diagnosis takes too long: fewer batch entries and heads are looked at.
_MOST_WEIGHTS = 200_000
# What tells a bias of 1 from one of 0, and how far rounding moves one.
_HALF, _ROUNDED = 0.5, 1e-4


@exits_as_errors()
def records_of(
    spec: AttentionSpec, call: Callable[[], object] | None = None
) -> Sequence[AttentionRecord]:
    """Return the records of a specification: those of its trace, or of its block at work."""
    if isinstance(spec.subject, AttentionRecord):
        return [spec.subject]
    if isinstance(spec.subject, Trace):
        return list(spec.subject)
    return _captured(model_of(spec), spec.inputs, call)


def _captured(
    model: SequenceModel, inputs: Tensor | None, call: Callable[[], object] | None
) -> list[AttentionRecord]:
    subject = model.module
    found = [subject] if isinstance(subject, nn.Module) else modules_in(subject)
    if len(found) != 1 or inputs is None:
        raise Skipped("attention inside is captured of one module, or of what calls one")
    module = found[0]
    with borrowed(module, inputs), torch.no_grad():
        module.eval()
        try:
            with capture_attention(module, allow_unseen=True) as trace:
                model(inputs) if call is None else call()
        except CaptureError as error:
            raise Skipped(str(error)) from None
    return list(trace)


def diagnose_records(
    spec: AttentionSpec, call: Callable[[], object] | None = None, *, search: bool = True
) -> Diagnosis:
    """Diagnose the first attention that is not what it is declared to be, or any if all are."""
    last: Diagnosis | None = None
    reasons: list[str] = []
    for diagnosis in diagnoses(spec, reasons, call, search=search):
        last = diagnosis
        if not diagnosis.healthy:
            return diagnosis
    if last is None:
        raise ValueError(f"diagnose: {spec.name} has no attention to judge ({_listed(reasons)})")
    return replace(
        last,
        subject=spec.name,
        refused=dict(reason.partition(": ")[::2] for reason in reasons),
        sentence=f"attention in {spec.name}, as it was captured, is what its queries, keys and "
        "values make" + (", where it can be judged" if reasons else ""),
    )


def diagnoses(
    spec: AttentionSpec,
    reasons: list[str],
    call: Callable[[], object] | None = None,
    *,
    search: bool = True,
) -> Iterator[Diagnosis]:
    """Diagnose one record after the other; add the reasons why some cannot be."""
    # What made a wrong output is only searched for in the first that is wrong: it takes seconds.
    records = records_of(spec, call)
    plain = records if call is None else records_of(spec)
    looked_up = _looked_up(spec, plain)
    once = Counter(record.layer for record in plain)  # a call may run the block several times
    for record in records:
        reason = _not_told(record)
        if reason:
            reasons.append(f"{_place(record)}: {reason}")
            continue
        small = _smaller(record)
        if small is None:
            reasons.append(f"{_place(record)}: {record.shape} is too large to diagnose")
            continue
        own = (record.layer, record.call % (once[record.layer] or 1)) not in looked_up
        diagnosis = _diagnosed(small, spec, own=own, search=search)
        if isinstance(diagnosis, str):
            reasons.append(f"{_place(record)}: {diagnosis}")
            continue
        search = search and diagnosis.healthy
        yield diagnosis


def _looked_up(spec: AttentionSpec, records: Sequence[AttentionRecord]) -> set[tuple[str, int]]:
    """The attention of a causal block that looks things up elsewhere than in its own sequence."""
    # Its keys are the same for other inputs: a memory, as in cross-attention. Causality is not
    # about them.
    inputs = spec.inputs
    if inputs is None or spec.causal is None or torch.equal(inputs, inputs.flip(1)):
        return set()
    others = {(r.layer, r.call): r.key for r in records_of(replace(spec, inputs=inputs.flip(1)))}
    return {
        (record.layer, record.call)
        for record in records
        if record.key is not None
        and (other := others.get((record.layer, record.call))) is not None
        and torch.equal(record.key, other)
    }


def _diagnosed(
    record: AttentionRecord, spec: AttentionSpec, *, own: bool, search: bool
) -> Diagnosis | str:
    """Diagnose one record; a reason where what was done to its scores is not understood."""
    name = _place(record)
    # Weights that are 0 after the softmax tell of a mask where they were to be divided again.
    late = record.masked_late
    if late is not None:
        record = replace(record, given_mask=both(record.given_mask, late))
    held = held_to(record, spec, name, own=own)
    assert record.output is not None
    output = record.output.detach().double().cpu()
    probe, used = (
        Probe(case, output, record.dtype, answer_tolerance(record.dtype))
        for case in (held.case, held.used)
    )
    # Small by now, whatever the capture allows.
    weights = replace(record, most_bytes=_MOST_WEIGHTS * 8).compute_weights(torch.float64)
    with one_thread():
        diagnosis = explained(name, [probe], {}, search=False)
        told = partial(explained, name, [probe], {}, lambda one: weights.cpu(), search=search)
        if diagnosis.healthy:
            notes = (held.hint,) if held.hint else ()
            return replace(diagnosis, inferred_weights=weights.cpu(), notes=notes)
        fit = measure([used])
        if held.lacks and fit.excess <= 1:
            diagnosis = _lacking(diagnosis, held, fit.residual, probe)
        elif record.strange:
            known = Search([probe])
            found = known.by_constant([Explanation()])
            factor = next((one for one in found if one.reproduces), None)
            named = () if factor is None or spec.scale is not None else factor.names
            if factor is not None and named == ("temperature",):
                return _up_to_a_scale(diagnosis, held.case.factor * (factor.constant or 1.0))
            if not any(one.reproduces for one in known.singles):
                return f"its scores {record.strange}"
            diagnosis = told()
        else:
            diagnosis = _added_as_numbers(record, spec, probe, own=own) or told()
    return replace(diagnosis, inferred_weights=weights.cpu())


def _added_as_numbers(
    record: AttentionRecord, spec: AttentionSpec, probe: Probe, *, own: bool
) -> Diagnosis | None:
    """The diagnosis of a mask of 0 and 1 that is added to the scores, where a bias seemed to be."""
    if record.bias is None:
        return None
    above = record.bias.double() - record.bias.double().amin(-1, keepdim=True)
    one, flat = above > _HALF, above.amax(-1, keepdim=True) < _HALF
    if bool(flat.all()) or float((above - one.double()).abs().max()) > _ROUNDED:
        return None
    name = _place(record)
    for seen in (one | flat, ~one):
        masked = replace(record, bias=None, given_mask=both(record.given_mask, seen))
        case = held_to(masked, spec, name, own=own).case
        found = explained(name, [replace(probe, case=case)], {})
        if found.defects == ("mask_added_as_number",):
            return found
    return None


def _up_to_a_scale(diagnosis: Diagnosis, scale: float) -> Diagnosis:
    return replace(
        diagnosis,
        healthy=True,
        residual=0.0,
        sentence=f"{diagnosis.subject} is attention as declared, if its scale is {scale:.6g}",
        notes=(f"its scale was not seen: declare scale={scale:.6g} if that is meant",),
    )


def _lacking(diagnosis: Diagnosis, held: Held, residual: float, probe: Probe) -> Diagnosis:
    """Say what the module carries and its attention was made without."""
    words = ", and ".join(held.lacks.values())
    return replace(
        diagnosis,
        defects=tuple(held.lacks),
        next_best=diagnosis.residual,
        next_best_defects=("correct attention",),
        residual=residual,
        sentence=f"{diagnosis.subject} equals attention {words}; residual "
        f"{residual_text(residual)}",
        where=where_wrong([probe]),
        **shown(lambda one: None, [probe]),
    )


def _not_told(record: AttentionRecord) -> str:
    """Why a record cannot be judged; empty if it can."""
    parts = (record.query, record.key, record.value, record.output)
    if any(part is None for part in parts):
        unkept = not record.strange or record.output is None
        return "its queries and keys are not known" if unkept else f"its scores {record.strange}"
    if record.dropout > 0:
        mode = "training" if record.training else "evaluation"
        return f"dropout of {record.dropout:g} was applied in {mode} mode"
    if record.queries is not None:
        return "some queries were left out"
    if 0 in record.shape_here:
        return "it is empty"
    if not all(bool(part.isfinite().all()) for part in parts[:3] if part is not None):
        return "its queries, keys or values are not finite"
    return ""


def _smaller(record: AttentionRecord) -> AttentionRecord | None:
    """The record, or some of its batch entries and heads, or None if one is too large."""
    batch, heads, query_len, key_len = record.shape_here
    one = query_len * key_len
    if one > _MOST_WEIGHTS:
        return None
    if batch * heads * one <= _MOST_WEIGHTS:
        return record
    entries = min(batch, 2)
    some = ("query", "key", "value", "output", "given_mask", "bias", "sink_weights", "kept_weights")
    kept: dict[str, Any] = {
        name: whole if whole is None or whole.shape[0] == 1 else whole[:entries]
        for name, whole in ((name, getattr(record, name)) for name in some)
    }
    record = replace(record, shape=(entries, *record.shape[1:]), **kept)
    if entries * heads * one <= _MOST_WEIGHTS:
        return record
    numbers = range(heads) if record.heads is None else record.heads.tolist()
    return record.select(heads=list(numbers)[: max(_MOST_WEIGHTS // (entries * one), 1)])


def _place(record: AttentionRecord) -> str:
    call = f", call {record.call}" if record.call else ""
    return f"attention in {record.layer}{call}" if record.layer else f"attention{call}"


def _listed(reasons: Sequence[str]) -> str:
    return "; ".join(reasons[:3]) + ("; ..." if len(reasons) > 3 else "") or "nothing was captured"


def assert_rows(record: AttentionRecord, fully_masked: DeclaredFullyMasked) -> None:
    """Assert that the rows of a record are distributions, or what is declared if fully masked."""
    if record.kind in ("linear", "mixed"):  # no softmax makes its rows sum to 1
        return
    # Weights are kept in a dtype of the reader's choice; what rounded them is the model's.
    coarser = max(record.dtype, record.weights_dtype, key=lambda dtype: torch.finfo(dtype).eps)
    tolerance = row_tolerance(coarser, record.shape[3])
    if record.statistics is not None:
        _sums(record, record.statistics, fully_masked, tolerance)
    elif fully_masked != "undefined":
        mask = None if record.mask_lost else record.judged_mask
        assert_row_stochastic(record, mask=mask, fully_masked=fully_masked, tolerance=tolerance)
    elif record.mask_lost or record.mask is None or bool(record.mask.any(-1).all()):
        assert_row_stochastic(record, tolerance=tolerance)


def _sums(
    record: AttentionRecord,
    statistics: Statistics,
    fully_masked: DeclaredFullyMasked,
    tolerance: float,
) -> None:
    """Judge rows by their sums. Which may attend to nothing, statistics do not tell."""
    sums, largest = statistics.row_sum, statistics.maximum
    if record.sink_weights is not None:
        sums = sums + record.sink_weights.to(sums)
    right = (sums - 1).abs() <= tolerance
    if fully_masked in ("zero", "undefined"):
        right |= (sums == 0) & (largest == 0)
    if fully_masked in ("nan", "undefined"):
        right |= sums.isnan()
    if bool(right.all()):
        return
    off = (sums - 1).abs().nan_to_num(nan=torch.inf).masked_fill(right, -1.0)
    worst = index_of(off.argmax(), off.shape)
    found = float(sums[worst])
    said = f"weights{[*worst]} sums to {number_text(found)} (allowed {tolerance:.1e})"
    raise Failure(
        "", "rows do not sum to 1", broken=int((~right).sum()), of=right.numel(),
        layer=layer_of(record), worst=Place(said, worst, found), tolerance=tolerance,
    )  # fmt: skip


def layer_of(record: AttentionRecord) -> str:
    """Return where a record was captured, as failures name it."""
    return f"{record.layer or '(no module)'}, call {record.call}"


def causal_inside(spec: AttentionSpec) -> bool:
    """Whether some attention inside a block is seen to be causal, on the inputs of the block."""
    try:
        return any(_is_causal(record) for record in records_of(spec))
    except Exception:  # the checks tell why
        return False


def _is_causal(record: AttentionRecord) -> bool:
    """Whether no query of its own sequence has any weight on a later key."""
    query_len, key_len = record.shape[2:]
    if record.causal is not None or query_len != key_len or query_len < 2:
        return record.causal is not None
    return not bool(record.compute_weights().triu(1).any())
