"""How numbers that join the scores may be misread: a bias, ALiBi, sinks.

What a misreading computes is right attention of another call, as in `misreadings`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from .decisions import BLOCKS, ROWS, defect
from .misreadings import Case, at_all, first_head, first_sample, inverted, read, ruled, transposed


def _first(case: Case, given: Tensor) -> Tensor:
    return given[:1].expand_as(given)


def _scaled(case: Case, given: Tensor) -> Tensor:
    return torch.where(given.isinf(), given, given * case.factor)


def _where_not_zero(case: Case) -> Case:
    """A bias that is read as a mask; a mask that is told by 0 and -inf is inverted then."""
    return case if case.bias is None else ruled(case, case.bias != 0, bias=None)


def _as_bias(added: Callable[[Case], Tensor], case: Case) -> Case:
    """ALiBi with other distances: a bias in its place."""
    if case.alibi is None:
        return case
    bias = added(case).view(case.shape)
    return replace(case, alibi=None, bias=bias if case.bias is None else case.bias + bias)


def _from_the_other_corner(case: Case) -> Tensor:
    other = case.other_corner()
    added = other.distant(at_all(other), torch.float64)
    assert added is not None
    return added


def _signed(case: Case) -> Tensor:
    assert case.alibi is not None
    at = at_all(case)
    return -case.alibi.double()[at.head] * at.behind


def _next_slopes(first: int, case: Case, slopes: Tensor) -> Tensor:
    """The slopes of the heads before (from 0, not 1) or after, as far as they are a series."""
    ratio = slopes[1:2] / slopes[:1] if len(slopes) > 1 else 2.0**-8
    if first == 0:
        return torch.cat([slopes[:1] / ratio, slopes[:-1]])
    return torch.cat([slopes[1:], slopes[-1:] * ratio])


def _next_powers(up: int, case: Case, slopes: Tensor) -> Tensor:
    """The usual slopes with one more in their exponent, or one less, of any number of heads."""
    exponent = -8.0 * up / 2 ** math.floor(math.log2(len(slopes)))
    return slopes * math.exp(exponent * math.log(2.0))


def _slopes_of(count: Callable[[float], float], case: Case, slopes: Tensor) -> Tensor:
    """The usual slopes of another number of heads: a power of two that is near."""
    heads = 2 ** count(math.log2(len(slopes)))
    return 2.0 ** (-8.0 / heads * torch.arange(1, len(slopes) + 1, dtype=slopes.dtype))


def _counted(times: int, block: int, case: Case, sinks: Tensor) -> Tensor:
    """Sinks that are counted so many times, or once for each block of keys."""
    return sinks + math.log(times or -(-case.key_len // block))


ADDED = (
    defect("sinks_in_every_part", "that counts its sinks once for each part of the keys",
           misread=[read("sinks", partial(_counted, n, 0)) for n in (2, 4, 8)]
           + [read("sinks", partial(_counted, 0, block)) for block in BLOCKS]),
    defect("sinks_of_other_heads",
           "whose heads use the sink of another head, the first or the key head that serves them",
           misread=[read("sinks", _first), read("sinks", lambda case, sinks:
                    sinks[torch.arange(case.heads) // case.group])]),
    defect("sinks_scaled", "whose sinks are multiplied by the scale",
           misread=read("sinks", _scaled)),
    defect("alibi_other_corner", "whose ALiBi distances are counted from the other corner",
           misread=partial(_as_bias, _from_the_other_corner)),
    defect("alibi_signed", "whose ALiBi takes no absolute value: keys after the query gain",
           misread=partial(_as_bias, _signed)),
    defect("alibi_negative", "whose ALiBi has the wrong sign: far keys gain",
           misread=read("alibi", lambda case, slopes: -slopes)),
    defect("alibi_reversed", "whose ALiBi slopes are in the reversed order of heads",
           misread=read("alibi", lambda case, slopes: slopes.flip(0))),
    defect("alibi_of_first_head", "whose heads all use the ALiBi slope of the first one",
           misread=read("alibi", _first)),
    defect("alibi_off_by_one", "whose ALiBi slopes are those of the head before or after",
           misread=[read("alibi", partial(shifted, by)) for shifted, steps in
                    ((_next_slopes, (0, 2)), (_next_powers, (-1, 1))) for by in steps]),
    defect("alibi_of_other_heads", "whose ALiBi slopes are those of another number of heads",
           misread=[read("alibi", partial(_slopes_of, count))
                    for count in (math.ceil, math.floor, float)]),
    defect("alibi_scaled", "whose ALiBi is multiplied by the scale: it is added before",
           misread=read("alibi", _scaled)),
    defect("bias_scaled", "whose bias is multiplied by the scale: it is added before",
           misread=read("bias", _scaled)),
    defect("bias_of_first_head", "whose heads all use the bias of the first one",
           misread=read("bias", first_head), fully_masked=ROWS),
    defect("bias_of_first_sample", "whose samples all use the bias of the first one",
           misread=read("bias", first_sample), fully_masked=ROWS),
    defect("bias_transposed", "whose bias is transposed", misread=read("bias", transposed),
           fully_masked=ROWS),
    defect("bias_as_boolean",
           "that reads its bias as a boolean mask: only -inf is felt, finite numbers are not",
           misread=read("bias", lambda case, bias: bias.masked_fill(bias.isfinite(), 0.0)),
           form_of="bias_ignored"),
    defect("bias_as_keep",
           "that reads its bias as a boolean mask: it attends where the bias is not 0",
           misread=[_where_not_zero, lambda case: case if case.bias is None else
                    _where_not_zero(inverted(case))],
           fully_masked=ROWS, form_of="bias_ignored"),
)  # fmt: skip
