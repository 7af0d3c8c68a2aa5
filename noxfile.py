"""Test with what `make test` does not: other versions, other plugins, the wheel.

`nox -l` lists the sessions. Those that run without a name are the ones of hosted machines.
"""

import re
import shutil
from pathlib import Path

import nox

ROOT = Path(__file__).parent
PROJECT = nox.project.load_toml(ROOT / "pyproject.toml")["project"]
PYTHONS = ["3.10", "3.11", "3.12", "3.13"]
# Those that people have beside it, and that hook into the same places.
PLUGINS = [
    "hypothesis",
    "pytest-asyncio",
    "pytest-benchmark",
    "pytest-cov",
    "pytest-randomly",
    "pytest-rerunfailures",
    "pytest-timeout",
    "syrupy",
]

nox.options.sessions = ["lint", "tests", "wheel"]
nox.options.default_venv_backend = "uv|virtualenv"


def install_pinned(session: nox.Session, *more: str) -> None:
    """Install the project as `make test` does."""
    session.install("-c", "constraints.txt", "-e", ".[test]", *more)


@nox.session
def lint(session: nox.Session) -> None:
    """The linter, the formatter and the type checker."""
    install_pinned(session)
    session.run("ruff", "check", ".")
    session.run("ruff", "format", "--check", ".")
    session.run("mypy")


@nox.session
def tests(session: nox.Session) -> None:
    """All tests, with the pinned versions."""
    install_pinned(session)
    session.run("pytest", "-n", "2", *session.posargs)


@nox.session(python="3.10")
def lowest(session: nox.Session) -> None:
    """All tests, with the oldest version of each dependency that is supported."""
    oldest = [re.sub(">=", "==", dependency) for dependency in PROJECT["dependencies"]]
    session.install("-e", ".[test]", *oldest)
    # Old versions warn of what newer ones of Python and NumPy have changed.
    session.run("pytest", "-n", "2", "-W", "default", *session.posargs)


@nox.session(python=PYTHONS)
def newest(session: nox.Session) -> None:
    """All tests, with the newest version of everything."""
    session.install("--upgrade", "-e", ".[test]")
    session.run("pytest", "-n", "2", *session.posargs)


@nox.session
def plugins_together(session: nox.Session) -> None:
    """The tests of the plugin, in runs that have other plugins as well."""
    install_pinned(session, *PLUGINS)
    files = [f"tests/test_{name}.py" for name in ("plugin", "fixtures", "baselines", "updates")]
    # The tests themselves in their order; the runs that they start, with all that is installed.
    session.run("pytest", "-n", "2", "-p", "no:randomly", *files, *session.posargs)


@nox.session
def lazy(session: nox.Session) -> None:
    """Weights that never exist beside the whole tensor, on 500 random cases of each question."""
    install_pinned(session)
    session.run("pytest", "tests/test_lazy.py", *session.posargs, env={"ATTNHEAT_CASES": "500"})


@nox.session
def zoo(session: nox.Session) -> None:
    """Capture sixty model types of transformers, and hold each against every softmax that ran."""
    install_pinned(session)
    results = Path(session.create_tmp(), "zoo.jsonl").resolve()
    asked = session.posargs or ["--slice", "60"]
    session.run("python", "benchmarks/capture_zoo.py", "--results", str(results), *asked)


@nox.session
def libraries(session: nox.Session) -> None:
    """The examination of attention of other libraries, and of Keras on two of them."""
    install_pinned(session, "-e", ".[libraries]")
    tests = "tests/test_conventions_libraries.py"
    session.run("pytest", tests, *session.posargs)
    session.run("pytest", tests, "-k", "keras", env={"KERAS_BACKEND": "jax"})


@nox.session
def wheel(session: nox.Session) -> None:
    """Build the wheel, install it beside nothing of the repository, and use it in a project."""
    folder = Path(session.create_tmp()).resolve()
    shutil.rmtree(folder / "dist", ignore_errors=True)
    session.install("-c", "constraints.txt", "build")
    session.run("python", "-m", "build", "--outdir", str(folder / "dist"), str(ROOT))
    (built,) = (folder / "dist").glob("*.whl")
    session.install("-c", "constraints.txt", "--force-reinstall", str(built), "mypy")
    project = folder / "project"
    shutil.copytree(
        ROOT / "examples", project, ignore=shutil.ignore_patterns("*minilm*"), dirs_exist_ok=True
    )
    session.chdir(project)
    session.run("pytest", "--strict-markers")
    session.run(
        "mypy",
        "--config-file=",
        "--strict",
        "-c",
        "from pytest_attnheat import assert_row_stochastic",
    )
