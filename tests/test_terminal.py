"""The text view of attention weights."""

import io
import math
import sys

import numpy as np
import pytest
import torch

from pytest_attnheat import format_heatmap


def test_a_map_is_drawn_on_one_scale_with_labels_and_sums():
    assert format_heatmap(torch.eye(3)).splitlines() == [
        "keys 0..2",
        "  q0  █▁▁  1.000",
        "  q1  ▁█▁  1.000",
        "  q2  ▁▁█  1.000",
    ]


def test_every_eighth_of_the_scale_has_its_block():
    weights = torch.arange(8).div(8).add(0.01).unsqueeze(0)
    assert "▁▂▃▄▅▆▇█" in format_heatmap(weights)


def test_the_scale_is_the_same_for_every_map():
    faint = torch.stack([torch.eye(2), torch.eye(2) / 2])
    assert format_heatmap(faint).splitlines()[1::3] == ["  q0  █▁  1.000", "  q0  ▅▁  0.500"]


def test_a_scale_can_be_set():
    assert "▁█" in format_heatmap(torch.tensor([[-3.0, 5.0]]), vmin=-3, vmax=5)


def test_what_is_no_weight_shows():
    weights = torch.tensor([[math.nan, -0.1, 1.5, math.inf, -math.inf, 0.5]])
    assert "?-++-▅" in format_heatmap(weights)


def test_rounding_above_one_is_drawn_as_one():
    assert "█" in format_heatmap(torch.tensor([[1.0078125]]).bfloat16())


def test_a_masked_cell_differs_from_zero_and_weight_on_it_is_not_hidden():
    mask = torch.tensor([[True, False, False]])
    weights = torch.tensor([[0.0, 0.0, 1.0], [1.0, 0.0, 0.0]])
    assert format_heatmap(weights, mask=mask).splitlines()[1:] == [
        "  q0  ▁·█  1.000",
        "  q1  █··  1.000",
    ]


@pytest.mark.parametrize("place", [(0, 0), (4095, 4095), (1234, 3001)])
def test_a_single_weight_in_a_large_map_stays_visible(place):
    weights = torch.zeros(4096, 4096)
    weights[place] = 1
    text = format_heatmap(weights)
    assert text.count("█") == 1
    assert text.splitlines()[0] == "keys 0..4095, the largest of each 64"
    assert len(text.splitlines()) == 33


def test_pooled_rows_carry_a_range_and_no_sum():
    lines = format_heatmap(torch.eye(100), max_rows=10, marked=[57]).splitlines()
    assert lines[1].startswith("  q0-9    █")
    assert [line.split()[0] for line in lines if line.endswith("<-")] == ["q50-59"]


def test_a_negative_weight_survives_pooling():
    weights = torch.ones(1, 1000) / 1000
    weights[0, 500] = -0.01
    assert format_heatmap(weights).count("-") == 1


def test_many_maps_are_named_and_what_was_left_out_is_said():
    lines = format_heatmap(torch.eye(2).expand(3, 4, 2, 2), max_maps=5).splitlines()
    assert [line for line in lines if "keys" in line] == [
        f"head [{b}, {h}]    keys 0..1" for b, h in [(0, 0), (0, 1), (0, 2), (0, 3), (1, 0)]
    ]
    assert lines[-1] == "(7 more not drawn)"
    assert "map [2]    keys" in format_heatmap(torch.eye(2).expand(3, 2, 2))


def test_rows_of_a_part_keep_their_numbers():
    text = format_heatmap(torch.eye(12)[8:], first_row=8, marked=[9, 11], row_name="k")
    lines = text.splitlines()
    assert [line.split()[0] for line in lines[1:]] == ["k8", "k9", "k10", "k11"]
    assert [line.endswith("<-") for line in lines[1:]] == [False, True, False, True]
    assert len({line.index("1.000") for line in lines[1:]}) == 1


def test_notes_stand_in_place_of_the_sums():
    lines = format_heatmap(torch.eye(2).repeat(2, 1, 1), notes=["low", "1.0 nats"]).splitlines()
    assert lines[1:3] == ["  q0  █▁       low", "  q1  ▁█  1.0 nats"]
    assert lines[4:6] == lines[1:3]
    pooled = format_heatmap(torch.eye(4), max_rows=2, notes=["a", "b", "c", "d"]).splitlines()
    assert pooled[1:] == ["  q0-1  ██▁▁", "  q2-3  ▁▁██"]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16], ids=str)
def test_any_dtype_stride_and_gradient_state_gives_the_same_text(dtype):
    weights = torch.arange(24).view(2, 3, 4) / 32
    text = format_heatmap(weights)
    given = weights.to(dtype).requires_grad_().mT.contiguous().mT
    assert [line[:12] for line in format_heatmap(given).splitlines()] == [
        line[:12] for line in text.splitlines()
    ]
    assert format_heatmap(weights.numpy()[::-1][::-1]) == text
    assert format_heatmap(np.broadcast_to(weights.numpy(), (2, 3, 4))) == text


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"max_columns": 0}, "max_columns: got 0; accepted is a whole number from 1"),
        ({"max_rows": 0}, "max_rows: got 0"),
        ({"max_maps": 0}, "max_maps: got 0"),
        ({"notes": ["one"]}, "notes: got 1; accepted is one for each row: 2"),
        ({"vmin": 1.0}, "accepted is vmin < vmax"),
    ],
)
def test_limits_that_show_nothing_are_refused(arguments, words):
    with pytest.raises(ValueError, match=words):
        format_heatmap(torch.eye(2), **arguments)


def test_what_is_no_map_is_refused():
    with pytest.raises(TypeError, match="accepted is a dense"):
        format_heatmap(torch.eye(2).int())
    with pytest.raises(ValueError, match="no elements"):
        format_heatmap(torch.ones(0, 2))


def test_a_part_is_numbered_from_its_first_row_and_column():
    drawn = format_heatmap(torch.eye(3), first_row=4, first_column=10)
    assert drawn.splitlines()[:2] == ["keys 10..12", "  q4  █▁▁  1.000"]


@pytest.mark.parametrize("encoding", ["cp1252", "ascii"])
def test_a_stream_that_has_no_blocks_gets_plain_characters(monkeypatch, encoding):
    stream = io.TextIOWrapper(io.BytesIO(), encoding=encoding)
    monkeypatch.setattr(sys, "stdout", stream)
    mask = torch.tensor([[True, True, False]])
    stream.write(format_heatmap(torch.tensor([[1.0, 0.0, 0.0]]), mask=mask))
    stream.flush()
    assert "q0  #_~" in stream.buffer.getvalue().decode(encoding)
