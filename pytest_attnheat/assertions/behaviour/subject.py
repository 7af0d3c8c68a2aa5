"""What is the same for every kind of code under test.

A subject is an attention function (`functions`), which has the signature of
`torch.nn.functional.scaled_dot_product_attention`, or a sequence model (`models`), which is given
one sequence and returns one. Both have the same methods: `models.Subject` is either.

Query heads that follow one another may share one head of keys and values: then `group` is how
many share one; with 1, everything stays as it is, also without any heads.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from pytest_attnheat.assertions.behaviour.difference import relative_change
from pytest_attnheat.attention.tolerance import output_tolerance
from pytest_attnheat.callables import identical, modules_in
from pytest_attnheat.inputs import misuse


def check_count(inputs: Sequence[object], assertion: str) -> None:
    """Refuse what are inputs neither of an attention function nor of a sequence model.

    Raises:
        TypeError: There are neither three of them nor one.
    """
    if len(inputs) not in (1, 3):
        raise TypeError(
            f"{assertion}: got {len(inputs)} inputs; accepted is query, key and value of an "
            "attention function, or the one input of a sequence model"
        )


def as_input(tensor: object, name: str) -> Tensor:
    """Return an input of a subject, detached.

    Raises:
        TypeError: Not a dense tensor that holds numbers.
        ValueError: No elements.
    """
    accepted = "a dense torch.Tensor with numbers in it"
    if not isinstance(tensor, Tensor):
        raise TypeError(misuse(name, type(tensor).__name__, accepted))
    if tensor.is_nested or tensor.layout != torch.strided or tensor.device.type == "meta":
        kind = "nested" if tensor.is_nested else f"{tensor.layout} {tensor.device.type}"
        raise TypeError(misuse(name, f"a {kind} tensor", accepted))
    if tensor.numel() == 0:
        raise ValueError(
            f"{name}: shape {tuple(tensor.shape)} has no elements, so there is nothing to check; "
            f"accepted is {accepted}"
        )
    # Of a tensor made in inference mode autograd can save nothing.
    return tensor.detach().clone() if tensor.is_inference() else tensor.detach()


def begin(seed: int | None) -> None:
    """Start the random numbers of a call, if there is a seed for them."""
    if seed is not None:
        torch.manual_seed(seed)


def settled(subject: object, call: Callable[[], Tensor], *, training: bool, seed: int) -> Tensor:
    """Return what a call of a subject gives, but refuse one that answers at random.

    Args:
        subject: What is called, for the names in the error.
        call: Calls it.
        training: Whether the caller allows randomness: then every call starts from `seed`.
        seed: That seed.

    Raises:
        ValueError: The two outputs differ by more than rounding, and `training` is False.
    """
    begin(seed if training else None)
    first = call()
    begin(seed if training else None)
    second = call()
    if not identical(first, second) and differ(
        second, first, output_tolerance(first.dtype, strict=True)
    ):
        raise ValueError(_random_subject(subject))
    return first


def _random_subject(subject: object) -> str:
    repeat = "pass training=True, which repeats every call from the same seed"
    advice = f"call .eval() on it, or {repeat}"
    training = [m for m in modules_in(subject) if any(part.training for part in m.modules())]
    if not training:
        return (
            "the subject is random: two calls with the same input give different outputs, so no "
            "comparison would mean anything: dropout in evaluation mode? assert_deterministic "
            f"looks for it. Or {repeat}"
        )
    dropouts = [
        f"{name or type(part).__name__} (p={part.p})"
        for module in training
        for name, part in module.named_modules()
        if isinstance(part, nn.modules.dropout._DropoutNd) and part.training and part.p > 0
    ]
    because = f" ({', '.join(dropouts[:3])}{', ...' * (len(dropouts) > 3)})" if dropouts else ""
    return (
        f"{type(training[0]).__name__} is in training mode{because}: two calls with the same input "
        f"give different outputs, so no comparison would mean anything; {advice}"
    )


def coarsest(*tensors: Tensor) -> torch.dtype:
    """The coarsest dtype that an output may have been computed in: its own, or that of autocast.

    Args:
        *tensors: The output, and the inputs of floats.
    """
    dtypes = [tensor.dtype for tensor in tensors]
    device = tensors[0].device.type
    if torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device):
        dtypes.append(torch.get_autocast_dtype(device))
    return max(dtypes, key=lambda dtype: torch.finfo(dtype).eps)


def differ(
    got: Tensor, expected: Tensor, allowed: float | Tensor, judged: Tensor | None = None
) -> bool:
    """Whether some judged row of two outputs differs by more than is allowed."""
    wrong = relative_change(got, expected) > allowed
    if judged is not None:
        wrong = wrong & judged.to(wrong.device)
    return bool(wrong.any())


def holds(suspicion: Callable[[], bool]) -> bool:
    """Tell whether a likely cause is the one; not if the subject refuses the unusual inputs."""
    try:
        return suspicion()
    except Exception:  # whatever code under test raises: the failure itself is to be reported
        return False


def as_of_keys(leading: Sequence[int], group: int) -> tuple[int, ...]:
    """Return the leading index of a query, or the leading shape of all, as that of the keys."""
    if group == 1:
        return tuple(leading)
    return (*leading[:-1], leading[-1] // group)


def for_each_query_head(of_keys: Tensor, group: int, *, dim: int = -2) -> Tensor:
    """Repeat what belongs to a head of keys for the query heads that share it."""
    return of_keys if group == 1 else of_keys.repeat_interleave(group, dim)


def of_the_first(of_queries: Tensor, group: int, *, dim: int = -2) -> Tensor:
    """Of the query heads that share their keys, take what belongs to the first."""
    return of_queries if group == 1 else _grouped(of_queries, group, dim).select(dim, 0)


def of_any(of_queries: Tensor, group: int, *, dim: int = -2) -> Tensor:
    """Tell what is true of any of the query heads that share their keys."""
    return of_queries if group == 1 else _grouped(of_queries, group, dim).any(dim)


def _grouped(of_queries: Tensor, group: int, dim: int) -> Tensor:
    # Counted from the end, a dimension is then that of the heads within a group.
    assert dim < 0
    return torch.unflatten(of_queries, dim, (-1, group))
