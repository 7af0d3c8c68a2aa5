"""How far a row may be from its sum, by dtype and row length.

The rule adds three errors that a correct softmax makes, and nothing else::

    2 * eps(dtype)  +  sqrt(key_len) * eps(accumulator)  +  key_len * smallest_subnormal / 2

- ``2 * eps(dtype)``: the normaliser is rounded once and so is each weight.
  Equal weights are all rounded the same way, so these errors need not cancel;
  together they stay below one eps. The second eps is for a division done as
  a product with a rounded reciprocal.
- ``sqrt(key_len) * eps(accumulator)``: adding up a row, which every serious
  implementation does in float32 or wider (float64 for float64). Rounding
  errors of either sign grow as the square root of their number.
- ``key_len * smallest_subnormal / 2``: each weight that is too small for the
  dtype is off by up to half its smallest step. It matters for float16 rows of
  thousands of keys, and for float8.

float32 and float64 have a floor besides, because approximate `exp`
instructions are allowed to be a few units off: 1e-5 and 1e-12.
"""

from __future__ import annotations

import math

import torch

# Where the rule would let a row sum to half of what it should, it asserts nothing.
_MEANINGLESS = 0.5


def row_tolerance(dtype: torch.dtype, key_len: int) -> float:
    """Return the largest |row sum - 1| that counts as rounding.

    Args:
        dtype: The dtype of the weights.
        key_len: The number of weights in a row.

    Returns:
        The tolerance: 1.0e-05 for 8 keys in float32, 2.0e-03 in float16,
        1.6e-02 in bfloat16, 1.0e-12 in float64.

    Raises:
        ValueError: The dtype is too coarse for rows of this length.
    """
    tolerance = rounding(dtype, key_len)
    if tolerance >= _MEANINGLESS:
        name = str(dtype).removeprefix("torch.")
        raise ValueError(
            f"{name} is too coarse to tell whether a row of {key_len} weights sums to 1 (rounding "
            f"alone may be off by {tolerance:.2g}); check the weights before they are cast to "
            f"{name}, or pass tolerance="
        )
    return tolerance


def rounding(dtype: torch.dtype, key_len: int) -> float:
    """Return what the rule above gives, whether or not it still asserts anything."""
    info = torch.finfo(dtype)
    accumulator = torch.finfo(torch.float64 if dtype == torch.float64 else torch.float32)
    smallest_subnormal = info.smallest_normal * info.eps
    allowed = 2 * info.eps + math.sqrt(key_len) * accumulator.eps + key_len * smallest_subnormal / 2
    floor = {torch.float64: 1e-12, torch.float32: 1e-5}.get(dtype, 0.0)
    return max(floor, allowed)
