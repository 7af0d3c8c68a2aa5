"""What assert_decode_matches_prefill accepts and refuses."""

import math
import random
import re
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from attention_subjects import (
    DTYPES,
    TRANSFORMERS,
    VOCABULARY,
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
from devices import on_accelerators
from torch import nn
from torch.nn.functional import scaled_dot_product_attention as sdpa

from pytest_attnheat import assert_decode_matches_prefill
from pytest_attnheat.assertions.behaviour.sequences import CachedDecoding, SequenceModel

CACHED = [(name, implementation) for name, implementation in TRANSFORMERS if name != "bert"]


def causal(query_len, key_len=None):
    """A causal mask aligned to the bottom right."""
    key_len = query_len if key_len is None else key_len
    return torch.ones(query_len, key_len, dtype=torch.bool).tril(key_len - query_len)


def bottom_right(query, key, value, is_causal=False):
    """As FlashAttention: its own is_causal is aligned to the bottom right."""
    mask = causal(query.shape[-2], key.shape[-2]) if is_causal else None
    return plain(query, key, value, attn_mask=mask)


def spoilt(tensor, *places):
    changed = tensor.clone()
    changed[places] = 0
    return changed


CHANGES = {
    "entry 1": lambda key, value: (spoilt(key, 1), value),
    "full": lambda key, value: (
        (key, value) if key.shape[1] < 5 else (spoilt(key, ..., 1, 0), value)
    ),
}


class Decoder(nn.Module):
    """One or two layers of causal attention with a cache, and what may go wrong in them."""

    def __init__(self, mistake=None, layers=1):
        super().__init__()
        torch.manual_seed(0)
        self.mistake = mistake
        self.embedding = nn.Embedding(VOCABULARY, WIDTH)
        self.positions = nn.Embedding(64, WIDTH)
        self.layers = nn.ModuleList(nn.Linear(WIDTH, 3 * WIDTH) for _ in range(layers))

    def forward(self, ids, position_ids=None):
        return self.decode(ids, None, position_ids)[0]

    def decode(self, ids, cache, position_ids=None):
        past, cache = (0, None) if cache is None else cache
        start = 0 if self.mistake == "positions" else past
        start -= self.mistake == "behind" and past > 0
        if position_ids is None:
            position_ids = torch.arange(start, start + ids.shape[1])
        hidden = (self.embedding(ids) + self.positions(position_ids)) / 2
        kept = []
        for number, layer in enumerate(self.layers):
            query, key, value = layer(hidden).chunk(3, -1)
            if cache is not None and self.mistake != "cache":
                key, value = (
                    torch.cat([old, new], -2)
                    for old, new in zip(cache[number], (key, value), strict=True)
                )
            mask = causal(ids.shape[1], key.shape[-2])
            if self.mistake == "ahead":
                mask = torch.ones_like(mask)
            if self.mistake == "top left" and ids.shape[1] > 1:
                mask = torch.ones_like(mask).tril()
            hidden = hidden + plain(query, key, value, attn_mask=mask)
            kept.append((key, value))
        if self.mistake in CHANGES:
            kept = [CHANGES[self.mistake](key, value) for key, value in kept]
        if self.mistake == "first" and past == 0 and ids.shape[1] > 1:
            kept = [(key[:, 1:], value[:, 1:]) for key, value in kept]
        if self.mistake == "last" and ids.shape[1] > 1:
            kept = [(key[:, :-1], value[:, :-1]) for key, value in kept]
        return hidden, (past + ids.shape[1], kept)

    def subject(self):
        return SequenceModel(self, positions_argument="position_ids", decode=self.decode)


def message(subject, *inputs, **arguments):
    with pytest.raises(AssertionError) as caught:
        assert_decode_matches_prefill(subject, *inputs, **arguments)
    return str(caught.value)


def cause(told):
    return told.split("  cause    ")[1].splitlines()[0]


# --- attention functions


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("length", [2, 3, 7, 18])
@pytest.mark.parametrize("function", [sdpa, plain], ids=["torch", "plain"])
def test_causal_attention_passes_in_every_dtype_and_length(function, length, dtype):
    inputs = qkv(2, 3, length, length, dtype=dtype)
    bias = randn(length, length, dtype=dtype).masked_fill(~causal(length), -math.inf)
    assert_decode_matches_prefill(function, *inputs)
    assert_decode_matches_prefill(function, *inputs, attn_mask=bias, scale=0.7)
    assert_decode_matches_prefill(function, *inputs, attn_mask=causal(length).triu(-2))
    if function is plain:
        both = {"attn_mask": bias.clamp(min=-1e4), "is_causal": True}
        assert_decode_matches_prefill(function, *inputs, **both)


def test_the_last_queries_of_a_longer_cache_pass():
    query, key, value = qkv(query_len=4, key_len=9)
    assert_decode_matches_prefill(plain, query, key, value, attn_mask=causal(4, 9))


def test_attention_aligned_to_the_bottom_right_passes_if_this_is_said():
    assert_decode_matches_prefill(bottom_right, *qkv(), alignment="bottom_right")
    with pytest.raises(TypeError, match="attn_mask"):  # a chunk is called with its mask
        assert_decode_matches_prefill(bottom_right, *qkv())


def test_multihead_attention_passes():  # flex_attention: see test_no_false_alarms
    inputs = (randn(2, 5, WIDTH),) * 3
    assert_decode_matches_prefill(multihead(), *inputs)
    assert_decode_matches_prefill(multihead(batch_first=False), *inputs)


def test_grouped_query_attention_passes():
    query, key, value = qkv(2, 4)
    assert_decode_matches_prefill(sdpa, query, key[:, :2], value[:, :2], enable_gqa=True)


def test_chunks_are_called_with_their_rows_of_the_mask_and_a_last_query_without_one():
    calls = []

    def attention(query, key, value, **arguments):
        calls.append((query.shape[-2], key.shape[-2], arguments))
        return plain(query, key, value, **arguments)

    assert_decode_matches_prefill(attention, *qkv(), chunks=[3, 1, 2])
    whole, again, *chunks = calls
    assert whole == again == (6, 6, {"is_causal": True})
    assert [call[:2] for call in chunks] == [(3, 3), (1, 4), (2, 6)]
    assert torch.equal(chunks[0][2].pop("attn_mask"), causal(3))
    assert torch.equal(chunks[2][2].pop("attn_mask"), causal(2, 6))
    assert [call[2] for call in chunks] == [{}, {}, {}]


def test_a_causal_mask_aligned_to_the_top_left_is_told_with_the_place():
    def attention(query, key, value, is_causal=False):
        return sdpa(query, key, value, is_causal=is_causal)

    told = message(attention, *qkv(), alignment="bottom_right")
    lines = told.splitlines()
    assert lines[0] == (
        "assert_decode_matches_prefill: 30 of 36 outputs decoded token by token, with "
        "is_causal=True, aligned to the bottom right, differ from the prefill"
    )
    assert ", decoded alone, is off by up to" in lines[1].replace(" decoded", ", decoded")
    assert "(allowed 2.0e-05)" in lines[1]
    assert lines[2].startswith("  first    output[0, 0, 1], token 1 decoded alone, is off by")
    assert cause(told) == (
        "token 5 decoded alone: the output is that of attention whose causal mask is aligned to "
        "the other corner (top left, bottom right)"
    )
    assert lines[-1] == "  repeat   chunks=[1, 1, 1, 1, 1, 1], seed=0"


def test_what_is_not_seen_in_a_chunk_is_told():
    def unless_square(change):
        def attention(query, key, value, is_causal=False, attn_mask=None):
            if query.shape[-2] == key.shape[-2]:
                return plain(query, key, value, is_causal=True)
            return change(query, key, value, attn_mask)

        return partial(message, attention, *qkv())

    def own_keys(query, key, value, mask):
        length = query.shape[-2]
        return plain(
            query, key[..., -length:, :], value[..., -length:, :], attn_mask=causal(length)
        )

    told = unless_square(own_keys)(chunks=[3, 2, 1])
    assert "outputs decoded in chunks of 3, 2, 1, with its rows of the mask, differ" in told

    told = unless_square(lambda query, key, value, mask: plain(query, key, value))()
    assert "outputs decoded in chunks of 3, 1, 2," in told
    assert cause(told).startswith("tokens 4 to 5 decoded together: the output is that of attention")
    assert "that ignores the mask" in cause(told)
    assert "first    output[0, 0, 4], token 4 of tokens 4 to 5 decoded together, is off" in told

    def without_first(query, key, value, mask):
        return plain(query, key[..., 1:, :], value[..., 1:, :])

    assert "never sees the first key" in cause(unless_square(without_first)(chunks=[5, 1]))

    def without_last(query, key, value, mask):
        return plain(query, key[..., :-1, :], value[..., :-1, :])

    assert "never sees the last key" in cause(unless_square(without_last)(chunks=[5, 1]))


def test_a_query_without_any_key_is_not_judged():
    def mean_of_all(query, key, value, attn_mask=None):  # as a mask of -1e9 gives
        mask = torch.ones(1, dtype=torch.bool) if attn_mask is None else attn_mask
        scores = (query @ key.mT).masked_fill(~mask, -1e9)
        return scores.softmax(-1) @ value

    mask = causal(6)
    mask[2] = False
    assert_decode_matches_prefill(mean_of_all, *qkv(), attn_mask=mask)


def test_a_mask_that_shows_later_keys_is_refused():
    mask = causal(6)
    mask[2, 4] = True
    with pytest.raises(ValueError, match="query 2 may see key 4, which comes after it"):
        assert_decode_matches_prefill(plain, *qkv(), attn_mask=mask)
    for later in (mask, torch.ones(6, 6, dtype=torch.bool)):  # which is_causal takes away
        assert_decode_matches_prefill(plain, *qkv(), attn_mask=later, is_causal=True)
    with pytest.raises(ValueError, match="is_causal: got False, and no attn_mask"):
        assert_decode_matches_prefill(plain, *qkv(), is_causal=False)


def test_lengths_that_do_not_fit_are_refused():
    inputs = qkv(query_len=4, key_len=9)
    with pytest.raises(
        ValueError, match=r"got 4 queries and 9 keys; accepted is as many queries as keys"
    ):
        assert_decode_matches_prefill(plain, *inputs)
    with pytest.raises(ValueError, match="got a sequence of 1 token; accepted is two or more"):
        assert_decode_matches_prefill(plain, *qkv(query_len=1, key_len=1))


# --- models


@pytest.mark.parametrize("length", [2, 9])
@pytest.mark.parametrize(("name", "implementation"), CACHED)
def test_models_of_transformers_pass_with_their_cache(name, implementation, length):
    model = of_transformers(name, implementation)
    assert_decode_matches_prefill(model, tokens(2, length))
    assert_decode_matches_prefill(model, tokens(2, 6), chunks=[2, 3, 1])
    real = torch.ones(2, length, dtype=torch.long)
    assert_decode_matches_prefill(model, tokens(2, length), attention_mask=real)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("name", "implementation"), CACHED)
