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

from pytest_attnheat.attention.decisions import Natural, Plan
from pytest_attnheat.attention.misreadings import BLOCKS, IGNORED

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
        form_of: A simpler defect, which is named in its place where it gives the same output.
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
    form_of: str = ""
    backward: bool = False

    def change(self, plan: Plan) -> Plan:
        """Return the plan with this defect, in its most usual form."""
        return self.changes[0](plan) if self.changes else plan


def changes_of(**choices: Any) -> tuple[Change, ...]:
    """Return a change for each combination; a list holds choices, anything else is the only one."""
    lists = [choice if isinstance(choice, list) else [choice] for choice in choices.values()]
    return tuple(_setting(dict(zip(choices, chosen, strict=True))) for chosen in product(*lists))


def _defect(
    name: str, sentence: str, issue: str | None = None, *, seen: Seen = "exactly",
    form_of: str = "", **choices: Any
) -> Defect:  # fmt: skip
    """A defect with one change for each combination of some decisions of a plan."""
    return Defect(name, sentence, changes_of(**choices) if choices else (), issue, seen, form_of)


def _setting(fields: dict[str, Any]) -> Change:
    named = fields.pop("misread", ())
    more = frozenset([named] if isinstance(named, str) else named)
    return lambda plan: replace(plan, misread=plan.misread | more, **fields)


# Rows that the defect leaves without keys: as declared, or what the numbers then give.
_ROWS: list[Natural | None] = [None, "natural"]
ROWS: tuple[Natural, ...] = ("zero", "uniform", "nan", "natural")
_COVERS = ["all", "mask", "causal"]
_SLICES = ["nan", "zero", "uniform"]
_BLOCKS = list(BLOCKS)
_PARTS = [-1, -2, 4, 16, 64, 128]
# Whether fewer keys than one block are dropped as well: those of the small cases.
_SHORT = ["whole", "short"]
_EMPTY = ["zero", "nan"]
_FIRST = [16, 32, 64, 128, 256, 512]

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
            "a later block raises the maximum", part=_BLOCKS, merging="output",
            fully_masked=_ROWS),
    _defect("online_sum_not_rescaled",
            "whose softmax takes keys block by block and does not rescale the sum so far when a "
            "later block raises the maximum", part=_BLOCKS, merging="sum",
            fully_masked=_ROWS),
    _defect("online_never_rescaled",
            "whose softmax takes keys block by block and rescales neither the output nor the sum "
            "so far when a later block raises the maximum", part=_BLOCKS, merging="both",
            fully_masked=_ROWS),
    _defect("hard_maximum", "whose weights are 1 at the largest score and 0 elsewhere",
            normaliser="hard", fully_masked=_ROWS),
    _defect("mean_of_values", "whose output is the mean of the values: its weights are all equal",
            normaliser="uniform", misread=[(), "no rules"]),
    _defect("base_two", "whose softmax raises 2, not e, to the scores (exp2 without log2(e))",
            temperature=math.log(2.0)),
)  # fmt: skip

_SCALE = (
    _defect("scale_missing", "whose scores are not scaled", misread="scale missing"),
    _defect("scale_squared", "whose scores are scaled twice (divided by head_dim, not by its root)",
            misread="scale squared"),
    _defect("scale_inverted",
            "whose scores are divided by the scale, not multiplied: times sqrt(head_dim)",
            "esceptico/perceiver-io#9", misread="scale inverse"),
    _defect("scale_from_value_width", "whose scale is taken from the width of the values",
            misread="scale of value_width"),
    _defect("scale_from_embedding",
            "whose scale is taken from the whole embedding, heads * head_dim",
            "Graylab/DL4Proteins-notebooks#12", misread="scale of embedding"),
    _defect("scale_from_key_len", "whose scale is taken from the number of keys",
            misread="scale of key_len"),
    _defect("scale_from_query_len", "whose scale is taken from the number of queries",
            misread="scale of query_len"),
    _defect("scale_from_heads", "whose scale is taken from the number of heads",
            misread="scale of heads"),
    _defect("scale_absolute", "that takes the absolute value of a negative scale",
            misread="scale absolute"),
    _defect("scale_argument_ignored", "that ignores the scale it is given",
            misread="scale default"),
    _defect("scale_after_softmax", "whose scale is applied after the softmax",
            "FrancescoSaverioZuppichini/ViT#2", scale_after=True),
    _defect("temperature", "whose scores are {constant:.6g} times what they should be",
            seen="fitted"),
    _defect("output_factor", "whose output is {constant:.6g} times what it should be",
            seen="fitted"),
)  # fmt: skip

