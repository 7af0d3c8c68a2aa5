"""The assertion that what tensors hold counts, and not how memory holds it."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeAlias

import torch
from torch import Tensor

from pytest_attnheat.assertions.behaviour.difference import check_relative, check_rows, output_place
from pytest_attnheat.assertions.behaviour.functions import MASK
from pytest_attnheat.assertions.behaviour.invariance import RANDOM_CAUSE
from pytest_attnheat.assertions.behaviour.models import Subject
from pytest_attnheat.assertions.behaviour.reading import as_subject
from pytest_attnheat.assertions.behaviour.subject import coarsest, differ, holds, settled
from pytest_attnheat.attention.chunks import index_of
from pytest_attnheat.attention.tolerance import is_fine
from pytest_attnheat.callables import borrowed, changed
from pytest_attnheat.failure import Checked, Failure, Place
from pytest_attnheat.inputs import wide_dtype

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

    Example:
        >>> assert_layout_invariant(my_attention, query, key, value)
    """
    __tracebackhide__ = True
    called = as_subject(subject, inputs, arguments, seed=seed if training else None)
    given = called.tensors
    with borrowed(subject, *inputs, seed=seed):
        settled(subject, lambda: _run(called, _contiguous(given)), training=training, seed=seed)
        check = _Check(called, gradients, tolerance, seed, training)
        check.unwritten(given)
        for trial in _trials(given):
            check.holds(trial)


def _run(subject: Subject, tensors: _Tensors) -> Tensor:
    with torch.no_grad():
        return subject.run(**tensors)


