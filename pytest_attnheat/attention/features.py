"""What a caller declares of a call, checked before anything is computed of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from pytest_attnheat.inputs import as_whole, check_number, dtype_name, misuse, whole_number

_LEAST = {"chunk": 1, "prefix": 0, "sink_keys": 0}
# Functions of positions.
FUNCTIONS = ("may_see", "score_mod")


def check_features(
    features: Mapping[str, Any],  # By their names in `Call`; None is not looked at
    query_shape: Sequence[int],  # (..., heads, query_len, head_dim)
    key_shape: Sequence[int],  # (..., key_heads, key_len, head_dim)
    device: torch.device,  # Where they are: functions of positions are called there, once
) -> None:
    """Refuse a window, lengths, slopes ... that say nothing of queries and keys of these shapes."""
    heads = query_shape[-3] if len(query_shape) > 2 else 1
    batch = torch.Size(query_shape[:-3]).numel()
    sizes = {"lengths": key_shape[-2], "query_lengths": query_shape[-2]}
    for name, given in features.items():
        if given is None:
            continue
        if name in _LEAST:
            whole_number(name, given, least=_LEAST[name])
        elif name == "window":
            _check_window(given)
        elif name == "softcap" and check_number(given, name) <= 0:
            raise ValueError(misuse(name, repr(given), "a number above 0, or None"))
        elif name in ("alibi", "sinks"):
            _check_shape(name, given, (heads,), "(heads,)")
        elif name in sizes:
            _check_shape(name, given, (batch,), "(batch,)")
            if not all(0 <= one <= sizes[name] for one in given.tolist()):
                raise ValueError(misuse(name, given.tolist(), f"numbers from 0 to {sizes[name]}"))
        elif name == "documents":
            _check_documents(given, (batch, query_shape[-2]), (batch, key_shape[-2]))
        elif name == "scale":
            check_number(given, name)
        elif name in FUNCTIONS:
            check_function(name, given, device)


def check_function(name: str, given: Any, device: torch.device | str = "cpu") -> None:
    """Call a function of positions, of `FUNCTIONS`, once, of the first query and key, if any."""
    if given is None:
        return
    scored = name == "score_mod"
    takes = "score, " * scored + "batch, head, query position, key position"
    returns = "a tensor of scores" if scored else "a tensor of booleans"
    accepted = f"a function of ({takes}), elementwise, that returns {returns}"
    if not callable(given):
        raise TypeError(misuse(name, type(given).__name__, accepted))
    at = torch.zeros(1, 1, 1, dtype=torch.long, device=device)
    first = [at.float()] if scored else []
    try:
        found = given(*first, at, at, at, at)
    except Exception as error:
        raised = f"one that raised {type(error).__name__}: {error}"
        raise ValueError(misuse(name, raised, accepted)) from error
    if not isinstance(found, torch.Tensor):
        raise TypeError(misuse(name, f"one that returned {type(found).__name__}", accepted))
    if (found.dtype == torch.bool) == scored or found.numel() != 1:
        returned = f"one that returned {dtype_name(found)} {tuple(found.shape)}"
        raise ValueError(misuse(name, returned, accepted))


def slopes_of(function: Any, heads: int) -> torch.Tensor:
    """Return the slopes that a function of the number of heads gives, (heads,); lists are taken."""
    accepted = f"a function of the number of heads that returns one number for each, here {heads}"
    try:
        found = function(heads)
    except Exception as error:
        raised = f"one that raised {type(error).__name__}: {error}"
        raise ValueError(misuse("alibi", raised, accepted)) from error
    try:
        slopes = torch.as_tensor(found)
    except (TypeError, ValueError, RuntimeError):
        got = f"one that returned {type(found).__name__}"
        raise TypeError(misuse("alibi", got, accepted)) from None
    if tuple(slopes.shape) != (heads,):
        got = f"one that returned {dtype_name(slopes)} {tuple(slopes.shape)}"
        raise ValueError(misuse("alibi", got, accepted))
    return slopes


def _check_window(given: object) -> None:
    accepted = "a pair (left, right), each a whole number from 0, or None for no limit"
    wrong = misuse("window", repr(given), accepted)
    if not isinstance(given, (tuple, list)) or len(given) != 2:
        raise TypeError(wrong)
    for side in (one for one in given if one is not None):
        if (number := as_whole(side)) is None:
            raise TypeError(wrong)
        if number < 0:
            raise ValueError(wrong)


def _check_documents(given: object, queries: tuple[int, int], keys: tuple[int, int]) -> None:
    accepted = f"a pair of tensors, {queries} of the queries and {keys} of the keys"
    if not isinstance(given, (tuple, list)) or len(given) != 2:
        raise TypeError(misuse("documents", type(given).__name__, accepted))
    for one, shape in zip(given, (queries, keys), strict=True):
        _check_shape("documents", one, shape, "(batch, length)")


def _check_shape(name: str, given: object, shape: tuple[int, ...], said: str) -> None:
    if not isinstance(given, torch.Tensor):
        raise TypeError(misuse(name, type(given).__name__, f"a tensor {said}, here {shape}"))
    if tuple(given.shape) != shape:
        got = f"a tensor {tuple(given.shape)}"
        raise ValueError(misuse(name, got, f"a tensor {said}, here {shape}"))
