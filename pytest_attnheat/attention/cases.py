"""One case of attention, made from a seed: tensors, scores, weights and output."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor

from ..inputs import (
    as_whole,
    broadcasts,
    check_number,
    dtype_name,
    misuse,
    one_of,
    positive,
    seed_number,
    whole_number,
)
from .call import FEATURES, FUNCTIONS, Call, check_function
from .devices import ACCEPTED
from .reference import (
    KINDS,
    Kind,
    boolean_mask,
    causal_mask,
    checked_scores,
    padding_mask,
    sliding_window_mask,
    weigh,
)
from .scoring import (
    DotProductScore,
    ScaledDotProductScore,
    Scoring,
    ScoringFactory,
    draw,
    make_scoring,
    scoring_names,
)
from .vocabulary import ALIGNMENTS, FullyMasked, check_fully_masked

MaskBuilder = Callable[[int, int], Tensor]
MaskChoice = str | Tensor | MaskBuilder

DTYPES = ("float16", "bfloat16", "float32", "float64")
MASKS = ("causal_top_left", "causal_bottom_right", "padding", "sliding_window")
SIZES = ("batch", "heads", "query_len", "key_len", "head_dim", "value_dim")
HEAD_DIM = 16
DECLARED = ("causal", *FEATURES)
# What is about another feature says nothing without one of these.
_ABOUT = {
    "alignment": ("causal", "window", "chunk", "alibi", "documents", "lengths", "query_lengths"),
    "prefix": ("causal",),
    "sink_keys": ("window", "chunk"),
}
# Of these, True draws usual ones.
_DRAWN = ("alibi", "sinks", "lengths", "query_lengths", "bias")
OPTIONS = ("scoring", *SIZES, "mask", *DECLARED, "fully_masked", "kind", "dtype", "seed")


@dataclass(frozen=True, eq=False, repr=False, kw_only=True)
class AttentionCase(Call):
    """A call of attention, and what it comes to. No tensor requires a gradient.

    Attributes:
        query: (batch, heads, query_len, head_dim)
        key: (batch, heads, key_len, head_dim)
        value: (batch, heads, key_len, value_dim)
        mask: Boolean, broadcastable to the weights, True where a query may attend; or None. What
            else is declared (`causal`, `softcap`, `sinks` ...) are the fields of `Call`.
        scores: (batch, heads, query_len, key_len), as they enter the softmax, not masked
        weights: (batch, heads, query_len, key_len)
        sink_weights: What the sinks take of each row, (batch, heads, query_len, 1), so that the
            rows of `torch.cat([weights, sink_weights], -1)` sum to 1; None without sinks.
        output: (batch, heads, query_len, value_dim)
        scoring_function: The module or function that made the products that are scaled.
        scoring: Its name.
        seed: The seed of all numbers.
    """

    scores: Tensor
    weights: Tensor
    sink_weights: Tensor | None
    output: Tensor
    scoring_function: Scoring
    scoring: str
    seed: int

    @property
    def device(self) -> torch.device:
        """The device of all tensors."""
        return self.query.device

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of all tensors but the mask."""
        return self.query.dtype

    def __repr__(self) -> str:
        """Name the case and the shapes of its tensors."""
        tensors = {name: getattr(self, name) for name in ("query", "key", "value", "mask")}
        shapes = ", ".join(
            f"{name} {None if given is None else tuple(given.shape)}"
            for name, given in tensors.items()
        )
        made = f"{self.scoring} {dtype_name(self.dtype)} {self.device} seed {self.seed}"
        return f"<AttentionCase {made}: {shapes}>"


