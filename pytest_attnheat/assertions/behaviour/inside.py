"""What the attention inside a model does, in a call of which something is wrong.

Each of these is told by what was captured in that very call. Where nothing was captured, or not
all that may be attention was understood, nothing is said.
"""

from __future__ import annotations

import functools
import math
import warnings
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any, TypeVar, cast

import torch
from torch import Tensor, nn

from ...attention.reference import causal_mask
from ...callables import modules_in
from ...capture.capturing import capture_attention
from ...capture.record import AttentionRecord, name_of
from .models import ModelSubject
from .subject import differ, holds, listed

_Says = TypeVar("_Says", bound=Callable[..., str | None])
# What is said where it is not known what lets it be seen.
OUTSIDE = "it is seen outside of what was captured"
# Weights that are larger are no rounding.
_FELT = 1e-5
# How far rows may be apart, as a part of their size, that should be the same.
_ALIKE = 1e-4
_MERGED = "heads are merged in the wrong order after attention in"
_RESHAPED = "output goes on by a reshape without transpose(1, 2)"
_ROTATED = (
    "keys that are moved alike change their products with one another, and values do not change: "
    "positions do not act by their difference alone; if they are rotations, are the pairs that are "
    "rotated and the frequencies laid out alike (halves or neighbours)?"
)


def _careful(say: _Says) -> _Says:
    """Say nothing where what was captured cannot be read: the failure itself is to be reported."""

    @functools.wraps(say)
    def said(*given: Any) -> str | None:
        try:
            return say(*given)
        except Exception:  # weights may take too much memory, or masks be lost
            return None

    return cast(_Says, said)


