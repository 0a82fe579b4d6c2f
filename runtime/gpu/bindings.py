"""Engines bound to device memory: their contexts, the buffers whose addresses a CUDA graph holds, and what is stale.

A buffer is sized by its engine's profile, so it seldom moves. An open-ended profile says nothing of sizes: such a
buffer grows with the images. When one moves, every context and graph goes, since any may hold its address.
"""

import contextlib
import math
from collections import OrderedDict, defaultdict
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ...engine.manifest import Loop as LoopPlan
from ...engine.manifest import Manifest, StageName, TensorSpec
from ...engine.sampling import Rows, Sampling
from ...engine.schedule import Kind
from ...errors import EngineError
from ...kernels.launch import PROGRESS, STEP, WINDOW, SamplerBuffers, Storage, step_table
from ..builds import choose_profile
from .graphs import Graphs, Work
from .layer import ITEM_BYTES, BoundStage, Layer, LoadedStage, Shapes
from .memory import Pool

MAX_LOOPS = 8  # sizes, batches and samplings that keep their contexts and graphs: of the U-Net, and of what sees crops

_FLOAT = 4  # bytes
_CROPS = {"image", "images", "crop"}


@dataclass(frozen=True)
class Loop:
    """The U-Net and the sampler on buffers of one size."""

    stages: list[BoundStage]
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
    """The stages that look at crops, on buffers for one batch of them."""

    stages: list[BoundStage]
    images: dict[Storage, int]  # (batch, kinds, 3, crop, crop), in each storage that a stage reads
    outputs: dict[tuple[StageName, TensorSpec], int]  # those that no other stage reads
    sampler: SamplerBuffers | None  # of a loop that refines a state of each crop
    work: Work


