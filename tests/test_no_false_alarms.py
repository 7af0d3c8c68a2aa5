"""No assertion on code raises an alarm about code that is right.

The one matrix of assertions and rewrites, layers and models. Plain attention under every mask is a
test of each assertion's own; the examination of such functions is one of the contract's.
"""

from functools import partial

import pytest
import torch
from attention_subjects import (
    DTYPES,
    TRANSFORMERS,
    WIDTH,
    causal_encoder,
    encoder,
    encoder_layer,
    flex,
    multihead,
    of_transformers,
    plus_one,
    qkv,
    randn,
    repeated_keys,
    scaled_query,
    tokens,
)
from torch import nn
from torch.nn.functional import scaled_dot_product_attention as sdpa

import pytest_attnheat as attn

CAUSAL = torch.ones(7, 7, dtype=torch.bool).tril()


def maximum_first(query, key, value, attn_mask=None, is_causal=False):
    """The row maximum subtracted by hand, in float32."""
    mask = torch.ones(query.shape[-2], key.shape[-2], dtype=torch.bool)
    mask = mask.tril() if is_causal else mask
    mask = mask if attn_mask is None else mask & attn_mask
    wide = torch.promote_types(query.dtype, torch.float32)
    scores = query.to(wide) @ key.to(wide).mT / query.shape[-1] ** 0.5
    scores = scores.masked_fill(~mask, -torch.inf)
    weights = (scores - scores.amax(-1, keepdim=True).detach()).exp()
    weights = weights / weights.sum(-1, keepdim=True)
    return (weights @ value.to(wide)).to(value.dtype)


ON_FUNCTIONS = {
    "leakage": partial(attn.assert_no_leakage, is_causal=True),
    "leakage, masked": partial(attn.assert_no_leakage, attn_mask=CAUSAL),
    "padding": attn.assert_padding_invariant,
    "batch": attn.assert_batch_independent,
    "key order": attn.assert_key_permutation_invariant,
    "decoding": attn.assert_decode_matches_prefill,
    "layout": attn.assert_layout_invariant,
    "repeats": attn.assert_deterministic,
    "convex": partial(attn.assert_convex, is_causal=True),
    "reference": partial(attn.assert_matches_reference, is_causal=True),
    "gradients": attn.assert_gradients_match,
}
FUNCTIONS = [sdpa, plus_one, scaled_query, maximum_first, repeated_keys]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("function", FUNCTIONS, ids=lambda f: f.__name__)
@pytest.mark.parametrize("name", ON_FUNCTIONS)
def test_functions_and_equivalent_rewrites_pass_in_every_dtype(name, function, dtype):
    ON_FUNCTIONS[name](function, *qkv(2, 3, 7, 7, dtype=dtype))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("function", [sdpa, repeated_keys], ids=lambda f: f.__name__)
def test_grouped_heads_pass_in_every_dtype(function, dtype):
    query, key, value = qkv(heads=6, dtype=dtype)
    inputs = query, key[:, :3], value[:, :3]
    for assertion in (
        attn.assert_no_leakage,
        attn.assert_convex,
        attn.assert_decode_matches_prefill,
        attn.assert_matches_reference,
    ):
        assertion(function, *inputs, enable_gqa=True, is_causal=True)


# Its gradients are judged below, its layouts by the examination of it (`test_contract_report`),
# and what it sees by the tests of these assertions.
OWN = ("reference", "gradients", "layout", "leakage", "leakage, masked")
ON_FLEX = [n for n in ON_FUNCTIONS if n not in OWN]


@pytest.mark.parametrize("name", ON_FLEX)
def test_flex_attention_passes(name):
    ON_FUNCTIONS[name](flex, *qkv(2, 2, 7, 7))


def test_flex_attention_passes_without_gradients():
    inputs = qkv(2, 3, 7, 7)  # there is no backward on a CPU
    attn.assert_matches_reference(flex, *inputs, is_causal=True, gradients=False)


@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("name", [n for n in ON_FUNCTIONS if n not in ("reference", "gradients")])
def test_multihead_attention_passes_as_a_function(name, batch_first):
    if name == "convex":
        pytest.skip("it projects its values")
    x = randn(2, 7, WIDTH)
    ON_FUNCTIONS[name](multihead(batch_first), x, x, x)


ON_MODELS = {
    "leakage": attn.assert_no_leakage,
    "padding": attn.assert_padding_invariant,
    "batch": attn.assert_batch_independent,
    "layout": attn.assert_layout_invariant,
    "repeats": attn.assert_deterministic,
}


@pytest.mark.parametrize("name", ON_MODELS)
@pytest.mark.parametrize(
    "module", [multihead(), multihead(False), encoder_layer(), encoder_layer(False), encoder()],
    ids=["multihead", "multihead, batch second", "layer", "layer, batch second", "encoder"],
)  # fmt: skip
def test_encoders_of_torch_pass(name, module):
    options = {"lengths": [7, 5, 4]} if name == "leakage" else {}
    ON_MODELS[name](module, randn(3, 7, WIDTH), **options)
    attn.assert_key_permutation_invariant(module, randn(3, 7, WIDTH))


@pytest.mark.parametrize("name", ON_MODELS)
def test_a_decoder_of_torch_passes(name):
    model = attn.SequenceModel(causal_encoder(), mask="drop", mask_argument="padding")
    options = {"sides": "right"} if name == "padding" else {}
    ON_MODELS[name](model, tokens(3, 7), **options)
    attn.assert_decode_matches_prefill(model, tokens(3, 7))


@pytest.mark.parametrize(("model", "implementation"), TRANSFORMERS)
def test_models_of_transformers_repeat_themselves(model, implementation):
    # All other assertions pass them in tests of their own.
    attn.assert_deterministic(of_transformers(model, implementation), tokens(3, 7))


def test_dropout_of_torch_passes():
    inputs = qkv(2, 3, 32, 32)
    attn.assert_deterministic(sdpa, *inputs, dropout=0.2)
    layer = nn.TransformerEncoderLayer(WIDTH, 2, 32, dropout=0.2, batch_first=True).eval()
    attn.assert_deterministic(layer, randn(2, 7, WIDTH), dropout=0.2)
    module = nn.MultiheadAttention(WIDTH, 2, dropout=0.2, batch_first=True).eval()
    attn.assert_deterministic(module, randn(2, 7, WIDTH), dropout=0.2)
