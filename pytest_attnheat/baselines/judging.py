"""A picture against its baseline: first the data that both carry, then their pixels.

The data of a baseline, drawn anew, must give the very pixels that it has: panels are the same
bytes under every matplotlib. Text is not, and is only told apart.

This module knows files and figures, and nothing of pytest.
"""

from __future__ import annotations

import base64
import io
import os
import re
import shutil
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from itertools import chain
from pathlib import Path
from typing import Any, Literal

import matplotlib
import numpy as np
import numpy.typing as npt
from matplotlib import ft2font, rc_context
from matplotlib.figure import Figure
from PIL import Image

from ..attention.tolerance import drift_allowed
from ..heatmaps.colors import Scale
from ..heatmaps.figure import HeatmapFigure
from ..heatmaps.layout import Layout
from ..heatmaps.picture import IMAGE_ID, Picture, Sheet, Shown, compose
from ..heatmaps.record import Heatmaps, find_record, read_heatmaps
from ..heatmaps.showing import triptych
from .compare import compare_data, panel_name, tolerance_for

Status = Literal["equal", "text", "pooled", "missing", "unreadable", "data", "panels", "pixels"]
Outcome = Literal["equal", "text", "size", "panels", "rest"]
Pixels = npt.NDArray[np.uint8]

# For figures without data: pytest-mpl's own default, 2, does not see a changed head.
PIXEL_TOLERANCE = 0.1
_ROWS_SHOWN = 5
# The image of a picture among others of an SVG, by the name that `picture` gives it.
_IMAGE = re.compile(rf'data:image/png;base64,\s*([A-Za-z0-9+/=\s]+)"(?=[^>]*id="{IMAGE_ID}")')
# Colours between a cell and what it may be at most, of which each is drawn.
_MOST_STEPS = 16
# What a file is called before it is whole. A process that is killed leaves it; after so many
# seconds, the next one removes it.
_PART, _ABANDONED = ".attnheat-", 600
# What Pillow raises for images so large that they could fill the memory.
_TOO_LARGE = (Image.DecompressionBombError, Image.DecompressionBombWarning)


@dataclass(frozen=True)
class Verdict:
    """What a comparison found."""

    # "equal"; "text" (only text differs, drawn by another matplotlib); "pooled" (equal, but the
    # baseline is from before there were sketches of pooled maps); or why it fails: "missing",
    # "unreadable", "data", "panels", "pixels"
    status: Status
    reason: str = ""  # one line for a failure
    details: list[str] = field(default_factory=list)  # further lines
    compared: tuple[str, ...] = ()  # what was compared: "data", "sketch", "pixels"
    artifacts: dict[str, Path] = field(default_factory=dict)  # files left behind, by name
    drawn_by: str = ""  # the matplotlib of the baseline

    @property
    def passed(self) -> bool:
        """Whether the picture is that of its baseline."""
        return self.status in ("equal", "text", "pooled")


def check(
    # The figure; one of `show_heatmaps` is compared by its data and its panels, another one by all
    # pixels
    figure: Figure,
    baseline: Path,  # A PNG or SVG file
    folder: Path,  # Where the pictures are written
    # For data, by what part of itself a weight may differ; by default what follows from dtypes,
    # layers and length. For other figures, the root mean square of the pixel differences, of 255;
    # 0.1 by default.
    tolerance: float | None = None,
    precision: Sequence[str] = (),  # Other dtypes, by name, in which the same model must agree
) -> Verdict:
    """Compare a figure with its baseline."""
    actual = folder / f"actual{baseline.suffix}"
    save(figure, actual)
    if not baseline.exists():
        return Verdict("missing", artifacts={"actual": actual})
    try:
        if isinstance(figure, HeatmapFigure) and find_record(baseline) is not None:
            return _check_heatmaps(figure, baseline, actual, tolerance, precision)
        return _check_images(baseline, actual, folder, tolerance)
    except (OSError, ValueError, SyntaxError, *_TOO_LARGE) as error:
        return Verdict("unreadable", str(error), artifacts={"actual": actual})


def looks_alike(figure: Figure, baseline: Path) -> bool:
    """Tell whether a figure has the very pixels of a PNG, whatever the data of both are."""
    file = io.BytesIO()
    figure.savefig(file, format="png")
    with Image.open(file) as drawn:
        return np.array_equal(_read(baseline), np.asarray(drawn.convert("RGB")))


