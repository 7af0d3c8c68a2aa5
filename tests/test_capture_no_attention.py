"""Softmaxes that are no attention, and attention that must not be mistaken for one of them."""

import pytest
import torch
from capture_oracles import assert_weights, draw, plain_softmax
from torch import nn
from torch.nn import functional as F  # noqa: N812

from pytest_attnheat import capture_attention

X = draw("x", 2, 7, 4)


def seen(function, *args):
    with capture_attention(allow_empty=True) as trace:
        function(*args)
    return list(trace)


torch.manual_seed(3)
TO_EXPERTS, TO_CLASSES, TO_ONE = nn.Linear(4, 4), nn.Linear(4, 9), nn.Linear(4, 1)
EXPERTS = nn.ModuleList(nn.Linear(4, 4) for _ in range(4))
TABLE = nn.Embedding(9, 4)
CODEBOOK = nn.Parameter(draw("codebook", 9, 4))
RAW = nn.Parameter(draw("raw", 4, 9))


def classifier(x):
    return TO_CLASSES(x).softmax(-1)


def expected_value_of_classes(x):
    return TO_CLASSES(x).softmax(-1) @ torch.arange(9.0)


def expected_score_of_classes(x):
    return TO_CLASSES(x).softmax(-1) @ torch.arange(9.0).unsqueeze(-1)


def router_by_einsum(x):
    outputs = torch.stack([expert(x) for expert in EXPERTS], -2)
    return torch.einsum("ble,bled->bld", TO_EXPERTS(x).softmax(-1), outputs)


def router_by_product(x):
    outputs = torch.stack([expert(x) for expert in EXPERTS], -2)
    return (TO_EXPERTS(x).softmax(-1).unsqueeze(-2) @ outputs).squeeze(-2)


def router_with_noise(x):
    outputs = torch.stack([expert(x) for expert in EXPERTS], -2)
    logits = torch.zeros(4) + TO_EXPERTS(x)
    return (F.softmax(logits / 0.7, dim=-1).unsqueeze(-2) @ outputs).squeeze(-2)


def router_of_the_best(x):
    outputs = torch.stack([expert(x) for expert in EXPERTS], -2)
    best, which = TO_EXPERTS(x).softmax(-1).topk(2, -1)
    chosen = outputs.gather(-2, which.unsqueeze(-1).expand(*which.shape, 4))
    return (best.unsqueeze(-2) @ chosen).squeeze(-2)


def gate(x):
    return torch.sigmoid(TO_ONE(x)) * x


def gated_unit(x):
    return F.glu(TO_EXPERTS(x).repeat(1, 1, 2)) @ TO_CLASSES.weight.mT


def gate_before_a_product(x):
    return torch.sigmoid(TO_EXPERTS(x)) @ x.mT


def loss(x):
    return F.log_softmax(TO_CLASSES(x), -1) @ torch.eye(9)


def soft_embedding(x):
    return TO_CLASSES(x).softmax(-1) @ TABLE.weight


def soft_embedding_of_raw_logits(x):
    return (x @ RAW).softmax(-1) @ TABLE.weight


def soft_embedding_cast(x):
    return (x @ RAW).softmax(-1).double() @ TABLE.weight.double()


def soft_embedding_by_einsum(x):
    return torch.einsum("blv,vd->bld", TO_CLASSES(x).softmax(-1), TABLE.weight)


def tied_embedding(x):
    return (x @ TABLE.weight.mT).softmax(-1) @ TABLE.weight


def tied_embedding_linear(x):
    return F.linear(F.linear(x, TABLE.weight).softmax(-1), TABLE.weight.mT)


def codebook(x):
    return F.gumbel_softmax(x @ CODEBOOK.mT, dim=-1) @ CODEBOOK


def codebook_by_distance(x):
    distance = (x.unsqueeze(-2) - CODEBOOK).square().sum(-1)
    return (-distance).softmax(-1) @ CODEBOOK


def sampling(x):
    logits = TO_CLASSES(x[:, -1]) / 0.7
    return torch.multinomial(logits.softmax(-1), 1)


def rollout(x):
    weights = (x @ x.mT).softmax(-1)
    return weights @ weights @ weights


def averaging(x):
    return torch.full((7, 7), 1 / 7) @ x


def similarity(x):
    return F.normalize(x, dim=-1) @ F.normalize(x, dim=-1).mT


@pytest.mark.parametrize("grad", [True, False, None], ids=["gradients", "none", "inference"])
@pytest.mark.parametrize("function", [
    classifier, expected_value_of_classes, expected_score_of_classes, router_by_einsum,
    router_by_product, router_with_noise, router_of_the_best, gate, gated_unit,
    gate_before_a_product, loss, soft_embedding, soft_embedding_of_raw_logits,
    soft_embedding_cast, soft_embedding_by_einsum, tied_embedding, tied_embedding_linear,
    codebook, codebook_by_distance, sampling, rollout, averaging, similarity,
], ids=lambda f: f.__name__)  # fmt: skip
def test_no_attention(function, grad):
    context = torch.inference_mode() if grad is None else torch.set_grad_enabled(grad)
    torch.manual_seed(5)
    with context:
        assert seen(function, X) == []


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_autocast_and_other_dtypes_do_not_make_attention_of_a_classifier(dtype):
    model = nn.Sequential(nn.Linear(4, 9), nn.Softmax(-1), nn.Linear(9, 4)).to(dtype)
    with torch.autocast("cpu"):
        assert seen(model, X.to(dtype)) == []


def test_a_classifier_over_another_axis_than_its_classes_is_pooling():
    """Per-class attention over positions: the softmax of a linear layer, over the sequence."""
    (record,) = seen(lambda x: TO_CLASSES(x).softmax(1).mT @ x, X)
    assert record.shape == (2, 1, 9, 7)
    assert_weights(record, plain_softmax(TO_CLASSES(X).mT).unsqueeze(1))


def test_learnt_queries_attend():
    latents = nn.Parameter(draw("latents", 3, 4))
    (record,) = seen(lambda x: (latents @ x.mT).softmax(-1) @ x, X)
    assert record.shape == (2, 1, 3, 7)
    assert_weights(record, plain_softmax(latents @ X.mT).unsqueeze(1))


def test_learnt_keys_and_values_behind_a_projection_attend():
    """External memory: keys are made of a parameter by a layer, and so are values."""
    memory = draw("memory", 9, 4)
    (record,) = seen(lambda x: (x @ EXPERTS[0](memory).mT).softmax(-1) @ EXPERTS[1](memory), X)
    assert record.shape == (2, 1, 7, 9)


def test_the_attention_beside_a_rollout_is_seen():
    def both(x):
        weights = (x @ x.mT).softmax(-1)
        return weights @ x, weights @ weights

    (record,) = seen(both, X)
    assert_weights(record, plain_softmax(X @ X.mT).unsqueeze(1))


def test_the_attention_of_a_model_with_a_classifier_is_alone():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.attention = nn.MultiheadAttention(4, 2, batch_first=True)
            self.head = nn.Linear(4, 9)

        def forward(self, x):
            return self.head(self.attention(x, x, x)[0]).softmax(-1)

    model = Model().eval()
    with capture_attention(model) as trace:
        model(X)
    assert trace.layers == ("attention",)
    assert len(trace) == 1
