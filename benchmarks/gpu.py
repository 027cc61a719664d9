"""The table of techniques on one CUDA GPU, at a size that fills it: Llama-shaped, 1B parameters, context 4096, bf16.

    python benchmarks/gpu.py                  # chooses the batch by the predicted peak
    python benchmarks/gpu.py --batch-size 4
    python benchmarks/gpu.py --only low_bit   # one row, merged into the results

Peaks are CUDA's own (``torch.cuda.max_memory_allocated`` over the steps after the first, when optimizer state is in
place), categories those of ``measure_memory``, times medians of synchronized steps. Each run has a process, and so a
CUDA allocator, of its own. Parity is the largest relative difference of a step's loss from the plain run's: in bf16
the order of additions shows in the third digit.

Without a GPU it says so and runs a toy size on the CPU, to show that it works.
"""

import argparse
import gc
import sys
import time
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import lightning.pytorch as pl
import torch
import workload
from environment import environment_record, now
from results_file import OtherEnvironmentError, ResultsFile
from rows import ROWS, Row
from verdict import memory_ratio, summarize
from workers import Channel, WorkerError, in_worker

import lightning_memopt as memopt
from lightning_memopt.planning.predict import predict_step

RESULTS = Path(__file__).parent / "results" / "gpu.json"
NAMES = [name for name, row in ROWS.items() if row.vocabulary == 256] + ["chunked_loss"]
STEPS = 6
FILL = 0.9
"""Share of the GPU that the plain run may be predicted to use: the allocator needs room to round and to split."""
GRANULARITY = 512
"""CUDA's caching allocator hands out multiples of so many bytes."""


@dataclass(frozen=True)
class LlamaSize:
    """Shape of a Llama and of its batch; the defaults are those of Llama 3.2 1B, head tied."""

    batch_size: int
    context: int = 4096
    layers: int = 16
    width: int = 2048
    heads: int = 32
    key_value_heads: int = 8
    feed_forward: int = 8192
    vocabulary: int = 128256

    def build(self) -> workload.CausalLanguageModel:
        """The model, random-init in float32."""
        from transformers import LlamaConfig, LlamaForCausalLM

        config = LlamaConfig(
            vocab_size=self.vocabulary, hidden_size=self.width, intermediate_size=self.feed_forward,
            num_hidden_layers=self.layers, num_attention_heads=self.heads, num_key_value_heads=self.key_value_heads,
            max_position_embeddings=self.context, tie_word_embeddings=True, use_cache=False,
        )  # fmt: skip
        torch.manual_seed(0)
        return workload.CausalLanguageModel(LlamaForCausalLM(config))

    def batch(self) -> dict[str, torch.Tensor]:
        """Random tokens, ``(batch_size, context)``, the same each time."""
        generator = torch.Generator().manual_seed(0)
        tokens = torch.randint(self.vocabulary, (self.batch_size, self.context), generator=generator)
        return {"input_ids": tokens, "labels": tokens.clone()}


TOY = LlamaSize(
    batch_size=4, context=64, layers=2, width=64, heads=4, key_value_heads=2, feed_forward=128, vocabulary=512
)


