"""What is known about where a tensor comes from while a model runs, and what moves along with it.

A product of two activations may become attention. Beside its result go three tensors that broadcast
to it: the number of the row of the left operand in each place, that of the right operand, and what
would be there if the product were zero. They are moved by the very functions that move the scores,
and the last is changed by all that changes the scores: at the end it is the bias and the mask.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakTensorKeyDictionary


@dataclass(frozen=True, eq=False)
class Origin:
    """A product of two activations."""

    left: Tensor  # (..., rows, inner)
    right: Tensor  # (..., columns, inner)
    factors: tuple[float, float] = (1.0, 1.0)  # Of left and right before; NaN: not known
    before: tuple[int, ...] | None = None  # The shape of one before its axes were joined
    windows: bool = False  # Whether one of them has windows, see `Tag`


@dataclass(frozen=True, eq=False)
class Scores:
    """What goes along with a product and all that is made of it; tensors broadcast to its shape."""

    origin: Origin | None  # The product; None for scores that were made in another way
    # The row of the left operand, counted through its leading axes; -1 for none. Like the columns
    # on the CPU, where nobody waits for what they say.
    rows: Tensor
    # The row of the right operand; -1 for none. Without a product, the number of the key.
    columns: Tensor
    zero: Tensor  # What it would be if the product were zero
    steps: tuple[float, ...] = ()  # The numbers that it was multiplied by since
    softcap: float | None = None  # What a tanh was multiplied by since
    went: tuple[str, ...] = ()  # The functions that changed it
    coarsest: torch.dtype = torch.float32  # That with the largest rounding error so far
    done: bool = False  # Whether these are weights already, and `zero` is of before

    @classmethod
    def of(cls, origin: Origin, zero: Tensor, dtype: torch.dtype) -> Scores:
        """Return what goes along with a product of (..., rows, columns)."""
        left, right = origin.left, origin.right
        rows = torch.arange(left.shape[:-1].numel(), device="cpu").view(*left.shape[:-1], 1)
        columns = torch.arange(right.shape[:-1].numel(), device="cpu")
        columns = columns.view(*right.shape[:-2], 1, right.shape[-2])
        return cls(origin, rows, columns, zero, coarsest=dtype)

    def moved(self, shape: torch.Size, move: Callable[[Tensor], Any]) -> Iterator[Scores]:
        """Yield what goes along with each result of a function that moved a tensor of a shape."""
        whole = (tensor.expand(shape) for tensor in (self.rows, self.columns, self.zero))
        made = [move(tensor) for tensor in whole]
        for parts in [made] if isinstance(made[0], Tensor) else zip(*made, strict=True):
            rows, columns, zero = map(without_repetition, parts)
            yield replace(self, rows=rows, columns=columns, zero=zero)

    def cast(self, output: Tensor) -> Scores:
        """Return what goes along with a copy of another dtype or device."""
        zero = self.zero.to(output.device, output.dtype)
        return replace(self, zero=zero, coarsest=coarser(self.coarsest, zero.dtype))


def without_repetition(tensor: Tensor) -> Tensor:
    """A tensor of which axes that only repeat are one long: it broadcasts to what it was."""
    for axis, stride in enumerate(tensor.stride()):
        if stride == 0 and tensor.shape[axis] > 1:
            tensor = tensor.narrow(axis, 0, 1)
    return tensor


def coarser(*dtypes: torch.dtype) -> torch.dtype:
    """The dtype with the largest rounding error."""
    return max(dtypes, key=lambda dtype: torch.finfo(dtype).eps)


@dataclass(frozen=True, eq=False)
class Sample:
    """Some rows of what a softmax was given, and what went along, all (rows, some of the keys)."""

    given: Tensor
    rows: Tensor
    columns: Tensor
    zero: Tensor


@dataclass(frozen=True, eq=False)
class Tag:
    """What is known of one tensor."""

    # Its shape (batch, heads, length, width) before batch and heads were joined, or heads were
    # packed into queries
    before: tuple[int, ...] | None = None
    windows: bool = False  # Whether its third axis from the right is one of windows of rows
    scores: Scores | None = None  # What goes along with it, if it is of activations
    weights: bool = False  # Whether it is the result of a softmax (or sigmoid, sparsemax)
    dtype: torch.dtype | None = None  # That of the softmax; None if it is not known
    clean: Tensor | None = None  # Before dropout, in the same layout; None: the tensor itself
    source: str = ""  # How the weights were recognised
    dropout: float = 0.0  # The probability of the dropout that was applied
    parametric: bool = False  # Whether its last axis is one of a parameter, as of classes
    turned: bool = False  # Whether axes were exchanged since it became weights
    softmaxes: tuple[int, ...] = ()  # The numbers of the softmaxes that it comes from
    # The number it was multiplied by: queries may be scaled in place of scores. NaN if something
    # that is not understood was done to it since.
    factor: float = 1.0
    sink: tuple[Tensor, Tensor] | None = None  # Weights and scores of the sink left out
    sample: Sample | None = None  # Of what the softmax was given
    mixed: bool = False  # Whether the weights of several heads, or softmaxes, were put together
    routes: bool = False  # Whether these are weights over the classes of a layer
    of_experts: bool = False  # Whether it holds what several layers made, beside one another
    operands: tuple[Tensor, Tensor] | None = None  # Two, of which it is the product
    unnormalised: Any = None  # The product with a value, to be divided by the sums
    part: tuple[int, int] | None = None  # Of weights of some keys: the first, and of how many
    parts: dict[int, Any] = field(default_factory=dict)  # Products of such parts, by first key
    attended: Any = None  # The attention that it is the result of
    grouped: str = ""  # "exp" for an exponential, "sums" for its sums over groups: edges of a graph


class Tags:
    """The tags of the tensors that are alive."""

    def __init__(self) -> None:
        self._of: WeakTensorKeyDictionary = WeakTensorKeyDictionary()
        self._used: WeakTensorKeyDictionary = WeakTensorKeyDictionary()
        self._ids: set[int] = set()  # Of those that have one, or had: most tensors have none.

    def __getitem__(self, tensor: object) -> Tag | None:
        if id(tensor) not in self._ids or not isinstance(tensor, Tensor):
            return None
        found: Tag | None = self._of.get(tensor)  # type: ignore[no-untyped-call]
        return found

    def __setitem__(self, tensor: Any, tag: Tag) -> None:
        if isinstance(tensor, Tensor):
            self._of[tensor] = tag
            self._ids.add(id(tensor))

    put = __setitem__

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


def mixed(weights: Tag) -> Tag:
    """The tag of weights that are no softmax of their own scores any more."""
    return replace(weights, scores=None, clean=None, mixed=True)


def before_of(sources: Sequence[Tag | Origin | None]) -> tuple[int, ...] | None:
    """The shape (batch, heads, ...) that some tensor of an attention had before it was 3-D."""
    return next((one.before for one in sources if one is not None and one.before), None)


def doubt_of(sources: Sequence[Tag | Origin | None], rows: Tensor) -> str:
    """What about the axes of an attention is a guess, by where its tensors come from."""
    # Of rows with four axes, the second is taken to be one of heads.
    before = before_of(sources)
    joined = before is not None and len(rows) == before[0] * before[1] > before[0]
    windows = any(one is not None and one.windows for one in sources) or (rows.ndim == 4 and joined)
    return (
        "whether its axis of heads is one of windows or of the batch is not known"
        if windows
        else ""
    )


def without_factor(tensor: Tensor, factor: float) -> Tensor:
    """A tensor before it was multiplied by a number: in float32 where its dtype would round it."""
    if factor == 1 or math.isnan(factor):
        return tensor
    exact = math.frexp(factor)[0] in (0.5, -0.5) or tensor.element_size() >= 4
    return (tensor if exact else tensor.float()) / factor
