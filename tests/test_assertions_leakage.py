"""No output depends on what it must not see, and each on what it must see."""

import re

import pytest
import torch
from attention_subjects import (
    DTYPES,
    TRANSFORMERS,
    WIDTH,
    causal_encoder,
    encoder,
    encoder_layer,
    flex,
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

from pytest_attnheat import AttentionSpec, SequenceModel, assert_no_leakage

# flex_attention computes in one way whatever the dtype, and takes seconds to run.
_SOME = [*((f, dtype) for f in (sdpa, plain) for dtype in DTYPES), (flex, torch.float32)]
# Two processes have to call a test alike.
FUNCTIONS = [pytest.param(f, dtype, id=f"{f.__name__}-{dtype}") for f, dtype in _SOME]


def message_of(subject, *inputs, **options):
    with pytest.raises(AssertionError) as caught:
        assert_no_leakage(subject, *inputs, **options)
    return str(caught.value)


def attention(
    *,
    diagonal=0,
    fill=-torch.inf,
    dim=-1,
    inverted=False,
    after=False,
    corner=False,
    open_head=None,
):
    """Attention by hand with one defect."""

    def function(query, key, value, attn_mask=None, is_causal=False):
        scores = query @ key.mT / query.shape[-1] ** 0.5
        query_len, key_len = scores.shape[-2:]
        mask = torch.ones(query_len, key_len, dtype=torch.bool)
        if is_causal:
            mask = mask.tril(diagonal + (key_len - query_len if corner else 0))
        if attn_mask is not None:
            mask = mask & attn_mask
        mask = (~mask if inverted else mask).expand(scores.shape).clone()
        if open_head is not None:
            mask[open_head] = True
        if after:
            return (scores.softmax(dim) * mask) @ value
        return scores.masked_fill(~mask, fill).softmax(dim).nan_to_num(0.0) @ value

    return function


# --- attention functions that are right


@pytest.mark.parametrize(("function", "dtype"), FUNCTIONS)
def test_a_causal_function_passes(function, dtype):
    assert_no_leakage(function, *qkv(dtype=dtype), is_causal=True)
    assert_no_leakage(function, *qkv(query_len=4, key_len=9, dtype=dtype), is_causal=True)
    assert_no_leakage(function, *qkv(query_len=9, key_len=4, dtype=dtype), is_causal=True)


@pytest.mark.parametrize(("function", "dtype"), FUNCTIONS)
def test_a_masked_function_passes(function, dtype):
    mask = torch.rand(2, 1, 6, 6, generator=torch.Generator().manual_seed(0)) > 0.5
    mask[:, :, 2] = False  # a query that may see nothing
    assert_no_leakage(function, *qkv(dtype=dtype), attn_mask=mask)


@pytest.mark.parametrize("scale", [5, 30])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_weights_that_underflow_are_not_taken_for_a_mask(dtype, scale):
    query, key, value = qkv(query_len=33, key_len=33, dtype=dtype)
    assert_no_leakage(sdpa, query * scale, key, value, is_causal=True)


@pytest.mark.parametrize(
    ("dtype", "fill"),
    [(torch.bfloat16, -1e4), (torch.bfloat16, -9500.0), (torch.float32, -9500.0)],
    ids=str,
)
@pytest.mark.parametrize("function", [sdpa, plain], ids=lambda f: f.__name__)
def test_a_large_negative_number_hides_its_key(function, dtype, fill):
    bias = torch.zeros(6, 6, dtype=dtype).masked_fill(torch.ones(6, 6).triu(1) > 0, fill)
    assert_no_leakage(function, *qkv(dtype=dtype), attn_mask=bias)


def test_an_additive_mask_and_a_bias_are_understood():
    mask = torch.zeros(6, 6).masked_fill(torch.ones(6, 6).triu(1) > 0, -torch.inf)
    assert_no_leakage(sdpa, *qkv(), attn_mask=mask)
    lowest = mask.clamp(min=torch.finfo(torch.float32).min)
    assert_no_leakage(sdpa, *qkv(), attn_mask=lowest + randn(6, 6))


def test_grouped_heads_pass():
    query, _, _ = qkv(heads=6)
    _, key, value = qkv(heads=3)
    assert_no_leakage(sdpa, query, key, value, enable_gqa=True, is_causal=True)


def test_three_and_two_dimensions_pass():
    query, key, value = qkv()
    assert_no_leakage(sdpa, query[0], key[0], value[0], is_causal=True)
    assert_no_leakage(plain, query[0, 0], key[0, 0], value[0, 0], is_causal=True)


@pytest.mark.parametrize("batch_first", [True, False])
def test_multihead_attention_passes_as_a_function(batch_first):
    x = randn(3, 6, WIDTH)
    mask = torch.ones(3, 6, 6, dtype=torch.bool).tril()
    mask[1, :, 0] = False
    assert_no_leakage(multihead(batch_first), x, x, x, attn_mask=mask)
    assert_no_leakage(multihead(batch_first), x, x, x, is_causal=True)


def test_an_own_alignment_can_be_declared():
    function, inputs = attention(corner=True), qkv(query_len=4, key_len=9)
    assert_no_leakage(function, *inputs, is_causal=True, alignment="bottom_right")
    assert "bottom right, not the top left" in message_of(function, *inputs, is_causal=True)


# --- sequence models that are right


@pytest.mark.parametrize(("name", "implementation"), TRANSFORMERS)
def test_models_of_transformers_pass(name, implementation):
    model = of_transformers(name, implementation, torch.bfloat16)
    causal = name != "bert"
    if causal:
        assert_no_leakage(model, tokens(2, 12))
    assert_no_leakage(model, tokens(3, 12), causal=causal, lengths=[12, 9, 5])


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize(
    "module", [multihead(), multihead(False), encoder_layer(), encoder_layer(False), encoder()],
    ids=["multihead", "multihead, batch second", "layer", "layer, batch second", "encoder"],
)  # fmt: skip
def test_padded_modules_of_torch_pass(module, side):
    assert_no_leakage(module, randn(3, 9, WIDTH), lengths=[9, 5, 3], side=side)


def test_causal_modules_of_torch_pass():
    masked = torch.ones(9, 9, dtype=torch.bool).triu(1)
    assert_no_leakage(encoder_layer(), randn(1, 9, WIDTH), src_mask=masked, is_causal=True)
    assert_no_leakage(causal_encoder(), tokens(1, 9))
    assert_no_leakage(causal_encoder(), tokens(3, 9), by=["gradient"])


def test_a_module_says_once_how_it_takes_its_mask():
    model = SequenceModel(causal_encoder(), mask="drop", mask_argument="padding")
    assert_no_leakage(model, tokens(3, 9), causal=True, lengths=[9, 7, 4])


def test_packed_documents_pass_where_the_mask_separates_them():
    documents = torch.tensor([[0, 0, 0, 1, 1, 1, 1]])
    separate = documents.unsqueeze(-1) != documents.unsqueeze(-2)
    x = randn(1, 7, WIDTH)
    assert_no_leakage(encoder_layer(), x, documents=documents, src_mask=separate[0])
    assert "token 0 sees token" in message_of(encoder_layer(), x, documents=documents)


# --- defects


def test_a_mask_that_is_off_by_one_is_found():
    message = message_of(attention(diagonal=1), *qkv(), is_causal=True)
    assert message.startswith(
        "assert_no_leakage: 30 of 36 outputs depend on what they must not see\n  worst    query "
    )
    assert (
        "\n  first    query 0 sees key 1, one step in its future; output[0, 0, 0] chang" in message
    )
    assert "\n  cause    each sees one place too many: a causal mask that is off by one?" in message
    assert "\n  tensor   float32 (2, 3, 6, 10) on cpu\n  repeat   seed=0\n  head [" in message
    assert "], change when each is replaced    keys 0..5\n    q0  " in message
    picture = [line.split()[1] for line in message.splitlines()[-6:]]
    unchanged = [[cell == "·" for cell in line] for line in picture]
    assert unchanged == [[column > row + 1 for column in range(6)] for row in range(6)]
    assert [line.endswith("<-") for line in message.splitlines()[-6:]] == [True] * 5 + [False]


@pytest.mark.parametrize(
    ("defect", "cause"),
    [
        ({"diagonal": 99}, "all that is forbidden here is seen: no mask is applied, or only after"),
        ({"after": True}, "all that is forbidden here is seen: no mask is applied, or only after"),
        ({"inverted": True}, "a mask of the opposite meaning?"),
        ({"fill": -10.0}, "far fainter than what may be seen: a fill of the mask that is too"),
    ],
)
def test_the_cause_of_a_leaking_function_is_named(defect, cause):
    message = message_of(attention(**defect), *qkv(), is_causal=True)
    assert "30 of 36 outputs" in message
    assert cause in message


@pytest.mark.parametrize(
    ("dim", "other", "cause"),
    [
        (-2, "depends on query", "softmax runs over the queries (dim=-2)"),
        (1, "depends on head 0, its own is ", "softmax runs over the heads (dim=1)"),
        (0, "depends on batch entry 0, its own is 1;", "over the batch"),
    ],
)
def test_a_softmax_over_another_axis_is_found(dim, other, cause):
    message = message_of(attention(dim=dim), *qkv())
    assert "36 of 36 outputs" in message
    assert other in message
    assert cause in message


def test_a_leak_in_a_single_head_is_found_and_the_head_is_named():
    message = message_of(attention(open_head=(1, 2)), *qkv(heads=7), is_causal=True)
    assert "of 84 outputs depend on what they must not see, all in head [1, 2]" in message


def test_grouped_heads_in_another_order_are_found():
    def tiled(query, key, value, enable_gqa):
        groups = query.shape[1] // key.shape[1]
        return sdpa(query, key.repeat(1, groups, 1, 1), value.repeat(1, groups, 1, 1))

    query, _, _ = qkv(heads=6)
    message = message_of(tiled, query, *qkv(heads=3)[1:], enable_gqa=True)
    assert "query 5 depends on key head 2, its own is 1" in message
    assert "in the wrong order (repeat in place of repeat_interleave)" in message


def test_a_query_that_sees_too_little_is_found():
    message = message_of(attention(diagonal=-1), *qkv(), is_causal=True)
    assert "12 of 12 outputs do not depend on what they must see, at least: not each" in message
    assert "query 0 does not see key 0: whatever is there, output[0, 0, 0] stays" in message
    assert "cause    the last that it may see, its own place: a mask that closes one" in message
    assert_no_leakage(attention(diagonal=-1), *qkv(), is_causal=True, must_see=False)


@pytest.mark.parametrize(
    ("batch", "claim"),
    [
        (1, "8 of 9 outputs do not depend on what they must see"),  # a token alone may see itself
        (2, r"\d of \d+ outputs do not depend on what they must see, at least: not each output was "
         "judged"),
    ],
)  # fmt: skip
def test_of_what_is_blind_no_more_is_said_than_was_judged(batch, claim):
    def model(hidden):  # no token sees the first, in no entry
        masked = torch.ones(9, 9, dtype=torch.bool).triu(1)
        masked[1:, 0] = True
        return encoder_layer()(hidden, src_mask=masked)

    message = message_of(model, randn(batch, 9, WIDTH))
    assert re.match(f"assert_no_leakage: {claim}\n", message)
    assert "does not see token 0: whatever" in message


def test_a_token_that_sees_too_little_is_found_wherever_it_stands():
    for blind in range(1, 9):

        def model(hidden, blind=blind):
            masked = torch.ones(9, 9, dtype=torch.bool).triu(1)
            masked[blind, blind - 1] = True
            return encoder_layer()(hidden, src_mask=masked)

        place = f"token {blind} does not see token {blind - 1}: whatever is there"
        assert place in message_of(model, randn(1, 9, WIDTH))


class Wrong(nn.Module):
    """A language model with one defect."""

    def __init__(self, defect):
        super().__init__()
        self.model, self.defect = causal_encoder(), defect

    def forward(self, ids):
        return self.defect(self, self.model(ids), ids)

    def alone(self, ids):
        return self.model.head(self.model.embedding(ids))


def test_a_language_model_that_peeks_at_the_next_token_is_found():
    model = Wrong(lambda self, out, ids: out + 0.1 * self.alone(ids).roll(-1, 1))
    for by in ("perturbation", "gradient"):
        message = message_of(model, tokens(3, 40), by=by)
        assert "token 0 sees token 1, one step in its future; output[0, 0] changes by" in message
        assert "each sees one place too many; of 2 attentions none lets it be seen: it" in message


def test_a_language_model_with_a_mean_over_the_sequence_is_found():
    model = Wrong(lambda self, out, ids: out + 1e-3 * out.mean(1, keepdim=True))
    message = message_of(model, tokens(1, 40))
    assert "far fainter than what may be seen; " in message
    assert "it is seen outside of what was captured" in message


def test_a_language_model_that_mixes_the_batch_is_found():
    model = Wrong(lambda self, out, ids: out - out.mean(0))
    message = message_of(model, tokens(3, 12))
    assert "36 of 36 outputs" in message
    assert "depends on batch entry 0, its own is 2; output[2, 11] changes" in message


def test_a_language_model_that_sees_no_other_token_is_found():
    message = message_of(Wrong(lambda self, out, ids: 0 * out + self.alone(ids)), tokens(3, 12))
    assert "outputs do not depend on what they must see" in message
    assert "does not see token" in message


def test_a_leak_that_only_the_gradient_shows_is_found():
    def hidden(query, key, value):  # equal in value, but the graph runs through all keys
        output = sdpa(query, key, value, is_causal=True)
        return output + (value.mean(-2, keepdim=True) - value.mean(-2, keepdim=True).detach())

    mask = torch.ones(6, 6, dtype=torch.bool).tril()
    message = message_of(hidden, *qkv(), may_see=mask)
    assert "outputs do not change, but have gradients from what they must not see" in message
    assert " has a gradient from " in message
    assert message.splitlines()[1].endswith(" does not change")
    assert_no_leakage(hidden, *qkv(), may_see=mask, by="perturbation")


def test_padding_that_is_ignored_is_found():
    ignoring = SequenceModel(lambda x, mask: encoder_layer()(x), mask="drop", mask_argument="mask")
    message = message_of(ignoring, randn(2, 9, WIDTH), lengths=[9, 6])
    assert "outputs depend on what they must not see, all in batch entry 1" in message
    assert re.search(
        r"token \d sees token [678], padding \(of its sequence 6 tokens are real\);", message
    )
    assert "cause    mask changes nothing: it is ignored\n" in message


def test_a_mask_that_is_ignored_is_not_called_one_whose_fill_is_too_small():
    def averaging(x, mask):
        return encoder_layer()(x) + 1e-3 * x.mean(1, keepdim=True)

    for module in (averaging, lambda x, mask: averaging(x, mask) * (1 + mask[..., None])):
        heeding = SequenceModel(module, mask="drop", mask_argument="mask")
        message = message_of(heeding, randn(2, 9, WIDTH), lengths=[9, 6])
        assert ("it is ignored" in message) == (module is averaging)


def test_a_mask_of_the_wrong_meaning_is_found():
    wrong = SequenceModel(encoder_layer(), mask="keep", mask_argument="src_key_padding_mask")
    message = message_of(wrong, randn(3, 9, WIDTH), lengths=[8, 6, 5])
    assert "padding (of its sequence" in message
    assert (
        "what may be seen is not, and the forbidden is: a mask of the opposite meaning?" in message
    )


def test_documents_that_see_one_another_are_found():
    documents = torch.tensor([[0] * 5 + [1] * 7])
    message = message_of(causal_encoder(), tokens(1, 12), documents=documents, causal=True)
    assert re.search(r"sees token [0-4], of document 0, its own is 1;", message)


def test_nan_gets_through_the_kernels_of_torch_and_is_found_on_request():
    message = message_of(sdpa, *qkv(), is_causal=True, by="nan")
    assert "sees key 1, one step in its future; output[0, 0, 0] is no longer finite" in message
    assert "a weight of 0 times a value of nan is nan; PyTorch's own kernels do this too" in message
    assert "is no longer finite" in message_of(causal_encoder(), tokens(1, 9), by="nan")


def test_a_function_that_keeps_nan_out_passes():
    def careful(query, key, value, is_causal):
        rows = []
        for i in range(query.shape[-2]):
            seen = slice(0, i + 1)
            rows.append(sdpa(query[..., i : i + 1, :], key[..., seen, :], value[..., seen, :]))
        return torch.cat(rows, -2)

    assert_no_leakage(careful, *qkv(), is_causal=True, by=["perturbation", "nan", "gradient"])


def test_an_output_that_is_nan_already_is_an_error():
    def broken(query, key, value):
        return sdpa(query, key, value).index_fill(-2, torch.tensor([4]), torch.nan)

    message = message_of(broken, *qkv())
    assert "6 of 36 outputs are not finite with nothing replaced" in message
    assert "worst    output[0, 0, 4] holds nan" in message


# --- what it refuses, and what it leaves behind


def test_nothing_forbidden_is_an_error():
    with pytest.raises(ValueError, match=r"every output may see every input.*say causal="):
        assert_no_leakage(encoder_layer(), randn(1, 9, WIDTH), causal=False)
    assert_no_leakage(encoder_layer(), randn(2, 9, WIDTH), causal=False)  # but not one another


def test_bad_arguments_are_refused():
    query, key, value = qkv()
    with pytest.raises(TypeError, match="got 2 inputs; accepted is query, key and value"):
        assert_no_leakage(sdpa, query, key)
    with pytest.raises(ValueError, match=r"by: got 'luck'; accepted is \('perturbation'"):
        assert_no_leakage(sdpa, query, key, value, by="luck")
    with pytest.raises(TypeError, match="judged: got 'x'; accepted is what takes a sentence"):
        assert_no_leakage(sdpa, query, key, value, is_causal=True, judged="x")
    with pytest.raises(ValueError, match="passes: got 0"):
        assert_no_leakage(sdpa, query, key, value, passes=0)
    with pytest.raises(ValueError, match="causal: got True; accepted is None for an attention fun"):
        assert_no_leakage(sdpa, query, key, value, causal=True)
    with pytest.raises(ValueError, match=r"key and value: got key .*; accepted is the same length"):
        assert_no_leakage(sdpa, query, key, value[..., 1:, :])
    with pytest.raises(TypeError, match=r"query, key and value: got .*; accepted is one dtype"):
        assert_no_leakage(sdpa, query, key, value.double())
    with pytest.raises(ValueError, match="has no elements"):
        assert_no_leakage(sdpa, query[:0], key[:0], value[:0])
    with pytest.raises(
        ValueError, match=r"lengths: got shape \(2,\) for 3 batch entries; accepted is one"
    ):
        assert_no_leakage(encoder_layer(), randn(3, 9, WIDTH), lengths=[9, 5])
    with pytest.raises(TypeError, match=r"documents: got torch\.float32"):
        assert_no_leakage(encoder_layer(), randn(3, 9, WIDTH), documents=torch.zeros(3, 9))
    with pytest.raises(ValueError, match='by="gradient": the subject is not differentiable'):
        assert_no_leakage(lambda q, k, v: sdpa(q, k, v).detach(), query, key, value, by="gradient")


def test_a_subject_that_answers_at_random_is_refused_unless_told():
    layer = nn.TransformerEncoderLayer(WIDTH, 2, 32, batch_first=True)
    masked = torch.ones(9, 9, dtype=torch.bool).triu(1)
    with pytest.raises(ValueError, match=r"TransformerEncoderLayer is in training mode \(dropout"):
        assert_no_leakage(layer, randn(2, 9, WIDTH), src_mask=masked)
    assert_no_leakage(layer, randn(2, 9, WIDTH), src_mask=masked, training=True)
    assert layer.training


def test_the_subject_is_left_as_it_was_found():
    layer = nn.TransformerEncoderLayer(WIDTH, 2, 32, batch_first=True).eval()
    inputs = randn(2, 9, WIDTH).requires_grad_()
    before, content = torch.get_rng_state(), inputs.detach().clone()
    with pytest.raises(AssertionError):
        assert_no_leakage(layer, inputs)
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(inputs, content)
    assert inputs.grad is None
    assert all(p.grad is None for p in layer.parameters())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in layer.modules())
    assert not layer.training


