"""Blocks and language models are judged whole, by what is declared of them."""

import itertools
import math
from contextlib import nullcontext
from dataclasses import replace

import pytest
import torch
from attention_subjects import WIDTH, randn, tokens
from torch import nn
from torch.nn import functional
from wrong_attention import PLANTED, attention_with, declared_for

from pytest_attnheat import (
    AttentionSpec,
    SequenceModel,
    assert_batch_independent,
    assert_decode_matches_prefill,
    capture_attention,
    check_attention,
    diagnose,
)
from pytest_attnheat.capture import CaptureWarning
from pytest_attnheat.contract.checks import BLOCK_CHECKS
from pytest_attnheat.contract.declarations import hints_of
from pytest_attnheat.contract.running import diagnosis_of
from pytest_attnheat.failure import Failure

SDPA = functional.scaled_dot_product_attention
CHUNK = 4


def rotated(states, at, frequencies_of_neighbours):
    """Rotate the two halves of each head, by frequencies that are laid out for halves or not."""
    half = states.shape[-1] // 2
    rates = 0.3 ** torch.arange(half)
    rates = rates.repeat_interleave(2) if frequencies_of_neighbours else torch.cat([rates, rates])
    angles = at[:, None, :, None] * rates
    turned = torch.cat([-states[..., half:], states[..., :half]], -1)
    return states * angles.cos() + turned * angles.sin()


class Decoder(nn.Module):
    """Two causal layers with rotary positions and a cache, with one thing wrong or nothing."""

    def __init__(self, wrong="", chunk=None, prefix=0, additive=False):
        super().__init__()
        torch.manual_seed(0)
        self.wrong, self.chunk, self.prefix, self.additive = wrong, chunk, prefix, additive
        self.embedding, self.head = nn.Embedding(50, WIDTH), nn.Linear(WIDTH, 50)
        self.layers = nn.ModuleList(nn.Linear(WIDTH, 3 * WIDTH) for _ in range(2))
        for layer in self.layers:
            layer.weight.data *= 3  # attention is far from uniform
        self.eval()

    def seen(self, new, past, mask, documents):
        length = past + new
        rows, keys = torch.arange(past, length)[:, None], torch.arange(length)
        if self.wrong == "top_left" and past:
            rows = rows - past
        first = torch.zeros(1, 1, 1, dtype=torch.long)
        if mask is not None and self.wrong != "counted_from_padding":
            first = (mask.long().cumsum(-1) == 0).sum(-1)[:, None, None]
        seen = (keys <= rows) | (keys - first < self.prefix)
        if self.chunk:
            seen = seen & ((rows - first) // self.chunk == (keys - first) // self.chunk)
        if documents is not None and self.wrong != "documents_dropped":
            seen = seen & (documents[:, past:, None] == documents[:, None])
        if mask is not None and not (self.wrong == "mask_forgotten" and past):
            real = mask[:, None].expand(-1, new, -1)
            seen = real if self.wrong == "mask_alone" and new > 1 else seen & real
        return seen[:, None]

    def forward(self, ids, cache=None, keep=None, documents=None):
        new, past = ids.shape[1], 0 if cache is None else cache[0][0].shape[2]
        at = torch.arange(past, past + new).expand(len(ids), -1)
        if self.wrong == "padding_uncounted" and past and keep is not None:
            at = at - (keep.long().cumsum(-1) == 0).sum(-1, keepdim=True)
        states, grown = self.embedding(ids), []
        for number, layer in enumerate(self.layers):
            query, key, value = layer(states).unflatten(-1, (3, 2, -1)).permute(2, 0, 3, 1, 4)
            neighbours = self.wrong == "rotary_pairs"
            query, key = rotated(query, at, neighbours), rotated(key, at, neighbours)
            if cache is not None:
                old, old_value = cache[number]
                if self.wrong == "rotated_again":
                    old = rotated(old, torch.arange(past)[None], neighbours)
                key, value = torch.cat([old, key], 2), torch.cat([old_value, value], 2)
            grown.append((key, value))
            seen = self.seen(new, past, keep, documents)
            if self.wrong.startswith("bias"):
                rows = torch.arange(new)[:, None] + past * (self.wrong == "bias")
                distance = 0.3 * (torch.arange(past + new) - rows).abs()
                seen = distance.expand(seen.shape).masked_fill(~seen, -math.inf)
            if self.additive:  # a query that may see nothing sees all
                seen = torch.zeros(seen.shape).masked_fill(~seen, torch.finfo().min)
            states = states + SDPA(query, key, value, attn_mask=seen).transpose(1, 2).flatten(2)
        return self.head(states), grown


def spec_of(wrong="", length=11, declared=None, **fields):
    model = Decoder(wrong, **(declared or {}))
    model = SequenceModel(model, mask="keep", mask_argument="keep", decode=model)
    return AttentionSpec(model, inputs=tokens(2, length), **fields)


def failed(report):
    return {result.name for result in report.failed}


def message(report, name):
    return next(result.message for result in report.results if result.name == name)


def statuses(report):
    return {result.name: result.status for result in report.results}


# --- what is declared of a language model


PACKED = torch.tensor([0] * 4 + [1] * 7)


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"chunk": CHUNK},
        {"prefix": 3},
        {"documents": PACKED, "arguments": {"documents": PACKED.expand(2, -1)}},
        {"may_see": lambda batch, head, query, key: key <= query},
        {"may_see": torch.ones(11, 11, dtype=torch.bool).tril()},
    ],
    ids=lambda fields: ", ".join(fields),
)
def test_a_right_language_model_passes_with_what_it_is_declared_to_see(fields):
    given = {name: fields[name] for name in ("chunk", "prefix") if name in fields}
    report = check_attention(spec_of(declared=given, **fields))
    assert report.passed, str(report)
    asked = {name for name, status in statuses(report).items() if status == "passed"}
    assert {"no_leakage", "batch", "layout", "repeats"} <= asked


