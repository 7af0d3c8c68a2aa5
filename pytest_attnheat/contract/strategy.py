"""`attention_cases`: calls of attention for Hypothesis, over the space of the examination."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from functools import cache
from typing import TYPE_CHECKING, Any

import torch

from ..attention.call import Call
from ..attention.levels import SIZES
from ..inputs import misuse
from .combinations import Refusals
from .examination import Examination
from .ready import as_spec
from .running import examinations_of
from .spec import AttentionSpec

if TYPE_CHECKING:
    from hypothesis.strategies import SearchStrategy

_MOST_SEED = 2**16
# Of many calls, each is to take few milliseconds.
_MOST_WEIGHTS = 2**14


@dataclass(frozen=True, eq=False, repr=False)
class DrawnCall(Call):
    """A call that shows how to repeat it.

    Attributes:
        replay: Its text for `check_attention(spec, replay=...)`.
    """

    replay: str = ""

    def __repr__(self) -> str:
        return f"<call {self.replay}>"

    def _repr_pretty_(self, printer: Any, cycle: bool) -> None:
        """Be printed by Hypothesis, which prints a dataclass field by field."""
        printer.text(repr(self))


def attention_cases(spec: AttentionSpec | Callable[..., Any]) -> SearchStrategy[Call]:
    """Return a Hypothesis strategy of calls that an attention function claims to take.

    It draws from what is declared, as `check_attention` does, in each declared dtype and from any
    seed, and shrinks to few features and small sizes. Needs Hypothesis:
    `pip install pytest-attnheat[hypothesis]`.

    Args:
        spec: What is claimed, or a callable as `check_attention` takes it.

    Returns:
        The strategy. A call is asked by `spec.ask(call)`, or judged by
        `assert_matches_reference(spec, call)`; printed, it says what `check_attention(spec,
        replay=...)` and `--attn-replay` repeat. Calls that the code refuses are left out.

    Raises:
        ImportError: Hypothesis is not installed.
        TypeError: It is a block, or was captured.

    Examples:
        >>> @given(call=attention_cases(spec))
        ... def test_attention(call):
        ...     assert_matches_reference(spec, call)
    """
    try:
        from hypothesis import reject, strategies
    except ImportError:
        what = "attention_cases needs Hypothesis: pip install pytest-attnheat[hypothesis]"
        raise ImportError(what) from None
    claimed = as_spec(spec)
    if claimed.is_block or claimed.is_captured:
        raise TypeError(misuse("spec", "a block or a trace", "an attention function"))

    # With the first gradient, torch imports what takes longer than an example may.
    one = torch.ones((), requires_grad=True)
    torch.autograd.grad(one.exp(), one, torch.ones(()))

    @cache
    def known() -> list[tuple[Examination, Refusals]]:  # once drawn from: it calls the subject
        examinations = examinations_of(claimed, devices=(claimed.devices or ["cpu"])[:1])
        return [(one, Refusals(one)) for one in examinations]

    def cases(draw: Callable[[Any], Any]) -> Call:
        examination, refusals = draw(strategies.sampled_from(known()))
        declared = replace(examination.space.declared, most_weights=_MOST_WEIGHTS)
        levels, chosen = declared.simplest_first(), dict[str, Any]()
        # Hypothesis shrinks what is drawn first before all else, and sizes are to shrink last.
        for name in [*(name for name in levels if name not in SIZES), *SIZES]:
            # Always one number for each feature, so that they shrink one by one.
            some = levels[name][:1] if name == "gradients" else levels[name]  # see the assertions
            drawn = draw(strategies.sampled_from(some))
            possible = [
                one for one in (drawn, *some) if declared.possible({**chosen, name: one})
            ] or reject()
            chosen[name] = possible[0]
        space = replace(examination.space, seed=draw(strategies.integers(0, _MOST_SEED)))
        examination = replace(examination, seed=space.seed)
        vars(examination)["space"] = space  # which else would be found out again
        call = examination.drawn(chosen)
        leaves = {
            name: getattr(call, name).detach().requires_grad_(claimed.gradients)
            for name in ("query", "key", "value", "bias", "sinks")
            if getattr(call, name) is not None
        }
        try:  # kernels refuse some calls with gradients alone
            claimed.ask(replace(call, **leaves))
        except Exception as error:  # if it is no refusal, the test tells
            if refusals.of(chosen, error):
                reject()
        given = {one.name: getattr(call, one.name) for one in fields(Call)}
        return DrawnCall(**given, replay=examination.text(chosen))

    return strategies.composite(cases)()
