"""How a call may be misread: with another mask, another scale, without its softcap.

What a misreading computes is right attention of another call. What the call lacks is not misread.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from functools import cached_property, partial
from typing import Any

import torch
from torch import Tensor, nn

from pytest_attnheat.attention.call import FEATURES, Call, Positions
from pytest_attnheat.attention.decisions import BLOCKS, ROWS, Misreading, defect


class NotApplicable(ValueError):  # noqa: N818 (no error, a fact about a plan and a case)
    """A plan cannot be carried out on a case, for instance because lengths would have to agree."""


@dataclass(frozen=True, eq=False)
class Case(Call):
    """A call that a plan is carried out on, (batch, heads, length, width)."""

    name: str = ""  # What it is called in messages
    scale_given: bool = False  # Whether the scale is passed as an argument of this call
    dtype: torch.dtype = torch.float64  # In which it is computed: beyond its range exp is 0 or inf
    earlier: Case | None = None  # What the same code was asked just before, in the same memory

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """The shape of the weights: (batch, heads, query_len, key_len)."""
        batch, heads, query_len = self.query.shape[:3]
        return batch, heads, query_len, self.key.shape[2]

    @cached_property
    def seen(self) -> Tensor:
        """Where a query may attend, of the shape of the weights."""
        return self.visible().expand(self.shape)

    @cached_property
    def has_empty_rows(self) -> bool:
        """Whether some query may attend to nothing."""
        return not bool(self.seen.any(-1).all())

    def other_corner(self) -> Case:
        """Return the same call, its positions counted from the other corner."""
        other = "bottom_right" if self.alignment == "top_left" else "top_left"
        return replace(self, alignment=other)  # type: ignore[arg-type]


_USUAL: dict[str, Any] = {field.name: field.default for field in fields(Case)}
# Where positions hide no key, all of a padded tail is seen.
_HIDING = ("causal", "window", "chunk", "documents", "lengths", "query_lengths", "may_see")


def _has(case: Case, name: str) -> bool:
    given = getattr(case, name)
    return isinstance(given, Tensor) or given != _USUAL[name]


def without(*names: str) -> Misreading:
    """Leave out some features of a call."""

    def misread(case: Case) -> Case:
        given = {name: _USUAL[name] for name in names if _has(case, name)}
        return replace(case, **given) if given else case

    return misread


def _read(name: str, change: Callable[[Case, Any], Any]) -> Misreading:
    """Something else in place of what is given; a mask and a bias are expanded before."""

    def misread(case: Case) -> Case:
        if not _has(case, name):
            return case
        given = getattr(case, name)
        given = given.expand(case.shape) if name in ("mask", "bias") else given
        return replace(case, **{name: change(case, given)})

    return misread


def _scale(rule: Callable[[Case], float | None]) -> Misreading:
    def misread(case: Case) -> Case:
        scale = rule(case)
        return case if scale in (case.scale, case.factor) else replace(case, scale=scale)

    return misread


def ruled(case: Case, rule: Tensor, **without: Any) -> Case:
    """The mask with one rule more, for all maps in a row if it has three dimensions."""
    rule = rule.expand(case.maps, *case.shape[2:]).view(case.shape) if rule.ndim == 3 else rule
    return replace(case, mask=rule if case.mask is None else case.mask & rule, **without)


def _transposed(case: Case, given: Tensor) -> Tensor:
    if case.query_len != case.key_len:
        raise NotApplicable("what is not square cannot be transposed")
    return given.mT


def _roll(by: int, case: Case, mask: Tensor) -> Tensor:
    return mask.roll(by, 0)


def _first_sample(case: Case, given: Tensor) -> Tensor:
    return given[:1].expand(case.shape)


def _first_head(case: Case, given: Tensor) -> Tensor:
    return given[:, :1].expand(case.shape)


def _first(case: Case, given: Tensor) -> Tensor:
    return given[:1].expand_as(given)


def _scaled(case: Case, given: Tensor) -> Tensor:
    return torch.where(given.isinf(), given, given * case.factor)


def _tiled(case: Case, mask: Tensor) -> Tensor:
    batch, heads = mask.shape[:2]
    return mask[torch.arange(batch * heads).reshape(batch, heads) % batch, torch.arange(heads)]


_inverted = _read("mask", lambda case, mask: ~mask)


def _where_not_zero(case: Case) -> Case:
    """A bias that is read as a mask; a mask that is told by 0 and -inf is inverted then."""
    return case if case.bias is None else ruled(case, case.bias != 0, bias=None)


# --- positions


def _at(case: Case) -> Positions:
    return case.everywhere(case.query.device)


def _wider(more: tuple[int, int], case: Case, *, decoding: bool = False) -> Case:
    if case.window is None or (decoding and case.key_len <= case.query_len):
        return case
    sides = tuple(
        side if side is None else side + add for side, add in zip(case.window, more, strict=True)
    )
    if any(side is not None and side < 0 for side in sides):
        raise NotApplicable("a window cannot be smaller than its own key")
    return replace(case, window=sides)  # type: ignore[arg-type]


def _longer(more: int, case: Case, given: Any) -> Any:
    if isinstance(given, Tensor):  # of a cache, `caching` knows what is there
        return given if case.stored else (given + more).clamp(0, case.key_len)
    return max(given + more, 0) or given


def _one_off(name: str) -> list[Misreading]:
    return [_read(name, partial(_longer, more)) for more in (1, -1)]


def _rolled(more: int, case: Case, documents: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    return documents[0], documents[1].roll(more, -1)


def _counted_elsewhere(name: str, case: Case) -> Case:
    """One rule of positions that is counted from the other corner, and no other."""
    if not _has(case, name):
        return case
    kept: dict[str, Any] = {other: _USUAL[other] for other in _HIDING if other != name}
    (rule,) = replace(case.other_corner(), **kept).rules(_at(case.other_corner()))
    return ruled(case, rule, **{name: None})


def _in_blocks(block: int, to_the_end: bool, case: Case) -> Case:
    """Causal in steps: the block of a query is seen as a whole, or not at all."""
    if not case.causal:
        return case
    at = _at(case)
    own, its = (at.behind + at.key) // block, at.key // block
    seen = its <= own if to_the_end else its < own
    return ruled(case, seen | (at.key < case.prefix), causal=False)


# --- numbers that are added to scores, and sinks


def _as_bias(added: Callable[[Case], Any], case: Case) -> Case:
    """ALiBi with other distances: a bias in its place."""
    if case.alibi is None:
        return case
    bias = added(case).view(case.shape)
    return replace(case, alibi=None, bias=bias if case.bias is None else case.bias + bias)


def _signed(case: Case) -> Tensor:
    assert case.alibi is not None
    at = _at(case)
    return -case.alibi.double()[at.head] * at.behind


def _next_slopes(first: int, case: Case, slopes: Tensor) -> Tensor:
    """The slopes of the heads before (from 0, not 1) or after, as far as they are a series."""
    ratio = slopes[1:2] / slopes[:1] if len(slopes) > 1 else 2.0**-8
    if first == 0:
        return torch.cat([slopes[:1] / ratio, slopes[:-1]])
    return torch.cat([slopes[1:], slopes[-1:] * ratio])


def _slopes_of(count: Callable[[float], float], case: Case, slopes: Tensor) -> Tensor:
    """The usual slopes of another number of heads: a power of two that is near."""
    heads = 2 ** count(math.log2(len(slopes)))
    return 2.0 ** (-8.0 / heads * torch.arange(1, len(slopes) + 1, dtype=slopes.dtype))


def _is_merely_causal(case: Case, hiding: Sequence[str]) -> bool:
    """Whether the one thing that hides keys is causality, from the top left, in a forward pass."""
    others = case.mask, case.bias, case.upstream
    return hiding == ["causal"] and case.alignment == "top_left" and others == (None,) * 3


def padded(block: int, masked_too: bool, case: Case) -> Case:
    """Keys and values of zeros up to a whole block: scores of 0, that is a sink."""
    more = -case.key_len % block
    hiding = [name for name in _HIDING if _has(case, name)]
    given = hiding or (case.mask is not None and not masked_too)
    if not more or (given and not _is_merely_causal(case, hiding)):
        return case
    if hiding:  # a query sees those of its own position and before
        key, value = (nn.functional.pad(t, (0, 0, 0, more)) for t in (case.key, case.value))
        return replace(case, key=key, value=value)
    tail = torch.full((case.heads,), math.log(more), dtype=torch.float64)
    return replace(case, sinks=tail if case.sinks is None else case.sinks.double().logaddexp(tail))


def _counted(times: int, block: int, case: Case, sinks: Tensor) -> Tensor:
    """Sinks that are counted so many times, or once for each block of keys."""
    return sinks + math.log(times or -(-case.key_len // block))


# --- what an earlier call left


def _remembered(*names: str) -> Misreading:
    def misread(case: Case) -> Case:
        left = case.earlier
        if left is None or left.shape != case.shape or not any(_has(case, n) for n in names):
            return case
        return replace(case, **{name: getattr(left, name) for name in names})

    return misread


# --- the defects that are misreadings; each entry holds its forms

SCALE = (
    defect("scale_argument_ignored", "that ignores the scale it is given",
           misread=_scale(lambda case: None if case.scale_given else case.scale)),
    defect("scale_missing", "whose scores are not scaled", misread=_scale(lambda case: 1.0)),
    defect("scale_squared", "whose scores are scaled twice (divided by head_dim, not by its root)",
           misread=_scale(lambda case: case.factor**2)),
    defect("scale_inverted",
           "whose scores are divided by the scale, not multiplied: times sqrt(head_dim)",
           "esceptico/perceiver-io#9",
           misread=_scale(lambda case: 1.0 / case.factor if case.factor else math.inf)),
    defect("scale_from_value_width", "whose scale is taken from the width of the values",
           misread=_scale(lambda case: case.value.shape[-1] ** -0.5)),
    defect("scale_from_embedding",
           "whose scale is taken from the whole embedding, heads * head_dim",
           "Graylab/DL4Proteins-notebooks#12",
           misread=_scale(lambda case: (case.heads * case.query.shape[-1]) ** -0.5)),
    defect("scale_from_key_len", "whose scale is taken from the number of keys",
           misread=_scale(lambda case: case.key_len**-0.5)),
    defect("scale_from_query_len", "whose scale is taken from the number of queries",
           misread=_scale(lambda case: case.query_len**-0.5)),
    defect("scale_from_heads", "whose scale is taken from the number of heads",
           misread=_scale(lambda case: case.heads**-0.5)),
    defect("scale_absolute", "that takes the absolute value of a negative scale",
           misread=_scale(lambda case: abs(case.factor))),
)  # fmt: skip

MASK = (
    defect("mask_inverted", "whose mask is inverted: it attends exactly where it may not",
           "lucidrains/x-transformers#160", misread=_inverted,
           fully_masked=ROWS),
    defect("mask_ignored", "that ignores the mask", "TransformerLensOrg/TransformerLens#1005",
           misread=without("mask")),
    defect("mask_transposed", "whose mask is transposed", misread=_read("mask", _transposed),
           fully_masked=ROWS),
    defect("mask_of_another_sample",
           "whose samples use the mask of the sample before or after them",
           misread=[_read("mask", partial(_roll, 1)), _read("mask", partial(_roll, -1))],
           fully_masked=ROWS),
    defect("mask_of_first_sample", "whose samples all use the mask of the first one",
           misread=_read("mask", _first_sample), fully_masked=ROWS),
    defect("mask_of_first_head", "whose heads all use the mask of the first one",
           misread=_read("mask", _first_head), fully_masked=ROWS),
    defect("mask_tiled_over_heads",
           "whose mask is repeated over heads in the order of samples (repeat, not "
           "repeat_interleave)", misread=_read("mask", _tiled), fully_masked=ROWS),
)  # fmt: skip

WINDOW = (
    defect("window_ignored", "without its window", misread=without("window")),
    defect("window_other_corner", "whose window is counted from the other corner",
           misread=partial(_counted_elsewhere, "window"), fully_masked=ROWS),
    defect("window_swapped", "whose window has its left and right sides exchanged",
           misread=_read("window", lambda case, window: window[::-1]), fully_masked=ROWS),
    defect("window_left_too_wide", "whose window reaches one key too far to the left",
           "huggingface/transformers#39408", misread=partial(_wider, (1, 0))),
    defect("window_left_too_narrow", "whose window misses its last key on the left",
           misread=partial(_wider, (-1, 0)), fully_masked=ROWS),
    defect("window_right_too_wide", "whose window reaches one key too far to the right",
           misread=partial(_wider, (0, 1))),
    defect("window_right_too_narrow", "whose window misses its last key on the right",
           misread=partial(_wider, (0, -1)), fully_masked=ROWS),
    defect("window_left_too_wide_with_cache",
           "whose window reaches one key too far to the left, but only where there are more keys "
           "than queries, as with a cache", misread=partial(_wider, (1, 0), decoding=True),
           form_of="window_left_too_wide"),
    defect("window_left_too_narrow_with_cache",
           "whose window misses its last key on the left, but only where there are more keys "
           "than queries, as with a cache", misread=partial(_wider, (-1, 0), decoding=True),
           fully_masked=ROWS, form_of="window_left_too_narrow"),
)  # fmt: skip

CAUSAL = (
    defect("positions_other_corner",
           "whose positions are all counted from the other corner: causality, window, ALiBi",
           misread=lambda case: case.other_corner(), fully_masked=ROWS,
           form_of="causal_other_corner window_other_corner alibi_other_corner "
                   "chunk_other_corner"),
    defect("causal_ignored", "that is not causal when asked to be", misread=without("causal")),
    defect("causal_always", "that is causal without being asked",
           misread=lambda case: case if case.causal else replace(case, causal=True)),
    defect("causal_in_blocks", "whose queries see all keys up to the end of their block",
           misread=[partial(_in_blocks, block, True) for block in BLOCKS],
           form_of="causal_ignored"),
    defect("causal_before_blocks",
           "whose queries see no key of their own block, only those before",
           misread=[partial(_in_blocks, block, False) for block in BLOCKS], fully_masked=ROWS),
)  # fmt: skip

# What a call may have besides: left out, or another one.
BESIDES = (
    *(defect(f"{name}_ignored", f"that leaves out {name}", misread=without(name))
      for name in FEATURES if name not in ("alignment", "scale", "window", "query_lengths")),
    defect("chunk_off_by_one", "whose chunks are one position too long or too short",
           misread=_one_off("chunk")),
    defect("chunk_other_corner", "whose chunks are counted from the other corner",
           misread=partial(_counted_elsewhere, "chunk"), fully_masked=ROWS),
    defect("prefix_off_by_one", "whose prefix is one key too long or too short",
           misread=_one_off("prefix"), form_of="prefix_ignored"),
    defect("sink_keys_off_by_one", "that always sees one first key too many or too few",
           misread=_one_off("sink_keys")),
    defect("lengths_off_by_one", "whose samples have one real key too many or too few",
           misread=_one_off("lengths"), fully_masked=ROWS),
    defect("documents_off_by_one", "whose documents begin one key too late or too early",
           misread=[_read("documents", partial(_rolled, more)) for more in (1, -1)],
           fully_masked=ROWS),
    defect("sinks_in_every_part", "that counts its sinks once for each part of the keys",
           misread=[_read("sinks", partial(_counted, n, 0)) for n in (2, 4, 8)]
           + [_read("sinks", partial(_counted, 0, block)) for block in BLOCKS]),
    defect("sinks_of_other_heads",
           "whose heads use the sink of another head, the first or the key head that serves them",
           misread=[_read("sinks", _first), _read("sinks", lambda case, sinks:
                    sinks[torch.arange(case.heads) // case.group])]),
    defect("sinks_scaled", "whose sinks are multiplied by the scale",
           misread=_read("sinks", _scaled)),
    defect("alibi_other_corner", "whose ALiBi distances are counted from the other corner",
           misread=partial(_as_bias, lambda case: case.other_corner().distant(
               _at(case.other_corner()), torch.float64))),
    defect("alibi_signed", "whose ALiBi takes no absolute value: keys after the query gain",
           misread=partial(_as_bias, _signed)),
    defect("alibi_negative", "whose ALiBi has the wrong sign: far keys gain",
           misread=_read("alibi", lambda case, slopes: -slopes)),
    defect("alibi_reversed", "whose ALiBi slopes are in the reversed order of heads",
           misread=_read("alibi", lambda case, slopes: slopes.flip(0))),
    defect("alibi_of_first_head", "whose heads all use the ALiBi slope of the first one",
           misread=_read("alibi", _first)),
    defect("alibi_off_by_one", "whose ALiBi slopes are those of the head before or after",
           misread=[_read("alibi", partial(_next_slopes, first)) for first in (0, 2)]),
    defect("alibi_of_other_heads", "whose ALiBi slopes are those of another number of heads",
           misread=[_read("alibi", partial(_slopes_of, count))
                    for count in (math.ceil, math.floor, float)]),
    defect("alibi_scaled", "whose ALiBi is multiplied by the scale: it is added before",
           misread=_read("alibi", _scaled)),
    defect("bias_scaled", "whose bias is multiplied by the scale: it is added before",
           misread=_read("bias", _scaled)),
    defect("bias_of_first_head", "whose heads all use the bias of the first one",
           misread=_read("bias", _first_head), fully_masked=ROWS),
    defect("bias_of_first_sample", "whose samples all use the bias of the first one",
           misread=_read("bias", _first_sample), fully_masked=ROWS),
    defect("bias_transposed", "whose bias is transposed", misread=_read("bias", _transposed),
           fully_masked=ROWS),
    defect("bias_as_boolean",
           "that reads its bias as a boolean mask: only -inf is felt, finite numbers are not",
           misread=_read("bias", lambda case, bias: bias.masked_fill(bias.isfinite(), 0.0)),
           form_of="bias_ignored"),
    defect("bias_as_keep",
           "that reads its bias as a boolean mask: it attends where the bias is not 0",
           misread=[_where_not_zero, lambda case: case if case.bias is None else
                    _where_not_zero(_inverted(case))],
           fully_masked=ROWS, form_of="bias_ignored"),
)  # fmt: skip

PADDED = (
    defect("padded_keys_attended",
           "that attends to keys of zeros, with which it fills the last block of keys",
           misread=[partial(padded, block, masked_too)
                    for block in BLOCKS for masked_too in (True, False)]),
)  # fmt: skip

# What the same code was asked before comes again.
HISTORY = (
    defect("answer_of_earlier_call",
           "that gives the answer of an earlier call again: it knows it by its shape or address, "
           "not by its numbers", misread=_remembered("query", "key", "value", "mask", "bias")),
    defect("mask_of_earlier_call", "that uses the mask of an earlier call again",
           "ml-explore/mlx#3071", misread=_remembered("mask", "bias"), fully_masked=ROWS),
    defect("keys_of_earlier_call", "that uses the keys and values of an earlier call again",
           misread=_remembered("key", "value")),
)  # fmt: skip
