"""How much faster than floats integers are multiplied here, layer by layer: the most that quantized inputs can give.

    python benchmarks/int8_kernels.py

The shapes are those of the tasks in ``compression_tasks.py`` at a batch of 32. Only the products are timed, as the
compiled modules call them, in processor time: no rounding of inputs, no scales, nothing between the layers.
"""

from collections.abc import Callable
from pathlib import Path
from statistics import median
from time import process_time
from typing import Any

import torch
from environment import environment_record, now
from options import Options, open_results
from torch.nn import functional as F

from lightning_memopt.compression.packed.ordered import Ordered

RESULTS = Path(__file__).parent / "results" / "int8_kernels.json"
MATRICES = {
    "digits_cnn": [(32, 1024, 128)],
    "digits_vit": [(512, 128, 384), (512, 128, 128), (512, 128, 512), (512, 512, 128)],
    "byte_lm": [(2048, 256, 768), (2048, 256, 256), (2048, 256, 1024), (2048, 1024, 256)],
}
"""Rows, inputs, outputs."""
IMAGES = {"digits_cnn": [(32, 32, 64, 8), (32, 64, 64, 4)]}
"""Images, channels in and out of a 3 x 3 convolution, height and width."""


def main() -> int:
    options = Options(__doc__, RESULTS)
    options.add_count("runs", 40, "pairs of runs that a ratio is the median of")
    options = options.parse()
    method = f"Median ratio of {options.runs} pairs of neighbouring runs, in processor time."
    results = open_results(options.out, {"environment": environment_record(), "time_method": method})
    calls: dict[str, tuple[str, Callable[[], Any], Callable[[], Any]]] = {}
    for task, shapes in MATRICES.items():
        calls |= {f"{task}.{'x'.join(map(str, shape))}": (task, *_matrix(*shape)) for shape in shapes}
    for task, shapes in IMAGES.items():
        calls |= {f"{task}.conv{'x'.join(map(str, shape))}": (task, *_images(*shape)) for shape in shapes}
    with torch.no_grad():
        for name, (task, floats, integers) in calls.items():
            pairs = [(_seconds(floats), _seconds(integers)) for _ in range(options.runs)]
            seconds = [median(pair[index] for pair in pairs) for index in (0, 1)]
            row = {"task": task, "seconds": seconds, "speedup": median(a / b for a, b in pairs), "measured_at": now()}
            results.add(name, row, list(calls))
            print(name, row, flush=True)
    return 0


def _matrix(rows: int, inner: int, outputs: int) -> tuple[Callable[[], Any], Callable[[], Any]]:
    x, weight, bias = torch.randn(rows, inner), torch.randn(outputs, inner), torch.randn(outputs)
    integers = torch.randint(0, 127, x.shape, dtype=torch.uint8)
    ordered = Ordered(torch.randint(-127, 128, weight.shape, dtype=torch.int8))

    def multiply() -> Any:
        return torch.ops.lightning_memopt.multiply_ordered(integers, ordered.key)

    return lambda: F.linear(x, weight, bias), multiply


def _images(count: int, inputs: int, outputs: int, size: int) -> tuple[Callable[[], Any], Callable[[], Any]]:
    x = torch.randn(count, inputs, size, size).to(memory_format=torch.channels_last)  # the faster one for floats too
    weight, bias = torch.randn(outputs, inputs, 3, 3), torch.randn(outputs)
    integers = torch.randint(0, 127, x.shape, dtype=torch.uint8).to(memory_format=torch.channels_last)
    ordered = Ordered(torch.randint(-127, 128, weight.shape, dtype=torch.int8))

    def convolve() -> Any:
        return torch.ops.lightning_memopt.convolve_ordered(integers, ordered.key, 0, [1, 1], [1, 1], [1, 1])

    return lambda: F.conv2d(x, weight, bias, padding=1), convolve


def _seconds(call: Callable[[], Any], times: int = 5) -> float:
    call()
    start = process_time()
    for _ in range(times):
        call()
    return (process_time() - start) / times


if __name__ == "__main__":
    raise SystemExit(main())