FOUND = {
    "rotary_pairs": ({}, {"padding"}),
    "counted_from_padding": ({"chunk": CHUNK}, {"no_leakage", "padding"}),
    "mask_alone": ({}, {"no_leakage", "padding", "decoding"}),
    "mask_forgotten": ({}, {"decoding"}),
    "top_left": ({}, {"decoding"}),
    "documents_dropped": (
        {"documents": PACKED, "arguments": {"documents": PACKED.expand(2, -1)}},
        {"no_leakage"},
    ),
}


@pytest.mark.parametrize("wrong", FOUND)
def test_a_wrong_language_model_is_found(wrong):
    fields, checks = FOUND[wrong]
    given = {"chunk": CHUNK} if "chunk" in fields else {}
    report = check_attention(spec_of(wrong, declared=given, **fields))
    assert failed(report) - {"attention_inside"} == checks, str(report)


@pytest.mark.parametrize(
    "declared", [{"chunk": 5}, {"documents": PACKED}, {"may_see": lambda b, h, i, j: j == i}]
)
def test_what_a_model_sees_beyond_what_is_declared_is_a_leak(declared):
    fields = {"chunk": CHUNK} if "chunk" in declared else {}
    report = check_attention(spec_of(declared=fields, **declared))
    assert "no_leakage" in failed(report)


def test_a_causal_mask_that_is_dropped_for_padding_is_named_in_the_call_that_failed():
    report = check_attention(spec_of("mask_alone"))
    assert statuses(report)["attention_inside"] == "passed"
    # Of that one call, with its mask, both are true.
    assert report.diagnosis.defects in (("causal_ignored",), ("causal_ignored_with_mask",))
    text = str(report)
    assert "inside   in the call that failed: attention in Decoder equals attention that is" in text
    assert "cause    a mask that hides nothing changes the output: is the causal mask" in text
    assert "what is wrong happens outside" not in text


def test_rotations_that_do_not_act_by_distance_are_told_in_their_own_words():
    report = check_attention(spec_of("rotary_pairs"))
    words = "only on the left: keys that are moved alike change their products with one another"
    assert words in message(report, "padding")

    class Absolute(nn.Module):
        def __init__(self):
            super().__init__()
            self.at, self.inside = nn.Embedding(30, WIDTH), nn.Linear(WIDTH, WIDTH)

        def forward(self, states, keep=None):
            states = states + self.at(torch.arange(states.shape[1]))
            seen = None if keep is None else keep[:, None]
            return SDPA(self.inside(states), states, states, attn_mask=seen)

    model = SequenceModel(Absolute().eval(), mask="keep", mask_argument="keep")
    report = check_attention(AttentionSpec(model, inputs=randn(2, 9, WIDTH), causal=None))
    assert failed(report) == {"padding"}
    assert "only on the left: the module is not told the positions" in message(report, "padding")


def test_what_is_wrong_outside_is_said_of_the_call_that_failed():
    report = check_attention(spec_of("mask_forgotten"))
    text = str(report)
    assert "the cache, after padding on the left, differ from the prefill" in text
    inside = "  inside   in the call that failed, attention in Decoder, as it was captured, is what"
    assert inside in text
    assert text.count("what is wrong happens outside of it: see the cause") == 1
    # Where a check knows no cause, all that may be wrong is listed.
    (result,) = report.failed
    result.failure.cause = None
    inside = diagnosis_of(report.spec, result)[1]
    assert "what is wrong happens outside of it: in the mask it was given, where heads" in inside


def test_of_a_cache_that_is_not_reordered_no_more_is_said_than_the_check_itself_says():
    model = Decoder("")
    kept = SequenceModel(
        model, mask="keep", mask_argument="keep", decode=model, reorder=lambda cache, order: cache
    )
    report = check_attention(AttentionSpec(kept, inputs=tokens(3, 9)))
    assert len(report.failed) == 1
    assert "reordered" in report.failed[0].message
    assert [one["inside"] for one in report.as_dict()["results"] if one["inside"]] == []
    assert "captured" not in str(report)


def test_what_padded_queries_give_is_not_what_is_wrong():
    report = check_attention(spec_of("rotary_pairs", declared={"additive": True}))
    assert failed(report) == {"padding"}
    assert report.diagnosis is None
    assert "what is wrong happens outside of it" in str(report)


def test_a_mask_of_a_causal_model_is_not_called_ignored_for_padding_on_the_right():
    class Averaging(Decoder):
        def forward(self, ids, cache=None, keep=None, documents=None):
            logits, cache = super().forward(ids, cache, keep, documents)
            return logits + self.embedding(ids).mean((1, 2), keepdim=True), cache

    model = SequenceModel(Averaging(), mask="keep", mask_argument="keep")
    report = check_attention(AttentionSpec(model, inputs=tokens(2, 9)))
    assert "padding on the right" in message(report, "padding")
    assert "ignored" not in message(report, "padding")


