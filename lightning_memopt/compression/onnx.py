"""Write a module as ONNX, and run the file once to see that it computes the same."""

import copy
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from lightning_memopt.compression.packed import PackedWeight
from lightning_memopt.compression.sizes import plain_values


def export_onnx(module: nn.Module, inputs: Any, path: str | Path, *, rtol: float = 1e-3, atol: float = 1e-4) -> Path:
    """Export by torch's dynamo-based exporter and compare what onnxruntime computes with what ``module`` does.

    Quantized weights are written as the numbers they stand for: the file computes what the module computes, but it is
    as large as before. Sizes that pruning by structure made smaller stay smaller.

    Args:
        module: Any module that ``torch.export`` can follow; it is only read.
        inputs: A tensor, a tuple of positional arguments, or a dict of named ones.
        path: The ``.onnx`` file; missing folders are made.
        rtol: Relative difference that is allowed.
        atol: Absolute difference that is allowed.

    Returns:
        Where the file is.

    Raises:
        ModuleNotFoundError: onnx, onnxscript or onnxruntime is missing; they come with ``lightning-memopt[onnx]``.
        ValueError: The module cannot be exported, or the file computes something else; it is not left then.
    """
    try:
        import onnxruntime
        import onnxscript  # noqa: F401, which the exporter needs
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f'ONNX export needs {error.name}, which is not installed: pip install "lightning-memopt[onnx]"'
        ) from error
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    plain = _unpacked(module).eval()
    named = inputs if isinstance(inputs, dict) else {}
    positional = () if named else inputs if isinstance(inputs, tuple) else (inputs,)
    try:
        with torch.no_grad():
            expected = [leaf for leaf in tree_leaves(plain(*positional, **named)) if isinstance(leaf, Tensor)]
            torch.onnx.export(
                plain, positional, path, kwargs=named or None, dynamo=True, external_data=False, verbose=False
            )
    except Exception as error:
        raise ValueError(
            f"{type(module).__name__} cannot be exported to ONNX: {type(error).__name__}: "
            f"{' '.join(str(error).split())}"
        ) from error
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    leaves = [leaf for leaf in tree_leaves((positional, named)) if isinstance(leaf, Tensor)]
    feeds = {one.name: leaf.numpy(force=True) for one, leaf in zip(session.get_inputs(), leaves, strict=True)}
    for result, tensor in zip(session.run(None, feeds), expected, strict=True):
        found = torch.as_tensor(result).float()
        if found.shape != tensor.shape or not torch.allclose(found, tensor.float(), rtol=rtol, atol=atol):
            path.unlink()
            raise ValueError(
                f"{type(module).__name__} computes something else under onnxruntime (shapes {list(found.shape)} and "
                f"{list(tensor.shape)}); the file is removed"
            )
    return path


def _unpacked(module: nn.Module) -> nn.Module:
    """A copy with plain weights, without the trainer that a LightningModule may be attached to."""
    trainer = vars(module).pop("_trainer", None)
    try:
        plain = copy.deepcopy(module)
    finally:
        if trainer is not None:
            vars(module)["_trainer"] = trainer
    if hasattr(plain, "_jit_is_scripting"):  # a LightningModule: `trainer` is read by nothing in a forward
        vars(plain)["_trainer"] = None
    for child in plain.modules():
        for name, parameter in child._parameters.items():
            if isinstance(parameter, PackedWeight):
                child._parameters[name] = nn.Parameter(plain_values(parameter), requires_grad=False)
    return plain
