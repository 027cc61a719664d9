"""Pipeline parallelism for any LightningModule."""

from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any, Literal, TypeVar

import lightning.pytorch as pl
import torch
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn
from torch.optim import Optimizer
from torchmetrics import Metric
from typing_extensions import override

from lightning_memopt.models.instance_patch import replaced
from lightning_memopt.parallel.mesh import MeshSizes
from lightning_memopt.parallel.pipeline import torch_stage
from lightning_memopt.parallel.pipeline.pipeline import Pipeline
from lightning_memopt.parallel.pipeline.probe import run_silently
from lightning_memopt.parallel.pipeline.schedules import SCHEDULES, Schedule, number_of_micro_batches
from lightning_memopt.parallel.pipeline.splitting import Split
from lightning_memopt.parallel.pipeline.stubs import shadow_of
from lightning_memopt.parallel.refusal import StepRefused, StepWaits
from lightning_memopt.strategies.base import MemoptStrategy
from lightning_memopt.strategies.pipeline_checks import (
    check_optimizers,
    check_trainer,
    warn_of_batch_norm,
    warn_of_power_iteration,
    warn_of_unseen,
)
from lightning_memopt.strategies.pipeline_steps import PipelineSteps, refuse_to_cut
from lightning_memopt.strategies.sample_batch import sample_batch
from lightning_memopt.techniques.batches import CannotCut, batch_size, copied, split_evenly
from lightning_memopt.techniques.counting import Count, counter

Value = TypeVar("Value")


