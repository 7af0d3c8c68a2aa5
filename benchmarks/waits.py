"""How often the host waits for a device while a call passes, and how fast a copy on it is.

    python benchmarks/waits.py [--device cuda]

Waits are counted by torch's own warnings about them, which there are for CUDA alone.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable

import torch
from timing import copy_bandwidth, options
from torch.nn.functional import scaled_dot_product_attention as sdpa

import pytest_attnheat as attnheat

WEIGHTS = (2, 8, 256, 256)


def waits(action: Callable[[], object]) -> int | None:
    """Count the waits within a call; None where nobody counts them."""
    if not torch.cuda.is_available():
        return None
    action()  # loads the kernels
    torch.cuda.synchronize()
    with warnings.catch_warnings(record=True) as raised:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            action()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    return sum("synchronizing" in str(warning.message) for warning in raised)


def calls(device: str) -> dict[str, Callable[[], object]]:
    """What passes, by name."""
    scores = torch.randn(WEIGHTS, generator=torch.Generator().manual_seed(0)).to(device)
    mask = torch.ones(WEIGHTS[-2:], dtype=torch.bool, device=device).tril()
    free, causal = scores.softmax(-1), scores.masked_fill(~mask, -torch.inf).softmax(-1)
    case = attnheat.make_attention(batch=1, query_len=16, key_len=16, device=device)
    inputs = case.query, case.key, case.value

    def captured() -> None:
        with attnheat.capture_attention():
            sdpa(*inputs, is_causal=True)

    return {
        "assert_row_stochastic": lambda: attnheat.assert_row_stochastic(free),
        "assert_row_stochastic, with a mask": lambda: attnheat.assert_row_stochastic(
            causal, mask=mask
        ),
        "assert_causal": lambda: attnheat.assert_causal(causal),
        "assert_masked": lambda: attnheat.assert_masked(causal, mask),
        "assert_uniform": lambda: attnheat.assert_uniform(torch.full_like(free, 1 / 256)),
        "assert_reproduces_output": lambda: attnheat.assert_reproduces_output(
            case.weights, case.value, case.output
        ),
        "assert_matches_reference": lambda: attnheat.assert_matches_reference(sdpa, *inputs),
        "assert_no_leakage": lambda: attnheat.assert_no_leakage(sdpa, *inputs, is_causal=True),
        "assert_padding_invariant": lambda: attnheat.assert_padding_invariant(sdpa, *inputs),
        "assert_layout_invariant": lambda: attnheat.assert_layout_invariant(sdpa, *inputs),
        "capture_attention, one layer": captured,
    }


def main() -> None:
    """Print the bandwidth and the counts."""
    given = options(__doc__)
    bandwidth = copy_bandwidth(given.device, *((1, 3) if given.quick else ()))
    print(f"{given.device}: a copy reads and writes {bandwidth / 1e9:.3g} GB/s")
    for name, call in calls(given.device).items():
        counted = waits(call) if given.device.startswith("cuda") else None
        print(f"{name:<40} {'not counted' if counted is None else f'{counted} waits'}")


if __name__ == "__main__":
    main()
