"""What an implementation of attention claims: how it is called, and what it gives."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from numbers import Real
from typing import Any, Literal, TypeAlias, get_args

import torch
from torch import Tensor, nn

from pytest_attnheat.assertions.behaviour.sequences import as_meant
from pytest_attnheat.assertions.behaviour.visibility import as_documents
from pytest_attnheat.attention.call import MaySee, ScoreMod
from pytest_attnheat.attention.cases import DTYPES
from pytest_attnheat.attention.devices import check_device
from pytest_attnheat.attention.reference import causal_mask
from pytest_attnheat.attention.vocabulary import (
    ALIGNMENTS,
    DECLARED_FULLY_MASKED,
    MASK_MEANINGS,
    Alignment,
    DeclaredFullyMasked,
    MaskMeaning,
)
from pytest_attnheat.capture.record import AttentionRecord
from pytest_attnheat.capture.trace import Trace
from pytest_attnheat.inputs import check_number, check_tolerance, dtype_name, misuse

Returns: TypeAlias = Literal["output", "weights", "averaged", "dropped_weights", "lse"]
Sound: TypeAlias = Literal["mask", "causal"]

# Looked up in this order: a causal_mask is a mask.
_SOUNDS: dict[Sound, tuple[str, ...]] = {"mask": ("mask", "padding"), "causal": ("causal",)}
# A side of a window that ends nowhere.
_ENDLESS = 2**30
# The steps that may be rounded on purpose, in their order.
STEPS = ("query", "key", "value", "scores", "weights")
_NAMES = {"b": "batch", "h": "heads", "l": "length", "d": "width"}


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
            length) token ids, of two or more sequences.
        mask: What a boolean `attn_mask` means: `"keep"` (True where a query may attend), `"drop"`
            (True where not), `"additive"` (floats, 0 and -inf), or None: it takes no mask.
        mask_argument: The keyword of the mask. A subject whose signature lacks it takes none.
        causal: What its `is_causal=True` means: `"top_left"`, `"bottom_right"`, or None: it does
            not take it. Of a block: whether it is causal, always. Of what was captured, or does
            not take it: what its window is counted from.
        causal_argument: The keyword of it. A subject whose signature lacks it does not take it.
        window: How many keys before and after its own position a query attends to, always;
            None for all, also as one of the two: `(None, 0)` is always causal. Counted from the
            alignment, or the top left. Through several layers more is seen: of a block, each
            attention inside is held to it.
        grouped: Whether it takes fewer heads of keys than of queries (`enable_gqa=True` is
            passed if it takes that). By default, if its signature has `enable_gqa`.
        scale: What scores are multiplied by: a number, or None for head_dim ** -0.5.
        dropout: Whether it takes `dropout_p`; by default, if its signature has it.
        returns: `"output"` alone; or a pair of the output and `"weights"` per head (before
            dropout), weights `"averaged"` over heads, or `"dropped_weights"`, after dropout.
        fully_masked: What the output is for a query that may attend to nothing: `"zero"`,
            `"uniform"` (the mean of all values), `"nan"`, or `"undefined"`: not judged.
        dtypes: The dtypes in which it is examined.
        devices: The devices; all that are present by default.
        tolerance: How far its float32 output may be off, as a part of its size; by default as
            `assert_matches_reference`.
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
        chunk: A query always sees keys of its own chunk of so many positions alone.
        prefix: So many first keys are seen in spite of causality.
        sink_keys: So many first keys are seen in spite of `window` and `chunk`.
        documents: The keyword of the document of each position, (batch, length); of a block, these
            numbers themselves, (batch, length) or (length,).
        lengths: The keyword of how many first keys of each batch entry are real, (batch,).
        scale_argument: The keyword of the scale; by default one such as `scale`, `softmax_scale`
            or `sm_scale` that its signature has.
        rounded: Steps that are rounded on purpose, and to which dtype: "query", "key", "value",
            "scores", "weights".
        gradients: Whether it has gradients, so that they are judged.
        few_shapes: Whether to ask few shapes, for what is compiled for each.
        square: Whether it takes as many keys as queries alone; by default that is found out.
        reference: What it is to compute, where no name above says it: called as it is.
        arguments: Of a block: further arguments of each call, by name.
        memory: Of a block: which of `arguments` its queries look things up in, (batch, length,
            width); its mask is then about that.
    """

    subject: Callable[..., Any] | Trace | AttentionRecord
    name: str = ""
    inputs: Tensor | None = None
    layout: str = "bhld"
    mask: MaskMeaning | None = "keep"
    mask_argument: str = "attn_mask"
    causal: Alignment | None = "top_left"
    causal_argument: str = "is_causal"
    window: tuple[int | None, int | None] | None = None
    grouped: bool | None = None
    scale: float | None = None
    dropout: bool | None = None
    returns: Returns = "output"
    fully_masked: DeclaredFullyMasked = "zero"
    dtypes: Sequence[str] = ("float32", "float16", "bfloat16", "float64")
    devices: Sequence[str] | None = None
    tolerance: float | None = None
    softcap: float | str | None = None
    sinks: Tensor | str | None = None
    alibi: Tensor | Callable[[int], Tensor] | str | None = None
    bias: str | None = None
    score_mod: ScoreMod | None = None
    may_see: MaySee | Tensor | None = None
    chunk: int | None = None
    prefix: int = 0
    sink_keys: int = 0
    documents: Tensor | str | None = None
    lengths: str | None = None
    scale_argument: str | None = None
    rounded: Mapping[str, torch.dtype] | None = None
    gradients: bool = True
    few_shapes: bool = False
    square: bool | None = None
    reference: Callable[..., Any] | None = None
    arguments: Mapping[str, Any] | None = None
    memory: str | None = None

    def __post_init__(self) -> None:
        _check_subject(self.subject, self.inputs)
        for name, (types, is_accepted, accepted) in _ACCEPTED.items():
            given = getattr(self, name)
            if not isinstance(given, types):
                raise TypeError(misuse(name, _shown(given), accepted))
            if given is not None and not is_accepted(given):
                raise ValueError(misuse(name, _shown(given), accepted))
        for device in self.devices or ():
            check_device(device)
        if self.scale is not None:
            check_number(self.scale, "scale")
        if self.tolerance is not None:
            check_tolerance(self.tolerance)
        if self.inputs is not None:
            self._check_block(self.inputs)
        self._complete()

    def _check_block(self, inputs: Tensor) -> None:
        """Refuse what does not fit the inputs of a block."""
        batch, length = inputs.shape[:2]
        own = getattr(self.subject, "arguments", None) or {}
        if self.memory is not None and self.memory not in {**own, **(self.arguments or {})}:
            raise ValueError(misuse("memory", repr(self.memory), "the name of one of arguments"))
        if isinstance(self.documents, str):
            accepted = f"of a block, numbers of shape {(batch, length)} or {(length,)}"
            raise ValueError(misuse("documents", repr(self.documents), accepted))
        if self.documents is not None:
            as_documents(self.documents, (batch, length))
        if isinstance(self.may_see, Tensor) and self.may_see.shape != (length, length):
            accepted = f"a function, or booleans of shape {(length, length)}"
            raise ValueError(misuse("may_see", f"shape {tuple(self.may_see.shape)}", accepted))

    def _complete(self) -> None:
        """Fill in what the subject's own name and signature say."""
        found: dict[str, Any] = {}
        if not self.name:
            whole = getattr(self.subject, "module", self.subject)
            found["name"] = getattr(whole, "__name__", type(whole).__name__)
        if self.is_captured and not self.name:
            found["name"] = getattr(self.subject, "layer", "") or "the trace"
        if self.is_captured and self.causal == "bottom_right" and self.window is None:
            accepted = "'bottom_right' with window= what is counted from it, or None"
            raise ValueError(misuse("causal", "'bottom_right' without a window", accepted))
        if self.inputs is None and not self.is_captured:
            found["grouped"] = self.names("enable_gqa") if self.grouped is None else self.grouped
            found["dropout"] = self.names("dropout_p") if self.dropout is None else self.dropout
            self._check_named("mask_argument", "attn_mask")
            self._check_named("causal_argument", "is_causal")
            found |= self._without_keywords()
        for name, value in found.items():
            object.__setattr__(self, name, value)

    def _without_keywords(self) -> dict[str, Any]:
        """What is left of the mask and of causality if the subject has no keyword for them.

        Only a default is dropped. What was declared is kept if it has an effect, else refused.
        """
        left: dict[str, Any] = {}
        accepted = "None, or with {}_argument= the name of its parameter"
        if self._lacks(self.mask_argument, "mask"):
            if self.mask not in ("keep", None):
                got = f"{self.mask!r} for a subject that has no parameter {self.mask_argument}"
                raise ValueError(misuse("mask", got, accepted.format("mask")))
            left["mask"] = None
        if self._lacks(self.causal_argument, "causal"):
            if self.causal == "bottom_right" and self.window is None:
                got = (
                    "'bottom_right' for a subject that has neither a parameter "
                    f"{self.causal_argument} nor a window"
                )
                accepted = f"{accepted.format('causal')}, or with window= what is counted from it"
                raise ValueError(misuse("causal", got, accepted))
            left["causal"] = None if self.causal == "top_left" else self.causal
        return left

    def _check_named(self, field: str, default: str) -> None:
        """Refuse a keyword that was given and that the subject has no parameter for."""
        keyword = getattr(self, field)
        if keyword != default and not self.takes(keyword):
            raise ValueError(
                f"{field}: got {keyword!r}; accepted is a parameter of the subject: "
                f"{', '.join(self.parameters or {})}"
            )

    @property
    def sides(self) -> tuple[int, int] | None:
        """The window as `sliding_window_mask` takes it."""
        if self.window is None:
            return None
        left, right = (_ENDLESS if side is None else side for side in self.window)
        return left, right

    @property
    def alignment(self) -> Alignment:
        """What causal means, and where the window is counted from."""
        return self.causal or "top_left"

    @property
    def takes_causal(self) -> bool:
        """Whether the subject can be asked to be causal, by `causal_argument`."""
        if self.causal is None or self.is_block or self.is_captured:
            return False
        return not self._lacks(self.causal_argument, "causal")

    @property
    def is_block(self) -> bool:
        """Whether the subject is a block, with projections of its own."""
        return self.inputs is not None

    @property
    def is_captured(self) -> bool:
        """Whether the subject is a trace or a record of `capture_attention`."""
        return isinstance(self.subject, Trace | AttentionRecord)

    @property
    def parameters(self) -> Mapping[str, inspect.Parameter] | None:
        """The parameters of the subject; None for a builtin, whose signature is not known."""
        # Of a module, that of __call__ names none.
        subject = self.implementation
        subject = subject.forward if isinstance(subject, nn.Module) else subject
        try:
            return inspect.signature(subject).parameters
        except (TypeError, ValueError):
            return None

    def names(self, keyword: str) -> bool:
        """Whether the signature has a keyword; that of a builtin is PyTorch's own."""
        return self.parameters is None or keyword in self.parameters

    @property
    def has_heads(self) -> bool:
        """Whether the layout has heads."""
        return "h" in self.layout

    def sounding_like(self, kind: Sound) -> list[str]:
        """The parameters of the subject that sound like a mask, or like causality."""
        found = []
        for name in self.parameters or {}:
            kinds = [k for k, words in _SOUNDS.items() if any(w in name.lower() for w in words)]
            if kinds[:1] == [kind]:
                found.append(name)
        return found

    def _lacks(self, keyword: str, kind: Sound) -> bool:
        """Whether a keyword is not taken, or not by the parameter that is meant for its kind."""
        elsewhere = not self.names(keyword) and bool(self.sounding_like(kind))
        return elsewhere or not self.takes(keyword)

    def _is_causal_by_default(self) -> bool:
        parameter = (self.parameters or {}).get(self.causal_argument)
        return parameter is not None and parameter.default is True

    def _needs_mask(self) -> bool:
        """Whether it cannot be called without a mask, so that none is passed as None."""
        parameter = (self.parameters or {}).get(self.mask_argument)
        return (
            self.mask is not None
            and parameter is not None
            and (parameter.default is parameter.empty)
        )

    def takes(self, keyword: str) -> bool:
        """Whether the subject takes a keyword; taken as a yes where its signature is unknown."""
        anything = any(p.kind is p.VAR_KEYWORD for p in (self.parameters or {}).values())
        return anything or self.names(keyword)

    def call(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        *,
        mask: Tensor | None = None,
        causal: bool = False,
        scale: float | None = None,
        dropout: float = 0.0,
    ) -> Answer:
        """Call the subject as it wants to be called.

        Args:
            query: (batch, heads, query_len, head_dim); (batch, 1, ...) for a layout without heads.
            key: (batch, key_heads, key_len, head_dim)
            value: (batch, key_heads, key_len, value_dim)
            mask: Boolean, True where a query may attend, broadcastable to (batch, heads,
                query_len, key_len).
            causal: Ask for causal attention by `causal_argument`.
            scale: Passed on where it is not None.
            dropout: Passed on as `dropout_p` where it is not 0.

        Returns:
            The output (batch, heads, query_len, value_dim), and the weights if it returns any.

        Raises:
            TypeError: The subject returns no tensor, or no pair where one is declared.
            ValueError: Its output has another shape than the layout says.
        """
        arguments: dict[str, Any] = {}
        if mask is not None:
            arguments[self.mask_argument] = self._mask(mask, query)
        elif self._needs_mask():
            arguments[self.mask_argument] = None
        if causal or self._is_causal_by_default():
            arguments[self.causal_argument] = causal
        if scale is not None:
            arguments["scale"] = scale
        if dropout:
            arguments["dropout_p"] = dropout
        if query.shape[1] != key.shape[1] and self.takes("enable_gqa"):
            arguments["enable_gqa"] = True
        inputs = [self._to_layout(tensor) for tensor in (query, key, value)]
        result = self.implementation(*inputs, **arguments)
        wanted = (*query.shape[:-1], value.shape[-1])
        if self.returns == "output":
            output, weights = result, None
            if isinstance(result, (tuple, list)) and result:
                output = result[0]
        elif isinstance(result, (tuple, list)) and len(result) >= 2:
            output, weights = result[0], result[1]
        else:
            raise TypeError(
                f"{self.name}: returns={self.returns!r} declares a pair (output, weights); got "
                f"{type(result).__name__}"
            )
        return Answer(self._from_layout(output, wanted), weights)

    @property
    def implementation(self) -> Callable[..., Any]:
        """The subject, if it can be called.

        Raises:
            TypeError: It was captured.
        """
        if isinstance(self.subject, Trace | AttentionRecord):
            raise TypeError(f"{self.name} was captured, and cannot be called")
        return self.subject

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
    ) -> Tensor:
        """Call the subject with the arguments of PyTorch's own function, and get its output.

        So every assertion on attention functions takes a specification, whatever the layout of
        the subject and the meaning of its mask. `is_causal` is aligned to the top left; to a
        subject that does not mean that, it is told as a mask.
        """
        if is_causal and self.causal != "top_left":
            causal = causal_mask(
                query.shape[-2], key.shape[-2], alignment="top_left", device=query.device
            )
            attn_mask = causal if attn_mask is None else attn_mask & causal
            is_causal = False
        if attn_mask is not None and self.mask is None:
            raise TypeError(f"{self.name} is not declared to take a mask (nor is_causal)")
        return self.call(
            query, key, value, mask=attn_mask, causal=is_causal, scale=scale, dropout=dropout_p
        ).output

    def _mask(self, mask: Tensor, query: Tensor) -> Tensor:
        if mask.dtype != torch.bool:
            if self.mask == "additive":
                return mask
            raise TypeError(f"{self.name} is not declared to take a mask of floats")
        mask = mask if self.has_heads or mask.ndim < 4 else mask[:, 0]
        return as_meant(mask, self.mask, query.dtype)

    def _to_layout(self, tensor: Tensor) -> Tensor:
        if not self.has_heads:
            tensor = tensor[:, 0]
        ours = "bhld" if self.has_heads else "bld"
        return tensor.permute([ours.index(letter) for letter in self.layout])

    def _from_layout(self, output: object, wanted: tuple[int, ...]) -> Tensor:
        if not isinstance(output, Tensor):
            raise TypeError(f"{self.name} must return a tensor; got {type(output).__name__}")
        sizes = dict(zip("bhld", wanted, strict=True))
        expected = tuple(sizes[letter] for letter in self.layout)
        if tuple(output.shape) != expected:
            names = ", ".join(_NAMES[letter] for letter in self.layout)
            raise ValueError(
                f"{self.name} must return ({names}), here {expected}; got {tuple(output.shape)}"
            )
        ours = "bhld" if self.has_heads else "bld"
        turned = output.permute([self.layout.index(letter) for letter in ours])
        return turned if self.has_heads else turned.unsqueeze(1)


