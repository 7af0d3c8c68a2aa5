"""Kinds of attention and of what is none, each by the smallest program that shows it."""

import pytest
import torch
from capture_oracles import assert_weights, draw, plain_softmax, plain_weights, three
from torch import nn
from torch.nn import functional as F  # noqa: N812
from torch.utils.flop_counter import FlopCounterMode

from pytest_attnheat import assert_causal, assert_row_stochastic, capture_attention
from pytest_attnheat.capture.watching import plain_name

X = draw("x", 2, 6, 8)
CAUSAL = torch.ones(6, 6, dtype=torch.bool).tril()
LINEAR = nn.Linear(8, 8)
TO_POSITIONS, TO_ONE = nn.Linear(8, 6), nn.Linear(8, 1)


def traced(function, *args, **options):
    with capture_attention(allow_empty=True, allow_unseen=True, **options) as trace:
        function(*args)
    return trace


def only(function, *args):
    trace = traced(function, *args)
    (record,) = trace
    assert record.trusted
    assert trace.unseen == ()
    return record


# --- one head


def one_head(x):
    return x.view(2, 6, 1, 8).transpose(1, 2)


@pytest.mark.parametrize("attend", [
    lambda q: F.scaled_dot_product_attention(q, q, q, is_causal=True),
    lambda q: (q @ q.mT / 8**0.5).masked_fill(~CAUSAL, -torch.inf).softmax(-1) @ q,
], ids=["fused", "written"])  # fmt: skip
def test_one_head_that_was_transposed_into_place_is_one_head(attend):
    record = only(lambda: attend(one_head(X)))
    assert record.shape == (2, 1, 6, 6)
    assert_weights(record, plain_weights(X[:, None], X[:, None], allowed=CAUSAL))
    assert torch.equal(record.mask.expand(2, 1, 6, 6)[1, 0], CAUSAL)


def test_batch_and_heads_may_be_joined_while_queries_keys_and_values_are_one_tensor():
    together = draw("qkv", 2, 6, 3, 4, 8)

    def attend():
        query, key, value = together.permute(2, 0, 3, 1, 4).reshape(3, 8, 6, 8).unbind(0)
        return (query * 0.5 @ key.mT).softmax(-1) @ value

    record = only(attend)
    assert record.shape == (2, 4, 6, 6)
    query, key, _ = together.permute(2, 0, 3, 1, 4)
    assert_weights(record, plain_weights(query, key, scale=0.5))


LONG_FIRST, PICTURE = draw("long", 6, 2, 32), draw("picture", 2, 32, 3, 2)
HEADS_IN_BATCH = {
    "a chunk of one, as before": (
        lambda: LONG_FIRST.view(2, 4, 6, 8).reshape(8, 6, 8).chunk(1)[0],
        lambda: LONG_FIRST.view(2, 4, 6, 8),
    ),
    "a head's width is split off, time first": (
        lambda: LONG_FIRST.view(6, 8, 8).transpose(0, 1),
        lambda: LONG_FIRST.view(6, 2, 4, 8).permute(1, 2, 0, 3),
    ),
    "channels first": (lambda: PICTURE.reshape(8, 8, 6).mT, lambda: PICTURE.view(2, 4, 8, 6).mT),
    "a picture for each head": (
        lambda: PICTURE.view(2, 4, 8, 3, 2).permute(0, 1, 3, 4, 2).reshape(8, 6, 8),
        lambda: PICTURE.view(2, 4, 8, 6).mT,
    ),
}


@pytest.mark.parametrize(("joined", "apart"), HEADS_IN_BATCH.values(), ids=HEADS_IN_BATCH)
def test_heads_that_join_the_batch_in_other_ways_are_heads(joined, apart):
    record = only(lambda: (lambda q: (q * 0.5 @ q.mT).softmax(-1) @ q)(joined()))
    assert_weights(record, plain_weights(apart(), apart(), scale=0.5))
    assert record.doubt == ""


