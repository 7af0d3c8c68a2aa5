"""Figures whose panels must be the same bytes under every matplotlib, and the hash of each.

Run as a script it prints the hashes under the matplotlib at hand. It needs no torch.
"""

import hashlib
import io

import matplotlib
import numpy as np
from matplotlib.figure import Figure
from PIL import Image

from pytest_attnheat import show_difference, show_heatmaps


def weights(*shape):
    """Make rows that are distributions, by integer arithmetic that no library changes."""
    numbers = (np.arange(np.prod(shape)) * 7919 % 104729 % 101).reshape(shape) ** 2 + 1
    return (numbers / numbers.sum(-1, keepdims=True)).astype(np.float32)


def figures():
    """Draw one figure of each kind."""
    causal = np.tril(np.ones((8, 8), bool))
    tokens = ["[CLS]", "the", "cat", "sat", "on", "the", "mat", "[SEP]"]
    small, large = weights(8, 8), weights(600, 600)
    signs = np.where(np.arange(large.size).reshape(large.shape) % 3, 1, -1).astype(np.float32)
    changed, strange = small.copy(), small.copy()
    changed[3, 4] += 0.25
    strange[[1, 2, 5], [2, 6, 0]] = np.nan, np.inf, -np.inf
    on_black = show_heatmaps(small, "K", "Q", title="black")
    on_black.set_facecolor("black")
    titled = show_heatmaps(weights(2, 8, 8), "K", "Q", figsize=None)
    titled.suptitle("of two")
    titled.axes[1].set_title("the second")
    return {
        "identity": show_heatmaps(np.eye(10), "Keys", "Queries"),
        "masked grid": show_heatmaps(
            weights(2, 4, 8, 8) * causal, "K", "Q", list("abcd"), (7, 3.5), mask=causal
        ),
        "pooled": show_heatmaps(weights(1000, 1000), "K", "Q"),
        "many heads": show_heatmaps(weights(12, 12, 64, 64), "K", "Q", figsize=None),
        "tokens": show_heatmaps(
            small, "K", "Q", figsize=None, key_labels=tokens, query_labels=tokens
        ),
        "panel scales": show_heatmaps(
            weights(2, 8, 8), "K", "Q", figsize=(4, 3), cmap="viridis", scale="panel"
        ),
        "a difference": show_difference(small, changed, key_labels=tokens),
        "a query of all layers": show_heatmaps(  # as trace.show(query=) does
            weights(4, 8, 6), "Heads", "Keys", titles=["0", "1", "2", "3"], title="Query 5 the",
            figsize=None, query_labels=tokens, mask=np.arange(8)[:, None] < 6,
        ),
        "small panels": show_heatmaps(weights(12, 12, 8, 8), "K", "Q", figsize="small"),
        "into an axes": show_heatmaps(small, "K", "Q", ax=Figure((6, 4)).add_subplot(1, 2, 2)),
        "on black": on_black,
        "titles": titled,
        "small weights": show_heatmaps(weights(64, 64), "K", "Q"),
        "largest weight": show_heatmaps(weights(64, 64), "K", "Q", scale="largest"),
        "signed": show_heatmaps(small - 0.125, "K", "Q", cmap=matplotlib.colormaps["coolwarm"]),
        "signed and pooled": show_heatmaps(100 * large * signs, "K", "Q", cmap="coolwarm"),
        "not a number": show_heatmaps(strange, "K", "Q"),
        "outlined": show_heatmaps(
            weights(2, 8, 8), None, None, figsize=(4, 3), colorbar=False,
            highlight=[(0, 0, 3, 4), (0, 1, 5)],
        ),
    }  # fmt: skip


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
