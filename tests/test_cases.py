"""make_attention: the same numbers everywhere, and every mask and feature it can be asked for."""

import dataclasses
import itertools
import math

import pytest
import torch
from devices import on_accelerators
from torch.nn import functional as F  # noqa: N812

from pytest_attnheat import (
    AttentionCase,
    assert_row_stochastic,
    causal_mask,
    make_attention,
    padding_mask,
)
from pytest_attnheat.attention.computation import reference
from pytest_attnheat.attention.scoring import DotProductScore, scoring_names

FIELDS = ("query", "key", "value", "scores", "weights", "output")


def test_the_shapes_are_those_asked_for():
    case = make_attention(
        batch=2, heads=3, query_len=4, key_len=5, head_dim=6, value_dim=7, mask="padding"
    )
    shapes = [tuple(getattr(case, name).shape) for name in FIELDS]
    assert shapes == [(2, 3, 4, 6), (2, 3, 5, 6), (2, 3, 5, 7), *[(2, 3, 4, 5)] * 2, (2, 3, 4, 7)]


def test_by_default_no_two_dimensions_that_could_be_confused_are_equal():
    case = make_attention()
    assert len(set(case.query.shape) | {case.key.shape[-2]}) == 5
    assert case.mask is None
    assert (case.scoring, case.dtype, case.device.type) == (
        "scaled_dot_product",
        torch.float32,
        "cpu",
    )


def test_output_and_weights_are_what_pytorch_computes():
    case = make_attention(dtype="float64", mask="causal_bottom_right")
    expected = F.scaled_dot_product_attention(case.query, case.key, case.value, attn_mask=case.mask)
    torch.testing.assert_close(case.output, expected)
    torch.testing.assert_close(case.weights @ case.value, expected)


@pytest.mark.parametrize("scoring", scoring_names())
def test_no_tensor_requires_a_gradient_and_the_scores_are_those_of_the_function(scoring):
    case = make_attention(scoring=scoring, dtype="float64")
    assert not any(getattr(case, name).requires_grad for name in FIELDS)
    torch.testing.assert_close(case.scoring_function(case.query, case.key), case.scores)
    assert case.scoring == scoring


def test_a_seed_gives_the_same_case_and_another_seed_another():
    before = torch.random.get_rng_state()
    first, again, other = (make_attention(scoring="additive", seed=seed) for seed in (3, 3, 4))
    assert torch.equal(torch.random.get_rng_state(), before)
    for name in FIELDS:
        assert torch.equal(getattr(first, name), getattr(again, name))
        assert not torch.equal(getattr(first, name), getattr(other, name))


def test_query_key_and_value_are_different_numbers():
    case = make_attention(query_len=8, key_len=8)
    assert not torch.equal(case.query, case.key)
    assert not torch.equal(case.key, case.value)


def test_more_queries_leave_keys_and_values_as_they_are():
    short, long = make_attention(query_len=2), make_attention(query_len=9)
    assert torch.equal(short.key, long.key)
    assert torch.equal(short.value, long.value)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "float64"])
def test_every_dtype_holds_the_same_numbers_rounded(dtype):
    exact = make_attention(dtype=torch.float64, scoring="bilinear")
    case = make_attention(dtype=dtype, scoring="bilinear")
    assert {str(getattr(case, name).dtype) for name in FIELDS} == {f"torch.{dtype}"}
    assert torch.equal(case.query, exact.query.to(case.dtype))


def cells(case):
    full = case.mask.expand(case.weights.shape)
    return ["".join(".x"[cell] for cell in row) for row in full[-1, -1].tolist()]


@pytest.mark.parametrize(
    ("mask", "expected"),
    [
        ("causal_top_left", ["x....", "xx...", "xxx.."]),
        ("causal_bottom_right", ["xxx..", "xxxx.", "xxxxx"]),
        ("padding", ["xxx.."] * 3),
        ("sliding_window", ["xxx..", "xxxx.", "xxxxx"]),
        (("causal_top_left", "padding"), ["x....", "xx...", "xxx.."]),
        (["causal_bottom_right", "sliding_window"], ["xxx..", "xxxx.", "xxxxx"]),
        (lambda q, k: torch.arange(k).expand(q, k) > 3, ["....x"] * 3),
        (torch.tensor([True, False, True, False, True]), ["x.x.x"] * 3),
        (("padding", torch.tensor([True, False, True, False, True])), ["x.x.."] * 3),
    ],
)
def test_masks_by_name_tensor_function_and_combination(mask, expected):
    case = make_attention(batch=2, query_len=3, key_len=5, mask=mask)
    assert cells(case) == expected
    assert (case.weights[~case.mask.expand(case.weights.shape)] == 0).all()


