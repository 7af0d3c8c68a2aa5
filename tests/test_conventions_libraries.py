"""Attention of other libraries is examined as it is; each test needs the library that it names.

They are skipped where it is not installed: `nox -s libraries` has all of them.
"""

import functools
import importlib
import os
import subprocess
import sys

import pytest
import torch

from pytest_attnheat import AttentionSpec, check_attention, diagnose
from pytest_attnheat.callables import parameters_of
from pytest_attnheat.contract.checks import CHECKS

# What other libraries warn of is their own.
pytestmark = pytest.mark.filterwarnings("default")
os.environ.setdefault("KERAS_BACKEND", "torch")


def examined(subject, *names, **more):
    asked = [one for one in CHECKS if one.name in names] if names else None
    return check_attention(AttentionSpec(subject, **more), checks=asked)


def passed(report):
    return {one.name for one in report.results if one.status == "passed"}


def named(found):
    return [*found.defects, *(one for several in found.alternatives for one in several)]


def test_no_library_is_imported_before_a_subject_of_it_is_called():
    libraries = ("jax", "mlx", "keras", "onnx", "onnxruntime", "ml_dtypes")
    script = (
        "import sys; from pytest_attnheat import check_attention;"
        "import torch.nn.functional as F;"
        "assert check_attention(F.scaled_dot_product_attention, quick=True).passed;"
        f"assert not set({libraries!r}) & set(sys.modules), sys.modules"
    )
    subprocess.run([sys.executable, "-c", script], check=True)


# --- JAX


@pytest.fixture
def jax():
    return pytest.importorskip("jax")


def test_attention_of_jax_passes_with_nothing_declared(jax):
    report = check_attention(jax.nn.dot_product_attention)
    assert report.passed, str(report)
    assert report.spec.like == "jax"
    assert passed(report) >= {
        "masked", "causal_rectangular", "scale_argument", "fully_masked", "grouped", "bias",
        "lengths", "window", "gradients", "gradients_masked", "pairs", "returned_lse",
    }  # fmt: skip
    assert {one.dtype for one in report.results} == {"float32", "bfloat16"}


def wrong_jax(jax, change):
    """Attention of JAX, of its signature, some of whose arguments are changed."""

    @functools.wraps(jax.nn.dot_product_attention)
    def attention(query, key, value, **given):
        return jax.nn.dot_product_attention(*change(given, query, key, value), **given)

    return attention


def _inverted(given, *inputs):
    given["mask"] = None if given.get("mask") is None else ~given["mask"]
    return inputs


def _without(name):
    def change(given, *inputs):
        given.pop(name, None)
        return inputs

    return change


def _wider(given, *inputs):
    left, right = given.pop("local_window_size", None) or (None, None)
    if left is not None:
        given["local_window_size"] = (left + 1, right)
    return inputs


def _from_the_end(given, query, key, value):
    rows, columns = query.shape[1], key.shape[1]
    if given.pop("is_causal", False):
        at = importlib.import_module("jax.numpy").arange
        seen = at(columns)[None] <= at(rows)[:, None] + columns - rows
        given["mask"] = seen[None, None] & given.get("mask", True)
    return query, key, value


def _of_head_before(given, query, key, value):
    return query, key, importlib.import_module("jax.numpy").roll(value, 1, 2)


@pytest.mark.parametrize(
    ("change", "name", "check"),
    [
        (_inverted, "mask_inverted", "masked"),
        (_without("scale"), "scale_argument_ignored", "scale_argument"),
        (_wider, "window_left_too_wide", "window"),
        (_from_the_end, "causal_other_corner", "causal_rectangular"),
        (_without("key_value_seq_lengths"), "lengths_ignored", "lengths"),
        (_without("bias"), "", "bias"),
    ],
)
def test_a_wrong_attention_of_jax_is_found_and_named(jax, change, name, check):
    subject = wrong_jax(jax, change)
    report = examined(subject, check, dtypes=("float32",))
    assert [one.name for one in report.failed] == [check]
    if name:
        assert name in named(diagnose(AttentionSpec(subject, dtypes=("float32",))))


