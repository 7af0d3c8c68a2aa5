"""A saved picture carries its data, and nothing that a file holds can do harm."""

import base64
import io
import json
import tracemalloc
import zlib
from dataclasses import replace

import matplotlib
import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from PIL import Image

from pytest_attnheat import read_heatmaps, show_heatmaps
from pytest_attnheat.heatmaps.record import decode, encode

KINDS = ["png", "svg"]


def softmax(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0)).softmax(-1)


def save(figure, tmp_path, kind="png", **options):
    path = tmp_path / f"picture.{kind}"
    figure.savefig(path, **options)
    return path


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_a_picture_carries_its_weights_bit_by_bit(tmp_path, kind, dtype):
    weights = softmax(2, 3, 5, 7).to(dtype)
    weights[0, 0, 0, 0], weights[1, 2, 4, 6] = torch.nan, torch.inf
    read = read_heatmaps(save(show_heatmaps(weights, "k", "q", figsize=(5, 4)), tmp_path, kind))
    np.testing.assert_array_equal(read.values, weights.float().numpy())
    assert read.dtype == str(dtype).removeprefix("torch.")
    assert read.values.dtype == np.float32


@pytest.mark.parametrize("kind", KINDS)
def test_it_carries_everything_else_that_it_shows(tmp_path, kind):
    mask = torch.ones(3, 4).tril().bool()
    labels = {"key_labels": ["<a>", "b&amp;", "中", '"'], "query_labels": ["x", "y", "$z$"]}
    figure = show_heatmaps(
        softmax(1, 2, 3, 4), "Keys", "Queries", ["one", "two"], (5, 3), mask=mask,
        title="T", row_titles=["r"], scale="panel", **labels,
    )  # fmt: skip
    read = read_heatmaps(save(figure, tmp_path, kind))
    np.testing.assert_array_equal(read.masked, np.broadcast_to(~mask.numpy(), (1, 2, 3, 4)))
    assert read.labels == {
        "xlabel": "Keys", "ylabel": "Queries", "title": "T", "titles": ["one", "two"],
        "row_titles": ["r"], "numbers": None, **labels,
    }  # fmt: skip
    assert (read.shape, read.block, read.scale) == ((1, 2, 3, 4), (1, 1), "panel")
    assert read.matplotlib == matplotlib.__version__
    shown = np.where(read.masked, np.nan, read.values)
    np.testing.assert_array_equal(read.limits[..., 1], np.nanmax(shown, (2, 3)))


