"""The decisions that attention and its backward pass are made of; a defect is another one.

See `defects`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, TypeAlias

import torch

Source: TypeAlias = Literal["query", "key", "value"]
Natural: TypeAlias = Literal["natural", "zero", "uniform", "nan"]


@dataclass(frozen=True)
class Plan:
    """One decision per field; the defaults are correct attention.

    Attributes:
        query_from: The tensor used as queries; likewise `key_from` and `value_from`.
        split: How heads are split off the embedding: by "transpose", or wrongly by "reshape".
        merge: How heads are merged, likewise, or "averaged".
        weights_of_heads: "own", or "averaged" over all heads.
        grouping: Which key head serves a query head: neighbours share one ("interleave"), heads
            take turns ("tile"), or all use the "first".
        scale: What scores are multiplied by.
        scale_after: Leave the scores as they are, and scale the weights.
        temperature: A factor of the scores besides.
        scores_dtype: The dtype that scaled scores are rounded to.
        weights_dtype: The dtype that weights are rounded to.
        mask: Which keys the mask permits: as given ("keep"), "inverted", all ("ignored"),
            "transposed", those of the sample before or after ("rolled", "rolled_back"), of the
            first sample, or of sample (batch * heads + head) % batches ("tiled").
        causal: "declared", the "other_corner", "ignored", "always", or "reversed" (the future).
        causal_shift: How many keys more a causal query sees.
        causal_shift_where: In "all" cases, where lengths "differ", or there are "more_keys".
        together: Given a mask and causal: "both" count, or "mask_only", "causal_only".
        window_shift: How many keys more a window has on the left and on the right.
        window: "declared", "ignored" or "swapped" (left is right).
        dropped_key: "first" or "last": a key that nobody attends to.
        key_block: Keys after the last whole block of so many are ignored; 0 for none.
        query_block: Queries after the last whole block of so many get zeros; 0 for none.
        short_block: Whether fewer keys or queries than one block are "dropped" as well, or "kept".
        online_block: Keys come in blocks of so many, and the maximum so far is subtracted; 0 for
            all at once.
        stale: What is not brought down where a later block raises that maximum: "none", the
            "output" so far, the "sum" so far, or "both".
        masking: How a mask is applied: by a "fill" of the scores, by a number "added", as "ones"
            (1 where permitted, added) or "ones_masked" (1 where not), or to the weights "after"
            the softmax, or there with a new division by the sum ("after_renormalised").
        covers: What `masking` and `fill` are about: the "mask", "causal" (and window) or "all";
            the other is filled with -inf.
        fill: The number that is filled in or added.
        dim: What the softmax runs over: "keys", "queries", "heads", "batch" or the whole "map".
        normaliser: How scores become weights.
        fully_masked: What rows without permitted keys become: None for what is declared, or
            "natural" for what the numbers give.
        empty_slices: What softmax over nothing but -inf gives where it does not run over keys, and
            0 / 0 elsewhere.
        output_factor: A factor of the output.
        masked_nan: Whether NaN in the value of a masked key is "unfelt" or "felt".
    """

    query_from: Source = "query"
    key_from: Source = "key"
    value_from: Source = "value"
    split: Literal["transpose", "reshape"] = "transpose"
    merge: Literal["transpose", "reshape", "averaged"] = "transpose"
    weights_of_heads: Literal["own", "averaged"] = "own"
    grouping: Literal["interleave", "tile", "first"] = "interleave"
    scale: Literal["declared", "missing", "squared", "inverse", "value_width", "embedding",
                   "key_len", "default"] = "declared"  # fmt: skip
    scale_after: bool = False
    temperature: float = 1.0
    scores_dtype: torch.dtype | None = None
    weights_dtype: torch.dtype | None = None
    mask: Literal[
        "keep", "inverted", "ignored", "transposed", "rolled", "rolled_back", "first", "tiled"
    ] = "keep"
    causal: Literal["declared", "other_corner", "ignored", "always", "reversed"] = "declared"
    causal_shift: int = 0
    causal_shift_where: Literal["all", "differ", "more_keys"] = "all"
    together: Literal["both", "mask_only", "causal_only"] = "both"
    window: Literal["declared", "ignored", "swapped"] = "declared"
    window_shift: tuple[int, int] = (0, 0)
    dropped_key: Literal["none", "first", "last"] = "none"
    key_block: int = 0
    query_block: int = 0
    short_block: Literal["dropped", "kept"] = "dropped"
    online_block: int = 0
    stale: Literal["none", "output", "sum", "both"] = "none"
    masking: Literal["fill", "added", "ones", "ones_masked", "after", "after_renormalised"] = "fill"
    covers: Literal["all", "mask", "causal"] = "all"
    fill: float = -math.inf
    dim: Literal["keys", "queries", "heads", "batch", "map"] = "keys"
    normaliser: Literal[
        "softmax", "no_maximum", "unnormalised", "unnormalised_shifted", "plus_one",
        "plus_one_shifted", "sigmoid", "relu", "scores", "log_softmax", "twice", "twice_masked",
        "hard"] = "softmax"  # fmt: skip
    fully_masked: Natural | None = None
    empty_slices: Literal["nan", "zero", "uniform"] = "nan"
    output_factor: float = 1.0
    masked_nan: Literal["unfelt", "felt"] = "unfelt"


@dataclass(frozen=True)
class BackwardPlan(Plan):
    """One decision per field of a backward pass, which computes the weights once more by a plan.

    Attributes:
        weights_from: What the weights are computed from: the scores and the "saved" logarithm of
            the sum of each row, or the scores alone, by a softmax of its "own".
        row_term: What is subtracted from dP in each row: the sum of dO * O as "saved" by the
            forward pass, the sum of its "own" weights times dP, "none", the sum of dO
            ("upstream"), or the right one of another row, head or sample.
        gradient_scale: What dQ and dK are multiplied by: the scale is "applied", "missing" or
            there "twice", or has ln(2) ("base_two") or log2(e) ("base_e") too much.
        score_slope: The slope of softcap, or of a function of the score.
        group_sum: Which heads add up to the gradient of a key head: neighbours ("sum"), those
            that take turns ("tile"), the "first" or "last" of the group, or their "mean".
        bias_sum: Likewise of the dimensions in which a bias is broadcast.
        detached: Whether no gradient passes through the weights.
        exchanged: Whether the gradients of query and key change places.
        kept_of_scores: Whether dropout is "applied" to dP, "ignored" there, or "not_rescaled".
        kept_of_values: Likewise of the weights that make dV.
        skipped_block: Blocks of so many queries and keys that are masked in part get nothing; 0
            for none.
    """

    weights_from: Literal["saved", "own"] = "saved"
    row_term: Literal[
        "saved", "own", "none", "upstream", "next_row", "previous_row", "first_row", "next_head",
        "previous_head", "first_head", "key_head", "next_sample",
        "first_sample"] = "saved"  # fmt: skip
    gradient_scale: Literal["applied", "missing", "twice", "base_two", "base_e"] = "applied"
    score_slope: Literal["applied", "missing"] = "applied"
    group_sum: Literal["sum", "tile", "first", "last", "mean"] = "sum"
    bias_sum: Literal["sum", "first", "last", "mean"] = "sum"
    detached: bool = False
    exchanged: bool = False
    kept_of_scores: Literal["applied", "ignored", "not_rescaled"] = "applied"
    kept_of_values: Literal["applied", "ignored", "not_rescaled"] = "applied"
    skipped_block: int = 0
