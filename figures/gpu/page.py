"""The part of docs/gpu.md, and a table for the README, that are made of what `scripts/gpu-check` wrote on a card.

`figures/tables.py` puts them between the comments in the documents, and checks that they are the JSON's.
"""

import json
import math
import runpy
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from diffiqa.bench.report import NONE, number, percent, table

FILE = "gpu-check.json"  # in figures/results
NEVER = """**diffiqa has not run on a GPU yet.** Whoever has an NVIDIA card can make this page in a quarter of an hour:

```sh
scripts/gpu-check --out out/gpu-check
scripts/gpu-check --report out/gpu-check/gpu-check.json
```

It needs a checkout, PyTorch with CUDA, and the packages of the extras `cuda` and `export`; no network, and nothing
installed of diffiqa. The second command writes the page, also for several files: one for each run of some steps."""

Steps = dict[str, Any]  # by name: what the JSON has of a step
ROWS = {  # of step times: the step, the figures' name, what it is, its precision
    "inductor": ("inductor", "step", "**diffiqa, backend `inductor`**", "fp16"),
    "onnxruntime": ("onnxruntime", "step", "diffiqa, backend `onnxruntime-gpu`", "fp16"),
    "graph": ("unet", "fp16_graph", "PyTorch, CUDA graph", "fp16"),
    "eager": ("unet", "fp16_eager", "PyTorch", "fp16"),
    "compile graph": ("compile", "graph", "torch.compile, CUDA graph", "fp16"),
    "compile": ("compile", "plain", "torch.compile", "fp16"),
    "autotune": ("autotune", "graph", "torch.compile, max-autotune, CUDA graph", "fp16"),
    "tf32": ("unet", "tf32_graph", "PyTorch, CUDA graph", "TF32"),
    "tf32 eager": ("unet", "tf32_eager", "PyTorch", "TF32"),
    "fp32": ("unet", "fp32_graph", "PyTorch, CUDA graph", "float32"),
    "fp32 eager": ("unet", "fp32_eager", "PyTorch", "float32"),
}


def publish(files: Sequence[Path], root: Path) -> None:
    """Keep what the files say as one, and make the documents' tables of it. Of a step run twice the last counts."""
    found: dict[str, Any] = {}
    for file in files:
        try:
            run = json.loads(file.read_text(encoding="utf-8"))
            if run["dry"] or run["device"] != "cuda":
                sys.exit(f"error: {file} was not made on a GPU, so it says nothing of one")
        except (OSError, ValueError, KeyError, TypeError) as exc:
            sys.exit(f"error: {file} is not what scripts/gpu-check writes: {exc!r}")
        if found and found["machine"]["card"]["name"] != run["machine"]["card"]["name"]:
            sys.exit(f"error: {file} is of another card than {files[0]}")
        known = found.get("steps", {})
        ran = {name: step for name, step in run["steps"].items() if "seconds" in step or name not in known}
        found = run | {"steps": known | ran}
    (root / "figures" / "results" / FILE).write_text(
        json.dumps(found, indent=1, ensure_ascii=False) + "\n", encoding="utf-8"
    )
    sys.argv = ["tables.py", *map(str, (root / "docs" / "gpu.md", root / "README.md"))]
    runpy.run_path(str(root / "figures" / "tables.py"), run_name="__main__")


def gpu(results: Path) -> str:
    """Return the sections of docs/gpu.md that have figures; without any, how to get them."""
    if not (results / FILE).exists():
        return NEVER
    run = json.loads((results / FILE).read_text(encoding="utf-8"))
    steps: Steps = run["steps"]
    parts = {
        "The card": _card(run),
        "What ran": _ran(steps),
        "Kernels": _kernels(steps),
        "One step of the U-Net": _step_times(steps),
        "A whole score": _scores(steps),
        "Other answers": _answers(steps),
        "Training": _training(steps),
    }
    return "\n\n".join(f"## {title}\n\n{text}" for title, text in parts.items() if text)


