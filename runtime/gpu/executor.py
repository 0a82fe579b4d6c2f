"""Carrying out a plan on a device: the plans, taps, noise and results of `host.py`, with the images in its memory.

    pixels ─ normalise, pad ─▶ plane ─ cut windows ─▶ condition ─ noise, T × (U-Net, sampler step) ─▶ taps
    plane, taps ─ cut crops ─▶ crops of all kinds, float32 ─ a batch at a time ─▶ ViT ─▶ VCG, VDA ─▶ scores

Everything runs on one stream, so nothing is waited for before the scores, but for tiles; only images come in on a
second one, beside what runs for another thread. Memory that graphs know is sized by an engine's profile, unless that is
open-ended, the rest by the largest image so far; once both have been seen nothing is allocated.

`together` images of one size, or seeds of one image, share batches. An engine computes other last bits for another size
of batch, so all batches of an image then have the same size, whatever else is there: places left over repeat the last.

Left out: blending tiles on the device (copying and adding them on the host takes perhaps a tenth of the time of
restoring them: an estimate, not a measurement), and batches of images that differ in size.
"""

import contextlib
import math
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from ...engine.manifest import Manifest, StageName, TensorSpec
from ...engine.schedule import Kind
from ...errors import BackendError, EngineError, UsageError
from ...kernels.launch import (
    PROGRESS,
    STEP,
    WINDOW,
    SamplerBuffers,
    Storage,
    Window,
    crop_table,
    gather_crops,
    normalise_pad,
    source_table,
    step_table,
    window_table,
)
from ..executor import Branch, FloatArray, Outcome, Task, Verdict, paste
from ..plan import Plan
from ..plan import Window as PlanWindow
from ..results import Mode
from .graphs import Form, Graphs, Work
from .layer import ITEM_BYTES, Array, BoundStage, Bytes, DeviceMemoryError, Layer, LoadedStage, Shapes, choose_profile
from .memory import Dock, Pinned, Pool, round_up

HEADS = (StageName.VIT, StageName.VCG, StageName.VDA)  # in the order they run
MAX_LOOPS = 8  # sizes and batches of the U-Net that keep a context and a graph

_FLOAT = 4  # bytes
_CROP_ROWS = 256  # where the crops start in the table of a gather, behind its sources


