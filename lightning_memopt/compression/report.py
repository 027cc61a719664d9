"""What compressing a module did: bytes, zeros, latency and metrics, before and after, and what was left alone."""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Self

from torch import nn
from typing_extensions import override

from lightning_memopt.compression.latency import Latency
from lightning_memopt.compression.sizes import ModuleSizes, measure_sizes, plain_parts
from lightning_memopt.memory.report import JsonReport, format_bytes

if TYPE_CHECKING:
    from rich.table import Table


@dataclass(frozen=True)
class ModuleChange:
    """One module before and after.

    Attributes:
        name: Qualified name; ``""`` is the root.
        kind: Class of the module, of the new one where it was replaced.
        bytes_before: Bytes in memory.
        bytes_after: Bytes in memory; 0 where the module is gone.
        disk_bytes_after: Bytes in the packed form on disk.
        sparsity: Share of its weights that is zero afterwards.
    """

    name: str
    kind: str
    bytes_before: int
    bytes_after: int
    disk_bytes_after: int
    sparsity: float


@dataclass(frozen=True)
class CompressionReport(JsonReport):
    """What compressing a module did.

    Attributes:
        modules: Each module that holds tensors, before or after.
        bytes_before: Bytes in memory of parameters and buffers.
        bytes_after: The same of the compressed module.
        disk_bytes_before: Bytes of its plain ``state_dict`` on disk.
        disk_bytes_after: Bytes of the folder that was exported, or of the packed tensors where none was.
        sparsity: Share of zeros over all weights.
        eligible_sparsity: Share of zeros over the weights that were to be pruned; ``None`` where none were named.
        latency: Seconds before and after, by size of the batch, as far as it was measured.
        metrics_before: The validation metrics, as the module logs them; empty without validation.
        metrics_after: The same of the compressed module.
        skipped: Why a weight was left alone, by its name.
        skipped_bytes: What it takes in memory.
        fallbacks: Of quantized weights that are not rounded, or whose inputs are not, as was asked for, what is done
            instead and why.
    """

    modules: tuple[ModuleChange, ...]
    bytes_before: int
    bytes_after: int
    disk_bytes_before: int
    disk_bytes_after: int
    sparsity: float
    eligible_sparsity: float | None
    latency: tuple[Latency, ...]
    metrics_before: Mapping[str, float]
    metrics_after: Mapping[str, float]
    skipped: Mapping[str, str]
    skipped_bytes: Mapping[str, int]
    fallbacks: Mapping[str, str]

    parts: ClassVar[Mapping[str, type[Any]]] = {"modules": ModuleChange, "latency": Latency}

    @property
    def ratio(self) -> float:
        """Bytes in memory after by those before."""
        return self.bytes_after / max(self.bytes_before, 1)

    @property
    def disk_ratio(self) -> float:
        """Bytes on disk after by those of the plain ``state_dict``."""
        return self.disk_bytes_after / max(self.disk_bytes_before, 1)

    @override
    def to_json(self) -> str:
        """The whole report as JSON; a metric that is no number, which JSON has none for, is text: ``"nan"``."""
        before, after = (
            {name: value if math.isfinite(value) else str(value) for name, value in metrics.items()}
            for metrics in (self.metrics_before, self.metrics_after)
        )
        return JsonReport.to_json(replace(self, metrics_before=before, metrics_after=after))  # type: ignore[arg-type]

    @override
    @classmethod
    def from_json(cls, text: str) -> Self:
        """Read what :meth:`to_json` wrote.

        Raises:
            ValueError: ``text`` is not JSON or lacks a field.
        """
        report = super().from_json(text)
        try:
            before, after = (
                {name: float(value) for name, value in metrics.items()}
                for metrics in (report.metrics_before, report.metrics_after)
            )
        except (TypeError, AttributeError) as error:
            raise ValueError(f"not a {cls.__name__}: {error}") from error
        return replace(report, metrics_before=before, metrics_after=after)

    def plot(self, path: str | Path) -> Path:
        """Draw bytes before and after by module as a PNG (needs the ``plot`` extra) and return where it is.

        Args:
            path: File to write; missing folders are made.
        """
        from lightning_memopt.compression.plots import plot_report

        return plot_report(self, path)

    def __str__(self) -> str:
        from rich.console import Console

        console = Console(width=110, color_system=None, force_terminal=False)
        with console.capture() as capture:
            console.print(self)
        return capture.get()

    def __rich__(self) -> "Table":
        from rich.table import Table
        from rich.text import Text

        table = Table(title="compression", title_justify="left")
        table.add_column("", overflow="fold")
        for column in ("before", "after", "ratio"):
            table.add_column(column, justify="right")

        def add(*cells: str) -> None:
            table.add_row(*map(Text, cells))  # names and reasons are the user's, and no markup

        for title, before, after in (
            ("in memory", self.bytes_before, self.bytes_after),
            ("on disk", self.disk_bytes_before, self.disk_bytes_after),
        ):
            add(title, format_bytes(before), format_bytes(after), f"{after / max(before, 1):.3f}")
        for one in self.latency:
            title = f"latency, batch of {one.batch_size}"
            ratio = one.after_seconds / one.before_seconds
            word = " slower" if ratio > 1.1 else " faster" if ratio < 0.9 else ""  # in between is noise
            before_after = (f"{seconds * 1e3:.2f} ms" for seconds in (one.before_seconds, one.after_seconds))
            add(title, *before_after, f"{ratio:.2f}{word}")
        for name in {**self.metrics_before, **self.metrics_after}:
            pair = [metrics.get(name) for metrics in (self.metrics_before, self.metrics_after)]
            add(name, *("-" if value is None else f"{value:#.5g}" for value in pair), "")
        add("zeros, of all weights", "", f"{self.sparsity:.1%}", "")
        if self.eligible_sparsity is not None:
            add("zeros, of the weights to be pruned", "", f"{self.eligible_sparsity:.1%}", "")
        for reason, names in _by_reason(self.fallbacks):
            others = f" and {len(names) - 1} more" if len(names) > 1 else ""
            add(f"in another way: {names[0]}{others}", "", reason, "")
        for reason, names in _by_reason(self.skipped):
            others = f" and {len(names) - 1} more" if len(names) > 1 else ""
            size = format_bytes(sum(self.skipped_bytes.get(name, 0) for name in names))
            add(f"left alone: {names[0]}{others}", size, reason, "")
        return table


