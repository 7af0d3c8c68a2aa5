"""A capture leaves everything as it found it, also after errors; nested and concurrent ones."""

import threading

import pytest
import torch
from capture_oracles import draw, nothing_left_behind, plain_weights, three
from torch import nn
from torch.nn import functional as F  # noqa: N812
from torch.nn.attention import flex_attention as flex
from torch.overrides import TorchFunctionMode

from pytest_attnheat import capture_attention
from pytest_attnheat.capture import CaptureError, CaptureMemoryError

X = draw("x", 2, 3, 5, 4)


class Attention(nn.Module):
    def forward(self, x):
        return F.scaled_dot_product_attention(x, x, x)


class Written(nn.Module):
    def forward(self, x):
        return (x @ x.mT / 2).softmax(-1) @ x


class Model(nn.Module):
    def __init__(self, error=None):
        super().__init__()
        self.first, self.second, self.error = Attention(), Written(), error

    def forward(self, x):
        x = self.first(x)
        if self.error is not None:
            raise self.error
        return self.second(x)


OPTIONS = [{}, {"keep": "weights"}, {"keep": "statistics"}, {"verify": True}, {"heads": [0]}]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("training", [True, False])
def test_nothing_is_left_behind(options, training):
    model = Model().train(training)
    with nothing_left_behind(model), capture_attention(model, **options):
        model(X)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("error", [ValueError("mine"), KeyboardInterrupt(), SystemExit(3)])
def test_nothing_is_left_behind_by_an_error_in_the_model(options, error):
    model = Model(error)
    with nothing_left_behind(model):
        with pytest.raises(type(error)) as caught, capture_attention(model, **options):
            model(X)
        assert caught.value is error


@pytest.mark.parametrize("error", [ValueError("mine"), KeyboardInterrupt(), GeneratorExit()])
def test_nothing_is_left_behind_by_an_error_in_the_block(error):
    model = Model()

    def run():
        with capture_attention(model, verify=True):
            model(X)
            raise error

    with nothing_left_behind(model), pytest.raises(type(error)) as caught:
        run()
    assert caught.value is error


def test_nothing_is_left_behind_by_errors_of_the_capture():
    model = Model()
    with nothing_left_behind(model):
        with pytest.raises(CaptureMemoryError), capture_attention(model, max_bytes=0):
            model(X)
        with pytest.raises(ValueError, match="from 0 to 2"), capture_attention(model, heads=[3]):
            model(X)
        with pytest.raises(CaptureError), capture_attention(model):
            pass
        with pytest.raises(CaptureError), capture_attention(model, layers="nothing"):
            model(X)


def test_a_memory_error_passes_through_what_python_makes_of_errors_in_operators():
    """`a @ b` in which a handler raises TypeError becomes 'unsupported operand'."""
    with pytest.raises(CaptureMemoryError), capture_attention(max_bytes=0):
        X @ X.mT.softmax(-2) @ X
    with pytest.raises(CaptureMemoryError), capture_attention(max_bytes=0):
        torch.einsum("bhij,bhjd->bhid", (X @ X.mT).softmax(-1), X)


def test_hooks_that_cannot_be_set_leave_none_behind():
    class Stubborn(nn.Module):
        def register_forward_pre_hook(self, *args, **kwargs):
            raise RuntimeError("no hooks here")

    model = nn.Sequential(Attention(), Stubborn())
    with (
        nothing_left_behind(model),
        pytest.raises(RuntimeError, match="no hooks"),
        capture_attention(model),
    ):
        model(X)


def test_hooks_of_the_user_stay_and_are_called_as_often():
    model, calls = Model(), []
    model.first.register_forward_pre_hook(lambda module, args: calls.append("before"))
    model.first.register_forward_hook(lambda module, args, output: calls.append("after"))
    with nothing_left_behind(model), capture_attention(model):
        model(X)
    assert calls == ["before", "after"]


def test_hooks_that_change_what_a_module_gets_and_gives_still_do():
    model = Model()
    model.first.register_forward_pre_hook(lambda module, args: (args[0] * 2,))
    model.first.register_forward_hook(lambda module, args, output: output + 1)
    expected = model(X)
    with capture_attention(model) as trace:
        assert torch.equal(model(X), expected)
    torch.testing.assert_close(
        trace[0].weights.double(), plain_weights(X * 2, X * 2), atol=1e-6, rtol=0
    )


def test_an_error_that_the_block_handles_does_not_mix_up_layers():
    model = Model(ValueError("mine"))
    with capture_attention(model, allow_unseen=True) as trace:
        for _ in range(2):
            with pytest.raises(ValueError, match="mine"):
                model(X)
        F.scaled_dot_product_attention(X, X, X)
        model.error = None
        model(X)
    assert [record.layer for record in trace] == ["first", "first", "first", "second"]
    assert [u.why for u in trace.unseen] == ["it happened outside of the model that is captured"]


