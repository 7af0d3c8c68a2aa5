"""How functions that merge partial states of attention are called: a row for each known kind."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, TypeAlias, get_args

import torch
from torch import Tensor

from ...callables import parameters_of
from ...inputs import misuse, one_of

Base: TypeAlias = Literal["e", "2"]
Calling: TypeAlias = Literal["pair", "stacked", "list", "output_first", "in_place"]
BASES: tuple[str, ...] = get_args(Base)
CALLINGS: tuple[str, ...] = get_args(Calling)
# Our own layouts: of outputs (batch, heads, query_len, width), and of log-sum-exps.
OURS, OUR_LSE = "bhld", "bhl"
_POSITIONAL = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
_OUTPUT_LSE = "output_lse"
_RETURNED = "what merge returns"


@dataclass(frozen=True)
class Form:
    """How a function takes partial states, and gives back the merged one."""

    name: str  # Whose it is, or what it is called by here
    # "pair": `merge(out_a, lse_a, out_b, lse_b)` returns `(out, lse)`, or `out`; "stacked":
    # `merge(outs, lses)` of all parts in one tensor each; "list": in lists; "output_first":
    # `merge(output, out_a, lse_a, out_b, lse_b)` writes to `output`, and to `output_lse=` if it has
    # that parameter; "in_place": as "pair", but writes to the first two
    calling: Calling
    # The dimensions of an output, in order: b(atch), h(eads), l (queries), d (width), and n, the
    # parts, where they are stacked. What is missing is part of l.
    layout: str = OURS
    lse_layout: str = OUR_LSE  # The same of a log-sum-exp, without d; 1 is a dimension of size 1
    base: Base = "e"  # That of the logarithm
    names: tuple[str, ...] = ()  # The first parameters that it is recognised by, in order
    never: tuple[str, ...] = ()  # Parameters by which it is told from another
    dense: bool = True  # Whether they lie in memory so; else they are views of (..., heads, l)

    @property
    def takes_all(self) -> bool:
        """Whether it is given all parts at once."""
        return self.calling in ("stacked", "list")

    @property
    def words(self) -> str:
        """What of it may be declared."""
        return (
            f"calling={self.calling!r}, layout={self.layout!r}, lse_layout={self.lse_layout!r}, "
            f"base={self.base!r}"
        )


_STATES = ("v_a", "s_a", "v_b", "s_b")
_PREFIX = ("prefix_output", "prefix_lse", "suffix_output", "suffix_lse")
_IN_PLACE = ("v", "s", "v_other", "s_other")
FORMS = (
    Form("FlashInfer's merge_state", "pair", "lhd", "lh", "2", _STATES,
         never=("v_merged", "s_merged")),
    Form("FlashInfer's merge_state_in_place", "in_place", "lhd", "lh", "2", _IN_PLACE),
    Form("FlashInfer's merge_states", "stacked", "lnhd", "lnh", "2", ("v", "s")),
    Form("SGLang's merge_state_v2", "pair", "lhd", "lh", "e", (*_STATES, "v_merged", "s_merged")),
    Form("SGLang's merge_state_triton", "pair", "lhd", "lh", "e", _PREFIX),
    Form("vLLM's merge_attn_states", "output_first", "lhd", "hl", "e", ("output", *_PREFIX)),
    Form("FlashAttention's flash_attn_combine", "stacked", "nblhd", "nblh", "e",
         ("out_partial", "lse_partial"), dense=False),
)  # fmt: skip
_PLAIN = {
    4: Form("merge(out_a, lse_a, out_b, lse_b)", "pair"),
    2: Form("merge(outs, lses)", "stacked", f"n{OURS}", f"n{OUR_LSE}"),
}


def form_of(
    merge: Callable[..., Any],
    *,
    calling: Calling | None,
    layout: str | None,
    lse_layout: str | None,
    base: Base | None,
) -> tuple[Form, str | None]:
    """Return how a function is called, and what of that was assumed."""
    if not callable(merge):
        raise TypeError(misuse("merge", type(merge).__name__, "a function that merges two states"))
    for name, given, known in (("calling", calling, CALLINGS), ("base", base, BASES)):
        if given is not None:
            one_of(name, given, known)
    form = _recognised(merge, calling, layout)
    own = form.lse_layout
    if lse_layout is None and layout not in (None, form.layout):
        own = _lse_layout(layout or "")
    same = layout in (None, form.layout) and lse_layout in (None, form.lse_layout)
    declared = replace(
        form, layout=layout or form.layout, lse_layout=lse_layout or own, base=base or form.base,
        dense=form.dense or not same,
    )  # fmt: skip
    _check(declared)
    if calling and layout and base:
        return declared, None
    return declared, f"merge is called as {form.name}: {declared.words}"


def _recognised(merge: Callable[..., Any], calling: Calling | None, layout: str | None) -> Form:
    """Find the known kind that the parameters of a function are those of, or the plain one."""
    parameters = parameters_of(merge) or {}
    places = [name for name, one in parameters.items() if one.kind in _POSITIONAL]
    needed = {
        name
        for name, one in parameters.items()
        if one.default is one.empty and one.kind not in (one.VAR_POSITIONAL, one.VAR_KEYWORD)
    }
    found = [
        form
        for form in FORMS
        if tuple(places[: len(form.names)]) == form.names
        and needed <= {*form.names, _OUTPUT_LSE}
        and parameters.keys().isdisjoint(form.never)
        and calling in (None, form.calling)
    ]
    accepted = f"calling=, one of {', '.join(map(repr, CALLINGS))}"
    if len(found) > 1:
        known = " and of ".join(form.name for form in found)
        got = f"parameters {', '.join(places)}, which are those of {known}"
        raise ValueError(misuse("merge", got, accepted))
    if found:
        return found[0]
    if calling is not None:
        own = f"n{OURS}" if calling == "stacked" else OURS
        return Form("what is declared", calling, own, own.replace("d", ""))
    count = 2 if layout is not None and "n" in layout else len(needed)
    if count not in _PLAIN or not needed <= set(places):
        got = f"a function of {', '.join(parameters) or 'unknown parameters'}"
        raise ValueError(misuse("merge", got, accepted))
    return _PLAIN[count]


def _lse_layout(layout: str) -> str:
    """That of a log-sum-exp, where the layout of the output leaves no doubt."""
    own = layout.replace("d", "")
    if "h" in own and own.index("h") > own.find("l"):
        accepted = f"that of the log-sum-exps too: {own!r}, or {own.replace('lh', 'hl')!r}?"
        raise ValueError(misuse("lse_layout", f"None for layout={layout!r}", accepted))
    return own


def _check(form: Form) -> None:
    """Refuse layouts that say nothing."""
    stacked = form.calling == "stacked"
    known = {*OURS, "n"} if stacked else {*OURS}
    letters = set(form.layout)
    wrong = len(form.layout) != len(letters) or not {"l", "d"} <= letters <= known
    if wrong or ("n" in letters) != stacked:
        parts = ", and n for the parts" if stacked else ""
        accepted = f"each of l and d once, and b and h or not{parts}, as '{'n' * stacked}blhd'"
        raise ValueError(misuse("layout", repr(form.layout), accepted))
    own = form.lse_layout.replace("1", "", 1)
    if set(own) != letters - {"d"} or len(own) != len(set(own)):
        accepted = f"the letters of layout={form.layout!r} without d, in any order, and 1 or not"
        raise ValueError(misuse("lse_layout", repr(form.lse_layout), accepted))


@dataclass(frozen=True)
class Merge:
    """A function that merges, and how it is called.

    It takes and gives outputs (batch, heads, query_len, width) and log-sum-exps
    (batch, heads, query_len), of the base of its form.
    """

    function: Callable[..., Any]
    form: Form

    def __call__(
        self, outs: Sequence[Tensor], lses: Sequence[Tensor]
    ) -> tuple[Tensor, Tensor | None]:
        """Merge the states of some parts, two where it merges pairs."""
        form, sizes = self.form, dict(zip(OURS, outs[0].shape, strict=True))
        layout, lse_layout = form.layout.replace("n", ""), form.lse_layout.replace("n", "")
        own = [_arranged(out, OURS, layout) for out in outs]
        own_lses = [_arranged(lse, OUR_LSE, lse_layout, dense=form.dense) for lse in lses]
        out, lse = self._called(own, own_lses)
        accepted = tuple(own[0].shape), tuple(own_lses[0].shape)
        for tensor, shape in zip((out, lse), accepted, strict=True):
            if tensor is not None and tuple(tensor.shape) != shape:
                raise ValueError(misuse(_RETURNED, f"shape {tuple(tensor.shape)}", str(shape)))
        out = _back(out, OURS, layout, sizes)
        return out, None if lse is None else _back(lse, OUR_LSE, lse_layout, sizes)

    def _called(self, outs: list[Tensor], lses: list[Tensor]) -> tuple[Tensor, Tensor | None]:
        form = self.form
        if form.calling == "list":
            return _read(self.function(outs, lses))
        if form.calling == "stacked":
            dim, lse_dim = form.layout.index("n"), form.lse_layout.index("n")
            lse = torch.stack(lses, lse_dim)
            if not form.dense:  # queries next to one another, as its own kernels leave them
                lse = torch.stack([one.mT.contiguous() for one in lses], 0).mT
            return _read(self.function(torch.stack(outs, dim), lse))
        states = outs[0], lses[0], outs[1], lses[1]
        if form.calling == "pair":
            return _read(self.function(*states))
        if form.calling == "in_place":
            self.function(*states)
            return outs[0], lses[0]
        output, lse = (torch.full_like(one, torch.nan) for one in states[:2])
        if _OUTPUT_LSE in (parameters_of(self.function) or ()):
            self.function(output, *states, **{_OUTPUT_LSE: lse})
            return output, lse
        self.function(output, *states)
        return output, None


def _read(result: Any) -> tuple[Tensor, Tensor | None]:
    pair = tuple(result[:2]) if isinstance(result, (tuple, list)) and result else (result,)
    out, lse = pair if len(pair) == 2 else (pair[0], None)
    if not isinstance(out, Tensor) or not (lse is None or isinstance(lse, Tensor)):
        got = f"a tuple of {', '.join(type(one).__name__ for one in pair)}"
        got = got if len(pair) > 1 else type(result).__name__
        raise TypeError(misuse(_RETURNED, got, "(out, lse), or out"))
    return out, lse


def _arranged(tensor: Tensor, own: str, wanted: str, *, dense: bool = True) -> Tensor:
    """Bring dimensions in order; those that are not wanted become part of l."""
    rest, within = _folded(own, wanted)
    order = [*rest, *within]
    tensor = tensor.permute([own.index(letter) for letter in order]).flatten(len(rest))
    now = [*rest, "l"]
    tensor = tensor.permute([now.index(letter) for letter in wanted if letter != "1"])
    if "1" in wanted:
        tensor = tensor.unsqueeze(wanted.index("1"))
    return tensor.clone(memory_format=torch.contiguous_format) if dense else tensor.clone()


def _back(tensor: Tensor, own: str, had: str, sizes: dict[str, int]) -> Tensor:
    rest, within = _folded(own, had)
    if "1" in had:
        tensor = tensor.squeeze(had.index("1"))
    letters = had.replace("1", "")
    tensor = tensor.permute([letters.index(letter) for letter in (*rest, "l")])
    tensor = tensor.reshape(*tensor.shape[:-1], *(sizes[letter] for letter in within))
    order = [*rest, *within]
    return tensor.permute([order.index(letter) for letter in own])


def _folded(own: str, wanted: str) -> tuple[list[str], list[str]]:
    """The letters that stay, and those that become one, the last of which is l."""
    rest = [letter for letter in own if letter in wanted and letter != "l"]
    return rest, [*(letter for letter in own if letter not in (*wanted, "l")), "l"]
