"""A pretend accelerator: tensors on `pretend:0`, so that device handling is tested without a GPU.

Its tensors are plain tensors of torch whose memory is the host's, so that views, storages and
autograd are torch's own. Every kernel runs on the CPU, on an alias of that memory. As on a GPU,

- an operation refuses tensors of two devices, except for scalars and for indices on the CPU;
- `.numpy()` and generators of the CPU are refused, and random numbers have a state of their own;
- whatever makes the host wait for the device is counted: `with reads() as seen: ...`.

torch cannot forget a device once it is registered. It is therefore absent (`device_count()` is 0)
until a test turns it on: the fixtures `pretend` and `accelerator` of `devices.py` do. There is one,
and no `torch.Generator` of it: torch asks C++ for those.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch.utils import backend_registration, dlpack

NAME = "pretend"
DEVICE = f"{NAME}:0"
_SETUP = getattr(backend_registration, "_setup_privateuseone_for_python_backend", None)


def _why_absent() -> str | None:
    if _SETUP is None:
        return "this torch cannot register a device from Python"
    if torch.accelerator.is_available():
        return "there is an accelerator, and torch would take the pretend one for it"
    return None


WHY_ABSENT = _why_absent()

aten = torch.ops.aten
_CPU = torch._C.DispatchKeySet(torch._C.DispatchKey.CPU)
_DLPACK_EXTENSION = 12  # kDLExtDev, which torch reads as the registered device
# Operations whose indices may be on the CPU.
_INDEXING = {"aten::index", "aten::index_put_", "aten::_index_put_impl_", "aten::_unsafe_index"}
# What makes the host wait on a GPU: a number or a shape that the device has to tell it.
_WAITING = {
    "aten::_local_scalar_dense", "aten::equal", "aten::nonzero", "aten::masked_select",
    "aten::_unique2", "aten::unique_dim", "aten::unique_consecutive", "aten::bincount",
    "aten::repeat_interleave",
}  # fmt: skip


class Reads:
    """What the host asked of the device.

    Attributes:
        count: How often it waited for an answer.
        copied: How many elements came with it in the largest answer.
        names: The operations that waited.
    """

    def __init__(self) -> None:
        self.count, self.copied = 0, 0
        self.names: list[str] = []

    def add(self, name: str, elements: int) -> None:
        """Count one answer."""
        self.count += 1
        self.copied = max(self.copied, elements)
        self.names.append(name)


_open: list[Reads] = []


@contextlib.contextmanager
def reads() -> Iterator[Reads]:
    """Count how often the host waits for the device inside the block."""
    seen = Reads()
    _open.append(seen)
    try:
        yield seen
    finally:
        _open.remove(seen)


def _waited(name: str, elements: int) -> None:
    for seen in _open:
        seen.add(name, elements)


class _Module:
    """What `torch.get_device_module("pretend")` answers."""

    def __init__(self) -> None:
        self.count = 0
        self.generator = torch.Generator().manual_seed(0)

    def is_initialized(self) -> bool:
        return True

    def is_available(self) -> bool:
        return self.count > 0

    def device_count(self) -> int:
        return self.count

    def current_device(self) -> int:
        return 0

    def set_device(self, device: object) -> None:
        pass

    def synchronize(self, device: object = None) -> None:
        pass

    def manual_seed(self, seed: int) -> None:
        self.generator.manual_seed(seed)

    manual_seed_all = manual_seed

    def get_rng_state(self, device: object = None) -> torch.Tensor:
        return self.generator.get_state()

    def set_rng_state(self, state: torch.Tensor, device: object = None) -> None:
        self.generator.set_state(state)

    def get_rng_state_all(self) -> list[torch.Tensor]:
        return [self.get_rng_state()] * self.count

    def set_rng_state_all(self, states: list[torch.Tensor]) -> None:
        for state in states:
            self.set_rng_state(state)

    def _is_in_bad_fork(self) -> bool:
        return False

    def get_amp_supported_dtype(self) -> list[torch.dtype]:
        return [torch.float16, torch.bfloat16]


MODULE = _Module()


@contextlib.contextmanager
def present() -> Iterator[torch.device]:
    """Make the device present inside the block."""
    before, MODULE.count = MODULE.count, 1
    try:
        yield torch.device(DEVICE)
    finally:
        MODULE.count = before


class _DLTensor(ctypes.Structure):
    """The head of a DLPack tensor: where it is."""

    _fields_ = (
        ("data", ctypes.c_void_p),
        ("device_type", ctypes.c_int32),
        ("device_index", ctypes.c_int32),
    )


_address = ctypes.pythonapi.PyCapsule_GetPointer
_address.restype, _address.argtypes = ctypes.c_void_p, (ctypes.py_object, ctypes.c_char_p)


def _on_device(made: torch.Tensor) -> torch.Tensor:
    """Hand the memory of a new CPU tensor over to the device."""
    capsule = dlpack.to_dlpack(made)
    head = _DLTensor.from_address(_address(capsule, b"dltensor"))
    head.device_type, head.device_index = _DLPACK_EXTENSION, 0
    moved = dlpack.from_dlpack(capsule)
    if moved.stride() != made.stride():  # DLPack knows no strides of dimensions of one element
        moved = aten.as_strided.default.redispatch(_CPU, moved, made.shape, made.stride())
    return moved


def _storage_on_cpu(storage: torch.UntypedStorage) -> Any:
    return torch._C._construct_storage_from_data_pointer(
        storage.data_ptr(), torch.device("cpu"), storage.nbytes()
    )


def _on_cpu(tensor: torch.Tensor) -> torch.Tensor:
    """See the memory of a tensor of the device as a CPU tensor."""
    if tensor.device.type != NAME:
        return tensor
    memory = _storage_on_cpu(tensor.untyped_storage())
    alias = torch.empty(0, dtype=tensor.dtype)
    return alias.set_(memory, tensor.storage_offset(), tensor.shape, tensor.stride())


class _Signature:
    """What is needed of an operation's schema to run it, read once."""

    def __init__(self, op: Any) -> None:
        arguments = op._schema.arguments
        self.name = op.name().partition(".")[0]
        self.is_view = op.is_view or self.name == "aten::set_"
        self.arguments = [argument.name for argument in arguments]
        self.tensors = {argument.name for argument in arguments if str(argument.type) == "Tensor"}
        self.written = {
            argument.name
            for argument in arguments
            if argument.alias_info and argument.alias_info.is_write
        }


