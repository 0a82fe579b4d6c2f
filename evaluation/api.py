"""`diffiqa.evaluate`: what `iqa-eval` does, as one function; and `compete`, what its `--gmad` does."""

import json
from collections.abc import Sequence
from pathlib import Path

from ..data.datasets import read_labels
from ..data.extra import load_extra
from ..data.outputs import make_folder, to_csv, write_file
from ..data.splits import Split
from ..engine.codec import encode
from ..engine.reference import Reference
from ..errors import UsageError
from ..runtime.backends import Backend
from ..runtime.command.api import Outputs
from ..runtime.command.display import run_shown
from ..runtime.results import Options
from ..runtime.scorer import load
from .charts import require_matplotlib, save
from .findings import Evaluation, compare
from .gmad import gmad_pairs
from .reference import Ends, make_reference, require_enough
from .scatter import draw_scatter
from .scores import branches_of, pictures_of, read_branches, read_scores, turned
from .text import to_text

JSON_NAME, TEXT_NAME, SCATTER_NAME, GMAD_NAME = "evaluation.json", "evaluation.md", "scatter.png", "gmad.csv"
SCORES_NAME = "scores.jsonl"
GMAD_COLUMNS = ("fixed", "level", "better", "worse", "fixed_better", "fixed_worse", "other_better", "other_worse")


def evaluate(
    labels: str | Path,
    *,
    engine: str | Path | None = None,
    scores: str | Path | None = None,
    dataset: str | None = None,
    lower_better: bool = False,
    split: str | Path | None = None,
    part: str = "test",
    output: str | Path | None = None,
    resume: bool = False,
    force: bool = False,
    reference: str | Path | None = None,
    opinions: tuple[float, float] | None = None,
    backend: Backend | Sequence[Backend] | None = None,
    crops: int | None = None,
    seed: int = 0,
    workers: int = 1,
    quiet: bool = True,
) -> Evaluation:
    """Compare an engine's scores, or those of a file, with people's opinions.

        found = diffiqa.evaluate("kadid10k/", dataset="kadid10k", engine="engine/", output="results/")
        print(found.branches[0].correlation.srcc)

    `labels` is a CSV file, or the folder of a published data set that `dataset` names. `split` is a file: then its
    `part` alone is evaluated. `output` is a folder for scores.jsonl, evaluation.json, evaluation.md and scatter.png; an
    engine needs one, so that an interruption loses no score. Unless `quiet`, scoring shows its progress on stderr.

    `reference` is a file to write for `export` or `convert`: it tells later users of the engine where a score lies
    among these, and which opinion it stands for. `opinions` are the labels that mean 1 and 5 on that scale: without
    them, the worst and the best of the set.

    Raises DatasetError, OutputError, UsageError, and BackendError where SciPy or matplotlib is missing.
    """
    if (engine is None) == (scores is None):
        raise UsageError("give either an engine or a file of scores: where do the scores come from?")
    if engine and not output:
        raise UsageError("name a folder with -o, so that no score is lost if scoring is interrupted")
    if reference and not engine:
        raise UsageError("a reference is of an engine's scores: give --engine; with --resume, scores in DIR are kept")
    load_extra("scipy")
    if output:
        require_matplotlib()
    known = read_labels(Path(labels), dataset, lower_is_better=lower_better, need_files=False)
    parts = Split.read(Path(split)) if split else None
    items = parts.items(known, part) if parts else known.items
    ends = Ends(known, *(opinions or (known.worst, known.best)))
    if reference:
        require_enough(known.name, len(items))  # before hours of scoring
    pictures = pictures_of(items)
    if engine and output:
        with load(engine, backend) as scorer:
            make_folder(Path(output))
            file = Path(output) / SCORES_NAME
            outputs = Outputs(file=file, resume=resume, force=force)
            names = {image: str(path) for image, path in pictures.items()}
            files = list(dict.fromkeys(names.values()))
            run_shown(scorer, files, Options(crops, seed), outputs, workers=workers, quiet=quiet)
            branches, source = branches_of(file, names), f"engine {scorer.info.engine}"
        if reference:
            scored = [item for item in items if item.image in branches["score"]]
            made = make_reference(
                known.name + (f", part {part}" if parts else ""),
                scorer.manifest,
                [branches["score"][item.image] for item in scored],
                ends.opinions(scored),
                crops=crops or scorer.manifest.crop.count,
                mode=Options().mode,
            )
            write_file(Path(reference), _json(made))
        if not scorer.manifest.score.higher_is_better:
            branches, source = turned(branches), f"{source}, its scores turned: its lower ones are the better ones"
    elif scores:
        branches, source = read_branches(Path(scores), pictures), Path(scores).name
    found = compare(known, items, branches, scores=source, part=part if parts else None, ends=ends)
    if output:
        folder = Path(output)
        write_file(folder / JSON_NAME, _json(found))
        write_file(folder / TEXT_NAME, to_text(found))
        total = branches["score"]
        drawn = [item for item in items if item.image in total]
        axis = f"label ({'higher' if known.higher_is_better else 'lower'} is better)"
        figure = draw_scatter(known.name, [total[i.image] for i in drawn], [i.label for i in drawn], axis)
        save(figure, folder / SCATTER_NAME)
    return found


def _json(found: Evaluation | Reference) -> str:
    return json.dumps(encode(found), indent=1, ensure_ascii=False, allow_nan=False) + "\n"


def compete(
    first: str | Path, second: str | Path, *, levels: int = 2, output: str | Path | None = None
) -> list[tuple[str, ...]]:
    """Return the gMAD pairs of two score files as a table, its head first: each model fixed in turn, levels ascending.

    As in the paper's Figs. 5 and 6. `output` is a folder for gmad.csv. Raises DatasetError.

    from diffiqa.evaluation.api import compete
    print(compete("ours.jsonl", "theirs.csv", levels=6))
    """
    first, second = Path(first), Path(second)
    a, b = read_scores(first), read_scores(second)
    rows: list[tuple[str, ...]] = [GMAD_COLUMNS]
    for name, fixed, other in ((first, a, b), (second, b, a)):
        for pair in gmad_pairs(fixed, other, levels):
            figures = (f"{value:.6g}" for value in (*pair.fixed, *pair.other))
            rows.append((str(name), f"{pair.level:.3f}", pair.better, pair.worse, *figures))
    if output:
        write_file(Path(output) / GMAD_NAME, to_csv(rows))
    return rows
