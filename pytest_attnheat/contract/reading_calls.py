"""What a call of a target asks: its arguments, read as a described call, the inverse of asking."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import permutations
from typing import Any, TypeAlias

import torch
from torch import Tensor

from pytest_attnheat.attention.call import Call
from pytest_attnheat.attention.packing import packed, unpacked
from pytest_attnheat.attention.vocabulary import permits
from pytest_attnheat.contract.asking import KEYWORDS, dense, keyword_of
from pytest_attnheat.contract.conventions.dense import with_itself
from pytest_attnheat.contract.conventions.packed import CU
from pytest_attnheat.contract.spec import AttentionSpec

Arguments: TypeAlias = dict[str, Any]
Turn: TypeAlias = Callable[[Tensor], Tensor]
_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
# Arguments that change nothing of what is computed.
_INERT = {"enable_gqa", "deterministic", "num_splits", "pack_gqa", "sm_margin", "backend",
          "tensor_layout", "kv_layout", "return_lse", "return_attn_probs", "return_softmax_lse",
          "is_eval", "need_weights", "kernel_options"}  # fmt: skip


# What models of transformers hand through to their attention, which looks at none of it.
_HANDED_THROUGH = ("position_ids", "cache_position", "use_cache", "output_attentions",
                   "output_hidden_states", "return_dict", "num_items_in_batch")  # fmt: skip


class UnreadError(Exception):
    """A call cannot be read, for the reason that it says."""


class SetAsideError(UnreadError):
    """A call in which no defect can be told: it draws at random, or has nothing to attend to."""


@dataclass(frozen=True, eq=False)
class Given:
    """The tensors of a call of a target, in our own shapes.

    Attributes:
        query: (batch, heads, query_len, head_dim), likewise key and value.
        back: Makes of an output (batch, heads, query_len, value_dim) one as the target has it.
        here: The inverse.
        sums: What a log-sum-exp (batch, heads, query_len) may look like as the target returns it.
        features: Fields of `Call` that are said already.
    """

    query: Tensor
    key: Tensor
    value: Tensor
    back: Turn
    here: Turn
    sums: Callable[[Tensor], list[Tensor]]
    features: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, eq=False)
class Reading:
    """A call of a target as it is understood.

    Attributes:
        call: What it asks. Its tensors are those of the arguments, turned: gradients reach them.
        given: Its tensors, and how answers are turned.
        scale_given: Whether the scale is an argument of the call.
    """

    call: Call
    given: Given
    scale_given: bool


# Takes what belongs to query, key and value out of the arguments.
Read: TypeAlias = Callable[[AttentionSpec, Arguments], Given]


def _of_torch(query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False, *, scale=None,  # type: ignore[no-untyped-def]
              enable_gqa=False):  # fmt: skip
    """Only its signature counts: PyTorch's own function tells none."""


def signature_of(spec: AttentionSpec) -> inspect.Signature:
    """Return the signature of a target; that of a builtin is PyTorch's own."""
    if spec.parameters is None:
        return inspect.signature(_of_torch)
    return inspect.Signature(list(spec.parameters.values()))


def read(spec: AttentionSpec, given: Sequence[Any], named: Mapping[str, Any]) -> Reading:
    """Read a call of a target as its specification says that it is called.

    Args:
        spec: The specification of the target.
        given: The arguments of the call by position.
        named: Those by name.

    Raises:
        UnreadError: Something of the call is not described.
    """
    if why := unreadable(spec):
        raise UnreadError(why)
    bound = signature_of(spec).bind(*given, **named)
    bound.apply_defaults()
    arguments = dict(bound.arguments)
    for parameter in bound.signature.parameters.values():
        if parameter.kind is parameter.VAR_KEYWORD:
            arguments |= arguments.pop(parameter.name)
        elif parameter.kind is parameter.VAR_POSITIONAL and arguments.pop(parameter.name):
            raise UnreadError(f"more is given by position than is described (*{parameter.name})")
    name = spec.convention.name if spec.convention else ""
    tensors = _READ.get(name, _three)(spec, arguments)
    for tensor in (tensors.query, tensors.key, tensors.value):
        if tensor.dtype not in _DTYPES or tensor.dtype != tensors.query.dtype:
            raise UnreadError(f"query, key and value are of {tensor.dtype}, or of several dtypes")
    features = {**tensors.features, **_features(spec, arguments)}
    _refuse_others(spec, bound.signature, arguments)
    call = Call(tensors.query, tensors.key, tensors.value, **features)
    return Reading(spec.described(call), tensors, call.scale is not None)


