"""What is known of devices: exact JSON, collectives that cost what their algorithm sends, errors by name."""

import dataclasses

import pytest

from lightning_memopt.planning.devices import DeviceModel, Link, device_model
from lightning_memopt.planning.known_devices import KNOWN_DEVICES

_ONE_GB = 10**9


@pytest.mark.parametrize("name", KNOWN_DEVICES)
def test_each_shipped_device_is_whole_and_says_where_its_numbers_are_from(name):
    model = device_model(name)
    assert model.name == name and model.source and model.date
    assert model.matmul_flops["float16"] >= model.matmul_flops["float32"] > 10 * model.memory_bandwidth / 4
    assert model.links["intra"].bandwidth >= model.links["inter"].bandwidth
    assert 14 * 2**30 < model.memory_bytes < 192 * 2**30


def test_a_model_is_the_same_after_json():
    model = dataclasses.replace(
        device_model("h100"), links={"intra": Link(1e-5, 1e9, {"all_reduce": ((1024, 1e-4), (2**20, 3e-4))})}
    )
    assert DeviceModel.from_json(model.to_json()) == model


@pytest.mark.parametrize("text", ["{", "[]", "{}", '{"links": 3}'])
def test_what_is_no_device_model_is_refused(text):
    with pytest.raises(ValueError):
        DeviceModel.from_json(text)


def test_spelling_does_not_matter():
    assert device_model("NVIDIA A100_80GB") is device_model("a100-80gb")


def test_an_unknown_name_lists_the_known():
    with pytest.raises(ValueError, match=r"'h900'.*a100-40gb.*rtx4090.*doctor"):
        device_model("h900")


def test_a_name_of_two_devices_asks_which():
    with pytest.raises(ValueError, match="did you mean a100-40gb or a100-80gb"):
        device_model("a100")


def test_an_all_reduce_sends_everything_twice_and_the_others_once():
    link = Link(latency=0.0, bandwidth=1e9)
    assert link.seconds("all_reduce", _ONE_GB, 4) == pytest.approx(1.5)
    assert link.seconds("all_gather", _ONE_GB, 4) == pytest.approx(0.75)
    assert link.seconds("reduce_scatter", _ONE_GB, 4) == pytest.approx(0.75)
    assert link.seconds("send", _ONE_GB, 2) == pytest.approx(1.0)


def test_one_rank_and_nothing_to_send_cost_nothing():
    link = Link(latency=1.0, bandwidth=1.0)
    assert link.seconds("all_reduce", 100, 1) == link.seconds("all_reduce", 0, 8) == 0.0


def test_measured_points_are_met_exactly_and_scaled_to_more_ranks():
    link = Link(9.0, 9.0, {"all_gather": ((1000, 0.1), (10_000, 1.0), (20_000, 1.5))})
    assert link.seconds("all_gather", 10, 2) == pytest.approx(0.1)
    assert link.seconds("all_gather", 10_000, 2) == pytest.approx(1.0)
    assert link.seconds("all_gather", 15_000, 2) == pytest.approx(1.25)
    assert link.seconds("all_gather", 40_000, 2) == pytest.approx(3.0)
    # Of four ranks each receives three quarters instead of a half, over two hops instead of one.
    assert link.seconds("all_gather", 10_000, 4) == pytest.approx(2 * 0.1 + 1.5 * 0.9)


def test_across_nodes_the_network_links_of_a_node_work_together():
    model = dataclasses.replace(device_model("h100"), links={"intra": Link(0.0, 450e9), "inter": Link(0.0, 50e9)})
    one_each = model.collective_seconds("all_gather", _ONE_GB, ranks=4, nodes=4)
    eight_each = model.collective_seconds("all_gather", _ONE_GB, ranks=32, nodes=4)
    within = model.collective_seconds("all_gather", _ONE_GB, ranks=32)
    assert one_each == pytest.approx(0.75 / 50)
    assert eight_each == pytest.approx(31 / 32 / 400)
    assert within == pytest.approx(31 / 32 / 450)
