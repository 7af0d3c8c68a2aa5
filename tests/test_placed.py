"""Weights that lie on several ranks are judged where they lie, and as the whole tensor is."""

import multiprocessing

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import (
    DTensor,
    Partial,
    Replicate,
    Shard,
    distribute_tensor,
    init_device_mesh,
)

from pytest_attnheat import (
    assert_causal,
    assert_doubly_stochastic,
    assert_entropy,
    assert_masked,
    assert_one_hot,
    assert_padding_masked,
    assert_reproduces_output,
    assert_row_stochastic,
    assert_same_attention,
    assert_support,
    assert_uniform,
)
from pytest_attnheat.attention.placed import Placed
from pytest_attnheat.baselines.layers import layers_of
from pytest_attnheat.contract.ranks import on_ranks

# Sharded by batch, head, query and key, and on each rank as a whole.
WAYS = ("batch", "head", "query", "key", "whole")


def cases():
    """Assertions that hold, and that do not: (name, assertion, weights, arguments)."""
    generator = torch.Generator().manual_seed(0)

    def drawn(*shape):
        return torch.randn(shape, generator=generator)

    # Sizes that no number of ranks divides.
    weights, square = drawn(2, 3, 9, 11).softmax(-1), drawn(2, 3, 9, 9).softmax(-1)
    wrong, negative = weights.clone(), weights.clone()
    wrong[1, 2, 5] *= 1.7
    wrong[0, 1, 3] *= 0.5
    wrong[1, 0, 2, 7] = torch.nan
    negative[1, 2, 8, 10] = -0.1
    mask = drawn(2, 1, 9, 11) > -0.5
    masked = weights * mask
    masked /= masked.sum(-1, keepdim=True)
    leaking = masked.clone()
    leaking[0, 2, 4, int((~mask[0, 0, 4]).nonzero()[0])] = 1e-9
    causal = square.tril() / square.tril().sum(-1, keepdim=True)
    peeking = causal.clone()
    peeking[1, 2, 3, 6] = 0.2
    return [
        ("rows", assert_row_stochastic, weights, {}),
        ("wrong rows", assert_row_stochastic, wrong, {}),
        ("a negative weight", assert_row_stochastic, negative, {}),
        ("rows and columns", assert_doubly_stochastic, square, {}),
        ("one-hot", assert_one_hot, weights, {}),
        ("uniform", assert_uniform, masked, {"mask": mask}),
        ("entropy", assert_entropy, weights, {"maximum": 1.9}),
        ("masked", assert_masked, masked, {"mask": mask}),
        ("a leak", assert_masked, leaking, {"mask": mask}),
        ("no mask in use", assert_masked, weights, {"mask": mask}),
        ("nothing masked", assert_masked, weights, {"mask": torch.ones(9, 11).bool()}),
        ("support", assert_support, masked * (drawn(2, 3, 9, 11) > -2), {"mask": mask}),
        ("fully masked", assert_row_stochastic, weights, {"mask": mask & (mask.cumsum(-2) > 2)}),
        ("causal", assert_causal, causal, {}),
        ("not causal", assert_causal, square, {}),
        ("one peek", assert_causal, peeking, {}),
        ("window", assert_causal, causal, {"window": 3}),
        ("padding", assert_padding_masked, weights, {"lengths": [8, 11]}),
        *(
            (name, assert_reproduces_output, weights, {"value": value, "output": output})
            for name, weights, value, output in products(drawn)
        ),
    ]


