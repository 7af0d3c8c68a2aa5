"""What assert_deterministic accepts and refuses."""

import math
import random

import numpy as np
import pytest
import torch
from attention_subjects import (
    DTYPES,
    TRANSFORMERS,
    WIDTH,
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
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import dropout
from torch.nn.functional import scaled_dot_product_attention as sdpa

from pytest_attnheat import assert_deterministic
from pytest_attnheat.assertions.behaviour.dropout import share_by_chance


def weights_of(query, key, is_causal=False):
    scores = query @ key.mT / query.shape[-1] ** 0.5
    if is_causal:
        scores = scores.masked_fill(~torch.ones(scores.shape[-2:]).tril().bool(), -math.inf)
    return scores.softmax(-1)


def dropping(drop):
    """Attention whose weights go through `drop(weights, p)`."""

    def attention(query, key, value, dropout_p=0.0, is_causal=False):
        weights = weights_of(query, key, is_causal)
        return (drop(weights, dropout_p) if dropout_p else weights) @ value

    return attention


def masked(weights, p, *shape):
    """Dropout with one mask for all entries along the dimensions of size 1 of `shape`."""
    size = [n if s is None else s for s, n in zip(shape, weights.shape, strict=True)]
    return weights * (torch.rand(size) >= p) / (1 - p)


class Layer(nn.Module):
    """Self-attention with a dropout in place of that of PyTorch."""

    def __init__(self, p=0.1, drop=None):
        super().__init__()
        self.p = p
        self.drop = drop

    def forward(self, inputs):
        weights = weights_of(inputs, inputs)
        if self.drop is not None:
            weights = self.drop(weights, self.p, self.training)
        return weights @ inputs


def message(subject, *inputs, **arguments):
    with pytest.raises(AssertionError) as caught:
        assert_deterministic(subject, *inputs, **arguments)
    return str(caught.value)


def parts(told):
    """The first line, the worst place and the cause of a message."""
    lines = told.splitlines()
    found = {line.split()[0]: line.split(None, 1)[1] for line in lines[1:]}
    return lines[0], found["worst"], found.get("cause")


# --- evaluation mode


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("function", [sdpa, plain], ids=["torch", "plain"])
def test_attention_repeats_itself(function, dtype):
    assert_deterministic(function, *qkv(dtype=dtype))
    assert_deterministic(function, *qkv(dtype=dtype), is_causal=True)


@pytest.mark.parametrize(("name", "implementation"), TRANSFORMERS)
def test_models_of_transformers_repeat_themselves(name, implementation):
    assert_deterministic(of_transformers(name, implementation), tokens(2, 6))


def test_layers_of_torch_repeat_themselves():
    inputs = randn(2, 6, WIDTH)
    assert_deterministic(encoder_layer(), inputs)
    assert_deterministic(multihead(), inputs)
    assert_deterministic(multihead(), inputs, inputs, inputs)


def test_nan_in_the_same_places_is_the_same():
    query, key, value = qkv()
    value[0, 0, 0, 0] = math.nan
    assert_deterministic(plain, query, key, value)


def test_dropout_in_evaluation_mode_is_told_with_the_module_that_does_it():
    layer = Layer(drop=lambda weights, p, training: dropout(weights, p))
    model = nn.Sequential(nn.Linear(WIDTH, WIDTH), layer).eval()
    told = message(model, randn(2, 6, WIDTH))
    first, worst, cause = parts(told)
    assert "of 12 outputs change from one call to the next, in evaluation mode" in first
    assert worst.startswith("output[")
    assert "is off by up to" in worst
    assert "(allowed 0.0e+00)" in worst
    assert cause == (
        "random numbers are drawn in evaluation mode, in 1 (Layer): dropout that is not switched "
        "off by training=self.training?"
    )
    assert told.endswith("repeat   seed=0")
    assert not layer._forward_hooks


def test_a_dropout_that_stays_in_training_mode_is_told_by_its_name():
    class Stuck(nn.Module):
        def __init__(self):
            super().__init__()
            self.attention = Layer(drop=lambda weights, p, training: self.drop[0](weights))
            self.drop = [nn.Dropout(0.5)]  # in a list, where .eval() does not reach it

        def forward(self, inputs):
            return self.attention(inputs)

    cause = parts(message(Stuck().eval(), randn(2, 6, WIDTH)))[2]
    assert "random numbers are drawn in evaluation mode, in attention (Layer)" in cause


def test_a_function_that_draws_without_dropout_is_told():
    def attention(query, key, value):
        return plain(query, key, value) + 1e-6 * torch.randn(())

    first, _, cause = parts(message(attention, *qkv()))
    assert first.endswith("36 of 36 outputs change from one call to the next, without dropout")
    assert cause.startswith("random numbers are drawn without dropout: dropout that is not")


def test_a_call_that_leaves_something_behind_is_told_apart():
    class Counting(Layer):
        def forward(self, inputs):
            self.p += 1e-3
            return super().forward(inputs) * self.p

    cause = parts(message(Counting().eval(), randn(2, 6, WIDTH)))[2]
    assert cause.startswith("no random numbers are drawn: does a call leave something behind")


@pytest.mark.parametrize("draw", [random.random, np.random.rand], ids=["python", "numpy"])
def test_random_numbers_of_python_and_numpy_are_found(draw):
    def attention(query, key, value):
        return plain(query, key, value) * (1 + draw())

    cause = parts(message(attention, *qkv()))[2]
    assert cause.startswith("random numbers are drawn without dropout")


def test_an_output_that_follows_the_seed_alone_is_found():
    def attention(query, key, value):
        return plain(query, key, value) * (1 + torch.initial_seed() / 1e3)

    first, _, _ = parts(message(attention, *qkv()))
    assert "36 of 36 outputs change with the seed, without dropout" in first


def test_a_module_in_training_mode_is_refused_without_dropout():
    with pytest.raises(ValueError, match="Layer is in training mode"):
        assert_deterministic(Layer(), randn(2, 6, WIDTH))


# --- dropout of an attention function


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("function", [sdpa, plain], ids=["torch", "plain"])
def test_dropout_of_weights_passes_in_every_dtype(function, dtype):
    for seed, p in enumerate((0.05, 0.9)):
        inputs = qkv(seed=10 * seed, dtype=dtype)
        assert_deterministic(function, *inputs, dropout=p, seed=seed, runs=100)
    assert_deterministic(function, *inputs, dropout=0.1, is_causal=True)


def test_dropout_of_grouped_and_of_sharp_weights_passes():
    query, key, value = qkv(2, 4)
    assert_deterministic(
        sdpa, query, key[:, :2], value[:, :2], enable_gqa=True, dropout=0.1, runs=100
    )
    assert_deterministic(plain, 10 * query, key, value, dropout=0.1, runs=100)


def test_correct_dropout_is_not_reported_whatever_the_seed():
    for seed in range(15):
        assert_deterministic(
            dropping(dropout), *qkv(1, 2, 4, 5, seed=seed), dropout=0.2, seed=seed, runs=40
        )


def test_dropout_that_is_never_applied_is_told():
    told = message(dropping(lambda weights, p: weights), *qkv(), dropout=0.1, runs=100)
    assert parts(told) == (
        "assert_deterministic: dropout=0.1 was declared, but no weight is ever dropped",
        "0 of 21600 weights in 100 calls are 0 (expected about 2160)",
        "dropout is never applied",
    )


def before_softmax(query, key, value, dropout_p=0.0):
    scores = query @ key.mT
    return dropout(scores, dropout_p).softmax(-1) @ value


def test_dropout_of_scores_is_told():
    cause = parts(message(before_softmax, *qkv(), dropout=0.1, runs=100))[2]
    assert cause == "the weights change, but none becomes 0: dropout of scores, before the softmax?"


def masking_scores(query, key, value, dropout_p=0.0):
    scores = query @ key.mT
    scores = scores.masked_fill(torch.rand_like(scores) < dropout_p, -1e9)
    return scores.softmax(-1) @ value


ALONG = "in 50 calls the 10800 weights are never dropped and kept side by side along dimension {}"


@pytest.mark.parametrize(
    ("drop", "claim", "worst", "cause"),
    [
        (
            lambda w, p: masked(w, p, None, 1, None, None),
            "dropout=0.2 does not drop each weight on its own",
            ALONG.format(-3),
            "what is dropped is the same for all heads",
        ),
        (
            lambda w, p: masked(w, p, 1, 1, None, None),
            "dropout=0.2 does not drop each weight on its own",
            ALONG.format("-4, -3"),
            "what is dropped is the same for all batch entries and all heads",
        ),
        (
            lambda w, p: masked(w, p, None, None, 1, None),
            "dropout=0.2 does not drop each weight on its own",
            ALONG.format(-2),
            "what is dropped is the same for all queries",
        ),
        (
            lambda w, p: masked(w, p, None, None, None, 1),
            "dropout=0.2 does not drop each weight on its own",
            ALONG.format(-1),
            "what is dropped is the same for all keys",
        ),
        (
            lambda w, p: w * (torch.rand(w.shape, generator=generator(3)) >= p) / (1 - p),
            "dropout=0.2 drops the same weights in each of 50 calls",
            "weights are 0 in all of them",
            "a fixed mask, or a seed that is set in each call",
        ),
        (
            lambda w, p: dropout(w, 1 - p),
            "dropout=0.2 drops 0.",
            "of 10800 weights in 50 calls are 0 (allowed 0.1",
            "p is taken for the probability to keep a weight",
        ),
        (
            lambda w, p: dropout(dropout(w, p), p),
            "dropout=0.2 drops 0.3",
            "of 10800 weights in 50 calls are 0 (allowed 0.1",
            "dropout is applied twice",
        ),
        (
            lambda w, p: w * (torch.rand_like(w) >= p),
            "216 of 216 weights that are kept are not divided by 1 - p",
            "kept weights are multiplied by 1 in the mean, expected 1.25",
            "what is kept is not rescaled",
        ),
        (
            lambda w, p: w * (torch.rand_like(w) >= p) * (1 - p),
            "216 of 216 weights that are kept are not divided by 1 - p",
            "kept weights are multiplied by 0.8 in the mean, expected 1.25",
            "what is kept is multiplied by 1 - p, which belongs to evaluation mode",
        ),
        (
            lambda w, p: w * (torch.rand_like(w) >= p) / p,
            "216 of 216 weights that are kept are not divided by 1 - p",
            "kept weights are multiplied by 5 in the mean, expected 1.25",
            "what is kept is divided by p",
        ),
        (
            lambda w, p: dropout(w, p) / dropout(w, 0.0).sum(-1, keepdim=True) / (1 - p),
            "216 of 216 weights that are kept are not divided by 1 - p",
            "expected 1.25",
            "what is kept is divided by 1 - p twice, or evaluation multiplies by it as well",
        ),
        (
            lambda w, p: (
                dropout(w, p) * (w == w.amax(-1, keepdim=True)).logical_not()
                + dropout(w, 0.9) * (w == w.amax(-1, keepdim=True)) * 0.1 / (1 - p)
            ),
            "dropout=0.2 drops 0.3",
            "weights in 50 calls are 0",
            None,
        ),
    ],
    ids=[
        "heads",
        "heads and batch",
        "keys",
        "queries",
        "fixed",
        "keep",
        "twice",
        "unscaled",
        "multiplied",
        "divided by p",
        "scaled twice",
        "mixed",
    ],
)
def test_what_dropout_does_wrong_is_measured_and_told(drop, claim, worst, cause):
    told = parts(message(dropping(drop), *qkv(), dropout=0.2, runs=50))
    assert claim in told[0]
    assert worst in told[1]
    assert told[2] == cause


def in_two_of_heads(weights, p):
    keep = torch.rand_like(weights) >= p
    keep[:, 2] = keep[:, 1]
    return weights * keep / (1 - p)


def in_pairs_of_keys(weights, p):
    keep = torch.rand_like(weights[..., ::2]) >= p
    return weights * keep.repeat_interleave(2, -1) / (1 - p)


def in_tiles(lag):
    def drop(weights, p):
        keep = torch.rand_like(weights[..., :lag, :]) >= p
        return weights * keep.repeat(1, 1, weights.shape[-2] // lag, 1) / (1 - p)

    return drop


def never_together(weights, p):
    keep = torch.rand_like(weights) >= p
    random_ = torch.rand_like(weights[..., ::2])
    keep[..., ::2], keep[..., 1::2] = random_ >= p, (random_ < p) | (random_ >= 2 * p)
    return weights * keep / (1 - p)


@pytest.mark.parametrize(
    ("drop", "lag", "axis", "name"),
    [
        (in_two_of_heads, 1, -3, "heads"),
        (in_pairs_of_keys, 1, -1, "keys"),
        (in_tiles(6), 6, -2, "queries"),
        (in_tiles(4), 4, -2, "queries"),
        (never_together, 1, -1, "keys"),
    ],
    ids=["heads", "keys", "half", "tiles", "never"],
)
def test_weights_that_are_dropped_together_or_never_together_are_told(drop, lag, axis, name):
    told = parts(message(dropping(drop), *qkv(2, 4, 12, 12), dropout=0.1))
    assert told[0].endswith("dropout=0.1 does not drop each weight on its own")
    assert f"pairs of weights that are {lag} apart along dimension {axis} are dropped" in told[1]
    assert "(expected 0.01 of them; allowed 0.00" in told[1]
    assert told[2] == f"the random numbers of some {name} are those of others, {lag} apart?"


@pytest.mark.parametrize("arguments", [{}, {"is_causal": True}, {"mask": True}], ids=str)
@pytest.mark.parametrize("group", [1, 4])
def test_of_a_large_input_a_part_is_enough(arguments, group):
    query, key, value = qkv(2, 8, 300, 300)
    calls = []

    def attention(query, key, value, **given):
        calls.append(query.shape[:-1].numel() * key.shape[-2])
        return sdpa(query, key, value, **given)

    if arguments.pop("mask", False):
        arguments = {"attn_mask": torch.ones(300, 300, dtype=torch.bool).tril()}
    heads = slice(None, None, group)
    grouped = {"enable_gqa": True} if group > 1 else {}
    assert_deterministic(
        attention, query, key[:, heads], value[:, heads], dropout=0.1, **grouped, **arguments
    )
    with_dropout = calls[3:]  # After those of evaluation mode, which are of all inputs.
    assert max(with_dropout) <= 40_000
    assert sum(with_dropout) <= 1_000_000
    wrong = dropping(in_two_of_heads)
    assert "does not drop each weight on its own" in message(wrong, query, key, value, dropout=0.1)


def test_a_function_of_one_length_is_given_all_of_a_large_input():
    bias = torch.zeros(300, 300)

    def attention(query, key, value, dropout_p=0.0):
        return sdpa(query, key, value, attn_mask=bias, dropout_p=dropout_p)

    assert_deterministic(attention, *qkv(1, 1, 300, 300), dropout=0.1)


def test_a_value_that_is_written_to_does_no_harm():
    def attention(query, key, value, dropout_p=0.0):
        output = plain(query, key, value, dropout_p=dropout_p)
        value.view(-1).zero_()
        return output

    assert_deterministic(attention, *qkv(), dropout=0.1)


def generator(seed):
    return torch.Generator().manual_seed(seed)


def test_weights_that_are_normalised_again_are_told():
    told = message(masking_scores, *qkv(), dropout=0.2, runs=50)
    assert "weights that are kept are not divided by 1 - p" in told
    assert parts(told)[2] == "each row sums to 1 after dropout: the weights are normalised again"


def test_a_preference_for_large_weights_is_told():
    def by_size(weights, p):
        rank = weights.argsort(-1).argsort(-1).double()
        share = 2 * p * rank / (weights.shape[-1] - 1)  # p in the mean
        return weights * (torch.rand_like(weights) >= share) / (1 - p)

    first, worst, cause = parts(message(dropping(by_size), *qkv(), dropout=0.2))
    assert first.endswith("the mean of the weights after dropout is not what they are without")
    assert worst.startswith("they add up to 0.88")
    assert cause == "large weights are dropped more often than small ones"


def test_dropout_of_outputs_is_told():
    def attention(query, key, value, dropout_p=0.0):
        return dropout(plain(query, key, value), dropout_p)

    first, _, cause = parts(message(attention, *qkv(), dropout=0.1))
    assert "outputs with dropout_p=0.1 differ between equal channels of the value" in first
    assert cause == "dropout falls on the outputs, not on the weights"


def test_dropout_without_being_asked_for_is_found():
    def attention(query, key, value, dropout_p=None):
        return plain(query, key, value, dropout_p=0.1 if dropout_p == 0.0 else dropout_p or 0.0)

    first = parts(message(attention, *qkv(), dropout=0.1))[0]
    assert "rows of weights differ between dropout_p=0.0 and no dropout_p" in first


def test_random_numbers_that_no_seed_repeats_are_found():
    own = generator(0)

    def drop(weights, p):
        return weights * (torch.rand(weights.shape, generator=own) >= p) / (1 - p)

    first = parts(message(dropping(drop), *qkv(), dropout=0.1))[0]
    assert "are not repeated by torch.manual_seed" in first


def test_a_module_that_takes_dropout_p_is_asked_for_it_in_training_mode():
    class Attention(nn.Module):
        def forward(self, query, key, value, dropout_p=0.0):
            return plain(query, key, value, dropout_p=dropout_p if self.training else 0.0)

    assert_deterministic(Attention().eval(), *qkv(), dropout=0.1, runs=100)


def test_too_few_weights_are_refused():
    with pytest.raises(ValueError, match="runs: got 2, in which 8 weights are too few to tell"):
        assert_deterministic(plain, *qkv(1, 1, 2, 2), dropout=0.1, runs=2)


@pytest.mark.parametrize(("share", "count"), [(0.1, 1000), (0.5, 40), (0.9, 10**6)])
def test_the_share_that_chance_allows_is_met_but_for_one_time_in_a_million(share, count):
    low, high = share_by_chance(share, count)
    assert 0 <= low < share - 1 / 255 < share + 1 / 255 < high <= 1
    at_low, at_high = (
        math.exp(count * sum(
            a * math.log(b / a)
            for a, b in ((x, p), (1 - x, 1 - p)) if a > 1e-9
        ))
        for x, p in ((low, share - 1 / 255), (high, share + 1 / 255))
    )  # fmt: skip
    assert at_low == pytest.approx(5e-7, rel=1e-3) or low < 1e-9
    assert at_high == pytest.approx(5e-7, rel=1e-3) or high > 1 - 1e-9


def test_the_share_of_pairs_is_wider_the_more_are_looked_at_and_holds_the_square():
    low, high = share_by_chance(0.1, 10_000, tests=40, together=2)
    assert 0 < low < 0.01 < high < 0.03
    wider = share_by_chance(0.1, 10_000, tests=400, together=2)
    assert wider[0] < low
    assert wider[1] > high


def test_no_weight_and_all_weights_are_allowed_where_chance_may_lead_there():
    assert share_by_chance(0.05, 100)[0] == 0
    assert share_by_chance(0.95, 100)[1] == 1
    assert share_by_chance(0.05, 1080, tests=20, together=2)[0] == 0
    assert share_by_chance(0.99, 50, tests=20, together=2)[1] == 1


# --- dropout of a module


@pytest.mark.parametrize("p", [0.1, 0.5])
def test_the_dropout_of_multihead_attention_passes(p):
    for seed in range(3):
        inputs = randn(2, 6, WIDTH, seed=seed)
        assert_deterministic(multihead(dropout=p), inputs, dropout=p, seed=seed)
        assert_deterministic(multihead(dropout=p), inputs, inputs, inputs, dropout=p, seed=seed)


def test_the_dropout_of_layers_and_models_passes():
    assert_deterministic(encoder_layer(), randn(2, 6, WIDTH), dropout=0.1)
    assert_deterministic(of_transformers("bert", "sdpa"), tokens(2, 6), dropout=0.1)
    assert_deterministic(of_transformers("gpt2", "eager"), tokens(2, 6), dropout=0.1)


def test_a_module_without_dropout_is_told():
    told = message(multihead(dropout=0.0), randn(2, 6, WIDTH), dropout=0.1, runs=7)
    assert parts(told) == (
        "assert_deterministic: dropout=0.1 was declared, but 7 calls in training mode give equal "
        "outputs",
        "no output differs from one call to the next",
        "dropout is never applied",
    )
    forgotten = nn.Sequential(Layer(), nn.Dropout(0.0))
    cause = parts(message(forgotten, randn(2, 6, WIDTH), dropout=0.1, runs=3))[2]
    assert cause == "dropout is never applied"


def test_a_probability_that_no_layer_has_is_told():
    inputs = randn(2, 6, WIDTH)
    first, worst, cause = parts(message(encoder_layer(), inputs, dropout=0.3))
    assert first == (
        "assert_deterministic: dropout=0.3 was declared, but the module's own layers have p=0.1 "
        "(at self_attn, dropout, dropout1, ...)"
    )
    assert (worst, cause) == ("none of 4 layers with dropout has p=0.3", None)
    first = parts(message(multihead(dropout=0.5), inputs, inputs, inputs, dropout=0.1))[0]
    assert first.endswith("the module's own layers have p=0.5 (at MultiheadAttention)")


def test_one_layer_with_the_declared_probability_is_enough():
    inputs = randn(2, 6, WIDTH)
    both = nn.Sequential(nn.Dropout(0.2), nn.Dropout(0.3))
    assert_deterministic(both, inputs, dropout=0.3)
    assert_deterministic(both, inputs, dropout=0.2)
    by_function = Layer(p=0.3, drop=lambda weights, p, training: dropout(weights, p, training))
    assert_deterministic(nn.Sequential(by_function, nn.Dropout(0.2)), inputs, dropout=0.3)
    assert_deterministic(by_function, inputs, dropout=0.4)  # Nothing declares another.


def test_a_fixed_mask_in_training_mode_is_told():
    def drop(weights, p, training):
        keep = torch.rand(weights.shape, generator=generator(0)) >= p
        return weights * keep / (1 - p) if training else weights

    cause = parts(message(Layer(drop=drop), randn(2, 6, WIDTH), dropout=0.1))[2]
    assert cause.startswith("training mode changes the output, though always in the same way")


@pytest.mark.parametrize(
    ("drop", "mean", "cause"),
    [
        (
            lambda w, p, training: w * (torch.rand_like(w) >= p) if training else w,
            0.7,
            "what is kept is not rescaled",
        ),
        (
            lambda w, p, training: w * (torch.rand_like(w) >= p) * (1 - p) if training else w,
            0.49,
            "what is kept is multiplied by 1 - p, which belongs to evaluation mode",
        ),
        (
            lambda w, p, training: dropout(w, p) if training else w * (1 - p),
            1 / 0.7,
            "what is kept is divided by 1 - p twice, or evaluation multiplies by it as well",
        ),
    ],
    ids=["unscaled", "multiplied", "both"],
)
def test_a_biased_module_is_told_by_its_mean(drop, mean, cause):
    layer, inputs = Layer(p=0.3, drop=drop), randn(4, 8, WIDTH)
    assert_deterministic(layer, inputs, dropout=0.3)
    first, worst, told = parts(message(layer, inputs, dropout=0.3, unbiased=True))
    assert first.endswith(
        "the mean over 200 calls in training mode is not the output in evaluation mode"
    )
    assert float(worst.split()[2]) == pytest.approx(mean, rel=0.05)
    assert told == cause


def test_dropout_scaled_in_evaluation_alone_is_unbiased():
    def drop(weights, p, training):
        return weights * (torch.rand_like(weights) >= p) if training else weights * (1 - p)

    assert_deterministic(Layer(drop=drop), randn(4, 8, WIDTH), dropout=0.1, unbiased=True)


def test_too_few_runs_for_a_mean_are_refused():
    for runs in (1, 29):
        with pytest.raises(ValueError, match=f"runs: got {runs}, too few to tell whether the mean"):
            assert_deterministic(multihead(dropout=0.1), randn(2, 6, WIDTH), dropout=0.1, runs=runs)


# --- misuse, and what is left behind


@pytest.mark.parametrize("wrong", [0, 1, -0.1, math.nan])
def test_a_dropout_out_of_range_is_refused(wrong):
    with pytest.raises(ValueError, match="dropout: got"):
        assert_deterministic(plain, *qkv(), dropout=wrong)


def test_misuse_is_refused():
    with pytest.raises(TypeError, match="got 2 inputs; accepted is query, key and value"):
        assert_deterministic(plain, *qkv()[:2])
    with pytest.raises(TypeError, match="takes no dropout_p and holds no module"):
        assert_deterministic(lambda q, k, v: plain(q, k, v), *qkv(), dropout=0.1)
    with pytest.raises(ValueError, match=r"dropout_p: got 0\.1; accepted is dropout= in its place"):
        assert_deterministic(plain, *qkv(), dropout_p=0.1)
    with pytest.raises(ValueError, match=r"runs: got .*; accepted is a whole number from 1"):
        assert_deterministic(plain, *qkv(), runs=0)


class WithState(Layer):
    def __init__(self):
        super().__init__(drop=lambda weights, p, training: dropout(weights, p, training))
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, inputs):
        self.calls += 1
        return super().forward(inputs) + 0 * random.random() * np.random.rand()


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("fails", [False, True])
def test_everything_is_left_as_it_was_found(training, fails):
    model, inputs = WithState().train(training), randn(2, 6, WIDTH).requires_grad_()
    if fails:
        model.drop = lambda weights, p, training: dropout(weights, p)
    states = torch.get_rng_state(), random.getstate(), str(np.random.get_state())
    (message if fails else assert_deterministic)(model, inputs, dropout=0.1)
    assert model.training == training
    assert model.calls == 0
    assert inputs.grad is None
    assert not model._forward_hooks
    assert not model._forward_pre_hooks
    assert torch.equal(torch.get_rng_state(), states[0])
    assert (random.getstate(), str(np.random.get_state())) == states[1:]


@on_accelerators(DTYPES)
def test_attention_on_an_accelerator_passes(dtype, accelerator):
    inputs = [t.to(accelerator) for t in qkv(2, 4, 64, 64, 64, dtype=dtype)]
    assert_deterministic(sdpa, *inputs)
    # cuDNN drops the weights of queries that are 2 apart together: see test_gpu.
    with sdpa_kernel(
        [kind for kind in SDPBackend.__members__.values() if "CUDNN" not in str(kind)]
    ):
        assert_deterministic(sdpa, *inputs, dropout=0.1, is_causal=True)
