"""Carries out plans on a device: the results are those of `host/executor.py`, the images stay in device memory.

    pixels ─ normalise, pad ─▶ plane ─ cut windows ─▶ condition ─ noise, T × (U-Net, sampler step) ─▶ taps
    plane, taps ─ cut crops ─▶ crops of all kinds, float32 ─ a batch at a time ─▶ stages that look at crops ─▶ scores

The stages that look at crops may have a loop among them, over a state of each crop: the same kernels walk it.

Everything runs on one stream. The host waits for scores, restored images and tiles, and for nothing else. Images come
in on a second stream while the device computes for another thread. `bindings.py` has the buffers whose addresses a CUDA
graph holds; all others are as large as the largest image so far needed. Sizes that were seen before allocate nothing.

`together` images of one size, or seeds of one image, share batches. An engine computes other last bits for another size
of batch. So all batches of an image have one size, whatever shares them; a half-full batch repeats its last item.

Left out: batches of images that differ in size, and blending tiles on the device. To copy and add them on the host
takes perhaps a tenth of the time of restoring them (an estimate, not a measurement).
"""

import contextlib
import math
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from ...engine.manifest import Manifest, StageName
from ...engine.pixels import TapForm, as_tapped, squash_planes, to_plane
from ...engine.schedule import Kind
from ...errors import BackendError, UsageError
from ...kernels.launch import Storage, Window, crop_table, gather_crops, normalise_pad, source_table, window_table
from ..executor import Branch, FloatArray, Outcome, Task, Verdict, both, paste
from ..plan import Plan
from ..plan import Window as PlanWindow
from ..results import Mode
from .bindings import Bindings, Loop, fixed_dims
from .graphs import Form, Graphs, Work
from .layer import Array, Bytes, DeviceMemoryError, Layer, LoadedStage
from .memory import Dock, Pinned, Pool, round_up

_FLOAT = 4  # bytes
_CROP_ROWS = 256  # where the crops start in the table of a gather, behind its sources