_signature = functools.cache(_Signature)


def _run(op: Any, *args: Any, **kwargs: Any) -> Any:
    """Run an operation that torch has no kernel of for the device."""
    known = _signature(op)
    if known.name in _SPECIAL:
        return _SPECIAL[known.name](*args, **kwargs)
    if known.is_view:
        return op.redispatch(_CPU, *args, **kwargs)
    if known.name in _WAITING:
        _waited(known.name, 1)
    return _Call(known).run(op, {**dict(zip(known.arguments, args, strict=False)), **kwargs})


class _Call:
    """One call on aliases of the tensors given; what it writes to is returned as it was given."""

    def __init__(self, known: _Signature) -> None:
        self.known = known
        self.written: list[tuple[torch.Tensor, torch.Tensor]] = []
        self.lent: set[int] = set()

    def run(self, op: Any, given: dict[str, Any]) -> Any:
        """Call the operation on the CPU."""
        inner = {name: self.inside(name, value) for name, value in given.items()}
        if "generator" in self.known.arguments:
            inner["generator"] = MODULE.generator
        returned = op(**inner)
        for tensor, alias in self.written:
            if tensor.shape != alias.shape:  # an `out=` of no elements grows
                tensor.data = _on_device(alias)
        return _each(returned, self.outside)

    def inside(self, name: str, value: Any) -> Any:
        """Return an argument as the CPU takes it."""
        if name == "device":
            return value and torch.device("cpu")
        if name == "generator":
            if value is not None:
                raise RuntimeError(f"Expected a {NAME!r} device type for generator, found 'cpu'")
            return value
        if name in self.known.tensors and not isinstance(value, torch.Tensor):
            # A number that torch made a tensor of; Python sees the number again.
            return torch.tensor(value, dtype=torch.float64 if isinstance(value, float) else None)
        if name in self.known.written:
            return _each(value, self.to_write)
        if name == "indices" and self.known.name in _INDEXING:
            return _each(value, _on_cpu)
        return _each(value, self.to_read)

    def to_read(self, tensor: torch.Tensor) -> torch.Tensor:
        """See a tensor of the device, or a scalar of the CPU."""
        if tensor.device.type != NAME and tensor.dim():
            raise RuntimeError(
                "Expected all tensors to be on the same device, but found at least two devices, "
                f"{DEVICE} and {tensor.device}! ({self.known.name})"
            )
        alias = _on_cpu(tensor)
        self.lent.add(alias.untyped_storage().data_ptr())
        return alias

    def to_write(self, tensor: torch.Tensor) -> torch.Tensor:
        """See a tensor that the call writes to."""
        alias = self.to_read(tensor)
        if not tensor.numel():
            alias = torch.empty(tensor.shape, dtype=tensor.dtype)
        self.written.append((tensor, alias))
        return alias

    def outside(self, result: torch.Tensor) -> torch.Tensor:
        """Return a result on the device."""
        for tensor, alias in self.written:
            if result is alias:
                return tensor
        if result.untyped_storage().data_ptr() in self.lent:
            result = result.clone()  # an alias keeps nothing alive
        return _on_device(result)


