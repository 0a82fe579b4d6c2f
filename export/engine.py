"""A loaded checkpoint → an engine directory, written beside its place and then moved there."""

import contextlib
import datetime
import json
import math
import os
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import onnx

from .. import __version__
from ..engine.atomic import exchange, locked, sync, sync_all
from ..engine.codec import encode
from ..engine.crops import CropPlaces
from ..engine.manifest import (
    MANIFEST,
    SCHEMA,
    CropPolicy,
    FileEntry,
    Manifest,
    Provenance,
    ScoreMeaning,
    Stage,
    StageName,
    TensorSpec,
    file_sha256,
)
from ..engine.pixels import ImageForm, TapForm
from ..engine.schedule import Kind
from ..errors import EngineError, ExportError
from ..model.checkpoint import Loaded
from ..model.config import Better, Labels, ModelConfig
from ..model.network import DiffV2IQA, count_parameters
from ..model.pfd.checkpoint import LoadedPfd
from ..model.pfd.config import PfdConfig
from ..model.pfd.network import PfdIQA
from ..runtime.scorer import Scorer
from . import pfd
from .graph import OPSET, export_graph
from .macs import count_macs
from .pytorch import TorchStage, compare_with_pytorch
from .selftest import write_self_test
from .stages import StagePlan, stage_plans

SEED = 20240222  # of the verification inputs
TRAINED = "Predicted quality on the scale of the checkpoint's training labels, scaled to 0 … 1."
ON_LABELS = "Predicted quality on the scale of the checkpoint's training labels, {worst:g} (worst) to {best:g} (best)."
UNTRAINED = "Untrained: some weights are seeded random numbers, so the scores mean nothing."


@dataclass(frozen=True)
class StageCost:
    """A finished stage and how long it took."""

    stage: Stage
    export_seconds: float
    compare_seconds: float


def plan_names(config: ModelConfig | PfdConfig) -> tuple[StageName, ...]:
    """Return the stages an engine of this configuration has."""
    if isinstance(config, PfdConfig):
        return pfd.NAMES
    present = {
        StageName.UNET: config.unet,
        StageName.VIT: config.vcg,
        StageName.VCG: config.vcg,
        StageName.VDA: config.vda,
    }
    return tuple(name for name, part in present.items() if part is not None)


def export_engine(
    loaded: Loaded | LoadedPfd,
    target: Path,
    *,
    stages: tuple[StageName, ...] = (),
    force: bool = False,
    accept_drift: bool = False,
    say: Callable[[str], None] = lambda _text: None,
) -> tuple[Manifest, list[StageCost]]:
    """Export every stage (or those named), compare it with PyTorch, and write the engine directory `target`.

    `accept_drift`: a stage that differs from PyTorch by more than rounding is written too; the manifest has how far.
    Raises EngineError if `target` must not be replaced, ExportError if a stage fails. Until everything is done the old
    directory stays as it is.
    """
    model = loaded.model
    wanted = stages or plan_names(model.config)
    if absent := [name for name in wanted if name not in plan_names(model.config)]:
        raise ExportError(f"model {model.config.name!r} has no stage {', '.join(absent)}")
    with writing(target, force=force) as work:
        # Said now, and not after the first stages.
        needed = int(4.2 * sum(parameters_by_stage(model).values()))
        free = shutil.disk_usage(work.parent).free
        if free < needed:
            raise ExportError(f"{work.parent} has {free / 1e6:.0f} MB free, the engine needs {needed / 1e6:.0f} MB")
        every = pfd.stage_plans(model) if isinstance(model, PfdIQA) else stage_plans(model)
        plans = (plan for plan in every if plan.name in wanted)
        costs = [_export_stage(model, plan, work, say, accept_drift=accept_drift) for plan in plans]
        manifest = manifest_of(loaded, tuple(cost.stage for cost in costs))
        if manifest.complete:
            say("self-test: scoring in PyTorch")
            torch_stages = {stage.name: TorchStage(model, stage) for stage in manifest.stages}
            write_self_test(work, manifest, Scorer(manifest, torch_stages, backend="PyTorch"))
        (work / MANIFEST).write_text(manifest.to_json(), encoding="utf-8")
    return manifest, costs


