"""What a trace says of itself: records that are wrong, code that ran differently, the output."""

from collections import namedtuple
from dataclasses import dataclass, replace

import pytest
import torch
from capture_oracles import draw, three
from pretend_device import reads
from torch import nn
from torch.nn import functional as F  # noqa: N812

from pytest_attnheat import capture_attention
from pytest_attnheat.capture import CaptureError, CaptureWarning, recording
from pytest_attnheat.capture import record as records
from pytest_attnheat.capture.sources import sdpa

X = draw("x", 2, 5, 8)
PADDED = torch.tensor([[False] * 5, [False] * 3 + [True] * 2])


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(3)
        self.inward, self.outward = nn.Linear(8, 24), nn.Linear(8, 8)

    def forward(self, x):
        q, k, v = self.inward(x).unflatten(-1, (3, 2, 4)).permute(2, 0, 3, 1, 4)
        return self.outward(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


# --- records that are wrong


def misread(**changes):
    """Let the reader of fused attention read something wrong."""
    read = sdpa._record

    def wrongly(*args):
        record = read(*args)
        return replace(record, **{n: change(record) for n, change in changes.items()})

    return wrongly


WRONG = {
    "scale": {"scale": lambda record: record.scale * 1.01},
    "causality": {"causal": lambda record: "top_left"},
    "heads in another order": {"query": lambda record: record.query.flip(1)},
    "keys in another order": {"key": lambda record: record.key.flip(2)},
    "another mask": {"given_mask": lambda record: (torch.arange(7) != 3).view(1, 1, 1, 7)},
    "a bias": {"bias": lambda record: torch.full((1, 1, 1, 7), 0.1).cumsum(-1)},
    "batch entries in another order": {"value": lambda record: record.value.flip(0)},
}


@pytest.mark.parametrize("keep", ["inputs", "weights", "statistics"])
@pytest.mark.parametrize("changes", WRONG.values(), ids=WRONG)
def test_a_wrong_reading_is_marked_and_warned_about(monkeypatch, changes, keep):
    monkeypatch.setattr(sdpa, "_record", misread(**changes))
    with pytest.warns(CaptureWarning) as caught, capture_attention(keep=keep) as trace:
        F.scaled_dot_product_attention(*three(2, 3))
    assert not trace[0].trusted
    assert trace.untrusted == (trace[0],)
    assert trace[0].residual > 10 * trace[0].tolerance
    (warning,) = caught
    assert str(warning.message) == (
        "capture_attention: the block: weights times value are not the output (residual "
        f"{trace[0].residual:.1e}, allowed 1.0e-05): the weights are not to be trusted"
    )
    assert warning.filename == __file__


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16], ids=str)
def test_a_wrong_reading_is_marked_in_every_dtype(monkeypatch, dtype):
    monkeypatch.setattr(sdpa, "_record", misread(scale=lambda record: record.scale * 1.5))
    with pytest.warns(CaptureWarning), capture_attention() as trace:
        F.scaled_dot_product_attention(*three(2, 3, dtype=dtype))
    assert not trace[0].trusted


def test_many_wrong_records_are_one_warning(monkeypatch):
    monkeypatch.setattr(sdpa, "_record", misread(scale=lambda record: 1.0))
    model = nn.Sequential(Attention(), Attention(), Attention())
    with (
        pytest.warns(
            CaptureWarning, match=r"^capture_attention: 0: .* more: trace\.untrusted"
        ) as caught,
        capture_attention(model),
    ):
        model(X)
    assert len(caught) == 1


def test_a_wrong_reading_of_one_head_shows(monkeypatch):
    def of_one_head(record):
        query = record.query.clone()
        query[0, 5] *= 2
        return query

    monkeypatch.setattr(sdpa, "_record", misread(query=of_one_head))
    with pytest.warns(CaptureWarning), capture_attention() as trace:
        F.scaled_dot_product_attention(*three(2, 12, queries=100, keys=100))
    assert not trace[0].trusted


def test_wrong_weights_show(monkeypatch):
    parts_of = records.parts_of

    def wrong(record):
        return ((*where, part.roll(1, -1)) for *where, part in parts_of(record))

    monkeypatch.setattr(recording, "parts_of", wrong)
    with pytest.warns(CaptureWarning), capture_attention() as trace:
        F.scaled_dot_product_attention(*three(2, 3))
    assert not trace[0].trusted


def test_values_that_cancel_do_not_make_a_record_wrong():
    query, key, _ = three(2, 3, keys=8)
    value = draw("v", 2, 3, 4, 5).repeat(1, 1, 2, 1) * 1e4
    value[..., 4:, :] *= -1
    with capture_attention() as trace:
        F.scaled_dot_product_attention(query * 0, key, value)
    assert trace[0].trusted


