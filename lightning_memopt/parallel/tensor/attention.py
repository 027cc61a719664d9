"""``nn.MultiheadAttention`` with its heads dealt out: it reads its weights itself, so it is computed here."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_memopt.parallel.tensor.collectives import add_up, enter, gather
from lightning_memopt.parallel.tensor.layers import SplitState, local


class HeadParallelAttention(nn.Module):
    """In front of ``nn.MultiheadAttention``: each rank has some of the heads."""

    _tensor_split: SplitState

    def forward(
        self: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """As ``nn.MultiheadAttention.forward``, which says what the arguments are."""
        if is_causal and attn_mask is None:
            raise RuntimeError("nn.MultiheadAttention: is_causal is a hint on attn_mask, which has to be given too.")
        is_batched, batch_first = query.dim() == 3, self.batch_first
        query, key, value = (_batch_first(x, is_batched, batch_first) for x in _enter_once(self, query, key, value))
        q, k, v = _project(self, query, key, value)
        mask = _joined_masks(self, attn_mask, key_padding_mask, q)
        dropout = self.dropout if self.training else 0.0
        weights = None
        if need_weights:
            scores = q @ k.transpose(-2, -1) * q.shape[-1] ** -0.5
            weights = torch.softmax(scores if mask is None else scores + mask, dim=-1)
            weights = F.dropout(weights, dropout) if dropout else weights
            heads = weights @ v
            weights = gather(weights, self._tensor_split.mesh, 1)
            weights = weights.mean(dim=1) if average_attn_weights else weights
        else:
            heads = F.scaled_dot_product_attention(q, k, v, mask, dropout)
        output = F.linear(heads.transpose(1, 2).flatten(2), local(self.out_proj.weight))  # type: ignore[arg-type]
        output = add_up(output, self._tensor_split.mesh)
        if self.out_proj.bias is not None:
            output = output + self.out_proj.bias.to(output.dtype)
        if not is_batched:
            return output.squeeze(0), None if weights is None else weights.squeeze(0)
        return output if batch_first else output.transpose(0, 1), weights


def _enter_once(module: Any, *inputs: Tensor) -> list[Tensor]:
    """In a self-attention all three are one tensor, whose gradient is summed over the ranks once."""
    entered = {id(x): enter(x, module._tensor_split.mesh) for x in inputs}
    return [entered[id(x)] for x in inputs]


def _batch_first(x: Tensor, is_batched: bool, batch_first: bool) -> Tensor:
    if not is_batched:
        return x.unsqueeze(0)
    return x if batch_first else x.transpose(0, 1)


def _project(module: Any, query: Tensor, key: Tensor, value: Tensor) -> list[Tensor]:
    """This rank's heads of queries, keys and values: ``(batch, heads / N, length, head_dim)`` each."""
    if module.in_proj_weight is not None:
        matrices = local(module.in_proj_weight).chunk(3)  # type: ignore[union-attr]
    else:
        matrices = tuple(local(w) for w in (module.q_proj_weight, module.k_proj_weight, module.v_proj_weight))
    biases = (None,) * 3 if module.in_proj_bias is None else local(module.in_proj_bias).chunk(3)  # type: ignore[union-attr]
    return [
        F.linear(x, matrix, bias).unflatten(-1, (-1, module.head_dim)).transpose(1, 2)
        for x, matrix, bias in zip((query, key, value), matrices, biases, strict=True)
    ]


def _joined_masks(module: Any, attn_mask: Tensor | None, padding: Tensor | None, q: Tensor) -> Tensor | None:
    """Both masks as what is added to the scores of this rank's heads."""
    if attn_mask is not None:
        attn_mask = _additive(attn_mask, q.dtype)
        if attn_mask.dim() == 3:  # one for each sample and head
            mesh = module._tensor_split.mesh
            attn_mask = attn_mask.unflatten(0, (-1, module.num_heads)).chunk(mesh.size(), 1)[mesh.get_local_rank()]
    if padding is None:
        return attn_mask
    padding = _additive(padding, q.dtype)
    padding = padding.view(-1, 1, 1, padding.shape[-1])
    return padding if attn_mask is None else attn_mask + padding


def _additive(mask: Tensor, dtype: torch.dtype) -> Tensor:
    if mask.dtype == torch.bool:
        return torch.zeros_like(mask, dtype=dtype).masked_fill_(mask, float("-inf"))
    return mask.to(dtype)
