"""What was captured, in a block or a trace, is examined and diagnosed."""

import pytest
import torch
from torch import nn
from torch.nn.functional import scaled_dot_product_attention

from pytest_attnheat import AttentionSpec, capture_attention, check_attention, diagnose
from pytest_attnheat.contract import captured as captured_module
from pytest_attnheat.contract.captured import diagnoses
from pytest_attnheat.contract.checks import CAPTURED_CHECKS


class Layer(nn.Module):
    """Causal self-attention written out, of width 32 with 4 heads, with one defect or none."""

    def __init__(self, defect: str = ""):
        super().__init__()
        self.project, self.out = nn.Linear(32, 96), nn.Linear(32, 32)
        self.defect = defect

    def forward(self, hidden):
        batch, length, _ = hidden.shape
        query, key, value = self.project(hidden).view(batch, length, 3, 4, 8).permute(2, 0, 3, 1, 4)
        if self.defect == "keys_as_values":
            value = key
        scores = query @ key.mT
        if self.defect != "no_scale":
            scores = scores / (32 if self.defect == "scale_from_embedding" else 8) ** 0.5
        sees = {"one_key_too_many": 1, "one_key_too_few": -1}.get(self.defect, 0)
        seen = torch.ones(length, length, dtype=torch.bool).tril(sees)
        if self.defect == "mask_after_softmax":
            weights = scores.softmax(-1) * seen
        else:
            weights = scores.masked_fill(~seen, -1e9).softmax(
                -2 if self.defect == "softmax_over_queries" else -1
            )
        mixed = weights @ value
        if self.defect == "next_token_added":
            mixed = mixed + mixed.roll(-1, 2)
        if self.defect != "merged_without_transpose":
            mixed = mixed.transpose(1, 2)
        return self.out(mixed.reshape(batch, length, 32))


@pytest.fixture
def hidden():
    return torch.randn(2, 9, 32, generator=torch.Generator().manual_seed(0))


def model(*defects):
    torch.manual_seed(1)
    return nn.Sequential(*map(Layer, defects)).eval()


NAMED = {
    "no_scale": "scale_missing",
    "scale_from_embedding": "scale_from_embedding",
    "one_key_too_many": "causal_sees_next",
    "mask_after_softmax": "mask_after_softmax",
    "softmax_over_queries": "softmax_over_queries",
}


class Windowed(nn.Module):
    """Causal attention to the last four tokens, or to all, twice."""

    def __init__(self, left=3):
        super().__init__()
        self.left = left

    def forward(self, hidden):
        steps = torch.arange(hidden.shape[1]) - torch.arange(hidden.shape[1]).unsqueeze(-1)
        for _ in range(2):
            seen = (steps <= 0) & (steps >= -self.left)
            hidden = scaled_dot_product_attention(hidden, hidden, hidden, attn_mask=seen)
        return hidden


def captured(module, *inputs, **options):
    with capture_attention(module, **options) as trace:
        module(*inputs)
    return trace


@pytest.mark.parametrize("defect", NAMED)
def test_a_defect_inside_a_block_is_found_and_named_with_its_layer(defect, hidden):
    report = check_attention(AttentionSpec(model("", defect), inputs=hidden))
    failed = {result.name: result.message for result in report.failed}
    assert report.diagnosis.defects == (NAMED[defect],)
    assert report.diagnosis.subject == "attention in 1"
    assert str(report.diagnosis) in str(report)
    says = "1 of 2 attentions that were captured are not what their queries, keys and values make"
    assert failed["attention_inside"].startswith(says)
    assert failed["attention_inside"].splitlines()[1:] == [
        f"  cause    {report.diagnosis.sentence}"
    ]
    assert str(report).count("|difference|") == 1  # the picture is that of the diagnosis


