"""PruneOnFitEnd by structure: the module becomes smaller, its optimizer follows, and what cannot be is refused."""

import sys

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from lightning_memopt import (
    DataParallelStrategy,
    LowBitOptimizer,
    OptimizerInBackward,
    PruneOnFitEnd,
    load_compressed,
)
from tests.callbacks.learning import Learning, NotEvenStarted, learn
from tests.distributed import run_on_ranks
from tests.parity import quiet_trainer, train
from tests.zoo import ZOO, slow_where


@pytest.mark.parametrize(
    "name", slow_where(["mlp", "cnn", "encoder", "gpt2", "bert_qa", "vit", "llama"], ["vit", "llama"])
)
def test_structured_pruning_makes_the_module_smaller_and_it_runs_and_trains_on(name):
    pytest.importorskip("torch_pruning")
    entry, module, pruning = ZOO[name], ZOO[name].build(), PruneOnFitEnd(0.5, "structured")
    plain = train(entry.build(), entry.loader(3), steps=3)
    run = train(module, entry.loader(3), steps=3, callbacks=[pruning])
    assert run.losses == plain.losses, "trying on a copy changed the training"
    assert pruning.report.bytes_after < 0.8 * pruning.report.bytes_before
    assert sum(p.numel() for p in module.parameters()) < 0.8 * sum(p.numel() for p in plain.module.parameters())
    before = [parameter.detach().clone() for parameter in module.parameters()]
    train(module, entry.loader(2), steps=2)
    assert any(not torch.equal(a, b) for a, b in zip(before, module.parameters(), strict=True))


def test_a_module_that_is_compiled_as_a_whole_is_followed_and_becomes_smaller():
    pytest.importorskip("torch_pruning")
    module, pruning = Learning(0.0), PruneOnFitEnd(0.5, "structured")
    module.compile(backend="eager")
    learn(pruning, module=module, epochs=1)
    assert pruning.report.bytes_after < 0.5 * pruning.report.bytes_before and pruning.report.metrics_after
    torch._dynamo.reset()


@pytest.mark.parametrize("name", ["mlp", "gpt2"])
def test_the_share_is_a_target_that_a_second_fit_has_reached(name):
    pytest.importorskip("torch_pruning")
    entry, module = ZOO[name], ZOO[name].build()
    sizes = []
    for amount in (0.25, 0.25, 0.5):
        pruning = PruneOnFitEnd(amount, "structured")
        train(module, entry.loader(2), steps=2, callbacks=[pruning])
        sizes.append(sum(parameter.numel() for parameter in module.parameters()))
    assert sizes[0] == sizes[1] > sizes[2]
    at_once = entry.build()
    train(at_once, entry.loader(2), steps=2, callbacks=[PruneOnFitEnd(0.5, "structured")])
    assert sizes[2] == sum(parameter.numel() for parameter in at_once.parameters())


@pytest.mark.parametrize("option", ["max_steps", "limit_train_batches"])
def test_training_without_a_step_is_followed_by_its_first_batch(option):
    pytest.importorskip("torch_pruning")
    module, pruning = ZOO["mlp"].build(), PruneOnFitEnd(0.5, "structured")
    train(module, ZOO["mlp"].loader(2), callbacks=[pruning], **{option: 0})
    assert pruning.report.ratio < 0.6


