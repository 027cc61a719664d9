import pytest
import torch

from lightning_memopt.memory.cuda_allocator import CudaAllocator
from lightning_memopt.memory.ledger import Ledger

MIB = 2**20


class _Statistics:
    """The part of ``torch.cuda`` that is asked, with an allocator that only counts."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.in_use = self.highest = 0
        self.is_initialized = False
        for name in (
            "init",
            "memory_allocated",
            "max_memory_allocated",
            "memory_reserved",
            "reset_peak_memory_stats",
        ):
            monkeypatch.setattr(torch.cuda, name, getattr(self, name))

    def init(self) -> None:
        self.is_initialized = True

    def memory_allocated(self, device: torch.device) -> int:
        return self.in_use

    def max_memory_allocated(self, device: torch.device) -> int:
        return self.highest

    def memory_reserved(self, device: torch.device) -> int:
        return 64 * MIB

    def reset_peak_memory_stats(self, device: torch.device) -> None:
        if not self.is_initialized:
            raise RuntimeError("Invalid device argument 0: did you call init?")
        self.highest = self.in_use

    def hold(self, size_bytes: int) -> None:
        self.in_use += size_bytes
        self.highest = max(self.highest, self.in_use)


def test_a_peak_is_reconciled_from_where_the_report_begins_to_where_it_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    statistics = _Statistics(monkeypatch)
    allocator = CudaAllocator(torch.device("cuda"))
    statistics.hold(50 * MIB)  # the first step, which is not reported
    statistics.hold(-50 * MIB)
    allocator.open()
    allocator.begin()
    statistics.hold(20 * MIB)
    statistics.hold(-12 * MIB)
    assert allocator.peak_bytes() == 20 * MIB
    allocator.begin()
    statistics.hold(2 * MIB)
    assert allocator.peak_bytes() == 2 * MIB
    allocator.close()
    allocator.begin()
    statistics.hold(40 * MIB)  # the teardown
    allocator.close()
    sentence = allocator.reconcile(Ledger())
    assert sentence.startswith("the CUDA allocator's peak was 20.0 MiB")
    assert "holds 64.0 MiB from the device, 44.0 MiB beyond its peak" in sentence