def unreadable(spec: AttentionSpec) -> str:
    """Say why no call of a target can be read; empty if calls can be."""
    if spec.is_captured:
        return "it was captured, and cannot be called"
    if spec.is_block:
        return "a block has projections of its own: what its attention is given is not known"
    if spec.call is not None:
        return "call= says how a call is made, not how one is read"
    if spec.reference is not None:
        return "reference= computes something else than attention as it is described"
    if spec.rounded:
        return "steps are rounded on purpose, which planted versions do not do"
    known = spec.convention
    if known is not None and known.arrange is not dense and known.name not in _READ:
        return f"the convention {known.name} says how a call is made, not how one is read"
    return ""


# --- query, key and value


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


def _three(spec: AttentionSpec, arguments: Arguments) -> Given:
    return _laid_out(spec, *(_tensor(arguments) for _ in range(3)))


def _laid_out(spec: AttentionSpec, query: Tensor, key: Tensor, value: Tensor) -> Given:
    """Tensors in the layout that is declared; of PyTorch's, any leading dimensions will do."""
    if spec.layout == "bhld" and query.ndim != 4:
        if query.ndim < 2:
            raise UnreadError(f"the query has {query.ndim} dimensions")
        shape = query.shape[:-1]
        query, key, value = _four(query), _four(key), _four(value)
        lead = query.shape[:3]
        return Given(
            query,
            key,
            value,
            back=lambda output: output.reshape(*shape, output.shape[-1]),
            here=lambda output: output.reshape(*lead, output.shape[-1]),
            sums=lambda lse: [lse.reshape(shape)],
        )
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


def _four(tensor: Tensor) -> Tensor:
    """A tensor of any leading dimensions as (batch, heads, length, width)."""
    if tensor.ndim > 4:
        return tensor.flatten(0, -4)
    return tensor.reshape((1,) * (4 - tensor.ndim) + tuple(tensor.shape))


def _sums(lse: Tensor) -> list[Tensor]:
    return [turned for order in permutations(range(3))
            for turned in (lse.permute(order), lse.permute(order).unsqueeze(-1))]  # fmt: skip


def _stacked(at: int, spec: AttentionSpec, arguments: Arguments) -> Given:
    """Query, key and value in one tensor (batch, length, 3, heads, width), or key and value."""
    query = _tensor(arguments) if at else None
    query, key, value = _apart(query, _tensor(arguments), 2)
    return _laid_out(spec, query, key, value)


def _apart(query: Tensor | None, together: Tensor, dim: int) -> list[Tensor]:
    """Query, key and value, some of which are one tensor."""
    some = [together.select(dim, at) for at in range(together.shape[dim])]
    if len(some) != (3 if query is None else 2):
        raise UnreadError(f"{tuple(together.shape)} holds {len(some)} tensors")
    return some if query is None else [query, *some]


def _each_sample(spec: AttentionSpec, arguments: Arguments) -> Given:
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


def _always_causal(spec: AttentionSpec, arguments: Arguments) -> Given:
    return replace(_three(spec, arguments), features={"causal": True})


def _flex(spec: AttentionSpec, arguments: Arguments) -> Given:
    given = _three(spec, arguments)
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


def _transformers(spec: AttentionSpec, arguments: Arguments) -> Given:
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
        features |= {"mask": mask} if mask.dtype == torch.bool else _as_mask(mask)
    told = arguments.pop("is_causal", None)
    causal = getattr(layer, "is_causal", True) if told is None else told
    # Eager attention is causal by its mask alone.
    if causal and mask is None and query.shape[2] > 1 and "is_causal" in (spec.parameters or {}):
        features["causal"] = True
    return Given(
        query, key, value, back=lambda o: o.transpose(1, 2), here=lambda o: o.transpose(1, 2),
        sums=_sums, features=features,
    )  # fmt: skip


