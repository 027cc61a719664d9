"""Models that really become smaller, and still compute what is left of them."""

import copy
import json

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from lightning_memopt.compression.clustering import cluster_weights
from lightning_memopt.compression.container import load_compressed, save_compressed
from lightning_memopt.compression.masks import find_sparsity, prune_weights
from lightning_memopt.compression.quantize import quantize
from lightning_memopt.compression.selection import WeightFilter
from lightning_memopt.compression.structured import plan_structured, prune_structured
from lightning_memopt.demo.model import GPT
from tests.zoo import ZOO

pytest.importorskip("torch_pruning")
IDS = torch.randint(0, 100, (2, 16), generator=torch.Generator().manual_seed(0))
IMAGES = torch.randn(2, 1, 8, 8, generator=torch.Generator().manual_seed(0))


def _cnn():
    return nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 32, 3, padding=1), nn.ReLU(),
        nn.MaxPool2d(2), nn.Flatten(), nn.Linear(32 * 16, 64), nn.ReLU(), nn.Linear(64, 10),
    )  # fmt: skip


class Encoder(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(100, 64)
        layer = nn.TransformerEncoderLayer(64, 4, 128, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.head = nn.Linear(64, 4)

    def forward(self, ids):
        return self.head(self.encoder(self.embed(ids)).mean(1))


def _hugging_face(kind):
    transformers = pytest.importorskip("transformers")
    sizes = {"num_hidden_layers": 2, "hidden_size": 64, "num_attention_heads": 4, "intermediate_size": 128}
    text = sizes | {"vocab_size": 100, "bos_token_id": 0, "eos_token_id": 1}
    if kind == "gpt2":
        config = transformers.GPT2Config(n_layer=2, n_embd=64, n_head=4, vocab_size=100, n_positions=32,
                                         bos_token_id=0, eos_token_id=1)  # fmt: skip
        return transformers.GPT2LMHeadModel(config)
    if kind == "llama":
        return transformers.LlamaForCausalLM(transformers.LlamaConfig(**text, num_key_value_heads=2))
    if kind == "bert":
        return transformers.BertForSequenceClassification(transformers.BertConfig(**text))
    config = transformers.ViTConfig(**sizes, image_size=8, patch_size=4, num_channels=1)
    return transformers.ViTForImageClassification(config)


MODELS = {
    "cnn": (_cnn, lambda module: module(IMAGES), "0"),
    "encoder": (Encoder, lambda module: module(IDS), None),
    "demo": (lambda: GPT(2, 64, 4, 32), lambda module: module(IDS), None),
    "gpt2": (lambda: _hugging_face("gpt2"), lambda module: module(input_ids=IDS).logits, "transformer.wte"),
    "llama": (lambda: _hugging_face("llama"), lambda module: module(input_ids=IDS).logits, "model.embed_tokens"),
    "bert": (
        lambda: _hugging_face("bert"),
        lambda module: module(input_ids=IDS).logits,
        "bert.embeddings.word_embeddings",
    ),
    "vit": (lambda: _hugging_face("vit"), lambda module: module(pixel_values=IMAGES).logits, "vit.layers.0.mlp.fc2"),
}


@pytest.mark.parametrize("name", MODELS)
def test_half_of_everything_leaves_a_third_of_the_weights_and_a_module_that_trains(name):
    build, call, _ = MODELS[name]
    torch.manual_seed(0)
    module = build().train()
    shape = call(module).shape
    found = prune_structured(module, 0.5, call)
    assert found.parameters_after == sum(p.numel() for p in module.parameters())
    assert found.parameters_after < 0.36 * found.parameters_before
    assert all(left == -(-size // 2) for size, left in found.removed.values())
    assert module.training
    output = call(module)
    assert output.shape == shape
    output.square().mean().backward()
    assert all(p.grad is None or p.grad.shape == p.shape for p in module.parameters())


def _zoo(name):
    """Of two stacks, and what gives each its width."""
    batch = ZOO[name].batch(2)
    streams = {
        "t5": ["*.block.1.layer.1.DenseReluDense.wo", "*.block.1.layer.2.DenseReluDense.wo"],
        "captioner": ["*.encoder.layers.1.mlp.fc2", "*.h.1.mlp.c_proj"],
    }
    return ZOO[name].build, lambda module: module.model(**batch).logits, streams[name]


@pytest.mark.parametrize("name", ["cnn", "gpt2", "llama", "bert", "vit", "t5", "captioner"])
def test_what_is_left_computes_what_it_did_with_the_removed_units_unread(name):
    """Heads, neurons and channels: the width of the stream is left, which its norms average over."""
    build, call, stream = MODELS[name] if name in MODELS else _zoo(name)
    torch.manual_seed(0)
    module = build().eval()
    for p in module.parameters():
        nn.init.normal_(p, std=0.2)
    exclude = stream if name != "cnn" else None
    unread, smaller = copy.deepcopy(module), module
    with torch.no_grad():
        found = prune_structured(smaller, 0.5, call, exclude=exclude)
    kept = [
        part for part in plan_structured(unread, 0.5, call, exclude=exclude).kept if part[0].name in found.removed
    ]
    assert {group.kind for group, _ in kept} == ({"channels"} if name == "cnn" else {"heads", "channels"})
    with torch.no_grad():
        before = call(unread)
        for group, mask in kept:
            for slot in group.slots:
                is_conv1d = type(slot.module).__name__ == "Conv1D"
                if slot.tensor.ndim > 1 and slot.dimension == (0 if is_conv1d else 1):
                    gone = (slot.units >= 0) & ~mask[slot.units.clamp_min(0)]
                    slot.tensor.index_fill_(slot.dimension, gone.nonzero().view(-1), 0)
        expected = call(unread)
    assert (expected - before).abs().max() > 1e-3
    torch.testing.assert_close(call(smaller), expected, rtol=1e-4, atol=1e-5)


def test_a_tied_head_stays_tied():
    module = GPT(2, 64, 4, 32)
    prune_structured(module, 0.5, lambda m: m(IDS))
    assert module.head.weight is module.embedding.weight and module.head.weight.shape == (256, 32)
    assert module.positions.weight.shape == (32, 32)


def test_training_goes_on_with_the_moments_of_what_is_left():
    torch.manual_seed(0)
    module = _cnn()
    optimizer = torch.optim.AdamW(module.parameters(), lr=1e-3)
    for _ in range(3):
        F.cross_entropy(module(IMAGES), torch.tensor([1, 2])).backward()
        optimizer.step()
        optimizer.zero_grad()
    before = {name: optimizer.state[p]["exp_avg"] for name, p in module.named_parameters()}
    weight = module[9].weight.detach().clone()
    prune_structured(module, 0.5, lambda m: m(IMAGES), optimizers=[optimizer])
    assert {id(p) for group in optimizer.param_groups for p in group["params"]} == {
        id(p) for p in module.parameters()
    }
    kept = [(weight == column).all(0).nonzero().item() for column in module[9].weight.T[:, :, None].unbind(0)]
    torch.testing.assert_close(optimizer.state[module[9].weight]["exp_avg"], before["9.weight"][:, kept])
    F.cross_entropy(module(IMAGES), torch.tensor([1, 2])).backward()
    optimizer.step()


def test_the_least_important_go_first_by_magnitude_or_by_given_scores():
    module = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2))
    nn.init.ones_(module[0].weight)
    nn.init.ones_(module[2].weight)
    with torch.no_grad():
        module[0].weight.mul_(torch.tensor([[1.0], [3.0], [2.0], [4.0]]))
    scored = copy.deepcopy(module)
    call = lambda m: m(torch.ones(1, 4))  # noqa: E731
    prune_structured(module, 0.5, call)
    assert module[0].weight[:, 0].tolist() == [3, 4]
    scores = {scored[0].weight: torch.tensor([[9.0], [1], [9], [1]]).expand(4, 4)}
    prune_structured(scored, 0.5, call, scores=scores)
    assert scored[0].weight[:, 0].tolist() == [1, 2]


def test_layers_are_chosen_by_name_and_the_rest_is_said_to_be_left():
    module = _cnn()
    found = prune_structured(module, 0.5, lambda m: m(IMAGES), exclude=["0"], include=nn.Conv2d)
    assert found.removed == {"3": (32, 16)}
    assert found.skipped["0"] == "in exclude" and found.skipped["7"] == "not in include"
    assert "gives out" in found.skipped["9"]


def test_an_attention_is_chosen_by_the_name_that_it_has_in_the_report():
    module = Encoder()
    call = lambda m: m(IDS)  # noqa: E731
    name = next(group.name for group, _ in plan_structured(module, 0.5, call).kept if group.kind == "heads")
    assert plan_structured(module, 0.5, call, exclude=name).skipped[name] == "in exclude"
    kept = plan_structured(module, 0.5, call, include=name).kept
    assert name in [group.name for group, _ in kept]


class HardCoded(nn.Module):
    """Its code has the number of features in it."""

    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Linear(4, 8), nn.Linear(8, 2)

    def forward(self, x):
        return self.last(self.first(x).view(-1, 8).relu())


def test_a_module_whose_code_cannot_run_smaller_is_refused_by_name_and_left_whole():
    module = HardCoded()
    before = copy.deepcopy(module.state_dict())
    with pytest.raises(ValueError, match=r"HardCoded cannot be made smaller.*first"):
        prune_structured(module, 0.5, lambda m: m(torch.ones(3, 4)))
    assert module.first.out_features == 8 and module.last.in_features == 8
    for name, tensor in module.state_dict().items():
        assert torch.equal(tensor, before[name])


class PartlyHardCoded(nn.Module):
    """The number of features of its second layer is in its code."""

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(4, 8), nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 2)])

    def forward(self, x):
        x = self.layers[1](self.layers[0](x).relu())
        return self.layers[3](self.layers[2](x.view(-1, 8).relu()).relu())


