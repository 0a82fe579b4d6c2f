"""How far a typed stage drifts from its float32 original on random inputs, through ONNX Runtime on the CPU."""

import numpy as np
import numpy.typing as npt
import onnx
import onnxruntime

from ..engine.manifest import Check, EngineDirectory, Precision, Stage, StageName
from ..engine.pixels import to_plane
from ..errors import ExportError
from ..runtime.host.onnx_stage import compute_as_written
from ..runtime.images import synthetic
from .precision import in_8_bits, rounded

FloatArray = npt.NDArray[np.float32]
SEED = 20260101
# Of the largest value. Seeded networks drift by 0.2 % and 1.2 % at most: beyond these, what is wrong is not rounding.
TOLERANCE = {Precision.FP16: 0.05, Precision.BF16: 0.2}
# Of stages in 8 bits: rounding before a QuantizeLinear moves values to the next 8-bit number, 6 % away in fp8. Single
# places of a head's score map then differ by 13 to 35 % in the trained `mini`, its U-Net's answer by 5 to 14 %. As much
# is allowed as between 8 bits and float32 (`calibration/quantise.py`).
TOLERANCE_8_BITS = 0.5
# A head may answer 0 everywhere, its worst score: rounding errors are then judged as those of a score this small.
SMALLEST = 0.01


def measure_drift(
    directory: EngineDirectory, stage: Stage, typed: onnx.ModelProto, precision: Precision
) -> tuple[Check, ...]:
    """Compare every output. Raises ExportError if one is not finite, or drifts beyond what rounding explains.

    Of a stage in 8 bits this is what casting the rest adds: its original is 8-bit too.
    """
    allowed = TOLERANCE_8_BITS if in_8_bits(typed) else TOLERANCE[precision]
    feed = draw_inputs(directory, stage, SEED)
    expected = _run(directory.file(stage.file).read_bytes(), feed)
    got = _run(rounded(typed).SerializeToString(), feed)
    shapes = {name: value.shape for name, value in feed.items()}
    checks = []
    for spec, want, have in zip(stage.outputs, expected, got, strict=True):
        error = np.abs(have.astype(np.float64) - want)
        largest = float(np.abs(want).max())
        scale = max(largest, SMALLEST)
        check = Check(
            output=spec.name,
            input_shapes=shapes,
            seed=SEED,
            max_abs_error=float(error.max()),
            mean_abs_error=float(error.mean()),
            max_abs_reference=largest,
            tolerance=allowed * scale,
        )
        if not check.max_abs_error <= check.tolerance:  # written so that NaN fails
            what = "is NaN or Inf" if not np.isfinite(have).all() else f"is off by {check.max_abs_error / scale:.1%}"
            raise ExportError(
                f"stage {stage.name}: in {precision}, output {spec.name} {what} (seed {SEED}); build in another "
                f"--precision, or with a --plan that keeps more nodes in float32"
            )
        checks.append(check)
    return tuple(checks)


def draw_inputs(directory: EngineDirectory, stage: Stage, seed: int) -> dict[str, FloatArray]:
    """Return inputs like those of the real loop: its first and last noise level, pictures and their restorations.

    The pictures have detail at several scales: 8 bits span what photographs gave rise to, and white noise goes past it.
    """
    manifest = directory.manifest
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
    noise = np.linspace(0, 0.3, kinds).reshape(-1, 1, 1, 1)  # what tapped states have left of it
    images = (picture + noise * generator.standard_normal((kinds, 3, crop, crop))).clip(-1, 1).astype(np.float32)
    if stage.name is StageName.VIT:
        return {names[0]: images}
    if stage.name is StageName.VDA:
        return {names[0]: images[None]}
    vit = manifest.stage(StageName.VIT)
    if vit is None:
        raise ExportError(f"stage {stage.name} is fed by the ViT, which this engine lacks")
    (maps,) = _run(directory.file(vit.file).read_bytes(), {vit.inputs[0].name: images})
    return {names[0]: maps[None]}


def _picture(seed: int | tuple[int, ...], side: int) -> FloatArray:
    return to_plane(synthetic(seed, side, side))


def _run(model: bytes, feed: dict[str, FloatArray]) -> list[FloatArray]:
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    compute_as_written(options)
    session = onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    outputs: list[FloatArray] = session.run(None, feed)
    return outputs
