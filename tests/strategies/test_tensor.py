"""The tensor parallel strategy: what it says, refuses, keeps alike among ranks, and puts back."""

import os
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch.distributed.tensor import DTensor
from torch.utils.data import DataLoader

import lightning_memopt as memopt
from lightning_memopt.parallel.mesh import MeshSizes
from tests.distributed import run_on_ranks
from tests.strategies.parity import assert_same_outcome, fit_zoo, on_one_device
from tests.zoo import ZOO

TENSOR = {"sizes": MeshSizes(tensor=2)}


def _trainer(strategy: Any = "memopt_tp", **options: Any) -> pl.Trainer:
    usual = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    usual |= {"enable_model_summary": False, "max_steps": 2, "accelerator": "cpu", "devices": 2}
    usual |= {"use_distributed_sampler": False}
    return pl.Trainer(strategy=strategy, **(usual | options))


class _Look(Callback):
    """Whatever ``look(trainer, module)`` says after the first step."""

    def __init__(self, look: Any) -> None:
        self.look, self.seen = look, None

    def on_train_batch_end(self, trainer: Any, module: Any, *args: Any) -> None:
        if trainer.global_step == 1:
            self.seen = self.look(trainer, module)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"size": 0}, "size=0.* is no number of ranks"),
        ({"size": True}, "size=True.* is no number of ranks"),
        ({"plan": "manual"}, "plan='manual'.* is no plan"),
    ],
)
def test_bad_arguments_are_refused_with_what_is_possible(arguments, said):
    with pytest.raises(MisconfigurationException, match=said):
        memopt.TensorParallelStrategy(**arguments)


def test_there_is_nothing_to_describe_before_a_plan_was_found():
    with pytest.raises(MisconfigurationException, match="nothing to describe yet"):
        memopt.TensorParallelStrategy().describe()


def test_what_cannot_be_is_refused_before_the_first_step_on_all_ranks():
    cases = [
        ("mlp", {"size": 4}, r"size=4\) on 2 ranks.*HybridStrategy\(tensor=4, data=-1\)"),
        ("mlp", {"plan": {"nett.*": "whole"}}, "'nett.*' matches no submodule"),
        ("mlp", {"plan": {"net.*": "whole"}}, "MLP has nothing that can be split.*memopt_zero3"),
        ("encoder", {"sequence_parallel": True}, "block `encoder.layers.0` cannot work on a part of the tokens"),
        ("cnn", {"sequence_parallel": True}, "CNN has no stack of blocks"),
        ("bert_qa", {"loss_parallel": True}, "no linear layer that makes class logits is split"),
        ("vit", {"loss_parallel": True, "plan": {"*.classifier": "colwise"}}, ""),
    ]

    def fit_each():
        for name, arguments, said in cases:
            strategy = memopt.TensorParallelStrategy(**arguments)
            module = ZOO[name].build()
            if not said:
                _trainer(strategy).fit(module, ZOO[name].loader(4))
                continue
            with pytest.raises(MisconfigurationException, match=r"(?s)TensorParallelStrategy.*" + said):
                _trainer(strategy).fit(module, ZOO[name].loader(4))

    run_on_ranks(fit_each, 2)


def test_logits_that_a_step_needs_whole_are_refused_by_name_under_loss_parallel():
    class Accuracy(type(ZOO["mlp"].build())):
        def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
            self.log("accuracy", (self(batch[0]).argmax(-1) == batch[1]).float().mean())
            return super().training_step(batch, batch_idx)

    def fit():
        strategy = memopt.TensorParallelStrategy(loss_parallel=True)
        with pytest.raises(MisconfigurationException, match=r"logits of `net.5` that is no cross-entropy"):
            _trainer(strategy).fit(Accuracy(0.0), ZOO["mlp"].loader(4))

    run_on_ranks(fit, 2)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_splitting_tokens_and_losses_trains_as_one_device(name):
    def fit():
        strategy = memopt.TensorParallelStrategy(sequence_parallel=True, loss_parallel=True)
        return fit_zoo(ZOO[name], 2, **TENSOR, strategy=strategy)

    for outcome in run_on_ranks(fit, 2, deadline_seconds=120):
        assert_same_outcome(on_one_device(name), outcome)


