"""Masks, masked softmax and attend against plain Python loops and PyTorch."""

import math

import pytest
import torch
from torch.nn import functional as F  # noqa: N812

from pytest_attnheat import attend, causal_mask, masked_softmax, padding_mask, sliding_window_mask
from pytest_attnheat.attention import chunks, scoring

NAN, INF = math.nan, math.inf
KINDS = ("soft", "hard", "max_pooling", "gating")


def draw(name, *shape, dtype=torch.float64):
    return scoring.draw(name, 7, *shape).to(dtype)


def rows(mask):
    return ["".join(".x"[cell] for cell in row) for row in mask.tolist()]


# --- masks


@pytest.mark.parametrize(
    ("query_len", "key_len", "alignment", "expected"),
    [
        (3, None, "top_left", ["x..", "xx.", "xxx"]),
        (3, 3, "bottom_right", ["x..", "xx.", "xxx"]),
        (2, 4, "top_left", ["x...", "xx.."]),
        (2, 4, "bottom_right", ["xxx.", "xxxx"]),
        (4, 2, "top_left", ["x.", "xx", "xx", "xx"]),
        (4, 2, "bottom_right", ["..", "..", "x.", "xx"]),
        (1, 1, "top_left", ["x"]),
        (1, 5, "bottom_right", ["xxxxx"]),
    ],
)
def test_causal_masks_by_alignment(query_len, key_len, alignment, expected):
    assert rows(causal_mask(query_len, key_len, alignment=alignment)) == expected


@pytest.mark.parametrize("sizes", [(5, 5), (3, 6), (6, 3)])
def test_top_left_is_what_pytorch_calls_causal(sizes):
    query, key = draw("q", 1, sizes[0], 4), draw("k", 1, sizes[1], 4)
    expected = F.scaled_dot_product_attention(query, key, key, is_causal=True)
    output, _ = attend(query, key, key, mask=causal_mask(*sizes, alignment="top_left"))
    torch.testing.assert_close(output, expected)


def test_bottom_right_is_the_end_of_the_square_mask():
    square = causal_mask(6, alignment="top_left")
    assert torch.equal(causal_mask(2, 6, alignment="bottom_right"), square[-2:])


def test_the_alignment_has_no_default():
    with pytest.raises(TypeError, match="alignment"):
        causal_mask(3)
    with pytest.raises(
        ValueError, match="got 'top'; accepted is one of 'top_left', 'bottom_right'"
    ):
        causal_mask(3, alignment="top")


@pytest.mark.parametrize("alignment", ["top_left", "bottom_right"])
@pytest.mark.parametrize("window", [(0, 0), (1, 0), (0, 2), (2, 1), (9, 9)])
@pytest.mark.parametrize("sizes", [(5, 5), (2, 6), (6, 2)])
def test_a_sliding_window_reaches_exactly_left_and_right(alignment, window, sizes):
    mask = sliding_window_mask(*sizes, window=window, alignment=alignment)
    shift = sizes[1] - sizes[0] if alignment == "bottom_right" else 0
    for i in range(sizes[0]):
        for j in range(sizes[1]):
            inside = i + shift - window[0] <= j <= i + shift + window[1]
            assert mask[i, j].item() is inside


@pytest.mark.parametrize(
    ("window", "error", "said"),
    [
        (3, TypeError, r"window: got 3; .*pair \(left, right\) of whole numbers"),
        ((1, 2, 3), TypeError, r"got \(1, 2, 3\).*pair"),
        ((1.0, 2), TypeError, r"got \(1\.0, 2\).*pair"),
        ((True, 2), TypeError, r"got \(True, 2\).*pair"),
        ((-1, 0), ValueError, r"got \(-1, 0\).*from 0"),
    ],
)
def test_a_window_is_a_pair_of_sizes(window, error, said):
    with pytest.raises(error, match=said):
        sliding_window_mask(4, window=window, alignment="top_left")


@pytest.mark.parametrize(
    ("lengths", "side", "expected"),
    [
        ([3, 0, 2], "right", ["xxx", "...", "xx."]),
        ([3, 0, 2], "left", ["xxx", "...", ".xx"]),
        (torch.tensor([1]), "right", ["x.."]),
        (torch.tensor([1], dtype=torch.uint8), "left", ["..x"]),
    ],
)
def test_padding_masks_by_side(lengths, side, expected):
    mask = padding_mask(lengths, 3, side=side)
    assert mask.shape == (len(lengths), 1, 1, 3)
    assert rows(mask[:, 0, 0]) == expected


