"""What the assertions accept, and the errors for what they do not.

Every assertion reads its arguments through this module, so that all of them
accept the same tensors and refuse the others in the same words.
"""

from __future__ import annotations

import math
from numbers import Real
from typing import Any, Literal, TypeAlias, cast, get_args

import numpy as np
import torch

FullyMasked: TypeAlias = Literal["zero", "uniform", "nan"]
Index: TypeAlias = tuple["slice | int", ...]

_ACCEPTED = (
    "a dense torch.Tensor or numpy.ndarray of float64, float32, float16, bfloat16 or float8, "
    "with two or more dimensions: (..., queries, keys)"
)


class ArrayPieces:
    """A NumPy array that torch cannot wrap, handed out as copies of pieces.

    Torch knows neither negative strides nor foreign byte order. Copying the
    array whole would cost as much memory as the array; a piece does not.
    """

    def __init__(self, array: np.ndarray[Any, Any]) -> None:
        """Keep the array; nothing is copied before a piece is asked for."""
        self._array = array
        self._native = array.dtype.newbyteorder("=")
        self.dtype = torch.from_numpy(np.empty(0, self._native)).dtype
        self.device = torch.device("cpu")
        self.shape = torch.Size(array.shape)

    @property
    def ndim(self) -> int:
        """The number of dimensions."""
        return self._array.ndim

    @property
    def mT(self) -> ArrayPieces:  # noqa: N802 (the name torch uses)
        """The same array with its last two dimensions swapped."""
        return ArrayPieces(self._array.swapaxes(-2, -1))

    def view(self, index: Index) -> ArrayPieces:
        """Look at a part; nothing is copied."""
        return ArrayPieces(self._array[index])

    def __getitem__(self, index: Index) -> torch.Tensor:
        """Copy one piece into a tensor."""
        return torch.from_numpy(np.array(self._array[index], dtype=self._native, order="C"))


Operand: TypeAlias = "torch.Tensor | ArrayPieces"


def view(operand: Operand, index: Index) -> Operand:
    """Return a part of an operand without copying it."""
    return operand.view(index) if isinstance(operand, ArrayPieces) else operand[index]


class _Writable:
    """The memory of a read-only array, under a writable flag.

    Torch warns when it wraps a read-only array, because it could write to it.
    Nothing here writes, and silencing the warning would need a global setting.
    """

    def __init__(self, array: np.ndarray[Any, Any]) -> None:
        self.owner = array
        address = array.__array_interface__["data"][0]
        self.__array_interface__ = {**array.__array_interface__, "data": (address, False)}


def as_weights(value: object, name: str = "weights") -> Operand:
    """Return attention weights ready to be read, sharing memory wherever possible.

    Args:
        value: What the caller passed.
        name: What the argument is called, for the errors.

    Returns:
        A detached tensor of shape ``(..., queries, keys)``, or an
        `ArrayPieces` where torch cannot share the array's memory.

    Raises:
        TypeError: Not a dense tensor or array of a real float dtype.
        ValueError: Fewer than two dimensions, or no elements.
    """
    operand = _as_operand(value, name, _ACCEPTED)
    if not (operand.dtype.is_floating_point and _is_known_float(operand.dtype)):
        raise TypeError(f"{name}: got dtype {dtype_name(operand)}; accepted is {_ACCEPTED}")
    if operand.ndim < 2:
        raise ValueError(
            f"{name}: got {operand.ndim} dimension(s), shape {tuple(operand.shape)}; "
            f"accepted is {_ACCEPTED}"
        )
    if 0 in operand.shape:
        raise ValueError(
            f"{name}: shape {tuple(operand.shape)} has no elements, so there is nothing to "
            f"check; accepted is {_ACCEPTED}"
        )
    return operand


def as_mask(mask: object, weights: Operand) -> Operand | None:
    """Return a mask with as many dimensions as the weights, not expanded.

    Args:
        mask: None, or a boolean tensor or array, True where a query may attend.
        weights: The weights it belongs to.

    Returns:
        The mask with leading dimensions of size 1 added where it has fewer.

    Raises:
        TypeError: Not boolean.
        ValueError: Does not broadcast to the shape of the weights.
    """
    if mask is None:
        return None
    accepted = "a boolean torch.Tensor or numpy.ndarray, True where a query may attend"
    operand = _as_operand(mask, "mask", accepted)
    if operand.dtype != torch.bool:
        raise TypeError(
            f"mask: got dtype {dtype_name(operand)}; accepted is {accepted}. For a mask of 0 and "
            "1 pass mask.bool(); for an additive mask of 0 and -inf pass mask == 0; where True "
            "means masked pass ~mask"
        )
    given, wanted = tuple(operand.shape), tuple(weights.shape)
    if not _broadcasts(given, wanted):
        raise ValueError(f"mask: shape {given} does not broadcast to the weights' shape {wanted}")
    missing = len(wanted) - len(given)
    if missing == 0:
        return operand
    return as_mask(_with_leading_ones(operand, missing), weights)


