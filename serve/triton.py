"""A model for Triton Inference Server, whose Python backend calls this package. Not tried in a Triton server."""

import contextlib
import importlib
import json
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from ..engine.manifest import open_engine
from ..errors import DiffiqaError, OutputError, UsageError
from ..runtime.command.records import Format, Record, RunSettings, to_line
from ..runtime.selftest import load_tested
from .limits import Limits, Refusal, engine_name
from .protocol import OUTPUTS
from .work import named

_TYPES = {"FP64": "TYPE_FP64", "BYTES": "TYPE_STRING"}
_MODEL = '''"""Scores by diffiqa, which the Python of the server must have."""

from pathlib import Path

from diffiqa.serve.triton import Model


class TritonPythonModel(Model):
    engine = Path(__file__).parent / "engine"
'''


def write_model(engine: Path | str, repository: Path | str, name: str = "") -> Path:
    """Copy an engine into a model repository as the model `name`, by default its own name; return the model's folder.

    Raises UsageError if the repository has a model of this name, EngineError, OutputError.
    """
    source = open_engine(Path(engine))
    name = engine_name(name, source.manifest)
    model = Path(repository) / name
    if model.exists():
        raise UsageError(f"{model} is there already; remove it, or give this engine another name: NAME=DIR")
    try:
        model.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{name}-", dir=model.parent) as folder:
            made = Path(folder) / name
            shutil.copytree(source.path, made / "1" / "engine")
            (made / "1" / "model.py").write_text(_MODEL, encoding="utf-8")
            (made / "config.pbtxt").write_text(_config(name, source.manifest.engine_id), encoding="utf-8")
            made.rename(model)
    except OSError as exc:
        raise OutputError(f"cannot write the model to {model}: {exc}") from exc
    return model


def _config(name: str, engine_id: str) -> str:
    """Return the configuration. The runtime chooses the device, so Triton is told of a CPU."""
    tensors = [("input", "image", "BYTES"), *(("output", *output) for output in OUTPUTS.items())]
    return "\n".join(
        [
            f'name: "{name}"',
            'backend: "python"',
            "max_batch_size: 0",
            *(f'{way} {{ name: "{tensor}" data_type: {_TYPES[kind]} dims: -1 }}' for way, tensor, kind in tensors),
            "instance_group { count: 1 kind: KIND_CPU }",
            f'parameters {{ key: "engine" value {{ string_value: "{engine_id}" }} }}\n',
        ]
    )


class Model:
    """What Triton's Python backend calls: inputs, outputs and options are those of `iqa-serve`."""

    engine: ClassVar[Path]

    def initialize(self, _about: Mapping[str, str]) -> None:
        """Load the engine and test it."""
        self._limits, self._open = Limits(), contextlib.ExitStack()
        self._scorer = self._open.enter_context(load_tested(self.engine, max_pixels=self._limits.pixels))

    def execute(self, requests: Sequence[Any]) -> list[Any]:
        """Return a response to each request: its scores and records, or why it has none."""
        triton = importlib.import_module("triton_python_backend_utils")  # only a server has it

        def answer(request: Any) -> Any:
            images = triton.get_input_tensor_by_name(request, "image").as_numpy().ravel().tolist()
            try:
                score, record = self._score(images, json.loads(request.parameters() or "{}"))
            except (Refusal, DiffiqaError) as exc:
                kind = triton.TritonError.INVALID_ARG if isinstance(exc, Refusal) else triton.TritonError.INTERNAL
                return triton.InferenceResponse(error=triton.TritonError(str(exc), kind))
            return triton.InferenceResponse([triton.Tensor("score", score), triton.Tensor("record", record)])

        return [answer(request) for request in requests]

    def finalize(self) -> None:
        """Free the engine."""
        self._open.close()

    def _score(self, images: Sequence[bytes], given: Mapping[str, Any]) -> tuple[Any, Any]:
        if len(images) > self._limits.images:
            raise Refusal(422, f"{len(images)} images at once are too many: {self._limits.images} at most")
        options = self._limits.options(given, self._scorer.manifest)
        settings = RunSettings.of(self._scorer.manifest, options)
        records = [Record.of(result, settings) for result in self._scorer.stream(images, options)]
        if failed := [named(record.image, record.error) for record in records if record.error]:
            raise Refusal(422, "; ".join(failed))
        lines = [to_line(record, Format.JSONL).rstrip() for record in records]
        return np.array([record.score for record in records]), np.array(lines, dtype=object)