def test_models_of_transformers_pass_in_other_dtypes(name, implementation, dtype):
    model = of_transformers(name, implementation, dtype)
    assert_decode_matches_prefill(model, tokens(2, 9))


def test_the_cache_of_transformers_is_used():
    model, lengths = of_transformers("gpt2", "sdpa"), []
    hook = model.register_forward_pre_hook(lambda module, given: lengths.append(given[0].shape[1]))
    assert_decode_matches_prefill(model, tokens(2, 4), chunks=[2, 1, 1])
    hook.remove()
    assert lengths == [1, 4, 4, 2, 1, 1]  # is there a cache; twice the whole; the chunks


def test_a_cache_that_is_not_there_is_noticed_and_looking_ahead_told():
    told = message(of_transformers("bert", "sdpa"), tokens(2, 6))
    assert "10 of 12 outputs decoded token by token, without a cache, differ" in told
    assert cause(told) == (
        "token 0 decoded alone: the output changes when later tokens are cut off: the model looks "
        "ahead, or depends on the length"
    )


@pytest.mark.parametrize(
    "settings", [{"return_dict": False}, {"return_dict": True, "use_cache": False}], ids=str
)
@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_the_cache_is_used_whatever_a_caller_says_of_it_or_of_the_result(name, settings):
    model, calls = of_transformers(name, "sdpa"), []
    hook = model.register_forward_pre_hook(lambda module, given: calls.append(given[0].shape[1]))
    assert_decode_matches_prefill(model, tokens(2, 6), chunks=[4, 2], **settings)
    hook.remove()
    assert calls[-2:] == [4, 2]
    with pytest.raises(AssertionError, match="without a cache"):
        assert_decode_matches_prefill(of_transformers("bert", "sdpa"), tokens(2, 6), **settings)


