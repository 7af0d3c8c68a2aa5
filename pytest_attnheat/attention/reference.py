"""Attention in plain sight: masks, the masked softmax, and `attend`.

A boolean mask is True where a query may attend to a key. Masks combine with `&`.
"""

import math
from collections.abc import Sequence
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from ..inputs import as_whole, dtype_name, misuse, one_of, positive
from .chunks import query_chunks
from .scoring import Scoring, broadcast, leading_shape, make_scoring, mismatch
from .vocabulary import ALIGNMENTS, SIDES, Alignment, FullyMasked, Side, check_fully_masked

Kind = Literal["soft", "hard", "max_pooling", "gating"]

KINDS = ("soft", "hard", "max_pooling", "gating")


def causal_mask(
    query_len: int,
    key_len: int | None = None,
    *,
    alignment: Alignment,
    device: torch.device | str | None = None,
) -> Tensor:
    """Let each query attend to its own position and to what comes before.

    Args:
        query_len: Number of queries.
        key_len: Number of keys; `query_len` by default.
        alignment: Where query 0 stands when the lengths differ. `"top_left"`: at key 0, which
            is what `is_causal=True` means in PyTorch. `"bottom_right"`: so that the last query
            stands at the last key, which is what decoding with a cache of keys needs; if there
            are more queries than keys, the first ones may attend to nothing.
        device: Where the mask is made; torch's default device by default.

    Returns:
        A boolean mask (query_len, key_len), True where a query may attend.

    Raises:
        TypeError: A length is not a whole number.
        ValueError: A length is below 1, or the alignment is unknown.
    """
    query_at, key_at = _positions(query_len, key_len, alignment, device)
    return key_at <= query_at


def sliding_window_mask(
    query_len: int,
    key_len: int | None = None,
    *,
    window: tuple[int, int],
    alignment: Alignment,
    device: torch.device | str | None = None,
) -> Tensor:
    """Let each query attend to its own position and to a few keys on each side.

    Args:
        query_len: Number of queries.
        key_len: Number of keys; `query_len` by default.
        window: `(left, right)`: how many keys before and after its own position a query may
            attend to. `(3, 0)` is a causal window of four keys.
        alignment: `"top_left"` or `"bottom_right"`, as in `causal_mask`.
        device: Where the mask is made; torch's default device by default.

    Returns:
        A boolean mask (query_len, key_len), True where a query may attend.

    Raises:
        TypeError: A length is not a whole number, or `window` is not a pair of them.
        ValueError: A length is below 1, a side of the window below 0, or the alignment unknown.
    """
    wrong = misuse("window", repr(window), "a pair (left, right) of whole numbers from 0")
    if not (isinstance(window, (tuple, list)) and [type(side) for side in window] == [int, int]):
        raise TypeError(wrong)
    left, right = window
    if left < 0 or right < 0:
        raise ValueError(wrong)
    query_at, key_at = _positions(query_len, key_len, alignment, device)
    return (key_at >= query_at - left) & (key_at <= query_at + right)


def _positions(
    query_len: int, key_len: int | None, alignment: str, device: torch.device | str | None
) -> tuple[Tensor, Tensor]:
    """The positions of queries (query_len, 1) and keys (key_len,), both counted in keys."""
    query_len = positive("query_len", query_len)
    key_len = query_len if key_len is None else positive("key_len", key_len)
    one_of("alignment", alignment, ALIGNMENTS)
    first = key_len - query_len if alignment == "bottom_right" else 0
    query_at = torch.arange(first, first + query_len, device=device)
    return query_at.unsqueeze(-1), torch.arange(key_len, device=device)


