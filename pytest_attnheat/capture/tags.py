"""What is known about where a tensor comes from, and what its axes are, while a model runs."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakTensorKeyDictionary


@dataclass
class Scores:
    """A product of two activations, and what was done to it since.

    Attributes:
        left: (..., query_len, head_dim)
        right: (..., key_len, head_dim)
        scale: What it was multiplied by since, times the factors of left and right.
        steps: The numbers that it was multiplied by since, as they came.
        softcap: It is softcap * tanh(scale * left @ right.mT / softcap) + bias.
        bias: What was added since.
        mask: Boolean, False where it was overwritten by something hugely negative.
        soft: Whether that was a finite number.
        shifted: Whether something was added that is the same for all keys.
        sinks: (..., query_len, 1) that was joined to the keys; None for nothing.
        strange: What was done that is not understood. If empty, these tell all.
        lost: Whether that may have hidden keys.
        kept: Whether its axes still are those of the product.
        factors: What left and right had been multiplied by before.
    """

    left: Tensor
    right: Tensor
    scale: float = 1.0
    steps: tuple[float, ...] = ()
    softcap: float | None = None
    bias: Tensor | None = None
    mask: Tensor | None = None
    soft: bool = False
    shifted: bool = False
    sinks: Tensor | None = None
    strange: str = ""
    lost: bool = False
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
        dtype: That of the softmax; None if it is not known.
        clean: Those before dropout, in the same layout; None where that is the tensor itself.
        source: How the weights were recognised.
        dropout: The probability of the dropout that was applied.
        parametric: Whether its last axis is one of a parameter: the classes of a classifier.
        turned: Whether axes were exchanged since it became weights.
        softmaxes: The numbers of the softmaxes that it comes from.
        factor: The number it was multiplied by: queries may be scaled in place of scores. NaN if
            something that is not understood was done to it since.
        sink: The weights of the sink that were left out, (..., query_len, 1).
    """

    before: tuple[int, ...] | None = None
    scores: Scores | None = None
    weights: bool = False
    dtype: torch.dtype | None = None
    clean: Tensor | None = None
    source: str = ""
    dropout: float = 0.0
    parametric: bool = False
    turned: bool = False
    softmaxes: tuple[int, ...] = ()
    factor: float = 1.0
    sink: Tensor | None = None


class Tags:
    """The tags of the tensors that are alive."""

    def __init__(self) -> None:
        self._of: WeakTensorKeyDictionary = WeakTensorKeyDictionary()
        self._used: WeakTensorKeyDictionary = WeakTensorKeyDictionary()

    def __getitem__(self, tensor: object) -> Tag | None:
        if not isinstance(tensor, Tensor):
            return None
        found: Tag | None = self._of.get(tensor)  # type: ignore[no-untyped-call]
        return found

    def use(self, *given: object) -> None:
        """Remember parameters, of one number per head perhaps, that something was done to."""
        for one in given:
            if isinstance(one, nn.Parameter) and one.ndim == 1:
                self._used[one] = True

    def was_used(self, parameter: Tensor) -> bool:
        """Whether it was."""
        return parameter in self._used

    def factor(self, tensor: object) -> float:
        """The number that a tensor was multiplied by; 1 if none is known."""
        tag = self[tensor]
        return 1.0 if tag is None else tag.factor

    def __setitem__(self, tensor: Any, tag: Tag) -> None:
        if isinstance(tensor, Tensor):
            self._of[tensor] = tag


def without_factor(tensor: Tensor, factor: float) -> Tensor:
    """A tensor before it was multiplied by a number: in float32 where its dtype would round it."""
    if factor == 1 or math.isnan(factor):
        return tensor
    exact = math.frexp(factor)[0] in (0.5, -0.5) or tensor.element_size() >= 4
    return (tensor if exact else tensor.float()) / factor


