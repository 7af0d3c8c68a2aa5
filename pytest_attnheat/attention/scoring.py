"""The scoring functions of attention, and the registry of their names.

A scoring function says how well each key answers each query: it takes queries
`(..., query_len, query_dim)` and keys `(..., key_len, key_dim)` and returns scores
`(..., query_len, key_len)`. Leading dimensions broadcast. For one key x and one query q:

======================  =======================  ===========================
`additive`              `v^T tanh(W x + U q)`    Bahdanau et al. 2015
`dot_product`           `x^T q`                  Luong et al. 2015
`scaled_dot_product`    `x^T q / sqrt(D)`        Vaswani et al. 2017
`bilinear`              `x^T W q`                Luong et al. 2015 ("general")
======================  =======================  ===========================
"""

import inspect
import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar, overload
from zlib import crc32

import torch
from torch import Tensor, nn

from ..inputs import dtype_name, misuse, one_of, positive, seed_number
from .chunks import query_chunks

Scoring = Callable[[Tensor, Tensor], Tensor]
ScoringFactory = Callable[[int, int, int], Scoring]
_Factory = TypeVar("_Factory", bound=ScoringFactory)


def draw(stream: str, seed: int, *shape: int) -> Tensor:
    """Draw standard normal numbers on the CPU, in float64, without touching the global RNG."""
    # Streams of one seed are independent, so that for example the parameters of a scoring function
    # do not repeat the queries.
    # The CPU generator reads only 32 bits of its seed: hash stream and seed into them.
    generator = torch.Generator("cpu").manual_seed(crc32(f"{stream} {seed_number(seed)}".encode()))
    return torch.randn(shape, generator=generator, dtype=torch.float64, device="cpu")


def broadcast(*shapes: Sequence[int]) -> torch.Size:
    """Return the shape that shapes broadcast to; RuntimeError where they do not."""
    # `torch.broadcast_shapes` imports sympy on its first call, which takes a third of a second.
    scalar = torch.empty((), device="cpu")  # expanded to any shape, it takes no memory
    expanded = [scalar.expand(tuple(shape)) for shape in shapes]
    together = torch.broadcast_tensors(scalar, *expanded)  # type: ignore[no-untyped-call]
    return torch.Size(together[0].shape)


def mismatch(accepted: str, **tensors: Tensor) -> str:
    """Return the text of an error about the shapes of named tensors, taken together."""
    shapes = " and ".join(str(tuple(tensor.shape)) for tensor in tensors.values())
    return misuse(", ".join(tensors), f"shapes {shapes}", accepted)


def leading_shape(**tensors: Tensor) -> torch.Size:
    """Broadcast the leading dimensions (all but the last two) of named tensors."""
    accepted = "a torch.Tensor of floating point numbers, (..., length, width)"
    for name, tensor in tensors.items():
        if not isinstance(tensor, Tensor):
            raise TypeError(misuse(name, type(tensor).__name__, accepted))
        if not tensor.is_floating_point():
            raise TypeError(misuse(name, f"dtype {dtype_name(tensor)}", accepted))
        if tensor.ndim < 2:
            raise ValueError(misuse(name, f"shape {tuple(tensor.shape)}", accepted))
    try:
        return broadcast(*(tensor.shape[:-2] for tensor in tensors.values()))
    except RuntimeError:
        raise ValueError(mismatch("leading dimensions that broadcast", **tensors)) from None


class _ParametricScore(nn.Module):
    """A score with parameters: knows the widths of queries and keys it was made for."""

    def __init__(self, query_dim: int, key_dim: int | None) -> None:
        super().__init__()
        self.query_dim = positive("query_dim", query_dim)
        self.key_dim = self.query_dim if key_dim is None else positive("key_dim", key_dim)

    def extra_repr(self) -> str:
        return f"query_dim={self.query_dim}, key_dim={self.key_dim}"

    def _check(self, query: Tensor, key: Tensor) -> torch.Size:
        leading = leading_shape(query=query, key=key)
        if (query.shape[-1], key.shape[-1]) != (self.query_dim, self.key_dim):
            made_for = f"query_dim {self.query_dim} and key_dim {self.key_dim}"
            accepted = f"{made_for}, which this {type(self).__name__} was made for"
            raise ValueError(mismatch(accepted, query=query, key=key))
        return leading


def _parameter(stream: str, seed: int, *shape: int, fan_in: int) -> nn.Parameter:
    """A parameter of variance 1 / fan_in, in the default dtype and on the default device."""
    numbers = draw(stream, seed, *shape) / math.sqrt(fan_in)
    return nn.Parameter(numbers.to(torch.empty(0).device, torch.get_default_dtype()))