def make_attention(
    *,
    scoring: str | Scoring = "scaled_dot_product",
    batch: int = 2,
    heads: int = 4,
    query_len: int = 6,
    key_len: int = 8,
    head_dim: int = HEAD_DIM,
    value_dim: int | None = None,
    mask: MaskChoice | Sequence[MaskChoice] | None = None,
    fully_masked: FullyMasked = "zero",
    kind: Kind = "soft",
    dtype: torch.dtype | str = "float32",
    device: torch.device | str = "cpu",
    seed: int = 0,
    extra: Mapping[str, ScoringFactory] | None = None,
    **features: Any,
) -> AttentionCase:
    """Make a case of attention from a seed.

    Query, key and value are standard normal numbers, drawn on the CPU in float64, then cast and
    moved: the same on every device. Each has its own stream, so that another query_len leaves
    the keys as they are.

    Args:
        scoring: The name of a scoring function, or a module or function `(query, key) ->
            scores` that is ready for the device and dtype.
        batch: Number of batch entries.
        heads: Number of heads.
        query_len: Number of queries.
        key_len: Number of keys. It differs from `query_len` by default, so that a test notices
            where the two are confused.
        head_dim: Width of queries and keys.
        value_dim: Width of values; `head_dim` by default.
        mask: None; or `"causal_top_left"`, `"causal_bottom_right"`, `"padding"` (batch entry i
            keeps its first key_len - 1 - i keys, at least one), `"sliding_window"` (two keys on
            each side, aligned top left); or a boolean tensor, True where a query may attend; or
            a function `(query_len, key_len) -> ` such a tensor; or a tuple of these, all of
            which must permit.
        fully_masked: `"zero"`, `"uniform"` or `"nan"`, as in `attend`.
        kind: `"soft"`, `"hard"`, `"max_pooling"` or `"gating"`, as in `attend`.
        dtype: float16, bfloat16, float32 or float64; a `torch.dtype` or its name.
        device: Where the case is.
        seed: Seed of the inputs and of the parameters of the scoring function.
        extra: More factories of scoring functions by name, for this call only.
        features: What else is declared, as in `Call`, of the scores of any scoring function:
            `causal` and its `alignment`, `window`, `chunk`, `prefix`, `sink_keys`, `may_see`,
            `scale`, `softcap`, `score_mod`; `bias`, a tensor that is added to the scores, or True
            for a drawn one; `alibi`, one slope per head, or True for 2 ** (-8 h / heads) of the
            heads h from 1; `sinks`, one score per head, or True for drawn ones; `lengths`, how
            many keys of each batch entry are real, or True for those of the mask "padding";
            `documents`, a number of documents, the numbers of all positions, or a pair of those
            of queries and keys, (length,) or (batch, length). None and False are no feature.

    Raises:
        TypeError: A size or the seed is not a whole number, or the mask is not boolean.
        ValueError: A size is below 1, a name is unknown, or a mask or a feature does not fit.
    """
    check_options(
        {
            **({"scoring": scoring} if isinstance(scoring, str) else {}),
            **{"batch": batch, "heads": heads, "query_len": query_len, "key_len": key_len},
            **{"head_dim": head_dim, "value_dim": value_dim, "mask": mask},
            **{"fully_masked": fully_masked, "kind": kind, "dtype": dtype, "seed": seed},
            **features,
        },
        scoring_names(extra),
        teller="make_attention",
        besides="device",
    )
    target, number = _as_device(device), as_dtype(dtype)
    for function_name in FUNCTIONS:
        check_function(function_name, features.get(function_name), target)
    given: Any = scoring
    if not isinstance(given, str) and not callable(given):
        accepted = "the name of a scoring function, or a function (query, key) -> scores"
        raise TypeError(misuse("scoring", repr(given), accepted))
    value_dim = head_dim if value_dim is None else value_dim
    query = draw("query", seed, batch, heads, query_len, head_dim).to(target, number)
    key = draw("key", seed, batch, heads, key_len, head_dim).to(target, number)
    value = draw("value", seed, batch, heads, key_len, value_dim).to(target, number)
    built_mask = _build_mask(mask, batch, query_len, key_len, query.device)
    if isinstance(scoring, str):
        function = make_scoring(
            scoring, head_dim, seed=seed, device=target, dtype=number, extra=extra
        )
        name = scoring
    else:
        function = scoring
        name = getattr(scoring, "__name__", type(scoring).__name__)
    if type(function) is DotProductScore:
        features = {"scale": 1.0, **features}
    call = Call(query, key, value, mask=built_mask, fully_masked=check_fully_masked(fully_masked))
    call = replace(call, **_built(features, call, kind, seed))
    with torch.no_grad():
        products = checked_scores(function, query, key)
        if call.scale is not None:
            is_scaled = type(function) is ScaledDotProductScore
            products = products * (call.scale * math.sqrt(head_dim) if is_scaled else call.scale)
        scores = call.scored(products)
        output, weights, sink_weights = _weighed(call, scores, kind)
    return AttentionCase(
        **{field.name: getattr(call, field.name) for field in fields(Call)}, scores=scores,
        weights=weights, sink_weights=sink_weights, output=output, scoring_function=function,
        scoring=name, seed=seed,
    )  # fmt: skip


