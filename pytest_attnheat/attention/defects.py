"""The catalogue of known defects of attention. To add one, add an entry.

A defect is a change of the plan of attention. Where the same mistake has several forms, for
instance for the mask alone or for the causal mask as well, an entry holds several changes. Those
that compute right attention of a call that is misread stand in `misreadings`.
"""

from __future__ import annotations

import math

import torch

from .caching import STORED
from .call import FEATURES
from .decisions import BLOCKS, PREFIX, ROWS, SHARDS, Misreading, Plan
from .decisions import Change as Change
from .decisions import Defect as Defect
from .decisions import defect as _defect
from .misreadings import BESIDES, CAUSAL, HISTORY, MASK, PADDED, SCALE, WINDOW, without
from .misreadings_of_numbers import ADDED
from .packing import PACKED
from .sharding import SHARDED

_COVERS = ["all", "mask", "causal"]
_SLICES = ["nan", "zero", "uniform"]
# Two halves, blocks that split the small cases or are usual, ranks, and a cache beside new keys.
_PARTS = [-1, -2, 4, 16, 64, 128, SHARDS, PREFIX]
# Whether fewer keys than one block are dropped as well: those of the small cases.
_SHORT = ["whole", "short"]
_EMPTY = ["zero", "nan"]
_FIRST = [16, 32, 64, 128, 256, 512]

_SOFTMAX = (
    _defect("softmax_over_queries", "whose softmax runs over the queries (dim=-2)",
            "labmlai/annotated_deep_learning_paper_implementations#146", dim="queries",
            fully_masked=ROWS, empty_slices=_SLICES),
    _defect("softmax_over_heads", "whose softmax runs over the heads (dim=1)", dim="heads",
            fully_masked=ROWS, empty_slices=_SLICES),
    _defect("softmax_over_batch", "whose softmax runs over the batch (dim=0)",
            "PetrochukM/PyTorch-NLP#2", dim="batch", fully_masked=ROWS, empty_slices=_SLICES),
    _defect("softmax_over_map",
            "whose softmax runs over queries and keys at once: a whole map sums to 1", dim="map",
            fully_masked=ROWS),
    _defect("softmax_twice", "whose softmax is applied twice", normaliser=["twice", "twice_masked"],
            fully_masked=ROWS),
    _defect("sigmoid", "whose scores go through a sigmoid in place of a softmax",
            normaliser="sigmoid", fully_masked=ROWS),
    _defect("no_normaliser", "whose weights are exp(score), not divided by their sum",
            normaliser=["unnormalised", "unnormalised_shifted"], fully_masked=ROWS),
    _defect("softmax_plus_one",
            "whose softmax divides by 1 more than the sum (softmax-off-by-one, an attention sink)",
            normaliser=["plus_one", "plus_one_shifted"], fully_masked=ROWS),
    _defect("relu_normalised", "whose weights are relu(score) divided by their sum, not a softmax",
            normaliser="relu", fully_masked=ROWS, empty_slices=["nan", "zero"]),
    _defect("no_softmax", "whose weights are the scores themselves: there is no softmax",
            normaliser="scores", masking=["fill", "after"], fully_masked=ROWS),
    _defect("log_softmax", "whose weights are the logarithm of the softmax",
            normaliser="log_softmax", masking=["fill", "after"], fully_masked=ROWS),
    _defect("no_maximum_subtracted",
            "whose softmax overflows: the maximum is not subtracted before exp",
            normaliser="no_maximum", empty_slices=["nan", "zero"]),
    _defect("online_output_not_rescaled",
            "whose softmax takes keys block by block and does not rescale the output so far when "
            "a later block raises the maximum", part=[*BLOCKS, SHARDS], merging="output",
            fully_masked=ROWS),
    _defect("online_sum_not_rescaled",
            "whose softmax takes keys block by block and does not rescale the sum so far when a "
            "later block raises the maximum", part=[*BLOCKS, SHARDS], merging="sum",
            fully_masked=ROWS),
    _defect("online_never_rescaled",
            "whose softmax takes keys block by block and rescales neither the output nor the sum "
            "so far when a later block raises the maximum", part=[*BLOCKS, SHARDS], merging="both",
            fully_masked=ROWS),
    _defect("hard_maximum", "whose weights are 1 at the largest score and 0 elsewhere",
            normaliser="hard", fully_masked=ROWS),
    _defect("mean_of_values", "whose output is the mean of the values: its weights are all equal",
            normaliser="uniform", misread=[(), without("mask", "causal", *FEATURES)]),
    _defect("base_two", "whose softmax raises 2, not e, to the scores (exp2 without log2(e))",
            temperature=math.log(2.0)),
)  # fmt: skip

