"""Which attention functions pass for attention, which do not, and what is said about them."""

import functools
import math
import random
import re

import numpy as np
import pytest
import torch
from devices import on_accelerators
from torch.nn import functional as F  # noqa: N812
from torch.nn.attention import SDPBackend, sdpa_kernel

from pytest_attnheat import (
    HARD_CASES,
    Failure,
    assert_gradients_match,
    assert_matches_reference,
    hard_case,
)
from pytest_attnheat.assertions.precision_elements import judge
from pytest_attnheat.attention import computation
from pytest_attnheat.attention.call import Call
from pytest_attnheat.attention.parts import parts_of

DTYPES = ["float64", "float32", "float16", "bfloat16"]
# A fine one and a coarse one, where the dtype decides little.
TWO = ["float32", "bfloat16"]

sdpa = F.scaled_dot_product_attention


def inputs(*lead, query_len=6, key_len=8, width=16, key_heads=None, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    own = (*lead[:-1], key_heads) if key_heads else lead
    shapes = (*lead, query_len, width), (*own, key_len, width), (*own, key_len, width)
    return tuple(torch.randn(shape, generator=generator).to(dtype) for shape in shapes)


def message(function, *tensors, check=assert_matches_reference, **options):
    with pytest.raises(AssertionError) as error:
        check(function, *tensors, **options)
    return str(error.value)


def on_case(function, name, *, dtype="float32", seed=0, **options):
    case = hard_case(name, dtype=dtype, seed=seed)
    arguments = {**case.arguments, **options}
    assert_matches_reference(function, case.query, case.key, case.value, **arguments)


def message_on(function, name, **options):
    with pytest.raises(AssertionError) as error:
        on_case(function, name, **options)
    return str(error.value)


# --- correct attention, written in many ways


def permitted(query, key, attn_mask, is_causal):
    seen = torch.ones(query.shape[-2], key.shape[-2], dtype=torch.bool)
    seen = seen.tril() if is_causal else seen
    return seen if attn_mask is None else seen & attn_mask


def finish(scores, seen, value, dtype=None):
    scores = scores.masked_fill(~seen, -math.inf).masked_fill(~seen.any(-1, keepdim=True), 0)
    weights = scores.softmax(-1, dtype=dtype).to(value.dtype).masked_fill(~seen, 0)
    return weights @ value


def offset(query, key, value, attn_mask=None, is_causal=False):
    scores = query @ key.mT * query.shape[-1] ** -0.5 + 1
    return finish(scores, permitted(query, key, attn_mask, is_causal), value)


def scaled_query(query, key, value, attn_mask=None, is_causal=False):
    scores = (query * query.shape[-1] ** -0.5) @ key.mT
    return finish(scores, permitted(query, key, attn_mask, is_causal), value)


def subtracted(query, key, value, attn_mask=None, is_causal=False):
    """The row maximum is subtracted, and autograd goes through it."""
    seen = permitted(query, key, attn_mask, is_causal)
    scores = (query @ key.mT * query.shape[-1] ** -0.5).masked_fill(~seen, -math.inf)
    most = scores.amax(-1, keepdim=True)
    exp = (scores - most.masked_fill(most == -math.inf, 0)).exp()
    total = exp.sum(-1, keepdim=True)
    return exp / total.masked_fill(total == 0, 1) @ value


def divided_last(query, key, value, attn_mask=None, is_causal=False):
    """As in FlashAttention: the output is divided by the sum, not the weights."""
    seen = permitted(query, key, attn_mask, is_causal)
    scores = (query @ key.mT * query.shape[-1] ** -0.5).masked_fill(~seen, -math.inf)
    most = scores.amax(-1, keepdim=True).detach()
    exp = (scores - most.masked_fill(most == -math.inf, 0)).exp()
    total = exp.sum(-1, keepdim=True)
    return exp @ value / total.masked_fill(total == 0, 1)


def wide_softmax(query, key, value, attn_mask=None, is_causal=False):
    scores = query @ key.mT * query.shape[-1] ** -0.5
    wide = None if query.dtype == torch.float64 else torch.float32
    return finish(scores, permitted(query, key, attn_mask, is_causal), value, dtype=wide)


def with_backends(*backends):
    def function(*args, **options):
        with sdpa_kernel(list(backends)):
            return sdpa(*args, **options)

    return function


CORRECT = {
    "a constant added to all scores of a row": offset,
    "scaled query": scaled_query,
    "row maximum subtracted": subtracted,
    "divided last": divided_last,
    "softmax in float32": wide_softmax,
    "sdpa": sdpa,
    "sdpa math": with_backends(SDPBackend.MATH),
    "sdpa flash": with_backends(SDPBackend.FLASH_ATTENTION, SDPBackend.MATH),
}


@pytest.mark.parametrize(
    ("how", "dtype"),
    [(how, dtype) for n, how in enumerate(CORRECT) for dtype in (DTYPES[n % 2], DTYPES[2 + n % 2])],
)
def test_correct_attention_raises_no_alarm_on_any_hard_case(how, dtype):
    for name in HARD_CASES:
        on_case(CORRECT[how], name, dtype=dtype)


@pytest.mark.parametrize("dtype", TWO)
def test_grouped_keys_may_be_repeated_explicitly(dtype):
    def repeated(query, key, value, enable_gqa):
        groups = query.shape[-3] // key.shape[-3]
        return sdpa(query, *(t.repeat_interleave(groups, -3) for t in (key, value)))

    for seed in range(5):
        grouped = inputs(2, 6, key_heads=2, dtype=getattr(torch, dtype), seed=seed)
        assert_matches_reference(repeated, *grouped, enable_gqa=True)
        assert_matches_reference(sdpa, *grouped, enable_gqa=True)


@pytest.mark.parametrize("dtype", TWO)
def test_flex_attention_raises_no_alarm(dtype):
    flex = pytest.importorskip("torch.nn.attention.flex_attention")

    def function(query, key, value, attn_mask=None, is_causal=False):
        seen = permitted(query, key, attn_mask, is_causal)
        seen = seen.expand(*query.shape[:2], *seen.shape[-2:])
        return flex.flex_attention(
            query, key, value, lambda s, b, h, i, j: torch.where(seen[b, h, i, j], s, -math.inf)
        )

    # It has no backward on the CPU.
    for name in ("gaussian", "causal", "padding_left", "large_magnitudes", "fully_masked_rows"):
        case = hard_case(name, dtype=dtype)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(flex, "_FLEX_ATTENTION_DISABLE_COMPILE_DEBUG", True, raising=False)
            assert_matches_reference(
                function, case.query, case.key, case.value, gradients=False, **case.arguments
            )


@pytest.mark.parametrize("dtype", TWO)
def test_the_attention_functions_of_transformers_raise_no_alarm(dtype):
    llama = pytest.importorskip("transformers.models.llama.modeling_llama")
    fused = pytest.importorskip("transformers.integrations.sdpa_attention")
    module = torch.nn.Module().eval()
    module.num_key_value_groups, module.is_causal = 1, False

    def eager(query, key, value, attn_mask=None, is_causal=False):
        seen = permitted(query, key, attn_mask, is_causal).expand(1, 1, -1, -1)
        bias = torch.zeros(seen.shape, dtype=query.dtype)
        bias = bias.masked_fill(~seen, torch.finfo(query.dtype).min)
        scale = query.shape[-1] ** -0.5
        output, weights = llama.eager_attention_forward(module, query, key, value, bias, scale)
        return output.transpose(1, 2), weights

    def by_sdpa(query, key, value, attn_mask=None, is_causal=False):
        seen = permitted(query, key, attn_mask, is_causal).expand(1, 1, -1, -1)
        output, none = fused.sdpa_attention_forward(module, query, key, value, seen)
        return output.transpose(1, 2), none

    for name in HARD_CASES:
        if name != "mask_per_head":
            on_case(eager, name, dtype=dtype, fully_masked="uniform")
            on_case(by_sdpa, name, dtype=dtype)


@pytest.mark.parametrize("shape", [(), (3,), (2, 3), (2, 1, 2, 2)], ids=str)
def test_any_number_of_leading_dimensions_will_do(shape):
    assert_matches_reference(sdpa, *inputs(*shape))
    assert_matches_reference(sdpa, *inputs(*shape), is_causal=True)


@pytest.mark.parametrize("scale", [0.0, -0.3, 1.0])
def test_scale_is_passed_on_and_followed(scale):
    assert_matches_reference(sdpa, *inputs(1, 2), scale=scale)
    assert "are not those" in message(
        lambda q, k, v, scale: sdpa(q, k, v), *inputs(1, 2), scale=0.3
    )


def test_a_plain_function_of_three_arguments_gets_no_option():
    assert_matches_reference(lambda query, key, value: sdpa(query, key, value), *inputs(1, 2))


def test_more_options_are_passed_on():
    def function(query, key, value, dropout_p, flavour):
        assert (dropout_p, flavour) == (0.0, "plain")
        return sdpa(query, key, value)

    assert_matches_reference(function, *inputs(1, 2), dropout_p=0.0, flavour="plain")


@pytest.mark.parametrize("dtype", TWO)
@pytest.mark.parametrize("shape", [(6, 8), (1, 8), (2, 1, 6, 8), (2, 3, 1, 8)], ids=str)
def test_a_float_mask_is_added_and_its_gradient_judged(shape, dtype):
    query, key, value = inputs(2, 3, dtype=getattr(torch, dtype))
    bias = torch.randn(shape, generator=torch.Generator().manual_seed(7)).to(query.dtype)
    bias[..., 2] = -math.inf
    bias.requires_grad_()
    assert_matches_reference(sdpa, query, key, value, attn_mask=bias)
    text = message(
        lambda q, k, v, attn_mask: sdpa(q, k, v, attn_mask=attn_mask.detach()),
        *(query, key, value),
        attn_mask=bias,
    )
    assert "no gradient reaches attn_mask" in text
    assert bias.grad is None


FILLS = {
    "float64": (-1e4, -1e9, torch.finfo(torch.float64).min),
    "float32": (-1e4, -1e9, torch.finfo(torch.float32).min),
    "float16": (-1e4, torch.finfo(torch.float16).min),
    "bfloat16": (-1e4, -1e9, torch.finfo(torch.bfloat16).min),
}


def finite_masks(dtype):
    """A causal mask of finite numbers, and one with a row that may attend to nothing."""
    for fill in FILLS[dtype]:
        seen = torch.ones(6, 8, dtype=torch.bool).tril()
        for lost in (False, True):
            seen[3] &= not lost
            yield torch.zeros(6, 8, dtype=getattr(torch, dtype)).masked_fill(~seen, fill)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_mask_of_finite_numbers_excuses_nothing(dtype):
    tensors = inputs(1, 2, dtype=getattr(torch, dtype))
    several = assert_matches_reference, assert_gradients_match
    for number, mask in enumerate(finite_masks(dtype)):
        message(lambda q, k, v, attn_mask: 0 * sdpa(q, k, v), *tensors, attn_mask=mask)
        text = message(
            lambda q, k, v, attn_mask: 1.2 * sdpa(q, k, v, attn_mask=attn_mask),
            *tensors,
            attn_mask=mask,
            check=several[number % 2],
        )
        assert "query" in text
        assert "value" in text


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_mask_of_finite_numbers_raises_no_alarm(dtype):
    def added(query, key, value, attn_mask):
        return (query @ key.mT * query.shape[-1] ** -0.5 + attn_mask).softmax(-1) @ value

    tensors = inputs(1, 2, dtype=getattr(torch, dtype))
    for mask in finite_masks(dtype):
        for function in (sdpa, added):
            assert_matches_reference(function, *tensors, attn_mask=mask)
            assert_matches_reference(function, *tensors, attn_mask=mask.clone().requires_grad_())


@pytest.mark.parametrize("dtype", ["float64", "float32", "bfloat16"])
def test_a_row_of_finite_numbers_that_forbid_is_still_a_mean_of_values(dtype):
    def huge(query, key, value, attn_mask):
        return sdpa(query, key, value, attn_mask=attn_mask) + 1e6 * (attn_mask < -1).all(-1, True)

    mask = torch.zeros(6, 8, dtype=getattr(torch, dtype))
    mask[3] = torch.finfo(mask.dtype).min
    text = message(huge, *inputs(1, 2, dtype=mask.dtype), attn_mask=mask)
    assert "32 of 192 elements of the output" in text


def test_a_gradient_too_small_to_be_a_normal_number_may_be_taken_for_zero():
    query, key, value = inputs(1, 2, dtype=torch.float32)
    bias = torch.zeros(6, 8, dtype=query.dtype).index_fill(-1, torch.tensor([2]), -90.0)
    found = computation.reference(Call(query, key, value, bias=bias, upstream=query))
    exact, least = (of["attn_mask"][:, 2].abs() for of in (found.exact, found.least))
    assert bool((exact > 0).all())
    assert bool((exact < torch.finfo(torch.float32).smallest_normal).all())
    assert bool((exact <= 2 * least).all())


@pytest.mark.parametrize("dtype", DTYPES)
def test_no_rounding_reaches_a_key_that_a_finite_number_forbids(dtype):
    query, key, value = inputs(1, 2, dtype=getattr(torch, dtype))
    for fill in FILLS[dtype]:
        bias = torch.zeros(6, 8, dtype=query.dtype).index_fill(-1, torch.tensor([2]), fill)
        problem = Call(query, key, value, bias=bias, scale=0.25, upstream=query)
        # Some smallest numbers, by which a weight of 0 may be off, times |dO . v|. Kernels in
        # float32 may take a subnormal number for 0.
        allowed = computation.reference(problem).scale["attn_mask"][:, 2]
        info = torch.finfo(query.dtype)
        normal = 0.0 if dtype == "float64" else torch.finfo(torch.float32).smallest_normal
        assert float(allowed.max()) <= 100 * max(info.smallest_normal * info.eps, normal)


def test_scores_of_masked_keys_do_not_explain_an_overflow():
    mask = torch.zeros(6, 8).index_fill(-1, torch.tensor([2]), -1e9)
    text = message(
        lambda q, k, v, attn_mask: sdpa(q, k, v).index_fill(-2, torch.tensor([3]), math.nan),
        *inputs(1, 2),
        attn_mask=mask,
    )
    assert "elements are NaN or infinite" in text
    assert "the row maximum was not subtracted" not in text


@pytest.mark.parametrize("reference", [None, "own"])
@pytest.mark.parametrize(
    ("shape", "place"), [((8,), r"attn_mask.grad\[\d\] is"), ((), "attn_mask.grad is")], ids=str
)
@pytest.mark.parametrize("lead", [(), (1, 2)], ids=str)
def test_the_gradient_of_a_mask_may_have_fewer_than_two_dimensions(lead, shape, place, reference):
    def added(query, key, value, attn_mask):
        return (query @ key.mT * query.shape[-1] ** -0.5 + attn_mask).softmax(-1) @ value

    def wrong(query, key, value, attn_mask):
        return added(query, key, value, attn_mask) + (attn_mask - attn_mask.detach()).sum()

    mask = torch.randn(shape, generator=torch.Generator().manual_seed(1)).requires_grad_()
    options = {"attn_mask": mask, "reference": reference and added}
    assert_matches_reference(added, *inputs(*lead), **options)
    text = message(wrong, *inputs(*lead), **options)
    assert re.search(place, text)
    if shape:
        message(
            lambda q, k, v, attn_mask: added(q, k, v, attn_mask.detach()), *inputs(*lead), **options
        )


def merged(query, key, value, attn_mask=None, is_causal=False):
    """As in flash-decoding: two halves of the keys, merged by their logsumexp."""
    half, scale = key.shape[-2] // 2, query.shape[-1] ** -0.5
    outputs, logarithms = [], []
    for part in (slice(0, half), slice(half, None)):
        scores = query @ key[..., part, :].mT * scale
        logarithms.append(scores.logsumexp(-1, keepdim=True))
        outputs.append((scores - logarithms[-1]).exp() @ value[..., part, :])
    weights = torch.cat(logarithms, -1)
    weights = (weights - weights.logsumexp(-1, keepdim=True)).exp()
    return weights[..., :1] * outputs[0] + weights[..., 1:] * outputs[1]


@pytest.mark.parametrize("dtype", ["float64", "float32"])
def test_keys_in_two_parts_merged_by_their_logsumexp_raise_no_alarm(dtype):
    for seed in range(4):
        on_case(merged, "large_magnitudes", dtype=dtype, seed=seed)
        on_case(merged, "gaussian", dtype=dtype, seed=seed)


# --- the reference


def by_hand(query, key, value, seen, scale, upstream, bias):
    """Attention and its gradients of one head, in plain Python."""
    n, m, d, c = len(query), len(key), len(query[0]), len(value[0])
    output = [[0.0] * c for _ in range(n)]
    dq, dk = [[0.0] * d for _ in range(n)], [[0.0] * d for _ in range(m)]
    dv, db = [[0.0] * c for _ in range(m)], [[0.0] * m for _ in range(n)]
    for i in range(n):
        keys = [j for j in range(m) if seen[i][j]]
        exp = {
            j: math.exp(scale * math.fsum(map(float.__mul__, query[i], key[j])) + bias[i][j])
            for j in keys
        }
        weight = {j: exp[j] / math.fsum(exp.values()) for j in keys}
        felt = {j: math.fsum(map(float.__mul__, upstream[i], value[j])) for j in keys}
        mean = math.fsum(weight[j] * felt[j] for j in keys)
        for j in keys:
            slope = weight[j] * (felt[j] - mean)
            db[i][j] = slope
            for a in range(c):
                output[i][a] += weight[j] * value[j][a]
                dv[j][a] += weight[j] * upstream[i][a]
            for a in range(d):
                dq[i][a] += scale * slope * key[j][a]
                dk[j][a] += scale * slope * query[i][a]
    return [torch.tensor(t, dtype=torch.float64) for t in (output, dq, dk, dv, db)]


@pytest.mark.parametrize("budget", [None, 1, 3000], ids=["whole", "row by row", "in parts"])
def test_the_oracle_is_attention_by_hand_however_it_is_cut(budget, monkeypatch):
    if budget is not None:
        monkeypatch.setattr("pytest_attnheat.attention.chunks.CHUNK_BYTES", budget)
    query, key, value = inputs(2, 4, query_len=5, key_len=7, width=3, key_heads=2)
    query, key, value = query.double(), key.double(), value[..., :2].double()
    bias = torch.randn(4, 5, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    bias[1, 2] = -math.inf
    bias[3, :, 4] = -math.inf
    upstream = torch.randn(
        2, 4, 5, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(2)
    )
    problem = Call(query, key, value, bias=bias, causal=True, scale=0.7, upstream=upstream)
    for found in (computation.reference(problem).exact, computation.plain(problem)):
        wanted = {name: torch.zeros(shape).double() for name, shape in problem.shapes.items()}
        for b, h in ((b, h) for b in range(2) for h in range(4)):
            seen = (torch.ones(5, 7).tril() > 0) & (bias[h] > -math.inf)
            tensors = (query[b, h], key[b, h // 2], value[b, h // 2], seen)
            o, dq, dk, dv, db = by_hand(
                *(t.tolist() for t in tensors), 0.7, upstream[b, h].tolist(), bias[h].tolist()
            )
            wanted["output"][b, h], wanted["query"][b, h] = o, dq
            wanted["key"][b, h // 2] += dk
            wanted["value"][b, h // 2] += dv
            wanted["attn_mask"][h] += db
        for name, tensor in wanted.items():
            torch.testing.assert_close(found[name], tensor, rtol=1e-12, atol=1e-14, msg=name)


def test_the_scale_of_an_output_is_the_weighted_mean_of_absolute_values_in_units_of_rounding():
    query, key, value = inputs(1, 1, width=1)
    zero = torch.zeros_like(query)
    problem = Call(zero, key, value, scale=1.0)
    scale = computation.reference(problem).scale["output"]
    mean = value.double().abs().mean(-2, keepdim=True).expand(scale.shape)
    # 1 for the weights, up to 2 for a constant added to all scores, sqrt(8) for the sums; and 20
    # units in the last place for an approximate exp, above and below the line.
    assert bool((scale > 2**-24 * mean).all())
    assert bool((scale < 2**-24 * ((1 + 2) * (1 + math.sqrt(8)) + 2 * 40) * mean).all())


@pytest.mark.parametrize("sizes", [(3, 40, 700, 900), (1, 2, 3000, 40_000)], ids=str)
def test_memory_is_bounded_whatever_the_size(sizes):
    *lead, query_len, key_len = sizes
    query, key = torch.ones(*lead, query_len, 1), torch.ones(*lead, key_len, 1)
    problem = Call(query, key, key, scale=1.0)
    seen = [chunk.permitted.shape for chunk in parts_of(problem, torch.float64)]
    assert all(8 * 16 * shape.numel() <= 64 * 2**20 for shape in seen)
    assert sum(shape[0] * shape[1] for shape in seen) == math.prod(lead) * query_len


def judged(found, exact, plain, dtype=torch.float16):
    found, exact, plain = (torch.tensor(t, dtype=torch.float64) for t in (found, exact, plain))
    size = 1e-3 * torch.ones_like(exact)
    everywhere = torch.ones_like(exact, dtype=torch.bool)
    tensors = found.to(dtype), exact, plain, size, size
    return judge("query", *tensors, factor=2.0, dtype=dtype, judged=everywhere).broken.tolist()


def test_a_plain_computation_that_is_infinite_at_one_place_excuses_no_other():
    plain = [[math.inf, 2.0, math.nan]]
    assert judged([[1.1, 2.0, 3.0]], [[1.0, 2.0, 3.0]], plain) == [[True, False, False]]
    assert judged([[1.0, 2.0, 3.1]], [[1.0, 2.0, 3.0]], plain) == [[False, False, True]]


def test_a_plain_error_excuses_its_own_map_and_no_other():
    exact, found = [[[1.0]], [[1.0]]], [[[1.05]], [[1.05]]]
    assert judged(found, exact, [[[1.0]], [[1.04]]]) == [[[True]], [[False]]]


def test_infinity_is_right_where_the_dtype_cannot_hold_the_gradient():
    found = [[math.inf, -math.inf, math.inf, math.nan]]
    exact = [[1e5, 1e5, 6e4, 1e5]]
    assert judged(found, exact, exact) == [[False, True, True, True]]


# --- what must not pass: messages


def test_the_message_says_all_that_a_ci_log_needs():
    def function(query, key, value):
        output = sdpa(query, key, value)
        return output + F.one_hot(torch.tensor(7), 16) * (torch.arange(12) == 5)[:, None] * 0.01

    text = message_on(function, "gaussian")
    lines = text.splitlines()
    assert lines[0] == (
        "assert_matches_reference: 2 of 384 elements of the output are not those of attention in "
        "float64"
    )
    assert lines[1].startswith("  worst    output[0, ")
    assert ", 5, 7] is " in lines[1]
    assert ", the reference " in lines[1]
    assert "(off by 1.0e-02; allowed " in lines[1]
    assert lines[2].startswith("           a plain float32 computation is off by ")
    assert "there, the subject " in lines[2]
    assert lines[2].endswith(" times as much (factor=2 on what rounding may come to)")
    assert lines[-2:] == ["  tensor   float32 (1, 2, 12, 16) on cpu", "  repeat   seed=0"]


def test_the_first_place_is_named_where_it_is_not_the_worst():
    def function(query, key, value):
        wrong = torch.zeros(12, 16)
        wrong[2, 3], wrong[9, 9] = 1e-3, 1.0
        return sdpa(query, key, value) + wrong

    text = message_on(function, "gaussian")
    assert "first    output[0, 0, 2, 3] is " in text
    assert ", 9, 9] is " in text.splitlines()[1]


@pytest.mark.parametrize("dtype", TWO)
def test_a_wrong_scale_is_seen(dtype):
    def embedding(query, key, value):
        return sdpa(query, key, value, scale=(2 * query.shape[-1]) ** -0.5)

    text = message_on(embedding, "gaussian", dtype=dtype)
    assert "elements of the output are not those" in text
    assert ", nor are the gradients of query, key and value" in text


@pytest.mark.parametrize("dtype", ["float64", "float32", "float16"])
def test_a_scale_after_the_softmax_is_named(dtype):
    text = message_on(lambda q, k, v: sdpa(q, k, v) / 8, "gaussian", dtype=dtype)
    words = r"the output is 0\.12\d+ times the reference: a scale after the softmax\?"
    assert re.search(words, text), text


@pytest.mark.parametrize("dtype", TWO)
@pytest.mark.parametrize("name", ["padding_left", "padding_right", "sliding_window"])
def test_an_inverted_mask_is_seen(name, dtype):
    def inverted(query, key, value, attn_mask):
        return sdpa(query, key, value, attn_mask=~attn_mask)

    assert "elements of the output are not those" in message_on(inverted, name, dtype=dtype)


@pytest.mark.parametrize("dtype", TWO)
def test_a_causal_mask_to_the_other_corner_is_seen(dtype):
    def bottom_right(query, key, value, is_causal):
        query_len, key_len = query.shape[-2], key.shape[-2]
        mask = torch.ones(query_len, key_len, dtype=torch.bool).tril(key_len - query_len)
        return sdpa(query, key, value, attn_mask=mask)

    on_case(bottom_right, "causal", dtype=dtype)
    text = message_on(bottom_right, "causal_fewer_queries", dtype=dtype)
    assert int(re.search(r"(\d+) of 160 elements of the output", text)[1]) > 140


def without_maximum(query, key, value, attn_mask=None, is_causal=False):
    seen = permitted(query, key, attn_mask, is_causal)
    exp = (query @ key.mT * query.shape[-1] ** -0.5).exp() * seen
    return exp / exp.sum(-1, keepdim=True) @ value


@pytest.mark.parametrize("dtype", DTYPES)
def test_an_exp_that_overflows_is_named(dtype):
    text = message_on(without_maximum, "large_magnitudes", dtype=dtype)
    top, limit = {"float64": (2130, 710), "float16": (33.3, 11.1)}.get(dtype, (266, 88.7))
    assert f"scores reach {top:.3g} and exp of {dtype} overflows from {limit:.3g} on" in text
    assert "the row maximum was not subtracted?" in text
    on_case(without_maximum, "gaussian", dtype=dtype)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_a_sum_kept_in_low_precision_is_seen(dtype):
    def one_by_one(query, key, value):
        weights = (query @ key.mT * query.shape[-1] ** -0.5).softmax(-1)
        terms = (weights[..., j : j + 1] * value[..., j : j + 1, :] for j in range(key.shape[-2]))
        return functools.reduce(torch.add, terms)

    text = message_on(one_by_one, "many_keys", dtype=dtype)
    assert "elements of the output are not those" in text
    assert "times the reference" not in text  # any factor fits outputs that are all alike


@pytest.mark.parametrize("dtype", TWO)
def test_nan_in_one_row_is_named_and_never_excused(dtype):
    def function(query, key, value):
        return sdpa(query, key, value).index_fill(-2, torch.tensor([3]), math.nan)

    text = message_on(function, "gaussian", dtype=dtype, factor=1e9)
    assert "output[0, 0, 3, 0] is nan, the reference " in text
    words = "32 elements are NaN or infinite, in 2 of 24 rows, from output[0, 0, 3, :] on"
    assert words in text
    with pytest.raises(AssertionError, match="from output"):
        on_case(function, "gaussian", dtype=dtype, gradients=False)


def test_a_plain_computation_that_overflows_excuses_nothing():
    query, key, value = (
        (300 * t).half() for t in inputs(1, 1, width=64)
    )  # products of 64 such numbers are beyond float16, scaled ones too

    def plain(query, key, value):
        return (query @ key.mT * query.shape[-1] ** -0.5).softmax(-1) @ value

    text = message(plain, query, key, value, gradients=False)
    assert "a plain float16 computation is NaN or infinite there too, which excuses nothing" in text


def test_a_detached_query_is_named():
    text = message_on(lambda q, k, v: sdpa(q.detach(), k, v), "gaussian")
    lines = text.splitlines()
    assert lines[0] == (
        "assert_matches_reference: no gradient reaches query, where attention in float64 has one; "
        "the output is right"
    )
    assert lines[1].startswith("  worst    query.grad[0, ")
    assert "detached on the way, computed under no_grad" in text
    assert "first" not in text


def test_no_gradient_at_all_is_named():
    for function in (
        lambda q, k, v: sdpa(q, k, v).detach(),
        torch.no_grad()(lambda q, k, v: sdpa(q, k, v)),
    ):
        text = message(function, *inputs(1, 2), check=assert_gradients_match)
        assert text.startswith("assert_gradients_match: no gradient reaches query, key and value,")
        assert_matches_reference(function, *inputs(1, 2), gradients=False)


def test_an_input_without_a_gradient_needs_none():
    # Over one key, the softmax is 1 whatever the query is.
    def function(query, key, value):
        return value.expand_as(query)

    assert_matches_reference(function, *inputs(1, 2, key_len=1))


def test_gradients_of_nan_for_fully_masked_rows_are_named():
    def cleaned(query, key, value, attn_mask):
        bias = torch.zeros(attn_mask.shape, dtype=query.dtype).masked_fill(~attn_mask, -math.inf)
        scores = query @ key.mT * query.shape[-1] ** -0.5 + bias
        return scores.softmax(-1).nan_to_num(0) @ value

    text = message_on(cleaned, "fully_masked_rows")
    first = "96 of 384 elements of the gradient of query are not those of attention in float64"
    assert first in text
    assert ", nor is the gradient of key; the output is right" in text
    words = "only rows without any permitted key are broken: each is NaN, through the softmax of"
    assert words in text
    case = hard_case("fully_masked_rows")
    with pytest.raises(AssertionError, match="assert_gradients_match: 96 of 384 elements"):
        assert_gradients_match(cleaned, case.query, case.key, case.value, **case.arguments)


@pytest.mark.parametrize("dtype", TWO)
def test_groups_in_another_order_are_named(dtype):
    def tiled(query, key, value, enable_gqa):
        groups = query.shape[-3] // key.shape[-3]
        return sdpa(query, key.repeat(1, groups, 1, 1), value.repeat(1, groups, 1, 1))

    grouped = inputs(2, 6, key_heads=2, dtype=getattr(torch, dtype))
    assert "whose key heads are shared in the wrong order" in message(
        tiled, *grouped, enable_gqa=True
    )


def test_wrong_heads_are_named():
    def function(query, key, value):
        output = sdpa(query, key, value)
        return torch.cat([output[:, :1], output[:, 1:].flip(-1)], 1)

    assert "cause    only in heads 1, 2 of 3\n" in message(function, *inputs(2, 3))


def test_a_wrong_batch_entry_is_named():
    def function(query, key, value):
        output = sdpa(query, key, value)
        return torch.cat([output[:1], output[1:].flip(-1)])

    assert "cause    only in batch entry 1 of 2\n" in message(function, *inputs(2, 3))
    assert "cause    only in batch entry 1 of 2\n" in message(function, *inputs(2, 1))


@pytest.mark.parametrize(
    ("dtype", "narrow"), [("float32", "bfloat16"), ("float32", "float16"), ("float64", "float32")]
)
def test_a_softmax_in_lower_precision_is_named(dtype, narrow):
    def function(query, key, value):
        scores = query @ key.mT * query.shape[-1] ** -0.5
        return scores.softmax(-1, dtype=getattr(torch, narrow)).to(value.dtype) @ value

    text = message_on(function, "gaussian", dtype=dtype)
    words = f"rounding of a narrower dtype, although the inputs are {dtype}: a step in lower"
    assert words in text


def test_scores_too_large_for_their_dtype_make_no_mistake_of_weights_that_are_all_one():
    query, key, value = inputs(1, 1, dtype=torch.bfloat16)
    query[..., 0] = key[..., 0] = 350.0

    def function(query, key, value):
        scores = query @ key.mT * query.shape[-1] ** -0.5
        return (scores - scores.logsumexp(-1, keepdim=True)).exp() @ value

    text = message(function, query, key, value)
    assert "scores reach 3.06e+04, where numbers of bfloat16 are 128 apart: scores, or a" in text
    assert "of attention whose" not in text


def test_a_gradient_that_is_wrong_at_one_place_is_no_step_in_lower_precision():
    class Off(torch.autograd.Function):
        """Its gradient is off by little everywhere, and by much in one row."""

        @staticmethod
        def forward(ctx, tensor, row):
            ctx.row = row
            return tensor.clone()

        @staticmethod
        def backward(ctx, above):
            noise = torch.linspace(-1, 1, above.numel()).sin().view(above.shape)
            wrong = above * (1 + 2e-3 * noise)
            wrong[..., ctx.row, :] *= 1.5
            return wrong, None

    def text(row):
        return message(lambda q, k, v: sdpa(q, Off.apply(k, row), v), *inputs(1, 2))

    assert "within the rounding of a narrower dtype" in text([])
    assert "within the rounding of a narrower dtype" not in text([3])


@pytest.mark.parametrize("dtype", TWO)
def test_one_leak_into_the_future_in_a_long_row_is_seen(dtype):
    def leaks(query, key, value, is_causal):
        mask = torch.ones(query.shape[-2], key.shape[-2], dtype=torch.bool).tril()
        mask[-2, -1] = True
        return sdpa(query, key, value, attn_mask=mask)

    message_on(leaks, "length_129", dtype=dtype, is_causal=True)


# --- what must not pass: the usual mistakes in scale and mask


def scaled(scale):
    def function(query, key, value):
        return sdpa(query, key, value, scale=scale)

    return function


@pytest.mark.parametrize("dtype", TWO)
@pytest.mark.parametrize(
    ("name", "scale", "words"),
    [
        ("gaussian", 1.0, "whose scores are not scaled"),
        (
            "gaussian",
            4.0,
            "whose scores are divided by the scale, not multiplied: times sqrt(head_dim)",
        ),
        (
            "gaussian",
            1 / 16,
            "whose scores are scaled twice (divided by head_dim, not by its root)",
        ),
        ("gaussian", 32**-0.5, "whose scale is taken from the whole embedding, heads * head_dim"),
        ("value_dim_differs", 24**-0.5, "whose scale is taken from the width of the values"),
    ],
)
def test_a_usual_wrong_scale_is_named(name, scale, words, dtype):
    text = message_on(scaled(scale), name, dtype=dtype)
    assert f"cause    the output is that of attention {words}" in text


def causal_by(offset):
    def function(query, key, value, is_causal):
        mask = torch.ones(query.shape[-2], key.shape[-2], dtype=torch.bool).tril(offset)
        return sdpa(query, key, value, attn_mask=mask)

    return function


MISTAKEN = [
    ("padding_left", lambda q, k, v, attn_mask: sdpa(q, k, v), "that ignores the mask"),
    ("causal", lambda q, k, v, is_causal: sdpa(q, k, v), "that is not causal when asked to be"),
    (
        "padding_right",
        lambda q, k, v, attn_mask: sdpa(q, k, v, attn_mask=~attn_mask),
        "whose mask is inverted: it attends exactly where it may not",
    ),
    ("causal", causal_by(1), "whose queries see one key too many: the next one"),
    ("causal", causal_by(-1), "whose queries do not see their own key, only those before"),
    (
        "causal_fewer_queries",
        causal_by(7),
        "whose causal mask is aligned to the other corner (top left, bottom right)",
    ),
    (
        "causal_more_queries",
        causal_by(-7),
        "whose causal mask is aligned to the other corner (top left, bottom right)",
    ),
]


@pytest.mark.matrix
@pytest.mark.parametrize("dtype", TWO)
@pytest.mark.parametrize(("name", "function", "words"), MISTAKEN)
def test_a_usual_wrong_mask_is_named(name, function, words, dtype):
    text = message_on(function, name, dtype=dtype)
    assert f"cause    the output is that of attention {words}" in text


@pytest.mark.parametrize("name", ["causal", "padding_left", "mask_per_head"])
def test_a_softmax_in_lower_precision_is_no_mistake_in_scale_or_mask(name):
    def function(query, key, value, attn_mask=None, is_causal=False):
        seen = permitted(query, key, attn_mask, is_causal)
        return finish(query @ key.mT / 4, seen, value, dtype=torch.bfloat16)

    text = message_on(function, name)
    assert "within the rounding of a narrower dtype, although the inputs are float32" in text
    assert "that of attention" not in text.split("cause")[1]


def test_beside_a_reference_of_the_callers_no_mistake_is_named():
    text = message_on(scaled(1.0), "gaussian", reference=sdpa)
    assert "that of attention without" not in text


# --- an outlier excuses nothing


def error_elsewhere(query, key, value, attn_mask=None, is_causal=False):
    """Wrong by 5% of the value of one key, in rows and heads without an outlier."""
    wrong = 0.05 * value[..., 1:2, :] * (torch.arange(query.shape[-2]) == 2)[:, None]
    heads = (torch.arange(query.shape[-3]) == 1)[:, None, None]
    return sdpa(query, key, value) + wrong * heads


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("name", ["values_with_outlier", "huge_head"])
def test_an_error_beside_an_outlier_is_seen(name, dtype):
    case = hard_case(name, dtype=dtype)
    exact = sdpa(case.query.double(), case.key.double(), case.value.double())
    wrong = error_elsewhere(case.query, case.key, case.value).double()
    plain = (case.query @ case.key.mT / 4).softmax(-1) @ case.value
    by_maximum = (wrong - exact).abs().max() <= 2 * (plain.double() - exact).abs().max()
    if dtype == "bfloat16":
        assert by_maximum  # what a comparison of the largest errors would let pass
    text = message_on(error_elsewhere, name, dtype=dtype)
    assert re.match(r"assert_matches_reference: \d+ of 384 elements of the output", text)
    assert "output[0, 1, 2, " in text


@pytest.mark.parametrize("tensor", ["output", "query", "key", "value"])
def test_one_wrong_element_is_enough(tensor):
    class Once(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x, at):
            ctx.at = at
            return x.clone()

        @staticmethod
        def backward(ctx, above):
            return above.index_put(ctx.at, torch.tensor(0.1), accumulate=True), None

    at = tuple(torch.tensor(i) for i in (1, 2, 50, 9))

    def function(query, key, value):
        given = {"query": query, "key": key, "value": value}
        if tensor != "output":
            given[tensor] = Once.apply(given[tensor], at)
        output = sdpa(*given.values())
        return (
            output.index_put(at, torch.tensor(0.1), accumulate=True)
            if tensor == "output"
            else output
        )

    text = message(function, *inputs(2, 3, query_len=60, key_len=70))
    assert "1 of " in text.splitlines()[0]
    assert f"{tensor}{'.grad' * (tensor != 'output')}[1, 2, 50, 9] is " in text


# --- factor


def test_factor_decides_how_much_rounding_is_allowed():
    assert_matches_reference(sdpa, *inputs(1, 2), factor=1)
    assert "(factor=0.01 on what" in message(sdpa, *inputs(1, 2), factor=0.01)

    def rough(query, key, value):
        return sdpa(query, key, value) * (1 + 2e-5)

    message(rough, *inputs(1, 2), gradients=False)
    assert_matches_reference(rough, *inputs(1, 2), gradients=False, factor=100)


def test_a_number_has_as_many_digits_as_it_takes_to_see_the_error():
    text = message(lambda q, k, v: sdpa(q, k, v) * (1 + 1e-9), *inputs(1, 2, dtype=torch.float64))
    found, exact = re.search(r"is (-?[\d.]+), the reference (-?[\d.]+) ", text).groups()
    assert found != exact
    assert float(found) / float(exact) - 1 == pytest.approx(1e-9, rel=0.2)


# --- rows without any permitted key

LOST = {
    "zero": sdpa,
    "uniform": lambda q, k, v, attn_mask: (
        (q @ k.mT / 4).masked_fill(~attn_mask, -1e9).softmax(-1) @ v
    ),
    "nan": lambda q, k, v, attn_mask: (
        (q @ k.mT / 4).masked_fill(~attn_mask, -math.inf).softmax(-1) @ v
    ),
}
CAUSE = {
    "zero": 'each is zero. If that is meant, fully_masked="zero"',
    "uniform": 'If the mean of all values is meant, fully_masked="uniform"',
    "nan": 'each is NaN, the softmax of -inf. If that is meant, fully_masked="nan"',
}


@pytest.mark.parametrize("declared", LOST)
@pytest.mark.parametrize("actual", LOST)
def test_fully_masked_rows_hold_what_is_declared(actual, declared):
    if actual == declared:
        on_case(LOST[actual], "fully_masked_rows", fully_masked=declared)
        return
    text = message_on(LOST[actual], "fully_masked_rows", fully_masked=declared)
    assert "96 of 384 elements of the output" in text
    assert "only rows without any permitted key are broken: " in text
    assert CAUSE[actual] in text


@pytest.mark.parametrize("actual", LOST)
def test_undefined_rows_are_not_judged_and_everything_else_is(actual):
    on_case(LOST[actual], "fully_masked_rows", fully_masked="undefined")
    wrong = functools.partial(lambda f, *args, **options: f(*args, **options) * 1.1, LOST[actual])
    text = message_on(wrong, "fully_masked_rows", fully_masked="undefined")
    assert "of 288 elements of the output" in text  # nine of twelve rows


def test_nearly_zero_is_not_zero():
    def nearly(query, key, value, attn_mask):
        return sdpa(query, key, value, attn_mask=attn_mask) + 1e-30 * ~attn_mask.any(-1, True)

    text = message_on(nearly, "fully_masked_rows", dtype="float64")
    assert "96 of 384 elements of the output" in text
    assert "is 1e-30, declared is 0 (off by 1.0e-30; allowed 0)" in text


def test_nan_is_accepted_at_the_declared_rows_only():
    def more(query, key, value, attn_mask):
        return LOST["nan"](query, key, value, attn_mask).index_fill(-2, torch.tensor([4]), math.nan)

    text = message_on(more, "fully_masked_rows", fully_masked="nan")
    assert "32 of 384 elements of the output" in text
    assert "output[0, 0, 4, 0] is nan" in text


def test_the_mean_of_all_values_must_be_their_mean():
    def nearly(query, key, value, attn_mask):
        lost = ~attn_mask.any(-1, keepdim=True)
        return LOST["uniform"](query, key, value, attn_mask) * (1 + 1e-4 * lost)

    text = message_on(nearly, "fully_masked_rows", fully_masked="uniform")
    assert "of 384 elements of the output" in text


def test_rows_masked_by_minus_infinity_in_a_float_mask_are_fully_masked():
    bias = torch.zeros(6, 8)
    bias[3] = -math.inf
    assert_matches_reference(sdpa, *inputs(1, 2), attn_mask=bias)
    text = message(sdpa, *inputs(1, 2), attn_mask=bias, fully_masked="nan")
    assert "output[0, 0, 3, 0] is 0, declared is nan" in text


# --- the caller's own reference


def capped(query, key, value, attn_mask=None, is_causal=False, limit=2.0):
    scores = limit * torch.tanh(query @ key.mT * query.shape[-1] ** -0.5 / limit)
    return finish(scores, permitted(query, key, attn_mask, is_causal), value)


@pytest.mark.parametrize("dtype", TWO)
def test_another_reference_can_be_given(dtype):
    for name in ("gaussian", "causal", "padding_left", "length_65", "fully_masked_rows"):
        on_case(capped, name, dtype=dtype, reference=capped)
        on_case(capped, name, dtype=dtype, reference=capped, limit=3.0)
    message_on(capped, "gaussian", dtype=dtype)
    message_on(sdpa, "gaussian", dtype=dtype, reference=capped)


def test_the_reference_is_called_in_float64_and_in_the_dtype_of_the_inputs():
    seen = []

    def reference(query, key, value, is_causal):
        seen.append((query.dtype, is_causal))
        return sdpa(query, key, value, is_causal=is_causal)

    assert_matches_reference(sdpa, *inputs(1, 2), is_causal=True, reference=reference)
    assert seen == [(torch.float64, True), (torch.float32, True)]


def by_similarity(query, key, value, *, detached=False):
    """Features of queries and keys in place of a softmax, all products written out."""
    query, key = F.elu(query) + 1, F.elu(key) + 1
    similar = query @ key.mT
    total = similar.sum(-1, keepdim=True)
    return (similar / (total.detach() if detached else total)) @ value


def by_one_state(query, key, value):
    """The same by the sum over the keys, as linear attention has it."""
    query, key = F.elu(query) + 1, F.elu(key) + 1
    return query @ (key.mT @ value) / (query * key.sum(-2, keepdim=True)).sum(-1, keepdim=True)


@pytest.mark.parametrize("size", [1.0, 1e-2])
@pytest.mark.parametrize("key_len", [1, 9])
def test_beside_another_reference_a_gradient_may_be_what_rounding_leaves_of_terms_that_cancel(
    key_len, size
):
    query, key, value = inputs(1, 2, query_len=5, key_len=key_len)
    tensors = query * size, key * size, value
    assert_matches_reference(by_one_state, *tensors, reference=by_similarity)
    wrong = functools.partial(by_similarity, detached=True)
    assert "gradient" in message(wrong, *tensors, reference=by_similarity)


def softmax_of_infinity(query, key, value, attn_mask):
    return LOST["nan"](query, key, value, attn_mask)


@pytest.mark.parametrize("declared", ["nan", "undefined"])
def test_a_function_whose_lost_rows_are_nan_is_like_itself(declared):
    options = {"reference": softmax_of_infinity, "fully_masked": declared}
    on_case(softmax_of_infinity, "fully_masked_rows", **options)
    text = message_on(
        lambda *args, **given: 1.1 * softmax_of_infinity(*args, **given),
        "fully_masked_rows",
        **options,
    )
    # Of 288 elements one is 1e-5, and so off by 1e-6: no more than its terms are rounded by.
    assert re.match(r"assert_matches_reference: 287 of \d+ elements of the output", text)


def test_a_reference_of_nan_is_refused_where_none_is_declared():
    def sick(query, key, value, attn_mask):
        output = softmax_of_infinity(query, key, value, attn_mask)
        return output.index_fill(-2, torch.tensor([4]), math.nan)

    for declared in ("nan", "undefined"):
        with pytest.raises(
            ValueError, match=r"reference: got nan in its output at \[0, 0, 4, 0\] in"
        ):
            on_case(sick, "fully_masked_rows", reference=sick, fully_masked=declared)
    with pytest.raises(ValueError, match='if NaN is meant, fully_masked="nan"'):
        on_case(sdpa, "fully_masked_rows", reference=softmax_of_infinity)


# --- everything is left as it was found


class Attention(torch.nn.Module):
    def __init__(self, dropout=0.0):
        super().__init__()
        self.factor = torch.nn.Parameter(torch.ones(()))
        self.dropout = torch.nn.Dropout(dropout)

    def forward(self, query, key, value):
        return self.dropout(sdpa(query * self.factor, key, value))


def test_no_gradient_is_left_behind():
    module = Attention().eval()
    tensors = [t.requires_grad_() for t in inputs(1, 2)]
    before = [t.detach().clone() for t in tensors]
    assert_matches_reference(module, *tensors)
    assert all(t.grad is None for t in (*tensors, module.factor))
    tensors[0].grad = torch.ones_like(tensors[0])
    assert_gradients_match(module, *tensors)
    assert bool((tensors[0].grad == 1).all())
    assert all(torch.equal(t, b) for t, b in zip(tensors, before, strict=True))


def test_random_states_are_left_as_they_were():
    def draws(query, key, value):
        torch.rand(3), np.random.rand(3), random.random()
        return sdpa(query, key, value)

    states = torch.get_rng_state(), np.random.get_state()[1].tolist(), random.getstate()
    assert_matches_reference(draws, *inputs(1, 2))
    assert torch.equal(states[0], torch.get_rng_state())
    assert states[1:] == (np.random.get_state()[1].tolist(), random.getstate())


def test_a_module_that_draws_at_random_is_refused():
    with pytest.raises(ValueError, match=r"Attention is in training mode \(dropout \(p=0\.5\)\)"):
        assert_matches_reference(Attention(0.5).train(), *inputs(1, 2))
    assert_matches_reference(Attention(0.5).eval(), *inputs(1, 2))
    module = Attention(0.0).train()
    assert_matches_reference(module, *inputs(1, 2))
    assert module.training


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_it_works_where_gradients_are_switched_off(context):
    with context():
        tensors = inputs(1, 2)
        mask = torch.ones(6, 8, dtype=torch.bool).tril()
        assert_matches_reference(sdpa, *tensors, attn_mask=mask)
        message(lambda q, k, v: sdpa(q.detach(), k, v), *tensors)


def layouts():
    query, key, value = inputs(2, 3, width=16)
    yield "contiguous", (query, key, value)
    yield (
        "heads last",
        tuple(t.transpose(1, 2).contiguous().transpose(1, 2) for t in (query, key, value)),
    )
    yield (
        "one projection",
        torch.randn(2, 3, 6, 48, generator=torch.Generator().manual_seed(1)).split(16, -1),
    )
    yield "width first", tuple(t.mT.contiguous().mT for t in (query, key, value))
    yield "stride 0", (query, key[:, :1].expand(2, 3, 8, 16), value[:, :, :1].expand(2, 3, 8, 16))


@pytest.mark.parametrize(("name", "tensors"), list(layouts()), ids=[name for name, _ in layouts()])
def test_the_subject_gets_the_callers_strides(name, tensors):
    seen = []

    def function(*given):
        seen.extend(t.stride() for t in given)
        assert all(t.requires_grad for t in given)
        return sdpa(*given)

    assert_matches_reference(function, *tensors)
    assert seen == [t.stride() for t in tensors] * 2


def test_a_subject_that_writes_into_its_inputs_changes_only_copies():
    def function(query, key, value):
        output = sdpa(query, key, value)
        value.zero_()
        return output

    tensors = inputs(1, 2)
    assert_matches_reference(function, *tensors, gradients=False)
    assert all(torch.equal(t, u) for t, u in zip(tensors, inputs(1, 2), strict=True))


@pytest.mark.parametrize(("name", "tensors"), list(layouts()), ids=[name for name, _ in layouts()])
def test_a_subject_may_write_into_its_inputs_and_still_have_gradients(name, tensors):
    def function(query, key, value):
        query *= query.shape[-1] ** -0.5
        return (query @ key.mT).softmax(-1) @ value

    before = [t.clone() for t in tensors]
    assert_matches_reference(function, *tensors)
    assert_matches_reference(function, *tensors, reference=function)
    assert all(torch.equal(t, b) for t, b in zip(tensors, before, strict=True))


def test_the_seed_draws_the_gradient_of_the_output():
    seen = []

    class Spy(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, above):
            seen.append(above)
            return above

    for seed in (0, 0, 1):
        assert_gradients_match(lambda q, k, v: Spy.apply(sdpa(q, k, v)), *inputs(1, 2), seed=seed)
    assert torch.equal(seen[0], seen[1])
    assert not torch.equal(seen[0], seen[2])
    assert 0.5 < float(seen[0].std()) < 2
    assert "repeat   seed=5" in message(lambda q, k, v: v[..., :6, :], *inputs(1, 2), seed=5)


# --- gradients alone


def test_assert_gradients_match_says_nothing_of_the_output():
    def shifted(query, key, value):
        return sdpa(query, key, value) + 1

    assert_gradients_match(shifted, *inputs(1, 2))
    assert "elements of the output" in message(shifted, *inputs(1, 2))


def test_a_wrong_backward_is_seen_though_the_output_is_right():
    class Wrong(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, above):
            return 2 * above

    text = message(lambda q, k, v: sdpa(q, Wrong.apply(k), v), *inputs(1, 2))
    assert "of the gradient of key are not those" in text
    assert "; the output is right" in text
    assert "cause    the gradient of key is 2 times the reference" in text


# --- what is refused


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"query": [1.0]}, TypeError, "query: got list"),
        (
            {"query": torch.zeros(1, 2, 6, 16, dtype=torch.int64)},
            TypeError,
            "accepted is one dtype",
        ),
        ({"key": torch.zeros(1, 2, 8, 16).half()}, TypeError, "accepted is one dtype"),
        ({"query": torch.zeros(1, 2, 0, 16)}, ValueError, "query: shape .* has no elements"),
        ({"value": torch.zeros(1, 2, 7, 16)}, ValueError, "the same length"),
        ({"query": torch.zeros(1, 2, 6, 8)}, ValueError, "key: got .* as wide as the query"),
        ({"query": torch.zeros(1, 4, 6, 16)}, ValueError, "leading dimensions"),
        ({"query": torch.zeros(1, 3, 6, 16), "enable_gqa": True}, ValueError, "multiple of"),
        ({"value": torch.full((1, 2, 8, 16), math.nan)}, ValueError, "value: got NaN or inf"),
        ({"attn_mask": torch.ones(6, 8).long()}, TypeError, "attn_mask: got int64"),
        ({"attn_mask": torch.ones(5, 8) > 0}, ValueError, r"attn_mask: got shape \(5, 8\); "),
        ({"attn_mask": torch.ones(3, 1, 2, 6, 8) > 0}, ValueError, "is a shape that broadcasts"),
        ({"attn_mask": torch.full((6, 8), math.nan)}, ValueError, "attn_mask: got NaN or inf"),
        ({"fully_masked": "one"}, ValueError, "fully_masked: got 'one'; accepted is one of 'zero'"),
        ({"factor": 0}, ValueError, "factor: got 0; accepted is a finite number above 0"),
        ({"factor": "2"}, TypeError, "factor: got str"),
        ({"factor": None}, TypeError, "factor: got NoneType; accepted is a number above 0$"),
        ({"factor": math.nan}, ValueError, "factor: got nan; accepted is a finite number above 0$"),
        ({"reference": 3}, TypeError, "reference: got int; accepted is a function, or None"),
        ({"is_causal": "yes"}, TypeError, "is_causal: got 'yes'; accepted is True or False"),
        ({"enable_gqa": 1}, TypeError, "enable_gqa: got 1; accepted is True or False"),
        ({"scale": math.inf}, ValueError, "scale: got inf"),
        ({"may_see": lambda b, h, q, k: True}, TypeError, "may_see: got one that returned bool; "),
        ({"seed": -1}, ValueError, "seed: got .*; accepted is a whole number from 0"),
        ({"function": 3}, TypeError, "accepted is a callable"),
        ({"function": lambda q, k, v: None}, TypeError, "got NoneType"),
        ({"function": lambda q, k, v: v}, ValueError, r"here \(1, 2, 6, 16\)"),
        ({"function": lambda q, k, v: q[..., :3]}, ValueError, "must return floats"),
    ],
)
@pytest.mark.parametrize("check", [assert_matches_reference, assert_gradients_match])
def test_what_makes_no_sense_is_refused(check, change, error, words):
    query, key, value = inputs(1, 2)
    given = {"function": sdpa, "query": query, "key": key, "value": value, **change}
    with pytest.raises(error, match=words):
        check(**given)


def test_dropout_leaves_no_reference_to_compare_an_output_with():
    with pytest.raises(ValueError, match=r"dropout_p: got 0\.1; accepted is 0: dropout draws at"):
        assert_matches_reference(sdpa, *inputs(1, 2), dropout_p=0.1)


class DropsOthers(torch.autograd.Function):
    """A softmax whose backward pass knows nothing of what was dropped."""

    @staticmethod
    def forward(ctx, scores, share):
        weights = scores.softmax(-1)
        ctx.save_for_backward(weights)
        return torch.nn.functional.dropout(weights, share)

    @staticmethod
    def backward(ctx, above):
        (weights,) = ctx.saved_tensors
        return weights * (above - (weights * above).sum(-1, keepdim=True)), None


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_gradients_under_dropout_are_those_of_what_was_left(dtype):
    def forgetful(query, key, value, dropout_p=0.0):
        return DropsOthers.apply(query @ key.mT * query.shape[-1] ** -0.5, dropout_p) @ value

    tensors = inputs(1, 2, dtype=dtype)
    assert_gradients_match(sdpa, *tensors, dropout_p=0.3)
    with pytest.raises(Failure, match="gradient of query is not that of the output it gives"):
        assert_gradients_match(forgetful, *tensors, dropout_p=0.3)


def test_differences_need_a_dtype_that_tells_them():
    with pytest.raises(TypeError, match="query: got bfloat16; accepted is float64 or float32"):
        assert_gradients_match(sdpa, *inputs(1, 2, dtype=torch.bfloat16), dropout_p=0.3)


def test_the_function_itself_is_left_out_of_the_traceback(pytester):
    pytester.makepyfile(
        """
        import torch
        from pytest_attnheat import assert_matches_reference

        def test_it():
            assert_matches_reference(lambda q, k, v: v, *torch.randn(3, 2, 4, 8).unbind())
        """
    )
    result = pytester.runpytest_inprocess("-p", "no:cacheprovider")
    result.stdout.fnmatch_lines(["E*assert_matches_reference: 64 of 64 elements of the output*"])
    result.stdout.no_fnmatch_line("*numerics.py*")


@on_accelerators(DTYPES)
def test_sdpa_on_an_accelerator_raises_no_alarm(dtype, accelerator):
    module = torch.get_device_module(accelerator)
    for name in HARD_CASES:
        case = hard_case(name, dtype=dtype, device=accelerator)
        state = module.get_rng_state()
        # cuDNN gives a query that may attend to nothing a mean of values, and says so nowhere.
        fused = accelerator.type == "cuda" and dtype in ("float16", "bfloat16")
        meant = "undefined" if fused else "zero"
        assert_matches_reference(
            sdpa, case.query, case.key, case.value, fully_masked=meant, **case.arguments
        )
        assert torch.equal(state, module.get_rng_state())
    with pytest.raises(AssertionError, match=f"on {accelerator}:0"):
        assert_matches_reference(
            lambda q, k, v: sdpa(q, k, v) * 1.1, case.query, case.key, case.value
        )
