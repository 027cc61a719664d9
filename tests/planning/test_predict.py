import copy
import resource
from itertools import groupby

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import Callback, EarlyStopping, ModelCheckpoint
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional as F
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack

import lightning_memopt as memopt
from tests.planning.allocator import raw_peak_bytes
from tests.zoo import ZOO
from tests.zoo.text import LossOutside

MIB = 2**20


def _gpt2(layers: int = 12, width: int = 256) -> pl.LightningModule:
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(
        vocab_size=256, n_positions=256, n_embd=width, n_layer=layers, n_head=8, use_cache=False,
        resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, bos_token_id=0, eos_token_id=1,
    )  # fmt: skip
    return LossOutside(GPT2LMHeadModel(config))


class _ConvNet(pl.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(
            nn.Conv2d(3, 32, 7, stride=2, padding=3), nn.BatchNorm2d(32), nn.ReLU(), nn.MaxPool2d(3, 2, 1),
            nn.Conv2d(32, 64, 3, padding=1), nn.BatchNorm2d(64), nn.ReLU(),
            nn.Conv2d(64, 128, 3, stride=2, padding=1, groups=2), nn.GroupNorm(8, 128), nn.SiLU(),
            nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(128, 10),
        )  # fmt: skip

    def training_step(self, batch, batch_idx):
        images, labels = batch
        return F.cross_entropy(self.net(images), labels)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9)


def test_a_gpt2_of_real_width_and_context_is_predicted_at_the_size_that_it_has():
    batch = {"input_ids": torch.randint(0, 256, (4, 256)), "labels": torch.randint(0, 256, (4, 256))}
    raw = raw_peak_bytes(lambda: _gpt2(layers=2), batch)
    assert raw > 64 * MIB
    assert memopt.predict_memory(_gpt2(layers=2), batch).peak_bytes == pytest.approx(raw, rel=0.002)


@pytest.mark.slow
def test_a_conv_net_too_large_to_try_whole_is_extrapolated_from_smaller_batches():
    batch = torch.randn(24, 3, 160, 160), torch.randint(0, 10, (24,))
    raw = raw_peak_bytes(_ConvNet, batch)
    assert memopt.predict_memory(_ConvNet(), batch).peak_bytes == pytest.approx(raw, rel=0.02)


def test_a_model_of_which_one_layer_takes_gigabytes_is_predicted_without_allocating_it():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    batch = {"input_ids": torch.randint(0, 256, (1, 32)), "labels": torch.randint(0, 256, (1, 32))}
    report = memopt.predict_memory(lambda: _gpt2(layers=1, width=2**13), batch)
    grown_bytes = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024
    assert report.peak_bytes > 12 * 1024 * MIB
    assert grown_bytes < 512 * MIB


@pytest.mark.slow
def test_a_model_larger_than_the_machine_is_predicted_without_allocating_it():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    batch = {"input_ids": torch.randint(0, 256, (2, 128)), "labels": torch.randint(0, 256, (2, 128))}
    report = memopt.predict_memory(lambda: _gpt2(layers=32, width=4096), batch)
    grown_bytes = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024
    assert report.by_category["parameters"] == pytest.approx(6.45e9 * 4, rel=0.01)
    assert report.by_category["optimizer_state"] == pytest.approx(2 * 6.45e9 * 4, rel=0.01)
    assert grown_bytes < 1024 * MIB


def test_a_timeline_has_at_most_a_thousand_points_in_the_order_of_the_step():
    timeline = memopt.measure_memory(ZOO["gpt2"].build(), ZOO["gpt2"].batch()).timeline
    phases = [phase for phase, _ in groupby(point.phase for point in timeline if point.phase != "other")]
    assert len(timeline) <= 1000
    assert [phase for phase in phases if phase != "forward"] == ["backward", "step"]
    assert phases[0] == "forward"


def test_predicting_twice_gives_the_same_report():
    entry = ZOO["cnn"]
    first, second = (memopt.predict_memory(entry.build(), entry.batch()) for _ in range(2))
    assert first == second


@pytest.mark.parametrize("function", [memopt.measure_memory, memopt.predict_memory])
def test_the_module_its_state_and_the_random_numbers_stay_as_they_were(function):
    entry = ZOO["cnn"]
    module, batch = entry.build(dropout=0.2), entry.batch()
    weights, keys = copy.deepcopy(module.state_dict()), set(vars(module))
    random_state = torch.get_rng_state()
    function(module, batch)
    assert torch.equal(torch.get_rng_state(), random_state)
    assert all(torch.equal(weights[name], tensor) for name, tensor in module.state_dict().items())
    assert set(vars(module)) == keys
    assert all(parameter.grad is None for parameter in module.parameters())


@pytest.mark.slow
def test_parameters_on_the_meta_device_are_predicted_as_if_they_were_real():
    entry = ZOO["encoder"]
    real = memopt.predict_memory(entry.build(), entry.batch())
    meta = memopt.predict_memory(entry.build().to("meta"), entry.batch())
    assert meta.peak_bytes == pytest.approx(real.peak_bytes, rel=0.001)