@pytest.mark.parametrize("defect", ["no_scale", "scale_from_embedding", "softmax_over_queries"])
def test_a_defect_in_a_record_of_a_trace_is_named(defect, hidden):
    trace = captured(model("", defect), hidden)
    assert diagnose(trace).defects == (NAMED[defect],)
    assert diagnose(trace[1]).defects == (NAMED[defect],)
    assert diagnose(trace[0]).healthy


def test_a_trace_that_is_declared_causal_is_held_to_it(hidden):
    trace = captured(model("one_key_too_many"), hidden)
    assert diagnose(trace).healthy
    diagnosis = diagnose(AttentionSpec(trace, window=(None, 0)))
    assert not diagnosis.healthy
    assert diagnosis.defects == ("causal_sees_next",)


@pytest.mark.parametrize("query_len", [1, 3])
@pytest.mark.parametrize("window", [(None, 0), (3, 0), (2, 1)])
def test_a_chunk_of_a_cached_decoder_is_held_to_the_declared_alignment(query_len, window):
    torch.manual_seed(0)
    query, key, value = (torch.randn(2, 4, length, 8) for length in (query_len, 7, 7))
    left = 7 if window[0] is None else window[0]

    def diagnosed(too_far):
        steps = torch.arange(7) - (torch.arange(query_len) + 7 - query_len).unsqueeze(-1)
        seen = (steps <= window[1] + too_far) & (steps >= -left)
        with capture_attention() as trace:
            scaled_dot_product_attention(query, key, value, attn_mask=seen)
        return diagnose(AttentionSpec(trace, window=window, causal="bottom_right"))

    assert diagnosed(0).healthy, diagnosed(0)
    if query_len > 1:  # the last query sees all there is
        wrong = "causal_sees_next" if window[0] is None else "window_right_too_wide"
        assert wrong in {*diagnosed(1).defects, *sum(diagnosed(1).alternatives, ())}


def test_a_chunk_that_is_aligned_to_the_other_corner_is_named():
    query, key = torch.randn(2, 4, 3, 8), torch.randn(2, 4, 7, 8)
    with capture_attention() as trace:
        scaled_dot_product_attention(query, key, key, is_causal=True)
    diagnosis = diagnose(AttentionSpec(trace, window=(None, 0), causal="bottom_right"))
    assert diagnosis.defects == ("causal_other_corner",)


def test_the_diagnosis_of_a_block_shows_expected_and_captured_weights(hidden):
    block = model("no_scale")
    diagnosis = diagnose(AttentionSpec(block, inputs=hidden))
    (record,) = captured(block, hidden)
    assert torch.equal(diagnosis.inferred_weights.float(), record.weights)
    assert "|difference|" in str(diagnosis)


def test_a_block_with_a_window_is_asked_what_depth_allows_and_held_to_it_inside(hidden):
    windowed = Windowed().eval()
    report = check_attention(AttentionSpec(windowed, inputs=hidden, window=(3, 0)))
    assert report.passed, str(report)
    report = check_attention(AttentionSpec(Windowed(6).eval(), inputs=hidden, window=(3, 0)))
    assert [result.name for result in report.failed] == ["attention_inside"]
    report = check_attention(AttentionSpec(model("one_key_too_many"), inputs=hidden, window=(3, 0)))
    assert "no_leakage" in [result.name for result in report.failed]
    report = check_attention(AttentionSpec(windowed, inputs=hidden))
    assert "a sliding window, chunks or packed documents? Say so with " in report.failed[0].message
    assert "(with window=, chunk= or documents= of an AttentionSpec)\n" in report.failed[0].message


def test_sound_blocks_and_traces_pass(hidden):
    block = model("", "")
    report = check_attention(AttentionSpec(block, inputs=hidden))
    assert report.passed
    assert [r.status for r in report.results if r.name == "attention_inside"] == ["passed"]
    report = check_attention(captured(block, hidden))
    assert report.passed
    assert [(r.name, r.status) for r in report.results] == [
        (check.name, "passed") for check in CAPTURED_CHECKS
    ]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_fused_attention_passes_with_masks_groups_and_fully_masked_rows(dtype):
    query, key = torch.randn(2, 4, 7, 8, dtype=dtype), torch.randn(2, 2, 9, 8, dtype=dtype)
    mask = torch.rand(2, 1, 7, 9) > 0.3
    mask[0, 0, 3] = False
    with capture_attention() as trace:
        scaled_dot_product_attention(query, key, key, attn_mask=mask, enable_gqa=True)
        scaled_dot_product_attention(query, key, key, is_causal=True, enable_gqa=True)
        scaled_dot_product_attention(query, query, query)
    report = check_attention(trace)
    assert report.passed, str(report)


