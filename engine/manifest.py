"""The engine directory: `manifest.json`, its one typed reader, and the checks that make it safe to load.

    manifest.json                     everything below, and size and SHA-256 of every file
    self-test.json                    pictures with their answers: see `runtime/selftest.py`
    onnx/STAGE.onnx                   float32, portable, self-contained
    tensorrt/BUILD/STAGE.engine       optional: engines built from them for one library version, GPU and precision
    onnxruntime/BUILD/STAGE.onnx      optional: the stages in another precision, for ONNX Runtime on a GPU
    inductor/BUILD/STAGE.pt2          optional: machine code by PyTorch's compiler, for the machine that made it
    …/BUILD/plan.json                 which nodes stayed float32, and why
    …/BUILD/build.log                 the messages of parser and builder
    tensorrt/BUILD/timing.cache       the measurements of the builder, if the library keeps any
    inductor/BUILD/seal               proves that this account made the build: see `seal.py`

Nothing in it is pickled. Files are loaded only if the manifest has their hash. Machine code is loaded only if this
account made it. `export/engine.py` writes the directory; `export/builds.py` writes `builds` and what lies below them.
"""

import enum
import hashlib
import itertools
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path, PurePosixPath
from typing import Any

from .. import __version__
from ..errors import EngineError, first_line
from .codec import LATER, decode, encode, shown
from .crops import CropPlaces
from .pixels import ImageForm, Preparation, Sides, TapForm
from .reference import Reference
from .sampling import Fast
from .schedule import Kind, Schedule, Taps

SCHEMA = 1
MANIFEST = "manifest.json"
Shape = tuple[int | str, ...]
TABULATED = "-tabulated"  # in the key of a build
MAX_MANIFEST_BYTES = 8 * 2**20


class StageName(enum.StrEnum):
    """The networks an engine is made of, in the order they run."""

    UNET = "unet"
    VIT = "vit"
    VCG = "vcg"
    VDA = "vda"
    ENCODER = "encoder"
    PRIOR = "prior"
    DENOISER = "denoiser"
    DECODER = "decoder"


@dataclass(frozen=True)
class FileEntry:
    """A file of the engine directory; `path` is relative to it, with forward slashes."""

    path: str
    bytes: int
    sha256: str


@dataclass(frozen=True)
class TensorSpec:
    """An input or output of a stage. A dimension is a number, or a name if its size is free."""

    name: str
    dtype: str
    shape: tuple[int | str, ...]

    def at(self, sizes: Mapping[str, int]) -> tuple[int, ...]:
        """Return the shape with these sizes of its free dimensions."""
        return tuple(sizes[n] if isinstance(n, str) else n for n in self.shape)

    def free(self, shape: Sequence[int]) -> dict[str, int]:
        """Return the sizes that a shape gives the free dimensions."""
        return {name: n for name, n in zip(self.shape, shape, strict=True) if isinstance(name, str)}


@dataclass(frozen=True)
class Check:
    """One comparison of an exported stage with PyTorch on random inputs."""

    output: str
    input_shapes: dict[str, tuple[int, ...]]
    seed: int
    max_abs_error: float
    mean_abs_error: float
    max_abs_reference: float
    tolerance: float  # on max_abs_error

    @property
    def within(self) -> bool:
        """Whether the error is tolerable; others are exported with --accept-drift alone."""
        return self.max_abs_error <= self.tolerance


@dataclass(frozen=True)
class Stage:
    """One network: its file, its signature, what it costs, and how well it agrees with PyTorch."""

    name: StageName
    file: FileEntry
    opset: int
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    parameters: int
    macs: int  # multiply-accumulates for one image (U-Net: crop × crop pixels), counted from the graph
    checks: tuple[Check, ...]

    @property
    def takes(self) -> dict[str, Shape]:
        """The shapes of its inputs by name."""
        return {spec.name: spec.shape for spec in self.inputs}


class Library(enum.StrEnum):
    """The libraries that a build can be for."""

    TENSORRT = "tensorrt"
    TENSORRT_RTX = "tensorrt-rtx"
    INDUCTOR = "inductor"  # PyTorch's compiler
    ONNXRUNTIME = "onnxruntime"


class Precision(enum.StrEnum):
    """The precision of an engine, except for nodes that its plan keeps in float32."""

    FP32 = "fp32"
    FP16 = "fp16"
    BF16 = "bf16"


