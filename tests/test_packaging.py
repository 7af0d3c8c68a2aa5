"""What is built of the project is whole, and what it claims was run."""

import json
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from email import message_from_bytes
from email.policy import default
from fnmatch import fnmatch

import pytest
from pages import ROOT

# What a clone holds and the sdist need not; what is left of work in either.
NOT_IN_SDIST = {".ci/run", ".gitignore"}
LEFT = (".[!gp]*", ".git", ".pytest_cache", "*.egg-info", "*.pyc", "attn-artifacts", "build",
        "demo-report", "dist", "site")  # fmt: skip


def files_of(folder):
    """The files of the project: in a clone, those that git knows."""
    found = subprocess.run(["git", "ls-files"], cwd=folder, capture_output=True, text=True)
    if (folder / ".git").exists() and found.returncode == 0:
        return set(found.stdout.splitlines()) - NOT_IN_SDIST
    files = (path.relative_to(folder) for path in folder.rglob("*") if path.is_file())
    return {path.as_posix() for path in files if not any(map(is_left, path.parts))}


def is_left(part):
    """Whether a file or folder of that name is what work has left behind."""
    return any(fnmatch(part, pattern) for pattern in LEFT)


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """A copy of the project, its sdist unpacked, and its wheel, which is built of the sdist."""
    pytest.importorskip("build")
    folder = tmp_path_factory.mktemp("packaging")
    copy, dist = folder / "project", folder / "dist"
    shutil.copytree(ROOT, copy, ignore=shutil.ignore_patterns(*LEFT))
    files = files_of(ROOT)
    command = [sys.executable, "-W", "ignore", "-m", "build", "--no-isolation"]
    made = subprocess.run([*command, "--outdir", dist, copy], capture_output=True, text=True)
    assert made.returncode == 0, made.stderr[-2000:]
    (wheel,), (sdist,) = dist.glob("*.whl"), dist.glob("*.tar.gz")
    with tarfile.open(sdist) as packed:
        packed.extraction_filter = getattr(tarfile, "data_filter", None)
        packed.extractall(folder / "sdist")
    (unpacked,) = (folder / "sdist").iterdir()
    with zipfile.ZipFile(wheel) as packed:
        contents = {name: packed.read(name) for name in packed.namelist()}
    return files, unpacked, contents, dist


def metadata_of(contents):
    (name,) = (name for name in contents if name.endswith(".dist-info/METADATA"))
    return message_from_bytes(contents[name], policy=default)


def test_the_sdist_holds_all_that_a_clone_holds(built):
    files, unpacked, _, _ = built
    packed = {path.relative_to(unpacked).as_posix() for path in unpacked.rglob("*")}
    assert files <= packed, sorted(files - packed)
    assert {"Makefile", ".github/workflows/test.yml", "tests/test_packaging.py"} <= files
    assert not any(".pyc" in name for name in packed)


def test_the_wheel_holds_the_package_its_types_and_nothing_else(built):
    files, _, contents, _ = built
    ours = {name for name in files if name.startswith("pytest_attnheat/")}
    assert {name for name in contents if ".dist-info/" not in name} == ours
    assert "pytest_attnheat/py.typed" in ours


def test_metadata_says_what_an_index_shows(built):
    metadata = metadata_of(built[2])
    urls = dict(entry.split(", ") for entry in metadata.get_all("Project-URL"))
    assert set(urls) == {"Changelog", "Documentation", "Issues", "Source"}
    assert all(url.startswith("https://") for url in urls.values())
    assert metadata["Description-Content-Type"] == "text/markdown"
    assert metadata["License-Expression"] == "MIT"
    assert metadata["License-File"] == "LICENSE"
    assert "Framework :: Pytest" in metadata.get_all("Classifier")
    assert len(metadata["Keywords"].split(",")) > 5


def test_an_index_shows_a_readme_whose_links_lead_to_files_of_this_version(built):
    metadata = metadata_of(built[2])
    text, version = metadata.get_payload(), metadata["Version"]
    urls = dict(entry.split(", ") for entry in metadata.get_all("Project-URL"))
    inside = set(re.findall(r"^#+ (.+)$", text, re.M))
    pictures = 0
    for picture, target in re.findall(r"(!?)\[[^\[\]]*\]\(([^)]+)\)", text):
        if target.startswith("#"):
            assert target[1:] in {title.lower().replace(" ", "-") for title in inside}, target
        elif target.startswith(urls["Source"]):
            kind, tag, path = target.removeprefix(f"{urls['Source']}/").split("/", 2)
            assert (kind, tag) == ("raw" if picture else "blob", f"v{version}"), target
            assert (ROOT / path.partition("#")[0]).is_file(), target
            pictures += bool(picture)
        else:
            assert target.startswith("https://"), target
    assert pictures
    assert text.count("](") == len(re.findall(r"\]\((?:https:|#)", text))


def test_twine_takes_what_is_built(built):
    pytest.importorskip("twine")
    files = [*built[3].glob("*.whl"), *built[3].glob("*.tar.gz")]
    command = [sys.executable, "-W", "ignore", "-m", "twine", "check", "--strict", *files]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("PASSED") == len(files)


def test_hosted_machines_run_sessions_that_exist_and_leave_none_out():
    nox = (ROOT / "noxfile.py").read_text(encoding="utf-8")
    sessions = set(re.findall(r"^@nox\.session.*\ndef (\w+)", nox, re.M))
    hosted = (ROOT / ".github/workflows/test.yml").read_text(encoding="utf-8")
    listed = re.findall(r"session: (?:\[(.+)\]|([\w.-]+))", hosted)
    run = {re.sub(r"-3.*", "", name) for many, one in listed for name in (many or one).split(", ")}
    assert run == sessions


def test_what_pyproject_claims_is_what_was_run():
    """The oldest versions are those of the run with the oldest, the Pythons those of the newest."""
    project = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    claimed = dict(re.findall(r'"([\w-]+)>=([\d.]+)', project))
    records = json.loads((ROOT / "docs/environments.json").read_text(encoding="utf-8"))
    lowest = records["lowest"]["versions"]
    for name in ("torch", "numpy", "matplotlib", "pillow", "pytest", "pytest-mpl", "transformers"):
        padded = f"{claimed[name]}.0.0".split(".")[:3]
        assert lowest[name].split(".")[:3] == padded, name
    assert f'requires-python = ">={records["lowest"]["python"].rpartition(".")[0]}"' in project


@pytest.mark.parametrize(
    ("printed", "status", "ended"),
    [
        ("== 1 failed, 2 passed, 3 skipped, 4 warnings in 65.20s (0:01:05) ==", 1,
         "1 failed, 2 passed, 3 skipped, exit status 1"),
        ("28 passed in 4.66s", 0, "28 passed"),
        ("two lines\nof words", 0, "ran"),
    ],
)  # fmt: skip
def test_a_record_says_how_a_command_ended(printed, status, ended):
    script = [sys.executable, "-W", "ignore", ROOT / "benchmarks/environments.py", "name", "--"]
    command = [sys.executable, "-c", f"print({printed!r}); raise SystemExit({status})"]
    done = subprocess.run([*script, *command], capture_output=True, text=True)
    record = json.loads(done.stdout.splitlines()[-1])
    assert (done.returncode, record["ended"]) == (status, ended)
    assert record["versions"]["pytest"] == pytest.__version__
