"""Checkpoint → engine directory: one ONNX file per stage, compared with PyTorch. `diffiqa.export(...)` runs it."""

from ..rooms import make_callable

make_callable(__name__)
