"""What the assertions about the batch and about the order of keys accept, find and say."""

import pytest
import torch
from attention_subjects import (
    DTYPES,
    TRANSFORMERS,
    VOCABULARY,
    WIDTH,
    Restless,
    causal_encoder,
    encoder,
    encoder_layer,
    multihead,
    of_transformers,
    plain,
    qkv,
    randn,
    tokens,
)
from devices import on_accelerators
from torch import nn
from torch.nn import functional

from pytest_attnheat.assertions.behaviour.invariance import (
    assert_batch_independent,
    assert_key_permutation_invariant,
)
from pytest_attnheat.assertions.behaviour.sequences import SequenceModel

SDPA = functional.scaled_dot_product_attention
BOTH = pytest.mark.parametrize(
    "assertion", [assert_batch_independent, assert_key_permutation_invariant]
)
DROP = torch.tensor([[1, 0, 1, 1, 0, 1]] * 3 + [[1] * 6] * 2 + [[0] * 6], dtype=torch.bool)
# The first sample may see all, the second the first four keys.
RAGGED = (torch.arange(6) < torch.tensor([6, 4])[:, None])[:, None, None]
STEEP = torch.linspace(-2, 2, 36).reshape(6, 6)


def message_of(assertion, subject, *inputs, **options):
    with pytest.raises(AssertionError) as error:
        assertion(subject, *inputs, **options)
    return str(error.value)


def in_batch(subject, *inputs, **options):
    return message_of(assert_batch_independent, subject, *inputs, **options)


def in_order(subject, *inputs, **options):
    return message_of(assert_key_permutation_invariant, subject, *inputs, **options)


# --- Correct subjects


@BOTH
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("function", [SDPA, plain], ids=["sdpa", "plain"])
@pytest.mark.parametrize("mask", [None, DROP, RAGGED, STEEP], ids=["none", "some", "ragged", "add"])
def test_functions_of_pytorch_and_by_hand_pass_whatever_their_mask(
    assertion, function, mask, dtype
):
    if mask is not None and mask.dtype != torch.bool:
        mask = mask.to(dtype)
    assertion(function, *qkv(dtype=dtype), attn_mask=mask)


@BOTH
def test_grouped_heads_and_other_numbers_of_queries_and_keys_pass(assertion):
    query, _, _ = qkv(heads=4, query_len=3)
    _, key, value = qkv(heads=2, key_len=7)
    assertion(SDPA, query, key, value, enable_gqa=True)
    assertion(plain, *qkv(query_len=9, key_len=2))


@BOTH
@pytest.mark.parametrize("batch_first", [True, False])
def test_modules_of_pytorch_pass_with_padding_and_without(assertion, batch_first):
    inputs = [randn(3, 5, WIDTH, seed=seed) for seed in range(3)]
    assertion(multihead(batch_first), *inputs)
    assertion(multihead(batch_first), *inputs, attn_mask=randn(3, 5, 5) > -0.5)
    for module in (multihead(batch_first), encoder_layer(batch_first), encoder()):
        assertion(module, inputs[0])
        assertion(module, inputs[0], lengths=[5, 2, 1])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("name", "implementation"), TRANSFORMERS)
def test_models_of_transformers_take_every_sample_for_itself(name, implementation, dtype):
    model = of_transformers(name, implementation, dtype)
    assert_batch_independent(model, tokens(3, 5))
    assert_batch_independent(model, tokens(6, 4), lengths=[4, 1, 2, 3, 4, 4])


@BOTH
def test_a_mask_that_the_caller_makes_follows_its_samples_and_its_tokens(assertion):
    inputs = randn(3, 5, WIDTH)
    masked = torch.zeros(5, 5, dtype=torch.bool)
    masked[1, 2] = masked[3, 0] = masked[3, 4] = True
    padding = torch.arange(5) >= torch.tensor([[5], [2], [3]])
    assertion(encoder_layer(), inputs, src_mask=masked)
    # The padding of src_key_padding_mask has outputs too, and no mask of lengths.
    assertion(encoder_layer(), inputs, src_key_padding_mask=padding)


# --- Samples that depend on one another


def test_softmax_over_the_batch_is_named_by_its_numbers():
    def wrong(query, key, value):
        return (query @ key.mT * query.shape[-1] ** -0.5).softmax(0) @ value

    message = in_batch(wrong, *qkv())
    assert message.startswith(
        "assert_batch_independent: 36 of 36 rows are not the same in the batch as alone, in "
        "samples 0, 1\n"
    )
    assert "\n  worst    output[" in message
    assert " of its size (allowed 2.0e-05)\n" in message
    assert (
        "\n  cause    the output is that of attention whose softmax runs over the batch (dim=0)"
        in message
    )
    assert "\n  tensor   float32 (2, 3, 6, 10) on cpu\n  repeat   seed=0" in message


