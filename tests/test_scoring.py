"""The scoring functions against plain Python loops, and the registry."""

import math
import random
import subprocess
import sys

import pytest
import torch
from torch import nn

from pytest_attnheat import (
    AdditiveScore,
    BilinearScore,
    DotProductScore,
    ScaledDotProductScore,
    attend,
    make_attention,
    register_scoring_function,
)
from pytest_attnheat.attention import chunks, scoring

NAMES = scoring.scoring_names()


def test_the_names_of_the_four_scoring_functions_are_public():
    assert {"additive", "dot_product", "scaled_dot_product", "bilinear"} <= set(NAMES)


@pytest.fixture
def registry(monkeypatch):
    """A registry whose changes last for one test."""
    monkeypatch.setattr(scoring, "_factories", dict(scoring._factories))


def tensors(query_shape, key_shape, dtype=torch.float64):
    return (
        scoring.draw("test query", 1, *query_shape).to(dtype),
        scoring.draw("test key", 1, *key_shape).to(dtype),
    )


def random_shapes(draws):
    """A few shapes, most of which broadcast."""
    sizes = [draws.choice([1, 2, 3, 0]) for _ in range(4)]
    return [
        tuple(1 if draws.random() < 0.3 else size for size in sizes[draws.randrange(5) :])
        if draws.random() < 0.8
        else tuple(draws.choices([1, 2, 3], k=draws.randrange(4)))
        for _ in range(draws.randrange(4))
    ]


def test_shapes_broadcast_as_those_of_pytorch():
    draws, outcomes = random.Random(0), set()
    for _ in range(2000):
        shapes = random_shapes(draws)
        try:
            expected = torch.broadcast_shapes(*shapes)
        except RuntimeError:
            expected = None
        outcomes.add(expected)
        if expected is None:
            with pytest.raises(RuntimeError):
                scoring.broadcast(*shapes)
        else:
            assert scoring.broadcast(*shapes) == expected, shapes
    assert None in outcomes
    assert len(outcomes) > 50


def test_a_case_is_made_without_what_torch_needs_for_symbols():
    script = "import sys, pytest_attnheat as a; a.make_attention(kind='max_pooling')"
    names = "{'sympy', 'torch._dynamo', 'torch._inductor'}"
    # What `import torch` loads by itself is none of our business.
    subprocess.run(
        [sys.executable, "-c", f"import torch; {script}; assert not {names} & set(sys.modules)"],
        check=True,
        timeout=120,
    )


def dot(x, q):
    return sum(a * b for a, b in zip(x, q, strict=True))


def times(matrix, vector):
    return [dot(row, vector) for row in matrix]


def by_hand(module, x, q):
    """The formula for one key x and one query q, in Python floats."""
    if isinstance(module, AdditiveScore):
        from_key = times(module.key_weight.tolist(), x)
        from_query = times(module.query_weight.tolist(), q)
        hidden = [math.tanh(a + b) for a, b in zip(from_key, from_query, strict=True)]
        return dot(module.vector.tolist(), hidden)
    if isinstance(module, BilinearScore):
        return dot(x, times(module.weight.tolist(), q))
    return dot(x, q) / (math.sqrt(len(q)) if isinstance(module, ScaledDotProductScore) else 1)


@pytest.mark.parametrize(
    "module",
    [
        AdditiveScore(3),
        AdditiveScore(3, hidden_dim=5),
        DotProductScore(),
        ScaledDotProductScore(),
        BilinearScore(3),
    ],
    ids=str,
)
def test_each_score_is_its_formula_for_every_query_and_key(module):
    query, key = tensors((2, 4, 3), (2, 5, 3))
    scores = module.double()(query, key)
    assert scores.shape == (2, 4, 5)
    for b in range(2):
        for i in range(4):
            for j in range(5):
                expected = by_hand(module, key[b, j].tolist(), query[b, i].tolist())
                assert scores[b, i, j].item() == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("make", [AdditiveScore, BilinearScore])
def test_queries_and_keys_may_differ_in_width(make):
    module = make(3, 5).double()
    query, key = tensors((4, 3), (6, 5))
    expected = by_hand(module, key[2].tolist(), query[1].tolist())
    assert module(query, key)[1, 2].item() == pytest.approx(expected, abs=1e-12)