def padding_mask(
    lengths: Sequence[int] | Tensor,
    key_len: int,
    *,
    side: Side = "right",
    device: torch.device | str | None = None,
) -> Tensor:
    """Hide the padding of a batch of sequences of different lengths.

    Args:
        lengths: How many keys of each batch entry are real, (batch,); 0 to `key_len`.
        key_len: Number of keys, padding included.
        side: The side the padding is on.
        device: Where the mask is made; by default that of `lengths` if they are a tensor, else
            torch's default device.

    Returns:
        A boolean mask (batch, 1, 1, key_len), True where a key is real.

    Raises:
        TypeError: The lengths are not whole numbers.
        ValueError: There are no lengths, or not one per batch entry, or one is out of range;
            or the side is unknown.
    """
    key_len = positive("key_len", key_len)
    one_of("side", side, SIDES)
    if device is None and isinstance(lengths, Tensor):
        device = lengths.device
    real = torch.tensor(read_lengths(lengths, key_len), device="cpu")
    key_at = torch.arange(key_len, device=device)
    real = real.to(key_at.device).unsqueeze(-1)
    mask = key_at < real if side == "right" else key_at >= key_len - real
    return mask[:, None, None, :]


def read_lengths(lengths: object, key_len: int, *, batch: int | None = None) -> list[int]:
    """Return how many keys of each batch entry are real, as plain numbers."""
    accepted = f"one whole number from 0 to {key_len} for each batch entry"
    try:
        # NumPy knows all byte orders, strides and lists.
        array = np.asarray(lengths.detach().cpu() if isinstance(lengths, Tensor) else lengths)
    except (TypeError, ValueError, RuntimeError):
        raise TypeError(misuse("lengths", repr(lengths), accepted)) from None
    if array.ndim > 1 and array.dtype.kind in "biu":
        accepted += "; of a mask that is True where a token is real, mask.sum(-1)"
    numbers = array.flatten().tolist()
    real = [number for number in map(as_whole, numbers) if number is not None]
    if len(real) < len(numbers):
        got = f"dtype {array.dtype}" if array.dtype.kind in "biufc" else repr(lengths)
        raise TypeError(misuse("lengths", got, accepted))
    if array.ndim != 1 or not real or batch not in (None, len(real)):
        count = "" if batch is None else f" for {batch} batch entries"
        raise ValueError(misuse("lengths", f"shape {array.shape}{count}", accepted))
    if min(real) < 0 or max(real) > key_len:
        raise ValueError(misuse("lengths", real, accepted))
    return real