def test_the_cache_is_found_in_a_tuple_and_may_be_missing():
    cache = SimpleNamespace(get_seq_length=lambda: 1)
    inputs = tokens(1, 2)
    for returned, found in (
        ((inputs, cache, inputs), cache),
        ((inputs, (inputs, inputs)), None),
        (SimpleNamespace(logits=inputs, past_key_values=cache), cache),
        (SimpleNamespace(logits=inputs), None),
    ):
        decode = CachedDecoding(lambda *_, returned=returned, **__: returned)
        assert decode(inputs, None) == (returned, found)


class Taking(nn.Module):
    """A model with a cache, which nobody asked for."""

    def forward(self, inputs, cache=None):
        return inputs.cumsum(1) + (0 if cache is None else cache)


@pytest.mark.parametrize("name", ["cache", "past_key_values"])
def test_a_model_gets_its_cache_under_the_name_that_it_has_for_it(name):
    seen = {}

    class Model(torch.nn.Module):
        if name == "cache":

            def forward(self, inputs, cache=None, use_cache=None):
                seen["cache"] = cache
                return SimpleNamespace(logits=inputs, cache="next")

        else:

            def forward(self, inputs, past_key_values=None, use_cache=None):
                seen["past_key_values"] = past_key_values
                return SimpleNamespace(logits=inputs, past_key_values="next")

    _, cache = CachedDecoding(Model())(torch.ones(1, 2), "first")
    assert (seen, cache) == ({name: "first"}, "next")


