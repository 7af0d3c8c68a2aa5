"""Times of several things, taken in turn, because machines change their pace."""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch


def options(description: str | None) -> argparse.Namespace:
    """Read what every benchmark of a device takes: where it runs, and whether only to try it."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--device", default="cpu", help="where the tensors are; default: cpu")
    parser.add_argument("--quick", action="store_true", help="tiny sizes: only see that it runs")
    return parser.parse_args()


def wait_for(device: str) -> None:
    """Wait until a device has done what it was given."""
    if torch.device(device).type != "cpu":
        getattr(torch, torch.device(device).type).synchronize()


def seconds(action: Callable[[], Any], device: str = "cpu") -> float:
    """Return how long an action takes, the device's work included."""
    wait_for(device)
    start = time.perf_counter()
    action()
    wait_for(device)
    return time.perf_counter() - start


def alternate(
    functions: Sequence[Callable[[], Any]], runs: int, device: str = "cpu"
) -> list[float]:
    """Return the median seconds of each function; all run once before, then in turn."""
    times: list[list[float]] = [[] for _ in functions]
    for function in functions:
        function()
    for _ in range(runs):
        for function, taken in zip(functions, times, strict=True):
            taken.append(seconds(function, device))
    return [statistics.median(taken) for taken in times]


def copy_bandwidth(device: str, megabytes: int = 256, runs: int = 15) -> float:
    """Return how many bytes a second a copy on the device reads and writes."""
    source = torch.ones(megabytes * 2**18, device=device)
    target = torch.empty_like(source)
    (taken,) = alternate([lambda: target.copy_(source)], runs, device)
    return 2 * source.nbytes / taken


def report(what: str, ratio: float, relation: str, promise: float) -> None:
    """Print a ratio beside what is promised of it."""
    holds = ratio <= promise if relation == "<=" else ratio >= promise
    verdict = "holds" if holds else "DOES NOT HOLD"
    print(f"{what:<60} {ratio:8.2f}   promised {relation} {promise:g}   {verdict}")