class PipelineParallelStrategy(MemoptStrategy):
    """Each rank holds a part of the layers, and batches pass through them in micro-batches.

    The module is not changed and not cut by hand: each rank runs its own ``training_step`` on each micro-batch, on
    the layers that it holds. All ranks have the same batches, and end each step with the same loss, logged values and
    outputs.

    Args:
        schedule: ``"1f1b"`` keeps the activations of as many micro-batches as there are stages; ``"gpipe"`` of all;
            ``"interleaved_1f1b"`` and ``"zbv"`` put two stages on a rank, which idles less and communicates more.
        microbatches: How many a batch is split into. ``"auto"``: four for each rank, or as many as there are samples.
        split: ``"auto"`` balances the stages by their cost, counted in a run without data; ``"measured"`` by the time
            that their operators take on rank 0's device; or the names of the modules that stages after the first
            begin with; or a number of stages.
        normalize: What the loss is a mean over: ``"samples"``, or ``"tokens"`` as for ``GradientAccumulation``.
        count: With ``normalize="tokens"``: a function that counts a batch's tokens, as a number or a tensor.
        mask_key: With ``normalize="tokens"``, instead of ``count``: the mask, or the labels (-100 is ignored).
        **options: What Lightning's ``DDPStrategy`` takes: ``cluster_environment``, ``checkpoint_io``,
            ``precision_plugin``, ``process_group_backend``, ``timeout``, ``start_method``.

    Raises:
        MisconfigurationException: Bad arguments; or, before the first step, a module or trainer that cannot be
            pipelined.

    Source:
        Narayanan et al. 2021 (https://arxiv.org/abs/2104.04473) for the first three schedules.

    Example:
        >>> strategy = PipelineParallelStrategy(schedule="1f1b", microbatches=8)
        >>> trainer = pl.Trainer(strategy=strategy, accelerator="cpu", devices=2)
    """

    def __init__(
        self,
        schedule: Schedule = "1f1b",
        microbatches: int | Literal["auto"] = "auto",
        split: Split = "auto",
        *,
        normalize: Literal["samples", "tokens"] = "samples",
        count: Count | None = None,
        mask_key: str | int | None = None,
        **options: Any,
    ) -> None:
        name = type(self).__name__
        if schedule not in SCHEDULES:
            raise MisconfigurationException(
                f"{name}(schedule={schedule!r}) is not known; choose one of {', '.join(map(repr, SCHEDULES))}."
            )
        if schedule == "zbv" and not torch_stage.CAN_SPLIT_BACKWARD:
            raise MisconfigurationException(
                f"{name}(schedule='zbv') runs backwards in two parts, which torch {torch.__version__} cannot where "
                "stages exchange tensors without gradients; install torch 2.13, or give schedule='interleaved_1f1b'."
            )
        if microbatches != "auto" and (
            not isinstance(microbatches, int) or isinstance(microbatches, bool) or microbatches < 1
        ):
            raise MisconfigurationException(
                f"{name}(microbatches={microbatches!r}) is no number of micro-batches; give 1 or more, or 'auto'."
            )
        is_names = isinstance(split, list | tuple) and split and all(isinstance(part, str) for part in split)
        is_number = isinstance(split, int) and not isinstance(split, bool) and split > 0
        if split not in ("auto", "measured") and not is_names and not is_number:
            raise MisconfigurationException(
                f"{name}(split={split!r}) is no split; give 'auto', 'measured', a number of stages, or a list of the "
                "names of the modules that stages after the first begin with."
            )
        if normalize not in ("samples", "tokens"):
            raise MisconfigurationException(
                f"{name}(normalize={normalize!r}) is unknown; micro-batches weigh by 'samples' or by 'tokens'."
            )
        try:
            self.count = counter(normalize, count, mask_key)
        except ValueError as error:
            raise MisconfigurationException(f"{name}: {error}") from error
        super().__init__(**options)
        self.schedule: Schedule = schedule
        self.microbatches: int | Literal["auto"] = microbatches
        self.split: Split = split
        self.pipeline: Pipeline | None = None
        self._steps: PipelineSteps | None = None
        self._is_on_shadow = False

    @property
    @override
    def sizes(self) -> MeshSizes:
        return MeshSizes(pipeline=self.world_size)

    @property
    @override
    def splits_module(self) -> bool:
        return True

    @property
    @override
    def why_not_in_backward(self) -> str | None:
        if self.sizes.pipeline == 1:
            return super().why_not_in_backward
        return (
            "adds up the gradients of its micro-batches, which are complete only after the last. Use LowBitOptimizer "
            "to save optimizer memory, or `memopt_zero3`."
        )

    @override
    def counts(self, parameter: nn.Parameter) -> bool:
        return self.pipeline is None or self.pipeline.counts(parameter)

    # Setting up and taking down

    @override
    def setup(self, trainer: pl.Trainer) -> None:
        if trainer.state.fn == TrainerFn.FITTING and self.sizes.pipeline > 1:
            check_trainer(type(self).__name__, trainer)
            warn_of_batch_norm(trainer.lightning_module)
            if self.microbatches != 1:
                warn_of_power_iteration(trainer.lightning_module)
        super().setup(trainer)

    @override
    def parallelize(self) -> None:
        module = self.lightning_module
        assert module is not None
        sample = sample_batch(module.trainer, self._undo_patches) if self.sizes.pipeline > 1 else None
        if sample is not None:
            name, batch = sample
            try:
                with self.refusals():
                    self.pipeline = self._cut(name, batch)
            except MisconfigurationException as refusal:
                self._let_own_error_out(name, batch, refusal)
                raise
            warn_of_unseen(self.pipeline)
            self._steps = PipelineSteps(self, self.pipeline)
            self._undo_patches.enter_context(self._steps.metrics())
            # Lightning's summary would run it through a module of which each rank holds a part.
            self._undo_patches.enter_context(replaced(module, _example_input_array=None))
            if module.trainer.state.fn == TrainerFn.FITTING:
                self._undo_patches.enter_context(self._steps.in_loop())
        super().parallelize()

    @override
    def setup_optimizers(self, trainer: pl.Trainer) -> None:
        super().setup_optimizers(trainer)
        if self.pipeline is not None:
            with self.refusals():
                check_optimizers(self.optimizers)
            for optimizer in self.optimizers:  # Adagrad makes its state at once, of what other stages hold too
                for parameter in [p for p in optimizer.state if p.is_meta]:
                    del optimizer.state[parameter]

    def _cut(self, name: str, batch: Any) -> Pipeline:
        mesh = self.mesh.pipeline
        micro_batch = batch
        if self.microbatches != 1:
            try:
                samples = batch_size(batch)
                count = number_of_micro_batches(self.microbatches, self.schedule, mesh.size(), samples, is_first=True)
                micro_batch = split_evenly(batch, count)[0]
            except CannotCut as error:
                raise refuse_to_cut(error) from error
        assert self.lightning_module is not None
        return Pipeline(
            self.lightning_module,
            partial(self.call_on, name, (0,)),
            micro_batch,
            (name, ()),
            group=mesh.get_group(),
            pipelines=self.mesh.pipelines,
            device=self.root_device,
            schedule=self.schedule,
            split=self.split,
            prepare=_silence,
            around=self._around_backward,
        )

    def _let_own_error_out(self, name: str, batch: Any, refusal: MisconfigurationException) -> None:
        """Where the step failed without values by an error that it raises with values too, that says more."""
        own = refusal.__cause__.__cause__ if refusal.__cause__ is not None else None
        module = self.lightning_module
        assert module is not None
        if own is None or isinstance(own, RuntimeError | StepRefused):  # as torch raises where values are missing
            return
        twin, _ = shadow_of(module, {buffer: buffer.clone() for buffer in module.buffers()})
        _silence(twin)
        try:
            run_silently(twin, torch.no_grad()(partial(self.call_on, name, (0,), twin, batch)))()
        except Exception as error:
            if type(error) is type(own):
                raise

    def _around_backward(self, is_last: bool) -> AbstractContextManager[Any]:
        self._enter("backward", self._batch)
        return nullcontext() if is_last else self.block_backward_sync()

    @override
    def undo(self, gather: bool) -> None:
        super().undo(gather)
        if self.pipeline is not None:
            self.pipeline.undo(gather)
        self.pipeline = self._steps = None

    @override
    def lightning_module_state_dict(self) -> dict[str, Any]:
        self._refuse_to_save_after_failure()  # others may be anywhere then, and sharing would wait for them
        if self.pipeline is not None:
            self.pipeline.share_buffers()
        return super().lightning_module_state_dict()

    # Steps

    def call_on(self, name: str, rest: tuple[Any, ...], module: nn.Module, batch: Any) -> Any:
        """Run a step on the shadow of the module, with the precision of the trainer."""
        self._is_on_shadow = True
        try:
            with self.precision_plugin.forward_context():
                return getattr(module, name)(copied(batch), *rest)  # the step may change it, and will run again
        finally:
            self._is_on_shadow = False

    @override
    def run_step(self, name: str, *args: Any, **kwargs: Any) -> Any:
        if self._steps is None or name == "training_step":
            return super().run_step(name, *args, **kwargs)
        batch, *rest = (*args, *kwargs.values())
        with self.refused_steps():
            return self._steps.evaluate(name, batch, tuple(rest), partial(super().run_step, name))

    @override
    def barrier(self, name: str | None = None) -> None:
        self._refuse_in_step("barrier")
        super().barrier(name)

    @override
    def broadcast(self, obj: Value, src: int = 0) -> Value:
        self._refuse_in_step("broadcast")
        return super().broadcast(obj, src)

    @override
    def reduce_boolean_decision(self, decision: bool, all: bool = True) -> bool:
        self._refuse_in_step("reduce_boolean_decision")
        return super().reduce_boolean_decision(decision, all)

    def _refuse_in_step(self, name: str) -> None:
        if self._is_on_shadow or (self.pipeline is not None and self.pipeline.is_running):
            raise StepWaits(
                f"the step calls `strategy.{name}`, in which all ranks wait for each other, and only the last stage "
                "runs a step to its end; call it in a hook, such as `on_train_batch_end`."
            )

    @override
    def backward(self, closure_loss: Tensor, optimizer: Optimizer | None, *args: Any, **kwargs: Any) -> Tensor:
        assert self.lightning_module is not None
        if self._steps is None or not self._steps.captures:
            return super().backward(closure_loss, optimizer, *args, **kwargs)
        self.pre_backward(closure_loss)
        scaled = self.precision_plugin.pre_backward(closure_loss, self.lightning_module)
        self._steps.capture(scaled)
        return scaled


def _silence(shadow: nn.Module) -> None:
    """Let what a step logs and measures in a run without data have no effect."""
    for submodule in shadow.modules():
        if isinstance(submodule, Metric):
            vars(submodule).update(forward=_zero, update=_zero, compute=_zero)
    vars(shadow).update(log=_zero, log_dict=_zero)


def _zero(*_: Any, **__: Any) -> Tensor:
    return torch.zeros(())
