"""Choices of features: each pair occurs, each is a call, a line of text, and can be smaller."""

import math
from dataclasses import replace
from itertools import combinations, product

import pytest
import torch

from pytest_attnheat.attention.covering import covering
from pytest_attnheat.attention.levels import (
    MASK_SHAPES,
    NONE,
    NUMBERS,
    OPTIONS,
    Declared,
    Space,
    read,
    shrunk,
    text_of,
)

DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16]
# Few levels, so that all cases can be tried; each rule about levels speaks of some of them.
FEW = {
    "few_shapes": True,
    "numbers": ("ordinary", "overflowing"),
    "gradients": False,
    "longest": 7,
    "equal_widths": True,
}
SMALL = {
    "boolean": Declared(masks=frozenset({"boolean"}), causal=True, **FEW),
    "additive": Declared(
        masks=frozenset({"additive"}), mask_shape="(B, 1, L, S)", causal=True, **FEW
    ),
    "both, of keys": Declared(
        masks=frozenset({"boolean", "additive"}), mask_shape="(B, S)", causal=True, **FEW
    ),
    "from the end": Declared(causal=True, from_the_end=True, options=frozenset({"scale"}), **FEW),
    "documents": Declared(
        masks=frozenset({"boolean"}), mask_shape="(L, S)", options=frozenset({"documents"}), **FEW
    ),
    "square": Declared(causal=True, square=True, options=frozenset({"scale"}), **FEW),
}
ALL = Declared(
    masks=frozenset({"boolean", "additive"}), causal=True, options=frozenset(OPTIONS), grouped=True
)
LARGE = {
    "nothing": Declared(),
    "all": ALL,
    "all from the end": replace(ALL, from_the_end=True),
    "all in squares": replace(ALL, square=True, equal_widths=True),
    "all in few shapes": replace(ALL, few_shapes=True),
    "heads of its own": replace(ALL, heads=12),
    "a mask of keys": replace(ALL, mask_shape="(B, S)"),
    "a mask of queries and keys": replace(ALL, mask_shape="(L, S)"),
    "near": replace(ALL, near=True, from_the_end=True),
}


def everything(declared):
    """All cases of levels that are possible, by trying all cases."""
    levels = declared.levels()
    for chosen in product(*levels.values()):
        case = dict(zip(levels, chosen, strict=True))
        if declared.possible(case):
            yield case


def pairs_in(cases):
    return {pair for case in cases for pair in combinations(sorted(case.items()), 2)}


@pytest.mark.parametrize("name", SMALL)
def test_each_pair_of_levels_that_can_occur_occurs(name):
    covering = Space(SMALL[name]).covering()
    wanted = pairs_in(everything(SMALL[name]))
    assert pairs_in(covering.cases) == wanted
    assert covering.pairs == len(wanted)


@pytest.mark.parametrize("name", LARGE)
def test_each_level_of_each_feature_occurs(name):
    declared = LARGE[name]
    cases = Space(declared).covering().cases
    for feature, levels in declared.levels().items():
        assert {case[feature] for case in cases} == set(levels), feature
    assert all(map(declared.possible, cases))


@pytest.mark.parametrize("name", LARGE)
def test_what_is_possible_is_so_in_each_of_its_parts(name):
    """The covering relies on it: a part that is refused is never completed."""
    declared = LARGE[name]
    for case in Space(declared).covering().cases[:20]:
        for size in (1, 2, len(case) - 1):
            for part in combinations(case.items(), size):
                assert declared.possible(dict(part)), part


@pytest.mark.parametrize("shape", [None, "(L, S)", "(B, S)", "(B, H, L, S)"])
@pytest.mark.parametrize("masks", [{"boolean"}, {"additive"}, {"boolean", "additive"}])
def test_no_search_loses_its_way(masks, shape):
    """A level that no other fits has to be refused at once, or the search tries all cases."""
    declared = replace(ALL, masks=frozenset(masks), mask_shape=shape)
    asked = 0

    def possible(chosen):
        nonlocal asked
        asked += 1
        assert asked < 300_000
        return declared.possible(chosen)

    covering(declared.levels(), possible)


def test_of_few_positions_all_are_asked():
    for longest in (3, 6, 40):
        sizes = Declared(longest=longest).levels()["sizes"]
        assert sizes[0] == (longest, longest)
        assert max(map(max, sizes)) == longest


# --- the call of a choice


def kept(call):
    """How many keys each query may attend to, (batch, heads, query_len)."""
    shape = (*call.query.shape[:-1], call.key_len)
    return call.visible().expand(shape).sum(-1)


ALWAYS = {
    "near": {"window": (3, 0), "alignment": "bottom_right"},
    "all from the end": {"alignment": "bottom_right"},
    "heads of its own": {"sinks": torch.linspace(-1, 1, 12)},
}


