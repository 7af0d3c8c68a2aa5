"""Weights times value against what the model itself got."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from pytest_attnheat.capture.computing import apart, part_of, parts_of

if TYPE_CHECKING:
    from pytest_attnheat.capture.record import AttentionRecord

# So many queries of each head are compared while the model runs.
SAMPLED = 8


def sampled(record: AttentionRecord) -> AttentionRecord:
    """Return the record of a few queries: the first, the last, and some between."""
    query_len = record.shape_here[2]
    if query_len <= SAMPLED:
        return record
    places = torch.linspace(0, query_len - 1, SAMPLED, device="cpu").round().long()
    numbers = places if record.queries is None else record.queries[places]
    return record.select(queries=numbers.tolist())


def residual_of(record: AttentionRecord) -> float:
    """Return how far weights times value are from the output, in the worst row.

    Each row of the difference (its rms over the channels) is divided by that of the weights
    times the sizes of the values: values that cancel do not make a rounding error large.

    Args:
        record: Has value and output; its weights are those that were multiplied.
    """
    value, output, given = record.value, record.output, record.kept_weights
    assert value is not None
    assert output is not None
    precise = torch.float64 if output.dtype == torch.float64 else torch.float32
    group = record.shape_here[1] // max(value.shape[1], 1) or 1
    worst = 0.0
    with apart(output.device):
        for batch, heads in parts_of(record):
            weights = part_of(record, batch, heads) if given is None else given[batch, heads]
            of_heads = torch.arange(heads.start, heads.stop, device=value.device) // group
            values = value[batch][:, of_heads] if group > 1 else value[batch, heads]
            worst = max(worst, _worst_row(weights, values, output[batch, heads], precise))
    return worst


def _worst_row(weights: Tensor, value: Tensor, output: Tensor, precise: torch.dtype) -> float:
    weights, value = weights.to(precise), value.to(precise)
    # Norms over as many channels: their ratio is that of the rms.
    off = torch.linalg.vector_norm(weights @ value - output.to(precise), dim=-1)
    size = torch.linalg.vector_norm(weights.abs() @ value.abs(), dim=-1)
    # Zero by zero, a row without keys, is no error. NaN is one.
    relative = torch.where(off == 0, 0.0, off / size)
    return float(relative.nan_to_num(nan=torch.inf).max()) if relative.numel() else 0.0
