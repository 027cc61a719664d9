"""GradualPruning under Lightning: targets at their steps, resuming, and what else may change weights meanwhile."""

import warnings
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import EMAWeightAveraging, StochasticWeightAveraging
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch.nn.utils import prune

from lightning_memopt import (
    ConstantSparsity,
    GradientAccumulation,
    GradualPruning,
    HalfPrecision,
    LowBitOptimizer,
    MicroBatching,
    MixedPrecision,
    OptimizerInBackward,
    PolynomialSparsity,
    measure_memory,
    predict_memory,
)
from lightning_memopt.compression.masks import find_sparsity
from lightning_memopt.compression.selection import select_weights
from tests.distributed import run_on_ranks
from tests.parity import quiet_trainer, train
from tests.resuming import SavesAt, Validations, Watch, fit_same_batches
from tests.strategies.parity import CASES, Outcome, assert_same_outcome, fit_zoo
from tests.zoo import ZOO, slow_where

SCHEDULE = PolynomialSparsity(0.2, 0.8, begin_step=2, end_step=12, frequency=3)


def _share(module: torch.nn.Module) -> float:
    weights = [weight.parameter for weight in select_weights(module).weights]
    return sum(int((weight == 0).sum()) for weight in weights) / sum(weight.numel() for weight in weights)


@pytest.mark.parametrize("name", ["late_mlp", "encoder", "lstm", "gpt2", "cnn", "captioner"])
def test_after_every_step_exactly_the_share_of_the_schedule_is_zero(name):
    entry, watch = ZOO[name], Watch(_share)
    run = train(
        entry.build(), entry.loader(14), steps=14, callbacks=[watch, GradualPruning(SCHEDULE, scope="global")]
    )
    assert watch.seen == pytest.approx({step: SCHEDULE.at(step) for step in range(1, 15)}, abs=1e-3)
    assert _share(run.module) == pytest.approx(0.8, abs=1e-3)
    assert list(run.weights) == list(entry.build().state_dict()) or name == "late_mlp"


def test_two_optimizers_stepped_by_hand_count_their_steps_together_as_lightning_does():
    entry, watch = ZOO["gan"], Watch(_share)
    schedule = ConstantSparsity(0.5, begin_step=4)
    run = train(entry.build(), entry.loader(4), steps=8, callbacks=[watch, GradualPruning(schedule)])
    assert watch.seen == pytest.approx({2: 0.0, 4: 0.5, 6: 0.5, 8: 0.5})
    assert all(share == 0.5 for share in find_sparsity(run.module).values())


def test_a_constant_mask_trains_the_network_that_torch_prunes_with_clipping_and_momentum():
    entry = ZOO["mlp"]
    theirs = entry.build()
    for layer in (theirs.net[0], theirs.net[3], theirs.net[5]):
        prune.l1_unstructured(layer, "weight", amount=0.5)
    options = {"gradient_clip_val": 0.1, "steps": 10}
    plain = train(theirs, entry.loader(10), **options)
    ours = train(entry.build(), entry.loader(10), callbacks=[GradualPruning(ConstantSparsity(0.5))], **options)
    torch.testing.assert_close(ours.losses, plain.losses, rtol=1e-6, atol=0)
    for index in (0, 3, 5):
        prune.remove(theirs.net[index], "weight")
        torch.testing.assert_close(ours.module.net[index].weight, theirs.net[index].weight, rtol=1e-5, atol=1e-7)


def test_a_module_that_clips_by_itself_has_the_norm_of_what_is_left():
    class Clips(pl.LightningModule):
        def __init__(self):
            super().__init__()
            self.automatic_optimization = False
            self.net, self.norms = torch.nn.Linear(8, 4, bias=False), []

        def training_step(self, batch, batch_idx):
            optimizer = self.optimizers()
            optimizer.zero_grad()
            self.manual_backward(self.net(batch).square().mean())
            left = self.net.weight.grad * (self.net.weight != 0)
            self.norms.append((float(torch.nn.utils.clip_grad_norm_(self.parameters(), 0.1)), float(left.norm())))
            optimizer.step()

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), 0.1)

    module, loader = Clips(), torch.utils.data.DataLoader(torch.randn(12, 8), batch_size=4)
    quiet_trainer(3, GradualPruning(ConstantSparsity(0.75))).fit(module, loader)
    assert len(module.norms) == 3 and all(left > 0 and norm == pytest.approx(left) for norm, left in module.norms)


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed", "memopt fp16", "memopt bf16 kahan"])
def test_precisions_accumulation_and_clipping_leave_the_share_exact(precision):
    entry, watch = ZOO["encoder"], Watch(_share)
    plugins = {"memopt fp16": MixedPrecision("fp16"), "memopt bf16 kahan": HalfPrecision("bf16", rounding="kahan")}
    options = {"plugins": [plugins[precision]]} if precision in plugins else {"precision": precision}
    run = train(
        entry.build(), entry.loader(28), steps=14, callbacks=[watch, GradualPruning(SCHEDULE)],
        gradient_clip_val=0.5, accumulate_grad_batches=2, **options,
    )  # fmt: skip
    assert run.trainer.global_step == 14
    assert watch.seen == pytest.approx({0: 0} | {step: SCHEDULE.at(step) for step in range(1, 15)}, abs=2e-3)


