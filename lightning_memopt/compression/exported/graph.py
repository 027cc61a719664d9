"""Export one module, observe its inputs and convert it: what torchao's PT2E does, for Inductor on x86.

Tried with torchao 0.18.
"""

import math
import platform
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from inspect import Parameter, Signature
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Node
from torch.fx.experimental.symbolic_shapes import is_concrete_int
from torch.utils._pytree import tree_leaves

from lightning_memopt.compression.exported.calls import Inputs, read_inputs
from lightning_memopt.compression.packed.hardware import largest_input
from lightning_memopt.compression.ranges import Range
from lightning_memopt.models.instance_patch import replaced


def require_torchao() -> None:
    """Raise where torchao is missing.

    Raises:
        ModuleNotFoundError: Says what installs it.
    """
    try:
        import torchao.quantization.pt2e  # noqa: F401
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f"engine='torchao' needs {error.name}, which is not installed: pip install 'lightning-memopt[quantize]'"
        ) from error


def require_x86(device: torch.device) -> None:
    """Raise where the quantizer has no kernels to round for.

    Raises:
        ValueError: ``device`` is no x86 processor.
    """
    machine = platform.machine()
    if device.type != "cpu" or machine.lower() not in ("x86_64", "amd64"):
        where = f"a processor of kind {machine!r}" if device.type == "cpu" else f"{device.type!r}"
        raise ValueError(
            f"'int8_static' with engine='torchao' is unsupported on {where}: its integers are for kernels of x86 "
            "processors. Train with accelerator='cpu' on one, or use engine='memopt'."
        )


@torch.inference_mode(mode=False)
@torch.no_grad()  # whichever parameters train: a module that is built again has the same graph
def export_observed(module: nn.Module, inputs: Inputs) -> tuple[GraphModule, list[list[int | None]]]:
    """Export ``module`` with an observer at each tensor that is to be rounded.

    Args:
        module: In evaluation mode; it is not changed, and the graph shares its tensors.
        inputs: What it is called with. Each dimension stays open that the module's code leaves open.

    Returns:
        The graph, and the sizes of the tensors in ``inputs``, ``None`` for those that are open.

    Raises:
        Exception: Of whatever class, from whatever stopped the export.
    """
    from torchao.quantization.pt2e import MinMaxObserver
    from torchao.quantization.pt2e.quantize_pt2e import prepare_pt2e
    from torchao.quantization.pt2e.quantizer import x86_inductor_quantizer as x86

    args, kwargs = map(read_inputs, inputs)
    tensors = [leaf for leaf in tree_leaves([args, kwargs]) if isinstance(leaf, Tensor)]
    open_dims: Any = torch.export.ShapesCollection()
    for tensor in tensors:
        sizes = enumerate(tensor.shape)
        open_dims[tensor] = {dim: torch.export.Dim.AUTO for dim, size in sizes if size > 1}  # of 1, none stays open
    with replaced(module, forward=_with_arguments(module.forward, len(args), list(kwargs))):
        program = torch.export.export(module, args, kwargs, dynamic_shapes=open_dims, strict=False)
    config = x86.get_default_x86_inductor_quantization_config(reduce_range=largest_input(torch.device("cpu")) < 127)
    # Extremes, between which the other schemes round too: two numbers, which a file can hold.
    rounded = replace(config.input_activation, observer_or_fake_quant_ctr=MinMaxObserver.with_args(eps=2**-12))
    config = replace(config, input_activation=rounded, output_activation=rounded)
    observed = prepare_pt2e(program.module(), x86.X86InductorQuantizer().set_global(config))
    for node in observed.graph.nodes:
        if node.op == "call_module" and node.args and node.args[0].op == "get_attr":
            observed.get_submodule(node.target)(_attribute(observed, node.args[0]))  # weights need no calibration
    return observed, _sizes(program, tensors)


def read_ranges(observed: GraphModule) -> dict[str, Range]:
    """What the observers of inputs saw, by their names; ``(inf, -inf)``: nothing."""
    observers = _input_observers(observed)
    return {name: (float(found.min_val), float(found.max_val)) for name, found in observers.items()}


@torch.inference_mode(mode=False)
@torch.no_grad()
def convert(observed: GraphModule, ranges: Mapping[str, Range]) -> GraphModule:
    """The graph in which inputs are rounded between ``ranges``, and weights are integers.

    Args:
        observed: From :func:`export_observed`; it is of no use afterwards.
        ranges: As from :func:`read_ranges`.

    Raises:
        ValueError: ``ranges`` has other names than it has observers, or a range is none.
    """
    from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e

    observers = _input_observers(observed)
    if ranges.keys() != observers.keys():
        raise ValueError(f"there are ranges of {sorted(ranges)}, and observers of {sorted(observers)}")
    for name, (low, high) in ranges.items():
        if not (math.isfinite(high - low) and low <= high):
            raise ValueError(f"{name} is between {low} and {high}")
        observers[name].min_val.fill_(low)
        observers[name].max_val.fill_(high)
    return convert_pt2e(observed)


def unrounded(observed: GraphModule, weights: Iterable[Tensor]) -> bool:
    """Whether ``observed`` reads one of ``weights`` as it is, which then stays whole."""
    places = {weight.untyped_storage().data_ptr() for weight in weights}
    return any(
        node.op == "get_attr"
        and isinstance(held := _attribute(observed, node), Tensor)
        and held.untyped_storage().data_ptr() in places
        and not all(user.op == "call_module" for user in node.users)
        for node in observed.graph.nodes
    )


def _with_arguments(forward: Callable[..., Any], count: int, names: Iterable[str]) -> Callable[..., Any]:
    """``forward`` with ``count`` positional arguments and those of ``names``: in ``**kwargs`` none are open."""

    def call(*args: Any, **kwargs: Any) -> Any:
        return forward(*args, **kwargs)

    parameters = [Parameter(f"input_{number}", Parameter.POSITIONAL_OR_KEYWORD) for number in range(count)]
    parameters += [Parameter(name, Parameter.KEYWORD_ONLY) for name in names]
    vars(call)["__signature__"] = Signature(parameters)
    return call


def _input_observers(observed: GraphModule) -> dict[str, Any]:
    from torchao.quantization.pt2e import MinMaxObserver

    return {
        node.target: found
        for node in observed.graph.nodes
        if node.op == "call_module" and type(found := observed.get_submodule(node.target)) is MinMaxObserver
    }


def _attribute(graph: GraphModule, node: Node) -> Any:
    owner, _, name = str(node.target).rpartition(".")
    return getattr(graph.get_submodule(owner), name)


def _sizes(program: Any, tensors: Iterable[Tensor]) -> list[list[int | None]]:
    values = {node.name: node.meta["val"] for node in program.graph.nodes if node.op == "placeholder"}
    leaves = zip(tree_leaves(program.example_inputs), program.graph_signature.user_inputs, strict=True)
    found = {id(leaf): values[name].shape for leaf, name in leaves if isinstance(leaf, Tensor)}
    return [[int(size) if is_concrete_int(size) else None for size in found[id(tensor)]] for tensor in tensors]
