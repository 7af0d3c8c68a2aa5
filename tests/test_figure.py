"""What `show_heatmaps` draws, read back from the pixels, and what it leaves alone."""

import inspect
import io
import subprocess
import sys
import warnings
from typing import Any

import matplotlib
import numpy as np
import pytest
import torch
from matplotlib import pyplot
from matplotlib.colors import LinearSegmentedColormap, ListedColormap
from matplotlib.figure import Figure
from matplotlib.text import Text
from panel_figures import figures, panel_hash
from PIL import Image

from pytest_attnheat import show_difference, show_heatmaps


def softmax_maps(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).softmax(-1)


def pixels(figure, **kwargs):
    file = io.BytesIO()
    figure.savefig(file, format="png", **kwargs)
    return np.asarray(Image.open(file).convert("RGB"))


def sheet(figure):
    width, height = figure.get_size_inches() * figure.dpi
    return figure.picture.prepare((round(width), round(height)), figure.dpi)


def cell_colors(figure, image=None):
    """Read the colour in the middle of each cell: (rows, columns, queries, keys, 3)."""
    image, layout = pixels(figure) if image is None else image, sheet(figure).layout
    wide, high = layout.cell
    return np.array(
        [
            [
                image[top + high // 2 : top + layout.panel[1] : high][
                    :, left + wide // 2 : left + layout.panel[0] : wide
                ]
                for left in layout.lefts
            ]
            for top in layout.tops
        ]
    )


def texts(figure):
    return [text.get_text() for text in figure.findobj(Text) if text.get_text()]


def assert_no_text_is_cut_off_or_overlaps(figure):
    width, height = pixels(figure).shape[1::-1]
    renderer = figure.canvas.get_renderer() if hasattr(figure.canvas, "get_renderer") else None
    extents = [t.get_window_extent(renderer) for t in figure.findobj(Text) if t.get_text()]
    for extent in extents:
        assert extent.x0 >= -1
        assert extent.x1 <= width + 1
        assert extent.y0 >= -1
        assert extent.y1 <= height + 1
    for index, one in enumerate(extents):
        for other in extents[:index]:
            overlap = (
                min(one.x1, other.x1) - max(one.x0, other.x0),
                min(one.y1, other.y1) - max(one.y0, other.y0),
            )
            assert min(overlap) < 1, "two texts overlap by more than rounding"


def reds(values):
    """Colour values of 0 to 1 as matplotlib itself does."""
    return np.array(matplotlib.colormaps["Reds"](np.asarray(values, np.float64), bytes=True))[
        ..., :3
    ]


# -- the textbook's function -------------------------------------------------------------------


def test_the_signature_is_the_textbooks_and_everything_else_is_keyword_only():
    parameters = inspect.signature(show_heatmaps).parameters.values()
    positional = [p for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD]
    assert [p.name for p in positional] == [
        "matrices", "xlabel", "ylabel", "titles", "figsize", "cmap",
    ]  # fmt: skip
    assert [p.default for p in positional[3:]] == [None, (2.5, 2.5), "Reds"]
    assert all(p.kind is p.KEYWORD_ONLY for p in list(parameters)[6:])


def test_every_cell_has_the_colour_that_matplotlib_gives_its_value():
    weights = softmax_maps(2, 3, 5, 7)
    colors = cell_colors(show_heatmaps(weights, "Keys", "Queries", figsize=(6, 4)))
    np.testing.assert_array_equal(colors, reds(weights))


def test_queries_run_down_and_keys_across():
    weights = torch.zeros(2, 3)
    weights[0, 2] = 1
    colors = cell_colors(show_heatmaps(weights, "Keys", "Queries"))[0, 0]
    dark = np.argwhere((colors == reds(1.0)).all(-1))
    assert dark.tolist() == [[0, 2]]


def test_labels_and_titles_are_written():
    figure = show_heatmaps(
        softmax_maps(2, 2, 4, 4), "Keys", "Queries", ["one", "two"], (5, 5),
        row_titles=["first", "second"], title="All",
    )  # fmt: skip
    assert {"Keys", "Queries", "one", "two", "first", "second", "All"} <= set(texts(figure))


def test_no_name_of_an_axis_writes_nothing():
    figure = show_heatmaps(softmax_maps(4, 4), None, None)
    assert not {"None", "none"} & set(texts(figure))
    assert sheet(figure).layout.panel > sheet(show_heatmaps(torch.eye(4), "K", "Q")).layout.panel


@pytest.mark.parametrize(
    ("shape", "options", "textbook"),
    [
        ((10, 10), {}, True),
        ((2, 10), {}, True),
        ((600, 600), {}, True),
        ((2, 10, 10, 10), {}, False),
        ((3, 50), {}, False),
        ((5, 5), {"key_labels": list("abcde")}, False),
        ((5, 5), {"numbers": True}, False),
    ],
)
def test_a_figure_has_the_textbooks_size_where_that_shows_its_map_and_else_one_that_fits(
    shape, options, textbook
):
    weights = softmax_maps(*shape)
    given, fitting = (
        show_heatmaps(weights, "Keys", "Queries", figsize=size, **options).get_size_inches()
        for size in ((5.0, 5.0), None)
    )
    assert given.tolist() == [5, 5]
    figure = show_heatmaps(weights, "Keys", "Queries", **options)
    expected = [2.5, 2.5] if textbook else fitting.tolist()
    assert figure.get_size_inches().tolist() == expected
    assert min(sheet(figure).layout.panel) >= 20


def test_a_size_and_limits_may_be_arrays_and_tensors():
    weights = softmax_maps(4, 4)
    figure = show_heatmaps(weights, "Keys", "Queries", figsize=np.array([3, 2]), vmin=weights.min())
    assert figure.get_size_inches().tolist() == [3, 2]
    assert figure.picture.shown.scale.range == (pytest.approx(float(weights.min())), 1)


