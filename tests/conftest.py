"""Shared by all tests."""

# In-process pytester runs unload what they imported, and a second import of
# torch in one interpreter crashes it: import both here, once, first.
import matplotlib  # noqa: F401
import torch  # noqa: F401

pytest_plugins = ["pytester"]