def test_a_checkpoint_from_before_is_not_loaded_into_what_became_smaller_but_into_a_new_module(tmp_path):
    pytest.importorskip("torch_pruning")
    entry, module = ZOO["mlp"], ZOO["mlp"].build()
    module.test_step = module.validation_step
    trainer = pl.Trainer(
        accelerator="cpu", max_epochs=1, logger=False, enable_progress_bar=False, enable_model_summary=False,
        callbacks=[PruneOnFitEnd(0.5, "structured"), pl.callbacks.ModelCheckpoint(tmp_path, monitor="val_loss")],
    )  # fmt: skip
    trainer.fit(module, entry.loader(4), entry.loader(1))
    with pytest.raises(
        MisconfigurationException, match=r"PruneOnFitEnd: the checkpoint has 'net.* made smaller.*Name a"
    ):
        trainer.test(module, entry.loader(1), ckpt_path="best", verbose=False)
    assert trainer.test(module, entry.loader(1), verbose=False)
    other = entry.build(seed=1)
    other.test_step = other.validation_step
    assert trainer.test(other, entry.loader(1), ckpt_path="best", verbose=False)
    assert not any("on_load_checkpoint" in vars(each) for each in (module, other))


def test_what_became_smaller_is_timed_beside_what_it_was_where_there_is_an_example():
    pytest.importorskip("torch_pruning")
    module, pruning = ZOO["mlp"].build(), PruneOnFitEnd(0.5, "structured")
    module.example_input_array = ZOO["mlp"].batch()[0]
    train(module, ZOO["mlp"].loader(2), steps=2, callbacks=[pruning])
    assert [one.batch_size for one in pruning.report.latency] == [1, len(module.example_input_array)]


def test_the_trainers_optimizer_holds_the_smaller_parameters_and_their_state():
    pytest.importorskip("torch_pruning")
    module = ZOO["mlp"].build()
    run = train(module, ZOO["mlp"].loader(3), steps=3, callbacks=[PruneOnFitEnd(0.5, "structured")])
    optimizer = run.trainer.optimizers[0]
    held = {parameter for group in optimizer.param_groups for parameter in group["params"]}
    assert held == set(module.parameters())
    assert all(optimizer.state[parameter]["exp_avg"].shape == parameter.shape for parameter in held)


@pytest.mark.parametrize("first", [True, False])
@pytest.mark.parametrize("other", [LowBitOptimizer, OptimizerInBackward])
def test_structured_pruning_beside_another_optimizer_state_leaves_one_that_goes_on(other, first):
    pytest.importorskip("torch_pruning")
    entry, module = ZOO["mlp"], ZOO["mlp"].build()
    callbacks = [other(), PruneOnFitEnd(0.5, "structured")]
    run = train(module, entry.loader(3), steps=3, callbacks=callbacks if first else callbacks[::-1])
    (optimizer,) = run.trainer.optimizers
    is_packed = other is LowBitOptimizer  # of the one weight that is large enough
    assert (module.net[3].weight in optimizer.state) != is_packed
    module(entry.batch()[0]).sum().backward()
    optimizer.step()


def test_validation_after_structured_pruning_runs_on_the_smaller_module():
    pytest.importorskip("torch_pruning")
    pruning, widths = PruneOnFitEnd(0.5, "structured"), []

    class Noting(Learning):
        def validation_step(self, batch, batch_idx):
            widths.append(self(batch[0]).shape and self.net[0].out_features)
            super().validation_step(batch, batch_idx)

    trainer = learn(pruning, module=Noting(0.0))
    assert widths[-4:] == [32] * 4
    assert widths[:-4].count(32) == 1 and widths[:-4].count(64) > 4, "the smaller one is tried once before training"
    checked = trainer.validate(trainer.lightning_module, ZOO["mlp"].loader(4), verbose=False)
    assert checked[0]["val_loss"] == pytest.approx(pruning.report.metrics_after["val_loss"])


def test_a_module_that_steps_its_optimizers_itself_is_refused_by_structure_in_setup():
    callbacks = [NotEvenStarted(), PruneOnFitEnd(0.5, "structured")]
    with pytest.raises(MisconfigurationException, match="that of GAN steps its optimizers itself"):
        train(ZOO["gan"].build(), ZOO["gan"].loader(1), callbacks=callbacks)


