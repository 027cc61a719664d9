"""Quantize once, when training is over."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import lightning.pytorch as pl
from lightning.pytorch.utilities import rank_zero_warn
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.model_helpers import is_overridden
from lightning.pytorch.utilities.seed import isolate_rng
from torch import nn
from torch.utils.data import DataLoader
from typing_extensions import override

from lightning_memopt.callbacks.errors import named_errors
from lightning_memopt.callbacks.fit_end import (
    FitEndCallback,
    loaders_of,
    sends_weights_back,
    validate_if_possible,
    validate_now,
)
from lightning_memopt.callbacks.fit_time import has_its_layers
from lightning_memopt.callbacks.reporting import Returned
from lightning_memopt.callbacks.timing import time_example
from lightning_memopt.compression.exported import quantize_exported
from lightning_memopt.compression.exported.graph import require_torchao, require_x86
from lightning_memopt.compression.exported.module import ExportedModule
from lightning_memopt.compression.packed import PackedWeight
from lightning_memopt.compression.quantize import (
    Engine,
    Quantized,
    Scheme,
    check_hardware,
    check_quantizable,
    packing,
    quantize,
)
from lightning_memopt.compression.ranges import Range, observe_inputs
from lightning_memopt.compression.report import compression_report
from lightning_memopt.compression.selection import WeightFilter
from lightning_memopt.compression.sensitivity import scan_sensitivity
from lightning_memopt.compression.sizes import measure_sizes
from lightning_memopt.models.copying import copy_module
from lightning_memopt.models.fake import holds_fakes
from lightning_memopt.models.instance_patch import replaced
from lightning_memopt.models.selectors import Selector
from lightning_memopt.techniques.batches import copied


class QuantizeOnFitEnd(FitEndCallback):
    """Packs the weights in few bits when ``fit`` ends: of a copy, so that the module and its checkpoints stay usable.

    ``trainer.predict(callback.quantized, ...)`` and ``trainer.test(callback.quantized, ...)`` work, and
    :func:`~lightning_memopt.compression.container.load_compressed` reads what is written to ``export_path``.

    Args:
        scheme: ``"int8_weight_only"`` (or ``"int8"``), ``"int8_dynamic"``, ``"int8_static"``, ``"int4_weight_only"``,
            ``"nf4"``, ``"fp8"``, ``"fp16"`` or ``"bf16"``; see
            :func:`~lightning_memopt.compression.quantize.quantize`.
        include: Only these weights: names, patterns or classes of modules. ``None``: all.
        exclude: Not these.
        calibration_batches: Batches of the training data that the ranges of ``"int8_static"`` are taken from; they go
            through ``validation_step``, or ``training_step`` where there is none.
        max_metric_drop: Refuse the result, with a warning, where ``monitor`` becomes worse by more than this.
        back_off: Where the result is refused, leave as few weights as they were as bring it within bounds, which
            takes one validation for each (:func:`~lightning_memopt.compression.sensitivity.scan_sensitivity`).
        monitor: The metric that is judged; ``None``: what ``ModelCheckpoint`` monitors.
        mode: ``"max"`` where more of it is better.
        inplace: Quantize the module itself.
        engine: ``"torchao"`` has torchao hold and multiply the weights of linear maps by ``"int8_weight_only"``,
            ``"int8_dynamic"``, ``"int4_weight_only"`` or ``"fp8"``, for its kernels on GPUs; the report names, as
            ``fallbacks``, the weights that it does not take, which are packed as without it.
            By ``"int8_static"``, on x86 processors, it puts exported graphs (PT2E) in the place of submodules, see
            :func:`~lightning_memopt.compression.exported.quantize_exported`.
        export_path: A folder to write the result to; not under ``fast_dev_run``.

    Attributes:
        quantized: The quantized module; ``None`` before, and where it was refused.
        report: A :class:`~lightning_memopt.compression.report.CompressionReport`, with metrics before and after where
            the module validates, and latencies where it has samples as ``example_input_array``; ``None`` before.
        refusal: Why the result was refused; empty where it was not.

    Raises:
        MisconfigurationException: Before the first step: the scheme is unknown or unsupported here, nothing can be
            quantized, or validation is needed and there is none.

    Example:
        >>> trainer = pl.Trainer(callbacks=[QuantizeOnFitEnd("int8")], logger=False)
    """

    quantized = Returned[pl.LightningModule | None](None)

    def __init__(
        self,
        scheme: Scheme = "int8",
        *,
        include: Selector | Sequence[Selector] | None = None,
        exclude: Selector | Sequence[Selector] | None = None,
        calibration_batches: int = 16,
        max_metric_drop: float | None = None,
        back_off: bool = False,
        monitor: str | None = None,
        mode: Literal["min", "max"] = "max",
        inplace: bool = False,
        engine: Engine = "memopt",
        export_path: str | Path | None = None,
    ) -> None:
        with named_errors(self):
            super().__init__(max_metric_drop, monitor, mode, export_path)
            self._which = WeightFilter(include, exclude, embeddings=True)
            exports = (scheme, engine) == ("int8_static", "torchao")
            packing(scheme, "memopt" if exports else engine)
            if not isinstance(calibration_batches, int) or calibration_batches < 1:
                raise ValueError(f"calibration_batches={calibration_batches!r} sees no data; give 1 or more.")
            if back_off and self._gate is None:
                raise ValueError("back_off=True has nothing to keep to without max_metric_drop; give one.")
            if inplace and self._gate is not None:
                raise ValueError(
                    "inplace=True cannot be refused by max_metric_drop, since the module is rounded by then. Leave "
                    "inplace out."
                )
            if exports:
                _check_export(back_off=back_off, inplace=inplace)
        self._exports = exports
        self.scheme = scheme
        self.engine = engine
        self.calibration_batches = calibration_batches
        self.back_off = back_off
        self.inplace = inplace
        self._tried = False  # whether a training batch has gone through ``validation_step``

    @override
    def _compressed(self, module: pl.LightningModule) -> bool:
        packed = any(isinstance(parameter, PackedWeight) for parameter in module.parameters())
        return packed or any(isinstance(part, ExportedModule) for part in module.modules())

    @override
    def _misfit(self, module: pl.LightningModule, state: Mapping[str, Any]) -> str:
        # Torch would put the biases of the checkpoint into it, and then fail at the first packed weight.
        return "has whole weights, and the module that this trainer had last has packed ones"

    @override
    def _check_fit(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        super()._check_fit(trainer, pl_module)
        self._tried = False
        if self.inplace and sends_weights_back(trainer):
            raise ValueError(
                "the processes that this strategy spawns or forks send weights back to a module of plain weights, "
                "which inplace=True packs. Leave inplace out: `quantized` comes back."
            )
        if self._calibrates and not _validates(pl_module) and not pl_module.automatic_optimization:
            raise ValueError(
                f"{self.scheme!r} is calibrated by validation_step, which {type(pl_module).__name__} has not, and "
                "its training_step steps the optimizers itself. Write a validation_step, or use 'int8_dynamic'."
            )
        if self._exports:
            require_x86(trainer.strategy.root_device)
        else:
            check_hardware(self.scheme, self.engine, trainer.strategy.root_device)
        if has_its_layers(pl_module):
            engine: Engine = "memopt" if self._exports else self.engine
            check_quantizable(pl_module, self.scheme, self._which, engine, trainer.strategy.root_device)

    @override
    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        with named_errors(self):
            self._which.select(pl_module)  # by now the module has all its layers, but perhaps not whole

    @override
    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        if self._tried or not self._calibrates or holds_fakes(pl_module):
            return
        self._tried = True
        if getattr(trainer.strategy, "splits_module", False):
            return  # no rank can run its part by itself
        # The batch that is there, since a loader that is being iterated over may not bear to begin again.
        is_there = {"_on_before_batch_transfer": _as_it_is, "_apply_batch_transfer_handler": _as_it_is}
        try:
            # What a training step counts, it is to count in training alone.
            module = pl_module if _validates(pl_module) else copy_module(pl_module)
            with isolate_rng(), replaced(module, **is_there):
                batches: Any = [copied(batch)]
                one: DataLoader[Any] = DataLoader(batches, batch_size=None, collate_fn=_as_it_is)
                _calibrate(trainer, module, one)
        except Exception as error:
            raise MisconfigurationException(
                f"{type(self).__name__}: {self.scheme!r} is calibrated with training batches, which go through "
                f"{'validation' if _validates(pl_module) else 'training'}_step, and that fails on one "
                f"({type(error).__name__}: {error}). Let it take them too, or use 'int8_dynamic', which needs no "
                "calibration."
            ) from error

    @override
    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if holds_fakes(pl_module):
            return
        metrics = validate_if_possible(trainer, pl_module)
        before = measure_sizes(pl_module, packed=False)
        module = pl_module if self.inplace else copy_module(pl_module)
        ranges: dict[str, Range] = {}
        if self._exports:
            done = self._by_export(trainer, module)
        else:
            ranges = trainer.strategy.broadcast(self._input_ranges(trainer, module))  # each rank saw other batches
            done = quantize(module, self.scheme, self._which, ranges, engine=self.engine)
        skipped, fallbacks = done.skipped, done.fallbacks
        after = validate_if_possible(trainer, module)
        if self._gate is not None:
            self.refusal = self._gate.refusal(metrics, after)
            if self.refusal and self.back_off and (found := self._backed_off(trainer, pl_module, ranges)):
                module, left = found
                after = validate_now(trainer, module)
                self.refusal = self._gate.refusal(metrics, after)
                skipped = skipped | left
                fallbacks = {name: way for name, way in fallbacks.items() if name not in left}
        module.eval()
        if not self.refusal:
            self.quantized = module
        else:
            rank_zero_warn(
                f"{type(self).__name__}: {self.refusal}, so the result is dropped. Try a scheme of more bits."
            )
        self.report = compression_report(
            before, module, skipped=skipped, fallbacks=fallbacks, metrics_before=metrics, metrics_after=after,
            latency=() if self.inplace else time_example(trainer, pl_module, module),
            export_path=self._export(trainer, module),
        )  # fmt: skip

    def _backed_off(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, ranges: Mapping[str, Range]
    ) -> tuple[pl.LightningModule, dict[str, str]] | None:
        """A copy with as many weights packed as the gate bears, and why others are not; ``None``: it bears none."""
        gate, module = self._gate, copy_module(pl_module)
        assert gate is not None and gate.monitor is not None

        def judge(candidate: nn.Module) -> float:
            return validate_now(trainer, candidate)[gate.monitor]  # type: ignore[arg-type, index]

        found = scan_sensitivity(
            module, judge, [self.scheme], include=self._which.include, exclude=self._which.exclude, mode=gate.mode,
            input_ranges=ranges, engine=self.engine,
        )  # fmt: skip
        try:
            recipe = found.mixed(gate.max_drop, judge, module, input_ranges=ranges)
        except ValueError:
            return None
        recipe.apply(module, input_ranges=ranges)
        left = {trial.weight for trial in found.trials}.difference(recipe.quantize[0]["include"])
        return module, dict.fromkeys(left, "left as it was, to meet max_metric_drop")

    @property
    def packs_a_copy(self) -> bool:
        """Whether it makes a quantized copy when training is over."""
        return not self.inplace

    @property
    @override
    def _copies(self) -> bool:
        return self.packs_a_copy

    @property
    def _calibrates(self) -> bool:
        """Whether batches have to go through ``validation_step`` when training is over."""
        return self.scheme == "int8_static"

    def _by_export(self, trainer: pl.Trainer, module: pl.LightningModule) -> Quantized:
        loaders = loaders_of(trainer.fit_loop)

        def check() -> None:
            if not validate_if_possible(trainer, module):
                _calibrate(trainer, module, loaders, 1)

        def calibrate() -> None:
            _calibrate(trainer, module, loaders, self.calibration_batches)

        return quantize_exported(module, calibrate, self._which, check=check, agree=trainer.strategy.broadcast)

    def _input_ranges(self, trainer: pl.Trainer, module: pl.LightningModule) -> dict[str, Range]:
        if not self._calibrates:
            return {}
        with observe_inputs(module) as ranges:
            _calibrate(trainer, module, loaders_of(trainer.fit_loop), self.calibration_batches)
        if not ranges:
            rank_zero_warn(
                f"{type(self).__name__}: no layer saw a batch in calibration, as of data that can be read only once, "
                "so that inputs are measured row by row, as with 'int8_dynamic'. The report names them."
            )
        return ranges


def _check_export(*, back_off: bool, inplace: bool) -> None:
    require_torchao()  # says that it is missing, before hours of training
    if back_off or inplace:
        option = "back_off" if back_off else "inplace"
        raise ValueError(
            f"{option}=True needs modules that stay, and 'int8_static' with engine='torchao' puts exported graphs in "
            "their place. Leave one of the two out."
        )


def _validates(module: pl.LightningModule) -> bool:
    return is_overridden("validation_step", module)


def _calibrate(trainer: pl.Trainer, module: pl.LightningModule, dataloaders: Any, batches: int | None = None) -> None:
    """Run ``module`` on training batches, as in validation."""
    step = {} if _validates(module) else {"validation_step": module.training_step}
    with replaced(module, **step):
        validate_now(trainer, module, dataloaders=dataloaders, batches=batches)


def _as_it_is(batch: Any, *_: Any, **__: Any) -> Any:
    return batch
