"""The check of a call as long as memory allows, which `long=True` adds to the examination.

A few rows of it are judged beside float64 (`assert_matches_reference(rows=)`). What lies before
and after query, key and value in memory is NaN, so that a read past their ends shows.
"""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..assertions.precision_calls import Criteria
from ..assertions.precision_judging import judge_call
from ..attention.call import Call
from ..attention.chunks import LOG
from ..attention.levels import NONE
from ..failure import Failure
from ..inputs import dtype_name, readable
from .examination import Check, Examination, Skipped
from .needs import has_gradients

# Beyond 2^16, and no multiple of a block.
LONGEST = 2**17 - 27
# Below, other checks say as much.
_LEAST = 1024
_ROWS, _QUERIES = 64, 256
# What a plain computation of the subject holds for each query and key, and the judge for each
# number of a key and a value: float64, its rounding, the gradients and theirs.
_BYTES_OF_SCORE, _BYTES_OF_NUMBER = 32, 256
# What the judge's own chunks and all else may take.
_SPARE = 3 * 2**29


def free_bytes(device: torch.device) -> int:
    """Return how much memory there is left on a device; 4 GB where that is not known."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
        known = dict(line.split(":", 1) for line in lines)
        return int(known["MemAvailable"].split()[0]) * 1024
    except (OSError, KeyError, ValueError):
        try:
            return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 4
        except (AttributeError, OSError, ValueError):
            return 4 * 10**9


def sizes_for(memory: int, *, square: bool, longest: int | None, width: int) -> tuple[int, int]:
    """Return the numbers of queries (few, unless `square`) and keys that so many bytes allow."""
    memory = max(0, memory - _SPARE) // 2
    most = LONGEST if longest is None else min(LONGEST, longest)

    def needed(keys: int) -> int:
        queries = keys if square else min(keys, _QUERIES)
        return queries * keys * _BYTES_OF_SCORE + keys * width * _BYTES_OF_NUMBER

    keys = most
    while keys > 1 and needed(keys) > memory:
        keys = keys * 7 // 8
    return (keys if square else min(keys, _QUERIES)), keys


def _run(examination: Examination) -> str:
    """The longest call, and the same under causality where that shows all keys to some rows."""
    spec, declared = examination.spec, examination.space.declared
    if spec.expected() is not None:
        raise Skipped("what it is compared with is another function, which is asked of all rows")
    short = examination.case()
    width = short.key.shape[-1] + short.value.shape[-1]
    memory = free_bytes(examination.device)
    queries, keys = sizes_for(memory, square=declared.square, longest=declared.longest, width=width)
    if keys < _LEAST:
        if declared.longest is not None and declared.longest < _LEAST:
            raise Skipped(f"it is declared for at most {declared.longest} queries and keys")
        raise Skipped(f"{readable(memory)} of memory are free, which allows {keys} keys")
    queries = 1 if declared.one_query else queries
    space = replace(examination.space, declared=replace(declared, most_weights=2**62))
    few: dict[str, Any] = {"batch": 1} | ({"key_heads": 1} if declared.heads is None else {})
    aligned = declared.square or spec.causal == "bottom_right"
    for causal in (False, True) if spec.takes_causal and aligned else (False,):
        named = {"causal": True} if causal else {}
        try:
            chosen = space.choice(sizes=(queries, keys), gradients=NONE, **few, **named)
        except ValueError as reason:
            raise Skipped(str(reason)) from None
        LOG.info(
            "%s: a call of %d queries and %d keys in %s%s is made and judged",
            spec.name, queries, keys, dtype_name(examination.dtype), ", causal," * causal,
        )  # fmt: skip
        drawn = space.call(chosen, examination.dtype, examination.device)
        _judge(examination, spec.described(drawn))
    return f"{min(_ROWS, queries)} of {queries} queries were judged, of {keys} keys"


def _judge(examination: Examination, call: Call) -> None:
    spec = examination.spec

    def run(asked: Call) -> Tensor:
        return spec.ask(asked).output

    names = [] if has_gradients(spec) else ["query", "key", "value"]
    criteria = Criteria(
        seed=examination.seed, tolerance=spec.tolerance or 0.0, rows=_ROWS, surrounded=True
    )
    call = replace(call, fully_masked=spec.fully_masked)
    try:
        judge_call("", run, call, criteria, names=names, code=spec.subject)
    except Failure as failure:
        failure.repeat = f"check_attention(..., long=True, seed={examination.seed})"
        raise


LONG = Check(
    "long",
    "a call as long as memory allows is attention, and reads nothing beside its inputs",
    _run,
    issue="flashinfer-ai/flashinfer#1968",
)
