"""How code under test is called, and that it is left as it was found."""

import functools
import random

import numpy as np
import pytest
import torch
from attention_subjects import (
    WIDTH,
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
from torch import nn
from torch.nn.functional import scaled_dot_product_attention as sdpa

from pytest_attnheat import (
    SequenceModel,
    assert_batch_independent,
    assert_convex,
    assert_decode_matches_prefill,
    assert_deterministic,
    assert_key_permutation_invariant,
    assert_layout_invariant,
    assert_no_leakage,
    assert_padding_invariant,
)
from pytest_attnheat.assertions.behaviour.reading import as_function, as_sequence
from pytest_attnheat.assertions.behaviour.subject import check_rows, relative_change, settled
from pytest_attnheat.attention.tolerance import output_tolerance
from pytest_attnheat.callables import borrowed, modules_in

MODULE = nn.Linear(2, 2)


# --- finding modules


def holds_a_global(x):
    return MODULE(x)


class Holder:
    def __init__(self, module):
        self.module = module

    def __call__(self, x):
        return self.module(x)

    def method(self, x):
        return self.module(x)


def test_modules_are_found_wherever_a_callable_holds_them():
    local = nn.Linear(2, 2)
    assert modules_in(local) == [local]
    assert modules_in(lambda x: local(x)) == [local]
    assert modules_in(holds_a_global) == [MODULE]
    assert modules_in(functools.partial(lambda m, x: m(x), local)) == [local]
    assert modules_in(Holder(local)) == [local]
    assert modules_in(Holder(local).method) == [local]
    assert modules_in(SequenceModel(lambda x: local(x))) == [local]
    assert modules_in(sdpa) == []


# --- leaving no trace


def upset(module):
    """Change all that a subject can change, and fail."""
    with borrowed(module, seed=1):
        module.train()
        module(torch.randn(4, 3))
        module[0].running_var = torch.zeros(3)
        random.random()
        np.random.random()
        raise KeyError


def test_modes_buffers_and_random_states_are_restored_after_an_exception():
    module = nn.Sequential(nn.BatchNorm1d(3), nn.Dropout()).eval()
    module[1].train()
    torch.manual_seed(5)
    states = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()
    mean = module[0].running_mean
    with pytest.raises(KeyError):
        upset(module)
    assert [m.training for m in module] == [False, True]
    assert not module.training
    assert module[0].running_mean is mean
    assert torch.equal(mean, torch.zeros(3))
    assert torch.equal(module[0].running_var, torch.ones(3))
    assert int(module[0].num_batches_tracked) == 0
    assert torch.equal(torch.get_rng_state(), states[0])
    assert random.getstate() == states[1]
    assert np.random.get_state()[1].tolist() == states[2]


def test_numbers_within_are_drawn_from_the_seed():
    with borrowed(sdpa, seed=3):
        first = torch.randn(2)
    with borrowed(sdpa, seed=3):
        assert torch.equal(first, torch.randn(2))
    with borrowed(sdpa, seed=4):
        assert not torch.equal(first, torch.randn(2))


# --- randomness


def test_a_subject_without_a_module_that_answers_at_random_is_refused():
    with pytest.raises(ValueError, match="the subject is random: two calls with the same input"):
        settled(sdpa, lambda: torch.randn(3), training=False, seed=0)


def test_a_module_in_training_mode_is_refused_only_if_it_answers_at_random():
    quiet, random_ = nn.Linear(2, 2).train(), nn.Dropout(0.25).train()
    x = torch.ones(50, 2)
    settled(quiet, lambda: quiet(x), training=False, seed=0)
    with pytest.raises(ValueError, match=r"Dropout is in training mode \(Dropout \(p=0\.25\)\)"):
        settled(random_, lambda: random_(x), training=False, seed=0)
    output = settled(random_, lambda: random_(x), training=True, seed=0)
    torch.manual_seed(0)
    assert torch.equal(random_(x), output)


# --- attention functions


def test_what_may_be_seen_is_read_from_the_arguments():
    inputs = qkv(query_len=2, key_len=4)
    mask = torch.tensor([[True, False, True, True]])

    def seen(**arguments):
        return as_function(sdpa, inputs, arguments).may_see()[0, 0].int().tolist()

    assert seen() == [[1, 1, 1, 1], [1, 1, 1, 1]]
    assert seen(is_causal=True) == [[1, 0, 0, 0], [1, 1, 0, 0]]
    assert seen(attn_mask=mask) == [[1, 0, 1, 1], [1, 0, 1, 1]]
    assert seen(attn_mask=mask, is_causal=True) == [[1, 0, 0, 0], [1, 0, 0, 0]]
    for lowest in (-torch.inf, torch.finfo(torch.float32).min, -1e9, -1e4):
        added = torch.tensor([0.5, lowest, -300.0, 0.0])
        assert seen(attn_mask=added) == [[1, 0, 1, 1], [1, 0, 1, 1]]


def test_an_explicit_mask_says_the_same_as_the_arguments():
    inputs = qkv()
    bias = randn(6, 6, seed=9).masked_fill(torch.ones(6, 6).triu(3) > 0, -torch.inf)
    for arguments in ({"is_causal": True}, {"attn_mask": bias}, {}):
        subject = as_function(sdpa, inputs, arguments)
        torch.testing.assert_close(subject.explicit().run(), sdpa(*inputs, **arguments))


@pytest.mark.parametrize("batch_first", [True, False])
def test_multihead_attention_is_called_with_its_own_meaning_of_a_mask(batch_first):
    module, x = multihead(batch_first), randn(2, 5, WIDTH)
    keep = torch.ones(2, 5, 5, dtype=torch.bool).tril()
    keep[1, :, 1] = False
    got = as_function(module, (x, x, x), {"attn_mask": keep}).run()
    turned = x if batch_first else x.transpose(0, 1)
    wanted = module(turned, turned, turned, attn_mask=(~keep).repeat_interleave(2, 0))[0]
    torch.testing.assert_close(got, wanted if batch_first else wanted.transpose(0, 1))


def test_a_function_of_the_wrong_shape_is_refused():
    with pytest.raises(
        ValueError, match=r"returns: got .*; accepted is \(\.\.\., query_len, value_dim\), here"
    ):
        as_function(lambda q, k, v: sdpa(q, k, v).mT, qkv(), {}).run()
    with pytest.raises(
        TypeError, match="got NoneType; accepted is its output, or a tuple that begins with it"
    ):
        as_function(lambda q, k, v: None, qkv(), {}).run()
    with pytest.raises(ValueError, match="same leading dimensions, or with enable_gqa=True"):
        as_function(sdpa, [qkv(heads=4)[0], *qkv(heads=3)[1:]], {"enable_gqa": True})


# --- sequence models


@pytest.mark.parametrize("batch_first", [True, False])
def test_known_modules_take_their_mask_and_their_batch(batch_first):
    x = randn(2, 5, WIDTH)
    real = torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]]) > 0
    turned = x if batch_first else x.transpose(0, 1)
    for module in (multihead(batch_first), encoder_layer(batch_first)):
        got = as_sequence(module, x, {}).run(real=real)
        if isinstance(module, nn.MultiheadAttention):
            wanted = module(turned, turned, turned, key_padding_mask=~real)[0]
        else:
            wanted = module(turned, src_key_padding_mask=~real)
        wanted = wanted if batch_first else wanted.transpose(0, 1)
        torch.testing.assert_close(got[real], wanted[real])


