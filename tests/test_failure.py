"""What a failure carries: its fields, its text, and a picture that pytest leaves behind."""

import copy
import math
import pickle

import numpy as np
import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

from pytest_attnheat import (
    Failure,
    LazyWeights,
    assert_causal,
    assert_doubly_stochastic,
    assert_masked,
    assert_reproduces_output,
    assert_row_stochastic,
    capture_attention,
    read_heatmaps,
)
from pytest_attnheat.assertions.claims import first_broken, of_rows
from pytest_attnheat.plugin.checking import FailedCheckError


def weights_with_broken_rows(*rows):
    weights = torch.full((2, 3, 6, 4), 0.25)
    for row in rows:
        weights[1, 2, row] = 0.1 * (row + 3) / 4
    return weights


def raised_by(assertion, *args, **kwargs):
    with pytest.raises(Failure) as caught:
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
    figure = raised_by(assert_row_stochastic, weights).draw()
    shown = figure.picture.shown
    np.testing.assert_array_equal(shown.cells.values[0, 0], oracle)
    assert set(shown.highlight) == {(0, 0, 2), (0, 0, 4)}
    assert shown.design.words.title == "2 of 36 rows do not sum to 1"


def test_the_mask_is_in_the_picture():
    mask = torch.ones(1, 1, 6, 4, dtype=torch.bool)
    mask[..., 3] = False
    error = raised_by(assert_row_stochastic, weights_with_broken_rows(1), mask=mask)
    masked = error.draw().picture.shown.cells.masked[0, 0]
    np.testing.assert_array_equal(masked, ~mask[0, 0].numpy())


def test_broken_columns_are_drawn_as_rows_of_keys():
    weights = torch.eye(4)
    weights[0] = torch.tensor([0.5, 0.5, 0, 0])
    words = raised_by(assert_doubly_stochastic, weights).draw().picture.shown.design.words
    assert (words.xlabel, words.ylabel) == ("Queries", "Keys")


def test_many_broken_rows_of_a_large_map_are_drawn_in_bounded_number():
    figure = raised_by(assert_row_stochastic, torch.rand(1, 1, 3000, 3000)).draw()
    assert len(figure.picture.shown.highlight) == 32


def test_a_large_map_of_small_weights_is_drawn_up_to_the_largest():
    weights = torch.full((400, 400), 1 / 400)
    weights[7, 9] = 0.02
    figure = raised_by(assert_row_stochastic, weights).draw()
    assert figure.picture.shown.scale.range == pytest.approx((0, 0.02))


def test_of_a_long_map_the_neighbourhood_of_the_worst_weight_is_drawn():
    query, key = torch.randn(2, 1, 1, 9000, 4, generator=torch.Generator().manual_seed(0))
    error = raised_by(assert_causal, LazyWeights(query, key, window=(5, 0)), window=4)
    row, column = error.worst.index[-2:]
    shown = error.draw().picture.shown
    assert shown.cells.values.shape == (1, 1, 64, 64)
    words = shown.design.words
    at = words.query_labels.index(str(row)), words.key_labels.index(str(column))
    assert shown.cells.values[0, 0][at] == pytest.approx(error.worst.value)
    assert shown.cells.masked[0, 0][at]
    assert shown.highlight[0] == (0, 0, at[0])
    first = words.query_labels[0]
    assert f"not zero; shown: queries {first}..{int(first) + 63} of 9000, keys " in words.title


