"""The loops that a user would write with torch's own primitives: what the strategies are held against.

Each builder takes the whole model of :mod:`parallel_workload` on every rank and returns a function that runs one
optimizer step on this rank's batch.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from parallel_workload import Size, loss_of
from rank_device import device
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.pipelining import PipelineStage, Schedule1F1B
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.nn.parallel import DistributedDataParallel

Step = Callable[[], Any]


def replicas(size: Size) -> Step:
    """DistributedDataParallel with its gradients in the buckets."""
    model = size.build_model().to(device())
    return _loop(DistributedDataParallel(model, gradient_as_bucket_view=True), model, size.batch(dist.get_rank()))


def sharded(size: Size) -> Step:
    """FSDP2, a call for each block and one for the rest."""
    model = size.build_model().to(device())
    mesh = init_device_mesh(device().type, (dist.get_world_size(),))
    for layer in model.model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh, reshard_after_forward=False)
    return _loop(model, model, size.batch(dist.get_rank()))


def tensor(size: Size) -> Step:
    """Column then row in attention and MLP; embedding and head whole on every rank."""
    model = size.build_model().to(device())
    mesh = init_device_mesh(device().type, (dist.get_world_size(),))
    plan: dict[str, Any] = {}
    for name in ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "mlp.gate_proj", "mlp.up_proj"):
        plan[name] = ColwiseParallel()
    for name in ("self_attn.o_proj", "mlp.down_proj"):
        plan[name] = RowwiseParallel()
    for layer in model.model.layers:
        parallelize_module(layer, mesh, plan)
    # Two lists, since foreach kernels take no plain tensors beside sharded ones.
    split = [p for p in model.parameters() if isinstance(p, torch.distributed.tensor.DTensor)]
    whole = [p for p in model.parameters() if not isinstance(p, torch.distributed.tensor.DTensor)]
    return _loop(model, model, size.batch(0), [{"params": split}, {"params": whole}])


class Stage(nn.Module):
    """A run of a Llama's layers, with the embedding before the first and the head after the last."""

    def __init__(self, model: Any, stage: int, stages: int) -> None:
        super().__init__()
        layers = model.model.layers
        share = len(layers) // stages
        self.layers = layers[stage * share : (stage + 1) * share]
        self.rotary = model.model.rotary_emb
        self.embedding = model.model.embed_tokens if stage == 0 else None
        self.norm = model.model.norm if stage == stages - 1 else None
        self.head = model.lm_head if stage == stages - 1 else None

    def forward(self, hidden: Tensor) -> Tensor:
        """Tokens or hidden states to hidden states or logits."""
        if self.embedding is not None:
            hidden = self.embedding(hidden)
        positions = torch.arange(hidden.shape[1], device=hidden.device).unsqueeze(0)
        rotary = self.rotary(hidden, positions)
        for layer in self.layers:
            hidden = layer(hidden, position_embeddings=rotary, position_ids=positions)
        return hidden if self.norm is None else self.head(self.norm(hidden))


def pipeline(size: Size) -> Step:
    """A stage cut by hand on each rank, under torch's 1F1B schedule."""
    rank, ranks = dist.get_rank(), dist.get_world_size()
    module = Stage(size.build_model().to(device()), rank, ranks)
    optimizer = torch.optim.AdamW(module.parameters(), lr=1e-4)
    schedule = Schedule1F1B(PipelineStage(module, rank, ranks, device()), size.micro_batches, loss_fn=loss_of)
    tokens = size.batch(0)["input_ids"].to(device())

    def step() -> None:
        optimizer.zero_grad()
        if rank == 0:
            schedule.step(tokens)
        else:
            schedule.step(target=tokens, losses=[])
        optimizer.step()

    return step


BY_HAND = {"memopt_ddp": replicas, "memopt_zero3": sharded, "memopt_tp": tensor, "memopt_pp": pipeline}
"""By the strategy that does the same."""


def _loop(model: nn.Module, bare: nn.Module, batch: dict[str, Tensor], groups: Any = None) -> Step:
    optimizer = torch.optim.AdamW(groups or bare.parameters(), lr=1e-4)
    batch = {name: tensor.to(device()) for name, tensor in batch.items()}

    def step() -> None:
        loss = model(**batch).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    return step
