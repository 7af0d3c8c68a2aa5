"""How far numbers may be off by rounding: every tolerance of the package that follows a dtype.

**Rows** (`row_tolerance`). The rule adds three errors that a correct softmax makes, and nothing
else::

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

**Outputs** (`output_tolerance`), of one implementation called twice, as a part of the size of a
row. Of the same shapes, the same kernels run, and one rounding at the end may differ: 2 eps. Of
other shapes, sums are in another order: 8 eps. Six layers were measured to take 1.6 eps; the
errors of layers are independent, so that a hundred take four times as much. Approximations of
`exp` in float32 and float64 are many units off, in both calls: 2e-5 and 1e-11.

**Answers** (`answer_tolerance`), of an implementation against a computation in float64. An error e
of a score makes a relative error e of its weight, and a score of size s is rounded by about
s * eps: a row is off by `units * eps * (2 + the largest of its scores)`, `units` being 8 in
float32 and float64, for approximate instructions in several steps, and 2 in half precision: a
wrong implementation is off by much more, and theirs is most of the error already. The floor is
that of rows.

**Records** (`residual_tolerance`), weights times value against the output of a fused kernel, which
rounds the weights, the sums and the output to the dtype of the model: four eps in half precision
(4e-3, 3e-2). Sums in float32 and float64 are in another order: the floor of rows.

**Baselines** (`drift_tolerance`), the same model run again, elsewhere, in another precision or by
another kernel. An error of a score is one of the logarithm of its weight: a weight w of maps whose
largest is m may differ by ``tolerance * w * (1 + log(m / w))``, which holds all layers of a trained
model of six: 2.5e-6 between kernels in float32 and against float64, 3.5e-3 in float16, 3.6e-2 in
bfloat16. The tolerance is 8 eps in half precision and the floor of rows in float32 and wider, grows
with the root of the number of layers beyond 16, as the errors of layers are independent, and has
``sqrt(key_len) * eps(float32)`` for the sums of long rows. Beside that, each weight may differ by
the tolerance times what is typical of its map, and times a hundredth of the largest: what is
smaller than half precision can hold is zero there. Where the largest weight is more than e^5 times
the typical one, scores are larger than those of that model, and all of it grows with the logarithm.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import TYPE_CHECKING

from ..inputs import dtype_name, misuse, wide_dtype
from .vocabulary import HIDDEN_FROM

if TYPE_CHECKING:  # pictures are compared without torch
    import numpy as np
    import numpy.typing as npt
    import torch

    Numbers = npt.NDArray[np.float64]
    Bools = npt.NDArray[np.bool_]

# Where the rule would let a row sum to half of what it should, it asserts nothing.
_MEANINGLESS = 0.5
# Approximate instructions; dtypes that are not here have none.
_FLOORS = {"float64": 1e-12, "float32": 1e-5}
_STRICT_UNITS, _LOOSE_UNITS = 2.0, 8.0
_LOOSE_FLOORS = {"float64": 1e-11, "float32": 2e-5}
_RESIDUALS = {"float16": 4e-3, "bfloat16": 3e-2}
_COARSEST_RESIDUAL = 0.1
_DRIFTS = {"bfloat16": 6.25e-2, "float16": 7.8e-3}
# Layers whose errors the numbers above hold.
_SHALLOW = 16
_FLOAT32_EPS = 2.0**-23
# Scores that are further apart are larger, and so are their errors.
_SPREAD = 5.0
# Of the largest weight of a map, by how much of the tolerance all of them may differ.
_OF_LARGEST = 1e-2


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
    tolerance = row_rounding(dtype, key_len)
    if tolerance >= _MEANINGLESS:
        name = dtype_name(dtype)
        got = (
            f"{name}, which is too coarse to tell whether a row of {key_len} weights sums to 1 "
            f"(rounding alone may be off by {tolerance:.2g})"
        )
        advice = f"Check the weights before they are cast to {name}, or pass tolerance="
        raise ValueError(f"{misuse('weights', got, 'a finer dtype')}. {advice}")
    return tolerance


def row_rounding(dtype: torch.dtype, key_len: int) -> float:
    """Return what the rule for rows gives, whether or not it still asserts anything."""
    import torch

    info, accumulator = torch.finfo(dtype), torch.finfo(wide_dtype(dtype))
    smallest_subnormal = info.smallest_normal * info.eps
    allowed = 2 * info.eps + math.sqrt(key_len) * accumulator.eps + key_len * smallest_subnormal / 2
    return max(_FLOORS.get(dtype_name(dtype), 0.0), allowed)


def output_tolerance(dtype: torch.dtype, *, strict: bool = False) -> float:
    """Return by what part of its size a row of an output may differ from that of another call.

    Args:
        dtype: The dtype of the output.
        strict: Whether both outputs are of the same shapes, so that nothing is
            added up in another order.

    Returns:
        2 eps if strict: 4e-16, 2e-7, 2e-3, 1.6e-2 in float64, float32,
        float16, bfloat16. Otherwise 1e-11, 2e-5, 7.8e-3, 6.2e-2.
    """
    if strict:
        return _STRICT_UNITS * _eps(dtype)
    return max(_LOOSE_UNITS * _eps(dtype), _LOOSE_FLOORS.get(dtype_name(dtype), 0.0))


def answer_tolerance(dtype: torch.dtype) -> float:
    """Return the least part by which a row of an answer may differ from that in float64."""
    return max(_FLOORS.get(dtype_name(dtype), 0.0), 2 * _eps(dtype))


def answer_units(dtype: torch.dtype) -> float:
    """Return by how many units of rounding each unit of the scores may move an answer."""
    return 8.0 if is_fine(dtype) else 2.0


def is_fine(dtype: torch.dtype) -> bool:
    """Tell whether a dtype is fine enough that approximate instructions show: float32, float64."""
    return dtype_name(dtype) in _FLOORS


def residual_tolerance(dtype: torch.dtype) -> float:
    """Return by what part a model's own output may differ from its weights times its values."""
    name = dtype_name(dtype)
    return _FLOORS.get(name, _RESIDUALS.get(name, _COARSEST_RESIDUAL))


