"""Casting a stage: what the plan keeps stays float32, all else is low, and the drift that is reported is real."""

import dataclasses
import json
from pathlib import Path

import ml_dtypes
import numpy as np
import numpy.typing as npt
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper, shape_inference

from diffiqa.engine.manifest import EngineDirectory, FileEntry, Precision, Stage, StageName, TensorSpec, open_engine
from diffiqa.errors import ExportError, UsageError
from diffiqa.export import compare as compare_module
from diffiqa.export.compare import compare_cast, draw_inputs
from diffiqa.export.precision import (
    Kept,
    PrecisionPlan,
    StagePrecision,
    cast,
    plan_stage,
    read_plan,
    rounded,
    without_weights,
)

from ..tiny import STAGES

LOW = {Precision.FP16: TensorProto.FLOAT16, Precision.BF16: TensorProto.BFLOAT16}
low_precisions = pytest.mark.parametrize("precision", LOW)
all_stages = pytest.mark.parametrize("name", STAGES)


@pytest.fixture
def directory(tiny_engine: Path) -> EngineDirectory:
    return open_engine(tiny_engine)


def stage_of(directory: EngineDirectory, name: StageName) -> tuple[Stage, onnx.ModelProto]:
    stage = directory.manifest.stage(name)
    assert stage is not None
    return stage, onnx.load(directory.file(stage.file))


def types_of(model: onnx.ModelProto) -> dict[str, int]:
    graph = shape_inference.infer_shapes(model, strict_mode=True).graph
    values = [*graph.input, *graph.value_info, *graph.output]
    return {value.name: value.type.tensor_type.elem_type for value in values}


def run(model: onnx.ModelProto, feed: dict[str, npt.NDArray[np.float32]]) -> list[npt.NDArray[np.float32]]:
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    outputs: list[npt.NDArray[np.float32]] = session.run(None, feed)
    return outputs


@all_stages
def test_shapes_and_types_are_the_same_without_the_weights(directory: EngineDirectory, name: StageName) -> None:
    _, model = stage_of(directory, name)
    bare = without_weights(model)
    assert max(tensor.ByteSize() for tensor in bare.graph.initializer) <= 1024 < model.ByteSize() / 10
    inferred, expected = (
        {value.name: value.type.SerializeToString() for value in shape_inference.infer_shapes(m).graph.value_info}
        for m in (bare, model)
    )
    assert inferred == expected != {}


@low_precisions
@all_stages
def test_all_but_the_kept_nodes_compute_in_the_low_type_and_inputs_and_outputs_have_the_planned_ones(
    directory: EngineDirectory, name: StageName, precision: Precision
) -> None:
    stage, model = stage_of(directory, name)
    plan = plan_stage(model, stage, precision)
    typed = cast(model, plan, precision)
    types, kept = types_of(typed), {entry.node for entry in plan.float32}
    floats = {TensorProto.FLOAT, LOW[precision]}
    for node in typed.graph.node:
        made = {types[value] for value in node.output} & floats
        if node.op_type != "Cast" and made:
            assert made == {TensorProto.FLOAT if node.name in kept else LOW[precision]}, node.name
    assert len(kept) < len(model.graph.node) / 2
    low = "float16" if precision is Precision.FP16 else "bfloat16"
    images = "float16" if precision is Precision.FP16 else "float32"
    known = {"maps": low, "y": images, "condition": images, "noise": images, "image": images, "images": images}
    dtypes = {"float32": TensorProto.FLOAT, "float16": TensorProto.FLOAT16, "bfloat16": TensorProto.BFLOAT16}
    for before, after in zip(
        [*model.graph.input, *model.graph.output], [*typed.graph.input, *typed.graph.output], strict=True
    ):
        assert after.name == before.name
        assert after.type.tensor_type.elem_type == dtypes[known.get(before.name, "float32")]
        assert after.type.tensor_type.shape == before.type.tensor_type.shape


