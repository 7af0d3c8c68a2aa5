"""Environments with other versions of matplotlib, for commands that compare them."""

from __future__ import annotations

import os
import subprocess
import venv
from pathlib import Path

VERSIONS = ("3.8.4", "3.9.4", "3.10.9", "3.11.2")
ROOT = Path(__file__).parents[1]


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
