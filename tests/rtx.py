"""What tests of TensorRT-RTX builds share: how they are skipped, how much is built, and what every build must keep."""

import importlib.util
from pathlib import Path

import pytest

from diffiqa.engine.manifest import Build, Library, read_manifest
from diffiqa.export.builds import BuildOptions

RTX = Library.TENSORRT_RTX
ONE = BuildOptions(RTX, batches=("1",), sizes=("32x32",))
LOW = {"y", "condition", "noise", "image", "images", "maps"}  # tensors that go in and out as fp16
# The lock file installs it on Linux x86-64, CI included.
needs_rtx = pytest.mark.skipif(importlib.util.find_spec("tensorrt_rtx") is None, reason="tensorrt-rtx not installed")


def check_signatures(path: Path, build: Build) -> None:
    """Names and shapes are those of the ONNX stages; types are fp16 where planned."""
    for made, stage in zip(build.stages, read_manifest(path).stages, strict=True):
        for have, want in zip((*made.inputs, *made.outputs), (*stage.inputs, *stage.outputs), strict=True):
            assert (have.name, have.shape) == (want.name, want.shape)
            assert have.dtype == ("float16" if have.name in LOW else "float32")
