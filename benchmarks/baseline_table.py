"""What pytest-mpl at its defaults sees of a changed picture, and what heatmap_compare sees.

    python benchmarks/baseline_table.py

Prints two tables in Markdown. The first plants changes in grids of attention maps. The second
compares the same pictures drawn by different versions of matplotlib, for each of which it makes an
environment. Both methods judge the same files. Exits with 1 if heatmap_compare missed a defect or
raised a false alarm.
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from environments import ROOT, VERSIONS, make, run
from matplotlib.testing.compare import compare_images

from pytest_attnheat import Heatmaps, show_heatmaps
from pytest_attnheat.baselines import judging
from pytest_attnheat.baselines.compare import compare_data
from pytest_attnheat.heatmaps.record import decode, encode

sys.path.insert(0, str(ROOT / "tests"))
import planted

Weights = npt.NDArray[np.float32]

# pytest-mpl's default tolerance: a root mean square of the pixel differences, of 255.
MPL_TOLERANCE = 2
# Grids of the table, and others in which changes are counted: rows, columns, queries and keys.
SHOWN = [(1, 1, 10), (2, 4, 16), (6, 6, 32), (12, 12, 96), (1, 1, 512), (1, 1, 4096)]
GRIDS = [
    (1, 1, 16), (1, 1, 64), (1, 1, 200), (1, 1, 1000), (1, 1, 2048), (1, 2, 10), (1, 8, 24),
    (2, 2, 300), (3, 3, 12), (4, 4, 64), (6, 12, 16), (8, 8, 40), (12, 12, 10), (12, 12, 64),
    (1, 12, 128),
]  # fmt: skip


def draw(weights: Weights) -> Any:
    """Draw as users do: one map at the default size, a grid of them at its own."""
    size = (2.5, 2.5) if weights.shape[:2] == (1, 1) else None
    return show_heatmaps(weights, "Keys", "Queries", figsize=size)


def seen_by_mpl(expected: Path, actual: Path) -> bool:
    """Tell whether pytest-mpl would fail."""
    return compare_images(str(expected), str(actual), MPL_TOLERANCE, in_decorator=True) is not None


def defects_table(folder: Path) -> bool:
    """Print which changes are caught; return whether heatmap_compare caught all."""
    print("| change | " + " | ".join(f"{r} x {c} of {n} x {n}" for r, c, n in SHOWN) + " |")
    print("| --- |" + " --- |" * len(SHOWN))
    complete = True
    for kind, change in planted.KINDS.items():
        cells = []
        for grid in SHOWN:
            if kind not in planted.kinds_of(grid[1]):
                cells.append("")
                continue
            scores = planted.scores_of(*grid)
            baseline, other = folder / "baseline.png", folder / "other.png"
            judging.save(draw(planted.softmax(scores)), baseline)
            figure = draw(change(scores))
            judging.save(figure, other)
            by_mpl = seen_by_mpl(baseline, other)
            by_us = not judging.check(figure, baseline, folder / "work").passed
            complete &= by_us
            cells.append(f"{_word(by_mpl)} / {_word(by_us)}")
        print(f"| {kind} | " + " | ".join(cells) + " |")
    return complete


def count_missed() -> tuple[int, int]:
    """Return how many changes were planted in all grids, and how many heatmap_compare missed."""
    made = missed = 0
    for grid in (*SHOWN, *GRIDS):
        scores = planted.scores_of(*grid)
        before = data_of(planted.softmax(scores))
        for kind in planted.kinds_of(grid[1]):
            made += 1
            if compare_data(before, data_of(planted.KINDS[kind](scores))) is None:
                missed += 1
                print(f"MISSED: {kind} in {grid}")
    return made, missed


def data_of(weights: Weights) -> Heatmaps:
    """Return what a picture of weights carries."""
    return decode(encode(draw(weights).picture.shown))


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
        made, missed = count_missed()
        print(f"\n{made} changes in {len(SHOWN) + len(GRIDS)} grids, {missed} missed")
        print("\nFalse alarms: pytest-mpl at its defaults / heatmap_compare\n")
        quiet = versions_table(folder)
    print(f"\nheatmap_compare: {'nothing' if complete else 'SOMETHING'} missed, "
          f"{'no' if quiet else 'A'} false alarm")  # fmt: skip
    return 0 if complete and quiet and not missed else 1


if __name__ == "__main__":
    sys.exit(main())
