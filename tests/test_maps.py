"""Maps are read from whatever a user has, and pooled to their largest weight."""

import numpy as np
import pytest
import torch

from pytest_attnheat.heatmaps.maps import Cells, pool, pool_cells, read_maps, smallest
from pytest_attnheat.heatmaps.survey import survey, whole_of


def pooled_by_loops(values, block, mask=None):
    """Take block maxima one by one; a block without any permitted weight is -inf."""
    rows, columns, queries, keys = values.shape
    high, wide = -(-queries // block[0]), -(-keys // block[1])
    result = np.full((rows, columns, high, wide), -np.inf)
    for place in np.ndindex(values.shape):
        if mask is None or mask[place]:
            target = (place[0], place[1], place[2] // block[0], place[3] // block[1])
            value = values[place]
            if np.isnan(value) or np.isnan(result[target]):
                result[target] = np.nan
            else:
                result[target] = max(result[target], value)
    return result


@pytest.mark.parametrize("block", [(1, 1), (2, 2), (3, 5), (1, 4), (7, 9), (100, 100)])
@pytest.mark.parametrize("kind", ["torch", "numpy", "transposed", "expanded", "bfloat16"])
def test_pooling_keeps_the_largest_weight_of_each_block(block, kind):
    values = torch.randn(2, 3, 7, 9, generator=torch.Generator().manual_seed(0))
    if kind == "transposed":
        values = values.permute(1, 0, 3, 2)
    elif kind == "expanded":
        values = values[:1].expand(4, -1, -1, -1)
    elif kind == "bfloat16":
        values = values.bfloat16().requires_grad_()
    given = values.numpy() if kind == "numpy" else values
    cells = pool(read_maps(given), block)
    oracle = pooled_by_loops(values.detach().float().numpy(), block)
    np.testing.assert_array_equal(cells.values, oracle)
    assert not cells.masked.any()


@pytest.mark.parametrize("kind", ["torch", "numpy"])
@pytest.mark.parametrize("block", [(1, 1), (2, 3), (4, 4)])
def test_pooling_leaves_out_masked_weights_and_marks_blocks_without_any_other(kind, block):
    values = torch.randn(1, 2, 6, 8, generator=torch.Generator().manual_seed(1))
    mask = torch.ones(6, 8, dtype=torch.bool).tril(-1)
    given, allowed = (values.numpy(), mask.numpy()) if kind == "numpy" else (values, mask)
    cells = pool(read_maps(given, allowed), block)
    oracle = pooled_by_loops(values.numpy(), block, mask.expand(1, 2, 6, 8).numpy())
    np.testing.assert_array_equal(cells.masked, np.isneginf(oracle))
    np.testing.assert_array_equal(cells.values[~cells.masked], oracle[~cells.masked])
    assert cells.masked.any()


def test_a_masked_map_is_pooled_alike_in_one_piece_and_in_many(monkeypatch):
    values, mask = torch.rand(1, 2, 50, 40), torch.rand(50, 40) > 0.5
    whole = pool(read_maps(values, mask), (4, 3))
    monkeypatch.setattr("pytest_attnheat.heatmaps.maps._CHUNK", 500)
    pieces = pool(read_maps(values, mask), (4, 3))
    np.testing.assert_array_equal(whole.values, pieces.values)
    np.testing.assert_array_equal(whole.masked, pieces.masked)


@pytest.mark.parametrize(
    "dtype",
    [torch.bool, torch.uint8, torch.int64, torch.uint16, torch.uint32, torch.uint64,
     torch.float8_e4m3fn, torch.float8_e5m2],
)  # fmt: skip
@pytest.mark.parametrize("masked", [False, True])
def test_every_real_dtype_is_pooled(dtype, masked):
    values = torch.zeros(50, 40).to(dtype)
    values[31, 17] = 1
    mask = torch.ones(50, 40, dtype=torch.bool) if masked else None
    maps = read_maps(values, mask)
    cells = pool(maps, (10, 10))
    assert np.argwhere(cells.values).tolist() == [[0, 0, 3, 1]]
    assert smallest(maps, cells) == 0


def test_an_expanded_map_takes_no_memory_of_its_own_size():
    maps = read_maps(torch.full((1, 1), 0.5).expand(12_000, 12_000))
    cells = pool(maps, (200, 200))
    assert (cells.values == 0.5).all()
    assert smallest(maps, cells) == 0.5


@pytest.mark.parametrize("block", [(1, 1), (3, 4)])
def test_nan_in_a_block_stays_visible(block):
    values = torch.rand(1, 1, 9, 8)
    values[0, 0, 4, 5] = float("nan")
    cells = pool(read_maps(values), block)
    assert np.isnan(cells.values).sum() == 1
    assert np.isnan(cells.values[0, 0, 4 // block[0], 5 // block[1]])


def test_scores_of_minus_infinity_count_as_masked():
    scores = torch.zeros(1, 1, 4, 4).masked_fill(~torch.ones(4, 4).tril().bool(), -torch.inf)
    cells = pool(read_maps(scores), (1, 1))
    np.testing.assert_array_equal(cells.masked[0, 0], ~np.tril(np.ones((4, 4), bool)))


def test_one_weight_among_millions_of_zeros_survives_pooling():
    weights = torch.zeros(4096, 4096)
    weights[1234, 3000] = 1
    cells = pool(read_maps(weights), (28, 28))
    assert np.argwhere(cells.values).tolist() == [[0, 0, 1234 // 28, 3000 // 28]]


@pytest.mark.parametrize("block", [(1, 1), (2, 2)])
def test_the_smallest_weight_is_found_though_pooling_keeps_only_the_largest(block):
    values = torch.rand(2, 2, 6, 6)
    values[1, 0, 3, 3] = -5
    maps = read_maps(values)
    assert smallest(maps, pool(maps, block)) == -5
    values[0, 0, 0, 0], values[0, 1, 0, 0] = -torch.inf, torch.nan
    maps = read_maps(values)
    assert smallest(maps, pool(maps, block)) == -5
    mask = torch.ones(2, 2, 6, 6, dtype=torch.bool)
    mask[1, 0, 3, 3] = False
    maps = read_maps(values.nan_to_num(0.5, neginf=0.5), mask)
    assert 0 <= smallest(maps, pool(maps, block)) < 1


@pytest.mark.parametrize("signed", [False, True])
def test_cells_pooled_again_are_as_if_pooled_at_once(signed):
    values, mask = torch.randn(2, 1, 24, 18), torch.rand(24, 18) > 0.7
    maps = read_maps(values, mask)
    twice = pool_cells(pool(maps, (2, 3), signed=signed), (3, 2))
    once = pool(maps, (6, 6), signed=signed)
    assert isinstance(twice, Cells)
    assert (twice.block, twice.signed) == (once.block, once.signed)
    np.testing.assert_array_equal(twice.masked, once.masked)
    np.testing.assert_array_equal(twice.values[~twice.masked], once.values[~once.masked])


A = torch.arange(6.0).reshape(2, 3)


@pytest.mark.parametrize(
    ("given", "shape"),
    [
        (A, (1, 1, 2, 3)),
        (A.numpy(), (1, 1, 2, 3)),
        (A.tolist(), (1, 1, 2, 3)),
        (A.bool(), (1, 1, 2, 3)),
        (A.int(), (1, 1, 2, 3)),
        (torch.stack([A] * 4), (1, 4, 2, 3)),
        ([A, A], (1, 2, 2, 3)),
        ([A.numpy(), A.tolist()], (1, 2, 2, 3)),
        ([[A, A, A], [A, A, A]], (2, 3, 2, 3)),
        ([torch.stack([A] * 3)] * 2, (2, 3, 2, 3)),
        ((torch.stack([A] * 3)[None],) * 2, (2, 3, 2, 3)),  # outputs.attentions
        ([[A.tolist()] * 3] * 2, (2, 3, 2, 3)),
        (A.expand(5, 4, 2, 3), (5, 4, 2, 3)),
    ],
)
def test_tensors_arrays_and_nested_lists_are_read(given, shape):
    maps = read_maps(given)
    assert maps.shape == shape
    cells = pool(maps, (1, 1)).values
    oracle = [[0, 1, 1], [1, 1, 1]] if maps.dtype == "bool" else [[0, 1, 2], [3, 4, 5]]
    for row, column in np.ndindex(shape[:2]):
        np.testing.assert_array_equal(cells[row, column], oracle)


@pytest.mark.parametrize(
    ("given", "error", "message"),
    [
        (torch.zeros(3), ValueError, "1 dimension"),
        (torch.zeros(1, 1, 1, 1, 1), ValueError, r"5 dimension.*shape \(1, 1, 1, 1, 1\)"),
        (torch.zeros(0, 3), ValueError, "nothing to show"),
        (torch.zeros(0, 2, 3, 3), ValueError, "nothing to show"),
        (torch.zeros(2, 2, dtype=torch.complex64), TypeError, "complex64"),
        (np.zeros((2, 2), complex), TypeError, "complex128"),
        (np.array([["a"]]), TypeError, "accepted is a tensor or array of real numbers"),
        (np.ma.masked_equal(np.eye(3), 0), TypeError, r"mask=~numpy.ma.getmaskarray"),
        (torch.zeros(2, 2, device="meta"), TypeError, "without dense values"),
        (torch.eye(3).to_sparse(), TypeError, "to_dense"),
        ("weights", TypeError, "got str"),
        (None, TypeError, "got NoneType"),
        ([], ValueError, "empty list"),
        ([A, A[:1]], ValueError, r"\[\(2, 3\), \(1, 3\)\]"),
        ([[A, A], [A[:, :2], A[:, :2]]], ValueError, "different shapes"),
        ([[1.0, 2.0], [3.0]], ValueError, "not equal maps"),
        ((torch.zeros(2, 2, 3, 3),) * 2, ValueError, r"batch of 2; .*\[layer\[0\] for layer in"),
        ([torch.zeros(1, 2, 3, 3), A], ValueError, "equal two-dimensional"),
    ],
)
def test_what_cannot_be_shown_is_refused_with_what_is_accepted(given, error, message):
    with pytest.raises(error, match=message):
        read_maps(given)


@pytest.mark.parametrize(
    ("mask", "error", "message"),
    [
        (torch.zeros(2, 3), TypeError, "mask.bool"),
        (np.zeros((2, 3), int), TypeError, "mask: got dtype int64; accepted is a boolean"),
        ("causal", TypeError, "mask: got str"),
        (torch.zeros(3, 2, dtype=torch.bool), ValueError, r"got shape \(3, 2\); .*broadcasts"),
    ],
)
def test_a_mask_that_does_not_fit_is_refused(mask, error, message):
    with pytest.raises(error, match=message):
        read_maps(A, mask)


@pytest.mark.parametrize("as_list", [False, True])
def test_a_numpy_mask_serves_a_tensor_and_a_tensor_mask_an_array(as_list):
    mask = np.array([[True, False, True], [False, True, True]])
    read_only = np.broadcast_to(mask, (1, 1, 2, 3))
    given = mask.tolist() if as_list else read_only
    np.testing.assert_array_equal(pool(read_maps(A, given), (1, 1)).masked[0, 0], ~mask)
    cells = pool(read_maps(A.numpy(), torch.from_numpy(mask)), (1, 1))
    np.testing.assert_array_equal(cells.masked[0, 0], ~mask)


def test_nothing_given_is_modified():
    values, mask = torch.rand(1, 1, 8, 8), torch.rand(8, 8) > 0.5
    before = values.clone()
    pool(read_maps(values, mask), (3, 3))
    assert torch.equal(values, before)


def test_a_tensor_whose_negative_bit_is_set_is_drawn():
    weights = torch.complex(torch.zeros(3, 3), torch.eye(3)).conj().imag
    assert weights.is_neg()
    assert pool(read_maps(weights), (1, 1)).values.min() == -1


@pytest.mark.parametrize("block", [(3, 4), (1, 5), (7, 1), (60, 60), (100, 2)])
@pytest.mark.parametrize("shift", [0.0, -0.01, -1.0, 2.0])
@pytest.mark.parametrize(
    "make", [lambda w: w, lambda w: w.bfloat16(), lambda w: w.double().numpy()]
)
def test_one_pass_over_large_maps_finds_what_several_do(block, shift, make, monkeypatch):
    for name, number in (("_CACHED", 500), ("_SHORTEST", 1)):
        monkeypatch.setattr(f"pytest_attnheat.heatmaps.survey.{name}", number)
    weights = torch.randn(2, 3, 50, 41, generator=torch.Generator().manual_seed(0)).softmax(-1)
    maps = read_maps(make(weights + shift))
    found = survey(maps, block)
    cells = pool(maps, block)
    np.testing.assert_array_equal(found.cells.values, cells.values)
    np.testing.assert_array_equal(found.signed.values, pool(maps, block, signed=True).values)
    assert found.low == (0.0 if shift == 0 else smallest(maps, cells))
    for side in ("rows", "columns"):
        one, other = (getattr(w.sketch, side) for w in (found.whole, whole_of(maps)))
        np.testing.assert_allclose(one.sums, other.sums, 1e-6, 1e-5)
        np.testing.assert_allclose(one.signed, other.signed, 1e-6, 1e-5)
        # Norms of columns may be more than they are, never less.
        assert (one.norms >= other.norms * (1 - 1e-5)).all()
        assert (one.norms <= other.norms * (1.01 if side == "rows" or shift < 0 else 3)).all()


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf, 1e300])
def test_large_maps_of_more_than_finite_weights_are_not_surveyed_in_one_pass(value):
    weights = np.full((1, 9, 9), 0.1)
    weights[0, 5, 6] = value
    assert survey(read_maps(weights), (4, 3)) is None
    weights[0, 5, 6] = 0.1
    assert survey(read_maps(weights, np.tri(9, dtype=bool)), (4, 3)) is None
    assert survey(read_maps(weights), (3, 3)) is None
    assert survey(read_maps(weights), (4, 3)).low == 0
