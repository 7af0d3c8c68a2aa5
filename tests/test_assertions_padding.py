"""What the assertion about padding accepts, finds and says."""

import math

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

from pytest_attnheat import assert_padding_invariant
from pytest_attnheat.assertions.behaviour.sequences import SequenceModel

SDPA = functional.scaled_dot_product_attention
SOME = torch.tensor([[1, 0, 1, 1, 0, 1]] * 3 + [[1] * 6] * 2 + [[0] * 6], dtype=torch.bool)
STEEP = torch.linspace(-2, 2, 36).reshape(6, 6)


def message_of(subject, *inputs, **options):
    with pytest.raises(AssertionError) as error:
        assert_padding_invariant(subject, *inputs, **options)
    return str(error.value)


# --- Correct subjects


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("function", [SDPA, plain], ids=["sdpa", "plain"])
@pytest.mark.parametrize(
    "arguments",
    [{}, {"is_causal": True}, {"attn_mask": SOME}, {"attn_mask": STEEP}, {"scale": 0.3}],
    ids=["none", "causal", "boolean", "float", "scale"],
)
def test_functions_of_pytorch_and_by_hand_pass_whatever_their_mask(function, arguments, dtype):
    mask = arguments.get("attn_mask")
    given = {} if mask is None or mask.dtype == torch.bool else {"attn_mask": mask.to(dtype)}
    assert_padding_invariant(function, *qkv(dtype=dtype), **{**arguments, **given})


def test_grouped_heads_and_other_numbers_of_queries_and_keys_pass():
    query, _, _ = qkv(heads=4, query_len=3)
    _, key, value = qkv(heads=2, key_len=7)
    assert_padding_invariant(SDPA, query, key, value, enable_gqa=True)
    assert_padding_invariant(plain, *qkv(query_len=2, key_len=9), is_causal=True)


@pytest.mark.parametrize("batch_first", [True, False])
def test_multihead_attention_passes_as_a_function_and_as_a_sequence_model(batch_first):
    inputs = [randn(3, 5, WIDTH, seed=seed) for seed in range(3)]
    assert_padding_invariant(multihead(batch_first), *inputs)
    assert_padding_invariant(multihead(batch_first), *inputs, is_causal=True)
    assert_padding_invariant(multihead(batch_first), inputs[0])


@pytest.mark.parametrize("lengths", [None, [5, 5, 5], [2, 5, 3], torch.tensor([1, 2, 3])], ids=str)
def test_encoders_of_pytorch_pass_with_any_lengths(lengths):
    for seed in range(2):
        inputs = randn(3, 5, WIDTH, seed=seed)
        for module in (encoder_layer(), encoder_layer(batch_first=False), encoder()):
            assert_padding_invariant(module, inputs, lengths=lengths, seed=seed)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("name", "implementation"), TRANSFORMERS)
def test_models_of_transformers_pass(name, implementation, dtype):
    model = of_transformers(name, implementation, dtype)
    # Llama adds the least float64 to scores and then takes the softmax in float32: see below.
    overflows = (name, implementation, dtype) == ("llama", "eager", torch.float64)
    sides = ["right"] if overflows else ["right", "left"]
    assert_padding_invariant(model, tokens(2, 5), sides=sides)
    assert_padding_invariant(model, tokens(3, 4, seed=1), sides=sides, lengths=[2, 4, 1], seed=1)


def test_one_sample_of_one_token_can_be_padded():
    assert_padding_invariant(encoder_layer(), randn(1, 1, WIDTH), amount=1)
    assert_padding_invariant(SDPA, *qkv(1, 1, 1, 1), amount=1)
    assert_padding_invariant(SDPA, *(t[0, 0] for t in qkv()))


def test_a_query_that_may_see_nothing_is_not_judged():
    def nan_where_nothing_is_seen(query, key, value, attn_mask):
        scores = (query @ key.mT).masked_fill(~attn_mask, -math.inf)
        return scores.softmax(-1) @ value.nan_to_num()

    assert nan_where_nothing_is_seen(*qkv(), SOME).isnan().any()
    assert_padding_invariant(nan_where_nothing_is_seen, *qkv(), attn_mask=SOME)


