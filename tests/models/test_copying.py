"""Modules that keep what they computed can be copied."""

import torch
from torch import nn

from lightning_memopt.models.copying import copy_module


def test_tensors_kept_with_their_graph_are_copied_without_it_and_all_else_as_it_is():
    net = nn.Sequential(nn.Linear(4, 4))
    logits = net(torch.ones(2, 4))
    net[0].last = logits
    net.kept = {"losses": [logits.sum()], "pair": (logits, 1)}
    net.plain = torch.ones(2)
    copied = copy_module(net)
    assert torch.equal(copied[0].last, logits) and copied[0].last is not logits
    assert copied.kept["pair"][0] is copied[0].last and not copied.kept["losses"][0].requires_grad
    assert copied.plain is not net.plain and copied[0].weight is not net[0].weight and copied[0].weight.requires_grad
    assert net[0].last is logits and logits.grad_fn is not None
