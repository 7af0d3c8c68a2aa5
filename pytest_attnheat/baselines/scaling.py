"""What a softmax over keys was, from that over queries: a search for a factor of each key.

Both are exponentials of the same scores: the one is the other times a number for each key, each row
divided by its sum. The numbers are those for which rows and columns have the signed sums that a
sketch of the first one keeps. They are found by Gauss-Newton, each step of it by conjugate
gradients with the diagonal as their preconditioner: three steps as a rule, and a second for 4096
keys. The matrix is gone through in blocks of rows that stay in the cache.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from ..attention.chunks import spans
from ..attention.sketch import Side, positions

Floats = npt.NDArray[np.float32]

_BLOCK = 1 << 18
_STEPS, _INNER_STEPS, _STARTS = 8, 30, 6
# Where conjugate gradients end, as a part of where they began, and the search, as one of norms.
_INNER_END, _END = 1e-5, 3e-4
# By how much a logarithm changes at most in one step.
_LONGEST = 1.5
_TINY = 1e-30


def factors_of_keys(weights: Floats, rows: Side, columns: Side, number: int) -> Floats:
    """Return what weights are multiplied by, (keys,), so that rows, divided by their sums, fit."""
    search = _Search(weights, rows, columns, number)
    logarithms, damping = search.start(), 1e-2
    cost = search.cost()
    for _ in range(_STEPS):
        if search.worst() < _END:
            break
        step = np.clip(search.step(damping), -_LONGEST, _LONGEST)
        search.go_to(logarithms + step)
        if search.cost() < cost:
            logarithms, cost, damping = logarithms + step, search.cost(), damping / 10
        else:
            search.go_to(logarithms)
            damping *= 10
    found: Floats = np.exp(logarithms - logarithms.max())
    return found


class _Search:
    """Where a search is: the shares that weights have in their rows, and the numbers of these."""

    def __init__(self, weights: Floats, rows: Side, columns: Side, number: int) -> None:
        queries, keys = weights.shape
        self.weights, self.shares = weights, np.empty_like(weights)
        self.blocks = spans(queries, max(1, _BLOCK // keys))
        self.left, self.right = (positions(n)[1].astype(np.float32) for n in (queries, keys))
        self.wanted = [side.signed[number].astype(np.float32) for side in (rows, columns)]
        self.norms = [
            np.maximum(side.norms[number], _TINY).astype(np.float32) for side in (rows, columns)
        ]
        self.rows = np.zeros(queries, np.float32)
        self.columns = np.zeros(keys, np.float32)

    def go_to(self, logarithms: Floats) -> None:
        """Multiply weights by exponentials, one for each key."""
        factors = np.exp(logarithms - logarithms.max())
        self.columns = np.zeros_like(self.columns)
        for rows in self.blocks:
            block = np.multiply(self.weights[rows], factors, out=self.shares[rows])
            block /= np.maximum(block.sum(1, keepdims=True), _TINY)
            self.rows[rows] = block @ self.right
            self.columns += self.left[rows] @ block

    def start(self) -> Floats:
        """Begin where columns have about the norms that they shall have."""
        logarithms = np.zeros_like(self.columns)
        for _ in range(_STARTS):
            self.go_to(logarithms)
            norms = np.sqrt(np.maximum(self.squares(np.ones_like(self.rows)), _TINY))
            logarithms = logarithms + np.log(self.norms[1] / norms)
        self.go_to(logarithms)
        return logarithms

    def off(self) -> list[Floats]:
        """Return how far numbers of rows and of columns are off, as a part of their norms."""
        reached = (self.rows, self.columns)
        return [(n - w) / norm for n, w, norm in zip(reached, self.wanted, self.norms, strict=True)]

    def cost(self) -> float:
        return sum(float(off @ off) for off in self.off())

    def worst(self) -> float:
        return max(float(np.abs(off).max()) for off in self.off())

    def step(self, damping: float) -> Floats:
        """Return the step that a linear model of the numbers asks for."""
        rows, columns = (off / norm for off, norm in zip(self.off(), self.norms, strict=True))
        of_rows = 1 / self.norms[0] ** 2
        diagonal = self.right**2 * self.squares(of_rows) + damping
        diagonal += self.squares(of_rows * self.rows**2) + (self.columns / self.norms[1]) ** 2
        diagonal -= 2 * self.right * self.squares(of_rows * self.rows)
        step: Floats = np.zeros_like(columns)
        left = -self.back(rows, columns)
        scaled = left / diagonal
        towards, size = scaled, float(left @ scaled)
        end = _INNER_END * size
        for _ in range(_INNER_STEPS):
            image = self.back(*self.forth(towards)) + damping * towards
            length = size / max(float(towards @ image), _TINY)
            step, left = step + length * towards, left - length * image
            scaled, before = left / diagonal, size
            size = float(left @ scaled)
            if size < end:
                break
            towards = scaled + size / before * towards
        return step

    def squares(self, of_rows: Floats) -> Floats:
        """Return for each key the sum of the squares of its shares, each times one of a row."""
        found = np.zeros_like(self.columns)
        for rows in self.blocks:
            found += of_rows[rows] @ (self.shares[rows] ** 2)
        return found

    def forth(self, change: Floats) -> tuple[Floats, Floats]:
        """Return how numbers follow a change of logarithms, divided by norms twice."""
        both = np.stack([self.right * change, change], 1)
        of_rows, lost = np.empty_like(self.rows), np.zeros_like(self.columns)
        for rows in self.blocks:
            block = self.shares[rows]
            signed, plain = (block @ both).T
            of_rows[rows] = signed - self.rows[rows] * plain
            lost += (self.left[rows] * plain) @ block
        of_columns = self.columns * change - lost
        return of_rows / self.norms[0] ** 2, of_columns / self.norms[1] ** 2

    def back(self, of_rows: Floats, of_columns: Floats) -> Floats:
        """Return how a cost of numbers follows logarithms: the transpose of `forth`."""
        signed, lost = np.zeros_like(self.columns), np.zeros_like(self.columns)
        for rows in self.blocks:
            block, own = self.shares[rows], of_rows[rows]
            plain = self.rows[rows] * own + self.left[rows] * (block @ of_columns)
            both = np.stack([own, plain]) @ block
            signed += both[0]
            lost += both[1]
        found: Floats = self.right * signed - lost + self.columns * of_columns
        return found
