"""Strategy names for ``Trainer(strategy=...)``, registered without importing the strategies or Lightning."""

import importlib.util
import sys
from collections.abc import Sequence
from functools import partial
from importlib import import_module
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

_ZERO = {"zero1": "optimizer", "zero2": "gradients", "zero3": "parameters"}

_DATA = "data_parallel:DataParallelStrategy"

# Of each name, the class below lightning_memopt.strategies, and its arguments.
STRATEGIES: dict[str, tuple[str, dict[str, Any]]] = {
    "memopt_ddp": (_DATA, {"shard": "none"}),
    **{f"memopt_{name}": (_DATA, {"shard": shard}) for name, shard in _ZERO.items()},
    "memopt_pp": ("pipeline:PipelineParallelStrategy", {}),
    **{f"memopt_{name}_offload": (_DATA, {"shard": shard, "offload": True}) for name, shard in _ZERO.items()},
    "memopt_tp": ("tensor:TensorParallelStrategy", {}),
    "memopt_hybrid": ("hybrid:HybridStrategy", {"shard": -1}),  # until other sizes are given
    "memopt_auto": ("auto:AutoStrategy", {}),
}


def register_strategies() -> None:
    """Make the names known to Lightning: now where it is loaded, or else as soon as it is.

    Registering needs Lightning's registry, and loading Lightning takes seconds that a user of the command line or
    of the plain functions need not spend.
    """
    if "lightning.pytorch" in sys.modules:
        _register()
    elif not any(isinstance(finder, _LightningFinder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _LightningFinder())


def _register() -> None:
    from lightning.pytorch.strategies import StrategyRegistry

    for name, (path, options) in STRATEGIES.items():
        if name not in StrategyRegistry:
            StrategyRegistry.register(name, partial(make_strategy, path), description="lightning_memopt", **options)


def make_strategy(path: str, **options: Any) -> Any:
    """Make the strategy at ``path``, one of those in :data:`STRATEGIES`."""
    module, _, name = path.partition(":")
    return getattr(import_module(f"lightning_memopt.strategies.{module}"), name)(**options)


class _LightningFinder(MetaPathFinder):
    """Finds ``lightning.pytorch`` once, by the other finders, and registers when it has run."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != "lightning.pytorch":
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(fullname)
        if spec is not None and spec.loader is not None:
            spec.loader = _ThenRegister(spec.loader)
        return spec


class _ThenRegister(Loader):
    def __init__(self, loader: Loader) -> None:
        self.loader = loader

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self.loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        assert module.__spec__ is not None
        module.__spec__.loader = module.__loader__ = self.loader  # as if nobody had stood in between
        self.loader.exec_module(module)
        _register()