def test_layers_that_carry_a_window_need_none_declared():
    class Windowed(nn.Module):
        sliding_window = 3

        def forward(self, states):
            steps = torch.arange(states.shape[1])
            behind = steps[:, None] - steps
            seen = (behind >= 0) & (behind < self.sliding_window)
            return SDPA(states, states, states, attn_mask=seen)

    right = Windowed().eval()
    assert "no_leakage" not in failed(check_attention(AttentionSpec(right, inputs=randn(2, 9, 8))))
    right.sliding_window, blind = None, Windowed().eval()
    blind.forward = lambda states: states
    blind.sliding_window = None
    assert "no_leakage" in failed(check_attention(AttentionSpec(blind, inputs=randn(2, 9, 8))))


# --- a memory


class Looking(nn.Module):
    """Tokens that look things up in a text, whose padding is masked, or not in one way."""

    def __init__(self, wrong=""):
        super().__init__()
        torch.manual_seed(0)
        self.wrong = wrong
        self.query, self.both = nn.Linear(WIDTH, WIDTH), nn.Linear(8, 2 * WIDTH)
        self.eval()

    def forward(self, states, text, text_mask=None):
        query = self.query(states)[:, None]
        key, value = self.both(text)[:, None].chunk(2, -1)
        if self.wrong == "other_sample":
            key, value = key.roll(1, 0), value.roll(1, 0)
        if self.wrong == "first_unseen":
            key, value = key[:, :, 1:], value[:, :, 1:]
            text_mask = None if text_mask is None else text_mask[:, 1:]
        seen = None if text_mask is None else text_mask[:, None, None]
        return SDPA(query, key, value, attn_mask=None if self.wrong == "unmasked" else seen)[:, 0]


def looking(wrong="", **fields):
    given = {"arguments": {"text": randn(2, 6, 8, seed=1)}, "memory": "text"}
    return AttentionSpec(Looking(wrong), inputs=randn(2, 9, WIDTH), mask_argument="text_mask",
                         **given, **fields)  # fmt: skip


@pytest.mark.parametrize("causal", [None, "top_left"])
def test_a_block_with_a_memory_passes(causal):
    report = check_attention(looking(causal=causal))
    assert report.passed, str(report)
    assert statuses(report)["padding"] == statuses(report)["attention_inside"] == "passed"


def test_an_argument_that_is_as_long_as_the_memory_leaves_its_padding_out():
    given = {"text": randn(2, 6, 8, seed=1), "weights": torch.ones(2, 6)}
    block = Looking()
    model = SequenceModel(
        lambda states, text, weights, text_mask=None: block(states, text, text_mask),
        mask="keep", mask_argument="text_mask", arguments=given, memory_argument="text",
    )  # fmt: skip
    report = check_attention(AttentionSpec(model, inputs=randn(2, 9, WIDTH), causal=None))
    assert report.passed
    assert "weights: got shape (2, 6), made for sequences of 6" in message(report, "padding")


@pytest.mark.parametrize(
    ("wrong", "checks"),
    [
        ("unmasked", {"no_leakage", "padding"}),
        ("other_sample", {"no_leakage", "batch", "padding"}),
        ("first_unseen", {"no_leakage"}),
    ],
)
def test_a_block_that_reads_its_memory_wrongly_is_found(wrong, checks):
    report = check_attention(looking(wrong, causal=None))
    assert failed(report) >= checks, str(report)
    assert "memory element" in message(report, "no_leakage") or wrong == "other_sample"


@pytest.mark.parametrize("batch_first", [True, False])
def test_a_decoder_layer_of_torch_passes_with_its_memory(batch_first):
    torch.manual_seed(0)
    layer = nn.TransformerDecoderLayer(WIDTH, 2, 32, batch_first=batch_first).eval()
    model = SequenceModel(layer, "drop", "memory_key_padding_mask", batch_first=batch_first)
    model = replace(model, arguments={"memory": randn(2, 6, WIDTH)}, memory_argument="memory")
    report = check_attention(AttentionSpec(model, inputs=randn(2, 9, WIDTH), causal=None))
    assert report.passed, str(report)


# --- positions, lengths, arguments