def test_the_plan_is_described_with_bytes_and_what_was_found_at_the_first_step():
    def fit():
        strategy = memopt.TensorParallelStrategy()
        look = _Look(lambda trainer, module: trainer.strategy.describe())
        _trainer(strategy, callbacks=[look]).fit(ZOO["llama"].build(), ZOO["llama"].loader(4))
        return look.seen, strategy.describe()

    for during, after in run_on_ranks(fit, 2):
        assert during == after
        line = next(line for line in during.splitlines() if "layers.0.mlp.down_proj" in line)
        assert line.split(maxsplit=4)[1:] == ["rowwise", "8,192", "4,096", "split through `model.model.layers.0.mlp`"]


def test_split_layers_and_their_optimizer_state_take_their_share_of_the_bytes():
    def look(trainer: Any, module: Any) -> tuple[int, int, int, int]:
        split = [p for p in module.parameters() if isinstance(p, DTensor)]
        state = trainer.optimizers[0].state
        moments = [state[p]["exp_avg"] for p in split]
        return (
            sum(p.numel() for p in split), sum(p.to_local().untyped_storage().nbytes() for p in split),
            sum(m.numel() for m in moments), sum(m.to_local().untyped_storage().nbytes() for m in moments),
        )  # fmt: skip

    def fit():
        seen = _Look(look)
        _trainer(callbacks=[seen]).fit(ZOO["gpt2"].build(), ZOO["gpt2"].loader(4))
        return seen.seen

    for elements, parameter_bytes, of_state, state_bytes in run_on_ranks(fit, 2):
        assert elements == of_state > 30_000
        assert parameter_bytes == state_bytes == elements * 4 // 2


def test_the_module_is_as_the_user_wrote_it_after_fit_fit_again_and_an_exception():
    class Fail(Callback):
        def on_train_batch_end(self, trainer: Any, *args: Any) -> None:
            raise KeyError("on purpose")

    def fit():
        module = ZOO["gpt2"].build()
        before = {name: (type(sub), sorted(vars(sub))) for name, sub in module.named_modules() if name}
        names = list(module.state_dict())
        for _ in range(2):
            _trainer().fit(module, ZOO["gpt2"].loader(4))
            assert {name: (type(sub), sorted(vars(sub))) for name, sub in module.named_modules() if name} == before
            assert list(module.state_dict()) == names
            assert {type(p) for p in module.parameters()} == {torch.nn.Parameter}
            assert module.model.lm_head.weight is module.model.transformer.wte.weight
            assert module.model.transformer.h[0].attn.num_heads == 4
        with pytest.raises(KeyError):
            _trainer(callbacks=[Fail()]).fit(module, ZOO["gpt2"].loader(4))
        assert {name: (type(sub), sorted(vars(sub))) for name, sub in module.named_modules() if name} == before
        return True

    assert run_on_ranks(fit, 2) == [True, True]


def test_evaluation_gives_the_numbers_of_one_device_on_every_rank():
    class Everything(type(ZOO["llama"].build())):
        def test_step(self, batch: Any, batch_idx: int) -> None:
            self.log("test_loss", super().training_step(batch, batch_idx))

        def predict_step(self, batch: Any, batch_idx: int) -> Any:
            return self.model(input_ids=batch["input_ids"]).logits

    def evaluate(**options: Any) -> tuple[float, float, np.ndarray]:
        module = ZOO["llama"].build()
        module.__class__ = Everything
        module.eval()
        loader = DataLoader(ZOO["llama"].loader(2).dataset, batch_size=8)
        (validated,) = _trainer(**options).validate(module, loader, verbose=False)
        (tested,) = _trainer(**options).test(module, loader, verbose=False)
        logits = _trainer(**options).predict(module, loader)
        return validated["val_loss"], tested["test_loss"], torch.cat(logits).numpy()

    plain = run_on_ranks(lambda: evaluate(strategy="auto", devices=1), 1)[0]
    for ours in run_on_ranks(evaluate, 2):
        for value, expected in zip(ours, plain, strict=True):
            np.testing.assert_allclose(value, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "make",
    [
        lambda p: torch.optim.AdamW(p, foreach=True),
        lambda p: torch.optim.Adam(p, fused=True),
        lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, foreach=True),
    ],
)
def test_optimizers_that_step_all_tensors_at_once_step_parts_and_whole_ones(make):
    class Chosen(type(ZOO["mlp"].build())):
        def configure_optimizers(self) -> Any:
            return make(self.parameters())

    def weights(**options: Any) -> tuple[dict[str, np.ndarray], Any]:
        torch.manual_seed(0)
        module = Chosen(0.0)
        asked = _Look(lambda trainer, module: dict(trainer.optimizers[0].state_dict()["param_groups"][0]))
        trainer = _trainer(**options, callbacks=[asked], gradient_clip_val=0.5)
        trainer.fit(module, DataLoader(ZOO["mlp"].loader(4).dataset, batch_size=8))
        return {name: value.numpy() for name, value in module.state_dict().items()}, asked.seen

    plain, asked = run_on_ranks(lambda: weights(strategy="auto", devices=1), 1)[0]
    for ours, still_asked in run_on_ranks(weights, 2):
        assert still_asked == asked
        for name, weight in plain.items():
            np.testing.assert_allclose(ours[name], weight, rtol=1e-4, atol=1e-6, err_msg=name)


