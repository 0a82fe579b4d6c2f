"""The paper's ablations: one training run for each recipe on the same split, and one table of their results."""

import csv
import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, TypeVar

import torch

from ..data.outputs import to_csv, write_file
from ..errors import CheckpointError, ConfigError
from ..model.checkpoint import load
from .config import PfdTrainConfig, ScoreConfig, read_config
from .loop import QUIETLY, VALIDATION, Conduct, Machine, TrainingError, open_machine
from .score import Rated, Restorations, ScoreTask, prepared, run_score

TABLE = "ablation.csv"
R = TypeVar("R", ScoreConfig, PfdTrainConfig)


@dataclass(frozen=True)
class Row:
    """The result of a recipe: correlations of the weights that validation found best, or the problem that ended it."""

    recipe: str
    step: int | None = None
    validation_srcc: float | None = None
    validation_plcc: float | None = None
    test_srcc: float | None = None
    test_plcc: float | None = None
    problem: str | None = None

    def cells(self) -> list[str]:
        """Return the row as text."""
        values = [getattr(self, field.name) for field in fields(self)]
        return [f"{v:.4f}" if isinstance(v, float) else "" if v is None else str(v) for v in values]


COLUMNS = [field.name for field in fields(Row)]


def read_recipes(cls: type[R], config: Path, paths: Sequence[Path]) -> dict[str, R]:
    """Return the configurations that files (or the TOML files of folders) make of `config`, by the files' names.

    All are read before any is run. Raises ConfigError.
    """
    files = [file for path in paths for file in (sorted(path.glob("*.toml")) if path.is_dir() else [path])]
    if not files:
        raise ConfigError(f"there are no recipes (.toml) in {', '.join(map(str, paths))}")
    recipes: dict[str, R] = {}
    for file in files:
        if file.stem in recipes:
            raise ConfigError(f"two recipes are called {file.stem}; rename {file}")
        found = read_config(cls, config, file)
        model: Any = dataclasses.replace(found.model, name=f"{found.model.name}-{file.stem}")
        recipes[file.stem] = dataclasses.replace(found, model=model)
    return recipes


def ablate_recipes(
    recipes: Mapping[str, ScoreConfig],
    parts: Mapping[str, Sequence[Rated]],
    folder: Path,
    *,
    unet: Path | None = None,
    vit: Path | None = None,
    resnet: Path | None = None,
    lite0: Path | None = None,
    tabs: Path | None = None,
    vcg: Path | None = None,
    cache: Path | None = None,
    conduct: Conduct = QUIETLY,
) -> list[Row]:
    """Train each recipe in its own folder below `folder`, and judge it on the part "test" too.

    `parts` has "train", "validation" and "test". The table is written after every run. If a recipe's loss is not
    finite, or a part does not fit it, its row has a problem in place of figures, and the next recipe begins.
    """
    place = cache or folder / "cache"
    rows: list[Row] = []
    for name, config in recipes.items():
        conduct.say(f"recipe {name}")
        run = folder / name
        try:
            result = run_score(
                config,
                parts["train"],
                parts["validation"],
                run,
                unet=unet if config.model.unet else None,
                vit=vit if config.model.vcg else None,
                resnet=resnet if config.model.vda else None,
                lite0=lite0 if config.model.vda else None,
                tabs=tabs,
                vcg=vcg if config.model.vcg else None,
                cache=place,
                conduct=conduct,
            )
        except (TrainingError, CheckpointError) as exc:
            rows.append(Row(name, problem=str(exc)))
            conduct.say(f"recipe {name}: {exc}")
        else:
            validation = _validation(run, result.step)
            with open_machine(conduct.device, config.optimisation.precision) as machine:
                test = judge(run / "model.safetensors", config, parts["test"], place, machine)
            figures = (validation["srcc"], validation["plcc"], test["srcc"], test["plcc"])
            rows.append(Row(name, result.step, *figures))
        write_file(folder / TABLE, to_csv([COLUMNS, *(row.cells() for row in rows)]))
    return rows


@torch.no_grad()
def judge(bundle: Path, config: ScoreConfig, rated: Sequence[Rated], cache: Path, machine: Machine) -> dict[str, float]:
    """Return how well a trained bundle scores images, as validation does: on the same grid of crops."""
    model = load(bundle).model.to(machine.device).eval()
    pictures, items = prepared(rated, cache / "pictures", config.model.crop, QUIETLY.say)
    restorations = Restorations(model, config.restore_seed, cache / "restored")
    restorations.fill(pictures, machine, QUIETLY.say)
    labelled = pictures, [item.quality for item in items]
    return ScoreTask(config, model, restorations, labelled, labelled).validate(machine).row


def _validation(run: Path, step: int) -> dict[str, float]:
    """Return what validation found at a step."""
    with (run / VALIDATION).open(newline="") as file:
        (row,) = (row for row in csv.DictReader(file) if int(row["step"]) == step)
    return {name: float(value) for name, value in row.items()}
