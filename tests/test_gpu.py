"""What only a GPU can show: kernels that run there, faults of the device, models, large tensors.

`make gpu` runs these, and the tests of devices that `-m cuda` selects. What can be tried on a CPU
runs there with ATTNHEAT_TEST_DEVICE=cpu, which shows that the tests themselves are right.
"""

import importlib.util
import os
import re

import pytest
import torch
from attention_subjects import of_transformers, plain, qkv, tokens
from torch import nn
from torch.nn.functional import scaled_dot_product_attention as sdpa

import pytest_attnheat as attn
from pytest_attnheat import AttentionSpec, check_attention, diagnose
from pytest_attnheat.contract.checks import CHECKS

NAME = os.environ.get("ATTNHEAT_TEST_DEVICE", "cuda")
HERE = NAME == "cpu" or torch.cuda.is_available()
ON_CUDA = NAME == "cuda" and torch.cuda.is_available()
pytestmark = [
    pytest.mark.cuda,
    pytest.mark.skipif(not HERE, reason="needs a CUDA device"),
    pytest.mark.filterwarnings("default"),  # of backends that say why they refuse a call
]
cuda_alone = pytest.mark.skipif(not ON_CUDA, reason="needs a CUDA device")
needs_triton = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None or not ON_CUDA, reason="needs triton and a GPU"
)
HALF = ("float16", "bfloat16")
DTYPES = {"float64": torch.float64, "float32": torch.float32, "float16": torch.float16}
DTYPES["bfloat16"] = torch.bfloat16


def spec_of(subject, *dtypes, **declared):
    return AttentionSpec(subject, dtypes=dtypes, devices=[NAME], **declared)


def passes(spec, **options):
    report = check_attention(spec, **options)
    assert report.passed, str(report)
    assert {result.device for result in report.results} == {NAME}
    assert any(result.status == "passed" for result in report.results)
    return report


# --- kernels that are right


def of_backend(name):
    """`scaled_dot_product_attention` by one of PyTorch's kernels, which refuses what it cannot."""
    from torch.nn.attention import SDPBackend, sdpa_kernel

    backend = getattr(SDPBackend, name)

    def attention(
        query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False, *, scale=None,
        enable_gqa=False,
    ):  # fmt: skip
        with sdpa_kernel(backend):
            return sdpa(
                query, key, value, attn_mask, dropout_p, is_causal, scale=scale,
                enable_gqa=enable_gqa,
            )  # fmt: skip

    attention.__name__ = f"sdpa_{name.lower()}"
    return attention


# What PyTorch's fused kernels of 16-bit numbers do, and do not say. FlashAttention and cuDNN give
# NaN where the scale is negative; cuDNN gives a query that may attend to nothing a mean of values.
KNOWN = ("scale=-0.4", "empty=True", "a fully masked row", "dropped together")


def wrong_in(report):
    """What is wrong with each check that failed, without those whose calls all have one thing."""
    for result in report.failed:
        known = [words for words in KNOWN if words in result.message]
        yield known[0] if known else result.message


KERNELS = [
    *[(None, dtype) for dtype in DTYPES],
    *[("MATH", dtype) for dtype in DTYPES],
    *[("EFFICIENT_ATTENTION", dtype) for dtype in ("float32", *HALF)],
    *[(name, dtype) for name in ("FLASH_ATTENTION", "CUDNN_ATTENTION") for dtype in HALF],
]


@pytest.mark.parametrize(("backend", "dtype"), KERNELS)
def test_pytorchs_kernels_raise_no_alarm(backend, dtype):
    if not ON_CUDA and backend not in (None, "MATH"):
        pytest.skip("a kernel of a GPU")
    subject = sdpa if backend is None else of_backend(backend)
    report = check_attention(spec_of(subject, dtype))
    known = KNOWN if dtype in HALF and backend != "MATH" else ()
    assert not set(wrong_in(report)) - set(known), str(report)
    assert any(result.status == "passed" for result in report.results)


@pytest.mark.parametrize("dtype", DTYPES)
def test_attention_written_out_raises_no_alarm(dtype):
    passes(spec_of(plain, dtype))


@cuda_alone
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_compiled_attention_raises_no_alarm(dtype):
    report = passes(spec_of(torch.compile(plain, dynamic=True), dtype, few_shapes=True))
    assert "process of its own" in str(report)  # why it is not isolated


COMPILED = ["plain", "causal", "masked", "gradients", "grouped", "leakage", "pairs"]