@pytest.mark.parametrize(
    ("lengths", "error", "said"),
    [
        ([4], ValueError, r"lengths: got \[4\]; .*one whole number from 0 to 3"),
        ([2, -1], ValueError, r"got \[2, -1\]; .*one whole number from 0 to 3"),
        ([], ValueError, r"got shape \(0,\); .*for each batch entry"),
        ([[1]], ValueError, r"got shape \(1, 1\); .*for each batch entry"),
        ([1.5], TypeError, "got dtype float64; .*whole number"),
        ([True], TypeError, "got dtype bool; .*whole number"),
        ("a", TypeError, "lengths: got 'a'; .*whole number"),
        (None, TypeError, "lengths: got None; .*whole number"),
        (torch.ones(2, 3).long(), ValueError, r"lengths: got shape \(2, 3\).*mask\.sum\(-1\)"),
    ],
)
def test_lengths_are_checked(lengths, error, said):
    with pytest.raises(error, match=said):
        padding_mask(lengths, 3)


def test_an_unknown_padding_side_lists_the_known_ones():
    with pytest.raises(ValueError, match="side: got 'top'; accepted is one of 'right', 'left'"):
        padding_mask([1], 3, side="top")


@pytest.mark.parametrize("size", [0, -1])
def test_masks_of_no_size_are_refused(size):
    with pytest.raises(
        ValueError, match=f"query_len: got {size}; accepted is a whole number from 1"
    ):
        causal_mask(size, alignment="top_left")
    with pytest.raises(ValueError, match=f"key_len: got {size}; accepted is a whole number from 1"):
        sliding_window_mask(2, size, window=(1, 1), alignment="top_left")
    with pytest.raises(ValueError, match=f"key_len: got {size}; accepted is a whole number from 1"):
        padding_mask([1], size)


def test_masks_combine_by_and():
    mask = causal_mask(3, alignment="top_left") & padding_mask([3, 1], 3)
    assert mask.shape == (2, 1, 3, 3)
    assert rows(mask[1, 0]) == ["x..", "x..", "x.."]
    assert mask.dtype == torch.bool


def test_masks_are_made_where_they_are_wanted():
    assert causal_mask(2, alignment="top_left", device="meta").device.type == "meta"
    window = sliding_window_mask(2, window=(0, 0), alignment="top_left", device="meta")
    assert window.device.type == "meta"


# --- masked softmax


def softmax_by_hand(scores, permitted, fully_masked):
    kept = [s for s, p in zip(scores, permitted, strict=True) if p]
    if not kept:
        return [{"zero": 0.0, "uniform": 1 / len(scores), "nan": NAN}[fully_masked]] * len(scores)
    top = max(kept)
    total = sum(math.exp(s - top) for s in kept)
    return [math.exp(s - top) / total if p else 0.0 for s, p in zip(scores, permitted, strict=True)]


@pytest.mark.parametrize("fully_masked", ["zero", "uniform", "nan"])
def test_masked_softmax_is_the_softmax_over_the_permitted_keys(fully_masked):
    scores = 30 * draw("scores", 2, 4, 5)
    mask = draw("mask", 2, 4, 5) > 0
    mask[0, 1] = False
    weights = masked_softmax(scores, mask, fully_masked=fully_masked)
    for b in range(2):
        for i in range(4):
            expected = softmax_by_hand(scores[b, i].tolist(), mask[b, i].tolist(), fully_masked)
            assert weights[b, i].tolist() == pytest.approx(expected, abs=1e-14, nan_ok=True)
    assert (weights[~mask & mask.any(-1, keepdim=True)] == 0).all()


def test_without_a_mask_it_is_the_softmax():
    scores = draw("scores", 3, 4)
    assert torch.equal(masked_softmax(scores), scores.softmax(-1))


@pytest.mark.parametrize(
    "mask_shape", [(5,), (1,), (4, 5), (4, 1), (1, 5), (3, 1, 5), (2, 1, 1, 5), (2, 3, 4, 5), ()]
)
def test_a_mask_broadcasts_to_the_scores(mask_shape):
    scores = draw("scores", 2, 3, 4, 5)
    mask = draw("mask", *mask_shape) > -0.5
    expected = masked_softmax(scores, mask.expand(2, 3, 4, 5).clone())
    assert torch.equal(masked_softmax(scores, mask), expected)


