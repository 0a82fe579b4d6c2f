"""Teaching the quality network: it scores crops of an image and its restorations, and learns from people's opinions.

The U-Net is not trained here. It restores every image once; the restorations are kept on disk as float16.
"""

import hashlib
import math
import shutil
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor, distributed, nn

from ..data.draws import Purpose, generator
from ..data.pictures import Pictures, Pixels
from ..engine.agreement import plcc, srcc
from ..engine.atomic import writing
from ..engine.codec import encode
from ..engine.crops import Crop, crop_grid, padded_size
from ..engine.manifest import StageName
from ..engine.noise import NoiseField
from ..engine.pixels import FloatArray, to_plane
from ..errors import DatasetError, OutputError
from ..evaluation.correlation import rmse
from ..export.graph import export_graph
from ..export.stages import stage_plans
from ..model.checkpoint import part_of
from ..model.config import ModelConfig
from ..model.network import DiffV2IQA, Scores
from ..model.unet import UNet
from ..runtime.host.executor import BoundDenoiser
from ..runtime.host.onnx_stage import OnnxRuntime, OnnxStage
from ..runtime.host.sampler import restore
from .config import ScoreConfig, digest, identity
from .loop import QUIETLY, Conduct, Machine, Result, Sample, Verdict, open_machine, picked, train
from .start import begin, weights_digest

KEY_SCHEMA = 2  # of restorations on disk: raised when the same ingredients would give other restorations

EXPORT_PAYS = 20  # images: fewer are restored sooner by PyTorch than a U-Net is exported for ONNX Runtime


@dataclass(frozen=True)
class Rated:
    """An image and its quality on the data set's own scale: 0 its worst image, 1 its best."""

    path: Path
    quality: float
    distortion: str = ""  # empty for an original, and where it is not known


class Restorations:
    """The restorations of whole images, (kinds without `dis`, 3, H, W) float16. A file's name is a hash of its causes.

    They are computed in float32, as `DiffV2IQA.score` does: the image is padded by reflection, and the result cut back.
    """

    def __init__(self, model: DiffV2IQA, seed: int, cache: Path) -> None:
        self._model, self._seed, self._cache = model, seed, cache
        self._files: dict[Path, Path] = {}  # of pictures seen before: hashing one takes longer than reading a crop
        self._weights = weights_digest(model.unet.state_dict()) if model.unet else ""
        self.kinds = len(model.config.kinds) - 1

    def file(self, pictures: Pictures, index: int) -> Path:
        """Return where the restorations of an image are, or will be."""
        picture = pictures.files[index]
        if picture not in self._files:
            key = restoration_key(pictures[index], self._weights, self._model.config, self._seed)
            self._files[picture] = self._cache / f"{key}.npy"
        return self._files[picture]

    def fill(self, pictures: Pictures, machine: Machine, say: Callable[[str], None]) -> int:
        """Compute what is missing, this process its share; return how many bytes all files have together.

        Raises OutputError before anything is computed if they will not fit on the disk.
        """
        if not self.kinds:
            return 0
        self._cache.mkdir(parents=True, exist_ok=True)
        files = [self.file(pictures, index) for index in range(len(pictures))]
        sizes = [pictures[index].size * 2 * self.kinds + 128 for index in range(len(pictures))]
        missing = [index for index in range(len(pictures)) if not files[index].exists()]
        needed, free = sum(sizes[index] for index in missing), shutil.disk_usage(self._cache).free
        if needed > free:
            raise OutputError(
                f"restorations of {len(missing)} images need {needed / 1e9:.1f} GB in {self._cache}, where "
                f"{free / 1e9:.1f} GB are free; choose another place with --cache"
            )
        # Shares go by index and not by place among the missing, which others are making fewer meanwhile.
        own = [index for index in missing if index % machine.world == machine.rank]
        # Not by how many are missing: a run that is resumed must restore as it would have.
        fast = machine.device.type == "cpu" and len(pictures) >= EXPORT_PAYS
        method = self._by_onnxruntime() if fast and own else self._by_torch(machine.device)
        for count, index in enumerate(own):
            restored = self._restored(pictures[index], method)
            with writing(files[index]) as stream:
                np.save(stream, restored)
            if (count + 1) % 100 == 0:
                say(f"restored {count + 1} of {len(own)}")
        return sum(sizes)

    def _restored(self, pixels: Pixels, method: Callable[[FloatArray], FloatArray]) -> npt.NDArray[np.float16]:
        height, width = pixels.shape[:2]
        unet = self._model.config.unet
        rows, columns = padded_size(height, width, unet.alignment if unet else 1)
        padding = ((0, 0), (0, rows - height), (0, columns - width))
        planes = method(np.pad(to_plane(pixels), padding, mode="reflect"))[:, :, :height, :width]
        return planes.astype(np.float16)

    def _by_torch(self, device: torch.device) -> Callable[[FloatArray], FloatArray]:
        """Return what restores an aligned image (3, H, W) into all restored kinds (kinds, 3, H, W)."""

        def restored(image: FloatArray) -> FloatArray:
            planes = self._model.restore(torch.from_numpy(image)[None].to(device), self._seed)
            return np.asarray(torch.cat(list(planes.values())).cpu())

        return restored

    def _by_onnxruntime(self) -> Callable[[FloatArray], FloatArray]:
        """Return what restores an image by the stage that scoring runs: on the CPU in half of PyTorch's time."""
        model, config = self._model, self._model.config
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder, "unet.onnx")
            (plan,) = (plan for plan in stage_plans(model) if plan.name is StageName.UNET)
            export_graph(plan, path, config.unet.alignment if config.unet else 1)
            stage = OnnxStage(path, OnnxRuntime())

        def restored(image: FloatArray) -> FloatArray:
            size = image.shape[1], image.shape[2]
            denoiser = BoundDenoiser(stage, *size)
            denoiser.condition[:] = image
            planes = restore(denoiser, NoiseField(self._seed, size), config.schedule, config.taps, config.kinds)
            return np.stack(list(planes.values()))

        return restored


