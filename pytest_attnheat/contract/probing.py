"""Small cases on which defects of attention differ, and the answers of a subject to them.

Cases are choices of levels (see `attention.levels`), as those of the examination are; which they
are, `contract.blueprints` says.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from functools import lru_cache
from typing import Any, TypeAlias

import torch
from torch import Tensor

from pytest_attnheat.attention.levels import NONE, SIZES, Choice, Declared, Levels, Space
from pytest_attnheat.attention.plan import Case
from pytest_attnheat.attention.storage import Fault
from pytest_attnheat.contract.asking import Answer
from pytest_attnheat.contract.asking import ask as asked
from pytest_attnheat.contract.blueprints import OTHER_LENGTHS, Blueprint, Change
from pytest_attnheat.contract.examination import Examination, Skipped
from pytest_attnheat.contract.spec import AttentionSpec


@dataclass(frozen=True, eq=False)
class Probe:
    """A case and what the subject answered.

    Attributes:
        case: The inputs, in float64, rounded to `dtype` before.
        output: The answer (batch, heads, query_len, value_dim), in float64 on the CPU.
        dtype: The dtype in which the subject was asked.
        tolerance: The least part by which an output may be off.
        judged: Whether a wrong answer is a defect, or only worth a note.
        fault: What the subject did to a cache; None if nothing that it was not to do.
    """

    case: Case
    output: Tensor
    dtype: torch.dtype
    tolerance: float
    judged: bool = True
    fault: Fault | None = None


# What was used as weights, (batch, heads, query_len, key_len); None where that is not known.
WeightsOf: TypeAlias = Callable[[Probe], Tensor | None]


def ask(spec: AttentionSpec, case: Case, dtype: torch.dtype) -> Tensor:
    """Call the subject with copies of a case.

    Returns:
        Its output (batch, heads, query_len, value_dim) in float64 on the CPU.

    Raises:
        Exception: Whatever the subject raises.
    """
    return _output(answer_to(spec, case, dtype))


def _output(answer: Answer) -> Tensor:
    # The next call may write into its memory.
    return answer.output.detach().to("cpu", torch.float64, copy=True)


def answer_to(
    spec: AttentionSpec, case: Case, dtype: torch.dtype, *, dropout: float = 0.0
) -> Answer:
    """Call the subject as `ask` does, and return all it answers.

    What it was to be asked before is asked first, in the same memory.
    """
    device = spec.devices[0] if spec.devices else "cpu"

    def moved(tensor: Tensor) -> Tensor:
        own = dtype if tensor.is_floating_point() else tensor.dtype
        return tensor.to(device, own, copy=True)

    call = _mapped(case, moved)
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if case.earlier is not None:
            before = _mapped(case.earlier, moved)
            asked(spec, before)
            for name in ("query", "key", "value", "mask", "bias"):
                if (tensor := getattr(before, name)) is not None:
                    tensor.copy_(getattr(call, name))
            call = before
        return asked(spec, call, dropout=dropout)


def _mapped(case: Case, change: Callable[[Tensor], Tensor]) -> Case:
    """The same with other tensors."""
    given = {one.name: getattr(case, one.name) for one in fields(Case)}
    new: dict[str, Any] = {n: change(t) for n, t in given.items() if isinstance(t, Tensor)}
    if case.documents is not None:
        new["documents"] = tuple(map(change, case.documents))
    return replace(case, **new)


@contextmanager
def one_thread() -> Iterator[None]:
    """Compute in one thread: for small tensors, more cost several times what they save."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def probe(examination: Examination, blueprint: Blueprint, tolerance: float) -> Probe | str | None:
    """Return a case with the subject's answer.

    Returns:
        Why it was refused, in all its sizes, or None if it is not among what is declared.
    """
    refusal = None
    dtype = examination.dtype
    for case in _versions(examination, blueprint):
        try:
            answer = answer_to(examination.spec, case, dtype)
        except Exception as error:
            # Whatever a subject raises is a refusal; the first one is about the usual sizes.
            text = str(error).strip().split("\n")[0]
            refusal = refusal or f"{type(error).__name__}: {text}"
        else:
            output = _output(answer)
            return Probe(case, output, dtype, tolerance, blueprint.judged, answer.fault)
    return refusal


