"""Calls of attention that cover what is declared: features, their levels, and one call of each.

A *choice* says which level each feature has: `{"sizes": (5, 7), "mask": "boolean", ...}`. Every
call that the package makes up is drawn from one, so that it can be named, repeated and made
smaller: see `text_of`, `read` and `shrunk`.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any, TypeAlias

import torch

from ..inputs import misuse
from .call import Call
from .covering import Covering, covering
from .drawing import FILLS, HOLDING, WINDOWS, Drawing
from .drawing import NONE as NONE
from .drawing import Choice as Choice
from .storage import OWN, UNUSED

# Some features and their levels.
Levels: TypeAlias = tuple[tuple[str, Any], ...]

# What a call may be given besides its tensors, if the code under test takes it.
OPTIONS = (
    "scale", "softcap", "sinks", "alibi", "bias", "documents", "lengths", "window", "chunk",
)  # fmt: skip
# The levels of those that are more than given or not.
_OPTION_LEVELS = {"scale": (NONE, 0.7, -0.4), "window": (False, *WINDOWS)}

# The shapes of a mask that fits the scores (batch, heads, query_len, key_len).
MASK_SHAPES = ("(B, 1, L, S)", "(B, 1, 1, S)", "(1, 1, L, S)", "(1, H, L, S)", "(B, H, L, S)")
_RECTANGLES = (
    (5, 7), (7, 7), (9, 5), (1, 1), (31, 31), (33, 33), (63, 65), (127, 129),
    (1, 33), (1, 513), (3, 1025), (1, 2049),
)  # fmt: skip
_SQUARES = ((7, 7), (5, 5), (1, 1), (31, 31), (33, 33), (65, 65), (129, 129))
_OF_KEYS = "(B, 1, 1, S)"
# More weights than this, and a case costs more than it tells; of heads that are declared, each
# may have so many that the longest sizes are asked of one batch entry.
_MOST_WEIGHTS = 2**17
_MOST_OF_A_HEAD = 129 * 129
NUMBERS = tuple(HOLDING)
# How keys are stored, where they are: see `Storage`.
STORED: dict[str, tuple[Any, ...]] = {
    "pages": (0,), "append": (0,), "shared": (False,), "left": (False,), "unused": UNUSED,
}  # fmt: skip


@dataclass(frozen=True)
class Declared:
    """What decides which calls can be made. It is hashable: the choices depend on it alone."""

    masks: frozenset[str] = frozenset()  # Of "boolean" and "additive", which a call may be given
    mask_shape: str | None = None  # The one shape of a mask; None for all that fit the scores
    causal: bool = False  # Whether it may be told to be causal
    options: frozenset[str] = frozenset()  # Which of `OPTIONS` it may be given
    grouped: bool = False  # Whether query heads may share heads of keys
    heads: int | None = None  # How many query heads there are; None for any number
    square: bool = False  # Whether there are as many keys as queries, always
    square_if_causal: bool = False  # Whether there are where it is told to be causal
    equal_widths: bool = False  # Whether values are as wide as keys, always
    from_the_end: bool = False  # Whether positions are counted from the bottom right
    near: bool = False  # Whether a rule of positions, such as a window, hides what is far
    numbers: tuple[str, ...] = NUMBERS  # What queries, keys and values may hold, of `NUMBERS`
    empty: bool = True  # Whether it is judged what a query gives that is left without any key
    # Likewise of queries before all real keys: causal ones of what is padded on the left
    before_all: bool = False
    gradients: bool = True  # Whether gradients are asked
    longest: int | None = None  # How many queries and keys there are at most
    few_shapes: bool = False  # Whether few shapes are asked
    most_weights: int = _MOST_WEIGHTS  # How many weights a call has at most
    ragged: tuple[str, ...] = ()  # How lengths of a batch may differ, of `RAGGED`; none if equal
    only: tuple[tuple[str, tuple[Any, ...]], ...] = ()  # By feature, the only levels to be asked
    apart: tuple[tuple[str, str], ...] = ()  # Pairs of features that are never asked together
    one_query: bool = False  # Whether there is one query, always
    stored: tuple[tuple[str, tuple[Any, ...]], ...] = ()  # Levels of how keys are stored, or none
    parts: int = 1  # A length is a multiple of this, as it is cut into so many parts
    uneven: bool = False  # Whether it may also be one less

    def whole(self, sizes: tuple[int, int]) -> tuple[int, int]:
        """Return the next sizes that can be cut into parts."""
        query_len, key_len = (
            one if self._divides(one) else -(-one // self.parts) * self.parts for one in sizes
        )
        return query_len, key_len

    def _divides(self, length: int) -> bool:
        shorter = self.uneven and length > self.parts and (length + 1) % self.parts == 0
        return length % self.parts == 0 or shorter

    def levels(self) -> dict[str, tuple[Any, ...]]:
        """Return the levels of each feature, the most ordinary first."""
        few = self.few_shapes
        sizes = tuple(dict.fromkeys(map(self.whole, _SQUARES if self.square else _RECTANGLES)))
        if self.uneven and self.parts > 1:
            sizes = (*sizes[:1], (2 * self.parts - 1,) * 2, *sizes[1:])
        sizes = self._allowed(sizes)
        sizes = ((1, 7), *sizes) if self.one_query else sizes
        if self.longest is not None:
            sizes = ((self.longest, self.longest), *(s for s in sizes if max(s) < self.longest))
        levels: dict[str, tuple[Any, ...]] = {
            "sizes": sizes[:2] if few else sizes,
            "batch": (2,) if few else (2, 1, 3),
            "key_heads": (2,) if few else (2, 1, 3),
            "group": (1, 2) if few else (1, 2, 3, 4, 6),
            "head_dim": (16,) if few else (16, 8, 64, 40),
            "value_dim": ("equal",) if self.equal_widths or few else ("other", "equal"),
            "mask": (NONE, *sorted(self.masks, reverse=True)),
            "shape": (NONE, *self.shapes),
            "fill": (NONE, *FILLS) if "additive" in self.masks else (NONE,),
            "empty": (False, True) if self.empty else (False,),
            "causal": (False, True) if self.causal else (False,),
            "numbers": self.numbers,
            "gradients": ("all", "query", "key", "value", NONE) if self.gradients else (NONE,),
        }
        if not self.grouped:
            levels["group"] = (1,)
        if self.heads is not None:  # then the group tells how many heads keys have
            levels["group"] = tuple(n for n in levels["group"] if self.heads % n == 0)
            levels["key_heads"] = (self.heads,)
        if self.shapes == (_OF_KEYS,) and not (self.before_all and self.causal):
            levels["empty"] = (False,)
        if not self.masks:
            levels |= dict.fromkeys(("mask", "shape", "fill"), (NONE,)) | {"empty": (False,)}
        for name in OPTIONS:
            if name in self.options:
                levels[name] = _OPTION_LEVELS.get(name, (False, True))
        if "lengths" in self.options and self.empty:
            levels["lengths"] = (False, True, "empty")
        if self.ragged:
            levels |= {"batch": (3, 2, 1, 5), "ragged": self.ragged}
        levels |= STORED | dict(self.stored) if self.stored else {}
        levels |= {name: known for name, known in self.only if name in levels}
        return levels

    def simplest_first(self) -> dict[str, tuple[Any, ...]]:
        """Return the same from the simplest: numbers from the smallest, and small sizes besides."""
        levels = self.levels()
        if not self.few_shapes:
            small = map(self.whole, _SMALL_SIZES)
            levels["sizes"] = tuple({*levels["sizes"], *self._allowed(tuple(small))})
        return levels | {name: tuple(sorted(levels[name], key=_size)) for name in SIZES}

    def _allowed(self, sizes: tuple[tuple[int, int], ...]) -> tuple[tuple[int, int], ...]:
        """Those of some (query_len, key_len) that can be asked."""
        return tuple(one for one in sizes if self._fits({"sizes": one}))

    @property
    def shapes(self) -> tuple[str, ...]:
        """The shapes that a mask may have."""
        if self.mask_shape is None:
            return MASK_SHAPES
        same = {"(L, S)": "(1, 1, L, S)", "(B, S)": "(B, 1, 1, S)"}
        return (same.get(self.mask_shape, self.mask_shape),)

    def possible(self, chosen: Choice) -> bool:
        """Return whether some levels can occur together."""
        mask, shape, fill = (chosen.get(name) for name in ("mask", "shape", "fill"))
        told = {
            None if one is None else one != NONE for one in (mask, shape)
        } - {None}  # fmt: skip
        if len(told) > 1:
            return False
        is_floats = fill not in (None, NONE)
        if is_floats and (mask not in (None, "additive") or shape == NONE):
            return False
        if fill == NONE:
            is_masked = shape not in (None, NONE) or chosen.get("empty")
            if mask == "additive" or ("boolean" not in self.masks and is_masked):
                return False
        # What a number that is not -inf leaves of an empty row is rounding alone; a mask of keys
        # alone would hide them from all queries, but for those that are causal.
        of_all = shape == _OF_KEYS and not (self.before_all and chosen.get("causal", True))
        unfit = NONE in (mask, shape) or of_all or (is_floats and fill != "-inf")
        if any(all(chosen.get(n, False) not in (False, NONE) for n in two) for two in self.apart):
            return False
        return not (chosen.get("empty") and unfit) and self._fits(chosen)

    def _fits(self, chosen: Choice) -> bool:
        query_len, key_len = chosen.get("sizes", (1, 1))
        if self.longest is not None and max(query_len, key_len) > self.longest:
            return False
        if query_len != 1 and self.one_query and "sizes" in chosen:
            return False
        if query_len != key_len and self.square:
            return False
        if "sizes" in chosen and not (self._divides(query_len) and self._divides(key_len)):
            return False
        near = self.near or chosen.get("window") or chosen.get("chunk")
        if query_len > key_len and near:  # later queries would see nothing
            return False
        if query_len > key_len and chosen.get("append") == OWN:
            return False
        # The first queries see no key, and may give NaN, which gradients do not let be.
        blind = query_len > key_len and self.from_the_end and chosen.get("causal")
        if blind and not self.empty and chosen.get("gradients", NONE) != NONE:
            return False
        if query_len != key_len and chosen.get("causal") and self.square_if_causal:
            return False
        if query_len < 2 and "sizes" in chosen and chosen.get("empty"):
            return False
        # Kernels that everybody takes to be right mask before they scale, which makes NaN of these.
        scale = chosen.get("scale", NONE)
        if chosen.get("causal") and scale not in (NONE, 0.7):
            return False
        # With these, float16 would not hold the scores themselves.
        if chosen.get("numbers") == "overflowing" and scale != NONE:
            return False
        if query_len != key_len and chosen.get("documents"):
            return False
        heads = self.heads or chosen.get("key_heads", 1) * chosen.get("group", 1)
        most = max(self.most_weights, (self.heads or 1) * _MOST_OF_A_HEAD)
        return bool(chosen.get("batch", 1) * heads * query_len * key_len <= most)


@dataclass(frozen=True, eq=False)
class Space:
    """All calls that can be made of what is declared."""

    declared: Declared  # Which levels there are
    always: Mapping[str, Any] = field(default_factory=dict)  # Fields of `Call` that every call has
    seed: int = 0  # Where tensors are drawn from

    def covering(
        self, refused: frozenset[Levels] = frozenset(), known: Sequence[Choice] = ()
    ) -> Covering:
        """Return choices in which every pair of levels occurs that can, but for known ones."""
        return _covering(self.declared, refused, tuple(tuple(one.items()) for one in known))

    def choice(self, **levels: Any) -> dict[str, Any]:
        """Return some levels, and the ordinary one of each other feature."""
        ordinary = {name: known[0] for name, known in self.declared.levels().items()}
        if unknown := sorted(set(levels) - set(ordinary)):
            accepted = f"features among {', '.join(ordinary)}"
            raise ValueError(misuse("choice", ", ".join(unknown), accepted))
        chosen = {**ordinary, **levels}
        if chosen.get("mask", NONE) != NONE:
            chosen["shape"] = levels.get("shape", self.declared.shapes[0])
        if chosen.get("mask") == "additive":
            chosen["fill"] = levels.get("fill", "-inf")
        if not self.declared.possible(chosen):
            raise ValueError(misuse("choice", text_of(levels), "levels that can occur together"))
        return chosen

    def named(self, chosen: Choice) -> dict[str, Any]:
        """Return the levels of a choice that `choice` has to be told."""
        ordinary = self.choice()
        of_a_mask = {"shape": self.declared.shapes[0], "fill": "-inf"}  # as `choice` has them
        return {
            name: chosen[name]
            for name, level in ordinary.items()
            if chosen[name] not in (level, of_a_mask.get(name, level))
        }

    def call(self, chosen: Choice, dtype: torch.dtype, device: torch.device | str = "cpu") -> Call:
        """Draw the call of a choice, the same on every device and (but for rounding) dtype."""
        heads = self.declared.heads or chosen["key_heads"] * chosen["group"]
        drawing = Drawing(chosen, heads, self.seed, dtype, torch.device(device))
        return drawing.call(self.always)


@lru_cache(maxsize=64)
def _covering(
    declared: Declared, refused: frozenset[Levels], known: tuple[Levels, ...]
) -> Covering:
    def possible(chosen: Choice) -> bool:
        taken = not any(all(chosen.get(n) == level for n, level in some) for some in refused)
        return taken and declared.possible(chosen)

    return covering(declared.levels(), possible, known=[dict(one) for one in known])


# --- choices as text, and smaller ones


def text_of(chosen: Choice) -> str:
    """Return a choice as a line that `read` takes."""
    return " ".join(f"{name}={_shown(level)}" for name, level in chosen.items())


def _shown(level: Any) -> str:
    if isinstance(level, tuple):
        return "x".join(map(str, level))
    return str(level).replace(" ", "")


# Levels in words: of a feature that is on, or with what it holds.
_WORDS = {
    "sizes": "{0[0]} queries and {0[1]} keys", "causal": "causality", "mask": "a mask ({0})",
    "empty": "a query that may see nothing", "gradients": "gradients",
    "unused": "{0} numbers in unused slots of a cache", "pages": "pages of {0} slots",
    "append": "{0} keys that are appended", "shared": "pages that sequences share",
    "left": "a cache that is padded on the left", "ragged": "a batch of lengths: {0}",
}  # fmt: skip


def said_of(chosen: Choice) -> str:
    """Return a choice in words for a reader; what it is without is left out."""
    on = {name: one for name, one in chosen.items() if one is not False and one != NONE}
    named = (_WORDS.get(n, n if one is True else f"{n} {{0}}").format(one) for n, one in on.items())
    return ", with ".join(named)


def read(text: str, space: Space) -> dict[str, Any]:
    """Return the choice that a text names; what it leaves out is ordinary."""
    levels: dict[str, Any] = {}
    for part in text.split():
        name, equals, given = part.partition("=")
        known = space.declared.levels().get(name)
        if not equals or known is None:
            accepted = f"feature=level, of {', '.join(space.declared.levels())}"
            raise ValueError(misuse("replay", repr(part), accepted))
        levels[name] = _level(given, known)
    return space.choice(**levels)


def _level(given: str, known: tuple[Any, ...]) -> Any:
    """The level that is shown like this, or, of a size, the number."""
    for level in known:
        if _shown(level) == given:
            return level
    is_pair, is_number = isinstance(known[0], tuple), type(known[0]) is int
    size = "[1-9][0-9]{0,8}"
    if (is_pair or is_number) and re.fullmatch(f"{size}x{size}" if is_pair else size, given):
        sizes = tuple(int(one) for one in given.split("x"))
        return sizes if is_pair else sizes[0]
    accepted = f"one of {', '.join(map(_shown, known))}"
    accepted += ", or two others from 1" * is_pair + ", or another number from 1" * is_number
    raise ValueError(misuse("replay", repr(given), accepted))


def shrunk(
    chosen: Choice, fails: Callable[[Choice], bool], space: Space, *, most: int = 60
) -> dict[str, Any]:
    """Return the smallest choice found that still fails, always the same."""
    levels = space.declared.simplest_first()
    # Whole features go first: a call that has fewer of them is smaller, whatever its sizes.
    names = ["mask", *(name for name in reversed(levels) if name not in ("mask", *SIZES)), *SIZES]
    smallest, tried, again = dict(chosen), {text_of(chosen)}, True
    while again:
        again = False
        for name in names:
            for smaller in _simpler(smallest, name, levels[name], space.declared):
                if text_of(smaller) in tried:
                    continue
                if len(tried) > most:
                    return smallest
                tried.add(text_of(smaller))
                if fails(smaller):
                    smallest, again = smaller, True
                    break
    return smallest


def _simpler(
    chosen: dict[str, Any], name: str, levels: tuple[Any, ...], declared: Declared
) -> Iterator[dict[str, Any]]:
    """The same with simpler levels of one feature: of sizes and masks any, else the simplest."""
    for level in levels[: levels.index(chosen[name])] if chosen[name] in levels else levels:
        smaller = {**chosen, name: level}
        if name == "mask":
            smaller |= {"fill": NONE} | ({"shape": NONE, "empty": False} if level == NONE else {})
        if declared.possible(smaller):
            yield smaller
            if name not in (*SIZES, "mask"):
                return


def _size(level: Any) -> tuple[int, int]:
    return (max(level), math.prod(level)) if isinstance(level, tuple) else (level, level)


# Features that are numbers, in the order in which they shrink.
SIZES = ("sizes", "batch", "group", "key_heads", "head_dim")
# Sizes that a call shrinks to, besides those that are asked.
_SMALL_SIZES = (
    (1, 2), (2, 1), (2, 2), (2, 3), (3, 2), (3, 3), (4, 4), (5, 5), (8, 8), (16, 16), (1, 17),
    (17, 17), (1, 129), (1, 257), (1, 1025),
)  # fmt: skip
