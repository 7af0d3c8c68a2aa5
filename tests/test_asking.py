"""A call of attention becomes a call of the subject, as its specification declares."""

import math
import re
from dataclasses import replace

import pytest
import torch

from pytest_attnheat import AttentionSpec
from pytest_attnheat.attention.call import Call
from pytest_attnheat.contract.asking import KEYWORDS

BATCH, HEADS, KEY_HEADS, QUERY_LEN, KEY_LEN, WIDTH, VALUE_DIM = 2, 4, 2, 3, 5, 6, 7


def randn(*shape, dtype=torch.float32):
    generator = torch.Generator().manual_seed(sum(shape))
    return torch.randn(shape, generator=generator).to(dtype)


def plain_call(**given):
    """A call whose sizes all differ."""
    return Call(
        query=randn(BATCH, HEADS, QUERY_LEN, WIDTH),
        key=randn(BATCH, HEADS, KEY_LEN, WIDTH),
        value=randn(BATCH, HEADS, KEY_LEN, VALUE_DIM),
        **given,
    )


def some_mask(*shape):
    return torch.rand(shape, generator=torch.Generator().manual_seed(1)) > 0.5


class Recorder:
    """Keeps what it is called with; its output is zero. The width comes last."""

    def __init__(self):
        self.inputs, self.arguments = (), {}

    def output(self, query, key, value, arguments):
        self.inputs, self.arguments = (query, key, value), arguments
        return torch.zeros(*query.shape[:-1], value.shape[-1])


def recording():
    """A recorder, and a function that takes everything under keywords of its own."""
    seen = Recorder()

    def attention(query, key, value, m=None, c=False, a=None, s=None, cap=None, sink=None, add=None,
                  docs=None, real=None):  # fmt: skip
        given = {"m": m, "a": a, "s": s, "cap": cap, "sink": sink, "add": add, "docs": docs,
                 "real": real}  # fmt: skip
        arguments = {name: tensor for name, tensor in given.items() if tensor is not None}
        return seen.output(query, key, value, arguments | ({"c": True} if c else {}))

    return seen, attention


NAMES = {
    "scale_argument": "s", "softcap": "cap", "sinks": "sink", "alibi": "a", "bias": "add",
    "documents": "docs", "lengths": "real",
}  # fmt: skip
ASKED = {
    "scale": 0.3,
    "softcap": 2.0,
    "sinks": randn(HEADS),
    "alibi": randn(HEADS).abs(),
    "bias": randn(BATCH, HEADS, QUERY_LEN, KEY_LEN),
    "lengths": torch.tensor([5, 4]),
}


def declared(layout="bhld", **fields):
    seen, attention = recording()
    own = {"mask_argument": "m", "causal_argument": "c", **NAMES, **fields}
    return seen, AttentionSpec(attention, layout=layout, **own)


@pytest.mark.parametrize("name", ASKED)
def test_each_feature_arrives_under_its_keyword(name):
    seen, spec = declared()
    spec.ask(plain_call(**{name: ASKED[name]}))
    (field,) = (field for field, called in KEYWORDS.items() if called == name)
    assert list(seen.arguments) == [NAMES[field]]
    got = seen.arguments[NAMES[field]]
    assert got is ASKED[name] if isinstance(got, torch.Tensor) else got == ASKED[name]


def test_all_features_arrive_together_and_none_that_is_not_asked():
    seen, spec = declared()
    spec.ask(plain_call(**ASKED, causal=True))
    assert set(seen.arguments) == {"s", "cap", "sink", "a", "add", "real", "c"}
    spec.ask(plain_call())
    assert seen.arguments == {}


def test_documents_are_the_numbers_of_the_positions():
    seen, spec = declared()
    numbers = torch.tensor([[0, 0, 1, 1, 1], [0, 1, 1, 2, 2]])
    square = replace(plain_call(), query=randn(BATCH, HEADS, KEY_LEN, WIDTH))
    spec.ask(replace(square, documents=(numbers, numbers)))
    assert torch.equal(seen.arguments["docs"], numbers)


