"""Assertions on weights take what `capture_attention` recorded, in place of weights."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Sequence
from functools import partial, wraps
from typing import Any, ParamSpec, TypeAlias

import numpy as np
import torch

from ..attention.lazy import LazyWeights
from ..attention.placed import Placed, is_placed
from ..capture.record import AttentionRecord
from ..capture.trace import Trace
from ..failure import Failure
from ..inputs import misuse

P = ParamSpec("P")


Weights: TypeAlias = "torch.Tensor | np.ndarray[Any, Any] | LazyWeights | AttentionRecord | Trace"


class NothingForbiddenError(ValueError):
    """Every key is permitted, so that a claim about the others has nothing to check.

    In a trace, as that of decoding step by step, such records are passed over.
    """


def takes_records(
    assertion: Callable[P, None],  # The assertion
    *,
    # Whether it asks nothing without a mask: records of attention that was given none are then
    # passed over, unless the caller gives one
    needs_mask: bool = False,
    with_sinks: bool = False,  # Whether a sink stands in the rows as one more key
    # Asserts it of some queries: called with the arguments of the assertion, `queries` (their
    # positions) and `query_len` (how many there were)
    of_some: Callable[..., None] | None = None,
    by_position: bool = False,  # Whether it takes numbers of queries and keys for positions
) -> Callable[P, None]:
    """Let an assertion on weights take a record, or a trace, of which each record is asserted."""
    # What the caller does not give comes from the record: its mask, value and output. A failure
    # names the layer.
    accepted = tuple(inspect.signature(assertion).parameters)

    @wraps(assertion)
    def on_each(*args: P.args, **kwargs: P.kwargs) -> None:
        __tracebackhide__ = True
        given = args[0] if args else kwargs.get("weights")
        ask: Callable[..., None] = assertion
        named: dict[str, Any] = {**dict(zip(accepted, args, strict=False)), **kwargs}
        if any(map(is_placed, named.values())):
            named = {name: _where_it_lies(one, name, given) for name, one in named.items()}
            ask(**named)
            return
        if isinstance(given, LazyWeights):
            arguments = _lazily(given, accepted, named, with_sinks=with_sinks)
            if needs_mask and arguments["mask"] is None:
                got = f"{given!r} of which no mask is declared, so there is nothing to check"
                wanted = "mask=..., True where a query may attend"
                raise ValueError(misuse(assertion.__name__, got, wanted))
            ask(**arguments)
            return
        if not isinstance(given, AttentionRecord | Trace):
            assertion(*args, **kwargs)
            return
        records = [given] if isinstance(given, AttentionRecord) else list(given)
        asked, nothing = 0, None
        for record in records:
            _refuse_part(assertion.__name__, record, by_position=by_position)
            arguments = {**_known(record, accepted, named), **named}
            if needs_mask and arguments["mask"] is None:
                continue
            large = _too_large(record)
            arguments["weights"] = record.lazy_weights if large else _weights(record)
            if large:
                arguments = _lazily(
                    arguments["weights"], accepted, arguments, with_sinks=with_sinks
                )
            elif with_sinks and record.sink_weights is not None:
                arguments |= _with_sinks(arguments, record.sink_weights)
            elif record.mask_lost and arguments.get("mask") is None:
                # Rows that hold nothing may be meant to: which, is not known.
                arguments |= {"mask": arguments["weights"] != 0} if "mask" in accepted else {}
            ask = assertion
            if of_some is not None and record.queries is not None:
                ask = partial(of_some, queries=record.queries, query_len=record.shape[2])
            try:
                _assert_one(ask, record, arguments)
                asked += 1
            except NothingForbiddenError as error:
                nothing = error
        if not asked:
            raise nothing or ValueError(_nothing_to_ask(assertion.__name__, records))

    return on_each


def _where_it_lies(given: Any, name: str, weights: Any) -> Any:
    """An argument, read where it lies if that is on several ranks."""
    if not is_placed(given):
        return given
    if name == "mask" and is_placed(weights):
        same = given.shape == weights.shape and given.device_mesh == weights.device_mesh
        if not same:  # broadcast: all ranks need most of it
            return given.full_tensor()
        return Placed(given.redistribute(placements=weights.placements), name)
    known = ("weights", "mask", "value", "output")
    if name not in known or not is_placed(weights):
        accepted = "a tensor: weights may be a DTensor, and then what belongs to them"
        raise TypeError(misuse(name, "a DTensor", accepted))
    return Placed(given, name)


def _lazily(
    weights: LazyWeights, accepted: Sequence[str], named: dict[str, Any], *, with_sinks: bool
) -> dict[str, Any]:
    """The arguments of an assertion, with what the weights tell that the caller did not."""
    given, mask = weights, named.get("mask")
    if with_sinks and weights.sinks is not None:
        given = weights.sinks
        if isinstance(mask, torch.Tensor):
            mask = mask.expand(*mask.shape[:-1], weights.shape[-1])
            mask = torch.cat([mask, torch.ones_like(mask[..., :1])], -1)
    if "mask" in accepted and "mask" not in named:
        mask = given.mask
    found = {**named, "weights": given}
    return {**found, "mask": mask} if "mask" in accepted else found


def _too_large(record: AttentionRecord) -> bool:
    """Whether the weights are too many to be held at once: they are read a block at a time."""
    needed = math.prod(record.shape_here) * record.weights_dtype.itemsize
    return record.kept_weights is None and needed > record.most_bytes


def _refuse_part(name: str, record: AttentionRecord, *, by_position: bool) -> None:
    where = record.layer or "(no module)"
    if record.part == "keys":
        got = f"some keys of the rows in {where}: the others went into what is not recorded"
        raise ValueError(misuse(name, got, "records of whole rows: trace.select(layers=...)"))
    if record.part == "queries" and by_position:
        got = f"a block of the queries in {where}, numbered from 0 as are the keys it was given"
        raise ValueError(misuse(name, got, "records of whole attention: trace.select(layers=...)"))


def _known(
    record: AttentionRecord, accepted: Sequence[str], named: dict[str, Any]
) -> dict[str, Any]:
    """What a record tells an assertion that the caller did not."""
    known: dict[str, Any] = {}
    if "mask" in accepted and "mask" not in named:
        known["mask"] = None if record.mask_lost else _mask(record)
    for name in ("value", "output"):
        if name not in accepted or name in named:
            continue
        known[name] = getattr(record, name)
        if known[name] is None:
            got = f"a record of {record.layer or '(no module)'} that did not keep it"
            raise ValueError(misuse(name, got, f'a capture with keep="inputs", or {name}='))
    return known


def _mask(record: AttentionRecord) -> object:
    return record.lazy_weights.mask if _too_large(record) else record.mask


def _with_sinks(arguments: dict[str, Any], sink_weights: torch.Tensor) -> dict[str, Any]:
    """Weights and mask with one key more."""
    weights, mask = arguments["weights"], arguments.get("mask")
    whole = torch.cat([weights, sink_weights[..., None].to(weights)], -1)
    if not isinstance(mask, torch.Tensor):
        return {"weights": whole}
    mask = mask.expand(*mask.shape[:-1], weights.shape[-1])
    seen = torch.ones_like(mask[..., :1])
    return {"weights": whole, "mask": torch.cat([mask, seen], -1)}


def _weights(record: AttentionRecord) -> torch.Tensor:
    """The weights, in the model's own dtype where it made them: that is what it rounded to."""
    weights = record.weights
    if record.kept_weights is None:
        return weights
    coarse = torch.finfo(record.dtype).eps > torch.finfo(weights.dtype).eps
    return weights.to(record.dtype) if coarse else weights


def _assert_one(
    assertion: Callable[..., None], record: AttentionRecord, arguments: dict[str, Any]
) -> None:
    __tracebackhide__ = True
    try:
        assertion(**arguments)
    except Failure as failure:
        failure.layer = f"{record.layer or '(no module)'}, call {record.call}"
        if failure.cause is None and record.dropout > 0 and "output" in arguments:
            mode = "training" if record.training else "evaluation"
            failure.cause = (
                f"dropout of {record.dropout:g} was applied within, in {mode} mode: the weights "
                "are those before it"
            )
        raise


def _nothing_to_ask(name: str, records: Sequence[AttentionRecord]) -> str:
    if not records:
        return misuse(name, "a trace without records", "one with at least one")
    lost = next((record for record in records if record.mask_lost), None)
    if lost is not None:
        got = f"attention whose mask is not known: its scores {lost.strange}"
        return misuse(name, got, "mask=..., True where a query may attend")
    got = "records of attention that was given no mask, so there is nothing to check"
    return misuse(name, got, "mask=..., True where a query may attend")
