"""A picture against its baseline: first the data that both carry, then their pixels.

This module knows files and figures, and nothing of pytest.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
from matplotlib import rc_context
from matplotlib.figure import Figure
from PIL import Image

from pytest_attnheat.baselines.compare import compare_data, compare_pixels
from pytest_attnheat.heatmaps.figure import HeatmapFigure, show_heatmaps
from pytest_attnheat.heatmaps.record import Heatmaps, find_record, read_heatmaps

Status = Literal["equal", "text", "missing", "unreadable", "data", "panels", "pixels"]

# For figures without data: pytest-mpl's own default, 2, does not see a changed head.
PIXEL_TOLERANCE = 0.1
_ROWS_SHOWN = 5
# What Pillow raises for images so large that they could fill the memory.
_TOO_LARGE = (Image.DecompressionBombError, Image.DecompressionBombWarning)


@dataclass(frozen=True)
class Verdict:
    """What a comparison found.

    Attributes:
        status: "equal"; "text" (only text differs, drawn by another matplotlib); or why it fails:
            "missing", "unreadable", "data", "panels", "pixels".
        reason: one line for a failure.
        details: further lines.
        compared: what was compared: "data", "pixels" or both.
        artifacts: files left behind, by name.
        drawn_by: the matplotlib of the baseline.
    """

    status: Status
    reason: str = ""
    details: list[str] = field(default_factory=list)
    compared: tuple[str, ...] = ()
    artifacts: dict[str, Path] = field(default_factory=dict)
    drawn_by: str = ""

    @property
    def passed(self) -> bool:
        """Whether the picture is that of its baseline."""
        return self.status in ("equal", "text")


def check(figure: Figure, baseline: Path, folder: Path, tolerance: float | None = None) -> Verdict:
    """Compare a figure with its baseline.

    Args:
        figure: The figure; one of `show_heatmaps` is compared by its data and its panels,
            another one by all pixels.
        baseline: A PNG or SVG file.
        folder: Where the pictures are written.
        tolerance: For data, relative to the largest value; by default that of the dtype. For
            other figures, the root mean square of the pixel differences, of 255; 0.1 by default.
    """
    actual = folder / f"actual{baseline.suffix}"
    save(figure, actual)
    if not baseline.exists():
        return Verdict("missing", artifacts={"actual": actual})
    try:
        if (
            isinstance(figure, HeatmapFigure)
            and find_record(baseline) is not None
            and find_record(actual) is not None
        ):
            return _check_heatmaps(figure, baseline, actual, tolerance)
        return _check_images(baseline, actual, folder, tolerance)
    except (OSError, ValueError, SyntaxError, *_TOO_LARGE) as error:
        return Verdict("unreadable", str(error), artifacts={"actual": actual})


def keep(verdict: Verdict, folder: Path) -> dict[str, Path]:
    """Copy the pictures of a failed comparison to a folder, and return where they are now."""
    folder.mkdir(parents=True, exist_ok=True)
    kept = {}
    for name, path in verdict.artifacts.items():
        kept[name] = folder / f"{name}{path.suffix}"
        shutil.copyfile(path, kept[name])
    return kept


def save(figure: Figure, path: Path) -> None:
    """Save a figure as a baseline: in another file first, so that no file is ever half written.

    Raises:
        OSError: The folder or the file cannot be written to.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(
        prefix=f".{path.stem[:40]}-", suffix=path.suffix, dir=path.parent
    )
    os.close(handle)
    try:
        # What tells the day or the version would change the file and not the picture.
        metadata = {"Date": None} if path.suffix == ".svg" else {"Software": None}
        # So would ids that are drawn at random for each SVG.
        with rc_context({"svg.hashsalt": "attnheat"}):
            figure.savefig(name, metadata=metadata)
        Path(name).chmod(0o644)
        Path(name).replace(path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise


def _check_heatmaps(
    figure: HeatmapFigure, baseline: Path, actual: Path, tolerance: float | None
) -> Verdict:
    expected, drawn = read_heatmaps(baseline), read_heatmaps(actual)
    difference = compare_data(expected, drawn, tolerance)
    artifacts = {"expected": baseline, "actual": actual}
    compared: dict[str, Any] = {"compared": ("data",), "drawn_by": expected.matplotlib}
    if difference is not None:
        details = list(difference.details)
        if difference.worst is not None:
            row, column, query, _ = difference.worst
            triptych = actual.with_name("difference.png")
            _triptych(expected, drawn, difference.worst).savefig(triptych)
            artifacts["difference"] = triptych
            details += _in_text(expected, drawn, row, column, query)
        return Verdict("data", difference.reason, details, artifacts=artifacts, **compared)
    compared["compared"] = ("data", "pixels")
    outcome = compare_pixels(figure.picture, expected, baseline, actual, figure.dpi)
    if outcome in ("equal", "text"):
        status: Status = "equal" if outcome == "equal" else "text"
        return Verdict(status, **compared)
    reason = {
        "size": "the data agree, but the picture has another size",
        "panels": "the data agree, but the panels are drawn otherwise (colours, scale, layout)",
        "rest": "data and panels agree, but something else is drawn otherwise (text, style)",
    }[outcome]
    return Verdict("panels", reason, artifacts=artifacts, **compared)


def _check_images(baseline: Path, actual: Path, folder: Path, tolerance: float | None) -> Verdict:
    """Compare all pixels, where a picture or its baseline carries no data."""
    # It takes most of a second to import, and pictures that carry data do not need it.
    from matplotlib.testing.compare import compare_images

    if baseline.suffix != ".png":
        raise ValueError(f"{baseline.name} carries no data, and only PNG is compared without them")
    sizes = []
    for path in (baseline, actual):
        with Image.open(path) as image:
            sizes.append((image.width, image.height))
    artifacts = {"expected": baseline, "actual": actual}
    if sizes[0] != sizes[1]:
        reason = "the picture has {} x {} pixels, its baseline {} x {}".format(*sizes[1], *sizes[0])
        return Verdict("pixels", reason, compared=("pixels",), artifacts=artifacts)
    # matplotlib writes its difference image beside the expected one.
    expected = folder / "expected.png"
    expected.write_bytes(baseline.read_bytes())
    allowed = PIXEL_TOLERANCE if tolerance is None else tolerance
    found = compare_images(str(expected), str(actual), allowed, in_decorator=True)
    if found is None:
        return Verdict("equal", compared=("pixels",))
    artifacts["difference"] = Path(str(found["diff"]))
    reason = f"root mean square of the pixel differences {found['rms']:.3g}, allowed {allowed:g}"
    return Verdict("pixels", reason, compared=("pixels",), artifacts=artifacts)


def _triptych(
    expected: Heatmaps, actual: Heatmaps, worst: tuple[int, int, int, int]
) -> HeatmapFigure:
    """Draw expected, actual and difference of the worst panel side by side, on one scale."""
    row, column, query, key = worst
    one, other = (data.values[row, column] for data in (expected, actual))
    with np.errstate(invalid="ignore"):
        difference = np.abs(other - one)
    shown = np.stack([~expected.masked[row, column], ~actual.masked[row, column]])
    return show_heatmaps(
        [one, other, difference],
        xlabel="Keys",
        ylabel="Queries",
        titles=["expected", "actual", "difference"],
        figsize=None,
        mask=np.stack([*shown, shown.any(axis=0)]),
        highlight=[(0, panel, query, key) for panel in range(3)],
        title=f"panel [{row}, {column}]",
    )


def _in_text(expected: Heatmaps, actual: Heatmaps, row: int, column: int, query: int) -> list[str]:
    """Draw the queries around the worst one, expected and actual, one above the other."""
    # Comparing needs no torch; only this view of a failure does.
    from pytest_attnheat.heatmaps.terminal import format_heatmap

    count = expected.values.shape[2]
    first = max(0, min(query - _ROWS_SHOWN // 2, count - _ROWS_SHOWN))
    rows = slice(first, first + _ROWS_SHOWN)
    lines = []
    low, high = (float(end) for end in expected.limits[row, column])
    for name, data in (("expected", expected), ("actual", actual)):
        text = format_heatmap(
            data.values[row, column, rows],
            mask=~data.masked[row, column, rows],
            first_row=first,
            marked=[query],
            vmin=low,
            vmax=high if high > low else low + 1,
            title=name,
        )
        lines += text.splitlines()
    return lines
