"""What an attention that was captured is held to: the specification, and what its module carries.

A scale that was seen is what it is held to, unless it contradicts one of these, or is one of the
usual mistakes: none, its inverse, the embedding's, the same twice.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor

from ..attention.call import Call
from ..attention.plan import Case
from ..attention.vocabulary import permits
from ..capture.carried import Carried
from ..capture.record import AttentionRecord
from .spec import AttentionSpec

# How far a number may be off by rounding: some models compute their scale in half precision.
_ALIKE = 1e-3
# What a token sees, as it is declared.
_RULES = ("window", "chunk", "prefix", "sink_keys", "may_see")
# How far rows are from one length that a normalisation gave them.
_NORMALISED = 1e-3


@dataclass(frozen=True, eq=False)
class Held:
    """What an attention should be."""

    case: Case  # What it is held to, by all that is declared
    used: Case  # The same without what contradicts what the record says that it did
    # What the module carries and the attention did without, in words, by the names of the defects;
    # each follows "attention"
    lacks: dict[str, str]
    hint: str = ""  # What could not be decided


def held_to(record: AttentionRecord, spec: AttentionSpec, name: str, *, own: bool) -> Held:
    """Return what a record is held to; `own`: whether it attends to its own sequence."""
    used = _case(record, spec, name, own=own)
    scale, hint = _scale_of(record, spec)
    case, lacks = replace(used, scale=scale), dict[str, str]()
    if not math.isclose(case.factor, used.factor, rel_tol=_ALIKE):
        carried = _against(record) if spec.scale is None else None
        if carried is None:  # the search tells what it is
            used = case
        else:
            lacks["scale_dropped"] = (
                f"whose scores are multiplied by {used.factor:.4g}, where its module carries "
                f"{carried.name} = {carried.value:.4g}"
            )
    if not record.strange and record.score_mod is None:
        for one in record.carried:
            case, words = _with_carried(one, case, record, spec)
            lacks |= {f"{one.feature}_dropped": words} if words else {}
    return Held(case, used, lacks, hint)


# --- what the record says, and what is declared of it


def _case(record: AttentionRecord, spec: AttentionSpec, name: str, *, own: bool) -> Case:
    """The attention as the record says it was made, and as it is declared."""
    assert record.query is not None
    known = record.scale is not None
    call = (record if known else replace(record, scale=record.query.shape[-1] ** -0.5)).as_call()
    said = {field.name: _wide(getattr(call, field.name)) for field in fields(Call)}
    mask, bias, fully_masked = record.mask_besides_causality, said["bias"], spec.fully_masked
    said["fully_masked"] = "zero" if fully_masked == "undefined" else fully_masked
    if bias is not None:
        bias = bias.masked_fill(~permits(bias), 0.0)
    if record.hides_softly:
        said["fully_masked"] = "undefined"
    said |= {"mask": _wide(mask), "bias": bias if bias is not None and bool(bias.any()) else None}
    declared = _declared(record, spec, own=own)
    case = Case(**{**said, **declared}, name=name, dtype=record.dtype)
    # What is declared of a block is all that it sees in a layer, not the most that it may.
    return replace(case, mask=_beyond(case, exact=spec.is_block and any(map(declared.get, _RULES))))


def _wide(value: Any) -> Any:
    if not isinstance(value, Tensor):
        return value
    return value.detach().cpu().double() if value.is_floating_point() else value.cpu()


def _declared(record: AttentionRecord, spec: AttentionSpec, *, own: bool) -> dict[str, Any]:
    query_len, key_len = record.shape[2:]
    always = {n: _wide(value) for n, value in spec.always(record.shape[1]).items()}
    found: dict[str, Any] = {
        n: always[n] for n in ("softcap", "sinks", "alibi", "score_mod") if n in always
    }
    for name in {"sinks", "alibi"} & found.keys() if record.heads is not None else ():
        found[name] = found[name][record.heads]
    if {"alibi", "score_mod"} & found.keys():
        found["bias"] = None  # in place of what was seen
    causal, rules = record.causal, dict[str, Any]()
    # The claim of a block is about its own sequence, not about one that it looks things up in, nor
    # about windows that its sequences were cut into.
    cut = spec.inputs is not None and (record.shape[0] > len(spec.inputs) or bool(record.doubt))
    if not spec.is_block or (own and query_len == key_len and not cut):
        causal = (spec.causal if spec.is_block else None) or causal
        rules = {n: always[n] for n in _RULES if always.get(n)}
        if isinstance(spec.documents, Tensor):
            of_all = spec.documents.cpu()[: record.shape[0] if spec.documents.ndim > 1 else None]
            rules["documents"] = (of_all.expand(record.shape[0], -1),) * 2
    found["alignment"] = causal or "top_left"
    # By default the top left is declared, which what was captured may have been told otherwise.
    if rules and spec.causal == "bottom_right":
        found["alignment"] = spec.causal
    # A window that ends at the own position and begins nowhere is causality.
    always_causal = rules.get("window") == (None, 0)
    if always_causal:
        del rules["window"]
    return {**found, **rules, "causal": causal is not None or always_causal}


def _beyond(case: Case, *, exact: bool) -> Tensor | None:
    """What the mask hides besides what is declared; None if that is nothing."""
    # A mask that was to make attention causal, and is wrong, would else be taken as told. `exact`:
    # what is declared says all that is seen, but for padding.
    mask = case.mask
    if mask is None or bool(mask.all()):
        return None
    if case.query_len > 1 and torch.equal(mask, mask[..., :1, :].expand_as(mask)):
        return mask  # padding: it was not to make it causal
    if exact:  # keys that nobody sees are padding, and queries that see nothing
        mask = mask.any(-2, keepdim=True) & mask.any(-1, keepdim=True)
    else:
        mask = mask | ~replace(case, mask=None, bias=None).visible()
    # Nobody hides all tokens from themselves on purpose: then the mask is one place off.
    square = case.causal and case.query_len == case.key_len
    if square and not bool(mask.expand(case.shape).diagonal(dim1=-2, dim2=-1).any()):
        return None
    return None if bool(mask.all()) else mask


# --- the scale


def _scale_of(record: AttentionRecord, spec: AttentionSpec) -> tuple[float | None, str]:
    """The scale that a record is held to, and a word where that could not be decided."""
    assert record.query is not None
    used, width = record.scale, record.query.shape[-1]
    default = width**-0.5
    carried = [one for one in record.carried if one.feature == "scale"]
    if spec.scale is not None:
        # Who scales queries before they are rotated may well say that scores are not scaled.
        of_scores = used is not None and _alike(math.prod(record.scale_steps), spec.scale)
        return (used if of_scores else spec.scale), ""
    if used is None:
        return (carried[0].value if carried else default), ""
    if _alike(used, default) and not carried:
        return used, ""
    if isinstance(spec.softcap, float | int) and _alike(used * spec.softcap, default):
        return default, ""  # what is capped is divided by the softcap before
    unsure = any(math.isnan(factor) for factor in record.scaled_before)
    against = _against(record)
    if against is not None and not unsure:
        # Some carry what scores are divided by.
        either = (against.value, 1 / against.value)
        return min(either, key=lambda number: abs(math.log(number / default))), ""
    named = any(one.name.startswith("config.") for one in carried)
    heads = record.shape[1]
    of_embedding = heads > 1 and _alike(used, (heads * width) ** -0.5)
    if not unsure and not named and of_embedding:
        return default, ""
    if carried or _alike(used, default):
        return used, ""
    hint = (
        f"its scores are multiplied by {used:.6g}, not by head_dim ** -0.5 = {default:.6g}: "
        f"declare scale={used:.6g} if that is meant"
    )
    twice = sum(_alike(step, default) for step in _steps(record)) > 1
    # Who learns what is added to the scores, as T5 does, may learn their scale as well.
    biased = record.bias is not None and bool(
        (record.bias * permits(record.bias)).nan_to_num().any()
    )
    mistaken = (_alike(used, 1.0) and not biased) or _alike(used, 1 / default) or twice
    if mistaken and not unsure and not _normalised(record):
        return default, ""
    return used, hint


def _alike(number: float, other: float) -> bool:
    return math.isclose(number, other, rel_tol=_ALIKE)


def _against(record: AttentionRecord) -> Carried | None:
    """A scale that the module carries and its attention does not have, if there is one."""
    if record.scale is None:
        return None
    used = (record.scale, *_steps(record))
    for one in (one for one in record.carried if one.feature == "scale"):
        # Some are divided by.
        if not any(_alike(one.value, step) or _alike(1 / one.value, step) for step in used):
            return one
    return None


def _steps(record: AttentionRecord) -> tuple[float, ...]:
    return *record.scale_steps, *(factor for factor in record.scaled_before if factor != 1)


def _normalised(record: AttentionRecord) -> bool:
    """Whether queries and keys went through a normalisation, which takes the place of a scale."""
    # Then all rows lie on one sphere, or on one ellipsoid after a gain of each channel.
    for tensor in (record.query, record.key):
        assert tensor is not None
        rows = _wide(tensor).flatten(0, -2).square()
        size = rows.mean(-1)
        if len(rows) > 2 and float(size.std()) <= _NORMALISED * float(size.mean()):
            continue
        if len(rows) < 3 * rows.shape[1]:
            return False
        one = torch.ones(len(rows), 1, dtype=torch.float64)
        gains = torch.linalg.lstsq(rows, one, driver="gelsd").solution
        if bool((gains <= 0).any()) or float((rows @ gains - one).std()) > _NORMALISED:
            return False
    return True


# --- what the module carries


def _with_carried(
    one: Carried, case: Case, record: AttentionRecord, spec: AttentionSpec
) -> tuple[Case, str]:
    """The case with what the module carries, and in words how the record goes without it."""
    given = f"that its module carries ({one.name})"
    if one.feature == "softcap" and spec.softcap is None:
        words = f"without the softcap of {one.value:g} {given}"
        if case.softcap is not None:
            words = f"with a softcap of {case.softcap:g}, not that of {one.value:g} {given}"
        same = case.softcap is not None and _alike(case.softcap, one.value)
        return (case, "") if same else (replace(case, softcap=one.value), words)
    per_head = one.feature == "sinks" and len(one.value) == record.shape[1]
    if per_head and spec.sinks is None and case.sinks is None:
        sinks = _wide(one.value) if record.heads is None else _wide(one.value)[record.heads]
        return replace(case, sinks=sinks), f"without the sinks {given}"
    if one.feature in ("window", "chunk") and spec.window is None and spec.chunk is None:
        mask = _limited(record, one)
        if mask is not None:
            words = f"without the {one.feature} of {one.value} keys {given}"
            return replace(case, mask=mask), words
    return case, ""


def _limited(record: AttentionRecord, one: Carried) -> Tensor | None:
    """The mask with a limit that it goes without altogether; None if it has any, or needs none."""
    # A query stands at the last key that it may see. Where all see the same first key, and all keys
    # from there, and one sees more keys than the limit allows, there is none.
    if record.mask is None or record.shape[2] < 2:
        return None
    seen = record.mask.cpu().expand(record.shape_here)
    key, key_len = torch.arange(seen.shape[-1]), seen.shape[-1]
    last = torch.where(seen, key, -1).amax(-1, keepdim=True)
    first = torch.where(seen, key, key_len).amin(-1, keepdim=True)
    some, lowest = last >= 0, first.amin(-2, keepdim=True)
    causal = ((last.diff(dim=-2) == 1) | ~some[..., :-1, :]).all()
    whole = (seen == ((key >= first) & (key <= last))).all() & ((first == lowest) | ~some).all()
    # Some count the own key, and some do not.
    most = one.value + (one.feature == "window")
    if not bool(causal & whole) or int((last - first).max()) < most:
        return None
    behind = key > last - one.value
    limited: Tensor = seen & (
        key // one.value == last // one.value if one.feature == "chunk" else behind
    )
    return limited
