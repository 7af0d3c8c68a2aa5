"""How the tensors of a call of a public callable are read: what its convention arranges, undone."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from itertools import permutations
from typing import TYPE_CHECKING, Any, TypeAlias

import torch
from torch import Tensor

from ...attention.packing import packed, unpacked
from ...attention.vocabulary import permits

if TYPE_CHECKING:
    from ..spec import AttentionSpec

Arguments: TypeAlias = dict[str, Any]
Turn: TypeAlias = Callable[[Tensor], Tensor]

# What models of transformers hand through to their attention, which looks at none of it.
_HANDED_THROUGH = ("position_ids", "cache_position", "use_cache", "output_attentions",
                   "output_hidden_states", "return_dict", "num_items_in_batch")  # fmt: skip


class UnreadError(Exception):
    """A call cannot be read, for the reason that it says."""


class SetAsideError(UnreadError):
    """A call in which no defect can be told: it draws at random, or has nothing to attend to."""


@dataclass(frozen=True, eq=False)
class Given:
    """The tensors of a call of a target, in our own shapes."""

    query: Tensor  # (batch, heads, query_len, head_dim), likewise key and value
    key: Tensor
    value: Tensor
    back: Turn  # Makes of an output (batch, heads, query_len, value_dim) one as the target has it
    here: Turn  # The inverse
    sums: Callable[[Tensor], list[Tensor]]  # What a log-sum-exp may look like as returned
    features: dict[str, Any] = field(default_factory=dict)  # Fields of `Call` that are said already


# Takes what belongs to query, key and value out of the arguments.
Read: TypeAlias = Callable[["AttentionSpec", Arguments], Given]


def _tensor(arguments: Arguments, name: str | None = None) -> Tensor:
    """Take out a tensor, by default the first argument that is left."""
    if name is None and not arguments:
        raise UnreadError("it is given fewer than query, key and value")
    name = next(iter(arguments)) if name is None else name
    tensor = arguments.pop(name, None)
    if not isinstance(tensor, Tensor):
        raise UnreadError(f"{name} is no tensor, but {type(tensor).__name__}")
    if tensor.numel() == 0:
        raise SetAsideError(f"{name} has no elements")
    return tensor


def three(spec: AttentionSpec, arguments: Arguments) -> Given:
    """Query, key and value, before all else."""
    return _laid_out(spec, *(_tensor(arguments) for _ in range(3)))


def _laid_out(spec: AttentionSpec, query: Tensor, key: Tensor, value: Tensor) -> Given:
    """Tensors in the layout that is declared; of PyTorch's, any leading dimensions will do."""
    if spec.layout == "bhld" and query.ndim != 4:
        if query.ndim < 2:
            raise UnreadError(f"the query has {query.ndim} dimensions")
        shape = query.shape[:-1]
        query, key, value = four(query), four(key), four(value)
        lead = query.shape[:3]
        return Given(
            query, key, value, back=lambda output: output.reshape(*shape, output.shape[-1]),
            here=lambda output: output.reshape(*lead, output.shape[-1]),
            sums=lambda lse: [lse.reshape(shape)],
        )  # fmt: skip
    if any(tensor.ndim != len(spec.layout) for tensor in (query, key, value)):
        raise UnreadError(f"layout {spec.layout!r} has other dimensions than {tuple(query.shape)}")
    ours = "bhld" if spec.has_heads else "bld"
    there = [ours.index(letter) for letter in spec.layout]
    home = [spec.layout.index(letter) for letter in ours]

    def here(tensor: Tensor) -> Tensor:
        turned = tensor.permute(home)
        return turned if spec.has_heads else turned.unsqueeze(1)

    def back(output: Tensor) -> Tensor:
        return (output if spec.has_heads else output[:, 0]).permute(there)

    return Given(here(query), here(key), here(value), back=back, here=here, sums=_sums)


def four(tensor: Tensor) -> Tensor:
    """A tensor of any leading dimensions as (batch, heads, length, width)."""
    if tensor.ndim > 4:
        return tensor.flatten(0, -4)
    return tensor.reshape((1,) * (4 - tensor.ndim) + tuple(tensor.shape))


def _sums(lse: Tensor) -> list[Tensor]:
    return [turned for order in permutations(range(3))
            for turned in (lse.permute(order), lse.permute(order).unsqueeze(-1))]  # fmt: skip


def qkv_stacked(spec: AttentionSpec, arguments: Arguments) -> Given:
    """Query, key and value in one tensor (batch, length, 3, heads, width)."""
    return _laid_out(spec, *_apart(None, _tensor(arguments), 2))


def kv_stacked(spec: AttentionSpec, arguments: Arguments) -> Given:
    """Key and value in one tensor (batch, length, 2, heads, width)."""
    return _laid_out(spec, *_apart(_tensor(arguments), _tensor(arguments), 2))


def _apart(query: Tensor | None, together: Tensor, dim: int) -> list[Tensor]:
    """Query, key and value, some of which are one tensor."""
    some = [together.select(dim, at) for at in range(together.shape[dim])]
    if len(some) != (3 if query is None else 2):
        raise UnreadError(f"{tuple(together.shape)} holds {len(some)} tensors")
    return some if query is None else [query, *some]


