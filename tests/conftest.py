"""Fixtures of all tests: a fixed seed, and the backends that a test runs under."""

import pytest
import torch

import triton_rnn

BACKENDS = ("native", "torchscript", "reference", "auto")


# What torch.nn, which is called beside ours, itself says once per process.
TORCHS_WARNINGS = ("ignore:LSTM with projections is not supported with oneDNN:UserWarning",)


def pytest_collection_modifyitems(items):
    """Marks, because a filter in pyproject.toml gives way to `-W error` on the command line."""
    for item in items:
        for warning in TORCHS_WARNINGS:
            item.add_marker(pytest.mark.filterwarnings(warning))


@pytest.fixture(autouse=True)
def seeded():
    """Every test starts from the same seed, whatever ran before it."""
    torch.manual_seed(0)


@pytest.fixture(params=BACKENDS)
def backend(request):
    """The name of a backend that all of the test runs under."""
    with triton_rnn.use_backend(request.param):
        yield request.param