@pytest.mark.parametrize(
    "others",
    [[OptimizerInBackward], [LowBitOptimizer], [OptimizerInBackward, LowBitOptimizer], [GradientAccumulation]],
)
@pytest.mark.parametrize("first", [True, False])
def test_other_techniques_around_the_step_leave_the_share_exact_in_either_order(others, first):
    entry = ZOO["gpt2"]
    arguments = {GradientAccumulation: [2], MicroBatching: [3]}
    rest = [kind(*arguments.get(kind, [])) for kind in others]
    pruning = [GradualPruning(ConstantSparsity(0.5, begin_step=1))]
    run = train(entry.build(), entry.loader(6), steps=3, callbacks=pruning + rest if first else rest + pruning)
    assert run.trainer.global_step == 3 and _share(run.module) == pytest.approx(0.5, abs=1e-3)


@pytest.mark.parametrize("first", [True, False])
def test_averaged_weights_are_pruned_too_in_validation_in_checkpoints_and_at_the_end(first, tmp_path):
    seen = []

    class Validating(type(ZOO["mlp"].build())):
        def validation_step(self, batch, batch_idx):
            seen.append(_share(self))

    entry = ZOO["mlp"]
    averaging, pruning = EMAWeightAveraging(decay=0.9), GradualPruning(ConstantSparsity(0.5, begin_step=3))
    trainer = quiet_trainer(8, pruning, averaging) if first else quiet_trainer(8, averaging, pruning)
    trainer.num_sanity_val_steps = 0
    module = Validating(0.0)
    trainer.fit(module, entry.loader(4), entry.loader(1))
    trainer.save_checkpoint(tmp_path / "end.ckpt")
    assert seen == [pytest.approx(0.5, abs=1e-3)] * 3  # the last for the report
    assert _share(module) == pytest.approx(0.5, abs=1e-3)
    saved = torch.load(tmp_path / "end.ckpt", weights_only=True)["state_dict"]["net.3.weight"]
    assert float((saved == 0).float().mean()) == 0.5


@pytest.mark.parametrize("first", [True, False])
def test_stochastic_weight_averaging_ends_with_pruned_weights(first):
    entry = ZOO["mlp"]
    callbacks = [
        GradualPruning(ConstantSparsity(0.5, begin_step=3)),
        StochasticWeightAveraging(1e-3, swa_epoch_start=1),
    ]
    trainer = pl.Trainer(
        accelerator="cpu", max_epochs=3, logger=False, enable_progress_bar=False, enable_model_summary=False,
        enable_checkpointing=False, callbacks=callbacks if first else callbacks[::-1],
    )  # fmt: skip
    module = entry.build()
    trainer.fit(module, entry.loader(4))
    assert _share(module) == pytest.approx(0.5, abs=1e-3)


@pytest.mark.parametrize(("method", "step"), [("magnitude", 5), ("saliency", 7), ("random", 1)])
def test_a_run_resumed_in_mid_schedule_gives_the_weights_of_the_whole_one_bit_for_bit(tmp_path, method, step):
    def fit(*callbacks, **options):
        pruning = GradualPruning(SCHEDULE, method, scope="global")
        module = fit_same_batches(ZOO["encoder"], 14, *callbacks, pruning, gradient_clip_val=0.5, **options)
        assert pruning.sparsity == pytest.approx(0.8, abs=1e-3)
        return module.state_dict()

    whole = fit(SavesAt(tmp_path / "some.ckpt", step))
    saved = torch.load(tmp_path / "some.ckpt", weights_only=True)
    (state,) = [state for key, state in saved["callbacks"].items() if key.startswith("GradualPruning")]
    assert not [name for name in saved["state_dict"] if "mask" in name]
    bits = sum(mask.nbytes for mask in state["held"].values())
    assert bits <= sum(tensor.nbytes for tensor in saved["state_dict"].values()) / 32 + 100
    resumed = fit(ckpt_path=tmp_path / "some.ckpt")
    torch.testing.assert_close(resumed, whole, rtol=0, atol=0)