def check_fully_masked(value: object) -> FullyMasked:
    """Return the declared meaning of a fully masked row.

    Raises:
        ValueError: Not "zero", "uniform" or "nan".
    """
    if value not in get_args(FullyMasked):
        raise ValueError(f"fully_masked: got {value!r}; accepted are 'zero', 'uniform' and 'nan'")
    return cast("FullyMasked", value)


def check_tolerance(value: object) -> float:
    """Return a tolerance given by the caller.

    Raises:
        TypeError: Not a number.
        ValueError: Not in 0 <= tolerance < 1 (1 would let a row of zeros pass).
    """
    tolerance = check_number(value, "tolerance")
    if not 0 <= tolerance < 1:
        raise ValueError(f"tolerance: got {tolerance!r}; accepted is 0 <= tolerance < 1, or None")
    return tolerance


def check_number(value: object, name: str) -> float:
    """Return a finite number given by the caller.

    Raises:
        TypeError: Not a number.
        ValueError: NaN or infinite.
    """
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(f"{name}: got {type(value).__name__}; accepted is a number, or None")
    try:
        number = float(value)
    except OverflowError:  # an int beyond any float
        number = math.inf
    if not math.isfinite(number):
        raise ValueError(f"{name}: got {number!r}; accepted is a finite number, or None")
    return number


def dtype_name(operand: Operand) -> str:
    """Return the dtype as users write it, without the prefix."""
    return str(operand.dtype).removeprefix("torch.")


def _is_known_float(dtype: torch.dtype) -> bool:
    # Packed formats (float4_e2m1fn_x2) hold two numbers per element and convert to nothing.
    wide = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
    return dtype in wide or str(dtype).startswith("torch.float8_")


def _with_leading_ones(operand: Operand, count: int) -> Operand:
    index = cast("Index", (None,) * count)
    return view(operand, index)


def _as_operand(value: object, name: str, accepted: str) -> Operand:
    if isinstance(value, ArrayPieces):
        return value
    if isinstance(value, torch.Tensor):
        return _from_torch(value, name, accepted)
    if isinstance(value, np.ndarray):
        return _from_numpy(value, name, accepted)
    raise TypeError(f"{name}: got {type(value).__name__}; accepted is {accepted}")


def _from_torch(tensor: torch.Tensor, name: str, accepted: str) -> torch.Tensor:
    if tensor.is_nested:
        raise TypeError(f"{name}: got a nested tensor; accepted is {accepted}")
    if tensor.layout != torch.strided:
        layout = str(tensor.layout).removeprefix("torch.")
        raise TypeError(f"{name}: got a tensor of layout {layout}; accepted is {accepted}")
    if tensor.device.type == "meta":
        raise TypeError(
            f"{name}: got a meta tensor, which holds no numbers; accepted is {accepted}"
        )
    return tensor.detach()


def _from_numpy(array: np.ndarray[Any, Any], name: str, accepted: str) -> Operand:
    if isinstance(array, np.ma.MaskedArray):
        raise TypeError(
            f"{name}: got a numpy masked array, whose True means masked; accepted is {accepted}. "
            "Pass array.data, with mask=~array.mask"
        )
    if array.dtype.newbyteorder("=") not in (np.bool_, np.float16, np.float32, np.float64):
        raise TypeError(f"{name}: got dtype {array.dtype}; accepted is {accepted}")
    if not _torch_can_share(array):
        return ArrayPieces(array)
    if not array.flags.writeable:
        array = np.asarray(_Writable(array))
    return torch.from_numpy(array)


def _torch_can_share(array: np.ndarray[Any, Any]) -> bool:
    whole_steps = all(s >= 0 and s % array.itemsize == 0 for s in array.strides)
    return array.dtype.isnative and whole_steps


def _broadcasts(given: tuple[int, ...], wanted: tuple[int, ...]) -> bool:
    if len(given) > len(wanted):
        return False
    tail = wanted[len(wanted) - len(given) :]
    return all(g in (1, w) for g, w in zip(given, tail, strict=True))
