"""What attention has today, as records tell it: sinks, caps, scales, and what is not known."""

import pytest
import torch
from capture_oracles import draw
from torch import nn
from torch.nn import functional as F  # noqa: N812
from torch.nn.attention.flex_attention import flex_attention

from pytest_attnheat import (
    AttentionSpec,
    assert_masked,
    assert_row_stochastic,
    capture_attention,
    check_attention,
    diagnose,
)
from pytest_attnheat.attention.computation import reference
from pytest_attnheat.contract import captured, explaining

X = draw("x", 2, 9, 32)
CAUSAL = torch.ones(9, 9, dtype=torch.bool).tril()
flex = pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")


class Block(nn.Module):
    """Causal attention of four heads of width 8, as it is told."""

    def __init__(self, attend, **carried):
        super().__init__()
        torch.manual_seed(0)
        self.project, self.attend = nn.Linear(32, 96), attend
        with torch.no_grad():
            self.project.weight.mul_(3)
        for name, value in carried.items():
            setattr(self, name, value)

    def forward(self, x):
        q, k, v = self.project(x).unflatten(-1, (3, 4, 8)).permute(2, 0, 3, 1, 4)
        return self.attend(self, q, k, v).transpose(1, 2).flatten(2)


def softmax(scores):
    return scores.masked_fill(~CAUSAL, -torch.inf).softmax(-1)


def with_sinks(block, q, k, v):
    column = block.sinks.view(1, -1, 1, 1).expand(2, -1, 9, 1)
    scores = (q @ k.mT / 8**0.5).masked_fill(~CAUSAL, -torch.inf)
    return torch.cat([scores, column], -1).softmax(-1)[..., :-1] @ v


def without_sinks(block, q, k, v):
    return softmax(q @ k.mT / 8**0.5) @ v


def traced(block, **options):
    block = block.eval()
    with torch.no_grad(), capture_attention(block, **options) as trace:
        block(X)
    return trace


def inside(subject):
    report = check_attention(subject)
    return next(r for r in report.results if r.name == "attention_inside")


def sinks():
    return nn.Parameter(torch.tensor([0.5, 2.0, -1.0, 1.0]))


# --- sinks


@pytest.mark.parametrize("keep", ["inputs", "weights", "statistics"])
def test_rows_sum_to_one_with_the_weight_of_the_sink(keep):
    trace = traced(Block(with_sinks, sinks=sinks()), keep=keep)
    report = check_attention(trace)
    assert report.passed, str(report)
    assert {r.name: r.status for r in report.results}["rows"] == "passed"
    if keep != "statistics":
        assert_row_stochastic(trace)
        assert trace[0].weights.sum(-1).min() < 0.2
        trace.show()


def test_sinks_follow_the_heads_and_queries_that_are_selected():
    record = traced(Block(with_sinks, sinks=sinks()))[0].select(heads=[2, 0], queries=[8, 3])
    assert record.sinks.tolist() == [-1.0, 0.5]
    assert_row_stochastic(record)
    assert record.sink_weights.shape == (2, 2, 2)


@pytest.mark.parametrize("as_trace", [True, False])
def test_sinks_that_a_block_carries_and_leaves_out_are_found(as_trace):
    block = Block(without_sinks, sinks=sinks()).eval()
    result = inside(traced(block) if as_trace else AttentionSpec(block, inputs=X))
    assert result.status == "failed"
    assert "equals attention without the sinks that its module carries (sinks)" in result.message


def test_sinks_that_are_applied_to_the_output_are_not_missed():
    def apart(block, q, k, v):
        scores = (q @ k.mT / 8**0.5).masked_fill(~CAUSAL, -torch.inf)
        share = (scores.logsumexp(-1, keepdim=True) - block.sinks.view(-1, 1, 1)).sigmoid()
        return scores.softmax(-1) @ v * share

    assert inside(traced(Block(apart, sinks=sinks()))).status == "passed"


def test_what_joins_the_softmax_and_differs_between_queries_is_not_taken_for_sinks():
    def attend(block, q, k, v):
        column = torch.arange(9.0).view(1, 1, 9, 1).expand(2, 4, 9, 1)
        return torch.cat([q @ k.mT, column], -1).softmax(-1)[..., :-1] @ v

    (record,) = traced(Block(attend))
    assert record.sinks is record.scale is None
    assert record.strange == "were joined by what is not one number per head"
    assert_row_stochastic(record)


# --- as a call


