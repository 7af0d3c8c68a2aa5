"""What `--attn-grade` names, another version in its place, and tests that run again with it."""

from __future__ import annotations

import functools
import inspect
import sys
import tempfile
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from types import FunctionType, ModuleType
from typing import TYPE_CHECKING, Any, NamedTuple

import pytest

from ..callables import borrowed, seed_everything
from ..inputs import misuse
from .examination import imported
from .settings import GRADING

if TYPE_CHECKING:
    from ..contract.spec import AttentionSpec

_OURS = "pytest_attnheat"
_ACCEPTED = "a function, a method, a module, or an AttentionSpec of a function or a module"


class StandIn:
    """Stands in the place of a function and hands calls on to the version of the moment.

    Without a version, calls reach the function itself: whoever keeps it is not harmed.

    Attributes:
        original: The function.
        version: What answers calls in its place.
        function: What is put in its place.
    """

    def __init__(self, original: Callable[..., Any], *, is_method: bool = False) -> None:
        self.original, self.is_method = original, is_method
        self.version: Callable[..., Any] | None = None
        self._at_work = threading.local()

        @functools.wraps(original)
        def function(*given: Any, **named: Any) -> Any:
            count = 1 if is_method else 0
            return self._call(given[:count], given[count:], named)

        self.function = function

    def _call(self, objects: Sequence[Any], given: Sequence[Any], named: Any) -> Any:
        # What the function calls under its own name is a part of it.
        if self.version is None or hasattr(self._at_work, "objects"):
            return self.original(*objects, *given, **named)
        self._at_work.objects = objects
        try:
            return self.version(*given, **named)
        finally:
            del self._at_work.objects

    def on_its_object(self) -> Callable[..., Any]:
        """Return the method on the object of the call at hand, as a function of the rest."""

        @functools.wraps(self.original)
        def rest(*given: Any, **named: Any) -> Any:
            return self.original(*self._at_work.objects, *given, **named)

        signature = inspect.signature(self.original)
        parameters = list(signature.parameters.values())[1:]
        rest.__signature__ = signature.replace(parameters=parameters)  # type: ignore[attr-defined]
        rest.of_object = lambda: self._at_work.objects[0]  # type: ignore[attr-defined]
        return rest


@dataclass(frozen=True)
class Target:
    """What is graded."""

    text: str  # How it was named
    right: AttentionSpec | Callable[..., Any]  # What is graded, without the object of a method
    stand_in: StandIn  # What is put in its place
    place: tuple[Any, str] | None = None  # What is set; None where all modules are searched
    wrap: Callable[[Any], Any] | None = None  # What an attribute of a class is wrapped in
    inside: bool | None = None  # Whether its attention is inside, see `grading.Study`

    @contextmanager
    def replaced(self, items: Sequence[pytest.Item]) -> Iterator[list[str]]:
        """Put the stand-in in its place, in modules and parameters; yield where that is."""
        original, function = self.stand_in.original, self.stand_in.function
        if self.place is None:
            specs: dict[int, tuple[AttentionSpec, AttentionSpec]] = {}  # Those put in, and whose
            try:
                yield _exchange(original, function, items, specs)
            finally:  # in modules that were imported meanwhile as well
                _exchange(function, original, items, specs)
            return
        owner, name = self.place
        before = vars(owner).get(name)
        setattr(owner, name, self.wrap(function) if self.wrap else function)
        try:
            yield [self.text.replace(":", ".")]
        finally:
            if before is None:
                delattr(owner, name)
            else:
                setattr(owner, name, before)

    def kept_elsewhere(self, items: Sequence[pytest.Item]) -> list[str]:
        """Name what in the modules of tests has the target where it is not replaced."""
        if self.place is not None:
            return []
        return [
            f"{module.__name__}.{name} ({how})"
            for module in _modules_of(items)
            for name, value in vars(module).items()
            for how in _kept(value, self.stand_in.original)
        ]


def find_target(config: pytest.Config, text: str) -> Target:
    """Import what `--attn-grade` names."""
    from torch import nn

    from ..contract.spec import AttentionSpec

    *_, owner, found = imported(config, "--attn-grade", text)
    name = text.rpartition(":")[2].rpartition(".")[2]
    if isinstance(found, type) and issubclass(found, nn.Module):
        owner, name, found = found, "forward", found.forward
    subject = found.subject if isinstance(found, AttentionSpec) else found
    if not callable(subject) or isinstance(subject, type):
        kind = "a class" if isinstance(subject, type) else type(subject).__name__
        raise pytest.UsageError(misuse("--attn-grade", f"{text}, which is {kind}", _ACCEPTED))
    try:
        if isinstance(owner, type) and not isinstance(found, AttentionSpec):
            return _of_class(text, owner, name)
        if isinstance(subject, nn.Module):
            return Target(text, found, StandIn(subject.forward), (subject, "forward"))
        of_object = not isinstance(owner, ModuleType) and subject is found
        return Target(text, found, StandIn(subject), (owner, name) if of_object else None)
    except (TypeError, ValueError) as error:
        raise pytest.UsageError(f"--attn-grade {text}: {error}") from error


