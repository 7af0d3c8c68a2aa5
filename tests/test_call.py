"""One call of attention with every feature, against loops over single numbers."""

import itertools
import math
from dataclasses import fields

import pytest
import torch

from pytest_attnheat.attention import chunks
from pytest_attnheat.attention.call import Call
from pytest_attnheat.attention.computation import plain, reference
from pytest_attnheat.attention.plan import Case, Plan, carry_out

INF = math.inf
BATCH, HEADS, KEY_HEADS, QUERY_LEN, KEY_LEN, WIDTH, VALUE_WIDTH = 2, 4, 2, 5, 7, 3, 2


def tensors(query_len=QUERY_LEN, key_len=KEY_LEN, dtype=torch.float64):
    generator = torch.Generator().manual_seed(query_len * 31 + key_len)

    def normal(*shape):
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)

    query = normal(BATCH, HEADS, query_len, WIDTH) * 2
    key = normal(BATCH, KEY_HEADS, key_len, WIDTH)
    value = normal(BATCH, KEY_HEADS, key_len, VALUE_WIDTH)
    return query, key, value, normal(BATCH, HEADS, query_len, VALUE_WIDTH)


def bias():
    numbers = torch.linspace(-1, 1, QUERY_LEN * KEY_LEN, dtype=torch.float64)
    numbers[9] = -INF
    return numbers.view(1, 1, QUERY_LEN, KEY_LEN)


def some(*shape):
    return torch.rand(shape, generator=torch.Generator().manual_seed(0)) > 0.4


def real_keys(call, batch):
    return KEY_LEN if call.lengths is None else int(call.lengths[batch])


def stands(call, batch, i):
    """At which key query i stands."""
    return i + (real_keys(call, batch) - QUERY_LEN if call.alignment == "bottom_right" else 0)


def sees(call, batch, head, i, j):
    """Whether query i may attend to key j, in plain words."""
    real, at = real_keys(call, batch), stands(call, batch, i)
    if j >= real:
        return False
    if call.causal and j > at and j >= call.prefix:
        return False
    if call.window is not None and j >= call.sink_keys:
        left, right = call.window
        if (left is not None and j < at - left) or (right is not None and j > at + right):
            return False
    if call.chunk is not None and j >= call.sink_keys and at // call.chunk != j // call.chunk:
        return False
    if call.documents is not None:
        of_queries, of_keys = call.documents
        if of_queries[batch, i] != of_keys[batch, j]:
            return False
    if call.may_see is not None and not call.may_see(batch, head, i, j):
        return False
    if call.mask is not None and not call.mask[batch, head, i, j]:
        return False
    return not (call.bias is not None and call.bias[0, 0, i, j] == -INF)