BESIDE = {
    "bf16, accumulation and clipping": (
        list, {"precision": "bf16-mixed", "accumulate_grad_batches": 2, "gradient_clip_val": 0.5},
    ),
    "fp16 with a loss scale": (list, {"plugins": lambda: [MixedPrecision("fp16")]}),
    "OptimizerInBackward": (lambda: [OptimizerInBackward()], {}),
    "LowBitOptimizer": (lambda: [LowBitOptimizer()], {}),
    "MicroBatching": (lambda: [MicroBatching(3)], {}),
    "EMA": (lambda: [EMAWeightAveraging(decay=0.9)], {}),
    "SWA": (lambda: [StochasticWeightAveraging(1e-3, swa_epoch_start=1)], {"max_epochs": 3, "max_steps": -1}),
}  # fmt: skip


@pytest.mark.parametrize("beside", slow_where(BESIDE, ["fp16 with a loss scale", "LowBitOptimizer", "MicroBatching"]))
def test_beside_what_else_changes_training_a_resumed_run_is_the_whole_one_too(tmp_path, beside):
    others, options = BESIDE[beside]

    def fit(*callbacks, **more):
        made = {name: value() if callable(value) else value for name, value in options.items()}
        pruning = GradualPruning(SCHEDULE, scope="global")
        return fit_same_batches(ZOO["mlp"], 15, *others(), pruning, *callbacks, **made, **more)

    whole = fit(SavesAt(tmp_path / "some.ckpt", 7))
    assert _share(whole) == pytest.approx(0.8, abs=1e-3)
    torch.testing.assert_close(fit(ckpt_path=tmp_path / "some.ckpt").state_dict(), whole.state_dict(), rtol=0, atol=0)


@pytest.mark.parametrize("method", ["magnitude", "saliency"])
def test_a_checkpoint_of_plain_training_is_pruned_from_where_the_schedule_is(tmp_path, method):
    entry, watch = ZOO["mlp"], Watch(_share)
    quiet_trainer(6, SavesAt(tmp_path / "plain.ckpt", 6)).fit(entry.build(), entry.loader(6))
    pruning = GradualPruning(ConstantSparsity(0.5, begin_step=2), method)
    quiet_trainer(9, watch, pruning).fit(entry.build(), entry.loader(9), ckpt_path=tmp_path / "plain.ckpt")
    assert watch.seen == pytest.approx({7: 0.5, 8: 0.5, 9: 0.5}, abs=1e-3)


@pytest.mark.parametrize("first", [True, False])
def test_an_average_is_pruned_in_every_checkpoint_also_without_validation(tmp_path, first):
    callbacks = [GradualPruning(ConstantSparsity(0.5, begin_step=3)), EMAWeightAveraging(decay=0.9)]
    callbacks = callbacks if first else callbacks[::-1]
    entry, path = ZOO["mlp"], tmp_path / "some.ckpt"
    quiet_trainer(6, *callbacks, SavesAt(path, 5)).fit(entry.build(), entry.loader(6))
    saved = torch.load(path, weights_only=True)["state_dict"]
    assert float((saved["net.3.weight"] == 0).float().mean()) == 0.5


def test_after_training_raised_the_masks_are_still_in_a_checkpoint_and_the_optimizer_is_free(tmp_path):
    class Failing(type(ZOO["mlp"].build())):
        def training_step(self, batch, batch_idx):
            if batch_idx == 6:
                raise RuntimeError("broken batch")
            return super().training_step(batch, batch_idx)

    trainer = quiet_trainer(10, GradualPruning(ConstantSparsity(0.5, begin_step=3)))
    with pytest.raises(RuntimeError, match="broken batch"):
        trainer.fit(Failing(0.0), ZOO["mlp"].loader(10))
    assert not trainer.optimizers[0]._optimizer_step_post_hooks
    trainer.save_checkpoint(tmp_path / "after.ckpt")
    states = torch.load(tmp_path / "after.ckpt", weights_only=True)["callbacks"].values()
    assert [list(state["held"]) for state in states if "held" in state] == [
        ["net.0.weight", "net.3.weight", "net.5.weight"]
    ]


