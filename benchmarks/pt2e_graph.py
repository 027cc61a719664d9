"""PyTorch's static quantization by export (PT2E) for Inductor on x86, as its users would have it."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from lightning_memopt.compression.packed.hardware import largest_input


def by_export(net: nn.Module, example: Tensor, calibration: Iterable[Tensor], dynamic_shapes: Any = None) -> Any:
    """The converted graph of ``net``, without the fp32 parameters that it keeps and no longer reads.

    Inputs have 7 bits where 8 overflow, as in ``"int8_static"``.

    Args:
        net: Exports with ``example``.
        example: Its input.
        calibration: Inputs whose extremes are the ranges.
        dynamic_shapes: As ``torch.export.export`` takes them.
    """
    from torchao.quantization.pt2e import allow_exported_model_train_eval
    from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e
    from torchao.quantization.pt2e.quantizer import x86_inductor_quantizer as x86

    exported = torch.export.export(net, (example,), dynamic_shapes=dynamic_shapes).module()
    config = x86.get_default_x86_inductor_quantization_config(reduce_range=largest_input(torch.device("cpu")) < 127)
    prepared = prepare_pt2e(exported, x86.X86InductorQuantizer().set_global(config))
    with torch.no_grad():
        for inputs in calibration:
            prepared(inputs)
    graph = convert_pt2e(prepared)
    _drop_unread(graph)
    return allow_exported_model_train_eval(graph)


def _drop_unread(graph: Any) -> None:
    read = {str(node.target) for node in graph.graph.nodes if node.op == "get_attr"}
    tensors = [*graph.named_parameters(remove_duplicate=False), *graph.named_buffers(remove_duplicate=False)]
    for name, _ in tensors:
        if name not in read:
            holder, _, attribute = name.rpartition(".")
            delattr(graph.get_submodule(holder), attribute)
