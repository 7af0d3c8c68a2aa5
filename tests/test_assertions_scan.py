"""That tensors of any size are read piece by piece, with little memory and one wait."""

import os
import subprocess
import sys
import textwrap
from math import prod

import numpy as np
import pytest
import torch
from pretend_device import reads

from pytest_attnheat import (
    assert_doubly_stochastic,
    assert_entropy,
    assert_one_hot,
    assert_row_stochastic,
    assert_uniform,
)
from pytest_attnheat.assertions import scan
from pytest_attnheat.attention.chunks import pieces

KB_PER_MB = 1024


@pytest.mark.parametrize("limit", [1, 2, 7, 24, 1000])
@pytest.mark.parametrize("shape", [(1,), (13,), (4, 6), (2, 3, 5, 7), (1, 1, 1), (9, 1, 2)])
def test_pieces_cover_every_element_once_and_stay_small(shape, limit):
    seen = np.zeros(shape, dtype=int)
    for index in pieces(shape, limit):
        assert seen[index].size <= limit
        seen[index] += 1
    assert (seen == 1).all()


def test_pieces_are_of_even_size():
    sizes = [piece.stop - piece.start for piece, _ in pieces((1025, 1024), 1024 * 1024)]
    assert sizes == [513, 512]


def test_many_tiny_maps_make_few_pieces():
    assert len(list(pieces((1000, 1000, 2, 2), 2**20))) == 4


@pytest.fixture(params=[(4, 3), (40, 7)], ids=str)
def small_pieces(request, monkeypatch):
    """Make every tensor of the tests too large for one piece."""
    elements, rows = request.param
    monkeypatch.setattr(scan, "_BYTES", 4 * elements)
    monkeypatch.setattr(scan, "_ROWS", rows)
    monkeypatch.setattr(scan, "_BYTES_ON_CPU", 8 * elements)


def reversed_twice(weights):
    """As NumPy has it, with negative strides."""
    if weights.dtype == torch.bfloat16:  # which NumPy does not have
        return weights
    backwards = np.ascontiguousarray(weights.numpy()[..., ::-1])
    return backwards[..., ::-1]


