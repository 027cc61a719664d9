"""A plan as something to paste or to read by machine: Python, YAML for ``LightningCLI``, plain values."""

import json
from typing import TYPE_CHECKING, Any

from lightning_memopt.parallel.mesh import DIMENSIONS

if TYPE_CHECKING:
    from lightning_memopt.planning.plan import Plan, PlanResult


def trainer_arguments(plan: "Plan") -> dict[str, Any]:
    """Arguments of ``pl.Trainer`` that are plain values."""
    arguments: dict[str, Any] = {"accelerator": "gpu" if plan.device_kind == "cuda" else "cpu"}
    arguments["devices"] = plan.devices
    if plan.nodes > 1:
        arguments["num_nodes"] = plan.nodes
    arguments["strategy"] = plan.strategy
    arguments["precision"] = plan.choice.techniques.precision
    return arguments


def as_python(plan: "Plan") -> str:
    """The trainer as Python."""
    arguments = trainer_arguments(plan) | {"strategy": _strategy(plan)} | _plain_options(plan)
    lines = [f"    {name}={value if name == 'strategy' else _quoted(value)}," for name, value in arguments.items()]
    callbacks = [
        f"        memopt.{name}({', '.join(f'{key}={_quoted(value)}' for key, value in arguments.items())}),"
        for name, arguments in plan.choice.techniques.written(plan.device_kind)
    ]
    if callbacks:
        lines += ["    callbacks=[", *callbacks, "    ],"]
    head = ["import lightning.pytorch as pl", "import lightning_memopt as memopt", "", "trainer = pl.Trainer("]
    return "\n".join([*head, *lines, ")"])


def as_yaml(plan: "Plan") -> str:
    """The ``trainer`` section of a ``LightningCLI`` config."""
    lines = ["trainer:"]
    for name, value in trainer_arguments(plan).items():
        if value == "memopt_hybrid":
            lines += ["  strategy:", "    class_path: lightning_memopt.HybridStrategy", "    init_args:"]
            lines += [f"      {dimension}: {size}" for dimension, size in _mesh(plan).items()]
        else:
            lines.append(f"  {name}: {value}")
    lines += [f"  {name}: {json.dumps(value)}" for name, value in _plain_options(plan).items()]
    callbacks = plan.choice.techniques.written(plan.device_kind)
    if callbacks:
        lines.append("  callbacks:")
    for name, arguments in callbacks:
        lines.append(f"    - class_path: lightning_memopt.{name}")
        if arguments:
            lines.append("      init_args:")
            lines += [f"        {key}: {value}" for key, value in arguments.items()]
    return "\n".join(lines)


def as_dict(plan: "Plan") -> dict[str, Any]:
    """The plan as plain values."""
    techniques = plan.choice.techniques
    return {
        "strategy": plan.strategy,
        "mesh": _mesh(plan),
        "devices": plan.devices,
        "nodes": plan.nodes,
        "precision": techniques.precision,
        "callbacks": [
            {"class_path": f"lightning_memopt.{name}", "init_args": arguments}
            for name, arguments in techniques.written(plan.device_kind)
        ],
        "peak_bytes": plan.peak_bytes,
        "by_category": dict(plan.by_category),
        "relative_time": plan.relative_time,
        "time_parts": dict(plan.time_parts),
        "fits": plan.fits,
        "bought": list(plan.bought),
    }


def result_as_dict(result: "PlanResult") -> dict[str, Any]:
    """All plans and which is chosen, as plain values: what ``lightning-memopt plan --json`` prints."""
    return {
        "plans": [as_dict(plan) for plan in result.plans],
        "chosen": result.chosen,
        "budget_bytes": result.budget_bytes,
        "smallest_bytes": result.smallest_bytes,
        "fewest_devices": result.fewest_devices,
        "notes": list(result.notes),
    }


def _plain_options(plan: "Plan") -> dict[str, Any]:
    """The user's options of the trainer that can be written down; objects cannot."""
    return {name: value for name, value in plan.trainer_options.items() if _is_plain(value)}


def _is_plain(value: Any) -> bool:
    if isinstance(value, list | tuple):
        return all(map(_is_plain, value))
    if isinstance(value, dict):
        return all(isinstance(key, str) and _is_plain(each) for key, each in value.items())
    return value is None or type(value) in (bool, int, float, str)


def _mesh(plan: "Plan") -> dict[str, int]:
    return {name: plan.sizes.of(name) for name in DIMENSIONS}


def _strategy(plan: "Plan") -> str:
    if plan.strategy != "memopt_hybrid":
        return _quoted(plan.strategy)
    sizes = ", ".join(f"{name}={size}" for name, size in _mesh(plan).items() if size > 1)
    return f"memopt.HybridStrategy({sizes})"


def _quoted(value: Any) -> str:
    return json.dumps(value) if isinstance(value, str) else repr(value)
