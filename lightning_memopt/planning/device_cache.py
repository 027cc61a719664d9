"""Keep what was measured of this machine in the user's cache folder, since measuring takes seconds."""

import json
import os
import sys
from functools import cache
from pathlib import Path

from lightning_memopt.planning.calibrate import device_name, measure_device, source
from lightning_memopt.planning.devices import DeviceModel


def cache_file() -> Path:
    """Where measurements are kept: ``$XDG_CACHE_HOME`` or ``~/.cache``, or where the platform has such files."""
    if sys.platform == "win32":
        folder = Path(os.environ.get("LOCALAPPDATA") or Path.home() / "AppData" / "Local")
    elif sys.platform == "darwin":
        folder = Path.home() / "Library" / "Caches"
    else:
        named = os.environ.get("XDG_CACHE_HOME", "")
        folder = Path(named) if os.path.isabs(named) else Path.home() / ".cache"
    return folder / "lightning_memopt" / "devices.json"


def this_device() -> DeviceModel:
    """The model of this machine's device: what ``lightning-memopt doctor`` kept of it, or measured now.

    Measured now, which takes a few seconds, the links between devices are not: they are taken for usual ones. A
    process measures once, so that its plans are of one machine.
    """
    return cached_device() or _measured_once(device_name())


@cache
def _measured_once(name: str) -> DeviceModel:
    return measure_device()


def cached_device() -> DeviceModel | None:
    """What was kept of this device with this version of PyTorch; None if nothing was, or it cannot be read."""
    kept = _read().get(device_name())
    try:
        model = None if kept is None else DeviceModel.from_json(kept)
    except ValueError:
        return None
    return model if model is not None and model.source == source() else None


def keep_device(model: DeviceModel) -> Path:
    """Keep ``model`` for later, beside those of other devices, and return the file.

    Raises:
        OSError: The file cannot be written.
    """
    path = cache_file()
    path.parent.mkdir(parents=True, exist_ok=True)
    kept = _read() | {model.name: model.to_json()}
    unfinished = path.with_suffix(f".{os.getpid()}")
    unfinished.write_text(json.dumps(kept, indent=1), encoding="utf-8")
    unfinished.replace(path)
    return path


def _read() -> dict[str, str]:
    try:
        kept = json.loads(cache_file().read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return kept if isinstance(kept, dict) else {}
