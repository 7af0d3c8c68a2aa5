"""The usual mistakes in scale and mask: what attention would give if one were made.

They are tried only where an output is wrong, and only small ones: the examination
(`pytest_attnheat.contract`) knows all.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import Tensor

from pytest_attnheat.attention.call import Call
from pytest_attnheat.attention.computation import reference
from pytest_attnheat.attention.reference import causal_mask

# Above so many scores the attempts would take longer than the assertion itself.
_MOST_SCORES = 2**22
# By how many units of rounding, as a part of its size, an output may differ from an attempt; and
# by which part of how far it is off. In bfloat16 several attempts are within so many units.
_UNITS, _PART = 64.0, 0.25


def likely_mistake(call: Call, output: Tensor) -> str | None:
    """Return the mistake that gives this output, or None.

    Args:
        call: What was to be computed.
        output: What was computed instead, (..., query_len, value_dim).
    """
    *leading, query_len, _ = call.query.shape
    if math.prod(leading) * query_len * call.key.shape[-2] > _MOST_SCORES:
        return None
    found = output.double()
    if not bool(found.isfinite().all()):
        return None
    expected = reference(replace(call, upstream=None))
    right, unit = expected.exact["output"], expected.unit
    nearest, sentence = _PART * _size(found - right), None
    for words, mistaken in _mistakes(call):
        exact = reference(mistaken).exact["output"]
        off = _size(found - exact)
        if off < nearest and off < _UNITS * unit * _size(exact):
            nearest, sentence = off, f"the output is that of attention {words}"
    return sentence


def _size(tensor: Tensor) -> float:
    return float(tensor.square().mean().sqrt())


def _mistakes(call: Call) -> Iterator[tuple[str, Call]]:
    call = replace(call, upstream=None)
    for sentence, scale in _scales(call):
        if scale != call.factor:
            yield sentence, replace(call, scale=scale)
    for sentence, permitted in _masks(call):
        yield sentence, replace(call, mask=permitted, bias=None, causal=False)


def _scales(call: Call) -> Iterator[tuple[str, float]]:
    width, value_dim = call.query.shape[-1], call.value.shape[-1]
    heads = call.query.shape[-3] if call.query.ndim > 2 else 1
    yield "without a scale", 1.0
    yield "whose scores are multiplied by sqrt(head_dim), not divided", math.sqrt(width)
    yield "whose scores are divided by head_dim, not by its root", 1 / width
    yield (
        "whose scale is taken from the width of all heads, 1 / sqrt(heads * head_dim)",
        1 / math.sqrt(heads * width),
    )
    yield "whose scale is taken from value_dim, not head_dim", 1 / math.sqrt(value_dim)


def _masks(call: Call) -> Iterator[tuple[str, Tensor | None]]:
    if call.bias is not None or (call.mask is None and not call.causal):
        return
    lengths = call.query.shape[-2], call.key.shape[-2]
    device = call.query.device
    yield "without a mask", None
    given = torch.ones(lengths, dtype=torch.bool, device=device)
    given = given if call.mask is None else call.mask
    if call.causal:
        for steps, words in ((1, "one key too many"), (-1, "one key too few")):
            shifted = torch.ones(lengths, dtype=torch.bool, device=device).tril(steps)
            yield f"whose causal mask shows {words}", given & shifted
        if lengths[0] != lengths[1]:
            other = causal_mask(*lengths, alignment="bottom_right", device=device)
            yield (
                "whose causal mask is aligned to the bottom right, not the top left",
                given & other,
            )
        given = given & causal_mask(*lengths, alignment="top_left", device=device)
    yield "whose mask means the opposite", ~given
