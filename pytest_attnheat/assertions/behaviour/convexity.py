"""That the output of soft attention lies among the values: a mean with weights that sum to one."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from ...attention.chunks import index_of, query_chunks
from ...attention.tolerance import row_rounding
from ...callables import borrowed
from ...failure import Checked, Failure, Place
from ...inputs import misuse
from .functions import AttentionFunction, wrong_shape
from .reading import as_function
from .sequences import SequenceModel
from .subject import check_relative, coarsest, for_each_query_head, output_place, settled

_NAME = "assert_convex"


def assert_convex(
    function: Callable[..., Any],
    query: Tensor,
    key: Tensor | None = None,
    value: Tensor | None = None,
    *,
    tolerance: float | None = None,
    seed: int = 0,
    training: bool = False,
    **arguments: Any,
) -> None:
    """Assert that every output lies within the range of the values that its query may see.

    Soft attention is a mean: its weights are not negative and sum to one. So no channel of an
    output is above the largest value of this channel, or below the smallest, among the keys that
    the query may see. It judges three sets of values: the given ones; values that are all 1,
    which must give 1; and values of one sign, 1 at every n-th key and 0 elsewhere, which show a
    negative weight, or weight on a masked key, that the given ones happen to hide.

    Attention with a sink (softmax-off-by-one, gpt-oss) is not a mean of the values, and fails.

    Args:
        function: An attention function, called as `function(query, key, value, **arguments)`.
        query: (..., query_len, head_dim)
        key: (..., key_len, head_dim)
        value: (..., key_len, value_dim), finite wherever a query may see it.
        tolerance: By what part of the largest absolute value that a query may see, channel by
            channel, its output may be out of range. By default as much as rounding moves the
            sum of a row of weights and the output: 1e-12, 1e-5, 2.9e-3, 2.3e-2 in float64,
            float32, float16, bfloat16.
        seed: Where the random numbers start, if the function draws any.
        training: Accept a function that answers at random: every call starts from `seed`.
        **arguments: attn_mask, is_causal, scale, enable_gqa, whatever the function takes. A
            query that may see no key is not judged.

    Raises:
        Failure: Some output is out of range, or not finite.
        TypeError: The subject is a sequence model, or an input is not a tensor of floats.
        ValueError: Shapes do not fit, no query may see any key, a value that may be seen is not
            finite, or the function answers at random.

    Examples:
        >>> assert_convex(plain_attention, query, key, value, is_causal=True)
    """
    __tracebackhide__ = True
    projects = isinstance(function, (SequenceModel, nn.MultiheadAttention))
    if key is None or value is None or projects:
        raise TypeError(
            f"{_NAME} takes an attention function, with query, key and value. The output of "
            "nn.MultiheadAttention or of a sequence model is projected after the mean is taken, "
            "so it need not lie within the range of anything: pass the function that they call"
        )
    own = seed if training else None
    subject = as_function(function, (query, key, value), arguments, seed=own)
    with borrowed(function, subject.query, subject.key, subject.value, seed=seed), torch.no_grad():
        output = settled(function, subject.run, training=training, seed=seed)
        allowed = _allowed(tolerance, coarsest(output, subject.query), subject.key.shape[-2])
        probe = _Probe(subject, allowed)
        probe.check(subject.value, output, with_values="")
        ones = torch.ones_like(subject.value)
        probe.check(ones, subject.run(value=ones), with_values=", with every value 1,")
        spaced, step = _spaced(subject.value)
        probe.check(
            spaced,
            subject.run(value=spaced),
            with_values=f", with value[..., j, c] 1 where j % {step} == c and 0 elsewhere,",
        )


def _spaced(value: Tensor) -> tuple[Tensor, int]:
    """Values of one sign: channel c is 1 at every n-th key from key c on, and 0 elsewhere."""
    length, width = value.shape[-2:]
    step = max(width, 2)
    key_at = torch.arange(length, device=value.device).unsqueeze(-1)
    channel = torch.arange(width, device=value.device)
    return (key_at % step == channel).to(value.dtype).expand_as(value).contiguous(), step


def _allowed(tolerance: object, dtype: torch.dtype, key_len: int) -> float:
    """What the caller allows, or what rounding to a dtype does to weights and outputs."""
    if tolerance is not None:
        return check_relative(tolerance, dtype)
    return row_rounding(dtype, key_len) + torch.finfo(dtype).eps


@dataclass(frozen=True)
class _Probe:
    """What the outputs of one function are held against."""

    subject: AttentionFunction  # The function and its inputs
    allowed: float  # By what part of the largest visible value an output may be out of range

    def check(self, value: Tensor, output: Tensor, *, with_values: str) -> None:
        """Raise a Failure if some output is out of the range of these values."""
        __tracebackhide__ = True
        if output.shape[-1] != value.shape[-1]:
            raise ValueError(wrong_shape(output, (*output.shape[:-1], value.shape[-1])))
        low, high = (bound.expand(output.shape) for bound in visible_range(self.subject, value))
        judged = low <= high
        excess = _excess(output, low, high).masked_fill(~judged, 0.0)
        broken = excess > self.allowed
        is_nan = ~judged & (low != math.inf)
        is_inf = judged & ~(low.isfinite() & high.isfinite())
        told = torch.stack([mask.sum() for mask in (is_nan, is_inf, judged, broken)]).tolist()
        nans, infs, counted, wrong = told
        if nans or infs:
            held = "nan" if nans else "inf"
            got = f"{held} in a key that a query may see"
            raise ValueError(misuse("value", got, "finite values"))
        if counted == 0:
            raise ValueError(f"{_NAME}: no query may see any key, so there is nothing to judge")
        if wrong == 0:
            return
        worst = index_of(excess.argmax(), excess.shape)
        first = index_of(broken.flatten().int().argmax(), broken.shape)
        raise Failure(
            _NAME,
            f"outputs{with_values} lie outside the range of the values that their query may see",
            broken=wrong, of=counted, worst=self._place(worst, output, low, high),
            first=None if first == worst else self._place(first, output, low, high),
            cause=self._cause(output, worst, judged.any(-1)), tensor=Checked.of(output),
            tolerance=self.allowed,
        )  # fmt: skip

    def _place(self, index: tuple[int, ...], output: Tensor, low: Tensor, high: Tensor) -> Place:
        """Say where an output is, and where it might be."""
        got, least, most = (float(t[index]) for t in (output, low, high))
        query, name = f"query {index[-2]}", f"{output_place(index)} is {got:.6g}"
        if not math.isfinite(got):
            said = f"{name}; the values that {query} may see are from {least:.6g} to {most:.6g}"
            return Place(said, index, got)
        side, bound = ("above the largest", most) if got > most else ("below the smallest", least)
        beside = f"{side} value that {query} may see, {bound:.6g}"
        if least == most:
            beside = f"but every value that {query} may see is {least:.6g}"
        limit = self.allowed * max(abs(least), abs(most))
        off = f"(off by {abs(got - bound):.1e}; allowed {limit:.1e})"
        return Place(f"{name}, {beside} {off}", index, got)

    def _cause(self, output: Tensor, worst: tuple[int, ...], judged: Tensor) -> str | None:
        """Name a known defect, or say what the weights show where values are 1 or 0."""
        subject = self.subject
        if not bool(output[worst].isfinite()):
            if bool(subject.value.isfinite().all()):
                return None
            return "a masked key holds nan or inf in its value, which 0 times it does not remove"
        if (known := subject.mistake(subject.run())) is not None:
            return known
        sums = subject.run(value=torch.ones_like(subject.value))[..., 0].double()[judged]
        if bool(((sums - 1).abs() > self.allowed).any()):
            least, most = float(sums.min()), float(sums.max())
            if most - least <= 10 * self.allowed * abs(most):
                return f"the weights of every query sum to {most:.4g}: a factor on the output?"
            return (
                f"the weights of a query sum to {least:.4g} to {most:.4g}: not divided by their "
                "sum, divided by another one, or rounded?"
            )
        hidden = ~subject.may_see()[worst[:-1]]
        on_hidden = subject.run(
            value=hidden.to(output.dtype).unsqueeze(-1).expand_as(subject.value)
        )
        share = float(on_hidden[worst])
        if abs(share) > self.allowed:
            return f"query {worst[-2]} has {share:.3g} of its weight on keys that it may not see"
        least = float(subject.run(value=_spaced(subject.value)[0]).min())
        if least < -self.allowed:
            return f"some weights are negative: they add up to {least:.3g} on some keys"
        return None


def _excess(output: Tensor, low: Tensor, high: Tensor) -> Tensor:
    """By what part of the largest visible value each output is out of range; inf for NaN."""
    wide = output.double()
    beyond = torch.maximum(wide - high, low - wide).clamp(min=0.0)
    relative = beyond / torch.maximum(low.abs(), high.abs())
    relative = torch.where(beyond == 0, torch.zeros_like(beyond), relative)
    return relative.nan_to_num(nan=math.inf, posinf=math.inf)


def visible_range(subject: AttentionFunction, value: Tensor) -> tuple[Tensor, Tensor]:
    """Return the smallest and the largest value that each query may see, channel by channel."""
    # Of values (..., key_len, value_dim), twice float64 (..., query_len, value_dim), or (..., 1,
    # value_dim) where all queries see the same keys. A query that sees none has from inf to -inf.
    value = for_each_query_head(value, subject.group, dim=-3)
    wide = value.to(torch.promote_types(value.dtype, torch.float32))
    call = subject.call
    if call.sees_all:
        low, high = wide.amin(-2, keepdim=True), wide.amax(-2, keepdim=True)
    elif call.alignment == "top_left" and not call.prefix and replace(call, causal=False).sees_all:
        last = torch.arange(subject.query.shape[-2], device=value.device)
        last = last.clamp(max=value.shape[-2] - 1)
        low, high = wide.cummin(-2).values[..., last, :], wide.cummax(-2).values[..., last, :]
    else:
        low, high = _range_behind_mask(wide, subject.may_see())
    return low.double(), high.double()


def _range_behind_mask(value: Tensor, seen: Tensor) -> tuple[Tensor, Tensor]:
    """The range of values that are `seen`, (..., query_len, key_len), a few queries at a time."""
    low, high = [], []
    for chunk in query_chunks(seen.shape[-2], 2 * value.numel() * value.element_size()):
        hidden = ~seen[..., chunk, :].unsqueeze(-1)
        rows = value.unsqueeze(-3)
        low.append(rows.masked_fill(hidden, math.inf).amin(-2))
        high.append(rows.masked_fill(hidden, -math.inf).amax(-2))
    return torch.cat(low, -2), torch.cat(high, -2)
