"""What pytest-mpl at its defaults sees of a changed picture, and what heatmap_compare sees.

    python benchmarks/baseline_table.py

Prints two tables in Markdown. The first plants defects in grids of attention maps. The second
compares the same pictures drawn by different versions of matplotlib, for each of which it makes an
environment. Both methods judge the same files. Exits with 1 if heatmap_compare missed a defect or
raised a false alarm.
"""

from __future__ import annotations

import json
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from environments import VERSIONS, make, run
from matplotlib.testing.compare import compare_images

from pytest_attnheat import show_heatmaps
from pytest_attnheat.baselines import judging

Weights = npt.NDArray[np.float32]

# pytest-mpl's default tolerance: a root mean square of the pixel differences, of 255.
MPL_TOLERANCE = 2
GRIDS = [(1, 1, 10), (2, 4, 16), (6, 6, 32), (12, 12, 64), (1, 1, 512)]


def softmax(rows: int, columns: int, size: int) -> Weights:
    """Draw causal weights from a seed."""
    scores = np.random.default_rng(0).normal(size=(rows, columns, size, size)) * 2
    scores = np.where(np.tril(np.ones((size, size), bool)), scores, -np.inf)
    exponent = np.exp(scores - scores.max(-1, keepdims=True))
    weights: Weights = (exponent / exponent.sum(-1, keepdims=True)).astype(np.float32)
    return weights


def _transposed(weights: Weights) -> None:
    weights[-1, -1] = weights[-1, -1].T.copy()


def _swapped(weights: Weights) -> None:
    weights[0, 0], weights[-1, -1] = weights[-1, -1].copy(), weights[0, 0].copy()


def _one_hot(weights: Weights) -> None:
    weights[-1, -1, 5] = np.eye(weights.shape[-1])[2]


def _leak(weights: Weights) -> None:
    weights[-1, -1, 1] = np.eye(weights.shape[-1])[-1]


def _half(weights: Weights) -> None:
    weights *= 0.5


def _logits(weights: Weights) -> None:
    with np.errstate(divide="ignore"):
        np.log(weights, out=weights)


def _small(weights: Weights) -> None:
    weights[-1, -1, 3, 2] += 0.001


DEFECTS: dict[str, Callable[[Weights], None]] = {
    "one head transposed": _transposed,
    "two heads swapped": _swapped,
    "one row one-hot": _one_hot,
    "one weight on a future key": _leak,
    "all weights times 0.5": _half,
    "logits instead of weights": _logits,
    "one weight changed by 0.001": _small,
}


def draw(weights: Weights) -> Any:
    """Draw a grid of maps with at least two pixels per cell where 1500 pixels allow it."""
    pixels = min(1500, weights.shape[1] * weights.shape[3] * 2 + 100)
    size = max(2.5, pixels / 100)
    return show_heatmaps(weights, "Keys", "Queries", figsize=(size, size))


def seen_by_mpl(expected: Path, actual: Path) -> bool:
    """Tell whether pytest-mpl would fail."""
    return compare_images(str(expected), str(actual), MPL_TOLERANCE, in_decorator=True) is not None


def defects_table(folder: Path) -> bool:
    """Print which defects are caught; return whether heatmap_compare caught all."""
    print("| defect | " + " | ".join(f"{r} x {c} of {n} x {n}" for r, c, n in GRIDS) + " |")
    print("| --- |" + " --- |" * len(GRIDS))
    complete = True
    for name, defect in DEFECTS.items():
        cells = []
        for grid in GRIDS:
            if defect is _swapped and grid[:2] == (1, 1):
                cells.append("")
                continue
            weights = softmax(*grid)
            broken = weights.copy()
            defect(broken)
            baseline, other = folder / "baseline.png", folder / "other.png"
            judging.save(draw(weights), baseline)
            figure = draw(broken)
            judging.save(figure, other)
            by_mpl = seen_by_mpl(baseline, other)
            by_us = not judging.check(figure, baseline, folder / "work").passed
            complete &= by_us
            cells.append(f"{_word(by_mpl)} / {_word(by_us)}")
        print(f"| {name} | " + " | ".join(cells) + " |")
    return complete


def _word(caught: bool) -> str:
    return "caught" if caught else "**missed**"


def compare_with_others(folder: Path, own: str) -> dict[str, dict[str, list[bool]]]:
    """Under one matplotlib, compare its pictures with the baselines of every version."""
    from panel_figures import figures

    found: dict[str, dict[str, list[bool]]] = {}
    for version in VERSIONS:
        for name, figure in figures().items():
            baseline = folder / version / f"{name}.png"
            alarm = not judging.check(figure, baseline, folder / "work" / own).passed
            by_mpl = seen_by_mpl(baseline, folder / own / f"{name}.png")
            found.setdefault(version, {})[name] = [by_mpl, alarm]
    return found


def draw_all(folder: Path, own: str) -> None:
    """Draw the pictures of one version of matplotlib."""
    from panel_figures import figures

    for name, figure in figures().items():
        judging.save(figure, folder / own / f"{name}.png")


def versions_table(folder: Path) -> bool:
    """Print who raises an alarm between versions; return whether heatmap_compare never does."""
    pythons = {version: make(version, folder / "environments") for version in VERSIONS}
    for version, python in pythons.items():
        run(python, __file__, "draw", folder, version)
    print("| baseline drawn by | " + " | ".join(f"compared by {v}" for v in VERSIONS) + " |")
    print("| --- |" + " --- |" * len(VERSIONS))
    results = {
        version: json.loads(run(python, __file__, "compare", folder, version))
        for version, python in pythons.items()
    }
    quiet = True
    for drawn in VERSIONS:
        cells = []
        for own in VERSIONS:
            alarms = list(results[own][drawn].values())
            mpl, ours = (sum(pair[i] for pair in alarms) for i in (0, 1))
            quiet &= ours == 0
            cells.append(f"{mpl} / {ours} of {len(alarms)}")
        print(f"| {drawn} | " + " | ".join(cells) + " |")
    return quiet


def main() -> int:
    """Print both tables."""
    if len(sys.argv) == 4:
        folder, own = Path(sys.argv[2]), sys.argv[3]
        if sys.argv[1] == "draw":
            draw_all(folder, own)
        else:
            (folder / "work" / own).mkdir(parents=True, exist_ok=True)
            print(json.dumps(compare_with_others(folder, own)))
        return 0
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "work").mkdir()
        print("Defects: pytest-mpl at its defaults / heatmap_compare\n")
        complete = defects_table(folder)
        print("\nFalse alarms: pytest-mpl at its defaults / heatmap_compare\n")
        quiet = versions_table(folder)
    print(f"\nheatmap_compare: {'nothing' if complete else 'SOMETHING'} missed, "
          f"{'no' if quiet else 'A'} false alarm")  # fmt: skip
    return 0 if complete and quiet else 1


if __name__ == "__main__":
    sys.exit(main())
