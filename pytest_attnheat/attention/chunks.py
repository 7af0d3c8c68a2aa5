"""Going through tensors of any size in pieces of bounded size, and finding the way back.

Pictures of NumPy arrays are cut here too, so that nothing imports torch.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator, Sequence
from itertools import product
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

# The most that one step over a few queries may allocate.
CHUNK_BYTES = 64 * 2**20
# How often what takes long tells how far it is, in seconds.
_SECONDS = 2.0
# What it is told; under pytest the plugin shows it as it comes.
LOG = logging.getLogger("pytest_attnheat")


class Progress:
    """Tells the log how far something is that takes longer than some seconds.

    `done` says what becomes of its steps: "are read". Where they are even, each takes as long, so
    that it is known how long is left.
    """

    def __init__(self, name: str, steps: int, done: str, *, even: bool = True) -> None:
        self._name, self._steps, self._what, self._even = name, steps, done, even
        self._done = 0
        self._start = self._told = time.monotonic()

    def step(self) -> None:
        """Count a step that begins, and tell every few seconds."""
        self.at(self._done)
        self._done += 1

    def at(self, done: int) -> None:
        """Tell, every few seconds, that so many steps are done."""
        now = time.monotonic()
        if now - self._told <= _SECONDS:
            return
        self._told, share, past = now, done / self._steps, now - self._start
        said = f"{done} of {self._steps} {self._what}, after {past:.0f} s"
        if self._even:
            left = f", about {past * (1 / share - 1):.0f} s are left" if share else ""
            said = f"{100 * share:.0f} % {self._what}{left}"
        LOG.info("%s: %s", self._name, said)


def pieces(shape: Sequence[int], limit: int) -> Iterator[tuple[slice, ...]]:
    """Cut a shape into boxes of at most `limit` elements, in order: a slice for each dimension."""
    # Leading dimensions are cut first, trailing ones stay whole as long as they fit, so that many
    # tiny matrices make few boxes and one huge row several.
    inner = 1
    cut = len(shape)
    while cut > 0 and inner * shape[cut - 1] <= limit:
        cut -= 1
        inner *= shape[cut]
    whole = tuple(slice(0, size) for size in shape[cut:])
    if cut == 0:
        yield whole
        return
    steps = [*(range(size) for size in shape[: cut - 1])]
    last = spans(shape[cut - 1], max(1, limit // inner))
    for outer in product(*steps):
        for span in last:
            yield (*(slice(i, i + 1) for i in outer), span, *whole)


def spans(size: int, step: int, *, multiple_of: int = 1) -> list[slice]:
    """Cut a length into spans of at most `step`, of even length."""
    # A length of 1025 in steps of 1024 makes 513 and 512, not 1024 and 1. No length at all is one
    # empty span, so that there is always something to concatenate. Each span but the last is a
    # multiple of `multiple_of`, even where that is more than `step`.
    units = -(-size // multiple_of)
    most = max(1, step // multiple_of)
    step = max(1, -(-units // max(1, -(-units // most)))) * multiple_of
    return [slice(start, min(start + step, size)) for start in range(0, max(1, size), step)]


def query_chunks(query_len: int, bytes_per_query: int) -> list[slice]:
    """Split the queries so that one chunk needs at most CHUNK_BYTES, or holds one query."""
    return spans(query_len, max(1, CHUNK_BYTES // max(1, bytes_per_query)))


def index_of(flat: torch.Tensor | int, shape: Sequence[int]) -> tuple[int, ...]:
    """Return the index of an element counted through a whole shape."""
    left = int(flat)
    index: list[int] = []
    for size in reversed(shape):
        left, within = divmod(left, size)
        index.insert(0, within)
    return tuple(index)


def index_within(box: Sequence[slice], flat: torch.Tensor | int) -> tuple[int, ...]:
    """Return the index, in the whole tensor, of an element counted within a box."""
    own = index_of(flat, [span.stop - span.start for span in box])
    return tuple(span.start + i for span, i in zip(box, own, strict=True))
