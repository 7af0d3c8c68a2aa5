"""Captured attention against that of another run: which layer and head moved first, and how.

Of each head there are a sketch of its weights and a few statistics. In a file, a sketch has groups
of neighbouring queries and keys, so that 32 layers of 32 heads take a megabyte.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from ..attention.lazy import LazyWeights
from ..attention.sketch import Numbers, from_planes, packed, packed_size, planes, unpacked
from ..attention.tolerance import drift_tolerance
from ..capture.record import AttentionRecord
from ..capture.trace import Trace
from ..failure import Failure, Place
from ..heatmaps.record import joined, parted, sizes_of
from ..inputs import check_tolerance, dtype_names, misuse, multiple
from .compare import numbered, said_of_sketches
from .judging import Verdict
from .layers import STATISTICS, Layer, layers_of

# The first folded queries and keys by numbers of their positions that may be equal.
VERSIONS = (2,)
# What a file should take before it is written as text, and how much that is for each group.
_BYTES, _BYTES_OF_GROUP = 700_000, 11
_LEAST_GROUPS, _MOST_GROUPS = 8, 512
_LARGEST_FILE = 1 << 26
# Where the logarithms of weights are further apart than this, so are those of scores, which are
# rounded by a part of their size: of a model in half precision they move weights by more.
_SPREAD = 20.0

# -- compared ------------------------------------------------------------------------------------


def assert_same_attention(
    trace: Trace | AttentionRecord | LazyWeights,
    other: Trace | AttentionRecord | LazyWeights,
    *,
    tolerance: float | None = None,
    precision: str | Sequence[str] = (),
) -> None:
    """Assert that a model attends as it did in another run of it.

    For what follows an upgrade, a conversion of weights, or another implementation of attention:
    the failure names the first layer and head that moved. Layers of other names are matched in
    order.

    Args:
        trace: What `capture_attention` returned, one record of it, or `LazyWeights`; or a
            `DTensor` of weights, on each rank of its mesh.
        other: What it returned of the other run: what "was" in the message. A query that may attend
            to nothing is left out, since implementations give it different things.
        tolerance: By what part of itself a weight may differ; by default what follows from dtypes,
            length and the number of layers before.
        precision: Other dtypes, by name, whose rounding is no difference.

    Raises:
        Failure: It attends otherwise.
        TypeError: Neither traces nor records.
        ValueError: Traces without weights, or a precision or tolerance that is none.
    """
    __tracebackhide__ = True
    # The other run is what is expected: "the trace is that of the other one".
    found = compare_layers(
        layers_of(other),
        layers_of(trace),
        None if tolerance is None else check_tolerance(tolerance),
        dtype_names("precision", precision),
    )
    if found is not None:
        raise found


@dataclass(frozen=True)
class _Moved:
    """How far one layer is from what was expected of it."""

    number: int  # Which layer
    expected: Layer  # What was expected
    actual: Layer  # What it is
    excess: tuple[Numbers, Numbers]  # How far queries and keys are off, as a part of what may be
    tolerance: float  # That of the layer

    @property
    def of_maps(self) -> Numbers:
        """How far the worst query or key of each map is off."""
        most: Numbers = np.maximum(self.excess[0].max(1), self.excess[1].max(1))
        return most

    def said_of(self, number: int) -> str:
        """Say of one map, by number, what moved and how."""
        sketches = self.expected.sketch, self.actual.sketch
        lines = said_of_sketches(*sketches, self.excess, number, self.actual.queries)
        before, after = (layer.statistics[number] for layer in (self.expected, self.actual))
        moved = [
            f"{name} {old:.4g}, was {new:.4g}"
            for name, new, old in zip(STATISTICS, before, after, strict=True)
            if abs(new - old) > self.tolerance * (1 + abs(new))
        ]
        shown = [" ".join(line.split()) for line in lines]
        return "; ".join([f"{self.place(number)}: {', '.join(shown)}", *moved[:3]])

    def place(self, number: int) -> str:
        """Name the head of one map, and its batch entry where there are several."""
        batch, head = divmod(number, self.expected.shape[1])
        head = self.actual.heads[head] if self.actual.heads else head
        entry = f" of batch entry {batch}" if self.expected.shape[0] > 1 else ""
        return f"{self.actual.name}, head {head}{entry}"


def compare_layers(
    expected: Sequence[Layer],
    actual: Sequence[Layer],
    tolerance: float | None = None,
    precision: Sequence[str] = (),
    caller: str = "assert_same_attention",
) -> Failure | None:
    """Compare attention with what is expected of it; return what differs, or None."""
    names = [[layer.name for layer in layers] for layers in (expected, actual)]
    if sorted(names[0]) == sorted(names[1]):  # whichever ran first
        actual = sorted(actual, key=lambda layer: names[0].index(layer.name))
    if len(expected) != len(actual):
        return Failure(caller, _missing(*names))
    for one, other in zip(expected, actual, strict=True):
        if one.queries != other.queries and "weights" in (one.name, other.name):
            got = "rows of one that were not drawn of the other"
            raise ValueError(misuse("trace, other", got, "both with the same rows= and seed="))
        if one.shape != other.shape:
            claim = f"{other.name}: the shape changed from {one.shape} to {other.shape}"
            return Failure(caller, claim, layer=other.name)
    moved = list(_moved(expected, actual, tolerance, precision))
    broken = [one for one in moved if (one.of_maps > 1).any()]
    if not broken:
        return None
    first, worst = broken[0], max(broken, key=lambda one: float(one.of_maps.max()))
    head, worst_head = int((first.of_maps > 1).argmax()), int(worst.of_maps.argmax())
    heads = np.unique(np.flatnonzero(first.of_maps > 1) % first.expected.shape[1])
    renamed = sum(one != other for one, other in zip(*names, strict=True))
    layer = f"{first.actual.name} is the first that moved, number {first.number + 1} of "
    layer += f"{len(expected)}{_before(first.number)}; {_heads(heads, first.actual)} moved"
    times = multiple(float(worst.of_maps[worst_head]))
    said = f"{worst.said_of(worst_head)} ({times} times what {worst.tolerance:.1e} of the weights"
    return Failure(
        caller, "maps moved", broken=sum(int((one.of_maps > 1).sum()) for one in moved),
        of=sum(len(one.of_maps) for one in moved), layer=layer, worst=Place(f"{said} allows)"),
        first=Place(first.said_of(head)), cause=_cause(first), tolerance=first.tolerance,
        assumed=f"{renamed} renamed layers are those of the same place" if renamed else None,
    )  # fmt: skip


def _before(count: int) -> str:
    return ("", "; the one before agrees")[count] if count < 2 else f"; the {count} before agree"


def _heads(heads: npt.NDArray[np.int64], layer: Layer) -> str:
    """Name heads by their numbers in the model."""
    return f"its head{'s' * (len(heads) > 1)} {numbered(heads, 1, layer.heads)}"


def _missing(expected: list[str], actual: list[str]) -> str:
    """Say which layers there are too many or too few."""
    gone = [name for name in expected if name not in actual]
    new = [name for name in actual if name not in expected]
    lists = [
        f"{what}: {', '.join(names[:4])}" + (f" and {len(names) - 4} more" if names[4:] else "")
        for what, names in (("gone", gone), ("new", new))
        if names
    ]
    return "; ".join([f"there are {len(actual)} attentions, not {len(expected)}", *lists])


def _moved(
    expected: Sequence[Layer],
    actual: Sequence[Layer],
    tolerance: float | None,
    precision: Sequence[str],
) -> Iterator[_Moved]:
    for number, (one, other) in enumerate(zip(expected, actual, strict=True)):
        spans = one.sketch.rows.span, one.sketch.columns.span
        if spans != (1, 1):
            other = replace(other, sketch=other.sketch.folded(spans))
        allowed = tolerance
        if allowed is None:
            dtypes = (one.dtype, other.dtype, *precision)
            allowed = drift_tolerance(dtypes, number + 1, one.shape[3])
        wider = np.maximum(1, one.spread / _SPREAD)[:, None]
        excess = one.sketch.excess(other.sketch, allowed * wider)
        yield _Moved(number, one, other, excess, allowed)


def _cause(moved: _Moved) -> str | None:
    """Say whether heads show what others of the layer were, as after a conversion of weights."""
    one, other = moved.expected.sketch, moved.actual.sketch
    heads = moved.expected.shape[1]
    numbers = np.flatnonzero(moved.of_maps[:heads] > 1)
    if len(numbers) < 2:
        return None
    before, after = (
        np.concatenate([side.signed[numbers] for side in (sketch.rows, sketch.columns)], axis=1)
        for sketch in (one, other)
    )
    far = np.abs(before[None] - after[:, None]).max(-1)
    order = far.argmin(axis=1)
    kept = (order == np.arange(len(order))).any()
    if kept or len(set(order)) < len(order) or (far.min(1) > 1e-3 * far.max(1)).any():
        return None
    names = np.array(moved.actual.heads or range(heads))
    said = [
        f"{names[h]} is what was {names[numbers[at]]}" for h, at in zip(numbers, order, strict=True)
    ]
    return f"the heads are permuted: {', '.join(said[:3])}" + (" ..." if said[3:] else "")


def check(
    layers: Sequence[Layer],  # What was captured
    baseline: Path,  # A file
    folder: Path,  # Where they are written
    tolerance: float | None = None,  # By what part of itself a weight may differ
    precision: Sequence[str] = (),  # Other dtypes, by name, in which the same model must agree
) -> Verdict:
    """Compare attention with its baseline."""
    actual = folder / f"actual{baseline.suffix}"
    actual.write_text(encode(layers), "ascii")
    artifacts = {"actual": actual}
    if not baseline.exists():
        return Verdict("missing", artifacts=artifacts)
    try:
        expected = read(baseline)
    except (OSError, ValueError) as error:
        return Verdict("unreadable", str(error), artifacts=artifacts)
    found = compare_layers(expected, layers, tolerance, precision, "")
    if found is None:
        return Verdict("equal", compared=("data",))
    reason, *details = str(found).splitlines()
    details = [line.strip() for line in details]
    return Verdict("data", reason, details, compared=("data",), artifacts=artifacts)


# -- in files ------------------------------------------------------------------------------------


def encode(layers: Sequence[Layer]) -> str:
    """Write layers as text."""
    maps = sum(layer.shape[0] * layer.shape[1] for layer in layers)
    groups = _BYTES // (maps * 2 * _BYTES_OF_GROUP)
    groups = min(max(groups, _LEAST_GROUPS), _MOST_GROUPS)
    header, content = [], b""
    for layer in layers:
        spans = tuple(-(-size // groups) for size in layer.shape[2:])
        step = drift_tolerance([layer.dtype], 1, layer.shape[3])
        header.append([layer.name, layer.shape, layer.dtype, spans, step])
        content += packed(layer.sketch.folded((spans[0], spans[1])), step)
        known = np.column_stack([layer.statistics, layer.spread])
        content += planes(known.astype("<f4"))
    head = json.dumps({"version": VERSIONS[-1], "layers": header}, separators=(",", ":"))
    return joined(head, content)


def read(path: Path) -> list[Layer]:
    """Read layers from a file."""
    if not path.is_file() or path.stat().st_size > _LARGEST_FILE:
        raise ValueError(f"it is no file of at most {_LARGEST_FILE >> 20} MB")
    return parted(path.read_text("ascii"), VERSIONS, _decode)


def _decode(header: dict[str, Any], unpack: Callable[[int], bytes]) -> list[Layer]:
    known, size = [], 0
    for name, given, dtype, spans, step in header["layers"]:
        shape, spans = sizes_of(given, 4), sizes_of(spans, 2)
        if not (isinstance(name, str) and isinstance(dtype, str) and 0 < float(step) < 1):
            raise ValueError("a layer of it has no name, dtype or step")
        maps = shape[0] * shape[1]
        numbers = (maps, -(-shape[2] // spans[0]), -(-shape[3] // spans[1]))
        ends = size + packed_size(numbers), size + packed_size(numbers) + maps * 4 * 6
        known.append((name, shape, dtype, spans, float(step), numbers, (size, *ends)))
        size = ends[1]
    data, layers = unpack(size), []
    for name, shape, dtype, spans, step, numbers, (start, middle, end) in known:
        sketch = unpacked(data[start:middle], numbers, step, spans=(spans[0], spans[1]))
        statistics = from_planes(data[middle:end], "<f4").reshape(-1, 6).astype(np.float64)
        sizes = (shape[0], shape[1], shape[2], shape[3])
        layers.append(Layer(name, sizes, dtype, sketch, statistics[:, :5], statistics[:, 5]))
    if not layers:
        raise ValueError("it has no layers")
    return layers
