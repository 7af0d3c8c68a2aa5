"""Dropout of attention weights, seen through an identity matrix in place of the values."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from ...attention.chunks import index_of
from ...attention.tolerance import is_fine, output_tolerance
from ...callables import seed_all
from ...failure import Checked, Failure, Place
from ...inputs import misuse
from .functions import AttentionFunction
from .reading import part_of
from .subject import check_rows

# A correct subject is reported by chance in one of so many checks.
_FALSE_ALARM = 1e-6
# Fused kernels compare a random byte with the probability.
_STEP = 1 / 255
_STANDARD_ERRORS = 5
# With these, chance is as small as that step, and more of them tell no more.
_ENOUGH_WEIGHTS = 300_000
# Of a larger input only a part is looked at: about so many weights in one call.
_MOST_WEIGHTS = 36_864
_ALONG = {-1: "keys", -2: "queries", -3: "heads", -4: "batch entries"}


def check_dropout_of_weights(
    assertion: str, function: AttentionFunction, share: float, *, runs: int, seed: int
) -> None:
    """Check the weights of a function that is called with `dropout_p`, in at most so many runs."""
    __tracebackhide__ = True
    function = part_of(function, _MOST_WEIGHTS)
    key_len = function.key.shape[-2]
    identity = torch.eye(key_len, dtype=function.value.dtype, device=function.value.device)
    # Contiguous, and copied for each call: it may be written to, or read by its strides.
    identity = identity.repeat(*function.value.shape[:-2], 1, 1)

    def run(value: Tensor, dropout_p: float, *, seeded: bool = False) -> Tensor:
        if seeded:
            seed_all(seed)
        return function.run(value=value.clone(), dropout_p=dropout_p)

    weights = function.run(value=identity.clone())
    check_rows(
        assertion,
        run(identity, 0.0),
        weights,
        claim="rows of weights differ between dropout_p=0.0 and no dropout_p",
        allowed=output_tolerance(weights.dtype),
    )
    check_rows(
        assertion, run(identity, share, seeded=True), run(identity, share, seeded=True),
        claim=f"rows of weights with dropout_p={share:g} are not repeated by torch.manual_seed",
        allowed=output_tolerance(weights.dtype, strict=True), repeat=f"seed={seed}",
    )  # fmt: skip
    twice = run(torch.cat([identity, identity], -1), share, seeded=True)
    check_rows(
        assertion, twice[..., :key_len], twice[..., key_len:],
        claim=f"outputs with dropout_p={share:g} differ between equal channels of the value",
        allowed=output_tolerance(weights.dtype),
        cause=lambda _: "dropout falls on the outputs, not on the weights", repeat=f"seed={seed}",
    )  # fmt: skip
    seed_all(seed)
    observed, each = [run(identity, share)], int(_judged(weights).sum())
    while len(observed) < runs and (len(observed) < 2 or len(observed) * each < _ENOUGH_WEIGHTS):
        observed.append(run(identity, share))
    _Count(assertion, weights, share, seed, torch.stack(observed)).check()


def _judged(weights: Tensor) -> Tensor:
    """Which weights may be told from dropped ones: others are rounded too coarsely, or to 0."""
    return weights > 2 * torch.finfo(weights.dtype).smallest_normal


class _Count:
    """What happened to the weights in several calls with dropout."""

    def __init__(
        self, assertion: str, weights: Tensor, share: float, seed: int, observed: Tensor
    ) -> None:
        """Count it: weights (..., query_len, key_len), observed after dropout (calls, ...)."""
        self.assertion, self.weights, self.share, self.seed = assertion, weights, share, seed
        self.wide, self.judged, self.runs = weights.double(), _judged(weights), len(observed)
        self.each = int(self.judged.sum())
        self.regarded = self.each * self.runs
        self.first = observed[0]
        self.masks = (observed == 0) & self.judged
        kept = self.judged & ~self.masks
        self._axes = range(-weights.ndim, 0)
        # How far each weight that was kept is from its share at most, as a part of it.
        off = (observed.double() * (1 - share) / self.wide - 1).abs().nan_to_num(nan=math.inf)
        self.off = off.masked_fill(~kept, 0.0).amax(0)
        # Along which axes weights were dropped and kept in one line.
        mixed = [(self.masks.any(axis) & kept.any(axis)).any() for axis in self._axes]
        counts = [self.masks.sum(), (self.masks == self.masks[0]).all(), *mixed]
        dropped, fixed, *mixes = torch.stack([count.long() for count in counts]).tolist()
        self.dropped, self.fixed = dropped, bool(fixed)
        self.mixed = {axis for axis, is_mixed in zip(self._axes, mixes, strict=True) if is_mixed}
        # What weights after dropout add up to, and those that were kept, before it.
        self.total = float(observed.double().masked_fill(~self.judged, 0.0).sum())
        self.kept = float(self.wide.expand(kept.shape)[kept].sum())

    def check(self) -> None:
        """Check that this is what dropout does."""
        __tracebackhide__ = True
        if self.regarded * -math.log1p(-self.share) < -math.log(_FALSE_ALARM):
            got = (
                f"{self.runs}, in which {self.regarded} weights are too few to tell whether "
                f"dropout={self.share:g} drops any"
            )
            raise ValueError(misuse("runs", got, "more of them, or a larger input"))
        self._check_that_some_are_dropped()
        self._check_that_each_is_on_its_own()
        self._check_share()
        self._check_rest()
        self._check_sum()
        self._check_pairs()

    def _fail(
        self, claim: str, worst: str | Place, cause: str | None, **numbers: int | float
    ) -> None:
        __tracebackhide__ = True
        raise Failure(
            self.assertion,
            claim,
            worst=worst if isinstance(worst, Place) else Place(worst),
            cause=cause,
            tensor=Checked.of(self.weights),
            repeat=f"seed={self.seed}",
            **numbers,  # type: ignore[arg-type]
        )

    def _check_that_some_are_dropped(self) -> None:
        __tracebackhide__ = True
        if self.dropped:
            return
        unchanged = float((self.first.double() - self.wide).abs().max())
        cause = "dropout is never applied"
        if unchanged > output_tolerance(self.weights.dtype):
            cause = "the weights change, but none becomes 0: dropout of scores, before the softmax?"
        self._fail(
            f"dropout={self.share:g} was declared, but no weight is ever dropped",
            f"0 of {self.regarded} weights in {self.runs} calls are 0 (expected about "
            f"{self.share * self.regarded:.0f})",
            cause,
        )

    def _check_that_each_is_on_its_own(self) -> None:
        __tracebackhide__ = True
        p, q = self.share, 1 - self.share
        likely = self.each * (self.runs - 1) * math.log(p * p + q * q)
        if self.fixed and likely < math.log(_FALSE_ALARM):
            self._fail(
                f"dropout={self.share:g} drops the same weights in each of {self.runs} calls",
                f"{self.dropped // self.runs} weights are 0 in all of them",
                "a fixed mask, or a seed that is set in each call",
            )
        together = [axis for axis in self._axes if self._is_dropped_along(axis)]
        if together:
            names = " and all ".join(map(self._name, together))
            self._fail(
                f"dropout={self.share:g} does not drop each weight on its own",
                f"in {self.runs} calls the {self.regarded} weights are never dropped and kept side "
                f"by side along dimension {', '.join(map(str, together))}",
                f"what is dropped is the same for all {names}",
            )

    def _is_dropped_along(self, axis: int) -> bool:
        """Whether whole lines along an axis are dropped, and that is no accident."""
        if axis in self.mixed:
            return False
        length = self.judged.sum(axis).double()
        uniform = self.share**length + (1 - self.share) ** length
        likely = self.runs * float(uniform.clamp(max=1.0).log().sum())
        return likely < math.log(_FALSE_ALARM)

    def _check_share(self) -> None:
        __tracebackhide__ = True
        low, high = share_by_chance(self.share, self.regarded)
        measured = self.dropped / self.regarded
        if low <= measured <= high:
            return
        p = self.share
        causes = {
            1 - p: "p is taken for the probability to keep a weight",
            1 - (1 - p) ** 2: "dropout is applied twice",
            p * p: "only what two masks both drop is dropped",
        }
        nearest = min(causes, key=lambda share: abs(share - measured))
        bounds = share_by_chance(nearest, self.regarded)
        self._fail(
            f"dropout={p:g} drops {measured:.4g} of the weights",
            f"{self.dropped} of {self.regarded} weights in {self.runs} calls are 0 (allowed "
            f"{low:.4g} to {high:.4g})",
            causes[nearest] if bounds[0] <= measured <= bounds[1] else None,
        )

    def _check_rest(self) -> None:
        __tracebackhide__ = True
        dtype = self.weights.dtype
        # The weight, the factor and their product are rounded, in either of two runs.
        allowed = output_tolerance(dtype) if is_fine(dtype) else 4 * torch.finfo(dtype).eps
        broken = int((self.off > allowed).sum())
        if not broken:
            return
        worst = index_of(self.off.argmax(), self.off.shape)
        factor = self.total / self.kept if self.kept else math.nan
        off = float(self.off[worst])
        said = (
            f"weights[{', '.join(map(str, worst))}] is off by {off:.2g} of its "
            f"size (allowed {allowed:.1e}); kept weights are multiplied by {factor:.4g} in the "
            f"mean, expected {1 / (1 - self.share):.4g}"
        )
        self._fail(
            "weights that are kept are not divided by 1 - p", Place(said, worst, off),
            self._why_factor(factor, allowed), broken=broken, of=self.each, tolerance=allowed,
        )  # fmt: skip

    def _why_factor(self, factor: float, allowed: float) -> str | None:
        judged_sums = self.first.double().sum(-1)
        some = self.judged.any(-1) & (judged_sums > 0)
        if bool(((judged_sums - 1).abs()[some] <= allowed).all()):
            return "each row sums to 1 after dropout: the weights are normalised again"
        return why_factor(factor, self.share, allowed)

    def _check_sum(self) -> None:
        __tracebackhide__ = True
        size = float(self.wide[self.judged].sum())
        spread = float(self.wide[self.judged].square().sum()) * self.share / (1 - self.share)
        error = math.sqrt(spread / self.runs) / size
        allowed = _STANDARD_ERRORS * error + _STEP / (1 - self.share)
        allowed += 4 * torch.finfo(self.weights.dtype).eps
        mean = self.total / self.runs / size
        if abs(mean - 1) > allowed:
            larger, smaller = ("large", "small") if mean < 1 else ("small", "large")
            self._fail(
                "the mean of the weights after dropout is not what they are without",
                f"they add up to {mean:.4g} of it (off by {abs(mean - 1):.1e}; allowed "
                f"{allowed:.1e})",
                f"{larger} weights are dropped more often than {smaller} ones",
            )

    def _check_pairs(self) -> None:
        """Check that two weights are dropped together as often as those of two coins are."""
        # Pairs of one test have no weight in common, so that they are independent of each other.
        __tracebackhide__ = True
        p, tests = self.share, list(self._pairings())
        masks = (self.judged, self.masks)
        every = [[_pairs(mask, axis, *both) for mask in masks] for axis, _, *both in tests]
        counts: list[list[int]] = torch.stack([torch.stack(one) for one in every]).tolist()
        for (axis, lag, *_), (judged, found) in zip(tests, counts, strict=True):
            count = judged * self.runs
            if not count:
                continue
            low, high = share_by_chance(p, count, tests=len(tests), together=2)
            if not low <= found / count <= high:
                self._fail(
                    f"dropout={p:g} does not drop each weight on its own",
                    f"{found} of {count} pairs of weights that are {lag} apart along dimension "
                    f"{axis} are dropped together (expected {p * p:.3g} of them; allowed "
                    f"{low:.3g} to {high:.3g})",
                    f"the random numbers of some {self._name(axis)} are those of others, {lag} "
                    "apart?",
                )

    def _pairings(self) -> Iterator[tuple[int, int, Tensor, Tensor]]:
        """Yield an axis, a distance, and two lists of numbers along the axis that far apart."""
        for axis in self._axes:
            length = self.weights.shape[axis]
            numbers = torch.arange(length, device=self.weights.device)
            powers = {2**n for n in range(length.bit_length())}
            for lag in sorted(lag for lag in powers | {length // 2} if 0 < lag < length):
                for phase in (0, 1):
                    starts = [n for n in range(length - lag) if n // lag % 2 == phase]
                    if starts:
                        yield axis, lag, numbers[starts], numbers[starts] + lag

    def _name(self, axis: int) -> str:
        """What stands along an axis."""
        named = self.weights.ndim == 4 or axis >= -2
        return _ALONG[axis] if named else f"entries of dimension {axis}"


def _pairs(mask: Tensor, axis: int, ones: Tensor, others: Tensor) -> Tensor:
    """How many pairs of elements along an axis are both true."""
    return (mask.index_select(axis, ones) & mask.index_select(axis, others)).sum()


def why_factor(factor: float, share: float, allowed: float) -> str | None:
    """Say why kept weights are multiplied by this factor, off by a part of it at most."""
    q = 1 - share
    factors = {
        1.0: "what is kept is not rescaled",
        q: "what is kept is multiplied by 1 - p, which belongs to evaluation mode",
        1 / share: "what is kept is divided by p",
        1 / q**2: "what is kept is divided by 1 - p twice, or evaluation multiplies by it as well",
    }
    nearest = min(factors, key=lambda known: abs(known - factor))
    return factors[nearest] if abs(factor - nearest) <= allowed * nearest else None


def share_by_chance(
    share: float, count: int, *, tests: int = 1, together: int = 1
) -> tuple[float, float]:
    """Return between which shares of dropped weights chance leads, but for one time in 10^6."""
    # By Chernoff's bound: a share x of n weights, each dropped with probability p, is met with a
    # probability of at most `exp(-n KL(x, p))` on either side. A fused kernel may add 1 / 255 to p
    # or subtract it. Of so many `tests` any is outside one time in 10^6; of groups of several
    # `together`, all weights are dropped.
    limit = math.log(2 * tests / _FALSE_ALARM) / count
    low, high = max(share - _STEP, 0.0) ** together, min(share + _STEP, 1.0) ** together
    return _farthest(low, 0.0, limit), _farthest(high, 1.0, limit)


def _farthest(share: float, end: float, limit: float) -> float:
    """Find by halving how far from `share` towards `end` the divergence stays within a limit."""
    if _divergence(end, share) <= limit:  # Which halving comes close to, and never reaches.
        return end
    near, far = share, end
    for _ in range(60):
        middle = (near + far) / 2
        near, far = (middle, far) if _divergence(middle, share) <= limit else (near, middle)
    return near


def _divergence(x: float, p: float) -> float:
    """The Kullback-Leibler divergence between two probabilities of a dropped weight."""
    parts = ((x, p), (1 - x, 1 - p))
    return sum(
        a * math.log(a / b) if a > 0 and b > 0 else (0.0 if a <= 0 else math.inf) for a, b in parts
    )
