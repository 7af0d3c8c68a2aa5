"""What is told its options before it is called, or writes into buffers, is examined as it is."""

import math
from dataclasses import replace

import public_callables as public
import pytest
import torch
from public_callables import planted
from torch import nn

from pytest_attnheat import AttentionSpec, check_attention, diagnose
from pytest_attnheat.callables import parameters_of
from pytest_attnheat.contract.checks import CHECKS
from pytest_attnheat.contract.ready import transformers_attention


def attend(
    query, key, value, *, scale=None, causal=False, corner="bottom_right", window=(None, None),
    softcap=None, slopes=None, sinks=None, allowed=None, bias=None, dropout=0.0,
):  # fmt: skip
    """Attention in plain sight: (B, L, H, D) over (B, S, K, D) to (B, L, H, Dv)."""
    own = public.DECIDED[-1]
    if own.corner != "bottom_right":
        corner = {"bottom_right": "top_left", "top_left": "bottom_right"}[corner]
    wide = torch.float64 if query.dtype == torch.float64 else torch.float32
    q, k, v = (tensor.transpose(1, 2).to(wide) for tensor in (query, key, value))
    group = q.shape[1] // k.shape[1]
    k, v = (t.repeat(1, group, 1, 1) if own.heads_tiled else t.repeat_interleave(group, 1)
            for t in (k, v))  # fmt: skip
    scale = q.shape[-1] ** -0.5 if scale is None or own.scale_ignored else scale
    scores = q @ k.mT * scale
    if softcap and not own.softcap_ignored:
        scores = softcap * torch.tanh(scores / softcap)
    shift = k.shape[2] - q.shape[2] if corner == "bottom_right" else 0
    behind = torch.arange(q.shape[2])[:, None] + shift - torch.arange(k.shape[2])
    if slopes is not None:
        scores = scores - own.slopes_sign * slopes.to(wide)[:, None, None] * behind.abs()
    scores = scores if bias is None else scores + bias
    seen = behind >= 0 if causal else torch.ones_like(behind, dtype=torch.bool)
    left, right = (None, None) if own.window_ignored else window
    seen = seen if left is None else seen & (behind <= left + own.window_more)
    seen = seen if right is None else seen & (behind >= -right)
    seen = seen if allowed is None else seen & (allowed if own.polarity else ~allowed)
    scores = scores.masked_fill(~seen, -math.inf)
    if sinks is not None:
        sunk = sinks.to(wide)[:, None, None].expand(*scores.shape[:-1], 1)
        scores = torch.cat([scores, sunk], -1)
    nothing = scores.isneginf().all(-1, keepdim=True)
    weights = scores.masked_fill(nothing, 0.0).softmax(-1).masked_fill(nothing, 0.0)
    weights = weights[..., : k.shape[2]]
    weights = torch.dropout(weights, dropout, True) if dropout else weights
    return (weights @ v).transpose(1, 2).to(query.dtype)


class BatchPrefillWithRaggedKVCacheWrapper:
    """As the one of FlashInfer: planned for the lengths and options of a batch, and then run."""

    def __init__(self, float_workspace_buffer, kv_layout="NHD", *, ignores=(), base=2.0):
        self.ignores, self.base = ignores, base

    def plan(
        self, qo_indptr, kv_indptr, num_qo_heads, num_kv_heads, head_dim_qk, head_dim_vo=None,
        custom_mask=None, packed_custom_mask=None, causal=False, pos_encoding_mode="NONE",
        use_fp16_qk_reduction=False, window_left=-1, logits_soft_cap=None, sm_scale=None,
        rope_scale=None, rope_theta=None, q_data_type="float16", kv_data_type=None,
        o_data_type=None, non_blocking=True,
    ):  # fmt: skip
        assert qo_indptr.dtype == kv_indptr.dtype == torch.int32
        self.starts = qo_indptr.tolist(), kv_indptr.tolist()
        self.planned = (num_qo_heads, num_kv_heads, head_dim_qk, q_data_type)
        self.custom_mask = custom_mask
        self.options = {"causal": causal and custom_mask is None, "softcap": logits_soft_cap,
                        "window": (window_left, None),
                        "scale": head_dim_qk**-0.5 if sm_scale is None else sm_scale}  # fmt: skip

    def run(
        self, q, k, v, *args, q_scale=None, k_scale=None, v_scale=None, o_scale=None, out=None,
        lse=None, return_lse=False, enable_pdl=None, kv_cache_sf=None,
    ):  # fmt: skip
        assert self.planned == (q.shape[1], k.shape[1], q.shape[-1], q.dtype)
        outputs, sums, read = [], [], 0
        for n in range(len(self.starts[0]) - 1):
            (first, last), (begin, end) = (starts[n : n + 2] for starts in self.starts)
            allowed = None
            if self.custom_mask is not None:
                size = (last - first) * (end - begin)
                allowed = self.custom_mask[read : read + size].view(last - first, end - begin)
                read += size
            output, found = public.one_sequence(
                q[first:last], k[begin:end], v[begin:end], allowed=allowed, **self.options
            )
            outputs.append(output)
            sums.append(found / math.log(self.base))
        output, found = torch.cat(outputs), torch.cat(sums).float()
        if out is not None and "out" not in self.ignores:
            out.copy_(output)
        if lse is not None and "lse" not in self.ignores:
            lse.copy_(found)
        return (output, found) if return_lse else output


