"""`mixed`: 8 bits in those stages alone that leave the score as it is, found by trying them on the calibration images.

How far 8 bits move a score cannot be read off ranges or single stages: what one stage loses, the loop may heal or
multiply. So stages are added one after the other, those with the most work first, and one that moves the score beyond
the limit stays float32.
"""

import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ..errors import UsageError
from ..runtime.manifest import EngineDirectory, Stage, StageName, open_engine
from ..runtime.onnx_backend import OnnxSettings
from ..runtime.results import Mode, Options
from ..runtime.scorer import Scorer, load_stages
from .quantise import Recipe, Target, quantise_engine

LIMIT = 0.01  # of the mean difference in score
MOST_IMAGES = 8  # each is scored once more for every stage
OPTIONS = Options(crops=1, mode=Mode.CROP)


@dataclass(frozen=True)
class Trial:
    """A stage in 8 bits, beside those taken before it: how far the score moved, and whether it stays so."""

    stage: StageName
    drift: float
    taken: bool


def choose_stages(
    path: Path,
    calibration: Path,
    images: Sequence[Path],
    recipe: Recipe,
    *,
    limit: float = LIMIT,
    progress: Callable[[StageName, str], None] = lambda stage, doing: None,
) -> list[Trial]:
    """Try the stages of the float32 engine `path`, quantised by the statistics in the folder `calibration`."""
    if recipe.target is not Target.ONNXRUNTIME:
        raise UsageError("mixed precision is found by running it, which takes int8 in the form of ONNX Runtime")
    with tempfile.TemporaryDirectory(prefix="iqa-mixed-") as folder:
        quantise_engine(path, Path(folder, "all"), calibration, recipe, progress=progress)
        whole, eight = open_engine(path), open_engine(Path(folder, "all"))
        settings = OnnxSettings()
        stages, candidates = load_stages(whole, settings), load_stages(eight, settings)
        chosen = images[:: max(1, len(images) // MOST_IMAGES)][:MOST_IMAGES]

        def scores() -> list[float]:
            scorer = Scorer(whole.manifest, stages, backend="mixed")
            return [scorer.score(image, OPTIONS).score for image in chosen]

        expected = scores()
        trials = []
        for stage in sorted(whole.manifest.stages, key=lambda stage: -_work(whole, stage)):
            progress(stage.name, "trying 8 bits")
            before, stages[stage.name] = stages[stage.name], candidates[stage.name]
            drift = float(np.abs(np.subtract(scores(), expected)).mean())
            trials.append(Trial(stage.name, drift, drift <= limit))
            if not trials[-1].taken:
                stages[stage.name] = before
    return trials


def _work(directory: EngineDirectory, stage: Stage) -> int:
    """Return a stage's MACs for one crop."""
    return stage.macs * (directory.manifest.schedule.steps if stage.name is StageName.UNET else 1)
