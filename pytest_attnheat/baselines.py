"""A picture against its baseline, by the marker `heatmap_compare`.

Under `--mpl` the comparison is pytest-mpl's, with its reports. Without it the same images are
compared all the same: a marked test never passes without having compared something.
"""

from __future__ import annotations

import functools
import hashlib
import re
import sys
import tempfile
from collections.abc import Generator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

_MARKER = (
    "heatmap_compare(filename=, baseline_dir=, tolerance=): compare the figure that this test "
    "returns with its baseline image, with and without --mpl. One baseline serves all devices; "
    "it lies in mpl-baseline-path (default: baseline_images), named after the test. tolerance is "
    "the root mean square of the pixel differences, of 255 (default: 0.1). "
    "--mpl-generate-path writes baselines."
)
_ARGUMENTS = ("filename", "baseline_dir", "tolerance")
# pytest-mpl's own default, 2, does not see a transposed head in a large grid.
_TOLERANCE = 0.1
_LONGEST_NAME = 150


@dataclass(frozen=True)
class Baseline:
    """Where the baseline of a test lies, and how closely the picture must agree with it.

    Attributes:
        path: the image file.
        tolerance: largest root mean square difference of all pixels, on a scale to 255.
    """

    path: Path
    tolerance: float


_BASELINE = pytest.StashKey[Baseline]()


def pytest_configure(config: pytest.Config) -> None:
    """Register the marker."""
    config.addinivalue_line("markers", _MARKER)


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Give every marked test its baseline, and hand it to pytest-mpl.

    Raises:
        pytest.UsageError: Unknown marker arguments, or two tests that share a file.
    """
    tests_of: dict[str, str] = {}
    for item in items:
        marker = item.get_closest_marker("heatmap_compare")
        if marker is None:
            continue
        baseline = _baseline(config, item, marker)
        name = _name_for_all_devices(item)
        # Some file systems tell upper from lower case and some do not.
        other = tests_of.setdefault(str(baseline.path).casefold(), name)
        if other != name:
            raise pytest.UsageError(
                f"heatmap_compare: {name} and {other} share the baseline {baseline.path}; "
                "give one of them another filename="
            )
        item.stash[_BASELINE] = baseline
        if config.pluginmanager.hasplugin("pytest_mpl"):
            item.add_marker(
                pytest.mark.mpl_image_compare(
                    style="default",
                    backend="agg",
                    deterministic=True,
                    filename=baseline.path.name,
                    baseline_dir=str(baseline.path.parent),
                    tolerance=baseline.tolerance,
                )
            )


# Outside of pytest-mpl's wrapper, which swallows what the test returns.
@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_runtest_call(item: pytest.Item) -> Generator[None, Any, Any]:
    """Run a test, and compare the figure that it returns with its baseline."""
    baseline = item.stash.get(_BASELINE, None)
    if baseline is None or not isinstance(item, pytest.Function):
        return (yield)
    figures: list[Any] = []
    function, name = item.obj, item.name
    by_mpl = _is_mpl_active(item.config)
    item.obj = _catching(function, figures, by_mpl)
    if "/" in name:
        # pytest-mpl makes a folder of the name, and fails on slashes in parameters.
        item.name = _safe_name(name)
    try:
        if by_mpl:
            result = yield
        else:
            # As pytest-mpl does: the user's style must not show in a baseline.
            from matplotlib import style

            with style.context("default", after_reset=True):
                result = yield
                _compare_images(item, figures, baseline)
    finally:
        item.obj, item.name = function, name
    if not figures:
        _fail("the test returned no figure to the comparison, so nothing was compared")
    return result


def _baseline(config: pytest.Config, item: pytest.Item, marker: pytest.Mark) -> Baseline:
    unknown = sorted(set(marker.kwargs) - set(_ARGUMENTS))
    if unknown or marker.args:
        given = ", ".join([*map(repr, marker.args), *unknown])
        raise pytest.UsageError(
            f"heatmap_compare at {item.nodeid} got {given}; it accepts the keyword arguments "
            f"{', '.join(_ARGUMENTS)}"
        )
    filename = marker.kwargs.get("filename")
    if filename is None:
        filename = _safe_name(_name_for_all_devices(item)) + ".png"
    elif Path(filename).name != filename or not filename.endswith(".png"):
        raise pytest.UsageError(
            f"heatmap_compare at {item.nodeid} got filename={filename!r}; a file name ending in "
            ".png is accepted, without folders (see baseline_dir=)"
        )
    folder = marker.kwargs.get("baseline_dir") or _default_folder(config, item)
    tolerance = float(marker.kwargs.get("tolerance", _TOLERANCE))
    return Baseline(config.rootpath / folder / filename, tolerance)


def _default_folder(config: pytest.Config, item: pytest.Item) -> Path:
    """Return pytest-mpl's baseline folder if one is set, else baseline_images in the root."""
    if config.pluginmanager.hasplugin("pytest_mpl"):
        if given := config.getoption("--mpl-baseline-path"):
            relative = config.getoption("--mpl-baseline-relative")
            return Path(item.path.parent if relative else config.invocation_params.dir, given)
        if given := config.getini("mpl-baseline-path"):
            return Path(given)
    return Path("baseline_images")


