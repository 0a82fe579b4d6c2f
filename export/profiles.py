"""Batch and image sizes as given to `iqa-build` → the shapes of every optimization profile, as plain data."""

from collections.abc import Sequence

from ..engine.manifest import Manifest, ShapeRange, Stage
from ..errors import UsageError

BATCHES = ("1", "8")
LARGEST = 65_536  # number in a profile: more is a typing error


def default_sizes(manifest: Manifest) -> tuple[str, ...]:
    """Return the crop size alone, and a family for whole images and tiles."""
    crop = manifest.crop.size
    one = f"{crop}x{crop}"
    tuned, largest = max(512, crop), max(1024, crop)
    return (one, f"{one}:{tuned}x{tuned}:{largest}x{largest}")


def stage_profiles(
    manifest: Manifest, stage: Stage, batches: Sequence[str], sizes: Sequence[str]
) -> tuple[dict[str, ShapeRange], ...]:
    """Return the profiles of a stage: for the U-Net one for each batch and size, else one for each batch.

    A batch N or a size HxW is exact; MIN:OPT:MAX is a family. Batches count crops: the ViT gets one image for each
    kind of a crop. A family of sizes takes one image at a time, because whole images differ in size and the engine
    reserves memory for the largest. Raises UsageError.
    """
    spans = [_family(text, "batch", 1, 1) for text in batches]
    areas = [_family(text, "size", 2, manifest.alignment) for text in sizes]
    if any("H" in spec.shape for spec in stage.inputs):
        one = _family("1", "batch", 1, 1)
        static = [(span, area) for area in areas if area[0] == area[2] for span in spans]
        pairs = static + [(one, area) for area in areas if area[0] != area[2]]
    else:
        pairs = [(span, ((0, 0),) * 3) for span in spans]
    profiles = []
    for span, area in pairs:
        dims = [
            {"B": batch, "N": batch * len(manifest.kinds), "H": height, "W": width}
            for (batch,), (height, width) in zip(span, area, strict=True)
        ]
        profiles.append({spec.name: ShapeRange(*map(spec.at, dims)) for spec in stage.inputs})
    return tuple(profiles)


def _family(text: str, what: str, length: int, multiple: int) -> tuple[tuple[int, ...], ...]:
    """Return (min, opt, max) of a text such as "8", "1:4:16", "224x224" or "224x224:512x384:1024x1024"."""
    form = "HxW or HxW:HxW:HxW" if length == 2 else "N or MIN:OPT:MAX"
    parts = text.lower().split(":")
    members = [tuple(int(n) if n.isascii() and n.isdigit() else 0 for n in part.split("x")) for part in parts]
    if len(members) not in {1, 3} or any(len(m) != length or not 0 < min(m) <= max(m) <= LARGEST for m in members):
        raise UsageError(f"{what} {text!r} is not of the form {form} with numbers from 1 to {LARGEST}")
    low, best, high = members * 3 if len(members) == 1 else members
    if not all(a <= b <= c for a, b, c in zip(low, best, high, strict=True)):
        raise UsageError(f"{what} {text!r} must not shrink from minimum to optimum to maximum")
    if any(number % multiple for member in members for number in member):
        raise UsageError(f"{what} {text!r}: this engine takes multiples of {multiple}")
    return low, best, high
