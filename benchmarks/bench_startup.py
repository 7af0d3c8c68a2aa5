"""What the plugin costs a run that uses nothing of it.

    python benchmarks/bench_startup.py [PROCESSES]

Runs `pytest --collect-only` in an empty folder with and without the plugin, in turns, and prints
the median of the paired differences. pytest-mpl is switched off in both: it loads matplotlib.

Each process makes several runs and forgets the plugin's modules after each: starting an
interpreter and importing pytest takes a hundred times what is measured, and would drown it. What
the plugin loads beyond its own modules is printed too, as that is paid once per process only.
Bytecode is cached, as it is in any installation.
"""

import contextlib
import io
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest

ALLOWED_MS = 5.0
PAIRS = 10
COMMAND = ["--collect-only", "-q", "-p", "no:pytest_mpl", "-p", "no:cacheprovider"]


def milliseconds(*options: str) -> tuple[float, set[str]]:
    """Time one run of pytest; return also the names of the modules that it loaded."""
    before = set(sys.modules)
    with contextlib.redirect_stdout(io.StringIO()) as output:
        start = time.perf_counter()
        code = pytest.main([*COMMAND, *options])
        elapsed = time.perf_counter() - start
    if code != pytest.ExitCode.NO_TESTS_COLLECTED:
        raise SystemExit(output.getvalue())
    loaded = set(sys.modules) - before
    for name in loaded:
        if name.partition(".")[0] == "pytest_attnheat":
            del sys.modules[name]
    return 1000 * elapsed, loaded


def pairs() -> dict[str, list[float] | list[str]]:
    """Time pairs of runs in this process."""
    milliseconds("-p", "no:attnheat")
    _, loaded = milliseconds()
    if "pytest_attnheat.plugin" not in loaded:
        raise SystemExit("the plugin is not installed here")
    without, differences = [], []
    for number in range(PAIRS):
        # Alternate which comes first, so that neither profits from the other.
        pair = {}
        for plugin in (True, False) if number % 2 else (False, True):
            pair[plugin], _ = milliseconds(*([] if plugin else ["-p", "no:attnheat"]))
        without.append(pair[False])
        differences.append(pair[True] - pair[False])
    others = [name for name in loaded if name.partition(".")[0] != "pytest_attnheat"]
    return {"without": without, "differences": differences, "others": others}


def main(processes: int) -> None:
    """Gather pairs from fresh processes, print the cost and fail if it is more than allowed."""
    found: dict[str, list] = {"without": [], "differences": [], "others": []}
    with tempfile.TemporaryDirectory() as folder, tempfile.TemporaryDirectory() as cache:
        environment = {**os.environ, "PYTHONPYCACHEPREFIX": cache}
        environment.pop("PYTHONDONTWRITEBYTECODE", None)  # it would compile the plugin each time
        environment.pop("PYTHONDONTWRITEBYTECODE", None)
        command = [sys.executable, str(Path(__file__).resolve()), "--pairs"]
        for _ in range(processes):
            output = subprocess.check_output(command, cwd=folder, env=environment)
            for name, numbers in json.loads(output).items():
                found[name] += numbers
    cost = statistics.median(found["differences"])
    low, _, high = statistics.quantiles(found["differences"], n=4)
    base = statistics.median(found["without"])
    print(f"a run without the plugin  {base:6.1f} ms (median of {len(found['without'])})")
    print(f"the plugin adds           {cost:6.1f} ms (quartiles {low:.1f} to {high:.1f})")
    print(f"allowed                   {ALLOWED_MS:6.1f} ms")
    print(f"modules of others loaded  {', '.join(sorted(set(found['others']))) or 'none'}")
    raise SystemExit(cost > ALLOWED_MS)


if __name__ == "__main__":
    if sys.argv[1:] == ["--pairs"]:
        print(json.dumps(pairs()))
    else:
        main(int(sys.argv[1]) if len(sys.argv) > 1 else 20)
