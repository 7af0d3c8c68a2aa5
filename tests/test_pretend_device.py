"""The pretend accelerator, and every public entry on it: it says there what it says on the CPU.

The budgets say how often the host waits for the device while a call passes.
"""

import copy
import re

import numpy as np
import pretend_device
import pytest
import torch
from attention_subjects import (
    WIDTH,
    causal_encoder,
    encoder_layer,
    multihead,
    of_transformers,
    plain,
    qkv,
    randn,
    tokens,
)
from pretend_device import reads
from torch import nn
from torch.nn.functional import scaled_dot_product_attention as sdpa

import pytest_attnheat as attnheat
from pytest_attnheat.callables import borrowed, random_states

# --- the device itself


@pytest.fixture
def x(pretend):
    return torch.arange(12.0).view(3, 4).to(pretend)


@pytest.mark.skipif(pretend_device.WHY_ABSENT is not None, reason=str(pretend_device.WHY_ABSENT))
def test_it_is_absent_until_a_test_asks_for_it():
    assert torch.get_device_module("pretend").device_count() == 0
    assert not torch.accelerator.is_available()
    assert "pretend" not in random_states()
    with pretend_device.present():
        assert torch.accelerator.device_count() == 1
        assert torch.accelerator.current_accelerator().type == "pretend"


def test_its_tensors_are_tensors_of_torch(x):
    assert type(x) is torch.Tensor
    assert str(x.device) == "pretend:0"
    assert not x.is_cpu
    assert "device='pretend:0'" in repr(x)


def test_factories_make_tensors_on_it(pretend):
    for made in (
        torch.zeros(2, 3, device=pretend),
        torch.full((2,), 3.0, device="pretend"),
        torch.arange(5, device=pretend),
        torch.eye(3, device=pretend).new_ones(2),
        torch.tensor([1.0, 2.0], device=pretend),
        torch.randn(3, device=pretend, dtype=torch.float16),
        torch.randperm(3, device=pretend),
        torch.empty_like(torch.zeros(2), device=pretend),
    ):
        assert made.device.type == "pretend"
    assert torch.arange(5, device=pretend).tolist() == [0, 1, 2, 3, 4]


MIXED = {
    "a sum": lambda x: x + torch.ones(4),
    "a product": lambda x: x @ torch.ones(4),
    "where": lambda x: torch.where(torch.ones(3, 4) > 0, x, x),
    "a mask": lambda x: x.masked_fill(torch.ones(3, 4) > 0, 0),
    "a list": lambda x: torch.cat([x, torch.ones(3, 4)]),
    "an index of gather": lambda x: x.gather(0, torch.zeros(1, 4, dtype=torch.long)),
    "something to write": lambda x: x.index_put((torch.tensor([0]),), torch.ones(4)),
}


@pytest.mark.parametrize("mix", MIXED.values(), ids=MIXED)
def test_it_refuses_tensors_of_two_devices(mix, x):
    with pytest.raises(RuntimeError, match="on the same device"):
        mix(x)


def test_it_takes_from_the_cpu_what_a_gpu_takes(x):
    assert (x + torch.tensor(1.0)).device == x.device
    assert x[torch.tensor([2, 0])].tolist() == x.cpu()[[2, 0]].tolist()
    assert x[torch.tensor([True, False, True])].shape == (2, 4)
    x[torch.tensor([0]), torch.tensor([1])] = -5.0
    assert x[0, 1].item() == -5
    with pytest.raises(RuntimeError, match="indices should be either on cpu or on the same"):
        torch.ones(3)[torch.arange(2, device=x.device)]


def test_it_refuses_numpy_and_generators_of_the_cpu(x):
    with pytest.raises(TypeError, match="can't convert pretend:0 device type tensor to numpy"):
        x.numpy()
    with pytest.raises(TypeError, match="can't convert pretend:0 device type tensor to numpy"):
        np.asarray(x)
    with pytest.raises(RuntimeError, match="'pretend' device type for generator"):
        torch.randn(3, device=x.device, generator=torch.Generator())