class AdditiveScore(_ParametricScore):
    """Additive attention: `score(x, q) = v^T tanh(W x + U q)` for a key x and a query q.

    Source: Bahdanau, Cho, Bengio: Neural Machine Translation by Jointly Learning to Align
    and Translate, 2015.

    Args:
        query_dim: Width of the queries.
        key_dim: Width of the keys; `query_dim` by default.
        hidden_dim: Width of the hidden layer; `query_dim` by default.
        seed: Seed of the parameters `key_weight` W (hidden_dim, key_dim), `query_weight` U
            (hidden_dim, query_dim) and `vector` v (hidden_dim,).

    Raises:
        TypeError: A width or the seed is not a whole number.
        ValueError: A width is below 1, or the seed below 0.
    """

    def __init__(
        self,
        query_dim: int,
        key_dim: int | None = None,
        hidden_dim: int | None = None,
        *,
        seed: int = 0,
    ) -> None:
        super().__init__(query_dim, key_dim)
        width = self.query_dim if hidden_dim is None else positive("hidden_dim", hidden_dim)
        self.hidden_dim = width
        self.key_weight = _parameter("additive W", seed, width, self.key_dim, fan_in=self.key_dim)
        self.query_weight = _parameter(
            "additive U", seed, width, self.query_dim, fan_in=self.query_dim
        )
        self.vector = _parameter("additive v", seed, width, fan_in=width)

    def extra_repr(self) -> str:
        """Show the widths in the repr of the module."""
        return f"{super().extra_repr()}, hidden_dim={self.hidden_dim}"

    def forward(self, query: Tensor, key: Tensor) -> Tensor:
        """Score every key for every query.

        The hidden layer holds query_len * key_len * hidden_dim numbers. It is made for a few
        queries at a time (64 MiB, or one query), also under autograd, where the backward
        pass makes it again.

        Args:
            query: (..., query_len, query_dim)
            key: (..., key_len, key_dim)

        Returns:
            Scores (..., query_len, key_len).

        Raises:
            TypeError: Query or key is not a tensor of floating point numbers.
            ValueError: A width is not the one the module was made for, or the leading
                dimensions do not broadcast.
        """
        leading = self._check(query, key)
        from_query = query @ self.query_weight.mT
        from_key = key @ self.key_weight.mT
        hidden_bytes = math.prod(leading) * from_key.shape[-2] * self.hidden_dim
        hidden_bytes *= from_key.element_size()
        chunks = query_chunks(query.shape[-2], hidden_bytes)
        if len(chunks) < 2:
            return self._combine(from_query, from_key)
        from torch.utils.checkpoint import checkpoint  # torch 2.6 loads sympy for it

        scores = [
            checkpoint(self._combine, from_query[..., chunk, :], from_key, use_reentrant=False)
            for chunk in chunks
        ]
        return torch.cat(scores, dim=-2)

    def _combine(self, from_query: Tensor, from_key: Tensor) -> Tensor:
        hidden = torch.tanh(from_query.unsqueeze(-2) + from_key.unsqueeze(-3))
        return hidden @ self.vector


class DotProductScore(nn.Module):
    """Dot-product attention: `score(x, q) = x^T q` for a key x and a query q.

    Source: Luong, Pham, Manning: Effective Approaches to Attention-based Neural Machine
    Translation, 2015 ("dot"). There are no parameters.
    """

    def forward(self, query: Tensor, key: Tensor) -> Tensor:
        """Score every key for every query.

        Args:
            query: (..., query_len, dim)
            key: (..., key_len, dim), of the same width

        Returns:
            Scores (..., query_len, key_len).

        Raises:
            TypeError: Query or key is not a tensor of floating point numbers.
            ValueError: The widths differ, or the leading dimensions do not broadcast.
        """
        _same_width(self, query, key)
        return query @ key.mT


class ScaledDotProductScore(nn.Module):
    """Scaled dot-product attention: `score(x, q) = x^T q / sqrt(D)`, D the width of the query.

    Source: Vaswani et al.: Attention Is All You Need, 2017. There are no parameters.
    """

    def forward(self, query: Tensor, key: Tensor) -> Tensor:
        """Score every key for every query, from and to what `DotProductScore` does."""
        _same_width(self, query, key)
        # Scaling the query first keeps float16 from overflowing in the product.
        return (query / math.sqrt(query.shape[-1])) @ key.mT


def _same_width(module: nn.Module, query: Tensor, key: Tensor) -> None:
    leading_shape(query=query, key=key)
    if query.shape[-1] != key.shape[-1] or query.shape[-1] == 0:
        accepted = f"one width, 1 or more, for both in {type(module).__name__}"
        raise ValueError(mismatch(accepted, query=query, key=key))


