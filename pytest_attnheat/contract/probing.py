"""Small cases on which defects of attention differ, and the answers of a subject to them.

All sizes of a case differ where they may, so that no two of them can be confused, and head_dim
differs between cases, so that a constant is not taken for a function of it.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor

from pytest_attnheat.attention.plan import Case
from pytest_attnheat.attention.reference import padding_mask
from pytest_attnheat.attention.scoring import draw
from pytest_attnheat.contract.asking import Answer
from pytest_attnheat.contract.spec import AttentionSpec

# The longest case of a window.
_WIDEST = 300
# How far apart large scores of a row are: exp overflows and vanishes in float64 too.
_FAR_APART = 900.0
# What is added to all scores of a low row; a correct softmax does not feel it.
_LOW = 30.0


class Sizes(NamedTuple):
    """The sizes of a case; 0 key heads are as many as heads."""

    batch: int
    heads: int
    query_len: int
    key_len: int
    head_dim: int
    value_dim: int
    key_heads: int = 0


# What a plain case becomes; the number is the seed.
Change: TypeAlias = Callable[[Case, int], Case]


def _plain(case: Case, seed: int) -> Case:
    return case


@dataclass(frozen=True)
class Blueprint:
    """How a case is made.

    Attributes:
        name: Its name.
        sizes: The sizes to try, one after another, until the subject accepts them.
        change: What makes it of a plain case.
        judged: Whether a wrong answer is a defect, or only worth a note.
    """

    name: str
    sizes: tuple[Sizes, ...]
    change: Change = _plain
    judged: bool = True


@dataclass(frozen=True, eq=False)
class Probe:
    """A case and what the subject answered.

    Attributes:
        case: The inputs, in float64, rounded to `dtype` before.
        output: The answer (batch, heads, query_len, value_dim), in float64 on the CPU.
        dtype: The dtype in which the subject was asked.
        tolerance: The least part by which an output may be off.
        judged: Whether a wrong answer is a defect, or only worth a note.
    """

    case: Case
    output: Tensor
    dtype: torch.dtype
    tolerance: float
    judged: bool = True


def blueprints(spec: AttentionSpec) -> tuple[Blueprint, ...]:
    """Return the cases for what a specification declares."""
    masked, causal = spec.mask is not None, spec.takes_causal
    cases = [*_CASES]
    cases += _CAUSAL_CASES if causal else ()
    cases += _MASK_CASES if masked else ()
    if masked and spec.fully_masked != "undefined":
        cases.append(Blueprint("fully masked row", _RECTANGLE, _fully_masked))
    cases += _TOGETHER_CASES if masked and causal else ()
    if spec.has_heads and spec.grouped is not False:
        cases.append(Blueprint("grouped heads", _GROUPED))
    if spec.window is not None:
        cases.append(Blueprint("window", _window_sizes(spec.window)))
    if spec.scale_argument is not None:
        cases.append(Blueprint("scale=", _RECTANGLE, _scaled))
    # The largest comes last: the others tell most plans from the subject.
    cases.append(Blueprint("long", _LONG))
    if masked:
        cases.append(Blueprint("NaN in masked keys", _PADDED, _garbage, judged=False))
    return tuple(cases)


def ask(spec: AttentionSpec, case: Case, dtype: torch.dtype) -> Tensor:
    """Call the subject with copies of a case.

    Returns:
        Its output (batch, heads, query_len, value_dim) in float64 on the CPU.

    Raises:
        Exception: Whatever the subject raises.
    """
    return answer_to(spec, case, dtype).output.detach().double().cpu()


def answer_to(
    spec: AttentionSpec, case: Case, dtype: torch.dtype, *, dropout: float = 0.0
) -> Answer:
    """Call the subject as `ask` does, and return all it answers."""
    device = spec.devices[0] if spec.devices else "cpu"
    query, key, value = (
        tensor.to(device, dtype, copy=True) for tensor in (case.query, case.key, case.value)
    )
    call = replace(
        case,
        query=query,
        key=key,
        value=value,
        mask=None if case.mask is None else case.mask.to(device, copy=True),
        bias=None if case.bias is None else case.bias.to(device, dtype, copy=True),
    )
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return spec.ask(call, dropout=dropout)


@contextmanager
def one_thread() -> Iterator[None]:
    """Compute in one thread: for small tensors, more cost several times what they save."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def probe(
    spec: AttentionSpec, blueprint: Blueprint, seed: int, dtype: torch.dtype, tolerance: float
) -> Probe | str:
    """Return a case with the subject's answer, or why it was refused in all sizes."""
    refusal = ""
    for case in _versions(spec, blueprint, seed):
        rounded = in_dtype(case, dtype)
        try:
            output = ask(spec, rounded, dtype)
        except Exception as error:
            # Whatever a subject raises is a refusal; the first one is about the usual sizes.
            text = str(error).strip().split("\n")[0]
            refusal = refusal or f"{type(error).__name__}: {text}"
        else:
            return Probe(rounded, output, dtype, tolerance, blueprint.judged)
    return refusal


