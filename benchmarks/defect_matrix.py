"""Which checks find which defects: python benchmarks/defect_matrix.py [--table]."""

import sys
from collections import Counter
from pathlib import Path

import torch

from pytest_attnheat import AttentionSpec, check_attention, diagnose
from pytest_attnheat.contract.checks import CHECKS

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
from wrong_attention import PLANTED, planted_with

GROUPED = (
    "groups_tiled",
    "keys_tiled",
    "values_tiled",
    "first_key_head_only",
    "key_head_miscounted",
)


def planted(name: str) -> AttentionSpec:
    """Return an implementation with one defect, and what it should have been."""
    subject, declared = planted_with(name)
    return AttentionSpec(
        subject,
        name=name,
        grouped=True if name in GROUPED else None,
        dtypes=("float32",),
        **declared,
    )


def main() -> None:
    """Print a row per defect: its name, whether it was named, and the checks that find it."""
    found: Counter[str] = Counter()
    needed: dict[str, list[str]] = {}
    table = "--table" in sys.argv
    print("| defect | found by | named |\n|---|---|---|" if table else "")
    for defect in PLANTED:
        torch.manual_seed(0)
        spec = planted(defect.name)
        failed = list(dict.fromkeys(r.name for r in check_attention(spec).failed))
        named = diagnose(spec).defects == (defect.name,)
        found.update(failed)
        for name in failed if len(failed) <= 3 else ():
            needed.setdefault(name, []).append(defect.name)
        by = ", ".join(failed) if len(failed) <= 3 else f"{len(failed)} checks"
        if table:
            print(f"| `{defect.name}` | {by or 'no check: noted'} | {'yes' if named else 'no'} |")
        else:
            marks = "".join("x" if check.name in failed else "." for check in CHECKS)
            print(f"{defect.name:<36} {marks}  {'named' if named else ''}")
    if not table:
        for check in CHECKS:
            print(f"{check.name:<26} finds {found[check.name]:>3}; found by few others: "
                  f"{', '.join(needed.get(check.name, [])) or '-'}")  # fmt: skip


if __name__ == "__main__":
    main()
