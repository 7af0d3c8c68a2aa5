"""Figures whose panels must be the same bytes under every matplotlib, and the hash of each.

Run as a script it prints the hashes under the matplotlib at hand. It needs no torch.
"""

import hashlib
import io

import matplotlib
import numpy as np
from PIL import Image

from pytest_attnheat import show_heatmaps


def weights(*shape):
    """Make rows that are distributions, by integer arithmetic that no library changes."""
    numbers = (np.arange(np.prod(shape)) * 7919 % 104729 % 101).reshape(shape) ** 2 + 1
    return (numbers / numbers.sum(-1, keepdims=True)).astype(np.float32)


def figures():
    """Draw one figure of each kind."""
    causal = np.tril(np.ones((8, 8), bool))
    tokens = ["[CLS]", "the", "cat", "sat", "on", "the", "mat", "[SEP]"]
    return {
        "identity": show_heatmaps(np.eye(10), "Keys", "Queries"),
        "masked grid": show_heatmaps(
            weights(2, 4, 8, 8) * causal, "K", "Q", list("abcd"), (7, 3.5), mask=causal
        ),
        "pooled": show_heatmaps(weights(1000, 1000), "K", "Q"),
        "many heads": show_heatmaps(weights(12, 12, 64, 64), "K", "Q", figsize=None),
        "tokens": show_heatmaps(
            weights(8, 8), "K", "Q", figsize=None, key_labels=tokens, query_labels=tokens
        ),
        "panel scales": show_heatmaps(
            weights(2, 8, 8), "K", "Q", figsize=(4, 3), cmap="viridis", scale="panel"
        ),
    }


def panel_hash(figure):
    """Hash where the panels of a saved figure lie and every pixel of them."""
    file = io.BytesIO()
    figure.savefig(file, format="png")
    image = np.asarray(Image.open(file).convert("RGB"))
    layout = figure.picture.prepare((image.shape[1], image.shape[0]), figure.dpi).layout
    digest = hashlib.sha256(repr((layout.lefts, layout.tops, layout.panel)).encode())
    for top in layout.tops:
        for left in layout.lefts:
            panel = image[top : top + layout.panel[1], left : left + layout.panel[0]]
            digest.update(panel.tobytes())
    return digest.hexdigest()[:12]


if __name__ == "__main__":
    for name, figure in figures().items():
        print(f"{matplotlib.__version__}\t{name}\t{panel_hash(figure)}")  # noqa: T201