def _versions(examination: Examination, blueprint: Blueprint) -> Iterator[Case]:
    """The case as it is wanted, then as those take it who take few shapes alone."""
    declared, levels = examination.space.declared, blueprint.levels
    if declared.few_shapes:
        levels = {name: level for name, level in levels.items() if name not in SIZES}
    if declared.heads is not None:  # then a group tells how many heads keys have
        groups = [n for n in declared.levels()["group"] if n > 1][:1] or [1]
        own = {"group": groups[0]} if "group" in levels else {}
        levels = {n: level for n, level in levels.items() if n not in ("key_heads", "group")} | own
    is_square = declared.square or (levels.get("causal") and declared.square_if_causal)
    differs = blueprint.name.endswith(OTHER_LENGTHS)
    if is_square and differs:
        return
    if is_square and "sizes" in levels:
        levels = {**levels, "sizes": (max(levels["sizes"]),) * 2}
    if "sizes" in levels:
        levels = {**levels, "sizes": declared.whole(levels["sizes"])}
    if declared.one_query:
        levels = {**levels, "sizes": (1, levels.get("sizes", (1, 7))[1])}
    usual = {"head_dim": 16}
    full = {"shape": "(B, H, L, S)"} if "mask" in levels and "shape" not in levels else {}
    square = {} if differs or declared.one_query else {"sizes": (7, 7)}
    equal = usual | {"value_dim": "equal"} | square
    known = declared.levels()
    fixed = {n: some[0] for n, some in declared.only if n in ("key_heads", "head_dim", "value_dim")}
    for more in ({}, usual, full, usual | full, equal):
        wanted = {**levels, **({} if declared.few_shapes else more), **fixed}
        if any(wanted[n] not in known.get(n, ()) for n in wanted if n not in SIZES):
            continue
        try:
            chosen = examination.choice(**wanted)
        except Skipped:
            continue
        yield _drawn(examination, blueprint, chosen)


def _drawn(examination: Examination, blueprint: Blueprint, chosen: Choice) -> Case:
    declared, seed = examination.space.declared, examination.seed
    heads = declared.heads or chosen["key_heads"] * chosen["group"]
    # No plan knows of steps that are rounded on purpose.
    always = {n: one for n, one in examination.spec.always(heads).items() if n != "rounded"}
    # What a case does not have plays no part in it, so that other subjects can share it.
    given = {name: level for name, level in chosen.items() if level is not False and level != NONE}
    given.pop("gradients", None)
    return _case(
        blueprint.name,
        blueprint.change,
        declared.heads,
        tuple(always.items()),
        tuple(given.items()),
        examination.dtype,
        seed,
    )


# Cases are kept, and compared by identity: what plans make of them is kept as well (see
# `outcomes`), so that the second subject takes much less time than the first.
@lru_cache(maxsize=256)
def _case(
    name: str,
    change: Change,
    heads: int | None,
    always: Levels,
    chosen: Levels,
    dtype: torch.dtype,
    seed: int,
) -> Case:
    levels = dict(chosen)
    call = Space(Declared(heads=heads), dict(always), seed).call(levels, dtype)
    given = {one.name: getattr(call, one.name) for one in fields(call)}
    scaled = levels.get("scale", NONE) != NONE
    case = Case(**given, name=name, dtype=dtype, scale_given=scaled)
    case = _mapped(case, lambda t: t.double() if t.is_floating_point() else t)
    return in_dtype(change(case, seed), dtype)


def in_dtype(case: Case, dtype: torch.dtype) -> Case:
    """Round the inputs of a case to a dtype, in which it is asked, and keep them in float64."""
    query, key, value = (t.to(dtype).double() for t in (case.query, case.key, case.value))
    return replace(case, query=query, key=key, value=value, dtype=dtype)


def with_identity(spec: AttentionSpec, one: Probe) -> list[tuple[Case, slice]]:
    """Return cases whose outputs are the columns of the weights, and which columns.

    Values are an identity matrix; in parts as wide as the values were, where the subject takes no
    other width.
    """
    whole = _with_identity(one.case, one.case.key_len)
    try:
        ask(spec, whole[0][0], one.dtype)
    except Exception:
        return _with_identity(one.case, one.case.value.shape[-1])
    return whole


@lru_cache(maxsize=128)
def _with_identity(case: Case, width: int) -> list[tuple[Case, slice]]:
    parts = []
    for start in range(0, case.key_len, width):
        columns = slice(start, min(start + width, case.key_len))
        part = torch.zeros(case.key_len, width, dtype=torch.float64)
        part[columns, : columns.stop - start] = torch.eye(columns.stop - start)
        whole = part.expand(*case.key.shape[:2], -1, -1).clone()
        parts.append((replace(case, value=whole), columns))
    return parts


def inferred_weights(spec: AttentionSpec, one: Probe) -> Tensor | None:
    """Return what a subject uses as weights on a case, (batch, heads, query_len, key_len).

    Its output for values that are an identity matrix: the weights, as long as the output is a sum
    of values. None where the subject refuses such values.
    """
    weights = torch.zeros(one.case.shape, dtype=torch.float64)
    for case, columns in with_identity(spec, one):
        try:
            output = ask(spec, case, one.dtype)
        except Exception:
            return None
        weights[..., columns] = output[..., : columns.stop - columns.start]
    return weights
