"""`Trace`: indexing, selecting, the table, and the picture."""

from dataclasses import replace

import matplotlib.pyplot as plt
import pytest
import torch
from capture_oracles import draw, plain_weights
from torch import nn
from torch.nn import functional as F  # noqa: N812

from pytest_attnheat import SequenceModel, capture_attention, read_heatmaps
from pytest_attnheat.capture import CaptureError
from pytest_attnheat.capture.trace import Trace, Unseen, _titles


class Attention(nn.Module):
    def forward(self, x):
        return F.scaled_dot_product_attention(x, x, x)


class Model(nn.Module):
    def __init__(self, layers=3):
        super().__init__()
        self.layers = nn.ModuleList(
            nn.Sequential(nn.Identity(), Attention()) for _ in range(layers)
        )

    def forward(self, x):
        for layer in self.layers:
            x = x + layer(x)
        return x


X = draw("x", 2, 4, 5, 3)


@pytest.fixture
def trace():
    model = Model()
    with capture_attention(model) as found:
        model(X)
    return found


@pytest.fixture(autouse=True)
def no_figure_is_left():
    yield
    plt.close("all")


def test_it_is_a_sequence_of_records(trace):
    assert len(trace) == 3
    assert [record.layer for record in trace] == ["layers.0.1", "layers.1.1", "layers.2.1"]
    assert trace[0] is next(iter(trace))
    assert trace[-1] is trace[2]
    assert trace[-1] in trace
    assert isinstance(trace[1:], Trace)
    assert trace[1:].layers == ("layers.1.1", "layers.2.1")
    assert trace.layers == ("layers.0.1", "layers.1.1", "layers.2.1")
    assert repr(trace) == "<Trace: 3 records of 3 layers>"
    with pytest.raises(IndexError):
        trace[3]


def test_a_model_is_captured_within_its_sequence_model():
    module = torch.nn.MultiheadAttention(8, 2, batch_first=True).eval()
    with capture_attention(SequenceModel(module)) as found:
        module(*[torch.randn(1, 3, 8)] * 3)
    assert found.layers == ("MultiheadAttention",)
    refusal = "model: got function; accepted is a torch"
    with (
        pytest.raises(TypeError, match=refusal),
        capture_attention(SequenceModel(lambda inputs: inputs)),
    ):
        pass


def test_a_record_and_a_trace_are_shown_as_what_is_listed_of_them(trace):
    line = str(trace).splitlines()[1]
    assert repr(trace[0]).split() == ["<AttentionRecord", *f"{line}>".split()]
    shown = trace._repr_html_()
    assert shown.startswith("<table><tr><th>layer</th><th>source</th>")
    assert shown.count("<tr>") == 4
    assert f"<tr><td>layers.2.1</td><td>{trace[2].source}</td>" in shown


def test_a_layer_by_its_name(trace):
    assert trace["layers.1.1"] is trace[1]
    with pytest.raises(
        KeyError, match=r"layer: got 'layers\.9'; accepted is one of layers\.0\.1, "
    ):
        trace["layers.9"]


def test_a_layer_that_ran_twice_has_no_only_record():
    model = Model(1)
    with capture_attention(model) as trace:
        model(X)
        model(X)
    with pytest.raises(
        KeyError, match=r"got 'layers\.0\.1', which has 2 records; .* trace\.select\(layers="
    ):
        trace["layers.0.1"]
    assert trace.select(call=1)[0] is trace[1]
    assert [record.call for record in trace] == [0, 1]


def test_many_layers_are_not_all_listed():
    model = Model(11)
    with capture_attention(model) as trace:
        model(X)
    with pytest.raises(KeyError, match=r"layers\.7\.1 and 3 more"):
        trace["nothing"]


def test_selecting_layers_heads_queries_and_calls(trace):
    some = trace.select(layers="layers.[12]", heads=[3, 1], queries=-1)
    assert len(some) == 2
    assert some[0].shape_here == (2, 2, 1, 5)
    x = X + F.scaled_dot_product_attention(X, X, X)
    expected = plain_weights(x, x)[:, [3, 1]][:, :, [4]]
    torch.testing.assert_close(some[0].weights.double(), expected, atol=1e-6, rtol=0)
    assert len(trace) == 3


def test_selecting_nothing_says_what_there_is(trace):
    with pytest.raises(
        ValueError, match=r"got 'head' and None, of which there is no record; .*0\.1"
    ):
        trace.select(layers="head")
    with pytest.raises(ValueError, match=r"and 7, of which there is no record"):
        trace.select(call=7)