@flex
def test_a_record_is_a_call_whose_weights_the_reference_computes():
    slopes = torch.tensor([0.5, 0.25, 0.1, 0.0])

    def score_mod(score, batch, head, query, key):
        return score - slopes[head] * (query - key).abs() + batch

    q, k, v = (draw(name, 2, 4, 9, 8) for name in "qkv")
    with capture_attention() as trace:
        flex_attention(q, k, v, score_mod=score_mod, scale=0.3)
        F.scaled_dot_product_attention(q, k, v, is_causal=True)
        torch.cat([torch.tanh(q @ k.mT / 4) * 2, torch.ones(2, 4, 9, 1)], -1).softmax(-1)[
            ..., :-1
        ] @ v
    for record in trace:
        for part in (record, record.select(heads=[3, 1], queries=[7, 2, 4])):
            for entry in (None, 1):
                call = part.as_call(batch=entry)
                exact = reference(call, wanted=["weights"]).exact["weights"]
                found = part.compute_weights(torch.float64, batch=entry)
                torch.testing.assert_close(found, exact, atol=1e-6, rtol=0)


def test_a_record_that_is_not_known_is_no_call():
    with capture_attention() as trace:
        torch.minimum(X @ X.mT, torch.ones(9, 9)).softmax(-1) @ X
    with pytest.raises(ValueError, match="are not known: its scores went through minimum"):
        trace[0].as_call()


# --- masks that are lost


def test_a_mask_is_told_by_what_hides_it_whatever_function_does():
    hidden = torch.where(CAUSAL, torch.inf, -torch.inf)
    (record,) = traced(
        Block(lambda block, q, k, v: torch.minimum(q @ k.mT, hidden).softmax(-1) @ v)
    )
    assert torch.equal(record.mask.expand(2, 4, 9, 9)[0, 0], CAUSAL)
    assert record.scale == 1


def test_a_mask_that_depends_on_the_product_is_not_called_none():
    def attend(block, q, k, v):
        scores = q @ k.mT
        return (scores + (scores - 1).sign().clamp(max=0) * 1e9).softmax(-1) @ v

    (record,) = traced(Block(attend))
    assert record.mask_lost
    with pytest.raises(
        ValueError, match="the mask is not known: its scores went through add, which"
    ):
        _ = record.mask
    with pytest.raises(ValueError, match="attention whose mask is not known: its scores went"):
        assert_masked(record)
    assert_row_stochastic(record)
    (masked,) = [r for r in check_attention(record).results if r.name == "masks"]
    assert masked.status == "skipped"


# --- the scale


def rotated(x):
    angle = torch.arange(9)[:, None] * torch.tensor([1.0, 0.3, 0.1, 0.03])
    cos, sin = torch.cat([angle.cos()] * 2, -1), torch.cat([angle.sin()] * 2, -1)
    return x * cos + torch.cat([-x[..., 4:], x[..., :4]], -1) * sin


def scaled_then_rotated(block, q, k, v):
    return softmax(rotated(q * 8**-0.5) @ rotated(k).mT) @ v


def normalised(block, q, k, v):
    return softmax(F.rms_norm(q, (8,)) @ F.rms_norm(k, (8,)).mT) @ v


def with_gains(block, q, k, v):
    gain = torch.linspace(0.5, 3, 8)
    return softmax(F.rms_norm(q, (8,), gain) @ F.rms_norm(k, (8,), gain.flip(0)).mT) @ v


def by(factor):
    return lambda block, q, k, v: softmax(q @ k.mT * factor) @ v


def test_a_scale_is_followed_through_a_rotation():
    (record,) = traced(Block(scaled_then_rotated))
    assert record.scale == pytest.approx(8**-0.5)
    torch.testing.assert_close(
        record.query * 8**-0.5 @ record.key.mT, record.query @ record.key.mT * 8**-0.5
    )
    assert inside(traced(Block(scaled_then_rotated))).message == ""
    assert inside(AttentionSpec(traced(Block(scaled_then_rotated)), scale=1.0)).status == "passed"


RIGHT = {
    "normalised, without a scale": (Block(normalised), "declare scale=1 if"),
    "normalised with gains": (Block(with_gains), "declare scale=1 if"),
    "another number": (Block(by(0.2)), "declare scale=0.2 if"),
    "none, beside a bias that is learned": (
        Block(lambda block, q, k, v: softmax(q @ k.mT + draw("bias", 4, 9, 9)) @ v), "scale=1 if"),
    "carried": (Block(by(0.2), scaling=0.2), ""),
    "carried as a divisor": (Block(by(1 / 2.8284271), scale=8**0.5), ""),
    "carried by its configuration": (
        Block(by(0.2), config=type("C", (), {"query_pre_attn_scalar": 25})()), ""),
    "a part of it carried": (
        Block(lambda block, q, k, v: softmax((q * 8**-0.25) @ (k * 8**-0.25).mT) @ v,
              scaling=8**-0.25), ""),
    "hidden by what is not understood": (
        Block(lambda block, q, k, v: softmax(torch.cumsum(q * 0.5, 2) @ k.mT) @ v), "scale=1 if"),
}  # fmt: skip


