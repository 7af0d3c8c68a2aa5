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
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pytest_attnheat.attention.cases import as_dtype
from pytest_attnheat.attention.reference import causal_mask, padding_mask, sliding_window_mask
from pytest_attnheat.attention.scoring import draw
from pytest_attnheat.attention.vocabulary import Side
from pytest_attnheat.inputs import dtype_name, one_of, positive, seed_number

# Where a case does not say otherwise. Twelve is neither a power of two nor a block size.
_LENGTH, _WIDTH = 12, 16


@dataclass(frozen=True, eq=False, repr=False)
class HardCase:
    """Inputs of attention that are hard in one way.

    Attributes:
        name: Its name, one of `HARD_CASES`.
        why: What breaks on it, in a sentence.
        query: (batch, heads, query_len, head_dim)
        key: (batch, heads, key_len, head_dim)
        value: (batch, heads, key_len, value_dim)
        attn_mask: Boolean, True where a query may attend, broadcastable to the scores; or None.
        is_causal: Whether a query may only attend up to its own position, from the top left.
    """

    name: str
    why: str
    query: Tensor
    key: Tensor
    value: Tensor
    attn_mask: Tensor | None = None
    is_causal: bool = False

    @property
    def arguments(self) -> dict[str, Any]:
        """The keyword arguments that the case sets: attn_mask, is_causal, or none."""
        mask = {} if self.attn_mask is None else {"attn_mask": self.attn_mask}
        return {**mask, "is_causal": True} if self.is_causal else mask

    def __repr__(self) -> str:
        """Name the case, its dtype and its shapes."""
        shapes = ", ".join(str(tuple(t.shape)) for t in (self.query, self.key, self.value))
        return f"<HardCase {self.name} {dtype_name(self.query)} {shapes}: {self.why}>"


@dataclass
class _Draft:
    """A case in the making, in float64 on the CPU."""

    dtype: torch.dtype
    query: Tensor
    key: Tensor
    value: Tensor
    attn_mask: Tensor | None = None
    is_causal: bool = False

    @property
    def batch(self) -> int:
        return self.query.shape[0]

    @property
    def lengths(self) -> tuple[int, int]:
        return self.query.shape[-2], self.key.shape[-2]


_Change = Callable[[_Draft], None]


