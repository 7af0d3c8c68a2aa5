"""Likely causes of broken rows, read from the numbers.

Each cause is one function that looks at the evidence and returns a sentence,
or None where the numbers do not show it. A wrong hint costs a reader more
than none, so each asks for a signature that other defects do not leave.

The evidence is a bounded sample: a failure on a huge tensor stays within the
memory of the passing assertion.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor

from ..attention.chunks import index_of
from ..attention.tolerance import row_rounding
from ..inputs import dtype_name
from .claims import Finding, Index
from .scan import Block, evenly, row_of

# The most weights, and rows, that a sample holds: 1 MB in float64.
_SAMPLE = 2**17
_SAMPLE_ROWS = 256
# Weights may underflow: this much of what another mask permits must hold weight.
NEARLY_ALL = 0.98


@dataclass(frozen=True)
class Evidence:
    """What a cause may look at."""

    weights: Tensor  # The weights, ``(..., queries, keys)``
    mask: Tensor | None  # Their mask, with as many dimensions, or None
    finding: Finding[Any]  # What the thorough reading found
    queries: Tensor  # Which query of its map each row of the sample is, ``(n,)``
    rows: Tensor  # The weights of those rows, ``(n, keys)`` in float64
    permitted: Tensor  # Their mask, ``(n, keys)``

    @classmethod
    def spread(cls, weights: Tensor, mask: Tensor | None, finding: Finding[Any]) -> Evidence:
        """Sample rows with a permitted key, evenly spaced; none where a row is too long."""
        *lead, key_len = weights.shape
        most = min(_SAMPLE_ROWS, _SAMPLE // key_len)
        numbers = evenly(math.prod(lead), most)
        found = cls._of(weights, mask, finding, [index_of(number, lead) for number in numbers])
        return found.only(found.permitted.any(-1))

    @classmethod
    def of_map(cls, weights: Tensor, mask: Tensor | None, finding: Finding[Any]) -> Evidence:
        """Sample rows of the map with the worst weight, evenly spaced, the worst among them."""
        *place, worst, _ = finding.worst.index
        most = min(_SAMPLE_ROWS, max(1, _SAMPLE // weights.shape[-1]))
        queries = sorted({*evenly(weights.shape[-2], most), worst})
        return cls._of(weights, mask, finding, [(*place, query) for query in queries])

    @classmethod
    def _of(
        cls, weights: Tensor, mask: Tensor | None, finding: Finding[Any], indices: list[Index]
    ) -> Evidence:
        queries = torch.tensor([index[-1] for index in indices], dtype=torch.long, device="cpu")
        rows = rows_of(weights, indices, weights.shape[-1]).double()
        permitted = torch.ones_like(rows, dtype=torch.bool)
        if mask is not None:
            permitted = rows_of(mask, indices, weights.shape[-1])
        return cls(weights, mask, finding, queries, rows, permitted)

    @property
    def slack(self) -> float:
        """What rounding may do to the sum of a row."""
        return row_rounding(self.weights.dtype, self.weights.shape[-1])

    @property
    def place(self) -> Index:
        """Which map the worst weight is in."""
        return self.finding.worst.index[: self.weights.ndim - 2]

    def only(self, some: Tensor) -> Evidence:
        """Leave out the other rows."""
        return replace(
            self, queries=self.queries[some], rows=self.rows[some], permitted=self.permitted[some]
        )

    def telling(self) -> Evidence:
        """Leave out rows with NaN and rows of zeros, which say nothing about a mask."""
        return self.only(self.rows.isfinite().all(-1) & (self.rows != 0).any(-1))

    def explained_by(self, other: Tensor) -> bool:
        """Tell whether the weights are those of another mask, ``(n, keys)``."""
        extra, common = other & ~self.permitted, other & self.permitted
        if int(extra.sum()) < 2 or bool((self.rows[~other] != 0).any()):
            return False
        permitted = (extra, common) if bool(common.any()) else (extra,)
        return all(share(self.rows[some] > 0) >= NEARLY_ALL for some in permitted)

    def lacks_exactly(self, missing: Tensor) -> bool:
        """Tell whether these permitted weights, and hardly any others, are zero."""
        missing = missing & self.permitted
        kept = self.permitted & ~missing
        if int(missing.sum()) < 2 or bool((self.rows[missing] != 0).any()):
            return False
        return bool(kept.any()) and share(self.rows[kept] > 0) >= NEARLY_ALL


Cause = Callable[[Evidence], "str | None"]


def rows_of(operand: Tensor, indices: Sequence[Index], key_len: int) -> Tensor:
    """Return some rows of weights or of a mask, ``(n, keys)``, on the CPU."""
    rows = [row_of(operand, index).expand(key_len) for index in indices]
    return torch.stack(rows) if rows else torch.zeros(0, key_len, dtype=operand.dtype)


def share(of: Tensor) -> float:
    """Return the share of True, 0 of nothing."""
    return float(of.double().mean()) if of.numel() else 0.0


def likely_cause(weights: Tensor, mask: Tensor | None, finding: Finding[Block]) -> str | None:
    """Return the first cause that the numbers show, or None."""
    if finding.claim.lines.transposed and finding.claim.kind == "sum" and not finding.nans:
        return "the rows do sum to 1: a plain softmax, or too few Sinkhorn iterations?"
    evidence = Evidence.spread(weights, mask, finding)
    causes = _CAUSES_OF.get(finding.claim.kind, (not_a_number,))
    return next((said for cause in causes if (said := cause(evidence)) is not None), None)


def opposite_mask(evidence: Evidence) -> str | None:
    """All weight lies on keys that the mask forbids, and on nearly all of them."""
    telling = evidence.telling()
    if not telling.explained_by(~telling.permitted):
        return None
    return (
        "all weight lies on keys that the mask forbids: a mask of the opposite meaning? "
        "Then pass ~mask"
    )


def not_a_number(evidence: Evidence) -> str | None:
    """NaN: how many rows, from which on, and whether they are NaN throughout."""
    finding = evidence.finding
    if finding.first_nan is None or finding.claim.kind == "masked":
        return None
    key_len = evidence.weights.shape[-1]
    block = _row(evidence, finding.first_nan)
    count = key_len - int(block.numbers)
    rows = "1 row is" if finding.nans == 1 else f"{finding.nans} rows are"
    where = f"{rows} NaN, from {finding.claim.lines.name(finding.first_nan)} on"
    if count == 0:
        return f"{where}; it holds both inf and -inf: scores before the softmax?"
    if count < key_len:
        return (
            f"{where}; there at {count} of {key_len} keys, and a softmax over keys makes whole "
            "rows NaN: made after it, or over another axis?"
        )
    if evidence.mask is not None:
        return f"{where}, at every key although the mask permits some"
    if finding.nans == finding.of > 1:
        return f"{where}, which is all: NaN in a key, or no key left by the mask in use?"
    return (
        f"{where}, at every key: fully masked, through a softmax of -inf? "
        'Then pass mask= and fully_masked="nan"'
    )


def infinite(evidence: Evidence) -> str | None:
    """Infinity in the worst row."""
    if evidence.finding.worst.value != math.inf:
        return None
    return "the row holds inf: exp overflowed (the row maximum was not subtracted)?"


def zero_rows(evidence: Evidence) -> str | None:
    """Rows of zeros, which a fully masked row becomes in many implementations."""
    finding = evidence.finding
    if finding.worst.value != 0:
        return None
    worst = _row(evidence, finding.worst.index)
    if float(worst.high) != 0 or float(worst.low) != 0:
        return None
    rows = "this row holds" if finding.zeros == 1 else f"{finding.zeros} of these rows hold"
    if evidence.mask is None:
        return f"{rows} only zeros: fully masked? Then pass mask="
    return f"{rows} only zeros although the mask permits keys"


def other_axis(evidence: Evidence) -> str | None:
    """The weights sum to one along another axis than the keys."""
    shape = evidence.weights.shape
    last = len(shape) - 2
    for dim in range(last, -1, -1):
        if shape[dim] > 1 and (found := _sums_to_one_along(evidence, dim)):
            if dim == last:
                columns = "every column" if found == "all" else "every column that holds weight"
                return f"{columns} sums to 1: softmax over the query axis (dim=-2)?"
            name = {0: "batch", 1: "head"}[dim] if len(shape) == 4 else "leading"
            return f"the weights sum to 1 over the {name} axis: softmax over dim={dim}?"
    return None


def all_ones(evidence: Evidence) -> str | None:
    """Every permitted weight is one."""
    rows = evidence.rows
    if len(rows) and bool((rows == 1).all()):
        return "every weight is 1: softmax over an axis of size 1?"
    if len(rows) and torch.equal(rows, evidence.permitted.double()):
        return "every permitted weight is 1 and every other 0: the mask itself?"
    return None


def same_sum(evidence: Evidence) -> str | None:
    """All rows sum to the same constant."""
    rows = evidence.rows
    if len(rows) < 2 or evidence.finding.broken < evidence.finding.of:
        return None
    sums = rows.sum(-1)
    constant = float(sums.mean())
    spread = float((sums - constant).abs().max())
    if bool((rows < 0).any()) or not spread <= evidence.slack * constant or constant == 0:
        return None
    return f"every row sums to {constant:.6g}: scaled after the softmax?"


def masked_afterwards(evidence: Evidence) -> str | None:
    """Masked keys are zero, and their weight is missing from the row."""
    # Rows without a masked key bear witness: they still sum to one.
    rows, permitted = evidence.rows, evidence.permitted
    if bool((rows < 0).any()):
        return None
    cut = ~permitted.all(-1)
    if int(cut.sum()) < 2 or bool((rows[~permitted] != 0).any()):
        return None
    # Dropout, with or without a scale, leaves zeros at permitted keys too.
    if float((rows[permitted] == 0).double().mean()) > 0.02:
        return None
    off = rows.sum(-1) - 1
    whole = off[~cut]
    if not len(whole) or bool((whole.abs() > evidence.slack).any()):
        return None
    if bool((off[cut] > evidence.slack).any()):
        return None
    if float((off[cut] < -evidence.slack).double().mean()) < 0.5:
        return None
    return (
        "permitted keys sum to less than 1 and masked keys are 0: masked after the softmax, "
        "without normalising again?"
    )


def low_precision(evidence: Evidence) -> str | None:
    """The numbers are those of a narrower dtype, and so is the error."""
    rows = evidence.rows
    if torch.unique(rows).numel() < 8:
        return None  # a few round numbers fit into every dtype
    for narrow in (torch.bfloat16, torch.float16, torch.float32):
        allowed = row_rounding(narrow, rows.shape[-1])
        wider = torch.finfo(evidence.weights.dtype).eps < torch.finfo(narrow).eps
        fits = bool((rows.to(narrow).double() == rows).all())
        if wider and fits and evidence.finding.worst.deviation <= allowed:
            name = dtype_name(narrow)
            return (
                f"every weight is a {name} number: computed in {name} and cast to "
                f"{dtype_name(evidence.weights)}? Check before the cast, or pass "
                f"tolerance={allowed:.1e}"
            )
    return None


def dropout(rows: Tensor, permitted: Tensor | None) -> str | None:
    """Zeros strewn at random, and sums that vary around one as those zeros make them."""
    # Dropout with probability p keeps a weight as w / (1 - p). The variance of a row sum is then p
    # times the sum of the squared kept weights: the zeros and the sums must tell of the same p.
    if rows.shape[0] < 8 or bool((rows < 0).any()):
        return None
    looked_at = _before_the_last_weight(rows) if permitted is None else permitted
    zeros = share(rows[looked_at] == 0)
    sums = rows.sum(-1)
    # Rows that kept weight do not sum to one either, as they do where other rows are merely zero.
    kept = sums[(rows != 0).any(-1)]
    if share((kept - 1).abs() > 0.01) < 0.5:
        return None
    expected = zeros * float(rows.square().sum(-1).mean())
    if not 0.02 < zeros < 0.95 or expected == 0:
        return None
    observed = float((sums - 1).square().mean())
    centred = abs(float(sums.mean()) - 1) < 4 * math.sqrt(expected / rows.shape[0])
    if not (centred and 0.4 < observed / expected < 2.5):
        return None
    return (
        f"{zeros:.0%} of the weights are zero and rows sum to {float(sums.mean()):.2f} on "
        f"average: weights after dropout (p about {zeros:.2g})?"
    )


def _dropout(evidence: Evidence) -> str | None:
    return dropout(evidence.rows, None if evidence.mask is None else evidence.permitted)


def no_softmax(evidence: Evidence) -> str | None:
    """Numbers below 0 in most rows, or above 1 and none below 0, and sums that are anything."""
    rows, finding = evidence.rows, evidence.finding
    if len(rows) < 2 or finding.broken < 0.9 * finding.of:
        return None
    sums = rows.sum(-1)
    low, high = float(sums.min()), float(sums.max())
    if high - low <= evidence.slack:
        return None
    if share((rows < -evidence.slack).any(-1)) >= 0.5:
        values = f"{float(rows.min()):.3g} to {float(rows.max()):.3g}"
        return f"values run from {values}: scores (logits) that no softmax has seen?"
    if bool((rows < 0).any()) or share((rows > 1 + evidence.slack).any(-1)) < 0.5:
        return None
    if share(rows[evidence.permitted] > 0) < NEARLY_ALL:
        return None
    return (
        f"no value is negative, and rows sum to {low:.3g} up to {high:.3g}: exp without a division "
        "by the sum?"
    )


def mask_not_applied(evidence: Evidence) -> str | None:
    """Rows are uniform, over the masked keys too."""
    off = (evidence.rows * evidence.rows.shape[-1] - 1).abs()
    if not len(off) or bool((off > evidence.slack).any()):
        return None
    return "every row is uniform over all keys, masked ones too: the mask was not applied?"


def declared_otherwise(evidence: Evidence) -> str | None:
    """A fully masked row holds one of the other contents that can be declared."""
    row = _row(evidence, evidence.finding.worst.index)
    key_len = evidence.weights.shape[-1]
    if int(row.numbers) == 0:
        return 'NaN at every key: a softmax of -inf? If that is meant, fully_masked="nan"'
    if float(row.low) == 0 and float(row.high) == 0:
        return 'zero at every key. If that is meant, fully_masked="zero"'
    if float(row.misfit(masked=False)) <= row_rounding(evidence.weights.dtype, key_len):
        return (
            "1 / key_len at every key: masked with a finite number? "
            'If that is meant, fully_masked="uniform"'
        )
    if abs(float(row.total) - 1) <= evidence.slack:
        return "the row sums to 1: the mask was not applied, or means the opposite?"
    return None


_CAUSES_OF: dict[str, tuple[Cause, ...]] = {
    "sum": (
        opposite_mask,
        infinite,
        # Before NaN, of keys that no query sees; and before dropout: a masked map, transposed, has
        # zeros and sums around 1 too.
        other_axis,
        not_a_number,
        _dropout,  # before the next: it may zero a whole short row
        zero_rows,
        all_ones,
        same_sum,
        masked_afterwards,
        low_precision,
        no_softmax,
    ),
    "negative": (),
    "masked": (opposite_mask, declared_otherwise),
    "leak": (opposite_mask, mask_not_applied),
}


def _row(evidence: Evidence, index: tuple[int, ...]) -> Block:
    spans = tuple(slice(i, i + 1) for i in index)
    return Block(evidence.weights, evidence.mask, spans)


def _sums_to_one_along(evidence: Evidence, dim: int) -> Literal["", "all", "some"]:
    """Tell whether lines along an axis sum to one: all, or all that hold weight."""
    weights, worst = evidence.weights, evidence.finding.worst.index
    shape, queries = weights.shape, len(weights.shape) - 2
    size, key_len = shape[dim], shape[-1]
    if size > _SAMPLE:
        return ""
    keys = min(key_len, _SAMPLE // size)
    spans = [slice(i, i + 1) for i in worst]
    if dim != queries:
        height = min(shape[queries], max(1, _SAMPLE // (size * keys)))
        start = min(worst[queries], shape[queries] - height)
        spans[queries] = slice(start, start + height)
    spans[dim] = slice(0, size)
    index = (*spans, slice(0, keys))
    values = weights[index].double()
    sums = values.sum(dim)
    # A key that no query attends to, or a query that was fully masked, leaves a line of zeros, or
    # of NaN. Rows that are merely zero leave such lines as well, so they must not be all that is
    # broken.
    empty = (sums == 0) | values.isnan().all(dim)
    if bool(empty.any()) and evidence.finding.zeros == evidence.finding.broken:
        return ""
    full = sums[~empty]
    good = (full - 1).abs() <= row_rounding(weights.dtype, size)
    if full.numel() < 1 + bool(empty.any()) or bool((values < 0).any()) or not bool(good.all()):
        return ""
    return "some" if bool(empty.any()) else "all"


def _before_the_last_weight(rows: Tensor) -> Tensor:
    # Trailing zeros are more likely a causal or padding mask than dropout.
    after = (rows != 0).flip(-1).int().cumsum(-1).flip(-1)
    return after > 0