def test_padded_encoders_pass(hidden):
    encoder = nn.TransformerEncoder(
        nn.TransformerEncoderLayer(32, 4, 64, batch_first=True), 2, enable_nested_tensor=False
    ).eval()
    padding = torch.arange(9) >= torch.tensor([[9], [6]])
    with capture_attention(encoder) as trace:
        encoder(hidden, src_key_padding_mask=padding)
    assert check_attention(trace).passed


def test_another_scale_is_a_defect_unless_it_is_declared(hidden):
    with capture_attention() as trace:
        scaled_dot_product_attention(*(hidden.unsqueeze(1),) * 3, scale=1.0)
    assert diagnose(trace).defects == ("scale_missing",)
    assert check_attention(AttentionSpec(trace, scale=1.0)).passed


def test_an_error_outside_of_attention_is_said_to_be_outside(hidden):
    report = check_attention(AttentionSpec(model("next_token_added"), inputs=hidden))
    assert [r.status for r in report.results if r.name == "attention_inside"] == ["passed"]
    assert "no_leakage" in [result.name for result in report.failed]
    outside = "what is wrong happens outside of it: see the cause"
    assert outside in str(report)


def test_a_wrong_softmax_is_not_called_a_wrong_declaration_and_a_missing_mask_is(hidden):
    wrong = check_attention(AttentionSpec(model("softmax_over_queries"), inputs=hidden))
    assert "but the code means" not in str(wrong)
    encoder = nn.TransformerEncoderLayer(32, 4, 64, batch_first=True).eval()
    assert "not declared: causal='top_left' is assumed, but the code means None" in str(
        check_attention(AttentionSpec(encoder, inputs=hidden))
    )


def test_what_cannot_be_judged_is_not_asked_and_says_why(hidden):
    query = hidden.unsqueeze(1)
    with capture_attention() as trace:
        (query @ query.mT).cumsum(-1).softmax(-1) @ query
    why = "its scores are not known as a product of queries and keys"
    results = {result.name: result for result in check_attention(trace).results}
    assert {results[name].status for name in ("attention_inside", "masks")} == {"skipped"}
    assert why in results["attention_inside"].message
    with pytest.raises(ValueError, match=f"no attention to judge .attention: {why}"):
        diagnose(trace)
    light = captured(model(""), hidden, keep="weights")
    (inside,) = [r for r in check_attention(light).results if r.name == "attention_inside"]
    assert inside.message == "attention in 0: its queries and keys are not known"


def statuses(trace):
    return {result.name: result.status for result in check_attention(trace).results}


def test_statistics_answer_for_their_rows_and_for_nothing_else(hidden):
    nothing_else = {
        "masks": "skipped",
        "output": "skipped",
        "dropout": "passed",
        "attention_inside": "skipped",
    }
    light = captured(model(""), hidden, keep="statistics")
    assert statuses(light).items() >= {"rows": "passed", **nothing_else}.items()
    wrong = captured(model("", "mask_after_softmax"), hidden, keep="statistics")
    report = check_attention(wrong)
    (rows,) = report.failed
    assert f"rows (float32, cpu)\n{rows.message}" in str(report)
    assert (rows.failure.broken, rows.failure.of, len(rows.failure.worst.index)) == (64, 72, 3)
    claim, layer, worst = rows.message.splitlines()
    assert claim == "64 of 72 rows do not sum to 1"
    assert layer.split() == ["layer", "1,", "call", "0"]
    assert worst.startswith("  worst    weights[")
    inputs = torch.randn(1, 1, 5, 8)
    fully_masked = torch.ones(5, 5, dtype=torch.bool)
    fully_masked[2] = False
    with capture_attention(keep="statistics") as trace:
        scaled_dot_product_attention(inputs, inputs, inputs, attn_mask=fully_masked)
    assert statuses(trace)["rows"] == "passed"