class Inside:
    """The attention of a sequence with itself that a model performs in one call."""

    def __init__(self, subject: ModelSubject, run: Callable[[], object] | None = None) -> None:
        """Call it, or run what calls it."""
        self.into_linear: list[Tensor] = []
        self.out_of_linear: list[Tensor] = []
        try:
            self.records = self._look(subject, run or subject.run)
        except Exception:  # code that is compiled, or attention that takes too much memory
            self.records = []
        square = (subject.batch, subject.length, subject.length)
        self._size = subject.batch, subject.length
        self._real = subject.real
        own = subject.model.memory_argument is None
        self._squares = [r for r in self.records if own and (r.shape[0], *r.shape[2:]) == square]

    def _look(self, subject: ModelSubject, run: Callable[[], object]) -> list[AttentionRecord]:
        modules = modules_in(subject.model.module)
        linear = [part for m in modules for part in m.modules() if isinstance(part, nn.Linear)]
        handles = [part.register_forward_hook(self._note) for part in linear]
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # the failure itself is to be reported
                with capture_attention(modules[0], allow_unseen=True) as trace:
                    run()
        finally:
            for handle in handles:
                handle.remove()
        return [] if trace.unseen else list(trace)

    def _note(self, module: nn.Module, given: tuple[object, ...], result: object) -> None:
        if given and isinstance(given[0], Tensor) and isinstance(result, Tensor):
            self.into_linear.append(given[0].detach())
            self.out_of_linear.append(result.detach())

    @property
    def has_mask(self) -> bool:
        """Whether anything is masked in it, as far as that was seen."""
        return any(holds(lambda r=r: r.mask is not None) for r in self.records)  # type: ignore[misc]

    @_careful
    def why_seen(self, may_see: Tensor, judged: Tensor) -> str | None:
        """Say what lets a token see what it must not, where the attention inside does not."""
        forbidden = (~may_see & judged.unsqueeze(-1)).unsqueeze(1)
        if not self._squares or not all(_hides(record, forbidden) for record in self._squares):
            return None
        if said := self._why_merged_wrongly():
            return said
        count = len(self._squares)
        each = f"of {count} attentions none lets it be seen"
        if count == 1:
            each = f"attention in {name_of(self._squares[0])} does not let it be seen"
        return f"{each}: {OUTSIDE}"

    @_careful
    def why_entries_mix(self) -> str | None:
        """Say which attention takes the batch for the sequence, or whose heads are merged wrongly.

        Of as many entries as tokens, nothing tells the one from the other.
        """
        batch, length = self._size
        for record in self.records:
            if batch != length and (record.shape[0], *record.shape[2:]) == (length, batch, batch):
                return (
                    f"attention in {name_of(record)} takes the batch for the sequence: its rows "
                    f"are over the {batch} entries; is batch_first=, or a transpose, forgotten?"
                )
        return self._why_merged_wrongly()

    @_careful
    def why_heads_are_torn(self) -> str | None:
        """Say which attention has its heads split, or merged, by a reshape without transpose(1, 2).

        That is a mistake whatever the module is for: a head then holds numbers of several tokens.
        """
        for record in self.records:
            if record.value is not None and self._is_torn(record.value, self.out_of_linear):
                return (
                    f"heads are split in the wrong order before attention in {name_of(record)}: by "
                    "a reshape without transpose(1, 2)"
                )
            if record.output is not None and self._is_torn(record.output, self.into_linear):
                return f"{_MERGED} {name_of(record)}: its {_RESHAPED}"
        return None

    def _is_torn(self, heads: Tensor, rows: Sequence[Tensor]) -> bool:
        """Whether rows of tokens are the numbers of heads as they lie in memory, and no others are.

        Args:
            heads: Values or outputs of heads, (..., length, head_dim).
            rows: What linear layers were given, or gave.
        """
        batch, length = self._size
        if heads.shape[-2] != length or heads.numel() % (batch * length):
            return False
        heads = heads.reshape(batch, -1, length, heads.shape[-1])
        right = heads.transpose(1, 2).reshape(batch, length, -1)
        # One layer may give queries, keys and values.
        found = [one.to(right).flatten() for whole in rows for one in (whole, *whole.chunk(3, -1))
                 if one.shape[-1] == right.shape[-1] and one.numel() == right.numel()]  # fmt: skip
        torn, whole = (any(torch.equal(one, wanted.flatten()) for one in found)
                       for wanted in (heads, right))  # fmt: skip
        return torn and not whole

    def _why_merged_wrongly(self) -> str | None:
        """Say whose output goes on with numbers of one token in the place of another."""
        if said := self.why_heads_are_torn():
            return said
        batch, length = self._size
        for record in self._squares:
            if record.output is None:
                continue
            rows = record.output.transpose(1, 2).reshape(batch, length, -1)
            given = [g.to(rows) for g in self.into_linear if g.shape[-1] == rows.shape[-1]]
            given = [g for g in given if g.numel() == rows.numel()]
            # Whatever the order of its numbers, a token keeps its own.
            turned = [g.reshape(rows.shape) for g in given]
            turned += [g.reshape(length, batch, -1).transpose(0, 1) for g in given]
            if any(torch.equal(one.sort(-1).values, rows.sort(-1).values) for one in turned):
                continue
            numbers = rows.flatten().sort().values
            if any(torch.equal(one.flatten().sort().values, numbers) for one in given):
                return (
                    f"{_MERGED} {name_of(record)}: its output goes on with numbers of one token in "
                    "the place of another"
                )
        return None

    @_careful
    def why_mask_fails(self, real: Tensor) -> str | None:
        """Say which attention hides rows in place of columns, or what it hides too late."""
        for record in self._squares:
            late = record.masked_late
            if late is not None and _least_sum(record, real) < 1 - _FELT:
                return (
                    f"the mask is applied after the softmax in {name_of(record)}: rows of weights "
                    "sum to less than 1, and feel what is hidden"
                )
            if _hides_queries(record, real):
                return (
                    f"the mask is applied to queries in place of keys in {name_of(record)}: rows "
                    "of padding are hidden, and its columns are not"
                )
        return None

    @_careful
    def why_padding_is_seen(self, real: Tensor) -> str | None:
        """Say which attention does not hide padding; `real` is (batch, length)."""
        for record in self._squares:
            weights = record.weights.to(real.device)
            padding = ~real[:, None, None, :] & real[:, None, :, None]
            on_padding = weights.nan_to_num().masked_fill(~padding, 0.0)
            share = float(on_padding.sum(-1).max())
            if share < _FELT:
                continue
            return (
                f"padding gets up to {share:.2g} of the attention of a real token in "
                f"{name_of(record)}{_why_it_gets_some(record, weights, padding)}"
            )
        return None

    @_careful
    def why_places_are_felt(self, alone: Inside) -> str | None:
        """Say what changes in the first attention where the first sample comes alone."""
        if not self._squares or not alone._squares:
            return None
        moved, kept = (
            _operands(r, alone._squares[0].shape[-1]) for r in (self._squares[0], alone._squares[0])
        )
        (query, key, value), (own_query, own_key, own_value) = moved, kept
        if differ(value, own_value, _ALIKE):
            return None  # that of absolute positions
        if differ(key @ key.mT, own_key @ own_key.mT, _ALIKE):
            return _ROTATED
        if differ(query @ key.mT, own_query @ own_key.mT, _ALIKE):
            return (
                "queries and keys that are moved alike change their scores, and values do not "
                "change: are queries rotated by the positions that keys are rotated by?"
            )
        return (
            "scores and values of the first attention are the same at other places: its mask, or "
            "something after it, feels where a token stands"
        )

    @_careful
    def why_chunk_differs(self, number: int, step: range, at_once: Inside) -> str | None:
        """Say what differs in the first attention of a chunk that comes with a cache."""
        calls = Counter(record.layer for record in at_once._squares)
        known = {(one.layer, one.call): one for one in at_once._squares}
        for own in self.records:
            chunk, call = divmod(own.call, calls[own.layer] or 1)
            whole = known.get((own.layer, call))
            if whole is None or chunk != number or own.shape[2] != len(step):
                continue
            if own.shape[3] == step.stop:
                said = (
                    _why_masks_differ(own, whole, step, self._real)
                    or _why_operands_differ(own, whole, step)
                    or _why_scores_differ(own, whole, step)
                )
            else:
                said = _why_kept_keys_differ(own, whole, step)
            if said:
                return f"in {name_of(own)}, {said}"
        return None


