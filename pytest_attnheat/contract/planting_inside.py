"""A block with a defect in the attention that it does inside, called as the block is.

While a block runs, each call of PyTorch's attention goes through a planted version of it, and so
does each call of a function of query, key and value that the block's own modules hold, as the eager
attention of a model of transformers. The projections and all else of the block are its own.
"""

from __future__ import annotations

import copy
import functools
import sys
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import FunctionType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from ..callables import parameters_of, random_kept
from ..capture.sources.sdpa import multi_head_unasking
from .conventions import fitting
from .effects import Effect
from .planting import Planted
from .ready import READY_MADE, as_spec
from .spec import AttentionSpec
from .versions import Version

SDPA = functional.scaled_dot_product_attention
NOTHING_INSIDE = (
    "inside of it nothing is called that is known as attention: neither PyTorch's "
    "scaled_dot_product_attention nor a function of query, key and value in its module; name the "
    "function that does it"
)
# What functions of attention call their tensors.
_TENSORS = ({"query", "key", "value"}, {"q", "k", "v"})
# Whose functions are no part of a block.
_OTHERS = ("torch", "pytest_attnheat")
_EXAMINED = """\
from pytest_attnheat import AttentionSpec, check_attention

# In a test of yours, where block is the {name} that it judges:
report = check_attention({subject})
assert report.passed, str(report)"""


@dataclass
class Inside:
    """What is known of the functions that a block calls; shared by all its versions."""

    # How functions are called that may be attention; None of those that are not
    specs: dict[Callable[..., Any], AttentionSpec | None] = field(
        default_factory=lambda: {SDPA: AttentionSpec(SDPA)}
    )
    known: OrderedDict[Any, Any] = field(default_factory=OrderedDict)  # See `planting.Planted`

    def spec_of(self, function: Callable[..., Any]) -> AttentionSpec | None:
        """How a function is called, None if it is no attention."""
        if function not in self.specs:
            self.specs[function] = _spec_of(function)
        return self.specs[function]


def _spec_of(function: Callable[..., Any]) -> AttentionSpec | None:
    names = parameters_of(function) or {}
    if not any(tensors <= set(names) for tensors in _TENSORS) and not fitting(names):
        return None
    try:
        return as_spec(function)
    except (TypeError, ValueError):
        return None