def _of_class(text: str, owner: type, name: str) -> Target:
    """A method, of a class and not of an object."""
    from torch import nn

    plain = inspect.getattr_static(owner, name)
    function = getattr(plain, "__func__", plain)
    wrap = type(plain) if isinstance(plain, staticmethod | classmethod) else None
    stand_in = StandIn(function, is_method=wrap is not staticmethod)
    right = stand_in.on_its_object() if stand_in.is_method else function
    # What objects of the class hold is known when they are called.
    inside = True if issubclass(owner, nn.Module) and name == "forward" else None
    return Target(text, right, stand_in, (owner, name), wrap, inside)


# -- where it is ------------------------------------------------------------------------------


def _exchange(
    old: object, new: Callable[..., Any], items: Sequence[pytest.Item],
    specs: dict[int, tuple[AttentionSpec, AttentionSpec]],
) -> list[str]:  # fmt: skip
    """Put one object in the place of another, in specifications too; return where that was."""
    from ..contract.spec import AttentionSpec

    where = []
    for label, namespace in _namespaces(items):
        for key, value in list(namespace.items()):
            found: object = None
            if value is old:
                found = new
            elif id(value) in specs:
                found = specs[id(value)][1]
            elif type(value) is AttentionSpec and value.subject is old:
                found = value.of_another(new)
                specs[id(found)] = found, value
            if found is not None:
                namespace[key] = found
                where.append(f"{label}.{key}" if isinstance(key, str) else f"{label}[{key!r}]")
    return where


def _namespaces(items: Sequence[pytest.Item]) -> Iterator[tuple[str, dict[Any, Any]]]:
    """Yield modules, the dictionaries that they and their classes hold, and parameters of tests."""
    seen = {id(sys.modules)}
    every = [one for one in list(sys.modules.values()) if isinstance(one, ModuleType)]
    for module in (*every, *_modules_of(items)):
        # Ours compute what versions are compared with.
        own = module.__name__.partition(".")[0] == _OURS
        if own or id(vars(module)) in seen:
            continue
        seen.add(id(vars(module)))
        yield module.__name__, vars(module)
        for name, value in list(vars(module).items()):
            # No isinstance: what stands in for others may warn, or load them.
            inner = vars(value).items() if issubclass(type(value), type) else ()
            for label, one in [(name, value), *((f"{name}.{key}", one) for key, one in inner)]:
                # Registries; no kinds of their own, which may load what they are asked for.
                if type(one) in (dict, OrderedDict) and id(one) not in seen:
                    seen.add(id(one))
                    yield f"{module.__name__}.{label}", one
    for item in items:
        if hasattr(item, "callspec"):
            yield f"parameters of {item.name}", item.callspec.params


def _modules_of(items: Sequence[pytest.Item]) -> list[ModuleType]:
    """The modules of tests, also where several have one name."""
    nodes = (item.getparent(pytest.Module) for item in items)
    return list(dict.fromkeys(node.obj for node in nodes if node is not None))


def _kept(value: object, original: object) -> Iterator[str]:
    """How something holds an object, if it does."""
    if isinstance(value, type):
        for name, own in list(vars(value).items()):
            if getattr(own, "__func__", own) is original:
                yield f"its attribute {name}"
    elif isinstance(value, list | tuple | set | frozenset):
        if any(one is original for one in value):
            yield f"a {type(value).__name__}"
    elif isinstance(value, functools.partial):
        if value.func is original:
            yield "a partial"
    elif isinstance(value, FunctionType):
        defaults = (*(value.__defaults__ or ()), *(value.__kwdefaults__ or {}).values())
        if any(one is original for one in defaults):
            yield "a default argument"
        for cell in value.__closure__ or ():
            with suppress(ValueError):  # it is empty
                if cell.cell_contents is original:
                    yield "a closure"


class Outcome(NamedTuple):
    """What became of a test."""

    status: str  # "passed", "failed", or "skipped": also what was expected to fail
    said: str = ""  # Why, in one line


