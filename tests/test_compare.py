"""Two pictures compared: what differs is found and named, and nothing else is."""

import os
import subprocess
import sys
import time
import zlib
from dataclasses import replace
from pathlib import Path

import matplotlib
import numpy as np
import planted
import pytest
import torch
from matplotlib.figure import Figure

from pytest_attnheat import read_heatmaps, show_heatmaps
from pytest_attnheat.baselines import judging
from pytest_attnheat.baselines.compare import compare_data, panel_name
from pytest_attnheat.heatmaps import record

GRIDS = [(1, 1, 10, 10), (2, 3, 12, 12), (1, 1, 256, 256)]
PLANTED = [(1, 1, 10), (2, 4, 16), (1, 1, 512)]


def softmax(*shape, seed=0):
    scores = torch.randn(*shape, generator=torch.Generator().manual_seed(seed))
    return scores.mul(2).softmax(-1)


def draw(weights, **options):
    size = max(2.5, weights.shape[1] * weights.shape[3] / 60 + 1)
    return show_heatmaps(weights, "Keys", "Queries", figsize=(size, size), **options)


def verdict(tmp_path, before, after, kind="png", tolerance=None):
    baseline = tmp_path / f"baseline.{kind}"
    judging.save(before, baseline)
    (tmp_path / "work").mkdir(exist_ok=True)
    return judging.check(after, baseline, tmp_path / "work", tolerance)


def last(weights):
    return (weights.shape[0] - 1, weights.shape[1] - 1)


def transposed(weights):
    weights[last(weights)] = weights[last(weights)].mT.clone()


def swapped(weights):
    heads = weights.flatten(0, 1)
    heads[[0, -1]] = heads[[-1, 0]].clone()


def one_row_one_hot(weights):
    row = weights[last(weights)][5]
    row.zero_()
    row[3] = 1


def future_leak(weights):
    row = weights[last(weights)][1]
    row.zero_()
    row[-1] = 1


def half(weights):
    weights.mul_(0.5)


def logits(weights):
    weights.log_()


def small_change(weights):
    weights[last(weights)][2, 3] += 0.001


def as_users_do(weights, **options):
    """Draw one map at the default size, and a grid of them at its own."""
    options = {"figsize": (2.5, 2.5) if weights[..., 0, 0].size == 1 else None, **options}
    return show_heatmaps(weights, "Keys", "Queries", **options)


def shown(weights, **options):
    """The data of a picture, without any file."""
    return read_back(as_users_do(weights, **options))


def read_back(figure):
    return record.decode(record.encode(figure.picture.shown))


@pytest.fixture(scope="module", params=PLANTED, ids=str)
def planted_grid(request):
    scores = planted.scores_of(*request.param)
    return scores, shown(planted.softmax(scores))


@pytest.mark.parametrize("kind", planted.KINDS)
def test_every_planted_change_is_found_and_named_where_all_weights_are_shown(planted_grid, kind):
    scores, before = planted_grid
    if kind not in planted.kinds_of(scores.shape[1]):
        pytest.skip("there is one head alone")
    found = compare_data(before, shown(planted.KINDS[kind](scores)))
    assert found is not None
    if kind in planted.SAID and before.complete:
        assert any(planted.SAID[kind] in line for line in found.details)


# What is said of changes besides, where a picture does not show all weights.
SAID_OF_SKETCHES = {
    **planted.SAID,
    "one weight changed by 0.001": "one weight changed, that of query {middle} and key 1, by ",
    "a median weight set to 0": "one weight changed, that of query {last} and key ",
    "a median weight doubled": "one weight changed, that of query {last} and key ",
    "two weights of a row swapped": " of query {middle} moved from key ",
}


@pytest.fixture(scope="module", params=[(2, 3, 160), (1, 1, 512)], ids=str)
def pooled_grid(request):
    scores = planted.scores_of(*request.param)
    return scores, read_back(as_users_do(planted.softmax(scores), figsize=(2.5, 2.5)))


