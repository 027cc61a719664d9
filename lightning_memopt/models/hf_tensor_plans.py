"""Read the tensor parallel plans that Hugging Face models carry (``_tp_plan``, ``base_model_tp_plan``)."""

from fnmatch import fnmatchcase

from torch import nn


def read_tensor_plans(module: nn.Module) -> dict[str, str]:
    """The role that Hugging Face's plans give submodules and parameters of ``module``, by qualified name.

    Args:
        module: Any module; every Hugging Face model inside it is asked for its plan.

    Returns:
        For example ``{"model.layers.0.mlp.up_proj": "colwise", ...}``; empty without such a model.
    """
    roles: dict[str, str] = {}
    for prefix, model in module.named_modules():
        plan = vars(model).get("_tp_plan")  # filled in on the instance by `post_init`, with its submodels' plans
        if not isinstance(plan, dict) or not plan:
            continue
        for name, _ in model.named_modules():
            for pattern, role in plan.items():
                if fnmatchcase(name, pattern) and name.count(".") == pattern.count("."):
                    roles.setdefault(f"{prefix}.{name}" if prefix else name, role)
    return roles


def is_split_experts(module: nn.Module, role: str | None) -> bool:
    """Whether ``module`` holds experts as Mixtral does, and a plan says that each expert's features are split.

    Args:
        module: Any module; it is only read.
        role: What :func:`read_tensor_plans` says of it.

    Returns:
        True for weights ``gate_up_proj`` ``(experts, 2 * inner, outer)`` and ``down_proj``
        ``(experts, outer, inner)``, and nothing else.
    """
    shapes = {name: tuple(parameter.shape) for name, parameter in module.named_parameters()}
    if role != "moe_tp_experts" or set(shapes) != {"gate_up_proj", "down_proj"} or len(shapes["down_proj"]) != 3:
        return False
    experts, outer, inner = shapes["down_proj"]
    return shapes["gate_up_proj"] == (experts, 2 * inner, outer)
