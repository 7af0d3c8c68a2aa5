"""Checks as pytest calls them, and what the checks of one implementation share."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from itertools import product
from typing import TYPE_CHECKING, Any

import pytest

from ..failure import Failure
from ..inputs import dtype_name
from .settings import ISOLATED, SETTINGS, chosen_devices, device_of_test, end_processes, switched
from .summary import DIAGNOSIS_DRAWN

if TYPE_CHECKING:
    from ..contract.combinations import Replay
    from ..contract.examination import Check, Examination
    from ..contract.isolated import Isolated
    from ..contract.running import Result
    from ..contract.spec import AttentionSpec
    from ..heatmaps.figure import HeatmapFigure


def calls_of(
    config: pytest.Config,
    spec: AttentionSpec,
    expected: Mapping[str, str],
    checks: Sequence[Check] | None,
    *,
    quick: bool,
    long: bool = False,
    ranks: int | None = None,
) -> Iterator[CheckCall]:
    """Make the calls of the checks of one implementation, see `parametrize_with_checks`."""
    from ..contract.running import checks_of, left_out_of

    call = replayed(config)
    if ranks is not None:
        from ..contract.sharded import on_ranks

        spec, sharded = on_ranks(spec, ranks, config.stash[SETTINGS].time_limit)
        config.stash[ISOLATED].append(sharded)
    asked = checks_of(spec, checks, quick=quick, long=long)
    examined = _Examined(config, spec, asked)
    examinations, unselected = examined.examinations(quick=quick and not (call and call.dtype))
    if call is not None:
        examinations, asked = call.among(examinations), (call.check,)
    calls = list(product(examinations, asked))
    examined.told["calls"] = len(calls)
    examined.told["left_out"] = left_out_of(spec, asked) if quick and not (checks or call) else ()
    for number, (examination, check) in enumerate(calls):
        reason = expected.get(check.name, expected.get(f"{spec.name}-{check.name}"))
        yield CheckCall(examined, check, examination, reason, unselected, number)


def replayed(config: pytest.Config) -> Replay | None:
    """The call that `--attn-replay` names."""
    from ..contract.combinations import Replay

    try:
        text = config.getoption("attn_replay")
        return None if text is None else Replay.of(text)
    except ValueError as error:
        raise pytest.UsageError(f"--attn-replay: {error}") from None


class CheckCall:
    """One check of one implementation, in one dtype and on one device, to be called."""

    def __init__(
        self,
        examined: _Examined,
        check: Check,
        examination: Examination,
        expected: str | None,
        unselected: str,
        number: int,
    ) -> None:
        from ..contract.running import Result

        dtype, device = dtype_name(examination.dtype), str(examination.device)
        self._place = dtype if device == "cpu" else f"{dtype}-{device}"
        self.name = f"{examination.spec.name}-{check.name}-{self._place}"
        self.result = Result(check.name, dtype, device, "skipped", reason=unselected)
        self._examined, self._check, self._examination = examined, check, examination
        self._expected, self._inside = expected, ""
        self._unselected, self._number = unselected, number

    def __call__(self) -> None:
        """Check it; fails, skips or xfails the test."""
        __tracebackhide__ = True
        if self._unselected:
            pytest.skip(self._unselected)
        name = str(self._examination.device)
        self.result = replace(self.result, reason=f"the device {name} is absent")
        device = device_of_test(self._examined.config, name)
        self.result = replace(self.result, status="failed", reason="")
        examination = replace(self._examination, device=device)
        self.result = result = self._examined.run(self._check, examination, self._expected)
        if result.status == "skipped":
            self._refuse_what_is_undeclared()
            pytest.skip(result.message)
        if result.status == "xfailed":
            pytest.xfail(result.message)
        if result.status == "failed":
            raise self._failure(examination)

    def _refuse_what_is_undeclared(self) -> None:
        """Fail a check that was skipped, if that is asked for and the declaration is why."""
        __tracebackhide__ = True
        examined = self._examined
        if switched(examined.config, "attn_check_strict") and self.result.message in (
            *examined.told["undeclared"],
            self._examination.spec.unmet,
        ):
            self.result = replace(self.result, status="failed")
            pytest.fail(f"{self.result.message} (--attn-check-strict)", pytrace=False)

    def _failure(self, examination: Examination) -> FailedCheckError:
        """The error: what does not hold, the diagnosis, and the check's own message."""
        declaration = self.result.declaration
        diagnosis, draw, self._inside = self._examined.diagnosed(examination, self.result)
        claim = declaration or f"not so: {self._check.sentence}"
        # A wrong declaration says where to look itself.
        outside = "" if declaration else self._inside
        diagnosis = "" if declaration and diagnosis.endswith(declaration) else diagnosis
        text = "\n\n".join(part for part in (diagnosis, outside, self.result.message) if part)
        return FailedCheckError(self._check.name, claim, text, draw)

    @property
    def verdict(self) -> dict[str, Any]:
        """What it found, in words and numbers alone."""
        result = self.result.as_dict() | {"inside": self._inside}
        own = {"place": self._place, "number": self._number, "result": result}
        return {**self._examined.told, **own}

    def __repr__(self) -> str:
        """Name the check, as a test id does."""
        return f"<check {self.name}>"


