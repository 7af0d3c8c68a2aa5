"""What `capture_zoo.py` holds captures against: every softmax that PyTorch's dispatcher sees.

The oracle knows nothing of the capture: it looks at operators, below everything that Python calls,
remembers what each softmax returned, and follows that through memory to the product that uses it.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from itertools import permutations
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode

from pytest_attnheat import AttentionRecord, Trace

# A score this low hides its key; biases that are meant to be felt are far smaller.
HIDDEN = -5e3
# Weights as the eager model had them, and those of fused attention through some layers.
CLOSE, CLOSE_FUSED = 2e-6, 3e-4

# A softmax in a module of these classes weighs what is no sequence: branches, streams, layers.
NOT_ATTENTION = re.compile(r"SelectiveKernel|HyperConnection|DepthAttention|AttnRes|SplitAttn")
_SOFTMAX = {"_softmax", "_safe_softmax"}
# What the numbers of weights go through unless they are used.
_SAME = {
    "clone", "_to_copy", "copy_", "native_dropout", "mul", "mul_", "div", "div_", "add", "add_",
    "sub", "masked_fill", "masked_fill_", "where", "cat", "constant_pad_nd", "nan_to_num",
    "_reshape_copy", "nan_to_num_", "lift_fresh", "stack", "slice_scatter",
}  # fmt: skip
_PRODUCTS = {"bmm", "mm", "baddbmm", "addmm", "mv", "dot", "addbmm", "_scaled_mm"}
_FUSED = "_scaled_dot_product_flash_attention_for_cpu"
_MOST = 200_000


@dataclass(eq=False)
class Softmax:
    """One softmax that ran.

    Attributes:
        module: The innermost module in which it ran.
        weights: What it returned, keys last.
        hidden: Which scores were low enough to hide their keys, keys last.
        wild: Whether scores are so large that a low one need not hide anything.
        attends: Whether it multiplied something that is no parameter.
        pools: Whether that was element by element.
    """

    module: str
    weights: Tensor
    hidden: Tensor
    wild: bool = False
    attends: bool = False
    pools: bool = False


class Seen(TorchDispatchMode):
    """Remembers every softmax within; `operands` are what else products were given."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.softmaxes: list[Softmax] = []
        self.operands: list[Tensor] = []
        self.running: list[str] = []
        self.kinds = {name: type(module).__name__ for name, module in model.named_modules()}
        self.kinds[self.kinds[""]] = self.kinds[""]
        self._of: dict[int, Softmax] = {}
        self._alive: list[Any] = []
        known = (*model.parameters(), *model.buffers())
        self._fixed = {_place(tensor) for tensor in known if tensor.layout == torch.strided}

    @property
    def module(self) -> str:
        """The innermost module that runs: of the model itself its class, as in records."""
        return (self.running[-1] if self.running else "") or self.kinds[""]

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """Run the operator, and look."""
        output = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        result = output[0] if isinstance(output, tuple | list) and output else output
        if not isinstance(result, Tensor) or not _is_plain(result):
            return output
        tensors = [one for one in _flat(args) if isinstance(one, Tensor) and _is_plain(one)]
        if name in _SOFTMAX and result.ndim > 0:
            given, dim = args[0], args[1] % result.ndim
            found = Softmax(
                self.module, result.movedim(dim, -1).clone().float(),
                (given <= HIDDEN).movedim(dim, -1).clone(), _are_wild(given),
            )  # fmt: skip
            self.softmaxes.append(found)
            self._keep(result, found)
            return output
        if name == _FUSED:
            self.softmaxes.append(_of_fused(self.module, *args, **(kwargs or {})))
            return output
        weights = [(one, self._of.get(_place(one))) for one in tensors]
        known = next(((one, of) for one, of in weights if of is not None), None)
        if name in _PRODUCTS:
            self._used(known, tensors)
        elif known is not None:
            one, of = known
            others = [t for t in tensors if t is not one and t.ndim and t.numel() > 1]
            grown = result.numel() > one.numel() and name in ("mul", "mul_")
            if grown and any(_place(t) not in self._fixed for t in others):
                of.attends = of.pools = True
            elif name in _SAME:
                self._keep(result, of)
        return output

    def _used(self, known: Any, tensors: list[Tensor]) -> None:
        # Weights have a row for each query on the left, and a column on the right.
        for one in (tensors[-2], tensors[-1].mT) if len(tensors) > 1 else ():
            if one.ndim > 2 and one.numel() < _MOST and one.is_floating_point():
                self.operands.append(one.clone().float())
        if known is not None:
            one, of = known
            others = [t for t in tensors if t is not one]
            if any(_place(t) not in self._fixed for t in others):
                of.attends = True

    def _keep(self, tensor: Tensor, of: Softmax) -> None:
        self._of[_place(tensor)] = of
        self._alive.append(tensor)


