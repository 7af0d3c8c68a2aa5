"""`grade`: which defects of attention does a test let through?

The target is replaced by itself with each known defect in turn, and judged again. `Study` is the
same step by step, for whoever runs the judge otherwise than by calling it.
"""

from __future__ import annotations

import math
import signal
import threading
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Literal, TypeAlias

from torch import nn

from ..attention.chunks import Progress
from ..callables import borrowed, seed_everything
from ..inputs import check_number, misuse, seed_number
from .effects import never_exercised
from .needs import all_undeclared
from .planting import Planted
from .planting_inside import NOTHING_INSIDE, SDPA, Inside, PlantedInside
from .reading_calls import unreadable
from .ready import as_spec
from .remedy import Remedy, remedy_for
from .spec import AttentionSpec
from .versions import Version, simple_name, versions

Status: TypeAlias = Literal["killed", "survived", "inactive"]
Judge: TypeAlias = Callable[[Any], Any]
AnyPlanted: TypeAlias = Planted | PlantedInside
# A wrong version gets so many seconds, and so many times what the right one took.
_SECONDS, _TIMES = 60.0, 20.0


class _TimeUpError(BaseException):
    """It took too long; no `except Exception` on the way stops it."""


_TimeUpError.__name__ = _TimeUpError.__qualname__ = "TimeoutError"
_TimeUpError.__module__ = "builtins"  # as it is told of


class JudgeError(AssertionError):
    """The judge does not accept the right implementation, or does not call it."""


@dataclass(frozen=True)
class Verdict:
    """What became of a wrong version."""

    name: str  # The name of the defect
    sentence: str  # What it does; it follows the word "attention"
    status: Status  # "killed", "survived", or "inactive": it changed no call beyond rounding
    kind: str = "forward"  # "forward", "backward", or "trivial"
    said: str = ""  # What the judge said
    off: float = 0.0  # By how much it was off at most, as a part of the largest number of a head
    off_by: float = 0.0  # Likewise, in numbers
    rounding: float = 0.0  # What rounding may do there at most, likewise
    dtype: str = ""  # The dtype of the call on which it was off most
    calls: int = 0  # How many calls the judge made
    active: int = 0  # How many of them it changed


