"""What is measured of this machine is plausible, kept, and measured again when it no longer holds."""

import dataclasses
import json

import pytest
import torch

from lightning_memopt.planning import calibrate, device_cache, operator_rates
from lightning_memopt.planning.devices import DeviceModel


@pytest.fixture(scope="module")
def measured() -> DeviceModel:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(operator_rates, "_SECONDS_EACH", 0.01)
        return calibrate.measure_device()


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(device_cache.sys, "platform", "linux")
    device_cache._measured_once.cache_clear()
    yield tmp_path / "lightning_memopt" / "devices.json"
    device_cache._measured_once.cache_clear()


def test_what_is_measured_is_of_the_right_size(measured):
    assert measured.name == calibrate.device_name()
    assert measured.memory_bytes > 2**30
    assert measured.matmul_flops["float32"] > 1e8
    assert 1e8 < measured.memory_bandwidth < 1e13
    assert 1e-7 < measured.operator_overhead < 0.05
    again = measured.recompute_overheads
    assert measured.operator_overhead < again["full"] < again["selective"] < 0.1  # which looks at each call
    assert 0 < measured.micro_batch_overhead < 0.1


def test_operators_of_language_and_image_models_have_rates_of_their_own(measured):
    for name in ("mm", "addmm", "native_layer_norm", "gelu_backward", "convolution_backward", "native_batch_norm"):
        assert measured.operator_rates[f"aten.{name} float32"] > 0


def test_measuring_leaves_the_random_numbers_alone(monkeypatch):
    torch.manual_seed(3)
    expected = torch.rand(3)
    torch.manual_seed(3)
    monkeypatch.setattr(operator_rates, "_SECONDS_EACH", 0.0)
    with calibrate._undisturbed(torch.device("cpu")):
        operator_rates.operator_rates(torch.device("cpu"))
    assert torch.equal(torch.rand(3), expected)


def test_what_was_kept_is_read_and_not_measured_again(measured, cache, monkeypatch):
    assert device_cache.keep_device(measured) == cache
    monkeypatch.setattr(device_cache, "measure_device", lambda: pytest.fail("measured again"))
    assert device_cache.this_device() == measured


def test_a_process_measures_once_where_nothing_was_kept(measured, cache, monkeypatch):
    monkeypatch.setattr(device_cache, "measure_device", lambda: measured)
    assert device_cache.this_device() is measured
    monkeypatch.setattr(device_cache, "measure_device", lambda: pytest.fail("measured again"))
    assert device_cache.this_device() is measured
    assert not cache.exists()


def test_another_device_or_version_is_measured_anew(measured, cache, monkeypatch):
    anew = dataclasses.replace(measured, memory_bytes=5)
    monkeypatch.setattr(device_cache, "measure_device", lambda: anew)
    device_cache.keep_device(dataclasses.replace(measured, source="measured with torch 1.0"))
    assert device_cache.this_device() is anew
    device_cache.keep_device(dataclasses.replace(measured, name="another device"))
    assert device_cache.this_device() is anew
    assert set(json.loads(cache.read_text())) == {measured.name, "another device"}


@pytest.mark.parametrize("text", ["", "{", "[]", '{"%s": "{}"}', '{"%s": 3}'])
def test_a_damaged_cache_is_as_good_as_none_and_is_written_over(measured, cache, monkeypatch, text):
    cache.parent.mkdir()
    cache.write_text(text.replace("%s", measured.name))
    assert device_cache.cached_device() is None
    device_cache.keep_device(measured)
    assert device_cache.cached_device() == measured


@pytest.mark.parametrize(
    ("platform", "variable", "tail"),
    [("darwin", "HOME", "Library/Caches"), ("win32", "LOCALAPPDATA", ""), ("linux", "HOME", ".cache")],
)
def test_each_platform_has_its_own_folder_of_caches(tmp_path, monkeypatch, platform, variable, tail):
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setenv(variable, str(tmp_path))
    monkeypatch.setattr(device_cache.sys, "platform", platform)
    assert device_cache.cache_file() == tmp_path / tail / "lightning_memopt" / "devices.json"