def test_the_plan_keeps_the_noise_embedding_and_the_score_reduction_and_says_why(directory: EngineDirectory) -> None:
    stage, model = stage_of(directory, StageName.UNET)
    kept = plan_stage(model, stage, Precision.FP16).float32
    assert {"Sin", "Cos", "Gemm"} <= {entry.op for entry in kept}
    assert not {"Conv", "MatMul", "Softmax"} & {entry.op for entry in kept}
    assert all(entry.why.startswith("noise embedding") for entry in kept)
    for name in (StageName.VCG, StageName.VDA):
        stage, model = stage_of(directory, name)
        kept = plan_stage(model, stage, Precision.FP16).float32
        reduction = [entry.op for entry in kept if entry.why == "score reduction"]
        assert sorted(reduction) == ["Div", "Mul", "ReduceSum", "ReduceSum"]


def test_layer_norms_have_float32_statistics_by_definition(directory: EngineDirectory) -> None:
    for name in (StageName.VIT, StageName.VCG):
        stage, model = stage_of(directory, name)
        norms = [node for node in model.graph.node if node.op_type == "LayerNormalization"]
        assert norms
        assert all(a.i == 1 for node in norms for a in node.attribute if a.name == "stash_type")
        assert "LayerNormalization" not in {kept.op for kept in plan_stage(model, stage, Precision.FP16).float32}
        norms[0].attribute.extend([helper.make_attribute("stash_type", TensorProto.FLOAT16)])
        for attribute in [a for a in norms[0].attribute if a.name == "stash_type" and a.i == TensorProto.FLOAT]:
            norms[0].attribute.remove(attribute)
        low = [kept.node for kept in plan_stage(model, stage, Precision.FP16).float32]
        assert norms[0].name in low


def test_an_fp32_plan_changes_nothing(directory: EngineDirectory) -> None:
    stage, model = stage_of(directory, StageName.UNET)
    plan = plan_stage(model, stage, Precision.FP32)
    assert plan.float32 == ()
    assert set(plan.tensors.values()) == {"float32"}
    assert cast(model, plan, Precision.FP32) == model


# Small graphs of their own.


def made(
    nodes: list[onnx.NodeProto],
    constants: dict[str, npt.NDArray[np.float32]],
    shape: tuple[int, ...],
) -> tuple[onnx.ModelProto, StagePrecision]:
    """Return a float32 model x → y and a plan that keeps nothing."""
    x, y = (helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name in "xy")
    initializers = [numpy_helper.from_array(value, name) for name, value in constants.items()]
    graph = helper.make_graph(nodes, "made", [x], [y], initializers)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    return model, StagePrecision(StageName.VDA, "", {"x": "float32", "y": "float32"}, ())


def node(op: str, inputs: str, output: str) -> onnx.NodeProto:
    return helper.make_node(op, inputs.split(), [output], name=f"{op}.{output}")


@pytest.mark.parametrize(("precision", "dtype"), [("fp16", np.float16), ("bf16", ml_dtypes.bfloat16)])
def test_the_rounded_model_computes_bit_by_bit_what_numpy_does_in_the_low_type(
    precision: str, dtype: type[np.generic]
) -> None:
    nodes = [node("Mul", "x a", "m"), node("Add", "m b", "s"), node("Sub", "s a", "d"), node("Mul", "d d", "y")]
    generator = np.random.default_rng(7)
    a, b, x = (generator.standard_normal(1000).astype(np.float32) for _ in range(3))
    model, plan = made(nodes, {"a": a, "b": b}, (1000,))
    (got,) = run(rounded(cast(model, plan, Precision(precision))), {"x": x})
    low_a, low_b, low_x = (value.astype(dtype) for value in (a, b, x))
    d = low_x * low_a + low_b - low_a
    np.testing.assert_array_equal(got, (d * d).astype(np.float32))


