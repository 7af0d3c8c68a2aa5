"""A sketch of maps: the same from any blocks, in bytes, and of what cannot be added up."""

import numpy as np
import pytest
import torch
from devices import on_accelerators

from pytest_attnheat.attention.sketch import Sketcher, packed, packed_size, unpacked

POSITIONS = [1.3984375, -1.05078125, -1.84765625, -1.34765625]


def softmax(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0)).mul(2).softmax(-1)


def sketch(maps, parts=1):
    sketcher = Sketcher(*maps.shape)
    for rows in np.array_split(np.arange(maps.shape[1]), parts):
        here = slice(int(rows[0]), int(rows[-1]) + 1)
        sketcher.add(slice(0, maps.shape[0]), here, maps[:, here])
    return sketcher.sketch()


def numbers(found):
    return [
        array
        for side in (found.rows, found.columns)
        for array in (side.sums, side.signed, side.norms)
    ]


def test_the_numbers_are_sums_of_weights_times_those_of_their_positions():
    maps = softmax(3, 5, 7).double().numpy()
    found = sketch(maps)
    raw = [int(n) for n in np.random.Philox(key=20260711).random_raw(7)]
    signs = [(1 if n & 1 else -1) * (1 + (n >> 8) % 256 / 256) for n in raw]
    for panel in range(3):
        for query in range(5):
            row = maps[panel, query]
            expected = sum(sign * weight for sign, weight in zip(signs, row, strict=True))
            assert found.rows.signed[panel, query] == pytest.approx(expected, rel=1e-12)
        for key in range(7):
            column = maps[panel, :, key]
            expected = sum(sign * weight for sign, weight in zip(signs, column, strict=False))
            assert found.columns.signed[panel, key] == pytest.approx(expected, rel=1e-12)
    np.testing.assert_allclose(found.columns.sums, maps.sum(1), rtol=1e-12)
    np.testing.assert_allclose(found.rows.norms, np.linalg.norm(maps, axis=2), rtol=1e-12)


def test_the_numbers_of_positions_never_change():
    found = sketch(np.eye(4)[None])
    assert found.rows.signed[0].tolist() == POSITIONS


@pytest.mark.parametrize(
    "make",
    [
        lambda maps: maps,
        lambda maps: maps.numpy(),
        lambda maps: maps.double(),
        lambda maps: maps.requires_grad_().detach(),
        lambda maps: maps.mT.contiguous().mT,
    ],
)
def test_it_is_the_same_of_tensors_and_arrays_in_any_blocks(make):
    maps = softmax(2, 30, 20)
    whole, parts = sketch(maps.numpy()), sketch(make(maps), parts=7)
    for one, other in zip(numbers(whole), numbers(parts), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-6, atol=1e-6)


@on_accelerators([torch.float32, torch.bfloat16])
@pytest.mark.parametrize("value", [0.5, np.nan])
def test_it_is_the_same_of_tensors_of_another_device(accelerator, dtype, value):
    maps = softmax(2, 30, 20).to(dtype)
    maps[1, 2, 3] = value
    for one, other in zip(
        numbers(sketch(maps)), numbers(sketch(maps.to(accelerator))), strict=True
    ):
        np.testing.assert_allclose(one, other, rtol=1e-6, atol=1e-6)


def test_half_precision_is_added_up_as_it_is():
    maps = softmax(2, 9, 9).bfloat16()
    for one, other in zip(numbers(sketch(maps)), numbers(sketch(maps.double())), strict=True):
        np.testing.assert_allclose(one, other, atol=1e-6)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf, -1e9])
def test_what_cannot_be_added_up_counts_as_a_number_and_hides_no_other(value):
    maps = softmax(1, 64, 64).numpy()
    maps[0, 5, 6] = value
    other = maps.copy()
    other[0, 5, 7] += 0.001
    found = sketch(maps)
    assert all(np.isfinite(array).all() for array in numbers(found))
    rows, columns = found.excess(sketch(other), 1e-5)
    assert np.flatnonzero(rows[0] > 1).tolist() == [5]
    assert np.flatnonzero(columns[0] > 1).tolist() == [7]
    other[0, 5, 7], other[0, 5, 6] = maps[0, 5, 7], 0.01
    assert (found.excess(sketch(other), 1e-5)[0][0] > 1).any()


def test_weights_that_trade_places_so_that_all_sums_stay_are_seen():
    maps = softmax(1, 64, 64).double().numpy()
    for first, second in ((1, 2), (10, 50)):
        other = maps.copy()
        square = np.ix_([0], [first, second], [first, second])
        other[square] += 0.001 * np.array([[1, -1], [-1, 1]])
        assert np.allclose(other.sum(1), maps.sum(1))
        assert np.allclose(other.sum(2), maps.sum(2))
        rows, columns = sketch(maps).excess(sketch(other), 1e-5)
        for side in (rows, columns):
            assert np.flatnonzero(side[0] > 1).tolist() == [first, second]


@pytest.mark.parametrize("column_sums", [True, False])
def test_it_is_read_from_bytes_as_closely_as_was_asked(column_sums):
    maps = softmax(3, 40, 50)
    maps[1, 4] = 0
    found, step = sketch(maps), 1e-4
    data = packed(found, step, column_sums=column_sums)
    assert len(data) == packed_size((3, 40, 50), column_sums=column_sums)
    read = unpacked(data, (3, 40, 50), step, column_sums=column_sums)
    for side, other in ((found.rows, read.rows), (found.columns, read.columns)):
        assert (np.abs(side.signed - other.signed) <= step * other.norms / 2 + 1e-15).all()
        assert (side.norms <= other.norms).all()
        assert (other.norms <= 2 * side.norms).all()
    np.testing.assert_allclose(read.rows.sums, found.rows.sums, rtol=4e-6)
    assert (read.columns.sums is None) is not column_sums
    assert not any((excess > 1).any() for excess in read.excess(read, 0))
    assert not any((excess > 1).any() for excess in read.excess(found, 1e-5))


def test_groups_of_rows_and_columns_still_show_one_weight():
    maps = softmax(2, 64, 60)
    other = maps.clone()
    other[1, 33, 59] += 0.001
    rows, columns = sketch(maps).folded((8, 9)).excess(sketch(other).folded((8, 9)), 1e-5)
    assert (rows.shape, columns.shape) == ((2, 8), (2, 7))
    assert np.argwhere(rows > 1).tolist() == [[1, 4]]
    assert np.argwhere(columns > 1).tolist() == [[1, 6]]