# --- Functions that are wrong


def test_a_function_that_ignores_its_mask_is_told_so():
    message = message_of(lambda q, k, v, attn_mask=None: SDPA(q, k, v), *qkv())
    assert message.startswith(
        "assert_padding_invariant: 36 of 36 rows change with 3 masked keys on the right\n"
    )
    assert "\n  worst    output[" in message
    assert " of its size (allowed 2.0e-05)\n" in message
    assert "\n  cause    attn_mask changes nothing: it is ignored\n" in message
    assert "\n  tensor   float32 (2, 3, 6, 10) on cpu\n  repeat   seed=0" in message


def test_a_function_that_reads_its_mask_as_the_opposite_is_told_so():
    def inverted(query, key, value, attn_mask=None):
        return SDPA(query, key, value, None if attn_mask is None else ~attn_mask)

    message = message_of(inverted, *qkv())
    assert "36 of 36 rows change with 3 masked keys on the right" in message
    assert "cause    the mask is read as its opposite: the output is right where True" in message


def test_a_function_that_expects_padding_on_the_right_is_wrong_on_the_left_only():
    def counted(query, key, value, attn_mask=None):
        if attn_mask is not None:
            real = attn_mask.sum(-1, keepdim=True)
            attn_mask = torch.arange(key.shape[-2]) < real
        return SDPA(query, key, value, attn_mask)

    message = message_of(counted, *qkv())
    assert "36 of 36 rows change with 3 masked keys on the left" in message
    assert "cause    only on the left: does the mask follow its keys, or are keys found" in message
    assert_padding_invariant(counted, *qkv(), sides="right")
    with pytest.raises(AssertionError):
        assert_padding_invariant(counted, *qkv(), sides=["left"])


def after_softmax(query, key, value, mask):
    return (query @ key.mT).softmax(-1) * mask @ value


def as_zero_score(query, key, value, mask):
    return ((query @ key.mT) * mask).softmax(-1) @ value


def on_values(query, key, value, mask):
    return (query @ key.mT).softmax(-1) @ (value * mask[..., :1, :].mT)


def too_weak(query, key, value, mask):
    return (query @ key.mT + (~mask).to(query) * -3.0).softmax(-1) @ value


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("wrong", [after_softmax, as_zero_score, on_values, too_weak])
def test_masks_that_hide_only_in_part_are_found(wrong, dtype):
    def function(query, key, value, attn_mask=None):
        if attn_mask is None:
            attn_mask = torch.ones(query.shape[-2], key.shape[-2], dtype=torch.bool)
        return wrong(query, key, value, attn_mask)

    for seed in range(3):
        assert "masked keys on the" in message_of(function, *qkv(seed=seed, dtype=dtype))


def test_a_float_mask_is_padded_with_minus_infinity():
    masks = []

    def remembered(query, key, value, attn_mask=None):
        masks.append(attn_mask)
        return SDPA(query, key, value, attn_mask)

    assert_padding_invariant(remembered, *qkv(1, 1), attn_mask=STEEP, amount=2, sides="left")
    assert masks[-1].shape == (1, 1, 6, 8)
    assert (masks[-1][..., :2] == -math.inf).all()
    assert torch.equal(masks[-1][0, 0, :, 2:], STEEP)


def test_the_padding_is_large_and_drawn_twice_and_never_zero():
    seen = []

    def remembered(query, key, value, attn_mask=None):
        seen.append(key)
        return SDPA(query, key, value, attn_mask)

    key = 5 * qkv()[1]
    assert_padding_invariant(remembered, qkv()[0], key, qkv()[2], sides="right", seed=3)
    first, second = (given[..., 6:, :] for given in seen if given.shape[-2] == 9)
    assert 2 * key.std() < first.std() < 5 * key.std()
    assert 7 * key.std() < second.std() < 15 * key.std()
    correlation = torch.corrcoef(torch.stack([first.flatten(), second.flatten()]))[0, 1]
    assert abs(correlation) < 0.5
    assert (first != 0).all()