@pytest.mark.parametrize("layout", ["bhld", "blhd", "lbhd", "hbld"])
def test_tensors_arrive_in_the_declared_layout_and_the_answer_is_turned_back(layout):
    seen = []

    def mean(query, key, value):
        seen.extend((query, key, value))
        there = layout.index("l")
        return value.mean(there, keepdim=True).expand(
            [query.shape[dim] if dim == there else size for dim, size in enumerate(value.shape)]
        )

    call = plain_call()
    output = AttentionSpec(mean, layout=layout).ask(call).output
    sizes = dict(zip("bhl", (BATCH, HEADS), strict=False))
    for tensor, ours in zip(seen, call.tensors, strict=True):
        sizes |= {"l": ours.shape[2], "d": ours.shape[3]}
        assert tuple(tensor.shape) == tuple(sizes[letter] for letter in layout)
        assert torch.equal(tensor.permute([layout.index(letter) for letter in "bhld"]), ours)
    wanted = call.value.mean(2, keepdim=True).expand(BATCH, HEADS, QUERY_LEN, VALUE_DIM)
    assert torch.equal(output, wanted)


def test_a_layout_without_heads_has_none():
    seen, spec = declared("bld", mask="additive")
    call = Call(randn(2, 1, 3, 4), randn(2, 1, 5, 4), randn(2, 1, 5, 4), mask=some_mask(2, 1, 3, 5))
    assert spec.ask(call).output.shape == (2, 1, 3, 4)
    assert [tensor.shape for tensor in seen.inputs] == [(2, 3, 4), (2, 5, 4), (2, 5, 4)]
    assert torch.equal(seen.arguments["m"] == 0, call.mask[:, 0])


# --- masks

SHAPES = [
    (BATCH, 1, QUERY_LEN, KEY_LEN), (BATCH, 1, 1, KEY_LEN), (1, 1, QUERY_LEN, KEY_LEN),
    (1, HEADS, QUERY_LEN, KEY_LEN), (BATCH, HEADS, QUERY_LEN, KEY_LEN),
]  # fmt: skip


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_a_mask_has_as_many_dimensions_as_the_scores(shape):
    seen, spec = declared()
    mask = some_mask(*shape)
    spec.ask(plain_call(mask=mask))
    assert torch.equal(seen.arguments["m"], mask)
    two = some_mask(QUERY_LEN, KEY_LEN)  # as a user gives it
    spec.ask(plain_call(mask=two))
    assert torch.equal(seen.arguments["m"], two[None, None])


@pytest.mark.parametrize(
    ("mask_shape", "given", "handed"),
    [
        ("(L, S)", (1, 1, QUERY_LEN, KEY_LEN), (QUERY_LEN, KEY_LEN)),
        ("(L, S)", (QUERY_LEN, KEY_LEN), (QUERY_LEN, KEY_LEN)),
        ("(B, S)", (BATCH, 1, 1, KEY_LEN), (BATCH, KEY_LEN)),
        ("(B, 1, L, S)", (BATCH, 1, QUERY_LEN, KEY_LEN), (BATCH, 1, QUERY_LEN, KEY_LEN)),
        ("(1, 1, L, S)", (QUERY_LEN, KEY_LEN), (1, 1, QUERY_LEN, KEY_LEN)),
    ],
)
def test_a_mask_of_one_shape_arrives_in_it(mask_shape, given, handed):
    seen, spec = declared(mask_shape=mask_shape)
    mask = some_mask(*given)
    spec.ask(plain_call(mask=mask))
    assert torch.equal(seen.arguments["m"], mask.reshape(handed))
    # What is the same for all heads need not be said for each.
    whole = mask.reshape((1,) * (4 - mask.ndim) + given)
    spec.ask(plain_call(mask=whole.expand(BATCH, HEADS, QUERY_LEN, KEY_LEN)))
    assert torch.equal(seen.arguments["m"], mask.reshape(handed))


@pytest.mark.parametrize("mask_shape", ["(B, 1, L, S)", "(1, H, L, S)", "(B, H, L, S)"])
def test_a_mask_of_one_shape_is_spelled_out_in_it(mask_shape):
    seen, spec = declared(mask_shape=mask_shape)
    mask = some_mask(QUERY_LEN, KEY_LEN)
    spec.ask(plain_call(mask=mask))
    sizes = {"B": BATCH, "H": HEADS, "L": QUERY_LEN, "S": KEY_LEN, "1": 1}
    wanted = tuple(sizes[letter] for letter in mask_shape[1:-1].split(", "))
    assert torch.equal(seen.arguments["m"], mask.expand(wanted))


@pytest.mark.parametrize(
    ("mask_shape", "given"),
    [("(L, S)", (BATCH, 1, QUERY_LEN, KEY_LEN)), ("(B, S)", (1, 1, QUERY_LEN, KEY_LEN))],
)
def test_a_mask_that_its_shape_cannot_say_is_refused(mask_shape, given):
    _, spec = declared(mask_shape=mask_shape)
    says = re.escape(f"is declared to take a mask {mask_shape} alone; got {given}")
    with pytest.raises(TypeError, match=says):
        spec.ask(plain_call(mask=some_mask(*given)))


