"""Reading what users pass, and the one manner of saying what was wrong with it.

Everything that a user passes is read through this module, so that all rooms accept the same
tensors, masks, numbers and names, and refuse the others in the same words: what was given, and
what is accepted (`misuse`).

Importing it loads neither torch nor numpy: the rooms that draw pictures, and what pytest loads in
every run, read names and numbers through it too.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from numbers import Real
from typing import TYPE_CHECKING, Any, cast

if TYPE_CHECKING:
    import numpy as np
    import torch


def misuse(name: str, got: object, accepted: str) -> str:
    """Return the text of an error about an argument: what was given, and what is accepted."""
    return f"{name}: got {got}; accepted is {accepted}"


def one_of(name: str, given: object, known: Sequence[str]) -> None:
    """Raise ValueError unless `given` is among the `known` names."""
    if not isinstance(given, str) or given not in known:
        accepted = f"one of {', '.join(map(repr, known))}"
        raise ValueError(misuse(name, repr(given), accepted + meant(given, known)))


def meant(given: object, known: Sequence[str]) -> str:
    """Ask after the known name that a given one is nearest to; empty if it is near to none."""
    if not isinstance(given, str):
        return ""
    from difflib import get_close_matches

    by_letters = {one.lower(): one for one in known}
    near = get_close_matches(given.lower(), by_letters, n=1, cutoff=0.75)
    return f"; did you mean {by_letters[near[0]]!r}?" if near else ""


# Before torch is loaded, names of dtypes are read too.
DTYPE_NAMES = ("float16", "bfloat16", "float32", "float64")


def dtype_names(name: str, given: object) -> tuple[str, ...]:
    """Return one or several names of dtypes as a tuple; ValueError for anything else."""
    names = (given,) if isinstance(given, str) else given
    if not isinstance(names, (tuple, list)) or not all(one in DTYPE_NAMES for one in names):
        accepted = f"one or a list of {', '.join(DTYPE_NAMES)}"
        raise ValueError(misuse(name, repr(given), accepted))
    return tuple(names)


def whole_number(name: str, given: object, *, least: int) -> int:
    """Return a whole number of Python, NumPy or torch; a boolean is none."""
    accepted = f"a whole number from {least}"
    number = as_whole(given)
    if number is None:
        raise TypeError(misuse(name, repr(given), accepted))
    if number < least:
        raise ValueError(misuse(name, number, accepted))
    return number


def as_whole(given: object) -> int | None:
    """Return a whole number of Python, NumPy or torch as an int, and None for anything else."""
    if _is_boolean(given) or not hasattr(given, "__index__"):
        return None
    try:
        return int(given.__index__())
    except TypeError:  # a tensor or array of floats, or of several numbers
        return None


def _is_boolean(given: object) -> bool:
    return isinstance(given, bool) or str(getattr(given, "dtype", "")) in ("bool", "torch.bool")


def positive(name: str, given: object) -> int:
    """Return `given` as a size; TypeError if it is not a whole number, ValueError below 1."""
    return whole_number(name, given, least=1)


def seed_number(given: object) -> int:
    """Return `given` as a seed; TypeError if it is not a whole number, ValueError below 0."""
    return whole_number("seed", given, least=0)


_ACCEPTED = (
    "a dense torch.Tensor or numpy.ndarray of float64, float32, float16, bfloat16 or float8, "
    "with two or more dimensions: "
)
ACCEPTED_MASK = "a boolean torch.Tensor or numpy.ndarray, True where a query may attend"


class InBoxes:
    """What is read as a tensor, a box of it at a time, and is never held as a whole."""

    shape: torch.Size  # Its sizes
    dtype: torch.dtype  # That of its boxes
    device: torch.device  # Where they are computed

    # What a verdict has to say of it: which rows stand for all.
    note: str = ""

    def __getitem__(self, box: Any) -> torch.Tensor:
        """Return a box, of slices without steps and whole numbers."""
        raise NotImplementedError

    def whole(self, name: str) -> None:
        """Refuse some rows that stand for all, for who needs all of them."""
        if self.note:
            raise ValueError(misuse(name, f"weights{self.note}", "all rows: rows=None"))

    @property
    def ndim(self) -> int:
        """The number of dimensions."""
        return len(self.shape)


class _Writable:
    """The memory of a read-only array, under a writable flag.

    Torch warns when it wraps a read-only array, because it could write to it.
    Nothing here writes, and silencing the warning would need a global setting.
    """

    def __init__(self, array: np.ndarray[Any, Any]) -> None:
        self.owner = array
        address = array.__array_interface__["data"][0]
        self.__array_interface__ = {**array.__array_interface__, "data": (address, False)}


def as_weights(
    value: object, name: str = "weights", dimensions: str = "(..., queries, keys)"
) -> torch.Tensor:
    """Return attention weights (..., queries, keys), detached, sharing memory wherever possible."""
    accepted = _ACCEPTED + dimensions
    if isinstance(value, InBoxes):
        return cast("torch.Tensor", value)
    operand = _as_operand(value, name, accepted)
    if not (operand.dtype.is_floating_point and _is_known_float(operand.dtype)):
        raise TypeError(misuse(name, f"dtype {dtype_name(operand)}", accepted))
    shape = tuple(operand.shape)
    if operand.ndim < 2:
        got = f"{operand.ndim} dimension(s), shape {shape}"
        raise ValueError(misuse(name, got, accepted))
    if 0 in shape:
        got = f"shape {shape}, which has no elements, so that there is nothing to check"
        raise ValueError(misuse(name, got, accepted))
    return operand


def as_mask(mask: object, weights: torch.Tensor) -> torch.Tensor | None:
    """Return a mask with as many dimensions as the weights, of size 1 where it has fewer."""
    import torch

    if mask is None:
        return None
    if isinstance(mask, InBoxes) and mask.dtype != torch.bool:
        accepted = f"{ACCEPTED_MASK}; the mask of lazy weights is their .mask"
        raise TypeError(misuse("mask", repr(mask), accepted))
    lazy = isinstance(mask, InBoxes)
    operand = cast("torch.Tensor", mask) if lazy else _as_operand(mask, "mask", ACCEPTED_MASK)
    if operand.dtype != torch.bool:
        raise TypeError(
            f"{misuse('mask', f'dtype {dtype_name(operand)}', ACCEPTED_MASK)}. For a mask of 0 "
            "and 1 pass mask.bool(); for an additive mask of 0 and -inf pass mask == 0; where "
            "True means masked pass ~mask"
        )
    given, wanted = tuple(operand.shape), tuple(weights.shape)
    if not broadcasts(given, wanted):
        accepted = f"a shape that broadcasts to that of the weights, {wanted}"
        raise ValueError(misuse("mask", f"shape {given}", accepted))
    missing = len(wanted) - len(given)
    if lazy and missing:
        accepted = f"one of {len(wanted)} dimensions, as the weights have"
        raise ValueError(misuse("mask", repr(mask), accepted))
    return operand if lazy else operand[(None,) * missing]


def check_tolerance(value: object) -> float:
    """Return a tolerance given by the caller: at 1 a row of zeros would pass."""
    tolerance = check_number(value, "tolerance")
    if not 0 <= tolerance < 1:
        raise ValueError(misuse("tolerance", repr(tolerance), "0 <= tolerance < 1, or None"))
    return tolerance


def check_number(value: object, name: str) -> float:
    """Return a finite number given by the caller."""
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(misuse(name, type(value).__name__, "a number, or None"))
    try:
        number = float(value)
    except OverflowError:  # an int beyond any float
        number = math.inf
    if not math.isfinite(number):
        raise ValueError(misuse(name, repr(number), "a finite number, or None"))
    return number


def wide_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype in which numbers of a dtype are added up: float64, or else float32."""
    import torch

    return torch.float64 if dtype == torch.float64 else torch.float32