class Encoder(nn.Module):
    """Attention with learned positions, which a mask keeps out of padding, or of all else."""

    def __init__(self, wrong=""):
        super().__init__()
        torch.manual_seed(0)
        self.wrong, self.at, self.inside = wrong, nn.Embedding(30, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.eval()

    def forward(self, states, keep=None, lengths=None):
        every = torch.ones(states.shape[:2], dtype=torch.bool)
        if lengths is not None and self.wrong != "lengths_ignored":
            keep = torch.arange(states.shape[1]) < lengths[:, None]
        keep = every if keep is None else keep
        shown = ~keep if self.wrong == "positions_inverted" else keep
        at = self.at((keep.cumsum(-1) - 1).clamp(min=0)) * shown[..., None]
        states = states + (0 if self.wrong == "none" else at)
        scores = self.inside(states) @ states.mT / WIDTH**0.5
        if self.wrong == "multiplied":
            return (scores.softmax(-1) * keep[:, None]) @ states
        return scores.masked_fill(~keep[:, None], -1e9).softmax(-1) @ states


def encoder_spec(wrong="", told=("keep", "keep"), **options):
    model = SequenceModel(Encoder(wrong), *told, **options)
    return AttentionSpec(model, inputs=randn(2, 9, WIDTH), causal=None)


def test_positions_that_are_declared_have_to_be_felt():
    assert statuses(check_attention(encoder_spec()))["positions"] == "skipped"
    assert check_attention(encoder_spec(has_positions=True)).passed
    report = check_attention(encoder_spec("positions_inverted", has_positions=True))
    assert failed(report) == {"positions"}
    assert "the order of tokens changes nothing" in message(report, "positions")
    assert check_attention(encoder_spec("none", has_positions=False)).passed
    assert failed(check_attention(encoder_spec(has_positions=False))) == {"positions"}


def test_weights_that_are_masked_after_the_softmax_are_found_under_padding():
    report = check_attention(encoder_spec("multiplied"))
    assert failed(report) == {"no_leakage", "padding"}
    assert report.diagnosis.defects == ("mask_after_softmax",)
    for name in ("no_leakage", "padding"):
        cause = "the mask is applied after the softmax in Encoder: rows of weights sum to less"
        assert f"  cause    {cause}" in message(report, name)


def test_positions_that_are_held_and_not_felt_are_hinted_at():
    text = str(check_attention(encoder_spec("positions_inverted")))
    assert "hint: the order of tokens changes nothing, though it seems to hold positions" in text
    assert "hint: " not in str(check_attention(encoder_spec()))


def test_a_later_chunk_that_sees_other_keys_is_told_by_what_was_captured():
    report = check_attention(spec_of("top_left", causal="top_left"))
    cause = "token 1 sees 1 of 2 keys with the cache, and 2 at once: the causal mask of a later"
    assert cause in message(report, "decoding")


def test_what_the_cache_holds_is_told_before_a_guess_at_the_token_from_which_it_is_wrong():
    told = message(check_attention(spec_of("rotated_again", causal="top_left")), "decoding")
    fact = "right up to token 1, wrong from token 2 on: in Decoder, the cached keys are others"
    assert f"{fact} than at once, values are not: rotated by other positions?" in told


def test_a_bias_that_a_later_chunk_counts_from_its_own_queries_is_told():
    assert check_attention(spec_of("bias", causal="top_left")).passed
    told = message(check_attention(spec_of("bias_from_zero", causal="top_left")), "decoding")
    assert "in Decoder, what is added to the scores of a later chunk is not what is added" in told


def test_entries_that_are_off_where_they_are_padded_are_said_to_be_padded():
    block, ids = Decoder("padding_uncounted"), tokens(3, 11)
    model = SequenceModel(block, mask="keep", mask_argument="keep", decode=block)
    with pytest.raises(Failure) as caught:
        assert_decode_matches_prefill(model, ids, lengths=[11, 8, 11])
    assert caught.value.cause.startswith(
        "batch entry 1 alone, which is padded, is off: in Decoder, the new keys are others"
    )


def test_padding_that_a_later_chunk_sees_is_told_of_an_entry_that_has_some():
    block, ids = Decoder("mask_forgotten"), tokens(3, 7)
    model = SequenceModel(block, mask="keep", mask_argument="keep", decode=block)
    with pytest.raises(Failure) as caught:
        assert_decode_matches_prefill(model, ids, lengths=[7, 5, 3])
    assert caught.value.cause == (
        "batch entries 1, 2 alone, which are padded, are off: in Decoder, token 5 of batch entry 1 "
        "sees 6 of 6 keys with the cache, and 4 at once: padding is not masked in a later chunk"
    )
    with pytest.raises(Failure) as caught:
        assert_decode_matches_prefill(model, ids[:2], lengths=[5, 5])
    assert "token 3 sees 4 of 4 keys with the cache, and 2 at once: padding" in caught.value.cause


@pytest.mark.parametrize(("behind", "words"), [(2, "2 others at once"), (0, "2 at once")])
def test_a_later_chunk_that_sees_as_many_keys_is_said_to_see_others(behind, words):
    class Near(Decoder):
        def seen(self, new, past, mask, documents):
            distance = torch.arange(past, past + new)[:, None] - torch.arange(past + new)
            return ((distance == 0) | (distance == (behind if past else 1)))[None, None]

    block = Near()
    with pytest.raises(Failure) as caught:
        assert_decode_matches_prefill(
            SequenceModel(block, decode=block), tokens(2, 7), chunks=[3, 1, 3]
        )
    assert f"{words}: the mask of a later chunk is another one" in caught.value.cause


def test_a_failure_under_padding_says_which_lengths_repeat_it():
    block, ids = Decoder("mask_forgotten"), tokens(3, 7)
    model = SequenceModel(block, mask="keep", mask_argument="keep", decode=block)
    with pytest.raises(Failure) as caught:
        assert_decode_matches_prefill(model, ids, lengths=torch.tensor([7, 5, 6]))
    assert caught.value.repeat == "chunks=[3, 1, 1, 1, 1], lengths=[7, 5, 6], seed=0"
    told = message(check_attention(spec_of("mask_forgotten")), "decoding")
    assert ", lengths=[9, 10], seed=0" in told


def test_a_cache_that_is_not_told_of_padding_leaves_unequal_lengths_out_and_says_so():
    block = Decoder("padding_uncounted")
    model = SequenceModel(
        block, mask="keep", mask_argument="keep", decode=lambda ids, cache: block(ids, cache)
    )
    report = check_attention(AttentionSpec(model, inputs=tokens(2, 11), causal="top_left"))
    assert report.passed
    said = "decoding: no batch of unequal lengths: decode= does not take keep="
    assert str(report).splitlines()[-1] == said


class Near(nn.Module):
    """Each token sees a few before it and a few behind it; padding is hidden."""

    def __init__(self, before=3, behind=2):
        super().__init__()
        torch.manual_seed(0)
        self.before, self.behind, self.layer = before, behind, nn.Linear(WIDTH, 3 * WIDTH)
        self.eval()

    def forward(self, hidden, keep=None):
        query, key, value = self.layer(hidden).unflatten(-1, (3, 2, -1)).permute(2, 0, 3, 1, 4)
        at = torch.arange(hidden.shape[1])
        seen = (at >= at[:, None] - self.before) & (at <= at[:, None] + self.behind)
        seen = seen if keep is None else seen & keep[:, None, None]
        return SDPA(query, key, value, attn_mask=seen).transpose(1, 2).flatten(2)


@pytest.mark.parametrize(
    ("size", "defect"),
    [
        ((3, 2), None),
        ((3, 1), "window_right_too_narrow"),
        ((2, 2), "window_left_too_narrow"),
        ((4, 2), "window_left_too_wide"),
    ],
)
def test_a_window_inside_a_block_is_held_to_all_that_is_declared(size, defect):
    model = SequenceModel(Near(*size), mask="keep", mask_argument="keep")
    spec = AttentionSpec(model, inputs=randn(2, 12, WIDTH), causal=None, window=(3, 2))
    report = check_attention(spec)
    assert report.passed is (defect is None)
    if defect is not None:
        assert report.diagnosis.defects == (defect,)


def test_what_is_declared_of_a_sequence_is_not_claimed_of_windows_that_it_is_cut_into():
    near, at = Near(99, 99), torch.arange(12)
    windows = (at - 2) % 12 // 4  # they begin two tokens later, and the last is both ends

    class Cut(nn.Module):
        def forward(self, hidden):
            cut = hidden.roll(-2, 1).unflatten(1, (3, 4)).flatten(0, 1)
            return near(cut).reshape(hidden.shape).roll(2, 1)

    seen = windows[:, None] == windows
    block, inputs = Cut().eval(), randn(2, 12, WIDTH)
    assert check_attention(AttentionSpec(block, inputs=inputs, causal=None, may_see=seen)).passed


class Merging(nn.Module):
    """Two heads whose outputs are merged in some order, and projected."""

    def __init__(self, merge, batch_first=True):
        super().__init__()
        torch.manual_seed(0)
        self.merge, self.batch_first = merge, batch_first
        self.split, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.eval()

    def forward(self, hidden):
        hidden = hidden if self.batch_first else hidden.transpose(0, 1)
        query, key, value = self.split(hidden).unflatten(-1, (3, 2, -1)).permute(2, 0, 3, 1, 4)
        output = self.out(self.merge(SDPA(query, key, value)))
        return output if self.batch_first else output.transpose(0, 1)


RESHAPED = "heads are merged in the wrong order after attention in Merging: its output goes on by"
MISPLACED = "its output goes on with numbers of one token in the place of another"


@pytest.mark.parametrize(
    ("merge", "words", "checks"),
    [
        (lambda heads: heads.transpose(1, 2).flatten(2), None, set()),
        (lambda heads: heads.permute(0, 2, 3, 1).flatten(2), None, set()),  # a token keeps its own
        (lambda heads: heads.reshape(len(heads), -1, WIDTH), RESHAPED, {"attention_inside"}),
        (
            lambda heads: heads.permute(1, 2, 0, 3).reshape(len(heads), -1, WIDTH),
            MISPLACED,
            {"no_leakage", "batch"},
        ),
    ],
)
def test_heads_that_are_merged_wrongly_are_told_by_what_the_projection_is_given(
    merge, words, checks
):
    report = check_attention(AttentionSpec(Merging(merge), inputs=randn(3, 6, WIDTH), causal=None))
    assert failed(report) == checks
    assert all(words in message(report, name) for name in checks)


@pytest.mark.parametrize("fused", [False, True])
def test_heads_that_are_split_by_a_view_alone_are_found_where_every_token_sees_all(fused):
    class Splitting(Merging):
        def forward(self, hidden):
            shape = (len(hidden) * 2, -1, WIDTH // 2)
            whole = self.split(hidden).chunk(3, -1)
            query, key, value = (part.contiguous().view(shape) for part in whole)
            if fused:
                query, key, value = (part.view(len(hidden), 2, *part.shape[1:])
                                     for part in (query, key, value))  # fmt: skip
            return self.out(SDPA(query, key, value).reshape(hidden.shape))

    block = Splitting(None)
    report = check_attention(AttentionSpec(block, inputs=randn(3, 6, WIDTH), causal=None))
    assert failed(report) == {"no_leakage", "attention_inside"}
    cause = "heads are split in the wrong order before attention in Splitting: by a reshape without"
    assert cause in message(report, "attention_inside")


def test_attention_over_the_batch_is_told_from_a_normalisation_over_it():
    block = Merging(lambda heads: heads.transpose(1, 2).flatten(2), batch_first=False)
    report = check_attention(AttentionSpec(block, inputs=randn(3, 6, WIDTH), causal=None))
    assert failed(report) == {"no_leakage", "batch"}
    for name in failed(report):
        cause = "attention in Merging takes the batch for the sequence: its rows are over the 3"
        assert cause in message(report, name)
    # Of as many samples as tokens nothing tells.
    report = check_attention(AttentionSpec(block, inputs=randn(6, 6, WIDTH), causal=None))
    assert "takes the batch for the sequence" not in str(report)


class Times(nn.Module):
    """A padding mask that is a product: what is hidden gets a number, the others 0 times it."""

    def __init__(self, number):
        super().__init__()
        self.number = number

    def forward(self, hidden, keep=None):
        scores = hidden @ hidden.mT / WIDTH**0.5
        if keep is not None:
            scores = scores + (1 - keep[:, None].float()) * self.number
        return scores.softmax(-1) @ hidden


def test_nothing_is_named_of_attention_that_gives_nan_alone():
    told = {"mask": "keep", "mask_argument": "keep"}
    inputs = randn(2, 6, WIDTH)
    right = SequenceModel(Times(-1e9).eval(), **told)
    assert check_attention(AttentionSpec(right, inputs=inputs, causal=None)).passed
    wrong = Times(-math.inf).eval()
    report = check_attention(
        AttentionSpec(SequenceModel(wrong, **told), inputs=inputs, causal=None)
    )
    cause = "a mask that hides nothing makes the output nan: is it multiplied by -inf, or by a"
    assert f"cause    {cause}" in message(report, "padding")
    with pytest.warns(CaptureWarning), capture_attention(wrong) as trace:
        wrong(inputs, torch.ones(2, 6, dtype=torch.bool))
    diagnosis = diagnose(trace)
    assert (diagnosis.healthy, diagnosis.defects) == (False, ())
    assert "gives nan and nothing else" in diagnosis.sentence


class Packing(nn.Module):
    """Packed documents do not see one another; their positions begin anew, or go on."""

    def __init__(self, wrong=""):
        super().__init__()
        torch.manual_seed(0)
        self.wrong, self.at, self.project = wrong, nn.Embedding(20, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.eval()

    def forward(self, hidden, packed):
        same = packed[:, :, None] == packed[:, None]
        seen = (same | (self.wrong == "seen")).tril()
        at = same.tril(-1).sum(-1)  # how many of its own document are before it
        at = torch.arange(hidden.shape[1]) if self.wrong == "positions" else at
        hidden = self.project(hidden + self.at(at))
        return SDPA(hidden, hidden, hidden, attn_mask=seen)


@pytest.mark.parametrize("wrong", ["", "positions", "seen"])
def test_a_document_gives_alone_what_it_gives_packed(wrong):
    packed, inputs = PACKED.expand(2, -1), randn(2, len(PACKED), WIDTH)
    cause = "the first document of a sequence is right: are the others shown to it by the mask, or"
    for some in (slice(1), slice(2)):
        with pytest.raises(Failure, match=cause) if wrong else nullcontext():
            assert_batch_independent(
                Packing(wrong), inputs[some], documents=PACKED, packed=packed[some]
            )


def test_positions_that_go_on_over_packed_documents_are_noted_as_they_may_be_meant():
    packed, inputs = PACKED.expand(2, -1), randn(2, len(PACKED), WIDTH)
    model = SequenceModel(Packing("positions"), arguments={"packed": packed})
    report = check_attention(AttentionSpec(model, inputs=inputs, documents=packed))
    assert report.passed
    note = "batch: rows of documents are not the same packed into one sequence as alone: the first"
    assert note in str(report)
    ends = {"packed": packed, "ends": torch.tensor([4, 11])}
    right = Packing()
    model = SequenceModel(lambda hidden, packed, ends: right(hidden, packed), arguments=ends)
    report = check_attention(AttentionSpec(model, inputs=inputs, documents=packed))
    assert report.passed
    assert "batch: ends: got shape (2,); accepted is a tensor (batch, length)" in str(report)
    with pytest.raises(ValueError, match="documents: got some, with an attention function"):
        assert_batch_independent(SDPA, *[randn(2, 1, 11, WIDTH)] * 3, documents=PACKED)


def test_a_block_that_forgets_its_mask_where_gradients_are_computed_is_found():
    class Saving(Near):
        def forward(self, hidden, keep=None):
            return Near(9, 9 * torch.is_grad_enabled())(hidden, keep)

    report = check_attention(AttentionSpec(Saving(), inputs=randn(2, 6, WIDTH), causal="top_left"))
    assert failed(report) == {"repeats", "no_leakage"}  # whose gradients see the future
    assert "outputs are others where gradients are computed" in message(report, "repeats")


def test_a_padding_mask_that_is_lost_where_gradients_are_computed_is_found():
    def losing(hidden, keep=None):
        return Near(9, 9)(hidden, None if torch.is_grad_enabled() else keep)

    told = SequenceModel(losing, mask="keep", mask_argument="keep")
    report = check_attention(AttentionSpec(told, inputs=randn(2, 6, WIDTH), causal=None))
    assert failed(report) == {"repeats"}


class Placed(nn.Module):
    """Attention that adds the position of each slot, and is told of no other positions."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.near, self.positions = Near(99, 99), nn.Embedding(20, WIDTH)
        self.eval()

    def forward(self, hidden, keep=None):
        return self.near(hidden + self.positions.weight[: hidden.shape[1]], keep)


def test_what_counts_positions_from_its_first_slot_is_asked_on_the_side_that_it_declares():
    told = SequenceModel(Placed(), mask="keep", mask_argument="keep")
    inputs = randn(2, 9, WIDTH)
    on_both = message(check_attention(AttentionSpec(told, inputs=inputs, causal=None)), "padding")
    assert "or say side='right' there if it is never padded on the left" in on_both
    told = replace(told, side="right")
    report = check_attention(AttentionSpec(told, inputs=inputs, causal=None))
    assert report.passed
    assert statuses(report)["padding"] == "passed"
    unmasked = replace(told, module=lambda hidden, keep=None: told.module(hidden))
    report = check_attention(AttentionSpec(unmasked, inputs=inputs, causal=None))
    assert failed(report) == {"no_leakage", "padding"}
    with pytest.raises(ValueError, match="side: got 'top'; accepted is one of 'right', 'left'"):
        replace(told, side="top")


def test_lengths_in_place_of_a_mask_are_asked_on_the_right():
    told = ("lengths", "lengths")
    report = check_attention(encoder_spec(told=told))
    assert report.passed, str(report)
    assert statuses(report)["padding"] == "passed"
    assert failed(check_attention(encoder_spec("lengths_ignored", told))) >= {"padding"}
    spec = AttentionSpec(Encoder(), inputs=randn(2, 9, WIDTH), causal=None, lengths="lengths")
    assert statuses(check_attention(spec))["padding"] == "passed"


def test_an_argument_as_long_as_the_sequence_leaves_padding_out_and_says_so():
    report = check_attention(spec_of(arguments={"documents": torch.zeros(2, 11).long()}))
    assert report.passed, str(report)
    assert statuses(report)["decoding"] == "passed"
    assert message(report, "padding").startswith(
        "documents: got shape (2, 11), made for sequences of 11; accepted is what the module makes"
    )


@pytest.mark.parametrize(
    ("fields", "match"),
    [
        ({"memory": "text"}, "memory: got 'text'; accepted is the name of one of arguments"),
        ({"documents": "documents"}, "documents: got 'documents'; accepted is of a block,"),
        ({"documents": torch.zeros(3, 11).long()}, r"documents: got shape \(3, 11\); accepted"),
        ({"may_see": torch.ones(7, 7).bool()}, r"may_see: got shape \(7, 7\); accepted"),
    ],
)
def test_what_is_declared_of_a_block_has_to_fit_its_inputs(fields, match):
    with pytest.raises(ValueError, match=match):
        spec_of(**fields)


# --- what is said


def test_what_needs_more_arguments_than_are_declared_says_so_once_and_is_not_charged():
    report = check_attention(AttentionSpec(Looking(), inputs=randn(2, 9, WIDTH)))
    assert not report.passed
    assert set(statuses(report).values()) == {"skipped"}
    assert str(report).count("missing 1 required positional argument: 'text'") == 1
    assert "nothing was examined; it cannot be called as it is declared: Looking" in str(report)


def test_what_raises_whatever_it_is_given_fails_once():
    report = check_attention(AttentionSpec(Decoder(), inputs=randn(2, 9, WIDTH)))
    assert failed(report) == {"call"}
    others = {result.message for result in report.results if result.name != "call"}
    assert "it cannot be called as it is declared" in others
    assert set(statuses(report).values()) == {"failed", "skipped"}


def test_a_block_in_which_nothing_was_captured_is_not_called_clean_without_saying_so():
    report = check_attention(AttentionSpec(nn.Linear(8, 8).eval(), inputs=randn(2, 9, 8)))
    assert "no_leakage" in failed(report)
    assert "inside   nothing was judged in the call that failed: " in str(report)

    class Mixing(nn.Module):
        def forward(self, states):
            return states + states.cumsum(1)

    report = check_attention(AttentionSpec(Mixing().eval(), inputs=randn(2, 9, 8)))
    assert report.passed, str(report)
    first = str(report).splitlines()[0]
    assert "all checks passed, 3 skipped; attention inside was not judged: " in first


def test_of_a_compiled_block_the_report_says_that_the_captured_code_is_another():
    model = torch.compile(Decoder("mask_alone"), backend="eager")
    spec = SequenceModel(model, mask="keep", mask_argument="keep", decode=model)
    padding = [check for check in BLOCK_CHECKS if check.name == "padding"]
    text = str(check_attention(AttentionSpec(spec, inputs=tokens(2, 5)), checks=padding))
    words = "attention inside was captured in the eager code, which is not the compiled code"
    assert words in text
    assert words not in str(check_attention(spec_of("mask_alone"), checks=padding))


def test_a_failure_makes_the_call_that_failed_once_more():
    report = check_attention(spec_of("mask_alone"))
    padded = next(result.failure for result in report.failed if result.name == "padding")
    with torch.no_grad(), capture_attention() as trace:
        padded.again()
    assert trace[0].shape[-1] > 11


def test_heads_that_see_differently_are_held_to_what_any_of_them_may_see():
    class Apart(nn.Module):
        def __init__(self, ahead):
            super().__init__()
            self.ahead = ahead

        def forward(self, states):
            steps = torch.arange(states.shape[1])
            behind = steps[:, None] - steps
            seen = torch.stack([behind == 0, (behind >= -self.ahead) & (behind <= 1)])
            heads = states.unflatten(-1, (2, -1)).transpose(1, 2)
            return SDPA(heads, heads, heads, attn_mask=seen).transpose(1, 2).flatten(2)

    def near(batch, head, query, key):
        return (key <= query) & (query - key <= head)

    for ahead in (0, 1):
        spec = AttentionSpec(Apart(ahead).eval(), inputs=randn(2, 9, 8), causal=None, may_see=near)
        assert ("no_leakage" in failed(check_attention(spec))) == bool(ahead)


# --- each defect of the catalogue inside of a block


class Planted(nn.Module):
    """Attention with projections of its own, and a defect in it."""

    def __init__(self, defect, causal):
        super().__init__()
        told = declared_for(defect)
        told |= {"alibi": told["alibi"](4)} if "alibi" in told else {}
        self.causal, self.scale = causal, told.pop("scale", None)
        self.attend = attention_with(defect, **told)
        self.query, self.keys, self.out = (nn.Linear(WIDE, WIDE) for _ in range(3))

    def forward(self, states, keep=None):
        query = self.query(states).unflatten(-1, (4, -1)).transpose(1, 2)
        key, value = self.keys(states).unflatten(-1, (2, 2, -1)).permute(2, 0, 3, 1, 4)
        mask = None if keep is None else keep[:, None, None]
        mixed = self.attend(query, key, value, mask, self.causal, scale=self.scale)
        return self.out(mixed.transpose(1, 2).flatten(2))


class Language(nn.Module):
    """A causal model with a defect in each of its two layers."""

    def __init__(self, defect):
        super().__init__()
        self.embedding, self.head = nn.Embedding(50, WIDE), nn.Linear(WIDE, 50)
        self.first, self.second = Planted(defect, True), Planted(defect, True)

    def forward(self, ids, keep=None):
        states = self.embedding(ids)
        states = states + self.first(states, keep)
        return self.head(states + self.second(states, keep))


# What is said of a cause, and of which defects it is true.
TRUE_OF = {
    "it is ignored": ("mask_ignored", "mask_ignored_when_causal"),
    "is read as its opposite": ("mask_inverted",),
    "the mask multiplies": ("mask_multiplied",),
    "is applied after the softmax": ("mask_after_softmax",),
    "no mask hides it there": ("mask_ignored", "mask_ignored_when_causal", "mask_added_as_number",
                               "mask_of", "mask_tiled", "mask_inverted", "mask_transposed"),
    "heads are merged in the wrong": ("heads_merged",),
    "causal mask is lost where": ("causal_ignored_with_mask",),
}  # fmt: skip
# What a defect is in a call with a mask, or for as many queries as keys, or of few heads.
AS = {"causal_ignored_with_mask": "causal_ignored", "mask_ignored_when_causal": "mask_ignored"}
KINDS = ("encoder", "decoder", "language")
# Some of them; the width of a head is no root of another size, so that scales are told apart.
SOME = [defect.name for defect in PLANTED][4::11]
WIDE = 24


@pytest.mark.parametrize(("name", "kind"), [*zip(SOME, itertools.cycle(KINDS), strict=False)])
def test_no_cause_that_is_named_of_a_block_with_a_defect_is_false(name, kind):
    torch.manual_seed(0)
    module = Language(name) if kind == "language" else Planted(name, kind == "decoder")
    told = {n: given for n, given in declared_for(name).items() if n != "fully_masked"}
    told |= {"alibi": told["alibi"](4)} if "alibi" in told else {}
    report = check_attention(
        AttentionSpec(
            SequenceModel(module.eval(), mask="keep", mask_argument="keep"),
            inputs=tokens(2, 11) if kind == "language" else randn(2, 11, WIDE),
            causal=None if kind == "encoder" else "top_left",
            **told,
        )
    )
    named = () if report.diagnosis is None else report.diagnosis.defects
    assert set(named) <= {name, AS.get(name)}
    said = [result.failure.cause or "" for result in report.failed if result.failure is not None]
    for words, true_of in TRUE_OF.items():
        assert name.startswith(true_of) or not any(words in cause for cause in said)


class Padded(nn.Module):
    """A block whose mask has a name that nobody knows."""

    def forward(self, states, pad=None, cache=None, depth: int | None = None):
        masked = states if pad is None else states * pad[..., None]
        return states + masked.mean(1, keepdim=True)


def test_an_optional_tensor_that_nobody_declares_gets_a_hint_and_what_is_skipped_its_reason():
    inputs, some = randn(2, 9, 8), [c for c in BLOCK_CHECKS if c.name in ("padding", "decoding")]
    report = check_attention(AttentionSpec(Padded(), inputs=inputs, causal=None), checks=some)
    hint = next(line for line in str(report).splitlines() if line.startswith("hint: "))
    assert hint.startswith("hint: it takes pad=, of which nothing is declared, and no check passes")
    assert "skipped decoding: it is not declared to be causal" in str(report).splitlines()
    told = SequenceModel(Padded(), mask="keep", mask_argument="pad")
    given = AttentionSpec(Padded(), inputs=inputs, arguments={"pad": torch.ones(2, 9)})
    layer = AttentionSpec(nn.TransformerEncoderLayer(8, 2, batch_first=True), inputs=inputs)
    for spec in (AttentionSpec(told, inputs=inputs, causal=None), given, layer):
        assert hints_of(spec) == ()
