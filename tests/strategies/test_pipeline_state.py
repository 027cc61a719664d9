"""What a rank of a pipeline holds, while training, in checkpoints, and afterwards."""

import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import Callback
from torch import nn

import lightning_memopt as memopt
from lightning_memopt.parallel.mesh import MeshSizes
from lightning_memopt.parallel.pipeline.stubs import is_stub
from tests.distributed import run_on_ranks
from tests.parity import train
from tests.strategies.parity import fit_zoo
from tests.strategies.users import Net, losses_of
from tests.zoo import ZOO

SIZES = MeshSizes(pipeline=2)


class _Held(Callback):
    """Bytes of the parameters and of the optimizer's state that this rank holds, and names of those parameters."""

    def on_train_batch_end(self, trainer: Any, module: Any, *_: Any) -> None:
        held = {name: p for name, p in module.named_parameters() if not p.is_meta}
        self.names = sorted(held)
        self.parameters = sum(p.untyped_storage().nbytes() for p in held.values())
        state = trainer.optimizers[0].state
        assert set(state) <= set(held.values())
        moments = [t for values in state.values() for t in values.values() if t.ndim]
        self.state = sum(t.untyped_storage().nbytes() for t in moments)


def test_each_rank_holds_its_stage_and_that_stages_optimizer_state_alone():
    cut = "model.model.layers.1"
    whole = ZOO["llama"].build()
    sizes = {name: p.nbytes for name, p in whole.named_parameters()}
    later = {name for name in sizes if not name.startswith(("model.model.embed_tokens", "model.model.layers.0"))}

    def fit() -> tuple[list[str], int, int]:
        held = _Held()
        fit_zoo(
            ZOO["llama"], 2, 1, sizes=SIZES, extra=[held],
            strategy=memopt.PipelineParallelStrategy(split=[cut]),
        )  # fmt: skip
        return held.names, held.parameters, held.state

    for stage, (names, parameters, state) in zip((set(sizes) - later, later), run_on_ranks(fit, 2), strict=True):
        assert set(names) == stage
        assert parameters == sum(sizes[name] for name in stage)
        assert state == 2 * parameters  # AdamW's two moments


