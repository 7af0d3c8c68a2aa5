"""Shared by all tests."""

# In-process pytester runs unload what they imported. A second import of torch in one
# interpreter crashes it, and a second matplotlib would have a second class Figure: import
# them here, once, first.
import matplotlib.pyplot
import matplotlib.style
import matplotlib.testing.compare
import torch
from devices import accelerator, pretend  # noqa: F401

import pytest_attnheat.heatmaps.figure  # noqa: F401

matplotlib.use("agg")
# Each xdist worker has a core to itself: threads of several workers wait for one another.
torch.set_num_threads(1)

pytest_plugins = ["pytester"]
