"""What the assertion about the layout of memory accepts, finds and says."""

import copy
import math

import pytest
import torch
from attention_subjects import (
    DTYPES,
    TRANSFORMERS,
    WIDTH,
    Restless,
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

from pytest_attnheat import assert_layout_invariant
from pytest_attnheat.assertions.behaviour.layout import packed_together

SDPA = functional.scaled_dot_product_attention
DROP = torch.tensor([[1, 0, 1, 1, 0, 1]] * 3 + [[1] * 6] * 2 + [[0] * 6], dtype=torch.bool)
STEEP = torch.linspace(-2, 2, 36).reshape(6, 6)
PERMUTED = "permuted from (batch, length, heads, width)"
TRANSPOSED = "transposed, the last dimension not contiguous"
STEPPED = "sliced, every second row of a larger tensor"
SHIFTED = "at another storage offset"
EXPANDED = "expanded over dimension 0, with stride 0"
PACKED = "packed in one projection (batch, length, heads and widths)"


def message_of(subject, *inputs, **options):
    with pytest.raises(AssertionError) as error:
        assert_layout_invariant(subject, *inputs, **options)
    return str(error.value)


def packed(tensor):
    """What a kernel reads that takes its input for contiguous, whatever its strides."""
    memory = torch.as_strided(
        tensor, (tensor.untyped_storage().size() // tensor.itemsize,), (1,), 0
    )
    return memory[tensor.storage_offset() :][: tensor.numel()].reshape(tensor.shape)


# --- Correct subjects


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("function", [SDPA, plain], ids=["sdpa", "plain"])
@pytest.mark.parametrize(
    "arguments",
    [{}, {"is_causal": True}, {"attn_mask": DROP}, {"attn_mask": STEEP}],
    ids=["none", "causal", "boolean", "float"],
)
def test_functions_of_pytorch_and_by_hand_pass_whatever_their_mask(function, arguments, dtype):
    mask = arguments.get("attn_mask")
    given = {} if mask is None or mask.dtype == torch.bool else {"attn_mask": mask.to(dtype)}
    assert_layout_invariant(function, *qkv(dtype=dtype), **{**arguments, **given})


def test_grouped_heads_and_inputs_of_any_number_of_dimensions_pass():
    query, _, _ = qkv(heads=4, query_len=3)
    _, key, value = qkv(heads=2, key_len=7)
    assert_layout_invariant(SDPA, query, key, value, enable_gqa=True)
    assert_layout_invariant(SDPA, *qkv(1, 1, 1, 1))
    for drop in range(1, 4):
        assert_layout_invariant(SDPA, *(t[(0,) * drop] if drop < 3 else t[None] for t in qkv()))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("batch_first", [True, False])
def test_modules_of_pytorch_pass(batch_first, dtype):
    attention = copy.deepcopy(multihead(batch_first)).to(dtype)
    layer = copy.deepcopy(encoder_layer(batch_first)).to(dtype)
    inputs = [randn(3, 5, WIDTH, seed=seed, dtype=dtype) for seed in range(3)]
    assert_layout_invariant(attention, *inputs)
    assert_layout_invariant(attention, *inputs, attn_mask=torch.ones(5, 5).tril().bool())
    assert_layout_invariant(attention, inputs[0])
    assert_layout_invariant(layer, inputs[0])


@pytest.mark.parametrize(("name", "implementation"), TRANSFORMERS)
def test_models_of_transformers_pass(name, implementation):
    assert_layout_invariant(of_transformers(name, implementation), tokens(3, 5))


def test_inputs_that_are_not_contiguous_themselves_pass():
    query, key, value = (t.transpose(1, 2).contiguous().transpose(1, 2) for t in qkv())
    assert_layout_invariant(SDPA, query, key, value)
    assert_layout_invariant(SDPA, query, key[:1].expand(key.shape), value)
    assert_layout_invariant(SDPA, query, key, value, attn_mask=DROP.expand(2, 3, 6, 6))


# --- Layouts


def test_every_layout_of_every_input_and_of_all_together_is_tried_with_equal_values():
    given = dict(zip(("query", "key", "value"), qkv(), strict=True))
    seen = set()

    def remembered(query, key, value):
        inputs = {"query": query, "key": key, "value": value}
        laid = [n for n, t in inputs.items() if not t.is_contiguous() or t.storage_offset()]
        kinds = {kind_of(inputs[name]) for name in laid}
        assert len(kinds) < 2
        for name in laid:
            if "expanded" not in next(iter(kinds)):
                assert torch.equal(inputs[name], given[name])
        seen.add((", ".join(laid), *kinds))
        return SDPA(query, key, value)

    def kind_of(tensor):
        if 0 in tensor.stride():
            return EXPANDED.replace("0", str(tensor.stride().index(0)), 1)
        if tensor.stride(2) == 3 * (8 + 8 + 10):
            return PACKED
        if tensor.is_contiguous():
            assert tensor.storage_offset() == 1
            return SHIFTED
        if tensor.stride(-1) != 1:
            return TRANSPOSED
        return PERMUTED if tensor.stride(-3) < tensor.stride(-2) else STEPPED

    assert_layout_invariant(remembered, *given.values(), gradients=False)
    names = ["query", "key", "value", "query, key, value"]
    expanded = [EXPANDED.replace("0", str(dim), 1) for dim in range(3)]
    kinds = [PERMUTED, TRANSPOSED, STEPPED, SHIFTED, *expanded]
    tried = {(name, kind) for name in names for kind in kinds}
    assert seen == {("",), (names[-1], PACKED), *tried}


# --- Functions that are wrong


def test_memory_that_is_read_as_if_it_were_contiguous_is_named():
    message = message_of(lambda q, k, v: SDPA(q, packed(k), v), *qkv())
    assert message.startswith(
        "assert_layout_invariant: 36 of 36 rows change with key permuted from (batch, length, "
        "heads, width)\n"
    )
    assert "\n  worst    output[" in message
    assert " of its size (allowed 2.0e-05)\n" in message
    assert "\n  cause    strides are ignored: memory is read as if it were contiguous\n" in message
    assert "\n  tensor   float32 (2, 3, 6, 10) on cpu\n  repeat   seed=0" in message


def test_a_storage_offset_that_is_ignored_is_named():
    def from_the_beginning(query, key, value):
        return SDPA(query, key, value.as_strided(value.shape, value.stride(), 0))

    message = message_of(from_the_beginning, *qkv())
    assert "36 of 36 rows change with value at another storage offset\n" in message
    assert "cause    the storage offset is ignored: memory is read from its beginning" in message


@pytest.mark.parametrize(
    ("layout", "is_laid"),
    [
        (PERMUTED, lambda t: t.stride(1) < t.stride(2)),
        (TRANSPOSED, lambda t: t.stride(3) > 1),
        (STEPPED, lambda t: t.stride(2) == 2 * t.shape[3]),
        (SHIFTED, lambda t: t.storage_offset() == 1),
        (EXPANDED, lambda t: 0 in t.stride()),
    ],
    ids=["permuted", "transposed", "stepped", "shifted", "expanded"],
)
@pytest.mark.parametrize("number", range(3))
def test_each_layout_and_each_input_is_named(number, layout, is_laid):
    def wrong(*inputs):
        return SDPA(*inputs) * (1 + 0.1 * is_laid(inputs[number]))

    name = ("query", "key", "value")[number]
    assert f"36 of 36 rows change with {name} {layout}\n" in message_of(wrong, *qkv())


@pytest.mark.parametrize("dim", [1, 2])
def test_heads_and_length_expanded_with_stride_zero_are_found(dim):
    def wrong(query, key, value):
        return SDPA(query, key, value) * (1 + 0.1 * (key.stride(dim) == 0))

    message = message_of(wrong, *qkv())
    assert f"rows change with key expanded over dimension {dim}, with stride 0\n" in message


def test_parts_of_one_packed_projection_are_found():
    def wrong(query, key, value):
        # What a kernel does that is given the strides of unpacked inputs.
        strides = query.stride(), key.stride()
        packed = query.untyped_storage().data_ptr() == key.untyped_storage().data_ptr()
        return SDPA(query, key, value) * (1 + 0.1 * (packed and len(set(strides)) == 1))

    message = message_of(wrong, *(t[..., :8] for t in qkv()))
    assert f"rows change with query, key and value {PACKED}\n" in message


def test_a_packed_projection_is_that_of_unbind():
    inputs = dict(zip(("query", "key", "value"), (t[..., :8] for t in qkv()), strict=True))
    made = packed_together(inputs)
    parts = torch.empty(2, 6, 3, 3, 8).unbind(2)
    for (name, tensor), part in zip(made.items(), parts, strict=True):
        assert torch.equal(tensor, inputs[name])
        assert tensor.stride() == part.transpose(1, 2).stride()
        assert tensor.storage_offset() == part.storage_offset()
    other = {**inputs, "query": inputs["query"][..., :3, :]}
    assert packed_together(other) == {}
    flat = {name: tensor[:, 0] for name, tensor in inputs.items()}
    assert all(torch.equal(tensor, flat[name]) for name, tensor in packed_together(flat).items())


def test_a_fault_of_all_inputs_together_is_found():
    def wrong(query, key, value):
        odd = sum(t.stride(3) > 1 for t in (query, key, value)) == 3
        return SDPA(query, key, value) + odd

    message = message_of(wrong, *qkv())
    assert f"36 of 36 rows change with query, key and value {TRANSPOSED}\n" in message


def test_a_view_that_the_memory_does_not_allow_is_a_failure():
    def flat_heads(query, key, value):
        query, key, value = (t.view(-1, *t.shape[-2:]) for t in (query, key, value))
        return SDPA(query, key, value).view(2, 3, 6, 10)

    message = message_of(flat_heads, *qkv())
    assert message.startswith(
        f"assert_layout_invariant: the subject raises with query {PERMUTED}\n  worst    "
        "RuntimeError: view size is not compatible with input tensor's size and stride"
    )
    assert "cause    .view() needs memory of its own kind: .reshape(), or .contiguous()" in message
    assert "tensor   float32 (2, 3, 6, 8) on cpu" in message


def test_an_assertion_of_the_subject_about_strides_is_a_failure():
    def picky(query, key, value):
        assert value.stride(-1) == 1, "value must be contiguous"
        return SDPA(query, key, value)

    message = message_of(picky, *qkv())
    assert f"the subject raises with value {TRANSPOSED}\n" in message
    assert "AssertionError: value must be contiguous" in message
    assert "cause" not in message


@pytest.mark.parametrize(
    "mask", [DROP, STEEP, DROP[:, :1].expand(6, 6)], ids=["boolean", "float", "rows"]
)
def test_a_mask_whose_memory_is_misread_is_found(mask):
    def wrong(query, key, value, attn_mask):
        return SDPA(query, key, value, packed(attn_mask))

    assert f"rows change with attn_mask {TRANSPOSED}\n" in message_of(wrong, *qkv(), attn_mask=mask)


def test_rows_that_may_see_nothing_are_not_judged():
    def undefined(query, key, value, attn_mask):
        odd = not attn_mask.is_contiguous()
        scores = (query @ key.mT).masked_fill(~attn_mask, -1e9 * odd - 1e9)
        output = scores.softmax(-1) @ value
        sees = attn_mask.any(-1)[..., None]
        return torch.where(sees, output, query.sum(-1, keepdim=True) * (math.nan if odd else 7.0))

    def with_other_gradients(query, key, value, attn_mask):
        odd = not attn_mask.is_contiguous()
        sees = attn_mask.any(-1)[..., None]
        return SDPA(query, key, value, attn_mask) + ~sees * query.mean() * (1 + odd)

    assert_layout_invariant(undefined, *qkv(), attn_mask=DROP, gradients=False)
    assert_layout_invariant(with_other_gradients, *qkv(), attn_mask=DROP)


def test_a_model_that_misreads_its_sequence_is_found():
    def misread(x):
        x = packed(x)
        return SDPA(x, x, x)

    message = message_of(misread, randn(3, 5, WIDTH))
    assert "15 of 15 rows change with inputs permuted from (length, batch, width)\n" in message
    assert "cause    strides are ignored" in message
    embedding = nn.Embedding(50, WIDTH)
    message = message_of(lambda ids: embedding(packed(ids)), tokens(3, 5))
    assert f"rows change with inputs {TRANSPOSED}\n" in message


# --- Inputs that are written into


def test_an_input_that_is_scaled_in_place_is_named():
    def wrong(query, key, value):
        key *= 0.5
        return SDPA(query, key, value)

    inputs = qkv()
    kept = inputs[1].clone()
    message = message_of(wrong, *inputs)
    before, after = kept[0, 0, 0, 0], kept[0, 0, 0, 0] * 0.5
    assert message.startswith(
        "assert_layout_invariant: 288 of 288 elements change: the subject writes into key\n"
        f"  worst    key[0, 0, 0, 0] was {before:.6g} and is {after:.6g} after the call\n"
        "  cause    an operation in place on key, for instance key *= scale\n"
    )
    assert torch.equal(inputs[1], kept)


def test_an_input_that_is_written_with_what_it_held_is_named():
    def wrong(query, key, value):
        query.mul_(2)
        output = SDPA(query, key, value, scale=0.1)
        query.div_(2)
        return output

    message = message_of(wrong, *qkv())
    assert "0 of 288 elements change: the subject writes into query\n" in message
    assert "worst    query is written with what it held" in message


def test_an_input_that_is_written_behind_the_back_of_autograd_is_named():
    def wrong(query, key, value):
        output = SDPA(query, key, value)
        value.data[1, 2, 3, 4] = 0
        return output

    message = message_of(wrong, *qkv())
    assert "1 of 360 elements change: the subject writes into value\n" in message
    assert "worst    value[1, 2, 3, 4] was " in message


def test_a_write_into_one_layout_only_is_named_with_it():
    def wrong(query, key, value):
        query = query if query.stride(-1) > 1 else query.clone()
        query += 1
        return SDPA(query, key, value)

    message = message_of(wrong, *qkv())
    assert (
        f"288 of 288 elements change: the subject writes into query with query {TRANSPOSED}\n"
        in message
    )


# --- Gradients


class WrongBackward(torch.autograd.Function):
    """A copy whose gradient is right for contiguous memory only."""

    @staticmethod
    def forward(ctx, tensor):
        ctx.wrong = not tensor.is_contiguous()
        return tensor.clone()

    @staticmethod
    def backward(ctx, gradient):
        return gradient * (2 if ctx.wrong else 1)


def test_a_gradient_that_the_layout_changes_is_named():
    def wrong(query, key, value):
        return SDPA(query, WrongBackward.apply(key), value)

    message = message_of(wrong, *qkv(), seed=3)
    assert message.startswith(
        f"assert_layout_invariant: 36 of 36 rows of the gradient of key change with key {PERMUTED}"
    )
    assert "worst    key.grad[" in message
    assert "tensor   float32 (2, 3, 6, 8) on cpu\n  repeat   seed=3" in message
    assert_layout_invariant(wrong, *qkv(), gradients=False)


def test_a_backward_that_refuses_a_layout_is_a_failure():
    class Picky(WrongBackward):
        @staticmethod
        def backward(ctx, gradient):
            if ctx.wrong:
                raise RuntimeError("must be contiguous")
            return gradient

    message = message_of(lambda q, k, v: SDPA(q, k, Picky.apply(v)), *qkv())
    assert f"the subject raises with value {PERMUTED}\n" in message
    assert "RuntimeError: must be contiguous" in message


def test_a_gradient_may_round_more_than_an_output_unless_the_caller_says_otherwise():
    class Rounded(WrongBackward):
        @staticmethod
        def backward(ctx, gradient):
            return gradient * (1 + 1e-4 * ctx.wrong)

    def rounded(query, key, value):
        return SDPA(Rounded.apply(query), key, value)

    assert_layout_invariant(rounded, *qkv())
    assert "(allowed 2.0e-05)" in message_of(rounded, *qkv(), tolerance=2e-5)
    message = message_of(rounded, *qkv(dtype=torch.float64))
    assert "of the gradient of query" in message
    assert "(allowed 1.0e-10)" in message


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gradients_that_are_nothing_but_rounding_are_not_compared_by_their_size(dtype):
    for seed in range(2):
        query, key, value = qkv(seed=seed, dtype=dtype)
        # Equal keys, and a softmax that is one-hot: the query has no gradient in theory.
        assert_layout_invariant(SDPA, query, key[..., :1, :].expand(key.shape), value, seed=seed)
        assert_layout_invariant(SDPA, 50 * query, key, value, scale=1.0, seed=seed)
        assert_layout_invariant(SDPA, query[0, 0], key[0, 0], value[0, 0], seed=seed)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", [5.0, 30.0])
def test_gradients_of_saturated_attention_pass_and_wrong_ones_do_not(size, dtype):
    class Misread(torch.autograd.Function):
        @staticmethod
        def forward(ctx, tensor):
            ctx.wrong = tensor.stride(-1) > 1
            return tensor.clone()

        @staticmethod
        def backward(ctx, gradient):
            return packed(gradient.mT.contiguous()).view(gradient.shape) if ctx.wrong else gradient

    def wrong(query, key, value, **options):
        return SDPA(query, Misread.apply(key), value, **options)

    def wrong_of_value(query, key, value, **options):
        return SDPA(query, key, Misread.apply(value), **options)

    for seed in range(2):
        query, key, value = (randn(2, 4, 12, 16, seed=3 * seed + i) for i in range(3))
        inputs = [t.to(dtype) for t in (size * query, size * key, value)]
        assert_layout_invariant(SDPA, *inputs, is_causal=True, seed=seed)
        if size == 5:  # of larger scores the gradient of the key is little but rounding
            message = message_of(wrong, *inputs, is_causal=True, seed=seed)
            assert "rows of the gradient of key change with key transposed" in message
        message = message_of(wrong_of_value, *inputs, is_causal=True, seed=seed)
        assert "rows of the gradient of value change with value transposed" in message


@pytest.mark.parametrize("low", [torch.bfloat16, torch.float16], ids=str)
def test_what_autocast_computes_is_held_to_its_dtype(low):
    with torch.autocast("cpu", dtype=low):
        assert_layout_invariant(SDPA, *qkv())
        assert_layout_invariant(lambda q, k, v: SDPA(q, k, v).float(), *qkv())
        assert_layout_invariant(encoder_layer(), randn(2, 5, WIDTH))
        message_of(lambda q, k, v: SDPA(q, packed(k), v), *qkv())


def test_inference_mode_passes_and_a_write_within_it_is_found():
    def wrong(query, key, value):
        key *= 0.5
        return SDPA(query, key, value)

    outside = qkv()
    with torch.inference_mode():
        assert_layout_invariant(SDPA, *outside)
        assert_layout_invariant(SDPA, *qkv())
        assert_layout_invariant(encoder_layer(), randn(2, 5, WIDTH))
        assert "288 of 288 elements change: the subject writes into key" in message_of(
            wrong, *qkv()
        )


def test_a_row_without_a_size_is_said_to_be_off_and_nothing_more():
    def wrong(query, key, value):
        return SDPA(query, key, value) * 0 + (not key.is_contiguous())

    message = message_of(wrong, *qkv())
    assert "is off by up to 1 (allowed" in message
    assert "inf" not in message.replace("tensor", "")


def test_subjects_without_a_gradient_pass():
    class NoBackward(WrongBackward):
        @staticmethod
        def backward(ctx, gradient):
            raise NotImplementedError

    assert_layout_invariant(lambda q, k, v: SDPA(q, k, v).detach(), *qkv())
    assert_layout_invariant(lambda q, k, v: SDPA(q, k, NoBackward.apply(v)), *qkv())
    assert_layout_invariant(lambda q, k, v: v.clone(), *qkv())


# --- Arguments, and what is left behind


@pytest.mark.parametrize("count", [0, 2, 4])
def test_any_other_number_of_inputs_is_refused(count):
    with pytest.raises(TypeError, match=rf"inputs: got {count} for .*; accepted is three \(query"):
        assert_layout_invariant(SDPA, *[randn(1, 2, 3)] * count)


def test_what_a_subject_raises_for_contiguous_inputs_is_its_own():
    def broken(query, key, value):
        raise RuntimeError("not written yet")

    with pytest.raises(RuntimeError, match="not written yet"):
        assert_layout_invariant(broken, *qkv())


def test_the_tolerance_of_the_caller_counts():
    def wrong(query, key, value):
        return SDPA(query, key, value) * (1 + 1e-4 * (not key.is_contiguous()))

    assert "(allowed 2.0e-05)" in message_of(wrong, *qkv())
    assert_layout_invariant(wrong, *qkv(), tolerance=2e-4)
    with pytest.raises(ValueError, match=r"tolerance: got 1\.5"):
        assert_layout_invariant(wrong, *qkv(), tolerance=1.5)


def test_dropout_is_refused_and_its_order_of_memory_named():
    def dropped(query, key, value):
        return functional.dropout(SDPA(query, key, value) + 0 * query[..., :1], 0.5)

    with pytest.raises(ValueError, match="the subject is random"):
        assert_layout_invariant(dropped, *qkv())
    assert_layout_invariant(lambda q, k, v: dropped(q, k, v.contiguous()), *qkv(), training=True)

    def in_order_of_memory(query, key, value):
        permuted = value.transpose(1, 2).is_contiguous()
        drawn = value.transpose(1, 2) if permuted else value
        drawn = functional.dropout(drawn, 0.5)
        return SDPA(query, key, drawn.transpose(1, 2) if permuted else drawn)

    message = message_of(in_order_of_memory, *qkv(), training=True)
    assert f"rows change with value {PERMUTED}\n" in message
    assert "cause    training=True: dropout draws other numbers" in message


def test_mode_gradients_inputs_and_random_state_are_left_as_they_were():
    module = Restless(takes_gradients=True).train()
    inputs = randn(2, 5, WIDTH).requires_grad_()
    kept, state = inputs.detach().clone(), torch.get_rng_state()
    assert_layout_invariant(module, inputs)
    assert module.training
    assert module.calls == 0
    assert all(parameter.grad is None for parameter in [inputs, *module.parameters()])
    assert torch.equal(inputs, kept)
    assert inputs._version == 0
    assert torch.equal(torch.get_rng_state(), state)


@on_accelerators([torch.float32])
def test_everything_works_on_an_accelerator(dtype, accelerator):
    inputs = [t.to(accelerator) for t in qkv(dtype=dtype)]
    assert_layout_invariant(SDPA, *inputs, attn_mask=DROP.to(accelerator))
    message = message_of(lambda q, k, v: SDPA(q, packed(k), v), *inputs)
    assert f"on {accelerator}:0" in message
