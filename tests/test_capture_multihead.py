"""Captured `nn.MultiheadAttention` and encoders, against their own weights, and without them."""

import pytest
import torch
from capture_oracles import Operators, assert_weights, bottom_right, draw, plain_weights
from torch import nn
from torch.nn import functional as F  # noqa: N812

from pytest_attnheat import capture_attention

NARROW = {"embed_dim": 8, "num_heads": 2}


def attention(**options):
    torch.manual_seed(3)
    return nn.MultiheadAttention(**{**NARROW, "batch_first": True, **options}).eval()


def own_weights(module, *inputs, **options):
    """The weights (batch, heads, query_len, key_len) that the module itself returns."""
    with torch.no_grad():
        options = {**options, "need_weights": True, "average_attn_weights": False}
        return module(*inputs, **options)[1]


def inputs(module, queries=5, keys=7):
    first = (2, queries, 8) if module.batch_first else (queries, 2, 8)
    second = (2, keys, module.kdim) if module.batch_first else (keys, 2, module.kdim)
    third = (*second[:-1], module.vdim)
    return draw("q", *first), draw("k", *second), draw("v", *third)


def captured(module, *given, **options):
    with torch.no_grad(), capture_attention(module) as trace:
        output = module(*given, **options)
    (record,) = trace
    assert record.trusted
    return record, output


@pytest.mark.parametrize("options", [
    {}, {"batch_first": False}, {"bias": False}, {"add_bias_kv": True}, {"add_zero_attn": True},
    {"add_bias_kv": True, "add_zero_attn": True}, {"kdim": 6, "vdim": 10}, {"num_heads": 1},
    {"num_heads": 8},
], ids=str)  # fmt: skip
@pytest.mark.parametrize("asked", [
    {"need_weights": False}, {"need_weights": True},
    {"need_weights": True, "average_attn_weights": False},
], ids=["not asked", "averaged", "of heads"])  # fmt: skip
def test_weights_are_those_of_the_module_whether_it_is_asked_or_not(options, asked):
    module = attention(**options)
    given = inputs(module)
    record, _ = captured(module, *given, **asked)
    assert record.layer == "MultiheadAttention"
    assert_weights(record, own_weights(module, *given))


@pytest.mark.parametrize("asked", [True, False])
def test_its_masks_mean_what_is_hidden_and_records_what_is_permitted(asked):
    module = attention()
    given = inputs(module)
    hidden = draw("mask", 5, 7) < -0.5
    padded = torch.tensor([[False] * 7, [False] * 4 + [True] * 3])
    options = {"attn_mask": hidden, "key_padding_mask": padded}
    record, _ = captured(module, *given, **options, need_weights=asked)
    assert_weights(record, own_weights(module, *given, **options))
    permitted = ~(hidden | padded[:, None, None, :]).expand(2, 2, 5, 7)
    assert torch.equal(record.mask.expand(2, 2, 5, 7), permitted)


@pytest.mark.parametrize("asked", [True, False])
def test_a_mask_of_each_batch_entry_and_head(asked):
    module = attention()
    given = inputs(module)
    hidden = draw("mask", 4, 5, 7) < -0.5
    record, _ = captured(module, *given, attn_mask=hidden, need_weights=asked)
    assert_weights(record, own_weights(module, *given, attn_mask=hidden))
    assert torch.equal(record.mask, ~hidden.view(2, 2, 5, 7))


@pytest.mark.parametrize("asked", [True, False])
def test_a_float_mask_is_a_bias(asked):
    module = attention()
    given = inputs(module)
    bias = draw("bias", 5, 7)
    record, _ = captured(module, *given, attn_mask=bias, need_weights=asked)
    assert_weights(record, own_weights(module, *given, attn_mask=bias))
    assert record.mask is None


@pytest.mark.parametrize("asked", [True, False])
def test_without_a_batch_axis(asked):
    module = attention()
    given = draw("q", 5, 8), draw("k", 7, 8), draw("v", 7, 8)
    record, _ = captured(module, *given, need_weights=asked)
    assert record.shape == (1, 2, 5, 7)
    assert_weights(record, own_weights(module, *given).unsqueeze(0))


