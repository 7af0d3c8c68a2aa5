"""Each likely cause is named where the numbers show it, and nowhere else."""

import math
import re

import pytest
import torch

from pytest_attnheat import (
    assert_doubly_stochastic,
    assert_masked,
    assert_row_stochastic,
    assert_support,
    assert_uniform,
)

SHAPE = (2, 4, 32, 24)
TRIL = torch.ones(32, 24, dtype=torch.bool).tril(-1)


def scores(*shape, seed=0):
    return torch.randn(*(shape or SHAPE), generator=torch.Generator().manual_seed(seed))


def dropout(weights, p):
    keep = torch.rand(weights.shape, generator=torch.Generator().manual_seed(1)) >= p
    return weights * keep / (1 - p)


def one_row_scaled():
    weights = scores().softmax(-1)
    weights[1, 2, 3] *= 0.7
    return weights


def one_negative():
    weights = scores().softmax(-1)
    weights[0, 0, 0, 0] = -0.5
    return weights


def mask_after_softmax():
    return scores().softmax(-1) * torch.ones(32, 24).tril()


def nan_at_some_keys():
    weights = scores().softmax(-1)
    weights[1, :, 5:, 3] = math.nan
    return weights


def nan_rows():
    return scores().masked_fill(~TRIL, -torch.inf).softmax(-1)


def random_sums():
    """Rows scaled each by its own factor: broken, for none of the reasons."""
    return scores().softmax(-1) * torch.linspace(0.5, 0.98, 32).unsqueeze(-1)


def slightly_off_but_one():
    """Low precision everywhere, and one row that is wrong."""
    weights = scores().softmax(-1) * (1 + 1e-3 * scores(2, 4, 32, 1))
    weights[0, 0, 0] *= 2
    return weights


# What is broken, and a phrase from the cause; None where no cause must be named.
DEFECTS = {
    "softmax over queries": (lambda: scores().softmax(-2), "softmax over the query axis"),
    "softmax over heads": (lambda: scores().softmax(1), "over the head axis: softmax over dim=1"),
    "softmax over batch": (lambda: scores().softmax(0), "over the batch axis: softmax over dim=0"),
    "softmax over dim 0 of 3": (lambda: scores(5, 6, 7).softmax(0), "softmax over dim=0"),
    "causal softmax over queries": (
        lambda: scores(6, 6).masked_fill(torch.ones(6, 6).triu(1) > 0, -torch.inf).softmax(-2),
        "softmax over the query axis",
    ),
    "scaled after": (lambda: scores().softmax(-1) / 8, "0.125: scaled after"),
    "multiplied after": (lambda: scores().softmax(-1) * 8, "8: scaled after"),
    "sum of heads": (lambda: scores().softmax(-1).sum(1), "every row sums to 4: "),
    "logits": (scores, "scores (logits) that no softmax has seen"),
    "masked logits": (
        lambda: scores().masked_fill(~TRIL, -torch.inf),
        "scores (logits) that no softmax has seen",
    ),
    "exp without division": (lambda: scores().exp(), "exp without a division by the sum?"),
    "dropout 0.1": (lambda: dropout(scores().softmax(-1), 0.1), "weights after dropout (p about"),
    "dropout 0.5": (lambda: dropout(scores().softmax(-1), 0.5), "weights after dropout (p about"),
    "nan rows": (nan_rows, 'softmax of -inf? Then pass mask= and fully_masked="nan"'),
    "nan keys": (nan_at_some_keys, "108 rows are NaN, from weights[1, 0, 5, :] on"),
    "zero rows": (lambda: nan_rows().nan_to_num(), "hold only zeros: fully masked? Then pass mask"),
    "infinite": (lambda: (500 * scores()).exp().clamp(min=0.1), "exp overflowed"),
    "bfloat16": (lambda: scores().softmax(-1).bfloat16().float(), "is a bfloat16 number"),
    "float16": (lambda: scores().softmax(-1).half().float(), "is a float16 number"),
    "float32": (lambda: scores().softmax(-1).double(), "is a float32 number"),
    "exp with some zeros": (lambda: scores().exp() * (scores(seed=2) > -1), None),
    "softmax less a constant": (lambda: scores().softmax(-1) - 0.01, None),
    "one row scaled": (one_row_scaled, None),
    "one negative": (one_negative, None),
    "mask after softmax": (mask_after_softmax, None),
    "random sums": (random_sums, None),
    "slightly off but one": (slightly_off_but_one, None),
    "random sums in bfloat16": (lambda: random_sums().bfloat16().float(), None),
}


