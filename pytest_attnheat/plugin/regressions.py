"""What the fixtures `heatmap_regression` and `attention_regression` give: comparisons by name."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import TYPE_CHECKING, Any, TypeVar

import pytest

from ..inputs import check_tolerance, dtype_names, misuse
from .naming import Expected, checked_tolerance, default_folder, safe_name, stem_of
from .pictures import EXPECTED, STEMS, baseline_style, compare, compare_figure

if TYPE_CHECKING:
    from ..capture.record import AttentionRecord
    from ..capture.trace import Trace


class _Regression:
    """What compares with baselines by name, as often as a test likes."""

    caller = ""  # what it is called in messages

    def __init__(self, item: pytest.Item) -> None:
        self._item = item
        self._names: dict[str, str] = {}
        self._folder = item.config.rootpath / default_folder(item)

    def _expected(self, name: str, suffix: str, tolerance: Any, precision: Any) -> Expected:
        """Return the baseline of a name; ValueError if it is taken: some file systems fold case."""
        taken = ", ".join(map(repr, sorted(self._names.values()))) or "none"
        if not isinstance(name, str) or name.casefold() in self._names:
            accepted = f"a name of its own for each of a test, in any case (taken: {taken})"
            raise ValueError(misuse("name", repr(name), accepted))
        self._names[name.casefold()] = name
        stem = f"{stem_of(self._item)}.{safe_name(name)}" if name else stem_of(self._item)
        path = self._folder / f"{stem}{suffix}"
        marked = self._item.stash.get(EXPECTED, None)
        if isinstance(marked, Expected) and marked.path == path:
            got = f"{name!r}, the baseline of the marker"
            raise ValueError(misuse("name", got, "another name than that of the marked picture"))
        names = dtype_names("precision", precision)
        return Expected(path, checked_tolerance(tolerance), names)

    def _fail_with(self, message: str | None) -> None:
        __tracebackhide__ = True
        if message is not None:
            pytest.fail(message, pytrace=False)


class HeatmapRegression(_Regression):
    """Compares figures or weights with baselines by name, as often as a test likes."""

    caller = "heatmap_regression"

    def check(
        self,
        figure: Any,
        name: str = "",
        *,
        tolerance: float | None = None,
        precision: str | Sequence[str] = (),
        **options: Any,
    ) -> None:
        """Compare a picture with its baseline.

        Args:
            figure: A figure, or weights of any kind that `show_heatmaps` takes and draws.
            name: What tells this picture from the others of the test; part of the file name.
            tolerance: As in the marker.
            precision: As in the marker.
            **options: Where weights are given, arguments of `show_heatmaps`: `mask`, `titles` ...
                The axes are named "Keys" and "Queries", and `figsize` is None, by default.

        Raises:
            TypeError: Arguments of `show_heatmaps` beside a figure, or one that it does not have.
            ValueError: The name is taken.
        """
        __tracebackhide__ = True
        drawn = hasattr(figure, "savefig")
        if drawn and options:
            given = f"{', '.join(options)} beside a figure"
            raise TypeError(misuse("options", given, "none; they belong to show_heatmaps"))
        expected = self._expected(name, ".png", tolerance, precision)
        if not drawn:
            from ..heatmaps.showing import show_heatmaps

            defaults = {"xlabel": "Keys", "ylabel": "Queries", "figsize": None}
            figure = show_heatmaps(figure, **{**defaults, **options})
        self._fail_with(compare_figure(self._item, figure, expected, self.caller))


class AttentionRegression(_Regression):
    """Compares captured attention with baselines, without pictures."""

    caller = "attention_regression"

    def check(
        self,
        trace: Trace | AttentionRecord,
        name: str = "",
        *,
        tolerance: float | None = None,
        precision: str | Sequence[str] = (),
    ) -> None:
        """Compare what was captured with its baseline, layer by layer and head by head.

        Args:
            trace: What `capture_attention` returned, one record of it, or `LazyWeights`; or a
                `DTensor` of weights, on each rank of its mesh.
            name: What tells it from the others of the test; part of the file name.
            tolerance: As in `assert_same_attention`.
            precision: As in `assert_same_attention`.

        Raises:
            TypeError: It is neither a trace nor a record, or the tolerance is no number.
            ValueError: The name is taken, the trace keeps no weights, or the tolerance is not
                between 0 and 1.
        """
        __tracebackhide__ = True
        from ..baselines import layers, traces

        if tolerance is not None:
            check_tolerance(tolerance)
        expected = self._expected(name, ".attn", tolerance, precision)
        check = functools.partial(traces.check, layers.layers_of(trace))
        self._fail_with(compare(self._item, check, expected, self.caller))


R = TypeVar("R", bound=_Regression)


@contextmanager
def regression_of(item: pytest.Item, kind: type[R]) -> Iterator[R]:
    """Compare by name while a test runs, in the style of baselines."""
    stem = str(item.config.rootpath / default_folder(item) / stem_of(item)).casefold()
    sharers = sorted(item.config.stash[STEMS].get(stem, ()))
    if len(sharers) > 1:
        pytest.fail(f"{kind.caller}: {' and '.join(sharers)} share baselines", pytrace=False)
    with baseline_style() if kind is HeatmapRegression else nullcontext():
        yield kind(item)
