"""The fixtures, and how tests that use them are parametrised.

pytest imports this module in every run: torch, and all rooms that need it, are imported where
a test uses a fixture.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Mapping
from contextlib import AbstractContextManager
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest

from ..inputs import dtype_name, misuse
from . import regressions
from .settings import SETTINGS, chosen_devices, device_of_test, skip_absent

if TYPE_CHECKING:
    import torch

    from ..attention.cases import AttentionCase
    from ..attention.scoring import Scoring, ScoringFactory
    from ..capture.trace import Trace

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
    from ..capture.capturing import capture_attention

    return capture_attention


@pytest.fixture
def make_attention(
    request: pytest.FixtureRequest, attn_device: torch.device | str, attn_dtype: torch.dtype | str
) -> Callable[..., AttentionCase]:
    """A function that makes a case of your own: `make_attention(query_len=3, mask="padding")`.

    Takes the keywords of `pytest_attnheat.make_attention`. What is not given comes from the
    marker `attention`, the device and dtype of the test, and `--attn-seed`.
    """
    from ..attention import cases

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
    request: pytest.FixtureRequest, attn_device: torch.device | str, attn_dtype: torch.dtype | str
) -> Scoring:
    """A scoring function `(query, key) -> scores`: one test per scoring function.

    Made for the head_dim and seed of the test, on its device and in its dtype.
    """
    import torch

    from ..attention import cases, scoring

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
    name = getattr(request, "param", None)
    if name is None:
        name = chosen_devices(request.config)[0]
    return device_of_test(request.config, str(name))


@pytest.fixture
def attn_dtype(request: pytest.FixtureRequest) -> torch.dtype:
    """The torch.dtype of the test: one test per dtype of the marker or `--attn-dtype`."""
    from ..attention import cases

    name = getattr(request, "param", None)
    if name is None:
        settings = request.config.stash[SETTINGS]
        name = _only("dtype", _marked(request.node).get("dtype", settings.dtypes[0]))
    return cases.as_dtype(name)


@pytest.fixture
def heatmap_regression(
    request: pytest.FixtureRequest,
) -> Generator[regressions.HeatmapRegression, None, None]:
    """Compare pictures with baselines: `heatmap_regression.check(weights, "layer 0")`.

    Takes figures, or weights and what `show_heatmaps` draws them with, as often as the test likes;
    several need names. The comparison is that of the marker heatmap_compare.
    """
    with regressions.regression_of(request.node, regressions.HeatmapRegression) as regression:
        yield regression


@pytest.fixture
def attention_regression(
    request: pytest.FixtureRequest,
) -> Generator[regressions.AttentionRegression, None, None]:
    """Compare captured attention with a baseline: `attention_regression.check(trace)`.

    No picture is drawn: of each head the baseline has a sketch and a few statistics. A failure
    names the first layer and head that moved. `--attn-update` writes baselines.
    """
    with regressions.regression_of(request.node, regressions.AttentionRegression) as regression:
        yield regression


@pytest.fixture
def ranks(request: pytest.FixtureRequest) -> Callable[..., list[Any]]:
    """Runs a function on several ranks: `ranks(4, body, *arguments)`, a process for each.

    `torch.distributed` is ready there. It returns what each rank returned, and raises what one
    raised first; a rank that dies ends all, and so does one that takes longer than `time_limit=`
    seconds, by default `--attn-time-limit`. On a CPU they talk by gloo; `device="cuda"` gives each
    a GPU, and nccl, and skips the test where there are not as many.
    """

    def run(count: int, body: Callable[..., Any], *arguments: Any, **options: Any) -> list[Any]:
        __tracebackhide__ = True
        from ..contract.ranks import AbsentError, on_ranks

        if unknown := [f"{name}={given!r}" for name, given in options.items()
                       if name not in ("device", "time_limit")]:  # fmt: skip
            accepted = (
                "device= and time_limit=; what the function takes follows it without a name, or "
                "comes in functools.partial(function, ...)"
            )
            raise TypeError(misuse("ranks", ", ".join(unknown), accepted))
        limit = request.config.stash[SETTINGS].time_limit
        options = {"time_limit": limit, "skips": (pytest.skip.Exception,), **options}
        try:
            return on_ranks(count, body, *arguments, **options)
        except AbsentError as absent:
            skip_absent(request.config, str(absent))

    return run


def _marked(node: pytest.Item) -> dict[str, Any]:
    """Merge the `attention` markers of a test; the nearest one wins, keyword by keyword.

    Not their devices: these are where a case is made, and no part of it.
    """
    merged = _all_marked(node)
    merged.pop("devices", None)
    return merged


def _all_marked(node: pytest.Item) -> dict[str, Any]:
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
        from ..attention import scoring

        found: dict[str, ScoringFactory] = {}
        for factories in config.hook.pytest_attnheat_scoring_functions(config=config):
            for name, factory in dict(factories).items():
                scoring.check_scoring_name(name)
                scoring.check_factory(name, factory)
                known = scoring.scoring_names(found)
                if name in known:
                    accepted = f"a name that is not taken, as {', '.join(known)} are"
                    raise pytest.UsageError(
                        misuse("pytest_attnheat_scoring_functions", repr(name), accepted)
                    )
                found[name] = factory
        config.stash[_PROJECT_SCORING] = found
    return config.stash[_PROJECT_SCORING]


def parametrize(metafunc: pytest.Metafunc) -> None:
    """Check the marker, and run a test once per scoring function, device and dtype."""
    names = ("scoring_function", "attn_device", "attn_dtype")
    wanted = [name for name in names if _to_parametrise(metafunc, name)]
    markers = list(metafunc.definition.iter_markers("attention"))
    # Of a test that uses nothing of ours, a marker with positional arguments is somebody else's.
    if not wanted and (not markers or any(marker.args for marker in markers)):
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
    from ..attention import cases, scoring

    settings = metafunc.config.stash[SETTINGS]
    known = scoring.scoring_names(project_scoring_functions(metafunc.config))
    for marker in metafunc.definition.iter_markers("attention"):
        if marker.args:
            accepted = f"keywords only: {', '.join(cases.OPTIONS)}"
            raise TypeError(misuse("the attention marker", repr(marker.args), accepted))
    marked = _marked(metafunc.definition)
    cases.check_options(marked, known, teller="the attention marker", besides="devices")
    dtypes = [
        cases.as_dtype(dtype) for dtype in cases.several(marked.get("dtype", settings.dtypes))
    ]
    return {
        "scoring_function": cases.several(marked.get("scoring", known)),
        "attn_device": chosen_devices(
            metafunc.config, _all_marked(metafunc.definition).get("devices")
        ),
        "attn_dtype": [dtype_name(dtype) for dtype in dict.fromkeys(dtypes)],
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