def each_sample(spec: AttentionSpec, arguments: Arguments) -> Given:
    """One sample, (length, heads, width); or one query of it, (heads, width)."""
    query, key, value = (_tensor(arguments) for _ in range(3))
    alone = query.ndim == 2
    query = query[None] if alone else query
    if (mask := arguments.get(spec.mask_argument)) is not None:
        arguments[spec.mask_argument] = mask[None, None]
    return Given(
        query.transpose(0, 1)[None],
        key.transpose(0, 1)[None],
        value.transpose(0, 1)[None],
        back=lambda output: output[0, :, 0] if alone else output[0].transpose(0, 1),
        here=lambda o: o[None, :, None] if alone else o.transpose(0, 1)[None],
        sums=lambda lse: [lse[0, :, 0]] if alone else [lse[0].T, lse[0]],
    )


def always_causal(spec: AttentionSpec, arguments: Arguments) -> Given:
    """Query, key and value of what is causal without being told."""
    return replace(three(spec, arguments), features={"causal": True})


def flex(spec: AttentionSpec, arguments: Arguments) -> Given:
    """Query, key and value, and functions of scores and of positions."""
    given = three(spec, arguments)
    features: dict[str, Any] = {}
    if (blocks := arguments.pop("block_mask", None)) is not None:
        batch, head, query, key = (
            torch.arange(n, device=given.query.device).view([-1 if i == d else 1 for d in range(4)])
            for i, n in enumerate((*given.query.shape[:3], given.key.shape[2]))
        )
        mask = blocks.mask_mod(batch, head, query, key)
        sizes = (*given.query.shape[:3], given.key.shape[2])
        features["mask"] = mask.expand(sizes)
    if (function := arguments.pop("score_mod", None)) is not None:
        features["score_mod"] = function
    return replace(given, features=features)


def transformers(spec: AttentionSpec, arguments: Arguments) -> Given:
    """A function of transformers: heads come first in what goes in, last in what comes out."""
    layer = arguments.pop("module")
    for name in _HANDED_THROUGH:
        arguments.pop(name, None)
    query, key, value = (_tensor(arguments, name) for name in ("query", "key", "value"))
    features: dict[str, Any] = {}
    if arguments.pop("dropout", 0.0):
        raise SetAsideError("it drops weights at random")
    if (scaling := arguments.pop("scaling", None)) is not None:
        features["scale"] = float(scaling)
    if (mask := arguments.get("attention_mask")) is not None:
        arguments.pop("attention_mask")
        mask = mask[..., : key.shape[2]]
        features |= {"mask": mask} if mask.dtype == torch.bool else as_mask(mask)
    told = arguments.pop("is_causal", None)
    causal = getattr(layer, "is_causal", True) if told is None else told
    # Eager attention is causal by its mask alone.
    if causal and mask is None and query.shape[2] > 1 and "is_causal" in (spec.parameters or {}):
        features["causal"] = True
    return Given(
        query, key, value, back=lambda o: o.transpose(1, 2), here=lambda o: o.transpose(1, 2),
        sums=_sums, features=features,
    )  # fmt: skip


def back_to_back(
    names: Sequence[str], together: str, spec: AttentionSpec, arguments: Arguments
) -> Given:
    """Sequences of several lengths, one after the other: (tokens, heads, width)."""
    first = None if together == "qkv" else _tensor(arguments)
    second = _tensor(arguments)
    if together:
        query, key, value = _apart(first, second, 1)
    else:
        assert first is not None
        query, key, value = first, second, _tensor(arguments)
    ends = [arguments.pop(name, None) for name in names[: 1 if together == "qkv" else 2]]
    if any(not isinstance(one, Tensor) for one in ends):
        raise UnreadError(f"{' and '.join(names[:2])} do not say where sequences begin")
    for name in names:
        arguments.pop(name, None)
    queries, keys = (one.long().diff().to(query.device) for one in (ends[0], ends[-1]))
    if int(queries.sum()) != len(query) or int(keys.sum()) != len(key):
        raise UnreadError("packed tensors hold other numbers of tokens than their lengths say")
    longest, most = int(queries.max()), int(keys.max())
    if not longest or not most:
        raise UnreadError("all sequences are empty")

    def here(tensor: Tensor, lengths: Tensor = queries, length: int = longest) -> Tensor:
        return unpacked(tensor, lengths, length).transpose(1, 2)

    return Given(
        here(query), here(key, keys, most), here(value, keys, most),
        back=lambda output: packed(output, queries), here=here,
        sums=lambda lse: [rows.T for rows in [packed(lse[..., None], queries)[..., 0]]]
        + [packed(lse[..., None], queries)[..., 0]],
        features={"query_lengths": queries, "lengths": keys},
    )  # fmt: skip


def varlen_of_torch(spec: AttentionSpec, arguments: Arguments) -> Given:
    """PyTorch's `varlen_attn`, which is causal by its window alone."""
    given = back_to_back(("cu_seq_q", "cu_seq_k", "max_q", "max_k"), "", spec, arguments)
    left, right = arguments.pop("window_size", None) or (-1, -1)
    features: dict[str, Any] = {"causal": True} if right == 0 else {}
    if left >= 0 or right > 0:
        features["window"] = (left if left >= 0 else None, right if right > 0 else None)
    arguments.pop("return_aux", None)
    return replace(given, features=given.features | features)


def as_mask(bias: Tensor) -> dict[str, Any]:
    """A bias as booleans where it does no more than hide keys, and not all of a row."""
    seen = permits(bias)
    alone = not bias.requires_grad and bool((bias[seen] == 0).all()) and bool(seen.any(-1).all())
    return {"mask": seen} if alone else {"bias": bias}
