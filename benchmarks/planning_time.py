"""How long a plan for a large model takes, on the processor alone, and how much memory it holds.

    python benchmarks/planning_time.py             # minutes
    python benchmarks/planning_time.py --only 7b   # one row, measured again
    python benchmarks/planning_time.py --quick --out x.json

Each row is planned in a process of its own, from the import of the planner on. Time is that of the processor, since
the machine is shared; of the memory the peak of the process is told.
"""

import multiprocessing
import resource
import time
from pathlib import Path
from typing import Any, NamedTuple

import lightning.pytorch as pl
import torch
from environment import environment_record, now
from options import Options, open_results

RESULTS = Path(__file__).parent / "results" / "planning_time.json"


class Size(NamedTuple):
    """A Llama, and what it is planned for."""

    config: dict[str, int]
    devices: int
    nodes: int
    batch_size: int
    tokens: int
    most_seconds: float


_7B = {"hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32, "num_attention_heads": 32}
_70B = {"hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 80, "num_attention_heads": 64}
ROWS = {
    "7b": Size(_7B, devices=8, nodes=1, batch_size=4, tokens=4096, most_seconds=30),
    "70b": Size(_70B | {"num_key_value_heads": 8}, devices=8, nodes=64, batch_size=1, tokens=4096, most_seconds=120),
}
_SMALL = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 6, "num_attention_heads": 8}


class Llama(pl.LightningModule):
    """A language model of transformers, as a user trains it."""

    def __init__(self, config: dict[str, int]) -> None:
        super().__init__()
        from transformers import LlamaConfig, LlamaForCausalLM

        self.model = LlamaForCausalLM(LlamaConfig(**config, vocab_size=32000, use_cache=False))

    def training_step(self, batch: torch.Tensor, batch_idx: int) -> torch.Tensor:
        """The loss of the next token."""
        return self.model(input_ids=batch, labels=batch).loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """AdamW as it is made everywhere."""
        return torch.optim.AdamW(self.parameters(), lr=1e-4)


def plan_row(size: Size) -> dict[str, Any]:
    """Plan it; for a process of its own."""
    import lightning_memopt as memopt
    from lightning_memopt.planning.trace import StepTracer

    steps, step = [], StepTracer._step

    def counted(self: StepTracer, *args: Any, **kwargs: Any) -> Any:
        steps.append(args[0])
        return step(self, *args, **kwargs)

    StepTracer._step = counted  # type: ignore[method-assign]
    batch = torch.zeros(size.batch_size, size.tokens, dtype=torch.int64)
    begin = time.process_time()
    result = memopt.plan(lambda: Llama(size.config), batch, devices=size.devices, nodes=size.nodes, device="h100")
    seconds = time.process_time() - begin
    return {
        "seconds": seconds,
        "most_seconds": size.most_seconds,
        "peak_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 2**10,
        "steps_traced": len(steps),
        "choices_traced": len(set(steps)),
        "devices": size.devices * size.nodes,
        "plans_that_fit": sum(plan.fits for plan in result.plans),
        "chosen": None if result.best is None else result.best.to_dict(),
    }


def main() -> None:
    options = Options(__doc__, RESULTS, ROWS).parse()
    results = open_results(options.out, {"environment": environment_record(), "quick": options.quick})
    for name in options.only or ROWS:
        size = ROWS[name]
        if options.quick:
            size = size._replace(config=_SMALL, devices=2, nodes=1, tokens=32)
        with multiprocessing.get_context("spawn").Pool(1) as pool:
            made = pool.apply(plan_row, (size,))
        results.add(name, made | {"measured_at": now()}, list(ROWS))
        print(
            name, {key: made[key] for key in ("seconds", "peak_bytes", "steps_traced", "choices_traced")}, flush=True
        )


if __name__ == "__main__":
    main()