@pytest.mark.parametrize("keep", ["inputs", "weights", "statistics"])
def test_a_record_waits_once_for_the_device(monkeypatch, pretend, keep):
    monkeypatch.setattr("pytest_attnheat.capture.record._PART_BYTES", 1)
    query, key, value = (tensor.to(pretend) for tensor in three(1, 2, queries=9))
    with reads() as seen, capture_attention(keep=keep) as trace:
        F.scaled_dot_product_attention(query, key, value)
        (query @ key.mT / 2).softmax(-1) @ value
    assert len(trace) == 2
    waits = [name for name in seen.names if name == "aten::_local_scalar_dense"]
    assert len(waits) == 2  # statistics, and what explains scores, are copied to the host besides


def test_many_keys_do_not_make_a_record_wrong():
    for dtype in (torch.float64, torch.float32, torch.float16, torch.bfloat16):
        query, key, value = three(1, 2, queries=64, keys=3000, width=64, dtype=dtype)
        with capture_attention() as trace:
            F.scaled_dot_product_attention(query, key, value)
        assert trace[0].trusted
        assert trace[0].residual < trace[0].tolerance / 2


# --- the output, with and without


def test_without_verification_there_is_no_difference():
    model = Attention()
    with capture_attention(model) as trace:
        model(X)
    assert trace.difference is None


def test_the_output_is_the_same_where_the_same_code_runs():
    model = Attention()
    with capture_attention(model, verify=True) as trace:
        model(X)
    assert trace.difference == 0
    assert "output   differs by 0.0e+00 from that without capture" in str(trace)


def encoder():
    torch.manual_seed(3)
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True, dropout=0.3)
    return nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)


def test_the_fast_path_rounds_differently():
    model = encoder().eval()
    with torch.no_grad(), capture_attention(model, verify=True) as trace:
        model(X)
    assert 0 < trace.difference < 1e-5


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_the_fast_path_makes_padding_zero_and_that_shows():
    model = nn.TransformerEncoder(encoder().layers[0], 2).eval()
    with torch.no_grad(), capture_attention(model, verify=True) as trace:
        with_capture = model(X, src_key_padding_mask=PADDED)
    with torch.no_grad():
        without = model(X, src_key_padding_mask=PADDED)
    assert without[1, 3:].abs().max() == 0
    expected = (with_capture - without).abs().max() / without.abs().max()
    assert trace.difference == pytest.approx(float(expected), rel=1e-5)
    assert trace.difference > 0.1


def test_dropout_is_drawn_again():
    model = encoder().train()
    torch.manual_seed(5)
    with capture_attention(model, verify=True) as trace:
        first, second = model(X), model(X)
    assert not torch.equal(first, second)
    assert trace.difference == 0


def test_random_numbers_go_on_as_if_nothing_had_been_repeated():
    model = encoder().train()
    torch.manual_seed(5)
    model(X)
    expected = torch.rand(3)
    torch.manual_seed(5)
    with capture_attention(model, verify=True):
        model(X)
    assert torch.equal(torch.rand(3), expected)


def test_buffers_are_those_of_the_call_and_stay_as_they_were():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.attention, self.norm = Attention(), nn.BatchNorm1d(5)

        def forward(self, x):
            return self.norm(self.attention(x)) + self.norm.running_mean.sum()

    model = Model().train()
    with capture_attention(model, verify=True) as trace:
        model(X)
        model(X + 1)
        expected = {name: buffer.clone() for name, buffer in model.named_buffers()}
    assert trace.difference == 0
    for name, buffer in model.named_buffers():
        assert torch.equal(buffer, expected[name])


def test_arguments_that_the_model_changes_are_given_again_as_they_were():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.attention = Attention()

        def forward(self, x, *, cache):
            cache.append(self.attention(x))
            x += 1
            return torch.cat(cache)

    cache, model, x = [], Model(), X.clone()
    with torch.no_grad(), capture_attention(model, verify=True) as trace:
        model(x, cache=cache)
        model(x, cache=cache)
    assert trace.difference == 0
    assert len(cache) == 2
    assert torch.equal(x, X + 1 + 1)


@dataclass
class Output:
    hidden: torch.Tensor
    name: str


class Wrapped(nn.Module):
    def __init__(self, wrap):
        super().__init__()
        self.attention, self.wrap, self.off = Attention(), wrap, 0.0

    def forward(self, x):
        return self.wrap(self.attention(x) + self.off)


Pair = namedtuple("Pair", "first second")
OUTPUTS = {
    "tuple": lambda x: (x, 3, None),
    "list": lambda x: [x],
    "dictionary": lambda x: {"a": {"b": x}},
    "dataclass": lambda x: Output(x, "name"),
    "named tuple": lambda x: Pair(None, x),
    "in a dataclass in a list": lambda x: [Output(x, "name")],
}


