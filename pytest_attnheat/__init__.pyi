# The table of public names, each from its room. `__init__.py` reads it when a name is first used;
# type checkers and editors read it too. To make a name public, add it here.

from .assertions.behaviour.convexity import assert_convex as assert_convex
from .assertions.behaviour.decoding import (
    assert_decode_matches_prefill as assert_decode_matches_prefill,
)
from .assertions.behaviour.invariance import (
    assert_batch_independent as assert_batch_independent,
    assert_key_permutation_invariant as assert_key_permutation_invariant,
)
from .assertions.behaviour.layout import assert_layout_invariant as assert_layout_invariant
from .assertions.behaviour.leakage import assert_no_leakage as assert_no_leakage
from .assertions.behaviour.merging import assert_merges as assert_merges
from .assertions.behaviour.padding import assert_padding_invariant as assert_padding_invariant
from .assertions.behaviour.randomness import assert_deterministic as assert_deterministic
from .assertions.behaviour.sequences import SequenceModel as SequenceModel
from .assertions.masking import (
    assert_causal as assert_causal,
    assert_masked as assert_masked,
    assert_padding_masked as assert_padding_masked,
    assert_support as assert_support,
)
from .assertions.precision import (
    assert_gradients_match as assert_gradients_match,
    assert_matches_reference as assert_matches_reference,
)
from .assertions.reproduction import assert_reproduces_output as assert_reproduces_output
from .assertions.rows import (
    assert_doubly_stochastic as assert_doubly_stochastic,
    assert_entropy as assert_entropy,
    assert_one_hot as assert_one_hot,
    assert_row_stochastic as assert_row_stochastic,
    assert_uniform as assert_uniform,
)
from .attention.cases import AttentionCase as AttentionCase, make_attention as make_attention
from .attention.hard_cases import (
    FEATURE_CASES as FEATURE_CASES,
    HARD_CASES as HARD_CASES,
    HardCase as HardCase,
    hard_case as hard_case,
)
from .attention.lazy import LazyWeights as LazyWeights
from .attention.reference import (
    attend as attend,
    causal_mask as causal_mask,
    masked_softmax as masked_softmax,
    padding_mask as padding_mask,
    sliding_window_mask as sliding_window_mask,
)
from .attention.scoring import (
    AdditiveScore as AdditiveScore,
    BilinearScore as BilinearScore,
    DotProductScore as DotProductScore,
    ScaledDotProductScore as ScaledDotProductScore,
    register_scoring_function as register_scoring_function,
)
from .baselines.traces import assert_same_attention as assert_same_attention
from .capture import (
    CaptureError as CaptureError,
    CaptureMemoryError as CaptureMemoryError,
    CaptureWarning as CaptureWarning,
)
from .capture.capturing import capture_attention as capture_attention
from .capture.record import AttentionRecord as AttentionRecord
from .capture.trace import Trace as Trace
from .contract.checks import Check as Check
from .contract.conventions import (
    Convention as Convention,
    Lse as Lse,
    register_convention as register_convention,
)
from .contract.diagnosing import diagnose as diagnose
from .contract.diagnosis import Diagnosis as Diagnosis
from .contract.grading import Grade as Grade, grade as grade
from .contract.ready import transformers_attention as transformers_attention
from .contract.report import Report as Report, check_attention as check_attention
from .contract.spec import AttentionSpec as AttentionSpec
from .contract.strategy import attention_cases as attention_cases
from .failure import Failure as Failure
from .heatmaps.figure import HeatmapFigure as HeatmapFigure
from .heatmaps.record import Heatmaps as Heatmaps, read_heatmaps as read_heatmaps
from .heatmaps.showing import show_difference as show_difference, show_heatmaps as show_heatmaps
from .heatmaps.terminal import format_heatmap as format_heatmap
from .plugin.examination import parametrize_with_checks as parametrize_with_checks

__version__: str
