"""Inputs on which attention breaks: structured, extreme, odd and masked ones.

Gaussian inputs of round sizes let many defects pass. Each case here is small, has a name that is
good as a pytest id, and a sentence that says what breaks on it::

    @pytest.mark.parametrize("name", HARD_CASES)
    def test_hard_cases(name):
        case = hard_case(name, dtype="float16")
        assert_matches_reference(
            my_attention, case.query, case.key, case.value, **case.arguments
        )
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ..inputs import dtype_name, one_of, positive, seed_number
from .call import Call
from .cases import as_dtype
from .reference import causal_mask, padding_mask, sliding_window_mask
from .scoring import draw
from .vocabulary import Alignment, Side

# Where a case does not say otherwise. Twelve is neither a power of two nor a block size.
_LENGTH, _WIDTH = 12, 16


@dataclass(frozen=True, eq=False, repr=False, kw_only=True)
class HardCase(Call):
    """A call of attention that is hard in one way.

    Attributes:
        name: Its name, one of `HARD_CASES` or `FEATURE_CASES`.
        why: What breaks on it, in a sentence.
        query: (batch, heads, query_len, head_dim)
        key: (batch, heads, key_len, head_dim)
        value: (batch, heads, key_len, value_dim)
    """

    name: str
    why: str

    @property
    def attn_mask(self) -> Tensor | None:
        """The mask, boolean (True where a query may attend) or added to the scores; or None."""
        return self.bias if self.mask is None else self.mask

    @property
    def is_causal(self) -> bool:
        """Whether a query may only attend up to its own position, from the top left."""
        return self.causal

    def __repr__(self) -> str:
        """Name the case, its dtype and its shapes."""
        shapes = ", ".join(str(tuple(t.shape)) for t in (self.query, self.key, self.value))
        return f"<HardCase {self.name} {dtype_name(self.query)} {shapes}: {self.why}>"


# From a case in the making, in float64 on the CPU, and its dtype to be, to the fields that change.
_Change = Callable[[Call, torch.dtype], Mapping[str, Any] | None]


@dataclass(frozen=True)
class _Recipe:
    """How a case is made: Gaussian inputs of these sizes, then a change."""

    why: str
    change: _Change = lambda case, dtype: None
    query_len: int = _LENGTH
    key_len: int = _LENGTH
    head_dim: int = _WIDTH
    value_dim: int = _WIDTH
    group: int = 1


def hard_case(
    name: str,
    *,
    dtype: torch.dtype | str = "float32",
    device: torch.device | str = "cpu",
    seed: int = 0,
    batch: int = 1,
    heads: int = 2,
) -> HardCase:
    """Make a hard case from a seed.

    The numbers are drawn on the CPU in float64, then cast and moved: the same on every device.
    They and all scores stay within the range of the dtype.

    Args:
        name: One of `HARD_CASES`, or of `FEATURE_CASES`, which not every attention takes.
        dtype: float16, bfloat16, float32 or float64; a `torch.dtype` or its name.
        device: Where the case is.
        seed: Seed of the numbers.
        batch: Number of batch entries.
        heads: Number of heads; of keys and values, where several queries share them.

    Raises:
        TypeError: A size or the seed is not a whole number.
        ValueError: The name or the dtype is unknown, or a number too small.
    """
    one_of("name", name, tuple(_RECIPES))
    number, (batch, heads) = as_dtype(dtype), (positive("batch", batch), positive("heads", heads))
    recipe, target, seed = _RECIPES[name], torch.device(device), seed_number(seed)
    key_len = recipe.key_len
    case = HardCase(
        draw(f"{name} query", seed, batch, heads * recipe.group, recipe.query_len, recipe.head_dim),
        draw(f"{name} key", seed, batch, heads, key_len, recipe.head_dim),
        draw(f"{name} value", seed, batch, heads, key_len, recipe.value_dim),
        name=name,
        why=recipe.why,
    )
    case = replace(case, **(recipe.change(case, number) or {}))
    moved: dict[str, Any] = {
        field: given.to(target, number if given.is_floating_point() else None)
        for field, given in vars(case).items()
        if isinstance(given, Tensor)
    }
    return replace(case, **moved)


def _large(case: Call, dtype: torch.dtype) -> Mapping[str, Any]:
    """Three times the logarithm at which exp overflows: 33 in float16, 266 in float32."""
    scores = case.query @ case.key.mT / math.sqrt(case.query.shape[-1])
    wanted = 3 * math.log(torch.finfo(dtype).max)
    factor = math.sqrt(wanted / float(scores.abs().max()))
    # Of either sign, so that some row has such a score as its largest.
    return {"query": case.query * factor, "key": case.key * factor}


def _products_overflow(case: Call, dtype: torch.dtype) -> None:
    case.query[..., 0], case.key[..., 0] = 272.0, 272.0  # adds 73984 to all products


def _dominant_key(case: Call, dtype: torch.dtype) -> None:
    case.query[..., 0], case.key[..., 3, 0] = 4.0, 12.0  # adds 12 to the score of key 3


def _huge_negative(case: Call, dtype: torch.dtype) -> None:
    case.query[..., 0], case.key[..., 3, 0] = 8.0, -1000.0  # key 3 scores about -2000
    # So do all keys of query 5: elsewhere it changes nothing if low scores count as masked.
    case.query[..., 1], case.key[..., 1] = 0.0, 10.0
    case.query[..., 5, 0], case.query[..., 5, 1] = 0.0, -800.0


def _each(change: Callable[[Tensor], Tensor], *names: str) -> _Change:
    """Change query, key and value, or those that are named."""
    named = names or ("query", "key", "value")
    return lambda case, dtype: {name: change(getattr(case, name)) for name in named}


def _alike(rows: Tensor) -> Tensor:
    return rows[..., :1, :].repeat(1, 1, rows.shape[-2], 1)


def _value_outlier(case: Call, dtype: torch.dtype) -> None:
    case.value[0, 0, 5, :] *= 500.0


def _huge_head(case: Call, dtype: torch.dtype) -> None:
    case.value[:, 0] *= 1000.0


def _masked(make: Callable[[Call], Tensor]) -> _Change:
    return lambda case, dtype: {"mask": make(case)}


def _causal(case: Call, alignment: Alignment) -> Tensor:
    return causal_mask(case.query_len, case.key_len, alignment=alignment, device="cpu")


def _fully_masked(case: Call) -> Tensor:
    mask = _causal(case, "top_left")
    mask[[0, case.query_len // 2, case.query_len - 1]] = False
    return mask


def _padding(case: Call, side: Side) -> Tensor:
    real = [max(1, case.key_len - 4 - entry) for entry in range(case.query.shape[0])]
    return padding_mask(real, case.key_len, side=side, device="cpu")


def _one_permitted(case: Call) -> Tensor:
    mask = torch.zeros(case.query_len, case.key_len, dtype=torch.bool)
    at = torch.arange(case.query_len)
    mask[at, (5 * at + 1) % case.key_len] = True
    return mask


def _window(case: Call) -> Tensor:
    lengths = case.query_len, case.key_len
    return sliding_window_mask(*lengths, window=(2, 1), alignment="top_left", device="cpu")


def _mask_per_head(case: Call) -> Tensor:
    batch, heads = case.query.shape[:2]
    # Head h hides every (h + 2)th key, counted from the batch entry on: never all of them.
    at = torch.arange(case.key_len) + torch.arange(batch)[:, None, None, None]
    step = torch.arange(heads)[None, :, None, None] + 2
    mask = at % step != 0
    return mask.expand(batch, heads, case.query_len, case.key_len).contiguous()


def _added(number: float | None) -> _Change:
    def add(case: Call, dtype: torch.dtype) -> Mapping[str, Any]:
        hidden = torch.finfo(dtype).min if number is None else number
        mask = padding_mask([case.key_len - 4] * len(case.query), case.key_len, device="cpu")
        return {"bias": torch.zeros(mask.shape, dtype=torch.float64).masked_fill(~mask, hidden)}

    return add


def _alibi(case: Call, dtype: torch.dtype) -> Mapping[str, Any]:
    slopes = 2.0 ** (-8.0 / case.heads * torch.arange(1, case.heads + 1, dtype=torch.float64))
    return {"alibi": slopes, "causal": True, "alignment": "bottom_right"}


def _at_length(length: int) -> _Recipe:
    why = f"Blocks of {2 ** round(math.log2(length))}: the last one is part of a block, or full"
    return _Recipe(
        f"{why}, and its tail is read, written or masked wrongly.", query_len=length, key_len=length
    )


_RECIPES: dict[str, _Recipe] = {
    "gaussian": _Recipe("Nothing special: what breaks here breaks everywhere."),
    "large_magnitudes": _Recipe("exp overflows where the row maximum is not subtracted first.",
        _large),
    "tiny_magnitudes": _Recipe(
        "Gradients below the normal range of float16: where those are flushed to zero, it shows.",
        _each(lambda given: given * 2.0**-10)),
    "one_dominant_key": _Recipe(
        "The softmax is all but one-hot: gradients cancel, and a second softmax shows.",
        _dominant_key),
    "identical_keys": _Recipe(
        "All weights are equal: a wrong divisor or a lost key shows in every row.",
        _each(_alike, "key")),
    "identical_values": _Recipe("The output is that value, whatever the scores: rows that do not "
        "sum to 1 show, in bfloat16 if they are off by 3 % or more.", _each(_alike, "value")),
    "repeated_keys": _Recipe(
        "Equal scores, and equal row maxima: code that takes only one of them is wrong.",
        _each(lambda key: key[..., torch.arange(key.shape[-2]) % 3, :].contiguous(), "key")),
    "one_huge_negative": _Recipe("A score of about -2000 is still a score: it must not overflow, "
        "nor count as masked where a query has no other (which shows in float32 and float64).",
        _huge_negative),
    "values_with_outlier": _Recipe(
        "One key with huge values: an error elsewhere hides behind it in a comparison by maximum.",
        _value_outlier),
    "huge_head": _Recipe(
        "One head with huge values: a comparison by maximum no longer sees the others.",
        _huge_head),
    "odd_head_dim_7": _Recipe(
        "A width that no vector register divides: its tail is skipped or read beyond.", head_dim=7),
    "odd_head_dim_33": _Recipe("One more than a block of the width: the last channel is dropped, "
        "or the width that the scale is taken from is the padded one.", head_dim=33),
    "head_dim_one": _Recipe("A width of 1: squeezed away, or broadcast.", head_dim=1, value_dim=1),
    "value_dim_differs": _Recipe(
        "The width of the values is taken for that of the keys, or the other way round.",
        value_dim=24),
    "one_query": _Recipe("A decoding step: the query axis is squeezed away.", query_len=1),
    "one_key": _Recipe("A softmax over one key is 1, and has no gradient.", key_len=1),
    "more_queries_than_keys": _Recipe(
        "Lengths mixed up, for example a mask made of (keys, queries).", key_len=5),
    "more_keys_than_queries": _Recipe("Lengths mixed up, as in cross-attention or with a cache.",
        query_len=5),
    **{f"length_{length}": _at_length(length)
       for length in (31, 32, 33, 63, 64, 65, 127, 128, 129)},
    "many_keys": _Recipe(
        "A sum of a thousand numbers of one sign, kept in low precision, stops growing.",
        lambda case, _: {"query": case.query / 4, "value": case.value.abs() + 1}, query_len=3,
        key_len=1000),
    "causal": _Recipe("A query sees its future, or not itself.", lambda *_: {"causal": True}),
    "causal_fewer_queries": _Recipe("is_causal=True is aligned top left: to the other corner, "
        "queries see too much (pytorch/pytorch#103082, ml-explore/mlx#2835).",
        lambda *_: {"causal": True}, query_len=5),
    "causal_more_queries": _Recipe("Aligned to the other corner, the first queries would have no "
        "key at all (pytorch/pytorch#103082, ml-explore/mlx#2835).", lambda *_: {"causal": True},
        key_len=5),
    "causal_bottom_right": _Recipe(
        "A mask for decoding with a cache, which code that knows only is_causal cannot express.",
        _masked(lambda case: _causal(case, "bottom_right")), query_len=5),
    "fully_masked_rows": _Recipe("The softmax of -inf alone is NaN, in the output or only in the "
        "gradient (pytorch/pytorch#103963), or uniform (NVIDIA/apex#1390).",
        _masked(_fully_masked)),
    "padding_left": _Recipe("Padded keys get weight, or positions are counted from the wrong side "
        "(TransformerLensOrg/TransformerLens#1005).", _masked(lambda case: _padding(case, "left"))),
    "padding_right": _Recipe("Padded keys get weight (TransformerLensOrg/TransformerLens#1005).",
        _masked(lambda case: _padding(case, "right"))),
    "one_permitted_key": _Recipe(
        "The output is one value exactly: any weight on a masked key shows.",
        _masked(_one_permitted)),
    "sliding_window": _Recipe(
        "A window that is off by one, on either side (huggingface/transformers#39408).",
        _masked(_window)),
    "mask_per_head": _Recipe("Every head has its own mask: that of the first one is used for all.",
        _masked(_mask_per_head)),
    "heads_last_in_memory": _Recipe(
        "Not contiguous, as after a projection: strides are ignored (pytorch/pytorch#181133).",
        _each(lambda given: given.transpose(1, 2).contiguous().transpose(1, 2))),
}  # fmt: skip
_FEATURES: dict[str, _Recipe] = {
    "products_overflow": _Recipe("Products of queries and keys are beyond float16 before they are "
        "scaled: inf, then NaN, where the scale comes after and sums are not in float32.",
        _products_overflow),
    "grouped_decode": _Recipe("One query of four heads to each key head, one key more than whole "
        "blocks: key heads are shared in the wrong order, or the last key is lost.", query_len=1,
        key_len=1025, group=4),
    **{f"mask_added_{name}": _Recipe(
        f"A mask that adds {name} to a score must hide its key, and overflow nowhere.",
        _added(number))
        for name, number in (("finfo_min", None), ("minus_1e9", -1e9), ("minus_1e4", -1e4))},
    "softcap_saturated": _Recipe("Most scores are at the cap: where the cap is left out the "
        "softmax is one-hot, and where the gradient goes around it, it is far too large.",
        lambda case, _: {"query": case.query * 8, "softcap": 5.0}),
    "sinks_above_all": _Recipe("The sink takes nearly all of every row: where it is left out, or "
        "gets no part in the maximum, the output is ten thousand times as large.",
        lambda case, _: {"sinks": torch.linspace(10, 12, case.heads, dtype=torch.float64)}),
    "alibi_far": _Recipe("Distances of hundreds of keys, which bfloat16 cannot tell apart: "
        "neighbours get the same bias where it is made in the dtype of the scores.", _alibi,
        query_len=5, key_len=600),
}  # fmt: skip

# What any attention takes; and what not every one does: grouped heads, an additive mask, products
# beyond float16, and features that are declared by a keyword.
HARD_CASES: tuple[str, ...] = tuple(_RECIPES)
FEATURE_CASES: tuple[str, ...] = tuple(_FEATURES)
_RECIPES |= _FEATURES