def ragged(**wrong):
    return BatchPrefillWithRaggedKVCacheWrapper(torch.empty(8), **wrong)


class DotProductAttention(nn.Module):
    """As the one of TransformerEngine: options go to the constructor, masks are True where not."""

    def __init__(
        self, num_attention_heads, kv_channels, num_gqa_groups=None, attention_dropout=0.0,
        qkv_format="sbhd", attn_mask_type="causal", window_size=None, bottom_right_diagonal=None,
        sequence_parallel=False, tp_size=1, softmax_scale=None, softmax_type="vanilla",
    ):  # fmt: skip
        super().__init__()
        self.given = num_attention_heads, num_gqa_groups
        self.kind, self.format, self.dropout = attn_mask_type, qkv_format, attention_dropout
        self.window = window_size or (None, None)
        bottom = attn_mask_type != "causal" if bottom_right_diagonal is None else None
        bottom = bottom_right_diagonal if bottom is None else bottom
        self.corner = "bottom_right" if bottom else "top_left"
        width = kv_channels if isinstance(kv_channels, int) else kv_channels[0]
        self.scale = width**-0.5 if softmax_scale is None else softmax_scale

    def forward(
        self, query_layer, key_layer, value_layer, attention_mask=None, qkv_format=None,
        core_attention_bias_type="no_bias", core_attention_bias=None, alibi_slopes=None,
    ):  # fmt: skip
        turned = (1, 0, 2, 3) if self.format == "sbhd" else (0, 1, 2, 3)
        inputs = [tensor.permute(turned) for tensor in (query_layer, key_layer, value_layer)]
        assert self.given == (inputs[0].shape[2], inputs[1].shape[2])
        assert (attention_mask is not None) == (self.kind == "arbitrary")
        output = attend(
            *inputs, slopes=alibi_slopes, scale=self.scale, causal=self.kind.startswith("causal"),
            corner=self.corner, window=self.window, dropout=self.dropout,
            allowed=None if attention_mask is None else ~attention_mask, bias=core_attention_bias,
        )  # fmt: skip
        return output.permute(turned).flatten(2)


def dispatch_attention_fn(
    query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None,
    enable_gqa=False, attention_kwargs=None, *, backend=None, parallel_config=None,
):  # fmt: skip
    assert enable_gqa or query.shape[2] == key.shape[2]
    is_boolean = attn_mask is not None and attn_mask.dtype == torch.bool
    masks = {"allowed" if is_boolean else "bias": attn_mask}
    return attend(query, key, value, dropout=dropout_p, causal=is_causal, scale=scale,
                  corner="top_left", **masks)  # fmt: skip


def attend_into(q, k, v, out, sm_scale=None, is_causal=False):
    given = (tensor.transpose(1, 2) for tensor in (q, k, v))
    found = attend(*given, scale=sm_scale, causal=is_causal, corner="top_left")
    out.copy_(found.transpose(1, 2))


def flash_attention_forward(
    module, query, key, value, attention_mask, dropout=0.0, scaling=None, sliding_window=None,
    softcap=None, is_causal=None, s_aux=None, cache=None, **kwargs,
):  # fmt: skip
    given = (tensor.transpose(1, 2) for tensor in (query, key, value))
    window = (None, None) if sliding_window is None else (sliding_window - 1, None)
    output = attend(*given, scale=scaling, window=window, softcap=softcap, sinks=s_aux,
                    causal=module.is_causal if is_causal is None else is_causal,
                    dropout=dropout if module.training else 0.0, bias=attention_mask)  # fmt: skip
    return output, None