@cuda_alone
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_compiled_flex_attention_raises_no_alarm(dtype):
    from torch.nn.attention.flex_attention import flex_attention

    from pytest_attnheat.contract.ready import as_spec

    spec = as_spec(torch.compile(flex_attention, dynamic=True))
    assert spec.name == "flex_attention (compiled)"
    checks = [check for check in CHECKS if check.name in COMPILED]
    spec = AttentionSpec(spec.subject, dtypes=[dtype], devices=[NAME], few_shapes=True)
    passes(spec, checks=checks)


@cuda_alone
@pytest.mark.parametrize("dtype", HALF)
def test_attention_of_packed_sequences_raises_no_alarm(dtype):
    varlen = pytest.importorskip("torch.nn.attention.varlen").varlen_attn

    passes(spec_of(varlen, dtype))


# The module and the name of public kernels, where they are installed.
KERNELS = [
    ("flash_attn", "flash_attn_func"),
    ("flash_attn", "flash_attn_varlen_func"),
    ("flash_attn_interface", "flash_attn_func"),
    ("flash_attn_interface", "flash_attn_varlen_func"),
    ("flash_attn.cute", "flash_attn_func"),
    ("flashinfer", "single_prefill_with_kv_cache"),
    ("sageattention", "sageattn"),
    ("xformers.ops", "memory_efficient_attention"),
]


@cuda_alone
@pytest.mark.parametrize(("module", "name"), KERNELS)
def test_a_public_kernel_is_examined_as_it_is_called(module, name):
    kernel = getattr(pytest.importorskip(module), name)
    passes(spec_of(kernel, "bfloat16"))


@needs_triton
@pytest.mark.parametrize("dtype", ["float32", *HALF])
def test_a_triton_kernel_raises_no_alarm(dtype):
    from triton_attention import attention

    passes(spec_of(attention, dtype, gradients=False))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("make", [nn.MultiheadAttention, nn.TransformerEncoderLayer])
def test_modules_of_torch_raise_no_alarm(make, dtype):
    torch.manual_seed(0)
    module = make(16, 4, batch_first=True).to(NAME, DTYPES[dtype]).eval()
    passes(module_spec(module, dtype))


def module_spec(module, dtype):
    x = torch.randn(2, 9, 16, generator=torch.Generator().manual_seed(0))
    return spec_of(module, dtype, inputs=x.to(NAME, DTYPES[dtype]), causal=None)