@dataclass(frozen=True)
class Grade:
    """Which wrong versions a judge told from the right one; printed, it is a table.

    Attributes:
        name: The target.
        killed: The defects that the judge found.
        survived: Those that changed what it looked at, and that it accepted.
        inactive: Those that changed no call beyond rounding.
        trivial: What became of trivial answers.
        refused: Why calls were not understood; then nothing is graded.
        set_aside: Of how many calls nothing is known, and why; they are answered as the target
            does.
        never_exercised: What the calls never had, though the target takes it.
        undeclared: Parameters of the target that sound like a feature and are not declared: their
            defects are not planted.
        unplanted: Defects that were asked for by name, and need what is not declared.
        remedy: Cases that tell what survived from the right one.
        calls: How many calls the judge made of the right one.
        seed: Where random numbers started.
    """

    name: str
    killed: tuple[Verdict, ...] = ()
    survived: tuple[Verdict, ...] = ()
    inactive: tuple[Verdict, ...] = ()
    trivial: tuple[Verdict, ...] = ()
    refused: tuple[str, ...] = ()
    set_aside: tuple[tuple[str, int], ...] = ()
    never_exercised: tuple[str, ...] = ()
    undeclared: tuple[str, ...] = ()
    unplanted: tuple[str, ...] = ()
    remedy: Remedy = field(default_factory=Remedy)
    calls: int = 0
    seed: int = 0

    @property
    def score(self) -> float | None:
        """The part that was killed of the defects that were active; None if none was."""
        active = len(self.killed) + len(self.survived)
        return len(self.killed) / active if active else None

    def __str__(self) -> str:
        """What survived first, with how far it was off, then what was never exercised."""
        return "\n".join([f"{self.name}: {self._head()}", *self._lines()])

    def __repr__(self) -> str:
        """Its first line: all of it is printed by `print`."""
        return f"<Grade {self.name}: {self._head()}>"

    def _head(self) -> str:
        if self.refused:
            return "no grade, as its calls are not understood"
        calls = _counted(self.calls, "call")
        if self.score is None:
            return f"no defect changed anything beyond rounding in {calls}"
        active = len(self.killed) + len(self.survived)
        return (
            f"{len(self.killed)} of {active} active defects killed, {len(self.survived)} survived, "
            f"{len(self.inactive)} inactive, in {calls}"
        )

    def _lines(self) -> Iterator[str]:
        for reason in self.refused:
            yield f"  refused   {reason}"
        if self.refused:
            return
        yield from (f"  undeclared {hint}" for hint in self.undeclared)
        if self.unplanted:
            names = ", ".join(self.unplanted)
            yield f"  unplanted {names}: they need what the target is not declared to take"
        for reason, count in self.set_aside:
            yield f"  set aside {_counted(count, 'call')}, answered as the right one does: {reason}"
        trivial = [one for one in self.trivial if one.status == "survived"]
        ranked = sorted(self.survived, key=lambda one: -one.off)
        for title, some in (("trivial answers that passed", trivial), ("survived", ranked)):
            if some:
                yield f"\n{title}, and by how much of the largest number of a head they were off"
                width = max(len(one.name) for one in some)
                for one in some:
                    yield f"  {one.name:{width}}  {_part(one.off):>8}  attention {one.sentence}"
        if self.never_exercised:
            yield f"\nnever exercised: {', '.join(self.never_exercised)}"
        if self.inactive:
            yield f"\ninactive: {', '.join(one.name for one in self.inactive)}"
        if text := str(self.remedy):
            yield f"\n{text}"

    def as_dict(self) -> dict[str, Any]:
        """Return all that it says as plain data, which `json.dumps` writes.

        Numbers that are not finite are "inf".
        """
        data = asdict(self) | {"version": 1, "score": self.score}
        for name in ("killed", "survived", "inactive", "trivial"):
            data[name] = [
                {k: "inf" if isinstance(v, float) and not math.isfinite(v) else v
                 for k, v in one.items()} for one in data[name]
            ]  # fmt: skip
        return data


def _counted(number: int, what: str) -> str:
    return f"{number} {what}{'s' * (number != 1)}"


def _part(off: float) -> str:
    return f"{off:.1e}" if math.isfinite(off) else "NaN, inf"


