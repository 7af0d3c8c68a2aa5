"""Dtypes, autocast, gradients, inference, and tensors at the edges, under capture."""

import pytest
import torch
from capture_oracles import assert_weights, draw, plain_weights, three
from torch import nn
from torch.nn import functional as F  # noqa: N812
from torch.utils.checkpoint import checkpoint

from pytest_attnheat import capture_attention
from pytest_attnheat.capture import CaptureWarning

# The roundings of inputs that the oracle has too are not among these: weights are computed in
# float32 from the very queries and keys that the model had, and float64 from float64.
DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16]


def fused(q, k, v):
    return F.scaled_dot_product_attention(q, k, v)


def written(q, k, v):
    return (q @ k.mT / 2).softmax(-1) @ v


def captured(function, *args, **options):
    with capture_attention(**options) as trace:
        function(*args)
    (record,) = trace
    return record


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_fused_attention_in_every_dtype(dtype):
    query, key, value = three(2, 3, dtype=dtype)
    record = captured(fused, query, key, value)
    assert record.dtype == dtype
    assert record.trusted
    assert record.weights.dtype == torch.float32
    assert_weights(record, plain_weights(query, key))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_written_attention_in_every_dtype_is_what_the_model_multiplied(dtype):
    query, key, value = three(2, 3, dtype=dtype)
    record = captured(written, query, key, value)
    assert record.trusted
    assert torch.equal(record.weights, (query @ key.mT / 2).softmax(-1).float())


def test_float64_is_kept_where_it_is_asked_for():
    query, key, value = three(2, 3, dtype=torch.float64)
    record = captured(fused, query, key, value, dtype=torch.float64)
    assert_weights(record, plain_weights(query, key), atol=1e-14, rtol=0)
    assert record.weights.dtype == torch.float64
    record = captured(fused, query, key, value, keep="weights", dtype=torch.float16)
    assert record.weights.dtype == torch.float16
    assert record.compute_weights(torch.float64).dtype == torch.float64


def test_weights_that_are_rounded_for_keeping_are_not_distrusted():
    for function in (fused, written):
        record = captured(function, *three(2, 3, dtype=torch.float64), keep="weights")
        assert record.weights.dtype == torch.float32
        assert record.residual < 1e-12


def test_weights_in_whole_numbers_are_refused():
    record = captured(fused, *three(2, 3))
    with pytest.raises(TypeError, match=r"^dtype: got torch\.int64; accepted is a dtype such as"):
        record.compute_weights(torch.int64)


@pytest.mark.parametrize("function", [fused, written])
def test_autocast(function):
    query, key, value = three(2, 3)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        record = captured(function, query, key, value)
        inside = record.weights
    assert record.trusted
    assert inside.dtype == torch.float32
    assert torch.equal(inside, record.weights)
    assert_weights(record, plain_weights(query, key), atol=2e-2, rtol=0)


def test_autocast_in_a_model_that_records_what_was_computed():
    torch.manual_seed(3)
    model = nn.MultiheadAttention(8, 2, batch_first=True).eval()
    x = draw("x", 2, 5, 8)
    with torch.autocast("cpu", dtype=torch.bfloat16), torch.no_grad():
        with capture_attention(model) as trace:
            output, _ = model(x, x, x)
        expected, _ = model(x, x, x, need_weights=False)
    assert trace[0].trusted
    assert output.dtype == expected.dtype


@pytest.mark.parametrize("function", [fused, written])
@pytest.mark.parametrize("context", [torch.inference_mode, torch.no_grad, torch.enable_grad])
def test_records_hold_no_graph_and_can_be_used_anywhere(function, context):
    query, key, value = (t.requires_grad_() for t in three(2, 3))
    with context():
        record = captured(function, query, key, value)
    for tensor in (record.query, record.key, record.value, record.output, record.weights):
        assert not tensor.requires_grad
        assert tensor.grad_fn is None
    assert_weights(record, plain_weights(query, key))


def test_a_record_made_in_inference_mode_can_be_changed_outside():
    with torch.inference_mode():
        record = captured(fused, *three(2, 3))
    weights = record.weights
    weights.mul_(2)
    assert not weights.is_inference()


@pytest.mark.parametrize("keep", ["inputs", "weights", "statistics"])
@pytest.mark.parametrize("function", [fused, written])
def test_gradients_are_identical(function, keep):
    given = three(2, 3)

    def gradients():
        inputs = [tensor.clone().requires_grad_() for tensor in given]
        loss = function(*inputs).square().sum()
        return loss, inputs

    loss, inputs = gradients()
    loss.backward()
    expected = [tensor.grad for tensor in inputs]
    with capture_attention(keep=keep) as trace:
        loss, inputs = gradients()
    loss.backward()
    assert len(trace) == 1
    assert all(torch.equal(t.grad, e) for t, e in zip(inputs, expected, strict=True))
    with capture_attention(keep=keep):
        loss, inputs = gradients()
        loss.backward()
    assert all(torch.equal(t.grad, e) for t, e in zip(inputs, expected, strict=True))