def test_a_subject_that_writes_to_its_inputs_does_not_disturb_the_search():
    def writing(query, key, value, is_causal):
        query.mul_(query.shape[-1] ** -0.5)
        return sdpa(query, key, value, is_causal=is_causal, scale=1.0)

    inputs = [t.clone() for t in qkv()]
    assert_no_leakage(writing, *inputs, is_causal=True)
    assert all(torch.equal(a, b) for a, b in zip(inputs, qkv(), strict=True))


def test_it_takes_inputs_that_are_not_contiguous_and_inference_tensors():
    query, key, value = (t.mT.contiguous().mT for t in qkv())
    assert_no_leakage(sdpa, query, key, value, is_causal=True)
    with torch.inference_mode():
        inputs = [t.clone() for t in qkv()]
    assert_no_leakage(sdpa, *inputs, is_causal=True)


@pytest.mark.parametrize("length", [1, 2, 130])
def test_lengths_from_one_on_are_judged(length):
    assert_no_leakage(sdpa, *qkv(query_len=length, key_len=length), is_causal=True)
    longer = qkv(query_len=length + 2, key_len=length + 2)
    assert "no mask" in message_of(attention(diagonal=999), *longer, is_causal=True)


@pytest.mark.parametrize(("parameters", "calls"), [(1, 2 + 2 + 8 + 1), (2**21, 2 + 2 + 3 + 1)])
def test_the_subject_is_called_no_more_than_promised(parameters, calls):
    called = []

    class Counting(nn.Module):
        def __init__(self):
            super().__init__()
            self.unused = nn.Parameter(torch.zeros(parameters))

        def forward(self, ids):
            called.append(torch.is_grad_enabled())
            return causal_encoder()(ids)

    assert_no_leakage(Counting().eval(), tokens(4, 32))
    assert len(called) == calls