@pytest.mark.parametrize("kind", planted.KINDS)
def test_of_pooled_maps_every_relation_is_named_and_no_other(pooled_grid, kind):
    scores, before = pooled_grid
    if kind not in planted.kinds_of(scores.shape[1]):
        pytest.skip("there is one head alone")
    figure = as_users_do(planted.KINDS[kind](scores), figsize=(2.5, 2.5))
    found = compare_data(before, read_back(figure), maps=figure.picture.shown.whole.maps)
    size = scores.shape[-1]
    said = SAID_OF_SKETCHES.get(kind, "").format(middle=size // 2, last=size - 1)
    relations = [line for line in found.details if line.startswith("relation")]
    assert [said in line for line in relations] == [True] * bool(said)


@pytest.mark.parametrize("kind", ["temperature 1.05", "sigmoid in place of softmax"])
def test_no_relation_is_named_that_some_weights_do_not_follow(pooled_grid, kind):
    scores, before = pooled_grid
    weights = planted.KINDS[kind](scores)
    weights[0, 0, 5, :5] = planted.softmax(scores)[0, 0, 5, :5]
    figure = as_users_do(weights, figsize=(2.5, 2.5))
    found = compare_data(before, read_back(figure), maps=figure.picture.shown.whole.maps)
    assert not any(line.startswith("relation") for line in found.details)


def test_maps_that_were_changed_after_they_were_drawn_explain_nothing(pooled_grid):
    scores, before = pooled_grid
    weights = planted.softmax(scores / 1.05)
    figure = as_users_do(weights, figsize=(2.5, 2.5))
    weights[:] = planted.softmax(scores / 1.5)
    found = compare_data(before, read_back(figure), maps=figure.picture.shown.whole.maps)
    assert not any(line.startswith("relation") for line in found.details)


def test_a_failed_comparison_of_a_pooled_picture_names_the_relation(tmp_path):
    scores = planted.scores_of(1, 1, 300)
    figures = [as_users_do(planted.softmax(s, axis)) for s, axis in ((scores, -1), (scores, -2))]
    found = verdict(tmp_path, *figures)
    assert any("runs over the queries" in line for line in found.details)


def test_of_more_cells_than_a_file_keeps_every_change_is_found():
    scores = planted.scores_of(12, 12, 96)
    before = shown(planted.softmax(scores))
    assert not before.complete
    for kind in ("a median weight set to 0", "one head times 0.95", "0.2 of a row on a future key"):
        assert compare_data(before, shown(planted.KINDS[kind](scores))) is not None


def test_a_change_that_pooling_hides_is_found_with_its_row_and_column():
    scores = planted.scores_of(1, 1, 512)
    before = planted.softmax(scores)
    after = before.copy()
    after[0, 0, 301, 100] += 0.001
    after[0, 0, 300, 100] -= 0.001
    found = compare_data(shown(before), shown(after))
    assert found.reason == "weights differ within pooled cells, most in panel [0, 0]"
    assert found.details[0] == "queries         300, 301 differ"
    assert found.details[1] == "key             100 differs"
    assert found.details[2].startswith("row sums        of 300: expected 1, got 0.999")
    assert found.worst == (0, 0, 75, 25)


def test_queries_that_trade_places_within_pooled_cells_are_named():
    scores = planted.scores_of(1, 1, 512)
    found = compare_data(
        shown(planted.softmax(scores)), shown(planted.KINDS["two queries swapped"](scores))
    )
    assert any(
        "relation        the queries are permuted: 255 shows what was 256, 256 shows what was 255"
        in line
        for line in found.details
    )


def test_a_map_with_its_small_weights_removed_is_no_longer_equal(tmp_path):
    weights = softmax(1, 1, 512, 512)
    largest = torch.nn.functional.max_pool2d(weights, 4)
    kept = largest.repeat_interleave(4, -1).repeat_interleave(4, -2)
    figures = [
        show_heatmaps(w, "k", "q") for w in (weights, torch.where(weights == kept, weights, 0.0))
    ]
    found = verdict(tmp_path, *figures)
    assert (found.status, found.compared) == ("data", ("data", "sketch"))
    assert "row sums" in str(found.details)


def test_a_mask_that_changed_within_a_pooled_cell_is_a_difference():
    weights, mask = softmax(1, 1, 512, 512), torch.ones(512, 512).bool()
    other = mask.clone()
    other[5, 7] = False
    weights[0, 0, 5, 7] = 0
    read = [shown(weights.numpy(), mask=m.numpy()) for m in (mask, other)]
    assert compare_data(*read).reason == "the mask changed in [0, 0], within pooled cells"
    again = shown(weights.numpy(), mask=mask.expand(1, 1, 512, 512).contiguous().numpy())
    assert compare_data(read[0], again) is None
    assert "the picture has none" in compare_data(read[0], shown(weights.numpy())).reason


def test_a_pooled_baseline_from_before_there_were_sketches_is_still_read(tmp_path):
    figure = show_heatmaps(softmax(512, 512), "k", "q")
    whole = figure.picture.shown
    figure.picture.shown = replace(whole, whole=None)
    judging.save(figure, tmp_path / "a.png")
    figure.picture.shown = whole
    found = judging.check(figure, tmp_path / "a.png", tmp_path)
    assert (found.status, found.passed, found.compared) == ("pooled", True, ("data", "pixels"))
    assert found.reason == "it had no sketch"  # what the summary says where it is written anew


@pytest.mark.parametrize("kind", ["png", "svg"])
@pytest.mark.parametrize("grid", GRIDS)
def test_the_same_picture_is_equal(tmp_path, grid, kind):
    figures = [as_users_do(softmax(*grid).numpy()) for _ in range(2)]
    found = verdict(tmp_path, *figures, kind)
    kinds = ("data", "pixels") if grid[-1] < 90 else ("data", "sketch", "pixels")
    assert (found.status, found.compared) == ("equal", kinds)


@pytest.mark.parametrize(
    ("grid", "kind"),
    [
        ((4, 4, 8, 8), "png"),
        ((4, 4, 8, 8), "svg"),
        ((1, 1, 300, 300), "png"),
        ((12, 12, 90, 90), "png"),
    ],
)
def test_rounding_on_another_device_is_no_difference(tmp_path, grid, kind):
    weights = softmax(*grid)
    other = weights * (1 + 1e-6 * torch.randn(weights.shape))
    before, after = (as_users_do(w.numpy()) for w in (weights, other))
    assert verdict(tmp_path, before, after, kind).status == "equal"


def test_a_cell_of_another_colour_is_found_where_a_file_does_not_keep_all_cells(tmp_path):
    weights = softmax(12, 12, 90, 90).numpy()
    before, after = (as_users_do(w) for w in (weights, weights.copy()))
    assert after.picture.shown.whole is not None
    after.picture.shown.cells.values[3, 4, 5, 6] += 0.02
    after.picture._sheets.clear()  # drawn with the old value
    assert verdict(tmp_path, before, after).status == "panels"


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("numbers", [False, True])
def test_one_baseline_serves_lower_precision_too(tmp_path, dtype, numbers):
    weights = softmax(2, 2, 8, 8)
    before, after = (
        show_heatmaps(w, "k", "q", figsize=None, numbers=numbers)
        for w in (weights, weights.to(dtype))
    )
    assert verdict(tmp_path, before, after).passed


# -- what is said ------------------------------------------------------------------------------


def difference(before, after, **options):
    """Compare data without any file."""
    read = [record.decode(record.encode(draw(w, **options).picture.shown)) for w in (before, after)]
    return compare_data(*read)


def test_the_worst_cell_is_named_with_both_values():
    weights = softmax(2, 3, 6, 6)
    broken = weights.clone()
    broken[1, 2, 4, 5] += 0.25
    broken[0, 0, 1, 1] += 0.01
    found = difference(weights, broken)
    assert found.reason == "2 of 216 cells differ"
    assert found.worst == (1, 2, 4, 5)
    before, after = (f"{float(w[1, 2, 4, 5]):.6g}" for w in (weights, broken))
    assert f"panel [1, 2], query 4, key 5: expected {before}, got {after}" in found.details[0]
    assert "[0, 0], [1, 2] of 2 x 3" in found.details[1]


def test_a_panel_is_named_by_the_titles_beside_it_and_so_are_its_excerpts(tmp_path):
    before = [softmax(1, 4, 6, 6, seed=layer) for layer in range(2)]
    after = [layer.clone() for layer in before]
    after[1][0, 3, 2, 5] += 0.25
    found = verdict(tmp_path, *(show_heatmaps(w, "Keys", "Queries") for w in (before, after)))
    name = "panel [1, 3] (Layer 1, Head 3)"
    assert found.details[0].startswith(f"worst           {name}, query 2, key 5: expected ")
    heads = [line for line in found.details if line.endswith(" keys 0..5")]
    assert heads == [f"expected, {name}    keys 0..5", f"actual, {name}    keys 0..5"]
    read = read_heatmaps(found.artifacts["expected"])
    for none in (None, "sha256 0f", []):  # a file with much text keeps no more than a checksum
        labels = {"titles": none, "row_titles": ["", "second\nrow"]}
        assert panel_name(replace(read, labels=labels), 0, 3) == "panel [0, 3]"
        assert panel_name(replace(read, labels=labels), 1, 3) == "panel [1, 3] (second row)"


def test_weights_behind_a_mask_that_changed_have_no_relation():
    weights, mask = softmax(2, 3, 8, 8), torch.ones(8, 8).tril().bool()
    leaking = weights.clone()
    leaking[1, 2, 2, 6] = 0.5
    found = difference(weights, leaking, mask=mask)
    assert not any("relation" in line for line in found.details)


def triptych(tmp_path, before, after):
    return record.read_heatmaps(verdict(tmp_path, before, after).artifacts["difference"])


def test_the_picture_of_a_small_difference_shows_it_and_says_where_it_is(tmp_path):
    weights = softmax(2, 3, 6, 6)
    broken = weights.clone()
    broken[1, 2, 4, 5] += 1e-4
    drawn = triptych(tmp_path, draw(weights), draw(broken))
    assert drawn.labels["title"] == "panel [1, 2]: largest difference 0.0001 at query 4, key 5"
    np.testing.assert_allclose(drawn.limits[0, 2], [0, 1e-4], atol=1e-6)
    assert (drawn.limits[0, 0] == drawn.limits[0, 1]).all()


def test_the_picture_of_a_difference_says_where_masks_or_pooled_cells_hide_it(tmp_path):
    weights, mask = softmax(1, 1, 8, 8), torch.ones(8, 8).tril().bool()
    narrower = mask.clone()
    narrower[5, 2] = False
    drawn = triptych(tmp_path, draw(weights, mask=mask), draw(weights, mask=narrower))
    assert drawn.labels["title"] == "panel [0, 0]: one mask hides the weight at query 5, key 2"
    large = torch.full((1, 1, 512, 512), 1e-3)
    large[..., ::4, ::4] = 0.25
    changed = large.clone()
    changed[0, 0, 101, 7] = 2e-3
    drawn = triptych(tmp_path, *(show_heatmaps(w, "Keys", "Queries") for w in (large, changed)))
    assert drawn.labels["title"] == (
        "panel [0, 0]: no difference is seen in cells; most behind them at query 100..103, key 4..7"
    )
    assert drawn.labels["xlabel"] == "Keys (cells of 4)"


@pytest.mark.parametrize(
    ("defect", "said"),
    [
        (transposed, "transposed: queries and keys are exchanged"),
        (swapped, "the panels are permuted: [0, 0] shows what was [1, 2]"),
        (half, "every value is multiplied by 0.5"),
        (logits, "its softmax is the baseline: scores (logits) in place of weights?"),
        (lambda w: w.add_(0.3), "every value has 0.3 added"),
        (lambda w: w.copy_(w.roll(1, -1)), "shifted by one key, to higher numbers"),
        (lambda w: w.copy_(w.roll(-1, -1)), "shifted by one key, to lower numbers"),
        (lambda w: w.copy_(w.roll(1, -2)), "shifted by one query, to higher numbers"),
        (lambda w: w.mul_(torch.rand(w.shape[:-1])[..., None]), "the rows are normalised diff"),
        (lambda w: w.div_(w.sum(-2, keepdim=True)), "the columns are normalised differently"),
        (lambda w: w.copy_(w.flip(-2)), "the queries are permuted: their order is reversed"),
        (
            lambda w: w.copy_(w.reshape(2, 3, 4, 16).mT.reshape(w.shape)),  # for a transpose
            "each panel holds the same numbers in other places",
        ),
    ],
)
def test_how_the_picture_follows_from_its_baseline_is_said(defect, said):
    weights = softmax(2, 3, 8, 8)
    broken = weights.clone()
    defect(broken)
    assert said in difference(weights, broken, vmin=0, vmax=1).details[-1]


@pytest.mark.parametrize("defect", [one_row_one_hot, future_leak, small_change])
def test_no_relation_is_said_where_there_is_none(defect):
    weights = softmax(2, 3, 8, 8)
    broken = weights.clone()
    defect(broken)
    assert not any("relation" in line for line in difference(weights, broken).details)


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_nan_and_infinity_are_differences_and_equal_to_themselves(value):
    weights = softmax(1, 1, 5, 5)
    broken = weights.clone()
    broken[0, 0, 2, 2] = value
    assert difference(weights, broken).worst == (0, 0, 2, 2)
    assert difference(broken, broken) is None


def test_a_cell_that_is_masked_in_one_of_them_is_a_difference():
    weights, mask = softmax(1, 1, 4, 4), torch.ones(4, 4).bool()
    masks = [mask, mask.clone()]
    masks[1][2, 3] = False
    read = [record.decode(record.encode(draw(weights, mask=m).picture.shown)) for m in masks]
    found = compare_data(*read)
    assert found.worst == (0, 0, 2, 3)
    value = f"{float(weights[0, 0, 2, 3]):.6g}"
    assert f"expected {value}, got {value} (masked)" in found.details[0]


def test_weight_that_appears_behind_a_mask_is_a_difference():
    mask = torch.ones(4, 4).tril().bool()
    weights = softmax(1, 1, 4, 4) * mask
    leaking = weights.clone()
    leaking[0, 0, 1, 3] = 0.5
    found = difference(weights, leaking, mask=mask)
    assert found.worst == (0, 0, 1, 3)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"key_labels": list("abcx")}, "key_labels changed from ['a', 'b', 'c', 'd'] to"),
        ({"title": "new"}, "title changed from None to 'new'"),
        ({"scale": "panel"}, "the colour scale changed from 'shared' to 'panel'"),
        ({"numbers": True}, "numbers changed from None to '.2f'"),
        ({"vmax": 0.5}, "the colour scale changed from 0..1 to 0..0.5"),
    ],
)
def test_labels_and_scale_are_part_of_the_data(change, said):
    options = {"key_labels": list("abcd"), "figsize": (4, 4)}
    before, after = (
        show_heatmaps(softmax(4, 4), "k", "q", **{**options, **more}) for more in ({}, change)
    )
    read = [record.decode(record.encode(figure.picture.shown)) for figure in (before, after)]
    assert compare_data(*read).reason.startswith(said)