@dataclass(frozen=True)
class _Check:
    """Compares the subject for some layout with itself for contiguous inputs.

    Attributes:
        subject: What is called.
        gradients: Whether gradients are compared.
        tolerance: As the caller gave it.
        seed: What the gradient of the output is drawn from.
        training: Whether the subject may be random.
    """

    subject: Subject
    gradients: bool
    tolerance: float | None
    seed: int
    training: bool

    def unwritten(self, given: _Tensors) -> None:
        """Check that a call leaves contiguous inputs as they are."""
        __tracebackhide__ = True
        inputs = _contiguous(given)
        before, versions = _contiguous(inputs), _versions(inputs)
        _run(self.subject, inputs)
        _check_unwritten(inputs, before, versions, "")

    def holds(self, trial: _Trial) -> None:
        """Check one layout."""
        __tracebackhide__ = True
        plain, versions = _contiguous(trial.laid), _versions(trial.laid)
        expected = _run(self.subject, _contiguous(plain))
        got = self._tried(trial, lambda: _run(self.subject, trial.laid))
        _check_unwritten(trial.laid, plain, versions, f" with {trial.what}")
        check_rows(
            _NAME,
            got,
            expected,
            claim=f"rows change with {trial.what}",
            allowed=self._allowed(got, plain),
            judged=self.subject.given(**plain).judged(),
            cause=lambda _: self._cause(trial, got),
            repeat=f"seed={self.seed}",
            again=lambda: _run(self.subject, trial.laid),
        )
        if self.gradients:
            self._same_gradients(trial, plain, got)

    def _tried(self, trial: _Trial, run: Callable[[], Any]) -> Any:
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

    def _same_gradients(self, trial: _Trial, plain: _Tensors, output: Tensor) -> None:
        __tracebackhide__ = True
        try:
            expected = self._gradients(plain)
        except RuntimeError:  # there is no backward for this
            return
        got = self._tried(trial, lambda: self._gradients(trial.laid)) if expected else {}
        for name, gradient in expected.items():
            dtype = coarsest(gradient, output)
            check_rows(
                _NAME,
                got.get(name, torch.zeros_like(gradient)),
                gradient,
                claim=f"rows of the gradient of {name} change with {trial.what}",
                allowed=_gradient_tolerance(self.tolerance, dtype),
                judged=gradient.isfinite().all(-1),
                may_be_none=True,
                floor=torch.maximum(
                    _floor(name, expected, plain), self._subtracted(name, plain, dtype)
                ),
                place=partial(output_place, name=f"{name}.grad"),
                cause=lambda _: RANDOM_CAUSE if self.training else None,
                repeat=f"seed={self.seed}",
            )

    def _subtracted(self, name: str, tensors: _Tensors, dtype: torch.dtype) -> Tensor:
        """The size below which the gradient of query or key is what a subtraction leaves.

        The gradient of a score is `weight * (g - mean)`, where g is the gradient of the weight and
        the mean is taken with the weights. Where attention is saturated g equals its mean, and
        what is left is the rounding of g, times the key (for the query) or the queries that see it
        (for the key). The floor is such that the tolerance allows `_ROUNDED` eps of that product,
        and `_ROUNDED_SCORE` in wider dtypes, whose tolerance is many eps: several times what the
        kernels of PyTorch were seen to need. The price is that in saturated attention an error in
        the gradient of queries and keys, which is nearly all rounding there, may pass.
        """
        if self.subject.scale is None or name not in ("query", "key"):
            return torch.zeros((), dtype=torch.float64, device=tensors[name].device)
        query, key, value = (tensors[n] for n in ("query", "key", "value"))
        scale = abs(self.subject.scale)
        # The gradient of the output is drawn with a variance of 1.
        weight_gradient = _largest_row(value) * math.sqrt(value.shape[-1])
        other = _largest_row(key)
        if name == "key":
            seen_by = query.shape[-2] * self.subject.group
            other = _largest_row(query) * math.sqrt(seen_by)
        units = _ROUNDED_SCORE if is_fine(dtype) else _ROUNDED
        rounded = units * torch.finfo(dtype).eps
        product = weight_gradient * other * scale
        return rounded * product / _gradient_tolerance(None, dtype)

    def _gradients(self, tensors: _Tensors) -> dict[str, Tensor]:
        """Return the gradients of the inputs that have one."""
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
        judged = self.subject.given(**tensors).judged()
        if judged is not None:
            drawn = drawn.masked_fill(~judged.expand(drawn.shape[:-1]).unsqueeze(-1), 0.0)
        found = torch.autograd.grad(
            output, list(wanted.values()), drawn, allow_unused=True, materialize_grads=True
        )
        return dict(zip(wanted, found, strict=True))

    def _cause(self, trial: _Trial, got: Tensor) -> str | None:
        """Try how else the memory could have been read."""
        if self.training:
            return RANDOM_CAUSE
        readings = {
            "strides are ignored: memory is read as if it were contiguous": None,
            "the storage offset is ignored: memory is read from its beginning": 0,
        }
        for said, offset in readings.items():
            found = {name: _read_at(trial.laid[name], offset) for name in trial.names}
            read = {name: tensor for name, tensor in found.items() if tensor is not None}
            if read:
                as_read = _contiguous({**trial.laid, **read})
                if holds(partial(self._gives, got, as_read)):
                    return said
        return None

    def _gives(self, output: Tensor, tensors: _Tensors) -> bool:
        """Whether the output is the one for these tensors."""
        return not differ(output, _run(self.subject, tensors), self._allowed(output, tensors))

    def _allowed(self, output: Tensor, tensors: _Tensors) -> float | Tensor:
        """By what part of its size a row of the output may change.

        A score of 1000 is rounded by 1000 eps, and its weight with it, by the exponential: of
        scores that are this large half of that was measured in float32.
        """
        inputs = [tensor for name, tensor in tensors.items() if name != MASK]
        dtype = coarsest(output, *(tensor for tensor in inputs if tensor.is_floating_point()))
        allowed = check_relative(self.tolerance, dtype)
        if self.tolerance is not None or self.subject.scale is None:
            return allowed
        query, key = tensors["query"], tensors["key"]
        scale = math.sqrt(query.shape[-1]) * abs(self.subject.scale)
        rounded = _rms(query) * _rms(key) * (scale * torch.finfo(wide_dtype(dtype)).eps)
        return rounded.clamp(min=allowed, max=max(allowed, _MOST))


def _gradient_tolerance(tolerance: object, dtype: torch.dtype) -> float:
    allowed = check_relative(tolerance, dtype)
    if tolerance is not None:
        return allowed
    return max(allowed, min(_GRADIENT_FACTOR * allowed, _GRADIENT_MOST))


def _floor(name: str, gradients: _Tensors, inputs: _Tensors) -> Tensor:
    """The size below which the gradient of an input may be nothing but rounding.

    Where all keys are the same the query has no gradient, but rounding leaves some. What counts is
    by how much an input changes the loss, next to the one that changes it most.
    """
    moved = [_rms(gradient) * _rms(inputs[other]) for other, gradient in gradients.items()]
    own = _rms(inputs[name]).clamp(min=torch.finfo(torch.float32).tiny)
    return torch.stack(moved).amax() / own


def _largest_row(tensor: Tensor) -> Tensor:
    return _finite(tensor).square().mean(-1).sqrt().amax()


