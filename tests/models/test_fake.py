"""Operators run on tensors without values where torch's own fake kernels refuse to."""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from lightning_memopt.models.fake import run_operator


@pytest.mark.parametrize("lengths", [[3, 1], torch.tensor([3, 1])], ids=["list", "tensor"])
def test_the_ctc_loss_keeps_for_its_backward_as_much_on_fakes_where_the_lengths_of_targets_are_known(lengths):
    steps = [10, 10] if isinstance(lengths, list) else torch.tensor([10, 10])
    operator = getattr(torch.ops.aten._ctc_loss, "default" if isinstance(lengths, list) else "Tensor")
    probabilities, targets = torch.zeros(10, 2, 5), torch.ones(2, 3, dtype=torch.long)
    real = operator(probabilities, targets, steps, lengths)
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        fake = run_operator(operator, (mode.from_tensor(probabilities), targets, steps, lengths), {})
    assert [each.shape for each in fake] == [each.shape for each in real]