@pytest.mark.parametrize("poison", [NAN, INF, -INF])
@pytest.mark.parametrize("fully_masked", ["zero", "uniform", "nan"])
def test_masked_scores_and_fully_masked_rows_leave_no_trace_in_the_gradient(poison, fully_masked):
    scores = torch.tensor([[poison, 1.0, 2.0], [poison, poison, poison]], requires_grad=True)
    mask = torch.tensor([[False, True, True], [False, False, False]])
    weights = masked_softmax(scores, mask, fully_masked=fully_masked)
    weights[0].square().sum().backward(retain_graph=True)
    clean = torch.tensor([1.0, 2.0], requires_grad=True)
    clean.softmax(-1).square().sum().backward()
    assert scores.grad.tolist() == [[0, *clean.grad.tolist()], [0, 0, 0]]
    scores.grad.zero_()
    weights[1].sum().backward()
    assert (scores.grad == 0).all()


def test_no_nan_is_made_on_the_way_that_anomaly_detection_would_report():
    scores = torch.zeros(2, 3, requires_grad=True)
    with torch.autograd.set_detect_anomaly(True):
        weights = masked_softmax(scores, torch.tensor([[True] * 3, [False] * 3]))
        (weights * torch.arange(3.0)).sum().backward()
    assert scores.grad.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_a_masked_key_takes_no_share_from_the_smallest_score_there_is(dtype):
    lowest = torch.finfo(dtype).min
    scores = torch.tensor([[lowest, 0.0, lowest]], dtype=dtype)
    assert masked_softmax(scores, torch.tensor([True, False, True])).tolist() == [[0.5, 0, 0.5]]


@pytest.mark.parametrize("kind", ["soft", "gating"])
def test_a_masked_nan_score_leaves_the_gradient_of_every_score_finite(kind):
    scores = torch.tensor([[0.5, NAN, 1.0], [NAN, 2.0, NAN]], requires_grad=True)
    mask = torch.tensor([[True, False, True], [False, True, False]])
    value = torch.tensor([[1.0], [2.0], [4.0]])
    output, _ = attend(
        torch.ones(2, 1), torch.ones(3, 1), value, score=lambda *_: scores, mask=mask, kind=kind
    )
    output.sum().backward()
    assert scores.grad.isfinite().all()
    assert (scores.grad[~mask] == 0).all()


@pytest.mark.parametrize("kind", ["soft", "gating"])
def test_gradients_are_finite_differences(kind):
    query, key, value = draw("q", 3, 4), draw("k", 5, 4), draw("v", 5, 2)
    inputs = [t.requires_grad_() for t in (query, key, value)]
    mask = causal_mask(3, 5, alignment="top_left").clone()
    mask[1] = False
    assert torch.autograd.gradcheck(lambda *t: attend(*t, mask=mask, kind=kind), inputs)


def test_a_permitted_nan_shows_in_its_row_and_only_there():
    scores = torch.tensor([[NAN, 1.0, 2.0], [0.0, 1.0, 2.0]])
    weights = masked_softmax(scores, torch.tensor([True, True, False]))
    assert weights[0, :2].isnan().all()
    assert weights[0, 2] == 0
    assert weights[1].isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_large_scores_do_not_overflow(dtype):
    top = torch.finfo(dtype).max
    weights = masked_softmax(torch.tensor([[top, -top, top]], dtype=dtype))
    assert weights.tolist() == [[0.5, 0.0, 0.5]]
    assert weights.dtype == dtype


@pytest.mark.parametrize(
    ("mask", "given"),
    [
        (torch.zeros(3, 4), "dtype float32"),
        (torch.ones(3, 4, dtype=torch.int64), "dtype int64"),
        (torch.ones(3, 4, dtype=torch.bool).numpy(), "ndarray"),
        ("causal", "str"),
    ],
)
def test_only_boolean_masks_are_taken(mask, given):
    with pytest.raises(TypeError, match=f"got {given}; .*True where a query may attend.*mask == 0"):
        masked_softmax(torch.zeros(3, 4), mask)


@pytest.mark.parametrize("shape", [(4, 3), (2, 3, 4), (3, 5)])
def test_a_mask_that_does_not_fit_is_named(shape):
    with pytest.raises(
        ValueError, match=r"mask: got shape \(.*that broadcasts to the scores \(3, 4\)"
    ):
        masked_softmax(torch.zeros(3, 4), torch.ones(shape, dtype=torch.bool))


