"""`attention_cases`: what Hypothesis draws, what it shrinks to, and whole calls in assertions."""

import subprocess
import sys

import pytest
import torch
from attention_subjects import plain

from pytest_attnheat import (
    AttentionSpec,
    Failure,
    assert_gradients_match,
    assert_matches_reference,
    attention_cases,
    check_attention,
)
from pytest_attnheat.attention.call import Call

hypothesis = pytest.importorskip("hypothesis")
SETTINGS = hypothesis.settings(
    max_examples=60, database=None, derandomize=True, deadline=None, report_multiple_bugs=False,
    phases=(hypothesis.Phase.generate, hypothesis.Phase.shrink),
)  # fmt: skip
LONG = hypothesis.settings(SETTINGS, max_examples=300)


def attention(query, key, value, attn_mask=None, is_causal=False, softcap=None):
    """Written out, with softcap."""
    scores = query @ key.mT / query.shape[-1] ** 0.5
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    seen = torch.ones(scores.shape, dtype=torch.bool)
    seen = seen.tril() if is_causal else seen
    seen = seen if attn_mask is None else seen & attn_mask
    return scores.masked_fill(~seen, -torch.inf).softmax(-1).nan_to_num() @ value


RIGHT = AttentionSpec(attention, dtypes=("float32",))


def softcap_lost_if_causal(query, key, value, attn_mask=None, is_causal=False, softcap=None):
    return attention(query, key, value, attn_mask, is_causal, None if is_causal else softcap)


def last_of_many_keys_lost(query, key, value, attn_mask=None, is_causal=False, softcap=None):
    if key.shape[-2] > 32:
        attn_mask = torch.ones(query.shape[-2], key.shape[-2], dtype=torch.bool)
        attn_mask[:, 32:] = False
    return attention(query, key, value, attn_mask, is_causal, softcap)


def mask_of_the_first(query, key, value, attn_mask=None, is_causal=False, softcap=None):
    mask = None if attn_mask is None else attn_mask[:1]
    return attention(query, key, value, mask, is_causal, softcap)


def third_sample_wrong(query, key, value, attn_mask=None, is_causal=False, softcap=None):
    output = attention(query, key, value, attn_mask, is_causal, softcap)
    return output * (1 + (torch.arange(len(output)) == 2).float()[:, None, None, None])


def off(spec):
    """Whether a specification gives something else than the right one."""
    return lambda call: not torch.allclose(spec.ask(call).output, RIGHT.ask(call).output, atol=1e-4)


@pytest.mark.parametrize(
    ("function", "smallest"),
    [
        (softcap_lost_if_causal, "sizes=2x2 batch=1 key_heads=1 head_dim=8 causal=True softcap=True"
         ),
        (last_of_many_keys_lost, "sizes=1x33 batch=1 key_heads=1 head_dim=8"),
        (mask_of_the_first, "sizes=1x2 key_heads=1 head_dim=8 mask=boolean"),
        (third_sample_wrong, "sizes=1x1 batch=3 key_heads=1 head_dim=8"),
    ],
)  # fmt: skip
def test_what_is_found_shrinks_to_few_features_and_then_to_small_sizes(function, smallest):
    spec = AttentionSpec(function, dtypes=("float32",))
    call = hypothesis.find(attention_cases(spec), off(spec), settings=LONG)
    assert repr(call) == f"<call {smallest} dtype=float32 seed=0>"
    with pytest.raises(Failure):
        assert_matches_reference(spec, call)
    (result,) = check_attention(spec, replay=call.replay).results
    assert result.status == "failed"


def test_right_attention_is_right_in_all_that_is_drawn():
    drawn = set()

    @SETTINGS
    @hypothesis.given(call=attention_cases(AttentionSpec(attention)))
    def judge(call):
        drawn.add((call.query.dtype, call.causal, call.mask is None, call.softcap is None))
        assert_matches_reference(RIGHT, call)

    judge()
    assert {len(set(some)) for some in zip(*drawn, strict=True)} == {4, 2}