def test_a_gradient_of_jax_that_is_cut_off_is_found(jax):
    def attention(query, key, value, mask=None, *, is_causal=False, key_value_seq_lengths=None,
                  local_window_size=None):  # fmt: skip
        return jax.nn.dot_product_attention(query, jax.lax.stop_gradient(key), value, mask=mask,
                                            is_causal=is_causal)  # fmt: skip

    (failed,) = examined(attention, "gradients", dtypes=("float32",)).failed
    assert "the gradient of key" in failed.message


def test_a_function_of_ones_own_goes_over_to_jax_by_name(jax):
    def attention(query, key, value, is_causal=False):
        scores = query @ key.swapaxes(-1, -2) * query.shape[-1] ** -0.5
        seen = jax.numpy.tri(*scores.shape[-2:], dtype=bool)
        scores = jax.numpy.where(seen, scores, -jax.numpy.inf) if is_causal else scores
        return jax.nn.softmax(scores) @ value

    spec = {"like": "jax", "layout": "bhld", "grouped": False, "dtypes": ("float32",)}
    report = examined(attention, "plain", "causal", "gradients", "masked", **spec)
    assert report.passed, str(report)
    assert passed(report) == {"plain", "causal", "gradients"}


def test_a_function_of_jax_in_which_numbers_decide_is_left_uncompiled(jax):
    def attention(query, key, value):
        scores = query @ key.swapaxes(-1, -2) * query.shape[-1] ** -0.5
        if scores.max() > 50:
            scores = scores - scores.max(-1, keepdims=True)
        return jax.nn.softmax(scores) @ value

    spec = {"like": "jax", "layout": "bhld", "grouped": False, "dtypes": ("float32",)}
    report = examined(attention, "plain", "large_scores", "gradients", **spec)
    assert passed(report) == {"plain", "large_scores", "gradients"}, str(report)


# --- MLX


@pytest.fixture
def mlx():
    return pytest.importorskip("mlx.core")


def test_attention_of_mlx_passes_with_nothing_declared(mlx):
    names = parameters_of(mlx.fast.scaled_dot_product_attention)
    assert list(names)[:6] == ["q", "k", "v", "scale", "mask", "sinks"]
    assert names["scale"].default is names["scale"].empty
    report = check_attention(mlx.fast.scaled_dot_product_attention)
    assert report.passed, str(report)
    assert report.spec.like == "mlx"
    assert passed(report) >= {
        "masked", "float_mask", "causal_rectangular", "scale_argument", "fully_masked", "grouped",
        "sinks", "gradients", "pairs", "decoding",
    }  # fmt: skip
    assert {one.dtype for one in report.results} == {"float32", "float16", "bfloat16"}


@pytest.mark.parametrize(
    ("wrong", "name", "check"),
    [
        ("corner", "causal_other_corner", "causal_rectangular"),
        ("scale", "scale_argument_ignored", "scale_argument"),
        ("sinks", "sinks_ignored", "sinks"),
        ("mask", "mask_inverted", "masked"),
    ],
)
def test_a_wrong_attention_of_mlx_is_found_and_named(mlx, wrong, name, check):
    def attention(q, k, v, *, scale, mask=None, sinks=None, stream=None):
        if wrong == "corner" and isinstance(mask, str):
            mask = mlx.arange(k.shape[2])[None] <= mlx.arange(q.shape[2])[:, None]
        if wrong == "mask" and mask is not None and mask.dtype == mlx.bool_:
            mask = mlx.logical_not(mask)
        scale = q.shape[-1] ** -0.5 if wrong == "scale" else scale
        sinks = None if wrong == "sinks" else sinks
        return mlx.fast.scaled_dot_product_attention(q, k, v, scale=scale, mask=mask, sinks=sinks)

    report = examined(attention, check, dtypes=("float32",))
    assert [one.name for one in report.failed] == [check]
    assert name in named(diagnose(AttentionSpec(attention, dtypes=("float32",))))


# --- Keras


@pytest.fixture
def keras():
    return pytest.importorskip("keras")


def test_attention_of_keras_passes_with_nothing_declared(keras):
    report = check_attention(keras.ops.dot_product_attention)
    assert report.passed, str(report)
    assert report.spec.like == "keras"
    assert passed(report) >= {
        "masked", "causal_rectangular", "scale_argument", "fully_masked", "bias",
    }  # fmt: skip
    assert "not asked: attn_logits_soft_cap" in str(report)