def restoration_key(pixels: Pixels, unet_digest: str, config: ModelConfig, seed: int) -> str:
    """Return the hash of all that restorations depend on: any other ingredient gives another key."""
    fields = {
        "schema": KEY_SCHEMA,
        "shape": list(pixels.shape),
        "pixels": hashlib.sha256(np.ascontiguousarray(pixels).data).hexdigest(),
        "unet": encode(config.unet),
        "weights": unet_digest,
        "schedule": encode(config.schedule),
        "taps": encode(config.taps),
        "kinds": [str(kind) for kind in config.kinds],
        "seed": seed,
    }
    return digest(fields)


class ScoreTask:
    """Crops of images and their restorations, and the error of the network's scores."""

    kind = "score"

    def __init__(
        self,
        config: ScoreConfig,
        network: DiffV2IQA,
        restorations: Restorations,
        training: tuple[Pictures, Sequence[float]],
        validation: tuple[Pictures, Sequence[float]],
    ) -> None:
        """`network` is without its U-Net; every set is pictures with as many labels, and its restorations are there."""
        for name, (pictures, labels) in (("training", training), ("validation", validation)):
            if len(pictures) != len(labels) or not all(map(math.isfinite, labels)):
                raise DatasetError(f"the {name} part must have a finite label for each of its {len(pictures)} images")
            if len(set(labels)) < 2:
                raise DatasetError(f"the {name} part has {len(labels)} images without different labels: no use")
        self.config, self.model, self.restorations = config, network, restorations
        self.network: nn.Module = network
        self.training, self.validation = training, validation
        for name, parameters in _parts(network).items():
            for parameter in parameters:
                parameter.requires_grad_(getattr(config.rates, name) > 0)
        self._frozen: list[nn.Module] = []  # these must also keep their statistics
        if network.vcg and not config.rates.vit:
            self._frozen.append(network.vcg.vit)
        if network.vda and not config.rates.resnet:
            self._frozen.append(network.vda.resnet)

    def fingerprint(self) -> str:
        """Return a digest of pictures, labels and the restoring U-Net."""
        parts = [[pictures.fingerprint(), list(labels)] for pictures, labels in (self.training, self.validation)]
        return digest({"parts": parts, "restored": self.restorations.file(self.training[0], 0).name})

    def groups(self) -> list[tuple[float, list[nn.Parameter]]]:
        """Return the backbones' and the heads' parameters with their rates; frozen ones not at all."""
        rates, parts = self.config.rates, _parts(self.model)
        rated = ((rates.vit, parts["vit"]), (rates.resnet, parts["resnet"]), (rates.heads, parts["heads"]))
        return [(rate, parameters) for rate, parameters in rated if rate and parameters]

    def train_mode(self) -> None:
        """Turn dropout and batch statistics on, but not in frozen backbones."""
        self.network.train()
        for module in self._frozen:
            module.eval()

    def sample(self, step: int, index: int) -> Sample:
        """Return a crop of all kinds (kinds, 3, crop, crop) and its label (1,); every image once in each epoch."""
        config, (pictures, labels) = self.config, self.training
        number = picked(config.seed, step * config.optimisation.batch + index, len(pictures))
        draw = generator(config.seed, Purpose.DATA, step, index)
        size = config.model.crop
        top, left = (int(draw.integers(length - size + 1)) for length in pictures[number].shape[:2])
        crop = self.crop(pictures, number, Crop(top, left))
        if config.flip and draw.random() < 0.5:
            crop = np.ascontiguousarray(crop[..., ::-1])
        label = np.array([labels[number]], np.float32)
        return Sample((crop, label), f"{pictures.paths[number]} at row {top}, column {left}")

    def crop(self, pictures: Pictures, number: int, place: Crop) -> FloatArray:
        """Return the same crop of an image and its restorations, (kinds, 3, crop, crop), or of it alone (1, …)."""
        size = self.config.model.crop
        rows, columns = slice(place.top, place.top + size), slice(place.left, place.left + size)
        pixels = pictures[number]
        planes = [to_plane(pixels[rows, columns])[None]]
        if self.restorations.kinds and self.config.restored:
            restored = np.load(self.restorations.file(pictures, number), mmap_mode="r")
            planes.append(restored[:, :, rows, columns].astype(np.float32))
        return np.concatenate(planes)

    def losses(self, network: Callable[..., object], batch: Sequence[Tensor]) -> Tensor:
        """Return each crop's squared error, that of each branch times its weight, and the ranking term of the batch."""
        config, images, labels = self.config, batch[0], batch[1][:, 0]
        scores: Scores = network(images)  # type: ignore[assignment]  # maybe through DDP
        total = scores.total.float()
        losses = (total - labels).square()
        if config.branch_weight:
            weighted = ((config.model.vcg_weight, scores.vcg), (config.model.vda_weight, scores.vda))
            branches = [(weight, score.float()) for weight, score in weighted if score is not None and weight]
            whole = sum(weight for weight, _ in branches)
            for _, score in branches:  # the share of the label that each answers for is that of its weight
                losses = losses + config.branch_weight * (whole * score - labels).square()
        if config.ranking_weight:
            losses = losses + config.ranking_weight * ranking_loss(total, labels, config.ranking_margin)
        return losses

    def validate(self, machine: Machine) -> Verdict:
        """Score the validation images on the grid of crops that scoring uses; better is a higher rank correlation."""
        pictures, labels = self.validation
        scores = []
        for number in range(len(pictures)):
            height, width = pictures[number].shape[:2]
            grid = crop_grid(height, width, self.config.model.crop, self.config.validation_crops)
            crops = np.stack([self.crop(pictures, number, place) for place in grid])
            with machine.autocast():
                total = self.model(torch.from_numpy(crops).to(machine.device)).total
            scores.append(float(total.float().mean()))
        return judged(scores, labels)