def test_the_report_has_the_share_over_what_was_pruned_and_the_bytes_of_a_sparse_export():
    entry, pruning = ZOO["gpt2"], GradualPruning(ConstantSparsity(0.8, begin_step=1))
    run = train(entry.build(), entry.loader(2), steps=2, callbacks=[pruning])
    assert pruning.report.eligible_sparsity == pruning.sparsity == pytest.approx(_share(run.module))
    assert pruning.report.disk_bytes_after < 0.5 * pruning.report.disk_bytes_before
    assert run.trainer.callback_metrics["sparsity"] == pytest.approx(0.8, abs=1e-3)


def test_prediction_counts_the_bits_of_the_masks_and_agrees_with_what_is_measured():
    entry = ZOO["mlp"]

    def peak(measure, *callbacks):
        return measure(entry.build(), entry.batch(), callbacks=callbacks).peak_bytes

    pruning = GradualPruning(ConstantSparsity(0.5))
    bits = sum(weight.parameter.numel() for weight in select_weights(entry.build()).weights)
    plain, predicted = peak(predict_memory), peak(predict_memory, pruning)
    assert plain + bits / 8 <= predicted <= plain + bits / 8 + 1024
    assert predicted == pytest.approx(peak(measure_memory, pruning), rel=0.05)


def test_a_second_fit_with_the_same_callback_starts_anew():
    entry, pruning = ZOO["mlp"], GradualPruning(ConstantSparsity(0.5, begin_step=3))
    for _ in range(2):
        watch = Watch(_share)
        train(entry.build(), entry.loader(5), steps=5, callbacks=[watch, pruning])
        assert watch.seen == pytest.approx({1: 0, 2: 0, 3: 0.5, 4: 0.5, 5: 0.5}, abs=1e-3)


def test_a_schedule_that_training_does_not_reach_the_end_of_is_said_at_the_start():
    entry = ZOO["mlp"]
    with pytest.warns(UserWarning, match=r"ends at step 12, and training after 4: .* pruned to .* not to 80.0%"):
        train(entry.build(), entry.loader(4), steps=4, callbacks=[GradualPruning(SCHEDULE)])


def _train_sharded(strategy: str) -> dict[str, list[float]]:
    entry = ZOO["encoder"]
    module, watch = entry.build(), GradualPruning(SCHEDULE, scope="global")
    run = train(module, entry.loader(14, batch_size=4), steps=14, callbacks=[watch], devices=2, strategy=strategy)
    assert watch.sparsity == pytest.approx(0.8, abs=1e-3)
    return {name: weight.flatten().tolist() for name, weight in run.weights.items() if weight.ndim > 1}


@pytest.mark.distributed
@pytest.mark.parametrize(
    "strategy",
    [
        "memopt_zero3",
        pytest.param("ddp", marks=pytest.mark.slow),
        pytest.param("memopt_ddp", marks=pytest.mark.slow),
        pytest.param("memopt_tp", marks=pytest.mark.slow),
    ],
)
def test_under_every_strategy_all_ranks_prune_the_same_weights_to_the_target(strategy):
    first, second = run_on_ranks(_train_sharded, 2, strategy, deadline_seconds=180)
    assert first == second
    prunable = {weight.name for weight in select_weights(ZOO["encoder"].build()).weights}
    values = torch.tensor([value for name in prunable for value in first[name]])
    assert float((values == 0).float().mean()) == pytest.approx(0.8, abs=1e-3)


@pytest.mark.distributed
@pytest.mark.parametrize(
    "strategy",
    [
        "memopt_tp",
        pytest.param("memopt_ddp", marks=pytest.mark.slow),
        pytest.param("memopt_zero3", marks=pytest.mark.slow),
    ],
)
def test_ranks_train_the_network_that_one_device_prunes_with_the_same_batches_and_clipping(strategy):
    def fit(ranks: int, **options: Any) -> Outcome:
        pruning = GradualPruning(ConstantSparsity(0.5), scope="global")
        return fit_zoo(ZOO["gpt2"], ranks, 6, extra=[pruning], **options)

    (plain,) = run_on_ranks(lambda: fit(1), 1)
    case = CASES[strategy]
    for outcome in run_on_ranks(lambda: fit(2, sizes=case.sizes, strategy=case.make()), 2, deadline_seconds=180):
        assert_same_outcome(plain, outcome)


