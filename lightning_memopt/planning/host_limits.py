"""How much of the host's memory this process may have, where that is less than there is."""

import sys
from collections.abc import Iterator
from pathlib import Path

_MAPPED_LATER = 2**27
"""Addresses that training takes for what are no tensors: libraries loaded in the first step, the arenas of threads.
Some 80 to 120 MiB where it was looked at."""


def host_limit_bytes() -> int | None:
    """Bytes of memory that a limit leaves to this process; ``None`` where there is none.

    That is what ``ulimit -v`` (``RLIMIT_AS``) allows beyond the addresses in use, less what libraries will map, and
    what the control groups of a container or a batch job (``memory.max``) allow in all, whichever is less.

    Source:
        ``getrlimit(2)``, ``proc(5)``, and the kernel's ``Documentation/admin-guide/cgroup-v2.rst``.
    """
    return min((*_address_space(), *_control_groups()), default=None)


def _address_space() -> Iterator[int]:
    if sys.platform != "linux":
        return
    import resource

    limit, _ = resource.getrlimit(resource.RLIMIT_AS)
    if limit != resource.RLIM_INFINITY:
        pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[0])
        yield max(limit - pages * resource.getpagesize() - _MAPPED_LATER, 0)


def _control_groups(proc: Path = Path("/proc/self/cgroup"), mount: Path = Path("/sys/fs/cgroup")) -> Iterator[int]:
    try:
        lines = proc.read_text(encoding="utf-8").splitlines()
    except OSError:  # no Linux
        return
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers and "memory" not in controllers.split(","):
            continue
        root, name = (mount / "memory", "memory.limit_in_bytes") if controllers else (mount, "memory.max")
        group = root / path.strip("/")
        # A container may see its own group as the root, whatever path it is told.
        for folder in (group, *(parent for parent in group.parents if parent.is_relative_to(root))):
            try:
                limit = (folder / name).read_text(encoding="ascii").strip()
            except OSError:
                continue
            if limit.isdigit():  # else "max"
                yield int(limit)