def test_one_constant_serves_low_and_float32_nodes(directory: EngineDirectory) -> None:
    model, plan = made([node("Mul", "x a", "m"), node("Add", "m a", "y")], {"a": np.full(3, 0.1, np.float32)}, (3,))
    plan = dataclasses.replace(plan, float32=(Kept("Add.y", "Add", "to try it"),))
    typed = cast(model, plan, Precision.FP16)
    assert {t.name: t.data_type for t in typed.graph.initializer} == {
        "a": TensorProto.FLOAT,
        "a.float16": TensorProto.FLOAT16,
    }
    (got,) = run(rounded(typed), {"x": np.ones(3, np.float32)})
    np.testing.assert_array_equal(got, np.float32(np.float16(0.1)) + np.float32(0.1))


def test_a_batch_norm_survives_a_variance_that_fp16_cannot_hold() -> None:
    generator = np.random.default_rng(3)
    x = generator.standard_normal((1, 4, 5, 6)).astype(np.float32) * 1e-4
    scale, bias, mean = (generator.standard_normal(4).astype(np.float32) for _ in range(3))
    variance = np.full(4, 1e-8, np.float32)
    norm = helper.make_node("BatchNormalization", ["x", "s", "b", "m", "v"], ["y"], name="norm", epsilon=1e-12)
    model, plan = made([norm], {"s": scale, "b": bias, "m": mean * 1e-4, "v": variance}, x.shape)
    (want,) = run(model, {"x": x})
    (got,) = run(rounded(cast(model, plan, Precision.FP16)), {"x": x})
    assert np.abs(got - want).max() < 5e-3 * np.abs(want).max()


def test_a_constant_beyond_fp16_is_refused_by_name() -> None:
    model, plan = made([node("Mul", "x a", "y")], {"a": np.full(1, 1e6, np.float32)}, (1,))
    with pytest.raises(ExportError, match=r"constant a reaches 1e\+06, too large for float16"):
        cast(model, plan, Precision.FP16)
    cast(model, plan, Precision.BF16)


def test_a_norm_whose_statistics_would_be_low_is_kept() -> None:
    norm = helper.make_node("InstanceNormalization", ["x", "s", "b"], ["y"], name="norm")
    model, _ = made([norm], {"s": np.ones(2, np.float32), "b": np.zeros(2, np.float32)}, (1, 2, 3))
    spec = (TensorSpec("x", "float32", (1, 2, 3)),)
    stage = Stage(StageName.UNET, FileEntry("", 0, ""), 20, spec, spec, 0, 0, ())
    assert [entry.node for entry in plan_stage(model, stage, Precision.FP16).float32] == ["norm"]


def test_a_plan_for_other_nodes_is_refused() -> None:
    model, plan = made([node("Mul", "x x", "y")], {}, (1,))
    with pytest.raises(ExportError, match="names nodes that are not in it: elsewhere"):
        cast(model, dataclasses.replace(plan, float32=(Kept("elsewhere", "Mul", ""),)), Precision.FP16)


# Plan files.


def test_a_plan_is_read_back_as_it_was_written(directory: EngineDirectory, tmp_path: Path) -> None:
    stages = (plan_stage(model, stage, Precision.FP16) for stage, model in (stage_of(directory, n) for n in STAGES))
    plan = PrecisionPlan(1, Precision.FP16, tuple(stages))
    (tmp_path / "plan.json").write_text(plan.to_json())
    assert read_plan(tmp_path / "plan.json") == plan


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("{", "is not a precision plan"),
        ("[]", "must be an object"),
        (json.dumps({"schema": 2, "precision": "fp16", "stages": []}), "schema version 2"),
        (json.dumps({"schema": 1, "precision": "fp8", "stages": []}), "one of fp32, fp16, bf16"),
    ],
)
def test_a_file_that_is_no_plan_is_refused(tmp_path: Path, text: str, says: str) -> None:
    (tmp_path / "plan.json").write_text(text)
    with pytest.raises(UsageError, match=says):
        read_plan(tmp_path / "plan.json")
    with pytest.raises(UsageError, match="cannot read"):
        read_plan(tmp_path / "none.json")


