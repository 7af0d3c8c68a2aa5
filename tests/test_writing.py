"""Labels stay readable in any script, and never overlap or warn."""

import matplotlib.font_manager
import pytest
from matplotlib.font_manager import FontProperties
from matplotlib.textpath import TextPath

from pytest_attnheat.heatmaps import writing
from pytest_attnheat.heatmaps.picture import _Axis
from pytest_attnheat.heatmaps.writing import ELLIPSIS, Lettering, make_labels, round_up, shorten

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
    monkeypatch.setattr(writing, "_font_with", lambda character: None)
    (label,) = make_labels(["a\u4e2d"], LETTERING, 99)
    assert label.text == r"a\u4e2d"


def test_what_another_installed_font_can_draw_is_drawn_with_it(monkeypatch):
    monkeypatch.setattr(writing, "_font_with", lambda character: "Noto Sans CJK")
    (label,) = make_labels(["a\u4e2d\u6587"], LETTERING, 99)
    assert label.text == "a\u4e2d\u6587"
    assert label.family == (*LETTERING.family, "Noto Sans CJK")


def test_labels_reserve_the_same_room_whichever_fonts_are_installed(monkeypatch):
    widths = []
    for font in (None, "Noto Sans CJK"):
        monkeypatch.setattr(writing, "_font_with", lambda character, font=font: font)
        widths.append(make_labels(["\u4e2d"], LETTERING, 8)[0].width)
    assert widths == [8, 8]


def test_an_installed_font_is_found_by_its_glyphs():
    # STIX, which comes with matplotlib, has mathematical letters that DejaVu Sans lacks.
    character = "\N{MATHEMATICAL SANS-SERIF BOLD CAPITAL ALPHA}"
    if LETTERING.has(character):
        pytest.skip("the default font has every character that another one has")
    name = writing._font_with(character)
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


def ticks(edges, side, count, extent):
    axis = _Axis(edges, side, count, None, LETTERING)
    return [(label.text, round(at, 1)) for label, at in axis.ticks(lambda label: extent)]


def test_a_panel_alone_has_all_labels_that_fit():
    assert ticks((0,), 36, 11, 13) == [("0", 1.6), ("5", 18.0), ("10", 34.4)]


def test_the_last_label_of_a_panel_keeps_clear_of_the_next_panel():
    assert ticks((0, 38), 36, 11, 13) == [("0", 1.6), ("5", 18.0), ("0", 39.6), ("5", 56.0)]


def test_panels_narrower_than_a_label_have_one_in_every_few():
    assert ticks((0, 16, 32, 48), 14, 4, 30) == [("0", 1.8), ("0", 33.8)]