def test_weights_that_take_more_than_is_allowed_are_read_a_block_at_a_time():
    inputs = torch.randn(1, 2, 60, 4)
    with capture_attention(max_bytes=9000) as trace:
        scaled_dot_product_attention(inputs, inputs, inputs, is_causal=True)
    report = check_attention(trace)
    assert report.passed, str(report)
    skipped = [result for result in report.results if result.status == "skipped"]
    assert not {"rows", "masks"} & {result.name for result in skipped}
    assert "dropout" in {result.name for result in skipped}


@pytest.mark.parametrize("keep", ["inputs", "weights", "statistics"])
def test_rows_that_the_model_rounded_are_judged_by_its_dtype(keep, hidden):
    block = model("").bfloat16()
    assert statuses(captured(block, hidden.bfloat16(), keep=keep))["rows"] == "passed"


def test_a_step_whose_mask_hides_nothing_leaves_the_others_to_be_asked():
    inputs, hiding = torch.randn(1, 1, 5, 8), torch.ones(5, 5, dtype=torch.bool).tril()
    with capture_attention() as trace:
        scaled_dot_product_attention(inputs[:, :, :1], inputs, inputs, attn_mask=hiding[4:])
        scaled_dot_product_attention(inputs, inputs, inputs, attn_mask=hiding)
    assert statuses(trace)["masks"] == "passed"


def test_a_block_without_attention_is_not_asked_about_it(hidden):
    report = check_attention(AttentionSpec(nn.Linear(32, 32).eval(), inputs=hidden, causal=None))
    (inside,) = [r for r in report.results if r.name == "attention_inside"]
    assert inside.status == "skipped"
    assert "no attention was seen in Linear" in inside.message


def test_large_attention_is_judged_by_some_of_its_heads_and_entries():
    inputs = torch.randn(4, 12, 300, 8)
    with capture_attention() as trace:
        scaled_dot_product_attention(inputs, inputs, inputs, scale=1.0)
    assert diagnose(trace).defects == ("scale_missing",)


def test_a_captured_subject_cannot_be_called(hidden):
    spec = AttentionSpec(captured(model(""), hidden))
    assert spec.name == "the trace"
    with pytest.raises(TypeError, match="the trace was captured, and cannot be called"):
        spec(hidden, hidden, hidden)


def test_examining_a_block_leaves_it_as_it_was(hidden):
    block = model("", "").train()
    block[1].eval()
    check_attention(AttentionSpec(block, inputs=hidden))
    assert [part.training for part in block] == [True, False]
    assert not block._forward_hooks
    assert not block[0]._forward_pre_hooks


class Dropping(nn.Module):
    def forward(self, hidden):
        weights = (hidden @ hidden.mT / 32**0.5).softmax(-1)
        return torch.nn.functional.dropout(weights, 0.1) @ hidden


def test_dropout_in_evaluation_mode_is_found_in_a_trace(hidden):
    trace = captured(nn.Sequential(nn.Identity(), Dropping()).eval(), hidden)
    (dropout,) = [r for r in check_attention(trace).results if r.name == "dropout"]
    assert dropout.message.splitlines()[:2] == [
        "1 of 1 attentions drop weights in evaluation mode",
        "  layer    1, call 0, rate 0.1",
    ]
    report = check_attention(captured(Dropping().train(), hidden))
    assert [r.status for r in report.results if r.name == "dropout"] == ["skipped"]


