"""A schedule's waiting is what its published formula says, and what unequal stages and slow links make of it."""

import pytest

from lightning_memopt.parallel.pipeline.timing import pipeline_idle, pipeline_time


@pytest.mark.parametrize("schedule", ["gpipe", "1f1b"])
@pytest.mark.parametrize(("ranks", "count"), [(2, 2), (2, 8), (4, 4), (4, 16), (8, 32)])
def test_one_stage_a_rank_waits_as_the_formula_of_gpipe_says(schedule, ranks, count):
    assert pipeline_idle(schedule, ranks, count) == pytest.approx((ranks - 1) / (count + ranks - 1))


@pytest.mark.parametrize(("ranks", "count"), [(2, 4), (4, 8), (4, 16)])
def test_interleaved_stages_halve_what_is_waited(ranks, count):
    # Narayanan et al. 2021: the bubble is (p - 1) / (v m) of the time that is computed, for v stages a rank.
    time = pipeline_time("interleaved_1f1b", ranks, count)
    assert time.seconds / time.busy[0] - 1 == pytest.approx((ranks - 1) / (2 * count))


@pytest.mark.parametrize(("ranks", "count"), [(2, 8), (4, 16)])
def test_zero_bubbles_wait_least(ranks, count):
    idle = {name: pipeline_idle(name, ranks, count) for name in ("1f1b", "interleaved_1f1b", "zbv")}
    assert idle["zbv"] < idle["interleaved_1f1b"] < idle["1f1b"]


@pytest.mark.parametrize(("schedule", "each"), [("gpipe", 1), ("1f1b", 1), ("interleaved_1f1b", 2), ("zbv", 2)])
def test_each_rank_computes_all_its_micro_batches(schedule, each):
    time = pipeline_time(schedule, 4, 8)
    assert time.busy == pytest.approx([8 * 3.0] * 4)
    assert time.seconds > 8 * 3.0


def test_the_slowest_stage_sets_the_pace():
    equal = pipeline_time("1f1b", 2, 16, forward=[1.0, 1.0])
    uneven = pipeline_time("1f1b", 2, 16, forward=[0.5, 1.5])
    assert sum(uneven.busy) == pytest.approx(sum(equal.busy))
    assert uneven.seconds > 1.4 * equal.seconds


def test_sending_takes_time_between_ranks_and_none_within_one():
    assert pipeline_time("1f1b", 2, 4, send=0.5).seconds > pipeline_time("1f1b", 2, 4).seconds
    assert pipeline_time("1f1b", 1, 4, send=0.5).seconds == pytest.approx(12.0)
    # The two middle stages of "zbv" are on one rank: one way through the pipeline crosses ranks twice, not thrice.
    one = pipeline_time("zbv", 2, 3, forward=[1.0] * 4, backward=[0.0] * 4, send=0.0)
    assert pipeline_time("zbv", 2, 3, forward=[1.0] * 4, backward=[0.0] * 4, send=0.25).seconds >= one.seconds + 0.25


def test_fewer_micro_batches_than_ranks_is_played_as_it_would_run():
    assert pipeline_idle("1f1b", 4, 2) == pytest.approx(3 / 5)


def test_durations_of_another_number_of_stages_are_refused():
    with pytest.raises(ValueError, match=r"3 forwards.*have 8 stages"):
        pipeline_time("zbv", 4, 8, forward=[1.0] * 3)