@pytest.mark.parametrize("attend", [
    lambda q: (q * 0.5 @ q.mT).softmax(-1) @ q,
    lambda q: F.scaled_dot_product_attention(q, q, q),
], ids=["written", "fused"])  # fmt: skip
def test_windows_are_not_called_heads_without_a_doubt(attend):
    record = only(lambda: attend(X.view(2, 3, 2, 8)))
    assert record.shape == (2, 3, 2, 2)
    assert (
        record.doubt == "whether its axis of heads is one of windows or of the batch is not known"
    )


def test_blocks_of_pictures_of_each_head_are_not_called_heads_without_a_doubt():
    def attend():
        blocks = PICTURE.reshape(8, 8, 3, 2).permute(0, 2, 3, 1)
        return (blocks @ blocks.mT).softmax(-1) @ blocks

    record = only(attend)
    assert record.shape == (8, 3, 2, 2)
    assert (
        record.doubt == "whether its axis of heads is one of windows or of the batch is not known"
    )


def test_channels_in_two_axes_are_not_called_heads_without_a_doubt():
    points = draw("points", 2, 6, 2, 3)
    record = only(lambda: torch.einsum("bij,bjdc->bidc", scores_of(X).softmax(-1), points))
    assert record.doubt == "its weights repeat along an axis that may be no head"


def test_values_of_each_query_leave_a_doubt_about_the_axes():
    heads, pairs = draw("heads", 2, 4, 6, 8), draw("pairs", 2, 6, 6, 3)
    record = only(lambda: torch.einsum("bhij,bijd->bhid", (heads @ heads.mT).softmax(-1), pairs))
    assert record.doubt == "which of its axes are queries is not known"


def test_weights_in_a_product_that_cannot_be_read_are_named():
    trace = traced(lambda: torch.einsum("bnd,bnd->bd", LINEAR(X).softmax(1), X))
    assert [str(unseen) for unseen in trace.unseen] == [
        "(no layer): softmax: its result went into einsum, which cannot be read"
    ]


def test_which_of_many_leading_axes_are_heads_is_said_to_be_a_guess():
    windows = draw("w", 2, 3, 4, 6, 8)
    record = only(lambda: F.scaled_dot_product_attention(windows, windows, windows))
    assert record.doubt == "which of its leading axes (2, 3, 4) are heads is not known"
    assert only(lambda: F.scaled_dot_product_attention(X, X, X)).doubt == ""


# --- what was added, and moved afterwards


def test_a_bias_before_scores_are_turned_is_not_in_the_way():
    query, key, value = three(2, queries=3, keys=4)
    bias = draw("bias", 2, 3, 4)

    def attend():
        scores = (query @ key.mT + bias).mT + torch.zeros(2, 4, 3)
        return scores.softmax(1).mT @ value

    record = only(attend)
    assert_weights(record, plain_weights(query, key, scale=1.0, bias=bias).unsqueeze(1))
    assert torch.equal(record.bias[:, 0], bias)
    assert torch.equal(record.query[:, 0], query)


def test_products_that_are_no_attention_may_be_moved_as_a_model_likes():
    a, b = draw("a", 2, 3, 5), draw("b", 2, 5, 4)

    def run():
        scores = a @ b + draw("c", 2, 3, 4)
        turned = scores.mT + draw("d", 2, 4, 3)
        return turned.reshape(2, 12) + draw("e", 2, 12)

    expected = run()
    with capture_attention(allow_empty=True) as trace:
        assert torch.equal(run(), expected)
    assert trace.unseen == ()


def test_a_bias_that_batch_and_heads_were_one_axis_for_keeps_the_mask():
    """As Bloom has it: ALiBi within `baddbmm`, and a mask in four axes."""
    query, key, value = three(2, 3, queries=6, keys=6)
    alibi = draw("alibi", 6, 1, 6)

    def attend():
        scores = alibi.baddbmm(query.flatten(0, 1), key.flatten(0, 1).mT, beta=1.0, alpha=0.5)
        hidden = torch.zeros(2, 1, 6, 6).masked_fill(~CAUSAL, torch.finfo(torch.float32).min)
        weights = F.softmax(scores.view(2, 3, 6, 6) + hidden, -1)
        return torch.bmm(weights.view(6, 6, 6), value.flatten(0, 1))

    record = only(attend)
    assert torch.equal(record.mask.expand(2, 3, 6, 6), CAUSAL.expand(2, 3, 6, 6))
    visible = alibi.view(2, 3, 1, 6).masked_fill(~CAUSAL, 0.0)
    assert torch.equal(record.bias.expand(2, 3, 6, 6), visible)
    assert record.scale == 0.5


