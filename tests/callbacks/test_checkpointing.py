import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import nn

from lightning_memopt import ActivationCheckpointing
from tests.parity import assert_parity, assert_same_training, train
from tests.zoo import ZOO, cases

POLICIES = {
    "full": lambda: ActivationCheckpointing("full"),
    "every_k": lambda: ActivationCheckpointing("every_k", k=2),
    "selective": lambda: ActivationCheckpointing("selective"),
    "budget": lambda: ActivationCheckpointing("budget", budget=0.5),
}


@pytest.mark.parametrize("name", cases())
@pytest.mark.parametrize("policy", POLICIES)
def test_every_policy_trains_the_zoo_with_dropout_bit_for_bit(policy: str, name: str) -> None:
    run = assert_parity(ZOO[name], [POLICIES[policy]()], dropout=0.1, rtol=0, atol=0)
    patched = [n for n, module in run.module.named_modules() if "forward" in module.__dict__]
    assert not patched


@pytest.mark.parametrize("name", ["gpt2", "mlp", "lstm"])
def test_the_default_policy_trains_models_with_blocks_and_without_bit_for_bit(name: str) -> None:
    assert_parity(ZOO[name], [ActivationCheckpointing()], dropout=0.1, rtol=0, atol=0)


class Logging(nn.Sequential):
    """A block that logs in its midst, by the LightningModule that it belongs to."""

    owner: list[pl.LightningModule]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        hidden = self[0](x)
        self.owner[0].log("mean", hidden.detach().mean(), on_step=True, on_epoch=True)
        self.owner[0].log_dict({"rows": float(len(x))}, reduce_fx="sum", on_step=False, on_epoch=True)
        return self[2](self[1](hidden))


class LogsInBlocks(type(ZOO["mlp"].build())):
    def __init__(self) -> None:
        super().__init__(0.0)
        blocks = [Logging(nn.Linear(16, 16), nn.Tanh(), nn.Linear(16, 16)) for _ in range(3)]
        self.net = nn.Sequential(*blocks, nn.Linear(16, 4))
        for block in blocks:
            block.owner = [self]


@pytest.mark.parametrize("policy", POLICIES)
def test_what_blocks_log_is_logged_as_in_plain_training_and_no_patch_stays(policy: str) -> None:
    modules, loader = [LogsInBlocks(), LogsInBlocks()], ZOO["mlp"].loader(batches=4)
    modules[1].load_state_dict(modules[0].state_dict())
    plain = train(modules[0], loader, steps=8)
    run = train(modules[1], loader, steps=8, callbacks=[POLICIES[policy]()])
    assert_same_training(plain, run, rtol=0, atol=0)
    assert plain.trainer.callback_metrics["rows"] == 3 * 4 * 8
    torch.testing.assert_close(run.trainer.callback_metrics, plain.trainer.callback_metrics, rtol=0, atol=0)
    assert "log" not in vars(run.module)


class StopAt(Callback):
    def on_train_batch_end(self, trainer: pl.Trainer, *args: object) -> None:
        if trainer.global_step == 2:
            raise RuntimeError("stop here")


def test_no_forward_stays_patched_when_training_raises() -> None:
    module = ZOO["gpt2"].build()
    with pytest.raises(RuntimeError, match="stop here"):
        train(module, ZOO["gpt2"].loader(), callbacks=[POLICIES["selective"](), StopAt()])
    assert not [n for n, m in module.named_modules() if "forward" in m.__dict__]


def test_a_run_resumed_in_mid_epoch_goes_on_as_a_plain_one(tmp_path) -> None:
    entry = ZOO["gpt2"]
    middle = tmp_path / "middle.ckpt"
    train(entry.build(), entry.loader(), steps=5, callbacks=[POLICIES["selective"]()]).trainer.save_checkpoint(middle)

    def resume(callbacks: list[Callback]) -> dict[str, torch.Tensor]:
        module = entry.build()
        trainer = pl.Trainer(
            accelerator="cpu", max_steps=12, logger=False, enable_checkpointing=False, enable_progress_bar=False,
            callbacks=callbacks,
        )  # fmt: skip
        trainer.fit(module, entry.loader(), ckpt_path=middle, weights_only=False)
        assert trainer.global_step == 12
        return module.state_dict()

    plain, other = resume([]), resume([POLICIES["budget"]()])
    assert all(torch.equal(other[name], weight) for name, weight in plain.items())


def test_bfloat16_autocast_trains_the_same() -> None:
    for name in ("gpt2", "shared_block"):
        entry = ZOO[name]
        plain = train(entry.build(), entry.loader(), precision="bf16-mixed")
        other = train(entry.build(), entry.loader(), precision="bf16-mixed", callbacks=[POLICIES["selective"]()])
        # One cast of a weight used three times or three casts of it: the sum of its gradients rounds differently.
        assert_same_training(plain, other, rtol=1e-2, atol=2e-3)


class Counter(Callback):
    """Counts the calls of the first linear layer by gradient mode."""

    def __init__(self) -> None:
        self.calls = {True: 0, False: 0}

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        pl_module.net[0].register_forward_hook(self._count)

    def _count(self, *args: object) -> None:
        self.calls[torch.is_grad_enabled()] += 1


def test_training_recomputes_and_validation_does_not() -> None:
    entry, counter = ZOO["mlp"], Counter()
    trainer = pl.Trainer(
        accelerator="cpu", max_epochs=1, logger=False, enable_checkpointing=False, enable_progress_bar=False,
        callbacks=[ActivationCheckpointing("full"), counter], num_sanity_val_steps=0,
    )  # fmt: skip
    trainer.fit(entry.build(), entry.loader(batches=3), entry.loader(batches=4))
    assert counter.calls == {True: 6, False: 4}


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ({"policy": "most"}, "'most' is unknown; choose one of full, every_k"),
        ({"policy": "every_k"}, "has no k"),
        ({"policy": "every_k", "k": 0}, "k=0 cannot count blocks"),
        ({"policy": "every_k", "k": 1}, "k=1 leaves every block as it is"),
        ({"policy": "every_k", "k": 1.5}, "k=1.5 cannot count blocks"),
        ({"policy": "budget"}, "has no budget"),
        ({"policy": "budget", "budget": 0.0}, r"budget=0.0 is not a fraction .* \(0, 1\]"),
        ({"policy": "budget", "budget": 1.5}, r"budget=1.5 is not a fraction"),
        ({"policy": "full", "budget": 0.5}, "which does not read it"),
    ],
)
def test_bad_arguments_are_named_when_the_callback_is_made(arguments: dict, sentence: str) -> None:
    with pytest.raises(MisconfigurationException, match=sentence):
        ActivationCheckpointing(**arguments)


@pytest.mark.parametrize(
    ("name", "modules", "sentence"),
    [
        ("gpt2", "model.layers.*", "matches no submodule of LossInside; its submodules are model"),
        ("gpt2", nn.LSTM, "'LSTM' matches no submodule"),
        ("gpt2", "model.transformer.h", r"is an ModuleList, which is never called.*'model.transformer.h.\*'"),
    ],
)
def test_modules_that_cannot_be_checkpointed_are_named_before_the_first_step(name, modules, sentence) -> None:
    module = ZOO[name].build()
    with pytest.raises(MisconfigurationException, match=sentence):
        train(module, ZOO[name].loader(), callbacks=[ActivationCheckpointing("full", modules=modules)])
    assert not [n for n, m in module.named_modules() if "forward" in m.__dict__]
