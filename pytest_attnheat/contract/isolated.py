"""Checks in a process of their own: what crashes or hangs there fails, and the run goes on.

There is one process for each subject, and a new one after a crash, see `contract.processes`.
"""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from contextlib import suppress
from copy import copy
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from ..attention.devices import fault_of
from ..attention.levels import Choice, Declared, Space, read, shrunk
from ..callables import is_compiled
from ..failure import Failure
from ..inputs import check_number, dtype_name, misuse
from . import processes
from .combinations import REPLAY, Replay
from .diagnosis import Diagnosis
from .examination import Check, Examination
from .running import KNOWN, Result, checks_of, diagnosis_of, run_check
from .spec import AttentionSpec

# How long one call may take, in seconds, and a new Python to start.
TIME_LIMIT, _START_LIMIT = 120.0, 300.0
# After so many crashes with nothing between them that ran, no more is asked.
_MOST_IN_A_ROW = 5
# How many smaller calls are tried of one that crashed.
_MOST_SMALLER = 30


class _DiedError(Exception):
    """The process ended, or was ended, before it answered; in words."""


@dataclass
class Isolated:
    """Runs the checks of one subject in a process of its own; to be closed in the end."""

    spec: AttentionSpec  # What is examined
    checks: Sequence[Check] = ()  # The checks that may be run besides those of the package
    time_limit: float = TIME_LIMIT  # How long one call may take, in seconds
    _process: Any = None
    _pipe: Any = None
    _call: str = ""
    _crashed: list[str] = field(default_factory=list)
    _deadly: dict[str, Failure] = field(default_factory=dict)
    _declared: dict[Any, Declared] = field(default_factory=dict)

    def run(self, check: Check, examination: Examination, expected: str | None = None) -> Result:
        """Run a check there, as `run_check` does here."""
        shown = dtype_name(examination.dtype), str(examination.device)
        result = Result(check.name, *shown, "failed")
        crashed = replace(result, isolated=True)
        if len(self._crashed) >= _MOST_IN_A_ROW:
            return result.saying("skipped", f"not asked: it crashed in {', '.join(self._crashed)}")
        replay = getattr(check.run, "__self__", None) if check.name == REPLAY else None
        try:
            self._space_of(examination)
            found: Result = self._ask("run", examination, check.name, replay, expected)
        except _DiedError as died:
            self._crashed.append(check.name)
            if expected is not None:
                return crashed.saying("xfailed", expected)
            return self._crash(crashed, examination, str(died))
        if found.status != "skipped":
            self._crashed.clear()
        return found

    def diagnosed(
        self, examination: Examination, result: Result, *, search: bool = True
    ) -> tuple[Diagnosis | None, str]:
        """Diagnose there what failed, as `diagnosis_of` does here."""
        with suppress(_DiedError):  # the result says it
            found: tuple[Diagnosis | None, str] = self._ask("diagnose", examination, result, search)
            return found
        return None, ""

    def start(self) -> None:
        """Start the process; ValueError if its subject cannot be sent to it."""
        given = (self.spec, self.checks, self._deadly)
        self._process, self._pipe = processes.started(serve, given, "isolate", self.spec.name)
        try:
            self._answer(_START_LIMIT)
        except _DiedError as died:
            accepted = 'a call under `if __name__ == "__main__":`, where a script makes it'
            got = f"{self.spec.name}, whose process did not start ({died})"
            raise ValueError(misuse("isolate", got, accepted)) from None

    def close(self) -> None:
        """End the process, and all that it started."""
        if self._process is not None:
            processes.ended(self._process, self._pipe)
        self._process = self._pipe = None

    def _ask(self, kind: str, examination: Examination, *told: Any) -> Any:
        """Send a command, and return the answer."""
        if self._process is None:
            self.start()
        processes.send(self._pipe, kind, _parts(examination), told)
        return self._answer(self.time_limit)

    def _answer(self, limit: float) -> Any:
        """Return the next answer; each call that is drawn meanwhile may take its time."""
        self._call, died = "", f"did not answer within {limit:g} s, its time_limit"
        try:
            while self._pipe.poll(limit):
                kind, told = processes.receive(self._pipe)
                if kind == "answer":
                    return told
                if kind == "fault":
                    died = f"left its GPU unusable: {told}"
                    break
                self._call = told
        except (EOFError, OSError):
            self._process.join(limit)
            died = processes.ending(self._process.exitcode)
        self.close()
        died = f"the subject {died}"
        if self._call:
            self._deadly[self._call] = self._failure(self._call, died)
        raise _DiedError(died)

    def _space_of(self, examination: Examination) -> Space:
        """The calls that can be made; what crashes while that is found out can not be."""
        parts = _parts(examination)
        while parts not in self._declared and not self.spec.is_block:
            try:
                self._declared[parts] = self._ask("declared", examination)
            except _DiedError:
                if not self._call:
                    raise
        return Space(self._declared.get(parts, Declared()), {}, examination.seed)

    def _crash(self, result: Result, examination: Examination, said: str) -> Result:
        """The result of a crash, with the smallest call found that ends in the same way."""
        replay, until, one = self._call, time.monotonic() + self.time_limit, replace(examination)

        def ends(chosen: Choice) -> bool:
            try:  # as long as one call may take
                if time.monotonic() < until:
                    self._ask("run", one, REPLAY, Replay.of(one.text(chosen)), None)
            except _DiedError as died:
                return str(died) == said
            return False

        try:
            if replay and "did not answer" not in said:
                vars(one)["space"] = self._space_of(one)
                chosen = read(Replay.of(replay).levels, one.space)
                replay = one.text(shrunk(chosen, ends, one.space, most=_MOST_SMALLER))
        except (_DiedError, ValueError):  # not even that can be asked
            pass
        message = str(self._failure(replay, said))
        return replace(result.saying("failed", message), replay=replay)

    def _failure(self, call: str, said: str) -> Failure:
        """The failure of a call that ends its process, or none that is known; with its repeat."""
        option = argument = repeat = ""
        if self.time_limit != TIME_LIMIT:
            limit = f"{self.time_limit:.15g}"
            option, argument = f" --attn-time-limit={limit}", f", time_limit={limit}"
        if call:
            repeat = (
                f'--attn-replay="{call}" --attn-isolate{option}\n'
                f'check_attention(..., replay="{call}", isolate=True{argument})'
            )
        failure = Failure("", said, repeat=repeat or None)
        vars(failure).update(replay=call, isolated=True)
        return failure