def masked_softmax(
    scores: Tensor, mask: Tensor | None = None, *, fully_masked: FullyMasked = "zero"
) -> Tensor:
    """Softmax over the permitted keys of each row.

    Masked keys get exactly 0 and no gradient, whatever their score is, NaN and inf included.
    A permitted NaN shows in its row.

    Args:
        scores: (..., query_len, key_len)
        mask: Boolean, broadcastable to the scores, True where a query may attend; all by
            default.
        fully_masked: What a row without any permitted key becomes: `"zero"` all zeros (as in
            PyTorch), `"uniform"` 1 / key_len everywhere, `"nan"` NaN everywhere. None of these
            rows has a gradient.

    Returns:
        Weights of the shape and dtype of the scores.

    Raises:
        TypeError: The scores are not a tensor of floating point numbers, or the mask is not
            boolean.
        ValueError: There are no keys, the mask does not fit, or `fully_masked` is unknown.
    """
    permitted = _permitted(scores, mask)
    check_fully_masked(fully_masked)
    # A row of -inf alone has no softmax: such a row is computed from zeros, so that no NaN is
    # made on the way, and gets its declared meaning afterwards.
    some = permitted.any(-1, keepdim=True)
    filled = scores.masked_fill(~permitted, -math.inf).masked_fill(~some, 0.0)
    weights = torch.softmax(filled, -1).masked_fill(~permitted, 0.0)
    return _fill_fully_masked(weights, permitted, fully_masked)


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    score: str | Scoring = "scaled_dot_product",
    mask: Tensor | None = None,
    kind: Kind = "soft",
    fully_masked: FullyMasked = "zero",
) -> tuple[Tensor, Tensor]:
    """Attention in plain sight: scores, masked softmax, weighted mean.

    A masked key is not felt: neither NaN nor inf in its score or its value reaches the output.

    Args:
        query: (..., query_len, head_dim)
        key: (..., key_len, head_dim), or of another width if the scoring function takes it
        value: (..., key_len, value_dim)
        score: The name of a scoring function (one with parameters is made with seed 0), or a
            function or module `(query, key) -> scores`.
        mask: Boolean, broadcastable to the scores, True where a query may attend; all by
            default.
        kind: How scores become weights:
            `"soft"`: the softmax over the permitted keys.
            `"hard"`: one-hot at the largest permitted score, the first of equal ones.
            `"gating"`: `sigmoid(score)` for each permitted key; rows do not sum to 1.
            `"max_pooling"`: each channel of the output is its largest permitted value. The
            scores play no part. `weights[q, k]` is the share of channels that key k won (the
            first of equal ones), so rows sum to 1, but `weights @ value` is not the output.
            The last two are the approximations of bottom-up saliency in textbooks (Qiu: Neural
            Networks and Deep Learning, chapter 8).
        fully_masked: What the weights of a row without any permitted key are: `"zero"`,
            `"uniform"` or `"nan"`, as in `masked_softmax`. Its output is `weights @ value`.

    Returns:
        Output (..., query_len, value_dim) and weights (..., query_len, key_len), both in the
        dtype of the value.

    Raises:
        TypeError: An input is not a tensor of floating point numbers, the dtypes differ, or the
            mask is not boolean.
        ValueError: Shapes do not fit, or a name is unknown.
    """
    leading_shape(query=query, key=key, value=value)
    if key.shape[-2] != value.shape[-2]:
        raise ValueError(mismatch("one length for both", key=key, value=value))
    if not query.dtype == key.dtype == value.dtype:
        dtypes = " and ".join(map(dtype_name, (query, key, value)))
        raise TypeError(misuse("query, key, value", f"dtypes {dtypes}", "one dtype for all"))
    if isinstance(score, str):
        widths = query.shape[-1], key.shape[-1]
        score = make_scoring(score, *widths, device=query.device, dtype=query.dtype)
    scores = checked_scores(score, query, key)
    return weigh(scores, value, mask=mask, kind=kind, fully_masked=fully_masked)


def checked_scores(score: Scoring, query: Tensor, key: Tensor) -> Tensor:
    """Call a scoring function; ValueError unless it returns (..., query_len, key_len)."""
    leading = leading_shape(query=query, key=key)
    expected = (*leading, query.shape[-2], key.shape[-2])
    scores = score(query, key)
    if not isinstance(scores, Tensor) or scores.shape != expected:
        given = (
            f"shape {tuple(scores.shape)}" if isinstance(scores, Tensor) else type(scores).__name__
        )
        accepted = f"scores {expected} for query {tuple(query.shape)} and key {tuple(key.shape)}"
        raise ValueError(misuse("what the scoring function returns", given, accepted))
    return scores


def weigh(
    scores: Tensor,
    value: Tensor,
    *,
    mask: Tensor | None = None,
    kind: Kind = "soft",
    fully_masked: FullyMasked = "zero",
) -> tuple[Tensor, Tensor]:
    """The second half of `attend`: from scores and values to output and weights."""
    permitted = _permitted(scores, mask)
    one_of("kind", kind, KINDS)
    check_fully_masked(fully_masked)
    if value.shape[-1] == 0:
        raise ValueError(misuse("value", f"shape {tuple(value.shape)}", "one channel or more"))
    if kind == "max_pooling":
        return _max_pooling(value, permitted, fully_masked)
    if kind == "soft":
        weights = masked_softmax(scores, permitted, fully_masked=fully_masked)
    else:
        weigh_scores = _hard if kind == "hard" else _gating
        weights = _fill_fully_masked(weigh_scores(scores, permitted), permitted, fully_masked)
    weights = weights.to(value.dtype)
    return _weighted_sum(weights, value, permitted), weights


