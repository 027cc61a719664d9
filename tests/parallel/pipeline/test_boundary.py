"""A stage's run of a step notices where the step does not do what it did in its first run."""

import pytest
import torch

from lightning_memopt.parallel.pipeline.boundary import Boundary, Shapes, StageRun
from lightning_memopt.parallel.refusal import StepRefused


def _call() -> int:
    return 0


def test_a_block_that_is_called_again_is_refused_by_name():
    run = StageRun(range(0, 1), ["block"], Shapes(), 0, (), lambda: None)
    run.called(0, _call, (), {})
    with pytest.raises(StepRefused, match="`block` was called again"):
        run.called(0, _call, (), {})


def test_blocks_in_another_order_are_refused_by_name():
    run = StageRun(range(0, 2), ["first", "second"], Shapes(), 0, (), lambda: None)
    run.called(1, _call, (), {})
    with pytest.raises(StepRefused, match="`first` was called again, or behind a block that came after it"):
        run.called(0, _call, (), {})


def test_a_block_in_place_of_a_skipped_one_is_refused_by_name_where_it_takes_other_arguments():
    sent = Boundary(slots={0: 0}, metas=[torch.empty(2, device="meta")])
    run = StageRun(range(0, 1), ["first", "second", "third"], Shapes({1: sent}), 0, (), lambda: None)
    run.called(0, _call, (), {})
    with pytest.raises(
        StepRefused, match="skips `second`, which a stage begins with, and `third` behind it takes other"
    ):
        run.called(2, _call, (torch.ones(3),), {})


def test_a_step_that_skips_all_blocks_of_a_stage_is_refused_by_name():
    for stage, links in enumerate((range(0, 1), range(1, 2))):
        run = StageRun(links, ["first", "second"], Shapes(), stage, (), lambda: None)
        run.called(0, _call, (), {})
        with pytest.raises(StepRefused, match="ended before it called `second`, which a stage begins with"):
            run.check_finished()


def test_a_module_of_which_the_output_is_sent_is_refused_by_name_where_it_is_called_again_or_not_at_all():
    sent = Boundary(carried={("gate", 0): 0}, metas=[torch.empty(2, device="meta")])
    run = StageRun(range(0, 1), ["first", "second"], Shapes({1: sent}), 0, (), lambda: None)
    run.called(0, _call, (), {})
    with pytest.raises(StepRefused, match="`gate` was not called before `second`"):
        run.called(1, _call, (), {})
    run.returned("gate", torch.ones(2))
    with pytest.raises(StepRefused, match="`gate` was called again"):
        run.returned("gate", torch.ones(2))
