"""Are panels the same bytes under every supported matplotlib?

    python benchmarks/matplotlib_versions.py

Makes an environment for each version, draws the figures of `tests/panel_figures.py` under it,
and compares the hashes of their panels. Exits with 1 where they differ.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

from environments import ROOT, VERSIONS, make, run


def hashes(version: str, folder: Path) -> dict[str, str]:
    """Return the hash of each figure's panels under one version of matplotlib."""
    output = run(make(version, folder), ROOT / "tests" / "panel_figures.py")
    lines = (line.split("\t") for line in output.splitlines())
    return {name: digest for _, name, digest in lines}


def main() -> int:
    """Print a table of figures by versions."""
    with tempfile.TemporaryDirectory() as folder:
        found = {version: hashes(version, Path(folder)) for version in VERSIONS}
    print(f"{'':<22}", *(f"{version:<12}" for version in VERSIONS))
    names = found[VERSIONS[-1]]
    for name in names:
        print(f"{name:<22}", *(f"{found[version][name]:<12}" for version in VERSIONS))
    same = all(hashes == names for hashes in found.values())
    print(f"panels of {len(names)} pictures " + ("are the same bytes" if same else "DIFFER"))
    return 0 if same else 1


if __name__ == "__main__":
    sys.exit(main())
