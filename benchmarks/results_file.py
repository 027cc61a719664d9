"""A results file that grows row by row, so that a run can be stopped, resumed, or repeated for one row."""

import json
from pathlib import Path
from typing import Any


class OtherEnvironmentError(RuntimeError):
    """The file holds figures that were measured elsewhere, and one table must not mix two machines."""


class ResultsFile:
    """JSON of an environment, a workload and rows; written after each row.

    Args:
        path: The file; it may exist.
        header: What all rows share: the environment and the workload.

    Raises:
        OtherEnvironmentError: The file exists with another header.
    """

    def __init__(self, path: Path, header: dict[str, Any]) -> None:
        self.path = path
        header = json.loads(json.dumps(header))
        self.content: dict[str, Any] = header | {"rows": {}}
        if path.exists():
            found = json.loads(path.read_text())
            differing = [key for key in header if found.get(key) != header[key]]
            if differing:
                raise OtherEnvironmentError(
                    f"{path} was measured with another {' and '.join(differing)}; remove it or give another --out"
                )
            self.content = found

    @property
    def rows(self) -> dict[str, Any]:
        """What is known so far, by row."""
        return self.content["rows"]

    def add(self, name: str, row: dict[str, Any], order: list[str]) -> None:
        """Put a row in, at its place in ``order``, and write the file."""
        known = self.rows | {name: row}
        self.content["rows"] = {one: known[one] for one in order if one in known}
        self.path.parent.mkdir(parents=True, exist_ok=True)
        temporary = self.path.with_suffix(".tmp")
        temporary.write_text(json.dumps(self.content, indent=1) + "\n")
        temporary.replace(self.path)