def test_another_shape_is_said_so():
    assert difference(softmax(1, 1, 4, 4), softmax(1, 1, 4, 5)).reason == (
        "the shape changed from (1, 1, 4, 4) to (1, 1, 4, 5)"
    )


def test_numbers_that_differ_are_printed_with_the_digits_that_differ(tmp_path):
    before, after = torch.full((1, 1, 3, 3), 0.5), torch.full((1, 1, 3, 3), 0.5)
    after[0, 0, 1, 2] += 2**-22
    found = verdict(tmp_path, draw(before), draw(after), tolerance=1e-9)
    assert "query 1, key 2: expected 0.5, got 0.50000024" in found.details[0]
    scales = [draw(before, vmax=end) for end in (0.9, 0.9 + 1e-7)]
    found = verdict(tmp_path, *scales, tolerance=1e-9)
    assert found.reason == "the colour scale changed from 0..0.9 to 0..0.9000001"


# -- pixels ------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["png", "svg"])
@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"cmap": "Blues"}, "the panels are drawn otherwise"),
        ({"highlight": [(0, 0, 1, 1)]}, "drawn otherwise"),
        ({"figsize": (3, 3)}, "another size"),
        ({"colorbar": False}, "the panels are drawn otherwise"),
    ],
)
def test_equal_data_drawn_otherwise_are_a_failure(tmp_path, kind, options, said):
    before = show_heatmaps(softmax(5, 5), "k", "q")
    after = show_heatmaps(softmax(5, 5), "k", "q", **options)
    found = verdict(tmp_path, before, after, kind)
    assert found.status == "panels"
    assert said in found.reason