@dataclass(frozen=True)
class ShapeRange:
    """The shapes that one input may have, and the shape for which it is fastest. All three are equal if it is fixed."""

    minimum: tuple[int, ...]
    optimum: tuple[int, ...]
    maximum: tuple[int, ...]


@dataclass(frozen=True)
class BuiltStage:
    """One engine: its source, its file and signature, and how far it differs from float32."""

    name: StageName
    onnx_sha256: str  # of the float32 stage it was made from
    file: FileEntry
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    profiles: tuple[dict[str, ShapeRange], ...]  # by input, in the order of the engine's optimization profiles
    drift: tuple[Check, ...]  # its differences from the float32 stage on random inputs; empty for fp32

    def sizes(self, shapes: Mapping[str, Sequence[int]]) -> dict[str, int]:
        """Return the sizes that the shapes of its inputs give the free dimensions."""
        return {name: n for spec in self.inputs for name, n in spec.free(shapes[spec.name]).items()}


@dataclass(frozen=True)
class Build:
    """All stages for one library version, machine and precision."""

    key: str  # the name of its folder; it ends in a digest of everything that the engines depend on
    library: Library
    version: str
    compute_capabilities: tuple[str, ...]  # such as "8.9", or "cpu-" and a digest of a CPU's features; empty: portable
    precision: Precision
    batches: tuple[str, ...]  # as given to iqa-build: messages say how to build again; empty: any
    sizes: tuple[str, ...]
    stages: tuple[BuiltStage, ...]
    plan: FileEntry
    log: FileEntry
    timing_cache: FileEntry | None

    @property
    def tabulated(self) -> bool:
        """Whether what depends on the step alone is a table: the key says so."""
        return self.key.rpartition("-")[0].endswith(TABULATED)

    @property
    def files(self) -> tuple[FileEntry, ...]:
        """Every file of the build."""
        cache = (self.timing_cache,) if self.timing_cache else ()
        return (*(stage.file for stage in self.stages), self.plan, self.log, *cache)


@dataclass(frozen=True)
class CropPolicy:
    """The side of the square crops that the heads see, how many an image has by default, and where they lie."""

    size: int
    count: int
    places: CropPlaces = field(default=CropPlaces.GRID, metadata=LATER)


@dataclass(frozen=True)
class Loop:
    """The stage that is asked at every step about its state `y`, and answers with the noise in it.

    Without a `result` the state is an image, and its restorations are kinds of images that crops are cut from. With
    one, every crop has a state of its own: it begins as share · start + (1 − share) · noise.
    """

    stage: StageName = StageName.UNET
    scalar: str = "noise_level"  # its input that tells the step, as the schedule has it
    start: str = ""  # the tensor, of a stage before it
    share: str = ""  # the same; one number for each crop
    result: str = ""  # what the stages after it call the state


@dataclass(frozen=True)
class Probabilities:
    """An output of a stage, and the words that it says how well a crop matches."""

    stage: StageName
    output: str
    words: tuple[str, ...]


@dataclass(frozen=True)
class Flow:
    """The plan of stages: what is looped over, and which outputs count. The default is that of Diff-V²-IQA.

    Stages run in the order of their names above. What a stage reads has the name of what another one returns, of the
    loop's result, or is `crop` (B, 3, size, size), `image` (N, 3, size, size) or `images` (B, kinds, 3, size, size).
    """

    loop: Loop = Loop()
    score: StageName | None = None  # the stage whose output `score` is the score; None: the branches, weighted
    probabilities: tuple[Probabilities, ...] = ()


@dataclass(frozen=True)
class ScoreMeaning:
    """How the branch scores add up, and what the sum means."""

    vcg_weight: float
    vda_weight: float
    meaning: str
    trained: bool
    minimum: float = 0.0
    nominal_maximum: float = 1.0  # labels are scaled to [0, 1]; a score may exceed it
    higher_is_better: bool = True
    reference: Reference | None = field(default=None, metadata=LATER)

    def percentile(self, score: float) -> float | None:
        """Return the percentage of the reference's images that this score is better than; None without a reference."""
        return self.reference.percentile(self._turned(score)) if self.reference else None

    def opinion(self, score: float) -> float | None:
        """Return the opinion that a score stands for, from 1 to 5; None without a reference."""
        return self.reference.opinions(self._turned(score)) if self.reference else None

    def _turned(self, score: float) -> float:
        return score if self.higher_is_better else -score


@dataclass(frozen=True)
class Source:
    """A weights file that went into the engine, by content."""

    role: str
    name: str
    bytes: int
    sha256: str
    format: str


