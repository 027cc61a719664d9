"""Damaged and malicious folders are refused with the reason, and nothing else happens."""

import hashlib
import json
import struct

import pytest
import torch
from torch import nn

from lightning_memopt.compression.container import CompressedFileError, load_compressed, save_compressed
from lightning_memopt.compression.packed import Int8Weight, NF4Weight


def _make() -> nn.Module:
    return nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64))


@pytest.fixture
def folder(tmp_path):
    module = _make()
    module[0].weight = nn.Parameter(Int8Weight.pack(module[0].weight), requires_grad=False)
    module[1].weight = nn.Parameter(NF4Weight.pack(module[1].weight), requires_grad=False)
    return save_compressed(module, tmp_path / "net")


def _change(folder, change):
    manifest = json.loads((folder / "manifest.json").read_text())
    change(manifest)
    (folder / "manifest.json").write_text(json.dumps(manifest))


def _rewrite_weights(folder, content: bytes):
    """As an attacker would: with the size and the checksum right."""
    (folder / "weights.safetensors").write_bytes(content)
    described = {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    _change(folder, lambda manifest: manifest["files"].update({"weights.safetensors": described}))


def _refused(folder, match):
    with pytest.raises(CompressedFileError, match=match):
        load_compressed(folder, _make)


def test_the_folder_of_these_tests_loads_as_it_is(folder):
    assert load_compressed(folder, _make)(torch.randn(2, 64)).shape == (2, 64)


def test_files_that_are_missing_or_truncated_or_altered(folder, tmp_path):
    weights = folder / "weights.safetensors"
    content = weights.read_bytes()
    weights.write_bytes(content[:-10])
    _refused(folder, "its size or its checksum is another")
    weights.write_bytes(content[:-10] + b"0123456789")
    _refused(folder, "its size or its checksum is another")
    weights.unlink()
    _refused(folder, "has no weights.safetensors")
    _refused(tmp_path / "nowhere", "has no manifest.json")


@pytest.mark.parametrize(
    "text", ["", "{", "[]", '"text"', "[" * 100_000, '{"format": 1}', '{"format": 1, "tensors": 3}']
)
def test_a_manifest_that_is_none(folder, text):
    (folder / "manifest.json").write_text(text)
    _refused(folder, "manifest")


def test_another_version_is_named_with_what_wrote_it(folder):
    _change(folder, lambda manifest: manifest.update(format=2))
    _refused(folder, r"has format 2 and this version reads format 1.*torch")


@pytest.mark.parametrize("name", ["../weights.safetensors", "/etc/passwd", "other.safetensors"])
def test_files_that_a_manifest_names_elsewhere_are_not_read(folder, name):
    _change(folder, lambda manifest: manifest.update(files={name: {"bytes": 1, "sha256": ""}}))
    _refused(folder, "names the files")


def test_links_out_of_the_folder_are_not_followed(folder, tmp_path):
    outside = (folder / "weights.safetensors").rename(tmp_path / "outside")
    (folder / "weights.safetensors").symlink_to(outside)
    _refused(folder, "leads out of its folder")


@pytest.mark.parametrize("length", [2**63, 10**9, 10_000])
def test_a_header_that_is_longer_than_the_file(folder, length):
    _rewrite_weights(folder, struct.pack("<Q", length) + b"{}")
    _refused(folder, "has a header that is longer than the file")


def test_a_header_that_is_no_header(folder):
    _rewrite_weights(folder, struct.pack("<Q", 4) + b"true")
    _refused(folder, "no valid file of tensors")
    _rewrite_weights(folder, b"")
    _refused(folder, "header")


def _in(name, **values):
    return lambda manifest: manifest["tensors"][name].update(values)


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (_in("0.bias", encoding="zip"), "0.bias"),
        (_in("0.bias", shape=[128]), r"`0.bias` has shape \[128\] in the folder and \[64\]"),
        (_in("0.bias", shape=[-1]), "`0.bias` has no shape"),
        (_in("0.bias", shape=[10**18, 10**18]), "`0.bias` has shape"),
        (_in("0.bias", dtype="float16"), "0.bias"),
        (_in("0.bias", dtype="PyObject"), "0.bias"),
        (_in("0.bias", encoding="codebook", tensors=["nothing"]), "0.bias"),
        (_in("0.bias", encoding="codebook", tensors=None), "0.bias"),
        (_in("0.weight", packed="pickle"), "packed as 'pickle'"),
        (_in("0.weight", parts={}), "0.weight"),
        (_in("0.weight", attributes={}), "0.weight"),
        (_in("0.weight", attributes={"inputs": "yes"}), "its parts are not"),
        (lambda m: _in("0.weight", packed="nf4")(m), "0.weight"),
        (lambda m: m["tensors"]["1.weight"]["parts"]["absmax"].update(shape=[1]), "1.weight"),
        (lambda m: m["tensors"]["1.weight"]["parts"]["absmax"].update(shape=[10**12]), "1.weight"),
        (lambda m: m["tensors"].pop("0.bias"), r"lacks \['0.bias'\]"),
        (lambda m: m["tensors"].update({"__class__": {}}), "does not fit"),
        (lambda m: m["ties"].update({"0.bias": "__dict__"}), "does not fit"),
        (lambda m: m["ties"].update({"0.bias": ["1.bias"]}), "does not fit"),
        (lambda m: m["tensors"].pop("0.bias") and m["ties"].update({"0.bias": "1.weight"}), "`0.bias` has shape"),
        (lambda m: m["edits"].update({"0": {"attributes": {"_parameters": 1}}}), "not a plain attribute"),
        (lambda m: m["edits"].update({"0": {"attributes": {"in_features": [1]}}}), "no plain value"),
        (lambda m: m["edits"].update({"0": {"attributes": {"forward": 1}}}), "`0.forward` is not a plain attribute"),
        (lambda m: m["edits"].update({"0": {"run": "code"}}), "does not know"),
        (lambda m: m["edits"].update({"9": {"attributes": {}}}), "has no module `9`"),
    ],
)  # fmt: skip
def test_records_that_lie(folder, change, match):
    _change(folder, change)
    _refused(folder, match)


