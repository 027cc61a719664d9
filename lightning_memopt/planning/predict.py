"""Measure or predict the memory of one optimizer step of any LightningModule."""

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from functools import partial
from typing import Any

import lightning.pytorch as pl
import torch
import torch.distributed as dist
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.strategies import Strategy
from lightning.pytorch.utilities.seed import isolate_rng
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import _disable_current_modes, _get_current_dispatch_mode_stack
from torch.utils.data import DataLoader, Dataset

from lightning_memopt.memory._torch_tracker import StorageTracker
from lightning_memopt.memory.report import MemoryReport
from lightning_memopt.memory.workspace import Need
from lightning_memopt.models.lazy import refuse_uninitialized
from lightning_memopt.planning.apart import StubsApart
from lightning_memopt.planning.build import build_fake
from lightning_memopt.planning.fake import adapt, fake_copy, silence_metrics
from lightning_memopt.planning.known_values import KnownValues
from lightning_memopt.planning.loop import StayInPlace, run_second_step
from lightning_memopt.planning.operators import OperatorLog
from lightning_memopt.planning.step_as_on_gpu import step_as_on_gpu
from lightning_memopt.planning.values import explain_reads_of_values

Module = pl.LightningModule | Callable[[], pl.LightningModule]


def measure_memory(
    module: Module,
    batch: Any,
    *,
    callbacks: Sequence[Callback] = (),
    plugins: Sequence[Any] = (),
    **trainer_options: Any,
) -> MemoryReport:
    """Run one optimizer step of ``module`` for real and report its memory.

    Lightning's own loop runs on a copy: ``training_step``, backward, clipping, accumulation, whatever
    ``configure_optimizers`` returns, or manual optimization. The first step makes the optimizer's state, the second
    is reported. The module, the callbacks and the random number generators stay as they are.

    Args:
        module: A LightningModule, or a function without arguments that makes one.
        batch: One batch as the training loader gives it.
        callbacks: Techniques and other callbacks; copies of them are used.
        plugins: Precision plugins; copies of them are used.
        **trainer_options: Arguments of ``pl.Trainer``, such as ``accumulate_grad_batches`` or ``gradient_clip_val``.
            ``accelerator="gpu"`` measures the GPU's memory; the default is the CPU's.

    Returns:
        The report of the second optimizer step. ``by_category`` of the peak is in bytes.

    Raises:
        ValueError: ``module`` is no LightningModule, cannot be copied, or never steps an optimizer.

    Example:
        >>> from lightning.pytorch.demos.boring_classes import BoringModel
        >>> report = measure_memory(BoringModel(), torch.ones(4, 32), gradient_clip_val=1.0)
        >>> report.by_category["parameters"]
        264
    """
    return measure_step(module, batch, callbacks=callbacks, plugins=plugins, **trainer_options)


def measure_step(
    module: Module,
    batch: Any,
    *,
    callbacks: Sequence[Callback] = (),
    plugins: Sequence[Any] = (),
    log: OperatorLog | None = None,
    timeline_points: int = 1000,
    **trainer_options: Any,
) -> MemoryReport:
    """As :func:`measure_memory`; ``log`` gets the operators of the step, ``timeline_points`` bounds the timeline."""
    _check_options(trainer_options)
    _check_batch(batch, "measure_memory")
    with _isolated():
        own = _own_copy(module, "measure_memory")
        own_batch = _own_batch(batch, "measure_memory", copy.deepcopy)
        options = {"accelerator": "cpu", "devices": 1} | trainer_options | {"plugins": _copies(plugins)}
        with log or nullcontext():
            return run_second_step(
                own, own_batch, _copies(callbacks), options, log=log, timeline_points=timeline_points
            )


def predict_memory(
    module: Module,
    batch: Any,
    *,
    callbacks: Sequence[Callback] = (),
    plugins: Sequence[Any] = (),
    **trainer_options: Any,
) -> MemoryReport:
    """Predict the memory of one optimizer step of ``module`` on a CPU, without allocating it.

    The same loop as in :func:`measure_memory` runs on fake tensors, which have shapes and no bytes, so the model and
    its step may be larger than this machine. What kernels take inside themselves is found by running single small
    ones (:mod:`lightning_memopt.memory.workspace`). ``self.log`` and torchmetrics, which read values, do nothing.

    Args:
        module: A LightningModule, whose parameters may be on the meta device, or a function without arguments that
            makes one, which is called where its parameters take no memory:
            ``predict_memory(lambda: MyModule(config), batch)``.
        batch: One batch as the training loader gives it; tensors on the meta device are welcome.
        callbacks: Techniques and other callbacks; copies of them are used.
        plugins: Precision plugins; copies of them are used.
        **trainer_options: Arguments of ``pl.Trainer``.

    Returns:
        The report of the second optimizer step; ``notes`` say what it leaves out.

    Raises:
        ValueError: As for :func:`measure_memory`, or the step reads the value of a tensor, which fakes do not have;
            the message says by which operator and where.

    Example:
        >>> import lightning_memopt as memopt
        >>> from lightning.pytorch.demos.boring_classes import BoringModel
        >>> plain = predict_memory(BoringModel(), torch.ones(4, 32))
        >>> freed = predict_memory(BoringModel(), torch.ones(4, 32), callbacks=[memopt.OptimizerInBackward()])
        >>> plain.by_category["gradients"], freed.by_category["gradients"]
        (264, 0)
    """
    return predict_step(module, batch, callbacks=callbacks, plugins=plugins, **trainer_options)