@pytest.mark.parametrize(
    "name", ["cache", "kv_cache", "past", "past_key_values", "layer_past", "past_kv", "use_cache"]
)
def test_a_cache_that_nobody_says_how_to_use_is_refused(name):
    scope = {}
    exec(f"def forward(self, inputs, {name}=None): return inputs.cumsum(1)", scope)
    model = type("Decoder", (nn.Module,), {"forward": scope["forward"]})()
    told = (
        f"Decoder.forward takes '{name}', but nothing says how to decode with it: "
        "SequenceModel(model, decode=...), where decode(chunk, cache) returns (output, cache); or "
        "wrap the model in a lambda to compare prefixes alone"
    )
    for subject in (model, SequenceModel(model)):
        with pytest.raises(ValueError, match="^" + re.escape(told) + "$"):
            assert_decode_matches_prefill(subject, randn(2, 5, 4))
    with pytest.raises(ValueError, match=f"forward takes '{name}'"):
        assert_decode_matches_prefill(model.forward, randn(2, 5, 4))
    assert_decode_matches_prefill(lambda inputs: model(inputs), randn(2, 5, 4))


@pytest.mark.parametrize(
    ("decode", "got"),
    [
        (lambda inputs, cache: inputs, r"a tensor \(2, 5, 4\)"),
        (lambda inputs, cache: (inputs,), "a tuple of 1"),
        (lambda inputs, cache: {"a": inputs, "b": cache}, "dict"),
        (
            lambda inputs: (inputs, None),
            "one that cannot be called as decode.chunk, cache.: too many",
        ),
    ],
    ids=["output", "one", "mapping", "one argument"],
)
def test_a_decode_that_returns_no_output_and_cache_is_refused(decode, got):
    with pytest.raises(
        TypeError, match=rf"decode: got {got}.*; accepted is .* returns \(output, cache\)"
    ):
        assert_decode_matches_prefill(
            SequenceModel(Taking(), decode=decode), randn(2, 10, 4), chunks=[5, 5]
        )