def test_padding_leaves_every_batch_entry_at_least_one_key():
    case = make_attention(batch=5, key_len=3, mask="padding")
    assert case.mask[:, 0, 0].sum(-1).tolist() == [2, 1, 1, 1, 1]
    assert make_attention(key_len=1, mask="padding").mask.all()


def test_an_empty_combination_is_no_mask():
    assert make_attention(mask=()).mask is None


def test_kind_and_fully_masked_reach_attend():
    nothing = torch.zeros(1, dtype=torch.bool)
    assert make_attention(mask=nothing, fully_masked="uniform").weights.unique().item() == 1 / 8
    assert make_attention(mask=nothing, fully_masked="nan", kind="hard").output.isnan().all()
    assert make_attention(kind="hard").weights.unique().tolist() == [0, 1]


def test_a_function_or_module_of_ones_own_is_used_as_it_is():
    def constant(query, key):
        return query.new_zeros(*query.shape[:-1], key.shape[-2])

    case = make_attention(scoring=constant)
    assert case.scoring == "constant"
    assert (case.weights == 1 / 8).all()
    module = DotProductScore()
    case = make_attention(scoring=module)
    assert case.scoring == "DotProductScore"
    assert case.scoring_function is module


def test_the_repr_names_shapes_not_numbers():
    text = repr(make_attention(scoring="additive", mask="padding", dtype="bfloat16", seed=3))
    assert text == (
        "<AttentionCase additive bfloat16 cpu seed 3: query (2, 4, 6, 16), key (2, 4, 8, 16), "
        "value (2, 4, 8, 16), mask (2, 1, 1, 8)>"
    )


def test_a_case_cannot_be_changed_but_can_be_compared_and_hashed():
    case = make_attention()
    with pytest.raises(dataclasses.FrozenInstanceError):
        case.seed = 3
    assert case == case
    assert case != make_attention()
    assert case in {case}
    assert isinstance(case, AttentionCase)


@pytest.mark.parametrize(
    "size", ["batch", "heads", "query_len", "key_len", "head_dim", "value_dim"]
)
def test_sizes_are_whole_numbers_from_one(size):
    for given in (0, -3):
        with pytest.raises(
            ValueError, match=f"{size}: got {given}; accepted is a whole number from 1"
        ):
            make_attention(**{size: given})
    for given in (2.0, "2", True):
        with pytest.raises(
            TypeError, match=f"{size}: got {given!r}; accepted is a whole number from 1"
        ):
            make_attention(**{size: given})


@pytest.mark.parametrize(
    ("options", "error", "said"),
    [
        (
            {"scoring": "cosine"},
            ValueError,
            "scoring: got 'cosine'; accepted is one of 'additive', ",
        ),
        (
            {"mask": "causal"},
            ValueError,
            "mask: got 'causal'; accepted is one of 'causal_top_left'",
        ),
        ({"mask": ("padding", "x")}, ValueError, "got 'x'; accepted is one of .*'sliding_window'"),
        ({"mask": torch.zeros(6, 8)}, TypeError, r"got dtype float32; .*boolean"),
        ({"mask": lambda q, k: [True]}, TypeError, r"got list; .*boolean"),
        (
            {"mask": torch.ones(6, 7, dtype=torch.bool)},
            ValueError,
            r"got shape \(6, 7\); accepted is one that broadcasts",
        ),
        (
            {"mask": torch.ones(3, dtype=torch.bool).numpy()},
            ValueError,
            "mask: got .*; accepted is one of",
        ),
        (
            {"dtype": "float8"},
            ValueError,
            "got 'float8'; accepted is one of 'float16', 'bfloat16', 'float32', 'float64'",
        ),
        ({"dtype": torch.int64}, ValueError, "dtype: got 'int64'; accepted is one of"),
        ({"dtype": float}, ValueError, "dtype: got <class 'float'>; accepted is one of"),
        ({"kind": "max"}, ValueError, "kind: got 'max'; accepted is one of 'soft', 'hard'"),
        ({"fully_masked": None}, ValueError, "fully_masked: got None; accepted is one of 'zero'"),
        ({"seed": -1}, ValueError, "seed: got .*; accepted is a whole number from 0"),
        ({"seed": 1.5}, TypeError, "seed: got 1.5; accepted is a whole number from 0"),
        ({"scoring": lambda q, k: q}, ValueError, r"accepted is scores \(2, 4, 6, 8\)"),
    ],
)
def test_misuse_says_what_was_given_and_what_is_known(options, error, said):
    with pytest.raises(error, match=said):
        make_attention(**options)


