"""Attention over several ranks, right and with planted defects, written apart from the catalogue.

`rotating` sends keys and values around a ring, with `torch.distributed`, and merges what each shard
gives by its log-sum-exp; the gradients of keys travel along. Positions are worked out here in a
plain loop. `of_pytorch` is PyTorch's own ring attention.
"""

import math

import torch
import torch.distributed as dist

try:
    from torch.distributed.tensor.experimental._context_parallel import _attention as theirs
except ImportError:  # older versions of torch have it elsewhere, and other
    theirs = None

INF = float("inf")


def positions(scheme, rank, ranks, total):
    """The positions that a rank holds, in order."""
    if scheme == "striped":
        return [p for p in range(total) if p % ranks == rank]
    chunks = ranks * (2 if scheme == "zigzag" else 1)
    size = math.ceil(total / chunks)
    mine = [rank, chunks - 1 - rank] if scheme == "zigzag" else [rank]
    return [p for c in mine for p in range(c * size, min((c + 1) * size, total))]


def around(tensor, by=1):
    """What the rank before holds (or `by` ranks before), of any length."""
    rank, ranks = dist.get_rank(), dist.get_world_size()
    sizes = [torch.zeros(1, dtype=torch.long) for _ in range(ranks)]
    dist.all_gather(sizes, torch.tensor([tensor.shape[2]]))
    source, target = (rank - by) % ranks, (rank + by) % ranks
    found = tensor.new_empty(*tensor.shape[:2], int(sizes[source]), tensor.shape[3])
    if target == rank:
        return tensor.clone()
    sending = dist.isend(tensor.contiguous(), target)
    dist.recv(found, source)
    sending.wait()
    return found


def total_length(tensor):
    length = torch.tensor([tensor.shape[2]])
    dist.all_reduce(length)
    return int(length)


class _Ring(torch.autograd.Function):
    @staticmethod
    def forward(ctx, query, key, value, scheme, has, causal, window, scale):
        rank, ranks = dist.get_rank(), dist.get_world_size()
        total = total_length(query)
        ctx.settings = scheme, has, causal, window, scale, total
        group = query.shape[1] // key.shape[1]
        k, v = key, value
        out = lse = None
        for step in range(ranks):
            source = (rank - step) % ranks
            seen = _seen(scheme, has, causal, window, rank, source, ranks, total)
            scores = _scores(query, k, scale, group).masked_fill(~seen, -INF)
            own_lse = scores.logsumexp(-1, keepdim=True)
            weights = (scores - own_lse).exp().nan_to_num(nan=0.0)
            own = weights @ v.repeat_interleave(group, 1)
            out, lse = _merged(has, out, lse, own, own_lse, step)
            k, v = around(k), around(v)
        ctx.save_for_backward(query, key, value, out, lse)
        return out

    @staticmethod
    def backward(ctx, above):
        query, key, value, out, lse = ctx.saved_tensors
        scheme, has, causal, window, scale, total = ctx.settings
        rank, ranks = dist.get_rank(), dist.get_world_size()
        group = query.shape[1] // key.shape[1]
        term = (above * out).sum(-1, keepdim=True)
        dq = torch.zeros_like(query)
        k, v = key, value
        dk, dv = torch.zeros_like(key), torch.zeros_like(value)
        for step in range(ranks):
            source = (rank - step) % ranks
            seen = _seen(scheme, has, causal, window, rank, source, ranks, total)
            scores = _scores(query, k, scale, group).masked_fill(~seen, -INF)
            weights = (scores - lse).exp()
            wide_k, wide_v = (t.repeat_interleave(group, 1) for t in (k, v))
            slopes = weights * (above @ wide_v.mT - term) * scale
            dq += slopes @ wide_k
            if step == 0 or "backward_shards_not_summed" not in has:
                dk += (slopes.mT @ query).unflatten(1, (-1, group)).sum(2)
                dv += (weights.mT @ above).unflatten(1, (-1, group)).sum(2)
            k, v, dk, dv = (around(t) for t in (k, v, dk, dv))
        if "dk_of_another" in has:
            dk, dv = around(dk), around(dv)
        if "backward_queries_zero" in has:
            dq = torch.zeros_like(dq)
        return dq, dk, dv, *(None,) * 5


