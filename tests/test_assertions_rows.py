"""What the row assertions accept and refuse."""

import math
from fractions import Fraction
from itertools import pairwise

import numpy as np
import pytest
import torch
from devices import on_accelerators

from pytest_attnheat import (
    assert_doubly_stochastic,
    assert_entropy,
    assert_one_hot,
    assert_row_stochastic,
    assert_uniform,
)

FLOATS = [torch.float64, torch.float32, torch.float16, torch.bfloat16]
SHAPES = [(1, 1), (1, 9), (9, 1), (3, 7), (5, 3, 7), (2, 4, 6, 8), (2, 1, 3, 4, 5), (4096, 3)]


def scores(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def softmax(*shape, seed=0):
    return scores(*shape, seed=seed).double().softmax(-1)


def sinkhorn(*shape):
    weights = scores(*shape).double().exp()
    for _ in range(200):
        weights = weights / weights.sum(-1, keepdim=True)
        weights = weights / weights.sum(-2, keepdim=True)
    return weights


# --- assert_row_stochastic


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_a_softmax_passes_in_every_dtype_and_shape(shape, dtype):
    assert_row_stochastic(softmax(*shape).to(dtype))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("key_len", [3, 4096, 5000, 60_000])
@pytest.mark.parametrize("spread", [0.0, 1.0, 5.0])
def test_a_softmax_done_wholly_in_low_precision_passes(dtype, key_len, spread):
    x = (spread * scores(7, key_len)).to(dtype)
    exp = (x - x.amax(-1, keepdim=True)).exp()
    by_division = exp / exp.sum(-1, keepdim=True)
    by_reciprocal = exp * exp.sum(-1, keepdim=True).reciprocal()
    if exp.sum(-1).isfinite().all():
        assert_row_stochastic(by_division)
        if dtype == torch.bfloat16:  # the reciprocal of a long float16 sum is subnormal
            assert_row_stochastic(by_reciprocal)
    assert_row_stochastic(x.softmax(-1))


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_one_row_that_is_off_is_found_in_every_dtype_and_shape(shape, dtype):
    weights = softmax(*shape).to(dtype)
    last = (-1,) * (len(shape) - 1)
    weights[last] *= 0.9
    with pytest.raises(AssertionError, match=rf"1 of {math.prod(shape[:-1])} rows do not sum to 1"):
        assert_row_stochastic(weights)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_weight_that_is_not_finite_is_found(bad):
    weights = softmax(2, 3, 4, 5)
    weights[1, 2, 3, 4] = bad
    with pytest.raises(AssertionError, match=r"1 of 24 rows.*\n.*weights\[1, 2, 3, :\]"):
        assert_row_stochastic(weights)


def test_a_negative_weight_is_found_in_a_row_that_sums_to_one():
    weights = torch.tensor([[0.5, 0.5, 0.0], [0.7, 0.4, -0.1]])
    with pytest.raises(AssertionError, match="1 of 2 rows hold a negative weight"):
        assert_row_stochastic(weights)


def test_no_tolerance_makes_a_negative_weight_acceptable():
    weights = torch.tensor([[1.0, 1e-9, -1e-9]])
    with pytest.raises(AssertionError, match="negative"):
        assert_row_stochastic(weights, tolerance=0.9)


def test_minus_zero_is_zero():
    assert_row_stochastic(torch.tensor([[1.0, -0.0]]))
    assert_row_stochastic(
        torch.tensor([[1.0, -0.0], [-0.0, -0.0]]), mask=torch.tensor([[1], [0]]) > 0
    )


def test_the_tolerance_can_be_set():
    weights = torch.tensor([[0.5, 0.51]])
    with pytest.raises(AssertionError, match=r"allowed 5\.0e-03"):
        assert_row_stochastic(weights, tolerance=0.005)
    assert_row_stochastic(weights, tolerance=0.02)


@pytest.mark.skipif(not hasattr(torch, "float8_e4m3fn"), reason="this torch has no float8")
def test_float8_passes_in_short_rows_and_is_refused_in_long_ones():
    assert_row_stochastic(torch.tensor([[0.5, 0.25, 0.25]]).to(torch.float8_e4m3fn))
    with pytest.raises(AssertionError, match="1 of 2 rows"):
        assert_row_stochastic(torch.tensor([[0.5, 0.5], [2.0, 0]]).to(torch.float8_e4m3fn))
    long = softmax(2, 5000).to(torch.float8_e4m3fn)
    with pytest.raises(ValueError, match=r"too coarse.*pass tolerance="):
        assert_row_stochastic(long)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_strides_do_not_matter(dtype):
    weights = softmax(2, 4, 6, 8).to(dtype)
    broken = weights.clone()
    broken[1, 3, 5] *= 0.5
    for make in (
        lambda w: w.mT.contiguous().mT,
        lambda w: w.permute(3, 0, 2, 1).contiguous().permute(1, 3, 2, 0),
        lambda w: torch.stack([w, w * 7], -1)[..., 0],
        lambda w: w.unsqueeze(1).expand(2, 5, 4, 6, 8),
    ):
        assert_row_stochastic(make(weights))
        with pytest.raises(AssertionError):
            assert_row_stochastic(make(broken))


def test_a_negative_view_is_read_with_its_sign():
    imaginary = torch.complex(torch.zeros(2, 3).double(), -softmax(2, 3)).conj().imag
    assert imaginary.is_neg()
    assert_row_stochastic(imaginary)


def test_144_heads_pass_and_one_broken_row_in_them_is_named():
    weights = softmax(12, 12, 16, 16)
    assert_row_stochastic(weights)
    weights[7, 11, 3] *= 1.1
    with pytest.raises(AssertionError, match=r"weights\[7, 11, 3, :\] sums to 1\.1 "):
        assert_row_stochastic(weights)


def test_the_weights_and_their_gradient_are_left_alone():
    x = scores(2, 3, 4).requires_grad_()
    weights = x.softmax(-1)
    before = weights.detach().clone()
    assert_row_stochastic(weights)
    with pytest.raises(AssertionError):
        assert_one_hot(weights)
    assert weights.requires_grad
    assert torch.equal(weights, before)
    weights.sum().backward()
    assert x.grad is not None


def test_the_default_dtype_and_inference_mode_do_not_matter():
    weights = softmax(2, 3, 4)
    with torch.inference_mode():
        assert_row_stochastic(weights)
    torch.set_default_dtype(torch.float64)
    try:
        assert_row_stochastic(weights)
        with pytest.raises(AssertionError):
            assert_row_stochastic(weights * 2)
    finally:
        torch.set_default_dtype(torch.float32)


# --- fully masked rows

MASK = torch.tensor([[False, False, False], [True, False, False], [True, True, False]])


def masked(fill):
    """Causal weights whose first query may attend to nothing."""
    weights = scores(2, 3, 3).masked_fill(~MASK, -torch.inf).softmax(-1)
    weights[:, 0] = fill
    return weights


CONTENT = {"zero": 0.0, "uniform": 1 / 3, "nan": math.nan}


@pytest.mark.parametrize("declared", CONTENT)
@pytest.mark.parametrize("content", CONTENT)
def test_a_fully_masked_row_holds_what_was_declared_and_nothing_else(declared, content):
    weights = masked(CONTENT[content])
    if declared == content:
        assert_row_stochastic(weights, mask=MASK, fully_masked=declared)
        return
    with pytest.raises(AssertionError, match="2 of 2 fully masked rows"):
        assert_row_stochastic(weights, mask=MASK, fully_masked=declared)


@pytest.mark.parametrize("fill", [[1.0, -1.0, 0.0], [1e-30, 0.0, 0.0], [0.0, 0.0, math.inf]])
def test_declared_zero_means_every_weight_exactly(fill):
    with pytest.raises(AssertionError, match="fully masked rows are not zero"):
        assert_row_stochastic(masked(torch.tensor(fill)), mask=MASK)


def test_declared_nan_means_every_weight():
    weights = masked(torch.tensor([math.nan, math.nan, 0.0]))
    with pytest.raises(AssertionError, match="fully masked rows hold numbers"):
        assert_row_stochastic(weights, mask=MASK, fully_masked="nan")


@pytest.mark.parametrize("declared", CONTENT)
def test_rows_with_a_permitted_key_must_sum_to_one_whatever_is_declared(declared):
    weights = masked(CONTENT[declared])
    weights[1, 2] = 0
    with pytest.raises(AssertionError, match="1 of 4 rows do not sum to 1"):
        assert_row_stochastic(weights, mask=MASK, fully_masked=declared)


@pytest.mark.parametrize("shape", [(3, 3), (1, 3, 3), (2, 3, 3), (3, 1)])
def test_a_mask_broadcasts(shape):
    mask = MASK.any(-1, keepdim=True) if shape == (3, 1) else MASK.expand(shape)
    assert_row_stochastic(masked(0.0), mask=mask)
    assert_row_stochastic(masked(0.0), mask=mask.numpy())
    assert_row_stochastic(masked(0.0), mask=mask.numpy()[..., ::-1, :][..., ::-1, :])
    with pytest.raises(AssertionError):
        assert_row_stochastic(masked(0.5), mask=mask)


# --- assert_doubly_stochastic


def test_doubly_stochastic_weights_pass():
    assert_doubly_stochastic(sinkhorn(2, 5, 5))
    assert_doubly_stochastic(sinkhorn(2, 5, 5).float())
    assert_doubly_stochastic(torch.eye(7)[torch.randperm(7)])


def test_rows_alone_are_not_enough():
    with pytest.raises(AssertionError, match=r"10 of 10 columns do not sum to 1") as error:
        assert_doubly_stochastic(softmax(2, 5, 5))
    assert "queries 0..4" in str(error.value)


def test_a_column_is_named_as_the_callers_tensor_has_it():
    weights = torch.eye(4).repeat(2, 1, 1)
    weights[1, 2] = torch.tensor([0.0, 0.0, 0.4, 0.6])
    with pytest.raises(AssertionError, match=r"2 of 8 columns.*\n.*weights\[1, :, [23]\] sums to"):
        assert_doubly_stochastic(weights)


def test_columns_alone_are_not_enough():
    with pytest.raises(AssertionError, match=r"10 of 10 rows do not sum to 1"):
        assert_doubly_stochastic(scores(2, 5, 5).softmax(-2))


def test_a_masked_row_and_column_are_zero():
    weights, mask = torch.zeros(4, 4), torch.ones(4, 4, dtype=torch.bool)
    weights[:3, :3] = 1 / 3
    mask[3], mask[:, 3] = False, False
    assert_doubly_stochastic(weights, mask=mask)
    with pytest.raises(AssertionError, match="1 of 4 rows"):
        assert_doubly_stochastic(weights)


def test_maps_that_are_not_square_cannot_be_doubly_stochastic():
    with pytest.raises(ValueError, match=r"\(3, 4\).*accepted is \(\.\.\., n, n\)"):
        assert_doubly_stochastic(softmax(3, 4))


def test_a_masked_row_of_a_doubly_stochastic_map_can_only_be_zero():
    with pytest.raises(ValueError, match="fully_masked: got 'nan'"):
        assert_doubly_stochastic(torch.eye(3), fully_masked="nan")


# --- assert_one_hot


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_hard_attention_is_one_hot(dtype):
    hard = torch.nn.functional.one_hot(scores(2, 3, 4, 5).argmax(-1), 5).to(dtype)
    assert_one_hot(hard)


def test_soft_attention_is_not_one_hot():
    with pytest.raises(AssertionError, match="24 of 24 rows do not put all weight on one key"):
        assert_one_hot(softmax(2, 3, 4, 5))


def test_two_weights_of_one_are_not_one_hot():
    with pytest.raises(AssertionError, match="1 of 1 rows do not sum to 1"):
        assert_one_hot(torch.tensor([[1.0, 0.0, 1.0]]))


def test_a_nearly_one_hot_row_of_many_bfloat16_keys_is_not_one_hot():
    weights = torch.zeros(1, 4096, dtype=torch.bfloat16)
    weights[0, 0], weights[0, 1] = 0.97, 0.03
    with pytest.raises(AssertionError, match="one key"):
        assert_one_hot(weights)


def test_a_fully_masked_row_need_not_be_one_hot():
    weights, mask = torch.eye(3), torch.eye(3, dtype=torch.bool)
    weights[1], mask[1] = 0, False
    assert_one_hot(weights, mask=mask)
    with pytest.raises(AssertionError):
        assert_one_hot(weights)


# --- assert_uniform


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("key_len", [1, 3, 7, 4096, 5000])
def test_the_softmax_of_equal_scores_is_uniform(dtype, key_len):
    assert_uniform(torch.zeros(2, 3, key_len, dtype=dtype).softmax(-1))


def test_uniform_means_over_the_permitted_keys():
    mask = torch.ones(5, 7, dtype=torch.bool).tril(1)
    weights = torch.zeros(2, 5, 7).masked_fill(~mask, -torch.inf).softmax(-1)
    assert_uniform(weights, mask=mask)
    with pytest.raises(AssertionError, match="10 of 10 rows are not uniform"):
        assert_uniform(weights)
    with pytest.raises(AssertionError, match="10 of 10 rows are not uniform"):
        assert_uniform(torch.full((2, 5, 7), 1 / 7), mask=mask)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_a_doubled_weight_in_a_long_uniform_row_is_seen(dtype):
    weights = torch.full((2, 4096), 1 / 4096, dtype=dtype)
    weights[1, 7] *= 2
    with pytest.raises(AssertionError, match=r"1 of 2 rows are not uniform\n.*weights\[1, :\]"):
        assert_uniform(weights)


def test_a_little_weight_on_a_masked_key_is_not_uniform():
    mask = torch.tensor([[True, True, False]])
    with pytest.raises(AssertionError, match="not uniform"):
        assert_uniform(torch.tensor([[0.5, 0.5, 0.001]]), mask=mask)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("leak", [3.9e-3, 1e-7, -1e-7, math.inf])
def test_nothing_but_zero_is_accepted_on_a_masked_key_of_a_uniform_row(dtype, leak):
    mask = torch.tensor([[True, True, False, False]]).expand(3, 4)
    weights = torch.tensor([[0.5, 0.5, 0.0, -0.0]], dtype=dtype).repeat(3, 1)
    assert_uniform(weights, mask=mask)
    weights[1, 3] = leak
    with pytest.raises(AssertionError) as error:
        assert_uniform(weights, mask=mask, tolerance=0.5)
    lines = str(error.value).splitlines()
    assert lines[0] == "assert_uniform: 1 of 3 rows are not uniform: masked keys hold weight"
    assert lines[1].startswith("  worst    weights[1, :] holds, at a masked key, ")


def test_nan_on_a_masked_key_is_not_uniform():
    mask = torch.tensor([[True, False]])
    with pytest.raises(AssertionError, match="1 of 1 rows are not uniform"):
        assert_uniform(torch.tensor([[1.0, math.nan]]), mask=mask)


def test_nan_is_not_uniform():
    with pytest.raises(AssertionError, match="not uniform"):
        assert_uniform(torch.full((2, 3), math.nan))


# --- assert_entropy


def entropy(row):
    return -sum(p * math.log(p) for p in row if p > 0)


def test_bounds_on_either_side_of_the_entropy_hold_and_others_do_not():
    weights = softmax(3, 5)
    entropies = [entropy(row) for row in weights.double().tolist()]
    low, high = min(entropies), max(entropies)
    assert_entropy(weights, minimum=low - 0.001, maximum=high + 0.001)
    with pytest.raises(AssertionError, match="1 of 3 rows have an entropy below"):
        assert_entropy(weights, minimum=low + 0.001)
    with pytest.raises(AssertionError, match="1 of 3 rows have an entropy above"):
        assert_entropy(weights, maximum=high - 0.001)


def test_bits_are_nats_over_log_2():
    weights = torch.full((2, 8), 1 / 8)
    assert_entropy(weights, minimum=3, maximum=3, unit="bits")
    with pytest.raises(AssertionError, match=r"entropy \(bits\) of 3 "):
        assert_entropy(weights, minimum=3.1, unit="bits")
    with pytest.raises(AssertionError, match=r"entropy \(nats\) of 2\.07944"):
        assert_entropy(weights, minimum=3.1)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("key_len", [3, 4096])
def test_uniform_rows_reach_the_largest_entropy_there_is(dtype, key_len):
    weights = torch.zeros(2, key_len, dtype=dtype).softmax(-1)
    assert_entropy(weights, minimum=math.log(key_len), maximum=math.log(key_len))


def test_a_one_hot_row_has_entropy_zero():
    assert_entropy(torch.eye(4), maximum=0)


@pytest.mark.parametrize("kind", [int, float, np.int64, np.uint8, np.float32, Fraction])
def test_bounds_and_tolerance_are_any_real_numbers(kind):
    weights = torch.full((2, 8), 1 / 8)
    assert_entropy(weights, minimum=kind(2), maximum=kind(3), tolerance=kind(0))
    with pytest.raises(AssertionError, match="rows have an entropy below 3 nats"):
        assert_entropy(weights, minimum=kind(3))


def test_the_entropy_of_a_one_hot_row_is_not_minus_zero():
    with pytest.raises(AssertionError, match=r"entropy \(nats\) of 0 \(off by"):
        assert_entropy(torch.eye(4), minimum=1)


@pytest.mark.parametrize(("unit", "entropy"), [("nats", "1.386"), ("bits", "2.000")])
def test_the_picture_of_an_entropy_shows_entropies(unit, entropy):
    weights = torch.eye(4).repeat(2, 1, 1)
    weights[1, 2] = 1 / 4
    with pytest.raises(AssertionError) as error:
        assert_entropy(weights, maximum=1, unit=unit)
    picture = str(error.value).splitlines()[-4:]
    assert [line.split("  ")[4:] for line in picture] == [
        [f"0.000 {unit}"],
        [f"0.000 {unit}"],
        [f"{entropy} {unit}", "<-"],
        [f"0.000 {unit}"],
    ]


def test_rows_must_be_distributions_before_they_have_an_entropy():
    with pytest.raises(AssertionError, match="do not sum to 1"):
        assert_entropy(scores(3, 4), minimum=0)


def test_a_fully_masked_row_has_no_entropy():
    for declared, content in CONTENT.items():
        weights = masked(content)
        assert_entropy(weights, maximum=0.7, mask=MASK, fully_masked=declared)


@pytest.mark.parametrize(
    ("bounds", "error", "words"),
    [
        ({}, ValueError, "minimum, maximum: got None and None; accepted is a num"),
        ({"minimum": 2, "maximum": 1}, ValueError, "nothing lies between"),
        ({"minimum": 1, "unit": "shannon"}, ValueError, "unit: got 'shannon'; accepted is one"),
        ({"minimum": "1"}, TypeError, "minimum: got str"),
        ({"minimum": True}, TypeError, "minimum: got bool"),
        ({"minimum": np.True_}, TypeError, "minimum: got bool"),
        ({"minimum": 1j}, TypeError, "minimum: got complex"),
        ({"maximum": math.nan}, ValueError, "maximum: got nan"),
        ({"maximum": 10**400}, ValueError, "maximum: got inf"),
    ],
)
def test_bounds_that_make_no_sense_are_refused(bounds, error, words):
    with pytest.raises(error, match=words):
        assert_entropy(torch.eye(3), **bounds)


# --- the message


def test_the_message_says_all_that_a_ci_log_needs():
    weights = softmax(1, 4, 6, 8).float()
    weights[0, 2, 4] *= 0.612
    with pytest.raises(AssertionError) as error:
        assert_row_stochastic(weights)
    lines = str(error.value).splitlines()
    assert lines[0] == "assert_row_stochastic: 1 of 24 rows do not sum to 1"
    worst = "  worst    weights[0, 2, 4, :] sums to 0.612 (off by 3.9e-01; allowed 1.0e-05)"
    assert lines[1] == worst
    assert lines[2] == "  tensor   float32 (1, 4, 6, 8) on cpu"
    assert lines[3] == "  head [0, 2]    keys 0..7"
    assert [line.split()[0] for line in lines[4:]] == ["q0", "q1", "q2", "q3", "q4", "q5"]
    assert [line.endswith("0.612  <-") for line in lines[4:]] == [False] * 4 + [True, False]


def test_the_picture_stays_small_and_shows_the_place():
    weights = softmax(3, 500, 5000)
    weights[1, 321] *= 3
    with pytest.raises(AssertionError) as error:
        assert_row_stochastic(weights)
    *_, caption = [line for line in str(error.value).splitlines() if "keys" in line]
    picture = [line for line in str(error.value).splitlines() if line.startswith("    q")]
    assert caption == "  map [1]    keys 0..4999, the largest of each 79"
    assert len(picture) == 6
    assert [line.strip().startswith("q321") for line in picture if line.endswith("<-")] == [True]
    assert max(map(len, picture)) < 100


@pytest.mark.parametrize(
    ("off", "shown"),
    [(0.4, "1.400"), (3e-3, "1.003"), (4e-4, "1.0004"), (2e-5, "1.00002"), (1e-9, "1.000000")],
)
def test_the_picture_has_the_digits_that_tell_a_broken_row_apart(off, shown):
    weights = torch.eye(3, dtype=torch.float64)
    weights[1, 1] += off
    with pytest.raises(AssertionError) as error:
        assert_row_stochastic(weights)
    sums = [line.split()[2] for line in str(error.value).splitlines()[-3:]]
    assert sums == ["1." + "0" * (len(shown) - 2), shown, "1." + "0" * (len(shown) - 2)]


def test_a_number_never_has_more_digits_than_a_float():
    with pytest.raises(AssertionError) as error:
        assert_row_stochastic(torch.tensor([[1.0, -1e-320]], dtype=torch.float64))
    worst = str(error.value).splitlines()[1]
    assert "holds -9.99989e-321 (off by 1.0e-320; allowed 0)" in worst
    rows = torch.tensor([[1 + 1e-12, 0], [0.5, 0.5]], dtype=torch.float64)
    with pytest.raises(AssertionError, match=r"sums to 1\.000000000001 \(off by 1\.0e-12"):
        assert_row_stochastic(rows, tolerance=0)


def test_nan_is_worse_than_anything():
    weights = softmax(4, 5) * 100
    weights[2, 1] = math.nan
    with pytest.raises(AssertionError, match=r"weights\[2, :\] sums to nan \(allowed"):
        assert_row_stochastic(weights)


def test_columns_are_shown_as_columns():
    with pytest.raises(AssertionError) as error:
        assert_doubly_stochastic(softmax(2, 2, 5, 5).float())
    assert "tensor   float32 (2, 2, 5, 5) on cpu" in str(error.value)
    assert "    k0  " in str(error.value)


def test_the_function_itself_is_left_out_of_the_traceback(pytester):
    pytester.makepyfile(
        """
        import torch
        from pytest_attnheat import assert_row_stochastic

        def test_it():
            assert_row_stochastic(torch.ones(2, 3))
        """
    )
    result = pytester.runpytest_inprocess("-p", "no:cacheprovider")
    result.stdout.fnmatch_lines(["E*assert_row_stochastic: 2 of 2 rows do not sum to 1"])
    result.stdout.no_fnmatch_line("*rows.py*")


# --- NumPy


def numpy_variants(weights):
    yield "plain", weights
    yield "negative strides", weights[..., ::-1, ::-1]
    yield "transposed", np.ascontiguousarray(weights.swapaxes(-1, -2)).swapaxes(-1, -2)
    yield "broadcast", np.broadcast_to(weights[0, 0], (3, *weights.shape[2:]))
    yield "foreign byte order", weights.astype(weights.dtype.newbyteorder(">"))
    readonly = weights.copy()
    readonly.flags.writeable = False
    yield "read-only", readonly
    packed = np.zeros(weights.shape, dtype=[("tag", "u1"), ("weight", weights.dtype)])
    packed["weight"] = weights
    yield "field of a record", packed["weight"]


@pytest.mark.parametrize("dtype", [np.float64, np.float32, np.float16])
def test_numpy_arrays_of_any_layout_are_read_without_a_warning(dtype):
    weights = softmax(2, 3, 4, 5).numpy().astype(dtype)
    for name, array in numpy_variants(weights):
        before = array.copy()
        assert_row_stochastic(array)
        assert np.array_equal(array, before), name
    weights[..., 1, :] *= 0.5
    for _, array in numpy_variants(weights):
        with pytest.raises(AssertionError, match=r"(6 of 24|3 of 12) rows"):
            assert_row_stochastic(array)


def test_an_index_into_a_reversed_array_is_the_callers():
    weights = softmax(4, 5).numpy()[::-1]
    weights[0] *= 0.5
    with pytest.raises(AssertionError, match=r"weights\[0, :\] sums to 0\.5 "):
        assert_row_stochastic(weights)


@on_accelerators(FLOATS)
def test_everything_works_on_an_accelerator(dtype, accelerator):
    weights = softmax(2, 4, 6, 8).to(accelerator, dtype)
    assert_row_stochastic(weights)
    assert_row_stochastic(weights, mask=torch.ones(6, 8, dtype=torch.bool))
    assert_entropy(weights, minimum=0)
    assert_uniform(torch.zeros_like(weights).softmax(-1))
    with pytest.raises(AssertionError, match=f"on {accelerator}:0"):
        assert_one_hot(weights)
    weights[1, 1, 1] *= 0.5
    with pytest.raises(AssertionError, match=r"weights\[1, 1, 1, :\] sums to 0\.5"):
        assert_row_stochastic(weights)


def test_the_first_of_equally_bad_rows_is_named():
    weights = torch.eye(5)
    weights[[1, 3]] = 0
    with pytest.raises(AssertionError, match=r"2 of 5 rows.*\n.*weights\[1, :\] sums to 0 "):
        assert_row_stochastic(weights)


def test_default_tolerances_grow_with_the_row():
    from pytest_attnheat.attention.tolerance import row_tolerance

    for dtype in FLOATS:
        allowed = [row_tolerance(dtype, n) for n in (1, 64, 4096, 2**20)]
        assert all(a <= b for a, b in pairwise(allowed)), dtype
    assert row_tolerance(torch.float32, 8) == 1e-5
    assert row_tolerance(torch.float64, 8) == 1e-12
    assert 1.8e-3 * 4 < row_tolerance(torch.bfloat16, 4096) < 0.02
    assert 1.5e-4 * 4 < row_tolerance(torch.float16, 4096) < 0.003
