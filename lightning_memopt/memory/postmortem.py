"""After an out-of-memory error: what was in use, whose it was, and what would have helped.

All of this runs when memory is short. Nothing is imported or drawn here beyond plain text, the tensors are only
described, never read, and each file is written on its own so that one failure does not cost the others.
"""

import json
import re
import traceback
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from html import escape
from pathlib import Path

import torch
from torch import nn

from lightning_memopt.memory.html import page, table
from lightning_memopt.memory.live import LiveTensor, find_live_tensors, sum_by
from lightning_memopt.memory.remedies import Remedy, estimate_remedies
from lightning_memopt.memory.report import MemoryReport, format_bytes

_LARGEST = 20
_UNITS = {"bytes": 1, "kib": 2**10, "mib": 2**20, "gib": 2**30, "tib": 2**40}


@dataclass(frozen=True)
class PostMortem:
    """What an out-of-memory error left to be seen.

    Attributes:
        error: The error's type and message.
        device: Device type whose memory ran out.
        requested_bytes: Size of the allocation that failed; None where the message does not say.
        found_bytes: Bytes of all tensors found alive.
        by_category: Those bytes by category.
        by_submodule: Those bytes by submodule, the largest first; ``""`` is what no submodule is known to own.
        largest: The largest tensors.
        remedies: What would have helped, the most first.
        last_report: The last complete step that was measured, if any.
    """

    error: str
    device: str
    requested_bytes: int | None
    found_bytes: int
    by_category: Mapping[str, int]
    by_submodule: Mapping[str, int]
    largest: tuple[LiveTensor, ...]
    remedies: tuple[Remedy, ...]
    last_report: MemoryReport | None = None

    def to_json(self) -> str:
        """All of it as JSON, without the timeline of the last report."""
        fields = asdict(self)
        if self.last_report is not None:
            del fields["last_report"]["timeline"]
        return json.dumps(fields, indent=1)

    def to_text(self) -> str:
        """All of it for people, in plain text."""
        sections = []
        for title, header, rows in self._tables():
            widths = [max(len(row[i]) for row in (header, *rows)) for i in range(len(header))]
            cells = [[c.ljust(w) for c, w in zip(row, widths, strict=True)] for row in (header, *rows)]
            lines = [f"  {'  '.join(row).rstrip()}" for row in cells]
            sections.append("\n".join((title, *lines)))
        return "\n\n".join(("Out of memory", "\n".join(self._summary()), *sections)) + "\n"

    def to_html(self) -> str:
        """All of it as one self-contained HTML page."""
        parts = [f"<p>{escape(sentence)}</p>" for sentence in self._summary()]
        for title, header, rows in self._tables():
            parts += [f"<h2>{escape(title)}</h2>", table(header, rows, text_columns=(0, 2, 3, 4))]
        return page("Out of memory", parts)

    def _summary(self) -> list[str]:
        sentences = [self.error.strip()]
        if self.requested_bytes is not None:
            sentences.append(f"The allocation that failed asked for {format_bytes(self.requested_bytes)}.")
        sentences.append(f"Tensors found alive on {self.device}: {format_bytes(self.found_bytes)}.")
        if self.last_report is not None:
            sentences.append(f"Peak of the last step that was measured: {format_bytes(self.last_report.peak_bytes)}.")
        return sentences

    def _tables(self) -> list[tuple[str, list[str], list[list[str]]]]:
        categories = [[name.replace("_", " "), format_bytes(size)] for name, size in self.by_category.items()]
        largest = [
            [
                "x".join(map(str, t.shape)) or "scalar",
                format_bytes(t.size_bytes),
                t.dtype,
                t.category,
                t.submodule or "-",
            ]
            for t in self.largest
        ]
        remedies = [[r.technique, format_bytes(r.saves_bytes), r.formula] for r in self.remedies]
        submodules = [[name or "-", format_bytes(size)] for name, size in self.by_submodule.items()]
        if len(submodules) > _LARGEST:
            rest = sum(list(self.by_submodule.values())[_LARGEST:])
            submodules[_LARGEST:] = [[f"{len(submodules) - _LARGEST} others", format_bytes(rest)]]
        return [
            (
                "What would have helped, each alone (estimates from what was in use)",
                ["technique", "saves about", "estimated as"],
                remedies or [["nothing that this package knows", "", ""]],
            ),
            ("In use by category", ["category", "in use"], categories),
            ("In use by submodule", ["submodule", "in use"], submodules),
            ("Largest tensors", ["shape", "size", "type", "category", "submodule"], largest),
        ]