def test_a_mean_over_the_batch_is_no_softmax_and_says_on_whom_a_sample_depends():
    message = in_batch(lambda q, k, v: SDPA(q, k, v) + v.mean((0, 2), keepdim=True), *qkv(batch=4))
    assert "cause    sample 0 changes with samples 1, 2, 3: a mean, a norm or a softmax" in message


def test_batch_norm_in_training_mode_is_named():
    class Normed(nn.Module):
        def __init__(self, **options):
            super().__init__()
            self.norm = nn.BatchNorm1d(WIDTH, **options)

        def forward(self, x):
            x = self.norm(x.mT).mT
            return SDPA(x, x, x)

    module = Normed()
    assert_batch_independent(module.eval(), randn(3, 5, WIDTH))
    cause = "takes its mean and variance from the batch: call .eval()"
    message = in_batch(module.train(), randn(3, 5, WIDTH))
    assert f"cause    BatchNorm1d 'norm' in training mode {cause}" in message
    assert module.norm.running_mean.eq(0).all()
    message = in_batch(Normed(track_running_stats=False).eval(), randn(3, 5, WIDTH))
    assert f"cause    BatchNorm1d 'norm' without running statistics {cause}" in message


def test_the_mask_of_the_first_sample_taken_for_all_is_named():
    def wrong(query, key, value, attn_mask):
        return SDPA(query, key, value, attn_mask[:1])

    message = in_batch(wrong, *qkv(), attn_mask=RAGGED)
    assert "18 of 36 rows are not the same in the batch as alone, in sample 1\n" in message
    assert "\n  worst    output[1, " in message
    assert "whose samples all use the mask of the first one" in message


def test_a_mean_over_two_samples_is_not_taken_for_an_exchange():
    def mean(query, key, value):
        output = SDPA(query, key, value)
        return output + output.mean(0, keepdim=True)

    message = in_batch(mean, *qkv())
    assert "exchanged" not in message
    assert "cause    sample 0 changes with sample 1: a mean, a norm or a softmax over" in message


def test_two_samples_that_are_exchanged_are_named():
    def wrong(query, key, value):
        exchanged = [0, 2, 1] if query.shape[0] == 3 else [0]
        return SDPA(query, key, value)[exchanged]

    message = in_batch(wrong, *qkv(batch=3))
    assert "36 of 54 rows are not the same in the batch as alone, in samples 1, 2\n" in message
    assert "cause    sample 1 changes with sample 2: a mean, a norm or a softmax over" in message


