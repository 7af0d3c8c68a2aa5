"""Small models of transformers as they come, and each without one thing that its modules carry."""

import copy
import importlib

import pytest
import torch
from attention_subjects import kept

from pytest_attnheat import (
    AttentionSpec,
    SequenceModel,
    assert_row_stochastic,
    capture_attention,
    check_attention,
)
from pytest_attnheat.contract import captured, explaining

transformers = pytest.importorskip("transformers")
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")

SMALL = {
    "vocab_size": 100, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "intermediate_size": 48, "max_position_embeddings": 64,
    "pad_token_id": 0, "eos_token_id": 1, "bos_token_id": 2,
}  # fmt: skip
ONE_OF_EACH = {"sliding_window": 4, "layer_types": ["sliding_attention", "full_attention"]}
# Eager attention is what has no other.
CONFIGS = {
    "GptOss": {**SMALL, **ONE_OF_EACH, "head_dim": 8, "num_local_experts": 2,
               "num_experts_per_tok": 1},
    "Gemma2": {**SMALL, **ONE_OF_EACH, "head_dim": 8, "attn_logit_softcapping": 5.0,
               "query_pre_attn_scalar": 5},
    "Granite": {**SMALL, "attention_multiplier": 0.2},
    "Bloom": {"vocab_size": 100, "hidden_size": 32, "n_layer": 2, "n_head": 4},
    "Mpt": {"vocab_size": 100, "d_model": 32, "n_heads": 4, "n_layers": 2, "max_seq_len": 64},
    "T5": {"vocab_size": 100, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2,
           "num_heads": 4},
    "Llama4Text": {**SMALL, "head_dim": 8, "intermediate_size_mlp": 48, "num_local_experts": 2,
                   "num_experts_per_tok": 1, "attention_chunk_size": 5, "no_rope_layers": [1, 0],
                   "layer_types": ["chunked_attention", "full_attention"]},
    "Mistral": {**SMALL, "sliding_window": 4},
    "Cohere2": {**SMALL, **ONE_OF_EACH},
    "DeepseekV3": {**SMALL, "num_key_value_heads": 4, "q_lora_rank": 12, "kv_lora_rank": 8,
                   "qk_rope_head_dim": 4, "qk_nope_head_dim": 8, "v_head_dim": 6,
                   "n_routed_experts": 2, "n_shared_experts": 1, "num_experts_per_tok": 1,
                   "n_group": 1, "topk_group": 1, "moe_intermediate_size": 16,
                   "first_k_dense_replace": 2},
}  # fmt: skip
EAGER_ALONE = ("GptOss", "Gemma2", "Bloom", "Mpt")
IDS = torch.randint(3, 100, (2, 9), generator=torch.Generator().manual_seed(0))


def built(name, implementation="eager"):
    config = getattr(transformers, f"{name}Config")(**CONFIGS[name])
    config._attn_implementation = implementation
    torch.manual_seed(3)
    kind = getattr(transformers, "T5EncoderModel" if name == "T5" else f"{name}Model")
    model = kind(copy.deepcopy(config)).eval()
    # As they are drawn, weights make attention that is almost uniform, which hides errors.
    with torch.no_grad():
        for of, parameter in model.named_parameters():
            if parameter.ndim == 2 and "embed" not in of and "relative" not in of:
                parameter.mul_(8)
            elif "relative" in of or of.endswith("sinks"):
                parameter.normal_()
    return model


def traced(model):
    with torch.no_grad(), capture_attention(model) as trace:
        model(IDS)
    return trace


def as_block(model, name, **declared):
    causal = None if name == "T5" else "top_left"
    return AttentionSpec(SequenceModel(model), inputs=IDS, causal=causal, **declared)


def inside(subject):
    report = check_attention(subject)
    (result,) = [r for r in report.results if r.name == "attention_inside"]
    return result


