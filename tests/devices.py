"""The devices that tests of devices run on: a GPU where there is one, a pretend one anywhere."""

import pretend_device
import pytest
import torch

NO_CUDA = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
NO_PRETEND = pytest.mark.skipif(
    pretend_device.WHY_ABSENT is not None, reason=str(pretend_device.WHY_ABSENT)
)

# `-m cuda` selects what a GPU has to show.
ACCELERATORS = [
    pytest.param("cuda", marks=[pytest.mark.cuda, NO_CUDA]),
    pytest.param(pretend_device.NAME, marks=NO_PRETEND),
]


def on_accelerators(dtypes):
    """Run a test on the accelerators: on a GPU in every dtype, on the pretend one in two.

    What is computed there is computed by the CPU, whose dtypes have tests of their own.
    """
    pairs = [
        pytest.param(device.values[0], dtype, marks=device.marks, id=f"{device.values[0]}-{dtype}")
        for device in ACCELERATORS
        for dtype in dtypes
        if device.values[0] == "cuda" or str(dtype).endswith(("float32", "bfloat16"))
    ]
    return pytest.mark.parametrize(("accelerator", "dtype"), pairs, indirect=["accelerator"])


@pytest.fixture
def pretend():
    """Make the pretend accelerator present for a test."""
    if pretend_device.WHY_ABSENT is not None:
        pytest.skip(pretend_device.WHY_ABSENT)
    with pretend_device.present() as device:
        yield device


@pytest.fixture(params=ACCELERATORS)
def accelerator(request):
    """An accelerator, as a `torch.device` without a number."""
    if request.param == pretend_device.NAME:
        request.getfixturevalue("pretend")
    return torch.device(request.param)
