"""`mixed`: 8 bits in those stages only that keep the score, found by trying them on the calibration images.

Neither ranges nor single stages tell how far 8 bits change a score: the loop may correct or multiply the error of a
stage. So the stages become 8-bit one after the other, those with the most work first. A stage that changes the score
beyond the limit stays float32.
"""

import math
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from ..engine.manifest import EngineDirectory, Stage, StageName, open_engine
from ..errors import ExportError, UsageError
from ..runtime.host.onnx_stage import OnnxRuntime
from ..runtime.host.openvino_stage import OpenVino
from ..runtime.host.stages import load_stages
from ..runtime.plan import by_crops
from ..runtime.results import Mode, Options
from ..runtime.scorer import Scorer
from .quantise import Recipe, Target, read_fitting, write_stage

LIMIT = 0.01  # largest mean difference of scores
MOST_IMAGES = 8  # every stage scores each of them once more
OPTIONS = Options(crops=1, mode=Mode.CROP)


@dataclass(frozen=True)
class Trial:
    """One stage tried in 8 bits, together with those taken before it."""

    stage: StageName
    change: float  # mean difference of scores; infinite if its 8-bit form was refused before it was tried
    taken: bool
    why: str = ""  # the reason if its 8-bit form was refused


def choose_stages(
    path: Path,
    calibration: Path,
    images: Sequence[Path],
    recipe: Recipe,
    *,
    limit: float = LIMIT,
    say: Callable[[str], None] = lambda _text: None,
) -> list[Trial]:
    """Try the stages of the float32 engine `path`, quantised by the statistics in the folder `calibration`."""
    if recipe.target is Target.TENSORRT:
        raise UsageError("mixed precision runs what it tries: it takes int8 in the form of ONNX Runtime or OpenVINO")
    directory = open_engine(path)
    statistics = read_fitting(calibration, directory)
    settings = OpenVino() if recipe.target is Target.OPENVINO else OnnxRuntime()
    stages = load_stages(directory, settings)
    options = replace(OPTIONS, mode=by_crops(directory.manifest))
    chosen = images[:: max(1, len(images) // MOST_IMAGES)][:MOST_IMAGES]

    def scores() -> list[float]:
        scorer = Scorer(directory.manifest, stages, backend="mixed")
        return [scorer.score(image, options).score for image in chosen]

    expected = scores()
    trials = []
    with tempfile.TemporaryDirectory(prefix="iqa-mixed-") as folder:
        for stage in sorted(directory.manifest.stages, key=lambda stage: -_work(directory, stage)):
            file = Path(folder, f"{stage.name}.onnx")
            try:
                write_stage(directory, stage, statistics, recipe, file, say)
            except ExportError as exc:
                trials.append(Trial(stage.name, math.inf, taken=False, why=str(exc)))
                continue
            say(f"{stage.name}: trying 8 bits")
            before, stages[stage.name] = stages[stage.name], settings.load_stage(file, stage.name)
            change = float(np.abs(np.subtract(scores(), expected)).mean())
            trials.append(Trial(stage.name, change, change <= limit))
            if not trials[-1].taken:
                stages[stage.name] = before
    return trials


def _work(directory: EngineDirectory, stage: Stage) -> int:
    """Return a stage's MACs for one crop."""
    m = directory.manifest
    return stage.macs * (m.schedule.steps if stage.name is m.flow.loop.stage else 1)
