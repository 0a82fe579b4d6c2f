"""What `iqa-train` does, one function for each of its commands.

    from diffiqa.training import api

    api.photos([], "photos/")
    api.rate("photos/", "rated/")
    api.restore("restore.toml", "runs/unet", data=["photos/train"], held_out=["photos/validation"], say=print)
    api.score("score.toml", "runs/score", data="rated/labels.csv", split="rated/split.json",
              unet="runs/unet/model.safetensors", say=print)
    api.plot(["runs/unet", "runs/score"], "curves.png")

Torch is loaded by the functions that need it. `say` is told how a run goes. Under torchrun every process calls the same
function; the first one writes the files.
"""

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Required, TypedDict, Unpack

from ..errors import UsageError

if TYPE_CHECKING:
    from ..data.photos import Photograph
    from ..model.pfd.prompts import PromptSet
    from .ablate import Row
    from .config import RunConfig
    from .loop import Conduct, Result
    from .score import Rated

File = str | Path
Say = Callable[[str], None]

SPLIT_NAME = "split.json"


def _silent(_text: str) -> None:
    pass


def leads() -> bool:
    """Return whether this is the first process of several: the one that speaks and writes."""
    return os.environ.get("RANK", "0") == "0"


class Running(TypedDict, total=False):
    """Options of all runs."""

    device: str | None  # cpu, cuda or cuda:N; default: a GPU if there is one
    resume: bool  # go on with the run in `output`
    threads: int  # that prepare batches; default: 2
    say: Say


class Labelled(Running, total=False):
    """Options of runs that learn from labels."""

    data: Required[File]  # a CSV file, or the folder of a published data set
    dataset: str | None  # which one that is
    lower_better: bool  # in the CSV file
    split: File | None  # a file; default: drawn from the configuration's seed, and written to split.json in `output`
    cache: File | None  # a folder for decoded and restored pictures; default: one in `output`


class Scoring(Labelled, total=False):
    """Options of runs that train the network that scores: files for one part each, which win over `start`."""

    unet: File | None
    vit: File | None
    resnet: File | None
    lite0: File | None
    tabs: File | None
    vcg: File | None


def restore(
    config: File,
    output: File,
    *,
    data: Sequence[File],
    held_out: Sequence[File] = (),
    start: File | None = None,
    **given: Unpack[Running],
) -> "Result":
    """Teach the U-Net to restore the photographs in the folders `data`; validate on those in `held_out`.

    `start` is a bundle whose U-Net the run begins with. `output` gets log.csv, validation.csv, checkpoint.pt, plot.png,
    gains.csv and model.safetensors. More options: `Running`.
    """
    from ..runtime.inputs import find_images
    from .config import RestoreConfig, read_config
    from .restore import run_restore

    found = read_config(RestoreConfig, Path(config))
    photos, others = (find_images(map(str, folders)) for folders in (data, held_out))
    if both := {path.resolve() for path in photos} & {path.resolve() for path in others}:
        raise UsageError(f"{min(both)} is given both with --data and with --held-out")
    start = Path(start) if start else None
    return run_restore(found, photos, others, Path(output), start=start, conduct=_conduct(**given))


def pretrain(config: File, output: File, *, start: File | None = None, **given: Unpack[Labelled]) -> "Result":
    """Teach the ViT and the ResNet what distortions look like. The labels must say how each picture was distorted.

    `start` is a bundle to begin with. More options: `Labelled`.
    """
    from .config import PretrainConfig, read_config
    from .pretrain import run_pretrain

    found = read_config(PretrainConfig, Path(config))
    parts, options = _labelled(found, Path(output), "validation", start=start, **given)
    return run_pretrain(found, parts["train"], parts["validation"], Path(output), **options)


