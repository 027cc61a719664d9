"""Configs of Hugging Face models follow what was removed, or say why they do not."""

import copy

import pytest
import torch
from torch import nn

from lightning_memopt.compression.container import load_compressed, save_compressed
from lightning_memopt.compression.structured import prune_structured
from tests.compression.test_structured import MODELS


def _shapes(module):
    return {name: parameter.shape for name, parameter in module.named_parameters()}


@pytest.mark.parametrize("name", ["gpt2", "llama", "bert", "vit"])
def test_a_model_built_from_the_config_of_a_smaller_one_has_its_shapes(name):
    build, call, _ = MODELS[name]
    module = build()
    before = copy.deepcopy(module.config)
    found = prune_structured(module, 0.5, call)
    assert "config" not in found.skipped
    rebuilt = type(module)(module.config)
    assert _shapes(rebuilt) == _shapes(module) and before.to_dict() != module.config.to_dict()
    rebuilt.load_state_dict(module.state_dict())
    torch.testing.assert_close(call(rebuilt.eval()), call(module.eval()))


def test_layers_of_unequal_sizes_leave_the_config_and_are_named():
    build, call, _ = MODELS["bert"]
    module = build()
    before = module.config.to_dict()
    found = prune_structured(module, 0.5, call, include="bert.encoder.layer.0.*")
    assert module.config.to_dict() == before
    assert "bert.encoder.layer" in found.skipped["config"] and "one config" in found.skipped["config"]


class Wrapped(nn.Module):
    def __init__(self):
        super().__init__()
        self.model = MODELS["llama"][0]()


def test_what_is_saved_comes_back_with_the_sizes_in_its_config(tmp_path):
    module = Wrapped()
    prune_structured(module, 0.5, lambda module: MODELS["llama"][1](module.model))
    loaded = load_compressed(save_compressed(module, tmp_path / "net"))
    assert loaded.model.config.hidden_size == module.model.config.hidden_size == 32
    assert loaded.model.config.num_key_value_heads == 1
    assert _shapes(type(loaded.model)(loaded.model.config)) == _shapes(module.model)