def test_a_view_shares_its_memory(x):
    version = x._version
    x.mT[2].mul_(10)
    x[:, 0] = -1
    x.view(2, 6)[1, 5:].add_(0.5)
    assert x.tolist() == [[-1, 1, 20, 3], [-1, 5, 60, 7], [-1, 9, 100, 11.5]]
    assert x._version > version
    assert x.mT.untyped_storage().data_ptr() == x.untyped_storage().data_ptr()
    assert torch.empty(0, device=x.device).set_(x.untyped_storage(), 1, (2,), (4,)).tolist() == [
        1,
        5,
    ]


def test_results_can_be_written_to_what_is_given(x):
    target = torch.empty_like(x)
    assert torch.add(x, x, out=target) is target
    assert torch.equal(target, x * 2)
    assert torch.matmul(x, x.mT, out=torch.empty(0, device=x.device)).shape == (3, 3)
    assert torch.empty(0, device=x.device).resize_(3).shape == (3,)


def test_gradients_are_those_of_the_cpu(pretend):
    query, key, value = (randn(1, 2, 5, 8, seed=seed) for seed in range(3))
    grads = []
    for device in ("cpu", pretend):
        inputs = [t.detach().to(device).requires_grad_() for t in (query, key, value)]
        plain(*inputs, is_causal=True).square().sum().backward()
        grads.append([t.grad for t in inputs])
    for here, there in zip(*grads, strict=True):
        assert there.device.type == "pretend"
        torch.testing.assert_close(there.cpu(), here)


def test_random_numbers_have_a_state_of_their_own(pretend):
    torch.manual_seed(3)
    first, here = torch.rand(3, device=pretend), torch.get_rng_state()
    torch.manual_seed(3)
    assert torch.equal(torch.get_rng_state(), here)
    assert torch.equal(torch.rand(3, device=pretend), first)
    before = random_states()["pretend"]
    with borrowed(nn.Identity(), first):
        torch.rand(3, device=pretend)
    assert torch.equal(random_states()["pretend"][0], before[0])


def test_modules_and_tensors_are_moved_and_copied(x):
    module = nn.BatchNorm1d(4).to("pretend")
    module(x)
    copied = copy.deepcopy((module, x))
    module.running_mean.zero_()
    assert copied[0].running_mean.device == copied[1].device == x.device
    assert copied[0].running_mean.abs().sum() > 0
    assert copied[1].untyped_storage().data_ptr() != x.untyped_storage().data_ptr()


def test_what_the_host_waits_for_is_counted(x):
    with reads() as seen:
        y = (x * 2).softmax(-1).sum(-1)
        y[0] = 3.0
    assert seen.count == 0
    waits = {
        "a number": lambda: x.sum().item(),
        "a truth": lambda: bool((x > 0).all()),
        "a list": lambda: x.tolist(),
        "a copy": lambda: x.cpu(),
        "as many elements as hold": lambda: x[x > 3],
        "where it holds": lambda: (x > 3).nonzero(),
        "equality": lambda: torch.equal(x, x),
    }
    for name, wait in waits.items():
        with reads() as seen:
            wait()
        assert seen.count == 1, name
        assert seen.copied == (12 if name in ("a list", "a copy") else 1), name


# --- assertions on weights


TRIL = torch.ones(6, 6, dtype=torch.bool).tril()
LENGTHS = torch.tensor([6, 4])
REAL = (torch.arange(6) < LENGTHS[:, None])[:, None, None]


def softmax(mask=None):
    scores = randn(2, 3, 6, 6)
    return (scores if mask is None else scores.masked_fill(~mask, -torch.inf)).softmax(-1)


def spoiled(weights):
    """Weights with one element too large: above the diagonal, on padding."""
    weights = weights.clone()
    weights[1, 1, 2, 5] += 0.25
    return weights


FREE, CAUSAL, PADDED = softmax(), softmax(TRIL), softmax(REAL)
UNIFORM, ONE_HOT = torch.full((2, 3, 6, 6), 1 / 6), torch.eye(6).expand(2, 3, 6, 6)
VALUE = randn(2, 3, 6, 4, seed=5)