@pytest.mark.parametrize(
    ("change", "name", "check"),
    [
        (_inverted, "mask_inverted", "masked"),
        (_without("scale"), "scale_argument_ignored", "scale_argument"),
        (_without("is_causal"), "causal_ignored", "causal"),
        (_without("bias"), "", "bias"),
    ],
)
def test_a_wrong_attention_of_keras_is_found_and_named(keras, change, name, check):
    @functools.wraps(keras.ops.dot_product_attention)
    def attention(query, key, value, **given):
        return keras.ops.dot_product_attention(*change(given, query, key, value), **given)

    report = examined(attention, check, dtypes=("float32",))
    assert [one.name for one in report.failed] == [check]
    if name:
        assert name in named(diagnose(AttentionSpec(attention, dtypes=("float32",))))


# --- ONNX


@pytest.fixture
def onnx():
    return pytest.importorskip("onnx")


# The reference has a known mistake where causality meets a mask of keys alone.
_SHAPE = {"mask_shape": "(B, 1, L, S)"}


def test_the_reference_of_onnx_passes_and_has_no_gradients(onnx):
    from onnx.reference import ReferenceEvaluator

    report = check_attention(AttentionSpec(ReferenceEvaluator, dtypes=("float32",), **_SHAPE))
    assert report.passed, str(report)
    assert report.spec.like == "onnx"
    assert passed(report) >= {
        "masked", "float_mask", "causal_rectangular", "scale_argument", "fully_masked", "grouped",
        "softcap", "lengths", "window",
    }  # fmt: skip
    assert "gradients" not in passed(report)


def test_a_session_of_onnx_runtime_passes_with_nothing_declared(onnx):
    session = pytest.importorskip("onnxruntime").InferenceSession
    report = check_attention(session)
    assert report.passed, str(report)
    assert report.spec.like == "onnxruntime"
    assert passed(report) >= {"masked", "float_mask", "causal_rectangular", "scale_argument",
                              "fully_masked", "grouped", "softcap", "lengths"}  # fmt: skip


@pytest.mark.parametrize(
    ("attribute", "name", "check"),
    [
        ("scale", "scale_argument_ignored", "scale_argument"),
        ("softcap", "softcap_ignored", "softcap"),
        ("is_causal", "causal_ignored", "causal"),
        ("window_size", "window_ignored", "window"),
    ],
)
def test_a_session_that_leaves_an_attribute_aside_is_named(onnx, attribute, name, check):
    from onnx.reference import ReferenceEvaluator

    def session(proto):
        node = proto.graph.node[0]
        kept = [one for one in node.attribute if attribute not in one.name]
        del node.attribute[:]
        node.attribute.extend(kept)
        return ReferenceEvaluator(proto)

    spec = AttentionSpec(session, like="onnx", dtypes=("float32",), **_SHAPE)
    report = check_attention(spec, checks=[one for one in CHECKS if one.name == check])
    assert [one.name for one in report.failed] == [check]
    assert name in named(diagnose(spec))


def test_what_is_no_input_of_the_operator_goes_to_the_session(onnx):
    session = pytest.importorskip("onnxruntime").InferenceSession
    seen = []

    def make(path_or_bytes, sess_options=None, providers=None):
        seen.append(providers)
        return session(path_or_bytes, sess_options, providers=providers)

    more = {"arguments": {"providers": ["CPUExecutionProvider"]}, "dtypes": ("float32",)}
    assert examined(make, "plain", "masked", **more).passed
    assert seen
    assert all(one == ["CPUExecutionProvider"] for one in seen)


def test_bfloat16_goes_over_and_comes_back(mlx):
    from pytest_attnheat.contract.conventions.libraries import _jax, _mlx, _numbers

    numbers = torch.tensor([1.0, 1.0078125, float("-inf"), 3e38], dtype=torch.bfloat16)
    for library in (_mlx, _jax) if importlib.util.find_spec("jax") else (_mlx,):
        own = library()
        assert torch.equal(own.take(own.give(numbers)), numbers)
    if importlib.util.find_spec("ml_dtypes"):
        assert _numbers(numbers).astype("float32").tolist() == numbers.tolist()
