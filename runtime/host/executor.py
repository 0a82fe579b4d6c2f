"""The executor on the host: NumPy holds the images, stage runners run the networks."""

import contextlib
import queue
import time
from collections.abc import Callable, Iterator, Mapping, Sequence

import numpy as np

from ...engine.manifest import Manifest, StageName
from ...engine.noise import NoiseField
from ...engine.pixels import as_tapped, squash_planes
from ...engine.schedule import Kind
from ..executor import Branch, Call, Cancelled, FloatArray, Outcome, Planes, StageRunner, Task, Verdict, both, paste
from ..plan import Plan
from .sampler import restore


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
    ) -> Outcome:
        """Restore and score one image (3, height, width) in [-1, 1], or a pair: see `both`.

        Raises Cancelled soon after `cancelled()`.
        """
        start = time.perf_counter()
        seen, restored_from = both(image)
        height, width = plan.cut
        crops = np.empty((len(plan.crops), len(self._manifest.kinds), 3, height, width), np.float32)
        for index, crop in enumerate(() if plan.squashed else plan.crops):
            crops[index, 0] = seen[:, crop.top : crop.top + height, crop.left : crop.left + width]
        planes: dict[Kind, FloatArray] = {}
        with self._workspace() as work:
            if StageName.UNET in self._stages:
                planes = self._restore(work, restored_from, plan, seed, crops, cancelled)
            if plan.squashed:
                crops = np.stack([seen, *squash_planes(crops[0, 1:], plan.crop_size)])[None]
            verdicts = []
            for index in range(len(plan.crops)):
                if cancelled():
                    raise Cancelled
                verdicts.append(work.assess(crops[index]))
        return Outcome(tuple(verdicts), crops, planes, seconds=time.perf_counter() - start)

    def run_together(
        self, tasks: Sequence[Task], plan: Plan, cancelled: Callable[[], bool], *, pictures: bool = True
    ) -> list[Outcome]:
        """Restore and score one after the other."""
        return [self.run(image, plan, seed, cancelled, pictures=pictures) for image, seed in tasks]

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
        cancelled: Callable[[], bool],
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
            denoiser.cancelled = cancelled
            restored = restore(denoiser, field, rows)
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


class BoundDenoiser:
    """The U-Net bound to buffers of one size. `y`, `condition` and `noise` are (3, H, W)."""

    def __init__(self, stage: StageRunner, height: int, width: int) -> None:
        buffers = np.zeros((3, 1, 3, height, width), np.float32)
        self.y, self.condition, self.noise = buffers[:, 0]
        self.cancelled: Callable[[], bool] = lambda: False
        self._level = np.zeros((1, 1), np.float32)
        inputs = {"y": buffers[0], "condition": buffers[1], "noise_level": self._level}
        self._call = stage.bind(inputs, {"noise": buffers[2]})

    def __call__(self, noise_level: float) -> None:
        """Predict the noise in `y`. Raises Cancelled when nobody wants the result any more."""
        if self.cancelled():
            raise Cancelled
        self._level[0, 0] = noise_level
        self._call()


class _Workspace:
    """Buffers and bindings for one plan at a time: the heads' for one crop, the U-Net's for the last size.

    The heads run crop by crop, and windows run one by one: a score then never depends on the rest of a batch. One crop
    keeps two cores busy anyway.
    """

    def __init__(self, manifest: Manifest, stages: Mapping[StageName, StageRunner]) -> None:
        self._stages = stages
        kinds, size = len(manifest.kinds), manifest.crop.size
        self._images = np.zeros((1, kinds, 3, size, size), np.float32)
        self._calls: list[Call] = []
        self._verdicts: dict[StageName, dict[str, FloatArray]] = {}
        self._denoiser: BoundDenoiser | None = None
        if StageName.VIT in stages:
            maps = np.zeros(_sizes(manifest, StageName.VIT, "maps", kinds), np.float32)
            self._calls.append(stages[StageName.VIT].bind({"image": self._images[0]}, {"maps": maps}))
            self._bind_head(manifest, StageName.VCG, {"maps": maps[None]})
        if StageName.VDA in stages:
            self._bind_head(manifest, StageName.VDA, {"images": self._images})

    def denoiser(self, height: int, width: int) -> BoundDenoiser:
        """Return the U-Net bound to this size, and drop the buffers of the size before."""
        if self._denoiser is None or self._denoiser.y.shape[1:] != (height, width):
            self._denoiser = None
            self._denoiser = BoundDenoiser(self._stages[StageName.UNET], height, width)
        return self._denoiser

    def assess(self, images: FloatArray) -> Verdict:
        """Score the (kinds, 3, size, size) images of one crop."""
        self._images[0] = images
        for call in self._calls:
            call()
        return Verdict(self._branch(StageName.VCG), self._branch(StageName.VDA))

    def _bind_head(self, manifest: Manifest, name: StageName, inputs: dict[str, FloatArray]) -> None:
        outputs = {
            output: np.zeros(_sizes(manifest, name, output, 1), np.float32)
            for output in ("score", "score_map", "weight_map")
        }
        self._calls.append(self._stages[name].bind(inputs, outputs))
        self._verdicts[name] = outputs

    def _branch(self, name: StageName) -> Branch | None:
        if name not in self._verdicts:
            return None
        out = self._verdicts[name]
        return Branch(float(out["score"][0]), out["score_map"][0].copy(), out["weight_map"][0].copy())


def _sizes(manifest: Manifest, stage: StageName, output: str, batch: int) -> tuple[int, ...]:
    """Return the shape of a stage's output for a batch, from the manifest."""
    for found in manifest.stages:
        if found.name is stage:
            shape = next(spec.shape for spec in found.outputs if spec.name == output)
            return tuple(batch if isinstance(dim, str) else dim for dim in shape)
    raise KeyError(stage)
