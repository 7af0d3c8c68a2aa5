"""Grade judges of attention that are in use: which planted defects do their inputs and rules show?

Each is rebuilt here from what its project states: how inputs are drawn, the shapes, the tolerance.
Batch and heads are reduced, and lengths where said, so that it runs on a CPU; kernels that compute
in 8 bits are stood in for by attention in bfloat16, so that only the rule is graded. What a project
checks elsewhere is not part of it. Read in November 2026; projects change.

    python benchmarks/judges.py                all judges, as a table in Markdown
    python benchmarks/judges.py NAME ...       some of them, with all that is said of each
"""

from __future__ import annotations

import logging
import math
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention as sdpa

from pytest_attnheat import (
    HARD_CASES,
    AttentionSpec,
    Grade,
    assert_matches_reference,
    check_attention,
    grade,
    hard_case,
)

Function = Callable[..., Any]


@dataclass(frozen=True)
class Judged:
    """A judge, and where it is from.

    Attributes:
        name: The project.
        about: What is rebuilt of it.
        source: Where it is public.
        judge: Raises, or returns False, when it thinks that a function is wrong.
        right: What it is given.
    """

    name: str
    about: str
    source: str
    judge: Function
    right: AttentionSpec | Function = sdpa


def from_bottom_right(
    query: Tensor, key: Tensor, value: Tensor, is_causal: bool = False, *,
    window_size: tuple[int, int] = (-1, -1), softcap: float | None = None,
) -> Tensor:  # fmt: skip
    """Grouped attention, causal from the bottom right, as a decode kernel has it."""
    group = query.shape[1] // key.shape[1]
    key, value = (tensor.repeat_interleave(group, 1).float() for tensor in (key, value))
    scores = query.float() @ key.mT * query.shape[-1] ** -0.5
    if softcap:
        scores = softcap * torch.tanh(scores / softcap)
    rows, columns = scores.shape[-2:]
    behind = torch.arange(rows)[:, None] + (columns - rows) - torch.arange(columns)
    seen = behind >= 0 if is_causal else torch.ones_like(behind, dtype=torch.bool)
    if window_size[0] >= 0:
        seen = seen & (behind <= window_size[0])
    weights = scores.masked_fill(~seen, -math.inf).softmax(-1)
    return (weights @ value).to(query.dtype)


DECODE = AttentionSpec(
    from_bottom_right, mask=None, causal="bottom_right", window="window_size", grouped=True
)


def kernelbench(dtype: torch.dtype, tolerance: float) -> Function:
    """Build level 1, problem 97: inputs of `torch.rand`; one trial, where it has several."""

    def judge(function: Function) -> None:
        torch.manual_seed(42)
        inputs = [torch.rand(2, 2, 512, 1024).to(dtype) for _ in "QKV"]
        expected = sdpa(*inputs)
        assert torch.allclose(function(*inputs), expected, atol=tolerance, rtol=tolerance)

    return judge


def mixed_mla(function: Function) -> None:
    """One query of 4 heads, not 16, to one head of 1024 keys; 5 % of the elements may be off."""
    generator = torch.Generator().manual_seed(4220)
    query = torch.randn(2, 4, 1, 576, generator=generator).bfloat16()
    kept = torch.randn(2, 1, 1024, 576, generator=generator).bfloat16()
    inputs = query, kept, kept[..., :512]
    expected = sdpa(*inputs, enable_gqa=True).float()
    found = function(*inputs, enable_gqa=True).float()
    off = (found - expected).abs() > 0.1 + 0.1 * expected.abs()
    off |= found.isnan() != expected.isnan()
    assert float(off.float().mean()) <= 0.05


def context_parallel_fp8(function: Function) -> None:
    """The root of the mean square of the error is below 0.15 of the range, of all of a tensor."""
    for causal in (False, True):
        torch.manual_seed(1234)
        inputs = [torch.randn(1, 2, 512, 128).bfloat16().requires_grad_() for _ in "qkv"]
        upstream = torch.randn(1, 2, 512, 128).bfloat16()
        results = []
        for one in (function, sdpa):
            output = one(*inputs, is_causal=causal)
            slopes = torch.autograd.grad(output, inputs, upstream, allow_unused=True)
            results.append([output, *slopes])
        for found, expected in zip(*results, strict=True):
            assert found is not None
            assert found.isfinite().all()
            error = (found - expected).square().mean().sqrt()
            whole = max(found.max(), expected.max()) - min(found.min(), expected.min())
            assert error < 0.15 * whole


def paged_fp8(function: Function) -> None:
    """Lengths, softcap and window as they are; 0.15 absolute and relative."""
    torch.manual_seed(0)
    for query_len, key_len in ((1, 1328), (5, 18), (129, 463)):
        shapes = (1, 4, query_len, 128), (1, 2, key_len, 128), (1, 2, key_len, 128)
        inputs = [torch.randn(shape).bfloat16() for shape in shapes]
        for window in ((-1, -1), (255, 0)):
            for softcap in (None, 50.0):
                given = {"is_causal": True, "window_size": window, "softcap": softcap}
                expected = from_bottom_right(*inputs, **given)
                found = function(*inputs, **given)
                torch.testing.assert_close(found, expected, atol=0.15, rtol=0.15)