def score(
    config: File, output: File, *, start: File | None = None, levels: File | None = None, **given: Unpack[Scoring]
) -> "Result":
    """Teach the network to score rated images; the part "validation" chooses the best weights.

    `start` is a bundle to begin with. `levels` is a folder that `rate` made: of the distorted versions of each of its
    windows, the order is learned beside the labels. More options: `Scoring`.
    """
    from .config import ScoreConfig, read_config
    from .score import run_score

    found = read_config(ScoreConfig, Path(config))
    parts, options = _labelled(found, Path(output), "validation", start=start, **given)
    ordered = _ordered(Path(levels)) if levels else []
    return run_score(found, parts["train"], parts["validation"], Path(output), ordered=ordered, **options)


def ablate(config: File, output: File, *, recipes: Sequence[File], **given: Unpack[Scoring]) -> "list[Row]":
    """Train a network for each recipe, judge it on the parts "validation" and "test", and write ablation.csv.

    `recipes` are TOML files, or folders of them: each holds what it changes in the configuration. More options:
    `Scoring`.
    """
    from .ablate import ablate_recipes, read_recipes
    from .config import ScoreConfig

    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise UsageError("ablate is one process; under torchrun, give each recipe's configuration to iqa-train score")
    configs = read_recipes(ScoreConfig, Path(config), [Path(recipe) for recipe in recipes])
    parts, options = _labelled(next(iter(configs.values())), Path(output), "validation", "test", **given)
    return ablate_recipes(configs, parts, Path(output), **options)


def pfd(config: File, output: File, *, lite: File, prompts: File | None = None, **given: Unpack[Labelled]) -> "Result":
    """Teach PFD-IQA: a teacher in the folder `teacher` of `output`, then the student.

    `lite` are the weights of EfficientNet-Lite0 or -Lite2, as `config` says; `prompts` is what `iqa-prompts` made. More
    options: `Labelled`.
    """
    from .config import PfdTrainConfig, read_config
    from .pfd import run_pfd

    found = read_config(PfdTrainConfig, Path(config))
    given_prompts = _prompts(prompts)
    parts, options = _labelled(found, Path(output), "validation", **given)
    return run_pfd(found, parts, Path(output), lite=Path(lite), prompts=given_prompts, **options)


def pfd_ablate(
    config: File,
    output: File,
    *,
    recipes: Sequence[File],
    lite: File,
    prompts: File | None = None,
    test_pictures: int = 0,
    **given: Unpack[Labelled],
) -> dict[str, Any]:
    """Teach PFD-IQA's teacher once, and a student for each recipe; return what ablation.json in `output` has.

    Recipes change the model alone. They are judged on so many pictures of the part "test"; 0: all. More: `pfd`.
    """
    from .ablate import read_recipes
    from .config import PfdTrainConfig, read_config
    from .pfd_ablate import ablate_pfd

    found = read_config(PfdTrainConfig, Path(config))
    changed = read_recipes(PfdTrainConfig, Path(config), [Path(recipe) for recipe in recipes])
    given_prompts = _prompts(prompts)
    parts, options = _labelled(found, Path(output), "validation", "test", **given)
    options |= {"lite": Path(lite), "prompts": given_prompts, "pictures": test_pictures}
    return ablate_pfd(found, changed, parts, Path(output), **options)


def photos(sources: Sequence[File], output: File, *, seed: int = 1) -> "tuple[list[Photograph], list[str]]":
    """Gather pristine photographs into the folders train, validation and test of `output`.

    `sources` are Debian packages and folders; without any, wallpaper packages are fetched. Returns the photographs, and
    in words what was left out.
    """
    from ..data.photos import gather

    return gather([Path(source) for source in sources], Path(output), seed=seed)


def rate(
    folder: File,
    output: File,
    *,
    train: tuple[int, int] = (2, 2),
    held_out: tuple[int, int] = (1, 5),
    one_level: bool = False,
    side: int = 176,
    seed: int = 1,
    say: Say = _silent,
) -> int:
    """Make a rated data set of the photographs that `photos` gathered in `folder`; return how many pictures it has.

    `train` and `held_out` are numbers: windows of each photograph, and distortions of each window. With `one_level`,
    each distortion to train on comes at one level, which is drawn, and not at all five.
    """
    from ..data.photos import parts_in
    from ..data.rate import Amount, rate_photographs

    amounts = {"train": Amount(*train, one_level), "validation": Amount(*held_out), "test": Amount(*held_out)}
    return rate_photographs(
        parts_in(Path(folder)),
        Path(output),
        amounts=amounts,
        seed=seed,
        side=side,
        progress=lambda done: say(f"{done} pictures"),
    )


