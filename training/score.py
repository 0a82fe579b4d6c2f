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
from typing import Any, NamedTuple, TypeVar

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
from ..engine.crops import Crop, padded_size, place_crops
from ..engine.manifest import StageName
from ..engine.noise import NoiseField
from ..engine.pixels import FloatArray, ImageForm, as_tapped, squash_planes, to_plane
from ..engine.sampling import Sampling
from ..errors import DatasetError, OutputError
from ..evaluation.correlation import rmse
from ..export.graph import export_graph
from ..export.stages import stage_plans
from ..model.checkpoint import part_of
from ..model.config import ModelConfig
from ..model.heads import VDA
from ..model.network import DiffV2IQA, Scores
from ..model.unet import UNet
from ..runtime.host.executor import BoundDenoiser
from ..runtime.host.onnx_stage import OnnxRuntime, OnnxStage
from ..runtime.host.sampler import restore
from ..runtime.images import prepare
from .config import VERSIONS, ScoreConfig, digest, identity
from .loop import QUIETLY, Conduct, Machine, Result, Sample, Verdict, open_machine, picked, train
from .start import begin, weights_digest

KEY_SCHEMA = 2  # of restorations on disk: raised when the same ingredients would give other restorations

LIFT = 2.0  # keeps a guess above the zero of a ReLU on its way
EXPORT_PAYS = 20  # images: fewer are restored sooner by PyTorch than a U-Net is exported for ONNX Runtime


@dataclass(frozen=True)
class Rated:
    """An image and its quality on the data set's own scale: 0 its worst image, 1 its best."""

    path: Path
    quality: float
    distortion: str = ""  # empty for an original, and where it is not known
    shows: str = ""  # what the picture shows: versions of one picture share it


R = TypeVar("R", bound=Rated)


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
        config = self._model.config
        _, pixels = prepare(pixels, config.preparation)
        height, width = pixels.shape[:2]
        rows, columns = padded_size(height, width, config.alignment)
        padding = ((0, 0), (0, rows - height), (0, columns - width))
        planes = method(np.pad(to_plane(pixels), padding, mode="reflect"))[:, :, :height, :width]
        planes = as_tapped(planes, config.tap_form)
        if config.image_form is ImageForm.SQUASHED:
            planes = squash_planes(planes, config.crop)
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
        rows = Sampling.trained(config.schedule).rows(config.schedule, config.taps, config.kinds)
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder, "unet.onnx")
            (plan,) = (plan for plan in stage_plans(model) if plan.name is StageName.UNET)
            export_graph(plan, path, config.alignment)
            stage = OnnxStage(path, OnnxRuntime())

        def restored(image: FloatArray) -> FloatArray:
            size = image.shape[1], image.shape[2]
            denoiser = BoundDenoiser(stage, *size)
            denoiser.condition[:] = image
            planes = restore(denoiser, NoiseField(self._seed, size), rows)
            return np.stack(list(planes.values()))

        return restored