ROWS = {
    "flashinfer_ragged": ragged(),
    "transformer_engine": DotProductAttention,
    "diffusers": dispatch_attention_fn,
    "out_parameter": attend_into,
    "transformers": flash_attention_forward,
}
# What each row can express, besides what all do; it has to be asked and not skipped.
ASKED = {
    "flashinfer_ragged": {"masked", "causal_rectangular", "window", "softcap", "ragged", "grouped",
                          "scale_argument", "fully_masked", "returned_lse"},
    "transformer_engine": {"masked", "causal_rectangular", "window", "alibi", "bias", "grouped",
                           "dropout", "scale_argument", "gradients"},
    "diffusers": {"masked", "float_mask", "causal_rectangular", "scale_argument", "grouped",
                  "fully_masked"},
    "out_parameter": {"causal_rectangular", "scale_argument"},
    "transformers": {"masked", "causal", "window", "softcap", "sinks", "grouped",
                     "scale_argument", "gradients"},
}  # fmt: skip


def examined(row, **more):
    return AttentionSpec(ROWS[row], dtypes=("float32",), **more)


# Asked in few calls: what they share with another row is asked there.
ALIKE = ("diffusers", "out_parameter", "transformers")


@pytest.mark.parametrize("row", ROWS)
def test_it_passes_as_it_is_called_with_nothing_declared(row):
    asked = [
        one for one in CHECKS if row not in ALIKE or one.quick or one.name in ASKED[row]
    ]  # fmt: skip
    report = check_attention(examined(row), checks=asked)
    assert report.passed, str(report)
    assert report.spec.like == row
    passed = {one.name for one in report.results if one.status == "passed"}
    assert ASKED[row] <= passed


@pytest.mark.matrix(of=3)
@pytest.mark.parametrize(
    ("row", "decisions", "name"),
    [
        ("flashinfer_ragged", {"corner": "top_left"}, "positions_other_corner"),
        ("flashinfer_ragged", {"window_more": 1}, "window_left_too_wide"),
        ("flashinfer_ragged", {"polarity": False}, "mask_inverted"),
        ("flashinfer_ragged", {"scale_ignored": True}, "scale_argument_ignored"),
        ("flashinfer_ragged", {"softcap_ignored": True}, "softcap_ignored"),
        ("transformer_engine", {"window_more": -1}, "window_left_too_narrow"),
        ("transformer_engine", {"polarity": False}, "mask_inverted"),
        ("transformer_engine", {"scale_ignored": True}, "scale_argument_ignored"),
        ("transformer_engine", {"slopes_sign": -1.0}, "alibi_negative"),
        ("diffusers", {"corner": "bottom right"}, "causal_other_corner"),
        ("diffusers", {"polarity": False}, "mask_inverted"),
        ("diffusers", {"scale_ignored": True}, "scale_argument_ignored"),
        ("out_parameter", {"corner": "bottom right"}, "causal_other_corner"),
        ("out_parameter", {"scale_ignored": True}, "scale_argument_ignored"),
        ("transformers", {"window_more": 1}, "window_left_too_wide"),
        ("transformers", {"softcap_ignored": True}, "softcap_ignored"),
        ("transformers", {"scale_ignored": True}, "scale_argument_ignored"),
        ("transformers", {"heads_tiled": True}, "groups_tiled"),
        ("diffusers", {"heads_tiled": True}, "groups_tiled"),
    ],
)
def test_a_wrong_version_is_found_and_named(row, decisions, name):
    with planted(**decisions):
        found = diagnose(examined(row))
    assert not found.healthy
    named = [*found.defects, *(one for several in found.alternatives for one in several)]
    assert name in named, found.sentence


def checked(subject, *names):
    spec = AttentionSpec(subject, dtypes=("float32",))
    return check_attention(spec, checks=[one for one in CHECKS if one.name in names])


def test_a_log_sum_exp_of_base_e_is_called_that_where_base_2_is_the_convention():
    (failed,) = checked(ragged(base=math.e), "returned_lse").failed
    assert "base e" in failed.message


@pytest.mark.parametrize("name", ["out", "lse"])
def test_a_buffer_that_is_not_written_to_is_named(name):
    report = checked(ragged(ignores=(name,)), "grouped", "returned_lse")
    assert any(f"nothing is written into the buffer {name}=" in one.message
               for one in report.failed)  # fmt: skip


def test_a_function_that_leaves_its_buffer_alone_fails():
    def attend_nowhere(q, k, v, out=None):
        found = attend(*(tensor.transpose(1, 2) for tensor in (q, k, v)))
        return found.transpose(1, 2)

    (failed,) = checked(attend_nowhere, "plain").failed
    assert "nothing is written into the buffer out=" in failed.message