# --- Sequence models that are wrong


class Layer(nn.Module):
    """Self-attention with a mask that may be wrong in several ways."""

    def __init__(self, wrong="", positions=False):
        super().__init__()
        torch.manual_seed(0)
        self.wrong = wrong
        self.embedding = nn.Embedding(VOCABULARY, WIDTH)
        self.positions = nn.Embedding(32, WIDTH) if positions else None

    def forward(self, ids, keep=None, places=None):
        x = self.embedding(ids)
        if self.positions is not None:
            places = torch.arange(ids.shape[1]) if places is None else places
            x = x + self.positions(places)
        if self.wrong == "by id":
            keep = ids != 0
        mask = None if keep is None or self.wrong == "ignored" else keep[:, None, :]
        if self.wrong == "first sample" and keep is not None:
            mask = keep[:1, None, :]
        out = SDPA(x, x, x, mask)
        return out + x.mean(1, keepdim=True) if self.wrong == "mean" else out


def keeps(wrong="", mask="keep", **options):
    return SequenceModel(Layer(wrong, "positions_argument" in options), mask, "keep", **options)


def test_a_module_whose_mask_is_declared_passes():
    assert_padding_invariant(keeps(), tokens(3, 5))
    assert_padding_invariant(keeps(), tokens(3, 5), lengths=[1, 5, 4])


def test_a_module_that_ignores_its_mask_is_told_so():
    message = message_of(keeps("ignored"), tokens(3, 5))
    assert message.startswith(
        "assert_padding_invariant: 15 of 15 rows of real tokens change with padding on the right\n"
    )
    assert "\n  cause    keep changes nothing: it is ignored\n" in message
    assert "\n  tensor   float32 (3, 8, 16) on cpu\n" in message


def test_a_mask_that_is_declared_as_its_opposite_is_told_so():
    message = message_of(keeps(mask="drop"), tokens(3, 5))
    assert "cause    the mask is read as its opposite" in message


def test_a_mean_over_the_padding_is_found():
    message = message_of(keeps("mean"), tokens(3, 5))
    assert "15 of 15 rows of real tokens" in message
    assert (
        "attention in Layer does not let it be seen: it is seen outside of what was captured"
        in message
    )


def test_the_mask_of_the_first_sample_taken_for_all_is_found_in_a_ragged_batch():
    assert "change with padding on the right" in message_of(keeps("first sample"), tokens(3, 5))
    # With one length for all there is nothing to be seen.
    assert_padding_invariant(keeps("first sample"), tokens(1, 5))


def test_absolute_positions_that_the_module_is_not_told_are_wrong_on_the_left_only():
    model = SequenceModel(Layer(positions=True), "keep", "keep")
    message = message_of(model, tokens(3, 5))
    assert "15 of 15 rows of real tokens change with padding on the left" in message
    assert "only on the left: the module is not told the positions" in message
    assert "positions_argument=...)" in message
    assert_padding_invariant(model, tokens(3, 5), sides="right")
    assert_padding_invariant(keeps(positions_argument="places"), tokens(3, 5), lengths=[5, 2, 1])


def test_positions_that_a_module_takes_and_does_not_use_are_named():
    class Deaf(Layer):
        def forward(self, ids, keep=None, places=None):
            return super().forward(ids, keep)

    model = SequenceModel(Deaf(positions=True), "keep", "keep", positions_argument="places")
    assert "only on the left: are the positions in places used?" in message_of(model, tokens(3, 5))


def test_positions_are_given_for_padding_on_the_left_only():
    # As in RoBERTa, whose own positions do not begin at 0.
    given = []

    def remembered(ids, keep=None, places=None):
        given.append((ids.shape, places if keep is not None else None))
        return Layer(positions=True)(
            ids, keep, 2 + torch.arange(ids.shape[1]) if places is None else places
        )

    model = SequenceModel(remembered, "keep", "keep", positions_argument="places")
    assert_padding_invariant(model, tokens(2, 4), lengths=[4, 2], amount=1)
    told = [places.tolist() for shape, places in given if places is not None]
    assert [[0, 0, 1, 2, 3], [0, 0, 0, 0, 1]] in told
    assert [[0, 1, 2, 3], [0, 0, 0, 1]] in told
    assert len(told) == 4


