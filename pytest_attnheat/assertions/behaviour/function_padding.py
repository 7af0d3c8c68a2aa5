"""Padding of an attention function: further keys and values that its mask forbids."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from pytest_attnheat.assertions.behaviour.difference import output_place
from pytest_attnheat.assertions.behaviour.functions import AttentionFunction
from pytest_attnheat.assertions.behaviour.padded import Filling, Told
from pytest_attnheat.assertions.behaviour.subject import of_the_first
from pytest_attnheat.attention.vocabulary import Side

# By how much the score of a padding key that is aimed at a query is above that of any real key,
# and the length that such a key has at most.
_AHEAD, _LONGEST = 100.0, 3e3


@dataclass(frozen=True)
class PaddedFunction:
    """An attention function with keys and values that its mask forbids."""

    call: AttentionFunction
    side: Side
    filling: Filling
    start: Callable[[], None]
    expected: Tensor

    @staticmethod
    def without(call: AttentionFunction, start: Callable[[], None]) -> Tensor:
        """The output without padding, with the mask as it is given if it is no flag."""
        start()
        return (call.explicit() if call.arguments.get("is_causal") else call).run()

    @property
    def claim(self) -> str:
        """What broken rows do."""
        return f"rows change with {self.filling.amount} masked keys on the {self.side}"

    @property
    def judged(self) -> Tensor | None:
        """Which rows may see a key."""
        return self.call.judged()

    def run(self, told: Told = "truth") -> Tensor:
        """Call the function with the padding and a mask."""
        spelled = self.call.explicit()
        mask = spelled.arguments["attn_mask"]
        padding = self._padding(spelled.key)
        if self.filling.aims:
            padding = _aimed(padding, self.call, self.judged)
        key = self._beside(spelled.key, padding)
        value = self._beside(spelled.value, self._padding(spelled.value))
        shown = told == "all real"
        hidden = mask.new_full((*mask.shape[:-1], self.filling.amount), shown)
        if mask.dtype != torch.bool:
            hidden = torch.zeros_like(hidden) if shown else torch.full_like(hidden, -math.inf)
        mask = self._beside(mask, hidden, dim=-1)
        if told == "opposite" and mask.dtype == torch.bool:  # a float mask has no opposite
            mask = ~mask
        self.start()
        return spelled.run(key=key, value=value, attn_mask=mask)

    def _padding(self, tensor: Tensor) -> Tensor:
        *leading, _, width = tensor.shape
        return self.filling.like(tensor, (*leading, self.filling.amount, width))

    def _beside(self, tensor: Tensor, padding: Tensor, dim: int = -2) -> Tensor:
        parts = [padding, tensor] if self.side == "left" else [tensor, padding]
        return torch.cat(parts, dim)

    def place(self, index: tuple[int, ...]) -> str:
        """Name a row of the output."""
        return output_place(index)

    def spreads_nan(self, got: Tensor) -> bool:
        """No: the padding of a function is finite, and has no output."""
        return False

    @property
    def ignored(self) -> str:
        """Say that the output is the same without the mask."""
        return "attn_mask changes nothing: it is ignored"

    def advice(self, felt: bool | None) -> str:
        """What to look at where only this side is wrong."""
        return "does the mask follow its keys, or are keys found by their place?"

    def other(self) -> PaddedFunction | None:
        """The same with padding that holds something else, if that is allowed."""
        content = self.filling.other()
        return None if content is None else replace(self, filling=content)

    def sees_only_padding(self, got: Tensor, allowed: float) -> bool:
        """No: of a function the opposite of a mask is tried."""
        return False


def _aimed(padding: Tensor, call: AttentionFunction, judged: Tensor | None) -> Tensor:
    """Turn the last padding key towards a query, so that it wins the softmax if it is not masked.

    Random keys get small scores from most queries, so that a fill of -10 in place of -inf would
    look right. The score of this one is above every real score by `_AHEAD`.
    """
    query, key = call.query, call.key
    if query.shape[-1] != key.shape[-1]:  # the function projects them first
        return padding
    row = 0 if judged is None else int(judged.reshape(-1, query.shape[-2]).sum(0).argmax())
    target = of_the_first(query[..., row, :].double(), call.group)
    size = target.norm(dim=-1, keepdim=True)
    longest = key.double().norm(dim=-1).nan_to_num(posinf=0.0).amax(-1, keepdim=True)
    steepness = size * call.scale
    wanted = (_AHEAD + steepness.abs() * longest) / steepness
    # No longer than a half can hold, also where a query is nearly nothing.
    direction = target / size * wanted.clamp(-_LONGEST, _LONGEST)
    aimed = padding.clone()
    aimed[..., -1, :] = direction.nan_to_num(posinf=0.0, neginf=0.0).to(padding)
    return aimed