def test_a_cached_model_that_fails_on_a_prefix_is_reported_all_the_same():
    class Fixed(Decoder):
        def forward(self, ids):
            if ids.shape[1] != 9:
                raise RuntimeError("wants 9 tokens")
            return super().forward(ids)

    model = Fixed("top left")
    told = message(SequenceModel(model, decode=model.decode), tokens(2, 9), chunks=[4, 3, 2])
    assert "or the mask of a later chunk" in cause(told)


@pytest.mark.parametrize("own", [False, True])
def test_what_writes_to_its_inputs_passes_and_leaves_those_of_the_caller(own):
    def attention(query, key, value, attn_mask=None, is_causal=False):
        output = plain(query, key, value, attn_mask=attn_mask, is_causal=is_causal)
        for tensor in (query, key, value) if attn_mask is None else (query, key, value, attn_mask):
            tensor.zero_()
        return output

    inputs = (*qkv(), causal(6)) if own else qkv()
    copies = [t.clone() for t in inputs]
    assert_decode_matches_prefill(
        attention, *inputs[:3], **({"attn_mask": inputs[3]} if own else {})
    )
    assert all(torch.equal(*pair) for pair in zip(inputs, copies, strict=True))


def test_a_model_that_writes_to_a_chunk_passes():
    class Writing(Decoder):
        def decode(self, ids, cache, position_ids=None):
            given = ids.clone()
            ids.zero_()
            return super().decode(given, cache, position_ids)

    inputs = tokens(2, 9)
    assert_decode_matches_prefill(Writing().subject(), inputs)
    assert torch.equal(inputs, tokens(2, 9))


@pytest.mark.parametrize("length", [2, 7])
def test_models_without_a_cache_are_given_prefixes(length):
    inputs, later = randn(2, length, WIDTH), ~causal(length)
    assert_decode_matches_prefill(causal_encoder(), tokens(2, length))
    assert_decode_matches_prefill(multihead(), inputs, attn_mask=later)
    assert_decode_matches_prefill(multihead(batch_first=False), inputs, attn_mask=later)
    assert_decode_matches_prefill(encoder_layer(), inputs, src_mask=later, is_causal=True)
    assert_decode_matches_prefill(encoder(), inputs, mask=later)
    told = message(multihead(), inputs)
    assert "the model looks ahead, or depends on the length" in cause(told)


def test_a_model_with_a_cache_passes_with_and_without_saying_where_tokens_stand():
    model = Decoder(layers=2)
    assert_decode_matches_prefill(model.subject(), tokens(2, 9))
    positions = torch.arange(5, 14).expand(2, -1)
    assert_decode_matches_prefill(model.subject(), tokens(2, 9), position_ids=positions)


class LengthFirst(Decoder):
    def decode(self, ids, cache, position_ids=None):
        hidden, cache = super().decode(ids.mT, cache, position_ids)
        return hidden.transpose(0, 1), cache


