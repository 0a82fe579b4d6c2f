"""Results as a scorer would return them, with pictures that look like photographs, made without any engine."""

import hashlib
import io

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageFilter

from diffiqa.engine.crops import crop_grid
from diffiqa.engine.manifest import CropPolicy, FileEntry, Manifest, Provenance, ScoreMeaning, Source, Stage, StageName
from diffiqa.engine.schedule import Kind, Schedule, Taps
from diffiqa.runtime.results import CropScore, Mode, Pictures, Score

from ..tiny import STAGES

CROP = 224
CELL = 8


def fake_manifest(
    *, trained: bool = True, kinds: tuple[Kind, ...] = tuple(Kind), without: tuple[StageName, ...] = ()
) -> Manifest:
    """Return the manifest of an engine that does not exist."""
    names = [name for name in STAGES if name not in without]
    stages = tuple(Stage(name, FileEntry(f"onnx/{name}.onnx", 1, "0" * 64), 20, (), (), 1, 1, ()) for name in names)
    meaning = "Predicted quality on the scale of the checkpoint's training labels, scaled to 0 … 1."
    return Manifest(
        schema=1,
        model={"name": "diff-v2-iqa"},
        schedule=Schedule(),
        taps=Taps(),
        kinds=kinds,
        alignment=16,
        crop=CropPolicy(CROP, 9),
        score=ScoreMeaning(1.0, 1.0, meaning if trained else "Untrained: the scores mean nothing.", trained),
        stages=stages,
        complete=True,
        provenance=Provenance(
            "2026-11-21T09:00:00+00:00",
            {"diffiqa": "0.1.0", "torch": "2.13.0", "onnx": "1.22.0"},
            (Source("iqa", "model.pt", 1, "a" * 64, "torch"),),
            ("batch norm folded",),
        ),
    )


def fake_photo(seed: int, height: int, width: int) -> npt.NDArray[np.uint8]:
    """Return gradients, a horizon, a few discs and texture at several scales."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[0:height, 0:width] / max(height, width)
    colours = rng.uniform(30, 225, (8, 3))
    picture = colours[0] + (colours[1] - colours[0]) * y[..., None]
    ground = y > 0.35 + 0.1 * np.sin(5 * x + seed)
    picture[ground] = (colours[2] * (1.3 - y[..., None]))[ground]
    for colour in colours[3:]:
        cx, cy, radius = rng.uniform(0, 1), rng.uniform(0, height / width), rng.uniform(0.04, 0.16)
        distance = np.hypot(x - cx, y - cy)
        picture[distance < radius] = (colour * (1.2 - 3 * distance[..., None]))[distance < radius]
    for octave in range(2, 8):
        small = rng.normal(0, 1, (2**octave, 2**octave)).astype(np.float32)
        grain = np.asarray(Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC))
        picture += grain[..., None] * 26 / octave * np.where(ground, 1.2, 0.4)[..., None]
    photo: npt.NDArray[np.uint8] = np.clip(picture, 0, 255).astype(np.uint8)
    return photo


def fake_pictures(seed: int, height: int, width: int, harm: float, crops: tuple[CropScore, ...]) -> Pictures:
    """Return a photograph harmed by blur, noise or JPEG, its restorations and maps that fit them."""
    rng = np.random.default_rng(seed)
    pristine = fake_photo(seed, height, width)
    image = Image.fromarray(pristine)
    if seed % 3 == 0:
        harmed = np.asarray(image.filter(ImageFilter.GaussianBlur(0.3 + 5 * harm)))
    elif seed % 3 == 1:
        noise = rng.normal(0, 60 * harm, pristine.shape)
        harmed = np.clip(pristine + noise, 0, 255).astype(np.uint8)
    else:
        stream = io.BytesIO()
        image.save(stream, "JPEG", quality=int(90 - 85 * harm))
        harmed = np.asarray(Image.open(stream))
    restored = np.asarray(Image.fromarray(harmed).filter(ImageFilter.MedianFilter(3)))
    planes = {Kind.DIS: harmed.copy(), Kind.Y0: restored.copy()}
    for kind, level in ((Kind.T1, 21), (Kind.T2, 41)):
        noisy = restored + rng.normal(0, level, restored.shape)
        planes[kind] = np.clip(noisy, 0, 255).astype(np.uint8)
    rows, columns = -(-height // CELL), -(-width // CELL)
    grey = np.asarray(Image.fromarray(pristine).convert("L").resize((columns, rows)), np.float32) / 255
    score = np.clip(0.75 - 0.6 * harm + 0.25 * (grey - 0.5) + rng.normal(0, 0.03, grey.shape), 0, None)
    weight = 1 / (1 + np.exp(-6 * (np.abs(grey - grey.mean()) - 0.15)))
    covered = np.zeros((height, width), bool)
    for crop in crops:
        covered[crop.top : crop.top + CROP, crop.left : crop.left + CROP] = True
    cells = np.ones((CELL, CELL))
    score_map, weight_map = (
        np.where(covered, np.kron(values, cells)[:height, :width], np.nan).astype(np.float32)
        for values in (score, weight)
    )
    return Pictures(planes, score_map, weight_map)


def fake_score(
    seed: int,
    source: str | None = None,
    *,
    height: int = 288,
    width: int = 384,
    crops: int = 9,
    seeds: int = 1,
    pictures: bool = True,
    mode: Mode = Mode.WHOLE,
    notes: tuple[str, ...] = (),
) -> Score:
    """Return the result of image number `seed`; the same number gives the same result."""
    rng = np.random.default_rng(seed)
    harm = float(rng.beta(1.6, 1.9))
    places = crop_grid(height, width, CROP, crops)
    scores = tuple(
        CropScore(place.top, place.left, vcg + vda, vcg, vda)
        for place in places
        for vcg, vda in [(0.62 - 0.45 * harm + rng.normal(0, 0.01), 0.33 - 0.25 * harm + rng.normal(0, 0.01))]
    )
    vcg = float(np.mean([crop.vcg for crop in scores if crop.vcg is not None]))
    vda = float(np.mean([crop.vda for crop in scores if crop.vda is not None]))
    source = source or f"photos/set-{seed % 4}/IMG_{1000 + seed}.jpg"
    return Score(
        source=source,
        score=vcg + vda,
        vcg=vcg,
        vda=vda,
        spread=float(rng.uniform(0.001, 0.01)) if seeds > 1 else None,
        width=width,
        height=height,
        mode=mode,
        seeds=tuple(range(seeds)),
        crops=scores,
        notes=notes,
        digest=hashlib.sha256(f"{seed} {source}".encode()).hexdigest(),
        engine="5f0c9e4b7a12d386",
        backend="onnxruntime 1.30.0: CPU",
        seconds=float(rng.uniform(40, 70)),
        pictures=fake_pictures(seed, height, width, harm, scores) if pictures else None,
    )
