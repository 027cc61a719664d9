"""The final linear layer and its cross-entropy, chunk by chunk, so that the full logits never exist.

The logits of one chunk of tokens are turned in place into their own gradient, which is multiplied into the
gradients of the hidden states and of the weight before the next chunk is begun: the same three matrix products as
the plain layer, none of them done twice. Only the gradients outlive the forward.
"""

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch.nn import functional as F

CHUNK_BYTES = 16 * 2**20
"""Size of one chunk's float32 logits with ``chunk_size="auto"``, unless half of the weight's gradient is larger.

With fewer tokens than half of the features, a chunk's products would spend their time reading the weight.
"""


def chunked_cross_entropy(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    target: torch.Tensor,
    *,
    bias: torch.Tensor | None = None,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    reduction: Literal["mean", "sum"] = "mean",
    softcap: float | None = None,
    chunk_size: int | Literal["auto"] = "auto",
) -> torch.Tensor:
    """Cross-entropy of ``softcap * tanh((hidden @ weight.T + bias) / softcap)`` against ``target``.

    Same loss and gradients as ``F.cross_entropy(F.linear(hidden, weight, bias), target, ...)``, without the
    ``(tokens, vocabulary)`` logits in the forward or the backward. Matrix products run in the dtype of the inputs,
    or of autocast where that is on; softmax, sums and the loss in float32 (float64 for float64 inputs). Shift the
    target yourself, as for ``F.cross_entropy``.

    Args:
        hidden: ``(..., features)``, the input of the final linear layer.
        weight: ``(vocabulary, features)``; may be tied to the embedding, or frozen.
        target: ``(...)`` class indices, the shape of ``hidden`` without its last dimension.
        bias: ``(vocabulary,)`` or None.
        ignore_index: Tokens with this target count neither in the loss nor in the mean.
        label_smoothing: In ``[0, 1]``, as in ``F.cross_entropy``.
        reduction: ``"mean"`` over the tokens that are not ignored, or ``"sum"``.
        softcap: Cap of the logits (Gemma 2), or None for plain logits.
        chunk_size: Tokens in a chunk; ``"auto"`` makes a chunk's logits as large as half of the weight's gradient,
            or :data:`CHUNK_BYTES` if that is more.

    Returns:
        The loss, a scalar in float32 (or float64). It can be differentiated once, not twice.

    Raises:
        ValueError: Shapes that do not fit, targets that are not class indices, or an option out of its range.

    Source:
        Gradients formed in the forward, chunk by chunk: Hsu et al. 2024 (https://arxiv.org/abs/2410.10989).

    Example:
        >>> hidden, weight = torch.randn(2, 5, 8), torch.randn(100, 8, requires_grad=True)
        >>> chunked_cross_entropy(hidden, weight, torch.randint(100, (2, 5))).backward()
        >>> weight.grad.shape
        torch.Size([100, 8])
    """
    if reduction not in ("mean", "sum"):
        raise ValueError(
            f"reduction={reduction!r} is not possible: the gradients are summed over tokens chunk by chunk, so there "
            "is no loss per token to weight afterwards; possible are 'mean' and 'sum'."
        )
    if softcap is not None and not (isinstance(softcap, int | float) and softcap > 0):
        raise ValueError(f"softcap={softcap!r} must be positive, or None for plain logits.")
    return chunked_cross_entropy_of_transformed_logits(
        hidden, weight, target, bias=bias, ignore_index=ignore_index, label_smoothing=label_smoothing,
        reduction=reduction, scale=1.0 if softcap is None else 1 / softcap, tanh_gain=softcap, chunk_size=chunk_size,
    )  # fmt: skip


