"""Which optimizers step shards as they step whole parameters: tried before training, not looked up."""

from collections import OrderedDict, defaultdict
from typing import Any

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.optim import Optimizer

from lightning_memopt.parallel.gather import full_on_cpu

_LARGEST_SIZE = 5  # uneven on any even number of ranks


def check_steps_shards(optimizer: Optimizer, mesh: DeviceMesh) -> None:
    """Refuse an optimizer that fails on sharded parameters or gives them other values than whole ones.

    Stand-ins of a few elements, with the optimizer's own hyper-parameters, are stepped twice whole and twice sharded.
    Element by element optimizers (AdamW, SGD, Adagrad) pass by nature. Neither the optimizer nor the random number
    generators are changed. All ranks must call this together.

    Args:
        optimizer: The optimizer to try.
        mesh: The mesh over which its parameters are sharded: its last dimension, the ones before it replicate.

    Raises:
        ValueError: It cannot; says what was seen.
    """
    name = type(optimizer).__name__
    elementwise = "use an optimizer that treats each element by itself (AdamW, SGD), or `memopt_ddp`"
    as_real = "store real numbers and make complex ones of them in `forward`, or use `memopt_ddp`"
    for index, group in enumerate(optimizer.param_groups):
        held = [
            parameter for parameter in group["params"] if isinstance(parameter, DTensor) and not parameter.is_meta
        ]
        for like in {(parameter.ndim, parameter.is_complex()): parameter for parameter in held}.values():
            what = f"sharded {'complex ' if like.is_complex() else ''}parameters of {like.ndim} dimensions"
            remedy = as_real if like.is_complex() else elementwise
            with torch.random.fork_rng(devices=[]):
                try:
                    whole = _step_stand_in(optimizer, group, like, None)
                    sharded = _step_stand_in(optimizer, group, like, mesh)
                except Exception as error:
                    raise ValueError(
                        f"{name} fails on {what} (tried for group {index}: "
                        f"{type(error).__name__}: {str(error).splitlines()[0]}); {remedy}."
                    ) from error
            if not torch.allclose(whole, sharded, rtol=1e-4, atol=1e-6):
                raise ValueError(
                    f"{name} steps {what} to other values than whole ones (tried for group {index}); {remedy}."
                )


def _step_stand_in(
    optimizer: Optimizer, group: dict[str, Any], like: torch.Tensor, mesh: DeviceMesh | None
) -> torch.Tensor:
    shape = [min(size, _LARGEST_SIZE) for size in like.shape]
    generator = torch.Generator().manual_seed(0)

    def draw() -> torch.Tensor:
        values = torch.randn(shape, generator=generator, dtype=torch.cfloat if like.is_complex() else torch.float)
        if mesh is not None:  # every rank draws the same values and keeps its part
            placements = [*[Replicate()] * (mesh.ndim - 1), Shard(0)]
            values = distribute_tensor(values, mesh, placements, src_data_rank=None)
        return values.to(like.device)

    stand_in = nn.Parameter(draw())
    twin: Any = object.__new__(type(optimizer))
    twin.__dict__.update(optimizer.__dict__)
    twin.__dict__.pop("step", None)  # learning-rate schedulers patch it on the instance
    twin.state = defaultdict(dict)
    twin.param_groups = [{**group, "params": [stand_in]}]
    twin._optimizer_step_pre_hooks, twin._optimizer_step_post_hooks = OrderedDict(), OrderedDict()
    for _ in range(2):
        stand_in.grad = draw()
        twin.step()
    whole = full_on_cpu(stand_in.detach())
    assert isinstance(whole, torch.Tensor)
    return whole.cpu()