BACKWARDS = {"of the tensor": lambda loss: loss.backward(), "of autograd": torch.autograd.backward}


@pytest.mark.parametrize("backward", BACKWARDS.values(), ids=BACKWARDS)
@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointing_is_one_record(reentrant, backward):
    query, key, value = (t.requires_grad_() for t in three(2, 3))
    written(query, key, value).sum().backward()
    expected = query.grad.clone()
    query.grad = None
    with capture_attention() as trace:
        backward(checkpoint(written, query, key, value, use_reentrant=reentrant).sum())
    assert len(trace) == 1
    assert torch.equal(query.grad, expected)


def test_checkpointed_modules_keep_their_names():
    class Layer(nn.Module):
        def forward(self, x):
            return x + written(x, x, x)

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = nn.ModuleList(Layer() for _ in range(3))

        def forward(self, x):
            for layer in self.layers:
                x = checkpoint(layer, x, use_reentrant=False)
            return x

    model = Model()
    x = draw("x", 2, 1, 5, 4).requires_grad_()
    with capture_attention(model) as trace:
        model(x).sum().backward()
        model(x).sum().backward()
    assert [r.layer for r in trace] == ["layers.0", "layers.1", "layers.2"] * 2
    assert [r.call for r in trace] == [0, 0, 0, 1, 1, 1]


# --- tensors that change afterwards


@pytest.mark.parametrize("function", [fused, written])
@pytest.mark.parametrize("keep", ["inputs", "weights"])
def test_what_is_overwritten_afterwards_does_not_change_a_record(function, keep):
    query, key, value = three(2, 3)
    mask = torch.ones(5, 7, dtype=torch.bool)
    record = captured(function, query, key, value, keep=keep)
    before = record.weights
    for tensor in (query, key, value):
        tensor.zero_()
    assert torch.equal(record.weights, before)
    with capture_attention() as trace:
        F.scaled_dot_product_attention(*three(2, 3), attn_mask=mask)
    mask.zero_()
    assert trace[0].mask.all()


@pytest.mark.parametrize("keep", ["inputs", "weights"])
def test_weights_that_are_overwritten_afterwards_do_not_change_a_record(keep):
    query, key, value = three(2, 3)

    def attend():
        weights = (query @ key.mT / 2).softmax(-1)
        output = weights @ value
        weights.zero_()
        return output

    assert_weights(captured(attend, keep=keep), plain_weights(query, key))


def test_what_a_record_hands_out_does_not_change_it():
    record = captured(written, *three(2, 3))
    expected = record.weights.clone()
    record.weights.zero_()
    assert torch.equal(record.weights, expected)


# --- at the edges


def test_nan_is_marked_and_warned_about():
    query, key, value = three(2, 3)
    query[0, 1, 2, 0] = torch.nan
    with pytest.warns(CaptureWarning, match="weights times value are not the output"):
        record = captured(fused, query, key, value)
    assert not record.trusted
    assert record.residual == torch.inf


def test_an_output_whose_sum_is_too_large_for_its_dtype_is_no_error():
    query, key, _ = three(2, 3, dtype=torch.float16, queries=40)
    with capture_attention() as trace:
        output = F.scaled_dot_product_attention(query, key, torch.full_like(key, 6e4))
    assert output.isfinite().all()
    assert output.sum().isinf()
    assert trace[0].trusted


def test_nan_in_a_row_that_is_not_sampled_is_marked():
    query, key, value = three(1, 1, queries=100)
    query[0, 0, 3] = torch.nan
    for function in (fused, written):
        with pytest.warns(CaptureWarning):
            record = captured(function, query, key, value)
        assert not record.trusted


@pytest.mark.parametrize("function", [fused, written])
@pytest.mark.parametrize("keep", ["inputs", "weights", "statistics"])
@pytest.mark.parametrize(
    ("lead", "lengths"),
    [((0, 3), (5, 7)), ((2, 0), (5, 7)), ((2, 3), (0, 7)), ((2, 3), (1, 1)), ((2, 3), (5, 0)),
     ((1, 144), (2, 2))],
    ids=["no batch", "no heads", "no queries", "one by one", "no keys", "144 heads"],
)  # fmt: skip
def test_any_size(function, keep, lead, lengths):
    query, key, value = (
        torch.zeros(*lead, lengths[0], 4), torch.zeros(*lead, lengths[1], 4),
        torch.zeros(*lead, lengths[1], 4),
    )  # fmt: skip
    record = captured(function, query, key, value, keep=keep)
    assert record.shape == (*lead, *lengths)
    assert record.trusted
    if keep == "statistics":
        assert record.statistics.row_sum.shape == (*lead, lengths[0])
    else:
        assert record.weights.shape == (*lead, *lengths)