def products(drawn):
    """Weights, a value and an output that they made or did not: (name, all three)."""
    weights, value = drawn(2, 3, 9, 11).softmax(-1), drawn(2, 3, 11, 5)
    made = weights @ value
    one_off, felt, nothing = made.clone(), value.clone(), made.clone()
    one_off[1, 2, 7, 3] += 0.5
    felt[1, 0, 6, 2] = torch.nan
    nothing[0, 1] = 0
    sharp = torch.eye(11)[torch.arange(18) % 11].view(2, 1, 9, 11).repeat(1, 3, 1, 1)
    square = drawn(1, 2, 9, 9).softmax(-1)
    many, few = drawn(2, 6, 9, 11).softmax(-1), drawn(2, 2, 11, 5)
    grouped, tiled = (many @ one for one in (few.repeat_interleave(3, 1), few.repeat(1, 3, 1, 1)))
    averaged = weights.mean(1, keepdim=True).expand(-1, 3, -1, -1).contiguous()
    return [
        ("made", weights, value, made),
        ("one element", weights, value, one_off),
        ("another head", weights, value, (weights[:, [1, 0, 2]] @ value)),
        ("a factor", weights, value, made * 1.5),
        ("a map of zeros", weights, value, nothing),
        ("NaN that is felt", weights, felt, made),
        ("NaN that is not felt", sharp, felt.masked_fill(sharp.mT.sum(-1)[..., None] == 0,
                                                         torch.nan), sharp @ value),
        ("changed places", square, drawn(1, 2, 9, 5), square.mT @ drawn(1, 2, 9, 5)),
        ("averaged", averaged, value, made),
        ("two dimensions", weights[0, 0], value[0, 0], made[0, 0]),
        ("grouped", many, few, grouped),
        ("grouped, tiled", many, few, tiled),
        ("merged", weights, value, made.transpose(1, 2).flatten(2)),
        ("merged, grouped, wrong", many, few, tiled.transpose(1, 2).flatten(2)),
        ("merged as it lies", weights, value, made.flatten(1).view(2, 9, 15)),
        ("heads that share", weights[:, 0], value, weights[:, :1] @ value),
        ("heads that do not share", weights[:, 0], value, made),
    ]  # fmt: skip


def said(assertion, weights, **arguments):
    try:
        assertion(weights, **arguments)
    except (AssertionError, ValueError) as error:
        return f"{type(error).__name__}: {error}"
    return "it holds"


WHOLE = {name: said(assertion, *rest, **more) for name, assertion, *rest, more in cases()}


