"""What an attention function is asked, by which criteria, and its calls on copies of its inputs."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from numbers import Real
from typing import Any, TypeAlias, cast

import torch
from torch import Tensor

from pytest_attnheat.assertions.behaviour.functions import AttentionFunction
from pytest_attnheat.assertions.behaviour.subject import as_input, settled
from pytest_attnheat.attention.cases import DTYPES
from pytest_attnheat.attention.scoring import broadcast
from pytest_attnheat.attention.vocabulary import DECLARED_FULLY_MASKED, DeclaredFullyMasked
from pytest_attnheat.callables import borrowed
from pytest_attnheat.inputs import check_number, dtype_name, misuse, one_of, seed_number

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
        named = {"attn_mask": self.attn_mask, "scale": self.scale}
        flags = {"is_causal": self.is_causal, "enable_gqa": self.enable_gqa}
        given = {name: value for name, value in named.items() if value is not None}
        return {**self.arguments, **given, **{name: True for name, on in flags.items() if on}}


@dataclass(frozen=True)
class Criteria:
    """How it is judged."""

    fully_masked: DeclaredFullyMasked
    reference: Function | None
    factor: float
    gradients: bool
    training: bool
    seed: int


def check_criteria(options: Options, criteria: Criteria) -> None:
    """Refuse what is unknown, out of range or leaves nothing to compare with."""
    one_of("fully_masked", criteria.fully_masked, DECLARED_FULLY_MASKED)
    _check_factor(criteria.factor)
    if criteria.reference is not None and not callable(criteria.reference):
        raise TypeError(
            misuse("reference", type(criteria.reference).__name__, "a function, or None")
        )
    for name in ("is_causal", "enable_gqa"):
        if not isinstance(getattr(options, name), bool):
            raise TypeError(misuse(name, repr(getattr(options, name)), "True or False"))
    if options.scale is not None:
        check_number(options.scale, "scale")
    if dropout := options.arguments.get("dropout_p"):
        accepted = "0: dropout draws at random, so that there is no reference to compare with"
        raise ValueError(misuse("dropout_p", repr(dropout), accepted))
    seed_number(criteria.seed)


def _check_factor(factor: object) -> None:
    if isinstance(factor, bool) or not isinstance(factor, Real):
        raise TypeError(misuse("factor", type(factor).__name__, "a number above 0"))
    if not 0 < float(factor) < math.inf:
        raise ValueError(misuse("factor", repr(factor), "a finite number above 0"))


def check_inputs(subject: AttentionFunction) -> None:
    """Refuse what no reference can be computed for."""
    for name in ("query", "key", "value"):
        tensor = getattr(subject, name)
        if dtype_name(tensor) not in DTYPES:
            raise TypeError(misuse(name, dtype_name(tensor), f"one of {', '.join(DTYPES)}"))
        if not bool(tensor.isfinite().all()):
            accepted = "a tensor of finite numbers: else the reference would not be finite"
            raise ValueError(misuse(name, "NaN or inf", accepted))
    query, key = (tuple(tensor.shape) for tensor in (subject.query, subject.key))
    if query[-1] != key[-1]:
        raise ValueError(misuse("key", key, f"a tensor as wide as the query, here {query}"))


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
        accepted = (
            "a boolean torch.Tensor, True where a query may attend, or a tensor of floats that is "
            "added to the scores"
        )
        raise TypeError(misuse("attn_mask", dtype_name(mask), accepted))
    try:
        fits = broadcast(mask.shape, shape) == shape
    except RuntimeError:
        fits = False
    if not fits:
        accepted = f"a shape that broadcasts to that of the scores, here {shape}"
        raise ValueError(misuse("attn_mask", f"shape {tuple(mask.shape)}", accepted))
    if mask.dtype == torch.bool:
        return (mask & seen).expand(shape)
    if bool((mask.isnan() | (mask == math.inf)).any()):
        raise ValueError(misuse("attn_mask", "NaN or inf", "finite numbers and -inf"))
    return ((mask != -math.inf) & seen).expand(shape)


def differentiable(options: Options) -> list[str]:
    """Name the tensors whose gradients are judged."""
    names = ["query", "key", "value"]
    mask = options.attn_mask
    return [*names, "attn_mask"] if mask is not None and mask.requires_grad else names


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