class Peeks(nn.Module):
    """One token sees one later one; with many parameters, a call of it is dear."""

    def __init__(self, token, later, parameters=1):
        super().__init__()
        self.model, self.token, self.later = causal_encoder(), token, later
        self.unused = nn.Parameter(torch.zeros(parameters))

    def forward(self, ids):
        out = self.model(ids).clone()
        out[:, self.token] = out[:, self.token] + 0.1 * out[:, self.later]
        return out


@pytest.mark.parametrize("length", [16, 32, 128])
def test_a_single_pair_is_found_in_a_small_model_whatever_the_seed(length):
    message = message_of(Peeks(3, 5), tokens(1, length), seed=length)
    assert "token 3 sees token " in message
    assert "outside of what was captured" in message


class Adds(nn.Module):
    """Causal layers, after each of which one token is given a later one."""

    def __init__(self, token, later):
        super().__init__()
        self.layers, self.token, self.later = [encoder_layer(), encoder_layer()], token, later

    def forward(self, hidden):
        masked = torch.ones(hidden.shape[1], hidden.shape[1], dtype=torch.bool).triu(1)
        for layer in self.layers:
            hidden = layer(hidden, src_mask=masked).clone()
            hidden[:, self.token] = hidden[:, self.token] + hidden[:, self.later]
        return hidden


