"""What the pictures of a report are called and what they mean, from the engine's manifest."""

import math
from dataclasses import dataclass

from ...engine.manifest import Manifest, StageName
from ...engine.schedule import Kind
from .markup import Html, join

DIFFERENCE, SCORE_MAP, WEIGHT_MAP, PRODUCT = "difference", "score_map", "weight_map", "product"


@dataclass(frozen=True)
class Label:
    """How a picture is called and explained."""

    title: Html
    plain: str  # the title where only text can stand
    short: str  # beside the title
    about: str


def make_labels(manifest: Manifest, taken: int | None = None) -> dict[str, Label]:
    """Return the names and explanations of all pictures an engine has, in the order they are shown.

    `taken` is the number of steps, if not all of the engine's.
    """
    labels: dict[str, Label] = {}
    steps = manifest.schedule.steps
    labels[Kind.DIS] = Label(Html("Original"), "Original", "as scored", "The image as it was scored.")
    noise = {kind: _noise(manifest, kind) for kind in manifest.kinds if kind in {Kind.T1, Kind.T2}}
    if Kind.Y0 in manifest.kinds:
        about = (
            f"The restoration: what the diffusion network makes of the image in {taken or steps} steps. A good image "
            "leaves it little to restore."
        )
        labels[Kind.Y0] = Label(Html("y<sub>0</sub>"), "y0", "restored", about)
    for kind, level in noise.items():
        step = manifest.taps.step_of(kind)
        least = level == min(noise.values())
        about = (
            f"The restoration with {'a little' if least else 'more'} noise left (step {step} of {steps}, counted down "
            f"to 0): standard deviation {level:.2f} on the model’s scale of −1 … 1, about {level * 127.5:.0f} of 255 "
            "levels."
        )
        digit = kind.value[-1]
        title = Html(f"y<sub>t{digit}</sub>")
        labels[kind] = Label(title, f"y_t{digit}", f"step {step}, {'a little noise' if least else 'noisier'}", about)
    if Kind.Y0 in manifest.kinds:
        about = (
            "How far the restoration moved each pixel, in levels of 255: the mean over the three channels and over "
            "small blocks."
        )
        title = Html("|dis − y<sub>0</sub>|")
        labels[DIFFERENCE] = Label(title, "Difference of original and y0", "levels of 255", about)
    if manifest.flow.score:
        about = "The score of each crop. Where crops overlap, their mean."
        labels[SCORE_MAP] = Label(Html("Score map"), "Score map", "score", about)
        for found in manifest.flow.probabilities:
            name = found.output.capitalize()
            about = (
                f"How probable each crop finds the word that fits the whole image best, of {', '.join(found.words)}."
            )
            labels[found.output] = Label(join(name), name, "probability", about)
        return labels
    branch = "VCG" if manifest.stage(StageName.VCG) else "VDA"
    texts = {
        SCORE_MAP: ("Score map", "score", f"How good the {branch} branch finds each place."),
        WEIGHT_MAP: (
            "Weight map",
            "weight, 0 … 1",
            f"How much each place counts. {branch} is the sum of score × weight, divided by the sum of weights.",
        ),
        PRODUCT: ("Score × weight", f"share in {branch}", f"What each place adds to the sum that gives {branch}."),
    }
    labels.update({name: Label(Html(title), title, unit, about) for name, (title, unit, about) in texts.items()})
    return labels


def _noise(manifest: Manifest, kind: Kind) -> float:
    """Return the standard deviation of the noise in a tapped state: that of the step it will enter next."""
    return math.sqrt(1 - manifest.schedule.alpha_bar[manifest.taps.step_of(kind) - 1])