class Watch(pl.Callback):
    """Loss, synchronized time and CUDA peak of each step after the first."""

    def __init__(self) -> None:
        self.losses: list[float] = []
        self.seconds: list[float] = []
        self.peak_bytes = 0
        self.reserved_bytes = 0
        self._since = 0.0

    def on_train_batch_end(
        self, trainer: pl.Trainer, module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Close one step and open the next."""
        on_cuda = module.device.type == "cuda"
        if on_cuda:
            torch.cuda.synchronize()
        self.losses.append(float(outputs["loss"]))
        if batch_idx > 0:
            self.seconds.append(time.perf_counter() - self._since)
        elif on_cuda:
            torch.cuda.reset_peak_memory_stats()
        if on_cuda:
            self.peak_bytes = torch.cuda.max_memory_allocated()
            self.reserved_bytes = torch.cuda.max_memory_reserved()
        self._since = time.perf_counter()


def main() -> int:
    options = _options()
    workload.preload()
    on_gpu = torch.cuda.is_available()
    if on_gpu:
        size = LlamaSize(options.batch_size or _largest_batch(torch.cuda.get_device_properties(0).total_memory))
        print(f"{torch.cuda.get_device_name(0)}: batches of {size.batch_size} x {size.context}", flush=True)
    else:
        size = TOY
        print("No CUDA GPU here: a toy size runs on the CPU, its figures mean nothing and are not kept.", flush=True)
    header = {
        "environment": environment_record(),
        "workload": asdict(size),
        "time_method": f"Time is the ratio of the medians of {STEPS - 1} synchronized steps.",
    }
    try:
        results = ResultsFile(options.out, header) if on_gpu or options.out != RESULTS else None
    except OtherEnvironmentError as error:
        print(error, file=sys.stderr)
        return 2
    plain = results.rows.get("plain") if results else None
    good = True
    names = [name for name in NAMES if name in options.only] if options.only else NAMES
    for name in names if plain and "error" not in plain else ["plain", *(one for one in names if one != "plain")]:
        try:
            record = in_worker(_measure, name, size, on_gpu, method="spawn" if on_gpu else "fork")
            record = _against(name, record, plain if name != "plain" else None)
        except WorkerError as error:
            record = {"error": str(error)}
            good = False
        record = {"title": _row(name, on_gpu).title, "limit": "", **record, "measured_at": now()}
        if name == "plain":
            plain = record
        if results:
            results.add(name, record, NAMES)
        print(_line(name, record), flush=True)
    return 0 if good else 1


def _measure(channel: Channel, name: str, size: LlamaSize, on_gpu: bool) -> None:
    """Body of a worker: predict, measure and train one row."""
    workload.be_quiet()
    batch = size.batch()
    predicted_bytes = _predicted_peak(name, size, on_gpu)
    memory = summarize(memopt.measure_memory(_build(name, size), batch, **_trainer_options(name, on_gpu)))
    if on_gpu:  # what the measurement left with the allocator is not the run's
        gc.collect()
        torch.cuda.empty_cache()
    watch = Watch()
    options = _trainer_options(name, on_gpu)
    options["callbacks"] = [*options.get("callbacks", ()), watch]
    workload.trainer(max_steps=STEPS, **options).fit(_build(name, size), workload.loader(batch))
    if on_gpu:
        memory |= {"peak_bytes": watch.peak_bytes, "reserved_bytes": watch.reserved_bytes}
    channel.send(
        {
            "memory": memory | {"predicted_peak_bytes": predicted_bytes},
            "seconds": median(watch.seconds),
            "losses": watch.losses,
        }
    )


def _trainer_options(name: str, on_gpu: bool) -> dict[str, Any]:
    return {"accelerator": "gpu" if on_gpu else "cpu", "devices": 1} | _row(name, on_gpu).options()


def _row(name: str, on_gpu: bool) -> Row:
    """The row as the CPU's table has it, but that a GPU offloads to the host's memory and not to a disk."""
    if name != "offload" or not on_gpu:
        return ROWS[name]
    return replace(
        ROWS[name],
        title="ActivationOffload to pinned memory",
        options=lambda: {"callbacks": [memopt.ActivationOffload("cpu")]},
    )


def _build(name: str, size: LlamaSize) -> pl.LightningModule:
    """The module in bf16 throughout, except in the rows whose precision plugin decides."""
    module = size.build()
    return module if "plugins" in ROWS[name].options() else module.bfloat16()


def _against(name: str, record: dict[str, Any], plain: dict[str, Any] | None) -> dict[str, Any]:
    """Add the ratios to the plain run; there are none where it failed, as out of memory."""
    reference = record if plain is None else plain
    if "error" in reference:
        return record
    record["time"] = {"ratio": record["seconds"] / reference["seconds"]}
    record["loss_difference"] = max(
        abs(own - other) / abs(other) for own, other in zip(record["losses"], reference["losses"], strict=True)
    )
    if plain is not None:
        row = ROWS[name]
        record |= {
            "quantity": row.quantity,
            "memory_ratio": memory_ratio(row, record["memory"], plain["memory"]),
            "memory_target": None,
        }
    return record


def _line(name: str, record: dict[str, Any]) -> str:
    if "error" in record:
        return f"{name}: {record['error']}"
    memory = record["memory"]
    line = f"{name}: peak {memory['peak_bytes'] / 2**20:.1f} MiB"
    line += f", predicted / measured {memory['predicted_peak_bytes'] / memory['peak_bytes']:.3f}"
    if "time" in record:
        line += f", time {record['time']['ratio']:.2f}, loss off by {record['loss_difference']:.1e} at most"
    return line


def _largest_batch(gpu_bytes: int) -> int:
    """The largest power of two whose plain run is predicted to fit."""
    best = 1
    while _predicted_peak("plain", LlamaSize(2 * best), on_gpu=True) <= FILL * gpu_bytes:
        best *= 2
    return best


def _predicted_peak(name: str, size: LlamaSize, on_gpu: bool) -> int:
    # On fake tensors, which take no time to fill with random numbers, and write no files in the row that offloads.
    return predict_step(
        partial(_build, name, size),
        size.batch(),
        gpu_granularity=GRANULARITY if on_gpu else None,
        **_trainer_options(name, on_gpu=False),
    ).peak_bytes


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch-size", type=int, help="sequences in a batch (default: what fits by prediction)")
    parser.add_argument("--only", action="append", choices=NAMES, metavar="ROW", help="a row; may be given again")
    parser.add_argument("--out", type=Path, default=RESULTS, help=f"results file (default: results/{RESULTS.name})")
    options = parser.parse_args()
    if options.batch_size is not None and options.batch_size < 1:
        parser.error(f"--batch-size {options.batch_size}: a batch has at least one sequence")
    return options


if __name__ == "__main__":
    raise SystemExit(main())