def test_masks_can_be_written_by_hand_instead():
    by_name = make_attention(mask=("causal_top_left", "padding"))
    mask = causal_mask(6, 8, alignment="top_left") & padding_mask([7, 6], 8)
    assert torch.equal(by_name.weights, make_attention(mask=mask).weights)


def by_loops(case, products, declared):
    """Weights, and those of the sinks, one query at a time; all that is declared is at hand."""
    batch, heads, query_len, key_len = products.shape
    weights, of_sinks = torch.zeros_like(products), torch.zeros(batch, heads, query_len, 1)
    for b, h, i in itertools.product(range(batch), range(heads), range(query_len)):
        lengths = declared.get("lengths", [key_len] * batch)
        stands = i + lengths[b] - query_len if case.alignment == "bottom_right" else i
        exps = {}
        for j in range(key_len):
            s = float(products[b, h, i, j]) * declared.get("scale", 1.0)
            if cap := declared.get("softcap"):
                s = cap * math.tanh(s / cap)
            s += float(declared["bias"][h, i, j]) if "bias" in declared else 0.0
            s -= float(declared["alibi"][h]) * abs(stands - j) if "alibi" in declared else 0.0
            s = s + 0.5 * (h + i - j) if "score_mod" in declared else s
            left, right = declared.get("window", (None, None))
            first = j < declared.get("sink_keys", 0)
            size = declared.get("chunk", 1000)
            seen = (
                j < lengths[b],
                "causal" not in declared or j <= stands or j < declared.get("prefix", 0),
                first or left is None or stands - j <= left,
                first or right is None or j - stands <= right,
                first or stands // size == j // size,
                "may_see" not in declared or (b + i + j) % 3 != 0,
                "documents" not in declared or declared["documents"][0][i] == DOCUMENTS[j],
            )
            if all(seen):
                exps[j] = math.exp(s)
        sink = math.exp(declared["sinks"][h]) if "sinks" in declared else 0.0
        total = sum(exps.values()) + sink
        for j, e in exps.items():
            weights[b, h, i, j] = e / total
        of_sinks[b, h, i] = sink / total if total else 0.0
    return weights, of_sinks


DOCUMENTS = [0, 0, 0, 1, 1, 2, 2, 2]
DECLARED: dict[str, dict[str, object]] = {
    "scale": {"scale": -0.7},
    "softcap": {"softcap": 1.5},
    "bias": {"bias": torch.linspace(-2, 2, 4 * 6 * 8).view(4, 6, 8)},
    "alibi": {"alibi": (0.5, 0.25, 1.0, 0.0), "alignment": "bottom_right"},
    "score_mod": {"score_mod": lambda score, batch, head, q, k: score + 0.5 * (head + q - k)},
    "sinks": {"sinks": [0.0, 3.0, -1.0, 1.0]},
    "causal": {"causal": True, "alignment": "bottom_right", "prefix": 1},
    "prefix": {"causal": True, "prefix": 3},
    "window": {"window": (2, 1), "sink_keys": 1},
    "window on one side": {"window": (None, 0), "alignment": "bottom_right"},
    "chunk": {"chunk": 3, "sink_keys": 2, "alignment": "bottom_right"},
    "documents": {"documents": ([0, 0, 1, 2, 2, 5], DOCUMENTS)},
    "lengths": {"lengths": [7, 3], "causal": True, "alignment": "bottom_right"},
    "may_see": {"may_see": lambda batch, head, q, k: (batch + q + k) % 3 != 0},
}
TOGETHER = {
    "of scores": ("scale", "softcap", "bias", "alibi", "score_mod", "sinks"),
    "of positions": ("lengths", "window", "may_see", "documents", "sinks"),
}
for _name, _several in TOGETHER.items():
    DECLARED[_name] = {key: value for one in _several for key, value in DECLARED[one].items()}


