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
