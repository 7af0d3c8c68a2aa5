"""What numbers tell of scores: whether a scale and a cap explain them, and what is hidden."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from pytest_attnheat.attention.vocabulary import permits
from pytest_attnheat.capture.tags import Sample, Scores, coarser

# So many rows of what a softmax was given are explained, in so many of their columns.
_ROWS, _COLUMNS = 8, 256
# Of so many roundings of its dtype a score may be off; it is one product and a few steps.
_ROUNDINGS = 8.0
# Matrices may be multiplied with less than float32 has, on accelerators.
_REDUCED = 2.0**-10


def rows_are_distributions(tensor: Tensor) -> bool:
    """Whether nothing is negative and each row sums to one, or to zero."""
    if not tensor.is_floating_point() or tensor.numel() == 0 or tensor.is_meta:
        return False
    # What is none shows in the first row, as a rule, and each look waits for the device.
    first = tensor[(0,) * (tensor.ndim - 1)]
    return bool(_like_shares(first).all()) and bool(_like_shares(tensor).all() & tensor.any())


def _like_shares(rows: Tensor) -> Tensor:
    sums = rows.sum(-1, dtype=torch.float32)
    near = ((sums - 1).abs() < 1e-2) | (sums == 0)
    return near & (rows.amin(-1) >= 0)


def seen_in(given: Tensor, dim: int) -> Scores | None:
    """What numbers alone tell of scores that were not made of a product: what they hide."""
    if given.ndim == 0 or given.is_meta:
        return None
    shape = [1] * given.ndim
    shape[dim] = given.shape[dim]
    columns = torch.arange(given.shape[dim], device="cpu").view(shape)
    zero, seen = given.new_zeros([1] * given.ndim), permits(given)
    if not bool(seen.all()):
        zero = given.masked_fill(seen, 0.0)
    return Scores(None, torch.zeros_like(columns), columns, zero, coarsest=given.dtype)


def sample_of(scores: Scores, given: Tensor, dim: int) -> Sample | None:
    """Take some rows of what a softmax over an axis was given."""
    if scores.origin is None or given.numel() == 0 or given.is_meta:
        return None
    tensors = given, scores.rows, scores.columns, scores.zero
    whole = [tensor.expand(given.shape).movedim(dim, -1) for tensor in tensors]
    *lead, keys = whole[0].shape
    rows, index = _some(math.prod(lead), _ROWS), [_some(keys, _COLUMNS)]
    for size in reversed(lead):
        index.insert(0, (rows % size)[:, None])
        rows = rows // size
    return Sample(*(tensor[tuple(index)] for tensor in whole))


def _some(count: int, most: int) -> Tensor:
    """Numbers up to a count, of which the first and the last are always among them."""
    return torch.linspace(0, count - 1, min(count, most), device="cpu").round().long()


def explained(scores: Scores, sample: Sample, scale: float) -> tuple[Tensor, Tensor]:
    """Return whether a scale, a cap and what was added explain scores, and what hides keys does."""
    # Nobody waits yet for the device to say so.
    assert scores.origin is not None
    given, zero, device = sample.given.double(), sample.zero.double(), sample.given.device
    columns = sample.columns.to(device, non_blocking=True)
    left, right = (_rows_of(operand, numbers) for operand, numbers in (
        (scores.origin.left, sample.rows), (scores.origin.right, sample.columns)
    ))  # fmt: skip
    made = scale * (left * right).sum(-1)
    size = (left * right).abs().sum(-1) * abs(scale)
    if scores.softcap is not None:
        made = scores.softcap * (made / scores.softcap).tanh()
    made = torch.where(columns >= 0, made, 0.0) + zero
    seen, meant = permits(given), permits(zero)
    both = seen & meant & given.isfinite() & made.isfinite()
    # No softmax feels a number that is the same for all keys.
    off = given - made
    mean = torch.where(both, off, 0.0).sum(-1, keepdim=True) / both.sum(-1, keepdim=True).clamp(1)
    eps = torch.finfo(coarser(scores.coarsest, sample.given.dtype)).eps
    eps = max(eps, 0.0 if device.type == "cpu" else _REDUCED)
    felt = (given.abs() + zero.abs() + size + 1).nan_to_num_(nan=0.0, posinf=0.0)
    largest = torch.where(both, felt, 0.0).amax(-1, keepdim=True)
    near = (off - mean).abs() <= _ROUNDINGS * eps * (felt + largest)
    top = torch.where(meant, made, -torch.inf).amax(-1, keepdim=True)
    vanished = scores.done & given.isneginf() & (made < top - 80)
    strange = (made.isnan() & given.isnan()) | vanished | (columns < -1)
    return (near | ~both | strange).all(), ((seen == meant) | near | strange).all()


def _rows_of(operand: Tensor, numbers: Tensor) -> Tensor:
    return operand.reshape(-1, operand.shape[-1])[numbers.clamp(min=0)].double()