@pytest.mark.parametrize("kind", ["png", "svg"])
@pytest.mark.parametrize("numbers", [False, True])
def test_other_text_passes_where_another_matplotlib_drew_it_and_fails_where_not(
    tmp_path, monkeypatch, kind, numbers
):
    def figure():
        return show_heatmaps(softmax(4, 4), "Keys", "Queries", figsize=(4, 4), numbers=numbers)

    other = figure()
    for text in other.findobj(matplotlib.text.Text):
        text.set_fontstyle("italic")
    assert verdict(tmp_path, other, figure(), kind).status == "panels"
    with monkeypatch.context() as patch:
        patch.setattr("matplotlib.__version__", "3.8.4")
        judging.save(other, tmp_path / f"baseline.{kind}")
    found = judging.check(figure(), tmp_path / f"baseline.{kind}", tmp_path / "work")
    assert (found.status, found.drawn_by) == ("text", "3.8.4")
    assert found.passed


# -- files -------------------------------------------------------------------------------------


def test_a_picture_without_data_is_compared_by_all_its_pixels(tmp_path):
    figures = [Figure(), Figure(), Figure()]
    for figure, line in zip(figures, ([1, 2], [1, 2], [2, 1]), strict=True):
        figure.add_subplot().plot(line)
    assert verdict(tmp_path, figures[0], figures[1]).compared == ("pixels",)
    found = verdict(tmp_path, figures[0], figures[2])
    assert (found.status, set(found.artifacts)) == ("pixels", {"expected", "actual", "difference"})
    assert found.artifacts["difference"].exists()
    assert verdict(tmp_path, figures[0], figures[2], tolerance=200).passed


