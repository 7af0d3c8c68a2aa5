"""Every example in the README and the docs runs."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def blocks(page):
    """List a page's python blocks with the line at which each begins."""
    text = page.read_text(encoding="utf-8")
    matches = re.finditer(r"^```python\n(.*?)^```$", text, re.M | re.S)
    return [(text[: match.start()].count("\n") + 1, match[1]) for match in matches]


def is_conftest(block):
    return block.startswith("# conftest.py")


def holds_tests(block):
    return "def test_" in block


def plain_blocks(page):
    """List the blocks of a page that are scripts."""
    return [(n, text) for n, text in blocks(page) if not (is_conftest(text) or holds_tests(text))]


def name_of(page):
    return page.name


@pytest.mark.parametrize(
    "page", [p for p in PAGES if any(holds_tests(text) for _, text in blocks(p))], ids=name_of
)
def test_examples_that_hold_tests_pass(pytester, page):
    """All of a page at once, each a file, with all that the page puts into a conftest.py."""
    pytester.makeconftest("\n".join(text for _, text in blocks(page) if is_conftest(text)))
    files = {f"test_{line}": text for line, text in blocks(page) if holds_tests(text)}
    pytester.makepyfile(**files)
    # In a process of its own: torch imports more of itself when that is first used.
    if any("heatmap_" in text for text in files.values()):
        pytester.runpytest_subprocess("--attn-update=missing")
    result = pytester.runpytest_subprocess("-W", "error", "--strict-markers")
    outcomes = result.parseoutcomes()
    # An examination skips what an implementation does not claim.
    may_skip = any("parametrize_with_checks" in text for text in files.values())
    assert set(outcomes) - ({"skipped"} if may_skip else set()) == {"passed"}
    assert outcomes["passed"] >= len(files)
    for name in files:
        result.stdout.fnmatch_lines(f"*{name}.py*")


@pytest.mark.parametrize("page", [p for p in PAGES if plain_blocks(p)], ids=name_of)
def test_the_other_examples_of_a_page_run_one_after_the_other(page, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    names = {"__name__": "example"}
    for line, block in plain_blocks(page):
        exec(compile("\n" * line + block, str(page), "exec"), names)
    assert len(names) > 1
