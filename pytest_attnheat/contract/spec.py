"""What an implementation of attention claims: how it is called, and what it gives."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from functools import cached_property, wraps
from typing import Any

import torch
from torch import Tensor

from ..assertions.behaviour.sequences import SequenceModel, with_causal
from ..attention.call import Call, MaySee, ScoreMod, slopes_of
from ..attention.shards import Scheme, Shards
from ..attention.tolerance import merging_tolerance
from ..attention.vocabulary import Alignment, DeclaredFullyMasked, MaskMeaning
from ..callables import parameters_of
from ..capture.record import AttentionRecord
from ..capture.trace import Trace
from ..failure import Failure
from . import accepted, asking
from .accepted import Returns
from .asking import KEYWORDS, Answer
from .conventions import Convention, named

# Looked up in this order: a causal_mask is a mask.
_SOUNDS: dict[str, tuple[str, ...]] = {
    "mask": ("mask", "padding"), "causal": ("causal",),
    **{field: (name if name == "lengths" else name.rstrip("s"),)
       for field, name in KEYWORDS.items()},
}  # fmt: skip
# What is declared of every call, unless it is a keyword.
_ALWAYS = ("alignment", "window", "chunk", "prefix", "sink_keys", "scale", "softcap", "score_mod",
           "sinks", "rounded", "fully_masked")  # fmt: skip


@dataclass(frozen=True)
class AttentionSpec:
    """Declares what an implementation claims. What is declared is checked as well.

    Anything with the signature of `torch.nn.functional.scaled_dot_product_attention` needs
    nothing declared: `AttentionSpec(my_attention)`.

    Attributes:
        subject: Called as `subject(query, key, value, **arguments)`; or, with `inputs`, a block
            with its own projections, called as `subject(inputs)` (a `SequenceModel` says how it
            takes its mask); or a trace of `capture_attention`, or one of its records: each
            attention in it is judged by its own queries, keys, values and mask.
        name: What it is called in reports and test ids; its own name by default.
        layout: The order of the dimensions of query, key, value and output: `"bhld"`
            (batch, heads, length, width), `"blhd"`, `"lbhd"` ..., or without heads `"bld"`.
        inputs: For a block: an example of its input, (batch, length, width) floats or (batch,
            length) token ids, of two or more sequences of two or more tokens.
        mask: What a boolean `attn_mask` means: `"keep"` (True where a query may attend), `"drop"`
            (True where not), `"additive"` (floats that are added to the scores), `"any"` (as
            PyTorch: True where it may attend, or floats), or None: it takes no mask.
        mask_argument: The keyword of the mask. A subject whose signature lacks it takes none.
        causal: What its `is_causal=True` means: `"top_left"`, `"bottom_right"`, or None: it does
            not take it. Of a block: whether it is causal, always. Of what was captured, or does
            not take it: what its window is counted from.
        causal_argument: The keyword of it. A subject whose signature lacks it does not take it.
        window: How many keys before and after its own position a query attends to, always;
            None for all, also as one of the two: `(None, 0)` is always causal. Counted from the
            alignment, or the top left. Through several layers more is seen: of a block, each
            attention inside is held to it. Or the keyword of it, which takes -1 for no limit.
        grouped: Whether it takes fewer heads of keys than of queries (`enable_gqa=True` is
            passed if it takes that). By default, if its signature has `enable_gqa`.
        scale: What scores are multiplied by: a number, or None for head_dim ** -0.5.
        dropout: Whether it takes `dropout_p`; by default, if its signature has it. Or the keyword
            under which it takes it.
        returns: `"output"` alone; or a pair of the output and `"weights"` per head (before
            dropout), weights `"averaged"` over heads, or `"dropped_weights"`, after dropout; or
            the log-sum-exp of each row, `"lse"`, whose shape, base and sink are found out.
        fully_masked: What the output is for a query that may attend to nothing: `"zero"`,
            `"uniform"` (the mean of all values), `"nan"`, or `"undefined"`: not judged.
        dtypes: The dtypes in which it is examined.
        devices: The devices; all that are present by default.
        tolerance: How far its output and its gradients may be off besides rounding, as a part of
            the largest number of a head; by default as `assert_matches_reference` allows.
        softcap: Scores become softcap * tanh(score / softcap): a number that it always uses, or
            the keyword under which it takes one; by default a keyword such as `softcap` that its
            signature has. Likewise all that follows where a keyword is accepted.
        sinks: One score per head that joins the sum of each row: numbers (heads,) that it always
            uses, or its keyword.
        alibi: One slope per head: a score loses slope times the distance of query and key.
            Numbers (heads,), a function from the number of heads to them, or a keyword.
        bias: The keyword of floats that are added to the scores, besides the mask.
        score_mod: What it always does to a score, after all else: a function of score, batch,
            head, query and key position, elementwise, as of `flex_attention`.
        may_see: Who may always attend to whom, besides all else: a function of batch, head, query
            and key position, or booleans (query_len, key_len) for calls that are no longer.
        chunk: A query always sees keys of its own chunk of so many positions alone. Or the keyword
            of it.
        prefix: So many first keys are seen in spite of causality.
        sink_keys: So many first keys are seen in spite of `window` and `chunk`.
        documents: The keyword of the document of each position, (batch, length); of a block, these
            numbers themselves, (batch, length) or (length,).
        lengths: The keyword of how many first keys of each batch entry are real, (batch,).
        scale_argument: The keyword of the scale; by default one such as `scale`, `softmax_scale`
            or `sm_scale` that its signature has.
        mask_shape: The one shape that its mask has: `"(L, S)"` or `"(B, S)"`, or one of four
            dimensions as `"(B, 1, L, S)"`; by default all of four dimensions, as the scores have.
        rounded: Steps that are rounded on purpose, and to which dtype: "query", "key", "value",
            "scores", "weights".
        gradients: Whether it has gradients, so that they are judged.
        few_shapes: Whether to ask few shapes, for what is compiled for each.
        square: Whether it takes as many keys as queries alone; by default that is found out.
        reference: What it is to compute, where no name above says it: called as it is.
        arguments: Further arguments of each call, by name.
        memory: Of a block: which of `arguments` its queries look things up in, (batch, length,
            width); its mask is then about that.
        like: The convention by which it is called, by name ("flash_attn"; the page "Public
            callables" of the docs lists all) or one of your own; what is not typed is taken from
            it. By default it is recognised by its parameters, unless `layout` or the keyword of
            the mask, of causality or of the scale is typed.
        call: Calls it, for what no field says: a function of the subject and a `Call`, whose
            tensors are (batch, heads, length, width), that returns the output (batch, heads,
            query_len, value_dim), or that and more. What it takes besides the three tensors has
            to be typed; the text of a keyword then says no more than that it does.
        sharding: How a sequence lies on several ranks, of a subject that is called on each of them
            with its shards of query, key and value, and answers its own queries: `"ring"` and
            `"ulysses"` (rank r holds the r-th chunk), `"zigzag"` (of twice as many chunks, the r-th
            from the front and the r-th from the end) or `"striped"` (position p lies on rank
            p % ranks). Its causality and its window are those of the whole sequence.
            `check_attention(spec, ranks=)` examines it.
        uneven: Whether the last of its shards may be shorter than the others.
    """

    subject: Callable[..., Any] | Trace | AttentionRecord
    name: str = ""
    inputs: Tensor | None = None
    layout: str = "bhld"
    mask: MaskMeaning | None = "keep"
    mask_argument: str = "attn_mask"
    causal: Alignment | None = "top_left"
    causal_argument: str = "is_causal"
    window: tuple[int | None, int | None] | str | None = None
    grouped: bool | None = None
    scale: float | None = None
    dropout: bool | str | None = None
    returns: Returns = "output"
    fully_masked: DeclaredFullyMasked = "zero"
    dtypes: Sequence[str] = ("float32", "float16", "bfloat16", "float64")
    devices: Sequence[str] | None = None
    tolerance: float | None = None
    softcap: float | str | None = None
    sinks: Tensor | str | None = None
    alibi: Tensor | Callable[[int], Tensor | Sequence[float]] | str | None = None
    bias: str | None = None
    score_mod: ScoreMod | None = None
    may_see: MaySee | Tensor | None = None
    chunk: int | str | None = None
    prefix: int = 0
    sink_keys: int = 0
    documents: Tensor | str | None = None
    lengths: str | None = None
    scale_argument: str | None = None
    mask_shape: str | None = None
    rounded: Mapping[str, torch.dtype] | None = None
    gradients: bool = True
    few_shapes: bool = False
    square: bool | None = None
    reference: Callable[..., Any] | None = None
    arguments: Mapping[str, Any] | None = None
    memory: str | None = None
    like: str | Convention | None = None
    call: Callable[..., Any] | None = None
    sharding: Scheme | Shards | None = None
    uneven: bool = False
    # Itself: `replace` hands it on, and so tells what was typed from what was filled in.
    _made: AttentionSpec | None = field(default=None, repr=False, compare=False, kw_only=True)

    def __post_init__(self) -> None:
        accepted.check_subject(self)
        if self._made is not None:
            self._forget(self._made)
        accepted.check_fields(self)
        self._complete()
        accepted.check_rules(self)

    def __getstate__(self) -> dict[str, Any]:
        """Be copied and sent without what cannot be."""
        return {n: one for n, one in vars(self).items() if n not in ("parameters", "convention")}

    @property
    def typed(self) -> frozenset[str]:
        """The names of the fields that were given, and not left to their defaults."""
        return frozenset(vars(self)["_typed"])

    def says(self, field_name: str) -> bool:
        """Whether a field was given, or is said by its convention."""
        own = self.convention
        return field_name in self.typed or (own is not None and field_name in own.declares)

    @cached_property
    def convention(self) -> Convention | None:
        """How it is called, where that is a convention of the table."""
        return self.like if isinstance(self.like, Convention | None) else named(self.like)

    def _forget(self, before: AttentionSpec) -> None:
        """Forget what was filled in for another subject, and was not typed since."""
        names = [one.name for one in fields(AttentionSpec) if one.name in before.typed
                 or getattr(self, one.name) is not getattr(before, one.name)]  # fmt: skip
        filled = vars(before)["_filled"] if self.subject is not before.subject else {}
        for name in filled.keys() - set(names):
            object.__setattr__(self, name, AttentionSpec.__dataclass_fields__[name].default)
        vars(self)["_typed"] = set(names)

    def _complete(self) -> None:
        """Fill in what its convention, and the subject's own name and signature, say."""
        said = accepted.by_convention(self)
        self._fill(said)
        found = said | accepted.by_signature(self)
        self._fill(found)
        vars(self).update(_filled=found, _made=self)

    def _fill(self, found: Mapping[str, Any]) -> None:
        for name, value in found.items():
            object.__setattr__(self, name, value)

    @property
    def heads(self) -> int | None:
        """How many query heads it has, if numbers per head are declared; else None."""
        given = (one for one in (self.sinks, self.alibi) if isinstance(one, Tensor))
        return next(map(len, given), None)

    @property
    def alignment(self) -> Alignment:
        """What causal means, and where the window is counted from."""
        return self.causal or "top_left"

    @property
    def sides(self) -> tuple[int | None, ...]:
        """The two sides of the window that it always has; none without one."""
        return self.window if isinstance(self.window, tuple) else ()

    @property
    def takes_causal(self) -> bool:
        """Whether the subject can be asked to be causal, by `causal_argument`."""
        asked = self.causal is not None and not (self.is_block or self.is_captured)
        return asked and not self.lacks(self.causal_argument, "causal")

    @property
    def is_block(self) -> bool:
        """Whether the subject is a block, with projections of its own."""
        return self.inputs is not None

    @property
    def is_captured(self) -> bool:
        """Whether the subject is a trace or a record of `capture_attention`."""
        return isinstance(self.subject, Trace | AttentionRecord)

    @cached_property
    def parameters(self) -> Mapping[str, inspect.Parameter] | None:
        """The parameters of the subject; None for a builtin, whose signature is not known."""
        if self.call is not None or self.is_captured:
            return {}
        called = self.implementation
        return parameters_of(called.module if isinstance(called, SequenceModel) else called)

    def names(self, keyword: str) -> bool:
        """Whether the signature has a keyword; that of a builtin is PyTorch's own."""
        handled = self.convention.handles if self.convention else ()
        return self.parameters is None or keyword in self.parameters or keyword in handled

    @property
    def has_heads(self) -> bool:
        """Whether the layout has heads."""
        return "h" in self.layout

    def sounding_like(self, kind: str) -> list[str]:
        """The parameters of the subject that sound like a mask, like causality, or an option."""
        return [
            name for name in self.parameters or {}
            if [k for k, words in _SOUNDS.items()
                if any(word in name.lower().replace("_", "") for word in words)][:1] == [kind]
        ]  # fmt: skip

    @property
    def keywords(self) -> dict[str, str]:
        """The keywords of features that are declared, by field."""
        given = {name: getattr(self, name) for name in KEYWORDS}
        return {name: keyword for name, keyword in given.items() if isinstance(keyword, str)}

    def lacks(self, keyword: str, kind: str) -> bool:
        """Whether a keyword is not taken, or not by the parameter that is meant for its kind."""
        elsewhere = not self.names(keyword) and bool(self.sounding_like(kind))
        return elsewhere or not self.takes(keyword)

    def is_causal_by_default(self) -> bool:
        """Whether it is causal unless it is told otherwise."""
        parameter = (self.parameters or {}).get(self.causal_argument)
        return parameter is not None and parameter.default is True

    def needs(self, keyword: str) -> bool:
        """Whether it cannot be called without a keyword, so that None is passed for none."""
        parameter = (self.parameters or {}).get(keyword)
        return parameter is not None and parameter.default is parameter.empty

    @property
    def unmet(self) -> str:
        """What a call needs besides query, key, value and what is declared; empty if nothing."""
        if isinstance(self.sharding, str):
            return "it lies on several ranks: check_attention(spec, ranks=) starts them"
        if self.is_block or self.is_captured or self.call or self.convention:
            return ""
        positional = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
        known = {self.mask_argument, self.causal_argument}
        known |= set(self.keywords.values())
        needed = [p for p in (self.parameters or {}).values() if p.default is p.empty
                  and p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]  # fmt: skip
        first = [p for p in needed if p.kind in positional][:3]
        names = [p.name for p in needed if p not in first and p.name not in known]
        if not names:
            return ""
        return (
            f"it needs {' and '.join(names)} besides query, key and value: a function around it "
            "that takes these three can be examined"
        )

    def takes(self, keyword: str) -> bool:
        """Whether the subject takes a keyword; taken as a yes where its signature is unknown."""
        anything = any(p.kind is p.VAR_KEYWORD for p in (self.parameters or {}).values())
        return anything or self.call is not None or self.names(keyword)

    @cached_property
    def _slopes(self) -> dict[int, Tensor]:
        """The slopes of so many heads; kept, as cases are known by what is the same tensor."""
        return {}

    def always(self, heads: int) -> dict[str, Any]:
        """Return what every call with so many query heads has, as fields of `Call`."""
        if callable(self.alibi) and heads not in self._slopes:
            self._slopes[heads] = slopes_of(self.alibi, heads)
        slopes = self._slopes[heads] if callable(self.alibi) else self.alibi
        seen: Any = self.may_see
        seen = asking.by_position(seen) if isinstance(seen, Tensor) else seen
        given = {name: getattr(self, name) for name in _ALWAYS}
        given |= {"alibi": slopes, "may_see": seen, "shards": self.sharding}
        return {name: value for name, value in given.items() if not isinstance(value, str | None)
                or name in ("alignment", "fully_masked")}  # fmt: skip

    def tolerance_in(self, dtype: torch.dtype) -> float:
        """How far it may be off besides rounding, as a part of the largest number of a head."""
        merged = isinstance(self.sharding, Shards) and self.sharding.ranks
        return max(self.tolerance or 0.0, merging_tolerance(dtype, merged or 0))

    def described(self, call: Call) -> Call:
        """Return a call with what the subject always does, where the call does not say it."""
        default = {one.name: one.default for one in fields(Call)}
        always: dict[str, Any] = {
            name: value.to(call.query.device) if isinstance(value, Tensor) else value
            for name, value in self.always(call.heads).items()
            if name in ("alignment", "fully_masked") or getattr(call, name) is default[name]
        }
        return replace(call, **always)

    def expected(self) -> AttentionSpec | None:
        """Return its reference as it is called; None without one."""
        own = self.reference
        return None if own is None else replace(self, subject=own, reference=None)

    def ask(self, call: Call, *, dropout: float = 0.0, besides: bool = False) -> Answer:
        """Call the subject as it wants to be called.

        Args:
            call: What it is asked, (batch, heads, length, width); (batch, 1, ...) for a layout
                without heads. What it always does need not be said.
            dropout: Passed on as `dropout_p` where it is not 0.
            besides: Whether what it returns beside its output is wanted, where it has to be asked
                for that.

        Returns:
            The output (batch, heads, query_len, value_dim), and what it returns besides.

        Raises:
            TypeError: The subject returns no tensor, or no pair where one is declared; or it is
                not declared to take what the call has.
            ValueError: Its output has another shape than the layout says.
            Failure: It did to a cache what it was not to do.
        """
        answer = asking.ask(self, call, dropout=dropout, besides=besides)
        if answer.fault is not None:
            claim = "after the call its cache is not what it was, but for what is appended"
            raise Failure("", claim, cause=f"{answer.fault.sentence} ({answer.fault.name})")
        return answer

    @property
    def implementation(self) -> Callable[..., Any]:
        """The subject, if it can be called.

        Raises:
            TypeError: It was captured.
        """
        if isinstance(self.subject, Trace | AttentionRecord):
            raise TypeError(f"{self.name} was captured, and cannot be called")
        return self.subject

    def of_another(self, subject: Callable[..., Any]) -> AttentionSpec:
        """Return the very same specification of another subject, which has the same signature."""
        own = object.__new__(AttentionSpec)
        known = {"parameters": self.parameters, "convention": self.convention, "subject": subject}
        vars(own).update(vars(self), **known)
        return own

    def __call__(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        *,
        scale: float | None = None,
        enable_gqa: bool = False,
        **features: Any,
    ) -> Tensor:
        """Call the subject with the arguments of PyTorch's own function, and get its output."""
        # So every assertion on attention functions takes a specification, whatever the layout of
        # the subject and the meaning of its mask. `is_causal` means what the specification says.
        # Further keywords are fields of `Call`.
        call = Call(query, key, value, causal=is_causal, scale=scale, **features)
        if is_causal and not self.takes_causal:
            call = replace(call, causal=False)
            if not isinstance(self.window, tuple) or self.window[1] != 0:  # not causal of itself
                causal = replace(call, causal=True, alignment=self.alignment).visible()
                attn_mask = causal if attn_mask is None else with_causal(attn_mask, causal)
        if attn_mask is not None:
            mask = attn_mask.reshape((1,) * max(0, 2 - attn_mask.ndim) + tuple(attn_mask.shape))
            is_boolean = mask.dtype == torch.bool
            call = replace(call, mask=mask) if is_boolean else replace(call, bias=mask)
        return self.ask(call, dropout=dropout_p).output


_FIELDS = [one.name for one in fields(AttentionSpec)]
_init = AttentionSpec.__init__


@wraps(_init)
def _noting(self: AttentionSpec, *given: Any, **named: Any) -> None:
    """Note which fields are typed, which a dataclass does not tell from its defaults."""
    vars(self)["_typed"] = {*_FIELDS[: len(given)], *named}
    _init(self, *given, **named)


AttentionSpec.__init__ = _noting  # type: ignore[method-assign]
