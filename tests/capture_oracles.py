"""What the tests of captures measure against: float64, exp and sums, and PyTorch's own words."""

import contextlib
from unittest import mock

import torch

# A capture loads these where a model needs them. An in-process pytester run would unload them
# again, and a second import crashes: import them here, once, first.
import torch._dynamo
import torch.nn.attention.flex_attention
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode

from pytest_attnheat import callables
from pytest_attnheat.attention import scoring

# float32 weights against float64 ones: a dozen roundings.
CLOSE = {"atol": 1e-6, "rtol": 0.0}


def draw(name, *shape, dtype=torch.float32):
    return scoring.draw(name, 11, *shape).to(dtype)


def three(*lead, queries=5, keys=7, width=4, key_heads=None, dtype=torch.float32):
    """Query, key and value with these leading axes."""
    key_lead = lead if key_heads is None else (*lead[:-1], key_heads)
    return (
        draw("query", *lead, queries, width, dtype=dtype),
        draw("key", *key_lead, keys, width, dtype=dtype),
        draw("value", *key_lead, keys, width + 1, dtype=dtype),
    )


def plain_weights(query, key, *, allowed=None, bias=None, scale=None):
    """softmax(query @ key.mT * scale + bias) over what is allowed; rows without keys are zero."""
    query, key = query.detach().double(), key.detach().double()
    if key.ndim > 2 and key.shape[-3] not in (1, query.shape[-3]):
        key = torch.stack(
            [
                key[..., head * key.shape[-3] // query.shape[-3], :, :]
                for head in range(query.shape[-3])
            ],
            -3,
        )
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    scores = (query.unsqueeze(-2) * key.unsqueeze(-3)).sum(-1) * scale
    return plain_softmax(scores if bias is None else scores + bias.double(), allowed)


def plain_softmax(scores, allowed=None):
    scores = scores.detach().double()
    if allowed is None:
        allowed = torch.ones((), dtype=torch.bool)
    allowed = allowed.expand(scores.shape) & ~scores.isneginf()
    largest = scores.masked_fill(~allowed, -1e300).amax(-1, keepdim=True)
    shares = torch.where(allowed, (scores - largest).exp(), 0.0)
    return shares / shares.sum(-1, keepdim=True).clamp_min(1e-300)


def top_left(queries, keys):
    return torch.tensor([[key <= query for key in range(keys)] for query in range(queries)])


def bottom_right(queries, keys):
    shift = keys - queries
    return torch.tensor([[key <= query + shift for key in range(keys)] for query in range(queries)])


def assert_weights(record, expected, **tolerance):
    torch.testing.assert_close(record.weights.double(), expected.double(), **(tolerance or CLOSE))


class Operators(TorchDispatchMode):
    """Which of PyTorch's operators ran; does not switch the fast path off."""

    def __init__(self):
        super().__init__()
        self.ran = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.ran.append(func.overloadpacket._qualified_op_name)
        return func(*args, **(kwargs or {}))

    @property
    def fused(self):
        names = ("aten::_native_multi_head_attention", "aten::_transformer_encoder_layer_fwd")
        return [name for name in self.ran if name in names]


class Memory(TorchDispatchMode):
    """The most bytes that tensors made within it took at once, by a capture too, which hides."""

    def __init__(self):
        super().__init__()
        self._alive, self.peak = {}, 0
        self._shown = mock.patch.object(callables, "_disable_current_modes", contextlib.nullcontext)

    def __enter__(self):
        self._shown.__enter__()
        return super().__enter__()

    def __exit__(self, *error):
        super().__exit__(*error)
        self._shown.__exit__(*error)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        before = {t.untyped_storage()._cdata for t in args if isinstance(t, torch.Tensor)}
        for one in result if isinstance(result, list | tuple) else [result]:
            if isinstance(one, torch.Tensor) and not one.is_meta:
                storage = one.untyped_storage()
                if storage._cdata not in before:
                    self._alive[storage._cdata] = StorageWeakRef(storage), storage.nbytes()
        self._alive = {k: v for k, v in self._alive.items() if not v[0].expired()}
        self.peak = max(self.peak, sum(size for _, size in self._alive.values()))
        return result


@contextlib.contextmanager
def nothing_left_behind(*models):
    """Hooks, modes, flags, random numbers and the compile stance are after as they were before."""
    before = [_state(model) for model in models], _surroundings()
    yield
    assert ([_state(model) for model in models], _surroundings()) == before


def _state(model):
    return [
        (name, module.training, len(module._forward_hooks), len(module._forward_pre_hooks),
         len(module._forward_hooks_with_kwargs), len(module._forward_pre_hooks_with_kwargs),
         len(module._forward_hooks_always_called), sorted(vars(module)),
         "forward" in vars(module))
        for name, module in model.named_modules()
    ]  # fmt: skip


def _surroundings():
    flex = torch.nn.attention.flex_attention
    return {
        "modes": len(torch.overrides._get_current_function_mode_stack()),
        "grad": torch.is_grad_enabled(),
        "inference": torch.is_inference_mode_enabled(),
        "autocast": torch.is_autocast_enabled("cpu"),
        "random": torch.get_rng_state().tolist(),
        "stance": torch._dynamo.eval_frame._stance,
        "advice": set(getattr(flex, "_WARNINGS_SHOWN", ())),
        "hooks": len(torch.nn.modules.module._global_forward_hooks),
        "fast path": torch.backends.mha.get_fastpath_enabled(),
    }