def test_bilinear_is_not_symmetric():
    query, key = tensors((4, 3), (4, 3))
    module = BilinearScore(3).double()
    assert not torch.allclose(module(query, key), module(key, query).mT)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(
    ("query_shape", "key_shape", "expected"),
    [
        ((4, 3), (5, 3), (4, 5)),
        ((2, 1, 4, 3), (6, 5, 3), (2, 6, 4, 5)),
        ((1, 4, 3), (7, 2, 5, 3), (7, 2, 4, 5)),
        ((0, 3), (5, 3), (0, 5)),
        ((4, 3), (0, 3), (4, 0)),
        ((0, 4, 3), (0, 5, 3), (0, 4, 5)),
        ((1, 3), (1, 3), (1, 1)),
    ],
)
def test_leading_dimensions_broadcast_and_sizes_may_be_odd(name, query_shape, key_shape, expected):
    module = scoring.make_scoring(name, 3, dtype=torch.float64)
    query, key = tensors(query_shape, key_shape)
    assert module(query, key).shape == expected


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_every_float_dtype_comes_close_to_float64(name, dtype):
    query, key = tensors((2, 4, 8), (2, 5, 8))
    exact = scoring.make_scoring(name, 8, dtype=torch.float64)(query, key)
    scores = scoring.make_scoring(name, 8, dtype=dtype)(query.to(dtype), key.to(dtype))
    assert scores.dtype == dtype
    tolerance = 40 * torch.finfo(dtype).eps
    torch.testing.assert_close(scores.double(), exact, atol=tolerance, rtol=tolerance)


def test_scaled_dot_product_in_float16_does_not_overflow_before_it_is_scaled():
    query = torch.full((1, 64), 40.0, dtype=torch.float16)
    assert ScaledDotProductScore()(query, query).item() == 40 * 40 * 64 / 8


def test_strided_inputs_give_what_contiguous_ones_give():
    query, key = tensors((3, 4), (3, 5))
    for name in NAMES:
        module = scoring.make_scoring(name, 3, dtype=torch.float64)
        expected = module(query.mT.contiguous(), key.mT.contiguous())
        torch.testing.assert_close(module(query.mT, key.mT), expected)
        one = torch.ones((), dtype=torch.float64).expand(4, 3)
        assert module(one, one).unique().numel() == 1


@pytest.mark.parametrize("make", [AdditiveScore, BilinearScore])
def test_parameters_come_from_the_seed_and_leave_the_global_generator_alone(make):
    before = torch.random.get_rng_state()
    first, again, other = make(4, seed=3), make(4, seed=3), make(4, seed=4)
    assert torch.equal(torch.random.get_rng_state(), before)
    for (name, a), b, c in zip(
        first.named_parameters(), again.parameters(), other.parameters(), strict=True
    ):
        assert torch.equal(a, b), name
        assert not torch.equal(a, c), name


def test_parameters_have_variance_one_over_what_they_sum_over():
    module = AdditiveScore(300, 200, 400)
    for weight, fan_in in (
        (module.query_weight, 300), (module.key_weight, 200), (module.vector, 400)
    ):  # fmt: skip
        assert weight.var().item() * fan_in == pytest.approx(1, abs=0.25)


def test_parameters_do_not_repeat_the_inputs_of_the_same_seed():
    case = make_attention(scoring="bilinear", head_dim=16, seed=5)
    drawn = case.query.flatten()[:256] / 4
    weight = case.scoring_function.weight.flatten()  # type: ignore[attr-defined]
    assert abs(torch.corrcoef(torch.stack([drawn, weight]))[0, 1]) < 0.3


def test_seeds_that_agree_in_their_low_32_bits_still_differ():
    assert not torch.equal(scoring.draw("x", 1, 4), scoring.draw("x", 1 + 2**32, 4))


def test_parameters_follow_the_default_dtype():
    torch.set_default_dtype(torch.float64)
    try:
        wide = BilinearScore(4)
    finally:
        torch.set_default_dtype(torch.float32)
    assert wide.weight.dtype == torch.float64
    assert torch.equal(wide.weight.float(), BilinearScore(4).weight)