@pytest.mark.parametrize("name", LARGE)
def test_each_query_keeps_a_key_unless_one_is_to_have_none(name):
    space = Space(LARGE[name], ALWAYS.get(name, {}))
    empty = 0
    for chosen in space.covering().cases:
        call = space.call(chosen, torch.float32)
        rows = kept(call) == 0
        if chosen["empty"]:
            empty += 1
            assert rows.any(), text_of(chosen)
            rows[..., call.query_len // 2] = False
        if chosen.get("lengths") == "empty":
            rows[-1] = False
        if call.causal and call.alignment == "bottom_right":  # the first of more queries than keys
            rows[..., : max(0, call.query_len - call.key_len)] = False
        assert not rows.any(), text_of(chosen)
    assert empty or name in ("nothing", "a mask of keys")


@pytest.mark.parametrize("name", ["nothing", "all", "all in squares"])
def test_a_call_has_what_is_chosen(name):
    space = Space(LARGE[name])
    for chosen in space.covering().cases:
        call = space.call(chosen, torch.float32)
        assert (call.query_len, call.key_len) == chosen["sizes"]
        assert call.query.shape[0] == call.key.shape[0] == chosen["batch"]
        assert call.group == chosen["group"]
        assert call.query.shape[-1] == chosen["head_dim"]
        same = call.value.shape[-1] == call.query.shape[-1]
        assert same == (chosen["value_dim"] == "equal")
        assert call.causal == chosen["causal"]
        is_added = chosen["mask"] == "additive" or bool(chosen.get("bias"))
        assert (call.mask is not None) == (chosen["mask"] == "boolean")
        assert (call.bias is not None) == is_added
        for option in OPTIONS:
            if option not in ("bias", "scale"):
                assert (getattr(call, option) is not None) == bool(chosen.get(option)), option
        assert (call.scale or NONE) == chosen.get("scale", NONE)


@pytest.mark.parametrize("shape", MASK_SHAPES)
def test_a_mask_has_its_shape_and_its_fill(shape):
    space = Space(replace(ALL, options=frozenset()))
    sizes = {"B": 2, "H": 4, "L": 5, "S": 7, "1": 1}
    wanted = tuple(sizes[letter] for letter in shape[1:-1].split(", "))
    chosen = {"shape": shape, "group": 2}
    call = space.call(space.choice(mask="boolean", **chosen), torch.float16)
    assert call.mask.dtype == torch.bool
    assert call.mask.shape == wanted
    lowest = {"-inf": -math.inf, "min": -65504.0, "-1e9": -65504.0, "-1e4": -1e4}
    for fill, number in lowest.items():
        added = space.call(space.choice(mask="additive", fill=fill, **chosen), torch.float16)
        assert added.bias.shape == wanted
        assert torch.equal(added.bias == number, ~call.mask)
    finite = space.call(space.choice(mask="additive", fill="finite", **chosen), torch.float16)
    assert finite.bias.abs().max() < 10
    assert finite.bias.unique().numel() > finite.bias.numel() // 2


@pytest.mark.parametrize("name", ["all", "all in squares"])
def test_a_call_is_the_same_in_every_dtype_but_for_rounding(name):
    space = Space(LARGE[name], seed=3)
    for chosen in space.covering().cases[:15]:
        exact = space.call(chosen, torch.float64)
        for dtype in DTYPES[1:]:
            call = space.call(chosen, dtype)
            for field in ("query", "key", "value", "sinks", "alibi"):
                tensor = getattr(call, field)
                if tensor is not None:
                    assert tensor.dtype == dtype
                    assert torch.equal(tensor, getattr(exact, field).to(dtype)), field
            for field in ("mask", "lengths"):
                if getattr(call, field) is not None:
                    assert torch.equal(getattr(call, field), getattr(exact, field))
            assert torch.equal(kept(call), kept(exact)) or chosen["fill"] not in (NONE, "-inf")


def test_another_seed_draws_another_call():
    first, second = (Space(ALL, seed=seed) for seed in (0, 1))
    chosen = first.choice(mask="boolean")
    calls = [space.call(chosen, torch.float32) for space in (first, first, second)]
    for field in ("query", "key", "value", "mask"):
        same, again, other = (getattr(call, field) for call in calls)
        assert torch.equal(same, again)
        assert not torch.equal(same, other)


def test_products_overflow_float16_where_they_are_to_and_the_scores_do_not():
    space = Space(Declared())
    for dims in ({"head_dim": 16}, {"head_dim": 64}, {"head_dim": 8}):
        call = space.call(space.choice(numbers="overflowing", **dims), torch.float16)
        products = call.query.double() @ call.key.double().mT
        assert products.min() > 65504
        assert (products * call.factor).max() < 65504


def test_each_way_of_numbers_gives_other_numbers():
    space = Space(Declared())
    chosen = {name: space.choice(numbers=name) for name in NUMBERS}
    queries = {name: space.call(one, torch.float32).query for name, one in chosen.items()}
    assert queries["large"].abs().max() > 10 * queries["ordinary"].abs().max()
    assert queries["tiny"].abs().max() < queries["ordinary"].abs().max() / 10
    assert all(
        not torch.equal(queries[one], queries[other]) for one, other in combinations(NUMBERS, 2)
    )


# --- few shapes, squares


def shapes(name):
    space = Space(LARGE[name])
    calls = [space.call(chosen, torch.float32) for chosen in space.covering().cases]
    return {tuple(tensor.shape for tensor in call.tensors) for call in calls}


def test_few_shapes_are_few():
    assert len(shapes("all in few shapes")) <= 4
    assert len(shapes("all")) > 20


def test_squares_are_squares_of_equal_widths():
    for query, key, value in shapes("all in squares"):
        assert query[-2:] == key[-2:] == value[-2:]


# --- as text


@pytest.mark.parametrize("name", LARGE)
def test_a_choice_is_read_as_it_was_written(name):
    space = Space(LARGE[name])
    for chosen in space.covering().cases:
        assert read(text_of(chosen), space) == chosen


def test_what_a_text_leaves_out_is_ordinary():
    space = Space(ALL)
    assert read("", space) == space.choice()
    chosen = read("mask=additive sizes=3x4 group=3", space)
    assert chosen == space.choice(mask="additive", sizes=(3, 4), group=3)
    assert (chosen["fill"], chosen["shape"]) == ("-inf", "(B, 1, L, S)")


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("colour=red", "replay: got 'colour=red'; accepted is feature=level, of sizes, batch, "),
        ("causal", "replay: got 'causal'; accepted is feature=level, of "),
        ("causal=yes", "replay: got 'yes'; accepted is one of False, True"),
        ("empty=True", "levels that can occur together"),
        ("causal=True scale=-0.4", "levels that can occur together"),
    ],
)
def test_a_text_that_names_no_choice_is_refused(text, says):
    with pytest.raises(ValueError, match=says):
        read(text, Space(ALL))