def parameters_by_stage(model: DiffV2IQA | PfdIQA) -> dict[StageName, int]:
    """Return how many parameters each stage takes from the model, before export merges some."""
    if isinstance(model, PfdIQA):
        return {name: count_parameters(pfd.part_of(model, name)) for name in pfd.NAMES}
    tabs = count_parameters(model.tabs)  # both heads carry them
    vit = count_parameters(model.vcg.vit) if model.vcg else 0
    counts = {
        StageName.UNET: count_parameters(model.unet) if model.unet else 0,
        StageName.VIT: vit,
        StageName.VCG: count_parameters(model.vcg) - vit + tabs if model.vcg else 0,
        StageName.VDA: count_parameters(model.vda) + tabs if model.vda else 0,
    }
    return {name: counts[name] for name in plan_names(model.config)}


@contextlib.contextmanager
def writing(target: Path, *, force: bool) -> Iterator[Path]:
    """Yield an empty folder. It becomes the engine directory `target` if the block ends without an error.

    Raises EngineError if `target` must not be replaced.
    """
    target = Path(os.path.abspath(target))  # noqa: PTH100 — `resolve` would follow a link in the target's place
    check_target(target, force=force)
    work, previous = (target.with_name(f".{target.name}.{form}") for form in ("partial", "previous"))
    try:
        work.mkdir(exist_ok=True)
        with locked(work) as ours:
            if not ours:
                raise EngineError(f"another export is writing {target}; wait for it, or choose another -o")
            # A killed export may have left files in `work`, or the old directory moved away.
            if previous.exists() and not target.exists():
                previous.rename(target)
            shutil.rmtree(previous, ignore_errors=True)
            for left in work.iterdir():
                shutil.rmtree(left) if left.is_dir() else left.unlink()
            try:
                yield work
                check_target(target, force=force)  # again: others may have written there since
                _replace(work, target, previous)
            except BaseException:
                shutil.rmtree(work, ignore_errors=True)
                raise
    except OSError as exc:
        raise ExportError(f"cannot write {target}: {exc.strerror or exc}; nothing was changed") from exc


def check_target(target: Path, *, force: bool) -> None:
    """Raise EngineError unless `target` can be written: it is free, or ours and `force` is given."""
    target = Path(os.path.abspath(target))  # noqa: PTH100 — `resolve` would follow a link in the target's place
    try:
        if Path.cwd().is_relative_to(target):
            raise EngineError(f"{target} is the current directory or holds it; choose another place with -o")
        if not target.parent.is_dir():
            raise EngineError(f"{target.parent} is not a directory; make it first, or choose another place with -o")
        if not os.access(target.parent, os.W_OK):
            raise EngineError(f"no permission to write into {target.parent}")
        if not target.exists() and not target.is_symlink():
            return
        if target.is_symlink() or not target.is_dir():
            raise EngineError(f"{target} exists and is not a directory; choose another place with -o")
        if not any(target.iterdir()):
            return
        if not _is_ours(target):
            raise EngineError(f"{target} exists and is not an engine directory; it is left alone, choose another -o")
        if not force:
            raise EngineError(f"{target} already holds an engine; give --force to replace it")
    except OSError as exc:
        raise EngineError(f"cannot use {target}: {exc.strerror or exc}") from exc


def _export_stage(
    model: DiffV2IQA | PfdIQA, plan: StagePlan, work: Path, say: Callable[[str], None], *, accept_drift: bool
) -> StageCost:
    relative = f"onnx/{plan.name}.onnx"
    path = work / relative
    path.parent.mkdir(exist_ok=True)
    start = time.perf_counter()
    say(f"{plan.name}: exporting to ONNX")
    inputs, outputs = (
        tuple(TensorSpec(name, "float32", shape) for name, shape in signature.items())
        for signature in (plan.inputs, plan.outputs)
    )
    try:
        unet = None if isinstance(model, PfdIQA) else model.config.unet
        graph = export_graph(plan, path, unet.alignment if unet else 16)
        macs = count_macs(graph, one_image(inputs, model.config.crop))
        # Weights, and constants such as Swin's masks.
        floats = [t for t in graph.graph.initializer if t.data_type == onnx.TensorProto.FLOAT]
        parameters = sum(math.prod(tensor.dims) for tensor in floats)
        del graph, floats
        exported = time.perf_counter()
        say(f"{plan.name}: comparing with PyTorch")
        checks = compare_with_pytorch(model, plan, path, seed=SEED, accept_drift=accept_drift)
        entry = FileEntry(relative, path.stat().st_size, file_sha256(path))
    except OSError as exc:
        raise ExportError(f"stage {plan.name}: cannot write {path.name}: {exc.strerror or exc}") from exc
    stage = Stage(plan.name, entry, OPSET, inputs, outputs, parameters, macs, checks)
    return StageCost(stage, exported - start, time.perf_counter() - exported)


