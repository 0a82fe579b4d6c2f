"""How far a tensor is from its reference, and all such figures of one image."""

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from ..engine.manifest import Manifest
from ..engine.score import weighted_sum
from .trace import HEAD_CALLS, Answers, Trace

Array = npt.NDArray[np.floating]
QUANTILE = 0.99


@dataclass(frozen=True)
class Drift:
    """A tensor beside its reference. Errors are shares of `largest`, the reference's largest absolute value."""

    max: float
    mean: float
    median: float
    quantile: float
    cosine: float
    psnr: float  # dB, against `largest`; infinite where both are equal
    largest: float
    not_finite: int  # NaN and Inf of the candidate; any makes the errors infinite


@dataclass(frozen=True)
class ImageFigures:
    """One image: reference and candidate side by side. What a model lacks is empty or None."""

    name: str
    scores: dict[str, tuple[float, float]]  # "score", "vcg", "vda" → (reference, candidate)
    noise: tuple[Drift, ...]  # by step, T − 1 first: each engine on its own way
    state: tuple[Drift, ...]  # what the steps start from, likewise
    forced: tuple[Drift, ...]  # noise by step: the candidate on the reference's inputs; empty where not measured
    taps: dict[str, Drift]
    maps: Drift | None
    heads: dict[str, Drift]  # by stage: the candidate on the reference's inputs; empty where not measured


def compare(reference: Array, candidate: Array, quantile: float = QUANTILE) -> Drift:
    """Compare two arrays of one shape, element by element."""
    want, have = reference.astype(np.float64).ravel(), candidate.astype(np.float64).ravel()
    largest = float(np.abs(want).max())
    if not_finite := int(np.count_nonzero(~np.isfinite(have))):
        far = math.inf
        return Drift(far, far, far, far, cosine=0.0, psnr=-far, largest=largest, not_finite=not_finite)
    error = np.abs(have - want)
    scale = largest or 1.0  # where the reference is 0 throughout, errors are as they are
    median, high = np.quantile(error, [0.5, quantile])
    square = _dot(error, error) / error.size
    lengths = math.sqrt(_dot(want, want)) * math.sqrt(_dot(have, have))
    cosine = _dot(want, have) / lengths if lengths else float(not (want.any() or have.any()))
    psnr = 20 * math.log10(scale) - 10 * math.log10(square) if square else math.inf
    return Drift(
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


def measure(
    manifest: Manifest, name: str, reference: Trace, candidate: Trace, answers: Answers | None, quantile: float
) -> ImageFigures:
    """Return the figures of one image from what both engines computed."""

    def steps(want: Array, have: Array) -> tuple[Drift, ...]:
        return tuple(compare(w, h, quantile) for w, h in zip(want, have, strict=True))

    heads = {}
    if answers:
        pairs = {
            "vit": (reference.maps, answers.maps),
            "vcg": (reference.vcg[:HEAD_CALLS], answers.vcg),
            "vda": (reference.vda[:HEAD_CALLS], answers.vda),
        }
        heads = {stage: compare(want, have, quantile) for stage, (want, have) in pairs.items() if want.size}
    return ImageFigures(
        name=name,
        scores=score_pairs(manifest, reference, candidate),
        noise=steps(reference.noise, candidate.noise),
        state=steps(reference.state, candidate.state),
        forced=steps(reference.noise, answers.noise) if answers else (),
        taps={
            kind: compare(reference.crops[:, row], candidate.crops[:, row], quantile)
            for row, kind in enumerate(manifest.kinds)
            if row  # the image itself is the same for both
        },
        maps=compare(reference.maps, candidate.maps, quantile) if reference.maps.size else None,
        heads=heads,
    )


def score_pairs(manifest: Manifest, reference: Trace, candidate: Trace) -> dict[str, tuple[float, float]]:
    """Return the total and the branches' scores of both, means over the crops."""
    branches = {name: (getattr(reference, name), getattr(candidate, name)) for name in ("vcg", "vda")}
    present = {name: pair for name, pair in branches.items() if len(pair[0])}
    want, have = (total_score(manifest, trace.vcg, trace.vda) for trace in (reference, candidate))
    means = {name: (float(want.mean()), float(have.mean())) for name, (want, have) in present.items()}
    return {"score": (want, have), **means}


def total_score(manifest: Manifest, vcg: Array, vda: Array) -> float:
    """Return the score of an image from its crops' branch scores."""
    means = (float(scores.astype(np.float64).mean()) if len(scores) else None for scores in (vcg, vda))
    return float(weighted_sum(manifest.score, *means))
