"""Calling an attention function on copies of its inputs, for its output and its gradients."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, cast

import torch
from torch import Tensor

from pytest_attnheat.assertions.behaviour.functions import AttentionFunction
from pytest_attnheat.assertions.behaviour.subject import settled
from pytest_attnheat.callables import borrowed


def run_once(
    subject: AttentionFunction,
    upstream: Tensor | None,
    names: list[str],
    *,
    training: bool,
    seed: int,
) -> dict[str, Tensor | None]:
    """Return the output of a subject and its gradients, by name; None for no gradient.

    Args:
        subject: What is called, twice: it must give the same again.
        upstream: The gradient of the output; None for no gradients.
        names: The inputs whose gradients are taken.
        training: Whether it may draw random numbers, each call from `seed`.
        seed: That seed.

    Raises:
        TypeError: It returns no tensor.
        ValueError: It returns another shape or no floats, or two calls differ.
    """
    calls: list[tuple[Tensor, dict[str, Tensor]]] = []
    inputs = (subject.query, subject.key, subject.value)

    def call() -> Tensor:
        leaves = copies(subject, names)
        output = subject.run(**handed(leaves))
        calls.append((output, leaves))
        return output.detach()

    with borrowed(subject.function, *inputs, seed=seed):
        settled(subject.function, call, training=training, seed=seed)
        output, leaves = calls[0]
        wanted = (*subject.query.shape[:-1], subject.value.shape[-1])
        if output.shape != wanted or not output.is_floating_point():
            raise ValueError(
                f"the attention function must return floats {wanted}; got {output.dtype} "
                f"{tuple(output.shape)}"
            )
        return {"output": output.detach(), **gradients(output, leaves, upstream, names)}


def gradients(
    output: Tensor, leaves: Mapping[str, Tensor], upstream: Tensor | None, names: list[str]
) -> dict[str, Tensor | None]:
    """Return the gradients of the leaves by name; None where the output does not depend on one."""
    if upstream is None or not output.requires_grad:
        return dict.fromkeys(names)
    found = torch.autograd.grad(
        output, [leaves[name] for name in names], upstream.to(output.dtype), allow_unused=True
    )
    return dict(zip(names, found, strict=True))


def copies(
    subject: AttentionFunction, names: list[str], dtype: torch.dtype | None = None
) -> dict[str, Tensor]:
    """Copies of all tensors that the subject is given, with the strides of the caller's.

    Those in `names` require a gradient.
    """
    given = {"query": subject.query, "key": subject.key, "value": subject.value}
    mask = subject.arguments.get("attn_mask")
    if mask is not None:
        given["attn_mask"] = mask.detach()
    leaves = {}
    for name, tensor in given.items():
        cast_to = dtype if tensor.is_floating_point() else None
        leaves[name] = _copy(tensor, cast_to).requires_grad_(name in names)
    return leaves


def handed(leaves: Mapping[str, Tensor]) -> dict[str, Any]:
    """What a subject is given: it may write to that, but not to a leaf that needs a gradient."""
    hand = cast(Callable[[Tensor], Tensor], _Handed.apply)
    return {name: hand(leaf) if leaf.requires_grad else leaf for name, leaf in leaves.items()}


class _Handed(torch.autograd.Function):
    """A copy with the same strides, which `clone` does not keep where elements share memory."""

    @staticmethod
    def forward(ctx: Any, leaf: Tensor) -> Tensor:
        return _copy(leaf, None)

    @staticmethod
    def backward(ctx: Any, above: Tensor) -> Tensor:
        return above


def _copy(tensor: Tensor, dtype: torch.dtype | None) -> Tensor:
    """A copy with the same strides, also where elements share memory."""
    reach = 1 + sum((n - 1) * step for n, step in zip(tensor.shape, tensor.stride(), strict=True))
    memory = tensor.as_strided((reach,), (1,)).to(dtype or tensor.dtype, copy=True)
    # Not a view of that memory: into a view that a custom function returns, nobody may write.
    empty = torch.empty(0, dtype=memory.dtype, device=memory.device)
    return empty.set_(memory.untyped_storage(), 0, tensor.shape, tensor.stride())
