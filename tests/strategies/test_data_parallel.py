"""What a user sees of the data parallel strategies: arguments, warnings, refusals, and the module left as it was."""

import os
import re
import warnings
from typing import Any

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.plugins.precision import MixedPrecision
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from torch.distributed.tensor import DTensor
from torch.utils.data import DataLoader, IterableDataset
from torch.utils.data.distributed import DistributedSampler

from lightning_memopt import DataParallelStrategy
from tests.distributed import run_on_ranks
from tests.parity import train
from tests.strategies.parity import STRATEGIES, Probe, fit_zoo
from tests.zoo import ZOO

SHARDED = [name for name in STRATEGIES if name != "memopt_ddp"]
MLP = ZOO["mlp"]


def _fit(name: str, strategy: Any, *callbacks: Callback, steps: int = 2, ranks: int = 2, **options: Any) -> Any:
    entry = ZOO[name]
    loader = entry.loader(batches=steps * ranks * options.get("accumulate_grad_batches", 1), batch_size=4)
    return train(entry.build(), loader, steps=steps, devices=ranks, strategy=strategy, callbacks=callbacks, **options)


def _messages(function: Any) -> list[str]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        function()
    return [str(warning.message) for warning in caught]


def _error(function: Any) -> str:
    try:
        function()
    except MisconfigurationException as error:
        return str(error)
    return "no error"


# The module


def _anatomy(module: nn.Module) -> list[Any]:
    return [
        (name, type(submodule).__name__, sorted(vars(submodule)), len(submodule._forward_hooks),
         len(submodule._forward_pre_hooks), len(submodule._state_dict_pre_hooks),
         len(submodule._load_state_dict_pre_hooks), [type(p).__name__ for p in submodule.parameters(recurse=False)])
        for name, submodule in module.named_modules()
    ]  # fmt: skip


@pytest.mark.parametrize("name", ["gpt2", "lstm", "gan"])
def test_after_fit_classes_hooks_attributes_and_parameters_are_as_one_device_leaves_them(name):
    def anatomies() -> list[Any]:
        return [_anatomy(_fit(name, strategy).module) for strategy in SHARDED]

    plain = run_on_ranks(lambda: _anatomy(_fit(name, "auto", ranks=1).module), 1)[0]
    for anatomy in run_on_ranks(anatomies, 2)[0]:
        assert anatomy == plain


def test_after_an_exception_classes_and_hooks_are_put_back_on_every_rank():
    def fail() -> tuple[Any, Any]:
        module = MLP.build()
        trainer = pl.Trainer(
            accelerator="cpu", devices=2, strategy="memopt_zero3", logger=False, enable_checkpointing=False,
            enable_progress_bar=False, enable_model_summary=False,
        )  # fmt: skip

        def raise_on_one(batch: Any, batch_idx: int) -> None:
            raise RuntimeError("on purpose")

        module.training_step = raise_on_one
        with pytest.raises(RuntimeError, match="on purpose"):
            trainer.fit(module, MLP.loader(batches=4))
        return type(module).__name__, [len(m._forward_pre_hooks) for m in module.modules()]

    for name, hooks in run_on_ranks(fail, 2):
        assert name == "MLP"
        assert not any(hooks)


def test_a_module_can_be_fitted_tested_and_fitted_again():
    def fit_twice() -> list[Any]:
        run = _fit("mlp", "memopt_zero3")
        first = run.weights["net.0.weight"].clone()
        module = run.module
        module.test_step = lambda batch, batch_idx: module.log("test_loss", nn.functional.mse_loss(
            module(batch[0]), torch.zeros(()), reduction="mean"))  # fmt: skip
        run.trainer.test(module, MLP.loader(batches=2), verbose=False)
        del module.test_step
        again = train(module, MLP.loader(batches=4), steps=2, devices=2, strategy="memopt_zero3")
        return [bool((again.weights["net.0.weight"] != first).any()), type(again.module).__name__]

    assert run_on_ranks(fit_twice, 2) == [[True, "MLP"]] * 2


def test_tied_weights_stay_one_parameter_while_and_after_training():
    def fit() -> tuple[bool, bool]:
        probe = Probe("on_train_batch_end", lambda m: m.model.lm_head.weight is m.model.transformer.wte.weight)
        module = _fit("gpt2", "memopt_zero3", probe).module
        return all(probe.seen), module.model.lm_head.weight is module.model.transformer.wte.weight

    assert run_on_ranks(fit, 2) == [(True, True)] * 2


