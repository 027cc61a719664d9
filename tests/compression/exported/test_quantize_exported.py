"""What exports becomes a graph of integers, what does not is packed and named, and nothing else changes."""

import copy
import pickle

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from lightning_memopt.compression.container import load_compressed, save_compressed
from lightning_memopt.compression.exported import quantize_exported
from lightning_memopt.compression.exported.module import ExportedModule
from lightning_memopt.compression.packed import PackedWeight
from lightning_memopt.compression.quantize import GrowthError, quantize
from lightning_memopt.compression.ranges import observe_inputs
from lightning_memopt.compression.selection import WeightFilter
from tests.zoo import ZOO, slow_where


def _mlp(inputs: int = 32) -> nn.Sequential:
    return nn.Sequential(nn.Linear(inputs, 64), nn.ReLU(), nn.Dropout(0.5), nn.Linear(64, 16))


class Net(nn.Module):
    """A body and a head, as users name them."""

    def __init__(self, body: nn.Module | None = None) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.body = body or _mlp()
        self.head = nn.Linear(16, 64)

    def forward(self, x):
        return self.head(self.body(x))


def _exported(module: nn.Module) -> list[str]:
    return [name for name, part in module.named_modules() if isinstance(part, ExportedModule)]


def _quantize(net: nn.Module, *sizes: int, which: WeightFilter | None = None):
    generator = torch.Generator().manual_seed(0)
    batches = [torch.randn(size, 32, generator=generator) for size in sizes or (8,)]

    def calibrate():
        with torch.no_grad():
            for batch in batches:
                net(batch)

    return quantize_exported(net, calibrate, which)


def _decibels(wanted, found) -> float:
    return float(20 * torch.log10(wanted.norm() / (wanted - found).norm()).detach())


def test_parts_become_graphs_of_integers_that_compute_nearly_the_same_for_every_size_of_a_batch():
    net = Net()
    plain = copy.deepcopy(net).eval()
    done = _quantize(net)
    assert _exported(net) == ["body", "head"]
    assert done.packed == ["body.0.weight", "body.3.weight", "head.weight"] and not done.fallbacks
    assert done.skipped.keys() == {"body.0.bias", "body.3.bias", "head.bias"}
    assert done.bytes_after < 0.4 * done.bytes_before
    floats = [name for name, tensor in net.state_dict().items() if tensor.is_floating_point() and tensor.dim() > 1]
    assert not floats  # none of the weights stays beside its integers
    for size in (1, 3, 8, 20):
        x = torch.randn(size, 32)
        assert _decibels(plain(x), net(x)) > 25
    assert {name: bias for name, bias in net.named_parameters()}.keys() == done.skipped.keys()  # under their names


def test_batch_norm_is_folded_and_rounding_is_as_fine_as_that_of_packed_weights():
    def make():
        torch.manual_seed(0)
        return nn.Sequential(
            nn.Sequential(
                nn.Conv2d(3, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16), nn.ReLU(),
                nn.Conv2d(16, 32, 3, padding=1), nn.BatchNorm2d(32), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
            ),
            nn.Linear(32, 10),
        )  # fmt: skip

    net, x = make(), torch.randn(16, 3, 8, 8)
    for _ in range(3):
        net(3 * x + 1)  # the norms have seen something
    net.eval()
    plain, ours = copy.deepcopy(net), copy.deepcopy(net)
    with observe_inputs(ours) as ranges:
        ours(x)
    quantize(ours, "int8_static", input_ranges=ranges)
    done = quantize_exported(net, lambda: net(x))
    assert _exported(net) == ["0", "1"] and not done.fallbacks
    assert not any("running" in name for name in net.state_dict())
    with torch.no_grad():
        assert _decibels(plain(x), net(x)) > max(25, _decibels(plain(x), ours(x)) - 10)


EXPORTED = {
    "mlp": ["net"],
    "cnn": ["stem", "blocks", "head"],
    "late_mlp": ["net"],
    "shared_block": ["inlet", "block", "outlet"],
    "lstm": [],
    "gpt2": [],
    "encoder": ["head"],
    "vit": ["model.vit", "model.classifier"],  # and not what takes labels, to be called without them to predict
    "bert_qa": ["model.bert.encoder", "model.qa_outputs"],
    "captioner": ["model.encoder"],
    "llama": ["model.model.layers.0", "model.model.layers.1", "model.model.layers.2", "model.lm_head"],
}
REASONS = {
    "gpt2": {"PT2E's quantizer does not know Conv1D", "PT2E's quantizer does not know Embedding"},
    "encoder": {
        "PT2E's quantizer does not know Embedding",
        "PT2E's quantizer leaves weights of TransformerEncoderLayer as they are",
    },
    "lstm": {"PT2E's quantizer does not know Embedding"},
}


