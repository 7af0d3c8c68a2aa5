"""Write what the docs list and show: tables from the registries, pictures, and what is printed.

    python docs/generate.py             # everything that is quick; `make docs`
    python docs/generate.py NAME ...    # these tables of measured figures, in some minutes each

A table of a registry stands between `<!-- generated: NAME -->` and `<!-- end -->`, a measured one
between `<!-- measured: NAME -->` and `<!-- end -->`.
"""

from __future__ import annotations

import ast
import inspect
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any

from pages import PAGES, ROOT, alike, run
from pages import public_names as grouped_names

Rows = Iterable[tuple[str, ...]]


def checks(registry: str) -> Rows:
    """The checks of one registry: name, what is true where it passes, issue, quick."""
    for check in getattr(import_module("pytest_attnheat.contract.checks"), registry):
        yield f"`{check.name}`", check.sentence, check.issue or "", "yes" if check.quick else ""


def defects(module: str, table: str) -> Rows:
    """The catalogue of defects: name, what attention with it does, issue."""
    for defect in getattr(import_module(f"pytest_attnheat.attention.{module}"), table):
        sentence = re.sub(r"\{constant.*?\}", "c", defect.sentence)
        yield f"`{defect.name}`", sentence, defect.issue or ""


def conventions() -> Rows:
    """The conventions of public callables: name, whose, parameters that tell, and what they say."""
    from pytest_attnheat.contract.conventions import conventions as known

    for one in known():
        told = ", ".join(f"`{name}`" for name in one.parameters)
        without = ", ".join(f"`{name}`" for name in one.lacks)
        said = dict(one.declares)
        corner = {"bottom_right": "bottom right", "top_left": "top left"}.get(
            said.get("causal"), ""
        )
        names = (
            "scale_argument",
            "window",
            "chunk",
            "softcap",
            "alibi",
            "sinks",
            "dropout",
            "bias",
        )
        given = [one[0] if isinstance(one, tuple) else one for one in map(said.get, names)]
        asked = ", ".join(f"`{name}`" for name in given if isinstance(name, str))
        lse = f"{', '.join(one.lse.shape)}; base {one.lse.base}" if one.lse else ""
        yield (f"`{one.name}`", one.about, told + f"; not {without}" * bool(without), corner, asked,
               lse, one.limits)  # fmt: skip


def hard_cases() -> Rows:
    """The hard cases: name, and what breaks on it."""
    from pytest_attnheat import FEATURE_CASES, HARD_CASES, hard_case

    for name in (*HARD_CASES, *FEATURE_CASES):
        yield f"`{name}`", hard_case(name).why


def scoring_functions() -> Rows:
    """The scoring functions that the package registers: name, class, first and second sentence."""
    from pytest_attnheat.attention.scoring import make_scoring, scoring_names

    for name in scoring_names():
        kind = type(make_scoring(name, 2))
        arguments = [p for p in inspect.signature(kind).parameters if p not in ("args", "kwargs")]
        source = re.search(r"Source: (.*?\d{4})", " ".join(inspect.getdoc(kind).split()))
        call = f"`{kind.__name__}({', '.join(arguments)})`"
        yield f"`{name}`", call, _first_paragraph(kind), source[1] if source else ""


def options() -> Rows:
    """The options and ini settings of the plugin: option, ini setting, help."""
    taken = _Parser()
    for module in _modules_of_plugin():
        if hasattr(module, "pytest_addoption"):
            module.pytest_addoption(taken)
    for name, (value, text) in taken.options.items():
        ini = name.lstrip("-").replace("-", "_")
        setting = f"`{ini}`" if taken.inis.pop(ini, None) is not None else ""
        yield f"`{name}{value}`", setting, text[:1].upper() + text[1:] + "."
    for name, text in taken.inis.items():  # those that no option sets
        yield "", f"`{name}`", text[:1].upper() + text[1:] + "."


def markers() -> Rows:
    """The markers: name with arguments, and what it says."""
    from pytest_attnheat.plugin.settings import MARKERS

    for marker in MARKERS:
        call, _, text = marker.partition("): ")
        yield f"`{call})`", text[:1].upper() + text[1:]


def hooks() -> Rows:
    """The hooks that a project can implement: name, and the first paragraph about it."""
    from pytest_attnheat.plugin import settings

    for name, value in vars(settings).items():
        if name.startswith("pytest_attnheat_"):
            yield f"`{name}(config)`", _first_paragraph(value)


