"""ONNX Runtime as a backend: what it must compute just as it is written, how it is set up, and on how many CPUs."""

import os
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from diffiqa.errors import BackendError
from diffiqa.runtime.host import onnx_stage
from diffiqa.runtime.host.onnx_stage import OnnxRuntime, OnnxStage, available_cpus, make_session

FP8 = helper.tensor_dtype_to_np_dtype(TensorProto.FLOAT8E4M3FN)


def test_a_relu_before_fp8_is_not_lost(tmp_path: Path) -> None:
    """With all optimisations on, ONNX Runtime 1.31 leaves it out, and whole stages answer something else."""
    random = np.random.default_rng(7)
    image, weights = (random.standard_normal(shape).astype(np.float32) for shape in ((1, 8, 6, 6), (16, 8, 1, 1)))
    scale, scales = np.float32(0.01), (np.abs(weights).max(axis=(1, 2, 3)) / 448).astype(np.float32)
    numbers = (weights / scales.reshape(-1, 1, 1, 1)).astype(FP8)
    stored = numbers.view(np.uint8).tobytes()
    constants = [
        numpy_helper.from_array(np.asarray(scale), "scale"),
        helper.make_tensor("zero", TensorProto.FLOAT8E4M3FN, [], [0.0]),
        numpy_helper.from_array(scales, "scales"),
        helper.make_tensor("zeros", TensorProto.FLOAT8E4M3FN, [16], [0.0] * 16),
        helper.make_tensor("numbers", TensorProto.FLOAT8E4M3FN, list(weights.shape), stored, raw=True),
    ]
    nodes = [
        helper.make_node("Relu", ["image"], ["positive"]),
        helper.make_node("QuantizeLinear", ["positive", "scale", "zero"], ["eight"]),
        helper.make_node("DequantizeLinear", ["eight", "scale", "zero"], ["rounded"]),
        helper.make_node("DequantizeLinear", ["numbers", "scales", "zeros"], ["weights"], axis=0),
        helper.make_node("Conv", ["rounded", "weights"], ["maps"]),
    ]
    ends = [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in ("image", "maps")]
    ends[0].type.tensor_type.shape.CopyFrom(helper.make_tensor_type_proto(1, [1, 8, 6, 6]).tensor_type.shape)
    graph = helper.make_graph(nodes, "fp8", ends[:1], ends[1:], constants)
    path = tmp_path / "fp8.onnx"
    onnx.save_model(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10), path)
    maps = np.empty((1, 16, 6, 6), np.float32)
    OnnxStage(path, OnnxRuntime(threads=1, as_written=True)).bind({"image": image}, {"maps": maps})()
    rounded = (np.maximum(image, 0) / scale).astype(FP8).astype(np.float64) * scale
    exact = numbers.astype(np.float64) * scales.reshape(-1, 1, 1, 1)
    assert np.abs(maps - np.einsum("nchw,oc->nohw", rounded, exact[:, :, 0, 0])).max() < 1e-4


def test_a_session_is_set_up_as_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(onnx_stage, "available_cpus", lambda: 5)
    ends = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [1]) for name in "xy"]
    graph = helper.make_graph([helper.make_node("Neg", ["x"], ["y"])], "g", ends[:1], ends[1:])
    opset = [helper.make_opsetid("", 20)]
    model = helper.make_model(graph, opset_imports=opset, ir_version=10).SerializeToString()
    for settings in (OnnxRuntime(), OnnxRuntime(threads=3, spinning=True, deterministic=True)):
        options = make_session(model, settings).get_session_options()
        assert options.intra_op_num_threads == (settings.threads or 5)
        assert options.inter_op_num_threads == 1
        assert options.log_severity_level == 4
        assert options.use_deterministic_compute is settings.deterministic
        assert options.enable_mem_pattern is False
        spins = options.get_session_config_entry("session.intra_op.allow_spinning")
        assert spins == ("1" if settings.spinning else "0")


def test_a_session_gets_the_providers_with_their_options(monkeypatch: pytest.MonkeyPatch) -> None:
    import onnxruntime

    asked: list[object] = []

    def session(model: bytes, options: object, providers: list[object]) -> SimpleNamespace:
        asked.extend(providers)
        return SimpleNamespace(get_providers=lambda: ["CPUExecutionProvider"])

    monkeypatch.setattr(onnxruntime, "InferenceSession", session)
    make_session(b"", OnnxRuntime(providers=[("CPUExecutionProvider", {"a": "1"})]))
    assert asked == [("CPUExecutionProvider", {"a": "1"})]


def test_without_onnxruntime_the_error_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(BackendError, match=r"onnxruntime is not installed; install it with: pip install"):
        onnx_stage.version()


V2 = "/sys/fs/cgroup/cpu.max"
V1, PERIOD = "/sys/fs/cgroup/cpu/cpu.cfs_quota_us", "/sys/fs/cgroup/cpu/cpu.cfs_period_us"


@pytest.mark.parametrize(
    ("files", "cpus"),
    [
        pytest.param({}, 8, id="no cgroup"),
        pytest.param({V2: "max 100000\n"}, 8, id="no limit"),
        pytest.param({V2: "300000 100000\n"}, 3, id="three"),
        pytest.param({V2: "170000 100000\n"}, 2, id="rounded"),
        pytest.param({V2: "20000 100000\n"}, 1, id="a fifth"),
        pytest.param({V2: "1600000 100000\n"}, 8, id="more than the affinity"),
        pytest.param({V2: ""}, 8, id="empty"),
        pytest.param({V2: "300000 0\n"}, 8, id="no period"),
        pytest.param({V1: "-1\n", PERIOD: "100000\n"}, 8, id="no limit in v1"),
        pytest.param({V1: "300000\n", PERIOD: "100000\n"}, 3, id="three in v1"),
        pytest.param({V1: "300000\n"}, 8, id="v1 without a period"),
        pytest.param({V2: "max 100000\n", V1: "200000\n", PERIOD: "100000\n"}, 2, id="v2 without a limit, v1 with two"),
    ],
)
def test_cpus_are_those_that_affinity_and_quota_leave(
    files: dict[str, str], cpus: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    def read(path: str) -> SimpleNamespace:
        def text(encoding: str | None) -> str:
            if path not in files:
                raise FileNotFoundError(path)
            return files[path]

        return SimpleNamespace(read_text=text)

    monkeypatch.setattr(onnx_stage, "Path", read)
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(8)) if pid == 0 else set(), raising=False)
    assert available_cpus() == cpus
