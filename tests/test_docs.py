"""Every example in the README and the docs runs, and prints what is shown below it."""

import re

import pytest
from pages import PAGES, alike, blocks, run, shown_of, unexplained


def name_of(page):
    return page.name


def test_examples_that_hold_tests_pass(pytester):
    """Each page a folder, each block a file, and all that the page puts into a conftest.py."""
    files = {}
    for page in PAGES:
        found = blocks(page)
        conftest = "\n".join(b.text for b in found if b.is_conftest)
        if conftest:
            files[f"{page.stem}/conftest.py"] = conftest
        for block in found:
            if block.holds_tests:
                files[f"{page.stem}/test_{page.stem}_{block.line}.py"] = block.text
    for path, text in files.items():
        (pytester.path / path).parent.mkdir(exist_ok=True)
        (pytester.path / path).write_text(text, encoding="utf-8")
    # In a process of its own: torch imports more of itself when that is first used. The folders are
    # named, so that each conftest.py is read before tests are; no picture has a baseline yet.
    folders = sorted({path.partition("/")[0] for path in files})
    result = pytester.runpytest_subprocess(
        "-W", "error", "--strict-markers", "-rA", "--attn-update=missing", *folders
    )
    # An examination skips what an implementation does not claim.
    assert set(result.parseoutcomes()) == {"passed", "skipped"}
    for path in files:
        passed = [line for line in result.outlines if line.startswith("PASSED") and path in line]
        assert passed or path.endswith("conftest.py")


@pytest.mark.parametrize(
    "page", [page for page in PAGES if any(b.is_script for b in blocks(page))], ids=name_of
)
def test_the_other_examples_of_a_page_run_and_print_what_is_shown(page, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    for block, printed in run(page):
        if not alike(block.text, printed):
            raise AssertionError(
                f"{page.name}:{block.line} shows what is not printed any more; "
                f"`make docs` writes what is:\n{printed}"
            )


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_every_output_is_compared_or_says_why_not(page):
    assert unexplained(page) == []


MOST_OF_A_PARAGRAPH = 600


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_no_paragraph_item_or_cell_is_longer_than_a_reader_takes_in(page):
    text = re.sub(r"^```.*?^```$", "", page.read_text(encoding="utf-8"), flags=re.M | re.S)
    parts = re.split(r"\n\s*\n|\n(?=[-|#] ?)|\n(?=\d+\. )|(?<!\\)\|", text)
    long = [" ".join(part.split()) for part in parts]
    assert [part for part in long if len(part) > MOST_OF_A_PARAGRAPH] == []


PAGE = """\
```python
print("a 1.5e-07")
```

Prose.

```text
a 2.5e-07
```

<!-- not run: it is not ours -->
```text
anything
```

```console
make test
```

```text
passed
```

```python
def test_a(): ...
```

```text
1 passed
```
"""


@pytest.fixture
def page(tmp_path):
    path = tmp_path / "page.md"
    path.write_text(PAGE, encoding="utf-8")
    return path


def test_an_output_belongs_to_the_script_above_it(page):
    assert [(b.line, b.text, printed) for b, printed in run(page)] == [
        (7, "a 2.5e-07\n", "a 1.5e-07\n")
    ]


def test_an_output_that_nothing_prints_must_say_why(page):
    assert unexplained(page) == [20, 28]
    assert [b.reason for b in blocks(page) if b.reason] == ["it is not ours"]


@pytest.mark.parametrize(
    ("shown", "printed", "same"),
    [
        ("off by 3.9e-03", "off by 3.9e-03", True),
        ("off by 3.9e-03", "off by 3.9e-02", True),
        ("off by 3.9e-02", "off by 3.9e-03", True),
        ("off by 3.9e-03", "off by 4.0e-02", False),
        ("off by 3.9e-03", "off by 3.8e-04", False),
        ("3.3e+05 times", "1.2e+05 times", True),
        ("off by 3.9e-03", "off by 0.0039", False),
        ("0.39 and 1e-5", "0.38 and 1e-5", False),
        ("1e-5, 2e-5", "1e-5", False),
        ("layers.0 1e-5", "layers.1 1e-5", False),
    ],
)
def test_numbers_with_an_exponent_may_differ_tenfold_and_nothing_else(shown, printed, same):
    assert alike(shown, printed) is same


def test_an_ellipsis_stands_for_the_paragraphs_that_are_not_shown():
    printed = "a\nb\n\nc\n\nd\n"
    assert shown_of(printed, "x\n\ny\n\n...\n") == "a\nb\n\nc\n\n...\n"
    assert shown_of(printed, "x\n") == printed