@pytest.mark.gpu
def test_a_module_and_a_batch_on_a_gpu_are_predicted_as_on_the_cpu(cuda):
    entry = ZOO["encoder"]
    expected = memopt.predict_memory(entry.build(), entry.batch()).peak_bytes
    batch = {name: tensor.to(cuda) for name, tensor in entry.batch().items()}
    assert memopt.predict_memory(entry.build().to(cuda), batch).peak_bytes == expected


def test_a_function_that_makes_a_module_and_casts_it_is_predicted_as_the_module_itself():
    entry = ZOO["encoder"]
    batch = entry.batch()
    made = memopt.predict_memory(lambda: entry.build().bfloat16(), batch)
    assert made.peak_bytes == memopt.predict_memory(entry.build().bfloat16(), batch).peak_bytes


def test_a_module_that_has_been_fitted_can_be_predicted():
    entry = ZOO["mlp"]
    module = entry.build()
    trainer = pl.Trainer(
        max_steps=1, logger=False, enable_checkpointing=False, enable_progress_bar=False, accelerator="cpu"
    )
    trainer.fit(module, entry.loader(1))
    memopt.predict_memory(module, entry.batch())
    assert module.trainer is trainer


class _ReadsValues(_ConvNet):
    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)
        return loss * 2 if loss.item() > 1 else loss


class _Raises(_ConvNet):
    def training_step(self, batch, batch_idx):
        raise KeyError("mine")


def _images() -> tuple[torch.Tensor, torch.Tensor]:
    return torch.randn(2, 3, 32, 32), torch.randint(0, 10, (2,))


