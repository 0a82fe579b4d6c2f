"""PFD-IQA's stages: parameters and multiply-accumulates of one crop, and the time that `pfd-mini` takes in PyTorch.

    python figures/pfd.py    writes results/pfd.json

The tables of docs/pfdiqa.md are made here too.
"""

import dataclasses
import json
import re
import statistics
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from diffiqa.bench import report
from diffiqa.model.pfd import config as choices
from diffiqa.model.pfd.config import PFD_PRESETS, PfdConfig

STAGES = ("encoder", "prior", "denoiser", "decoder")
ROUNDS = 40


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


def main() -> None:
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
