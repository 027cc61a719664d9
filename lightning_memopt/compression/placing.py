"""Put packed weights where dense ones were, in the form that suits this machine."""

from torch import nn

from lightning_memopt.compression.packed import PackedWeight
from lightning_memopt.compression.packed.ordered import in_order
from lightning_memopt.compression.selection import Weight, find_weights


def replace_weight(module: nn.Module, weight: Weight, packed: PackedWeight) -> None:
    """Put ``packed`` in the place of ``weight`` of ``module``, under all its names."""
    parameter = nn.Parameter(packed, requires_grad=False)
    for name in (weight.name, *weight.tied):
        owner, _, key = name.rpartition(".")
        module.get_submodule(owner)._parameters[key] = parameter


def order_weights(module: nn.Module) -> None:
    """Bring packed weights of ``module`` into the order that kernels of this machine read, where there is one."""
    for weight in find_weights(module):
        packed = weight.parameter
        if isinstance(packed, PackedWeight) and weight.kind != "embedding":
            ordered = in_order(packed, weight.module, weight.output_dim)
            if ordered is not packed:
                replace_weight(module, weight, ordered)