def keep(verdict: Verdict, folder: Path) -> dict[str, Path]:
    """Copy the pictures of a failed comparison to a folder, and return where they are now."""
    folder.mkdir(parents=True, exist_ok=True)
    kept = {}
    for name, path in verdict.artifacts.items():
        kept[name] = folder / f"{name}{path.suffix}"
        shutil.copyfile(path, kept[name])
    return kept


def save(figure: Figure, path: Path) -> None:
    """Save a figure as a baseline."""
    # What tells the day or the version would change the file and not the picture.
    metadata = {"Date": None} if path.suffix == ".svg" else {"Software": None}
    file = io.BytesIO()
    # So would ids that are drawn at random for each SVG.
    with rc_context({"svg.hashsalt": "attnheat"}):
        figure.savefig(file, format=path.suffix[1:], metadata=metadata)
    write(file.getvalue(), path)


def write(content: bytes, path: Path) -> None:
    """Write a file: under another name first, so that none is ever half written."""
    path.parent.mkdir(parents=True, exist_ok=True)
    for part in path.parent.glob(f"{_PART}*"):
        with suppress(OSError):  # another process may remove it too
            if time.time() - part.stat().st_mtime > _ABANDONED:
                part.unlink()
    handle, name = tempfile.mkstemp(prefix=_PART, dir=path.parent)
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content)
        Path(name).chmod(0o644)
        Path(name).replace(path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise


def _check_heatmaps(
    figure: HeatmapFigure,
    baseline: Path,
    actual: Path,
    tolerance: float | None,
    precision: Sequence[str],
) -> Verdict:
    drawn = read_heatmaps(actual)
    kinds = ("data",) if drawn.complete else ("data", "sketch")
    if baseline.read_bytes() == actual.read_bytes():
        return Verdict("equal", compared=(*kinds, "pixels"), drawn_by=drawn.matplotlib)
    expected = read_heatmaps(baseline)
    if tolerance is None:
        tolerance = tolerance_for(expected, drawn, precision)
    whole = figure.picture.shown.whole
    difference = compare_data(expected, drawn, tolerance, None if whole is None else whole.maps)
    pooled = expected.sketch is None and not expected.complete
    kinds = ("data",) if pooled else kinds
    artifacts = {"expected": baseline, "actual": actual}
    compared: dict[str, Any] = {"compared": kinds, "drawn_by": expected.matplotlib}
    if difference is not None:
        details = list(difference.details)
        if difference.worst is not None:
            row, column, query, key = difference.worst
            picture = triptych(
                (expected.values[row, column], drawn.values[row, column]),
                [~data.masked[row, column] for data in (expected, drawn)],
                (query, key),
                panel=f"panel [{row}, {column}]: ",
                block=drawn.block,
            )
            artifacts["difference"] = actual.with_name("difference.png")
            picture.savefig(artifacts["difference"])
            details += _in_text(expected, drawn, row, column, query)
        return Verdict("data", difference.reason, details, artifacts=artifacts, **compared)
    compared["compared"] = (*kinds, "pixels")
    outcome = compare_pixels(figure.picture, expected, baseline, actual, figure.dpi, tolerance)
    if outcome in ("equal", "text"):
        status: Status = "pooled" if pooled else "equal" if outcome == "equal" else "text"
        return Verdict(status, "it had no sketch" if pooled else "", **compared)
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


def _in_text(expected: Heatmaps, actual: Heatmaps, row: int, column: int, query: int) -> list[str]:
    """Draw the queries around the worst one, expected and actual, one above the other."""
    # Comparing needs no torch; only this view of a failure does.
    from ..heatmaps.terminal import format_heatmap

    count = expected.values.shape[2]
    first = max(0, min(query - _ROWS_SHOWN // 2, count - _ROWS_SHOWN))
    rows = slice(first, first + _ROWS_SHOWN)
    lines = []
    low, high = (float(end) for end in expected.limits[row, column])
    several = expected.values.shape[:2] != (1, 1)
    panel = f", {panel_name(expected, row, column)}" if several else ""
    for name, data in (("expected", expected), ("actual", actual)):
        text = format_heatmap(
            data.values[row, column, rows], mask=~data.masked[row, column, rows], first_row=first,
            marked=[query], vmin=low, vmax=high if high > low else low + 1, title=name + panel,
        )  # fmt: skip
        lines += text.splitlines()
    return lines


# -- by their pixels ----------------------------------------------------------------------------


def compare_pixels(
    picture: Picture, data: Heatmaps, expected: Path, actual: Path, dpi: float, tolerance: float
) -> Outcome:
    """Compare two files of a picture, PNG or SVG, whose data agree."""
    # Returns "equal"; "text" where only text differs, which another matplotlib or FreeType drew;
    # "size" or "panels" where these differ; "rest" where something else does, under the same
    # matplotlib and FreeType. `tolerance`: by what part of itself a weight may differ unseen in
    # cells.
    images = [_read(path) for path in (expected, actual)]
    if images[0].shape != images[1].shape:
        return "size"
    height, width = images[1].shape[:2]
    sheets = _sheets(picture.shown, data, (width, height), dpi, tolerance)
    sheet = next(sheets)
    painted: npt.NDArray[np.bool_] = sheet.image[..., 3] == 255
    channels = images[0].shape[2]
    # What the user has drawn over the panels hides them: there the pictures must agree as they are.
    own = picture.prepare((width, height), dpi).image[..., :channels]
    seen = painted & (images[1] == own).all(-1)
    has_numbers = picture.shown.design.words.numbers is not None
    if has_numbers:
        seen &= _edges(sheet.layout, painted.shape)
    wrong = seen
    for drawn in chain([sheet], sheets):
        wrong = wrong & (images[0] != drawn.image[..., :channels]).any(-1)
        if not wrong.any():
            break
    else:
        return "panels"
    # Numbers in cells are not such an overlay: they change with the data, and with the text.
    overlay = painted & ~seen & (not has_numbers)
    # Where even the data are equal to the bit, nothing at all may differ.
    exact = np.array_equal(data.values, picture.shown.cells.values, equal_nan=True)
    compared = np.ones_like(painted) if exact else ~painted | overlay
    # The numbers of an SVG cannot be told from its other texts.
    same_rest = (has_numbers and not exact) or _rest(expected) == _rest(actual)
    if same_rest and np.array_equal(images[0][compared], images[1][compared]):
        return "equal"
    if not np.array_equal(images[0][overlay], images[1][overlay]):
        return "rest"
    by = (matplotlib.__version__, ft2font.__freetype_version__)
    return "text" if (data.matplotlib, data.freetype) != by else "rest"


def _sheets(
    shown: Shown, data: Heatmaps, size: tuple[int, int], dpi: float, tolerance: float
) -> Iterator[Sheet]:
    """Draw the data of a baseline anew."""
    # Where a file has fewer cells than its picture, those of the other picture are drawn in their
    # place, then as far off as they may be.
    scale = Scale(data.limits[..., 0], data.limits[..., 1], data.scale == "shared")
    if data.block == shown.cells.block:
        cells = replace(shown.cells, values=data.values, masked=data.masked)
        yield compose(replace(shown, cells=cells, scale=scale), size, dpi)
        return
    cells = shown.cells
    yield compose(replace(shown, scale=scale), size, dpi)
    values = cells.values.astype(np.float64)
    allowed = np.where(cells.masked, 0, drift_allowed(values, cells.masked, tolerance))
    colors = 256 * allowed.max() / max(float((scale.high - scale.low).min()), 1e-300)
    steps = int(min(max(1, np.ceil(colors)), _MOST_STEPS))
    for number in range(1, steps + 1):
        for sign in (1, -1):
            moved = (values + sign * number / steps * allowed).astype(np.float32)
            near = replace(shown, cells=replace(cells, values=moved), scale=scale)
            yield compose(near, size, dpi)


def _read(path: Path) -> Pixels:
    """Return RGB of a PNG, or RGBA of the image that an SVG holds."""
    if path.suffix == ".png":
        with Image.open(path) as image:
            return np.asarray(image.convert("RGB"))
    found = _IMAGE.search(path.read_text("utf-8"))
    if found is None:
        raise ValueError("it has no image of show_heatmaps")
    with Image.open(io.BytesIO(base64.b64decode(found[1]))) as image:
        # The image of an SVG stands on its head, as its transform turns it around.
        return np.asarray(image.convert("RGBA"))[::-1]


def _rest(path: Path) -> str:
    """Return what an SVG draws besides its image: paths, which are its text."""
    if path.suffix == ".png":
        return ""
    text = path.read_text("utf-8")
    body = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.S)
    return _IMAGE.sub("", body)


def _edges(layout: Layout, shape: tuple[int, ...]) -> npt.NDArray[np.bool_]:
    """Return everything but the inside of cells, where numbers stand."""
    edges = np.ones(shape, dtype=np.bool_)
    wide, high = layout.cell
    down = np.arange(layout.panel[1]) % high == 0
    across = np.arange(layout.panel[0]) % wide == 0
    for top in layout.tops:
        for left in layout.lefts:
            panel = edges[top : top + layout.panel[1], left : left + layout.panel[0]]
            panel[:] = down[:, None] | across[None, :]
    return edges
