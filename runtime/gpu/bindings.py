"""Engines bound to device memory: their contexts, the buffers whose addresses a CUDA graph holds, and what is stale.

A buffer is sized by its engine's profile, so it seldom moves. An open-ended profile says nothing of sizes: such a
buffer grows with the images. When one moves, every context and graph goes, since any may hold its address.
"""

import contextlib
import math
from collections import OrderedDict
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass

from ...engine.manifest import Manifest, StageName, TensorSpec
from ...engine.sampling import Sampling
from ...engine.schedule import Kind
from ...errors import EngineError
from ...kernels.launch import PROGRESS, STEP, WINDOW, SamplerBuffers, Storage, step_table
from ..builds import choose_profile
from .graphs import Graphs, Work
from .layer import ITEM_BYTES, BoundStage, Layer, LoadedStage, Shapes
from .memory import Pool

HEADS = (StageName.VIT, StageName.VCG, StageName.VDA)  # in the order they run
MAX_LOOPS = 8  # sizes, batches and samplings of the U-Net that keep a context and a graph

_FLOAT = 4  # bytes
_IMAGES = {"y", "condition", "noise", "image", "images"}


@dataclass(frozen=True)
class Loop:
    """The U-Net and the sampler on buffers of one size."""

    stage: BoundStage
    buffers: SamplerBuffers
    condition: int
    work: Work
    slots: Mapping[Kind, int]  # the slot of the taps that holds each restored kind

    @property
    def taps_shape(self) -> tuple[int, int, int, int, int]:
        """The shape of all taps: (slots, batch, 3, height, width)."""
        b = self.buffers
        return len(set(self.slots.values())), b.batch, 3, b.height, b.width

    @property
    def taps(self) -> list[int]:
        """The address of each restored kind (batch, 3, height, width), in order of kinds."""
        return [self.buffers.taps + slot * math.prod(self.taps_shape[1:]) * _FLOAT for slot in self.slots.values()]


@dataclass(frozen=True)
class Heads:
    """ViT and heads on buffers for one batch of crops."""

    stages: list[BoundStage]
    images: dict[Storage, int]  # (batch, kinds, 3, crop, crop), in each storage that a stage reads
    outputs: dict[tuple[StageName, TensorSpec], int]
    work: Work


