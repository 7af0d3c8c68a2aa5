"""Likely causes of broken rows, read from the numbers.

Each cause is one function that looks at the evidence and returns a sentence,
or None where the numbers do not show it. A wrong hint costs a reader more
than none, so each asks for a signature that other defects do not leave.

The evidence is a bounded sample: a failure on a huge tensor stays within the
memory of the passing assertion.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch

from pytest_attnheat.assertions.claims import Finding
from pytest_attnheat.assertions.scan import Block, evenly, row_of
from pytest_attnheat.attention.chunks import index_of
from pytest_attnheat.attention.tolerance import row_rounding
from pytest_attnheat.inputs import Operand, dtype_name

# The most weights that a sample holds: 1 MB in float64.
_SAMPLE = 2**17
_SAMPLE_ROWS = 256


@dataclass(frozen=True)
class Evidence:
    """What a cause may look at.

    Attributes:
        weights: The weights, ``(..., queries, keys)``.
        mask: Their mask, with as many dimensions, or None.
        finding: What the thorough reading found.
        rows: Some rows with a permitted key, ``(n, keys)`` in float64, spread
            over the tensor. None where a single row is too long.
        permitted: The mask of those rows, ``(n, keys)``.
    """

    weights: Operand
    mask: Operand | None
    finding: Finding[Block]
    rows: torch.Tensor | None
    permitted: torch.Tensor | None

    @property
    def slack(self) -> float:
        """What rounding may do to the sum of a row."""
        return row_rounding(self.weights.dtype, self.weights.shape[-1])

    @property
    def widespread(self) -> bool:
        """Whether nearly all rows are broken, as a structural defect leaves them."""
        return self.finding.broken >= 0.9 * self.finding.of


Cause = Callable[[Evidence], "str | None"]


def likely_cause(weights: Operand, mask: Operand | None, finding: Finding[Block]) -> str | None:
    """Return the first cause that the numbers show, or None."""
    if finding.claim.lines.transposed and finding.claim.kind == "sum" and not finding.nans:
        return "the rows do sum to 1: a plain softmax, or too few Sinkhorn iterations?"
    rows, permitted = _sample(weights, mask)
    evidence = Evidence(weights, mask, finding, rows, permitted)
    for cause in _CAUSES_OF.get(finding.claim.kind, (not_a_number,)):
        sentence = cause(evidence)
        if sentence is not None:
            return sentence
    return None


def opposite_mask(evidence: Evidence) -> str | None:
    """Rows that hold weight hold all of it on keys that the mask forbids."""
    rows, permitted = evidence.rows, evidence.permitted
    if rows is None or permitted is None:
        return None
    # NaN and zero rows say nothing: those are the ones that the mask in use left no key.
    telling = rows.isfinite().all(-1) & (rows != 0).any(-1)
    at_permitted = rows[telling] * permitted[telling]
    if int(telling.sum()) < 2 or bool((at_permitted != 0).any()):
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
        return f"{where}; there at {count} of {key_len} keys: NaN in the query or in a key?"
    if evidence.mask is not None:
        return f"{where}, at every key although the mask permits some"
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
    return f"{rows} only zeros although the mask permits keys: a mask of the opposite meaning?"


def other_axis(evidence: Evidence) -> str | None:
    """The weights sum to one along another axis than the keys."""
    shape = evidence.weights.shape
    last = len(shape) - 2
    for dim in range(last, -1, -1):
        if shape[dim] > 1 and _sums_to_one_along(evidence, dim):
            if dim == last:
                return "every column sums to 1: softmax over the query axis (dim=-2)?"
            name = {0: "batch", 1: "head"}[dim] if len(shape) == 4 else "leading"
            return f"the weights sum to 1 over the {name} axis: softmax over dim={dim}?"
    return None


def all_ones(evidence: Evidence) -> str | None:
    """Every weight is one."""
    rows = evidence.rows
    if rows is None or bool((rows != 1).any()):
        return None
    return "every weight is 1: softmax over an axis of size 1?"


def same_sum(evidence: Evidence) -> str | None:
    """All rows sum to the same constant."""
    rows = evidence.rows
    if rows is None or rows.shape[0] < 2 or evidence.finding.broken < evidence.finding.of:
        return None
    sums = rows.sum(-1)
    constant = float(sums.mean())
    spread = float((sums - constant).abs().max())
    if bool((rows < 0).any()) or not spread <= evidence.slack * constant or constant == 0:
        return None
    return f"every row sums to {constant:.6g}: scaled after the softmax?"


def masked_afterwards(evidence: Evidence) -> str | None:
    """Masked keys are zero, and their weight is missing from the row.

    Rows without a masked key bear witness: they still sum to one.
    """
    rows, permitted = evidence.rows, evidence.permitted
    if rows is None or permitted is None or bool((rows < 0).any()):
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
    if rows is None or torch.unique(rows).numel() < 8:
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


def dropout(rows: torch.Tensor, permitted: torch.Tensor | None) -> str | None:
    """Zeros strewn at random, and sums that vary around one as those zeros make them.

    Dropout with probability p keeps a weight as w / (1 - p). The variance of a row sum is then p
    times the sum of the squared kept weights: the zeros and the sums must tell of the same p.
    """
    if rows.shape[0] < 8 or bool((rows < 0).any()):
        return None
    looked_at = _before_the_last_weight(rows) if permitted is None else permitted
    share = float(((rows == 0) & looked_at).sum() / looked_at.sum().clamp(min=1))
    sums = rows.sum(-1)
    expected = share * float(rows.square().sum(-1).mean())
    if not 0.02 < share < 0.95 or expected == 0:
        return None
    observed = float((sums - 1).square().mean())
    centred = abs(float(sums.mean()) - 1) < 4 * math.sqrt(expected / rows.shape[0])
    if not (centred and 0.4 < observed / expected < 2.5):
        return None
    return (
        f"{share:.0%} of the weights are zero and rows sum to {float(sums.mean()):.2f} on "
        f"average: weights after dropout (p about {share:.2g})?"
    )


def _dropout(evidence: Evidence) -> str | None:
    return None if evidence.rows is None else dropout(evidence.rows, evidence.permitted)


def scores(evidence: Evidence) -> str | None:
    """Numbers that are no probabilities, in rows that sum to anything."""
    rows = evidence.rows
    if rows is None or not evidence.widespread:
        return None
    low, high = float(rows.min()), float(rows.max())
    if not (low < -evidence.slack or high > 1 + evidence.slack):
        return None
    return f"values run from {low:.3g} to {high:.3g}: scores (logits) that no softmax has seen?"


def mask_not_applied(evidence: Evidence) -> str | None:
    """Rows are uniform, over the masked keys too."""
    rows = evidence.rows
    if rows is None or bool(((rows * rows.shape[-1] - 1).abs() > evidence.slack).any()):
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
        not_a_number,
        infinite,
        other_axis,  # before dropout: a masked map, transposed, has zeros and sums around 1 too
        _dropout,  # before the next: it may zero a whole short row
        zero_rows,
        all_ones,
        same_sum,
        masked_afterwards,
        low_precision,
        scores,
    ),
    "negative": (),
    "masked": (opposite_mask, declared_otherwise),
    "leak": (opposite_mask, mask_not_applied),
}


def _sample(
    weights: Operand, mask: Operand | None
) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """Return some rows with a permitted key, evenly spaced, and their mask."""
    *lead, key_len = weights.shape
    if key_len > _SAMPLE:
        return None, None
    count = math.prod(lead)
    rows, masks = [], []
    for number in evenly(count, min(_SAMPLE_ROWS, max(1, _SAMPLE // key_len))):
        index = index_of(number, lead)
        permitted = None if mask is None else row_of(mask, index).expand(key_len)
        if permitted is None or bool(permitted.any()):
            rows.append(row_of(weights, index).double())
            masks += [] if permitted is None else [permitted]
    if not rows:
        return None, None
    return torch.stack(rows), torch.stack(masks) if masks else None


def _row(evidence: Evidence, index: tuple[int, ...]) -> Block:
    spans = tuple(slice(i, i + 1) for i in index)
    return Block(evidence.weights, evidence.mask, spans)


def _sums_to_one_along(evidence: Evidence, dim: int) -> bool:
    weights, worst = evidence.weights, evidence.finding.worst.index
    shape, queries = weights.shape, len(weights.shape) - 2
    size, key_len = shape[dim], shape[-1]
    if size > _SAMPLE:
        return False
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
    # A key that no query attends to, or a query that was fully masked, leaves a line of zeros.
    # Rows that are merely zero leave such lines as well, so they must not be all that is broken.
    empty = sums == 0
    if bool(empty.any()) and evidence.finding.zeros == evidence.finding.broken:
        return False
    full = sums[~empty]
    enough = full.numel() >= (2 if bool(empty.any()) else 1)
    good = (full - 1).abs() <= row_rounding(weights.dtype, size)
    return enough and bool((values >= 0).all()) and bool(good.all())


def _before_the_last_weight(rows: torch.Tensor) -> torch.Tensor:
    # Trailing zeros are more likely a causal or padding mask than dropout.
    after = (rows != 0).flip(-1).int().cumsum(-1).flip(-1)
    return after > 0
