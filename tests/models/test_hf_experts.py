"""Experts are read in each layout that Hugging Face has for them, and in no other."""

import pytest
import torch
from torch import nn

from lightning_memopt.models.hf_experts import Experts, read_experts

COUNT, OUTER, INNER = 3, 4, 8


def _experts(has_gate=True, has_bias=False, is_transposed=False, is_concatenated=True, has_post_expert_norm=False):
    module = nn.Module()
    vars(module).update(
        has_gate=has_gate, has_bias=has_bias, is_transposed=is_transposed, is_concatenated=is_concatenated,
        has_post_expert_norm=has_post_expert_norm,
    )  # fmt: skip
    name, wide = ("gate_up_proj", 2 * INNER) if has_gate else ("up_proj", INNER)
    up, down = (wide, OUTER), (OUTER, INNER)
    for key, sides in ((name, up), ("down_proj", down)):
        module.register_parameter(
            key, nn.Parameter(torch.zeros(COUNT, *(reversed(sides) if is_transposed else sides)))
        )
        if has_bias:
            module.register_parameter(f"{key}_bias", nn.Parameter(torch.zeros(COUNT, sides[0])))
    return module


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        ({}, Experts(INNER, {"gate_up_proj": (1, 2), "down_proj": (2, 1)})),
        (
            {"is_transposed": True, "is_concatenated": False, "has_bias": True},
            Experts(
                INNER, {"gate_up_proj": (2, 1), "down_proj": (1, 1), "gate_up_proj_bias": (1, 1)}, ("down_proj_bias",)
            ),
        ),
        ({"has_gate": False}, Experts(INNER, {"up_proj": (1, 1), "down_proj": (2, 1)})),
    ],
)
def test_each_layout_is_read_from_what_the_class_says_of_itself(flags, expected):
    assert read_experts(_experts(**flags)) == expected


def test_what_does_more_or_says_nothing_of_itself_is_not_read_without_a_plan():
    normed = _experts(has_post_expert_norm=True)
    normed.post_expert_norm = nn.LayerNorm(OUTER)
    assert read_experts(normed) is None
    silent = _experts()
    del silent.has_gate
    assert read_experts(silent) is None
    assert read_experts(silent, "moe_tp_experts").inner == INNER
    assert read_experts(nn.Linear(2, 2), "moe_tp_experts") is None