def gpu_speed(results: Path) -> str:
    """Return the README's table: what a card takes."""
    if not (results / FILE).exists():
        return "Not measured yet: [how to](docs/gpu.md)."
    run = json.loads((results / FILE).read_text(encoding="utf-8"))
    steps, name = run["steps"], run["machine"]["card"]["name"]
    rows = []
    for label, what in (("one crop", "one image"), ("8 images of one crop", "8 images at a time, one image")):
        if row := _of(steps, "score", label):
            rows.append([f"full size (`paper`), {what} of 224×224, fp16", f"{1e3 * row['seconds_per_image']:.0f} ms"])
    best = min((row for row in _times(steps, 8) if row), key=lambda row: row["ms"], default=None)
    if best:
        rows.append(["one step of 8 crops: share of a large fp16 product", percent(best["share_of_matmul"])])
    return table([name, "measured"], rows) or "Not measured yet: [how to](docs/gpu.md)."


def _card(run: Any) -> str:
    machine, figures = run["machine"], _figures(run["steps"], "facts")
    card, packages = machine["card"], machine["packages"]
    versions = ", ".join(f"{name} {text}" for name, text in packages.items() if name in _SHOWN)
    lines = [
        f"{card['name']}, compute capability {card.get('compute_cap', NONE)}, {card.get('memory.total', NONE)}, "
        f"{figures.get('multiprocessors', NONE)} multiprocessors, power limit {card.get('power.limit', NONE)}",
        f"driver {card.get('driver_version', NONE)}, CUDA {figures.get('cuda', NONE)}, "
        f"cuDNN {figures.get('cudnn', NONE)}, Python {machine['python']}, {versions}",
        f"{machine['cpus']} cores of {machine['cpu']}, {machine['system']}",
        f"{run['started'][:10]}, commit {machine['commit'] or NONE}",
    ]
    names = {"fp16": "fp16", "bf16": "bf16", "tf32": "TF32", "fp32": "float32"}
    rows = [
        [f"matrix product of 8192×8192, {names[kind]}", f"{number(figures[f'{kind}_tflops'])} TFLOP/s"]
        for kind in names
        if f"{kind}_tflops" in figures
    ]
    if "copy_gb_per_second" in figures:
        rows.append(["copy within its memory", f"{number(figures['copy_gb_per_second'])} GB/s"])
    return "\n".join(f"- {line}" for line in lines) + "\n\n" + table(["at most", "measured"], rows)


_SHOWN = {"torch", "triton", "cuda-core", "cuda-bindings", "onnxruntime-gpu", "onnxruntime", "tensorrt"}


def _ran(steps: Steps) -> str:
    from diffiqa.figures.gpu.check import STEPS

    shows = {step.name: step.shows for step in STEPS}
    rows = []
    for name, step in steps.items():
        checks = step.get("checks", {})
        bad = [check for check, verdict in checks.items() if not verdict["ok"]]
        good = f"{len(checks) - len(bad)} of {len(checks)}" if checks else NONE
        tests = f"{step['figures']['passed']} tests passed" if "passed" in step.get("figures", {}) else ""
        said = "; ".join(filter(None, (tests, *bad, step.get("why", ""))))
        rows.append([f"`{name}`", shows.get(name, ""), step["status"], good, said, number(step.get("seconds"))])
    return table(["step", "shows", "result", "checks", "", "seconds"], rows)


def _kernels(steps: Steps) -> str:
    figures, tests = _figures(steps, "rates"), _figures(steps, "kernels")
    lines = []
    if tests:
        lines.append(
            f"{tests['passed']} tests compare the kernels on the card with NumPy and with their build for the host: "
            f"{tests['failed']} failed, {tests['skipped']} were skipped."
        )
    if "copy_gb_per_second" in figures:
        copy = statistics.median(figures["copy_gb_per_second"])
        worst = figures.get("sampler_step_worst_share")
        lines.append(
            f"Bytes read and written per second, beside a copy in the same run ({number(copy)} GB/s). The sampler's "
            f"step reaches {percent(worst)} of it or more from 8×384×512 on; the goal is 80%."
        )
        rows = [
            [
                f"`{row['kernel']}`",
                "×".join(map(str, row["size"])),
                number(row["gb_per_second"]),
                percent(row.get("share_of_copy")),
            ]
            for row in figures["kernels"]
        ]
        lines.append(table(["kernel", "batch×height×width", "GB/s", "of a copy"], rows))
    return "\n\n".join(lines)


def _times(steps: Steps, batch: int) -> list[Any]:
    """Return what is known of every row of `ROWS` for so many crops; None where nothing is."""
    return [_of(steps, step, f"{name}_b{batch}") for step, name, *_ in ROWS.values()]


