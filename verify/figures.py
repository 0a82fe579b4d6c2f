"""What a verification measures, as plain numbers: no verdict, no files.

A tensor beside its reference is a `Difference`, an image an `ImageFigures`, a whole run `Findings`.
"""

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from ..engine.manifest import Manifest
from ..engine.sampling import Fast
from ..engine.score import weighted_sum
from .sides import Party
from .trace import HEAD_CALLS, Answers, Trace

Array = npt.NDArray[np.floating]
QUANTILE = 0.99


@dataclass(frozen=True)
class Difference:
    """A tensor beside its reference. Errors are shares of `largest`, the reference's largest absolute value."""

    max: float
    mean: float
    median: float
    quantile: float
    cosine: float
    psnr: float  # dB, against `largest`; infinite where both are equal
    largest: float
    not_finite: int  # NaN and Inf of the candidate; a single one makes all errors infinite


@dataclass(frozen=True)
class ImageFigures:
    """One image: reference and candidate side by side. What a model lacks is empty or None."""

    name: str
    scores: dict[str, tuple[float, float]]  # "score", "vcg", "vda" → (reference, candidate)
    noise: tuple[Difference, ...]  # by step, T − 1 first: each engine on its own way; empty if steps differ
    state: tuple[Difference, ...]  # what each step starts from, likewise
    forced: tuple[Difference, ...]  # noise by step: the candidate on the reference's inputs; empty: not measured
    taps: dict[str, Difference]
    maps: Difference | None
    heads: dict[str, Difference]  # by stage: the candidate on the reference's inputs; empty: not measured


@dataclass(frozen=True)
class RunFigures:
    """What a run measures beyond single images. None: not measured."""

    spread: float | None = None  # standard deviation of the reference's scores between seeds
    spread_seeds: int = 0
    spread_images: int = 0
    repeat: bool | None = None  # the same image gave the same results at once …
    order: bool | None = None  # … and after all others
    batch: dict[str, float] | None = None  # two inputs at once against each alone, by stage
    graph: bool | None = None  # a CUDA graph gave the same results
    graph_note: str = ""  # why there was no graph
    device: float | None = None  # how far scoring on the GPU is from the stages run one by one; None: not on a GPU


@dataclass(frozen=True)
class Findings:
    """All that a verification measured. `limits.judge` turns it into a verdict, under any limits."""

    reference: Party
    candidate: Party
    model: str
    trained: bool
    span: float  # the range of scores: their errors are shares of it
    quantile: float
    seed: int
    images: tuple[ImageFigures, ...]
    asked: int  # images to compare; `images` has fewer if the run ended early
    loop: RunFigures


def difference(reference: Array, candidate: Array, quantile: float = QUANTILE) -> Difference:
    """Compare two arrays of one shape, element by element."""
    want, have = reference.astype(np.float64).ravel(), candidate.astype(np.float64).ravel()
    largest = float(np.abs(want).max())
    if not_finite := int(np.count_nonzero(~np.isfinite(have))):
        far = math.inf
        return Difference(far, far, far, far, cosine=0.0, psnr=-far, largest=largest, not_finite=not_finite)
    error = np.abs(have - want)
    scale = largest or 1.0  # a reference of zeros: the errors themselves
    median, high = np.quantile(error, [0.5, quantile])
    square = _dot(error, error) / error.size
    lengths = math.sqrt(_dot(want, want)) * math.sqrt(_dot(have, have))
    cosine = _dot(want, have) / lengths if lengths else float(not (want.any() or have.any()))
    psnr = 20 * math.log10(scale) - 10 * math.log10(square) if square else math.inf
    return Difference(
        max=float(error.max()) / scale,
        mean=float(error.mean()) / scale,
        median=float(median) / scale,
        quantile=float(high) / scale,
        cosine=min(cosine, 1.0),
        psnr=psnr,
        largest=largest,
        not_finite=0,
    )


def _dot(a: Array, b: Array) -> float:
    # Not `@`: BLAS wakes threads for it, which on busy cores took 8 ms a product, 5 s an image.
    return float(np.einsum("i,i", a, b))


def image_figures(
    manifest: Manifest,
    name: str,
    reference: Trace,
    candidate: Trace,
    answers: Answers | None,
    quantile: float,
    fast: Fast | None = None,
) -> ImageFigures:
    """Return the figures of one image from what both engines computed.

    A `fast` candidate has other steps than its reference, so there are none to compare, and its score is corrected.
    """

    def steps(want: Array, have: Array) -> tuple[Difference, ...]:
        return () if fast else tuple(difference(w, h, quantile) for w, h in zip(want, have, strict=True))

    heads = {}
    if answers:
        pairs = {
            "vit": (reference.maps, answers.maps),
            "vcg": (reference.vcg[:HEAD_CALLS], answers.vcg),
            "vda": (reference.vda[:HEAD_CALLS], answers.vda),
        }
        heads = {stage: difference(want, have, quantile) for stage, (want, have) in pairs.items() if want.size}
    return ImageFigures(
        name=name,
        scores=_scores(manifest, reference, candidate, fast),
        noise=steps(reference.noise, candidate.noise),
        state=steps(reference.state, candidate.state),
        forced=steps(reference.noise, answers.noise) if answers else (),
        taps={
            kind: difference(reference.crops[:, row], candidate.crops[:, row], quantile)
            for row, kind in enumerate(manifest.kinds)
            if row  # the first is the image itself, the same for both
        },
        maps=difference(reference.maps, candidate.maps, quantile) if reference.maps.size else None,
        heads=heads,
    )


def _scores(
    manifest: Manifest, reference: Trace, candidate: Trace, fast: Fast | None
) -> dict[str, tuple[float, float]]:
    """Return the total and the branches' scores of both, means over the crops."""
    branches = {name: (getattr(reference, name), getattr(candidate, name)) for name in ("vcg", "vda")}
    means = {name: (float(w.mean()), float(h.mean())) for name, (w, h) in branches.items() if len(w)}
    want, have = (total_score(manifest, trace.vcg, trace.vda, trace.own) for trace in (reference, candidate))
    return {"score": (want, fast.correction(have) if fast else have), **means}


def total_score(manifest: Manifest, vcg: Array, vda: Array, own: Array | tuple[()] = ()) -> float:
    """Return the score of an image from its crops' branch scores, or their own."""
    if len(own):
        return float(np.mean(own, dtype=np.float64))
    means = (float(scores.astype(np.float64).mean()) if len(scores) else None for scores in (vcg, vda))
    return float(weighted_sum(manifest.score, *means))
