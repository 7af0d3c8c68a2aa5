"""What is known about where a tensor comes from, while a model runs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary


@dataclass
class Scores:
    """A product of two activations, and what was done to it since.

    Attributes:
        left: (..., query_len, head_dim)
        right: (..., key_len, head_dim)
        scale: What it was multiplied by since, times the factors of left and right.
        bias: What was added since.
        mask: Boolean, False where it was overwritten by something hugely negative.
        exact: Whether these tell all: softmax(scale * left @ right.mT + bias), masked.
        kept: Whether its axes still are those of the product.
        factors: What left and right had been multiplied by before.
    """

    left: Tensor
    right: Tensor
    scale: float = 1.0
    bias: Tensor | None = None
    mask: Tensor | None = None
    exact: bool = True
    kept: bool = True
    factors: tuple[float, float] = (1.0, 1.0)


@dataclass
class Tag:
    """What is known of one tensor.

    Attributes:
        before: Its shape (batch, heads, length, width) before batch and heads were joined, or
            heads were packed into queries.
        scores: Set if it descends from a product of activations.
        weights: Whether it is the result of a softmax (or sigmoid, sparsemax).
        clean: Those before dropout, in the same layout; None where that is the tensor itself.
        source: How the weights were recognised.
        dropout: The probability of the dropout that was applied.
        parametric: Whether its last axis is one of a parameter: the classes of a classifier.
        turned: Whether axes were exchanged since it became weights.
        softmaxes: The numbers of the softmaxes that it comes from.
        factor: The number it was multiplied by: queries may be scaled in place of scores.
    """

    before: tuple[int, ...] | None = None
    scores: Scores | None = None
    weights: bool = False
    clean: Tensor | None = None
    source: str = ""
    dropout: float = 0.0
    parametric: bool = False
    turned: bool = False
    softmaxes: tuple[int, ...] = ()
    factor: float = 1.0


class Tags:
    """The tags of the tensors that are alive."""

    def __init__(self) -> None:
        self._of: WeakTensorKeyDictionary = WeakTensorKeyDictionary()

    def __getitem__(self, tensor: object) -> Tag | None:
        if not isinstance(tensor, Tensor):
            return None
        found: Tag | None = self._of.get(tensor)  # type: ignore[no-untyped-call]
        return found

    def factor(self, tensor: object) -> float:
        """The number that a tensor was multiplied by; 1 if none is known."""
        tag = self[tensor]
        return 1.0 if tag is None else tag.factor

    def __setitem__(self, tensor: Any, tag: Tag) -> None:
        if isinstance(tensor, torch.Tensor):
            self._of[tensor] = tag
