"""torch's own stage of a pipeline, as torch 2.13 has it, whichever torch is installed.

The one adapter for the private parts of ``torch.distributed.pipelining.stage``. Tried with torch 2.11 and 2.13.
Stages of 2.13 know of each tensor whether it takes gradients, and skip those that do not; stages of 2.11 take every
tensor for a floating point one with gradients, of the shapes of the first micro-batch. :class:`_EarlierStage` is what
2.13 added, in the words of 2.11.
"""

from collections import defaultdict
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.pipelining import PipelineStage, _utils
from torch.distributed.pipelining.stage import _RecvInfo

# Any, as what is right for one version is wrong for the other.
TorchStage: Any = PipelineStage
Received: Any = _RecvInfo
metas_of: Any
grad_metas_of: Any
CAN_SPLIT_BACKWARD = True
"""Whether a backward may run in two parts, as zero-bubble schedules have it. 2.11's hangs where a stage receives or
sends what takes no gradients."""


class _EarlierReceived(Received):
    """A place for a tensor, which may have no buffer, with what the tensor is like (None: nothing comes)."""

    def __init__(self, input_name: str, source: int, buffer: Tensor | None, tensor_meta: Tensor | None) -> None:
        super().__init__(input_name, source, buffer)
        self.tensor_meta = tensor_meta


class _EarlierStage(TorchStage):
    """torch 2.11's stage, taught that shapes differ and that not every tensor has a gradient."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._stage_meta: Any = SimpleNamespace(inputs=(), outputs=(), input_grads=())
        self.args_recv_info: dict[int, Any] = defaultdict(tuple)

    def _prepare_forward_infra(self, *args: Any, **kwargs: Any) -> Any:
        self._setup_forward_send_info()
        return ()

    def _prepare_backward_infra(self, num_microbatches: int, *args: Any, **kwargs: Any) -> Any:
        self.chunks = num_microbatches

    def _setup_forward_send_info(self) -> None:
        follows = [] if self.is_last else [self.stage_index + 1]
        self.act_send_info = {index: follows for index in range(len(self.get_outputs_meta()))}

    def _validate_fwd_outputs(self, outputs: tuple[Tensor, ...]) -> None:
        """Nothing: shapes differ from micro-batch to micro-batch."""

    def _get_recv_ops(self, recv_infos: Any) -> list[dist.P2POp]:
        return super()._get_recv_ops(tuple(info for info in recv_infos if info.buffer is not None))

    def _retrieve_recv_activations(self, fwd_chunk_id: int) -> tuple[Tensor, ...]:
        takes = self.has_backward and torch.is_grad_enabled()
        return tuple(
            info.buffer.requires_grad_(takes and info.tensor_meta.requires_grad)
            for info in self.args_recv_info[fwd_chunk_id]
        )

    def set_local_fwd_input(self, prev_stage_outputs: Any, mb_index: int) -> None:
        outputs = (prev_stage_outputs,) if isinstance(prev_stage_outputs, Tensor) else prev_stage_outputs
        for info, output in zip(self.args_recv_info[mb_index], outputs, strict=True):
            info.buffer = output.detach()

    def set_local_bwd_input(self, next_stage_bwd_outputs: tuple[Tensor | None, ...], mb_index: int) -> None:
        for info, gradient in zip(self.grad_recv_info[mb_index], next_stage_bwd_outputs, strict=True):
            if gradient is not None:
                info.buffer = gradient
            elif info.buffer is not None:
                info.buffer.zero_()

    def backward_one_chunk(self, bwd_chunk_id: int, *args: Any, **kwargs: Any) -> None:
        super().backward_one_chunk(bwd_chunk_id, *args, **kwargs)
        if not self.has_backward:
            return
        # The rest are of keyword arguments, which are the stage's own.
        self.bwd_cache[bwd_chunk_id] = self.bwd_cache[bwd_chunk_id][: len(self._stage_meta.inputs)]

    def get_bwd_send_ops(self, bwd_chunk_id: int) -> list[dist.P2POp]:
        if not self.has_backward or self.is_first:
            return []
        rank = self.stage_index_to_group_rank[self.stage_index - 1]
        peer = rank if self.group is None else dist.get_global_rank(self.group, rank)
        return [
            dist.P2POp(dist.isend, self._zeros_like(meta) if gradient is None else gradient, peer, self.group)
            for gradient, meta in zip(self.bwd_cache.pop(bwd_chunk_id), self._stage_meta.input_grads, strict=True)
            if meta is not None
        ]

    def clear_runtime_states(self) -> None:
        self.fwd_cache.clear()
        self.output_chunks.clear()

    def _zeros_like(self, meta: Tensor) -> Tensor:
        return torch.zeros(meta.shape, dtype=meta.dtype, device=self.device)


def _earlier_metas(stubs: Sequence[Tensor]) -> tuple[Tensor, ...]:
    return tuple(stubs)


def _earlier_grad_metas(metas: Sequence[Tensor]) -> tuple[Tensor | None, ...]:
    return tuple(meta if meta.requires_grad else None for meta in metas)


try:
    metas_of, grad_metas_of = _utils.extract_tensor_metas, _utils._derive_grad_metas
except AttributeError:  # torch 2.11
    TorchStage, Received, CAN_SPLIT_BACKWARD = _EarlierStage, _EarlierReceived, False
    metas_of, grad_metas_of = _earlier_metas, _earlier_grad_metas