@pytest.mark.parametrize("name", slow_where(EXPORTED))
def test_modules_of_the_zoo_lose_little_name_what_is_packed_and_load_bit_for_bit(name, tmp_path):
    entry = ZOO[name]
    net, batch = entry.build(), entry.batch()
    net.configure_model()

    def loss(module):
        module.log = module.log_dict = lambda *_, **__: None
        with torch.no_grad():
            return module.eval().training_step(batch, 0)

    wanted, state = loss(net), {key: value.clone() for key, value in net.state_dict().items()}
    done = quantize_exported(net, lambda: loss(net))
    assert _exported(net) == EXPORTED[name]
    assert done.bytes_after < done.bytes_before
    whole = [key for key, value in net.named_parameters() if value.dim() > 1 and not isinstance(value, PackedWeight)]
    assert set(whole) <= done.skipped.keys()  # each weight is packed, in a graph of integers, or named
    reasons = {reason.removeprefix("packed and not exported: ").split(";")[0] for reason in done.fallbacks.values()}
    assert REASONS.get(name, reasons) == reasons
    assert done.fallbacks.keys() <= set(done.packed) <= state.keys()
    found = loss(net)
    torch.testing.assert_close(found, wanted, rtol=0.02, atol=0)
    loaded = load_compressed(save_compressed(net, tmp_path / "net"), entry.build(seed=1))
    assert torch.equal(loss(loaded), found)
    assert all(torch.equal(loaded.state_dict()[key], value) for key, value in net.state_dict().items())


def test_a_tied_head_stays_tied_and_is_packed():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed, self.body, self.head = nn.Embedding(64, 32), _mlp(), nn.Linear(16, 64)
            self.out = nn.Linear(32, 64, bias=False)
            self.out.weight = self.embed.weight

        def forward(self, x):
            return self.out(self.embed(x)), self.body(self.embed(x))

    net, x = Tied(), torch.randint(64, (8, 5))
    done = quantize_exported(net, lambda: net(x))
    assert _exported(net) == ["body"] and net.out.weight is net.embed.weight
    assert isinstance(net.out.weight, PackedWeight)
    assert done.fallbacks["embed.weight"] == "packed and not exported: PT2E's quantizer does not know Embedding"
    assert done.fallbacks["head.weight"].startswith("packed and not exported: calibration saw no call of Linear")


def test_what_is_excluded_stays_whole_and_its_neighbours_are_exported_without_it():
    net = Net()
    weight = net.body[0].weight.clone()
    done = _quantize(net, which=WeightFilter(exclude="body.0", embeddings=True))
    assert _exported(net) == ["body.3", "head"] and torch.equal(net.body[0].weight, weight)
    assert done.skipped["body.0.weight"] == "in exclude"


class Reads(Net):
    """Reads what it holds past its call."""

    def forward(self, x):
        return super().forward(x) + self.body[3].weight.sum()


class Calls(Net):
    def forward(self, x):
        return self.head(self.body[3](F.relu(self.body[0](x))))


class Slices(Net):
    """Asks of a part what no graph has."""

    def forward(self, x):
        return super().forward(x) + len(self.body)


