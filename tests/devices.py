"""The devices that tests of devices run on: a GPU where there is one, a pretend one anywhere."""

import pretend_device
import pytest
import torch

NO_CUDA = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
NO_PRETEND = pytest.mark.skipif(not pretend_device.SUPPORTED, reason=pretend_device.NEEDS_TORCH)

# `-m cuda` selects what a GPU has to show.
ACCELERATORS = [
    pytest.param("cuda", marks=[pytest.mark.cuda, NO_CUDA]),
    pytest.param(pretend_device.NAME, marks=NO_PRETEND),
]


@pytest.fixture
def pretend():
    """Make the pretend accelerator present for a test."""
    if not pretend_device.SUPPORTED:
        pytest.skip(pretend_device.NEEDS_TORCH)
    with pretend_device.present() as device:
        yield device


@pytest.fixture(params=ACCELERATORS)
def accelerator(request):
    """An accelerator, as a `torch.device` without a number."""
    if request.param == pretend_device.NAME:
        request.getfixturevalue("pretend")
    return torch.device(request.param)