@pytest.mark.parametrize(("block", "hint"), RIGHT.values(), ids=RIGHT)
def test_a_scale_that_may_be_meant_is_no_defect(block, hint):
    result = inside(traced(block))
    assert result.status == "passed", result.message
    assert hint in result.message
    assert bool(hint) == bool(result.message)


WRONG = {
    "twice": (
        Block(lambda block, q, k, v: softmax((q * 8**-0.5) @ k.mT * 8**-0.5) @ v), "scale_squared"),
    "of the embedding, carried": (Block(by(32**-0.5), scale=32**-0.5), "scale_from_embedding"),
    "another than is carried": (Block(by(8**-0.5), scaling=0.2), "scale_dropped"),
}  # fmt: skip


@pytest.mark.parametrize(("block", "defect"), WRONG.values(), ids=WRONG)
def test_a_usual_mistake_in_the_scale_is_found(block, defect):
    assert defect in diagnose(traced(block)).defects
    assert inside(AttentionSpec(block.eval(), inputs=X)).status == "failed"


# --- what a module carries and does not have


def test_a_softcap_that_is_carried_and_not_felt_is_no_defect():
    block = Block(by(8**-0.5 * 1e-3), softcap=50.0, scaling=8**-0.5 * 1e-3)
    assert inside(traced(block)).status == "passed"


@pytest.mark.parametrize(
    ("window", "status"), [(3, "failed"), (7, "failed"), (8, "passed"), (9, "passed")]
)
def test_a_window_that_is_carried_has_to_hide_what_is_outside(window, status):
    assert inside(traced(Block(by(8**-0.5), sliding_window=window))).status == status


@pytest.mark.parametrize("seen", [
    CAUSAL.triu(-3), CAUSAL.triu(-4),  # either way to count
    CAUSAL.triu(-3) | (CAUSAL & (torch.arange(9) < 2)),  # and sink tokens
    torch.ones(9, 9, dtype=torch.bool),  # of what is not causal, a window is counted otherwise
], ids=["own included", "own besides", "with sink tokens", "not causal"])  # fmt: skip
def test_a_mask_that_may_be_the_window_is_no_defect(seen):
    def attend(block, q, k, v):
        return F.scaled_dot_product_attention(q, k, v, attn_mask=seen)

    assert inside(traced(Block(attend, sliding_window=4))).status == "passed"


def test_what_a_specification_declares_counts_more_than_what_a_module_carries():
    trace = traced(Block(without_sinks, sinks=sinks(), softcap=1.0, sliding_window=3))
    assert inside(trace).status == "failed"
    declared = {"softcap": 1e6, "sinks": torch.full((4,), -1e4), "window": (None, 0)}
    assert inside(AttentionSpec(trace, **declared)).status == "passed"


DECLARED = {
    "chunk": ({"chunk": 4}, lambda i, j: (j <= i) & (i // 4 == j // 4)),
    "prefix": ({"prefix": 3, "window": (None, 0)}, lambda i, j: (j <= i) | (j < 3)),
    "documents": ({"documents": torch.tensor([0, 0, 0, 1, 1, 1, 1, 2, 2])},
                  lambda i, j: (i >= 7) & (j >= 7) | (i < 3) & (j < 3)
                  | (i >= 3) & (i < 7) & (j >= 3) & (j < 7)),
    "documents of each entry": (
        {"documents": torch.tensor([[0] * 3 + [1] * 4 + [2] * 2] * 2)},
        lambda i, j: (i >= 7) & (j >= 7) | (i < 3) & (j < 3)
        | (i >= 3) & (i < 7) & (j >= 3) & (j < 7)),
    "may_see": ({"may_see": lambda b, h, i, j: (i - j) % 3 == 0}, lambda i, j: (i - j) % 3 == 0),
}  # fmt: skip


@pytest.mark.parametrize(("declared", "rule"), DECLARED.values(), ids=DECLARED)
def test_a_trace_is_held_to_the_rules_that_are_declared(declared, rule, monkeypatch):
    judge = explaining.explained  # and no search, which takes seconds
    monkeypatch.setattr(captured, "explained", lambda *a, **k: judge(*a, **{**k, "search": False}))
    i, j = torch.arange(9)[:, None], torch.arange(9)

    def attend(seen):
        return lambda block, q, k, v: F.scaled_dot_product_attention(q, k, v, attn_mask=seen)

    seen = rule(i, j).expand(9, 9)
    assert inside(AttentionSpec(traced(Block(attend(seen))), **declared)).status == "passed"
    more = seen | (i == 0)  # the first query sees everything
    assert inside(AttentionSpec(traced(Block(attend(more))), **declared)).status == "failed"