def on_each(ways):
    """What is said on this rank of each case, in each way in which it may lie on ranks."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    found = {}
    for name, assertion, weights, more in cases():
        for way in ways:
            dims = WAYS[4 - weights.ndim : 4]
            placement = Shard(dims.index(way)) if way in dims else Replicate()
            placed = distribute_tensor(weights, mesh, [placement])
            found[name, way] = said(assertion, placed, **more)
    return found


def on_a_grid():
    mesh = init_device_mesh("cpu", (2, 2))
    return {
        (name, str(cut)): said(assertion, distribute_tensor(weights, mesh, cut), **more)
        for name, assertion, weights, more in cases()
        for cut in ([Shard(1), Shard(3)], [Shard(2), Replicate()])
        if weights.ndim == 4
    }


@pytest.fixture(autouse=True)
def nothing_left():
    yield
    assert not multiprocessing.active_children()


@pytest.mark.parametrize("ranks", [2, 3])
def test_each_rank_says_of_each_shard_what_is_said_of_the_whole(ranks):
    assert any(text == "it holds" for text in WHOLE.values())
    for found in on_ranks(ranks, on_each, WAYS):
        assert found == {(name, way): WHOLE[name] for name in WHOLE for way in WAYS}


def test_so_it_is_of_what_is_cut_in_two_ways():
    for found in on_ranks(4, on_a_grid):
        assert {name for name, _ in found} == {name for name, _, one, _ in cases() if one.ndim > 3}
        assert all(text == WHOLE[name] for (name, _), text in found.items())


def large(dim):
    """How much a rank holds of a map that it judges, and of one that it reads a row of."""
    mesh = init_device_mesh("cpu", (2,))
    weights = distribute_tensor(torch.randn(1, 2, 64, 96).softmax(-1), mesh, [Shard(dim)])
    whole = DTensor.full_tensor
    DTensor.full_tensor = lambda *_, **__: 1 / 0  # nobody gathers it
    sizes = []
    reduced = dist.all_reduce

    def counted(tensor, *rest):
        sizes.append(tensor.numel())
        return reduced(tensor, *rest)

    dist.all_reduce = counted
    try:
        texts = [said(assert_one_hot, weights)]
        values = {"value": torch.randn(1, 2, 96, 3), "output": torch.ones(1, 2, 64, 3)}
        rows, sizes[:] = max(sizes), []
        texts.append(said(assert_reproduces_output, weights, **values))
    finally:
        DTensor.full_tensor, dist.all_reduce = whole, reduced
    return texts, rows, max(sizes)


@pytest.mark.parametrize("dim", [1, 2, 3])
def test_no_rank_gathers_the_whole(dim):
    texts, rows, products = zip(*on_ranks(2, large, dim), strict=True)
    assert "rows do not put all weight on one key" in texts[0][0]
    assert max(rows) <= 6 * 96  # the rows of the small picture
    assert "output elements are not weights @ value" in texts[0][1]
    assert max(products) < 2 * 64 * 96 / 4  # some rows, and a few numbers of each


def with_masks():
    mesh = init_device_mesh("cpu", (2,))
    cased = {name: (weights, more) for name, _, weights, more in cases()}
    weights, more = cased["a leak"]
    found = []
    for mask in (more["mask"], more["mask"].expand(weights.shape)):
        for dim in (0, 2, 3):
            placed = distribute_tensor(weights, mesh, [Shard(dim)])
            found.append(
                said(assert_masked, placed, mask=distribute_tensor(mask, mesh, [Shard(2)]))
            )
    return found


def test_a_mask_may_lie_on_ranks_as_well():
    for found in on_ranks(2, with_masks):
        assert [one.partition("\n")[0] for one in found] == [WHOLE["a leak"].partition("\n")[0]] * 6


def with_all_three_on_ranks():
    mesh, other = (init_device_mesh("cpu", shape) for shape in ((2,), (1, 2)))
    found = {}
    for name, assertion, weights, more in cases():
        if assertion is not assert_reproduces_output:
            continue
        for dims in ((0, 1, 2), (2, 3, 0), (3, 2, 1)):
            tensors = zip(dims, (weights, *more.values()), strict=True)
            weights_dim, *rest = (dim % one.ndim for dim, one in tensors)
            placed = {name: distribute_tensor(one, mesh, [Shard(dim)])
                      for (name, one), dim in zip(more.items(), rest, strict=True)}  # fmt: skip
            placed_weights = distribute_tensor(weights, mesh, [Shard(weights_dim)])
            found[name, dims] = said(assertion, placed_weights, **placed)
        placed["value"] = distribute_tensor(more["value"], other, [Replicate(), Shard(0)])
        found[name, "another mesh"] = said(assertion, placed_weights, **placed)
    return found


def test_the_value_and_the_output_may_lie_on_ranks_as_well():
    for found in on_ranks(2, with_all_three_on_ranks):
        assert found == {(name, dims): WHOLE[name] for name, dims in found}


def with_a_mask_on_another_mesh():
    weights, more = next((one, more) for name, _, one, more in cases() if name == "a leak")
    mask = more["mask"].expand(weights.shape)
    placed = distribute_tensor(weights, init_device_mesh("cpu", (2, 1)), [Shard(1), Shard(3)])
    other = distribute_tensor(mask, init_device_mesh("cpu", (2,)), [Shard(2)])
    return said(assert_masked, weights, mask=mask), said(assert_masked, placed, mask=other)


def test_a_mask_may_lie_on_another_mesh():
    for whole, placed in on_ranks(2, with_a_mask_on_another_mesh):
        assert placed == whole


def misplaced():
    weights = torch.randn(1, 2, 6, 8).softmax(-1)
    mesh = init_device_mesh("cpu", (2,))
    cut = weights.split([4, 2], 2)[dist.get_rank()]
    like = {"shape": weights.shape, "stride": weights.stride(), "run_check": False}
    return [
        said(assert_row_stochastic, one)
        for one in (
            distribute_tensor(weights, DeviceMesh("cpu", [1, 0]), [Shard(3)]),
            DTensor.from_local(cut, mesh, [Shard(2)], **like),
            distribute_tensor(weights[0, 0, 0], mesh, [Shard(0)]),
            distribute_tensor(weights[..., :0], mesh, [Shard(1)]),
            distribute_tensor(weights, DeviceMesh("cpu", [0]), [Shard(3)]),
        )
    ]


def test_what_lies_in_no_known_place_or_holds_nothing_is_refused_and_said_of_the_whole():
    for rank, (order, cut, line, nothing, other) in enumerate(on_ranks(2, misplaced)):
        assert "over ranks [1, 0], which are not in ascending order; accepted is" in order
        shape = (1, 2, 4 - 2 * rank, 8)
        assert f"whose shard on rank {rank} has shape {shape}; accepted is" in cut
        assert "got 1 dimension(s), shape (8,); accepted is" in line
        assert "got shape (1, 2, 6, 0), which has no elements" in nothing
        on_rank_one = "ValueError: weights: got a DTensor over ranks [0] on rank 1; accepted is"
        assert other.startswith(on_rank_one if rank else "it holds")


def sketched():
    """What is said where one head moved, in each way."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    generator = torch.Generator().manual_seed(0)
    weights = torch.randn(2, 3, 9, 11, generator=generator).softmax(-1)
    moved = weights.clone()
    moved[1, 2] = moved[1, 2].flip(-1)
    texts = []
    for dim in range(4):
        one, other = (distribute_tensor(t, mesh, [Shard(dim)]) for t in (weights, moved))
        assert_same_attention(one, one)
        texts.append(said(assert_same_attention, one, other=other))
    return texts