class _Quiet:
    """Hooks of pytest: those that tell of tests reach a list alone, all others what they did."""

    def __init__(self, hooks: Any, reports: list[Any]) -> None:
        self._hooks, self._reports = hooks, reports
        self.pytest_warning_recorded = self

    def __getattr__(self, name: str) -> Any:
        return getattr(self._hooks, name)

    def call_historic(self, **given: Any) -> None:
        """Tell nobody of a warning."""

    def pytest_runtest_logstart(self, **given: Any) -> None:
        """Tell nobody that a test begins."""

    def pytest_runtest_logfinish(self, **given: Any) -> None:
        """Tell nobody that it ended."""

    def pytest_exception_interact(self, **given: Any) -> None:
        """Let no debugger open."""

    def pytest_runtest_logreport(self, report: Any) -> None:
        self._reports.append(report)

    def pytest_runtest_teardown(self, item: pytest.Item, nextitem: pytest.Item | None) -> Any:
        """After a failure, undo the fixtures that other tests share as well."""
        failed = any(report.failed for report in self._reports)
        return self._hooks.pytest_runtest_teardown(item=item, nextitem=None if failed else nextitem)


@contextmanager
def quiet(session: pytest.Session) -> Iterator[None]:
    """Let the files of this run be as they are, whatever tests do that run again."""
    # Pictures of what fails go to a folder that is deleted.
    config = session.config
    config.stash[GRADING] = True
    kept = config.option.attn_artifacts
    # With a seed of its own Hypothesis keeps no examples, and draws the same ones again.
    hypothesis: Any = sys.modules.get("hypothesis.core")
    seed = getattr(hypothesis, "global_force_seed", None)
    with tempfile.TemporaryDirectory() as folder:
        config.option.attn_artifacts = folder
        try:
            if hypothesis is not None and seed is None:
                hypothesis.global_force_seed = 0
            yield
        finally:
            if hypothesis is not None:
                hypothesis.global_force_seed = seed
            config.option.attn_artifacts = kept
            config.stash[GRADING] = False


def outcomes(
    session: pytest.Session, items: Sequence[pytest.Item], seed: int
) -> Iterator[tuple[pytest.Item, Outcome]]:
    """Run tests again, up to where the caller stops, and yield what becomes of each."""
    # Fixtures are set up anew; tests share those of a wider scope until one fails.
    done = False
    last: pytest.Item | None = None
    try:
        for item, following in zip(items, [*items[1:], None], strict=False):  # of none, none
            last = item
            outcome = _outcome(_reports(session, item, following, seed))
            done = following is None or outcome.status == "failed"
            yield item, outcome
    finally:
        if not done and last is not None:  # an exception, or a caller that stopped
            tear_down(last)


def _reports(
    session: pytest.Session, item: pytest.Item, following: pytest.Item | None, seed: int
) -> list[Any]:
    found: list[Any] = []
    hooks = session.gethookproxy
    session.gethookproxy = lambda fspath: _Quiet(hooks(fspath), found)  # type: ignore[method-assign, assignment, return-value]
    _forget_object(item)
    try:
        with borrowed(None, seed=seed):
            seed_everything(seed)
            item.ihook.pytest_runtest_protocol(item=item, nextitem=following)
    finally:
        del session.gethookproxy
    if any(report.failed and report.when == "teardown" for report in found):
        tear_down(item)
    return found


def _forget_object(item: pytest.Item) -> None:
    """Let a method have an object of its class of its own, as each test has."""
    if getattr(item, "cls", None) is not None and vars(item).get("_instance") is not None:
        for name in ("_instance", "_obj"):
            vars(item).pop(name, None)


def tear_down(item: pytest.Item) -> None:
    """Undo all fixtures, where a test was left in the midst of them."""
    runner: Any = item.config.pluginmanager.get_plugin("runner")
    with suppress(Exception, pytest.exit.Exception):
        runner.pytest_runtest_teardown(item=item, nextitem=None)


def _outcome(reports: Sequence[Any]) -> Outcome:
    failed = next((report for report in reports if report.failed), None)
    if failed is not None:
        return Outcome("failed", _said(failed))
    skipped = next((report for report in reports if report.skipped), None)
    if skipped is not None:
        expected = hasattr(skipped, "wasxfail")
        return Outcome("skipped", "it is expected to fail" if expected else _said(skipped))
    return Outcome("passed")


def _said(report: Any) -> str:
    if isinstance(report.longrepr, tuple):
        return str(report.longrepr[2])
    crash = getattr(report.longrepr, "reprcrash", None)
    text = str(report.longrepr if crash is None else crash.message).strip()
    return text.split("\n")[0] if crash is not None else text.split("\n")[-1]
