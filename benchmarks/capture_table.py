"""Captured weights against weights computed apart: python benchmarks/capture_table.py.

Prints a markdown table: the largest difference from the reference, for `capture_attention`, for
what the model returns itself, for plain forward hooks, and for attnread where it is installed.
The reference of a model of transformers is what the same model returns with eager attention;
that of everything else is computed here with loops in float64. Rows of queries that may attend
to nothing are left out: fused attention gives them zeros, eager attention equal weights.
"""

from __future__ import annotations

import copy
import importlib.util
import inspect
import math
import os
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

os.environ["TRANSFORMERS_VERBOSITY"] = "error"

import torch
import transformers
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

from pytest_attnheat import capture_attention

PROMISED = 1e-6
BATCH, HEADS, LENGTH, WIDTH = 2, 4, 9, 8
EMBEDDED = HEADS * WIDTH
# The size of random parameters: with less, as is usual, all weights are nearly equal.
STRENGTH = 0.2
PADDING = torch.tensor([[False] * 9, [False] * 6 + [True] * 3])


@dataclass
class Row:
    """One row of the table.

    Attributes:
        name: What it is.
        model: What is captured.
        call: Runs it; its result is what the model returns.
        reference: (batch, heads, query_len, key_len) for each attention, in order.
        returned: Takes weights out of what the model returns when it is asked for them.
        alive: Which queries may attend to something, broadcastable to the reference.
        inputs: What a model of transformers is called with.
        quiet: Whether gradients are off.
    """

    name: str
    model: nn.Module
    call: Callable[[nn.Module], Any]
    reference: list[Tensor]
    returned: Callable[[nn.Module], list[Tensor]] | None = None
    alive: Tensor | None = None
    inputs: dict[str, Any] = field(default_factory=dict)
    quiet: bool = False


