"""Which rank failed is told from signs of life alone."""

import os
import pickle
import threading
from dataclasses import replace

import pytest
import torch.distributed as dist

from lightning_memopt.parallel.verdict import (
    Beat,
    RankFailure,
    find_dead,
    find_idle,
    find_silent,
    find_stuck,
    is_echo,
    own_process,
)
from lightning_memopt.parallel.watch import RankWatch
from tests.distributed import run_on_ranks


def beats(*progress: int, waits: tuple[int, ...] = (), done: tuple[int, ...] = ()) -> dict[int, Beat]:
    return {
        rank: Beat(
            rank, "here", "", progress=steps, waits=rank in waits, done=rank in done, phase="forward of batch 1"
        )
        for rank, steps in enumerate(progress)
    }


def test_the_rank_that_is_behind_is_stuck_once_all_have_stood_still() -> None:
    failure = find_stuck(beats(5, 4, 5), dict.fromkeys(range(3), 11.0), limit=10)
    assert failure is not None and failure.rank == 1
    assert find_stuck(beats(5, 4, 5), {0: 11.0, 1: 9.0, 2: 11.0}, limit=10) is None


def test_of_ranks_in_the_same_phase_the_one_that_waits_for_nobody_is_stuck() -> None:
    still = dict.fromkeys(range(3), 11.0)
    failure = find_stuck(beats(5, 5, 5, waits=(0, 2)), still, limit=10)
    assert failure is not None and failure.rank == 1
    assert find_stuck(beats(5, 5, 5), still, limit=10) is None, "a guess"


def test_of_ranks_whose_waits_are_not_seen_the_one_that_is_not_inside_torch_is_stuck() -> None:
    """As replicas wait in the backward, in torch's reducer."""
    still = dict.fromkeys(range(3), 11.0)
    backward = {rank: replace(beat, within=rank != 1) for rank, beat in beats(5, 5, 5).items()}
    failure = find_stuck(backward, still, limit=10)
    assert failure is not None and failure.rank == 1
    backward[2] = replace(backward[2], within=False)
    assert find_stuck(backward, still, limit=10) is None, "a guess"


def test_a_rank_that_is_behind_because_it_waits_for_another_is_not_the_one_that_is_stuck() -> None:
    failure = find_stuck(beats(5, 5, 5, 4, waits=(0, 2, 3)), dict.fromkeys(range(4), 11.0), limit=10)
    assert failure is not None and failure.rank == 1


def test_a_rank_that_the_others_wait_for_hangs_only_if_it_does_nothing() -> None:
    still, idle = dict.fromkeys(range(3), 11.0), beats(5, 5, 5, waits=(0, 2))
    assert find_idle(idle, still, limit=10) is None, "it computes"
    idle[1] = replace(idle[1], idle=11.0)
    failure = find_idle(idle, still, limit=10)
    assert failure is not None and failure.rank == 1 and "nothing for 11 s" in str(failure)


def test_nobody_waits_for_the_last_rank_that_runs() -> None:
    alone = beats(4, 5, 5, done=(1, 2))
    assert find_stuck(alone, dict.fromkeys(range(3), 11.0), limit=10) is None


def test_the_rank_that_was_silent_longest_is_named_unless_it_is_done() -> None:
    silence = {0: 1.0, 1: 31.0, 2: 40.0}
    failure = find_silent(beats(5, 5, 5), silence, limit=30)
    assert failure is not None and failure.rank == 2
    assert find_silent(beats(5, 5, 5, done=(1, 2)), silence, limit=30) is None


def test_a_process_that_ended_is_seen_and_one_of_another_host_is_not() -> None:
    ended = run_on_ranks(own_process, 1)[0]
    assert find_dead({0: Beat(0, "here", own_process())}) is None
    failure = find_dead({0: Beat(0, "here", own_process()), 1: Beat(1, "here", ended)})
    assert failure is not None and failure.rank == 1
    assert find_dead({1: Beat(1, "there", f"otherboot pid:[1] {os.getpid()} 0")}) is None


def test_only_errors_of_communication_echo_another_ranks() -> None:
    assert is_echo(dist.DistNetworkError("closed"))
    assert is_echo(RuntimeError("[/src/third_party/gloo/gloo/transport/tcp/pair.cc:547] Connection closed by peer"))
    assert not is_echo(RuntimeError("mat1 and mat2 shapes cannot be multiplied"))
    assert not is_echo(ValueError("a bad sample"))


def test_the_error_can_be_pickled_and_says_rank_host_phase_and_cause() -> None:
    failure = pickle.loads(pickle.dumps(RankFailure(3, "node7", "backward of batch 17", "it raised")))
    assert str(failure).startswith("Rank 3 (host node7) failed in backward of batch 17: it raised.")


def test_no_phase_is_begun_where_a_rank_has_failed() -> None:
    # A collective that NCCL aborted returns as if it were done, so no error of its own would keep the step from it.
    watch = RankWatch()
    watch.enter("backward of batch 2")
    watch._thread, watch.failure = threading.current_thread(), RankFailure(1, "here", "backward of batch 2", "gone")
    with pytest.raises(RankFailure, match=r"Rank 1 .*gone"):
        watch.enter("optimizer step of batch 2")
    assert watch.phase == "backward of batch 2"