def _scores(query, key, scale, group):
    return query @ key.repeat_interleave(group, 1).mT * scale


def _seen(scheme, has, causal, window, rank, source, ranks, total):
    """Which keys of a shard the queries of another one see."""
    believed = "ring" if "taken_for_ring" in has else scheme
    source_believed = (2 * rank - source) % ranks if "keys_backwards" in has else source
    q = torch.tensor(positions(believed, rank, ranks, total))
    k = torch.tensor(positions(believed, source_believed, ranks, total))
    behind = q[:, None] - k
    local = torch.arange(len(q))[:, None] - torch.arange(len(k))
    seen = torch.ones(len(q), len(k), dtype=torch.bool)
    if "shards_alone" in has and source != rank:
        return ~seen
    if "shards_cut_off" in has:
        seen &= torch.arange(len(k)) < min(
            len(positions(scheme, one, ranks, total)) for one in range(ranks)
        )
    if causal and "causal_in_each" in has:
        seen &= local >= 0
    elif causal and "causal_in_own" in has:
        seen &= (local >= 0) | (source != rank)
    elif causal:
        seen &= behind >= 0
    if window is not None:
        left, right = (INF if side is None else side for side in window)
        distance = local if "shards_window_alone" in has else behind
        seen &= (distance >= -right) & (distance <= left)
    return seen


def _merged(has, out, lse, own, own_lse, step):
    if out is None:
        return own, own_lse
    if "parts_added" in has:
        return out + own, torch.logaddexp(lse, own_lse)
    if "parts_averaged" in has:  # of those that see something
        count = step + 1
        return out + (own - out) / count, torch.logaddexp(lse, own_lse)
    factor = 1.0
    if "merge_in_base_two" in has:
        factor = math.log(2.0)
    if "lse_in_base_two" in has:
        factor = 1 / math.log(2.0)
    whole = torch.logaddexp(lse * factor, own_lse * factor) / factor
    shares = [((one - whole) * factor).exp() for one in (lse, own_lse)]
    shares = [share.nan_to_num(nan=0.0) for share in shares]
    return out * shares[0] + own * shares[1], whole


def rotating(*defects, scheme="ring", window=None):
    """Ring attention with defects, as it is called on each rank."""
    has = frozenset(defects)

    def attention(query, key, value, is_causal=False, scale=None):
        scale = query.shape[-1] ** -0.5 if scale is None else scale
        return _Ring.apply(query, key, value, scheme, has, is_causal, window, scale)

    return attention


def filled_up(query, key, value, is_causal=False):
    """A ring whose last shard is filled up with zeros, which are attended to."""
    longest = torch.tensor([key.shape[2]])
    dist.all_reduce(longest, dist.ReduceOp.MAX)
    more = (0, 0, 0, int(longest) - key.shape[2])
    padded = (torch.nn.functional.pad(tensor, more) for tensor in (query, key, value))
    return rotating()(*padded, is_causal=is_causal)[:, :, : query.shape[2]]


def _exchanged(tensor, to_heads, order):
    """All positions of some heads in place of some positions of all heads, and back."""
    ranks, rank = dist.get_world_size(), dist.get_rank()
    everyone = [torch.empty_like(tensor) for _ in range(ranks)]
    dist.all_gather(everyone, tensor.contiguous())
    if to_heads:
        return torch.cat([everyone[r].chunk(ranks, 1)[rank] for r in order], 2)
    whole = torch.cat(everyone, 1)
    return whole.chunk(ranks, 2)[order.index(rank)]


class _Exchange(torch.autograd.Function):
    @staticmethod
    def forward(ctx, tensor, to_heads, order):
        ctx.settings = to_heads, order
        return _exchanged(tensor, to_heads, order)

    @staticmethod
    def backward(ctx, above):
        to_heads, order = ctx.settings
        return _exchanged(above, not to_heads, order), None, None