# The assertion, weights that pass and that do not, its arguments, and how often the host waits.
ON_WEIGHTS = [
    ("assert_row_stochastic", FREE, spoiled(FREE), {}, 1),
    ("assert_row_stochastic", CAUSAL, spoiled(CAUSAL), {"mask": TRIL}, 1),
    ("assert_doubly_stochastic", UNIFORM, spoiled(UNIFORM), {}, 1),
    ("assert_one_hot", ONE_HOT, spoiled(FREE), {}, 1),
    ("assert_uniform", UNIFORM, spoiled(UNIFORM), {}, 1),
    ("assert_entropy", UNIFORM, FREE, {"minimum": 1.7}, 1),
    ("assert_masked", CAUSAL, spoiled(CAUSAL), {"mask": TRIL}, 1),
    ("assert_support", CAUSAL, spoiled(CAUSAL), {"mask": TRIL}, 1),
    ("assert_causal", CAUSAL, spoiled(CAUSAL), {}, 1),
    ("assert_padding_masked", PADDED, spoiled(PADDED), {"lengths": LENGTHS.tolist()}, 1),
    # The lengths have to be read as well.
    ("assert_padding_masked", PADDED, spoiled(PADDED), {"lengths": LENGTHS}, 2),
    ("assert_reproduces_output", FREE, spoiled(FREE), {"value": VALUE, "output": FREE @ VALUE}, 1),
]


def moved(arguments, device):
    return {
        name: value.to(device) if isinstance(value, torch.Tensor) else value
        for name, value in arguments.items()
    }


def said(call):
    """What a call raises, its device apart, or None."""
    try:
        call()
    except AssertionError as error:
        return re.sub("pretend(:0)?", "cpu", str(error))
    return None


@pytest.mark.parametrize(("name", "good", "bad", "arguments", "budget"), ON_WEIGHTS)
def test_an_assertion_on_weights_waits_once_and_says_the_same(
    name, good, bad, arguments, budget, pretend
):
    check, there = getattr(attnheat, name), moved(arguments, pretend)
    good, on_device = good.to(pretend), bad.to(pretend)
    with reads() as seen:
        check(good, **there)
    assert seen.count == budget, seen.names
    assert seen.copied <= 4
    message = said(lambda: check(bad, **arguments))
    assert message is not None
    assert said(lambda: check(on_device, **there)) == message


# --- assertions on callables


def leaking(query, key, value, attn_mask=None, is_causal=False):
    """Attention in which a query sees one key too many."""
    mask = torch.ones(query.shape[-2], key.shape[-2], dtype=torch.bool, device=query.device)
    return plain(query, key, value, mask.tril(1) if is_causal else attn_mask)


def unscaled(query, key, value, attn_mask=None, is_causal=False):
    return plain(query, key, value, attn_mask, is_causal=is_causal, scale=1.0)


def mixing(query, key, value, attn_mask=None, is_causal=False):
    """Attention to which the mean of the batch is added."""
    output = plain(query, key, value, attn_mask, is_causal=is_causal)
    return output + output.mean(0)


def by_position(query, key, value, attn_mask=None):
    """Attention that counts the keys it is given."""
    bias = torch.arange(key.shape[-2], device=key.device, dtype=key.dtype)
    return plain(query, key, value, bias)


class Counting:
    """Attention that remembers how often it was called."""

    def __init__(self):
        self.calls = 0

    def __call__(self, query, key, value):
        self.calls += 1
        return plain(query, key, value) + self.calls


def packed(query, key, value):
    """Attention that reads the memory of a key, whatever its strides say."""
    key = torch.as_strided(key, key.shape, torch.empty(key.shape).stride(), 0)
    return plain(query, key, value)