def test_other_modes_go_on():
    class Counting(TorchFunctionMode):
        count = 0

        def __torch_function__(self, func, types, args=(), kwargs=None):
            self.count += 1
            return func(*args, **(kwargs or {}))

    model = Model()
    with Counting() as outside:
        model(X)
    alone = outside.count
    with Counting() as outer, capture_attention(model):
        model(X)
    with capture_attention(model) as trace, Counting() as inner:
        model(X)
    assert outer.count >= alone
    assert inner.count == alone
    assert len(trace) == 2


# --- captures within captures


def test_captures_of_different_models_have_each_their_own():
    one, two = Model(), nn.Sequential(Attention())
    with nothing_left_behind(one, two), capture_attention(one, allow_unseen=True) as of_one:
        with capture_attention(two) as of_two:
            two(X)
        one(X)
    assert of_one.layers == ("first", "second")
    assert of_two.layers == ("0",)
    assert [u.why for u in of_one.unseen] == ["it happened outside of the model that is captured"]


def test_captures_of_the_same_model_have_each_all_within():
    model = Model()
    with nothing_left_behind(model), capture_attention(model, keep="weights") as outer:
        model(X)
        with capture_attention(model, heads=[1]) as inner:
            model(X)
        model(X)
    assert len(outer) == 6
    assert len(inner) == 2
    assert inner.unseen == ()
    assert inner[0].shape_here == (2, 1, 5, 5)
    assert torch.equal(outer[2].weights[:, [1]], inner[0].weights)
    assert [record.call for record in outer] == [0, 0, 1, 1, 2, 2]


def test_an_error_of_the_inner_capture_leaves_the_outer_one():
    model = Model()
    with capture_attention(model) as outer:
        with pytest.raises(CaptureMemoryError), capture_attention(model, max_bytes=0):
            model(X)
        model(X)
    assert [record.layer for record in outer] == ["first", "first", "second"]