_SCALE = (
    _defect("scale_after_softmax", "whose scale is applied after the softmax",
            "FrancescoSaverioZuppichini/ViT#2", scale_after=True),
    _defect("temperature", "whose scores are {constant:.6g} times what they should be",
            seen="fitted"),
    _defect("output_factor", "whose output is {constant:.6g} times what it should be",
            seen="fitted"),
)  # fmt: skip

_MASK = (
    _defect("mask_after_softmax", "whose mask is applied after the softmax: rows do not sum to 1",
            "huggingface/pytorch-image-models#2236", masking="after", covers=_COVERS,
            fully_masked=ROWS),
    _defect("mask_after_softmax_renormalised",
            "whose mask is applied after the softmax and rows divided again: it loses rows whose "
            "weight is all on masked keys", masking="after_renormalised", covers=_COVERS,
            fully_masked=ROWS, empty_slices=["nan", "zero"]),
    _defect("mask_added_as_number", "whose boolean mask is added to the scores as 0 and 1",
            masking=["ones", "ones_masked"], covers=_COVERS, fully_masked=ROWS),
    _defect("mask_fill_minus_10", "whose masked scores get -10, which is too near to other scores",
            masking=["fill", "added"], fill=-10.0, covers=_COVERS, fully_masked=ROWS),
    _defect("mask_fill_minus_1", "whose masked scores get -1, which is too near to other scores",
            fill=-1.0, covers=_COVERS, fully_masked=ROWS),
    _defect("mask_multiplied",
            "whose scores are multiplied by the mask: a masked score becomes 0, not -inf", fill=0.0,
            covers=_COVERS, fully_masked=ROWS),
    _defect("mask_ignored_when_causal", "that ignores the mask when it is causal as well",
            together="causal_only", form_of="mask_ignored"),
    _defect("causal_ignored_with_mask", "that is not causal when a mask is given as well",
            together="mask_only", form_of="causal_ignored"),
)  # fmt: skip

_CAUSAL = (
    _defect("causal_other_corner",
            "whose causal mask is aligned to the other corner (top left, bottom right)",
            "pytorch/pytorch#103082", causal=["other_corner", "other_corner_alone"],
            fully_masked=ROWS),
    _defect("causal_sees_next", "whose queries see one key too many: the next one", causal_shift=1),
    _defect("causal_misses_own", "whose queries do not see their own key, only those before",
            causal_shift=-1, fully_masked=ROWS),
    _defect("causal_sees_next_with_cache",
            "whose queries see one key too many, the next one, but only where there are not as "
            "many keys as queries, as with a cache", causal_shift=1,
            causal_shift_where=["more_keys", "differ"], form_of="causal_sees_next"),
    _defect("causal_misses_own_with_cache",
            "whose queries do not see their own key, but only where there are not as many keys "
            "as queries, as with a cache", causal_shift=-1,
            causal_shift_where=["more_keys", "differ"], fully_masked=ROWS,
            form_of="causal_misses_own"),
    _defect("causal_reversed", "whose queries see the future in place of the past",
            causal="reversed", causal_shift=[0, 1], fully_masked=ROWS),
)  # fmt: skip

