"""Whatever a model does, a capture of it changes nothing: random programs with and without."""

import os
import random

import pytest
import torch
from torch import nn
from torch.nn import functional as F  # noqa: N812

from pytest_attnheat import capture_attention

# `make test` runs some hundreds; ten thousand take a minute or two.
PROGRAMS = int(os.environ.get("ATTNHEAT_FUZZ_PROGRAMS", "120"))
PARTS = 4
SIZES = (1, 2, 3, 4)
WEIGHT = nn.Parameter(torch.linspace(-1, 1, 16).view(4, 4))


def anything(pick, pool):
    return pool[pick.randrange(len(pool))]


def shuffled(pick, tensor):
    axes = list(range(tensor.ndim))
    pick.shuffle(axes)
    return axes


def same_elements(pick, tensor):
    """A shape of as many elements; sometimes of others."""
    left, shape = tensor.numel(), []
    while left > 1 and len(shape) < 4:
        size = pick.choice([n for n in range(1, left + 1) if left % n == 0])
        shape.append(size)
        left //= size
    return (*shape, left) if pick.random() < 0.95 else (*shape, left + 1)


def an_index(pick, tensor):
    kinds = [
        slice(pick.choice([None, 0, 1]), pick.choice([None, -1, 2])),
        Ellipsis,
        None,
        pick.randrange(4),
        torch.tensor([0, 0, 1]),
    ]
    return tuple(pick.sample(kinds, pick.randint(1, 2)))


def an_equation(pick):
    letters = "bijd"
    parts = ["".join(pick.sample(letters, pick.randint(2, 4))) for _ in range(3)]
    return f"{parts[0]},{parts[1]}->{parts[2]}"


def like(pick, tensor):
    """A tensor that broadcasts to another, as a rule."""
    shape = [size if pick.random() < 0.6 else 1 for size in tensor.shape]
    shape = shape[pick.randrange(len(shape)) :] if shape and pick.random() < 0.3 else shape
    return torch.linspace(-2, 3, max(1, torch.Size(shape).numel()))[
        : torch.Size(shape).numel()
    ].view(shape)


STEPS = {
    "reshape": lambda p, a, b: a.reshape(same_elements(p, a)),
    "view": lambda p, a, b: a.view(same_elements(p, a)),
    "flatten": lambda p, a, b: a.flatten(p.randrange(2), -1),
    "transpose": lambda p, a, b: a.transpose(p.randint(-2, 2), p.randint(-2, 2)),
    "permute": lambda p, a, b: a.permute(shuffled(p, a)),
    "mT": lambda p, a, b: a.mT,
    "unsqueeze": lambda p, a, b: a.unsqueeze(p.randint(-2, 2)),
    "squeeze": lambda p, a, b: a.squeeze(),
    "expand": lambda p, a, b: a.expand(p.choice(SIZES), *a.shape),
    "contiguous": lambda p, a, b: a.contiguous(),
    "double": lambda p, a, b: a.double().float(),
    "half": lambda p, a, b: a.half(),
    "add": lambda p, a, b: a + like(p, a),
    "add another": lambda p, a, b: a + b,
    "add in place": lambda p, a, b: a.add_(like(p, a)),
    "subtract the largest": lambda p, a, b: a - a.amax(-1, keepdim=True),
    "scale": lambda p, a, b: a * p.choice([0.5, 2, -1.5, 0]),
    "scale in place": lambda p, a, b: a.div_(p.choice([2, 3.0])),
    "divide": lambda p, a, b: 1.0 / (a.abs() + 1),
    "multiply": lambda p, a, b: a * b,
    "cap": lambda p, a, b: a.tanh() * 2,
    "exp": lambda p, a, b: a.clamp(max=4).exp(),
    "by its sum": lambda p, a, b: a / a.sum(-1, keepdim=True),
    "sum": lambda p, a, b: a.sum(p.randint(-2, 1)),
    "mean of parts": lambda p, a, b: (a.unsqueeze(-1) * b).sum(p.randint(-3, -1)),
    "where": lambda p, a, b: torch.where(like(p, a) > 0, a, -torch.inf),
    "fill": lambda p, a, b: a.masked_fill(like(p, a) > 0, p.choice([-1e9, -torch.inf, 0.0])),
    "set": lambda p, a, b: a.clone().index_put_((torch.tensor([0]),), torch.tensor(-1e4)),
    "overwrite": lambda p, a, b: a.__setitem__(an_index(p, a), -1e9) or a,
    "softmax": lambda p, a, b: a.softmax(p.choice([-1, -1, -2, 0, 1])),
    "softmax in place": lambda p, a, b: torch.softmax(a, -1, out=a),
    "log softmax": lambda p, a, b: F.log_softmax(a, -1).exp(),
    "sigmoid": lambda p, a, b: torch.sigmoid(a),
    "dropout": lambda p, a, b: F.dropout(a, 0.5, inplace=p.random() < 0.3),
    "cat": lambda p, a, b: torch.cat([a, b], p.randint(-2, 1)),
    "a column": lambda p, a, b: torch.cat([a, a.new_ones(*a.shape[:-1], 1)], -1),
    "without a column": lambda p, a, b: a[..., :-1],
    "stack": lambda p, a, b: torch.stack([a, b, a], p.randint(-1, 1)),
    "index": lambda p, a, b: a[an_index(p, a)],
    "chunk": lambda p, a, b: a.chunk(2, p.randint(-2, 1))[-1],
    "split": lambda p, a, b: a.split(1, p.randint(-2, 1))[0],
    "unbind": lambda p, a, b: a.unbind(p.randint(-1, 1))[0],
    "flip": lambda p, a, b: a.flip(p.randint(-2, 1)),
    "roll": lambda p, a, b: a.roll(1, p.randint(-2, 1)),
    "repeat": lambda p, a, b: a.repeat_interleave(2, p.randint(-2, 1)),
    "linear": lambda p, a, b: F.linear(a, WEIGHT),
    "by a parameter": lambda p, a, b: a @ WEIGHT,
    "@": lambda p, a, b: a @ b,
    "@ mT": lambda p, a, b: a @ b.mT,
    "bmm": lambda p, a, b: torch.bmm(a, b),
    "baddbmm": lambda p, a, b: torch.baddbmm(like(p, a), a, b.mT, alpha=0.5),
    "einsum": lambda p, a, b: torch.einsum(an_equation(p), a, b),
    "tensordot": lambda p, a, b: torch.tensordot(a, b, dims=([p.randint(-2, 1)], [-1])),
    "norm": lambda p, a, b: F.layer_norm(a, a.shape[-1:]),
    "sdpa": lambda p, a, b: F.scaled_dot_product_attention(a, b, b, is_causal=p.random() < 0.5),
    "cumsum": lambda p, a, b: a.cumsum(-1),
    "weigh": lambda p, a, b: (a @ b.mT + like(p, a)).softmax(-1) @ b,
    "score": lambda p, a, b: (a @ b.mT) / 2,
    "a number": lambda p, a, b: a + float(a.sum()),
}  # fmt: skip


