"""What is done to scores between the product that makes them and the softmax."""

from __future__ import annotations

import math
from dataclasses import replace
from numbers import Number
from typing import Any

import torch
from torch import Tensor

from pytest_attnheat.attention.vocabulary import HIDDEN_FROM
from pytest_attnheat.capture.tags import Scores


def changed(
    scores: Scores, name: str, args: tuple[Any, ...], kwargs: dict[str, Any], place: int
) -> Scores:
    """What scores are after one more step; not exact after a step that is not understood."""
    base = _base(name)
    other = next((a for index, a in enumerate(args) if index != place), kwargs.get("other"))
    if base in _FACTORS:
        factor = factor_of(name, args, kwargs, place)
        if factor is None:
            return replace(scores, exact=False)
        bias = None if scores.bias is None else scores.bias * factor
        return replace(scores, scale=scores.scale * factor, bias=bias)
    if base in ("add", "radd", "sub") and not kwargs:
        if not isinstance(other, Tensor) or other.shape[-1:] == (1,) or other.ndim == 0:
            return scores if place == 0 or base != "sub" else replace(scores, exact=False)
        if base == "sub" and place == 1:
            return replace(scores, exact=False)
        more = other if base != "sub" else -other
        bias = more if scores.bias is None else scores.bias + more
        return replace(scores, bias=bias.detach())
    if base in ("masked_fill", "where"):
        return _hidden(scores, base, args, kwargs, place)
    if base in _SHUFFLES:
        return replace(scores, exact=False, kept=False)
    return scores if base in _HARMLESS else replace(scores, exact=False)


_FACTORS = ("mul", "div", "truediv", "multiply", "divide", "rmul")


def factor_of(name: str, args: tuple[Any, ...], kwargs: dict[str, Any], place: int) -> float | None:
    """The number that a function multiplies its tensor by; None if it does something else."""
    base = _base(name)
    if base not in _FACTORS or ("div" in base and place == 1):
        return None
    other = next((a for index, a in enumerate(args) if index != place), kwargs.get("other"))
    factor = number_of(other)
    if factor is None or factor == 0 or not math.isfinite(factor):
        return None
    return 1 / factor if "div" in base else factor


def _base(name: str) -> str:
    """The name of a function without what marks operators and what works in place."""
    return name.strip("_").removeprefix("i") if name.startswith("__") else name.rstrip("_")


# What moves scores to other places, though their number stays.
_SHUFFLES = {
    "getitem", "flip", "fliplr", "flipud", "roll", "rot90", "gather", "index_select", "sort",
    "take_along_dim", "narrow", "slice",
}  # fmt: skip
# What changes no softmax.
_HARMLESS = {"nan_to_num", "detach", "contiguous"}


def _hidden(
    scores: Scores, base: str, args: tuple[Any, ...], kwargs: dict[str, Any], place: int
) -> Scores:
    if base == "masked_fill":
        mask, fill = kwargs.get("mask", args[1] if len(args) > 1 else None), None
        fill = kwargs.get("value", args[2] if len(args) > 2 else None)
        seen = ~mask if isinstance(mask, Tensor) and mask.dtype == torch.bool else None
    else:
        condition, fill = args[0], args[3 - place] if len(args) > 2 else None
        bools = isinstance(condition, Tensor) and condition.dtype == torch.bool
        seen = (condition if place == 1 else ~condition) if bools else None
    if seen is None or not _hides(fill):
        return replace(scores, exact=False)
    return also_masked(scores, seen)


def also_masked(scores: Scores, seen: Tensor) -> Scores:
    """Scores of which some more are hidden."""
    return replace(scores, mask=seen if scores.mask is None else scores.mask & seen)


def _hides(fill: object) -> bool:
    """Whether scores that are overwritten by this get no weight."""
    if isinstance(fill, Tensor):
        return fill.numel() > 0 and not fill.is_meta and bool((fill <= HIDDEN_FROM).all())
    value = number_of(fill)
    return value is not None and value <= HIDDEN_FROM


def number_of(value: object) -> float | None:
    """A Python number, or a tensor of one that is on the CPU."""
    if isinstance(value, Number) and not isinstance(value, complex):
        return float(value)  # type: ignore[arg-type]
    if isinstance(value, Tensor) and value.numel() == 1 and value.device.type == "cpu":
        return float(value.detach())
    return None
