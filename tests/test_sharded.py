"""Attention over several ranks is examined as it is called there, and what is wrong is named.

The subjects are in `sharded_attention`, which knows nothing of the catalogue.
"""

import json
import multiprocessing
import os
import signal
import subprocess
import sys
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from sharded_attention import (
    dropping,
    exchanging,
    filled_up,
    of_pytorch,
    positions,
    rotating,
    theirs,
)
from sharded_gradients import GRADIENTS, RIGHT_GRADIENTS

from pytest_attnheat import AttentionSpec, check_attention, diagnose
from pytest_attnheat.attention.defects import DEFECTS
from pytest_attnheat.attention.shards import SCHEMES, Shards
from pytest_attnheat.contract.checks import CHECKS
from pytest_attnheat.contract.sharded import on_ranks

SENTENCES = {defect.name: defect.sentence for defect in DEFECTS}
BY_NAME = {check.name: check for check in CHECKS}
# The name that is to be found, the subject, its scheme, and what is declared besides.
OUTPUTS: dict[str, tuple[str, Any, str, dict[str, Any]]] = {
    "order": ("shards_out_of_order", rotating("taken_for_ring", scheme="zigzag"), "zigzag", {}),
    "stripes": ("shards_out_of_order", rotating("taken_for_ring", scheme="striped"), "striped", {}),
    "chunks": ("shards_out_of_order", exchanging("chunks_reversed"), "ulysses", {}),
    "backwards": ("shards_out_of_order", rotating("keys_backwards"), "ring", {}),
    "causal": ("shards_causal_alone", rotating("causal_in_each"), "ring", {}),
    "causal own": ("shards_causal_alone", rotating("causal_in_own"), "ring", {}),
    "window": ("shards_window_alone", rotating("shards_window_alone", window=(2, 1)), "ring",
               {"window": (2, 1)}),
    "alone": ("shards_alone", rotating("shards_alone"), "ring", {}),
    "added": ("parts_added", rotating("parts_added"), "ring", {}),
    "averaged": ("parts_averaged", rotating("parts_averaged"), "ring", {}),
    "base two": ("merge_in_base_two", rotating("merge_in_base_two", scheme="zigzag"), "zigzag", {}),
    "base e": ("lse_in_base_two", rotating("lse_in_base_two"), "ring", {}),
    "filled up": ("shards_padded", filled_up, "ring", {"uneven": True}),
    "cut off": ("shards_cut_off", rotating("shards_cut_off"), "ring", {"uneven": True}),
}  # fmt: skip
# Two ranks have no other direction in which keys could travel.
SAME_ON_TWO = ("backwards",)
RIGHT = {
    **{scheme: (rotating(scheme=scheme), scheme, {"uneven": True})
       for scheme in ("ring", "zigzag", "striped")},
    "windowed": (rotating(window=(3, 0)), "ring", {"window": (3, 0)}),
    "ulysses": (exchanging(), "ulysses", {}),
    "PyTorch": (of_pytorch(), "ring", {"dtypes": ("float32",)}),
    "PyTorch balanced": (of_pytorch(balanced=True), "zigzag", {}),
}  # fmt: skip


@pytest.fixture(autouse=True)
def nothing_left():
    yield
    assert not multiprocessing.active_children()


def spec_of(subject, scheme, **declared):
    return AttentionSpec(subject, sharding=scheme, **{"dtypes": ("float64",), **declared})


def some(*names):
    return [BY_NAME[name] for name in names]


@pytest.mark.parametrize("ranks", [2, 4])
@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_scheme_says_which_positions_each_rank_holds_and_gathers_what_it_scattered(scheme, ranks):
    shards = Shards(scheme, ranks)
    for length in (4 * ranks, 4 * ranks - 1):
        held = [one.tolist() for one in shards.of(length)]
        own = "ring" if scheme == "ulysses" else scheme
        assert held == [positions(own, rank, ranks, length) for rank in range(ranks)]
        whole = torch.arange(length * 3).view(3, length)
        assert torch.equal(shards.gather(shards.scatter(whole, 1), 1), whole)
        owner, local = shards.owner(length), shards.local(length)
        assert all(held[owner[p]][local[p]] == p for p in range(length))


@pytest.mark.parametrize("name", RIGHT)
def test_right_attention_passes(name):
    subject, scheme, declared = RIGHT[name]
    if theirs is None and name.startswith("PyTorch"):
        pytest.skip("an older version of torch has its ring elsewhere")
    checks = some("plain", "causal", "large_scores")
    report = check_attention(spec_of(subject, scheme, **declared), ranks=2, checks=checks)
    assert report.passed, str(report)


