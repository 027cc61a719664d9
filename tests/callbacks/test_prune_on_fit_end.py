"""PruneOnFitEnd under Lightning: every module of the zoo, strategies, the report, refusals before the first step."""

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from lightning_memopt import ConstantSparsity, GradualPruning, PruneOnFitEnd
from lightning_memopt.compression.codecs import encode
from lightning_memopt.compression.masks import find_sparsity
from lightning_memopt.compression.selection import select_weights
from tests.distributed import run_on_ranks
from tests.parity import train
from tests.zoo import ZOO


@pytest.mark.parametrize("name", ZOO)
def test_training_is_that_of_the_plain_trainer_and_then_the_smallest_weights_are_zero(name):
    entry = ZOO[name]
    plain = train(entry.build(), entry.loader(3), steps=3)
    pruning = PruneOnFitEnd(0.5, scope="global")
    run = train(entry.build(), entry.loader(3), steps=3, callbacks=[pruning])
    assert run.losses == plain.losses and list(run.weights) == list(plain.weights)
    chosen = {weight.name for weight in select_weights(run.module).weights}
    kept = torch.cat([plain.weights[key][run.weights[key] != 0] for key in sorted(chosen)]).abs()
    gone = torch.cat([plain.weights[key][run.weights[key] == 0] for key in sorted(chosen)]).abs()
    assert gone.max() < kept.min() and abs(len(gone) - len(kept)) <= 1
    for key in (
        plain.weights.keys() - chosen - {other for w in select_weights(run.module).weights for other in w.tied}
    ):
        assert torch.equal(run.weights[key], plain.weights[key])


def test_the_report_has_the_true_share_over_what_was_to_be_pruned_and_over_all_and_the_bytes_of_a_sparse_export():
    entry, pruning = ZOO["gpt2"], PruneOnFitEnd(0.8)
    run = train(entry.build(), entry.loader(2), steps=2, callbacks=[pruning])
    report = pruning.report
    assert report.eligible_sparsity == pytest.approx(0.8, abs=1e-3) and 0.5 < report.sparsity < 0.8
    assert report.bytes_after == report.bytes_before
    weight = run.module.model.transformer.h[0].mlp.c_fc.weight
    assert encode(weight).nbytes < 0.25 * weight.nbytes
    assert "on request only" in report.skipped["model.transformer.wte.weight"]


@pytest.mark.parametrize(("amount", "kept", "length"), [(0.5, 2, 4), (0.75, 1, 4), (0.375, 5, 8)])
def test_n_of_m_takes_its_numbers_from_the_amount(amount, kept, length):
    entry = ZOO["mlp"]
    run = train(entry.build(), entry.loader(1), steps=1, callbacks=[PruneOnFitEnd(amount, "n:m")])
    groups = run.module.net[3].weight.unflatten(-1, (-1, length))
    assert ((groups != 0).sum(-1) == kept).all()


def test_fitting_again_to_the_same_amount_does_not_prune_more():
    entry, module = ZOO["mlp"], ZOO["mlp"].build()
    for _ in range(3):
        train(module, entry.loader(2), steps=2, callbacks=[PruneOnFitEnd(0.5)])
        assert find_sparsity(module) == {"net.0.weight": 0.5, "net.3.weight": 0.5, "net.5.weight": 0.5}


def test_a_checkpoint_from_before_is_read_back_for_a_test_of_the_best(tmp_path):
    entry, module = ZOO["mlp"], ZOO["mlp"].build()
    module.test_step = module.validation_step
    trainer = pl.Trainer(
        accelerator="cpu", max_epochs=1, logger=False, enable_progress_bar=False, enable_model_summary=False,
        callbacks=[PruneOnFitEnd(0.5), pl.callbacks.ModelCheckpoint(tmp_path, monitor="val_loss")],
    )  # fmt: skip
    trainer.fit(module, entry.loader(4), entry.loader(1))
    assert find_sparsity(module)
    assert trainer.test(module, entry.loader(1), ckpt_path="best", verbose=False)
    assert not find_sparsity(module)