def test_what_the_code_does_not_run_without_is_left_and_named_and_the_rest_is_removed():
    torch.manual_seed(0)
    module, x = PartlyHardCoded(), torch.randn(3, 4)
    found = prune_structured(module, 0.5, lambda m: m(x))
    assert found.removed == {"layers.0": (8, 4), "layers.2": (8, 4)}
    assert set(found.failed) == {"layers.1"}
    assert "does not run with fewer of it (RuntimeError: shape '[-1, 8]' is invalid" in found.skipped["layers.1"]
    assert [layer.weight.shape for layer in module.layers] == [(4, 4), (8, 4), (4, 8), (2, 4)]


class Unsqueezed(nn.Module):
    """Features of an embedding become positions of one channel."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.conv, self.head = nn.Embedding(10, 32), nn.Conv1d(1, 16, 3), nn.Linear(16 * 30, 4)

    def forward(self, ids):
        return self.head(self.conv(self.table(ids)[:, None]).relu().flatten(1))


def test_features_that_become_positions_are_left_and_named_and_the_channels_behind_them_removed():
    module = Unsqueezed()
    done = prune_structured(module, 0.5, lambda net: net(torch.arange(3)))
    assert done.removed == {"conv": (16, 8)} and module.head.in_features == 8 * 30
    assert done.skipped["table"] == "which of them 'conv' reads cannot be followed"


class Mixed(nn.Module):
    """A parameter in an operator of which the dependency graph knows nothing, and a norm over features."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm, self.second = nn.Linear(8, 24), nn.RMSNorm(24), nn.Linear(24, 12)
        self.mix, self.last = nn.Parameter(torch.randn(12, 6)), nn.Linear(6, 2)

    def forward(self, x):
        return self.last(torch.einsum("bti,io->bto", self.second(self.norm(self.first(x)).relu()), self.mix))


