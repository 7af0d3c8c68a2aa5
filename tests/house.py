"""Which room of a package uses which, read from its imports, those inside functions too."""

from __future__ import annotations

import ast
from dataclasses import dataclass
from pathlib import Path

FLOORS = (
    ("attention", "inputs", "callables"),
    ("heatmaps", "failure"),
    ("baselines", "capture"),
    ("assertions",),
    ("contract",),
    ("plugin",),
)
FLOOR_OF = {room: floor for floor, rooms in enumerate(FLOORS) for room in rooms}
KNOWS_PYTEST = "plugin"


@dataclass(frozen=True)
class Import:
    """One name that a module imports, from another module of the package or from pytest.

    Attributes:
        module: The module that imports.
        target: The module that is imported.
        place: The file and the line.
        text: The statement, in one line.
        typing: Whether it is for the type checker alone, and so loads nothing.
    """

    module: str
    target: str
    place: str
    text: str
    typing: bool


def breaches(folder: Path) -> list[str]:
    """Say which imports of the package in `folder` go up, in a circle, or to pytest."""
    modules = _modules(folder)
    imports = [found for name in modules for found in _imports(name, modules, folder.parent)]
    inside = [i for i in imports if i.target in modules]
    return [
        *_without_a_floor(modules),
        *(line for found in imports if (line := _judged(found, folder.name))),
        *_circles([i for i in inside if not i.typing and i.module != folder.name], "module"),
        *_circles(_between_rooms(inside), "room"),
    ]


def _modules(folder: Path) -> dict[str, Path]:
    names = {}
    for path in sorted(folder.rglob("*.py")):
        parts = path.relative_to(folder.parent).with_suffix("").parts
        names[".".join(parts).removesuffix(".__init__")] = path
    return names


def _imports(name: str, modules: dict[str, Path], base: Path) -> list[Import]:
    root, path = name.partition(".")[0], modules[name]
    tree = ast.parse(path.read_text(encoding="utf-8"))
    typing = {
        id(node)
        for block in ast.walk(tree)
        if isinstance(block, ast.If) and "TYPE_CHECKING" in ast.unparse(block.test)
        for statement in block.body
        for node in ast.walk(statement)
    }
    found = []
    for node in ast.walk(tree):
        if not isinstance(node, ast.Import | ast.ImportFrom):
            continue
        for target in _targets(node, name, path):
            if target.partition(".")[0] in (root, "pytest", "_pytest"):
                place = f"{path.relative_to(base).as_posix()}:{node.lineno}"
                nearest = _nearest(target, modules)
                found.append(Import(name, nearest, place, ast.unparse(node), id(node) in typing))
    return list(dict.fromkeys(i for i in found if i.target != name))


def _targets(node: ast.Import | ast.ImportFrom, name: str, path: Path) -> list[str]:
    """List the names that a statement imports, in full."""
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    source = node.module or ""
    if node.level:
        package = name.split(".") if path.stem == "__init__" else name.split(".")[:-1]
        source = ".".join([*package[: len(package) - node.level + 1], *filter(None, [source])])
    return [f"{source}.{alias.name}" for alias in node.names]


def _nearest(target: str, modules: dict[str, Path]) -> str:
    """Return the module that a name belongs to; of another package, the package."""
    while target not in modules and "." in target:
        target = target.rpartition(".")[0]
    return target


def _room(module: str) -> str:
    return module.split(".")[1]


def _without_a_floor(modules: dict[str, Path]) -> list[str]:
    rooms = dict.fromkeys(_room(name) for name in modules if "." in name)
    return [f"room {room} has no floor" for room in rooms if room not in FLOOR_OF]


def _judged(found: Import, package: str) -> str | None:
    """Say what is wrong with one import, if it is."""
    if found.module == package:
        return None
    room, start = _room(found.module), f"{found.place}: `{found.text}`"
    if found.target.partition(".")[0] != package:
        return None if room == KNOWS_PYTEST else f"{start}: only {KNOWS_PYTEST} imports pytest"
    if found.target == package:
        return f"{start}: a room takes a name from the room that has it, not from {package}"
    used = _room(found.target)
    if FLOOR_OF.get(used, -1) <= FLOOR_OF.get(room, -1):
        return None
    return f"{start}: room {room} may not use room {used} above it"


def _between_rooms(imports: list[Import]) -> list[Import]:
    """Keep what joins rooms of one floor, whose circles no floor forbids."""
    joins = []
    for found in imports:
        if "." in found.module and "." in found.target:
            room, used = _room(found.module), _room(found.target)
            if room != used and FLOOR_OF.get(room) == FLOOR_OF.get(used):
                joins.append(Import(room, used, found.place, found.text, found.typing))
    return joins


def _circles(imports: list[Import], kind: str) -> list[str]:
    """Draw the shortest circle through each import that is part of one, each circle once."""
    uses: dict[str, list[Import]] = {}
    for found in imports:
        uses.setdefault(found.module, []).append(found)
    circles: dict[frozenset[str], list[Import]] = {}
    for found in imports:
        back = _shortest(uses, found.target, found.module)
        if back is not None:
            steps = [found, *back]
            circles.setdefault(frozenset(step.module for step in steps), steps)
    return [
        f"{first.place}: `{first.text}`: {kind}s in a circle: "
        + ", ".join(f"{step.module} uses {step.target} ({step.place})" for step in (first, *back))
        for first, *back in circles.values()
    ]


def _shortest(uses: dict[str, list[Import]], start: str, end: str) -> list[Import] | None:
    """Find the shortest chain of imports from one module to another."""
    chains: dict[str, list[Import]] = {start: []}
    for module in (queue := [start]):
        if module == end:
            return chains[module]
        for found in uses.get(module, ()):
            if found.target not in chains:
                chains[found.target] = [*chains[module], found]
                queue.append(found.target)
    return None