def judged(scores: Sequence[float], labels: Sequence[float]) -> Verdict:
    """Compare scores with labels; better is a higher rank correlation."""
    error = rmse(scores, labels)
    try:
        row = {"srcc": srcc(scores, labels), "plcc": plcc(scores, labels), "rmse": error}
    except DatasetError:  # a young network may give all images the same score
        row = {"srcc": math.nan, "plcc": math.nan, "rmse": error}
    return Verdict(row, -2.0 if math.isnan(row["srcc"]) else row["srcc"])


def ranking_loss(scores: Tensor, labels: Tensor, margin: float) -> Tensor:
    """Return the mean over pairs with different labels of max(0, margin·(higher − lower label) − difference in scores).

    With a margin up to 1 it is 0 for perfect scores, and so does not pull against the squared error.
    """
    differences = labels[:, None] - labels[None]
    pairs = differences > 0
    missing = F.relu(margin * differences - (scores[:, None] - scores[None]))
    mean: Tensor = (missing * pairs).sum() / pairs.sum().clamp(min=1)
    return mean


def _parts(network: DiffV2IQA) -> dict[str, list[nn.Parameter]]:
    parts: dict[str, list[nn.Parameter]] = {"vit": [], "resnet": [], "heads": []}
    for name, parameter in network.named_parameters():
        parts.get(part_of(name), parts["heads"]).append(parameter)
    return parts


