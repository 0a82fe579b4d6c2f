"""Calibrate and quantise as functions: the commands of the same names parse, call one of these and print.

>>> import diffiqa
>>> diffiqa.calibrate("engine/", "photos/").statistics.digest
>>> diffiqa.quantise("engine/", "engine-int8/").manifest.engine_id
"""

import contextlib
import math
import tempfile
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from ..engine.atomic import check_folder_of, writing
from ..engine.manifest import Manifest, StageName, open_engine, read_manifest
from ..errors import UsageError, member
from ..evaluation.charts import require_matplotlib
from ..export.engine import check_target, export_engine
from ..runtime.inputs import Images, find_images
from .mixed import LIMIT, Trial, choose_stages
from .pictures import draw
from .quantise import QuantisedStage, Recipe, quantise_engine
from .ranges import Method
from .statistics import NAME, Skipped, Statistics, collect
from .statistics import fp16_plan as make_fp16_plan
from .steps import FittedSteps, draw_steps, find_steps

if TYPE_CHECKING:
    from ..model.checkpoint import Loaded
    from ..model.pfd.checkpoint import LoadedPfd


@dataclass(frozen=True)
class Calibrated:
    """The statistics in a folder, and the images that could not be read."""

    folder: Path
    statistics: Statistics
    skipped: tuple[Skipped, ...]


@dataclass(frozen=True)
class Quantised:
    """A quantised engine: its stages in 8 bits, the trials of `mixed`, and the images that could not be read.

    `made_up`: it was calibrated on made-up pictures, for want of others.
    """

    manifest: Manifest
    stages: tuple[QuantisedStage, ...]
    trials: tuple[Trial, ...]
    skipped: tuple[Skipped, ...]
    made_up: bool = False


def calibrate(
    engine: Path | str,
    images: Images = (),
    *,
    output: Path | str | None = None,
    seed: int = 0,
    crops: int = 1,
    fp16_plan: Path | str | None = None,
    plot: Path | str | None = None,
    say: Callable[[str], None] = lambda _text: None,
) -> Calibrated:
    """Record ranges and histograms of an engine's tensors over the real loop, per tensor and step.

    Without images, it calibrates on 16 made-up pictures. The statistics go into `output`, or else ENGINE/calibration.
    What is there already is added to. `fp16_plan` and `plot` are files to write: the fp16 plan that the
    statistics lead to, and a chart of the U-Net's ranges. `crops` are for the heads, per image.

    Raises UsageError if the images cannot stand for real ones.
    """
    engine = Path(engine)
    folder = Path(output) if output else engine / "calibration"
    for file in (fp16_plan, plot):
        if file:
            check_folder_of(Path(file))
    if plot:
        require_matplotlib()
    with contextlib.ExitStack() as while_running:
        found = find_images(images or while_running.enter_context(_made_up(engine, folder)))
        statistics, skipped = collect(engine, found, folder, seed=seed, crops=crops, say=say)
    if fp16_plan:
        plan = make_fp16_plan(open_engine(engine), statistics)
        with writing(Path(fp16_plan)) as stream:
            stream.write(plan.to_json().encode())
    if plot:
        from ..evaluation.charts import save
        from .plot import draw_ranges

        save(draw_ranges(statistics), Path(plot))
    return Calibrated(folder, statistics, skipped)


def fit_steps(
    engine: Path | str,
    images: Images,
    steps: Sequence[int],
    *,
    seed: int = 0,
    crops: int = 1,
    plot: Path | str | None = None,
    say: Callable[[str], None] = lambda _text: None,
) -> FittedSteps:
    """Find the smallest number of steps that keeps the scores, and give the engine a fast sampling with it.

    `steps` are the numbers to try. A number keeps the scores if they, corrected, move no more than with another seed,
    and have an SRCC of at least 0.99 with those of all steps. A single number is taken even
    if it does not. `plot` is a file for a chart of the drift. Raises UsageError for numbers that cannot be tried.
    """
    if plot:
        check_folder_of(Path(plot))
        require_matplotlib()
    found = find_images(images)
    if not found:
        raise UsageError("fewer steps are fitted on images like those that will be scored: give some with --calib")
    fitted = find_steps(Path(engine), found, steps, seed=seed, crops=crops, say=say)
    if plot:
        from ..evaluation.charts import save

        save(draw_steps(fitted), Path(plot))
    return fitted


