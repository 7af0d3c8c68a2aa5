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

from pytest_attnheat.attention.decisions import Plan

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
        backward: Whether it is one of the backward pass: its changes are of a `BackwardPlan`.
    """

    name: str
    sentence: str
    changes: tuple[Change, ...] = ()
    issue: str | None = None
    seen: Seen = "exactly"
    backward: bool = False

    def change(self, plan: Plan) -> Plan:
        """Return the plan with this defect, in its most usual form."""
        return self.changes[0](plan) if self.changes else plan


def _changes(**choices: Any) -> tuple[Change, ...]:
    """One change for each combination; a list holds choices, anything else is the only one."""
    lists = [choice if isinstance(choice, list) else [choice] for choice in choices.values()]
    return tuple(_setting(dict(zip(choices, chosen, strict=True))) for chosen in product(*lists))


def _defect(
    name: str, sentence: str, issue: str | None = None, *, seen: Seen = "exactly", **choices: Any
) -> Defect:
    """A defect with one change for each combination of some decisions of a plan."""
    return Defect(name, sentence, _changes(**choices) if choices else (), issue, seen)


def _backward(name: str, sentence: str, issue: str | None = None, **choices: Any) -> Defect:
    """A defect of the backward pass alone: the output is right."""
    return Defect(name, sentence, _changes(**choices), issue, backward=True)


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
    _defect("softmax_over_queries", "whose softmax runs over the queries (dim=-2)",
            "labmlai/annotated_deep_learning_paper_implementations#146", dim="queries",
            fully_masked=_ROWS, empty_slices=_SLICES),
    _defect("softmax_over_heads", "whose softmax runs over the heads (dim=1)", dim="heads",
            fully_masked=_ROWS, empty_slices=_SLICES),
    _defect("softmax_over_batch", "whose softmax runs over the batch (dim=0)",
            "PetrochukM/PyTorch-NLP#2", dim="batch", fully_masked=_ROWS, empty_slices=_SLICES),
    _defect("softmax_over_map",
            "whose softmax runs over queries and keys at once: a whole map sums to 1", dim="map",
            fully_masked=_ROWS),
    _defect("softmax_twice", "whose softmax is applied twice", normaliser=["twice", "twice_masked"],
            fully_masked=_ROWS),
    _defect("sigmoid", "whose scores go through a sigmoid in place of a softmax",
            normaliser="sigmoid", fully_masked=_ROWS),
    _defect("no_normaliser", "whose weights are exp(score), not divided by their sum",
            normaliser=["unnormalised", "unnormalised_shifted"], fully_masked=_ROWS),
    _defect("softmax_plus_one",
            "whose softmax divides by 1 more than the sum (softmax-off-by-one, an attention sink)",
            normaliser=["plus_one", "plus_one_shifted"], fully_masked=_ROWS),
    _defect("relu_normalised", "whose weights are relu(score) divided by their sum, not a softmax",
            normaliser="relu", fully_masked=_ROWS, empty_slices=["nan", "zero"]),
    _defect("no_softmax", "whose weights are the scores themselves: there is no softmax",
            normaliser="scores", masking=["fill", "after"], fully_masked=_ROWS),
    _defect("log_softmax", "whose weights are the logarithm of the softmax",
            normaliser="log_softmax", masking=["fill", "after"], fully_masked=_ROWS),
    _defect("no_maximum_subtracted",
            "whose softmax overflows: the maximum is not subtracted before exp",
            normaliser="no_maximum", empty_slices=["nan", "zero"]),
    _defect("online_output_not_rescaled",
            "whose softmax takes keys block by block and does not rescale the output so far when "
            "a later block raises the maximum", online_block=_BLOCKS, stale="output",
            fully_masked=_ROWS),
    _defect("online_sum_not_rescaled",
            "whose softmax takes keys block by block and does not rescale the sum so far when a "
            "later block raises the maximum", online_block=_BLOCKS, stale="sum",
            fully_masked=_ROWS),
    _defect("online_never_rescaled",
            "whose softmax takes keys block by block and rescales neither the output nor the sum "
            "so far when a later block raises the maximum", online_block=_BLOCKS, stale="both",
            fully_masked=_ROWS),
    _defect("hard_maximum", "whose weights are 1 at the largest score and 0 elsewhere",
            normaliser="hard", fully_masked=_ROWS),
    _defect("base_two", "whose softmax raises 2, not e, to the scores (exp2 without log2(e))",
            temperature=math.log(2.0)),
)  # fmt: skip

_SCALE = (
    _defect("scale_missing", "whose scores are not scaled", scale="missing"),
    _defect("scale_squared", "whose scores are scaled twice (divided by head_dim, not by its root)",
            scale="squared"),
    _defect("scale_inverted",
            "whose scores are divided by the scale, not multiplied: times sqrt(head_dim)",
            "esceptico/perceiver-io#9", scale="inverse"),
    _defect("scale_from_value_width", "whose scale is taken from the width of the values",
            scale="value_width"),
    _defect("scale_from_embedding",
            "whose scale is taken from the whole embedding, heads * head_dim",
            "Graylab/DL4Proteins-notebooks#12", scale="embedding"),
    _defect("scale_from_key_len", "whose scale is taken from the number of keys", scale="key_len"),
    _defect("scale_argument_ignored", "that ignores the scale it is given", scale="default"),
    _defect("scale_after_softmax", "whose scale is applied after the softmax",
            "FrancescoSaverioZuppichini/ViT#2", scale_after=True),
    _defect("temperature", "whose scores are {constant:.6g} times what they should be",
            seen="fitted"),
    _defect("output_factor", "whose output is {constant:.6g} times what it should be",
            seen="fitted"),
)  # fmt: skip

_MASK = (
    _defect("mask_inverted", "whose mask is inverted: it attends exactly where it may not",
            "lucidrains/x-transformers#160", mask="inverted", fully_masked=_ROWS),
    _defect("mask_ignored", "that ignores the mask", "TransformerLensOrg/TransformerLens#1005",
            mask="ignored"),
    _defect("mask_transposed", "whose mask is transposed", mask="transposed", fully_masked=_ROWS),
    _defect("mask_of_another_sample",
            "whose samples use the mask of the sample before or after them",
            mask=["rolled", "rolled_back"], fully_masked=_ROWS),
    _defect("mask_of_first_sample", "whose samples all use the mask of the first one", mask="first",
            fully_masked=_ROWS),
    _defect("mask_tiled_over_heads",
            "whose mask is repeated over heads in the order of samples (repeat, not "
            "repeat_interleave)", mask="tiled", fully_masked=_ROWS),
    _defect("mask_after_softmax", "whose mask is applied after the softmax: rows do not sum to 1",
            "huggingface/pytorch-image-models#2236", masking="after", covers=_COVERS,
            fully_masked=_ROWS),
    _defect("mask_after_softmax_renormalised",
            "whose mask is applied after the softmax and rows divided again: it loses rows whose "
            "weight is all on masked keys", masking="after_renormalised", covers=_COVERS,
            fully_masked=_ROWS, empty_slices=["nan", "zero"]),
    _defect("mask_added_as_number", "whose boolean mask is added to the scores as 0 and 1",
            masking=["ones", "ones_masked"], covers=_COVERS, fully_masked=_ROWS),
    _defect("mask_fill_minus_10", "whose masked scores get -10, which is too near to other scores",
            masking=["fill", "added"], fill=-10.0, covers=_COVERS, fully_masked=_ROWS),
    _defect("mask_fill_minus_1", "whose masked scores get -1, which is too near to other scores",
            fill=-1.0, covers=_COVERS, fully_masked=_ROWS),
    _defect("mask_multiplied",
            "whose scores are multiplied by the mask: a masked score becomes 0, not -inf", fill=0.0,
            covers=_COVERS, fully_masked=_ROWS),
    _defect("mask_ignored_when_causal", "that ignores the mask when it is causal as well",
            together="causal_only"),
    _defect("causal_ignored_with_mask", "that is not causal when a mask is given as well",
            together="mask_only"),
)  # fmt: skip

# Before what is causal: of a window that becomes causal, the window is at fault.
_WINDOW = (
    _defect("window_ignored", "without its window", window="ignored"),
    _defect("window_swapped", "whose window has its left and right sides exchanged",
            window="swapped", fully_masked=_ROWS),
    _defect("window_left_too_wide", "whose window reaches one key too far to the left",
            "huggingface/transformers#39408", window_shift=(1, 0)),
    _defect("window_left_too_narrow", "whose window misses its last key on the left",
            window_shift=(-1, 0), fully_masked=_ROWS),
    _defect("window_right_too_wide", "whose window reaches one key too far to the right",
            window_shift=(0, 1)),
    _defect("window_right_too_narrow", "whose window misses its last key on the right",
            window_shift=(0, -1), fully_masked=_ROWS),
)  # fmt: skip

_CAUSAL = (
    _defect("causal_ignored", "that is not causal when asked to be", causal="ignored"),
    _defect("causal_always", "that is causal without being asked", causal="always"),
    _defect("causal_other_corner",
            "whose causal mask is aligned to the other corner (top left, bottom right)",
            "pytorch/pytorch#103082", causal="other_corner", fully_masked=_ROWS),
    _defect("causal_sees_next", "whose queries see one key too many: the next one", causal_shift=1),
    _defect("causal_misses_own", "whose queries do not see their own key, only those before",
            causal_shift=-1, fully_masked=_ROWS),
    _defect("causal_sees_next_with_cache",
            "whose queries see one key too many, the next one, but only where there are not as "
            "many keys as queries, as with a cache", causal_shift=1,
            causal_shift_where=["more_keys", "differ"]),
    _defect("causal_misses_own_with_cache",
            "whose queries do not see their own key, but only where there are not as many keys "
            "as queries, as with a cache", causal_shift=-1,
            causal_shift_where=["more_keys", "differ"], fully_masked=_ROWS),
    _defect("causal_reversed", "whose queries see the future in place of the past",
            causal="reversed", causal_shift=[0, 1], fully_masked=_ROWS),
)  # fmt: skip

_HEADS = (
    _defect("groups_tiled",
            "whose key heads are shared in the wrong order (repeat in place of repeat_interleave)",
            "fkodom/grouped-query-attention-pytorch#5", grouping="tile"),
    _defect("first_key_head_only", "whose query heads all use the first key head",
            grouping="first"),
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
            fully_masked=_ROWS),
    _defect("first_key_ignored", "that never sees the first key", dropped_key="first",
            fully_masked=_ROWS),
    _defect("last_block_of_queries_zero",
            "whose last queries, those after the last whole block, get zeros", query_block=_BLOCKS,
            short_block=_SHORT),
    _defect("last_block_of_keys_ignored",
            "that ignores the last keys, those after the last whole block", key_block=_BLOCKS,
            short_block=_SHORT, fully_masked=_ROWS),
)  # fmt: skip

_NUMBERS = (
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
    *_SCALE,
    *_MASK,
    *_WINDOW,
    *_CAUSAL,
    *_HEADS,
    *_TENSORS,
    *_NUMBERS,
)

# What a backward pass may do wrong of itself. It may also compute the weights once more with any
# defect of the forward pass: see `attention.backward`.
BACKWARD: tuple[Defect, ...] = (
    _backward("backward_row_term_left_out",
              "whose backward pass leaves out the row term: sum(dO * O) is not subtracted from dP",
              row_term="none"),
    _backward("backward_row_term_from_upstream",
              "whose backward pass takes sum(dO) for the row term sum(dO * O)",
              row_term="upstream"),
    _backward("backward_row_term_of_another_row",
              "whose backward pass takes the row term sum(dO * O) of another row",
              row_term=["next_row", "previous_row", "first_row"]),
    _backward("backward_row_term_of_another_head",
              "whose backward pass takes the row term sum(dO * O) of another head or sample",
              row_term=["next_head", "previous_head", "first_head", "key_head", "next_sample",
                        "first_sample"]),
    _backward("backward_scale_missing", "whose backward pass leaves out the scale",
              gradient_scale="missing"),
    _backward("backward_scale_twice", "whose backward pass applies the scale twice",
              gradient_scale="twice"),
    _backward("backward_of_exp2",
              "whose backward pass mixes exp and exp2: log2(e) is missing or too much",
              gradient_scale=["base_two", "base_e"]),
    _backward("backward_softcap_slope_missing",
              "whose backward pass leaves out the slope of softcap, or of a function of the score",
              score_slope="missing"),
    _backward("backward_groups_tiled", "that sums over the wrong heads of a group",
              "XunhaoLai/native-sparse-attention-triton#27", group_sum="tile",
              grouping=["interleave", "tile"]),
    _backward("backward_group_not_summed",
              "that keeps one head of a group, where the gradient sums over all",
              group_sum=["first", "last"]),
    _backward("backward_group_averaged", "that takes the mean over a group of heads, not the sum",
              group_sum="mean"),
    _backward("backward_bias_not_summed",
              "that does not sum over the dimensions in which the bias is broadcast",
              bias_sum=["first", "last", "mean"]),
    _backward("backward_weights_detached",
              "whose weights are detached: a gradient passes through the values alone",
              detached=True),
    _backward("backward_exchanged", "that exchanges the gradients of query and key",
              exchanged=True),
    _backward("backward_dropout_ignored",
              "whose backward pass does not apply the dropout of the forward pass",
              kept_of_scores=["ignored", "applied"], kept_of_values=["ignored", "applied"],
              row_term=["saved", "own"]),
    _backward("backward_dropout_not_rescaled",
              "whose backward pass does not divide by 1 - p what dropout left",
              kept_of_scores=["not_rescaled", "applied"],
              kept_of_values=["not_rescaled", "applied"], row_term=["saved", "own"]),
    _backward("backward_partly_masked_blocks_skipped",
              "whose backward pass skips blocks that are masked in part", skipped_block=_BLOCKS),
)  # fmt: skip
