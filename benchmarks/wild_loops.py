"""What attention gives, in plain loops: the second opinion on what `wild.py` calls wrong.

Nothing here comes from `pytest_attnheat`, and nothing is a tensor: numbers are floats of Python,
which are float64, in lists [batch][head][position][width]. A problem is a small call with its
answers: the one that is documented, and the one that the package gives.
"""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Callable
from dataclasses import dataclass

Numbers = list[list[list[list[float]]]]
Seen = Callable[[int, int, int, int], bool]


@dataclass
class Problem:
    """A small call, and what it gives.

    Attributes:
        query: Numbers [batch][head][query][width]; the key and the value in the same way.
        key: One vector for each key.
        value: One vector for each key.
        mask: Who may be seen, as the package takes it, or None.
        documented: What the package is said to give.
        does: What it gives, as far as loops can tell; it may look at the output, where chance has
            a part in that.
    """

    query: Numbers
    key: Numbers
    value: Numbers
    mask: list | None
    documented: Numbers
    does: Callable[[Numbers], Numbers]


def attend(
    query: Numbers, key: Numbers, value: Numbers, seen: Seen, scale: float | None = None
) -> Numbers:
    """Attention; `seen(batch, head, query, key)` says who is seen.

    Scores are multiplied by width ** -0.5, or `scale`. Who sees nothing gets the mean of all
    values, as masks that are large numbers make it.
    """
    output = []
    for b, heads in enumerate(query):
        output.append([])
        for h, queries in enumerate(heads):
            output[b].append([])
            keys, values = key[b][h], value[b][h]
            for i, q in enumerate(queries):
                weights = _weights(q, keys, [seen(b, h, i, j) for j in range(len(keys))], scale)
                output[b][h].append(_mixed(weights, values))
    return output


def _weights(
    q: list[float], keys: list[list[float]], seen: list[bool], scale: float | None
) -> list[float]:
    factor = len(q) ** -0.5 if scale is None else scale
    scores = [factor * _product(q, k) for k in keys]
    if not any(seen):
        return [1 / len(keys)] * len(keys)
    largest = max(score for score, one in zip(scores, seen, strict=True) if one)
    powers = [math.exp(s - largest) if one else 0.0 for s, one in zip(scores, seen, strict=True)]
    return [power / sum(powers) for power in powers]


def _product(a: list[float], b: list[float]) -> float:
    return sum(x * y for x, y in zip(a, b, strict=True))


def _mixed(weights: list[float], values: list[list[float]]) -> list[float]:
    width = len(values[0])
    return [sum(w * v[d] for w, v in zip(weights, values, strict=True)) for d in range(width)]


def apart(one: Numbers, other: Numbers) -> float:
    """The largest difference of two outputs; NaN counts as infinite."""
    worst = 0.0
    for (b, h, i, d), x in _each(one):
        off = abs(x - other[b][h][i][d])
        worst = max(worst, math.inf if math.isnan(off) else off)
    return worst


def _each(numbers: Numbers) -> list[tuple[tuple[int, int, int, int], float]]:
    return [
        ((b, h, i, d), x)
        for b, heads in enumerate(numbers)
        for h, rows in enumerate(heads)
        for i, row in enumerate(rows)
        for d, x in enumerate(row)
    ]


def drawn(batch: int, heads: int, length: int, width: int, seed: int) -> Numbers:
    """Numbers of a normal distribution, twice as wide as usual so that keys differ in weight."""
    source = random.Random(seed)
    return [
        [[[source.gauss(0, 2) for _ in range(width)] for _ in range(length)] for _ in range(heads)]
        for _ in range(batch)
    ]


def _three(batch: int, heads: int, queries: int, keys: int) -> tuple[Numbers, Numbers, Numbers]:
    return (
        drawn(batch, heads, queries, 2, 1),
        drawn(batch, heads, keys, 2, 2),
        drawn(batch, heads, keys, 2, 3),
    )


def _problem(
    numbers: tuple[Numbers, Numbers, Numbers],
    documented: Seen,
    does: Seen,
    mask: list | None = None,
) -> Problem:
    given = attend(*numbers, does)
    return Problem(*numbers, mask, attend(*numbers, documented), lambda output: given)


# The problems, one for each kind of mistake.


def causal_offset_negated() -> Problem:
    """Two keys more than queries: the offset of the causal mask is -2, not 2."""
    return _problem(
        _three(1, 1, 3, 5), lambda b, h, i, j: j <= i + 2, lambda b, h, i, j: j <= i - 2
    )


