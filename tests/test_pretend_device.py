"""Every public entry on a pretend accelerator: what it says is what it says on the CPU.

`BUDGETS` says how often the host waits for the device while a call passes.
"""

import re

import pytest
import torch
from attention_subjects import multihead, plain, qkv, randn, sdpa
from pretend_device import reads
from torch import nn

import pytest_attnheat as attnheat

TRIL = torch.ones(6, 6, dtype=torch.bool).tril()
LENGTHS = [6, 4]
REAL = (torch.arange(6) < torch.tensor(LENGTHS)[:, None])[:, None, None]


def softmax(*shape, mask=None, seed=0):
    scores = randn(*shape, seed=seed)
    return (scores if mask is None else scores.masked_fill(~mask, -torch.inf)).softmax(-1)


def spoiled(weights):
    """Weights with one element too large, in the upper triangle and on padding."""
    weights = weights.clone()
    weights[1, 1, 2, 5] += 0.25
    return weights


SQUARE = softmax(2, 3, 6, 6)
CAUSAL = softmax(2, 3, 6, 6, mask=TRIL)
PADDED = softmax(2, 3, 6, 6, mask=REAL)
UNIFORM = torch.full((2, 3, 6, 6), 1 / 6)
VALUE = randn(2, 3, 6, 4, seed=5)


# The name of an assertion on weights, what passes, what does not, and more arguments.
ON_WEIGHTS = [
    ("assert_row_stochastic", SQUARE, spoiled(SQUARE), {}),
    ("assert_row_stochastic", CAUSAL, spoiled(CAUSAL), {"mask": TRIL}),
    ("assert_doubly_stochastic", UNIFORM, spoiled(UNIFORM), {}),
    ("assert_one_hot", torch.eye(6).expand(2, 3, 6, 6), spoiled(SQUARE), {}),
    ("assert_uniform", UNIFORM, spoiled(UNIFORM), {}),
    ("assert_entropy", SQUARE, UNIFORM, {"maximum": 1.7}),
    ("assert_masked", CAUSAL, spoiled(CAUSAL), {"mask": TRIL}),
    ("assert_support", CAUSAL, spoiled(CAUSAL), {"mask": TRIL}),
    ("assert_causal", CAUSAL, spoiled(CAUSAL), {}),
    ("assert_padding_masked", PADDED, spoiled(PADDED), {"lengths": torch.tensor(LENGTHS)}),
    (
        "assert_reproduces_output",
        SQUARE,
        spoiled(SQUARE),
        {"value": VALUE, "output": SQUARE @ VALUE},
    ),
]


def leaking(query, key, value, attn_mask=None, is_causal=False):
    """Attention in which a query sees one key too many."""
    mask = torch.ones(query.shape[-2], key.shape[-2], dtype=torch.bool, device=query.device)
    return sdpa(query, key, value, mask.tril(1) if is_causal else attn_mask)


def unscaled(query, key, value, attn_mask=None, is_causal=False):
    return sdpa(query, key, value, attn_mask, is_causal=is_causal, scale=1.0)


def mixing(query, key, value, attn_mask=None, is_causal=False):
    """Attention to which the mean over the batch is added."""
    output = sdpa(query, key, value, attn_mask, is_causal=is_causal)
    return output + output.mean(0) + torch.arange(6.0, device=key.device)[: key.shape[-2]].sum()


def noisy(query, key, value):
    return sdpa(query, key, value, dropout_p=0.5)


def positional(query, key, value, attn_mask=None):
    bias = torch.arange(key.shape[-2], device=key.device, dtype=key.dtype)
    return sdpa(query, key, value, bias)


# The name of an assertion on callables, what passes, what does not, and more arguments.
ON_CALLABLES = [
    ("assert_no_leakage", sdpa, leaking, {"is_causal": True}),
    ("assert_padding_invariant", sdpa, positional, {}),
    ("assert_batch_independent", sdpa, mixing, {}),
    ("assert_key_permutation_invariant", sdpa, positional, {}),
    ("assert_decode_matches_prefill", sdpa, leaking, {"is_causal": True}),
    ("assert_deterministic", sdpa, noisy, {}),
    ("assert_convex", sdpa, mixing, {}),
    ("assert_matches_reference", sdpa, unscaled, {}),
    ("assert_gradients_match", sdpa, unscaled, {}),
    ("assert_layout_invariant", sdpa, lambda q, k, v: sdpa(q, k.clone().view(k.shape), v), {}),
]


def there(value, device):
    return value.to(device) if isinstance(value, torch.Tensor) else value


def outcome(call):
    """What a call raises, its device apart, or None."""
    try:
        call()
    except AssertionError as error:
        return re.sub(r"pretend:0|cpu", "DEVICE", str(error))
    return None


@pytest.mark.parametrize(("name", "good", "bad", "arguments"), ON_WEIGHTS)
def test_zz(name, good, bad, arguments, pretend):
    check = getattr(attnheat, name)
    moved = {key: there(value, pretend) for key, value in arguments.items()}
    with reads() as seen:
        assert outcome(lambda: check(good.to(pretend), **moved)) is None
    print("READS", name, seen.count, seen.copied, seen.names)
    said = outcome(lambda: check(bad, **arguments))
    assert said is not None
    assert outcome(lambda: check(bad.to(pretend), **moved)) == said


@pytest.mark.parametrize(("name", "good", "bad", "arguments"), ON_CALLABLES)
def test_zy(name, good, bad, arguments, pretend):
    check = getattr(attnheat, name)
    inputs = qkv()
    outcome(lambda: check(good, *(t.to(pretend) for t in inputs), **arguments))
    with reads() as seen:
        assert outcome(lambda: check(good, *(t.to(pretend) for t in inputs), **arguments)) is None
    from collections import Counter
    print("READS", name, seen.count, seen.copied, Counter(seen.names))
    said = outcome(lambda: check(bad, *inputs, **arguments))
    assert said is not None
    assert outcome(lambda: check(bad, *(t.to(pretend) for t in inputs), **arguments)) == said
