"""Test attention the way good engineers test anything else.

Importing this package loads neither torch, numpy nor matplotlib: each public name is imported
from its room when it is first used (PEP 562). The names are in `__init__.pyi`.
"""

from typing import Any

__version__ = "0.1.0"


def _table() -> dict[str, str]:
    """Read which room has which public name."""
    import ast
    from pathlib import Path

    table = ast.parse(Path(__file__).with_suffix(".pyi").read_text(encoding="utf-8"))
    lines = [line for line in table.body if isinstance(line, ast.ImportFrom)]
    return {alias.name: f"{__name__}.{line.module}" for line in lines for alias in line.names}


def __getattr__(name: str) -> Any:
    """Import a public name from its room on first use."""
    if name == "__all__":
        value: Any = ["__version__", *_table()]
    elif name.startswith("__") or name not in (rooms := _table()):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    else:
        from importlib import import_module

        value = getattr(import_module(rooms[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    """List the public names, loaded or not."""
    return sorted(__getattr__("__all__"))