def test_without_torch_pruning_the_extra_to_install_is_named_in_setup(monkeypatch):
    monkeypatch.setitem(sys.modules, "torch_pruning", None)
    callbacks = [NotEvenStarted(), PruneOnFitEnd(0.5, "structured")]
    with pytest.raises(ModuleNotFoundError, match=r"lightning-memopt\[prune\]"):
        train(ZOO["mlp"].build(), ZOO["mlp"].loader(1), callbacks=callbacks)


class _Fixed(type(ZOO["mlp"].build())):
    def training_step(self, batch, batch_idx):
        assert self.net[0].out_features == self.net[3].in_features == 64, "made for 64"
        assert self.net[3].out_features == ZOO["mlp"].build().net[3].out_features, "made for so many"
        return super().training_step(batch, batch_idx)


def test_a_module_that_cannot_become_smaller_is_refused_before_the_first_step_is_taken():
    pytest.importorskip("torch_pruning")
    trainer = pl.Trainer(
        accelerator="cpu", max_steps=2, logger=False, enable_progress_bar=False, enable_model_summary=False,
        enable_checkpointing=False, callbacks=[PruneOnFitEnd(0.5, "structured")],
    )  # fmt: skip
    with pytest.raises(MisconfigurationException, match="PruneOnFitEnd: _Fixed cannot be made smaller"):
        trainer.fit(_Fixed(0.0), ZOO["mlp"].loader(2))
    assert trainer.global_step == 0


class _ProbesInValidation(type(ZOO["mlp"].build())):
    def __init__(self, *args):
        super().__init__(*args)
        self.probe = torch.nn.Linear(self.net[0].out_features, 1)

    def validation_step(self, batch, batch_idx):
        self.log("probed", self.probe(self.net[0](batch[0])).mean())


@pytest.mark.parametrize("exclude", [None, "net.0"])
def test_a_module_whose_validation_does_not_run_smaller_is_refused_before_the_first_step_is_taken(exclude):
    pytest.importorskip("torch_pruning")
    callback = PruneOnFitEnd(0.5, "structured", exclude=exclude)
    trainer = quiet_trainer(2, callback, limit_val_batches=1, num_sanity_val_steps=0)
    module, loader = _ProbesInValidation(0.0), ZOO["mlp"].loader(2)
    if exclude is None:
        with pytest.raises(
            MisconfigurationException, match=r"PruneOnFitEnd: .* validation of _ProbesInValidation does"
        ):
            trainer.fit(module, loader, loader)
        assert trainer.global_step == 0
    else:
        trainer.fit(module, loader, loader)
        assert "probed" in callback.report.metrics_after and module.net[3].out_features < 64


class _OnlyInTraining(type(ZOO["mlp"].build())):
    def training_step(self, batch, batch_idx):
        if not self.training:
            raise RuntimeError("is not training")
        return super().training_step(batch, batch_idx)


@pytest.mark.parametrize(
    ("module", "message"),
    [
        (lambda: _OnlyInTraining(0.0), "_OnlyInTraining cannot be pruned by structure: .* is not training"),
        (lambda: ZOO["lstm"].build(), "nothing in LSTMLanguageModel can be removed .*'lstm' is a LSTM"),
    ],
)
def test_a_module_that_cannot_be_followed_or_cut_is_refused_by_name_before_the_first_step_is_taken(module, message):
    pytest.importorskip("torch_pruning")
    trainer = quiet_trainer(1, PruneOnFitEnd(0.5, "structured"))
    with pytest.raises(MisconfigurationException, match=f"PruneOnFitEnd: {message}"):
        trainer.fit(module := module(), ZOO["lstm" if hasattr(module, "lstm") else "mlp"].loader(1))
    assert trainer.global_step == 0