def test_a_constant_tensor_cannot_be_unpacked_into_more_memory_than_the_module_has(tmp_path):
    module = _make()
    nn.init.zeros_(module[0].weight)
    folder = save_compressed(module, tmp_path / "net")
    _change(folder, _in("0.weight", shape=[2**20, 2**20]))
    _change(folder, lambda m: m["edits"].update({"0": {"attributes": {}}}))
    _refused(folder, r"`0.weight` has shape \[1048576, 1048576\]")


@pytest.mark.parametrize(
    ("path", "match"),
    [
        ("os:system", "no class of nn.Module"),
        ("builtins:dict", "no class of nn.Module"),
        ("nowhere.at.all:Net", "cannot be imported"),
        ("torch.nn:Linear.forward.__globals__", "cannot be imported"),
        ("torch.nn", "cannot be imported"),
        (None, "cannot be imported"),
        ("torch.nn:Linear", "cannot be built from its hyper-parameters"),
    ],
)
def test_what_is_no_class_of_modules_is_not_called(folder, path, match):
    _change(folder, lambda manifest: manifest.update({"class": path}))
    with pytest.raises(CompressedFileError, match=match):
        load_compressed(folder)


@pytest.mark.parametrize("units", [[8], {"0": "many"}, {"0": 0}, {"0": True}])
def test_first_widths_that_are_no_numbers(folder, units):
    _change(folder, lambda manifest: manifest.update(units=units))
    _refused(folder, "which are no numbers")


@pytest.mark.parametrize("types", [["float16"], {"0.bias": "float16"}, {"5.x": "float16"}, {"0.x": [1]}])
def test_types_of_buffers_that_are_not_there_or_no_types(folder, types):
    _change(folder, lambda manifest: manifest.update(types=types))
    _refused(folder, "is no buffer that can")


@pytest.mark.parametrize("name", ["weight", "bias"])
def test_an_attribute_that_would_take_the_place_of_a_tensor(folder, name):
    _change(folder, lambda manifest: manifest["edits"].update({"0": {"attributes": {name: 1}}}))
    _refused(folder, f"`0.{name}` is not a plain attribute")