def test_a_cached_model_whose_length_comes_first_passes():
    model = LengthFirst()
    subject = SequenceModel(model, decode=model.decode, batch_first=False)
    assert_decode_matches_prefill(subject, tokens(2, 9))


@pytest.mark.parametrize(
    ("mistake", "chunks", "words"),
    [
        ("cache", None, "is that of this chunk alone at its positions: the cache is not used"),
        ("positions", None, "with positions that start again at 0 in each chunk"),
        ("positions", [4, 2, 3], "with positions that start again at 0 in each chunk"),
        ("first", [8, 1], "without the first token of the cache"),
        ("last", [8, 1], "without the token just before, the last of the cache"),
        ("ahead", None, "without a cache, too, the output changes when later tokens are cut off"),
        ("ahead", [8, 1], "without a cache, too, the output changes when later tokens are cut off"),
        ("top left", None, "single tokens are right, longer chunks are not: within a chunk the"),
        ("top left", [4, 5], "what comes with a cache is not: the cached keys, the positions, or"),
        ("behind", None, "with positions that are one too small after the first chunk"),
        ("entry 1", None, "batch entry 1 alone is off: look at how the cache is indexed"),
        ("full", None, "right up to token 4, wrong from token 5 on: is the cache full then"),
    ],
)
def test_a_mistake_in_the_cache_is_told(mistake, chunks, words):
    for layers in (1, 2) if mistake in ("cache", "positions", "top left") else (1,):
        told = message(Decoder(mistake, layers).subject(), tokens(2, 9), chunks=chunks)
        assert words in cause(told)


class Windowed(nn.Module):
    """A layer that sees itself and three tokens before, and keeps as many of them in its cache."""

    def __init__(self, kept=3, room=0):
        super().__init__()
        torch.manual_seed(0)
        self.kept, self.room = kept, room
        self.embedding, self.layer = nn.Embedding(50, WIDTH), nn.Linear(WIDTH, 3 * WIDTH)
        self.eval()

    def forward(self, ids, cache=None):
        query, key, value = self.layer(self.embedding(ids)).chunk(3, -1)
        at = place = torch.arange(ids.shape[1]) + (0 if cache is None else int(cache[2][-1]) + 1)
        if cache is not None:
            new = zip(cache, (key, value, at), (1, 1, 0), strict=True)
            key, value, place = (torch.cat([old, one], dim) for old, one, dim in new)
        kept = key[:, -self.kept :], value[:, -self.kept :], place[-self.kept :]
        if self.room and cache is not None:  # slots that nothing was written to
            key, value = (nn.functional.pad(one, (0, 0, 0, self.room)) for one in (key, value))
            place = torch.cat([place, place[-1:].expand(self.room)])
        behind = at[:, None] - place
        seen = (behind >= 0) & (behind <= 3)
        return sdpa(query, key, value, attn_mask=seen), kept

    @staticmethod
    def reordered(cache, order):
        return cache[0][order], cache[1][order], cache[2]


@pytest.mark.parametrize(
    ("mistake", "words"),
    [
        ({"kept": 2}, "in Windowed, token 3 sees token 0 at once, not with the cache"),
        ({"kept": 3, "room": 2}, "no token's at once: a slot that nothing was written to?"),
    ],
)
def test_keys_that_a_short_cache_lost_or_never_had_are_told_by_the_keys(mistake, words):
    right, ids = Windowed(), torch.arange(12).reshape(1, 12)
    assert_decode_matches_prefill(SequenceModel(right, decode=right), ids)
    wrong = Windowed(**mistake)
    assert words in cause(message(SequenceModel(wrong, decode=wrong), ids))


