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

from .call import FEATURES, Call, Positions
from .decisions import BLOCKS, ROWS, Misreading, defect


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


def read(name: str, change: Callable[[Case, Any], Any]) -> Misreading:
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


def _padded_width(to: int, case: Case) -> float:
    """The scale of head_dim as it is padded to a multiple, or to a power of two if that is 0."""
    width = case.query.shape[-1]
    padded_to = -(-width // to) * to if to else 1 << (width - 1).bit_length()
    return case.factor if padded_to == width else padded_to**-0.5


def ruled(case: Case, rule: Tensor, **without: Any) -> Case:
    """The mask with one rule more, for all maps in a row if it has three dimensions."""
    rule = rule.expand(case.maps, *case.shape[2:]).view(case.shape) if rule.ndim == 3 else rule
    return replace(case, mask=rule if case.mask is None else case.mask & rule, **without)


def transposed(case: Case, given: Tensor) -> Tensor:
    """A mask or a bias with queries and keys exchanged."""
    if case.query_len != case.key_len:
        raise NotApplicable("what is not square cannot be transposed")
    return given.mT


def _roll(by: int, case: Case, mask: Tensor) -> Tensor:
    return mask.roll(by, 0)


def first_sample(case: Case, given: Tensor) -> Tensor:
    """A mask or a bias whose samples are all the first one."""
    return given[:1].expand(case.shape)


def first_head(case: Case, given: Tensor) -> Tensor:
    """A mask or a bias whose heads are all the first one."""
    return given[:, :1].expand(case.shape)


def _first_alone(dim: int, case: Case, mask: Tensor) -> Tensor:
    """A mask that the first head alone has, or the first sample."""
    later = torch.arange(mask.shape[dim]) > 0
    return mask | later.view([-1 if dim == at else 1 for at in range(4)])


def _whole_blocks(size: int, case: Case, mask: Tensor) -> Tensor:
    """A mask that shows a whole block of queries and keys where it shows a part of it."""
    seen = nn.functional.max_pool2d(mask.double(), size, ceil_mode=True) > 0
    seen = seen.repeat_interleave(size, -2).repeat_interleave(size, -1)
    return seen[..., : case.query_len, : case.key_len]


def _tiled(case: Case, mask: Tensor) -> Tensor:
    batch, heads = mask.shape[:2]
    return mask[torch.arange(batch * heads).reshape(batch, heads) % batch, torch.arange(heads)]


inverted = read("mask", lambda case, mask: ~mask)


# --- positions


def at_all(case: Case) -> Positions:
    """All positions of a case."""
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


def _both_sides(case: Case) -> Case:
    left, right = case.window or (None, None)
    return case if left is None or right is None else replace(case, window=(left, max(left, right)))


def _sliding(sides: tuple[int, ...], case: Case) -> Case:
    """So many keys as a chunk has before the own one, or after it as well, in place of a chunk."""
    if case.chunk is None:
        return case
    at = at_all(case)
    near = at.within(case.chunk - 1, case.chunk - 1 if len(sides) > 1 else None)
    return ruled(case, near | (at.key < case.sink_keys), chunk=None)


def _offset_reversed(case: Case) -> Case:
    """Causal, counted from the corner by query_len - key_len in place of key_len - query_len."""
    if not case.causal:
        return case
    at = at_all(replace(case, alignment="bottom_right"))
    stands = at.behind + at.key - at.query
    return ruled(case, (at.key <= at.query - stands) | (at.key < case.prefix), causal=False)


def _longer(more: int, case: Case, given: Any) -> Any:
    if isinstance(given, Tensor):  # of a cache, `caching` knows what is there
        return given if case.stored else (given + more).clamp(0, case.key_len)
    return max(given + more, 0) or given


def _one_off(name: str) -> list[Misreading]:
    return [read(name, partial(_longer, more)) for more in (1, -1)]


def _rolled(more: int, case: Case, documents: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    return documents[0], documents[1].roll(more, -1)


def _counted_elsewhere(name: str, case: Case) -> Case:
    """One rule of positions that is counted from the other corner, and no other."""
    if not _has(case, name):
        return case
    kept: dict[str, Any] = {other: _USUAL[other] for other in _HIDING if other != name}
    (rule,) = replace(case.other_corner(), **kept).rules(at_all(case.other_corner()))
    return ruled(case, rule, **{name: None})


def _in_blocks(block: int, to_the_end: bool, case: Case) -> Case:
    """Causal in steps: the block of a query is seen as a whole, or not at all."""
    if not case.causal:
        return case
    at = at_all(case)
    own, its = (at.behind + at.key) // block, at.key // block
    seen = its <= own if to_the_end else its < own
    return ruled(case, seen | (at.key < case.prefix), causal=False)


# --- keys that are none


def _is_merely_causal(case: Case, hiding: Sequence[str]) -> bool:
    """Whether the one thing that hides keys is causality, from the top left, in a forward pass."""
    others = case.mask, case.bias, case.upstream
    return hiding == ["causal"] and case.alignment == "top_left" and others == (None,) * 3


def padded(block: int, masked_too: bool, case: Case) -> Case:
    """Keys and values of zeros up to a whole block: scores of 0, that is a sink."""
    return _with_zeros(-case.key_len % block, masked_too, case)


def _with_zeros(more: int, masked_too: bool, case: Case) -> Case:
    hiding = [name for name in _HIDING if _has(case, name)]
    given = hiding or (case.mask is not None and not masked_too)
    if more <= 0 or (given and not _is_merely_causal(case, hiding)):
        return case
    if hiding:  # a query sees those of its own position and before
        key, value = (nn.functional.pad(t, (0, 0, 0, more)) for t in (case.key, case.value))
        return replace(case, key=key, value=value)
    tail = torch.full((case.heads,), math.log(more), dtype=torch.float64)
    return replace(case, sinks=tail if case.sinks is None else case.sinks.double().logaddexp(tail))


def _as_many_as_queries(case: Case) -> Case:
    if case.key_len <= case.query_len or case.stored is not None:
        return case
    return ruled(case, at_all(case).key < case.query_len)


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
    defect("scale_of_another_width",
           "whose scale is that of a wider head: head_dim as it is padded, or a fixed one",
           misread=[_scale(partial(_padded_width, to)) for to in (0, 16, 32, 64, 128)]),
    defect("scale_absolute", "that takes the absolute value of a negative scale",
           misread=_scale(lambda case: abs(case.factor))),
)  # fmt: skip

MASK = (
    defect("mask_inverted", "whose mask is inverted: it attends exactly where it may not",
           "lucidrains/x-transformers#160", misread=inverted,
           fully_masked=ROWS),
    defect("mask_ignored", "that ignores the mask", "TransformerLensOrg/TransformerLens#1005",
           misread=without("mask")),
    defect("mask_transposed", "whose mask is transposed", misread=read("mask", transposed),
           fully_masked=ROWS),
    defect("mask_of_another_sample",
           "whose samples use the mask of the sample before or after them",
           misread=[read("mask", partial(_roll, 1)), read("mask", partial(_roll, -1))],
           fully_masked=ROWS),
    defect("mask_of_first_sample", "whose samples all use the mask of the first one",
           misread=read("mask", first_sample), fully_masked=ROWS),
    defect("mask_of_first_head", "whose heads all use the mask of the first one",
           misread=read("mask", first_head), fully_masked=ROWS),
    defect("mask_tiled_over_heads",
           "whose mask is repeated over heads in the order of samples (repeat, not "
           "repeat_interleave)", misread=read("mask", _tiled), fully_masked=ROWS),
    defect("mask_of_first_alone", "whose first head, or first sample, alone has its mask",
           "Tencent/ncnn#6869",
           misread=[read("mask", partial(_first_alone, dim)) for dim in (1, 0)],
           form_of="mask_ignored"),
    defect("mask_in_blocks",
           "that sees a whole block of keys where its mask shows a part of it",
           misread=[read("mask", partial(_whole_blocks, size)) for size in BLOCKS],
           form_of="mask_ignored"),
)  # fmt: skip

WINDOW = (
    defect("window_ignored", "without its window", misread=without("window")),
    defect("window_other_corner", "whose window is counted from the other corner",
           misread=partial(_counted_elsewhere, "window"), fully_masked=ROWS),
    defect("window_swapped", "whose window has its left and right sides exchanged",
           misread=read("window", lambda case, window: window[::-1]), fully_masked=ROWS),
    defect("window_left_too_wide", "whose window reaches one key too far to the left",
           "huggingface/transformers#39408", misread=partial(_wider, (1, 0))),
    defect("window_left_too_narrow", "whose window misses its last key on the left",
           misread=partial(_wider, (-1, 0)), fully_masked=ROWS),
    defect("window_right_too_wide", "whose window reaches one key too far to the right",
           misread=partial(_wider, (0, 1))),
    defect("window_right_too_narrow", "whose window misses its last key on the right",
           misread=partial(_wider, (0, -1)), fully_masked=ROWS),
    defect("window_both_sides", "whose window reaches as far to the right as to the left",
           "ModelTC/LightLLM#1311", misread=_both_sides,
           form_of="window_right_too_wide"),
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
    defect("causal_offset_reversed",
           "whose causal mask is moved the wrong way where lengths differ (query_len - key_len)",
           misread=_offset_reversed, fully_masked=ROWS),
)  # fmt: skip

# What a call may have besides: left out, or another one.
BESIDES = (
    *(defect(f"{name}_ignored", f"that leaves out {name}", misread=without(name))
      for name in FEATURES if name not in ("alignment", "scale", "window", "query_lengths")),
    defect("chunk_off_by_one", "whose chunks are one position too long or too short",
           misread=_one_off("chunk")),
    defect("chunk_other_corner", "whose chunks are counted from the other corner",
           misread=partial(_counted_elsewhere, "chunk"), fully_masked=ROWS),
    defect("chunk_slides", "whose chunks slide along with the query, as a window does",
           misread=[partial(_sliding, (1,)), partial(_sliding, (1, 1))]),
    defect("prefix_off_by_one", "whose prefix is one key too long or too short",
           misread=_one_off("prefix"), form_of="prefix_ignored"),
    defect("sink_keys_off_by_one", "that always sees one first key too many or too few",
           misread=_one_off("sink_keys")),
    defect("lengths_off_by_one", "whose samples have one real key too many or too few",
           misread=_one_off("lengths"), fully_masked=ROWS),
    defect("documents_off_by_one", "whose documents begin one key too late or too early",
           misread=[read("documents", partial(_rolled, more)) for more in (1, -1)],
           fully_masked=ROWS),
)  # fmt: skip

PADDED = (
    defect("keys_as_many_as_queries", "that reads as many keys as there are queries, and no more",
           "jax-ml/jax#24491", misread=[_as_many_as_queries, lambda case: _with_zeros(
               case.query_len - case.key_len, False, _as_many_as_queries(case))],
           fully_masked=ROWS, form_of="causal_other_corner"),
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
