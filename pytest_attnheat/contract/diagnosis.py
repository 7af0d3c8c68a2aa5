"""`diagnose`: what a wrong implementation of attention computes instead.

Its answers to small cases are compared with attention that carries each known defect, and then
with two defects at once. What reproduces every answer to within rounding is named; where nothing
does, it is said what was excluded, and where the error is.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from pytest_attnheat.attention.defects import DEFECTS
from pytest_attnheat.attention.plan import Case
from pytest_attnheat.attention.tolerance import answer_tolerance
from pytest_attnheat.attention.vocabulary import Alignment, DeclaredFullyMasked
from pytest_attnheat.callables import random_kept
from pytest_attnheat.capture.record import AttentionRecord
from pytest_attnheat.capture.trace import Trace
from pytest_attnheat.contract.chance import by_chance
from pytest_attnheat.contract.explaining import explained
from pytest_attnheat.contract.findings import Diagnosis as Diagnosis
from pytest_attnheat.contract.findings import number_text
from pytest_attnheat.contract.probing import Blueprint, Probe, ask, blueprints, probe
from pytest_attnheat.contract.returned import with_returned
from pytest_attnheat.contract.spec import AttentionSpec, as_spec
from pytest_attnheat.inputs import seed_number

# Not float64 first: code that computes some steps in float32 is not wrong in float32.
_DTYPES = ("float32", "float64", "float16", "bfloat16")


def diagnose(
    subject: AttentionSpec | Callable[..., Any] | Trace | AttentionRecord, *, seed: int = 0
) -> Diagnosis:
    """Tell what an implementation of attention computes instead.

    It is called on about 20 small cases, in float64 where it takes that, else in the next finer
    dtype it declares; where it is correct, in the other dtypes as well. Its answers are compared
    with attention that carries each of the known defects, and if none reproduces them with pairs.
    Cases that it refuses with an exception are noted. Nothing is compared more closely than
    rounding allows (see `contract.matching`).

    What was captured is not called: each attention in it is judged by its own queries, keys,
    values, mask and output, and the first that is not what they make is diagnosed. A block is
    called once, on its inputs, and what happens inside is captured. What was captured should be
    scaled and windowed as the specification says, by default by head_dim ** -0.5 and not at all.

    Args:
        subject: A specification, or a callable with the signature of
            `torch.nn.functional.scaled_dot_product_attention`; or what `capture_attention`
            recorded, a trace or a record.
        seed: The seed of the inputs, and of the subject's own randomness.

    Returns:
        The diagnosis; `print` it.

    Raises:
        TypeError: The subject cannot be called, or the seed is not a whole number.
        ValueError: The subject answered no case at all; its first refusal is quoted. Nothing
            that was captured can be judged.
    """
    spec = as_spec(subject)
    if spec.is_captured or spec.is_block:
        from pytest_attnheat.contract.captured import diagnose_records

        return diagnose_records(spec)
    seed = seed_number(seed)
    sound: dict[str, float] = {}
    refused: dict[str, str] = {}
    last: Diagnosis | None = None
    for name in (name for name in _DTYPES if name in spec.dtypes):
        with _one_thread(), random_kept(_devices(spec)):
            torch.manual_seed(seed)
            probes, refused_here = _answers(spec, seed, getattr(torch, name))
            if not probes:
                refused[name] = next(iter(refused_here.values()), "")
                continue
            last = _diagnosed(spec, seed, probes, refused_here)
        if not last.healthy:
            return replace(last, notes=(*last.notes, *_sound_elsewhere(sound)))
        sound[name] = last.residual
    if last is None:
        reasons = "; ".join(f"{name}: {why}" for name, why in refused.items())
        raise ValueError(f"diagnose: {spec.name} answered no case ({reasons})")
    residuals = ", ".join(f"{number_text(residual)} in {name}" for name, residual in sound.items())
    return replace(
        last,
        dtype=", ".join(sound),
        refused={**last.refused, **refused},
        residual=max(sound.values()),
        sentence=f"{spec.name} is attention as declared; residual {residuals}",
    )


def diagnose_output(
    output: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    mask: Tensor | None = None,
    causal: Alignment | None = None,
    window: tuple[int, int] | None = None,
    alignment: Alignment = "top_left",
    scale: float | None = None,
    fully_masked: DeclaredFullyMasked = "zero",
    name: str = "output",
    search: bool = True,
) -> Diagnosis:
    """Tell what made a given output, from its own inputs.

    Fewer defects can be told apart than by `diagnose`, which chooses its inputs: those that
    reproduce the output equally well are all named.

    Args:
        output: (batch, heads, query_len, value_dim)
        query: (batch, heads, query_len, head_dim)
        key: (batch, key_heads, key_len, head_dim); heads are a multiple of key_heads.
        value: (batch, key_heads, key_len, value_dim)
        mask: Boolean, True where a query may attend, broadcastable to the weights.
        causal: What it should be: `"top_left"` or `"bottom_right"`; None for not causal.
        window: How many keys before and after its own position a query should attend to.
        alignment: Where a window is counted from if it should not be causal.
        scale: What scores should be multiplied by; head_dim ** -0.5 by default.
        fully_masked: What rows without permitted keys should be.
        name: What the output is called.
        search: Whether to look for what made an output that is wrong; else only whether it is
            wrong is said.

    Returns:
        The diagnosis. There are no inferred weights.

    Raises:
        TypeError: A tensor is not one of floating point numbers, or the mask is not boolean.
        ValueError: Shapes do not fit.
    """
    _check_tensors(output, query, key, value, mask)
    case = Case(
        name=name,
        query=query.detach().double().cpu(),
        key=key.detach().double().cpu(),
        value=value.detach().double().cpu(),
        mask=None if mask is None else mask.detach().cpu(),
        causal=causal is not None,
        alignment=causal or alignment,
        window=window,
        scale=scale,
        fully_masked=fully_masked,
        dtype=output.dtype,
    )
    given = output.detach().double().cpu()
    probes = [Probe(case, given, output.dtype, answer_tolerance(output.dtype))]
    with _one_thread():
        return explained(name, probes, {}, search=search)


@contextmanager
def _one_thread() -> Iterator[None]:
    """Thousands of small tensors: threads would cost several times what they save."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _check_tensors(
    output: Tensor, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None
) -> None:
    tensors = {"output": output, "query": query, "key": key, "value": value}
    for name, tensor in tensors.items():
        if not isinstance(tensor, Tensor) or not tensor.is_floating_point():
            raise TypeError(f"{name} must be a tensor of floating point numbers")
        if tensor.ndim != 4:
            raise ValueError(
                f"{name} must be (batch, heads, length, width); got {tuple(tensor.shape)}"
            )
    wanted = (*query.shape[:3], value.shape[3])
    fits = (
        output.shape == wanted
        and query.shape[3] == key.shape[3]
        and key.shape[:3] == value.shape[:3]
        and query.shape[0] == key.shape[0]
        and query.shape[1] % key.shape[1] == 0
    )
    if not fits or output.numel() == 0:
        shapes = ", ".join(f"{name} {tuple(tensor.shape)}" for name, tensor in tensors.items())
        raise ValueError(f"shapes do not fit together: {shapes}")
    if mask is not None and mask.dtype != torch.bool:
        raise TypeError(f"mask must be boolean, True where a query may attend; got {mask.dtype}")
    if mask is not None:
        torch.broadcast_to(mask, (*query.shape[:3], key.shape[2]))