def test_a_boolean_mask_arrives_with_the_meaning_that_is_declared():
    mask = some_mask(*SHAPES[0])
    meant = {
        "keep": mask,
        "any": mask,
        "drop": ~mask,
        "additive": torch.zeros(mask.shape).masked_fill(~mask, -math.inf),
    }
    for meaning, wanted in meant.items():
        seen, spec = declared(mask=meaning)
        spec.ask(plain_call(mask=mask))
        assert torch.equal(seen.arguments["m"], wanted)
    half = plain_call(mask=mask)
    half = replace(half, **{name: getattr(half, name).half() for name in ("query", "key", "value")})
    seen, spec = declared(mask="additive")
    spec.ask(half)
    assert seen.arguments["m"].dtype == torch.float16


@pytest.mark.parametrize("meaning", ["additive", "any"])
def test_a_bias_is_the_mask_where_no_keyword_is_declared_for_it(meaning):
    bias, mask = ASKED["bias"], some_mask(*SHAPES[1])
    seen, spec = declared(mask=meaning, bias=None)
    spec.ask(plain_call(bias=bias))
    assert torch.equal(seen.arguments["m"], bias)
    spec.ask(plain_call(bias=bias, mask=mask))  # both at once in one argument
    assert torch.equal(seen.arguments["m"], bias.masked_fill(~mask, -math.inf))
    seen, spec = declared(mask=meaning)
    spec.ask(plain_call(bias=bias, mask=mask))
    assert torch.equal(seen.arguments["add"], bias)
    kept = seen.arguments["m"]
    assert torch.equal(kept == 0 if meaning == "additive" else kept, mask)


# --- what is passed without being asked


def test_grouped_heads_are_said_to_be_so_where_the_subject_takes_that():
    calls = []

    def grouping(query, key, value, enable_gqa=False):
        calls.append((key.shape[1], enable_gqa))
        return query.new_zeros(*query.shape[:-1], value.shape[-1])

    call = plain_call()
    spec = AttentionSpec(grouping)
    spec.ask(call)
    spec.ask(replace(call, key=call.key[:, :KEY_HEADS], value=call.value[:, :KEY_HEADS]))
    assert calls == [(HEADS, False), (KEY_HEADS, True)]
    seen, spec = declared(grouped=True)
    spec.ask(replace(call, key=call.key[:, :KEY_HEADS], value=call.value[:, :KEY_HEADS]))
    assert seen.inputs[1].shape[1] == KEY_HEADS
    assert seen.arguments == {}


def test_what_a_subject_cannot_be_called_without_is_none_where_nothing_is_asked():
    seen = []

    def needing(query, key, value, mask, cap, causal):
        seen.append((mask, cap, causal))
        return query.new_zeros(*query.shape[:-1], value.shape[-1])

    spec = AttentionSpec(
        needing, mask_argument="mask", softcap="cap", causal_argument="causal", causal="top_left"
    )
    assert spec.unmet == ""
    spec.ask(plain_call(causal=True))
    assert seen == [(None, None, True)]


def test_dropout_is_passed_on():
    seen = []

    def dropping(query, key, value, dropout_p=0.0):
        seen.append(dropout_p)
        return plainly(query, key, value)

    spec = AttentionSpec(dropping)
    spec.ask(plain_call())
    spec.ask(plain_call(), dropout=0.25)
    assert seen == [0.0, 0.25]


def test_what_is_causal_by_default_is_told_when_it_is_not():
    seen = []

    def by_default(query, key, value, is_causal=True):
        seen.append(is_causal)
        return query.new_zeros(*query.shape[:-1], value.shape[-1])

    for causal in (False, True):
        AttentionSpec(by_default).ask(plain_call(causal=causal))
    assert seen == [False, True]


def test_what_a_subject_always_does_is_described_and_not_passed_on():
    seen, attention = recording()
    always = {
        "softcap": 3.0, "sinks": ASKED["sinks"], "alibi": ASKED["alibi"], "scale": 0.5,
        "window": (2, 0), "chunk": 4,
    }  # fmt: skip
    spec = AttentionSpec(attention, **always)
    call = spec.described(plain_call())
    assert {name: getattr(call, name) for name in always} == always
    spec.ask(call)
    assert seen.arguments == {}


def test_slopes_may_depend_on_the_number_of_heads():
    _, attention = recording()
    spec = AttentionSpec(attention, alibi=lambda heads: 2.0 ** -torch.arange(1, heads + 1))
    assert torch.equal(spec.described(plain_call()).alibi, torch.tensor([0.5, 0.25, 0.125, 0.0625]))


