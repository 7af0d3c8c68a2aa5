"""The fixtures, and how tests that use them are parametrised.

pytest imports this module in every run: torch, and all rooms that need it, are imported where
a test uses a fixture.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest

from pytest_attnheat.plugin import SETTINGS, check_device

if TYPE_CHECKING:
    import torch

    from pytest_attnheat.attention.cases import AttentionCase
    from pytest_attnheat.attention.scoring import Scoring, ScoringFactory
    from pytest_attnheat.capture.trace import Trace

_PROJECT_SCORING = pytest.StashKey[Mapping[str, "ScoringFactory"]]()
_NAMED_SCORING = pytest.StashKey[tuple["Scoring", str]]()


@pytest.fixture
def attention(
    make_attention: Callable[..., AttentionCase], scoring_function: Scoring | str
) -> AttentionCase:
    """Attention tensors: one test per scoring function, device and dtype.

    An object with query, key, value, mask, scores, weights, output, scoring_function, scoring
    (its name), device, dtype and seed. The marker `attention` says what is made.
    """
    return make_attention(scoring=scoring_function)


@pytest.fixture
def attention_weights(attention: AttentionCase) -> torch.Tensor:
    """The weights (batch, heads, query_len, key_len) of the fixture `attention`."""
    return attention.weights


@pytest.fixture
def capture_attention() -> Callable[..., AbstractContextManager[Trace]]:
    """Records the attention inside a model: the function of the same name, as a fixture."""
    from pytest_attnheat.capture.capturing import capture_attention

    return capture_attention


@pytest.fixture
def make_attention(
    request: pytest.FixtureRequest,
    attn_device: torch.device | str,
    attn_dtype: torch.dtype | str,
) -> Callable[..., AttentionCase]:
    """A function that makes a case of your own: `make_attention(query_len=3, mask="padding")`.

    Takes the keywords of `pytest_attnheat.make_attention`. What is not given comes from the
    marker `attention`, the device and dtype of the test, and `--attn-seed`.
    """
    from pytest_attnheat.attention import cases

    marked = _marked(request.node)
    defaults = {
        **{"seed": request.config.stash[SETTINGS].seed, **marked},
        **{"device": attn_device, "dtype": attn_dtype},
        "extra": project_scoring_functions(request.config),
    }

    def make(**options: Any) -> AttentionCase:
        options = {**defaults, **options}
        options["scoring"] = _only("scoring", options.get("scoring", "scaled_dot_product"))
        case = cases.make_attention(**options)
        function, name = request.node.stash.get(_NAMED_SCORING, (None, ""))
        return replace(case, scoring=name) if case.scoring_function is function else case

    return make


@pytest.fixture
def scoring_function(
    request: pytest.FixtureRequest,
    attn_device: torch.device | str,
    attn_dtype: torch.dtype | str,
) -> Scoring:
    """A scoring function `(query, key) -> scores`: one test per scoring function.

    Made for the head_dim and seed of the test, on its device and in its dtype.
    """
    import torch

    from pytest_attnheat.attention import cases, scoring

    marked = _marked(request.node)
    name = getattr(request, "param", None)
    if name is None:
        name = _only("scoring", marked.get("scoring", "scaled_dot_product"))
    function = scoring.make_scoring(
        name,
        marked.get("head_dim", cases.HEAD_DIM),
        seed=marked.get("seed", request.config.stash[SETTINGS].seed),
        device=torch.device(attn_device),
        dtype=cases.as_dtype(attn_dtype),
        extra=project_scoring_functions(request.config),
    )
    request.node.stash[_NAMED_SCORING] = (function, name)
    return function


# Module scope, so that a model can be kept on the device for a whole module.
@pytest.fixture(scope="module")
def attn_device(request: pytest.FixtureRequest) -> torch.device:
    """The torch.device of the test: one test per device of `--attn-device`.

    A named device that is absent skips the test, or fails it under `--attn-require-device`.
    """
    import torch

    settings = request.config.stash[SETTINGS]
    name = check_device(str(getattr(request, "param", _device_names(settings.devices)[0])))
    kind, _, index = name.partition(":")
    present = visible_devices()
    count = present.get(kind, 0)
    number = int(index) if index else _worker_number(request.config) % max(count, 1)
    if number >= count:
        listed = ", ".join(_every_device(present))
        reason = f"attention device {name!r} is absent (present: {listed})"
        if settings.require_device:
            pytest.fail(f"{reason}, and --attn-require-device is set", pytrace=False)
        pytest.skip(reason)
    return torch.device(kind) if kind == "cpu" else torch.device(kind, number)


@pytest.fixture
def attn_dtype(request: pytest.FixtureRequest) -> torch.dtype:
    """The torch.dtype of the test: one test per dtype of the marker or `--attn-dtype`."""
    from pytest_attnheat.attention import cases

    name = getattr(request, "param", None)
    if name is None:
        settings = request.config.stash[SETTINGS]
        name = _only("dtype", _marked(request.node).get("dtype", settings.dtypes[0]))
    return cases.as_dtype(name)


def visible_devices() -> dict[str, int]:
    """Count the devices that torch can use here, by kind."""
    import torch

    return {
        "cpu": 1,
        "cuda": torch.cuda.device_count() if torch.cuda.is_available() else 0,
        "mps": int(torch.backends.mps.is_available()),
        "xpu": torch.xpu.device_count() if torch.xpu.is_available() else 0,
    }


def _every_device(present: Mapping[str, int]) -> list[str]:
    """Name every device that is present; kinds of which there is only ever one have no number."""
    return [
        kind if kind in ("cpu", "mps") else f"{kind}:{number}"
        for kind, count in present.items()
        for number in range(count)
    ]


def _device_names(devices: tuple[str, ...]) -> list[str]:
    """Say which devices `auto` and `all` stand for here."""
    if devices == ("auto",):
        return [kind for kind, count in visible_devices().items() if count]
    if devices == ("all",):
        return _every_device(visible_devices())
    return list(devices)


def _worker_number(config: pytest.Config) -> int:
    """The number of this xdist worker, or 0."""
    worker = getattr(config, "workerinput", {}).get("workerid", "gw0")
    return int(worker.removeprefix("gw"))


def _marked(node: pytest.Item) -> dict[str, Any]:
    """Merge the `attention` markers of a test; the nearest one wins, keyword by keyword."""
    merged: dict[str, Any] = {}
    for marker in reversed(list(node.iter_markers("attention"))):
        merged.update(marker.kwargs)
    return merged


def _only(what: str, given: Any) -> Any:
    """Return one choice of a marker where the test has not been parametrised with it."""
    if not isinstance(given, (list, tuple)):
        return given
    if len(given) == 1:
        return given[0]
    fixture = "scoring_function" if what == "scoring" else "attn_dtype"
    raise ValueError(
        f"the marker lists several for {what}: {given!r}. Name one in the call, or have the "
        f"test itself take the fixture {fixture}, which runs it once for each"
    )


def project_scoring_functions(config: pytest.Config) -> Mapping[str, ScoringFactory]:
    """Collect the scoring functions of the project's hooks, once per session.

    Raises:
        TypeError: A hook returned something else than factories by name.
        pytest.UsageError: A name is taken.
    """
    if _PROJECT_SCORING not in config.stash:
        from pytest_attnheat.attention import scoring

        found: dict[str, ScoringFactory] = {}
        for factories in config.hook.pytest_attnheat_scoring_functions(config=config):
            for name, factory in dict(factories).items():
                scoring.check_scoring_name(name)
                scoring.check_factory(name, factory)
                known = scoring.scoring_names(found)
                if name in known:
                    raise pytest.UsageError(
                        f"pytest_attnheat_scoring_functions: the name {name!r} is taken "
                        f"(known: {', '.join(known)})"
                    )
                found[name] = factory
        config.stash[_PROJECT_SCORING] = found
    return config.stash[_PROJECT_SCORING]


# Last, so that what the user parametrised is known by now.
@pytest.hookimpl(trylast=True)
def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Check the marker, and run a test once per scoring function, device and dtype."""
    names = ("scoring_function", "attn_device", "attn_dtype")
    wanted = [name for name in names if _to_parametrise(metafunc, name)]
    marked = metafunc.definition.get_closest_marker("attention") is not None
    if not wanted and not marked:
        return
    try:
        choices = _choices(metafunc)
    except (TypeError, ValueError, pytest.UsageError) as error:
        message = f"{metafunc.definition.nodeid}: {error}"
        raise pytest.Collector.CollectError(message) from None
    for name in wanted:
        if name != "attn_dtype" or len(choices[name]) > 1:
            metafunc.parametrize(name, choices[name], ids=choices[name], indirect=True)


