"""Figure 4 of the planner: the memory that others published for a configuration, against this prediction of it.

    python benchmarks/planner_published.py                  # long on 2 cores; nothing of these models is allocated
    python benchmarks/planner_published.py --rows packed    # one row
    python benchmarks/planner_published.py --quick --out F  # does it run? Of small models, compared with nothing

The models are those of transformers, random and of the published sizes; the loops are predicted for the device of
the row. Rows that ``torch.compile`` or float8 made are left out, since neither is predicted, but where a later row of
the same list holds compilation too, ``differs`` says so.
"""

import argparse
import time
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import lightning.pytorch as pl
import torch
from environment import environment_record, now
from results_file import ResultsFile
from transformers import LlamaConfig, LlamaForCausalLM

from lightning_memopt.parallel.mesh import MeshSizes
from lightning_memopt.planning.devices import DeviceModel, device_model
from lightning_memopt.planning.memory_model import rank_peak
from lightning_memopt.planning.space import Choice, Layout, Techniques
from lightning_memopt.planning.trace import StepTracer

RESULTS = Path(__file__).parent / "results" / "planner_published.json"
_SHARED: dict[str, Any] = {"vocab_size": 128256, "num_key_value_heads": 8, "head_dim": 128, "use_cache": False}
LLAMA_3B = LlamaConfig(
    hidden_size=3072,
    intermediate_size=8192,
    num_hidden_layers=28,
    num_attention_heads=24,
    tie_word_embeddings=True,
    **_SHARED,
)
LLAMA_8B = LlamaConfig(
    hidden_size=4096, intermediate_size=14336, num_hidden_layers=32, num_attention_heads=32, **_SHARED
)

_ALONE = Layout()
_EIGHT_SHARDS = Layout("memopt_zero3", MeshSizes(shard=8))
_PACKED = Techniques(precision="bf16-true")
_CHUNKED = replace(_PACKED, chunked_loss=True)
_CHECKPOINTED = replace(_CHUNKED, checkpointing="full")
_IN_BACKWARD = replace(_CHECKPOINTED, in_backward=True)
_OFFLOADED = replace(_IN_BACKWARD, offload=True)

_TORCHTUNE = "torchtune's documentation of its memory optimizations, Llama-3.2-3B on one A100, batch 2 of 4096 tokens"
_TORCHTITAN = "torchtitan's benchmarks, Llama-3.1 8B on 8 H100, batch 2 of 8192 tokens on each"
_COMPILED = "theirs is compiled, which fuses elementwise operators"
_HELD = f"{_COMPILED}; Lightning holds the gradients of the step before until the forward has ended, theirs does not"


class Published(NamedTuple):
    """One row of somebody's table."""

    source: str
    gib: float
    config: LlamaConfig
    tokens: int
    choice: Choice
    differs: str = ""

    @property
    def device(self) -> DeviceModel:
        """What theirs ran on."""
        return device_model("h100" if self.source == _TORCHTITAN else "a100-80gb")


ROWS = {
    "packed": Published(_TORCHTUNE, 60.0, LLAMA_3B, 4096, Choice(_ALONE, _PACKED)),
    "chunked loss": Published(_TORCHTUNE, 42.9, LLAMA_3B, 4096, Choice(_ALONE, _CHUNKED), _HELD),
    "checkpointing": Published(_TORCHTUNE, 24.9, LLAMA_3B, 4096, Choice(_ALONE, _CHECKPOINTED), _HELD),
    "optimizer in backward": Published(_TORCHTUNE, 23.1, LLAMA_3B, 4096, Choice(_ALONE, _IN_BACKWARD), _COMPILED),
    "activation offload": Published(_TORCHTUNE, 21.8, LLAMA_3B, 4096, Choice(_ALONE, _OFFLOADED), _COMPILED),
    "8-bit optimizer": Published(
        _TORCHTUNE,
        17.6,
        LLAMA_3B,
        4096,
        Choice(_ALONE, replace(_OFFLOADED, low_bit=True)),
        "theirs came to 4.2 GiB less than the row above, where 8 bits less of two moments of each parameter are 6.0",
    ),
    "8 shards, selective": Published(
        _TORCHTITAN,
        82.4,
        LLAMA_8B,
        8192,
        Choice(_EIGHT_SHARDS, Techniques(checkpointing="selective", precision="bf16-mixed")),
        "theirs keeps every other product, ours those that are cheapest to keep",
    ),
}


class Llama(pl.LightningModule):
    """A language model of transformers, as a user trains it."""

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        self.model = LlamaForCausalLM(config)

    def training_step(self, batch: torch.Tensor, batch_idx: int) -> torch.Tensor:
        """The loss of the next token."""
        return self.model(input_ids=batch, labels=batch).loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """AdamW one tensor at a time, as it runs fused on a GPU: without lists of temporaries."""
        return torch.optim.AdamW(self.parameters(), lr=1e-4, foreach=False)


def made_small(row: Published) -> Published:
    """The same row of a model that is predicted in seconds."""
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "vocab_size": 256}
    heads = {"num_attention_heads": 8, "num_key_value_heads": 8, "head_dim": 8}
    config = LlamaConfig(**sizes, **heads, use_cache=False, tie_word_embeddings=row.config.tie_word_embeddings)
    return row._replace(config=config, tokens=32)


def predict(row: Published) -> dict[str, Any]:
    """Predicted against published, and how long it took."""
    begin = time.process_time()
    with torch.device("meta"):
        look = Llama(row.config)
    batch = torch.zeros(2, row.tokens, dtype=torch.int64)
    trace = StepTracer(lambda: Llama(row.config), look, batch, {}, row.device).trace(row.choice)
    categories = rank_peak(trace, row.choice.layout, row.device)
    predicted_gib = sum(categories.values()) / 2**30
    return {
        "source": row.source,
        "published_gib": row.gib,
        "predicted_gib": predicted_gib,
        "error": predicted_gib / row.gib - 1,
        "by_category": categories,
        "at": f"{trace.peak.phase}, {trace.peak.module}",
        "differs": row.differs,
        "seconds": time.process_time() - begin,
        "measured_at": now(),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", nargs="+", choices=ROWS, default=list(ROWS), metavar="ROW")
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--quick", action="store_true", help="small models instead, to see that it runs")
    options = parser.parse_args()
    if options.quick and options.out == RESULTS:
        parser.error("--quick needs an --out of its own: what it writes compares with nothing")
    results = ResultsFile(options.out, {"environment": environment_record()})
    for name in options.rows:
        try:
            found = predict(made_small(ROWS[name]) if options.quick else ROWS[name])
        except Exception as error:
            found = {"published_gib": ROWS[name].gib, "error_text": f"{type(error).__name__}: {error}"[:500]}
        results.add(name, found, list(ROWS))
        print(name, {key: found.get(key) for key in ("published_gib", "predicted_gib", "error", "error_text", "at")})


if __name__ == "__main__":
    main()
