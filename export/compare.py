"""The one comparison of two forms of a stage: both run on the same random inputs, and every output is checked."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
import onnx

from ..engine.manifest import Check, EngineDirectory, Precision, Stage, StageName
from ..engine.pixels import to_plane
from ..errors import BackendError, ExportError, first_line
from ..runtime.executor import Call, StageRunner
from ..runtime.host.onnx_stage import OnnxRuntime, OnnxStage, make_session
from ..runtime.images import synthetic
from ..runtime.results import Options
from ..runtime.scorer import Scorer
from .precision import in_8_bits, rounded

FloatArray = npt.NDArray[np.float32]
Feed = Mapping[str, FloatArray]
Side = tuple[str, Sequence[FloatArray]]  # what messages call it, and its outputs

CAST_SEED = 20260101  # of the inputs on which a cast stage is compared with the original
# Largest error of a cast stage, of the largest value. Seeded networks reach 0.2 % and 1.2 %: more is not rounding.
CAST_TOLERANCE = {Precision.FP16: 0.05, Precision.BF16: 0.2}
# The same where a stage is in 8 bits. Rounding before a QuantizeLinear moves values to the next 8-bit number, 6 % away
# in fp8. Single places of a head's score map then differ by 13 to 35 % in the trained `mini`, the U-Net's answer by
# 5 to 14 %. 8 bits may differ from float32 by as much (`calibration/quantise.py`).
CAST_TOLERANCE_8_BITS = 0.5
# A head may answer 0 everywhere, its worst score. Rounding errors are then judged like those of a score this small.
SMALLEST = 0.01


def compare(
    stage: StageName,
    outputs: Iterable[str],
    feed: Feed,
    seed: int,
    reference: Side,
    candidate: Side,
    tolerance: Callable[[str, float], float],
    advice: str = "",
    *,
    accept: bool = False,
) -> tuple[Check, ...]:
    """Return a check for each output. `tolerance` gets the output's name and the reference's largest magnitude.

    Raises ExportError, which ends with `advice`, where shapes differ, values are not finite or, unless that is to be
    accepted, differ by more.
    """
    shapes = {name: value.shape for name, value in feed.items()}
    checks = []
    for output, want, have in zip(outputs, reference[1], candidate[1], strict=True):
        where = f"stage {stage}, output {output}, inputs {shapes}, seed {seed}"
        if have.shape != want.shape:
            raise ExportError(f"{where}: {candidate[0]} returns shape {have.shape}, {reference[0]} {want.shape}")
        if not np.isfinite(want).all():
            raise ExportError(f"{where}: {reference[0]} itself returns NaN or Inf; the weights are not usable")
        if not np.isfinite(have).all():
            raise ExportError(f"{where}: {candidate[0]} returns NaN or Inf{advice}")
        error = np.abs(have.astype(np.float64) - want)
        worst, largest = float(error.max()), float(np.abs(want).max())
        allowed = tolerance(output, largest)
        check = Check(output, shapes, seed, worst, float(error.mean()), largest, allowed)
        if not check.within and not accept:
            share = f"{worst / max(largest, SMALLEST):.2g} of the largest value"
            raise ExportError(
                f"{where}: {candidate[0]} differs from {reference[0]} by {worst:.3g} > {allowed:.3g}, {share}{advice}"
            )
        checks.append(check)
    return tuple(checks)


def compare_with_original(
    directory: EngineDirectory,
    stage: Stage,
    candidate: Path | bytes | Sequence[FloatArray],
    *,
    called: str,
    seed: int,
    allowed: float,
    advice: str,
    as_written: bool = False,
    feed: Feed | None = None,
) -> tuple[Check, ...]:
    """Compare another form of a stage with the engine's own. It may differ by `allowed` of the largest value.

    `candidate` is the other form, or what it has made of `feed`.
    """
    feed = feed or draw_inputs(directory, stage, seed)
    outputs = [spec.name for spec in stage.outputs]
    want = run_onnx(directory.file(stage.file), feed, as_written=as_written)
    have = run_onnx(candidate, feed, as_written=as_written) if isinstance(candidate, Path | bytes) else candidate

    def tolerance(_output: str, largest: float) -> float:
        return allowed * max(largest, SMALLEST)

    return compare(stage.name, outputs, feed, seed, ("the original", want), (called, have), tolerance, advice)


def compare_cast(
    directory: EngineDirectory, stage: Stage, typed: onnx.ModelProto, precision: Precision
) -> tuple[Check, ...]:
    """Compare a cast stage with the original. Raises ExportError if it differs by more than rounding explains.

    The original of a stage in 8 bits is in 8 bits too: the error is what casting the rest adds.
    """
    return compare_with_original(
        directory,
        stage,
        rounded(typed).SerializeToString(),
        called=f"its {precision} form",
        seed=CAST_SEED,
        allowed=CAST_TOLERANCE_8_BITS if in_8_bits(typed) else CAST_TOLERANCE[precision],
        advice="; build in another --precision, or give a --plan that keeps more nodes in float32",
        as_written=True,
    )


def run_onnx(model: Path | bytes, feed: Feed, *, as_written: bool = False) -> list[FloatArray]:
    """Run a stage once on the CPU and return all outputs. Raises ExportError if ONNX Runtime cannot."""
    name = model.name if isinstance(model, Path) else "the stage"
    try:
        session = make_session(model, OnnxRuntime(as_written=as_written), name)
        results: list[FloatArray] = session.run(None, dict(feed))
    except BackendError as exc:
        raise ExportError(str(exc)) from exc
    except Exception as exc:  # onnxruntime's exceptions share no base class
        raise ExportError(f"onnxruntime cannot run {name}: {first_line(exc)}") from exc
    return results


def draw_inputs(directory: EngineDirectory, stage: Stage, seed: int) -> dict[str, FloatArray]:
    """Return inputs like those of the real loop: its first and last noise level, pictures and their restorations.

    The pictures have detail at several scales. White noise would leave the ranges that 8 bits were calibrated for.
    """
    manifest = directory.manifest
    if manifest.flow.loop.result:
        return _seen_in_the_loop(directory, stage, seed)
    generator = np.random.default_rng([seed, list(StageName).index(stage.name)])
    names = [spec.name for spec in stage.inputs]
    crop, kinds = manifest.crop.size, len(manifest.kinds)
    if stage.name is StageName.UNET:
        condition = np.stack([_picture((seed, index), crop) for index in range(2)])
        level = manifest.schedule.coefficients.noise_level[[0, -1]].reshape(2, 1)
        weight = level.reshape(2, 1, 1, 1)
        y = condition * weight + generator.standard_normal(condition.shape) * np.sqrt(1 - weight**2)
        return {name: np.asarray(value, np.float32) for name, value in zip(names, (y, condition, level), strict=True)}
    picture = _picture(seed, crop)
    noise = np.linspace(0, 0.3, kinds).reshape(-1, 1, 1, 1)  # what the taps have left of it
    images = (picture + noise * generator.standard_normal((kinds, 3, crop, crop))).clip(-1, 1).astype(np.float32)
    if stage.name is StageName.VIT:
        return {names[0]: images}
    if stage.name is StageName.VDA:
        return {names[0]: images[None]}
    vit = manifest.stage(StageName.VIT)
    if vit is None:
        raise ExportError(f"stage {stage.name} reads what the ViT returns, and this engine has no ViT")
    (maps,) = run_onnx(directory.file(vit.file), {vit.inputs[0].name: images}, as_written=True)
    return {names[0]: maps[None]}


def _seen_in_the_loop(directory: EngineDirectory, stage: Stage, seed: int) -> dict[str, FloatArray]:
    """Score a picture, and return what the stage was given: at the first and the last step, or for two crops."""
    manifest, seen = directory.manifest, list[dict[str, FloatArray]]()
    loaded: dict[StageName, StageRunner] = {
        made.name: OnnxStage(directory.file(made.file), OnnxRuntime(as_written=True)) for made in manifest.stages
    }
    loaded[stage.name] = _Watched(loaded[stage.name], seen)
    side = 2 * manifest.crop.size
    with Scorer(manifest, loaded, backend="") as scorer:
        scorer.score(synthetic(seed, side, side), Options(crops=2))
    looped = stage.name is manifest.flow.loop.stage
    pair = (seen[0], seen[manifest.schedule.steps - 1 if looped else 1])
    return {name: np.concatenate([inputs[name] for inputs in pair]) for name in stage.takes}


class _Watched:
    """A stage that keeps what it is given."""

    def __init__(self, stage: StageRunner, seen: list[dict[str, FloatArray]]) -> None:
        self._stage, self._seen = stage, seen

    def bind(self, inputs: Mapping[str, FloatArray], outputs: Mapping[str, FloatArray]) -> Call:
        run = self._stage.bind(inputs, outputs)

        def call() -> None:
            self._seen.append({name: array.copy() for name, array in inputs.items()})
            run()

        return call


def _picture(seed: int | tuple[int, ...], side: int) -> FloatArray:
    return to_plane(synthetic(seed, side, side))