class DeviceExecutor:
    """Runs plans on one device, one at a time; callers in other threads wait. `close()` frees the device.

    `form` says what a CUDA graph holds. `rebuild` takes a size such as "512x400" and a number of images; it returns the
    command for a build that takes these too.
    """

    takes_pixels = True
    queue_depth = 1  # one caller's pixels come in while the device computes with another's

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
        self._lock = threading.Lock()  # of all below; take a dock's lock first, then this one
        self._closed = False
        self._images = Pool(layer)
        self._pinned = Pinned(layer)
        self._docks = Dock(layer), Dock(layer)  # a single caller uses the first alone
        self._bindings = Bindings(manifest, layer, stages, self.graphs)
        self._limit = self._bindings.largest_batch
        self.together = min(together, self._limit)
        self._batch_in_use = 1
        self._memory_note: str | None = None

    def run(
        self,
        image: FloatArray | Bytes | tuple[FloatArray | Bytes, FloatArray | Bytes],
        plan: Plan,
        seed: int,
        cancelled: Callable[[], bool] = lambda: False,
        *,
        pictures: bool = True,
        form: Form | None = None,
    ) -> Outcome:
        """Restore and score one image: pixels (height, width, 3), or a plane (3, height, width) in [-1, 1]; or a pair.

        Without `pictures` the outcome has verdicts alone: its crops are empty and its planes none. `form` replaces the
        executor's for this run. Raises Cancelled before the next launch once `cancelled()`: a step, or where there is a
        graph, all of them. Raises DeviceMemoryError if not even one crop at a time fits.
        """
        (outcome,) = self.run_together([(image, seed)], plan, cancelled, pictures=pictures, form=form)
        return outcome

    def run_together(
        self,
        tasks: Sequence[Task],
        plan: Plan,
        cancelled: Callable[[], bool] = lambda: False,
        *,
        pictures: bool = True,
        form: Form | None = None,
    ) -> list[Outcome]:
        """Restore and score images of the plan's size, each with a seed, in batches. No result depends on another."""
        job = _Job(tasks, plan, cancelled, pictures, form)
        first, second = self._docks
        free = second if first.lock.locked() and not second.lock.locked() else first
        try:
            with free.lock:
                return self._attempt(free, job)
        except DeviceMemoryError:
            # Another caller's image may be what fills the memory. With both locks held there is none.
            with second.lock, first.lock:
                second.release()
                return self._fewer(first, job)

    def _fewer(self, dock: Dock, job: "_Job") -> list[Outcome]:
        """Carry it out with fewer images at a time; then with smaller batches, which change the last bits."""
        try:
            return self._attempt(dock, job)
        except DeviceMemoryError:
            half = len(job.tasks) // 2
            if half == 0 and not self._shrink():
                raise
        parts = (job.tasks[:half], job.tasks[half:]) if half else (job.tasks,)
        return [outcome for tasks in parts for outcome in self._fewer(dock, replace(job, tasks=tasks))]

    def _attempt(self, dock: Dock, job: "_Job") -> list[Outcome]:
        """Carry it out with a dock that the caller has locked. Where memory runs out, give all of it up and raise."""
        images = job.images
        self._refuse_if_closed()
        self._layer.enter()
        try:
            dock.bring(images, job.size)
        except DeviceMemoryError:
            with self._lock:
                self._refuse_if_closed()
                self._give_up_memory(dock)  # larger images have left it behind
            dock.bring(images, job.size)
        with self._lock:
            self._refuse_if_closed()
            try:
                return self._run(dock, job)
            except DeviceMemoryError:
                self._give_up_memory(dock)
                raise
            except BaseException:
                self._settle()
                raise

    def close(self) -> None:
        """Free the engines and all memory, once the runs that other threads have begun are over."""
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
            with (
                dock.lock,
                contextlib.suppress(BackendError),
            ):  # its holder sees that the executor is closed, and lets go
                dock.release()
        for stage in self._stages.values():
            stage.close()
        self._layer.close()

    def _refuse_if_closed(self) -> None:
        if self._closed:
            raise UsageError("this executor is closed")

    def _run(self, dock: Dock, job: "_Job") -> list[Outcome]:
        start = time.perf_counter()
        images, each = len(job.tasks), len(job.plan.crops)
        kinds, size, count = len(self._manifest.kinds), job.plan.crop_size, images * each
        self._batch_in_use = 1
        planes_from = self._planes_of(dock, job.size)
        # Behind those to restore stand those to look at, if they are others.
        others = len(dock.images) - images
        job = replace(
            job,
            condition=planes_from,
            plane=planes_from + others * 3 * math.prod(job.size) * _FLOAT,
            crops=self._images.get("crops", count * self._crop_bytes(job.plan)),
            notes=[self._memory_note] if self._memory_note else [],
        )
        planes: list[dict[Kind, FloatArray]] = [{} for _ in job.tasks]
        if self._bindings.restores:
            self._restore(job, planes if job.pictures else None)
        else:
            self._gather([job.plane], job.size, job.places, images, job.crops, size)
        verdicts = self._assess(job)
        crops = np.empty((0, kinds, 3, size, size), np.float32)
        if job.pictures:
            crops = self._pinned.get("crops", (count, kinds, 3, size, size), np.dtype(np.float32))
            self._layer.download(crops, job.crops)
        self._layer.synchronise()
        found, seconds = verdicts(), (time.perf_counter() - start) / images
        return [
            Outcome(
                found[i * each : (i + 1) * each],
                crops[i * each : (i + 1) * each].copy(),
                planes[i],
                tuple(dict.fromkeys(job.notes)),
                seconds,
            )
            for i in range(images)
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
        on_host = plan.squashed or (plan.mode is not Mode.CROP and not alone)
        blend = _Blend(plan, len(job.tasks), len(self._manifest.kinds)) if on_host else None
        if not any(self._bindings.takes_windows(n, height, width) for n in range(1, self._limit + 1)):
            raise BackendError(
                f"this build's U-Net takes no images of {width}×{height}; use tile or crop mode, or build again with: "
                f"{self._rebuild(f'{height}x{width}', self._asked)}"
            )
        windows = [(i, window) for i in range(len(job.tasks)) for window in plan.windows]
        batches = self._batches(
            len(windows), len(plan.windows), lambda n: self._bindings.takes_windows(n, height, width)
        )
        if len(plan.windows) == 1 and batches[0].size < self._asked and not self._memory_note:
            job.notes.append(
                f"restored {batches[0].size} at a time, not {self._asked}: this build's U-Net takes no more images "
                f"of {width}×{height}; build again with: {self._rebuild(f'{height}x{width}', self._asked)}"
            )
        for batch in batches:
            members = [windows[i] for i in batch.members]
            loop = self._bindings.loop(batch.size, height, width, plan.sampling)
            corners = [(i, window.top, window.left) for i, window in members]
            self._gather(
                [job.condition],
                job.size,
                corners,
                len(job.tasks),
                loop.condition,
                (height, width),
                loop.buffers.storage,
            )
            noise = [
                Window(job.tasks[i][1], plan.noise_size, *plan.noise_origin(window), lane=window.lane)
                for i, window in members
            ]
            self._layer.upload(loop.buffers.windows, window_table(noise, (height, width)))
            self._launch(job, loop.work)
            if blend:
                blend.add(members[: batch.used], self._download_restored(loop))
            elif alone:
                given = job.plane + batch.start * 3 * math.prod(job.size) * _FLOAT
                out = job.crops + batch.start * len(plan.crops) * self._crop_bytes(plan)
                places = job.places[: batch.used * len(plan.crops)]
                self._gather([given, *loop.taps], job.size, places, batch.used, out, size, form=self._manifest.tap_form)
                if planes is not None:
                    self._take_planes(job, loop, planes[batch.start : batch.start + batch.used])
            else:
                dis = self._images.get("dis", batch.size * 3 * size**2 * _FLOAT)
                self._gather([job.plane], job.size, corners[: batch.used], len(job.tasks), dis, size)
                self._collect(job, dis, loop.taps, batch)
        if blend:
            (self._take_squashed if plan.squashed else self._take_blended)(job, blend.finish())

    def _take_planes(self, job: "_Job", loop: Loop, planes: Sequence[dict[Kind, FloatArray]]) -> None:
        """Copy restored images, their padding cut off."""
        for kind, restored in self._download_restored(loop).items():
            for place, found in enumerate(planes):
                plane = restored[place, :, : job.plan.height, : job.plan.width].copy()
                found[kind] = as_tapped(plane, self._manifest.tap_form)

    def _download_restored(self, loop: Loop) -> dict[Kind, FloatArray]:
        """Wait for a loop and return each restored kind (batch, 3, height, width); the next call overwrites them."""
        taps = self._pinned.get("taps", loop.taps_shape, np.dtype(np.float32))
        self._layer.download(taps, loop.buffers.taps)
        self._layer.synchronise()
        return {kind: taps[slot] for kind, slot in loop.slots.items()}

    def _take_blended(self, job: "_Job", restored: FloatArray) -> None:
        """Bring blended crops (kinds - 1, crops, 3, size, size) to the device, and put them beside those as given."""
        size, count = job.plan.crop_size, len(job.places)
        pieces = self._pinned.get("pieces", restored.shape, restored.dtype)
        np.copyto(pieces, restored)
        address = self._images.get("pieces", pieces.nbytes)
        self._layer.upload(address, pieces)
        dis = self._images.get("dis", count * 3 * size**2 * _FLOAT)
        self._gather([job.plane], job.size, job.places, len(job.tasks), dis, size)
        addresses = [address + kind * pieces[0].nbytes for kind in range(len(pieces))]
        self._collect(job, dis, addresses, _Batch(0, count, count))

    def _take_squashed(self, job: "_Job", restored: FloatArray) -> None:
        """Squash restorations (kinds - 1, images, 3, height, width), and upload them beside the squashed images."""
        seen = [both(image)[0] for image, _ in job.tasks]
        planes = [to_plane(image) if image.dtype == np.uint8 else image for image in seen]
        small = (squash_planes(kind, job.plan.crop_size) for kind in as_tapped(restored, self._manifest.tap_form))
        self._layer.upload(job.crops, np.stack([planes, *small], axis=1))

    def _collect(self, job: "_Job", dis: int, restored: Sequence[int], batch: "_Batch") -> None:
        """Put crops of all kinds together: `dis` and each of `restored` (batch, 3, size, size), in order of kinds."""
        size, out = job.plan.crop_size, job.crops + batch.start * self._crop_bytes(job.plan)
        places = [(i, 0, 0) for i in range(batch.used)]
        self._gather([dis, *restored], (size, size), places, batch.used, out, size, form=self._manifest.tap_form)

    def _crop_bytes(self, plan: Plan) -> int:
        """Return the size of a crop of all kinds."""
        return len(self._manifest.kinds) * 3 * plan.crop_size**2 * _FLOAT

    def _assess(self, job: "_Job") -> Callable[[], tuple[Verdict, ...]]:
        """Score all crops; the verdicts can be asked for after `synchronise`."""
        kinds, size, each = len(self._manifest.kinds), job.plan.crop_size, len(job.plan.crops)
        count = len(job.tasks) * each
        landed: dict[StageName, dict[str, Array]] = {}
        for batch in self._batches(count, each, self._bindings.takes_crops):
            heads = self._bindings.heads(batch.size, job.plan.sampling)
            planes = [i * kinds + kind for i in batch.members for kind in range(kinds)]
            for storage, images in heads.images.items():
                places = [(plane, 0, 0) for plane in planes]
                self._gather([job.crops], (size, size), places, count * kinds, images, size, storage)
            if heads.sampler:
                state = heads.sampler.height, heads.sampler.width
                noise = [Window(job.tasks[i // each][1], state, lane=i % each) for i in batch.members]
                self._layer.upload(heads.sampler.windows, window_table(noise, state))
            self._launch(job, heads.work)
            for (stage, spec), address in heads.outputs.items():
                shape = (count, *fixed_dims(spec))
                all_ = self._pinned.get(f"{stage}.{spec.name}", shape, np.dtype(spec.dtype))
                self._layer.download(all_[batch.start : batch.start + batch.used], address)
                landed.setdefault(stage, {})[spec.name] = all_

        return lambda: tuple(self._verdict(landed, index) for index in range(count))

    def _verdict(self, landed: Mapping[StageName, Mapping[str, Array]], index: int) -> Verdict:
        flow = self._manifest.flow
        return Verdict(
            _branch(landed.get(StageName.VCG), index),
            _branch(landed.get(StageName.VDA), index),
            float(landed[flow.score]["score"][index]) if flow.score else None,
            tuple(landed[found.stage][found.output][index].astype(np.float32) for found in flow.probabilities),
        )

    def _launch(self, job: "_Job", work: Work) -> None:
        note = self.graphs.run(work, job.cancelled, job.form)
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
        form: TapForm = TapForm.FLOAT,
    ) -> None:
        """Cut crops out of float32 sources (images, 3, *size), at places (image, top, left).

        All sources but the first take the `form`: they are restorations.
        """
        crop = (crop_size, crop_size) if isinstance(crop_size, int) else crop_size
        rows = crop_table(places, images, size, crop)
        # One table serves all gathers: the stream reads it before it copies the next one there.
        table = self._images.get("table", round_up(_CROP_ROWS + rows.nbytes, 4096))
        self._layer.upload(table, source_table([(address, Storage.F32) for address in sources], form))
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

    def _settle(self) -> None:
        """End what an interruption left: a capture, and work that reads or writes our memory."""
        self._layer.abandon_capture()
        with contextlib.suppress(BackendError, MemoryError):  # the next call raises it again
            self._layer.synchronise()

    def _give_up_memory(self, dock: Dock) -> None:
        """Free all that can be had again, and let other libraries on this device have it."""
        self._settle()
        self._release()
        dock.release()
        with contextlib.suppress(BackendError):
            self._layer.trim()

    def _release(self) -> None:
        self._bindings.release()
        self._images.release()
        self._pinned.release()

    def _shrink(self) -> bool:
        """From now on allow half the batch that was too large; return False if no stage takes a smaller one."""
        used = self._batch_in_use
        if used // 2 < self._bindings.smallest_batch:
            return False
        self._limit = used // 2
        self._memory_note = (
            f"{self._layer.name} has no memory for {used} crops at a time: at most {self._limit} ran at once"
        )
        return True


@dataclass(frozen=True)
class _Batch:
    """`size` places for the `used` items from `start` on; the places left over repeat the last item."""

    start: int
    used: int
    size: int

    @property
    def members(self) -> list[int]:
        return [self.start + min(i, self.used - 1) for i in range(self.size)]


@dataclass(frozen=True)
class _Job:
    """What `run_together` is asked for and, once its images are on the device, where: float32, `condition` and `plane`
    (images, 3, *size), and `crops` of all of them (crops, kinds, 3, crop, crop).
    """

    tasks: Sequence[Task]
    plan: Plan
    cancelled: Callable[[], bool]
    pictures: bool
    form: Form | None
    condition: int = 0  # what the U-Net restores
    plane: int = 0  # what the heads see
    crops: int = 0
    notes: list[str] = field(default_factory=list)

    @property
    def images(self) -> list[Any]:
        """What the device needs: images to restore, then those to look at if they are others and not squashed."""
        seen, restored_from = zip(*(both(image) for image, _ in self.tasks), strict=True)
        alike = all(a is b for a, b in zip(seen, restored_from, strict=True))
        return [*restored_from, *(() if alike or self.plan.squashed else seen)]

    @property
    def size(self) -> tuple[int, int]:
        return self.plan.padded[0], round_up(self.plan.padded[1], 4)  # crop mode, models without a U-Net pad nothing

    @property
    def places(self) -> list[tuple[int, int, int]]:
        """The places (image, top, left) of all crops."""
        return [(i, crop.top, crop.left) for i in range(len(self.tasks)) for crop in self.plan.crops]


class _Blend:
    """Tiles, or images to squash, on their way into crops: on the host, by the code that `host/executor.py` uses."""

    def __init__(self, plan: Plan, images: int, kinds: int) -> None:
        self._plan = plan
        self._crops = np.zeros((images * len(plan.crops), kinds, 3, *plan.cut), np.float32)
        self._shares = np.zeros((images * len(plan.crops), *plan.cut), np.float32)

    def add(self, tiles: Sequence[tuple[int, PlanWindow]], restored: Mapping[Kind, FloatArray]) -> None:
        """Add tiles, each of an image, to the crops that read them; each kind is (tiles, 3, height, width)."""
        for place, (image, window) in enumerate(tiles):
            here = {kind: planes[place] for kind, planes in restored.items()}
            for index in self._plan.readers(window):
                number = image * len(self._plan.crops) + index
                at = self._crops[number], self._shares[number]
                paste(*at, self._plan, index, window, here, self._plan.blend_weight(window))

    def finish(self) -> FloatArray:
        """Return the restored kinds of all crops (kinds - 1, crops, 3, height, width)."""
        np.divide(self._crops[:, 1:], self._shares[:, None, None], out=self._crops[:, 1:])
        return np.moveaxis(self._crops[:, 1:], 1, 0)


def _branch(landed: Mapping[str, Array] | None, index: int) -> Branch | None:
    if landed is None:
        return None
    score, *maps = (landed[output][index] for output in ("score", "score_map", "weight_map"))
    return Branch(float(score), *(plane.astype(np.float32) for plane in maps))