def _parts(examination: Examination) -> tuple[Any, ...]:
    return examination.dtype, examination.device, examination.seed, examination.quick


def isolated(
    spec: AttentionSpec, checks: Sequence[Check], wanted: bool | None, time_limit: float
) -> tuple[Isolated | None, str]:
    """Return what runs the checks of a subject in a process of its own, or why nothing does."""
    # Without a wish, what is compiled gets one, if it can be sent.
    if not check_number(time_limit, "time_limit") > 0:
        raise ValueError(misuse("time_limit", repr(time_limit), "seconds above 0"))
    if spec.is_captured or not (is_compiled(spec.subject) if wanted is None else wanted):
        return None, ""
    found = Isolated(spec, [one for one in checks if one not in KNOWN], time_limit)
    try:
        found.start()
    except ValueError as error:
        if wanted:
            raise
        return None, f"it is compiled, and is not examined in a process of its own: {error}"
    return found, ""


# --- the process itself


def serve(pipe: Any, given: Any) -> None:
    """Answer commands until the pipe is closed."""
    spec, checks, deadly = given
    known = {check.name: check for check in (*checks_of(spec), *checks)}
    served = _Served(pipe, spec, known, deadly)
    served.send("answer", None)
    while True:
        try:
            kind, parts, told = processes.receive(pipe)
        except EOFError:
            return
        examination = served.examination(parts)
        answer = getattr(served, kind)(examination, *told)
        served.check_device(examination.device)
        served.send("answer", answer)


@dataclass
class _Served:
    """What can be asked; examinations and results are kept, as they hold what cannot be sent.

    Calls that are deadly are known by now, each with the failure that it is.
    """

    pipe: Any
    spec: AttentionSpec
    checks: dict[str, Check]
    deadly: dict[str, Failure]
    kept: dict[Any, Any] = field(default_factory=dict)

    def send(self, kind: str, told: Any) -> None:
        processes.send(self.pipe, kind, told)

    def examination(self, parts: tuple[Any, ...]) -> Examination:
        if parts not in self.kept:
            dtype, device, seed, quick = parts
            self.kept[parts] = Examination(self.spec, dtype, device, seed, quick, self._tell)
        found: Examination = self.kept[parts]
        return found

    def _tell(self, examination: Examination, call: str) -> None:
        self.check_device(examination.device)
        if call in self.deadly:
            raise copy(self.deadly[call])
        self.send("call", call)

    def check_device(self, device: torch.device) -> None:
        """End where a call made a GPU unusable: each further one would be blamed for it."""
        if fault := fault_of(device):
            self.send("fault", fault)
            os._exit(1)

    def run(
        self, examination: Examination, name: str, replay: Replay | None, expected: str | None
    ) -> Result:
        check = replay.check if replay else self.checks[name]
        result = run_check(check, examination, expected)
        self.kept[name, result.dtype, result.device] = result
        return result

    def diagnose(
        self, examination: Examination, result: Result, search: bool
    ) -> tuple[Diagnosis | None, str]:
        kept = self.kept.get((result.name, result.dtype, result.device), result)
        return diagnosis_of(self.spec, kept, examination.seed, search=search)

    def declared(self, examination: Examination) -> Any:
        return examination.space.declared