def test_the_three_meanings_of_a_mask_and_an_own_one():
    taken = {}

    def module(x, m):
        taken["mask"] = m
        return x

    x, real = randn(1, 2, 3), torch.tensor([[True, False]])

    def given(mask):
        SequenceModel(module, mask=mask, mask_argument="m")(x, real=real)
        return taken["mask"].tolist()

    assert given("keep") == [[True, False]]
    assert given("drop") == [[False, True]]
    assert given("additive") == [[0.0, -torch.inf]]
    assert given(lambda keep: keep.long()[:, None]) == [[[1, 0]]]


def test_the_output_is_picked_from_what_a_module_returns():
    x, out = randn(2, 5, WIDTH), randn(2, 5, 4, seed=1)
    for result in (out, (out, None), [out], {"pooled": randn(2, 4), "last_hidden_state": out}):
        assert torch.equal(SequenceModel(lambda x, r=result: r)(x), out)
    with_heads = out.reshape(2, 5, 2, 2)
    assert torch.equal(SequenceModel(lambda x: with_heads)(x), out)
    assert torch.equal(SequenceModel(lambda x: (x, out), output=lambda r: r[1])(x), out)
    with pytest.raises(ValueError, match=r"accepted is floats of shape \(batch, length, \.\.\.\)"):
        SequenceModel(lambda x: randn(3, 4))(x)
    with pytest.raises(
        TypeError, match="got NoneType; accepted is a tensor, or a tuple or mapping"
    ):
        SequenceModel(lambda x: None)(x)


