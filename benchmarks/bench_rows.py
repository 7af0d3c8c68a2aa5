"""What `assert_row_stochastic` costs, beside what was promised.

    python benchmarks/bench_rows.py [--device cuda]

Every figure is a ratio of two things measured in turns in this run, the median
of several rounds, so that a busy machine slows both.
"""

import ctypes
import re
import statistics
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from timing import copy_bandwidth, options, seconds

from pytest_attnheat import assert_row_stochastic

SHAPE = (64, 1024, 1024)  # 256 MB in float32
ON_ACCELERATOR = (64, 4096, 4096)  # 4 GB: what is smaller is read before its kernels are started
ROUNDS = 25

Action = Callable[[], object]


def usual_trio(weights: torch.Tensor) -> None:
    """Check rows the way most test suites do."""
    if not (weights.isfinite().all() and (weights >= 0).all() and (weights <= 1).all()):
        raise AssertionError
    torch.testing.assert_close(weights.sum(-1), torch.ones(weights.shape[:-1]).to(weights))


def ratio(action: Action, reference: Action, device: str, rounds: int = ROUNDS) -> float:
    """Return the median of time over the reference's time, which is taken before and after."""
    for warm_up in (reference, action, reference, action):
        warm_up()
    ratios = []
    for _ in range(rounds):
        before = seconds(reference, device)
        taken = seconds(action, device)
        after = seconds(reference, device)
        ratios.append(2 * taken / (before + after))
    return statistics.median(ratios)


def report(name: str, measured: float, promise: float, unit: str, *, at_most: bool) -> None:
    """Print a figure beside its promise."""
    holds = measured <= promise if at_most else measured >= promise
    bound = "at most" if at_most else "at least"
    verdict = "holds" if holds else "DOES NOT HOLD"
    print(f"{name:<58} {measured:7.2f}{unit:<4} promised {bound} {promise:g}{unit}: {verdict}")


def extra_megabytes(action: Action) -> float | None:
    """Return by how much an action raises the peak memory of this process (Linux only)."""
    forget = Path("/proc/self/clear_refs")
    if not forget.exists():
        return None
    action()  # loads the kernels
    # Memory that was freed but kept would hide what the action needs.
    getattr(ctypes.CDLL(None), "malloc_trim", lambda _: None)(0)
    forget.write_text("5")
    before = _peak_kilobytes()
    action()
    return (_peak_kilobytes() - before) / 1024


def _peak_kilobytes() -> int:
    found = re.search(r"VmHWM:\s+(\d+)", Path("/proc/self/status").read_text())
    return int(found[1]) if found else 0


def on_cpu(weights: torch.Tensor) -> None:
    """Print the figures that were promised for a CPU."""

    def one_sum() -> object:
        return weights.sum(-1)

    def check() -> None:
        assert_row_stochastic(weights)

    report("float32, against weights.sum(-1)", ratio(check, one_sum, "cpu"), 1.3, "x", at_most=True)
    trio = ratio(lambda: usual_trio(weights), check, "cpu", rounds=7)
    report("float32, how much faster than the usual trio", trio, 25, "x", at_most=False)
    for dtype in (torch.float16, torch.bfloat16):
        narrow = weights.to(dtype)
        name = f"{str(dtype).removeprefix('torch.')}, against float32 weights.sum(-1)"
        measured = ratio(lambda w=narrow: assert_row_stochastic(w), one_sum, "cpu")
        report(name, measured, 5, "x", at_most=True)
        megabytes = extra_megabytes(lambda w=narrow: assert_row_stochastic(w))
        if megabytes is not None:
            name = f"{str(dtype).removeprefix('torch.')}, extra memory"
            report(name, megabytes, 16, " MB", at_most=True)
    megabytes = extra_megabytes(check)
    if megabytes is not None:
        report("float32, extra memory", megabytes, 16, " MB", at_most=True)


def on_accelerator(weights: torch.Tensor, device: str) -> None:
    """Print the bandwidth on a device beside that of a copy, which reads and writes.

    Weights are read twice, for their sums and their signs: half of the bandwidth is the most.
    """
    target = torch.empty_like(weights)
    times = ratio(lambda: assert_row_stochastic(weights), lambda: target.copy_(weights), device)
    bandwidth = copy_bandwidth(device)
    print(f"{device}, a copy on the device reads and writes {bandwidth / 1e9:.3g} GB/s")
    share = 100 / (2 * times)
    name = f"{device}, float32, bandwidth against a device copy"
    report(name, share, 40, "%", at_most=False)
    module = getattr(torch, torch.device(device).type)
    if hasattr(module, "max_memory_allocated"):
        module.reset_peak_memory_stats()
        before = module.memory_allocated()
        assert_row_stochastic(weights)
        extra = (module.max_memory_allocated() - before) / 2**20
        report(f"{device}, float32, extra memory", extra, 16, " MB", at_most=True)


def main() -> None:
    """Print every figure."""
    given = options(__doc__)
    shape = (2, 64, 64) if given.quick else SHAPE if given.device == "cpu" else ON_ACCELERATOR
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, Python {sys.version[:6]}")
    generator = torch.Generator(given.device).manual_seed(0)
    weights = torch.randn(shape, generator=generator, device=given.device).softmax(-1)
    print(f"{shape}, {weights.nbytes / 2**20:.3g} MB in float32, {ROUNDS} rounds")
    if given.device == "cpu":
        on_cpu(weights)
    else:
        on_accelerator(weights, given.device)


if __name__ == "__main__":
    main()