def test_the_token_and_its_sample_are_named_without_the_padding():
    def late(inputs, keep=None):
        output = inputs.clone()
        if keep is not None:
            output[1, keep[1].nonzero()[2, 0]] += 100
        return output

    model = SequenceModel(late, "keep", "keep")
    options = {"lengths": [3, 4], "amount": 2}
    inputs = randn(2, 6, WIDTH)
    right = message_of(model, inputs, sides="right", **options)
    assert "1 of 7 rows of real tokens" in right
    assert "worst    output[1, 2] (token 2 of the 4 of sample 1) is off by up to 100" in right
    left = message_of(model, inputs, sides="left", **options)
    assert "worst    output[1, 4] (token 2 of the 4 of sample 1) is off by up to 100" in left


def test_nan_that_spreads_from_padding_is_named():
    # Two causal layers that give nan where nothing is seen, as a softmax over -inf alone does.
    class Causal(nn.Module):
        def forward(self, x, keep=None):
            length = x.shape[1]
            mask = torch.ones(length, length, dtype=torch.bool).tril()
            mask = mask if keep is None else mask & keep[:, None, :]
            for _ in range(2):
                x = (x @ x.mT).masked_fill(~mask, -math.inf).softmax(-1) @ x
            return x

    message = message_of(SequenceModel(Causal(), "keep", "keep"), randn(2, 5, WIDTH))
    assert "padding on the left" in message
    assert "holds nan" in message
    assert "cause    nan spreads from the padding: under a causal mask" in message


def test_an_overflow_in_transformers_in_float64_is_found():
    # finfo(float64).min is -inf to a softmax in float32: rows of padding are nan.
    model = of_transformers("llama", "eager", torch.float64)
    assert "nan spreads from the padding" in message_of(model, tokens(2, 4))


class Decoder(nn.Module):
    """A causal layer that makes its positions from its mask, and may be wrong in several ways."""

    def __init__(self, wrong=""):
        super().__init__()
        torch.manual_seed(0)
        self.wrong = wrong
        self.embedding = nn.Embedding(VOCABULARY, WIDTH)
        self.positions = nn.Embedding(32, WIDTH)

    def forward(self, ids, keep=None):
        keep = torch.ones_like(ids, dtype=torch.bool) if keep is None else keep
        places = (keep.cumsum(-1) - 1).clamp(min=0)
        if self.wrong == "from the end":
            places = torch.arange(ids.shape[1]).flip(0).expand(ids.shape)
        x = self.embedding(ids) + self.positions(places)
        causal = torch.ones(ids.shape[1], ids.shape[1], dtype=torch.bool).tril()
        if self.wrong == "opposite":
            keep = ~keep if not keep.all() else keep
        if self.wrong in ("unmasked", "from the end"):
            keep = torch.ones_like(keep)
        allowed = keep[:, None, :] if self.wrong == "opposite" else keep[:, None, :] & causal
        return x + SDPA(x, x, x, allowed | torch.eye(ids.shape[1], dtype=torch.bool))


def decoder(wrong=""):
    return SequenceModel(Decoder(wrong), "keep", "keep")


def test_padding_on_the_left_that_is_not_masked_is_not_taken_for_wrong_positions():
    assert_padding_invariant(decoder(), tokens(3, 5), lengths=[5, 2, 4])
    message = message_of(decoder("unmasked"), tokens(3, 5))
    assert "change with padding on the left" in message
    assert "only on the left: padding gets up to " in message
    assert "of the attention of a real token in Decoder, no mask hides it there" in message
    assert "positions" not in message