_MASK = (
    _defect("mask_inverted", "whose mask is inverted: it attends exactly where it may not",
            "lucidrains/x-transformers#160", misread="mask inverted", fully_masked=_ROWS),
    _defect("mask_ignored", "that ignores the mask", "TransformerLensOrg/TransformerLens#1005",
            misread="no mask"),
    _defect("mask_transposed", "whose mask is transposed", misread="mask transposed",
            fully_masked=_ROWS),
    _defect("mask_of_another_sample",
            "whose samples use the mask of the sample before or after them",
            misread=["mask rolled", "mask rolled back"], fully_masked=_ROWS),
    _defect("mask_of_first_sample", "whose samples all use the mask of the first one",
            misread="mask first sample", fully_masked=_ROWS),
    _defect("mask_of_first_head", "whose heads all use the mask of the first one",
            misread="mask first head", fully_masked=_ROWS),
    _defect("mask_tiled_over_heads",
            "whose mask is repeated over heads in the order of samples (repeat, not "
            "repeat_interleave)", misread="mask tiled", fully_masked=_ROWS),
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
            together="causal_only", form_of="mask_ignored"),
    _defect("causal_ignored_with_mask", "that is not causal when a mask is given as well",
            together="mask_only", form_of="causal_ignored"),
)  # fmt: skip

# Before what is causal: of a window that becomes causal, the window is at fault.
_WINDOW = (
    _defect("window_ignored", "without its window", misread="no window"),
    _defect("window_other_corner", "whose window is counted from the other corner",
            misread="window elsewhere", fully_masked=_ROWS),
    _defect("window_left_too_wide_with_cache",
            "whose window reaches one key too far to the left, but only where there are more keys "
            "than queries, as with a cache", misread="window (1, 0) decoding",
            form_of="window_left_too_wide"),
    _defect("window_left_too_narrow_with_cache",
            "whose window misses its last key on the left, but only where there are more keys "
            "than queries, as with a cache", misread="window (-1, 0) decoding",
            fully_masked=_ROWS, form_of="window_left_too_narrow"),
    _defect("window_swapped", "whose window has its left and right sides exchanged",
            misread="window swapped", fully_masked=_ROWS),
    _defect("window_left_too_wide", "whose window reaches one key too far to the left",
            "huggingface/transformers#39408", misread="window (1, 0)"),
    _defect("window_left_too_narrow", "whose window misses its last key on the left",
            misread="window (-1, 0)", fully_masked=_ROWS),
    _defect("window_right_too_wide", "whose window reaches one key too far to the right",
            misread="window (0, 1)"),
    _defect("window_right_too_narrow", "whose window misses its last key on the right",
            misread="window (0, -1)", fully_masked=_ROWS),
)  # fmt: skip

_CAUSAL = (
    _defect("causal_ignored", "that is not causal when asked to be", misread="no causal"),
    _defect("causal_always", "that is causal without being asked", misread="causal"),
    _defect("causal_other_corner",
            "whose causal mask is aligned to the other corner (top left, bottom right)",
            "pytorch/pytorch#103082", causal=["other_corner", "other_corner_alone"],
            fully_masked=_ROWS),
    _defect("causal_sees_next", "whose queries see one key too many: the next one", causal_shift=1),
    _defect("causal_misses_own", "whose queries do not see their own key, only those before",
            causal_shift=-1, fully_masked=_ROWS),
    _defect("causal_sees_next_with_cache",
            "whose queries see one key too many, the next one, but only where there are not as "
            "many keys as queries, as with a cache", causal_shift=1,
            causal_shift_where=["more_keys", "differ"], form_of="causal_sees_next"),
    _defect("causal_misses_own_with_cache",
            "whose queries do not see their own key, but only where there are not as many keys "
            "as queries, as with a cache", causal_shift=-1,
            causal_shift_where=["more_keys", "differ"], fully_masked=_ROWS,
            form_of="causal_misses_own"),
    _defect("causal_reversed", "whose queries see the future in place of the past",
            causal="reversed", causal_shift=[0, 1], fully_masked=_ROWS),
    _defect("causal_in_blocks", "whose queries see all keys up to the end of their block",
            misread=[f"causal to the end of blocks of {block}" for block in BLOCKS],
            form_of="causal_ignored"),
    _defect("causal_before_blocks",
            "whose queries see no key of their own block, only those before",
            misread=[f"causal before blocks of {block}" for block in BLOCKS], fully_masked=_ROWS),
)  # fmt: skip

