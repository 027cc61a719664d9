"""Which errors are out of memory."""

import errno

import numpy as np
import pytest
import torch

from lightning_memopt.models.out_of_memory import is_out_of_memory

TOO_MUCH = 2**60


def caught(action):
    with pytest.raises(BaseException) as info:
        action()
    return info.value


@pytest.mark.parametrize(
    "allocate",
    [
        lambda: torch.empty(TOO_MUCH, dtype=torch.uint8),
        lambda: torch.zeros(1).expand(2**50).clone(),
        lambda: bytearray(TOO_MUCH),
        lambda: np.empty(TOO_MUCH, dtype=np.uint8),
        lambda: torch.UntypedStorage(TOO_MUCH),
    ],
    ids=["empty", "clone", "bytearray", "numpy", "storage"],
)
def test_an_allocation_that_really_fails_is_out_of_memory(allocate):
    assert is_out_of_memory(caught(allocate))


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
        RuntimeError("CUDA out of memory. Tried to allocate 20.00 MiB (GPU 0; 11.17 GiB total capacity)"),
        RuntimeError("CUDA error: out of memory\nCUDA kernel errors might be asynchronously reported"),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
        RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"),
        RuntimeError("cuDNN error: CUDNN_STATUS_INTERNAL_ERROR_DEVICE_ALLOCATION_FAILED"),
        RuntimeError("MPS backend out of memory (MPS allocated: 9.05 GB)"),
        RuntimeError("[enforce fail at alloc_cpu.cpp:75] data. DefaultCPUAllocator: not enough memory: you tried"),
        RuntimeError("unable to mmap 1000000000 bytes from file </torch_1>: Cannot allocate memory (12)"),
        RuntimeError("could not create a primitive"),
        RuntimeError("std::bad_alloc"),
        OSError(errno.ENOMEM, "Cannot allocate memory"),
    ],
    ids=lambda error: str(error)[:40],
)
def test_each_librarys_message_is_recognized(error):
    assert is_out_of_memory(error)


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("mat1 and mat2 shapes cannot be multiplied (2x3 and 4x5)"),
        RuntimeError("CUDA error: device-side assert triggered"),
        RuntimeError("cuDNN error: CUDNN_STATUS_EXECUTION_FAILED"),
        RuntimeError("could not create a primitive descriptor for a convolution forward propagation primitive"),
        ValueError("out of memory"),
        OSError(errno.ENOSPC, "No space left on device"),
        KeyboardInterrupt(),
    ],
    ids=repr,
)
def test_other_errors_are_not_out_of_memory(error):
    assert not is_out_of_memory(error)


def test_an_error_raised_from_an_out_of_memory_error_counts_and_one_raised_while_handling_it_does_not():
    def wrap():
        try:
            raise MemoryError
        except MemoryError as error:
            raise RuntimeError("backend failed") from error

    def stumble():
        try:
            raise MemoryError
        except MemoryError:
            raise KeyError("other")  # noqa: B904

    assert is_out_of_memory(caught(wrap))
    assert not is_out_of_memory(caught(stumble))


def test_errors_that_cause_each_other_in_a_ring_are_read_once():
    first, second = RuntimeError("a"), RuntimeError("b")
    first.__cause__, second.__cause__ = second, first
    assert not is_out_of_memory(first)
