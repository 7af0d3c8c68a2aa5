"""Small cases on which defects of attention differ, and the answers of a subject to them.

Cases are choices of levels (see `attention.levels`), as those of the examination are. All sizes of
a case differ where they may, so that no two of them can be confused. head_dim differs between
cases, so that a constant is not taken for a function of it, and so do lengths, so that what an
earlier call left behind is felt in the one case that is about it.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, fields, replace
from functools import lru_cache
from typing import Any, TypeAlias

import torch
from torch import Tensor

from ..attention.drawing import WINDOWS
from ..attention.levels import NONE, SIZES, Choice, Declared, Levels, Space, text_of
from ..attention.plan import Case
from ..attention.scoring import draw
from ..attention.storage import Fault
from .asking import Answer
from .asking import ask as asked
from .examination import Examination, Skipped
from .spec import AttentionSpec

# The longest case of a window or a chunk.
_WIDEST = 300
# How far apart large scores of a row are: exp overflows and vanishes in float64 too.
_FAR_APART = 900.0
# What is added to all scores of a low row; a correct softmax does not feel it.
_LOW = 30.0

# What is made of a drawn case; the number is the seed.
Change: TypeAlias = Callable[[Case, int], Case]


@dataclass(frozen=True)
class Blueprint:
    """How a case is made."""

    name: str  # Its name
    levels: dict[str, Any] = field(default_factory=dict)  # What is chosen; the rest is ordinary
    change: Change = lambda case, seed: case  # What is made of it when it is drawn
    judged: bool = True  # Whether a wrong answer is a defect, or only worth a note


@dataclass(frozen=True, eq=False)
class Probe:
    """A case and what the subject answered."""

    case: Case  # The inputs, in float64, rounded to `dtype` before
    output: Tensor  # The answer (batch, heads, query_len, value_dim), in float64 on the CPU
    dtype: torch.dtype  # The dtype in which the subject was asked
    tolerance: float  # The least part by which an output may be off
    judged: bool = True  # Whether a wrong answer is a defect, or only worth a note
    fault: Fault | None = None  # What the subject did to a cache that it was not to do


# What was used as weights, (batch, heads, query_len, key_len); None where that is not known.
WeightsOf: TypeAlias = Callable[[Probe], Tensor | None]


def ask(spec: AttentionSpec, case: Case, dtype: torch.dtype) -> Tensor:
    """Call the subject with copies of a case; return its output in float64 on the CPU."""
    return _output(answer_to(spec, case, dtype))


def _output(answer: Answer) -> Tensor:
    # The next call may write into its memory.
    return answer.output.detach().to("cpu", torch.float64, copy=True)


def answer_to(
    spec: AttentionSpec, case: Case, dtype: torch.dtype, *, dropout: float = 0.0
) -> Answer:
    """Call the subject as `ask` does, and return all it answers."""
    # What it was to be asked before is asked first, in the same memory.
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
    """Return a case with the subject's answer."""
    # Or why it was refused, in all its sizes, or None if it is not among what is declared.
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
    differs = blueprint.name.endswith(_OTHER_LENGTHS)
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
        blueprint.name, blueprint.change, declared.heads, tuple(always.items()),
        tuple(given.items()), examination.dtype, seed,
    )  # fmt: skip


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
    """Return cases whose outputs are the columns of the weights, and which columns."""
    # Values are an identity matrix; in parts as wide as the values were, where the subject takes no
    # other width.
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
    """Return what a subject uses as weights on a case, (batch, heads, query_len, key_len)."""
    # Its output for values that are an identity matrix: the weights, as long as the output is a sum
    # of values. None where the subject refuses such values.
    weights = torch.zeros(one.case.shape, dtype=torch.float64)
    for case, columns in with_identity(spec, one):
        try:
            output = ask(spec, case, one.dtype)
        except Exception:
            return None
        weights[..., columns] = output[..., : columns.stop - columns.start]
    return weights


# --- what is made of drawn cases


def _clear(case: Case, seed: int) -> Case:
    """Without a row of the mask that is all True or all False."""
    if case.mask is None or case.mask.shape[-2] == 1:
        return case
    mask, rows = case.mask.clone(), torch.arange(case.query_len)
    mask[..., rows, rows % case.key_len] = True
    mask[..., rows, (rows + 1) % case.key_len] = False
    return replace(case, mask=mask)


