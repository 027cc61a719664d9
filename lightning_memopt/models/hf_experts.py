"""Read the experts of Hugging Face's mixtures, which hold the matrices of all of them in one parameter each."""

from dataclasses import dataclass

from torch import nn

_PLANNED = "moe_tp_experts"
_FLAGS = ("has_gate", "has_bias", "is_transposed", "is_concatenated", "has_post_expert_norm")


@dataclass(frozen=True)
class Experts:
    """How the inner features of each expert can be dealt out.

    Attributes:
        inner: How many there are.
        splits: Of each parameter that has them, the dimension, and the equal parts that it consists of there.
        added_once: Parameters that are added to the sum over inner features.
    """

    inner: int
    splits: dict[str, tuple[int, int]]
    added_once: tuple[str, ...] = ()


def read_experts(module: nn.Module, role: str | None = None) -> Experts | None:
    """The experts in ``module``; ``None`` if it is something else, or does more than two products and a gate.

    They are known by what Hugging Face's ``use_experts_implementation`` says of each class, or by a plan.

    Args:
        module: Any module; it is only read.
        role: What :func:`~lightning_memopt.models.hf_tensor_plans.read_tensor_plans` says of it.
    """
    flags = {name: vars(module)[name] for name in _FLAGS if isinstance(vars(module).get(name), bool)}
    if len(flags) < len(_FLAGS) and role != _PLANNED:
        return None
    has_gate, has_bias = flags.get("has_gate", True), flags.get("has_bias", False)
    transposed, concatenated = flags.get("is_transposed", False), flags.get("is_concatenated", True)
    widening = "gate_up_proj" if has_gate else "up_proj"
    biases = {f"{widening}_bias", "down_proj_bias"} if has_bias else set()
    shapes = {name: tuple(parameter.shape) for name, parameter in module.named_parameters()}
    if set(shapes) != {widening, "down_proj", *biases} or len(shapes["down_proj"]) != 3:
        return None
    experts, *sides = shapes["down_proj"]
    inner, outer = sides if transposed else reversed(sides)
    wide = 2 * inner if has_gate else inner
    if shapes[widening] != ((experts, outer, wide) if transposed else (experts, wide, outer)):
        return None
    pieces = 2 if has_gate and concatenated else 1  # else each gate lies beside what it is for
    splits = {widening: (2 if transposed else 1, pieces), "down_proj": (1 if transposed else 2, 1)}
    if has_bias:
        splits[f"{widening}_bias"] = (1, pieces)
    return Experts(inner, splits, ("down_proj_bias",) if has_bias else ())
