"""Tell an out-of-memory error from any other error."""

import errno

import torch

_MESSAGES = (
    "out of memory",  # "CUDA error: out of memory", "MPS backend out of memory"; older "CUDA out of memory. Tried..."
    "can't allocate memory",  # c10/core/impl/alloc_cpu.cpp on Linux: "DefaultCPUAllocator: can't allocate memory"
    "not enough memory",  # the same file on Windows and macOS: "DefaultCPUAllocator: not enough memory"
    "cannot allocate memory",  # the text of ENOMEM: "unable to mmap 8 bytes from file <...>: Cannot allocate memory"
    "std::bad_alloc",  # a C++ allocation inside an operator, translated by torch
    "cublas_status_alloc_failed",
    "cusolver_status_alloc_failed",
    "cusparse_status_alloc_failed",
    "cudnn_status_alloc_failed",  # cuDNN 8; version 9 says host or device:
    "cudnn_status_internal_error_host_allocation_failed",
    "cudnn_status_internal_error_device_allocation_failed",
)
_ONEDNN = ("could not create a primitive", "could not execute a primitive")
"""All that oneDNN's kernels on the CPU say without memory. What they cannot do fails as a "primitive descriptor"."""


def is_out_of_memory(error: BaseException) -> bool:
    """Whether ``error`` says that memory ran out, on the host or on an accelerator.

    That is ``torch.OutOfMemoryError``, Python's (and NumPy's) ``MemoryError``, ``OSError`` with ``ENOMEM``, and the
    ``RuntimeError`` of torch's CPU allocator, of shared memory, of oneDNN, of the CUDA runtime and of cuBLAS,
    cuSOLVER, cuSPARSE and cuDNN when they cannot allocate.

    An error raised *from* such an error (``__cause__``; torch.compile wraps errors so) counts as one; an error raised
    while another was handled (``__context__``) does not: it is a failure of its own.

    Args:
        error: What was caught. It is only read.

    Example:
        >>> is_out_of_memory(RuntimeError("DefaultCPUAllocator: can't allocate memory"))
        True
        >>> is_out_of_memory(RuntimeError("mat1 and mat2 shapes cannot be multiplied"))
        False
    """
    seen: set[int] = set()
    link: BaseException | None = error
    while link is not None and id(link) not in seen:
        if _says_out_of_memory(link):
            return True
        seen.add(id(link))
        link = link.__cause__
    return False


def _says_out_of_memory(error: BaseException) -> bool:
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    if isinstance(error, OSError):
        return error.errno == errno.ENOMEM
    if not isinstance(error, RuntimeError):
        return False
    message = str(error).lower()
    return any(words in message for words in _MESSAGES) or message.partition("\n")[0] in _ONEDNN
