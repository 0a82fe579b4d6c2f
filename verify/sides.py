"""The two sides of a comparison: a float32 reference, and a candidate that should be the same model.

These candidates run through ONNX Runtime on the CPU: an engine's stages as they are (in int8, for instance), or its
stages under a precision plan, emulated in float32 with every result rounded. Or PyTorch's compiler made them for this
CPU. `device.py` has the candidate on a GPU.
"""

import dataclasses
import hashlib
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import onnx
from onnx import TensorProto, helper

from ..calibration.statistics import NAME as STATISTICS
from ..engine.codec import encode
from ..engine.manifest import EngineDirectory, Manifest, Precision, Source, Stage, StageName, open_engine, read_manifest
from ..engine.sampling import Fast
from ..errors import EngineError, UsageError
from ..export.precision import PrecisionPlan, StagePrecision, cast, in_8_bits, replace_nodes, resolve_plan, rounded
from ..runtime.backends import Inductor
from ..runtime.executor import Planes, StageRunner
from ..runtime.host.onnx_stage import OnnxRuntime, OnnxStage
from ..runtime.host.stages import load_stages
from ..runtime.plan import Plan

_QUANTISED = {"QuantizeLinear", "DequantizeLinear", "DynamicQuantizeLinear", "MatMulInteger", "ConvInteger"}
_FLOAT8 = {TensorProto.FLOAT8E4M3FN, TensorProto.FLOAT8E5M2}
_LOW = {TensorProto.FLOAT16: "fp16", TensorProto.BFLOAT16: "bf16"}


@dataclass(frozen=True)
class Party:
    """The name of a side, and an id that changes with everything its results depend on."""

    label: str
    id: str
    precision: str  # the lowest of its ONNX stages: fp32, bf16, fp16, int8 or fp8
    cast: str = ""  # the precision that a plan or a build casts the rest to, if there is one


# Scores an image all on a GPU. Returns the score, whether a CUDA graph gave the same bits, and why there was no graph.
Whole = Callable[[Planes, Plan, int], tuple[float, bool | None, str]]


@dataclass(frozen=True)
class Side:
    """A party that can be run."""

    party: Party
    manifest: Manifest
    stages: Mapping[StageName, StageRunner]
    whole: Whole | None = None
    fast: Fast | None = None  # takes these steps, not those of the reference

    def plan(self, plan: Plan) -> Plan:
        """Return the plan as this side carries it out."""
        return dataclasses.replace(plan, sampling=self.fast.sampling) if self.fast else plan


@dataclass(frozen=True)
class Given:
    """What the user names: an engine, its reference, and how to round the engine."""

    engine: Path
    against: Path | None = None  # another engine, or a checkpoint
    plan: PrecisionPlan | None = None
    precision: Precision | None = None
    any_weights: bool = False  # compare even if the two have different weights
    fast: bool = False  # compare the engine's fast sampling with all steps


def open_verified(path: Path) -> EngineDirectory:
    """Open an engine with its ONNX stages. Raises EngineError if they are missing."""
    for stage in read_manifest(path).stages:
        if not (path / stage.file.path).is_file():
            raise EngineError(
                f"{path} has no ONNX stages ({stage.file.path} is missing), and verifying needs them; "
                f"export the engine again, or copy its onnx folder back"
            )
    return open_engine(path)


def emulated_side(directory: EngineDirectory, plan: PrecisionPlan, settings: OnnxRuntime) -> Side:
    """Return an engine under a plan."""
    manifest = directory.manifest
    stages = {s.name: emulate(directory, s, plan.stage(s.name), plan.precision, settings) for s in manifest.stages}
    lowest = onnx_precision(directory)
    form = f"in {plan.precision}" if lowest == "fp32" else f"in {lowest}, the rest in {plan.precision}"
    party = Party(f"{directory.path} {form}, emulated", plan_id(manifest, plan), lowest, plan.precision)
    return Side(party, manifest, stages)