def test_of_a_large_map_whole_rows_are_drawn_where_a_row_is_worst():
    weights = torch.eye(4100)
    weights[4000, 7] = 0.5
    shown = raised_by(assert_row_stochastic, weights).draw().picture.shown
    assert shown.highlight == [(0, 0, shown.design.words.query_labels.index("4000"))]
    assert shown.design.words.title.endswith("; shown: queries 3968..4031 of 4100")
    tall, wide = shown.cells.block
    assert shown.cells.values[0, 0, 32 // tall, 7 // wide] == 0.5


def test_the_search_for_what_is_broken_ends_where_it_is_found():
    parts = iter([1, 2, 3])
    off = torch.ones(())
    claim = of_rows(
        "are not 0", "sum", lambda part: off, "is", regards=lambda part: torch.tensor(part == 1)
    )
    assert first_broken(parts, [claim]) is claim
    assert list(parts) == [2, 3]


def test_the_fields_of_a_claim_about_rows():
    weights = torch.full((1, 2, 5, 5), 0.2)
    weights[0, 1, 2], weights[0, 1, 4] = 0.25, 0.3
    error = raised_by(assert_row_stochastic, weights)
    assert (error.assertion, error.claim) == ("assert_row_stochastic", "rows do not sum to 1")
    assert (error.broken, error.of) == (2, 10)
    assert error.worst.index == (0, 1, 4)
    assert error.worst.value == pytest.approx(1.5)
    assert error.worst.text == "weights[0, 1, 4, :] sums to 1.5 (off by 5.0e-01; allowed 1.0e-05)"
    assert error.first is None  # a claim about rows names the worst alone
    assert error.tolerance == 1e-5
    tensor = error.tensor
    assert (tensor.dtype, tensor.shape, tensor.device) == ("float32", (1, 2, 5, 5), "cpu")
    assert error.picture.splitlines()[0].startswith("head [0, 1]")
    assert error.drawn == "heatmap of the broken rows"
    assert (error.layer, error.repeat, error.assumed) == (None, None, None)


def test_the_cause_is_a_field():
    error = raised_by(assert_row_stochastic, torch.randn(1, 2, 5, 5).softmax(-2))
    assert error.cause == "every column sums to 1: softmax over the query axis (dim=-2)?"
    assert f"  cause    {error.cause}\n" in str(error)


def test_a_column_is_named_by_its_own_number():
    weights = torch.eye(4).repeat(2, 1, 1)
    weights[1, 2] = torch.tensor([0.0, 0.0, 0.4, 0.6])
    error = raised_by(assert_doubly_stochastic, weights)
    assert (error.broken, error.of, error.tensor.shape) == (2, 8, (2, 4, 4))
    assert error.worst.index == (1, 2)
    assert error.worst.value == pytest.approx(0.4)


def test_the_fields_of_a_claim_about_elements():
    weights = torch.eye(4).repeat(1, 2, 1, 1)
    weights[0, 0, 1, 3], weights[0, 1, 0, 2] = 0.125, 0.5
    error = raised_by(assert_causal, weights)
    assert error.claim == "masked weights are not zero"
    assert (error.broken, error.of) == (2, 12)
    assert (error.worst.index, error.worst.value) == ((0, 1, 0, 2), 0.5)
    assert (error.first.index, error.first.value) == ((0, 0, 1, 3), 0.125)
    assert error.tolerance is None
    assert "only in" not in str(error)
    weights[0, 0, 1, 3] = 0
    error = raised_by(assert_causal, weights)
    assert error.first is None


def test_nan_is_a_value_and_the_worst_there_is():
    weights = torch.eye(3)
    weights[0, 2], weights[1, 2] = math.inf, math.nan
    of_rows = raised_by(assert_row_stochastic, weights)
    of_elements = raised_by(assert_masked, weights, torch.eye(3) > 0)
    assert (of_rows.worst.index, of_elements.worst.index) == ((1,), (1, 2))
    assert math.isnan(of_rows.worst.value)
    assert math.isnan(of_elements.worst.value)


def test_the_fields_of_a_claim_about_an_output():
    weights, value = torch.eye(4).repeat(1, 3, 1, 1), torch.arange(24.0).reshape(1, 3, 4, 2)
    output = value.clone()
    output[0, 2, 1, 0], output[0, 0, 3, 1] = 0.5, 7.5
    merged = output.transpose(1, 2).reshape(1, 4, 6)
    error = raised_by(assert_reproduces_output, weights, value, merged)
    assert error.claim == "output elements are not weights @ value"
    assert (error.broken, error.of) == (2, 24)
    assert (error.worst.index, error.worst.value) == ((0, 1, 4), 0.5)
    assert (error.first.index, error.first.value) == ((0, 3, 1), 7.5)
    assert error.cause is None
    assert error.tensor.shape == (1, 4, 6)
    assert 0 < error.tolerance < 1e-3
    assert (error.picture, error.draw) == ("", None)


def test_a_trace_names_the_layer_and_the_text_follows_the_fields():
    inputs = torch.randn(1, 2, 4, 4)
    with capture_attention() as trace:
        scaled_dot_product_attention(inputs, inputs, inputs)
    error = raised_by(assert_causal, trace)
    assert error.layer == "(no module), call 0"
    assert str(error).splitlines()[1] == "  layer    (no module), call 0"
    error.layer, error.repeat = "decoder.3, call 7", "seed=5"
    lines = str(error).splitlines()
    assert lines[1] == "  layer    decoder.3, call 7"
    assert "  repeat   seed=5" in lines
    assert lines[0] == "assert_causal: 12 of 12 masked weights are not zero"


def pickled(error):
    return pickle.loads(pickle.dumps(error))


@pytest.mark.parametrize("again", [copy.copy, copy.deepcopy, pickled])
def test_a_failure_is_copied_and_pickled_with_all_but_what_draws_it(again):
    error = raised_by(assert_row_stochastic, weights_with_broken_rows(2, 4))
    error.layer = "0, call 0"
    error.__notes__ = ["noted"]
    same = again(error)
    assert type(same) is Failure
    assert str(same) == str(error)
    assert same.draw is None
    assert {**vars(same), "draw": error.draw} == vars(error)


@pytest.mark.parametrize("again", [copy.copy, copy.deepcopy, pickled])
def test_a_failed_check_is_copied_and_pickled_too(again):
    error = FailedCheckError("plain", "not so: it attends", "worst ...", draw=None)
    same = again(error)
    assert type(same) is FailedCheckError
    assert (str(same), same.args, vars(same)) == (str(error), error.args, vars(error))


def test_it_is_named_as_users_import_it():
    assert f"{Failure.__module__}.{Failure.__qualname__}" == "pytest_attnheat.Failure"
    assert issubclass(Failure, AssertionError)


FAILING = """
    import torch
    from pytest_attnheat import assert_row_stochastic

    def test_rows():
        assert_row_stochastic(torch.rand(1, 2, 6, 6))

    def test_good():
        assert_row_stochastic(torch.rand(1, 2, 6, 6).softmax(-1))
"""


@pytest.mark.parametrize("workers", [[], ["-n", "1", "-p", "no:hypothesispytest"]])
def test_pytest_leaves_the_picture_and_says_where(pytester, workers):
    pytester.makepyfile(test_a=FAILING)
    result = pytester.runpytest("-W", "error", *workers)
    result.assert_outcomes(passed=1, failed=1)
    path = next((pytester.path / "attn-artifacts").rglob("rows.png"))
    result.stdout.fnmatch_lines(
        [
            "E*pytest_attnheat.Failure: assert_row_stochastic: * rows do not sum to 1",
            "*- heatmap of the broken rows -*",
            str(path),
        ]
    )
    assert read_heatmaps(path).shape == (1, 1, 6, 6)
    assert len(list((pytester.path / "attn-artifacts").rglob("*.png"))) == 1
    pytester.makepyfile(test_a=FAILING.replace("6, 6))", "6, 6).softmax(-1))"))
    pytester.runpytest(*workers)
    assert not path.parent.exists()


def test_a_picture_that_cannot_be_left_does_not_hide_the_message(pytester):
    pytester.makepyfile(test_a=FAILING)
    (pytester.path / "attn-artifacts").write_text("a file is in the way")
    result = pytester.runpytest()
    result.assert_outcomes(passed=1, failed=1)
    result.stdout.fnmatch_lines(["*assert_row_stochastic: * rows do not sum to 1", "not drawn: *"])


def test_any_failure_that_can_draw_is_drawn_and_nothing_else(pytester):
    """Nor does one that cannot end the run."""
    pytester.makepyfile(
        """
        import pytest
        import torch
        from pytest_attnheat import show_heatmaps
        from pytest_attnheat.failure import Failure

        def draw():
            return show_heatmaps(torch.eye(3), "Keys", "Queries")

        def test_drawn():
            raise Failure("mine", "it does not hold", draw=draw, drawn="a picture of mine")

        def broken():
            raise RuntimeError("no ink")

        @pytest.mark.parametrize("draw", [broken, lambda: 3])
        def test_not_drawn(draw):
            raise Failure("mine", "it does not hold", draw=draw)

        def test_plain():
            raise Failure("mine", "it does not hold")

        def test_alike():
            error = ValueError("no failure of ours")
            error.draw = draw
            raise error
        """
    )
    result = pytester.runpytest()
    result.assert_outcomes(failed=5)
    result.stdout.fnmatch_lines(["*Failure: mine: it does not hold", "not drawn: no ink"])
    (path,) = (pytester.path / "attn-artifacts").rglob("*.png")
    assert "test_drawn" in str(path)
    result.stdout.fnmatch_lines(["*- a picture of mine -*", str(path)])
