"""The executor on the host: NumPy holds the images, stage runners run the networks."""

import contextlib
import queue
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial

import numpy as np

from ...engine.manifest import Manifest, Stage, StageName
from ...engine.noise import NoiseField
from ...engine.pixels import as_tapped, squash_planes
from ...engine.schedule import Kind
from ..executor import Branch, Cancelled, FloatArray, Outcome, Planes, Show, StageRunner, Task, Verdict, both, paste
from ..plan import Plan, Window
from .sampler import restore

_Watch = Callable[[], None]  # what happens before each step; it may raise Cancelled
_InCrop = tuple[Plan, int, int, _Watch]  # a plan, a seed, the crop's index


class HostExecutor:
    """Carries out plans. Several threads may do so at once; each uses its own workspace."""

    takes_pixels = False
    together = 1  # one image keeps the cores busy, and its score depends on no other
    queue_depth = 0

    def __init__(self, manifest: Manifest, stages: Mapping[StageName, StageRunner]) -> None:
        self._manifest, self._stages = manifest, stages
        self._idle: queue.LifoQueue[_Workspace] = queue.LifoQueue()

    def run(
        self,
        image: Planes,
        plan: Plan,
        seed: int,
        cancelled: Callable[[], bool] = lambda: False,
        *,
        pictures: bool = True,
        show: Show | None = None,
    ) -> Outcome:
        """Restore and score one image (3, height, width) in [-1, 1], or a pair: see `both`.

        Raises Cancelled soon after `cancelled()`.
        """
        start = time.perf_counter()
        seen, restored_from = both(image)
        height, width = plan.cut
        crops = np.empty((len(plan.crops), len(self._manifest.kinds), 3, height, width), np.float32)

        def watch(sight: tuple[Window, FloatArray] | None = None) -> None:
            if cancelled():
                raise Cancelled
            if show and sight:
                show(*sight)

        for index, crop in enumerate(() if plan.squashed else plan.crops):
            crops[index, 0] = seen[:, crop.top : crop.top + height, crop.left : crop.left + width]
        planes: dict[Kind, FloatArray] = {}
        with self._workspace() as work:
            if StageName.UNET in self._stages:
                planes = self._restore(work, restored_from, plan, seed, crops, watch)
            if plan.squashed:
                crops = np.stack([seen, *squash_planes(crops[0, 1:], plan.crop_size)])[None]
            verdicts = []
            for index, crop in enumerate(plan.crops):
                watch()
                verdicts.append(work.assess(crops[index], plan, seed, index, watch))
                if show:
                    show(Window(crop.top, crop.left, height, width), verdicts[-1].maps[0])
        return Outcome(tuple(verdicts), crops, planes, seconds=time.perf_counter() - start)

    def run_together(
        self,
        tasks: Sequence[Task],
        plan: Plan,
        cancelled: Callable[[], bool],
        *,
        pictures: bool = True,
        show: Show | None = None,
    ) -> list[Outcome]:
        """Restore and score one after the other."""
        return [self.run(image, plan, seed, cancelled, pictures=pictures, show=show) for image, seed in tasks]

    def close(self) -> None:
        """Drop the workspaces that no plan is using."""
        self._idle = queue.LifoQueue()

    def _restore(
        self,
        work: "_Workspace",
        image: FloatArray,
        plan: Plan,
        seed: int,
        crops: FloatArray,
        watch: Callable[[tuple[Window, FloatArray]], None],
    ) -> dict[Kind, FloatArray]:
        """Fill `crops[:, 1:]` from the restored windows. Return whole planes if they are cut from one window.

        Restorations take the form of the taps last, after tiles are blended: who trained heads on files saved whole
        images, so all that heads see here has the values that such files hold.
        """
        m = self._manifest
        rows = plan.sampling.rows(m.schedule, m.taps, m.kinds)
        below, right = plan.padded[0] - plan.height, plan.padded[1] - plan.width
        padded = np.pad(image, ((0, 0), (0, below), (0, right)), mode="reflect") if below or right else image
        crops[:, 1:] = 0
        shares = np.zeros((len(plan.crops), *plan.cut), np.float32)
        restored: dict[Kind, FloatArray] = {}
        for window in plan.windows:
            top, left = plan.noise_origin(window)
            field = NoiseField(
                seed, plan.noise_size, window=(window.height, window.width), top=top, left=left, lane=window.lane
            )
            denoiser = work.denoiser(window.height, window.width)
            denoiser.condition[:] = padded[
                :, window.top : window.top + window.height, window.left : window.left + window.width
            ]
            denoiser.watch = partial(watch, (window, denoiser.y))
            start = (denoiser.condition, *rows.image) if rows.image else None
            restored = restore(denoiser, field, rows, start)
            denoiser.watch()
            weight = plan.blend_weight(window)
            for index in plan.readers(window):
                paste(crops[index], shares[index], plan, index, window, restored, weight)
        planes: dict[Kind, FloatArray] = {}
        alone = plan.windows[0].height * plan.windows[0].width == plan.padded[0] * plan.padded[1]
        if alone and not plan.squashed:
            for kind, plane in restored.items():
                planes[kind] = as_tapped(plane[:, : plan.height, : plan.width], m.tap_form)
        else:
            np.divide(crops[:, 1:], shares[:, None, None], out=crops[:, 1:])
        as_tapped(crops[:, 1:], m.tap_form)
        return planes

    @contextlib.contextmanager
    def _workspace(self) -> Iterator["_Workspace"]:
        try:
            work = self._idle.get_nowait()
        except queue.Empty:
            work = _Workspace(self._manifest, self._stages)
        try:
            yield work
        finally:
            self._idle.put(work)