def test_a_mask_that_changes_nothing_is_not_blamed_where_the_padding_is_not_felt():
    message = message_of(decoder("from the end"), tokens(3, 5), sides="right")
    assert "ignored" not in message
    assert "real tokens do not feel what the padding holds, only that it is there: are" in message


def test_a_causal_mask_that_lets_the_future_through_is_suggested_where_there_is_no_mask():
    message = message_of(SequenceModel(Layer()), tokens(3, 5), sides="right")
    assert (
        "cause    real tokens feel the padding after them: a causal mask that lets the" in message
    )


@pytest.mark.parametrize("fill", [-10.0, -30.0, -50.0])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_fill_that_does_not_hide_a_key_with_a_large_score_is_found(dtype, fill):
    def filled(query, key, value, attn_mask=None):
        scores = query.float() @ key.float().mT * 8**-0.5
        scores = scores if attn_mask is None else scores + (~attn_mask) * fill
        return (scores.softmax(-1) @ value.float()).to(value)

    for seed in range(3):
        assert "masked keys on the" in message_of(filled, *qkv(seed=seed, dtype=dtype), amount=1)


def test_a_fill_that_hides_whatever_a_key_holds_passes():
    def filled(query, key, value, attn_mask=None):
        scores = query @ key.mT * 8**-0.5
        scores = scores if attn_mask is None else scores.masked_fill(~attn_mask, -1e4)
        return scores.softmax(-1) @ value

    for dtype in DTYPES:
        for size in (1e-3, 1.0, 10.0):
            query, key, value = qkv(dtype=dtype)
            assert_padding_invariant(filled, query * size, key, value)