def average(first: File, second: File, output: File, *, share: float = 0.5) -> None:
    """Write the average of two bundles whose runs began alike, as a bundle; `share` is that of the second."""
    from .start import average as average_bundles

    average_bundles((Path(first), Path(second)), share, Path(output))


def plot(runs: Sequence[File], output: File) -> None:
    """Draw loss, learning rate and validation of runs over each other, into the PNG file `output`."""
    from ..evaluation.charts import save
    from .plot import draw_runs

    output = Path(output)
    if output.suffix.lower() != ".png":
        raise UsageError(f"{output} is no name of a PNG file; call it {output.name or 'plot'}.png")
    save(draw_runs([Path(run) for run in runs]), output)


def _conduct(*, device: str | None = None, resume: bool = False, threads: int = 2, say: Say = _silent) -> "Conduct":
    """Return how a run is carried out. It ends with a chart, so a missing matplotlib is told now."""
    from ..evaluation.charts import require_matplotlib
    from .loop import Conduct

    require_matplotlib()

    def progress(step: int, steps: int, loss: float, rate: float) -> None:
        say(f"step {step} of {steps}: loss {loss:.5f}, learning rate {rate:.2e}")

    return Conduct(device, resume, threads, progress, say)


def _prompts(path: File | None) -> "PromptSet | None":
    from ..model.pfd.prompts import read_prompts

    return read_prompts(Path(path)) if path else None


def _ordered(folder: Path) -> "list[Rated]":
    """Return the pictures to train on of a set that `rate` made."""
    from ..data.datasets import read_labels
    from ..data.rate import LABELS, SPLIT
    from ..data.splits import Split
    from .score import Rated

    items = Split.read(folder / SPLIT).items(read_labels(folder / LABELS), "train")
    windows = [item.image.rpartition("/")[0] + "/" + item.path.stem.partition("-")[0] for item in items]
    return [
        Rated(item.path, item.quality, item.distortion or "", window)
        for item, window in zip(items, windows, strict=True)
    ]


def _labelled(
    config: "RunConfig",
    output: Path,
    *held_out: str,
    data: File,
    dataset: str | None = None,
    lower_better: bool = False,
    split: File | None = None,
    cache: File | None = None,
    unet: File | None = None,
    vit: File | None = None,
    resnet: File | None = None,
    lite0: File | None = None,
    tabs: File | None = None,
    vcg: File | None = None,
    start: File | None = None,
    **given: Unpack[Running],
) -> "tuple[dict[str, list[Rated]], dict[str, Any]]":
    """Return "train" and the held-out parts of the split, and the other options of a run that were given."""
    from ..data.datasets import read_labels
    from ..data.outputs import make_folder
    from ..data.splits import Split, split_by_content
    from .score import Rated

    files = {"cache": cache, "unet": unet, "vit": vit, "resnet": resnet, "lite0": lite0, "start": start}
    files |= {"tabs": tabs, "vcg": vcg}
    options = {name: Path(file) for name, file in files.items() if file}
    conduct = _conduct(**given)
    rated = read_labels(Path(data), dataset, lower_is_better=lower_better)
    drawn = Split.read(Path(split)) if split else split_by_content(rated, config.seed)
    if not split and leads():
        make_folder(output)
        drawn.write(output / SPLIT_NAME)
    names = {name: name for name in ("train", *held_out)}
    if "training" in drawn.parts:  # as publishers call it
        names["train"] = "training"
    parts = {
        name: [Rated(item.path, item.quality, item.distortion or "") for item in drawn.items(rated, part)]
        for name, part in names.items()
    }
    return parts, options | {"conduct": conduct}