def test_slopes_may_be_a_list_and_are_one_for_each_head():
    _, attention = recording()
    spec = AttentionSpec(attention, alibi=lambda heads: [2.0**-n for n in range(1, heads + 1)])
    assert spec.described(plain_call()).alibi.tolist() == [0.5, 0.25, 0.125, 0.0625]
    for wrong, said in (
        (lambda heads: torch.ones(heads + 1), r"alibi: got one that returned float32 \(5,\); "),
        (
            lambda heads: torch.ones(heads, 1, 1),
            r"alibi: got .* returns one number for each, here 4",
        ),
        (lambda heads: [1.0][heads], "alibi: got one that raised IndexError"),
        (lambda heads: object(), "alibi: got one that returned object"),
    ):
        with pytest.raises((TypeError, ValueError), match=said):
            AttentionSpec(attention, alibi=wrong)


def test_what_a_block_alone_has_is_refused_of_a_function():
    _, attention = recording()
    with pytest.raises(ValueError, match=r"documents: got int64 .6,.; accepted is of a function, "):
        AttentionSpec(attention, documents=torch.zeros(6, dtype=torch.long))
    with pytest.raises(ValueError, match="memory: got 'text'; accepted is None, but of a block"):
        AttentionSpec(attention, memory="text")


# --- what is not declared


def plainly(query, key, value):
    return query.new_zeros(*query.shape[:-1], value.shape[-1])


REFUSED = {
    "softcap": 2.0, "sinks": ASKED["sinks"], "alibi": ASKED["alibi"], "scale": 0.3,
    "lengths": ASKED["lengths"], "documents": (torch.zeros(2, 5), torch.zeros(2, 5)),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_a_feature_that_is_not_declared_is_refused_in_words(name):
    with pytest.raises(TypeError, match=rf"^plainly is not declared to take {name}$"):
        AttentionSpec(plainly).ask(plain_call(**{name: REFUSED[name]}))


def test_masks_and_causality_that_are_not_declared_are_refused_in_words():
    spec = AttentionSpec(plainly)
    mask = some_mask(QUERY_LEN, KEY_LEN)
    with pytest.raises(TypeError, match=r"^plainly is not declared to take a mask$"):
        spec.ask(plain_call(mask=mask))
    with pytest.raises(TypeError, match=r"^plainly is not declared to take is_causal$"):
        spec.ask(plain_call(causal=True))
    with pytest.raises(TypeError, match=r"^plainly is not declared to take a mask$"):
        spec.ask(plain_call(bias=ASKED["bias"]))
    _, keeping = declared(mask="keep", bias=None)
    with pytest.raises(TypeError, match=r"is not declared to take a mask of floats$"):
        keeping.ask(plain_call(bias=ASKED["bias"]))


# --- answers


def test_an_answer_of_another_kind_is_refused_in_words():
    def of(answer):
        def returning(query, key, value):
            return answer(query, value)

        return returning

    zeros = lambda query, value: plainly(query, None, value)  # noqa: E731
    with pytest.raises(TypeError, match=r"^returning must return a tensor; got NoneType$"):
        AttentionSpec(of(lambda query, value: None)).ask(plain_call())
    with pytest.raises(TypeError, match=r"declares a pair \(output, weights\); got Tensor$"):
        AttentionSpec(of(zeros), returns="weights").ask(plain_call())
    with pytest.raises(TypeError, match=r"declares a pair \(output, lse\); got Tensor$"):
        AttentionSpec(of(zeros), returns="lse").ask(plain_call())
    with pytest.raises(ValueError, match=r"must return \(batch, heads, length, width\), here "):
        AttentionSpec(of(lambda query, value: query)).ask(plain_call())


def test_what_comes_with_the_output_is_kept_where_it_is_declared():
    def both(query, key, value):
        return plainly(query, key, value), "besides"

    assert AttentionSpec(both, returns="lse").ask(plain_call()).besides == "besides"
    assert AttentionSpec(both).ask(plain_call()).besides is None


def test_the_signature_of_pytorch_asks_the_same():
    seen, spec = declared(mask="drop", causal="bottom_right")
    call = plain_call()
    mask = some_mask(QUERY_LEN, KEY_LEN)
    spec(*call.tensors, mask, is_causal=True, scale=0.3, softcap=2.0)
    assert torch.equal(seen.arguments.pop("m"), ~mask[None, None])
    assert seen.arguments == {"c": True, "s": 0.3, "cap": 2.0}