@pytest.mark.parametrize(
    ("batch", "reorder", "words"),
    [
        (
            2,
            lambda cache, order: cache,
            "all are off: is the whole cache reordered, keys and values",
        ),
        (
            2,
            lambda cache, order: Windowed.reordered(cache, order.argsort()),
            "entries that keep their place",
        ),
        (4, lambda cache, order: cache, "entries that keep their place alone are right: is the"),
        (4, lambda cache, order: (cache[0][order], *cache[1:]), "entries that keep their place"),
        (
            4,
            lambda cache, order: Windowed.reordered(cache, order.argsort()),
            "is the cache put in the order that it is given: its entry i is entry order[i]?",
        ),
    ],
)
def test_a_cache_that_is_not_reordered_as_beam_search_needs_it_is_found(batch, reorder, words):
    model, ids = Windowed(), torch.arange(8 * batch).reshape(batch, 8)
    right = SequenceModel(model, decode=model, reorder=Windowed.reordered)
    assert_decode_matches_prefill(right, ids)
    told = message(SequenceModel(model, decode=model, reorder=reorder), ids)
    claim = (
        "outputs decoded with the cache after the batch was put in another order, as beam search"
    )
    assert claim in told
    assert words in cause(told)


def test_a_cache_that_cannot_be_reordered_is_not_asked_to():
    def refuses(cache, order):
        raise NotImplementedError

    model, ids = Windowed(), torch.arange(16).reshape(2, 8)
    assert_decode_matches_prefill(SequenceModel(model, decode=model, reorder=refuses), ids)


def test_what_reorder_cannot_be_asked_of_is_refused():
    model, one = Windowed(), torch.arange(8).reshape(1, 8)
    right = SequenceModel(model, decode=model, reorder=Windowed.reordered)
    with pytest.raises(ValueError, match="got one sequence with reorder=; accepted is two or more"):
        assert_decode_matches_prefill(right, one)
    assert_decode_matches_prefill(right, one, chunks=[4, 4])  # which reorders nothing
    assert_decode_matches_prefill(of_transformers("gpt2", "sdpa"), tokens(1, 8))  # nor is it said
    with pytest.raises(ValueError, match="reorder: got a function without decode="):
        SequenceModel(model, reorder=Windowed.reordered)
    forgetful = SequenceModel(model, decode=model, reorder=lambda cache, order: None)
    with pytest.raises(TypeError, match=r"reorder: got None back; accepted is a function of"):
        assert_decode_matches_prefill(forgetful, one.repeat(2, 1))


def test_the_message_names_the_chunking_the_first_token_and_how_to_repeat():
    lines = message(Decoder("top left").subject(), tokens(2, 9), seed=3).splitlines()
    assert lines[0] == (
        "assert_decode_matches_prefill: 8 of 18 outputs decoded in chunks of 4, 1, 2, 2, with the "
        "cache, differ from the prefill"
    )
    assert lines[-2] == "  tensor   float32 (2, 9, 16) on cpu"
    assert lines[-1] == "  repeat   chunks=[4, 1, 2, 2], seed=3"
    place = r"output\[{}\], token {} of tokens [57] to [68] decoded together, is off by up to"
    assert re.search("  worst    " + place.format(r"\d, \d", r"\d"), lines[1])
    inputs = tokens(2, 9)
    inputs[0, :8] = inputs[0, 0]
    lines = message(Decoder("positions").subject(), inputs).splitlines()
    assert lines[2].startswith("  first    output[0, 1], token 1 decoded alone, is off by up to")


def test_of_a_long_sequence_the_last_tokens_are_decoded_one_by_one():
    class Counting(nn.Module):
        def __init__(self):
            super().__init__()
            self.lengths = []

        def forward(self, inputs):
            self.lengths.append(inputs.shape[1])
            return inputs.cumsum(1)

    model = Counting()
    assert_decode_matches_prefill(model, randn(1, 200, 4, dtype=torch.float64))
    by_token = model.lengths[2:67]
    assert by_token == [136, *range(137, 201)]
    assert model.lengths[67:] == [100, 101, 103, 106, 111, 119, 132, 153, 187, 200]
    calls = []

    def attention(query, key, value, **arguments):
        calls.append(query.shape[-2])
        return plain(query, key, value, **arguments)

    assert_decode_matches_prefill(attention, *qkv(1, 1, 140, 140))
    assert calls[2:131] == [12] + [1] * 128


