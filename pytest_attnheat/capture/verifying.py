"""Weights times value against what the model itself got."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from pytest_attnheat.capture.computing import apart, weights_of

if TYPE_CHECKING:
    from pytest_attnheat.capture.record import AttentionRecord

# So many queries of each head are compared while the model runs.
SAMPLED = 8
# Roundings of the model's own dtype that its output may be off by: fused kernels round the
# weights, the sums and the output. Sums in float32 and float64 are in another order besides.
_TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}


def tolerance_of(dtype: torch.dtype) -> float:
    """Return the residual up to which a record of this dtype is trusted."""
    return _TOLERANCE.get(dtype, 0.1)


def sampled(record: AttentionRecord) -> AttentionRecord:
    """Return the record of a few queries: the first, the last, and some between."""
    query_len = record.shape_here[2]
    if query_len <= SAMPLED:
        return record
    places = torch.linspace(0, query_len - 1, SAMPLED).round().long()
    numbers = places if record.queries is None else record.queries[places]
    return record.select(queries=numbers.tolist())


def residual_of(record: AttentionRecord) -> float:
    """Return how far weights times value are from the output, in the worst row.

    Each row of the difference (its rms over the channels) is divided by that of the weights
    times the sizes of the values: values that cancel do not make a rounding error large.

    Args:
        record: Has value and output; its weights are those that were multiplied.
    """
    value, output = record.value, record.output
    assert value is not None
    assert output is not None
    precise = torch.float64 if output.dtype == torch.float64 else torch.float32
    given = record.kept_weights
    weights = weights_of(record, precise) if given is None else given
    with apart(output.device):
        weights = weights.to(precise)
        value = _for_each_head(value, weights.shape[1]).to(precise)
        made, size = weights @ value, weights.abs() @ value.abs()
        off = (made - output.to(precise)).square().mean(-1).sqrt()
        size = size.square().mean(-1).sqrt()
        # Zero by zero, a row without keys, is no error. NaN is one.
        relative = torch.where(off == 0, 0.0, off / size)
        return float(relative.nan_to_num(nan=torch.inf).max()) if relative.numel() else 0.0


def _for_each_head(value: Tensor, heads: int) -> Tensor:
    group = heads // max(value.shape[1], 1) or 1
    return value if group == 1 else value.repeat_interleave(group, 1)