def test_scores_without_keys_and_scores_of_integers_are_refused():
    with pytest.raises(ValueError, match=r"scores: got shape \(3, 0\); accepted is one key"):
        masked_softmax(torch.zeros(3, 0))
    with pytest.raises(TypeError, match=r"int64.*floating point"):
        masked_softmax(torch.zeros(3, 2, dtype=torch.int64))
    with pytest.raises(
        ValueError, match="fully_masked: got 0; accepted is one of 'zero', 'uniform', 'nan'"
    ):
        masked_softmax(torch.zeros(3, 2), fully_masked=0)


# --- attend


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize(
    ("leading", "query_len", "key_len", "value_dim"),
    [((), 3, 5, 4), ((2,), 1, 7, 1), ((2, 3), 5, 4, 9), ((2, 3), 1, 1, 2)],
)
def test_soft_attention_is_what_pytorch_computes(masked, leading, query_len, key_len, value_dim):
    query, key = draw("q", *leading, query_len, 6), draw("k", *leading, key_len, 6)
    value = draw("v", *leading, key_len, value_dim)
    mask = draw("mask", query_len, key_len) > 0 if masked else None
    expected = F.scaled_dot_product_attention(query, key, value, attn_mask=mask)
    output, weights = attend(query, key, value, mask=mask)
    torch.testing.assert_close(output, expected)
    torch.testing.assert_close(weights @ value, output)
    assert weights.shape == (*leading, query_len, key_len)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("score", scoring.scoring_names())
def test_every_dtype_is_kept_by_every_kind_and_score(dtype, kind, score):
    query, key, value = (draw(name, 2, 4, 6, dtype=dtype) for name in "qkv")
    mask = causal_mask(4, alignment="top_left")
    output, weights = attend(query, key, value, score=score, mask=mask, kind=kind)
    assert output.dtype == weights.dtype == dtype
    exact, _ = attend(
        query.double(), key.double(), value.double(), score=score, mask=mask, kind=kind
    )
    torch.testing.assert_close(output.double(), exact, atol=40 * torch.finfo(dtype).eps, rtol=0)


def test_scores_in_a_wider_dtype_come_back_in_that_of_the_value():
    query, key, value = (draw(name, 3, 4, dtype=torch.bfloat16) for name in "qkv")
    output, weights = attend(query, key, value, score=lambda q, k: q.float() @ k.float().mT)
    assert output.dtype == weights.dtype == torch.bfloat16


def test_hard_attention_takes_the_largest_permitted_score():
    scores = draw("scores", 2, 4, 5)
    mask = draw("mask", 2, 4, 5) > -0.5
    mask[..., 0] = True
    value = draw("v", 2, 5, 3)
    output, weights = attend(
        draw("q", 2, 4, 1), draw("k", 2, 5, 1), value, score=lambda *_: scores, mask=mask,
        kind="hard",
    )  # fmt: skip
    for b in range(2):
        for i in range(4):
            best = max(
                (j for j in range(5) if mask[b, i, j]), key=scores[b, i].tolist().__getitem__
            )
            assert weights[b, i].tolist() == [float(j == best) for j in range(5)]
            assert torch.equal(output[b, i], value[b, best])


def hard(scores, mask=None):
    scores = torch.tensor(scores)
    value = torch.ones(scores.shape[-1], 1)
    query, key = torch.ones(len(scores), 1), torch.ones(scores.shape[-1], 1)
    return attend(query, key, value, score=lambda *_: scores, mask=mask, kind="hard")[1].tolist()


def test_hard_attention_takes_the_first_of_equal_scores():
    assert hard([[1.0, 2.0, 2.0], [0.0, 0.0, 0.0]]) == [[0, 1, 0], [1, 0, 0]]


def test_hard_attention_never_lands_on_a_masked_key():
    mask = torch.tensor([False, True, True])
    assert hard([[INF, -INF, -INF], [NAN, 1.0, 2.0]], mask) == [[0, 1, 0], [0, 0, 1]]


def test_hard_attention_does_not_hide_a_permitted_nan():
    (row,) = hard([[0.0, NAN, 1.0]])
    assert all(math.isnan(weight) for weight in row)