class Study:
    """A target, and its wrong versions, to be judged one after another.

    Run the judge with `watched` first, which is the target itself: what `unfit` then says is why
    nothing can be graded. Then run it with `plant(version)` for each of `versions`, and tell
    `verdict` what became of it. `grade` gathers the verdicts, which can come from several
    processes.
    """

    def __init__(
        self,
        right: AttentionSpec | Callable[..., Any],  # The target, or its specification
        *,
        defects: Collection[str] | None = None,  # The names of the defects to plant; all by default
        seed: int = 0,  # Where random numbers start
        # Whether it is a block, whose defects are those of the attention inside of it; by default,
        # if it is a module with parameters and is not specified otherwise
        inside: bool | None = None,
    ) -> None:
        """Make the wrong versions of a target."""
        is_declared = isinstance(right, AttentionSpec) and right.is_block
        block: Any = right.subject if is_declared else right  # type: ignore[union-attr]
        self.inside = _is_block(block) if inside is None else inside
        self.spec = _spec_inside(block) if self.inside else as_spec(right)
        self.seed, self._block = seed_number(seed), block
        every = tuple(versions(self.spec, seed=self.seed))
        if unknown := [name for name in defects or () if simple_name(name) is None]:
            accepted = "names of the catalogue of defects, or of trivial answers: "
            accepted += ", ".join(one.name for one in every if one.kind == "trivial")
            raise ValueError(misuse("defects", repr(unknown[0]), accepted))
        wanted = None if defects is None else {simple_name(name) for name in defects}
        self.versions = tuple(v for v in every if wanted is None or v.name in wanted)
        known = {version.name for version in self.versions}
        self._unplanted = tuple(sorted(str(name) for name in (wanted or set()) - known))
        self._within = Inside()
        self.watched = self._planted(None)

    def plant(self, version: Version) -> AnyPlanted:
        """Return the target with a defect, called as the target is."""
        return self._planted(version)

    def _planted(self, version: Version | None) -> AnyPlanted:
        if self.inside:
            return PlantedInside(self.spec, self._block, version, self._within)
        return Planted(self.spec, version, self._within.known)

    @property
    def is_empty(self) -> bool:
        """Whether it is a block that was called and has no attention inside that is known."""
        return NOTHING_INSIDE in self.watched.effect.refused

    @property
    def unfit(self) -> tuple[str, ...]:
        """Why the calls of the right one are not understood, if they are not."""
        why = "" if self.inside else unreadable(self.spec)
        return (why,) if why else self.watched.effect.unfit

    def verdict(self, planted: AnyPlanted, rejected: str | None) -> Verdict:
        """Return what became of a version that the judge rejected, or (None) accepted."""
        version, effect = planted.version, planted.effect
        if version is None:
            raise ValueError(misuse("planted", "the right one", "a wrong version"))
        status: Status = "inactive"
        if effect.active:
            status = "survived" if rejected is None else "killed"
        return Verdict(
            version.name, version.sentence, status, version.kind, rejected or "", effect.off,
            effect.off_by, effect.rounding, effect.dtype, effect.calls, effect.active,
        )  # fmt: skip

    def grade(self, verdicts: Sequence[Verdict]) -> Grade:
        """Gather verdicts, in the order of the catalogue, whatever order they come in."""
        order = {one.name: number for number, one in enumerate(self.versions)}
        ranked = sorted(verdicts, key=lambda one: order[one.name])

        def having(status: str) -> tuple[Verdict, ...]:
            return tuple(v for v in ranked if v.status == status and v.kind != "trivial")

        trivial = tuple(v for v in ranked if v.kind == "trivial")
        left = [v for v in ranked if v.status == "survived"]
        plants = {one.name: one for one in self.versions}
        effect = self.watched.effect
        # Of a block, that of the attention inside: which calls of itself lead to them is not known.
        remedy = remedy_for(
            self.spec,
            [plants[v.name] for v in left],
            [plants[v.name] for v in having("inactive")],
            lambda version: Planted(self.spec, version, self._within.known),
            {v.dtype: max(w.rounding for w in left if w.dtype == v.dtype) for v in left},
            seed=self.seed,
        )
        return Grade(
            self.spec.name, having("killed"), having("survived"), having("inactive"), trivial,
            set_aside=tuple(sorted(effect.set_aside.items())),
            never_exercised=never_exercised(self.spec, effect),
            undeclared=() if self.inside else tuple(all_undeclared(self.spec)),
            unplanted=self._unplanted,
            remedy=self._of_block(remedy) if self.inside else remedy,
            calls=effect.calls, seed=self.seed,
        )  # fmt: skip

    def _of_block(self, remedy: Remedy) -> Remedy:
        """Return what a block can be given in place of the calls of the attention inside."""
        assert isinstance(self.watched, PlantedInside)
        survived = remedy.killed or remedy.left
        return replace(remedy, code=self.watched.code if survived else "", inside=True)


def _is_block(right: object) -> bool:
    return isinstance(right, nn.Module) and any(True for _ in right.parameters())


def _spec_inside(block: Any) -> AttentionSpec:
    """What a block may do inside: all that PyTorch's function takes."""
    name = type(block).__name__ if isinstance(block, nn.Module) else block.__qualname__
    return AttentionSpec(SDPA, name=name)


