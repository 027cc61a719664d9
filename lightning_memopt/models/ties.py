"""Which parameters of a model are one tensor under several names."""

from torch import nn


def find_tied_parameters(module: nn.Module) -> list[tuple[str, ...]]:
    """Group the names under which one parameter is registered more than once.

    Args:
        module: Any module; it is only read.

    Returns:
        One tuple of qualified names for each tied parameter, in the order of registration.

    Example:
        >>> net = nn.Sequential(nn.Embedding(4, 8), nn.Linear(8, 4, bias=False))
        >>> net[1].weight = net[0].weight
        >>> find_tied_parameters(net)
        [('0.weight', '1.weight')]
    """
    names: dict[nn.Parameter, list[str]] = {}
    for name, parameter in module.named_parameters(remove_duplicate=False):
        names.setdefault(parameter, []).append(name)
    return [tuple(group) for group in names.values() if len(group) > 1]