def context_parallel(function: Function) -> None:
    """`torch.rand` in bfloat16, four ranks of 64 tokens: 4e-3, gradients of a sum 3.2e-2."""
    for causal in (True, False):
        torch.manual_seed(10)
        inputs = [torch.rand(2, 2, 256, 32).bfloat16().requires_grad_() for _ in "qkv"]
        results = []
        for one in (sdpa, function):
            output = one(*inputs, is_causal=causal)
            results.append((output, *torch.autograd.grad(output.sum(), inputs)))
        expected, found = results
        assert torch.allclose(expected[0], found[0], atol=4e-3)
        for one, other in zip(expected[1:], found[1:], strict=True):
            assert torch.allclose(one, other, atol=3.2e-2)


def default_check(function: Function) -> bool:
    """Elements within 1e-3 in float16, and a cosine of 0.999 of the whole."""
    torch.manual_seed(0)
    sizes = (1, 4, 17, 128), (1, 2, 93, 128), (1, 2, 93, 128)
    inputs = [torch.randn(size).half() for size in sizes]
    expected = from_bottom_right(*inputs, is_causal=True).float()
    found = function(*inputs, is_causal=True).float()
    if not torch.isclose(found, expected, rtol=1e-3, atol=1e-3).all():
        return False
    return bool(torch.cosine_similarity(found.flatten(), expected.flatten(), 0) >= 0.999)


def three_lines(function: Function) -> None:
    """Finite, of the right shape, and close to 1e-2."""
    inputs = [torch.randn(2, 4, 128, 64) for _ in "qkv"]
    found = function(*inputs)
    assert found.isfinite().all()
    assert found.shape == inputs[0].shape
    torch.testing.assert_close(found, sdpa(*inputs), atol=1e-2, rtol=1e-2)


def on_hard_cases(function: Function) -> None:
    """Assert each hard case in float32, two samples each."""
    for name in HARD_CASES:
        case = hard_case(name, batch=2)
        assert_matches_reference(function, case.query, case.key, case.value, **case.arguments)


def examined(function: Function) -> bool:
    """Examine it in float32."""
    return check_attention(AttentionSpec(function, mask="any", dtypes=("float32",))).passed


JUDGES = (
    Judged("KernelBench, float16", "level 1 problem 97, torch.rand, 1e-2",
           "ScalingIntelligence/KernelBench@423217d9 KernelBench/level1/"
           "97_ScaledDotProductAttention.py, src/kernelbench/eval.py",
           kernelbench(torch.float16, 1e-2)),
    Judged("KernelBench, float32", "the same, 1e-4", "the same",
           kernelbench(torch.float32, 1e-4)),
    Judged("GPU MODE mixed-mla", "first test, 0.1/0.1, 5 % of elements may be off",
           "gpu-mode/reference-kernels@f83cb92a problems/amd_202602/mixed-mla, utils.py",
           mixed_mla),
    Judged("TransformerEngine, fp8 rule", "context parallel, RMSE below 0.15 of the range; "
           "512 tokens", "NVIDIA/TransformerEngine tests/pytorch/attention/"
           "run_attention_with_cp.py, tests/pytorch/utils.py", context_parallel_fp8),
    Judged("vLLM, fp8 rule", "varlen with pages, 0.15/0.15",
           "vllm-project/vllm tests/kernels/attention/test_flash_attn.py", paged_fp8, DECODE),
    Judged("PyTorch, context parallel", "torch.rand, bfloat16, 1e-3 and 8e-3 for each rank",
           "pytorch/pytorch test/distributed/tensor/test_attention.py", context_parallel),
    Judged("FlashInfer, default check", "1e-3 in float16, cosine 0.999; shapes are ours",
           "flashinfer-ai/flashinfer flashinfer/trace/template.py", default_check, DECODE),
    Judged("the usual three lines", "isfinite, shape, assert_close at 1e-2", "many", three_lines),
    Judged("assert_matches_reference", "on HARD_CASES, float32", "here", on_hard_cases),
    Judged("check_attention", "all that PyTorch's function takes, float32", "here", examined),
)  # fmt: skip


def line(one: Judged, found: Grade) -> str:
    """Return a line of the table."""
    active = len(found.killed) + len(found.survived)
    passed = [verdict.name for verdict in found.trivial if verdict.status == "survived"]
    remedy = found.remedy
    cure = ", ".join(remedy.cases)
    if remedy.cases:
        cure += f" ({len(remedy.killed)} of {len(remedy.killed) + len(remedy.left)})"
    cells = (one.name, one.about, active, len(found.survived), ", ".join(passed), cure, one.source)
    return f"| {' | '.join(map(str, cells))} |"


def main(*names: str) -> None:
    """Print the table, or all that is said of some judges."""
    logging.disable(logging.WARNING)
    if not names:
        print("| judge | what is rebuilt | defects active | survived | trivial answers that pass "
              "| smallest cure | source |\n|---|---|---|---|---|---|---|")  # fmt: skip
    for one in JUDGES:
        if names and one.name not in names:
            continue
        start = time.monotonic()
        found = grade(one.judge, one.right)
        print(f"{one.name}\n{found}\n" if names else line(one, found), flush=True)
        print(f"{one.name}: {time.monotonic() - start:.0f} s", file=sys.stderr, flush=True)


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(*sys.argv[1:])