def _each(value: Any, change: Callable[[torch.Tensor], torch.Tensor]) -> Any:
    """Change the tensors of an argument or of what was returned."""
    if isinstance(value, torch.Tensor):
        return change(value)
    if isinstance(value, (list, tuple)):
        return type(value)(_each(one, change) for one in value)
    return value


def _copy(source: torch.Tensor, target: torch.Tensor, *_: Any) -> torch.Tensor:
    if target.device.type != NAME:
        _waited("aten::copy_", source.numel())
    _on_cpu(target).copy_(_on_cpu(source))
    return target


def _resize(tensor: torch.Tensor, size: list[int], **_: Any) -> torch.Tensor:
    """Give a tensor another shape; its elements stay as far as they are needed."""
    kept = _on_cpu(tensor).flatten() if tensor.is_contiguous() else _on_cpu(tensor).reshape(-1)
    grown = torch.empty(size, dtype=tensor.dtype)
    count = min(kept.numel(), grown.numel())
    grown.view(-1)[:count] = kept[:count]
    tensor.data = _on_device(grown)
    return tensor


_SPECIAL: dict[str, Callable[..., Any]] = {
    "aten::_copy_from": _copy,
    "aten::_copy_from_and_resize": _copy,
    "aten::resize_": _resize,
    "aten::_fused_sdp_choice": lambda *_, **__: 0,  # attention as written out, not a CPU kernel
}


def _deepcopied(storage: torch.UntypedStorage) -> torch.UntypedStorage:
    """Copy a storage of the device, which torch itself cannot allocate."""
    copied = torch.empty(storage.nbytes(), dtype=torch.uint8)
    copied.untyped_storage().copy_(_storage_on_cpu(storage))
    return _on_device(copied).untyped_storage()


def _register() -> None:
    """Tell torch of the device. Needed before the first backward pass of a process."""

    class Hooks(torch._C._acc.PrivateUse1Hooks):  # type: ignore[misc]
        def is_available(self) -> bool:
            return MODULE.count > 0

        def has_primary_context(self, index: int) -> bool:
            return MODULE.count > 0

        def is_built(self) -> bool:
            return True

    _SETUP(NAME, backend_module=MODULE, hook=Hooks())
    _KEPT.append(torch.library.Library("_", "IMPL"))
    _KEPT[0].fallback(_run, "PrivateUse1")
    _KEPT[0].fallback(torch.library.fallthrough_kernel, "AutocastPrivateUse1")
    of_torch = torch.UntypedStorage.clone

    def clone(self: torch.UntypedStorage) -> torch.UntypedStorage:
        return _deepcopied(self) if self.device.type == NAME else of_torch(self)

    torch.UntypedStorage.clone = clone


_KEPT: list[torch.library.Library] = []
if WHY_ABSENT is None:
    _register()
