"""ClusterWeights under Lightning: at the end, while training goes on, resumed, and with pruning."""

import pytest
import torch
from lightning.pytorch.callbacks import EMAWeightAveraging
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from lightning_memopt import ClusterWeights, ConstantSparsity, GradualPruning, PruneOnFitEnd
from lightning_memopt.callbacks.fit_end import validate_now
from lightning_memopt.compression.masks import find_sparsity
from lightning_memopt.compression.selection import select_weights
from tests.callbacks.learning import NotEvenStarted
from tests.distributed import run_on_ranks
from tests.parity import quiet_trainer, train
from tests.resuming import SavesAt, Validations, Watch, fit_same_batches
from tests.zoo import ZOO


def _most_values(module: torch.nn.Module) -> int:
    return max(len(weight.parameter.unique()) for weight in select_weights(module).weights)


@pytest.mark.parametrize("name", ["mlp", "late_mlp", "gpt2", "cnn", "lstm", "gan"])
def test_at_the_end_every_weight_has_n_values_after_plain_training(name):
    entry, clustering = ZOO[name], ClusterWeights(16)
    plain = train(entry.build(), entry.loader(3), steps=3)
    run = train(entry.build(), entry.loader(3), steps=3, callbacks=[clustering])
    assert run.losses == plain.losses
    assert _most_values(plain.module) > 16 >= _most_values(run.module)
    assert clustering.report.disk_bytes_after < clustering.report.disk_bytes_before


def test_from_its_step_on_values_are_shared_and_train():
    entry, watch = ZOO["encoder"], Watch(_most_values)
    run = train(entry.build(), entry.loader(10), steps=10, callbacks=[watch, ClusterWeights(8, begin_step=4)])
    assert all((values <= 8) == (step >= 4) for step, values in watch.seen.items())
    stopped = train(entry.build(), entry.loader(10), steps=4, callbacks=[ClusterWeights(8, begin_step=4)])
    assert not torch.equal(run.weights["head.weight"].unique(), stopped.weights["head.weight"].unique())


def test_after_gradual_pruning_what_is_pruned_stays_zero():
    entry, watch = ZOO["mlp"], Watch(_most_values)
    callbacks = [GradualPruning(ConstantSparsity(0.75, begin_step=2)), ClusterWeights(8, begin_step=4), watch]
    run = train(entry.build(), entry.loader(10), steps=10, callbacks=callbacks)
    assert set(find_sparsity(run.module).values()) == {0.75} and _most_values(run.module) <= 8


@pytest.mark.parametrize("begin_step", [4, None])
def test_zeros_that_are_fewer_than_one_value_would_take_stay_zero_where_something_prunes(begin_step):
    entry, pruning = ZOO["mlp"], GradualPruning(ConstantSparsity(0.05, begin_step=2))
    callbacks = [pruning, ClusterWeights(4, begin_step=begin_step)]
    run = train(entry.build(), entry.loader(10), steps=10, callbacks=callbacks)
    assert all(share == pytest.approx(0.05, abs=0.01) for share in find_sparsity(run.module).values())
    assert len(find_sparsity(run.module)) > 1 and _most_values(run.module) <= 4


@pytest.mark.parametrize(
    ("callbacks", "message"),
    [
        (lambda: [GradualPruning(ConstantSparsity(0.5, 6)), ClusterWeights(4, begin_step=4)], "prunes until step 6"),
        (lambda: [ClusterWeights(4, begin_step=4), GradualPruning(ConstantSparsity(0.5, 4))], "comes after it"),
        (lambda: [PruneOnFitEnd(0.5), ClusterWeights(4, begin_step=4)], "prunes when training is over"),
    ],
)
@pytest.mark.parametrize("name", ["mlp", "late_mlp"])
def test_zeros_that_would_come_after_the_values_are_refused_before_the_first_step(name, callbacks, message):
    entry = ZOO[name]
    with pytest.raises(MisconfigurationException, match=f"ClusterWeights: the values of .* {message}"):
        train(entry.build(), entry.loader(1), callbacks=[*callbacks(), NotEvenStarted()])


def test_zeros_of_other_weights_may_come_after_the_values():
    entry = ZOO["mlp"]
    pruning = GradualPruning(ConstantSparsity(0.5, 3), include="net.0")
    train(entry.build(), entry.loader(4), callbacks=[ClusterWeights(4, begin_step=1, exclude="net.0"), pruning])
    assert pruning.report.eligible_sparsity == 0.5


@pytest.mark.parametrize("begin_step", [4, None])
def test_what_is_pruned_when_training_is_over_is_zero_beside_the_values(begin_step):
    entry = ZOO["mlp"]
    callbacks = [ClusterWeights(4, begin_step=begin_step), PruneOnFitEnd(0.75)]
    run = train(entry.build(), entry.loader(6), steps=6, callbacks=callbacks)
    assert min(find_sparsity(run.module).values()) >= 0.75 - 1e-3 and _most_values(run.module) <= 5


