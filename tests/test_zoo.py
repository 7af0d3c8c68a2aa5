"""The oracle of the zoo of captured models finds what is planted."""

import sys

import pytest
import torch
from pages import ROOT
from torch import nn

from pytest_attnheat.capture.record import AttentionRecord
from pytest_attnheat.capture.recording import Recording

sys.path.insert(0, str(ROOT / "benchmarks"))
from capture_zoo import Case, examine


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.num_heads, self.project = 4, nn.Linear(16, 48)

    def forward(self, x):
        q, k, v = self.project(x).unflatten(-1, (3, 4, 4)).permute(2, 0, 3, 1, 4)
        scores = (2 * q @ k.mT).masked_fill(torch.ones(6, 6).triu(1) > 0, -torch.inf)
        return scores.softmax(-1) @ v


def verdict():
    torch.manual_seed(0)
    model, x = nn.Sequential(Attention()).eval(), torch.randn(2, 6, 16)
    return examine(Case("a model", lambda implementation: model, lambda model: model(x)))


computed, taken = AttentionRecord.compute_weights, Recording.take
FAULTS = {
    "turned": (AttentionRecord, "compute_weights", lambda *a, **k: computed(*a, **k).mT),
    "other heads": (AttentionRecord, "compute_weights", lambda *a, **k: computed(*a, **k).flip(1)),
    "no mask": (AttentionRecord, "mask", None),
}


def test_a_capture_that_is_right_is_called_so():
    assert verdict()["word"] == "right"


@pytest.mark.parametrize("fault", FAULTS.values(), ids=FAULTS)
def test_a_fault_that_is_not_said_is_silent(monkeypatch, fault):
    monkeypatch.setattr(*fault)
    assert verdict()["word"] == "silent"


def test_an_attention_without_a_record_is_named_or_silent(monkeypatch):
    monkeypatch.setattr(Recording, "take", lambda *given: lambda: None)
    assert verdict()["word"] == "named"
    monkeypatch.setattr("pytest_attnheat.capture.changes._is_attention", lambda module: False)
    assert verdict()["word"] == "silent"
