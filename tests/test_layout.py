"""Everything has its place in whole pixels, and nothing lies outside the figure."""

import itertools

import pytest

from pytest_attnheat.heatmaps.layout import LINE, Box, Content, natural_size, plan

GRIDS = [(1, 1, 10, 10), (2, 4, 8, 8), (12, 12, 128, 128), (1, 1, 4096, 4096), (1, 8, 1, 40),
         (1, 1, 1, 4096), (1, 1, 4096, 1), (3, 3, 50, 7), (1, 1, 1, 1)]  # fmt: skip
SIZES = [(250, 250), (700, 350), (1201, 333), (120, 120)]


def boxes(layout):
    panels = [Box(left, top, *layout.panel) for left in layout.lefts for top in layout.tops]
    return panels + ([layout.bar] if layout.bar else [])


def is_inside(box, size):
    return box.left >= 0 and box.top >= 0 and (
        box.left + box.width <= size[0] and box.top + box.height <= size[1]
    )  # fmt: skip


def overlap(one, other):
    return (
        one.left < other.left + other.width
        and other.left < one.left + one.width
        and one.top < other.top + other.height
        and other.top < one.top + one.height
    )


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("full", [False, True])
def test_panels_and_colorbar_lie_in_the_figure_and_apart(grid, size, full):
    content = Content(grid, title=full, column_titles=full, row_titles=full, notes=full)
    layout = plan(content, size, 100)
    assert all(is_inside(box, size) for box in boxes(layout))
    assert not any(overlap(a, b) for a, b in itertools.combinations(boxes(layout), 2))


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("grid", GRIDS)
def test_every_cell_has_a_whole_number_of_pixels_and_the_panel_holds_them_all(grid, size):
    layout = plan(Content(grid), size, 100)
    blocks = (-(-grid[2] // layout.block[0]), -(-grid[3] // layout.block[1]))
    assert all(isinstance(side, int) and side >= 1 for side in layout.cell)
    assert layout.panel == (blocks[1] * layout.cell[0], blocks[0] * layout.cell[1])
    assert all(isinstance(edge, int) for edge in layout.lefts + layout.tops)


@pytest.mark.parametrize("size", SIZES)
def test_lines_of_text_lie_in_the_figure_and_beside_the_panels(size):
    content = Content((2, 2, 6, 6), title=True, column_titles=True, row_titles=True, notes=1)
    layout = plan(content, size, 100)
    half, area = LINE / 2 * layout.em, layout.area
    down = [layout.title, layout.column_titles, area.top, area.top + area.height, layout.xlabel]
    across = [layout.ylabel, layout.row_titles, area.left]
    assert down == sorted(down)
    assert across == sorted(across)
    assert layout.title - half >= 0
    assert layout.notes + half * 0.8 <= size[1]
    assert layout.ylabel - half >= 0


def test_cells_are_square_where_they_fit():
    layout = plan(Content((1, 1, 10, 20)), (400, 400), 100)
    assert layout.block == (1, 1)
    assert layout.cell[0] == layout.cell[1] > 5


def test_large_maps_are_pooled_in_the_smallest_blocks_that_fit():
    layout = plan(Content((1, 1, 4096, 4096)), (250, 250), 100)
    assert layout.block[0] == layout.block[1]
    assert 100 < layout.panel[0] <= 250
    assert layout.cell == (1, 1)


@pytest.mark.parametrize("grid", [(1, 1, 1, 4096), (1, 1, 4096, 1), (1, 1, 2, 300)])
def test_a_map_of_few_rows_or_columns_is_not_drawn_as_a_line(grid):
    layout = plan(Content(grid), (250, 250), 100)
    assert min(layout.panel) >= 12


def test_texts_shrink_before_the_panels_do():
    small, large = (plan(Content((1, 1, 10, 10)), size, 100) for size in ((110, 110), (400, 400)))
    assert small.em < large.em
    assert small.panel[0] >= 0.3 * 110


def test_texts_shrink_no_more_than_they_must():
    sizes = [plan(Content((1, 1, 10, 10)), (side, side), 100).em for side in range(80, 260, 20)]
    assert sizes == sorted(sizes)
    assert len(set(sizes)) > 3


def test_a_figure_without_room_says_which_size_would_do():
    with pytest.raises(ValueError, match=r"figsize: got \(0.3, 0.3\).*2 x 3 panels.*None") as e:
        plan(Content((2, 3, 4, 4)), (30, 30), 100)
    wide, high = eval(str(e.value).split("at least ")[1].split(", or")[0])
    plan(Content((2, 3, 4, 4)), (int(wide * 100) + 1, int(high * 100) + 1), 100)


@pytest.mark.parametrize("cell", [1, 7, 24])
@pytest.mark.parametrize("grid", [(1, 1, 10, 10), (2, 4, 8, 8), (12, 12, 60, 60), (1, 2, 1, 30)])
@pytest.mark.parametrize("ranges", [False, True])
def test_a_figure_of_its_natural_size_has_cells_of_the_pixels_asked_for(grid, cell, ranges):
    content = Content(grid, above=LINE * ranges, notes=1, row_titles=True)
    layout = plan(content, natural_size(content, 100, cell), 100)
    assert layout.block == (1, 1)
    assert min(layout.cell) >= cell


def test_the_layout_does_not_move_with_the_resolution():
    one, two = (
        plan(Content((2, 2, 8, 8)), (300, 300), 100),
        plan(Content((2, 2, 8, 8)), (600, 600), 200),
    )
    assert two.cell[0] == pytest.approx(2 * one.cell[0], abs=1)