# What a call may have besides, left out or misread.
_LEFT_OUT = tuple(
    _defect(f"{name}_ignored", f"that leaves out {name}", misread=f"no {name}")
    for name in IGNORED if name not in ("mask", "causal", "window")
)  # fmt: skip

_RULES = (
    _defect("chunk_off_by_one", "whose chunks are one position too long or too short",
            misread=["chunk +1", "chunk -1"]),
    _defect("chunk_other_corner", "whose chunks are counted from the other corner",
            misread="chunk elsewhere", fully_masked=_ROWS),
    _defect("prefix_off_by_one", "whose prefix is one key too long or too short",
            misread=["prefix +1", "prefix -1"], form_of="prefix_ignored"),
    _defect("sink_keys_off_by_one",
            "that always sees one first key too many or too few", misread=["sink_keys +1",
            "sink_keys -1"]),
    _defect("documents_off_by_one", "whose documents begin one key too late or too early",
            misread=["documents +1", "documents -1"], fully_masked=_ROWS),
    _defect("lengths_off_by_one", "whose samples have one real key too many or too few",
            misread=["lengths +1", "lengths -1"], fully_masked=_ROWS),
)  # fmt: skip

_SOFTCAP = (
    _defect("softcap_after_mask",
            "whose softcap comes after the mask: a masked score becomes -softcap, not -inf",
            softcap="after_mask", covers=_COVERS, fully_masked=_ROWS, form_of="softcap_after_bias"),
    _defect("softcap_after_bias", "whose softcap comes after the bias, ALiBi or score_mod",
            softcap="after_bias"),
    _defect("softcap_before_scale", "whose softcap comes before the scale", softcap="before_scale"),
    _defect("softcap_not_divided", "whose softcap is softcap * tanh(score): it is not divided by "
            "softcap before", softcap="not_divided"),
    _defect("softcap_not_multiplied", "whose softcap is tanh(score / softcap): it is not "
            "multiplied by softcap again", softcap="not_multiplied"),
)  # fmt: skip

_SINKS = (
    _defect("sinks_in_every_part", "that counts its sinks once for each part of the keys",
            misread=[f"sinks {n} times" for n in (2, 4, 8)]
            + [f"sinks in blocks of {n}" for n in BLOCKS]),
    _defect("sinks_not_shifted", "whose sinks have no maximum subtracted, as its scores have",
            sinks="not_shifted"),
    _defect("sinks_shifted_twice", "whose sinks have the maximum of the scores subtracted twice",
            sinks="twice"),
    _defect("sinks_outside_maximum",
            "whose sinks take no part in the maximum: a row that sees nothing else is NaN",
            sinks="outside", form_of="fully_masked_nan"),
    _defect("sinks_of_other_heads", "whose heads use the sink of another head, the first or the "
            "key head that serves them", misread=["sinks first head", "sinks of key heads"]),
    _defect("sinks_scaled", "whose sinks are multiplied by the scale", misread="sinks scaled"),
)  # fmt: skip

