"""`check_attention`: run the examination in plain Python, and its report."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing, nullcontext
from dataclasses import dataclass
from functools import cached_property, partial
from itertools import product
from typing import Any, TypeAlias

from ..attention.chunks import Progress
from ..callables import is_compiled
from ..capture.record import AttentionRecord
from ..capture.trace import Trace
from ..failure import html_table
from ..inputs import misuse
from .block_checks import ORDERLESS
from .combinations import Replay
from .declarations import hints_of
from .diagnosis import Diagnosis
from .examination import Check
from .isolated import TIME_LIMIT, isolated
from .ready import as_spec
from .running import (
    KNOWN,
    TWO_CODES,
    Result,
    checks_of,
    diagnosis_of,
    examinations_of,
    expected_of,
    left_out_of,
    report_data,
    run_check,
)
from .sharded import on_ranks
from .spec import AttentionSpec

ExpectedFailures: TypeAlias = Mapping[str, str]


@dataclass(frozen=True)
class Report:
    """The results of an examination; printed, it is a table.

    Attributes:
        spec: What was examined.
        results: One for each check, dtype and device.
        seed: Where the inputs were drawn from.
        hints: What a reader may want to declare or know, besides.
        left_out: The names of the checks that the quick form of the examination left out.
    """

    spec: AttentionSpec
    results: tuple[Result, ...]
    seed: int = 0
    hints: tuple[str, ...] = ()
    left_out: tuple[str, ...] = ()

    @property
    def passed(self) -> bool:
        """Whether no check failed, and some were asked."""
        return not self.failed and self.asked

    @property
    def asked(self) -> bool:
        """Whether any check was asked, and not refused."""
        return any(result.status != "skipped" for result in self.results)

    @property
    def failed(self) -> tuple[Result, ...]:
        """The results that failed."""
        return tuple(result for result in self.results if result.status == "failed")

    @cached_property
    def diagnosis(self) -> Diagnosis | None:
        """What the implementation computes instead; None if no diagnosis tells, or it passed."""
        # Of a report that failed, a diagnosis whose cases all come out right would say that all is
        # well: the checks tell what is wrong.
        found = self._inside[0]
        return None if found is None or found.healthy else found

    @cached_property
    def _inside(self) -> tuple[Diagnosis | None, dict[str, str]]:
        return self._diagnosed(partial(diagnosis_of, self.spec, seed=self.seed))

    def _diagnosed(self, ask: Callable[..., Any]) -> tuple[Diagnosis | None, dict[str, str]]:
        """The diagnosis, and what is said of attention in the call that failed, by check."""
        first, said = None, dict[str, str]()
        for result in self.failed:
            if result.name in said:
                continue
            search = first is None or first.healthy
            found, said[result.name] = ask(result, search=search)
            first = found if search and found is not None else first
            if not self.spec.is_block:
                break
        return first, said

    def __str__(self) -> str:
        """The diagnosis first, then a line for each check, then what failed in full."""
        return "\n".join([*self._above(), "", *self._table(), *self._below()])

    def _above(self) -> list[str]:
        lines = [f"{self.spec.name}: {self._head()}"]
        lines += dict.fromkeys(result.declaration for result in self.failed if result.declaration)
        lines += [f"hint: {hint}" for hint in self._hints]
        if self.diagnosis is not None and self.diagnosis.sentence not in lines:
            lines += ["", str(self.diagnosis)]
        return lines

    def _below(self) -> list[str]:
        lines = list(self._left_out())
        if self.passed:
            lines += self._notes()
        groups = self._alike()
        if unclear := self._under_a_wrong_layout():
            groups = [alike for alike in groups if alike[0].name not in unclear]
        for alike in groups:
            # What can be called again says most.
            first = next((result for result in alike if result.replay), alike[0])
            said = [first.declaration] if first.declaration else []
            found = self._inside[1].get(first.name, "") if not said else ""
            said += [first.message, *([f"  inside   {found}"] if found else [])]
            names = ", ".join(result.name for result in alike)
            lines += ["", f"{names} ({first.dtype}, {first.device})", *said]
        if unclear:
            lines += ["", f"{', '.join(unclear)}: failed under a wrong layout, which tells nothing"]
        return lines

    def _under_a_wrong_layout(self) -> list[str]:
        """The checks that failed beside those that know that the layout is a wrong one."""
        said = None if self.diagnosis is None else self.diagnosis.sentence
        telling = {result.name for result in self.failed if result.declaration == said}
        names = dict.fromkeys(result.name for result in self.failed)
        return [name for name in names if name not in telling] if telling else []

    def _notes(self) -> Iterator[str]:
        """What checks that passed say; in which dtype, where it is not the same in all."""
        noted = [r for r in self.results if r.status == "passed" and r.message]
        notes = list(dict.fromkeys((r.name, r.message) for r in noted))
        for name, note in notes:
            places = [
                f"{r.dtype} on {r.device}" for r in noted if (r.name, r.message) == (name, note)
            ]
            differs = sum(other == name for other, _ in notes) > 1
            yield f"{name} ({', '.join(places)}): {note}" if differs else f"{name}: {note}"

    def _left_out(self) -> Iterator[str]:
        """What was not asked, and why checks of a block were skipped, each reason once."""
        # Of others -rs lists dozens.
        if self.left_out:
            yield f"not asked in the quick form: {', '.join(self.left_out)}"
        reasons = dict[str, dict[str, None]]()
        for result in self.results if self.spec.is_block else ():
            if result.status == "skipped" and result.reason and result.reason not in self._head():
                reasons.setdefault(result.reason, {})[result.name] = None
        for reason, names in reasons.items():
            yield f"skipped {', '.join(names)}: {reason}"

    def _alike(self) -> list[list[Result]]:
        """The first failure of each check; those whose subject raised the same thing together."""
        firsts, groups = dict[str, Result](), dict[str, list[Result]]()
        for result in self.failed:
            firsts.setdefault(result.name, result)
        for name, result in firsts.items():
            raised = result.failure is None and result.reason.startswith("it raised")
            groups.setdefault(result.reason if raised else name, []).append(result)
        return list(groups.values())

    def __repr__(self) -> str:
        """Its first line: all of it is printed by `print`."""
        return f"<Report {self.spec.name}: {self._head()}>"

    def as_dict(self) -> dict[str, Any]:
        """Return all that it says as plain data, which `json.dumps` writes.

        Numbers that are not finite are "nan", "inf" and "-inf"; there are no tensors. What each
        key means is on the page "The examination" of the docs, and changes with "version" alone.
        """
        results = [
            result.as_dict() | {"inside": self._inside[1].get(result.name, "")}
            for result in self.results
        ]
        return report_data(
            self.spec, results, self.diagnosis, self._hints, self.seed, self.left_out
        )

    @property
    def _hints(self) -> list[str]:
        inside = [r for r in self.results if r.name == "attention_inside" and r.status == "passed"]
        said = [result.message for result in inside if result.message]
        said += dict.fromkeys(r.message for r in self.results if r.message == ORDERLESS)
        called = [self.spec.convention.said(self.spec)] if self.spec.convention else []
        return [*called, *self.hints, *hints_of(self.spec), *said]

    def _head(self) -> str:
        skipped = sum(result.status == "skipped" for result in self.results)
        if not self.asked and self.spec.unmet:
            return f"nothing was examined: {self.spec.unmet}"
        if not self.asked:
            calls = [r.message for r in self.results if r.name == "call" and r.message]
            why = {"each check was refused, or left out by what is declared"}
            alike = {r.message for r in self.results}
            return f"nothing was examined; {(calls or [*(alike if len(alike) == 1 else why)])[0]}"
        head = f"{len(self.failed)} of {len(self.results) - skipped} checks failed"
        if not self.failed:
            head = f"all {'quick ' if self.left_out else ''}checks passed"
        head += f", {skipped} skipped" if skipped else ""
        if self.failed or not self.spec.is_block:
            return head
        inside = [r for r in self.results if r.name == "attention_inside"]
        left_out = next((r.message for r in inside if r.status == "skipped"), "")
        if left_out or not inside:
            return f"{head}; attention inside was not judged: {left_out or 'it was not asked'}"
        return head + (f"; {TWO_CODES}" if is_compiled(self.spec.subject) else "")

    def _rows(self) -> list[list[str]]:
        """Its table: the checks, by dtype and device."""
        columns = list(dict.fromkeys((r.dtype, r.device) for r in self.results))
        by_place = {(r.name, r.dtype, r.device): r.status for r in self.results}
        heads = [dtype if device == "cpu" else f"{dtype} {device}" for dtype, device in columns]
        names = dict.fromkeys(r.name for r in self.results)
        return [
            ["", *heads],
            *([name, *(by_place.get((name, *one), "") for one in columns)] for name in names),
        ]

    def _table(self) -> Iterator[str]:
        rows = self._rows()
        widths = [max(len(row[0]) for row in rows), *map(len, rows[0][1:])]
        for row in rows:
            yield "  ".join(map(str.ljust, row, widths)).rstrip()

    def _repr_html_(self) -> str:
        return html_table(
            self._rows(), above="\n".join(self._above()), below="\n".join(self._below()).lstrip()
        )


def check_attention(
    subject: AttentionSpec | Callable[..., Any] | Trace | AttentionRecord,
    *,
    quick: bool = False,
    long: bool = False,
    checks: Sequence[Check] | None = None,
    expected_failures: ExpectedFailures | None = None,
    seed: int = 0,
    replay: str | None = None,
    isolate: bool | None = None,
    time_limit: float = TIME_LIMIT,
    ranks: int | None = None,
) -> Report:
    """Examine an implementation of attention.

    Args:
        subject: What is claimed of it; or a callable with the signature of
            `torch.nn.functional.scaled_dot_product_attention`; or what `capture_attention`
            recorded.
        quick: Run fewer checks, in the first of the dtypes alone.
        long: Make one call more, as long as memory allows, up to 131,045 keys: a few rows of it
            are judged, with NaN before and after its inputs in memory. It takes from seconds to
            minutes.
        checks: The checks; by default all that are known: `CHECKS`, `BLOCK_CHECKS` or
            `CAPTURED_CHECKS`.
        expected_failures: Names of checks that are known to fail, with the reason.
        seed: Where the inputs are drawn from.
        replay: A call as a failure printed it, "sizes=1x2 causal=True": nothing else is judged.
        isolate: Whether the subject is called in a process of its own, so that a crash or a hang
            of it is a failure; by default, if it is compiled and can be.
        time_limit: How long one call may take there, or on ranks, in seconds.
        ranks: On how many ranks the subject is called, each a process with `torch.distributed`, of
            a specification that says `sharding`: gloo on a CPU, nccl on as many GPUs.

    Returns:
        The report. It raises nothing about the implementation.

    Raises:
        TypeError: The subject is not callable, or a check is not one.
        ValueError: The name of an expected failure is not that of a check, `replay` is no call of
            the subject, or it cannot be isolated. It is sharded and `ranks` is not given, or it is
            not.
    """
    spec = as_spec(subject)
    if ranks is not None:
        if isolate:
            raise ValueError(misuse("isolate", "True beside ranks", "None: ranks are processes"))
        spec, sharded = on_ranks(spec, ranks, time_limit)
        with closing(sharded):
            report = check_attention(
                spec, quick=quick, long=long, checks=checks, expected_failures=expected_failures,
                seed=seed, replay=replay, isolate=False,
            )  # fmt: skip
            _ = report.diagnosis  # made while there are ranks for it
        return report
    asked = checks_of(spec, checks, quick=quick, long=long)
    expected = expected_of(expected_failures, [check.name for check in (*KNOWN, *asked)])
    call = None if replay is None else Replay.of(replay)
    examinations = examinations_of(spec, quick=quick and not (call and call.dtype), seed=seed)
    left_out = left_out_of(spec, asked) if quick and not (checks or call) else ()
    if call is not None:
        examinations, asked = call.among(examinations), (call.check,)
    worker, hint = isolated(spec, asked, isolate, time_limit)
    with nullcontext() if worker is None else closing(worker):
        run = run_check if worker is None else worker.run
        every = list(product(examinations, asked))
        progress = Progress(spec.name, len(every), "checks are made", even=False)
        results = list[Result]()
        for examination, check in every:
            progress.step()
            results.append(run(check, examination, expected.get(check.name)))
        report = Report(spec, tuple(results), seed, (hint,) if hint else (), left_out)
        if worker is not None:  # diagnosed while there is a process for it
            diagnosed = partial(worker.diagnosed, examinations[0])
            vars(report)["_inside"] = report._diagnosed(diagnosed)
    return report
