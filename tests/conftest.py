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