def test_a_failure_leaves_expected_actual_and_difference_in_one_picture(tmp_path):
    weights = softmax(2, 2, 6, 6)
    broken = weights.clone()
    broken[1, 0, 4, 5] = 1
    found = verdict(tmp_path, draw(weights), draw(broken))
    shown = read_heatmaps(found.artifacts["difference"])
    assert shown.labels["titles"] == ["expected", "actual", "difference"]
    np.testing.assert_array_equal(shown.values[0, 0], weights[1, 0])
    np.testing.assert_array_equal(shown.values[0, 1], broken[1, 0])
    np.testing.assert_allclose(shown.values[0, 2], (broken - weights).abs()[1, 0], atol=1e-7)


@pytest.mark.parametrize("content", [b"", b"\x89PNG\r\n\x1a\nxx", b"GIF89a"])
def test_a_damaged_baseline_is_an_error_that_says_so(tmp_path, content):
    (tmp_path / "a.png").write_bytes(content)
    found = judging.check(draw(softmax(1, 1, 4, 4)), tmp_path / "a.png", tmp_path)
    assert found.status == "unreadable"
    assert found.reason


def test_a_baseline_is_never_half_written(tmp_path, monkeypatch):
    path = tmp_path / "a.png"
    judging.save(draw(softmax(1, 1, 4, 4)), path)
    whole = path.read_bytes()

    def fails(self, other):
        raise KeyboardInterrupt

    monkeypatch.setattr(Path, "replace", fails)
    with pytest.raises(KeyboardInterrupt):
        judging.save(draw(softmax(1, 1, 4, 4)), path)
    assert path.read_bytes() == whole
    assert [file.name for file in tmp_path.iterdir()] == ["a.png"]