def _is_block(subject: object) -> bool:
    """Whether a subject is a module whose forward takes fewer than three tensors."""
    if not isinstance(subject, nn.Module) or isinstance(subject, nn.MultiheadAttention):
        return False
    taken = inspect.signature(subject.forward).parameters.values()
    if any(p.kind is p.VAR_POSITIONAL for p in taken):
        return False
    needed = [p for p in taken if p.default is p.empty and p.kind is p.POSITIONAL_OR_KEYWORD]
    named = {"query", "key", "value", "q", "k", "v"} & {p.name for p in taken}
    return len(needed) < 3 and len(named) < 3


@dataclass(frozen=True)
class Answer:
    """What a subject returned.

    Attributes:
        output: (batch, heads, query_len, value_dim)
        weights: As it returned them, or None.
    """

    output: Tensor
    weights: Any


def _check_subject(subject: object, inputs: object) -> None:
    if not callable(subject) and not isinstance(subject, Trace | AttentionRecord):
        accepted = "a callable, as subject(query, key, value), or what capture_attention recorded"
        raise TypeError(misuse("subject", type(subject).__name__, accepted))
    if isinstance(subject, type):
        raise TypeError(misuse("subject", f"the class {subject.__name__}", "an instance"))
    if inputs is None and _is_block(subject):
        got = f"{type(subject).__name__}, which is not called with query, key and value"
        accepted = "a block with its inputs: AttentionSpec(module, inputs=...) examines it as one"
        raise ValueError(misuse("subject", got, accepted))


