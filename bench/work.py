"""The work for an image: FLOPs, counted from the ONNX graphs, and the bytes that they move at least."""

import math
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path

from ..engine.manifest import EngineDirectory, Stage, StageName
from ..errors import DiffiqaError, first_line
from ..runtime.plan import Plan
from .results import Work

_FLOAT = 4  # bytes, of the engine's files


def count_work(
    directory: EngineDirectory,
    plan: Plan,
    calls: Mapping[str, int] | None = None,
    images: int = 1,
    item_bytes: int = _FLOAT,
) -> tuple[dict[str, Work], str | None]:
    """Return the work of each stage for one image; if it cannot be counted, an empty dict and the reason.

    `calls` has how often each stage ran for so many `images`; by default once for every window, step and crop.
    """
    kinds, loop, calls = len(directory.manifest.kinds), directory.manifest.flow.loop, calls or {}
    window = plan.windows[0]  # all are of one size
    try:
        found = {}
        for stage in directory.manifest.stages:
            name, size = stage.name, (plan.crop_size, plan.crop_size)
            items, batch, macs = len(plan.crops), 1, stage.macs
            if name is loop.stage and loop.result:
                items *= len(plan.sampling.steps)
            elif name is StageName.UNET:
                items, size = len(plan.windows) * len(plan.sampling.steps), (window.height, window.width)
                if size != (plan.crop_size, plan.crop_size):
                    macs = _unet_macs(directory.file(stage.file), *size)
            elif name is StageName.VIT:
                batch = kinds  # in one call
            items *= images
            made = calls.get(name.value, items)
            flop = 2 * macs * batch * items
            moved = (made * stage.file.bytes + items * _bytes(stage, batch, size)) * item_bytes / _FLOAT
            found[name.value] = Work(made, flop / images / 1e9, flop / moved)
    except ModuleNotFoundError as exc:
        return {}, f"{exc.name} is not installed: pip install 'diffiqa[export]'"
    except (DiffiqaError, OSError) as exc:
        return {}, first_line(exc)
    return found, None


@lru_cache(maxsize=32)
def _unet_macs(path: Path, height: int, width: int) -> int:
    """Count the MACs at a size. The manifest has them for crops; attention grows with the square of the pixels."""
    import onnx

    from ..export.macs import count_macs

    image = (1, 3, height, width)
    return count_macs(onnx.load(path), {"y": image, "condition": image, "noise_level": (1, 1)})


def _bytes(stage: Stage, batch: int, size: tuple[int, int]) -> int:
    sizes = {"B": batch, "N": batch, "H": size[0], "W": size[1]}
    shapes = [spec.shape for spec in (*stage.inputs, *stage.outputs)]
    return sum(_FLOAT * math.prod(sizes[d] if isinstance(d, str) else d for d in shape) for shape in shapes)
