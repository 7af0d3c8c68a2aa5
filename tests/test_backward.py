"""Wrong gradients are found, and named by the mistake in the backward pass that makes them."""

import math
from dataclasses import dataclass, replace
from functools import partial

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn.functional import scaled_dot_product_attention as sdpa

from pytest_attnheat import AttentionSpec, Failure, assert_gradients_match, check_attention
from pytest_attnheat.attention.backward import Saved, carried_back, likely_backward_mistake
from pytest_attnheat.attention.call import Call
from pytest_attnheat.attention.computation import plain
from pytest_attnheat.attention.decisions import BackwardPlan
from pytest_attnheat.attention.levels import Declared, Space
from pytest_attnheat.contract.checks import CHECKS

DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16]


# --- attention with a backward pass written by hand, apart from that of the package


@dataclass(frozen=True)
class Options:
    """What a call is given besides its tensors, and the mistake in its backward pass."""

    mask: torch.Tensor | None = None
    causal: bool = False
    corner: int = 0
    window: tuple[int, int] | None = None
    softcap: float | None = None
    share: float = 0.0
    wrong: str = ""


class ByHand(torch.autograd.Function):
    """One head at a time, with loops over batch entries and heads; sinks and a bias if given."""

    @staticmethod
    def forward(ctx, query, key, value, bias, sinks, options):
        ctx.options, ctx.dtype = options, query.dtype
        wide = [None if t is None else t.double() for t in (query, key, value, bias, sinks)]
        query, key, value, bias, sinks = wide
        draws = torch.rand(*query.shape[:-1], key.shape[-2])
        ctx.kept = (draws >= options.share).double() / (1 - options.share)
        output = torch.zeros(*query.shape[:-1], value.shape[-1]).double()
        ctx.lse = torch.zeros(query.shape[:-1]).double()
        for b, h, g in heads_of(query, key):
            scores, _ = scored(query[b, h], key[b, g], bias, b, h, options)
            ctx.lse[b, h] = scores.logsumexp(-1)
            if sinks is not None:
                ctx.lse[b, h] = torch.logaddexp(ctx.lse[b, h], sinks[h])
            weights = (scores - ctx.lse[b, h][:, None]).exp().nan_to_num(0.0)
            output[b, h] = (weights * ctx.kept[b, h]) @ value[b, g]
        ctx.save_for_backward(*wide, output)
        return output.to(ctx.dtype)

    @staticmethod
    def backward(ctx, above):
        *tensors, output = ctx.saved_tensors
        query, key, value, bias, sinks = tensors
        options, wrong, above = ctx.options, ctx.options.wrong, above.double()
        found = [None if t is None else torch.zeros_like(t) for t in tensors]
        row_terms = (above * output).sum(-1)
        again = forgetting(options)
        for b, h, g in heads_of(query, key):
            scores, slope = scored(query[b, h], key[b, g], bias, b, h, again)
            weights = (scores - ctx.lse[b, h][:, None]).exp().nan_to_num(0.0, 0.0, 0.0)
            if wrong == "own softmax without the mask":
                weights = scores.softmax(-1)
            if wrong == "sink left out":
                weights = scores.softmax(-1)
            kept = ctx.kept[b, h]
            if wrong == "dropout ignored":
                kept = torch.ones_like(kept)
            if wrong == "dropout not rescaled":
                kept = (kept > 0).double()
            felt = (above[b, h] @ value[b, g].T) * kept
            term = row_terms[b, h]
            if wrong == "no row term":
                term = 0 * term
            if wrong == "row term of dO":
                term = above[b, h].sum(-1)
            if wrong == "row term of the next row":
                term = torch.cat([term[1:], term[:1]])
            if wrong == "row term of the key head":
                term = row_terms[b, g]
            slopes = weights * (felt - term[:, None])
            if wrong == "detached":
                slopes = 0 * slopes
            size = options_block(wrong, "skipped")
            if size:
                slopes, weights = skipped(slopes, weights, scores, size)
            products = slopes if wrong == "no softcap slope" else slopes * slope
            scale = query.shape[-1] ** -0.5
            of_query = products @ key[b, g] * (1 if wrong == "no scale in dQ" else scale)
            of_key = products.T @ query[b, h] * (1 if wrong == "no scale in dK" else scale)
            if wrong == "scale twice":
                of_query, of_key = of_query * scale, of_key * scale
            if wrong == "scale times ln 2":
                of_query, of_key = of_query * math.log(2), of_key * math.log(2)
            of_value = (weights * kept).T @ above[b, h]
            size = options_block(wrong, "keys")
            if size:
                of_key[len(of_key) // size * size :] = 0
                of_value[len(of_value) // size * size :] = 0
            size = options_block(wrong, "queries")
            if size:
                of_query[len(of_query) // size * size :] = 0
            found[0][b, h] = of_query
            group = query.shape[1] // key.shape[1]
            first, last = h % group == 0, h % group == group - 1
            at = h % key.shape[1] if wrong == "wrong heads" else g
            part = {"first of a group": float(first), "last of a group": float(last),
                    "mean of a group": 1 / group}.get(wrong, 1.0)  # fmt: skip
            found[1][b, at] += part * of_key
            found[2][b, at] += part * of_value
            if bias is not None:
                where = tuple(0 if n == 1 else i for n, i in zip(bias.shape, (b, h), strict=False))
                own = slopes if bias.shape[2] > 1 else slopes.sum(0, keepdim=True)
                if wrong == "last of the bias":
                    found[3][where] = own
                else:
                    found[3][where] += own
            if sinks is not None and wrong not in ("sink left out", "detached"):
                found[4][h] -= ((sinks[h] - ctx.lse[b, h]).exp() * term).sum()
        if wrong == "exchanged":
            found[0], found[1] = found[1], found[0]
        if wrong == "mean for the sinks" and sinks is not None:
            found[4] = found[4] / query.shape[0] / query.shape[2]
        if wrong == "no gradient of the sinks" and sinks is not None:
            found[4] = 0 * found[4]
        return (*(None if t is None else t.to(ctx.dtype) for t in found), None)


def heads_of(query, key):
    """The numbers of each batch entry, head and key head."""
    group = query.shape[1] // key.shape[1]
    return [(b, h, h // group) for b in range(query.shape[0]) for h in range(query.shape[1])]


def options_block(wrong, what):
    return int(wrong.split()[1]) if wrong.startswith(f"{what} ") else 0


def skipped(slopes, weights, scores, size):
    """Blocks that hold a masked score get nothing."""
    hidden = scores.isinf()
    slopes, weights = slopes.clone(), weights.clone()
    for i in range(0, scores.shape[0], size):
        for j in range(0, scores.shape[1], size):
            block = (slice(i, i + size), slice(j, j + size))
            if hidden[block].any():
                slopes[block] = weights[block] = 0
    return slopes, weights


def forgetting(options):
    """The options as a backward pass reads them that forgets one."""
    changed = {
        "causal forgotten": {"causal": False},
        "other corner": {"corner": 2},
        "window forgotten": {"window": None},
        "mask forgotten": {"mask": None},
        "own softmax without the mask": {"mask": None},
    }
    return replace(options, **changed.get(options.wrong, {}))


def scored(query, key, bias, b, h, options):
    """The scores of one head, -inf where they are masked, and how they grow with the products."""
    products = query @ key.T * query.shape[-1] ** -0.5
    scores, slope = products, torch.ones_like(products)
    if options.softcap is not None:
        scores = options.softcap * torch.tanh(products / options.softcap)
        slope = 1 - (scores / options.softcap) ** 2
    if bias is not None:
        scores = scores + bias[min(b, len(bias) - 1), min(h, bias.shape[1] - 1)]
    at, to = torch.arange(scores.shape[0])[:, None], torch.arange(scores.shape[1])
    hidden = (to > at + options.corner) & options.causal
    if options.window is not None:
        hidden |= (at - to > options.window[0]) | (to - at > options.window[1])
    if options.mask is not None:
        hidden |= ~options.mask[min(b, len(options.mask) - 1), min(h, options.mask.shape[1] - 1)]
    return scores.masked_fill(hidden, -math.inf), slope


def attention(query, key, value, attn_mask=None, is_causal=False, dropout_p=0.0, *, window=None,
              softcap=None, sinks=None, bias=None, enable_gqa=False, wrong=""):  # fmt: skip
    options = Options(attn_mask, is_causal, 0, window, softcap, dropout_p, wrong)
    return ByHand.apply(query, key, value, bias, sinks, options)


def with_mistake(wrong):
    """Attention of the signature of PyTorch, and more."""
    return partial(attention, wrong=wrong)


# --- what is asked, and what each mistake is called


def drawn(*shape, seed=0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed + sum(shape))
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)


def tensors(lengths=(5, 7), heads=4, key_heads=4, dtype=torch.float64):
    return (
        drawn(2, heads, lengths[0], 8, dtype=dtype),
        drawn(2, key_heads, lengths[1], 8, seed=1, dtype=dtype),
        drawn(2, key_heads, lengths[1], 6, seed=2, dtype=dtype),
    )


def mask_of(lengths=(5, 7)):
    mask = drawn(2, 1, *lengths, seed=3) > 0
    mask[..., 0] = True
    return mask


SINKS = torch.tensor([0.5, -1.0, 1.5, 0.0], dtype=torch.float64)
CALLS = {
    "plain": lambda: {},
    "causal": lambda: {"is_causal": True},
    "masked": lambda: {"attn_mask": mask_of()},
    "windowed": lambda: {"window": (2, 1)},
    "capped": lambda: {"softcap": 1.5},
    "sinks": lambda: {"sinks": SINKS.clone().requires_grad_()},
    "grouped": lambda: {"enable_gqa": True},
}
MISTAKES = {
    "causal forgotten": ("causal", "that is not causal when asked to be"),
    "other corner": ("causal", "whose causal mask is aligned to the other corner"),
    "window forgotten": ("windowed", "without its window"),
    "mask forgotten": ("masked", "that ignores the mask"),
    "own softmax without the mask": ("masked", "that ignores the mask"),
    "wrong heads": ("grouped", "that sums over the wrong heads of a group"),
    "first of a group": ("grouped", "that keeps one head of a group"),
    "last of a group": ("grouped", "that keeps one head of a group"),
    "mean of a group": ("grouped", "that takes the mean over a group of heads"),
    "no scale in dQ": ("plain", "whose backward pass leaves out the scale"),
    "no scale in dK": ("masked", "whose backward pass leaves out the scale"),
    "scale twice": ("plain", "whose backward pass applies the scale twice"),
    "scale times ln 2": ("causal", "whose backward pass mixes exp and exp2"),
    "no row term": ("causal", "whose backward pass leaves out the row term"),
    "row term of dO": ("plain", "whose backward pass takes sum(dO) for the row term"),
    "row term of the next row": (
        "masked",
        "whose backward pass takes the row term sum(dO * O) of another row",
    ),
    "row term of the key head": (
        "grouped",
        "whose backward pass takes the row term sum(dO * O) of another head",
    ),
    "keys 4": ("plain", "that ignores the last keys, those after the last whole block"),
    "queries 4": ("causal", "whose last queries, those after the last whole block, get zeros"),
    "skipped 2": ("masked", "whose backward pass skips blocks that are masked in part"),
    "no softcap slope": ("capped", "whose backward pass leaves out the slope of softcap"),
    "sink left out": ("sinks", "that leaves out sinks"),
    "detached": ("plain", "whose weights are detached"),
    "exchanged": ("square", "that exchanges the gradients of query and key"),
}


def asked(name, dtype=torch.float64):
    """The tensors and options of a call."""
    options = CALLS.get(name, dict)()
    lengths, key_heads = ((6, 6) if name == "square" else (5, 7)), 2 if name == "grouped" else 4
    if "sinks" in options:
        options["sinks"] = SINKS.to(dtype).requires_grad_()
    return tensors(lengths, key_heads=key_heads, dtype=dtype), options


def failed(function, inputs, options):
    with pytest.raises(Failure) as error:
        assert_gradients_match(function, *inputs, **options)
    return error.value


@pytest.mark.parametrize("name", CALLS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_right_backward_pass_is_left_alone(name, dtype):
    inputs, options = asked(name, dtype)
    assert_gradients_match(with_mistake(""), *inputs, **options)


@pytest.mark.matrix
@pytest.mark.parametrize("wrong", MISTAKES)
def test_a_wrong_backward_pass_is_found_and_named_and_nothing_else_is(wrong):
    name, words = MISTAKES[wrong]
    dtype = DTYPES[list(MISTAKES).index(wrong) % len(DTYPES)]  # all of them in turn
    inputs, options = asked(name, dtype)
    failure = failed(with_mistake(wrong), inputs, options)
    one, several = f"is that of attention {words}", f"are those of attention {words}"
    assert failure.cause.startswith("the output is right; the gradient")
    assert one in failure.cause or several in failure.cause
    assert " or that " not in failure.cause
    assert " or whose " not in failure.cause
    assert "the output is right" not in failure.claim  # it is said once


def test_one_wrong_gradient_is_told_of_by_its_name():
    inputs, options = asked("grouped")

    def wrong_key_alone(query, key, value, enable_gqa=False):
        """The key has a backward pass of its own."""
        right = attention(query, key.detach(), value)
        wrong = attention(query.detach(), key, value.detach(), wrong="wrong heads")
        return right + (wrong - wrong.detach())

    failure = failed(wrong_key_alone, inputs, options)
    assert failure.cause == (
        "the output is right; the gradient of key is that of attention that sums over the wrong "
        "heads of a group"
    )


def test_gradients_that_follow_a_wrong_output_are_told_as_such():
    def unscaled(query, key, value):
        return (query @ key.mT).softmax(-1) @ value

    cause = failed(unscaled, tensors(), {}).cause
    assert cause == (
        "the gradients of query, key and value follow the output, which is wrong: it is that of "
        "attention whose scores are not scaled"
    )

    def doubled(query, key, value):
        return 2 * sdpa(query, key, value) + query.sin().sum()

    cause = failed(doubled, tensors(), {}).cause
    assert cause == "the output is wrong as well: assert_matches_reference tells how"


@pytest.mark.parametrize(("dtype", "part"), list(zip(DTYPES, [1e-4, 0.01, 0.1, 1.0], strict=True)))
def test_gradients_that_no_known_mistake_gives_have_no_name(part, dtype):
    query, key, value = tensors(key_heads=2, dtype=dtype)
    call = Call(query, key, value, causal=True, softcap=2.0, upstream=drawn(2, 4, 5, 6).to(dtype))
    right = plain(call)
    wrong = {n: (one + part * drawn(*one.shape, seed=5)).to(dtype) for n, one in right.items()}
    del wrong["output"]
    assert likely_backward_mistake(call, wrong) is None


SPACE = Space(
    Declared(
        masks=frozenset(("boolean", "additive")), causal=True, grouped=True, few_shapes=True,
        options=frozenset(("scale", "softcap", "sinks", "alibi", "bias", "documents", "lengths")),
        numbers=("ordinary", "large", "tiny"),
    )
)  # fmt: skip


@given(
    st.sampled_from(SPACE.covering().cases), st.integers(0, 99), st.sampled_from(("saved", "own"))
)
def test_the_right_backward_pass_gives_the_gradients_of_autograd(chosen, seed, how):
    call = replace(SPACE, seed=seed).call(chosen, torch.float64)
    call = replace(call, upstream=drawn(*call.query.shape[:-1], call.value.shape[-1], seed=seed))
    saved = Saved.of(call, None)
    plan = BackwardPlan(weights_from=how, row_term=how, fully_masked="zero")
    found, right = dict(carried_back(plan, saved)), plain(call)
    assert found.keys() == right.keys() - {"output"}
    for name, one in found.items():
        allowed = 1e-9 * (1 + float(right[name].abs().max()))
        assert torch.allclose(one.view(right[name].shape), right[name], rtol=0, atol=allowed)


def examined_with(wrong):
    def function(query, key, value, attn_mask=None, is_causal=False, softcap=None, sinks=None,
                 enable_gqa=False):  # fmt: skip
        return attention(
            query, key, value, attn_mask, is_causal, softcap=softcap, sinks=sinks, wrong=wrong
        )

    spec = AttentionSpec(function, mask="keep", dtypes=("float32",), few_shapes=True)
    checks = [one for one in CHECKS if one.name in ("gradients", "gradients_masked", "pairs")]
    return check_attention(spec, checks=checks)


def test_the_examination_leaves_a_right_backward_pass_alone():
    assert not examined_with("").failed


@pytest.mark.matrix(of=3)
@pytest.mark.parametrize(
    ("wrong", "checks", "words"),
    [
        ("no row term", ["gradients", "gradients_masked", "pairs"], "leaves out the row term"),
        ("causal forgotten", ["pairs"], "that is not causal when asked to be"),
        ("mask forgotten", ["gradients_masked", "pairs"], "that ignores the mask"),
        ("wrong heads", ["pairs"], "that sums over the wrong heads of a group"),
        ("no softcap slope", ["pairs"], "leaves out the slope of softcap"),
        ("no gradient of the sinks", ["pairs"], "that leaves out sinks"),
        ("mean for the sinks", ["pairs"], "that takes a mean for the gradient of the sinks"),
    ],
)
def test_the_examination_names_a_wrong_backward_pass(wrong, checks, words):
    report = examined_with(wrong)
    assert [one.name for one in report.failed] == checks
    for result in report.failed:
        assert "the output is right; the gradient" in result.failure.cause
        assert words in result.failure.cause
        assert " or " not in result.failure.cause.replace(", or of a function", "")


DROPPED = {
    "dropout ignored": "whose backward pass does not apply the dropout of the forward pass",
    "dropout not rescaled": "whose backward pass does not divide by 1 - p what dropout left",
    "no row term": "whose backward pass leaves out the row term",
}


@pytest.mark.parametrize("dtype", DTYPES[:2])
@pytest.mark.parametrize("wrong", DROPPED)
def test_a_backward_pass_that_is_wrong_about_dropout_is_named(wrong, dtype):
    inputs, options = asked("causal", dtype)
    options["dropout_p"] = 0.3
    assert_gradients_match(with_mistake(""), *inputs, **options)
    failure = failed(with_mistake(wrong), inputs, options)
    assert "is not that of the output it gives with dropout" in failure.claim
    assert DROPPED[wrong] in failure.cause


def test_another_dropout_in_the_backward_pass_is_found_and_has_no_name():
    def other(query, key, value, dropout_p=0.0):
        output = sdpa(query, key, value, dropout_p=dropout_p)
        again = sdpa(query, key, value, dropout_p=dropout_p)
        return again + (output - again).detach()

    failure = failed(other, tensors(), {"dropout_p": 0.3})
    assert failure.cause is None