def _is_text(given: object) -> bool:
    return isinstance(given, str)


def _is_input(inputs: Tensor) -> bool:
    floats = inputs.is_floating_point() and inputs.ndim == 3
    tokens = inputs.dtype in (torch.int64, torch.int32) and inputs.ndim == 2
    return (floats or tokens) and len(inputs) >= 2 and inputs.numel() > 0


def _is_window(window: tuple[Any, ...]) -> bool:
    sides = [side for side in window if side is not None]
    return len(window) == 2 and all(type(side) is int and side >= 0 for side in sides)


def _shown(given: object) -> str:
    if isinstance(given, Tensor):
        return f"{dtype_name(given)} {tuple(given.shape)}"
    return repr(given)


def _one_of(known: Sequence[str], *, or_none: bool = False) -> tuple[Any, Any, str]:
    names = ", ".join(map(repr, known))
    types, ending = (str | None, ", or None") if or_none else (str, "")
    return types, known.__contains__, f"one of {names}{ending}"


def _is_booleans(seen: object) -> bool:
    return not isinstance(seen, Tensor) or (seen.dtype == torch.bool and seen.ndim == 2)


def _is_cap(cap: Any) -> bool:
    return isinstance(cap, str) or 0 < cap < math.inf


def _are_steps(steps: Mapping[str, Any]) -> bool:
    return set(steps) <= set(STEPS) and all(isinstance(to, torch.dtype) for to in steps.values())