def _by_reason(reasons: Mapping[str, str]) -> Iterator[tuple[str, list[str]]]:
    for reason in dict.fromkeys(reasons.values()):
        yield reason, [name for name, other in reasons.items() if other == reason]


def compression_report(
    before: nn.Module | ModuleSizes,
    after: nn.Module,
    *,
    skipped: Mapping[str, str] | None = None,
    fallbacks: Mapping[str, str] | None = None,
    eligible_sparsity: float | None = None,
    metrics_before: Mapping[str, float] | None = None,
    metrics_after: Mapping[str, float] | None = None,
    latency: tuple[Latency, ...] = (),
    export_path: str | Path | None = None,
) -> CompressionReport:
    """Compare a module with what became of it.

    Args:
        before: The original, or its sizes (:func:`measure_sizes`) where it was changed in place.
        after: The compressed module.
        skipped: Why a weight was left alone, by its name.
        fallbacks: What is done instead of what was asked for, by the name of the weight.
        eligible_sparsity: Share of zeros over the weights that were to be pruned.
        metrics_before: Validation metrics of the original.
        metrics_after: Validation metrics of the compressed module.
        latency: What :func:`~lightning_memopt.compression.latency.compare_latencies` measured.
        export_path: Folder that the compressed module was saved to; its files are what it takes on disk.

    Example:
        >>> net = nn.Linear(64, 64)
        >>> compression_report(net, nn.Linear(64, 64).bfloat16()).ratio
        0.5
    """
    old = measure_sizes(before, packed=False) if isinstance(before, nn.Module) else before
    new = measure_sizes(after)
    weights = sum(size.weights for size in new.values())
    disk_bytes_after = sum(size.disk_bytes for size in new.values())
    if export_path is not None:
        disk_bytes_after = sum(file.stat().st_size for file in Path(export_path).rglob("*") if file.is_file())
    return CompressionReport(
        modules=tuple(_change(name, old, new) for name in {**old, **new}),
        bytes_before=sum(size.bytes for size in old.values()),
        bytes_after=sum(size.bytes for size in new.values()),
        disk_bytes_before=sum(size.disk_bytes for size in old.values()),
        disk_bytes_after=disk_bytes_after,
        sparsity=sum(size.zeros for size in new.values()) / max(weights, 1),
        eligible_sparsity=eligible_sparsity,
        latency=latency,
        metrics_before=dict(metrics_before or {}),
        metrics_after=dict(metrics_after or {}),
        skipped=dict(skipped or {}),
        fallbacks=dict(fallbacks or {}),
        skipped_bytes={
            name: sum(part.nbytes for part in plain_parts(parameter))
            for name, parameter in after.named_parameters(remove_duplicate=False)
            if name in (skipped or {})
        },
    )


def _change(name: str, old: ModuleSizes, new: ModuleSizes) -> ModuleChange:
    first, last = old.get(name), new.get(name)
    known = last or first
    assert known is not None
    return ModuleChange(
        name=name,
        kind=known.kind,
        bytes_before=first.bytes if first else 0,
        bytes_after=last.bytes if last else 0,
        disk_bytes_after=last.disk_bytes if last else 0,
        sparsity=last.zeros / last.weights if last and last.weights else 0.0,
    )
