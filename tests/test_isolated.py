"""A subject in a process of its own: a crash or a hang of it is a failure, and the run goes on."""

import multiprocessing
import os
import signal
import time
from contextlib import closing

import pytest
import torch
import torch._dynamo
from torch.nn.functional import scaled_dot_product_attention as sdpa

from pytest_attnheat import AttentionSpec, callables, check_attention
from pytest_attnheat.contract import isolated, processes, running
from pytest_attnheat.contract.checks import CHECKS, Check
from pytest_attnheat.contract.combinations import Replay
from pytest_attnheat.contract.running import examinations_of

BY_NAME = {check.name: check for check in CHECKS}


def some(*names):
    return [BY_NAME[name] for name in names]


def examined(subject, *names, **options):
    spec = AttentionSpec(subject, dtypes=("float32",))
    report = check_attention(spec, checks=some(*names), isolate=True, **options)
    assert not multiprocessing.active_children()
    return report, {result.name: result for result in report.results}


def test_a_crash_is_a_failure_with_its_smallest_call_and_the_others_are_asked():
    def crashing(query, key, value, is_causal=False):
        if is_causal and query.shape[0] > 1:
            os.kill(os.getpid(), signal.SIGSEGV)
        return sdpa(query, key, value, is_causal=is_causal)

    report, found = examined(crashing, "plain", "causal", "batch")
    assert [result.status for result in report.results] == ["passed", "failed", "passed"]
    said = found["causal"]
    assert said.reason == "the subject ended its process: SIGSEGV (Segmentation fault)"
    assert said.replay == "sizes=1x1 key_heads=1 head_dim=8 causal=True dtype=float32 seed=0"
    assert said.message.splitlines()[1:] == [
        f'  repeat   --attn-replay="{said.replay}" --attn-isolate',
        f'           check_attention(..., replay="{said.replay}", isolate=True)',
    ]
    assert [one["isolated"] for one in report.as_dict()["results"]] == [False, True, False]
    again = check_attention(report.spec, replay=said.replay, isolate=True)
    assert [result.reason for result in again.failed] == [said.reason]


def test_a_hang_is_a_failure_and_its_process_is_ended():
    def hanging(query, key, value):
        if query.shape[-2] == key.shape[-2] == 31:
            time.sleep(1000)
        return sdpa(query, key, value)

    report, found = examined(hanging, "block_lengths", "plain", time_limit=2)
    assert found["block_lengths"].reason == "the subject did not answer within 2 s, its time_limit"
    replay = found["block_lengths"].replay
    assert replay.startswith("sizes=31x31 ")
    assert found["block_lengths"].message.splitlines()[1:] == [
        f'  repeat   --attn-replay="{replay}" --attn-isolate --attn-time-limit=2',
        f'           check_attention(..., replay="{replay}", isolate=True, time_limit=2)',
    ]
    assert report.as_dict()["results"][0]["isolated"]
    assert found["plain"].status == "passed"


def test_a_call_that_is_known_to_crash_says_the_same_again():
    def crashing(query, key, value):
        if query.shape[-2] == key.shape[-2] == 7:
            os.abort()
        return sdpa(query, key, value)

    spec = AttentionSpec(crashing, dtypes=("float32",))
    replay = "sizes=7x7 dtype=float32 seed=0"
    (examination,) = examinations_of(spec)
    worker, _ = isolated.isolated(spec, (), True, 3.5)
    with closing(worker):
        found = [worker.run(Replay.of(replay).check, examination) for _ in range(2)]
    first, second = (one.message.splitlines() for one in found)
    assert all(one.isolated and one.status == "failed" for one in found)
    assert second[1:] == [line.replace(found[0].replay, found[1].replay) for line in first[1:]]
    assert first[1].endswith("--attn-isolate --attn-time-limit=3.5")


def test_what_crashes_always_is_not_asked_for_ever():
    names = ("plain", "large_scores", "no_leakage", "batch", "layout", "repeats")
    report, found = examined(lambda query, key, value: os.abort(), *names)
    assert report.failed
    assert found["plain"].reason == "the subject ended its process: SIGABRT (Aborted)"
    assert not report.passed


def test_a_gpu_that_is_lost_is_told_once_and_nothing_more_is_asked_of_it(monkeypatch):
    faults = []

    def faulty(query, key, value, is_causal=False):
        if is_causal:
            faults.append("CUDA error: misaligned address")
        return sdpa(query, key, value, is_causal=is_causal)

    monkeypatch.setattr(running, "fault_of", lambda device: "".join(faults[:1]))
    spec = AttentionSpec(faulty, dtypes=("float32",), square=False)
    report = check_attention(spec, checks=some("plain", "causal", "batch"))
    assert [result.status for result in report.results] == ["passed", "failed", "skipped"]
    lost, skipped = report.results[1:]
    assert lost.message.splitlines() == [
        "the subject left its GPU unusable: CUDA error: misaligned address",
        "  hint     isolate=True, or --attn-isolate, asks it in a process of its own, with the "
        "call that does it",
    ]
    assert skipped.reason == "this process has lost its GPU: CUDA error: misaligned address"


