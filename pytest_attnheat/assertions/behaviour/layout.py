"""The assertion that what tensors hold counts, and not how memory holds it."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from pytest_attnheat.assertions.behaviour.difference import check_relative, check_rows
from pytest_attnheat.assertions.behaviour.functions import MASK
from pytest_attnheat.assertions.behaviour.invariance import RANDOM_CAUSE
from pytest_attnheat.assertions.behaviour.memory_layouts import (
    Tensors,
    Trial,
    contiguous,
    read_at,
    trials,
)
from pytest_attnheat.assertions.behaviour.reading import as_subject
from pytest_attnheat.assertions.behaviour.subject import Subject, answers, coarsest, differ, settled
from pytest_attnheat.attention.chunks import index_of
from pytest_attnheat.callables import borrowed, changed
from pytest_attnheat.failure import Checked, Failure, Place
from pytest_attnheat.inputs import wide_dtype

_NAME = "assert_layout_invariant"
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

    Every input alone, and all together, are laid out in other ways with the
    same values: dimensions permuted, the last dimension not contiguous, every
    second row of a larger tensor, memory that begins one element later, parts of
    one packed projection, and each dimension but the last expanded with stride 0.
    The output must be that for contiguous inputs. Nor may any call write into its
    inputs.

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
            function is laid out in other ways too.

    Raises:
        Failure: A layout changes the output or a gradient, the subject
            raises for it, or writes into an input. The message names layout
            and input.
        TypeError: There are neither one nor three inputs, or one has the wrong type.
        ValueError: Shapes do not fit, or the subject answers at random.

    Example:
        >>> assert_layout_invariant(my_attention, query, key, value)
    """
    __tracebackhide__ = True
    called = as_subject(subject, inputs, arguments, seed=seed if training else None)
    given = called.tensors
    with borrowed(subject, *inputs, seed=seed):
        settled(subject, lambda: _run(called, contiguous(given)), training=training, seed=seed)
        check = _Check(called, gradients, tolerance, seed, training)
        check.unwritten(given)
        for trial in trials(given):
            check.holds(trial)


def _floats(tensors: Tensors) -> list[Tensor]:
    given = [tensor for name, tensor in tensors.items() if name != MASK]
    return [tensor for tensor in given if tensor.is_floating_point()]


def _run(subject: Subject, tensors: Tensors) -> Tensor:
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

    def unwritten(self, given: Tensors) -> None:
        """Check that a call leaves contiguous inputs as they are."""
        __tracebackhide__ = True
        inputs = contiguous(given)
        before, versions = contiguous(inputs), _versions(inputs)
        _run(self.subject, inputs)
        _check_unwritten(inputs, before, versions, "")

    def holds(self, trial: Trial) -> None:
        """Check one layout."""
        __tracebackhide__ = True
        plain, versions = contiguous(trial.laid), _versions(trial.laid)
        expected = _run(self.subject, contiguous(plain))
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
        )
        if self.gradients:
            self._same_gradients(trial, plain, got)

    def _tried(self, trial: Trial, run: Callable[[], Any]) -> Any:
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

    def _same_gradients(self, trial: Trial, plain: Tensors, output: Tensor) -> None:
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
                place=partial(_place, f"{name}.grad"),
                cause=lambda _: RANDOM_CAUSE if self.training else None,
                repeat=f"seed={self.seed}",
            )

    def _subtracted(self, name: str, tensors: Tensors, dtype: torch.dtype) -> Tensor:
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
        wide = dtype in (torch.float32, torch.float64)
        rounded = (_ROUNDED_SCORE if wide else _ROUNDED) * torch.finfo(dtype).eps
        product = weight_gradient * other * scale
        return rounded * product / _gradient_tolerance(None, dtype)

    def _gradients(self, tensors: Tensors) -> dict[str, Tensor]:
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

    def _cause(self, trial: Trial, got: Tensor) -> str | None:
        """Try how else the memory could have been read."""
        if self.training:
            return RANDOM_CAUSE
        readings = {
            "strides are ignored: memory is read as if it were contiguous": None,
            "the storage offset is ignored: memory is read from its beginning": 0,
        }
        for said, offset in readings.items():
            found = {name: read_at(trial.laid[name], offset) for name in trial.names}
            read = {name: tensor for name, tensor in found.items() if tensor is not None}
            if read:
                as_read = contiguous({**trial.laid, **read})
                if answers(partial(self._gives, got, as_read)):
                    return said
        return None

    def _gives(self, output: Tensor, tensors: Tensors) -> bool:
        """Whether the output is the one for these tensors."""
        return not differ(output, _run(self.subject, tensors), self._allowed(output, tensors))

    def _allowed(self, output: Tensor, tensors: Tensors) -> float | Tensor:
        """By what part of its size a row of the output may change.

        A score of 1000 is rounded by 1000 eps, and its weight with it, by the exponential: of
        scores that are this large half of that was measured in float32.
        """
        dtype = coarsest(output, *_floats(tensors))
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


def _floor(name: str, gradients: Tensors, inputs: Tensors) -> Tensor:
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


def _place(name: str, index: tuple[int, ...]) -> str:
    return f"{name}[{', '.join(map(str, index))}]"


def _versions(tensors: Tensors) -> dict[str, int]:
    # Tensors of inference mode count no versions: of them the contents are compared alone.
    return {n: 0 if t.is_inference() else t._version for n, t in tensors.items()}


def _check_unwritten(
    tensors: Tensors, before: Tensors, versions: Mapping[str, int], when: str
) -> None:
    """Raise a Failure about an input that a call has written into."""
    __tracebackhide__ = True
    now = _versions(tensors)
    changes = {name: changed(tensor, before[name]) for name, tensor in tensors.items()}
    flags: list[bool] = torch.stack([change.any() for change in changes.values()]).tolist()
    for (name, tensor), differs in zip(tensors.items(), flags, strict=True):
        if not differs and now[name] == versions[name]:
            continue
        change, was = changes[name], before[name]
        place = index_of(change.flatten().int().argmax(), change.shape)
        then, after = was[place].item(), tensor[place].item()
        told = f"{_place(name, place)} was {then:.6g} and is {after:.6g} after the call"
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
