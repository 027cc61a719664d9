"""What a choice is estimated to hold from the traces of others."""

from lightning_memopt.memory.report import TimelinePoint
from lightning_memopt.planning.estimates import Estimates
from lightning_memopt.planning.space import Choice, Layout, Techniques
from lightning_memopt.planning.trace import StepTrace

_STATE = {"parameters": 100, "optimizer_state": 200}


def _by_category(gradients: int, activations: int) -> dict[str, int]:
    return {**_STATE, "gradients": gradients, "activations": activations}


def _choice(**techniques) -> Choice:
    return Choice(Layout(), Techniques(**techniques))


def test_gradients_held_at_one_choices_peak_do_not_count_against_another_whose_peak_has_none():
    points = (TimelinePoint("forward", "", _by_category(100, 1000)),)
    estimates = Estimates(StepTrace(points, (), ()), Techniques(), samples=8, blocks=())
    estimates.learn(_choice(), _by_category(0, 1000))
    estimates.learn(_choice(checkpointing="selective"), _by_category(100, 600))
    # Half of the activations, and the gradients that micro-batches add up.
    assert not estimates.exceeds(_choice(micro_batch=4), 300 + 500 + 100)
    assert estimates.exceeds(_choice(micro_batch=4), 750)