def quantise(
    engine: Path | str,
    output: Path | str,
    *,
    images: Images = (),
    statistics: Path | str | None = None,
    precision: str = "int8",
    limit: float | None = None,
    target: str | None = None,
    ranges: Method | str = Method.PERCENTILE,
    percentile: float = 99.999,
    force: bool = False,
    say: Callable[[str], None] = lambda _text: None,
) -> Quantised:
    """Write an engine directory whose stages compute in 8 bits, from a float32 one.

    The ranges of tensors come from the folder `statistics`; None is ENGINE/calibration. `images` are calibrated on
    first, and added to it. Without images and without statistics, it calibrates on 16 made-up pictures.

    `precision` is int8, fp8 or mixed. `mixed` tries stages on `images` and keeps int8 in those that, together, change
    the score by at most `limit` on average. `target` names the library that will run the engine: onnxruntime,
    openvino, or tensorrt (the default for fp8). Each reads another form of 8 bits.

    Raises UsageError for a combination that cannot run, ExportError if a stage answers too far from its original.
    """
    engine, output = Path(engine), Path(output)
    mixed = precision == "mixed"
    if mixed and target == "tensorrt":
        raise UsageError("--precision mixed runs what it tries: leave --target out, or take openvino")
    if mixed and not images:
        raise UsageError("--precision mixed tries stages on images: give --calib, even with --statistics")
    if limit is not None and not mixed:
        raise UsageError(f"--drift chooses stages for --precision mixed; {precision} takes all")
    recipe = Recipe.of(precision, target, method=member(Method, ranges), percentile=percentile)
    check_target(output, force=force)
    folder = Path(statistics) if statistics else engine / "calibration"
    skipped: tuple[Skipped, ...] = ()
    made_up = not images and not statistics and not (folder / f"{NAME}.npz").exists()
    with _made_up(engine, folder) if made_up else contextlib.nullcontext(images) as used:
        found = find_images(used)
        if found:
            _, skipped = collect(engine, found, folder, say=say)
    trials: list[Trial] = []
    only = tuple(StageName)
    if mixed:
        unreadable = {image.name for image in skipped}
        usable = [image for image in found if str(image) not in unreadable]
        trials = choose_stages(engine, folder, usable, recipe, limit=LIMIT if limit is None else limit, say=say)
        only = tuple(trial.stage for trial in trials if trial.taken)
        if not only:
            raise _none_taken(trials)
    manifest, stages = quantise_engine(engine, output, folder, recipe, only=only, force=force, say=say)
    return Quantised(manifest, tuple(stages), tuple(trials), skipped, made_up)


def export_quantised(
    weights: "Loaded | LoadedPfd",
    output: Path | str,
    images: Images,
    *,
    precision: str = "int8",
    force: bool = False,
    say: Callable[[str], None] = lambda _text: None,
) -> Quantised:
    """Export float32 stages beside `output`, calibrate on them, and write `output` quantised."""
    output = Path(output)
    check_target(output, force=force)
    with tempfile.TemporaryDirectory(dir=output.parent, prefix=f".{output.name}.float32.") as folder:
        engine = Path(folder, "engine")
        export_engine(weights, engine, say=say)
        return quantise(engine, output, images=images, precision=precision, force=force, say=say)


@contextlib.contextmanager
def _made_up(engine: Path, folder: Path) -> Generator[str]:
    """Lend a folder of made-up pictures. Raises UsageError where their ranges would mix with those of others."""
    if (folder / f"{NAME}.npz").exists():
        raise UsageError(
            f"{folder} holds statistics already: name images to add with --calib, or another folder with -o, or remove "
            f"this one"
        )
    with tempfile.TemporaryDirectory(prefix="iqa-calibrate-") as made:
        draw(Path(made), read_manifest(engine).crop.size * 3 // 2)
        yield made


def _none_taken(trials: Sequence[Trial]) -> UsageError:
    least = min(trial.change for trial in trials)
    if math.isinf(least):
        return UsageError(
            f"no stage can be quantised; calibrate with more images, or stay with float32 ({trials[0].why})"
        )
    return UsageError(
        f"no stage keeps the score within the limit, the best changes it by {least:.1e}; give iqa-quantise a larger "
        f"--drift, or stay with float32"
    )
