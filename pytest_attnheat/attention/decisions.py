"""The decisions that attention and its backward pass are made of; a defect is another one.

See `defects`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import product
from typing import Any, Literal, TypeAlias

import torch

Source: TypeAlias = Literal["query", "key", "value"]
Natural: TypeAlias = Literal["natural", "zero", "uniform", "nan"]


# Another call in place of what is asked; see `misreadings`, which knows what a case is.
Misreading: TypeAlias = Callable[[Any], Any]


@dataclass(frozen=True)
class Plan:
    """One decision per field; the defaults are correct attention."""

    misread: frozenset[Misreading] = frozenset()  # How it is misread, of `misreadings`
    query_from: Source = "query"  # The tensor used as queries; likewise `key_from` and `value_from`
    key_from: Source = "key"
    value_from: Source = "value"
    split: Literal["transpose", "reshape"] = "transpose"  # How heads are split off
    # How heads are merged, likewise, or "averaged"
    merge: Literal["transpose", "reshape", "averaged"] = "transpose"
    weights_of_heads: Literal["own", "averaged"] = "own"  # "own", or "averaged" over all heads
    # Which key head serves a query head: neighbours share one ("interleave"), heads take turns
    # ("tile"), all use the "first", or its number is "divided" by that of the key heads, not by the
    # size of a group
    grouping: Literal["interleave", "tile", "first", "divided"] = "interleave"
    grouped: Literal["both", "keys", "values"] = "both"  # What that is about
    in_groups_of_one: bool = False  # Whether it is where each query head has its own key head, too
    scale_after: bool = False  # Leave the scores as they are, and scale the weights
    temperature: float = 1.0  # A factor of the scores besides
    overflow: bool = False  # Whether products that float16 cannot hold become infinite in it
    products_dtype: torch.dtype | None = None  # That products of queries and keys are rounded to
    scores_dtype: torch.dtype | None = None  # The dtype that scaled scores are rounded to
    weights_dtype: torch.dtype | None = None  # The dtype that weights are rounded to
    output_dtype: torch.dtype | None = None  # The dtype that the output is rounded to
    # What is capped: scaled products ("declared"), or products "before_scale"; scores "after_bias",
    # or "after_mask" as well; or one of its two factors is missing ("not_divided",
    # "not_multiplied"), or is the score ("times_score", "times_own", "times_quotient")
    softcap: Literal[
        "declared", "before_scale", "after_bias", "after_mask", "not_divided", "not_multiplied",
        "times_score", "times_own", "times_quotient"] = "declared"  # fmt: skip
    # "declared", the "other_corner" (with all that is counted from it, or "alone"), or "reversed"
    # (the future)
    causal: Literal["declared", "other_corner", "other_corner_alone", "reversed"] = "declared"
    causal_shift: int = 0  # How many keys more a causal query sees
    # In "all" cases, where lengths "differ", or there are "more_keys"
    causal_shift_where: Literal["all", "differ", "more_keys"] = "all"
    together: Literal["both", "mask_only", "causal_only"] = "both"  # A mask and causal
    dropped_key: Literal["none", "first", "last"] = "none"  # A key that nobody attends to
    key_block: int = 0  # Keys after the last whole block of so many are ignored; 0 for none
    query_block: int = 0  # Queries after the last whole block of so many get zeros; 0 for none
    # Which blocks those are: "whole" ones, or a "short" one alone as well, or the "first" alone
    blocks: Literal["whole", "short", "first"] = "whole"
    # Keys come in parts of so many, 0 for all at once; -1 for two parts, the first no longer than
    # the second, -2 for two, no shorter; -3 (`SHARDS`) for those of each rank; -4 (`PREFIX`) for
    # the keys before those of the queries, and these
    part: int = 0
    # How parts become one: right ("exact"), or with the "output" so far, the "sum" so far or "both"
    # not brought down where a later part raises the maximum; with the wrong base of the log-sum-exp
    # ("two_for_e", "e_for_two") of "all", of the "first" or the "others", such as
    # "first:two_for_e"; by their "mean", the mean of those in which a key is seen
    # ("mean_of_seen") or "added"; or NaN where the "first_empty" part, the "first_two_empty" or
    # "any_empty" has no key
    merging: Literal[
        "exact", "output", "sum", "both", "all:two_for_e", "all:e_for_two", "first:two_for_e",
        "first:e_for_two", "others:two_for_e", "others:e_for_two", "mean", "mean_of_seen", "added",
        "first_empty", "first_two_empty", "any_empty"] = "exact"  # fmt: skip
    # How a mask is applied: by a "fill" of the scores, by a number "added", as "ones" (1 where
    # permitted, added) or "ones_masked" (1 where not), or to the weights "after" the softmax, or
    # there with a new division by the sum ("after_renormalised")
    masking: Literal["fill", "added", "ones", "ones_masked", "after", "after_renormalised"] = "fill"
    # What `masking` and `fill` are about: the "mask", "causal" (and window) or "all"; the other is
    # filled with -inf
    covers: Literal["all", "mask", "causal"] = "all"
    fill: float = -math.inf  # The number that is filled in or added
    # What the softmax runs over: "keys", "queries", "heads", "batch" or the whole "map"
    dim: Literal["keys", "queries", "heads", "batch", "map"] = "keys"
    # How scores become weights
    normaliser: Literal[
        "softmax", "no_maximum", "unnormalised", "unnormalised_shifted", "plus_one",
        "plus_one_shifted", "sigmoid", "relu", "scores", "log_softmax", "twice", "twice_masked",
        "hard", "uniform"] = "softmax"  # fmt: skip
    # How they join the sum of a row: as "declared", not in its maximum ("outside"), with no maximum
    # subtracted ("not_shifted"), or with it subtracted "twice"
    sinks: Literal["declared", "outside", "not_shifted", "twice"] = "declared"
    # What rows without permitted keys become: None for what is declared, or "natural" for what the
    # numbers give
    fully_masked: Natural | None = None
    # What softmax over nothing but -inf gives where it does not run over keys, and 0 / 0 elsewhere
    empty_slices: Literal["nan", "zero", "uniform"] = "nan"
    output_factor: float = 1.0  # A factor of the output
    masked_nan: Literal["unfelt", "felt"] = "unfelt"  # Whether NaN in values is felt
    # Whether the buffer of the output is "written", or "added_to"; or "left" for queries that see
    # nothing, or ("left_if_empty") for sequences without keys
    buffer: Literal["written", "added_to", "left", "left_if_empty"] = "written"

    @property
    def coarse(self) -> torch.dtype | None:
        """The dtype that some step is rounded to, if any is."""
        return self.products_dtype or self.scores_dtype or self.weights_dtype or self.output_dtype


@dataclass(frozen=True)
class BackwardPlan(Plan):
    """One decision per field of a backward pass, which computes the weights once more by a plan."""

    # What the weights are computed from: the scores and the "saved" logarithm of the sum of each
    # row, or the scores alone, by a softmax of its "own"
    weights_from: Literal["saved", "own"] = "saved"
    # What is subtracted from dP in each row: the sum of dO * O as "saved" by the forward pass, the
    # sum of its "own" weights times dP, "none", the sum of dO ("upstream"), or the right one of
    # another row, head or sample
    row_term: Literal[
        "saved", "own", "none", "upstream", "next_row", "previous_row", "first_row", "next_head",
        "previous_head", "first_head", "key_head", "next_sample",
        "first_sample"] = "saved"  # fmt: skip
    # What dQ and dK are multiplied by: the scale is "applied", "missing" or there "twice", or has
    # ln(2) ("base_two") or log2(e) ("base_e") too much
    gradient_scale: Literal["applied", "missing", "twice", "base_two", "base_e"] = "applied"
    # The slope of softcap, or of a function of the score
    score_slope: Literal["applied", "missing"] = "applied"
    # Which heads add up to the gradient of a key head: neighbours ("sum"), those that take turns
    # ("tile"), the "first" or "last" of the group, or their "mean"
    group_sum: Literal["sum", "tile", "first", "last", "mean"] = "sum"
    # Likewise of the dimensions in which a bias is broadcast
    bias_sum: Literal["sum", "first", "last", "mean"] = "sum"
    # Likewise of the samples and queries that a sink is felt by, or the "sample_mean"
    sink_sum: Literal["sum", "mean", "sample_mean"] = "sum"
    detached: bool = False  # Whether no gradient passes through the weights
    exchanged: bool = False  # Whether the gradients of query and key change places
    # Whether dropout is "applied" to dP, "ignored" there, or "not_rescaled"
    kept_of_scores: Literal["applied", "ignored", "not_rescaled"] = "applied"
    # Likewise of the weights that make dV
    kept_of_values: Literal["applied", "ignored", "not_rescaled"] = "applied"
    # Whose queries add up to the gradients of a key and its value: those of all ranks ("sum"), or
    # of its "own"; or they are given to the keys of the "next" or the "previous" rank
    shard_sum: Literal["sum", "own", "next", "previous"] = "sum"
    # Whether the gradient of the queries is "given", or "zero"
    queries: Literal["given", "zero"] = "given"
    # Blocks of so many queries and keys that are masked in part get nothing; 0 for none
    skipped_block: int = 0


Change: TypeAlias = Callable[[Plan], Plan]
# Constants that are found by fitting, and patterns that random numbers leave.
Seen: TypeAlias = Literal["exactly", "fitted", "rounding", "randomness", "garbage"]


@dataclass(frozen=True)
class Defect:
    """A known mistake."""

    name: str  # A short name, as of a variable
    # What attention with it does; it follows the word "attention". The fitted constant stands in
    # place of `{constant}`.
    sentence: str
    changes: tuple[Change, ...] = ()  # What it does to the plan in each form, the usual first
    issue: str | None = None  # A public issue that reports it
    # How it is found: its output is reproduced "exactly" (to within rounding), or with a constant
    # that is "fitted"; by "rounding" that another order of the same steps may do differently in a
    # few rows; by "randomness", which no plan reproduces; or with NaN as "garbage" in masked keys,
    # which correct attention may well feel
    seen: Seen = "exactly"
    # A simpler defect, or several with spaces between, one of which is named in its place where it
    # gives the same output
    form_of: str = ""
    backward: bool = False  # Whether its changes are of a `BackwardPlan`

    def change(self, plan: Plan) -> Plan:
        """Return the plan with this defect, in its most usual form."""
        return self.changes[0](plan) if self.changes else plan


def _changes(**choices: Any) -> tuple[Change, ...]:
    """One change for each combination; a list holds choices, anything else is the only one."""
    lists = [choice if isinstance(choice, list) else [choice] for choice in choices.values()]
    return tuple(_setting(dict(zip(choices, chosen, strict=True))) for chosen in product(*lists))


def defect(
    name: str, sentence: str, issue: str | None = None, *, seen: Seen = "exactly",
    form_of: str = "", **choices: Any
) -> Defect:  # fmt: skip
    """A defect with one change for each combination of some decisions of a plan."""
    return Defect(name, sentence, _changes(**choices) if choices else (), issue, seen, form_of)


def backward_defect(
    name: str, sentence: str, issue: str | None = None, *, form_of: str = "", **choices: Any
) -> Defect:
    """A defect of the backward pass alone: the output is right."""
    return Defect(name, sentence, _changes(**choices), issue, form_of=form_of, backward=True)


def _setting(fields: dict[str, Any]) -> Change:
    named = fields.pop("misread", ())
    more = frozenset([named] if callable(named) else named)
    return lambda plan: replace(plan, misread=plan.misread | more, **fields)


# Rows that the defect leaves without keys: as declared, or what the numbers then give.
ROWS: list[Natural | None] = [None, "natural"]
# Keys that come in the parts that ranks hold: each query takes those of its own rank first, then
# those of the rank before.
SHARDS = -3
# In two parts: the keys before those of the queries, such as a cache, and these.
PREFIX = -4
# The blocks that keys and queries are usually taken in, and small ones for small cases.
BLOCKS = [2, 4, 8, 16, 32, 64, 128]