@pytest.mark.parametrize("chunks", [[6], [2, 3], [2, 5], [0, 6]], ids=str)
def test_chunks_that_do_not_add_up_are_refused(chunks):
    with pytest.raises(ValueError, match="chunks"):
        assert_decode_matches_prefill(plain, *qkv(), chunks=chunks)


def test_misuse_is_refused():
    with pytest.raises(TypeError, match="got 2 inputs; accepted is query, key and value"):
        assert_decode_matches_prefill(plain, *qkv()[:2])
    with pytest.raises(ValueError, match="alignment: got 'bottom_right'"):
        assert_decode_matches_prefill(causal_encoder(), tokens(2, 5), alignment="bottom_right")
    with pytest.raises(
        ValueError, match=r"alignment: got .*; accepted is one of 'top_left', 'bottom_right'"
    ):
        assert_decode_matches_prefill(plain, *qkv(), alignment="left")
    with pytest.raises(
        ValueError, match=r"alignment: got .*; accepted is None without is_causal=True"
    ):
        assert_decode_matches_prefill(plain, *qkv(), attn_mask=causal(6), alignment="bottom_right")
    with pytest.raises(ValueError, match="accepted is that of the outputs of the whole"):
        assert_decode_matches_prefill(
            SequenceModel(nn.Identity(), decode=lambda inputs, cache: (inputs[..., :1], None)),
            randn(2, 5, 4),
        )


def test_the_tolerance_can_be_set():
    def attention(query, key, value, **arguments):
        off = 1.001 if query.shape[-2] < key.shape[-2] else 1.0
        return off * plain(query, key, value, **arguments)

    assert "allowed 2.0e-05" in message(attention, *qkv())
    assert_decode_matches_prefill(attention, *qkv(), tolerance=2e-3)


class WithState(Decoder):
    def __init__(self):
        super().__init__()
        self.register_buffer("calls", torch.zeros(()))
        self.dropout = nn.Dropout(0.1)

    def decode(self, ids, cache, position_ids=None):
        self.calls += 1
        hidden, cache = super().decode(ids, cache, position_ids)
        return hidden + 0 * random.random() * np.random.rand() * torch.rand(()), cache


@pytest.mark.parametrize("mistake", [None, "cache"])
def test_everything_is_left_as_it_was_found(mistake):
    model = WithState().train()
    model.mistake = mistake
    states = torch.get_rng_state(), random.getstate(), str(np.random.get_state())
    if mistake is None:
        assert_decode_matches_prefill(model.subject(), tokens(2, 5))
    else:
        message(model.subject(), tokens(2, 5))
    assert model.training
    assert model.dropout.training
    assert model.calls == 0
    assert all(p.grad is None for p in model.parameters())
    assert not model._forward_hooks
    assert torch.equal(torch.get_rng_state(), states[0])
    assert (random.getstate(), str(np.random.get_state())) == states[1:]


def test_a_model_that_answers_at_random_is_refused():
    model = encoder_layer().train()
    try:
        with pytest.raises(ValueError, match="TransformerEncoderLayer is in training mode"):
            assert_decode_matches_prefill(model, randn(2, 5, WIDTH))
        assert model.training
    finally:
        model.eval()


@on_accelerators(DTYPES)
def test_attention_on_an_accelerator_passes(dtype, accelerator):
    inputs = [t.to(accelerator) for t in qkv(2, 4, 70, 70, 32, dtype=dtype)]
    assert_decode_matches_prefill(sdpa, *inputs)
    assert_decode_matches_prefill(sdpa, *inputs, attn_mask=causal(70).triu(-9).to(accelerator))