def _why_it_gets_some(record: AttentionRecord, weights: Tensor, padding: Tensor) -> str:
    """What its weights show of a mask: that there is none, or that it makes scores 0."""
    query, key, bias = record.query, record.key, record.bias
    if query is None or key is None:
        return ""
    scale = query.shape[-1] ** -0.5 if record.scale is None else record.scale
    scores = query.double() @ key.double().repeat_interleave(record.group, 1).mT * scale
    if not record.mask_lost and record.mask is not None:
        scores = scores.masked_fill(~record.mask, -math.inf)
    scores = scores if bias is None else scores + bias.nan_to_num(neginf=0.0)
    rows = padding.any(-1, keepdim=True).expand_as(scores)
    laws = {
        "each the same: the mask multiplies scores, or inputs; it must fill with -inf": (
            scores.masked_fill(padding, 0.0)
        ),
        "no mask hides it there": scores,
    }
    for why, law in laws.items():
        if bool(((law.softmax(-1) - weights.double()).abs() <= _ALIKE)[rows].all()):
            return f", {why}"
    return ""


def _why_masks_differ(
    own: AttentionRecord, whole: AttentionRecord, step: range, real: Tensor | None
) -> str | None:
    """What the first token, of the first entry, that sees other keys sees; `real` as given."""
    sees, saw = _seen(own), _seen(whole)[:, :, step.start : step.stop, : step.stop]
    off = (sees != saw).any(-1).any(1)
    if not bool(off.any()):
        return None
    row = int(off.any(0).nonzero()[0])
    entry = int(off[:, row].nonzero()[0])
    by_entry = torch.stack([one[:, :, row].sum(-1).amax(1) for one in (sees, saw)], -1)
    counts = by_entry[entry].tolist()
    of = "" if bool((by_entry == by_entry[entry]).all()) else f" of batch entry {entry}"
    top = causal_mask(*own.shape[2:], alignment="top_left", device=sees.device)
    why = "the mask of a later chunk is another one"
    if torch.equal(sees, top.expand_as(sees)):
        corner = "aligned to the top left, not to the bottom right"
        why = f"the causal mask of a later chunk is {corner}"
    elif real is not None:
        tokens = real[:, None, None, : step.stop].to(sees.device)
        if torch.equal(sees & tokens, saw):
            why = "padding is not masked in a later chunk"
    return (
        f"token {step[row]}{of} sees {counts[0]} of {step.stop} keys with the cache, and "
        f"{counts[1]} {'others ' * (counts[0] == counts[1])}at once: {why}"
    )