@pytest.mark.parametrize("ranks", [2, 4])
def test_the_head_that_moved_is_the_same_on_each_rank_and_in_each_way(ranks):
    texts = {text for found in on_ranks(ranks, sketched) for text in found}
    (text,) = texts
    assert text.startswith("Failure: assert_same_attention: 1 of 6 maps moved\n")


def test_a_baseline_of_weights_on_ranks_is_that_of_the_whole():
    def body():
        mesh = init_device_mesh("cpu", (2,))
        weights = torch.randn(2, 3, 9, 11, generator=torch.Generator().manual_seed(0)).softmax(-1)
        return [layers_of(distribute_tensor(weights, mesh, [Shard(dim)]))[0] for dim in range(4)]

    first, second = on_ranks(2, body)
    for one, other in zip(first, second, strict=True):
        assert (one.statistics == other.statistics).all()
        assert (one.sketch.rows.signed == other.sketch.rows.signed).all()
        assert abs(one.sketch.rows.signed - first[0].sketch.rows.signed).max() < 1e-6
        assert abs(one.sketch.columns.norms - first[0].sketch.columns.norms).max() < 1e-6
        assert abs(one.statistics - first[0].statistics).max() < 1e-6


def refused():
    mesh = init_device_mesh("cpu", (2,))
    summands = DTensor.from_local(torch.rand(2, 3), mesh, [Partial()])
    numbers = distribute_tensor(torch.ones(2, 3).long(), mesh, [Shard(0)])
    texts = []
    for given in (summands, numbers):
        with pytest.raises(TypeError) as caught:
            assert_row_stochastic(given)
        texts.append(str(caught.value))
    weights = distribute_tensor(torch.rand(2, 3), mesh, [Shard(0)])
    with pytest.raises(TypeError) as caught:
        assert_reproduces_output(torch.rand(2, 3), weights, weights)
    return [*texts, str(caught.value)]


def test_what_cannot_be_read_on_ranks_is_refused():
    (texts, _) = on_ranks(2, refused)
    assert texts[0].startswith("weights: got a DTensor placed as (Partial(sum),); accepted is ")
    assert texts[1].startswith("weights: got dtype int64; accepted is ")
    assert texts[2].startswith("value: got a DTensor; accepted is ")


def test_a_box_is_read_of_whatever_ranks_have_it():
    def body():
        whole = torch.arange(2 * 5 * 7.0).view(2, 5, 7)
        placed = Placed(distribute_tensor(whole, init_device_mesh("cpu", (2,)), [Shard(1)]), "w")
        box = placed[1, 1:4, 2:6]
        return torch.equal(box, whole[1, 1:4, 2:6]), torch.equal(placed.mT[0], whole[0].T)

    assert on_ranks(2, body) == [(True, True)] * 2