def test_models_of_transformers_are_known_without_importing_it():
    model = as_sequence(of_transformers("gpt2", "sdpa"), tokens(1, 4), {}).model
    assert (model.mask_argument, model.positions_argument) == ("attention_mask", "position_ids")
    chunk = tokens(1, 3)
    _, cache = model.decode(chunk, None)
    # Of an old GPT-2, a tuple of keys and values for each layer.
    length = cache[0][0].shape[2] if isinstance(cache, tuple) else cache.get_seq_length()
    assert length == 3


def test_what_is_no_sequence_or_no_model_is_refused():
    with pytest.raises(ValueError, match=r"inputs: got torch.float32 \(2, 5\); accepted is"):
        as_sequence(encoder(), randn(2, 5), {})
    with pytest.raises(
        TypeError, match="the subject: got int; accepted is a callable, called as module"
    ):
        as_sequence(3, randn(2, 5, 4), {})
    with pytest.raises(TypeError, match="inputs: got list"):
        as_sequence(encoder(), [1, 2], {})
    with pytest.raises(ValueError, match="mask: got 'hide'; accepted is 'keep', 'drop'"):
        SequenceModel(encoder(), mask="hide", mask_argument="m")
    with pytest.raises(
        ValueError, match=r"mask and mask_argument: got .*; accepted is both or neither"
    ):
        SequenceModel(encoder(), mask="keep")
    with pytest.raises(TypeError, match="module: got int"):
        SequenceModel(3)
    assert as_sequence(causal_encoder(), tokens(1, 3), {}).is_tokens


def test_a_keyword_that_a_module_does_not_take_is_refused_when_it_is_declared():
    class Block(nn.Module):
        def forward(self, x, hidden_slots=None):
            return x

    @functools.wraps(Block.forward)
    def anything(*given, **more):
        return given[0]

    class Hooked(Block):
        def __call__(self, x, mask=None):
            return super().__call__(x, hidden_slots=mask)

    wrong = "argument: got 'mask'; accepted is a parameter of Block: x, hidden_slots"
    for module in (Block(), torch.compile(Block(), backend="eager")):
        with pytest.raises(ValueError, match=f"mask_{wrong}"):
            SequenceModel(module, mask="keep", mask_argument="mask")
    for name in ("positions", "memory"):
        with pytest.raises(ValueError, match=f"{name}_{wrong}"):
            SequenceModel(Block(), **{f"{name}_argument": "mask"})
    hooked = Block()
    hooked.register_forward_pre_hook(lambda module, given, more: (given, {}), with_kwargs=True)
    takers = (lambda x, mask=None: x, lambda x, **more: x, anything, Hooked(), hooked)
    for module in (*takers, nn.DataParallel(Block())):
        assert SequenceModel(module, mask="keep", mask_argument="mask").mask == "keep"


# --- how far one output is from another


