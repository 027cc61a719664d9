"""What only a CUDA device can show; skipped elsewhere."""

import lightning.pytorch as pl
import pytest
import torch

import lightning_memopt as memopt
from tests.parity import assert_parity, train
from tests.zoo import ZOO

REPLAYED = {
    "full": lambda: [memopt.ActivationCheckpointing("full")],
    "selective": lambda: [memopt.ActivationCheckpointing("selective")],
    "budget": lambda: [memopt.ActivationCheckpointing("budget", budget=0.5)],
    "offload": lambda: [memopt.ActivationOffload("cpu", min_bytes=0)],
    "offload and full": lambda: [
        memopt.ActivationOffload("cpu", min_bytes=0),
        memopt.ActivationCheckpointing("full"),
    ],
    "optimizer in backward": lambda: [memopt.OptimizerInBackward()],
    "monitor": lambda: [memopt.MemoryMonitor(every_n_steps=5)],
}
"""Masks of dropout are the same as in plain training."""

REGROUPED = {
    "micro-batches": lambda: [memopt.MicroBatching(3)],
    "micro-batches auto": lambda: [memopt.MicroBatching("auto")],
    "chunked loss": lambda: [memopt.ChunkedLoss()],
}
"""Sums are in another order."""

TOLERANCE = {"rtol": 1e-3, "atol": 1e-4}
"""Kernels on a GPU add in an order of their own, embeddings' in a different one each time."""


@pytest.mark.gpu
@pytest.mark.parametrize("name", [*REPLAYED, *REGROUPED])
def test_a_technique_trains_on_a_gpu_as_plain_lightning_does_there(cuda, name, tmp_path):
    make = REPLAYED.get(name) or REGROUPED[name]
    clipping = {"gradient_clip_val": 0.0} if name == "optimizer in backward" else {}
    options = {"accelerator": "gpu", "default_root_dir": tmp_path} | clipping
    assert_parity(ZOO["gpt2"], make(), dropout=0.1 if name in REPLAYED else 0.0, **options, **TOLERANCE)


@pytest.mark.gpu
@pytest.mark.parametrize("bits", [8, 4, "fp8"])
def test_low_bit_state_trains_on_a_gpu_as_on_the_cpu(cuda, bits):
    runs = [
        train(ZOO["gpt2"].build(), ZOO["gpt2"].loader(), callbacks=[memopt.LowBitOptimizer(bits)], accelerator=kind)
        for kind in ("cpu", "gpu")
    ]
    assert runs[0].losses == pytest.approx(runs[1].losses, rel=1e-2)


@pytest.mark.gpu
@pytest.mark.parametrize(
    "make",
    [lambda: memopt.MixedPrecision("fp16"), lambda: memopt.MixedPrecision("bf16"), lambda: memopt.HalfPrecision()],
    ids=["fp16", "bf16", "half"],
)
def test_a_precision_plugin_trains_on_a_gpu_about_as_float32_does(cuda, make):
    plain, other = (
        train(ZOO["gpt2"].build(), ZOO["gpt2"].loader(), accelerator="gpu", plugins=plugins)
        for plugins in ([], [make()])
    )
    assert plain.losses == pytest.approx(other.losses, rel=0.05)


class _Wide(pl.LightningModule):
    """Saves 16 activations as large as the batch."""

    def __init__(self) -> None:
        super().__init__()
        self.scales = torch.nn.Parameter(torch.linspace(0.5, 1.5, 16))

    def training_step(self, batch: torch.Tensor, batch_idx: int) -> torch.Tensor:
        for scale in self.scales:
            batch = torch.tanh(batch * scale)
        return batch.square().mean()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=0.01)


@pytest.mark.gpu
def test_a_batch_that_a_gpu_has_no_memory_for_is_halved_until_it_fits_and_the_update_is_the_same(cuda):
    loader = torch.utils.data.DataLoader(torch.randn(64, 2**18), batch_size=64)  # 64 MiB, and 32 times that is saved
    expected = train(_Wide(), loader, steps=2, accelerator="gpu", callbacks=[memopt.MicroBatching(8)])
    torch.cuda.empty_cache()
    limit = torch.cuda.memory_reserved(cuda) + 2**30
    torch.cuda.set_per_process_memory_fraction(limit / torch.cuda.get_device_properties(cuda).total_memory)
    try:
        micro = memopt.MicroBatching("auto")
        run = train(_Wide(), loader, steps=2, accelerator="gpu", callbacks=[micro])
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    assert micro.size is not None
    torch.testing.assert_close(run.weights["scales"], expected.weights["scales"], rtol=1e-4, atol=1e-6)
