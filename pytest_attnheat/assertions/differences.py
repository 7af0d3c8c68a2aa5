"""Gradients beside differences of the output, where dropout leaves no reference to compare with.

From one seed, the same weights are dropped in every call. Then the output is a smooth function of
query, key and value, and along any direction its slope is a quotient of differences::

    (f(x + h d) - f(x - h d)) / 2 h  =  gradient . d  + O(h^2)

Which weights were dropped is seen where each key has a value of its own: then the output is the
weights. So a mistake of the backward pass has a name here as well.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import TypeAlias

import torch
from torch import Tensor

from pytest_attnheat.assertions.behaviour.functions import AttentionFunction
from pytest_attnheat.attention.backward import likely_backward_mistake
from pytest_attnheat.attention.call import Call
from pytest_attnheat.attention.computation import reference
from pytest_attnheat.attention.scoring import draw
from pytest_attnheat.callables import borrowed
from pytest_attnheat.failure import Checked, Failure, Place
from pytest_attnheat.inputs import dtype_name, misuse

# The step h, and by which part of its size a slope may be off: h^2 and rounding / h.
_STEPS = {torch.float64: (1e-5, 1e-5), torch.float32: (1e-2, 3e-2)}
# A wrong gradient may happen to be right along one direction.
_DIRECTIONS = 3
# More calls than this are not made to see which weights were dropped.
_MOST_CALLS = 64
# By what a weight may be off that is taken for one that dropout kept.
_SEEN = 1e-4
# The output of some tensors in place of the subject's own.
_Run: TypeAlias = Callable[[dict[str, Tensor]], Tensor]


def check_by_differences(
    assertion: str, subject: AttentionFunction, share: float, seed: int
) -> None:
    """Compare the gradients of a function that drops weights with differences of its output.

    Args:
        assertion: What the failure is called.
        subject: The function, which is left as it was found.
        share: The share of weights that it drops.
        seed: Where its random numbers start in every call, and where directions are drawn from.

    Raises:
        Failure: A slope along some direction is another.
        TypeError: The dtype is too coarse for differences.
        ValueError: Two calls from one seed differ.
    """
    tensors = {"query": subject.query, "key": subject.key, "value": subject.value}
    dtype = subject.query.dtype
    if dtype not in _STEPS:
        accepted = "float64 or float32: with dropout, gradients are compared with differences"
        raise TypeError(misuse("query", dtype_name(dtype), accepted))

    def called(changed: dict[str, Tensor]) -> tuple[Tensor, list[Tensor]]:
        # Needed by every call, so that the same kernel runs in all of them.
        given = {**tensors, **changed}
        leaves = {name: one.detach().clone().requires_grad_() for name, one in given.items()}
        torch.manual_seed(seed)
        return subject.run(**leaves), list(leaves.values())

    def run(changed: dict[str, Tensor]) -> Tensor:
        return called(changed)[0].detach()

    with borrowed(subject.function, *tensors.values(), seed=seed):
        output, leaves = called({})
        if not torch.equal(output, run({})):
            raise ValueError("two calls from one seed drop other weights, so nothing compares")
        above = draw("gradient of the output", seed, *output.shape).to(output)
        found = torch.autograd.grad(output, leaves, above, allow_unused=True)
        slopes = {
            name: torch.zeros_like(tensors[name]) if slope is None else slope
            for name, slope in zip(tensors, found, strict=True)
        }
        for name, slope in slopes.items():
            if (place := _misplaced(name, slope, tensors[name], above, run, seed)) is None:
                continue
            call = replace(subject.call, upstream=above)
            kept = _kept(call, run, share)
            mistake = None if kept is None else likely_backward_mistake(call, slopes, kept=kept)
            raise Failure(
                assertion,
                f"the gradient of {name} is not that of the output it gives with dropout",
                worst=place,
                cause=mistake,
                tensor=Checked.of(slope),
                repeat=f"seed={seed}",
            )


def _misplaced(
    name: str, slope: Tensor, tensor: Tensor, above: Tensor, run: _Run, seed: int
) -> Place | None:
    """A direction along which the output has another slope; None if there is none."""
    step, part = _STEPS[slope.dtype]
    for number in range(_DIRECTIONS):
        direction = draw(f"direction {number} of {name}", seed, *slope.shape).to(slope)
        ends = [
            (run({name: tensor + sign * step * direction}) * above).double().sum()
            for sign in (1, -1)
        ]
        wanted = float(ends[0] - ends[1]) / (2 * step)
        found = float((slope.double() * direction.double()).sum())
        # Of a direction that is drawn at random, the slope is about as long as the gradient.
        allowed = part * max(float(slope.double().norm()), abs(wanted))
        if abs(found - wanted) > allowed:
            text = f"along direction {number} it is {found:.6g}, differences of the output"
            return Place(f"{text} {wanted:.6g} (allowed {allowed:.1e})", None, found)
    return None


def _kept(call: Call, run: _Run, share: float) -> Tensor | None:
    """What dropout does to each weight, (..., query_len, key_len); None if that is not seen."""
    width, keys = call.value.shape[-1], torch.arange(call.key_len, device=call.value.device)
    if call.key_len > _MOST_CALLS * width:
        return None
    own = [
        run(
            {
                "value": (keys[:, None] == start + torch.arange(width, device=keys.device))
                .to(call.value)
                .expand_as(call.value)
            }
        )
        for start in range(0, call.key_len, width)
    ]
    weights = torch.cat(own, -1)[..., : call.key_len].double()
    right = reference(replace(call, upstream=None), wanted=("weights",)).exact["weights"]
    kept = (weights >= right / (1 - share) / 2).double() / (1 - share)
    return kept if bool(((weights - kept * right).abs() < _SEEN).all()) else None