@pytest.mark.parametrize(("length", "token", "later"), [(12, 3, 5), (200, 151, 199)])
@pytest.mark.parametrize("batch", [1, 2])
def test_a_leak_that_follows_attention_is_named_by_what_counts_most(length, token, later, batch):
    inputs, model = randn(batch, length, WIDTH, seed=1), Adds(token, later)
    base, changes = model(inputs), {}
    for at in range(token + 1, later + 1):  # each alone, by hand
        other = inputs.clone()
        other[:, at] = randn(batch, WIDTH, seed=2)
        changes[at] = float((model(other) - base)[:, token].abs().max().detach())
    assert max(changes, key=changes.get) == later
    message = message_of(model, inputs)
    for line in message.splitlines():
        if line.startswith(("  worst ", "  first ")) and f"token {token} sees" in line:
            assert f"token {token} sees token {later}, " in line
    assert f"token {token} sees token {later}, " in message
    assert f"tokens {max(0, length - 16)}..{length - 1}\n" in message
    row = next(line for line in message.splitlines() if line.startswith(f"    t{token} "))
    ahead = row.split()[1][token + 1 :] if length == 12 else row.split()[1]
    heights = "·▁▂▃▄▅▆▇█"
    assert max(heights.index(cell) for cell in ahead) == heights.index(
        ahead[later - token - 1 if length == 12 else -1]
    )


