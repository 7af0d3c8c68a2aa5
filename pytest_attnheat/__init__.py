"""Test attention the way good engineers test anything else.

Importing this package loads neither torch, numpy nor matplotlib: each public
name is imported from its room when it is first used (PEP 562).
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pytest_attnheat.assertions.behaviour.convexity import assert_convex as assert_convex
    from pytest_attnheat.assertions.behaviour.decoding import (
        assert_decode_matches_prefill as assert_decode_matches_prefill,
    )
    from pytest_attnheat.assertions.behaviour.invariance import (
        assert_batch_independent as assert_batch_independent,
    )
    from pytest_attnheat.assertions.behaviour.invariance import (
        assert_key_permutation_invariant as assert_key_permutation_invariant,
    )
    from pytest_attnheat.assertions.behaviour.layout import (
        assert_layout_invariant as assert_layout_invariant,
    )
    from pytest_attnheat.assertions.behaviour.leakage import assert_no_leakage as assert_no_leakage
    from pytest_attnheat.assertions.behaviour.padding import (
        assert_padding_invariant as assert_padding_invariant,
    )
    from pytest_attnheat.assertions.behaviour.randomness import (
        assert_deterministic as assert_deterministic,
    )
    from pytest_attnheat.assertions.behaviour.sequences import SequenceModel as SequenceModel
    from pytest_attnheat.assertions.masking import assert_causal as assert_causal
    from pytest_attnheat.assertions.masking import assert_masked as assert_masked
    from pytest_attnheat.assertions.masking import assert_padding_masked as assert_padding_masked
    from pytest_attnheat.assertions.masking import assert_support as assert_support
    from pytest_attnheat.assertions.numerics.precision import (
        assert_gradients_match as assert_gradients_match,
    )
    from pytest_attnheat.assertions.numerics.precision import (
        assert_matches_reference as assert_matches_reference,
    )
    from pytest_attnheat.assertions.reproduction import (
        assert_reproduces_output as assert_reproduces_output,
    )
    from pytest_attnheat.assertions.rows import assert_doubly_stochastic as assert_doubly_stochastic
    from pytest_attnheat.assertions.rows import assert_entropy as assert_entropy
    from pytest_attnheat.assertions.rows import assert_one_hot as assert_one_hot
    from pytest_attnheat.assertions.rows import assert_row_stochastic as assert_row_stochastic
    from pytest_attnheat.assertions.rows import assert_uniform as assert_uniform
    from pytest_attnheat.attention.cases import AttentionCase as AttentionCase
    from pytest_attnheat.attention.cases import make_attention as make_attention
    from pytest_attnheat.attention.hard_cases import HARD_CASES as HARD_CASES
    from pytest_attnheat.attention.hard_cases import HardCase as HardCase
    from pytest_attnheat.attention.hard_cases import hard_case as hard_case
    from pytest_attnheat.attention.reference import attend as attend
    from pytest_attnheat.attention.reference import causal_mask as causal_mask
    from pytest_attnheat.attention.reference import masked_softmax as masked_softmax
    from pytest_attnheat.attention.reference import padding_mask as padding_mask
    from pytest_attnheat.attention.reference import sliding_window_mask as sliding_window_mask
    from pytest_attnheat.attention.scoring import AdditiveScore as AdditiveScore
    from pytest_attnheat.attention.scoring import BilinearScore as BilinearScore
    from pytest_attnheat.attention.scoring import DotProductScore as DotProductScore
    from pytest_attnheat.attention.scoring import ScaledDotProductScore as ScaledDotProductScore
    from pytest_attnheat.attention.scoring import (
        register_scoring_function as register_scoring_function,
    )
    from pytest_attnheat.capture import CaptureError as CaptureError
    from pytest_attnheat.capture import CaptureMemoryError as CaptureMemoryError
    from pytest_attnheat.capture import CaptureWarning as CaptureWarning
    from pytest_attnheat.capture.capturing import capture_attention as capture_attention
    from pytest_attnheat.capture.record import AttentionRecord as AttentionRecord
    from pytest_attnheat.capture.trace import Trace as Trace
    from pytest_attnheat.contract.checks import Check as Check
    from pytest_attnheat.contract.diagnosing import diagnose as diagnose
    from pytest_attnheat.contract.diagnosis import Diagnosis as Diagnosis
    from pytest_attnheat.contract.ready import transformers_attention as transformers_attention
    from pytest_attnheat.contract.report import Report as Report
    from pytest_attnheat.contract.report import check_attention as check_attention
    from pytest_attnheat.contract.spec import AttentionSpec as AttentionSpec
    from pytest_attnheat.failure import Failure as Failure
    from pytest_attnheat.heatmaps.figure import HeatmapFigure as HeatmapFigure
    from pytest_attnheat.heatmaps.figure import show_heatmaps as show_heatmaps
    from pytest_attnheat.heatmaps.record import Heatmaps as Heatmaps
    from pytest_attnheat.heatmaps.record import read_heatmaps as read_heatmaps
    from pytest_attnheat.heatmaps.terminal import format_heatmap as format_heatmap
    from pytest_attnheat.plugin.examination import (
        parametrize_with_checks as parametrize_with_checks,
    )

__version__ = "0.1.0"

_ROOM_OF = {
    "AdditiveScore": "attention.scoring",
    "AttentionCase": "attention.cases",
    "AttentionRecord": "capture.record",
    "AttentionSpec": "contract.spec",
    "BilinearScore": "attention.scoring",
    "CaptureError": "capture",
    "CaptureMemoryError": "capture",
    "CaptureWarning": "capture",
    "Check": "contract.checks",
    "Diagnosis": "contract.diagnosis",
    "DotProductScore": "attention.scoring",
    "Failure": "failure",
    "HARD_CASES": "attention.hard_cases",
    "HardCase": "attention.hard_cases",
    "HeatmapFigure": "heatmaps.figure",
    "Heatmaps": "heatmaps.record",
    "Report": "contract.report",
    "ScaledDotProductScore": "attention.scoring",
    "SequenceModel": "assertions.behaviour.sequences",
    "Trace": "capture.trace",
    "assert_batch_independent": "assertions.behaviour.invariance",
    "assert_causal": "assertions.masking",
    "assert_convex": "assertions.behaviour.convexity",
    "assert_decode_matches_prefill": "assertions.behaviour.decoding",
    "assert_deterministic": "assertions.behaviour.randomness",
    "assert_doubly_stochastic": "assertions.rows",
    "assert_entropy": "assertions.rows",
    "assert_gradients_match": "assertions.numerics.precision",
    "assert_key_permutation_invariant": "assertions.behaviour.invariance",
    "assert_layout_invariant": "assertions.behaviour.layout",
    "assert_masked": "assertions.masking",
    "assert_matches_reference": "assertions.numerics.precision",
    "assert_no_leakage": "assertions.behaviour.leakage",
    "assert_one_hot": "assertions.rows",
    "assert_padding_invariant": "assertions.behaviour.padding",
    "assert_padding_masked": "assertions.masking",
    "assert_reproduces_output": "assertions.reproduction",
    "assert_row_stochastic": "assertions.rows",
    "assert_support": "assertions.masking",
    "assert_uniform": "assertions.rows",
    "attend": "attention.reference",
    "capture_attention": "capture.capturing",
    "causal_mask": "attention.reference",
    "check_attention": "contract.report",
    "diagnose": "contract.diagnosing",
    "format_heatmap": "heatmaps.terminal",
    "hard_case": "attention.hard_cases",
    "make_attention": "attention.cases",
    "masked_softmax": "attention.reference",
    "padding_mask": "attention.reference",
    "parametrize_with_checks": "plugin.examination",
    "read_heatmaps": "heatmaps.record",
    "register_scoring_function": "attention.scoring",
    "show_heatmaps": "heatmaps.figure",
    "sliding_window_mask": "attention.reference",
    "transformers_attention": "contract.ready",
}

__all__ = ["__version__", *_ROOM_OF]


def __getattr__(name: str) -> Any:
    """Import a public name from its room on first use."""
    if name not in _ROOM_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f"{__name__}.{_ROOM_OF[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    """List the public names, loaded or not."""
    return sorted(__all__)
