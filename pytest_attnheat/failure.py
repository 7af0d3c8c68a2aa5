"""`Failure`: what an assertion of this package raises, as fields, and how they are said.

It says, in this order: what was claimed, and how many break it, of how many; in which layer or
cases; the worst place, with its value and the limit; the first; the likely cause, where the
numbers show one; what was checked; how to see it again; and a small picture in text.
"""

from __future__ import annotations

import copyreg
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import KW_ONLY, dataclass
from html import escape
from itertools import chain, repeat
from typing import TYPE_CHECKING, Any

from .inputs import dtype_name

if TYPE_CHECKING:
    import torch

    from .heatmaps.figure import HeatmapFigure

# Of a number in a sentence, significant digits; 17 tell any two float64 apart.
_LEAST_DIGITS, _MOST_DIGITS = 6, 17


@dataclass(frozen=True)
class Place:
    """One place that breaks a claim.

    Attributes:
        text: What is said of it: "weights[0, 1, 3, :] sums to 1.71985 (off by 7.2e-01; allowed
            1.0e-05)".
        index: Its index, as far as one number or row can be pointed at; else None.
        value: What was found there; None where that is no number.
        tensor: What it is a place in, "output" or "query.grad", where several were compared.
    """

    text: str
    index: tuple[int, ...] | None = None
    value: float | None = None
    tensor: str | None = None

    def __str__(self) -> str:
        """Say it."""
        return self.text


@dataclass(frozen=True)
class Checked:
    """What was checked: printed as "float32 (1, 2, 5, 5) on cpu"."""

    dtype: str
    shape: tuple[int, ...]
    device: str
    note: str = ""

    @classmethod
    def of(cls, tensor: torch.Tensor) -> Checked:
        """Describe a tensor, or what is read as one."""
        note = getattr(tensor, "note", "")  # which rows were drawn, of weights that are never held
        return cls(dtype_name(tensor), tuple(tensor.shape), str(tensor.device), note)

    def __str__(self) -> str:
        """Say it."""
        return f"{self.dtype} {self.shape} on {self.device}{self.note}"


@dataclass(eq=False, repr=False)
class Failure(AssertionError):  # noqa: N818 (it is what users read: a failure)
    """A property that does not hold. Its text is made of its fields, whenever it is asked for.

    Where more is known on its way up, set a field and raise it again. It can be copied and
    pickled, without `draw` and `again`.

    Attributes:
        assertion: The name of the assertion; empty where something else says what was asked.
        claim: What broken places do: "rows do not sum to 1"; or what does not hold, in a sentence.
        broken: How many places break it; None where nothing was counted.
        of: Of how many that were judged.
        worst: The worst place; None where the claim says it all.
        first: The first place; None where it is the worst, or says nothing more.
        cause: A likely cause; None where the numbers show none.
        assumed: What was claimed on the caller's behalf; None where the caller said it all.
        tensor: What was checked; None where that is no single tensor.
        tolerance: The largest deviation that was accepted; None where none was, or no number says.
        repeat: What it takes to see the same again, for instance "seed=0"; or None.
        picture: A few lines of text that show the place; or none.
        layer: The layer of a captured model, and the call of it; or None.
        cases: Of several calls, how many are wrong, what they share, and the smallest; or None.
        draw: Draws the place in full; None where there is nothing to draw. Under pytest, the
            plugin asks it, and leaves the picture beside the report.
        drawn: What that picture shows.
        again: Makes the call that failed once more, so that what happens inside can be captured;
            None where no single call did.
    """

    assertion: str
    claim: str
    _: KW_ONLY
    broken: int | None = None
    of: int | None = None
    worst: Place | None = None
    first: Place | None = None
    cause: str | None = None
    assumed: str | None = None
    tensor: Checked | None = None
    tolerance: float | None = None
    repeat: str | None = None
    picture: str = ""
    layer: str | None = None
    cases: str | None = None
    draw: Callable[[], HeatmapFigure] | None = None
    drawn: str = "heatmap of the broken rows"
    again: Callable[[], object] | None = None

    def __post_init__(self) -> None:
        """Be an exception about the claim."""
        super().__init__(self.claim)

    def __reduce__(self) -> tuple[Any, ...]:
        """Keep the fields, whatever a subclass asks for, but for functions: they hold tensors."""
        kept = {**self.__dict__, "draw": None, "again": None}
        return copyreg.__newobj__, (type(self), *self.args), kept  # type: ignore[attr-defined]

    @property
    def headline(self) -> str:
        """The first line: the assertion, what does not hold, and how often."""
        counted = "" if self.broken is None else f"{self.broken} of {self.of} "
        return f"{self.assertion and f'{self.assertion}: '}{counted}{self.claim}"

    def __str__(self) -> str:
        """Say all of it, in several lines."""
        entries = {
            "layer": self.layer, "cases": self.cases, "worst": self.worst, "first": self.first,
            "cause": self.cause, "claim": self.assumed, "tensor": self.tensor,
            "repeat": self.repeat,
        }  # fmt: skip
        lines = [self.headline]
        for name, said in entries.items():
            if said is not None:
                first, *others = str(said).split("\n")
                lines += [f"  {name:<9}{first}", *(f"{'':<11}{line}" for line in others)]
        lines += [f"  {line}".rstrip() for line in self.picture.splitlines()]
        return "\n".join(lines)


# Where it is public, and hence how pytest prints it.
Failure.__module__ = "pytest_attnheat"


def html_table(rows: Iterable[Sequence[str]], *, above: str = "", below: str = "") -> str:
    """Return rows of texts as a table of a notebook; the first row is its heads."""
    kinds = chain(["th"], repeat("td"))
    lines = (
        "".join(f"<{kind}>{escape(cell)}</{kind}>" for cell in row)
        for row, kind in zip(rows, kinds, strict=False)
    )
    texts = [f"<pre>{escape(text)}</pre>" if text else "" for text in (above, below)]
    return f"{texts[0]}<table>{''.join(f'<tr>{line}</tr>' for line in lines)}</table>{texts[1]}"


def number_text(value: float, *, beside: float | None = None, least: int = _LEAST_DIGITS) -> str:
    """Return a number with as many digits as it takes, to see a difference `beside` it if given."""
    if beside is None or not (math.isfinite(value) and math.isfinite(beside)) or beside == 0:
        return f"{value:.{least}g}"
    largest = max(abs(value), abs(beside))
    digits = 2 + exponent(largest) - exponent(beside)
    return f"{value:.{min(max(digits, least), _MOST_DIGITS)}g}"


def exponent(number: float) -> int:
    """Return the power of ten of the first digit of a number that is not 0."""
    return math.floor(math.log10(abs(number)))
