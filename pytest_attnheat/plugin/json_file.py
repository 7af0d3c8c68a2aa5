"""`--attn-json`: what the examination found, as plain data in one file."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from pytest_attnheat.plugin.summary import verdict_of


class JsonFile:
    """Gathers the verdicts of a run, those of workers too, and writes them when it ends."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._subjects: dict[tuple[str, str], list[dict[str, Any]]] = {}

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Keep the verdict of a check."""
        verdict = verdict_of(report)
        if verdict is not None:
            subject = verdict["where"], verdict["subject"]
            self._subjects.setdefault(subject, []).append(dict(verdict))

    # After all others: some may still fail.
    @pytest.hookimpl(trylast=True)
    def pytest_sessionfinish(self) -> None:
        """Write the file, whole or not at all."""
        from pytest_attnheat.contract.data import VERSION

        subjects = [_subject(where, found) for (where, _), found in sorted(self._subjects.items())]
        text = json.dumps({"version": VERSION, "subjects": subjects}, indent=1, allow_nan=False)
        self._path.parent.mkdir(parents=True, exist_ok=True)
        part = self._path.with_name(f".{self._path.name}.{os.getpid()}")
        part.write_text(f"{text}\n", encoding="utf-8")
        part.replace(self._path)


def _subject(where: str, found: list[dict[str, Any]]) -> dict[str, Any]:
    """What `Report.as_dict` says of one subject, and where it was examined."""
    from pytest_attnheat.contract.data import report_data

    diagnosed = [verdict["diagnosed"] for verdict in found if "diagnosed" in verdict]
    hints = list(dict.fromkeys(hint for verdict in found for hint in verdict["hints"]))
    found = sorted(found, key=lambda verdict: verdict["number"])  # workers end in any order
    results = [verdict["result"] | {"status": verdict["outcome"]} for verdict in found]
    data = report_data(found[0]["spec"], results, next(iter(diagnosed), None), hints, 0)
    return {"where": where, **data}