def test_a_causal_hint():
    module = attention()
    x = draw("x", 2, 5, 8)
    hidden = ~bottom_right(5, 5)
    for asked in (True, False):
        record, _ = captured(module, x, x, x, attn_mask=hidden, is_causal=True, need_weights=asked)
        assert_weights(record, own_weights(module, x, x, x, attn_mask=hidden))
        assert torch.equal(record.mask.expand(2, 2, 5, 5)[0, 0], bottom_right(5, 5))


def test_the_function_itself():
    module = attention()
    q, k, v = inputs(module)
    expected = own_weights(module, q, k, v)
    with torch.no_grad(), capture_attention() as trace:
        output, weights = F.multi_head_attention_forward(
            *(t.transpose(0, 1) for t in (q, k, v)), 8, 2,
            module.in_proj_weight, module.in_proj_bias, None, None, False, 0.0,
            module.out_proj.weight, module.out_proj.bias, training=False,
            average_attn_weights=False,
        )  # fmt: skip
    assert trace[0].layer == ""
    assert_weights(trace[0], expected)
    with torch.no_grad():
        torch.testing.assert_close(output.transpose(0, 1), module(q, k, v)[0])
    assert torch.equal(weights, trace[0].weights)


def test_dropout_while_training_is_taken_off_where_weights_are_asked_for():
    module = attention(dropout=0.5).train()
    given = inputs(module)
    expected = own_weights(module.eval(), *given)
    module.train()
    torch.manual_seed(5)
    with capture_attention(module) as trace:
        module(*given, need_weights=True)
    assert trace[0].dropout == 0.5
    assert trace[0].trusted
    assert trace[0].residual < 1e-5
    assert_weights(trace[0], expected)


def test_capture_changes_no_number_and_no_gradient():
    module = attention(dropout=0.5).train()
    given = inputs(module)

    def run():
        torch.manual_seed(5)
        module.zero_grad()
        output, weights = module(*given)
        (output.square().sum() + weights.square().sum()).backward()
        return [output, weights, *(p.grad.clone() for p in module.parameters())]

    expected = run()
    with capture_attention(module):
        found = run()
    assert all(torch.equal(a, b) for a, b in zip(expected, found, strict=True))


def test_the_number_of_its_heads_is_nobody_elses():
    module, x = attention(num_heads=2), draw("x", 2, 5, 8)
    with torch.no_grad(), capture_attention() as trace:
        module(x, x, x)
        F.scaled_dot_product_attention(x, x, x)
    assert [record.shape for record in trace] == [(2, 2, 5, 5), (2, 1, 5, 5)]


# --- encoders and decoders


def encoder_layer(**options):
    torch.manual_seed(3)
    defaults = {"d_model": 8, "nhead": 2, "dim_feedforward": 16, "batch_first": True}
    return nn.TransformerEncoderLayer(**{**defaults, **options}).eval()


def encoder(**options):
    return nn.TransformerEncoder(encoder_layer(**options), 2, enable_nested_tensor=True).eval()


def by_hand(module, x, allowed=None):
    """The weights of an `nn.MultiheadAttention` that attends to x, from its parameters."""
    q, k, _ = F.linear(x, module.in_proj_weight, module.in_proj_bias).chunk(3, -1)
    q, k = (t.unflatten(-1, (module.num_heads, -1)).transpose(1, 2) for t in (q, k))
    return plain_weights(q, k, allowed=allowed)


def test_a_layer_with_padding():
    layer, x = encoder_layer(), draw("x", 2, 5, 8)
    padded = torch.tensor([[False] * 5, [False] * 3 + [True] * 2])
    with torch.no_grad(), capture_attention(layer) as trace:
        layer(x, src_key_padding_mask=padded)
    assert trace[0].layer == "self_attn"
    allowed = ~padded[:, None, None, :].expand(2, 2, 5, 5)
    assert_weights(trace[0], by_hand(layer.self_attn, x, allowed))
    assert torch.equal(trace[0].mask.expand(2, 2, 5, 5), allowed)