def grade(
    judge: Judge,
    right: AttentionSpec | Callable[..., Any],
    *,
    defects: Collection[str] | None = None,
    seed: int = 0,
    time_limit: float | None = None,
) -> Grade:
    """Grade a judge of attention by the defects that it lets through.

    Each version costs one run of the judge, and the reading of each call that it makes. How far it
    is goes to the log "pytest_attnheat", at the level INFO.

    Args:
        judge: Called with an implementation, called as `right` is. It raises, or returns False,
            when it thinks that the implementation is wrong.
        right: An implementation that it accepts: a function, a module without projections of its
            own, or an `AttentionSpec` that says how it is called.
        defects: The names of the defects to plant, as the page "The catalogue of defects" of the
            docs lists them; all by default.
        seed: Where the random numbers of torch, NumPy and Python start each time the judge runs.
        time_limit: After so many seconds a wrong version counts as killed; by default 60, and 20
            times what the right one took. Only the main thread of a POSIX system can be stopped.

    Returns:
        Which defects were killed, which survived, and which were inactive, because on every call
        that the judge made they change nothing beyond rounding.

    Raises:
        JudgeError: The judge rejects the right one, or never calls it.
        TypeError: The judge is not callable.
        ValueError: A name of a defect is unknown.
    """
    if not callable(judge):
        raise TypeError(misuse("judge", type(judge).__name__, "a function of an implementation"))
    limit = math.inf if time_limit is None else check_number(time_limit, "time_limit")
    study = Study(right, defects=defects, seed=seed)
    if study.unfit:
        return Grade(study.spec.name, refused=study.unfit, seed=study.seed)
    start = time.monotonic()
    rejected = _judged(judge, study.watched, study.seed, math.inf)
    if study.is_empty and may_be_a_function(right):  # its parameters may be those of a function
        study = Study(right, defects=defects, seed=seed, inside=False)
        rejected = _judged(judge, study.watched, study.seed, math.inf)
    if time_limit is None:
        limit = _SECONDS + _TIMES * (time.monotonic() - start)
    if rejected is not None:
        raise JudgeError(f"the judge rejects the right implementation: {rejected}")
    if not study.watched.effect.calls:
        raise JudgeError("the judge never calls the implementation that it is given")
    if study.unfit:
        return Grade(study.spec.name, refused=study.unfit, calls=study.watched.effect.calls,
                     seed=study.seed)  # fmt: skip
    verdicts = []
    progress = Progress(f"grade {study.spec.name}", len(study.versions), "of the versions judged")
    for version in study.versions:
        progress.step()
        planted = study.plant(version)
        verdicts.append(study.verdict(planted, _judged(judge, planted, study.seed, limit)))
        if planted.effect.refused:
            return Grade(study.spec.name, refused=tuple(planted.effect.refused), seed=study.seed)
    return study.grade(verdicts)


def may_be_a_function(right: object) -> bool:
    """Whether something can be called as attention is, with query, key and value."""
    try:
        return not as_spec(right).is_block  # type: ignore[arg-type]
    except (TypeError, ValueError):
        return False


def _judged(judge: Judge, planted: AnyPlanted, seed: int, limit: float) -> str | None:
    """Return what a judge says against an implementation, None if it accepts it."""
    try:
        with _handed(planted) as subject, borrowed(judge, seed=seed), _within(limit):
            seed_everything(seed)
            accepted = judge(subject)
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # also what pytest raises, and SystemExit
        first = str(error).strip().split("\n")[0]
        return f"{type(error).__name__}: {first}" if first else type(error).__name__
    return "it returns False" if accepted is False else None


@contextmanager
def _handed(planted: AnyPlanted) -> Iterator[Any]:
    """What a judge is given: of a module, that module with another forward."""
    target = planted.module
    if target is None:
        yield planted
        return
    had = vars(target).get("forward")
    vars(target)["forward"] = planted
    try:
        yield target
    finally:
        del vars(target)["forward"]
        if had is not None:
            vars(target)["forward"] = had


@contextmanager
def _within(seconds: float) -> Iterator[None]:
    """Stop what is done after so many seconds, where that can be done."""
    can = hasattr(signal, "setitimer") and threading.current_thread() is threading.main_thread()
    if not can or not math.isfinite(seconds):
        yield
        return

    def stop(number: int, frame: object) -> None:
        raise _TimeUpError(f"it took more than {seconds:.3g} seconds")

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds, 1.0)  # again, where it is caught all the same
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
