"""A stage's run of a step notices where the step does not do what it did in its first run."""

import pytest
import torch

from lightning_memopt.parallel.pipeline.boundary import Boundary, Shapes, StageRun
from lightning_memopt.parallel.refusal import StepRefused


def _call() -> int:
    return 0


def test_a_block_that_is_called_once_more_is_refused_by_name():
    run = StageRun(range(0, 1), ["block"], Shapes(), 0, ())
    run.called(0, _call, (), {})
    with pytest.raises(StepRefused, match="`block` was called once more"):
        run.called(0, _call, (), {})


def test_blocks_in_another_order_are_refused_by_name():
    run = StageRun(range(0, 2), ["first", "second"], Shapes(), 0, ())
    with pytest.raises(StepRefused, match="`second` was called where `first` was before"):
        run.called(1, _call, (), {})


def test_a_module_of_which_the_output_is_sent_is_refused_by_name_where_it_is_called_again_or_not_at_all():
    sent = Boundary(carried={("gate", 0): 0}, metas=[torch.empty(2, device="meta")])
    run = StageRun(range(0, 1), ["first", "second"], Shapes({1: sent}), 0, ())
    run.called(0, _call, (), {})
    with pytest.raises(StepRefused, match="`gate` was not called before `second`"):
        run.called(1, _call, (), {})
    run.returned("gate", torch.ones(2))
    with pytest.raises(StepRefused, match="`gate` was called again"):
        run.returned("gate", torch.ones(2))
