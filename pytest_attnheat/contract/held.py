"""What an attention that was captured is held to: the specification, and what its module carries.

A scale that was seen is what it is held to, unless it contradicts one of these, or is one of the
usual mistakes: none, the embedding's, the same scale twice.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from pytest_attnheat.attention.plan import Case
from pytest_attnheat.attention.vocabulary import HIDDEN_FROM, Alignment, permits
from pytest_attnheat.capture.carried import Carried
from pytest_attnheat.capture.record import AttentionRecord
from pytest_attnheat.contract.spec import AttentionSpec

# How far a number may be off by rounding: some models compute their scale in half precision.
_ALIKE = 1e-3
# How far rows are from one length that a normalisation gave them.
_NORMALISED = 1e-3


@dataclass(frozen=True, eq=False)
class Held:
    """What an attention should be.

    Attributes:
        case: What it is held to, by all that is declared.
        used: The same without what contradicts what the record says that it did.
        lacks: What the module carries and the attention did without, in words, by the names of
            the defects; each follows "attention".
        hint: What could not be decided.
    """

    case: Case
    used: Case
    lacks: dict[str, str]
    hint: str = ""


def held_to(record: AttentionRecord, spec: AttentionSpec, name: str, *, own: bool) -> Held:
    """Return what a record is held to.

    Args:
        record: Has query, key, value and output.
        spec: Declares what it should be.
        name: What the record is called.
        own: Whether it attends to its own sequence, where its block is causal.
    """
    used = _with_claims(_said(record, spec, name), record, spec, own=own)
    scale, hint = _scale_of(record, spec)
    case, lacks = replace(used, scale=scale), dict[str, str]()
    if spec.scale is not None or not record.carried:
        return Held(case, case, lacks, hint)
    if not math.isclose(case.factor, used.factor, rel_tol=_ALIKE):
        carried = _against(record)
        if carried is not None:
            lacks["scale_dropped"] = (
                f"whose scores are multiplied by {used.factor:.4g}, where its module carries "
                f"{carried.name} = {carried.value:.4g}"
            )
        else:  # one of the usual mistakes, which the search names
            used = case
    if not record.strange and record.score_mod is None:
        for one in record.carried:
            case, words = _without(one, case, record, spec)
            lacks |= {f"{one.feature}_dropped": words} if words else {}
    return Held(case, used, lacks, hint)


# --- what the record says, and what is declared of it


def _said(record: AttentionRecord, spec: AttentionSpec, name: str) -> Case:
    """The attention as the record says it was made."""
    query, key, value = (_wide(t) for t in (record.query, record.key, record.value))
    assert query is not None
    assert key is not None
    assert value is not None
    assert record.output is not None
    bias, fully_masked = record.bias, spec.fully_masked
    if fully_masked == "undefined":
        fully_masked = "zero"
    if bias is not None:
        if bool(((bias <= HIDDEN_FROM) & ~bias.isneginf()).any()):
            # A row of nothing but such numbers has weights that rounding makes.
            fully_masked = "undefined"
        bias = bias.masked_fill(~permits(bias), 0.0)
        bias = _wide(bias) if bool(bias.any()) else None
    mask = record.mask_besides_causality
    return Case(
        query,
        key,
        value,
        mask=None if mask is None else mask.cpu(),
        bias=bias,
        causal=record.causal is not None,
        alignment=record.causal or "top_left",
        scale=record.scale,
        softcap=record.softcap,
        sinks=_wide(record.sinks),
        score_mod=record.as_call().score_mod if record.score_mod is not None else None,
        fully_masked=fully_masked,
        name=name,
        dtype=record.output.dtype,
    )


def _wide(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.detach().double().cpu()


def _with_claims(case: Case, record: AttentionRecord, spec: AttentionSpec, *, own: bool) -> Case:
    """The case with what is declared in place of what the record says."""
    query_len, key_len = record.shape[2:]
    # The claim of a block is about its own sequence, not about one that it looks things up in.
    claimed = not spec.is_block or (own and query_len == key_len)
    causal = spec.causal if spec.is_block and claimed else None
    causal = causal or record.causal
    alignment: Alignment = causal or "top_left"
    rules: dict[str, Any] = {}
    if claimed:
        rules = {"window": spec.sides, "chunk": spec.chunk, "prefix": spec.prefix,
                 "sink_keys": spec.sink_keys, "may_see": _may_see(spec),
                 "documents": _documents(spec, case)}  # fmt: skip
    # By default the top left is declared, which what was captured may have been told otherwise.
    counted = any(value is not None and value != 0 for value in rules.values())
    if counted and spec.causal == "bottom_right":
        alignment = spec.causal
    is_causal = causal is not None
    # A window that ends at the own position and begins nowhere is causality.
    if claimed and spec.window == (None, 0):
        is_causal, rules["window"] = True, None
    case = replace(case, causal=is_causal, alignment=alignment, **rules, **_features(record, spec))
    return replace(case, mask=_beyond(case, record))


def _features(record: AttentionRecord, spec: AttentionSpec) -> dict[str, Any]:
    """What is declared as a number, not as the keyword of one."""
    found: dict[str, Any] = {}
    if spec.softcap is not None and not isinstance(spec.softcap, str):
        found["softcap"] = float(spec.softcap)
    if isinstance(spec.sinks, Tensor):
        found["sinks"] = _of_heads(spec.sinks, record)
    slopes = spec.alibi(record.shape[1]) if callable(spec.alibi) else spec.alibi
    # What is declared to be added stands in place of what was seen.
    if isinstance(slopes, Tensor):
        found |= {"alibi": _of_heads(slopes, record), "bias": None}
    if spec.score_mod is not None:
        found |= {"score_mod": spec.score_mod, "bias": None}
    return found


def _of_heads(numbers: Tensor, record: AttentionRecord) -> Tensor:
    numbers = numbers.detach().double().cpu()
    return numbers if record.heads is None else numbers[record.heads]


def _may_see(spec: AttentionSpec) -> Any:
    seen = spec.may_see
    if not isinstance(seen, Tensor):
        return seen
    return lambda batch, head, query, key: seen.cpu()[query, key]


def _documents(spec: AttentionSpec, case: Case) -> tuple[Tensor, Tensor] | None:
    if not isinstance(spec.documents, Tensor):
        return None
    entries = len(case.query)
    own = spec.documents.cpu()
    own = own[:entries] if own.ndim > 1 else own.expand(entries, -1)
    return own, own


def _beyond(case: Case, record: AttentionRecord) -> Tensor | None:
    """What the mask hides besides what is declared; None if that is nothing.

    A mask that was to make attention causal, and is wrong, would else be taken as told.
    """
    if case.mask is None:
        return None
    mask = case.mask
    if case.query_len > 1 and torch.equal(mask, mask[..., :1, :].expand_as(mask)):
        return None if bool(mask.all()) else mask  # padding: it was not to make it causal
    permitted = case.permitted(torch.arange(case.maps), slice(0, case.query_len))
    if permitted is not None:
        mask = mask | ~permitted.expand(case.maps, *case.shape[2:]).view(case.shape)
    # Nobody hides all tokens from themselves on purpose: then the mask is one place off.
    square = case.causal and case.query_len == case.key_len and record.queries is None
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
    unsure = any(math.isnan(factor) for factor in record.scaled_before)
    against = _against(record)
    if against is not None and not unsure:
        return _nearest(against.value, default), ""
    named = any(one.name.startswith("config.") for one in carried)
    if not unsure and not named and _is_of_embedding(used, record):
        return default, ""
    if carried or _alike(used, default):
        return used, ""
    hint = (
        f"its scores are multiplied by {used:.6g}, not by head_dim ** -0.5 = {default:.6g}: "
        f"declare scale={used:.6g} if that is meant"
    )
    twice = sum(_alike(step, default) for step in _steps(record)) > 1
    mistaken = _alike(used, 1.0) or _alike(used, 1 / default) or twice
    if mistaken and not unsure and not _normalised(record):
        return default, ""
    return used, hint


def _is_of_embedding(used: float, record: AttentionRecord) -> bool:
    assert record.query is not None
    heads, width = record.shape[1], record.query.shape[-1]
    return heads > 1 and _alike(used, (heads * width) ** -0.5)


def _alike(number: float, other: float) -> bool:
    return math.isclose(number, other, rel_tol=_ALIKE)


def _nearest(carried: float, default: float) -> float:
    """A scale, of a number that scores are multiplied by, or divided by."""
    either = (carried, 1 / carried)
    return min(either, key=lambda number: abs(math.log(number / default)))


def _agrees(carried: Carried, record: AttentionRecord) -> bool:
    """Whether a scale is what was used, or a step of it; some are divided by."""
    assert record.scale is not None
    used = (record.scale, *_steps(record))
    return any(_alike(carried.value, one) or _alike(1 / carried.value, one) for one in used)


def _against(record: AttentionRecord) -> Carried | None:
    """A scale that the module carries and its attention does not have, if there is one."""
    if record.scale is None:
        return None
    scales = (one for one in record.carried if one.feature == "scale")
    return next((one for one in scales if not _agrees(one, record)), None)


def _steps(record: AttentionRecord) -> tuple[float, ...]:
    return *record.scale_steps, *(factor for factor in record.scaled_before if factor != 1)


def _normalised(record: AttentionRecord) -> bool:
    """Whether queries and keys went through a normalisation, which takes the place of a scale."""
    tensors = (record.query, record.key)
    return all(tensor is not None and _is_normalised(tensor) for tensor in tensors)


def _is_normalised(tensor: Tensor) -> bool:
    """Whether all rows lie on one sphere, or on one ellipsoid after a gain of each channel."""
    rows = tensor.detach().double().cpu().flatten(0, -2).square()
    if len(rows) < 3 or not bool(rows.isfinite().all()):
        return False
    size = rows.mean(-1)
    if float(size.std()) <= _NORMALISED * float(size.mean()):
        return True
    if len(rows) < 3 * rows.shape[1]:
        return False
    one = torch.ones(len(rows), 1, dtype=torch.float64)
    gains = torch.linalg.lstsq(rows, one).solution
    return bool((gains > 0).all()) and float((rows @ gains - one).std()) <= _NORMALISED


# --- what the module carries


def _without(
    one: Carried, case: Case, record: AttentionRecord, spec: AttentionSpec
) -> tuple[Case, str]:
    """The case with what the module carries, and in words how the record goes without it."""
    given = f"that its module carries ({one.name})"
    if one.feature == "softcap" and spec.softcap is None:
        if case.softcap is not None and _alike(case.softcap, one.value):
            return case, ""
        words = f"without the softcap of {one.value:g} {given}"
        if case.softcap is not None:
            words = f"with a softcap of {case.softcap:g}, not that of {one.value:g} {given}"
        return replace(case, softcap=one.value), words
    if one.feature == "sinks" and spec.sinks is None and case.sinks is None:
        if len(one.value) != record.shape[1]:
            return case, ""
        return replace(case, sinks=_of_heads(one.value, record)), f"without the sinks {given}"
    if one.feature in ("window", "chunk") and spec.window is None and spec.chunk is None:
        mask = _limited(record, one)
        size = f"the {one.feature} of {one.value} keys" if mask is not None else ""
        return (case, "") if mask is None else (replace(case, mask=mask), f"without {size} {given}")
    return case, ""


def _limited(record: AttentionRecord, one: Carried) -> Tensor | None:
    """The mask with a limit that it goes without altogether; None if it has any, or needs none.

    A query stands at the last key that it may see. Where all see the same first key, and all keys
    from there, and one sees more keys than the limit allows, there is none.
    """
    mask = record.mask
    if mask is None or record.queries is not None or record.shape[2] < 2:
        return None
    seen = mask.cpu().expand(record.shape_here)
    key = torch.arange(seen.shape[-1])
    last = torch.where(seen, key, -1).amax(-1, keepdim=True)
    first = torch.where(seen, key, seen.shape[-1]).amin(-1, keepdim=True)
    some = last >= 0
    causal = bool(((last.diff(dim=-2) == 1) | ~some[..., :-1, :]).all())
    whole = bool((seen == ((key >= first) & (key <= last))).all())
    same = torch.where(some, first, first.amin(-2, keepdim=True)) == first.amin(-2, keepdim=True)
    # Some count the own key, and some do not.
    most = one.value + (one.feature == "window")
    if not (causal and whole and bool(same.all()) and int((last - first).max()) + 1 > most):
        return None
    near = key > last - one.value
    limited: Tensor = seen & (key // one.value == last // one.value if one.feature == "chunk" else near)
    return limited
