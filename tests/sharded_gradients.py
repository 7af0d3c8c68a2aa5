"""Examines the gradients of attention over ranks, and prints what it finds, a line of JSON each."""

import json

import torch
from sharded_attention import exchanging, of_pytorch, rotating

RIGHT_GRADIENTS = {
    "ring": (rotating(), "ring"),
    "zigzag": (rotating(scheme="zigzag"), "zigzag"),
    "ulysses": (exchanging(), "ulysses"),
    "PyTorch": (of_pytorch(), "ring"),
    "PyTorch balanced": (of_pytorch(balanced=True), "zigzag"),
}
# What is said of a planted defect.
GRADIENTS = {
    "backward_shards_not_summed": "does not sum the gradients of keys and values over the ranks",
    "dk_of_another": "or gives the sum to another rank",
    "backward_queries_zero": "the gradient of query is that of attention whose gradient of the "
    "queries is zero",
}

if __name__ == "__main__":
    from pytest_attnheat import AttentionSpec, check_attention

    torch.set_num_threads(1)
    subjects = {**RIGHT_GRADIENTS, **{name: (rotating(name), "ring") for name in GRADIENTS}}
    for name, (subject, scheme) in subjects.items():
        for ranks in (2, 4):
            spec = AttentionSpec(subject, sharding=scheme, dtypes=("float64",))
            # Its output and all gradients are judged.
            report = check_attention(spec, ranks=ranks, replay="causal=True")
            assert report.asked
            message = "".join(one.message for one in report.failed)
            print(json.dumps([name, ranks, report.passed, message]))  # noqa: T201
