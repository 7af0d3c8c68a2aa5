"""A function on several ranks: a group of processes with torch.distributed, that ends as one.

One rank that fails, dies or hangs ends all of them, and says why. Nothing of them is left.
"""

from __future__ import annotations

import copyreg
import faulthandler
import importlib
import os
import pickle
import re
import shutil
import signal
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing, suppress
from dataclasses import dataclass, field
from datetime import timedelta
from functools import partial
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import distributed

from ..attention.chunks import Progress
from ..attention.devices import check_device, visible_devices
from ..failure import Failure
from ..inputs import check_number, misuse, positive
from . import processes

# How long one call may take, in seconds; and the start of a group, which may import torch again.
TIME_LIMIT, _START_LIMIT = 120.0, 300.0
# Who waits for a rank that failed says so as well, or never answers: others are awaited for so
# long, in seconds, once it is known why, and before it is.
_GRACE, _PATIENCE = 0.3, 3.0
# How often it is asked whether they live, in seconds: what a rank started may hold its pipe open.
_PULSE = 1.0
_DEVICE = "a kind of device, without a number: cpu, or one of which there is one a rank, cuda"
# How many errors beneath one another are told of one.
_DEEPEST = 8
# What a rank says that has lost another one.
_LOST = re.compile("closed by peer|reset by peer|connection refused|broken pipe|timed out", re.I)
_RETURNED = "tensors and plain data"
# How a traceback that faulthandler writes names a place.
_FRAME = re.compile(r'File "(.+)", line (\d+) in (\S+)')


class AbsentError(LookupError):
    """There are not as many devices as ranks."""


class _Error(NamedTuple):
    """What a rank raised: at which time, on the clock that all processes share, and where.

    `beneath` is what it was raised from, or while handling (False): each error, and where.
    """

    at: float
    error: BaseException
    where: str
    beneath: tuple[tuple[bool, BaseException, str], ...] = ()


class _Warned(NamedTuple):
    """A warning of a rank: what `warnings.warn_explicit` takes."""

    text: str
    category: type[Warning]
    file: str
    line: int