def run_score(
    config: ScoreConfig,
    training: Sequence[Rated],
    validation: Sequence[Rated],
    folder: Path,
    *,
    unet: Path | None = None,
    vit: Path | None = None,
    resnet: Path | None = None,
    start: Path | None = None,
    cache: Path | None = None,
    conduct: Conduct = QUIETLY,
) -> Result:
    """Train both branches; write the weights that validation found best to `model.safetensors`, and `plot.png`.

    `start` is a bundle: the run begins with its trained parts. `unet`, `vit` and `resnet` are bundles for one part
    each; they win over `start`.
    """
    files: dict[Path, tuple[str, ...]] = {start: ()} if start else {}
    for part, file in (("vit", vit), ("resnet", resnet), ("unet", unet)):
        if file and file != start:
            files[file] = (*files.get(file, ()), part)
    begun = begin(config.model, config.seed, files)
    model, place = begun.model, cache or folder / "cache"
    if config.restored and model.unet is not None and "unet" not in begun.known:
        conduct.say("the U-Net is untrained: its restorations mean nothing")
    with open_machine(conduct.device, config.optimisation.precision) as machine:
        model.to(machine.device)
        restorations = Restorations(model, config.restore_seed, place / "restored")
        sets = []
        for rated in (training, validation):
            pictures, items = prepared(rated, place / "pictures", config.model.crop, conduct.say)
            if config.restored:
                size = restorations.fill(pictures, machine, conduct.say)
                conduct.say(f"{len(pictures)} images, {size / 1e9:.2f} GB of restorations in {place / 'restored'}")
            sets.append((pictures, [item.quality for item in items]))
        if machine.world > 1:
            distributed.barrier()  # each process has restored its share only
        # Scoring crops needs no U-Net: it is neither trained nor saved with each checkpoint, and comes back at the end.
        kept: UNet | None = model.unet
        model.unet = None
        task = ScoreTask(config, model, restorations, sets[0], sets[1])
        result = train(task, config, folder, machine, conduct)
        if machine.leads:
            model.load_state_dict(result.weights)
            model.unet = kept
            how = f"diffiqa training, {result.step} steps, configuration {digest(identity(config))}"
            rates = {"vit": config.rates.vit, "resnet": config.rates.resnet}
            for part in ("vit", "resnet", "tabs", "vcg", "vda"):
                if rates.get(part, config.rates.heads):
                    begun.trained(part, how)
            note = f"scores trained on {len(sets[0][0])} images, the weights of step {result.step} were best"
            begun.save(folder, note)
    return result


def prepared(
    rated: Sequence[Rated], cache: Path, crop: int, say: Callable[[str], None]
) -> tuple[Pictures, list[Rated]]:
    """Return the pictures that can be used, and the labels of each. Those smaller than a crop are enlarged."""
    pictures = Pictures([r.path for r in rated], cache, min_side=crop, enlarge=True)
    for text in pictures.skipped:
        say(f"left out: {text}")
    of = {r.path: r for r in rated}
    return pictures, [of[path] for path in pictures.paths]
