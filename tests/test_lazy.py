"""Weights that never exist say what the whole tensor says: verdict, place, message and picture."""

import math
import os
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import pytest_attnheat as heat
from pytest_attnheat import LazyWeights
from pytest_attnheat.attention import blocks as blocks_module
from pytest_attnheat.attention import chunks
from pytest_attnheat.attention.scoring import draw
from pytest_attnheat.heatmaps import maps

LENGTHS = st.integers(1, 40)


def plain(query, key, case):
    """Weights by the formula, in float64, one place at a time where a rule speaks of places."""
    batch, heads, query_len, _ = query.shape
    key_len = key.shape[-2]
    key = key.repeat_interleave(heads // key.shape[1], 1)
    scale = case.get("scale", 1 / math.sqrt(query.shape[-1]))
    scores = query.double() @ key.double().mT * scale
    if "softcap" in case:
        scores = case["softcap"] * torch.tanh(scores / case["softcap"])
    if "bias" in case:
        scores = scores + case["bias"].double()
    seen = np.ones((batch, heads, query_len, key_len), bool)
    for b in range(batch):
        keys = int(case["lengths"][b]) if "lengths" in case else key_len
        stand = keys - query_len if case.get("alignment") == "bottom_right" else 0
        for q in range(query_len):
            at = q + stand
            for k in range(key_len):
                sink = k < case.get("sink_keys", 0)
                if case.get("causal") and k > at and k >= case.get("prefix", 0):
                    seen[b, :, q, k] = False
                left, right = case.get("window", (None, None))
                near = (left is None or at - k <= left) and (right is None or k - at <= right)
                if not (near or sink):
                    seen[b, :, q, k] = False
                if "chunk" in case and at // case["chunk"] != k // case["chunk"] and not sink:
                    seen[b, :, q, k] = False
                if k >= keys:
                    seen[b, :, q, k] = False
                if "documents" in case:
                    mine, its = case["documents"]
                    seen[b, :, q, k] &= bool(mine[b, q] == its[b, k])
                if "alibi" in case:
                    scores[b, :, q, k] -= case["alibi"].double() * abs(at - k)
    seen = torch.from_numpy(seen)
    if "mask" in case:
        seen = seen & case["mask"]
    scores = scores.masked_fill(~seen, -math.inf)
    if "sinks" in case:
        column = case["sinks"].double()[:, None, None].expand(batch, heads, query_len, 1)
        return torch.cat([scores, column], -1).softmax(-1)[..., :-1], seen
    empty = {"zero": 0.0, "uniform": 1 / key_len, "nan": math.nan}[case["fully_masked"]]
    nothing = scores.isneginf().all(-1, keepdim=True)
    return scores.softmax(-1).masked_fill(nothing, empty), seen


@st.composite
def cases(draws):
    """A call: its query and key, and what is declared."""
    batch, group, key_heads = (draws(st.integers(1, 2)) for _ in range(3))
    query_len, key_len = draws(LENGTHS), draws(LENGTHS)
    seed, heads = draws(st.integers(0, 99)), group * key_heads
    dtype = draws(st.sampled_from([torch.float32, torch.float32, torch.float64, torch.bfloat16]))
    query = draw("query", seed, batch, heads, query_len, 4) * draws(st.sampled_from([0.0, 1, 6]))
    query, key = query.to(dtype), draw("key", seed, batch, key_heads, key_len, 4).to(dtype)
    case = {"fully_masked": draws(st.sampled_from(["zero", "zero", "uniform", "nan"]))}
    case["alignment"] = draws(st.sampled_from(["top_left", "bottom_right"]))
    side = st.one_of(st.none(), st.integers(0, 12))
    maybe = {
        "causal": st.just(True),
        "window": st.tuples(side, side),
        "chunk": st.integers(1, 12),
        "prefix": st.integers(1, 8),
        "sink_keys": st.integers(1, 5),
        "softcap": st.just(2.0),
        "scale": st.sampled_from([0.25, 1.0]),
        "alibi": st.just(draw("alibi", seed, heads).abs()),
        "sinks": st.just(draw("sinks", seed, heads)),
        "bias": st.just(draw("bias", seed, 1, heads, query_len, key_len)),
        "lengths": st.lists(st.integers(1, key_len), min_size=batch, max_size=batch).map(
            torch.tensor
        ),
        "mask": st.sampled_from(
            [(batch, 1, 1, key_len), (query_len, key_len), (1, heads, query_len, key_len)]
        ).map(lambda shape: draw("mask", seed, *shape) > -0.5),
        "documents": st.just(
            tuple(
                torch.arange(n).mul(3).div(key_len, rounding_mode="floor").expand(batch, n)
                for n in (query_len, key_len)
            )
        ),
    }
    for name in draws(st.sets(st.sampled_from(sorted(maybe)), max_size=4)):
        case[name] = draws(maybe[name])
    return query, key, case


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    """So that small maps take many blocks, and leave keys out."""
    block, cell, rows = 16, 4, 1
    monkeypatch.setattr(blocks_module, "_BLOCK", block)
    monkeypatch.setattr(blocks_module, "_CELL", cell)
    monkeypatch.setattr(blocks_module, "_ROWS", rows)


MANY = settings(
    max_examples=int(os.environ.get("ATTNHEAT_CASES", "8")),
    deadline=None,
    database=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)


@MANY
@given(cases())
def test_weights_and_mask_are_those_of_the_formula(case):
    query, key, declared = case
    lazy = LazyWeights(query, key, **declared)
    exact, seen = plain(query, key, declared)
    torch.testing.assert_close(lazy.dense().double(), exact, rtol=1e-4, atol=1e-6, equal_nan=True)
    assert lazy.shape == exact.shape
    if lazy.mask is None:
        assert bool(seen.all())
    else:
        assert torch.equal(lazy.mask[()].expand(seen.shape), seen)


def outcome(check):
    """What an assertion says: nothing, its failure or its refusal, word for word."""
    try:
        check()
    except heat.Failure as failure:
        return str(failure)
    except ValueError as error:
        return f"{type(error).__name__}: {error}"
    return "holds"


def whole(lazy, *, with_sink):
    """The same as tensors, and the mask that goes with them."""
    given = lazy.sinks if with_sink and lazy.sinks is not None else lazy
    mask = given.mask
    return given.dense(), None if mask is None else mask[()]


def judged(lazy, name, **options):
    """What an assertion says of weights that never exist, and of the whole tensor."""
    assertion = getattr(heat, name)
    with_sink = name in ("assert_row_stochastic", "assert_one_hot", "assert_entropy")
    dense, mask = whole(lazy, with_sink=with_sink)
    known = {} if name in ("assert_causal", "assert_padding_masked") else {"mask": mask}
    found = outcome(lambda: assertion(lazy, **options))
    if name in ("assert_masked", "assert_support") and {**known, **options}.get("mask") is None:
        return found, found  # refused: nothing is masked
    if with_sink and lazy.sinks is not None and "mask" in options:
        column = options["mask"].new_ones(*options["mask"].shape[:-1], 1)
        options = {**options, "mask": torch.cat([options["mask"], column], -1)}
    expected = outcome(lambda: assertion(dense, **{**known, **options}))
    return found, expected


ASKED = [
    ("assert_row_stochastic", {}),
    ("assert_one_hot", {}),
    ("assert_uniform", {}),
    ("assert_entropy", {"minimum": 0.7}),
    ("assert_entropy", {"maximum": 0.4, "unit": "bits"}),
    ("assert_masked", {}),
    ("assert_support", {}),
    ("assert_causal", {"alignment": "top_left"}),
    ("assert_causal", {"alignment": "bottom_right", "window": 3}),
]


@MANY
@given(cases(), st.sampled_from(ASKED), st.sampled_from(["own", "zero"]))
def test_a_verdict_is_that_of_the_whole_tensor_word_for_word(case, asked, meaning):
    query, key, declared = case
    name, options = asked
    if meaning == "own" and name != "assert_doubly_stochastic":
        options = {**options, "fully_masked": declared["fully_masked"]}
    found, expected = judged(LazyWeights(query, key, **declared), name, **options)
    assert found == expected


@MANY
@given(cases(), st.integers(0, 9))
def test_another_mask_than_the_declared_one_is_judged_as_by_the_whole_tensor(case, seed):
    query, key, declared = case
    lazy = LazyWeights(query, key, **declared)
    mask = draw("another", seed, *lazy.shape[-2:]) > -1
    for name in ("assert_masked", "assert_support", "assert_row_stochastic", "assert_uniform"):
        found, expected = judged(lazy, name, mask=mask)
        assert found == expected


@MANY
@given(cases())
def test_columns_are_judged_as_those_of_the_whole_tensor(case):
    # In float64, sums in another order differ in their last bit: of 1.45, one is printed as 1.4.
    query, key, declared = (*(t.float() if t.itemsize == 8 else t for t in case[:2]), case[2])
    length = min(query.shape[2], key.shape[2])
    cut = {n: v for n, v in declared.items() if n not in ("bias", "mask", "documents", "lengths")}
    lazy = LazyWeights(query[:, :, :length], key[:, :, :length], **cut)
    for mask in ({}, {"mask": None}):
        found, expected = judged(lazy, "assert_doubly_stochastic", **mask)
        assert found == expected


@MANY
@given(cases())
def test_padding_and_output_are_judged_as_by_the_whole_tensor(case):
    query, key, declared = case
    lazy = LazyWeights(query, key, **declared)
    lengths = [max(0, key.shape[2] - 2)] * query.shape[0]
    if min(lengths) < key.shape[2]:
        found, expected = judged(lazy, "assert_padding_masked", lengths=lengths)
        assert found == expected
    value = draw("value", 1, *key.shape[:3], 3).to(lazy.dtype)
    output = lazy.dense().nan_to_num() @ value.repeat_interleave(lazy.shape[1] // key.shape[1], 1)
    for off in (0.0, 0.5):
        check = partial(heat.assert_reproduces_output, value=value, output=output + off)
        assert outcome(partial(check, lazy)) == outcome(partial(check, lazy.dense()))


def drawn(figure):
    figure.canvas.draw()
    return np.asarray(figure.canvas.buffer_rgba())


@pytest.mark.matrix(of=2)
@pytest.mark.parametrize("held", [1 << 24, 0], ids=["held", "not held"])
@pytest.mark.parametrize(
    "declared",
    [{}, {"causal": True}, {"causal": True, "window": (7, 0)}, {"window": (2, 9), "sink_keys": 3}],
    ids=str,
)
def test_a_picture_and_its_sketch_are_those_of_the_whole_tensor(monkeypatch, held, declared):
    monkeypatch.setattr(maps, "HELD", held)
    query, key = (draw(name, 3, 2, 2, 90, 4).float() * 2 for name in ("query", "key"))
    lazy = LazyWeights(query, key, **declared)
    mask = None if lazy.mask is None else lazy.mask[()]
    for size in ((2.5, 2.5), (1.6, 2.2)):
        for own, dense in ((None, None), (lazy.mask, mask)):
            one = heat.show_heatmaps(lazy, "Keys", "Queries", figsize=size, mask=own)
            two = heat.show_heatmaps(lazy.dense(), "Keys", "Queries", figsize=size, mask=dense)
            assert np.array_equal(drawn(one), drawn(two))
            whole_one, whole_two = (figure.picture.shown.whole for figure in (one, two))
            assert (whole_one is None) == (whole_two is None)
            if whole_one is not None:
                assert whole_one.masks == whole_two.masks
                for side in ("rows", "columns"):
                    a, b = (getattr(w.sketch, side) for w in (whole_one, whole_two))
                    np.testing.assert_allclose(a.signed, b.signed, atol=1e-5)
                    np.testing.assert_allclose(a.sums, b.sums, atol=1e-5)
                    # Norms of columns are bounds, which hang on how many rows are read together.
                    assert (np.abs(a.norms - b.norms) <= 0.3 * b.norms).all()


@pytest.mark.parametrize("declared", [{}, {"causal": True, "window": (7, 0)}], ids=str)
def test_attention_is_compared_as_that_of_a_record(declared):
    query, key = (draw(name, 3, 1, 3, 50, 4).float() for name in ("query", "key"))
    other = query.clone()
    heat.assert_same_attention(
        LazyWeights(query, key, **declared), LazyWeights(query, key, **declared)
    )
    other[0, 1, 20] += 1
    with pytest.raises(
        heat.Failure, match=r"1 of 3 maps moved(.|\n)*its head 1 moved(.|\n)*query 20"
    ):
        heat.assert_same_attention(
            LazyWeights(other, key, **declared), LazyWeights(query, key, **declared)
        )


def test_a_record_that_is_too_large_is_read_as_weights_that_never_exist():
    query, key, value = (draw(name, 3, 1, 4, 20, 4).float() for name in ("query", "key", "value"))
    with heat.capture_attention(max_bytes=10_000) as trace:
        output = torch.nn.functional.scaled_dot_product_attention(query, key, value, is_causal=True)
    (record,) = trace
    small = replace(record, most_bytes=100)
    with pytest.raises(heat.CaptureMemoryError):
        small.weights  # noqa: B018
    assert torch.equal(small.lazy_weights.dense(), record.weights)
    for check in (heat.assert_causal, heat.assert_reproduces_output, heat.assert_row_stochastic):
        check(small)
    assert output.shape == value.shape
    for one in (record, small):
        with pytest.raises(heat.Failure, match=r"15 of 80 rows have an entropy below 1.2 nats"):
            heat.assert_entropy(one, minimum=1.2)


# --- rows that stand for all, memory, progress, refusals


def test_some_rows_stand_for_all_and_the_verdict_says_so():
    query, key = (draw(name, 3, 1, 2, 400, 4).float() for name in ("query", "key"))
    some = LazyWeights(query, key, rows=64, seed=5)
    read = [number for rows in some.rows for number in range(rows.start, rows.stop)]
    assert len(read) == 64
    assert {0, 399} <= set(read)
    assert LazyWeights(query, key, rows=400).sampled is None
    heat.assert_row_stochastic(some)
    with pytest.raises(heat.Failure) as caught:
        heat.assert_entropy(some, minimum=5.9)
    whole = some.dense()
    low = [row for row in read for head in range(2) if row_entropy(whole[0, head, row]) < 5.9]
    text = str(caught.value)
    assert f"{len(low)} of 128 rows have an entropy below 5.9" in text
    assert ", 64 of 400 rows of each map, drawn from seed=5" in text
    assert caught.value.worst.index[-1] in read


def row_entropy(row):
    return float(-(row.double() * row.double().log()).sum()) + 7e-5  # the tolerance


def test_rows_of_other_draws_are_not_compared():
    query, key = (draw(name, 3, 1, 2, 400, 4).float() for name in ("query", "key"))
    one, other = (LazyWeights(query, key, rows=64, seed=seed) for seed in (1, 2))
    heat.assert_same_attention(one, LazyWeights(query, key, rows=64, seed=1))
    with pytest.raises(ValueError, match="both with the same rows= and seed="):
        heat.assert_same_attention(one, other)


def test_what_nobody_may_see_is_not_read_whatever_else_hides_it():
    number = torch.zeros(1, 5).long()
    hidden = torch.zeros(5, 5, dtype=torch.bool)
    query, key = torch.randn(2, 1, 1, 5, 4).unbind()
    lazy = LazyWeights(query, key, mask=hidden, documents=(number, number))
    assert lazy.blocks.seen(slice(0, 1), slice(0, 5)) == ()
    assert torch.equal(lazy.dense(), torch.zeros(1, 1, 5, 5))
    heat.assert_row_stochastic(lazy)


@pytest.mark.parametrize("name", ["assert_doubly_stochastic", "show_heatmaps"])
def test_what_needs_all_rows_refuses_some(name):
    query, key = (draw(name, 3, 1, 2, 400, 4).float() for name in ("query", "key"))
    some = LazyWeights(query, key, rows=64)
    options = {"xlabel": None, "ylabel": None} if name == "show_heatmaps" else {}
    with pytest.raises(ValueError, match=r"64 of 400 rows of each map.*; accepted is all rows"):
        getattr(heat, name)(some, **options)


def test_a_long_pass_tells_how_far_it_is(monkeypatch, caplog):
    monkeypatch.setattr(chunks, "_SECONDS", -1.0)
    query, key = (draw(name, 3, 1, 1, 40, 4).float() for name in ("query", "key"))
    with caplog.at_level("INFO", "pytest_attnheat"):
        heat.assert_row_stochastic(LazyWeights(query, key))
    assert "float32 (1, 1, 40, 40)>: 50 % are read, about 0 s are left" in caplog.text


def test_a_block_mask_leaves_out_what_it_hides():
    flex = pytest.importorskip("torch.nn.attention.flex_attention")
    query, key = (draw(name, 3, 1, 2, 300, 4).float() for name in ("query", "key"))
    mask = flex.create_block_mask(
        lambda b, h, q, k: q // 128 == k // 128, None, None, 300, 300, device="cpu"
    )
    lazy = LazyWeights(query, key, mask=mask)
    documents = torch.arange(300).div(128, rounding_mode="floor").expand(1, 300)
    same = LazyWeights(query, key, documents=(documents, documents))
    assert torch.allclose(lazy.dense(), same.dense())
    assert lazy.blocks.seen(slice(0, 1), slice(130, 131)) == (slice(128, 256),)
    heat.assert_masked(lazy)


@pytest.mark.parametrize(
    ("given_", "error", "said"),
    [
        ({"causal": True}, ValueError, "alignment: got None for 5 queries and 7 keys"),
        ({"windw": 3}, TypeError, "features: got .'windw'.; accepted is one of mask, causal.*; "),
        ({"lenghts": 3}, TypeError, "; did you mean 'lengths'[?]"),
        ({"mask": torch.ones(5, 7)[:3] > 0}, ValueError, "broadcasts to that of the weights"),
        ({"mask": torch.ones(5, 7).int()}, TypeError, "mask: got dtype int32"),
        ({"mask": lambda b, h, q, k: q >= k}, TypeError, "mask: got function; .* is may_see="),
        ({"bias": torch.ones(5, 7) > 0}, TypeError, "bias: got dtype bool; .* are a mask="),
        ({"causal": "bottom_right"}, TypeError, "causal: got str; accepted is True or False; al"),
        ({"score_mod": torch.ones(3)}, TypeError, "score_mod: got Tensor; accepted is a function"),
        ({"rows": 0}, ValueError, "rows: got 0; accepted is a whole number from 1"),
        ({"scale": "x"}, TypeError, "scale: got str; accepted is a number"),
        ({"may_see": lambda b, h, q, k: True}, TypeError, "may_see: got one that returned bool"),
        ({"may_see": lambda b, h, q, k: 1 * k}, ValueError, "may_see: got one that returned int64"),
        ({"score_mod": lambda s, b, h, q, k: 1.0}, TypeError, "one that returned float; accepted"),
        ({"score_mod": lambda s, b, h, q: s}, ValueError, "score_mod: got one that raised TypeErr"),
    ],
)
def test_what_cannot_be_read_is_refused_when_it_is_made(given_, error, said):
    with pytest.raises(error, match=said):
        LazyWeights(torch.randn(1, 1, 5, 4), torch.randn(1, 1, 7, 4), **given_)


def test_booleans_say_what_may_be_seen_and_lists_are_tensors():
    query, key = torch.randn(2, 1, 2, 6, 4).unbind()
    low = torch.ones(6, 6, dtype=torch.bool).tril()
    seen = LazyWeights(query, key, may_see=low, mask=~torch.eye(6, dtype=torch.bool) | (low < 2))
    assert torch.equal(seen.dense(), LazyWeights(query, key, mask=low).dense())
    biased = LazyWeights(query, key, bias=[[0.5] * 5 + [-math.inf]] * 6)
    assert float(biased.dense()[..., 5].sum()) == 0


# --- what is NaN, what comes first, what is refused


def failure_of(assertion, weights, **options):
    with pytest.raises(heat.Failure) as caught:
        assertion(weights, **options)
    return str(caught.value)


@pytest.mark.parametrize("row", [6, 7])
def test_a_row_of_nan_is_nan_at_the_keys_that_its_block_does_not_read_too(monkeypatch, row):
    monkeypatch.setattr(blocks_module, "_BLOCK", 8 * 30)
    query, key = (draw(name, 3, 1, 1, 30, 4).float() for name in ("query", "key"))
    query[0, 0, row] = math.nan
    seen = torch.ones(30, 30, dtype=torch.bool).tril()
    dense = (query @ key.mT / 2).masked_fill(~seen, -math.inf).softmax(-1)
    lazy = LazyWeights(query, key, causal=True)
    assert torch.equal(lazy.dense().isnan(), dense.isnan())
    assert f"{29 - row} of 435 masked" in failure_of(heat.assert_causal, lazy)
    for name in ("assert_causal", "assert_row_stochastic", "assert_entropy"):
        options = {} if name == "assert_causal" else {"mask": seen}
        options |= {"minimum": 0.0} if name == "assert_entropy" else {}
        assertion = getattr(heat, name)
        assert failure_of(assertion, lazy, **options) == failure_of(assertion, dense, **options)
    sunk = LazyWeights(query, key, causal=True, sinks=torch.zeros(1)).sinks
    assert sunk.dense()[0, 0, row].isnan().all()


def test_the_first_that_is_broken_is_the_first_of_the_tensor_where_a_block_has_several_maps(
    monkeypatch,
):
    monkeypatch.setattr(blocks_module, "_BLOCK", 3 * 3 * 20)
    query, key = (draw(name, 3, 3, 1, 20, 4).float() for name in ("query", "key"))
    mask = torch.ones(3, 1, 20, 20, dtype=torch.bool)
    mask[0, :, 9, 3] = mask[1, :, 2, 5] = mask[2, :, 12, 6] = False
    lazy = LazyWeights(query, key, window=(7, 7))
    assert (lazy.blocks.together, lazy.blocks.rows) == (3, 3)
    found = failure_of(heat.assert_masked, lazy, mask=mask)
    assert found == failure_of(heat.assert_masked, lazy.dense(), mask=mask)
    assert "weights[0, 0, 9, 3]" in found


def test_of_equals_the_worst_is_the_first_where_a_block_has_several_maps(monkeypatch):
    monkeypatch.setattr(blocks_module, "_BLOCK", 3 * 3 * 20)
    nothing = torch.zeros(3, 1, 20, 4)
    mask = torch.ones(3, 1, 20, 20, dtype=torch.bool)
    mask[0, :, 12, 8] = mask[1, :, 9, 9] = False
    lazy = LazyWeights(nothing, nothing, window=(7, 7))
    found = failure_of(heat.assert_masked, lazy, mask=mask)
    assert found == failure_of(heat.assert_masked, lazy.dense(), mask=mask)


def test_weights_end_where_their_maps_end():
    query, key = (draw(name, 3, 2, 3, 5, 4).float() for name in ("query", "key"))
    lazy = LazyWeights(query, key)
    assert len(list(lazy)) == 2
    assert torch.equal(lazy[..., -1], lazy.dense()[..., -1])
    for index in ((0, 3), (-3,), (0, 0, slice(0, 5, 2)), (0, 0, 0, 0, 0)):
        with pytest.raises(IndexError):
            lazy[index]


@pytest.mark.parametrize(
    ("name", "given", "kind"),
    [
        ("window", 5, TypeError),
        ("window", (-1, 2), ValueError),
        ("window", (1.5, 2), TypeError),
        ("chunk", 0, ValueError),
        ("prefix", -3, ValueError),
        ("softcap", 0.0, ValueError),
        ("alibi", torch.ones(3), ValueError),
        ("sinks", [0.5, 0.5], TypeError),
        ("lengths", torch.tensor([9]), ValueError),
        ("lengths", torch.tensor([3, 4]), ValueError),
        ("documents", (torch.zeros(8), torch.zeros(8)), ValueError),
        ("documents", torch.zeros(1, 8), TypeError),
        ("may_see", True, TypeError),
    ],
)
def test_what_says_nothing_of_these_weights_is_refused(name, given, kind):
    query = torch.zeros(1, 2, 8, 4)
    with pytest.raises(kind, match=rf"^{name}: got .*; accepted is "):
        LazyWeights(query, query, **{name: given})
    function = torch.nn.functional.scaled_dot_product_attention
    with pytest.raises(kind, match=rf"^{name}: got .*; accepted is "):
        heat.assert_matches_reference(function, query, query, query, **{name: given})


def test_a_mask_of_blocks_of_other_lengths_is_refused():
    flex = pytest.importorskip("torch.nn.attention.flex_attention")
    mask = flex.create_block_mask(lambda b, h, q, k: q >= k, 2, None, 128, 128, device="cpu")
    for batch, length in ((2, 129), (3, 128)):
        query = torch.zeros(batch, 1, length, 4)
        with pytest.raises(ValueError, match=r"^mask: got a BlockMask of \(2, 1, 128, 128\)"):
            LazyWeights(query, query, mask=mask)


def test_a_mask_that_never_exists_is_told_from_weights_and_belongs_to_their_shape():
    query = torch.randn(2, 3, 6, 4)
    lazy = LazyWeights(query, query, causal=True)
    assert repr(lazy.mask).startswith("<LazyMask bool (")
    weights = torch.eye(6).expand(2, 3, 6, 6)
    heat.assert_masked(weights, lazy.mask)
    with pytest.raises(TypeError, match=r"<LazyWeights .*of lazy weights is their \.mask"):
        heat.assert_masked(weights, lazy)
    with pytest.raises(ValueError, match="a shape that broadcasts"):
        heat.assert_masked(torch.eye(7).expand(2, 3, 7, 7), lazy.mask)
    with pytest.raises(ValueError, match=r"mask: got <LazyMask .*one of 5 dimensions"):
        heat.assert_masked(weights[None], lazy.mask)