def cause_of(weights, check=assert_row_stochastic, **more):
    with pytest.raises(AssertionError) as error:
        check(weights, **more)
    causes = [line for line in str(error.value).splitlines() if line.startswith("  cause    ")]
    assert len(causes) <= 1
    return causes[0] if causes else None


@pytest.mark.parametrize("defect", DEFECTS)
def test_this_cause_is_named_and_no_other(defect):
    make, phrase = DEFECTS[defect]
    cause = cause_of(make())
    if phrase is None:
        assert cause is None
    else:
        assert cause is not None
        assert phrase in cause


def zero_row():
    weights = masked_softmax(causal(32, 32, 32))
    weights[..., 9, :] = 0
    return weights


# Weights under a causal mask, of 32 queries and keys, and a phrase from the cause.
UNDER_A_MASK = {
    "some rows of zeros": (zero_row, "8 of these rows hold only zeros although the mask permits"),
    "the last key": (lambda: zero_row() + torch.eye(32) * 0.5, None),
    "all ones": (lambda: torch.ones(1, 4, 32, 32), "every weight is 1: softmax over an axis of"),
    "the mask": (lambda: causal(32, 32, 32)[:1].float().expand(1, 4, 32, 32), "the mask itself?"),
    "not quite the mask": (lambda: causal(32, 32).float().expand(1, 4, 32, 32) * 0.99, None),
    "dropout": (lambda: dropout(masked_softmax(causal(32, 32)), 0.3), "weights after dropout"),
    "opposite": (lambda: masked_softmax(~causal(32, 32)), "a mask of the opposite meaning?"),
    "half of the opposite": (
        lambda: masked_softmax(~causal(32, 32) & (torch.arange(32) % 2 == 0)),
        "rows hold only zeros although the mask permits keys",
    ),
    "nan in a row": (
        lambda: masked_softmax(causal(32, 32)).index_fill(-1, torch.tensor(0), math.nan),
        "there at 1 of 32 keys, and a softmax over keys makes whole rows NaN",
    ),
}


def test_the_cause_of_columns_that_do_not_sum_to_one_is_not_sought_in_the_rows():
    with pytest.raises(AssertionError, match="cause    the rows do sum to 1: a plain softmax"):
        assert_doubly_stochastic(scores(5, 5).softmax(-1))


@pytest.mark.parametrize(
    ("fill", "declared", "phrase"),
    [
        (math.nan, "zero", 'fully_masked="nan"'),
        (1 / 24, "zero", 'fully_masked="uniform"'),
        (0.0, "nan", 'fully_masked="zero"'),
        (0.0, "uniform", 'fully_masked="zero"'),
        (0.3, "zero", None),
    ],
)
def test_another_content_of_fully_masked_rows_is_named(fill, declared, phrase):
    weights = nan_rows().nan_to_num(nan=fill)
    cause = cause_of(weights, mask=TRIL, fully_masked=declared)
    if phrase is None:
        assert cause is None
    else:
        assert cause is not None
        assert phrase in cause


def test_a_mask_that_was_not_applied_is_named():
    assert "the mask was not applied" in cause_of(scores().softmax(-1), mask=TRIL)


def test_zero_rows_that_the_mask_does_not_explain_are_named_as_such():
    weights = scores().softmax(-1)
    weights[0, 0, 30] = 0
    cause = cause_of(weights, mask=torch.ones_like(TRIL))
    assert "this row holds only zeros although the mask permits keys" in cause


def test_nan_rows_that_the_mask_does_not_explain_are_named_as_such():
    cause = cause_of(nan_rows(), mask=torch.ones_like(TRIL))
    assert "8 rows are NaN, from weights[0, 0, 0, :] on" in cause
    assert "at every key although the mask permits some" in cause


