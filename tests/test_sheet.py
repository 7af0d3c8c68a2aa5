"""Tick labels of panels side by side keep clear of one another."""

from pytest_attnheat.heatmaps.labels import Lettering
from pytest_attnheat.heatmaps.sheet import _Axis

LETTERING = Lettering.default()


def ticks(edges, side, count, extent):
    axis = _Axis(edges, side, count, None, LETTERING)
    return [(label.text, round(at, 1)) for label, at in axis.ticks(lambda label: extent)]


def test_a_panel_alone_has_all_labels_that_fit():
    assert ticks((0,), 36, 11, 13) == [("0", 1.6), ("5", 18.0), ("10", 34.4)]


def test_the_last_label_of_a_panel_keeps_clear_of_the_next_panel():
    assert ticks((0, 38), 36, 11, 13) == [("0", 1.6), ("5", 18.0), ("0", 39.6), ("5", 56.0)]


def test_panels_narrower_than_a_label_have_one_in_every_few():
    assert ticks((0, 16, 32, 48), 14, 4, 30) == [("0", 1.8), ("0", 33.8)]