class BoundLoop:
    """The stage of a loop, bound to its state `y` and its answer `noise` (of `shape`), and to what else it reads."""

    def __init__(
        self, stage: StageRunner, shape: tuple[int, ...], scalar: str, others: Mapping[str, FloatArray]
    ) -> None:
        buffers = np.zeros((2, 1, *shape), np.float32)
        self.y, self.noise = buffers[:, 0]
        self.watch: _Watch = lambda: None
        self._scalar = np.zeros((1, 1), np.float32)
        # In the order of the stage's own inputs: a network in PyTorch takes them by place.
        self._call = stage.bind({"y": buffers[0], **others, scalar: self._scalar}, {"noise": buffers[1]})

    def __call__(self, scalar: float) -> None:
        """Predict the noise in `y`. Raises Cancelled when nobody wants the result any more."""
        self.watch()
        self._scalar[0, 0] = scalar
        self._call()


class BoundDenoiser(BoundLoop):
    """The U-Net bound to buffers of one size. `y`, `condition` and `noise` are (3, H, W)."""

    def __init__(self, stage: StageRunner, height: int, width: int) -> None:
        condition = np.zeros((1, 3, height, width), np.float32)
        self.condition = condition[0]
        super().__init__(stage, (3, height, width), "noise_level", {"condition": condition})


class _Workspace:
    """Buffers and bindings for one plan at a time: those of one crop, and the U-Net's for the last size.

    Stages run crop by crop, and windows run one by one: a score then never depends on the rest of a batch. One crop
    keeps two cores busy anyway.
    """

    def __init__(self, manifest: Manifest, stages: Mapping[StageName, StageRunner]) -> None:
        self._manifest, self._stages = manifest, stages
        kinds, size = len(manifest.kinds), manifest.crop.size
        self._images = np.zeros((1, kinds, 3, size, size), np.float32)
        # One crop's tensors by their names: what a stage returns, those after it read.
        self._tensors = {"images": self._images, "image": self._images[0], "crop": self._images[0]}
        self._outputs: dict[StageName, dict[str, FloatArray]] = {}
        self._calls: list[Callable[[_InCrop], None]] = []
        self._denoiser: BoundDenoiser | None = None
        described = {stage.name: stage for stage in manifest.stages}
        for name in (name for name in StageName if name in stages):
            if name is not manifest.flow.loop.stage:
                self._bind(described[name])
            elif manifest.flow.loop.result:
                self._bind_loop(described[name])

    def denoiser(self, height: int, width: int) -> BoundDenoiser:
        """Return the U-Net bound to this size, and drop the buffers of the size before."""
        if self._denoiser is None or self._denoiser.y.shape[1:] != (height, width):
            self._denoiser = None
            self._denoiser = BoundDenoiser(self._stages[StageName.UNET], height, width)
        return self._denoiser

    def assess(self, images: FloatArray, plan: Plan, seed: int, index: int, watch: _Watch) -> Verdict:
        """Score the (kinds, 3, size, size) images of one crop, whose noise is that of its index."""
        self._images[0] = images
        for call in self._calls:
            call((plan, seed, index, watch))
        flow = self._manifest.flow
        return Verdict(
            self._branch(StageName.VCG),
            self._branch(StageName.VDA),
            float(self._outputs[flow.score]["score"][0]) if flow.score else None,
            tuple(self._outputs[found.stage][found.output][0].copy() for found in flow.probabilities),
        )

    def _bind(self, stage: Stage) -> None:
        """Bind a stage that runs once for a crop. The kinds of a crop are one batch, or belong to one item of it."""
        sizes = {"B": 1, "N": len(self._manifest.kinds)}
        inputs = {spec.name: self._tensors[spec.name].reshape(spec.at(sizes)) for spec in stage.inputs}
        outputs = {spec.name: np.zeros(spec.at(sizes), np.float32) for spec in stage.outputs}
        run = self._stages[stage.name].bind(inputs, outputs)
        self._calls.append(lambda _crop: run())
        self._outputs[stage.name] = outputs
        self._tensors |= outputs

    def _bind_loop(self, stage: Stage) -> None:
        """Bind the stage that refines a state of the crop."""
        m, loop = self._manifest, self._manifest.flow.loop
        start, share = self._tensors[loop.start], self._tensors[loop.share]
        others = {name: self._tensors[name] for name in stage.takes if name not in {"y", loop.scalar}}
        bound = BoundLoop(self._stages[stage.name], start.shape[1:], loop.scalar, others)
        self._tensors[loop.result] = bound.y[None]

        def run(crop: _InCrop) -> None:
            plan, seed, lane, bound.watch = crop
            field = NoiseField(seed, (1, bound.y.size), lane=lane, planes=1)
            restore(bound, field, plan.sampling.rows(m.schedule, m.taps, m.kinds), (start[0], share[0], 1 - share[0]))

        self._calls.append(run)

    def _branch(self, name: StageName) -> Branch | None:
        if name not in self._outputs:
            return None
        out = self._outputs[name]
        return Branch(float(out["score"][0]), out["score_map"][0].copy(), out["weight_map"][0].copy())