def _choices(metafunc: pytest.Metafunc) -> dict[str, list[str]]:
    """What a test runs over, by fixture."""
    from pytest_attnheat.attention import cases, scoring

    settings = metafunc.config.stash[SETTINGS]
    known = scoring.scoring_names(project_scoring_functions(metafunc.config))
    for marker in metafunc.definition.iter_markers("attention"):
        if marker.args:
            raise TypeError(
                f"the attention marker takes keywords only: {', '.join(cases.OPTIONS)}; "
                f"got {marker.args!r}"
            )
    marked = _marked(metafunc.definition)
    cases.check_options(marked, known)
    dtypes = [
        cases.as_dtype(dtype) for dtype in cases.several(marked.get("dtype", settings.dtypes))
    ]
    return {
        "scoring_function": cases.several(marked.get("scoring", known)),
        "attn_device": _device_names(settings.devices),
        "attn_dtype": [str(dtype).removeprefix("torch.") for dtype in dict.fromkeys(dtypes)],
    }


def _to_parametrise(metafunc: pytest.Metafunc, name: str) -> bool:
    """Whether a test uses a fixture of ours that the user has neither parametrised nor replaced.

    pytest offers no public way to ask either; these two attributes are the same in 8 and 9.
    """
    if name not in metafunc.fixturenames:
        return False
    if any(name in call.params for call in metafunc._calls):
        return False
    for definition in reversed(metafunc._arg2fixturedefs.get(name, ())):
        if definition.func.__module__ == __name__:
            return True
        if name not in definition.argnames:
            return False
    return False
