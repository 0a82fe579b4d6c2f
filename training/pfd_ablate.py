"""What a trained PFD-IQA reaches, with intervals; and its ablations: students of one teacher, on one split."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ..data.outputs import write_file
from ..engine.agreement import srcc
from ..errors import ConfigError
from ..evaluation.correlation import agreement, spread
from ..model.pfd.network import PfdIQA
from ..model.pfd.prompts import PromptSet
from .config import PfdTrainConfig, differences, identity
from .loop import QUIETLY, Conduct, TrainingError, open_machine
from .pfd import Judged, begin_pfd, judge, named, prepare, study, teach, word_of
from .pfd_features import Picture
from .score import Rated, lot

ABLATION = "ablation.json"


def opinions(judged: Judged, pictures: Sequence[Picture], other: Judged | None = None) -> dict[str, Any]:
    """Return how far scores agree with people, and how much more than those of another model."""
    labels = np.array([picture.quality for picture in pictures])
    found = agreement(judged.scores, labels)
    if other is not None:
        a, b = judged.scores, other.scores
        found["srcc_gain"] = spread(lambda i: srcc(a[i], labels[i]) - srcc(b[i], labels[i]), len(labels))
    return found


def naming(model: PfdIQA, judged: Judged, pictures: Sequence[Picture]) -> dict[str, Any]:
    """Return how often damage is named right, and that for each word."""
    right = named(model, judged, pictures)
    words = np.array([word_of(picture.kind) for picture in pictures])
    each = {word: round(float(right[words == word].mean()), 3) for word in dict.fromkeys(words.tolist())}
    return {"pictures": len(pictures), "right": spread(lambda i: float(right[i].mean()), len(right)), "words": each}


def ablate_pfd(
    config: PfdTrainConfig,
    recipes: Mapping[str, PfdTrainConfig],
    parts: Mapping[str, Sequence[Rated]],
    folder: Path,
    *,
    lite: Path,
    prompts: PromptSet | None,
    pictures: int = 0,
    cache: Path | None = None,
    conduct: Conduct = QUIETLY,
) -> dict[str, Any]:
    """Train one teacher and a student for each recipe; write how they agree with people on the part "test".

    The first recipe is what others are compared with. `pictures` of the part are drawn by lot; 0: all. A recipe changes
    the model alone. The file is written after every student. Raises ConfigError.
    """
    for name, recipe in recipes.items():
        changed = differences(identity(config) | {"model": None}, identity(recipe) | {"model": None})
        if changed:
            raise ConfigError(f"the recipe {name} must change the model alone, and changes {changed[0]}")
    begun, seen, data = prepare(config, parts, cache or folder / "cache", lite, prompts, conduct.say)
    test = seen.fill(lot([Picture(r.path, r.quality) for r in parts["test"]], pictures), conduct.say)
    rows: dict[str, Any] = {}
    with open_machine(conduct.device, config.optimisation.precision) as machine:
        taught = teach(config, begun.model, seen, data, folder / "teacher", machine, conduct)
        begun.model.load_state_dict(taught.weights, strict=False)
        first = teacher = judge(begun.model, seen, test, machine, denoised=False)
        rows["teacher"] = opinions(teacher, test)
        for place, (name, recipe) in enumerate(recipes.items()):
            student = begin_pfd(recipe, lite, prompts)
            try:
                study(recipe, student, seen, data, taught, folder / name, machine, conduct)
            except (TrainingError, RuntimeError) as exc:  # torch's, where the teacher does not fit
                rows[name] = {"problem": str(exc)}
            else:
                found = judge(student.model, seen, test, machine)
                rows[name] = opinions(found, test, first if place else teacher)
                first = first if place else found
                if data.named:
                    said = judge(student.model, seen, data.named, machine)
                    rows[name]["named"] = naming(student.model, said, data.named)
            write_file(folder / ABLATION, json.dumps(rows, indent=1) + "\n")
    return rows
