"""Environments: some with other versions of matplotlib, for commands; and what ran in which.

    python benchmarks/environments.py NAME [--record] [--only=ARGUMENTS] -- COMMAND ...

runs a command, as the sessions of noxfile.py do, and ends as it ends. With --record it writes when
it ran, on what, with which versions and how it ended, under that name, into docs/environments.json;
--only says to which part of its tests a session was held.
"""

from __future__ import annotations

import json
import os
import platform
import re
import subprocess
import sys
import time
import venv
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

VERSIONS = ("3.8.4", "3.9.4", "3.10.9", "3.11.2")
ROOT = Path(__file__).parents[1]
RECORDS = ROOT / "docs" / "environments.json"
# Whose versions are recorded.
PACKAGES = ("torch", "numpy", "matplotlib", "pillow", "pytest", "pytest-mpl", "transformers",
            "hypothesis", "pytest-html", "pytest-xdist", "setuptools")  # fmt: skip


def make(version: str, folder: Path) -> Path:
    """Make an environment with one version of matplotlib, and return its Python."""
    venv.create(folder / version, with_pip=True)
    python = folder / version / "bin" / "python"
    packages = [f"matplotlib=={version}", "numpy", "pillow"]
    subprocess.run([python, "-m", "pip", "install", "--quiet", *packages], check=True)
    return python


def run(python: Path, *arguments: str | Path) -> str:
    """Run a script of this checkout, and return what it prints."""
    # Older versions of matplotlib use what newer packages below them have deprecated.
    result = subprocess.run(
        [python, "-W", "ignore", *arguments],
        env={**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests'}"},
        check=True,
        capture_output=True,
        text=True,
    )
    return result.stdout


def installed() -> dict[str, str]:
    """Return the versions of the packages that this Python finds."""
    found = {}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def ended(output: str, status: int) -> str:
    """Say how a command ended: the counts in pytest's last line, an exit status that is not 0."""
    lines = re.findall(r"^=* ?(\d+ \w+.*) in [\d.]+s", output, re.M)
    counted = re.findall(r"\d+ (?:passed|failed|skipped|errors?)", lines[-1] if lines else "")
    failed = [f"exit status {status}"] if status else []
    return ", ".join([*counted, *failed]) or "ran"


def main() -> int:
    """Run a command, show what it prints, and record how it ended."""
    cut = sys.argv.index("--")
    name, *flags = sys.argv[1:cut]
    started, lines = time.monotonic(), []
    with subprocess.Popen(sys.argv[cut + 1 :], stdout=subprocess.PIPE, encoding="utf-8") as process:
        for line in process.stdout or ():
            print(line, end="", flush=True)
            lines.append(line)
    record = {
        "date": datetime.now(timezone.utc).date().isoformat(),
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "versions": installed(),
        "only": next((one.removeprefix("--only=") for one in flags if "--only=" in one), ""),
        "ended": ended("".join(lines), process.returncode),
        "minutes": round((time.monotonic() - started) / 60, 1),
    }
    print(json.dumps(record))
    if "--record" in flags:
        known = json.loads(RECORDS.read_text(encoding="utf-8")) if RECORDS.exists() else {}
        text = json.dumps({**known, name: record}, indent=2, sort_keys=True)
        RECORDS.write_text(f"{text}\n", encoding="utf-8")
    return process.returncode


if __name__ == "__main__":
    sys.exit(main())
