"""The checks of blocks, and of what was captured in them or in a trace."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from pytest_attnheat.assertions.behaviour.decoding import assert_decode_matches_prefill
from pytest_attnheat.assertions.behaviour.invariance import assert_batch_independent
from pytest_attnheat.assertions.behaviour.layout import assert_layout_invariant
from pytest_attnheat.assertions.behaviour.leakage import assert_no_leakage
from pytest_attnheat.assertions.behaviour.padding import assert_padding_invariant
from pytest_attnheat.assertions.behaviour.randomness import assert_deterministic
from pytest_attnheat.assertions.masking import assert_masked
from pytest_attnheat.assertions.reproduction import assert_reproduces_output
from pytest_attnheat.capture import CaptureMemoryError
from pytest_attnheat.capture.record import AttentionRecord
from pytest_attnheat.contract.captured import assert_rows, diagnoses, layer_of, records_of
from pytest_attnheat.contract.examination import (
    Check,
    Examination,
    Skipped,
    check,
    is_causal_block,
    registered,
    takes_padding_mask,
)
from pytest_attnheat.failure import Failure


@check("no_leakage", "no output depends on what it must not see, and each on what it must", "block",
       quick=True, issue="pytorch/pytorch#103082")  # fmt: skip
def block_no_leakage(examination: Examination) -> None:
    """The future of a causal block; other sequences of the batch in any case."""
    model, inputs = examination.block()
    sides = examination.spec.sides
    # Through each further layer a window sees further: what must be seen depends on the depth.
    # What is inside is held to the window itself.
    windowed = sides is not None and examination.spec.window != (None, 0)
    causal = examination.spec.causal is not None or (sides is not None and sides[1] == 0)
    assert_no_leakage(model, inputs, causal=causal, must_see=not windowed, seed=examination.seed)


@check("padding", "padding that the mask hides changes nothing", "block", needs=takes_padding_mask,
       quick=True, issue="TransformerLensOrg/TransformerLens#1005")  # fmt: skip
def block_padding(examination: Examination) -> None:
    """On the right and on the left, of any content."""
    assert_padding_invariant(*examination.block(), seed=examination.seed)


@check("batch", "a sequence gives the same output alone and in a batch", "block", quick=True,
       issue="PetrochukM/PyTorch-NLP#2")  # fmt: skip
def block_batch(examination: Examination) -> None:
    """Up to four sequences alone, and all in another order."""
    assert_batch_independent(*examination.block(), seed=examination.seed)


@check("decoding", "decoded in chunks it gives what it gives at once", "block",
       needs=is_causal_block, quick=True)  # fmt: skip
def block_decoding(examination: Examination) -> None:
    """With its cache, if it has one, else by prefixes."""
    assert_decode_matches_prefill(*examination.block(), seed=examination.seed)


@check("layout", "strides of the inputs change nothing", "block", issue="pytorch/pytorch#181133")
def block_layout(examination: Examination) -> None:
    """Permuted, strided, expanded and misaligned inputs."""
    assert_layout_invariant(*examination.block(), seed=examination.seed)


@check("repeats", "the same input gives the same output", "block", quick=True,
       issue="pytorch/pytorch#124464")  # fmt: skip
def block_repeats(examination: Examination) -> None:
    """In evaluation mode, whatever the random state."""
    examination.refuse_training()
    assert_deterministic(*examination.block(), seed=examination.seed)


@check("rows", "every row is a distribution", "captured", quick=True,
       issue="labmlai/annotated_deep_learning_paper_implementations#146")  # fmt: skip
def captured_rows(examination: Examination) -> None:
    """Rows that may attend to nothing are what is declared."""
    _ask_each(
        records_of(examination.spec),
        lambda record: assert_rows(record, examination.spec.fully_masked),
    )


@check("masks", "masked keys get no weight", "captured", quick=True,
       issue="huggingface/pytorch-image-models#2236")  # fmt: skip
def captured_masks(examination: Examination) -> None:
    """Masked keys get no weight, in attention that was given a mask."""
    _ask_each(records_of(examination.spec), _masked_keys)


def _masked_keys(record: AttentionRecord) -> None:
    if record.mask is None:
        raise ValueError("no attention was given a mask")
    assert_masked(record, record.judged_mask)


@check("output", "weights times value are the output", "captured", quick=True,
       issue="pytorch/pytorch#27968")  # fmt: skip
def captured_output(examination: Examination) -> None:
    """Weights times value are the output, where dropout leaves that to be asked."""
    whole = [r for r in records_of(examination.spec) if r.output is not None and r.dropout == 0]
    if not whole:
        raise Skipped("no output was kept, or dropout was applied")
    _ask_each(whole, assert_reproduces_output)


@check("dropout", "nothing is dropped in evaluation mode", "captured", quick=True,
       issue="pytorch/pytorch#124464")  # fmt: skip
def captured_dropout(examination: Examination) -> None:
    """Whatever its rate: only a module in training mode drops weights."""
    records = records_of(examination.spec)
    wrong = [record for record in records if record.dropout > 0 and not record.training]
    if wrong:
        first = wrong[0]
        raise Failure(
            "",
            "attentions drop weights in evaluation mode",
            broken=len(wrong),
            of=len(records),
            layer=f"{layer_of(first)}, rate {first.dropout:g}",
            cause="dropout that does not ask for self.training",
        )
    if not any(record.layer for record in records):
        raise Skipped("no module was captured, so none is in evaluation mode")


def _ask_each(records: Sequence[AttentionRecord], ask: Callable[[AttentionRecord], None]) -> None:
    """Ask each record; of one that keeps too little, or is too large, nothing can be asked."""
    reasons = []
    for record in records:
        try:
            ask(record)
        except (ValueError, CaptureMemoryError) as reason:
            reasons.append(str(reason))
    if len(reasons) == len(records):
        raise Skipped("; ".join(dict.fromkeys(reasons)) or "no attention was captured")


@check("attention_inside", "what was captured is what its own queries, keys and values make",
       "block", "captured", quick=True, issue="Graylab/DL4Proteins-notebooks#12")  # fmt: skip
def attention_inside(examination: Examination) -> str:
    """Of what was captured: of a block, while it runs on its inputs."""
    judged, wrong, reasons, hints = 0, [], list[str](), dict[str, None]()
    for diagnosis in diagnoses(examination.spec, reasons):
        judged += 1
        hints |= dict.fromkeys(f"{diagnosis.subject}: {note}" for note in diagnosis.notes)
        if not diagnosis.healthy:
            wrong.append(diagnosis)
    if not judged:
        raise Skipped("; ".join(reasons[:3]) or "no attention was captured")
    if wrong:
        claim = "attentions that were captured are not what their queries, keys and values make"
        raise Failure("", claim, broken=len(wrong), of=judged, cause=wrong[0].sentence)
    return "; ".join(hints)


BLOCK_CHECKS: tuple[Check, ...] = registered("block")
CAPTURED_CHECKS: tuple[Check, ...] = registered("captured")