def _are_wild(scores: Tensor) -> bool:
    plain = scores.masked_fill((scores <= -9e3) | scores.isnan(), 0.0).abs()
    return plain.numel() > 0 and bool(((plain > 500) & (plain < torch.inf)).any())


def _of_fused(
    module: str, query: Tensor, key: Tensor, value: Tensor, dropout: float = 0.0,
    is_causal: bool = False, *, attn_mask: Tensor | None = None, scale: float | None = None,
) -> Softmax:  # fmt: skip
    """What fused attention computes, where a model chose it itself."""
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    scores = query.double() @ key.double().mT * scale
    hidden = torch.zeros_like(scores, dtype=torch.bool)
    if is_causal:
        hidden = torch.ones_like(hidden).triu(1)
    if attn_mask is not None:
        scores = scores + attn_mask.double()
        hidden = hidden | (scores <= HIDDEN)
    weights = scores.masked_fill(hidden, -torch.inf).softmax(-1).nan_to_num().float()
    return Softmax(module, weights, hidden, _are_wild(scores), attends=True)


def _is_plain(tensor: Tensor) -> bool:
    return tensor.layout == torch.strided and not tensor.is_meta


def _place(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def _flat(given: Any) -> Iterator[Any]:
    for one in given:
        if isinstance(one, tuple | list):
            yield from _flat(one)
        else:
            yield one


@contextmanager
def watched(model: nn.Module) -> Iterator[Seen]:
    """Run a model in plain sight: attention in parts, and the names of its modules at hand."""
    seen, handles = Seen(model), []
    for name, module in model.named_modules():
        if isinstance(module, torch.jit.ScriptModule):
            continue

        def enter(module: Any, args: Any, name: str = name) -> None:
            seen.running.append(name)

        def leave(module: Any, args: Any, output: Any) -> None:
            seen.running.pop()

        handles += [
            module.register_forward_pre_hook(enter),
            module.register_forward_hook(leave, always_call=True),
        ]
    fast = torch.backends.mha.get_fastpath_enabled()
    try:
        with ExitStack() as stack:
            torch.backends.mha.set_fastpath_enabled(False)
            stack.enter_context(sdpa_kernel(SDPBackend.MATH))
            stack.enter_context(seen)
            yield seen
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)
        for handle in handles:
            handle.remove()


# The verdict.


@dataclass
class Verdict:
    """How a capture was, of one model with one implementation of attention.

    Attributes:
        attentions: How many softmaxes weighed something.
        records: How many records there are.
        right: How many are right in weights, layout and mask.
        returned: How many of the weights that the model returned are records, and how many it did.
        worst: The largest difference.
        peak: The largest weight of a record, in the record where that is least, as a multiple of
            what equal weights would be.
        wrong: What is wrong, and not said.
        marked: What is wrong or doubtful, and said.
        named: What was not read, and is named in `unseen`.
        silent: What was not read, and is not named.
        unseen: What the trace names.
    """

    attentions: int = 0
    records: int = 0
    right: int = 0
    returned: tuple[int, int] = (0, 0)
    worst: float = 0.0
    peak: float = 0.0
    wrong: list[str] = field(default_factory=list)
    marked: list[str] = field(default_factory=list)
    named: list[str] = field(default_factory=list)
    silent: list[str] = field(default_factory=list)
    unseen: list[str] = field(default_factory=list)

    @property
    def word(self) -> str:
        """The worst that there is to say."""
        if self.wrong or self.silent:
            return "silent"
        if self.marked:
            return "marked"
        if self.named:
            return "named"
        if self.records:
            return "right"
        return "named" if self.unseen else "none"


