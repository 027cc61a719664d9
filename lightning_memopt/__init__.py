"""Memory optimization for any LightningModule: measure it, predict it, and make it fit.

Every public name is listed here and loaded on first use, so that ``import lightning_memopt`` costs next to
nothing beyond ``import lightning.pytorch``.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from lightning_memopt.__about__ import __version__
from lightning_memopt.registration import register_strategies

if TYPE_CHECKING:
    from lightning_memopt.callbacks.accumulation import GradientAccumulation as GradientAccumulation
    from lightning_memopt.callbacks.checkpointing import ActivationCheckpointing as ActivationCheckpointing
    from lightning_memopt.callbacks.chunked_loss import ChunkedLoss as ChunkedLoss
    from lightning_memopt.callbacks.cluster_weights import ClusterWeights as ClusterWeights
    from lightning_memopt.callbacks.gradual_pruning import GradualPruning as GradualPruning
    from lightning_memopt.callbacks.low_bit import LowBitOptimizer as LowBitOptimizer
    from lightning_memopt.callbacks.memory_plan import MemoryPlan as MemoryPlan
    from lightning_memopt.callbacks.micro_batching import MicroBatching as MicroBatching
    from lightning_memopt.callbacks.monitor import MemoryMonitor as MemoryMonitor
    from lightning_memopt.callbacks.offload import ActivationOffload as ActivationOffload
    from lightning_memopt.callbacks.optimizer_in_backward import OptimizerInBackward as OptimizerInBackward
    from lightning_memopt.callbacks.prune_on_fit_end import PruneOnFitEnd as PruneOnFitEnd
    from lightning_memopt.callbacks.quantization_aware import QuantizationAwareTraining as QuantizationAwareTraining
    from lightning_memopt.callbacks.quantize_on_fit_end import QuantizeOnFitEnd as QuantizeOnFitEnd
    from lightning_memopt.checkpoints.atomic import latest_checkpoint as latest_checkpoint
    from lightning_memopt.checkpoints.sharded import full_state_dict as full_state_dict
    from lightning_memopt.compression.clustering import cluster_weights as cluster_weights
    from lightning_memopt.compression.container import load_compressed as load_compressed
    from lightning_memopt.compression.executorch import export_executorch as export_executorch
    from lightning_memopt.compression.masks import find_sparsity as find_sparsity
    from lightning_memopt.compression.masks import prune_weights as prune_weights
    from lightning_memopt.compression.onnx import export_onnx as export_onnx
    from lightning_memopt.compression.report import CompressionReport as CompressionReport
    from lightning_memopt.compression.report import compression_report as compression_report
    from lightning_memopt.compression.schedules import ConstantSparsity as ConstantSparsity
    from lightning_memopt.compression.schedules import PolynomialSparsity as PolynomialSparsity
    from lightning_memopt.compression.sensitivity import scan_sensitivity as scan_sensitivity
    from lightning_memopt.compression.structured import prune_structured as prune_structured
    from lightning_memopt.memory.report import MemoryReport as MemoryReport
    from lightning_memopt.memory.track import track_memory as track_memory
    from lightning_memopt.planning.plan import plan as plan
    from lightning_memopt.planning.predict import measure_memory as measure_memory
    from lightning_memopt.planning.predict import predict_memory as predict_memory
    from lightning_memopt.precision.half import HalfPrecision as HalfPrecision
    from lightning_memopt.precision.mixed import MixedPrecision as MixedPrecision
    from lightning_memopt.strategies.auto import AutoStrategy as AutoStrategy
    from lightning_memopt.strategies.checkpoint_io import AtomicCheckpointIO as AtomicCheckpointIO
    from lightning_memopt.strategies.data_parallel import DataParallelStrategy as DataParallelStrategy
    from lightning_memopt.strategies.hybrid import HybridStrategy as HybridStrategy
    from lightning_memopt.strategies.pipeline import PipelineParallelStrategy as PipelineParallelStrategy
    from lightning_memopt.strategies.tensor import TensorParallelStrategy as TensorParallelStrategy
    from lightning_memopt.techniques.chunked_loss import chunked_cross_entropy as chunked_cross_entropy

_HOME = {
    "ActivationCheckpointing": "callbacks.checkpointing",
    "ActivationOffload": "callbacks.offload",
    "AtomicCheckpointIO": "strategies.checkpoint_io",
    "AutoStrategy": "strategies.auto",
    "ChunkedLoss": "callbacks.chunked_loss",
    "ClusterWeights": "callbacks.cluster_weights",
    "CompressionReport": "compression.report",
    "ConstantSparsity": "compression.schedules",
    "DataParallelStrategy": "strategies.data_parallel",
    "GradientAccumulation": "callbacks.accumulation",
    "GradualPruning": "callbacks.gradual_pruning",
    "HalfPrecision": "precision.half",
    "HybridStrategy": "strategies.hybrid",
    "LowBitOptimizer": "callbacks.low_bit",
    "MemoryMonitor": "callbacks.monitor",
    "MemoryPlan": "callbacks.memory_plan",
    "MemoryReport": "memory.report",
    "MicroBatching": "callbacks.micro_batching",
    "MixedPrecision": "precision.mixed",
    "OptimizerInBackward": "callbacks.optimizer_in_backward",
    "PipelineParallelStrategy": "strategies.pipeline",
    "PolynomialSparsity": "compression.schedules",
    "PruneOnFitEnd": "callbacks.prune_on_fit_end",
    "QuantizationAwareTraining": "callbacks.quantization_aware",
    "QuantizeOnFitEnd": "callbacks.quantize_on_fit_end",
    "TensorParallelStrategy": "strategies.tensor",
    "chunked_cross_entropy": "techniques.chunked_loss",
    "cluster_weights": "compression.clustering",
    "compression_report": "compression.report",
    "export_executorch": "compression.executorch",
    "export_onnx": "compression.onnx",
    "find_sparsity": "compression.masks",
    "full_state_dict": "checkpoints.sharded",
    "latest_checkpoint": "checkpoints.atomic",
    "load_compressed": "compression.container",
    "measure_memory": "planning.predict",
    "plan": "planning.plan",
    "predict_memory": "planning.predict",
    "prune_structured": "compression.structured",
    "prune_weights": "compression.masks",
    "scan_sensitivity": "compression.sensitivity",
    "track_memory": "memory.track",
}

__all__ = ["__version__", *sorted(_HOME)]


register_strategies()


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
