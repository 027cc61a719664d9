"""The life, within a fit, of what a callback does to weights while they train."""

from abc import abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_warn
from lightning.pytorch.utilities.model_helpers import is_overridden
from torch import nn
from torch.optim.swa_utils import AveragedModel
from typing_extensions import override

from lightning_memopt.callbacks.errors import named_errors
from lightning_memopt.callbacks.fit_end import last_validation, refuse_parts_at_end, validate_if_possible
from lightning_memopt.callbacks.reporting import ReportingCallback
from lightning_memopt.compression.bits import empty_packed
from lightning_memopt.compression.held import Held
from lightning_memopt.compression.selection import Selection, Weight, WeightFilter
from lightning_memopt.models.fake import holds_fakes


def has_its_layers(module: pl.LightningModule) -> bool:
    """Whether ``module`` is complete when callbacks are set up; those of its hooks that may add layers come later."""
    return not is_overridden("configure_model", module) and not is_overridden("setup", module)


def steps_if_fewer(trainer: pl.Trainer, module: pl.LightningModule, than: int) -> int | None:
    """How many optimizer steps training takes, where it is known that these are fewer."""
    steps = trainer.estimated_stepping_batches  # -1 where nobody knows
    return int(steps) if module.automatic_optimization and 0 <= steps < than else None


class ReleasingCallback(Callback):
    """Lets the module go when training ends, whichever way it does."""

    @abstractmethod
    def _release(self) -> None:
        """Leave nothing on the module and its optimizers; called again where training ended badly."""

    @override
    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._release()

    @override
    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        self._release()

    @override
    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        self._release()


