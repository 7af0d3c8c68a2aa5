"""The catalogue of known defects of attention. To add one, add an entry.

A defect is a change of the plan of attention. Where the same mistake has several forms, for
instance for the mask alone or for the causal mask as well, an entry holds several changes.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import product
from typing import Any, Literal, TypeAlias

import torch

from pytest_attnheat.attention.plan import Plan

Change: TypeAlias = Callable[[Plan], Plan]
# Constants that are found by fitting, and patterns that random numbers leave.
Seen: TypeAlias = Literal["exactly", "fitted", "rounding", "randomness", "garbage"]


@dataclass(frozen=True)
class Defect:
    """A known mistake.

    Attributes:
        name: A short name, as of a variable.
        sentence: What attention with it does; it follows the word "attention". The fitted
            constant stands in place of `{constant}`.
        changes: What it does to the plan, in each of its forms; the first one is the most usual.
        issue: A public issue that reports it.
        seen: How it is found: its output is reproduced "exactly" (to within rounding), or with
            a constant that is "fitted"; by "rounding" that another order of the same steps may
            do differently in a few rows; by "randomness", which no plan reproduces; or with NaN
            as "garbage" in masked keys, which correct attention may well feel.
    """

    name: str
    sentence: str
    changes: tuple[Change, ...] = ()
    issue: str | None = None
    seen: Seen = "exactly"

    def change(self, plan: Plan) -> Plan:
        """Return the plan with this defect, in its most usual form."""
        return self.changes[0](plan) if self.changes else plan


def _changes(**choices: Any) -> tuple[Change, ...]:
    """One change for each combination; a list holds choices, anything else is the only one."""
    lists = [choice if isinstance(choice, list) else [choice] for choice in choices.values()]
    return tuple(_setting(dict(zip(choices, chosen, strict=True))) for chosen in product(*lists))


def _setting(fields: dict[str, Any]) -> Change:
    return lambda plan: replace(plan, **fields)


# Rows that the defect leaves without keys: as declared, or what the numbers then give.
_ROWS: list[str | None] = [None, "natural"]
_COVERS = ["all", "mask", "causal"]
_SLICES = ["nan", "zero", "uniform"]
_BLOCKS = [2, 3, 4, 8, 16, 32, 64, 128]
# Whether fewer keys than one block are dropped as well: those of the small cases.
_SHORT = ["dropped", "kept"]

_SOFTMAX = (
    Defect(
        "softmax_over_queries",
        "whose softmax runs over the queries (dim=-2)",
        _changes(dim="queries", fully_masked=_ROWS, empty_slices=_SLICES),
        "labmlai/annotated_deep_learning_paper_implementations#146",
    ),
    Defect(
        "softmax_over_heads",
        "whose softmax runs over the heads (dim=1)",
        _changes(dim="heads", fully_masked=_ROWS, empty_slices=_SLICES),
    ),
    Defect(
        "softmax_over_batch",
        "whose softmax runs over the batch (dim=0)",
        _changes(dim="batch", fully_masked=_ROWS, empty_slices=_SLICES),
        "PetrochukM/PyTorch-NLP#2",
    ),
    Defect(
        "softmax_over_map",
        "whose softmax runs over queries and keys at once: a whole map sums to 1",
        _changes(dim="map", fully_masked=_ROWS),
    ),
    Defect(
        "softmax_twice",
        "whose softmax is applied twice",
        _changes(normaliser=["twice", "twice_masked"], fully_masked=_ROWS),
    ),
    Defect(
        "sigmoid",
        "whose scores go through a sigmoid in place of a softmax",
        _changes(normaliser="sigmoid", fully_masked=_ROWS),
    ),
    Defect(
        "no_normaliser",
        "whose weights are exp(score), not divided by their sum",
        _changes(normaliser=["unnormalised", "unnormalised_shifted"], fully_masked=_ROWS),
    ),
    Defect(
        "softmax_plus_one",
        "whose softmax divides by 1 more than the sum (softmax-off-by-one, an attention sink)",
        _changes(normaliser=["plus_one", "plus_one_shifted"], fully_masked=_ROWS),
    ),
    Defect(
        "relu_normalised",
        "whose weights are relu(score) divided by their sum, not a softmax",
        _changes(normaliser="relu", fully_masked=_ROWS, empty_slices=["nan", "zero"]),
    ),
    Defect(
        "no_softmax",
        "whose weights are the scores themselves: there is no softmax",
        _changes(normaliser="scores", masking=["fill", "after"], fully_masked=_ROWS),
    ),
    Defect(
        "log_softmax",
        "whose weights are the logarithm of the softmax",
        _changes(normaliser="log_softmax", masking=["fill", "after"], fully_masked=_ROWS),
    ),
    Defect(
        "no_maximum_subtracted",
        "whose softmax overflows: the maximum is not subtracted before exp",
        _changes(normaliser="no_maximum", empty_slices=["nan", "zero"]),
    ),
    Defect(
        "online_output_not_rescaled",
        "whose softmax takes keys block by block and does not rescale the output so far when a "
        "later block raises the maximum",
        _changes(online_block=_BLOCKS, stale="output", fully_masked=_ROWS),
    ),
    Defect(
        "online_sum_not_rescaled",
        "whose softmax takes keys block by block and does not rescale the sum so far when a "
        "later block raises the maximum",
        _changes(online_block=_BLOCKS, stale="sum", fully_masked=_ROWS),
    ),
    Defect(
        "online_never_rescaled",
        "whose softmax takes keys block by block and rescales neither the output nor the sum so "
        "far when a later block raises the maximum",
        _changes(online_block=_BLOCKS, stale="both", fully_masked=_ROWS),
    ),
    Defect(
        "hard_maximum",
        "whose weights are 1 at the largest score and 0 elsewhere",
        _changes(normaliser="hard", fully_masked=_ROWS),
    ),
    Defect(
        "base_two",
        "whose softmax raises 2, not e, to the scores (exp2 without log2(e))",
        _changes(temperature=math.log(2.0)),
    ),
)

_SCALE = (
    Defect("scale_missing", "whose scores are not scaled", _changes(scale="missing")),
    Defect(
        "scale_squared",
        "whose scores are scaled twice (divided by head_dim, not by its root)",
        _changes(scale="squared"),
    ),
    Defect(
        "scale_inverted",
        "whose scores are divided by the scale, not multiplied: times sqrt(head_dim)",
        _changes(scale="inverse"),
        "esceptico/perceiver-io#9",
    ),
    Defect(
        "scale_from_value_width",
        "whose scale is taken from the width of the values",
        _changes(scale="value_width"),
    ),
    Defect(
        "scale_from_embedding",
        "whose scale is taken from the whole embedding, heads * head_dim",
        _changes(scale="embedding"),
        "Graylab/DL4Proteins-notebooks#12",
    ),
    Defect(
        "scale_from_key_len",
        "whose scale is taken from the number of keys",
        _changes(scale="key_len"),
    ),
    Defect(
        "scale_argument_ignored", "that ignores the scale it is given", _changes(scale="default")
    ),
    Defect(
        "scale_after_softmax",
        "whose scale is applied after the softmax",
        _changes(scale_after=True),
        "FrancescoSaverioZuppichini/ViT#2",
    ),
    Defect(
        "temperature", "whose scores are {constant:.6g} times what they should be", seen="fitted"
    ),
    Defect(
        "output_factor", "whose output is {constant:.6g} times what it should be", seen="fitted"
    ),
)

_MASK = (
    Defect(
        "mask_inverted",
        "whose mask is inverted: it attends exactly where it may not",
        _changes(mask="inverted", fully_masked=_ROWS),
        "lucidrains/x-transformers#160",
    ),
    Defect(
        "mask_ignored",
        "that ignores the mask",
        _changes(mask="ignored"),
        "TransformerLensOrg/TransformerLens#1005",
    ),
    Defect(
        "mask_transposed",
        "whose mask is transposed",
        _changes(mask="transposed", fully_masked=_ROWS),
    ),
    Defect(
        "mask_of_another_sample",
        "whose samples use the mask of the sample before or after them",
        _changes(mask=["rolled", "rolled_back"], fully_masked=_ROWS),
    ),
    Defect(
        "mask_of_first_sample",
        "whose samples all use the mask of the first one",
        _changes(mask="first", fully_masked=_ROWS),
    ),
    Defect(
        "mask_tiled_over_heads",
        "whose mask is repeated over heads in the order of samples (repeat, not repeat_interleave)",
        _changes(mask="tiled", fully_masked=_ROWS),
    ),
    Defect(
        "mask_after_softmax",
        "whose mask is applied after the softmax: rows do not sum to 1",
        _changes(masking="after", covers=_COVERS, fully_masked=_ROWS),
        "huggingface/pytorch-image-models#2236",
    ),
    Defect(
        "mask_after_softmax_renormalised",
        "whose mask is applied after the softmax and rows divided again: it loses rows whose "
        "weight is all on masked keys",
        _changes(
            masking="after_renormalised",
            covers=_COVERS,
            fully_masked=_ROWS,
            empty_slices=["nan", "zero"],
        ),
    ),
    Defect(
        "mask_added_as_number",
        "whose boolean mask is added to the scores as 0 and 1",
        _changes(masking=["ones", "ones_masked"], covers=_COVERS, fully_masked=_ROWS),
    ),
    Defect(
        "mask_fill_minus_10",
        "whose masked scores get -10, which is too near to other scores",
        _changes(masking=["fill", "added"], fill=-10.0, covers=_COVERS, fully_masked=_ROWS),
    ),
    Defect(
        "mask_fill_minus_1",
        "whose masked scores get -1, which is too near to other scores",
        _changes(fill=-1.0, covers=_COVERS, fully_masked=_ROWS),
    ),
    Defect(
        "mask_multiplied",
        "whose scores are multiplied by the mask: a masked score becomes 0, not -inf",
        _changes(fill=0.0, covers=_COVERS, fully_masked=_ROWS),
    ),
    Defect(
        "mask_ignored_when_causal",
        "that ignores the mask when it is causal as well",
        _changes(together="causal_only"),
    ),
    Defect(
        "causal_ignored_with_mask",
        "that is not causal when a mask is given as well",
        _changes(together="mask_only"),
    ),
)

# Before what is causal: of a window that becomes causal, the window is at fault.
_WINDOW = (
    Defect("window_ignored", "without its window", _changes(window="ignored")),
    Defect(
        "window_swapped",
        "whose window has its left and right sides exchanged",
        _changes(window="swapped", fully_masked=_ROWS),
    ),
    Defect(
        "window_left_too_wide",
        "whose window reaches one key too far to the left",
        _changes(window_shift=(1, 0)),
        "huggingface/transformers#39408",
    ),
    Defect(
        "window_left_too_narrow",
        "whose window misses its last key on the left",
        _changes(window_shift=(-1, 0), fully_masked=_ROWS),
    ),
    Defect(
        "window_right_too_wide",
        "whose window reaches one key too far to the right",
        _changes(window_shift=(0, 1)),
    ),
    Defect(
        "window_right_too_narrow",
        "whose window misses its last key on the right",
        _changes(window_shift=(0, -1), fully_masked=_ROWS),
    ),
)

_CAUSAL = (
    Defect("causal_ignored", "that is not causal when asked to be", _changes(causal="ignored")),
    Defect("causal_always", "that is causal without being asked", _changes(causal="always")),
    Defect(
        "causal_other_corner",
        "whose causal mask is aligned to the other corner (top left, bottom right)",
        _changes(causal="other_corner", fully_masked=_ROWS),
        "pytorch/pytorch#103082",
    ),
    Defect(
        "causal_sees_next",
        "whose queries see one key too many: the next one",
        _changes(causal_shift=1),
    ),
    Defect(
        "causal_misses_own",
        "whose queries do not see their own key, only those before",
        _changes(causal_shift=-1, fully_masked=_ROWS),
    ),
    Defect(
        "causal_sees_next_with_cache",
        "whose queries see one key too many, the next one, but only where there are not as many "
        "keys as queries, as with a cache",
        _changes(causal_shift=1, causal_shift_where=["more_keys", "differ"]),
    ),
    Defect(
        "causal_misses_own_with_cache",
        "whose queries do not see their own key, but only where there are not as many keys as "
        "queries, as with a cache",
        _changes(causal_shift=-1, causal_shift_where=["more_keys", "differ"], fully_masked=_ROWS),
    ),
    Defect(
        "causal_reversed",
        "whose queries see the future in place of the past",
        _changes(causal="reversed", causal_shift=[0, 1], fully_masked=_ROWS),
    ),
)

_HEADS = (
    Defect(
        "groups_tiled",
        "whose key heads are shared in the wrong order (repeat in place of repeat_interleave)",
        _changes(grouping="tile"),
        "fkodom/grouped-query-attention-pytorch#5",
    ),
    Defect(
        "first_key_head_only",
        "whose query heads all use the first key head",
        _changes(grouping="first"),
    ),
    Defect(
        "heads_split_without_transpose",
        "whose heads are split off without a transpose",
        _changes(split="reshape", merge=["transpose", "reshape"]),
    ),
    Defect(
        "heads_merged_without_transpose",
        "whose heads are merged without a transpose",
        _changes(merge="reshape"),
        "reczoo/FuxiCTR#30",
    ),
    Defect("heads_averaged", "whose output is averaged over heads", _changes(merge="averaged")),
    Defect(
        "weights_averaged",
        "whose heads all use the mean of their weights",
        _changes(weights_of_heads="averaged"),
    ),
)

_TENSORS = (
    Defect("keys_as_values", "that uses its keys as values", _changes(value_from="key")),
    Defect("queries_as_values", "that uses its queries as values", _changes(value_from="query")),
    Defect("values_as_keys", "that uses its values as keys", _changes(key_from="value")),
    Defect("queries_as_keys", "that uses its queries as keys", _changes(key_from="query")),
    Defect("keys_as_queries", "that uses its keys as queries", _changes(query_from="key")),
    Defect(
        "queries_and_keys_exchanged",
        "whose queries and keys are exchanged (scores transposed)",
        _changes(query_from="key", key_from="query"),
    ),
    Defect(
        "last_key_ignored",
        "that never sees the last key",
        _changes(dropped_key="last", fully_masked=_ROWS),
    ),
    Defect(
        "first_key_ignored",
        "that never sees the first key",
        _changes(dropped_key="first", fully_masked=_ROWS),
    ),
    Defect(
        "last_block_of_queries_zero",
        "whose last queries, those after the last whole block, get zeros",
        _changes(query_block=_BLOCKS, short_block=_SHORT),
    ),
    Defect(
        "last_block_of_keys_ignored",
        "that ignores the last keys, those after the last whole block",
        _changes(key_block=_BLOCKS, short_block=_SHORT, fully_masked=_ROWS),
    ),
)

_NUMBERS = (
    Defect(
        "scores_in_bfloat16",
        "whose scores are rounded to bfloat16",
        _changes(scores_dtype=torch.bfloat16),
        seen="rounding",
    ),
    Defect(
        "scores_in_float16",
        "whose scores are rounded to float16",
        _changes(scores_dtype=torch.float16),
        seen="rounding",
    ),
    Defect(
        "weights_in_bfloat16",
        "whose weights are rounded to bfloat16",
        _changes(weights_dtype=torch.bfloat16),
        seen="rounding",
    ),
    Defect(
        "weights_in_float16",
        "whose weights are rounded to float16",
        _changes(weights_dtype=torch.float16),
        seen="rounding",
    ),
    Defect(
        "fully_masked_nan",
        "whose fully masked rows are NaN",
        _changes(fully_masked="nan"),
        "pytorch/pytorch#103963",
    ),
    Defect(
        "fully_masked_uniform",
        "whose fully masked rows are the mean of all values",
        _changes(fully_masked="uniform"),
        "NVIDIA/apex#1390",
    ),
    Defect("fully_masked_zero", "whose fully masked rows are zero", _changes(fully_masked="zero")),
    Defect(
        "masked_nan_felt",
        "that feels NaN in a masked key (0 * NaN is NaN)",
        _changes(masked_nan="felt"),
        "pytorch/pytorch#101967",
        seen="garbage",
    ),
    Defect(
        "dropout_in_eval",
        "with dropout (p = {constant:.3g}) that nobody asked for",
        issue="pytorch/pytorch#124464",
        seen="randomness",
    ),
    Defect(
        "dropout_not_rescaled",
        "with dropout that nobody asked for, its weights not divided by 1 - p",
        seen="randomness",
    ),
)

DEFECTS: tuple[Defect, ...] = (
    *_SOFTMAX,
    *_SCALE,
    *_MASK,
    *_WINDOW,
    *_CAUSAL,
    *_HEADS,
    *_TENSORS,
    *_NUMBERS,
)
