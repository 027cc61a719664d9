"""Other techniques inside a pipeline, and batches of changing shapes: the numbers of one device."""

import os
from collections.abc import Callable, Sequence
from typing import Any

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch.utils.data import DataLoader

import lightning_memopt as memopt
from lightning_memopt.demo.model import GPT
from lightning_memopt.parallel.mesh import MeshSizes
from tests.distributed import run_on_ranks
from tests.parity import train
from tests.strategies.parity import fit_zoo
from tests.zoo import ZOO

TECHNIQUES: dict[str, Callable[[], dict[str, Any]]] = {
    "checkpointing_full": lambda: {"extra": [memopt.ActivationCheckpointing("full")]},
    "checkpointing_selective": lambda: {"extra": [memopt.ActivationCheckpointing("selective")]},
    "offload": lambda: {"extra": [memopt.ActivationOffload(to="disk", min_bytes=1024)]},
    "accumulation": lambda: {"extra": [memopt.GradientAccumulation(2)], "accumulate_grad_batches": 1},
    "chunked_loss": lambda: {"extra": [memopt.ChunkedLoss()]},
    "low_bit": lambda: {"extra": [memopt.LowBitOptimizer(8)]},
    "low_bit_bitsandbytes": lambda: {"extra": [memopt.LowBitOptimizer(8, "bitsandbytes")]},
    "monitor": lambda: {"extra": [memopt.MemoryMonitor(every_n_steps=2)]},
    "clip_by_value": lambda: {"gradient_clip_algorithm": "value", "gradient_clip_val": 0.01},
    "mixed_bf16": lambda: {"plugins": [memopt.MixedPrecision("bf16")]},
    "mixed_fp16": lambda: {"plugins": [memopt.MixedPrecision("fp16")]},
    "half_bf16": lambda: {"plugins": [memopt.HalfPrecision("bf16")]},
    "lightning_bf16": lambda: {"precision": "bf16-mixed"},
}
TOLERANCE = {"mixed_bf16": 1e-3, "mixed_fp16": 1e-3, "half_bf16": 3e-3, "lightning_bf16": 1e-3}
BATCHES = ((8, 16), (5, 12), (8, 16), (1, 7), (3, 9))
"""Samples and tokens."""


QUICK = ("checkpointing_full", "accumulation", "mixed_fp16")


def _losses(ranks: int, strategy: str, names: Sequence[str]) -> dict[str, np.ndarray]:
    sizes = MeshSizes(pipeline=ranks)
    return {
        name: fit_zoo(ZOO["gpt2"], ranks, 3, sizes=sizes, strategy=strategy, **TECHNIQUES[name]()).losses
        for name in names
    }


@pytest.mark.parametrize(
    "names", [QUICK, pytest.param(tuple(TECHNIQUES), marks=pytest.mark.slow)], ids=["few", "all"]
)
def test_each_technique_gives_the_losses_of_one_device(names):
    plain = run_on_ranks(lambda: _losses(1, "auto", names), 1, deadline_seconds=120)[0]
    for rank in run_on_ranks(lambda: _losses(2, "memopt_pp", names), 2, deadline_seconds=240):
        for name, losses in plain.items():
            np.testing.assert_allclose(rank[name], losses, rtol=TOLERANCE.get(name, 1e-5), err_msg=name)


SIXTEEN_BITS: dict[str, Callable[[], Any]] = {
    "mixed": lambda: memopt.MixedPrecision("bf16"),
    "stochastic": lambda: memopt.HalfPrecision("bf16"),
    "kahan": lambda: memopt.HalfPrecision("bf16", rounding="kahan"),
}


def test_16_bits_need_no_first_layer_on_every_rank():
    def losses(ranks: int, **options: Any) -> dict[str, np.ndarray]:
        return {
            name: fit_zoo(ZOO["mlp"], ranks, 3, sizes=MeshSizes(pipeline=ranks), plugins=[make()], **options).losses
            for name, make in SIXTEEN_BITS.items()
        }

    plain = run_on_ranks(lambda: losses(1), 1)[0]
    for rank in run_on_ranks(lambda: losses(2, strategy="memopt_pp"), 2):
        for name, expected in plain.items():
            np.testing.assert_allclose(rank[name], expected, rtol=1e-2, err_msg=name)


def _varied(ranks: int, **options: Any) -> list[float]:
    generator = torch.Generator().manual_seed(0)
    batches = [torch.randint(2, 64, shape, generator=generator) for shape in BATCHES]
    loader = DataLoader([{"input_ids": ids, "labels": ids.clone()} for ids in batches], batch_size=None)
    return train(
        ZOO["gpt2"].build(), loader, steps=10, devices=ranks, use_distributed_sampler=False, gradient_clip_val=0.5,
        **options,
    ).losses  # fmt: skip