def test_what_is_measured_is_the_memory_of_the_device_that_the_trainer_moves_the_module_to():
    # The meta device stands for a GPU: its tensors have sizes, and are not on the CPU.
    class Elsewhere(pl.accelerators.CPUAccelerator):
        def setup_device(self, device: torch.device) -> None:
            pass

    class OneWay(pl.strategies.SingleDeviceStrategy):
        def teardown(self) -> None:  # without moving the module back
            pass

        def reduce(self, tensor: torch.Tensor, *args: object, **kwargs: object) -> torch.Tensor:
            return torch.ones(())  # of which Lightning asks whether the loader is empty

    class OneLayer(pl.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(64, 64)

        def training_step(self, batch: torch.Tensor, batch_idx: int) -> torch.Tensor:
            return self.layer(batch).square().mean()

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.SGD(self.parameters(), lr=0.1)

    options = {"accelerator": Elsewhere(), "strategy": OneWay(device=torch.device("meta"))}
    report = memopt.measure_memory(OneLayer(), torch.ones(8, 64), **options)
    on_cpu = memopt.measure_memory(OneLayer(), torch.ones(8, 64))
    assert report.device == "meta"
    assert on_cpu.device == "cpu"
    for category in ("parameters", "gradients"):
        assert report.by_category[category] == on_cpu.by_category[category] > 0


def test_a_step_that_reads_a_value_is_refused_with_the_operator_and_the_line():
    with pytest.raises(
        ValueError, match=r"_ReadsValues cannot be predicted: .*test_predict.py:\d+ .*_local_scalar_dense"
    ):
        memopt.predict_memory(_ReadsValues(), _images())


@pytest.mark.parametrize("function", [memopt.measure_memory, memopt.predict_memory])
def test_an_error_of_the_module_comes_through_and_leaves_nothing_behind(function):
    from torch.nn.modules.module import _global_forward_hooks, _global_forward_pre_hooks
    from torch.optim.optimizer import _global_optimizer_post_hooks, _global_optimizer_pre_hooks

    resize, get_rng_state = torch.UntypedStorage.resize_, torch.get_rng_state
    with pytest.raises(KeyError, match="mine"):
        function(_Raises(), _images())
    assert not _get_current_dispatch_mode_stack()
    assert not (_global_forward_hooks or _global_forward_pre_hooks)
    assert not (_global_optimizer_pre_hooks or _global_optimizer_post_hooks)
    assert torch.UntypedStorage.resize_ is resize
    assert torch.get_rng_state is get_rng_state
    assert not torch.autograd._profiler_enabled()
    assert type(torch.ones(2)) is torch.Tensor


@pytest.mark.parametrize(
    ("module", "options", "message"),
    [
        (nn.Linear(2, 2), {}, "given a Linear; it needs a LightningModule"),
        (lambda: nn.Linear(2, 2), {}, "makes a Linear; it must make a LightningModule"),
        (_ConvNet(), {"max_steps": 3}, "leave them out"),
    ],
)
def test_bad_input_is_refused_with_what_is_possible(module, options, message):
    with pytest.raises(ValueError, match=message):
        memopt.predict_memory(module, _images(), **options)


@pytest.mark.parametrize("function", [memopt.measure_memory, memopt.predict_memory])
@pytest.mark.parametrize(
    ("batch", "message"),
    [
        (None, "given None for a batch"),
        (ZOO["cnn"].loader(), r"given a DataLoader for a batch; .*next\(iter\(loader\)\)"),
        ([(each for each in ())], "this list cannot be copied"),
    ],
)
def test_what_is_no_batch_is_refused_with_what_to_give_instead(function, batch, message):
    with pytest.raises(ValueError, match=message):
        function(_ConvNet(), batch)


@pytest.mark.parametrize("function", [memopt.measure_memory, memopt.predict_memory])
def test_the_random_numbers_stay_as_they_were_also_after_an_error(function):
    images, random_state = _images(), torch.get_rng_state()
    with pytest.raises(ValueError, match="LightningModule"):
        function(lambda: torch.randn(3), images)
    assert torch.equal(torch.get_rng_state(), random_state)


@pytest.mark.parametrize("function", [memopt.measure_memory, memopt.predict_memory])
def test_the_modules_own_checkpoints_and_early_stopping_are_left_out(function, tmp_path):
    class Own(_ConvNet):
        def configure_callbacks(self):
            return [EarlyStopping("val_loss"), ModelCheckpoint(tmp_path, every_n_train_steps=1), Counts()]

    class Counts(Callback):
        started = 0

        def on_train_start(self, trainer, module):
            Counts.started += 1

    images = _images()
    assert function(Own(), images).peak_bytes == function(_ConvNet(), images).peak_bytes
    assert Counts.started
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("function", [memopt.measure_memory, memopt.predict_memory])
def test_a_measurement_inside_the_block_of_another_is_refused(function):
    with memopt.track_memory(), pytest.raises(ValueError, match="before or after the block"):
        function(_ConvNet(), _images())


def test_predicting_inside_a_fake_mode_gives_the_same_peak():
    module, images = _ConvNet(), _images()
    alone = memopt.predict_memory(module, images).peak_bytes
    with FakeTensorMode():
        assert memopt.predict_memory(module, images).peak_bytes == alone


def test_a_module_that_never_steps_is_refused():
    class Idle(_ConvNet):
        automatic_optimization = False

        def training_step(self, batch, batch_idx):
            pass

    with pytest.raises(ValueError, match="Idle stepped its optimizer fewer than twice"):
        memopt.measure_memory(Idle(), _images())


def test_a_target_batch_size_is_predicted_with_the_size_of_the_batch():
    entry = ZOO["mlp"]
    batch = next(iter(entry.loader(batch_size=4)))
    by_target = memopt.predict_memory(
        entry.build(), batch, callbacks=[memopt.GradientAccumulation(target_batch_size=8)]
    )
    by_factor = memopt.predict_memory(entry.build(), batch, callbacks=[memopt.GradientAccumulation(2)])
    assert by_target.peak_bytes == by_factor.peak_bytes


@pytest.mark.parametrize("monitor", ["train_loss", "val_loss"])
@pytest.mark.parametrize("find", [memopt.predict_memory, memopt.measure_memory])
def test_a_schedule_that_waits_for_a_logged_value_does_not_stand_in_the_way(find, monitor):
    class Plateau(type(ZOO["mlp"].build())):
        def training_step(self, batch, batch_idx):
            loss = super().training_step(batch, batch_idx)
            self.log("train_loss", loss)
            return loss

        def configure_optimizers(self):
            optimizer = torch.optim.AdamW(self.parameters())
            scheduler = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer)
            config = {"scheduler": scheduler, "interval": "step", "monitor": monitor}
            return {"optimizer": optimizer, "lr_scheduler": config}

    assert find(Plateau(dropout=0.0), next(iter(ZOO["mlp"].loader()))).by_category["optimizer_state"] > 0


@pytest.mark.parametrize("function", [memopt.measure_memory, memopt.predict_memory])
@pytest.mark.parametrize(
    ("options", "refuses"),
    [
        ({"callbacks": [memopt.OptimizerInBackward()]}, "OptimizerInBackward cannot work here"),
        ({"plugins": [memopt.HalfPrecision("bf16")]}, "HalfPrecision steps parameters one at a time"),
    ],
    ids=["in backward", "half"],
)
def test_an_optimizer_that_steps_jointly_is_refused_in_a_prediction_as_in_training(function, options, refuses):
    class ByLBFGS(_ConvNet):
        def configure_optimizers(self):
            return torch.optim.LBFGS(self.parameters())

    class ByTensorRate(_ConvNet):
        def configure_optimizers(self):
            return torch.optim.AdamW(self.parameters(), lr=torch.tensor(1e-3))

    with pytest.raises(MisconfigurationException, match=f"{refuses}.*LBFGS cannot step one parameter at a time"):
        function(ByLBFGS(), _images(), **options)
    assert function(ByTensorRate(), _images(), **options).peak_bytes > 0
