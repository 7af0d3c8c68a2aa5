"""What a project sets: options, ini settings, markers, and the hooks that it can implement.

The options are read in every run, and so without torch.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, NoReturn, TypeVar

import pytest

from ..attention import devices
from ..inputs import DTYPE_NAMES, misuse, one_of

if TYPE_CHECKING:
    import torch

    from ..attention.scoring import ScoringFactory
    from ..contract.conventions import Convention

_DEVICES = f"auto, all, or a comma-separated list of {devices.ACCEPTED}"
_DTYPES = f"a comma-separated list of {', '.join(DTYPE_NAMES)}"
_SEED = "a whole number from 0"

CHECKS_MARKER = "attention_checks"
GRADE_MARKER = "attention_grade"
# What `--attn-update` takes.
_UPDATES = ("missing", "changed", "all")
# What `--attn-grade` takes in place of a target: none, and those that markers name.
NO_TARGET, MARKED = "nothing", "marked"
MARKERS = (
    "attention(scoring=, batch=, heads=, query_len=, key_len=, head_dim=, value_dim=, mask=, "
    "causal=, alignment=, window=, chunk=, prefix=, sink_keys=, documents=, lengths=, "
    "query_lengths=, may_see=, "
    "scale=, softcap=, alibi=, score_mod=, sinks=, bias=, fully_masked=, kind=, dtype=, "
    "seed=, devices=): what the attention fixtures of pytest-attnheat make for this test, and the "
    "devices that it runs on, as --attn-device names them. scoring, dtype and "
    "devices also take lists, which parametrise the test; what is not "
    "given comes from the marker of the class or module, then from the defaults of "
    "pytest_attnheat.make_attention.",
    f"{CHECKS_MARKER}(specs, expected_failures, checks, quick, long, ranks): what "
    "parametrize_with_checks of pytest-attnheat leaves on a test.",
    "heatmap_compare(filename=, baseline_dir=, tolerance=, precision=, share=): compare the "
    "figure that this test returns with its baseline, with and without --mpl: first the data "
    "that both carry, then their pixels. One baseline serves all devices; it lies in mpl-"
    "baseline-path (default: baseline_images), named after the test; filename may end in .png "
    "or .svg. tolerance is relative to cell and panel (default: that of the dtype); precision "
    "names other dtypes that it serves; share=True lets several tests have it. --attn-update "
    "writes baselines.",
    f"{GRADE_MARKER}(target=): --attn-grade grades tests that have this marker, and no others if "
    "any has it. target is the implementation that they judge, as package.module:object; without "
    "it, any.",
)

_Setting = TypeVar("_Setting")


class Settings(NamedTuple):
    """The options of one run."""

    devices: tuple[str, ...]  # Device names, or `("auto",)` or `("all",)`
    dtypes: tuple[str, ...]  # Dtype names
    seed: int  # The seed where the marker gives none
    require_device: bool  # Whether an absent device fails a test instead of skipping it
    time_limit: float  # How long one call of an isolated implementation may take, in seconds
    grade: tuple[str, ...]  # The implementations to be graded with, as they are named
    grade_min: float  # The part of active defects that tests must find
    grade_defects: tuple[str, ...] | None  # The defects that are planted, by name; None for all
    update: str  # Which baselines are written; empty for none
    json: str  # Where what was found is written; empty for nowhere


SETTINGS = pytest.StashKey[Settings]()
# The implementations that are called in processes of their own.
ISOLATED = pytest.StashKey[list[Any]]()
# True while tests run again with wrong versions: nothing of that is kept.
GRADING = pytest.StashKey[bool]()


def add_options(parser: pytest.Parser) -> None:
    """Add the `--attn-` options and `attn_` settings."""
    group = parser.getgroup("attnheat", "attention (pytest-attnheat)")

    def option_and_ini(name: str, default: str, metavar: str, text: str, more: str = "") -> None:
        option = "--" + name.replace("_", "-")
        more += f". Default: the ini setting {name}, or {default or 'nothing'}"
        group.addoption(option, metavar=metavar, help=text + more)
        parser.addini(name, text, default=default)

    option_and_ini(
        "attn_device", "auto", "DEVICES",
        "devices to run attention tests on",
        f": {_DEVICES}. auto: the CPU and the accelerator present; all: the CPU and every GPU. "
        "Under xdist, plain cuda is shared out by worker",
    )  # fmt: skip

    def switch(name: str, text: str) -> None:
        option = "--" + name.replace("_", "-")
        # None tells that it is not given.
        help_text = f"{text}. Default: the ini setting {name}, or no"
        group.addoption(option, action="store_true", default=None, help=help_text)
        parser.addini(name, text, type="bool", default=False)

    switch(
        "attn_require_device", "fail a test whose named device is absent, instead of skipping it"
    )
    option_and_ini("attn_dtype", "float32", "DTYPES", "dtypes of attention tensors", f": {_DTYPES}")
    option_and_ini(
        "attn_seed", "0", "SEED", "seed of attention tensors and parameters", f": {_SEED}"
    )
    examined = (
        "examine an implementation of attention, with no test file: an AttentionSpec, a callable, "
        "or a list of them, as package.module:object"
    )
    group.addoption(
        "--attn-check",
        action="append",
        metavar="MODULE:OBJECT",
        default=[],
        help=f"{examined}. May be given several times; those of the ini setting attn_check, one a "
        "line, are examined beside the tests of every run",
    )
    parser.addini("attn_check", examined, type="linelist", default=[])
    switch("attn_check_quick", "make fewer checks, in the first dtype alone")
    switch(
        "attn_check_strict",
        "fail checks that are skipped because a parameter that sounds like a mask, causality or "
        "another feature is not declared, or because nothing could be called",
    )
    group.addoption(
        "--attn-replay",
        metavar="CALL",
        help="in place of all checks of an examination, judge one call, as a failure printed it: "
        '"sizes=1x2 causal=True dtype=float32"',
    )
    switch(
        "attn_isolate",
        "call each examined implementation in a process of its own, so that a crash or a hang of "
        "it is a failure. What is compiled is isolated anyway, where it can be",
    )
    option_and_ini(
        "attn_time_limit", "120", "SECONDS",
        "how long one call of an isolated implementation may take; and, beside 20 times what the "
        "right one takes, the tests of a wrong version of --attn-grade",
    )  # fmt: skip
    option_and_ini(
        "attn_grade", NO_TARGET, "TARGETS",
        "grade the tests by the defects that they let through: run them again with wrong versions "
        "of an implementation in its place",
        f": functions, methods or modules as package.module:object, separated by commas; {MARKED}: "
        f"those that markers {GRADE_MARKER} name",
    )  # fmt: skip
    option_and_ini(
        "attn_grade_min", "0", "PART",
        "fail a run whose tests find a smaller part of the active defects", ", from 0 to 1",
    )  # fmt: skip
    option_and_ini(
        "attn_grade_defects", "", "NAMES",
        "plant these defects of the catalogue alone, by name, separated by commas",
    )  # fmt: skip
    option_and_ini(
        "attn_json", "", "FILE",
        "write what the examination and --attn-grade found as JSON, for programs",
    )  # fmt: skip
    option_and_ini(
        "attn_update", "", "|".join(_UPDATES),
        "write baselines of heatmap_compare tests. missing: those there are none of; "
        "changed: also those whose data or panels changed; all: also those whose text another "
        "matplotlib drew. Files that would stay as they are are not touched",
    )  # fmt: skip
    switch("attn_unused", "list baselines that no collected test uses. Nothing is deleted")
    option_and_ini(
        "attn_artifacts", "attn-artifacts", "FOLDER",
        "where failed comparisons leave their pictures",
    )  # fmt: skip


def read_settings(config: pytest.Config) -> Settings:
    """Read options and ini settings; a usage error says what is accepted."""
    grade = _setting(config, "attn_grade", _read_targets)
    for name in ("attn_grade_min", "attn_grade_defects"):
        if config.getoption(name) is not None and not grade:
            option = "--" + name.replace("_", "-")
            raise pytest.UsageError(f"{option}: it goes with --attn-grade, which is not given")
    return Settings(
        devices=_setting(config, "attn_device", _read_devices),
        dtypes=_setting(config, "attn_dtype", _read_dtypes),
        seed=_setting(config, "attn_seed", _read_seed),
        require_device=switched(config, "attn_require_device"),
        time_limit=_setting(config, "attn_time_limit", _read_seconds),
        grade=grade,
        grade_min=_setting(config, "attn_grade_min", _read_part),
        grade_defects=_setting(config, "attn_grade_defects", _read_names),
        update=_setting(config, "attn_update", _read_update),
        json=_setting(config, "attn_json", partial(_read_file, config)),
    )


def targets_of(config: pytest.Config) -> list[str]:
    """Return what `--attn-check` and the ini setting of its name name."""
    return [*config.getoption("attn_check"), *config.getini("attn_check")]


def switched(config: pytest.Config, name: str) -> bool:
    """Whether an option is given, or else the ini setting of the same name says so."""
    given = config.getoption(name)
    return bool(config.getini(name) if given is None else given)


def path_of(config: pytest.Config, name: str, path: str) -> Path:
    """Return what a setting names: from where pytest was started, or from its ini file."""
    typed = config.getoption(name) is not None
    return Path(config.invocation_params.dir if typed else config.rootpath, path)


def _setting(config: pytest.Config, name: str, read: Callable[[str, str], _Setting]) -> _Setting:
    """Read an option, or else the ini setting of the same name."""
    option = config.getoption(name)
    text, source = (
        (config.getini(name), f"ini setting {name}")
        if option is None
        else (option, "--" + name.replace("_", "-"))
    )
    if isinstance(text, list | tuple):  # as a list of TOML comes
        text = ",".join(map(str, text))
    try:
        return read(text, source)
    except ValueError as error:
        raise pytest.UsageError(str(error)) from None


def split(text: str) -> tuple[str, ...]:
    """Return what commas separate, each once."""
    return tuple(dict.fromkeys(part.strip() for part in text.split(",")))


def _read_devices(text: str, source: str) -> tuple[str, ...]:
    names = split(text)
    if names not in (("auto",), ("all",)):
        if {"auto", "all"} & set(names):
            raise ValueError(misuse(source, repr(text), f"{_DEVICES}; auto and all stand alone"))
        for name in names:
            devices.check_device(name, source, _DEVICES)
    return names


def _read_dtypes(text: str, source: str) -> tuple[str, ...]:
    dtypes = split(text)
    for dtype in dtypes:
        if dtype not in DTYPE_NAMES:
            raise ValueError(misuse(source, repr(dtype), _DTYPES))
    return dtypes


def _read_seed(text: str, source: str) -> int:
    if not (text.isascii() and text.isdigit()):
        raise ValueError(misuse(source, repr(text), _SEED))
    return int(text)


def _read_targets(text: str, source: str) -> tuple[str, ...]:
    targets = split(text)
    if targets == (NO_TARGET,):
        return ()
    for target in targets:
        if not all(target.partition(":")) and targets != (MARKED,):
            accepted = f"package.module:object, or {MARKED} alone"
            raise ValueError(misuse(source, repr(target), accepted))
    return targets


def _read_names(text: str, source: str) -> tuple[str, ...] | None:
    return split(text) if text else None


def _read_update(text: str, source: str) -> str:
    if text:
        one_of(source, text, _UPDATES)
    return text


def _read_part(text: str, source: str) -> float:
    part = _number(text)
    if not 0 <= part <= 1:
        raise ValueError(misuse(source, repr(text), "a number from 0 to 1"))
    return part


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        return math.nan


def _read_seconds(text: str, source: str) -> float:
    seconds = _number(text)
    if not 0 < seconds < math.inf:
        raise ValueError(misuse(source, repr(text), "a number of seconds above 0"))
    return seconds


def _read_file(config: pytest.Config, text: str, source: str) -> str:
    path = path_of(config, "attn_json", text)
    above = next((one for one in path.parents if one.exists()), path)
    if text and (path.is_dir() or not above.is_dir()):
        what = "a folder" if path.is_dir() else f"in {above}, which is not a folder"
        raise ValueError(misuse(source, f"{text!r}, {what}", "the name of a file"))
    return text


def chosen_devices(config: pytest.Config, marked: object = None) -> list[str]:
    """Name the devices that are chosen, or `marked`; a usage error if torch knows none such."""
    chosen, source = config.stash[SETTINGS].devices, "attn_device"
    try:
        if marked is not None:
            source = "the attention marker's devices"
            names = [marked] if isinstance(marked, str) else marked
            if not isinstance(names, (list, tuple)) or not all(isinstance(n, str) for n in names):
                raise ValueError(misuse(source, repr(marked), _DEVICES))
            chosen = _read_devices(",".join(names), source)
        return devices.names_of(chosen, source)
    except ValueError as error:
        raise pytest.UsageError(str(error)) from None


def device_of_test(config: pytest.Config, name: str) -> torch.device:
    """Return a device by its name; skip the test if it is absent, or fail it if that is set."""
    __tracebackhide__ = True
    worker = getattr(config, "workerinput", {}).get("workerid", "gw0")
    try:
        number = _number_of(worker)
        return devices.resolve(name, worker=number, argument="attn_device")
    except LookupError as error:
        skip_absent(config, str(error))


def skip_absent(config: pytest.Config, absent: str) -> NoReturn:
    """Skip a test whose device is absent, or fail it if that is set."""
    __tracebackhide__ = True
    if config.stash[SETTINGS].require_device:
        pytest.fail(f"{absent}, and --attn-require-device is set", pytrace=False)
    pytest.skip(absent)


def _number_of(worker: str) -> int:
    """The number of a worker of pytest-xdist: "gw3"; 0 where a user named it otherwise."""
    digits = worker.removeprefix("gw")
    return int(digits) if digits.isascii() and digits.isdigit() else 0


def end_processes(config: pytest.Config) -> None:
    """End the processes of implementations that were isolated so far."""
    for one in config.stash[ISOLATED]:
        one.close()


@pytest.hookspec
def pytest_attnheat_scoring_functions(  # type: ignore[empty-body]
    config: pytest.Config,
) -> Mapping[str, ScoringFactory]:
    """Give a project's own scoring functions names that fixtures and markers know.

    Called once per session, when the first test that uses attention is collected. Implement it
    in the `conftest.py` next to the configuration file, or in a plugin::

        def pytest_attnheat_scoring_functions(config):
            from torch.nn.functional import normalize

            def cosine(query, key):
                return normalize(query, dim=-1) @ normalize(key, dim=-1).mT

            return {"cosine": lambda query_dim, key_dim, seed: cosine}

    Args:
        config: The configuration of this run.

    Returns:
        Factories by name. A factory is called as `factory(query_dim, key_dim, seed)` and returns an
        `nn.Module` or a function `(query, key) -> scores`. A name that is taken is an error.
    """


@pytest.hookspec
def pytest_attnheat_conventions(  # type: ignore[empty-body]
    config: pytest.Config,
) -> Sequence[Convention]:
    """Say how a project's own attention functions are called, so that they need no declaration.

    Called once per session, before tests are collected. Implement it in the `conftest.py` next to
    the configuration file, or in a plugin::

        def pytest_attnheat_conventions(config):
            from pytest_attnheat import Convention

            return [Convention("ours", "attend of ours", ("q", "kv_cache"), {"layout": "blhd"})]

    Args:
        config: The configuration of this run.

    Returns:
        Rows of the table of conventions. A name that is taken is an error.
    """