def judge(
    trace: Trace, seen: Seen, returned: list[Tensor],
    heads_of: Callable[[AttentionRecord], set[int]], *, fused: bool,
) -> Verdict:  # fmt: skip
    """Compare a trace with what was seen, and with what the model returned."""
    verdict = Verdict(sum(s.attends for s in seen.softmaxes), len(trace))
    close = CLOSE_FUSED if fused else CLOSE
    used: set[Softmax] = set()
    # Modules of which weights are what a product was given, made of one or more softmaxes.
    made: set[str] = set()
    peaks = []
    of_layers = Counter(record.layer for record in trace if record.shape[1] == 1)
    for record in trace:
        weights = record.compute_weights(torch.float32)
        said, faults = _said(record), list[str]()
        heads = heads_of(record)
        one_by_one = any(of_layers[record.layer] % many == 0 for many in heads)
        if heads and record.shape[1] not in heads and not (record.shape[1] == 1 and one_by_one):
            faults.append(f"it has {record.shape[1]} heads, its module {sorted(heads)}")
        found = next(
            ((s, hidden, off) for s in seen.softmaxes if s not in used
             for hidden, off in _alike(s, record, weights, close)), None,
        )  # fmt: skip
        if found is not None:
            softmax, hidden, off = found
            used.add(softmax)
            softmax.attends = True
            verdict.worst = max(verdict.worst, off)
            faults += _mask_faults(record, softmax, hidden)
        elif record.kind == "linear" or any(_equal(weights, one, close) for one in seen.operands):
            made.add(record.layer)
            faults += ["its mask is not known"] * record.mask_lost
        else:
            faults.append("weights are those of no softmax")
        if weights.shape[-1] > 1:
            peaks.append(float(weights.nan_to_num().max()) * weights.shape[-1])
        if record.kind == "linear" and not _implied(weights, seen):
            faults.append("weights are not those that two softmaxes imply")
        faults += ["linear attention"] * (record.kind == "linear")
        faults += [f"residual {record.residual:.1e}"] * (not record.trusted)
        place = f"{record.layer} {record.source} {record.shape}"
        for fault in faults:
            (verdict.marked if said else verdict.wrong).append(f"{place}: {fault} ({said})"[:200])
        verdict.right += not faults
    for softmax in seen.softmaxes:
        apart = softmax not in used and softmax.module not in made
        if softmax.attends and apart and not NOT_ATTENTION.search(seen.kinds[softmax.module]):
            text = f"{softmax.module}: softmax {tuple(softmax.weights.shape)} has no record"
            text += ", it pools" if softmax.pools else ""
            (verdict.named if _is_named(softmax, trace) else verdict.silent).append(text)
    _compare_returned(verdict, trace, returned, close)
    verdict.unseen = [str(unseen)[:160] for unseen in trace.unseen]
    verdict.peak = round(min(peaks, default=0.0), 2)
    return verdict


def _implied(weights: Tensor, seen: Seen) -> bool:
    """Whether weights are one softmax over features times another one over keys."""
    for outer in seen.softmaxes:
        for inner in seen.softmaxes:
            a, b = outer.weights, inner.weights
            if a.ndim != b.ndim or a.shape[:-2] != b.shape[:-2]:
                continue
            for right in (b, b.mT):
                fits = a.shape[-1] == right.shape[-2]
                if fits and _proportional(a @ right, weights):
                    return True
    return False


def _proportional(made: Tensor, weights: Tensor) -> bool:
    if made.numel() != weights.numel():
        return False
    made = made.reshape(weights.shape)
    scale = float(weights.norm() / made.norm())
    return float((made * scale - weights).abs().max()) < 1e-4