class DeviceExecutor:
    """Runs plans on one device, one at a time; callers in other threads wait. `close()` frees the device.

    `rebuild` gives the command that makes a build for a size such as "512x400", and so many images, as well.
    """

    takes_pixels = True
    waiting = 1  # the pixels of one caller come in while another's are computed with

    def __init__(
        self,
        manifest: Manifest,
        layer: Layer,
        stages: Mapping[StageName, LoadedStage],
        *,
        form: Form = Form.LOOP,
        together: int = 1,
        rebuild: Callable[[str, int], str] = "iqa-build --sizes {} --batch {}".format,
    ) -> None:
        self._manifest, self._layer, self._stages, self._rebuild = manifest, layer, stages, rebuild
        self.graphs, self._asked = Graphs(layer, form), together
        self._lock = threading.Lock()  # of all that follows; a dock's own is taken before it
        self._closed = False
        self._fixed = Pool(layer)  # graphs hold its addresses
        self._images = Pool(layer)
        self._pinned = Pinned(layer)
        self._docks = Dock(layer), Dock(layer)  # the second is for who waits: a single caller has memory for one
        self._bound_version = 0  # of `_fixed`, when the bindings below were made
        self._loops: OrderedDict[tuple[int, int, int], _Loop] = OrderedDict()
        self._heads: dict[int, _Heads] = {}
        self._limit: int = max(max(self._crop_batches(name, "maximum")) for name in stages)
        self.together = min(together, self._limit)
        self._batch_in_use = 1
        self._memory_note: str | None = None
        steps = sorted({manifest.taps.step_of(kind) for kind in manifest.kinds[1:]})
        self._slots = {kind: steps.index(manifest.taps.step_of(kind)) for kind in manifest.kinds[1:]}
        self._steps = step_table(vars(manifest.schedule.coefficients), steps)
        self._storage = {name: _storages(stage) for name, stage in stages.items()}
        _check_signatures(stages)

    def run(
        self,
        image: FloatArray | Bytes,
        plan: Plan,
        seed: int,
        cancelled: Callable[[], bool] = lambda: False,
        *,
        pictures: bool = True,
    ) -> Outcome:
        """Restore and score one image: pixels (height, width, 3), or a plane (3, height, width) in [-1, 1].

        Without `pictures` the outcome has verdicts alone: its crops are empty and its planes none. Raises Cancelled
        before the next launch once `cancelled()`: a step, or where there is a graph, all of them. Raises
        DeviceMemoryError if not even one crop at a time fits.
        """
        (outcome,) = self.run_together([(image, seed)], plan, cancelled, pictures=pictures)
        return outcome

    def run_together(
        self,
        tasks: Sequence[Task],
        plan: Plan,
        cancelled: Callable[[], bool] = lambda: False,
        *,
        pictures: bool = True,
    ) -> list[Outcome]:
        """Restore and score images with their seeds, in batches; all are of the plan's size, none depends on others."""
        wanted = _Wanted(tasks, plan, cancelled, pictures)
        first, second = self._docks
        free = second if first.lock.locked() and not second.lock.locked() else first
        try:
            with free.lock:
                return self._attempt(free, wanted)
        except DeviceMemoryError:
            # An image that waits for its turn may be what the memory is full of: from here on nobody else has one.
            with second.lock, first.lock:
                second.release()
                return self._fewer(first, wanted)

    def _fewer(self, dock: Dock, wanted: "_Wanted") -> list[Outcome]:
        """Carry it out with fewer images at a time, then with smaller batches, which change the last bits."""
        try:
            return self._attempt(dock, wanted)
        except DeviceMemoryError:
            half = len(wanted.tasks) // 2
            if half == 0 and not self._shrink():
                raise
        parts = (wanted.tasks[:half], wanted.tasks[half:]) if half else (wanted.tasks,)
        return [outcome for tasks in parts for outcome in self._fewer(dock, replace(wanted, tasks=tasks))]

    def _attempt(self, dock: Dock, wanted: "_Wanted") -> list[Outcome]:
        """Carry it out, with a dock that the caller has locked; if memory runs out, all of it is given up."""
        images, size = [image for image, _ in wanted.tasks], _plane_size(wanted.plan)
        self._refuse_if_closed()
        self._layer.enter()
        try:
            dock.bring(images, size)
        except DeviceMemoryError:
            with self._lock:
                self._refuse_if_closed()
                self._settle()
                self._release()  # what larger images have left behind
            dock.release()
            dock.bring(images, size)
        with self._lock:
            self._refuse_if_closed()
            try:
                return self._run(dock, wanted)
            except DeviceMemoryError:
                self._settle()
                self._release()
                dock.release()
                raise
            except BaseException:
                self._settle()
                raise

    def close(self) -> None:
        """Free the engines and all memory, after what other threads have begun."""
        with self._lock:
            if self._closed:
                return
            self._closed = True
        with contextlib.suppress(BackendError):
            self._layer.enter()
        self._settle()
        with contextlib.suppress(BackendError):
            self._release()
        for dock in self._docks:
            with dock.lock, contextlib.suppress(BackendError):  # who has it finds out, and lets go
                dock.release()
        for stage in self._stages.values():
            stage.close()
        self._layer.close()

    def _refuse_if_closed(self) -> None:
        if self._closed:
            raise UsageError("this executor is closed")

    def _run(self, dock: Dock, wanted: "_Wanted") -> list[Outcome]:
        start = time.perf_counter()
        plan, seeds, pictures = wanted.plan, [seed for _, seed in wanted.tasks], wanted.pictures
        kinds, size, count = len(self._manifest.kinds), plan.crop_size, len(seeds) * len(plan.crops)
        padded = _plane_size(plan)
        self._batch_in_use = 1
        job = _Job(
            plan,
            seeds,
            wanted.cancelled,
            self._planes_of(dock, padded),
            padded,
            self._images.get("crops", count * self._crop_bytes(plan)),
            [self._memory_note] if self._memory_note else [],
        )
        planes: list[dict[Kind, FloatArray]] = [{} for _ in seeds]
        if StageName.UNET in self._stages:
            self._restore(job, planes if pictures else None)
        else:
            self._gather([job.plane], padded, job.places, len(seeds), job.crops, size)
        verdicts = self._assess(job)
        crops = np.empty((0, kinds, 3, size, size), np.float32)
        if pictures:
            crops = self._pinned.get("crops", (count, kinds, 3, size, size), np.dtype(np.float32))
            self._layer.download(crops, job.crops)
        self._layer.synchronise()
        found, each = verdicts(), len(plan.crops)
        seconds = (time.perf_counter() - start) / len(seeds)
        return [
            Outcome(
                found[i * each : (i + 1) * each],
                crops[i * each : (i + 1) * each].copy(),
                planes[i],
                tuple(dict.fromkeys(job.notes)),
                seconds,
            )
            for i in range(len(seeds))
        ]

    def _planes_of(self, dock: Dock, padded: tuple[int, int]) -> int:
        """Return the address of the images as planes (images, 3, *padded), float32, padded by reflection."""
        each = 3 * math.prod(padded) * _FLOAT
        planes = self._images.get("planes", len(dock.images) * each)
        for i, (address, size) in enumerate(dock.images):
            to = planes + i * each
            if size:
                self._layer.launch(normalise_pad(address, size, 3 * size[1], to, padded, Storage.F32))
            else:
                self._gather([address], padded, [(0, 0, 0)], 1, to, padded)
        return planes

    def _restore(self, job: "_Job", planes: Sequence[dict[Kind, FloatArray]] | None) -> None:
        """Fill the crops of all kinds, and `planes` of images that are one window."""
        plan, first = job.plan, job.plan.windows[0]
        height, width, size = first.height, first.width, plan.crop_size
        alone = height * width == math.prod(plan.padded)
        blend = _Blend(self, job) if plan.mode is not Mode.CROP and not alone else None
        if not any(self._unet_takes(n, height, width) for n in range(1, self._limit + 1)):
            raise BackendError(
                f"this build's U-Net takes no images of {width}×{height}; use tile or crop mode, or build again with: "
                f"{self._rebuild(f'{height}x{width}', self._asked)}"
            )
        windows = [(i, window) for i in range(len(job.seeds)) for window in plan.windows]
        batches = self._batches(len(windows), len(plan.windows), lambda n: self._unet_takes(n, height, width))
        if len(plan.windows) == 1 and batches[0].size < self._asked and not self._memory_note:
            job.notes.append(
                f"restored {batches[0].size} at a time, not {self._asked}: this build's U-Net takes no more images "
                f"of {width}×{height}; build again with: {self._rebuild(f'{height}x{width}', self._asked)}"
            )
        for batch in batches:
            members = [windows[i] for i in batch.members]
            loop = self._loop(batch.size, height, width)
            corners = [(i, window.top, window.left) for i, window in members]
            self._gather(
                [job.plane], job.size, corners, len(job.seeds), loop.condition, (height, width), loop.buffers.storage
            )
            noise = [
                Window(job.seeds[i], plan.noise_size, *plan.noise_origin(window), lane=window.lane)
                for i, window in members
            ]
            self._layer.upload(loop.buffers.windows, window_table(noise, (height, width)))
            self._launch(job, loop.work)
            taps = [loop.tap(slot) for slot in self._slots.values()]
            if blend:
                blend.add(members[: batch.used], loop)
            elif alone:
                given = job.plane + batch.start * 3 * math.prod(job.size) * _FLOAT
                out = job.crops + batch.start * len(plan.crops) * self._crop_bytes(plan)
                places = job.places[: batch.used * len(plan.crops)]
                self._gather([given, *taps], job.size, places, batch.used, out, size)
                if planes is not None:
                    self._take_planes(job, loop, planes[batch.start : batch.start + batch.used])
            else:
                dis = self._images.get("dis", batch.size * 3 * size**2 * _FLOAT)
                self._gather([job.plane], job.size, corners[: batch.used], len(job.seeds), dis, size)
                self._collect(job, dis, taps, batch)
        if blend:
            blend.finish()

    def _take_planes(self, job: "_Job", loop: "_Loop", planes: Sequence[dict[Kind, FloatArray]]) -> None:
        """Copy restored images, their padding cut off; waits, as the next batch needs the memory."""
        taps = self._download_taps(loop)
        self._layer.synchronise()
        for place, found in enumerate(planes):
            for kind, slot in self._slots.items():
                found[kind] = taps[slot, place, :, : job.plan.height, : job.plan.width].copy()

    def _download_taps(self, loop: "_Loop") -> FloatArray:
        """Return the taps (slots, batch, 3, height, width), there after `synchronise`."""
        b = loop.buffers
        shape = (len(set(self._slots.values())), b.batch, 3, b.height, b.width)
        taps = self._pinned.get("taps", shape, np.dtype(np.float32))
        self._layer.download(taps, b.taps)
        return taps

    def _collect(self, job: "_Job", dis: int, restored: Sequence[int], batch: "_Batch") -> None:
        """Put crops of all kinds together: `dis` and each of `restored` (batch, 3, size, size), in order of kinds."""
        size, out = job.plan.crop_size, job.crops + batch.start * self._crop_bytes(job.plan)
        places = [(i, 0, 0) for i in range(batch.used)]
        self._gather([dis, *restored], (size, size), places, batch.used, out, size)

    def _crop_bytes(self, plan: Plan) -> int:
        """Return the size of a crop of all kinds."""
        return len(self._manifest.kinds) * 3 * plan.crop_size**2 * _FLOAT

    def _assess(self, job: "_Job") -> Callable[[], tuple[Verdict, ...]]:
        """Score all crops; the verdicts can be asked for after `synchronise`."""
        kinds, size, each = len(self._manifest.kinds), job.plan.crop_size, len(job.plan.crops)
        count = len(job.seeds) * each
        landed: dict[tuple[StageName, str], Array] = {}
        for batch in self._batches(count, each, self._heads_take):
            heads = self._heads_of(batch.size)
            planes = [i * kinds + kind for i in batch.members for kind in range(kinds)]
            for storage, images in heads.images.items():
                places = [(plane, 0, 0) for plane in planes]
                self._gather([job.crops], (size, size), places, count * kinds, images, size, storage)
            self._launch(job, heads.work)
            for (stage, spec), address in heads.outputs.items():
                shape = (count, *_fixed_dims(spec))
                all_ = self._pinned.get(f"{stage}.{spec.name}", shape, np.dtype(spec.dtype))
                self._layer.download(all_[batch.start : batch.start + batch.used], address)
                landed[stage, spec.name] = all_

        def verdict(index: int) -> Verdict:
            return Verdict(*(_branch(landed, name, index) for name in (StageName.VCG, StageName.VDA)))

        return lambda: tuple(verdict(index) for index in range(count))

    def _launch(self, job: "_Job", work: Work) -> None:
        note = self.graphs.run(work, job.cancelled)
        if note:
            job.notes.append(note)

    def _gather(
        self,
        sources: Sequence[int],
        size: tuple[int, int],
        places: Sequence[tuple[int, int, int]],
        images: int,
        out: int,
        crop_size: int | tuple[int, int],
        storage: Storage = Storage.F32,
    ) -> None:
        """Cut crops out of float32 sources (images, 3, *size), at places (image, top, left)."""
        crop = (crop_size, crop_size) if isinstance(crop_size, int) else crop_size
        rows = crop_table(places, images, size, crop)
        # One table for all gathers: the stream reads it before the next one is copied over it.
        table = self._images.get("table", round_up(_CROP_ROWS + rows.nbytes, 4096))
        self._layer.upload(table, source_table([(address, Storage.F32) for address in sources]))
        self._layer.upload(table + _CROP_ROWS, rows)
        self._layer.launch(gather_crops(table, len(sources), size, table + _CROP_ROWS, len(places), out, crop, storage))

    def _batches(self, count: int, each: int, takes: Callable[[int], bool]) -> list["_Batch"]:
        """Split `count`, of which every image has `each`, into batches that engines take.

        One image alone goes into the largest that is full, else the smallest with room. Images that share batches go
        into one size, which depends on how many there may be, not on how many there are.
        """

        def size_for(wanted: int) -> int:
            for size in (*range(min(wanted, self._limit), 0, -1), *range(wanted + 1, self._limit + 1)):
                if takes(size):
                    return int(size)
            raise BackendError(f"no profile of this build takes a batch of {self._limit} or less")

        shared = size_for(self.together * each) if self.together > 1 else None
        batches, start = [], 0
        while start < count:
            size = shared or size_for(count - start)
            batches.append(_Batch(start, min(size, count - start), size))
            start += batches[-1].used
            self._batch_in_use = max(self._batch_in_use, size)
        return batches

    def _unet_takes(self, batch: int, height: int, width: int) -> bool:
        profiles = self._stages[StageName.UNET].built.profiles
        return choose_profile(profiles, _unet_shapes(batch, height, width)) is not None

    def _heads_take(self, batch: int) -> bool:
        return all(
            choose_profile(self._stages[name].built.profiles, self._head_shapes(name, batch)) is not None
            for name in HEADS
            if name in self._stages
        )

    def _crop_batches(self, name: StageName, bound: str) -> list[int]:
        """Return the "minimum" or "maximum" batch of every profile of a stage, in crops."""
        images = len(self._manifest.kinds) if name is StageName.VIT else 1  # per crop
        spans = [next(iter(profile.values())) for profile in self._stages[name].built.profiles]
        return [getattr(span, bound)[0] // images for span in spans]

    def _head_shapes(self, name: StageName, batch: int) -> Shapes:
        sizes = {"B": batch, "N": batch * len(self._manifest.kinds)}
        return {spec.name: spec.at(sizes) for spec in self._stages[name].built.inputs}

    def _loop(self, batch: int, height: int, width: int) -> "_Loop":
        """Return the loop for a batch of windows of one size, bound and ready to run."""
        key = batch, height, width
        self._unbind_stale()
        if key in self._loops:
            self._loops.move_to_end(key)
            return self._loops[key]
        if len(self._loops) >= MAX_LOOPS:
            self._layer.synchronise()
            oldest, loop = self._loops.popitem(last=False)
            self.graphs.forget(oldest)
            loop.stage.close()
        stage, storage = self._stages[StageName.UNET], self._storage[StageName.UNET]["y"]
        shapes = _unet_shapes(batch, height, width)
        profile = choose_profile(stage.built.profiles, shapes)
        assert profile is not None  # noqa: S101 — `_batches` has asked
        largest = shapes["y"] if stage.open_ended else stage.built.profiles[profile]["y"].maximum
        pixels, get = math.prod(largest), self._fixed.get
        state = get("state", pixels * _FLOAT)
        size = pixels * storage.dtype.itemsize
        buffers = SamplerBuffers(
            storage,
            *(batch, height, width, len(self._steps)),
            state=state,
            y=state if storage is Storage.F32 else get("y", size),
            noise=get("noise", size),
            noise_level=get("noise_level", largest[0] * _FLOAT),
            taps=get("taps", len(set(self._slots.values())) * pixels * _FLOAT),
            windows=get("windows", largest[0] * WINDOW.itemsize),
            table=get("steps", len(self._steps) * STEP.itemsize),
            progress=get("progress", PROGRESS.itemsize),
        )
        self._layer.upload(buffers.table, self._steps)
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

        # Steps and taps are the manifest's: one executor has one of each, so the key need not say them.
        work = Work(key, advance, buffers.steps, lambda: launch(begin), bound.capture_problem)
        self._loops[key] = _Loop(bound, buffers, condition, work)
        return self._loops[key]

    def _heads_of(self, batch: int) -> "_Heads":
        """Return the heads for a batch of crops, bound and ready to run."""
        self._unbind_stale()
        if batch in self._heads:
            return self._heads[batch]
        names = [name for name in HEADS if name in self._stages]
        profiles: dict[StageName, int] = {}
        for name in names:
            built, shapes = self._stages[name].built, self._head_shapes(name, batch)
            profile = choose_profile(built.profiles, shapes)
            assert profile is not None  # noqa: S101 — `_batches` has asked
            profiles[name] = profile
            spans = {key: span.maximum for key, span in built.profiles[profile].items()}
            rows = next(iter((shapes if self._stages[name].open_ended else spans).values()))[0]
            for spec in (*built.inputs, *built.outputs):
                self._fixed.get(_slot(name, spec), rows * math.prod(_fixed_dims(spec)) * ITEM_BYTES[spec.dtype])
        # Not before all have asked: a slot that two stages share moves when the second needs a larger one.
        addresses: dict[StageName, dict[str, int]] = {}
        images: dict[Storage, int] = {}
        outputs: dict[tuple[StageName, TensorSpec], int] = {}
        for name in names:
            built = self._stages[name].built
            specs = (*built.inputs, *built.outputs)
            mine = addresses[name] = {spec.name: self._fixed.get(_slot(name, spec), 0) for spec in specs}
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

        self._heads[batch] = _Heads(bound, images, outputs, Work(("heads", batch), score, problem=problem))
        return self._heads[batch]

    def _bind(self, wanted: Sequence[tuple[LoadedStage, int, Shapes, Mapping[str, int]]]) -> list[BoundStage]:
        """Bind stages and give them the one scratch memory that all share; older bindings go if it had to move."""
        with contextlib.ExitStack() as undo:
            bound = []
            for engine, profile, shapes, addresses in wanted:
                bound.append(engine.bind(profile, shapes, addresses))
                undo.callback(bound[-1].close)
            size = max(stage.activation_bytes for stage in bound)
            address = self._fixed.get("activation", size) if size else 0
            self._unbind_stale()
            for stage in bound:
                if size:
                    stage.use_activation(address, size)
            undo.pop_all()
        return bound

    def _unbind_stale(self) -> None:
        """Give up contexts and graphs made for addresses that are no more; the pool has waited for their work."""
        if self._bound_version != self._fixed.version:
            self._unbind()

    def _unbind(self) -> None:
        self.graphs.clear()
        bound = [loop.stage for loop in self._loops.values()]
        bound += [stage for heads in self._heads.values() for stage in heads.stages]
        self._loops.clear()
        self._heads.clear()
        for stage in bound:
            stage.close()
        self._bound_version = self._fixed.version

    def _settle(self) -> None:
        """After an interruption: no capture under way, nothing running that reads or writes our memory."""
        self._layer.abandon_capture()
        with contextlib.suppress(BackendError, MemoryError):  # whatever it is, the next call tells it again
            self._layer.synchronise()

    def _release(self) -> None:
        self._unbind()
        for pool in (self._fixed, self._images, self._pinned):
            pool.release()

    def _shrink(self) -> bool:
        """Allow half the batch that was too large; return False if there is no smaller one."""
        used = self._batch_in_use
        smallest = max(min(self._crop_batches(name, "minimum")) for name in self._stages)
        if used // 2 < smallest:
            return False
        self._limit = used // 2
        self._memory_note = (
            f"{self._layer.name} has no memory for {used} crops at a time: at most {self._limit} ran at once"
        )
        return True


@dataclass(frozen=True)
class _Wanted:
    """What `run_together` is asked for."""

    tasks: Sequence[Task]
    plan: Plan
    cancelled: Callable[[], bool]
    pictures: bool


@dataclass(frozen=True)
class _Batch:
    """`size` places for the `used` items from `start` on; what is left over repeats the last."""

    start: int
    used: int
    size: int

    @property
    def members(self) -> list[int]:
        return [self.start + min(i, self.used - 1) for i in range(self.size)]


@dataclass(frozen=True)
class _Job:
    """Images on their way, one for each seed, float32 on the device: `plane` (images, 3, *size), `crops` of all of them
    (crops, kinds, 3, crop, crop).
    """

    plan: Plan
    seeds: Sequence[int]
    cancelled: Callable[[], bool]
    plane: int
    size: tuple[int, int]
    crops: int
    notes: list[str]

    @property
    def places(self) -> list[tuple[int, int, int]]:
        """The places (image, top, left) of all crops."""
        return [(i, crop.top, crop.left) for i in range(len(self.seeds)) for crop in self.plan.crops]


@dataclass(frozen=True)
class _Loop:
    """The U-Net and the sampler on buffers of one size."""

    stage: BoundStage
    buffers: SamplerBuffers
    condition: int
    work: Work

    def tap(self, slot: int) -> int:
        """Return the address of a slot of the taps (batch, 3, height, width)."""
        b = self.buffers
        return b.taps + slot * b.batch * 3 * b.height * b.width * _FLOAT


@dataclass(frozen=True)
class _Heads:
    """ViT and heads on buffers for one batch of crops."""

    stages: list[BoundStage]
    images: dict[Storage, int]  # (batch, kinds, 3, crop, crop), in each storage that a stage reads
    outputs: dict[tuple[StageName, TensorSpec], int]
    work: Work


class _Blend:
    """Overlapping tiles on their way into crops. They are blended on the host, by the code that `host.py` uses."""

    def __init__(self, executor: DeviceExecutor, job: _Job) -> None:
        self._executor, self._job = executor, job
        count, size = len(job.places), job.plan.crop_size
        self._crops = np.zeros((count, len(executor._manifest.kinds), 3, size, size), np.float32)
        self._shares = np.zeros((count, size, size), np.float32)

    def add(self, tiles: Sequence[tuple[int, PlanWindow]], loop: _Loop) -> None:
        """Wait for the taps of some tiles, each of an image, and add them to the crops that read them."""
        executor, plan = self._executor, self._job.plan
        taps = executor._download_taps(loop)
        executor._layer.synchronise()
        for place, (image, window) in enumerate(tiles):
            restored = {kind: taps[slot, place] for kind, slot in executor._slots.items()}
            for index in plan.readers(window):
                number = image * len(plan.crops) + index
                at = self._crops[number], self._shares[number]
                paste(*at, plan, index, window, restored, plan.blend_weight(window))

    def finish(self) -> None:
        """Bring the blended crops to the device."""
        executor, job, (count, kinds, _, size, _) = self._executor, self._job, self._crops.shape
        np.divide(self._crops[:, 1:], self._shares[:, None, None], out=self._crops[:, 1:])
        pieces = executor._pinned.get("pieces", (kinds - 1, count, 3, size, size), np.dtype(np.float32))
        np.copyto(pieces, np.moveaxis(self._crops[:, 1:], 1, 0))
        address = executor._images.get("pieces", pieces.nbytes)
        executor._layer.upload(address, pieces)
        dis = executor._images.get("dis", count * 3 * size**2 * _FLOAT)
        executor._gather([job.plane], job.size, job.places, len(job.seeds), dis, size)
        restored = [address + kind * pieces[0].nbytes for kind in range(kinds - 1)]
        executor._collect(job, dis, restored, _Batch(0, count, count))


def _plane_size(plan: Plan) -> tuple[int, int]:
    return plan.padded[0], round_up(plan.padded[1], 4)  # crop mode and models without a U-Net pad nothing


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


_IMAGES = {"y", "condition", "noise", "image", "images"}


def _slot(name: StageName, spec: TensorSpec) -> str:
    """Return the memory of a head's tensor: its maps and images are one for all stages."""
    if spec.name in _IMAGES:
        return f"images {spec.dtype}"
    return spec.name if spec.name == "maps" else f"{name}.{spec.name}"


def _unet_shapes(batch: int, height: int, width: int) -> Shapes:
    image = batch, 3, height, width
    return {"y": image, "condition": image, "noise_level": (batch, 1)}


def _fixed_dims(spec: TensorSpec) -> tuple[int, ...]:
    return tuple(n for n in spec.shape if isinstance(n, int))


def _branch(landed: Mapping[tuple[StageName, str], Array], name: StageName, index: int) -> Branch | None:
    if (name, "score") not in landed:
        return None
    score, *maps = (landed[name, output][index] for output in ("score", "score_map", "weight_map"))
    return Branch(float(score), *(plane.astype(np.float32) for plane in maps))