@pytest.mark.parametrize("graph", [True, False], ids=["graph", "no graph"])
def test_what_is_named_is_what_the_picture_shows_as_the_largest(graph):
    def model(ids):
        out = causal_encoder()(ids)
        later = out.flip(1).cumsum(1).flip(1)
        return out + 0.1 * (later if graph else later.detach())

    for seed in range(3):
        message = message_of(model, tokens(2, 12, seed=seed), seed=seed, by="perturbation")
        token, later = map(
            int, re.search(r"worst .*token (\d+) sees token (\d+)", message).groups()
        )
        row = next(line for line in message.splitlines() if line.startswith(f"    t{token} "))
        cells = ["·▁▂▃▄▅▆▇█".index(cell) for cell in row.split()[1]]
        assert cells[later] == max(cells[token + 1 :])


def test_a_faint_leak_far_from_what_may_be_seen_is_called_faint():
    model = Wrong(lambda self, out, ids: out + 1e-3 * out.mean(1, keepdim=True))
    for seed in range(4):
        message = message_of(model, tokens(1, 64, seed=seed), seed=seed)
        assert "far fainter than what may be seen; " in message


def test_of_a_large_model_each_seed_judges_other_observers():
    said = []
    found = set()
    for seed in range(6):
        judged = []
        model = Peeks(20, 24, 2**21)
        try:
            assert_no_leakage(model, tokens(2, 64), passes=4, seed=seed, judged=judged.append)
        except AssertionError:
            found.add(seed)
        said += judged
    assert 0 < len(found) < 6
    assert "of 126 outputs that must not see some token were judged" in said[0]
    assert "more by their gradients; passes=64 judges each" in said[0]