def test_sinks_that_are_joined_and_shifted_with_the_scores_are_sinks():
    """As GPT-OSS has it: the maximum of both is subtracted, and the sink is left out."""
    query, key, value = three(2, 3, queries=6, keys=6)
    sinks = nn.Parameter(torch.tensor([0.5, 2.0, -1.0]))

    def attend():
        scores = (query @ key.mT / 2).masked_fill(~CAUSAL, -torch.inf)
        both = torch.cat([scores, sinks.view(1, 3, 1, 1).expand(2, -1, 6, 1)], -1)
        both = both - both.max(-1, keepdim=True).values
        return both.softmax(-1)[..., :-1] @ value

    record = only(attend)
    assert torch.equal(record.mask.expand(2, 3, 6, 6)[0, 0], CAUSAL)
    assert torch.equal(record.sinks, sinks)
    assert_row_stochastic(record)
    torch.testing.assert_close(1 - record.weights.sum(-1), record.sink_weights)


# --- what runs in another dtype


def test_a_product_in_half_precision_is_judged_as_one():
    query, key, value = three(2, 3, queries=6, keys=6)

    def attend():
        weights = (query @ key.mT / 2).float().softmax(-1)
        return weights @ value

    with torch.autocast("cpu", torch.bfloat16):
        record = only(attend)
    assert record.dtype == torch.bfloat16
    assert record.scale == 0.5


# --- a value that is weighed in other ways


def scores_of(x):
    return x @ x.mT


WEIGHED = {
    "a sum": lambda w, h: (w * h).sum(1),
    "a sum, values first": lambda w, h: torch.sum(h * w, dim=1, keepdim=True),
    "einsum": lambda w, h: torch.einsum("bn,bnd->bd", w.squeeze(-1), h),
    "einsum, values first": lambda w, h: torch.einsum("bnd,bn->bd", h, w.squeeze(-1)),
    "bmm": lambda w, h: torch.bmm(w.mT, h),
    "turned": lambda w, h: h.mT @ w,
    "a sum, of more axes": lambda w, h: (w[:, None].mT * h[:, None].mT).sum(-1, keepdim=True),
}


@pytest.mark.parametrize("weigh", WEIGHED.values(), ids=WEIGHED)
def test_attention_pooling_in_every_spelling(weigh):
    record = only(lambda: weigh(TO_ONE(X).softmax(1), X))
    assert record.shape == (2, 1, 1, 6)
    assert_weights(record, plain_softmax(TO_ONE(X)[..., 0])[:, None, None])
    assert record.mask is None
    assert record.kind == "pooling"


def test_a_sum_of_weights_for_each_query():
    record = only(lambda: (scores_of(X).softmax(-1).unsqueeze(-1) * X.unsqueeze(1)).sum(2))
    assert_weights(record, plain_softmax(scores_of(X))[:, None])
    assert record.scale == 1


def test_scores_by_multiplying_and_adding_up_are_those_of_queries_and_keys():
    record = only(lambda: (X.unsqueeze(2) * X.unsqueeze(1)).sum(-1).div(3).softmax(-1) @ X)
    assert record.kind == "attention"
    assert record.scale == pytest.approx(1 / 3)
    assert torch.equal(record.query[:, 0], X)


def test_a_product_by_tensordot():
    record = only(lambda: torch.tensordot(scores_of(X[0]).softmax(-1), X[0], dims=1))
    assert record.shape == (1, 1, 6, 6)


def test_a_sum_that_divides_after_the_value():
    def attend(x):
        shares = (scores_of(x) / 3).exp()
        return shares @ x / shares.sum(-1, keepdim=True)

    record = only(lambda: attend(X))
    assert record.source == "exp, divided by its sum afterwards"
    assert record.scale == pytest.approx(1 / 3)
    assert_weights(record, plain_softmax(scores_of(X) / 3)[:, None])


