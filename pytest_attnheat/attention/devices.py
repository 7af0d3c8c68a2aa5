"""The devices that torch knows, by their names."""

from __future__ import annotations

import torch

from pytest_attnheat.inputs import misuse


def check_device(name: str) -> str:
    """Return the name of a device: a type that torch knows, with or without a number.

    Raises:
        ValueError: It is none.
    """
    try:
        torch.device(name)
    except (RuntimeError, TypeError):
        accepted = "a device that torch knows, as 'cpu', 'cuda' or 'cuda:1'"
        raise ValueError(misuse("devices", repr(name), accepted)) from None
    return name