@pytest.mark.parametrize("wrap", OUTPUTS.values(), ids=OUTPUTS)
def test_tensors_are_found_in_what_the_model_returns(wrap):
    model = Wrapped(wrap)
    with capture_attention(model, verify=True) as trace:
        model(X)
        model.off = 1.0
    assert trace.difference > 0.1


def test_an_output_of_transformers():
    transformers = pytest.importorskip("transformers")
    model = Wrapped(lambda x: transformers.modeling_outputs.BaseModelOutput(last_hidden_state=x))
    with capture_attention(model, verify=True) as trace:
        model(X)
        model.off = 1.0
    assert trace.difference > 0.1


def test_an_output_without_tensors_cannot_be_compared():
    model = Wrapped(lambda x: str(x))
    with (
        pytest.raises(CaptureError, match="no tensor is found in what the model returns"),
        capture_attention(model, verify=True),
    ):
        model(X)


def test_a_model_that_returns_something_else_without_capture_is_an_error():
    model = Wrapped(lambda x: x)

    def run():
        with capture_attention(model, verify=True):
            model(X)
            model.wrap = lambda x: (x, x)

    shape = r"\(2, 5, 8\)"
    message = rf"without the capture the model returns \[{shape}, {shape}\], with it \[{shape}\]"
    with pytest.raises(CaptureError, match=message):
        run()


def test_verification_needs_a_model_that_is_called():
    with (
        pytest.raises(ValueError, match="verify: got True without a model"),
        capture_attention(verify=True),
    ):
        raise AssertionError("ran")
    model = Attention()
    with (
        pytest.raises(CaptureError, match="verify=True, and the model was not called"),
        capture_attention(model, verify=True),
    ):
        F.scaled_dot_product_attention(*three(2, 3))


def test_a_call_that_raises_is_not_repeated():
    model, calls = Attention(), []
    model.register_forward_pre_hook(lambda module, args: calls.append(len(args)))
    with capture_attention(model, verify=True) as trace:
        with pytest.raises(RuntimeError):
            model(X[..., :3])
        model(X)
    assert trace.difference == 0
    assert len(calls) == 3


def test_autocast_and_gradients_of_the_call_are_those_of_the_repetition():
    model = nn.TransformerEncoder(encoder().layers[0], 1, enable_nested_tensor=False).eval()
    with capture_attention(model, verify=True) as trace:
        model(X)
    assert trace.difference == 0  # Gradients are wanted: neither takes the fast path.
    model = Attention()
    with capture_attention(model, verify=True) as trace:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            model(X)
        with torch.inference_mode():
            model(X)
    assert trace.difference == 0


def test_training_modes_of_the_call_are_those_of_the_repetition():
    model = encoder()
    with capture_attention(model, verify=True) as trace:
        model.train()(X)
        model.eval()
    assert trace.difference == 0
    assert not model.training


def test_parameters_that_changed_since_are_an_error():
    model = Attention()

    def step():
        with capture_attention(model, verify=True):
            model(X).sum().backward()
            torch.optim.SGD(model.parameters(), 0.1).step()

    with pytest.raises(CaptureError, match=r"parameters were changed since .* optimizer"):
        step()


def test_what_cannot_be_copied_is_an_error_that_says_so():
    class Stubborn:
        def __deepcopy__(self, memo):
            raise TypeError("no copies of me")

    model = Attention()
    with (
        pytest.raises(CaptureError, match=r"cannot copy what the model is called with \(no copies"),
        capture_attention(model, verify=True),
    ):
        model(X, Stubborn())


def test_inputs_that_are_within_a_graph_are_copied():
    model, x = Attention(), X.clone().requires_grad_()
    with capture_attention(model, verify=True) as trace:
        model(x * 2).sum().backward()
    assert trace.difference == 0


def test_nan_in_both_outputs_is_no_difference_and_in_one_is():
    model = Wrapped(lambda x: torch.where(x > 0, x, torch.nan))
    with capture_attention(model, verify=True) as trace:
        model(X)
    assert trace.difference == 0
    with capture_attention(model, verify=True) as trace:
        model(X)
        model.wrap = lambda x: x
    assert trace.difference == torch.inf


def test_the_repetition_is_not_recorded_by_the_capture_around_it():
    model = Attention()
    with capture_attention(model) as outer, capture_attention(model, verify=True) as inner:
        model(X)
    assert len(outer) == len(inner) == 1


def test_a_model_that_calls_itself_is_repeated_once():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.attention = Attention()

        def forward(self, x, depth=2):
            x = self.attention(x)
            return x if depth == 0 else self(x, depth - 1)

    model = Model()
    with capture_attention(model, verify=True) as trace:
        model(X)
    assert trace.difference == 0
    assert len(trace) == 3