_ADDED = (
    _defect("alibi_other_corner", "whose ALiBi distances are counted from the other corner",
            misread="alibi elsewhere"),
    _defect("alibi_negative", "whose ALiBi has the wrong sign: far keys gain",
            misread="alibi negative"),
    _defect("alibi_signed", "whose ALiBi takes no absolute value: keys after the query gain",
            misread="alibi signed"),
    _defect("alibi_reversed", "whose ALiBi slopes are in the reversed order of heads",
            misread="alibi reversed"),
    _defect("alibi_of_first_head", "whose heads all use the ALiBi slope of the first one",
            misread="alibi first head"),
    _defect("alibi_off_by_one", "whose ALiBi slopes are those of the head before or after",
            misread=["alibi from 0", "alibi from 2"]),
    _defect("alibi_of_other_heads", "whose ALiBi slopes are those of another number of heads",
            misread=["alibi of more heads", "alibi of fewer heads",
                     "alibi of any number of heads"]),
    _defect("alibi_scaled", "whose ALiBi is multiplied by the scale: it is added before",
            misread="alibi scaled"),
    _defect("bias_scaled", "whose bias is multiplied by the scale: it is added before",
            misread="bias scaled"),
    _defect("bias_of_first_head", "whose heads all use the bias of the first one",
            misread="bias first head", fully_masked=_ROWS),
    _defect("bias_of_first_sample", "whose samples all use the bias of the first one",
            misread="bias first sample", fully_masked=_ROWS),
    _defect("bias_transposed", "whose bias is transposed", misread="bias transposed",
            fully_masked=_ROWS),
    _defect("bias_as_boolean",
            "that reads its bias as a boolean mask: only -inf is felt, finite numbers are not",
            misread="bias of -inf alone", form_of="bias_ignored"),
    _defect("bias_as_keep",
            "that reads its bias as a boolean mask: it attends where the bias is not 0",
            misread="bias as keep", fully_masked=_ROWS, form_of="bias_ignored"),
)  # fmt: skip

_PARTS_MERGED = (
    _defect("lse_in_base_two", "that merges parts of the keys by e ** lse, its lse in base 2",
            "sgl-project/sglang#35045", part=_PARTS, merging="two_for_e", empty_slices=_EMPTY),
    _defect("merge_in_base_two", "that merges parts of the keys by 2 ** lse, its lse in base e",
            part=_PARTS, merging="e_for_two", empty_slices=_EMPTY),
    _defect("parts_averaged", "that merges parts of the keys by their mean, whatever their sums",
            part=_PARTS, merging="mean", empty_slices=_EMPTY),
    _defect("parts_added", "that adds parts of the keys, each divided by its own sum", part=_PARTS,
            merging="added", empty_slices=_EMPTY),
    _defect("empty_parts_nan", "that gives NaN where a whole part of the keys is masked",
            part=_PARTS, merging=["first_empty", "first_two_empty", "any_empty"],
            form_of="fully_masked_nan"),
)  # fmt: skip

# What the same code was asked before comes again.
_HISTORY = (
    _defect("answer_of_earlier_call",
            "that gives the answer of an earlier call again: it knows it by its shape or address, "
            "not by its numbers", misread="earlier answer"),
    _defect("mask_of_earlier_call", "that uses the mask of an earlier call again",
            "ml-explore/mlx#3071", misread="earlier mask", fully_masked=_ROWS),
    _defect("keys_of_earlier_call", "that uses the keys and values of an earlier call again",
            misread="earlier keys"),
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
            blocks=_SHORT),
    _defect("last_block_of_keys_ignored",
            "that ignores the last keys, those after the last whole block", key_block=_BLOCKS,
            blocks=_SHORT, fully_masked=_ROWS),
    _defect("padded_keys_attended",
            "that attends to keys of zeros, with which it fills the last block of keys",
            misread=[f"padded to {block}{masked}" for block in BLOCKS
                     for masked in ("", " without a mask")]),
    _defect("first_keys_only", "that reads the first keys alone", key_block=_FIRST, blocks="first",
            fully_masked=_ROWS),
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
    *_SCALE,
    *_MASK,
    *_WINDOW,
    *_CAUSAL,
    *_LEFT_OUT,
    *_RULES,
    *_SOFTCAP,
    *_SINKS,
    *_ADDED,
    *_HISTORY,
    *_PARTS_MERGED,
    *_HEADS,
    *_TENSORS,
    *_NUMBERS,
)
