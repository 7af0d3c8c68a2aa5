"""What a likely cause of weight in the wrong places may look at."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace

import torch

from pytest_attnheat.assertions.places import PlaceFinding
from pytest_attnheat.assertions.scan import mask_at
from pytest_attnheat.inputs import Operand

# The most weights and rows that a sample holds.
SAMPLE = 2**17
_SAMPLE_ROWS = 256
# Weights may underflow: this much of what another mask permits must hold weight.
NEARLY_ALL = 0.98
# The heads that a sentence names.
_HEADS_NAMED = 4


@dataclass(frozen=True)
class Evidence:
    """What a cause may look at.

    Attributes:
        weights: The weights, ``(..., queries, keys)``.
        mask: The mask that was claimed, with as many dimensions.
        finding: What the thorough reading found.
        queries: Some queries of the map with the worst place, ``(n,)``, evenly spaced.
        rows: Their weights, ``(n, keys)`` in float64.
        permitted: Their mask, ``(n, keys)``.
    """

    weights: Operand
    mask: Operand
    finding: PlaceFinding
    queries: torch.Tensor
    rows: torch.Tensor
    permitted: torch.Tensor

    @classmethod
    def of(cls, weights: Operand, mask: Operand, finding: PlaceFinding) -> Evidence:
        """Take a bounded sample of the map with the worst place."""
        *place, worst, _ = finding.worst
        query_len, key_len = weights.shape[-2:]
        count = min(query_len, _SAMPLE_ROWS, max(1, SAMPLE // key_len))
        queries = {i * query_len // count for i in range(count)} | {worst}
        spans = [
            (*(slice(i, i + 1) for i in (*place, query)), slice(0, key_len))
            for query in sorted(queries)
        ]
        rows = [weights[span].double().cpu().flatten() for span in spans]
        masks = [mask_at(mask, span).cpu().flatten().expand(key_len) for span in spans]
        numbers = torch.tensor(sorted(queries), device="cpu")
        return cls(weights, mask, finding, numbers, torch.stack(rows), torch.stack(masks))

    @property
    def worst_row(self) -> torch.Tensor:
        """The row with the worst place."""
        return self.rows[self.queries == self.finding.worst[-2]][0]

    def telling(self) -> Evidence:
        """Leave out rows with NaN and rows of zeros, which say nothing about a mask."""
        telling = self.rows.isfinite().all(-1) & (self.rows != 0).any(-1)
        rows, permitted = self.rows[telling], self.permitted[telling]
        return replace(self, queries=self.queries[telling], rows=rows, permitted=permitted)

    def explained_by(self, other: torch.Tensor) -> bool:
        """Tell whether the weights are those of another mask, ``(n, keys)``."""
        extra, common = other & ~self.permitted, other & self.permitted
        if int(extra.sum()) < 2 or bool((self.rows[~other] != 0).any()):
            return False
        places = (extra, common) if bool(common.any()) else (extra,)
        return all(share(self.rows[some] > 0) >= NEARLY_ALL for some in places)

    def lacks_exactly(self, missing: torch.Tensor) -> bool:
        """Tell whether these permitted places, and hardly any others, hold no weight."""
        missing = missing & self.permitted
        kept = self.permitted & ~missing
        if int(missing.sum()) < 2 or bool((self.rows[missing] != 0).any()):
            return False
        return bool(kept.any()) and share(self.rows[kept] > 0) >= NEARLY_ALL


def named(evidence: Evidence, causes: Iterable[str | None]) -> str | None:
    """Return the first cause, and to which maps alone it applies."""
    sentence = next((cause for cause in causes if cause is not None), None)
    where = _only_in(evidence.finding.maps)
    # In a batch of one, an index says as much.
    if sentence is None and evidence.weights.shape[0] == 1:
        return None
    return "; ".join(part for part in (sentence, where) if part) or None


def _only_in(maps: torch.Tensor) -> str | None:
    """Name the broken heads where whole heads are broken in every batch entry."""
    if maps.ndim != 2 or bool(maps.all()):
        return None
    heads = maps.any(0)
    if bool(heads.all()) or not torch.equal(maps, heads.expand_as(maps)):
        return None
    named = heads.nonzero().flatten().tolist()
    if len(named) > _HEADS_NAMED:
        return f"only in {len(named)} of {heads.numel()} heads"
    return f"only in head{'s' if len(named) > 1 else ''} {', '.join(map(str, named))}"


def share(of: torch.Tensor) -> float:
    """Return the share of True, 0 of nothing."""
    return float(of.double().mean()) if of.numel() else 0.0