class FailedCheckError(Failure):
    """A check that failed; the first of an implementation has the diagnosis, and draws it."""

    # Tests show it by its name alone, as they do pytest's own.
    __module__ = "builtins"

    def __init__(
        self, check: str, claim: str, text: str, draw: Callable[[], HeatmapFigure] | None
    ) -> None:
        super().__init__(check, claim, draw=draw, drawn=DIAGNOSIS_DRAWN)
        self._text = text

    def __reduce__(self) -> tuple[Any, ...]:
        """Be found again by a function: there is no such class in builtins."""
        return _failed_check, self.args, super().__reduce__()[2]

    @property
    def headline(self) -> str:
        """What does not hold."""
        return self.claim

    def __str__(self) -> str:
        """Say all of it: the headline, the diagnosis, and the check's own message."""
        return f"{self.headline}\n\n{self._text}"


def _failed_check(*args: Any) -> FailedCheckError:
    """Make the error anew, without its fields."""
    return FailedCheckError.__new__(FailedCheckError, *args)


class _Examined:
    """What all checks of one implementation share."""

    def __init__(self, config: pytest.Config, spec: AttentionSpec, checks: Sequence[Check]) -> None:
        from ..contract.declarations import hints_of
        from ..contract.needs import all_undeclared
        from ..contract.running import spec_data

        self.config, self.spec, self.checks = config, spec, checks
        unsaid = all_undeclared(spec)
        self.told: dict[str, Any] = {
            "subject": spec.name,
            "hints": list(hints_of(spec, unsaid)),
            "undeclared": unsaid,
        }
        if config.stash[SETTINGS].json:
            self.told["spec"] = spec_data(spec)

    def run(self, check: Check, examination: Examination, expected: str | None) -> Result:
        """Run a check, here or in a process of its own."""
        from ..contract.running import run_check

        worker = self._worker
        run = run_check if worker is None else worker.run
        return run(check, examination, expected)

    @cached_property
    def _worker(self) -> Isolated | None:
        """The process of the subject, if it has one; that of another subject is ended."""
        from ..contract.isolated import isolated
        from ..contract.sharded import Sharded

        end_processes(self.config)
        if isinstance(self.spec.subject, Sharded):  # it has processes of its own
            return None
        wanted = switched(self.config, "attn_isolate") or None
        limit = self.config.stash[SETTINGS].time_limit
        try:
            worker, hint = isolated(self.spec, self.checks, wanted, limit)
        except ValueError as error:
            pytest.fail(str(error), pytrace=False)
        self.told["hints"] += [hint] if hint else []
        if worker is not None:
            self.config.stash[ISOLATED].append(worker)
        return worker

    def diagnosed(
        self, examination: Examination, result: Result
    ) -> tuple[str, Callable[[], HeatmapFigure] | None, str]:
        """The diagnosis and what draws it, the first time, then its sentence alone."""
        # And what is known of attention in the call of a block that failed.
        sentence = self.told.get("diagnosis", "")
        shown = sentence and f"diagnose: {sentence}"
        if "diagnosis" in self.told and not self.spec.is_block:
            return shown, None, ""
        from ..contract.running import diagnosis_data, diagnosis_of

        search, worker = not sentence, self._worker
        if worker is None:
            diagnosis, inside = diagnosis_of(self.spec, result, search=search)
        else:
            diagnosis, inside = worker.diagnosed(examination, result, search=search)
        self.told = {"diagnosis": "", "named": False} | self.told
        if sentence or diagnosis is None or diagnosis.healthy:
            return shown, None, inside
        self.told |= {"diagnosis": diagnosis.sentence, "named": bool(diagnosis.defects)}
        if "spec" in self.told:
            self.told["diagnosed"] = diagnosis_data(diagnosis)
        draw = None if diagnosis.expected_weights is None else diagnosis.draw
        return str(diagnosis), draw, inside

    def examinations(self, *, quick: bool) -> tuple[list[Examination], str]:
        """Its examinations on the selected devices and in the selected dtypes."""
        # If nothing that is declared is selected, one of the others, and why it is skipped: a test
        # without any checks would vanish.
        from ..contract.running import examinations_of

        settings = self.config.stash[SETTINGS]
        given = self.config.getoption("attn_dtype") is not None
        devices = names = chosen_devices(self.config)
        declared = ("cpu",) if self.spec.is_captured else self.spec.devices
        if declared is not None:
            by_name = settings.devices not in (("auto",), ("all",))
            devices = _in_both(declared, names) if by_name else list(declared)
        dtypes = settings.dtypes if given else None
        examinations = examinations_of(self.spec, quick=quick, devices=devices, dtypes=dtypes)
        if examinations:
            return examinations, ""
        return examinations_of(self.spec, quick=True, devices=["cpu"]), (
            f"selected are {', '.join(names)} and {', '.join(settings.dtypes)}, but it is declared "
            f"for {', '.join(declared or names)} and {', '.join(self.spec.dtypes)}"
        )


def _in_both(declared: Sequence[str], chosen: Sequence[str]) -> list[str]:
    """The devices that two lists name; of "cuda" and "cuda:1", the one with a number."""
    pairs = [sorted((one, other), key=len) for one in declared for other in chosen]
    found = [exact for kind, exact in pairs if kind in (exact, exact.partition(":")[0])]
    return list(dict.fromkeys(found))
