"""Tensor parallel ranks train families of Hugging Face as one device does, each with its share of them."""

import re

import pytest
from transformers import GptOssConfig, GptOssForCausalLM

import lightning_memopt as memopt
from lightning_memopt.parallel.mesh import MeshSizes
from tests.distributed import run_on_ranks
from tests.strategies.parity import (
    ROUNDING_OF_DOUBLES,
    assert_same_outcome,
    fit_zoo,
    in_double_precision,
    on_one_device,
    on_ranks,
)
from tests.zoo import Entry
from tests.zoo.architectures import ARCHITECTURES, IN_SINGLE_PRECISION
from tests.zoo.text import LossInside

STEPS = 3
QUICK = ("falcon", "gemma2")
SHARE = 0.53
SHARES = {
    "mamba2": 0.65,  # its code reads `out_proj` past the call
    "convnext": 0.57, "mobilenet_v2": 0.58, "wav2vec2": 0.58, "hubert": 0.58,  # convolutions by groups
}  # fmt: skip
"""What a rank holds of the bytes of all parameters, where that is more than ``SHARE``."""
GATHERED = {
    "olmo2": "size of tensor",  # norms over queries and keys of all heads
    "segformer": "Given groups",  # a convolution by groups between the layers
}
"""Where what lies between layers that are split together is gathered, and what is said."""
ALONE = {
    "falcon": "", "gpt_bigcode": "", "phi3": "",  # fused queries, keys and values of different sizes
    "segformer": "1 query heads cannot be dealt out",
}  # fmt: skip
"""Where layers of attention are split one by one, and what is said."""


def _each() -> list[object]:
    return [pytest.param(name, marks=[] if name in QUICK else [pytest.mark.slow]) for name in ARCHITECTURES]


@pytest.mark.parametrize("name", _each())
def test_two_ranks_train_as_one_device_with_half_of_the_parameters_each(name):
    is_single = name in IN_SINGLE_PRECISION

    def fit():
        strategy = memopt.TensorParallelStrategy()
        options = {} if is_single else {"precision": "64-true"}
        entry = ARCHITECTURES[name]
        outcome = fit_zoo(entry, 2, STEPS, sizes=MeshSizes(tensor=2), strategy=strategy, **options)
        return outcome, strategy.describe()

    for outcome, described in run_on_ranks(fit, 2, deadline_seconds=120):
        if is_single:
            assert_same_outcome(on_one_device(name, STEPS), outcome)
        else:
            plain = in_double_precision(name, STEPS)
            assert_same_outcome(plain, outcome, rtol=1e-8, atol=1e-8, rounding=ROUNDING_OF_DOUBLES)
        *rows, total = described.splitlines()
        assert float(re.search(r"([\d.]+)% on each of 2", total)[1]) <= 100 * SHARES.get(name, SHARE)
        gathered = [row for row in rows if "gathered in" in row]
        assert bool(gathered) is (name in GATHERED)
        assert all(GATHERED[name] in row for row in gathered)
        alone = [row for row in rows if re.search(r"att\w*\.\w+ +colwise .* outputs gathered", row)]
        assert bool(alone) is (name in ALONE)
        assert all(ALONE[name] in row for row in alone)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["gemma2", "falcon", "mpt", "deberta", "swin", "convnext"])
def test_shards_of_parts_train_as_one_device(name):
    plain = in_double_precision(name, STEPS)
    for outcome in on_ranks(name, "hybrid: shard x tensor", STEPS, precision="64-true"):
        # Losses are recorded as float32, of which the ranks' mean rounds.
        assert_same_outcome(plain, outcome, rtol=1e-6, atol=1e-7, rounding=ROUNDING_OF_DOUBLES)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["mistral", "phi3", "deberta"])
def test_four_ranks_train_as_one_device_with_fewer_key_heads_than_ranks(name):
    options = {"sizes": MeshSizes(tensor=4), "strategy": "memopt_tp", "precision": "64-true"}
    plain = in_double_precision(name, STEPS)
    for outcome in run_on_ranks(lambda: fit_zoo(ARCHITECTURES[name], 4, STEPS, **options), 4, deadline_seconds=120):
        assert_same_outcome(plain, outcome, rtol=1e-8, atol=1e-8, rounding=ROUNDING_OF_DOUBLES)


@pytest.mark.slow
def test_experts_with_biases_and_an_attention_with_a_number_for_each_head_are_split():
    config = GptOssConfig(
        vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, max_position_embeddings=64, sliding_window=8, num_local_experts=4,
        num_experts_per_tok=2, use_cache=False, pad_token_id=0, bos_token_id=1, eos_token_id=1,
    )  # fmt: skip

    def make(dropout: float) -> LossInside:
        model = GptOssForCausalLM(config)
        for name, parameter in model.named_parameters():
            if "bias" in name:  # zeros would not tell whether they are added once
                parameter.data.normal_(0, 0.1)
        return LossInside(model)

    entry = Entry("gpt_oss", make, ARCHITECTURES["mistral"].sample)

    def fit():
        strategy = memopt.TensorParallelStrategy()
        return fit_zoo(entry, 2, STEPS, sizes=MeshSizes(tensor=2), strategy=strategy), strategy.describe()

    plain = run_on_ranks(lambda: fit_zoo(entry, 1, STEPS), 1)[0]
    for outcome, described in run_on_ranks(fit, 2, deadline_seconds=120):
        assert_same_outcome(plain, outcome)
        assert described.count(" experts ") == 2 and "gathered in" not in described