def test_what_divides_by_something_else_is_not_called_attention():
    assert len(traced(lambda: scores_of(X).exp() @ X / 7.0)) == 0


def test_weights_that_a_layer_makes_over_positions_are_read():
    """The sequence-to-sequence tutorial: as many weights as positions, out of a linear layer."""
    record = only(lambda: torch.bmm(TO_POSITIONS(X[:, :1]).softmax(-1), X))
    assert_weights(record, plain_softmax(TO_POSITIONS(X[:, :1]))[:, None])
    assert record.query is None


def test_heads_that_talk_before_and_after_the_softmax():
    query, key, value = three(2, 3)
    mixing = nn.Parameter(draw("mixing", 3, 3))

    def mixed(weights):
        return torch.einsum("hg,bgij->bhij", mixing, weights)

    record = only(lambda: mixed(mixed(query @ key.mT).softmax(-1)) @ value)
    expected = mixed(plain_softmax(mixed(query @ key.mT)).float())
    assert_weights(record, expected.detach(), atol=1e-5, rtol=0)


# --- linear attention, and parts of one softmax


def test_linear_attention_is_named_as_what_it_is():
    query, key, value = three(2, 3)

    def attend():
        return query.softmax(-1) @ (key.softmax(-2).mT @ value)

    record = only(attend)
    assert record.kind == "linear"
    assert record.shape == (2, 3, 5, 7)
    assert_weights(record, query.softmax(-1) @ key.softmax(-2).mT)
    assert_row_stochastic(record.weights)
    assert record.call == 0


def test_parts_of_one_softmax_are_put_together():
    query, key, value = three(2, 3)

    def attend():
        weights = (query @ key.mT).softmax(-1)
        output = weights[..., 3:] @ value[:, :, 3:]
        output += weights[..., :3] @ value[:, :, :3]
        return output

    record = only(attend)
    assert record.shape == (2, 3, 5, 7)
    torch.testing.assert_close(record.output, attend())
    assert_weights(record, plain_weights(query, key, scale=1.0))
    assert_row_stochastic(record.weights)


def blocks(query, key, value):
    """As in BigBird: the first block of queries sees all keys, the others their own."""
    first = (query[:, :, :2] @ key.mT).softmax(-1) @ value
    own, own_key, own_value = (t[:, :, 2:].unflatten(2, (2, 2)) for t in (query, key, value))
    others = (own @ own_key.mT).softmax(-1) @ own_value
    return torch.cat([first.unsqueeze(2), others], 2).flatten(2, 3)


def chunks(query, key, value):
    return torch.cat([(part @ key.mT).softmax(-1) @ value for part in query.split(3, 2)], 2)


@pytest.mark.parametrize("attend", [blocks, chunks])
def test_blocks_of_queries_that_are_put_together_are_marked_as_parts(attend):
    trace = traced(attend, *three(2, 3, queries=6, keys=6))
    assert [record.part for record in trace] == ["queries", "queries"]
    assert "softmax, some queries" in str(trace)
    assert_row_stochastic(trace)
    with pytest.raises(ValueError, match=r"a block of the queries in .*, numbered from 0"):
        assert_causal(trace[0])


@pytest.mark.parametrize("put", [
    lambda outputs: torch.cat(outputs, -1),
    lambda outputs: torch.stack(outputs, 1),
    lambda outputs: torch.cat([one.unsqueeze(1) for one in outputs], 1),
    lambda outputs: torch.cat(outputs),
    lambda outputs: outputs[0] + outputs[1],
], ids=["channels", "stacked", "heads", "batch", "added"])  # fmt: skip
def test_heads_and_batch_entries_that_are_put_together_are_no_parts(put):
    trace = traced(lambda: put([scores_of(one).softmax(-1) @ one for one in (X, X + 1)]))
    assert [record.part for record in trace] == ["", ""]