def _said(record: AttentionRecord) -> str:
    """What the record itself says of its doubts."""
    said = [record.doubt, "mask_lost" * record.mask_lost, "" if record.trusted else "untrusted",
            record.kind if record.kind != "attention" else ""]  # fmt: skip
    return "; ".join(filter(None, said))


def _alike(
    softmax: Softmax, record: AttentionRecord, weights: Tensor, close: float
) -> Iterator[tuple[Tensor, float]]:
    """Where the softmax, laid out as the record, equals it: which keys it hides, how far it is."""
    given, hidden = softmax.weights, softmax.hidden
    if record.sink_weights is not None or given.shape[-1] == weights.shape[-1] + 1:
        given, hidden = given[..., : weights.shape[-1]], hidden[..., : weights.shape[-1]]
    if record.kind == "pooling" and given.shape[-1] == 1 and given.numel() == weights.numel():
        given, hidden = given.reshape(weights.shape), hidden.reshape(weights.shape)
    if given.shape[-1] != weights.shape[-1]:
        return
    if given.numel() != weights.numel():
        # One map for all heads or batch entries may be broadcast.
        if given.ndim == weights.ndim and _broadcasts(given, weights):
            given, hidden = given.expand_as(weights), hidden.expand_as(weights)
        elif record.doubt and weights.numel() % given.numel() == 0:
            given, hidden = (_repeated(one, weights) for one in (given, hidden))
        else:
            return
    axes = range(given.ndim - 1)
    orders = permutations(axes) if given.ndim <= 5 else [tuple(axes)]
    for order in orders:
        laid = given.permute(*order, -1).reshape(weights.shape)
        off = float((laid - weights).abs().nan_to_num(nan=0.0).max()) if laid.numel() else 0.0
        if off <= close and bool((laid.isnan() == weights.isnan()).all()):
            yield hidden.permute(*order, -1).reshape(weights.shape), off
            return


def _repeated(given: Tensor, weights: Tensor) -> Tensor:
    """A map for each of some heads as one for each of more, beside one another."""
    many = weights.numel() // given.numel()
    return given.unsqueeze(-3).expand(*given.shape[:-2], many, *given.shape[-2:]).flatten(-4, -3)


def _broadcasts(given: Tensor, weights: Tensor) -> bool:
    return all(a in (1, b) for a, b in zip(given.shape, weights.shape, strict=True))


def _equal(weights: Tensor, operand: Tensor, close: float) -> bool:
    if operand.numel() != weights.numel() or operand.shape[-1] != weights.shape[-1]:
        return False
    return float((operand.reshape(weights.shape) - weights).abs().max()) <= close


def _mask_faults(record: AttentionRecord, softmax: Softmax, hidden: Tensor) -> Iterator[str]:
    if record.mask_lost:
        yield "its mask is not known"
    if record.mask_lost or softmax.wild:
        return
    mask = record.mask
    seen = torch.ones(record.shape, dtype=torch.bool) if mask is None else mask.expand(record.shape)
    alive = ~hidden.all(-1, keepdim=True)
    wrong = alive & (seen == hidden)
    if bool(wrong.any()):
        where = tuple(wrong.nonzero()[0].tolist())
        yield f"its mask is wrong in {int(wrong.sum())} of {wrong.numel()}, first {where}"


def _is_named(softmax: Softmax, trace: Trace) -> bool:
    names = [unseen.layer for unseen in trace.unseen]
    inner = softmax.module
    return any(n == inner or inner.startswith(f"{n}.") or n.startswith(f"{inner}.") for n in names)


def _compare_returned(verdict: Verdict, trace: Trace, returned: list[Tensor], close: float) -> None:
    """Say which of the weights that the model returned are a record, shape and all."""
    found, left = 0, list(trace)
    for weights in returned:
        for record in left:
            if record.shape != tuple(weights.shape):
                continue
            ours = record.compute_weights(torch.float32)
            if float((ours - weights.float()).abs().nan_to_num(nan=0.0).max()) <= close:
                left.remove(record)
                found += 1
                break
    verdict.returned = found, len(returned)