class PlantedInside:
    """A block with a defect, called as the block is.

    `called` is what it was first called with, in words of `AttentionSpec`.
    """

    def __init__(
        self,
        spec: AttentionSpec,  # What of attention a block may take
        block: Callable[..., Any],  # It, or a function that runs one, that is `of_object()`
        version: Version | None,  # What is planted, None for nothing
        inside: Inside,  # What is known of the functions that it calls
    ) -> None:
        """Plant a version."""
        self.spec, self.version, self.effect, self._inside = spec, version, Effect(), inside
        self.called = ""
        self.module = block if isinstance(block, nn.Module) else None
        self._target = block.forward if isinstance(block, nn.Module) else block
        self._planted: dict[Callable[..., Any], Planted] = {}
        self._mode, self._is_inside = _Mode(self), False
        functools.update_wrapper(self, self._target, updated=())

    def __call__(self, *given: Any, **named: Any) -> Any:
        """Answer a call as the block does, with the defect in each attention where it shows."""
        if self._is_inside:  # what it is called by itself for
            return self._target(*given, **named)
        before = self.effect.calls
        self.called = self.called or _described(self._target, given, named)
        with self._replaced(), self._mode:
            answer = self._target(*given, **named)
        if self.effect.calls == before:
            self.effect.calls += 1
            self.effect.refused[NOTHING_INSIDE] = None
        return answer

    @property
    def code(self) -> str:
        """What examines the attention inside, to be pasted into a test that has the block."""
        if isinstance(self.module, READY_MADE):
            subject = "block"
        else:
            # Whether it is to be causal tells its own argument, or else a mask, which may do more.
            fields = self.called or "inputs=..."
            sees_all = self.effect.seen.isdisjoint(("causality", "a mask"))
            subject = f"AttentionSpec(block, {fields}{', causal=None' * sees_all})"
        code = _EXAMINED.format(name=self.spec.name, subject=subject)
        return "import torch\n\n" * ("torch." in subject) + code

    def __deepcopy__(self, memo: dict[int, Any]) -> PlantedInside:
        """A part of a copy of its block; what is asked of either is noted once."""
        own = object.__new__(type(self))
        vars(own).update(vars(self), _target=copy.deepcopy(self._target, memo), _mode=_Mode(own))
        return own

    def asked(self, function: Callable[..., Any], given: Sequence[Any], named: Any) -> Any:
        """Answer a call of a function inside."""
        if self._is_inside or self._inside.spec_of(function) is None:
            return function(*given, **named)
        refused = dict(self.effect.refused)
        self._is_inside = True
        try:
            answer = self._of(function)(*given, **named)
        finally:
            self._is_inside = False
        if (
            self.version is None
            and function is not SDPA
            and len(self.effect.refused) > len(refused)
        ):
            # What it calls itself may be understood.
            self.effect.refused, self._inside.specs[function] = refused, None
            self.effect.calls -= 1
            return function(*given, **named)
        return answer

    def _of(self, function: Callable[..., Any]) -> Planted:
        if function not in self._planted:
            spec = self._inside.spec_of(function)
            assert spec is not None
            planted = Planted(spec, self.version, self._inside.known)
            planted.effect = self.effect
            self._planted[function] = planted
        return self._planted[function]

    def multi_head(self, given: Sequence[Any], named: Mapping[str, Any]) -> Any:
        """Run PyTorch's multi-head attention; its weights, if wanted, go with the output."""
        # With weights it calls no other function for its attention, without them it does.
        run = multi_head_unasking()
        wanted = dict(zip(_MULTI_HEAD, given, strict=False)) | {**named}
        if not wanted.get("need_weights", True) or self._is_inside:
            with self._mode:
                return run(**wanted)
        active, planted = self.effect.active, self._of(SDPA)
        planted.keep_weights()
        with random_kept([wanted["query"].device]), self._mode:
            # With weights, being causal is but a hint of what the mask says.
            hint = {} if wanted.get("attn_mask") is None else {"is_causal": False}
            output, _ = run(**{**wanted, "need_weights": False, **hint})
        answer = run(**wanted)
        if self.version is not None and self.version.kind == "backward":
            return output, answer[1]
        if self.effect.active == active or planted.weights is None:
            return answer
        weights = planted.weights
        weights = weights.mean(1) if wanted.get("average_attn_weights", True) else weights
        return output, weights.reshape(answer[1].shape).to(answer[1])

    @contextmanager
    def _replaced(self) -> Iterator[None]:
        """Put what may be attention in the modules of the block in the place of what is there."""
        places = [(names, name, function) for names in self._namespaces()
                  for name, function in [*names.items()]
                  if type(function) is FunctionType
                  and function.__module__.partition(".")[0] not in _OTHERS
                  and self._inside.spec_of(function) is not None]  # fmt: skip
        try:
            for names, name, function in places:
                names[name] = self._in_place_of(function)
            yield
        finally:
            for names, name, function in places:
                names[name] = function

    def _in_place_of(self, function: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(function)
        def asked(*given: Any, **named: Any) -> Any:
            return self.asked(function, given, named)

        return asked

    def _namespaces(self) -> list[dict[str, Any]]:
        """The modules in which the block and the modules in it are written."""
        of_object = getattr(self._target, "of_object", None)
        module = of_object() if of_object is not None else self.module
        kinds = {type(one): None for one in (module.modules() if module is not None else ())}
        names = dict.fromkeys(kind.__module__ for kind in kinds)
        return [vars(sys.modules[name]) for name in names if name in sys.modules]


def _described(target: Callable[..., Any], given: Sequence[Any], named: Mapping[str, Any]) -> str:
    """Say what a block is called with, as `inputs=` and `arguments=`; what is no number is left."""
    names = [name for name in parameters_of(target) or () if name not in named]
    every = [*zip(names, given, strict=False), *named.items()]
    (_, x), others = every[0] if every else ("", None), every[1:]
    inputs = "inputs=..."
    if isinstance(x, Tensor) and x.ndim == (3 if x.is_floating_point() else 2):
        shape = ", ".join(map(str, (max(2, len(x)), *x.shape[1:])))
        dtype = f", dtype={x.dtype}" * (x.dtype != torch.float32)
        drawn = (
            f"torch.randn({shape}{dtype})"
            if x.ndim == 3
            else (f"torch.randint({int(x.max()) + 1}, ({shape}))")
        )
        inputs = f"inputs={drawn}"
    told = [f'"{name}": {one if isinstance(one, bool | int | float) else "..."}'
            for name, one in others if one is not None]  # fmt: skip
    return f"{inputs}, arguments={{{', '.join(told)}}}" if told else inputs


_MULTI_HEAD = tuple(parameters_of(functional.multi_head_attention_forward) or ())


class _Mode(TorchFunctionMode):
    """Sees each function of torch that a block calls."""

    def __init__(self, planted: PlantedInside) -> None:
        super().__init__()
        self._planted_inside = planted

    def __torch_function__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Any = None
    ) -> Any:
        named = kwargs or {}
        if func is SDPA:
            return self._planted_inside.asked(SDPA, args, named)
        if func is functional.multi_head_attention_forward:
            return self._planted_inside.multi_head(args, named)
        return func(*args, **named)
