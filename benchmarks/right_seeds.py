"""Examine right functions from other seeds: python benchmarks/right_seeds.py [SEEDS [FIRST]].

Every pair of features of each function in four dtypes; a line for each alarm, which is a false one,
and one for each function. It takes some ten seconds for each function and seed.
"""

import sys
from pathlib import Path

import torch

from pytest_attnheat import check_attention
from pytest_attnheat.contract.checks import CHECKS

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
from test_contract_report import CORRECT

PAIRS = [check for check in CHECKS if check.name == "pairs"]


def main() -> None:
    """Print what was found from each seed, and how many seeds that were."""
    torch.set_num_threads(1)
    count, first = [*map(int, sys.argv[1:]), *(30, 0)[len(sys.argv) - 1 :]]
    for function in CORRECT:
        alarms = 0
        for seed in range(first, first + count):
            for failed in check_attention(function, checks=PAIRS, seed=seed).failed:
                alarms += 1
                print(f"{function.__name__} seed={seed} {failed.dtype}: {failed.message}")
        print(f"{function.__name__}: {count} seeds, {alarms} false alarms", flush=True)


if __name__ == "__main__":
    main()
