"""Fixtures: the host build of the kernels as a device, and a GPU where there is one."""

import ctypes
from collections.abc import Iterator

import numpy as np
import pytest

from .devices import Device, Gpu, Host, Missing


@pytest.fixture(scope="session")
def _gpu() -> Gpu:
    try:
        return Gpu()
    except Missing as reason:
        pytest.skip(str(reason))


@pytest.fixture
def gpu(_gpu: Gpu) -> Iterator[Gpu]:
    """The GPU, with no arrays of another test on it."""
    yield _gpu
    _gpu.forget()


@pytest.fixture
def host(library: ctypes.CDLL) -> Host:
    """The host build."""
    return Host(library)


@pytest.fixture(params=["host", pytest.param("gpu", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest) -> Device:
    """Either: by default the host build, with `-m gpu` the GPU."""
    found: Device = request.getfixturevalue(request.param)
    return found


@pytest.fixture(params=range(4), ids="seed{}".format)
def rng(request: pytest.FixtureRequest) -> np.random.Generator:
    """Shapes and values of one round; the seed stands in the test's name."""
    return np.random.default_rng(request.param)