class OnMeta(pl.LightningModule):
    def configure_model(self) -> None:
        if not list(self.children()):
            self.layer = nn.Linear(16, 4, device="meta")

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        return self.layer(batch[0]).square().mean()

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(self.parameters())


@pytest.mark.parametrize("strategy", ["memopt_ddp", "memopt_zero3"])
def test_layers_on_the_meta_device_are_initialized_alike_and_restored_from_a_checkpoint(strategy, tmp_path):
    def fit() -> list[np.ndarray]:
        options = {"devices": 2, "strategy": strategy}
        first = train(OnMeta(), MLP.loader(batches=4), steps=2, **options)
        first.trainer.save_checkpoint(tmp_path / "meta.ckpt")
        resumed = train(OnMeta(), MLP.loader(batches=4), steps=2, ckpt_path=tmp_path / "meta.ckpt", **options)
        return [run.weights["layer.weight"].numpy() for run in (first, resumed)]

    first, second = run_on_ranks(fit, 2)
    for weights in (*first, *second):
        np.testing.assert_array_equal(weights, first[0])
    assert np.abs(first[0]).max() > 0.05


def test_ranks_that_build_different_weights_train_those_of_rank_0():
    def fit(strategy: str) -> np.ndarray:
        module = MLP.build(seed=int(os.environ["RANK"]))
        loader = MLP.loader(batches=4)
        return train(module, loader, steps=0, devices=2, strategy=strategy).weights["net.0.weight"].numpy()

    of_rank_0 = MLP.build(seed=0).net[0].weight.detach().numpy()
    for weights in run_on_ranks(lambda: [fit(strategy) for strategy in STRATEGIES], 2):
        for weight in weights:
            np.testing.assert_array_equal(weight, of_rank_0)


# What is sharded


def _local_bytes(module: pl.LightningModule) -> int:
    """Bytes of parameters and optimizer state that this rank holds."""
    tensors = list(module.parameters())
    for entry in module.optimizers().optimizer.state.values():
        tensors += [value for value in entry.values() if torch.is_tensor(value) and value.ndim > 0]
    return sum((t.to_local() if isinstance(t, DTensor) else t).numel() * t.element_size() for t in tensors)


