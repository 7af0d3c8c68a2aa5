"""What pytest calls first: options, settings, markers and hooks.

Every run of every project that has the package installed imports this module. It loads the
standard library and pytest, and nothing else.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Generator
from typing import NamedTuple, TypeVar

import pytest

# Names are checked before torch is loaded, and so are listed here as well as in cases.py.
DTYPE_NAMES = ("float16", "bfloat16", "float32", "float64")
DEVICE_HELP = "auto, all, or a comma-separated list of cpu, cuda, cuda:N, mps, xpu, xpu:N"

_ATTENTION_MARKER = (
    "attention(scoring=, batch=, heads=, query_len=, key_len=, head_dim=, value_dim=, mask=, "
    "fully_masked=, kind=, dtype=, seed=): what the attention fixtures of pytest-attnheat make "
    "for this test. scoring and dtype also take lists, which parametrise the test; what is not "
    "given comes from the marker of the class or module, then from the defaults of "
    "pytest_attnheat.make_attention."
)

CHECKS_MARKER = "attention_checks"
_CHECKS_MARKER_HELP = (
    f"{CHECKS_MARKER}(specs, expected_failures, checks, quick): what parametrize_with_checks of "
    "pytest-attnheat leaves on a test."
)

_Setting = TypeVar("_Setting")


class Settings(NamedTuple):
    """The options of one run.

    Attributes:
        devices: Device names, or `("auto",)` or `("all",)`.
        dtypes: Dtype names.
        seed: The seed where the marker gives none.
        require_device: Whether an absent device fails a test instead of skipping it.
    """

    devices: tuple[str, ...]
    dtypes: tuple[str, ...]
    seed: int
    require_device: bool


SETTINGS = pytest.StashKey[Settings]()


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add the `--attn-` options and `attn_` settings."""
    group = parser.getgroup("attnheat", "attention (pytest-attnheat)")
    group.addoption(
        "--attn-device",
        metavar="DEVICES",
        help=f"devices to run attention tests on: {DEVICE_HELP}. auto: the CPU and the "
        "accelerator present; all: the CPU and every GPU. Under xdist, plain cuda is shared "
        "out by worker. Default: the ini setting attn_device, or auto",
    )
    group.addoption(
        "--attn-require-device",
        action="store_true",
        help="fail a test whose named device is absent, instead of skipping it. Default: the "
        "ini setting attn_require_device, or no",
    )
    group.addoption(
        "--attn-dtype",
        metavar="DTYPES",
        help="dtypes of attention tensors: a comma-separated list of "
        f"{', '.join(DTYPE_NAMES)}. Default: the ini setting attn_dtype, or float32",
    )
    group.addoption(
        "--attn-seed",
        metavar="SEED",
        help="seed of attention tensors and parameters: a whole number from 0. Default: the "
        "ini setting attn_seed, or 0",
    )
    group.addoption(
        "--attn-check",
        action="append",
        metavar="MODULE:OBJECT",
        default=[],
        help="examine an implementation of attention, with no test file: an AttentionSpec, a "
        "callable, or a list of them, as package.module:object. May be given several times",
    )
    group.addoption(
        "--attn-check-quick",
        action="store_true",
        help="ask fewer questions, in the first dtype alone",
    )
    parser.addini("attn_device", "devices to run attention tests on", default="auto")
    parser.addini(
        "attn_require_device",
        "fail a test whose named device is absent, instead of skipping it",
        type="bool",
        default=False,
    )
    parser.addini("attn_dtype", "dtypes of attention tensors", default="float32")
    parser.addini("attn_seed", "seed of attention tensors and parameters", default="0")


def pytest_addhooks(pluginmanager: pytest.PytestPluginManager) -> None:
    """Add the hooks that a project can implement, and the rooms that pytest calls."""
    from pytest_attnheat.plugin import fixtures, hookspecs, pictures, summary

    pluginmanager.add_hookspecs(hookspecs)
    # Not by `pytest_plugins`: for each name there, pytest reads the metadata of all installed
    # distributions once more.
    for room in (fixtures, pictures, summary):
        pluginmanager.register(room, room.__name__)