def test_max_pooling_takes_the_largest_permitted_value_of_each_channel():
    value = draw("v", 2, 5, 3)
    mask = draw("mask", 2, 4, 5) > -0.5
    mask[..., 2] = True
    output, weights = attend(
        draw("q", 2, 4, 3), draw("k", 2, 5, 3), value, mask=mask, kind="max_pooling"
    )
    for b in range(2):
        for i in range(4):
            wins = [0.0] * 5
            for c in range(3):
                best = max((j for j in range(5) if mask[b, i, j]), key=lambda j: value[b, j, c])
                wins[best] += 1 / 3
                assert output[b, i, c] == value[b, best, c]
            assert weights[b, i].tolist() == pytest.approx(wins, abs=1e-6)


def test_max_pooling_gives_the_win_to_the_first_of_equal_values():
    value = torch.tensor([[1.0, 5.0], [2.0, 5.0], [2.0, 4.0]])
    _, weights = attend(torch.ones(1, 2), torch.ones(3, 2), value, kind="max_pooling")
    assert weights.tolist() == [[0.5, 0.5, 0]]


def test_max_pooling_in_chunks_equals_max_pooling_at_once(monkeypatch):
    query, key, value = draw("q", 2, 7, 3), draw("k", 2, 5, 3), draw("v", 2, 5, 3)
    mask = causal_mask(7, 5, alignment="bottom_right")
    at_once = attend(query, key, value, mask=mask, kind="max_pooling")
    monkeypatch.setattr(chunks, "CHUNK_BYTES", 1)
    in_chunks = attend(query, key, value, mask=mask, kind="max_pooling")
    assert torch.equal(torch.cat(at_once, -1), torch.cat(in_chunks, -1))


def test_max_pooling_differentiates():
    value = draw("v", 5, 3).requires_grad_()
    mask = causal_mask(4, 5, alignment="top_left").clone()
    mask[2] = False
    query, key = draw("q", 4, 3), draw("k", 5, 3)

    def output(value):
        return attend(query, key, value, mask=mask, kind="max_pooling")[0]

    assert torch.autograd.gradcheck(output, value)


def test_gating_is_a_sigmoid_per_permitted_key():
    query, key, value = draw("q", 4, 3), draw("k", 5, 3), draw("v", 5, 2)
    mask = causal_mask(4, 5, alignment="top_left")
    output, weights = attend(query, key, value, score="dot_product", mask=mask, kind="gating")
    for i in range(4):
        for j in range(5):
            score = sum(a * b for a, b in zip(query[i].tolist(), key[j].tolist(), strict=True))
            expected = 1 / (1 + math.exp(-score)) if j <= i else 0
            assert weights[i, j].item() == pytest.approx(expected, abs=1e-12)
    torch.testing.assert_close(output, weights @ value)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("fully_masked", ["zero", "uniform", "nan"])
def test_a_fully_masked_row_is_what_was_declared(kind, fully_masked):
    query, key, value = draw("q", 2, 3), draw("k", 4, 3), draw("v", 4, 2)
    mask = torch.tensor([[True, False, True, False], [False] * 4])
    output, weights = attend(query, key, value, mask=mask, kind=kind, fully_masked=fully_masked)
    assert output[0].isfinite().all()
    assert (weights[0, [1, 3]] == 0).all()
    expected = {"zero": 0.0, "uniform": 0.25, "nan": NAN}[fully_masked]
    assert weights[1].tolist() == pytest.approx([expected] * 4, nan_ok=True)
    mean = value.mean(0).tolist() if fully_masked == "uniform" else [expected] * 2
    assert output[1].tolist() == pytest.approx(mean, nan_ok=True)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("poison", [NAN, INF, -INF])
def test_nothing_of_a_masked_key_reaches_output_or_gradients(kind, poison):
    mask = torch.tensor([[True, True, False, True], [True, False, False, True]])

    def run(filler):
        query, key, value = draw("q", 2, 3), draw("k", 4, 3), draw("v", 4, 2)
        key[2] = value[2] = filler
        for tensor in (query, key, value):
            tensor.requires_grad_()
        output, weights = attend(query, key, value, mask=mask, kind=kind)
        output.square().sum().backward()
        return output.detach(), weights.detach(), value.grad

    for expected, given in zip(run(0.0), run(poison), strict=True):
        torch.testing.assert_close(given, expected)