# Drift.


@pytest.mark.parametrize(
    ("name", "precision"), [*((name, Precision.FP16) for name in STAGES), (StageName.UNET, Precision.BF16)]
)
def test_rounding_moves_every_output_a_little_and_always_the_same(
    directory: EngineDirectory, name: StageName, precision: Precision
) -> None:
    bound = 5e-3 if precision is Precision.FP16 else 4e-2
    stage, model = stage_of(directory, name)
    typed = cast(model, plan_stage(model, stage, precision), precision)
    checks = compare_cast(directory, stage, typed, precision)
    assert [check.output for check in checks] == [spec.name for spec in stage.outputs]
    assert max(check.max_abs_error for check in checks) > 0
    assert all(check.max_abs_error < bound * check.max_abs_reference for check in checks)
    assert compare_cast(directory, stage, typed, precision) == checks


@all_stages
def test_onnxruntime_runs_the_fp16_stage_itself_to_much_the_same(directory: EngineDirectory, name: StageName) -> None:
    stage, model = stage_of(directory, name)
    plan = plan_stage(model, stage, Precision.FP16)
    feed = draw_inputs(directory, stage, seed=1)
    typed_feed = {key: value.astype(plan.tensors[key]) for key, value in feed.items()}
    for want, have in zip(run(model, feed), run(cast(model, plan, Precision.FP16), typed_feed), strict=True):
        np.testing.assert_allclose(have.astype(np.float32), want, atol=5e-3 * np.abs(want).max())


def test_a_stage_that_answers_zero_drifts_by_nothing_and_small_rounding_errors_pass(
    directory: EngineDirectory, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A trained score head ends in a ReLU, and its worst score is 0."""
    model, plan = made([node("Mul", "x a", "y")], {"a": np.full(1, 1 / 3, np.float32)}, (1,))
    onnx.save(model, tmp_path / "made.onnx")
    stage, _ = stage_of(directory, StageName.VDA)
    outputs = (TensorSpec("y", "float32", (1,)),)
    stage = dataclasses.replace(stage, file=FileEntry("made.onnx", 0, ""), outputs=outputs)
    here, typed = dataclasses.replace(directory, path=tmp_path), cast(model, plan, Precision.FP16)
    for value, reference in ((0.0, 0.0), (1e-7, 1e-7 / 3)):
        feed = {"x": np.full(1, value, np.float32)}
        monkeypatch.setattr(compare_module, "draw_inputs", lambda *_, feed=feed: feed)
        (check,) = compare_cast(here, stage, typed, Precision.FP16)
        assert check.max_abs_reference == pytest.approx(reference)
        assert check.max_abs_error < check.tolerance == pytest.approx(5e-4)


def test_what_overflows_is_refused_with_a_way_out(
    directory: EngineDirectory, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    constants = {"a": np.full(1, 6e4, np.float32), "b": np.full(1, 1e-4, np.float32)}
    model, plan = made([node("Mul", "x a", "m"), node("Mul", "m b", "y")], constants, (1,))
    onnx.save(model, tmp_path / "made.onnx")
    stage, _ = stage_of(directory, StageName.VDA)
    outputs = (TensorSpec("y", "float32", (1,)),)
    stage = dataclasses.replace(stage, file=FileEntry("made.onnx", 0, ""), outputs=outputs)
    monkeypatch.setattr(compare_module, "draw_inputs", lambda *_: {"x": np.full(1, 2, np.float32)})
    here = dataclasses.replace(directory, path=tmp_path)
    with pytest.raises(ExportError, match=r"output y.*fp16 form returns NaN or Inf.*--precision.*--plan"):
        compare_cast(here, stage, cast(model, plan, Precision.FP16), Precision.FP16)
    compare_cast(here, stage, cast(model, plan, Precision.BF16), Precision.BF16)
