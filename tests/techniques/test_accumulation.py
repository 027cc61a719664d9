"""Windows, schedules and counts, in a plain loop."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from lightning_memopt.techniques.accumulation import (
    GradientWindow,
    accumulation_factor,
    check_schedule,
    factor_for_target,
)
from lightning_memopt.techniques.counting import count_unmasked, counter


def gradients_of(model):
    return [parameter.grad.clone() for parameter in model.parameters()]


@pytest.mark.parametrize("reference", [1, 7.5, 1000, torch.tensor(3)])
@pytest.mark.parametrize("as_tensors", [False, True])
@pytest.mark.parametrize("sizes", [(4,), (4, 1), (1, 2, 3, 9)])
def test_a_window_has_the_gradient_of_one_batch_whatever_the_reference(reference, as_tensors, sizes):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1))
    batches = [torch.randn(size, 3) for size in sizes]
    model(torch.cat(batches)).square().mean().backward()
    expected = gradients_of(model)
    model.zero_grad()
    window = GradientWindow(list(model.parameters()), reference)
    for index, batch in enumerate(batches):
        count = torch.tensor(len(batch)) if as_tensors else len(batch)
        scale = window.add(count, is_last=index == len(batches) - 1)
        (model(batch).square().mean() * scale).backward()
    torch.testing.assert_close(gradients_of(model), expected)


def test_stale_gradients_of_the_last_window_are_not_rescaled_by_a_window_of_one():
    weight = nn.Parameter(torch.ones(1))
    weight.grad = torch.full((1,), 3.0)  # to be cleared after the forward, as Lightning does
    GradientWindow([weight], reference=10).add(5, is_last=True)
    assert weight.grad == 3.0


@pytest.mark.parametrize("dropped", [0, 1, 2])
def test_a_batch_taken_back_leaves_the_mean_of_the_others(dropped):
    weight = nn.Parameter(torch.ones(1))
    window = GradientWindow([weight], reference=10)
    counts, slopes = (2, 3, 5), (1.0, 10.0, 100.0)
    for index, (count, slope) in enumerate(zip(counts, slopes, strict=True)):
        scale = window.add(count, is_last=index == 2)
        if index == dropped:
            window.drop(count, is_last=index == 2)
        else:
            (weight * slope * scale).sum().backward()
    kept = [index for index in range(3) if index != dropped]
    mean = sum(counts[i] * slopes[i] for i in kept) / sum(counts[i] for i in kept)
    torch.testing.assert_close(weight.grad, torch.tensor([mean]))


def test_a_window_of_nothing_has_no_gradient():
    weight = nn.Parameter(torch.ones(1))
    window = GradientWindow([weight], reference=1)
    for is_last in (False, True):
        (weight * window.add(torch.tensor(0), is_last=is_last)).sum().backward()
    assert weight.grad == 0


def test_factors_follow_the_schedule():
    assert [accumulation_factor({2: 4, 5: 1}, at) for at in range(7)] == [1, 1, 4, 4, 4, 1, 1]
    assert accumulation_factor(3, 100) == 3
    assert accumulation_factor(lambda step: 1 + step // 10, 25) == 3
    with pytest.raises(ValueError, match=r"schedule\(5\) is 0.5"):
        accumulation_factor(lambda step: 0.5, 5)
    with pytest.raises(ValueError, match="schedule is True"):
        check_schedule(True)


def test_targets_are_divided_among_batches_and_devices():
    assert factor_for_target(1024, 32, 8) == 4
    with pytest.raises(
        ValueError, match=r"no multiple of 256 \(32 samples a batch x 8 devices\); 768 or 1024 would be"
    ):
        factor_for_target(1000, 32, 8)
    with pytest.raises(ValueError, match="; 16 would be"):
        factor_for_target(10, 16)


def test_masks_count_what_they_keep_and_labels_what_they_do_not_ignore():
    labels = torch.tensor([[0, 1, -100], [2, -100, -100]])
    mask = torch.tensor([[1, 1, 0], [1, 0, 0]])
    assert count_unmasked({"labels": labels}, "labels") == 3
    assert count_unmasked({"attention_mask": mask}, "attention_mask") == 3
    assert count_unmasked((labels, mask.bool()), 1) == 3
    assert count_unmasked(SimpleNamespace(mask=mask.float()), "mask") == 3
    with pytest.raises(ValueError, match=r"mask_key='mask' names no tensor of the batch \(it has \['labels'\]\)"):
        count_unmasked({"labels": labels}, "mask")


def test_samples_and_batches_are_counted_without_a_key():
    batch = {"x": torch.zeros(7, 2)}
    assert counter("samples")(batch) == 7
    assert counter("batch")(batch) == 1
