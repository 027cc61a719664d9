import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from lightning_memopt.models.fake import GROUPED_PRODUCT, run_operator
from lightning_memopt.techniques.checkpointing.profile import is_product, product_flops

GROUPS, ROWS, INNER, COLUMNS = 4, 16, 32, 24


@pytest.mark.parametrize(
    ("first", "second", "flops"),
    [
        ((ROWS, INNER), (GROUPS, INNER, COLUMNS), 2 * ROWS * INNER * COLUMNS),
        ((GROUPS, ROWS, INNER), (INNER, COLUMNS), 2 * ROWS * INNER * COLUMNS),
        ((ROWS, INNER), (INNER, COLUMNS), 2 * ROWS * INNER * COLUMNS),
        ((GROUPS, ROWS, INNER), (GROUPS, INNER, COLUMNS), 2 * GROUPS * ROWS * INNER * COLUMNS),
    ],
    ids=["groups of rows", "groups of columns", "groups of what is summed over", "as many matrices"],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_grouped_products_of_every_type_have_fake_results_like_the_real_ones(first, second, flops, dtype):
    ends = None
    if not len(first) == len(second) == 3:
        size = {(2, 3): ROWS, (3, 2): COLUMNS, (2, 2): INNER}[len(first), len(second)]
        ends = torch.arange(1, GROUPS + 1, dtype=torch.int32) * (size // GROUPS)
    args = (torch.ones(first, dtype=dtype), torch.ones(second, dtype=dtype), ends)
    real = GROUPED_PRODUCT(*args)
    with FakeTensorMode() as mode:
        fakes = tuple(None if each is None else mode.from_tensor(each) for each in args)
        fake = run_operator(GROUPED_PRODUCT, fakes, {})
    assert (fake.shape, fake.stride(), fake.dtype) == (real.shape, real.stride(), real.dtype)
    assert is_product(GROUPED_PRODUCT)
    assert product_flops(GROUPED_PRODUCT, args, {}, real) == flops


@pytest.mark.parametrize("lengths", [[3, 1], torch.tensor([3, 1])], ids=["list", "tensor"])
def test_the_ctc_loss_keeps_for_its_backward_as_much_on_fakes_where_the_lengths_of_targets_are_known(lengths):
    steps = [10, 10] if isinstance(lengths, list) else torch.tensor([10, 10])
    operator = getattr(torch.ops.aten._ctc_loss, "default" if isinstance(lengths, list) else "Tensor")
    probabilities, targets = torch.zeros(10, 2, 5), torch.ones(2, 3, dtype=torch.long)
    real = operator(probabilities, targets, steps, lengths)
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        fake = run_operator(operator, (mode.from_tensor(probabilities), targets, steps, lengths), {})
    assert [each.shape for each in fake] == [each.shape for each in real]