class Call(nn.Module):
    """A function as a module."""

    def __init__(self, function: Callable[..., Any]) -> None:
        super().__init__()
        self.function = function

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Call it."""
        return self.function(*args, **kwargs)


# The reference.

# (score, head, query, key) -> score; -inf hides a key.
Change = Callable[[float, int, int, int], float]


def by_loops(
    query: Tensor,
    key: Tensor,
    scale: float | None = None,
    may: Tensor | None = None,
    added: Tensor | None = None,
    change: Change | None = None,
    share: Callable[[list[float]], list[float]] | None = None,
) -> Tensor:
    """Return weights, one row after the other, in Python's own numbers.

    Args:
        query: (batch, heads, query_len, width)
        key: (batch, key_heads, key_len, width)
        scale: What scores are multiplied by; None for 1 / sqrt(width).
        may: Broadcastable to the weights, True where a query may attend.
        added: Broadcastable to the weights.
        change: What else is done to a score.
        share: Makes weights of a row of scores; a softmax if None.
    """
    batch, heads, query_len, width = query.shape
    key_len, group = key.shape[2], heads // key.shape[1]
    full = (batch, heads, query_len, key_len)
    may = torch.ones(full, dtype=torch.bool) if may is None else may.expand(full)
    added = torch.zeros(full) if added is None else added.expand(full)
    scale = 1 / math.sqrt(width) if scale is None else scale
    weights = torch.zeros(full, dtype=torch.float64)
    for b, h, i in torch.cartesian_prod(*map(torch.arange, full[:3])).tolist():
        row = query[b, h, i].tolist()
        scores = []
        for j, other in enumerate(key[b, h // group].tolist()):
            score = scale * math.fsum(x * y for x, y in zip(row, other, strict=True))
            score += float(added[b, h, i, j].detach())
            score = score if change is None else change(score, h, i, j)
            scores.append(score if may[b, h, i, j] else -math.inf)
        weights[b, h, i] = torch.tensor((share or softmax)(scores), dtype=torch.float64)
    return weights


def softmax(scores: list[float]) -> list[float]:
    """Return shares that sum to one; zeros where there is no key."""
    largest = max(scores)
    if largest == -math.inf:
        return [0.0] * len(scores)
    powers = [math.exp(score - largest) for score in scores]
    total = math.fsum(powers)
    return [power / total for power in powers]


def sigmoid(scores: list[float]) -> list[float]:
    """Return a share for each key on its own."""
    return [1 / (1 + math.exp(-score)) for score in scores]


def sparsemax(scores: list[float]) -> list[float]:
    """Return the nearest shares that sum to one, by bisection."""
    low, high = min(scores) - 1, max(scores)
    for _ in range(200):
        middle = (low + high) / 2
        if math.fsum(max(score - middle, 0) for score in scores) > 1:
            low = middle
        else:
            high = middle
    return [max(score - low, 0) for score in scores]


def projected(module: nn.MultiheadAttention, inputs: Tensor) -> tuple[Tensor, Tensor]:
    """Return the queries and keys of a module, in float64."""
    weight, bias = module.in_proj_weight.double(), module.in_proj_bias.double()
    query, key, _ = (inputs.double() @ weight.T + bias).chunk(3, -1)
    return split(query), split(key)


def split(tensor: Tensor) -> Tensor:
    """(batch, length, heads * width) as (batch, heads, length, width)."""
    return tensor.unflatten(-1, (HEADS, WIDTH)).transpose(1, 2)


# The rows.


def multihead() -> Iterator[Row]:
    """nn.MultiheadAttention and nn.TransformerEncoder."""
    inputs = torch.randn(BATCH, LENGTH, EMBEDDED)
    module = nn.MultiheadAttention(EMBEDDED, HEADS, batch_first=True)
    reference = [by_loops(*projected(module, inputs))]

    def asked(model: nn.Module) -> list[Tensor]:
        return [model(inputs, inputs, inputs)[1]]

    def per_head(model: nn.Module) -> list[Tensor]:
        return [model(inputs, inputs, inputs, average_attn_weights=False)[1]]

    def unasked(model: nn.Module) -> Any:
        return model(inputs, inputs, inputs, need_weights=False)

    name = "nn.MultiheadAttention"
    yield Row(f"{name}, weights asked", module, asked, reference, asked)
    yield Row(f"{name}, weights asked per head", module, per_head, reference, per_head)
    yield Row(f"{name}, weights not asked", module, unasked, reference)
    module = copy.deepcopy(module).eval()
    yield Row(f"{name}, fast path", module, unasked, reference, quiet=True)

    layer = nn.TransformerEncoderLayer(EMBEDDED, HEADS, 64, batch_first=True)
    encoder = nn.TransformerEncoder(layer, 2).eval()
    may, hidden, reference = ~PADDING[:, None, None, :], inputs.double(), []
    for each in copy.deepcopy(encoder).double().layers:
        assert isinstance(each, nn.TransformerEncoderLayer)
        reference.append(by_loops(*projected(each.self_attn, hidden), may=may))
        hidden = each(hidden, src_key_padding_mask=PADDING)

    def encode(model: nn.Module) -> Any:
        return model(inputs, src_key_padding_mask=PADDING)

    yield Row("nn.TransformerEncoder, padded", encoder, encode, reference)
    yield Row("nn.TransformerEncoder, padded, fast path", encoder, encode, reference, quiet=True)


def fused() -> Iterator[Row]:
    """scaled_dot_product_attention in all its arguments, and flex_attention."""
    query = torch.randn(BATCH, HEADS, 7, WIDTH)
    key, value = torch.randn(2, BATCH, HEADS, LENGTH, WIDTH)
    full = (BATCH, HEADS, 7, LENGTH)
    triangle = torch.ones(7, LENGTH, dtype=torch.bool).tril()
    may, added = torch.rand(full) > 0.4, torch.randn(full)
    may[1, 2, 3] = False  # A query without keys.
    few = key[:, :2], value[:, :2]
    rows: list[tuple[str, tuple[Tensor, ...], dict[str, Any], dict[str, Any]]] = [
        ("as it is", (query, key, value), {}, {}),
        ("bool mask", (query, key, value), {"attn_mask": may}, {"may": may}),
        ("float mask", (query, key, value), {"attn_mask": added}, {"added": added}),
        ("broadcast mask", (query, key, value), {"attn_mask": may[:1, :1, 0, :]},
         {"may": may[:1, :1, :1]}),
        ("is_causal", (query, key, value), {"is_causal": True}, {"may": triangle}),
        ("scale", (query, key, value), {"scale": 0.7}, {"scale": 0.7}),
        ("dropout_p", (query, key, value), {"dropout_p": 0.3}, {}),
        ("enable_gqa", (query, *few), {"enable_gqa": True}, {}),
    ]  # fmt: skip
    for name, given, arguments, meaning in rows:
        model = Call(functional.scaled_dot_product_attention)

        def call(model: nn.Module, given: Any = given, arguments: Any = arguments) -> Any:
            return model(*given, **arguments)

        reference = by_loops(*given[:2], **meaning)
        yield Row(f"SDPA, {name}", model, call, [reference], alive=reference.sum(-1, True) > 0)

    flat = [t[:, 0] for t in (query, key, value)]  # (batch, length, width): no axis of heads.
    model = Call(functional.scaled_dot_product_attention)
    reference = by_loops(query[:, :1], key[:, :1])
    yield Row("SDPA, 3-D", model, lambda model: model(*flat), [reference])

    def bent(score: Tensor, batch: Tensor, head: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return 5 * torch.tanh(score / 5) + 0.1 * head * (i - j)

    def bent_too(score: float, head: int, i: int, j: int) -> float:
        return 5 * math.tanh(score / 5) + 0.1 * head * (i - j)

    with torch.compiler.set_stance("force_eager"):
        blocks = create_block_mask(lambda b, h, i, j: i >= j, None, None, 7, LENGTH, device="cpu")
    arguments = {"score_mod": bent, "block_mask": blocks, "enable_gqa": True}
    reference = by_loops(query, few[0], may=triangle, change=bent_too)
    model = Call(flex_attention)
    yield Row(
        "flex_attention, score_mod and block_mask", model,
        lambda model: model(query, *few, **arguments), [reference],
    )  # fmt: skip


class Written(nn.Module):
    """Causal attention written out, in one of several styles."""

    def __init__(self, style: str) -> None:
        super().__init__()
        self.projections = nn.Linear(EMBEDDED, 3 * EMBEDDED)
        self.merge, self.softmax = nn.Linear(EMBEDDED, EMBEDDED), nn.Softmax(dim=-1)
        self.style = getattr(self, style)

    def forward(self, inputs: Tensor) -> Tensor:
        """(batch, length, width) to the same."""
        query, key, value = map(split, self.projections(inputs).chunk(3, -1))
        may = torch.ones(inputs.shape[1], inputs.shape[1], dtype=torch.bool).tril()
        output: Tensor = self.style(query, key, value, may)
        merged: Tensor = self.merge(output.transpose(1, 2).flatten(2))
        return merged

    def operator(self, query: Tensor, key: Tensor, value: Tensor, may: Tensor) -> Tensor:
        """`@`, and a softmax that is a module."""
        scores = query @ key.transpose(-2, -1) / math.sqrt(WIDTH)
        return self.softmax(scores.masked_fill(~may, -torch.inf)) @ value

    def matmul(self, query: Tensor, key: Tensor, value: Tensor, may: Tensor) -> Tensor:
        """A mask that is added."""
        scores = torch.matmul(query * WIDTH**-0.5, key.mT)
        scores = scores + torch.zeros(may.shape).masked_fill(~may, -1e9)
        return torch.matmul(functional.dropout(scores.softmax(-1), 0.1, self.training), value)

    def joined(self, query: Tensor, key: Tensor, value: Tensor, may: Tensor) -> Tensor:
        """(batch * heads, length, width)."""
        query, key, value = (t.reshape(-1, *t.shape[2:]) for t in (query, key, value))
        scores = torch.bmm(query, key.transpose(1, 2)).mul(WIDTH**-0.5)
        weights = functional.softmax(scores.masked_fill(~may, -torch.inf), dim=-1)
        return torch.bmm(weights, value).unflatten(0, (-1, HEADS))

    def einsum(self, query: Tensor, key: Tensor, value: Tensor, may: Tensor) -> Tensor:
        """Axes by their letters."""
        scores = torch.einsum("bhqd,bhkd->bhqk", query, key) * WIDTH**-0.5
        lowest = torch.finfo(scores.dtype).min
        weights = torch.softmax(torch.where(may, scores, lowest), -1)
        return torch.einsum("bhqk,bhkd->bhqd", weights, value)

    def powers(self, query: Tensor, key: Tensor, value: Tensor, may: Tensor) -> Tensor:
        """No softmax at all."""
        scores = query @ key.mT * WIDTH**-0.5
        powers = (scores - scores.amax(-1, keepdim=True)).exp() * may
        return powers / powers.sum(-1, keepdim=True) @ value

    def sigmoid(self, query: Tensor, key: Tensor, value: Tensor, may: Tensor) -> Tensor:
        """Rows that do not sum to one."""
        return torch.sigmoid(query @ key.mT * WIDTH**-0.5) @ value

    def sparsemax(self, query: Tensor, key: Tensor, value: Tensor, may: Tensor) -> Tensor:
        """Rows in which most is zero."""
        scores = query @ key.mT * WIDTH**-0.5
        ordered = scores.sort(-1, descending=True).values
        sums = ordered.cumsum(-1) - 1
        count = (ordered * torch.arange(1, LENGTH + 1) > sums).sum(-1, keepdim=True)
        return (scores - sums.gather(-1, count - 1) / count).clamp(min=0) @ value


def written() -> Iterator[Row]:
    """Attention written by hand."""
    inputs = torch.randn(BATCH, LENGTH, EMBEDDED)
    triangle = torch.ones(LENGTH, LENGTH, dtype=torch.bool).tril()
    styles = {
        "operator": "`@`", "matmul": "`matmul`, dropout", "einsum": "`einsum`",
        "joined": "`bmm`, batch and heads joined", "powers": "`exp` by its sum",
        "sigmoid": "sigmoid", "sparsemax": "sparsemax",
    }  # fmt: skip
    for style, name in styles.items():
        model = Written(style)
        query, key, _ = map(split, _double(model.projections)(inputs.double()).chunk(3, -1))
        share = {"sigmoid": sigmoid, "sparsemax": sparsemax}.get(style)
        reference = by_loops(query, key, may=None if share else triangle, share=share)
        yield Row(f"by hand, {name}", model, lambda model: model(inputs), [reference])


def _double(module: nn.Module) -> nn.Module:
    return copy.deepcopy(module).double()


def of_transformers() -> Iterator[Row]:
    """Models of transformers, small and with random parameters."""
    ids = torch.randint(5, 90, (BATCH, LENGTH))
    right = (~PADDING).long()
    left = right.flip(1)
    sizes = {"vocab_size": 100, "num_hidden_layers": 2, "num_attention_heads": HEADS}
    sizes |= {"hidden_size": EMBEDDED, "intermediate_size": 64, "initializer_range": STRENGTH}
    yield from both(
        "BERT, padded", transformers.BertModel, transformers.BertConfig(**sizes),
        {"input_ids": ids, "attention_mask": right},
    )  # fmt: skip
    config = transformers.GPT2Config(
        vocab_size=100, n_embd=EMBEDDED, n_layer=2, n_head=HEADS, n_positions=64,
        initializer_range=STRENGTH,
    )  # fmt: skip
    yield from both("GPT-2", transformers.GPT2LMHeadModel, config, {"input_ids": ids})

    llama = transformers.LlamaForCausalLM
    config = transformers.LlamaConfig(**sizes, num_key_value_heads=2)
    grown = torch.cat([left, left[:, -1:]], 1)
    padded = {"input_ids": ids, "attention_mask": left}
    step = {"input_ids": ids[:, :1]}
    alive = (left[:, None].expand(-1, LENGTH, -1).tril().sum(-1) > 0)[:, None, :, None]
    yield from both("Llama, grouped queries", llama, config, {"input_ids": ids})
    yield from both("Llama, padded on the left", llama, config, padded, alive=alive)
    yield from both("Llama, a step with its cache", llama, config, step, {"input_ids": ids})
    more = step | {"attention_mask": grown}
    yield from both("Llama, a padded step with its cache", llama, config, more, padded)

    config = transformers.ViTConfig(
        hidden_size=EMBEDDED, num_hidden_layers=2, num_attention_heads=HEADS,
        intermediate_size=64, image_size=16, patch_size=4, initializer_range=STRENGTH,
    )  # fmt: skip
    yield from both(
        "ViT", transformers.ViTModel, config, {"pixel_values": torch.randn(BATCH, 3, 16, 16)}
    )
    config = transformers.T5Config(
        vocab_size=100, d_model=EMBEDDED, d_kv=WIDTH, d_ff=64, num_layers=2, num_heads=HEADS,
        decoder_start_token_id=0,
    )  # fmt: skip
    given = {"input_ids": ids, "attention_mask": right, "decoder_input_ids": ids[:, :5]}
    yield from both("T5, padded", transformers.T5Model, config, given)


def both(
    name: str,
    kind: Any,
    config: Any,
    inputs: dict[str, Tensor],
    before: dict[str, Tensor] | None = None,
    alive: Tensor | None = None,
) -> Iterator[Row]:
    """A row with eager attention and one with fused; `before` is what fills the cache."""
    # Making a model changes its configuration.
    eager = kind._from_config(copy.deepcopy(config), attn_implementation="eager").eval()

    @torch.no_grad()
    def filled(model: nn.Module) -> dict[str, Any]:
        if before is None:
            return {}
        taken = inspect.signature(model.forward).parameters
        cache = "cache" if "cache" in taken else "past_key_values"  # before transformers 5.24
        return {cache: model(**before, use_cache=True)[cache]}

    @torch.no_grad()
    def asked(model: nn.Module) -> list[Tensor]:
        return attentions(model(**inputs, **filled(model), output_attentions=True))

    reference = asked(eager)
    assert max(float(weights.max()) for weights in reference) > 0.5
    for way in ("eager", "sdpa"):
        model = kind._from_config(copy.deepcopy(config), attn_implementation=way).eval()
        model.load_state_dict(eager.state_dict())
        given = filled(model)

        def call(model: nn.Module, given: Any = given) -> Any:
            return model(**inputs, **copy.deepcopy(given))  # A step makes its cache longer.

        yield Row(
            f"{name}, {way}", model, call, reference, asked, alive, {**inputs, **given}, quiet=True
        )


def attentions(output: Any) -> list[Tensor]:
    """The weights that a model returned, in the order in which they were computed."""
    if "encoder_attentions" not in output:
        return list(output.get("attentions") or ())
    decoder = zip(output.decoder_attentions, output.cross_attentions, strict=True)
    return [*output.encoder_attentions, *(w for pair in decoder for w in pair)]


# The columns.


def captured(row: Row) -> list[Tensor]:
    """What `capture_attention` finds."""
    with capture_attention(row.model) as trace:
        row.call(row.model)
    return [record.weights for record in trace]


def returned(row: Row) -> list[Tensor]:
    """What the model returns."""
    return [] if row.returned is None else row.returned(row.model)


def hooked(row: Row) -> list[Tensor]:
    """Tensors shaped like weights in the outputs of modules."""
    shapes = {tuple(weights.shape) for weights in row.reference}
    shapes |= {(shape[0], *shape[2:]) for shape in shapes}
    found: dict[int, Tensor] = {}

    def look(module: nn.Module, args: Any, output: Any) -> None:
        for tensor in tensors_in(output):
            if not tensor.is_nested and tuple(tensor.shape) in shapes:
                found.setdefault(id(tensor), tensor)

    handles = [module.register_forward_hook(look) for module in row.model.modules()]
    row.call(row.model)
    for handle in handles:
        handle.remove()
    return list(found.values())


def tensors_in(output: Any) -> Iterator[Tensor]:
    """All tensors in what a module returns."""
    if isinstance(output, Tensor):
        yield output
    elif isinstance(output, Mapping):
        yield from tensors_in(list(output.values()))
    elif isinstance(output, list | tuple):
        for one in output:
            yield from tensors_in(one)


def attnread(row: Row) -> list[Tensor]:
    """What attnread makes of a model of transformers."""
    from attnread import extract_attention

    if not row.inputs:
        raise NotImplementedError("it takes models of transformers")
    found = extract_attention(row.model, row.inputs)
    layers = sorted({layer for _, layer, _ in found})
    return [torch.stack([found["text", layer, h] for h in range(HEADS)], 1) for layer in layers]


def cell(find: Callable[[Row], list[Tensor]], row: Row) -> tuple[str, float]:
    """What is to be said of a way to find weights, and how far they are off."""
    torch.manual_seed(1)
    try:
        with torch.set_grad_enabled(not row.quiet):
            found = find(row)
    except NotImplementedError:
        return "", math.inf
    except ValueError:
        return "refused", math.inf
    if not found:
        return "none", math.inf
    if len(found) != len(row.reference):
        return f"{len(found)} of {len(row.reference)}", math.inf
    if any(a.shape != b.shape for a, b in zip(found, row.reference, strict=True)):
        return "mean of heads", math.inf
    off = 0.0
    for ours, reference in zip(found, row.reference, strict=True):
        apart = (ours.detach().double() - reference.double()).abs()
        if row.alive is not None:
            apart = torch.where(row.alive, apart, 0.0)
        off = max(off, float(apart.max()))
    return (f"{off:.0e}" if off else "0"), off


def main() -> None:
    """Print the table; fail if ours is off anywhere."""
    warnings.filterwarnings("ignore", message=".*flex_attention called without torch.compile")
    warnings.filterwarnings("ignore", message=".*output_attentions=True.*")
    warnings.filterwarnings("ignore", message=".*nested tensors is in prototype")
    columns = {
        "`capture_attention`": captured, "`output_attentions`, or returned": returned,
        "forward hooks": hooked,
    }  # fmt: skip
    if importlib.util.find_spec("attnread") is not None:
        columns["attnread"] = attnread
    print(f"| | {' | '.join(columns)} |")
    print(f"|---|{'---|' * len(columns)}")
    torch.manual_seed(0)
    worst = 0.0
    for rows in (multihead, fused, written, of_transformers):
        for row in rows():
            cells = [cell(find, row) for find in columns.values()]
            worst = max(worst, cells[0][1])
            print(f"| {row.name} | {' | '.join(text for text, _ in cells)} |")
    print(f"\nLargest difference of ours: {worst:.1e}, promised {PROMISED:g}.")
    if "attnread" not in columns:
        print("attnread is not installed.")
    sys.exit(worst > PROMISED)


if __name__ == "__main__":
    main()
