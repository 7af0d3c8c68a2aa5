"""Processes that answer this one: how they are started, ended, and leave nothing behind.

They are forked where that is safe, so that anything can be handed to them. Where there is a GPU,
which no fork may use, a new Python is started, and what it is handed has to be pickled. They talk
through pipes, in bytes that are pickled here: torch would share tensors through files.
"""

from __future__ import annotations

import faulthandler
import multiprocessing
import os
import pickle
import signal
import sys
import threading
import time
import warnings
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import torch

from ..callables import accelerators
from ..inputs import misuse


def started(target: Callable[..., None], given: Any, argument: str, name: str) -> tuple[Any, Any]:
    """Start a process that calls `target(pipe, given)`; return it, and this end of its pipe."""
    # `target` is a function of a module, and calls `settled` first.
    forked = forks()
    try:
        given = given if forked else pickle.dumps(given)
    except (pickle.PicklingError, AttributeError, TypeError) as error:
        got = f"{name}, which cannot be sent to another process ({error})"
        accepted = "a function or class at the top of a module, which another Python can import"
        raise ValueError(misuse(argument, got, accepted)) from None
    context: Any = multiprocessing.get_context("fork" if forked else "spawn")
    ours, theirs = context.Pipe()
    sent = (target, theirs, ours if forked else None, given)
    process = context.Process(target=_begin, args=sent, daemon=True)
    with warnings.catch_warnings():  # of a fork beside other threads, which it does without
        warnings.simplefilter("ignore", DeprecationWarning)
        process.start()
    theirs.close()
    return process, ours


def forks() -> bool:
    """Whether processes are forked here."""
    can = "fork" in multiprocessing.get_all_start_methods() and sys.platform != "darwin"
    return can and not accelerators()


def ended(process: Any, pipe: Any) -> None:
    """End a process, and all that it started."""
    pipe.close()
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except (AttributeError, OSError):  # it has ended, or has no group of its own
        process.kill()
    process.join()


def send(pipe: Any, *told: Any) -> None:
    """Send something; if the other end is closed, that is read from the pipe."""
    with suppress(OSError):
        pipe.send_bytes(pickle.dumps(told))


def receive(pipe: Any) -> Any:
    """Return what was sent; EOFError or OSError if the other end is closed."""
    return pickle.loads(pipe.recv_bytes())


def ending(code: int | None) -> str:
    """Say how a process ended."""
    if code is None or code >= 0:
        return f"ended its process with exit code {code}"
    try:
        name = signal.Signals(-code).name
    except ValueError:  # a signal for real time, but the first and the last of them
        name = f"signal {-code}"
    return f"ended its process: {name} ({signal.strsignal(-code)})"


# --- the process itself


def _begin(target: Callable[..., None], pipe: Any, other: Any, given: Any) -> None:
    """Begin: `other` is the other end of the pipe, if this was forked, to be closed here."""
    if other is not None:
        other.close()
    if hasattr(os, "setsid"):  # what it starts ends with it
        os.setsid()
    multiprocessing.current_process().daemon = False  # it may start processes: they end with it
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # that is for the parent
    faulthandler.disable()
    torch.set_num_threads(1)  # a fork has none of those of its parent
    threading.Thread(target=_end_with, args=(os.getppid(),), daemon=True).start()
    target(pipe, pickle.loads(given) if isinstance(given, bytes) else given)


def _end_with(parent: int) -> None:
    """End with the process that started this one, whatever it is at."""
    while os.getppid() == parent:
        time.sleep(1)
    with suppress(AttributeError, OSError):
        os.killpg(os.getpid(), signal.SIGKILL)  # and what it started
    os._exit(1)
