"""Write a module as an ExecuTorch program, and run it once to see that it computes the same."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from lightning_memopt.compression.onnx import check_same, unpacked_copy


def export_executorch(
    module: nn.Module, inputs: Any, path: str | Path, *, rtol: float = 1e-3, atol: float = 1e-4
) -> Path:
    """Lower to XNNPACK's kernels, for phones and other small devices, and compare with what ``module`` computes.

    Packed weights are written as the numbers that they stand for. Sizes that pruning by structure made smaller stay
    smaller.

    Args:
        module: Any module that ``torch.export`` can follow; it is only read.
        inputs: A tensor, or a tuple of positional arguments; the program takes inputs of these shapes.
        path: The ``.pte`` file; missing folders are made.
        rtol: Relative difference that is allowed.
        atol: Absolute difference that is allowed.

    Returns:
        Where the file is.

    Raises:
        ModuleNotFoundError: executorch is missing; it comes with ``lightning-memopt[executorch]``.
        ValueError: The module cannot be exported, or the file computes something else; it is not left then.
    """
    require_executorch()
    from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
    from executorch.exir import to_edge_transform_and_lower
    from executorch.runtime import Runtime

    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    plain, _ = unpacked_copy(module)
    given = inputs if isinstance(inputs, tuple) else (inputs,)
    try:
        with torch.no_grad():
            expected = [leaf for leaf in tree_leaves(plain(*given)) if isinstance(leaf, Tensor)]
            exported = torch.export.export(plain, given)
            program = to_edge_transform_and_lower(exported, partitioner=[XnnpackPartitioner()]).to_executorch()
        path.write_bytes(program.buffer)
        method = Runtime.get().load_program(path).load_method("forward")
        results = method.execute([leaf for leaf in tree_leaves(given) if isinstance(leaf, Tensor)])
    except Exception as error:
        path.unlink(missing_ok=True)
        raise ValueError(
            f"{type(module).__name__} cannot be exported to ExecuTorch: {type(error).__name__}: "
            f"{' '.join(str(error).split())}"
        ) from error
    check_same(module, path, results, expected, "ExecuTorch", rtol=rtol, atol=atol)
    return path


def require_executorch() -> None:
    """Raise where the package that the export needs is missing.

    Raises:
        ModuleNotFoundError: Says what installs it.
    """
    try:
        import executorch.runtime  # noqa: F401
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f'ExecuTorch export needs {error.name}, which is missing: pip install "lightning-memopt[executorch]"'
        ) from error