class Bindings:
    """What an executor's stages are bound to. Raises EngineError for stages that cannot share memory.

    `graphs` are of the work that is handed out here; they are dropped before what they hold.
    """

    def __init__(
        self, manifest: Manifest, layer: Layer, stages: Mapping[StageName, LoadedStage], graphs: Graphs
    ) -> None:
        self._manifest, self._kinds = manifest, len(manifest.kinds)
        self._layer, self._stages, self._graphs = layer, stages, graphs
        self._buffers = Pool(layer)
        self._version = 0  # of `_buffers`, when the bindings below were made
        self._loops: OrderedDict[Hashable, Loop] = OrderedDict()
        self._heads: dict[int, Heads] = {}
        self._storage = {name: _storages(stage) for name, stage in stages.items()}
        _check_signatures(stages)

    @property
    def restores(self) -> bool:
        """Whether there is a U-Net."""
        return StageName.UNET in self._stages

    @property
    def largest_batch(self) -> int:
        """The most crops that a stage takes at a time."""
        return max(max(self._crop_batches(name, "maximum")) for name in self._stages)

    @property
    def smallest_batch(self) -> int:
        """The fewest crops that every stage takes."""
        return max(min(self._crop_batches(name, "minimum")) for name in self._stages)

    def takes_windows(self, batch: int, height: int, width: int) -> bool:
        """Whether the U-Net takes so many windows of a size."""
        profiles = self._stages[StageName.UNET].built.profiles
        return choose_profile(profiles, _unet_shapes(batch, height, width)) is not None

    def takes_crops(self, batch: int) -> bool:
        """Whether ViT and heads take so many crops."""
        return all(
            choose_profile(self._stages[name].built.profiles, self._head_shapes(name, batch)) is not None
            for name in HEADS
            if name in self._stages
        )

    def loop(self, batch: int, height: int, width: int, sampling: Sampling) -> Loop:
        """Return the loop for a batch of windows that the U-Net takes, bound and ready to run."""
        key = batch, height, width, sampling
        self._unbind_stale()
        if key in self._loops:
            self._loops.move_to_end(key)
            return self._loops[key]
        if len(self._loops) >= MAX_LOOPS:
            self._layer.synchronise()
            oldest, loop = self._loops.popitem(last=False)
            self._graphs.forget(oldest)
            loop.stage.close()
        stage, storage = self._stages[StageName.UNET], self._storage[StageName.UNET]["y"]
        shapes = _unet_shapes(batch, height, width)
        profile = choose_profile(stage.built.profiles, shapes)
        assert profile is not None  # noqa: S101 — the caller has asked `takes_windows`
        largest = shapes["y"] if stage.open_ended else stage.built.profiles[profile]["y"].maximum
        pixels, get = math.prod(largest), self._buffers.get
        rows = sampling.rows(self._manifest.schedule, self._manifest.taps, self._manifest.kinds)
        tapped = sorted(set(rows.taps.values()))
        table = step_table(vars(rows.factors), tapped, rows.steps)
        state = get("state", pixels * _FLOAT)
        size = pixels * storage.dtype.itemsize
        buffers = SamplerBuffers(
            storage,
            *(batch, height, width, len(table), rows.start),
            state=state,
            y=state if storage is Storage.F32 else get("y", size),
            noise=get("noise", size),
            noise_level=get("noise_level", largest[0] * _FLOAT),
            taps=get("taps", len(tapped) * pixels * _FLOAT),
            windows=get("windows", largest[0] * WINDOW.itemsize),
            table=get(f"steps of {sampling}", len(table) * STEP.itemsize),  # of its own: graphs read it again and again
            progress=get("progress", PROGRESS.itemsize),
        )
        self._layer.upload(buffers.table, table)
        condition = get("condition", size)
        addresses = {
            "y": buffers.y,
            "condition": condition,
            "noise_level": buffers.noise_level,
            "noise": buffers.noise,
        }
        (bound,) = self._bind([(stage, profile, shapes, addresses)])
        begin, step, launch = buffers.begin(), buffers.step(), self._layer.launch

        def advance() -> None:
            bound.enqueue()
            launch(step)

        def end() -> None:
            for _ in range(len(table) - rows.calls):
                launch(step)

        work = Work(key, advance, rows.calls, lambda: launch(begin), end, bound.capture_problem)
        slots = {kind: tapped.index(row) for kind, row in rows.taps.items()}
        self._loops[key] = Loop(bound, buffers, condition, work, slots)
        return self._loops[key]

    def heads(self, batch: int) -> Heads:
        """Return the heads for a batch of crops that they take, bound and ready to run."""
        self._unbind_stale()
        if batch in self._heads:
            return self._heads[batch]
        names = [name for name in HEADS if name in self._stages]
        profiles: dict[StageName, int] = {}
        for name in names:
            built, shapes = self._stages[name].built, self._head_shapes(name, batch)
            profile = choose_profile(built.profiles, shapes)
            assert profile is not None  # noqa: S101 — the caller has asked `takes_crops`
            profiles[name] = profile
            spans = {key: span.maximum for key, span in built.profiles[profile].items()}
            rows = next(iter((shapes if self._stages[name].open_ended else spans).values()))[0]
            for spec in (*built.inputs, *built.outputs):
                self._buffers.get(_buffer(name, spec), rows * math.prod(fixed_dims(spec)) * ITEM_BYTES[spec.dtype])
        # Addresses only once all have asked: a buffer that two stages share moves when the second needs a larger one.
        addresses: dict[StageName, dict[str, int]] = {}
        images: dict[Storage, int] = {}
        outputs: dict[tuple[StageName, TensorSpec], int] = {}
        for name in names:
            built = self._stages[name].built
            specs = (*built.inputs, *built.outputs)
            mine = addresses[name] = {spec.name: self._buffers.get(_buffer(name, spec), 0) for spec in specs}
            images |= {storage: mine[spec] for spec, storage in self._storage[name].items()}
            if name is not StageName.VIT:
                outputs |= {(name, spec): mine[spec.name] for spec in built.outputs}
        bound = self._bind(
            [(self._stages[name], profiles[name], self._head_shapes(name, batch), addresses[name]) for name in names]
        )

        def score() -> None:
            for stage in bound:
                stage.enqueue()

        def problem() -> str | None:
            return next((found for stage in bound if (found := stage.capture_problem())), None)

        self._heads[batch] = Heads(bound, images, outputs, Work(("heads", batch), score, problem=problem))
        return self._heads[batch]

    def release(self) -> None:
        """Free graphs, contexts and buffers; nothing may be running on them."""
        self._unbind()
        self._buffers.release()

    def _crop_batches(self, name: StageName, bound: str) -> list[int]:
        """Return the "minimum" or "maximum" batch of every profile of a stage, in crops."""
        images = self._kinds if name is StageName.VIT else 1  # per crop
        spans = [next(iter(profile.values())) for profile in self._stages[name].built.profiles]
        return [getattr(span, bound)[0] // images for span in spans]

    def _head_shapes(self, name: StageName, batch: int) -> Shapes:
        sizes = {"B": batch, "N": batch * self._kinds}
        return {spec.name: spec.at(sizes) for spec in self._stages[name].built.inputs}

    def _bind(self, wanted: Sequence[tuple[LoadedStage, int, Shapes, Mapping[str, int]]]) -> list[BoundStage]:
        """Bind stages and give them the one scratch memory that all share; older bindings go if it had to move."""
        with contextlib.ExitStack() as undo:
            bound = []
            for engine, profile, shapes, addresses in wanted:
                bound.append(engine.bind(profile, shapes, addresses))
                undo.callback(bound[-1].close)
            size = max(stage.activation_bytes for stage in bound)
            address = self._buffers.get("activation", size) if size else 0
            self._unbind_stale()
            for stage in bound:
                if size:
                    stage.use_activation(address, size)
            undo.pop_all()
        return bound

    def _unbind_stale(self) -> None:
        """Give up contexts and graphs made for addresses that are no more; the pool has waited for their work."""
        if self._version != self._buffers.version:
            self._unbind()

    def _unbind(self) -> None:
        self._graphs.clear()
        bound = [loop.stage for loop in self._loops.values()]
        bound += [stage for heads in self._heads.values() for stage in heads.stages]
        self._loops.clear()
        self._heads.clear()
        for stage in bound:
            stage.close()
        self._version = self._buffers.version


def fixed_dims(spec: TensorSpec) -> tuple[int, ...]:
    """Return the dimensions of a tensor but for its free ones."""
    return tuple(n for n in spec.shape if isinstance(n, int))


def _check_signatures(stages: Mapping[StageName, LoadedStage]) -> None:
    """Raise EngineError unless the engines can work on each other's memory and on that of the kernels."""
    dtypes = {
        (name, spec.name): spec.dtype
        for name, stage in stages.items()
        for spec in (*stage.built.inputs, *stage.built.outputs)
    }
    unet = {dtypes[StageName.UNET, name] for name in ("y", "condition", "noise")} if StageName.UNET in stages else {""}
    maps = {dtype for (_, name), dtype in dtypes.items() if name == "maps"}
    results = {dtype for (_, name), dtype in dtypes.items() if name in {"score", "score_map", "weight_map"}}
    if len(unet) > 1 or len(maps) > 1 or dtypes.get((StageName.UNET, "noise_level"), "float32") != "float32":
        raise EngineError("the stages of this build do not agree on their types; build it again without --plan")
    if not results <= {"float32", "float16"}:
        raise EngineError(f"this build gives scores as {', '.join(results)}; build it again without --plan")


def _storages(stage: LoadedStage) -> dict[str, Storage]:
    """Return how the kernels store what a stage reads and writes of images; the rest they never touch."""
    known = {"float32": Storage.F32, "float16": Storage.F16}
    specs = [spec for spec in (*stage.built.inputs, *stage.built.outputs) if spec.name in _IMAGES]
    if wrong := [spec for spec in specs if spec.dtype not in known]:
        raise EngineError(f"{wrong[0].name} of this build is {wrong[0].dtype}; build it again without --plan")
    return {spec.name: known[spec.dtype] for spec in specs}


def _buffer(name: StageName, spec: TensorSpec) -> str:
    """Return the name of the buffer for a head's tensor: maps and images are one for all stages."""
    if spec.name in _IMAGES:
        return f"images {spec.dtype}"
    return spec.name if spec.name == "maps" else f"{name}.{spec.name}"


def _unet_shapes(batch: int, height: int, width: int) -> Shapes:
    image = batch, 3, height, width
    return {"y": image, "condition": image, "noise_level": (batch, 1)}