def chunked_cross_entropy_of_transformed_logits(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    target: torch.Tensor,
    *,
    bias: torch.Tensor | None,
    ignore_index: int,
    label_smoothing: float,
    reduction: str,
    scale: float,
    tanh_gain: float | None,
    chunk_size: int | Literal["auto"] = "auto",
) -> torch.Tensor:
    """:func:`chunked_cross_entropy` for logits ``scale * x`` or ``tanh_gain * tanh(scale * x)`` of a linear ``x``."""
    _check_shapes(hidden, weight, target, bias)
    if not isinstance(label_smoothing, int | float) or not 0 <= label_smoothing <= 1:
        raise ValueError(f"label_smoothing={label_smoothing!r} must lie between 0 and 1.")
    classes, features = weight.shape
    rows = max(1, CHUNK_BYTES // (4 * classes), features // 2) if chunk_size == "auto" else chunk_size
    if not isinstance(rows, int) or isinstance(rows, bool) or rows < 1:
        raise ValueError(f"chunk_size={chunk_size!r} must be 'auto' or at least 1 token.")
    options = _Options(ignore_index, label_smoothing, reduction, scale, tanh_gain, rows)
    hidden, target = hidden.reshape(-1, hidden.shape[-1]), target.reshape(-1)
    inputs = (hidden, weight, bias)
    if torch.is_grad_enabled() and any(tensor is not None and tensor.requires_grad for tensor in inputs):
        loss: torch.Tensor = _ChunkedCrossEntropy.apply(hidden, weight, bias, target, options)
        return loss
    return _loss_and_gradients(hidden, weight, bias, target, options, (False, False, False))[0]


def _check_shapes(
    hidden: torch.Tensor, weight: torch.Tensor, target: torch.Tensor, bias: torch.Tensor | None
) -> None:
    if weight.dim() != 2 or hidden.dim() < 1 or hidden.shape[-1] != weight.shape[1]:
        raise ValueError(
            f"hidden of shape {tuple(hidden.shape)} and weight of shape {tuple(weight.shape)} do not multiply: they "
            "must be (..., features) and (vocabulary, features)."
        )
    if target.is_floating_point() or target.dtype == torch.bool:
        raise ValueError(
            f"target is {target.dtype}, which holds no class indices (and class probabilities would be as large as "
            "the logits that are avoided); give class indices, or use F.cross_entropy."
        )
    if target.shape != hidden.shape[:-1]:
        raise ValueError(
            f"target of shape {tuple(target.shape)} does not fit hidden of shape {tuple(hidden.shape)}: there must "
            "be one class index for each vector of hidden."
        )
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(
            f"bias of shape {tuple(bias.shape)} must have one entry for each of {weight.shape[0]} classes."
        )


@dataclass(frozen=True)
class _Options:
    ignore_index: int
    label_smoothing: float
    reduction: str
    scale: float
    tanh_gain: float | None
    chunk_size: int


_Gradients = tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor | None]