def test_what_a_killed_process_left_is_removed_when_a_baseline_is_written(tmp_path):
    old, new = tmp_path / ".attnheat-old", tmp_path / ".attnheat-new"
    for part in (old, new):
        part.write_bytes(b"half")
    os.utime(old, (0, 0))
    judging.write(b"whole", tmp_path / "a.png")
    assert sorted(file.name for file in tmp_path.iterdir()) == [".attnheat-new", "a.png"]


def test_the_coarser_dtype_decides_what_is_a_difference():
    one = record.decode(record.encode(draw(softmax(1, 1, 6, 6)).picture.shown))
    off = replace(one, values=one.values * np.float32(1.005))
    assert compare_data(one, off) is not None
    assert compare_data(replace(one, dtype="bfloat16"), off) is None
    assert compare_data(one, off, 0.01) is None


def test_an_outlier_does_not_widen_what_other_cells_may_differ_by():
    scores = torch.randn(1, 2, 6, 6).masked_fill(~torch.ones(6, 6).tril().bool(), -1e9)
    other = torch.where(scores < -1e8, scores, -3 * scores)
    assert difference(scores, other, vmin=-3, vmax=3).reason == "42 of 72 cells differ"


def test_a_panel_of_small_values_is_held_as_closely_as_one_of_large_ones():
    weights = softmax(1, 2, 6, 6)
    weights[0, 1] *= 1e-7
    other = weights.clone()
    other[0, 1] = other[0, 1].mT.clone()
    assert difference(weights, other) is not None


