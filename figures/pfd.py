"""What PFD-IQA costs, and what 8 bits make of `pfd-mini`. The tables of docs/pfdiqa.md are made here too.

    python figures/pfd.py cost
    python figures/pfd.py int8 --biq2021 BIQ2021/ [--images 200]
    python figures/pfd.py paper

`cost` (results/pfd.json) has the parameters and multiply-accumulates of one crop, stage by stage, and the time that
`pfd-mini` takes in PyTorch. `int8` (results/pfd-int8.json) calibrates `pfd-mini` on 16 pictures of BIQ2021's part
"train", and scores pictures of the part "test" with 8 bits and without, in turn. `paper` (results/pfd-paper.json)
exports `pfd-paper` on seeded weights, scores a picture, and compares the engine with PyTorch.
"""

import argparse
import dataclasses
import json
import re
import statistics
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from diffiqa.bench import report
from diffiqa.model.pfd import config as choices
from diffiqa.model.pfd.config import PFD_PRESETS, PfdConfig

STAGES = ("encoder", "prior", "denoiser", "decoder")
ROUNDS = 40
FIRST = "ONNX Runtime, float32"  # what the others are compared with


def pfd_choices(_results: Path) -> str:
    """Return the table of all choices: a field of the configuration, its values, and what its comment says."""
    source = Path(choices.__file__).read_text(encoding="utf-8")
    rows = []
    for field in dataclasses.fields(PfdConfig)[1:]:
        comment = re.search(rf"^    {field.name}: .*  # (known|inferred): (.+)$", source, re.MULTILINE)
        if comment is None:
            raise ValueError(f"the field {field.name} of PfdConfig does not say whether it is known or inferred")
        values = [_shown(getattr(config, field.name)) for config in PFD_PRESETS.values()]
        rows.append([f"`{field.name}`", *values, comment[1], comment[2]])
    return report.table(["choice", *(f"`{name}`" for name in PFD_PRESETS), "", "where it comes from"], rows)


def _shown(value: Any) -> str:
    if isinstance(value, choices.Words):
        return f"{len(value.distortions)}, {len(value.levels)}"
    if isinstance(value, choices.Ddim):
        return ", ".join(map(str, value.timesteps))
    if isinstance(value, bool):
        return "yes" if value else "no"
    return f"{value:g}" if isinstance(value, float) else str(value)


def pfd_cost(results: Path) -> str:
    """Return the table of parameters, work and time."""
    read = json.loads((results / "pfd.json").read_text(encoding="utf-8"))
    rows = []
    for stage in (*STAGES, "a crop"):
        row = [f"`{stage}`" if stage in STAGES else stage]
        for cost in read["presets"].values():
            row += [f"{cost[stage]['parameters'] / 1e6:.2f} M", f"{cost[stage]['gmacs']:.3f}"]
        rows.append([*row, f"{read['milliseconds'][stage]:.1f}"])
    heads = [f"`{name}`{part}" for name in read["presets"] for part in (": parameters", ": GMAC")]
    return report.table(["stage", *heads, "`pfd-mini`: ms"], rows)


def pfd_int8(results: Path) -> str:
    """Return the table of 8 bits: how fast, how far scores move, how they agree with people."""
    read = json.loads((results / "pfd-int8.json").read_text(encoding="utf-8"))
    rows = []
    for way, row in read["ways"].items():
        changes = [report.number(row[name]) for name in ("mean_drift", "max_drift")] if way != FIRST else ["", ""]
        gain = "{:+.4f} ({:+.4f} to {:+.4f})".format(*row["srcc_gain"]) if way != FIRST else ""
        speeds = f"{1 / statistics.median(row['cpu_seconds']):.1f}", f"{row['cpu_time']:.2f}×"
        rows.append([way, *speeds, *changes, f"{row['srcc_with_labels']:.3f}", gain, f"{row['same_word']:.0%}"])
    heads = ["pictures", "speed", "mean change", "largest", "SRCC", "gain (95 %)", "same damage"]
    return report.table(["", *heads], rows)


