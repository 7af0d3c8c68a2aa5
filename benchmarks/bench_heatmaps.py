"""How fast pictures are drawn, each beside another thing measured in the same run.

    python benchmarks/bench_heatmaps.py [--device cuda]

Every line prints a ratio and the promise about it. The textbook's function is the one that
teaching material uses: one Axes for each panel, with shared axes.
"""

from __future__ import annotations

import io
from collections.abc import Callable
from unittest import mock

import matplotlib
import numpy as np
import torch
from matplotlib import pyplot
from matplotlib.figure import Figure
from PIL import Image
from timing import alternate, options, report

from pytest_attnheat import show_heatmaps
from pytest_attnheat.heatmaps import figure, showing

matplotlib.use("agg")


def textbook(weights: torch.Tensor, figsize: tuple[float, float]) -> Figure:
    """Draw one Axes per panel, their axes shared, with one colorbar."""
    rows, columns = weights.shape[:2]
    drawn, axes = pyplot.subplots(
        rows, columns, figsize=figsize, sharex=True, sharey=True, squeeze=False
    )
    for row in range(rows):
        for column in range(columns):
            image = axes[row, column].imshow(weights[row, column].cpu().numpy(), cmap="Reds")
            if row == rows - 1:
                axes[row, column].set_xlabel("Keys")
            if column == 0:
                axes[row, column].set_ylabel("Queries")
    drawn.colorbar(image, ax=axes, shrink=0.6)
    return drawn


def png(draw: Callable[[], Figure]) -> bytes:
    """Draw a figure and encode it."""
    file, drawn = io.BytesIO(), draw()
    drawn.savefig(file, format="png")
    pyplot.close(drawn)
    return file.getvalue()


def floor(weights: torch.Tensor) -> bytes:
    """Colour-map the cells of all maps with NumPy and write a palette PNG with Pillow."""
    rows, columns, queries, keys = weights.shape
    levels = (weights.cpu().numpy() * 255).astype(np.uint8)
    mosaic = levels.transpose(0, 2, 1, 3).reshape(rows * queries, columns * keys)
    image = Image.fromarray(mosaic)
    image.putpalette(matplotlib.colormaps["Reds"](range(256), bytes=True)[:, :3].tobytes())
    file = io.BytesIO()
    image.save(file, format="png")
    return file.getvalue()


def bare(draw: Callable[[], bytes]) -> bytes:
    """Draw without what a comparison with a baseline needs."""
    nothing = {name: lambda *_: None for name in ("survey", "whole_of")}
    with (
        mock.patch.multiple(showing, **nothing),
        mock.patch.object(figure, "encode", return_value=""),
    ):
        return draw()


def softmax(*shape: int) -> torch.Tensor:
    """Draw weights from a seed."""
    scores = torch.randn(*shape, generator=torch.Generator().manual_seed(0))
    return scores.mul(2).softmax(-1)


def main() -> None:
    """Print the ratios."""
    given = options(__doc__)
    device, panel, side = given.device, *((16, 64) if given.quick else (128, 4096))
    small = softmax(1, 1, 10, 10).to(device)
    heads = softmax(12, 12, panel, panel).to(device)
    many = softmax(32, 32, panel // 2, panel // 2).to(device)
    large = softmax(side, side).to(device)

    def ours(weights: torch.Tensor, size: float) -> Callable[[], bytes]:
        return lambda: png(lambda: show_heatmaps(weights, "Keys", "Queries", figsize=(size, size)))

    def theirs(weights: torch.Tensor, size: float) -> Callable[[], bytes]:
        return lambda: png(lambda: textbook(weights, (size, size)))

    def times(actions: list[Callable[[], object]], runs: int) -> list[float]:
        return alternate(actions, 1 if given.quick else runs, device)

    print(f"on {device}")
    if not given.quick and device == "cpu":  # the textbook's takes seconds, on the CPU in any case
        textbooks, own = times([theirs(heads, 18), ours(heads, 18)], 3)
        report(f"12 x 12 heads of {panel} x {panel}: textbook / ours", textbooks / own, ">=", 25)
    own, textbooks = times([ours(small, 2.5), theirs(small, 2.5)], 15)
    report("one map of 10 x 10: ours / textbook", own / textbooks, "<=", 1)
    own, plain = times([ours(many, 24), lambda: floor(many)], 5)
    report(f"32 x 32 maps of {panel // 2} x {panel // 2}: ours / palette PNG", own / plain, "<=", 8)
    own, read, one = times([ours(large, 2.5), large.amax, ours(small, 2.5)], 15)
    with_both, without = times([ours(large, 2.5), lambda: bare(ours(large, 2.5))], 15)
    name = f"{side} x {side}: with a sketch and a record / without"
    report(name, with_both / without, "<=", 1.5)
    name = f"{side} x {side}: ours / (amax + one map of 10 x 10)"
    report(name, own / (read + one), "<=", 1.5)


if __name__ == "__main__":
    main()