def test_a_selection_keeps_what_is_known_of_the_whole():
    unseen, changes = Unseen("a", "b", "c"), "d"
    trace = Trace([], [unseen], [changes], 0.5)
    assert trace[:0].unseen == (unseen,)
    assert trace[:0].changes == (changes,)
    assert trace[:0].difference == 0.5


def test_the_table():
    model = Model(2)
    with capture_attention(model) as trace:
        model(X)
    unseen = [
        Unseen("head", "a scripted module", "softmax happens in compiled code"),
        Unseen("", "flash", "a fused operator"),
    ]
    ends = [f"{record.residual:.1e}" for record in trace]
    text = str(Trace(trace, unseen, ["layers.0: the fast path was off"], 1.5e-7))
    assert text == (
        "layer       source                        shape         residual\n"
        f"layers.0.1  scaled_dot_product_attention  (2, 4, 5, 5)  {ends[0]}\n"
        f"layers.1.1  scaled_dot_product_attention  (2, 4, 5, 5)  {ends[1]}\n"
        "unseen   head: a scripted module: softmax happens in compiled code\n"
        "unseen   (no layer): flash: a fused operator\n"
        "changed  layers.0: the fast path was off\n"
        "output   differs by 1.5e-07 from that without capture"
    )


def test_the_table_says_what_was_not_compared_and_what_is_off():
    with capture_attention() as trace:
        F.scaled_dot_product_attention(X, X, X, dropout_p=0.1)
    assert "dropout of 0.1 was applied within" in str(trace)
    x = X.clone()
    x[0, 0, 0, 0] = torch.nan
    with pytest.warns(match="not to be trusted"), capture_attention() as trace:
        F.scaled_dot_product_attention(x, x, x)
    assert str(trace).endswith("inf  > 1e-05!")
    assert trace.untrusted == (trace[0],)


def test_an_empty_trace_has_a_table():
    assert str(Trace()) == "layer  source  shape  residual"
    assert repr(Trace()) == "<Trace: 0 records of 0 layers>"


# --- the picture


def drawn(figure):
    return torch.as_tensor(figure.picture.shown.cells.values).float()


def test_a_row_per_layer_and_a_column_per_head(trace):
    maps = drawn(trace.show())
    assert maps.shape == (3, 4, 5, 5)
    expected = torch.stack([record.weights[0] for record in trace])
    torch.testing.assert_close(maps, expected, atol=1e-6, rtol=0)


def test_another_batch_entry(trace):
    maps = drawn(trace.show(batch=1))
    torch.testing.assert_close(maps[0], trace[0].weights[1])


@pytest.mark.parametrize("batch", [2, -3])
def test_a_batch_entry_that_is_absent_is_refused(trace, batch):
    with pytest.raises(
        ValueError, match=rf"^batch: got {batch}; accepted is a whole number from -2"
    ):
        trace.show(batch=batch)


def labels(figure):
    return {text.get_text() for text in figure.findobj(plt.Text)}


def test_labels_are_what_the_layers_do_not_share(trace):
    found = labels(trace.select(heads=[2, 0]).show())
    assert {"Head 2", "Head 0", "layers.0", "layers.1", "layers.2", "Keys", "Queries"} <= found
    assert "Head 1" not in found


def test_a_small_picture_shows_a_whole_model_and_names_layers_by_number():
    with capture_attention() as trace:
        for _ in range(3):
            F.scaled_dot_product_attention(X, X, X)
    whole = Trace(replace(r, layer=f"model.layers.{n}.attn", call=0) for n, r in enumerate(trace))
    small, large = whole.show(figsize="small"), whole.show()
    assert {"Layer 0", "Layer 2", "Head 3"} <= labels(small)
    torch.testing.assert_close(drawn(small), drawn(large))
    small_side, large_side = (max(figure.get_size_inches()) for figure in (small, large))
    assert small_side < large_side / 1.5


@pytest.mark.parametrize(
    ("label", "numbers"), [("layers.1", [1]), ("Layer 1", [1]), (["Layer 2", "*layers.0*"], [0, 2])]
)
def test_what_a_picture_labels_a_layer_with_selects_it(label, numbers):
    with capture_attention() as trace:
        for _ in range(3):
            F.scaled_dot_product_attention(X, X, X)
    whole = Trace(replace(r, layer=f"model.layers.{n}.attn", call=0) for n, r in enumerate(trace))
    chosen = whole.select(layers=label)
    assert list(chosen) == [whole[number] for number in numbers]
    if isinstance(label, str):
        assert whole[label] is whole[1]
    with pytest.raises(ValueError, match="layers and call: got 'Layer 3'"):
        whole.select(layers="Layer 3")


