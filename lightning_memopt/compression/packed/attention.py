"""Torch's fused self-attention and encoder layer, taken apart where weights are packed.

Their kernels read dense weights only, and ``nn.TransformerEncoderLayer`` chooses them in evaluation mode, under
``torch.compile`` whatever its weights are.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

Linear = Callable[[Tensor, Tensor, Tensor | None], Tensor]

_native = torch.ops.aten._native_multi_head_attention.default
_layer = torch.ops.aten._transformer_encoder_layer_fwd.default


def apart(function: Any, args: tuple[Any, ...], kwargs: dict[str, Any], linear: Linear) -> Any:
    """What ``function`` computes, with linear maps by ``linear``; ``NotImplemented`` for others and with masks."""
    if function not in (_layer, _native) or args[0].is_nested:
        return NotImplemented
    given = dict(zip((argument.name for argument in function._schema.arguments), args)) | kwargs
    if given.get("mask") is not None:
        return NotImplemented
    if function is _layer:
        return _encoder_layer(linear, *args[:18])
    query, key, value, _, heads, *weights = args[:9]
    if given.get("need_weights", True) or not (query is key and key is value):
        return NotImplemented
    return _attention(linear, query, heads, *weights), None


def _attention(
    linear: Linear, x: Tensor, heads: int, qkv: Tensor, qkv_bias: Tensor, projection: Tensor, projection_bias: Tensor
) -> Tensor:
    batch, length, width = x.shape
    queries, keys, values = linear(x, qkv, qkv_bias).view(batch, length, 3, heads, -1).permute(2, 0, 3, 1, 4)
    mixed = F.scaled_dot_product_attention(queries, keys, values)
    return linear(mixed.transpose(1, 2).reshape(batch, length, width), projection, projection_bias)


def _encoder_layer(
    linear: Linear, x: Tensor, width: int, heads: int, qkv: Tensor, qkv_bias: Tensor, projection: Tensor,
    projection_bias: Tensor, use_gelu: bool, norm_first: bool, eps: float, scale_1: Tensor, shift_1: Tensor,
    scale_2: Tensor, shift_2: Tensor, up: Tensor, up_bias: Tensor, down: Tensor, down_bias: Tensor,
) -> Tensor:  # fmt: skip
    def attend(x: Tensor) -> Tensor:
        return _attention(linear, x, heads, qkv, qkv_bias, projection, projection_bias)

    def feed_forward(x: Tensor) -> Tensor:
        inner = linear(x, up, up_bias)
        return linear(F.gelu(inner) if use_gelu else F.relu(inner), down, down_bias)

    def first(x: Tensor) -> Tensor:
        return F.layer_norm(x, (width,), scale_1, shift_1, eps)

    def second(x: Tensor) -> Tensor:
        return F.layer_norm(x, (width,), scale_2, shift_2, eps)

    if norm_first:
        x = x + attend(first(x))
        return x + feed_forward(second(x))
    x = first(x + attend(x))
    return second(x + feed_forward(x))
