"""Grade judges of attention that are in use: which planted defects do their inputs and rules show?

Each is rebuilt here from what its project states: how inputs are drawn, the shapes, the tolerance.
Batch and heads are reduced, and lengths where said, so that it runs on a CPU; kernels that compute
in 8 bits are stood in for by attention in bfloat16, so that only the rule is graded. What a project
checks elsewhere is not part of it. Projects change: each source is that of one commit.

    python benchmarks/judges.py                grade all judges, in minutes, and write judges.json
    python benchmarks/judges.py NAME ...       grade some of them anew, and print all of each
    python benchmarks/judges.py --table        what judges.json holds, as a table of the docs
"""

from __future__ import annotations

import datetime
import json
import logging
import math
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
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
from pytest_attnheat.contract.checks import CHECKS

Function = Callable[..., Any]
RESULTS = Path(__file__).with_suffix(".json")


@dataclass(frozen=True)
class Judged:
    """A judge, and where it is from.

    Attributes:
        name: The project.
        about: What is rebuilt of it, and what is not as it is there.
        source: Where it is public: repository, commit and paths; empty for our own.
        judge: Raises, or returns False, when it thinks that a function is wrong.
        right: What it is given.
    """

    name: str
    about: str
    source: tuple[str, ...]
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
        *inputs, upstream = [torch.randn(1, 2, 512, 128).bfloat16().clamp(-1, 1) for _ in "qkvo"]
        inputs = [tensor.requires_grad_() for tensor in inputs]
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


def examined(function: Function) -> None:
    """Examine it in float32, up to the first check that fails."""
    spec = AttentionSpec(function, mask="any", dtypes=("float32",))
    for one in CHECKS:
        assert not check_attention(spec, checks=[one]).failed, one.name


JUDGES = (
    Judged("KernelBench, float16",
           "level 1 problem 97: `torch.rand`, 512 keys of width 1024, 1e-2 absolute and relative; "
           "one trial",
           ("ScalingIntelligence/KernelBench", "423217d9fda91e0c2d67e4a43bf62f96f6d104f1",
            "KernelBench/level1/97_ScaledDotProductAttention.py", "src/kernelbench/eval.py"),
           kernelbench(torch.float16, 1e-2)),
    Judged("KernelBench, float32", "the same, 1e-4",
           ("ScalingIntelligence/KernelBench", "423217d9fda91e0c2d67e4a43bf62f96f6d104f1",
            "KernelBench/level1/97_ScaledDotProductAttention.py", "src/kernelbench/eval.py"),
           kernelbench(torch.float32, 1e-4)),
    Judged("GPU MODE, mixed MLA",
           "the first test: one query, 1024 keys, 0.1 absolute and relative, 5 % of the elements "
           "may be off; the reference is in bfloat16, there in 8 bits",
           ("gpu-mode/reference-kernels", "f83cb92a534cc67fa98d7e9813e7f8238abdb4e0",
            "problems/amd_202602/mixed-mla/reference.py", "problems/amd_202602/utils.py"),
           mixed_mla),
    Judged("TransformerEngine, rule for 8 bits",
           "context parallel: the root mean square error of output and gradients is below 0.15 of "
           "their range; 512 tokens, there 4096, and attention in bfloat16, there in 8 bits",
           ("NVIDIA/TransformerEngine", "d0067d0da6cb01811b8072a7d304f0e00344ce2b",
            "tests/pytorch/attention/run_attention_with_cp.py", "tests/pytorch/utils.py"),
           context_parallel_fp8),
    Judged("vLLM, rule for 8 bits",
           "packed queries with pages: lengths, window and softcap as they are, 0.15 absolute and "
           "relative; each sequence is a call without pages, in bfloat16, there in 8 bits",
           ("vllm-project/vllm", "0001b995fda59101b71d7ac3a2821b1ce2f01473",
            "tests/kernels/attention/test_flash_attn.py"), paged_fp8, DECODE),
    Judged("PyTorch, context parallel",
           "ring attention: `torch.rand` in bfloat16, four ranks of 64 tokens, 1e-3 for each rank "
           "and 8e-3 for gradients of the sum",
           ("pytorch/pytorch", "01df9461dab138b9ef1f96c2b81342d38729e085",
            "test/distributed/tensor/test_attention.py"), context_parallel),
    Judged("FlashInfer, default check",
           "1e-3 absolute and relative in float16, and a cosine of 0.999; the inputs are ours: "
           "causal, 17 queries of 4 heads, 93 keys of 2",
           ("flashinfer-ai/flashinfer", "fb28d7242b3506a2348265962041acc1fb56cca4",
            "flashinfer/trace/template.py"),
           default_check, DECODE),
    Judged("the usual three lines",
           "`isfinite`, the shape, and `assert_close` at 1e-2; `torch.randn`, 128 keys of width 64",
           (), three_lines),
    Judged("`assert_matches_reference`", "on `HARD_CASES`, in float32", (), on_hard_cases),
    Judged("`check_attention`", "all that PyTorch's function takes, in float32", (), examined),
)  # fmt: skip


