"""Two pictures of the same data compared by their pixels.

The data of a baseline, drawn anew, must give the very pixels that it has: panels are the same
bytes under every matplotlib. Text is not, and is only told apart.
"""

from __future__ import annotations

import base64
import io
import re
from dataclasses import replace
from pathlib import Path
from typing import Literal

import matplotlib
import numpy as np
import numpy.typing as npt
from matplotlib import ft2font
from PIL import Image

from pytest_attnheat.heatmaps.colors import Scale
from pytest_attnheat.heatmaps.layout import Layout
from pytest_attnheat.heatmaps.maps import Cells
from pytest_attnheat.heatmaps.picture import IMAGE_ID, Picture
from pytest_attnheat.heatmaps.record import Heatmaps
from pytest_attnheat.heatmaps.sheet import compose

Pixels = npt.NDArray[np.uint8]
# The image of a picture among others of an SVG, by the name that `picture` gives it.
_IMAGE = re.compile(rf'data:image/png;base64,\s*([A-Za-z0-9+/=\s]+)"(?=[^>]*id="{IMAGE_ID}")')
Outcome = Literal["equal", "text", "size", "panels", "rest"]


def compare_pixels(
    picture: Picture, data: Heatmaps, expected: Path, actual: Path, dpi: float
) -> Outcome:
    """Compare two files of a picture whose data agree.

    Args:
        picture: The picture that was drawn.
        data: The data of the baseline.
        expected: The baseline, PNG or SVG.
        actual: The file that was saved from the picture.
        dpi: The resolution of the picture.

    Returns:
        "equal"; "text" where only text differs, which another matplotlib or FreeType drew;
        "size" or "panels" where these differ; "rest" where something else does, under the same
        matplotlib and FreeType.
    """
    images = [_read(path) for path in (expected, actual)]
    if images[0].shape != images[1].shape:
        return "size"
    scale = Scale(data.limits[..., 0], data.limits[..., 1], data.scale == "shared")
    cells = Cells(data.values, data.masked, data.block)
    height, width = images[1].shape[:2]
    sheet = compose(replace(picture.shown, cells=cells, scale=scale), (width, height), dpi)
    painted: npt.NDArray[np.bool_] = sheet.image[..., 3] == 255
    channels = images[0].shape[2]
    # What the user has drawn over the panels hides them: there the pictures must agree as they are.
    own = picture.prepare((width, height), dpi).image[..., :channels]
    seen = painted & (images[1] == own).all(-1)
    has_numbers = picture.shown.design.words.number_format is not None
    if has_numbers:
        seen &= _edges(sheet.layout, painted.shape)
    if not np.array_equal(images[0][seen], sheet.image[seen][:, :channels]):
        return "panels"
    # Numbers in cells are no such overlay: they change with the data, and with the text.
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
