"""What `capture_attention` costs, each time beside the plain thing.

python benchmarks/bench_capture.py [--device cuda]
"""

import os
from functools import partial

os.environ["TRANSFORMERS_VERBOSITY"] = "error"

import torch
from timing import alternate, options, report
from torch import Tensor
from transformers import BertConfig, BertModel

from pytest_attnheat import capture_attention
from pytest_attnheat.capture.trace import Trace

LENGTHS = (256, 1024, 4096)
KEPT = {"inputs": 1.15, "weights": 1.6, "statistics": 1.8}
ROUNDS = 9


@torch.no_grad()
def main() -> None:
    """Print the ratios for a model of the size of BERT base, of two layers of 12 heads."""
    given = options(__doc__)
    torch.manual_seed(0)
    sizes = {"hidden_size": 48} if given.quick else {}
    lengths = (16,) if given.quick else LENGTHS
    config = BertConfig(num_hidden_layers=2, max_position_embeddings=max(lengths), **sizes)
    model = BertModel._from_config(config, attn_implementation="sdpa").eval().to(given.device)

    def captured(ids: Tensor, keep: str) -> Trace:
        with capture_attention(model, keep=keep, max_bytes=8e9) as trace:
            model(ids)
        return trace

    for length in lengths:
        ids = torch.randint(config.vocab_size, (1, length), device=given.device)
        rounds = 3 if given.quick else max(3, ROUNDS * 256 // length)
        runs = [partial(model, ids), *(partial(captured, ids, keep) for keep in KEPT)]
        plain, *others = alternate(runs, rounds, given.device)
        for (keep, goal), seconds in zip(KEPT.items(), others, strict=True):
            name = f"{length} tokens, {given.device}: forward with keep={keep!r} / without"
            report(name, seconds / plain, "<=", goal)

    ids = torch.randint(config.vocab_size, (1, lengths[0]), device=given.device)
    trace = captured(ids, "inputs")

    def weights() -> None:
        for record in trace:
            record.weights  # noqa: B018

    def directly() -> None:
        for record in trace:
            (record.query @ record.key.mT * record.scale).softmax(-1)

    ours, theirs = alternate([weights, directly], 5 * ROUNDS, given.device)
    report(
        f"{lengths[0]} tokens: all weights / softmax(q @ k.mT * scale)", ours / theirs, "<=", 1.5
    )


if __name__ == "__main__":
    main()
