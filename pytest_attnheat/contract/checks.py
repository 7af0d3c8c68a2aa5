"""The checks of attention functions: each one function, registered where it is written.

A name, a sentence and what it needs to be declared stand above it. The checks of blocks and of
what was captured are in `block_checks`.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from pytest_attnheat.assertions.behaviour.decoding import assert_decode_matches_prefill
from pytest_attnheat.assertions.behaviour.invariance import assert_batch_independent
from pytest_attnheat.assertions.behaviour.layout import assert_layout_invariant
from pytest_attnheat.assertions.behaviour.leakage import assert_no_leakage
from pytest_attnheat.assertions.behaviour.padding import assert_padding_invariant
from pytest_attnheat.assertions.behaviour.randomness import assert_deterministic
from pytest_attnheat.assertions.precision import assert_gradients_match, assert_matches_reference
from pytest_attnheat.assertions.reproduction import assert_reproduces_output
from pytest_attnheat.assertions.rows import assert_row_stochastic
from pytest_attnheat.attention.chunks import index_of
from pytest_attnheat.contract.block_checks import BLOCK_CHECKS as BLOCK_CHECKS
from pytest_attnheat.contract.block_checks import CAPTURED_CHECKS as CAPTURED_CHECKS
from pytest_attnheat.contract.examination import (
    VALUE_DIM,
    Examination,
    Inputs,
    Skipped,
    all_of,
    check,
    declares_fully_masked,
    decodes_in_chunks,
    has_no_window,
    is_about_dtypes,
    is_refusal,
    registered,
    returns_weights,
    scattered,
    takes_causal,
    takes_dropout,
    takes_groups,
    takes_mask,
    takes_scale,
    with_a_fully_masked_row,
)
from pytest_attnheat.contract.examination import Check as Check
from pytest_attnheat.failure import Checked, Failure, Place


def _matches(
    examination: Examination, inputs: Inputs, *, gradients: bool = False, scale: float | None = None
) -> None:
    assertion = assert_gradients_match if gradients else _output_matches
    assertion(
        examination.function(inputs, scale),
        *inputs.tensors,
        **examination.seen(inputs),
        scale=examination.spec.scale if scale is None else scale,
        fully_masked=examination.spec.fully_masked,
        seed=examination.seed,
    )


def _output_matches(function: Callable[..., Tensor], *inputs: Tensor, **options: object) -> None:
    assert_matches_reference(function, *inputs, gradients=False, **options)  # type: ignore[arg-type]


@check("shape_and_dtype", "the output has the shape, dtype and device that it must have",
       quick=True)  # fmt: skip
def shape_and_dtype(examination: Examination) -> None:
    """The output has the shape of the query with the width of the value, its dtype and device."""
    inputs = examination.inputs(key_len=9, value_dim=VALUE_DIM)
    try:
        output = examination.spec.call(*inputs.tensors).output  # raises on another shape
    except Exception as error:
        if not is_refusal(error):
            raise
        output = examination.spec.call(*examination.inputs(key_len=9).tensors).output
    if output.dtype != examination.dtype or output.device != inputs.query.device:
        claim = (
            f"the output is {output.dtype} on {output.device}, the query {examination.dtype} on "
            f"{inputs.query.device}"
        )
        raise Failure("", claim)


@check("plain", "without a mask it is attention, as exactly as its dtype allows", quick=True,
       issue="labmlai/annotated_deep_learning_paper_implementations#146")  # fmt: skip
def plain(examination: Examination) -> None:
    """Query_len and key_len differ, so that neither is taken for the other."""
    _matches(examination, examination.inputs(key_len=9))


@check("masked", "under a mask it is attention", needs=takes_mask, quick=True,
       issue="huggingface/pytorch-image-models#2236")  # fmt: skip
def masked(examination: Examination) -> None:
    """Each batch entry has its own mask."""
    _matches(examination, examination.inputs(key_len=9, mask=scattered))


@check("causal", "with is_causal it is causal attention", needs=takes_causal, quick=True,
       issue="keras-team/keras#23038")  # fmt: skip
def causal(examination: Examination) -> None:
    """As many queries as keys: the alignment does not matter."""
    _matches(examination, examination.inputs(causal=True))


@check("causal_rectangular", "is_causal is aligned as declared where lengths differ",
       needs=takes_causal, quick=True, issue="pytorch/pytorch#103082")  # fmt: skip
def causal_rectangular(examination: Examination) -> None:
    """More keys than queries, and the other way round where both are usual."""
    _matches(examination, examination.inputs(query_len=5, key_len=9, causal=True))
    if examination.spec.causal == "top_left":
        _matches(examination, examination.inputs(query_len=9, key_len=5, causal=True))


@check("masked_and_causal", "a mask and is_causal at once hide what either hides",
       needs=all_of(takes_causal, takes_mask), quick=True)  # fmt: skip
def masked_and_causal(examination: Examination) -> None:
    """Both at once, where they are not refused."""
    inputs = examination.inputs(mask=scattered, causal=True)
    try:
        examination.function(inputs)(*inputs.tensors)
    except (RuntimeError, TypeError, ValueError, NotImplementedError) as error:
        if is_about_dtypes(error):
            raise
        raise Skipped(f"it refuses a mask together with is_causal: {error}") from None
    _matches(examination, inputs)


@check("scale_argument", "scale multiplies the scores", needs=takes_scale)
def scale_argument(examination: Examination) -> None:
    """A scale of 0.7, where it has the argument."""
    _matches(examination, examination.inputs(key_len=9), scale=0.7)


@check("fully_masked", "a query that may attend to nothing gives what is declared",
       needs=all_of(declares_fully_masked, takes_mask), quick=True,
       issue="pytorch/pytorch#103963")  # fmt: skip
def fully_masked(examination: Examination) -> None:
    """One query of several may attend to nothing."""
    _matches(examination, examination.inputs(mask=with_a_fully_masked_row))


@check("grouped", "grouped heads share keys in the order of repeat_interleave", needs=takes_groups,
       quick=True, issue="fkodom/grouped-query-attention-pytorch#5")  # fmt: skip
def grouped(examination: Examination) -> None:
    """Two heads of keys for four of queries."""
    _matches(examination, examination.inputs(key_heads=2, causal=examination.spec.takes_causal))


@check("large_scores", "large scores do not overflow", quick=True,
       issue="huggingface/transformers#17306")  # fmt: skip
def large_scores(examination: Examination) -> None:
    """Scores of a few hundred: exp of them overflows in every dtype but float64."""
    _matches(examination, examination.inputs(size=40.0))


@check("block_lengths", "lengths around the size of a block are no exception")
def block_lengths(examination: Examination) -> None:
    """Around multiples of 32, 64 and 128: without a mask, with one, and causal."""
    for length in (33, 65) if examination.quick else (31, 33, 63, 65, 127, 129):
        _matches(examination, examination.inputs(query_len=length))
        if examination.spec.mask is not None:
            _matches(examination, examination.inputs(query_len=length, mask=scattered))
        if examination.spec.takes_causal:
            _matches(examination, examination.inputs(query_len=length, causal=True))


@check("gradients", "its gradients are those of attention")
def gradients(examination: Examination) -> None:
    """Of query, key and value, for a random gradient of the output."""
    _matches(examination, examination.inputs(key_len=9), gradients=True)


@check("gradients_masked", "gradients are right under a mask, and finite where it hides all",
       needs=takes_mask, issue="pytorch/pytorch#103963")  # fmt: skip
def gradients_masked(examination: Examination) -> None:
    """With a query that may attend to nothing."""
    _matches(examination, examination.inputs(mask=with_a_fully_masked_row), gradients=True)


@check("no_leakage", "no output depends on what it must not see, and each on what it must",
       issue="ml-explore/mlx#2835")  # fmt: skip
def no_leakage(examination: Examination) -> None:
    """Future keys, other queries, heads and batch entries."""
    inputs = examination.inputs(causal=examination.spec.takes_causal)
    assert_no_leakage(examination.function(inputs), *inputs.tensors, may_see=inputs.may_see)


@check("no_leakage_through_mask", "no output depends on a key that the mask hides",
       needs=takes_mask, issue="TransformerLensOrg/TransformerLens#1005")  # fmt: skip
def no_leakage_through_mask(examination: Examination) -> None:
    """Each batch entry has its own mask."""
    inputs = examination.inputs(mask=scattered)
    assert_no_leakage(examination.function(inputs), *inputs.tensors, may_see=inputs.may_see)


@check("padding", "padding that the mask hides changes nothing",
       needs=all_of(takes_mask, has_no_window),
       issue="TransformerLensOrg/TransformerLens#1005")  # fmt: skip
def padding(examination: Examination) -> None:
    """On the right and on the left, of any content."""
    inputs = examination.inputs(mask=scattered)
    assert_padding_invariant(examination.spec, *inputs.tensors, attn_mask=inputs.mask)


@check("batch", "a sample gives the same output alone and in a batch",
       issue="PetrochukM/PyTorch-NLP#2")  # fmt: skip
def batch(examination: Examination) -> None:
    """Up to four samples alone, and all in another order."""
    inputs = examination.inputs(key_len=9)
    assert_batch_independent(examination.spec, *inputs.tensors)


@check("decoding", "decoded in chunks it gives what it gives at once",
       needs=all_of(takes_causal, decodes_in_chunks))  # fmt: skip
def decoding(examination: Examination) -> None:
    """Token by token, and in chunks."""
    inputs = examination.inputs(causal=True)
    if examination.spec.causal == "bottom_right":
        assert_decode_matches_prefill(
            _own_causal(examination), *inputs.tensors, alignment=examination.spec.causal
        )
    else:
        assert_decode_matches_prefill(examination.spec, *inputs.tensors)


def _own_causal(examination: Examination) -> Callable[..., Tensor]:
    """The subject told `is_causal` as it means it; a specification means the top left by it."""

    def subject(query: Tensor, key: Tensor, value: Tensor, is_causal: bool = False) -> Tensor:
        return examination.spec.call(query, key, value, causal=is_causal).output

    return subject


@check("layout", "strides of the inputs change nothing", issue="pytorch/pytorch#181133")
def layout(examination: Examination) -> None:
    """Permuted, strided, expanded and misaligned inputs."""
    assert_layout_invariant(examination.spec, *examination.inputs(key_len=9).tensors)


@check("repeats", "the same input gives the same output", quick=True,
       issue="pytorch/pytorch#124464")  # fmt: skip
def repeats(examination: Examination) -> None:
    """In evaluation mode, whatever the random state."""
    examination.refuse_training()
    assert_deterministic(examination.spec, *examination.inputs(key_len=9).tensors)


@check("dropout", "dropout drops the declared share of weights, and rescales the others",
       needs=takes_dropout)  # fmt: skip
def dropout(examination: Examination) -> None:
    """Its share, its independence, its scale."""
    runs = 40 if examination.quick else 200
    inputs = examination.inputs(query_len=32)
    assert_deterministic(examination.spec, *inputs.tensors, dropout=0.25, runs=runs)


@check("returned_weights", "the weights it returns are those that made the output",
       needs=returns_weights, issue="pytorch/pytorch#27968")  # fmt: skip
def returned_weights(examination: Examination) -> None:
    """They are distributions, and times the value they give the output."""
    inputs = examination.inputs(key_len=9)
    answer = examination.spec.call(*inputs.tensors)
    weights = answer.weights
    if not isinstance(weights, Tensor):
        raise Failure("", f"the weights are a {type(weights).__name__}, no tensor")
    assert_row_stochastic(weights)
    if examination.spec.returns == "averaged":
        _assert_averaged(weights, inputs, examination.spec.scale)
    else:
        assert_reproduces_output(weights, inputs.value, answer.output)


def _assert_averaged(weights: Tensor, inputs: Inputs, scale: float | None) -> None:
    scale = inputs.query.shape[-1] ** -0.5 if scale is None else scale
    scores = inputs.query.double() @ inputs.key.double().mT * scale
    mean = scores.softmax(-1).mean(1)
    if weights.shape != mean.shape:
        claim = f"the weights are {tuple(weights.shape)}, averaged over heads {tuple(mean.shape)}"
        raise Failure("", claim)
    off = (weights.double() - mean).abs().nan_to_num(nan=torch.inf)
    allowed = 4 * torch.finfo(inputs.query.dtype).eps
    if bool((off <= allowed).all()):
        return
    worst = index_of(off.argmax(), off.shape)
    found, wanted = float(weights[worst]), float(mean[worst])
    raise Failure(
        "",
        "weights are not the mean of those of the heads",
        broken=int((off > allowed).sum()),
        of=off.numel(),
        worst=Place(f"weights{[*worst]} is {found:.6g}, the mean {wanted:.6g}", worst, found),
        tensor=Checked.of(weights),
        tolerance=allowed,
    )


CHECKS: tuple[Check, ...] = registered("function")
