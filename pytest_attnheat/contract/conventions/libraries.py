"""Conventions of other libraries: tensors go over to them, and what they return comes back.

No library is imported before a subject of it is called.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache, wraps
from importlib import import_module
from typing import TYPE_CHECKING, Any, TypeAlias

import torch
from torch import Tensor

from ...attention.call import Call
from ...attention.levels import NONE
from ..asking import dense, to_layout
from .convention import Arrange, Convention, Lse

if TYPE_CHECKING:
    from ..spec import AttentionSpec

# A function of arrays, whose gradients are wanted of the first so many; it returns a tuple.
Function: TypeAlias = Callable[..., Sequence[Any]]
# What a compiler turns into code of its own is asked in few forms.
_FEW: dict[str, tuple[Any, ...]] = {
    "gradients": ("all", NONE),
    "shape": (NONE, "(B, 1, L, S)", "(B, H, L, S)"),
}
# No limit on one side of a window, where a number is wanted: more keys than any call has.
_FAR = 2**30


@dataclass(frozen=True)
class Library:
    """What another library is handed, and how it computes."""

    give: Callable[[Tensor], Any]  # Makes an array of a tensor
    # Of a function, its arrays, of how many first ones gradients are wanted, and the gradient of
    # its first output, makes those gradients
    gradients: Callable[[Function, Sequence[Any], int, Any], Sequence[Any]]
    take: Callable[[Any], Tensor] = torch.from_dlpack  # Makes a tensor of an array
    # Returns what a function with some keywords is called as, the same for the same
    compiled: Callable[..., Function] = lambda function, names, options: _called(
        function, names, options
    )


def _called(
    function: Any, names: tuple[str, ...], options: tuple[tuple[str, Any], ...]
) -> Function:
    """A function of arrays alone: query, key, value, and those of some names."""

    def call(query: Any, key: Any, value: Any, *more: Any) -> Sequence[Any]:
        result = function(query, key, value, **dict(zip(names, more, strict=True)), **dict(options))
        return tuple(result) if isinstance(result, tuple | list) else (result,)

    return call


class _Across(torch.autograd.Function):
    """Calls a function of another library, whose gradients are the ones of that library."""

    @staticmethod
    def forward(
        ctx: Any, library: Library, function: Function, others: Sequence[Any], *tensors: Tensor
    ) -> tuple[Tensor, ...]:
        given = [*(library.give(tensor.detach()) for tensor in tensors), *others]
        ctx.about = library, function, given, len(tensors)
        taken = tuple(library.take(one).clone() for one in function(*given))
        ctx.mark_non_differentiable(*taken[1:])
        return taken

    @staticmethod
    def backward(ctx: Any, upstream: Tensor, *aside: Tensor) -> tuple[Any, ...]:
        library, function, given, count = ctx.about
        found = library.gradients(function, given, count, library.give(upstream.contiguous()))
        return None, None, None, *(library.take(one).clone() for one in found)


def across(library: Callable[[], Library]) -> Arrange:
    """Return what calls a subject with arrays of a library in place of tensors."""

    def arrange(spec: AttentionSpec, call: Call, arguments: dict[str, Any]) -> Any:
        own = library()
        given = {n: one for n, one in arguments.items() if isinstance(one, Tensor)}
        options = tuple((n, one) for n, one in arguments.items() if n not in given)
        names = sorted(given, key=lambda name: not given[name].is_floating_point())
        floats = [given[name] for name in names if given[name].is_floating_point()]
        function = own.compiled(spec.implementation, tuple(names), options)
        inputs = (*(to_layout(spec, tensor) for tensor in call.tensors), *floats)
        others = [own.give(given[name]) for name in names[len(floats) :]]
        found = _Across.apply(own, function, others, *inputs)  # type: ignore[no-untyped-call]
        return found if len(found) > 1 else found[0]

    return arrange


# --- JAX


def _jax() -> Library:
    jax = import_module("jax")

    def give(tensor: Tensor) -> Any:
        narrow = tensor.int() if tensor.dtype == torch.int64 else tensor  # as it has integers
        return jax.numpy.from_dlpack(narrow.contiguous())

    def gradients(
        function: Function, given: Sequence[Any], count: int, upstream: Any
    ) -> Sequence[Any]:
        return _gradients_by_jax(function, count)(upstream, *given)

    return Library(give, gradients, compiled=_by_jit)


# Compiled in a hurry: what is compiled for one small call runs two or three times.
_QUICK = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}


def _jitted(function: Function) -> Function:
    """Compile a function as a whole, or leave it as it is if numbers decide what it does."""
    # To run it uncompiled takes longer, as then each step of it is compiled by itself.
    jax = import_module("jax")
    compiled = jax.jit(function, compiler_options=_QUICK)

    @wraps(function)
    def call(*given: Any) -> Any:
        try:
            return compiled(*given)
        except (jax.errors.ConcretizationTypeError, jax.errors.TracerArrayConversionError):
            return function(*given)

    return call


# Kept, as a function that is made anew is compiled anew.
@lru_cache(maxsize=256)
def _by_jit(
    function: Any, names: tuple[str, ...], options: tuple[tuple[str, Any], ...]
) -> Function:
    return _jitted(_called(function, names, options))


@lru_cache(maxsize=256)
def _gradients_by_jax(function: Function, count: int) -> Function:
    vjp, plain = import_module("jax").vjp, inspect.unwrap(function)

    def pull(upstream: Any, *given: Any) -> Sequence[Any]:
        def first(*arrays: Any) -> Any:
            return plain(*arrays, *given[count:])[0]

        found: Sequence[Any] = vjp(first, *given[:count])[1](upstream)
        return found

    return _jitted(pull)


def _both_sides(window: tuple[int | None, int | None]) -> tuple[int, ...]:
    return tuple(_FAR if side is None else side for side in window)


# --- MLX


def _mlx() -> Library:
    mlx = import_module("mlx.core")

    def gradients(
        function: Function, given: Sequence[Any], count: int, upstream: Any
    ) -> Sequence[Any]:
        def first(*arrays: Any) -> list[Any]:
            return [function(*arrays, *given[count:])[0]]

        found: Sequence[Any] = mlx.vjp(first, list(given[:count]), [upstream])[1]
        return found

    return Library(mlx.array, gradients)


def _named_mask(spec: AttentionSpec, call: Call, arguments: dict[str, Any]) -> Any:
    """Say causality in the place of the mask, and the scale always."""
    arguments = {**arguments, "scale": call.factor}
    if arguments.pop("is_causal", False):
        arguments["mask"] = "causal"
    return across(_mlx)(spec, call, arguments)


# --- Keras, which computes with one of several libraries


def _numbers(tensor: Tensor) -> Any:
    """A tensor as an array of NumPy."""
    if tensor.dtype != torch.bfloat16:
        return tensor.detach().contiguous().numpy()
    bits = tensor.detach().contiguous().view(torch.int16).numpy()
    return bits.view(import_module("ml_dtypes").bfloat16)


def _keras(spec: AttentionSpec, call: Call, arguments: dict[str, Any]) -> Any:
    keras = import_module("keras")
    behind = keras.backend.backend()
    if behind == "torch":
        return dense(spec, call, arguments)
    return across(_jax if behind == "jax" else lambda: _by_numpy(keras))(spec, call, arguments)


def _by_numpy(keras: Any) -> Library:
    def gradients(
        function: Function, given: Sequence[Any], count: int, upstream: Any
    ) -> Sequence[Any]:
        raise NotImplementedError(f"no gradients with the backend {keras.backend.backend()}")

    def take(array: Any) -> Tensor:
        return torch.as_tensor(keras.ops.convert_to_numpy(array))

    return Library(lambda t: keras.ops.convert_to_tensor(_numbers(t)), gradients, take)


# --- ONNX: a graph of one operator, made for each call

# Since which version of the operators something can be said.
_SINCE = {"nonpad_kv_seqlen": 24, "left_window_size": 25}
_INPUTS = ("Q", "K", "V", "attn_mask", "", "", "nonpad_kv_seqlen")


def _onnx(spec: AttentionSpec, call: Call, arguments: dict[str, Any]) -> Any:
    """Run the operator Attention in a session that the subject makes of a model."""
    # What is no input or attribute of it goes to the subject.
    onnx = import_module("onnx")
    taken = {n: arguments.pop(n) for n in _OF_ONNX if n in arguments}
    left, right = taken.pop("left_window_size", None) or (None, None)
    feeds = dict(zip(_INPUTS, map(_numbers, call.tensors), strict=False))
    feeds |= {n: _numbers(taken.pop(n)) for n in _INPUTS if n in taken}
    if left is not None:
        taken |= {"left_window_size": left, "right_window_size": -1 if right is None else right}
    version = max([23, *(n for name, n in _SINCE.items() if name in {*taken, *feeds})])
    make = onnx.helper
    names = [name if name in feeds else "" for name in _INPUTS]
    names = names[: max(names.index(name) for name in feeds) + 1]
    attributes = {n: int(one) if type(one) is bool else one for n, one in taken.items()}
    node = make.make_node("Attention", names, ["Y"], **attributes)
    sizes = {name: make.np_dtype_to_tensor_dtype(one.dtype) for name, one in feeds.items()}
    inputs = [make.make_tensor_value_info(n, sizes[n], one.shape) for n, one in feeds.items()]
    output = make.make_tensor_value_info("Y", sizes["Q"], call.shapes["output"])
    graph = make.make_graph([node], "attention", inputs, [output])
    model = make.make_model(
        graph, opset_imports=[make.make_opsetid("", version)], ir_version=_IR_VERSION
    )
    proto = "path_or_bytes" not in (spec.parameters or {})
    session = spec.implementation(model if proto else model.SerializeToString(), **arguments)
    return torch.as_tensor(session.run(None, feeds)[0])


# Of the models: the oldest in which all of the operators can be said.
_IR_VERSION = 10
_OF_ONNX = ("attn_mask", "nonpad_kv_seqlen", "is_causal", "scale", "softcap", "left_window_size")
_ONNX: dict[str, Any] = {
    "mask": "any", "causal": "top_left", "scale_argument": "scale", "softcap": "softcap",
    "window": "left_window_size", "lengths": "nonpad_kv_seqlen", "grouped": True,
    "fully_masked": "zero", "gradients": False, "dtypes": ("float32", "float16"),
    "devices": ("cpu",), "few_shapes": True,
}  # fmt: skip
# Its scale is that of queries and that of keys, both the root of it.
_ASKED_OF_ONNX: dict[str, Any] = {
    "makes": True, "arrange": _onnx, "handles": _OF_ONNX, "values": {"window": tuple},
    "only": {"scale": (NONE, 0.7)}, "apart": (("lengths", "causal"), ("lengths", "window")),
}  # fmt: skip


# What functions of arrays share.
_ARRAYS: dict[str, Any] = {
    "mask_argument": "mask", "scale_argument": "scale", "grouped": True, "fully_masked": "uniform",
    "devices": ("cpu",), "few_shapes": True,
}  # fmt: skip

CONVENTIONS = (
    Convention("jax", "dot_product_attention of JAX",
               ("query", "key", "value", "key_value_seq_lengths", "local_window_size"),
               {**_ARRAYS, "layout": "blhd", "causal": "top_left", "bias": "bias",
                "window": "local_window_size", "lengths": "key_value_seq_lengths",
                "returns": "lse", "dtypes": ("float32", "bfloat16")},
               values={"window": _both_sides}, arrange=across(_jax),
               besides={"return_residual": True}, lse=Lse("blh", empty="lowest"),
               only={"value_dim": ("equal",), **_FEW}),
    Convention("mlx", "scaled_dot_product_attention of MLX",
               ("q", "k", "v", "scale", "mask", "sinks", "stream"),
               {**_ARRAYS, "mask": "any", "causal": "bottom_right", "sinks": "sinks",
                "dtypes": ("float32", "float16", "bfloat16")},
               arrange=_named_mask, handles=("is_causal",),
               apart=(("mask", "causal"), ("fill", "empty"))),
    Convention("keras", "dot_product_attention of Keras",
               ("query", "key", "value", "flash_attention", "attn_logits_soft_cap"),
               {**_ARRAYS, "layout": "blhd", "causal": "top_left", "bias": "bias",
                "dtypes": ("float32", "bfloat16")},
               arrange=_keras, only=_FEW, limits="attn_logits_soft_cap, which no CPU has"),
    Convention("onnx", "the operator Attention of ONNX, in what makes a session of a model",
               ("proto", "opsets", "new_ops"), _ONNX, **_ASKED_OF_ONNX),
    Convention("onnxruntime", "the operator Attention of ONNX, in a session of ONNX Runtime",
               ("path_or_bytes", "sess_options", "providers"), _ONNX, **_ASKED_OF_ONNX),
)  # fmt: skip
