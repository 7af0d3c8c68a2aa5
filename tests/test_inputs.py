"""What the assertions refuse to read, and in which words."""

import math

import numpy as np
import pytest
import torch

from pytest_attnheat import (
    assert_doubly_stochastic,
    assert_entropy,
    assert_one_hot,
    assert_row_stochastic,
    assert_uniform,
    causal_mask,
)
from pytest_attnheat.inputs import multiple

ASSERTIONS = [
    assert_row_stochastic,
    assert_doubly_stochastic,
    assert_one_hot,
    assert_uniform,
    lambda weights, **more: assert_entropy(weights, minimum=0, **more),
]
EYE = torch.eye(3)


def nested():
    return torch.nested.nested_tensor([torch.eye(2), torch.eye(2)], layout=torch.jagged)


@pytest.mark.parametrize("check", ASSERTIONS)
@pytest.mark.parametrize(
    ("weights", "error", "words"),
    [
        ([[1.0]], TypeError, "got list"),
        (1.0, TypeError, "got float"),
        (None, TypeError, "got NoneType"),
        (EYE.int(), TypeError, "dtype int32"),
        (EYE.bool(), TypeError, "dtype bool"),
        (EYE.to(torch.complex64), TypeError, "dtype complex64"),
        (EYE.to_sparse(), TypeError, "layout sparse_coo"),
        (EYE.to("meta"), TypeError, "meta tensor"),
        (torch.tensor(1.0), ValueError, r"0 dimension\(s\)"),
        (torch.ones(3), ValueError, r"1 dimension\(s\), shape \(3,\)"),
        (torch.ones(0, 3), ValueError, r"got shape \(0, 3\), which has no elements"),
        (torch.ones(3, 0), ValueError, "has no elements"),
        (torch.ones(2, 0, 3, 3), ValueError, "has no elements"),
        (np.eye(3, dtype=int), TypeError, "dtype int64"),
        (np.eye(3, dtype=complex), TypeError, "dtype complex128"),
        (np.eye(3, dtype=np.longdouble), TypeError, "dtype float128|dtype longdouble"),
        (np.array([["a"]]), TypeError, "dtype <U1"),
        (np.float64(1.0), TypeError, "got float64"),
        (np.ones(3), ValueError, r"1 dimension\(s\)"),
        (np.ones((3, 0)), ValueError, "has no elements"),
        (np.ma.masked_array(np.eye(3), np.eye(3)), TypeError, r"mask=~array\.mask"),
    ],
)
def test_what_cannot_be_checked_is_refused(check, weights, error, words):
    with pytest.raises(error, match=words) as refused:
        check(weights)
    assert "accepted is a dense torch.Tensor or numpy.ndarray" in str(refused.value)
    assert "two or more dimensions" in str(refused.value)


def test_a_nested_tensor_is_refused():
    with pytest.raises(TypeError, match="got a nested tensor"):
        assert_row_stochastic(nested())


@pytest.mark.parametrize("check", ASSERTIONS)
@pytest.mark.parametrize(
    ("mask", "error", "words"),
    [
        (torch.ones(3, 3), TypeError, r"dtype float32.*mask\.bool\(\).*mask == 0"),
        (torch.ones(3, 3, dtype=torch.int64), TypeError, "dtype int64"),
        (np.ones((3, 3)), TypeError, "dtype float64|float64"),
        ([[True]], TypeError, "mask: got list"),
        (torch.ones(4, 3, dtype=torch.bool), ValueError, r"got shape \(4, 3\); .*\(3, 3\)"),
        (torch.ones(2, 3, 3, dtype=torch.bool), ValueError, r"got shape \(2, 3, 3\); .*\(3, 3\)"),
    ],
)
def test_a_mask_that_cannot_be_meant_is_refused(check, mask, error, words):
    with pytest.raises(error, match=words):
        check(EYE, mask=mask)


@pytest.mark.parametrize("check", ASSERTIONS)
@pytest.mark.parametrize(
    ("tolerance", "error"),
    [
        (-1e-9, ValueError),
        (1, ValueError),
        (math.nan, ValueError),
        (math.inf, ValueError),
        ("1e-3", TypeError),
        (True, TypeError),
    ],
)
def test_a_tolerance_that_asserts_nothing_is_refused(check, tolerance, error):
    with pytest.raises(error, match="tolerance: got"):
        check(EYE, tolerance=tolerance)


@pytest.mark.parametrize("check", ASSERTIONS)
@pytest.mark.parametrize("declared", ["zeros", None, 0, ["zero"]])
def test_an_unknown_declaration_is_refused(check, declared):
    with pytest.raises(ValueError, match="accepted is one of 'zero', 'uniform', 'nan'"):
        check(EYE, fully_masked=declared)


def test_a_name_that_is_nearly_a_known_one_is_asked_after():
    with pytest.raises(ValueError, match=r"; did you mean 'bottom_right'\?$"):
        causal_mask(2, 3, alignment="Bottom-Right")
    with pytest.raises(ValueError, match=r"'top_left', 'bottom_right'$"):
        causal_mask(2, 3, alignment="centre")


@pytest.mark.parametrize(
    ("ratio", "said"),
    [(1.29, "1.3"), (9.96, "10"), (70_312.0, "70,000"), (7.52e3, "7,500"), (3.27e7, "3.3e+07")],
)
def test_how_many_times_something_is_reads_as_a_plain_figure(ratio, said):
    assert multiple(ratio) == said
