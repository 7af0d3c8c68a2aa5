"""What a module carries says what its attention is: `.scaling`, `.sliding_window`, `.sinks` ..."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, Literal, TypeAlias

from torch import Tensor, nn

Feature: TypeAlias = Literal["scale", "softcap", "window", "chunk", "sinks"]


@dataclass(frozen=True, eq=False)
class Carried:
    """One thing that a module carries."""

    feature: Feature  # What it declares
    name: str  # The attribute: "scaling", "config.sliding_window" ...
    # A number: the scale, the cap, how many keys with its own position a query sees, the size of
    # chunks; or the sinks, (heads,)
    value: Any = field(repr=False)


def _number(value: Any) -> float | None:
    # A tensor may be learned: it is not the number that a scale or cap is.
    return float(value) if type(value) in (int, float) and value > 0 else None


def _whole(value: Any) -> int | None:
    return value if type(value) is int and value > 0 else None


def _sinks(value: Any) -> Tensor | None:
    per_head = isinstance(value, Tensor) and value.ndim == 1 and value.is_floating_point()
    return value if per_head else None


def _root(value: Any) -> float | None:
    number = _number(value)
    return None if number is None else number**-0.5


# The name of an attribute -> what it declares, and how it is read; None for what says nothing.
_OF_MODULE: dict[str, tuple[Feature, Callable[[Any], Any]]] = {
    "scaling": ("scale", _number), "scale": ("scale", _number), "softmax_scale": ("scale", _number),
    "inv_norm_factor": ("scale", _number), "norm_factor": ("scale", _number),
    "attn_logit_softcapping": ("softcap", _number), "softcap": ("softcap", _number),
    "sliding_window": ("window", _whole), "sinks": ("sinks", _sinks),
}  # fmt: skip
# The same of its `config`; the third is what `config.layer_types` calls a layer that has it.
_OF_CONFIG: dict[str, tuple[Feature, Callable[[Any], Any], str]] = {
    "query_pre_attn_scalar": ("scale", _root, ""),
    "attention_multiplier": ("scale", _number, ""),
    "attn_logit_softcapping": ("softcap", _number, ""),
    "sliding_window": ("window", _whole, "sliding_attention"),
    "attention_chunk_size": ("chunk", _whole, "chunked_attention"),
}


def carried_by(module: nn.Module | None) -> Iterator[Carried]:
    """Yield what a module, and its `config`, declare of the attention in it."""
    for name, (feature, read) in _OF_MODULE.items():
        value = read(getattr(module, name, None))
        if value is not None:
            yield Carried(feature, name, value)
    config = getattr(module, "config", None)
    for name, (feature, read, kind) in _OF_CONFIG.items():
        value = read(getattr(config, name, None))
        # Where the module has the attribute itself, it says of this layer what counts.
        if value is not None and not hasattr(module, name) and _is_of(kind, module, config):
            yield Carried(feature, f"config.{name}", value)


def _is_of(kind: str, module: nn.Module | None, config: object) -> bool:
    """Whether this layer is of a kind, where a configuration has several."""
    kinds, index = getattr(config, "layer_types", None), getattr(module, "layer_idx", None)
    if not kind or not kinds:
        return kind != "chunked_attention"
    return type(index) is int and index < len(kinds) and kinds[index] == kind