def test_who_asks_for_the_textbooks_size_gets_it():
    figure = show_heatmaps(softmax_maps(2, 3, 4, 4), "Keys", "Queries", figsize=(2.5, 2.5))
    assert figure.get_size_inches().tolist() == [2.5, 2.5]


def test_what_a_model_returns_is_labelled_by_layers_and_heads():
    attentions = tuple(softmax_maps(1, 3, 4, 4) for _ in range(2))
    found = texts(show_heatmaps(attentions, "Keys", "Queries"))
    assert {"Layer 0", "Layer 1", "Head 0", "Head 2"} <= set(found)
    found = texts(show_heatmaps(attentions, "K", "Q", list("abc"), row_titles=["x", "y"]))
    assert not any("Head" in text or "Layer" in text for text in found)
    found = texts(show_heatmaps([layer[0] for layer in attentions], "Keys", "Queries"))
    assert not any("Head" in text or "Layer" in text for text in found)
    changed = (attentions[0], attentions[1].roll(1, -1))
    assert any(t.startswith("layer 1, head ") for t in texts(show_difference(attentions, changed)))
    with pytest.raises(TypeError, match=r"got a list with None; .*attn_implementation='eager'"):
        show_heatmaps((None, None), "Keys", "Queries")


def test_both_queries_of_the_textbooks_call_have_their_label():
    weights = torch.full((1, 1, 2, 10), 0.5)
    figure = show_heatmaps(weights, xlabel="Keys", ylabel="Queries")
    assert texts(figure)[2:9] == ["0", "2", "4", "6", "8", "0", "1"]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("kind", ["plain", "requires_grad", "transposed", "expanded", "numpy"])
def test_any_tensor_is_drawn_as_its_values_in_float64_would_be(dtype, kind):
    weights = softmax_maps(2, 2, 6, 6).to(dtype)
    if kind == "requires_grad":
        weights.requires_grad_()
    elif kind == "transposed":
        weights = weights.mT
    elif kind == "expanded":
        weights = weights[:1, :1].expand(2, 2, 6, 6)
    elif kind == "numpy":
        if dtype is torch.bfloat16:
            pytest.skip("NumPy has no bfloat16")
        weights = weights.numpy()
    oracle = torch.as_tensor(weights).detach().double().float()
    figure = show_heatmaps(weights, "Keys", "Queries", figsize=(4, 4))
    np.testing.assert_array_equal(cell_colors(figure), reds(oracle))


def test_neither_pyplot_nor_any_setting_is_touched():
    before, settings = pyplot.get_fignums(), dict(matplotlib.rcParams)
    figure = show_heatmaps(softmax_maps(4, 4), "Keys", "Queries")
    figure.savefig(io.BytesIO())
    assert isinstance(figure, Figure)
    assert pyplot.get_fignums() == before
    assert dict(matplotlib.rcParams) == settings


def test_matplotlib_is_imported_without_pyplot():
    program = (
        "import sys, numpy, pytest_attnheat as a; a.show_heatmaps(numpy.eye(4), 'k', 'q')"
        ".savefig(sys.argv[1]); assert 'matplotlib.pyplot' not in sys.modules; "
        "assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", program, "/dev/null.png"[:9]], check=True, timeout=60)


def test_a_tensor_changed_afterwards_does_not_change_the_picture():
    weights = torch.eye(5)
    figure = show_heatmaps(weights, "Keys", "Queries")
    before = pixels(figure, dpi=200)
    weights.zero_()
    np.testing.assert_array_equal(pixels(figure, dpi=200), before)


# -- the colour scale --------------------------------------------------------------------------


def test_half_the_weights_have_half_the_colour_not_the_same_one():
    weights = softmax_maps(1, 2, 4, 4)
    weights[0, 1] = weights[0, 0] / 2
    colors = cell_colors(show_heatmaps(weights, "Keys", "Queries", figsize=(5, 3)))
    np.testing.assert_array_equal(colors[0, 1], reds(weights[0, 0] / 2))


def test_weights_are_drawn_on_a_scale_of_0_to_1_and_the_bar_says_so():
    figure = show_heatmaps(softmax_maps(4, 4) / 10, "Keys", "Queries")
    assert {"0", "1"} <= set(texts(figure))
    assert figure.picture.shown.scale.range == (0, 1)


@pytest.mark.parametrize(("side", "note"), [(4, "largest weight 0.23"), (512, ", largest 0.23")])
def test_weights_that_are_all_small_say_how_large_they_are(side, note):
    weights = torch.zeros(side, side)
    weights[1, 2] = 0.23
    assert any(text.endswith(note) for text in texts(show_heatmaps(weights, "K", "Q")))
    weights[3, 3] = 0.25
    assert not any("largest" in text for text in texts(show_heatmaps(weights, "K", "Q")))


def test_a_scale_up_to_the_largest_weight_makes_small_weights_dark():
    weights = torch.tensor([[0.0, 0.05], [0.2, 0.1]])
    figure = show_heatmaps(weights, "K", "Q", scale="largest", mask=torch.eye(2).bool())
    assert figure.picture.shown.scale.range == (0, pytest.approx(0.1))
    assert any("2 masked cells hold weight" in text for text in texts(figure))
    assert show_heatmaps(weights * 0, "K", "Q", scale="largest").picture.shown.scale.range == (0, 1)


