"""How attention is asked to be and how it is judged: what the caller says, after checking."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from numbers import Real
from typing import Any, TypeAlias, get_args

import torch
from torch import Tensor

from pytest_attnheat.assertions.behaviour.functions import AttentionFunction
from pytest_attnheat.assertions.behaviour.subject import as_input
from pytest_attnheat.attention.cases import DTYPES
from pytest_attnheat.attention.scoring import broadcast
from pytest_attnheat.attention.vocabulary import DeclaredFullyMasked
from pytest_attnheat.inputs import check_number, seed_number

Function: TypeAlias = Callable[..., Any]


@dataclass(frozen=True)
class Options:
    """How attention is asked to be."""

    attn_mask: Tensor | None
    is_causal: bool
    scale: float | None
    enable_gqa: bool
    arguments: Mapping[str, Any]

    def given(self) -> dict[str, Any]:
        """Those that differ from the defaults."""
        given = dict(self.arguments)
        if self.attn_mask is not None:
            given["attn_mask"] = self.attn_mask
        if self.is_causal:
            given["is_causal"] = True
        if self.scale is not None:
            given["scale"] = self.scale
        if self.enable_gqa:
            given["enable_gqa"] = True
        return given


@dataclass(frozen=True)
class Terms:
    """How it is judged."""

    fully_masked: DeclaredFullyMasked
    reference: Function | None
    factor: float
    gradients: bool
    training: bool
    seed: int


def check_terms(options: Options, terms: Terms) -> None:
    """Refuse what is unknown, out of range or leaves nothing to compare with."""
    if terms.fully_masked not in get_args(DeclaredFullyMasked):
        raise ValueError(
            f"fully_masked: got {terms.fully_masked!r}; accepted are 'zero', 'uniform', 'nan' and "
            "'undefined'"
        )
    _check_factor(terms.factor)
    if terms.reference is not None and not callable(terms.reference):
        raise TypeError(
            f"reference: got {type(terms.reference).__name__}; accepted is a function, or None"
        )
    for name in ("is_causal", "enable_gqa"):
        if not isinstance(getattr(options, name), bool):
            raise TypeError(f"{name}: got {getattr(options, name)!r}; accepted are True and False")
    if options.scale is not None:
        check_number(options.scale, "scale")
    if options.arguments.get("dropout_p"):
        raise ValueError(
            f"dropout_p: got {options.arguments['dropout_p']!r}; dropout draws at random, so there "
            "is no reference to compare with"
        )
    seed_number(terms.seed)


def _check_factor(factor: object) -> None:
    if isinstance(factor, bool) or not isinstance(factor, Real):
        raise TypeError(f"factor: got {type(factor).__name__}; accepted is a number above 0")
    if not 0 < float(factor) < math.inf:
        raise ValueError(f"factor: got {factor!r}; accepted is a finite number above 0")


def check_inputs(subject: AttentionFunction) -> None:
    """Refuse what no reference can be computed for."""
    for name in ("query", "key", "value"):
        tensor = getattr(subject, name)
        if str(tensor.dtype).removeprefix("torch.") not in DTYPES:
            raise TypeError(f"{name}: got {tensor.dtype}; accepted are {', '.join(DTYPES)}")
        if not bool(tensor.isfinite().all()):
            raise ValueError(
                f"{name}: holds NaN or inf, and so would the reference; accepted are finite numbers"
            )
    if subject.query.shape[-1] != subject.key.shape[-1]:
        raise ValueError(
            f"query and key must have the same width; got query {tuple(subject.query.shape)} and "
            f"key {tuple(subject.key.shape)}"
        )


def permitted_keys(subject: AttentionFunction, options: Options) -> Tensor:
    """Which keys each query may attend to, (..., query_len or 1, key_len), after checking."""
    shape = (*subject.leading, subject.query.shape[-2], subject.key.shape[-2])
    seen = torch.ones(shape[-2:], dtype=torch.bool, device=subject.query.device)
    if options.is_causal:
        seen = seen.tril()
    if options.attn_mask is None:
        return seen.expand(shape)
    mask = as_input(options.attn_mask, "attn_mask")
    if mask.dtype != torch.bool and not mask.is_floating_point():
        raise TypeError(
            f"attn_mask: got {mask.dtype}; accepted is a boolean torch.Tensor, True where a query "
            "may attend, or a tensor of floats that is added to the scores"
        )
    try:
        fits = broadcast(mask.shape, shape) == shape
    except RuntimeError:
        fits = False
    if not fits:
        raise ValueError(
            f"attn_mask: shape {tuple(mask.shape)} does not broadcast to the scores {shape}"
        )
    if mask.dtype == torch.bool:
        return (mask & seen).expand(shape)
    if bool((mask.isnan() | (mask == math.inf)).any()):
        raise ValueError("attn_mask: holds NaN or inf; accepted are finite numbers and -inf")
    return ((mask != -math.inf) & seen).expand(shape)


def differentiable(options: Options) -> list[str]:
    """Name the tensors whose gradients are judged."""
    names = ["query", "key", "value"]
    mask = options.attn_mask
    return [*names, "attn_mask"] if mask is not None and mask.requires_grad else names