class Bindings:
    """What an executor's stages are bound to. Raises EngineError for stages that cannot share memory.

    `graphs` are of the work that is handed out here; they are dropped before what they hold.
    """

    def __init__(
        self, manifest: Manifest, layer: Layer, stages: Mapping[StageName, LoadedStage], graphs: Graphs
    ) -> None:
        self._manifest, self._kinds, self._plan = manifest, len(manifest.kinds), manifest.flow.loop
        self._layer, self._stages, self._graphs = layer, stages, graphs
        self._buffers = Pool(layer)
        self._version = 0  # of `_buffers`, when the bindings below were made
        self._loops: OrderedDict[Hashable, Loop] = OrderedDict()
        self._heads: OrderedDict[Hashable, Heads] = OrderedDict()
        # What runs on crops, in this order: all stages but the one that restores images.
        self._on_crops = [
            name for name in StageName if name in stages and (self._plan.result or name != self._plan.stage)
        ]
        built = [self._stages[name].built for name in self._on_crops]
        self._inner = {spec.name for stage in built for spec in stage.inputs} | (
            {self._plan.start, self._plan.share, "noise"} if self._plan.result else set()
        )
        self._storage = {name: _storages(stage, _touched(name, self._plan)) for name, stage in stages.items()}
        self._check_signatures()

    @property
    def restores(self) -> bool:
        """Whether there is a loop that restores images."""
        return self._plan.stage in self._stages and not self._plan.result

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
        profiles = self._stages[self._plan.stage].built.profiles
        return choose_profile(profiles, _unet_shapes(batch, height, width)) is not None

    def takes_crops(self, batch: int) -> bool:
        """Whether all stages that look at crops take so many."""
        return all(
            choose_profile(self._stages[name].built.profiles, self._head_shapes(name, batch)) is not None
            for name in self._on_crops
        )

    def loop(self, batch: int, height: int, width: int, sampling: Sampling) -> Loop:
        """Return the loop for a batch of windows that the U-Net takes, bound and ready to run."""
        key = batch, height, width, sampling
        self._unbind_stale()
        if key in self._loops:
            self._loops.move_to_end(key)
            return self._loops[key]
        self._make_room(self._loops)
        stage, storage = self._stages[self._plan.stage], self._storage[self._plan.stage]["y"]
        shapes = _unet_shapes(batch, height, width)
        profile = choose_profile(stage.built.profiles, shapes)
        assert profile is not None  # noqa: S101 — the caller has asked `takes_windows`
        largest = shapes["y"] if stage.open_ended else stage.built.profiles[profile]["y"].maximum
        rows = sampling.rows(self._manifest.schedule, self._manifest.taps, self._manifest.kinds)
        condition = self._buffers.get("condition", math.prod(largest) * storage.dtype.itemsize)
        begins: dict[str, Any] = {"given": condition, "shares": rows.image} if rows.image else {}
        buffers = self._sampler(sampling, rows, storage, (batch, 3, height, width), largest, **begins)
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
            for _ in range(rows.silent):
                launch(step)

        work = Work(key, advance, rows.calls, lambda: launch(begin), end, bound.capture_problem)
        slots = {kind: rows.tapped.index(row) for kind, row in rows.taps.items()}
        self._loops[key] = Loop([bound], buffers, condition, work, slots)
        return self._loops[key]

    def heads(self, batch: int, sampling: Sampling) -> Heads:
        """Return the stages that look at crops, bound to a batch of crops that they take, and ready to run."""
        loop = self._plan if self._plan.result else None
        key = "heads", batch, sampling if loop else None
        self._unbind_stale()
        if key in self._heads:
            self._heads.move_to_end(key)
            return self._heads[key]
        self._make_room(self._heads)
        profiles: dict[StageName, int] = {}
        for name in self._on_crops:
            stage, shapes = self._stages[name], self._head_shapes(name, batch)
            profile = choose_profile(stage.built.profiles, shapes)
            assert profile is not None  # noqa: S101 — the caller has asked `takes_crops`
            profiles[name] = profile
            spans = {key: span.maximum for key, span in stage.built.profiles[profile].items()}
            rows = next(iter((shapes if stage.open_ended else spans).values()))[0]
            for spec in (*stage.built.inputs, *stage.built.outputs):
                self._buffers.get(self._buffer(name, spec), rows * math.prod(fixed_dims(spec)) * ITEM_BYTES[spec.dtype])
            if loop and name is loop.stage:
                state = shapes["y"], rows
        # Addresses only once all have asked: a buffer that two stages share moves when the second needs a larger one.
        sampler = self._crop_sampler(sampling, *state) if loop else None
        addresses: dict[StageName, dict[str, int]] = {}
        images: dict[Storage, int] = {}
        outputs: dict[tuple[StageName, TensorSpec], int] = {}
        for name in self._on_crops:
            built = self._stages[name].built
            specs = (*built.inputs, *built.outputs)
            mine = addresses[name] = {spec.name: self._buffers.get(self._buffer(name, spec), 0) for spec in specs}
            images |= {storage: mine[spec] for spec, storage in self._storage[name].items() if spec in _CROPS}
            outputs |= {(name, spec): mine[spec.name] for spec in built.outputs if spec.name not in self._inner}
        bound = self._bind(
            [(self._stages[n], profiles[n], self._head_shapes(n, batch), addresses[n]) for n in self._on_crops]
        )
        self._heads[key] = Heads(bound, images, outputs, sampler, self._work(key, bound, sampler))
        return self._heads[key]

    def _work(self, key: Hashable, bound: Sequence[BoundStage], sampler: SamplerBuffers | None) -> Work:
        """Return the stages in a row; or those before a loop, the steps of its own, and those after it."""
        launch = self._layer.launch

        def problem() -> str | None:
            return next((found for stage in bound if (found := stage.capture_problem())), None)

        def run(stages: Sequence[BoundStage]) -> None:
            for stage in stages:
                stage.enqueue()

        if sampler is None:
            return Work(key, lambda: run(bound), problem=problem)
        at = self._on_crops.index(self._plan.stage)
        first, advance = sampler.begin(), sampler.step()

        def begin() -> None:
            run(bound[:at])
            launch(first)

        def step() -> None:
            bound[at].enqueue()
            launch(advance)

        return Work(key, step, sampler.steps, begin, lambda: run(bound[at + 1 :]), problem)

    def release(self) -> None:
        """Free graphs, contexts and buffers; nothing may be running on them."""
        self._unbind()
        self._buffers.release()

    def _crop_sampler(self, sampling: Sampling, shape: Sequence[int], largest: int) -> SamplerBuffers:
        """Return the memory of a loop over states of crops, of which `largest` may come at a time."""
        m, loop, get = self._manifest, self._plan, self._buffers.get
        elements = math.prod(shape[1:])
        return self._sampler(
            sampling,
            sampling.rows(m.schedule, m.taps, m.kinds),
            self._storage[loop.stage]["y"],
            (shape[0], 1, 1, elements),
            (largest, elements),
            given=get(f"tensor {loop.start}", 0),
            share=get(f"tensor {loop.share}", 0),
        )

    def _buffer(self, name: StageName, spec: TensorSpec) -> str:
        """Return the name of the buffer for a tensor: what several stages read or write is one."""
        loop = self._plan
        if spec.name in _CROPS:
            return f"images {spec.dtype}"
        if loop.result and (spec.name == loop.result or (name is loop.stage and spec.name == "y")):
            return "state" if spec.dtype == "float32" else "y"
        if name is loop.stage and spec.name in {loop.scalar, "noise"}:
            return "noise" if spec.name == "noise" else "noise_level"
        return f"tensor {spec.name}" if spec.name in self._inner else f"{name}.{spec.name}"

    def _sampler(
        self,
        sampling: Sampling,
        rows: Rows,
        storage: Storage,
        shape: tuple[int, int, int, int],
        largest: Sequence[int],
        **more: Any,
    ) -> SamplerBuffers:
        """Return the memory of a loop over states of a shape (batch, planes, height, width), made for the largest."""
        batch, planes, height, width = shape
        size, get = math.prod(largest), self._buffers.get
        tapped = rows.tapped
        table = step_table(vars(rows.factors), tapped, rows.steps)
        state = get("state", size * _FLOAT)
        buffers = SamplerBuffers(
            storage,
            *(batch, height, width, len(table), rows.start),
            state=state,
            y=state if storage is Storage.F32 else get("y", size * storage.dtype.itemsize),
            noise=get("noise", size * storage.dtype.itemsize),
            noise_level=get("noise_level", largest[0] * _FLOAT),
            taps=get("taps", len(tapped) * size * _FLOAT) if tapped else 0,
            windows=get("windows", largest[0] * WINDOW.itemsize),
            table=get(f"steps of {sampling}", len(table) * STEP.itemsize),  # of its own: graphs read it again and again
            progress=get("progress", PROGRESS.itemsize),
            planes=planes,
            silent=rows.silent,
            clip=rows.clip,
            **more,
        )
        self._layer.upload(buffers.table, table)
        return buffers

    def _check_signatures(self) -> None:
        """Raise EngineError unless the engines can work on each other's memory and on that of the kernels."""
        loop, shared, results, levels = self._plan, defaultdict[str, set[str]](set), set[str](), set[str]()
        state = {"y", "noise", "condition"} if self.restores else {"y", "noise", loop.start, loop.share, loop.result}
        for name, stage in self._stages.items():
            for spec in (*stage.built.inputs, *stage.built.outputs):
                if name is loop.stage and spec.name == loop.scalar:
                    levels.add(spec.dtype)
                elif spec.name in state and (name is loop.stage or loop.result):
                    shared["state"].add(spec.dtype)
                elif spec.name in self._inner - _CROPS:
                    shared[spec.name].add(spec.dtype)
                elif spec in stage.built.outputs:
                    results.add(spec.dtype)
        if any(len(dtypes) > 1 for dtypes in shared.values()) or not levels <= {"float32"}:
            raise EngineError("the stages of this build do not agree on their types; build it again without --plan")
        if not results <= {"float32", "float16"}:
            raise EngineError(f"this build gives scores as {', '.join(sorted(results))}; build it again without --plan")

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

    def _make_room(self, kept: OrderedDict[Hashable, Any]) -> None:
        """Give up what was used longest ago, if there are as many as may be kept."""
        if len(kept) >= MAX_LOOPS:
            self._layer.synchronise()
            oldest, given_up = kept.popitem(last=False)
            self._graphs.forget(oldest)
            for stage in given_up.stages:
                stage.close()

    def _unbind(self) -> None:
        self._graphs.clear()
        made: list[Loop | Heads] = [*self._loops.values(), *self._heads.values()]
        self._loops.clear()
        self._heads.clear()
        for stage in (stage for one in made for stage in one.stages):
            stage.close()
        self._version = self._buffers.version


def fixed_dims(spec: TensorSpec) -> tuple[int, ...]:
    """Return the dimensions of a tensor but for its free ones."""
    return tuple(n for n in spec.shape if isinstance(n, int))


def _touched(name: StageName, loop: LoopPlan) -> set[str]:
    """Return the tensors of a stage that our kernels read or write; what a loop starts from is as its state."""
    of_loop = {"y", "noise"} if loop.result else {"y", "noise", "condition"}
    return _CROPS | of_loop if name is loop.stage else _CROPS


def _storages(stage: LoadedStage, touched: set[str]) -> dict[str, Storage]:
    """Return how a stage stores the tensors that our kernels read or write."""
    known = {"float32": Storage.F32, "float16": Storage.F16}
    specs = [spec for spec in (*stage.built.inputs, *stage.built.outputs) if spec.name in touched]
    if wrong := [spec for spec in specs if spec.dtype not in known]:
        raise EngineError(f"{wrong[0].name} of this build is {wrong[0].dtype}; build it again without --plan")
    return {spec.name: known[spec.dtype] for spec in specs}


def _unet_shapes(batch: int, height: int, width: int) -> Shapes:
    image = batch, 3, height, width
    return {"y": image, "condition": image, "noise_level": (batch, 1)}