@pytest.mark.usefixtures("small_pieces")
@pytest.mark.parametrize(
    ("shape", "dtype"),
    [
        ((3, 5, 7), torch.float64),
        ((1, 100), torch.bfloat16),
        ((50, 1), torch.float32),
        ((2, 3, 2, 33), torch.float32),
        ((2, 3, 2, 33), torch.bfloat16),
    ],
    ids=str,
)
@pytest.mark.parametrize("check", [assert_row_stochastic, assert_uniform, assert_entropy])
def test_no_row_is_missed_where_pieces_meet(check, shape, dtype):
    more = {"minimum": -1} if check is assert_entropy else {}
    uniform = torch.full(shape, 1 / shape[-1], dtype=dtype)
    check(uniform, **more)
    check(uniform, mask=torch.ones(shape, dtype=torch.bool), **more)
    rows = prod(shape[:-1])
    for flat in {0, rows // 2, rows - 1}:
        place = tuple(int(i) for i in np.unravel_index(flat, shape[:-1]))
        broken = uniform.clone()
        broken[place] *= 1.5
        words = rf"1 of {prod(shape[:-1])} rows.*\n.*weights\[{', '.join(map(str, place))}, :\]"
        for weights in (broken, broken.mT.contiguous().mT, reversed_twice(broken)):
            with pytest.raises(AssertionError, match=words):
                check(weights, **more)


@pytest.mark.usefixtures("small_pieces")
@pytest.mark.parametrize("key", [0, 1, 50, 99])
def test_every_key_of_a_long_row_is_read(key):
    weights = torch.zeros(2, 100)
    weights[:, key] = 1
    assert_one_hot(weights)
    weights[1, key], weights[1, 99 - key] = 2, -1
    with pytest.raises(AssertionError, match="1 of 2 rows hold a negative weight"):
        assert_row_stochastic(weights)
    mask = torch.zeros(2, 100, dtype=torch.bool)
    mask[0, key] = True
    weights[1] = 0
    assert_row_stochastic(weights, mask=mask)
    assert_uniform(weights, mask=mask)
    weights[1, key] = 1
    with pytest.raises(AssertionError, match="1 of 1 fully masked rows are not zero"):
        assert_row_stochastic(weights, mask=mask)


@pytest.mark.usefixtures("small_pieces")
@pytest.mark.parametrize("key", [0, 50, 98])
def test_weight_on_any_masked_key_of_a_long_row_is_found(key):
    mask = torch.arange(100) == 99
    weights = mask.float().repeat(3, 1)
    assert_uniform(weights, mask=mask)
    weights[1, key] = 1e-12
    with pytest.raises(AssertionError, match=r"masked keys hold weight\n.*weights\[1, :\] holds"):
        assert_uniform(weights, mask=mask)


@pytest.mark.usefixtures("small_pieces")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("row", [0, 13, 29])
def test_a_negative_weight_is_found_in_whichever_piece_it_is(row, dtype):
    weights = torch.zeros(30, 4, dtype=dtype)
    weights[:, 0] = 1
    weights[row] = torch.tensor([1.5, -0.5, 0.0, 0.0])
    with pytest.raises(AssertionError, match=rf"1 of 30 rows hold.*\n.*weights\[{row}, :\]"):
        assert_row_stochastic(weights)


@pytest.mark.usefixtures("small_pieces")
def test_the_first_of_equally_bad_rows_is_named_across_pieces():
    weights = torch.eye(30)
    weights[[5, 11, 29]] = 0
    with pytest.raises(AssertionError, match=r"3 of 30 rows.*\n.*weights\[5, :\] sums to 0 "):
        assert_row_stochastic(weights)
    weights[[11, 29]] = torch.nan
    with pytest.raises(
        AssertionError, match=r"weights\[11, :\] sums to nan(.*\n)*.*2 rows are NaN"
    ):
        assert_row_stochastic(weights)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("masked", [False, True])
def test_a_passing_assertion_waits_for_the_device_once(dtype, masked, pretend):
    weights = torch.zeros(3, 4, 1024, 512, dtype=dtype).softmax(-1).to(pretend)
    mask = torch.ones(1024, 512, dtype=torch.bool, device=pretend) if masked else None
    for check in (assert_row_stochastic, assert_uniform):
        with reads() as seen:
            check(weights, mask=mask)
        assert seen.count == 1


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_passing_assertion_synchronises_a_gpu_once():
    weights = torch.rand(4, 4, 512, 512, device="cuda").softmax(-1)
    torch.cuda.synchronize()
    with torch.profiler.profile() as profile:
        assert_row_stochastic(weights)
    copies = [event for event in profile.events() if "Memcpy DtoH" in event.name]
    assert len(copies) == 1


MEMORY = r"""
    import ctypes, re
    from pathlib import Path
    import numpy as np, torch
    import pytest_attnheat as p

    def peak():
        return int(re.search(r"VmHWM:\s+(\d+)", Path("/proc/self/status").read_text())[1])

    trim = getattr(ctypes.CDLL(None), "malloc_trim", lambda _: None)

    def extra(call):
        trim(0)  # memory that was freed but kept would hide what the call needs
        Path("/proc/self/clear_refs").write_text("5")  # forget the peak so far
        before = peak()
        call()
        return peak() - before

    def fails(call):
        try:
            call()
        except AssertionError:
            return
        raise SystemExit("it passed")

    checks = (p.assert_row_stochastic, p.assert_uniform)
    # Every kernel is loaded before anything is measured.
    warm = torch.full((700, 1024), 1 / 1024)
    for check in checks:
        for dtype in (torch.float32, torch.float64, torch.bfloat16):
            check(warm.to(dtype))
            fails(lambda: check(warm.to(dtype) * 2))
    for weights in (
        lambda: torch.full((32, 1024, 1024), 1 / 1024),
        lambda: torch.full((64, 1024, 1024), 1 / 1024, dtype=torch.bfloat16),
        lambda: torch.full((1024, 32, 1024), 1 / 1024).permute(1, 0, 2).mT,
        lambda: torch.full((1, 2**25), 2**-25),
        lambda: torch.full((1, 2**24), 2**-24, dtype=torch.float64),
        lambda: torch.full((2**21, 4, 4), 1 / 4),
        lambda: torch.ones((2**25, 1)),
    ):
        weights = weights()
        passing = [extra(lambda: check(weights)) for check in checks]
        weights[-1] *= 3
        failing = [extra(lambda: fails(lambda: check(weights))) for check in checks]
        print(*passing, *failing, weights.shape)
"""


@pytest.mark.skipif(
    not os.access("/proc/self/clear_refs", os.W_OK), reason="needs Linux to reset the peak memory"
)
def test_128_mb_are_checked_with_at_most_16_mb_more():
    # Else each thread keeps what it freed, as chance has it.
    one_thread = os.environ | {"MALLOC_ARENA_MAX": "1", "OMP_NUM_THREADS": "1"}
    run = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(MEMORY)],
        capture_output=True, text=True, check=False, env=one_thread,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr
    assert len(run.stdout.splitlines()) == 7
    for line in run.stdout.splitlines():
        assert all(int(more) <= 16 * KB_PER_MB for more in line.split()[:4]), line


def test_expanded_weights_and_masks_are_not_copied():
    weights = torch.full((1, 1, 1), 1 / 2**10).expand(2**8, 2**12, 2**10)  # 4 GB, were it real
    assert weights.untyped_storage().nbytes() == 4
    assert_row_stochastic(weights[:8], mask=torch.ones(1, 1, dtype=torch.bool))


def test_a_doubly_stochastic_map_larger_than_a_piece():
    size = 1536
    weights = torch.full((2, size, size), 1 / size)
    assert_doubly_stochastic(weights)
    weights[1, :, 700] *= 2
    with pytest.raises(AssertionError, match=f"{size} of {2 * size} rows do not sum to 1"):
        assert_doubly_stochastic(weights)