def test_a_pass_says_what_it_judged():
    said = []
    assert_no_leakage(causal_encoder(), tokens(2, 8), passes=8, judged=said.append)
    assert said == [
        "assert_no_leakage: all 14 outputs that must not see some token were judged, each with all "
        "of that replaced"
    ]


def padding_and_causal(joined):
    """A decoder of one layer that joins its two masks."""

    class Decoder(nn.Module):
        def __init__(self):
            super().__init__()
            self.embedding, self.projection = nn.Embedding(50, WIDTH), nn.Linear(WIDTH, 3 * WIDTH)

        def forward(self, ids, keep=None):
            query, key, value = self.projection(self.embedding(ids)).chunk(3, -1)
            mask = torch.ones(ids.shape[1], ids.shape[1], dtype=torch.bool).tril()
            return sdpa(query, key, value, joined(mask, keep) if keep is not None else mask)

    torch.manual_seed(0)
    return SequenceModel(Decoder().eval(), mask="keep", mask_argument="keep")


@pytest.mark.parametrize("lengths", [[12, 7], [7, 12]])
def test_a_causal_mask_that_is_lost_under_another_is_counted_and_named(lengths):
    model, ids = padding_and_causal(lambda mask, keep: mask | keep[:, None]), tokens(2, 12)
    keep, leaks = torch.arange(12) < torch.tensor(lengths)[:, None], set()
    base = model.module(ids, keep)
    for at in range(12):  # each token alone
        other = ids.clone()
        other[:, at] = (other[:, at] + 1) % 50
        felt = (model.module(other, keep) - base).abs().amax(-1) > 0
        leaks |= {(b, i) for b, i in felt.nonzero().tolist() if i < at < lengths[b]}
    message = message_of(model, ids, causal=True, lengths=lengths)
    assert message.startswith(f"assert_no_leakage: {len(leaks)} of 19 outputs depend on")
    assert "all in batch" not in message
    assert "without keep it does not: the causal mask is lost where keep is given" in message


