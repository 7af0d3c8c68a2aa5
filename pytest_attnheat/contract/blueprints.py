"""The cases on which defects of attention differ, and what is made of them when they are drawn.

All sizes of a case differ where they may, so that no two of them can be confused. head_dim differs
between cases, so that a constant is not taken for a function of it, and so do lengths, so that what
an earlier call left behind is felt in the one case that is about it.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any, TypeAlias

import torch

from pytest_attnheat.attention.drawing import WINDOWS
from pytest_attnheat.attention.levels import text_of
from pytest_attnheat.attention.plan import Case
from pytest_attnheat.attention.scoring import draw
from pytest_attnheat.contract.spec import AttentionSpec

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
    """How a case is made.

    Attributes:
        name: Its name.
        levels: What is chosen for it; the rest is ordinary.
        change: What is made of it when it is drawn.
        judged: Whether a wrong answer is a defect, or only worth a note.
    """

    name: str
    levels: dict[str, Any] = field(default_factory=dict)
    change: Change = lambda case, seed: case
    judged: bool = True


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
    """The first two rows have scores that differ by hundreds, the next two very low ones.

    Keys stand on a line in their first channel, far apart, so that rounding never decides which
    one such a query chooses.
    """
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
OTHER_LENGTHS = ("more keys", "more queries", "one query")


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
