"""Changes that are planted in attention maps, for tests and tables: twenty kinds of them."""

import numpy as np


def scores_of(rows, columns, size):
    """Draw causal scores from a seed: -inf for keys after their query."""
    scores = np.random.default_rng(0).normal(size=(rows, columns, size, size)) * 2
    return np.where(np.tril(np.ones((size, size), bool)), scores, -np.inf).astype(np.float32)


def softmax(scores, axis=-1):
    exponent = np.exp(scores - scores.max(axis, keepdims=True))
    return exponent / exponent.sum(axis, keepdims=True)


def _in_last(change):
    """Change the last map alone; `change` takes it, and a query in its middle."""

    def made(scores):
        weights = softmax(scores)
        change(weights[-1, -1], weights.shape[-1] // 2)
        return weights

    return made


def _median_times(factor):
    def change(panel, _query):
        row = panel[-1]
        row[np.argsort(row)[len(row) // 2]] *= factor

    return _in_last(change)


def _added(panel, query):
    panel[query, 1] += 0.001


def _queries_swapped(panel, query):
    panel[[query - 1, query]] = panel[[query, query - 1]]


def _keys_swapped(panel, _query):
    panel[:, [1, 2]] = panel[:, [2, 1]]


def _two_swapped(panel, query):
    panel[query, [0, 1]] = panel[query, [1, 0]]


def _leak(panel, query):
    panel[query] *= 0.8
    panel[query, -1] += 0.2


def _one_hot(panel, query):
    panel[query] = np.eye(len(panel))[2]


def _transposed(panel, _query):
    panel[:] = panel.T.copy()


def _smaller(panel, _query):
    panel *= 0.95


def _emptied(panel, query):
    panel[query] = 0


def _nan(panel, query):
    panel[query, query] = np.nan


def _heads_swapped(scores):
    weights = softmax(scores)
    weights[[0, -1], [0, -1]] = weights[[-1, 0], [-1, 0]]
    return weights


def _heads_averaged(scores):
    return np.repeat(softmax(scores).mean(1, keepdims=True), scores.shape[1], axis=1)


KINDS = {
    "one weight changed by 0.001": _in_last(_added),
    "a median weight set to 0": _median_times(0),
    "a median weight doubled": _median_times(2),
    "two weights of a row swapped": _in_last(_two_swapped),
    "two queries swapped": _in_last(_queries_swapped),
    "two keys swapped": _in_last(_keys_swapped),
    "two heads swapped": _heads_swapped,
    "one head transposed": _in_last(_transposed),
    "one head times 0.95": _in_last(_smaller),
    "one row one-hot": _in_last(_one_hot),
    "one row emptied": _in_last(_emptied),
    "0.2 of a row on a future key": _in_last(_leak),
    "one NaN": _in_last(_nan),
    "all weights times 0.5": lambda scores: softmax(scores) * 0.5,
    "logits instead of weights": lambda scores: np.where(np.isinf(scores), -1e9, scores),
    "temperature 1.05": lambda scores: softmax(scores / 1.05),
    "heads averaged": _heads_averaged,
    "softmax over queries": lambda scores: softmax(scores, -2),
    "sigmoid in place of softmax": lambda scores: 1 / (1 + np.exp(-scores)),
    "no causal mask": lambda scores: softmax(np.where(np.isinf(scores), 0, scores)),
}
# What needs several heads.
OF_HEADS = ("two heads swapped", "heads averaged")
# What a comparison says of a kind, where all weights are shown.
SAID = {
    "two queries swapped": "the queries are permuted",
    "two keys swapped": "the keys are permuted",
    "two heads swapped": "the panels are permuted",
    "one head transposed": "transposed",
    "one head times 0.95": "multiplied by 0.95",
    "all weights times 0.5": "multiplied by 0.5",
    "temperature 1.05": "another temperature",
    "heads averaged": "heads are averaged",
    "softmax over queries": "runs over the queries",
    "sigmoid in place of softmax": "the sigmoid of its scores",
}


def kinds_of(columns):
    """Name the kinds that change a grid of so many columns."""
    return [kind for kind in KINDS if columns > 1 or kind not in OF_HEADS]
