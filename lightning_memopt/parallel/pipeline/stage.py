"""A stage as ``torch.distributed.pipelining`` runs it, with shapes that may differ between micro-batches."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from lightning_memopt.parallel.local import own
from lightning_memopt.parallel.pipeline.torch_stage import Received, TorchStage, grad_metas_of, metas_of

Forward = Callable[[int, int, tuple[Tensor, ...]], Any]
"""(stage, number of the micro-batch, received tensors) -> the tensors to send, or the loss."""

Around = Callable[[int, int, bool], AbstractContextManager[Any]]
"""(stage, number of the micro-batch, whether it is the stage's last of the batch) -> the context of its backward."""


def _let_go(received: Iterable[Sequence[Received]]) -> None:
    """Of their buffers; root arguments have none."""
    for infos in received:
        for info in infos:
            info.buffer = None


def _nothing_left() -> Callable[..., None]:
    return lambda: None


class StageModule(nn.Module):
    """What torch's stage calls: the user's step by way of ``forward``, and the parameters of the stage."""

    def __init__(self, stage: int, forward: Forward, parameters: Sequence[nn.Parameter]) -> None:
        super().__init__()
        self._stage = stage
        self._forward_of_stage = forward
        self._held = tuple(parameters)

    def parameters(self, recurse: bool = True) -> Iterator[nn.Parameter]:
        """The parameters of the stage, which zero-bubble schedules differentiate apart."""
        return iter(self._held)

    def forward(self, *received: Tensor, index: Tensor) -> Any:
        """Run micro-batch ``index``."""
        handed = tuple(own(tensor) if tensor.requires_grad else tensor for tensor in received)
        return self._forward_of_stage(self._stage, int(index), handed)


class Stage(TorchStage):
    """torch's stage, with a buffer for what is received only from its receipt to its use.

    Args:
        module: What it runs.
        stage: Its number, of ``stages``.
        stages: How many there are.
        device: Where it runs.
        group: The ranks of the pipeline.
        around: The context of each backward.

    Attributes:
        inputs: Of each micro-batch, stubs like what is received; set before each run.
        outputs: Of each micro-batch, stubs like what is sent.
        splits_backward: Whether the schedule differentiates by inputs and by parameters apart.
    """

    def __init__(
        self,
        module: StageModule,
        stage: int,
        stages: int,
        device: torch.device,
        group: dist.ProcessGroup,
        around: Around,
        inputs: Sequence[Sequence[Tensor]],
        outputs: Sequence[Sequence[Tensor]],
        splits_backward: bool = False,
    ) -> None:
        self._around = around
        # torch's backward in two parts finds the gradients of parameters on the paths from what a stage receives to
        # what it sends, and loses those that get into a second thing sent beside them (an encoder-decoder's position
        # bias, its decoder's embedding). Such a stage does both parts in the first.
        is_one = sum(stub.requires_grad for stub in outputs[0]) < 2
        super().__init__(
            module,
            stage,
            stages,
            device,
            input_args=tuple(inputs[0]),
            output_args=tuple(outputs[0]),
            group=group,
            dw_builder=_nothing_left if splits_backward and not is_one else None,
        )
        self.inputs, self.outputs = inputs, outputs

    def _warmup_backward_result(self, received_result: Tensor | None = None) -> Tensor:
        """Yes: every stage knows its shapes, so torch need not learn them, also where no neighbour answers (where a
        run is predicted)."""
        return torch.ones_like(super()._warmup_backward_result(received_result))

    def _setup_forward_recv_info(self, num_microbatches: int, has_backward: bool) -> None:
        """Without the buffers of all micro-batches, which would last through the first step."""
        super()._setup_forward_recv_info(num_microbatches, has_backward)
        _let_go(self.args_recv_info.values())

    def _setup_backward_recv_info(self, num_microbatches: int) -> None:
        """Without the buffers of all micro-batches, as in the forward."""
        super()._setup_backward_recv_info(num_microbatches)
        _let_go(self.grad_recv_info.values())

    def prepare_forward_only(self) -> None:
        """What a schedule's first step does, for runs without a schedule."""
        self._stage_meta.inputs = metas_of(tuple(self.inputs[0]))
        self._stage_meta.outputs = metas_of(tuple(self.outputs[0]))
        self._setup_forward_send_info()

    def get_fwd_recv_ops(self, fwd_chunk_id: int) -> list[dist.P2POp]:
        """Make the buffers that this micro-batch is received in."""
        if not self.is_first:
            self.args_recv_info[fwd_chunk_id] = self._buffers_like(self.inputs[fwd_chunk_id], self.stage_index - 1)
        return super().get_fwd_recv_ops(fwd_chunk_id)

    def set_local_fwd_input(self, prev_stage_outputs: Any, mb_index: int) -> None:
        """As from another rank."""
        self.args_recv_info[mb_index] = self._buffers_like(self.inputs[mb_index], self.stage_index - 1, empty=True)
        super().set_local_fwd_input(prev_stage_outputs, mb_index)

    def forward_one_chunk(self, fwd_chunk_id: int, *args: Any, **kwargs: Any) -> Any:
        """Let go of the buffers, which autograd holds for as long as it needs them."""
        output = super().forward_one_chunk(fwd_chunk_id, *args, **kwargs)
        _let_go([self.args_recv_info.get(fwd_chunk_id, ())])
        return output

    def get_bwd_recv_ops(self, bwd_chunk_id: int) -> list[dist.P2POp]:
        """Make the buffers that this micro-batch's gradients are received in."""
        if self.has_backward and not self.is_last:
            self.grad_recv_info[bwd_chunk_id] = self._gradients_like(bwd_chunk_id)
        return super().get_bwd_recv_ops(bwd_chunk_id)

    def set_local_bwd_input(self, next_stage_bwd_outputs: tuple[Tensor | None, ...], mb_index: int) -> None:
        """As from another rank."""
        self.grad_recv_info[mb_index] = self._gradients_like(mb_index)
        super().set_local_bwd_input(next_stage_bwd_outputs, mb_index)

    def backward_one_chunk(
        self, bwd_chunk_id: int, loss: Tensor | None = None, full_backward: bool = True, last_backward: bool = False
    ) -> None:
        """In the context of the strategy's, with the shapes of this micro-batch."""
        self._stage_meta.inputs = metas_of(tuple(self.inputs[bwd_chunk_id]))
        self._stage_meta.input_grads = grad_metas_of(self._stage_meta.inputs or ())
        with self._around(self.stage_index, bwd_chunk_id, last_backward):
            super().backward_one_chunk(bwd_chunk_id, loss, full_backward, last_backward)
        # Backwards in two parts leave gradients laid out as operators made them, and not all can be sent so.
        gradients = self.bwd_cache.get(bwd_chunk_id, ())
        if not all(gradient is None or gradient.is_contiguous() for gradient in gradients):
            self.bwd_cache[bwd_chunk_id] = tuple(g if g is None else g.contiguous() for g in gradients)
        self.grad_recv_info.pop(bwd_chunk_id, None)

    def backward_weight_one_chunk(self, bwd_chunk_id: int, last_backward: bool = False) -> None:
        """In the context of the strategy's."""
        with self._around(self.stage_index, bwd_chunk_id, last_backward):
            super().backward_weight_one_chunk(bwd_chunk_id, last_backward=last_backward)

    def get_bwd_send_ops(self, bwd_chunk_id: int) -> list[dist.P2POp]:
        """With the shapes of this micro-batch, for gradients that are zero."""
        self._stage_meta.inputs = metas_of(tuple(self.inputs[bwd_chunk_id]))
        self._stage_meta.input_grads = grad_metas_of(self._stage_meta.inputs or ())
        return super().get_bwd_send_ops(bwd_chunk_id)

    def _buffers_like(self, stubs: Sequence[Tensor], source: int, empty: bool = False) -> tuple[Received, ...]:
        metas = metas_of(tuple(stubs)) or ()
        return tuple(
            Received("received", source, None if empty else self._empty_like(stub), meta)
            for stub, meta in zip(stubs, metas, strict=True)
        )

    def _gradients_like(self, chunk: int) -> tuple[Received, ...]:
        stubs = self.outputs[chunk]
        metas = grad_metas_of(metas_of(tuple(stubs)) or ())
        return tuple(
            Received("gradient", self.stage_index + 1, None if meta is None else self._empty_like(stub), meta)
            for stub, meta in zip(stubs, metas, strict=True)
        )

    def _empty_like(self, stub: Tensor) -> Tensor:
        return torch.empty(stub.shape, dtype=stub.dtype, device=self.device)
