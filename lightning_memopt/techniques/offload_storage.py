"""Where the bytes of an offloaded storage wait: in a file, in pinned host memory, or nowhere (prediction)."""

import errno
import mmap
import weakref
from collections import deque
from pathlib import Path
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import _disable_current_modes

from lightning_memopt.memory.report import format_bytes
from lightning_memopt.models.mapped import mark_as_mapped

UNDER_WAY_BYTES = 256 * 2**20
"""What copies to the host that have not ended may hold on the device: some 10 ms of a PCIe link."""


class OffloadError(OSError):
    """Activations could not be written, usually because the disk is full, or not be read back."""


class StoredBytes:
    """The bytes of one storage, outside the device."""

    def __init__(self, tensor: torch.Tensor) -> None:
        self.device = tensor.device
        self.nbytes = tensor.untyped_storage().nbytes()
        # Keeps the address from being given to another storage while it is a key of the store.
        self._original = StorageWeakRef(tensor.untyped_storage())
        self._restored: StorageWeakRef | None = None

    def view(self, dtype: torch.dtype, offset: int, size: tuple[int, ...], stride: tuple[int, ...]) -> torch.Tensor:
        """A tensor of these bytes back on the device; all views that are in use at once share one storage."""
        with _disable_current_modes():
            return torch.empty(0, dtype=dtype, device=self.device).set_(self._storage(), offset, size, stride)

    def _storage(self) -> torch.UntypedStorage:
        storage: torch.UntypedStorage | None = None
        if self._restored is not None:
            storage = torch.UntypedStorage._new_with_weak_ptr(self._restored.cdata)
        if storage is None:
            storage = self._load()
            self._restored = StorageWeakRef(storage)
        return storage

    def _load(self) -> torch.UntypedStorage:
        raise NotImplementedError


class FileCopy(StoredBytes):
    """A file, deleted with this object.

    It is written with ordinary writes, which report a full disk (under a mapping a full disk kills the process), and
    mapped for reading: the pages are the file's and leave memory when it is needed elsewhere.

    Args:
        tensor: A tensor of the storage.
        path: The file to make.

    Raises:
        OSError: The file cannot be written.
    """

    def __init__(self, tensor: torch.Tensor, path: Path) -> None:
        super().__init__(tensor)
        self._path = path
        weakref.finalize(self, _unlink, path)
        with _disable_current_modes(), torch.no_grad():
            data: Any = _bytes_of(tensor).cpu().numpy()
        try:
            path.write_bytes(memoryview(data))
        except OSError:
            _unlink(path)
            raise

    def _load(self) -> torch.UntypedStorage:
        # Not UntypedStorage.from_file, which reports the mapping to the profiler as if it were allocated memory.
        try:
            with self._path.open("rb") as file:
                mapping = mmap.mmap(file.fileno(), self.nbytes, access=mmap.ACCESS_COPY)
        except (OSError, ValueError) as error:  # ValueError: the file is shorter than it was written
            raise OffloadError(
                getattr(error, "errno", errno.EIO),
                f"{format_bytes(self.nbytes)} of offloaded activations cannot be read back ({error}); give "
                "directory= where nothing else deletes files",
            ) from error
        mapped = torch.frombuffer(mapping, dtype=torch.uint8)
        if self.device.type != "cpu":
            return mapped.to(self.device).untyped_storage()
        mark_as_mapped(mapped.untyped_storage())
        return mapped.untyped_storage()


class CopyStream:
    """The stream on which tensors of one CUDA device are copied to the host.

    The host runs ahead of the device, and what is being copied cannot be given away: unless the host waits for old
    copies, a forward takes from the device all the memory that it offloads.

    Args:
        stream: A stream of its own.
    """

    def __init__(self, stream: torch.cuda.Stream) -> None:
        self.stream = stream
        self._under_way: deque[tuple[torch.cuda.Event, int]] = deque()
        self._bytes = 0

    def add(self, copied: torch.cuda.Event, size_bytes: int) -> None:
        """Note a copy that has begun, and wait for the oldest while those before it hold too much."""
        while self._bytes > UNDER_WAY_BYTES:
            oldest, oldest_bytes = self._under_way.popleft()
            oldest.synchronize()
            self._bytes -= oldest_bytes
        self._under_way.append((copied, size_bytes))
        self._bytes += size_bytes


class HostCopy(StoredBytes):
    """A copy in pinned memory, made on a stream of its own while the forward goes on.

    The copying stream waits for the stream that is current now, which need not be the one of the last call; the
    allocator is told of the copy, so that the memory is not given away before it ends; and the way back runs on the
    stream that uses it, after the copy. Without any one of these the gradients are wrong at times
    (https://github.com/meta-pytorch/torchtune/issues/1867).
    """

    def __init__(self, tensor: torch.Tensor, copies: CopyStream) -> None:
        super().__init__(tensor)
        stream = copies.stream
        with torch.no_grad():
            source = _bytes_of(tensor)
        self._host = torch.empty(self.nbytes, dtype=torch.uint8, pin_memory=True)
        stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(stream):
            self._host.copy_(source, non_blocking=True)
        source.record_stream(stream)
        self._copied = stream.record_event()
        copies.add(self._copied, self.nbytes)

    def _load(self) -> torch.UntypedStorage:
        torch.cuda.current_stream(self.device).wait_event(self._copied)
        return self._host.to(self.device, non_blocking=True).untyped_storage()


class FakeBytes(StoredBytes):
    """A fake storage: prediction sees it leave the device and come back, and nothing is written."""

    def __init__(self, tensor: FakeTensor) -> None:
        super().__init__(tensor)
        self._mode = tensor.fake_mode

    def view(self, dtype: torch.dtype, offset: int, size: tuple[int, ...], stride: tuple[int, ...]) -> torch.Tensor:
        """A fake tensor of its own."""
        with _disable_current_modes(), self._mode:
            tensor = torch.empty_strided(size, stride, dtype=dtype, device=self.device)
        if self.device.type == "cpu":
            mark_as_mapped(tensor.untyped_storage())
        return tensor


def _bytes_of(tensor: torch.Tensor) -> torch.Tensor:
    return torch.empty(0, dtype=torch.uint8, device=tensor.device).set_(tensor.untyped_storage())


def _unlink(path: Path) -> None:
    path.unlink(missing_ok=True)