def test_heads_with_other_keys_each_are_no_parts():
    query, key, value = three(2, 4, queries=6, keys=6)

    def attend(heads, keys):
        shares = (query[:, heads] @ key[:, heads, :keys].mT).softmax(-1)
        return shares @ value[:, heads, :keys]

    trace = traced(lambda: torch.cat([attend(slice(2), 6), attend(slice(2, 4), 3)], 1))
    assert [record.part for record in trace] == ["", ""]


def test_some_keys_of_rows_are_marked_and_the_others_named():
    """As in Longformer: a product of the global keys, and of the others one that nobody knows."""
    query, key, value = three(2, 3)

    def attend():
        weights = (query @ key.mT).softmax(-1)
        return weights[..., :2] @ value[:, :, :2], weights[..., 2:].sort(-1)

    trace = traced(attend)
    assert [(record.part, record.trusted) for record in trace] == [("keys", True)]
    assert_weights(trace[0], plain_weights(query, key, scale=1.0)[..., :2])
    for refused in (assert_row_stochastic, assert_causal):
        with pytest.raises(ValueError, match=r"some keys of the rows in .*: the others went"):
            refused(trace)
    assert any(unseen.what == "softmax of queries times keys" for unseen in trace.unseen)


# --- what has no rows


SOURCES, TARGETS = torch.tensor([0, 1, 2, 3, 1]), torch.tensor([1, 2, 0, 0, 0])


def edges_by_index(x):
    shares = F.leaky_relu(x[SOURCES] + x[TARGETS]).exp()
    sums = torch.zeros(4, 8).index_add(0, TARGETS, shares)
    return torch.zeros(4, 8).index_add(0, TARGETS, shares / sums[TARGETS] * x[SOURCES])


def edges_by_scatter(x):
    scores = (x[SOURCES] * x[TARGETS]).sum(-1) / 3
    shares = (scores - scores.max()).exp()
    sums = torch.zeros(4).scatter_add_(0, TARGETS, shares) + 1e-16
    weights = shares / sums.index_select(0, TARGETS)
    return torch.zeros(4, 8).index_add_(0, TARGETS, weights[:, None] * x[SOURCES])


@pytest.mark.parametrize("edges", [edges_by_index, edges_by_scatter])
def test_a_softmax_over_the_edges_of_a_graph_is_named(edges):
    (unseen,) = traced(edges, X[0, :4]).unseen
    assert str(unseen) == (
        "(no layer): exp, divided by its sums: its rows are groups of elements, as the edges of a "
        "graph are, and no matrix"
    )


# --- names, steps, and what attention may be called


def test_names_do_not_tell_of_wrappers():
    assert plain_name("module._orig_mod.layers.0._fsdp_wrapped_module.attn") == "layers.0.attn"
    model = nn.Sequential()
    model.module = nn.MultiheadAttention(8, 2, batch_first=True)
    outer = nn.ModuleDict({"block": model})
    with torch.no_grad(), capture_attention(outer) as trace:
        outer.forward = lambda x: model.module(x, x, x)[0]
        outer(X)
    assert trace.layers == ("block",)


class Attend(nn.Module):
    def forward(self, x):
        return F.scaled_dot_product_attention(x, x, x)


def test_a_step_is_a_call_of_the_model():
    model = nn.Sequential(Attend(), Attend())
    with capture_attention(model) as trace:
        for length in (6, 1, 1):
            model(X[:, :length])
    assert trace.steps == (0, 1, 2)
    assert [record.shape[2] for record in trace.at(step=0)] == [6, 6]
    assert [record.step for record in trace.at(step=-1)] == [2, 2]
    with pytest.raises(ValueError, match=r"one of \[0, 1, 2\]"):
        trace.at(step=3)


def test_a_capture_of_one_of_two_models_that_take_turns_has_its_own_steps():
    """As in assisted generation: the small model drafts, the large one checks."""
    large, small = nn.Sequential(Attend(), Attend()), nn.Sequential(Attend())
    with (
        capture_attention(large, allow_unseen=True) as checked,
        capture_attention(small, allow_unseen=True) as drafted,
    ):
        for _ in range(2):
            small(X), small(X), large(X)
    assert [(record.layer, record.step) for record in checked] == [
        ("0", 0), ("1", 0), ("0", 1), ("1", 1)
    ]  # fmt: skip
    assert drafted.steps == (0, 1, 2, 3)
    why = "it happened outside of the model that is captured"
    assert [unseen.why for unseen in (*checked.unseen, *drafted.unseen)] == [why, why]