@pytest.mark.parametrize("chunk_bytes", [1, 600, 1000])
def test_additive_in_chunks_equals_additive_at_once_with_its_gradients(monkeypatch, chunk_bytes):
    def run():
        module = AdditiveScore(3, 4, 5).double()
        query, key = (t.requires_grad_() for t in tensors((2, 1, 7, 3), (3, 6, 4)))
        scores = module(query, key)
        (scores * torch.arange(scores.numel()).view_as(scores)).sum().backward()
        grads = [query.grad, key.grad, *(p.grad for p in module.parameters())]
        return [scores.detach(), *grads]

    at_once = run()
    monkeypatch.setattr(chunks, "CHUNK_BYTES", chunk_bytes)
    for expected, given in zip(at_once, run(), strict=True):
        torch.testing.assert_close(given, expected, atol=1e-12, rtol=1e-12)


@pytest.mark.parametrize("grad", [False, True])
def test_additive_never_holds_the_whole_hidden_layer(monkeypatch, grad):
    largest = []
    combine = AdditiveScore._combine

    def watched(self, from_query, from_key):
        largest.append(from_query.shape[-2] * from_key.shape[-2] * self.hidden_dim * 4)
        return combine(self, from_query, from_key)

    monkeypatch.setattr(AdditiveScore, "_combine", watched)
    monkeypatch.setattr(chunks, "CHUNK_BYTES", 2**20)
    module = AdditiveScore(32).requires_grad_(grad)
    query, key = tensors((1, 500, 32), (1, 300, 32), torch.float32)
    saved = []

    def pack(tensor):
        saved.append(tensor.numel() * tensor.element_size())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        module(query, key)
    assert len(largest) > 10
    assert max(largest) <= 2**20
    assert sum(saved) < 8 * 2**20  # the whole layer is 19 MB


@pytest.mark.parametrize(
    ("module", "query_shape", "key_shape", "said"),
    [
        (DotProductScore(), (4, 3), (5, 2), r"\(4, 3\) and \(5, 2\); .*one width"),
        (ScaledDotProductScore(), (4, 0), (5, 0), r"\(4, 0\).*1 or more"),
        (AdditiveScore(3), (4, 3), (5, 2), r"\(5, 2\); .*query_dim 3 and key_dim 3"),
        (
            BilinearScore(3, 2),
            (4, 2),
            (5, 3),
            r"\(4, 2\) and \(5, 3\); .*query_dim 3 and key_dim 2",
        ),
        (DotProductScore(), (3,), (5, 3), r"query: got shape \(3,\).*\(\.\.\., length, width\)"),
        (
            BilinearScore(3),
            (2, 4, 3),
            (5, 4, 3),
            r"query, key: got shapes \(2, 4, 3\) and \(5, 4, 3\); .*leading dimensions",
        ),
    ],
    ids=str,
)
def test_shapes_that_do_not_fit_are_named(module, query_shape, key_shape, said):
    with pytest.raises(ValueError, match=said):
        module(torch.ones(query_shape), torch.ones(key_shape))


@pytest.mark.parametrize("name", NAMES)
def test_integers_and_arrays_are_no_queries(name):
    module = scoring.make_scoring(name, 3)
    with pytest.raises(TypeError, match=r"query: got dtype int64; .*floating point"):
        module(torch.ones(4, 3, dtype=torch.int64), torch.ones(4, 3))
    with pytest.raises(TypeError, match=r"key: got ndarray; accepted is a torch\.Tensor"):
        module(torch.ones(4, 3), torch.ones(4, 3).numpy())


@pytest.mark.parametrize(
    ("options", "error", "said"),
    [
        ({"query_dim": 0}, ValueError, "query_dim: got 0; accepted is a whole number from 1"),
        (
            {"query_dim": 3, "key_dim": -2},
            ValueError,
            "key_dim: got -2; accepted is a whole number from 1",
        ),
        ({"query_dim": 3.0}, TypeError, "query_dim: got 3.0; accepted is a whole number from 1"),
        ({"query_dim": True}, TypeError, "query_dim: got .*; accepted is a whole number"),
        (
            {"query_dim": 3, "seed": -1},
            ValueError,
            "seed: got -1; accepted is a whole number from 0",
        ),
        (
            {"query_dim": 3, "seed": "1"},
            TypeError,
            "seed: got '1'; accepted is a whole number from 0",
        ),
    ],
)
@pytest.mark.parametrize("make", [AdditiveScore, BilinearScore])
def test_widths_and_seeds_are_checked(make, options, error, said):
    with pytest.raises(error, match=said):
        make(**options)