def test_zeros_are_held_exactly():
    assert difference(torch.zeros(1, 1, 4, 4), torch.full((1, 1, 4, 4), 1e-6)) is not None


@pytest.mark.parametrize("kind", ["png", "svg"])
@pytest.mark.parametrize("scale", [1, 1 + 1e-7])
def test_what_a_user_draws_over_the_panels_is_held_too(tmp_path, kind, scale):
    def figure(text, factor=1.0):
        made = show_heatmaps(softmax(5, 5) * factor, "k", "q")
        made.text(0.5, 0.5, text, size=40, color="red")
        made.figimage(np.full((20, 20, 3), 0.8), zorder=-5)
        return made

    assert verdict(tmp_path, figure("x"), figure("x", scale), kind).status == "equal"
    assert verdict(tmp_path, figure("x"), figure("y", scale), kind).status == "panels"
    plain = show_heatmaps(softmax(5, 5), "k", "q")
    assert verdict(tmp_path, figure("x"), plain, kind).status == "panels"
    assert verdict(tmp_path, plain, figure("x"), kind).status == "panels"


def test_another_image_of_an_svg_is_held_too(tmp_path):
    def figure(image):
        made = show_heatmaps(softmax(5, 5), "k", "q")
        made.add_axes([0, 0, 0.1, 0.1]).imshow(image)
        return made

    one, other = [[1, 0], [0, 1]], [[0, 1], [1, 0]]
    assert verdict(tmp_path, figure(one), figure(one), "svg").passed
    assert not verdict(tmp_path, figure(one), figure(other), "svg").passed


def test_a_baseline_that_pretends_to_be_enormous_is_unreadable(tmp_path):
    baseline = tmp_path / "a.png"
    judging.save(draw(softmax(1, 1, 4, 4)), baseline)
    data = bytearray(baseline.read_bytes())
    data[16:24] = (20_000).to_bytes(4, "big") * 2
    data[29:33] = zlib.crc32(data[12:29]).to_bytes(4, "big")
    baseline.write_bytes(data)
    assert judging.check(draw(softmax(1, 1, 4, 4)), baseline, tmp_path).status == "unreadable"


def test_a_process_that_is_killed_while_it_writes_leaves_a_whole_baseline(tmp_path):
    path = tmp_path / "a.png"
    program = (
        "import sys, pathlib, numpy as np; from pytest_attnheat import show_heatmaps\n"
        "from pytest_attnheat.baselines import judging\n"
        "while True:\n"
        "    for size in (3, 4):\n"
        "        figure = show_heatmaps(np.eye(size), 'k', 'q')\n"
        "        judging.save(figure, pathlib.Path(sys.argv[1]))\n"
    )
    with subprocess.Popen([sys.executable, "-c", program, str(path)]) as process:
        while not path.exists():
            assert process.poll() is None
            time.sleep(0.01)
        for _ in range(200):
            assert read_heatmaps(path).values.sum() in (3, 4)
        process.kill()
    assert read_heatmaps(path).values.sum() in (3, 4)