def test_a_weight_of_which_nothing_is_left_is_said():
    entry, module = ZOO["mlp"], ZOO["mlp"].build()
    with torch.no_grad():
        module.net[3].weight.mul_(1e-6)
    pruning = PruneOnFitEnd(0.8, scope="global")
    with pytest.warns(UserWarning, match=r"All of 'net.3.weight' is zero now"):
        train(module, entry.loader(1), steps=1, callbacks=[pruning], max_steps=0)


def _train_on_two(strategy: str) -> dict[str, list[float]]:
    entry = ZOO["encoder"]
    pruning = PruneOnFitEnd(0.5, scope="global")
    options = {"callbacks": [pruning], "devices": 2, "strategy": strategy}
    run = train(entry.build(), entry.loader(2, batch_size=8), steps=2, **options)
    assert pruning.report.eligible_sparsity == pytest.approx(0.5, abs=1e-3)
    return {name: weight.flatten().tolist() for name, weight in run.weights.items()}


@pytest.mark.distributed
@pytest.mark.parametrize("strategy", ["ddp", "memopt_ddp", "memopt_zero3", "memopt_tp", "memopt_pp"])
def test_under_every_strategy_each_rank_has_the_whole_module_pruned_alike(strategy):
    first, second = run_on_ranks(_train_on_two, 2, strategy, deadline_seconds=180)
    assert first == second
    prunable = [weight.name for weight in select_weights(ZOO["encoder"].build()).weights]
    values = torch.tensor([value for name in prunable for value in first[name]])
    assert float((values == 0).float().mean()) == pytest.approx(0.5, abs=1e-3)


@pytest.mark.distributed
def test_the_process_that_launched_others_by_forking_gets_the_pruned_weights_back():
    entry = ZOO["mlp"]
    callbacks = [
        GradualPruning(ConstantSparsity(0.25, begin_step=1), include="net.0"),
        PruneOnFitEnd(0.5, include="net.3"),
    ]
    run = train(entry.build(), entry.loader(2), steps=2, callbacks=callbacks, devices=2, strategy="ddp_fork")
    assert find_sparsity(run.module) == {"net.0.weight": 0.25, "net.3.weight": 0.5}


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: PruneOnFitEnd(0), "amount=0 is no share of the weights"),
        (lambda: PruneOnFitEnd(1.0), "amount=1.0 is no share"),
        (lambda: PruneOnFitEnd(0.3, "n:m"), "amount=0.3 is no number of quarters or eighths"),
        (lambda: PruneOnFitEnd(0.5, "n:m", pattern="1:4"), "0.5 is not that of 1:4"),
        (lambda: PruneOnFitEnd(0.5, "saliency"), "needs gradients, which are gone"),
        (lambda: PruneOnFitEnd(0.5, "l2"), "method='l2' is none of"),
        (lambda: PruneOnFitEnd(0.5, pattern="square"), "pattern='square' is none of"),
    ],
)
def test_arguments_that_cannot_be_are_refused_when_they_are_given(make, message):
    with pytest.raises(MisconfigurationException, match=f"PruneOnFitEnd: .*{message}"):
        make()


@pytest.mark.parametrize("name", ["mlp", "late_mlp"])
@pytest.mark.parametrize(
    ("options", "message"),
    [({"include": "body.*"}, "include='body.*' matches no"), ({"pattern": "1x3"}, "blocks of 1 x 3 do not divide")],
)
def test_what_cannot_be_pruned_is_refused_before_the_first_step_and_not_at_the_end(name, options, message):
    with pytest.raises(MisconfigurationException, match=message):
        train(ZOO[name].build(), ZOO[name].loader(1), steps=1, callbacks=[_Never(), PruneOnFitEnd(0.5, **options)])


class _Never(pl.Callback):
    def on_train_batch_start(self, *args):
        raise AssertionError("training has begun")
