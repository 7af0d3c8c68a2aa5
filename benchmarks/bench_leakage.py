"""Forward passes that `assert_no_leakage` costs: python benchmarks/bench_leakage.py."""

import torch
from timing import alternate, report
from torch import nn

from pytest_attnheat import assert_no_leakage

VOCABULARY, WIDTH, HEADS, LAYERS, LENGTH = 1000, 256, 8, 6, 512
ROUNDS = 5


class LanguageModel(nn.Module):
    """Six causal layers over token ids."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, WIDTH)
        layer = nn.TransformerEncoderLayer(WIDTH, HEADS, 4 * WIDTH, batch_first=True)
        self.layers = nn.TransformerEncoder(layer, LAYERS, enable_nested_tensor=False)
        self.head = nn.Linear(WIDTH, VOCABULARY)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        """Return logits (batch, length, vocabulary)."""
        mask = nn.Transformer.generate_square_subsequent_mask(ids.shape[1], device=ids.device)
        return self.head(self.layers(self.embedding(ids), mask=mask, is_causal=True))


def main() -> None:
    """Print the cost for one sequence and for a batch."""
    torch.manual_seed(0)
    model = LanguageModel().eval()
    for batch in (1, 4):
        ids = torch.randint(VOCABULARY, (batch, LENGTH))

        def forward(ids: torch.Tensor = ids) -> torch.Tensor:
            with torch.no_grad():
                return model(ids)

        def check(ids: torch.Tensor = ids) -> None:
            assert_no_leakage(model, ids)

        once, checked = alternate([forward, check], ROUNDS)
        what = f"{LAYERS} layers, {batch} x {LENGTH} tokens, against one forward pass"
        report(what, checked / once, "<=", 12)


if __name__ == "__main__":
    main()