def test_what_an_unknown_operator_reads_is_left_and_named_and_features_behind_an_rms_norm_are_removed():
    module = Mixed()
    done = prune_structured(module, 0.5, lambda net: net(torch.ones(2, 3, 8)))
    assert done.removed == {"first": (24, 12)} and module.norm.normalized_shape == (12,)
    assert done.skipped["second"] == "which of them 'mix' reads cannot be followed"


def test_what_cannot_be_traced_matches_nothing_or_is_no_share_is_refused_by_name():
    class Untraceable(nn.Module):
        def forward(self, x):
            raise RuntimeError("no run without a server")

    with pytest.raises(ValueError, match=r"Untraceable cannot be pruned by structure.*no run without a server"):
        prune_structured(Untraceable(), 0.5, lambda m: m(IMAGES))
    for amount in (0, 1, 1.5, -0.2, float("nan"), "0.5"):
        with pytest.raises(ValueError, match="is no share"):
            prune_structured(_cnn(), amount, lambda m: m(IMAGES))
    with pytest.raises(ValueError, match="'decoder' matches no module"):
        prune_structured(_cnn(), 0.5, lambda m: m(IMAGES), exclude="decoder")
    with pytest.raises(ValueError, match="nothing in Linear can be removed"):
        prune_structured(nn.Linear(4, 2), 0.5, lambda m: m(torch.ones(1, 4)))
    leaves_autograd = nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 2))
    with pytest.raises(ValueError, match="its code leaves autograd"):
        prune_structured(leaves_autograd, 0.5, lambda m: m(torch.ones(1, 4)).detach() + m[1].bias.sum())