def main() -> None:
    """Measure what is asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True)
    commands.add_parser("cost").set_defaults(measure=measure_cost)
    int8 = commands.add_parser("int8")
    int8.set_defaults(measure=measure_int8)
    int8.add_argument("--biq2021", type=Path, required=True)
    int8.add_argument("--images", type=int, default=200)
    commands.add_parser("paper").set_defaults(measure=measure_paper)
    given = parser.parse_args()
    given.measure(given)


def measure_int8(given: argparse.Namespace) -> None:
    """Score the same pictures in 8 bits and in float32, by each library in turn."""
    import numpy as np
    from precision import CALIBRATION_IMAGES, beside, drawn, ratio
    from record import ROOT, write

    import diffiqa
    from diffiqa.data.datasets import read_labels
    from diffiqa.data.splits import split_by_content
    from diffiqa.engine.agreement import srcc
    from diffiqa.evaluation.correlation import spread

    labels = read_labels(given.biq2021, "biq2021")
    split = split_by_content(labels, 1)  # as pfd-mini was trained
    chosen = drawn(split.items(labels, "test"), given.images)
    truth = [item.quality for item in chosen]
    ways = {
        FIRST: ("float32", diffiqa.OnnxRuntime()),
        "ONNX Runtime, int8": ("onnxruntime", diffiqa.OnnxRuntime()),
        "OpenVINO, float32": ("float32", diffiqa.OpenVino()),
        "OpenVINO, int8": ("openvino", diffiqa.OpenVino()),
    }
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        diffiqa.export(ROOT / "models" / "pfd-mini" / "model.safetensors", folder / "float32", target="none")
        images = [str(item.path) for item in drawn(split.items(labels, "train"), CALIBRATION_IMAGES)]
        for target in ("onnxruntime", "openvino"):
            diffiqa.quantise(folder / "float32", folder / target, images=images, target=target)
        scorers = {way: diffiqa.load(folder / form, backend=backend) for way, (form, backend) in ways.items()}
        found: dict[str, list[diffiqa.Score]] = {way: [] for way in ways}
        wall: dict[str, list[float]] = {way: [] for way in ways}
        cpu: dict[str, list[float]] = {way: [] for way in ways}
        for item in (chosen[0], *chosen):  # the first once more: it warms up, and is dropped
            for way, scorer in scorers.items():
                start, used = time.perf_counter(), time.process_time()
                found[way].append(scorer.score(item.path))
                wall[way].append(time.perf_counter() - start)
                cpu[way].append(time.process_time() - used)
    first = [score.score for score in found[FIRST][1:]]
    words = {way: [likeliest(score.probabilities) for score in scores[1:]] for way, scores in found.items()}
    rows = {}
    for way, scores in found.items():
        ours = np.array([score.score for score in scores[1:]])
        row = beside(first, ours.tolist(), truth)
        row["srcc_gain"] = spread(
            lambda i, ours=ours: srcc(ours[i], np.take(truth, i)) - srcc(np.take(first, i), np.take(truth, i)),
            len(truth),
        )
        row["same_word"] = float(np.mean([a == b for a, b in zip(words[way], words[FIRST], strict=True)]))
        row["images_per_second"] = 1 / statistics.median(wall[way][1:])
        row["speed"] = ratio(wall[FIRST][1:], wall[way][1:])
        row["cpu_time"] = ratio(cpu[FIRST][1:], cpu[way][1:])
        rows[way] = row | {"seconds": wall[way][1:], "cpu_seconds": cpu[way][1:]}
    write("pfd-int8", {"calibration_images": CALIBRATION_IMAGES, "images": len(chosen), "ways": rows})


def likeliest(probabilities: Any) -> str:
    """Return the distortion that fits best."""
    return max(probabilities["distortions"], key=probabilities["distortions"].get)


def measure_paper(_given: argparse.Namespace) -> None:
    """Export the full-size network, score a picture, and compare the engine's score with PyTorch's."""
    from record import ROOT, seconds_in_turn, write

    import diffiqa
    from diffiqa.model.pfd.checkpoint import load_either
    from export import exported

    picture = ROOT / "samples" / "jpeg-strong.jpg"
    with tempfile.TemporaryDirectory() as name:
        bundle, engine = Path(name) / "seeded.safetensors", Path(name) / "engine"
        diffiqa.convert(load_either(None, preset="pfd-paper", seed=0), bundle)
        cost = exported(engine, "--ckpt", bundle)
        with diffiqa.load(engine, backend=diffiqa.OnnxRuntime()) as scorer:
            wall, cpu = seconds_in_turn({"score": lambda: scorer.score(picture)}, 5)
        verified = diffiqa.verify(engine, [str(picture)], against=bundle)
    score = {"crops": 4, "seconds": wall["score"], "cpu_seconds": cpu["score"]}
    checks = {check.name: check.value for check in verified.checks if check.value is not None}
    write("pfd-paper", {"export": cost, "score": score, "verify": {"within": verified.within, "checks": checks}})


def measure_cost(_given: argparse.Namespace) -> None:
    """Count and measure."""
    import torch
    from record import seconds_in_turn, write
    from torch import Tensor, nn
    from torch.utils.flop_counter import FlopCounterMode

    from diffiqa.model.network import count_parameters
    from diffiqa.model.pfd.network import PfdIQA, build

    def inputs(model: PfdIQA) -> dict[str, tuple[Tensor, ...]]:
        c = model.config
        y, condition = torch.rand(1, c.width, c.grid, c.grid), torch.rand(1, 2, c.width)
        given = torch.rand(1, 3, c.crop, c.crop), torch.full((1,), 100.0), torch.rand(1, c.width)
        return {"encoder": (given[0],), "prior": (y,), "denoiser": (y, condition, given[1]), "decoder": (y, given[2])}

    presets: dict[str, Any] = {}
    for name, config in PFD_PRESETS.items():
        with torch.device("meta"):
            model = PfdIQA(config)  # in training mode: in the other, PyTorch's attention hides its work
            costs = {}
            for stage, given in inputs(model).items():
                module: nn.Module = model.get_submodule(stage)
                with FlopCounterMode(display=False) as counter:
                    module(*given)
                costs[stage] = {"parameters": count_parameters(module), "gmacs": counter.get_total_flops() / 2e9}
        times = {stage: len(config.schedule.timesteps) if stage == "denoiser" else 1 for stage in costs}
        costs["a crop"] = {
            "parameters": sum(cost["parameters"] for cost in costs.values()),
            "gmacs": sum(times[stage] * cost["gmacs"] for stage, cost in costs.items()),
        }
        presets[name] = costs

    torch.set_num_threads(1)
    mini = build(PFD_PRESETS["pfd-mini"], 0)
    crops, noise = torch.rand(4, 3, 224, 224), mini.noise(0, 0)
    parts: dict[str, Callable[[], object]] = {
        stage: partial(mini.get_submodule(stage), *given) for stage, given in inputs(mini).items()
    }
    parts |= {"a crop": partial(mini, crops[:1], noise), "four crops": partial(mini, crops, noise)}
    with torch.inference_mode():
        _, spent = seconds_in_turn(parts, ROUNDS, warm=3)
    median = {name: round(1000 * statistics.median(seconds), 2) for name, seconds in spent.items()}
    write("pfd", {"presets": presets, "milliseconds": median, "what": "processor time in PyTorch, one thread"})


if __name__ == "__main__":
    main()
