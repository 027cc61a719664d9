"""Read linear layers and convolutions: which modules are one, their sizes, and which way round their weight lies."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from torch.utils._python_dispatch import _disable_current_modes


@dataclass(frozen=True)
class LinearShape:
    """A linear layer ``y = x W + b`` and how it stores ``W``.

    Attributes:
        in_features: Size of the last dimension of ``x``.
        out_features: Size of the last dimension of ``y``.
        transposed: The weight is stored ``(in, out)``, as Hugging Face's ``Conv1D`` does, not ``(out, in)``.
    """

    in_features: int
    out_features: int
    transposed: bool

    @property
    def out_dimension(self) -> int:
        """The dimension of the weight that holds the outputs."""
        return 1 if self.transposed else 0


def read_linear(module: nn.Module) -> LinearShape | None:
    """The shape of ``module`` if calling it is a plain linear map and nothing else; ``None`` otherwise.

    A subclass whose ``forward`` does something else (LoRA, quantized layers) is another thing, and so is an instance
    whose ``forward`` was replaced or whose weight is computed (weight norm).

    Example:
        >>> read_linear(nn.Linear(2, 6))
        LinearShape(in_features=2, out_features=6, transposed=False)
    """
    cls = type(module)
    if "forward" in vars(module) or module._parameters.get("weight") is None:
        return None
    if isinstance(module, nn.Linear) and (cls.forward is nn.Linear.forward or _does_what_linear_does(module)):
        return LinearShape(module.in_features, module.out_features, transposed=False)
    if cls.__name__ == "Conv1D" and cls.__module__ == "transformers.pytorch_utils":
        in_features, out_features = module._parameters["weight"].shape  # type: ignore[union-attr]
        return LinearShape(in_features, out_features, transposed=True)
    return None


def read_convolution(module: nn.Module) -> LinearShape | None:
    """The channels of ``module`` if it is one of torch's convolutions, of which each output sees all inputs.

    ``None`` for convolutions by groups, and for those of which ``forward`` is another or the weight is computed.

    Example:
        >>> read_convolution(nn.ConvTranspose2d(2, 6, 3))
        LinearShape(in_features=2, out_features=6, transposed=True)
    """
    convolutions = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
    if not isinstance(module, convolutions) or module.groups != 1 or module._parameters.get("weight") is None:
        return None
    if "forward" in vars(module) or not any(type(module).forward is each.forward for each in convolutions):
        return None
    return LinearShape(module.in_channels, module.out_channels, module.transposed)


def _does_what_linear_does(module: nn.Linear) -> bool:
    """Whether a ``forward`` of another wording (Falcon's ``x @ weight.T + bias``) gives what ``nn.Linear``'s would.

    Tried on a few numbers with a stand-in that has all of the layer's attributes but a small weight.
    """
    if module._modules or module._buffers or not set(module._parameters) <= {"weight", "bias"}:
        return False
    stand_in: Any = object.__new__(type(module))
    with _disable_current_modes(), torch.no_grad(), torch.random.fork_rng(devices=[]):
        weight, bias, x = (
            torch.randn(shape, device="cpu", dtype=torch.float64) for shape in ((5, 3), (5,), (2, 4, 3))
        )
        held = {"weight": nn.Parameter(weight)} | (
            {"bias": None} if module.bias is None else {"bias": nn.Parameter(bias)}
        )
        vars(stand_in).update(vars(module) | {"in_features": 3, "out_features": 5, "_parameters": held})
        try:
            with torch.autocast("cpu", enabled=False):
                given = type(module).forward(stand_in, x)
                return isinstance(given, torch.Tensor) and torch.allclose(given, F.linear(x, weight, held["bias"]))
        except Exception:  # code of the user's, on a layer that it was not written for
            return False
