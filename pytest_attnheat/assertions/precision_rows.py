"""A call that is too long to be judged as a whole: some of its rows, beside float64 of these alone.

The subject is called at its full length. The gradient of its output is zero but for the chosen
rows, so that the gradients of all keys and values are those of these rows alone: each key is
judged by its share of them.

In a row of 131,072 keys a few that are lost are less than rounding in half precision. So the
subject is called once more with values that count: each channel has ones at a run of keys and
zeros elsewhere, and the output there is the weight of that run. Short runs lie where kernels go
wrong: at the end, beside blocks, and where an offset needs one bit more. The gradient of a query is
judged there too, each row by one run: as a sum over all keys, it is small beside its rounding.

A few keys of a long run are less than its rounding. So the subject is called once more, with signs
as values: a sum of signs is near zero, and so is its rounding. Each key leaves its own signs in all
rows and channels, by which one that is lost is suspected where its weights are not small beside the
rounding of all others. It is counted then.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

import torch
from torch import Tensor

from ..attention.call import Call, ScoreMod
from ..attention.lazy import LazyWeights
from ..failure import Failure, Place
from .precision_elements import Judgement

# Where kernels cut, and where offsets of 16 bits end, with a sign and without.
_BLOCKS, _BITS = (64, 128), (15, 16)
# Keys on either side of such a place that are counted alone.
_NEAR = 16
# Less than this part of the weight that a run of keys should have is none of it.
_NONE = 0.01
# Runs of keys that are named one by one.
_LISTED = 6
# Keys are counted one by one that may be lost beyond so many standard errors.
_SURE = 5.0
# Of one key in a run, this part of its weight is missed.
_PART = 0.05
_TINY = torch.finfo(torch.float64).tiny
# So many NaN lie before and after an input whose surroundings are NaN: more than a block has.
BESIDE = 2**15


def chosen_rows(query_len: int, key_len: int, count: int, seed: int) -> list[int]:
    """Return the numbers of about so many rows, in order."""
    # The first and the last, those beside 2^15 and 2^16 (as queries, and as keys where the last
    # query stands at the last key), beside the edges of the first and the last block; the others
    # are drawn evenly from a seed.
    if count >= query_len:
        return list(range(query_len))
    edges = [1 << bits for bits in _BITS]
    edges += [edge + query_len - key_len for edge in edges]
    edges += [*_BLOCKS, *(query_len // size * size for size in _BLOCKS)]
    wanted = [0, query_len - 1, *(edge + side for edge in edges for side in (-1, 0))]
    found = list(dict.fromkeys(row for row in wanted if 0 <= row < query_len))[:count]
    drawn = torch.rand(count, generator=torch.Generator("cpu").manual_seed(seed))
    spread = ((torch.arange(count, device="cpu") + drawn) * query_len / count).long().tolist()
    rest = [row for row in spread if row not in found]
    step = max(1, len(rest) // max(1, count - len(found)))
    return sorted({*found, *rest[::step][: count - len(found)]})


def of_rows(call: Call, rows: Sequence[int]) -> Call:
    """Return the call of some queries: what counts positions becomes a mask and a bias."""
    device, lead = call.query.device, call.query.shape[:-2]
    numbers = torch.tensor(rows, device=device)
    maps = torch.arange(call.maps, device=device)

    def whole(tensor: Tensor) -> Tensor:
        own = lead if tensor.shape[0] == call.maps else (1,) * len(lead)
        return tensor.reshape(*own, *tensor.shape[1:])

    def some(tensor: Tensor | None) -> Tensor | None:
        rowless = tensor is None or tensor.ndim < 2 or tensor.shape[-2] == 1
        return tensor if rowless or tensor is None else tensor[..., numbers, :]

    at = call.positions(maps, numbers)
    rule, mask = call.permitted(maps, numbers), some(call.mask)
    if rule is not None:
        mask = whole(rule) if mask is None else whole(rule) & mask
    bias = some(call.bias)
    if (distant := call.distant(at, torch.float64)) is not None:
        bias = whole(distant) if bias is None else whole(distant) + bias.detach().double()
    return Call(
        call.query[..., numbers, :], call.key, call.value, mask=mask, bias=bias, scale=call.scale,
        softcap=call.softcap, sinks=call.sinks, fully_masked=call.fully_masked,
        rounded=call.rounded, score_mod=_renumbered(call.score_mod, numbers),
        upstream=some(call.upstream),
    )  # fmt: skip


def _renumbered(function: ScoreMod | None, numbers: Tensor) -> ScoreMod | None:
    if function is None:
        return None

    def change(score: Tensor, batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return function(score, batch, head, numbers[query], key)

    return change


# --- values that count the weight of runs of keys


@dataclass(frozen=True)
class Runs:
    """Runs of keys, one for each channel of the value."""

    spans: tuple[tuple[int, int], ...]  # The first key of each, and the one after its last
    key_len: int  # The number of keys

    @classmethod
    def of(cls, key_len: int, width: int) -> Runs:
        """Return as many runs as the value has channels, short ones where kernels go wrong."""
        places = [key_len // size * size for size in _BLOCKS if key_len % size]
        places += [key_len - 1, *(1 << bits for bits in _BITS)]
        near = [key_len - _NEAR]
        near += [(1 << bits) + side for bits in _BITS for side in (-_NEAR, _NEAR)]
        near += [key_len - 128, 1, *_BLOCKS]
        edges = [0, key_len]
        for place in dict.fromkeys([*places, *near]):
            if 0 < place < key_len and len(edges) <= width:
                edges.append(place)
        edges = sorted(set(edges))
        while len(edges) <= min(width, key_len):
            sizes = [b - a for a, b in pairwise(edges)]
            longest = sizes.index(max(sizes))
            edges.insert(longest + 1, edges[longest] + sizes[longest] // 2)
        return cls(tuple(pairwise(edges)), key_len)

    def parts(self, channels: Sequence[int], width: int) -> Runs:
        """Return the parts of some of them, as many as the value has channels."""
        each, spans = max(2, width // max(1, len(channels))), list[tuple[int, int]]()
        for channel in channels[: max(1, width // 2)]:
            start, stop = self.spans[channel]
            edges = sorted({start + (stop - start) * n // each for n in range(each + 1)})
            spans += pairwise(edges)
        return replace(self, spans=tuple(spans[:width]))

    def value(self, value: Tensor) -> Tensor:
        """Return a value of the same shape that has ones in each channel at its run."""
        counting = torch.zeros_like(value)
        for channel, (start, stop) in enumerate(self.spans):
            counting[..., start:stop, channel] = 1
        return counting

    def upstream(self, like: Tensor) -> Tensor:
        """Return a gradient of the output that is one channel of each row, short runs first."""
        sizes = torch.tensor([b - a for a, b in self.spans], device="cpu")
        order = sizes.argsort(stable=True).to(like.device)
        channel = order[torch.arange(like.shape[-2], device=like.device) % len(order)]
        one = torch.nn.functional.one_hot(channel, like.shape[-1]).to(like)
        nothing = (like == 0).all(-1, keepdim=True)  # of a row that may attend to nothing
        return one.expand(like.shape).masked_fill(nothing, 0.0)

    def name(self, channel: int) -> str:
        """Return the keys that a channel counts."""
        return _listed([self.spans[channel]])

    def merged(self, channels: Tensor) -> str:
        """Return the keys of several channels, (value_dim,) boolean, as few runs as they make."""
        return _listed([self.spans[one] for one in self._chosen(channels)])

    def lost(self, count: Callable[[Runs], Judgement], factor: float | None = None) -> str:
        """Name the keys in them that get no weight, down to single keys; empty if there is none."""
        # `factor`: which part of their weight keys have that are not lost; by default, what most
        # have.
        runs, found, others = self, list[tuple[int, int]](), False
        while runs.spans:  # until none is left that is more than a key
            one = count(runs)
            share, none = _share(one), _none(one)
            factor = float(share.nanmedian()) if factor is None else factor
            found += [runs.spans[channel] for channel in runs._chosen(none)]
            sizes = share.new_tensor([b - a for a, b in runs.spans])
            # A key that is lost of so many, on the average.
            low = share[: len(sizes)] < factor * (1 - _PART / sizes)
            low &= (sizes > 1) & ~none[: len(sizes)]
            some = sorted(runs._chosen(low), key=lambda channel: float(share[channel]))
            width = one.exact.shape[-1]
            others |= len(some) > width // 4
            runs = runs.parts(some[: max(1, width // 4)], width)
        if not found:
            return ""
        said = f"{'at least ' * others}{_unread(found, self.key_len)}"
        return f"{said}: {'are they' if ' get ' in said else 'is it'} read?"

    def _chosen(self, channels: Tensor) -> list[int]:
        return [int(one) for one in channels[: len(self.spans)].nonzero().flatten()]


def _listed(spans: Sequence[tuple[int, int]]) -> str:
    """Name runs of keys, in order, of which those that touch are one."""
    found: list[tuple[int, int]] = []
    for start, stop in sorted(spans):
        touches = bool(found) and found[-1][1] == start
        found = [*found[:-1], (found[-1][0], stop)] if touches else [*found, (start, stop)]
    said = [f"{a}" if b == a + 1 else f"{a}..{b - 1}" for a, b in found[:_LISTED]]
    noun = "key" if sum(b - a for a, b in found) == 1 else "keys"
    more = f" and {len(found) - _LISTED} more runs" * (len(found) > _LISTED)
    return f"{noun} {', '.join(said)}{more}"


def _unread(spans: Sequence[tuple[int, int]], key_len: int) -> str:
    keys = _listed(spans)
    gets = "get" if keys.startswith("keys") else "gets"
    return f"{keys} of {key_len} {gets} no weight from any of these rows"


def _share(one: Judgement) -> Tensor:
    """Of the weight that each channel should have, the part that it has, (value_dim,)."""
    lead = tuple(range(one.exact.ndim - 1))
    exact = one.exact.nan_to_num().sum(lead)
    return torch.where(exact > 0, one.found.nan_to_num().sum(lead) / exact, math.nan)


def _none(one: Judgement) -> Tensor:
    """Which channels get no weight from any row, as far as that is beyond rounding."""
    lead = tuple(range(one.exact.ndim - 1))
    seen = (one.exact > 0) & (one.exact > 2 * one.allowed)
    none = one.broken & seen & (one.found.abs() <= _NONE * one.exact)
    return none.any(lead) & ~(seen & ~none).any(lead)


# --- values of signs, by which single keys are told from one another


def signs_like(value: Tensor, seed: int) -> Tensor:
    """Return a value of the same shape with a drawn sign in each place, the same in all maps."""
    drawn = torch.rand(value.shape[-2:], generator=torch.Generator("cpu").manual_seed(seed))
    return (drawn < 0.5).to(value).mul(2).sub(1).expand(value.shape).contiguous()


def suspects(call: Call, off: Tensor) -> Runs | None:
    """Return short runs around the keys that may have none of their weight; None if none may."""
    signs, off = call.value.flatten(0, -3)[0].double(), off.flatten(0, -3)
    # Rows count by what is not explained in them.
    noise = off.square().mean(-1, keepdim=True).sqrt().clamp(min=_TINY)
    felt = off.new_zeros(call.key_len)
    power = torch.zeros_like(felt)
    for maps, rows, weights, first in LazyWeights.of_call(call, torch.float64).parts():
        part, seen = noise[maps, rows], weights / noise[maps, rows]
        keys = slice(first, first + weights.shape[-1])
        felt[keys] += (seen * ((off[maps, rows] / part) @ signs[keys].mT)).sum((0, 1))
        power[keys] += seen.square().sum((0, 1)) * signs.shape[-1]
    errors = -felt / power.clamp(min=_TINY).sqrt()  # in standard errors
    sure, worst = errors.topk(min(max(1, signs.shape[-1] // 4), len(errors)))
    near = [int(key) // _NEAR * _NEAR for key in worst[sure > _SURE]]
    spans = [(at, min(at + _NEAR, call.key_len)) for at in dict.fromkeys(near)]
    return Runs(tuple(spans), call.key_len) if spans else None


def weights_of_runs(
    assertion: str,  # What the failure is called
    one: Judgement,  # The output, of values that count
    runs: Runs,  # What they count
    repeat: str,  # What it takes to see the same again
    *,
    surrounded: bool = False,  # Whether what lies beside the inputs in memory is NaN
    count: Callable[[Runs], Judgement],  # Judges the output of values that count other runs
) -> Failure | None:
    """Return what is wrong with the weights of runs of keys; None if nothing is."""
    broken = one.broken
    if not bool(broken.any()):
        return None
    nan = bool(one.found[broken].isnan().any())
    excess = (one.error / one.allowed).nan_to_num(nan=0.0, posinf=torch.inf).masked_fill(~broken, 0)
    flat = int(excess.argmax())
    at = tuple(int(i) for i in torch.unravel_index(torch.tensor(flat), broken.shape))
    found, exact = float(one.found[at]), float(one.exact[at])
    index = one.given(at)
    *place, row, channel = index
    where = f"query {row}" + (f" of map {place}" if place else "")
    text = (
        f"{where} gives {found:.6g} of its weight to {runs.name(channel)}, the reference "
        f"{exact:.6g} (off by {float(one.error[at]):.1e}; allowed {float(one.allowed[at]):.1e})"
    )
    return Failure(
        assertion, "weights of runs of keys are not those of attention in float64",
        broken=int(broken.sum()), of=int(one.judged.sum()),
        worst=Place(text, (*place, row), found, "output"),
        cause=_read_beside(one) if surrounded and nan else _where(one, runs, count),
        tensor=one.checked, tolerance=float(one.allowed[at]), repeat=repeat,
    )  # fmt: skip


def _read_beside(one: Judgement) -> str:
    rows = int((one.broken & one.found.isnan()).any(-1).sum())
    return (
        f"NaN in {rows} of {one.broken[..., 0].numel()} rows: what lies before and after query, "
        "key and value in memory is NaN, and is read"
    )


def _where(one: Judgement, runs: Runs, count: Callable[[Runs], Judgement]) -> str:
    """Name the keys that get no weight from any row, or weight that is not theirs."""
    lead = tuple(range(one.exact.ndim - 1))
    lost = _none(one)
    if bool(lost.any()):
        start = runs.spans[int(lost.int().argmax())][0]
        to_the_end = bool(lost[int(lost.int().argmax()) : len(runs.spans)].all())
        if not to_the_end:
            return runs.lost(count)
        text = _unread([runs.spans[one] for one in runs._chosen(lost)], runs.key_len)
        others = (one.found / one.exact)[one.broken & (one.exact > 0) & ~lost]
        wraps = others.numel() > 0 and start & (start - 1) == 0 and _wraps(one, lost)
        if wraps:
            return (
                f"{text}, and {runs.merged(~lost)} get theirs: offsets that wrap at {start} "
                f"(2^{start.bit_length() - 1})?"
            )
        cut = _cut(one, runs, lost, int(lost.int().argmax()))
        return f"{text}: a tail that is lost, or a length that is cut {cut}?"
    nowhere = one.broken & (one.exact == 0) & (one.found.abs() > 0)
    if bool(nowhere.any()):
        keys = runs.merged(nowhere.any(lead))
        rows = int(nowhere.any(-1).sum())
        return f"{keys} get weight from {rows} of these rows that may not see them"
    if said := runs.lost(count):
        return said
    wrong = runs.merged(one.broken.any(lead))
    return f"the weight of {wrong} is off"


def _cut(one: Judgement, runs: Runs, lost: Tensor, first: int) -> str:
    """Say where a length is cut: at the first run that is lost, or within the run before it."""
    rows = tuple(range(one.exact.ndim - 1))
    found, exact = one.found.sum(rows), one.exact.sum(rows)
    whole = ~lost
    whole[max(first - 1, 0)] = False
    if first == 0 or not bool(whole.any()):
        return f"at {runs.spans[first][0]}"
    # Of the keys that are left, each weighs more by one factor.
    factor = float(found[whole].sum() / exact[whole].sum().clamp(min=1e-300))
    expected = factor * float(exact[first - 1])
    short = expected - float(found[first - 1]) > max(0.01 * expected, float(one.allowed.max()))
    start, stop = runs.spans[first - 1]
    return f"between {start} and {stop}" if short else f"at {stop}"


def _wraps(one: Judgement, lost: Tensor) -> bool:
    """Whether the first keys hold what is lost, as they do not where a tail is left out."""
    # A softmax without its tail makes all weights of a row larger by one factor.
    found, exact = one.found[..., ~lost], one.exact[..., ~lost]
    some = exact > 0
    factor = found.sum(-1, keepdim=True) / exact.sum(-1, keepdim=True).clamp(min=1e-300)
    off = (found - factor * exact).abs()
    return bool((off > one.allowed[..., ~lost] * factor.clamp(min=1) * 4)[some].any())