def test_logits_are_drawn_on_the_range_that_all_panels_have_together():
    logits = torch.tensor([[[-3.0, 0.0]], [[1.0, 5.0]]])
    figure = show_heatmaps(logits, "Keys", "Queries", figsize=(4, 3))
    assert figure.picture.shown.scale.range == (-3, 5)
    colors = cell_colors(figure)
    np.testing.assert_array_equal(colors[0, 0, 0, 0], reds(0.0))
    np.testing.assert_array_equal(colors[0, 1, 0, 1], reds(1.0))


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("as_array", [False, True])
def test_pooled_signed_values_keep_what_is_farthest_from_zero(masked, as_array):
    values = torch.full((600, 600), 0.1)
    values[7, 9], values[7, 10], values[300, 300] = -4, 2, 3
    values[400:] = -torch.inf
    values[0, 599] = -9
    mask = torch.ones(600, 600, dtype=torch.bool)
    mask[0, 599] = not masked
    given = values.numpy() if as_array else values
    figure = show_heatmaps(given, "K", "Q", mask=mask if masked else None)
    cells = figure.picture.shown.cells
    high, wide = cells.block
    assert f"cell = farthest from 0 of {high}×{wide}" in texts(figure)
    assert cells.values[0, 0, 7 // high, 9 // wide] == -4
    assert cells.values[0, 0, 300 // high, 300 // wide] == 3
    assert cells.values[0, 0, 0, -1] == np.float32(0.1 if masked else -9)
    assert cells.masked[0, 0, -1].all()
    assert figure.picture.shown.scale.range == (-4 if masked else -9, 3)


def test_pooled_logits_keep_the_range_of_the_logits():
    logits = torch.zeros(2000, 2000)
    logits[7, 9] = -4
    assert show_heatmaps(logits, "K", "Q").picture.shown.scale.range == (-4, 0)


def test_each_panel_on_its_own_scale_says_its_own_range():
    weights = torch.tensor([[[0.25, 0.5]], [[0.0, 0.125]]])
    figure = show_heatmaps(weights, "Keys", "Queries", figsize=(5, 3), scale="panel")
    assert {"0.25 – 0.5", "0 – 0.125", "min", "max"} <= set(texts(figure))
    np.testing.assert_array_equal(cell_colors(figure)[0, :, 0], [reds([0.0, 1.0])] * 2)


@pytest.mark.parametrize("value", [5.0, -2.0, 0.0])
def test_a_constant_map_is_drawn(value):
    low, high = show_heatmaps(torch.full((3, 3), value), "K", "Q").picture.shown.scale.range
    assert low <= value <= high
    assert low < high


@pytest.mark.parametrize("scale", ["shared", "panel"])
def test_no_two_ends_of_a_scale_are_written_alike(scale):
    values = torch.tensor([[5.0, 5.0 + 7.6294e-6]])
    written = texts(show_heatmaps(values, "K", "Q", scale=scale, figsize=(4, 4)))
    assert {"shared": "+8e-6", "panel": "5 – +8e-6"}[scale] in written
    assert "5 – 5" not in written
    assert written.count("5") < 2


def test_given_limits_hold():
    figure = show_heatmaps(softmax_maps(4, 4), "K", "Q", vmin=0, vmax=0.25)
    assert figure.picture.shown.scale.range == (0, 0.25)


def test_the_colorbar_runs_from_the_lowest_colour_up_to_the_highest():
    figure = show_heatmaps(softmax_maps(4, 4), "K", "Q")
    image, bar = pixels(figure), sheet(figure).layout.bar
    column = image[bar.top : bar.top + bar.height, bar.left + 1]
    np.testing.assert_array_equal(column[[0, -1]], reds([1.0, 0.0]))


# -- what is not a weight ----------------------------------------------------------------------


def test_masked_cells_look_like_no_value_and_zero_looks_like_zero():
    weights, mask = torch.zeros(6, 6), torch.ones(6, 6).tril().bool()
    figure = show_heatmaps(weights, "Keys", "Queries", mask=mask)
    image, layout = pixels(figure), sheet(figure).layout
    every_red = reds(np.linspace(0, 1, 256))
    for query, key in np.ndindex(6, 6):
        top = layout.tops[0] + query * layout.cell[1]
        left = layout.lefts[0] + key * layout.cell[0]
        cell = image[top : top + layout.cell[1], left : left + layout.cell[0]].reshape(-1, 3)
        colors = {tuple(color) for color in cell}
        if mask[query, key]:
            assert colors == {tuple(reds(0.0))}
        else:
            assert len(colors) == 2  # stripes
            assert not colors & {tuple(color) for color in every_red}


@pytest.mark.parametrize("size", [6, 600])
def test_weight_behind_a_mask_is_drawn_and_counted(size):
    mask = torch.ones(size, size).tril().bool()
    weights = softmax_maps(size, size) * mask
    sound = show_heatmaps(weights, "Keys", "Queries", mask=mask)
    weights[1, size - 1] = 0.9
    figure = show_heatmaps(weights, "Keys", "Queries", mask=mask)
    assert any("1 masked cell holds weight" in text for text in texts(figure))
    assert not any("holds weight" in text for text in texts(sound))
    if size == 6:
        layout = sheet(figure).layout
        left = layout.lefts[0] + 5 * layout.cell[0]
        top = layout.tops[0] + layout.cell[1]
        cell = pixels(figure)[top : top + layout.cell[1], left : left + layout.cell[0]]
        assert {tuple(color) for color in cell.reshape(-1, 3)} == {(0, 0, 0), tuple(reds(0.9))}


def test_scores_behind_a_mask_are_nothing_to_count():
    scores, mask = torch.randn(6, 6), torch.ones(6, 6).tril().bool()
    figure = show_heatmaps(scores, "Keys", "Queries", mask=mask)
    assert not any("masked" in text for text in texts(figure))


@pytest.mark.parametrize(
    "cmap",
    ["tab10", "Set3", "viridis", "RdBu", "Paired", pyplot.cm.Reds, ListedColormap(["w", "r", "k"]),
     LinearSegmentedColormap.from_list("own", ["w", "b"], N=1000)],
    ids=lambda cmap: getattr(cmap, "name", cmap),
)  # fmt: skip
def test_any_colormap_or_its_name_gives_a_value_the_colour_that_matplotlib_gives_it(cmap):
    values = np.linspace(0.01, 0.99, 50).astype(np.float32).reshape(5, 10)
    figure = show_heatmaps(values, "Keys", "Queries", cmap=cmap)
    colormap = matplotlib.colormaps[cmap] if isinstance(cmap, str) else cmap
    oracle = np.array(colormap(values, bytes=True), np.int16)[..., :3]
    # Of 1000 colours, 256 are drawn.
    assert np.abs(cell_colors(figure)[0, 0] - oracle).max() <= (colormap.N > 256)


def test_the_largest_numbers_there_are_keep_their_order():
    limits = torch.finfo(torch.float32)
    for given in (torch.tensor([[limits.min, 0.0, limits.max]]), np.array([[-1e39, 0.0, 1e300]])):
        colors = cell_colors(show_heatmaps(given, "Keys", "Queries"))[0, 0, 0]
        assert colors[0].sum() > colors[2].sum()
    tiny = np.array([[1e-42, 0], [0, 5e-42]], np.float32)
    colors = cell_colors(show_heatmaps(tiny, "Keys", "Queries", scale="panel", figsize=(4, 4)))
    assert len({tuple(color) for color in colors.reshape(-1, 3)}) == 3


def test_what_is_far_beyond_the_scale_is_drawn_without_a_warning():
    values = torch.tensor([[1e37, 1.0], [0.5, 0.25]])
    mask = torch.tensor([[False, True], [True, True]])
    figure = show_heatmaps(values, "Keys", "Queries", mask=mask)
    np.testing.assert_array_equal(cell_colors(figure)[0, 0, 1], reds([0.5, 0.25]))


def test_nan_is_drawn_in_a_colour_of_its_own_and_counted():
    weights = softmax_maps(6, 6)
    weights[2, 3] = weights[4, 4] = torch.nan
    figure = show_heatmaps(weights, "Keys", "Queries")
    colors = cell_colors(figure)[0, 0]
    red, green, blue = colors[2, 3].astype(int)
    assert blue > green > red
    assert "NaN in 2 cells (blue)" in texts(figure)


@pytest.mark.parametrize("value", [np.inf, 1e300])
def test_infinite_and_very_large_values_are_counted_as_nan_is(value):
    weights = np.eye(4) / 2
    weights[0, 1] = weights[2, 3] = value
    written = texts(show_heatmaps(weights, "K", "Q"))
    assert "inf or above 3e38 in 2 cells (darkest)" in written


def test_infinite_values_take_the_ends_of_the_scale():
    logits = torch.tensor([[1.0, 2.0], [torch.inf, 3.0]])
    colors = cell_colors(show_heatmaps(logits, "K", "Q"))[0, 0]
    np.testing.assert_array_equal(colors[1, 0], reds(1.0))
    np.testing.assert_array_equal(colors[0, 0], reds(0.0))


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_a_map_without_any_finite_value_is_drawn(value):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert pixels(show_heatmaps(torch.full((3, 3), value), "K", "Q")).std() > 0
        assert pixels(show_heatmaps(torch.full((3, 3), value), "K", "Q", scale="panel")).any()


# -- pooling -----------------------------------------------------------------------------------


def test_a_single_weight_in_4096_x_4096_stays_visible_and_the_figure_says_it_is_pooled():
    weights = torch.zeros(4096, 4096)
    weights[1234, 3000] = 1
    figure = show_heatmaps(weights, "Keys", "Queries")
    colors = cell_colors(figure)[0, 0]
    dark = np.argwhere((colors == reds(1.0)).all(-1)).tolist()
    high, wide = figure.picture.shown.cells.block
    assert dark == [[1234 // high, 3000 // wide]]
    assert f"cell = max of {high}×{wide} weights" in texts(figure)


def test_a_picture_saved_smaller_is_pooled_anew_and_one_saved_larger_is_not():
    weights = torch.zeros(100, 100)
    weights[31, 77] = 1
    figure = show_heatmaps(weights, "Keys", "Queries")
    small = pixels(figure, dpi=40)
    assert (small == reds(1.0)).all(-1).any()
    assert any("max of" in text for text in texts(figure))
    large = pixels(figure, dpi=300)
    assert (large == reds(1.0)).all(-1).any()
    assert not any("max of" in text for text in texts(figure))


# -- texts -------------------------------------------------------------------------------------


CASES = {
    "default": (softmax_maps(1, 1, 10, 10), {}),
    "tiny": (softmax_maps(1, 1, 10, 10), {"figsize": (0.9, 0.9)}),
    "grid": (softmax_maps(3, 4, 6, 6), {"figsize": (5, 4), "titles": list("abcd"),
                                        "row_titles": list("xyz"), "title": "A title"}),
    "long names": (softmax_maps(1, 1, 9, 9), {"title": "a long title " * 9,
                                              "titles": ["a long column title " * 5]}),
    "tokens": (softmax_maps(1, 2, 9, 9), {"key_labels": ["antidisestablishment"] * 9,
                                          "query_labels": ["\u4e2d\u6587$x$"] * 9}),
    "many": (softmax_maps(8, 8, 90, 90), {"titles": [f"head {i}" for i in range(8)]}),
    "long queries": (softmax_maps(4, 4), {"query_labels": ["a very very very long label"] * 4}),
    "long queries, natural": (softmax_maps(4, 4), {"query_labels": ["a very long label"] * 4,
                                                   "figsize": None}),
    "panel scales": (softmax_maps(2, 2, 5, 5), {"scale": "panel", "figsize": (5, 5)}),
    "logits": (softmax_maps(5, 5) * 12345 - 6000, {}),
    "row": (softmax_maps(1, 3000), {}),
    "natural": (softmax_maps(2, 2, 5, 5), {"figsize": None, "numbers": True}),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_no_text_is_cut_off_and_none_overlaps_another(case):
    weights, options = CASES[case]
    figure = show_heatmaps(weights, "Keys of the map", "Queries", **options)
    assert_no_text_is_cut_off_or_overlaps(figure)


def test_tokens_of_any_script_are_drawn_without_a_warning():
    tokens = ["[CLS]", "$x$", "Ġthe", "中文", "مرحبا", "🙂", "a\nb", "\x00", "भारत", "x" * 200]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        figure = show_heatmaps(
            softmax_maps(10, 10), "K", "Q", figsize=None, key_labels=tokens, query_labels=tokens
        )
        pixels(figure)
    assert {"[CLS]", "$x$", "Ġthe", r"a\nb", r"\x00"} <= set(texts(figure))
    assert not any(text.get_parse_math() for text in figure.findobj(Text))


def test_numbers_are_written_into_their_cells_in_a_readable_colour():
    weights = torch.tensor([[1.0, 0.0], [0.25, 0.75]])
    figure = show_heatmaps(weights, "K", "Q", figsize=None, numbers=".1f")
    numbers = {t.get_text(): t.get_color() for t in figure.findobj(Text) if "." in t.get_text()}
    assert numbers["1.0"] == "white"
    assert numbers["0.0"] == "black"
    assert len(numbers) >= 4


def test_numbers_for_millions_of_cells_are_refused():
    with pytest.raises(ValueError, match=r"numbers: got True for 4000000 cells; .*10000 cells"):
        show_heatmaps(torch.rand(2000, 2000), "K", "Q", figsize=None, numbers=True)


@pytest.mark.parametrize("side", [8, 40, 300])
def test_a_small_figure_has_panels_of_about_48_pixels(side):
    figure = show_heatmaps(softmax_maps(3, 5, side, side), "K", "Q", figsize="small")
    assert all(40 <= pixels <= 52 for pixels in sheet(figure).layout.panel)


def test_a_natural_size_has_room_for_every_range():
    figure = show_heatmaps(-torch.rand(3, 3, 2, 2) * 123456, "K", "Q", figsize=None, scale="panel")
    assert sum(" – " in text for text in texts(figure)) == 9


@pytest.mark.parametrize("style", ["dark_background", {"savefig.facecolor": "black"}])
def test_a_dark_style_does_not_hide_the_texts(style):
    with pyplot.style.context(style):
        image = pixels(show_heatmaps(softmax_maps(4, 4), "Keys", "Queries", title="T"))
    plain = pixels(show_heatmaps(softmax_maps(4, 4), "Keys", "Queries", title="T"))
    assert tuple(image[0, 0]) == (255, 255, 255)
    np.testing.assert_array_equal(image, plain)


def test_a_title_of_a_novel_is_cut_in_no_time():
    long = "x" * 200_000
    (title,) = (
        t for t in texts(show_heatmaps(softmax_maps(4, 4), "K", "Q", title=long)) if "xx" in t
    )
    assert len(title) < 100


def test_numbers_that_have_no_room_are_refused_with_what_to_do():
    with pytest.raises(ValueError, match=r"figsize: got .*no room for numbers.*or None"):
        show_heatmaps(softmax_maps(50, 50), "K", "Q", figsize=(2.5, 2.5), numbers=True)


# -- differences -------------------------------------------------------------------------------


@pytest.mark.parametrize("as_array", [False, True])
def test_a_difference_shows_the_panel_that_differs_most_and_where(as_array):
    one = softmax_maps(2, 3, 6, 6)
    other = one.clone()
    other[0, 0, 1, 1] += 0.2
    other[1, 2, 4, 5] -= 0.3 - 0.3 * one[1, 2, 4, 5]
    figure = show_difference(
        one.numpy() if as_array else one.double(), other, key_labels=list("abcdef")
    )
    shown = figure.picture.shown
    expected = torch.stack([one[1, 2], other[1, 2], (one - other)[1, 2].abs()])[None]
    np.testing.assert_allclose(shown.cells.values, expected, atol=1e-7)
    assert shown.highlight == [(0, panel, 4, 5) for panel in range(3)]
    assert {"expected", "actual", "difference", "a"} <= set(texts(figure))
    worst = expected[0, 2].max()
    title = f"panel [1, 2]: largest difference {worst:.2g} at query 4, key 5"
    assert title in texts(figure)


def test_equal_maps_have_no_difference_and_masked_weights_are_not_compared():
    one, mask = softmax_maps(5, 5), torch.ones(5, 5).tril().bool()
    other = one.clone()
    other[0, 4] = 0.9
    scores = one.masked_fill(~mask, -torch.inf)
    for pair, options in (((one, other), {"mask": mask}), ((scores, scores), {})):
        figure = show_difference(*pair, **options)
        assert "no difference" in texts(figure)
        assert not figure.picture.shown.highlight
        assert not any("NaN" in text for text in texts(figure))
    largest = np.finfo(np.float64).max
    figure = show_difference(np.array([[largest, 1.0]]), np.array([[-largest, 1.0]]))
    assert "largest difference inf at query 0, key 0" in texts(figure)
    other[2, 2] = torch.nan
    figure = show_difference(one, other)
    assert "largest difference inf at query 2, key 2" in texts(figure)


@pytest.mark.parametrize("change", [1e-4, 0.3])
def test_a_difference_is_drawn_dark_however_small_and_the_maps_share_a_scale(change):
    one = softmax_maps(6, 6) / 2
    other = one.clone()
    other[2, 3] += change
    figure = show_difference(one, other)
    colors = cell_colors(figure)[0]
    np.testing.assert_array_equal(colors[2, 2, 3], reds(1.0))
    largest = max(one.max(), other.max())
    np.testing.assert_array_equal(colors[:2], reds(torch.stack([one, other]).double() / largest))
    assert texts(figure).count(f"0 – {largest:.3g}") == 2
    assert f"0 – {change:.3g}" in texts(figure)
    shared = show_difference(one, other, scale="shared")
    np.testing.assert_array_equal(cell_colors(shared)[0, 2, 2, 3], reds(change))
    limited = show_difference(one, other, vmin=0.1, vmax=0.2).picture.shown.scale
    assert limited.low[0, :2].tolist() == [0.1, 0.1]
    assert limited.high[0, :2].tolist() == [0.2, 0.2]


def test_a_difference_in_a_subfigure_is_that_of_a_figure_of_its_own():
    host = Figure(figsize=(6, 3))
    own = show_difference(softmax_maps(4, 4), softmax_maps(4, 4, seed=1), ax=host.subfigures())
    np.testing.assert_array_equal(pixels(host), pixels(own))


def test_a_weight_behind_a_mask_is_seen_beside_its_difference():
    one, mask = torch.eye(4), torch.ones(4, 4).tril().bool()
    other = one.clone()
    other[0, 3], other[3, 3] = 0.5, 0.25
    figure = show_difference(one, other, mask=mask)
    assert "1 masked cell holds weight" in texts(figure)
    assert "largest difference 0.75 at query 3, key 3" in texts(figure)


@pytest.mark.parametrize("size", [None, "small"])
def test_a_size_that_fits_has_room_for_the_title(size):
    title = "12 of 4096 rows do not sum to 1, the worst of them row 17"
    figure = show_heatmaps(softmax_maps(3, 3), "Keys", "Queries", title=title, figsize=size)
    (text,) = (t for t in figure.findobj(Text) if t.get_text() == title)
    assert text.get_fontsize() == 10
    assert_no_text_is_cut_off_or_overlaps(figure)
    novel = show_heatmaps(softmax_maps(3, 3), "Keys", "Queries", title=title * 99, figsize=size)
    assert novel.get_size_inches()[0] < 9


def test_maps_of_different_shapes_have_no_difference_to_show():
    with pytest.raises(
        ValueError, match=r"actual: got shape \(1, 1, 4, 3\); accepted is \(1, 1, 4, 4\)"
    ):
        show_difference(softmax_maps(4, 4), softmax_maps(4, 3))


# -- highlights --------------------------------------------------------------------------------


def test_a_highlight_outlines_its_cell_and_leaves_its_colour():
    weights = softmax_maps(2, 2, 6, 6)
    options = {"figsize": (5, 5)}
    plain = show_heatmaps(weights, "K", "Q", **options)
    marked = show_heatmaps(weights, "K", "Q", highlight=[(1, 0, 2, 3)], **options)
    np.testing.assert_array_equal(cell_colors(plain), cell_colors(marked))
    layout = sheet(marked).layout
    changed = np.argwhere((pixels(plain) != pixels(marked)).any(-1))
    top = layout.tops[1] + 2 * layout.cell[1]
    left = layout.lefts[0] + 3 * layout.cell[0]
    assert changed.min(0).tolist() == [top - 3, left - 3]
    assert changed.max(0).tolist() == [top + layout.cell[1] + 2, left + layout.cell[0] + 2]


def test_a_highlight_without_a_key_outlines_the_whole_query():
    weights = softmax_maps(6, 6)
    plain, marked = (
        show_heatmaps(weights, "K", "Q", highlight=places) for places in ([], [(0, 0, -1)])
    )
    layout = sheet(marked).layout
    changed = np.argwhere((pixels(plain) != pixels(marked)).any(-1))
    assert np.ptp(changed[:, 1]) == layout.panel[0] + 5
    assert changed[:, 0].max() == layout.tops[0] + layout.panel[1] + 2


# -- what people do with a figure --------------------------------------------------------------


def mark(axes, key, query, size=1):
    axes.plot([key], [query], "s", color="lime", markersize=size, markeredgewidth=0)


def is_lime(image):
    return (image == (0, 255, 0)).all(-1)


@pytest.mark.parametrize("side", [6, 600])
def test_a_point_of_an_axes_lies_on_its_key_and_query(side):
    figure = show_heatmaps(softmax_maps(2, 3, side, side), "K", "Q", figsize=(6, 4))
    assert len(figure.axes) == 6
    key, query = side // 2, side - 1
    mark(figure.axes[4], key, query, 3)
    for dpi in (100, 150, 50):
        down, across = np.argwhere(is_lime(pixels(figure, dpi=dpi))).mean(0)
        layout = figure.picture.prepare((6 * dpi, 4 * dpi), dpi).layout
        high, wide = np.multiply(layout.block, figure.picture.shown.cells.block)
        left = layout.lefts[1] + (key + 0.5) / wide * layout.cell[0]
        top = layout.tops[1] + (query + 0.5) / high * layout.cell[1]
        assert (across, down) == (pytest.approx(left, abs=1.5), pytest.approx(top, abs=1.5))


def test_the_axes_are_invisible_and_made_when_they_are_asked_for():
    figure = show_heatmaps(softmax_maps(2, 2, 5, 5), "K", "Q", figsize=(5, 5))
    before = pixels(figure)
    tight = pixels(figure, bbox_inches="tight")
    assert not vars(figure)["_localaxes"]
    first = figure.gca()
    assert vars(figure)["_localaxes"] == [first]
    assert first is figure.axes[0]
    assert figure.get_axes() == figure.axes
    np.testing.assert_array_equal(pixels(figure), before)
    np.testing.assert_array_equal(pixels(figure, bbox_inches="tight"), tight)
    figure.delaxes(figure.axes[0])
    assert len(figure.axes) == 3


def test_axes_of_the_user_stay_current_and_come_after_those_of_the_panels():
    figure = show_heatmaps(softmax_maps(2, 2, 5, 5), "K", "Q")
    own = figure.add_axes((0, 0, 0.1, 0.1))
    assert figure.gca() is own
    assert figure.axes[4] is own
    assert figure.gca() is own
    assert len(figure.axes) == 5


def test_an_axes_that_is_made_visible_has_ticks_as_any_other():
    axes = show_heatmaps(softmax_maps(2, 2, 5, 5), "K", "Q").axes[1]
    axes.set_axis_on()
    axes.set_xticks([0, 4], ["first", "last"])
    axes.tick_params(axis="x", rotation=90, labelsize=5)
    assert [label.get_text() for label in axes.get_xticklabels()] == ["first", "last"]
    assert {label.get_rotation() for label in axes.get_xticklabels()} == {90}


@pytest.mark.parametrize("figsize", [(5, 5), None])
def test_titles_of_matplotlib_have_lines_of_their_own(figsize):
    figure = show_heatmaps(
        softmax_maps(2, 2, 7, 7), "K", "Q", ["a", "b"], figsize, title="given", scale="panel"
    )
    cell = sheet(figure).layout.cell
    figure.suptitle("All", color="blue")
    figure.axes[0].set_title("upper")
    figure.axes[1].set_title("left", loc="left", size=6)
    figure.axes[3].set_title("lower")
    figure.tight_layout()
    assert "given" not in texts(figure)
    assert {"All", "upper", "left", "lower", "a", "b"} <= set(texts(figure))
    assert_no_text_is_cut_off_or_overlaps(figure)
    if figsize is None:
        assert sheet(figure).layout.cell == cell


def test_a_picture_fills_an_axes_or_a_subfigure_of_another_figure():
    weights = softmax_maps(6, 6)
    host = Figure(figsize=(8, 4))
    left, right = host.subfigures(1, 2)
    own = show_heatmaps(weights, "K", "Q", ax=right)
    np.testing.assert_array_equal(pixels(host)[:, 400:], pixels(own))
    axes = left.add_axes((0.25, 0.25, 0.75, 0.75))
    own = show_heatmaps(weights, "K", "Q", ax=axes)
    np.testing.assert_array_equal(pixels(host)[:300, 100:400], pixels(own))
    with pytest.raises(TypeError, match="colorbar: got 'no'; accepted is True or False"):
        show_heatmaps(torch.eye(2), "k", "q", colorbar="no")
    with pytest.raises(TypeError, match="ax: got 3; accepted is an Axes or a SubFigure"):
        show_heatmaps(weights, "K", "Q", ax=3)


def test_a_black_background_has_white_texts_and_numbers_stay_as_they_are():
    figure = show_heatmaps(torch.eye(2), "Keys", "Queries", figsize=None, numbers=True)
    dark, plain = pixels(figure, facecolor="black"), pixels(figure)
    panel = sheet(figure).layout.area
    below = np.s_[panel.top + panel.height + 8 :]
    assert (dark[below].max(), plain[below].min()) == (255, 0)
    inside = np.s_[panel.top : panel.top + panel.height, panel.left : panel.left + panel.width]
    np.testing.assert_array_equal(dark[inside], plain[inside])
    figure.set_facecolor("navy")
    assert pixels(figure)[below].max() == 255


def test_texts_that_the_user_adds_are_seen_on_any_background_unless_they_have_a_colour():
    figure = show_heatmaps(softmax_maps(2, 2, 7, 7), "K", "Q", figsize=(5, 5))
    plain = [
        figure.suptitle("All"), figure.text(0.01, 0.01, "below"),
        figure.axes[0].set_title("upper"), figure.axes[3].set_title("lower", loc="left"),
    ]  # fmt: skip
    area = sheet(figure).layout.area
    given = [
        (figure.text(0.5, 0.01, "red", color="red"), "red"),
        (figure.text(0.9, 0.01, "black", c="black"), "black"),
        (figure.axes[1].set_title("blue", color="blue"), "blue"),
        (figure.text((area.left + 9) / 500, 1 - (area.top + 20) / 500, "on a panel"), "black"),
    ]
    later = figure.text(0.2, 0.01, "later")
    for color, ink in (("black", "white"), ("white", "black"), ("navy", "white")):
        pixels(figure, facecolor=color)
        assert [text.get_color() for text in plain] == [ink] * 4
        assert [text.get_color() for text, _ in given] == [own for _, own in given]
        later.set_color("green")
        assert later.get_color() == "green"
    with pyplot.style.context("dark_background"):
        figure = show_heatmaps(softmax_maps(4, 4), "K", "Q")
        title = figure.suptitle("All")
        pixels(figure)
    assert title.get_color() == "black"


@pytest.mark.parametrize("title", [None, "The picture's own"])
def test_a_title_of_a_subfigure_stands_above_the_picture(title):
    host = Figure(figsize=(8, 4))
    left, right = host.subfigures(1, 2)
    for part in (left, right):
        show_heatmaps(softmax_maps(6, 6), "K", "Q", ["column"], title=title, ax=part)
    pixels(host)
    before = sheet_of(right).layout
    text = right.suptitle("A title\nof two lines", fontsize=15)
    pixels(host)
    assert sheet_of(left).layout == before
    after = sheet_of(right).layout
    assert after.size[1] < before.size[1]
    assert text.get_window_extent().y0 >= after.size[1] - 1
    low = left.suptitle("below", y=0.02, va="bottom")
    pixels(host)
    assert sheet_of(left).layout == before
    assert low.get_text() == "below"


def sheet_of(part):
    """What the only picture of a subfigure was drawn as."""
    (picture,) = part.artists
    return picture.sheet_for(None)[0]


def test_a_canvas_gives_the_pixels_that_are_saved():
    figure = show_heatmaps(softmax_maps(4, 4), "Keys", "Queries")
    canvas: Any = figure.canvas
    canvas.draw()
    drawn = np.asarray(canvas.buffer_rgba())[..., :3]
    np.testing.assert_array_equal(drawn, pixels(figure))
    file = io.BytesIO()
    canvas.print_png(file)
    np.testing.assert_array_equal(np.asarray(Image.open(file).convert("RGB")), drawn)


# -- formats -----------------------------------------------------------------------------------


def test_a_notebook_shows_svg_whose_image_is_not_smoothed():
    svg = show_heatmaps(softmax_maps(4, 4), "Keys", "Queries")._repr_svg_()
    assert svg.lstrip().startswith("<?xml")
    assert "image-rendering:pixelated" in svg.replace(" ", "")


def test_a_notebook_without_svg_shows_a_png():
    png = show_heatmaps(softmax_maps(4, 4), "Keys", "Queries")._repr_png_()
    assert png.startswith(b"\x89PNG")


@pytest.mark.parametrize("kind", ["png", "svg", "pdf"])
def test_a_figure_is_saved_in_every_format_at_its_size(kind, tmp_path):
    figure = show_heatmaps(softmax_maps(4, 4), "Keys", "Queries", figsize=(3.3, 2.7))
    figure.savefig(tmp_path / f"map.{kind}")
    assert (tmp_path / f"map.{kind}").stat().st_size > 1000
    if kind == "png":
        with Image.open(tmp_path / "map.png") as image:
            assert image.size == (330, 270)


def test_a_tight_bounding_box_moves_the_picture_but_changes_no_cell():
    figure = show_heatmaps(softmax_maps(4, 4), "Keys", "Queries")
    whole = pixels(figure)
    tight = pixels(figure, bbox_inches="tight", pad_inches=0.1)
    layout = sheet(figure).layout
    top, left = layout.tops[0], layout.lefts[0]
    panel = whole[top : top + layout.panel[1], left : left + layout.panel[0]]
    shifted = tight[top + 10 : top + 10 + panel.shape[0], left + 10 : left + 10 + panel.shape[1]]
    np.testing.assert_array_equal(shifted, panel)


# `python benchmarks/matplotlib_versions.py` shows the same under matplotlib 3.8, 3.9 and 3.10.
PANELS = {
    "identity": "7b10e6565931",
    "masked grid": "00b46fec4e66",
    "pooled": "d0a79297900b",
    "many heads": "b6943d91fbc0",
    "tokens": "26f95ec1882e",
    "panel scales": "2217c294df39",
    "a difference": "fbd31ac483c8",
    "a query of all layers": "950a964e8140",
    "small panels": "c4792b417953",
    "into an axes": "843af0901f0c",
    "on black": "82b8960e0801",
    "titles": "519ae1466be5",
    "small weights": "8651be58d52b",
    "largest weight": "d88b303f6e9b",
    "signed": "739c99133207",
    "signed and pooled": "e07781a7d0eb",
    "not a number": "cf46224023d5",
    "outlined": "670fb712b17f",
}


def test_panels_are_the_same_bytes_under_every_matplotlib():
    assert {name: panel_hash(figure) for name, figure in figures().items()} == PANELS


# -- misuse ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"titles": ["a", "b"]}, r"^titles: got 2 text\(s\); .*columns: 1"),
        ({"row_titles": ["a", "b"]}, "row_titles: got 2"),
        ({"key_labels": list("abc")}, "key_labels: got 3.*keys: 4"),
        ({"query_labels": "abcde"}, "query_labels: got 1.*queries: 4"),
        ({"scale": "row"}, "scale: got 'row'; accepted is one of 'shared', 'largest', 'panel'"),
        ({"scale": "panel", "vmin": 0}, "belong to scale='shared'"),
        ({"vmin": 1, "vmax": 0}, "vmin, vmax: got 1 and 0; accepted is finite"),
        ({"vmin": "a"}, "vmin, vmax: got 'a' and None; accepted is numbers, or None"),
        ({"vmax": [1, 2]}, "vmin, vmax: got None and .*; accepted is numbers, or None"),
        ({"figsize": "large"}, "figsize: got 'large'; accepted is .*, or 'small'"),
        ({"cmap": "nope"}, "cmap: got 'nope'; accepted is a Colormap, or"),
        ({"cmap": None}, "cmap: got None"),
        ({"dpi": 0}, "dpi: got 0"),
        ({"dpi": "a"}, "dpi: got str; accepted is a number"),
        ({"figsize": 3}, r"figsize: got 3; accepted is \(width, height\)"),
        ({"highlight": 3}, "highlight: got 3; accepted is a list"),
        ({"titles": 3}, "titles: got 3; accepted is a list"),
        ({"dpi": float("nan")}, "dpi: got nan"),
        ({"figsize": (1000, 1000)}, "100000 x 100000 pixels"),
        ({"figsize": (1e308, 1)}, r"figsize: got \(1e\+308, 1\)"),
        ({"cmap": ["Reds"]}, r"cmap: got \['Reds'\]; accepted is a Colormap, or"),
        ({"numbers": ".2q"}, "accepted is True, False or a format"),
        ({"highlight": [(0, 0, 9, 0)]}, r"highlight: got \(0, 0, 9, 0\)"),
        ({"highlight": [(0, 0)]}, r"within the shape \(1, 1, 4, 4\)"),
        ({"figsize": (0.3, 0.3)}, "accepted is at least"),
        ({"figsize": (-1, 2)}, "figsize: got"),
        ({"figsize": (1, 2, 3)}, "figsize: got"),
    ],
)
def test_misuse_says_what_was_given_and_what_is_accepted(options, message):
    with pytest.raises((ValueError, TypeError), match=message):
        show_heatmaps(softmax_maps(4, 4), "Keys", "Queries", **options)


@pytest.mark.parametrize("shape", [(2, 2, 8, 8), (1, 1, 3000, 3000)])
def test_an_accelerator_tensor_gives_the_same_pixels_as_on_the_cpu(shape, accelerator):
    weights = softmax_maps(*shape)
    mask = torch.ones(shape[-2:]).tril().bool()
    figures = [
        show_heatmaps(w, "K", "Q", mask=m)
        for w, m in (
            (weights, mask),
            (weights.to(accelerator), mask.to(accelerator)),
            (weights.to(accelerator), mask),
        )
    ]
    for figure in figures[1:]:
        np.testing.assert_array_equal(pixels(figure), pixels(figures[0]))
