"""The checks of blocks, and of what was captured in them or in a trace."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ..assertions.behaviour.decoding import assert_decode_matches_prefill
from ..assertions.behaviour.inside import Inside
from ..assertions.behaviour.invariance import (
    assert_batch_independent,
    assert_key_permutation_invariant,
)
from ..assertions.behaviour.layout import assert_layout_invariant
from ..assertions.behaviour.leakage import assert_no_leakage
from ..assertions.behaviour.memory import memory_of
from ..assertions.behaviour.models import ModelSubject
from ..assertions.behaviour.padding import assert_padding_invariant
from ..assertions.behaviour.randomness import assert_deterministic
from ..assertions.behaviour.reading import as_sequence
from ..assertions.behaviour.sequences import SequenceModel, decode_takes
from ..assertions.behaviour.subject import differ
from ..assertions.behaviour.visibility import as_documents
from ..assertions.masking import assert_masked
from ..assertions.reproduction import assert_reproduces_output
from ..attention.call import Call
from ..attention.tolerance import output_tolerance
from ..callables import borrowed, modules_in
from ..capture import CaptureMemoryError
from ..capture.record import AttentionRecord
from ..failure import Checked, Failure
from .captured import assert_rows, diagnoses, layer_of, records_of
from .examination import Check, Examination, Skipped, check, registered
from .needs import is_causal_block, order_may_matter, takes_padding_mask
from .spec import AttentionSpec

# What is said of a block that seems to hold positions, and does not feel them.
ORDERLESS = (
    "the order of tokens changes nothing, though it seems to hold positions: declare "
    "SequenceModel(..., has_positions=True) if they are to be felt, else False"
)
# What modules call a window, or a chunk, of their own.
_WINDOWS = ("sliding_window", "attention_chunk_size")


@check("call", "it can be called as it is declared", "block", quick=True)
def block_call(examination: Examination) -> None:
    """Where it cannot, no other check is asked; one that needs more arguments is not asked this."""
    error = examination.refusal
    if error is not None and not examination.binds:
        raise Skipped(f"it cannot be called as it is declared: {error}; declare arguments=")
    if error is not None:
        raise error


@check("no_leakage", "each output depends on all that it may see, and on that alone", "block",
       quick=True, issue="pytorch/pytorch#103082")  # fmt: skip
def block_no_leakage(examination: Examination) -> None:
    """What is declared to be unseen; other sequences of the batch in any case; with padding too."""
    model, inputs = examination.block()
    spec, seed = examination.spec, examination.seed
    by_head = _seen(spec, inputs)
    seen = by_head.any(1)
    through = _through_layers(seen)
    causal = bool((through == through.tril()).all())
    told: dict[str, Any] = {"causal": causal, "seed": seed}
    # Through each further layer a window sees further: what must be seen depends on the depth.
    # What is inside is held to the window itself.
    same = torch.equal(through, seen) and bool((by_head.all(1) == seen).all())
    told["must_see"] = same and not _carries_window(model)
    documents = spec.documents if isinstance(spec.documents, Tensor) else None
    whole = torch.ones_like(through)
    if not torch.equal(through, whole.tril() if causal else whole):
        told["may_see"] = through
    assert_no_leakage(model, inputs, documents=documents, **told)
    lengths = [inputs.shape[1] - 2 - i % 2 for i in range(len(inputs))]
    if model.memory_argument is not None and model.mask is not None:
        memory = model.arguments[model.memory_argument]
        ragged = [memory.shape[1] - 1 - i % 2 for i in range(len(memory))]
        assert_no_leakage(model, inputs, lengths=ragged, **told)
    elif not _why_not_padded(examination) and min(lengths) > 1:
        for side in model.sides:
            if "may_see" in told and side == "left":
                told["may_see"] = _shifted(through, lengths)
            try:
                assert_no_leakage(
                    model, inputs, lengths=lengths, side=side, passes=2, by="perturbation", **told
                )
            except Failure as failure:
                padded = " and ".join(dict.fromkeys(str(inputs.shape[1] - n) for n in lengths))
                failure.claim += f", in sequences with {padded} tokens of padding on the {side}"
                raise


def _seen(spec: AttentionSpec, inputs: Tensor) -> Tensor:
    """What is declared that each token may see in a layer, (batch, heads, length, length)."""
    # There is one head, but for a function of the head.
    (batch, length), heads = inputs.shape[:2], 1
    documents = spec.documents
    if isinstance(documents, Tensor):
        documents = as_documents(documents, (batch, length))
    if spec.may_see is not None and not isinstance(spec.may_see, Tensor):
        with suppress(Skipped):
            heads = max((record.shape[1] for record in records_of(spec)), default=1)
    nothing = torch.empty(batch, heads, length, 0, device=inputs.device)
    rules = ("window", "chunk", "prefix", "sink_keys", "may_see")
    always = {name: rule for name, rule in spec.always(heads).items() if name in rules}
    if isinstance(documents, Tensor):
        always["documents"] = (documents, documents)
    call = Call(nothing, nothing, nothing, causal=spec.causal is not None, **always)
    return call.visible().expand(batch, heads, length, length)


def _carries_window(model: SequenceModel) -> bool:
    """Whether some layer says itself that it sees a window, or a chunk, alone."""
    parts = [part for module in modules_in(model.module) for part in module.modules()]
    owners = [*parts, *(getattr(part, "config", None) for part in parts)]
    carried = [getattr(owner, name, None) for owner in owners for name in _WINDOWS]
    return any(isinstance(size, int) for size in carried)


def _through_layers(seen: Tensor) -> Tensor:
    """What each token may see through any number of layers."""
    further = torch.matmul(seen.float(), seen.float()) > 0
    return seen if torch.equal(seen, further) else _through_layers(seen | further)


def _shifted(seen: Tensor, lengths: Sequence[int]) -> Tensor:
    """The same where so many last tokens are real: positions count from the first real one."""
    moved = [one.roll((len(one) - n,) * 2, (0, 1)) for one, n in zip(seen, lengths, strict=True)]
    return torch.stack(moved)


def _why_not_padded(examination: Examination) -> str:
    """Why the sequence cannot be padded; empty if it can."""
    if reason := takes_padding_mask(examination.spec):
        return reason
    try:
        subject = as_sequence(*examination.block(), {})
        (memory_of(subject) or subject).check_padding(needs_mask=True)
    except ValueError as reason:
        return str(reason)
    return "documents are packed" if examination.spec.documents is not None else ""


@check("padding", "with padding that the mask hides, the output is what it is without", "block",
       needs=takes_padding_mask, quick=True,
       issue="TransformerLensOrg/TransformerLens#1005")  # fmt: skip
def block_padding(examination: Examination) -> None:
    """On the right and on the left, of any content; of a memory, if there is one."""
    model, inputs = examination.block()
    if reason := _why_not_padded(examination):
        raise Skipped(reason)
    assert_padding_invariant(model, inputs, seed=examination.seed)


@check("batch", "a sequence gives the same output alone and in a batch", "block", quick=True,
       issue="PetrochukM/PyTorch-NLP#2")  # fmt: skip
def block_batch(examination: Examination) -> str:
    """Up to four sequences alone, and all in another order; of packed documents, a word on each."""
    block, documents = examination.block(), examination.spec.documents
    assert_batch_independent(*block, seed=examination.seed)
    if isinstance(documents, Tensor):
        try:
            assert_batch_independent(*block, documents=documents, seed=examination.seed)
        except Failure as failure:  # positions that go on may be meant
            return f"{failure.claim}: {failure.cause}"
        except ValueError as reason:
            return str(reason)
        except Exception as error:  # it may take its own length alone
            return f"no document was asked alone: it raised {type(error).__name__}: {error}"
    return ""


@check("decoding", "decoded in chunks it gives what it gives at once", "block",
       needs=is_causal_block, quick=True)  # fmt: skip
def block_decoding(examination: Examination) -> str:
    """With its cache, if it has one, else by prefixes; then a batch of unequal lengths."""
    model, inputs = examination.block()
    spec, seed, length = examination.spec, examination.seed, inputs.shape[1]
    if spec.documents is not None:
        raise Skipped("documents are packed into one sequence")
    # What comes first is seen whole.
    chunks = [spec.prefix, *[1] * (length - spec.prefix)] if 1 < spec.prefix < length else None
    assert_decode_matches_prefill(model, inputs, chunks=chunks, seed=seed)
    some = chunks is not None or length <= 3 or "left" not in model.sides
    if some or _why_not_padded(examination):
        return ""
    if decode_takes(model):
        lengths = [length - 2 + i % 3 for i in range(len(inputs))]
        assert_decode_matches_prefill(model, inputs, lengths=lengths, seed=seed)
    elif model.decode is not None and not model.memory_argument:
        return f"no batch of unequal lengths: decode= does not take {model.mask_argument}="
    return ""


@check("positions", "the order of tokens matters where it has positions, and there alone",
       "block", issue="speechbrain/speechbrain#2276",
       needs=order_may_matter)  # fmt: skip
def block_positions(examination: Examination) -> None:
    """Without a mask, and with one that hides nothing."""
    model, inputs = examination.block()
    if model.has_positions is None:
        raise Skipped(_unsaid_positions(examination))
    if not model.has_positions:
        assert_key_permutation_invariant(model, inputs, seed=examination.seed)
        return
    for masked, told, base in _orderless(examination):
        raise Failure(
            "",
            "the order of tokens changes nothing" + " under a mask that hides none" * masked,
            cause="positions are declared, and not used: are they added, and not masked away?",
            tensor=Checked.of(base),
            again=told.run,
        )


def _orderless(examination: Examination) -> Iterator[tuple[bool, ModelSubject, Tensor]]:
    """Yield each call, without a mask and with one, to which the order of tokens is nothing."""
    model, inputs = examination.block()
    subject = as_sequence(model, inputs, {})
    order = torch.arange(subject.length).roll(1).to(inputs.device)
    reals = [None, torch.ones_like(inputs[..., 0] if inputs.ndim > 2 else inputs).bool()]
    for real in reals if model.mask is not None else reals[:1]:
        told = replace(subject, real=real)
        with borrowed(model.module, inputs, seed=examination.seed), torch.no_grad():
            base, moved = told.run(), told.restore(told.reorder(order).run(), order)
        if not differ(moved, base, output_tolerance(base.dtype)):
            yield real is not None, told, base


def _unsaid_positions(examination: Examination) -> str:
    """Why positions are not asked of what may have some: what it holds seems to be positions."""
    model, inputs = examination.block()
    modules = [part for module in modules_in(model.module) for part in module.modules()]
    looked_up = sum(isinstance(part, torch.nn.Embedding) for part in modules)
    names = [name for part in modules for name in (*part._parameters, *part._buffers)]
    holds = looked_up > (not inputs.is_floating_point()) or any("pos" in name for name in names)
    with suppress(Exception):  # it takes no other order
        if holds and next(_orderless(examination), None) is not None:
            return ORDERLESS
    return "SequenceModel(..., has_positions=) does not say whether the order of tokens matters"


@check(
    "layout",
    "whatever the strides of the inputs, the output is the same",
    "block",
    issue="pytorch/pytorch#181133",
)
def block_layout(examination: Examination) -> None:
    """Permuted, strided, expanded and misaligned inputs."""
    assert_layout_invariant(*examination.block(), seed=examination.seed)


@check("repeats", "the same input gives the same output", "block", quick=True,
       issue="pytorch/pytorch#124464")  # fmt: skip
def block_repeats(examination: Examination) -> None:
    """In evaluation mode, whatever the random state, with gradients and without."""
    examination.refuse_training()
    model, inputs = examination.block()
    assert_deterministic(model, inputs, seed=examination.seed)
    subject = as_sequence(model, inputs, {})
    real = torch.ones(inputs.shape[:2], dtype=torch.bool, device=inputs.device)
    real[:, 0 if "left" in model.sides else -1] = False
    padded = model.mask is not None and inputs.shape[1] > 2 and model.memory_argument is None
    for told in (None, *[real] * padded):
        _compare_with_gradients(replace(subject, real=told), examination.seed)


def _compare_with_gradients(subject: ModelSubject, seed: int) -> None:
    """Raise a Failure if outputs are others where gradients are computed."""
    with borrowed(subject.model.module, subject.inputs, seed=seed):
        with torch.no_grad():
            base = other = subject.run()
        with suppress(Exception), torch.enable_grad():  # it may have none, and say so in any way
            other = subject.run().detach()
    allowed = output_tolerance(base.dtype)
    # What is not a number is so with them and without.
    base, other = (t.masked_fill(base.isnan() & other.isnan(), 0.0) for t in (base, other))
    if differ(other, base, allowed, subject.real):
        raise Failure(
            "",
            "outputs are others where gradients are computed",
            cause="what asks for torch.is_grad_enabled(): checkpoints, a fast path, a cache?",
            tensor=Checked.of(base),
            tolerance=allowed,
        )


@check("rows", "every row is a distribution", "captured", quick=True,
       issue="labmlai/annotated_deep_learning_paper_implementations#146")  # fmt: skip
def captured_rows(examination: Examination) -> None:
    """Rows that may attend to nothing are what is declared."""
    _ask_each(
        records_of(examination.spec),
        lambda record: assert_rows(record, examination.spec.fully_masked),
    )


@check("masks", "masked keys have the weight zero", "captured", quick=True,
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


@check("dropout", "in evaluation mode all weights are kept", "captured", quick=True,
       issue="pytorch/pytorch#124464")  # fmt: skip
def captured_dropout(examination: Examination) -> None:
    """Whatever its rate: only a module in training mode drops weights."""
    records = records_of(examination.spec)
    wrong = [record for record in records if record.dropout > 0 and not record.training]
    if wrong:
        first = wrong[0]
        raise Failure(
            "", "attentions drop weights in evaluation mode", broken=len(wrong), of=len(records),
            layer=f"{layer_of(first)}, rate {first.dropout:g}",
            cause="dropout that does not ask for self.training",
        )  # fmt: skip
    if not any(record.layer and not record.training for record in records):
        raise Skipped("no module was captured in evaluation mode")


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
    if examination.spec.is_block:
        examination.block()
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
        said = "; ".join([wrong[0].sentence, *wrong[0].shows])
        raise Failure("", claim, broken=len(wrong), of=judged, cause=said)
    if examination.spec.is_block and (cause := _torn_heads(*examination.block())):
        raise Failure("", "heads hold numbers of several tokens", cause=cause)
    return "; ".join(hints)


def _torn_heads(model: SequenceModel, inputs: Tensor) -> str | None:
    """Why heads are not those of a token: no mask shows it where every token sees all."""
    with borrowed(model.module, inputs), torch.no_grad():
        return Inside(as_sequence(model, inputs, {})).why_heads_are_torn()


BLOCK_CHECKS: tuple[Check, ...] = registered("block")
CAPTURED_CHECKS: tuple[Check, ...] = registered("captured")
