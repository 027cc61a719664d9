"""What PyTorch's quantization by export makes of modules of the zoo, beside ``"int8_static"``.

    python -m benchmarks.pt2e

Sizes and numbers only, which no other work on the machine changes; ``benchmarks/compression.py`` times both.
"""

import copy
import io
import json
import warnings
from collections.abc import Callable
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.pt2e_graph import by_export
from lightning_memopt.compression.quantize import module_bytes, quantize
from lightning_memopt.compression.ranges import observe_inputs
from tests.zoo import ZOO

RESULTS = Path(__file__).parent / "results" / "pt2e.json"
FORWARDS: dict[str, tuple[str, Callable[[Any, Tensor], Tensor]]] = {
    "mlp": ("0", lambda module, x: module(x)),
    "cnn": ("0", lambda module, x: module.head(module.blocks(module.stem(x)))),
    "encoder": ("tokens", lambda module, x: module.head(module.encoder(module.embed(x)).mean(dim=1))),
    "gpt2": ("input_ids", lambda module, x: module.model(input_ids=x).logits),
    "vit": ("pixel_values", lambda module, x: module.model(pixel_values=x).logits),
}
"""What a module reads of its batch, and what a user would have to write for those that have no ``forward``."""


class WithForward(nn.Module):
    """A module with the forward that it lacks."""

    def __init__(self, module: nn.Module, forward: Callable[[Any, Tensor], Tensor]) -> None:
        super().__init__()
        self.module = module
        self._forward = forward

    def forward(self, x: Tensor) -> Tensor:
        """What the module computes of ``x``."""
        return self._forward(self.module, x)


def row(name: str) -> list[str]:
    """One row of the table."""
    key, forward = FORWARDS[name]
    module, batch = ZOO[name].build().eval(), ZOO[name].batch()
    x = batch[key] if isinstance(batch, dict) else batch[int(key)]
    try:
        torch.export.export(module, (x,))
        as_it_is = "yes"
    except NotImplementedError:
        as_it_is = "no: it has no `forward`"
    net = WithForward(module, forward)
    with torch.no_grad():
        wanted, before = net(x), module_bytes(net)
        graph, rounded, products = _by_export(net, x)
        ours = copy.deepcopy(net)
        with observe_inputs(ours) as ranges:
            ours(x)
        done = quantize(ours, "int8_static", input_ranges=ranges)
        state = io.BytesIO()
        torch.save(graph.state_dict(), state)
        cells = [
            name, as_it_is, f"{rounded} of {products}", f"{module_bytes(graph) / before:.2f}",
            f"{len(state.getvalue()) / before:.2f}", f"{done.bytes_after / before:.2f}",
            f"{_decibels(wanted, graph(x)):.0f}, {_decibels(wanted, ours(x)):.0f}",
            ", ".join(done.fallbacks) or "none",
        ]  # fmt: skip
    return cells


def _by_export(net: nn.Module, x: Tensor) -> tuple[Any, int, int]:
    """The converted graph, how many of its matrix products and convolutions read integers, and how many there are."""
    graph = by_export(copy.deepcopy(net), x, [x])
    kinds = ("linear", "conv2d", "addmm", "aten.mm", "aten.matmul")
    products = [n for n in graph.graph.nodes if n.op == "call_function" and str(n.target).startswith(_aten(kinds))]
    rounded = [n for n in products if all("dequantize" in str(_source(n.args[i]).target) for i in _operands(n))]
    return graph, len(rounded), len(products)


def _aten(kinds: tuple[str, ...]) -> tuple[str, ...]:
    return tuple(kind if kind.startswith("aten.") else f"aten.{kind}" for kind in kinds)


def _operands(node: Any) -> tuple[int, int]:
    return (1, 2) if "addmm" in str(node.target) else (0, 1)


def _source(node: Any) -> Any:
    """Where the values of ``node`` come from, before they are only brought into another shape."""
    while "dequantize" not in str(node.target) and node.op == "call_function" and _reshapes(node):
        node = node.args[0]
    return node


def _reshapes(node: Any) -> bool:
    return any(part in str(node.target) for part in ("view", "reshape", "transpose", "permute", "clone", ".t."))


def _decibels(wanted: Tensor, found: Tensor) -> float:
    return float(20 * torch.log10(wanted.norm() / (wanted - found).norm()))


def main() -> None:
    """Write the table."""
    warnings.filterwarnings("ignore")
    titles = ["module", "exports as it is", "products of integers", "bytes, PT2E", "state on disk, PT2E",
              "bytes, `int8_static`", "dB, both", "fallbacks of `int8_static`"]  # fmt: skip
    results = {
        "torch": torch.__version__,
        "torchao": version("torchao"),
        "date": datetime.now(UTC).strftime("%Y-%m-%d"),
        "titles": titles,
        "rows": [row(name) for name in FORWARDS],
    }
    RESULTS.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
