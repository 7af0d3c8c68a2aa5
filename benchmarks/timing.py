"""Times of several things, taken in turn, because machines change their pace."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any


def alternate(functions: Sequence[Callable[[], Any]], runs: int) -> list[float]:
    """Return the median seconds of each function; all run once before, then in turn."""
    times: list[list[float]] = [[] for _ in functions]
    for function in functions:
        function()
    for _ in range(runs):
        for function, seconds in zip(functions, times, strict=True):
            start = time.perf_counter()
            function()
            seconds.append(time.perf_counter() - start)
    return [statistics.median(seconds) for seconds in times]


def report(what: str, ratio: float, relation: str, promise: float) -> None:
    """Print a ratio beside what is promised of it."""
    holds = ratio <= promise if relation == "<=" else ratio >= promise
    verdict = "holds" if holds else "DOES NOT HOLD"
    print(f"{what:<60} {ratio:8.2f}   promised {relation} {promise:g}   {verdict}")