class _ChunkedCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        target: torch.Tensor,
        options: _Options,
    ) -> torch.Tensor:
        ctx.save_for_backward(hidden, weight, bias, target)
        ctx.options = options
        ctx.autocast_dtype = _autocast_dtype(hidden)
        loss, ctx.gradients = _loss_and_gradients(hidden, weight, bias, target, options, ctx.needs_input_grad[:3])
        return loss

    @staticmethod
    def backward(ctx: Any, grad_loss: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        if torch.is_grad_enabled():  # so it is under `create_graph=True`
            raise RuntimeError(
                "The gradients of chunked_cross_entropy were asked for with create_graph=True, but they are computed "
                "in the forward and cannot be differentiated again; use F.cross_entropy for second derivatives."
            )
        # The first backward scales the gradients in place: for a large vocabulary a second copy of the weight's
        # gradient would be the peak. Under `retain_graph` a second backward computes them again.
        gradients: _Gradients | None = ctx.gradients
        ctx.gradients = None
        if gradients is None:
            hidden, weight, bias, target = ctx.saved_tensors
            device = hidden.device.type
            with torch.autocast(device, dtype=ctx.autocast_dtype, enabled=ctx.autocast_dtype is not None):
                needed = ctx.needs_input_grad[:3]
                gradients = _loss_and_gradients(hidden, weight, bias, target, ctx.options, needed)[1]
        # Autograd casts each to the dtype of its input, after the multiplication, so that a loss scale for fp16 acts
        # before the cast.
        return (*(None if gradient is None else gradient.mul_(grad_loss) for gradient in gradients), None, None)


def _loss_and_gradients(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    target: torch.Tensor,
    options: _Options,
    needed: tuple[bool, bool, bool],
) -> tuple[torch.Tensor, _Gradients]:
    """The loss and, at least in float32, its gradients by ``hidden``, ``weight`` and ``bias`` where ``needed``."""
    dtype = _autocast_dtype(hidden) or hidden.dtype
    wide = torch.promote_types(dtype, torch.float32)
    valid = target != options.ignore_index
    count = (valid.sum() if options.reduction == "mean" else torch.ones((), device=target.device)).to(wide)
    # Where every token is ignored the mean is NaN, but its gradients are zero, as in torch.
    unit, final = _gradient_units(dtype, count.clamp(min=1), min(options.chunk_size, len(target)))
    row_unit = (valid * unit).to(wide).unsqueeze(1)
    target = torch.where(valid, target, 0).unsqueeze(1)

    with torch.autocast(hidden.device.type, enabled=False):
        weight_cast = weight.to(dtype)
        bias_cast = None if bias is None else bias.to(dtype)
        loss = torch.zeros((), dtype=wide, device=hidden.device)
        by_hidden = torch.empty_like(hidden, dtype=wide) if needed[0] else None
        by_weight = torch.zeros_like(weight, dtype=wide) if needed[1] else None
        by_bias = torch.zeros_like(weight[:, 0], dtype=wide) if needed[2] else None
        for start in range(0, len(target), options.chunk_size):
            rows = slice(start, start + options.chunk_size)
            chunk = hidden[rows].to(dtype)
            logits = F.linear(chunk, weight_cast, bias_cast).to(wide)
            token_losses, by_logits = _token_losses(logits, target[rows], row_unit[rows], options, any(needed))
            loss += torch.where(valid[rows], token_losses, 0.0).sum()
            if by_bias is not None:
                by_bias += by_logits.sum(0)
            by_logits = by_logits.to(dtype)
            if by_hidden is not None:
                by_hidden[rows] = by_logits @ weight_cast
            if by_weight is not None:
                _add_product(by_weight, by_logits.t(), chunk)
            del logits, by_logits  # freed before the next chunk's are made
    if final is not None:
        for gradient in (by_hidden, by_weight, by_bias):
            if gradient is not None:
                gradient.mul_(final)
    return loss / count, (by_hidden, by_weight, by_bias)


def _token_losses(
    logits: torch.Tensor, target: torch.Tensor, row_unit: torch.Tensor, options: _Options, with_gradient: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """Losses of a chunk and ``row_unit`` times their gradient by the layer's output, in place of ``logits``."""
    smoothing, classes = options.label_smoothing, logits.shape[1]
    if options.scale != 1:
        logits.mul_(options.scale)
    slope = None
    if options.tanh_gain is not None:
        logits.tanh_()
        slope = logits.square().neg_().add_(1).mul_(options.tanh_gain) if with_gradient else None
        logits.mul_(options.tanh_gain)

    highest = logits.amax(1, keepdim=True)
    logits.sub_(highest)
    of_target = logits.gather(1, target)
    mean = logits.mean(1, keepdim=True) if smoothing else None
    sums = logits.exp_().sum(1, keepdim=True)
    losses = sums.log() - of_target
    if mean is not None:
        losses = losses + smoothing * (of_target - mean)
    if not with_gradient:
        return losses.squeeze(1), logits

    gradient = logits.mul_(row_unit / sums)
    if smoothing:
        gradient.sub_(row_unit * (smoothing / classes))
    gradient.scatter_add_(1, target, row_unit * (smoothing - 1))
    if slope is not None:
        gradient.mul_(slope)
    if options.scale != 1:
        gradient.mul_(options.scale)
    return losses.squeeze(1), gradient


def _gradient_units(
    dtype: torch.dtype, count: torch.Tensor, chunk_size: int
) -> tuple[torch.Tensor | float, torch.Tensor | None]:
    """The unit in which a token's gradient is multiplied, and what brings the products back to the loss's unit.

    In fp16 a unit of 1 would let probabilities of a large vocabulary underflow. With ``2048 / tokens`` they stay
    representable, since chunks of a large vocabulary are short, while a column that sums all tokens of a chunk stays
    32 times below where fp16 overflows.
    """
    if dtype != torch.float16:
        return 1 / count, None
    unit = 2048 / chunk_size
    return unit, 1 / (count * unit)


def _add_product(total: torch.Tensor, left: torch.Tensor, right: torch.Tensor) -> None:
    if right.dtype == total.dtype:
        total.addmm_(left, right)
    else:
        total.add_(left @ right)


def _autocast_dtype(tensor: torch.Tensor) -> torch.dtype | None:
    device = tensor.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None