def _permitted(scores: Tensor, mask: Tensor | None) -> Tensor:
    """The mask in the shape of the scores, after checking both."""
    leading_shape(scores=scores)
    if scores.shape[-1] == 0:
        raise ValueError(misuse("scores", f"shape {tuple(scores.shape)}", "one key or more"))
    if mask is None:
        mask = torch.ones((), dtype=torch.bool, device=scores.device)
    mask = boolean_mask(mask)
    try:
        return mask.expand(scores.shape)
    except RuntimeError:
        accepted = f"one that broadcasts to the scores {tuple(scores.shape)}"
        raise ValueError(misuse("mask", f"shape {tuple(mask.shape)}", accepted)) from None


def boolean_mask(mask: object) -> Tensor:
    """Return a mask as it is; TypeError unless it is a boolean tensor."""
    if isinstance(mask, Tensor) and mask.dtype == torch.bool:
        return mask
    given = f"dtype {dtype_name(mask)}" if isinstance(mask, Tensor) else type(mask).__name__
    accepted = "a boolean torch.Tensor, True where a query may attend"
    advice = "A mask that is added to the scores becomes one by `mask == 0`"
    raise TypeError(f"{misuse('mask', given, accepted)}. {advice}")


def _fill_fully_masked(weights: Tensor, permitted: Tensor, fully_masked: str) -> Tensor:
    """Give rows without a permitted key, all zeros so far, their declared meaning."""
    if fully_masked == "zero":
        return weights
    meaning = math.nan if fully_masked == "nan" else 1.0 / weights.shape[-1]
    return weights.masked_fill(~permitted.any(-1, keepdim=True), meaning)


def _first_largest(numbers: Tensor, permitted: Tensor, dim: int) -> tuple[Tensor, Tensor]:
    """The largest permitted number along `dim`, and True at the first element that holds it."""
    # `argmax` would not do: it may land on a masked element where all permitted ones are -inf.
    filled = numbers.masked_fill(~permitted, -math.inf)
    largest = filled.amax(dim, keepdim=True)
    holds_it = (filled == largest) & permitted
    return largest, holds_it & (holds_it.cumsum(dim) == 1)


def _hard(scores: Tensor, permitted: Tensor) -> Tensor:
    largest, chosen = _first_largest(scores, permitted, dim=-1)
    return chosen.to(scores.dtype).masked_fill(largest.isnan(), math.nan)


def _gating(scores: Tensor, permitted: Tensor) -> Tensor:
    # Filled before as well as after: a masked NaN would reach the gradient of the sigmoid.
    return torch.sigmoid(scores.masked_fill(~permitted, 0.0)).masked_fill(~permitted, 0.0)


def _max_pooling(value: Tensor, permitted: Tensor, fully_masked: str) -> tuple[Tensor, Tensor]:
    leading = broadcast(permitted.shape[:-2], value.shape[:-2])
    # The largest temporary is the running count of elements, in int64.
    bytes_per_query = math.prod(leading) * value.shape[-2] * value.shape[-1] * 8
    outputs, shares = [], []
    for chunk in query_chunks(permitted.shape[-2], bytes_per_query):
        largest, won = _first_largest(
            value.unsqueeze(-3), permitted[..., chunk, :].unsqueeze(-1), dim=-2
        )
        largest = largest.squeeze(-2)
        share = won.to(torch.float32).mean(-1).to(value.dtype)
        shares.append(share.masked_fill(largest.isnan().any(-1, keepdim=True), math.nan))
        outputs.append(largest)
    weights = _fill_fully_masked(torch.cat(shares, -2), permitted, fully_masked)
    some = permitted.any(-1, keepdim=True)
    output = torch.where(some, torch.cat(outputs, -2), _weighted_sum(weights, value, permitted))
    return output, weights


def _weighted_sum(weights: Tensor, value: Tensor, permitted: Tensor) -> Tensor:
    """`weights @ value`, except that 0 times the NaN or inf of a masked key is 0, not NaN."""
    bad = ~value.isfinite()
    if not bool(bad.any()):
        return weights @ value
    counts = (permitted | (weights != 0)).to(value.dtype)
    felt = counts @ bad.to(value.dtype) > 0
    return torch.where(felt, weights @ value, weights @ value.masked_fill(bad, 0.0))
