"""Notice that a training step writes to parameters by itself, as one does whose teacher follows what is trained."""

import torch
from torch import nn
from torch.nn.parameter import is_lazy


class ParameterWrites:
    """Tells which parameters of ``module`` are other than they were here.

    Args:
        module: The module about to be run.
        by_value: Look at values too, in one pass over the parameters that are not trained: ``parameter.data.mul_()``
            leaves no other trace.

    Example:
        >>> net = nn.Linear(2, 2).requires_grad_(False)
        >>> writes = ParameterWrites(net, by_value=True)
        >>> _ = net.bias.data.add_(1)
        >>> writes.names()
        ['bias']
    """

    def __init__(self, module: nn.Module, by_value: bool) -> None:
        self._module = module
        self._by_value = by_value
        self._before = self._look()

    def names(self) -> list[str]:
        """Qualified names of the parameters that were written to since."""
        now = self._look()
        return [name for name, seen in self._before.items() if now.get(name, seen) != seen]

    @torch.no_grad()
    def _look(self) -> dict[str, tuple[float, ...]]:
        parameters = {
            name: parameter
            for name, parameter in self._module.named_parameters()
            if not parameter.is_meta and not is_lazy(parameter)
        }
        seen: dict[str, tuple[float, ...]] = {
            name: (parameter._version, parameter.data_ptr()) for name, parameter in parameters.items()
        }
        still = [name for name, parameter in parameters.items() if not parameter.requires_grad]
        if self._by_value and still:
            sums = torch.stack([parameters[name].sum().float() for name in still]).tolist()
            for name, total in zip(still, sums, strict=True):
                seen[name] += (total,)
        return seen
