"""The process in which a subject is examined by itself: it answers the commands of `Isolated`."""

from __future__ import annotations

import faulthandler
import os
import pickle
import signal
import threading
import time
from copy import copy
from dataclasses import dataclass, field
from typing import Any

import torch

from pytest_attnheat.contract.combinations import Replay
from pytest_attnheat.contract.diagnosis import Diagnosis
from pytest_attnheat.contract.examination import Check, Examination
from pytest_attnheat.contract.running import Result, checks_of, diagnosis_of, run_check
from pytest_attnheat.contract.spec import AttentionSpec
from pytest_attnheat.failure import Failure


def serve(pipe: Any, other: Any, given: Any) -> None:
    """Answer commands until the pipe is closed.

    Args:
        pipe: Where commands come from, and answers go to.
        other: The other end of it, if this process was forked; it has to be closed here.
        given: The specification and the checks of its own, pickled if it was not.
    """
    if other is not None:
        other.close()
    if hasattr(os, "setsid"):  # what it starts ends with it
        os.setsid()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # that is for the parent
    faulthandler.disable()
    torch.set_num_threads(1)  # a fork has none of those of its parent
    threading.Thread(target=_end_with, args=(os.getppid(),), daemon=True).start()
    spec, checks, deadly = pickle.loads(given) if isinstance(given, bytes) else given
    known = {check.name: check for check in (*checks_of(spec), *checks)}
    served = _Served(pipe, spec, known, deadly)
    served.send("answer", None)
    while True:
        try:
            kind, parts, told = pickle.loads(pipe.recv_bytes())
        except EOFError:
            return
        examination = served.examination(parts)
        answer = getattr(served, kind)(examination, *told)
        served.check_device(examination.device)
        served.send("answer", answer)


def _end_with(parent: int) -> None:
    """End with the process that started this one, whatever the subject is at."""
    while os.getppid() == parent:
        time.sleep(1)
    os._exit(1)


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
        self.pipe.send_bytes(pickle.dumps((kind, told)))

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
        try:
            if device.type != "cpu" and hasattr(getattr(torch, device.type), "synchronize"):
                getattr(torch, device.type).synchronize()
        except RuntimeError as error:
            self.send("fault", str(error).partition("\n")[0])
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
