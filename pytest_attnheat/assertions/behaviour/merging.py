"""The assertion that merging partial states of attention gives what all keys give at once.

A state is the output of some of the keys, and the logarithm of the sum of their exponentials, as
kernels return it for each part of a cache, each split of the keys, each rank. With o_p and l_p of
the parts (Milakov and Gimelshein 2018: Online normalizer calculation for softmax)::

    lse = log sum_p exp(l_p)    w_p = exp(l_p - lse)    out = sum_p w_p o_p

and the gradients, with dO and dL above: do_p = w_p dO, dl_p = w_p (dO . (o_p - out) + dL).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ...attention.chunks import index_of
from ...attention.devices import check_device
from ...attention.scoring import draw
from ...attention.tolerance import output_tolerance
from ...attention.vocabulary import DECLARED_FULLY_MASKED, DeclaredFullyMasked
from ...callables import always_compiled, borrowed
from ...failure import Checked, Failure, Place, number_text
from ...inputs import dtype_names, misuse, one_of, seed_number
from .merge_calls import Base, Calling, Merge, form_of
from .merge_parts import PROBLEMS, Maker, Problem
from .merge_states import LN2, Comparison, cause_of, folded

_NAME = "assert_merges"
_MOST_NAMES = 3


def assert_merges(
    merge: Callable[..., Any],
    attention: Callable[..., Any] | None = None,
    *,
    base: Base | None = None,
    layout: str | None = None,
    lse_layout: str | None = None,
    calling: Calling | None = None,
    dtypes: str | Sequence[str] = ("float32", "float16", "bfloat16"),
    empty_parts: bool = True,
    fully_masked: DeclaredFullyMasked = "zero",
    gradients: bool = True,
    seed: int = 0,
    device: str | torch.device = "cpu",
) -> None:
    """Assert that merging the states of parts of the keys gives the state of all keys.

    The keys of drawn problems are cut into parts: halves, uneven, of one key, up to six, empty,
    first, last and all; parts of which some rows see nothing; a part whose scores are above those
    of another by hundreds; scores beyond what exp can hold. More than two parts are merged from the
    left, from the right and in another order. States are those of attention in float64, rounded
    to the dtype, with log-sum-exps in float32; what is returned may be off by rounding, elementwise
    (as `attention.tolerance.output_tolerance` has it).

    Args:
        merge: `merge(out_a, lse_a, out_b, lse_b)`, which returns `(out, lse)` or `out`; or
            `merge(outs, lses)` of all parts, stacked along their first dimension. The functions of
            FlashInfer (`merge_state`, `merge_states`, `merge_state_in_place`), of SGLang
            (`merge_state_v2`, `merge_state_triton`), vLLM's `merge_attn_states` and
            FlashAttention's `flash_attn_combine` are recognised by their parameters.
        attention: Makes the states in place of our own: `attention(query, key, value)`, with
            `attn_mask=` if it takes that, returns `(out, lse)` of (batch, heads, length, width)
            and (batch, heads, length) (or an `AttentionSpec` that declares `returns="lse"`). Its
            states are first merged exactly, which has to give what it gives for all keys.
        base: Of which base the log-sum-exps are: "e", the default of what is not recognised, or
            "2".
        layout: The dimensions of an output, in order: b(atch), h(eads), l (queries), d (width),
            n (the parts, if they are stacked). "bhld" by default; "lhd" has the tokens of all
            samples in one dimension.
        lse_layout: The same of a log-sum-exp: "bhl", "lh", "hl", "bhl1" with a dimension of 1.
        calling: "pair", "stacked", "list" (two lists), "output_first" (writes to its first
            argument), "in_place" (writes to the first state), where the parameters do not say it.
        dtypes: Those of the outputs.
        empty_parts: Whether a part may have no key, for all queries or for some: its output is 0
            then, its log-sum-exp -inf. False for a merge that is never given one.
        fully_masked: What is given for a row that no part has a key for: "zero" (and -inf as
            log-sum-exp), "nan", "undefined".
        gradients: Whether gradients of the outputs and log-sum-exps are compared, where what is
            returned has any, in the finest of the dtypes; of a part without a key they are not.
        seed: What queries, keys and values are drawn from.
        device: Where the states are.

    Raises:
        Failure: A merged state is not that of all keys. The message names the mistake that gives
            all that was returned, if one does.
        TypeError: `merge` cannot be called, or returns no tensor.
        ValueError: What is declared does not fit together, nothing says how it is called, or two
            known functions have its parameters.

    Examples:
        >>> assert_merges(flashinfer.merge_state, device="cuda", dtypes="float16")
        >>> assert_merges(my_merge, layout="blhd", lse_layout="bhl", base="2")
    """
    __tracebackhide__ = True
    form, assumed = form_of(merge, calling=calling, layout=layout, lse_layout=lse_layout, base=base)
    given: object = attention
    if given is not None and not callable(given):
        accepted = "a function that returns (out, lse), or None"
        raise TypeError(misuse("attention", type(given).__name__, accepted))
    names = dtype_names("dtypes", dtypes)
    if not names:
        raise ValueError(misuse("dtypes", repr(dtypes), "one name at least"))
    one_of("fully_masked", fully_masked, [n for n in DECLARED_FULLY_MASKED if n != "uniform"])
    maker = Maker(
        attention,
        LN2 if form.base == "2" else 1.0,
        seed_number(seed),
        check_device(str(device), "device"),
    )
    judge = _Judge(Merge(merge, form), fully_masked, assumed, maker)
    known = [getattr(torch, name) for name in names]
    some = torch.empty(0, device=maker.device)
    own = borrowed((merge, attention), some, seed=seed)
    with own, always_compiled((merge, attention)), torch.inference_mode(False):
        every: list[Comparison] = []
        for problem in PROBLEMS:
            if (empty_parts or not problem.has_empty) and maker.can_ask(problem):
                for outs, lses in maker.states(problem, known):
                    every += judge.compared(problem, outs, lses)
        judge.check(every)
        if gradients and form.calling not in ("output_first", "in_place"):
            finest = min(known, key=lambda dtype: torch.finfo(dtype).eps)
            judge.check_gradients([one for one in every if one.dtype == finest])


@dataclass(frozen=True)
class _Judge:
    """Merges, and compares with what all keys give."""

    merge: Merge  # What merges
    empty: DeclaredFullyMasked  # What is declared of a row that no part has a key for
    assumed: str | None  # What was assumed of how it is called
    maker: Maker  # Makes the states

    def compared(
        self, problem: Problem, outs: list[Tensor], lses: list[Tensor]
    ) -> Iterator[Comparison]:
        """Merge the parts of a problem, in all orders that there are."""
        __tracebackhide__ = True
        if self.maker.attention is not None:
            self._check_states(problem, outs, lses)
        count = len(outs)
        given, turned = [*range(count)], [*range(1, count), 0]
        runs = [("at once", given), ("at once", turned)]
        if not self.merge.form.takes_all:
            runs = [("from the left", given), ("from the left", turned), ("from the right", given)]
            runs = runs[:count] if count > 1 else []
        for order, places in runs:
            own = [outs[i] for i in places], [lses[i] for i in places]
            with torch.no_grad():
                out, lse = self._merged(*own, order)
            if lse is None and count > 2 and order != "at once":
                continue  # pairs of more than two need it
            yield Comparison(
                problem.name, tuple(problem.sizes[i] for i in places), order, *own,
                self.maker.per_unit, out.cpu().double(),
                None if lse is None else lse.cpu().double() * self.maker.per_unit, self.empty,
            )  # fmt: skip

    def _merged(
        self, outs: Sequence[Tensor], lses: Sequence[Tensor], order: str
    ) -> tuple[Tensor, Tensor | None]:
        if order == "at once":
            return self.merge(outs, lses)
        return folded(self.merge, outs, lses, order)

    def check(self, every: Sequence[Comparison]) -> None:
        """Raise a Failure about the first comparison that is wrong."""
        __tracebackhide__ = True
        wrong = [one for one in every if one.is_wrong]
        if not wrong:
            return
        one = wrong[0]
        out, lse = one.broken
        of_lse = not bool(out.any())
        claim = "elements of the merged output are not those of all keys at once"
        claim += ", nor is the merged log-sum-exp" * (bool(lse.any()) and not of_lse)
        if of_lse:
            claim = "merged log-sum-exps are not those of all keys at once"
        names = [*dict.fromkeys(other.name for other in wrong)]
        named = ", ".join(names[:_MOST_NAMES]) + ", ..." * (len(names) > _MOST_NAMES)
        found, broken = (one.lse, lse) if of_lse else (one.out, out)
        assert found is not None
        rows = one.judged if of_lse else one.judged.unsqueeze(-1).expand(out.shape)
        raise Failure(
            _NAME, claim, broken=int(broken.sum()), of=int(rows.sum()),
            worst=self._place("lse" if of_lse else "output", found, one, broken),
            cause=cause_of(every),
            cases=f"{len(wrong)} of {len(every)} merges are wrong: {named}; here {one.words}",
            assumed=self.assumed, tensor=Checked.of(one.outs[0]), repeat=f"seed={self.maker.seed}",
            again=lambda: self._merged(one.outs, one.lses, one.order),
        )  # fmt: skip

    def _place(self, name: str, found: Tensor, one: Comparison, broken: Tensor) -> Place:
        exact, allowed = one.exact[name == "lse"], one.allowed(*one.exact)[name == "lse"]
        error = (found - exact).abs().nan_to_num(nan=math.inf).masked_fill(~broken, -1.0)
        index = index_of((error / allowed.clamp(min=1e-300)).argmax(), found.shape)
        off, value = float(error[index]), float(found[index])
        texts = [number_text(float(of[index]), beside=off) for of in (found, exact)]
        said = f"{name}[{', '.join(map(str, index))}] is {texts[0]}, of all keys {texts[1]}"
        limit = f"allowed {float(allowed[index]):.1e}"
        far = f"off by {off:.1e}; {limit}" if math.isfinite(off) else limit
        return Place(f"{said} ({far})", index, value, name)

    def _check_states(self, problem: Problem, outs: list[Tensor], lses: list[Tensor]) -> None:
        """Raise a Failure where the states of the caller's attention do not add up themselves."""
        __tracebackhide__ = True
        added = self.maker.added(problem, outs, lses)
        wrong, wrong_lse = added.wrong()
        of_out = bool(wrong.any())
        if not of_out and not bool(wrong_lse.any()):
            return
        claim = "elements of the output of attention are not what its own parts come to"
        if not of_out:
            claim, wrong = "log-sum-exps of attention are not what its own parts come to", wrong_lse
        raise Failure(
            _NAME, f"{claim}, merged exactly", broken=int(wrong.sum()), of=wrong.numel(),
            cause=added.cause(),
            cases=f"{problem.name}, keys in parts of {' + '.join(map(str, problem.sizes))}",
            assumed=self.assumed, tensor=Checked.of(outs[0]), repeat=f"seed={self.maker.seed}",
        )  # fmt: skip

    def check_gradients(self, every: Sequence[Comparison]) -> None:
        """Raise a Failure where a gradient of the merge is not that of the formulas above."""
        __tracebackhide__ = True
        for one in every:
            found = self._gradients(one)
            if found is None:
                return
            for name, slopes, exact, allowed in found:
                self._check_gradient(one, name, slopes, exact, allowed)

    def _gradients(
        self, one: Comparison
    ) -> list[tuple[str, list[Tensor | None], Tensor, Tensor]] | None:
        """The gradients by name, what they should be, and how far they may be off; None if none."""
        leaves = [leaf.detach().clone().requires_grad_() for leaf in (*one.outs, *one.lses)]
        count = len(one.outs)
        with torch.enable_grad():
            out, lse = self._merged(leaves[:count], leaves[count:], one.order)
        if not out.requires_grad:
            return None
        rows = ~one.without_keys & one.judged
        above = self._upstream("output", out) * rows.unsqueeze(-1)
        results, upstream = [out], [above.to(out)]
        above_lse = torch.zeros_like(one.states[1][0])
        if lse is not None and lse.requires_grad:
            above_lse = self._upstream("lse", lse) * rows
            results, upstream = [out, lse], [*upstream, above_lse.to(lse)]
        slopes = torch.autograd.grad(results, leaves, upstream, allow_unused=True)
        outs, lses = one.states
        merged = one.exact[0].nan_to_num(nan=0.0)
        shares = (lses - one.exact[1].masked_fill(~rows, 0.0)).exp()
        largest = lses.abs().masked_fill(lses.isinf(), 0.0).amax(0)
        eps = torch.finfo(one.lses[0].dtype).eps
        tolerance = output_tolerance(one.dtype) * max(1, count - 1) + 4 * eps * count * largest
        felt = (above * (outs - merged)).sum(-1) * self.maker.per_unit
        size = (above.abs() * (outs.abs().amax(0) + merged.abs())).sum(-1) + above_lse.abs()
        return [
            ("output", [*slopes[:count]], shares.unsqueeze(-1) * above,
             (tolerance * rows).unsqueeze(-1) * above.abs().amax(-1, keepdim=True)),
            ("log-sum-exp", [*slopes[count:]], shares * (felt + above_lse), tolerance * size),
        ]  # fmt: skip

    def _upstream(self, name: str, tensor: Tensor) -> Tensor:
        """Draw the gradient of what was returned, rounded to its dtype."""
        drawn = draw(f"gradient of the {name}", self.maker.seed, *tensor.shape)
        return drawn.to(tensor.dtype).double()

    def _check_gradient(
        self,
        one: Comparison,
        name: str,
        slopes: list[Tensor | None],
        exact: Tensor,
        allowed: Tensor,
    ) -> None:
        __tracebackhide__ = True
        missing = all(slope is None for slope in slopes)
        nothing = torch.zeros_like(exact[0])
        parts = [nothing if slope is None else slope.cpu().double() for slope in slopes]
        found = torch.stack(parts)
        error = (found - exact).abs().nan_to_num(nan=math.inf)
        without, empty = one.states[1].isneginf() | ~one.judged, one.with_empty_part
        if name == "output":
            without, empty = without.unsqueeze(-1), empty.unsqueeze(-1)
        judged = ~without.expand(found.shape)
        wrong = ~(error <= allowed) & judged
        if not bool(wrong.any()):
            return
        cause = "are the weights detached, or made under no_grad?" if missing else None
        bad = wrong & ~found.isfinite()
        if bool(bad.any()) and not bool((bad & ~empty).any()):
            cause = "only where a part has no key: the gradient of -inf minus -inf, or 0 times inf?"
        index = index_of(
            (error / allowed.clamp(min=1e-300)).masked_fill(~wrong, -1.0).argmax(), found.shape
        )
        at = ", ".join(map(str, index[1:]))
        said = f"{name} {index[0]}, grad[{at}] is {float(found[index]):.6g}"
        limit = float(allowed.expand(found.shape)[index])
        claim = f"elements of the gradients of the parts' {name}s are not those of a merge"
        raise Failure(
            _NAME,
            f"no gradient reaches the {name}s of the parts" if missing else claim,
            broken=None if missing else int(wrong.sum()),
            of=None if missing else int(judged.sum()),
            worst=Place(f"{said}, should be {float(exact[index]):.6g} (allowed {limit:.1e})", index,
                        float(found[index]), f"{name}.grad"),
            cause=cause,
            cases=f"{one.name}; {one.words}; what is returned is right",
            assumed=self.assumed,
            tensor=Checked.of(one.outs[0]),
            repeat=f"seed={self.maker.seed}",
        )  # fmt: skip
