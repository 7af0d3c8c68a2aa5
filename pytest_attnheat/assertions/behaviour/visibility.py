"""What each row of an output may depend on, and other content for what it may not.

An *observer* is one row of the output. An *element* is one position of what it may see: a key
with its value, or a token.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import product
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from ...attention.chunks import query_chunks
from ...attention.reference import padding_mask
from ...attention.scoring import draw
from ...attention.vocabulary import Alignment, Side
from ...inputs import misuse

# Replaced inputs are as large as the given ones, or larger by this factor.
LARGER = 8.0
# Padding is drawn at these multiples of the scale of the inputs: what is large is felt.
_SCALES = (3.0, 10.0)

# The sizes of the blocks that kernels work in: there masks break.
_BLOCKS = (128, 64, 32, 16)

# What a subject is told of its padding: the truth, that all is real, the opposite, or nothing.
Told: TypeAlias = Literal["truth", "all real", "opposite", "nothing"]
# Says why an observer may not see an element, by the index of one and the number of the other.
Because: TypeAlias = Callable[[tuple[int, ...], int], str]


@dataclass(frozen=True)
class Stated:
    """What the caller says of what may be seen; see `assert_no_leakage`."""

    causal: bool | None = None
    alignment: Alignment = "top_left"
    lengths: Sequence[int] | Tensor | None = None
    side: Side = "right"
    documents: Tensor | None = None
    may_see: Tensor | None = None


@dataclass(frozen=True)
class Rule:
    """One reason why an observer may not see an element."""

    allowed: Tensor  # Boolean, broadcastable to `may_see`
    because: Because  # Says why not


@dataclass(frozen=True)
class Claim:
    """What each observer may see."""

    may_see: Tensor  # (*leading, query_len, key_len), boolean
    judged: Tensor  # (*leading, query_len): the observers whose output means something
    rules: Sequence[Rule]  # Why an observer may not see an element, in the order of naming
    may_be_causal: str  # What to say where outputs see nothing of their future, but may, or ""
    assumed: str | None = None  # What is claimed where the caller said nothing, or None
    must_see: bool = True  # Whether what may be seen has to be seen

    @classmethod
    def of(
        cls,
        rules: Sequence[Rule],
        shape: Sequence[int],
        like: Tensor,
        *,
        may_be_causal: str,
        judged: Tensor | None = None,
        assumed: str | None = None,
    ) -> Claim:
        """Join the rules, for observers and elements of a shape, on the device of a tensor."""
        seen = torch.ones((), dtype=torch.bool, device=like.device)
        for rule in rules:
            seen = seen & rule.allowed
        if judged is None:
            judged = seen.new_ones(tuple(shape[:-1]))
        return cls(seen.expand(tuple(shape)), judged, rules, may_be_causal, assumed)


def since(words: str) -> Because:
    """Say the same of all elements."""
    return lambda observer, element: words


def in_the_future(first: int) -> Because:
    """Say how far ahead an element is; the first is what observer 0 is at."""

    def because(observer: tuple[int, ...], element: int) -> str:
        steps = element - observer[-1] - first
        word = {1: "one", 2: "two"}.get(steps, str(steps))
        return f"{word} step{'s' * (steps != 1)} in its future"

    return because


def is_padding(lengths: list[int]) -> Because:
    """Say how many tokens of its sequence are real."""
    return lambda observer, element: (
        f"padding (of its sequence {lengths[observer[0]]} tokens are real)"
    )


def of_document(documents: Tensor) -> Because:
    """Say which document an element is of, and which its observer."""

    def because(observer: tuple[int, ...], element: int) -> str:
        own, other = documents[observer], documents[observer[0], element]
        return f"of document {int(other)}, its own is {int(own)}"

    return because


def as_documents(documents: object, shape: tuple[int, int]) -> Tensor:
    """Return the document of each token, (batch, length)."""
    accepted = f"a tensor of whole numbers that broadcasts to (batch, length) {shape}"
    if not isinstance(documents, Tensor) or documents.is_floating_point():
        given = documents.dtype if isinstance(documents, Tensor) else type(documents).__name__
        raise TypeError(misuse("documents", given, accepted))
    try:
        return documents.expand(shape)
    except RuntimeError:
        given = f"shape {tuple(documents.shape)}"
        raise ValueError(misuse("documents", given, accepted)) from None


@dataclass(frozen=True)
class Replacement:
    """Other content for some inputs of a subject."""

    elements: Tensor | None  # Which, boolean (*leading of the keys, key_len), or None
    queries: Tensor | None = None  # Boolean (*leading, query_len), or None, as of a model
    content: str = "same"  # By what: `"same"` or `"larger"` size, or `"nan"`
    # An element that gets the attention. The keys are replaced by its key, so that they get as
    # much; what a sequence model gets is only drawn anew.
    like: int | None = None
    # An observer per batch entry and head, (*leading): the keys are made such that its query gives
    # them all attention. For a sequence model as without.
    towards: Tensor | None = None


@dataclass(frozen=True)
class Padding:
    """Padding on one side, and what it holds."""

    side: Side  # The side
    total: int  # How many elements there are with it
    lengths: Sequence[int]  # Real tokens of each sample; nothing for an attention function
    value: float | None  # What it holds; None for numbers drawn from the seed
    seed: int  # That seed
    scale: float = _SCALES[0]  # How much larger than the inputs they are

    def each(self) -> Iterator[Padding]:
        """The same at every scale, or once if it holds one value."""
        for scale in _SCALES if self.value is None else _SCALES[:1]:
            yield replace(self, scale=scale)

    @property
    def is_largest(self) -> bool:
        """Whether it is of the last scale, at which the keys of a function attract a query."""
        return self.scale == _SCALES[-1]

    def other(self) -> Padding | None:
        """The same with other numbers; None for one value, which may be how padding is known."""
        return None if self.value is not None else replace(self, seed=self.seed + 1)

    def like(self, inputs: Tensor, shape: Sequence[int]) -> Tensor:
        """Fill a shape with padding for these inputs."""
        if self.value is not None:
            return torch.full(shape, self.value, dtype=inputs.dtype, device=inputs.device)
        generator = torch.Generator().manual_seed(self.seed + int(self.scale))
        if not inputs.is_floating_point():
            ids = torch.randint(0, int(inputs.max()) + 1, tuple(shape), generator=generator)
            return ids.to(inputs)
        size = inputs.double().square().mean().sqrt()
        drawn = torch.randn(*shape, generator=generator).to(inputs.device)
        return (drawn * (self.scale * torch.where(size > 0, size, 1.0))).to(inputs)

    def real(self, device: torch.device) -> Tensor:
        """Which tokens are real, (batch, total)."""
        # Made by the host, which knows the lengths.
        mask = padding_mask(self.lengths, self.total, side=self.side, device="cpu")
        return mask[:, 0, 0].to(device)


def noise(given: Tensor, name: str, content: str, *, seed: int) -> Tensor:
    """Other content for an input: as large as the given one, or larger, or NaN."""
    if content == "nan":
        return torch.full_like(given, math.nan)
    drawn = draw(f"{content} {name}", seed, *given.shape).to(given.device)
    size = given.double().square().mean().sqrt()
    size = torch.where(size.isfinite() & (size > 0), size, 1.0)
    return (drawn * size * (LARGER if content == "larger" else 1.0)).to(given)


def other_tokens(given: Tensor, content: str, seed: int) -> Tensor:
    """For each token id another one that the inputs hold too, so that the module knows it."""
    known, which = torch.unique(given, return_inverse=True)
    if len(known) == 1:
        raise ValueError(
            misuse("inputs", f"the one token id {int(known)} throughout", "several token ids")
        )
    steps = draw(f"{content} tokens", seed, *given.shape).abs().mul(1e6).long().to(given.device)
    others: Tensor = known[(which + 1 + steps % (len(known) - 1)) % len(known)]
    return others


class Embedded(TorchFunctionMode):
    """Changes the embeddings of some token ids wherever they are looked up."""

    def __init__(self, ids: Tensor, change: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self._ids, self._change = ids, change
        self.changed: list[Tensor] = []

    def __torch_function__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Any = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        if func is not torch.nn.functional.embedding:
            return result
        ids = args[0] if args else kwargs["input"]
        turned = _same(ids, self._ids.transpose(0, 1))  # the batch comes second
        if not turned and not _same(ids, self._ids):
            return result
        changed = self._change(result.transpose(0, 1) if turned else result)
        self.changed.append(changed)
        return changed.transpose(0, 1) if turned else changed


def _same(ids: Tensor, given: Tensor) -> bool:
    return ids.shape == given.shape and torch.equal(ids, given)


def gradients(
    output: Tensor, sources: Sequence[Tensor], observers: Iterable[Tensor]
) -> list[list[Tensor]]:
    """The gradients of the chosen rows of the output, channels added up with random signs."""
    # Equal signs would not do: a layer norm at the end adds up to a constant.
    if not output.requires_grad:
        raise RuntimeError("the output has no gradient")
    generator = torch.Generator().manual_seed(0)
    signs = torch.randint(0, 2, (output.shape[-1],), generator=generator) * 2 - 1
    # Small gradients of float16 would be rounded to zero.
    signs = signs.to(output) * (64.0 if output.dtype == torch.float16 else 1.0)
    of = partial(torch.autograd.grad, output, list(sources), retain_graph=True)
    rows = (chosen.unsqueeze(-1).to(output.dtype) * signs for chosen in observers)
    return [list(of(row, materialize_grads=True)) for row in rows]


def size_of(gradient: Tensor) -> Tensor:
    """The largest channel of each row of a gradient."""
    return gradient.detach().abs().amax(-1)


def touched(may_see: Tensor, elements: Tensor) -> Tensor:
    """Tell which observers (*leading, query_len) may see any of some keys (*leading, key_len)."""
    query_len, key_len = may_see.shape[-2:]
    result = torch.empty(may_see.shape[:-1], dtype=torch.bool, device=may_see.device)
    for at in product(*map(range, may_see.shape[:-2])):
        for rows in query_chunks(query_len, key_len):
            result[at][rows] = (may_see[at][rows] & elements[at]).any(-1)
    return result


def spread_rows(length: int, slots: int, ends: int, seed: int) -> list[int]:
    """Choose a row for each batch entry and head of each pass, as many as there are slots."""
    # All rows, where there is room for them; else some ends of blocks (one of `ends`), and an even
    # spread that moves with the seed.
    if slots >= length:  # another one each time round
        return [(slot + slot // length + seed) % length for slot in range(slots)]
    generator = torch.Generator().manual_seed(seed)
    blocks = dict.fromkeys(end - 1 for block in _BLOCKS for end in range(block, length, block))
    chosen = list(blocks)[: slots // ends]
    rest = slots - len(chosen)
    spread = (torch.arange(rest) + torch.rand(rest, generator=generator)) * (length / rest)
    chosen += spread.long().clamp(max=length - 1).tolist()
    return [chosen[at] for at in torch.randperm(slots, generator=generator).tolist()]
