"""What ranks and workers cost: time and memory against how many there are, as ratios.

    python benchmarks/bench_ranks.py [--quick] [--draw docs/ranks.png]

Each figure is the median of several rounds, beside one rank that does the same over the same
blocks: the start of ranks, an assertion on weights that lie on them, one call of a ring that is
examined, and a run of tests on workers. On fewer cores than ranks, ranks wait for one another: the
work of all is the same, so that a ratio of 1 is the best that one core can do.
"""

import argparse
import statistics
import subprocess
import sys
import tempfile
import time
from contextlib import closing
from pathlib import Path

import matplotlib
import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor, Shard, init_device_mesh

from pytest_attnheat import AttentionSpec, assert_row_stochastic
from pytest_attnheat.contract.ranks import Ranks
from pytest_attnheat.contract.ranks import on_ranks as started
from pytest_attnheat.contract.sharded import on_ranks

RANKS, WORKERS = (1, 2, 4), (1, 2, 4)
TESTS = """
import pytest, torch
from pytest_attnheat import assert_row_stochastic

@pytest.mark.parametrize("number", range({tests}))
def test_rows(number):
    torch.set_num_threads(1)
    weights = torch.rand(8, {length}, {length}).softmax(-1)
    for _ in range(4):
        assert_row_stochastic(weights)
"""


def megabytes(of: str) -> float:
    """Return what Linux says of the memory of this process: VmRSS, now, or VmHWM, the peak."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(of)) / 1000


def judged(length: int, rounds: int, dim: int) -> tuple[float, float]:
    """Return the seconds of one rank for weights that lie on all, and what it took besides."""
    torch.set_num_threads(1)
    ranks = dist.get_world_size()
    shape = [1, 4, length, length]
    shape[dim] //= ranks
    local = torch.rand(shape)
    if dim < 3:
        local = local.softmax(-1)
    else:  # no distribution: reading it again is what a failure costs
        local /= length / 2
    mesh = init_device_mesh("cpu", (ranks,))
    weights = DTensor.from_local(local, mesh, [Shard(dim)], run_check=False)
    Path("/proc/self/clear_refs").write_text("5")  # the peak is counted from here
    before, taken = megabytes("VmRSS"), []
    for _ in range(rounds):
        dist.barrier()
        start = time.perf_counter()
        try:
            assert_row_stochastic(weights)
        except AssertionError:
            assert dim == 3
        dist.barrier()
        taken.append(time.perf_counter() - start)
    return statistics.median(taken), megabytes("VmHWM") - before


def ring(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """Attend to the keys of all ranks, which are gathered: what a ring costs at most."""
    gathered = []
    for tensor in (key, value):
        parts = [torch.empty_like(tensor) for _ in range(dist.get_world_size())]
        dist.all_gather(parts, tensor.contiguous())
        gathered.append(torch.cat(parts, 2))
    return torch.nn.functional.scaled_dot_product_attention(query, *gathered)


def of_a_call(ranks: int, length: int, rounds: int) -> float:
    """Return the seconds of one call that is scattered to ranks and gathered."""
    tensors = torch.randn(3, 1, 4, length, 32).unbind()
    if ranks == 1:
        group = Ranks(1, ring)
        with closing(group):
            return statistics.median(timed(lambda: group.run([tensors])) for _ in range(rounds))
    spec, sharded = on_ranks(AttentionSpec(ring, sharding="ring"), ranks, 60.0)
    with closing(sharded):
        spec(*tensors)
        return statistics.median(timed(lambda: spec(*tensors)) for _ in range(rounds))


def timed(action: object) -> float:
    """Return the seconds of an action."""
    start = time.perf_counter()
    action()  # type: ignore[operator]
    return time.perf_counter() - start


def on_workers(workers: int, tests: int, length: int) -> float:
    """Return the seconds of a run of tests on so many workers, their start included."""
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "test_rows.py").write_text(TESTS.format(tests=tests, length=length))
        command = [sys.executable, "-m", "pytest", "-q", "-n", str(workers), folder]
        return timed(lambda: subprocess.run(command, check=True, capture_output=True))


def row(name: str, figures: dict[int, float], unit: str = "s") -> tuple[str, dict[int, float]]:
    """Print a line: the first figure, and the others as ratios to it. Return name and ratios."""
    first, *others = figures
    ratios = {n: figures[n] / max(figures[first], 1e-9) for n in others}
    said = "  ".join(f"{n}: {ratio:5.2f}x" for n, ratio in ratios.items())
    print(f"{name:<46} {first}: {figures[first]:8.3f} {unit}   {said}", flush=True)
    return name, {first: 1.0, **ratios}


def draw(ratios: dict[str, dict[int, float]], megabytes: dict[str, dict[int, float]],
         path: Path) -> None:  # fmt: skip
    """Draw the ratios of times, and the memory that one rank takes beside its shard."""
    matplotlib.use("agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(8.5, 3.2), dpi=100, layout="constrained")
    styles = iter(["#99000d", "#cb6d51", "#4d7ea8", "#555555", "black", "#888888"])
    colours = {name: next(styles) for name in ratios}
    for axis, all_of in zip(axes, (ratios, megabytes), strict=True):
        for name, figures in all_of.items():
            axis.plot(list(figures), list(figures.values()), color=colours[name], label=name)
        axis.set_xticks(RANKS)
        axis.set_xlabel("ranks or workers" if all_of is ratios else "ranks")
        axis.spines[["top", "right"]].set_visible(False)
    axes[0].set_yscale("log", base=2)
    axes[0].yaxis.set_major_formatter("{x:g}")
    axes[0].set_title("times of one rank, or one worker", fontsize=9)
    axes[1].set_ylim(0, None)
    axes[1].set_title("MB beside the shard, of one rank", fontsize=9)
    figure.legend(loc="outside right center", frameon=False, fontsize=8,
                  handles=axes[0].get_legend_handles_labels()[0])  # fmt: skip
    figure.savefig(path)


def main() -> None:
    """Measure all, and print a line for each."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="tiny sizes: only see that it runs")
    parser.add_argument("--draw", type=Path, help="where a figure is written")
    given = parser.parse_args()
    length, rounds = (256, 1) if given.quick else (2048, 5)
    rows, memory = [], {}
    rows += [row("starting ranks", {n: timed(lambda n=n: started(n, dist.barrier)) for n in RANKS})]
    for dim, of in ((1, "heads"), (2, "queries"), (3, "keys, and a failure")):
        name = f"rows, sharded by {of}"
        found = {n: started(n, judged, length, rounds, dim) for n in RANKS}
        rows += [row(name, {n: max(t for t, _ in one) for n, one in found.items()})]
        memory[name] = {n: max(m for _, m in one) for n, one in found.items()}
        row("  memory beside the shard, of one rank", memory[name], "MB")
    rows += [row("a call of a sharded subject", {n: of_a_call(n, length, rounds) for n in RANKS})]
    tests = 4 if given.quick else 48
    workers = {n: on_workers(n, tests, length // 2) for n in WORKERS}
    rows += [row("a run of tests on workers", workers)]
    if given.draw:
        draw(dict(rows), memory, given.draw)


if __name__ == "__main__":
    main()
