"""Backends as types: what cannot be said, and what the commands' options become."""

from pathlib import Path
from typing import Any

import pytest

from diffiqa.errors import UsageError
from diffiqa.runtime.backends import (
    BACKENDS,
    Inductor,
    InductorOnGpu,
    OnnxOnGpu,
    OnnxRuntime,
    OpenVino,
    TensorRt,
    best,
    from_options,
)
from diffiqa.runtime.scorer import load


def test_options_become_a_backend() -> None:
    cases: list[tuple[str, dict[str, Any], object]] = [
        ("auto", {}, (TensorRt(), InductorOnGpu(), OnnxOnGpu(), OnnxRuntime())),
        (
            "auto",
            {"device": 1, "no_cuda_graph": True},
            (*(kind(1, cuda_graph=False) for kind in (TensorRt, InductorOnGpu, OnnxOnGpu)), OnnxRuntime()),
        ),
        ("auto", {"batch": 4}, (TensorRt(batch=4), InductorOnGpu(batch=4), OnnxOnGpu(batch=4))),
        ("auto", {"threads": 2, "spin": True}, OnnxRuntime(threads=2, spinning=True)),
        ("tensorrt", {"device": 1, "batch": 8, "no_cuda_graph": True}, TensorRt(1, 8, cuda_graph=False)),
        ("inductor-gpu", {"device": 2, "batch": 3}, InductorOnGpu(2, 3)),
        ("inductor", {"threads": 3}, Inductor(threads=3)),
        ("onnxruntime-gpu", {"batch": 2, "providers": ("A",)}, OnnxOnGpu(batch=2, providers=("A",))),
        ("onnxruntime", {"providers": ("A", ("B", {"x": "1"}))}, OnnxRuntime(providers=("A", ("B", {"x": "1"})))),
        ("openvino", {"threads": 3, "cpu_precision": "bf16"}, OpenVino(3, "bf16")),
    ]
    for name, options, backend in cases:
        assert from_options(name, **options) == backend


def test_an_option_of_another_backend_is_refused() -> None:
    cases: list[tuple[str, dict[str, Any], str]] = [
        (
            "auto",
            {"threads": 1, "device": 1},
            "--device is an option of the backends tensorrt, inductor-gpu and onnxruntime-gpu",
        ),
        ("auto", {"threads": 1, "device": 1}, "not of onnxruntime, which --threads asks for"),
        ("auto", {"batch": 2, "providers": ("A",)}, "which --provider asks for"),
        ("auto", {"cpu_precision": "bf16"}, "--cpu-precision is an option of the backend openvino, not of auto"),
        (
            "tensorrt",
            {"threads": 2},
            "--threads is an option of the backends onnxruntime, openvino and inductor, not of tensorrt",
        ),
        ("tensorrt", {"providers": ("A",)}, "not of tensorrt"),
        (
            "openvino",
            {"no_cuda_graph": True},
            "--no-cuda-graph is an option of the backends tensorrt, inductor-gpu and",
        ),
        ("onnxruntime-gpu", {"threads": 2}, "not of onnxruntime-gpu"),
        ("onnxruntime", {"device": 0}, "not of onnxruntime"),
        ("onnxruntime", {"batch": 2}, "--batch is an option of the backends tensorrt, inductor-gpu and"),
        ("openvino", {"spin": True}, "--spin is an option of the backend onnxruntime, not of openvino"),
        ("openvino", {"providers": ("A",)}, "not of openvino"),
    ]
    for name, options, says in cases:
        with pytest.raises(UsageError, match=says):
            from_options(name, **options)


@pytest.mark.parametrize("kind", [TensorRt, InductorOnGpu, OnnxOnGpu])
def test_what_is_no_gpu_or_number_of_images_is_refused(kind: type) -> None:
    settings: tuple[dict[str, Any], ...] = ({"device": -1}, {"device": True}, {"batch": 0}, {"batch": "2"})
    for wrong in settings:
        with pytest.raises(UsageError, match="must be a whole number from"):
            kind(**wrong)


@pytest.mark.parametrize("kind", [OnnxRuntime, OpenVino, Inductor])
def test_what_is_no_number_of_threads_is_refused(kind: type) -> None:
    for threads in (0, -1, "2", 1.5):
        with pytest.raises(UsageError, match="threads must be a whole number above 0"):
            kind(threads=threads)


@pytest.mark.parametrize("wrong", ["tensorrt", [], [OnnxRuntime(), "openvino"], TensorRt])
def test_a_name_is_no_backend(tiny_engine: Path, wrong: Any) -> None:
    with pytest.raises(UsageError, match=r"give a backend such as TensorRt\(\)"):
        load(tiny_engine, wrong)


def test_auto_never_takes_what_a_package_would_change_on_a_cpu() -> None:
    assert not {OpenVino, Inductor} & set(map(type, best()))
    assert {type(backend) for backend in best()} | {OpenVino, Inductor} == set(BACKENDS.values())
