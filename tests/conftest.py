"""Fixtures shared by all tests, made once per session: the tiny model, its engine, the kernels for the CPU."""

import ctypes
from pathlib import Path

import pytest
import torch

from diffiqa.export.engine import export_engine
from diffiqa.model.checkpoint import Loaded
from diffiqa.model.network import DiffV2IQA, build
from diffiqa.runtime.manifest import Source
from diffiqa.runtime.scorer import Scorer, load

from .kernels.devices import Missing, build_host
from .tiny import TINY, perturbed

torch.set_num_threads(1)  # the models are tiny: more threads would only wait for each other


@pytest.fixture(scope="session")
def tiny_model() -> DiffV2IQA:
    return perturbed(build(TINY, seed=1), seed=2)


@pytest.fixture(scope="session")
def tiny_loaded(tiny_model: DiffV2IQA) -> Loaded:
    source = Source("bundle", "tiny.safetensors", 1, "0" * 64, "diffiqa bundle")
    return Loaded(tiny_model, (source,), ())


@pytest.fixture(scope="session")
def tiny_engine(tiny_loaded: Loaded, tmp_path_factory: pytest.TempPathFactory) -> Path:
    target = tmp_path_factory.mktemp("engines") / "tiny"
    export_engine(tiny_loaded, target)
    return target


@pytest.fixture(scope="session")
def scorer(tiny_engine: Path) -> Scorer:
    return load(tiny_engine)


@pytest.fixture(scope="session")
def library(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    """The kernels as a shared library."""
    try:
        return build_host(tmp_path_factory.mktemp("kernels"))
    except Missing as reason:
        pytest.skip(str(reason))
