"""One call of attention: its tensors, and what is declared of it.

Inside one row of scores things happen in this order: the product of query and key times the scale,
softcap, bias and ALiBi, a function of the score, the mask; then a sink joins the sum, and the
softmax follows. A model that does it in another order says so with `score_mod`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from functools import cached_property
from typing import Any, TypeAlias

import torch
from torch import Tensor

from ..inputs import as_whole, check_number, dtype_name, misuse, whole_number
from .shards import Shards
from .storage import Storage
from .vocabulary import Alignment, DeclaredFullyMasked

# (batch, head, query, key) -> whether that query may attend to that key; positions count from 0.
MaySee: TypeAlias = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
# What a call may have besides its tensors, its mask and causality.
FEATURES = (
    "alignment", "window", "chunk", "prefix", "sink_keys", "documents", "lengths", "query_lengths",
    "may_see", "scale", "softcap", "alibi", "score_mod", "sinks", "bias",
)  # fmt: skip

# (score, batch, head, query, key) -> another score.
ScoreMod: TypeAlias = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], Tensor]


@dataclass(frozen=True, eq=False)
class Call:
    """One call of attention, fully described. What is not given plays no part.

    Every rule of who may attend to whom has to permit; where none is given, all keys are seen.
    Leading dimensions are any, (batch, heads) where a feature speaks of batch entries or heads.
    """

    query: Tensor  # (..., query_len, head_dim)
    key: Tensor  # (..., key_len, head_dim), of fewer heads where they are grouped
    value: Tensor  # (..., key_len, value_dim), likewise
    mask: Tensor | None = None  # Boolean, True where a query may attend
    bias: Tensor | None = None  # Added to the scores, of such a shape; -inf forbids
    causal: bool = False  # Whether a query sees no later key
    # Where query 0 stands if lengths differ: what `causal`, `window`, `chunk` and `alibi` are
    # counted from
    alignment: Alignment = "top_left"
    window: tuple[int | None, int | None] | None = None  # How many keys before and after
    chunk: int | None = None  # A query sees keys of its own chunk of so many positions alone
    prefix: int = 0  # So many first keys are seen in spite of `causal`
    sink_keys: int = 0  # So many first keys are seen in spite of `window` and `chunk`
    # The document of each query, (batch, query_len), and of each key, (batch, key_len): a query
    # sees its own document alone
    documents: tuple[Tensor, Tensor] | None = None
    # How many first keys of each batch entry are real, (batch,). The last query stands at the last
    # real key where the alignment is bottom right.
    lengths: Tensor | None = None
    # How many first queries of each batch entry are real, (batch,); the others see nothing. The
    # last real one is the last query of the entry.
    query_lengths: Tensor | None = None
    may_see: MaySee | None = None  # Called with integer tensors that broadcast
    scale: float | None = None  # Of the products of queries and keys; None for 1 / sqrt(head_dim)
    softcap: float | None = None  # Scores become softcap * tanh(score / softcap)
    alibi: Tensor | None = None  # Slopes, per head: a score loses slope times the distance
    score_mod: ScoreMod | None = None  # A function of the score and its positions, elementwise
    sinks: Tensor | None = None  # Per head, a score that joins the sum of rows, without value
    fully_masked: DeclaredFullyMasked = "zero"  # What a query weighs that sees nothing
    # Steps that are rounded on purpose, and to which dtype: "query", "key", "value", "scores",
    # "weights"
    rounded: Mapping[str, torch.dtype] | None = None
    stored: Storage | None = None  # How keys and values are stored, by code with a cache
    shards: Shards | None = None  # How the sequence lies on several ranks; None for one
    upstream: Tensor | None = None  # The gradient of the output; None for no gradients

    @cached_property
    def factor(self) -> float:
        """What the products of queries and keys are multiplied by."""
        return 1 / math.sqrt(self.query.shape[-1]) if self.scale is None else self.scale

    @property
    def tensors(self) -> tuple[Tensor, Tensor, Tensor]:
        """Query, key and value."""
        return self.query, self.key, self.value

    @property
    def query_len(self) -> int:
        """The number of queries."""
        return self.query.shape[-2]

    @property
    def key_len(self) -> int:
        """The number of keys."""
        return self.key.shape[-2]

    @property
    def maps(self) -> int:
        """The number of maps: batch entries times heads."""
        return self.query.shape[:-2].numel()

    @property
    def heads(self) -> int:
        """The number of query heads."""
        return self.query.shape[-3] if self.query.ndim > 2 else 1

    @property
    def sees_all(self) -> bool:
        """Whether nothing hides a key from a query."""
        given = (self.mask, self.bias, self.window, self.chunk, self.documents, self.lengths,
                 self.query_lengths)  # fmt: skip
        return not self.causal and self.may_see is None and all(one is None for one in given)

    @property
    def group(self) -> int:
        """How many query heads share one head of keys and values."""
        return self.heads // self.key.shape[-3] if self.query.ndim > 2 else 1

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The shapes of the results, by name: the output, and the gradients if any are wanted."""
        shapes = {"output": (*self.query.shape[:-1], self.value.shape[-1])}
        if self.upstream is not None:
            shapes |= {name: tuple(getattr(self, name).shape) for name in ("query", "key", "value")}
            shapes |= {} if self.bias is None else {"attn_mask": tuple(self.bias.shape)}
            shapes |= {} if self.sinks is None else {"sinks": tuple(self.sinks.shape)}
        return shapes

    @property
    def arguments(self) -> dict[str, Any]:
        """What is declared, under the keywords of `assert_matches_reference`."""
        # A bias alone is an additive `attn_mask`, as in PyTorch.
        given = {f.name: getattr(self, f.name) for f in fields(Call)[3:] if f.name != "upstream"}
        usual = {f.name: f.default for f in fields(Call)}
        given = {n: v for n, v in given.items() if isinstance(v, Tensor) or v != usual[n]}
        renamed = {"causal": "is_causal", "mask": "attn_mask"}
        if "mask" not in given:
            renamed["bias"] = "attn_mask"
        given = {renamed.get(name, name): value for name, value in given.items()}
        grouped = self.key.shape[:-2] != self.query.shape[:-2]
        return {**given, "enable_gqa": True} if grouped else given

    def positions(
        self, maps: Tensor, rows: slice | Tensor, keys: Tensor | None = None
    ) -> Positions:
        """Return the positions of some queries of some maps, counted through, and of keys."""
        device = maps.device
        if isinstance(rows, slice):
            rows = torch.arange(rows.start, rows.stop, device=device)
        query = rows[None, :, None]
        keys = torch.arange(self.key_len, device=device) if keys is None else keys
        key = keys[None, None, :]
        batch, head = (maps // self.heads)[:, None, None], (maps % self.heads)[:, None, None]
        stands: Tensor | int = 0
        if self.alignment == "bottom_right":
            queries, keys = self.query_lengths, self.lengths
            stands = self.key_len if keys is None else keys.to(device)[batch]
            stands = stands - (self.query_len if queries is None else queries.to(device)[batch])
        return Positions(batch, head, query, key, query + stands - key)

    def capped(self, products: Tensor) -> Tensor:
        """Return scaled products after softcap."""
        if self.softcap is None:
            return products
        return self.softcap * torch.tanh(products / self.softcap)

    def distant(self, at: Positions, dtype: torch.dtype) -> Tensor | None:
        """Return what ALiBi adds to the scores, (maps, rows, key_len), None without it."""
        if self.alibi is None:
            return None
        slopes = self.alibi.detach().to(at.head.device, dtype)[at.head]
        return -slopes * at.behind.abs()

    def modified(self, scores: Tensor, at: Positions) -> Tensor:
        """Return scores (maps, rows, key_len) after `score_mod`."""
        if self.score_mod is None:
            return scores
        changed = self.score_mod(scores, at.batch, at.head, at.query, at.key)
        return changed.to(scores.dtype).expand_as(scores)

    def scored(self, products: Tensor) -> Tensor:
        """Return the scores of all scaled products, (..., query_len, key_len) both, not masked."""
        at, scores = self.everywhere(products.device), self.capped(products)
        if self.bias is not None:
            scores = scores + self.bias.to(scores).masked_fill(self.bias == -math.inf, 0.0)
        if (distant := self.distant(at, scores.dtype)) is not None:
            scores = scores + distant.view(scores.shape)
        return self.modified(scores.flatten(0, -3), at).view(scores.shape)

    def everywhere(self, device: torch.device) -> Positions:
        """Return the positions of all queries of all maps."""
        return self.positions(torch.arange(self.maps, device=device), slice(0, self.query_len))

    def permitted(
        self, maps: Tensor, rows: slice | Tensor, keys: Tensor | None = None
    ) -> Tensor | None:
        """Return what the rules of positions permit, (maps, rows, keys) or broadcastable."""
        # The mask and the bias are not looked at. Arguments are those of `positions`.
        every: Tensor | None = None
        for rule in self.rules(self.positions(maps, rows, keys)):
            every = rule if every is None else every & rule
        return every

    def visible(self, forbidden: float = -math.inf) -> Tensor:
        """Return where all rules, the mask and the bias let a query attend."""
        # Broadcastable to (..., query_len, key_len). A bias hides a key with `forbidden` and less.
        device = self.query.device
        seen = torch.ones(1, 1, dtype=torch.bool, device=device)
        rule = self.permitted(torch.arange(self.maps, device=device), slice(0, self.query_len))
        if rule is not None:
            lead = self.query.shape[:-2]
            seen = rule.view(*lead, *rule.shape[1:]) if rule.shape[0] == self.maps else rule[0]
        if self.mask is not None:
            seen = seen & self.mask
        return seen if self.bias is None else seen & ~(self.bias <= forbidden)

    def rules(self, at: Positions) -> Iterator[Tensor]:
        """Yield what each rule of positions permits; the mask and the bias are not looked at."""
        if self.causal:
            yield at.within(None, 0) | (at.key < self.prefix)
        if self.window is not None:
            yield at.within(*self.window) | (at.key < self.sink_keys)
        if self.chunk is not None:
            own, its = (
                torch.div(place, self.chunk, rounding_mode="floor")
                for place in (at.behind + at.key, at.key)
            )
            yield (own == its) | (at.key < self.sink_keys)
        if self.documents is not None:
            of_queries, of_keys = (numbers.to(at.key.device) for numbers in self.documents)
            yield of_queries[at.batch, at.query] == of_keys[at.batch, at.key]
        if self.lengths is not None:
            yield at.key < self.lengths.to(at.key.device)[at.batch]
        if self.query_lengths is not None:
            yield at.query < self.query_lengths.to(at.key.device)[at.batch]
        if self.may_see is not None:
            yield self.may_see(at.batch, at.head, at.query, at.key)


@dataclass(frozen=True, eq=False)
class Positions:
    """Where some queries and all keys stand; integer tensors that broadcast."""

    batch: Tensor  # (maps, 1, 1)
    head: Tensor  # (maps, 1, 1)
    query: Tensor  # (1, rows, 1)
    key: Tensor  # (1, 1, key_len)
    behind: Tensor  # How many keys each key is behind its query, below 0 in its future

    def within(self, left: int | None, right: int | None) -> Tensor:
        """Return which keys are at most so many before and after a query; None is no limit."""
        if right is None:
            return self.behind <= (self.behind if left is None else left)
        near = self.behind >= -right
        return near if left is None else near & (self.behind <= left)


_LEAST = {"chunk": 1, "prefix": 0, "sink_keys": 0}
# Functions of positions.
FUNCTIONS = ("may_see", "score_mod")


def check_features(
    features: Mapping[str, Any],  # By their names in `Call`; None is not looked at
    query_shape: Sequence[int],  # (..., heads, query_len, head_dim)
    key_shape: Sequence[int],  # (..., key_heads, key_len, head_dim)
    device: torch.device,  # Where they are: functions of positions are called there, once
) -> None:
    """Refuse a window, lengths, slopes ... that say nothing of queries and keys of these shapes."""
    heads = query_shape[-3] if len(query_shape) > 2 else 1
    batch = torch.Size(query_shape[:-3]).numel()
    sizes = {"lengths": key_shape[-2], "query_lengths": query_shape[-2]}
    for name, given in features.items():
        if given is None:
            continue
        if name in _LEAST:
            whole_number(name, given, least=_LEAST[name])
        elif name == "window":
            _check_window(given)
        elif name == "softcap" and check_number(given, name) <= 0:
            raise ValueError(misuse(name, repr(given), "a number above 0, or None"))
        elif name in ("alibi", "sinks"):
            _check_shape(name, given, (heads,), "(heads,)")
        elif name in sizes:
            _check_shape(name, given, (batch,), "(batch,)")
            if not all(0 <= one <= sizes[name] for one in given.tolist()):
                raise ValueError(misuse(name, given.tolist(), f"numbers from 0 to {sizes[name]}"))
        elif name == "documents":
            _check_documents(given, (batch, query_shape[-2]), (batch, key_shape[-2]))
        elif name == "scale":
            check_number(given, name)
        elif name in FUNCTIONS:
            check_function(name, given, device)


def check_function(name: str, given: Any, device: torch.device | str = "cpu") -> None:
    """Call a function of positions, of `FUNCTIONS`, once, of the first query and key, if any."""
    if given is None:
        return
    scored = name == "score_mod"
    takes = "score, " * scored + "batch, head, query position, key position"
    returns = "a tensor of scores" if scored else "a tensor of booleans"
    accepted = f"a function of ({takes}), elementwise, that returns {returns}"
    if not callable(given):
        raise TypeError(misuse(name, type(given).__name__, accepted))
    at = torch.zeros(1, 1, 1, dtype=torch.long, device=device)
    first = [at.float()] if scored else []
    try:
        found = given(*first, at, at, at, at)
    except Exception as error:
        raised = f"one that raised {type(error).__name__}: {error}"
        raise ValueError(misuse(name, raised, accepted)) from error
    if not isinstance(found, torch.Tensor):
        raise TypeError(misuse(name, f"one that returned {type(found).__name__}", accepted))
    if (found.dtype == torch.bool) == scored or found.numel() != 1:
        returned = f"one that returned {dtype_name(found)} {tuple(found.shape)}"
        raise ValueError(misuse(name, returned, accepted))


def slopes_of(function: Any, heads: int) -> torch.Tensor:
    """Return the slopes that a function of the number of heads gives, (heads,); lists are taken."""
    accepted = f"a function of the number of heads that returns one number for each, here {heads}"
    try:
        found = function(heads)
    except Exception as error:
        raised = f"one that raised {type(error).__name__}: {error}"
        raise ValueError(misuse("alibi", raised, accepted)) from error
    try:
        slopes = torch.as_tensor(found)
    except (TypeError, ValueError, RuntimeError):
        got = f"one that returned {type(found).__name__}"
        raise TypeError(misuse("alibi", got, accepted)) from None
    if tuple(slopes.shape) != (heads,):
        got = f"one that returned {dtype_name(slopes)} {tuple(slopes.shape)}"
        raise ValueError(misuse("alibi", got, accepted))
    return slopes


def _check_window(given: object) -> None:
    accepted = "a pair (left, right), each a whole number from 0, or None for no limit"
    wrong = misuse("window", repr(given), accepted)
    if not isinstance(given, (tuple, list)) or len(given) != 2:
        raise TypeError(wrong)
    for side in (one for one in given if one is not None):
        if (number := as_whole(side)) is None:
            raise TypeError(wrong)
        if number < 0:
            raise ValueError(wrong)


def _check_documents(given: object, queries: tuple[int, int], keys: tuple[int, int]) -> None:
    accepted = f"a pair of tensors, {queries} of the queries and {keys} of the keys"
    if not isinstance(given, (tuple, list)) or len(given) != 2:
        raise TypeError(misuse("documents", type(given).__name__, accepted))
    for one, shape in zip(given, (queries, keys), strict=True):
        _check_shape("documents", one, shape, "(batch, length)")


def _check_shape(name: str, given: object, shape: tuple[int, ...], said: str) -> None:
    if not isinstance(given, torch.Tensor):
        raise TypeError(misuse(name, type(given).__name__, f"a tensor {said}, here {shape}"))
    if tuple(given.shape) != shape:
        got = f"a tensor {tuple(given.shape)}"
        raise ValueError(misuse(name, got, f"a tensor {said}, here {shape}"))
