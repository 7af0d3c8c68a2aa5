"""Every example in the README and the docs runs."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def blocks(page):
    """List a page's python blocks with the line at which each begins."""
    text = page.read_text()
    matches = re.finditer(r"^```python\n(.*?)^```$", text, re.M | re.S)
    return [(text[: match.start()].count("\n") + 1, match[1]) for match in matches]


def files_of_tests():
    """List the blocks that hold tests; one that begins with `# conftest.py` joins the next."""
    found = []
    for page in PAGES:
        conftest = ""
        for line, block in blocks(page):
            if block.startswith("# conftest.py"):
                conftest = block
            elif "def test_" in block:
                found.append(pytest.param(conftest, block, id=f"{page.name}:{line}"))
                conftest = ""
    return found


@pytest.mark.parametrize(("conftest", "block"), files_of_tests())
def test_an_example_that_holds_tests_passes(pytester, conftest, block):
    pytester.makeconftest(conftest)
    pytester.makepyfile(block)
    if "heatmap_compare" in block:
        pytester.runpytest_subprocess("--mpl-generate-path=baseline_images")
    outcomes = pytester.runpytest_subprocess("-W", "error").parseoutcomes()
    assert outcomes.pop("passed", 0) > 0
    assert not outcomes


def plain_blocks(page):
    """List the blocks of a page that are not test files."""
    return [
        (line, block)
        for line, block in blocks(page)
        if "def test_" not in block and not block.startswith("# conftest.py")
    ]


@pytest.mark.parametrize("page", [*filter(plain_blocks, PAGES)], ids=lambda page: page.name)
def test_the_other_examples_of_a_page_run_one_after_the_other(page, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    names = {"__name__": "example"}
    for line, block in plain_blocks(page):
        exec(compile("\n" * line + block, str(page), "exec"), names)
    assert len(names) > 1
