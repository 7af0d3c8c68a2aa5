"""The checks of attention functions: each one function, registered where it is written.

A name, a sentence and what it needs to be declared stand above it. The checks of blocks and of
what was captured are in `block_checks`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ..assertions.behaviour.decoding import assert_decode_matches_prefill
from ..assertions.behaviour.invariance import assert_batch_independent
from ..assertions.behaviour.layout import assert_layout_invariant, check_unwritten, versions_of
from ..assertions.behaviour.leakage import assert_no_leakage
from ..assertions.behaviour.padding import assert_padding_invariant
from ..assertions.behaviour.randomness import assert_deterministic
from ..assertions.precision import assert_gradients_match
from ..assertions.reproduction import assert_reproduces_output
from ..assertions.rows import assert_row_stochastic
from ..attention.call import Call
from ..attention.chunks import index_of
from ..attention.computation import reference
from ..attention.drawing import RAGGED, SAME, WINDOWS
from ..attention.levels import NONE, OPTIONS, STORED, Choice, text_of
from ..attention.shards import Shards
from ..attention.storage import UNUSED
from ..failure import Checked, Failure, Place
from .block_checks import BLOCK_CHECKS as BLOCK_CHECKS
from .block_checks import CAPTURED_CHECKS as CAPTURED_CHECKS
from .combinations import ask_pairs
from .examination import Check as Check
from .examination import Examination, Skipped, check, is_about_dtypes, registered
from .needs import (
    Need,
    all_of,
    declares_fully_masked,
    decodes_in_chunks,
    has_gradients,
    has_no_positions,
    keeps_strides,
    may_be_causal,
    reads_a_cache,
    returns_lse,
    returns_weights,
    takes_causal,
    takes_dropout,
    takes_float_mask,
    takes_groups,
    takes_mask,
    takes_option,
    takes_several_lengths,
)
from .returned import judge_lse
from .sharded import judge_dropout_of_ranks
from .spec import AttentionSpec

# Query heads to a key head: more than the tiles of 16 that kernels take them in, and no multiple.
_MANY = 24
# What each level of a call needs to be declared.
_NEEDS: dict[str, Need] = {
    "mask": takes_mask, "fill": takes_float_mask, "empty": declares_fully_masked,
    "causal": takes_causal, "group": takes_groups, "gradients": has_gradients,
    "ragged": takes_several_lengths, **dict.fromkeys(STORED, reads_a_cache),
    **{name: takes_option(name) for name in OPTIONS},
}  # fmt: skip


def _unmet(levels: Mapping[str, Any], spec: AttentionSpec) -> str | None:
    """Why a call with some levels cannot be asked; None if it can."""
    asked = {name for name, level in levels.items() if level is not False}
    return all_of(*(need for name, need in _NEEDS.items() if name in asked))(spec)


def _judged(
    name: str, sentence: str, about: str, *calls: dict[str, Any], refused: bool = False, **more: Any
) -> None:
    """Register the check that judges some calls, by their levels; `about` says what they are."""
    # It asks those that can be asked, and for the output alone unless they say more. They may be
    # `refused` in any words.

    def needs(spec: AttentionSpec) -> str | None:
        reasons = [_unmet(levels, spec) for levels in calls]
        return None if None in reasons else reasons[0]

    def run(examination: Examination) -> None:
        asked, reasons = [], []
        for levels in calls:
            try:
                asked.append(examination.choice(**{"gradients": NONE, **levels}))
            except Skipped as reason:
                reasons.append(reason)
        if not asked:
            raise reasons[0]
        for chosen in asked:
            if refused:
                _ask(examination, chosen)
            if chosen["group"] < _MANY or _takes(examination, chosen):
                examination.judge(chosen)

    run.__doc__ = about
    needy = any(level in _NEEDS for levels in calls for level in levels)
    check(name, sentence, needs=needs if needy else None, **more)(run)


def _takes(examination: Examination, chosen: Choice) -> bool:
    """Whether it takes more query heads to a key head than kernels need to have room for."""
    declared = examination.space.declared
    if declared.heads is not None or declared.few_shapes:
        return False
    try:
        _ask(examination, chosen)
    except Skipped:
        return False
    return True


def _ask(examination: Examination, chosen: Choice) -> None:
    """Ask for something besides, which is skipped if the subject raises any error."""
    try:
        examination.spec.ask(examination.drawn(chosen))
    except Exception as error:
        if is_about_dtypes(error):
            raise
        said = text_of(examination.space.named(chosen))
        raise Skipped(f"it refuses {said}: {error}") from None


@check("shape_and_dtype", "the output has the shape, dtype and device that it must have",
       quick=True)  # fmt: skip
def shape_and_dtype(examination: Examination) -> None:
    """The output has the shape of the query with the width of the value, its dtype and device."""
    call = examination.case()
    output = examination.spec.ask(call).output  # raises on another shape
    if output.dtype != examination.dtype or output.device != call.query.device:
        claim = (
            f"the output is {output.dtype} on {output.device}, the query {examination.dtype} on "
            f"{call.query.device}"
        )
        raise Failure("", claim)


_judged("plain", "without a mask it is attention, as exactly as its dtype allows",
        "Query_len and key_len differ, so that neither is taken for the other.", {}, quick=True,
        issue="labmlai/annotated_deep_learning_paper_implementations#146")  # fmt: skip
_judged("masked", "under a mask it is attention", "Each batch entry has its own mask.",
        {"mask": "boolean"}, quick=True,
        issue="huggingface/pytorch-image-models#2236")  # fmt: skip
_judged("float_mask", "a mask of floats is added to the scores",
        "Finite biases, and -inf where a key is hidden.", {"mask": "additive", "fill": "finite"},
        {"mask": "additive", "fill": "-inf"}, quick=True,
        issue="huggingface/transformers#38094")  # fmt: skip
_judged("causal", "with is_causal it is causal attention",
        "As many queries as keys: the alignment does not matter.",
        {"causal": True, "sizes": (7, 7)}, quick=True,
        issue="keras-team/keras#23038")  # fmt: skip
_judged("causal_rectangular", "is_causal is aligned as declared where lengths differ",
        "More keys than queries, and the other way round.", {"causal": True, "sizes": (5, 7)},
        {"causal": True, "sizes": (9, 5)}, refused=True, quick=True,
        issue="pytorch/pytorch#103082")  # fmt: skip
_judged("masked_and_causal", "a mask and is_causal at once hide what either hides",
        "Both at once, where they are not refused.",
        {"mask": "boolean", "causal": True, "sizes": (7, 7)}, refused=True,
        quick=True)  # fmt: skip
_judged("scale_argument", "scale multiplies the scores",
        "A scale of 0.7 and one below 0, where it has the argument.", {"scale": 0.7},
        {"scale": -0.4})  # fmt: skip
_judged("fully_masked", "a query that may attend to nothing gives what is declared",
        "One query of several may attend to nothing.", {"mask": "boolean", "empty": True},
        quick=True, issue="pytorch/pytorch#103963")  # fmt: skip
_judged("grouped", "grouped heads share keys in the order of repeat_interleave",
        "Two and more query heads for one of keys.", {"group": 2}, {"group": 3}, {"group": 4},
        {"group": _MANY, "sizes": (3, 7)},
        quick=True, issue="fkodom/grouped-query-attention-pytorch#5")  # fmt: skip
_judged("large_scores", "where scores are large it is attention",
        "Scores of a few hundred: exp of them overflows in every dtype but float64.",
        {"numbers": "large"}, quick=True, issue="huggingface/transformers#17306")  # fmt: skip


@check("block_lengths", "at lengths around the size of a block it is attention")
def block_lengths(examination: Examination) -> None:
    """Around multiples of 32, 64 and 128, few queries of many keys, and beyond a wide window."""
    declared = examination.space.declared
    heads = min(declared.levels()["key_heads"])
    few = {"batch": 1} | ({"key_heads": heads} if declared.heads is None else {})
    long = [sizes for sizes in declared.levels()["sizes"] if max(sizes) > 30]
    if not long:
        raise Skipped(f"it is declared for at most {declared.longest} queries and keys")
    behind = next(iter(examination.spec.sides), 0) or 0
    if behind >= max(max(sizes) for sizes in long):  # it would hide nothing
        from_the_end = declared.from_the_end and not declared.square
        wide = (3 if from_the_end else behind + 5, behind + 5)
        long += [wide] if declared.possible({"sizes": wide, **few}) else []
    for sizes in long:
        examination.judge(examination.choice(sizes=sizes, gradients=NONE, **few))


# Beside pages of the usual size, each thing that may be special of a cache.
_STORED: tuple[dict[str, Any], ...] = (
    *({"unused": unused} for unused in UNUSED), {"append": 1}, {"append": 3},
    {"shared": True, "append": 3}, {"left": True, "pages": 0}, {"pages": 256},
    {"lengths": True}, {"ragged": "unequal"},
)  # fmt: skip

for _name, _sentence, _calls in (
    ("softcap", "softcap bounds the scores before the mask",
     [{"softcap": True, **hides} for hides in ({}, {"mask": "boolean"}, {"causal": True})]),
    ("sinks", "a sink joins the sum of each row, and has no value", [{"sinks": True}]),
    ("alibi", "a score falls with the distance of query and key",
     [{"alibi": True}, {"alibi": True, "key_heads": 3}]),
    ("bias", "a bias is added to the scores", [{"bias": True}]),
    ("documents", "a query sees its own document alone", [{"documents": True, "sizes": (7, 7)}]),
    ("lengths", "a batch entry sees as many keys as its length says",
     [{"lengths": True}, {"lengths": "empty"}]),
    ("window", "a window hides what is outside of it, and nothing else",
     [{"window": side, "causal": causal} for causal in (False, True) for side in WINDOWS]),
    ("chunk", "a query sees its own chunk alone",
     [{"chunk": True, "causal": causal} for causal in (False, True)]),
    ("ragged", "each sequence of a call is attention of its own, however long the others are",
     [{"ragged": kind, "causal": causal} for causal in (False, True)
      for kind in (*RAGGED[1:], *SAME[1:])]),
    ("stored", "of a cache it reads what a sequence has stored there, and writes what is appended",
     [{"sizes": sizes, "causal": causal, "batch": 3, **stored} for causal in (False, True)
      for sizes in ((1, 33), (5, 33)) for stored in _STORED]),
):  # fmt: skip
    _judged(_name, _sentence, f"With {_name}, all else ordinary.", *_calls, quick=True)
_judged("gradients", "its gradients are those of attention",
        "Of query, key and value, for a random gradient of the output.",
        {"gradients": "all"})  # fmt: skip
_judged("gradients_masked", "gradients are right under a mask, and finite where it hides all",
        "With a query that may attend to nothing, if it is declared what that gives.",
        {"mask": "boolean", "empty": True, "gradients": "all"},
        {"mask": "boolean", "gradients": "all"}, issue="pytorch/pytorch#103963")  # fmt: skip


@check("pairs", "any two declared features are right together")
def pairs(examination: Examination) -> str:
    """Output and gradients of few calls in which every pair of levels occurs."""
    return ask_pairs(examination)


@check("no_leakage", "each output depends on all that it may see, and on that alone",
       issue="ml-explore/mlx#2835")  # fmt: skip
def no_leakage(examination: Examination) -> None:
    """Future keys, other queries, heads and batch entries."""
    causal = examination.spec.takes_causal
    _assert_no_leakage(examination, examination.case(causal=causal, sizes=(7, 7)))


@check("no_leakage_through_mask", "each output depends on keys alone that the mask shows",
       needs=takes_mask, issue="TransformerLensOrg/TransformerLens#1005")  # fmt: skip
def no_leakage_through_mask(examination: Examination) -> None:
    """Each batch entry has its own mask."""
    _assert_no_leakage(examination, examination.case(mask="boolean", sizes=(7, 7)))


def _assert_no_leakage(examination: Examination, call: Call) -> None:
    told = {"attn_mask": call.mask, "is_causal": call.causal or None}
    given: dict[str, Any] = {name: one for name, one in told.items() if one is not None}
    assert_no_leakage(examination.spec, *call.tensors, **given)


@check("padding", "with padding that the mask hides, the output is what it is without",
       needs=all_of(takes_mask, has_no_positions),
       issue="TransformerLensOrg/TransformerLens#1005")  # fmt: skip
def padding(examination: Examination) -> None:
    """On the right and on the left, of any content."""
    call = examination.case(mask="boolean", sizes=(7, 7))
    if examination.space.declared.square:
        raise Skipped("it takes as many keys as queries alone")
    assert_padding_invariant(_of_whole_masks(examination), *call.tensors, attn_mask=call.mask)


def _of_whole_masks(examination: Examination) -> AttentionSpec:
    """The specification for an assertion that spells masks out, of a subject that may not."""
    spec = examination.spec
    if spec.mask is None or spec.mask_shape is not None:
        return spec
    try:
        whole = {"mask": "boolean", "shape": "(B, H, L, S)", "sizes": (7, 7)}
        _ask(examination, examination.choice(**whole))
    except Skipped:
        return replace(spec, mask_shape="(B, 1, L, S)")
    return spec


@check("batch", "a sample gives the same output alone and in a batch",
       issue="PetrochukM/PyTorch-NLP#2")  # fmt: skip
def batch(examination: Examination) -> None:
    """Up to four samples alone, and all in another order."""
    assert_batch_independent(examination.spec, *examination.case(batch=3).tensors)


@check("decoding", "decoded in chunks it gives what it gives at once",
       needs=all_of(may_be_causal, decodes_in_chunks))  # fmt: skip
def decoding(examination: Examination) -> None:
    """Token by token, and in chunks."""
    if examination.space.declared.square:
        raise Skipped("it takes as many keys as queries alone")
    call = examination.case(causal=examination.spec.takes_causal, sizes=(7, 7))
    assert_decode_matches_prefill(_of_whole_masks(examination), *call.tensors)


@check(
    "layout",
    "whatever the strides of the inputs, the output is the same",
    needs=keeps_strides,
    issue="pytorch/pytorch#181133",
)
def layout(examination: Examination) -> None:
    """Permuted, strided, expanded and misaligned inputs, masks as well where values are as wide."""
    assert_layout_invariant(examination.spec, *examination.case().tensors)
    # Public kernels say how a mask has to lie, and refuse another one.
    masked = examination.spec.mask is not None and examination.spec.convention is None
    try:
        call = examination.case(value_dim="equal", **({"mask": "boolean"} if masked else {}))
    except Skipped:
        return
    given: dict[str, Any] = {} if call.mask is None else {"attn_mask": call.mask}
    assert_layout_invariant(_of_whole_masks(examination), *call.tensors, **given)


@check("repeats", "the same input gives the same output, and stays as it is", quick=True,
       issue="pytorch/pytorch#124464")  # fmt: skip
def repeats(examination: Examination) -> None:
    """In evaluation mode, whatever the random state; what was given and answered stays as it is."""
    examination.refuse_training()
    call = examination.case()
    given = dict(zip(("query", "key", "value"), call.tensors, strict=True))
    held, versions = {name: one.clone() for name, one in given.items()}, versions_of(given)
    answer = examination.spec.ask(call).output
    before = answer.detach().clone()
    check_unwritten(given, held, versions, assertion="")
    assert_deterministic(examination.spec, *call.tensors)
    examination.spec.ask(replace(call, value=-call.value))
    if not torch.equal(answer.nan_to_num(), before.nan_to_num()):
        raise Failure(
            "",
            "an answer changes when the subject is called again",
            cause="it returns the same memory at each call, and writes the next answer into it",
            tensor=Checked.of(before),
        )


@check("dropout", "dropout drops the declared share of weights, and rescales the others",
       needs=takes_dropout)  # fmt: skip
def dropout(examination: Examination) -> None:
    """Its share, its independence, its scale."""
    if isinstance(examination.spec.sharding, Shards):
        judge_dropout_of_ranks(examination, examination.spec.sharding)
    runs = 40 if examination.quick else 200
    alike = examination.space.declared.levels()["value_dim"] == ("equal",)
    # The weights are read off values that are an identity matrix, twice.
    sizes = {"sizes": (32, 32), "head_dim": 64} if alike else {"sizes": (33, 33)}
    call = examination.case(**sizes)
    assert_deterministic(examination.spec, *call.tensors, dropout=0.25, runs=runs)


@check("dropout_gradients", "gradients are those of what dropout left",
       needs=all_of(has_gradients, takes_dropout))  # fmt: skip
def dropout_gradients(examination: Examination) -> None:
    """Beside differences of the output, from one seed."""
    if examination.dtype not in (torch.float32, torch.float64):
        raise Skipped("differences of the output need float32 or float64")
    examination.refuse_training()
    try:
        assert_gradients_match(examination.spec, *examination.case().tensors, dropout_p=0.25)
    except ValueError as reason:
        raise Skipped(str(reason)) from None


@check("returned_lse", "the log-sum-exp it returns is that of its scores", needs=returns_lse)
def returned_lse(examination: Examination) -> str:
    """Its shape, its base and whether it has the sink in it are found out."""
    return judge_lse(examination)


@check("returned_weights", "the weights it returns are those that made the output",
       needs=returns_weights, issue="pytorch/pytorch#27968")  # fmt: skip
def returned_weights(examination: Examination) -> None:
    """They are distributions, and times the value they give the output."""
    call = examination.case()
    answer = examination.spec.ask(call)
    weights = answer.besides
    if not isinstance(weights, Tensor):
        raise Failure("", f"the weights are a {type(weights).__name__}, no tensor")
    # A sink has a part of each row, and weights that are rounded sum to 1 no more.
    sums = call.sinks is None and call.rounded is None and bool(call.visible().any(-1).all())
    if sums:
        assert_row_stochastic(weights)
    if examination.spec.returns == "averaged":
        _assert_averaged(weights, call)
    else:
        assert_reproduces_output(weights, call.value, answer.output)


def _assert_averaged(weights: Tensor, call: Call) -> None:
    mean = reference(call, wanted=("weights",)).exact["weights"].mean(1)
    if weights.shape != mean.shape:
        claim = f"the weights are {tuple(weights.shape)}, averaged over heads {tuple(mean.shape)}"
        raise Failure("", claim)
    off = (weights.double() - mean).abs().nan_to_num(nan=torch.inf)
    allowed = 4 * torch.finfo(call.query.dtype).eps
    if bool((off <= allowed).all()):
        return
    worst = index_of(off.argmax(), off.shape)
    found, wanted = float(weights[worst]), float(mean[worst])
    raise Failure(
        "", "weights are not the mean of those of the heads", broken=int((off > allowed).sum()),
        of=off.numel(),
        worst=Place(f"weights{[*worst]} is {found:.6g}, the mean {wanted:.6g}", worst, found),
        tensor=Checked.of(weights), tolerance=allowed,
    )  # fmt: skip


CHECKS: tuple[Check, ...] = registered("function")
