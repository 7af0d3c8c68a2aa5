"""What an attention function is asked, by which criteria, and its calls on copies of its inputs.

Also how its gradients are judged with dropout, where there is no reference.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from numbers import Real
from typing import Any, TypeAlias, cast

import torch
from torch import Tensor

from ..attention.backward import likely_backward_mistake
from ..attention.call import FEATURES, Call, check_features
from ..attention.cases import DTYPES
from ..attention.computation import reference
from ..attention.scoring import draw
from ..callables import borrowed, modules_in, seed_all
from ..failure import Checked, Failure, Place
from ..inputs import check_number, dtype_name, misuse, seed_number
from .behaviour.functions import AttentionFunction, permitted
from .behaviour.reading import as_function
from .behaviour.subject import Described, as_described, as_input, settled, takes

Function: TypeAlias = Callable[..., Any]

# What is judged, by the name of the result, and the field of a call that its gradient is of.
_LEAVES = {
    "query": "query", "key": "key", "value": "value", "attn_mask": "bias", "sinks": "sinks"
}  # fmt: skip
Run: TypeAlias = Callable[[Call], Tensor]
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


@dataclass(frozen=True)
class Criteria:
    """How it is judged."""

    factor: float = 2.0  # How many times the rounding of a plain computation is allowed
    training: bool = False  # Whether the subject may draw random numbers, each call from `seed`
    seed: int = 0  # That seed, and that of the gradient of the output
    reference: Run | None = None  # What is compared with in place of attention; None for attention
    tolerance: float = 0.0  # What is allowed anyway, as a part of the largest number of a map
    rows: int | None = None  # How many rows are judged, about; None for all
    surrounded: bool = False  # Whether what lies beside the inputs in memory is NaN


def check_criteria(criteria: Criteria) -> None:
    """Refuse what is unknown or out of range."""
    seed_number(criteria.seed)
    factor: object = criteria.factor
    if isinstance(factor, bool) or not isinstance(factor, Real):
        raise TypeError(misuse("factor", type(factor).__name__, "a number above 0"))
    if not 0 < float(factor) < math.inf:
        raise ValueError(misuse("factor", repr(factor), "a finite number above 0"))


def said(given: Mapping[str, Any]) -> dict[str, Any]:
    """Return the options that say something: neither None nor False."""
    return {name: one for name, one in given.items() if one is not None and one is not False}


def called(
    function: Function, inputs: Sequence[object], given: Mapping[str, Any]
) -> tuple[AttentionFunction, Call, Run]:
    """Return a function with its inputs, what it is asked by that, and how it is called."""
    # Keywords that are fields of `Call` are passed on if its signature has them.
    for name in ("is_causal", "enable_gqa"):
        if not isinstance(given.get(name, False), bool):
            raise TypeError(misuse(name, repr(given[name]), "True or False"))
    if given.get("scale") is not None:
        check_number(given["scale"], "scale")
    if dropout := given.get("dropout_p"):
        accepted = "0: dropout draws at random, so that there is no reference to compare with"
        raise ValueError(misuse("dropout_p", repr(dropout), accepted))
    features = {name: given[name] for name in FEATURES if given.get(name) is not None}
    arguments = {name: one for name, one in said(given).items() if name not in FEATURES}
    taken = {n: v for n, v in features.items() if n == "scale" or takes(function, n)}
    subject = as_function(function, inputs, {**arguments, **taken})
    if (mask := given.get("attn_mask")) is not None:
        as_input(mask, "attn_mask")
        permitted(mask, (*subject.leading, subject.query.shape[-2], subject.length))
        if mask.dtype != torch.bool and bool((mask.isnan() | (mask == math.inf)).any()):
            raise ValueError(misuse("attn_mask", "NaN or inf", "finite numbers and -inf"))
    call = subject.call
    check_features(features, call.query.shape, call.key.shape, call.query.device)
    own = {name: value for name, value in features.items() if name not in taken}
    return subject, replace(call, **own), runner(subject)


def described_call(
    function: Function, inputs: Sequence[Call | Tensor | None], given: Mapping[str, Any]
) -> tuple[Described, Call, list[str]]:
    """Return a function that says what it does, a call of it, and which gradients that has."""
    (call, *others), described = inputs, as_described(function)
    beside = said(given) or any(one is not None for one in others)
    if described is None or beside or not isinstance(call, Call):
        accepted = "an AttentionSpec with a Call alone, or query, key and value"
        raise TypeError(misuse("query", "a Call", accepted))
    names = ["query", "key", "value"] + ["attn_mask"] * (call.bias is not None)
    # Those that it always has are no argument that a gradient could be asked of.
    own = described.described(replace(call, sinks=None)).sinks
    names += ["sinks"] * (call.sinks is not None and own is None)
    return described, described.described(call), names if described.gradients else []


def asking(described: Described) -> Run:
    """Return how a function is called that says what it does."""
    return lambda call: described.ask(call).output


def runner(subject: AttentionFunction) -> Run:
    """Return how a function is called with another call of the same options."""
    described = as_described(subject.function)
    if described is not None:
        return asking(described)

    def run(call: Call) -> Tensor:
        changed: dict[str, Any] = {}
        mask = subject.arguments.get("attn_mask")
        if mask is not None:
            given = call.mask if mask.dtype == torch.bool else call.bias
            assert given is not None
            changed["attn_mask"] = given.reshape(mask.shape)
        for name in ("bias", "sinks"):
            if name in subject.arguments:
                changed[name] = getattr(call, name)
        return subject.run(query=call.query, key=call.key, value=call.value, **changed)

    return run


def check_call(call: Call) -> None:
    """Refuse what no reference can be computed for."""
    for name in ("query", "key", "value"):
        tensor = getattr(call, name)
        if dtype_name(tensor) not in DTYPES:
            raise TypeError(misuse(name, dtype_name(tensor), f"one of {', '.join(DTYPES)}"))
        if not bool(tensor.isfinite().all()):
            accepted = "a tensor of finite numbers: else the reference would not be finite"
            raise ValueError(misuse(name, "NaN or inf", accepted))
    query, key = (tuple(tensor.shape) for tensor in (call.query, call.key))
    if query[-1] != key[-1]:
        raise ValueError(misuse("key", key, f"a tensor as wide as the query, here {query}"))


def run_once(
    run: Run,  # Calls the subject, twice: it must give the same again
    call: Call,  # What it is asked, with the gradient of the output if there are names
    names: Sequence[str],  # The results whose gradients are taken
    code: object,  # The subject itself, whose modules and random state are left as they were
    *,
    training: bool,  # Whether it may draw random numbers, each call from `seed`
    seed: int,  # That seed
    beside: int = 0,  # How many NaN lie before and after each input in memory
) -> dict[str, Tensor | None]:
    """Return the output of a subject and its gradients, by name; None for no gradient."""
    calls: list[tuple[Tensor, dict[str, Tensor]]] = []

    def again() -> Tensor:
        leaves = copies(call, names)
        output = run(handed(call, leaves, beside))
        calls.append((output, leaves))
        return output.detach()

    with borrowed(code, call.query, call.key, call.value, seed=seed):
        settled(code, again, training=training, seed=seed)
        output, leaves = calls[0]
        wanted = (*call.query.shape[:-1], call.value.shape[-1])
        if output.shape != wanted or not output.is_floating_point():
            raise ValueError(
                f"the attention function must return floats {wanted}; got {output.dtype} "
                f"{tuple(output.shape)}"
            )
        try:
            slopes = gradients(output, leaves, call.upstream, names)
        except RuntimeError as error:
            if "use_reentrant" not in str(error):
                raise
            slopes = _by_backward(*calls[1], call.upstream, names, code)
        return {"output": output.detach(), **slopes}


def _by_backward(
    output: Tensor,
    leaves: Mapping[str, Tensor],
    upstream: Tensor | None,
    names: Sequence[str],
    code: object,
) -> dict[str, Tensor | None]:
    """The same of a reentrant checkpoint, which takes nothing but `backward`."""
    weights = [weight for module in modules_in(code) for weight in module.parameters()]
    before = [weight.grad for weight in weights]
    for weight in weights:
        weight.grad = None
    try:
        above = None if upstream is None else upstream.to(output.dtype)
        torch.autograd.backward([output], [above])
    finally:
        for weight, grad in zip(weights, before, strict=True):
            weight.grad = grad
    return {name: leaves[name].grad for name in names}


def gradients(
    output: Tensor, leaves: Mapping[str, Tensor], upstream: Tensor | None, names: Sequence[str]
) -> dict[str, Tensor | None]:
    """Return the gradients of the leaves by name; None where the output does not depend on one."""
    if upstream is None or not names or not output.requires_grad:
        return dict.fromkeys(names)
    found = torch.autograd.grad(
        output, [leaves[name] for name in names], upstream.to(output.dtype), allow_unused=True
    )
    return dict(zip(names, found, strict=True))


def copies(call: Call, names: Sequence[str], dtype: torch.dtype | None = None) -> dict[str, Tensor]:
    """Copies of the tensors of a call, by the name of their result, with the same strides."""
    # Those in `names` require a gradient.
    leaves = {}
    for name, field in _LEAVES.items():
        tensor = getattr(call, field)
        if tensor is not None:
            leaves[name] = _copy(tensor.detach(), dtype).requires_grad_(name in names)
    return leaves


def handed(call: Call, leaves: Mapping[str, Tensor], beside: int = 0) -> Call:
    """The call of some leaves: a subject may write to its tensors, but not to a leaf."""
    hand = cast(Callable[[Tensor, int], Tensor], _Handed.apply)
    given = {
        _LEAVES[name]: hand(leaf, beside) if leaf.requires_grad or beside else leaf
        for name, leaf in leaves.items()
    }
    mask = None if call.mask is None else _copy(call.mask, None)
    return replace(call, **given, mask=mask)  # type: ignore[arg-type]


class _Handed(torch.autograd.Function):
    """A copy with the same strides, which `clone` does not keep where elements share memory."""

    @staticmethod
    def forward(ctx: Any, leaf: Tensor, beside: int) -> Tensor:
        return _copy(leaf, None, beside)

    @staticmethod
    def backward(ctx: Any, above: Tensor) -> tuple[Tensor, None]:
        return above, None


def _copy(tensor: Tensor, dtype: torch.dtype | None, beside: int = 0) -> Tensor:
    """A copy with the same strides, also where elements share memory; NaN before and after it."""
    reach = 1 + sum((n - 1) * step for n, step in zip(tensor.shape, tensor.stride(), strict=True))
    memory = tensor.as_strided((reach,), (1,)).to(dtype or tensor.dtype, copy=True)
    # Not a view of that memory: into a view that a custom function returns, nobody may write.
    empty = torch.empty(0, dtype=memory.dtype, device=memory.device)
    if beside:
        memory = torch.nn.functional.pad(memory, (beside, beside), value=math.nan)
    return empty.set_(memory.untyped_storage(), beside, tensor.shape, tensor.stride())


# --- with dropout: gradients beside differences of the output
#
# From one seed the same weights are dropped in every call, and the output is a smooth function of
# query, key and value. Along any direction its slope is a quotient of differences:
# (f(x + h d) - f(x - h d)) / 2 h  =  gradient . d  +  O(h^2). Which weights were dropped is seen
# where each key has a value of its own: so a mistake of the backward pass has a name here as well.


def check_by_differences(
    assertion: str, subject: AttentionFunction, share: float, seed: int
) -> None:
    """Compare the gradients of a function that drops weights with differences of its output."""
    # Its random numbers start from the seed in every call.
    tensors = {"query": subject.query, "key": subject.key, "value": subject.value}
    dtype = subject.query.dtype
    if dtype not in _STEPS:
        accepted = "float64 or float32: with dropout, gradients are compared with differences"
        raise TypeError(misuse("query", dtype_name(dtype), accepted))

    def called(changed: dict[str, Tensor]) -> tuple[Tensor, list[Tensor]]:
        # Needed by every call, so that the same kernel runs in all of them.
        given = {**tensors, **changed}
        leaves = {name: one.detach().clone().requires_grad_() for name, one in given.items()}
        seed_all(seed)
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
                worst=place, cause=mistake, tensor=Checked.of(slope), repeat=f"seed={seed}",
            )  # fmt: skip


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
    columns = torch.arange(width, device=keys.device)
    ones = (keys[:, None] == start + columns for start in range(0, call.key_len, width))
    own = [run({"value": one.to(call.value).expand_as(call.value)}) for one in ones]
    weights = torch.cat(own, -1)[..., : call.key_len].double()
    right = reference(replace(call, upstream=None), wanted=("weights",)).exact["weights"]
    kept = (weights >= right / (1 - share) / 2).double() / (1 - share)
    return kept if bool(((weights - kept * right).abs() < _SEEN).all()) else None
