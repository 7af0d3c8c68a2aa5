"""Every pair of declared features, the smallest call that goes wrong, and asking it again."""

from __future__ import annotations

import operator
import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import combinations
from typing import Any, TypeAlias

from ..assertions.precision_judgement import RIGHT
from ..attention.cases import DTYPES
from ..attention.drawing import RAGGED, SAME
from ..attention.levels import (
    NONE,
    OPTIONS,
    SIZES,
    Choice,
    Declared,
    Levels,
    Space,
    read,
    shrunk,
    text_of,
)
from ..failure import Failure
from ..inputs import dtype_name, misuse
from .examination import Check, Examination, Skipped, is_about_dtypes, is_refusal

# Features whose levels may be refused: all but what is asked of the answer.
_ASKED = ("numbers", "gradients")
# How a device says that it failed, and PyTorch that shapes do not fit.
_OF_DEVICES = ("CUDA error", "HIP error", "illegal memory access", "misaligned address")
_OF_SHAPES = ("The size of tensor", "must match", "out of range", "out of bounds", "expected size")
# What was in calls that were refused is asked again, so often.
_ROUNDS = 4
# The check that a replay is.
REPLAY = "replay"
# All calls that any subject may be asked.
_EVERYTHING = Space(Declared(
    masks=frozenset(("boolean", "additive")), causal=True, options=frozenset(OPTIONS), grouped=True,
    most_weights=sys.maxsize, ragged=(*RAGGED, *SAME[1:]),
    stored=(("shared", (False, True)), ("left", (False, True))),
))  # fmt: skip
# What calls that are wrong share with a smaller probability is no chance.
_CHANCE = 1e-3
_Wrong: TypeAlias = list[tuple[dict[str, Any], Exception]]


@dataclass
class Refusals:
    """What the subject turned out not to take, found by asking for little besides."""

    examination: Examination  # What is examined
    # By what was refused, the levels of one feature or of two: its words, or None where it is taken
    known: dict[Levels, str | None] = field(default_factory=dict)

    def of(self, chosen: Choice, error: Exception) -> bool:
        """Return whether a choice cannot be asked: one alone or two of its levels cannot be."""
        named = self.examination.space.named(chosen)
        special = tuple((name, level) for name, level in named.items() if name not in _ASKED)
        few = [*combinations(special, 1), *combinations(special, 2)]
        # What is known already comes first: to ask takes time.
        if any(self.known.get(some) for some in few) or any(map(self._refused, few)):
            return True
        if is_refusal(error):  # it takes more than two
            graded = chosen["gradients"] != NONE
            self.known[(("gradients", chosen["gradients"]),) if graded else special] = _words(error)
        elif self._names_two(named, error):
            self.known[special] = _words(error)
        return is_refusal(error) or self.known.get(special) is not None

    def _names_two(self, named: Mapping[str, Any], error: Exception) -> bool:
        """Whether an error is about two of the arguments that were given, by their keywords."""
        # "attn_mask should not be set when is_causal": a subject may take both in some of its ways
        # to compute, and decline them in others.
        raw = any(words in str(error) for words in (*_OF_DEVICES, *_OF_SHAPES))
        if raw or not isinstance(error, RuntimeError | ValueError):
            return False
        spec = self.examination.spec
        of_levels = {"mask": spec.mask_argument, "causal": spec.causal_argument}
        of_levels["scale"] = spec.scale_argument or ""
        words = [of_levels.get(name, getattr(spec, name, None)) for name in named]
        given = {word for word in words if isinstance(word, str) and word}
        return sum(word in str(error) for word in given) > 1

    def _refused(self, some: Levels) -> bool:
        if some not in self.known:
            self.known[some] = self._ask(dict(some))
        return self.known[some] is not None

    def _ask(self, levels: Mapping[str, Any]) -> str | None:
        try:
            call = self.examination.case(**levels)
        except Skipped:  # these alone are no call
            return None
        try:
            self.examination.spec.ask(call)
        except Exception as error:
            return None if _is_raw(error, levels) else _words(error)
        return None

    @property
    def levels(self) -> frozenset[Levels]:
        """What was refused."""
        return frozenset(some for some, words in self.known.items() if words is not None)

    def __str__(self) -> str:
        """Say what was refused, in each of its own words once."""
        said: dict[str, list[str]] = {}
        for some, words in self.known.items():
            if words is not None:
                said.setdefault(words, []).append(text_of(dict(some)))
        return "; ".join(f"{', '.join(levels)} ({words})" for words, levels in said.items())


