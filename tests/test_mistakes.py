"""The known defect that gives a wrong output is named, and nothing else is."""

import pytest
import torch

from pytest_attnheat.attention.call import Call
from pytest_attnheat.attention.outcomes import likely_mistake

DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16]


def tensors(*lead, length=7, width=16, value_dim=16, dtype=torch.float64, key_heads=None):
    generator = torch.Generator().manual_seed(3)
    keys = lead if key_heads is None else (*lead[:-1], key_heads)

    def drawn(*shape):
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)

    return drawn(*lead, 5, width), drawn(*keys, length, width), drawn(*keys, length, value_dim)


def computed(query, key, value, *, scale=0.25, softcap=None, sinks=None, slopes=None):
    """Attention without a mask in float64, returned in the dtype of the query."""
    scores = query.double() @ key.double().mT * scale
    scores = scores if softcap is None else softcap * torch.tanh(scores / softcap)
    if slopes is not None:
        at = torch.arange(scores.shape[-2])[:, None] - torch.arange(scores.shape[-1])
        scores = scores - slopes.double()[:, None, None] * at.abs()
    weights = scores.exp()
    total = weights.sum(-1, keepdim=True)
    total = total if sinks is None else total + sinks.double().exp()[:, None, None]
    return (weights / total @ value.double()).to(query.dtype)


@pytest.mark.matrix
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("feature", ["softcap", "sinks", "alibi"])
def test_a_mistake_is_named_beside_what_else_is_declared(feature, dtype):
    query, key, value = tensors(2, 4, dtype=dtype)
    given = {"softcap": 2.0, "sinks": torch.tensor([0.5, -1, 2, 0]), "alibi": torch.ones(4) / 4}
    declared = {feature: given[feature]}
    by_hand = {"slopes" if feature == "alibi" else feature: given[feature]}
    call = Call(query, key, value, **declared)
    found = likely_mistake(call, computed(query, key, value, scale=1.0, **by_hand))
    assert found == "the output is that of attention whose scores are not scaled"
    assert likely_mistake(call, computed(query, key, value, **by_hand)) is None


@pytest.mark.parametrize("feature", ["softcap", "sinks", "alibi", "bias"])
def test_a_feature_that_is_left_out_is_named_and_no_mask_where_there_is_none(feature):
    given = {"softcap": 2.0, "sinks": torch.tensor([0.5, -1, 2, 0]), "alibi": torch.ones(4) / 4}
    given["bias"] = torch.linspace(-1, 1, 35).view(5, 7)
    query, key, value = tensors(2, 4)
    found = likely_mistake(
        Call(query, key, value, **{feature: given[feature]}), computed(query, key, value)
    )
    assert found == f"the output is that of attention that leaves out {feature}"


def test_mistakes_that_give_the_same_output_are_all_named():
    query, key, value = tensors(2, 2, value_dim=32)
    found = likely_mistake(Call(query, key, value), computed(query, key, value, scale=32**-0.5))
    assert found == (
        "the output is that of attention whose scale is taken from the width of the values, or "
        "whose scale is taken from the whole embedding, heads * head_dim, or whose scale is that "
        "of a wider head: head_dim as it is padded, or a fixed one"
    )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("part", [0.01, 0.1, 1.0])
def test_an_output_that_no_known_mistake_gives_is_left_without_a_name(part, dtype):
    query, key, value = tensors(2, 4, dtype=dtype)
    wrong = computed(query, key, value)
    noise = torch.randn(wrong.shape, generator=torch.Generator().manual_seed(1))
    assert likely_mistake(Call(query, key, value), (wrong + part * noise).to(dtype)) is None


@pytest.mark.parametrize("lead", [(), (4,), (2, 4), (3, 2, 4)])
def test_leading_dimensions_are_any(lead):
    query, key, value = tensors(*lead)
    call = Call(query, key, value, mask=torch.arange(7) < 4)
    found = likely_mistake(call, computed(query, key, value))
    assert found == "the output is that of attention that ignores the mask"


def test_what_may_be_left_open_is_not_compared():
    query, key, value = tensors(2, 4)
    mask = torch.ones(5, 7, dtype=torch.bool)
    mask[2] = False
    output = computed(query, key, value, scale=1.0)
    output[..., 2, :] = torch.nan
    call = Call(query, key, value, mask=mask, fully_masked="undefined")
    assert likely_mistake(call, output).endswith("whose scores are not scaled")
    call = Call(query, key, value, mask=mask, fully_masked="zero")
    assert likely_mistake(call, output) is None


def test_an_output_of_zeros_is_called_that_and_nothing_else():
    query, key, value = (torch.randn(1, 2, 5, 8) for _ in range(3))
    call = Call(query, key, value)
    assert likely_mistake(call, torch.zeros_like(value)) == "every number of the output is 0"
    hidden = torch.zeros(5, 5, dtype=torch.bool)
    assert likely_mistake(Call(query, key, value, mask=hidden), torch.zeros_like(value)) is None
