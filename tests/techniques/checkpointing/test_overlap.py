"""What recomputes already is not recomputed a second time."""

import copy

import pytest
from torch import nn

from lightning_memopt.techniques.checkpointing import checkpoint_activations
from tests.zoo import ZOO


def _net():
    return nn.Sequential(*(nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4)) for _ in range(3)))


@pytest.mark.parametrize(
    ("first", "second"),
    [("0", "0"), ("0", "0.2"), ("0.2", "0"), ("[01]", "[12]")],
    ids=["same", "inside", "around", "one in common"],
)
def test_a_block_that_overlaps_a_checkpointed_one_is_refused_by_name_and_left_alone(first, second):
    net = _net()
    with checkpoint_activations(net, "full", modules=first):
        patched = {name for name, module in net.named_modules() if "forward" in vars(module)}
        with pytest.raises(ValueError, match=r"cannot be recomputed, because \S+ already is.*modules="):
            checkpoint_activations(net, "selective", modules=second)
        assert {name for name, module in net.named_modules() if "forward" in vars(module)} == patched


def test_segments_of_a_checkpointed_sequential_are_refused():
    net = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4), nn.Tanh())
    with checkpoint_activations(net), pytest.raises(ValueError, match=r"\[0:2\] cannot be recomputed"):
        checkpoint_activations(net)


def test_disjoint_blocks_may_have_two_policies_and_a_block_can_be_checkpointed_again_later():
    net = _net()
    with (
        checkpoint_activations(net, "full", modules="0"),
        checkpoint_activations(net, "selective", modules="[12]") as other,
    ):
        assert other.names == ["1", "2"]
    with checkpoint_activations(net, "full"):
        copied = copy.deepcopy(net)
        with pytest.raises(ValueError, match="already is"):
            checkpoint_activations(copied, "full")


@pytest.mark.parametrize("name", ["gpt2", "t5"])
def test_a_hugging_face_model_that_checkpoints_by_itself_is_refused_until_that_is_off(name):
    module = ZOO[name].build()
    module.model.gradient_checkpointing_enable()
    with pytest.raises(ValueError, match=r"gradient_checkpointing_enable\(\)"):
        checkpoint_activations(module)
    module.model.gradient_checkpointing_disable()
    checkpoint_activations(module).remove()