@pytest.mark.parametrize(
    ("name", "implementation"),
    [(name, "eager") for name in CONFIGS]
    + [(name, "sdpa") for name in CONFIGS if name not in EAGER_ALONE],
)
def test_a_model_passes_as_a_trace_and_as_a_block_with_nothing_declared(name, implementation):
    model = built(name, implementation)
    trace = traced(model)
    assert len(trace) == 2
    assert not any(record.strange for record in trace)
    report = check_attention(trace)
    assert report.passed, str(report)
    assert {r.name: r.status for r in report.results}["attention_inside"] == "passed"
    result = inside(as_block(model, name))
    assert result.status == "passed"
    # An older T5 has no field for its scale, which is 1: that is said, and no more.
    unsaid = name == "T5" and not hasattr(model.encoder.block[0].layer[0].SelfAttention, "scaling")
    assert bool(result.message) == unsaid
    assert_row_stochastic(trace)


LEFT = torch.tensor([[1] * 9, [0] * 3 + [1] * 6])
RIGHT = torch.tensor([[1] * 9, [1] * 6 + [0] * 3])


@pytest.mark.parametrize("name", ["GptOss", "Gemma2", "Bloom", "Mpt", "Mistral"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_padded_batch_passes_whatever_its_padding_attends_to(name, dtype):
    model = built(name).to(dtype)
    for mask in (LEFT, RIGHT):
        with torch.no_grad(), capture_attention(model) as trace:
            model(IDS, attention_mask=mask)
        report = check_attention(trace)
        assert report.passed, str(report)


def test_a_softmax_in_float32_is_judged_as_one():
    model = built("Mistral").double()
    trace = traced(model)
    assert {record.dtype for record in trace} == {torch.float32}
    assert check_attention(trace).passed


def test_a_step_of_decoding_is_held_to_the_same_window():
    model = built("Gemma2")
    with torch.no_grad():
        cache = model(IDS[:, :6], use_cache=True).past_key_values
        with capture_attention(model) as trace:
            model(IDS[:, 6:], **kept(model, cache), use_cache=True)
    # A cache of the window, or of all that was, and the new keys.
    assert trace[0].shape in {(2, 4, 3, 6), (2, 4, 3, 9)}
    assert check_attention(trace).passed


def test_a_record_has_what_its_attention_had():
    (sliding, _) = traced(model := built("GptOss"))
    assert torch.equal(sliding.sinks, model.layers[0].self_attn.sinks)
    whole = sliding.weights.sum(-1) + sliding.sink_weights
    torch.testing.assert_close(whole, torch.ones(2, 4, 9))
    assert {one.name for one in sliding.carried} == {"scaling", "sliding_window", "sinks"}
    assert int(sliding.mask[0, 0].sum()) == sum(min(4, row + 1) for row in range(9))
    (record, _) = traced(built("Gemma2"))
    assert (record.softcap, record.scale) == (5.0, 5**-0.5)
    assert {record.scale for record in traced(built("T5"))} == {1.0}
    (record, _) = traced(built("Bloom"))
    assert record.scale == pytest.approx(8**-0.5)
    slopes = record.bias.masked_fill(~record.mask, 0)[0].diff(dim=-1)[:, -1, 0]
    torch.testing.assert_close(slopes, 2.0 ** -torch.arange(2.0, 9, 2))


def without(**arguments):
    """Let eager attention be called with other arguments than the model gives it."""

    def change(module, monkeypatch):
        eager = module.eager_attention_forward
        changed = lambda *args, **given: eager(*args, **{**given, **arguments})  # noqa: E731
        monkeypatch.setattr(module, "eager_attention_forward", changed)

    return change


def without_mask(function):
    def change(module, monkeypatch):
        monkeypatch.setattr(module, function, module.create_causal_mask)

    return change


def without_sinks(module, monkeypatch):
    llama = importlib.import_module("transformers.models.llama.modeling_llama")
    monkeypatch.setattr(module, "eager_attention_forward", llama.eager_attention_forward)


WINDOW, CHUNK = "create_sliding_window_causal_mask", "create_chunked_causal_mask"
DROPPED = {
    "sinks of GPT-OSS": ("GptOss", without_sinks, "without the sinks that its module carries"),
    "window of GPT-OSS": ("GptOss", without_mask(WINDOW), "without the window of 4 keys"),
    "softcap of Gemma 2": ("Gemma2", without(softcap=None), "without the softcap of 5 that"),
    "another softcap in Gemma 2": ("Gemma2", without(softcap=9.0), "with a softcap of 9, not that"),
    "scale of Gemma 2": ("Gemma2", without(scaling=8**-0.5), "carries scaling = 0.4472"),
    "scale of Granite": ("Granite", without(scaling=8**-0.5), "carries scaling = 0.2"),
    "scale 1 of T5": ("T5", without(scaling=8**-0.5), "carries scaling = 1"),
    "chunks of Llama 4": ("Llama4Text", without_mask(CHUNK), "without the chunk of 5 keys"),
    "window of Mistral": ("Mistral", without_mask(WINDOW), "(config.sliding_window)"),
    "window of Cohere 2": ("Cohere2", without_mask(WINDOW), "without the window of 4 keys"),
    "scale of DeepSeek V3": ("DeepseekV3", without(scaling=6**-0.5), "carries scaling = 0.2887"),
}


@pytest.mark.parametrize(("name", "change", "words"), DROPPED.values(), ids=DROPPED)
def test_attention_without_what_its_module_carries_is_found(name, change, words, monkeypatch):
    model = built(name)
    change(importlib.import_module(type(model).__module__), monkeypatch)
    for subject in (traced(model), as_block(model, name)):
        result = inside(subject)
        assert result.status == "failed"
        assert words in result.message


def test_a_scale_that_a_module_was_given_is_held_against_its_configuration():
    model = built("Granite")
    for layer in model.layers:
        layer.self_attn.scaling = 8**-0.5
    result = inside(traced(model))
    assert "where its module carries config.attention_multiplier = 0.2" in result.message


@pytest.fixture
def no_long_search(monkeypatch):
    judge = explaining.explained  # and no search, which takes seconds
    monkeypatch.setattr(captured, "explained", lambda *a, **k: judge(*a, **{**k, "search": False}))


SLOPES = 2.0 ** -torch.arange(2.0, 9, 2)


@pytest.mark.parametrize(
    ("name", "function"), [("Bloom", "_get_alibi_slopes"), ("Mpt", "build_mpt_alibi_tensor")]
)
@pytest.mark.usefixtures("no_long_search")
def test_alibi_that_is_declared_is_held_against_its_attention(name, function, monkeypatch):
    model = built(name)
    assert inside(AttentionSpec(traced(model), alibi=SLOPES)).status == "passed"
    assert inside(as_block(model, name, alibi=lambda heads: SLOPES)).status == "passed"
    module = importlib.import_module(type(model).__module__)
    slopes = getattr(module, function)
    monkeypatch.setattr(module, function, lambda *args, **given: 0 * slopes(*args, **given))
    trace = traced(model)
    assert inside(trace).status == "passed"  # nothing says that it should be there
    assert inside(AttentionSpec(trace, alibi=SLOPES)).status == "failed"


@pytest.mark.usefixtures("no_long_search")
def test_relative_biases_that_are_declared_are_held_against_their_attention(monkeypatch):
    model = built("T5")
    table = model.encoder.block[0].layer[0].SelfAttention.compute_bias(9, 9)[0].detach()
    declared = {"score_mod": lambda score, batch, head, query, key: score + table[head, query, key]}
    assert inside(AttentionSpec(traced(model), **declared)).status == "passed"
    without(position_bias=None)(importlib.import_module(type(model).__module__), monkeypatch)
    assert inside(traced(model)).status == "passed"  # nothing says that it should be there
    assert inside(AttentionSpec(traced(model), **declared)).status == "failed"