def _why_operands_differ(own: AttentionRecord, whole: AttentionRecord, step: range) -> str | None:
    """Whether the cache, or the queries, are not what they are at once."""
    before, here = slice(step.start), slice(step.start, step.stop)
    parts = {"cached keys": ("key", before), "cached values": ("value", before)}
    parts |= {"new keys": ("key", here), "new values": ("value", here)}
    off = []
    for words, (name, rows) in parts.items():
        one, other = (getattr(record, name)[..., rows, :] for record in (own, whole))
        if differ(one, other, _ALIKE):
            off.append(words)
    assert own.query is not None
    assert whole.query is not None
    if differ(own.query, whole.query[..., here, :], _ALIKE):
        off.append("queries of a later chunk")
    if not off:
        return None
    if off[:2] == ["new keys", "new values"]:
        return (
            "the new keys and values are others than at once: is it positions that are added to "
            "tokens, or what else comes before?"
        )
    others = "" if "values" in " ".join(off) else ", values are not: rotated by other positions?"
    return f"the {off[0]} are others than at once{others}"


def _why_scores_differ(own: AttentionRecord, whole: AttentionRecord, step: range) -> str | None:
    """Whether the same queries, keys and values give another output, as by another bias."""
    rows = slice(step.start, step.stop)
    if own.output is None or whole.output is None:
        return None
    if not differ(own.output, whole.output[..., rows, :], _ALIKE):
        return None
    one, other = own.bias, whole.bias
    if other is not None:
        other = other[..., rows if other.shape[-2] > 1 else slice(None), : step.stop]
    if (one is None) != (other is None) or (
        one is not None
        and other is not None
        and bool((one - other).nan_to_num(0.0, 0.0, 0.0).abs().max() > _ALIKE)
    ):
        return (
            "what is added to the scores of a later chunk is not what is added at once: is it made "
            "for the queries at their own positions?"
        )
    return "the same queries, keys and values give another output than at once"


def _why_kept_keys_differ(own: AttentionRecord, whole: AttentionRecord, step: range) -> str | None:
    """Whether a cache that keeps fewer keys, or has room for more, shows those of other tokens."""
    # Which token a key is of is told by the key itself, of the first sample and head.
    assert own.key is not None
    assert whole.key is not None
    kept, known = own.key[0, 0].double(), whole.key[0, 0].double()
    alike = torch.cdist(kept, known) <= _ALIKE * known.norm(dim=-1)
    sees, saw = (_seen(record)[0, 0] for record in (own, whole))
    for row, token in enumerate(step):
        owners = alike[sees[row]]
        if bool((owners.sum(-1) > 1).any()):
            return None  # keys of several tokens are the same
        nobodys = kept[sees[row]][~owners.any(-1)]
        if len(nobodys):
            empty = "" if nobodys.any() else ": a slot that nothing was written to?"
            return f"token {token} sees a key with the cache that is no token's at once{empty}"
        seen = owners.any(0)
        lost, more = ((one & ~other).nonzero().flatten().tolist()
                      for one, other in ((saw[token], seen), (seen, saw[token])))  # fmt: skip
        if lost:
            return f"token {token} sees {listed('token', lost)} at once, not with the cache"
        if more:
            return f"token {token} sees {listed('token', more)} with the cache, not at once"
    return None


def _seen(record: AttentionRecord) -> Tensor:
    """Where queries may attend, of the shape of the weights."""
    return (
        torch.ones(record.shape).bool() if record.mask is None else record.mask.expand(record.shape)
    )


def _operands(record: AttentionRecord, length: int) -> tuple[Tensor, Tensor, Tensor]:
    """Query, key and value of the last tokens of the first sample."""
    query, key, value = record.query, record.key, record.value
    assert query is not None
    assert key is not None
    assert value is not None
    return query[:1, ..., -length:, :], key[:1, ..., -length:, :], value[:1, ..., -length:, :]


def _hides(record: AttentionRecord, forbidden: Tensor) -> bool:
    """Whether all that is forbidden, (batch, 1, length, length), is masked."""
    mask = record.mask
    return mask is not None and not bool((mask.to(forbidden.device) & forbidden).any())


def _least_sum(record: AttentionRecord, real: Tensor) -> float:
    """The least sum of a row of weights of a real token."""
    sums = record.weights.sum(-1)
    return float(sums.masked_fill(~real.to(sums.device).unsqueeze(1), 1.0).min())


def _hides_queries(record: AttentionRecord, real: Tensor) -> bool:
    """Whether rows of padding may see nothing, and real ones may see all padding."""
    mask = record.mask
    if mask is None:
        return False
    seen = mask.expand(record.shape).any(1).to(real.device)
    of_padding = real.unsqueeze(-1) & ~real.unsqueeze(-2)
    return bool(seen[of_padding].all()) and not bool(seen[~real].any())
