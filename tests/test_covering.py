"""Cases that cover every pair of levels."""

from itertools import combinations, product

import pytest

from pytest_attnheat.attention.covering import covering

LEVELS = {
    "mask": ["none", "boolean", "additive"],
    "causal": [False, True],
    "lengths": ["equal", "fewer", "more"],
    "window": [None, (2, 0), (0, 2), (2, 2)],
    "groups": [1, 2, 3, 4, 6],
}


def anything(chosen):
    return True


def no_window_ahead_if_causal(chosen):
    return not (chosen.get("causal") and (chosen.get("window") or (0, 0))[1])


def pairs_in(cases, levels):
    return {
        ((one, case[one]), (other, case[other]))
        for case in cases
        for one, other in combinations(levels, 2)
    }


def possible_pairs(levels, possible):
    """All pairs that occur in some possible case, by trying all cases."""
    everything = [dict(zip(levels, chosen, strict=True)) for chosen in product(*levels.values())]
    return pairs_in(filter(possible, everything), levels)


@pytest.mark.parametrize("possible", [anything, no_window_ahead_if_causal])
@pytest.mark.parametrize("seed", range(5))
def test_every_pair_that_can_occur_occurs(possible, seed):
    found = covering(LEVELS, possible, seed=seed)
    wanted = possible_pairs(LEVELS, possible)
    assert all(possible(case) for case in found.cases)
    assert pairs_in(found.cases, LEVELS) == wanted
    assert found.pairs == len(wanted)
    every = sum(len(a) * len(b) for a, b in combinations(LEVELS.values(), 2))
    assert found.impossible == every - len(wanted)


def test_a_pair_is_impossible_if_no_third_level_completes_it():
    levels = {"a": [0, 1], "b": [0, 1], "c": [0, 1]}

    def one_at_most(chosen):  # of c = 1 or c = 0 neither fits with a and b both 1
        return chosen.get("a", 0) + chosen.get("b", 0) < 2 or "c" not in chosen

    found = covering(levels, one_at_most)
    assert found.impossible == 1
    assert not any(case["a"] and case["b"] for case in found.cases)


def test_the_first_case_is_the_ordinary_one_and_there_are_few():
    found = covering(LEVELS, anything)
    assert found.cases[0] == {name: levels[0] for name, levels in LEVELS.items()}
    assert len(found.cases) <= 30  # of 360; at least 5 * 4


def test_the_seed_alone_decides():
    assert covering(LEVELS, anything, seed=3) == covering(LEVELS, anything, seed=3)


def test_where_there_is_nothing_to_pair_the_ordinary_case_is_left():
    assert covering({"mask": ["none"]}, anything).cases == ({"mask": "none"},)
