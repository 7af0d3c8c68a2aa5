"""What weights that never exist cost, beside one plain pass over the same blocks.

By length, of all keys and of a window, and by the number of heads.

    python benchmarks/bench_scale.py [--device cuda] [--quick] [--draw docs/scale.png]

The plain pass is `softmax(query @ key.mT)`, a block of rows at a time, over the keys that a block
may see, under a mask where these are not all, and nothing is asked of it. Times are ratios to it,
taken in turns. Of full attention the last 256 queries are read, and of a window the last 4,096,
which takes as long for each row as all of them. Memory is the peak of the process beside the
inputs; on a GPU, of its allocator.
"""

import argparse
import functools
import gc
import sys
from pathlib import Path

import matplotlib
import torch
from bench_rows import extra_megabytes
from timing import alternate, report

from pytest_attnheat import (
    LazyWeights,
    assert_entropy,
    assert_row_stochastic,
    assert_same_attention,
    show_heatmaps,
)

LENGTHS = (1024, 4096, 16384, 65536, 131072)
HEADS = (1, 2, 4, 8)
QUERIES, WINDOW_QUERIES, WIDTH, WINDOW = 256, 4096, 64, 1023
ROUNDS = 3
PROMISED, MEGABYTES = 1.5, 512
# Below, a pass takes milliseconds, of which what is done once is a part.
LONG = 16384