@pytest.mark.matrix
@pytest.mark.parametrize("name", OUTPUTS)
@pytest.mark.parametrize("ranks", [2, 4])
def test_an_output_that_is_wrong_over_ranks_fails_with_the_name_of_what_is_wrong(name, ranks):
    expected, subject, scheme, declared = OUTPUTS[name]
    sizes = f"sizes={4 * ranks - 1}x{4 * ranks - 1} " if declared.get("uneven") else ""
    causal = "window" not in declared and not declared.get("uneven") and "parts" not in expected
    call = f"{sizes}causal={causal} gradients=none"
    report = check_attention(spec_of(subject, scheme, **declared), ranks=ranks, replay=call)
    if ranks == 2 and name in SAME_ON_TWO:
        assert report.passed
    else:
        assert SENTENCES[expected] in report.failed[0].message


@pytest.mark.matrix(of=3)
@pytest.mark.parametrize("name", ["order", "chunks", "causal own", "averaged", "filled up"])
def test_what_is_wrong_over_ranks_is_diagnosed(name):
    expected, subject, scheme, declared = OUTPUTS[name]
    spec, sharded = on_ranks(spec_of(subject, scheme, **declared), 2, 60.0)
    with closing(sharded):
        found = diagnose(spec)
    assert found.defects == (expected,), found


@pytest.mark.parametrize("ranks", [2, 4])
@pytest.mark.parametrize(
    ("subject", "scheme"),
    [(dropping("one_seed"), "ring"), (dropping("one_seed", "gathered"), "zigzag"),
     (exchanging("one_seed"), "ulysses")],
    ids=["ring", "gathered", "ulysses"],
)  # fmt: skip
def test_one_seed_of_dropout_for_all_ranks_is_named(subject, scheme, ranks):
    spec = spec_of(subject, scheme, gradients=False, causal=None, dtypes=("float32",))
    (found,) = check_attention(spec, ranks=ranks, checks=some("dropout")).results
    assert found.status == "failed"
    assert "with dropout_p=0.25 ranks 0 and 1 drop the same weights" in found.message
    assert SENTENCES["shards_dropped_alike"] in found.message


@pytest.mark.parametrize(
    ("subject", "scheme"),
    [(dropping(), "striped"), (dropping("gathered"), "ring"), (exchanging(), "ulysses")],
    ids=["ring", "gathered", "ulysses"],
)
def test_ranks_that_draw_random_numbers_of_their_own_pass(subject, scheme):
    spec = spec_of(subject, scheme, gradients=False, causal=None, dtypes=("float32",))
    report = check_attention(spec, ranks=2, checks=some("dropout"), quick=True)
    assert report.passed, str(report)


def test_keys_that_are_dropped_for_all_queries_are_not_taken_for_one_seed():
    spec = spec_of(dropping("keys_dropped"), "ring", gradients=False, causal=None)
    (found,) = check_attention(spec, ranks=2, checks=some("dropout"), quick=True).results
    assert found.status == "failed"
    assert "what is dropped is the same for all queries" in found.message