@pytest.mark.parametrize(
    ("name", "left", "part"),
    [
        ("t5", "SelfAttention", 0.82),
        ("captioner", "encoder.layers.1.mlp.fc2", 0.42),
    ],
)
def test_of_two_stacks_what_can_become_smaller_does_and_what_cannot_is_said_before_training_and_reported(
    name, left, part
):
    pytest.importorskip("torch_pruning")
    pruning, entry = PruneOnFitEnd(0.5, "structured"), ZOO[name]
    module, weights = entry.build(), sum(p.numel() for p in entry.build().parameters())
    why = "in another order they compute something else" if name == "t5" else "the code does not run with fewer of it"
    with pytest.warns(UserWarning, match=f"PruneOnFitEnd: .* will stay whole, since {why}"):
        train(module, entry.loader(2), steps=2, callbacks=[pruning])
    assert sum(p.numel() for p in module.parameters()) < part * weights
    reasons = [reason for name, reason in pruning.report.skipped.items() if left in name]
    assert any(reason.startswith(why) for reason in reasons)
    assert all("the code does not run" in reason or "in another order" in reason for reason in reasons)
    train(module, entry.loader(1), steps=1)


@pytest.mark.distributed
def test_where_ranks_will_hold_parts_a_module_that_cannot_become_smaller_is_refused_in_setup():
    pytest.importorskip("torch_pruning")

    def fit() -> str:
        callbacks = [NotEvenStarted(), PruneOnFitEnd(0.5, "structured")]
        with pytest.raises(MisconfigurationException) as refusal:
            train(_Fixed(0.0), ZOO["mlp"].loader(4), callbacks=callbacks, devices=2, strategy="memopt_zero3")
        return str(refusal.value)

    assert all("_Fixed cannot be made smaller" in said for said in run_on_ranks(fit, 2, deadline_seconds=120))


@pytest.mark.distributed
@pytest.mark.parametrize(
    "strategy", ["ddp_fork", pytest.param("ddp_spawn", marks=pytest.mark.slow), "memopt_ddp_fork"]
)
def test_the_process_that_launched_others_gets_the_smaller_module_back(strategy, tmp_path):
    pytest.importorskip("torch_pruning")
    if strategy == "memopt_ddp_fork":
        strategy = DataParallelStrategy(shard="none", start_method="fork")
    entry = ZOO["mlp"]
    whole, pruning = entry.build(), PruneOnFitEnd(0.5, "structured", export_path=tmp_path / "small")
    initial = sum(parameter.double().sum() for parameter in whole.parameters()).item()
    train(whole, entry.loader(2), steps=2, callbacks=[pruning], devices=2, strategy=strategy)
    small = pruning.pruned
    assert _parameters(small) < 0.6 * _parameters(whole) == 0.6 * _parameters(entry.build())
    assert sum(parameter.double().sum() for parameter in whole.parameters()).item() != initial
    assert small(entry.batch()[0]).shape == whole(entry.batch()[0]).shape
    exported = load_compressed(tmp_path / "small", entry.build)
    assert all(map(torch.equal, exported.state_dict().values(), small.state_dict().values()))


def _parameters(module: torch.nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def _shrink_on_two(strategy: str) -> tuple[int, float]:
    module, pruning = ZOO["encoder"].build(), PruneOnFitEnd(0.5, "structured")
    train(module, ZOO["encoder"].loader(2), steps=2, callbacks=[pruning], devices=2, strategy=strategy)
    parameters = list(module.parameters())
    return sum(p.numel() for p in parameters), float(sum(p.double().sum() for p in parameters))


@pytest.mark.distributed
@pytest.mark.parametrize(
    "strategy",
    [
        "memopt_zero3",
        pytest.param("memopt_ddp", marks=pytest.mark.slow),
        pytest.param("memopt_tp", marks=pytest.mark.slow),
    ],
)
def test_structured_pruning_works_under_strategies_alike_on_every_rank(strategy):
    pytest.importorskip("torch_pruning")
    first, second = run_on_ranks(_shrink_on_two, 2, strategy, deadline_seconds=180)
    assert first == second
    assert first[0] < 0.8 * sum(p.numel() for p in ZOO["encoder"].build().parameters())
