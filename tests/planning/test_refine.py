"""The fastest plan keeps as many activations as fit."""

from dataclasses import replace

import pytest

import lightning_memopt as memopt
from lightning_memopt.planning.refine import keep_what_fits
from lightning_memopt.planning.search import Evaluation, Found, Refused
from lightning_memopt.planning.space import Choice, Layout, Techniques
from tests.planning.a_cpu import A_CPU
from tests.zoo import ZOO

FULL = Choice(Layout(), Techniques("full"))
FULL_TAKES = Evaluation(100, {}, {"compute": 1.3})


def _kept(choice: Choice) -> float:
    assert choice == replace(FULL, techniques=Techniques("budget", kept=choice.techniques.kept))
    return choice.techniques.kept


def _found() -> Found:
    return Found({FULL: FULL_TAKES}, {}, {})


@pytest.mark.parametrize("most", range(1, 10))
def test_the_largest_fraction_that_fits_is_found_with_few_looks(most):
    looked = []

    def evaluate(choice):
        looked.append(_kept(choice))
        return Evaluation(round(10 * looked[-1]), {}, {"compute": 1.3 - looked[-1] / 10})

    found = keep_what_fits(_found(), evaluate, most)
    assert next(iter(found.fitting)).techniques.kept == most / 10
    assert len(looked) <= 4


def test_what_takes_longer_than_to_recompute_all_comes_after_it():
    found = keep_what_fits(_found(), lambda choice: Evaluation(1, {}, {"compute": 2.0}), 10)
    assert next(iter(found.fitting)) == FULL


def test_a_plan_that_recomputes_nothing_and_one_that_refuses_a_budget_stay():
    plain = Found({Choice(Layout(), Techniques()): FULL_TAKES}, {}, {})
    assert keep_what_fits(plain, lambda choice: pytest.fail("looked at"), 10) is plain

    def refuse(choice):
        raise Refused("ActivationCheckpointing: no")

    found = _found()
    assert keep_what_fits(found, refuse, 10) is found


@pytest.mark.slow
def test_a_budget_between_full_checkpointing_and_none_is_predicted_to_the_byte_and_pasted():
    entry = ZOO["encoder"]
    batch = entry.batch(2)
    full = memopt.predict_memory(entry.build(), batch, callbacks=[memopt.ActivationCheckpointing("full")])
    result = memopt.plan(
        entry.build(), batch, budget=int(1.03 * full.peak_bytes), device=A_CPU, exact=True, gradient_clip_val=1.0
    )
    for plan in result.plans:
        if plan.choice.techniques.checkpointing == "budget":
            measured = memopt.measure_memory(
                entry.build(), batch, callbacks=plan.callbacks(), gradient_clip_val=1.0
            ).peak_bytes
            assert plan.peak_bytes == pytest.approx(measured, rel=0.01)
            kept = plan.choice.techniques.kept
            assert f'ActivationCheckpointing(policy="budget", budget={kept})' in plan.python()
            assert f"budget: {kept}" in plan.yaml()
            assert plan.bought[-1].startswith(f"checkpointing that keeps {kept:.0%} of the activations: -")
            return
    pytest.fail(str([plan.choice for plan in result.plans]))