def test_a_row_is_off_by_a_part_of_its_size_and_a_row_of_zeros_has_one():
    expected = torch.tensor([[3.0, 4.0], [0.0, 0.0], [30.0, 40.0]])
    got = expected + torch.tensor([[0.3, 0.4], [0.3, 0.4], [0.3, 0.4]])
    torch.testing.assert_close(
        relative_change(got, expected), torch.tensor([0.1, 0.1, 0.01], dtype=torch.float64)
    )
    assert relative_change(expected, expected).tolist() == [0, 0, 0]


def test_what_is_not_finite_is_off_also_where_both_are():
    rows = torch.tensor([[torch.nan, 1.0], [torch.inf, 1.0], [1.0, 1.0]])
    assert relative_change(rows, rows).tolist() == [torch.inf, torch.inf, 0]


@pytest.mark.parametrize(
    ("dtype", "strict", "loose"),
    [
        (torch.float64, 4.4e-16, 1e-11),
        (torch.float32, 2.4e-7, 2e-5),
        (torch.float16, 2.0e-3, 7.8e-3),
        (torch.bfloat16, 1.6e-2, 6.25e-2),
    ],
)
def test_the_tolerance_follows_the_dtype(dtype, strict, loose):
    assert output_tolerance(dtype, strict=True) == pytest.approx(strict, rel=0.05)
    assert output_tolerance(dtype) == pytest.approx(loose, rel=0.05)


def test_the_message_names_the_worst_and_the_first_row():
    expected = torch.ones(2, 3, 4)
    got = expected.clone()
    got[0, 1] += 0.5
    got[1, 2, 0] = torch.nan
    with pytest.raises(AssertionError) as caught:
        check_rows("assert_this", got, expected, claim="rows differ", allowed=0.1, repeat="seed=3")
    assert str(caught.value).splitlines() == [
        "assert_this: 2 of 6 rows differ",
        "  worst    output[1, 2] holds nan (allowed 1.0e-01)",
        "  first    output[0, 1] is off by up to 0.5, 0.5 of its size",
        "  tensor   float32 (2, 3, 4) on cpu",
        "  repeat   seed=3",
    ]
    judged = torch.tensor([[True, False, True], [True, True, False]])
    check_rows("assert_this", got, expected, claim="", allowed=0.1, judged=judged)
    with pytest.raises(ValueError, match="no row of the output is left to compare"):
        check_rows("a", got, expected, claim="", allowed=0.1, judged=torch.zeros(2, 3) > 0)


# --- how often the host reads


@pytest.fixture
def reads(monkeypatch):
    """Where the host has read a number from a tensor."""
    seen = []
    for name in ("tolist", "item", "__bool__", "__int__", "__float__", "__index__"):
        real = getattr(torch.Tensor, name)

        def read(tensor, real=real, name=name):
            seen.append(name)
            return real(tensor)

        monkeypatch.setattr(torch.Tensor, name, read)
    return seen


@pytest.mark.parametrize(
    ("assertion", "arguments", "most"),
    [
        # Whether two calls give the same, each comparison, and orders drawn on the CPU.
        (assert_batch_independent, {}, 1 + 2 + 2),
        (assert_key_permutation_invariant, {}, 1 + 3 + 1),
        (assert_padding_invariant, {}, 1 + 4),
        # And which queries see all keys before them.
        (assert_decode_matches_prefill, {}, 1 + 2 + 1),
        (assert_convex, {}, 1 + 3),
        # Of 29 layouts: outputs, what was written, and gradients of three inputs.
        (assert_layout_invariant, {}, 1 + 1 + 29 * 5),
        (assert_no_leakage, {"is_causal": True}, 20),
        (assert_deterministic, {}, 2),
        (assert_deterministic, {"dropout": 0.5}, 15),
    ],
    ids=lambda value: getattr(value, "__name__", str(value)),
)
def test_a_passing_assertion_reads_once_for_each_comparison(assertion, arguments, most, reads):
    inputs = qkv()
    assertion(plain, *inputs, **arguments)
    assert 0 < len(reads) <= most
