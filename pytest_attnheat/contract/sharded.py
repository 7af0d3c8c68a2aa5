"""A subject that runs on several ranks, each with its shard, called as one with whole tensors.

A call is scattered in the order of the scheme, and the answer gathered. So are the gradients: of
whole tensors they are what the ranks make of their shards, in a backward pass of their own.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import combinations, count, product
from typing import Any, cast

import torch
from torch import Tensor, distributed

from ..attention.sharding import SHARDED
from ..attention.shards import SCHEMES, Scheme, Shards
from ..callables import identical, parameters_of
from ..failure import Checked, Failure, Place
from ..inputs import misuse, whole_number
from .examination import Examination
from .ranks import Ranks
from .spec import AttentionSpec

# How many calls a rank keeps, of which gradients may be asked.
_KEPT = 8
# After so many calls in a row that a rank did not survive, no more is asked: each may have waited
# for the time limit.
_MOST_IN_A_ROW = 2


class Sharded:
    """A subject on several ranks, with the signature that it has on one of them."""

    def __init__(
        self, subject: Callable[..., Any], name: str, shards: Shards, dim: int, time_limit: float
    ) -> None:
        """Start nothing yet; `dim` is that of positions, in each tensor as the subject takes it."""
        self.subject, self.shards, self._dim, self._limit = subject, shards, dim, time_limit
        self._groups: dict[str, Ranks] = {}
        self._numbers = count()
        self._lost: list[str] = []
        self.__name__ = self.__qualname__ = name
        if (parameters := parameters_of(subject)) is not None:
            self.__signature__ = inspect.Signature(list(parameters.values()))

    def __deepcopy__(self, memory: object) -> Sharded:
        """Stay the same: ranks are not copied."""
        return self

    def __call__(self, query: Tensor, key: Tensor, value: Tensor, **arguments: Any) -> Tensor:
        """Call the subject on all ranks."""
        tensors = (query, key, value)
        if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors):
            return cast(Tensor, _apply(self, arguments, *tensors))
        return self.forward(tensors, arguments, (False,) * 3)[0]

    def forward(
        self, tensors: Sequence[Tensor], arguments: dict[str, Any], wanted: Sequence[bool]
    ) -> tuple[Tensor, int | None]:
        """Return the output, and the number of the call if gradients can be asked of it."""
        number = next(self._numbers)
        # Each rank has random numbers of its own, and other ones in each call.
        seed = int(torch.randint(2**40, ()))
        scattered = [self._scattered(tensor) for tensor in tensors]
        answers = self._asked(
            tensors[0],
            [("forward", number, seed, list(local), arguments, tuple(wanted))
             for local in zip(*scattered, strict=True)],
        )  # fmt: skip
        outputs = [output for output, _, _ in answers]
        # What the subject writes into its shards is written into the whole, as it were there.
        written = (held for _, _, held in answers)
        for tensor, before, *after in zip(tensors, scattered, *written, strict=True):
            if any(shard is not None for shard in after):
                now = [b if a is None else a for b, a in zip(before, after, strict=True)]
                tensor.detach().copy_(self.shards.gather(now, self._dim))
        for rank, (output, query) in enumerate(zip(outputs, scattered[0], strict=True)):
            if output.ndim != query.ndim or output.shape[self._dim] != query.shape[self._dim]:
                raise ValueError(
                    f"rank {rank} of {self.shards.ranks} must answer its own queries, here of shape"
                    f" {tuple(query.shape)}; got {tuple(output.shape)}"
                )
        differentiable = any(one for _, one, _ in answers)
        whole = self.shards.gather(outputs, self._dim).to(tensors[0].device)
        return whole, number if differentiable else None

    def backward(self, number: int, above: Tensor) -> list[Tensor | None]:
        """Return the gradients of query, key and value; None where no rank has one."""
        answers = self._asked(
            above, [("backward", number, local) for local in self._scattered(above)]
        )
        found: list[Tensor | None] = []
        for shards in zip(*answers, strict=True):
            known = next((one for one in shards if isinstance(one, Tensor)), None)
            if known is None:
                found.append(None)
                continue
            # What has no gradient on some ranks has told its shape there.
            given = [one if isinstance(one, Tensor) else known.new_zeros(one) for one in shards]
            found.append(self.shards.gather(given, self._dim).to(above.device))
        return found

    def _asked(self, tensor: Tensor, told: Sequence[Sequence[Any]]) -> list[Any]:
        """Ask all ranks; what was lost too often is refused, so that an examination ends."""
        if (lost := len(self._lost)) >= _MOST_IN_A_ROW:
            why = f"{self._lost[0]}; so in {_MOST_IN_A_ROW} calls in a row, and no more is asked"
            self._lost.append(why)
            # Once a failure, as some calls find out what the subject takes, and are not judged.
            raise Failure("", why) if lost == _MOST_IN_A_ROW else NotImplementedError(why)
        try:
            answers = self._group(tensor).run(told)
        except Failure as failure:
            if not failure.assertion:  # not one that the subject raised
                self._lost.append(failure.claim)
            raise
        self._lost.clear()
        return answers

    def close(self) -> None:
        """End the ranks."""
        for group in self._groups.values():
            group.close()
        self._groups.clear()

    def _scattered(self, tensor: Tensor) -> list[Tensor]:
        return self.shards.scatter(tensor.detach().cpu(), self._dim)

    def _group(self, tensor: Tensor) -> Ranks:
        kind = tensor.device.type
        if kind not in self._groups:
            body = OnRank(self.subject, kind)
            vars(body)["__qualname__"] = self.__name__  # what is said to be on ranks
            self._groups[kind] = Ranks(self.shards.ranks, body, kind, self._limit)
        return self._groups[kind]


class _Scattered(torch.autograd.Function):
    """A call whose backward pass is that of the ranks."""

    @staticmethod
    def forward(ctx: Any, sharded: Sharded, arguments: dict[str, Any], *tensors: Tensor) -> Tensor:
        ctx.sharded = sharded
        output, ctx.number = sharded.forward(tensors, arguments, ctx.needs_input_grad[2:])
        if ctx.number is None:
            ctx.mark_non_differentiable(output)
        return output

    @staticmethod
    def backward(ctx: Any, above: Tensor) -> Any:
        return None, None, *ctx.sharded.backward(ctx.number, above)


_apply: Callable[..., Any] = _Scattered.apply


@dataclass
class OnRank:
    """The subject on one rank; it keeps the last calls, of which gradients may be asked."""

    subject: Callable[..., Any]  # The subject
    device: str  # The kind of device that its tensors are on
    _calls: dict[int, tuple[Tensor, list[Tensor]]] = field(default_factory=dict)

    def __call__(self, kind: str, *told: Any) -> Any:
        """Do what is asked, "forward" or "backward"."""
        return getattr(self, kind)(*told)

    def forward(
        self,
        number: int,
        seed: int,
        tensors: list[Tensor],
        arguments: dict[str, Any],
        wanted: tuple[bool, ...],
    ) -> tuple[Tensor, bool, list[Tensor | None]]:
        """Return the output, whether gradients can be asked of it, and the inputs that changed."""
        torch.manual_seed(seed + distributed.get_rank())
        leaves = [tensor.to(self.device, copy=True) for tensor in tensors]
        for leaf, needed in zip(leaves, wanted, strict=True):
            leaf.requires_grad_(needed)
        with torch.set_grad_enabled(any(wanted)):
            result = self.subject(*leaves, **arguments)
        output = result[0] if isinstance(result, tuple | list) and result else result
        if not isinstance(output, Tensor):
            raise TypeError(f"each rank must return a tensor; got {type(output).__name__}")
        self._calls[number] = output, leaves
        for old in [one for one in self._calls if one <= number - _KEPT]:
            del self._calls[old]
        held = [leaf.detach().cpu() for leaf in leaves]
        changed = [None if identical(now, was) else now
                   for now, was in zip(held, tensors, strict=True)]  # fmt: skip
        return output.detach().cpu().clone(), output.requires_grad, changed

    def backward(self, number: int, above: Tensor) -> list[Any]:
        """Return the gradient of each tensor; its shape where it has none."""
        output, leaves = self._calls[number]
        wanted = [leaf for leaf in leaves if leaf.requires_grad]
        found: list[Tensor | None] = [None] * len(wanted)
        if output.requires_grad:
            found = list(
                torch.autograd.grad(
                    output, wanted, above.to(output.device, output.dtype), allow_unused=True,
                    retain_graph=True,
                )
            )  # fmt: skip
        slopes = iter(found)
        given = [next(slopes) if leaf.requires_grad else None for leaf in leaves]
        return [
            tuple(leaf.shape) if slope is None else slope.detach().cpu().clone()
            for leaf, slope in zip(leaves, given, strict=True)
        ]


def on_ranks(spec: AttentionSpec, ranks: int, time_limit: float) -> tuple[AttentionSpec, Sharded]:
    """Return the specification of a sharded subject as it is called on several ranks, and that."""
    whole_number("ranks", ranks, least=2)
    if spec.sharding is None:
        accepted = f"AttentionSpec(..., sharding=), one of {', '.join(map(repr, SCHEMES))}"
        raise ValueError(misuse("ranks", f"{ranks} for what is not sharded", accepted))
    scheme: Scheme = spec.sharding.scheme if isinstance(spec.sharding, Shards) else spec.sharding
    shards = Shards(scheme, ranks)
    dim = spec.layout.index("l")
    subject = Sharded(spec.implementation, spec.name, shards, dim, time_limit)
    return replace(spec, subject=subject, sharding=shards), subject


# --- one seed of dropout for all ranks

_SHARE = 0.25
# How many queries and keys there are at least.
_LENGTH = 32
# That two ranks drop the same weights by chance is as rare as e ** -this.
_UNLIKELY = 20.0


def judge_dropout_of_ranks(examination: Examination, shards: Shards) -> None:
    """Judge whether ranks drop the same of the weights that each of them makes."""
    # Each rank has random numbers of its own, so what is dropped alike comes from one seed.
    length = -(-_LENGTH // shards.parts) * shards.parts
    alike = examination.space.declared.levels()["value_dim"] == ("equal",)
    call = examination.case(sizes=(length, length), **({"head_dim": 64} if alike else {}))
    # The weights are read off values that are an identity matrix.
    width = call.query.shape[-1] if alike else length
    identity = torch.eye(length, width, dtype=call.value.dtype, device=call.value.device)
    call = replace(call, value=identity.expand(*call.value.shape[:2], -1, -1).contiguous())
    whole, kept = (
        examination.spec.ask(call, dropout=share).output[..., :length].cpu()
        for share in (0.0, _SHARE)
    )
    judged = whole > 2 * torch.finfo(whole.dtype).smallest_normal
    dropped = (kept == 0) & judged
    parts = list(_of_ranks(judged, dropped, shards))
    for (rank, where, seen, lost), (other, there, seen_too, lost_too) in combinations(parts, 2):
        both = seen & seen_too
        if rank == other or not torch.equal(lost & both, lost_too & both):
            continue
        if _is_no_chance(both, lost & both):
            (defect,) = (one for one in SHARDED if one.seen == "randomness")
            raise Failure(
                "",
                f"with dropout_p={_SHARE:g} ranks {rank} and {other} drop the same weights",
                worst=Place(f"{int((lost & both).sum())} of {where} are dropped, and the same of "
                            f"{there}"),
                cause=f"it is attention {defect.sentence} ({defect.name})",
                tensor=Checked.of(whole),
            )  # fmt: skip


def _of_ranks(
    judged: Tensor, dropped: Tensor, shards: Shards
) -> Iterator[tuple[int, str, Tensor, Tensor]]:
    """Yield what a rank makes: its number, where it lies, what is judged, and what is dropped."""
    if shards.scheme == "ulysses":
        some = zip(judged.chunk(shards.ranks, 1), dropped.chunk(shards.ranks, 1), strict=True)
        for rank, (seen, lost) in enumerate(some):
            yield rank, f"the weights of the heads of rank {rank}", seen, lost
        return
    held = shards.of(judged.shape[-1])
    for (rank, own), (source, keys) in product(enumerate(held), repeat=2):
        where = f"the weights of rank {rank} at the keys of rank {source}"
        yield rank, where, judged[:, :, own][..., keys], dropped[:, :, own][..., keys]


def _is_no_chance(judged: Tensor, dropped: Tensor) -> bool:
    """Whether what is dropped is so much, one by one, that no other rank drops it by chance."""
    # Where whole lines are dropped, or nothing, another check tells so, which says nothing of
    # ranks.
    kept = judged & ~dropped
    if not all(bool((dropped.any(dim) & kept.any(dim)).any()) for dim in (-1, -2)):
        return False
    every, lost = float(judged.sum()), float(dropped.sum())
    ways = math.lgamma(every + 1) - math.lgamma(lost + 1) - math.lgamma(every - lost + 1)
    return ways > _UNLIKELY
