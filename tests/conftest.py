"""Shared by all tests."""

import os
import re

# Each xdist worker has a core to itself, and so has a process that a test starts: threads of
# several would wait for one another. Before torch is imported, which reads it.
os.environ.setdefault("OMP_NUM_THREADS", "1")

# In-process pytester runs unload what they imported. A second import of torch in one
# interpreter crashes it, a second matplotlib would have a second class Figure, and a second room
# of ours a second class of everything: import them here, once, first.
import hypothesis.core  # its pytest plugin imports it, a second long, in every run
import hypothesis.reporting
import hypothesis.statistics  # noqa: F401
import matplotlib.pyplot
import matplotlib.style
import matplotlib.testing.compare
import pytest
import torch
from devices import accelerator, pretend  # noqa: F401

from pytest_attnheat import *  # noqa: F403

matplotlib.use("agg")
torch.set_num_threads(1)

pytest_plugins = ["pytester"]

# What the oldest torch and transformers say where they lack what a test asks them for.
LACKING = re.compile(
    "non power of 2 embedding dimension"
    "|does not support an attention implementation through"
    "|^module '?transformers.* has no attribute"
    "|^module 'torch.* has no attribute '_WARNINGS_SHOWN'"
    r"|^StaticCache.__init__\(\) missing"
)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call():
    try:
        return (yield)
    except (AttributeError, TypeError, ValueError) as error:
        if LACKING.search(str(error)):
            pytest.skip(f"an older version: {error}")
        raise


def pytest_collection_modifyitems(config, items):
    """Run a part of each long matrix, unless all are asked for, or a test by its name.

    Every `of`-th case of a function marked `matrix` stays, the last of them first: a test that is
    no matrix runs only where all do.
    """
    if os.environ.get("ATTNHEAT_MATRIX") or any("::" in one for one in config.args):
        return
    seen, left = {}, []
    for item in items:
        if mark := item.get_closest_marker("matrix"):
            number = seen[item.function] = seen.get(item.function, 0) + 1
            if number % mark.kwargs.get("of", 4):
                left.append(item)
    config.hook.pytest_deselected(items=left)
    gone = set(left)
    items[:] = [item for item in items if item not in gone]