def test_batches_of_any_size_and_length_train_as_on_one_device():
    plain = run_on_ranks(lambda: _varied(1), 1)[0]
    assert len(plain) == 10
    for losses in run_on_ranks(lambda: _varied(2, strategy="memopt_pp"), 2):
        np.testing.assert_allclose(losses, plain, rtol=1e-5)


def _validated(ranks: int, **options: Any) -> dict[str, float]:
    ids = torch.randint(2, 64, (8, 16), generator=torch.Generator().manual_seed(0))
    ends = torch.tensor([16, 3, 2, 2, 9, 5, 4, 13])
    labels = ids.masked_fill(torch.arange(16) >= ends[:, None], -100)
    trainer = pl.Trainer(
        accelerator="cpu", devices=ranks, logger=False, enable_progress_bar=False, use_distributed_sampler=False,
        **options,
    )  # fmt: skip
    loader = DataLoader([{"input_ids": ids, "labels": labels}], batch_size=None)
    validated: dict[str, float] = trainer.validate(ZOO["gpt2"].build(), loader, verbose=False)[0]
    return validated


def test_a_mean_over_tokens_is_validated_as_on_one_device():
    plain = run_on_ranks(lambda: _validated(1), 1)[0]
    strategy = {"normalize": "tokens", "count": lambda batch: (batch["labels"][:, 1:] != -100).sum()}
    for found in run_on_ranks(lambda: _validated(2, strategy=memopt.PipelineParallelStrategy(**strategy)), 2):
        assert found == pytest.approx(plain, rel=1e-5)


def test_batches_that_are_validated_and_cannot_be_counted_weigh_by_samples_and_that_is_said():
    def validated() -> dict[str, float]:
        strategy = memopt.PipelineParallelStrategy(normalize="tokens", mask_key="mask")
        if int(os.environ["LOCAL_RANK"]):
            return _validated(2, strategy=strategy)
        with pytest.warns(UserWarning, match=r"micro-batches of `validation_step` weigh by samples.*mask_key='mask'"):
            return _validated(2, strategy=strategy)

    by_samples = run_on_ranks(lambda: _validated(2, strategy="memopt_pp"), 2)[0]
    assert run_on_ranks(validated, 2) == [by_samples] * 2


def _demo(ranks: int, **options: Any) -> list[float]:
    torch.manual_seed(0)
    module = GPT(layers=3, width=32, heads=2, context=16)
    windows = torch.randint(0, 256, (32, 17), generator=torch.Generator().manual_seed(0))
    loader = DataLoader(windows, batch_size=8)
    return train(module, loader, steps=6, devices=ranks, use_distributed_sampler=False, **options).losses


def test_a_parameter_that_is_read_without_a_call_and_a_tied_head_train_as_on_one_device():
    plain = run_on_ranks(lambda: _demo(1), 1)[0]
    for losses in run_on_ranks(lambda: _demo(2, strategy="memopt_pp"), 2):
        np.testing.assert_allclose(losses, plain, rtol=1e-5)


def test_dropout_trains_and_all_ranks_see_one_loss():
    def fit() -> list[float]:
        entry = ZOO["gpt2"]
        return train(
            entry.build(dropout=0.2), entry.loader(batches=1), steps=12, devices=2, strategy="memopt_pp",
            use_distributed_sampler=False,
        ).losses  # fmt: skip

    first, second = run_on_ranks(fit, 2)
    assert first == second
    assert first[-1] < first[0]


class _Nan(torch.nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * float("nan")


def test_a_loss_that_is_not_a_number_is_one_on_every_rank():
    def fit() -> list[float]:
        entry = ZOO["mlp"]
        module = entry.build()
        module.net.append(_Nan())
        return train(module, entry.loader(1), steps=1, devices=2, strategy="memopt_pp",
                     use_distributed_sampler=False).losses  # fmt: skip

    assert all(np.isnan(losses).all() for losses in run_on_ranks(fit, 2))


@pytest.mark.slow
def test_t5_recomputes_inside_stages_of_its_encoder_and_decoder():
    def fit(ranks: int, strategy: str) -> np.ndarray:
        extra = [memopt.ActivationCheckpointing("full")]
        return fit_zoo(ZOO["t5"], ranks, 3, sizes=MeshSizes(pipeline=ranks), strategy=strategy, extra=extra).losses

    plain = run_on_ranks(lambda: fit(1, "auto"), 1)[0]
    for losses in run_on_ranks(lambda: fit(2, "memopt_pp"), 2):
        np.testing.assert_allclose(losses, plain, rtol=1e-5)


def test_ranks_with_different_batches_are_refused():
    def fit() -> None:
        seed = int(os.environ["LOCAL_RANK"])
        with pytest.raises(MisconfigurationException, match="the ranks have different batches"):
            train(ZOO["mlp"].build(), ZOO["mlp"].loader(1, seed=seed), steps=1, devices=2, strategy="memopt_pp",
                  use_distributed_sampler=False)  # fmt: skip

    run_on_ranks(fit, 2)
