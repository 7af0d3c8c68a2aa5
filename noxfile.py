"""Test with what `make test` does not: other versions, other plugins, the wheel.

`nox -l` lists the sessions; each says on which Python it runs. Those that run without a name are
the ones of hosted machines. `nox -s NAME -- --record` writes what was run, when, with which
versions and how it ended into docs/environments.json, which `make docs` makes a table of; all else
behind the `--` goes to pytest.
"""

import shutil
import tarfile
from pathlib import Path

import nox

ROOT = Path(__file__).parent
PROJECT = nox.project.load_toml(ROOT / "pyproject.toml")["project"]
PYTHONS = ["3.10", "3.11", "3.12", "3.13"]
# Those that people have beside it, and that hook into the same places; but pytest-asyncio, which
# warns of each run that does not configure it, and pytest-randomly, which changes what tests of
# the order of tests find.
PLUGINS = [
    "hypothesis",
    "pytest-benchmark",
    "pytest-cov",
    "pytest-mock",
    "pytest-order",
    "pytest-rerunfailures",
    "pytest-timeout",
    "syrupy",
]

nox.options.sessions = ["lint", "current", "headless", "wheel", "sdist"]
nox.options.default_venv_backend = "uv|virtualenv"


def install_pinned(session: nox.Session, *more: str) -> None:
    """Install the project as `make test` does."""
    session.install("-c", "constraints.txt", "-e", ".[test]", *more)


def run(session: nox.Session, *command: str, **options: object) -> None:
    """Run a command, and record how it ended where that was asked for."""
    asked = [one for one in session.posargs if one != "--record"]
    flags = ["--record"] * (len(asked) < len(session.posargs))
    flags += [f"--only={' '.join(asked)}"] * bool(asked)
    script = str(ROOT / "benchmarks" / "environments.py")
    session.run("python", script, session.name, *flags, "--", *command, *asked, **options)


def build(session: nox.Session) -> Path:
    """Build the sdist, and the wheel of what is in it, into a folder of the session."""
    folder = Path(session.create_tmp()).resolve()
    shutil.rmtree(folder / "dist", ignore_errors=True)
    session.install("-c", "constraints.txt", "build")
    session.run("python", "-m", "build", "--outdir", str(folder / "dist"), str(ROOT))
    return folder


@nox.session
def lint(session: nox.Session) -> None:
    """The linter, the formatter and the type checker."""
    install_pinned(session)
    session.run("ruff", "check", ".")
    session.run("ruff", "format", "--check", ".")
    session.run("mypy")


@nox.session
def current(session: nox.Session) -> None:
    """All tests and all of their long matrices, with the pinned versions."""
    install_pinned(session)
    run(session, "pytest", "-n", "2", "--dist", "worksteal", "--mpl", env={"ATTNHEAT_MATRIX": "1"})


@nox.session(python="3.10")
def lowest(session: nox.Session) -> None:
    """The tests, with the oldest version of each dependency that is supported."""
    ranges = [*PROJECT["dependencies"], *PROJECT["optional-dependencies"]["test"]]
    oldest = [one.replace(">=", "==") for one in ranges if ">=" in one and "setuptools" not in one]
    # matplotlib of that time calls what newer versions of pyparsing warn of.
    session.install("-e", ".[test]", "pyparsing<3.2", *oldest)
    # Old versions warn of what newer ones of Python and NumPy have changed.
    run(session, "pytest", "-n", "2", "--dist", "worksteal", "-W", "default")


@nox.session(python=PYTHONS)
def newest(session: nox.Session) -> None:
    """The tests, with the newest version of everything."""
    session.install("--upgrade", "-e", ".[test]")
    run(session, "pytest", "-n", "2", "--dist", "worksteal")


@nox.session
def plugins_together(session: nox.Session) -> None:
    """The tests of the plugin, in runs that have other plugins as well."""
    install_pinned(session, *PLUGINS)
    files = [f"tests/test_{name}.py" for name in ("plugin", "fixtures", "baselines", "updates")]
    run(session, "pytest", "-n", "2", *files)


@nox.session
def headless(session: nox.Session) -> None:
    """The examples, where matplotlib is told to open windows and no window can be opened."""
    install_pinned(session)
    session.chdir("examples")
    run(session, "pytest", env={"MPLBACKEND": "tkagg", "DISPLAY": "", "WAYLAND_DISPLAY": ""})


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
    run(session, "python", "benchmarks/capture_zoo.py", "--results", str(results), "--slice", "60")


@nox.session
def libraries(session: nox.Session) -> None:
    """The examination of attention of other libraries, and of Keras on two of them."""
    install_pinned(session, "-e", ".[libraries]")
    tests = "tests/test_conventions_libraries.py"
    run(session, "pytest", tests)
    session.run("pytest", tests, "-k", "keras", env={"KERAS_BACKEND": "jax"})


@nox.session
def wheel(session: nox.Session) -> None:
    """Build the wheel, install it beside nothing of the repository, and use it in a project."""
    folder = build(session)
    (built,) = (folder / "dist").glob("*.whl")
    session.install("-c", "constraints.txt", "--force-reinstall", str(built), "mypy")
    project = folder / "project"
    shutil.copytree(
        ROOT / "examples", project, ignore=shutil.ignore_patterns("*minilm*"), dirs_exist_ok=True
    )
    session.chdir(project)
    run(session, "pytest", "--strict-markers")
    session.run(
        "mypy",
        "--config-file=",
        "--strict",
        "-c",
        "from pytest_attnheat import assert_row_stochastic",
    )


@nox.session
def sdist(session: nox.Session) -> None:
    """Build the sdist, unpack it, and run the tests that are in it with nothing else at hand."""
    folder = build(session)
    (built,) = (folder / "dist").glob("*.tar.gz")
    shutil.rmtree(folder / "unpacked", ignore_errors=True)
    with tarfile.open(built) as packed:
        packed.extractall(folder / "unpacked")
    session.chdir(folder / "unpacked" / built.name.removesuffix(".tar.gz"))
    session.install("-c", "constraints.txt", ".[test]")
    run(session, "pytest", "-n", "2", "--dist", "worksteal")


@nox.session
def docs(session: nox.Session) -> None:
    """Build the site of the docs, where a dead link is an error."""
    session.install("-c", "constraints.txt", "-e", ".[docs]")
    session.run("mkdocs", "build", "--strict")
