"""A tensor that lies on several ranks, judged where it lies: a `DTensor` as it is read.

Each rank reads its own shard, at its place in the whole, and what was measured there is reduced.
No rank gathers the whole: of others a few rows are read, by all ranks at once, for a message.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, TypeGuard, TypeVar, cast

import numpy as np
import torch
from torch import Tensor, distributed

from ..inputs import InBoxes, as_weights, misuse
from .chunks import pieces

T = TypeVar("T")
Box = tuple[slice, ...]

_ACCEPTED = "a DTensor whose placements are Shard and Replicate: tensor.redistribute(...)"


def is_placed(given: object) -> TypeGuard[Any]:
    """Whether something is a DTensor; its module takes a second to import, and is not for that."""
    known = sys.modules.get("torch.distributed.tensor")
    return known is not None and isinstance(given, known.DTensor)


class Viewed(InBoxes):
    """What lies on several ranks, in its own shape or another, as of a view of a tensor."""

    def unsqueeze(self, dim: int) -> Viewed:
        """Return it with one dimension more, of size 1."""
        at = dim % (self.ndim + 1)
        shape = (*self.shape[:at], 1, *self.shape[at:])
        return _View(
            self,
            shape,
            lambda box: (*box[:at], *box[at + 1 :]),
            lambda found, _: found.unsqueeze(at),
        )

    def swapaxes(self, one: int, other: int) -> Viewed:
        """Return it with two dimensions in each other's place."""
        order = list(range(self.ndim))
        order[one], order[other] = other, one
        return _View(
            self, [self.shape[at] for at in order], lambda box: tuple(box[at] for at in order),
            lambda found, _: found.permute(order),
        )  # fmt: skip

    def unflatten(self, dim: int, sizes: tuple[int, int]) -> Viewed:
        """Return it with two dimensions in place of one; the first of the two sizes is not read."""
        at, inner = dim % self.ndim, sizes[1]
        outer = self.shape[at] // inner

        def of(box: Box) -> Box:
            own = slice(box[at].start * inner, box[at].stop * inner)
            return (*box[:at], own, *box[at + 2 :])

        def then(found: Tensor, box: Box) -> Tensor:
            parts = found.reshape(*found.shape[:at], -1, inner, *found.shape[at + 1 :])
            return parts.narrow(at + 1, box[at + 1].start, box[at + 1].stop - box[at + 1].start)

        return _View(self, (*self.shape[:at], outer, inner, *self.shape[at + 1 :]), of, then)

    def double(self) -> Tensor:
        """Return all of it, in float64: who asks for that knows that it is small."""
        return self[(slice(None),) * self.ndim].double()


class _View(Viewed):
    """A tensor in another shape: a box of it is made of one of that tensor."""

    def __init__(
        self,
        source: Viewed,
        shape: Sequence[int],
        of: Callable[[Box], Box],
        then: Callable[[Tensor, Box], Tensor],
    ) -> None:
        self.shape, self.dtype, self.device = torch.Size(shape), source.dtype, source.device
        self._source, self._of, self._then = source, of, then

    def __getitem__(self, box: Box) -> Tensor:
        """Return a box of slices, one for each dimension."""
        whole = tuple(slice(*one.indices(n)[:2]) for one, n in zip(box, self.shape, strict=True))
        return self._then(self._source[self._of(whole)], whole)


