"""What the docs list is what the registries hold."""

import re
from dataclasses import replace

import pytest
from generate import MEASURED, SECTIONS, TABLES, listed, measured
from pages import PAGES, ROOT, public_names
from wrong_attention import PLANTED

import pytest_attnheat
from pytest_attnheat.contract import checks

TEXTS = {page.relative_to(ROOT).as_posix(): page.read_text(encoding="utf-8") for page in PAGES}


@pytest.mark.parametrize("page", [name for name in TEXTS if "<!-- generated:" in TEXTS[name]])
def test_tables_are_those_of_the_registries(page):
    if TEXTS[page] != listed(TEXTS[page]):
        raise AssertionError(f"{page} is stale: `make docs` writes it anew")


@pytest.mark.parametrize("name", [*TABLES, *SECTIONS])
def test_every_registry_is_listed_once(name):
    assert sum(text.count(f"<!-- generated: {name} -->\n") for text in TEXTS.values()) == 1


@pytest.mark.parametrize("name", MEASURED)
def test_every_measured_table_is_shown_once(name):
    assert sum(text.count(f"<!-- measured: {name} -->\n") for text in TEXTS.values()) == 1


def test_every_picture_of_the_project_is_in_the_gallery_beside_its_test():
    shown = re.findall(r"!\[.+\]\(../baseline_images/(.+)\)", TEXTS["docs/gallery.md"])
    assert sorted(shown) == sorted(path.name for path in (ROOT / "baseline_images").iterdir())
    assert TEXTS["docs/gallery.md"].count("\ndef test_") == TEXTS["docs/gallery.md"].count("\n## ")


def rows(name):
    """The first cells of a measured table."""
    text = next(text for text in TEXTS.values() if f"<!-- measured: {name} -->" in text)
    table = text.partition(f"<!-- measured: {name} -->\n")[2].partition("<!-- end -->")[0]
    return [line.split("|")[1].strip() for line in table.splitlines()[2:]]


@pytest.mark.parametrize(
    ("asked", "named"),
    [
        ("--help", r"--attn-[\w-]+|^ *attn_\w+"),
        ("--markers", r"(?<=^@pytest\.mark\.)(?:attention|heatmap)\w*"),
        ("--fixtures", r"^\w+(?=.* -- .*pytest_attnheat)"),
    ],
)
def test_what_pytest_lists_of_the_plugin_is_in_the_docs(pytester, asked, named):
    listed_by_pytest = re.findall(named, pytester.runpytest(asked).stdout.str(), re.M)
    names = {name.strip() for name in listed_by_pytest} - {"attention_checks"}
    assert len(names) > 2
    page = TEXTS["docs/fixtures.md"]
    assert sorted(name for name in names if not re.search(rf"\| `{name}\b", page)) == []


def test_every_public_name_is_in_the_docs():
    names = [name for names in public_names().values() for name in names]
    assert sorted({*names, "__version__"}) == dir(pytest_attnheat)
    assert [name for name in names if f"| `{name}` |" not in TEXTS["docs/names.md"]] == []


def test_every_defect_was_measured():
    if rows("defects") != [f"`{defect.name}`" for defect in PLANTED]:
        raise AssertionError("docs/measured.md is stale: `python docs/generate.py defects`")


def test_a_new_check_makes_its_page_stale_and_is_written(monkeypatch):
    new = replace(checks.CHECKS[0], name="new", sentence="it is a | b", issue="a/b#1", quick=False)
    monkeypatch.setattr(checks, "CHECKS", (*checks.CHECKS, new))
    before = TEXTS["docs/checks.md"]
    after = listed(before)
    added = set(after.splitlines()) - set(before.splitlines())
    assert added == {r"| `new` | it is a \| b | a/b#1 |  |"}
    assert len(after.splitlines()) == len(before.splitlines()) + 1


def test_a_measured_table_takes_what_its_command_prints(monkeypatch, tmp_path):
    script = tmp_path / "two_tables.py"
    script.write_text("print('| a |\\n|---|\\n| 1 |\\n\\nand\\n| b |\\n|---|\\n| 2 |\\nended')")
    monkeypatch.setitem(MEASURED, "captures", ((str(script),), 1))
    page = "above\n<!-- measured: captures -->\n| old |\n<!-- end -->\nbelow\n"
    assert measured(page, "captures") == (
        "above\n<!-- measured: captures -->\n| b |\n|---|\n| 2 |\n<!-- end -->\nbelow\n"
    )
    assert measured("no table", "captures") == "no table"