def test_a_mask_on_queries_in_place_of_keys_is_named():
    model = padding_and_causal(lambda mask, keep: (keep[:, :, None]).expand(-1, -1, keep.shape[1]))
    message = message_of(model, tokens(2, 12), causal=False, lengths=[12, 7])
    assert "the mask is applied to queries in place of keys in Decoder" in message


def test_heads_that_are_merged_wrongly_are_not_taken_for_a_missing_mask():
    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.projection, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)

        def forward(self, x):
            split = self.projection(x).unflatten(-1, (3, 4, -1)).permute(2, 0, 3, 1, 4)
            return self.out(sdpa(*split, is_causal=True).reshape(x.shape))

    torch.manual_seed(0)
    message = message_of(Block(), randn(2, 12, WIDTH), causal=True)
    assert "heads are merged in the wrong order after attention in Block" in message
    assert "no mask" not in message


@on_accelerators(DTYPES)
def test_it_judges_on_an_accelerator(dtype, accelerator):
    inputs = [t.to(accelerator) for t in qkv(query_len=33, key_len=33, dtype=dtype)]
    assert_no_leakage(sdpa, *inputs, is_causal=True)
    with pytest.raises(AssertionError, match=f"on {accelerator}:0"):
        assert_no_leakage(
            sdpa, *inputs, may_see=torch.ones(33, 33, dtype=torch.bool).tril().to(accelerator)
        )


# --- what strangers found


def test_a_subject_that_opens_its_mask_is_found_and_does_not_change_the_callers():
    def opening(query, key, value, attn_mask):
        attn_mask[..., :-1, 1:] |= torch.eye(5, dtype=torch.bool)
        return sdpa(query, key, value, attn_mask)

    mask = torch.ones(6, 6, dtype=torch.bool).tril()
    message = message_of(opening, *qkv(), attn_mask=mask)
    assert "each sees one place too many" in message
    assert torch.equal(mask, torch.ones(6, 6, dtype=torch.bool).tril())


@pytest.mark.parametrize("place", [(1, 2, 3), (1, 1, 5), (0, 0, 0)])
def test_a_dead_output_is_told_wherever_it_is(place):
    def dead(query, key, value, is_causal=False):
        output = sdpa(query, key, value, is_causal=is_causal).clone()
        output[place] = 1.0
        return output

    for options in ({}, {"is_causal": True}):
        message = message_of(dead, *qkv(), **options)
        assert "outputs do not depend on what they must see" in message
        assert f"output[{place[0]}, {place[1]}, {place[2]}] stays the same" in message


def test_saturated_attention_of_one_head_is_not_called_blind():
    for seed in range(30):
        query, key, value = qkv(1, 1, 12, 12, 16, seed=3 * seed)
        assert_no_leakage(sdpa, query * 10, key * 10, value, is_causal=True)


def test_hard_attention_is_not_called_blind():
    def hard(query, key, value):
        return torch.nn.functional.one_hot((query @ key.mT).argmax(-1), 6).to(value) @ value

    for seed in range(5):
        assert_no_leakage(hard, *qkv(seed=seed))


def test_the_last_query_is_asked_whether_it_sees_itself():
    def hiding(query, key, value, is_causal):
        mask = torch.ones(12, 12, dtype=torch.bool).tril()
        mask[-1, -1] = False
        return sdpa(query, key, value, mask)

    message = message_of(hiding, *qkv(query_len=12, key_len=12), is_causal=True)
    assert "query 11 does not see key 11" in message


@pytest.mark.parametrize("block", [16, 64])
def test_a_mask_that_is_open_at_the_ends_of_blocks_is_found(block):
    length = 128

    def leaking(query, key, value, is_causal):
        mask = torch.ones(length, length, dtype=torch.bool).tril()
        ends = torch.arange(block - 1, length - 1, block)
        mask[ends, ends + 1] = True
        return sdpa(query, key, value, mask)

    inputs = qkv(2, 4, length, length)
    assert "one step in its future" in message_of(leaking, *inputs, is_causal=True)