@lru_cache(maxsize=256)
def in_dtype(case: Case, dtype: torch.dtype) -> Case:
    """Round the inputs of a case to a dtype, in which it is asked, and keep them in float64."""
    query, key, value = (t.to(dtype).double() for t in (case.query, case.key, case.value))
    return replace(case, query=query, key=key, value=value, dtype=dtype)


def with_identity(case: Case) -> Iterator[tuple[Case, slice]]:
    """Return cases whose outputs are the columns of the weights, and which columns.

    Values are an identity matrix, in parts of value_dim columns: some subjects take no other width.
    """
    key_len, width = case.value.shape[-2:]
    for start in range(0, key_len, width):
        columns = slice(start, min(start + width, key_len))
        part = torch.zeros(key_len, width, dtype=torch.float64)
        part[columns, : columns.stop - start] = torch.eye(columns.stop - start)
        yield replace(case, value=part.expand(case.value.shape).clone()), columns


def _versions(spec: AttentionSpec, blueprint: Blueprint, seed: int) -> Iterator[Case]:
    """The case in all sizes, and where it has a mask also with the mask in full shape."""
    for sizes in blueprint.sizes:
        heads = (spec.heads or sizes.heads) if spec.has_heads else 1
        key_heads = (sizes.key_heads or heads) if spec.has_heads else 1
        if heads % key_heads:
            continue
        sizes = sizes._replace(heads=heads, key_heads=key_heads)
        case = _build(blueprint.change, _always(spec, heads), sizes, seed, blueprint.name)
        yield case
        if case.mask is not None and case.mask.shape != case.shape:
            yield _with_full_mask(case)


def _always(spec: AttentionSpec, heads: int) -> tuple[tuple[str, Any], ...]:
    """What every case has, but for steps that are rounded: no plan knows of those."""
    return tuple((name, one) for name, one in spec.always(heads).items() if name != "rounded")


# Cases are kept, and compared by identity: what plans make of them is kept as well (see
# `matching`), so that the second subject takes much less time than the first.
@lru_cache(maxsize=256)
def _build(
    change: Change, always: tuple[tuple[str, Any], ...], sizes: Sizes, seed: int, name: str
) -> Case:
    batch, heads, query_len, key_len, width, value_dim, key_heads = sizes
    query = draw(f"{name} query", seed, batch, heads, query_len, width)
    key = draw(f"{name} key", seed, batch, key_heads, key_len, width)
    value = draw(f"{name} value", seed, batch, key_heads, key_len, value_dim)
    return change(Case(query, key, value, name=name, **dict(always)), seed)


@lru_cache(maxsize=256)
def _with_full_mask(case: Case) -> Case:
    mask = None if case.mask is None else case.mask.expand(case.shape).clone()
    return replace(case, mask=mask)


# --- sizes

# A long case has one map: torch computes more than 32768 numbers in threads, which cost more here
# than they save.
# Many implementations need equal lengths and widths, and some a width that is a multiple of 16.
_SQUARE = (Sizes(3, 4, 6, 6, 5, 5), Sizes(3, 4, 6, 6, 16, 16))
_RECTANGLE = (Sizes(2, 3, 5, 7, 6, 4), Sizes(2, 3, 6, 6, 6, 6), Sizes(2, 3, 6, 6, 16, 16))
_PADDED = (Sizes(3, 2, 5, 7, 6, 4), Sizes(3, 2, 7, 7, 6, 6), Sizes(3, 2, 7, 7, 16, 16))
_WIDE = (Sizes(2, 3, 5, 8, 4, 6), Sizes(2, 3, 8, 8, 4, 4), Sizes(2, 3, 8, 8, 32, 32))
_TALL = (Sizes(2, 3, 8, 5, 4, 6),)
_GROUPED = (
    Sizes(2, 6, 5, 7, 6, 4, key_heads=2),
    Sizes(2, 6, 6, 6, 6, 6, key_heads=2),
    Sizes(2, 6, 6, 6, 16, 16, key_heads=2),
)
_LONG = (Sizes(1, 1, 131, 133, 8, 3), Sizes(1, 1, 131, 131, 8, 8), Sizes(1, 1, 131, 131, 16, 16))


