"""Sequence models that look things up in a memory, as functions of that memory."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any

from torch import Tensor

from ...attention.vocabulary import Side
from .models import ModelSubject, Subject
from .sequences import SequenceModel
from .visibility import Claim, Padding, Stated


def memory_of(subject: Subject) -> MemorySubject | None:
    """Return a model as a function of its memory; None of a subject that has none."""
    name = subject.model.memory_argument if isinstance(subject, ModelSubject) else None
    if name is None:
        return None
    assert isinstance(subject, ModelSubject)
    others = {key: value for key, value in subject.arguments.items() if key != name}
    return MemorySubject(
        subject.model, subject.arguments[name], others, seed=subject.seed, queries=subject.inputs
    )


def claims_of(subject: Subject, stated: Stated) -> Iterator[tuple[Subject, Claim]]:
    """Yield what may be seen, of the inputs and of the memory, if there is one."""
    memory = memory_of(subject)
    if memory is None:
        yield subject.claim(stated)
        return
    # What looks things up elsewhere need not look at its own sequence as well.
    own, claim = subject.claim(replace(stated, lengths=None))
    yield own, replace(claim, must_see=False)
    # Of a memory everything but its padding may be seen.
    of_memory, claim = memory.claim(Stated(causal=False, lengths=stated.lengths, side=stated.side))
    yield of_memory, replace(claim, may_be_causal="")  # its elements are nobody's future


@dataclass(frozen=True)
class MemorySubject(ModelSubject):
    """A model of its memory: its inputs are the memory, its rows those of what looks it up."""

    queries: Tensor = field(kw_only=True)  # The inputs of the model

    element = "memory element"
    pads_rows = False

    @property
    def observers(self) -> int:
        """How many tokens look things up."""
        return self.queries.shape[1]

    def _call(self, model: SequenceModel, given: Tensor, **told: Any) -> Tensor:
        arguments = {**model.arguments, str(model.memory_argument): given}
        return replace(model, arguments=arguments)(self.queries.clone(), **told)

    def judged(self) -> None:
        """All rows: that the memory is padded does not make them mean nothing."""

    def samples(self, which: Tensor) -> MemorySubject:
        """The memory of some samples, and what looks it up."""
        return replace(super().samples(which), queries=self.queries[which])  # type: ignore[call-arg, return-value]

    def name_padding(self, padding: Padding) -> str:
        """Say on which side the padding of the memory is."""
        return f"rows change with padding of the memory on the {padding.side}"

    def cause_of_mask(self) -> None:
        """None: a mask of the memory is not joined to that of the sequence."""

    def cause_of_padding(self, side: Side, *, felt: bool | None) -> str | None:
        """Tell a mask that does not hide from one that changes something else."""
        if felt:
            return "outputs feel what the padding of the memory holds: is it masked?"
        if felt is None:
            return None
        return "outputs do not feel what the padding of the memory holds, only that it is there"
