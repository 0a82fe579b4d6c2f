"""ONNX Runtime as a backend: what it must compute just as it is written."""

from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from diffiqa.runtime.host.onnx_stage import OnnxRuntime, OnnxStage

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