def halves(query, key):
    return query @ key.mT / 2


@pytest.mark.usefixtures("registry")
def test_a_registered_name_is_known_to_attend_and_make_attention():
    register_scoring_function("halves", lambda query_dim, key_dim, seed: halves)
    case = make_attention(scoring="halves")
    torch.testing.assert_close(case.scores, case.query @ case.key.mT / 2)
    assert case.scoring == "halves"
    _, weights = attend(case.query, case.key, case.value, score="halves")
    torch.testing.assert_close(weights, case.weights)


@pytest.mark.usefixtures("registry")
def test_register_is_a_decorator_too_and_hands_the_factory_its_sizes():
    seen = []

    @register_scoring_function("mine")
    def mine(query_dim, key_dim, seed):
        seen.append((query_dim, key_dim, seed))
        return halves

    assert mine(1, 2, 3) is halves
    scoring.make_scoring("mine", 4, 5, seed=6)
    scoring.make_scoring("mine", 4)
    assert seen == [(1, 2, 3), (4, 5, 6), (4, 4, 0)]
    assert scoring.scoring_names() == (*NAMES, "mine")


@pytest.mark.usefixtures("registry")
def test_a_taken_name_is_an_error_unless_replaced():
    with pytest.raises(ValueError, match=r"'additive', which is taken; .*bilinear.*replace=True"):
        register_scoring_function("additive", lambda *sizes: halves)
    register_scoring_function("additive", lambda *sizes: halves, replace=True)
    assert scoring.make_scoring("additive", 3) is halves
    assert scoring.scoring_names() == NAMES


@pytest.mark.usefixtures("registry")
@pytest.mark.parametrize("name", ["", "a-b", "1st", "a b", "ä", "a/b", "a\n"])
def test_a_name_that_would_spoil_a_test_id_is_refused(name):
    with pytest.raises(ValueError, match="letters, digits and underscores"):
        register_scoring_function(name, lambda *sizes: halves)


@pytest.mark.usefixtures("registry")
@pytest.mark.parametrize("factory", [halves, DotProductScore(), "halves", BilinearScore])
def test_a_scoring_function_in_place_of_its_factory_is_refused(factory):
    with pytest.raises(TypeError, match=r"factory\(query_dim, key_dim, seed\)"):
        register_scoring_function("wrong", factory)
    assert "wrong" not in scoring.scoring_names()


def test_a_decorator_without_a_name_says_what_is_missing():
    with pytest.raises(
        TypeError, match=r"name of a scoring function: got <function .* accepted is a str"
    ):

        @register_scoring_function
        def mine(query_dim, key_dim, seed):
            return halves


@pytest.mark.usefixtures("registry")
def test_a_factory_that_returns_no_function_is_named():
    register_scoring_function("wrong", lambda query_dim, key_dim, seed: None)
    with pytest.raises(TypeError, match="factory of scoring function 'wrong' returns: got None"):
        scoring.make_scoring("wrong", 3)


def test_an_unknown_name_lists_the_known_ones():
    with pytest.raises(
        ValueError, match=r"got 'dot'; accepted is one of 'additive', 'dot_product', .*'bilinear'"
    ):
        scoring.make_scoring("dot", 3)


def test_scores_differentiate():
    query, key = (t.requires_grad_() for t in tensors((2, 3), (4, 3)))
    for name in NAMES:
        module = scoring.make_scoring(name, 3, dtype=torch.float64)
        assert isinstance(module, nn.Module)
        assert torch.autograd.gradcheck(module, (query, key))


@pytest.mark.parametrize("name", NAMES)
def test_scores_on_an_accelerator_are_those_on_the_cpu(name, accelerator):
    query, key = tensors((2, 4, 8), (2, 5, 8))
    expected = scoring.make_scoring(name, 8, dtype=torch.float64)(query, key)
    module = scoring.make_scoring(name, 8, device=accelerator, dtype=torch.float64)
    torch.testing.assert_close(module(query.to(accelerator), key.to(accelerator)).cpu(), expected)
