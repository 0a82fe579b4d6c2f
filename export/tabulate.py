"""The part of the U-Net that depends on the step alone, as a table with a row for each step of the schedule.

The network of the noise level and its 27 layers see one of 50 numbers. Their results are computed here once. In the
graph a row is chosen by the noise level that is nearest, and the schedule's own levels are in the table exactly.
"""

import dataclasses

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from ..engine.schedule import Schedule
from ..errors import ExportError
from .compare import FloatArray, run_onnx
from .precision import Kept, StagePrecision, noise_embedding, replace_nodes

_WHY = "the step's number: levels near 1 must stay apart"


def tabulate(
    model: onnx.ModelProto, plan: StagePrecision, schedule: Schedule
) -> tuple[onnx.ModelProto, StagePrecision]:
    """Return a U-Net with the table in place of what it replaces, and the plan for it; both as before without a U-Net.

    Raises ExportError if something of a shape other than (batch, channels, 1, 1) depends on the step alone.
    """
    alone = set(noise_embedding(model.graph))
    if not alone:
        return model, plan
    made = [name for node in model.graph.node if node.name in alone for name in node.output]
    rest = [node for node in model.graph.node if node.name not in alone]
    wanted = [name for name in made if any(name in node.input for node in rest)]
    levels = schedule.coefficients.noise_level
    rows = _computed(model, wanted, levels)
    table = np.concatenate([row.reshape(len(levels), -1) for row in rows], axis=1)
    widths = [row.shape[1] for row in rows]

    tabulated = onnx.ModelProto()
    tabulated.CopyFrom(model)
    graph = tabulated.graph
    graph.initializer.extend(
        numpy_helper.from_array(value, f"steps.{name}")
        for name, value in (
            ("levels", levels.reshape(1, -1)),
            ("table", table),
            ("widths", np.array(widths, np.int64)),
            ("image", np.array([2, 3], np.int64)),
        )
    )
    parts = [f"{name}.row" for name in wanted]
    nodes = [
        helper.make_node("Sub", ["noise_level", "steps.levels"], ["steps.off"], name="steps.off"),
        helper.make_node("Abs", ["steps.off"], ["steps.distance"], name="steps.distance"),
        helper.make_node("ArgMin", ["steps.distance"], ["steps.step"], name="steps.step", axis=1, keepdims=0),
        helper.make_node("Gather", ["steps.table", "steps.step"], ["steps.rows"], name="steps.rows", axis=0),
        helper.make_node("Split", ["steps.rows", "steps.widths"], parts, name="steps.split", axis=1),
    ]
    nodes += [
        helper.make_node("Unsqueeze", [part, "steps.image"], [name], name=part)
        for part, name in zip(parts, wanted, strict=True)
    ]
    replace_nodes(graph, [*nodes, *rest])
    kept = [entry for entry in plan.float32 if entry.node not in alone]
    kept += [Kept(node.name, node.op_type, _WHY) for node in nodes[:3] if plan.float32]
    return tabulated, dataclasses.replace(plan, float32=tuple(kept))


def _computed(model: onnx.ModelProto, wanted: list[str], levels: FloatArray) -> list[FloatArray]:
    """Return what the noise level leads to, for every level of the schedule: arrays (steps, channels, 1, 1)."""
    part = onnx.ModelProto()
    part.CopyFrom(model)
    alone = set(noise_embedding(model.graph))
    replace_nodes(part.graph, [node for node in part.graph.node if node.name in alone])
    level = next(value for value in part.graph.input if value.name == "noise_level")
    del part.graph.input[:], part.graph.output[:]
    part.graph.input.append(level)
    part.graph.output.extend(helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in wanted)
    found = run_onnx(part.SerializeToString(), {"noise_level": levels.reshape(-1, 1)})
    for name, value in zip(wanted, found, strict=True):
        if value.ndim != 4 or value.shape[0] != len(levels) or value.shape[2:] != (1, 1):
            raise ExportError(f"{name} of shape {value.shape} depends on the step alone, and cannot be tabulated")
    return found
