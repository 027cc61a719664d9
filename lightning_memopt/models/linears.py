"""Read linear layers: which modules are one, their sizes, and which way round their weight lies."""

from dataclasses import dataclass

from torch import nn


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

    A subclass with a ``forward`` of its own (LoRA, quantized layers) is another thing, and so is an instance whose
    ``forward`` was replaced or whose weight is computed (weight norm).

    Example:
        >>> read_linear(nn.Linear(2, 6))
        LinearShape(in_features=2, out_features=6, transposed=False)
    """
    cls = type(module)
    if "forward" in vars(module) or module._parameters.get("weight") is None:
        return None
    if isinstance(module, nn.Linear) and cls.forward is nn.Linear.forward:
        return LinearShape(module.in_features, module.out_features, transposed=False)
    if cls.__name__ == "Conv1D" and cls.__module__ == "transformers.pytorch_utils":
        in_features, out_features = module._parameters["weight"].shape  # type: ignore[union-attr]
        return LinearShape(in_features, out_features, transposed=True)
    return None