def test_an_encoder_with_padding_says_that_its_fast_path_was_off():
    model, x = encoder(), draw("x", 2, 5, 8)
    padded = torch.tensor([[False] * 5, [False] * 3 + [True] * 2])
    with torch.no_grad(), capture_attention(model) as trace:
        model(x, src_key_padding_mask=padded)
    assert trace.layers == ("layers.0.self_attn", "layers.1.self_attn")
    allowed = ~padded[:, None, None, :].expand(2, 2, 5, 5)
    assert_weights(trace[0], by_hand(model.layers[0].self_attn, x, allowed))
    assert trace.changes[0] == (
        "layers.0: PyTorch's fast path, if it takes it, was off while it was watched"
    )
    assert len(trace.changes) == 2


def test_a_decoder_layer_has_two_attentions():
    torch.manual_seed(3)
    layer = nn.TransformerDecoderLayer(8, 2, 16, batch_first=True).eval()
    x, memory = draw("x", 2, 5, 8), draw("memory", 2, 7, 8)
    hidden = ~bottom_right(5, 5)
    with torch.no_grad(), capture_attention(layer) as trace:
        layer(x, memory, tgt_mask=hidden, tgt_is_causal=True)
    assert trace.layers == ("self_attn", "multihead_attn")
    assert_weights(trace["self_attn"], by_hand(layer.self_attn, x, ~hidden))
    assert trace["multihead_attn"].shape == (2, 2, 5, 7)


def test_a_whole_transformer():
    torch.manual_seed(3)
    model = nn.Transformer(8, 2, 2, 2, 16, batch_first=True).eval()
    with torch.no_grad(), capture_attention(model) as trace:
        output = model(draw("x", 2, 5, 8), draw("y", 2, 4, 8))
    assert trace.layers == (
        "encoder.layers.0.self_attn", "encoder.layers.1.self_attn",
        "decoder.layers.0.self_attn", "decoder.layers.0.multihead_attn",
        "decoder.layers.1.self_attn", "decoder.layers.1.multihead_attn",
    )  # fmt: skip
    with torch.no_grad():
        torch.testing.assert_close(model(draw("x", 2, 5, 8), draw("y", 2, 4, 8)), output)


# --- where the fast path may run


CONDITIONS = {
    "plain": (True, {}),
    "float64": (True, {"dtype": torch.float64}),
    "no gradient is wanted": (True, {"gradients": True, "frozen": True}),
    "training": (False, {"training": True}),
    "gradients": (False, {"gradients": True}),
    "switched off": (False, {"enabled": False}),
}


@pytest.mark.parametrize("make", [encoder_layer, attention])
@pytest.mark.parametrize(("fused", "case"), CONDITIONS.values(), ids=CONDITIONS)
def test_the_fast_path_is_told_where_it_would_have_run(make, fused, case):
    module = make().to(case.get("dtype", torch.float32)).train(case.get("training", False))
    module.requires_grad_(not case.get("frozen"))
    x = draw("x", 2, 5, 8, dtype=case.get("dtype", torch.float32))
    given = (x,) if make is encoder_layer else (x, x, x)
    torch.backends.mha.set_fastpath_enabled(case.get("enabled", True))
    try:
        with torch.set_grad_enabled(case.get("gradients", False)):
            with Operators() as operators:
                module(*given)
            with capture_attention(module) as trace, Operators() as watched:
                module(*given)
    finally:
        torch.backends.mha.set_fastpath_enabled(True)
    assert bool(operators.fused) == fused
    assert watched.fused == []
    assert len(trace) == 1
    off = "PyTorch's fast path, if it takes it, was off while it was watched"
    assert trace.changes == ((f"{type(module).__name__}: {off}",) if fused else ())