def plain(lazy):
    """Make the same blocks and ask nothing of them."""
    blocks = lazy.blocks
    call = blocks.call
    group = call.heads // call.key.shape[-3]
    query, key = call.query.flatten(0, -3), call.key.flatten(0, -3).mT
    for some, span in blocks.grid():
        (run,) = blocks.seen(some, span)
        heads = [number // group for number in range(some.start, some.stop)]
        keys = key[heads[0] : heads[-1] + 1, :, run] if group == 1 else key[heads][..., run]
        scores = torch.baddbmm(
            query.new_empty(1, 1, 1), query[some, span], keys, beta=0, alpha=call.factor
        )
        if call.causal:
            at = torch.arange(span.start, span.stop, device=query.device)[:, None]
            behind = at + call.key_len - call.query_len
            behind = behind - torch.arange(run.start, run.stop, device=query.device)
            scores.masked_fill_((behind < 0) | (behind > WINDOW), float("-inf"))
        torch.softmax(scores, -1, out=scores)


def asked(make):
    """Return what is asked, by name; each makes the weights anew."""
    return {
        "a plain pass": lambda: plain(make()),
        "rows sum to 1": lambda: assert_row_stochastic(make()),
        "entropy": lambda: assert_entropy(make(), maximum=100.0),
        "sketch": lambda: assert_same_attention(make(), make()),
        "picture": lambda: show_heatmaps(make(), None, None),
    }


def weights(length, kind, device, heads=1):
    """Weights of a length: all keys of the last queries, or a causal window."""
    generator = torch.Generator().manual_seed(0)
    rows = min(length, WINDOW_QUERIES if kind == "window" else QUERIES)
    query, key = (
        torch.randn(1, heads, count, WIDTH, generator=generator).to(device)
        for count in (rows, length)
    )
    declared = {"causal": True, "window": (WINDOW, 0)} if kind == "window" else {}
    declared |= {"alignment": "bottom_right"} if kind == "window" else {}
    return functools.partial(LazyWeights, query, key, **declared)


def megabytes(action, device):
    """Return the peak of an action beside what there is."""
    gc.collect()
    if torch.device(device).type != "cuda":
        return extra_megabytes(action) or 0.0
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    action()
    return (torch.cuda.max_memory_allocated() - before) / 2**20


def measured(lengths, device, rounds):
    """Yield kind, how many keys or heads, and by what is asked: seconds and megabytes."""
    of_heads = min(LONG, lengths[-1])
    for kind, number, made in [
        *(("full", length, weights(length, "full", device)) for length in lengths),
        *(("window", length, weights(length, "window", device)) for length in lengths),
        *(("heads", heads, weights(of_heads, "full", device, heads)) for heads in HEADS),
    ]:
        actions = asked(made)
        times = alternate(list(actions.values()), rounds, device)
        print(kind, number, file=sys.stderr, flush=True)
        # Two passes: what is compared is sketched each.
        times[3] /= 2
        memory = [megabytes(action, device) for action in actions.values()]
        yield kind, number, dict(zip(actions, zip(times, memory, strict=True), strict=True))


def draw(found, path):
    """Draw ratios and memory by length, and ratios by the number of heads."""
    matplotlib.use("agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(1, 4, figsize=(12.5, 3.2), dpi=100, layout="constrained")
    colours = dict(zip(list(found[0][2])[1:], ("#99000d", "#cb6d51", "#4d7ea8", "#555555"),
                       strict=True))  # fmt: skip
    for kind, style in {"full": "-", "window": "--", "heads": "-"}.items():
        of_kind = [(number, values) for one, number, values in found if one == kind]
        numbers = [number for number, _ in of_kind]
        base = [values["a plain pass"][0] for _, values in of_kind]
        if kind != "heads":
            queries = WINDOW_QUERIES if kind == "window" else QUERIES
            each = [1000 * one / min(n, queries) for n, one in zip(numbers, base, strict=True)]
            axes[0].plot(numbers, each, style, color="black", label=f"{kind}")
        for name, colour in colours.items():
            times, memory = zip(*(values[name] for _, values in of_kind), strict=True)
            ratios = [one / plain_one for one, plain_one in zip(times, base, strict=True)]
            label = name if kind == "full" else None
            axes[3 if kind == "heads" else 1].plot(
                numbers, ratios, style, color=colour, label=label
            )
            if kind != "heads":
                axes[2].plot(numbers, memory, style, color=colour)
    titles = (
        "a plain pass: seconds for 1,000 queries",
        "times of a plain pass",
        "MB beside the inputs",
        "times of a plain pass, 16k keys",
    )
    for axis, title in zip(axes, titles, strict=True):
        by_heads = axis is axes[3]
        at = sorted({number for kind, number, _ in found if (kind == "heads") == by_heads})
        axis.set_xscale("log", base=2)
        axis.set_xticks(at)
        axis.set_xticklabels([str(n) if by_heads else f"{n // 1024}k" for n in at])
        axis.set_title(title, fontsize=9)
        axis.set_xlabel("heads" if by_heads else "keys")
        axis.spines[["top", "right"]].set_visible(False)
    axes[0].set_yscale("log")
    axes[0].legend(frameon=False, fontsize=8)
    for axis in axes[[1, 3]]:
        axis.axhline(PROMISED, color="black", linewidth=0.6)
        axis.set_ylim(0, 6)
    axes[1].legend(frameon=False, fontsize=8)
    axes[2].axhline(MEGABYTES, color="black", linewidth=0.6)
    axes[2].set_ylim(0, None)
    figure.savefig(path)


def main():
    """Print a table and what is promised, and draw it if asked."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--quick", action="store_true", help="short lengths, one round")
    parser.add_argument("--draw", type=Path, help="where a figure is written")
    given = parser.parse_args()
    lengths = LENGTHS[:2] if given.quick else LENGTHS
    found = list(measured(lengths, given.device, 1 if given.quick else ROUNDS))
    print(f"{'':<24}{'plain':>9}" + "".join(f"{name:>22}" for name in list(found[0][2])[1:]))
    for kind, number, values in found:
        base, _ = values["a plain pass"]
        cells = [f"{taken / base:8.2f}x {memory:8.0f} MB" for taken, memory in values.values()]
        of = "    " if kind == "heads" else "keys"
        print(f"{kind:<8}{number:>8} {of}   {base:8.3f}s" + "".join(f"{c:>22}" for c in cells[1:]))
    for kind, number, values in found:
        if kind == "heads" or number >= LONG:
            taken = values["rows sum to 1"][0] / values["a plain pass"][0]
            report(f"{kind}, {number}: rows, against a plain pass", taken, "<=", PROMISED)
    most = max(memory for *_, values in found for _, memory in values.values())
    report("MB beside the inputs, at most", most, "<=", MEGABYTES)
    if given.draw:
        draw(found, given.draw)


if __name__ == "__main__":
    main()