class _Saved(Callback):
    """Counts the bytes that autograd keeps between forward and backward, at their most."""

    def __init__(self) -> None:
        self.most, self._now = 0, 0

    def on_train_batch_start(self, trainer: Any, module: Any, batch: Any, batch_idx: int) -> None:
        saved = self

        class Kept:
            def __init__(self, tensor: torch.Tensor) -> None:
                self.tensor = tensor
                saved._now += tensor.nbytes
                saved.most = max(saved.most, saved._now)

            def __del__(self) -> None:
                saved._now -= self.tensor.nbytes

        parameters = {p.data_ptr() for p in module.parameters() if not p.is_meta}
        self._hooks = torch.autograd.graph.saved_tensors_hooks(
            lambda t: t if is_stub(t) or t.data_ptr() in parameters else Kept(t),
            lambda kept: kept.tensor if isinstance(kept, Kept) else kept,
        )
        self._hooks.__enter__()

    def on_train_batch_end(self, trainer: Any, module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        self._hooks.__exit__(None, None, None)


def _activations(schedule: str, samples: int, *callbacks: Callback) -> list[int]:
    """Bytes on each rank at their most, in micro-batches of one sample."""

    def fit() -> int:
        saved = _Saved()
        entry = ZOO["gpt2"]
        strategy = memopt.PipelineParallelStrategy(schedule, microbatches=samples)
        loader = entry.loader(batches=1, batch_size=samples)
        train(entry.build(), loader, steps=1, devices=2, callbacks=[*callbacks, saved], strategy=strategy,
              use_distributed_sampler=False)  # fmt: skip
        return saved.most

    return run_on_ranks(fit, 2)


def test_live_activations_are_bounded_by_stages_under_1f1b_and_grow_with_micro_batches_under_gpipe():
    few, many = _activations("1f1b", 4), _activations("1f1b", 12)
    for less, more in zip(few, many, strict=True):
        assert more <= 1.02 * less
    gpipe = _activations("gpipe", 12)
    assert all(all_of_them > 4 * more for all_of_them, more in zip(gpipe, many, strict=True))


def test_checkpointing_inside_stages_keeps_less():
    plain = _activations("1f1b", 4)
    recomputed = _activations("1f1b", 4, memopt.ActivationCheckpointing("full"))
    assert recomputed[0] < 0.1 * plain[0]
    assert recomputed[1] < 0.3 * plain[1]  # which has the head and the loss, too


class _SaveAt(Callback):
    def __init__(self, path: Path) -> None:
        self.path = path

    def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
        if trainer.global_step == 3:
            trainer.save_checkpoint(self.path)


def _six_steps(ranks: int, strategy: str, **options: Any) -> np.ndarray:
    sizes = SIZES if ranks == 2 else None
    return fit_zoo(
        ZOO["gpt2"], ranks, 6, sizes=sizes, repeat_first_batch=True, strategy=strategy, accumulate_grad_batches=1,
        **options,
    ).losses  # fmt: skip


def test_a_checkpoint_is_that_of_one_device_and_resumes_with_its_losses_with_and_without_a_pipeline(tmp_path):
    path, plain_path = tmp_path / "pipeline.ckpt", tmp_path / "plain.ckpt"

    def save_and_resume() -> list[np.ndarray]:
        return [
            _six_steps(2, "memopt_pp", extra=[_SaveAt(path)]),
            _six_steps(2, "memopt_pp", ckpt_path=path),
            _six_steps(2, "memopt_pp", ckpt_path=plain_path),
        ]

    plain = run_on_ranks(lambda: _six_steps(1, "auto", extra=[_SaveAt(plain_path)]), 1)[0]
    whole, resumed, from_plain = run_on_ranks(save_and_resume, 2)[0]
    alone = run_on_ranks(lambda: _six_steps(1, "auto", ckpt_path=path), 1)[0]
    np.testing.assert_allclose(whole, plain, rtol=1e-5)
    for losses in (resumed, from_plain, alone):
        np.testing.assert_allclose(losses, plain[-3:], rtol=1e-5)
    ours, theirs = (torch.load(p, weights_only=True) for p in (path, plain_path))
    assert list(ours["state_dict"]) == list(theirs["state_dict"])
    assert list(ours["optimizer_states"][0]["state"]) == list(theirs["optimizer_states"][0]["state"])
    ZOO["gpt2"].build().load_state_dict(ours["state_dict"])


class _Raise(Callback):
    def on_train_batch_end(self, *_: Any) -> None:
        raise RuntimeError("as asked")


def test_after_fit_the_module_is_the_users_on_every_rank_and_after_an_exception_its_classes_are():
    def fit() -> None:
        entry = ZOO["gpt2"]
        for callbacks in ([], [_Raise()]):
            module = entry.build()
            classes = [type(submodule) for submodule in module.modules()]
            options = {
                "devices": 2,
                "strategy": "memopt_pp",
                "callbacks": callbacks,
                "use_distributed_sampler": False,
            }
            if callbacks:
                with pytest.raises(RuntimeError, match="as asked"):
                    train(module, entry.loader(2), steps=1, **options)
            else:
                train(module, entry.loader(2), steps=1, **options)
                assert not any(p.is_meta for p in module.parameters())
                module.training_step(entry.batch(), 0) if module.__dict__.pop("_trainer", None) is None else None
            assert [type(submodule) for submodule in module.modules()] == classes
            assert not any("forward" in vars(submodule) for submodule in module.modules())

    run_on_ranks(fit, 2)


class BuffersBehindTheBlocks(type(ZOO["mlp"].build())):
    """Normalizes what its blocks give without parameters, and keeps a mean of its loss."""

    def __init__(self) -> None:
        super().__init__(0.0)
        self.norm = nn.BatchNorm1d(4, affine=False)
        self.register_buffer("mean_loss", torch.zeros(()))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.norm(super().forward(x))

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        loss = super().training_step(batch, batch_idx)
        with torch.no_grad():
            self.mean_loss.mul_(0.5).add_(loss.detach(), alpha=0.5)
        return loss


class Grows(nn.Linear):
    """Keeps what it sees in a buffer that gets longer."""

    def __init__(self) -> None:
        super().__init__(32, 32)
        self.register_buffer("seen", torch.zeros(0))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.training:
            self.seen = torch.cat([self.seen, x.detach().mean()[None]])
        return super().forward(x)


class BuffersThatGrow(Net):
    """In its blocks, and in its step."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(16, 32), *(Grows() for _ in range(4)), nn.Linear(32, 4))
        self.register_buffer("losses", torch.zeros(0))

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        loss = super().training_step(batch, batch_idx)
        self.losses = torch.cat([self.losses, loss.detach()[None]])
        return loss


@pytest.mark.parametrize("build", [BuffersBehindTheBlocks, BuffersThatGrow])
def test_buffers_that_only_some_stages_write_are_saved_and_are_on_every_rank_after_the_fit(build, tmp_path):
    def buffers(**options: Any) -> list[dict[str, Any]]:
        module, path = build(), tmp_path / "saved.ckpt"
        torch.manual_seed(0)
        for parameter in module.parameters():
            nn.init.normal_(parameter, std=0.1)
        train(module, ZOO["mlp"].loader(4), steps=4, callbacks=[SavesAtTheEnd(path)], **options)
        saved = torch.load(path, weights_only=True)["state_dict"]
        names = [name for name, _ in module.named_buffers()]
        return [{name: state[name].numpy() for name in names} for state in (saved, module.state_dict())]

    expected = buffers()
    pipeline = {"devices": 2, "use_distributed_sampler": False}  # which shuffles
    strategy = memopt.PipelineParallelStrategy(microbatches=1)
    for found in run_on_ranks(lambda: buffers(strategy=strategy, **pipeline), 2):
        for one, other in zip(expected, found, strict=True):
            assert one.keys() == other.keys() and (
                one["norm.num_batches_tracked"] == 4 if "norm.num_batches_tracked" in one else len(one["losses"]) == 4
            )
            for name, value in one.items():
                np.testing.assert_allclose(other[name], value, rtol=1e-4, err_msg=name)


class Buffers(nn.Module):
    """Of blocks, without parameters: written in place, and made anew."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("seen", torch.zeros((), dtype=torch.long))
        self.register_buffer("total", torch.zeros(()))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.training:
            self.seen += len(x)
            self.total = self.total + x.detach().sum()
        return x


class Scale(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("by", torch.linspace(0.5, 1.5, 32))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * self.by


class BuffersInBlocks(Net):
    """Its blocks count, and share a module that has but a buffer."""

    def __init__(self) -> None:
        super().__init__()
        scale = Scale()
        blocks = [nn.Sequential(nn.Linear(32, 32), nn.Tanh(), scale, Buffers()) for _ in range(4)]
        self.net = nn.Sequential(nn.Linear(16, 32), *blocks, nn.Linear(32, 4))


@pytest.mark.parametrize("schedule", ["1f1b", "interleaved_1f1b"])
def test_buffers_that_blocks_write_and_share_without_having_parameters_are_those_of_one_device(schedule, tmp_path):
    def fit(*strategy: Any) -> tuple[list[float], list[dict[str, np.ndarray]]]:
        module, path = BuffersInBlocks(), tmp_path / "saved.ckpt"
        losses = losses_of(module, *strategy, callbacks=[SavesAtTheEnd(path)])
        saved = torch.load(path, weights_only=True)["state_dict"]
        return losses, [{name: state[name].numpy() for name in saved} for state in (saved, module.state_dict())]

    ((losses, states),) = run_on_ranks(fit, 1)
    assert states[0]["net.1.3.seen"] == 6 * 8
    strategy = memopt.PipelineParallelStrategy(schedule, microbatches=2)
    for other_losses, other_states in run_on_ranks(lambda: fit(2, strategy), 2):
        np.testing.assert_allclose(other_losses, losses, rtol=1e-5)
        for state, other in zip(states, other_states, strict=True):
            assert state.keys() == other.keys()
            for name, value in state.items():
                np.testing.assert_allclose(other[name], value, rtol=1e-4, atol=1e-5, err_msg=name)


class SavesAtTheEnd(Callback):
    def __init__(self, path: Any) -> None:
        self.path = path

    def on_train_end(self, trainer: Any, module: Any) -> None:
        trainer.save_checkpoint(self.path)


class Spectral(Net):
    def __init__(self) -> None:
        super().__init__()
        nn.utils.parametrizations.spectral_norm(self.net[0])
        nn.utils.spectral_norm(self.net[4])


def test_spectral_norms_are_warned_of_but_with_one_micro_batch_where_they_train_as_on_one_device():
    def fit(microbatches: int) -> tuple[list[float], list[str]]:
        with warnings.catch_warnings(record=True) as warned:
            warnings.simplefilter("always")
            losses = losses_of(Spectral(), 2, memopt.PipelineParallelStrategy(microbatches=microbatches))
        return losses, [str(each.message) for each in warned if "spectral norm" in str(each.message)]

    plain = run_on_ranks(lambda: losses_of(Spectral()), 1)[0]
    losses, said = run_on_ranks(lambda: fit(1), 2)[0]
    np.testing.assert_allclose(losses, plain, rtol=1e-5)
    assert said == []
    (said,) = run_on_ranks(lambda: fit(2), 2)[0][1]
    assert said.startswith("`net.0` and 1 more has a spectral norm")


class _TiedWeight(Callback):
    """A sum that tells a rank's copy of the tied weight from others, after each step."""

    def __init__(self) -> None:
        self.seen: list[float] = []

    def on_train_batch_end(self, trainer: Any, module: Any, *_: Any) -> None:
        weight = module.model.lm_head.weight.detach().double()
        self.seen.append(float((weight.flatten() * torch.arange(weight.numel())).sum()))


def test_stochastic_rounding_leaves_tied_weights_of_unequal_stages_alike_and_resumes(tmp_path):
    path = tmp_path / "saved.ckpt"

    def fit(**options: Any) -> tuple[np.ndarray, list[float]]:
        tied = _TiedWeight()
        extra, strategy = (
            [tied, *options.pop("extra", [])],
            memopt.PipelineParallelStrategy(split=["model.transformer.h.1"]),
        )
        return _six_steps(2, strategy, plugins=[memopt.HalfPrecision("bf16")], extra=extra, **options), tied.seen

    def save_and_resume() -> Any:
        return fit(extra=[_SaveAt(path)]), fit(ckpt_path=path)

    (first, again), (other, _) = run_on_ranks(save_and_resume, 2)
    assert first[1] == other[1] and len(set(first[1])) == len(first[1])
    np.testing.assert_array_equal(again[0], first[0][3:])
    assert again[1] == first[1][3:]
