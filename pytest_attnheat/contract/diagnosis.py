"""What a diagnosis says: its sentence, its message and its picture."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..failure import html_table
from ..heatmaps.terminal import format_heatmap

if TYPE_CHECKING:
    from ..heatmaps.figure import HeatmapFigure

# Maps in a message.
_MOST_ROWS, _MOST_KEYS = 8, 16
_LINES_OF_REPR = 2
# Where all weights are smaller, the largest of them is drawn full.
_FAINT = 0.5
# An explanation that leaves more than this of the error is not worth naming.
EXPLAINS = 0.2
# Numbers are named in at most so many ranges.
_RANGES = 4
# Of what `as_dict` returns: a key that is left out, or means another thing, makes another version.
VERSION = 1


@dataclass(frozen=True, eq=False)
class Diagnosis:
    """What an implementation computes.

    Attributes:
        subject: Its name.
        dtype: The dtype in which it was diagnosed, or in all of which it is correct.
        healthy: Whether correct attention reproduces every answer, and any weights that are
            returned are those of it.
        defects: The names of the defects that together reproduce every answer; none if it is
            healthy or if no known defect does. Of weights that are returned beside an output
            that is right: `returned_...`.
        alternatives: Other defects that reproduce them as well, or nearly: these cases cannot
            tell them apart.
        residual: The worst relative rms over the cases: of the defects named, or of correct
            attention where none are.
        next_best: That of the best explanation that is excluded; inf if there is none.
        next_best_defects: Its defects.
        constant: The constant that was fitted, if one of the defects has one.
        sentence: What it computes.
        where: Which "cases", "heads", "batch" entries, "queries" ... are wrong, and which are not.
        shows: What else the numbers show where nothing reproduces the answers, a sentence each.
        excluded: The known defects that were compared and do not reproduce the answers.
        unseen: The known defects that would change nothing in these cases.
        refused: Why cases were not answered, by name.
        notes: What was noticed besides, and is not a defect.
        compared: How many plans were compared.
        expected_weights: (batch, heads, query_len, key_len) of correct attention on the case that
            `case` names, float64.
        inferred_weights: What the subject uses as weights there, found by values that are an
            identity matrix; None where it cannot be asked.
        case: The case that is shown.
        place: The worst map in it: (batch, head).
    """

    subject: str
    dtype: str
    healthy: bool
    defects: tuple[str, ...] = ()
    alternatives: tuple[tuple[str, ...], ...] = ()
    residual: float = 0.0
    next_best: float = math.inf
    next_best_defects: tuple[str, ...] = ()
    constant: float | None = None
    sentence: str = ""
    where: dict[str, str] = field(default_factory=dict)
    shows: tuple[str, ...] = ()
    excluded: tuple[str, ...] = ()
    unseen: tuple[str, ...] = ()
    refused: dict[str, str] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    compared: int = 0
    expected_weights: Tensor | None = None
    inferred_weights: Tensor | None = None
    case: str = ""
    place: tuple[int, int] = (0, 0)

    def __str__(self) -> str:
        """The message: the sentence, where, what else it might be, and the weights as text."""
        lines, entries = [f"diagnose: {self.sentence}"], self._entries()
        width = max(map(len, entries), default=0) + 2
        lines += [f"  {name:<{width}}{text}" for name, text in entries.items()]
        lines += [f"  {line}".rstrip() for line in self._triptych()]
        return "\n".join(lines)

    def _repr_html_(self) -> str:
        rows = [("", self.sentence), *self._entries().items()]
        return html_table(rows, below="\n".join(self._triptych()))

    def _entries(self) -> dict[str, str]:
        entries = {
            "shows": "; ".join(self.shows),
            **self.where,
            "or": "; ".join(" and ".join(names) for names in self.alternatives),
            "next best": self._next_best(),
            "note": "; ".join(self.notes),
            "refused": "; ".join(f"{name} ({why})" for name, why in self.refused.items()),
            "compared": self._compared(),
        }
        return {name: text for name, text in entries.items() if text}

    def __repr__(self) -> str:
        """The first lines of the message: the sentence, and where."""
        return "\n".join(str(self).splitlines()[:_LINES_OF_REPR])

    def as_dict(self) -> dict[str, Any]:
        """Return what it says as plain data, as JSON can hold it.

        Returns:
            `"version"` (1), and each attribute above but for the weights, under its name. Tuples
            are lists; a number that is not finite, such as a `next_best` that there is none of,
            is None.
        """
        said = (one.name for one in fields(self) if not one.name.endswith("_weights"))
        return {"version": VERSION, **{name: plain_data(getattr(self, name)) for name in said}}

    def draw(self) -> HeatmapFigure:
        """Draw the weights: what is expected, what was inferred, and the difference.

        Returns:
            A figure of `show_heatmaps`; the expected weights alone where none were inferred.

        Raises:
            ValueError: There are no weights, as for a subject whose output is right.
        """
        from ..heatmaps.showing import show_heatmaps

        maps = self._maps()
        if not maps:
            reason = "it is healthy" if self.healthy else "its output is right"
            raise ValueError(f"{self.subject}: there are no weights to draw; {reason}")
        # On the scale of weights, what differs where there are many keys would be blank.
        largest = _scale([maps.get("difference", maps["expected"])])
        upto = "" if largest == 1.0 else f", drawn up to {largest:.2g}"
        return show_heatmaps(
            torch.stack(list(maps.values())).unsqueeze(0), xlabel="Keys", ylabel="Queries",
            titles=list(maps),
            title=f"{self.subject}: {self.case}, batch {self.place[0]}, head {self.place[1]}{upto}",
            figsize=None, cmap="RdBu_r", vmin=-largest, vmax=largest,
        )  # fmt: skip

    def _next_best(self) -> str:
        if self.healthy or not self.next_best_defects or math.isinf(self.next_best):
            return ""
        if not self.defects and self.next_best > EXPLAINS * self.residual:
            return ""
        return f"{' and '.join(self.next_best_defects)}, residual {residual_text(self.next_best)}"

    def _compared(self) -> str:
        if not self.compared:
            return ""
        text = f"{self.compared} wrong versions of attention"
        if self.unseen:
            text += f"; {len(self.unseen)} defects change nothing in the cases that were answered"
        return text

    def _maps(self) -> dict[str, Tensor]:
        if self.expected_weights is None:
            return {}
        maps = {"expected": self.expected_weights[self.place]}
        if self.inferred_weights is not None:
            maps["inferred"] = self.inferred_weights[self.place]
            maps["difference"] = maps["inferred"] - maps["expected"]
        return maps

    def _triptych(self) -> list[str]:
        maps = {} if self.healthy else self._maps()
        if not maps:
            return []
        rows, keys = self._part(maps)
        largest = _scale([weights[rows, keys] for weights in maps.values()])
        blocks = []
        for name, weights in maps.items():
            differs = name == "difference"
            text = format_heatmap(
                (weights.abs() if differs else weights)[rows, keys],
                title=f"|{name}|" if differs else name,
                # The sums of whole rows, of which only a part may be shown.
                notes=["" if differs else f"{row.sum():.3f}" for row in weights[rows]],
                first_row=rows.start,
                first_column=keys.start,
                vmax=largest,
            )
            blocks.append(text.splitlines())
        heading = f"{self.case}, head {list(self.place)}: weights as inferred from the output"
        if largest < 1.0:
            heading += f", drawn up to {largest:.2g}"
        return [heading, *_side_by_side(blocks)]

    def _part(self, maps: dict[str, Tensor]) -> tuple[slice, slice]:
        """The rows and keys that the message has room for: around the largest difference."""
        query_len, key_len = maps["expected"].shape
        row = key = 0
        if "difference" in maps:
            # NaN is as wrong as a weight can be.
            off = torch.nan_to_num(maps["difference"].abs(), nan=math.inf)
            row, key = divmod(int(off.argmax()), key_len)
        return _around(row, query_len, _MOST_ROWS), _around(key, key_len, _MOST_KEYS)


def _scale(maps: Sequence[Tensor]) -> float:
    """What is drawn as the highest block: 1, or less where nothing would be seen."""
    largest = max(float(torch.nan_to_num(part.abs()).max()) for part in maps)
    return largest if 0.0 < largest < _FAINT else 1.0


def _around(place: int, length: int, most: int) -> slice:
    start = max(0, min(place - most // 2, length - most))
    return slice(start, min(start + most, length))


def _side_by_side(blocks: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(map(len, block)) for block in blocks]
    rows = zip(*blocks, strict=True)
    return [
        "   ".join(f"{text:<{width}}" for text, width in zip(row, widths, strict=True)).rstrip()
        for row in rows
    ]


def residual_text(number: float) -> str:
    """Return a residual as text: two digits."""
    return f"{number:.1e}" if number < 0.01 else f"{number:.2g}"


def number_list(noun: str, numbers: Sequence[int]) -> str:
    """Name numbers in a few ranges, as in "keys 0..4, 7", or by their count."""
    breaks = [i for i in range(1, len(numbers)) if numbers[i] != numbers[i - 1] + 1]
    runs = [numbers[first:stop] for first, stop in pairwise([0, *breaks, len(numbers)])]
    several = f"{noun[:-1]}ies" if noun.endswith("y") and noun != "key" else f"{noun}s"
    if not numbers or len(runs) > _RANGES:
        edges = f" ({numbers[0]} to {numbers[-1]})" if numbers else ""
        return f"{len(numbers) or 'no'} {several}{edges}"
    texts = [f"{run[0]}..{run[-1]}" if len(run) > 2 else ", ".join(map(str, run)) for run in runs]
    return f"{noun if len(numbers) == 1 else several} {', '.join(texts)}"


def plain_data(value: Any) -> Any:
    """Return a value as JSON can hold it: tuples as lists, None for a number that is not finite."""
    if isinstance(value, dict):
        return {name: plain_data(one) for name, one in value.items()}
    if isinstance(value, tuple | list):
        return [plain_data(one) for one in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