@pytest.mark.parametrize(("reader", "read"), [(0, 2), (0, 3), (1, 3), (4, 6)])
def test_a_head_that_reads_any_other_is_found(reader, read):
    def mixing(query, key, value):
        output = sdpa(query, key, value).clone()
        output[:, reader] += 0.1 * value[:, read].mean(-2, keepdim=True)
        return output

    message = message_of(mixing, *qkv(heads=8))
    assert f"depends on head {read}, its own is {reader};" in message


@pytest.mark.parametrize("fill", [-20.0, -30.0])
def test_an_added_fill_that_only_an_attractive_key_overcomes_is_found(fill):
    def function(query, key, value, is_causal):
        return sdpa(query, key, value, torch.full((6, 6), fill).triu(1))

    assert "sees key" in message_of(function, *qkv(head_dim=16), is_causal=True)


def test_a_padded_language_model_needs_to_be_called_causal():
    message = message_of(causal_encoder(), tokens(2, 9), may_see=torch.ones(9, 9) > 0)
    assert "all of them lie in its future: if the model is causal, say so with causal" in message
    assert "claim" not in message


def test_a_claim_that_was_assumed_is_told():
    message = message_of(encoder_layer(), randn(2, 9, WIDTH))
    assert "\n  claim    no token may see a later one: assumed, since nothing was said." in message
    assert "pass causal=False, or lengths=" in message


def test_a_sliding_window_is_recognised():
    window = torch.ones(9, 9, dtype=torch.bool).triu(-2).tril()

    def windowed(query, key, value, is_causal):
        return sdpa(query, key, value, window)

    inputs = qkv(query_len=9, key_len=9)
    said = "those farthest back: a sliding window, chunks or packed documents? Say so with may_see="
    assert said in message_of(windowed, *inputs, is_causal=True)
    assert_no_leakage(windowed, *inputs, may_see=window, is_causal=True)


def test_a_module_that_is_not_told_of_its_padding_is_refused():
    sequential = nn.Sequential(encoder_layer())
    with pytest.raises(ValueError, match="Sequential is not told which tokens are padding"):
        assert_no_leakage(sequential, randn(2, 9, WIDTH), lengths=[9, 6])
    assert_no_leakage(causal_encoder(), tokens(2, 9), lengths=[9, 6], causal=True)
    with pytest.raises(
        ValueError, match="at least one of them less than 9, or there is no padding"
    ):
        assert_no_leakage(encoder_layer(), randn(2, 9, WIDTH), lengths=[9, 9])


def test_wrapped_modules_are_known():
    compiled = torch.compile(encoder_layer(), backend="eager")
    for module in (nn.DataParallel(encoder_layer()), compiled):
        assert_no_leakage(module, randn(2, 9, WIDTH), lengths=[9, 6])


def test_an_encoder_that_looks_up_the_same_tokens_is_no_leak():
    ids = tokens(2, 8)
    source = ids.clone()
    embedding, masked = nn.Embedding(50, WIDTH), torch.ones(8, 8, dtype=torch.bool).triu(1)

    def decoder(given):
        memory = embedding(source).mean(1, keepdim=True)
        return encoder_layer()(embedding(given), src_mask=masked) + memory

    assert_no_leakage(decoder, ids)


def test_a_function_that_takes_other_arguments_is_told_how_to_be_wrapped():
    def own(query, key, value, mask=None):
        return sdpa(query, key, value, mask)

    with pytest.raises(TypeError, match=r"cannot be called as function\(query.*AttentionSpec says"):
        assert_no_leakage(own, *qkv(), is_causal=True)
    mask = torch.ones(6, 6, dtype=torch.bool).tril()
    with pytest.raises(
        ValueError, match="mask: got a boolean mask under this name; accepted is attn_mask"
    ):
        assert_no_leakage(own, *qkv(), mask=mask)
    spec = AttentionSpec(own, mask_argument="mask")
    assert_no_leakage(spec, *qkv(), attn_mask=mask)
    assert_no_leakage(spec, *qkv(), is_causal=True)


def test_a_specification_turns_layout_and_mask():
    def own(q, k, v, dropped=None):
        turned = (t.transpose(1, 2) for t in (q, k, v))
        return sdpa(*turned, attn_mask=None if dropped is None else ~dropped).transpose(1, 2)

    spec = AttentionSpec(own, layout="blhd", mask="drop", mask_argument="dropped")
    assert_no_leakage(spec, *qkv(), is_causal=True)
    torch.testing.assert_close(spec(*qkv(), is_causal=True), sdpa(*qkv(), is_causal=True))


def test_answers_of_an_earlier_call_are_not_called_a_mask():
    query, key, value = qkv()
    known = sdpa(query, key, value, is_causal=True)
    message = message_of(
        lambda query, key, value, is_causal: known, query, key, value, is_causal=True
    )
    assert (
        "cause    no output around it changes either: is an earlier answer given again?" in message
    )