def test_the_outside_is_blamed_only_if_everything_inside_was_judged(hidden):
    class Capped(nn.Module):
        def forward(self, hidden):
            return (hidden @ hidden.mT).cumsum(-1).softmax(-1) @ hidden

    spec = AttentionSpec(nn.Sequential(Layer(), Capped()).eval(), inputs=hidden)
    report = check_attention(spec)
    assert "no_leakage" in [result.name for result in report.failed]
    assert "outside" not in str(report)
    why = "its scores are not known as a product of queries and keys"
    assert diagnose(spec).refused["attention in 1"] == why


def test_a_causal_block_may_look_up_a_memory_that_is_as_long_as_its_input(hidden):
    class Decoder(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.layer = nn.TransformerDecoderLayer(32, 4, 64, batch_first=True)
            self.memory = nn.Parameter(torch.randn(1, 9, 32))

        def forward(self, hidden):
            mask = nn.Transformer.generate_square_subsequent_mask(hidden.shape[1])
            memory = self.memory.expand(len(hidden), -1, -1)
            return self.layer(hidden, memory, tgt_mask=mask, tgt_is_causal=True)

    report = check_attention(AttentionSpec(Decoder().eval(), inputs=hidden))
    assert [r.status for r in report.results if r.name == "attention_inside"] == ["passed"]


def test_a_mask_that_hides_each_token_from_itself_is_not_taken_as_told(hidden):
    class Strict(nn.Module):
        def forward(self, hidden):
            mask = torch.ones(9, 9, dtype=torch.bool).tril(-1)
            return scaled_dot_product_attention(hidden, hidden, hidden, attn_mask=mask)

    diagnosis = diagnose(AttentionSpec(Strict().eval(), inputs=hidden))
    assert diagnosis.defects == ("causal_misses_own",)


def test_numbers_that_are_not_finite_are_not_judged(hidden):
    trace = captured(nn.MultiheadAttention(32, 4, batch_first=True).eval(), hidden, hidden, hidden)
    assert diagnose(trace).healthy
    with pytest.warns(Warning, match="not to be trusted"):
        trace = captured(Layer().eval(), hidden * torch.nan)
    with pytest.raises(ValueError, match="its queries, keys or values are not finite"):
        diagnose(trace)


@pytest.mark.parametrize("factor", [8**-0.5, 0.25])
def test_queries_that_are_scaled_in_place_of_scores_are_no_defect(factor):
    inputs = torch.randn(2, 4, 7, 8)
    with capture_attention() as trace:
        ((inputs * factor) @ inputs.mT).softmax(-1) @ inputs
        scaled_dot_product_attention(inputs * factor, inputs, inputs, scale=1.0)
    report = check_attention(trace)
    assert report.passed
    # Another number than 8 ** -0.5 was seen, and nothing says that it is wrong.
    assert ("declare scale=0.25 if that is meant" in str(report)) == (factor == 0.25)


class Pooled(nn.Module):
    """Attention of heads that carries a scale: of queries scaled and pooled, or of mixed heads."""

    def __init__(self, mixed: bool):
        super().__init__()
        self.project, self.scale = nn.Linear(32, 96), 8**-0.5
        self.mix = nn.Conv2d(4, 4, 1, bias=False) if mixed else None

    def forward(self, hidden):
        query, key, value = self.project(hidden).unflatten(-1, (3, 4, 8)).permute(2, 0, 3, 1, 4)
        query = query * self.scale
        if self.mix is not None:
            return self.mix((query @ key.mT).softmax(-1)) @ value
        query = query[:, :, :8].unflatten(2, (-1, 2)).sum(3) / 2
        return (query @ key.mT).softmax(-1) @ value


@pytest.mark.parametrize("mixed", [True, False], ids=["mixed heads", "pooled queries"])
def test_what_becomes_of_scaled_queries_or_weights_is_not_accused(mixed, hidden):
    torch.manual_seed(1)
    block = Pooled(mixed).eval()
    with capture_attention(block) as trace:
        block(hidden)
    status = {one.name: one.status for one in check_attention(trace).results}
    assert status["attention_inside"] == ("skipped" if mixed else "passed")


def test_attention_in_multihead_attention_is_judged_as_a_block(hidden):
    attention = nn.MultiheadAttention(32, 4, batch_first=True).eval()
    report = check_attention(AttentionSpec(attention, inputs=hidden, causal=None))
    assert [r.status for r in report.results if r.name == "attention_inside"] == ["passed"]


def test_only_the_first_wrong_layer_is_searched_and_all_are_counted(hidden):
    reasons = []
    spec = AttentionSpec(model("no_scale", "", "softmax_over_queries"), inputs=hidden)
    found = list(diagnoses(spec, reasons))
    assert [diagnosis.healthy for diagnosis in found] == [False, True, False]
    assert [diagnosis.defects for diagnosis in found] == [("scale_missing",), (), ()]
    assert found[2].sentence == "attention in 2 is not attention as declared"
    (inside,) = [r for r in check_attention(spec).failed if r.name == "attention_inside"]
    assert inside.message.startswith("2 of 3 attentions that were captured are not")


class Late(nn.Module):
    """Self-attention in four heads, and what becomes of its weights after the softmax."""

    def __init__(self, change):
        super().__init__()
        self.project, self.change = nn.Linear(32, 96), change

    def forward(self, hidden):
        query, key, value = self.project(hidden).unflatten(-1, (3, 4, 8)).permute(2, 0, 3, 1, 4)
        return self.change((query @ key.mT / 8**0.5).softmax(-1)) @ value


SEEN = torch.arange(9) < 6


def thinned(weights):
    return weights * (torch.rand(weights.shape, generator=torch.Generator().manual_seed(0)) > 0.3)


@pytest.mark.parametrize(
    ("change", "defects", "shows"),
    [
        (lambda weights: weights * SEEN, ("mask_after_softmax",), ""),
        (lambda weights: weights * SEEN / (weights * SEEN).sum(-1, keepdim=True), (), ""),
        (lambda weights: weights * torch.where(SEEN, 1.0, 0.25), (), "each key, 0.25 to 1"),
        (thinned, (), "of its weights are 0 and all others right"),
    ],
    ids=["masked", "masked and divided", "weighed", "thinned"],
)
def test_what_becomes_of_weights_after_the_softmax_is_told(change, defects, shows, hidden):
    torch.manual_seed(1)
    found = diagnose(captured(Late(change), hidden))
    assert found.defects == defects
    assert shows in "; ".join(found.shows)
    assert found.healthy == (not defects and not shows)


def test_a_mask_that_is_added_as_a_number_is_no_lost_causality(hidden):
    class Added(Layer):
        def forward(self, hidden):
            query, key, value = self.project(hidden).unflatten(-1, (3, 4, 8)).permute(2, 0, 3, 1, 4)
            scores = query @ key.mT / 8**0.5 + torch.ones(9, 9).tril()
            return self.out((scores.softmax(-1) @ value).transpose(1, 2).flatten(2))

    found = check_attention(AttentionSpec(Added(), inputs=hidden)).diagnosis
    assert found.defects == ("mask_added_as_number",)


def test_a_bias_that_also_hides_keys_is_not_taken_for_a_mask_of_numbers(hidden, monkeypatch):
    hides = torch.ones(9, 9, dtype=torch.bool).triu(1)
    bias = torch.randn(9, 9, generator=torch.Generator().manual_seed(1))
    query = hidden.unsqueeze(1)
    with capture_attention() as trace:
        mask = bias.masked_fill(hides, -torch.inf)
        scaled_dot_product_attention(query, query, query, attn_mask=mask, scale=0.1)
    searches, explained = [], vars(captured_module)["explained"]

    def counted(*given, search=True, **more):
        searches.append(search)
        return explained(*given, search=search, **more)

    monkeypatch.setattr(captured_module, "explained", counted)
    assert diagnose(AttentionSpec(trace, scale=0.3)).defects == ("temperature",)
    assert searches == [False, True]
