"""Results of a callback that come back from the processes that a launcher spawns or forks."""

import os
import shutil
import tempfile
import weakref
from multiprocessing import parent_process
from pathlib import Path
from typing import Any, Generic, TypeVar, overload
from uuid import uuid4

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.utilities import rank_zero_only
from typing_extensions import override

from lightning_memopt.compression.report import CompressionReport
from lightning_memopt.models.class_names import CLASS, NOTE, class_name

Value = TypeVar("Value")


class Returned(Generic[Value]):
    """An attribute of a :class:`ReportingCallback` that has, after a fit in other processes, what rank 0 set it to.

    Args:
        default: Its value before it is set.
    """

    def __init__(self, default: Value) -> None:
        self._default = default

    def __set_name__(self, owner: type, name: str) -> None:
        self._name = name

    @overload
    def __get__(self, callback: None, owner: type) -> "Returned[Value]": ...
    @overload
    def __get__(self, callback: "ReportingCallback", owner: type) -> Value: ...
    def __get__(self, callback: "ReportingCallback | None", owner: type) -> "Returned[Value] | Value":
        """The value; what another process sent is read once, and its file removed."""
        if callback is None:
            return self
        if callback._mailbox.is_collected_from(self._name):
            vars(callback)[self._name] = callback._mailbox.collect(self._name)
        return vars(callback).get(self._name, self._default)

    def __set__(self, callback: "ReportingCallback", value: Value) -> None:
        vars(callback)[self._name] = value
        callback._mailbox.send(self._name, value)

    def reset(self, callback: "ReportingCallback") -> None:
        """Set it to what it was before it was set."""
        self.__set__(callback, self._default)


class ReportingCallback(Callback):
    """A callback that tells what it did to the module, and in checkpoints of which class that is.

    Attributes:
        report: What it did; ``None`` before.
    """

    report = Returned[CompressionReport | None](None)

    def __init__(self) -> None:
        self._mailbox = _Mailbox()
        # In the process that made it, and in no other: what it started may yet send.
        weakref.finalize(self, _remove, self._mailbox.folder, os.getpid())

    @override
    def on_save_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        checkpoint.setdefault(NOTE, {})[CLASS] = class_name(type(pl_module))  # for `lightning-memopt compress`

    def _forget_results(self) -> None:
        """As a fit starts: what an earlier one left is not to be taken for the result of one that ends early."""
        for name in dir(type(self)):
            attribute = getattr(type(self), name)
            if isinstance(attribute, Returned):
                attribute.reset(self)


class _Mailbox:
    """A folder of this user's alone, where processes that were started leave results for the one that started them.

    Lightning's launchers that spawn or fork bring weights and metrics back from their processes and no attributes of
    callbacks. What they send is pickled, as what Lightning sends is: a module is whatever class the user wrote. So
    nothing is read but what this user's own processes wrote, in a folder that nobody else may write to.
    """

    def __init__(self) -> None:
        self.folder = Path(tempfile.gettempdir(), f"lightning_memopt_{uuid4().hex}")
        self._home = os.getpid()

    def send(self, name: str, value: Any) -> None:
        """Leave ``value``, where this is rank 0 of processes that were started."""
        is_away = parent_process() is not None and os.getpid() != self._home
        if not is_away or getattr(rank_zero_only, "rank", 0) != 0:
            return
        self.folder.mkdir(mode=0o700, exist_ok=True)
        try:
            torch.save(value, self.folder / name)
        except Exception as error:  # whatever a class raises that cannot be pickled
            torch.save(_NotSent(f"{type(error).__name__}: {error}"), self.folder / name)

    def is_collected_from(self, name: str) -> bool:
        """Whether there is a result to collect."""
        return os.getpid() == self._home and (self.folder / name).exists()

    def collect(self, name: str) -> Any:
        """The result, which is gone from the folder then.

        Raises:
            RuntimeError: It could not be sent, or the folder is another user's.
        """
        if hasattr(os, "getuid") and self.folder.stat().st_uid != os.getuid():
            raise RuntimeError(f"`{self.folder}` belongs to another user, so nothing is read from it.")
        value = torch.load(self.folder / name, weights_only=False)
        if isinstance(value, _NotSent):
            raise RuntimeError(
                f"{name!r} stayed in the process that the strategy started, since it cannot be pickled "
                f"({value.reason}). Give the callback an export_path, and read that with load_compressed."
            )
        (self.folder / name).unlink()
        return value


class _NotSent:
    """In the place of a result that cannot be pickled."""

    def __init__(self, reason: str) -> None:
        self.reason = reason


def _remove(folder: Path, home: int) -> None:
    if os.getpid() == home:
        shutil.rmtree(folder, ignore_errors=True)