def _tiled(case: Case, seed: int) -> Case:
    """Whole blocks of 8 queries and keys are hidden as well."""
    case = _clear(case, seed)
    if case.mask is None or case.mask.shape[-2] == 1:
        return case
    query, key = torch.arange(case.query_len)[:, None], torch.arange(case.key_len)
    mask = case.mask | (key % 4 == 0)  # so that each query has a key
    return replace(case, mask=mask & (query // 8 != key // 8))


def _large_scores(case: Case, seed: int) -> Case:
    """The first two rows have scores that differ by hundreds, the next two very low ones."""
    # Keys stand on a line in their first channel, far apart, so that rounding never decides which
    # one such a query chooses.
    query, key = case.query, case.key
    scale = abs(case.scale) if case.scale else query.shape[-1] ** -0.5
    line = torch.linspace(-3, 3, case.key_len, dtype=torch.float64)
    order = draw(f"{case.name} order", seed, case.key_len).argsort()
    key[..., 0], key[..., 1] = line[order], 1.0
    query[..., 0], query[..., 1] = query[..., 0] * 0.3, 0.0
    # float16 holds the products up to 65504.
    query[..., :2, :] = 0.0
    largest = min(_FAR_APART / scale, 6000.0)
    query[..., :2, 0] = torch.tensor([1.0, -1.0])[: case.query_len] * largest
    query[..., 2:4, 1] = -min(_LOW / scale, 6000.0)
    return case


def _large_scores_masked(case: Case, seed: int) -> Case:
    """The key that such a query would choose is masked."""
    case = _clear(_large_scores(case, seed), seed)
    if case.mask is not None and case.mask.shape[-2] > 1:  # of more than one query
        place = case.key[0, 0, :, 0]
        chosen = torch.stack([place.argmax(), place.argmin()])
        case.mask[..., [0, 1], chosen] = False
        case.mask[..., [0, 1], chosen.flip(0)] = True
    return case


def _garbage(case: Case, seed: int) -> Case:
    """NaN in the value of the last key, which is masked."""
    case = _clear(case, seed)
    if case.mask is not None:
        case.mask[..., -1] = False
        case.value[:, :, -1] = math.nan
    return case


def _again(case: Case, seed: int) -> Case:
    """Just before, the same is asked with other numbers."""
    other = None if case.mask is None else case.mask.flip(-1)
    return replace(
        case,
        earlier=replace(
            case, query=-case.query, key=case.key.roll(1, -1), value=-case.value, mask=other
        ),
    )


# --- cases

# A mask for each sample, of keys alone, and for each head.
_OF_KEYS, _PER_HEAD = "(B, 1, 1, S)", "(B, H, L, S)"
_MASK: dict[str, Any] = {"mask": "boolean"}
_CAUSAL: dict[str, Any] = {"causal": True}
# Other lengths of queries and keys are what the name of a case ends with.
_OTHER_LENGTHS = ("more keys", "more queries", "one query")


def _sized(query_len: int, key_len: int, head_dim: int = 8, **others: Any) -> dict[str, Any]:
    return {"sizes": (query_len, key_len), "head_dim": head_dim, "key_heads": 3, **others}


# Of what reads a cache: over several pages, decoding and in chunks, with all that may be special.
_STORED: tuple[tuple[tuple[int, int], dict[str, Any]], ...] = (
    ((1, 37), {"unused": "ordinary", "lengths": True}), ((3, 39), {"append": 3, **_CAUSAL}),
    ((4, 41), {"append": 1, "lengths": True}), ((3, 35), {"left": True, "pages": 0, **_CAUSAL}),
    ((4, 43), {"shared": True, "append": 3}),
    ((4, 45), {"unused": "ordinary", "window": "left", **_CAUSAL}),
    ((3, 47), {"unused": "ordinary", "ragged": "unequal"}),
    ((3, 49), {"unused": "ordinary", "ragged": "without keys"}),
    ((3, 51), {"unused": "ordinary", "ragged": "unequal", "alibi": True, **_CAUSAL}),
    # Who takes rows of slots besides has its pages asked as well.
    ((2, 53), {"unused": "ordinary", "pages": 256, "batch": 3, **_CAUSAL}),
    ((1, 55), {"unused": "ordinary", "pages": 256, "append": 1, "batch": 3}),
)  # fmt: skip
_SQUARE: dict[str, Any] = {"batch": 3, "key_heads": 4, "value_dim": "equal"}
_CASES = (
    Blueprint("plain", _sized(5, 7)),
    Blueprint("square", _sized(6, 6, 5, **_SQUARE)),
    Blueprint("large scores", _sized(5, 8, 7), _large_scores),
    Blueprint("causal, more keys", _sized(5, 9, 7, **_CAUSAL)),
    Blueprint("causal, more queries", _sized(8, 5, 6, **_CAUSAL)),
    Blueprint("causal, one query", _sized(1, 9, 9, **_CAUSAL)),
    Blueprint("causal, square", _sized(7, 7, 5, **_SQUARE, **_CAUSAL)),
    Blueprint("mask", _sized(5, 6, **_MASK), _clear),
    Blueprint("mask, square", _sized(8, 8, 5, **_SQUARE, **_MASK), _clear),
    Blueprint("mask of keys", _sized(6, 7, 9, batch=3, key_heads=2, shape=_OF_KEYS, **_MASK)),
    Blueprint("mask per head", _sized(4, 7, shape=_PER_HEAD, **_MASK), _clear),
    Blueprint("large scores, mask", _sized(6, 8, 7, **_MASK), _large_scores_masked),
    Blueprint("additive mask", _sized(4, 8, mask="additive")),
    Blueprint("additive mask of numbers", _sized(4, 6, 7, mask="additive", fill="finite")),
    Blueprint("mask, causal, more keys", _sized(6, 9, 7, **_MASK, **_CAUSAL)),
    Blueprint("mask, causal, square", _sized(9, 9, 6, **_SQUARE, **_MASK, **_CAUSAL)),
    Blueprint("mask of blocks", _sized(13, 15, key_heads=2, **_MASK), _tiled),
    Blueprint("fully masked row", _sized(7, 8, empty=True, **_MASK)),
    Blueprint("asked again", _sized(3, 5), _again),
    Blueprint("mask, asked again", _sized(4, 5, **_MASK), _again),
    Blueprint("grouped", _sized(7, 9, key_heads=2, group=3)),
    Blueprint("scale=0.7", _sized(3, 7, scale=0.7)),
    Blueprint("scale=-0.4", _sized(3, 8, scale=-0.4)),
    # Decoding, whatever else is declared.
    Blueprint("one query", _sized(1, 10, 6)),
    Blueprint("additive mask, one query", _sized(1, 8, 6, mask="additive", fill="finite")),
    Blueprint("window, one query", _sized(1, 11, 6, window="left")),
    Blueprint("documents", _sized(10, 10, 6, documents=True)),
    *(
        Blueprint(", ".join([name, *more]), _sized(4 + at, 10, 6, **{name: True}, **more))
        for at, name in enumerate(("softcap", "sinks", "alibi", "bias", "lengths"))
        for more in ({}, _MASK)
    ),
    *(
        Blueprint(f"window, {side}", _sized(6 + at, 10 - at, 6, window=side))
        for at, side in enumerate(WINDOWS)
    ),
    Blueprint("chunk", _sized(7, 10, 6, chunk=True)),
    *(
        Blueprint(
            f"several lengths, {kind}" + ", causal" * causal,
            _sized(6 + at, 11 - at, 6, ragged=kind, causal=causal, batch=5),
        )
        for at, kind in enumerate(("unequal", "empty", "same"))
        for causal in (False, True)
    ),
    *(
        Blueprint(f"stored, {text_of(how)}", {**_sized(*sizes, 8, batch=3), **how})
        for sizes, how in _STORED
    ),
    Blueprint("NaN in masked keys", _sized(5, 5, 7, batch=3, **_MASK), _garbage, judged=False),
)


def blueprints(spec: AttentionSpec, dtype: torch.dtype) -> list[Blueprint]:
    """Return the cases of attention; which are asked depends on what is declared."""
    far = [side for side in spec.sides if side is not None and side <= _WIDEST]
    far += [2 * spec.chunk] if isinstance(spec.chunk, int) and spec.chunk <= _WIDEST else []
    cases = list(_CASES)
    if far:
        length = min(sum(far) + 4, _WIDEST)
        levels = {"sizes": (length, length + 2), "batch": 1, "key_heads": 2, "head_dim": 10}
        cases.append(Blueprint("window" if spec.sides else "chunk", levels))
    if dtype == torch.float16:  # refused where it computes in float16 all the way
        cases.append(Blueprint("overflowing products", _sized(5, 7, numbers="overflowing")))
    # The largest come last: the others tell most plans from the subject. Whole blocks of 16 to 64
    # are more than the first 128.
    single = {"batch": 1, "key_heads": 1}
    cases.append(Blueprint("long, causal", _sized(131, 133, **single, **_CAUSAL)))
    return [*cases, Blueprint("long", _sized(195, 197, **single))]