@pytest.mark.parametrize("scoring", scoring_names())
@pytest.mark.parametrize("declared", DECLARED.values(), ids=DECLARED)
def test_what_is_declared_acts_on_the_scores_of_every_scoring_function(declared, scoring):
    case = make_attention(scoring=scoring, dtype="float64", **declared)
    products = make_attention(scoring=scoring, dtype="float64").scores
    if scoring == "scaled_dot_product" and "scale" in declared:
        products = products * 4  # a scale takes the place of 1 / sqrt(head_dim)
    weights, of_sinks = by_loops(case, products, declared)
    torch.testing.assert_close(case.weights, weights)
    torch.testing.assert_close(case.output, weights @ case.value)
    if "sinks" in declared:
        torch.testing.assert_close(case.sink_weights.float(), of_sinks)
        assert_row_stochastic(torch.cat([case.weights, case.sink_weights], -1))
    else:
        assert case.sink_weights is None


@pytest.mark.parametrize("scoring", ["scaled_dot_product", "dot_product"])
@pytest.mark.parametrize("declared", DECLARED.values(), ids=DECLARED)
def test_a_case_of_dot_products_is_the_description_of_its_own_call(declared, scoring):
    case = make_attention(scoring=scoring, dtype="float64", **declared)
    found = reference(case, wanted=("weights",)).exact
    torch.testing.assert_close(found["output"], case.output)
    torch.testing.assert_close(found["weights"], case.weights)


def test_a_mask_a_bias_that_forbids_and_rules_of_positions_all_have_to_permit():
    bias = torch.zeros(8).masked_fill(torch.arange(8) == 1, -math.inf)
    case = make_attention(mask="padding", causal=True, bias=bias)
    allowed = causal_mask(6, 8, alignment="top_left") & padding_mask([7, 6], 8) & (bias == 0)
    assert torch.equal(case.weights, make_attention(mask=allowed).weights)


def test_a_mask_or_bias_of_keys_alone_is_described_as_well():
    mask, bias = torch.tensor([True, False] * 4), torch.linspace(-1, 1, 8)
    case = make_attention(mask=mask, bias=bias, dtype="float64")
    torch.testing.assert_close(reference(case).exact["output"], case.output)


def test_true_stands_for_what_is_usual_or_drawn():
    case = make_attention(alibi=True, sinks=True, bias=True, lengths=True, heads=8)
    assert case.alibi.tolist() == [2.0**-h for h in range(1, 9)]
    assert case.sinks.shape == (8,)
    assert case.sinks.unique().numel() == 8
    assert case.bias.shape == (1, 8, 6, 8)
    assert case.lengths.tolist() == [7, 6]
    again, other = (make_attention(sinks=True, heads=8, seed=seed).sinks for seed in (0, 1))
    assert torch.equal(case.sinks, again)
    assert not torch.equal(case.sinks, other)


def test_a_number_of_documents_is_that_many_with_borders_of_its_own_in_each_batch_entry():
    case = make_attention(documents=3, query_len=8, key_len=8)
    assert case.documents[1].tolist() == [[0, 0, 0, 1, 1, 1, 2, 2], [0, 0, 0, 1, 1, 2, 2, 2]]
    assert torch.equal(*case.documents)
    late = make_attention(
        documents=3, query_len=3, key_len=8, causal=True, alignment="bottom_right"
    )
    assert torch.equal(late.documents[0], late.documents[1][:, -3:])


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "float64"])
def test_features_keep_the_dtype_of_the_case(dtype):
    case = make_attention(dtype=dtype, **DECLARED["of scores"])
    tensors = (case.weights, case.output, case.scores, case.sink_weights, case.bias, case.sinks)
    assert {str(tensor.dtype) for tensor in tensors} == {f"torch.{dtype}"}
    exact = make_attention(dtype="float64", **DECLARED["of scores"])
    torch.testing.assert_close(case.weights.double(), exact.weights, atol=0.05, rtol=0.05)