@dataclass
class Ranks:
    """A group of processes that call one function together; to be closed in the end.

    Attributes:
        count: How many there are.
        body: The function. `torch.distributed` is ready where it is called.
        device: "cpu", on which they talk by gloo; or a kind of device of which there is one for
            each rank, "cuda": then tensors there travel by nccl.
        time_limit: How long one call may take, in seconds.
        skips: Errors that are told where no rank raises another one.
    """

    count: int
    body: Callable[..., Any]
    device: str = "cpu"
    time_limit: float = TIME_LIMIT
    skips: tuple[type[BaseException], ...] = ()
    _processes: list[tuple[Any, Any]] = field(default_factory=list)
    _folder: str = ""
    _registries: dict[str, dict[Any, Any]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        positive("ranks", self.count)
        _check_body(self.body)
        if not isinstance(self.device, str):
            raise TypeError(misuse("device", repr(self.device), _DEVICE))
        if ":" in check_device(self.device, "device", _DEVICE):
            raise ValueError(misuse("device", repr(self.device), _DEVICE))
        if not check_number(self.time_limit, "time_limit") > 0:
            raise ValueError(misuse("time_limit", repr(self.time_limit), "seconds above 0"))

    def start(self) -> None:
        """Start them."""
        present = visible_devices().get(self.device, 0)
        if self.device != "cpu" and present < self.count:
            raise AbsentError(f"{self.count} ranks need as many {self.device}, here are {present}")
        if processes.forks() and distributed.is_initialized():
            got = "a process in which torch.distributed has a group already, as a rank has"
            accepted = "one without: torch.distributed.destroy_process_group() first"
            raise ValueError(misuse("ranks", got, accepted))
        self._folder = tempfile.mkdtemp(prefix="attn-ranks-")
        try:
            for rank in range(self.count):
                given = (rank, self.count, self._folder, self.device, self.body)
                self._processes.append(processes.started(_serve, given, "body", _name(self.body)))
            self._answers(_START_LIMIT)
        except BaseException:
            self.close()
            raise

    def run(self, arguments: Sequence[Sequence[Any]]) -> list[Any]:
        """Call the function on each rank, with arguments of its own; return what each returned."""
        if not self._processes:
            self.start()
        for (_, pipe), given in zip(self._processes, arguments, strict=True):
            processes.send(pipe, *given)
        return self._answers(self.time_limit)

    def close(self) -> None:
        """End all of them."""
        for process, pipe in self._processes:
            processes.ended(process, pipe)
        self._processes.clear()
        shutil.rmtree(self._folder, ignore_errors=True)

    def _answers(self, limit: float) -> list[Any]:
        answers: dict[int, Any] = {}
        died: dict[int, str] = {}
        errors: dict[int, _Error] = {}
        warned: dict[int, Sequence[_Warned]] = {}
        name = f"{_name(self.body)} on {self.count} ranks"
        progress = Progress(name, self.count, "have answered", even=False)
        until, first = time.monotonic() + limit, None
        while waiting := {
            pipe: rank for rank, (_, pipe) in enumerate(self._processes)
            if rank not in {*answers, *died, *errors}
        }:  # fmt: skip
            if died or errors:
                first = first or time.monotonic()
                sure = died or not all(_lost(one) for one in errors.values())
                until = min(until, first + (_GRACE if sure else _PATIENCE))
            progress.at(len(answers))
            left = until - time.monotonic()
            ready: list[Any] = wait(list(waiting), max(0.0, min(left, _PULSE)))
            if not ready and left <= _PULSE:
                break
            dead = [one for one in waiting if self._processes[waiting[one]][0].exitcode is not None]
            for pipe in ready or dead:
                rank = waiting[pipe]
                try:
                    if not pipe.poll():
                        raise EOFError
                    answer = pipe.recv_bytes()
                except (EOFError, OSError):
                    process = self._processes[rank][0]
                    process.join(limit)
                    died[rank] = processes.ending(process.exitcode)
                else:
                    kind, told, warned[rank] = _read(answer)
                    (answers if kind == "answer" else errors)[rank] = told
        for one in dict.fromkeys(w for rank in sorted(warned) for w in warned[rank]):
            warnings.warn_explicit(*one, registry=self._registries.setdefault(one.file, {}))
        if len(answers) == self.count:
            return [answers[rank] for rank in range(self.count)]
        hung = [] if died or errors else sorted(waiting.values())
        places = self._places(hung)
        if len(errors) < self.count or len({str(one.error) for one in errors.values()}) > 1:
            self.close()  # else all are where they were, and can be called again
        if died:
            rank, said = next(iter(died.items()))
            raise Failure("", f"rank {rank} of {self.count} {said}", cause=self._said(errors))
        if hung:
            raise Failure("", self._hung(hung, limit), cause=places or None)
        raise self._first(errors)

    def _first(self, errors: Mapping[int, _Error]) -> BaseException:
        """What was raised first; skips come after that, and what says that a rank was lost last."""
        rank, found = min(
            errors.items(),
            key=lambda one: (_lost(one[1]), isinstance(one[1].error, self.skips), one[1].at),
        )
        same = [r for r, one in errors.items() if str(one.error) == str(found.error)]
        who = f"rank {rank} of {self.count}"
        if len(same) == self.count > 1:
            who = f"each of {self.count} ranks"
        upper = found.error
        _note(upper, who, found.where)
        for meant, lower, where in found.beneath:
            _note(lower, who, where)
            setattr(upper, "__cause__" if meant else "__context__", lower)
            upper = lower
        return found.error

    def _said(self, errors: Mapping[int, _Error]) -> str | None:
        """What ranks raised beside one that died, which may be why it did."""
        own = {rank: one for rank, one in errors.items() if not _lost(one)}
        if not own:
            return None
        rank, found = min(own.items(), key=lambda one: one[1].at)
        raised = f"{type(found.error).__name__}: {found.error}, at {found.where}"
        return f"rank {rank} of {self.count} raised {raised}"

    def _hung(self, ranks: Sequence[int], limit: float) -> str:
        who = f"rank {ranks[0]}" if len(ranks) == 1 else f"ranks {', '.join(map(str, ranks))}"
        return f"{who} of {self.count} did not answer within {limit:g} s, the time_limit"

    def _places(self, ranks: Sequence[int]) -> str:
        """Where ranks that do not answer are, as far as they can be asked."""
        if not hasattr(signal, "SIGUSR1"):
            return ""
        for rank in ranks:
            with suppress(OSError):
                os.kill(self._processes[rank][0].pid, signal.SIGUSR1)
        time.sleep(0.2 if ranks else 0.0)
        said = []
        for rank in ranks:
            frames = _FRAME.findall(_text_of(_place_file(self._folder, rank)))
            own = [one for one in frames if not _is_foreign(one[0])] or frames
            if own:
                file, line, function = own[0]
                said.append(f"rank {rank} is at {Path(file).name}:{line} in {function}")
        return "; ".join(said)


def on_ranks(
    count: int,
    body: Callable[..., Any],
    *arguments: Any,
    device: str = "cpu",
    time_limit: float = TIME_LIMIT,
    skips: tuple[type[BaseException], ...] = (),
) -> list[Any]:
    """Call `body(*arguments)` on so many ranks, see `Ranks`; return what each returned."""
    _check_body(body)
    group = Ranks(count, partial(body, *arguments), device, time_limit, skips)
    with closing(group):
        return group.run([()] * group.count)


def _note(error: BaseException, who: str, where: str) -> None:
    """Note where an error was raised, whose traceback is that of this process."""
    notes = [*getattr(error, "__notes__", ()), f"on {who}: {where}" if where else f"on {who}"]
    vars(error)["__notes__"] = notes  # `add_note`: from Python 3.11


def _check_body(body: object) -> None:
    if not callable(body):
        raise TypeError(misuse("body", type(body).__name__, "a function"))


def _read(answer: bytes) -> tuple[str, Any, Sequence[_Warned]]:
    """What a rank told; an error, if it cannot be read here."""
    try:
        kind, told, warned = pickle.loads(answer)
    except Exception as error:  # whatever its class does
        got = f"what cannot be read in this process ({type(error).__name__}: {error})"
        refused = TypeError(misuse("what a rank returns", got, _RETURNED))
        return "error", _Error(time.monotonic(), refused, ""), ()
    return kind, told, warned


def _name(body: Callable[..., Any]) -> str:
    named = body.func if isinstance(body, partial) else body
    return str(getattr(named, "__qualname__", type(named).__name__))


def _lost(one: _Error) -> bool:
    """Whether a rank says that it has lost another one."""
    return isinstance(one.error, RuntimeError) and bool(_LOST.search(str(one.error)))


def _is_foreign(file: str) -> bool:
    parts = Path(file).parts
    ours = Path(__file__).parent.parent.parts
    library = Path(os.__file__).parent.parts
    installed = {"torch", "site-packages"} & set(parts)
    return bool(installed) or library == parts[: len(library)] or ours == parts[: len(ours)]


def _place_file(folder: str, rank: int) -> Path:
    return Path(folder) / f"rank-{rank}"


def _text_of(file: Path) -> str:
    try:
        return file.read_text(errors="replace")
    except OSError:
        return ""


# --- a rank


def _serve(pipe: Any, given: tuple[int, int, str, str, Callable[..., Any]]) -> None:
    """Be a rank, and answer calls until the pipe is closed."""
    rank, count, folder, device, body = given
    with _place_file(folder, rank).open("w") as places:
        if hasattr(signal, "SIGUSR1"):
            faulthandler.register(signal.SIGUSR1, file=places, all_threads=False)
        answer = _answered(partial(_join, rank, count, folder, device))
        while True:
            _tell(pipe, answer)
            try:
                arguments = processes.receive(pipe)
            except (EOFError, OSError):
                return
            answer = _answered(partial(body, *arguments))


def _join(rank: int, count: int, folder: str, device: str) -> None:
    """Join the group. Its file is one that only this group knows: no port can be taken."""
    torch.manual_seed(rank)
    backend = "gloo"
    if device != "cpu":
        torch.get_device_module(device).set_device(rank)
        backend = f"cpu:gloo,{device}:nccl"
    store = distributed.FileStore(str(Path(folder) / "store"), count)
    # Who waits in vain is ended by its parent, which knows the limit.
    limit = timedelta(days=1)
    distributed.init_process_group(backend, store=store, rank=rank, world_size=count, timeout=limit)


def _answered(call: Callable[[], Any]) -> tuple[str, Any, list[_Warned]]:
    """What a call returns, or raises, as it can be told; and of what it warned."""
    with warnings.catch_warnings(record=True) as caught:
        try:
            kind, told = "answer", call()
        except (SystemExit, KeyboardInterrupt):
            raise
        except BaseException as error:  # skips of pytest are no exceptions of the usual kind
            beneath = tuple((meant, *_told(one)) for meant, one in _beneath(error))
            kind, told = "error", _Error(time.monotonic(), *_told(error), beneath)
    return kind, told, [_warned(one) for one in caught]


def _told(error: BaseException) -> tuple[BaseException, str]:
    """An error as it is told, and the last line that raised it, if there is one of no library."""
    frames = [f for f in traceback.extract_tb(error.__traceback__) if f.filename != __file__]
    own = [f for f in frames if not _is_foreign(f.filename)] or frames
    where = f"{Path(own[-1].filename).name}:{own[-1].lineno} in {own[-1].name}" if own else ""
    return _portable(error), where


def _beneath(error: BaseException) -> list[tuple[bool, BaseException]]:
    """What an error was raised from (True) or while handling, and what that was, and so on."""
    found: list[tuple[bool, BaseException]] = []
    while len(found) < _DEEPEST:
        meant = error.__cause__ is not None
        lower = error.__cause__ or (None if error.__suppress_context__ else error.__context__)
        if lower is None:
            break
        found.append((meant, lower))
        error = lower
    return found


def _warned(one: warnings.WarningMessage) -> _Warned:
    category: type[Warning] = one.category
    if not hasattr(sys.modules.get(category.__module__), category.__name__):
        category = UserWarning  # which can be sent
    return _Warned(str(one.message), category, one.filename, one.lineno)


def _portable(error: BaseException) -> BaseException:
    """An error as another process can read it."""
    error = error.with_traceback(None)
    kind = type(error)
    if not hasattr(sys.modules.get(kind.__module__), kind.__name__):
        copyreg.pickle(kind, _taken_apart)
    said = kind.__name__
    try:
        said = f"{said}: {error}"
        pickle.loads(pickle.dumps(error))
    except Exception:  # whatever its class does
        return RuntimeError(said)
    return error


def _taken_apart(error: Any) -> tuple[Any, ...]:
    """How to pickle an error whose class is not where it says that it is, as those of pytest."""
    module = type(error).__init__.__globals__["__name__"]
    return _put_together, (module, type(error).__name__, error.args), vars(error)


def _put_together(module: str, name: str, arguments: tuple[Any, ...]) -> BaseException:
    error: BaseException = getattr(importlib.import_module(module), name)(*arguments)
    return error


def _tell(pipe: Any, answer: tuple[str, Any, list[_Warned]]) -> None:
    for stream in (sys.stdout, sys.stderr):
        with suppress(Exception):
            stream.flush()
    try:
        processes.send(pipe, *answer)
    except Exception as error:  # what it returned cannot be pickled
        got = f"a {type(answer[1]).__name__} that cannot be sent to another process ({error})"
        refused = TypeError(misuse("what a rank returns", got, _RETURNED))
        processes.send(pipe, "error", _Error(time.monotonic(), refused, ""), answer[2])