def examine(
    error: BaseException,
    module: nn.Module,
    optimizers: Sequence[torch.optim.Optimizer] = (),
    *,
    device_type: str = "cpu",
    last_report: MemoryReport | None = None,
    is_training: bool = True,
) -> PostMortem:
    """Describe the memory in use while ``error`` is handled.

    Call it in the ``except`` block: the error's traceback keeps the tensors of the failed step alive.

    Args:
        error: The out-of-memory error.
        module: The model that was trained.
        optimizers: Its optimizers.
        device_type: Where the model trains; the host's memory is examined instead if that is what ran out.
        last_report: The last complete step that was measured.
        is_training: Whether a training step failed, and not a validation.
    """
    message = str(error)
    if isinstance(error, MemoryError | OSError) or "DefaultCPUAllocator" in message:
        device_type = "cpu"
    requested = requested_bytes(message)
    in_optimizer, creates_state = _was_in_optimizer(error)
    live = find_live_tensors(module, optimizers, device_type)
    return PostMortem(
        error=f"{type(error).__name__}: {message}",
        device=device_type,
        requested_bytes=requested,
        found_bytes=sum(tensor.size_bytes for tensor in live),
        by_category=sum_by(live, "category"),
        by_submodule=sum_by(live, "submodule"),
        largest=tuple(live[:_LARGEST]),
        remedies=tuple(
            estimate_remedies(
                live,
                module,
                0 if in_optimizer else requested or 0,
                requested or 0 if creates_state else 0,
                is_training=is_training,
            )
        ),
        last_report=last_report,
    )


def _was_in_optimizer(error: BaseException) -> tuple[bool, bool]:
    """Whether the optimizer's own arithmetic failed, not the closure (forward and backward) that it may call.

    And whether that was where torch's optimizers make the state of a parameter, in full precision.
    """
    inside = creates_state = False
    for frame, _ in traceback.walk_tb(error.__traceback__):
        name = frame.f_globals.get("__name__", "")
        if name.startswith("torch.optim."):
            inside = True
            creates_state = frame.f_code.co_name == "_init_group"
        elif name.startswith(("torch.nn.", "torch.autograd.", "lightning.", "pytorch_lightning.")):
            inside = creates_state = False
        elif name.startswith("lightning_memopt.techniques."):
            creates_state = False  # packs it
    return inside, creates_state


def requested_bytes(message: str) -> int | None:
    """Bytes that the failed allocation asked for, read from the allocator's message.

    Example:
        >>> requested_bytes("CUDA out of memory. Tried to allocate 2.50 GiB. GPU 0 has ...")
        2684354560
        >>> requested_bytes("DefaultCPUAllocator: can't allocate memory: you tried to allocate 4096 bytes.")
        4096
    """
    found = re.search(r"tried to allocate ([\d.]+) (bytes|[KMGT]iB)", message, re.IGNORECASE)
    return None if found is None else int(float(found[1]) * _UNITS[found[2].lower()])


def write_post_mortem(post_mortem: PostMortem, folder: Path, stem: str = "out_of_memory") -> list[Path]:
    """Write ``<stem>.txt``, ``.json`` and ``.html`` into ``folder``, the text first, and return those written.

    Raises:
        OSError: Not even the text could be written. A failure of the other two is let pass.
    """
    folder.mkdir(parents=True, exist_ok=True)
    text = folder / f"{stem}.txt"
    text.write_text(post_mortem.to_text(), encoding="utf-8")
    written = [text]
    for suffix, render in ((".json", post_mortem.to_json), (".html", post_mortem.to_html)):
        try:
            path = folder / f"{stem}{suffix}"
            path.write_text(render(), encoding="utf-8")
            written.append(path)
        except (MemoryError, OSError):
            continue
    return written
