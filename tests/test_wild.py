"""What is said of released packages is what was found, and what finds it can be trusted."""

import json
import math
import sys

import pytest
import torch
from pages import ROOT
from torch.nn.functional import scaled_dot_product_attention

sys.path.insert(0, str(ROOT / "benchmarks"))
import wild
import wild_loops

ROWS = json.loads(wild.SUMMARY.read_text(encoding="utf-8"))["rows"]
PROBLEMS = sorted({entry.problem for entry in wild.WILD if entry.problem})


def test_every_entry_was_examined_and_is_as_it_is_declared():
    assert [f"{row['package']}: {row['subject']}" for row in ROWS] == [e.key for e in wild.WILD]
    for row, entry in zip(ROWS, wild.WILD, strict=True):
        assert wild.as_declared(entry, row), entry.key
        assert (row["version"], row["declared"]) == (entry.version, entry.declared)


def test_twenty_packages_are_examined_all_pinned():
    assert len({entry.name for entry in wild.WILD}) >= 20
    assert all("==" in pin for pin in wild.pins(wild.WILD))


def test_the_page_shows_each_row_once():
    page = (ROOT / "docs" / "wild.md").read_text(encoding="utf-8")
    shown = [line.split("|")[1].strip() for line in page.splitlines() if line.startswith("| ")]
    for row in ROWS:
        assert shown.count(f"{row['package']} {row['version']}, `{row['subject']}`") == 1


def test_the_loops_import_neither_torch_nor_the_package():
    source = (ROOT / "benchmarks" / "wild_loops.py").read_text(encoding="utf-8")
    imported = [line for line in source.splitlines() if line.startswith(("import", "from"))]
    assert not any("torch" in line or "attnheat" in line for line in imported)


@pytest.mark.parametrize("scale", [None, 0.3])
def test_the_loops_are_attention(scale):
    numbers = wild_loops._three(2, 3, 4, 5)
    output = wild_loops.attend(*numbers, lambda b, h, i, j: j <= i + 1, scale)
    tensors = (torch.tensor(one, dtype=torch.float64) for one in numbers)
    seen = torch.ones(4, 5, dtype=torch.bool).tril(1)
    expected = scaled_dot_product_attention(*tensors, seen, scale=scale)
    assert wild_loops.apart(output, expected.tolist()) < 1e-12


@pytest.mark.parametrize("name", PROBLEMS)
def test_a_problem_tells_its_two_answers_apart(name):
    problem = getattr(wild_loops, name)()
    assert wild_loops.apart(problem.documented, problem.does(problem.documented)) > wild.OFF


def test_numbers_that_are_not_numbers_are_infinitely_far():
    assert wild_loops.apart([[[[math.nan]]]], [[[[0.0]]]]) == math.inf


FAKE = """
def right(query, key, value, attn_mask=None, is_causal=False):
    scores = query @ key.mT / query.shape[-1] ** 0.5
    if attn_mask is not None:
        scores = scores.masked_fill(~attn_mask, float("-inf"))
    if is_causal:
        seen = scores.new_ones(scores.shape[-2:]).tril() > 0
        scores = scores.masked_fill(~seen, float("-inf"))
    return scores.softmax(-1).nan_to_num(0.0) @ value

def wrong(query, key, value, attn_mask=None, is_causal=False):
    return right(query, key, value, attn_mask)
"""


def fake(name):
    return wild.Wild(
        "fake==1.0",
        name,
        FAKE,
        f"AttentionSpec({name}, dtypes=['float32'], square=True, few_shapes=True, gradients=False)",
        problem="causal_ignored" if name == "wrong" else "",
        call=f"{name}(q, k, v, is_causal=True)",
    )


@pytest.mark.parametrize("name", ["right", "wrong"])
def test_a_package_is_judged_right_or_wrong(name):
    before = list(sys.meta_path)
    result = wild.examine(fake(name))
    sys.meta_path[:] = before
    assert result["passed"] == (name == "right")
    assert ("not causal when asked to be" in result["found"]) == (name == "wrong")
    assert wild.as_declared(fake(name), result)
    # What is called wrong and is right is not as declared, nor is the reverse.
    other = fake("right" if name == "wrong" else "wrong")
    assert not wild.as_declared(other, {**result, "off_documented": 0.0, "off_loops": 1.0})