@pytest.mark.parametrize("name", ["bias", "alibi", "sinks", "lengths", "documents", "causal"])
@pytest.mark.parametrize("nothing", [None, False])
def test_none_and_false_declare_nothing(name, nothing):
    assert torch.equal(make_attention(**{name: nothing}).weights, make_attention().weights)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"softcap": 0}, "softcap: got 0; accepted is a number above 0"),
        ({"softcap": True}, "softcap: got bool; accepted is a number"),
        ({"scale": math.inf}, "scale: got inf; accepted is a finite number"),
        ({"sinks": "all"}, "sinks: got 'all'; accepted is a tensor or list of numbers"),
        ({"alibi": ["a"]}, "alibi: got .*; accepted is a tensor or list of numbers"),
        ({"alibi": [1.0, 2.0]}, r"alibi: got shape \(2,\); accepted is one that fits \(4,\)"),
        ({"bias": torch.zeros(6, 7)}, r"bias: got shape \(6, 7\); accepted is one that fits"),
        ({"documents": 0}, "documents: got .*; accepted is a whole number from 1"),
        ({"documents": True}, "documents: got True; accepted is a tensor or list"),
        ({"documents": [0, 1, 1]}, r"documents: got shape \(3,\); accepted is one that fits"),
        ({"lengths": [9, 8]}, "lengths: got .*; accepted is one whole number from 0 to 8"),
        ({"lengths": [2.5, 8.0]}, "lengths: got dtype float32; accepted is one whole number"),
        ({"window": 3}, "window: got 3; accepted is a pair"),
        ({"window": (2, -1)}, "window: got -1; accepted is a whole number from 0"),
        ({"chunk": 0}, "chunk: got 0; accepted is a whole number from 1"),
        ({"prefix": -1}, "prefix: got -1; accepted is a whole number from 0"),
        ({"may_see": 3}, "may_see: got 3; accepted is a function of positions"),
        ({"causal": "top_left"}, "causal: got 'top_left'; accepted is True or False"),
        ({"causal": True, "alignment": "left"}, "alignment: got 'left'; accepted is one of"),
        ({"alignment": "top_left"}, "alignment: got 'top_left'; accepted is it with causal or"),
        ({"prefix": 2}, "prefix: got 2; accepted is it with causal"),
        ({"sinks": True, "kind": "gating"}, "sinks: got kind 'gating'; accepted is kind 'soft'"),
        ({"softcaps": 1.0}, "keyword of make_attention: got 'softcaps'; .*mean 'softcap'[?]$"),
        ({"may_see": lambda b, h, q, k: True}, "may_see: got one that returned bool; accepted is"),
    ],
)
def test_a_feature_that_makes_no_sense_is_refused(options, said):
    with pytest.raises((TypeError, ValueError), match=f"^{said}"):
        make_attention(**options)


@on_accelerators(["float16", "bfloat16", "float32", "float64"])
def test_an_accelerator_holds_the_same_numbers_as_the_cpu(dtype, accelerator):
    here = make_attention(scoring="additive", mask="padding", dtype=dtype)
    there = make_attention(scoring="additive", mask="padding", dtype=dtype, device=accelerator)
    for name in ("query", "key", "value", "mask"):
        assert torch.equal(getattr(here, name), getattr(there, name).cpu())
    assert there.device == there.weights.device


@pytest.mark.parametrize("device", ["gpu", "quantum:1", "meta", None])
def test_a_device_that_holds_no_case_is_refused_with_what_is_accepted(device):
    said = f"^device: got {device!r}; accepted is a torch.device that holds numbers, or its name: "
    with pytest.raises(ValueError, match=said):
        make_attention(device=device)


@pytest.mark.parametrize("scoring", [3, ["dot_product"]])
def test_a_scoring_function_that_cannot_be_called_is_refused(scoring):
    with pytest.raises(TypeError, match=r"^scoring: got .*; accepted is the name of a scoring"):
        make_attention(scoring=scoring)
