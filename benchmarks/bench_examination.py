"""What the examination takes beside the calls it makes: python benchmarks/bench_examination.py."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch
from timing import report
from torch.nn.functional import scaled_dot_product_attention

from pytest_attnheat import AttentionSpec, check_attention

ROUNDS = 3


class Timed:
    """Attention that adds up how long its own calls take."""

    def __init__(self) -> None:
        self.taken, self.calls = 0.0, 0

    def __call__(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attn_mask: torch.Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        *,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> torch.Tensor:
        """Call PyTorch's own function."""
        start = time.perf_counter()
        try:
            return scaled_dot_product_attention(
                query, key, value, attn_mask, dropout_p, is_causal,
                scale=scale, enable_gqa=enable_gqa,
            )  # fmt: skip
        finally:
            self.taken += time.perf_counter() - start
            self.calls += 1


class Flash(Timed):
    """The same under the signature of FlashAttention, which is examined as a row of the table."""

    def __call__(  # type: ignore[override]
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        dropout_p: float = 0.0,
        softmax_scale: float | None = None,
        causal: bool = False,
        window_size: tuple[int, int] = (-1, -1),
        alibi_slopes: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Call PyTorch's own function, its mask aligned to the bottom right."""
        query, key, value = (t.transpose(1, 2) for t in (q, k, v))
        at = torch.arange(q.shape[1])[:, None] + k.shape[1] - q.shape[1]
        to = torch.arange(k.shape[1])
        left, right = (10**9 if side < 0 else side for side in window_size)
        seen = (to >= at - left) & (to <= at + (0 if causal else right))
        mask = torch.zeros(seen.shape, dtype=q.dtype).masked_fill(~seen, -torch.inf)
        if alibi_slopes is not None:
            distant = alibi_slopes.reshape(-1, q.shape[2], 1, 1) * (at - to).abs()
            mask = mask - distant.to(q.dtype)
        plain = None if bool(seen.all()) and alibi_slopes is None else mask
        return (
            super()
            .__call__(query, key, value, plain, dropout_p, scale=softmax_scale, enable_gqa=True)
            .transpose(1, 2)
        )


def ratio_of_a_row() -> float:
    """Return how long an examination of a public callable takes besides its calls, against SDPA's.

    Both in float32, taken in turn.
    """
    ratios = []
    for _ in range(ROUNDS):
        besides = []
        for subject in (Flash(), Timed()):
            named = {"mask": "any"} if type(subject) is Timed else {}
            spec = AttentionSpec(subject, name="one", dtypes=("float32",), **named)
            start = time.perf_counter()
            outcome = check_attention(spec)
            besides.append(time.perf_counter() - start - subject.taken)
            assert outcome.passed, str(outcome)
        print(f"  {besides[0]:.2f} s and {besides[1]:.2f} s")
        ratios.append(besides[0] / besides[1])
    return sorted(ratios)[ROUNDS // 2]


def ratio(**options: Any) -> float:
    """Return how many times as long as its calls an examination in four dtypes takes."""
    ratios = []
    for _ in range(ROUNDS):
        subject = Timed()
        spec = AttentionSpec(subject, name="sdpa", mask="any")
        start = time.perf_counter()
        outcome = check_attention(spec, **options)
        whole = time.perf_counter() - start
        assert outcome.passed, str(outcome)
        print(f"  {whole:.2f} s, {subject.calls} calls in {subject.taken:.2f} s")
        ratios.append(whole / subject.taken)
    return sorted(ratios)[ROUNDS // 2]


class Wrong(Timed):
    """The same with other queries, which may be a defect that has a name, or none."""

    def __init__(self, change: Callable[[torch.Tensor], torch.Tensor]) -> None:
        super().__init__()
        self.change = change

    def __call__(self, query: torch.Tensor, *others: Any, **named: Any) -> torch.Tensor:
        """Call it with another query."""
        return super().__call__(self.change(query), *others, **named)


def ratio_of_wrong(change: Callable[[torch.Tensor], torch.Tensor], named: bool) -> float:
    """Return how many times as long as its calls an examination of wrong code takes."""
    subject = Wrong(change)
    spec = AttentionSpec(subject, name="wrong", mask="any", dtypes=("float32",))
    start = time.perf_counter()
    outcome = check_attention(spec)
    assert outcome.diagnosis is not None
    assert bool(outcome.diagnosis.defects) == named, str(outcome)
    whole = time.perf_counter() - start
    print(f"  {whole:.2f} s, {subject.calls} calls in {subject.taken:.2f} s")
    return whole / subject.taken


def main() -> None:
    """Print both forms of it, and what it takes where it has to be told what is wrong."""
    torch.set_num_threads(1)
    for times in ("first", "later"):
        unnamed = ratio_of_wrong(torch.tanh, named=False)
        report(f"wrong and unnamed, the {times} subject, against the calls", unnamed, "<=", 200)
    named = ratio_of_wrong(lambda query: query * query.shape[-1] ** 0.5, named=True)
    report("wrong and named, against the calls", named, "<=", 80)
    report("everything in four dtypes, against the calls alone", ratio(), "<=", 20)
    report("quick, against the calls alone", ratio(quick=True), "<=", 25)
    report("a row of the table besides its calls, against SDPA", ratio_of_a_row(), "<=", 1.5)


if __name__ == "__main__":
    main()
