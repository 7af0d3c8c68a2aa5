"""The checks of the examination: each one function, one name and one sentence."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from pytest_attnheat.assertions.behaviour.decoding import assert_decode_matches_prefill
from pytest_attnheat.assertions.behaviour.invariance import assert_batch_independent
from pytest_attnheat.assertions.behaviour.layout import assert_layout_invariant
from pytest_attnheat.assertions.behaviour.leakage import assert_no_leakage
from pytest_attnheat.assertions.behaviour.padding import assert_padding_invariant
from pytest_attnheat.assertions.behaviour.randomness import assert_deterministic
from pytest_attnheat.assertions.behaviour.sequences import name_of_cache
from pytest_attnheat.assertions.masking import assert_masked
from pytest_attnheat.assertions.numerics.precision import (
    assert_gradients_match,
    assert_matches_reference,
)
from pytest_attnheat.assertions.reproduction import assert_reproduces_output
from pytest_attnheat.assertions.rows import assert_row_stochastic
from pytest_attnheat.attention.tolerance import row_tolerance
from pytest_attnheat.attention.vocabulary import DeclaredFullyMasked
from pytest_attnheat.capture.errors import CaptureMemoryError
from pytest_attnheat.capture.record import AttentionRecord, Statistics
from pytest_attnheat.contract.captured import diagnoses, records_of
from pytest_attnheat.contract.exam import (
    VALUE_DIM,
    Exam,
    Inputs,
    NotAskedError,
    is_about_dtypes,
    is_refusal,
    scattered,
    with_a_lost_row,
)
from pytest_attnheat.contract.spec import AttentionSpec
from pytest_attnheat.failure import Failure


@dataclass(frozen=True)
class Check:
    """One question of the examination.

    Attributes:
        name: What it is called in reports and test ids.
        sentence: What is true of an implementation that passes.
        run: Asks it; raises AssertionError where the answer is no, `NotAskedError` where the
            specification does not claim it.
        quick: Whether the quick form of the examination has it.
        issue: A public issue about a defect that it would have caught.
    """

    name: str
    sentence: str
    run: Callable[[Exam], None]
    quick: bool = False
    issue: str | None = None


def _matches(
    exam: Exam, inputs: Inputs, *, gradients: bool = False, scale: float | None = None
) -> None:
    assertion = assert_gradients_match if gradients else _output_matches
    assertion(
        exam.function(inputs, scale),
        *inputs.tensors,
        **exam.seen(inputs),
        scale=exam.spec.scale if scale is None else scale,
        fully_masked=exam.spec.fully_masked,
        seed=exam.seed,
    )


def _output_matches(function: Callable[..., Tensor], *inputs: Tensor, **options: object) -> None:
    assert_matches_reference(function, *inputs, gradients=False, **options)  # type: ignore[arg-type]


def shape_and_dtype(exam: Exam) -> None:
    """The output has the shape of the query with the width of the value, its dtype and device."""
    inputs = exam.inputs(key_len=9, value_dim=VALUE_DIM)
    try:
        output = exam.spec.call(*inputs.tensors).output  # raises on another shape
    except Exception as error:
        if not is_refusal(error):
            raise
        output = exam.spec.call(*exam.inputs(key_len=9).tensors).output
    if output.dtype != exam.dtype or output.device != inputs.query.device:
        raise AssertionError(
            f"the output is {output.dtype} on {output.device}, the query {exam.dtype} on "
            f"{inputs.query.device}"
        )


def plain(exam: Exam) -> None:
    """Query_len and key_len differ, so that neither is taken for the other."""
    _matches(exam, exam.inputs(key_len=9))


def masked(exam: Exam) -> None:
    """Each batch entry has its own mask."""
    _matches(exam, exam.inputs(key_len=9, mask=scattered))


def causal(exam: Exam) -> None:
    """As many queries as keys: the alignment does not matter."""
    _matches(exam, exam.inputs(causal=True))


def causal_rectangular(exam: Exam) -> None:
    """More keys than queries, and the other way round where both are usual."""
    _matches(exam, exam.inputs(query_len=5, key_len=9, causal=True))
    if exam.spec.causal == "top_left":
        _matches(exam, exam.inputs(query_len=9, key_len=5, causal=True))


def masked_and_causal(exam: Exam) -> None:
    """Both at once, where they are not refused."""
    inputs = exam.inputs(mask=scattered, causal=True)
    try:
        exam.function(inputs)(*inputs.tensors)
    except (RuntimeError, TypeError, ValueError, NotImplementedError) as error:
        if is_about_dtypes(error):
            raise
        raise NotAskedError(f"it refuses a mask together with is_causal: {error}") from None
    _matches(exam, inputs)


def scale_argument(exam: Exam) -> None:
    """A scale of 0.7, where it has the argument."""
    if not exam.spec.names("scale"):
        raise NotAskedError("its signature has no scale")
    _matches(exam, exam.inputs(key_len=9), scale=0.7)


def fully_masked(exam: Exam) -> None:
    """One query of several may attend to nothing."""
    if exam.spec.fully_masked == "undefined":
        raise NotAskedError('fully_masked="undefined" declares nothing')
    _matches(exam, exam.inputs(mask=with_a_lost_row))


def grouped(exam: Exam) -> None:
    """Two heads of keys for four of queries."""
    _matches(exam, exam.inputs(key_heads=2, causal=exam.spec.causal is not None))


def large_scores(exam: Exam) -> None:
    """Scores of a few hundred: exp of them overflows in every dtype but float64."""
    _matches(exam, exam.inputs(size=40.0))


def block_lengths(exam: Exam) -> None:
    """Around multiples of 32, 64 and 128: without a mask, with one, and causal."""
    for length in (33, 65) if exam.quick else (31, 33, 63, 65, 127, 129):
        _matches(exam, exam.inputs(query_len=length))
        if exam.spec.mask is not None:
            _matches(exam, exam.inputs(query_len=length, mask=scattered))
        if exam.spec.causal is not None:
            _matches(exam, exam.inputs(query_len=length, causal=True))


def gradients(exam: Exam) -> None:
    """Of query, key and value, for a random gradient of the output."""
    _matches(exam, exam.inputs(key_len=9), gradients=True)


def gradients_masked(exam: Exam) -> None:
    """With a query that may attend to nothing."""
    _matches(exam, exam.inputs(mask=with_a_lost_row), gradients=True)


def no_leakage(exam: Exam) -> None:
    """Future keys, other queries, heads and batch entries."""
    inputs = exam.inputs(causal=exam.spec.causal is not None)
    assert_no_leakage(exam.function(inputs), *inputs.tensors, may_see=inputs.may_see)


def no_leakage_through_mask(exam: Exam) -> None:
    """Each batch entry has its own mask."""
    inputs = exam.inputs(mask=scattered)
    assert_no_leakage(exam.function(inputs), *inputs.tensors, may_see=inputs.may_see)


def padding(exam: Exam) -> None:
    """On the right and on the left, of any content."""
    inputs = exam.inputs(mask=scattered)
    if exam.spec.window is not None:
        raise NotAskedError("padding on the left would move the window")
    assert_padding_invariant(exam.spec, *inputs.tensors, attn_mask=inputs.mask)


def batch(exam: Exam) -> None:
    """Up to four samples alone, and all in another order."""
    inputs = exam.inputs(key_len=9)
    assert_batch_independent(exam.spec, *inputs.tensors)


def decoding(exam: Exam) -> None:
    """Token by token, and in chunks."""
    inputs = exam.inputs(causal=True)
    if exam.spec.causal == "bottom_right":
        assert_decode_matches_prefill(
            _own_causal(exam), *inputs.tensors, alignment=exam.spec.causal
        )
    elif exam.spec.mask is None or exam.spec.window is not None:
        raise NotAskedError("a chunk cannot be told what it may see")
    else:
        assert_decode_matches_prefill(exam.spec, *inputs.tensors)


def _own_causal(exam: Exam) -> Callable[..., Tensor]:
    """The subject told `is_causal` as it means it; a specification means the top left by it."""

    def subject(query: Tensor, key: Tensor, value: Tensor, is_causal: bool = False) -> Tensor:
        return exam.spec.call(query, key, value, causal=is_causal).output

    return subject


def layout(exam: Exam) -> None:
    """Permuted, strided, expanded and misaligned inputs."""
    assert_layout_invariant(exam.spec, *exam.inputs(key_len=9).tensors)


def repeats(exam: Exam) -> None:
    """In evaluation mode, whatever the random state."""
    _refuse_training(exam)
    assert_deterministic(exam.spec, *exam.inputs(key_len=9).tensors)


def _refuse_training(exam: Exam) -> None:
    """Advise as an examination can: the assertion speaks of its own arguments."""
    if advice := exam.in_training():
        raise AssertionError(advice)


def dropout(exam: Exam) -> None:
    """Its share, its independence, its scale."""
    if not exam.spec.dropout:
        raise NotAskedError("it is not declared to take dropout_p")
    runs = 40 if exam.quick else 200
    inputs = exam.inputs(query_len=32)
    assert_deterministic(exam.spec, *inputs.tensors, dropout=0.25, runs=runs)


def returned_weights(exam: Exam) -> None:
    """They are distributions, and times the value they give the output."""
    if exam.spec.returns == "output":
        raise NotAskedError("it is declared to return no weights")
    inputs = exam.inputs(key_len=9)
    answer = exam.spec.call(*inputs.tensors)
    weights = answer.weights
    if not isinstance(weights, Tensor):
        raise AssertionError(f"the weights are a {type(weights).__name__}, no tensor")
    assert_row_stochastic(weights)
    if exam.spec.returns == "averaged":
        expected = torch.softmax(
            inputs.query.double() @ inputs.key.double().mT
            * (exam.spec.scale or inputs.query.shape[-1] ** -0.5), -1
        ).mean(1)  # fmt: skip
        torch.testing.assert_close(
            weights.double(), expected, rtol=0, atol=4 * torch.finfo(exam.dtype).eps
        )
        return
    assert_reproduces_output(weights, inputs.value, answer.output)


CHECKS: tuple[Check, ...] = (
    Check("shape_and_dtype", "the output has the shape, dtype and device that it must have",
          shape_and_dtype, quick=True),
    Check("plain", "without a mask it is attention, as exactly as its dtype allows", plain,
          quick=True, issue="labmlai/annotated_deep_learning_paper_implementations#146"),
    Check("masked", "under a mask it is attention", masked, quick=True,
          issue="huggingface/pytorch-image-models#2236"),
    Check("causal", "with is_causal it is causal attention", causal, quick=True,
          issue="keras-team/keras#23038"),
    Check("causal_rectangular", "is_causal is aligned as declared where lengths differ",
          causal_rectangular, quick=True, issue="pytorch/pytorch#103082"),
    Check("masked_and_causal", "a mask and is_causal at once hide what either hides",
          masked_and_causal, quick=True),
    Check("scale_argument", "scale multiplies the scores", scale_argument),
    Check("fully_masked", "a query that may attend to nothing gives what is declared",
          fully_masked, quick=True, issue="pytorch/pytorch#103963"),
    Check("grouped", "grouped heads share keys in the order of repeat_interleave", grouped,
          quick=True, issue="fkodom/grouped-query-attention-pytorch#5"),
    Check("large_scores", "large scores do not overflow", large_scores, quick=True,
          issue="huggingface/transformers#17306"),
    Check("block_lengths", "lengths around the size of a block are no exception",
          block_lengths),
    Check("gradients", "its gradients are those of attention", gradients),
    Check("gradients_masked", "gradients are right under a mask, and finite where it hides all",
          gradients_masked, issue="pytorch/pytorch#103963"),
    Check("no_leakage", "no output depends on what it must not see, and each on what it must",
          no_leakage, issue="ml-explore/mlx#2835"),
    Check("no_leakage_through_mask", "no output depends on a key that the mask hides",
          no_leakage_through_mask, issue="TransformerLensOrg/TransformerLens#1005"),
    Check("padding", "padding that the mask hides changes nothing", padding,
          issue="TransformerLensOrg/TransformerLens#1005"),
    Check("batch", "a sample gives the same output alone and in a batch", batch,
          issue="PetrochukM/PyTorch-NLP#2"),
    Check("decoding", "decoded in chunks it gives what it gives at once", decoding),
    Check("layout", "strides of the inputs change nothing", layout,
          issue="pytorch/pytorch#181133"),
    Check("repeats", "the same input gives the same output", repeats, quick=True,
          issue="pytorch/pytorch#124464"),
    Check("dropout", "dropout drops the declared share of weights, and rescales the others",
          dropout),
    Check("returned_weights", "the weights it returns are those that made the output",
          returned_weights, issue="pytorch/pytorch#27968"),
)  # fmt: skip


def block_no_leakage(exam: Exam) -> None:
    """The future of a causal block; other sequences of the batch in any case."""
    model, inputs = exam.block()
    sides = exam.spec.sides
    # Through each further layer a window sees further: what must be seen depends on the depth.
    # What is inside is held to the window itself.
    windowed = sides is not None and exam.spec.window != (None, 0)
    causal = exam.spec.causal is not None or (sides is not None and sides[1] == 0)
    try:
        assert_no_leakage(model, inputs, causal=causal, must_see=not windowed, seed=exam.seed)
    except Failure as error:
        if error.cause is not None:
            error.cause = error.cause.replace(_SAY_SO, "Declare window=")
        raise


# What the assertion advises has another name in a specification.
_SAY_SO = "Say so with may_see=, or must_see=False"


def block_padding(exam: Exam) -> None:
    """On the right and on the left, of any content."""
    model, inputs = exam.block()
    if model.mask is None:
        raise NotAskedError(_mask_of_block(exam.spec))
    assert_padding_invariant(model, inputs, seed=exam.seed)


def _mask_of_block(spec: AttentionSpec) -> str:
    names = spec.sounding_like("mask")
    if not names:
        return "nothing says that it takes a mask: SequenceModel(module, mask=, mask_argument=)"
    return (
        f"it takes {names[0]}=, and nothing says what that means: SequenceModel(module, mask=..., "
        f"mask_argument={names[0]!r})"
    )


def block_batch(exam: Exam) -> None:
    """Up to four sequences alone, and all in another order."""
    assert_batch_independent(*exam.block(), seed=exam.seed)


def block_decoding(exam: Exam) -> None:
    """With its cache, if it has one, else by prefixes."""
    if exam.spec.causal is None:
        raise NotAskedError("it is not declared to be causal")
    model, _ = exam.block()
    if model.decode is None and name_of_cache(model.module) is not None:
        raise NotAskedError("it has a cache, but SequenceModel(..., decode=) does not say how")
    assert_decode_matches_prefill(*exam.block(), seed=exam.seed)


def block_layout(exam: Exam) -> None:
    """Permuted, strided, expanded and misaligned inputs."""
    assert_layout_invariant(*exam.block(), seed=exam.seed)


def block_repeats(exam: Exam) -> None:
    """In evaluation mode, whatever the random state."""
    _refuse_training(exam)
    assert_deterministic(*exam.block(), seed=exam.seed)


def attention_inside(exam: Exam) -> None:
    """Of what was captured: of a block, while it runs on its inputs."""
    judged, wrong, reasons = 0, [], list[str]()
    for diagnosis in diagnoses(exam.spec, reasons):
        judged += 1
        if not diagnosis.healthy:
            wrong.append(diagnosis)
    if not judged:
        raise NotAskedError("; ".join(reasons[:3]) or "no attention was captured")
    if wrong:
        raise AssertionError(
            f"{len(wrong)} of {judged} attentions that were captured are not what their queries, "
            f"keys and values make\n{wrong[0].sentence}"
        )


def captured_rows(exam: Exam) -> None:
    """Rows that may attend to nothing are what is declared."""
    _ask_each(records_of(exam.spec), lambda record: _rows(record, exam.spec.fully_masked))


def captured_masks(exam: Exam) -> None:
    """Masked keys get no weight, in attention that was given a mask."""
    _ask_each(records_of(exam.spec), _masked_keys)


def _masked_keys(record: AttentionRecord) -> None:
    if record.mask is None:
        raise ValueError("no attention was given a mask")
    assert_masked(record)


def captured_output(exam: Exam) -> None:
    """Weights times value are the output, where dropout leaves that to be asked."""
    whole = [r for r in records_of(exam.spec) if r.output is not None and r.dropout == 0]
    if not whole:
        raise NotAskedError("no output was kept, or dropout was applied")
    _ask_each(whole, assert_reproduces_output)


def captured_dropout(exam: Exam) -> None:
    """Whatever its rate: only a module in training mode drops weights."""
    records = records_of(exam.spec)
    wrong = [record for record in records if record.dropout > 0 and not record.training]
    if wrong:
        first = wrong[0]
        place = f"{first.layer or '(no module)'}, call {first.call}, rate {first.dropout:g}"
        raise AssertionError(
            f"{len(wrong)} of {len(records)} attentions drop weights in evaluation mode\n"
            f"  layer    {place}\n"
            "  cause    dropout that does not ask for self.training"
        )
    if not any(record.layer for record in records):
        raise NotAskedError("no module was captured, so none is in evaluation mode")


def _ask_each(records: Sequence[AttentionRecord], ask: Callable[[AttentionRecord], None]) -> None:
    """Ask each record; of one that keeps too little, or is too large, nothing can be asked."""
    reasons = []
    for record in records:
        try:
            ask(record)
        except (ValueError, CaptureMemoryError) as reason:
            reasons.append(str(reason))
    if len(reasons) == len(records):
        raise NotAskedError("; ".join(dict.fromkeys(reasons)) or "no attention was captured")


def _rows(record: AttentionRecord, lost: DeclaredFullyMasked) -> None:
    # Weights are kept in a dtype of the reader's choice; what rounded them is the model's.
    coarser = max(record.dtype, record.weights_dtype, key=lambda dtype: torch.finfo(dtype).eps)
    tolerance = row_tolerance(coarser, record.shape[3])
    if record.statistics is not None:
        _sums(record, record.statistics, lost, tolerance)
    elif lost != "undefined":
        assert_row_stochastic(record, fully_masked=lost, tolerance=tolerance)
    elif record.mask is None or bool(record.mask.any(-1).all()):
        assert_row_stochastic(record, tolerance=tolerance)


def _sums(
    record: AttentionRecord, statistics: Statistics, lost: DeclaredFullyMasked, tolerance: float
) -> None:
    """Judge rows by their sums. Which may attend to nothing, statistics do not tell."""
    sums, largest = statistics.row_sum, statistics.maximum
    right = (sums - 1).abs() <= tolerance
    if lost in ("zero", "undefined"):
        right |= (sums == 0) & (largest == 0)
    if lost in ("nan", "undefined"):
        right |= sums.isnan()
    if bool(right.all()):
        return
    off = (sums - 1).abs().nan_to_num(nan=torch.inf).masked_fill(right, -1.0)
    worst = tuple(int(place) for place in torch.unravel_index(off.argmax(), off.shape))
    raise AssertionError(
        f"{int((~right).sum())} of {right.numel()} rows do not sum to 1\n"
        f"  layer    {record.layer or '(no module)'}, call {record.call}\n"
        f"  worst    weights{[*worst]} sums to {float(sums[worst]):.6g} (allowed {tolerance:.1e})"
    )


_INSIDE = Check(
    "attention_inside", "what was captured is what its own queries, keys and values make",
    attention_inside, quick=True, issue="Graylab/DL4Proteins-notebooks#12",
)  # fmt: skip

CAPTURED_CHECKS: tuple[Check, ...] = (
    Check("rows", "every row is a distribution", captured_rows, quick=True,
          issue="labmlai/annotated_deep_learning_paper_implementations#146"),
    Check("masks", "masked keys get no weight", captured_masks, quick=True,
          issue="huggingface/pytorch-image-models#2236"),
    Check("output", "weights times value are the output", captured_output, quick=True,
          issue="pytorch/pytorch#27968"),
    Check("dropout", "nothing is dropped in evaluation mode", captured_dropout, quick=True,
          issue="pytorch/pytorch#124464"),
    _INSIDE,
)  # fmt: skip

BLOCK_CHECKS: tuple[Check, ...] = (
    Check("no_leakage", "no output depends on what it must not see, and each on what it must",
          block_no_leakage, quick=True, issue="pytorch/pytorch#103082"),
    Check("padding", "padding that the mask hides changes nothing", block_padding, quick=True,
          issue="TransformerLensOrg/TransformerLens#1005"),
    Check("batch", "a sequence gives the same output alone and in a batch", block_batch,
          quick=True, issue="PetrochukM/PyTorch-NLP#2"),
    Check("decoding", "decoded in chunks it gives what it gives at once", block_decoding,
          quick=True),
    Check("layout", "strides of the inputs change nothing", block_layout,
          issue="pytorch/pytorch#181133"),
    Check("repeats", "the same input gives the same output", block_repeats, quick=True,
          issue="pytorch/pytorch#124464"),
    _INSIDE,
)  # fmt: skip