def _rms(tensor: Tensor) -> Tensor:
    return _finite(tensor).square().mean().sqrt()


def _finite(tensor: Tensor) -> Tensor:
    return tensor.detach().double().nan_to_num(posinf=0.0, neginf=0.0)


def _versions(tensors: _Tensors) -> dict[str, int]:
    # Tensors of inference mode count no versions: of them the contents are compared alone.
    return {n: 0 if t.is_inference() else t._version for n, t in tensors.items()}


def _check_unwritten(
    tensors: _Tensors, before: _Tensors, versions: Mapping[str, int], when: str
) -> None:
    """Raise a Failure about an input that a call has written into."""
    __tracebackhide__ = True
    now = _versions(tensors)
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
            _NAME,
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
    """Some inputs in another layout.

    Attributes:
        what: Names them and the layout.
        names: Which inputs.
        laid: All inputs.
    """

    what: str
    names: Sequence[str]
    laid: _Tensors


def _contiguous(tensors: _Tensors) -> dict[str, Tensor]:
    """Copy tensors, so that nothing is written into those of the caller."""
    return {
        name: tensor.clone(memory_format=torch.contiguous_format)
        for name, tensor in tensors.items()
    }


def _trials(given: _Tensors) -> Iterator[_Trial]:
    """List the layouts of each input alone and of all together."""
    groups = [[name] for name in given]
    if len(given) > 1:
        groups.append(list(given))
    for layout, make in [*_LAYOUTS.items(), *_expansions(given)]:
        for names in groups:
            made = {name: make(name, given[name]) for name in names}
            laid = {name: tensor for name, tensor in made.items() if tensor is not None}
            if laid:
                order = _PERMUTED.get(given[next(iter(laid))].ndim, "(..., length, heads, width)")
                said = f"{_listed(list(laid))} {layout.format(order)}"
                yield _Trial(said, list(laid), {**_contiguous(given), **laid})
    packed = packed_together(given)
    if packed:
        names = list(packed)
        said = f"{_listed(names)} packed in one projection (batch, length, heads and widths)"
        yield _Trial(said, names, {**_contiguous(given), **packed})


def _listed(names: list[str]) -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"


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
    memory = torch.cat([tensor.flatten()[-1:], tensor.flatten()])
    return memory[1:].view(tensor.shape)


def _expansions(given: _Tensors) -> Iterator[tuple[str, _Layout]]:
    """The layouts with stride 0: over the batch, over heads as grouped attention, over length."""
    for dim in range(max(tensor.ndim for tensor in given.values()) - 1):
        yield f"expanded over dimension {dim}, with stride 0", partial(_expanded, dim)


def _expanded(dim: int, name: str, tensor: Tensor) -> Tensor | None:
    if dim >= tensor.ndim - 1 or tensor.shape[dim] == 1:
        return None
    return tensor.narrow(dim, 0, 1).contiguous().expand(tensor.shape)


def packed_together(given: _Tensors) -> _Tensors:
    """Query, key and value as `projection.view(batch, length, 3, heads, width).unbind(2)`.

    Nothing where their lengths differ: then one projection cannot have made them.
    """
    names = [name for name in ("query", "key", "value") if name in given]
    # The heads of grouped attention may differ in number; they lie side by side in memory.
    headed = [given[name].ndim > 3 for name in names]
    turned = [
        given[name].transpose(-3, -2) if heads else given[name].unsqueeze(-2)
        for name, heads in zip(names, headed, strict=True)
    ]
    if len({tensor.shape[:-2] for tensor in turned}) != 1 or len(names) < 3:
        return {}
    widths = [tensor.shape[-2:].numel() for tensor in turned]
    packed = torch.cat([tensor.flatten(-2) for tensor in turned], -1)
    parts = torch.split(packed, widths, -1)
    views = [
        part.view(*part.shape[:-1], *like.shape[-2:])
        for part, like in zip(parts, turned, strict=True)
    ]
    return {
        name: view.transpose(-3, -2) if heads else view.squeeze(-2)
        for name, view, heads in zip(names, views, headed, strict=True)
    }


# In words, and how; None where a tensor cannot lie so.
_LAYOUTS: dict[str, _Layout] = {
    "permuted from {}": _permuted,
    "transposed, the last dimension not contiguous": _transposed,
    "sliced, every second row of a larger tensor": _stepped,
    "at a storage offset of one element": _shifted,
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
