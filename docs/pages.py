"""The examples of the README and the docs: which there are, what they print, what is shown of it.

A `text` block after a `python` block is what that block prints. It may end in a line `...`: then it
shows the first paragraphs alone. Any other `text` block stands under a line

    <!-- not run: the reason -->

One rule says which printed numbers may differ from machine to machine: a number that is written
with an exponent (5.8e-07) may be up to ten times as large or as small. All else is compared as it
stands.
"""

from __future__ import annotations

import ast
import contextlib
import io
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]

# The public names by what they are for: the title of a page of the reference, and the rooms whose
# names it has. A name belongs to the longest room that its own begins with.
NAMES = {
    "Scoring and attention": ("attention",),
    "Assertions on weights": ("assertions",),
    "Assertions on code": ("assertions.behaviour", "assertions.precision", "attention.hard_cases"),
    "Examination": ("contract", "plugin"),
    "Grading": ("contract.grading",),
    "Capture": ("capture",),
    "Pictures and baselines": ("heatmaps", "baselines"),
    "Failures": ("failure",),
}

_FENCED = re.compile(r"(?:^<!-- not run: (.+) -->\n)?^```(\w+)\n(.*?)^```$", re.M | re.S)
_WITH_EXPONENT = re.compile(r"\d+(?:\.\d+)?e[+-]\d+")


@dataclass(frozen=True)
class Block:
    """One fenced block of a page.

    Attributes:
        language: What stands behind the fence.
        text: What is inside.
        line: The line of its first fence, from 1.
        start: Where its text begins in the page.
        reason: Why it is not run, if it says so.
    """

    language: str
    text: str
    line: int
    start: int
    reason: str | None

    @property
    def is_conftest(self) -> bool:
        """Whether it goes into a conftest.py."""
        return self.text.startswith("# conftest.py")

    @property
    def holds_tests(self) -> bool:
        """Whether it is run by pytest."""
        return self.language == "python" and "def test_" in self.text

    @property
    def is_script(self) -> bool:
        """Whether it is run by itself, after the scripts above it."""
        return self.language == "python" and not (self.is_conftest or self.holds_tests)


def public_names() -> dict[str, list[str]]:
    """List the public names below the titles of `NAMES`, in alphabetical order."""
    found: dict[str, list[str]] = {title: [] for title in NAMES}
    stub = (ROOT / "pytest_attnheat" / "__init__.pyi").read_text(encoding="utf-8")
    for line in ast.parse(stub).body:
        if isinstance(line, ast.ImportFrom):
            titles = [
                (len(room), title)
                for title, rooms in NAMES.items()
                for room in rooms
                if f"{line.module}.".startswith(f"{room}.")
            ]
            if not titles:
                raise ValueError(f"NAMES in docs/pages.py has no title for {line.module}")
            found[max(titles)[1]] += [alias.name for alias in line.names]
    return {title: sorted(names) for title, names in found.items()}


def blocks(page: Path) -> list[Block]:
    """List the fenced blocks of a page."""
    text = page.read_text(encoding="utf-8")
    return [
        Block(m[2], m[3], text.count("\n", 0, m.start(2)) + 1, m.start(3), m[1])
        for m in _FENCED.finditer(text)
    ]


def run(page: Path) -> Iterator[tuple[Block, str]]:
    """Run the scripts of a page, one after the other; yield each output block and what it shows."""
    names: dict[str, Any] = {"__name__": "example"}
    found = blocks(page)
    for block, following in zip(found, [*found[1:], None], strict=False):
        if not block.is_script:
            continue
        code = compile("\n" * block.line + block.text, str(page), "exec")
        with contextlib.redirect_stdout(io.StringIO()) as printed:
            exec(code, names)
        if following is not None and following.language == "text" and following.reason is None:
            yield following, shown_of(printed.getvalue(), following.text)


def unexplained(page: Path) -> list[int]:
    """List the lines of text blocks that are neither printed by a script nor say why not."""
    found = blocks(page)
    return [
        block.line
        for before, block in zip([None, *found], found, strict=False)
        if block.language == "text"
        and block.reason is None
        and not (before is not None and before.is_script)
    ]


def shown_of(printed: str, shown: str) -> str:
    """Cut what is printed to as many paragraphs as are shown, where those end in `...`."""
    if not shown.endswith("\n...\n"):
        return printed
    count = len(shown.removesuffix("\n...\n").strip().split("\n\n"))
    return "\n\n".join(printed.split("\n\n")[:count]) + "\n\n...\n"


def alike(shown: str, printed: str) -> bool:
    """Whether two texts are the same, but for numbers with an exponent."""
    if _WITH_EXPONENT.sub("#", shown) != _WITH_EXPONENT.sub("#", printed):
        return False
    numbers = zip(_WITH_EXPONENT.findall(shown), _WITH_EXPONENT.findall(printed), strict=True)
    return all(float(a) <= 10 * float(b) and float(b) <= 10 * float(a) for a, b in numbers)