def exchanging(*defects):
    """Ulysses: each rank takes some heads of the whole sequence."""

    def attention(query, key, value, is_causal=False, dropout_p=0.0):
        draws = _one_seed() if "one_seed" in defects else None
        order = list(range(dist.get_world_size()))
        order = order[::-1] if "chunks_reversed" in defects else order
        query, key, value = (_Exchange.apply(t, True, order) for t in (query, key, value))
        group = query.shape[1] // key.shape[1]
        key, value = (t.repeat_interleave(group, 1) for t in (key, value))
        scores = query @ key.mT / query.shape[-1] ** 0.5
        if is_causal:
            scores = scores.masked_fill(torch.ones_like(scores[0, 0]).triu(1).bool(), -INF)
        weights = _dropped(scores.softmax(-1), dropout_p, draws)
        return _Exchange.apply(weights @ value, False, order)

    return attention


def _one_seed():
    """Random numbers that are those of all ranks: the seed of one is told to the others."""
    seed = torch.randint(2**40, (1,))
    dist.broadcast(seed, 0)
    return torch.Generator().manual_seed(int(seed))


def _dropped(weights, share, draws):
    kept = torch.rand(weights.shape, generator=draws).to(weights) >= share
    return weights * kept / (1 - share) if share else weights


def dropping(*defects, scheme="ring"):
    """A ring that drops weights shard by shard, or of all keys at once, if they are "gathered"."""

    def attention(query, key, value, dropout_p=0.0):
        rank, ranks = dist.get_rank(), dist.get_world_size()
        draws = _one_seed() if "one_seed" in defects else None
        shards = [(key, value)]
        for _ in range(1, ranks):
            shards.append(tuple(around(tensor) for tensor in shards[-1]))
        if "gathered" in defects:  # all ranks in the same order
            shards = [shards[(rank - source) % ranks] for source in range(ranks)]
        group = query.shape[1] // key.shape[1]
        scores = [_scores(query, k, query.shape[-1] ** -0.5, group) for k, _ in shards]
        lse = torch.cat(scores, -1).logsumexp(-1, keepdim=True)
        if "keys_dropped" in defects:  # each rank drops some of its own keys, for all queries
            kept = torch.rand(*value.shape[:3], 1) >= dropout_p
            values = [value * kept / (1 - dropout_p)]
            for _ in range(1, ranks):
                values.append(around(values[-1]))
            parts = [(s - lse).exp() @ v.repeat_interleave(group, 1)
                     for s, v in zip(scores, values, strict=True)]  # fmt: skip
            return sum(parts)
        return sum(
            _dropped((s - lse).exp(), dropout_p, draws) @ v.repeat_interleave(group, 1)
            for s, (_, v) in zip(scores, shards, strict=True)
        )

    return attention


def of_pytorch(balanced=False):
    """PyTorch's own ring attention, around its kernel for the CPU, balanced over ranks or not.

    `context_parallel` itself has no rule for that kernel.
    """
    forward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward

    class Ring(torch.autograd.Function):
        @staticmethod
        def forward(ctx, query, key, value, causal, scale):
            theirs._cp_options.enable_load_balance = balanced and causal
            theirs._cp_options.convert_to_f32 = query.dtype != torch.float64
            out, lse = theirs._templated_ring_attention(
                dist.group.WORLD, 2, forward, query, key, value, is_causal=causal, scale=scale
            )
            ctx.save_for_backward(query, key, value, out, lse)
            ctx.settings = causal, scale
            return out

        @staticmethod
        def backward(ctx, above):
            query, key, value, out, lse = ctx.saved_tensors
            causal, scale = ctx.settings

            def op(query, key, value, out, logsumexp, is_causal, grad_out, **more):
                return backward(
                    grad_out, query, key, value, out, logsumexp, 0.0, is_causal, scale=scale
                )

            slopes = theirs._templated_ring_attention_backward(
                dist.group.WORLD, 2, op, above, "grad_out", query, key, value, out, lse, causal
            )
            return *slopes[:3], None, None

    def attention(query, key, value, is_causal=False, *, scale=None):
        return Ring.apply(query, key, value, is_causal, scale)

    return attention
