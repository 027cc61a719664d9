"""Folders of exported parts that lie, or that another version wrote, are refused with the reason."""

import json
import shutil

import pytest
import torch
from torch import nn

from lightning_memopt.compression.container import CompressedFileError, load_compressed, save_compressed
from lightning_memopt.compression.exported import quantize_exported


def _make() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Sequential(nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 16)), nn.Linear(16, 48))


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    module, x = _make(), torch.randn(8, 32)
    quantize_exported(module, lambda: module(x))
    return save_compressed(module, tmp_path_factory.mktemp("saved") / "net")


@pytest.fixture
def folder(saved, tmp_path):
    return shutil.copytree(saved, tmp_path / "net")


def _change(folder, change):
    manifest = json.loads((folder / "manifest.json").read_text())
    change(manifest)
    (folder / "manifest.json").write_text(json.dumps(manifest))


def _part(**values):
    return lambda manifest: manifest["exported"]["0"].update(values)


def _called(*args, **kwargs):
    return _part(inputs=[{"tuple": list(args)}, {"dict": kwargs}])


def _tensor(*shape, dtype="float32"):
    return {"tensor": [dtype, list(shape)]}


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (lambda m: m.update(exported=[]), "which are no mapping"),
        (lambda m: m["exported"].update({"2": m["exported"]["0"]}), "`2` of Sequential is no part"),
        (lambda m: m["exported"].update({"": m["exported"]["0"]}), "`` of Sequential is no part"),
        (lambda m: m["exported"].update({"0.0": m["exported"]["0"]}), "`0.0` of Sequential is no part"),
        (lambda m: m["exported"].update({"0": None}), "`0` is exported as None"),
        (_part(inputs=None), "`0` is exported as"),
        (_part(inputs=[1, 2]), "`0` .* does not become the graph"),
        (_part(ranges={}), r"`0` .* does not become the graph .*there are ranges of \[\]"),
        (_part(ranges={"activation_post_process_0": ["0", 1.0]}), "`0` is exported as"),
        (lambda m: _nan(m["exported"]["0"]["ranges"]), "does not become the graph .* is between nan and"),
        (_called(_tensor(8, 31)), "`0` .* does not become the graph"),
        (_called(_tensor(8, 32, dtype="complex64")), "is no argument"),
        (_called(_tensor(8, 32, dtype="object")), "is no argument"),
        (_called(_tensor(-8, 32)), "is no argument"),
        (_called(_tensor(10**12, 10**12)), "does not become the graph"),
        (_called({"run": ["code"]}), "is no argument"),
        (_called(_tensor(8, 32), __class__=1), "does not become the graph"),
        (lambda m: m["exported"].pop("1"), "does not fit Sequential"),
        (lambda m: m["tensors"].pop("0._scale_0"), r"lacks \['0._scale_0'\]"),
        (lambda m: m["tensors"]["0._frozen_param0"].update(shape=[32, 64]), "0._frozen_param0"),
        (lambda m: m["exported"]["0"]["sizes"].update({"0.weight": [10**12, 10**12]}), "0.0.weight.* cannot be cut"),
        (lambda m: m["exported"]["0"]["sizes"].update({"0.weight": [-1, 32]}), "0.0.weight.* cannot be cut"),
        (lambda m: m["exported"]["0"]["sizes"].update({"training": [1]}), "0.training.* cannot be cut"),
        (lambda m: m["exported"]["0"]["sizes"].update({"2.weight": [16, 8]}), "does not become the graph"),
    ],
)  # fmt: skip
def test_records_that_lie(folder, change, match):
    _change(folder, change)
    with pytest.raises(CompressedFileError, match=match):
        load_compressed(folder, _make)


def _nan(ranges):
    ranges["activation_post_process_0"] = [float("nan"), 1.0]


def test_the_type_and_shape_of_a_tensor_must_be_those_of_the_graph(folder):
    def change(manifest):
        # As an attacker would: a tensor that decodes to what its record says.
        manifest["tensors"]["0._zero_point_0"] = {"shape": [64], "dtype": "float32"}
        manifest["edits"]["0"] = {"attributes": {}}

    _change(folder, change)
    with pytest.raises(CompressedFileError, match=r"0\._zero_point_0"):
        load_compressed(folder, _make)


def test_a_graph_that_differs_names_the_versions_that_wrote_it(folder):
    _change(folder, lambda manifest: manifest["versions"].update(torchao="0.1", torch="1.0"))
    load_compressed(folder, _make)  # as long as the graph is the same
    _change(folder, _part(ranges={"another": [0.0, 1.0]}))
    with pytest.raises(CompressedFileError, match=r"written by .*'torch': '1.0', 'torchao': '0.1'.*here are .*torch"):
        load_compressed(folder, _make)


def test_a_part_of_other_layers_is_refused(folder):
    def make():
        module = _make()
        module[0][1] = nn.Linear(64, 64)
        return module

    with pytest.raises(CompressedFileError, match="does not become the graph that was saved"):
        load_compressed(folder, make)


def test_a_part_that_was_made_smaller_before_is_loaded_from_its_class(tmp_path):
    module, x = _make(), torch.randn(8, 32)
    first, last = module[0][0], module[0][2]
    first.weight, first.bias = nn.Parameter(first.weight[:40].clone()), nn.Parameter(first.bias[:40].clone())
    last.weight = nn.Parameter(last.weight[:, :40].clone())
    first.out_features = last.in_features = 40  # as structured pruning leaves it
    quantize_exported(module, lambda: module(x))
    loaded = load_compressed(save_compressed(module, tmp_path / "net"), _make)
    assert torch.equal(loaded(x), module(x)) and loaded[0].source[0].out_features == 40