def test_what_is_drawn_leaves_out_what_the_code_refuses():
    def refusing(query, key, value, attn_mask=None, is_causal=False):
        if attn_mask is not None and is_causal:
            raise RuntimeError("not both")
        return plain(query, key, value, attn_mask, is_causal=is_causal)

    spec = AttentionSpec(refusing, dtypes=("float32",))

    @SETTINGS
    @hypothesis.given(call=attention_cases(spec))
    def ask(call):
        assert spec.ask(call).output.shape == call.shapes["output"]

    ask()


def test_a_failure_shows_the_call_in_one_line(pytester):
    pytester.makepyfile(
        """
        from hypothesis import given, settings
        from torch.nn.functional import scaled_dot_product_attention as sdpa
        from pytest_attnheat import AttentionSpec, assert_matches_reference, attention_cases

        def unscaled(query, key, value):
            return sdpa(query, key, value, scale=1.0)

        spec = AttentionSpec(unscaled)

        @settings(deadline=None, database=None, derandomize=True, max_examples=10)
        @given(call=attention_cases(spec))
        def test_attention(call):
            assert_matches_reference(spec, call)
        """
    )
    result = pytester.runpytest("-W", "error")
    result.assert_outcomes(failed=1)
    result.stdout.re_match_lines(
        [r".*call=<call sizes=1x2 batch=1 key_heads=1 head_dim=8 dtype=float32 seed=0>,"]
    )


def test_without_hypothesis_the_error_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "hypothesis", None)
    with pytest.raises(ImportError, match=r"pip install pytest-attnheat\[hypothesis\]"):
        attention_cases(RIGHT)


def test_nothing_imports_hypothesis_before_it_draws():
    code = (
        "import sys; from pytest_attnheat import attention_cases, check_attention\n"
        "assert 'hypothesis' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_block_has_no_calls_to_draw():
    block = torch.nn.MultiheadAttention(8, 2, batch_first=True).eval()
    with pytest.raises(TypeError, match="spec: got a block or a trace; accepted is an attention"):
        attention_cases(block)


# --- a whole call in place of query, key and value


def call(**features):
    query, key, value = torch.randn(3, 2, 2, 5, 8, generator=torch.Generator().manual_seed(0))
    return Call(query, key, value, **features)


def test_a_call_is_judged_with_what_the_specification_says():
    def capped(query, key, value, is_causal=False):
        return attention(query, key, value, None, is_causal, 3.0)

    assert_matches_reference(AttentionSpec(capped, softcap=3.0), call(causal=True))
    with pytest.raises(Failure, match="not those of attention"):
        assert_matches_reference(AttentionSpec(capped, softcap=2.0), call(causal=True))


def test_the_gradients_of_a_call_are_judged_of_all_that_it_is_given():
    def dropping(query, key, value, attn_mask=None, sinks=None):
        scores = query @ key.mT / query.shape[-1] ** 0.5 + attn_mask
        sinks = sinks.detach()[:, None, None].expand(*scores.shape[:-1], 1)
        return torch.cat([scores, sinks], -1).softmax(-1)[..., :-1] @ value

    spec = AttentionSpec(dropping, mask="additive")
    given = call(bias=torch.randn(5, 5), sinks=torch.randn(2))
    with pytest.raises(Failure, match="no gradient reaches sinks"):
        assert_gradients_match(spec, given)
    assert_matches_reference(spec, given, gradients=False)


def test_gradients_that_are_declared_to_be_none_are_not_judged():
    def without(query, key, value):
        return plain(query, key, value).detach()

    assert_matches_reference(AttentionSpec(without, gradients=False), call())


def test_the_reference_of_a_specification_is_what_a_call_is_compared_with():
    def doubled(query, key, value):
        return 2 * plain(query, key, value)

    def once(query, key, value):
        return plain(query, key, value)

    assert_matches_reference(AttentionSpec(doubled, reference=doubled), call())
    with pytest.raises(Failure):
        assert_matches_reference(AttentionSpec(once, reference=doubled), call())


@pytest.mark.parametrize(
    "wrong",
    [
        lambda: assert_matches_reference(plain, call()),
        lambda: assert_matches_reference(RIGHT, call(), call().key),
        lambda: assert_gradients_match(RIGHT, call(), is_causal=True),
    ],
    ids=["no specification", "more tensors", "more arguments"],
)
def test_a_call_stands_alone_and_for_a_specification(wrong):
    with pytest.raises(TypeError, match="query: got a Call; accepted is an AttentionSpec with a"):
        wrong()
