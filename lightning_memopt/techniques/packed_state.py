"""Keep packed optimizer state apart in a checkpoint, so that an optimizer can load the rest without it."""

from typing import Any

from lightning_memopt.techniques.blockwise import as_packed


def take_packed(state_dict: dict[str, Any]) -> tuple[dict[str, Any], dict[int, dict[str, Any]]]:
    """Take what :func:`~lightning_memopt.techniques.low_bit.hold_low_bit_state` packs out of an optimizer's state.

    All that is remembered of a parameter goes with it: without any state, an optimizer begins that parameter anew,
    and with half of it, it fails.

    Args:
        state_dict: From ``optimizer.state_dict()``; it stays as it is.

    Returns:
        A ``state_dict`` without it, and the states that were taken by the number of their parameter.
    """
    packed = {
        index: state
        for index, state in state_dict["state"].items()
        if any(as_packed(value) is not None for value in state.values())
    }
    rest = {index: state for index, state in state_dict["state"].items() if index not in packed}
    return {**state_dict, "state": rest}, packed


def put_packed(state_dict: dict[str, Any], packed: dict[int, dict[str, Any]]) -> dict[str, Any]:
    """The ``state_dict`` that :func:`take_packed` took ``packed`` out of."""
    return {**state_dict, "state": {**state_dict["state"], **packed}}
