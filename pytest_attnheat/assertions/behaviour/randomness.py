"""That a subject repeats itself in evaluation mode, and that dropout does what it declares."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ...attention.tolerance import output_tolerance
from ...callables import (
    borrowed,
    identical,
    modules_in,
    parameters_of,
    random_states,
    seed_everything,
)
from ...failure import Checked, Failure, Place
from ...inputs import check_number, misuse, positive, seed_number
from .dropout import check_dropout_of_weights, why_factor
from .functions import AttentionFunction
from .models import Subject
from .reading import as_subject
from .subject import check_count, check_rows, relative_change

_NAME = "assert_deterministic"
_STANDARD_ERRORS = 5
# From fewer, the standard error itself is too uncertain.
_FEWEST_RUNS = 30
_MOST_NAMES = 3


def assert_deterministic(
    subject: Callable[..., Any],
    *inputs: Tensor,
    dropout: float | None = None,
    runs: int = 200,
    unbiased: bool | None = None,
    seed: int = 0,
    **arguments: Any,
) -> None:
    """Assert that a subject repeats itself, and that its dropout, if it has one, does its work.

    In evaluation mode the same input must give the same output, bit for bit: in the next call
    after random numbers were drawn, and from another seed. That is all without `dropout`.

    With `dropout`, an attention function that takes `dropout_p` is called with this probability
    and an identity matrix as value, so that its output is its weights after dropout. It must be
    random and repeat itself from a seed; drop weights (not outputs) one by one, two weights of a
    row, a column, two heads or two batch entries together no more often than chance does; drop the
    declared share of them, whatever their size; divide what it keeps by 1 - p; and do nothing for
    `dropout_p=0.0`. The share may be off by 1 / 255, to which some
    fused kernels round it, and by what chance does in all but one of 10^6 checks.

    Of a large input only a part is checked so: some batch entries, heads, queries and keys.

    Any other subject must hold a module. In training mode it must be random, and repeat itself
    from a seed; and the mean of many runs must be the output of evaluation mode, if it is
    `unbiased`. If it has layers `nn.Dropout` or `nn.MultiheadAttention` with dropout, one of them
    must have the declared probability; of dropout done otherwise, how much is dropped is not
    measured. Modes are set here, and left as they were found.

    Args:
        subject: An attention function, called as `subject(query, key, value, **arguments)`, or a
            module that maps a sequence to a sequence.
        *inputs: Query, key and value of an attention function, (..., length, width); or the one
            input of a module: floats (batch, length, width) or token ids (batch, length).
        dropout: The probability that a weight is dropped, 0 < dropout < 1. Of a module with its
            own dropout only its layers' declarations are compared with it. None: nothing is
            checked in training, and the subject has to be in evaluation mode.
        runs: How many calls with dropout are made at most; for the mean of a module at least 30.
        unbiased: Whether the mean of a module in training mode is its output in evaluation
            mode, within 5 standard errors. By default only of `nn.MultiheadAttention`: where a
            nonlinear layer comes after dropout it is not.
        seed: Where the random numbers start.
        **arguments: Further arguments of every call: attn_mask, is_causal, scale, enable_gqa.

    Raises:
        Failure: Two calls differ in evaluation mode, or dropout is not what it declares.
            The message tells what was measured.
        TypeError: Not one or three inputs, or `dropout` for a function that takes no `dropout_p`.
        ValueError: A module is in training mode without `dropout`; an argument is out of range; or
            there are too few weights or runs to tell.

    Examples:
        >>> assert_deterministic(model.eval(), token_ids)
        >>> assert_deterministic(F.scaled_dot_product_attention, query, key, value, dropout=0.1)
    """
    __tracebackhide__ = True
    share = None if dropout is None else check_number(dropout, "dropout")
    if share is not None and not 0 < share < 1:
        raise ValueError(misuse("dropout", repr(share), "0 < dropout < 1, or None"))
    runs, seed = positive("runs", runs), seed_number(seed)
    if "dropout_p" in arguments:
        raise ValueError(misuse("dropout_p", arguments["dropout_p"], "dropout= in its place"))
    check_count(inputs, _NAME)
    call = _Call(as_subject(subject, inputs, arguments), modules_in(subject))
    with borrowed(subject, *call.called.tensors.values(), seed=seed), torch.no_grad():
        if share is None:
            _refuse_training(call.modules)
        call.train(False)
        evaluated = _check_repeats(call, seed)
        if share is None:
            return
        call.train(True)
        function = _with_dropout(call)
        if function is None and not call.modules:
            got = f"{share:g} for a subject that takes no dropout_p and holds no module"
            accepted = "None, since nothing says where its dropout is"
            raise TypeError(misuse("dropout", got, accepted))
        if function is not None:
            check_dropout_of_weights(_NAME, function, share, runs=runs, seed=seed)
        else:
            _check_training(call, evaluated, share, runs=runs, seed=seed)
            _check_declared(call, evaluated, share)
            # Of multi-head attention the output is linear in its weights after dropout.
            if isinstance(subject, nn.MultiheadAttention) if unbiased is None else unbiased:
                _check_mean(call, evaluated, share, runs=runs, seed=seed)


@dataclass(frozen=True)
class _Call:
    """A subject whose mode can be set."""

    called: Subject  # The subject
    modules: list[nn.Module]  # The modules that it is or holds

    def run(self) -> Tensor:
        return self.called.run()

    def train(self, mode: bool) -> None:
        for module in self.modules:
            module.train(mode)

    @property
    def mode(self) -> str:
        """What evaluation mode is called in a message."""
        return "in evaluation mode" if self.modules else "without dropout"


def _with_dropout(call: _Call) -> AttentionFunction | None:
    """The function, if its signature has `dropout_p`, or anything where it holds no module."""
    if not isinstance(call.called, AttentionFunction):
        return None
    taken = parameters_of(call.called.function)
    if taken is None:  # A builtin: F.scaled_dot_product_attention.
        return call.called
    takes_any = any(one.kind == one.VAR_KEYWORD for one in taken.values())
    takes = "dropout_p" in taken or (takes_any and not call.modules)
    return call.called if takes else None


def _refuse_training(modules: Sequence[nn.Module]) -> None:
    training = [type(module).__name__ for module in modules if module.training]
    if training:
        raise ValueError(
            f"{', '.join(training[:_MOST_NAMES])} is in training mode, in which nothing promises "
            "to repeat itself; call .eval() on it, or pass dropout= for a check of both modes"
        )


# --- evaluation mode


def _check_repeats(call: _Call, seed: int) -> Tensor:
    """Return the output in evaluation mode, after checking that it is always the same."""
    __tracebackhide__ = True
    seed_everything(seed)
    first = call.run()
    _draw(first.device)
    following = call.run()
    seed_everything(seed + 1)
    reseeded = call.run()
    for when, again in (("from one call to the next", following), ("with the seed", reseeded)):
        check_rows(
            _NAME, *_without_equal_nans(again, first), claim=f"outputs change {when}, {call.mode}",
            allowed=0.0, cause=lambda _: _why_random(call), repeat=f"seed={seed}",
            again=call.run,
        )  # fmt: skip
    return first


def _draw(device: torch.device) -> None:
    """Use the random numbers up, as other work between two calls would."""
    torch.rand(3)
    torch.rand(3, device=device)
    random.random()
    np.random.rand()


def _without_equal_nans(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """The same two tensors, with zeros wherever both hold the same NaN or inf."""
    same = ((a == b) | (a.isnan() & b.isnan())) & ~a.isfinite()
    return a.masked_fill(same, 0.0), b.masked_fill(same, 0.0)


def _why_random(call: _Call) -> str:
    states = [_random_state()]
    with _noting_who_draws(call.modules) as drawing:
        call.run()
    states.append(_random_state())
    if states[0] == states[1]:
        return (
            "no random numbers are drawn: does a call leave something behind that the next one "
            "reads (a cache, a counter), or read memory that nothing wrote?"
        )
    where = f", in {', '.join(drawing[:_MOST_NAMES])}" if drawing else ""
    return (
        f"random numbers are drawn {call.mode}{where}: dropout that is not switched off by "
        "training=self.training?"
    )


def _random_state() -> tuple[object, ...]:
    tensors = [state for states in random_states().values() for state in states]
    drawn = [state.numpy().tobytes() for state in tensors]
    return (*drawn, random.getstate(), str(np.random.get_state()))


@contextmanager
def _noting_who_draws(modules: Sequence[nn.Module]) -> Iterator[list[str]]:
    """Collect the names of the innermost modules that draw random numbers."""
    drawing: list[str] = []
    open_calls: list[tuple[tuple[object, ...], int]] = []

    def enter(*_: object) -> None:
        open_calls.append((_random_state(), len(drawing)))

    def leave(name: str) -> None:
        before, noted = open_calls.pop()
        if len(drawing) == noted and before != _random_state():
            drawing.append(name)

    with ExitStack() as stack:
        for path, part in (named for module in modules for named in module.named_modules()):
            kind = type(part).__name__
            name = f"{path} ({kind})" if path else kind
            stack.callback(part.register_forward_pre_hook(enter).remove)
            hook = part.register_forward_hook(lambda *_, name=name: leave(name))
            stack.callback(hook.remove)
        yield drawing


# --- training mode


def _check_training(call: _Call, evaluated: Tensor, share: float, *, runs: int, seed: int) -> None:
    """Check that training mode is random, and repeats itself from a seed."""
    __tracebackhide__ = True
    seed_everything(seed)
    first = call.run()
    seed_everything(seed)
    check_rows(
        _NAME,
        *_without_equal_nans(call.run(), first),
        claim=f"outputs in training mode are not repeated from seed {seed}",
        allowed=0.0,
        repeat=f"seed={seed}",
    )
    if any(not identical(call.run(), first) for _ in range(runs)):
        return
    cause = "training mode changes the output, though always in the same way: a fixed seed or mask?"
    if bool((relative_change(first, evaluated) <= output_tolerance(first.dtype)).all()):
        cause = "dropout is never applied"
    raise Failure(
        _NAME,
        f"dropout={share:g} was declared, but {runs} calls in training mode give equal outputs",
        worst=Place("no output differs from one call to the next"),
        cause=cause,
        tensor=Checked.of(first),
    )


def _check_declared(call: _Call, evaluated: Tensor, share: float) -> None:
    """Check that some dropout of the module has the declared probability."""
    __tracebackhide__ = True
    layers, others = _probabilities(call.modules)
    if not layers or any(math.isclose(p, share, rel_tol=1e-6) for p in (*layers.values(), *others)):
        return
    found = " and ".join(f"p={p:g}" for p in sorted(set(layers.values())))
    paths = list(layers)
    more = ", ..." * (len(paths) > _MOST_NAMES)
    raise Failure(
        _NAME,
        f"dropout={share:g} was declared, but the module's own layers have {found} "
        f"(at {', '.join(paths[:_MOST_NAMES])}{more})",
        worst=Place(f"none of {len(paths)} layers with dropout has p={share:g}"),
        tensor=Checked.of(evaluated),
    )


def _probabilities(modules: Sequence[nn.Module]) -> tuple[dict[str, float], list[float]]:
    """With what probability each layer drops, by its path; and other numbers named like dropout."""
    # A layer that never drops says nothing of dropout that is done by a function beside it, of
    # which a module keeps the probability as `self.attention_dropout`.
    layers: dict[str, float] = {}
    others: list[float] = []
    for path, part in (named for module in modules for named in module.named_modules()):
        p = 0.0
        if isinstance(part, nn.modules.dropout._DropoutNd):
            p = float(part.p)
        elif isinstance(part, nn.MultiheadAttention):
            p = float(part.dropout)
        if p:
            layers[path or type(part).__name__] = p
        others += [
            float(value)
            for name, value in vars(part).items()
            if isinstance(value, (int, float)) and ("drop" in name.lower() or name == "p")
        ]
    return layers, others


def _check_mean(call: _Call, evaluated: Tensor, share: float, *, runs: int, seed: int) -> None:
    """Check that the mean in training mode is the output in evaluation mode."""
    # It compares one number: how much of the output of evaluation mode there is in that of training
    # mode. It is a sum over all outputs, and so close to normally distributed.
    __tracebackhide__ = True
    wanted = evaluated.double().flatten()
    size = wanted.square().sum()
    if not bool(size.isfinite()) or float(size) == 0:
        raise ValueError(f"{_NAME}: the output of evaluation mode is zero or not finite throughout")
    seed_everything(seed)
    parts = torch.stack([call.run().double().flatten() @ wanted / size for _ in range(runs)])
    mean = float(parts.mean())
    error = math.inf
    if runs >= _FEWEST_RUNS:
        error = _STANDARD_ERRORS * float(parts.std()) / math.sqrt(runs)
    if not error < share:
        got = (
            f"{runs}, too few to tell whether the mean is right to within dropout={share:g} (5 "
            f"standard errors are {error:.2g})"
        )
        raise ValueError(misuse("runs", got, "more of them, or a larger input"))
    allowed = error + output_tolerance(evaluated.dtype)
    if abs(mean - 1) <= allowed:
        return
    off = f"it is {mean:.4g} of it (off by {abs(mean - 1):.1e}; allowed {allowed:.1e})"
    raise Failure(
        _NAME, f"the mean over {runs} calls in training mode is not the output in evaluation mode",
        worst=Place(off, value=mean), cause=why_factor(mean / (1 - share), share, error / mean),
        tensor=Checked.of(evaluated), tolerance=allowed, repeat=f"seed={seed}",
    )  # fmt: skip
