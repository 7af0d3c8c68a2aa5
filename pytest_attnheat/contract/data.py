"""A report as plain data: what `json.dumps` writes, for people and programs that mend code."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import fields, is_dataclass
from typing import Any

import torch
from torch import Tensor

from pytest_attnheat.inputs import dtype_name

# Raised when a key changes its meaning or goes; a new key does not raise it.
VERSION = 1


def as_data(value: Any) -> Any:
    """Return a value as texts, numbers, lists and dictionaries.

    A number that is not finite is "nan", "inf" or "-inf", a tensor "float32 (2, 3)", a dtype its
    name; a function or a module goes by its name. Of a dataclass, tensors are left out.
    """
    if isinstance(value, str):
        return str(value)  # of a subclass as well, which workers cannot send
    if value is None or isinstance(value, bool | int):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else str(value)
    if isinstance(value, Mapping):
        return {str(name): as_data(one) for name, one in value.items()}
    if isinstance(value, list | tuple):
        return [as_data(one) for one in value]
    if isinstance(value, Tensor):
        return f"{dtype_name(value)} {tuple(value.shape)}"
    if isinstance(value, torch.dtype):
        return dtype_name(value)
    if is_dataclass(value) and not isinstance(value, type):
        given = {one.name: getattr(value, one.name) for one in fields(value)}
        return {name: as_data(one) for name, one in given.items() if not isinstance(one, Tensor)}
    return str(getattr(value, "__qualname__", type(value).__qualname__))


def report_data(
    spec: Any, results: Sequence[Mapping[str, Any]], diagnosis: Any, hints: Sequence[str], seed: int
) -> dict[str, Any]:
    """Return a report as plain data.

    Args:
        spec: What was examined, a specification or its data.
        results: `Result.as_dict()` of each.
        diagnosis: What it computes instead, a `Diagnosis` or its data; None without one.
        hints: What a reader may want to declare or know.
        seed: Where the inputs were drawn from.
    """
    counts = Counter(result["status"] for result in results)
    return {
        "version": VERSION,
        "subject": spec["name"] if isinstance(spec, Mapping) else spec.name,
        "passed": not counts["failed"] and counts["skipped"] < len(results),
        "counts": {status: counts[status] for status in ("passed", "failed", "skipped", "xfailed")},
        "spec": spec if isinstance(spec, Mapping) else spec_data(spec),
        "seed": seed,
        "hints": list(hints),
        "diagnosis": diagnosis_data(diagnosis),
        "results": list(results),
    }


def spec_data(spec: Any) -> dict[str, Any]:
    """Return what a specification declares, and which of it was typed."""
    names = [one.name for one in fields(spec) if not one.name.startswith("_")]
    said = {name: as_data(getattr(spec, name)) for name in names}
    return said | {"typed": sorted(spec.typed)}


def diagnosis_data(diagnosis: Any) -> Any:
    """Return a diagnosis as data."""
    return diagnosis.as_dict() if hasattr(diagnosis, "as_dict") else as_data(diagnosis)
