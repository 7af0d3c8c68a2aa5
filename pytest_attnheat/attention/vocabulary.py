"""Words that have one meaning everywhere, and the rule for when a mask of floats hides a key."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal, TypeAlias, cast, get_args

from ..inputs import dtype_name, one_of

if TYPE_CHECKING:  # pictures are sketched without torch
    from torch import Tensor

# Where query 0 stands if lengths differ: at key 0, or so that the last query is at the last key.
Alignment: TypeAlias = Literal["top_left", "bottom_right"]
# What the weights of a query that may attend to no key are. `FullyMasked` is what one asserts;
# code under test may also leave it open.
FullyMasked: TypeAlias = Literal["zero", "uniform", "nan"]
DeclaredFullyMasked: TypeAlias = Literal["zero", "uniform", "nan", "undefined"]
# The side of a sequence that its padding is on.
Side: TypeAlias = Literal["right", "left"]
# What a mask means to the code that takes it: True where a query may attend, True where it may
# not, floats that are added to the scores, or any that PyTorch takes: the first and the third.
MaskMeaning: TypeAlias = Literal["keep", "drop", "additive", "any"]

ALIGNMENTS: tuple[str, ...] = get_args(Alignment)
FULLY_MASKED: tuple[str, ...] = get_args(FullyMasked)
DECLARED_FULLY_MASKED: tuple[str, ...] = get_args(DeclaredFullyMasked)
SIDES: tuple[str, ...] = get_args(Side)
MASK_MEANINGS: tuple[str, ...] = get_args(MaskMeaning)

# A number this low in a mask of floats hides its key: -inf, finfo.min, -1e9, and -1e4, which
# bfloat16 rounds to -9984. It is far below any score or bias that is meant to be felt: exp of it
# is 0 in every dtype, and the steepest slope of ALiBi (0.5 for 8 heads) reaches it 18,000 keys
# away.
HIDDEN_FROM = -9e3


def permits(mask: Tensor) -> Tensor:
    """Return where a mask lets a query attend, boolean, of the shape of the mask."""
    # A mask is boolean, True where a query may attend; or floats that are added to the scores, of
    # which `HIDDEN_FROM` and less hide. NaN hides nothing: it is felt.
    return mask if dtype_name(mask) == "bool" else ~(mask <= HIDDEN_FROM)


def check_fully_masked(value: object) -> FullyMasked:
    """Return the declared meaning of a fully masked row; ValueError for any other."""
    one_of("fully_masked", value, FULLY_MASKED)
    return cast("FullyMasked", value)


def both(one: Tensor | None, other: Tensor | None) -> Tensor | None:
    """What two masks permit; None is one that permits everything."""
    if one is None or other is None:
        return one if other is None else other
    return one & other