def _packed(
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


def _varlen_of_torch(spec: AttentionSpec, arguments: Arguments) -> Given:
    """PyTorch's `varlen_attn`, which is causal by its window alone."""
    given = _packed(("cu_seq_q", "cu_seq_k", "max_q", "max_k"), "", spec, arguments)
    left, right = arguments.pop("window_size", None) or (-1, -1)
    features: dict[str, Any] = {"causal": True} if right == 0 else {}
    if left >= 0 or right > 0:
        features["window"] = (left if left >= 0 else None, right if right > 0 else None)
    arguments.pop("return_aux", None)
    return replace(given, features=given.features | features)


_READ: dict[str, Read] = {
    "flash_attn_qkvpacked": partial(_stacked, 0),
    "flash_attn_kvpacked": partial(_stacked, 1),
    "flashinfer_single_prefill": _each_sample,
    "flashinfer_single_decode": _each_sample,
    "fla_parallel_attn": _always_causal,
    "flex_attention": _flex,
    "transformers": _transformers,
    "flash_attn_varlen_qkvpacked": partial(_packed, ("cu_seqlens", "max_seqlen"), "qkv"),
    "flash_attn_varlen_kvpacked": partial(_packed, CU, "kv"),
    "flash_mla_varlen": partial(_packed, ("cu_seqlens_qo", "cu_seqlens_kv", "max_seqlen_qo",
                                          "max_seqlen_kv"), ""),
    "torch_varlen": _varlen_of_torch,
    **{name: partial(_packed, CU, "") for name in
       ("flash_attn_varlen", "flash_attn_3_varlen", "flash_attn_4_varlen", "sageattn_varlen")},
}  # fmt: skip

# --- what a call has besides


def _features(spec: AttentionSpec, arguments: Arguments) -> dict[str, Any]:
    """Take out what is given under the keywords that are declared, as fields of `Call`."""
    found: dict[str, Any] = {}
    dropout = spec.dropout if isinstance(spec.dropout, str) else "dropout_p"
    if arguments.pop(dropout, 0.0):
        raise SetAsideError("it drops weights at random")
    if spec.takes_causal and arguments.pop(spec.causal_argument, False):
        found["causal"] = True
    if spec.mask is not None and (mask := arguments.pop(spec.mask_argument, None)) is not None:
        found |= _mask(spec, mask)
    for name in KEYWORDS.values():
        keyword = keyword_of(spec, name)
        given = None if keyword is None else arguments.pop(keyword, None)
        if given is None:
            continue
        value = _value(spec, name, given)
        if value is not None:
            found[name] = value
    return found


def _mask(spec: AttentionSpec, mask: object) -> dict[str, Any]:
    """A mask as booleans, True where a query may attend; or floats, as a bias."""
    if not isinstance(mask, Tensor):
        raise UnreadError(f"its mask is no tensor, but {type(mask).__name__}")
    if spec.mask_shape == "(B, S)" or (not spec.has_heads and mask.ndim == 3):
        whole = mask[:, None, None] if mask.ndim == 2 else mask[:, None]
    else:
        whole = _four(mask)
    if mask.dtype == torch.bool:
        if spec.mask == "additive":
            raise UnreadError("its mask is boolean, where floats are declared")
        return {"mask": ~whole if spec.mask == "drop" else whole}
    if not mask.is_floating_point():
        raise UnreadError(f"its mask is of {mask.dtype}")
    if spec.mask not in ("additive", "any"):
        raise UnreadError("its mask holds floats, where booleans are declared")
    return _as_mask(whole)


def _as_mask(bias: Tensor) -> dict[str, Any]:
    """A bias as booleans where it does no more than hide keys, and not all of a row."""
    seen = permits(bias)
    alone = not bias.requires_grad and bool((bias[seen] == 0).all()) and bool(seen.any(-1).all())
    return {"mask": seen} if alone else {"bias": bias}


def _value(spec: AttentionSpec, name: str, given: Any) -> Any:
    """A value as `Call` has it; None where it says that there is none."""
    if name == "window":
        return _window(spec, given)
    if name in ("softcap", "chunk"):
        return given if given > 0 else None  # 0 is none, and so is -1
    if name == "scale":
        return float(given)
    if not isinstance(given, Tensor):
        raise UnreadError(f"{keyword_of(spec, name)} is no tensor, but {type(given).__name__}")
    if name in ("alibi", "sinks") and given.ndim != 1:
        raise UnreadError(f"{keyword_of(spec, name)} has {given.ndim} dimensions, not one per head")
    if name == "bias":
        return _four(given)
    return (given, given) if name == "documents" else given


def _window(spec: AttentionSpec, given: Any) -> tuple[int | None, int | None] | None:
    if isinstance(given, int):  # the left side alone
        convert = (spec.convention.values if spec.convention else {}).get("window")
        given = (given - (convert is with_itself), None)
    left, right = (None if side is None or side < 0 else int(side) for side in given)
    return None if left is right is None else (left, right)


def _refuse_others(spec: AttentionSpec, of: inspect.Signature, arguments: Arguments) -> None:
    """Refuse an argument that is not described, unless it has its default."""
    usual = {name: one.default for name, one in of.parameters.items()}
    said = dict(spec.arguments or {})
    for name, given in arguments.items():
        if name in _INERT or given is None or given is usual.get(name):
            continue
        if name in said and (given is said[name] or given == said[name]):
            continue
        if not isinstance(given, Tensor) and given == usual.get(name):
            continue
        raise UnreadError(f"{name}={_shown(given)} is not described")


def _shown(given: object) -> str:
    return f"<{tuple(given.shape)}>" if isinstance(given, Tensor) else repr(given)[:60]