_SOFTCAP = (
    _defect("softcap_after_mask",
            "whose softcap comes after the mask: a masked score becomes -softcap, not -inf",
            softcap="after_mask", covers=_COVERS, fully_masked=ROWS, form_of="softcap_after_bias"),
    _defect("softcap_after_bias", "whose softcap comes after the bias, ALiBi or score_mod",
            softcap="after_bias"),
    _defect("softcap_before_scale", "whose softcap comes before the scale", softcap="before_scale"),
    _defect("softcap_not_divided", "whose softcap is softcap * tanh(score): it is not divided by "
            "softcap before", softcap="not_divided"),
    _defect("softcap_not_multiplied", "whose softcap is tanh(score / softcap): it is not "
            "multiplied by softcap again", softcap="not_multiplied"),
    _defect("softcap_times_score", "whose softcap multiplies the tanh by the score, not by softcap",
            "Dao-AILab/flash-attention#2396",
            softcap=["times_score", "times_own", "times_quotient"]),
)  # fmt: skip

_SINKS = (
    _defect("sinks_not_shifted", "whose sinks have no maximum subtracted, as its scores have",
            sinks="not_shifted"),
    _defect("sinks_shifted_twice", "whose sinks have the maximum of the scores subtracted twice",
            sinks="twice"),
    _defect("sinks_outside_maximum",
            "whose sinks take no part in the maximum: a row that sees nothing else is NaN",
            sinks="outside", form_of="fully_masked_nan"),
)  # fmt: skip

_PARTS_MERGED = (
    _defect("lse_in_base_two", "that merges parts of the keys by e ** lse, its lse in base 2",
            "sgl-project/sglang#35045", part=_PARTS, merging="all:two_for_e",
            empty_slices=_EMPTY),
    _defect("merge_in_base_two", "that merges parts of the keys by 2 ** lse, its lse in base e",
            part=_PARTS, merging="all:e_for_two", empty_slices=_EMPTY),
    _defect("lse_of_two_bases",
            "that merges parts of the keys whose lse are in base 2 and in base e",
            part=_PARTS, merging=[f"{part}:{bases}" for part in ("first", "others")
                                  for bases in ("two_for_e", "e_for_two")], empty_slices=_EMPTY),
    _defect("parts_averaged", "that merges parts of the keys by their mean, whatever their sums",
            part=_PARTS, merging=["mean", "mean_of_seen"], empty_slices=_EMPTY),
    _defect("parts_added", "that adds parts of the keys, each divided by its own sum", part=_PARTS,
            merging="added", empty_slices=_EMPTY),
    _defect("empty_parts_nan", "that gives NaN where a whole part of the keys is masked",
            part=_PARTS, merging=["first_empty", "first_two_empty", "any_empty"],
            form_of="fully_masked_nan"),
)  # fmt: skip

_HEADS = (
    _defect("groups_tiled",
            "whose key heads are shared in the wrong order (repeat in place of repeat_interleave)",
            "fkodom/grouped-query-attention-pytorch#5", grouping="tile"),
    _defect("keys_tiled",
            "whose keys alone are shared in the wrong order (repeat, values by repeat_interleave)",
            grouping="tile", grouped="keys"),
    _defect("values_tiled",
            "whose values alone are shared in the wrong order (repeat, keys by repeat_interleave)",
            grouping="tile", grouped="values"),
    _defect("first_key_head_only", "whose query heads all use the first key head",
            grouping="first", in_groups_of_one=[False, True]),
    _defect("key_head_miscounted",
            "whose query heads find their key head by the number of key heads, not of a group",
            "PSAL-POSTECH/ONNXim#33", grouping="divided", in_groups_of_one=[True, False],
            form_of="first_key_head_only"),
    _defect("heads_split_without_transpose", "whose heads are split off without a transpose",
            split="reshape", merge=["transpose", "reshape"]),
    _defect("heads_merged_without_transpose", "whose heads are merged without a transpose",
            "reczoo/FuxiCTR#30", merge="reshape"),
    _defect("heads_averaged", "whose output is averaged over heads", merge="averaged"),
    _defect("weights_averaged", "whose heads all use the mean of their weights",
            weights_of_heads="averaged"),
)  # fmt: skip