class ConvAttention(nn.Module):
    """Called so, and a gate: no product, no softmax."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv1d(6, 6, 3, padding=1)

    def forward(self, x):
        return x * torch.sigmoid(self.conv(x))


def test_a_convolution_may_be_called_attention():
    model = nn.Sequential(ConvAttention())
    with capture_attention(model, allow_empty=True) as trace:
        model(X)
    assert trace.unseen == ()


class KernelAttention(nn.Module):
    """Linear attention without a softmax, of what a convolution makes."""

    def __init__(self):
        super().__init__()
        self.project = ConvAttention()

    def forward(self, x):
        q, k, v = (self.project(x).relu() for _ in range(3))
        return q @ (k.mT @ v)


def test_a_convolution_in_attention_that_was_not_seen_does_not_stand_for_it():
    model = nn.Sequential(KernelAttention())
    with capture_attention(model, allow_empty=True, allow_unseen=True) as trace:
        model(X)
    assert [(unseen.layer, unseen.what) for unseen in trace.unseen] == [("0", "KernelAttention")]


@pytest.mark.filterwarnings("ignore:.*torch.jit.*is deprecated")
def test_what_is_traced_is_named_and_holds_nothing_of_ours():
    expected = [node.kind() for node in torch.jit.trace(Attend(), X).graph.nodes()]
    with capture_attention(allow_empty=True, allow_unseen=True) as trace:
        found = torch.jit.trace(Attend(), X)
    assert [node.kind() for node in found.graph.nodes()] == expected
    assert [str(unseen) for unseen in trace.unseen] == [
        "(no layer): scaled_dot_product_attention: it was traced by torch.jit, and is not recorded"
    ]


def test_tensors_without_numbers_leave_no_record_and_are_named():
    x = X.to("meta")
    trace = traced(lambda: F.scaled_dot_product_attention(x, x, x))
    assert [unseen.why for unseen in trace.unseen] == ["it was given unusual tensors"]
    trace = traced(lambda: scores_of(x).softmax(-1) @ x)
    assert len(trace) == 0
    assert len(trace.unseen) == 1


@pytest.mark.parametrize("keep", ["inputs", "weights", "statistics"])
def test_operations_of_a_capture_are_not_counted(keep):
    def count(**options):
        with FlopCounterMode(display=False) as counter:
            if options:
                traced(lambda: (scores_of(X).softmax(-1) @ X, Attend()(X)), **options)
            else:
                (scores_of(X).softmax(-1) @ X, Attend()(X))
        return counter.get_total_flops()

    assert count(keep=keep) == count()


@pytest.mark.parametrize("weights_of", [
    lambda scores: torch.special.softmax(scores, -1),
    lambda scores: torch.special.log_softmax(scores, -1).exp(),
], ids=["softmax", "log_softmax"])  # fmt: skip
def test_functions_of_torch_special_are_those_without_it(weights_of):
    heads = draw("heads", 2, 4, 6, 8)
    record = only(lambda: weights_of(heads @ heads.mT) @ heads)
    torch.testing.assert_close(record.weights, (heads @ heads.mT).softmax(-1))


@pytest.mark.parametrize("join", [True, False])
def test_heads_that_come_before_the_batch_leave_a_doubt(join):
    def parted(tensor):
        heads = tensor.view(2, 6, 3, 4).permute(2, 0, 1, 3)
        return heads.contiguous().view(-1, 6, 4) if join else heads

    flat = draw("flat", 2, 6, 12)
    heads = parted(flat)
    record = only(lambda: (parted(flat) @ parted(flat).mT).softmax(-1) @ parted(flat))
    assert (
        record.doubt == "whether its axis of heads is one of windows or of the batch is not known"
    )
    torch.testing.assert_close(
        record.weights.flatten(0, 1), (heads @ heads.mT).softmax(-1).view(6, 6, 6)
    )