def run(seed):
    """A program of a dozen steps: all that it made, or what it raised."""
    pick = random.Random(seed)
    generator = torch.Generator().manual_seed(seed)
    torch.manual_seed(seed)
    shape = [pick.choice(SIZES) for _ in range(pick.randint(2, 4))]
    pool = [torch.randn(shape, generator=generator) for _ in range(3)]
    raised = []
    for _ in range(14):
        name = pick.choice(list(STEPS))
        latest = pool[-1] if pick.random() < 0.7 else anything(pick, pool)
        try:
            made = STEPS[name](pick, latest, anything(pick, pool))
        except Exception as error:
            raised.append(f"{name}: {type(error).__name__}: {error}")
            continue
        if 0 < made.numel() < 2000:
            pool.append(made)
    return pool, raised, torch.rand(1)


@torch.no_grad()
def same(a, b):
    return a.dtype == b.dtype and a.shape == b.shape and a.stride() == b.stride() and torch.equal(
        a.nan_to_num(nan=7.25), b.nan_to_num(nan=7.25)
    )  # fmt: skip


@pytest.mark.parametrize("part", range(PARTS))
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_a_program_makes_and_raises_the_same_with_a_capture(part):
    for seed in range(part, PROGRAMS, PARTS):
        pool, raised, random_after = run(seed)
        options = {"keep": ("inputs", "weights", "statistics")[seed % 3]}
        with capture_attention(allow_empty=True, allow_unseen=True, **options) as trace:
            captured, raised_too, random_too = run(seed)
        assert raised_too == raised, seed
        assert torch.equal(random_after, random_too), seed
        assert len(pool) == len(captured), seed
        assert all(map(same, pool, captured)), seed
        lost = [str(unseen) for unseen in trace.unseen if "could not follow" in unseen.why]
        assert not lost, (seed, lost)


def test_what_a_source_raises_costs_the_tag_and_is_named(monkeypatch):
    def broken(*args):
        raise ZeroDivisionError("in the capture\nand more")

    monkeypatch.setattr("pytest_attnheat.capture.sources.written.read_product", broken)
    query, key, value = torch.randn(3, 2, 4, 5)
    with capture_attention(allow_empty=True, allow_unseen=True) as trace:
        output = (query @ key.mT).softmax(-1) @ value
    assert torch.equal(output, (query @ key.mT).softmax(-1) @ value)
    assert [str(unseen) for unseen in trace.unseen] == [
        "(no layer): matmul: the capture could not follow it (ZeroDivisionError: in the capture"
    ]