def test_a_feature_that_is_not_declared_is_refused_as_a_choice():
    with pytest.raises(ValueError, match="choice: got softcap; accepted is features among sizes, "):
        Space(Declared()).choice(softcap=True)


# --- smaller


def group_of_three_and_a_mask(chosen):
    return chosen["group"] == 3 and chosen["mask"] != NONE


def many_keys(chosen):
    return chosen["sizes"][1] >= 500


def one_query_of_wide_heads(chosen):
    return chosen["sizes"][0] == 1 and chosen["head_dim"] > 16


def one_head_alone(chosen):
    return chosen["key_heads"] * chosen["group"] == 1 and chosen["softcap"]


PLANTED = {
    group_of_three_and_a_mask: {
        "group": 3, "mask": "boolean", "sizes": (1, 1), "batch": 1, "key_heads": 1, "head_dim": 8
    },
    many_keys: {"sizes": (1, 513), "batch": 1, "key_heads": 1, "head_dim": 8},
    one_query_of_wide_heads: {"sizes": (1, 1), "head_dim": 40, "batch": 1, "key_heads": 1},
    one_head_alone: {"softcap": True, "key_heads": 1, "sizes": (1, 1), "batch": 1, "head_dim": 8},
}  # fmt: skip


@pytest.mark.parametrize("fails", PLANTED, ids=lambda fails: fails.__name__)
def test_what_fails_is_shrunk_to_the_smallest_call(fails):
    space = Space(ALL)
    failing = [chosen for chosen in space.covering().cases if fails(chosen)]
    assert failing
    for chosen in failing:
        smallest = shrunk(chosen, fails, space)
        assert fails(smallest)
        assert space.declared.possible(smallest)
        ordinary = space.choice()
        ordinary["shape"] = smallest["shape"]  # of one query and one key each is as small
        unlike = {name: level for name, level in smallest.items() if level != ordinary[name]}
        assert unlike == PLANTED[fails]


def test_a_square_stays_one_when_it_is_made_smaller():
    space = Space(replace(ALL, square=True))
    seen = []

    def fails(chosen):
        seen.append(chosen["sizes"])
        return chosen["sizes"][1] >= 3

    smallest = shrunk(space.choice(sizes=(33, 33)), fails, space)
    assert smallest["sizes"] == (3, 3)
    assert all(query_len == key_len for query_len, key_len in seen)


def test_the_smallest_of_what_fails_always_has_one_of_everything():
    space = Space(ALL)
    smallest = shrunk(space.covering().cases[-1], lambda chosen: True, space)
    call = space.call(smallest, torch.float32)
    assert call.query.shape == call.key.shape == (1, 1, 1, 8)
    assert call.value.shape == (1, 1, 1, 4)  # as usual
    assert call.arguments == {}