def test_values_without_channels():
    query, key, _ = three(2, 3)
    record = captured(written, query, key, torch.zeros(2, 3, 7, 0))
    assert record.trusted


def test_large_and_small_scores():
    query, key, value = three(2, 3)
    for factor in (1e-6, 1e3):
        record = captured(fused, query * factor, key, value)
        assert_weights(record, plain_weights(query * factor, key))


def test_masked_values_that_are_nan_or_inf_leave_weights_alone():
    query, key, value = three(2, 3)
    value[..., 3, :] = 0
    mask = torch.ones(5, 7, dtype=torch.bool)
    mask[:, 3] = False
    key = key.clone()
    key[..., 3, :] = 1e4
    with capture_attention() as trace:
        F.scaled_dot_product_attention(query, key, value, attn_mask=mask)
    assert trace[0].trusted
    assert_weights(trace[0], plain_weights(query, key, allowed=mask))


@pytest.mark.parametrize("keep", ["inputs", "weights", "statistics"])
@pytest.mark.parametrize("function", [fused, written])
def test_the_default_device_and_dtype_of_the_user_do_not_matter(function, keep):
    query, key, value = three(2, 3, queries=20)
    shown = {"keep": keep, "heads": [2, 0], "queries": range(15)}
    try:
        torch.set_default_dtype(torch.float64)
        with torch.device("meta"):
            record = captured(function, query, key, value, **shown).select(
                heads=0, queries=slice(2, 4)
            )
            mask = captured(F.scaled_dot_product_attention, query, key, value, None, 0.0, True).mask
            of_statistics = keep == "statistics"
            found = record.statistics.maximum if of_statistics else record.weights.amax(-1)
    finally:
        torch.set_default_dtype(torch.float32)
    assert found.dtype == torch.float32
    expected = plain_weights(query, key)[:, :1, 2:4].amax(-1)
    torch.testing.assert_close(found.double(), expected, atol=1e-6, rtol=0)
    assert not mask.is_meta


# --- tensors that are none


def test_meta_tensors_are_named_and_the_model_runs():
    query, key, value = (t.to("meta") for t in three(2, 3))
    with (
        pytest.warns(CaptureWarning, match="was given unusual tensors"),
        capture_attention(allow_empty=True) as trace,
    ):
        assert fused(query, key, value).shape == (2, 3, 5, 5)
    assert len(trace) == 0
    with capture_attention(allow_empty=True, allow_unseen=True) as trace:
        assert written(query, key, value).shape == (2, 3, 5, 5)
    assert len(trace) == 0


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_nested_tensors_are_named_and_the_model_runs():
    def jagged():
        return torch.nested.nested_tensor(
            [torch.zeros(2, 3, 4), torch.zeros(5, 3, 4)], layout=torch.jagged
        ).transpose(1, 2)

    with (
        pytest.warns(CaptureWarning, match="was given nested tensors"),
        capture_attention(allow_empty=True),
    ):
        F.scaled_dot_product_attention(jagged(), jagged(), jagged())


@pytest.mark.parametrize("function", [fused, written])
def test_what_runs_in_vmap_is_named_and_the_model_runs(function):
    given = three(4, 2, 3)
    expected = torch.vmap(function)(*given)
    with (
        pytest.warns(CaptureWarning, match="inside of torch.func"),
        capture_attention(allow_empty=True) as trace,
    ):
        found = torch.vmap(function)(*given)
    assert len(trace) == 0
    torch.testing.assert_close(found, expected)


def test_sparse_attention_in_vmap_does_not_stop_the_model():
    def without_a_softmax(q, k, v):
        scores = q @ k.mT
        return scores.relu() / scores.relu().sum(-1, keepdim=True) @ v

    given = three(4, 2, 3)
    expected = torch.vmap(without_a_softmax)(*given)
    with capture_attention(allow_empty=True, allow_unseen=True):
        torch.testing.assert_close(torch.vmap(without_a_softmax)(*given), expected)


def test_gradients_by_torch_func_are_the_same():
    query, key, value = three(2, 3)

    def loss(query):
        return written(query, key, value).square().sum()

    expected = torch.func.grad(loss)(query)
    with capture_attention(allow_empty=True, allow_unseen=True):
        assert torch.equal(torch.func.grad(loss)(query), expected)


def test_a_functional_call_keeps_names():
    torch.manual_seed(3)
    model = nn.Sequential(nn.MultiheadAttention(8, 2, batch_first=True)).eval()[0]
    x = draw("x", 2, 5, 8)
    parameters = {name: p.detach() * 2 for name, p in model.named_parameters()}
    with torch.no_grad(), capture_attention(model) as trace:
        output = torch.func.functional_call(model, parameters, (x, x, x))[0]
    with torch.no_grad():
        expected = torch.func.functional_call(model, parameters, (x, x, x))[0]
    torch.testing.assert_close(output, expected)
    assert trace[0].layer == "MultiheadAttention"