# --- asking


def _devices(spec: AttentionSpec) -> list[torch.device]:
    """The device whose generator the subject may use besides that of the CPU."""
    return [torch.device(name) for name in (spec.devices or ())[:1]]


def _answers(
    spec: AttentionSpec, seed: int, dtype: torch.dtype
) -> tuple[list[Probe], dict[str, str]]:
    """Ask the subject all cases; return its answers, and why others were refused."""
    probes, refused = [], {}
    tolerance = _tolerance(spec, dtype)
    for blueprint in blueprints(spec):
        answer = probe(spec, blueprint, seed, dtype, tolerance)
        if isinstance(answer, Probe):
            probes.append(answer)
        elif _worth_a_word(spec, blueprint):
            refused[blueprint.name] = answer
    return probes, refused


def _tolerance(spec: AttentionSpec, dtype: torch.dtype) -> float:
    own = spec.tolerance or 0.0
    coarser = torch.finfo(dtype).eps / torch.finfo(torch.float32).eps
    return max(answer_tolerance(dtype), own * max(coarser, 1.0))


def _worth_a_word(spec: AttentionSpec, blueprint: Blueprint) -> bool:
    """Whether a refusal is worth a word: grouped heads are only where they are declared."""
    return blueprint.judged and (blueprint.name != "grouped heads" or spec.grouped is True)


def _diagnosed(
    spec: AttentionSpec, seed: int, probes: Sequence[Probe], refused: dict[str, str]
) -> Diagnosis:
    first = probes[0]
    again = ask(spec, first.case, first.dtype)
    if not torch.equal(torch.nan_to_num(again), torch.nan_to_num(first.output)):
        random = by_chance(spec, probes, again, refused)
        if random is not None:
            return random
    judged = [one for one in probes if one.judged]
    diagnosis = explained(spec.name, judged, refused, spec)
    if diagnosis.healthy:
        diagnosis = with_returned(diagnosis, spec, judged)
    notes = [_garbage_note(one) for one in probes if not one.judged]
    return replace(diagnosis, notes=tuple(note for note in notes if note))


def _garbage_note(one: Probe) -> str:
    """A word about NaN in masked keys, which no plan of a healthy subject needs to feel."""
    if bool(one.output.isfinite().all()):
        return ""
    (defect,) = (defect for defect in DEFECTS if defect.seen == "garbage")
    return f"{defect.name}: it {defect.sentence.removeprefix('that ')}"


def _sound_elsewhere(sound: Iterable[str]) -> tuple[str, ...]:
    names = ", ".join(sound)
    return (f"correct in {names}",) if names else ()