@pytest.mark.distributed
def test_pipeline_stages_are_refused_by_name_before_the_first_step():
    def fit() -> str:
        with pytest.raises(MisconfigurationException) as refusal:
            _train_sharded("memopt_pp")
        return str(refusal.value)

    messages = run_on_ranks(fit, 2, deadline_seconds=120)
    assert all("is on another pipeline stage" in message for message in messages)


def test_where_nobody_knows_how_long_training_is_it_is_said_at_its_end_that_the_schedule_is_longer():
    class Stream(torch.utils.data.IterableDataset):
        def __iter__(self):
            return iter(ZOO["mlp"].loader(2))

    loader = torch.utils.data.DataLoader(Stream(), batch_size=None)
    said = r"ends at step 12, and training after 2: the weights are pruned to 20.0% and not to 80.0%"
    with pytest.warns(UserWarning, match=said) as caught:
        quiet_trainer(-1, GradualPruning(SCHEDULE), max_epochs=1).fit(ZOO["mlp"].build(), loader)
    assert sum("schedule ends" in str(warning.message) for warning in caught) == 1


def test_what_early_stopping_leaves_of_a_schedule_is_said_at_the_end_and_only_once_in_all():
    class Stops(pl.Callback):
        def on_train_batch_end(self, trainer, *_):
            trainer.should_stop = trainer.global_step == 4

    for steps, stops in ((14, [Stops()]), (6, [Stops()]), (14, [])):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            train(
                ZOO["mlp"].build(), ZOO["mlp"].loader(14), steps=steps, callbacks=[*stops, GradualPruning(SCHEDULE)]
            )
        said = [str(each.message) for each in caught if "schedule ends" in str(each.message)]
        assert len(said) == len(stops)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: GradualPruning(ConstantSparsity(0.5), "l0"), "GradualPruning: method='l0' is none of"),
        (lambda: GradualPruning(SCHEDULE, pattern="2:4"), "sparsity of 0.8 is not that of 2:4, which is 0.5"),
        (
            lambda: GradualPruning(ConstantSparsity(0.5), "saliency"),
            "needs gradients, and the schedule prunes before",
        ),
    ],
)
def test_arguments_that_cannot_be_are_refused_when_they_are_given(make, message):
    with pytest.raises(MisconfigurationException, match=message):
        make()


@pytest.mark.parametrize(
    ("name", "pruning", "message"),
    [
        ("mlp", lambda: GradualPruning(SCHEDULE, include="nett"), "include='nett' matches no parameter of MLP"),
        (
            "late_mlp",
            lambda: GradualPruning(SCHEDULE, include="nett"),
            "include='nett' matches no parameter of LateMLP",
        ),
        (
            "cnn",
            lambda: GradualPruning(ConstantSparsity(0.5), pattern="2:4", include=torch.nn.Conv2d),
            "'stem.weight' has 1 inputs, which 4",
        ),
        ("frozen", lambda: GradualPruning(SCHEDULE, "saliency"), "'net.0.weight' is frozen and has no gradient"),
    ],
)
def test_what_cannot_be_pruned_is_refused_by_name_before_the_first_step(name, pruning, message):
    trainer = quiet_trainer(2, pruning())
    module = ZOO[name if name in ZOO else "mlp"].build()
    if name == "frozen":
        module.net[0].requires_grad_(False)
    with pytest.raises(MisconfigurationException, match=f"GradualPruning: {message}"):
        trainer.fit(module, ZOO["mlp"].loader(2))
    assert trainer.global_step == 0


class _WithUnusedLayer(type(ZOO["mlp"].build())):
    def __init__(self):
        super().__init__(0.0)
        self.pooler = torch.nn.Linear(8, 8)


def test_a_layer_that_is_not_used_is_refused_by_saliency_in_the_first_step_and_not_when_it_is_pruned():
    watch = Watch(lambda _: None)
    pruning = GradualPruning(ConstantSparsity(0.5, begin_step=8), "saliency")
    with pytest.raises(
        MisconfigurationException, match=r"GradualPruning: 'pooler.weight' had no gradient in the first"
    ):
        train(_WithUnusedLayer(), ZOO["mlp"].loader(10), steps=10, callbacks=[pruning, watch])
    assert not watch.seen
    pruning = GradualPruning(ConstantSparsity(0.5, begin_step=8), "saliency", exclude="pooler")
    train(_WithUnusedLayer(), ZOO["mlp"].loader(10), steps=10, callbacks=[pruning])
    assert pruning.sparsity == 0.5


