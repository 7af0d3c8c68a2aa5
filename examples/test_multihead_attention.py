"""PyTorch's own layer."""

import pytest
import torch

from pytest_attnheat import assert_row_stochastic, causal_mask, show_heatmaps


@pytest.fixture
def layer(attn_device):
    torch.manual_seed(0)
    return torch.nn.MultiheadAttention(32, 4, batch_first=True).to(attn_device).eval()


@pytest.fixture
def sequence(attn_device):
    return torch.randn(2, 10, 32, generator=torch.Generator().manual_seed(1)).to(attn_device)


def weights_of(layer, sequence, **options):
    with torch.no_grad():
        return layer(sequence, sequence, sequence, average_attn_weights=False, **options)[1]


def test_rows_sum_to_one(layer, sequence):
    assert_row_stochastic(weights_of(layer, sequence))


@pytest.mark.heatmap_compare
def test_causal_picture(layer, sequence):
    may_attend = causal_mask(10, alignment="top_left", device=sequence.device)
    # This layer's masks are True where a query may *not* attend.
    weights = weights_of(layer, sequence, attn_mask=~may_attend)
    assert_row_stochastic(weights, mask=may_attend)
    return show_heatmaps(
        weights,
        xlabel="Keys",
        ylabel="Queries",
        titles=[f"Head {head}" for head in range(4)],
        row_titles=["Sample 0", "Sample 1"],
        figsize=(8, 4.5),
        mask=may_attend,
    )