_TENSORS = (
    _defect("keys_as_values", "that uses its keys as values", value_from="key"),
    _defect("queries_as_values", "that uses its queries as values", value_from="query"),
    _defect("values_as_keys", "that uses its values as keys", key_from="value"),
    _defect("queries_as_keys", "that uses its queries as keys", key_from="query"),
    _defect("keys_as_queries", "that uses its keys as queries", query_from="key"),
    _defect("queries_and_keys_exchanged",
            "whose queries and keys are exchanged (scores transposed)", query_from="key",
            key_from="query"),
    _defect("last_key_ignored", "that never sees the last key", dropped_key="last",
            fully_masked=ROWS),
    _defect("first_key_ignored", "that never sees the first key", dropped_key="first",
            fully_masked=ROWS),
    _defect("last_block_of_queries_zero",
            "whose last queries, those after the last whole block, get zeros", query_block=BLOCKS,
            blocks=_SHORT),
    _defect("last_block_of_keys_ignored",
            "that ignores the last keys, those after the last whole block", key_block=BLOCKS,
            blocks=_SHORT, fully_masked=ROWS),
    _defect("first_keys_only", "that reads the first keys alone", key_block=_FIRST, blocks="first",
            fully_masked=ROWS),
    _defect("first_queries_only", "that answers the first queries alone: others get zeros",
            query_block=_FIRST, blocks="first"),
)  # fmt: skip

_NUMBERS = (
    _defect("products_overflow",
            "whose products overflow in float16: they are scaled too late", overflow=True),
    _defect("products_in_float16", "whose products are rounded to float16 before they are scaled",
            products_dtype=torch.float16, seen="rounding"),
    _defect("output_in_bfloat16", "whose output is rounded to bfloat16",
            output_dtype=torch.bfloat16, seen="rounding"),
    _defect("output_in_float16", "whose output is rounded to float16",
            output_dtype=torch.float16, seen="rounding"),
    _defect("scores_in_bfloat16", "whose scores are rounded to bfloat16",
            scores_dtype=torch.bfloat16, seen="rounding"),
    _defect("scores_in_float16", "whose scores are rounded to float16", scores_dtype=torch.float16,
            seen="rounding"),
    _defect("weights_in_bfloat16", "whose weights are rounded to bfloat16",
            weights_dtype=torch.bfloat16, seen="rounding"),
    _defect("weights_in_float16", "whose weights are rounded to float16",
            weights_dtype=torch.float16, seen="rounding"),
    _defect("fully_masked_nan", "whose fully masked rows are NaN", "pytorch/pytorch#103963",
            fully_masked="nan"),
    _defect("fully_masked_uniform", "whose fully masked rows are the mean of all values",
            "NVIDIA/apex#1390", fully_masked="uniform"),
    _defect("fully_masked_zero", "whose fully masked rows are zero", fully_masked="zero"),
    _defect("masked_nan_felt", "that feels NaN in a masked key (0 * NaN is NaN)",
            "pytorch/pytorch#101967", masked_nan="felt", seen="garbage"),
    _defect("dropout_in_eval", "with dropout (p = {constant:.3g}) that nobody asked for",
            "pytorch/pytorch#124464", seen="randomness"),
    _defect("dropout_not_rescaled",
            "with dropout that nobody asked for, its weights not divided by 1 - p",
            seen="randomness"),
)  # fmt: skip

DEFECTS: tuple[Defect, ...] = (
    *_SOFTMAX,
    *SCALE,
    *_SCALE,
    *MASK,
    *_MASK,
    # Before what is causal: of a window that becomes causal, the window is at fault.
    *WINDOW,
    *CAUSAL,
    *_CAUSAL,
    *SHARDED,
    *PACKED,
    *BESIDES,
    *ADDED,
    *_SOFTCAP,
    *_SINKS,
    *HISTORY,
    *_PARTS_MERGED,
    *_HEADS,
    *_TENSORS,
    *PADDED,
    *STORED,
    *_NUMBERS,
)
# In this order a case is misread; no matter which comes first, but always the same.
_ORDER = {
    reading: number
    for number, one in enumerate(DEFECTS)
    for change in one.changes
    for reading in change(Plan()).misread
}


def in_order(readings: frozenset[Misreading]) -> list[Misreading]:
    """Return misreadings in the order in which they are done."""
    return sorted(readings, key=lambda reading: _ORDER.get(reading, -1))
