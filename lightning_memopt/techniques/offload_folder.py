"""The folder of offloaded activations, which outlives no process for long."""

import os
import shutil
import socket
import sys
import tempfile
from contextlib import suppress
from pathlib import Path

if sys.platform != "win32":
    import fcntl

PREFIX = f"memopt-activations-{socket.gethostname()}-"
"""Names the host too, since locks of some network disks are not seen by other hosts."""


class StoreFolder:
    """A new folder, locked until :meth:`remove` or the end of this process.

    A process that is killed, as when memory runs out, deletes no files, and they may fill the disk. So the next one
    on this host deletes what it finds in the same place that no process has locked.

    Args:
        parent: Where to make it; ``None`` for the system's temporary folder.

    Raises:
        OSError: It cannot be made.
    """

    def __init__(self, parent: str | Path | None) -> None:
        self.path = Path(tempfile.mkdtemp(prefix=PREFIX, dir=parent))
        self._lock: int | None = None
        if sys.platform != "win32":
            self._lock = os.open(self.path, os.O_RDONLY)
            with suppress(OSError):  # some network disks lock no folders
                fcntl.flock(self._lock, fcntl.LOCK_EX)
            for folder in self.path.parent.glob(f"{PREFIX}*"):
                _remove_if_left(folder)

    def remove(self) -> None:
        """Delete it with all that is in it."""
        shutil.rmtree(self.path, ignore_errors=True)
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None


def _remove_if_left(folder: Path) -> None:
    # One without files may be new, and not locked yet.
    with suppress(OSError):  # it is locked, or another user's, or just gone
        lock = os.open(folder, os.O_RDONLY)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if any(folder.glob("*.bin")):
                shutil.rmtree(folder, ignore_errors=True)
        finally:
            os.close(lock)