def test_at_the_end_zeros_stay_whichever_of_both_callbacks_comes_first():
    entry = ZOO["mlp"]
    callbacks = [ClusterWeights(4), GradualPruning(ConstantSparsity(0.1, begin_step=2))]
    run = train(entry.build(), entry.loader(6), steps=6, callbacks=callbacks)
    assert _most_values(run.module) <= 4


def test_averaged_weights_end_clustered_too():
    entry, callbacks = ZOO["mlp"], [ClusterWeights(8, begin_step=2), EMAWeightAveraging(decay=0.5)]
    assert _most_values(train(entry.build(), entry.loader(6), steps=6, callbacks=callbacks).module) <= 8


@pytest.mark.parametrize("begin_step", [3, 7])
def test_a_resumed_run_gives_the_weights_of_the_whole_one_bit_for_bit(tmp_path, begin_step):
    def fit(*callbacks, **options):
        clustering = ClusterWeights(8, begin_step=begin_step)
        return fit_same_batches(ZOO["mlp"], 10, *callbacks, clustering, **options).state_dict()

    whole = fit(SavesAt(tmp_path / "five.ckpt", 5))
    torch.testing.assert_close(fit(ckpt_path=tmp_path / "five.ckpt"), whole, rtol=0, atol=0)


def test_an_average_is_clustered_in_every_checkpoint_once_the_weights_are(tmp_path):
    entry, path = ZOO["mlp"], tmp_path / "some.ckpt"
    callbacks = [ClusterWeights(8, begin_step=3), EMAWeightAveraging(decay=0.9), SavesAt(path, 5)]
    train(entry.build(), entry.loader(6), steps=6, callbacks=callbacks)
    saved = torch.load(path, weights_only=True)["state_dict"]
    assert len(saved["net.3.weight"].unique()) <= 8


def test_values_that_will_not_train_since_training_ends_before_are_said_at_the_start():
    entry = ZOO["mlp"]
    with pytest.warns(UserWarning, match="ends after 4 steps and begin_step is 9"):
        run = train(entry.build(), entry.loader(4), steps=4, callbacks=[ClusterWeights(8, begin_step=9)])
    assert _most_values(run.module) <= 8


def _train_on_two(strategy: str, begin_step: int | None) -> tuple[int, list[float]]:
    entry, clustering = ZOO["encoder"], ClusterWeights(8, begin_step=begin_step)
    options = {"callbacks": [clustering], "devices": 2, "strategy": strategy}
    run = train(entry.build(), entry.loader(4), steps=2, **options)
    return _most_values(run.module), run.weights["head.weight"].flatten().tolist()


@pytest.mark.distributed
@pytest.mark.parametrize(("strategy", "begin_step"), [("memopt_ddp", 1), ("memopt_zero3", None)])
def test_replicas_share_the_same_values_and_shards_are_clustered_when_they_are_whole(strategy, begin_step):
    first, second = run_on_ranks(_train_on_two, 2, strategy, begin_step, deadline_seconds=120)
    assert first == second and first[0] <= 8


@pytest.mark.distributed
def test_values_that_train_are_refused_where_weights_are_sharded():
    def fit() -> str:
        with pytest.raises(MisconfigurationException) as refusal:
            _train_on_two("memopt_zero3", 1)
        return str(refusal.value)

    for message in run_on_ranks(fit, 2, deadline_seconds=120):
        assert "is not whole on this rank under DataParallelStrategy" in message


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: ClusterWeights(1), "n=1 is no number of clusters"),
        (lambda: ClusterWeights(16, "means"), "init='means' is none of"),
        (lambda: ClusterWeights(16, begin_step=-1), "begin_step=-1 is no number"),
        (
            lambda: train(ZOO["mlp"].build(), ZOO["mlp"].loader(1), callbacks=[ClusterWeights(4, include="a")]),
            "include='a'",
        ),
    ],
)
def test_what_cannot_be_is_refused_by_name(make, message):
    with pytest.raises(MisconfigurationException, match=f"ClusterWeights: {message}"):
        make()


def test_at_the_end_the_report_has_the_metrics_of_the_modules_own_validation_before_and_after():
    module, clustering, loader = ZOO["mlp"].build(), ClusterWeights(2), ZOO["mlp"].loader(3)
    trainer = quiet_trainer(3, clustering)
    trainer.fit(module, loader, loader)
    before, after = clustering.report.metrics_before, clustering.report.metrics_after
    assert before.keys() == after.keys() and before and before != after
    assert after == pytest.approx(validate_now(trainer, module))


def test_values_that_train_are_compared_with_the_last_validation_before_they_were_found_when_resumed_too(tmp_path):
    def fit(*callbacks, **options):
        clustering = ClusterWeights(2, begin_step=5)
        fit_same_batches(ZOO["mlp"], 8, *callbacks, clustering, val_check_interval=2, **options)
        return clustering.report

    validations = Validations()
    whole = fit(SavesAt(tmp_path / "some.ckpt", 7), validations)
    assert whole.metrics_before == pytest.approx(validations.seen[4])
    assert whole.metrics_after == pytest.approx(validations.seen[8])
    resumed = fit(ckpt_path=tmp_path / "some.ckpt")
    assert (resumed.metrics_before, resumed.metrics_after) == (whole.metrics_before, whole.metrics_after)
