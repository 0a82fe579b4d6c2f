"""The model for Triton, run by a stand-in for its Python backend; its configuration, read by Triton's own schema."""

import importlib.util
import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner

import diffiqa
from diffiqa.cli import main
from diffiqa.engine.codec import encode
from diffiqa.engine.manifest import read_manifest
from diffiqa.errors import UsageError
from diffiqa.serve.triton import write_model

from .test_http import png, timeless


class Fault(str):
    INVALID_ARG = "invalid"

    def __new__(cls, text: str, _code: str) -> "Fault":
        return super().__new__(cls, text)


@pytest.fixture
def backend(monkeypatch: pytest.MonkeyPatch) -> Any:
    """What Triton gives to a model in Python, as its documents say."""

    def respond(output_tensors: Any = (), error: str | None = None) -> Any:
        return SimpleNamespace(error=error, **dict(output_tensors))

    triton = SimpleNamespace(
        Tensor=lambda name, array: (name, array),
        TritonError=Fault,
        InferenceResponse=respond,
        get_input_tensor_by_name=lambda request, name: SimpleNamespace(as_numpy=lambda: request.inputs[name]),
    )
    monkeypatch.setitem(sys.modules, "triton_python_backend_utils", triton)
    return triton


def asked(images: list[bytes], parameters: str = "") -> Any:
    return SimpleNamespace(inputs={"image": np.array(images, dtype=object)}, parameters=lambda: parameters)


@pytest.mark.usefixtures("backend")
def test_the_model_gives_the_records_of_iqa_run(tiny_engine: Path, tmp_path: Path) -> None:
    folder = write_model(tiny_engine, tmp_path / "models")
    assert folder == tmp_path / "models" / "tiny"
    assert [path.name for path in folder.parent.iterdir()] == ["tiny"]
    spec = importlib.util.spec_from_file_location("model", folder / "1" / "model.py")
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    model = module.TritonPythonModel()
    model.initialize({"model_name": "tiny"})
    pictures = [png(1), png(2)]
    files = [tmp_path / f"image {number}" for number in range(2)]
    for file, data in zip(files, pictures, strict=True):
        file.write_bytes(data)
    good, no_image, no_option, too_many = model.execute(
        [asked(pictures, '{"crops": 2}'), asked([b"no image"]), asked(pictures, '{"crop": 2}'), asked(pictures * 17)]
    )
    model.finalize()
    done = diffiqa.score(tiny_engine, files, options=diffiqa.Options(crops=2))
    expected = [encode(record) | {"image": f"image {number}"} for number, record in enumerate(done.records)]
    assert [timeless(json.loads(line)) for line in good.record] == [timeless(record) for record in expected]
    assert good.score.dtype == np.float64
    assert good.score.tolist() == [record.score for record in done.records]
    assert "image 0: not an image" in no_image.error
    assert "no option 'crop'" in no_option.error
    assert "34 images at once are too many: 32 at most" in too_many.error


def test_the_configuration_is_what_triton_reads(tiny_engine: Path, tmp_path: Path) -> None:
    schema = pytest.importorskip("tritonclient.grpc.model_config_pb2", reason="tritonclient[grpc] is not installed")
    text_format = pytest.importorskip("google.protobuf.text_format")
    text = (write_model(tiny_engine, tmp_path, "other") / "config.pbtxt").read_text()
    found = text_format.Parse(text, schema.ModelConfig())
    assert (found.name, found.backend, found.max_batch_size) == ("other", "python", 0)
    tensors = [(one.name, schema.DataType.Name(one.data_type), list(one.dims)) for one in (*found.input, *found.output)]
    assert tensors == [("image", "TYPE_STRING", [-1]), ("score", "TYPE_FP64", [-1]), ("record", "TYPE_STRING", [-1])]
    assert schema.ModelInstanceGroup.Kind.Name(found.instance_group[0].kind) == "KIND_CPU"
    assert found.parameters["engine"].string_value == read_manifest(tiny_engine).engine_id


def test_the_command_writes_every_engine_and_replaces_none(tiny_engine: Path, tmp_path: Path) -> None:
    both = ["--engine", f"one={tiny_engine}", "--engine", f"two={tiny_engine}"]
    result = CliRunner().invoke(main, ["serve", *both, "--triton", str(tmp_path)])
    assert result.stdout.split() == [str(tmp_path / "one"), str(tmp_path / "two")]
    again = CliRunner().invoke(main, ["serve", *both, "--triton", str(tmp_path)])
    assert again.exit_code == 2
    assert "one is there already; remove it" in again.stderr
    idle = CliRunner().invoke(main, ["serve", *both, "--triton", str(tmp_path), "--max-pixels", "5"])
    assert "--triton serves nothing: leave out --max-pixels" in idle.stderr
    with pytest.raises(UsageError, match="cannot name an engine"):
        write_model(tiny_engine, tmp_path, "..")
