"""`attention_cases`: calls of attention for Hypothesis, over the space of the examination."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from functools import cache
from typing import TYPE_CHECKING, Any

import torch

from pytest_attnheat.attention.call import Call
from pytest_attnheat.contract.combinations import Refusals
from pytest_attnheat.contract.examination import Examination
from pytest_attnheat.contract.ready import as_spec
from pytest_attnheat.contract.report import examinations_of
from pytest_attnheat.contract.spec import AttentionSpec
from pytest_attnheat.inputs import misuse

if TYPE_CHECKING:
    from hypothesis.strategies import SearchStrategy

_MOST_SEED = 2**16


@dataclass(frozen=True, eq=False, repr=False)
class DrawnCall(Call):
    """A call that shows how to repeat it.

    Attributes:
        replay: Its text for `check_attention(spec, replay=...)`.
    """

    replay: str = ""

    def __repr__(self) -> str:
        return f"<call {self.replay}>"


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

    Example:
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

    @cache
    def known() -> list[tuple[Examination, Refusals]]:  # once drawn from: it calls the subject
        examinations = examinations_of(claimed, devices=(claimed.devices or ["cpu"])[:1])
        return [(one, Refusals(one)) for one in examinations]

    def cases(draw: Callable[[Any], Any]) -> Call:
        examination, refusals = draw(strategies.sampled_from(known()))
        declared, chosen = examination.space.declared, dict[str, Any]()
        for name, levels in declared.simplest_first().items():
            possible = [one for one in levels if declared.possible({**chosen, name: one})]
            # Which gradients are asked is for the assertion to say.
            some = possible[:1] if name == "gradients" else possible
            chosen[name] = draw(strategies.sampled_from(some)) if some else reject()
        space = replace(examination.space, seed=draw(strategies.integers(0, _MOST_SEED)))
        examination = replace(examination, seed=space.seed)
        vars(examination)["space"] = space  # which else would be found out again
        call = examination.drawn(chosen)
        try:
            with torch.no_grad():
                claimed.ask(call)
        except Exception as error:  # if it is no refusal, the test tells
            if refusals.of(chosen, error):
                reject()
        given = {one.name: getattr(call, one.name) for one in fields(Call)}
        return DrawnCall(**given, replay=examination.text(chosen))

    return strategies.composite(cases)()
