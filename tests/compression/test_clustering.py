"""Weight clustering: k-means in one dimension, shared values that train, and zeros that stay."""

import pytest
import torch
from torch import nn

from lightning_memopt.compression.clustering import Clusters, cluster_weights, find_centroids
from lightning_memopt.compression.codecs import decode, encode
from lightning_memopt.compression.masks import prune_weights
from lightning_memopt.compression.selection import select_weights
from tests.zoo import ZOO, cases

INITS = ["kmeans++", "density", "linear", "random"]


def _net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))


@pytest.mark.parametrize("init", INITS)
def test_every_element_has_the_nearest_of_n_values_and_each_value_is_the_mean_of_its_elements(init):
    net = _net()
    before = net[0].weight.detach().clone()
    cluster_weights(net, 16, init)
    values = net[0].weight.detach().unique()
    assert 8 < len(values) <= 16
    torch.testing.assert_close(
        net[0].weight, values[(before[..., None] - values).abs().argmin(-1)], rtol=1e-4, atol=1e-6
    )
    for value in values:
        torch.testing.assert_close(before[net[0].weight == value].mean(), value, rtol=1e-4, atol=1e-6)


def test_k_means_finds_groups_that_are_apart_and_agrees_with_scikit_learn():
    cluster = pytest.importorskip("sklearn.cluster")
    torch.manual_seed(0)
    values = torch.cat([torch.randn(200) * 0.1 + center for center in (-5.0, -1.0, 0.0, 2.0, 9.0)])
    ours = find_centroids(values, 5, "kmeans++", torch.Generator().manual_seed(0))
    theirs = cluster.KMeans(5, n_init=10, random_state=0).fit(values[:, None].numpy()).cluster_centers_
    torch.testing.assert_close(ours, torch.tensor(sorted(theirs[:, 0])), rtol=1e-4, atol=1e-4)


def test_fewer_distinct_values_than_clusters_stay_exactly_as_they_are():
    layer = nn.Linear(8, 8)
    with torch.no_grad():
        layer.weight.copy_(torch.tensor([-1.0, 0.25, 3.0])[torch.arange(64).view(8, 8) % 3])
    before = layer.weight.detach().clone()
    cluster_weights(layer, 16)
    assert torch.equal(layer.weight, before)


@pytest.mark.parametrize("name", cases(without=["late_mlp"]))
def test_clustered_weights_of_every_module_take_four_bits_an_element_and_come_back(name):
    module = ZOO[name].build()
    before = {key: value.clone() for key, value in module.state_dict().items()}
    clusters = cluster_weights(module, 16)
    for key in clusters.weights:
        weight = module.get_parameter(key)
        encoded = encode(weight)
        assert encoded.nbytes <= weight.numel() / 2 + 16 * 4 + 1 or weight.numel() < 256
        assert torch.equal(decode(encoded), weight)
    for key in select_weights(module).skipped:
        assert torch.equal(module.state_dict()[key], before[key])


def test_what_is_pruned_stays_zero_and_both_together_are_smaller_than_either():
    net = _net()
    prune_weights(net, 0.8)
    zeros, pruned_bytes = net[0].weight == 0, encode(net[0].weight).nbytes
    cluster_weights(net, 16)
    assert torch.equal(net[0].weight == 0, zeros) and len(net[0].weight.unique()) <= 16
    both = encode(net[0].weight)
    assert both.encoding == "bitmask+codebook" and both.nbytes < 0.4 * pruned_bytes


def test_held_by_an_optimizer_the_values_train_and_stay_shared():
    net = _net()
    prune_weights(net, 0.5)
    zeros = net[0].weight == 0
    optimizer = torch.optim.SGD(net.parameters(), lr=0.5)
    clusters = cluster_weights(net, 8)
    clusters.hold([optimizer])
    before = net[0].weight.detach().clone()
    net(torch.randn(16, 64)).square().sum().backward()
    gradient = net[0].weight.grad.clone()
    optimizer.step()
    for value in before.unique():
        members = before == value
        expected = value - 0.5 * gradient[members].mean() if value else value
        torch.testing.assert_close(net[0].weight[members], expected.expand(int(members.sum())), rtol=1e-4, atol=1e-5)
    assert torch.equal(net[0].weight == 0, zeros)
    clusters.remove()
    optimizer.step()
    assert len(net[0].weight.unique()) > 1000


def test_a_state_restores_which_elements_share_a_value():
    net = _net()
    clusters = cluster_weights(net, 8)
    restored = Clusters(select_weights(net).weights)
    restored.load_state_dict(clusters.state_dict())
    before = net[0].weight.detach().clone()
    with torch.no_grad():
        net[0].weight.add_(torch.randn(64, 64))
    restored.apply()
    assert len(net[0].weight.unique()) <= 8
    pairs = torch.stack([before.view(-1), net[0].weight.detach().view(-1)])
    assert pairs.unique(dim=1).shape[1] <= 8
    with pytest.raises(ValueError, match=r"clusters of '.*', which is not among the weights"):
        Clusters(select_weights(net, "0").weights).load_state_dict(clusters.state_dict())


@pytest.mark.parametrize(
    ("n", "init", "message"),
    [(1, "linear", "n=1 is no number"), (257, "linear", "n=257"), (True, "linear", "n=True"), (8, "k", "init='k'")],
)
def test_numbers_and_ways_to_begin_out_of_range_are_refused(n, init, message):
    with pytest.raises(ValueError, match=message):
        cluster_weights(_net(), n, init)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_weight_with_elements_that_are_no_numbers_is_refused_by_name_before_any_is_rounded(bad):
    net = nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 16))
    net[1].weight.data[3, 5] = bad
    before = [parameter.clone() for parameter in net.parameters()]
    with pytest.raises(ValueError, match=r"'1.weight' has elements that are NaN or infinite"):
        cluster_weights(net, 4)
    for old, new in zip(before, net.parameters(), strict=True):
        torch.testing.assert_close(old, new, rtol=0, atol=0, equal_nan=True)
    assert len(cluster_weights(net, 4, exclude="1").weights) == 1