@pytest.mark.parametrize("begin_step", [1, 4])
def test_two_optimizers_whose_gradients_come_in_turns_are_pruned_by_saliency(begin_step):
    pruning = GradualPruning(ConstantSparsity(0.5, begin_step=begin_step), "saliency")
    train(ZOO["gan"].build(), ZOO["gan"].loader(4), steps=8, callbacks=[pruning])
    assert pruning.sparsity == 0.5


class _NeverAtOnce(type(ZOO["gan"].build())):
    """Of its two optimizers each forgets all gradients before it steps."""

    def training_step(self, batch, batch_idx):
        for optimizer, part in zip(self.optimizers(), (self.generator, self.discriminator), strict=True):
            self.zero_grad()
            self.manual_backward(sum(parameter.square().sum() for parameter in part.parameters()))
            optimizer.step()


def test_gradients_that_are_never_there_at_once_are_said_to_have_left_weights_unpruned():
    pruning = GradualPruning(ConstantSparsity(0.5, begin_step=2), "saliency")
    with pytest.warns(UserWarning, match=r"50.0% were to be pruned, and 0.0% are, since in no step all"):
        train(_NeverAtOnce(0.0), ZOO["gan"].loader(4), steps=8, callbacks=[pruning])


def test_saliency_beside_the_optimizer_in_the_backward_is_refused():
    pruning = GradualPruning(ConstantSparsity(0.5, begin_step=1), "saliency")
    with pytest.raises(MisconfigurationException, match="OptimizerInBackward frees them"):
        quiet_trainer(2, pruning, OptimizerInBackward()).fit(ZOO["mlp"].build(), ZOO["mlp"].loader(2))


@pytest.mark.parametrize(("saved_at", "begin_step"), [(3, 5), (7, 5), (5, 9)])
def test_the_report_compares_with_the_last_validation_before_anything_was_pruned_when_resumed_too(
    tmp_path, saved_at, begin_step
):
    def fit(*callbacks, **options):
        pruning = GradualPruning(ConstantSparsity(0.9, begin_step=begin_step))
        fit_same_batches(ZOO["mlp"], 12, *callbacks, pruning, val_check_interval=2, **options)
        return pruning.report

    validations = Validations()
    whole = fit(SavesAt(tmp_path / "some.ckpt", saved_at), validations)
    assert whole.metrics_before == pytest.approx(validations.seen[begin_step - 1])
    assert whole.metrics_after == pytest.approx(validations.seen[12])
    resumed = fit(ckpt_path=tmp_path / "some.ckpt")
    assert (resumed.metrics_before, resumed.metrics_after) == (whole.metrics_before, whole.metrics_after)


def test_the_metrics_before_are_those_of_every_one_of_several_loaders():
    class Several(type(ZOO["mlp"].build())):
        def validation_step(self, batch, batch_idx, dataloader_idx=0):
            super().validation_step(batch, batch_idx)

    pruning, validations = GradualPruning(ConstantSparsity(0.9, begin_step=3)), Validations()
    trainer = quiet_trainer(4, pruning, validations, val_check_interval=2)
    trainer.fit(Several(0.0), ZOO["mlp"].loader(4), [ZOO["mlp"].loader(1), ZOO["mlp"].loader(2)])
    assert set(pruning.report.metrics_before) == {"val_loss/dataloader_idx_0", "val_loss/dataloader_idx_1"}
    assert pruning.report.metrics_before == pytest.approx(validations.seen[2])
    assert pruning.report.metrics_after == pytest.approx(validations.seen[4])


def test_what_is_pruned_before_the_first_validation_has_no_metrics_before_and_other_callbacks_metrics_are_left_out():
    class Logs(pl.Callback):
        def on_validation_epoch_end(self, trainer, module):
            module.log("of_a_callback", 1.0)

    reports = []
    for begin_step in (0, 4):
        pruning = GradualPruning(ConstantSparsity(0.5, begin_step=begin_step))
        trainer = quiet_trainer(6, pruning, Logs(), val_check_interval=2)
        trainer.fit(ZOO["mlp"].build(), ZOO["mlp"].loader(6), ZOO["mlp"].loader(1))
        reports.append(pruning.report)
    assert reports[0].metrics_before == {} and reports[0].metrics_after.keys() == {"val_loss"}
    assert reports[1].metrics_before.keys() == {"val_loss"}
