"""What the assertions say of modules with a memory, of lengths, and of a batch decoded at once."""

import pytest
import torch
from attention_subjects import TRANSFORMERS, WIDTH, kept, of_transformers, randn, tokens
from torch import nn
from torch.nn.functional import scaled_dot_product_attention

from pytest_attnheat import (
    SequenceModel,
    assert_batch_independent,
    assert_decode_matches_prefill,
    assert_deterministic,
    assert_key_permutation_invariant,
    assert_layout_invariant,
    assert_no_leakage,
    assert_padding_invariant,
)


class Looking(nn.Module):
    """Tokens that look things up in a memory of another width; its mask may be left aside."""

    def __init__(self, defect=""):
        super().__init__()
        torch.manual_seed(0)
        self.defect, self.query, self.both = defect, nn.Linear(WIDTH, 8), nn.Linear(5, 16)

    def forward(self, states, memory, real=None, weight=1.0):
        key, value = self.both(memory).chunk(2, -1)
        seen = None if real is None or self.defect == "ignored" else real[:, None]
        if self.defect == "ordered":
            key = key + torch.arange(key.shape[1])[:, None]
        return weight * scaled_dot_product_attention(self.query(states), key, value, attn_mask=seen)


MEMORY = randn(3, 4, 5, seed=1)


def looking(defect="", **options):
    module = Looking(defect).eval()
    return SequenceModel(module, "keep", "real", memory_argument="memory", **options)


def test_a_right_module_passes_and_its_memory_is_what_is_padded_and_hidden():
    model, states = looking(arguments={"weight": 2.0}), randn(3, 6, WIDTH)
    assert_padding_invariant(model, states, memory=MEMORY)
    assert_no_leakage(model, states, memory=MEMORY, causal=False, lengths=[4, 2, 3])
    assert_no_leakage(model, states, memory=MEMORY, lengths=[4, 2, 3], side="left")
    assert_batch_independent(model, states, memory=MEMORY)
    assert_layout_invariant(model, states, memory=MEMORY)
    assert_deterministic(model, states, memory=MEMORY)
    assert torch.equal(model(states, memory=MEMORY), 2 * looking()(states, memory=MEMORY))


def test_a_mask_of_the_memory_that_is_ignored_is_found():
    states = randn(3, 6, WIDTH)
    with pytest.raises(AssertionError) as error:
        assert_padding_invariant(looking("ignored"), states, memory=MEMORY)
    assert "18 of 18 rows change with padding of the memory on the right" in str(error.value)
    assert "cause    real changes nothing: it is ignored" in str(error.value)
    with pytest.raises(AssertionError) as error:
        assert_no_leakage(looking("ignored"), states, memory=MEMORY, lengths=[4, 2, 3])
    assert " sees memory element 3, padding (of its sequence 2 tokens are real)" in str(error.value)


def test_a_memory_that_is_missing_or_does_not_fit_is_refused():
    states = randn(3, 6, WIDTH)
    with pytest.raises(TypeError, match="memory: got NoneType; accepted is a dense"):
        assert_no_leakage(looking(), states)
    with pytest.raises(ValueError, match=r"memory: got shape \(2, 4, 5\); accepted is \(3, len"):
        assert_no_leakage(looking(), states, memory=MEMORY[:2])
    with pytest.raises(ValueError, match=r"lengths: got \[4, 2, 3\]; accepted is None for a mod"):
        assert_batch_independent(looking(), states, memory=MEMORY, lengths=[4, 2, 3])
    with pytest.raises(ValueError, match=r"lengths: got \[6, 2, 3\]; accepted is None for a mod"):
        assert_decode_matches_prefill(looking(), states, memory=MEMORY, lengths=[6, 2, 3])


@pytest.mark.parametrize("length", [4, 6])
def test_a_memory_stays_whole_where_the_sequence_is_cut_or_turned(length):
    states = randn(3, length, WIDTH)
    assert_key_permutation_invariant(looking("ordered"), states, memory=MEMORY)
    assert_decode_matches_prefill(looking(), states, memory=MEMORY)


# --- lengths


def test_a_module_that_is_told_lengths_is_padded_on_the_right():
    class Told(nn.Module):
        def forward(self, states, count=None, off=0):
            seen = None
            if count is not None:
                seen = (torch.arange(states.shape[1]) < count[:, None] + off)[:, None]
            return scaled_dot_product_attention(states, states, states, attn_mask=seen)

    model = SequenceModel(Told(), "lengths", "count")
    assert_padding_invariant(model, randn(3, 6, WIDTH))
    assert_no_leakage(model, randn(3, 6, WIDTH), lengths=[6, 4, 5])
    with pytest.raises(AssertionError, match="padding on the right"):
        assert_padding_invariant(model, randn(3, 6, WIDTH), off=1)
    with pytest.raises(AssertionError, match="padding on the left"):
        assert_padding_invariant(model, randn(3, 6, WIDTH), sides="left")


# --- a batch of unequal lengths, decoded


@pytest.mark.parametrize(("name", "implementation"), TRANSFORMERS)
def test_models_of_transformers_decode_a_batch_of_unequal_lengths(name, implementation):
    if name != "bert":
        model = of_transformers(name, implementation)
        assert_decode_matches_prefill(model, tokens(3, 9), lengths=[9, 6, 7])


def test_a_mask_that_decoding_forgets_is_found_only_with_lengths():
    model = of_transformers("gpt2", "sdpa")

    def forgetful(chunk, cache, attention_mask=None, **positions):
        told = {} if cache is not None else {"attention_mask": attention_mask}
        found = model(chunk, **kept(model, cache), use_cache=True, **told, **positions)
        return found.logits, found.past_key_values

    whole = ("attention_mask", "position_ids", forgetful)
    told = SequenceModel(model, lambda real: real.long(), *whole)
    assert_decode_matches_prefill(told, tokens(3, 9))
    with pytest.raises(AssertionError, match="with the cache, after padding on the left, differ"):
        assert_decode_matches_prefill(told, tokens(3, 9), lengths=[9, 6, 7])
