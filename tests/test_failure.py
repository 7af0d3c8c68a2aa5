"""A failed row assertion brings a picture of its rows, and pytest leaves it behind."""

import numpy as np
import pytest
import torch

from pytest_attnheat import (
    assert_doubly_stochastic,
    assert_row_stochastic,
    read_heatmaps,
)
from pytest_attnheat.assertions.failure import BrokenRowsError


def weights_with_broken_rows(*rows):
    weights = torch.full((2, 3, 6, 4), 0.25)
    for row in rows:
        weights[1, 2, row] = 0.1 * (row + 3) / 4
    return weights


def raised_by(assertion, *args, **kwargs):
    with pytest.raises(BrokenRowsError) as caught:
        assertion(*args, **kwargs)
    return caught.value


@pytest.mark.parametrize("kind", ["torch", "numpy", "flipped numpy", "bfloat16", "requires_grad"])
def test_the_picture_shows_the_worst_map_with_its_broken_rows_outlined(kind):
    weights = weights_with_broken_rows(2, 4)
    oracle = weights[1, 2].numpy().copy()
    if kind == "numpy":
        weights = weights.numpy()
    elif kind == "flipped numpy":
        weights = np.ascontiguousarray(weights.numpy()[..., ::-1])[..., ::-1]
    elif kind == "bfloat16":
        weights = weights.bfloat16()
        oracle = weights[1, 2].float().numpy()
    elif kind == "requires_grad":
        weights.requires_grad_()
    figure = raised_by(assert_row_stochastic, weights).draw_heatmap()
    shown = figure.picture.shown
    np.testing.assert_array_equal(shown.cells.values[0, 0], oracle)
    assert set(shown.highlight) == {(0, 0, 2), (0, 0, 4)}
    assert shown.design.words.title == "2 of 36 rows do not sum to 1"


def test_the_mask_is_in_the_picture():
    mask = torch.ones(1, 1, 6, 4, dtype=torch.bool)
    mask[..., 3] = False
    error = raised_by(assert_row_stochastic, weights_with_broken_rows(1), mask=mask)
    masked = error.draw_heatmap().picture.shown.cells.masked[0, 0]
    np.testing.assert_array_equal(masked, ~mask[0, 0].numpy())


def test_broken_columns_are_drawn_as_rows_of_keys():
    weights = torch.eye(4)
    weights[0] = torch.tensor([0.5, 0.5, 0, 0])
    words = raised_by(assert_doubly_stochastic, weights).draw_heatmap().picture.shown.design.words
    assert (words.xlabel, words.ylabel) == ("Queries", "Keys")


def test_many_broken_rows_of_a_large_map_are_drawn_in_bounded_number():
    figure = raised_by(assert_row_stochastic, torch.rand(1, 1, 3000, 3000)).draw_heatmap()
    assert len(figure.picture.shown.highlight) == 32


FAILING = """
    import torch
    from pytest_attnheat import assert_row_stochastic

    def test_rows():
        assert_row_stochastic(torch.rand(1, 2, 6, 6))

    def test_good():
        assert_row_stochastic(torch.rand(1, 2, 6, 6).softmax(-1))
"""


@pytest.mark.parametrize("workers", [[], ["-n", "1"]])
def test_pytest_leaves_the_picture_and_says_where(pytester, workers):
    pytester.makepyfile(test_a=FAILING)
    result = pytester.runpytest("-W", "error", *workers)
    result.assert_outcomes(passed=1, failed=1)
    path = next((pytester.path / "attn-artifacts").rglob("rows.png"))
    result.stdout.fnmatch_lines(["*- heatmap of the broken rows -*", str(path)])
    assert read_heatmaps(path).shape == (1, 1, 6, 6)
    assert len(list((pytester.path / "attn-artifacts").rglob("*.png"))) == 1


def test_a_picture_that_cannot_be_left_does_not_hide_the_message(pytester):
    pytester.makepyfile(test_a=FAILING)
    (pytester.path / "attn-artifacts").write_text("a file is in the way")
    result = pytester.runpytest()
    result.assert_outcomes(passed=1, failed=1)
    result.stdout.fnmatch_lines(["*assert_row_stochastic: * rows do not sum to 1", "not drawn: *"])


def test_any_failure_that_can_draw_is_drawn_and_nothing_else(pytester):
    pytester.makepyfile(
        """
        import torch
        from pytest_attnheat import show_heatmaps
        from pytest_attnheat.failure import Failure

        def draw():
            return show_heatmaps(torch.eye(3), "Keys", "Queries")

        def test_drawn():
            raise Failure("mine", "it does not hold", draw=draw, drawn="a picture of mine")

        def test_plain():
            raise Failure("mine", "it does not hold")

        def test_alike():
            error = ValueError("no failure of ours")
            error.draw = draw
            raise error
        """
    )
    result = pytester.runpytest()
    result.assert_outcomes(failed=3)
    (path,) = (pytester.path / "attn-artifacts").rglob("*.png")
    assert "test_drawn" in str(path)
    result.stdout.fnmatch_lines(["*- a picture of mine -*", str(path)])