def restoration_key(pixels: Pixels, unet_digest: str, config: ModelConfig, seed: int) -> str:
    """Return the hash of all that restorations depend on: any other ingredient gives another key."""
    fields: dict[str, Any] = {
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
    if config.as_trained:
        fields |= {"as_trained": config.as_trained, "crop": config.crop}
    return digest(fields)


class Group(NamedTuple):
    """Pictures with labels. `versions` are indices of pictures that show one window, for those that are ordered."""

    pictures: Pictures
    labels: Sequence[float]
    versions: Sequence[Sequence[int]] = ()


class Features:
    """What a frozen Lite0 sees of the crops of each picture, (crops, kinds, FEATURES) float16, on disk."""

    def __init__(self, task: "ScoreTask", cache: Path) -> None:
        self._task, self._cache = task, cache
        vda = task.model.vda
        self._weights = weights_digest(vda.lite0.state_dict()) if vda else ""
        self._files: dict[Path, Path] = {}

    def of(self, pictures: Pictures, index: int) -> npt.NDArray[np.float16]:
        """Return the features of a picture, which `fill` has computed."""
        seen: npt.NDArray[np.float16] = np.load(self.file(pictures, index), mmap_mode="r")
        return seen

    def file(self, pictures: Pictures, index: int) -> Path:
        """Return where the features of a picture are, or will be."""
        picture = pictures.files[index]
        if picture not in self._files:
            task, config = self._task, self._task.config
            restored = task.restorations.file(pictures, index).name if task.restores else ""
            causes: dict[str, Any] = {"picture": picture.name, "restored": restored, "encoder": self._weights}
            if config.model.as_trained:
                causes["as_trained"] = config.model.as_trained
            key = digest(causes | {"crop": config.model.crop, "crops": config.validation_crops})
            self._files[picture] = self._cache / f"{key}.npy"
        return self._files[picture]

    @torch.no_grad()
    def fill(self, pictures: Pictures, machine: Machine, say: Callable[[str], None]) -> None:
        """Compute what is missing, this process its share."""
        self._cache.mkdir(parents=True, exist_ok=True)
        own = [index for index in range(len(pictures)) if index % machine.world == machine.rank]
        missing = [index for index in own if not self.file(pictures, index).exists()]
        vda = self._task.model.vda
        for count, index in enumerate(missing):
            crops = torch.from_numpy(self._task.grid(pictures, index)).to(machine.device)
            # With channels last a CPU takes half of the time.
            images = crops.flatten(0, 1).contiguous(memory_format=torch.channels_last)
            seen = (
                vda.lite0(vda.normalise(images)).reshape(*crops.shape[:2], -1).cpu().numpy() if vda else crops.numpy()
            )
            with writing(self.file(pictures, index)) as stream:
                np.save(stream, seen.astype(np.float16))
            if (count + 1) % 100 == 0:
                say(f"looked at {count + 1} of {len(missing)}")


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
        ordered: Group | None = None,
    ) -> None:
        """`network` is without its U-Net; every set is pictures with as many labels, and its restorations are there.

        `ordered` are versions of windows, for the places in a batch that the configuration keeps for them.
        """
        for name, (pictures, labels) in (("training", training), ("validation", validation)):
            if len(pictures) != len(labels) or not all(map(math.isfinite, labels)):
                raise DatasetError(f"the {name} part must have a finite label for each of its {len(pictures)} images")
            if len(set(labels)) < 2:
                raise DatasetError(f"the {name} part has {len(labels)} images without different labels: no use")
        self.config, self.model, self.restorations = config, network, restorations
        self.network: nn.Module = network
        self.training, self.validation, self.ordered = training, validation, ordered
        self.restores = bool(restorations.kinds and config.restored)
        self.features: Features | None = None
        for name, parameters in _parts(network).items():
            for parameter in parameters:
                parameter.requires_grad_(config.rates.of(name) > 0)
        self._frozen: list[nn.Module] = []  # these must also keep their statistics
        if network.vcg and not config.rates.vit:
            self._frozen.append(network.vcg.vit)
        if network.vda and not config.rates.of("vda"):
            self._frozen.append(network.vda)
        for name in ("resnet", "lite0"):
            if hasattr(network.vda, name) and not getattr(config.rates, name):
                self._frozen.append(getattr(network.vda, name))

    def fingerprint(self) -> str:
        """Return a digest of pictures, labels and the restoring U-Net."""
        parts = [[pictures.fingerprint(), list(labels)] for pictures, labels in (self.training, self.validation)]
        if self.ordered:
            parts.append([self.ordered.pictures.fingerprint(), list(self.ordered.labels)])
        return digest({"parts": parts, "restored": self.restorations.file(self.training[0], 0).name})

    def groups(self) -> list[tuple[float, list[nn.Parameter]]]:
        """Return the backbones' and the heads' parameters with their rates; frozen ones not at all."""
        rates, parts = self.config.rates, _parts(self.model)
        rated = [(rates.of(name), parts[name]) for name in ("vit", "resnet", "lite0")]
        heads: dict[float, list[nn.Parameter]] = {}
        for name in ("tabs", "vcg", "vda"):
            heads.setdefault(rates.of(name), []).extend(parts[name])
        return [(rate, parameters) for rate, parameters in (*rated, *heads.items()) if rate and parameters]

    def train_mode(self) -> None:
        """Turn dropout and batch statistics on, but not in frozen backbones."""
        self.network.train()
        for module in self._frozen:
            module.eval()

    def sample(self, step: int, index: int) -> Sample:
        """Return a crop of all kinds (kinds, 3, crop, crop), or its features, and its label and group (2,).

        Every image comes once in each epoch. The first places of a batch are for versions of windows, a group each; the
        group of all others is -1.
        """
        config, (pictures, labels), group = self.config, self.training, -1
        own = config.optimisation.batch - config.ordered
        if self.ordered and index < config.ordered:
            group, place = divmod(index, VERSIONS)
            pictures, labels, windows = self.ordered
            versions = windows[picked(config.seed, step * (config.ordered // VERSIONS) + group, len(windows))]
            number = versions[place % len(versions)]
        else:
            number = picked(config.seed, step * own + index - config.ordered, len(pictures))
        draw = generator(config.seed, Purpose.DATA, step, index)
        label = np.array([labels[number], group], np.float32)
        if self.features:
            seen = self.features.of(pictures, number)
            return Sample((seen[int(draw.integers(len(seen)))].astype(np.float32), label), str(pictures.paths[number]))
        top, left = (int(draw.integers(length - config.model.crop + 1)) for length in self._size(pictures, number))
        crop = self.crop(pictures, number, Crop(top, left))
        if config.flip and draw.random() < 0.5:
            crop = np.ascontiguousarray(crop[..., ::-1])
        return Sample((crop, label), f"{pictures.paths[number]} at row {top}, column {left}")

    def crop(self, pictures: Pictures, number: int, place: Crop) -> FloatArray:
        """Return the same crop of an image and its restorations, (kinds, 3, crop, crop), or of it alone (1, …)."""
        size = self.config.model.crop
        rows, columns = slice(place.top, place.top + size), slice(place.left, place.left + size)
        pixels, model = pictures[number], self.config.model
        pixels, _ = prepare(pixels, model.preparation)
        planes = [to_plane(pixels[rows, columns])[None]]
        if self.restores:
            restored = np.load(self.restorations.file(pictures, number), mmap_mode="r")
            # Again, as float16 is not exact: this undoes its rounding of 8 bits.
            planes.append(as_tapped(restored[:, :, rows, columns].astype(np.float32), model.tap_form))
        return np.concatenate(planes)

    def grid(self, pictures: Pictures, number: int) -> FloatArray:
        """Return the crops of an image that scoring looks at, (crops, kinds, 3, crop, crop)."""
        model = self.config.model
        size = *self._size(pictures, number), model.crop
        places = place_crops(model.crop_places, *size, self.config.validation_crops)
        return np.stack([self.crop(pictures, number, place) for place in places])

    def _size(self, pictures: Pictures, number: int) -> tuple[int, int]:
        """Return the size (height, width) of what crops are cut from."""
        model, (height, width, _) = self.config.model, pictures[number].shape
        return model.preparation.seen(height, width)

    def losses(self, network: Callable[..., object], batch: Sequence[Tensor]) -> Tensor:
        """Return each crop's squared error, that of each branch times its weight, and the terms of the batch.

        Of a group of versions the order alone counts.
        """
        config, images, labels, groups = self.config, batch[0], *batch[1].unbind(1)
        alone = groups < 0
        scores: Scores = network(images)  # type: ignore[assignment]  # maybe through DDP
        total = scores.total.float()
        losses = (total - labels).square() * alone
        if config.branch_weight:
            weighted = ((config.model.vcg_weight, scores.vcg), (config.model.vda_weight, scores.vda))
            branches = [(weight, score.float()) for weight, score in weighted if score is not None and weight]
            whole = sum(weight for weight, _ in branches)
            for _, score in branches:  # the share of the label that each answers for is that of its weight
                losses = losses + config.branch_weight * (whole * score - labels).square() * alone
        if config.ranking_weight:
            losses = losses + config.ranking_weight * ranking_loss(total[alone], labels[alone], config.ranking_margin)
        if not alone.all():  # in a mean over all pairs, the few of versions would not count
            versions = ranking_loss(total[~alone], labels[~alone], config.ranking_margin, groups[~alone])
            losses = losses + config.ordered_weight * versions
        if config.correlation_weight:
            losses = losses + config.correlation_weight * (1 - correlation(total[alone], labels[alone]))
        return losses

    def validate(self, machine: Machine) -> Verdict:
        """Score the validation images on the grid of crops that scoring uses; better is a higher rank correlation."""
        pictures, labels = self.validation
        scores = []
        for number in range(len(pictures)):
            crops = (
                self.features.of(pictures, number).astype(np.float32) if self.features else self.grid(pictures, number)
            )
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


def ranking_loss(scores: Tensor, labels: Tensor, margin: float, groups: Tensor | None = None) -> Tensor:
    """Return the mean over pairs with different labels of max(0, margin·(higher − lower label) − difference in scores).

    With a margin up to 1 it is 0 for perfect scores, and so does not pull against the squared error. Pairs are made
    within each of the `groups`, if there are any.
    """
    differences = labels[:, None] - labels[None]
    pairs = differences > 0
    if groups is not None:
        pairs = pairs & (groups[:, None] == groups[None])
    missing = F.relu(margin * differences - (scores[:, None] - scores[None]))
    mean: Tensor = (missing * pairs).sum() / pairs.sum().clamp(min=1)
    return mean


def correlation(scores: Tensor, labels: Tensor) -> Tensor:
    """Return Pearson's correlation."""
    a, b = scores - scores.mean(), labels - labels.mean()
    found: Tensor = (a * b).sum() / (a.square().sum() * b.square().sum()).clamp(min=1e-12).sqrt()
    return found


def _parts(network: DiffV2IQA) -> dict[str, list[nn.Parameter]]:
    parts: dict[str, list[nn.Parameter]] = {"vit": [], "resnet": [], "lite0": [], "tabs": [], "vcg": [], "vda": []}
    for name, parameter in network.named_parameters():
        if part_of(name) in parts:  # the U-Net is not trained here
            parts[part_of(name)].append(parameter)
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
    lite0: Path | None = None,
    tabs: Path | None = None,
    vcg: Path | None = None,
    start: Path | None = None,
    ordered: Sequence[Rated] = (),
    cache: Path | None = None,
    conduct: Conduct = QUIETLY,
) -> Result:
    """Train both branches; write the weights that validation found best to `model.safetensors`, and `plot.png`.

    `start` is a bundle: the run begins with its trained parts. The others are files for one part each,
    bundles or (`lite0`) published weights; they win over `start`. `ordered` are versions of windows.
    """
    files: dict[Path, tuple[str, ...]] = {start: ()} if start else {}
    parts = {"vit": vit, "resnet": resnet, "lite0": lite0, "tabs": tabs, "vcg": vcg, "unet": unet}
    for part, file in parts.items():
        if file and file != start:
            files[file] = (*files.get(file, ()), part)
    begun = begin(config.model, config.seed, files)
    model, place = begun.model, cache or folder / "cache"
    if config.restored and model.unet is not None and "unet" not in begun.known:
        conduct.say("the U-Net is untrained: its restorations mean nothing")
    with open_machine(conduct.device, config.optimisation.precision) as machine:
        model.to(machine.device)
        restorations = Restorations(model, config.restore_seed, place / "restored")
        chosen = [lot(training, config.pictures), lot(validation, config.validation_pictures)]
        if config.ordered:
            chosen.append(lot(ordered, config.pictures))
        sets = [_filled(config, rated, place, restorations, machine, conduct.say) for rated in chosen]
        if machine.world > 1:
            distributed.barrier()  # each process has restored its share only
        # Scoring crops needs no U-Net: it is neither trained nor saved with each checkpoint, and comes back at the end.
        kept: UNet | None = model.unet
        model.unet = None
        task = ScoreTask(config, model, restorations, sets[0][:2], sets[1][:2], sets[2] if config.ordered else None)
        if config.features:
            features = Features(task, place / "features")
            for pictures, *_ in sets:
                features.fill(pictures, machine, conduct.say)
            task.features = features
        if model.vda and "vda" not in begun.known:
            _prepare(model.vda, task)
            if config.ridge:
                _begin_as_ridge(model.vda, model.tabs, task)
        result = train(task, config, folder, machine, conduct)
        if machine.leads:
            model.load_state_dict(result.weights)
            model.unet = kept
            how = f"diffiqa training, {result.step} steps, configuration {digest(identity(config))}"
            for part in ("vit", "resnet", "lite0", "tabs", "vcg", "vda"):
                if config.rates.of(part):
                    begun.trained(part, how)
            note = f"scores trained on {len(sets[0][0])} images, the weights of step {result.step} were best"
            begun.save(folder, note)
    return result


def _versions(items: Sequence[Rated]) -> list[list[int]]:
    """Return the indices of each window's versions: as it is, and at all levels of one distortion."""
    groups: dict[tuple[str, str], list[int]] = {}
    originals = {item.shows: index for index, item in enumerate(items) if item.shows and not item.distortion}
    for index, item in enumerate(items):
        if item.distortion and item.shows in originals:
            groups.setdefault((item.shows, item.distortion), [originals[item.shows]]).append(index)
    return list(groups.values())


@torch.no_grad()
def _prepare(vda: VDA, task: ScoreTask) -> None:
    """Let differences to restorations count nothing, until a run sees some; fit the readout to what was seen."""
    if not task.restores:
        for linear in (vda.rtab.q, vda.rtab.k, vda.rtab.v):
            linear.weight.zero_()
    if task.features:
        pictures = task.training[0]
        seen = [task.features.of(pictures, index)[:, 0] for index in range(len(pictures))]
        vda.readout.fit(torch.from_numpy(np.concatenate(seen).astype(np.float32)))


@torch.no_grad()
def _begin_as_ridge(vda: VDA, tabs: nn.ModuleList, task: ScoreTask) -> None:
    """Let the branch's score be a ridge regression on the mean features of each picture's crops.

    Its guess is one output of the readout and goes to every token; the rest of the branch hands it on unchanged. What
    is random has no say yet, but learns.
    """
    (pictures, labels), readout, features = task.training, vda.readout, task.features
    assert features  # noqa: S101 — the configuration wants them
    means = np.stack([features.of(pictures, i)[:, 0].astype(np.float32).mean(0) for i in range(len(pictures))])
    x = ((torch.from_numpy(means) - readout.mean) / readout.deviation).double()
    y = torch.tensor(labels, dtype=torch.float64)
    matrix = x.T @ x / x.shape[1] + task.config.ridge * torch.eye(x.shape[1], dtype=torch.float64)
    readout.linear.weight[0] = torch.linalg.solve(matrix, x.T @ (y - y.mean()) / x.shape[1])
    readout.linear.bias[0] = y.mean()
    vda.rtab.v.weight.zero_()
    vda.rtab.v.bias.zero_()
    # With one channel the shared blocks are an affine map of the tokens: it is undone in advance.
    tokens = vda.rtab.residual.out_features
    ends = torch.cat([torch.zeros(1, tokens), torch.eye(tokens)])[:, None]
    for tab in tabs:
        ends = tab(ends)
    shift, *columns = ends[:, 0].double()
    inverse = torch.linalg.inv(torch.stack(columns, dim=1) - shift[:, None])
    vda.rtab.residual.weight.zero_()
    vda.rtab.residual.weight[:, 0] = inverse.sum(dim=1)
    vda.rtab.residual.bias.copy_(-inverse @ shift)
    vda.widen.weight[0], vda.widen.bias[0] = 1, 0  # type: ignore[index]  # it has a bias
    hidden, out, weight = _linear(vda.score, "0"), _linear(vda.score, "3"), _linear(vda.weight, "3")
    hidden.weight[0].zero_()
    hidden.weight[0, 0], hidden.bias[0] = 1, LIFT
    out.weight.zero_()
    out.weight[0, 0], out.bias[0] = 1, -LIFT
    weight.weight.zero_()


def _linear(parent: nn.Module, name: str) -> nn.Linear:
    found = parent.get_submodule(name)
    assert isinstance(found, nn.Linear)  # noqa: S101 — tells the type checker what heads.py builds
    return found


def _filled(
    config: ScoreConfig,
    rated: Sequence[Rated],
    place: Path,
    restorations: Restorations,
    machine: Machine,
    say: Callable[[str], None],
) -> Group:
    """Return a set of which all pictures are decoded and, where the run wants that, restored."""
    pictures, items = prepared(rated, place / "pictures", config.model.crop, say, config.window)
    if config.restored:
        size = restorations.fill(pictures, machine, say)
        say(f"{len(pictures)} images, {size / 1e9:.2f} GB of restorations in {place / 'restored'}")
    return Group(pictures, [item.quality for item in items], _versions(items))


def lot(rated: Sequence[R], count: int) -> list[R]:
    """Draw so many pictures by lot, or all if `count` is 0. Versions of one picture stay together.

    The order drawn depends on names alone: fewer pictures are the first of more.
    """
    drawn = sorted(rated, key=lambda item: hashlib.sha256((item.shows or item.path.name).encode()).digest())
    return drawn[:count] if count else list(rated)


def prepared(
    rated: Sequence[Rated], cache: Path, crop: int, say: Callable[[str], None], window: int = 0
) -> tuple[Pictures, list[Rated]]:
    """Return the pictures that can be used, and the labels of each. Those smaller than a crop are enlarged.

    With a `window`, so much of the middle stands for a picture.
    """
    pictures = Pictures([r.path for r in rated], cache, min_side=crop, enlarge=True, window=window)
    for text in pictures.skipped:
        say(f"left out: {text}")
    of = {r.path: r for r in rated}
    return pictures, [of[path] for path in pictures.paths]