def _weighed(call: Call, scores: Tensor, kind: Kind) -> tuple[Tensor, Tensor, Tensor | None]:
    """Output, weights and weights of the sinks: a sink is one key more, which all may see."""
    permitted = call.visible()
    if call.sinks is None:
        meaning = check_fully_masked(call.fully_masked)
        return *weigh(scores, call.value, mask=permitted, kind=kind, fully_masked=meaning), None
    sinks = call.sinks[:, None, None].expand(*scores.shape[:-1], 1)
    seen = torch.cat([permitted.expand(scores.shape), sinks > -math.inf], -1)
    value = torch.cat([call.value, torch.zeros_like(call.value[..., :1, :])], -2)
    output, weights = weigh(torch.cat([scores, sinks], -1), value, mask=seen)
    return output, weights[..., :-1], weights[..., -1:]


def as_dtype(dtype: torch.dtype | str) -> torch.dtype:
    """Return a supported dtype, given itself or its name; ValueError lists the known ones."""
    name = dtype_name(dtype) if isinstance(dtype, torch.dtype) else dtype
    one_of("dtype", name, DTYPES)
    return getattr(torch, name)  # type: ignore[no-any-return]


def several(choice: object) -> list[Any]:
    """Return a list of choices without repetitions, given one or a list or tuple of them."""
    return list(dict.fromkeys(choice)) if isinstance(choice, (list, tuple)) else [choice]


def check_options(
    options: Mapping[str, Any], scorings: Sequence[str], *, teller: str, besides: str
) -> None:
    """Check what `make_attention` and the `attention` marker can be told."""
    for name, given in options.items():
        one_of(f"keyword of {teller}", name, (*OPTIONS, besides))
        if name in DECLARED and given is not None and given is not False:
            _check_feature(name, given)
        if name in SIZES and not (name == "value_dim" and given is None):
            positive(name, given)
        if name in ("scoring", "dtype") and not several(given):
            raise ValueError(misuse(name, repr(given), "one or more"))
    for scoring in several(options.get("scoring", [])):
        one_of("scoring", scoring, scorings)
    for dtype in several(options.get("dtype", [])):
        as_dtype(dtype)
    for mask in _mask_choices(options.get("mask")):
        if not isinstance(mask, Tensor) and not callable(mask):
            one_of("mask", mask, MASKS)
    one_of("kind", options.get("kind", "soft"), KINDS)
    check_fully_masked(options.get("fully_masked", "zero"))
    seed_number(options.get("seed", 0))


def _check_feature(name: str, given: Any) -> None:
    """Check what can be checked without the sizes of a case."""
    wrong = ""
    match name:
        case "chunk" | "prefix" | "sink_keys":
            whole_number(name, given, least=1 if name == "chunk" else 0)
        case "scale" | "softcap":
            check_number(given, name)
            wrong = "a number above 0" if name == "softcap" and given <= 0 else ""
        case "alignment":
            one_of(name, given, ALIGNMENTS)
        case "causal" if given is not True:
            wrong = "True or False"
        case "may_see" | "score_mod" if not callable(given):
            wrong = "a function of positions"
        case "window" if not isinstance(given, (tuple, list)) or len(given) != 2:
            wrong = "a pair (left, right), of which None is no limit"
        case "window":
            for side in given:
                whole_number(name, 0 if side is None else side, least=0)
        case "documents" if as_whole(given) is not None:
            positive(name, given)
        case _ if name in (*_DRAWN, "documents") and not _are_numbers(given):
            wrong = "" if given is True and name != "documents" else "a tensor or list of numbers"
    if wrong:
        raise ValueError(misuse(name, repr(given), f"{wrong}, or None"))


def _are_numbers(given: Any) -> bool:
    if isinstance(given, (tuple, list)):
        return len(given) > 0 and all(map(_are_numbers, given))
    return isinstance(given, (int, float, Tensor)) and not isinstance(given, bool)