def one_image(inputs: Sequence[TensorSpec], crop: int) -> dict[str, tuple[int, ...]]:
    """Return the shapes of a stage's inputs for one image of the size of a crop."""
    return {spec.name: spec.at({"B": 1, "N": 1, "H": crop, "W": crop}) for spec in inputs}


def manifest_of(loaded: Loaded | LoadedPfd, stages: tuple[Stage, ...]) -> Manifest:
    """Return the manifest of a model with these stages, whether their files are there or not."""
    c = loaded.model.config
    trained = all(source.role != "seed" for source in loaded.sources)
    packages = {name: version(name) for name in ("torch", "onnx", "onnxruntime", "onnxscript")}
    common: dict[str, Any] = {
        "schema": SCHEMA,
        "model": encode(c),
        "stages": stages,
        "complete": {stage.name for stage in stages} == set(plan_names(c)),
        "provenance": Provenance(
            created=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            versions={"diffiqa": __version__, **packages},
            sources=loaded.sources,
            notes=loaded.notes,
        ),
    }
    if isinstance(c, PfdConfig):
        manifest = pfd.manifest(c, ScoreMeaning(0.0, 0.0, TRAINED if trained else UNTRAINED, trained), common)
    else:
        labels, higher = c.labels, c.labels.better is Better.HIGHER
        worst, best = sorted((labels.minimum, labels.maximum), reverse=not higher)
        meaning = TRAINED if labels == Labels() else ON_LABELS.format(worst=worst, best=best)
        meaning = meaning if trained else UNTRAINED
        manifest = Manifest(
            schedule=c.schedule,
            taps=c.taps,
            kinds=c.kinds,
            alignment=c.alignment,
            crop=CropPolicy(c.crop, c.crop_count, c.crop_places),
            score=ScoreMeaning(
                c.vcg_weight, c.vda_weight, meaning, trained, labels.minimum, labels.maximum, higher_is_better=higher
            ),
            tap_form=c.tap_form,
            sides=c.sides,
            image_form=c.image_form,
            **common,
        )
    reference = loaded.reference
    if reference and reference.scoring != manifest.scoring_id:
        note = f"the reference {reference.name} is left out: it was made with another sampler or other crops"
        return replace(manifest, provenance=replace(manifest.provenance, notes=(*loaded.notes, note)))
    return replace(manifest, score=replace(manifest.score, reference=reference))


def preparation_of(m: Manifest) -> str:
    """Return in words how images and restorations reach the heads."""
    size = f"{m.crop.size}×{m.crop.size}"
    crops = f"{m.crop.count} {'random ' * (m.crop.places is CropPlaces.RANDOM)}crop{'s' * (m.crop.count > 1)} of {size}"
    parts = [f"squashed to {size}" if m.image_form is ImageForm.SQUASHED else crops]
    if m.kinds != (Kind.DIS,):
        forms = {
            TapForm.FLOAT: "floats",
            TapForm.CLAMPED: "floats in [-1, 1]",
            TapForm.PNG8: "8-bit PNG files hold them",
        }
        parts = [f"sides {m.sides} to multiples of {m.alignment}", *parts, f"restorations as {forms[m.tap_form]}"]
    return ", ".join(parts)


def _replace(work: Path, target: Path, previous: Path) -> None:
    """Put `work` in the place of `target`. The old directory is deleted only after the new one is there for sure."""
    sync_all(work)
    if target.exists() and exchange(work, target):
        sync(target.parent)
        work.rename(previous)
    else:
        if target.exists():
            target.rename(previous)
        try:
            work.rename(target)
        except BaseException:
            if previous.exists() and not target.exists():
                previous.rename(target)
            raise
        sync(target.parent)
    shutil.rmtree(previous, ignore_errors=True)


def _is_ours(directory: Path) -> bool:
    try:
        data = json.loads((directory / MANIFEST).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return False
    return isinstance(data, dict) and {"schema", "stages", "provenance"} <= set(data)