@pytest.fixture(scope="module")
def of_gradients():
    """What is found of gradients, in a process without the pretend device.

    A fork has no backward pass after one of its parent, where there is another device than the CPU.
    """
    tests = Path(__file__).parent
    path = os.pathsep.join([str(tests), str(tests.parent)])
    done = subprocess.run(
        [sys.executable, str(tests / "sharded_gradients.py")],
        capture_output=True, text=True, timeout=300, env={**os.environ, "PYTHONPATH": path},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return {(name, ranks): rest for name, ranks, *rest in map(json.loads, done.stdout.splitlines())}


@pytest.mark.parametrize("name", RIGHT_GRADIENTS)
@pytest.mark.parametrize("ranks", [2, 4])
def test_right_gradients_pass(name, ranks, of_gradients):
    if theirs is None and name.startswith("PyTorch"):
        pytest.skip("an older version of torch has its ring elsewhere")
    assert of_gradients[name, ranks] == [True, ""]


@pytest.mark.parametrize("name", GRADIENTS)
@pytest.mark.parametrize("ranks", [2, 4])
def test_gradients_that_are_wrong_over_ranks_are_named(name, ranks, of_gradients):
    passed, said = of_gradients[name, ranks]
    assert not passed
    assert "the output is right" in said
    assert GRADIENTS[name] in said


def test_a_rank_that_dies_is_a_failure_and_the_other_checks_are_asked():
    def dying(query, key, value, is_causal=False):
        if is_causal and dist.get_rank() == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        return rotating()(query, key, value, is_causal)

    spec = spec_of(dying, "ring")
    report = check_attention(spec, ranks=2, checks=some("causal", "plain"))
    assert [one.status for one in report.results] == ["failed", "passed"]
    assert report.failed[0].reason == "rank 1 of 2 ended its process: SIGKILL (Killed)"
    assert report.failed[0].replay.startswith("causal=True ")


def test_a_subject_that_hangs_is_given_up_after_two_calls():
    def hangs(query, key, value, is_causal=False):
        if torch.distributed.get_rank() == 0:
            torch.distributed.barrier()
        return query

    spec = AttentionSpec(hangs, sharding="ring", mask=None, dtypes=("float32",))
    report = check_attention(spec, ranks=2, quick=True, time_limit=0.5)
    (failed,) = report.failed
    assert failed.message.startswith("rank 0 of 2 did not answer within 0.5 s, the time_limit; so")
    assert not report.passed


def test_what_a_rank_refuses_is_skipped_and_what_it_raises_is_told():
    def refusing(query, key, value, is_causal=False, scale=None):
        if is_causal:
            raise NotImplementedError("no causality here")
        if scale is not None:
            raise KeyError("scale")
        return rotating()(query, key, value)

    checks = some("causal", "scale_argument")
    report = check_attention(spec_of(refusing, "ring"), ranks=2, checks=checks)
    assert [one.status for one in report.results] == ["skipped", "failed"]
    assert report.results[0].message == "the subject refuses: no causality here"
    assert "it raised KeyError: 'scale'" in report.results[1].message
    assert "on each of 2 ranks: test_sharded.py:" in report.results[1].message


def test_a_rank_that_answers_other_queries_than_its_own_is_told():
    def gathering(query, key, value):
        whole = [torch.empty_like(query) for _ in range(dist.get_world_size())]
        dist.all_gather(whole, query.contiguous())
        return torch.cat(whole, 2)

    report = check_attention(spec_of(gathering, "ring"), ranks=2, checks=some("plain"))
    assert "rank 0 of 2 must answer its own queries, here of shape" in report.failed[0].message


def test_strides_are_not_asked_of_shards_that_are_laid_out_anew():
    (found,) = check_attention(spec_of(rotating(), "ring"), ranks=2, checks=some("layout")).results
    assert found.status == "skipped"
    assert found.message == "each rank gets shards that are laid out anew"


def test_what_a_rank_writes_into_is_written_into_the_whole():
    def writing(query, key, value):
        output = rotating()(query, key, value)
        if dist.get_rank() == 1:
            key[:, :, -1] = 0
        return output

    spec = spec_of(writing, "zigzag", gradients=False)
    (found,) = check_attention(spec, ranks=2, checks=some("repeats"), quick=True).failed
    assert "64 of 512 elements change: the subject writes into key" in found.message
    assert "key[0, 0, 5, 0] was " in found.message  # the last that rank 1 holds


def test_without_ranks_nothing_is_examined_and_it_is_said_how():
    report = check_attention(spec_of(rotating(), "ring"), quick=True)
    assert not report.passed
    assert "it lies on several ranks: check_attention(spec, ranks=) starts them" in str(report)


@pytest.mark.parametrize(
    ("declared", "options", "said"),
    [
        ({"sharding": "spiral"}, {}, r"^sharding: got 'spiral'; accepted is one of 'ring', "),
        (
            {"mask": "keep"},
            {},
            r"^mask: got 'keep' beside sharding; accepted is None: nothing else",
        ),
        ({"sharding": None}, {}, r"^ranks: got 2 for what is not sharded; accepted is "),
        ({}, {"ranks": 1}, r"^ranks: got 1; accepted is a whole number from 2"),
        ({}, {"isolate": True}, r"^isolate: got True beside ranks; accepted is None"),
    ],
)
def test_what_cannot_be_sharded_is_refused(declared, options, said):
    with pytest.raises(ValueError, match=said):
        check_attention(
            AttentionSpec(rotating(), **{"sharding": "ring", **declared}), **{"ranks": 2, **options}
        )