def chosen_plan(given: Given, directory: EngineDirectory) -> PrecisionPlan | None:
    """Return the plan to emulate, checked against the engine; None if the engine itself is the candidate."""
    if given.plan is None and given.precision is None:
        if given.against is None and not given.fast:
            raise UsageError(
                "there is nothing to compare the engine with: give --precision or --plan to emulate one, --fast, or "
                "--against an engine or checkpoint"
            )
        return None
    return resolve_plan(directory, given.precision, given.plan)


def plan_id(manifest: Manifest, plan: PrecisionPlan) -> str:
    """Return the id of an engine under a plan."""
    return f"{manifest.engine_id}+{hashlib.sha256(plan.to_json().encode()).hexdigest()[:8]}"


def fast_side(side: Side) -> Side:
    """Return a side with its engine's fast sampling."""
    fast = side.manifest.fast
    assert fast is not None  # noqa: S101 — refused before anything was loaded
    label = f"{side.party.label}, {len(fast.sampling.steps)} of {side.manifest.schedule.steps} steps"
    party = dataclasses.replace(side.party, label=label, id=f"{side.party.id}+fast:{fast.key}")
    return dataclasses.replace(side, party=party, fast=fast)


def default_limits(reference: Party, candidate: Party) -> str:
    """Return the precision whose limits apply: that of the difference between candidate and reference."""
    as_low = candidate.precision in {"fp32", reference.precision}
    return candidate.cast if candidate.cast and as_low else candidate.precision


def emulate(
    directory: EngineDirectory, stage: Stage, plan: StagePrecision, precision: Precision, settings: OnnxRuntime
) -> OnnxStage:
    """Load a stage that computes in float32 and rounds its inputs and every result as the plan says."""
    model = emulated(onnx.load(directory.file(stage.file)), plan, precision)
    with tempfile.TemporaryDirectory(prefix="iqa-verify-") as folder:
        path = Path(folder, f"{stage.name}.onnx")  # messages then name the stage
        path.write_bytes(model.SerializeToString())
        return OnnxStage(path, dataclasses.replace(settings, as_written=in_8_bits(model)))


def emulated(model: onnx.ModelProto, plan: StagePrecision, precision: Precision) -> onnx.ModelProto:
    """Return a stage as `rounded`, with its inputs rounded too: an engine gets them in the type of its plan."""
    typed = cast(model, plan, precision)
    result = rounded(typed)
    graph = result.graph
    low = {value.name: kind for value in typed.graph.input if (kind := value.type.tensor_type.elem_type) in _LOW}
    for node in graph.node:
        for index, name in enumerate(node.input):
            if name in low:
                node.input[index] = f"{name}.stored"
    casts = []
    for name, kind in low.items():
        casts += [
            helper.make_node("Cast", [name], [f"{name}.low"], to=kind),
            helper.make_node("Cast", [f"{name}.low"], [f"{name}.stored"], to=TensorProto.FLOAT),
        ]
    replace_nodes(graph, [*casts, *graph.node])
    return result


def reference_side(given: Given, directory: EngineDirectory, settings: OnnxRuntime) -> Side:
    """Return the reference. Raises UsageError if it is not another form of the engine's model."""
    if given.against is None:
        return engine_side(directory, settings)
    if given.against.is_file():
        return _checkpoint(given, given.against, directory.manifest)
    other = open_verified(given.against)
    _require_same_model(given, directory.manifest, other.manifest)
    return engine_side(other, settings)


def engine_side(directory: EngineDirectory, settings: OnnxRuntime) -> Side:
    """Return an engine as it is."""
    precision = onnx_precision(directory)
    stages = load_stages(directory, dataclasses.replace(settings, as_written=precision == "fp8"))
    return Side(Party(str(directory.path), directory.manifest.engine_id, precision), directory.manifest, stages)