@pytest.mark.parametrize("ranks", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_each_rank_holds_its_share_of_parameters_and_optimizer_state(ranks):
    def measure() -> dict[str, int]:
        sizes = {}
        for strategy in STRATEGIES:
            probe = Probe("on_train_batch_end", _local_bytes)
            _fit("gpt2", strategy, probe, ranks=ranks, steps=1)
            sizes[strategy] = max(probe.seen)
        return sizes

    for sizes in run_on_ranks(measure, ranks):
        for strategy in SHARDED:
            assert sizes[strategy] <= sizes["memopt_ddp"] * (1 / ranks + 0.05)


def test_gradients_of_replicas_are_views_of_the_buckets_that_are_reduced():
    def buckets_and_gradients(module: pl.LightningModule) -> tuple[int, int]:
        gradients = [parameter.grad for parameter in module.parameters()]
        return len({gradient.untyped_storage().data_ptr() for gradient in gradients}), len(gradients)

    def fit() -> list[tuple[int, int]]:
        probe = Probe("on_after_backward", buckets_and_gradients)
        _fit("mlp", "memopt_ddp", probe, steps=3)
        return probe.seen

    for seen in run_on_ranks(fit, 2):
        buckets, gradients = seen[-1]
        assert buckets == 1 < gradients


def test_stage_2_reduces_every_micro_batch_and_the_others_once_per_step():
    def count() -> dict[str, list[bool]]:
        reduced = {}
        for strategy in SHARDED:
            probe = Probe("on_after_backward", lambda m: any(isinstance(p.grad, DTensor) for p in m.parameters()))
            _fit("mlp", strategy, probe, steps=1, accumulate_grad_batches=2)
            reduced[strategy] = probe.seen
        return reduced

    for reduced in run_on_ranks(count, 2):
        assert reduced == {
            "memopt_zero1": [False, True], "memopt_zero2": [True, True], "memopt_zero3": [False, True],
        }  # fmt: skip


def test_offloading_trains_the_same_in_every_stage():
    def losses() -> list[list[np.ndarray]]:
        stages = [("mlp", "memopt_zero1"), ("mlp", "memopt_zero2"), ("gpt2", "memopt_zero3")]
        return [
            [fit_zoo(ZOO[name], 2, 3, strategy=strategy).losses for strategy in (stage, f"{stage}_offload")]
            for name, stage in stages
        ]

    for plain, offloaded in run_on_ranks(losses, 2)[0]:
        np.testing.assert_array_equal(offloaded, plain)


def test_clipping_by_value_is_that_of_one_device():
    clipping = {"gradient_clip_val": 0.01, "gradient_clip_algorithm": "value"}
    plain = run_on_ranks(lambda: fit_zoo(MLP, 1, 4, **clipping), 1)[0]
    for stage in run_on_ranks(lambda: [fit_zoo(MLP, 2, 4, strategy=s, **clipping) for s in STRATEGIES], 2)[0]:
        for name, weight in plain.weights.items():
            np.testing.assert_allclose(stage.weights[name], weight, rtol=1e-5, atol=1e-6, err_msg=name)


def test_validation_in_mid_training_logs_the_metrics_of_one_device():
    def fit(ranks: int, strategy: str) -> list[float]:
        seen = Probe("on_validation_end", lambda module: float(module.trainer.callback_metrics["val_loss"]))
        trainer = pl.Trainer(
            accelerator="cpu", devices=ranks, strategy=strategy, logger=False, enable_checkpointing=False,
            enable_progress_bar=False, enable_model_summary=False, max_steps=4, val_check_interval=2,
            use_distributed_sampler=False, callbacks=[seen],
        )  # fmt: skip
        # Every rank reads the same batches, so the mean over ranks is what one device computes.
        trainer.fit(MLP.build(), MLP.loader(batches=4), MLP.loader(batches=2, seed=1))
        return seen.seen

    plain = run_on_ranks(fit, 1, 1, "auto")[0]
    assert len(plain) == 3
    for values in run_on_ranks(lambda: [fit(2, strategy) for strategy in STRATEGIES], 2)[0]:
        np.testing.assert_allclose(values, plain, rtol=1e-5)


# Precision


@pytest.mark.slow
def test_precision_by_string_and_by_plugin_and_strategy_by_name_and_by_instance_agree():
    def losses() -> list[np.ndarray]:
        plugin = {"plugins": [MixedPrecision("bf16-mixed", "cpu")]}
        return [
            fit_zoo(ZOO["gpt2"], 2, 4, strategy="memopt_zero3", precision="bf16-mixed").losses,
            fit_zoo(ZOO["gpt2"], 2, 4, strategy="memopt_zero3", **plugin).losses,
            fit_zoo(ZOO["gpt2"], 2, 4, strategy=DataParallelStrategy("parameters"), precision="bf16-mixed").losses,
            fit_zoo(ZOO["gpt2"], 2, 4, strategy=DataParallelStrategy("parameters"), **plugin).losses,
            fit_zoo(ZOO["gpt2"], 2, 4, strategy="memopt_zero3").losses,
        ]

    first, *others, full = run_on_ranks(losses, 2)[0]
    one_device = run_on_ranks(lambda: fit_zoo(ZOO["gpt2"], 1, 4, precision="bf16-mixed").losses, 1)[0]
    for other in others:
        np.testing.assert_array_equal(other, first)
    assert (first != full).any()
    np.testing.assert_allclose(first, one_device, rtol=5e-3)


def test_mixed_precision_gathers_16_bits_and_keeps_the_shards_and_gradients_in_32():
    def fit() -> tuple[Any, Any, Any]:
        gathered: list[torch.dtype] = []
        probe = Probe("on_before_optimizer_step", lambda m: (m.net[0].weight.dtype, m.net[0].weight.grad.dtype))
        entry = ZOO["mlp"]
        module = entry.build()
        module.net[0].register_forward_hook(lambda m, args, out: gathered.append(m.weight.dtype))
        train(module, entry.loader(batches=2), steps=1, devices=2, strategy="memopt_zero3", precision="bf16-mixed",
              callbacks=[probe])  # fmt: skip
        return str(gathered[0]), str(probe.seen[0][0]), str(probe.seen[0][1])

    assert run_on_ranks(fit, 2)[0] == ("torch.bfloat16", "torch.float32", "torch.float32")


@pytest.mark.parametrize(("compression", "tolerance"), [("bf16", 2e-2), ("fp16", 2e-3)])
def test_compressed_gradients_train_nearly_the_same(compression, tolerance):
    def losses() -> list[np.ndarray]:
        compressed = DataParallelStrategy(compression=compression)
        return [fit_zoo(MLP, 2, 10, strategy=strategy).losses for strategy in ("memopt_ddp", compressed)]

    plain, compressed = run_on_ranks(losses, 2)[0]
    assert (plain != compressed).any()
    np.testing.assert_allclose(compressed, plain, rtol=tolerance)


def test_a_hook_of_the_users_own_reduces_the_gradients_of_replicas():
    seen = []

    def hook(state: Any, bucket: torch.distributed.GradBucket) -> torch.futures.Future[torch.Tensor]:
        seen.append(bucket.index())
        return allreduce_hook(state, bucket)

    def losses() -> tuple[list[np.ndarray], bool]:
        hooked = DataParallelStrategy(ddp_comm_hook=hook)
        return [fit_zoo(MLP, 2, 10, strategy=strategy).losses for strategy in ("memopt_ddp", hooked)], bool(seen)

    (plain, hooked), was_called = run_on_ranks(losses, 2)[0]
    assert was_called
    np.testing.assert_allclose(hooked, plain, rtol=1e-6)


# Data


def test_the_loader_is_split_among_the_ranks():
    def samples() -> tuple[Any, ...]:
        sampler = _fit("mlp", "memopt_zero3").trainer.train_dataloader.sampler
        assert isinstance(sampler, DistributedSampler)
        return sampler.num_replicas, sampler.rank

    assert run_on_ranks(samples, 2) == [(2, 0), (2, 1)]


def test_ranks_with_unequal_batch_counts_are_refused_on_all_of_them():
    def fit() -> str:
        rank = int(os.environ["RANK"])
        loader = MLP.loader(batches=3 + rank)
        options = {"devices": 2, "strategy": "memopt_ddp", "use_distributed_sampler": False}
        return _error(lambda: train(MLP.build(), loader, **options))

    for message in run_on_ranks(fit, 2):
        assert re.search(r"have \[3, 4\] training batches.*DistributedSampler.*limit_train_batches", message)


def test_ranks_with_unequal_validation_batches_are_refused_where_they_gather_shards():
    def fit() -> list[str]:
        messages = []
        for strategy in ("memopt_ddp", "memopt_zero3"):
            trainer = pl.Trainer(
                accelerator="cpu", devices=2, strategy=strategy, logger=False, enable_checkpointing=False,
                enable_progress_bar=False, enable_model_summary=False, use_distributed_sampler=False,
            )  # fmt: skip
            loader = MLP.loader(batches=1 + int(os.environ["RANK"]))
            messages.append(_error(lambda trainer=trainer, loader=loader: trainer.validate(MLP.build(), loader)))
        return messages

    for replicas, sharded in run_on_ranks(fit, 2):
        assert replicas == "no error"
        assert re.search(r"have \[\(1,\), \(2,\)\] validation batches.*limit_val_batches", sharded)


class Stream(IterableDataset):
    def __iter__(self) -> Any:
        return iter(MLP.loader(batches=2).dataset)


def test_an_iterable_dataset_is_warned_of_because_each_rank_reads_all_of_it():
    def fit() -> list[str]:
        loader = DataLoader(Stream(), batch_size=4)
        return _messages(lambda: train(MLP.build(), loader, steps=2, devices=2, strategy="memopt_ddp"))

    first, _ = run_on_ranks(fit, 2)
    assert len([text for text in first if "Stream is an IterableDataset" in text]) == 1


class UnevenStream(IterableDataset):
    """Two batches of 4 on the first rank, and one more on each rank after it."""

    def __iter__(self) -> Any:
        return iter([MLP.loader(batches=2).dataset[i % 8] for i in range(4 * (2 + int(os.environ["RANK"])))])


class UnevenStreamWithLength(UnevenStream):
    """Says how many samples there are on all ranks."""

    def __len__(self) -> int:
        return 20


@pytest.mark.parametrize(
    ("strategy", "stream"),
    [("memopt_ddp", UnevenStream), ("memopt_zero3", UnevenStream), ("memopt_zero3", UnevenStreamWithLength)],
)
def test_ranks_whose_streams_have_unequally_many_batches_end_each_epoch_with_the_shortest(strategy, stream):
    def fit() -> tuple[int, list[str]]:
        loader = DataLoader(stream(), batch_size=4)
        options = {"steps": -1, "max_epochs": 2, "devices": 2, "strategy": strategy}
        runs: list[Any] = []
        said = _messages(lambda: runs.append(train(MLP.build(), loader, **options)))
        return runs[0].trainer.global_step, said

    (first, _), (second, said) = run_on_ranks(fit, 2)
    assert first == second == 4
    assert [text for text in said if "Another rank has no batch after 2" in text]


# What is said and refused


class SkipsALayer(pl.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.used, self.idle = nn.Linear(16, 4), nn.Linear(16, 4)

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        return self.used(batch[0]).square().mean()

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(self.parameters())


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_unused_parameters_are_left_alone(strategy):
    def fit() -> list[np.ndarray]:
        run = train(SkipsALayer(), MLP.loader(batches=4), steps=2, devices=2, strategy=strategy)
        return [run.weights["idle.weight"].numpy(), run.weights["used.weight"].numpy()]

    torch.manual_seed(0)
    before = SkipsALayer()
    torch.manual_seed(0)
    idle, used = run_on_ranks(fit, 2)[0]
    np.testing.assert_array_equal(idle, before.idle.weight.detach().numpy())
    assert (used != before.used.weight.detach().numpy()).any()


def test_unused_parameters_are_named_once():
    def fit() -> list[str]:
        return _messages(
            lambda: train(SkipsALayer(), MLP.loader(batches=8), steps=4, devices=2, strategy="memopt_ddp")
        )

    first, _ = run_on_ranks(fit, 2)
    (said,) = [text for text in first if "no gradient" in text]
    assert "`idle.weight`, `idle.bias`" in said
    assert "used.weight" not in said.replace("unused", "")


@pytest.mark.parametrize("strategy", ["memopt_ddp", "memopt_zero3"])
def test_batch_norm_is_warned_of_by_name(strategy):
    first, _ = run_on_ranks(lambda: _messages(lambda: _fit("cnn", strategy)), 2)
    assert any("`blocks.0.norm1` and 5 more takes its statistics from" in text for text in first)


class ByHand(SkipsALayer):
    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.bias = nn.Parameter(torch.ones(4))


class ByHandTied(SkipsALayer):
    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.idle.weight = self.used.weight


class WithAdafactor(SkipsALayer):
    def configure_optimizers(self) -> Any:
        return torch.optim.Adafactor(self.parameters())


@pytest.mark.parametrize(
    ("module", "said"),
    [
        (WithAdafactor, "Adafactor fails on sharded parameters.*memopt_ddp"),
        (ByHand, "`bias` is registered on the ByHand itself, and.*memopt_ddp"),
        (ByHandTied, "`used` and `idle` share a parameter.*memopt_ddp"),
    ],
)
def test_a_module_that_cannot_be_sharded_is_refused_by_name_on_all_ranks_and_left_as_it_was(module, said):
    def fit() -> tuple[str, bool]:
        built = module()
        options = {"steps": 1, "devices": 2, "strategy": "memopt_zero3"}
        message = _error(lambda: train(built, MLP.loader(batches=2), **options))
        return message, all(type(parameter) is nn.Parameter for parameter in built.parameters())

    for message, is_plain in run_on_ranks(fit, 2):
        assert re.search(said, message), message
        assert is_plain


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"shard": "everything"}, "shard='everything'.*'none', 'optimizer'"),
        ({"offload": True}, "nothing to offload"),
        ({"compression": "int4"}, "compression='int4'.*'bf16', 'fp16'"),
        ({"compression": "bf16", "shard": "parameters"}, "only the gradients of replicas"),
        ({"ddp_comm_hook": allreduce_hook, "shard": "optimizer"}, "ddp_comm_hook.*only those of replicas"),
        ({"ddp_comm_hook": allreduce_hook, "compression": "bf16"}, "one hook takes the gradients"),
    ],
)
def test_bad_arguments_are_refused_where_they_are_given(arguments, said):
    with pytest.raises(MisconfigurationException, match=said):
        DataParallelStrategy(**arguments)
