"""Run on a GPU what only a GPU can show, and write it down: python benchmarks/gpu.py.

It takes at most eight minutes on a machine with torch and a GPU. What else it needs and does not
find is installed into an environment of its own, beside the torch that is there. Each part has a
time limit, and the report is written after each, so that a run that is cut off leaves what it had.
Without a GPU it says so, and does nothing.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import importlib.metadata
import importlib.util
import json
import os
import platform
import re
import signal
import site
import subprocess
import sys
import tempfile
import time
import venv
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[1]
TOTAL, INSTALLING = 470, 80  # seconds, of eight minutes
# What the tests and benchmarks import, beside torch, and what it is installed as.
NEEDED = {
    "numpy": "numpy",
    "matplotlib": "matplotlib>=3.8",
    "PIL": "pillow>=10",
    "pytest": "pytest>=8",
    "pytest_mpl": "pytest-mpl>=0.17",
    "transformers": "transformers>=4.53",
}
ENVIRONMENT = ROOT / ".venv-gpu"
_FIRST_LINES = 12
NOTES = "## What was found\n"  # and what stands below it is kept


@dataclass(frozen=True)
class Part:
    """One thing to run.

    Attributes:
        name: What it is called in the report.
        limit: How many seconds it may take.
        arguments: What Python is called with.
    """

    name: str
    limit: float
    arguments: tuple[str, ...]


@dataclass(frozen=True)
class Outcome:
    """What came of a part.

    Attributes:
        part: The part.
        status: The exit status; None if its time was up.
        seconds: How long it took.
        text: What it printed.
    """

    part: Part
    status: int | None
    seconds: float
    text: str

    @property
    def said(self) -> str:
        """How it ended, in words."""
        if self.status is None:
            return f"cut off after {self.seconds:.0f} s"
        return "ran" if self.status == 0 else f"failed (exit status {self.status})"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run all parts; return 0 if all of them ran, or if there is no GPU."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=_Raw)
    parser.add_argument("--device", default="cuda", help="default: cuda")
    parser.add_argument("--output", type=Path, default=ROOT / "docs" / "gpu.md")
    parser.add_argument("--dry-run", action="store_true", help="collect tests, try tiny sizes")
    given = parser.parse_args(arguments)
    if not is_here(given.device):
        print(f"{given.device}: not a device that torch can use here; nothing was run")
        print("with one, it would run:")
        for part in parts_of(given.device, dry_run=given.dry_run):
            print(f"  {part.name}, {part.limit:.0f} s at most: {' '.join(part.arguments)}")
        return 0
    started = time.monotonic()
    python, notes = ready_python()
    machine = {**describe(python, given.device), **notes}
    if given.dry_run:
        machine["dry run"] = "tests were collected only, and the sizes are tiny"
    parts = parts_of(given.device, dry_run=given.dry_run)
    outcomes: list[Outcome] = []
    for part in parts:
        write(given.output, machine, parts, outcomes)
        left = TOTAL - (time.monotonic() - started)
        print(f"{part.name} ...", flush=True)
        outcomes.append(run(python, part, min(part.limit, left)))
        print(f"{part.name}: {outcomes[-1].said}, {outcomes[-1].seconds:.0f} s", flush=True)
    write(given.output, machine, parts, outcomes)
    print(f"written: {given.output}")
    return int(any(outcome.status != 0 for outcome in outcomes))


class _Raw(argparse.RawDescriptionHelpFormatter):
    pass


def is_here(device: str) -> bool:
    """Whether torch can use a device."""
    if importlib.util.find_spec("torch") is None:
        return False
    import torch

    kind = torch.device(device).type
    return kind == "cpu" or bool(getattr(torch, kind).is_available())


def parts_of(device: str, *, dry_run: bool) -> list[Part]:
    """What is run, the most telling first. The limits add up to less than the whole."""
    tests = (ROOT / "tests").glob("test_*.py")
    marked = sorted(
        str(path.relative_to(ROOT))
        for path in tests
        if re.search(r"accelerator|mark\.cuda", path.read_text(encoding="utf-8"))
    )
    how = ("--collect-only", "-q") if dry_run else ("-v", "--tb=short")
    options = ("-m", "cuda", "-W", "default", "--continue-on-collection-errors", *how)
    if not dry_run and importlib.util.find_spec("xdist"):  # a kernel waits for its compiler mostly
        workers = str(min(14, max(1, (os.cpu_count() or 1) - 2)))
        options += ("-n", workers, "--dist", "worksteal")
    quick = ("--quick",) if dry_run else ()

    def benchmark(name: str) -> tuple[str, ...]:
        return (str(ROOT / "benchmarks" / f"{name}.py"), "--device", device, *quick)

    return [
        Part("waits and bandwidth", 20, benchmark("waits")),
        Part("tests", 200, ("-m", "pytest", *options, *marked)),
        Part("rows", 20, benchmark("bench_rows")),
        Part("long sequences", 40, benchmark("bench_scale")),
        Part("capture", 60, benchmark("bench_capture")),
        Part("heatmaps", 50, benchmark("bench_heatmaps")),
    ]


def ready_python() -> tuple[str, dict[str, str]]:
    """Return a Python that has what is needed, as far as it can be had, and what to say of it."""
    missing = [what for name, what in NEEDED.items() if importlib.util.find_spec(name) is None]
    if not missing:
        return sys.executable, {}
    print("installing", ", ".join(missing), flush=True)
    try:
        venv.create(ENVIRONMENT, system_site_packages=True, with_pip=True)
        python = str(ENVIRONMENT / "bin" / "python")
        found = subprocess.run(
            [python, "-c", "import site; print(site.getsitepackages()[0])"],
            check=True, capture_output=True, text=True,
        )  # fmt: skip
        # The torch that is here may be in an environment itself, which a new one does not see.
        here = [*site.getsitepackages(), site.getusersitepackages()]
        lines = [f"import site; site.addsitedir({path!r})\n" for path in here]
        Path(found.stdout.strip(), "of_torch.pth").write_text("".join(lines), encoding="utf-8")
        with tempfile.NamedTemporaryFile("w", suffix=".txt") as constraints:
            constraints.writelines(f"{name}=={version}\n" for name, version in _kept().items())
            constraints.flush()
            command = ["-m", "pip", "install", "--quiet", "-c", constraints.name, *missing]
            subprocess.run([python, *command], check=True, timeout=INSTALLING, capture_output=True)
    except (OSError, subprocess.SubprocessError) as error:
        return sys.executable, {"not installed": f"{', '.join(missing)} ({type(error).__name__})"}
    return python, {"installed for this run": ", ".join(missing)}


def _kept() -> dict[str, str]:
    """The versions that an installation must not change."""
    kept = {}
    for name in ("torch", "numpy", "triton"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            kept[name] = importlib.metadata.version(name)
    return kept


DESCRIBE = """
import json, sys, torch
from importlib.metadata import PackageNotFoundError, version
device, names = torch.device(sys.argv[1]), sys.argv[2:]
told = {"device": str(device), "torch": torch.__version__}
if device.type == "cuda":
    properties = torch.cuda.get_device_properties(device)
    told["device"] = f"{properties.name}, {properties.total_memory / 2**30:.0f} GiB"
    told["CUDA"] = str(torch.version.cuda or torch.version.hip)
