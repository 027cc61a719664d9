"""Train with the rounding that quantization will do."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import lightning.pytorch as pl
from lightning.pytorch.utilities import rank_zero_warn
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch.distributed.tensor import DTensor
from typing_extensions import override

from lightning_memopt.callbacks.errors import named_errors
from lightning_memopt.callbacks.fit_time import ReleasingCallback, steps_if_fewer
from lightning_memopt.callbacks.quantize_on_fit_end import QuantizeOnFitEnd
from lightning_memopt.compression.fake_quantize import FakeQuantization
from lightning_memopt.compression.quantize import Scheme
from lightning_memopt.compression.ranges import Range
from lightning_memopt.compression.schedules import check_step
from lightning_memopt.models.selectors import Selector


class QuantizationAwareTraining(ReleasingCallback, QuantizeOnFitEnd):
    """Rounds weights (and inputs, where the scheme does) in each forward from ``start_step`` on, then quantizes.

    The module learns to do with the rounding; parameters, optimizer and checkpoints keep full precision and their
    names. With ``GradualPruning`` zeros stay zeros in 8 bits and in nf4, and with ``ClusterWeights`` clusters stay
    clusters in 8 bits: put those callbacks before this one.

    Args:
        scheme: ``"int8_weight_only"`` (``"int8"``), ``"int8_dynamic"``, ``"int8_static"``, ``"int4_weight_only"`` or
            ``"nf4"``.
        start_step: Optimizer steps before anything is rounded.
        freeze_observers_step: Optimizer steps after which the ranges of ``"int8_static"`` no longer follow the
            inputs; ``None``: they do to the end.
        convert_on_fit_end: Make the quantized copy when ``fit`` ends, as
            :class:`~lightning_memopt.callbacks.quantize_on_fit_end.QuantizeOnFitEnd` does.
        include: Only these weights: names, patterns or classes of modules. ``None``: all.
        exclude: Not these.
        max_metric_drop: See ``QuantizeOnFitEnd``, as for all below.
        monitor: The metric that is judged.
        mode: ``"max"`` where more of it is better.
        export_path: A folder to write the result to.

    Raises:
        MisconfigurationException: Before the first step: a step is out of range, what is not made is to be judged or
            written, the strategy shards the weights, and as for ``QuantizeOnFitEnd``.

    Example:
        >>> trainer = pl.Trainer(callbacks=[QuantizationAwareTraining("int8", start_step=500)], logger=False)
    """

    def __init__(
        self,
        scheme: Scheme = "int8",
        start_step: int = 0,
        freeze_observers_step: int | None = None,
        convert_on_fit_end: bool = True,
        *,
        include: Selector | Sequence[Selector] | None = None,
        exclude: Selector | Sequence[Selector] | None = None,
        max_metric_drop: float | None = None,
        monitor: str | None = None,
        mode: Literal["min", "max"] = "max",
        export_path: str | Path | None = None,
    ) -> None:
        super().__init__(
            scheme, include=include, exclude=exclude, max_metric_drop=max_metric_drop, monitor=monitor, mode=mode,
            export_path=export_path,
        )  # fmt: skip
        with named_errors(self):
            check_step(start_step, "start_step")
            if freeze_observers_step is not None:
                check_step(freeze_observers_step, "freeze_observers_step")
            if freeze_observers_step == 0:
                raise ValueError(
                    "freeze_observers_step=0 freezes ranges before anything is seen. Give 1 or more, or None to "
                    "follow the inputs to the end."
                )
            if not convert_on_fit_end and (export_path is not None or self._gate is not None):
                raise ValueError(
                    "convert_on_fit_end=False leaves nothing to judge by max_metric_drop or to write to export_path. "
                    "Leave these out, or convert."
                )
            if scheme in ("fp16", "bf16"):
                raise ValueError(f"scheme={scheme!r} rounds too little to train for. Use QuantizeOnFitEnd.")
        self.start_step = start_step
        self.freeze_observers_step = freeze_observers_step
        self.convert_on_fit_end = convert_on_fit_end
        self._ranges: dict[str, Range] = {}
        self._fake: FakeQuantization | None = None
        self._told = False  # what the first batch did not reach
        self._told_of_end = False  # that it comes before anything is rounded

    @property
    @override
    def state_key(self) -> str:
        return self._generate_state_key(scheme=self.scheme, which=str(self._which))

    @override
    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        if stage == "fit":
            self._ranges = {}  # of a fit before this one; what is resumed is loaded after this
        super().setup(trainer, pl_module, stage)

    @override
    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        parted = [n for n, p in pl_module.named_parameters() if isinstance(p, DTensor) or p.is_meta]
        if parted:
            raise MisconfigurationException(
                f"QuantizationAwareTraining: {parted[0]!r} is not whole on this rank under "
                f"{type(trainer.strategy).__name__}, and its scale is that of all of it. Use a strategy of replicas, "
                "or QuantizeOnFitEnd, which works under these too."
            )
        super().on_train_start(trainer, pl_module)
        self._told = False
        self._fake = FakeQuantization(pl_module, self.scheme, self._which, self._ranges)
        steps = steps_if_fewer(trainer, pl_module, self.start_step + 1)
        self._told_of_end = steps is not None
        if steps is not None:
            self._warn_of_end(steps)
        self._follow(trainer)

    @override
    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        self._follow(trainer)

    @override
    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if self._told or self._fake is None:
            return
        self._told = True
        if unreached := self._fake.unreached:
            others = f" and {len(unreached) - 1} more" if len(unreached) > 1 else ""
            rank_zero_warn(
                f"QuantizationAwareTraining: {unreached[0]!r}{others} were not rounded in the first batch, which "
                "did not call their layers: what code reads by itself (`F.linear(x, layer.weight)`) trains as it is, "
                "and is rounded when it is converted. Call the layer, or exclude it."
            )

    @override
    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self._fake is not None and not self._told_of_end and trainer.global_step <= self.start_step:
            self._warn_of_end(trainer.global_step)  # as with early stopping
        super().on_train_end(trainer, pl_module)

    def _warn_of_end(self, steps: int) -> None:
        rank_zero_warn(
            f"QuantizationAwareTraining: rounding begins after step {self.start_step}, and training ends after "
            f"{steps}: nothing is trained for it."
        )

    @override
    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self.convert_on_fit_end:
            super().on_fit_end(trainer, pl_module)

    @override
    def state_dict(self) -> dict[str, Any]:
        return {"ranges": dict(self._ranges if self._fake is None else self._fake.ranges)}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._ranges = dict(state_dict["ranges"])

    @property
    @override
    def packs_a_copy(self) -> bool:
        return self.convert_on_fit_end

    @property
    @override
    def _calibrates(self) -> bool:
        return False  # training has seen the ranges

    @override
    def _input_ranges(self, trainer: pl.Trainer, module: pl.LightningModule) -> dict[str, Range]:
        return self._ranges

    def _follow(self, trainer: pl.Trainer) -> None:
        assert self._fake is not None
        step, freeze = trainer.global_step, self.freeze_observers_step
        self._fake.set(enabled=step >= self.start_step, observing=freeze is None or step < freeze)

    @override
    def _release(self) -> None:
        if self._fake is not None:
            self._ranges = dict(self._fake.ranges)
            self._fake.remove()
            self._fake = None
