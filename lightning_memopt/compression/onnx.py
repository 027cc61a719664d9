"""Write a module as ONNX, and run the file once to see that it computes the same."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from lightning_memopt.compression.packed import Float8Weight, HalfWeight, Int8Weight, PackedWeight
from lightning_memopt.compression.sizes import plain_values
from lightning_memopt.models.copying import copy_module


def export_onnx(
    module: nn.Module,
    inputs: Any,
    path: str | Path,
    *,
    dynamic_shapes: Any = None,
    rtol: float = 1e-3,
    atol: float = 1e-4,
) -> Path:
    """Export by torch's dynamo-based exporter and compare what onnxruntime computes with what ``module`` does.

    Weights in int8, fp8, fp16 and bf16 are written as they are held, to be widened when the file runs, so that it is
    as small as the module; those in 4 bits are written as the numbers they stand for. Inputs are not rounded in the
    file. Sizes that pruning by structure made smaller stay smaller.

    Args:
        module: Any module that ``torch.export`` can follow; it is only read.
        inputs: A tensor, a tuple of positional arguments, or a dict of named ones.
        path: The ``.onnx`` file; missing folders are made.
        dynamic_shapes: Sizes that may be others when the file runs, as ``torch.onnx.export`` takes them: in the form
            of ``inputs`` names by dimension, such as ``({0: "batch"},)`` for one tensor. ``None``: the file takes the
            sizes of ``inputs`` alone.
        rtol: Relative difference that is allowed.
        atol: Absolute difference that is allowed.

    Returns:
        Where the file is.

    Raises:
        ModuleNotFoundError: onnx, onnxscript or onnxruntime is missing; they come with ``lightning-memopt[onnx]``.
        ValueError: The module cannot be exported, or the file computes something else; it is not left then.
    """
    require_onnx()
    import onnxruntime

    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    plain, held = unpacked_copy(module)
    named = inputs if isinstance(inputs, dict) else {}
    positional = () if named else inputs if isinstance(inputs, tuple) else (inputs,)
    try:
        with torch.no_grad():
            expected = [leaf for leaf in tree_leaves(plain(*positional, **named)) if isinstance(leaf, Tensor)]
            program: Any = torch.onnx.export(
                plain, positional, kwargs=named or None, dynamo=True, verbose=False, optimize=False,
                dynamic_shapes=dynamic_shapes,
            )  # fmt: skip
            _narrow(program.model.graph, held)  # before constants are folded, weights among them
            program.optimize()
            program.save(path, external_data=False)
    except Exception as error:
        raise ValueError(
            f"{type(module).__name__} cannot be exported to ONNX: {type(error).__name__}: "
            f"{' '.join(str(error).split())}"
        ) from error
    try:
        session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
        leaves = [leaf for leaf in tree_leaves((positional, named)) if isinstance(leaf, Tensor)]
        feeds = {one.name: leaf.numpy(force=True) for one, leaf in zip(session.get_inputs(), leaves, strict=True)}
        results = [torch.as_tensor(result) for result in session.run(None, feeds)]
    except Exception as error:  # onnxruntime has errors of its own for each reason
        path.unlink()
        raise ValueError(
            f"{type(module).__name__} is exported, but onnxruntime cannot run the file, which is removed: "
            f"{type(error).__name__}: {' '.join(str(error).split())}"
        ) from error
    check_same(module, path, results, expected, "onnxruntime", rtol=rtol, atol=atol)
    return path


def require_onnx() -> None:
    """Raise where a package that the export needs is missing.

    Raises:
        ModuleNotFoundError: Says which, and what installs it.
    """
    try:
        import onnxruntime  # noqa: F401, which runs the file
        import onnxscript  # noqa: F401, which the exporter needs
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f'ONNX export needs {error.name}, which is not installed: pip install "lightning-memopt[onnx]"'
        ) from error


def check_same(
    module: nn.Module,
    path: Path,
    results: Sequence[Tensor],
    expected: Sequence[Tensor],
    runtime: str,
    *,
    rtol: float,
    atol: float,
) -> None:
    """Remove the file that was written of ``module``, unless what it computes is what was expected.

    Raises:
        ValueError: It is not.
    """
    for found, tensor in zip(results, expected, strict=True):
        if found.shape != tensor.shape or not torch.allclose(found.float(), tensor.float(), rtol=rtol, atol=atol):
            path.unlink()
            raise ValueError(
                f"{type(module).__name__} computes something else under {runtime} (shapes {list(found.shape)} and "
                f"{list(tensor.shape)}); the file is removed"
            )


def unpacked_copy(module: nn.Module) -> tuple[nn.Module, dict[str, PackedWeight]]:
    """A copy with plain weights, without the trainer of a LightningModule, and what it held packed, by name."""
    trainer = vars(module).pop("_trainer", None)
    try:
        plain = copy_module(module).eval()
    finally:
        if trainer is not None:
            vars(module)["_trainer"] = trainer
    if hasattr(plain, "_jit_is_scripting"):  # a LightningModule: `trainer` is read by nothing in a forward
        vars(plain)["_trainer"] = None
    for child in plain.modules():
        config: Any = getattr(child, "config", None)
        if getattr(config, "_experts_implementation", None) == "grouped_mm":
            config._experts_implementation = "batched_mm"  # the same, of operators that exporters know
    held: dict[str, PackedWeight] = {}
    dense: dict[int, nn.Parameter] = {}  # by the packed one, so that ties stay
    for prefix, child in plain.named_modules():
        for name, parameter in child._parameters.items():
            if isinstance(parameter, PackedWeight):
                held[f"{prefix}.{name}" if prefix else name] = parameter.plain()
                if id(parameter) not in dense:
                    dense[id(parameter)] = nn.Parameter(plain_values(parameter), requires_grad=False)
                child._parameters[name] = dense[id(parameter)]
    return plain, held


def _narrow(graph: Any, held: Mapping[str, PackedWeight]) -> None:
    """Put the parts of packed weights, and a node that widens them, in the place of dense initializers."""
    import onnx_ir
    from onnx_ir.tensor_adapters import TorchTensor

    for name, weight in held.items():
        dense = graph.initializers.get(name)  # of a tied weight, under its first name
        if dense is None or not isinstance(weight, Int8Weight | Float8Weight | HalfWeight):
            continue
        parts = []
        is_stacked = not isinstance(weight, HalfWeight) and sum(size > 1 for size in weight.scale.shape) > 1
        for part, tensor in weight.parts.items():
            if part == "scale" and not is_stacked:
                tensor = tensor.flatten() if tensor.numel() > 1 else tensor.reshape(())
            parts.append(onnx_ir.val(f"{name}/{part}", const_value=TorchTensor(tensor.contiguous())))
            graph.register_initializer(parts[-1])
        if isinstance(weight, HalfWeight):
            nodes = [onnx_ir.node("Cast", parts, {"to": dense.dtype})]
        elif is_stacked:  # DequantizeLinear has scales along one dimension
            cast = onnx_ir.node("Cast", parts[:1], {"to": dense.dtype})
            nodes = [cast, onnx_ir.node("Mul", [cast.outputs[0], parts[1]])]
        else:
            lengths = list(weight.scale.shape)
            nodes = [onnx_ir.node("DequantizeLinear", parts, {"axis": lengths.index(max(lengths))})]
        for node in nodes:
            node.outputs[0].shape, node.outputs[0].dtype = dense.shape, dense.dtype
        widened = nodes[-1].outputs[0]
        graph.insert_before(graph[0], nodes)
        dense.replace_all_uses_with(widened)
        del graph.initializers[name]