def result(one: Judged, found: Grade) -> dict[str, Any]:
    """What the table shows of a judge, and a little more."""
    remedy = found.remedy
    return {
        "name": one.name,
        "about": one.about,
        "source": one.source,
        "calls": found.calls,
        "killed": len(found.killed),
        "survived": [verdict.name for verdict in found.survived],
        "inactive": len(found.inactive),
        "trivial": [verdict.name for verdict in found.trivial if verdict.status == "survived"],
        "date": str(datetime.date.today()),
        "torch": torch.__version__,
        "cases": remedy.cases,
        "examined": remedy.calls,
        "left": remedy.left,
    }


def table(results: list[dict[str, Any]]) -> Iterator[str]:
    """The table that the docs show."""
    yield ("| judge | what is rebuilt | graded on | defects active | survived "
           "| trivial answers that pass | the smallest cure |")  # fmt: skip
    yield "|" + "---|" * 7
    for one in results:
        name = one["name"]
        if one["source"]:
            repository, commit, *paths = one["source"]
            root = f"https://github.com/{repository}/blob/{commit}/"
            links = [f"[{path.rpartition('/')[2]}]({root}{path})" for path in paths]
            name += f": {', '.join(links)}"
        active, survived = one["killed"] + len(one["survived"]), len(one["survived"])
        trivial = ", ".join(f"`{name}`" for name in one["trivial"]) or "none"
        calls = [f"`{name}`" for name in one["cases"]]
        if count := len(one["examined"]):
            calls += [f"{count} call{'s' * (count > 1)} of the examination"]
        cure = ", ".join(calls) or ("nothing to cure" if not survived else "")
        cure += f" ({len(one['left'])} left)" * bool(one["left"])
        cells = name, one["about"], one["date"], active, survived, trivial, cure
        yield f"| {' | '.join(map(str, cells))} |"


def main(*names: str) -> None:
    """Grade the judges, or print what is known of them."""
    if names == ("--table",):
        print("\n".join(table(json.loads(RESULTS.read_text(encoding="utf-8")))))
        return
    logging.disable(logging.WARNING)
    known = json.loads(RESULTS.read_text(encoding="utf-8")) if names else []
    results = {one["name"]: one for one in known}
    for one in JUDGES:
        if names and one.name not in names:
            continue
        start = time.monotonic()
        found = grade(one.judge, one.right)
        results[one.name] = result(one, found)
        if names:
            print(f"{one.name}\n{found}\n", flush=True)
        print(f"{one.name}: {time.monotonic() - start:.0f} s", file=sys.stderr, flush=True)
    written = [results[one.name] for one in JUDGES if one.name in results]
    RESULTS.write_text(json.dumps(written, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(*sys.argv[1:])