def drift_tolerance(dtypes: Iterable[str], depth: int, key_len: int) -> float:
    """Return by what part weights of a model may differ from those of another run of it."""
    # The coarsest of the dtypes counts, of both runs and of others that are to be served.
    coarsest = max(_DRIFTS.get(dtype, _FLOORS["float32"]) for dtype in dtypes)
    return coarsest * math.sqrt(max(1, depth / _SHALLOW)) + math.sqrt(key_len) * _FLOAT32_EPS


def drift_allowed(values: Numbers, hidden: Bools, tolerance: float) -> Numbers:
    """Return by how much each number of some maps may differ, (..., queries, keys)."""
    # What is `hidden` does not count as a weight of its map.
    import numpy as np

    sizes = np.where(np.isfinite(values), np.abs(values), 0.0)
    counted = np.where(hidden | (values <= HIDDEN_FROM), 0.0, sizes)
    largest = counted.max(axis=(-2, -1), keepdims=True)
    flat = np.where(counted > 0, counted, np.nan).reshape(*values.shape[:-2], -1)
    typical, known = np.zeros(flat.shape[:-1]), largest[..., 0, 0] > 0
    typical[known] = np.nanmedian(flat[known], axis=-1)
    typical = typical[..., None, None]
    # Weights are at most 1; among scores, one that stands out must not excuse the others.
    largest = np.where(largest > 1, np.minimum(largest, np.maximum(1, 1e3 * typical)), largest)
    with np.errstate(divide="ignore", invalid="ignore"):
        logarithms = np.where(sizes > 0, np.maximum(np.log(largest / sizes), 0), 0.0)
        spread = np.where(typical > 0, np.log(largest / typical), 0.0)
    allowed: Numbers = sizes * (1 + logarithms) + typical + _OF_LARGEST * largest
    return tolerance * np.maximum(1, spread / _SPREAD) * allowed


def _eps(dtype: torch.dtype) -> float:
    import torch

    return torch.finfo(dtype).eps


def merging_tolerance(dtype: torch.dtype, parts: int) -> float:
    """Return by what part of its largest number a head may be off that is merged of parts."""
    # Each part is rounded, and so is each merge of two, by numbers that may be as large as any
    # value, however small their sum is: half an eps for a part, and two for a merge.
    return parts * _eps(dtype)