def test_a_pooled_picture_carries_its_cells_and_how_they_were_pooled(tmp_path):
    weights = torch.zeros(4096, 4096)
    weights[1234, 3000] = 1
    read = read_heatmaps(save(show_heatmaps(weights, "k", "q"), tmp_path))
    assert read.shape == (1, 1, 4096, 4096)
    assert read.block[0] > 1
    place = (0, 0, 1234 // read.block[0], 3000 // read.block[1])
    assert np.argwhere(read.values).tolist() == [list(place)]


@pytest.mark.parametrize("options", [{"dpi": 40}, {"dpi": 300}, {"bbox_inches": "tight"}])
def test_the_data_do_not_depend_on_how_the_picture_is_saved(tmp_path, options):
    weights = softmax(30, 30)
    path = save(show_heatmaps(weights, "k", "q"), tmp_path, **options)
    np.testing.assert_array_equal(read_heatmaps(path).values[0, 0], weights.numpy())


@pytest.mark.parametrize("kind", KINDS)
def test_the_users_own_metadata_are_kept(tmp_path, kind):
    path = save(show_heatmaps(softmax(4, 4), "k", "q"), tmp_path, kind, metadata={"Title": "Mine"})
    assert b"Mine" in path.read_bytes()
    assert read_heatmaps(path).shape == (1, 1, 4, 4)


def test_a_picture_of_too_many_cells_carries_fewer_and_a_sketch(tmp_path):
    weights = torch.rand(1100, 1000)
    read = read_heatmaps(save(show_heatmaps(weights, "k", "q", figsize=(16, 16)), tmp_path))
    assert (read.shape, read.complete) == ((1, 1, 1100, 1000), False)
    assert read.values.size < 1 << 14
    np.testing.assert_allclose(read.sketch.rows.sums[0], weights.double().sum(1), rtol=1e-5)
    # What is shown of so much is rounded; less is kept as it is.
    np.testing.assert_allclose(read.values.max(), weights.max(), rtol=4e-6)
    fewer = save(show_heatmaps(weights[:200, :200], "k", "q", figsize=(2, 2)), tmp_path)
    assert read_heatmaps(fewer).values.max() == weights[:200, :200].max()


def test_no_record_is_written_that_its_own_reader_refuses(tmp_path):
    labels = ["\u4e2d" * 200 + str(number) for number in range(1000)]
    figure = show_heatmaps(torch.eye(1000), "k", "q", key_labels=labels, figsize=(6, 6))
    read = read_heatmaps(save(figure, tmp_path))
    assert read.shape == (1, 1, 1000, 1000)
    assert read.labels["key_labels"].startswith("sha256 ")
    many = show_heatmaps(torch.rand(300, 300, 1, 1), "k", "q", figsize=(40, 40), colorbar=False)
    assert decode(encode(many.picture.shown)).limits.shape == (300, 300, 2)


@pytest.mark.parametrize("shape", [(512, 512), (1000, 1000), (3, 300, 300)])
def test_a_sketch_makes_a_file_at_most_a_quarter_larger(tmp_path, shape):
    figure = show_heatmaps(softmax(*shape), "k", "q")
    with_sketch = save(figure, tmp_path).stat().st_size
    figure.picture.shown = replace(figure.picture.shown, whole=None)
    assert with_sketch <= 1.25 * save(figure, tmp_path).stat().st_size


def test_a_record_is_compact(tmp_path):
    weights = softmax(12, 12, 32, 32).bfloat16()
    figure = show_heatmaps(weights, "k", "q", figsize=None)
    with_data = save(figure, tmp_path).stat().st_size
    plain = io.BytesIO()
    Figure.savefig(figure, plain, pil_kwargs={"compress_level": 1})
    assert with_data - len(plain.getvalue()) < weights.nbytes * 4 / 3


# -- files of others ---------------------------------------------------------------------------


def test_a_picture_of_another_tool_carries_no_data(tmp_path):
    for kind in KINDS:
        with pytest.raises(ValueError, match=f"picture.{kind}: it carries no data"):
            read_heatmaps(save(Figure(), tmp_path, kind))


def test_what_is_no_path_is_refused():
    with pytest.raises(TypeError, match="path: got 3; accepted is the path of a PNG or SVG file"):
        read_heatmaps(3)


@pytest.mark.parametrize("content", [b"", b"GIF89a", b"\x89PNG\r\n\x1a\n", b"<html></html>"])
def test_a_file_that_is_no_picture_is_refused(tmp_path, content):
    (tmp_path / "a.png").write_bytes(content)
    with pytest.raises(ValueError, match=r"read_heatmaps: .*a.png: it is (neither|cut off)"):
        read_heatmaps(tmp_path / "a.png")


def test_a_file_that_is_not_there_is_said_so(tmp_path):
    with pytest.raises(FileNotFoundError):
        read_heatmaps(tmp_path / "a.png")


@pytest.mark.parametrize("kind", KINDS)
def test_a_truncated_file_is_an_error_wherever_it_ends(tmp_path, kind):
    path = save(show_heatmaps(softmax(6, 6), "k", "q"), tmp_path, kind)
    data = path.read_bytes()
    whole = read_heatmaps(path).values
    for end in range(0, len(data), 97):
        path.write_bytes(data[:end])
        try:
            read = read_heatmaps(path)
        except ValueError:
            continue
        np.testing.assert_array_equal(read.values, whole)


def test_a_flipped_byte_is_an_error_or_harmless(tmp_path):
    path = save(show_heatmaps(softmax(6, 6), "k", "q"), tmp_path)
    data = bytearray(path.read_bytes())
    whole = read_heatmaps(path).values
    for position in range(8, len(data), 53):
        changed = bytearray(data)
        changed[position] ^= 0x40
        path.write_bytes(changed)
        try:
            np.testing.assert_array_equal(read_heatmaps(path).values, whole)
        except ValueError:
            continue


def record(body=None, **changes):
    """Write a record of 2 x 2 cells by hand, with changes."""
    header = {
        "version": 1, "cells": [1, 1, 2, 2], "block": [1, 1], "shape": [1, 1, 2, 2],
        "dtype": "float32", "labels": {}, "scale": "shared", "limits": [[[0, 1]]],
        "matplotlib": "3.11.2", "freetype": "2.14.3", **changes,
    }  # fmt: skip
    header = {name: value for name, value in header.items() if value is not None}
    if body is None:
        body = zlib.compress(bytes(4 * 4 + 1))
    return json.dumps(header) + "\n" + base64.b64encode(body).decode()


def test_a_record_written_by_hand_is_read():
    assert decode(record()).values.tolist() == [[[[0, 0], [0, 0]]]]


@pytest.mark.parametrize(
    "changes",
    [
        {"version": 3},
        {"sketch": {"step": 0, "column_sums": True}},
        {"sketch": {"step": 0.1, "column_sums": True}},
        {"sketch": {"step": 0.1}},
        {"sketch": 1},
        {"masks": [[1, 2]]},
        {"masks": [["a"]]},
        {"version": None},
        {"cells": [1, 1, 2]},
        {"cells": [1, 1, 2, -2]},
        {"cells": [1, 1, 2, 2.0]},
        {"cells": [1, 1, 2, True]},
        {"cells": [1 << 20, 1 << 20, 1 << 20, 1 << 20], "shape": [1 << 20] * 4},
        {"cells": "1122"},
        {"block": [2, 2]},
        {"block": [0, 0]},
        {"shape": [1, 1, 3, 2]},
        {"dtype": "float16"},
        {"labels": []},
        {"limits": [[0, 1]]},
        {"limits": [0, 1, 2]},
        {"limits": [[["a", 1]]]},
        {"limits": None},
        {"freetype": None},
        {"body": b"not compressed"},
        {"body": zlib.compress(bytes(3))},
        {"body": zlib.compress(bytes(100))},
        {"body": zlib.compress(bytes(17))[:-5]},
    ],
)
def test_a_record_that_contradicts_itself_is_refused(changes):
    with pytest.raises(ValueError, match=r"."):
        decode(record(**changes))


@pytest.mark.parametrize("text", ["", "{}", "[" * 100_000, "null\n", "1\n", '{"version": 1}\n??'])
def test_what_is_no_record_is_refused(text):
    with pytest.raises(ValueError, match=r"."):
        decode(text)


def test_a_bomb_is_not_unpacked(tmp_path):
    bomb = zlib.compress(bytes(1 << 28))
    tracemalloc.start()
    with pytest.raises(ValueError, match="not 17"):
        decode(record(body=bomb))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 4 << 20


def test_other_tools_find_the_record_under_its_name(tmp_path):
    path = save(show_heatmaps(softmax(4, 4), "k", "q"), tmp_path)
    with Image.open(path) as image:
        assert json.loads(image.info["attnheat"].partition("\n")[0])["version"] == 2