def _built(features: Mapping[str, Any], call: Call, kind: Kind, seed: int) -> dict[str, Any]:
    """The features of a call as its fields, in its dtype and on its device."""
    given = {n: v for n, v in features.items() if v is not None and v is not False}
    for name, others in _ABOUT.items():
        if given.get(name) and not set(others) & set(given):
            raise ValueError(misuse(name, repr(given[name]), f"it with {' or '.join(others)}"))
    if "sinks" in given and kind != "soft":
        raise ValueError(misuse("sinks", f"kind {kind!r}", "kind 'soft', whose sum they join"))
    batch, heads, query_len, _ = call.query.shape
    shape = (batch, heads, query_len, call.key_len)
    sizes = ((heads,), (heads,), (batch,), (batch,), shape)
    shapes: dict[str, tuple[int, ...]] = dict(zip(_DRAWN, sizes, strict=True))
    standard: dict[str, Callable[[], Any]] = {
        "alibi": lambda: 2.0 ** (-8.0 / heads * torch.arange(1.0, heads + 1)),
        "sinks": lambda: draw("sinks", seed, heads),
        "lengths": lambda: _padded(batch, call.key_len),
        "query_lengths": lambda: _padded(batch, query_len),
        "bias": lambda: draw("bias", seed, 1, *shape[1:]),
    }
    for name in given.keys() & standard.keys():
        value = standard[name]() if given[name] is True else given[name]
        given[name] = _fitting(name, value, shapes[name], call)
    for name, length in (("lengths", call.key_len), ("query_lengths", query_len)):
        if name in given:
            padding_mask(given[name], length)  # refuses what they cannot be
    if "documents" in given:
        given["documents"] = _documents(given["documents"], call, given.get("alignment"))
    return given


def _fitting(name: str, given: Any, shape: tuple[int, ...], call: Call) -> Tensor:
    """A tensor of numbers that broadcasts to a shape, with as many dimensions."""
    tensor = torch.as_tensor(given).detach()
    tensor = tensor.to(call.query if tensor.is_floating_point() else call.query.device)
    if not broadcasts(tensor.shape, shape):
        raise ValueError(misuse(name, f"shape {tuple(tensor.shape)}", f"one that fits {shape}"))
    if name != "bias":
        return tensor.expand(shape)
    return tensor.to(call.query.dtype)[(None,) * (len(shape) - tensor.ndim)]


def _documents(given: Any, call: Call, alignment: str | None) -> tuple[Tensor, Tensor]:
    """The documents of queries and keys; those of a number of documents are about equally long."""
    batch, key_len, count = call.query.shape[0], call.key_len, as_whole(given)
    if count is not None:
        # Their borders differ from one batch entry to the next.
        at, shift = torch.arange(key_len), torch.arange(batch)[:, None]
        its = ((at * count + shift) // key_len).clamp(max=count - 1)
        first = key_len - call.query_len if alignment == "bottom_right" else 0
        given = (its[:, (torch.arange(call.query_len) + first).clamp(0, key_len - 1)], its)
    elif not isinstance(given, (tuple, list)) or as_whole(given[0]) is not None:
        given = (given, given)
    own, its = given
    return (
        _fitting("documents", own, (batch, call.query_len), call),
        _fitting("documents", its, (batch, key_len), call),
    )


def _padded(batch: int, key_len: int) -> list[int]:
    return [max(1, key_len - 1 - entry) for entry in range(batch)]


def _mask_choices(mask: object) -> Sequence[Any]:
    if mask is None:
        return ()
    return mask if isinstance(mask, (list, tuple)) else (mask,)


def _as_device(device: Any) -> torch.device:
    try:
        target: torch.device | None = torch.device(device)
    except (RuntimeError, TypeError):  # torch does not know it
        target = None
    if target is None or target.type == "meta":
        accepted = f"a torch.device that holds numbers, or its name: {ACCEPTED}"
        raise ValueError(misuse("device", repr(device), accepted))
    return target


def _build_mask(
    mask: object, batch: int, query_len: int, key_len: int, device: torch.device
) -> Tensor | None:
    combined = None
    for choice in _mask_choices(mask):
        one = _one_mask(choice, batch, query_len, key_len).to(device)
        combined = one if combined is None else combined & one
    return combined


def _one_mask(choice: Any, batch: int, query_len: int, key_len: int) -> Tensor:
    match choice:
        case "causal_top_left":
            return causal_mask(query_len, key_len, alignment="top_left", device="cpu")
        case "causal_bottom_right":
            return causal_mask(query_len, key_len, alignment="bottom_right", device="cpu")
        case "padding":
            return padding_mask(_padded(batch, key_len), key_len, device="cpu")
        case "sliding_window":
            return sliding_window_mask(
                query_len, key_len, window=(2, 2), alignment="top_left", device="cpu"
            )
    return boolean_mask(choice if isinstance(choice, Tensor) else choice(query_len, key_len))