class OneSize(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(32, 16)

    def forward(self, x):
        return self.linear(x.reshape(8, 32))


class Loss(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(32, 16)

    def forward(self, x):
        return self.linear(x), self.linear(x).square().mean()


class Unpacks(Net):
    def forward(self, x):
        return self.head(self.body(x)[0])


class Either(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(32, 16)

    def forward(self, x, scale=None):
        return self.linear(x) if scale is None else self.linear(x) * scale


class CallsEither(Net):
    def forward(self, x):
        return self.head(self.body(x) + self.body(x, 2.0))


class ByValue(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(32, 16)

    def forward(self, x):
        return self.linear(x) if x.sum() > 0 else -self.linear(x)


@pytest.mark.parametrize(
    ("net", "exported", "weight", "reason"),
    [
        (lambda: Reads(), ["body.0", "head"], "body.3.weight", "weights of Linear are read by code outside of it"),
        (lambda: Calls(), ["body.0", "body.3", "head"], None, ""),
        (lambda: Slices(), [], "body.0.weight", "what was exported does not run as the module does"),
        (lambda: Net(OneSize()), ["body.linear", "head"], None, ""),
        (lambda: Unpacks(Loss()), ["body.linear", "head"], None, ""),
        (lambda: CallsEither(Either()), ["body.linear", "head"], None, ""),
        (lambda: Net(ByValue()), ["body.linear", "head"], None, ""),
        (lambda: Net(nn.Sequential(nn.Unflatten(1, (1, 32)), nn.Conv1d(1, 4, 4, 8), nn.Flatten())),
         ["head"], "body.1.weight", "PT2E's quantizer leaves weights of Conv1d as they are"),
    ],
)  # fmt: skip
def test_where_a_part_cannot_be_a_graph_its_own_parts_are_or_its_weights_are_packed(net, exported, weight, reason):
    net = net()
    plain = copy.deepcopy(net).eval()
    done = _quantize(net)
    assert _exported(net) == exported
    if weight is not None:
        assert done.fallbacks[weight].startswith(f"packed and not exported: {reason}")
        assert isinstance(net.get_parameter(weight), PackedWeight)
    x = torch.randn(8, 32)
    assert _decibels(plain(x), net(x)) > 20


def test_hooks_go_on_being_called():
    net, seen = Net(), []
    net.body[1].register_forward_hook(lambda *_: seen.append(1))
    done = _quantize(net)
    seen.clear()
    net(torch.randn(2, 32))
    assert seen == [1] and _exported(net) == ["body.0", "body.3", "head"] and not done.fallbacks


def test_sizes_that_vary_stay_open():
    net = Net(nn.Sequential(nn.Linear(32, 16), nn.ReLU()))
    batches = [torch.randn(4, 7, 32), torch.randn(4, 5, 32)]
    quantize_exported(net, lambda: [net(batch) for batch in batches])
    assert _exported(net) == ["body", "head"] and net(torch.randn(2, 9, 32)).shape == (2, 9, 64)


def test_weights_that_are_no_numbers_are_left_alone_with_a_warning():
    net = Net()
    net.head.weight.data[0, 0] = float("inf")
    with pytest.warns(UserWarning, match=r"'head.weight' has elements that are NaN or infinite"):
        done = _quantize(net)
    assert _exported(net) == ["body"] and "NaN" in done.skipped["head.weight"]


def test_a_part_whose_inputs_are_infinite_is_packed_with_the_finite_range():
    net, x = Net(), torch.randn(8, 32)
    x[0, 0] = float("inf")
    done = quantize_exported(net, lambda: net(x))
    assert _exported(net) == []
    assert "calibration saw no inputs of Sequential, or infinite ones" in done.fallbacks["body.0.weight"]
    assert net.body[0].weight.inputs is not None


def test_a_module_in_which_nothing_becomes_smaller_is_refused_and_one_part_that_does_not_is_named():
    class Small(nn.Module):
        def __init__(self, *layers):
            super().__init__()
            self.layers = nn.Sequential(*layers)

        def forward(self, x):
            return self.layers(x)

    tiny = Small(nn.Linear(1, 2))
    with pytest.raises(GrowthError, match="nothing in it becomes smaller"):
        quantize_exported(tiny, lambda: tiny(torch.randn(4, 1)))
    net = Net(nn.Sequential(nn.Linear(32, 1), nn.ReLU()))
    net.head = nn.Linear(1, 64)
    done = _quantize(net)
    assert _exported(net) == ["body"] and not isinstance(net.head.weight, PackedWeight)
    assert done.skipped["head.weight"] == "would take 320 bytes instead of 256"


def test_a_graph_can_be_copied_stays_in_evaluation_mode_and_tells_plain_attributes_of_what_it_was():
    net = Net()
    net.body.width = 64
    _quantize(net)
    x = torch.randn(4, 32)
    wanted = net(x)
    copied = copy.deepcopy(net).train()
    assert torch.equal(copied(x), wanted) and isinstance(copied.body, ExportedModule)
    assert copied.body.width == 64 and copied.head.out_features == 64
    with pytest.raises(AttributeError, match=r"'encode' of a Sequential .* Exclude that module"):
        _ = copied.body.encode
    with pytest.raises(pickle.PicklingError, match="a Sequential has become an exported graph"):
        pickle.dumps(net)


@pytest.mark.parametrize(
    "call", [lambda net, x: net(x[:, :16]), lambda net, x: net(x, x), lambda net, x: net(input=x)]
)
def test_a_graph_that_is_called_otherwise_than_in_calibration_says_so(call):
    net = Net()
    _quantize(net)
    with pytest.raises(ValueError, match=r"exported from a Sequential takes no such arguments .*float32.*\[8, 32\]"):
        call(net.body, torch.randn(4, 32))


def test_what_is_compiled_computes_the_same():
    net = Net()
    _quantize(net)
    x = torch.randn(4, 32)
    compiled = torch.compile(net, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), net(x))
    torch._dynamo.reset()
