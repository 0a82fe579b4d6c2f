"""Pictures, and engines that differ from the tiny one in a known way."""

import dataclasses
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
from onnx import helper, numpy_helper
from PIL import Image

from diffiqa.engine.manifest import MANIFEST, FileEntry, StageName, file_sha256, read_manifest

from ..tiny import photo

PLANTED = ("planted.up", "planted.down")


def pictures(folder: Path, count: int) -> Path:
    folder.mkdir()
    for index in range(count):
        Image.fromarray(photo(index, 40, 48)).save(folder / f"{index}.png")
    return folder


def edited(engine: Path, target: Path, name: StageName, edit: Callable[[onnx.ModelProto], None]) -> Path:
    """Copy an engine with one stage changed, and a manifest that vouches for it."""
    shutil.copytree(engine, target)
    manifest = read_manifest(target)
    stages = []
    for stage in manifest.stages:
        if stage.name is name:
            path = target / stage.file.path
            model = onnx.load(path)
            edit(model)
            path.write_bytes(model.SerializeToString())
            entry = FileEntry(stage.file.path, path.stat().st_size, file_sha256(path))
            stage = dataclasses.replace(stage, file=entry)
        stages.append(stage)
    (target / MANIFEST).write_text(dataclasses.replace(manifest, stages=tuple(stages)).to_json())
    return target


def plant_large_range(model: onnx.ModelProto) -> None:
    """Have the U-Net's state grow beyond fp16's range, and shrink back: nothing to float32, the end of a lower type."""
    graph = model.graph
    for node in graph.node:
        for index, value in enumerate(node.input):
            if value == "y":
                node.input[index] = "planted"
    factors = {"up": 6e4, "down": 1 / 6e4}
    graph.initializer.extend(
        numpy_helper.from_array(np.array(f, np.float32), f"planted.{n}.by") for n, f in factors.items()
    )
    up = helper.make_node("Mul", ["y", "planted.up.by"], ["planted.large"], name=PLANTED[0])
    down = helper.make_node("Mul", ["planted.large", "planted.down.by"], ["planted"], name=PLANTED[1])
    nodes = [up, down, *graph.node]
    del graph.node[:]
    graph.node.extend(nodes)


def scale_weights(model: onnx.ModelProto) -> None:
    """Make a stage answer a little differently."""
    for tensor in model.graph.initializer:
        if tensor.data_type == onnx.TensorProto.FLOAT and len(tensor.dims) == 4:
            tensor.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(tensor) * np.float32(1.02), tensor.name))
