"""Grouped heads: query heads that follow one another share one head of keys and values.

`groups` is how many share one; with 1, everything stays as it is, also without any heads.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def as_of_keys(leading: Sequence[int], groups: int) -> tuple[int, ...]:
    """Return the leading index of a query, or the leading shape of all, as that of the keys."""
    if groups == 1:
        return tuple(leading)
    return (*leading[:-1], leading[-1] // groups)


def for_each_query_head(of_keys: Tensor, groups: int, *, dim: int = -2) -> Tensor:
    """Repeat what belongs to a head of keys for the query heads that share it."""
    return of_keys if groups == 1 else of_keys.repeat_interleave(groups, dim)


def of_the_first(of_queries: Tensor, groups: int, *, dim: int = -2) -> Tensor:
    """Of the query heads that share their keys, take what belongs to the first."""
    return of_queries if groups == 1 else _grouped(of_queries, groups, dim).select(dim, 0)


def of_any(of_queries: Tensor, groups: int, *, dim: int = -2) -> Tensor:
    """Tell what is true of any of the query heads that share their keys."""
    return of_queries if groups == 1 else _grouped(of_queries, groups, dim).any(dim)


def _grouped(of_queries: Tensor, groups: int, dim: int) -> Tensor:
    # Counted from the end, a dimension is then that of the heads within a group.
    assert dim < 0
    return torch.unflatten(of_queries, dim, (-1, groups))
