"""A test body on several ranks: one that fails, dies or hangs ends all, and nothing is left."""

import multiprocessing
import os
import signal
import time
import warnings
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from devices import NO_CUDA

from pytest_attnheat import Failure
from pytest_attnheat.contract import processes
from pytest_attnheat.contract.ranks import Ranks, on_ranks


@pytest.fixture(autouse=True)
def nothing_left(tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    yield
    assert not multiprocessing.active_children()
    assert not list(tmp_path.glob("attn-ranks-*"))


def summed(more=0.0):
    total = torch.tensor([dist.get_rank() + more])
    dist.all_reduce(total)
    return total


def only(rank, act):
    if dist.get_rank() == rank:
        act()
    return summed()


def kill_self():
    os.kill(os.getpid(), signal.SIGKILL)


def complain():
    raise KeyError("of this rank")


def test_each_rank_runs_the_body_and_what_it_returns_comes_back(ranks):
    kept = 0.5
    assert [float(one) for one in ranks(4, lambda: summed(kept))] == [8.0] * 4
    assert ranks(2, dist.get_rank) == [0, 1]
    assert ranks(1, summed, 2.0) == [torch.tensor([2.0])]


def test_one_rank_that_raises_ends_all_with_its_own_error(ranks):
    with pytest.raises(KeyError, match="of this rank") as caught:
        ranks(4, only, 2, complain)
    (note,) = vars(caught.value)["__notes__"]
    assert note.startswith("on rank 2 of 4: test_ranks.py:")
    assert note.endswith(" in complain")


def test_what_an_error_of_a_rank_was_raised_from_is_told_as_well(ranks):
    def body():
        try:
            {}["inner"]
        except KeyError as inner:
            try:
                raise ValueError("middle")
            except ValueError:
                raise RuntimeError("outer") from inner

    with pytest.raises(RuntimeError, match="outer") as caught:
        ranks(2, body)
    inner = caught.value.__cause__
    assert repr(inner) == "KeyError('inner')"
    (note,) = vars(inner)["__notes__"]
    assert note.startswith("on each of 2 ranks: test_ranks.py:")
    assert caught.value.__suppress_context__


def test_what_an_error_of_a_rank_was_raised_while_handling_is_told_as_well(ranks):
    def body():
        try:
            complain()
        except KeyError:
            raise TypeError("outer")  # noqa: B904

    with pytest.raises(TypeError, match="outer") as caught:
        ranks(2, body)
    assert repr(caught.value.__context__) == "KeyError('of this rank')"
    assert caught.value.__cause__ is None


class OwnWarning(UserWarning):
    pass


@pytest.mark.filterwarnings("always")
def test_what_ranks_warn_of_is_told_once_from_where_it_is(ranks):
    def body(fails):
        class Local(UserWarning):
            pass

        warnings.warn(f"on rank {dist.get_rank()}", OwnWarning, stacklevel=1)
        warnings.warn("on all", Local, stacklevel=1)
        if fails:
            complain()

    for fails in (False, True):
        with warnings.catch_warnings(record=True) as caught:
            if fails:
                with pytest.raises(KeyError):
                    ranks(2, body, True)
            else:
                ranks(2, body, False)
        said = sorted((str(one.message), one.category) for one in caught)
        assert said == [("on all", UserWarning), *((f"on rank {n}", OwnWarning) for n in (0, 1))]
        assert {Path(one.filename).name for one in caught} == {"test_ranks.py"}


def test_a_warning_that_is_an_error_is_one_on_ranks(ranks):
    with pytest.raises(OwnWarning, match="that is an error") as caught:
        ranks(2, warnings.warn, OwnWarning("that is an error"))
    assert vars(caught.value)["__notes__"][0].startswith("on each of 2 ranks")


def test_what_all_ranks_raise_is_said_once(ranks):
    with pytest.raises(KeyError) as caught:
        ranks(2, complain)
    assert vars(caught.value)["__notes__"][0].startswith("on each of 2 ranks: ")


def test_a_rank_that_is_killed_ends_all(ranks):
    start = time.monotonic()
    with pytest.raises(Failure, match=r"^rank 1 of 4 ended its process: SIGKILL \(Killed\)$"):
        ranks(4, only, 1, kill_self)
    assert time.monotonic() - start < 30


def test_a_rank_that_exits_ends_all(ranks):
    with pytest.raises(Failure, match=r"^rank 0 of 2 ended its process with exit code 3$"):
        ranks(2, only, 0, lambda: os._exit(3))


def test_a_rank_that_hangs_ends_all_and_it_is_said_where(ranks):
    with pytest.raises(Failure, match=r"^ranks 0, 1 of 2 did not answer within 1 s") as caught:
        ranks(2, only, 1, lambda: time.sleep(1000), time_limit=1)
    assert "rank 0 is at test_ranks.py:" in caught.value.cause
    assert caught.value.cause.endswith(" in <lambda>")


def test_an_error_that_cannot_be_sent_is_told_in_words():
    class OwnError(Exception):
        def __init__(self, one, other):
            super().__init__(f"{one} and {other}")

    def body():
        raise OwnError("this", "that")

    with pytest.raises(RuntimeError, match=r"^OwnError: this and that\n"):
        on_ranks(2, body)


def test_a_rank_that_skips_or_fails_as_pytest_does_skips_or_fails_the_test(ranks):
    with pytest.raises(pytest.skip.Exception, match=r"^not here\n.*on rank 1 of 2: test_ra"):
        ranks(2, only, 1, lambda: pytest.skip("not here"))
    with pytest.raises(pytest.fail.Exception, match="DID NOT RAISE"):
        ranks(2, only, 1, did_not_raise)


def did_not_raise():
    with pytest.raises(KeyError):
        pass


def test_a_rank_that_skips_does_not_hide_one_that_fails(ranks):
    def body():
        if dist.get_rank() == 0:
            pytest.skip("not here")
        time.sleep(0.05)
        complain()

    with pytest.raises(KeyError, match="of this rank"):
        ranks(2, body)


def test_an_error_that_cannot_even_be_said_is_told_by_its_kind():
    class SilentError(Exception):
        def __str__(self):
            raise KeyError

    def body():
        raise SilentError

    with pytest.raises(RuntimeError, match=r"^SilentError\n"):
        on_ranks(2, body)


class Unreadable:
    """Can be sent, and not be read."""

    def __init__(self, error=None):
        if error:
            raise error

    def __reduce__(self):
        return Unreadable, (OSError("nowhere"),)


def test_what_cannot_be_read_here_is_refused():
    match = r"what a rank returns: got what cannot be read in this process \(OSError: nowhere\);"
    with pytest.raises(TypeError, match=match) as caught:
        on_ranks(2, lambda: Unreadable() if dist.get_rank() == 1 else 0)
    assert vars(caught.value)["__notes__"] == ["on rank 1 of 2"]


def test_what_another_rank_raised_before_one_died_is_said():
    def body():
        if dist.get_rank() == 0:
            complain()
        time.sleep(0.1)
        os._exit(9)

    with pytest.raises(Failure, match=r"^rank 1 of 2 ended its process with exit code 9") as caught:
        on_ranks(2, body)
    assert caught.value.cause.startswith("rank 0 of 2 raised KeyError: 'of this rank', at test_")


def test_a_signal_without_a_name_is_told_by_its_number():
    assert processes.ending(-40).startswith("ended its process: signal 40")


def test_a_rank_may_start_processes_and_they_end_with_it(ranks):
    def body():
        child = multiprocessing.get_context("fork").Process(target=time.sleep, args=(1000,))
        child.start()
        return child.pid

    left = ranks(2, body)
    until = time.monotonic() + 30
    while any(_runs(pid) for pid in left) and time.monotonic() < until:
        time.sleep(0.1)
    assert not any(_runs(pid) for pid in left)


def test_a_rank_that_dies_is_missed_though_what_it_started_lives(ranks):
    def body():
        if not os.fork():
            time.sleep(1000)
        os._exit(4)

    start = time.monotonic()
    with pytest.raises(Failure, match=r"ended its process with exit code 4$"):
        ranks(2, only, 1, body)
    assert time.monotonic() - start < 30


def test_where_there_is_a_group_already_no_ranks_are_started(tmp_path):
    store = dist.FileStore(str(tmp_path / "store"), 1)
    dist.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        with pytest.raises(ValueError, match=r"^ranks: got .* has a group already.*; accepted is "):
            on_ranks(2, summed)
    finally:
        dist.destroy_process_group()


def test_what_cannot_be_returned_is_refused():
    with pytest.raises(TypeError, match=r"what a rank returns: got a function that cannot be sent"):
        on_ranks(2, lambda: lambda: 0)


def test_a_group_answers_several_calls_and_starts_again_after_a_death():
    def body(number):
        return only(0, kill_self) if number < 0 else number + dist.get_rank()

    group = Ranks(2, body)
    try:
        assert group.run([(1,), (5,)]) == [1, 6]
        assert group.run([(2,), (3,)]) == [2, 4]
        with pytest.raises(Failure, match="SIGKILL"):
            group.run([(-1,), (-1,)])
        assert group.run([(0,), (0,)]) == [0, 1]
    finally:
        group.close()


def test_without_a_fork_a_body_has_to_be_one_that_can_be_imported(monkeypatch):
    monkeypatch.setattr(processes, "accelerators", lambda: ["cuda"])
    with pytest.raises(ValueError, match=r"^body: got .*<lambda>, which cannot be sent to another"):
        on_ranks(2, lambda: 0)


@pytest.mark.parametrize(
    ("count", "options", "error"),
    [
        (0, {}, ValueError),
        (2.5, {}, TypeError),
        (2, {"time_limit": 0}, ValueError),
        (2, {"device": "gpu"}, ValueError),
        (2, {"device": "cuda:0"}, ValueError),
        (2, {"device": torch.device("cpu")}, TypeError),
    ],
)
def test_bad_use_is_refused_before_anything_starts(count, options, error):
    with pytest.raises(error, match=r"; accepted is "):
        on_ranks(count, summed, **options)


def test_a_name_that_is_no_option_is_refused_and_it_is_said_how_to_hand_it_on(ranks):
    said = (
        r"^ranks: got more=1; accepted is device= and time_limit=; what the function takes follows "
        r"it without a name, or comes in functools.partial\(function, ...\)$"
    )
    with pytest.raises(TypeError, match=said):
        ranks(2, summed, more=1, time_limit=9)


def test_a_body_that_is_no_function_is_refused():
    with pytest.raises(TypeError, match=r"^body: got int; accepted is a function$"):
        on_ranks(2, 3)


def test_ranks_end_with_the_process_that_started_them(pytester):
    pytester.makepyfile(
        """
        import os, time
        from pathlib import Path
        import torch.distributed as dist

        PARENT = os.getpid()

        def body():
            Path(f"rank-{dist.get_rank()}").write_text(str(os.getpid()))
            dist.barrier()
            if dist.get_rank() == 0:
                os.kill(PARENT, 9)
            time.sleep(1000)

        def test_a(ranks):
            ranks(2, body)
        """
    )
    result = pytester.runpytest_subprocess("-p", "no:hypothesispytest", "-p", "no:pytest_mpl")
    assert result.ret == -signal.SIGKILL
    left = [int((pytester.path / f"rank-{rank}").read_text()) for rank in range(2)]
    until = time.monotonic() + 30
    while any(_runs(pid) for pid in left) and time.monotonic() < until:
        time.sleep(0.1)
    assert not any(_runs(pid) for pid in left)


def _runs(pid):
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    # One that has ended, and that nobody waited for, is still counted.
    status = Path(f"/proc/{pid}/status")
    return not (status.exists() and "\nState:\tZ" in status.read_text())


def test_where_there_are_too_few_gpus_the_test_is_skipped(ranks):
    with pytest.raises(pytest.skip.Exception, match=r"^99 ranks need as many cuda, here are "):
        ranks(99, summed, device="cuda")


@pytest.mark.cuda
@NO_CUDA
def test_on_gpus_tensors_travel_by_nccl(ranks):
    count = min(torch.cuda.device_count(), 4)
    assert ranks(count, _on_gpu, device="cuda") == [count * (count - 1) / 2] * count


def _on_gpu():
    total = torch.tensor([float(dist.get_rank())], device="cuda")
    dist.all_reduce(total)
    return float(total)