class BilinearScore(_ParametricScore):
    """Bilinear attention: `score(x, q) = x^T W q` for a key x and a query q.

    W is not symmetric, and queries and keys may differ in width. Source: Luong, Pham,
    Manning: Effective Approaches to Attention-based Neural Machine Translation, 2015
    ("general").

    Args:
        query_dim: Width of the queries.
        key_dim: Width of the keys; `query_dim` by default.
        seed: Seed of the parameter `weight` W (key_dim, query_dim).

    Raises:
        TypeError: A width or the seed is not a whole number.
        ValueError: A width is below 1, or the seed below 0.
    """

    def __init__(self, query_dim: int, key_dim: int | None = None, *, seed: int = 0) -> None:
        super().__init__(query_dim, key_dim)
        self.weight = _parameter(
            "bilinear W", seed, self.key_dim, self.query_dim, fan_in=self.query_dim
        )

    def forward(self, query: Tensor, key: Tensor) -> Tensor:
        """Score every key for every query; arguments and errors are those of `AdditiveScore`."""
        self._check(query, key)
        return (query @ self.weight.mT) @ key.mT


# Module state on purpose: a name registered where a project's modules are imported must be
# known to `attend` outside pytest as well, where there is no session to keep it in.
_factories: dict[str, ScoringFactory] = {
    "additive": lambda query_dim, key_dim, seed: AdditiveScore(query_dim, key_dim, seed=seed),
    "dot_product": lambda query_dim, key_dim, seed: DotProductScore(),
    "scaled_dot_product": lambda query_dim, key_dim, seed: ScaledDotProductScore(),
    "bilinear": lambda query_dim, key_dim, seed: BilinearScore(query_dim, key_dim, seed=seed),
}


@overload
def register_scoring_function(
    name: str, factory: _Factory, *, replace: bool = False
) -> _Factory: ...
@overload
def register_scoring_function(
    name: str, factory: None = None, *, replace: bool = False
) -> Callable[[_Factory], _Factory]: ...
def register_scoring_function(name: str, factory: Any = None, *, replace: bool = False) -> Any:
    """Give a scoring function a name, known from then on to `attend`, fixtures and markers.

    Also a decorator: `@register_scoring_function("cosine")`.

    Args:
        name: An ASCII identifier; it becomes part of test ids.
        factory: Called as `factory(query_dim, key_dim, seed)`; returns an `nn.Module` or a
            function `(query, key) -> scores`.
        replace: Allow a name that is already taken.

    Returns:
        The factory, unchanged.

    Raises:
        TypeError: The factory cannot be called with three arguments.
        ValueError: The name is not an identifier, or it is taken.
    """
    check_scoring_name(name)
    if not replace and name in _factories:
        known = ", ".join(map(repr, _factories))
        raise ValueError(
            misuse("name", f"{name!r}, which is taken", f"none of {known}; or replace=True")
        )

    def register(factory: _Factory) -> _Factory:
        check_factory(name, factory)
        _factories[name] = factory
        return factory

    return register if factory is None else register(factory)


def check_scoring_name(name: object) -> None:
    """Raise TypeError or ValueError unless `name` is an ASCII identifier."""
    accepted = "a str of letters, digits and underscores that does not start with a digit"
    text = misuse("name of a scoring function", repr(name), accepted)
    if not isinstance(name, str):
        raise TypeError(text)
    if not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", name):
        raise ValueError(text)


def check_factory(name: str, factory: object) -> None:
    """Raise TypeError unless `factory(query_dim, key_dim, seed)` is a possible call."""
    what = f"factory of scoring function {name!r}"
    accepted = "a callable factory(query_dim, key_dim, seed) that returns the scoring function"
    if not callable(factory) or isinstance(factory, nn.Module):
        raise TypeError(misuse(what, repr(factory), accepted))
    try:
        signature = inspect.signature(factory)
    except ValueError:  # some callables written in C have none to check
        return
    try:
        signature.bind(1, 1, 0)
    except TypeError:
        got = f"{factory!r}, which takes {signature}"
        raise TypeError(misuse(what, got, accepted)) from None


def scoring_names(extra: Mapping[str, ScoringFactory] | None = None) -> tuple[str, ...]:
    """Return all names: the built-in ones, the registered ones, those in `extra`."""
    return tuple({**_factories, **(extra or {})})


def make_scoring(
    name: str,  # A name from `scoring_names(extra)`
    query_dim: int,  # Width of the queries
    key_dim: int | None = None,  # Width of the keys; `query_dim` by default
    *,
    seed: int = 0,  # Seed of the parameters
    device: torch.device | None = None,  # Where the module is moved to; left where it is by default
    dtype: torch.dtype | None = None,  # What the module is cast to; left as it is by default
    extra: Mapping[str, ScoringFactory] | None = None,  # More factories by name, for this call only
) -> Scoring:
    """Make a scoring function by name."""
    one_of("scoring function", name, scoring_names(extra))
    factory = (extra or {}).get(name) or _factories[name]
    scoring = factory(query_dim, query_dim if key_dim is None else key_dim, seed)
    if not callable(scoring):
        raise TypeError(misuse(
            f"what the factory of scoring function {name!r} returns", repr(scoring),
            "an nn.Module or a function (query, key) -> scores",
        ))  # fmt: skip
    return scoring.to(device, dtype) if isinstance(scoring, nn.Module) else scoring
