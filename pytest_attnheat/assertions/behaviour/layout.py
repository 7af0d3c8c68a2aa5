"""The assertion that what tensors hold counts, and not how memory holds it."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import Any, TypeAlias

import torch
from torch import Tensor

from ...attention.backward import names_of
from ...attention.chunks import index_of
from ...attention.outcomes import finite
from ...attention.tolerance import is_fine
from ...callables import borrowed, changed
from ...failure import Checked, Failure, Place
from ...inputs import wide_dtype
from .functions import MASK
from .invariance import RANDOM_CAUSE
from .models import Subject
from .reading import as_subject
from .subject import check_relative, check_rows, coarsest, differ, holds, output_place, settled

_Tensors: TypeAlias = Mapping[str, Tensor]
_Layout: TypeAlias = Callable[[str, Tensor], Tensor | None]

_NAME = "assert_layout_invariant"
# The order in which permuted dimensions lie in memory.
_PERMUTED = {4: "(batch, length, heads, width)", 3: "(length, batch, width)"}
# In float32 and float64 the backward of large scores rounds more than the forward pass.
_GRADIENT_FACTOR, _GRADIENT_MOST = 10.0, 2e-4
# Scores whose rounding changes outputs by more are too large to compare anything.
_MOST = 1e-2
# How many eps of what is subtracted the gradient of a saturated softmax may be off.
_ROUNDED, _ROUNDED_SCORE = 4.0, 32.0


def assert_layout_invariant(
    subject: Callable[..., Any],
    *inputs: Tensor,
    gradients: bool = True,
    tolerance: float | None = None,
    seed: int = 0,
    training: bool = False,
    **arguments: Any,
) -> None:
    """Assert that the output does not depend on how the inputs lie in memory.

    Every input alone, and all together, are laid out differently with the same values: dimensions
    permuted, the last dimension not contiguous, every second row of a larger tensor, memory that
    begins one element later, parts of one packed projection, and each dimension but the last
    expanded with stride 0. The output must be that for contiguous inputs. Nor may any call write
    into its inputs.

    Args:
        subject: An attention function with the signature of
            `torch.nn.functional.scaled_dot_product_attention`, or a sequence model.
        *inputs: Query, key and value for a function; one sequence for a model:
            floats (batch, length, width) or token ids (batch, length).
        gradients: Whether the gradients of inputs of floats are compared as
            well, by calls with autograd. Left out where the subject has none.
        tolerance: By what part of its size a row of the output, or of a
            gradient, may change. By default it follows the dtype: 1e-11, 2e-5,
            7.8e-3, 6.2e-2 in float64, float32, float16, bfloat16 (other memory
            may be read by other kernels), for gradients 1e-10, 2e-4 in the first two.
        seed: What the gradient of the output is drawn from.
        training: Accept a subject that answers at random, and start every call
            from the seed. It must draw the same numbers for every layout:
            dropout may draw in the order of the memory.
        **arguments: Passed to the subject at every call. The `attn_mask` of a
            function is laid out differently too.

    Raises:
        Failure: A layout changes the output or a gradient, the subject raises for it, or writes
            into an input. The message names layout and input.
        TypeError: There are neither one nor three inputs, or one has the wrong type.
        ValueError: Shapes do not fit, or the subject answers at random.

    Examples:
        >>> assert_layout_invariant(my_attention, query, key, value)
    """
    __tracebackhide__ = True
    called = as_subject(subject, inputs, arguments, seed=seed if training else None)
    with borrowed(subject, *inputs, seed=seed):
        plain = _Plain(called, called.tensors, tolerance, seed)
        settled(subject, plain.run, training=training, seed=seed)
        laid = _contiguous(plain.tensors)
        _run(called, laid)
        check_unwritten(laid, plain.tensors, dict.fromkeys(laid, 0), "")
        for trial in _trials(plain):
            _check(trial, gradients=gradients, training=training)


def _run(subject: Subject, tensors: _Tensors) -> Tensor:
    with torch.no_grad():
        return subject.run(**tensors)


@dataclass(frozen=True)
class _Plain:
    """Contiguous inputs, and what they give: the same must be given wherever they lie in memory."""

    subject: Subject  # What is called
    tensors: _Tensors  # Its inputs
    tolerance: float | None  # As the caller gave it
    seed: int  # What the gradient of the output is drawn from

    def run(self) -> Tensor:
        """Call the subject, with copies: it may write to them."""
        return _run(self.subject, _contiguous(self.tensors))

    @cached_property
    def output(self) -> Tensor:
        return self.run()

    @cached_property
    def judged(self) -> Tensor | None:
        """Which rows of it mean something."""
        return self.subject.given(**self.tensors).judged()

    @cached_property
    def allowed(self) -> float | Tensor:
        """By what part of its size a row of the output may change."""
        # A score of 1000 is rounded by 1000 eps, and its weight with it, by the exponential: of
        # scores that are this large half of that was measured in float32.
        inputs = [tensor for name, tensor in self.tensors.items() if name != MASK]
        dtype = coarsest(self.output, *(one for one in inputs if one.is_floating_point()))
        allowed = check_relative(self.tolerance, dtype)
        if self.tolerance is not None or self.subject.scale is None:
            return allowed
        scale = math.sqrt(self.tensors["query"].shape[-1]) * abs(self.subject.scale)
        rounded = _rms(self.tensors["query"]) * _rms(self.tensors["key"])
        rounded = rounded * (scale * torch.finfo(wide_dtype(dtype)).eps)
        return rounded.clamp(min=allowed, max=max(allowed, _MOST))

    @cached_property
    def gradients(self) -> dict[str, Tensor]:
        """Those of its inputs; none where there is no backward."""
        try:
            return self.gradients_of(self.tensors)
        except Exception:  # what has no backward says so in any way
            return {}

    def gradients_of(self, tensors: _Tensors) -> dict[str, Tensor]:
        """Return the gradients of the inputs that have one, where they lie so."""
        leaves = {
            name: tensor.detach().requires_grad_(tensor.is_floating_point() and name != MASK)
            for name, tensor in tensors.items()
        }
        wanted = {name: leaf for name, leaf in leaves.items() if leaf.requires_grad}
        with torch.enable_grad():
            output = self.subject.run(**leaves)
        if not wanted or not output.requires_grad:
            return {}
        generator = torch.Generator().manual_seed(self.seed)
        drawn = torch.randn(output.shape, generator=generator).to(output)
        if self.judged is not None:
            drawn = drawn.masked_fill(~self.judged.expand(drawn.shape[:-1]).unsqueeze(-1), 0.0)
        found = torch.autograd.grad(
            output, list(wanted.values()), drawn, allow_unused=True, materialize_grads=True
        )
        return dict(zip(wanted, found, strict=True))

    def gradient_allowed(self, name: str) -> tuple[float, Tensor]:
        """By what part of its size a row of a gradient may change, and the least size of a row."""
        # Where all keys are the same the query has no gradient, but rounding leaves some. What
        # counts is by how much an input changes the loss, next to the one that changes it most.
        dtype = coarsest(self.gradients[name], self.output)
        own = _rms(self.tensors[name]).clamp(min=torch.finfo(torch.float32).tiny)
        floor = torch.maximum(self._moved / own, self._subtracted(name, dtype))
        return _gradient_tolerance(self.tolerance, dtype), floor

    def _subtracted(self, name: str, dtype: torch.dtype) -> Tensor:
        """The size below which the gradient of query or key is what a subtraction leaves."""
        # The gradient of a score is `weight * (g - mean)`, where g is the gradient of the weight
        # and the mean is taken with the weights. Where attention is saturated g equals its mean,
        # and what is left is the rounding of g, times the key (for the query) or the queries that
        # see it (for the key). The floor is such that the tolerance allows `_ROUNDED` eps of that
        # product, and `_ROUNDED_SCORE` in wider dtypes, whose tolerance is many eps: several times
        # what the kernels of PyTorch were seen to need. The price is that in saturated attention an
        # error in the gradient of queries and keys, which is nearly all rounding there, may pass.
        tensors = self.tensors
        if self.subject.scale is None or name not in ("query", "key"):
            return torch.zeros((), dtype=torch.float64, device=tensors[name].device)
        other = tensors["key" if name == "query" else "query"]
        # The gradient of the output is drawn with a variance of 1.
        product = _rms(tensors["value"], -1).amax() * math.sqrt(tensors["value"].shape[-1])
        product = product * _rms(other, -1).amax()
        if name == "key":
            product = product * math.sqrt(tensors["query"].shape[-2] * self.subject.group)
        units = _ROUNDED_SCORE if is_fine(dtype) else _ROUNDED
        rounded = units * torch.finfo(dtype).eps * abs(self.subject.scale)
        return product * (rounded / _gradient_tolerance(None, dtype))

    @cached_property
    def _moved(self) -> Tensor:
        """By how much the input that changes the loss most changes it."""
        moved = [_rms(one) * _rms(self.tensors[name]) for name, one in self.gradients.items()]
        return torch.stack(moved).amax()


def _check(trial: _Trial, *, gradients: bool, training: bool) -> None:
    __tracebackhide__ = True
    plain, repeat = trial.plain, f"seed={trial.plain.seed}"
    versions = versions_of(trial.laid)
    got = _tried(trial, trial.run)
    check_unwritten(trial.laid, plain.tensors, versions, f" with {trial.what}")
    check_rows(
        _NAME, got, plain.output, claim=f"rows change with {trial.what}", allowed=plain.allowed,
        judged=plain.judged, cause=lambda _: RANDOM_CAUSE if training else _cause(trial, got),
        repeat=repeat, again=trial.run,
    )  # fmt: skip
    if not gradients or not plain.gradients:
        return
    found = _tried(trial, lambda: plain.gradients_of(trial.laid))
    for name, gradient in plain.gradients.items():
        other = found.get(name, torch.zeros_like(gradient))
        if torch.equal(other, gradient):  # one read, and all else is saved
            continue
        allowed, floor = plain.gradient_allowed(name)
        check_rows(
            _NAME, other, gradient,
            claim=f"rows of the gradient of {name} change with {trial.what}", allowed=allowed,
            judged=gradient.isfinite().all(-1), may_be_none=True, floor=floor,
            place=partial(output_place, name=f"{name}.grad"),
            cause=lambda _: RANDOM_CAUSE if training else None, repeat=repeat,
        )  # fmt: skip


def _tried(trial: _Trial, run: Callable[[], Any]) -> Any:
    """Call the subject with a layout, which it must not refuse."""
    __tracebackhide__ = True
    try:
        return run()
    except torch.cuda.OutOfMemoryError:
        raise
    except Exception as error:
        text = (str(error).splitlines() or [""])[0]
        cause = ".view() needs memory of its own kind: .reshape(), or .contiguous() before it"
        raise Failure(
            _NAME,
            f"the subject raises with {trial.what}",
            worst=Place(f"{type(error).__name__}: {text}"),
            cause=cause if "view" in text else None,
            tensor=Checked.of(trial.laid[trial.names[0]]),
        ) from error


def _cause(trial: _Trial, got: Tensor) -> str | None:
    """Try how else the memory could have been read."""
    readings = {
        "strides are ignored: memory is read as if it were contiguous": None,
        "the storage offset is ignored: memory is read from its beginning": 0,
    }
    for said, offset in readings.items():
        found = {name: _read_at(trial.laid[name], offset) for name in trial.names}
        read = {name: tensor for name, tensor in found.items() if tensor is not None}
        as_read = replace(trial.plain, tensors={**trial.laid, **read})
        if read and holds(lambda: not differ(got, as_read.output, as_read.allowed)):  # noqa: B023
            return said
    return None


def _gradient_tolerance(tolerance: object, dtype: torch.dtype) -> float:
    allowed = check_relative(tolerance, dtype)
    most = min(_GRADIENT_FACTOR * allowed, _GRADIENT_MOST) if tolerance is None else 0.0
    return max(allowed, most)


def _rms(tensor: Tensor, dim: int | None = None) -> Tensor:
    return finite(tensor.detach().double()).square().mean(dim).sqrt()


def versions_of(tensors: _Tensors) -> dict[str, int]:
    """How often each tensor was written to."""
    # Tensors of inference mode count no versions: of them the contents are compared alone.
    return {n: 0 if t.is_inference() else t._version for n, t in tensors.items()}


def check_unwritten(
    tensors: _Tensors, before: _Tensors, versions: Mapping[str, int], when: str = "", *,
    assertion: str = _NAME
) -> None:  # fmt: skip
    """Raise a Failure about an input that a call has written into."""
    __tracebackhide__ = True
    now = versions_of(tensors)
    changes = {name: changed(tensor, before[name]) for name, tensor in tensors.items()}
    device = next(iter(changes.values())).device  # a mask may be on another
    any_changed = torch.stack([change.any().to(device) for change in changes.values()])
    flags: list[bool] = any_changed.tolist()
    for (name, tensor), differs in zip(tensors.items(), flags, strict=True):
        if not differs and now[name] == versions[name]:
            continue
        change, was = changes[name], before[name]
        place = index_of(change.flatten().int().argmax(), change.shape)
        then, after = was[place].item(), tensor[place].item()
        told = f"{output_place(place, name)} was {then:.6g} and is {after:.6g} after the call"
        worst = Place(f"{name} is written with what it held")
        raise Failure(
            assertion,
            f"elements change: the subject writes into {name}{when}",
            broken=int(change.sum()),
            of=change.numel(),
            worst=Place(told, place, after) if differs else worst,
            cause=f"an operation in place on {name}, for instance {name} *= scale",
            tensor=Checked.of(was),
        )


# --- How inputs may lie in memory


@dataclass(frozen=True)
class _Trial:
    """Some inputs in another layout."""

    plain: _Plain  # The same contents, contiguous
    what: str  # Names the inputs and the layout
    names: Sequence[str]  # Which inputs
    laid: _Tensors  # All inputs

    def run(self) -> Tensor:
        return _run(self.plain.subject, self.laid)


def _contiguous(tensors: _Tensors) -> dict[str, Tensor]:
    """Copy tensors, so that nothing is written into those of the caller."""
    return {
        name: tensor.clone(memory_format=torch.contiguous_format)
        for name, tensor in tensors.items()
    }


def _trials(plain: _Plain) -> Iterator[_Trial]:
    """List the layouts of each input alone and of all together."""
    given = plain.tensors
    groups = [[name] for name in given]
    if len(given) > 1:
        groups.append(list(given))
    # With stride 0: over the batch, over heads as in grouped attention, over the length.
    expansions: dict[str, _Layout] = {
        f"expanded over dimension {dim}, with stride 0": partial(_expanded, dim)
        for dim in range(max(tensor.ndim for tensor in given.values()) - 1)
    }
    for layout, make in {**_LAYOUTS, **expansions}.items():
        for names in groups:
            made = {name: make(name, given[name]) for name in names}
            laid = {name: tensor for name, tensor in made.items() if tensor is not None}
            if laid:
                order = _PERMUTED.get(given[next(iter(laid))].ndim, "(..., length, heads, width)")
                said = f"{names_of(list(laid))} {layout.format(order)}"
                whole = {**_contiguous(given), **laid}
                # What is expanded holds other numbers.
                same = layout not in expansions
                own = plain if same else replace(plain, tensors=_contiguous(whole))
                yield _Trial(own, said, list(laid), whole)
    packed = packed_together(given)
    if packed:
        names = list(packed)
        said = f"{names_of(names)} packed in one projection (batch, length, heads and widths)"
        yield _Trial(plain, said, names, {**_contiguous(given), **packed})


def _permuted(name: str, tensor: Tensor) -> Tensor | None:
    if tensor.ndim < 3 or name == MASK or 1 in tensor.shape[-3:-1]:
        return None
    return tensor.transpose(-3, -2).contiguous().transpose(-3, -2)


def _transposed(name: str, tensor: Tensor) -> Tensor | None:
    return None if 1 in tensor.shape[-2:] else tensor.mT.contiguous().mT


def _stepped(name: str, tensor: Tensor) -> Tensor | None:
    # What lies between would change the output if it were read.
    between = ~tensor if tensor.dtype == torch.bool else tensor.flip(-1)
    if tensor.is_floating_point():
        between = (-10 * between - 1).nan_to_num()
    return torch.stack([tensor, between], -2)[..., 0, :]


def _shifted(name: str, tensor: Tensor) -> Tensor | None:
    # Kernels of a GPU load 16 bytes at once. Some of PyTorch's fault elsewhere, and with a fault
    # the whole process loses its GPU.
    step = 1 if tensor.device.type == "cpu" else max(1, _ALIGNED // tensor.element_size())
    flat = tensor.flatten()
    memory = torch.cat([flat[-1:].expand(step), flat])
    return memory[step:].view(tensor.shape)


def _expanded(dim: int, name: str, tensor: Tensor) -> Tensor | None:
    if dim >= tensor.ndim - 1 or tensor.shape[dim] == 1:
        return None
    return tensor.narrow(dim, 0, 1).contiguous().expand(tensor.shape)


def packed_together(given: _Tensors) -> _Tensors:
    """Query, key and value as `projection.view(batch, length, 3, heads, width).unbind(2)`."""
    # Nothing where their lengths differ: then one projection cannot have made them.
    # The heads of grouped attention may differ in number; they lie side by side in memory.
    turned = {
        name: given[name].transpose(-3, -2) if given[name].ndim > 3 else given[name].unsqueeze(-2)
        for name in ("query", "key", "value")
        if name in given
    }
    if len({tensor.shape[:-2] for tensor in turned.values()}) != 1 or len(turned) < 3:
        return {}
    rows = [tensor.flatten(-2) for tensor in turned.values()]
    parts = torch.split(torch.cat(rows, -1), [row.shape[-1] for row in rows], -1)
    return {
        name: torch.unflatten(part, -1, like.shape[-2:]).transpose(-3, -2)
        if given[name].ndim > 3
        else part
        for (name, like), part in zip(turned.items(), parts, strict=True)
    }


_ALIGNED = 16  # bytes
# In words, and how; None where a tensor cannot lie so.
_LAYOUTS: dict[str, _Layout] = {
    "permuted from {}": _permuted,
    "transposed, the last dimension not contiguous": _transposed,
    "sliced, every second row of a larger tensor": _stepped,
    "at another storage offset": _shifted,
}


def _read_at(tensor: Tensor, offset: int | None) -> Tensor | None:
    """The same memory, read without its strides, or from another offset with them."""
    if offset is not None:
        return tensor.as_strided(tensor.shape, tensor.stride(), offset)
    held = tensor.untyped_storage().nbytes() // tensor.element_size() - tensor.storage_offset()
    if held < tensor.numel():
        return None
    strides = [math.prod(tensor.shape[dim + 1 :]) for dim in range(tensor.ndim)]
    return tensor.as_strided(tensor.shape, strides)
