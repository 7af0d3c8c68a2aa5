"""Gradients beside differences of the output, where dropout leaves no reference to compare with.

From one seed, the same weights are dropped in every call. Then the output is a smooth function of
query, key and value, and along any direction its slope is a quotient of differences::

    (f(x + h d) - f(x - h d)) / 2 h  =  gradient . d  + O(h^2)
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from pytest_attnheat.attention.scoring import draw
from pytest_attnheat.callables import borrowed
from pytest_attnheat.failure import Checked, Failure, Place
from pytest_attnheat.inputs import dtype_name, misuse

# The step h, and by which part of its size a slope may be off: h^2 and rounding / h.
_STEPS = {torch.float64: (1e-5, 1e-5), torch.float32: (1e-2, 3e-2)}
# A wrong gradient may happen to be right along one direction.
_DIRECTIONS = 3


def check_by_differences(
    assertion: str,
    run: Callable[[dict[str, Tensor]], Tensor],
    tensors: dict[str, Tensor],
    code: object,
    seed: int,
) -> None:
    """Compare the gradients of a function that drops weights with differences of its output.

    Args:
        assertion: What the failure is called.
        run: Calls the function with query, key and value by name.
        tensors: Query, key and value.
        code: The function itself, which is left as it was found.
        seed: Where its random numbers start in every call, and where directions are drawn from.

    Raises:
        Failure: A slope along some direction is another.
        TypeError: The dtype is too coarse for differences.
        ValueError: Two calls from one seed differ.
    """
    dtype = tensors["query"].dtype
    if dtype not in _STEPS:
        accepted = "float64 or float32: with dropout, gradients are compared with differences"
        raise TypeError(misuse("query", dtype_name(dtype), accepted))

    def called(given: dict[str, Tensor]) -> Tensor:
        # Needed by every call, so that the same kernel runs in all of them.
        leaves = {name: tensor.detach().clone().requires_grad_() for name, tensor in given.items()}
        torch.manual_seed(seed)
        return run(leaves)

    with borrowed(code, *tensors.values(), seed=seed):
        if not torch.equal(called(tensors), called(tensors)):
            raise ValueError("two calls from one seed drop other weights, so nothing compares")
        leaves = {n: tensor.detach().clone().requires_grad_() for n, tensor in tensors.items()}
        torch.manual_seed(seed)
        output = run(leaves)
        above = draw("gradient of the output", seed, *output.shape).to(output)
        slopes = torch.autograd.grad(output, list(leaves.values()), above, allow_unused=True)
        for (name, tensor), slope in zip(tensors.items(), slopes, strict=True):
            given = torch.zeros_like(tensor) if slope is None else slope
            _check_one(assertion, name, tensors, given, above, called, seed)


def _check_one(
    assertion: str,
    name: str,
    tensors: dict[str, Tensor],
    slope: Tensor,
    above: Tensor,
    called: Callable[[dict[str, Tensor]], Tensor],
    seed: int,
) -> None:
    step, part = _STEPS[slope.dtype]
    for number in range(_DIRECTIONS):
        direction = draw(f"direction {number} of {name}", seed, *slope.shape).to(slope)
        ends = [
            (called({**tensors, name: tensors[name] + sign * step * direction}) * above)
            .detach()
            .double()
            .sum()
            for sign in (1, -1)
        ]
        wanted = float(ends[0] - ends[1]) / (2 * step)
        found = float((slope.double() * direction.double()).sum())
        # Of a direction that is drawn at random, the slope is about as long as the gradient.
        allowed = part * max(float(slope.double().norm()), abs(wanted))
        if abs(found - wanted) <= allowed:
            continue
        text = f"along direction {number} it is {found:.6g}, differences of the output {wanted:.6g}"
        raise Failure(
            assertion,
            f"the gradient of {name} is not that of the output it gives with dropout",
            worst=Place(f"{text} (allowed {allowed:.1e})", None, found),
            tensor=Checked.of(slope),
            tolerance=allowed,
            repeat=f"seed={seed}",
        )