def _is_raw(error: Exception, levels: Mapping[str, Any]) -> bool:
    """Whether an error is no word of somebody who declines."""
    # A device that fails is one. So are shapes that do not fit where two things come together that
    # are taken each alone, one of them lengths: who declines lengths declines them with anything.
    text = str(error)
    if is_about_dtypes(error) or any(words in text for words in _OF_DEVICES):
        return True
    fits_not = isinstance(error, IndexError) or any(words in text for words in _OF_SHAPES)
    return fits_not and len(levels) > 1 and "sizes" in levels and "shape" not in levels


def _words(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"


class Counted(str):
    """A text with the numbers that it says."""

    counts: dict[str, int]  # The numbers, by name

    def __new__(cls, text: str, counts: dict[str, int] | None = None) -> Counted:
        """Make the text, with its numbers."""
        found = super().__new__(cls, text)
        found.counts = counts or {}
        return found


def ask_pairs(examination: Examination) -> Counted:
    """Judge calls in which every pair of levels occurs; return how many pairs that were."""
    # The failure is about the smallest call found that is still wrong. Skipped: it refuses every
    # call.
    refusals = Refusals(examination)
    asked: list[dict[str, Any]] = []
    wrong: _Wrong = []
    refused = 0
    for _ in range(_ROUNDS):
        # What else was in the calls that were refused is asked without what was refused.
        covering = examination.space.covering(refusals.levels, asked)
        if not covering.cases:
            break
        for chosen in covering.cases:
            if error := _error(chosen, examination):
                if not isinstance(error, Failure) and refusals.of(chosen, error):
                    refused += 1
                    continue
                wrong.append((chosen, error))
            asked.append(chosen)
    wrong += _refused_between(examination, refusals, asked)
    if wrong:
        _raise_smallest(examination, wrong, asked)
    if not asked:
        raise Skipped(str(refusals) or "nothing can be asked")
    pairs = len({pair for one in asked for pair in combinations(one.items(), 2)})
    every = "all" if pairs == covering.pairs else f"of {covering.pairs:,}"
    note = f"{pairs:,} pairs of levels in {len(asked)} calls per dtype, {every} that can occur"
    more = f"\n{refused} more calls were refused: {refusals}" if refused else ""
    counts = {"asked": pairs, "of": covering.pairs, "calls": len(asked), "refused": refused}
    return Counted(f"{note} together{more}", counts)


def _refused_between(
    examination: Examination, refusals: Refusals, asked: Sequence[Choice]
) -> _Wrong:
    """The lengths that are refused where longer ones are taken: that is no limit, but a bug."""
    found: _Wrong = []
    for some in refusals.levels:
        sizes = dict(some).get("sizes") if len(some) == 1 else None
        longer = [one["sizes"] for one in asked]
        if sizes and any(all(map(operator.lt, sizes, other)) for other in longer):
            chosen = examination.space.choice(sizes=sizes)
            error = _error(chosen, examination)
            if error is not None and not is_refusal(error):
                found.append((chosen, error))
    return found


def _error(chosen: Choice, examination: Examination) -> Exception | None:
    try:
        examination.judge(chosen, explain=False)
    except Exception as error:
        return error.with_traceback(None)  # which would keep every tensor of the call
    return None


def _raise_smallest(examination: Examination, wrong: _Wrong, asked: Sequence[Choice]) -> None:
    space = examination.space
    first, error = min(wrong, key=lambda one: len(space.named(one[0])))
    kind = _kind(error)
    smallest = shrunk(first, lambda one: _kind(_error(one, examination)) == kind, space)
    shared = _shared(space, smallest, [one for one, _ in wrong], asked)
    said = f"{len(wrong)} of {len(asked)} calls are wrong" + (f", all with {shared}" * bool(shared))
    said += "; this is one of them, made as small as it still is wrong" * (smallest != first)
    try:
        examination.judge(smallest, explain=False)
    except Failure as failure:
        failure.cases = said
        failure.cause = _cause(examination, smallest, first)
        if str(failure.cause).startswith(RIGHT):  # which is said once
            failure.claim = failure.claim.removesuffix(f"; {RIGHT}")
        raise
    except Exception as raised:
        vars(raised).setdefault("__notes__", []).insert(0, said)
        raise
    raise error  # which it does not always raise


def _cause(examination: Examination, smallest: Choice, first: Choice) -> str | None:
    """The likely cause, told by a larger call: of one or two numbers, too much is true."""
    ordinary = examination.space.choice()
    of_its_heads = {**ordinary, "group": smallest["group"], "key_heads": smallest["key_heads"]}
    for sizes in (ordinary, of_its_heads, first, smallest):
        chosen = {**smallest, **{name: sizes[name] for name in SIZES}}
        try:
            if examination.space.declared.possible(chosen):
                examination.judge(chosen)
        except Failure as failure:
            cause = failure.cause
            # What is counted or measured in another call is not true of the smallest.
            named = cause and (" of attention " in cause or not re.search(r"\d", cause))
            if named or (cause and sizes is smallest):
                return cause
        except Exception:  # the smallest is what is told of
            continue
    return None


def _kind(error: Exception | None) -> object:
    """What is alike in two errors: of a subject's own, its words without their numbers."""
    if error is None or isinstance(error, Failure):
        return type(error)
    return type(error), re.sub(r"\d+", "", str(error))


def _shared(
    space: Space, smallest: Choice, wrong: Sequence[Choice], asked: Sequence[Choice]
) -> str:
    """Say what all calls that are wrong have in common, unless it is likely to be chance."""
    levels = {
        name: [level for level in known if any(one[name] == level for one in wrong)]
        for name, known in space.declared.levels().items()
    }
    ordinary = space.choice()
    needed = {
        name
        for name in space.named(smallest)
        if name != "sizes" and ordinary[name] not in levels[name]
    }
    alike = [one for one in asked if all(one[name] in levels[name] for name in needed)]
    said = []
    for name, found in levels.items():
        likely = sum(one[name] in found for one in alike) / len(alike)
        if name in needed or (likely < 1 and likely ** len(wrong) < _CHANCE):
            said.append(
                f"{name}={'|'.join(text_of({name: one}).partition('=')[2] for one in found)}"
            )
    return " ".join(said)


@dataclass(frozen=True)
class Replay:
    """One call as a failed examination printed it."""

    levels: str  # Its levels as text; what is left out is ordinary
    dtype: str | None = None  # The dtype that it names, if it does
    seed: int | None = None  # The seed that it names, if it does

    @classmethod
    def of(cls, text: str) -> Replay:
        """Read a text."""
        given = dict(re.findall(r"(?:^|\s)(dtype|seed)=(\S*)", text))
        dtype, seed = given.get("dtype"), given.get("seed")
        if dtype not in (None, *DTYPES):
            raise ValueError(misuse("replay", repr(f"dtype={dtype}"), ", ".join(DTYPES)))
        if seed is not None and not (seed.isascii() and seed.isdigit()):
            raise ValueError(misuse("replay", repr(f"seed={seed}"), "a whole number from 0"))
        levels = " ".join(part for part in text.split() if part.partition("=")[0] not in given)
        read(levels, _EVERYTHING)  # what is mistyped is no call of any subject
        return cls(levels, dtype, None if seed is None else int(seed))

    def among(self, examinations: Sequence[Examination]) -> list[Examination]:
        """Return the examinations in the dtype that it names; one of the others to say so."""
        named = [one for one in examinations if self.dtype in (None, dtype_name(one.dtype))]
        return named or list(examinations[:1])

    @property
    def check(self) -> Check:
        """The check that judges it, and nothing else."""
        return Check(REPLAY, "the call that is replayed is attention", self._judge, quick=True)

    def _judge(self, examination: Examination) -> None:
        if examination.spec.is_block or examination.spec.is_captured:
            raise Skipped("only a call of an attention function can be replayed")
        if self.dtype not in (None, dtype_name(examination.dtype)):
            raise Skipped(f"it is not examined in {self.dtype}")
        if self.seed is not None:
            examination = replace(examination, seed=self.seed)
        try:
            chosen = read(self.levels, examination.space)
        except ValueError as reason:
            raise Skipped(str(reason)) from None
        examination.judge(chosen)
