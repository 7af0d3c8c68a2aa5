"""One case of attention, made from a seed: tensors, scores, weights and output."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pytest_attnheat.attention.devices import ACCEPTED
from pytest_attnheat.attention.reference import (
    KINDS,
    Kind,
    boolean_mask,
    causal_mask,
    checked_scores,
    padding_mask,
    sliding_window_mask,
    weigh,
)
from pytest_attnheat.attention.scoring import (
    Scoring,
    ScoringFactory,
    draw,
    make_scoring,
    scoring_names,
)
from pytest_attnheat.attention.vocabulary import FullyMasked, check_fully_masked
from pytest_attnheat.inputs import dtype_name, misuse, one_of, positive, seed_number

MaskBuilder = Callable[[int, int], Tensor]
MaskChoice = str | Tensor | MaskBuilder

DTYPES = ("float16", "bfloat16", "float32", "float64")
MASKS = ("causal_top_left", "causal_bottom_right", "padding", "sliding_window")
SIZES = ("batch", "heads", "query_len", "key_len", "head_dim", "value_dim")
HEAD_DIM = 16
OPTIONS = ("scoring", *SIZES, "mask", "fully_masked", "kind", "dtype", "seed")


@dataclass(frozen=True, eq=False, repr=False)
class AttentionCase:
    """Attention tensors that belong together. No tensor requires a gradient.

    Attributes:
        query: (batch, heads, query_len, head_dim)
        key: (batch, heads, key_len, head_dim)
        value: (batch, heads, key_len, value_dim)
        mask: Boolean, broadcastable to the weights, True where a query may attend; or None.
        scores: (batch, heads, query_len, key_len), not masked
        weights: (batch, heads, query_len, key_len)
        output: (batch, heads, query_len, value_dim)
        scoring_function: The module or function that made the scores.
        scoring: Its name.
        device: The device of all tensors.
        dtype: The dtype of all tensors but the mask.
        seed: The seed of all numbers.
    """

    query: Tensor
    key: Tensor
    value: Tensor
    mask: Tensor | None
    scores: Tensor
    weights: Tensor
    output: Tensor
    scoring_function: Scoring
    scoring: str
    device: torch.device
    dtype: torch.dtype
    seed: int

    def __repr__(self) -> str:
        """Name the case and the shapes of its tensors."""
        shapes = ", ".join(
            f"{name} {None if tensor is None else tuple(tensor.shape)}"
            for name, tensor in (
                ("query", self.query),
                ("key", self.key),
                ("value", self.value),
                ("mask", self.mask),
            )
        )
        made = f"{self.scoring} {dtype_name(self.dtype)} {self.device} seed {self.seed}"
        return f"<AttentionCase {made}: {shapes}>"


def make_attention(
    *,
    scoring: str | Scoring = "scaled_dot_product",
    batch: int = 2,
    heads: int = 4,
    query_len: int = 6,
    key_len: int = 8,
    head_dim: int = HEAD_DIM,
    value_dim: int | None = None,
    mask: MaskChoice | Sequence[MaskChoice] | None = None,
    fully_masked: FullyMasked = "zero",
    kind: Kind = "soft",
    dtype: torch.dtype | str = "float32",
    device: torch.device | str = "cpu",
    seed: int = 0,
    extra: Mapping[str, ScoringFactory] | None = None,
) -> AttentionCase:
    """Make a case of attention from a seed.

    Query, key and value are standard normal numbers, drawn on the CPU in float64, then cast and
    moved: the same on every device. Each has its own stream, so that another query_len leaves
    the keys as they are.

    Args:
        scoring: The name of a scoring function, or a module or function `(query, key) ->
            scores` that is ready for the device and dtype.
        batch: Number of batch entries.
        heads: Number of heads.
        query_len: Number of queries.
        key_len: Number of keys. It differs from `query_len` by default, so that a test notices
            where the two are confused.
        head_dim: Width of queries and keys.
        value_dim: Width of values; `head_dim` by default.
        mask: None; or `"causal_top_left"`, `"causal_bottom_right"`, `"padding"` (batch entry i
            keeps its first key_len - 1 - i keys, at least one), `"sliding_window"` (two keys on
            each side, aligned top left); or a boolean tensor, True where a query may attend; or
            a function `(query_len, key_len) -> ` such a tensor; or a tuple of these, all of
            which must permit.
        fully_masked: `"zero"`, `"uniform"` or `"nan"`, as in `attend`.
        kind: `"soft"`, `"hard"`, `"max_pooling"` or `"gating"`, as in `attend`.
        dtype: float16, bfloat16, float32 or float64; a `torch.dtype` or its name.
        device: Where the case is.
        seed: Seed of the inputs and of the parameters of the scoring function.
        extra: More factories of scoring functions by name, for this call only.

    Raises:
        TypeError: A size or the seed is not a whole number, or the mask is not boolean.
        ValueError: A size is below 1, a name is unknown, or the mask does not fit.
    """
    check_options(
        {
            **({"scoring": scoring} if isinstance(scoring, str) else {}),
            **{"batch": batch, "heads": heads, "query_len": query_len, "key_len": key_len},
            **{"head_dim": head_dim, "value_dim": value_dim, "mask": mask},
            **{"fully_masked": fully_masked, "kind": kind, "dtype": dtype, "seed": seed},
        },
        scoring_names(extra),
    )
    target, number = _as_device(device), as_dtype(dtype)
    given: Any = scoring
    if not isinstance(given, str) and not callable(given):
        accepted = "the name of a scoring function, or a function (query, key) -> scores"
        raise TypeError(misuse("scoring", repr(given), accepted))
    value_dim = head_dim if value_dim is None else value_dim
    query = draw("query", seed, batch, heads, query_len, head_dim).to(target, number)
    key = draw("key", seed, batch, heads, key_len, head_dim).to(target, number)
    value = draw("value", seed, batch, heads, key_len, value_dim).to(target, number)
    built_mask = _build_mask(mask, batch, query_len, key_len, query.device)
    if isinstance(scoring, str):
        function = make_scoring(
            scoring, head_dim, seed=seed, device=target, dtype=number, extra=extra
        )
        name = scoring
    else:
        function = scoring
        name = getattr(scoring, "__name__", type(scoring).__name__)
    with torch.no_grad():
        scores = checked_scores(function, query, key)
        output, weights = weigh(
            scores, value, mask=built_mask, kind=kind, fully_masked=fully_masked
        )
    return AttentionCase(
        query=query,
        key=key,
        value=value,
        mask=built_mask,
        scores=scores,
        weights=weights,
        output=output,
        scoring_function=function,
        scoring=name,
        device=query.device,
        dtype=query.dtype,
        seed=seed,
    )


def as_dtype(dtype: torch.dtype | str) -> torch.dtype:
    """Return a supported dtype, given itself or its name; ValueError lists the known ones."""
    name = dtype_name(dtype) if isinstance(dtype, torch.dtype) else dtype
    one_of("dtype", name, DTYPES)
    return getattr(torch, name)  # type: ignore[no-any-return]


def several(choice: object) -> list[Any]:
    """Return a list of choices without repetitions, given one or a list or tuple of them."""
    return list(dict.fromkeys(choice)) if isinstance(choice, (list, tuple)) else [choice]


def check_options(options: Mapping[str, Any], scorings: Sequence[str]) -> None:
    """Check what `make_attention` and the `attention` marker can be told.

    Args:
        options: Some of OPTIONS by name. `scoring` and `dtype` may be lists.
        scorings: The known scoring functions.

    Raises:
        TypeError: A size or the seed is not a whole number.
        ValueError: An option or a name is unknown, a list is empty, or a number too small.
    """
    for name, given in options.items():
        one_of("option", name, OPTIONS)
        if name in SIZES and not (name == "value_dim" and given is None):
            positive(name, given)
        if name in ("scoring", "dtype") and not several(given):
            raise ValueError(misuse(name, repr(given), "one or more"))
    for scoring in several(options.get("scoring", [])):
        one_of("scoring", scoring, scorings)
    for dtype in several(options.get("dtype", [])):
        as_dtype(dtype)
    for mask in _mask_choices(options.get("mask")):
        if not isinstance(mask, Tensor) and not callable(mask):
            one_of("mask", mask, MASKS)
    one_of("kind", options.get("kind", "soft"), KINDS)
    check_fully_masked(options.get("fully_masked", "zero"))
    seed_number(options.get("seed", 0))


def _mask_choices(mask: object) -> Sequence[Any]:
    if mask is None:
        return ()
    return mask if isinstance(mask, (list, tuple)) else (mask,)


def _as_device(device: Any) -> torch.device:
    try:
        target: torch.device | None = torch.device(device)
    except (RuntimeError, TypeError):  # torch does not know it
        target = None
    if target is None or target.type == "meta":
        accepted = f"a torch.device that holds numbers, or its name: {ACCEPTED}"
        raise ValueError(misuse("device", repr(device), accepted))
    return target


def _build_mask(
    mask: object, batch: int, query_len: int, key_len: int, device: torch.device
) -> Tensor | None:
    """Combine all choices into one boolean mask; None if there is no choice."""
    combined = None
    for choice in _mask_choices(mask):
        one = _one_mask(choice, batch, query_len, key_len).to(device)
        combined = one if combined is None else combined & one
    return combined


def _one_mask(choice: Any, batch: int, query_len: int, key_len: int) -> Tensor:
    match choice:
        case "causal_top_left":
            return causal_mask(query_len, key_len, alignment="top_left", device="cpu")
        case "causal_bottom_right":
            return causal_mask(query_len, key_len, alignment="bottom_right", device="cpu")
        case "padding":
            lengths = [max(1, key_len - 1 - entry) for entry in range(batch)]
            return padding_mask(lengths, key_len, device="cpu")
        case "sliding_window":
            return sliding_window_mask(
                query_len, key_len, window=(2, 2), alignment="top_left", device="cpu"
            )
    return boolean_mask(choice if isinstance(choice, Tensor) else choice(query_len, key_len))
