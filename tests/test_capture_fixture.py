"""The fixture `capture_attention`, and what loading the package loads."""

import subprocess
import sys

MODEL = """
    import torch
    from torch import nn
    from torch.nn import functional as F

    class Attention(nn.Module):
        def forward(self, x):
            return F.scaled_dot_product_attention(x, x, x, is_causal=True)

    class LinearAttention(nn.Module):
        def forward(self, x):
            return x @ (x.mT @ x)

    X = torch.ones(2, 3, 5, 4)
"""


def test_the_fixture_is_the_function(pytester):
    pytester.makepyfile(
        MODEL
        + """
    import pytest_attnheat
    from pytest_attnheat import assert_causal, assert_row_stochastic

    def test_model(capture_attention):
        model = nn.Sequential(Attention(), Attention())
        with capture_attention(model) as trace:
            model(X)
        for record in trace:
            assert_row_stochastic(record.weights, mask=record.mask)
            assert_causal(record.weights, alignment="top_left")
        assert capture_attention is pytest_attnheat.capture_attention
    """
    )
    pytester.runpytest("-q").assert_outcomes(passed=1)


def test_what_is_unseen_is_among_the_warnings_of_the_run(pytester):
    pytester.makepyfile(
        MODEL
        + """
    def test_model(capture_attention):
        model = nn.Sequential(Attention(), LinearAttention())
        with capture_attention(model):
            model(X)
    """
    )
    result = pytester.runpytest("-q", "-W", "default")
    result.assert_outcomes(passed=1, warnings=1)
    result.stdout.fnmatch_lines(
        ["*CaptureWarning: capture_attention: something looks like attention*",
         "*1: LinearAttention: it ran, and no attention was seen in it"]
    )  # fmt: skip


def test_an_empty_capture_fails_the_test_and_says_why(pytester):
    pytester.makepyfile(
        MODEL
        + """
    def test_model(capture_attention):
        with capture_attention(nn.Linear(4, 4)) as trace:
            pass
    """
    )
    result = pytester.runpytest("-q")
    result.assert_outcomes(failed=1)
    result.stdout.fnmatch_lines(
        ["E *CaptureError: capture_attention: no attention was seen in Linear."]
    )


def test_the_fixture_is_listed_with_what_it_does(pytester):
    result = pytester.runpytest("--fixtures", "-q")
    result.stdout.fnmatch_lines(["capture_attention*", "    Records the attention inside a model*"])


def in_a_fresh_interpreter(code):
    return subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    ).stdout.split()


def test_importing_the_package_loads_no_torch():
    code = "import sys, pytest_attnheat; print('torch' in sys.modules)"
    assert in_a_fresh_interpreter(code) == ["False"]


def test_the_names_of_a_capture_load_neither_pytest_nor_matplotlib_nor_the_compiler():
    code = """
import sys
from pytest_attnheat import capture_attention, Trace, AttentionRecord
from pytest_attnheat import CaptureError, CaptureMemoryError, CaptureWarning
import torch
with capture_attention() as trace:
    torch.nn.functional.scaled_dot_product_attention(*[torch.ones(1, 1, 2, 2)] * 3)
names = ("pytest", "matplotlib", "torch._dynamo", "torch.nn.attention.flex_attention", "sympy")
print(len(trace), *(name for name in names if name in sys.modules))
"""
    assert in_a_fresh_interpreter(code) == ["1"]


def test_every_public_name_is_exported():
    import pytest_attnheat

    for name in (
        "capture_attention", "AttentionRecord", "Trace", "CaptureError", "CaptureMemoryError",
        "CaptureWarning",
    ):  # fmt: skip
        assert hasattr(pytest_attnheat, name)
        assert name in dir(pytest_attnheat)
