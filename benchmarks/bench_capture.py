"""What `capture_attention` costs, each time beside the plain thing.

python benchmarks/bench_capture.py [--device cuda]
"""

import copy
import os

os.environ["TRANSFORMERS_VERBOSITY"] = "error"

import torch
from timing import alternate, options, report
from transformers import BertConfig, BertModel

from pytest_attnheat import capture_attention
from pytest_attnheat.capture.trace import Trace

LENGTH = 256
ROUNDS = 15


@torch.no_grad()
def main() -> None:
    """Print the ratios for a model of the size of BERT base, 12 layers of 12 heads."""
    given = options(__doc__)
    torch.manual_seed(0)
    config = BertConfig(hidden_size=48, num_hidden_layers=2) if given.quick else BertConfig()
    length, rounds = (16, 3) if given.quick else (LENGTH, ROUNDS)
    model = BertModel._from_config(copy.deepcopy(config), attn_implementation="sdpa").eval()
    model, ids = model.to(given.device), torch.randint(config.vocab_size, (1, length))
    ids = ids.to(given.device)
    size = f"{config.num_hidden_layers} layers, {length} tokens, {given.device}"

    def forward() -> None:
        model(ids)

    def captured() -> Trace:
        with capture_attention(model) as trace:
            model(ids)
        return trace

    def statistics() -> Trace:
        with capture_attention(model, keep="statistics") as trace:
            model(ids)
        return trace

    plain, kept = alternate([forward, captured], rounds, given.device)
    report(f"{size}: forward with capture / without", kept / plain, "<=", 1.15)
    trace = captured()

    def weights() -> None:
        for record in trace:
            record.weights  # noqa: B018

    def directly() -> None:
        for record in trace:
            (record.query @ record.key.mT * record.scale).softmax(-1)

    ours, theirs = alternate([weights, directly], 5 * rounds, given.device)
    report(f"{size}: all weights / softmax(q @ k.mT * scale)", ours / theirs, "<=", 1.5)
    plain, summed = alternate([forward, statistics], rounds // 3, given.device)
    print(f'keep="statistics": {summed / plain:.2f} forward passes')


if __name__ == "__main__":
    main()