def test_masked_keys_do_not_hide_a_softmax_over_queries():
    permitted = torch.arange(24) < 20
    weights = scores().softmax(-2) * permitted
    assert "softmax over the query axis" in cause_of(weights, mask=permitted.expand(32, 24))
    assert "softmax over the query axis" in cause_of(weights)


def causal(size, *lengths):
    """A causal mask whose batch entries are padded at the start, to these lengths."""
    keep = torch.stack([torch.arange(size) >= size - length for length in lengths])
    return torch.ones(size, size, dtype=torch.bool).tril() & keep[:, None, None, :]


def masked_softmax(mask, dim=-1, seed=0):
    shape = (mask.shape[0], 4, *mask.shape[2:])
    return scores(*shape, seed=seed).masked_fill(~mask, -torch.inf).softmax(dim).nan_to_num()


@pytest.mark.parametrize("size", [6, 16, 32])
def test_a_transposed_map_is_not_called_dropout_under_a_mask(size):
    mask = causal(size, size, size - 3)
    weights = masked_softmax(mask).mT
    said = r"every column( that holds weight)? sums to 1: softmax over the query axis"
    assert re.search(said, cause_of(weights, mask=mask))
    assert re.search(said, cause_of(weights))


def test_rows_that_are_merely_zero_are_not_called_a_softmax_over_queries():
    weights = torch.eye(6)
    weights[[1, 3]] = 0
    assert "2 of these rows hold only zeros" in cause_of(weights)


def test_one_full_column_is_not_called_a_softmax_over_queries():
    weights = torch.zeros(5, 5)
    weights[:, 2] = torch.tensor([0.1, 0.3, 0.2, 0.2, 0.2])
    assert "softmax over" not in (cause_of(weights) or "")


AFTERWARDS = "permitted keys sum to less than 1 and masked keys are 0: masked after the softmax"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_mask_applied_after_the_softmax_is_named(dtype):
    padding = (torch.arange(24) < torch.tensor([[24], [13]]))[:, None, None, :]
    for mask in (torch.ones(32, 24, dtype=torch.bool).tril(), padding):
        weights = scores().to(dtype).softmax(-1) * mask
        assert AFTERWARDS in cause_of(weights, mask=mask)
        assert "masked after" not in (cause_of(weights) or "")


@pytest.mark.parametrize("p", [0.1, 0.5])
def test_dropout_scaling_and_missing_weight_are_not_called_a_mask_after_the_softmax(p):
    mask = torch.ones(32, 24, dtype=torch.bool).tril()
    weights = scores().masked_fill(~mask, -torch.inf).softmax(-1)
    unscaled = dropout(weights, p) * (1 - p)
    one_row = weights.clone()
    one_row[0, 0, 0] *= 0.7
    for broken in (dropout(weights, p), unscaled, weights / 8, weights * (1 - p / 2), one_row):
        assert "masked after" not in (cause_of(broken, mask=mask) or "")
    factors = torch.linspace(0.5, 0.98, 32).unsqueeze(-1)
    padding = (torch.arange(24) < 22).expand(32, 24)
    padded = scores().masked_fill(~padding, -torch.inf).softmax(-1) * factors
    assert "masked after" not in (cause_of(padded, mask=padding) or "")
    late = causal(24, 22, 22)  # no row without a masked key
    weights = masked_softmax(late) * factors[:24].flip(0)
    assert "masked after" not in (cause_of(weights, mask=late) or "")


OPPOSITE = "all weight lies on keys that the mask forbids: a mask of the opposite meaning?"


@pytest.mark.parametrize("fill", [0.0, math.nan])
def test_a_mask_of_the_opposite_meaning_is_named(fill):
    used = torch.ones(24, 24, dtype=torch.bool).tril(-1)
    weights = scores(2, 4, 24, 24).masked_fill(~used, -torch.inf).softmax(-1)
    weights = weights.nan_to_num(nan=fill)
    cause = cause_of(weights, mask=~used)
    assert OPPOSITE in cause
    assert "pass ~mask" in cause
    assert OPPOSITE not in (cause_of(weights, mask=torch.ones_like(used)) or "")
    assert OPPOSITE in cause_of(weights, check=assert_uniform, mask=~used)
    fully_masked = scores(4, 24, 24).masked_fill(used, -torch.inf).softmax(-1)
    assert OPPOSITE in cause_of(fully_masked, mask=used)