def test_heads_and_samples_in_one_reshape_without_a_transpose_are_found():
    def wrong(x):
        batch, length, width = x.shape
        heads = x.reshape(batch * 2, length, width // 2)
        heads = SDPA(heads, heads, heads).reshape(2, batch, length, width // 2)
        return heads.permute(1, 2, 0, 3).reshape(batch, length, width)

    message = in_batch(wrong, randn(3, 4, WIDTH))
    assert "rows are not the same in the batch as alone" in message
    assert "cause    sample " in message


def test_a_sample_that_its_place_changes_is_named():
    def wrong(query, key, value):
        return SDPA(query, key, value) * torch.arange(1.0, 1 + len(query)).reshape(-1, 1, 1, 1)

    message = in_batch(wrong, *qkv())
    assert "18 of 36 rows are not the same in the batch as alone, in sample 1\n" in message
    assert "cause    sample 1 changes with its place in a batch of the same size: an" in message


@pytest.mark.parametrize("sample", [0, 3, 8])
def test_one_wrong_sample_of_nine_is_found_also_where_it_is_not_run_alone(sample):
    def wrong(query, key, value):
        output = SDPA(query, key, value)
        if len(query) == 9:
            output[sample] *= 1.5
        return output

    message = in_batch(wrong, *qkv(batch=9))
    alone = f"18 of 72 rows are not the same in the batch as alone, in sample {sample}\n"
    assert alone in message or "rows change when the samples of the batch change" in message
    assert alone not in message or f"worst    output[{sample}, " in message
    assert "with its place in a batch of the same size" in message


def test_a_scale_from_the_largest_number_of_the_batch_is_not_called_the_mask_of_the_first_sample():
    def rounded(query, key, value):
        scale = value.abs().max() / 127
        return SDPA(query, key, (value / scale).round() * scale)

    query, key, value = qkv(batch=4)
    value[0] *= 3
    message = in_batch(rounded, query, key, value)
    assert "cause    sample 1 changes with sample 0: a mean, a norm or a softmax" in message
    assert ", a scale from its largest number, or" in message


def test_a_number_that_several_samples_share_is_said_to_be_of_all_of_them():
    def rounded(query, key, value):
        scale = value.abs().amax((1, 2, 3)).topk(min(2, len(value))).values[-1] / 3
        return SDPA(query, key, (value / scale).round() * scale)

    query, key, value = qkv(batch=4)
    value[:3] *= 3
    value[1:3] = value[:1]
    message = in_batch(rounded, query, key, value)
    assert "cause    sample 3 changes with the other samples together, and with none of" in message


def test_a_large_batch_is_run_a_few_times_only():
    calls = []

    def counted(query, key, value):
        calls.append(len(query))
        return SDPA(query, key, value)

    assert_batch_independent(counted, *qkv(batch=40))
    assert sorted(calls) == [1] * 4 + [40] * 3
    calls.clear()
    assert_batch_independent(counted, *qkv(batch=3))
    assert sorted(calls) == [1] * 3 + [3] * 3


@pytest.mark.parametrize("seed", range(6))
def test_the_samples_always_change_places(seed):
    query, key, value = qkv(seed=seed)
    seen = []

    def remembered(query, key, value):
        seen.append(query)
        return SDPA(query, key, value)

    assert_batch_independent(remembered, query, key, value, seed=seed)
    assert any(torch.equal(given, query[[1, 0]]) for given in seen)


def test_padding_is_not_judged_and_comes_with_its_sample():
    def noisy_in_padding(x, keep):
        return SDPA(x, x, x, keep[:, None]) + (~keep)[..., None] * x.sum(0)

    model = SequenceModel(noisy_in_padding, "keep", "keep")
    assert_batch_independent(model, randn(3, 5, WIDTH), lengths=[5, 2, 1])
    # Without lengths the outputs of the two tokens of padding in sample 1 count.
    keep = torch.arange(5) < torch.tensor([[5], [3]])
    message = in_batch(noisy_in_padding, randn(2, 5, WIDTH), keep=keep)
    assert "2 of 10 rows are not the same in the batch as alone, in sample 1\n" in message


def test_a_cause_that_cannot_be_asked_for_does_not_hide_the_failure():
    def wrong(query, key, value):
        if len(query) > 1 and torch.equal(query[0], query[1]):
            raise RuntimeError("no copies")
        return SDPA(query, key, value) + query.mean() * (len(query) > 1)

    assert in_batch(wrong, *qkv()).startswith("assert_batch_independent: 36 of 36 rows")


# --- Orders that are felt


def test_positions_inside_a_function_are_felt():
    def alibi(query, key, value):
        bias = -(torch.arange(6) - torch.arange(6)[:, None]).abs()
        return SDPA(query, key, value, bias.to(query))

    message = in_order(alibi, *qkv())
    assert message.startswith(
        "assert_key_permutation_invariant: 36 of 36 rows change when keys and values are reversed\n"
    )
    assert "\n  cause    the places of keys are felt: positions (rotary, ALiBi)" in message
    assert "\n  tensor   float32 (2, 3, 6, 10) on cpu\n  repeat   seed=0" in message


def test_a_causal_mask_inside_a_function_is_named():
    message = in_order(lambda q, k, v: SDPA(q, k, v, is_causal=True), *qkv())
    assert "cause    the output is that of attention that is causal without being asked" in message


@pytest.mark.parametrize(("kept", "name"), [(slice(None, -1), "last"), (slice(1, None), "first")])
def test_a_key_that_is_left_out_is_named(kept, name):
    message = in_order(lambda q, k, v: SDPA(q, k[..., kept, :], v[..., kept, :]), *qkv())
    assert f"that of attention that never sees the {name} key" in message


def test_a_mask_that_does_not_follow_its_keys_is_found():
    message = in_order(lambda q, k, v, attn_mask: SDPA(q, k, v, RAGGED), *qkv(), attn_mask=RAGGED)
    assert "18 of 36 rows change when keys and values are reversed" in message
    assert "or a mask that does not follow its keys?" in message
    message = in_order(lambda q, k, v, attn_mask: SDPA(q, k, v, DROP), *qkv(), attn_mask=DROP)
    assert "of 30 rows change" in message  # the last query may see nothing


@pytest.mark.parametrize(
    ("order", "name"), [([5, 4, 3, 2, 1, 0], "reversed"), ([5, 0, 1, 2, 3, 4], "rotated by one")]
)
def test_the_order_that_is_felt_is_named(order, name):
    marked = qkv()[1]

    def wrong(query, key, value):
        if torch.equal(key, marked[..., order, :]):
            value = -value
        return SDPA(query, key, value)

    assert f"36 of 36 rows change when keys and values are {name}\n" in in_order(wrong, *qkv())


def test_a_third_order_is_drawn_from_the_seed():
    # Neither the reverse nor a rotation changes who the neighbours are.
    def neighbours(query, key, value):
        return SDPA(query, key, value) + (key * key.roll(1, -2)).sum()

    message = in_order(neighbours, *qkv(dtype=torch.float64), seed=4)
    assert "rows change when keys and values are shuffled" in message
    assert message.endswith("repeat   seed=4")
    other = in_order(neighbours, *qkv(dtype=torch.float64), seed=5)
    assert other.splitlines()[1] != message.splitlines()[1]


class Positions(nn.Module):
    """Self-attention of tokens that know their places."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.embedding, self.places = nn.Embedding(VOCABULARY, WIDTH), nn.Embedding(16, WIDTH)

    def forward(self, ids):
        x = self.embedding(ids) + self.places(torch.arange(ids.shape[1]))
        return SDPA(x, x, x)


def test_position_embeddings_of_a_model_are_named():
    message = in_order(Positions(), tokens(2, 5))
    assert message.startswith(
        "assert_key_permutation_invariant: 10 of 10 rows change when the sequence is reversed\n"
    )
    assert "cause    the order of tokens is felt: position embeddings" in message


def test_a_causal_mask_of_a_model_is_named():
    message = in_order(causal_encoder(), tokens(2, 5))
    assert "cause    the first token does not feel the others: a causal mask?" in message


@pytest.mark.parametrize(("name", "implementation"), TRANSFORMERS)
def test_models_of_transformers_know_the_order_of_their_tokens(name, implementation):
    message = in_order(of_transformers(name, implementation), tokens(2, 5))
    causal = "the first token does not feel the others" in message
    assert causal == (name != "bert")


def test_a_token_is_named_by_the_place_it_had():
    def wrong(x):
        output = x.clone()
        output[1] += (x[1] == marked) * float(not torch.equal(x[0, 0], first)) * 10
        return output

    x = randn(2, 5, WIDTH)
    first, marked = x[0, 0], x[1, 3]
    message = in_order(wrong, x)
    assert "1 of 10 rows change when the sequence is reversed" in message
    assert "worst    output[1, 3] is off by up to 10," in message


# --- Arguments, and what is left behind


@BOTH
@pytest.mark.parametrize("count", [0, 2, 4])
def test_any_other_number_of_inputs_is_refused(assertion, count):
    with pytest.raises(TypeError, match=rf"inputs: got {count} for .*; accepted is three \(query"):
        assertion(SDPA, *[randn(2, 2, 3)] * count)


@BOTH
def test_a_sequence_model_is_given_one_input(assertion):
    with pytest.raises(TypeError, match="inputs: got 3 for SequenceModel; accepted is three"):
        assertion(SequenceModel(multihead()), *[randn(2, 5, WIDTH)] * 3)


def test_inputs_in_which_nothing_could_be_seen_are_refused():
    with pytest.raises(ValueError, match=r"query: got shape \(1, .*two samples or more"):
        assert_batch_independent(SDPA, *qkv(batch=1))
    with pytest.raises(ValueError, match=r"query: got shape \(6, 8\); accepted is \(batch, \.\.\."):
        assert_batch_independent(SDPA, *(t[0, 0] for t in qkv()))
    with pytest.raises(
        ValueError, match="key: got one element, which has no other order; accepted is two"
    ):
        assert_key_permutation_invariant(SDPA, *qkv(key_len=1))
    with pytest.raises(
        ValueError,
        match="is_causal: got True, under which their order matters; accepted is attn_mask=",
    ):
        assert_key_permutation_invariant(SDPA, *qkv(), is_causal=True)


@BOTH
def test_lengths_without_a_mask_are_refused(assertion):
    with pytest.raises(ValueError, match=r"Positions is not told which tokens are .*: ids$"):
        assertion(Positions(), tokens(2, 5), lengths=[5, 3])
    with pytest.raises(
        ValueError, match=r"lengths: got .*; accepted is None for an attention function"
    ):
        assertion(SDPA, *qkv(), lengths=[5, 3])


@BOTH
def test_a_mask_that_can_be_read_in_two_ways_is_refused(assertion):
    with pytest.raises(ValueError, match=r"src_mask: got shape \(5, 5\), \(batch, length\) or"):
        assertion(encoder_layer(), randn(5, 5, WIDTH), src_mask=torch.zeros(5, 5))


@BOTH
def test_the_tolerance_of_the_caller_counts(assertion):
    def wrong(query, key, value):
        felt = len(query) > 1 if assertion is assert_batch_independent else key[0, 0, 0, 0] > 0
        return SDPA(query, key, value) * (1 + 1e-4 * felt)

    key = torch.where(torch.arange(6)[:, None] == 0, 1.0, -1.0) * qkv()[1].abs()
    inputs = (qkv()[0], key, qkv()[2])
    assert "(allowed 2.0e-05)" in message_of(assertion, wrong, *inputs)
    assertion(wrong, *inputs, tolerance=2e-4)
    with pytest.raises(ValueError, match=r"tolerance: got 1\.5"):
        assertion(wrong, *inputs, tolerance=1.5)


@BOTH
def test_dropout_is_refused_or_named(assertion):
    layer = nn.TransformerEncoderLayer(WIDTH, 2, 32, dropout=0.5, batch_first=True).train()
    with pytest.raises(ValueError, match=r"in training mode.*call \.eval\(\) on it"):
        assertion(layer, randn(2, 5, WIDTH))
    message = message_of(assertion, layer, randn(2, 5, WIDTH), training=True)
    assert "cause    training=True: dropout draws other numbers" in message


@BOTH
def test_random_numbers_that_are_the_same_for_every_shape_pass_in_training(assertion):
    def random_scale(query, key, value):
        return SDPA(query, key, value, scale=float(torch.rand(())))

    with pytest.raises(ValueError, match="the subject is random"):
        assertion(random_scale, *qkv())
    assertion(random_scale, *qkv(), training=True)


@BOTH
def test_mode_gradients_inputs_and_random_state_are_left_as_they_were(assertion):
    module = Restless().train()
    inputs = randn(2, 5, WIDTH).requires_grad_()
    kept, state = inputs.detach().clone(), torch.get_rng_state()
    assertion(module, inputs)
    assert module.training
    assert module.calls == 0
    assert all(parameter.grad is None for parameter in [inputs, *module.parameters()])
    assert torch.equal(inputs, kept)
    assert torch.equal(torch.get_rng_state(), state)


@BOTH
@on_accelerators(DTYPES)
def test_everything_works_on_an_accelerator(assertion, dtype, accelerator):
    inputs = [t.to(accelerator) for t in qkv(dtype=dtype)]
    assertion(SDPA, *inputs)
    assertion(SDPA, *inputs, attn_mask=RAGGED.to(accelerator))

    def wrong(query, key, value):
        bias = torch.arange(key.shape[-2], device=accelerator, dtype=dtype)[None]
        return SDPA(query, key, value, bias) + query.mean((0, -1)).unsqueeze(-1)

    assert f"on {accelerator}:0" in message_of(assertion, wrong, *inputs)


# --- Arguments of a model beside its inputs


class Decoder(nn.Module):
    """Attention to a memory, with the memory taken as it is given."""

    def forward(self, x, memory=None, mask=None):
        x = x + SDPA(x, memory, memory) if memory is not None else x
        return SDPA(x, x, x, mask)


def test_features_of_a_memory_as_wide_as_the_sequence_is_long_stay_in_order():
    assert_key_permutation_invariant(
        Decoder(), randn(2, WIDTH, WIDTH), memory=randn(2, 5, WIDTH, seed=1)
    )
    assert_key_permutation_invariant(Decoder(), randn(2, 5, WIDTH), memory=randn(2, 7, WIDTH))


def test_a_memory_that_may_be_a_mask_is_refused():
    memory = randn(2, WIDTH, WIDTH)
    with pytest.raises(ValueError, match=r"memory: got \(2, 16, 16\), whose last dimension may be"):
        assert_key_permutation_invariant(Decoder(), randn(2, WIDTH, WIDTH), memory=memory)
    drawn = randn(2, 5, 5) > 0
    keep = drawn | torch.eye(5, dtype=torch.bool)
    assert_key_permutation_invariant(Decoder(), randn(2, 5, WIDTH), mask=keep)
    assert_key_permutation_invariant(Decoder(), randn(2, 5, WIDTH), mask=keep[:, :1])
    assert_key_permutation_invariant(Decoder(), randn(2, 5, WIDTH), mask=randn(2, 5, 5))


@pytest.mark.parametrize("lengths", ["ab", object(), [None, 1]], ids=["text", "object", "none"])
def test_lengths_that_are_no_numbers_are_refused_in_words(lengths):
    with pytest.raises(TypeError, match=r"lengths: got .*accepted is one whole number from 0 to"):
        assert_batch_independent(encoder_layer(), randn(2, 5, WIDTH), lengths=lengths)