def _name_for_all_devices(item: pytest.Item) -> str:
    """Name a test by its module, class, function and parameters other than the device."""
    module = item.nodeid.partition("::")[0].removesuffix(".py")
    names = [part for part in module.split("/") if part not in ("", ".", "tests", "test")]
    names += item.nodeid.partition("::")[2].partition("[")[0].split("::")
    callspec = getattr(item, "callspec", None)
    if callspec is None:
        return ".".join(names)
    parameters = callspec.id.split("-")
    device = str(callspec.params.get("attn_device", ""))
    if device in parameters:
        parameters.remove(device)
    return "-".join([".".join(names), *parameters])


def _safe_name(name: str) -> str:
    """Return a file name that is valid and unique on every file system."""
    safe = re.sub(r"[^A-Za-z0-9._-]+", "_", name).strip("_.")[:_LONGEST_NAME]
    if safe != name:
        safe = f"{safe.rstrip('_')}-{hashlib.sha256(name.encode()).hexdigest()[:8]}"
    return safe


def _catching(function: Any, figures: list[Any], by_mpl: bool) -> Any:
    @functools.wraps(function)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        from matplotlib.figure import Figure

        returned = function(*args, **kwargs)
        if not isinstance(returned, Figure):
            _fail(
                f"the test returned {type(returned).__name__}, so there is nothing to compare; "
                "it must return the figure: return show_heatmaps(...)"
            )
        figures.append(returned)
        # pytest warns of a value that nobody takes.
        return returned if by_mpl else None

    return wrapper


def _fail(reason: str) -> None:
    pytest.fail(f"heatmap_compare: {reason}", pytrace=False)


def _is_mpl_active(config: pytest.Config) -> bool:
    """Tell whether pytest-mpl compares or generates images in this run."""
    if not config.pluginmanager.hasplugin("pytest_mpl"):
        return False
    options = ("--mpl", "--mpl-generate-path", "--mpl-generate-hash-library")
    return any(config.getoption(option) for option in options)


def _compare_images(item: pytest.Item, figures: list[Any], baseline: Baseline) -> None:
    from matplotlib.testing.compare import compare_images

    if not figures:
        return
    folder = Path(tempfile.mkdtemp(prefix="attnheat-"))
    actual = folder / baseline.path.name
    figures[0].savefig(actual, metadata={"Software": None})
    if pyplot := sys.modules.get("matplotlib.pyplot"):
        pyplot.close(figures[0])
    update = f"pytest --mpl-generate-path={_shown(item, baseline.path.parent)} '{item.nodeid}'"
    if not baseline.path.exists():
        _fail(
            f"there is no baseline {_shown(item, baseline.path)} yet\n"
            f"  the picture is  {actual}\n  to keep it      {update}"
        )
    shapes = [_size(path) for path in (baseline.path, actual)]
    if shapes[0] != shapes[1]:
        _fail(
            f"the picture has {shapes[1][0]} x {shapes[1][1]} pixels, its baseline "
            f"{shapes[0][0]} x {shapes[0][1]}\n"
            f"  expected        {baseline.path}\n  actual          {actual}\n"
            f"  to accept it    {update}"
        )
    expected = folder / f"{actual.stem}-expected.png"
    expected.write_bytes(baseline.path.read_bytes())
    found = compare_images(str(expected), str(actual), baseline.tolerance, in_decorator=True)
    if found is not None:
        _fail(
            f"the picture differs from its baseline {_shown(item, baseline.path)}: root mean "
            f"square {found['rms']:.3g} of 255, allowed {baseline.tolerance:g}\n"
            f"  expected        {baseline.path}\n  actual          {actual}\n"
            f"  difference      {found['diff']}\n  to accept it    {update}"
        )
    actual.unlink()
    expected.unlink()
    folder.rmdir()


def _size(path: Path) -> tuple[int, int]:
    from PIL import Image

    with Image.open(path) as image:
        return image.width, image.height


def _shown(item: pytest.Item, path: Path) -> Path:
    """Return a path as one would type it in the root folder."""
    root = item.config.rootpath
    return path.relative_to(root) if path.is_relative_to(root) else path