def test_a_label_with_a_call_selects_this_call_and_a_name_goes_before_a_label():
    with capture_attention() as trace:
        for _ in range(3):
            F.scaled_dot_product_attention(X, X, X)
    one, two, other = trace
    calls = Trace([
        replace(one, layer="model.layers.0", call=0), replace(two, layer="model.layers.0", call=1),
        replace(other, layer="model.layers.1", call=0),
    ])  # fmt: skip
    assert list(calls.select(layers="layers.0, call 1")) == [calls[1]]
    assert list(calls.select(layers="layers.0")) == list(calls[:2])
    named = Trace([replace(one, layer="a.a.b.q", call=0), replace(two, layer="a.b.c.q", call=0)])
    assert "a.b" in labels(named.show())
    assert list(named.select(layers="a.b")) == [named[1]]


def test_a_query_alone_may_be_counted_from_the_end(trace):
    last, fifth = trace.show(query=-1), trace.show(query=4)
    torch.testing.assert_close(drawn(last), drawn(fifth))
    assert last.picture.shown.design.words.title == "Query 4"
    with pytest.raises(ValueError, match="query: got -6; accepted is a whole number from -5"):
        trace.show(query=-6)


def test_a_query_alone_shows_its_tokens_down_and_its_heads_across(trace):
    figure = trace.show(query=2, tokens=list("abcd"), batch=1)
    expected = torch.stack([record.weights[1, :, 2, :4].T for record in trace])
    torch.testing.assert_close(drawn(figure)[0], expected, atol=1e-6, rtol=0)
    words = figure.picture.shown.design.words
    assert words.title == "Query 2 c"
    assert words.titles == ["layers.0", "layers.1", "layers.2"]
    assert (words.query_labels, words.xlabel) == (list("abcd"), "Heads")
    own = trace.select(heads=[3, 1]).show(query=4, title="own").picture.shown.design.words
    assert (own.key_labels, own.title) == (["3", "1"], "own")
    with pytest.raises(ValueError, match="queries: got 5"):
        trace.show(query=5)
    with pytest.raises(TypeError, match="query: got 'c'; accepted is a whole number"):
        trace.show(query="c")


def test_keys_that_a_query_alone_may_not_see_are_striped():
    with capture_attention() as trace:
        F.scaled_dot_product_attention(X, X, X, is_causal=True)
    masked = trace.show(query=1).picture.shown.cells.masked
    assert masked[0, 0].tolist() == [[key > 1] * 4 for key in range(5)]


def test_tokens_are_labels_of_keys_and_queries(trace):
    found = labels(trace.select(layers="layers.0", heads=0).show(tokens=["a", "b", "c", "d", "e"]))
    assert {"a", "b", "c", "d", "e"} <= found


def test_with_fewer_tokens_only_these_are_drawn(trace):
    maps = drawn(trace.show(tokens=["a", "b", "c"]))
    assert maps.shape == (3, 4, 3, 3)
    expected = trace[0].weights[0, :, :3, :3]
    torch.testing.assert_close(maps[0], expected)


def test_tokens_of_a_step_of_decoding():
    query, key = draw("q", 1, 2, 1, 4), draw("k", 1, 2, 4, 4)
    with capture_attention() as trace:
        F.scaled_dot_product_attention(query, key, key)
    figure = trace.show(tokens=["a", "b", "c", "last"])
    assert drawn(figure).shape == (1, 2, 1, 4)
    assert "last" in labels(figure)


def test_tokens_of_selected_queries(trace):
    figure = trace.select(queries=[3, 1]).show(tokens=["a", "b", "c", "d", "e"])
    maps = drawn(figure)
    assert maps.shape == (3, 4, 2, 5)
    torch.testing.assert_close(maps[0], trace[0].weights[0][:, [3, 1]])


@pytest.mark.parametrize("tokens", [[], list("abcdef")])
def test_more_tokens_than_keys_are_refused(trace, tokens):
    with pytest.raises(ValueError, match=rf"got {len(tokens)} tokens; accepted is 1 to 5"):
        trace.show(tokens=tokens)


def test_tokens_that_leave_no_query_are_refused(trace):
    with pytest.raises(ValueError, match=r"got 2 tokens, which end before the queries \[4\]"):
        trace.select(queries=4).show(tokens=["a", "b"])


