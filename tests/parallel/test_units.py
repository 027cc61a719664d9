"""What is sharded together, read off models without any process group."""

import pytest
import torch
from torch import nn

from lightning_memopt.parallel.agreement import find_batch_norms, gather_values
from lightning_memopt.parallel.units import (
    check_can_shard,
    find_independent_children,
    find_odd_modules,
    find_shard_units,
)
from tests.zoo import ZOO


@pytest.mark.parametrize(
    ("name", "count"), [("gpt2", 3), ("t5", 4), ("captioner", 4), ("encoder", 3), ("mlp", 0), ("lstm", 0)]
)
def test_each_block_of_each_stack_is_a_unit(name, count):
    assert len(find_shard_units(ZOO[name].build())) == count


def test_a_block_tied_to_something_outside_it_stays_with_the_rest():
    encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2), num_layers=3)
    model = nn.ModuleDict({"encoder": encoder, "head": nn.Linear(8, 8)})
    model["head"].weight = encoder.layers[1].self_attn.out_proj.weight
    assert find_shard_units(model) == [encoder.layers[0], encoder.layers[2]]


def test_a_block_registered_twice_stays_with_the_rest():
    first, second = (nn.TransformerEncoderLayer(8, 2) for _ in range(2))
    model = nn.ModuleDict({"layers": nn.ModuleList([first, second]), "again": first})
    assert find_shard_units(model) == [second]


def test_children_that_share_nothing_are_independent_and_those_without_parameters_left_out():
    model = nn.ModuleDict({"a": nn.Linear(2, 2), "act": nn.ReLU(), "b": nn.Linear(2, 2)})
    assert find_independent_children(model) == [model["a"], model["b"]]


def test_in_place_of_a_container_which_is_never_called_there_are_its_children():
    nets = nn.ModuleList([nn.Linear(2, 2), nn.ModuleDict({"deep": nn.Linear(2, 2)})])
    model = nn.ModuleDict({"nets": nets, "head": nn.Linear(2, 2)})
    assert find_independent_children(model) == [nets[0], nets[1]["deep"], model["head"]]
    model.register_parameter("scale", nn.Parameter(torch.ones(())))  # is not sharded
    assert len(find_independent_children(model)) == 3
    nets.append(nn.ParameterList([torch.ones(1)]))
    with pytest.raises(ValueError, match=r"`nets.2.0` is registered on `nets.2`, which is never called"):
        find_independent_children(model)


def test_a_parameter_without_values_is_refused_by_name():
    with pytest.raises(ValueError, match="`weight` is on the meta device"):
        check_can_shard(nn.Linear(2, 2, device="meta"))


def test_modules_of_the_rarer_dtype_are_sharded_apart():
    block = nn.Sequential(nn.LayerNorm(4), nn.Linear(4, 4), nn.Linear(4, 4)).bfloat16()
    block[0].float()
    assert find_odd_modules(block) == [block[0]]
    assert find_odd_modules(nn.ModuleList([block]), inner=[block]) == []
    block[1].float().requires_grad_(False)  # frozen parameters have no gradients to reduce
    assert find_odd_modules(block) == [block[0]]


def test_around_a_module_that_has_parameters_of_a_rarer_dtype_itself_the_others_are_sharded_apart():
    block = nn.Sequential(nn.Linear(4, 4), nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4))).bfloat16()
    block[1].scale = nn.Parameter(torch.ones(4))
    assert find_odd_modules(block) == [block[1][0], block[1][1], block[1]]
    assert find_odd_modules(block[1]) == [block[1][0], block[1][1]]
    block[0].weight = block[1][0].weight
    with pytest.raises(ValueError, match=r"`1` stores trainable parameters in torch.float32 next to, or tied"):
        find_odd_modules(block)


def test_a_module_that_mixes_dtypes_is_refused_by_name():
    block = nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4))
    block[1].bias.data = block[1].bias.bfloat16()
    with pytest.raises(ValueError, match=r"`1` stores trainable parameters in torch.float32 next to"):
        find_odd_modules(block)


def test_norms_that_take_statistics_of_a_batch_are_found_by_name_but_not_synchronized_ones():
    norms = nn.BatchNorm1d(2), nn.LayerNorm(2), nn.SyncBatchNorm(2), nn.InstanceNorm1d(2)
    model = nn.Sequential(*norms, nn.InstanceNorm1d(2, track_running_stats=True))
    assert find_batch_norms(model) == ["0", "4"]


def test_without_a_process_group_there_is_one_value():
    assert gather_values(3) == [3]
