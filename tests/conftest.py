"""Fixtures shared by all tests: the tiny model and its engine, exported once per session."""

from pathlib import Path

import pytest
import torch

from diffiqa.export.engine import export_engine
from diffiqa.model.checkpoint import Loaded
from diffiqa.model.network import DiffV2IQA, build
from diffiqa.runtime.manifest import Source
from diffiqa.runtime.scorer import Scorer, load

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
