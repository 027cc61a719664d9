"""What is saved comes back: any module of the zoo, packed, sparse, shrunk or tied."""

import json
import os
import shutil

import lightning.pytorch as pl
import pytest
import torch
from torch import nn

from lightning_memopt import load_compressed
from lightning_memopt.compression.container import CompressedFileError, save_compressed
from lightning_memopt.compression.container.destination import check_destination, check_types
from lightning_memopt.compression.packed import HalfWeight, Int4Weight, Int8Weight, NF4Weight
from tests.zoo import ZOO, cases


class Net(pl.LightningModule):
    """Built from hyper-parameters, with a tied head and a buffer."""

    def __init__(self, width: int = 64, sizes: tuple = (3, 4), scale: float = 1.0) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.embed = nn.Embedding(50, width)
        self.hidden = nn.Sequential(nn.Linear(width, width), nn.BatchNorm1d(width), nn.ReLU())
        self.head = nn.Linear(width, 50, bias=False)
        self.head.weight = self.embed.weight
        self.register_buffer("steps", torch.zeros((), dtype=torch.long))
        self.register_buffer("positions", torch.arange(width), persistent=False)

    def forward(self, x):
        return self.head(self.hidden(self.embed(x)))


class TakesAModule(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner


def _bytes(folder):
    return sum(file.stat().st_size for file in folder.iterdir())


@pytest.mark.parametrize("name", cases())
def test_every_module_of_the_zoo_comes_back_bit_for_bit(name, tmp_path):
    module = ZOO[name].build()
    if name == "late_mlp":
        module.configure_model()
    loaded = load_compressed(save_compressed(module, tmp_path / "net"), ZOO[name].build)
    expected = module.state_dict()
    assert list(loaded.state_dict()) == list(expected)
    for key, value in loaded.state_dict().items():
        assert torch.equal(value, expected[key]) and value.dtype == expected[key].dtype
    assert not loaded.training


def test_a_module_that_saves_its_hyper_parameters_is_built_from_the_folder_alone(tmp_path):
    module = Net(width=32, scale=0.5).eval()
    loaded = load_compressed(save_compressed(module, tmp_path / "net"))
    assert type(loaded) is Net and loaded.hparams == {"width": 32, "sizes": (3, 4), "scale": 0.5}
    assert loaded.head.weight is loaded.embed.weight
    assert loaded.hidden[0].weight.requires_grad
    x = torch.randint(0, 50, (4,))
    assert torch.equal(loaded(x), module(x))


class Rotated(pl.LightningModule):
    """Adds angles that no file holds, and that have the type that the module is converted to."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.layer = nn.Linear(width, width)
        self.register_buffer("angles", torch.arange(width) / 3, persistent=False)
        self.register_buffer("exact", torch.arange(width) / 3, persistent=False)

    def forward(self, x):
        return self.layer(x + self.angles)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("make", [None, Rotated])
def test_buffers_without_a_file_have_the_type_that_the_module_was_converted_to(dtype, make, tmp_path):
    module = Rotated().to(dtype).eval()
    module.exact = module.exact.float()
    loaded = load_compressed(save_compressed(module, tmp_path / "net"), make)
    assert (loaded.angles.dtype, loaded.exact.dtype) == (dtype, torch.float32)
    x = torch.randn(2, 8, dtype=dtype)
    torch.testing.assert_close(loaded(x), module(x), rtol=0, atol=0 if dtype != torch.float64 else 1e-7)


def test_the_manifest_says_nothing_of_types_that_the_constructor_gives(tmp_path):
    save_compressed(Rotated(), tmp_path / "net")
    assert "types" not in json.loads((tmp_path / "net" / "manifest.json").read_text())


class Counting(nn.Module):
    """Keeps something beside its tensors."""

    def __init__(self, kept=None) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)
        self._kept = kept

    def get_extra_state(self):
        return self._kept

    def set_extra_state(self, state):
        self._kept = state


@pytest.mark.parametrize("kept", [{"range": (0.5, 2), "names": ["a", "b"], "none": None}, None, 3])
def test_extra_state_comes_back(kept, tmp_path):
    module = nn.Sequential(Counting(kept))
    loaded = load_compressed(save_compressed(module, tmp_path / "net"), lambda: nn.Sequential(Counting("other")))
    assert loaded[0].get_extra_state() == kept


@pytest.mark.parametrize("kept", [{"x": torch.ones(3)}, b"bytes", {1: 2}, float("nan")])
def test_extra_state_that_json_cannot_hold_is_refused_by_name_and_before_training_too(kept, tmp_path):
    module = nn.Sequential(Counting(kept))
    for check in (check_types, lambda module: save_compressed(module, tmp_path / "net")):
        with pytest.raises(ValueError, match=r"`0` \(Counting\) has a get_extra_state\(\) that is not plain"):
            check(module)
    assert not (tmp_path / "net").exists()


def test_extra_state_that_is_not_that_of_the_module_is_refused(tmp_path):
    save_compressed(nn.Sequential(Counting(1)), tmp_path / "net")
    with pytest.raises(CompressedFileError, match=r"extra state of \['0'\]"):
        load_compressed(tmp_path / "net", nn.Sequential(nn.ModuleDict({"layer": nn.Linear(4, 4)})))


@pytest.mark.parametrize(
    ("cls", "options", "part"),
    [(Int8Weight, {}, 0.32), (Int4Weight, {}, 0.25), (NF4Weight, {}, 0.24), (HalfWeight, {"kind": "bf16"}, 0.55)],
)
def test_packed_and_tied_weights_come_back_packed_and_tied_and_small(cls, options, part, tmp_path):
    module = Net(width=256).eval()
    dense = _bytes(save_compressed(module, tmp_path / "dense"))
    for layer in (module.embed, module.hidden[0]):
        layer.weight = nn.Parameter(cls.pack(layer.weight, **options), requires_grad=False)
    module.head.weight = module.embed.weight
    folder = save_compressed(module, tmp_path / "packed")
    loaded = load_compressed(folder)
    assert type(loaded.head.weight) is cls and loaded.head.weight is loaded.embed.weight
    x = torch.randint(0, 50, (4,))
    assert torch.equal(loaded(x), module(x))
    assert _bytes(folder) < part * dense


def test_a_sparse_module_is_small_on_disk_and_exact(tmp_path):
    module = nn.Linear(512, 512)
    dense = _bytes(save_compressed(module, tmp_path / "dense"))
    with torch.no_grad():
        module.weight[torch.rand(512, 512) < 0.8] = 0
    folder = save_compressed(module, tmp_path / "sparse")
    assert _bytes(folder) < 0.25 * dense
    assert torch.equal(load_compressed(folder, nn.Linear(512, 512)).weight, module.weight)


@pytest.mark.parametrize("given", [None, lambda: Net(64)])
def test_a_shrunk_module_loads_without_what_shrank_it(given, tmp_path):
    module = Net(width=64).eval()
    first, norm = module.hidden[0], module.hidden[1]
    keep = torch.arange(0, 64, 2)
    module.hidden[0] = nn.Linear(64, 32)
    module.hidden[0].load_state_dict({"weight": first.weight[keep], "bias": first.bias[keep]})
    module.hidden[1] = nn.BatchNorm1d(32).eval()
    module.hidden[1].running_mean.copy_(norm.running_mean[keep])
    module.hidden.append(nn.Identity())
    del module.hidden[3]
    module.head = nn.Linear(32, 50, bias=False)
    loaded = load_compressed(save_compressed(module, tmp_path / "net"), given)
    assert loaded.hidden[0].out_features == loaded.hidden[1].num_features == loaded.head.in_features == 32
    x = torch.randint(0, 50, (4,))
    assert torch.equal(loaded(x), module(x))


def test_saving_over_an_older_folder_replaces_it_and_a_foreign_folder_is_refused(tmp_path):
    save_compressed(nn.Linear(4, 2), tmp_path / "net")
    newer = nn.Linear(4, 2)
    save_compressed(newer, tmp_path / "net")
    assert torch.equal(load_compressed(tmp_path / "net", nn.Linear(4, 2)).weight, newer.weight)
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "thesis.txt").write_text("all of it")
    with pytest.raises(ValueError, match="holds something else"):
        save_compressed(newer, tmp_path / "home")
    assert [file.name for file in (tmp_path / "home").iterdir()] == ["thesis.txt"]
    assert sorted(file.name for file in tmp_path.iterdir()) == ["home", "net"]


def test_a_module_that_json_cannot_describe_asks_for_one_to_load_into(tmp_path):
    module = TakesAModule(nn.Linear(4, 2))
    folder = save_compressed(module, tmp_path / "net")
    with pytest.raises(CompressedFileError, match=r"TakesAModule cannot be built .* `load_compressed\(path, module="):
        load_compressed(folder)
    loaded = load_compressed(folder, lambda: TakesAModule(nn.Linear(4, 2)))
    assert torch.equal(loaded.inner.weight, module.inner.weight)


def test_the_wrong_module_is_refused_by_what_differs(tmp_path):
    folder = save_compressed(nn.Sequential(nn.Linear(4, 2)), tmp_path / "net")
    with pytest.raises(CompressedFileError, match=r"lacks \['1.bias', '1.weight'\]"):
        load_compressed(folder, nn.Sequential(nn.Linear(4, 2), nn.Linear(2, 2)))
    with pytest.raises(CompressedFileError, match=r"`0.weight` has shape \[2, 4\] in the folder and \[2, 3\]"):
        load_compressed(folder, nn.Sequential(nn.Linear(3, 2)))


def test_a_lazy_module_is_asked_to_see_a_batch_first(tmp_path):
    module = nn.Sequential(nn.LazyLinear(4))
    module(torch.ones(1, 3))
    save_compressed(module, tmp_path / "net")
    with pytest.raises(CompressedFileError, match=r"`0\.weight` of Sequential has no shape before it has seen"):
        load_compressed(tmp_path / "net", lambda: nn.Sequential(nn.LazyLinear(4)))
    other = nn.Sequential(nn.LazyLinear(4))
    other(torch.ones(1, 3))
    assert torch.equal(load_compressed(tmp_path / "net", other)(torch.ones(1, 3)), module(torch.ones(1, 3)))


def test_a_tensor_of_a_foreign_class_is_refused_when_it_is_saved(tmp_path):
    class Foreign(torch.Tensor):
        pass

    module = nn.Linear(4, 2)
    module.register_buffer("odd", torch.zeros(2).as_subclass(Foreign))
    with pytest.raises(ValueError, match="`odd` is a Foreign"):
        save_compressed(module, tmp_path / "net")
    assert not list(tmp_path.iterdir())


def test_the_manifest_names_versions_and_no_paths(tmp_path):
    manifest = json.loads((save_compressed(Net(), tmp_path / "net") / "manifest.json").read_text())
    assert manifest["versions"]["torch"] == torch.__version__
    assert str(tmp_path) not in json.dumps(manifest)
    assert manifest["ties"] == {"head.weight": "embed.weight"}


class Remembering(nn.Linear):
    """What it remembers is nothing before it trains."""

    def __init__(self) -> None:
        super().__init__(4, 4)
        self.best = None


def test_a_number_that_was_none_before_training_comes_back(tmp_path):
    module = Remembering()
    module.best = 3
    assert load_compressed(save_compressed(module, tmp_path / "net")).best == 3


def test_dense_tensors_are_read_by_anything_that_reads_safetensors_under_the_names_that_they_have(tmp_path):
    from safetensors.torch import load_file

    module = Net(width=64)
    module.hidden[0].weight = nn.Parameter(Int8Weight.pack(module.hidden[0].weight), requires_grad=False)
    stored = load_file(save_compressed(module, tmp_path / "net") / "weights.safetensors")
    assert torch.equal(stored["embed.weight"], module.embed.weight)
    assert stored["hidden.0.weight/values"].dtype == torch.int8


def test_two_tensors_that_would_have_one_name_in_the_file_are_refused(tmp_path):
    module = nn.Module()
    module.register_buffer("ones", torch.ones(4096))
    module.register_buffer("ones/values", torch.randn(16))
    with pytest.raises(ValueError, match="`ones/values` is the name of two tensors"):
        save_compressed(module, tmp_path / "net")


@pytest.mark.parametrize("save", [lambda path: save_compressed(nn.Linear(4, 2), path), check_destination])
def test_a_folder_with_anything_that_would_be_lost_is_refused_by_the_name_of_it(tmp_path, save):
    foreign, own = tmp_path / "app", save_compressed(nn.Linear(4, 2), tmp_path / "net")
    foreign.mkdir()
    (foreign / "manifest.json").write_text('{"name": "my web app", "format": 1}')
    (own / "README.md").write_text("of the user")
    for folder, name in ((foreign, "manifest.json"), (own, "README.md")):
        with pytest.raises(ValueError, match=f"holds something else .* {name}"):
            save(folder)
        assert (folder / name).exists()


def test_a_folder_that_cannot_be_removed_to_its_end_loses_nothing_of_what_takes_its_place(tmp_path, monkeypatch):
    folder, remove = save_compressed(nn.Linear(4, 2), tmp_path / "net"), shutil.rmtree

    def fails_midway(path, ignore_errors=False):
        if path.exists():
            next(path.iterdir()).unlink()
        if not ignore_errors:
            raise OSError("Directory not empty")

    monkeypatch.setattr(shutil, "rmtree", fails_midway)
    module = nn.Linear(4, 2)
    save_compressed(module, folder)
    assert torch.equal(load_compressed(folder, nn.Linear(4, 2)).weight, module.weight)
    monkeypatch.setattr(shutil, "rmtree", remove)
    save_compressed(module, folder)
    assert [file.name for file in tmp_path.iterdir()] == ["net"]


def test_a_folder_whose_successor_cannot_take_its_place_stays(tmp_path, monkeypatch):
    older, moves = nn.Linear(4, 2), os.replace
    folder = save_compressed(older, tmp_path / "net")

    def fails_for_the_new_one(source, target):
        if source.name.endswith(".saving"):
            raise OSError("Input/output error")
        moves(source, target)

    monkeypatch.setattr(os, "replace", fails_for_the_new_one)
    with pytest.raises(OSError, match="Input/output error"):
        save_compressed(nn.Linear(4, 2), folder)
    assert [file.name for file in tmp_path.iterdir()] == ["net"]
    assert torch.equal(load_compressed(folder, nn.Linear(4, 2)).weight, older.weight)


def test_a_link_to_a_folder_stays_and_leads_to_what_is_saved(tmp_path):
    link = tmp_path / "latest"
    link.symlink_to(save_compressed(nn.Linear(4, 2), tmp_path / "net"))
    check_destination(link)
    module = nn.Linear(3, 2)
    loaded = load_compressed(save_compressed(module, link), nn.Linear(3, 2))
    assert link.is_symlink() and torch.equal(loaded.weight, module.weight)


def test_the_working_directory_is_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match="working directory"):
        save_compressed(nn.Linear(4, 2), ".")


class Activated(pl.LightningModule):
    """Has an activation that no hyper-parameters tell of."""

    def __init__(self, activation: type[nn.Module] = nn.ReLU) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(4, 4), activation())


def test_a_module_built_with_arguments_that_were_not_saved_is_not_rebuilt_as_another(tmp_path):
    folder = save_compressed(Activated(nn.Tanh), tmp_path / "net")
    with pytest.raises(CompressedFileError, match=r"builds ReLU as `net.1`, where the saved one had Tanh.*module="):
        load_compressed(folder)
    assert isinstance(load_compressed(folder, Activated(nn.Tanh)).net[1], nn.Tanh)
    assert isinstance(load_compressed(save_compressed(Activated(), tmp_path / "other")).net[1], nn.ReLU)