def predict_step(
    module: Module,
    batch: Any,
    *,
    callbacks: Sequence[Callback] = (),
    plugins: Sequence[Any] = (),
    log: OperatorLog | None = None,
    timeline_points: int = 1000,
    known_kernels: dict[str, Need] | None = None,
    gpu_granularity: int | None = None,
    rank_strategy: Strategy | None = None,
    prepares: bool = False,
    **trainer_options: Any,
) -> MemoryReport:
    """As :func:`predict_memory`.

    ``log`` gets the operators of the step, ``timeline_points`` bounds the timeline, ``known_kernels`` is what earlier
    predictions found of kernels, ``gpu_granularity`` makes it that of a GPU whose allocator hands out multiples of so
    many bytes, ``rank_strategy`` makes it that of one rank of many
    (:func:`~lightning_memopt.planning.ranks.one_of_many`), and ``prepares`` is as for
    :func:`~lightning_memopt.planning.loop.run_second_step`.
    """
    _check_options(trainer_options)
    if "strategy" in trainer_options or trainer_options.get("accelerator", "cpu") != "cpu":
        raise ValueError(
            "predict_memory() was given a strategy or an accelerator, but it runs on fake tensors of one CPU; leave "
            "them out, or run measure_memory() on the device itself"
        )
    _check_batch(batch, "predict_memory")
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    with _isolated():
        own = _own_copy(module, "predict_memory", partial(fake_copy, mode), lambda make: build_fake(make, mode))
        own_batch = _own_batch(batch, "predict_memory", lambda original: fake_copy(mode, original))
        adapt(own)
        metrics = silence_metrics(own)
        options = trainer_options | {
            "accelerator": "cpu",
            "devices": 1 if rank_strategy is None else dist.get_world_size(),
            "strategy": rank_strategy or StayInPlace(device=torch.device("cpu")),
            "plugins": _copies(plugins),
        }
        instead = "use measure_memory(), or keep that line out of the step (self.log takes the tensor itself)"
        explained = explain_reads_of_values(f"{type(own).__name__} cannot be predicted", instead)
        stepping = nullcontext() if gpu_granularity is None else step_as_on_gpu()
        stubs = StubsApart() if rank_strategy is not None else nullcontext()
        with explained, stepping, mode, log or nullcontext(), KnownValues() as known, stubs:
            report = run_second_step(
                own,
                own_batch,
                _copies(callbacks),
                options,
                log=log,
                timeline_points=timeline_points,
                known_kernels=known_kernels,
                gpu_granularity=gpu_granularity,
                prepares=prepares,
            )
    notes = [f"torchmetrics objects are left out: {', '.join(metrics)}"] if metrics else []
    return replace(report, notes=(*report.notes, *known.notes(), *notes))


def _own_copy(
    module: Module,
    caller: str,
    duplicate: Callable[[pl.LightningModule], pl.LightningModule] = copy.deepcopy,
    build: Callable[[Callable[[], Any]], Any] = lambda make: make(),
) -> pl.LightningModule:
    if not isinstance(module, pl.LightningModule):
        if isinstance(module, torch.nn.Module) or not callable(module):
            raise ValueError(
                f"{caller}() was given a {type(module).__name__}; it needs a LightningModule, whose training_step "
                "and configure_optimizers say what a step is, or a function without arguments that makes one"
            )
        made = build(module)
        if not isinstance(made, pl.LightningModule):
            raise ValueError(
                f"{caller}() was given a function that makes a {type(made).__name__}; it must make a LightningModule"
            )
        _refuse_uninitialized(made, caller)
        return made
    _refuse_uninitialized(module, caller)
    trainer, module._trainer = module._trainer, None  # else the trainer and all that it holds is copied too
    try:
        return duplicate(module)
    except (RuntimeError, TypeError) as error:
        raise ValueError(
            f"{caller}() works on a copy, and {type(module).__name__} cannot be copied ({error}); give a function "
            "without arguments that makes the module"
        ) from error
    finally:
        module._trainer = trainer


def _refuse_uninitialized(module: pl.LightningModule, caller: str) -> None:
    try:
        refuse_uninitialized(module)
    except ValueError as error:
        raise ValueError(f"{caller}() was given a {type(module).__name__}: {error}") from error


def _own_batch(batch: Any, caller: str, duplicate: Callable[[Any], Any]) -> Any:
    try:
        return duplicate(batch)
    except (RuntimeError, TypeError) as error:
        raise ValueError(
            f"{caller}() works on a copy of the batch, and this {type(batch).__name__} cannot be copied ({error}); "
            "give tensors, or dicts, lists, tuples or dataclasses of them"
        ) from error


def _check_batch(batch: Any, caller: str) -> None:
    if batch is None or isinstance(batch, DataLoader | Dataset | pl.LightningDataModule):
        raise ValueError(
            f"{caller}() was given {'None' if batch is None else f'a {type(batch).__name__}'} for a batch; it needs "
            "one batch as training_step gets it, such as next(iter(loader))"
        )


@contextmanager
def _isolated() -> Iterator[None]:
    """Away from the caller's random numbers and dispatch modes.

    Lightning's ``isolate_rng`` restores nothing when the block raises.
    """
    if any(isinstance(mode, StorageTracker) for mode in _get_current_dispatch_mode_stack()):
        raise ValueError(
            "a measurement was asked for inside the block of track_memory(), which would count it as its own; ask "
            "for it before or after the block"
        )
    failure: BaseException | None = None
    with isolate_rng(), _disable_current_modes():
        try:
            yield
        except BaseException as error:
            failure = error
    if failure is not None:
        raise failure


def _copies(items: Sequence[Any]) -> list[Any]:
    return [copy.deepcopy(item) for item in items]


def _check_options(trainer_options: dict[str, Any]) -> None:
    if "max_steps" in trainer_options or "max_epochs" in trainer_options:
        raise ValueError(
            "max_steps and max_epochs were given, but a measurement ends after two optimizer steps; leave them out"
        )