def test_ranks_with_different_batches_are_refused_before_the_first_step():
    def fit():
        loader = ZOO["mlp"].loader(4, seed=int(os.environ["LOCAL_RANK"]))
        with pytest.raises(MisconfigurationException, match="given different batches for `training_step`"):
            _trainer(use_distributed_sampler=False).fit(ZOO["mlp"].build(), loader)

    run_on_ranks(fit, 2)


def test_replicas_that_drift_apart_are_named_and_rounding_is_taken_out():
    class Disturb(Callback):
        def __init__(self, by: float) -> None:
            self.by = by

        def on_train_batch_end(self, trainer: Any, module: Any, *args: Any) -> None:
            with torch.no_grad():
                module.encoder.layers[1].norm1.weight.add_(self.by * trainer.global_rank)

    def fit(by: float):
        module = ZOO["encoder"].build()
        _trainer(callbacks=[Disturb(by)]).fit(module, ZOO["encoder"].loader(4))
        return module.encoder.layers[1].norm1.weight.detach().numpy()

    first, second = run_on_ranks(lambda: fit(1e-6), 2)
    np.testing.assert_array_equal(first, second)

    def fail():
        with pytest.raises(RuntimeError, match=r"`encoder.layers.1.norm1.weight`.*differs among them"):
            fit(0.5)

    run_on_ranks(fail, 2)


def test_checkpoints_are_plain_and_resume_anywhere_with_the_same_losses(tmp_path: Path):
    class Save(Callback):
        def on_train_batch_end(self, trainer: Any, *args: Any) -> None:
            if trainer.global_step == 3:
                trainer.save_checkpoint(tmp_path / "during.ckpt")

    def fit(ranks: int, steps: int = 6, **options: Any) -> np.ndarray:
        return fit_zoo(
            ZOO["gpt2"], ranks, steps, repeat_first_batch=True, accumulate_grad_batches=1, **options
        ).losses

    written = run_on_ranks(lambda: fit(2, **TENSOR, strategy="memopt_tp", extra=[Save()]), 2)[0]
    saved = torch.load(tmp_path / "during.ckpt", weights_only=True)
    module = ZOO["gpt2"].build()
    module.load_state_dict(saved["state_dict"])
    assert {type(value) for value in saved["state_dict"].values()} == {torch.Tensor}
    readers = {
        1: {"strategy": "auto"},
        2: {"strategy": "memopt_tp", "sizes": MeshSizes(tensor=2)},
    }
    for ranks, options in readers.items():
        resumed = run_on_ranks(lambda: fit(ranks, **options, ckpt_path=tmp_path / "during.ckpt"), ranks)[0]  # noqa: B023
        np.testing.assert_allclose(resumed, written[-3:], rtol=1e-5)
    zero3 = {"strategy": "memopt_zero3", "ckpt_path": tmp_path / "during.ckpt"}
    np.testing.assert_allclose(run_on_ranks(lambda: fit(2, **zero3), 2)[0], written[-3:], rtol=1e-5)
