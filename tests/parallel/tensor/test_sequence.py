"""Blocks work on parts of the sequence, and losses on parts of the vocabulary, with the gradients of one device."""

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode

from lightning_memopt.parallel.tensor.apply import tensor_parallelize
from lightning_memopt.parallel.tensor.plan import find_tensor_plan
from lightning_memopt.parallel.tensor.sequence import parallelize_sequence
from tests.distributed import run_on_ranks
from tests.zoo import ZOO


class _Seen(TorchDispatchMode):
    """Sizes of what root-mean-square norms were computed of, and the collectives."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens: set[int] = set()
        self.scattered = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        if "rsqrt" in str(function):
            self.tokens.add(result.shape[1])
        self.scattered += "reduce_scatter" in str(function)
        return result


def _gradients(module, batch):
    module.zero_grad()
    module.log = lambda *args, **kwargs: None
    module.training_step(batch, 0).backward()
    return {n: p.grad.full_tensor() if isinstance(p.grad, DTensor) else p.grad for n, p in module.named_parameters()}


def test_norms_of_a_block_see_a_part_of_the_tokens_and_get_the_whole_gradient():
    def compare():
        dist.init_process_group("gloo")
        mesh = init_device_mesh("cpu", (2,), mesh_dim_names=("tensor",))
        module, batch = ZOO["llama"].build(), ZOO["llama"].batch()
        expected = _gradients(module, batch)
        split = tensor_parallelize(module, mesh, find_tensor_plan(module, 2))
        parallelize_sequence(split, mesh)
        _gradients(module, batch)  # verifies
        with _Seen() as seen:
            ours = _gradients(module, batch)
        for name, gradient in expected.items():
            torch.testing.assert_close(ours[name], gradient, rtol=1e-4, atol=1e-6, msg=name)
        odd = {key: value[:, :15] for key, value in batch.items()}
        _gradients(module, odd)  # 15 tokens cannot be dealt out, and are left whole
        split.undo()
        assert not any("_tensor" in key for sub in module.modules() for key in vars(sub))
        return sorted(seen.tokens), seen.scattered

    for tokens, scattered in run_on_ranks(compare, 2):
        assert tokens == [8, 16]  # the last norm is outside the blocks
        assert scattered == 12  # three blocks with two sums, and the gradients of two gathers each