def test_what_only_computes_wrongly_is_diagnosed_as_it_would_be_here():
    report, found = examined(lambda query, key, value: sdpa(query, key, value, scale=1.0), "plain")
    assert report.diagnosis.defects == ("scale_missing",)
    assert "scores are not scaled" in found["plain"].failure.cause


def test_a_block_that_crashes_fails_and_says_so():
    class Crashing(torch.nn.Module):
        def forward(self, hidden):
            if len(hidden) == 1:
                os.abort()
            return hidden

    spec = AttentionSpec(Crashing().eval(), inputs=torch.randn(2, 5, 4), causal=None)
    report = check_attention(spec, isolate=True)
    failed = {result.name: result.reason for result in report.failed}
    assert failed["batch"] == "the subject ended its process: SIGABRT (Aborted)"


def test_own_checks_and_expected_failures_are_kept():
    def never(examination):
        raise AssertionError("never so")

    own = [Check("own", "it is so", never), *some("plain")]
    known = {"own": "see issue 7"}
    report = check_attention(sdpa, checks=own, isolate=True, quick=True, expected_failures=known)
    assert [result.status for result in report.results] == ["xfailed", "passed"]


def test_what_is_compiled_is_isolated_without_being_asked(monkeypatch):
    asked = []
    monkeypatch.setattr(isolated.Isolated, "start", lambda self: asked.append(self.spec.name))
    compiled = torch.compile(lambda query, key, value: sdpa(query, key, value), backend="eager")

    def calling(query, key, value):
        return compiled(query, key, value)

    for subject in (compiled, calling):
        spec = AttentionSpec(subject, name="it")
        assert isolated.isolated(spec, (), None, 1.0)[0] is not None
        assert isolated.isolated(spec, (), False, 1.0) == (None, "")
    assert isolated.isolated(AttentionSpec(sdpa), (), None, 1.0) == (None, "")
    assert asked == ["it", "it"]


def test_without_a_fork_a_subject_has_to_be_one_that_can_be_imported(monkeypatch):
    monkeypatch.setattr(processes, "accelerators", lambda: ["cuda"])  # which no fork may use
    compiled = torch.compile(lambda query, key, value: sdpa(query, key, value), backend="eager")
    spec = AttentionSpec(compiled, dtypes=("float32",))
    with pytest.raises(ValueError, match=r"isolate: got .*; accepted is a function or class at"):
        check_attention(spec, isolate=True)
    worker, hint = isolated.isolated(spec, (), None, 1.0)
    assert worker is None
    assert hint.startswith("it is compiled, and is not examined in a process of its own: isolate: ")
    report, _ = examined(sdpa, "plain")
    assert report.passed, str(report)


@pytest.mark.parametrize("limit", [0, -1.0, float("nan"), float("inf")])
def test_a_time_limit_is_a_positive_number(limit):
    with pytest.raises(ValueError, match="time_limit: got "):
        check_attention(sdpa, isolate=True, time_limit=limit)


def limit_of_compilations():
    """The name of the setting: another before torch 2.7."""
    known = hasattr(torch._dynamo.config, "recompile_limit")
    return "recompile_limit" if known else "cache_size_limit"


@pytest.mark.filterwarnings("ignore")
def test_what_is_compiled_is_asked_compiled_however_many_shapes_there_are():
    def miscompiled(query, key, value, attn_mask=None, is_causal=False):
        output = sdpa(query, key, value, attn_mask, is_causal=is_causal and attn_mask is None)
        wrong = torch.compiler.is_compiling() and query.shape[-2] == key.shape[-2] == 31
        return 2 * output if wrong else output

    checks = [BY_NAME[name] for name in ("plain", "masked", "causal", "block_lengths")]
    compiled = torch.compile(miscompiled, backend="eager", dynamic=False)
    spec = AttentionSpec(compiled, dtypes=("float32",))
    report = check_attention(spec, checks=checks, isolate=False)
    assert {result.name for result in report.failed} == {"block_lengths"}
    assert getattr(torch._dynamo.config, limit_of_compilations()) == 8  # left as it was


@pytest.mark.filterwarnings("ignore")
def test_what_would_run_uncompiled_is_not_asked(monkeypatch):
    monkeypatch.setattr(callables, "_COMPILATIONS", 1)
    compiled = torch.compile(lambda q, k, v: sdpa(q, k, v), backend="eager", dynamic=False)
    with torch._dynamo.config.patch({limit_of_compilations(): 1}):
        report = check_attention(compiled, checks=some("plain", "batch"), isolate=False)
    said = "not asked: it was compiled so often that torch.compile would run it uncompiled"
    assert said in {result.reason for result in report.results}
    assert not report.failed
