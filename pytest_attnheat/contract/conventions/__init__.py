"""How public callables are called: a table of conventions, told apart by parameters alone.

A convention is a row: what its keywords are called and what they mean, which corner causality is
counted from, what it returns, and how a call of attention becomes a call of it. To add one, add
an entry to one of the modules here, or `register_convention` one of your own.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ...inputs import misuse
from . import cached, dense, libraries, objects, packed
from .convention import Arrange as Arrange
from .convention import Convention as Convention
from .convention import Lse as Lse

# Module state on purpose, as that of scoring functions: a row that a project registers where its
# modules are imported must be known wherever a callable is examined.
_TABLES = (dense, packed, cached, objects, libraries)
_KNOWN: dict[str, Convention] = {one.name: one for table in _TABLES for one in table.CONVENTIONS}


def conventions() -> tuple[Convention, ...]:
    """Return all that are known, in order."""
    return tuple(_KNOWN.values())


def register_convention(convention: Convention, *, replace: bool = False) -> None:
    """Add a row of one's own to the table of conventions.

    Args:
        convention: The row.
        replace: Whether it takes the place of one of the same name.

    Raises:
        TypeError: It is no convention.
        ValueError: Its name is taken, or it has no parameter to be recognised by.
    """
    if not isinstance(convention, Convention):
        raise TypeError(misuse("convention", type(convention).__name__, "a Convention"))
    if convention.name in _KNOWN and not replace:
        accepted = "a name that is not taken, or replace=True"
        raise ValueError(misuse("convention", repr(convention.name), accepted))
    if not convention.parameters:
        accepted = "the names of parameters that only such a callable has"
        raise ValueError(misuse("parameters", "none", accepted))
    _KNOWN[convention.name] = convention


def forget(name: str) -> None:
    """Take a row out of the table."""
    del _KNOWN[name]


def named(name: str) -> Convention:
    """Return a convention by its name."""
    if name not in _KNOWN:
        raise ValueError(misuse("like", repr(name), f"one of {', '.join(map(repr, _KNOWN))}"))
    return _KNOWN[name]


def fitting(parameters: Mapping[str, Any]) -> list[Convention]:
    """Return the conventions that fit some parameters best: those that ask for most of them."""
    known = [one for one in _KNOWN.values() if one.fits(parameters)]
    asked = [set(one.parameters) for one in known]
    return [one for one, own in zip(known, asked, strict=True) if not any(own < n for n in asked)]


def recognised(parameters: Mapping[str, Any]) -> Convention | None:
    """Return the convention of a callable with some parameters, None if it is none of them."""
    best = fitting(parameters)
    if len(best) > 1:
        names = " and ".join(repr(one.name) for one in best)
        accepted = f"like= one of them: {', '.join(one.about for one in best)}"
        raise ValueError(misuse("subject", f"parameters that fit {names} equally", accepted))
    return best[0] if best else None
