"""Read mixtures of experts whose matrices lie stacked in one parameter, a slice for each expert."""

from dataclasses import dataclass

from torch import Tensor, nn


@dataclass(frozen=True)
class Experts:
    """Experts that widen and narrow again, as Mixtral's do.

    Attributes:
        up: Name of the parameter that makes what is within, of all experts: ``(experts, outputs, inputs)``.
        down: Name of the one that reads it.
        outer: Features of what goes in and comes out.
        inner: Features within.
        gate: Whether ``up`` makes a gate too, of as many features: ``"behind"`` the others or ``"between"`` them;
            empty where it does not.
        output_dim: The dimension of outputs of both.
    """

    up: str
    down: str
    outer: int
    inner: int
    gate: str
    output_dim: int


def holds_experts(module: nn.Module, parameter: Tensor) -> bool:
    """Whether ``parameter`` of ``module`` is a stack of matrices of the experts that the module speaks of.

    Example:
        >>> import torch
        >>> module = nn.Module()
        >>> module.num_experts = 4
        >>> holds_experts(module, torch.empty(4, 16, 8)), holds_experts(module, torch.empty(1, 16, 8))
        (True, False)
    """
    if parameter.ndim != 3 or len(parameter) < 2:
        return False
    return any("experts" in name and value == len(parameter) for name, value in vars(module).items())


def output_dim(module: nn.Module) -> int:
    """The dimension of such a parameter along which outputs lie; most are stored as linear layers are."""
    return 2 if getattr(module, "is_transposed", False) is True else 1


def read_experts(module: nn.Module) -> Experts | None:
    """The experts that ``module`` holds, by the names and the attributes that Hugging Face's have, or ``None``."""
    held = {name: p for name, p in module._parameters.items() if p is not None and holds_experts(module, p)}
    names = [name for name in held if name != "down_proj"]
    if len(held) != 2 or len(names) != 1 or names[0] not in ("up_proj", "gate_up_proj"):
        return None
    dim = output_dim(module)
    up, down = held[names[0]], held["down_proj"]
    outer, inner, made = down.shape[dim], down.shape[3 - dim], up.shape[dim]
    if up.shape[3 - dim] != outer or made not in (inner, 2 * inner):
        return None
    between = getattr(module, "is_concatenated", True) is False
    gate = "" if made == inner else "between" if between else "behind"
    return Experts(names[0], "down_proj", outer, inner, gate, dim)