def causal_from_top_left() -> Problem:
    """Two keys more than queries: the mask is counted from the first, not from the last."""
    return _problem(_three(1, 1, 2, 4), lambda b, h, i, j: j <= i + 2, lambda b, h, i, j: j <= i)


def causal_ignored() -> Problem:
    """A query sees what comes after it."""
    return _problem(_three(1, 1, 2, 2), lambda b, h, i, j: j <= i, lambda b, h, i, j: True)


def mask_ignored() -> Problem:
    """A mask (batch, keys) that hides the last key, and changes nothing."""
    mask = [[True, True, False]]
    return _problem(
        _three(1, 1, 3, 3), lambda b, h, i, j: mask[b][j], lambda b, h, i, j: True, mask
    )


def mask_of_another_sample() -> Problem:
    """Two samples, two heads: head h of sample b is masked as sample (2 b + h) % 2 is to be."""
    mask = [[[True, False], [True, False]], [[True, True], [True, True]]]
    return _problem(
        _three(2, 2, 2, 2),
        lambda b, h, i, j: mask[b][i][j],
        lambda b, h, i, j: mask[(2 * b + h) % 2][i][j],
        mask,
    )


def padding_attended() -> Problem:
    """Three keys: a fourth one, of zeros, takes a part of the weight."""
    query, key, value = _three(1, 1, 3, 3)
    padded_key, padded_value = ([[[*rows, [0.0, 0.0]] for rows in one[0]]] for one in (key, value))
    given = attend(query, padded_key, padded_value, lambda b, h, i, j: True)
    right = attend(query, key, value, lambda b, h, i, j: True)
    return Problem(query, key, value, None, right, lambda output: given)


def scale_from_embedding() -> Problem:
    """Two heads of width 2: the scale is 4 ** -0.5, not 2 ** -0.5."""
    numbers = _three(1, 2, 2, 2)
    given = attend(*numbers, lambda b, h, i, j: True, 4**-0.5)
    right = attend(*numbers, lambda b, h, i, j: True)
    return Problem(*numbers, None, right, lambda output: given)


def mask_ignored_in_two_heads() -> Problem:
    """As `mask_ignored`, with two heads of width 2 and a scale of 4 ** -0.5 in either answer."""
    numbers, mask = _three(1, 2, 3, 3), [[True, True, False]]
    numbers = (numbers[0], numbers[0], numbers[0])
    given = attend(*numbers, lambda b, h, i, j: True, 4**-0.5)
    right = attend(*numbers, lambda b, h, i, j: mask[b][j], 4**-0.5)
    return Problem(*numbers, mask, right, lambda output: given)


def dropout_when_evaluating() -> Problem:
    """Half of the weights are dropped, and the others doubled, though it is evaluating."""
    numbers = _three(1, 2, 4, 4)
    query, key, value = numbers[0], numbers[0], numbers[0]

    def nearest(output: Numbers) -> Numbers:
        """Each row with those weights dropped that bring it nearest to the output."""
        rows: Numbers = [[[], []]]
        for h, i in itertools.product(range(2), range(4)):
            weights = _weights(query[0][h][i], key[0][h], [True] * 4, None)
            tried = [
                _mixed([2 * w * k for w, k in zip(weights, kept, strict=True)], value[0][h])
                for kept in itertools.product((0, 1), repeat=4)
            ]
            found = output[0][h][i]
            rows[0][h].append(min(tried, key=lambda row: math.dist(row, found)))
        return rows

    right = attend(query, key, value, lambda b, h, i, j: True)
    return Problem(query, key, value, None, right, nearest)


def masked_keys_in_the_sum() -> Problem:
    """Linear attention of the features max(x, 0) + 0.001: a masked key is in the sum."""
    x, mask = drawn(1, 1, 3, 2, 1), [[True, True, False]]

    def features(row: list[float]) -> list[float]:
        return [max(number * 2**-0.25, 0.0) + 0.001 for number in row]

    def linear(in_sum: list[bool]) -> Numbers:
        rows = []
        for q in x[0][0]:
            powers = [_product(features(q), features(k)) for k in x[0][0]]
            total = sum(power for power, one in zip(powers, in_sum, strict=True) if one)
            kept = [p / total if one else 0.0 for p, one in zip(powers, mask[0], strict=True)]
            rows.append(_mixed(kept, x[0][0]))
        return [[rows]]

    given = linear([True, True, True])
    return Problem(x, x, x, mask, linear(mask[0]), lambda output: given)
