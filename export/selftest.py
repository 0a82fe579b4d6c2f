"""The self-test that every engine carries: pictures, the float32 model's answers to them, tolerances."""

import base64
import io
import json
from pathlib import Path

import numpy as np
import PIL.Image

from ..engine.codec import encode
from ..engine.manifest import EngineDirectory, Manifest, StageName
from ..engine.sampling import fewest_steps
from ..runtime.host.onnx_stage import OnnxRuntime
from ..runtime.host.stages import load_stages
from ..runtime.results import Options
from ..runtime.scorer import Scorer
from ..runtime.selftest import SCHEMA, SELF_TEST, Picture, SelfTest, answer, read_picture

# Shares of the range of scores. PyTorch, ONNX Runtime and OpenVINO answer alike to 2e-6 on the trained `mini`; its
# emulated fp16 and bf16 forms are 2e-3 and 9e-3 away. A weight of a wrong sign or place moves an answer by 1e-4 to 1.
TOLERANCES = {"fp32": 1e-4, "fp16": 0.01, "bf16": 0.03, "int8": 0.05, "fp8": 0.05}
MARGIN = 4  # × what the engine's own stages are away from the model, on ONNX Runtime: other kernels round otherwise
# An engine in 8 bits may differ from its own answers by this, and by this share of what 8 bits moved them by. On `mini`
# they moved answers by 0.07, and OpenVINO's are up to 0.013 from ONNX Runtime's.
LEAST_8_BITS, SHARE_8_BITS = 0.005, 0.5
CHEAP = 4e11  # MACs; a second picture is added below this


def write_self_test(work: Path, manifest: Manifest, reference: Scorer, *, in_8_bits: str = "") -> None:
    """Write the self-test of the engine whose stages lie in the folder `work`. `reference` is the float32 model.

    `in_8_bits`: the precision, if stages compute in int8 or fp8. Such an engine is too far from the float32 model: it
    holds its own answers, on ONNX Runtime.
    """
    directory = EngineDirectory(work, manifest)
    stages = load_stages(directory, OnnxRuntime(as_written=in_8_bits == "fp8"))
    candidate = Scorer(manifest, stages, backend="onnxruntime")
    options = Options(crops=1, steps=fewest_steps(manifest.schedule, manifest.taps, manifest.kinds))
    span = manifest.score.nominal_maximum - manifest.score.minimum
    pictures, drift = [], 0.0
    for number in range(2 if 2 * _macs(manifest, options.steps or 0) < CHEAP else 1):
        png = _draw(number, manifest.crop.size)
        image = read_picture(png, manifest)
        expected, found = answer(reference, image, options), answer(candidate, image, options)
        pictures.append(Picture(png, found if in_8_bits else expected))
        drift = max([drift, *(abs(found[n] - value) / max(span, abs(value)) for n, value in expected.items())])
    more = LEAST_8_BITS + SHARE_8_BITS * drift if in_8_bits else MARGIN * drift
    tolerances = {name: value + more for name, value in TOLERANCES.items()}
    test = SelfTest(SCHEMA, manifest.engine_id, options.steps, span, tolerances, tuple(pictures))
    (work / SELF_TEST).write_text(json.dumps(encode(test), indent=1) + "\n", encoding="utf-8")


def _macs(manifest: Manifest, steps: int) -> int:
    """Return the work for one picture."""
    times = {StageName.UNET: steps, StageName.VIT: len(manifest.kinds)}
    return sum(stage.macs * times.get(stage.name, 1) for stage in manifest.stages)


def _draw(number: int, side: int) -> str:
    """Return a picture with detail at two scales and an edge, as PNG in base64: a few kilobytes."""
    generator = np.random.default_rng(number)
    plane = np.zeros((side, side, 3))
    for cell in (4, 32):
        coarse = generator.random((-(-side // cell), -(-side // cell), 3))
        plane += np.kron(coarse, np.ones((cell, cell, 1)))[:side, :side]
    plane[:, side // 3 * (1 + number) :] *= 0.6
    stream = io.BytesIO()
    PIL.Image.fromarray((plane / 2 * 255).astype(np.uint8)).save(stream, "PNG", optimize=True)
    return base64.b64encode(stream.getvalue()).decode()
