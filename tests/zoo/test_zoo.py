"""The zoo itself: every module trains, repeatably."""

import pytest
import torch

from tests.parity import assert_same_training, train
from tests.zoo import ZOO


@pytest.mark.parametrize("name", ZOO)
def test_training_twice_from_the_same_seed_gives_the_same_weights_bit_for_bit(name):
    entry = ZOO[name]
    first, second = (train(entry.build(dropout=0.1), entry.loader(batches=4), steps=4, seed=3) for _ in range(2))
    assert_same_training(first, second, rtol=0, atol=0)
    if entry.automatic:
        assert len(first.losses) == 4


@pytest.mark.parametrize("name", [name for name, entry in ZOO.items() if entry.automatic])
def test_the_loss_falls_on_a_repeated_batch(name):
    entry = ZOO[name]
    loader = entry.loader(batches=1)
    run = train(entry.build(), loader, steps=12)
    assert run.losses[-1] < run.losses[0]


def test_the_gpt2_of_the_zoo_has_its_head_tied_to_its_embedding():
    model = ZOO["gpt2"].build().model
    assert model.lm_head.weight is model.transformer.wte.weight


def test_dropout_changes_the_loss_so_that_replay_tests_mean_something():
    for name in ("gpt2", "t5", "encoder", "vit", "bert_qa", "captioner"):
        entry = ZOO[name]
        batch = entry.batch()
        torch.manual_seed(0)
        module = entry.build(dropout=0.3)
        losses = {float(module.training_step(batch, 0)) for _ in range(2)}
        assert len(losses) == 2, name