# The assertion, a subject that does not pass, its arguments, and how often the host waits while
# attention passes. What is learnt by trying grows with the sizes: 2 batch entries, 3 heads, 6 keys.
ON_CALLABLES = [
    ("assert_no_leakage", leaking, {"is_causal": True}, 22),
    ("assert_padding_invariant", by_position, {}, 5),
    ("assert_batch_independent", mixing, {}, 3),
    ("assert_key_permutation_invariant", by_position, {}, 4),
    ("assert_decode_matches_prefill", leaking, {"is_causal": True}, 4),
    ("assert_deterministic", Counting(), {}, 2),
    ("assert_convex", mixing, {}, 4),
    ("assert_matches_reference", unscaled, {}, 9),
    ("assert_gradients_match", unscaled, {}, 9),
    ("assert_layout_invariant", packed, {}, 147),
]  # fmt: skip


@pytest.mark.parametrize(("name", "bad", "arguments", "budget"), ON_CALLABLES)
def test_an_assertion_on_callables_waits_seldom_and_says_the_same(
    name, bad, arguments, budget, pretend
):
    check, inputs = getattr(attnheat, name), qkv()
    there = [t.to(pretend) for t in inputs]
    with reads() as seen:
        check(sdpa, *there, **arguments)
    message = said(lambda: check(copy.copy(bad), *inputs, **arguments))
    assert message is not None
    assert said(lambda: check(copy.copy(bad), *there, **arguments)) == message
    assert seen.count <= budget, seen.names


def test_dropout_on_the_device_is_seen(pretend):
    inputs = [t.to(pretend) for t in qkv()]
    attnheat.assert_deterministic(sdpa, *inputs, dropout=0.1, runs=50)

    def always(query, key, value):
        return sdpa(query, key, value, dropout_p=0.5)

    with pytest.raises(AssertionError, match="random numbers are drawn"):
        attnheat.assert_deterministic(always, *inputs)


def test_what_is_stated_may_be_on_the_cpu(pretend):
    weights, padded, free = (w.to(pretend) for w in (CAUSAL, PADDED, FREE))
    attnheat.assert_row_stochastic(weights, mask=TRIL)
    attnheat.assert_masked(weights, TRIL)
    attnheat.assert_support(weights, TRIL)
    attnheat.assert_padding_masked(padded, LENGTHS)
    with pytest.raises(TypeError, match="got weights on pretend:0, value on cpu, output on cpu"):
        attnheat.assert_reproduces_output(free, VALUE, FREE @ VALUE)
    bias = torch.zeros(6, 6, device=pretend).masked_fill(~TRIL.to(pretend), -torch.inf)
    inputs = [t.to(pretend) for t in qkv()]
    attnheat.assert_no_leakage(sdpa, *inputs, attn_mask=bias, may_see=TRIL)
    model, ids = copy.deepcopy(causal_encoder()).to(pretend), tokens(2, 6).to(pretend)
    attnheat.assert_no_leakage(model, ids, may_see=TRIL, must_see=False)
    layer, tensor = copy.deepcopy(encoder_layer()).to(pretend), randn(2, 6, WIDTH).to(pretend)
    for assertion in (attnheat.assert_padding_invariant, attnheat.assert_batch_independent):
        assertion(layer, tensor, lengths=LENGTHS)
    documents = torch.tensor([0, 0, 0, 1, 1, 1])
    with pytest.raises(AssertionError, match="of document 1, its own is 0"):
        attnheat.assert_no_leakage(layer, tensor, documents=documents)


# --- what is made, examined, captured and drawn


CASE = {"mask": ("causal_top_left", "padding"), "scoring": "additive"}


def test_cases_are_made_on_the_device(pretend):
    here = attnheat.make_attention(**CASE)
    with reads() as seen:
        there = attnheat.make_attention(**CASE, device=pretend)
    assert seen.count <= 1
    assert there.device.type == "pretend"
    for name in ("query", "key", "value", "mask", "scores", "weights", "output"):
        torch.testing.assert_close(getattr(there, name).cpu(), getattr(here, name), msg=name)
    with reads() as seen:
        hard = [attnheat.hard_case(name, device=pretend) for name in attnheat.HARD_CASES]
    assert seen.count == 0
    assert {case.query.device.type for case in hard} == {"pretend"}