def weights_id(sources: Iterable[Source]) -> str:
    """Return sixteen hex digits that name the weights files, whatever they were exported to."""
    return hashlib.sha256(" ".join(source.sha256 for source in sources).encode()).hexdigest()[:16]


@dataclass(frozen=True)
class Provenance:
    """Where an engine comes from."""

    created: str  # UTC, ISO 8601
    versions: dict[str, str]
    sources: tuple[Source, ...]
    notes: tuple[str, ...]


@dataclass(frozen=True)
class Manifest:
    """Everything that a runtime needs to know about an engine."""

    schema: int
    model: Any  # the ModelConfig as JSON: the runtime only shows it; export and training read it
    schedule: Schedule
    taps: Taps
    kinds: tuple[Kind, ...]
    alignment: int  # image sides become multiples of this, as `sides` says
    crop: CropPolicy
    score: ScoreMeaning
    stages: tuple[Stage, ...]
    complete: bool  # False if only some stages were exported, with --stage
    provenance: Provenance
    builds: tuple[Build, ...] = ()  # the newest last
    tap_form: TapForm = field(default=TapForm.FLOAT, metadata=LATER)
    sides: Sides = field(default=Sides.PADDED, metadata=LATER)
    image_form: ImageForm = field(default=ImageForm.AS_IS, metadata=LATER)
    fast: Fast | None = field(default=None, metadata=LATER)  # from iqa-calibrate --steps
    flow: Flow = field(default=Flow(), metadata=LATER)

    @property
    def model_name(self) -> str:
        """The name of the model configuration."""
        name = self.model.get("name") if isinstance(self.model, dict) else None
        return name if isinstance(name, str) else "unnamed"

    @cached_property
    def engine_id(self) -> str:
        """Sixteen hex digits that change when anything changes that a score depends on."""
        scoring = (self.schedule, self.taps, self.kinds, self.alignment, self.crop.size)
        weights = (self.score.vcg_weight, self.score.vda_weight)
        hashes = {stage.name: stage.file.sha256 for stage in self.stages}
        parts: dict[str, Any] = {"scoring": scoring, "weights": weights, "stages": hashes}
        # What came later counts where it is not at its default: so the ids of older engines stay.
        trained = (self.tap_form, self.sides, self.image_form, self.crop.places)
        if trained != (TapForm.FLOAT, Sides.PADDED, ImageForm.AS_IS, CropPlaces.GRID):
            parts["trained"] = trained
        if self.flow != Flow():
            parts["flow"] = self.flow
        text = json.dumps(encode(parts), sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    @property
    def preparation(self) -> Preparation:
        """How images are prepared."""
        return Preparation(self.sides, self.image_form, self.alignment, self.crop.size)

    @property
    def scoring_id(self) -> str:
        """What `engine_id` is, but for the networks: two exports of the same weights differ in their files."""
        return replace(self, stages=()).engine_id

    def stage(self, name: StageName) -> Stage | None:
        """Return a stage, or None where the model has none of that name."""
        return next((stage for stage in self.stages if stage.name is name), None)

    @property
    def drift(self) -> str:
        """How far stages differ from PyTorch beyond its rounding, if that was accepted; "" for every other engine."""
        worst = {
            (stage.name, check.output): check
            for stage in self.stages
            for check in sorted(stage.checks, key=lambda check: check.max_abs_error)
            if not check.within
        }
        return ", ".join(
            f"{output} of {stage} by {check.max_abs_error:.3g} where {check.tolerance:.3g} is allowed"
            for (stage, output), check in worst.items()
        )

    def to_json(self) -> str:
        """Return the text of `manifest.json`."""
        return json.dumps(encode(self), indent=2, ensure_ascii=False) + "\n"


@dataclass(frozen=True)
class EngineDirectory:
    """An engine directory whose manifest has been read and whose files have been checked."""

    path: Path
    manifest: Manifest

    def file(self, entry: FileEntry) -> Path:
        """Return the checked path of a file."""
        return self.path / entry.path


def open_engine(path: Path) -> EngineDirectory:
    """Read and check an engine directory: schema, paths, sizes and hashes. Raises EngineError."""
    directory = EngineDirectory(path, read_manifest(path))
    if not directory.manifest.complete:
        names = ", ".join(stage.name for stage in directory.manifest.stages)
        raise EngineError(f"{path} holds only the stages {names}; export again without --stage to score images")
    for stage in directory.manifest.stages:
        check_file(path, stage.file)
    return directory


def read_manifest(path: Path) -> Manifest:
    """Read `manifest.json` alone. Raises EngineError with what to do."""
    file = path / MANIFEST
    try:
        if not path.is_dir():
            if path.exists():
                make = f"iqa-export --ckpt {path} -o engine/"
                raise EngineError(f"{path} is not an engine directory; if it has weights, make one with: {make}")
            raise EngineError(
                f"{path} does not exist; make an engine directory with: iqa-export --ckpt model.pt -o {path}"
            )
        if not file.is_file():
            raise EngineError(f"{path} has no {MANIFEST}, so it is not a (finished) engine directory; export it again")
        if file.stat().st_size > MAX_MANIFEST_BYTES:
            raise EngineError(f"{file} is larger than {MAX_MANIFEST_BYTES} bytes; it is not ours")
        text = file.read_text(encoding="utf-8")
        data = json.loads(text)
    except OSError as exc:
        raise EngineError(f"cannot read {file}: {exc.strerror or exc}") from exc
    except (ValueError, RecursionError) as exc:
        raise EngineError(f"{file} is damaged ({first_line(exc)}); export the engine again") from exc
    if isinstance(data, dict) and data.get("schema") != SCHEMA:
        raise EngineError(
            f"{file} has schema version {shown(data.get('schema'))}; diffiqa {__version__} reads version {SCHEMA}: "
            f"export the engine again, or use the diffiqa that wrote it"
        )

    def damaged(message: str) -> EngineError:
        return EngineError(f"{file} is damaged: {message}; export the engine again")

    try:
        manifest = decode(Manifest, data, "manifest", damaged)
        problem = _problem(manifest)
    except RecursionError as exc:
        raise damaged("nested too deeply") from exc
    if problem:
        raise damaged(problem)
    return manifest


def check_file(directory: Path, entry: FileEntry, remedy: str = "export the engine again") -> None:
    """Raise EngineError unless the file of `entry` is inside `directory` and unchanged; `remedy` says what to do."""
    relative = PurePosixPath(entry.path)
    if (
        relative.is_absolute()
        or ".." in relative.parts
        or "\\" in entry.path
        or ":" in entry.path
        or not relative.parts
    ):
        raise EngineError(
            f"{directory / MANIFEST} names {shown(entry.path)}, which leaves the engine directory; refused"
        )
    file = directory / relative
    try:
        inside = file.resolve(strict=True).is_relative_to(directory.resolve(strict=True))
        if not inside:
            raise EngineError(f"{file} points outside the engine directory; refused")
        if not file.is_file():
            raise EngineError(f"{file} is not a file; {remedy}")
        size = file.stat().st_size
        if size != entry.bytes:
            raise EngineError(f"{file} has {size} bytes, the manifest says {entry.bytes}; {remedy}")
        digest = file_sha256(file)
    except FileNotFoundError as exc:
        raise EngineError(f"{file} is missing; {remedy}") from exc
    except (OSError, RuntimeError, ValueError) as exc:  # RuntimeError: a loop of symbolic links, before Python 3.13
        raise EngineError(f"cannot read {file}: {first_line(exc)}") from exc
    if digest != entry.sha256:
        raise EngineError(f"{file} was changed after export (its SHA-256 differs); {remedy}")


def file_sha256(path: Path) -> str:
    """Return the SHA-256 of a file as hex digits."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def wiring(m: Manifest) -> dict[StageName, dict[str, Shape]]:
    """Return the shape that each input of each stage must have: that of what it reads, if there is such a tensor."""
    kinds, size, loop = len(m.kinds), m.crop.size, m.flow.loop
    image: Shape = ("B", 3, "H", "W")
    known: dict[str, Shape] = {"image": ("N", 3, size, size), "images": ("B", kinds, 3, size, size)}
    if kinds == 1:
        known["crop"] = ("B", 3, size, size)
    wanted = {}
    for stage in sorted(m.stages, key=lambda stage: list(StageName).index(stage.name)):
        looped = stage.name is loop.stage
        state = {"y": known.get(loop.start, ())} if loop.result else {"y": image, "condition": image}
        readable = known | state | {loop.scalar: ("B", 1)} if looped else known
        wanted[stage.name] = {spec.name: readable[spec.name] for spec in stage.inputs if readable.get(spec.name)}
        if looped:
            known |= {loop.result: state["y"]} if loop.result else {}
            continue
        for spec in stage.outputs:  # the kinds of a crop may be images of one batch
            known[spec.name] = ("B", *((kinds,) if spec.shape[:1] == ("N",) else ()), *spec.shape[1:])
    return wanted


def _flow_problem(m: Manifest) -> str | None:
    """Return what is wrong with the plan of stages that a complete manifest has, or None."""
    loop, needed = m.flow.loop, wiring(m)
    outputs = {(stage.name, spec.name): spec.shape for stage in m.stages for spec in stage.outputs}
    state = needed.get(loop.stage, {}).get("y", ())
    sizes = [n for n in state[1:] if isinstance(n, int)]
    for stage in m.stages:
        if stage.takes != needed[stage.name]:
            return f"the {stage.name} stage reads what no stage before it returns in this shape"
    for found in m.flow.probabilities:
        if outputs.get((found.stage, found.output)) != ("B", len(found.words)):
            return f"{found.output} has no probability for each of {len(found.words)} words"
        plain = found.output.isidentifier() and all(0 < len(word) <= 100 and word.isprintable() for word in found.words)
        if not plain or len(set(found.words)) < len(found.words):
            return f"{shown(found.output)} has words that are not plain text, or a word twice"
    rules = {
        "the score is missing": m.flow.score is None or outputs.get((m.flow.score, "score")) == ("B",),
        "the state must have sizes whose product is a multiple of 4": not loop.result
        or (len(sizes) == len(state) - 1 > 0 and math.prod(sizes) % 4 == 0),
        "the noise must be like the state": not loop.result or outputs.get((loop.stage, "noise")) == state,
        "the share must be one number": not loop.result
        or ("B", 1) in [outputs.get((name, loop.share)) for name in itertools.takewhile(loop.stage.__ne__, StageName)],
    }
    return next((text for text, ok in rules.items() if not ok), None)


def _problem(m: Manifest) -> str | None:
    """Return what is inconsistent in a manifest whose types are right, or None."""
    names = [stage.name for stage in m.stages]
    linear = m.schedule.linear
    if linear and (wrong := next((text for text, ok in linear.rules.items() if not ok), None)):
        return f"its schedule's {wrong}"
    fewest = 1 if linear else 2
    unusable = _flow_problem(m) if m.complete and m.flow != Flow() else None
    restored = [kind for kind in m.kinds if kind is not Kind.DIS]
    needs_unet = bool(restored)
    sampled = m.fast.problem(m.schedule, m.taps, m.kinds) if m.fast and fewest <= m.schedule.steps <= 4000 else None
    rules = {
        "a stage is listed twice": len(set(names)) == len(names),
        "it has neither a VCG nor a VDA stage": not m.complete
        or (m.flow.score or StageName.VCG) in names
        or StageName.VDA in names,
        "the VCG and ViT stages must come together": not m.complete
        or (StageName.VCG in names) == (StageName.VIT in names),
        "restored images are read but there is no U-Net, or the reverse": not m.complete
        or needs_unet == (StageName.UNET in names),
        "kinds must start with dis and not repeat": m.kinds[:1] == (Kind.DIS,) and len(set(m.kinds)) == len(m.kinds),
        f"steps must be between {fewest} and 4000": fewest <= m.schedule.steps <= 4000,
        "there must be as many timesteps as steps": linear is None or len(linear.timesteps) == m.schedule.steps,
        "schedule offset must lie between 0 and 1, max_beta between 0.1 and 1": 0 < m.schedule.offset < 1
        and 0.1 <= m.schedule.max_beta < 1,
        "taps must be step indices, y0 at 0": linear is not None
        or (m.taps.y0 == 0 < min(m.taps.t1, m.taps.t2) and max(m.taps.t1, m.taps.t2) < m.schedule.steps),
        "alignment must be 4, 8 or 16, or 1 without a U-Net": m.alignment in ({4, 8, 16} if needs_unet else {1}),
        "crop size must be a multiple of 16 between 32 and 1024": 32 <= m.crop.size <= 1024 and m.crop.size % 16 == 0,
        f"in its plan of stages {unusable}": unusable is None,
        "crop count must be between 1 and 10000": 1 <= m.crop.count <= 10_000,
        "file sizes must not be negative": all(stage.file.bytes >= 0 for stage in m.stages),
        f"the fast sampling cannot be used ({sampled})": sampled is None,
        "a build is listed twice": len({build.key for build in m.builds}) == len(m.builds),
        f"its reference {m.score.reference and m.score.reference.problem}": m.score.reference is None
        or m.score.reference.problem is None,
    }
    return next((text for text, ok in rules.items() if not ok), None)