class Block(nn.Module):
    """Causal attention with rotary positions, by hand, with one defect."""

    def __init__(self, wrong):
        super().__init__()
        self.embedding, self.projection = nn.Embedding(50, WIDTH), nn.Linear(WIDTH, 3 * WIDTH)
        self.wrong = wrong

    def turned(self, x):
        angles = torch.arange(x.shape[1])[:, None] * 10.0 ** -torch.arange(WIDTH // 2)
        first, second = x.chunk(2, -1)
        cos, sin = angles.cos(), angles.sin()
        if self.wrong == "pairs":  # neighbours share an angle, and halves are turned
            cos, sin = (t[:, : WIDTH // 4].repeat_interleave(2, -1) for t in (cos, sin))
            cos, sin = torch.cat([cos, cos.flip(-1)], -1), torch.cat([sin, sin.flip(-1)], -1)
            return x * cos + torch.cat([-second, first], -1) * sin
        return torch.cat([first * cos - second * sin, first * sin + second * cos], -1)

    def forward(self, ids, keep=None):
        x = self.embedding(ids)
        query, key, value = self.projection(x).chunk(3, -1)
        key = self.turned(key)
        query = query if self.wrong == "keys alone" else self.turned(query)
        scores = query @ key.mT / WIDTH**0.5
        mask = torch.ones(ids.shape[1], ids.shape[1], dtype=torch.bool).tril()
        if keep is not None and self.wrong == "queries":
            mask = mask & keep[:, :, None]
        elif keep is not None and self.wrong == "multiplied":
            scores = scores * keep[:, None]
        elif keep is not None:
            mask = mask | keep[:, None] if self.wrong == "or" else mask & keep[:, None]
        out = scores.masked_fill(~mask, -math.inf).softmax(-1).nan_to_num() @ value
        if self.wrong == "mean":
            out = out + out.mean(1, keepdim=True)
        if self.wrong == "place":
            out = torch.cat([out[:, :3], out[:, 3:4] + out[:, 2:3], out[:, 4:]], 1)
        return out


@pytest.mark.parametrize(
    ("wrong", "cause"),
    [
        ("queries", "the mask is applied to queries in place of keys in Block"),
        ("multiplied", "of a real token in Block, each the same: the mask multiplies scores"),
        ("or", "a mask that hides nothing changes the output: is the causal mask lost where"),
        (
            "mean",
            "attention in Block does not let it be seen: it is seen outside of what was captured",
        ),
        (
            "place",
            "scores and values of the first attention are the same at other places: its mask, or",
        ),
        ("pairs", "keys that are moved alike change their products with one another"),
        ("keys alone", "queries and keys that are moved alike change their scores"),
    ],
)
def test_what_the_attention_inside_does_is_told_in_its_own_words(wrong, cause):
    torch.manual_seed(0)
    model = SequenceModel(Block(wrong), "keep", "keep")
    message = message_of(model, tokens(2, 6))
    assert cause in message
    assert "not told the positions" not in message
    assert_padding_invariant(SequenceModel(Block(""), "keep", "keep"), tokens(2, 6))


def test_a_causal_module_is_not_told_that_its_mask_is_ignored_where_it_needs_none():
    class Causal(Block):
        def forward(self, ids, keep=None):
            return super().forward(ids)

    message = message_of(SequenceModel(Causal("mean"), "keep", "keep"), tokens(2, 6), sides="right")
    assert "ignored" not in message
    assert "it is seen outside of what was captured" in message


class Crossed(nn.Module):
    """Self-attention and attention to a memory of as many samples."""

    def forward(self, x, memory, keep=None):
        assert memory.shape[0] == x.shape[0]
        x = x + SDPA(x, memory, memory)
        return SDPA(x, x, x, None if keep is None else keep[:, None])


@pytest.mark.parametrize("length", [5, WIDTH])
def test_a_sample_alone_gets_its_part_of_a_memory(length):
    model = SequenceModel(Crossed(), "keep", "keep")
    assert_padding_invariant(model, randn(2, length, WIDTH), memory=randn(2, 7, WIDTH, seed=1))


def test_more_tokens_than_the_module_takes_are_refused_in_words():
    class Short(Layer):
        def forward(self, ids, keep=None):
            if ids.shape[1] > 6:
                raise IndexError("index out of range in self")
            return super().forward(ids, keep)

    model = SequenceModel(Short(), "keep", "keep")
    words = r"refuses 8 tokens \(5 were given, amount=3 of padding were added\): IndexError: index"
    with pytest.raises(ValueError, match=words):
        assert_padding_invariant(model, tokens(2, 5))
    assert_padding_invariant(model, tokens(2, 5), amount=1)


def test_what_a_module_raises_for_its_mask_is_its_own():
    def broken(ids, keep=None):
        if keep is not None:
            raise RuntimeError("a mask?")
        return Layer()(ids)

    with pytest.raises(RuntimeError, match=r"^a mask\?$"):
        assert_padding_invariant(SequenceModel(broken, "keep", "keep"), tokens(2, 5))


# --- Modules without a mask


def test_a_module_that_takes_no_mask_is_refused_with_what_it_takes():
    with pytest.raises(ValueError) as error:
        assert_padding_invariant(causal_encoder(), tokens(2, 5))
    text = str(error.value)
    assert text.startswith("CausalEncoder is not told which tokens are padding; say how it takes")
    assert "SequenceModel(module, mask='keep' or 'drop' or 'additive', mask_argument=...)" in text
    assert "one of its parameters: ids, padding" in text


def test_a_causal_module_needs_no_mask_for_padding_on_the_right():
    assert_padding_invariant(causal_encoder(), tokens(3, 5), sides="right")
    assert_padding_invariant(causal_encoder(), tokens(3, 5), sides=("right",), lengths=[2, 5, 1])


def test_a_module_that_is_not_causal_and_has_no_mask_feels_the_padding():
    message = message_of(Layer(), tokens(3, 5), sides="right")
    assert "15 of 15 rows of real tokens change with padding on the right" in message
    assert "cause    real tokens feel the padding after them: a causal mask that lets" in message
    assert "or a module that needs a mask: SequenceModel(module, mask=..., mask_" in message


def test_a_module_that_finds_padding_by_its_id_needs_no_mask():
    assert_padding_invariant(Layer("by id"), tokens(3, 5), padding_value=0)
    assert "real tokens change" in message_of(Layer("by id"), tokens(3, 5), padding_value=7)


# --- Arguments, and what is left behind


@pytest.mark.parametrize("count", [0, 2, 4])
def test_any_other_number_of_inputs_is_refused(count):
    with pytest.raises(TypeError, match=rf"inputs: got {count} for .*; accepted is three \(query"):
        assert_padding_invariant(SDPA, *[randn(1, 2, 3)] * count)


def test_arguments_out_of_range_are_refused():
    inputs = randn(2, 5, WIDTH)
    layer = encoder_layer()
    for sides in ("middle", [], ["right", "up"]):
        with pytest.raises(ValueError, match=r"sides: got .*accepted is 'right', 'left' or both"):
            assert_padding_invariant(layer, inputs, sides=sides)
    for amount in (0, -1, 1.5, True):
        with pytest.raises((ValueError, TypeError), match=r"amount: got .*a whole number from 1"):
            assert_padding_invariant(layer, inputs, amount=amount)
    for lengths in ([5], [5, 6], [0, 5], [[5, 5]]):
        with pytest.raises(
            (ValueError, TypeError), match=r"lengths: got .*for each (sample|batch entry)"
        ):
            assert_padding_invariant(layer, inputs, lengths=lengths)
    with pytest.raises(TypeError, match=r"lengths: got .*one whole number"):
        assert_padding_invariant(layer, inputs, lengths=[1.0, 2.0])
    with pytest.raises(
        ValueError, match=r"lengths: got .*; accepted is None for an attention function"
    ):
        assert_padding_invariant(SDPA, *qkv(), lengths=[3, 4])
    with pytest.raises(ValueError, match=r"tolerance: got 1\.5"):
        assert_padding_invariant(layer, inputs, tolerance=1.5)


def test_a_mask_as_long_as_the_sequence_is_refused_because_padding_changes_its_length():
    with pytest.raises(ValueError, match=r"src_mask: got shape \(5, 5\), made for sequences of 5"):
        assert_padding_invariant(encoder_layer(), randn(2, 5, WIDTH), src_mask=torch.zeros(5, 5))


def test_the_tolerance_of_the_caller_counts():
    wrong = lambda q, k, v, attn_mask=None: SDPA(q, k, v, attn_mask) * (1 + 1e-4 * (k.shape[2] > 6))  # noqa: E731
    assert "(allowed 2.0e-05)" in message_of(wrong, *qkv())
    assert_padding_invariant(wrong, *qkv(), tolerance=2e-4)


def test_dropout_is_refused_or_named():
    inputs = randn(2, 5, WIDTH)
    layer = nn.TransformerEncoderLayer(WIDTH, 2, 32, dropout=0.5, batch_first=True).train()
    with pytest.raises(ValueError, match=r"in training mode.*call \.eval\(\) on it"):
        assert_padding_invariant(layer, inputs)
    assert "cause    training=True: dropout draws" in message_of(layer, inputs, training=True)


def test_mode_gradients_inputs_and_random_state_are_left_as_they_were():
    module = Restless().train()
    inputs = randn(2, 5, WIDTH).requires_grad_()
    kept, state = inputs.detach().clone(), torch.get_rng_state()
    assert_padding_invariant(SequenceModel(module, "keep", "keep"), inputs)
    assert module.training
    assert module.calls == 0
    assert all(parameter.grad is None for parameter in [inputs, *module.parameters()])
    assert torch.equal(inputs, kept)
    assert torch.equal(torch.get_rng_state(), state)


@on_accelerators(DTYPES)
def test_everything_works_on_an_accelerator(dtype, accelerator):
    inputs = [t.to(accelerator) for t in qkv(dtype=dtype)]
    assert_padding_invariant(SDPA, *inputs)
    assert_padding_invariant(SDPA, *inputs, is_causal=True)
    model = of_transformers("bert", "sdpa", dtype).to(accelerator)
    try:
        assert_padding_invariant(model, tokens(3, 5).to(accelerator))
    finally:
        model.to("cpu")
    message = message_of(lambda q, k, v, attn_mask=None: SDPA(q, k, v), *inputs)
    assert f"on {accelerator}:0" in message