def test_weight_on_masked_keys_of_uniform_rows_is_explained():
    mask = torch.ones(6, 8, dtype=torch.bool).tril(1)
    cause = cause_of(torch.full((2, 6, 8), 1 / 8), check=assert_uniform, mask=mask)
    assert "uniform over all keys, masked ones too: the mask was not applied?" in cause


@pytest.mark.parametrize("shape", [(1, 1, 8, 8), (2, 3, 4, 64), (1, 5)], ids=str)
def test_weights_that_are_all_one_are_called_a_softmax_over_one_thing(shape):
    cause = cause_of(torch.ones(shape))
    assert "every weight is 1: softmax over an axis of size 1?" in cause
    assert "scaled" not in cause


def test_dropout_is_recognised_under_a_mask():
    causal = torch.ones(32, 24, dtype=torch.bool).tril()
    weights = scores().masked_fill(~causal, -torch.inf).softmax(-1)
    for mask in (causal, None):
        assert "weights after dropout" in cause_of(dropout(weights, 0.2), mask=mask)


@pytest.mark.parametrize("case", UNDER_A_MASK)
def test_this_cause_is_named_under_a_mask_and_no_other(case):
    make, phrase = UNDER_A_MASK[case]
    cause = cause_of(make(), mask=causal(32, 32)[0, 0])
    assert cause is None if phrase is None else phrase in cause


def test_a_softmax_over_queries_is_named_where_no_query_sees_some_keys():
    weights = scores(1, 4, 5, 9).masked_fill(~causal(9, 9)[..., :5, :], -torch.inf).softmax(-2)
    assert weights.isnan().any()
    said = "every column that holds weight sums to 1: softmax over the query axis"
    assert said in cause_of(weights)
    assert said in cause_of(weights, mask=causal(9, 9)[..., :5, :])
    weights[..., 0] *= 1.1
    assert "there at 4 of 9 keys" in cause_of(weights)


def test_nan_in_every_row_is_not_called_a_fully_masked_one():
    weights = scores().index_fill(-1, torch.tensor(3), math.nan).softmax(-1)
    assert "which is all: NaN in a key, or no key left by the mask in use?" in cause_of(weights)


@pytest.mark.parametrize("seed", range(5))
def test_sparse_weights_that_are_off_are_not_called_dropout(seed):
    weights = scores(seed=seed).mul(4).softmax(-1)
    weights = weights * (weights > 0.05)  # small weights cut off, sums a little below 1
    assert "dropout" not in (cause_of(weights) or "")
    ten_percent_more = scores(seed=seed).relu().softmax(-1) * (1 + scores(2, 4, 32, 1) / 10)
    assert "dropout" not in (cause_of(ten_percent_more) or "")


def test_a_row_too_long_to_sample_fails_without_a_cause_of_that_kind():
    weights = torch.full((1, 200_000), 1 / 400_000)
    assert cause_of(weights) is None


def test_a_masked_key_with_far_less_weight_is_not_said_to_get_it_like_the_others():
    mask = torch.tensor([[True, True, True, False, False]])
    weights = scores(1, 5).masked_fill(~mask, -9.0).softmax(-1)
    for check in (assert_masked, assert_support):
        assert cause_of(weights, check=check, mask=mask) is None
    weights = scores(1, 5).softmax(-1)
    assert "no mask was applied?" in cause_of(weights, check=assert_masked, mask=mask)


def test_a_map_of_zeros_is_no_head_that_was_left_out_where_all_are():
    mask = torch.ones(6, 6, dtype=torch.bool).tril()
    weights = scores(1, 3, 6, 6).masked_fill(~mask, -torch.inf).softmax(-1)
    nothing = cause_of(weights * 0, check=assert_support, mask=mask)
    assert "nothing holds weight where the mask permits it: never written?" in nothing
    weights[:, 1] = 0
    assert "a head that was left out?" in cause_of(weights, check=assert_support, mask=mask)