_TEXT = (str, lambda _: True, "a text")
_FLAG = (bool | None, lambda _: True, "True, False, or None")
_KEYWORD = (str | None, str.isidentifier, "the name of a parameter, or None")
_FUNCTION = (Callable | None, lambda _: True, "a function, or None")
_COUNT = (int, lambda count: count >= 0, "a whole number from 0")
_PER_HEAD = (
    Tensor | str | None,
    lambda given: not isinstance(given, Tensor) or given.ndim == 1,
    "a tensor of one number per head, the keyword of one, or None",
)
# What each field accepts: its types, what else is true of it, and both in words.
_ACCEPTED: dict[str, tuple[Any, Callable[[Any], bool], str]] = {
    "name": _TEXT,
    "inputs": (Tensor | None, _is_input,
               "floats (batch, length, width) or token ids (batch, length) in int64 or int32, of "
               "two or more sequences, or None"),
    "layout": (str, lambda letters: sorted(letters) in (sorted("bhld"), sorted("bld")),
               "the letters b (batch), h (heads), l (length) and d (width) in any order, h or "
               "not: 'bhld', 'blhd', 'bld'"),
    "mask": _one_of(MASK_MEANINGS, or_none=True),
    "mask_argument": _TEXT,
    "causal": _one_of(ALIGNMENTS, or_none=True),
    "causal_argument": _TEXT,
    "window": (tuple | None, _is_window,
               "a pair of whole numbers from 0, with None for a side that ends nowhere, or None"),
    "grouped": _FLAG,
    "dropout": _FLAG,
    "returns": _one_of(get_args(Returns)),
    "fully_masked": _one_of(DECLARED_FULLY_MASKED),
    "dtypes": (tuple | list, lambda names: names and all(name in DTYPES for name in names),
               f"a tuple or list of one or more of {', '.join(map(repr, DTYPES))}"),
    "devices": (tuple | list | None, lambda names: names and all(map(_is_text, names)),
                "a tuple or list of one or more names of devices, or None for all that are there"),
    "softcap": (Real | str | None, _is_cap,
                "a finite number above 0, the keyword of one, or None"),
    "sinks": _PER_HEAD,
    "alibi": (Callable | Tensor | str | None, _PER_HEAD[1],
              f"a function of the number of heads, or {_PER_HEAD[2]}"),
    "bias": _KEYWORD,
    "score_mod": _FUNCTION,
    "may_see": (Callable | Tensor | None, _is_booleans,
                "a function of positions, booleans (query_len, key_len), or None"),
    "chunk": (int | None, lambda size: size > 0, "a whole number above 0, or None"),
    "prefix": _COUNT,
    "sink_keys": _COUNT,
    "documents": (Tensor | str | None, lambda given: isinstance(given, str) or given.ndim in (1, 2),
                  "numbers (batch, length) or (length,), the keyword of them, or None"),
    "lengths": _KEYWORD,
    "scale_argument": _KEYWORD,
    "rounded": (Mapping | None, _are_steps,
                f"a dtype of torch for some of {', '.join(map(repr, STEPS))}, or None"),
    "gradients": (bool, lambda _: True, "True or False"),
    "few_shapes": (bool, lambda _: True, "True or False"),
    "square": _FLAG,
    "reference": _FUNCTION,
    "arguments": (Mapping | None, lambda given: all(map(_is_text, given)),
                  "values by name, or None"),
    "memory": _KEYWORD,
}  # fmt: skip