def compiled_side(directory: EngineDirectory, backend: Inductor) -> Side:
    """Return the build of an engine for this CPU."""
    loaded = backend.load(directory)
    assert loaded.build is not None  # noqa: S101 — it loads nothing else
    party = Party(
        f"{directory.path}, {loaded.name}",
        f"{directory.manifest.engine_id}+{loaded.build.key}",
        onnx_precision(directory),
        loaded.build.precision,
    )
    return Side(party, directory.manifest, loaded.stages)


def _checkpoint(given: Given, path: Path, manifest: Manifest) -> Side:
    """Return the PyTorch model of a checkpoint, unmerged, running the engine's schedule and crops."""
    from ..export.pytorch import TorchStage
    from ..model.pfd.checkpoint import load_either

    loaded = load_either(path)
    if encode(loaded.model.config) != manifest.model:
        raise UsageError(
            f"{given.engine} is a {manifest.model_name} model of another configuration than {path}, a "
            f"{loaded.model.config.name}; verify it against the checkpoint that it was exported from, with the options "
            f"that were given then in {path.stem}.toml beside it"
        )
    _require_same_weights(given, manifest.provenance.sources, loaded.sources)
    digest = hashlib.sha256(repr(sorted(s.sha256 for s in loaded.sources)).encode()).hexdigest()[:16]
    loaded.model.eval()
    stages = {stage.name: TorchStage(loaded.model, stage) for stage in manifest.stages}
    return Side(Party(f"{path} in PyTorch", digest, "fp32"), manifest, stages)


def _require_same_model(given: Given, mine: Manifest, other: Manifest) -> None:
    """Raise UsageError unless both engines should give the same scores."""
    alike = ("model", "schedule", "taps", "kinds", "alignment", "tap_form", "sides", "image_form", "flow")
    different = [name for name in alike if getattr(mine, name) != getattr(other, name)]
    if mine.crop.size != other.crop.size:
        different.append("crop size")
    if (mine.score.vcg_weight, mine.score.vda_weight) != (other.score.vcg_weight, other.score.vda_weight):
        different.append("branch weights")
    if {stage.name for stage in mine.stages} != {stage.name for stage in other.stages}:
        different.append("stages")
    if different:
        raise UsageError(
            f"{given.engine} ({mine.model_name}) and {given.against} ({other.model_name}) are not the same model: they "
            f"differ in {', '.join(different)}; compare engines that were exported from one checkpoint"
        )
    _require_same_weights(given, mine.provenance.sources, other.provenance.sources)


def _require_same_weights(given: Given, mine: tuple[Source, ...], other: tuple[Source, ...]) -> None:
    # Parts that were never trained have no file, only the seed of their initial values.
    # An 8-bit engine also lists its statistics, which are no weights.
    mine, other = (tuple(source for source in sources if source.role != STATISTICS) for sources in (mine, other))
    hashes = [{source.sha256 or source.format for source in sources} for sources in (mine, other)]
    if given.any_weights or not all(hashes) or hashes[0] == hashes[1]:
        return
    names = [", ".join(sorted({source.name for source in sources})) for sources in (mine, other)]
    raise UsageError(
        f"{given.engine} was made from other weights ({names[0]}) than {given.against} ({names[1]}), so their scores "
        f"differ by more than precision; verify against the model it was made from, or give --any-weights"
    )


def onnx_precision(directory: EngineDirectory) -> str:
    """Return the lowest precision that any ONNX stage of an engine computes in."""
    found = {"fp32"}
    for stage in directory.manifest.stages:
        graph = onnx.load(directory.file(stage.file)).graph
        kinds = {tensor.data_type for tensor in graph.initializer}
        found |= {name for kind, name in _LOW.items() if kind in kinds}
        if kinds & _FLOAT8:
            found.add("fp8")
        elif any(node.op_type in _QUANTISED for node in graph.node):
            found.add("int8")
    return next(name for name in ("fp8", "int8", "bf16", "fp16", "fp32") if name in found)
