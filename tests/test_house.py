"""No room uses one above it, no modules import each other in a circle, only plugin knows pytest."""

from pathlib import Path

import pytest
from house import FLOORS, breaches

PACKAGE = Path(__file__).parents[1] / "pytest_attnheat"


@pytest.fixture
def house(tmp_path):
    """Write a package called `house` and say what is wrong with it."""

    def build(**files):
        for name, text in files.items():
            path = tmp_path / "house" / f"{name.replace('__', '/', 1)}.py"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text, encoding="utf-8")
        (tmp_path / "house" / "__init__.py").touch()
        return breaches(tmp_path / "house")

    return build


def test_the_package_keeps_its_floors():
    found = breaches(PACKAGE)
    if found:
        raise AssertionError("\n".join(found))


def test_every_floor_is_read():
    rooms = {path.stem for path in PACKAGE.iterdir() if path.suffix == ".py" or path.is_dir()}
    assert {room for floor in FLOORS for room in floor} == {r for r in rooms if r[0] != "_"}


def test_a_room_may_use_rooms_below_and_beside_it(house):
    found = house(
        plugin__run="import pytest\nfrom house.contract import report\n",
        contract__report="from house.attention.plan import Plan\nimport house.inputs\n",
        failure="from house.heatmaps.figure import draw\nfrom . import inputs\n",
        heatmaps__figure="from ..attention import plan\n",
        attention__plan="import torch\nfrom house.inputs import one_of\n",
        inputs="",
    )
    assert found == []


@pytest.mark.parametrize(
    "text",
    [
        "from house.contract.report import Report",
        "from house.contract import report",
        "import house.contract.report",
        "from ..contract import report",
        "from ..contract.report import Report as R, Other",
    ],
)
@pytest.mark.parametrize(
    "inside", ["{}", "def work():\n    if 1:\n        {}", "if TYPE_CHECKING:\n    {}"]
)
def test_a_room_that_uses_one_above_it_is_named(house, text, inside):
    source = "import math\n" + inside.format(text) + "\n"
    line = 2 + inside.count("\n")
    found = house(capture__trace=source, contract__report="", contract__other="")
    assert found == [
        f"house/capture/trace.py:{line}: `{text}`: room capture may not use room contract above it"
    ]


def test_a_package_is_named_by_its_file(house):
    found = house(attention____init__="from house import failure\n", failure="")
    assert found == [
        "house/attention/__init__.py:1: `from house import failure`: "
        "room attention may not use room failure above it"
    ]


@pytest.mark.parametrize(
    "text",
    [
        "import pytest",
        "from pytest import fail",
        "from _pytest import terminal",
        "import _pytest.x",
    ],
)
@pytest.mark.parametrize("room", ["capture__trace", "contract__report", "failure"])
def test_pytest_outside_of_plugin_is_named(house, room, text):
    found = house(**{room: f"\n\n{text}\n"})
    file = room.replace("__", "/")
    assert found == [f"house/{file}.py:3: `{text}`: only plugin imports pytest"]


def test_other_packages_that_begin_alike_are_not_meant(house):
    assert house(capture__trace="import pytest_html, house_of_cards\n") == []


def test_a_circle_is_drawn_once_with_all_its_lines(house):
    found = house(
        capture__trace="from house.capture.record import Record\n",
        capture__record="import math\n\n\ndef weigh():\n    from house.capture import weighing\n",
        capture__weighing="\nfrom .trace import Trace\n",
        capture__outside="from house.capture.trace import Trace\n",
    )
    assert len(found) == 1
    start, _, circle = found[0].partition(": modules in a circle: ")
    assert start.startswith("house/capture/")
    assert sorted(circle.split(", ")) == [
        "house.capture.record uses house.capture.weighing (house/capture/record.py:5)",
        "house.capture.trace uses house.capture.record (house/capture/trace.py:1)",
        "house.capture.weighing uses house.capture.trace (house/capture/weighing.py:2)",
    ]


def test_two_circles_are_two_lines(house):
    found = house(
        capture__a="from house.capture import b, c\n",
        capture__b="from house.capture import a\n",
        capture__c="from house.capture import a\n",
    )
    assert len(found) == 2


def test_an_annotation_closes_no_circle_between_modules(house):
    found = house(
        capture__trace="from house.capture.record import Record\n",
        capture__record="if TYPE_CHECKING:\n    from house.capture.trace import Trace\n",
    )
    assert found == []


def test_rooms_of_one_floor_in_a_circle_are_named(house):
    found = house(
        heatmaps__figure="def fail():\n    from house.failure import Failure\n",
        heatmaps__maps="",
        failure="\nfrom house.heatmaps.maps import pooled\n",
    )
    assert len(found) == 1
    assert "failure uses heatmaps (house/failure.py:2)" in found[0]
    assert "heatmaps uses failure (house/heatmaps/figure.py:2)" in found[0]
    assert "rooms in a circle" in found[0]


def test_a_room_takes_no_name_from_the_table_of_public_names(house):
    found = house(capture__trace="from house import assert_causal\n")
    assert found == [
        "house/capture/trace.py:1: `from house import assert_causal`: "
        "a room takes a name from the room that has it, not from house"
    ]


def test_a_room_that_nobody_knows_is_named(house):
    assert house(cellar__wine="import math\n") == ["room cellar has no floor"]
