"""The project's own pictures, held against `baseline_images/` as a user's would be."""

from dataclasses import replace

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

from pytest_attnheat import Trace, capture_attention, causal_mask, show_difference, show_heatmaps

pytestmark = pytest.mark.heatmap_compare
SENTENCE = "[CLS] The cat , said $x$ , sat on an antidisestablishmentarian mat . [SEP]"
TOKENS = SENTENCE.split()
SCORINGS = ("additive", "dot_product", "scaled_dot_product", "bilinear")


def uniform(*shape):
    return torch.rand(*shape, generator=torch.Generator().manual_seed(0))


def softmax(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0)).mul(2).softmax(-1)


def test_textbook_identity():
    return show_heatmaps(torch.eye(10).reshape(1, 1, 10, 10), xlabel="Keys", ylabel="Queries")


def test_textbook_uniform_random():
    return show_heatmaps(uniform(1, 1, 10, 10), xlabel="Keys", ylabel="Queries")


def test_textbook_two_queries():
    return show_heatmaps(softmax(1, 1, 2, 10), xlabel="Keys", ylabel="Queries")


# These four have baselines; a scoring function that is added needs none.
@pytest.mark.attention(scoring=SCORINGS, batch=1, heads=4, query_len=10, key_len=10)
def test_scoring_function(attention):
    titles = [f"Head {head}" for head in range(4)]
    return show_heatmaps(attention.weights, "Keys", "Queries", titles, (8, 2.5))


def test_layers_by_heads_under_a_causal_mask():
    mask = causal_mask(8, alignment="top_left")
    weights = softmax(2, 4, 8, 8) * mask
    return show_heatmaps(
        weights / weights.sum(-1, keepdim=True),
        xlabel="Keys",
        ylabel="Queries",
        titles=[f"Head {head}" for head in range(4)],
        figsize=(8, 4.5),
        title="A decoder",
        row_titles=["Layer 0", "Layer 1"],
        mask=mask,
        highlight=[(0, 1, 4), (1, 2, 6, 3)],
    )


def test_what_a_model_returns():
    attentions = tuple(softmax(3, 1, 4, 10, 10))  # as outputs.attentions
    return show_heatmaps(attentions, xlabel="Keys", ylabel="Queries")


def test_titles_of_matplotlib_on_black():
    figure = show_heatmaps(softmax(1, 2, 10, 10), xlabel="Keys", ylabel="Queries")
    figure.set_facecolor("black")
    figure.suptitle("Two heads")
    figure.axes[0].set_title("the first")
    figure.axes[1].set_title("the second", color="gold")
    return figure


def test_tokens_and_numbers():
    return show_heatmaps(
        softmax(len(TOKENS), len(TOKENS)),
        xlabel="Keys",
        ylabel="Queries",
        figsize=None,
        key_labels=TOKENS,
        query_labels=TOKENS,
        numbers=True,
    )


def test_panel_scales():
    weights = softmax(1, 3, 10, 10) * torch.tensor([1.0, 0.1, 0.01]).reshape(3, 1, 1)
    return show_heatmaps(weights, "Keys", "Queries", list("abc"), (7, 3), scale="panel")


def test_logits_with_a_gap():
    scores = softmax(10, 10).log()
    scores[3, 4] = torch.nan
    scores[6, 2:5] = -torch.inf
    return show_heatmaps(scores, "Keys", "Queries", cmap="viridis")


def test_one_weight_in_4096_by_4096():
    weights = torch.zeros(4096, 4096)
    weights[1234, 3000] = 1
    return show_heatmaps(weights, "Keys", "Queries")


def test_twelve_by_twelve_heads():
    return show_heatmaps(softmax(12, 12, 32, 32), "Keys", "Queries", figsize=(7, 7))


def test_two_maps_compared():
    expected = softmax(2, 3, 8, 8)
    actual = expected.clone()
    actual[1, 1, 3] = actual[1, 1, 3].roll(1)
    return show_difference(expected, actual)


@pytest.fixture(scope="module")
def model():
    """A decoder of 6 layers and 8 heads, in the order in which it attends."""
    query = uniform(6, 1, 8, len(TOKENS), 16).mul(6).sub(3)
    with capture_attention() as trace:
        for layer in query:
            scaled_dot_product_attention(layer, layer.roll(1, -1), layer, is_causal=True)
    return Trace(
        replace(record, layer=f"decoder.layers.{index}.attention", call=0)
        for index, record in enumerate(trace)
    )


def test_a_model_at_a_glance(model):
    return model.show(figsize="small")


def test_one_query_of_three_layers(model):
    return model[:3].show(query=9, tokens=TOKENS)


def test_one_query_of_a_decoder():
    return show_heatmaps(softmax(1, 6, 1, 50), "Keys", "Query", list("abcdef"), (9, 1.5))
