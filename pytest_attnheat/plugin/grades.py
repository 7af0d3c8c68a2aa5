"""What is said of the grade of a project's tests: in the terminal, in HTML, as data."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ..contract.grading import Grade

# So many lines of a list, and letters of a line, are shown without -v.
_MOST_LINES, _LONGEST = 12, 240
# What a worker found of a target, as plain data.
Found = dict[str, Any]


@dataclass
class Graded:
    """What is said of a target in the end."""

    target: str  # How it was named
    grade: Grade | None = None  # Its grade, None where there is an error
    error: str = ""  # Why nothing was graded
    notes: list[tuple[str, str]] = field(default_factory=list)  # What was done, by title
    found: Found = field(default_factory=dict)  # What workers found, as plain data

    def fails(self, least: float) -> str:
        """Say why a run fails by it; empty if it does not."""
        if self.grade is None or self.grade.refused:
            return "there is no grade"
        if least and self.grade.unplanted:
            return f"{', '.join(self.grade.unplanted)} could not be planted"
        score = self.grade.score
        if least and (score is None or score < least):
            known = "no defect was active" if score is None else f"{score:.3f}"
            return f"{known}; --attn-grade-min is {least:g}"
        return ""

    def lines(self, least: float, *, whole: bool) -> Iterator[str]:
        """Yield what is told of it."""
        if self.grade is None:
            yield f"{self.target}: no grade, {self.error}"
        else:
            text = f"{self.target}: {str(self.grade).partition(': ')[2]}"
            yield from text.split("\n") if whole else _short(text)
        yield from (f"  {title:<10} {text}" for title, text in self.notes)
        if why := self.fails(least):
            yield f"  FAILED     {why}"

    def as_data(self) -> Found:
        """Return all of it, for `--attn-json`."""
        grade = {} if self.grade is None else self.grade.as_dict()
        names = ("tests", "left_out", "where", "kept", "unjudged")
        told = {name: self.found.get(name, []) for name in names}
        return {"target": self.target, "error": self.error, **grade, **told}


def notes_of(every: Sequence[Found]) -> Iterator[tuple[str, str]]:
    """Yield what was done and what was not, by title, of what each worker found of a target."""
    found = every[0]
    tests = found.get("tests", [])
    if found["where"]:
        yield "replaced", f"in {', '.join(found['where'])}"
    for one in found["kept"]:
        yield "WARNING", f"not replaced in {one}: what is called there is the right one"
    if tests:
        yield "tests", f"{len(tests)} call it and pass; {found['others']} do not call it"
    killers = {_test_of(one, tests) for share in every for one in share["verdicts"]}
    if idle := [name for name in tests if name not in killers]:
        listed = ", ".join(idle[:_MOST_LINES]) + f" and {len(idle) - _MOST_LINES} more" * (
            len(idle) > _MOST_LINES
        )
        yield "idle", f"these killed nothing that a test before them had not killed: {listed}"
    unjudged = [one for share in every for one in share["unjudged"]]
    for title, some in (("left out", found["left_out"]), ("not judged", unjudged)):
        for name, why in some[:_MOST_LINES]:
            yield title, f"{name}: {why}"
        if len(some) > _MOST_LINES:
            yield title, f"... and {len(some) - _MOST_LINES} more"
    if len({json.dumps(one.get("tests")) for one in every}) > 1:
        yield "WARNING", "workers do not agree on which tests call it and pass"


def _test_of(verdict: Found, tests: Sequence[str]) -> str:
    """The test that killed a version, "" if none did."""
    fits = [name for name in tests if verdict["said"].startswith(f"{name}: ")]
    return max(fits, key=len, default="")


def _short(text: str) -> Iterator[str]:
    """Yield the lines of a text; of long lists and long lines the beginning."""
    for block in text.split("\n\n"):
        lines = block.split("\n")
        most = len(lines) if "import " in block else _MOST_LINES
        for line in lines[:most]:
            cut = line[:_LONGEST].rpartition(", ")[0]
            yield line if len(line) <= _LONGEST or not cut else f"{cut} ... all of it with -v"
        if len(lines) > most:
            yield f"  ... and {len(lines) - most} more, all of them with -v"
        yield ""
