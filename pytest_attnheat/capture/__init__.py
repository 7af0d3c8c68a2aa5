"""Attention weights out of models that nobody wrote for this."""

from __future__ import annotations


class CaptureError(RuntimeError):
    """Nothing was captured, or a model cannot be captured."""


class CaptureMemoryError(CaptureError, MemoryError):
    """Keeping the next record would take more memory than allowed."""


class CaptureWarning(UserWarning):
    """A record that its own output does not confirm, or attention that was not seen."""
