"""Weights that never exist say what the whole tensor says: verdict, place, message and picture."""

import math

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings, strategies as st

import pytest_attnheat as heat
from pytest_attnheat import LazyWeights
from pytest_attnheat.attention import blocks as blocks_module
from pytest_attnheat.attention.scoring import draw

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
    query = draw("query", seed, batch, heads, query_len, 4) * draws(st.sampled_from([0.0, 1, 6]))
    key = draw("key", seed, batch, key_heads, key_len, 4)
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
        "lengths": st.lists(
            st.integers(1, key_len), min_size=batch, max_size=batch
        ).map(torch.tensor),
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


@pytest.fixture(autouse=True, params=[(16, 4, 1), (2**17, 128, 64)], ids=["pieces", "whole"])
def small_blocks(request, monkeypatch):
    """So that small maps take many blocks, and leave keys out."""
    block, cell, rows = request.param
    monkeypatch.setattr(blocks_module, "_BLOCK", block)
    monkeypatch.setattr(blocks_module, "_CELL", cell)
    monkeypatch.setattr(blocks_module, "_ROWS", rows)


MANY = settings(
    max_examples=40,
    deadline=None,
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
