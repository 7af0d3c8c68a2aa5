"""Every public name is said once, resolves, and loads nothing before it is used."""

import ast
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest

pytest_attnheat = import_module("pytest_attnheat")  # whose `__all__` no type checker can know
STUB = Path(pytest_attnheat.__file__).with_suffix(".pyi")
ENTRIES = [
    (f"pytest_attnheat.{line.module}", alias)
    for line in ast.parse(STUB.read_text(encoding="utf-8")).body
    if isinstance(line, ast.ImportFrom)
    for alias in line.names
]


def in_a_fresh_interpreter(code):
    command = [sys.executable, "-c", code]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()


@pytest.mark.parametrize(("room", "alias"), ENTRIES, ids=[alias.name for _, alias in ENTRIES])
def test_every_public_name_resolves_to_that_of_its_room(room, alias):
    assert alias.asname == alias.name  # else a type checker takes it for a private one
    value = getattr(pytest_attnheat, alias.name)
    assert value is getattr(sys.modules[room], alias.name)
    assert vars(pytest_attnheat)[alias.name] is value  # and the table is not read again


def test_the_lists_of_names_agree():
    names = ["__version__", *(alias.name for _, alias in ENTRIES)]
    assert pytest_attnheat.__all__ == names
    assert dir(pytest_attnheat) == sorted(set(names))
    assert len(names) == len(set(names))


def test_a_star_import_takes_them_all():
    taken = {}
    exec("from pytest_attnheat import *", taken)
    assert set(taken) - {"__builtins__"} == set(pytest_attnheat.__all__)


@pytest.mark.parametrize("name", ["assert_nothing", "__wrapped__", "_rooms"])
def test_another_name_is_no_attribute(name):
    with pytest.raises(AttributeError, match=f"module 'pytest_attnheat' has no attribute '{name}'"):
        getattr(pytest_attnheat, name)


def test_neither_importing_nor_listing_loads_anything_heavy():
    loaded = in_a_fresh_interpreter(
        "import sys, pytest_attnheat; dir(pytest_attnheat); hasattr(pytest_attnheat, 'nothing')\n"
        "print(*(name.partition('.')[0] for name in sys.modules))"
    )
    assert "pytest_attnheat" in loaded
    assert not {"torch", "numpy", "matplotlib", "pytest"} & set(loaded)


def test_a_name_loads_no_more_than_its_room_needs():
    loaded = in_a_fresh_interpreter(
        "import sys; from pytest_attnheat import read_heatmaps, CaptureError\n"
        "print(*(name.partition('.')[0] for name in sys.modules))"
    )
    assert not {"torch", "pytest"} & set(loaded)