class HoldingCallback(ReleasingCallback, ReportingCallback):
    """Has weights keep something, masks or clusters, after every optimizer step.

    It is saved with the callback's state, and lies beside the module, not in its ``state_dict``. So are the metrics
    of the last validation before it, which the report compares with those at the end.

    Args:
        which: Which weights.
        bits: What it takes for each of their elements.
    """

    def __init__(self, which: WeightFilter, bits: int) -> None:
        super().__init__()
        self._which = which
        self._bits = bits
        self._skipped: Mapping[str, str] = {}
        self._names: set[str] = set()
        self._held: Held | None = None
        self._state: dict[str, Any] = {}
        self._shapes: dict[str, torch.Size] = {}
        self._metrics_before: dict[str, float] = {}
        self._predicted: list[torch.Tensor] = []
        self._told = False  # that training is too short

    # What it is

    @property
    @abstractmethod
    def _last_step(self) -> int | None:
        """The step after which it is as it will be; ``None`` where that is when training is over."""

    @abstractmethod
    def _hold(self, weights: Sequence[Weight]) -> Held:
        """What the weights are to keep, as yet nothing."""

    @abstractmethod
    def _advance(self, step: int) -> bool:
        """Make it what it is after ``step`` optimizer steps, and say whether that is something else than before."""

    @abstractmethod
    def _apply_to(self, module: nn.Module, state: Mapping[str, Any]) -> None:
        """Apply a state of it to ``module`` itself, whole and perhaps another than the one that trains."""

    @abstractmethod
    def _say_too_short(self, steps: int) -> str:
        """What becomes of it where training takes so few steps."""

    def _choose(self, module: nn.Module) -> Selection:
        """The weights of ``module`` that are to keep it; raises a :class:`ValueError` where none can."""
        return self._which.select(module)

    @abstractmethod
    def _check_parts(self, trainer: pl.Trainer, weights: Sequence[Weight]) -> None:
        """Raise a :class:`ValueError` where the strategy has taken the weights apart too far."""

    # When it is

    @property
    @override
    def state_key(self) -> str:
        return self._generate_state_key(which=str(self._which))

    @override
    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        if stage == "fit":
            with named_errors(self):
                refuse_parts_at_end(trainer.strategy)
            self._state, self._metrics_before = {}, {}  # of a fit before this one; what is resumed is loaded later
            self._forget_results()
            if has_its_layers(pl_module):
                self._select(pl_module)

    @override
    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        # By now the module has all its layers, and the strategy has taken them apart.
        selection = self._select(pl_module)
        self._skipped = selection.skipped
        self._names = {weight.name for weight in selection.weights}
        if self._last_step is None:
            return
        with named_errors(self):
            self._check_parts(trainer, selection.weights)
        if holds_fakes(pl_module):
            self._predicted = [empty_packed(weight.parameter, self._bits) for weight in selection.weights]
        else:
            self._held = self._hold(selection.weights)

    @override
    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self._held is None:
            return
        with named_errors(self):
            self._held.load_state_dict(self._state)
        self._held.hold(trainer.optimizers, lambda: self._reach(trainer, trainer.global_step + 1))
        self._reach(trainer, trainer.global_step)
        steps = steps_if_fewer(trainer, pl_module, self._last_step or 0)
        self._told = steps is not None
        if steps is not None:
            rank_zero_warn(f"{type(self).__name__}: {self._say_too_short(steps)}")

    def _reach(self, trainer: pl.Trainer, step: int) -> None:
        # Within the step, before any other callback sees or saves the weights; Lightning counts it afterwards.
        assert self._held is not None
        if self._advance(step):
            for average in _averages(trainer):
                self._apply_to(average, self._held.state_dict())
        self._held.apply()

    @override
    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        if batch_idx == 0 and self._held is not None:
            self._held.apply()  # weight averaging may have written the weights between two epochs

    @override
    def on_validation_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        if batch_idx == dataloader_idx == 0 and self._held is not None:
            self._held.apply()  # to an average that some callback has put in for validation

    @override
    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        is_whole = trainer.state.fn == TrainerFn.FITTING and not trainer.sanity_checking
        if is_whole and self._held is not None and not self._held.found:
            self._metrics_before = last_validation(trainer)

    @override
    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self._held is not None:
            self._held.apply()
            if not self._told and trainer.global_step < (self._last_step or 0):  # as with early stopping
                rank_zero_warn(f"{type(self).__name__}: {self._say_too_short(trainer.global_step)}")
        super().on_train_end(trainer, pl_module)

    def _apply_at_end(self, module: nn.Module) -> None:
        """Apply what was held once more, to all that no other callback has made smaller since."""
        shapes = {name: parameter.shape for name, parameter in module.named_parameters(remove_duplicate=False)}
        same = {name: state for name, state in self._state.items() if shapes.get(name) == self._shapes.get(name)}
        self._apply_to(module, same)

    def _compare_metrics(
        self, trainer: pl.Trainer, module: pl.LightningModule
    ) -> tuple[dict[str, float], dict[str, float]]:
        """The metrics that ``module`` had before, without those of callbacks, and those that it has now."""
        after = validate_if_possible(trainer, module)
        return {name: value for name, value in self._metrics_before.items() if name in after}, after

    @override
    def state_dict(self) -> dict[str, Any]:
        held = self._held.state_dict() if self._held else self._state
        return {"held": held, "metrics_before": self._metrics_before}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._state = state_dict["held"]
        self._metrics_before = state_dict.get("metrics_before", {})

    def _select(self, module: nn.Module) -> Selection:
        with named_errors(self):
            return self._choose(module)

    @override
    def _release(self) -> None:
        if self._held is not None:
            self._state = self._held.state_dict()  # a checkpoint may yet be saved
            self._shapes = {name: weight.parameter.shape for name, weight in self._held.weights.items()}
            self._held.remove()
        self._held = None
        self._predicted.clear()


def _averages(trainer: pl.Trainer) -> Iterator[nn.Module]:
    """The running averages of the weights that callbacks keep, and which they save in the place of the weights."""
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        average = getattr(callback, "_average_model", None)  # Lightning's, of all its averaging callbacks (2.6)
        if isinstance(average, nn.Module):
            yield average.module if isinstance(average, AveragedModel) else average
