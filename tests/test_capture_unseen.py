"""What looks like attention and cannot be read is named: by operators, modules and threads."""

import threading

import pytest
import torch
from capture_oracles import draw
from torch import nn
from torch.nn import functional as F  # noqa: N812

from pytest_attnheat import capture_attention
from pytest_attnheat.capture import CaptureWarning
from pytest_attnheat.capture.trace import Unseen

pytestmark = pytest.mark.filterwarnings("ignore:.*torch.jit.*is deprecated")
X = draw("x", 2, 3, 5, 4)


class Fused(nn.Module):
    def forward(self, x):
        return F.scaled_dot_product_attention(x, x, x)


class LinearAttention(nn.Module):
    """No softmax and no weights."""

    def forward(self, x):
        return x @ (x.mT @ x)


class Around(nn.Module):
    def __init__(self, inner):
        super().__init__()
        self.seen, self.inner = Fused(), inner

    def forward(self, x):
        return self.inner(self.seen(x))


def captured(model, x=X, run=None):
    with pytest.warns(CaptureWarning) as caught, capture_attention(model) as trace:
        (run or model)(x)
    assert len(caught) == 1
    return trace, str(caught[0].message)


# --- scripted code


def test_a_scripted_module_within_the_model():
    model = Around(torch.jit.script(Fused()))
    trace, message = captured(model)
    assert trace.layers == ("seen",)
    assert trace.unseen == (
        Unseen(
            "inner", "a scripted module", "scaled_dot_product_attention happens in compiled code"
        ),
    )
    assert message == (
        "capture_attention: something looks like attention and was not read:\n"
        "  inner: a scripted module: scaled_dot_product_attention happens in compiled code\n"
        "  allow_unseen=True accepts that."
    )


def test_a_traced_module_within_the_model():
    model = Around(torch.jit.trace(Fused(), (X,)))
    trace, _ = captured(model)
    assert [unseen.layer for unseen in trace.unseen] == ["inner"]


def test_a_scripted_softmax_within_a_module_of_modules():
    class Written(nn.Module):
        def forward(self, x):
            return (x @ x.mT).softmax(-1) @ x

    model = Around(nn.Sequential(nn.Identity(), torch.jit.script(nn.Sequential(Written()))))
    trace, _ = captured(model)
    assert [str(unseen) for unseen in trace.unseen] == [
        "inner.1: a scripted module: softmax happens in compiled code"
    ]


def test_a_model_that_is_scripted_as_a_whole():
    model = torch.jit.script(Fused())
    with (
        pytest.warns(CaptureWarning, match="scaled_dot_product_attention happens in compiled code"),
        capture_attention(model, allow_empty=True) as trace,
    ):
        model(X)
    assert len(trace) == 0
    assert len(trace.unseen) == 1


def test_scripted_code_that_does_no_attention_is_not_named():
    model = Around(torch.jit.script(nn.Linear(4, 4)))
    with capture_attention(model) as trace:
        model(X)
    assert trace.unseen == ()


# --- operators of others


@torch.library.custom_op("attnheat_tests::flash_attention", mutates_args=())
def flash_attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    return F.scaled_dot_product_attention(q, k, v)


@torch.library.custom_op("attnheat_tests::rotate", mutates_args=())
def rotate(q: torch.Tensor) -> torch.Tensor:
    return q.flip(-1)


class Operator(nn.Module):
    def __init__(self, call):
        super().__init__()
        self.call = call

    def forward(self, x):
        return self.call(x)


CALLS = {
    "by its name": lambda x: torch.ops.attnheat_tests.flash_attention(x, x, x),
    "an overload": lambda x: torch.ops.attnheat_tests.flash_attention.default(x, x, x),
    "the function": lambda x: flash_attention(x, x, x),
    "of PyTorch": lambda x: torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(x, x, x)[0],
    "the math of PyTorch": lambda x: torch._scaled_dot_product_attention_math(x, x, x)[0],
}


@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
def test_a_fused_operator_is_named(call):
    model = Around(Operator(call))
    trace, message = captured(model)
    (unseen,) = trace.unseen
    assert unseen.layer == "inner"
    assert "attention" in unseen.what
    assert unseen.why == "a fused operator, which does not tell its mask, scale and causality"
    assert f"inner: {unseen.what}" in message


def test_operators_that_are_no_attention_are_not_named():
    model = Around(Operator(lambda x: rotate(x) + torch.ops.aten.relu(x)))
    with capture_attention(model) as trace:
        model(X)
    assert trace.unseen == ()


def test_the_operator_of_pytorch_that_tells_all_is_read():
    model = Operator(lambda x: torch.ops.aten.scaled_dot_product_attention.default(x, x, x))
    with capture_attention(model) as trace:
        model(X)
    assert len(trace) == 1


# --- modules that are called attention


def test_a_module_called_attention_without_a_record_is_named():
    trace, _ = captured(Around(LinearAttention()))
    assert trace.unseen == (
        Unseen("inner", "LinearAttention", "it ran, and no attention was seen in it"),
    )


def test_each_layer_is_named_once():
    model = Around(nn.Sequential(LinearAttention(), LinearAttention()))
    trace, _ = captured(model, run=lambda x: (model(x), model(x)))
    assert [unseen.layer for unseen in trace.unseen] == ["inner.0", "inner.1"]