def test_options_are_those_of_show_heatmaps(trace):
    found = labels(trace.show(xlabel="What is looked at", titles=list("WXYZ")))
    assert {"What is looked at", "W", "Z"} <= found


def test_maps_of_several_shapes_are_refused():
    with capture_attention() as trace:
        F.scaled_dot_product_attention(X, X, X)
        F.scaled_dot_product_attention(X, X[:, :, :3], X[:, :, :3])
    with pytest.raises(
        ValueError, match=r"of shapes \[\(4, 5, 3\), \(4, 5, 5\)\]; accepted is one"
    ):
        trace.show()
    assert drawn(trace[:1].show()).shape == (1, 4, 5, 5)


def test_an_empty_trace_is_not_drawn():
    with pytest.raises(ValueError, match=r"trace\.show: there is no record"):
        Trace().show()


def test_statistics_are_not_drawn():
    with capture_attention(keep="statistics") as trace:
        F.scaled_dot_product_attention(X, X, X)
    with pytest.raises(ValueError, match='keep="statistics" keeps neither'):
        trace.show()


def test_kept_weights_are_drawn():
    with capture_attention(keep="weights") as trace:
        F.scaled_dot_product_attention(X, X, X)
    maps = drawn(trace.show())[0]
    torch.testing.assert_close(maps, trace[0].weights[0])


def test_only_the_batch_entry_that_is_drawn_counts_for_the_cap():
    x = draw("x", 64, 2, 16, 4)
    with capture_attention(max_bytes=4 * x.numel() * 4) as trace:
        F.scaled_dot_product_attention(x, x, x)
    assert drawn(trace.show(batch=3)).shape == (1, 2, 16, 16)


# --- errors


def test_an_empty_trace_is_an_error_that_asks_what_was_forgotten():
    with pytest.raises(CaptureError) as caught, capture_attention(nn.Linear(2, 2)):
        pass
    assert str(caught.value) == (
        "capture_attention: no attention was seen in Linear.\n"
        "  Was the model called inside the `with` block, as model(...)?\n"
        "  If there is none, allow_empty=True accepts that."
    )


def test_an_empty_trace_names_what_was_unseen():
    with pytest.raises(CaptureError) as caught, capture_attention():
        F.scaled_dot_product_attention(*[X.to("meta")] * 3)
    assert str(caught.value) == (
        "capture_attention: no attention was seen in the block.\n"
        "  unseen  (no layer): scaled_dot_product_attention: it was given unusual tensors\n"
        "  If there is none, allow_empty=True accepts that."
    )


def test_an_empty_trace_may_be_allowed():
    with capture_attention(allow_empty=True) as trace:
        pass
    assert len(trace) == 0


def test_a_picture_of_one_layer_has_its_whole_name_and_calls_are_numbered():
    model = nn.ModuleDict({"encoder": nn.MultiheadAttention(8, 2, batch_first=True)})
    inputs = torch.randn(1, 3, 8)
    with capture_attention(model) as trace:
        model["encoder"](inputs, inputs, inputs)
    assert _titles(list(trace)) == ["encoder"]
    with capture_attention(model) as trace:
        model["encoder"](inputs, inputs, inputs)
        model["encoder"](inputs, inputs, inputs)
    assert _titles(list(trace)) == ["encoder, call 0", "encoder, call 1"]


def test_what_a_query_may_not_attend_to_is_striped_in_the_picture(tmp_path):
    inputs = torch.randn(2, 2, 4, 8)
    with capture_attention() as trace:
        F.scaled_dot_product_attention(inputs, inputs, inputs, is_causal=True)
    trace.show().savefig(tmp_path / "whole.png")
    causal = torch.ones(4, 4, dtype=torch.bool).tril().expand(1, 2, 4, 4).numpy()
    assert (read_heatmaps(tmp_path / "whole.png").masked == ~causal).all()
    trace.show(tokens=["a", "b", "c"]).savefig(tmp_path / "part.png")
    assert (read_heatmaps(tmp_path / "part.png").masked == ~causal[..., :3, :3]).all()
    trace.show(mask=None).savefig(tmp_path / "plain.png")
    assert not read_heatmaps(tmp_path / "plain.png").masked.any()


def test_a_record_knows_whether_its_module_was_training():
    layer = nn.MultiheadAttention(8, 2, dropout=0.5, batch_first=True)
    inputs = torch.randn(1, 3, 8)
    for mode in (True, False):
        with capture_attention(layer.train(mode)) as trace:
            layer(inputs, inputs, inputs)
        assert trace[0].training is mode