def score(call, batch, head, i, j):
    """The score of one key, number by number."""
    key = call.key[batch, head // (HEADS // KEY_HEADS), j]
    number = sum(float(a * b) for a, b in zip(call.query[batch, head, i], key, strict=True))
    number *= WIDTH**-0.5 if call.scale is None else call.scale
    if call.softcap is not None:
        number = call.softcap * math.tanh(number / call.softcap)
    if call.bias is not None:
        number += float(call.bias[0, 0, i, j])
    if call.alibi is not None:
        number -= float(call.alibi[head]) * abs(stands(call, batch, i) - j)
    if call.score_mod is not None:
        number = call.score_mod(number, batch, head, i, j)
    return number


def by_loops(call):
    """Output and log-sum-exp, by loops over batch entries, heads, queries and keys."""
    query_len, key_len = call.query.shape[-2], call.key.shape[-2]
    output = torch.zeros(BATCH, HEADS, query_len, VALUE_WIDTH, dtype=torch.float64)
    lse = torch.full((BATCH, HEADS, query_len, 1), -INF, dtype=torch.float64)
    for batch, head, i in itertools.product(range(BATCH), range(HEADS), range(query_len)):
        seen = [j for j in range(key_len) if sees(call, batch, head, i, j)]
        numbers = [math.exp(score(call, batch, head, i, j)) for j in seen]
        total = sum(numbers) + (0 if call.sinks is None else math.exp(float(call.sinks[head])))
        if total:
            lse[batch, head, i] = math.log(total)
        for j, number in zip(seen, numbers, strict=True):
            output[batch, head, i] += number / total * call.value[batch, head // 2, j]
    return output, lse


DOCUMENTS = (
    torch.tensor([[0, 0, 1, 1, 1], [0, 1, 1, 2, 2]]),
    torch.tensor([[0, 0, 0, 1, 1, 1, 1], [0, 1, 1, 1, 2, 2, 3]]),
)
SLOPES = torch.tensor([0.5, 0.25, 0.125, 0.0625]).double()
RIGHT = {"alignment": "bottom_right"}
FEATURES = {
    "nothing": {},
    "mask": {"mask": some(BATCH, HEADS, QUERY_LEN, KEY_LEN)},
    "bias": {"bias": bias()},
    "causal": {"causal": True},
    "bottom right": {"causal": True, "alignment": "bottom_right"},
    "window": {"window": (2, 1)},
    "causal window": {"window": (2, 0), "alignment": "bottom_right"},
    "one side": {"window": (None, 0)},
    "chunk": {"chunk": 3, "causal": True},
    "prefix": {"causal": True, "prefix": 4},
    "sink keys": {"window": (1, 0), "sink_keys": 1},
    "documents": {"documents": DOCUMENTS},
    "lengths": {"lengths": torch.tensor([7, 5])},
    "lengths bottom right": {"lengths": torch.tensor([7, 6]), "causal": True, **RIGHT},
    "may see": {"may_see": lambda batch, head, i, j: (i + j + head) % 2 == 0},
    "scale": {"scale": -0.3},
    "softcap": {"softcap": 1.5},
    "alibi": {"alibi": SLOPES, **RIGHT},
    "score mod": {"score_mod": lambda s, batch, head, i, j: s * s * 0.3 + (i - j) / 8},
    "sinks": {"sinks": torch.tensor([0.5, -INF, 2.0, -1.0]).double()},
}
ALONE = list(FEATURES)
TOGETHER = [
    pair
    for pair in itertools.combinations(ALONE[1:], 2)
    # Two that say the same thing differently.
    if not {*FEATURES[pair[0]]} & {*FEATURES[pair[1]]}
]


def call_with(*names, gradients=True):
    query, key, value, upstream = tensors()
    declared = {k: v for name in names for k, v in FEATURES[name].items()}
    return Call(query, key, value, upstream=upstream if gradients else None, **declared)


def close(found, expected):
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("names", [*zip(ALONE), *TOGETHER], ids=" and ".join)
def test_output_and_lse_are_those_of_loops_over_single_numbers(names):
    call = call_with(*names, gradients=False)
    found = reference(call, wanted=("lse",)).exact
    output, lse = by_loops(call)
    close(found["output"], output)
    close(found["lse"], lse)


@pytest.mark.parametrize("names", [*zip(ALONE), *TOGETHER], ids=" and ".join)
def test_gradients_are_those_of_autograd(names):
    call = call_with(*names)
    exact, differentiated = reference(call).exact, plain(call)
    assert {*exact} == {*differentiated} >= {"output", "query", "key", "value"}
    for name, tensor in differentiated.items():
        close(exact[name], tensor)


@pytest.mark.parametrize(
    "names", [("sinks",), ("softcap", "alibi"), ("documents", "sinks"), ("score mod", "bias")]
)
@pytest.mark.parametrize("budget", [1, 3000])
def test_it_is_the_same_however_it_is_cut(names, budget, monkeypatch):
    whole = reference(call_with(*names), wanted=("lse", "weights"))
    monkeypatch.setattr(chunks, "CHUNK_BYTES", budget)
    cut = reference(call_with(*names), wanted=("lse", "weights"))
    for name in whole.exact:
        close(cut.exact[name], whole.exact[name])
        close(cut.scale[name], whole.scale[name])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("names", [*zip(ALONE), *TOGETHER], ids=" and ".join)
def test_a_plain_computation_is_off_by_no_more_than_a_few_times_its_natural_scale(names, dtype):
    query, key, value, upstream = tensors(dtype=dtype)
    declared = {k: v for name in names for k, v in FEATURES[name].items()}
    for name in ("bias", "alibi", "sinks"):
        if name in declared:
            declared[name] = declared[name].to(dtype)
    call = Call(query, key, value, upstream=upstream, **declared)
    expected, found = reference(call), plain(call)
    for name, exact in expected.exact.items():
        off = (found[name] - exact).abs()
        assert bool((off <= 2 * expected.scale[name] + expected.least[name]).all()), name


def test_weights_and_the_sink_sum_to_one():
    call = call_with("sinks", gradients=False)
    found = reference(call, wanted=("lse", "weights")).exact
    sink = (call.sinks[None, :, None, None] - found["lse"]).exp()
    close(found["weights"].sum(-1, keepdim=True) + sink, torch.ones_like(sink))


def test_a_query_that_sees_no_key_but_a_sink_gives_zero_and_the_lse_of_the_sink():
    query, key, value, upstream = tensors()
    nothing = torch.zeros(QUERY_LEN, KEY_LEN, dtype=torch.bool)
    sinks = torch.arange(4.0).double()
    call = Call(query, key, value, mask=nothing, sinks=sinks, upstream=upstream)
    found = reference(call, wanted=("lse",)).exact
    assert not found["output"].any()
    close(found["lse"], sinks[None, :, None, None].expand_as(found["lse"]))
    assert all(not found[name].any() for name in ("query", "key", "value", "sinks"))


@pytest.mark.parametrize("names", [*zip(ALONE), *TOGETHER], ids=" and ".join)
def test_the_plan_without_a_wrong_decision_is_the_same_attention(names):
    call = call_with(*names, gradients=False)
    case = Case(**{field.name: getattr(call, field.name) for field in fields(call)})
    found = carry_out(Plan(), case)
    expected = reference(call, wanted=("weights",)).exact
    close(found.output, expected["output"])
    close(found.weights, expected["weights"])
