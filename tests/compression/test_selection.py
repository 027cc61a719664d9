"""Which weights may be compressed: kinds, ties, patterns, and reasons for the rest."""

import pytest
import torch
from torch import nn

from lightning_memopt.compression.clustering import apply_clusters, cluster_weights
from lightning_memopt.compression.masks import apply_masks, find_sparsity, prune_weights
from lightning_memopt.compression.quantize import quantize
from lightning_memopt.compression.selection import WeightFilter, select_weights
from tests.zoo import ZOO


def _names(*args, **kwargs) -> list[str]:
    return [weight.name for weight in select_weights(*args, **kwargs).weights]


@pytest.mark.parametrize("name", [name for name in ZOO if name != "late_mlp"])
def test_every_parameter_of_every_module_is_chosen_once_or_has_a_reason(name):
    module = ZOO[name].build()
    selection = select_weights(module, embeddings=True)
    named = {parameter: key for key, parameter in module.named_parameters()}
    chosen = [weight.parameter for weight in selection.weights]
    assert len(set(chosen)) == len(chosen)
    assert {named[p] for p in chosen}.isdisjoint(selection.skipped)
    assert len(chosen) + len(selection.skipped) == len(named)
    for weight in selection.weights:
        assert module.get_parameter(weight.name) is weight.parameter
        assert module.get_submodule(weight.module_name) is weight.module
        assert weight.parameter.ndim >= 2


def test_kinds_and_dimensions_tell_apart_the_ways_in_which_weights_are_stored():
    transformers = pytest.importorskip("transformers.pytorch_utils")
    net = nn.ModuleDict(
        {
            "linear": nn.Linear(2, 3),
            "conv": nn.Conv2d(2, 4, 3),
            "transposed": nn.ConvTranspose2d(2, 4, 3),
            "conv1d": transformers.Conv1D(6, 5),
            "attention": nn.MultiheadAttention(4, 2, kdim=6),
            "lstm": nn.LSTM(2, 3),
            "embedding": nn.Embedding(7, 2),
        }
    )
    weights = {w.name: (w.kind, w.output_dim, w.input_dim) for w in select_weights(net, embeddings=True).weights}
    assert weights == {
        "linear.weight": ("linear", 0, 1),
        "conv.weight": ("conv", 0, 1),
        "transposed.weight": ("conv", 1, 0),
        "conv1d.weight": ("conv1d", 1, 0),
        "attention.q_proj_weight": ("attention", 0, 1),
        "attention.k_proj_weight": ("attention", 0, 1),
        "attention.v_proj_weight": ("attention", 0, 1),
        "attention.out_proj.weight": ("attention", 0, 1),
        "lstm.weight_ih_l0": ("recurrent", 0, 1),
        "lstm.weight_hh_l0": ("recurrent", 0, 1),
        "embedding.weight": ("embedding", 0, 1),
    }


def test_a_head_tied_to_its_embedding_is_an_embedding_and_is_chosen_once_on_request():
    module = ZOO["gpt2"].build()
    plain = select_weights(module)
    assert "model.lm_head.weight" not in [weight.name for weight in plain.weights]
    assert "embeddings=True" in plain.skipped["model.transformer.wte.weight"]
    tied = next(w for w in select_weights(module, embeddings=True).weights if w.tied)
    assert (tied.name, tied.kind, tied.tied) == (
        "model.transformer.wte.weight", "embedding", ("model.lm_head.weight",)
    )  # fmt: skip


def test_include_and_exclude_take_names_patterns_and_classes_and_reach_what_is_below_them():
    net = nn.ModuleDict({"a": nn.Sequential(nn.Linear(2, 2), nn.Conv1d(2, 2, 1)), "b": nn.Linear(2, 2)})
    assert _names(net, "a") == ["a.0.weight", "a.1.weight"]
    assert _names(net, "*.weight", nn.Conv1d) == ["a.0.weight", "b.weight"]
    assert _names(net, [nn.Conv1d, "b.weight"]) == ["a.1.weight", "b.weight"]
    assert _names(net, exclude=nn.Sequential) == ["b.weight"]
    assert select_weights(net, exclude="b").skipped["b.weight"] == "in exclude"


def test_biases_norms_and_unknown_parameters_are_skipped_with_a_reason():
    class Scaled(nn.Module):
        def __init__(self):
            super().__init__()
            self.table = nn.Parameter(torch.ones(2, 2))
            self.inner = nn.utils.parametrizations.weight_norm(nn.Linear(2, 2))
            self.plain = nn.Linear(2, 2)

    skipped = select_weights(Scaled()).skipped
    assert skipped["table"] == "a parameter of Scaled, of which is not known how it is used"
    assert "sensitive" in skipped["plain.bias"]
    assert "parametrization" in skipped["inner.parametrizations.weight.original1"]


@pytest.mark.filterwarnings("ignore:.*weight_norm.* is deprecated")
@pytest.mark.parametrize("wrap", [nn.utils.weight_norm, nn.utils.spectral_norm])
def test_what_older_wrappers_compute_the_weight_of_a_layer_from_is_left(wrap):
    recurrent = nn.LSTM(8, 8, 2, bidirectional=True, proj_size=4)
    net = nn.Sequential(wrap(recurrent, "weight_hh_l0"), wrap(nn.Linear(8, 8)))
    selection = select_weights(net)
    left = {f"0.weight_{of}_l{layer}" for of in ("ih", "hh", "hr") for layer in ("0", "0_reverse", "1", "1_reverse")}
    assert {weight.name for weight in selection.weights} == left - {"0.weight_hh_l0"}
    assert all("parametrization" in why for name, why in selection.skipped.items() if "bias" not in name)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"include": "lin"}, r"include='lin' matches no parameter of Sequential .* Its parameters are 0.weight"),
        ({"exclude": nn.Conv2d}, "exclude='Conv2d' matches no parameter"),
        ({"include": "1"}, r"no weight to compress that include=\['1'\] asks for: '1.weight' is a bias, a scale"),
        ({"exclude": ["0", "2"]}, "no weight to compress: '0.weight' is in exclude"),
        ({"include": []}, r"include=\[\] does not say which modules"),
    ],
)
def test_what_matches_nothing_is_refused_with_the_names_that_there_are(options, message):
    net = nn.Sequential(nn.Linear(2, 2), nn.LayerNorm(2), nn.Linear(2, 2))
    with pytest.raises(ValueError, match=message):
        select_weights(net, **options)


def test_a_lazy_layer_a_quantized_one_and_an_empty_one_are_skipped():
    net = nn.Sequential(nn.Linear(2, 2), nn.LazyLinear(2), nn.Linear(2, 2), nn.Embedding(0, 2))
    net[2].weight = nn.Parameter(torch.zeros(2, 2, dtype=torch.int8), requires_grad=False)
    selection = select_weights(net)
    assert [weight.name for weight in selection.weights] == ["0.weight"]
    assert selection.skipped["3.weight"] == "empty"
    assert "first batch" in selection.skipped["1.weight"] and "torch.int8" in selection.skipped["2.weight"]


def test_a_weight_that_is_packed_by_quantization_is_skipped_and_left_by_masks_and_clusters():
    net = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64))
    masks, clusters = prune_weights(net, 0.5, include="0"), cluster_weights(net, 4, include="0")
    quantize(net, "int8_weight_only", WeightFilter("0"))
    packed = net[0].weight
    apply_masks(net, masks.state_dict())
    apply_clusters(net, clusters.state_dict())
    assert net[0].weight is packed and find_sparsity(net)["0.weight"] == 0.5  # its zeros are still zeros
    assert "compressed already" in select_weights(net).skipped["0.weight"]