def pytest_configure(config: pytest.Config) -> None:
    """Register the markers and check the options."""
    config.addinivalue_line("markers", _ATTENTION_MARKER)
    config.addinivalue_line("markers", _CHECKS_MARKER_HELP)
    if config.getoption("attn_check") and config.args_source is not config.ArgsSource.ARGS:
        config.args = []  # nothing but the examination was asked for
    config.stash[SETTINGS] = Settings(
        devices=_setting(config, "attn_device", parse_devices),
        dtypes=_setting(config, "attn_dtype", _parse_dtypes),
        seed=_setting(config, "attn_seed", _parse_seed),
        require_device=config.getoption("attn_require_device")
        or config.getini("attn_require_device"),
    )


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Parametrise the tests that `parametrize_with_checks` marked."""
    marker = metafunc.definition.get_closest_marker(CHECKS_MARKER)
    if marker is not None and "check" in metafunc.fixturenames:
        from pytest_attnheat.plugin.examination import parametrize

        parametrize(metafunc, marker)


def pytest_collection_modifyitems(
    session: pytest.Session, config: pytest.Config, items: list[pytest.Item]
) -> None:
    """Add the checks of `--attn-check`."""
    for target in config.getoption("attn_check"):
        from pytest_attnheat.plugin.examination import examine

        items.extend(examine(session, target, quick=config.getoption("attn_check_quick")))


# Last of all: a CI log is read from its end.
@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_terminal_summary(
    terminalreporter: pytest.TerminalReporter,
) -> Generator[None, None, None]:
    """Repeat what the examination found, once for each implementation."""
    reports = [report for some in terminalreporter.stats.values() for report in some]
    verdicts = [found for r in reports if (found := getattr(r, "attnheat_verdict", None))]
    if verdicts:
        from pytest_attnheat.plugin.verdicts import shorten, summarise

        shorten(reports)
    yield
    if verdicts and (lines := list(summarise(verdicts))):
        terminalreporter.section("attention examination")
        for line in lines:
            terminalreporter.line(line)


def _setting(config: pytest.Config, name: str, parse: Callable[[str], _Setting]) -> _Setting:
    """Parse an option, or else the ini setting of the same name."""
    option = config.getoption(name)
    text, source = (
        (config.getini(name), f"ini setting {name}")
        if option is None
        else (option, "--" + name.replace("_", "-"))
    )
    try:
        return parse(text)
    except ValueError as error:
        raise pytest.UsageError(f"{source}: {error}") from None


def _split(text: str) -> tuple[str, ...]:
    return tuple(dict.fromkeys(part.strip() for part in text.split(",")))


def parse_devices(text: str) -> tuple[str, ...]:
    """Parse the value of `--attn-device`; ValueError says what is accepted."""
    devices = _split(text)
    if devices not in (("auto",), ("all",)):
        for device in devices:
            check_device(device, f"{DEVICE_HELP} (got {text!r})")
    return devices


def check_device(device: str, accepted: str = "cpu, cuda, cuda:N, mps, xpu, xpu:N") -> str:
    """Return the name of one device; ValueError says what is accepted."""
    if not re.fullmatch(r"cpu|mps|(cuda|xpu)(:(0|[1-9][0-9]*))?", device, re.ASCII):
        raise ValueError(f"{device!r} is no device; accepted are {accepted}")
    return device


def _parse_dtypes(text: str) -> tuple[str, ...]:
    dtypes = _split(text)
    for dtype in dtypes:
        if dtype not in DTYPE_NAMES:
            accepted = f"a comma-separated list of {', '.join(DTYPE_NAMES)} (got {text!r})"
            raise ValueError(f"{dtype!r} is no dtype; accepted is {accepted}")
    return dtypes


def _parse_seed(text: str) -> int:
    if not (text.isascii() and text.isdigit()):
        raise ValueError(f"{text!r} is no seed; accepted is a whole number from 0")
    return int(text)
