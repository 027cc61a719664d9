"""Keep the tensors that autograd saves outside the device's memory until the backward asks for them."""

import os
import weakref
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol, cast, get_args

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.autograd.graph import saved_tensors_hooks

from lightning_memopt.memory.report import format_bytes
from lightning_memopt.models.lazy import refuse_uninitialized
from lightning_memopt.techniques.offload_folder import StoreFolder
from lightning_memopt.techniques.offload_storage import (
    CopyStream,
    FakeBytes,
    FileCopy,
    HostCopy,
    OffloadError,
    StoredBytes,
)

Destination = Literal["cpu", "disk"]
MIN_BYTES = 2**20
"""Smaller storages stay: moving them costs more in latency than they hold."""


@contextmanager
def offload_activations(
    module: nn.Module,
    *,
    to: Destination = "cpu",
    min_bytes: int = MIN_BYTES,
    directory: str | Path | None = None,
) -> Iterator["ActivationStore"]:
    """Move what autograd saves in the ``with`` block out of the device's memory, and back in the backward.

    Values, gradients and random state are those of plain training. The block must hold the forward; the backward may
    run inside or after it. Files are deleted as the backward uses them up, and at once if the block raises; those of
    a process that was killed, by the next that offloads to the same folder.

    Args:
        module: The model; its parameters and buffers stay where they are, and views of them.
        to: ``"cpu"``: pinned host memory, for models on a CUDA device. ``"disk"``: files that the backward maps back
            into memory; on a CPU this is what saves memory.
        min_bytes: Storages smaller than this stay.
        directory: For ``"disk"``: an existing folder on a local disk (not a memory file system); the system's
            temporary folder by default.

    Raises:
        ValueError: Bad arguments, or ``to="cpu"`` for a model that is on the CPU already.
        OffloadError: The disk is full, or the folder cannot be written or read any more.

    Example:
        >>> net = nn.Sequential(nn.Linear(8, 8), nn.Tanh())
        >>> with offload_activations(net, to="disk", min_bytes=0) as store:
        ...     loss = net(torch.ones(4, 8)).sum()
        >>> store.stored_bytes > 0
        True
        >>> loss.backward()
    """
    store = ActivationStore(to, min_bytes, directory)
    try:
        with store.hooks(module):
            yield store
    except BaseException:
        store.close()
        raise
    store.close_when_used_up()