def dtype_name(operand: torch.Tensor | torch.dtype) -> str:
    """Return the dtype as users write it, without the prefix."""
    return str(getattr(operand, "dtype", operand)).removeprefix("torch.")


def readable(count: int) -> str:
    """Return bytes in words."""
    size = float(count)
    for unit in ("B", "kB", "MB"):
        if size < 1000:
            return f"{size:.3g} {unit}"
        size /= 1000
    return f"{size:.3g} GB"


def multiple(ratio: float) -> str:
    """Return how many times something is, in two digits: 1.3, 7,500, 3.3e+07."""
    plain = 10 <= ratio < 1e6
    return f"{float(f'{ratio:.2g}'):,.0f}" if plain else f"{ratio:.2g}"


def _is_known_float(dtype: torch.dtype) -> bool:
    import torch

    # Packed formats (float4_e2m1fn_x2) hold two numbers per element and convert to nothing.
    wide = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
    return dtype in wide or str(dtype).startswith("torch.float8_")


def _as_operand(value: object, name: str, accepted: str) -> torch.Tensor:
    import numpy as np
    import torch

    if isinstance(value, torch.Tensor):
        return _from_torch(value, name, accepted)
    if isinstance(value, np.ndarray):
        return _from_numpy(value, name, accepted)
    raise TypeError(misuse(name, type(value).__name__, accepted))


def _from_torch(tensor: torch.Tensor, name: str, accepted: str) -> torch.Tensor:
    import torch

    if tensor.is_nested:
        raise TypeError(misuse(name, "a nested tensor", accepted))
    if tensor.layout != torch.strided:
        layout = str(tensor.layout).removeprefix("torch.")
        raise TypeError(misuse(name, f"a tensor of layout {layout}", accepted))
    if tensor.device.type == "meta":
        raise TypeError(misuse(name, "a meta tensor, which holds no numbers", accepted))
    return tensor.detach()


def _from_numpy(array: np.ndarray[Any, Any], name: str, accepted: str) -> torch.Tensor:
    import numpy as np
    import torch

    if isinstance(array, np.ma.MaskedArray):
        got = "a numpy masked array, whose True means masked"
        raise TypeError(f"{misuse(name, got, accepted)}. Pass array.data, with mask=~array.mask")
    if array.dtype.newbyteorder("=") not in (np.bool_, np.float16, np.float32, np.float64):
        raise TypeError(misuse(name, f"dtype {array.dtype}", accepted))
    if not _torch_can_share(array):
        # Negative strides, or a foreign byte order: torch knows neither.
        array = np.array(array, dtype=array.dtype.newbyteorder("="), order="C")
    if not array.flags.writeable:
        array = np.asarray(_Writable(array))
    return torch.from_numpy(array)


def _torch_can_share(array: np.ndarray[Any, Any]) -> bool:
    whole_steps = all(s >= 0 and s % array.itemsize == 0 for s in array.strides)
    return array.dtype.isnative and whole_steps


def broadcasts(given: Sequence[int], wanted: Sequence[int]) -> bool:
    """Tell whether a shape broadcasts to another, which it must not widen."""
    if len(given) > len(wanted):
        return False
    tail = wanted[len(wanted) - len(given) :]
    return all(g in (1, w) for g, w in zip(given, tail, strict=True))
