"""One artist that draws the whole picture, composed anew for every size and resolution."""

from __future__ import annotations

from matplotlib.artist import Artist
from matplotlib.backend_bases import RendererBase
from matplotlib.figure import Figure
from matplotlib.transforms import Affine2D, Bbox

from pytest_attnheat.heatmaps.sheet import Sheet, Shown, compose

# What tells the image of a picture from others in an SVG.
IMAGE_ID = "attnheat-panels"


class Picture(Artist):
    """Panels, colorbar and every text of a heatmap figure.

    Attributes:
        shown: what it shows, independent of its size.
    """

    def __init__(self, shown: Shown, figure: Figure) -> None:
        super().__init__()
        self.shown = shown
        self._figure = figure
        self._nominal_dpi: float | None = None
        # The sheet composed last, by size and resolution.
        self._sheets: dict[tuple[tuple[int, int], float], Sheet] = {}

    def prepare(self, size: tuple[int, int], dpi: float) -> Sheet:
        """Compose the picture for a size in pixels, unless that was done last."""
        if (size, dpi) not in self._sheets:
            self._nominal_dpi = self._nominal_dpi or dpi
            sheet = compose(self.shown, size, dpi)
            for text in sheet.texts:
                text.set_figure(self._figure)
            self._sheets = {(size, dpi): sheet}
        return self._sheets[size, dpi]

    def draw(self, renderer: RendererBase) -> None:
        """Draw on any of matplotlib's renderers."""
        if not self.get_visible():
            return
        figure = self._figure
        # Saving with bbox_inches="tight" moves this transform, and nothing else.
        (left, bottom), (right, top) = figure.transFigure.transform([(0, 0), (1, 1)])
        scalable = renderer.option_scale_image()
        # Vector formats draw at 72 dots per inch, but keep the pixels that the figure was made for.
        dpi = (self._nominal_dpi or figure.dpi) if scalable else figure.dpi
        zoom = figure.dpi / dpi
        size = int((right - left) / zoom + 1e-6), int((top - bottom) / zoom + 1e-6)
        sheet = self.prepare(size, dpi)
        height, width = sheet.image.shape[0] * zoom, sheet.image.shape[1] * zoom
        graphics = renderer.new_gc()
        graphics.set_gid(IMAGE_ID)  # type: ignore[arg-type]  # any text will do
        image = sheet.image[::-1]
        if scalable:
            renderer.draw_image(graphics, left, bottom, image, Affine2D().scale(width, height))
        else:
            renderer.draw_image(graphics, round(left), round(bottom), image)
        graphics.restore()
        place = Affine2D().scale(zoom, -zoom).translate(left, bottom + height)
        for text in sheet.texts:
            text.set_transform(place)
            text.draw(renderer)

    def get_children(self) -> list[Artist]:
        """Return the texts of the sheet composed last."""
        return [text for sheet in self._sheets.values() for text in sheet.texts]

    def get_window_extent(self, renderer: RendererBase | None = None) -> Bbox:
        """Return the whole figure: a tight bounding box must not cut its margins."""
        return Bbox(self._figure.transFigure.transform([(0, 0), (1, 1)]))

    def get_tightbbox(self, renderer: RendererBase | None = None) -> Bbox:
        """Return the whole figure."""
        return self.get_window_extent(renderer)
