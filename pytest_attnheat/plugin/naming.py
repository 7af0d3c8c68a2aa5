"""Which baseline belongs to a test."""

from __future__ import annotations

import hashlib
import math
import re
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from ..inputs import dtype_names, meant, misuse

# What a baseline may be.
SUFFIXES = (".png", ".svg")
# And what that of a trace is.
TRACE_SUFFIX = ".attn"
_ARGUMENTS = ("filename", "baseline_dir", "tolerance", "precision", "share")
_LONGEST_NAME = 150
# What pytest-mpl would make another name of: brackets, further suffixes, a last underscore.
_FILENAME = re.compile(r"[A-Za-z0-9 .+=,@_-]*[A-Za-z0-9 .+=,@-]")
_FURTHER_SUFFIX = re.compile(r"\.(png|svg|pdf|eps)", re.IGNORECASE)


class Expected(NamedTuple):
    """Where the baseline of a test lies, and how closely the picture must agree with it."""

    path: Path  # the image file
    tolerance: float | None  # of the data, relative; None for that of the dtype
    precision: tuple[str, ...] = ()  # other dtypes, by name, that it serves
    share: bool = False  # whether several tests may have it


def expected_of(item: pytest.Item, marker: pytest.Mark) -> Expected:
    """Read the marker of a test."""
    unknown = sorted(set(marker.kwargs) - set(_ARGUMENTS))
    if unknown or marker.args:
        given = ", ".join([*map(repr, marker.args), *unknown])
        accepted = f"the keyword arguments {', '.join(_ARGUMENTS)}"
        accepted += meant(next(iter(unknown), None), _ARGUMENTS)
        raise ValueError(misuse("the marker", given, accepted))
    if any(True for _ in item.iter_markers("mpl_image_compare")):
        raise ValueError("the test is marked mpl_image_compare as well; one of them is enough")
    share = marker.kwargs.get("share", False)
    if not isinstance(share, bool):
        raise ValueError(misuse("share", repr(share), "True or False"))
    filename = marker.kwargs.get("filename", stem_of(item, parameters=not share) + ".png")
    folder = marker.kwargs.get("baseline_dir", default_folder(item))
    if not isinstance(folder, (str, Path)):
        raise ValueError(misuse("baseline_dir", repr(folder), "a folder"))
    path = item.config.rootpath / folder / _checked_filename(filename)
    tolerance = checked_tolerance(marker.kwargs.get("tolerance"))
    precision = dtype_names("precision", marker.kwargs.get("precision", ()))
    return Expected(path, tolerance, precision, share)


def _checked_filename(filename: Any) -> str:
    stem, dot, suffix = str(filename).rpartition(".")
    if (
        not isinstance(filename, str)
        or dot + suffix not in SUFFIXES
        or not _FILENAME.fullmatch(stem)
        or _FURTHER_SUFFIX.search(stem)
    ):
        accepted = (
            "a name of letters, digits and any of ' .+=,@_-', not ending in '_', with one ending: "
            ".png or .svg (for folders see baseline_dir=)"
        )
        raise ValueError(misuse("filename", repr(filename), accepted))
    return filename


def checked_tolerance(tolerance: Any) -> float | None:
    """Return a tolerance; ValueError if it is neither None nor a number from 0."""
    if tolerance is None:
        return None
    if not isinstance(tolerance, (int, float)) or not 0 <= tolerance < math.inf:
        raise ValueError(misuse("tolerance", repr(tolerance), "a number from 0"))
    return float(tolerance)


def default_folder(item: pytest.Item) -> Path:
    """Return pytest-mpl's baseline folder if one is set, else baseline_images in the root."""
    config = item.config
    if config.pluginmanager.hasplugin("pytest_mpl"):
        if given := config.getoption("--mpl-baseline-path"):
            relative = config.getoption("--mpl-baseline-relative")
            return Path(item.path.parent if relative else config.invocation_params.dir, given)
        if given := config.getini("mpl-baseline-path"):
            return Path(given)
    return Path("baseline_images")


def stem_of(item: pytest.Item, *, parameters: bool = True, device: bool = False) -> str:
    """Name a test by its module, class, function and parameters, also the device if asked."""
    parts = parts_of(item) if device else parts_for_all_devices(item)
    parts = parts if parameters else parts[:2]
    names = [part for part in parts[0].removesuffix(".py").split("/") if part not in _ANYWHERE]
    return safe_name("-".join([".".join([*names, *parts[1].split("::")]), *parts[2:]]))


# Folders that most projects have their tests in.
_ANYWHERE = ("", ".", "tests", "test")


def parts_of(item: pytest.Item) -> tuple[str, ...]:
    """Return file, name and parameters of a test."""
    file, _, rest = item.nodeid.partition("::")
    callspec = getattr(item, "callspec", None)
    if callspec is None:
        return file, rest
    return file, rest.partition("[")[0], *callspec.id.split("-")


def parts_for_all_devices(item: pytest.Item) -> tuple[str, ...]:
    """Return file, name and parameters of a test, without the device."""
    parts = list(parts_of(item))
    given = getattr(getattr(item, "callspec", None), "params", {})
    device = str(given.get("attn_device", ""))
    if device in parts[2:]:
        del parts[parts.index(device, 2)]
    return tuple(parts)


def safe_name(name: str) -> str:
    """Return a name of a file that is valid and unique on every file system."""
    safe = _FURTHER_SUFFIX.sub(r"_\1", re.sub(r"[^A-Za-z0-9._-]+", "_", name))
    safe = safe.strip("_.")[:_LONGEST_NAME].rstrip("_.")
    if safe != name:
        safe = f"{safe}-{hashlib.sha256(name.encode('utf-8', 'backslashreplace')).hexdigest()[:8]}"
    return safe