@pytest.mark.matrix(of=2)
@pytest.mark.parametrize("subject", [plain, unscaled])
def test_an_examination_finds_the_same(subject, pretend):
    found = []
    for device in ("cpu", "pretend"):
        spec = attnheat.AttentionSpec(subject, devices=(device,), dtypes=("float32",))
        report = attnheat.check_attention(spec, quick=True)
        results = [
            (r.name, r.status, re.sub("pretend(:0)?", "cpu", r.message)) for r in report.results
        ]
        found.append((results, str(attnheat.diagnose(spec))))
    (here, diagnosis), (there, there_diagnosed) = found
    assert there == here
    assert there_diagnosed == diagnosis


def captured(model, call, **options):
    with torch.no_grad(), attnheat.capture_attention(model, **options) as trace:
        call()
    return trace


def without_residuals(trace):
    """What a trace says of its records; how far rounding moved them is another on each device."""
    return [line.split()[:-1] for line in str(trace).splitlines()]


def attend_plainly(device):
    query, key, value = (t.to(device) for t in qkv())
    return None, lambda: plain(query, key, value, is_causal=True)


def attend_fused(device):
    query, key, value = (t.to(device) for t in qkv())
    return None, lambda: sdpa(query, key, value, is_causal=True)


def attend_multihead(device):
    model, inputs = copy.deepcopy(multihead()).to(device), randn(2, 6, WIDTH).to(device)
    return model, lambda: model(inputs, inputs, inputs)


def bert(implementation):
    def on(device):
        model = copy.deepcopy(of_transformers("bert", implementation)).to(device)
        ids = tokens(2, 6).to(device)
        return model, lambda: model(ids)

    return on


# Two waits for each attention that is seen.
MODELS = {
    "written out": (attend_plainly, 2),
    "scaled_dot_product_attention": (attend_fused, 2),
    "nn.MultiheadAttention": (attend_multihead, 2),
    "eager transformer": (bert("eager"), 4),
    "transformer": (bert("sdpa"), 4),
}


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("keep", ["inputs", "weights", "statistics"])
def test_capture_sees_the_same(model, keep, pretend):
    make, budget = MODELS[model]
    here = captured(*make("cpu"), keep=keep)
    subject, call = make(pretend)
    with reads() as seen:
        there = captured(subject, call, keep=keep)
    assert seen.count <= budget * (3 if keep == "statistics" else 1), seen.names
    assert without_residuals(there) == without_residuals(here)
    for a, b in zip(here, there, strict=True):
        assert b.trusted
        if keep == "statistics":
            torch.testing.assert_close(b.statistics.entropy, a.statistics.entropy)
        else:
            assert b.weights.device.type == "pretend"
            torch.testing.assert_close(b.weights.cpu(), a.weights)
    if keep != "statistics":
        with reads() as seen:
            attnheat.assert_row_stochastic(there)
        assert seen.count == len(there)
    if keep == "inputs":
        assert str(attnheat.diagnose(there)) == str(attnheat.diagnose(here))


@pytest.mark.parametrize("model", ["nn.MultiheadAttention", "transformer"])
def test_a_capture_is_verified_on_the_device(model, pretend):
    subject, call = MODELS[model][0](pretend)
    assert captured(subject, call, verify=True)


def test_pictures_are_the_same_and_fetched_at_once(pretend, tmp_path):
    weights = softmax(TRIL)
    for name, given, mask in (
        ("here.png", weights, TRIL),
        ("there.png", weights.to(pretend), TRIL.to(pretend)),
    ):
        with reads() as seen:
            figure = attnheat.show_heatmaps(given, "Keys", "Queries", mask=mask)
        figure.savefig(tmp_path / name)
    assert seen.count <= 4, seen.names
    assert (tmp_path / "here.png").read_bytes() == (tmp_path / "there.png").read_bytes()
    read = attnheat.read_heatmaps(tmp_path / "there.png")
    np.testing.assert_allclose(read.values, weights.numpy(), atol=1e-6)
    with reads() as seen:
        text = attnheat.format_heatmap(weights.to(pretend), mask=TRIL.to(pretend))
    assert seen.count <= 2, seen.names
    assert text == attnheat.format_heatmap(weights, mask=TRIL)