def fixtures() -> Rows:
    """The fixtures of the plugin: name, and the first paragraph about it."""
    for module in _modules_of_plugin():
        for node in ast.parse(inspect.getsource(module)).body:
            if isinstance(node, ast.FunctionDef) and any(
                "pytest.fixture" in ast.unparse(decorator) for decorator in node.decorator_list
            ):
                yield f"`{node.name}`", _paragraph(ast.get_docstring(node))


def public_names() -> Iterator[str]:
    """The public names by what they are for: name, and the first paragraph about it."""
    import pytest_attnheat

    def rows(names: list[str]) -> Rows:
        for name in names:
            value = getattr(pytest_attnheat, name)
            if isinstance(value, tuple):
                about = f"A tuple of {len(value)} names, from `{value[0]}` to `{value[-1]}`."
            else:
                about = _first_paragraph(value)
            yield f"`{name}`", about

    for title, names in grouped_names().items():
        yield from ("", f"## {title}", "")
        yield from _table(("name", "what it is"), partial(rows, names))


def found_in_the_wild(verdict: str) -> Rows:
    """What `benchmarks/wild.py` found in released packages."""
    sys.path.insert(0, str(ROOT / "benchmarks"))
    yield from import_module("wild").tables(verdict)


def fields_of_failure() -> Rows:
    """What a failure knows: field, and what it holds."""
    from pytest_attnheat import Failure

    listed = (inspect.getdoc(Failure) or "").partition("Attributes:\n")[2].partition("\n\n")[0]
    for entry in re.split(r"\n(?=    \w)", listed):
        name, _, text = " ".join(entry.split()).partition(": ")
        yield f"`{name}`", text


def environments() -> Rows:
    """What ran where: session, Python, versions, system, day, how it ended, minutes."""
    text = (ROOT / "docs" / "environments.json").read_text(encoding="utf-8")
    for name, one in sorted(json.loads(text).items()):
        versions = ", ".join(f"{package} {number}" for package, number in one["versions"].items())
        only = f", of it `{one['only']}`" if one["only"] else ""
        yield (f"`{name}`{only}", one["python"], versions, one["system"], one["date"], one["ended"],
               f"{one['minutes']:g}")  # fmt: skip


def gallery() -> Iterator[str]:
    """The tests of pictures, each above its baselines; `py` tells them from examples to run."""
    tests = ROOT / "tests" / "test_pictures.py"
    source = tests.read_text(encoding="utf-8")
    lines, (docstring, *nodes) = source.splitlines(), ast.parse(source).body
    begin = docstring.end_lineno or 0
    first = True
    for node in nodes:
        if not (isinstance(node, ast.FunctionDef) and node.name.startswith("test_")):
            continue
        if first:
            start = min([node.lineno, *(part.lineno for part in node.decorator_list)]) - 1
            yield from ("```py", *_stripped(lines[begin:start]), "```")
            begin, first = start, False
        yield from ("", f"## {node.name[5:].replace('_', ' ').capitalize()}", "")
        yield from ("```py", *_stripped(lines[begin : node.end_lineno]), "```", "")
        begin = node.end_lineno or begin
        stem = re.compile(rf"{tests.stem}\.{node.name}(-(.+))?\.png")
        for path in sorted((ROOT / "baseline_images").iterdir()):
            if found := stem.fullmatch(path.name):
                yield f"![{found[2] or node.name[5:]}](../baseline_images/{path.name})"


def _stripped(lines: list[str]) -> list[str]:
    return "\n".join(lines).strip("\n").splitlines()


CHECK_HEAD = (
    "check",
    "an implementation that passes",
    "a public issue it would have caught",
    "quick",
)
DEFECT_HEAD = ("defect", "attention", "a public issue that reports it")
CONVENTION_HEAD = ("like=", "of", "told by its parameters", "causal from the", "keywords asked",
                   "log-sum-exp", "not asked")  # fmt: skip
ENVIRONMENT_HEAD = ("session", "Python", "versions", "system", "day", "ended", "minutes")
WRONG_HEAD = ("package, what of it", "what is documented, or done elsewhere in it", "what it does",
              "call", "off from that; from loops that do the same", "the examination says",
              "public issue of its kind", "on")  # fmt: skip