def test_a_compiled_module_is_followed_as_it_is_written_and_compiled_again_as_it_is_then():
    torch.manual_seed(0)
    plain, compiled = _cnn().eval(), torch.nn.Sequential().eval()
    compiled.net = torch.compile(copy.deepcopy(plain), backend="aot_eager")
    call = lambda m: m(IMAGES)  # noqa: E731
    compiled(IMAGES)
    prune_structured(plain, 0.5, call)
    assert prune_structured(compiled, 0.5, call).parameters_after == sum(p.numel() for p in plain.parameters())
    torch.testing.assert_close(compiled(IMAGES), plain(IMAGES))
    torch._dynamo.reset()


def test_a_frozen_module_is_pruned_and_stays_frozen():
    module = _cnn().requires_grad_(False).eval()
    prune_structured(module, 0.5, lambda m: m(IMAGES))
    assert not any(p.requires_grad for p in module.parameters()) and not module.training


def test_a_module_that_is_loaded_knows_how_many_units_it_had_at_first(tmp_path):
    def make() -> nn.Module:
        return nn.Sequential(nn.Linear(4, 16), nn.ReLU(), nn.Linear(16, 2))

    def call(net: nn.Module) -> torch.Tensor:
        return net(torch.ones(1, 4))

    net = make()
    prune_structured(net, 0.5, call)
    loaded = load_compressed(save_compressed(net, tmp_path / "net"), make)
    assert prune_structured(loaded, 0.5, call).removed == {}
    assert prune_structured(loaded, 0.75, call).removed == {"0": (8, 4)}
    assert "units" not in json.loads((save_compressed(make(), tmp_path / "whole") / "manifest.json").read_text())


@pytest.mark.parametrize(
    "compress",
    [
        lambda net: prune_weights(net, 0.5),
        lambda net: cluster_weights(net, 4),
        quantize,
        lambda net: prune_structured(net, 0.5, lambda net: net(torch.ones(2, 64, device="meta"))),
    ],
)
def test_a_module_on_the_meta_device_is_refused_by_name(compress):
    with torch.device("meta"):
        net = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64))
    with pytest.raises(ValueError, match=r"'0.weight' is on the meta device, and has no numbers"):
        compress(net)
    assert find_sparsity(net) == {}


def test_what_is_quantized_is_left_with_the_reason_and_the_rest_is_removed():
    net = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 64), nn.ReLU(), nn.Linear(64, 32))
    quantize(net, "int8", WeightFilter(include="0"))
    found = prune_structured(net, 0.5, lambda net: net(torch.ones(2, 64)))
    assert found.removed == {"2": (64, 32)}
    assert found.skipped["0"] == "'0.weight' is quantized, and is not cut; remove first, and quantize then"


def test_modules_are_compressed_in_inference_mode_as_outside():
    net = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 64))
    with torch.inference_mode():
        assert prune_structured(net, 0.5, lambda net: net(torch.ones(2, 64))).removed == {"0": (128, 64)}
        quantize(net)
    net(torch.ones(2, 64, requires_grad=True)).sum().backward()


class Translator(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(100, 64)
        self.transformer = nn.Transformer(64, 4, 1, 1, 128, batch_first=True, dropout=0.0)
        self.head = nn.Linear(64, 100)

    def forward(self, source, target):
        return self.head(self.transformer(self.embed(source), self.embed(target)))


def test_width_and_heads_of_torchs_transformer_are_removed_and_it_is_read_back(tmp_path):
    module = Translator().eval()
    found = prune_structured(module, 0.5, lambda module: module(IDS, IDS))
    attentions = [name for name, part in module.named_modules() if isinstance(part, nn.MultiheadAttention)]
    assert len(attentions) == 3 and all(found.removed[name] == (4, 2) for name in attentions)
    assert module.transformer.d_model == module.embed.embedding_dim == 32 and not found.failed
    save_compressed(module, tmp_path / "small")
    loaded = load_compressed(tmp_path / "small", module=Translator()).eval()
    torch.testing.assert_close(loaded(IDS, IDS), module(IDS, IDS), rtol=0, atol=0)
    module(IDS, IDS).square().mean().backward()