class ActivationStore:
    """Where saved tensors wait. See :func:`offload_activations` for the arguments.

    Attributes:
        stored_bytes: Bytes that are waiting in the store now.
    """

    def __init__(
        self, to: Destination = "cpu", min_bytes: int = MIN_BYTES, directory: str | Path | None = None
    ) -> None:
        if to not in get_args(Destination):
            raise ValueError(f"to={to!r} is not a place to offload to; choose 'cpu' or 'disk'")
        if isinstance(min_bytes, bool) or not isinstance(min_bytes, int) or min_bytes < 0:
            raise ValueError(f"min_bytes={min_bytes!r} is not a number of bytes; give a whole number of at least 0")
        if directory is not None and to != "disk":
            raise ValueError(f"directory={str(directory)!r} was given with to={to!r}; use to='disk' or leave it out")
        if directory is not None and not (isinstance(directory, str | Path) and Path(directory).is_dir()):
            raise ValueError(f"directory={str(directory)!r} is not an existing folder; make it first")
        if directory is not None and not os.access(directory, os.W_OK | os.X_OK):
            raise ValueError(f"directory={str(directory)!r} cannot be written; give one that can")
        self.to = to
        self.min_bytes = min_bytes
        self.stored_bytes = 0
        self._parent = directory
        self._folder: StoreFolder | None = None
        self._files = 0
        self._closing = False
        self._streams: dict[torch.device, CopyStream] = {}
        self._stored: weakref.WeakValueDictionary[tuple[Any, ...], StoredBytes] = weakref.WeakValueDictionary()

    def hooks(self, module: nn.Module) -> AbstractContextManager[None]:
        """A context in which what autograd saves goes through the store.

        Raises:
            ValueError: ``to="cpu"`` and no parameter of ``module`` is on a CUDA device, or one has no shape yet.
        """
        refuse_uninitialized(module)
        devices = {parameter.device.type for parameter in module.parameters()}
        if self.to == "cpu" and "cuda" not in devices:
            raise ValueError(
                f"{type(module).__name__} is on the {', '.join(sorted(devices)).upper()}, from where offloading to "
                "'cpu' would save nothing; use to='disk', or train on a CUDA device"
            )
        held = {tensor.untyped_storage()._cdata for tensor in (*module.parameters(), *module.buffers())}

        def pack(tensor: torch.Tensor) -> _Saved:
            return self._save(tensor, held)

        return cast(AbstractContextManager[None], saved_tensors_hooks(pack, _restore))

    def close_when_used_up(self) -> None:
        """Remove the folder once the last graph that needs a file of it is gone."""
        self._closing = True
        self._remove_empty_folder()

    def close(self) -> None:
        """Remove all files now; graphs that still need them cannot run backward."""
        self._closing = True
        if self._folder is not None:
            self._folder.remove()

    def _save(self, tensor: torch.Tensor, held: set[int]) -> "_Saved":
        if not self._takes(tensor) or tensor.untyped_storage()._cdata in held:
            return _Kept(tensor.detach(), tensor._version)
        storage = tensor.untyped_storage()
        # The version tells apart what a storage held before and after a change in place. Chunks by `unsafe_chunk`,
        # the gates of recurrent cells, share a storage and count their changes apart: they differ in their place.
        base = tensor if tensor._base is None else tensor._base
        place = int(base.storage_offset()), tuple(base.size()), base.stride()
        key = storage._cdata, tensor._version, place
        stored = self._stored.get(key)
        if stored is None:
            stored = self._store(tensor)
            self._stored[key] = stored
            self.stored_bytes += storage.nbytes()
            weakref.finalize(stored, self._released, storage.nbytes())
        return _Offloaded(stored, tensor.dtype, int(tensor.storage_offset()), tuple(tensor.size()), tensor.stride())

    def _takes(self, tensor: torch.Tensor) -> bool:
        base = tensor if tensor._base is None else tensor._base
        return (
            type(tensor) in (torch.Tensor, FakeTensor)
            and not isinstance(base, nn.Parameter)
            and (self.to == "disk" or tensor.is_cuda)
            and tensor.layout is torch.strided
            and not tensor.is_conj()
            and not tensor.is_neg()
            and tensor.untyped_storage().nbytes() >= max(self.min_bytes, 1)
        )

    def _store(self, tensor: torch.Tensor) -> StoredBytes:
        if isinstance(tensor, FakeTensor):
            return FakeBytes(tensor)
        if self.to == "disk":
            try:
                return FileCopy(tensor, self._new_file())
            except OSError as error:
                raise OffloadError(
                    error.errno,
                    f"offloading {format_bytes(tensor.untyped_storage().nbytes())} of activations failed "
                    f"({error.strerror}) with {format_bytes(self.stored_bytes)} already stored; give directory= on a "
                    "disk that has room and can be written, or raise min_bytes",
                    str(self._folder.path if self._folder else self._parent or ""),
                ) from error
        return HostCopy(tensor, self._stream(tensor.device))

    def _stream(self, device: torch.device) -> CopyStream:
        if device not in self._streams:
            self._streams[device] = CopyStream(torch.cuda.Stream(device))
        return self._streams[device]

    def _new_file(self) -> Path:
        if self._folder is None:
            self._folder = StoreFolder(self._parent)
        self._files += 1
        return self._folder.path / f"{self._files}.bin"

    def _released(self, count: int) -> None:
        self.stored_bytes -= count
        self._remove_empty_folder()

    def _remove_empty_folder(self) -> None:
        if self._closing and self._folder is not None and self.stored_bytes == 0:
            self._folder.remove()


class _Saved(Protocol):
    """What autograd holds in place of a tensor."""

    def restore(self) -> torch.Tensor: ...


def _restore(saved: _Saved) -> torch.Tensor:
    return saved.restore()


@dataclass
class _Kept:
    """A tensor that stays. Autograd does not check versions behind hooks, so this does."""

    tensor: torch.Tensor
    version: int

    def restore(self) -> torch.Tensor:
        if self.tensor._version != self.version:
            raise RuntimeError(
                "one of the variables needed for gradient computation has been modified by an inplace operation: "
                f"[{self.tensor.dtype} {list(self.tensor.shape)}] is at version {self.tensor._version}; "
                f"expected version {self.version} instead"
            )
        return self.tensor


@dataclass
class _Offloaded:
    """A view of a stored storage."""

    stored: StoredBytes
    dtype: torch.dtype
    offset: int
    size: tuple[int, ...]
    stride: tuple[int, ...]

    def restore(self) -> torch.Tensor:
        return self.stored.view(self.dtype, self.offset, self.size, self.stride)
