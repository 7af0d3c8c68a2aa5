"""How one kind of public callable is called: a row of the table of conventions."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, TypeAlias

from ...attention.call import Call
from ...attention.packing import bounds, lengths_of
from ...failure import Failure, Place
from ..asking import KEYWORDS, dense
from .reading import Read

if TYPE_CHECKING:
    from ..spec import AttentionSpec

# Makes a call of a subject, with the arguments of its features by name, and returns its result:
# an output in the layout that is declared, or a tuple that begins with it and a log-sum-exp.
Arrange: TypeAlias = Callable[["AttentionSpec", Call, dict[str, Any]], Any]
# Fields of a specification that name a parameter.
# Of a place in an output, or in a gradient: batch entry, head, token, feature.
_DIMENSIONS = 4
_NAMING = ("mask_argument", "causal_argument", "dropout", *KEYWORDS)


@dataclass(frozen=True)
class Lse:
    """How a log-sum-exp is returned.

    Attributes:
        shape: Its dimensions, as `arrange` returns it: "bhl", "blh", "hbl" or "lbh".
        base: The base of the logarithm, "e" or "2".
        sink: Whether a sink is part of it; None where there is no sink.
        empty: What a query that sees nothing has: "-inf", "+inf", or "lowest", a number below all
            that scores are.
    """

    shape: str = "bhl"
    base: str = "e"
    sink: bool | None = None
    empty: str = "-inf"


@dataclass(frozen=True)
class Convention:
    """How one kind of public callable is called.

    Attributes:
        name: What `AttentionSpec(like=)` takes.
        about: What is called like this, in words.
        parameters: Names that its signature has, all of them: what it is recognised by. Of an
            object, those of its methods `plan` and `run`.
        lacks: Names that its signature has not.
        declares: Fields of `AttentionSpec`. A keyword that a signature lacks is left out; of
            several, the first that it has is taken.
        values: By field of `Call`, what becomes of a value before it is passed on.
        arrange: How a call is made.
        read: How the tensors of such a call are read, so that judges of such a callable can be
            graded; by default query, key and value come first. A row with an `arrange` of its own
            and without this cannot be graded.
        besides: Arguments that make it return its log-sum-exp.
        lse: How that is returned; None if it has none.
        handles: Keywords that `arrange` takes, though the signature has them not.
        only: By feature, the only levels that can be asked of it.
        apart: Pairs of features that are never asked together.
        one_query: Whether it takes one query of each sequence alone.
        ragged: How lengths may differ within a call, the most ordinary first: of "equal",
            "unequal", "one token", "without queries", "without keys" and "empty"; ("equal",
            "same") where there are as many keys as queries; empty where they may not differ.
        begins: Of packed calls, the parameter that says where each sequence of queries begins, and
            of keys, where these are packed as well.
        stored: Of what reads a cache, the levels of how that is stored, as {"pages": (4, 16),
            "append": (0, 1), "shared": (False, True), "left": (False, True)}: the tokens of a
            page, those that are appended, whether sequences share pages, whether a row begins
            with unused slots.
        stored_by: The parameters that each of these needs; "rows" are pages of no size. Without
            them the most ordinary level alone is asked.
        limits: What cannot be asked of it, in words.
        makes: Whether it is a class, or a function, that makes what is called.
    """

    name: str
    about: str
    parameters: tuple[str, ...]
    declares: Mapping[str, Any]
    lacks: tuple[str, ...] = ()
    values: Mapping[str, Callable[[Any], Any]] = field(default_factory=dict)
    arrange: Arrange = dense
    read: Read | None = None
    besides: Mapping[str, Any] = field(default_factory=dict)
    lse: Lse | None = None
    handles: tuple[str, ...] = ()
    only: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)
    apart: tuple[tuple[str, str], ...] = ()
    one_query: bool = False
    ragged: tuple[str, ...] = ()
    begins: tuple[str, ...] = ()
    stored: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)
    stored_by: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    limits: str = ""
    makes: bool = False

    def tell(self, failure: Failure, call: Call) -> None:
        """Say where in the packed tensors of a call its places are, if it has such."""
        failure.worst, failure.first = (
            self._packed(place, call) for place in (failure.worst, failure.first)
        )

    def _packed(self, place: Place | None, call: Call) -> Place | None:
        if place is None or place.index is None or len(place.index) != _DIMENSIONS:
            return place
        of_keys = place.tensor is not None and place.tensor.startswith(("key", "value"))
        if len(self.begins) <= of_keys:
            return place
        sequence, _, token, _ = place.index
        begin = int(bounds(lengths_of(call)[of_keys])[sequence])
        where = (
            f"row {begin + token} of the packed tensor: {'key' if of_keys else 'query'} {token} of "
            f"sequence {sequence}, which begins at {self.begins[of_keys]}[{sequence}] = {begin}"
        )
        return replace(place, text=f"{place.text}\n{where}")

    def kept(self, names: Mapping[str, Any]) -> dict[str, tuple[Any, ...]]:
        """The levels of how keys are stored that a signature can be told of."""
        found = dict(self.stored)
        for feature, needed in self.stored_by.items():
            if all(name in names for name in needed):
                continue
            if feature == "rows":
                found["pages"] = tuple(page for page in found["pages"] if page)
            elif feature in found:
                found[feature] = found[feature][:1]
        return found

    def limited(self, names: Mapping[str, Any]) -> dict[str, Any]:
        """What it says of the calls that can be asked, as fields of `levels.Declared`."""
        return {
            "only": tuple(self.only.items()), "apart": self.apart, "one_query": self.one_query,
            "ragged": self.ragged, "stored": tuple(self.kept(names).items()),
        }  # fmt: skip

    def said(self, spec: AttentionSpec) -> str:
        """Say in a report which convention was taken, why, and what is not asked of it."""
        names = ", ".join(name for name in self.parameters if name in (spec.parameters or {}))
        why = "as declared" if "like" in spec.typed else f"by its parameters {names}"
        limits = f"; not asked: {self.limits}" if self.limits else ""
        return f"it is called as {self.name}, {self.about}, {why}{limits}"

    def fits(self, names: Mapping[str, Any]) -> bool:
        """Whether parameters are those of this convention."""
        return all(n in names for n in self.parameters) and not any(n in names for n in self.lacks)

    def declared(self, names: Mapping[str, Any]) -> dict[str, Any]:
        """The fields of a specification, without what keywords that a signature lacks are for."""
        found = dict(self.declares)
        if not self.fits(names) and any(p.kind is p.VAR_KEYWORD for p in names.values()):
            return found  # it hands on whatever it is given
        if any(name not in names for name in self.besides):
            found["returns"] = "output"
        for name, several in found.items():
            if name in _NAMING and isinstance(several, tuple) and isinstance(several[0], str):
                found[name] = next((one for one in several if one in names), several[0])
        known = (*names, *self.handles)
        windowed = found.get("window") is not None and found["window"] in known
        for name, given in tuple(found.items()):
            if name in _NAMING and isinstance(given, str) and given not in known:
                del found[name]
                feature = name.removesuffix("_argument")
                # Without causality, the corner is what a window is counted from.
                if feature == "mask" or (feature == "causal" and not windowed):
                    found[feature] = None
        return found
