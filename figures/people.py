"""How far scores agree with people: rank and linear correlations with intervals, a bootstrap over images.

    python figures/people.py lot --data ChallengeDB_release/ --dataset clive --count 200 -o lot.csv
    iqa-eval --engine engine/ --labels lot.csv -o results/
    python figures/people.py agree --scores results/scores.jsonl --labels lot.csv --on clive --who loop -o people.json

    python figures/people.py encoder --config training/recipes/mini-people.toml --model models/mini/model.safetensors \
        --biq2021 BIQ2021/ --clive ChallengeDB_release/ --levels levels/ --cache cache/ -o encoder.json
    iqa-eval --scores encoder.csv --labels levels/labels.csv --split levels/split.json -o levels-results/

`lot` draws images, for when there is no time for all; of BIQ2021 also from one part of our split. `agree` compares
scores of an engine or of another program, and adds what it finds to the JSON file. `encoder` asks what the pictures
alone tell: a ridge regression on the encoder's features, and the VDA branch where each picture stands for its
restorations. Both look at the crops of the configuration, learn from BIQ2021's part "train", and are judged on all of
CLIVE; the ridge's strength is the best of a few on the part "validation". Beside the JSON file it writes the VDA
branch's scores of the part "test" of what `iqa-train rate` made.
"""

import argparse
import csv
import hashlib
import json
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch

from diffiqa.data.datasets import Dataset, Item, load_csv, read_labels
from diffiqa.data.pictures import Pictures
from diffiqa.data.rate import LABELS, SPLIT
from diffiqa.data.splits import Split, split_by_content
from diffiqa.engine.agreement import srcc
from diffiqa.evaluation.correlation import SEED, agreement
from diffiqa.evaluation.findings import BRANCHES
from diffiqa.evaluation.scores import pictures_of, read_branches
from diffiqa.model.checkpoint import load
from diffiqa.model.network import DiffV2IQA
from diffiqa.training.config import ScoreConfig, read_config
from diffiqa.training.loop import Machine
from diffiqa.training.score import Features, Rated, Restorations, ScoreTask, lot

STRENGTHS = (0.1, 0.3, 1.0, 3.0, 10.0)  # of the ridge, on features brought to deviation 1
TEST = 600  # pictures of BIQ2021's part "test", by lot


def draw_lot(given: argparse.Namespace) -> None:
    """Write a label file of images that are drawn by their names' hashes."""
    dataset = read_labels(given.data, given.dataset)
    items = split_by_content(dataset, SEED).items(dataset, given.part) if given.part else dataset.items

    def key(item: Item) -> bytes:
        # A part has what the split's own hash of the content chose. Drawn by that hash, near-copies would come first:
        # they are there by the hash of another picture's name.
        return hashlib.sha256((item.path.name if given.part else f"{SEED}/{item.image}").encode()).digest()

    drawn = sorted(items, key=key)
    with given.output.open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["image", "score"])
        writer.writerows([(item.path.resolve(), item.label) for item in drawn[: given.count]])


def compare_scores(given: argparse.Namespace) -> dict[str, object]:
    """Compare a file of scores with a label file: both branches, and each alone. Adds to what the output file has."""
    items = read_labels(given.labels, given.dataset).items
    found = json.loads(given.output.read_text()) if given.output.exists() else {}
    for name, scores in read_branches(given.scores, pictures_of(items)).items():
        scored = [item for item in items if item.image in scores]
        if name in BRANCHES and scored:
            who = given.who if name == "score" else f"{given.who}, {name}"
            agreed = agreement([scores[item.image] for item in scored], [item.label for item in scored])
            found.setdefault(given.on, {})[who] = agreed
    return found