def test_only_the_innermost_of_modules_called_attention_is_named():
    class AttentionBlock(nn.Module):
        def __init__(self):
            super().__init__()
            self.core = LinearAttention()

        def forward(self, x):
            return self.core(x)

    trace, _ = captured(Around(AttentionBlock()))
    assert [unseen.layer for unseen in trace.unseen] == ["inner.core"]


class AttentionOutput(nn.Module):
    def forward(self, x):
        return x * 2


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.output = AttentionOutput()

    def forward(self, x):
        return self.output(F.scaled_dot_product_attention(x, x, x))


class AttentionLayer(nn.Module):
    def __init__(self):
        super().__init__()
        self.attention = Attention()

    def forward(self, x):
        return self.attention(x)


def test_what_an_attention_is_made_of_may_be_called_so_too():
    model = nn.Sequential(AttentionLayer(), nn.Sequential(AttentionLayer()))
    with capture_attention(model) as trace:
        model(X)
    assert trace.unseen == ()
    assert trace.layers == ("0.attention", "1.0.attention")


def test_a_module_called_attention_that_did_not_run_is_not_named():
    model = nn.ModuleDict({"used": Fused(), "unused": LinearAttention()})
    with capture_attention(model) as trace:
        trace_of = trace
        model["used"](X)
    assert trace_of.unseen == ()


def test_layers_that_are_not_wanted_are_not_unseen():
    model = nn.Sequential(AttentionLayer(), AttentionLayer())
    with capture_attention(model, layers="1") as trace:
        model(X)
    assert trace.layers == ("1.attention",)
    assert trace.unseen == ()


# --- threads


def in_thread(function, *args):
    errors = []

    def run():
        try:
            function(*args)
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    if errors:
        raise errors[0]


def test_attention_in_another_thread_is_named():
    model = nn.Sequential(Attention())
    with (
        pytest.warns(CaptureWarning, match="0: Attention: it ran in another thread"),
        capture_attention(model, allow_empty=True) as trace,
    ):
        in_thread(model, X)
    assert len(trace) == 0
    assert trace.unseen == (Unseen("0", "Attention", "it ran in another thread"),)


def test_what_ran_here_too_is_recorded_here():
    model = nn.Sequential(Attention())

    def here_and_there(x):
        model(x)
        in_thread(model, x)

    trace, _ = captured(model, run=here_and_there)
    assert len(trace) == 1
    assert [unseen.layer for unseen in trace.unseen] == ["0"]


def test_the_outermost_of_modules_in_another_thread_is_named():
    model = nn.Sequential(AttentionLayer())
    with pytest.warns(CaptureWarning), capture_attention(model, allow_empty=True) as trace:
        in_thread(model, X)
    assert [unseen.layer for unseen in trace.unseen] == ["0"]


def test_what_another_thread_captures_itself_is_not_unseen_here():
    model, found = nn.Sequential(AttentionLayer()), []

    def capture(x):
        with capture_attention(model) as trace:
            model(x)
        found.append(trace)

    with capture_attention(model, allow_empty=True) as trace:
        in_thread(capture, X)
    assert trace.unseen == found[0].unseen == ()
    assert len(found[0]) == 1


# --- accepting it


def test_it_may_be_accepted():
    model = Around(LinearAttention())
    with capture_attention(model, allow_unseen=True) as trace:
        model(X)
    assert [unseen.layer for unseen in trace.unseen] == ["inner"]


def test_a_warning_points_at_the_with_statement():
    model = Around(LinearAttention())
    with pytest.warns(CaptureWarning) as caught, capture_attention(model):
        model(X)
    assert caught[0].filename == __file__


def test_weights_that_go_into_something_else_than_a_product_are_named():
    class Choosing(nn.Module):
        def forward(self, x):
            return x.gather(1, (x @ x.mT).softmax(-1).argmax(-1, keepdim=True).expand_as(x))

    model = nn.Sequential(nn.Identity(), Choosing())
    with capture_attention(model, allow_empty=True, allow_unseen=True) as trace:
        model(torch.randn(2, 3, 4))
    assert [str(unseen) for unseen in trace.unseen] == [
        "1: softmax of queries times keys: its result went into something that is not understood"
    ]


@pytest.mark.parametrize("last", [torch.sigmoid, lambda logits: logits.softmax(-1)])
def test_logits_of_pairs_are_not_taken_for_attention(last):
    images, texts = torch.randn(3, 4), torch.randn(5, 4)
    with capture_attention(allow_empty=True) as trace:
        last(images @ texts.mT)
    assert not trace.unseen


@pytest.mark.skipif(
    torch.__version__.startswith("2.6."), reason="torch 2.6 cannot export under a capture"
)
def test_an_export_is_left_alone_and_named():
    class Exported(nn.Module):
        def __init__(self):
            super().__init__()
            self.project, self.out = nn.Linear(8, 24), nn.Linear(8, 8)

        def forward(self, hidden):
            heads = self.project(hidden).unflatten(-1, (3, 2, 4)).permute(2, 0, 3, 1, 4)
            attended = nn.functional.scaled_dot_product_attention(*heads.unbind(0))
            return self.out(attended.transpose(1, 2).flatten(-2))

    model, hidden = Exported(), torch.randn(2, 5, 8)
    with capture_attention(model, allow_empty=True, allow_unseen=True) as trace:
        exported = torch.export.export(model, (hidden,))
    assert torch.equal(exported.module()(hidden), model(hidden))
    assert "torch.export" in trace.unseen[0].why