for name in names:
    try:
        told[name] = version(name)
    except PackageNotFoundError:
        told[name] = "not installed"
print(json.dumps(told))
"""


def describe(python: str, device: str) -> dict[str, str]:
    """Say on what device and with which versions it runs."""
    names = ("numpy", "matplotlib", "pytest", "transformers")
    told = subprocess.run(
        [python, "-c", DESCRIBE, device, *names], check=True, capture_output=True, text=True
    )
    commit = subprocess.run(
        ["git", "describe", "--always", "--dirty"], cwd=ROOT, capture_output=True, text=True
    )
    return {
        **json.loads(told.stdout.splitlines()[-1]),
        "Python": platform.python_version(),
        "commit": commit.stdout.strip() or "unknown",
        "date": datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d"),
    }


def run(python: str, part: Part, limit: float) -> Outcome:
    """Run a part for at most so many seconds, with all processes that it starts."""
    started = time.monotonic()
    if limit <= 0:
        return Outcome(part, None, 0.0, "")
    paths = [ROOT, ROOT / "tests", os.environ.get("PYTHONPATH", "")]
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(str(path) for path in paths if str(path)),
        "PYTHONUNBUFFERED": "1",
    }
    if not _is_installed(python):
        environment["PYTEST_PLUGINS"] = "pytest_attnheat.plugin"
    with tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace") as output:
        process = subprocess.Popen(
            [python, *part.arguments], cwd=ROOT, env=environment, stdin=subprocess.DEVNULL,
            stdout=output, stderr=subprocess.STDOUT, start_new_session=True,
        )  # fmt: skip
        try:
            status: int | None = process.wait(limit)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            status = None
        output.seek(0)
        text = output.read()
    return Outcome(part, status, time.monotonic() - started, text)


def _is_installed(python: str) -> bool:
    """Whether pytest finds the plugin by itself."""
    ask = "from importlib.metadata import version; version('pytest-attnheat')"
    return subprocess.run([python, "-c", ask], capture_output=True).returncode == 0


def write(path: Path, machine: dict[str, str], parts: Sequence[Part], done: list[Outcome]) -> None:
    """Write the report, as far as it has come."""
    by_part = {outcome.part: outcome for outcome in done}
    lines = ["# On a GPU", "", "Written by `make gpu`, which runs it anew.", ""]
    lines += ["| | |", "|---|---|", *(f"| {name} | {told} |" for name, told in machine.items()), ""]
    lines += ["## What ran", "", "| part | how it ended | seconds |", "|---|---|---|"]
    for part in parts:
        outcome = by_part.get(part)
        ended = ("not reached", "") if outcome is None else (outcome.said, f"{outcome.seconds:.0f}")
        lines.append(f"| {part.name} | {' | '.join(ended)} |")
    for outcome in done:
        lines += ["", f"## {outcome.part.name.capitalize()}", "", *_shown(outcome)]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(lines) + f"\n{_notes(path)}", encoding="utf-8")


def _notes(path: Path) -> str:
    """What somebody wrote below the report of before."""
    before = path.read_text(encoding="utf-8") if path.exists() else ""
    _, mark, notes = before.partition(NOTES)
    return f"\n{mark}{notes}" if mark else ""


def _shown(outcome: Outcome) -> list[str]:
    if "pytest" in outcome.part.arguments:
        return _tests_shown(outcome)
    lines = outcome.text.strip().splitlines()
    if outcome.status != 0:
        lines = [*lines[:_FIRST_LINES], "...", *lines[-_FIRST_LINES:]]
    return ["```", *lines, "```"]


def _tests_shown(outcome: Outcome) -> list[str]:
    """Count the tests, and give the first lines of each that failed."""
    # Of one process, and of several.
    line = r"^tests/\S+::.* {word}\b|^\[gw\d+\].* {word} tests/"
    counts = {
        word: len(re.findall(line.format(word=word), outcome.text, re.MULTILINE))
        for word in ("PASSED", "FAILED", "ERROR", "SKIPPED")
    }
    lines = [", ".join(f"{count} {word.lower()}" for word, count in counts.items() if count)]
    collected = re.search(r"^.*tests collected.*$", outcome.text, re.MULTILINE)
    if collected:
        lines = [collected[0].strip("= ")]
    failed = re.split(r"^_+ (test_.+?) _+$", outcome.text, flags=re.MULTILINE)[1:]
    for name, told in zip(failed[::2], failed[1::2], strict=True):
        errors = re.findall(r"^E .*$|^\S+\.py:\d+: .*$", told, re.MULTILINE)
        lines += ["", f"`{name}`", "", "```", *errors[:_FIRST_LINES], "```"]
    if not any(counts.values()) and not collected:
        lines = ["```", *outcome.text.strip().splitlines()[-_FIRST_LINES:], "```"]
    return lines


if __name__ == "__main__":
    sys.exit(main())
