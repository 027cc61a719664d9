"""What of a model is sharded together: the blocks one by one, and the rest."""

from collections import Counter
from collections.abc import Collection, Iterator

import torch
from torch import nn

from lightning_memopt.models.blocks import find_block_stacks


def find_shard_units(module: nn.Module) -> list[nn.Module]:
    """Find the blocks of ``module`` that can be gathered and freed one at a time.

    A block whose parameters are also used elsewhere (tied weights, a layer registered twice) is left out: it would
    be freed while the other use still needs it. So are experts that are in no block: ranks call those to which their
    own tokens are routed, and gather together. Their parameters stay with the rest of the model.

    Args:
        module: Any module; it is only read.

    Returns:
        The blocks in the order of their stacks; none of them holds another.

    Example:
        >>> encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2), num_layers=3)
        >>> len(find_shard_units(encoder))
        3
    """
    uses = _count_uses(module)
    return [
        block
        for stack in find_block_stacks(module)
        if "expert" not in stack.name
        for block in stack.blocks
        if all(uses[parameter] == count for parameter, count in _count_uses(block).items())
    ]


def find_odd_modules(unit: nn.Module, inner: Collection[nn.Module] = ()) -> list[nn.Module]:
    """Modules of ``unit`` that are to be sharded apart, so that what is sharded together is stored in one dtype.

    One collective carries one dtype of gradients. What has no parameters of its own, or those of the dtype around it,
    is sharded with that; norms kept in float32, say, are not. Where ``unit`` has parameters of its own it is their
    dtype, else that of most elements.

    Args:
        unit: What is to be sharded together.
        inner: Modules inside ``unit`` that are units themselves; their parameters do not count.

    Returns:
        Those modules from the inside out. Only parameters that are trained count.

    Raises:
        ValueError: A module mixes dtypes itself, or its parameters are used outside it.
    """
    skipped = {submodule for module in inner if module is not unit for submodule in module.modules()}
    names = {module: name for name, module in unit.named_modules() if module not in skipped}
    dtypes: dict[nn.Module, list[torch.dtype]] = {}
    elements: Counter[torch.dtype] = Counter()
    for module in names:
        own = [p for p in module.parameters(recurse=False) if p.requires_grad and p.ndim]
        dtypes[module] = list(dict.fromkeys(p.dtype for p in own))
        for parameter in own:
            elements[parameter.dtype] += parameter.numel()

    def find_apart(around: nn.Module, dtype: torch.dtype) -> Iterator[nn.Module]:
        for module in around.children():
            if module in names:
                own = dtypes[module]
                yield from find_apart(module, own[0] if own else dtype)
                if own and own[0] != dtype:
                    yield module

    if len(elements) < 2:
        return []
    of_unit = (dtypes[unit] or [elements.most_common(1)[0][0]])[0]
    apart = list(dict.fromkeys(find_apart(unit, of_unit)))
    uses = _count_uses(unit)
    for module, name in names.items():
        is_tied = module in apart and any(uses[p] > count for p, count in _count_uses(module).items())
        if is_tied or len(dtypes[module]) > 1:
            dtype, other = (*dtypes[module], of_unit)[:2]
            raise ValueError(
                f"`{name or type(unit).__name__}` stores trainable parameters in {dtype} next to, or tied with, "
                f"others in {other}, and gradients of two dtypes cannot be reduced together; store them in one "
                "dtype, or use `memopt_ddp`."
            )
    return apart


def check_can_shard(module: nn.Module, held_elsewhere: Collection[nn.Parameter] = ()) -> None:
    """Refuse a module with parameters that cannot be sharded.

    Args:
        module: The module.
        held_elsewhere: Parameters that are not to be sharded here.

    Raises:
        ValueError: A parameter is on the meta device.
    """
    elsewhere = set(held_elsewhere)
    for name, parameter in module.named_parameters():
        if parameter in elsewhere:
            continue
        if parameter.is_meta:
            raise ValueError(
                f"Parameter `{name}` is on the meta device, so there are no values to shard; build the module with "
                "real values, and let the strategy shard them."
            )


def check_gradients_are_dense(module: nn.Module) -> None:
    """Refuse embeddings whose gradients are sparse tensors.

    Raises:
        ValueError: One is to be trained; names it.
    """
    for name, layer in module.named_modules():
        if not isinstance(layer, nn.Embedding | nn.EmbeddingBag) or not layer.sparse:
            continue
        if layer.weight.requires_grad and not layer.weight.is_meta:
            raise ValueError(
                f"`{name}` has `sparse=True`, and sparse gradients cannot be dealt out to ranks; leave that out, or "
                "use `memopt_ddp`."
            )


def find_independent_children(module: nn.Module) -> list[nn.Module]:
    """The children of ``module`` that hold its parameters, if each parameter belongs to exactly one of them.

    A step that runs several backward passes by hand (a GAN's) must be able to gather and reduce each network by
    itself, when it is called. In place of a container, which is never called, there are its children.

    Raises:
        ValueError: A parameter is registered on ``module`` or on a container, or tied between two children.
    """
    owner: dict[nn.Parameter, str] = {}
    children = []
    for name, child in _called_children(module):
        for parameter in child.parameters():
            if owner.setdefault(parameter, name) != name:
                raise ValueError(
                    f"Submodules `{owner[parameter]}` and `{name}` share a parameter, and the module steps its "
                    "optimizers by hand, so they cannot be gathered and reduced separately; use `memopt_ddp`."
                )
        if next(child.parameters(), None) is not None:
            children.append(child)
    return children


def _called_children(module: nn.Module, prefix: str = "") -> Iterator[tuple[str, nn.Module]]:
    for name, parameter in module.named_parameters(prefix.rstrip("."), recurse=False):
        if parameter.ndim == 0:
            continue  # is not sharded
        where = (
            f"`{prefix.rstrip('.')}`, which is never called," if prefix else f"the {type(module).__name__} itself,"
        )
        raise ValueError(
            f"Parameter `{name}` is registered on {where} and the module steps its optimizers by hand, so no "
            "submodule's call can gather it; move it into a submodule, or use `memopt_ddp`."
        )
    for name, child in module.named_children():
        if type(child).forward is nn.Module.forward:  # ModuleList and ModuleDict, and containers of the user's
            yield from _called_children(child, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", child


def _count_uses(module: nn.Module) -> Counter[nn.Parameter]:
    return Counter(parameter for _, parameter in module.named_parameters(remove_duplicate=False))