TABLES: dict[str, tuple[tuple[str, ...], Callable[[], Rows]]] = {
    "checks": (CHECK_HEAD, lambda: checks("CHECKS")),
    "checks of a block": (CHECK_HEAD, lambda: checks("BLOCK_CHECKS")),
    "checks of a trace": (CHECK_HEAD, lambda: checks("CAPTURED_CHECKS")),
    "conventions": (CONVENTION_HEAD, conventions),
    "defects": (DEFECT_HEAD, lambda: defects("defects", "DEFECTS")),
    "defects of a backward pass": (DEFECT_HEAD, lambda: defects("backward", "BACKWARD")),
    "environments": (ENVIRONMENT_HEAD, environments),
    "hard cases": (("case", "what breaks on it"), hard_cases),
    "scoring functions": (("name", "class", "what it is", "source"), scoring_functions),
    "options": (("option", "ini", "meaning"), options),
    "fixtures": (("fixture", "what it is"), fixtures),
    "fields of a failure": (("field", "what it holds"), fields_of_failure),
    "found wrong": (WRONG_HEAD, lambda: found_in_the_wild("wrong")),
    "found right": (
        ("package, what of it", "what was declared", "on"),
        lambda: found_in_the_wild("right"),
    ),
    "markers": (("marker", "what it says"), markers),
    "hooks": (("hook", "what it is for"), hooks),
}
# What is listed in another shape than that of one table.
SECTIONS = {"gallery": gallery, "public names": public_names}

# The command of each measured table, and which of the tables that it prints is meant.
MEASURED = {
    "defects": (("benchmarks/defect_matrix.py", "--table"), 0),
    "captures": (("benchmarks/capture_table.py",), 0),
    "zoo": (("benchmarks/capture_zoo.py", "--table"), 0),
    "not right in the zoo": (("benchmarks/capture_zoo.py", "--table"), 1),
    "judges": (("benchmarks/judges.py", "--table"), 0),
    "changed pictures": (("benchmarks/baseline_table.py",), 0),
    "versions of matplotlib": (("benchmarks/baseline_table.py",), 1),
}


def listed(text: str) -> str:
    """Return a page with its tables of registries as they are to be."""
    return re.sub(
        r"(<!-- generated: (.+?) -->\n).*?(<!-- end -->)",
        lambda found: found[1] + "\n".join(_written(found[2])) + "\n" + found[3],
        text,
        flags=re.S,
    )


def printed(page: Path) -> str:
    """Return a page with the output of its examples as it is to be."""
    text = page.read_text(encoding="utf-8")
    for block, output in reversed(list(run(page))):
        if not alike(block.text, output):
            text = text[: block.start] + output + text[block.start + len(block.text) :]
    return text


def measured(text: str, name: str) -> str:
    """Return a page with one measured table as it is to be."""
    marked = re.compile(rf"(<!-- measured: {name} -->\n).*?(<!-- end -->)", re.S)
    if not marked.search(text):
        return text
    command, number = MEASURED[name]
    output = subprocess.run(
        [sys.executable, *command], cwd=ROOT, capture_output=True, encoding="utf-8", check=True
    ).stdout
    table = re.findall(r"(?:^\|.*\n)+", output, re.M)[number]
    return marked.sub(lambda found: found[1] + table + found[2], text)


def _written(name: str) -> Iterable[str]:
    return SECTIONS[name]() if name in SECTIONS else _table(*TABLES[name])


def _table(head: tuple[str, ...], rows: Callable[[], Rows]) -> Iterator[str]:
    yield f"| {' | '.join(head)} |"
    yield "|" + "---|" * len(head)
    for row in rows():
        yield f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in row)} |"


class _Parser:
    """Stands in for pytest's parser: keeps what is added to it."""

    def __init__(self) -> None:
        self.options: dict[str, tuple[str, str]] = {}
        self.inis: dict[str, str] = {}

    def getgroup(self, *_: str) -> _Parser:
        return self

    def addoption(self, name: str, **given: Any) -> None:
        value = given.get("metavar") or "|".join(given.get("choices", ()))
        self.options[name] = (f"={value}" if value else "", given["help"])

    def addini(self, name: str, text: str, **_: Any) -> None:
        self.inis[name] = text


def _modules_of_plugin() -> list[Any]:
    plugin = import_module("pytest_attnheat.plugin")
    names = sorted(path.stem for path in Path(plugin.__file__ or "").parent.glob("*.py"))
    return [plugin, *(import_module(f"{plugin.__name__}.{n}") for n in names if n[0] != "_")]


def _first_paragraph(thing: object) -> str:
    return _paragraph(inspect.getdoc(thing))


def _paragraph(text: str | None) -> str:
    return " ".join((text or "").split("\n\n")[0].split())


def main() -> None:
    """Write the pages that are stale, and say which."""
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        for page in PAGES:
            before = page.read_text(encoding="utf-8")
            text = before
            for name in sys.argv[1:]:
                text = measured(text, name)
            if len(sys.argv) == 1:
                text = listed(printed(page))
            if text != before:
                page.write_text(text, encoding="utf-8", newline="\n")
                print(f"{page.relative_to(ROOT)}: written")
        os.chdir(ROOT)


if __name__ == "__main__":
    main()