@dataclass(frozen=True)
class Shaping:
    """How the leading axes of an attention are batch entries and heads.

    Attributes:
        lead: The leading axes of the queries.
        batch: Number of batch entries.
        heads: Number of heads.
        packed: How many heads that share keys were written as queries of one; 1 for none.
        joined: Whether more than one leading axis is one of heads.
    """

    lead: tuple[int, ...]
    batch: int
    heads: int
    packed: int = 1
    joined: bool = False

    @classmethod
    def of(cls, query: Tensor, tag: Tag | None, heads: int | None, key: Tensor) -> Shaping:
        """Read the axes of a query (..., query_len, head_dim).

        A third axis from the right is one of heads in 4-D. In 3-D it is one of batch entries,
        unless it was made by joining (batch, heads), or `heads` says what it holds.

        Args:
            query: The queries.
            tag: What is known of them.
            heads: How many heads a 3-D batch axis holds, if that is known.
            key: The keys; their leading axes may broadcast.
        """
        lead = tuple(query.shape[:-2])
        before = None if tag is None else tag.before
        if len(lead) == 1:
            if before is not None and before[0] * before[1] == lead[0]:
                return cls(lead, before[0], before[1])
            if heads is not None and lead[0] % heads == 0:
                return cls(lead, lead[0] // heads, heads)
            return cls(lead, lead[0], 1)
        if len(lead) == 2 and before is not None and before[2] == 1:
            group = query.shape[-2]
            if before[:2] == (lead[0], lead[1] * group) and key.shape[-3] == lead[1]:
                return cls(lead, lead[0], before[1], packed=group)
        return cls(lead, math.prod(lead[:-1]), lead[-1] if lead else 1)

    @classmethod
    def of_weights(
        cls, weights: Tensor, before: tuple[int, ...] | None, heads: int | None
    ) -> Shaping:
        """Read the axes of weights (..., query_len, key_len); with 5-D, heads are in groups."""
        lead = tuple(weights.shape[:-2])
        if len(lead) > 2:
            return cls(lead, lead[0], math.prod(lead[1:]), joined=True)
        tag = None if before is None else Tag(before=before)
        return cls.of(weights, tag, heads, weights)

    def weights_shape(self, query_len: int, key_len: int) -> tuple[int, int, int, int]:
        """(batch, heads, query_len, key_len)."""
        return self.batch, self.heads, 1 if self.packed > 1 else query_len, key_len

    def queries(self, tensor: Tensor) -> Tensor:
        """A tensor with a row per query, (..., query_len, width), as 4-D."""
        width = tensor.shape[-1]
        length = 1 if self.packed > 1 else tensor.shape[-2]
        return tensor.reshape(self.batch, self.heads, length, width)

    def keys(self, tensor: Tensor) -> Tensor:
        """A tensor with a row per key, (..., key_len, width), as 4-D; it may have fewer heads."""
        lead = tuple(tensor.shape[:-2])
        length, width = tensor.shape[-2:]
        if len(lead) < 2 or self.joined:
            tensor = tensor.expand(*self.lead, length, width) if lead != self.lead else tensor
            return tensor.reshape(self.batch, self.heads, length, width)
        tensor = tensor.expand(*self.lead[:-1], lead[-1], length, width)
        return tensor.reshape(self.batch, lead[-1], length, width)

    def mask(self, tensor: Tensor) -> Tensor:
        """Something that broadcasts to the weights, as 4-D that does."""
        missing = len(self.lead) + 2 - tensor.ndim
        if missing > 0:
            tensor = tensor[(None,) * missing]
        lead = tuple(tensor.shape[:-2])
        rows, keys = tensor.shape[-2:]
        if all(size == 1 for size in lead):
            tensor = tensor.reshape(1, 1, rows, keys)
            if self.packed == 1 or rows == 1:
                return tensor
            lead = (1, 1)
        if self.packed > 1:
            tensor = tensor.expand(lead[0], self.heads // self.packed, self.packed, keys)
            return tensor.reshape(lead[0], self.heads, 1, keys)
        if len(lead) == 2:
            return tensor
        tensor = tensor.expand(*self.lead, rows, keys)
        return tensor.reshape(self.batch, self.heads, rows, keys)
