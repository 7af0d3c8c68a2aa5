"""Two or more defects at once: python benchmarks/defect_pairs.py [seed] [count] [of each]."""

import random
import sys
import time
from collections import Counter
from pathlib import Path

import torch

from pytest_attnheat import AttentionSpec, Diagnosis, check_attention, diagnose

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
from wrong_attention import PLANTED, attention_with, declared_for

# Left out: what needs another declaration, and NaN in masked keys, which is no defect.
NAMES = [
    defect.name for defect in PLANTED if defect.seen != "garbage" and not declared_for(defect.name)
]


def judged(planted: tuple[str, ...], found: Diagnosis) -> str:
    """Say how much of what was planted is named, first or as good."""
    names = [set(found.defects), *map(set, found.alternatives)]
    if set(planted) in names:
        return "named in full"
    if found.defects and names[0] < set(planted):
        return "named in part"  # what is left out changes nothing beside what is named
    return "WRONG" if found.defects else "not named"


def found_by_examination(spec: AttentionSpec) -> bool:
    """Whether some check fails; all are asked only where the quick ones pass."""
    return not (check_attention(spec, quick=True).passed and check_attention(spec).passed)


def main() -> None:
    """Print what was not named in full, then how many were named how."""
    seed, count, each, *_ = [*map(int, sys.argv[1:]), *(0, 100, 2)[len(sys.argv) - 1 :]]
    choice = random.Random(seed)
    counts: Counter[str] = Counter()
    seconds = []
    for _ in range(count):
        planted = tuple(choice.sample(NAMES, each))
        torch.manual_seed(0)
        spec = AttentionSpec(
            attention_with(*planted), name="planted", grouped=True, dtypes=("float32",)
        )
        counts["found by the examination"] += found_by_examination(spec)
        started = time.process_time()
        found = diagnose(spec)
        seconds.append(time.process_time() - started)
        how = judged(planted, found)
        counts[how] += 1
        if how != "named in full":
            print(f"{how}: {' and '.join(planted)}: {found.sentence}", flush=True)
    for how in ("found by the examination", "named in full", "named in part", "not named", "WRONG"):
        print(f"{counts[how]:>4} of {count} {how}")
    print(f"diagnosis: {sum(seconds) / count:.1f} s of one core, at most {max(seconds):.1f} s")


if __name__ == "__main__":
    main()