@dataclass(frozen=True)
class _Recipe:
    """How a case is made: Gaussian inputs of these sizes, then a change."""

    why: str
    query_len: int = _LENGTH
    key_len: int = _LENGTH
    head_dim: int = _WIDTH
    value_dim: int = _WIDTH
    change: _Change = lambda draft: None


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
        name: One of `HARD_CASES`.
        dtype: float16, bfloat16, float32 or float64; a `torch.dtype` or its name.
        device: Where the case is.
        seed: Seed of the numbers.
        batch: Number of batch entries.
        heads: Number of heads.

    Raises:
        TypeError: A size or the seed is not a whole number.
        ValueError: The name or the dtype is unknown, or a number too small.
    """
    one_of("name", name, HARD_CASES)
    number, leading = as_dtype(dtype), (positive("batch", batch), positive("heads", heads))
    recipe, target, seed = _RECIPES[name], torch.device(device), seed_number(seed)
    draft = _Draft(
        number,
        draw(f"{name} query", seed, *leading, recipe.query_len, recipe.head_dim),
        draw(f"{name} key", seed, *leading, recipe.key_len, recipe.head_dim),
        draw(f"{name} value", seed, *leading, recipe.key_len, recipe.value_dim),
    )
    recipe.change(draft)
    return HardCase(
        name=name,
        why=recipe.why,
        query=draft.query.to(target, number),
        key=draft.key.to(target, number),
        value=draft.value.to(target, number),
        attn_mask=None if draft.attn_mask is None else draft.attn_mask.to(target),
        is_causal=draft.is_causal,
    )


def _large(draft: _Draft) -> None:
    """Three times the logarithm at which exp overflows: 33 in float16, 266 in float32."""
    scores = draft.query @ draft.key.mT / math.sqrt(draft.query.shape[-1])
    wanted = 3 * math.log(torch.finfo(draft.dtype).max)
    factor = math.sqrt(wanted / float(scores.abs().max()))
    # Of either sign, so that some row has such a score as its largest.
    draft.query, draft.key = draft.query * factor, draft.key * factor


def _tiny(draft: _Draft) -> None:
    draft.query, draft.key, draft.value = (
        tensor * 2.0**-10 for tensor in (draft.query, draft.key, draft.value)
    )


def _dominant_key(draft: _Draft) -> None:
    draft.query[..., 0], draft.key[..., 3, 0] = 4.0, 12.0  # adds 12 to the score of key 3


def _huge_negative(draft: _Draft) -> None:
    draft.query[..., 0], draft.key[..., 3, 0] = 8.0, -1000.0  # key 3 scores about -2000
    # So do all keys of query 5: elsewhere it changes nothing if low scores count as masked.
    draft.query[..., 1], draft.key[..., 1] = 0.0, 10.0
    draft.query[..., 5, 0], draft.query[..., 5, 1] = 0.0, -800.0


def _identical_keys(draft: _Draft) -> None:
    draft.key = draft.key[..., :1, :].repeat(1, 1, draft.key.shape[-2], 1)


def _identical_values(draft: _Draft) -> None:
    draft.value = draft.value[..., :1, :].repeat(1, 1, draft.value.shape[-2], 1)


def _repeated_keys(draft: _Draft) -> None:
    draft.key = draft.key[..., torch.arange(draft.key.shape[-2]) % 3, :].contiguous()


def _value_outlier(draft: _Draft) -> None:
    draft.value[0, 0, 5, :] *= 500.0


def _huge_head(draft: _Draft) -> None:
    draft.value[:, 0] *= 1000.0


def _many_keys(draft: _Draft) -> None:
    # Positive values: their weighted sum only grows, until it swallows what is added.
    draft.query, draft.value = draft.query / 4, draft.value.abs() + 1


def _causal(draft: _Draft) -> None:
    draft.is_causal = True


def _causal_mask(draft: _Draft) -> None:
    draft.attn_mask = causal_mask(*draft.lengths, alignment="bottom_right", device="cpu")


def _fully_masked(draft: _Draft) -> None:
    query_len, key_len = draft.lengths
    mask = causal_mask(query_len, key_len, alignment="top_left", device="cpu")
    mask[[0, query_len // 2, query_len - 1]] = False
    draft.attn_mask = mask


def _padding(side: Side) -> _Change:
    def pad(draft: _Draft) -> None:
        key_len = draft.lengths[1]
        real = [max(1, key_len - 4 - entry) for entry in range(draft.batch)]
        draft.attn_mask = padding_mask(real, key_len, side=side, device="cpu")

    return pad


def _one_permitted(draft: _Draft) -> None:
    query_len, key_len = draft.lengths
    mask = torch.zeros(query_len, key_len, dtype=torch.bool)
    mask[torch.arange(query_len), (5 * torch.arange(query_len) + 1) % key_len] = True
    draft.attn_mask = mask


def _window(draft: _Draft) -> None:
    draft.attn_mask = sliding_window_mask(
        *draft.lengths, window=(2, 1), alignment="top_left", device="cpu"
    )


def _mask_per_head(draft: _Draft) -> None:
    batch, heads = draft.query.shape[:2]
    query_len, key_len = draft.lengths
    # Head h hides every (h + 2)th key, counted from the batch entry on: never all of them.
    at = torch.arange(key_len) + torch.arange(batch)[:, None, None, None]
    step = torch.arange(heads)[None, :, None, None] + 2
    draft.attn_mask = (at % step != 0).expand(batch, heads, query_len, key_len).contiguous()


def _heads_last(draft: _Draft) -> None:
    draft.query, draft.key, draft.value = (
        tensor.transpose(1, 2).contiguous().transpose(1, 2)
        for tensor in (draft.query, draft.key, draft.value)
    )


def _at_length(length: int) -> _Recipe:
    why = f"Blocks of {2 ** round(math.log2(length))}: the last one is part of a block, or full"
    return _Recipe(f"{why}, and its tail is read, written or masked wrongly.", length, length)


_RECIPES: dict[str, _Recipe] = {
    "gaussian": _Recipe("Nothing special: what breaks here breaks everywhere."),
    "large_magnitudes": _Recipe(
        "exp overflows where the row maximum is not subtracted first.", change=_large
    ),
    "tiny_magnitudes": _Recipe(
        "Gradients below the normal range of float16: where those are flushed to zero, it shows.",
        change=_tiny,
    ),
    "one_dominant_key": _Recipe(
        "The softmax is all but one-hot: gradients cancel, and a second softmax shows.",
        change=_dominant_key,
    ),
    "identical_keys": _Recipe(
        "All weights are equal: a wrong divisor or a lost key shows in every row.",
        change=_identical_keys,
    ),
    "identical_values": _Recipe(
        "The output is that value, whatever the scores: rows that do not sum to 1 show, in "
        "bfloat16 if they are off by 3 % or more.",
        change=_identical_values,
    ),
    "repeated_keys": _Recipe(
        "Equal scores, and equal row maxima: code that takes only one of them is wrong.",
        change=_repeated_keys,
    ),
    "one_huge_negative": _Recipe(
        "A score of about -2000 is still a score: it must not overflow, nor count as masked "
        "where a query has no other (which shows in float32 and float64).",
        change=_huge_negative,
    ),
    "values_with_outlier": _Recipe(
        "One key with huge values: an error elsewhere hides behind it in a comparison by maximum.",
        change=_value_outlier,
    ),
    "huge_head": _Recipe(
        "One head with huge values: a comparison by maximum no longer sees the others.",
        change=_huge_head,
    ),
    "odd_head_dim_7": _Recipe(
        "A width that no vector register divides: its tail is skipped or read beyond.", head_dim=7
    ),
    "odd_head_dim_33": _Recipe(
        "One more than a block of the width: the last channel is dropped, or the width that "
        "the scale is taken from is the padded one.",
        head_dim=33,
    ),
    "head_dim_one": _Recipe("A width of 1: squeezed away, or broadcast.", head_dim=1, value_dim=1),
    "value_dim_differs": _Recipe(
        "The width of the values is taken for that of the keys, or the other way round.",
        value_dim=24,
    ),
    "one_query": _Recipe("A decoding step: the query axis is squeezed away.", query_len=1),
    "one_key": _Recipe("A softmax over one key is 1, and has no gradient.", key_len=1),
    "more_queries_than_keys": _Recipe(
        "Lengths mixed up, for example a mask made of (keys, queries).", key_len=5
    ),
    "more_keys_than_queries": _Recipe(
        "Lengths mixed up, as in cross-attention or with a cache.", query_len=5
    ),
    **{
        f"length_{length}": _at_length(length) for length in (31, 32, 33, 63, 64, 65, 127, 128, 129)
    },
    "many_keys": _Recipe(
        "A sum of a thousand numbers of one sign, kept in low precision, stops growing.",
        query_len=3,
        key_len=1000,
        change=_many_keys,
    ),
    "causal": _Recipe("A query sees its future, or not itself.", change=_causal),
    "causal_fewer_queries": _Recipe(
        "is_causal=True is aligned top left: to the other corner, queries see too much "
        "(pytorch/pytorch#103082, ml-explore/mlx#2835).",
        query_len=5,
        change=_causal,
    ),
    "causal_more_queries": _Recipe(
        "Aligned to the other corner, the first queries would have no key at all "
        "(pytorch/pytorch#103082, ml-explore/mlx#2835).",
        key_len=5,
        change=_causal,
    ),
    "causal_bottom_right": _Recipe(
        "A mask for decoding with a cache, which code that knows only is_causal cannot express.",
        query_len=5,
        change=_causal_mask,
    ),
    "fully_masked_rows": _Recipe(
        "The softmax of -inf alone is NaN, in the output or only in the gradient "
        "(pytorch/pytorch#103963), or uniform (NVIDIA/apex#1390).",
        change=_fully_masked,
    ),
    "padding_left": _Recipe(
        "Padded keys get weight, or positions are counted from the wrong side "
        "(TransformerLensOrg/TransformerLens#1005).",
        change=_padding("left"),
    ),
    "padding_right": _Recipe(
        "Padded keys get weight (TransformerLensOrg/TransformerLens#1005).",
        change=_padding("right"),
    ),
    "one_permitted_key": _Recipe(
        "The output is one value exactly: any weight on a masked key shows.", change=_one_permitted
    ),
    "sliding_window": _Recipe(
        "A window that is off by one, on either side (huggingface/transformers#39408).",
        change=_window,
    ),
    "mask_per_head": _Recipe(
        "Every head has its own mask: that of the first one is used for all.", change=_mask_per_head
    ),
    "heads_last_in_memory": _Recipe(
        "Not contiguous, as after a projection: strides are ignored (pytorch/pytorch#181133).",
        change=_heads_last,
    ),
}

HARD_CASES: tuple[str, ...] = tuple(_RECIPES)
