"""How even the stages of a pipeline are, cut by counted and by measured cost: judged by clocks, in one process.

python benchmarks/splits.py
"""

import json
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any

import torch
import transformers
from environment import environment_record, now
from torch import Tensor, nn

from lightning_memopt.parallel.pipeline.operator_times import OperatorTimes
from lightning_memopt.parallel.pipeline.probe import Survey, find_links, run_silently, survey
from lightning_memopt.parallel.pipeline.splitting import partition
from lightning_memopt.parallel.pipeline.stubs import StubMode, shadow_of

RESULTS = Path(__file__).parent / "results" / "splits.json"
STAGES = (2, 4)
STEPS = 5

Step = Callable[[nn.Module], Tensor]


def gpt2() -> tuple[nn.Module, dict[str, Tensor]]:
    """A head that is as large as all blocks."""
    config = transformers.GPT2Config(
        vocab_size=16384, n_embd=256, n_layer=12, n_head=8, use_cache=False, bos_token_id=0, eos_token_id=1
    )
    ids = torch.randint(0, 16384, (2, 256))
    return transformers.GPT2LMHeadModel(config), {"input_ids": ids, "labels": ids}


def convnext() -> tuple[nn.Module, dict[str, Tensor]]:
    """Convolutions at four resolutions."""
    model = transformers.ConvNextForImageClassification(transformers.ConvNextConfig(num_labels=10))
    return model, {"pixel_values": torch.randn(2, 3, 224, 224), "labels": torch.zeros(2, dtype=torch.long)}


def whisper() -> tuple[nn.Module, dict[str, Tensor]]:
    """An encoder of long sequences and a decoder of short ones."""
    config = transformers.WhisperConfig(
        d_model=256, encoder_layers=6, decoder_layers=6, encoder_attention_heads=4, decoder_attention_heads=4,
        encoder_ffn_dim=1024, decoder_ffn_dim=1024, use_cache=False,
    )  # fmt: skip
    labels = torch.zeros(1, 64, dtype=torch.long)
    return transformers.WhisperForConditionalGeneration(config), {
        "input_features": torch.randn(1, 80, 3000),
        "labels": labels,
    }


def row(model: nn.Module, batch: dict[str, Tensor]) -> dict[str, Any]:
    """The time of the slowest stage over that of the mean one, by each kind of cut."""

    def step(module: nn.Module) -> Tensor:
        return module(**batch).loss

    times = OperatorTimes(torch.device("cpu"))
    counted = surveyed(model, step, times)
    began = perf_counter()
    measured = replace(counted, costs=times.costs(len(counted.costs)))
    seconds = perf_counter() - began
    clocked = replace(counted, costs=clock(model, counted.names, step))
    found: dict[str, Any] = {"links": len(counted.names), "seconds_to_measure": seconds}
    for stages in STAGES:
        by = {"counted": counted, "measured": measured, "clocked": clocked}
        found[f"stages_{stages}"] = {
            kind: unevenness(clocked, partition(known, "auto", stages).starts) for kind, known in by.items()
        }
    return found


def surveyed(model: nn.Module, step: Step, times: OperatorTimes) -> Survey:
    """What the strategy knows before it cuts."""
    mode = StubMode()
    tensors = (*model.parameters(), *model.buffers())
    shadow, _ = shadow_of(model, {tensor: mode.stub(tensor, torch.device("cpu")) for tensor in tensors})
    run = run_silently(shadow, lambda: step(shadow))
    return survey(shadow, find_links(shadow, run), mode, run, times)


def clock(model: nn.Module, links: list[str], step: Step) -> list[float]:
    """Seconds of forward and backward between the calls of neighbouring links, the median over steps."""
    taken = []
    for _ in range(1 + STEPS):
        marks: list[float] = []
        back: list[float] = []

        def called(_: nn.Module, args: tuple[Any, ...], marks: list[float] = marks, back: list[float] = back) -> None:
            marks.append(perf_counter())
            args[0].register_hook(lambda _: back.append(perf_counter()))

        hooks = [model.get_submodule(name).register_forward_pre_hook(called) for name in links]
        begun = perf_counter()
        loss = step(model)
        between = perf_counter()
        loss.backward()
        ended = perf_counter()
        for hook in hooks:
            hook.remove()
        forward = [begun, *marks, between]
        # Where the gradient of a link's input is there, its backward is done, and that of all behind it.
        backward = [between, *back, *[ended] * (len(links) + 1 - len(back))]
        forwards = [late - early for early, late in pairwise(forward)]
        backwards = [late - early for early, late in pairwise(backward)]
        taken.append([f + b for f, b in zip(forwards, reversed(backwards), strict=True)])
        model.zero_grad()
    return [median(values) for values in zip(*taken[1:], strict=True)]


def unevenness(clocked: Survey, starts: tuple[int, ...]) -> float:
    """The slowest stage's time over the mean of all: what the step takes longer than with even stages."""
    ends = (*starts[1:], len(clocked.names))
    stages = [sum(clocked.costs[start + 1 : end + 1]) for start, end in zip(starts, ends, strict=True)]
    stages[0] += clocked.costs[0]
    return max(stages) * len(stages) / sum(stages)


def main() -> None:
    """Write the results of all models."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    rows = {}
    for make in (gpt2, convnext, whisper):
        rows[make.__name__] = row(*make()) | {"about": make.__doc__, "measured_at": now()}
        print(make.__name__, rows[make.__name__], flush=True)
    RESULTS.write_text(json.dumps({"environment": environment_record(), "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