def test_a_capture_within_the_forward_of_a_model():
    class Outer(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = Model()

        def forward(self, x):
            with capture_attention(self.inner) as self.trace:
                return self.inner(x)

    model = Outer()
    with nothing_left_behind(model.inner):
        model(X)
        assert model.trace.layers == ("first", "second")
        with capture_attention(model) as trace:
            model(X)
    assert trace.layers == ("inner.first", "inner.second")
    assert model.trace.layers == ("first", "second")


def test_one_trace_may_follow_another():
    model = Model()
    for _ in range(3):
        with capture_attention(model) as trace:
            model(X)
        assert len(trace) == 2


def test_a_capture_as_a_decorator():
    model = Model()

    @capture_attention(model)
    def run():
        return model(X)

    with nothing_left_behind(model):
        assert torch.equal(run(), run())


# --- threads


def together(*functions):
    """Run functions in threads that wait for one another at each of their steps."""
    errors = []

    def guarded(function):
        try:
            function()
        except BaseException as error:
            barrier.abort()
            errors.append(error)

    barrier = threading.Barrier(len(functions), timeout=20)
    threads = [
        threading.Thread(target=guarded, args=(lambda f=function: f(barrier),))
        for function in functions
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]


@pytest.mark.parametrize("same", [False, True])
def test_captures_in_two_threads(same):
    one = Model()
    two = one if same else Model()
    found = {}

    def capture(name, model, times):
        def run(barrier):
            barrier.wait()
            with capture_attention(model) as trace:
                barrier.wait()
                for _ in range(times):
                    model(X)
                barrier.wait()
            barrier.wait()
            found[name] = trace

        return run

    with nothing_left_behind(one, two):
        together(capture("one", one, 2), capture("two", two, 3))
    assert len(found["one"]) == 4
    assert len(found["two"]) == 6
    for trace in found.values():
        assert trace.unseen == ()
        assert trace.untrusted == ()
        assert set(trace.layers) == {"first", "second"}


def test_captures_in_two_threads_that_end_in_the_order_in_which_they_began():
    """Not one within the other: what is global must not be put back to the wrong state."""
    one, two = Model(), Model()

    def first(barrier):
        with capture_attention(one):
            one(X)
            barrier.wait()  # The other begins.
            barrier.wait()
        barrier.wait()  # This one has ended.
        barrier.wait()

    def second(barrier):
        barrier.wait()
        with capture_attention(two):
            barrier.wait()
            barrier.wait()
            two(X)
        barrier.wait()

    with nothing_left_behind(one, two):
        together(first, second)


def test_compiled_code_is_set_aside_until_the_last_of_two_threads_has_ended():
    torch._dynamo.reset()
    model = Layered()
    compiled = torch.compile(model, backend="eager")
    found = []

    def first(barrier):
        with capture_attention(model):
            model(X)
            barrier.wait()
            barrier.wait()
        barrier.wait()

    def second(barrier):
        barrier.wait()
        with capture_attention(compiled) as trace:
            barrier.wait()
            barrier.wait()
            compiled(X)
        found.append(trace)

    before = frames()
    with nothing_left_behind(model):
        together(first, second)
    assert len(found[0]) == 1
    assert frames() == before


# --- code that was compiled


def frames():
    from torch._dynamo.utils import counters

    return counters["frames"]["total"]


class Layered(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(3)
        self.inward, self.attention = nn.Linear(4, 4), Attention()

    def forward(self, x):
        return x + self.attention(self.inward(x))


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
@pytest.mark.parametrize("style", ["function", "in place", "a part", "a function within"])
def test_compiled_code_is_set_aside_and_comes_back(backend, style):
    torch._dynamo.reset()
    plain = Layered()
    model = plain
    if style == "function":
        model = torch.compile(plain, backend=backend)
    elif style == "in place":
        plain.compile(backend=backend)
    elif style == "a part":
        plain.attention = torch.compile(plain.attention, backend=backend)
    else:
        plain.attention.forward = torch.compile(plain.attention.forward, backend=backend)
    with torch.no_grad():
        expected = model(X)
        before = frames()
        with nothing_left_behind(plain), capture_attention(model, verify=True) as trace:
            found = model(X)
        assert len(trace) == 1
        assert trace[0].trusted
        torch.testing.assert_close(found, expected)
        after = frames()
        assert torch.equal(model(X), expected)
        assert torch.equal(model(X), expected)
        assert after == before
        # Nothing is compiled again: hooks and modes are gone.
        assert frames() == after
    names = {"function": "Layered", "in place": "Layered", "a part": "attention"}
    if style in names:
        assert trace.changes == (
            f"{names[style]}: compiled code was set aside, its Python code ran",
        )
    assert trace.layers[0].startswith("attention")


def test_a_model_may_be_compiled_after_it_was_captured():
    torch._dynamo.reset()
    model = Layered()
    with torch.no_grad():
        with capture_attention(model) as trace:
            expected = model(X)
        compiled = torch.compile(model, backend="eager", fullgraph=True)
        torch.testing.assert_close(compiled(X), expected)
    assert len(trace) == 1


def test_the_wrapper_and_the_module_are_captured_alike():
    torch._dynamo.reset()
    model = Layered()
    compiled = torch.compile(model, backend="eager")
    for subject in (model, compiled):
        with capture_attention(subject) as trace:
            compiled(X)
        assert trace.layers == ("attention",)


# --- the module of flex_attention


def test_the_advice_to_compile_flex_attention_is_given_as_before():
    given = set(flex._WARNINGS_SHOWN)
    flex._WARNINGS_SHOWN.discard("flex_attention_performance")
    try:
        with nothing_left_behind():
            with capture_attention():
                flex.flex_attention(*three(1, 1))
            with pytest.raises(RuntimeError, match="mine"), capture_attention():
                raise RuntimeError("mine")
        with pytest.warns(UserWarning, match="without torch.compile"):
            flex.flex_attention(*three(1, 1))
    finally:
        flex._WARNINGS_SHOWN.clear()
        flex._WARNINGS_SHOWN.update(given)


# --- models that reuse modules


def test_a_layer_that_is_shared_is_recorded_at_each_call():
    shared = Written()
    model = nn.Sequential(shared, nn.Identity(), shared, shared)
    with nothing_left_behind(model), capture_attention(model) as trace:
        model(X)
    assert [(record.layer, record.call) for record in trace] == [("0", 0), ("0", 1), ("0", 2)]


def test_a_module_that_calls_itself():
    class Recursive(nn.Module):
        def __init__(self):
            super().__init__()
            self.attention = Attention()

        def forward(self, x, depth=3):
            return x if depth == 0 else self(self.attention(x), depth - 1)

    model = nn.Sequential(Recursive())
    with nothing_left_behind(model), capture_attention(model) as trace:
        model(X)
        model(X)
    assert [record.layer for record in trace] == ["0.attention"] * 6


def test_random_numbers_are_the_same_with_and_without():
    class Dropping(nn.Module):
        def forward(self, x):
            return F.dropout((x @ x.mT).softmax(-1), 0.5) @ F.dropout(x, 0.5)

    model = Dropping()
    torch.manual_seed(5)
    expected = model(X), torch.rand(2)
    for options in OPTIONS:
        torch.manual_seed(5)
        with capture_attention(model, **options):
            found = model(X), torch.rand(2)
        assert torch.equal(found[0], expected[0])
        assert torch.equal(found[1], expected[1])