def test_an_engine_that_counts_from_another_corner_is_named():
    with planted(corner="bottom right"):
        report = checked(DotProductAttention, "causal_rectangular", "window", "alibi")
    assert len(report.failed) == 3
    assert all("the other corner" in one.message for one in report.failed)


def test_an_engine_counts_from_the_corner_that_is_declared():
    spec = AttentionSpec(DotProductAttention, causal="bottom_right", dtypes=("float32",))
    names = ("causal_rectangular", "window", "alibi", "decoding")
    report = check_attention(spec, checks=[one for one in CHECKS if one.name in names])
    assert report.passed, str(report)
    assert {one.status for one in report.results} == {"passed"}


def test_a_layout_of_its_own_is_handed_on_to_the_constructor():
    spec = AttentionSpec(DotProductAttention, like="transformer_engine", layout="blhd")
    report = check_attention(spec, quick=True)
    assert report.passed, str(report)


def test_a_class_is_refused_where_no_convention_makes_one():
    class Attention(nn.Module):
        def forward(self, query, key, value):
            return attend(query, key, value)

    with pytest.raises(TypeError, match="subject: got the class Attention; accepted is an inst"):
        check_attention(Attention)
    with pytest.raises(TypeError, match="subject: got the class DotProductAttention; accepted"):
        AttentionSpec(DotProductAttention, layout="blhd")  # by no convention then


def test_what_is_neither_called_nor_planned_is_refused():
    class Planner:
        def plan(self, lengths):
            pass

    with pytest.raises(TypeError, match="subject: got Planner; accepted is a callable"):
        check_attention(Planner())


def test_the_parameters_of_an_operator_are_those_of_its_schema():
    names = parameters_of(torch.ops.aten._scaled_dot_product_flash_attention_for_cpu)
    assert list(names)[:5] == ["query", "key", "value", "dropout_p", "is_causal"]
    assert names["is_causal"].default is False
    assert names["query"].default is names["query"].empty
    assert "logsumexp" in names
    assert names == parameters_of(
        torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default
    )


def test_the_kernel_of_pytorch_for_a_cpu_passes():
    kernel = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    names = ("plain", "float_mask", "causal_rectangular", "scale_argument", "gradients",
             "returned_lse", "layout")  # fmt: skip
    report = checked(kernel, *names)
    assert report.passed, str(report)
    assert report.spec.like == "aten_flash_cpu"
    assert {one.name for one in report.results if one.status == "skipped"} == {"layout"}


def test_attention_of_transformers_is_told_its_corner_by_the_mask():
    spec = transformers_attention("sdpa")
    assert (spec.causal, spec.causal_argument) == ("bottom_right", "is_causal")
    quiet = replace(spec, dtypes=("float32",))
    for text in ("causal=True sizes=3x5", "causal=True sizes=1x2 batch=1 key_heads=1",
                 "causal=True sizes=7x7"):  # fmt: skip
        assert check_attention(quiet, replay=text).passed


def test_eager_attention_of_transformers_takes_neither_causality_nor_a_window():
    spec = transformers_attention("eager")
    assert (spec.causal, spec.window, spec.dropout) == (None, None, "dropout")
    names = ("plain", "masked", "dropout")
    report = check_attention(spec, checks=[one for one in CHECKS if one.name in names], quick=True)
    assert report.passed, str(report)


@pytest.mark.parametrize("field", [{"dropout": True}, {"arguments": {"causal": True}}])
def test_what_a_function_of_call_would_not_see_is_refused(field):
    (name,) = field
    with pytest.raises(ValueError, match=f"{name}: got .* beside call; accepted is None"):
        AttentionSpec(attend, call=lambda fn, case: fn(*case.tensors), **field)


def test_an_object_that_is_not_called_is_taken_with_a_function_that_asks_it():
    class Engine:
        def go(self, *tensors):
            return attend(*(tensor.transpose(1, 2) for tensor in tensors)).transpose(1, 2)

    spec = AttentionSpec(
        Engine(), call=lambda engine, case: engine.go(*case.tensors), dtypes=("float32",)
    )
    assert check_attention(spec, quick=True).passed
    assert spec.name == "Engine"


def test_of_several_names_of_a_keyword_the_one_that_a_signature_has_is_taken():
    def scaled(q, k, v, out, softmax_scale=None):
        return attend_into(q, k, v, out, softmax_scale)

    assert AttentionSpec(scaled).scale_argument == "softmax_scale"
    assert AttentionSpec(attend_into).scale_argument == "sm_scale"
    assert AttentionSpec(lambda q, k, v, out: None).scale_argument is None
