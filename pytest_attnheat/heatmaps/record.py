"""The data that a picture carries: what a file of it shows, in numbers.

A record is text, so that it fits into the metadata of PNG and SVG files: a line of JSON, and the
arrays in base64. It is read with nothing but a JSON parser and zlib, both with limits; what a
hostile file can do is raise ValueError.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import json
import math
import os
import re
import stat
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar
from xml.sax.saxutils import unescape

import matplotlib
import numpy as np
import numpy.typing as npt
from matplotlib import ft2font

from ..attention.sketch import Sketch, from_planes, packed, packed_size, planes, rounded, unpacked
from ..attention.tolerance import drift_tolerance
from ..inputs import misuse
from .maps import Bools, Cells, Floats, pool_cells
from .picture import Shown
from .writing import LABELS

T = TypeVar("T")

# The text chunk of a PNG, and the marker in the `dc:source` of an SVG.
KEYWORD = "attnheat"
# The first knew no sketches.
VERSIONS = (1, 2)
# Of more cells, files would grow by megabytes for each baseline: they are pooled to fewer.
MOST_CELLS, _FEWER_CELLS = 1 << 20, 1 << 14
# The sums of columns are kept where the sketch has at most so many rows and columns for each cell.
_SPARE = 1 / 8
# Where they are not, numbers are rounded by so many times what may differ, and cells by less than
# that, to keep the file small.
_COARSER = 4
_LONGEST_HEADER = 1 << 20
_MUCH = 1 << 16
_LARGEST_FILE = 1 << 28


@dataclass(frozen=True)
class Heatmaps:
    """The data of a picture, as `read_heatmaps` returns it.

    Attributes:
        values: float32 (rows, columns, queries, keys), what each cell shows; rounded by 4e-6 of
            itself where so many weights are shown pooled that their sketch has more numbers than
            an eighth of the cells. Weights given in float16 or bfloat16 are exact; NaN and
            infinity are kept.
        masked: boolean, the same shape; True where a cell is masked.
        block: weights (queries, keys) that one cell stands for; their maximum is shown.
        shape: (rows, columns, queries, keys) of the weights that were given.
        dtype: their dtype by name, for example "bfloat16".
        labels: what is written, by name: xlabel, ylabel, title, titles, row_titles, key_labels,
            query_labels, and the format of numbers; None where nothing is.
        scale: "shared" or "panel".
        limits: (rows, columns, 2), the ends of the colour scale of each panel.
        sketch: where `values` are not all weights, what stands for these; None in files from before
            there were sketches.
        masks: then, a checksum of the mask of each map, by row and column; None for no mask.
        matplotlib: the version of matplotlib that drew the picture.
        freetype: the version of FreeType that drew its text.
    """

    values: Floats
    masked: Bools
    block: tuple[int, int]
    shape: tuple[int, int, int, int]
    dtype: str
    labels: dict[str, Any]
    scale: str
    limits: npt.NDArray[np.float64]
    matplotlib: str
    freetype: str
    sketch: Sketch | None = None
    masks: list[list[int]] | None = None

    @property
    def complete(self) -> bool:
        """Whether `values` are all weights that were given."""
        return self.values.shape == self.shape


def encode(shown: Shown) -> str:
    """Write the record of a picture."""
    words, cells, shape = shown.design.words, _few(shown.cells), shown.design.shape
    limits = np.stack([shown.scale.low, shown.scale.high], axis=-1)
    header: dict[str, Any] = {
        "version": VERSIONS[-1], "cells": list(cells.values.shape), "block": list(cells.block),
        "shape": list(shape), "dtype": shown.dtype,
        "labels": {name: getattr(words, name) for name in LABELS},
        "scale": "shared" if shown.scale.shared else "panel",
        "limits": limits[0, 0].tolist() if shown.scale.shared else limits.tolist(),
        "matplotlib": matplotlib.__version__, "freetype": ft2font.__freetype_version__,
    }  # fmt: skip
    values, sketch = cells.values, b""
    if shown.whole is not None:
        room = _SPARE * math.prod(values.shape[2:]) >= shape[2] + shape[3]
        step = (1 if room else _COARSER) * drift_tolerance([shown.dtype], 1, shape[3])
        values = values if room else rounded(values)
        sketch = packed(shown.whole.sketch, step, column_sums=room)
        header["sketch"] = {"step": step, "column_sums": room}
        header["masks"] = shown.whole.masks
    content = _packed(values, shown.dtype) + np.packbits(cells.masked).tobytes() + sketch
    head = json.dumps(header, separators=(",", ":"))
    if len(head) > _LONGEST_HEADER:  # of what it would not read, it keeps a checksum
        sums = {name: _checksum(text) for name, text in header["labels"].items()}
        head = json.dumps({**header, "labels": sums}, separators=(",", ":"))
    return joined(head, content)


def joined(head: str, content: bytes) -> str:
    """Return a line of JSON and some bytes as text."""
    # Of much, what repeats at once is enough: to look for more takes longer than to draw it.
    strategy = zlib.Z_RLE if len(content) > _MUCH else zlib.Z_DEFAULT_STRATEGY
    packer = zlib.compressobj(memLevel=5, strategy=strategy)
    body = packer.compress(content) + packer.flush()
    return head + "\n" + base64.b64encode(body).decode("ascii")


def _few(cells: Cells) -> Cells:
    """Pool cells that are too many for a file."""
    if cells.values.size <= MOST_CELLS:
        return cells
    maps, (queries, keys), side = cells.values[..., 0, 0].size, cells.values.shape[2:], 1
    while maps * -(-queries // side) * -(-keys // side) > _FEWER_CELLS and side < max(
        queries, keys
    ):
        side += 1
    return pool_cells(cells, (side, side))


def _checksum(text: object) -> object:
    whole = json.dumps(text)
    return text if len(whole) < 100 else f"sha256 {hashlib.sha256(whole.encode()).hexdigest()}"


def metadata_of(record: str, kind: str) -> dict[str, str]:
    """Return a record as the metadata that matplotlib writes into a "png" or an "svg"."""
    return {KEYWORD: record} if kind == "png" else {"Source": f"{KEYWORD}:{record}"}


def _stored(dtype: str) -> str:
    """Return how the values of a dtype are written: in its own width, the bits of bfloat16."""
    return {"float16": "<f2", "bfloat16": "<u2"}.get(dtype, "<f4")


def _packed(values: Floats, dtype: str) -> bytes:
    own: npt.NDArray[Any] = values.view(np.uint32) >> 16 if dtype == "bfloat16" else values
    return planes(own.astype(_stored(dtype)))


def _unpacked(data: bytes, dtype: str) -> Floats:
    values = from_planes(data, _stored(dtype))
    if dtype == "bfloat16":
        return (values.astype(np.uint32) << 16).view(np.float32)
    return values.astype(np.float32)


def decode(record: str) -> Heatmaps:
    """Read a record."""
    return parted(record, VERSIONS, _decode)


def parted(
    text: str, versions: Sequence[int], read: Callable[[dict[str, Any], Callable[[int], bytes]], T]
) -> T:
    """Read what `joined` wrote: `read` gets the JSON, and a function that returns so many bytes."""
    head, _, _ = text[: _LONGEST_HEADER + 1].partition("\n")
    if len(head) > _LONGEST_HEADER:
        raise ValueError("its header is too long")

    def unpack(expected: int) -> bytes:
        if expected > _LARGEST_FILE:
            raise ValueError(f"{expected} bytes are more than a record holds")
        unpacker = zlib.decompressobj()
        body = base64.b64decode(text[len(head) + 1 :], validate=True)
        data = unpacker.decompress(body, expected + 1)
        if len(data) != expected or not unpacker.eof:
            raise ValueError(f"it holds {len(data)} bytes, not {expected}")
        return data

    try:
        header = json.loads(head)
        if header["version"] not in versions:
            raise ValueError(f"version {header['version']!r} is not known, only {versions}")
        return read(header, unpack)
    except (KeyError, TypeError, OverflowError, RecursionError, zlib.error,
            binascii.Error) as error:  # fmt: skip
        raise ValueError(f"its data is damaged ({type(error).__name__}: {error})") from None


def _decode(header: dict[str, Any], unpack: Callable[[int], bytes]) -> Heatmaps:
    cells, shape = sizes_of(header["cells"], 4), sizes_of(header["shape"], 4)
    block = sizes_of(header["block"], 2)
    count = math.prod(cells)
    if count > MOST_CELLS:
        raise ValueError(f"{count} cells are more than a record holds")
    if cells != (*shape[:2], -(-shape[2] // block[0]), -(-shape[3] // block[1])):
        raise ValueError(f"{cells} cells do not follow from {shape} in blocks of {block}")
    dtype = str(header["dtype"])
    split = count * np.dtype(_stored(dtype)).itemsize
    end = expected = split + -(-count // 8)
    step, column_sums = _how_sketched(header.get("sketch"))
    numbers = (shape[0] * shape[1], shape[2], shape[3])
    if step:
        expected += packed_size(numbers, column_sums=column_sums)
    data = unpack(expected)
    masked = np.unpackbits(np.frombuffer(data[split:end], np.uint8), count=count).astype(bool)
    limits = np.array(header["limits"], dtype=np.float64)
    if limits.shape not in ((2,), (*cells[:2], 2)):  # one scale for all, or one for each panel
        raise ValueError(f"its limits have the shape {limits.shape}")
    labels = header["labels"]
    if not isinstance(labels, dict):
        raise ValueError("its labels are not named")
    return Heatmaps(
        values=_unpacked(data[:split], dtype).reshape(cells), masked=masked.reshape(cells),
        block=(block[0], block[1]), shape=(shape[0], shape[1], shape[2], shape[3]), dtype=dtype,
        labels=labels, scale=str(header["scale"]), limits=np.broadcast_to(limits, (*cells[:2], 2)),
        matplotlib=str(header["matplotlib"]), freetype=str(header["freetype"]),
        sketch=unpacked(data[end:], numbers, step, column_sums=column_sums) if step else None,
        masks=_checked_masks(header.get("masks"), cells[:2]),
    )  # fmt: skip


def _how_sketched(given: Any) -> tuple[float, bool]:
    """Return by what a sketch was rounded, 0 where there is none, and whether it sums columns."""
    if given is None:
        return 0.0, False
    step, column_sums = float(given["step"]), given["column_sums"]
    if not 0 < step < 1 or not isinstance(column_sums, bool):
        raise ValueError(f"{given!r} is no sketch")
    return step, column_sums


def _checked_masks(given: Any, shape: tuple[int, ...]) -> list[list[int]] | None:
    if given is None:
        return None
    sums = np.array(given)
    if sums.shape != shape or sums.dtype.kind not in "iu":
        raise ValueError("its masks are no checksums of its maps")
    found: list[list[int]] = sums.tolist()
    return found


def sizes_of(given: Any, count: int) -> tuple[int, ...]:
    """Return so many sizes; ValueError for anything else."""
    sizes = tuple(given)
    if len(sizes) != count or not all(type(size) is int and size > 0 for size in sizes):
        raise ValueError(f"{given!r} are not {count} sizes")
    return sizes


def read_heatmaps(path: str | Path) -> Heatmaps:
    """Read the data that a picture of `show_heatmaps` carries.

    Args:
        path: A PNG or SVG file that was saved from such a figure, by whatever means.

    Raises:
        FileNotFoundError: There is no such file.
        TypeError: It is no path.
        ValueError: It is not such a picture, it carries no data, or it is damaged.
    """
    if not isinstance(path, (str, os.PathLike)):
        raise TypeError(misuse("path", repr(path), "the path of a PNG or SVG file"))
    file = Path(path)
    try:
        record = find_record(file)
        if record is None:
            raise ValueError("it carries no data of show_heatmaps")
        return decode(record)
    except ValueError as error:
        raise ValueError(f"read_heatmaps: {file}: {error}") from None


def find_record(file: Path) -> str | None:
    """Return the record in a PNG or SVG file, or None if it has none."""
    about = file.stat()
    if not stat.S_ISREG(about.st_mode):
        raise ValueError("it is not a file, but a folder, a pipe or a device")
    if about.st_size > _LARGEST_FILE:
        raise ValueError(f"it is larger than {_LARGEST_FILE >> 20} MB")
    with file.open("rb") as stream:
        start = stream.read(8)
    if start == b"\x89PNG\r\n\x1a\n":
        return _png_record(file.read_bytes())
    if start.lstrip().startswith((b"<?xml", b"<svg")):
        found = re.search(
            rb"<dc:source>\s*" + KEYWORD.encode() + rb":([^<]*)</dc:source>", file.read_bytes()
        )
        return found and unescape(found[1].decode("utf-8", "replace"), {"&quot;": '"'})
    raise ValueError("it is neither a PNG nor an SVG file")


def _png_record(data: bytes) -> str | None:
    """Walk the chunks of a PNG up to the pixels; nothing is decompressed."""
    position = 8
    while position + 12 <= len(data):
        length = int.from_bytes(data[position : position + 4], "big")
        kind = data[position + 4 : position + 8]
        content = data[position + 8 : position + 8 + length]
        end = position + 12 + length
        if end > len(data):
            raise ValueError("it is cut off")
        if int.from_bytes(data[end - 4 : end], "big") != zlib.crc32(kind + content):
            raise ValueError("a checksum is wrong")
        if kind == b"tEXt" and content.startswith(KEYWORD.encode() + b"\0"):
            return content[len(KEYWORD) + 1 :].decode("latin-1")
        if kind == b"IEND":
            return None
        position = end
    raise ValueError("it is cut off")