class Placed(Viewed):
    """Weights, or a mask, whose shards lie on several ranks.

    A box of it is read by all ranks at once, each of which has to ask for the same.
    `local` is the shard of this rank, which begins at `offset`; `own` is its place in the whole.
    """

    def __init__(self, tensor: Any, name: str) -> None:
        """Read what lies here of a DTensor."""
        from torch.distributed.tensor import Replicate, Shard
        from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

        if not {type(one) for one in tensor.placements} <= {Replicate, Shard}:
            raise TypeError(misuse(name, f"a DTensor placed as {tensor.placements}", _ACCEPTED))
        _check_mesh(tensor.device_mesh, name)
        if tensor.dtype != torch.bool:  # refuse what is refused of a tensor
            as_weights(tensor.to_local().new_zeros(()).expand(tensor.shape), name)
        _check_shard(tensor, name)
        tensor = _with_keys_everywhere(tensor.detach())
        self._tensor, self._name, self._mesh = tensor, name, tensor.device_mesh
        self.local: Tensor = tensor.to_local()
        self.shape, self.dtype, self.device = tensor.shape, self.local.dtype, self.local.device
        _, offset = compute_local_shape_and_global_offset(
            tensor.shape, self._mesh, tensor.placements
        )
        self.offset = tuple(offset)
        # For each dimension of the mesh, that of the tensor which it cuts.
        self._dims = [
            one.dim % tensor.ndim if isinstance(one, Shard) else None for one in tensor.placements
        ]
        self.own = Own(self)

    def __getitem__(self, box: Any) -> Tensor:
        """Return a box, of slices and whole numbers: each rank gives what it has of it."""
        given = box if isinstance(box, tuple) else (box,)
        given = (*given, *[slice(None)] * (self.ndim - len(given)))
        whole = tuple(
            slice(*one.indices(size)[:2]) if isinstance(one, slice) else slice(one, one + 1)
            for one, size in zip(given, self.shape, strict=True)
        )
        sizes = [span.stop - span.start for span in whole]
        wide = torch.uint8 if self.dtype == torch.bool else torch.float64
        found = torch.zeros(sizes, dtype=wide, device=self.device)
        shared = [_both(span, *one) for span, one in zip(whole, self._spans(), strict=True)]
        if all(span.start < span.stop for span in shared):
            there = tuple(
                slice(one.start - span.start, one.stop - span.start)
                for one, span in zip(shared, whole, strict=True)
            )
            found[there] = self.own[tuple(shared)].to(wide)
        found = self._reduced(found, distributed.ReduceOp.SUM, of=range(self.ndim)).to(self.dtype)
        for at in reversed([at for at, one in enumerate(given) if not isinstance(one, slice)]):
            found = found.squeeze(at)
        return found

    @property
    def mT(self) -> Placed:  # noqa: N802 (as of a tensor)
        """Queries and keys in each other's place."""
        return Placed(self._tensor.transpose(-2, -1), self._name)

    def beside(self, operand: Placed | Tensor, dims: Mapping[int, int]) -> Tensor:
        """Return what goes with the shard of this rank of another tensor."""
        # `dims`: which of its dimensions runs along with one of this. Others are returned whole.
        from torch.distributed.tensor import Replicate, Shard
        from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

        start: Sequence[int] = (0,) * operand.ndim
        local: Any = operand
        if isinstance(operand, Placed):
            tensor = operand._tensor
            if operand._mesh != self._mesh:
                local = tensor.full_tensor()
            else:
                alike = {at: to for at, to in dims.items() if operand.shape[to] == self.shape[at]}
                cuts = [Replicate() if at not in alike else Shard(alike[at]) for at in self._dims]
                tensor = tensor.redistribute(placements=cuts)
                local = tensor.to_local()
                _, start = compute_local_shape_and_global_offset(tensor.shape, self._mesh, cuts)
        for at, to in dims.items():
            local = local.narrow(to, self.offset[at] - start[to], self.local.shape[at])
        return cast(Tensor, local)

    def any_of(self, found: Tensor) -> Tensor:
        """Return which of some booleans are True on any rank."""
        count = found.to(self.device, torch.uint8)
        for dim in range(self._mesh.ndim):
            distributed.all_reduce(count, distributed.ReduceOp.MAX, self._mesh.get_group(dim))
        return count.bool()

    def told(self, one: T, *, of_rows: bool) -> list[T]:
        """Return what each shard tells, in the order of shards, once of those that lie twice."""
        # What is of whole rows is told by all ranks that have a part of them.
        place = self.offset[:-1] if of_rows else self.offset
        found = {place: one} if self.local.numel() else {}
        for dim in range(self._mesh.ndim):
            group = self._mesh.get_group(dim)
            given: list[Any] = [None] * distributed.get_world_size(group)
            distributed.all_gather_object(given, found, group)
            found = {place: one for some in given for place, one in some.items()}
        return [found[place] for place in sorted(found)]

    def summed(self, numbers: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
        """Return the sum of what all shards tell, on each rank, to the same bits."""
        found = torch.from_numpy(numbers).to(self.device)
        every = self._reduced(found, distributed.ReduceOp.SUM, of=range(self.ndim))
        return every.cpu().numpy()

    def over_keys(self, found: Tensor, combine: Callable[..., Tensor]) -> Tensor:
        """Combine what was measured in each part of the same rows."""
        return self._reduced(found, _OPERATIONS[combine], of=[self.ndim - 1])

    def _reduced(self, found: Tensor, how: Any, of: Sequence[int]) -> Tensor:
        found = found.contiguous()
        dtype = found.dtype
        found = found.to(torch.uint8) if dtype == torch.bool else found
        for number, dim in enumerate(self._dims):
            if dim in of:
                found = found.clone()
                distributed.all_reduce(found, how, self._mesh.get_group(number))
        return found.to(dtype)

    def _spans(self) -> list[tuple[int, int]]:
        sizes = zip(self.offset, self.local.shape, strict=True)
        return [(start, start + size) for start, size in sizes]


class Own(InBoxes):
    """What lies on this rank, read by its place in the whole."""

    def __init__(self, placed: Placed) -> None:
        self.placed = placed
        self.shape, self.dtype, self.device = placed.shape, placed.dtype, placed.device

    def __getitem__(self, box: Box) -> Tensor:
        """Return a box of slices, which lies here as a whole."""
        own = zip(box, self.placed.offset, strict=True)
        return self.placed.local[tuple(slice(s.start - at, s.stop - at) for s, at in own)]

    def runs(self, box: Box) -> list[slice]:
        """Return the keys of some rows that lie here, as one run."""
        return [slice(*self.placed._spans()[-1])]

    def boxes(self, most_rows: int, most_elements: int) -> Iterator[Box]:
        """Yield the rows that lie here, or a part of them; alike on ranks that have the others."""
        if not self.placed.local.numel():
            return
        limit = max(1, min(most_rows, most_elements // self.shape[-1]))
        for box in pieces(self.placed.local.shape[:-1], limit):
            offsets = zip(box, self.placed.offset, strict=False)
            yield tuple(slice(span.start + at, span.stop + at) for span, at in offsets)


def with_whole_rows(tensor: Any) -> Any:
    """Return a DTensor of which no rank has a part of a row: parts are dealt out anew."""
    from torch.distributed.tensor import Shard

    last = tensor.ndim - 1
    placements = [
        Shard(last - 1) if isinstance(one, Shard) and one.dim in (last, -1) else one
        for one in tensor.placements
    ]
    return tensor.redistribute(placements=placements)


def as_placed(given: object) -> Placed | None:
    """Return what lies on several ranks as what it is; None for a tensor."""
    return given if isinstance(given, Placed) else None


def as_own(given: object) -> Own | None:
    """Return what lies here of it as what it is; None for a tensor."""
    return given if isinstance(given, Own) else None


_OPERATIONS: dict[Callable[..., Tensor], Any] = {
    torch.add: distributed.ReduceOp.SUM,
    torch.minimum: distributed.ReduceOp.MIN,
    torch.maximum: distributed.ReduceOp.MAX,
    torch.logical_or: distributed.ReduceOp.MAX,
} if distributed.is_available() else {}  # fmt: skip


def _with_keys_everywhere(tensor: Any) -> Any:
    """The tensor, or, where some rank has no key of rows that others have, with whole rows."""
    from torch.distributed.tensor import Replicate, Shard

    mesh, last = tensor.device_mesh, tensor.ndim - 1
    cut = [n for n, one in enumerate(tensor.placements) if one in (Shard(last), Shard(-1))]
    ranks = 1
    for number in cut:
        ranks *= mesh.size(number)
    if ranks * ranks <= tensor.shape[-1] or tensor.shape[-1] % ranks == 0:
        return tensor
    placements = [Replicate() if n in cut else one for n, one in enumerate(tensor.placements)]
    return tensor.redistribute(placements=placements)


def _check_mesh(mesh: Any, name: str) -> None:
    """Refuse a mesh whose order is not that of its groups, for torch sends shards by the latter."""
    accepted = f"{_ACCEPTED}, on ranks that its mesh has"
    if mesh.get_coordinate() is None:
        got = f"a DTensor over ranks {mesh.mesh.tolist()} on rank {distributed.get_rank()}"
        raise ValueError(misuse(name, got, accepted))
    if any((mesh.mesh.diff(dim=dim) < 0).any() for dim in range(mesh.ndim)):
        got = f"a DTensor over ranks {mesh.mesh.tolist()}, which are not in ascending order"
        raise ValueError(misuse(name, got, accepted))


def _check_shard(tensor: Any, name: str) -> None:
    """Refuse a shard that is not as torch cuts it, of which nothing tells where it lies."""
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

    shape, _ = compute_local_shape_and_global_offset(
        tensor.shape, tensor.device_mesh, tensor.placements
    )
    local = tuple(tensor.to_local().shape)
    if local != tuple(shape):
        got = f"a DTensor whose shard on rank {distributed.get_rank()} has shape {local}"
        raise ValueError(misuse(name, got, f"one as torch.chunk cuts it, here {tuple(shape)}"))


def _both(span: slice, start: int, stop: int) -> slice:
    return slice(max(span.start, start), min(span.stop, stop))
