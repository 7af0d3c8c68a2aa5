"""Labels in any script that fit where they stand.

Widths come from the advance widths that the font's designer wrote into it, not from rendered
text: they are the same for every version of matplotlib and FreeType, and so is the layout.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

from matplotlib import font_manager
from matplotlib.ft2font import FT2Font

ELLIPSIS = "\N{HORIZONTAL ELLIPSIS}"
# Small letters are moved to whole pixels when they are drawn, which may make a text wider.
_HINTING = 1.1
# Where a label holds characters that the default font lacks, it may be this wide (in em).
LONGEST = 8.0


@dataclass(frozen=True)
class Lettering:
    """The default font, and how wide it sets a text.

    Attributes:
        family: matplotlib's names for it.
        path: its file.
    """

    family: tuple[str, ...]
    path: str

    @classmethod
    def default(cls) -> Lettering:
        """Return the font that matplotlib's settings ask for."""
        properties = font_manager.FontProperties()
        return cls(tuple(properties.get_family()), str(font_manager.findfont(properties)))

    def has(self, character: str) -> bool:
        """Tell whether the default font has a glyph for a character."""
        return _has_glyph(self.path, character)

    def width(self, text: str) -> float:
        """Return the room in em that a text takes. A character the font lacks counts as one em."""
        return _HINTING * sum(_advance(self.path, character) for character in text)


@dataclass(frozen=True)
class Label:
    """A text that can be drawn: its characters, the fonts that have them, its width in em."""

    text: str
    family: tuple[str, ...]
    width: float


def make_labels(texts: Sequence[str], lettering: Lettering, longest: float) -> list[Label]:
    r"""Make labels that no font fails to draw, each at most `longest` em wide.

    A character that no installed font has is written as its Python escape (`\u4e2d`), as are
    line ends and other control characters. Labels that are too long end in an ellipsis.
    """
    labels = []
    for text in texts:
        drawable, fallbacks, foreign = _drawable(str(text), lettering)
        fitting = shorten(drawable, lettering, longest)
        # Panels must not move with the fonts that a machine happens to have.
        width = longest if foreign else lettering.width(fitting)
        labels.append(Label(fitting, (*lettering.family, *fallbacks), width))
    return labels


def shorten(text: str, lettering: Lettering, longest: float) -> str:
    """Cut a text to at most `longest` em, the ellipsis that marks the cut included."""
    width, room, fitting = 0.0, longest - lettering.width(ELLIPSIS), 0
    for position, character in enumerate(text, 1):
        width += lettering.width(character)
        if width <= room:
            fitting = position
        if width > longest:
            return text[:fitting].rstrip() + ELLIPSIS
    return text


def round_up(number: int) -> int:
    """Return the next of 1, 2, 5, 10, 20, 50 ... that is not smaller."""
    power = 1
    while True:
        for step in (1, 2, 5):
            if step * power >= number:
                return step * power
        power *= 10


def _drawable(text: str, lettering: Lettering) -> tuple[str, list[str], bool]:
    """Escape what cannot be drawn.

    Returns the text, the further fonts that it needs, and whether it depends on the fonts
    installed.
    """
    characters: list[str] = []
    fallbacks: list[str] = []
    foreign = False
    for character in text:
        if unicodedata.category(character) in ("Cc", "Cs", "Zl", "Zp"):
            characters.append(_escape(character))
        elif lettering.has(character):
            characters.append(character)
        elif unicodedata.category(character) == "Cf" or _is_variation(character):
            continue  # joiners and variation selectors have no shape of their own
        else:
            foreign = True
            name = _font_with(character)
            characters.append(_escape(character) if name is None else character)
            if name is not None and name not in fallbacks:
                fallbacks.append(name)
    return "".join(characters), fallbacks, foreign


def _escape(character: str) -> str:
    return character.encode("unicode_escape").decode("ascii")


def _is_variation(character: str) -> bool:
    return "\ufe00" <= character <= "\ufe0f"


@lru_cache(maxsize=4096)
def _font_with(character: str) -> str | None:
    """Name an installed font that has a glyph for a character, upright sans-serifs first."""
    entries = sorted(
        font_manager.fontManager.ttflist,
        key=lambda entry: (entry.style != "normal", "sans" not in entry.name.lower(), entry.name),
    )
    for entry in entries:
        # The font of last resort has a box for everything, which reads as nothing.
        if "last" in entry.name.lower() and "resort" in entry.name.lower():
            continue
        try:
            found = _has_glyph(entry.fname, character)
        except (OSError, RuntimeError):
            continue  # removed or damaged since matplotlib listed it
        if found:
            return entry.name
    return None


@lru_cache(maxsize=16384)
def _has_glyph(path: str, character: str) -> bool:
    return bool(_open(path).get_char_index(ord(character)))


@lru_cache(maxsize=16384)
def _advance(path: str, character: str) -> float:
    if not _has_glyph(path, character):
        return 1.0
    font = _open(path)
    font.set_size(100, 72)
    return float(font.load_char(ord(character)).linearHoriAdvance) / 65536 / 100


@lru_cache(maxsize=64)
def _open(path: str) -> FT2Font:
    return FT2Font(path)
