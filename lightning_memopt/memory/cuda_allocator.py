"""What CUDA's caching allocator knows beyond the tensors."""

import torch

from lightning_memopt.memory.ledger import Ledger
from lightning_memopt.memory.report import format_bytes


class CudaAllocator:
    """Reads the scratch of each operator from the caching allocator's statistics.

    The statistics are kept on the host at the time of the call, so no synchronization is needed. The peak is reset
    before each operator; the largest of these peaks is what ``torch.cuda.max_memory_allocated`` would have said.

    Args:
        device: The CUDA device.
    """

    def __init__(self, device: torch.device) -> None:
        torch.cuda.init()  # whose statistics cannot be reset before; a trainer may not have touched the device yet
        self._device = device
        self.open()

    def open(self) -> None:
        """Let what is reconciled begin here."""
        torch.cuda.reset_peak_memory_stats(self._device)
        self._before = self._max_allocated = torch.cuda.memory_allocated(self._device)
        self._reserved = 0
        self._is_closed = False

    def close(self) -> None:
        """Let what is reconciled end here, unless it has ended before."""
        if not self._is_closed:
            self._max_allocated = max(self._max_allocated, torch.cuda.max_memory_allocated(self._device))
            self._reserved = torch.cuda.memory_reserved(self._device)
            self._is_closed = True

    def begin(self) -> None:
        """An operator is about to run."""
        if not self._is_closed:
            # Between operators only what bypasses the dispatcher allocates; the peak since the last reset has it.
            self._max_allocated = max(self._max_allocated, torch.cuda.max_memory_allocated(self._device))
        torch.cuda.reset_peak_memory_stats(self._device)
        self._before = torch.cuda.memory_allocated(self._device)

    def peak_bytes(self) -> int:
        """The most bytes in use since :meth:`begin`, less those in use then."""
        return torch.cuda.max_memory_allocated(self._device) - self._before

    def reconcile(self, ledger: Ledger) -> str:
        """A sentence that sets the tracked peak beside the allocator's, once it is closed."""
        allocated, reserved = self._max_allocated, self._reserved
        tracked = ledger.report(source="measured", device="cuda", notes=()).peak_bytes
        return (
            f"the CUDA allocator's peak was {format_bytes(allocated)}, {format_bytes(allocated - tracked)} more than "
            f"was tracked (memory from before the block that was not passed in); it holds {format_bytes(reserved)} "
            f"from the device, {format_bytes(reserved - allocated)} beyond its peak"
        )