@pytest.mark.parametrize("name", ["eager", "sdpa"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_attention_of_transformers_raises_no_alarm(name, dtype):
    pytest.importorskip("transformers")
    spec = attn.transformers_attention(name)
    passes(attn.AttentionSpec(**{**fields_of(spec), "dtypes": [dtype], "devices": [NAME]}))


def fields_of(spec):
    from dataclasses import fields

    return {one.name: getattr(spec, one.name) for one in fields(spec) if one.init and one.repr}


# --- kernels that are wrong


WRONG = {
    "tail counted": "keys of zeros",
    "one key more": "causal",
    "other corner": "corner",
    "no rescale": "",
    "wrong heads": "head",
}


@needs_triton
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("defect", WRONG)
def test_a_wrong_triton_kernel_is_found(defect, dtype):
    from triton_attention import attention

    def wrong(query, key, value, is_causal=False, scale=None, enable_gqa=False):
        return attention(query, key, value, is_causal, scale, enable_gqa, defect=defect)

    report = check_attention(spec_of(wrong, dtype, gradients=False))
    print(f"defect={defect} dtype={dtype}\n{report}")
    assert report.failed
    assert WRONG[defect] in str(report.diagnosis).lower()


@needs_triton
def test_products_in_tf32_are_found_where_float32_is_promised():
    from triton_attention import attention

    def rough(query, key, value, is_causal=False, scale=None, enable_gqa=False):
        return attention(query, key, value, is_causal, scale, enable_gqa, precision="tf32")

    report = check_attention(spec_of(rough, "float32", gradients=False))
    print(report)
    assert report.failed
    # What is large is off by more than a part of itself: exp makes factors of errors.
    checks = [check for check in CHECKS if check.name in ("plain", "causal", "grouped")]
    passes(spec_of(rough, "float32", gradients=False, tolerance=1e-2), checks=checks)


@cuda_alone
def test_tf32_of_the_whole_process_changes_no_verdict():
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = True
    try:
        report = check_attention(spec_of(of_backend("MATH"), "float32"))
        print(report)
        x = [t.to(NAME) for t in qkv(2, 3, 64, 64, 64)]
        scores = x[0].double() @ x[1].double().mT / 8
        attn.assert_row_stochastic(scores.softmax(-1).float())
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before
    assert all("TF32" in result.message or "tf32" in result.message for result in report.failed)


@cuda_alone
def test_a_defect_that_only_a_gpu_has_is_said_of_the_gpu():
    def wrong_there(query, key, value, is_causal=False):
        return sdpa(query, key, value, is_causal=is_causal and not query.is_cuda)

    report = check_attention(AttentionSpec(wrong_there, dtypes=["float32"]))
    assert {result.device for result in report.failed} == {"cuda"}
    assert "causal" in str(report.diagnosis)
    print(report)


@cuda_alone
def test_dropout_that_drops_weights_of_two_queries_together_is_found():
    """As cuDNN does, which PyTorch 2.11 prefers on Hopper; of queries 2 and 4 apart."""
    inputs = [t.to(NAME) for t in qkv(2, 4, 64, 64, 64, dtype=torch.bfloat16)]
    with pytest.raises(AssertionError, match="2 apart along dimension -2 are dropped together"):
        attn.assert_deterministic(sdpa, *inputs, dropout=0.1, is_causal=True)


# --- faults of the device


def faulty(query, key, value, is_causal=False):
    """Reads beyond the end where it is causal: an assertion of the device fails."""
    if is_causal:
        beyond = torch.full((1,), 10**6, device=query.device)
        return query[:, :, beyond] + 0
    return sdpa(query, key, value)


@cuda_alone
def test_a_fault_of_the_device_is_a_failure_and_the_run_goes_on():
    checks = [check for check in CHECKS if check.name in ("plain", "causal", "batch")]
    report = check_attention(spec_of(faulty, "float32"), checks=checks, isolate=True)
    print(report)
    assert [result.status for result in report.results] == ["passed", "failed", "passed"]
    assert "left its GPU unusable" in report.failed[0].message
    torch.ones(2, device="cuda").sum().item()  # this process still has its GPU


@cuda_alone
def test_a_fault_in_this_process_is_told_once_and_nothing_more_is_asked(pytester):
    pytester.makepyfile(
        """
        import torch
        from torch.nn.functional import scaled_dot_product_attention as sdpa
        from pytest_attnheat import AttentionSpec, check_attention

        def faulty(query, key, value, is_causal=False):
            if is_causal:
                return query[:, :, torch.full((1,), 10**6, device=query.device)] + 0
            return sdpa(query, key, value)

        def test_it():
            spec = AttentionSpec(faulty, dtypes=["float32"], devices=["cuda"], square=False)
            report = check_attention(spec)
            print(report)
            assert len(report.failed) == 1
            assert {r.reason[:30] for r in report.results if r.status == "skipped"} >= {
                "this process has lost its GPU:"
            }
        """
    )
    result = pytester.runpytest_subprocess("-s")
    print("\n".join(result.outlines[-60:]))
    assert result.parseoutcomes() == {"passed": 1}


@cuda_alone
def test_what_needs_more_memory_than_there_is_is_told_so():
    def hungry(query, key, value):
        torch.empty(2**46, device=query.device)
        return sdpa(query, key, value)

    report = check_attention(spec_of(hungry, "float32"), quick=True)
    print(report)
    assert not report.passed
    assert "memory" in str(report).lower()


@cuda_alone
def test_a_mask_on_the_cpu_serves_weights_of_a_gpu():
    mask = torch.ones(3, 3, dtype=torch.bool).tril()
    attn.assert_masked(torch.eye(3, device=NAME)[None], mask)
    with pytest.raises(AssertionError, match="on cuda"):
        attn.assert_masked(torch.full((1, 3, 3), 1 / 3, device=NAME), mask)


# --- assertions on calls


@pytest.mark.parametrize("dtype", DTYPES)
def test_assertions_on_a_call_raise_no_alarm(dtype):
    inputs = [t.to(NAME) for t in qkv(2, 4, 33, 70, 64, dtype=DTYPES[dtype])]
    attn.assert_matches_reference(sdpa, *inputs)
    attn.assert_gradients_match(sdpa, *inputs)
    attn.assert_no_leakage(sdpa, *inputs, is_causal=True)
    attn.assert_batch_independent(sdpa, *inputs)
    attn.assert_layout_invariant(sdpa, *inputs)
    attn.assert_key_permutation_invariant(sdpa, *inputs)
    attn.assert_deterministic(sdpa, *inputs)
    attn.assert_padding_invariant(sdpa, *inputs)
    attn.assert_convex(sdpa, *inputs)


@pytest.mark.parametrize("length", [512, 4096, 16384])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_long_calls_are_judged_against_float64(length, dtype):
    if not ON_CUDA and length > 512:
        pytest.skip("too long for a CPU")
    inputs = [t.to(NAME) for t in qkv(1, 2, length, length, 64, dtype=DTYPES[dtype])]
    attn.assert_matches_reference(sdpa, *inputs, is_causal=True)

    def shortened(query, key, value, is_causal=False):
        return sdpa(query, key[:, :, :-1], value[:, :, :-1], is_causal=is_causal)

    with pytest.raises(AssertionError) as caught:
        attn.assert_matches_reference(shortened, *inputs)
    print(caught.value)


# --- weights


@pytest.mark.parametrize("shape", [(2, 8, 256, 256), (1, 9, 16384, 16384)])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_one_wrong_weight_is_found_where_it_is(shape, dtype):
    """The last of more elements than 32 bits can count is not overlooked."""
    if not ON_CUDA and shape[-1] > 256:
        pytest.skip("too large for a CPU")
    row = torch.full(shape[-1:], 1 / shape[-1], device=NAME, dtype=DTYPES[dtype])
    weights = row.expand(shape).contiguous()
    attn.assert_row_stochastic(weights)
    weights[-1, -1, -1, -1] += 0.5
    with pytest.raises(AssertionError) as caught:
        attn.assert_row_stochastic(weights)
    last = ", ".join(str(size - 1) for size in shape[:3])
    assert f"[{last}, :]" in str(caught.value), str(caught.value)


# --- what is too long to be held, or lies on several GPUs


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_weights_that_never_exist_are_read_where_queries_and_keys_are(dtype):
    length = 131_072 if ON_CUDA else 512
    query, key, _ = (t.to(NAME) for t in qkv(1, 2, length, length, 64, dtype=DTYPES[dtype]))
    weights = attn.LazyWeights(query, key, causal=True, window=(1023, 0))
    if ON_CUDA:
        torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated() if ON_CUDA else 0
    attn.assert_row_stochastic(weights)
    attn.assert_causal(weights)
    if ON_CUDA:
        assert torch.cuda.max_memory_allocated() - before < 512 * 2**20
    short = attn.LazyWeights(query[:, :, :400], key[:, :, :400], causal=True)
    said = []
    for one in (short, short[:]):
        with pytest.raises(AssertionError) as caught:
            attn.assert_one_hot(one)
        said.append(str(caught.value).partition("\n  head")[0])  # one of them knows the mask
    assert said[0] == said[1]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_call_of_many_keys_is_judged_by_some_rows(dtype):
    length = 131_072 if ON_CUDA else 5000
    inputs = [t.to(NAME) for t in qkv(1, 2, 256, length, 64, dtype=DTYPES[dtype])]
    attn.assert_matches_reference(sdpa, *inputs, rows=16)

    def shortened(query, key, value):
        return sdpa(query, key[:, :, : length - 70], value[:, :, : length - 70])

    with pytest.raises(AssertionError, match="a length that is cut between") as caught:
        attn.assert_matches_reference(shortened, *inputs, rows=16)
    first, last = re.search(r"between (\d+) and (\d+)", str(caught.value)).groups()
    assert int(first) < length - 70 < int(last)


def rows_over_gpus():
    """What each rank does: the module is imported there."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Shard, distribute_tensor

    mesh = init_device_mesh("cuda", (torch.distributed.get_world_size(),))
    whole = torch.randn(2, 8, 64, 64, generator=torch.Generator().manual_seed(0)).softmax(-1)
    for dim in range(4):
        weights = distribute_tensor(whole.cuda(), mesh, [Shard(dim)])
        attn.assert_row_stochastic(weights)
        with pytest.raises(AssertionError, match="one-hot"):
            attn.assert_one_hot(weights)


@cuda_alone
def test_weights_that_lie_on_all_gpus_are_judged_there(ranks):
    ranks(torch.cuda.device_count(), rows_over_gpus, device="cuda")


# --- models


@pytest.mark.parametrize("keep", ["weights", "inputs", "statistics"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
@pytest.mark.parametrize("name", ["bert", "llama"])
def test_a_model_on_the_gpu_is_captured_as_on_the_cpu(name, implementation, dtype, keep):
    pytest.importorskip("transformers")
    from copy import deepcopy

    model = deepcopy(of_transformers(name, "eager"))
    model.set_attn_implementation(implementation)
    ids = tokens(2, 9)
    with torch.no_grad():
        with attn.capture_attention(model, keep="weights") as there:
            expected = model(ids)[0]
        model.to(NAME, DTYPES[dtype])
        plainly = model(ids.to(NAME))[0]
        with attn.capture_attention(model, keep=keep) as trace:
            output = model(ids.to(NAME))[0]
    assert torch.equal(output, plainly)  # capture changes nothing
    assert [record.layer for record in trace] == [record.layer for record in there]
    off = 5e-6 if dtype == "float32" else 0.05
    torch.testing.assert_close(output.cpu().float(), expected, atol=10 * off, rtol=off)
    for record, other in zip(trace, there, strict=True):
        assert not record.doubt
        if keep == "statistics":
            continue
        weights = record.weights
        assert weights.device.type == (NAME if keep == "weights" else weights.device.type)
        difference = (weights.cpu().float() - other.weights.float()).abs().max()
        assert difference < off
        attn.assert_row_stochastic(weights.to(DTYPES[dtype]))


def test_a_model_that_generates_is_captured_step_by_step():
    pytest.importorskip("transformers")
    from copy import deepcopy

    model = deepcopy(of_transformers("llama", "sdpa")).to(NAME, torch.bfloat16)
    ids = tokens(2, 5).to(NAME)
    with torch.no_grad(), attn.capture_attention(model) as trace:
        model.generate(ids, max_new_tokens=3, do_sample=False)
    assert len(trace.steps) == 3
    assert [record.weights.shape[-1] for record in trace.at(step=2)] == [7, 7]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_block_on_the_gpu_is_examined(dtype):
    pytest.importorskip("transformers")
    from copy import deepcopy

    model = deepcopy(of_transformers("llama", "sdpa")).to(NAME, DTYPES[dtype])
    spec = spec_of(model, dtype, inputs=tokens(2, 9).to(NAME))
    passes(spec)
    with torch.no_grad(), attn.capture_attention(model) as trace:
        model(tokens(2, 9).to(NAME))
    report = check_attention(trace)
    assert report.passed, str(report)
    print(diagnose(trace))


def test_a_heatmap_drawn_on_the_gpu_is_that_of_the_cpu(tmp_path):
    weights = torch.rand(2, 3, 6, 7, generator=torch.Generator().manual_seed(0)).softmax(-1)
    there = attn.show_heatmaps(weights.to(NAME, torch.bfloat16), "keys", "queries")
    here = attn.show_heatmaps(weights.to(torch.bfloat16), "keys", "queries")
    for name, figure in (("there", there), ("here", here)):
        figure.savefig(tmp_path / f"{name}.png")
    assert (tmp_path / "there.png").read_bytes() == (tmp_path / "here.png").read_bytes()


# --- fixtures and options


def test_fixtures_and_checks_run_on_each_device(pytester):
    pytester.makepyfile(
        """
        import torch
        from torch.nn.functional import scaled_dot_product_attention as sdpa
        from pytest_attnheat import AttentionSpec, assert_row_stochastic, parametrize_with_checks

        def test_rows(attention):
            assert_row_stochastic(attention.weights)

        def test_picture(attention, heatmap_regression):
            heatmap_regression.check(attention.weights, "weights")

        @parametrize_with_checks([AttentionSpec(sdpa, dtypes=["float32"])], quick=True)
        def test_sdpa(check):
            check()
        """
    )
    options = ("--attn-device=all", "-p", "no:cacheprovider", "-p", "no:randomly")
    written = pytester.runpytest_subprocess(*options, "--attn-update=all", "-k", "picture")
    print("\n".join(written.outlines[-30:]))
    result = pytester.runpytest_subprocess(*options, "-v")
    print("\n".join(result.outlines[-60:]))
    counts = result.parseoutcomes()
    assert not counts.get("failed")
    assert not counts.get("errors")
    assert counts["passed"] > 10


@cuda_alone
def test_a_message_of_a_gpu_tensor_names_no_more_than_that_of_the_cpu():
    weights = torch.eye(4)[None]
    weights[0, 2, 2] = 0.5
    said = []
    for device in ("cpu", NAME):
        with pytest.raises(AssertionError) as caught:
            attn.assert_row_stochastic(weights.to(device))
        said.append(str(caught.value).replace(" on cuda:0", "").replace(" on cpu", ""))
    assert said[0] == said[1]
