"""Labels stay readable in any script, and never overlap or warn."""

import matplotlib.font_manager
import pytest
from matplotlib.font_manager import FontProperties
from matplotlib.textpath import TextPath

from pytest_attnheat.heatmaps import labels
from pytest_attnheat.heatmaps.labels import ELLIPSIS, Lettering, make_labels, round_up, shorten

LETTERING = Lettering.default()


@pytest.mark.parametrize("text", ["Queries", "0.25", "WWW", "iii", "Ġthe", "▁token", "É"])
def test_a_width_is_that_of_the_text_as_drawn_and_a_tenth_for_hinting(text):
    drawn = TextPath((0, 0), text + "|", size=1000, prop=FontProperties()).get_extents().x1
    bar = TextPath((0, 0), "|", size=1000, prop=FontProperties()).get_extents().x1
    assert LETTERING.width(text) * 1000 == pytest.approx(1.1 * (drawn - bar), rel=0.03)


def test_a_long_label_is_cut_to_the_room_with_an_ellipsis():
    short = shorten("antidisestablishmentarianism", LETTERING, 5)
    assert short.endswith(ELLIPSIS)
    assert "antidisestablishmentarianism".startswith(short[:-1])
    assert 4 < LETTERING.width(short) <= 5
    assert shorten("fits", LETTERING, 5) == "fits"


def test_what_no_font_can_draw_is_written_as_an_escape(monkeypatch):
    monkeypatch.setattr(labels, "_font_with", lambda character: None)
    (label,) = make_labels(["a\u4e2d"], LETTERING, 99)
    assert label.text == r"a\u4e2d"


def test_what_another_installed_font_can_draw_is_drawn_with_it(monkeypatch):
    monkeypatch.setattr(labels, "_font_with", lambda character: "Noto Sans CJK")
    (label,) = make_labels(["a\u4e2d\u6587"], LETTERING, 99)
    assert label.text == "a\u4e2d\u6587"
    assert label.family == (*LETTERING.family, "Noto Sans CJK")


def test_labels_reserve_the_same_room_whichever_fonts_are_installed(monkeypatch):
    widths = []
    for font in (None, "Noto Sans CJK"):
        monkeypatch.setattr(labels, "_font_with", lambda character, font=font: font)
        widths.append(make_labels(["\u4e2d"], LETTERING, 8)[0].width)
    assert widths == [8, 8]


def test_an_installed_font_is_found_by_its_glyphs():
    # STIX, which comes with matplotlib, has mathematical letters that DejaVu Sans lacks.
    character = "\N{MATHEMATICAL SANS-SERIF BOLD CAPITAL ALPHA}"
    if LETTERING.has(character):
        pytest.skip("the default font has every character that another one has")
    name = labels._font_with(character)
    assert name in {entry.name for entry in matplotlib.font_manager.fontManager.ttflist}


def test_line_ends_and_control_characters_are_escaped_and_joiners_dropped():
    texts = ["a\nb", "\t", "\x00", "a\U000e0061b", "\ud800"]
    assert [label.text for label in make_labels(texts, LETTERING, 99)] == [
        r"a\nb", r"\t", r"\x00", "ab", r"\ud800",
    ]  # fmt: skip


def test_dollar_signs_and_backslashes_are_left_alone():
    assert make_labels([r"$x^2$ \alpha"], LETTERING, 99)[0].text == r"$x^2$ \alpha"


@pytest.mark.parametrize(
    ("number", "rounded"), [(1, 1), (2, 2), (3, 5), (6, 10), (11, 20), (201, 500)]
)
def test_numbers_are_thinned_to_round_steps(number, rounded):
    assert round_up(number) == rounded
