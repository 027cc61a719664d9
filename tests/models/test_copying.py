"""Modules that keep what they computed can be copied."""

import threading

import pytest
import torch
from torch import nn

from lightning_memopt.models.copying import check_copyable, copy_module


def test_what_cannot_be_copied_is_told_without_copying_weights():
    net = nn.Sequential(nn.Linear(4, 4))
    net.kept = net(torch.ones(2, 4))
    net[0].weight.__class__ = Uncopied
    check_copyable(net)
    net[0].lock = threading.Lock()
    with pytest.raises(ValueError, match=r"Sequential cannot be copied .*lock.*__getstate__"):
        check_copyable(net)


class Uncopied(nn.Parameter):
    def __deepcopy__(self, memo):
        raise AssertionError("a weight was copied")


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
