"""The policies of checkpointing that tests go through."""

from typing import Any

POLICIES: dict[str, dict[str, Any]] = {
    "full": {"policy": "full"},
    "every_k": {"policy": "every_k", "k": 2},
    "selective": {"policy": "selective"},
    "budget": {"policy": "budget", "budget": 0.5},
}
