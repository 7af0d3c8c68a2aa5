"""Every scoring function, on every device: rows are distributions, and the picture holds still."""

import pytest

from pytest_attnheat import assert_row_stochastic, show_heatmaps


def test_rows_sum_to_one(attention):
    assert_row_stochastic(attention.weights)


@pytest.mark.attention(query_len=6, key_len=9, mask="causal_bottom_right", batch=1)
def test_rows_sum_to_one_under_a_causal_mask(attention):
    assert_row_stochastic(attention.weights, mask=attention.mask)


@pytest.mark.attention(kind="gating")
def test_a_sigmoid_gate_is_not_soft_attention(attention):
    with pytest.raises(AssertionError, match="sum to 1"):
        assert_row_stochastic(attention.weights)


@pytest.mark.heatmap_compare
@pytest.mark.attention(batch=1, heads=4, query_len=8, key_len=8, mask="causal_top_left")
def test_picture(attention):
    return show_heatmaps(
        attention.weights,
        xlabel="Keys",
        ylabel="Queries",
        titles=[f"Head {head}" for head in range(4)],
        figsize=(8, 2.5),
        mask=attention.mask,
    )
