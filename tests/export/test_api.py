"""Export, build and convert as a notebook calls them."""

from pathlib import Path
from typing import Any

import pytest

from diffiqa.engine.manifest import Library, Precision, open_engine, read_manifest
from diffiqa.errors import OutputError, UsageError
from diffiqa.export import builds
from diffiqa.export.api import build, convert, export
from diffiqa.export.builds import BuildOptions
from diffiqa.export.precision import resolve_plan
from diffiqa.model.checkpoint import Loaded, load


def test_a_bundle_is_written_from_a_model_and_from_a_file(tiny_loaded: Loaded, tmp_path: Path) -> None:
    first = convert(tiny_loaded, tmp_path / "a.safetensors")
    second = convert(str(first), str(tmp_path / "b.pt"))
    assert load(second).model.config == tiny_loaded.model.config
    with pytest.raises(OutputError, match="give --force"):
        convert(first, second)


@pytest.mark.usefixtures("ready_graphs")
def test_an_export_says_what_it_does(tiny_loaded: Loaded, tmp_path: Path) -> None:
    heard: list[str] = []
    done = export(tiny_loaded, str(tmp_path / "engine"), stages=["vda"], say=heard.append)
    assert heard == ["vda: exporting to ONNX", "vda: comparing with PyTorch"]
    assert done.manifest == read_manifest(tmp_path / "engine")
    assert [cost.stage for cost in done.costs] == list(done.manifest.stages)
    assert done.built is None


@pytest.mark.parametrize(
    ("given", "meant"),
    [({}, None), ({"precision": "bf16"}, Precision.BF16), ({"precision": "fp16", "plan": None}, Precision.FP16)],
    ids=["the plan's", "alike", "no plan"],
)
def test_a_build_takes_the_precision_of_its_plan(
    tiny_engine: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, given: dict[str, Any], meant: Precision | None
) -> None:
    plan = resolve_plan(open_engine(tiny_engine), Precision.BF16)
    (tmp_path / "plan.json").write_text(plan.to_json())
    asked: list[BuildOptions] = []

    def note(_path: Path, options: BuildOptions, **_: object) -> tuple[None, list[object]]:
        asked.append(options)
        return None, []

    monkeypatch.setattr(builds, "build_engines", note)
    build(str(tiny_engine), **({"target": "tensorrt-rtx", "plan": str(tmp_path / "plan.json")} | given))
    wanted = None if "plan" in given else plan
    assert asked == [BuildOptions(Library.TENSORRT_RTX, meant, plan=wanted)]


def test_a_plan_of_another_precision_is_refused(tiny_engine: Path) -> None:
    directory = open_engine(tiny_engine)
    plan = resolve_plan(directory, Precision.BF16)
    assert resolve_plan(directory, None, plan) == plan
    with pytest.raises(UsageError, match="is for bf16, not fp16; leave --precision out"):
        resolve_plan(directory, Precision.FP16, plan)
