"""`make gpu`, as far as it goes without a GPU: all it runs is there, and its report is written."""

import contextlib
import io
import runpy
import sys
from pathlib import Path

import pytest
import torch

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


@pytest.fixture
def gpu(monkeypatch):
    monkeypatch.syspath_prepend(BENCHMARKS)
    monkeypatch.setenv("TRANSFORMERS_VERBOSITY", "error")
    import gpu

    yield gpu
    for name in ("gpu", "timing"):
        sys.modules.pop(name, None)


@pytest.mark.matrix
def test_a_dry_run_collects_the_tests_and_tries_each_benchmark(gpu, monkeypatch, tmp_path):
    in_a_process = gpu.run

    def run(python, part, limit):
        """Benchmarks in this process, which has torch loaded."""
        if "pytest" in part.arguments:
            return in_a_process(python, part, limit)
        monkeypatch.setattr(sys, "argv", list(part.arguments))
        with contextlib.redirect_stdout(io.StringIO()) as printed:
            runpy.run_path(part.arguments[0], run_name="__main__")
        return gpu.Outcome(part, 0, 0.0, printed.getvalue())

    monkeypatch.setattr(gpu, "run", run)
    report = tmp_path / "docs" / "gpu.md"
    assert gpu.main(["--dry-run", "--device", "cpu", "--output", str(report)]) == 0
    text = report.read_text(encoding="utf-8")
    assert "not reached" not in text
    for said in (
        f"| torch | {torch.__version__} |", "| dry run | tests were collected only",
        " tests collected (", "cpu: a copy reads and writes", "float32, against weights.sum(-1)",
        "forward with keep='inputs' / without", "one map of 10 x 10: ours / textbook",
    ):  # fmt: skip
        assert said in text


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_without_a_gpu_it_says_so(gpu, tmp_path, capsys):
    report = tmp_path / "gpu.md"
    assert gpu.main(["--output", str(report)]) == 0
    printed = capsys.readouterr().out
    assert "cuda: not a device that torch can use here; nothing was run" in printed
    assert "tests, 200 s at most: -m pytest" in printed
    assert not report.exists()


def test_its_parts_keep_to_eight_minutes(gpu):
    limits = [part.limit for part in gpu.parts_of("cuda", dry_run=False)]
    assert sum(limits) + gpu.INSTALLING <= gpu.TOTAL < 8 * 60


def test_a_part_that_takes_too_long_leaves_what_it_printed(gpu):
    waits = "import time; print('begun', flush=True); time.sleep(60)"
    outcome = gpu.run(sys.executable, gpu.Part("slow", 1.0, ("-c", waits)), 2.0)
    assert (outcome.status, outcome.text.strip()) == (None, "begun")
    assert outcome.said == "cut off after 2 s"


PRINTED = """\
tests/test_a.py::test_good[cuda] PASSED
tests/test_a.py::test_bad[cuda] FAILED
tests/test_a.py::test_none SKIPPED (needs a CUDA device)
=================================== FAILURES ===================================
________________________________ test_bad[cuda] ________________________________
tests/test_a.py:3: in test_bad
    assert 1 == 2
E   assert 1 == 2
"""


def test_the_report_counts_tests_and_shows_what_failed(gpu, tmp_path):
    parts = [gpu.Part("tests", 1.0, ("-m", "pytest")), gpu.Part("rows", 1.0, ("rows.py",))]
    done = [gpu.Outcome(parts[0], 1, 3.0, PRINTED)]
    gpu.write(tmp_path / "gpu.md", {"device": "a GPU"}, parts, done)
    text = (tmp_path / "gpu.md").read_text(encoding="utf-8")
    assert "| tests | failed (exit status 1) | 3 |\n| rows | not reached |  |" in text
    assert "1 passed, 1 failed, 1 skipped\n\n`test_bad[cuda]`" in text
    assert "```\ntests/test_a.py:3: in test_bad\nE   assert 1 == 2\n```" in text