@pytest.mark.parametrize("kind", ["soft", "gating"])
def test_a_poisoned_value_is_felt_by_those_who_may_attend_to_it(kind):
    value = torch.tensor([[1.0, 1.0], [INF, 1.0], [1.0, NAN]])
    mask = torch.tensor([[True, True, False], [True, False, False], [True, False, True]])
    output, _ = attend(torch.zeros(3, 2), torch.zeros(3, 2), value, mask=mask, kind=kind)
    assert output[0, 0] == INF
    assert output[2, 1].isnan()
    others = [output[0, 1], output[1, 0], output[1, 1], output[2, 0]]
    assert all(number.isfinite() for number in others)


@pytest.mark.parametrize("kind", ["soft", "gating"])
def test_a_poisoned_value_spoils_no_gradient_of_those_who_do_not_feel_it(kind):
    query = torch.ones(2, 2, requires_grad=True)
    value = torch.tensor([[1.0, 2.0], [3.0, 5.0], [NAN, INF]])
    mask = torch.tensor([[True, True, True], [True, True, False]])
    key = torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 1.0]])
    output, _ = attend(query, key, value, mask=mask, kind=kind)
    output.sum().backward()
    assert output[0].tolist() == pytest.approx([NAN, INF], nan_ok=True)
    assert query.grad[1].isfinite().all()
    assert query.grad[1].any()


@pytest.mark.parametrize("kind", KINDS)
def test_inputs_are_left_as_they_were(kind):
    tensors = [draw(name, 2, 3, 4) for name in "qkv"]
    mask = causal_mask(3, alignment="top_left")
    copies = [tensor.clone() for tensor in (*tensors, mask)]
    attend(*tensors, mask=mask, kind=kind)
    assert all(torch.equal(a, b) for a, b in zip((*tensors, mask), copies, strict=True))


@pytest.mark.parametrize("kind", KINDS)
def test_no_queries_give_no_rows(kind):
    output, weights = attend(torch.ones(0, 3), torch.ones(4, 3), torch.ones(4, 2), kind=kind)
    assert output.shape == (0, 2)
    assert weights.shape == (0, 4)


ONES = torch.ones(4, 3)


@pytest.mark.parametrize(
    ("inputs", "options", "error", "said"),
    [
        ((ONES, ONES, torch.ones(5, 3)), {}, ValueError, r"\(4, 3\) and \(5, 3\); .*one length"),
        ((ONES, torch.ones(4, 2), ONES), {}, ValueError, r"\(4, 3\) and \(4, 2\); .*one width"),
        ((ONES, ONES, ONES.double()), {}, TypeError, r"float32 and float64; .*one dtype"),
        ((ONES, ONES, [1.0]), {}, TypeError, r"value: got list; accepted is a torch\.Tensor"),
        ((ONES, ONES, ONES.long()), {}, TypeError, r"value: got dtype int64; .*floating"),
        ((ONES, ONES, torch.ones(4, 0)), {}, ValueError, r"got shape \(4, 0\); .*one channel"),
        ((ONES, ONES[:0], ONES[:0]), {}, ValueError, "accepted is one key"),
        ((ONES,) * 3, {"score": "cosine"}, ValueError, "got 'cosine'; accepted"),
        ((ONES,) * 3, {"kind": "max"}, ValueError, "got 'max'; .*'hard', 'max_pool"),
        ((ONES,) * 3, {"fully_masked": "mean"}, ValueError, "got 'mean'; .*'zero'"),
        ((ONES,) * 3, {"score": lambda q, k: q}, ValueError, r"got shape \(4, 3\); .*\(4, 4\)"),
        ((ONES,) * 3, {"score": lambda q, k: 1}, ValueError, r"got int; .*scores \(4, 4\)"),
        ((ONES,) * 3, {"mask": torch.ones(4, 4)}, TypeError, "boolean"),
    ],
)  # fmt: skip
def test_misuse_says_what_was_given(inputs, options, error, said):
    with pytest.raises(error, match=said):
        attend(*inputs, **options)


@pytest.mark.parametrize("kind", KINDS)
def test_attention_on_an_accelerator_is_that_on_the_cpu(kind, accelerator):
    tensors = [draw(name, 2, 3, 4) for name in "qkv"]
    mask = causal_mask(3, alignment="top_left") & padding_mask([3, 0], 3)[:, 0]
    expected = attend(*tensors, mask=mask, kind=kind)
    given = attend(*(t.to(accelerator) for t in tensors), mask=mask.to(accelerator), kind=kind)
    for a, b in zip(given, expected, strict=True):
        torch.testing.assert_close(a.cpu(), b)
