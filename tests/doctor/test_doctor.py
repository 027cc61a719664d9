"""``lightning-memopt doctor`` says what is here, measures it once, and takes what goes wrong for a finding."""

import dataclasses
import json

import pytest

from lightning_memopt.cli import main
from lightning_memopt.doctor import links
from lightning_memopt.planning import calibrate, device_cache
from lightning_memopt.planning.devices import Link, device_model

_POINTS = {"all_reduce": ((4096, 1e-4), (2**20, 1e-3)), "send": ((4096, 1e-4), (2**20, 5e-4))}
_LINKS = {"intra": Link(1e-4, 2e9, _POINTS), "inter": Link(1e-3, 1e8)}


@pytest.fixture
def counted(tmp_path, monkeypatch):
    """Measurements that take no time, counted."""
    calls = []

    def measure(given=None):
        calls.append(given)
        model = dataclasses.replace(device_model("t4"), name=calibrate.device_name(), source=calibrate.source())
        return dataclasses.replace(model, links=given or model.links)

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(device_cache.sys, "platform", "linux")
    monkeypatch.setattr(calibrate, "measure_device", measure)
    monkeypatch.setattr(links, "measure_links", lambda: _LINKS)
    return calls


def _json(capsys, *options: str):
    assert main(["doctor", "--json", *options]) == 0
    return json.loads(capsys.readouterr().out)


def test_everything_is_said_as_json(counted, capsys):
    said = _json(capsys)
    assert said["versions"]["torch"] and said["devices"][0]["kind"] == "cpu"
    assert said["abilities"]["several processes by gloo"] is True
    assert said["measured"]["links"]["intra"]["measured"]["send"][1] == [2**20, 5e-4]
    assert said["notes"] == []


def test_a_second_run_reads_what_the_first_measured_until_it_is_told_to_refresh(counted, capsys):
    first, second = _json(capsys), _json(capsys)
    assert first == second and len(counted) == 1
    _json(capsys, "--refresh")
    assert len(counted) == 2
    assert device_cache.this_device().links["intra"].measured == _POINTS


def test_people_get_a_table(counted, capsys):
    assert main(["doctor"]) == 0
    said = capsys.readouterr().out
    assert "Installed: lightning_memopt" in said and "all_reduce of two" in said and "65000.0 GFLOP/s" in said


def test_links_that_cannot_be_measured_are_a_note(counted, capsys, monkeypatch):
    def fail():
        raise ValueError("no gloo here")

    monkeypatch.setattr(links, "measure_links", fail)
    said = _json(capsys)
    assert "no gloo here" in said["notes"][0] and counted == [None]


def test_a_cache_that_cannot_be_written_is_a_note(counted, capsys, monkeypatch, tmp_path):
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert "could not be kept" in _json(capsys)["notes"][0]


@pytest.mark.slow
def test_collectives_between_two_processes_are_timed():
    found = links.measure_links()["intra"]
    assert set(found.measured) == {"all_reduce", "all_gather", "reduce_scatter", "all_to_all", "broadcast", "send"}
    for points in found.measured.values():
        assert points[-1][1] > points[0][1] > 0
    assert 1e7 < found.bandwidth < 1e12


def test_processes_that_fail_say_why(monkeypatch):
    monkeypatch.setattr(links, "__name__", "lightning_memopt.no_such_module")
    with pytest.raises(ValueError, match=r"cannot communicate: .*no_such_module"):
        links.measure_links()
