"""What the numbers of a wrong answer show where no known defect gives it.

Each sentence is a law that was looked for in the weights of two wrong cases, and that holds in
both: what it leaves is hundreds of times smaller than what it explains.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import product

import torch
from torch import Tensor

from ..attention.outcomes import finite
from ..attention.plan import Case, Plan, carry_out
from ..attention.tolerance import is_fine
from .diagnosis import number_list
from .matching import wrong_rows
from .probing import Probe, WeightsOf

# A law may leave this part of what it explains. Rounding leaves less of weights above the
# smallest, in float32; a law of another kind leaves a twentieth and more.
_LEFT = 3e-3
_SMALLEST = 1e-2
# Below, a weight is 0 but for rounding.
_LEAST = 1e-6
_CASES = 2
# Of fewer rows a law with a constant is no law.
_FEWEST = 3
_MOST_WEIGHTS = 20_000
# Heads that are named one by one.
_LISTED = 4
# Caps that are looked for, as powers of e: below, weights are all equal; above, nothing is capped.
_CAPS = [step / 16 for step in range(-32, 81)]


@dataclass(frozen=True, eq=False)
class _Seen:
    """The weights of one case as they were found, and what goes into them."""

    case: Case  # The case
    weights: Tensor  # As the subject uses them, (batch, heads, query_len, key_len)
    right: Tensor  # Those of correct attention
    scores: Tensor  # Of correct attention
    permitted: Tensor  # Where queries may attend
    used: Tensor  # Which weights are large enough to tell their score
    output: Tensor  # Of the subject
    wanted: Tensor  # The output of correct attention

    def centred(self, numbers: Tensor) -> Tensor:
        """Return numbers less the mean of their row, which a softmax does not feel; 0 unused."""
        kept = numbers.masked_fill(~self.used, 0.0)
        mean = kept.sum(-1, keepdim=True) / self.used.sum(-1, keepdim=True).clamp(min=1)
        return (kept - mean).masked_fill(~self.used, 0.0)

    @property
    def effective(self) -> Tensor:
        """The scores whose softmax the weights are, centred."""
        return self.centred(self.weights.clamp(min=1e-30).log())


def observed(weights: WeightsOf, probes: Sequence[Probe]) -> tuple[str, ...]:
    """Return what the weights of wrong answers show, a sentence each."""
    if not is_fine(probes[0].dtype):
        return ()
    wrong = [one for one in probes if bool(wrong_rows(one).any()) and _is_plain(one)]
    wrong.sort(key=lambda one: not one.case.sees_all)
    seen = [found for one in wrong[:_CASES] if (found := _seen(one, weights(one))) is not None]

    told = [one for one in seen if one.case.query_len >= _FEWEST]

    def said(laws: Sequence[Callable[[_Seen], str]]) -> tuple[str, ...]:
        every = ([law(one) for one in told] for law in laws)
        return tuple(each[0] for each in every if each and all(each))

    if of_output := said((_zero, _combined, _moved, _served, _of_each_map)):
        return of_output
    if seen and all(others := [_other_mask(one) for one in seen]):
        return ("its weights are right but for the mask", *others)
    # Of what is no weighted sum of values, an identity matrix shows nothing.
    if not all(map(_is_sum, told)):
        return said((_is_no_sum,))
    return said((_sink, _multiplied, _softcap, _monotone, _distance, _positions))


def _is_plain(one: Probe) -> bool:
    small = math.prod(one.case.shape) <= _MOST_WEIGHTS and not one.case.name.startswith("large")
    return small and bool(one.output.isfinite().all())


def _seen(one: Probe, weights: Tensor | None) -> _Seen | None:
    if weights is None or not bool(weights.isfinite().all()):
        return None
    right = carry_out(Plan(), one.case)
    used = right.permitted & (weights > _SMALLEST) & (right.weights > _SMALLEST)
    used &= used.sum(-1, keepdim=True) > 1
    scores = finite(right.scores)
    return _Seen(
        one.case, weights, right.weights, scores, right.permitted, used, one.output, right.output
    )


def _zero(one: _Seen) -> str:
    """Whether all that is wrong is 0, as if it had not been written."""
    size = one.wanted.abs().amax(-1)
    off = (one.output - one.wanted).abs().amax(-1) > _LEFT * size.max()
    if not bool((one.output[off] == 0).all()) or bool(off.all()) or not bool(off.any()):
        return ""
    for dim, noun in ((1, "head"), (0, "batch entry"), (2, "query")):
        rows = off.movedim(dim, 0).flatten(1)
        if bool((rows.all(1) == rows.any(1)).all()):
            which = number_list(noun, rows.all(1).nonzero().flatten().tolist())
            return f"its output is 0 in {which} of {off.shape[dim]}, and right elsewhere"
    return "its output is right, or 0 in whole rows"


def _served(one: _Seen) -> str:
    """Whether heads are right but for the key head that they read keys or values of."""
    case, found = one.case, dict[int, tuple[int, int]]()
    if case.key.shape[1] == 1:
        return ""
    for pair in product(range(case.key.shape[1]), repeat=2):
        key, value = (t[:, [n]] for t, n in zip((case.key, case.value), pair, strict=True))
        off = (carry_out(Plan(), replace(case, key=key, value=value)).output - one.output).abs()
        fits = off.amax((0, 2, 3)) <= _LEFT**2
        found |= dict.fromkeys(fits.nonzero().flatten().tolist(), pair)
    own = {head: (head // case.group,) * 2 for head in range(case.heads)}
    others = [head for head in own if head in found and found[head] != own[head]]
    if len(found) < case.heads or not others:
        return ""
    said = [
        f"head {head} reads key head {found[head][0]}"
        + f" and the values of {found[head][1]}" * (len(set(found[head])) > 1)
        + f", not {own[head][0]}"
        for head in others
    ]
    return f"its heads are right but for what they read: {'; '.join(said[:_LISTED])}"


def _of_each_map(one: _Seen) -> str:
    """Whether the output, or the scores, of each map is the right one times a number."""
    scores = one.centred(one.scores)
    for what, given, right in (
        ("outputs are", one.output, one.wanted), ("scores are", one.effective, scores)
    ):  # fmt: skip
        size = right.square().sum((2, 3), keepdim=True).clamp(min=1e-30)
        factors = (given * right).sum((2, 3), keepdim=True) / size
        other = float((factors - 1).abs().max()) > _LEFT
        if other and _holds(given, factors * right) and not _zero(one):
            texts = [", ".join(f"{number:.3g}" for number in row) for row in factors.flatten(1)]
            times = f"{'; '.join(texts)} (by head; batch entry by batch entry)"
            return f"its {what} {times} times as large as they should be"
    return ""


def _is_sum(one: _Seen) -> bool:
    """Whether the output is what the weights that were found make of the values."""
    value = finite(one.case.value).repeat_interleave(one.case.group, 1)
    off = one.weights @ value - one.output
    return float(off.abs().max()) <= _LEFT * float(one.output.abs().max())


def _is_no_sum(one: _Seen) -> str:
    right = bool(((one.weights - one.right).abs() <= _LEFT).all())
    weights = "right" if right else "others"
    return (
        ""
        if _is_sum(one)
        else "its output is no weighted sum of the values: for values that are "
        f"an identity matrix its weights are {weights}, and they do not make the output"
    )


def _holds(found: Tensor, law: Tensor, least: float = _LEFT) -> bool:
    """Whether a law gives numbers that are not all nearly 0."""
    size = float(found.square().mean().sqrt())
    return size > least and float((found - law).square().mean().sqrt()) <= _LEFT * size


def _sink(one: _Seen) -> str:
    sums = one.weights.sum(-1)
    shown = one.used.any(-1)
    if not bool(shown.any()) or not bool((sums[shown] < 1 - _LEFT).all() & (sums > 0).all()):
        return ""
    if not bool(((one.weights / sums.unsqueeze(-1) - one.right).abs() <= _LEFT).all()):
        return ""
    whole = one.scores.masked_fill(one.right == 0, -math.inf).logsumexp(-1)
    sinks = (whole + (1 / sums - 1).log()).movedim(1, 0).flatten(1)
    if not bool((sinks.amax(1) - sinks.amin(1) <= _LEFT * (1 + sinks.abs().amax(1))).all()):
        return ""
    return f"its rows sum to less than 1, {_each('as if a sink of', sinks.mean(1))} joined the sum"


def _other_mask(one: _Seen) -> str:
    """Whether weights are those of the right scores under another mask."""
    seen = one.weights > _SMALLEST
    law = one.scores.masked_fill(~(one.weights > _LEAST), -math.inf).softmax(-1).nan_to_num()
    if not bool(((law - one.weights).abs() <= _LEFT).all()):
        return ""
    off = (seen & ~one.permitted) | (~seen & (one.right > _SMALLEST))
    if not bool(off.any()):
        return ""
    batch, head, query, _ = off.nonzero()[0].tolist()
    found, wanted = (
        number_list("key", some[batch, head, query].nonzero().flatten().tolist())
        for some in (one.weights > _LEAST, one.permitted)
    )
    return (
        f"in {one.case.name}, head [{batch}, {head}], query {query} sees {found}, and may see "
        f"{wanted}"
    )


def _multiplied(one: _Seen) -> str:
    """Whether weights are the right ones, each times a number that their softmax does not know."""
    known = one.right > _SMALLEST
    factors = torch.where(known, one.weights / one.right, math.nan)
    elsewhere = one.weights[one.right < _LEAST]
    if bool((elsewhere.abs() > _SMALLEST).any()) or _sink(one):
        return ""
    if bool(((factors - 1).abs() <= _LEFT)[known].all()):
        return ""
    zero = factors.abs() <= _LEFT
    if bool((zero | ((factors - 1).abs() <= _LEFT))[known].all()):
        return (
            f"{int(zero.sum())} of its weights are 0 and all others right: they are set to 0 after "
            "the softmax, and rows are not divided by their sum again"
        )
    for what, dims in (("query", (3,)), ("key", (1, 2))):
        mean = factors.nanmean(dims, keepdim=True)
        several = known & (known.sum(dims, keepdim=True) > 1)
        alike = ((factors - mean).abs() <= _LEFT * mean.abs())[known]
        if bool(several.any()) and bool(alike.all()):
            least, most = (f"{float(edge):.3g}" for edge in mean[~mean.isnan()].aminmax())
            return f"its weights are right but for a factor of each {what}, {least} to {most}"
    return ""


def _each(words: str, numbers: Tensor) -> str:
    """One number for all heads, or one for each."""
    texts = [f"{round(float(number), 3) + 0.0:.3g}" for number in numbers]
    same = bool((numbers - numbers[0]).abs().max() <= _LEFT * (1 + numbers.abs().max()))
    return f"{words} {texts[0]}" if same else f"{words} {', '.join(texts)} (by head)"


def _softcap(one: _Seen) -> str:
    found = one.effective

    def off(logarithm: float) -> float:
        cap = math.exp(logarithm)
        return float((found - one.centred(cap * torch.tanh(one.scores / cap))).square().mean())

    best = min(_CAPS, key=off)
    for step in (2.0**-n for n in range(5, 20)):
        best = min((best - step, best, best + step), key=off)
    cap = math.exp(best)
    if best > _CAPS[-2] or not _holds(found, one.centred(cap * torch.tanh(one.scores / cap))):
        return ""
    if _holds(found, one.centred(one.scores)):  # nothing is capped
        return ""
    return f"its weights are those of scores that saturate: {cap:.3g} * tanh(score / {cap:.3g})"


def _monotone(one: _Seen) -> str:
    """Whether weights grow with their scores, but otherwise than with exp of them."""
    found, scores = one.effective, one.scores
    sums_to_one = bool(((one.weights.sum(-1) - 1).abs() <= _LEFT).all())
    if not sums_to_one or _holds(found, one.centred(scores)) or _softcap(one):
        return ""
    both = one.used.unsqueeze(-1) & one.used.unsqueeze(-2)
    more = scores.unsqueeze(-1) - scores.unsqueeze(-2)
    heavier = found.unsqueeze(-1) - found.unsqueeze(-2)
    differ = both & (more.abs() >= _LEFT)
    # Rows whose weights are equal are in any order.
    tell = float((heavier.abs() > _LEFT)[differ].double().mean()) > 0.5 if differ.any() else False
    if not tell or not bool((more * heavier >= 0)[differ].all()):
        return ""
    return "in every row the weights are in the order of the scores, but not as exp of them"


def _distance(one: _Seen) -> str:
    added = one.centred(one.effective - one.scores)
    query_len, key_len = one.case.shape[2:]
    at, to = torch.arange(query_len)[:, None], torch.arange(key_len)
    for corner, stands in (("top left", at), ("bottom right", at + key_len - query_len)):
        far = one.centred((stands - to).abs().double().expand(one.case.shape))
        slopes = (added * far).sum((0, 2, 3)) / far.square().sum((0, 2, 3)).clamp(min=1e-30)
        if _holds(added, slopes[:, None, None] * far, _LEFT / 10):
            where = f", counted from the {corner}" * (query_len != key_len)
            declared, counted = one.case.alibi, one.case.alignment.replace("_", " ")
            if declared is not None and (corner == counted or query_len == key_len):
                own, meant = ([f"{slope + 0.0:.3g}" for slope in some.tolist()]
                              for some in (declared.double() - slopes, declared))  # fmt: skip
                return f"its ALiBi slopes are {', '.join(own)}, not {', '.join(meant)} (by head)"
            lost = _each("its scores lose", -slopes)
            return f"{lost} with each position between query and key{where}: a bias by distance"
    return ""


def _positions(one: _Seen) -> str:
    """Whether what is added to the scores is the same for all samples."""
    one = replace(one, used=one.used.all(0).expand_as(one.used))
    added = one.centred(one.effective - one.scores)
    if one.case.shape[0] < 2 or not _holds(added, added[:1].expand_as(added)) or _distance(one):
        return ""
    return "what is added to its scores is the same in all samples: a bias by position"


def _combined(one: _Seen) -> str:
    """Whether the output is that of correct attention, and a part of something else."""
    query, value = one.case.query, one.case.value
    mean = value.mean(2, keepdim=True).repeat_interleave(one.case.group, 1)
    others = {
        "of the mean of the values": mean.expand_as(one.wanted),
        "": torch.ones_like(one.wanted),
    }
    if query.shape == one.wanted.shape:
        others["of the query"] = query
    for what, other in others.items():
        parts = torch.stack([one.wanted.flatten(), other.flatten()], 1)
        factors = torch.linalg.lstsq(parts, one.output.flatten()[:, None]).solution
        if float((parts @ factors).sub(one.output.flatten()[:, None]).abs().max()) <= _LEFT**2:
            first, second = (f"{float(factor):.3g}" for factor in factors)
            return f"its output is {first} times the right one, and {second} {what}".rstrip()
    return ""


def _moved(one: _Seen) -> str:
    """Whether each row of the output is right elsewhere."""
    width = one.output.shape[-1]
    off = torch.cdist(one.output.reshape(-1, width), one.wanted.reshape(-1, width))
    least, at = off.min(1)
    lead = one.output.shape[:3]
    if float(least.max()) > _LEFT**2:
        return ""
    places = torch.stack(torch.unravel_index(at, lead))
    own = torch.stack(torch.unravel_index(torch.arange(at.numel()), lead))
    if len(set(at.tolist())) < at.numel():
        head = places[1].view(lead)[0, :, 0].tolist()
        if bool((places != own)[[0, 2]].any()) or bool(
            (places[1].view(lead) != torch.tensor(head)[:, None]).any()
        ):
            return ""
        said = [f"head {own} that of head {n}" for own, n in enumerate(head) if n != own]
        return f"its rows are right, but some twice: {', '.join(said)}"
    names = [name for name, differs in zip(("batch entry", "head", "query"),
             (places != own).any(1).tolist(), strict=True) if differs]  # fmt: skip
    return f"its rows are right, but in the place of others: of another {' and '.join(names)}"
