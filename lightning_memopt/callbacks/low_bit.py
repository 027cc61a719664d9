"""Lightning's side of holding optimizer state in few bits."""

from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.strategies import DDPStrategy, SingleDeviceStrategy
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from typing_extensions import override

from lightning_memopt.techniques.low_bit import LowBitState, hold_low_bit_state
from lightning_memopt.techniques.low_bit_engines import Bits, EngineName, check_engine
from lightning_memopt.techniques.packed_state import put_packed, take_packed

_PACKED_KEY = "low_bit_optimizer_states"


class LowBitOptimizer(Callback):
    """Holds the state of the user's AdamW, Adam or SGD with momentum in 8 or 4 bits instead of 32.

    The optimizer stays the object that ``configure_optimizers`` made, with its groups, hyper-parameters and
    learning-rate schedulers; only what it remembers between steps is packed. Tensors of fewer than 4096
    elements (biases, norms) keep fp32 state. A checkpoint holds the packed state, that of shards unpacked, and
    resumes exactly; one saved without the callback, or with other ``bits`` or another ``engine``, is converted when
    it is loaded. Resumed without the callback, an optimizer whose state was packed begins that of the large tensors
    anew.

    Args:
        bits: 8 (dynamic levels, 0.254 of fp32's bytes), ``"fp8"`` (e4m3, the same bytes) or 4 (0.133).
        engine: What steps the large tensors. ``"memopt"`` is the user's optimizer, piece by piece. ``"bitsandbytes"``
            (8 bits) and ``"torchao"`` (Adam and AdamW) are the kernels of these libraries, which
            ``lightning-memopt[quantize]`` installs, with the hyper-parameters that the optimizer's groups have at
            each step.

    Raises:
        MisconfigurationException: ``bits`` or ``engine`` is unknown or, at the start of ``fit``, the optimizer, its
            options, the device or the strategy is one that it cannot serve, or the library is missing.

    Source:
        Dettmers et al. 2021 (https://arxiv.org/abs/2110.02861) for 8 bits in blocks; Li et al. 2023
        (https://arxiv.org/abs/2309.01507) for 4.

    Example:
        >>> trainer = pl.Trainer(callbacks=[LowBitOptimizer(bits=8)], logger=False)
    """

    def __init__(self, bits: Bits = 8, engine: EngineName = "memopt") -> None:
        try:
            check_engine(engine, bits)
        except ValueError as error:
            raise MisconfigurationException(f"LowBitOptimizer: {error}") from error
        self.bits = bits
        self.engine = engine
        self._handles: list[LowBitState] = []

    @override
    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        if stage == "fit" and not isinstance(trainer.strategy, SingleDeviceStrategy | DDPStrategy):
            raise MisconfigurationException(
                f"LowBitOptimizer cannot work here: how {type(trainer.strategy).__name__} shards and saves optimizer "
                "state is not known. Train on one device, with DDP, or with a strategy of this package."
            )

    @override
    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        # Before a checkpoint is restored, so that its state is packed as it is loaded.
        try:
            for optimizer in trainer.optimizers:
                self._handles.append(hold_low_bit_state(pl_module, optimizer, self.bits, self.engine))
        except (ValueError, ModuleNotFoundError) as error:
            self._release(unpack=False)
            raise MisconfigurationException(f"LowBitOptimizer cannot work here: {error}") from error

    @override
    def state_dict(self) -> dict[str, Any]:
        # So that Lightning says that this callback is missing where such a checkpoint is resumed without it.
        return {"bits": self.bits, "engine": self.engine}

    @override
    def on_save_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        # Apart from the rest: resumed without this callback, which Lightning names in a warning, the optimizer finds
        # no state of these parameters and begins it anew, where packed state would fail in its step.
        taken = [take_packed(state) for state in checkpoint.get("optimizer_states", [])]
        if taken:
            checkpoint["optimizer_states"] = [rest for rest, _ in taken]
            checkpoint[_PACKED_KEY] = [packed for _, packed in taken]

    @override
    def on_load_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        if packed := checkpoint.get(_PACKED_KEY):
            states = zip(checkpoint["optimizer_states"], packed, strict=True)
            checkpoint["optimizer_states"] = [put_packed(*both) for both in states]

    @override
    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        self._release(unpack=False)  # memory may be what ran out

    @override
    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        self._release(unpack=True)

    def _release(self, unpack: bool) -> None:
        for handle in self._handles:
            handle.remove(unpack)
        self._handles.clear()