def _window_sizes(window: tuple[int | None, int | None]) -> tuple[Sizes, ...]:
    # A side that ends nowhere needs no room to end in.
    ends = (side for side in window if side is not None and side <= _WIDEST)
    length = min(sum(ends) + 4, _WIDEST)
    return (
        Sizes(1, 2, length, length + 2, 6, 4),
        Sizes(1, 2, length, length, 6, 6),
        Sizes(1, 2, length, length, 16, 16),
    )


# --- cases


def _causal(case: Case, seed: int) -> Case:
    return replace(case, causal=True)


def _mask(case: Case, seed: int) -> Tensor:
    """One mask for all maps, without a row or a column that is all True or all False."""
    mask = draw(f"{case.name} mask", seed, case.query_len, case.key_len) > 0
    for row in range(case.query_len):
        mask[row, row % case.key_len] = True
        mask[row, (row + 1) % case.key_len] = False
    return mask


def _masked(case: Case, seed: int) -> Case:
    return replace(case, mask=_mask(case, seed))


def _masked_causal(case: Case, seed: int) -> Case:
    """No row loses all its keys: those of the diagonal are permitted, in both alignments."""
    mask = _mask(case, seed)
    first = case.key_len - case.query_len if case.alignment == "bottom_right" else 0
    rows = torch.arange(max(0, -first), case.query_len)
    mask[rows, (rows + first).clamp(max=case.key_len - 1)] = True
    return replace(case, mask=mask, causal=True)


def _padded(case: Case, seed: int) -> Case:
    mask = padding_mask([case.key_len - less for less in (3, 1, 4)], case.key_len, device="cpu")
    return replace(case, mask=mask.repeat(1, 1, case.query_len, 1))


def _scaled(case: Case, seed: int) -> Case:
    return replace(case, scale=0.3, scale_given=True)


def _large_scores(case: Case, seed: int) -> Case:
    """The first two rows have scores that differ by hundreds, the next two very low ones.

    Keys stand on a line in their first channel, far apart, so that rounding never decides which
    one such a query chooses.
    """
    query, key = case.query, case.key
    scale = abs(case.scale) if case.scale else query.shape[-1] ** -0.5
    line = torch.linspace(-3, 3, case.key_len, dtype=torch.float64)
    order = draw(f"{case.name} order", seed, case.key_len).argsort()
    key[..., 0], key[..., 1] = line[order], 1.0
    query[..., 0], query[..., 1] = query[..., 0] * 0.3, 0.0
    # float16 holds the products up to 65504.
    query[..., :2, :] = 0.0
    query[..., :2, 0] = torch.tensor([1.0, -1.0]) * min(_FAR_APART / scale, 6000.0)
    query[..., 2:4, 1] = -min(_LOW / scale, 6000.0)
    return case


def _large_scores_masked(case: Case, seed: int) -> Case:
    """The key that such a query would choose is masked."""
    mask = _mask(case, seed)
    case = replace(_large_scores(case, seed), mask=mask)
    place = case.key[0, 0, :, 0]
    highest, lowest = place.argmax(), place.argmin()
    mask[0, highest], mask[0, lowest] = False, True
    mask[1, lowest], mask[1, highest] = False, True
    return case


def _fully_masked(case: Case, seed: int) -> Case:
    """Some rows of some samples have no permitted key."""
    mask = _mask(case, seed).repeat(case.shape[0], 1, 1, 1)
    mask[0, :, 1] = False
    mask[-1, :, 3] = False
    return replace(case, mask=mask)


def _garbage(case: Case, seed: int) -> Case:
    case.value[:, :, -1] = math.nan
    return _padded(case, seed)


_CASES = (
    Blueprint("plain", _RECTANGLE),
    Blueprint("square", _SQUARE),
    Blueprint("large scores", _RECTANGLE, _large_scores),
)
_CAUSAL_CASES = (
    Blueprint("causal", _WIDE, _causal),
    Blueprint("causal, more queries than keys", _TALL, _causal),
    Blueprint("causal square", _SQUARE, _causal),
)
_MASK_CASES = (
    Blueprint("mask", _RECTANGLE, _masked),
    Blueprint("square mask", _SQUARE, _masked),
    Blueprint("padding", _PADDED, _padded),
    Blueprint("large scores, masked", _RECTANGLE, _large_scores_masked),
)
_TOGETHER_CASES = (
    Blueprint("mask and causal", _WIDE, _masked_causal),
    Blueprint("square mask and causal", _SQUARE, _masked_causal),
)
