"""What no plan reproduces: a subject that answers the same question in two ways."""

from __future__ import annotations

from dataclasses import replace

from torch import Tensor

from pytest_attnheat.contract.defects import DEFECTS
from pytest_attnheat.contract.explaining import filled
from pytest_attnheat.contract.findings import Diagnosis, number_text
from pytest_attnheat.contract.matching import errors, rounding
from pytest_attnheat.contract.plan import Plan, carry_out
from pytest_attnheat.contract.probing import Probe
from pytest_attnheat.contract.spec import AttentionSpec
from pytest_attnheat.contract.whereabouts import inferred_weights


def by_chance(
    spec: AttentionSpec, first: Probe, again: Tensor, refused: dict[str, str]
) -> Diagnosis | None:
    """The diagnosis of a subject that answers the same question in two ways, None by rounding."""
    error, allowed = errors(Plan(), replace(first, output=again))
    before, _ = errors(Plan(), first)
    if bool((error <= allowed).all()) and bool((before <= allowed).all()):
        return None
    weights = inferred_weights(spec, first)
    expected = carry_out(Plan(), first.case).weights
    kept = None if weights is None else _kept(weights, expected, rounding(first.dtype))
    between = float((again - first.output).square().mean().sqrt())
    text = f"{spec.name} gives another output when called again"
    defects: tuple[str, ...] = ()
    constant = None
    if kept is not None:
        constant = 1.0 - 1.0 / kept
        rescaled = kept > 1.0 + 1e-3
        defects = ("dropout_in_eval" if rescaled else "dropout_not_rescaled",)
        (defect,) = (one for one in DEFECTS if one.name == defects[0])
        text += f": it equals attention {filled(defect, constant)}; every weight is 0 or "
        text += f"{kept:.6g} times what it should be (is it in training mode?)"
    return Diagnosis(
        spec.name,
        str(first.dtype).removeprefix("torch."),
        healthy=False,
        defects=defects,
        residual=between,
        constant=constant,
        sentence=text,
        where={"wrong": f"two calls with the same inputs differ by {number_text(between)} (rms)"},
        refused=refused,
        expected_weights=expected,
        inferred_weights=weights,
        case=first.case.name,
    )


def _kept(weights: Tensor, expected: Tensor, tolerance: float) -> float | None:
    """The factor of the weights that dropout kept, None where it is not the same for all."""
    kept = weights != 0
    if bool(kept.all()) or not bool(kept.any()):
        return None
    factors = weights[kept] / expected[kept]
    factor = float(factors.median())
    slack = 50 * tolerance * factor
    return factor if bool(((factors - factor).abs() <= slack).all()) and factor > 0 else None