def _step_times(steps: Steps) -> str:
    rows = []
    for batch in (1, 8):
        times = _times(steps, batch)
        best = min((row["ms"] for row in times if row), default=math.nan)
        for (_, _, what, precision), row in zip(ROWS.values(), times, strict=True):
            if row:
                rates = [number(row["ms"]), number(row["ms_per_crop"]), number(row["tflops"])]
                share = percent(row["share_of_matmul"])
                rows.append([str(batch), what, precision, *rates, share, f"{row['ms'] / best:.2f}"])
    head = ["crops", "by", "precision", "ms", "ms per crop", "TFLOP/s", "of a large product", "time, best = 1"]
    text = "Full size (`paper`), 224×224, seeded weights, beside a product of 8192×8192 in fp16 in the same process."
    return f"{text}\n\n{table(head, rows)}" if rows else ""


def _scores(steps: Steps) -> str:
    rows, lines = [], []
    for name, row in _figures(steps, "score").items():
        if not isinstance(row, dict):
            continue
        seconds, plain = row["seconds_per_image"], row.get("seconds_per_image_without_graph")
        launch, without = (row.get(f"host_launching_seconds{end}") for end in ("", "_without_graph"))
        cells = [1e3 * seconds, plain and 1e3 * plain, launch and 1e3 * launch, without and 1e3 * without]
        loop = row.get("loop_over_bare_steps")
        last = [percent(row.get("idle")), f"{loop:.3f}" if loop else NONE, number(row.get("joules_per_image"))]
        rows.append([name, *map(number, cells), *last])
        if "first_seconds" in row:
            first, captured, _ = row["first_seconds"]
            lines.append(
                f"{name}: {number(first)} s for the first, {number(captured)} s for the second with the capture"
            )
    head = ["full size, 50 steps", "ms per image", "without a graph", "host launching, ms", "without a graph"]
    head += ["GPU idle", "loop over 50 bare steps", "J per image"]
    text = (
        "PyTorch's networks in fp16 as stages of our executor: a CUDA graph holds all steps. The peers are PyTorch's "
        "own loop on the card. *Bare steps* are the same network in a graph of its own."
    )
    return (
        "\n\n".join(filter(None, (text, table(head, rows), "\n".join(f"- {line}" for line in lines)))) if rows else ""
    )


def _answers(steps: Steps) -> str:
    lines = [
        f"A table of what depends on the step alone saves {percent(times['saved'])} of a step of {crops}."
        for crops, name in (("one crop", "b1"), ("8 crops", "b8"))
        if (times := _of(steps, "embedding", name))
    ]
    if used := _of(steps, "pool", "used_mib"):
        kept, trimmed = used["freed"] - used["before"], used["trimmed"] - used["before"]
        lines.append(
            f"Of {number(used['held'] - used['before'])} MiB that were freed, the memory pool kept {number(kept)} MiB, "
            f"and {number(trimmed)} MiB after it was trimmed."
        )
    lines += [
        f"compute-sanitizer, {tool}: {'; '.join(said['summary']) or 'no summary'}."
        for tool in ("memcheck", "racecheck")
        if (said := _of(steps, "sanitizer", tool))
    ]
    lines += [
        f"`{step}`: {number(seconds)} s to compile the U-Net for one crop."
        for step in ("compile", "autotune")
        if (seconds := _of(steps, step, "compile_seconds_b1"))
    ]
    return "\n".join(f"- {line}" for line in lines)


def _training(steps: Steps) -> str:
    rows = [
        [
            name,
            number(run["steps_per_second"]),
            number(run["crops_per_second"]),
            str(run["steps"]),
            f"{run['losses'][0]:.3f} → {statistics.fmean(run['losses'][-3:]):.3f}",
        ]
        for name, run in _figures(steps, "training").items()
    ]
    made = table(["`iqa-train restore`, bf16", "steps/s", "crops/s", "steps taken", "loss"], rows)
    return f"Crops of 64×64 in batches of 16, cut and distorted on the CPU as the run goes.\n\n{made}" if rows else ""


def _figures(steps: Steps, name: str) -> dict[str, Any]:
    found: dict[str, Any] = steps.get(name, {}).get("figures", {})
    return found


def _of(steps: Steps, name: str, figure: str) -> Any:
    return _figures(steps, name).get(figure)
