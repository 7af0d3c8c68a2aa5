"""Correct subjects of the assertions on callables, from PyTorch and transformers."""

import inspect
import warnings
from functools import cache

import torch
from torch import nn
from torch.nn.functional import dropout
from torch.nn.functional import scaled_dot_product_attention as sdpa

WIDTH, HEADS = 16, 2
VOCABULARY = 50
DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16]


def randn(*shape, seed=0, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)


def tokens(batch, length, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(1, VOCABULARY, (batch, length), generator=generator)


def kept(model, cache):
    """The keyword under which a model of transformers takes a cache: another since 5.24."""
    taken = inspect.signature(model.forward).parameters
    return {"cache" if "cache" in taken else "past_key_values": cache}


def qkv(batch=2, heads=3, query_len=6, key_len=6, head_dim=8, *, seed=0, dtype=torch.float32):
    """Query, key and value; the value is wider than the head, so that they are not confused."""
    return (
        randn(batch, heads, query_len, head_dim, seed=seed, dtype=dtype),
        randn(batch, heads, key_len, head_dim, seed=seed + 1, dtype=dtype),
        randn(batch, heads, key_len, head_dim + 2, seed=seed + 2, dtype=dtype),
    )


def plain(query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False, *, scale=None):
    """Attention written by hand, scores and softmax in float32 at least."""
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    wide = torch.promote_types(query.dtype, torch.float32)
    scores = (query.to(wide) * scale) @ key.to(wide).mT
    if is_causal:
        scores = scores.masked_fill(
            ~torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).tril(),
            -torch.inf,
        )
    if attn_mask is not None and attn_mask.dtype == torch.bool:
        scores = scores.masked_fill(~attn_mask, -torch.inf)
    elif attn_mask is not None:
        scores = scores + attn_mask
    weights = scores.softmax(-1).nan_to_num(0.0)
    if dropout_p:
        weights = dropout(weights, dropout_p)
    return (weights @ value.to(wide)).to(value.dtype)


def plus_one(query, key, value, attn_mask=None, is_causal=False):
    """A constant added to every score of a row."""
    mask = torch.ones(query.shape[-2], key.shape[-2], dtype=torch.bool)
    mask = mask.tril() if is_causal else mask
    mask = mask if attn_mask is None else mask & attn_mask
    bias = torch.ones(mask.shape, dtype=query.dtype).masked_fill(~mask, -torch.inf)
    return sdpa(query, key, value, bias)


def scaled_query(query, key, value, attn_mask=None, is_causal=False):
    """The query scaled in place of the scores."""
    query = query * query.shape[-1] ** -0.5
    return sdpa(query, key, value, attn_mask, is_causal=is_causal, scale=1.0)


def repeated_keys(query, key, value, attn_mask=None, is_causal=False, enable_gqa=False):
    """Grouped keys repeated explicitly."""
    groups = query.shape[1] // key.shape[1]
    key, value = (t.repeat_interleave(groups, 1) for t in (key, value))
    return sdpa(query, key, value, attn_mask, is_causal=is_causal)


def flex(query, key, value, attn_mask=None, is_causal=False, *, scale=None, enable_gqa=False):
    """`flex_attention`, not compiled, with a mask as its block mask."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    block_mask = None
    if attn_mask is not None or is_causal:
        shape = (*query.shape[:-1], key.shape[-2])
        mask = torch.ones((), dtype=torch.bool) if attn_mask is None else attn_mask
        permitted = mask.expand(shape)

        def mask_mod(batch, head, query_at, key_at):
            allowed = permitted[batch, head, query_at, key_at]
            return allowed & (key_at <= query_at) if is_causal else allowed

        block_mask = create_block_mask(
            mask_mod, *query.shape[:2], query.shape[-2], key.shape[-2], device=query.device
        )
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "flex_attention called without torch.compile")
        return flex_attention(
            query, key, value, block_mask=block_mask, scale=scale, enable_gqa=enable_gqa
        )


@cache
def multihead(batch_first=True, dropout=0.0):
    torch.manual_seed(0)
    return nn.MultiheadAttention(WIDTH, HEADS, dropout=dropout, batch_first=batch_first).eval()


@cache
def encoder_layer(batch_first=True, dropout=0.1):
    torch.manual_seed(0)
    return nn.TransformerEncoderLayer(
        WIDTH, HEADS, dim_feedforward=32, dropout=dropout, batch_first=batch_first
    ).eval()


@cache
def encoder():
    torch.manual_seed(0)
    return nn.TransformerEncoder(encoder_layer(), 2, enable_nested_tensor=False).eval()


class CausalEncoder(nn.Module):
    """A small language model of PyTorch's layers, causal in training and evaluation."""

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, WIDTH)
        self.encoder = nn.TransformerEncoder(
            nn.TransformerEncoderLayer(WIDTH, HEADS, dim_feedforward=32, batch_first=True),
            2,
            enable_nested_tensor=False,
        )
        self.head = nn.Linear(WIDTH, VOCABULARY)

    def forward(self, ids, padding=None):
        masked = torch.ones(ids.shape[1], ids.shape[1], dtype=torch.bool, device=ids.device).triu(1)
        hidden = self.encoder(
            self.embedding(ids), mask=masked, is_causal=True, src_key_padding_mask=padding
        )
        return self.head(hidden)


@cache
def causal_encoder():
    torch.manual_seed(0)
    return CausalEncoder().eval()


class Restless(nn.Module):
    """Attention that leaves traces: random numbers, a buffer, and in training more of both."""

    def __init__(self, takes_gradients=False):
        super().__init__()
        self.takes_gradients = takes_gradients
        self.linear = nn.Linear(WIDTH, WIDTH)
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x, keep=None):
        assert torch.is_grad_enabled() == (self.takes_gradients and x.requires_grad)
        self.calls += torch.rand(()).ceil()
        x = self.linear(x)
        return sdpa(x, x, x, None if keep is None else keep[:, None])


TRANSFORMERS = [
    (name, implementation)
    for name in ("bert", "gpt2", "llama")
    for implementation in ("eager", "sdpa")
]


@cache
def of_transformers(name, implementation, dtype=torch.float32):
    """A tiny model with random weights; Llama with two query heads for each key head."""
    import transformers as hf

    torch.manual_seed(0)
    no_ids = {"bos_token_id": None, "eos_token_id": None}
    common = {"vocab_size": VOCABULARY, "attn_implementation": implementation, **no_ids}
    if name == "bert":
        config = hf.BertConfig(
            **common, hidden_size=32, num_hidden_layers=2, num_attention_heads=4,
            intermediate_size=64, max_position_embeddings=64,
        )  # fmt: skip
        model = hf.BertModel(config)
    elif name == "gpt2":
        config = hf.GPT2Config(**common, n_embd=32, n_layer=2, n_head=4, n_positions=64)
        model = hf.GPT2LMHeadModel(config)
    else:
        config = hf.LlamaConfig(
            **common, hidden_size=32, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=2, intermediate_size=64, max_position_embeddings=64,
        )  # fmt: skip
        model = hf.LlamaForCausalLM(config)
    return model.to(dtype).eval()