def ask_encoder(given: argparse.Namespace) -> dict[str, object]:
    """Compare a ridge on the encoder's features and the VDA branch with people's opinions."""
    torch.set_num_threads(1)
    config = read_config(ScoreConfig, given.config)
    model = load(given.model).model
    biq, clive = read_labels(given.biq2021, "biq2021"), read_labels(given.clive, "clive")
    split = split_by_content(biq, config.seed)
    parts = {
        "train": _rated(biq, split.parts["train"], config.pictures),
        "validation": _rated(biq, split.parts["validation"], config.validation_pictures),
        "test": _rated(biq, split.parts["test"], TEST),
        "clive": [Rated(item.path, item.quality) for item in clive.items],
    }
    pictures = {
        name: Pictures([r.path for r in rated], given.cache / "pictures", min_side=config.model.crop, enlarge=True)
        for name, rated in parts.items()
    }
    labels = {name: [r.quality for r in rated] for name, rated in parts.items()}
    sets = [(pictures[name], labels[name]) for name in ("train", "validation")]
    task = ScoreTask(config, model, Restorations(model, 0, given.cache / "restored"), sets[0], sets[1])
    features = Features(task, given.cache / "features")
    seen: dict[str, list[np.ndarray]] = {}
    for name, group in pictures.items():
        features.fill(group, Machine(torch.device("cpu")), print)
        seen[name] = [features.of(group, index)[:, 0].astype(np.float32) for index in range(len(group))]
    means = {name: np.stack([one.mean(0) for one in every]) for name, every in seen.items()}
    guesses = [ridge(means["train"], np.array(labels["train"]), strength) for strength in STRENGTHS]
    best = max(range(len(STRENGTHS)), key=lambda i: srcc(guesses[i](means["validation"]), labels["validation"]))
    found: dict[str, object] = {"trained_on": len(labels["train"]), "strength": STRENGTHS[best]}
    damaged = Split.read(given.levels / SPLIT).items(load_csv(given.levels / LABELS), "test")
    group = Pictures([item.path for item in damaged], given.cache / "pictures", min_side=config.model.crop)
    features.fill(group, Machine(torch.device("cpu")), print)
    with torch.no_grad():
        rows = [
            (item.image, _judged(model, features.of(group, index)[:, 0].astype(np.float32)))
            for index, item in enumerate(damaged)
        ]
    with given.output.with_suffix(".csv").open("w", newline="") as file:
        csv.writer(file, lineterminator="\n").writerows([("image", "score"), *rows])
    for name in ("validation", "test", "clive"):
        with torch.no_grad():
            judged = [_judged(model, one) for one in seen[name]]
        found[name] = {
            "ridge": agreement(guesses[best](means[name]).tolist(), labels[name]),
            "vda": agreement(judged, labels[name]),
        }
    return found


def _judged(model: DiffV2IQA, features: np.ndarray) -> float:
    """Return the VDA branch's mean score of crops (N, F) that stand for their restorations."""
    return float(model.vda_scores(torch.from_numpy(features)[:, None]).score.mean())


def _rated(dataset: Dataset, contents: Sequence[str], count: int) -> list[Rated]:
    wanted = set(contents)
    return lot([Rated(i.path, i.quality) for i in dataset.items if (i.reference or i.image) in wanted], count)


def ridge(features: np.ndarray, labels: np.ndarray, strength: float) -> Callable[[np.ndarray], np.ndarray]:
    """Fit a ridge regression to features (N, F) and labels (N,); return what guesses labels."""
    mean, deviation, middle = features.mean(0), features.std(0) + 1e-6, labels.mean()

    def scaled(x: np.ndarray) -> np.ndarray:
        found: np.ndarray = (x - mean).astype(np.float64) / deviation
        return found

    x, (count, width) = scaled(features), features.shape
    if count < width:
        weights = x.T @ np.linalg.solve(x @ x.T / width + strength * np.eye(count), labels - middle) / width
    else:
        weights = np.linalg.solve(x.T @ x / width + strength * np.eye(width), x.T @ (labels - middle)) / width
    return lambda x: np.asarray(scaled(x) @ weights + middle)


def main() -> None:
    """Do what the first word says."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="what", required=True)
    options = {
        "lot": ("data", "output"),
        "agree": ("scores", "labels", "output"),
        "encoder": ("config", "model", "biq2021", "clive", "levels", "cache", "output"),
    }
    for what, names in options.items():
        command = commands.add_parser(what)
        for name in names:
            command.add_argument(f"--{name}", *(("-o",) if name == "output" else ()), type=Path, required=True)
        command.add_argument("--dataset")
        if what == "lot":
            command.add_argument("--count", type=int, required=True)
            command.add_argument("--part")
        if what == "agree":
            command.add_argument("--on", required=True, help="The images, such as clive.")
            command.add_argument("--who", required=True, help="Whose scores they are.")
    given = parser.parse_args()
    if given.what == "lot":
        draw_lot(given)
        return
    found = compare_scores(given) if given.what == "agree" else ask_encoder(given)
    given.output.write_text(json.dumps(found, indent=1) + "\n")
    print(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
