"""Follow a run of a module by torch-pruning's dependency graph, taught Hugging Face's ``Conv1D``, and to an end."""

import copy
import dataclasses
import math
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd
from torch.utils._pytree import tree_leaves

from lightning_memopt.models.linears import read_linear

Call = Callable[[nn.Module], Any]
"""Runs a module once on real inputs and returns what its loss is computed from, or the loss."""


def require_torch_pruning() -> None:
    """Raise where the package that follows a module is missing.

    Raises:
        ModuleNotFoundError: Says what installs it.
    """
    try:
        import torch_pruning  # noqa: F401
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            'structured pruning needs torch-pruning, which is not installed: pip install "lightning-memopt[prune]"'
        ) from error


def is_conv1d(module: nn.Module) -> bool:
    """Whether ``module`` is a linear layer whose weight is stored as ``(inputs, outputs)``."""
    shape = read_linear(module)
    return shape is not None and shape.transposed


def output_tensors(output: Any) -> list[Tensor]:
    """The tensors with gradients in what a call returned; a cache of keys and values is no output."""
    if isinstance(output, Mapping):
        output = {name: value for name, value in output.items() if name != "past_key_values"}
    tensors = []
    for leaf in tree_leaves(output):
        if isinstance(leaf, Tensor):
            tensors += [leaf] if leaf.grad_fn is not None else []
        elif dataclasses.is_dataclass(leaf) and not isinstance(leaf, type):
            tensors += output_tensors([getattr(leaf, each.name) for each in dataclasses.fields(leaf)])
    return tensors


MOST_VISITS = 32
"""How often a walk through the graph may come to one of its nodes: the most in 50 architectures is six."""


MOST_FEATURES = 2**20
"""How many places features may lie in: where flattened ones are taken for others each time round, they multiply."""


class _NoEnd(Exception):
    """A walk goes round in the graph, with other features each time."""


class _Visited(list[Any]):
    """The dependencies of a node, which a walk asks for at each of its visits."""

    left = math.inf

    def __iter__(self) -> Iterator[Any]:
        self.left -= 1
        if self.left < 0:
            raise _NoEnd
        return super().__iter__()


class _Bounded(list[Any]):
    """The mappings of a dependency from places to places, which a walk follows at each of its visits."""

    def __iter__(self) -> Iterator[Any]:
        yield from super().__iter__()
        yield _refuse_too_many


def _refuse_too_many(places: Sequence[Any]) -> Sequence[Any]:
    if len(places) > MOST_FEATURES:
        raise _NoEnd
    return places


def follow(module: nn.Module, call: Call, ignored: Sequence[nn.Module]) -> tuple[Any, list[Any], list[nn.Module]]:
    """Follow a run of ``module``.

    Args:
        module: A module that is ready to be followed.
        call: Runs it.
        ignored: Layers whose outputs are known already, so that no group begins there.

    Returns:
        The graph, torch-pruning's groups, and the layers of which it cannot be told where their outputs go.

    Raises:
        ValueError: The module cannot be traced.
    """
    import torch_pruning
    from torch_pruning.dependency.index_mapping import update_index_mapping
    from torch_pruning.dependency.shape_infer import init_shape_information

    lost: list[nn.Module] = []
    opaque: list[Any] = []

    class Graph(torch_pruning.DependencyGraph):
        def build_dependency(self, *arguments: Any, **options: Any) -> Any:
            try:
                super().build_dependency(*arguments, **options)
            except Exception:  # 1.6, in the last of its steps: some splits, as into halves that are joined again
                if not hasattr(self, "module2node"):
                    raise
                init_shape_information(self)  # the step before it, which fails again where that was it
                self._look_for_opaque()
            for node in self.module2node.values():
                node.dependencies = _Visited(node.dependencies)
                for dependency in node.dependencies:
                    dependency.index_mapping = _Bounded(dependency.index_mapping)
            return self

        def _look_for_opaque(self) -> None:
            for key, node in self.module2node.items():
                alone = copy.copy(self)
                alone.module2node = {key: node}
                try:
                    update_index_mapping(alone)
                except Exception:
                    node.type = None  # so that it is not asked again
                    opaque.append(node)

        def get_pruning_group(self, layer: nn.Module, *arguments: Any, **options: Any) -> Any:
            for node in self.module2node.values():  # which are read once for each neighbour, before the walk
                node.dependencies.left = MOST_VISITS + 4 * len(node.dependencies)
            try:
                group = super().get_pruning_group(layer, *arguments, **options)
                if not any(dependency.target in opaque for dependency, _ in group):
                    return group
            except (IndexError, ZeroDivisionError, _NoEnd):  # 1.6: some splits, as into a start and an end
                pass
            lost.append(layer)
            return []

    graph = Graph()
    transposed = {type(child) for child in module.modules() if is_conv1d(child)}
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            tables, several = _look(module, call)
            graph.build_dependency(
                module,
                example_inputs=(),
                # Times one, so that what comes out is never straight from a layer: the graph then sees an output.
                forward_fn=lambda model, _: [leaf * 1 for leaf in output_tensors(call(model))],
                unwrapped_parameters=[(table.weight, 1) for table in tables],
                customized_pruners={kind: _conv1d_pruner(torch_pruning) for kind in transposed},
                ignored_layers=several,  # which 1.6 takes for layers of torch's own, as routers of experts
                verbose=False,
            )
            roots = (_ConvNd, nn.Linear, nn.Embedding, *transposed)
            found = list(graph.get_all_groups(ignored_layers=list(ignored), root_module_types=roots))
    except Exception as error:
        raise ValueError(
            f"{type(module).__name__} cannot be pruned by structure: following one run of it failed with "
            f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else 'no message'}. Prune single "
            'weights instead (method="magnitude"), or give a call that runs it in plain PyTorch'
        ) from error
    return graph, [items for items in found if items], lost


def _look(module: nn.Module, call: Call) -> tuple[list[nn.Embedding], list[nn.Module]]:
    """Tables that are not called, of which ``weight[:length]`` is taken, and layers that give more than a tensor."""
    called: list[nn.Module] = []
    several: list[nn.Module] = []

    def look(layer: nn.Module, _: Any, output: Any) -> None:
        called.append(layer)
        if not isinstance(output, Tensor):
            several.append(layer)

    layers = [child for child in module.modules() if isinstance(child, nn.Embedding | nn.Linear)]
    hooks = [layer.register_forward_hook(look) for layer in layers]
    try:
        call(module)
    finally:
        for hook in hooks:
            hook.remove()
    shared = [parameter for child in module.modules() for parameter in child._parameters.values()]
    tables = [
        table
        for table in layers
        if isinstance(table, nn.Embedding)
        and table not in called
        and sum(table.weight is parameter for parameter in shared) == 1
    ]
    return tables, several


def _conv1d_pruner(torch_pruning: Any) -> Any:
    """Tells torch-pruning's graph that a ``Conv1D`` has outputs and inputs. Nothing is removed through it."""

    class Conv1DPruner(torch_pruning.BasePruningFunc):
        def prune_out_channels(self, layer: nn.Module, indices: Any) -> nn.Module:
            return layer

        def prune_in_channels(self, layer: nn.Module, indices: Any) -> nn.Module:
            return layer

        def get_out_channels(self, layer: Any) -> int:
            return layer.weight.shape[1]

        def get_in_channels(self, layer: Any) -> int:
            return layer.weight.shape[0]

    return Conv1DPruner()
