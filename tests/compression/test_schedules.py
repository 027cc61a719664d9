"""Targets over steps."""

import pytest

from lightning_memopt.compression.schedules import ConstantSparsity, PolynomialSparsity


def test_the_polynomial_goes_from_initial_to_final_in_steps_of_frequency_and_never_falls():
    schedule = PolynomialSparsity(0.2, 0.8, begin_step=50, end_step=250, power=3, frequency=40)
    targets = [schedule.at(step) for step in range(300)]
    assert targets[:50] == [0.0] * 50 and targets[50] == pytest.approx(0.2) and targets[250:] == [0.8] * 50
    assert targets == sorted(targets)
    raised = [step for step in range(1, 300) if targets[step] != targets[step - 1]]
    assert raised == [50, 90, 130, 170, 210, 250]
    # The formula of Zhu and Gupta, halfway.
    assert schedule.at(150) == schedule.at(130) == pytest.approx(0.8 - 0.6 * (1 - 80 / 200) ** 3)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: ConstantSparsity(1.0), "sparsity=1.0 is no share of the weights"),
        (lambda: ConstantSparsity(0), "sparsity=0 is no share"),
        (lambda: ConstantSparsity(True), "sparsity=True is no share"),
        (lambda: ConstantSparsity(0.5, begin_step=-1), "begin_step=-1"),
        (lambda: ConstantSparsity("0.5"), "sparsity='0.5' is no share"),
        (lambda: ConstantSparsity(float("nan")), "sparsity=nan is no share"),
        (lambda: ConstantSparsity(0.5, begin_step=True), "begin_step=True is no number"),
        (lambda: PolynomialSparsity("0", 0.8, 0, 10), "initial='0' is no share"),
        (lambda: PolynomialSparsity(float("nan"), 0.8, 0, 10), "initial=nan is no share"),
        (lambda: PolynomialSparsity(0.0, 0.8, 0, 10, power=float("nan")), "power positive"),
        (lambda: PolynomialSparsity(0.0, 0.8, 0, 10, power="3"), "power positive"),
        (lambda: PolynomialSparsity(0.0, 0.8, 0, 10, frequency=None), "frequency=None is no number"),
        (lambda: PolynomialSparsity(0.9, 0.8, 0, 10), "initial=0.9 is not below final=0.8"),
        (lambda: PolynomialSparsity(0.0, 1.5, 0, 10), "final=1.5 is no share"),
        (lambda: PolynomialSparsity(0.0, 0.5, 10, 10), "end_step must be after begin_step"),
        (lambda: PolynomialSparsity(0.0, 0.5, 0, 10, frequency=0), "frequency at least 1"),
        (lambda: PolynomialSparsity(0.0, 0.5, 0, 10.5), "end_step=10.5 is no number of optimizer steps"),
    ],
)
def test_targets_and_steps_out_of_range_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()
