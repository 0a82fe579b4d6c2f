"""A file of weights → its tensors by name. Recognised by content; nothing in it is ever executed.

Reads safetensors and both of torch's formats. A damaged, foreign or hostile file ends in one CheckpointError.
"""

import hashlib
import json
import os
import re
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors
import torch
from torch import Tensor, nn

from ..errors import CheckpointError

MAX_BYTES = 16 * 2**30  # the largest network a configuration allows is far smaller
MAX_INDEX_BYTES = 16 * 2**20
MAX_SAFETENSORS_HEADER = 100_000_000  # safetensors' own limit
LEGACY_MAGIC = bytes.fromhex("8a0a6cfc9c46f9206aa850192e")  # torch's magic number, pickled

# What training scripts put around a state_dict. A moving average of the weights comes first: people evaluate with it.
AVERAGES = ("ema_state_dict", "state_dict_ema", "model_ema", "params_ema", "ema_model", "ema")
WRAPPERS = ("state_dict", "model", "model_state_dict", "params", "net")
WRAPPED_PREFIXES = {"module", "_orig_mod"}  # DataParallel's, torch.compile's

HOW_TO_RESAVE = (
    "If you trust the file, re-save only its weights, where the code that made it is installed:\n"
    "  python -c \"import torch; c = torch.load('{name}', weights_only=False, map_location='cpu'); "
    "torch.save(c['state_dict'] if isinstance(c, dict) else c.state_dict(), 'weights.pt')\""
)
INDEX = ".index.json"  # ends the name of the list of a network's shards
# What a folder is read for, the first that is there: transformers, accelerate and diffusers save under these names.
IN_FOLDERS = [
    f"{stem}{suffix}"
    for stem in ("model.safetensors", "pytorch_model.bin", "diffusion_pytorch_model.safetensors")
    for suffix in ("", INDEX)
]

# What people hand over by mistake, by how it begins.
STRANGERS = {
    b"version https://git-lfs": "is a Git LFS pointer, not the weights it points to: run `git lfs pull`",
    b"<": "is an HTML or XML page, not weights: probably a failed download; fetch the file itself",
    b"\x89PNG": "is a PNG image, not weights",
    b"\xff\xd8\xff": "is a JPEG image, not weights",
    b"\x1f\x8b": "is gzip-compressed: unpack it first",
    b"\x89HDF": "is an HDF5 file (Keras?), not a PyTorch checkpoint",
    b"{": "is JSON text, not weights",
    b"\x80": "is a Python pickle that torch.save did not write; only torch and safetensors files are read",
}


@dataclass(frozen=True)
class WeightFile:
    """What a file or its shards hold. The tensors may be mapped from the file: copy what is kept."""

    path: Path
    sha256: str
    bytes: int
    weights: dict[str, Tensor]
    bundle: dict[str, Any] | None  # what a diffiqa bundle says about itself: format, config, sources, notes
    ignored: tuple[str, ...]  # entries beside the weights that are no tensors
    average: str = ""  # the entry that the weights are a moving average of, if that was chosen


def read(path: Path) -> WeightFile:
    """Read a file of weights, the shards of an index, or what a folder has of these; raises CheckpointError."""
    if path.is_dir():
        found = next((path / name for name in IN_FOLDERS if (path / name).is_file()), None)
        if found is None:
            raise CheckpointError(f"{path} is a directory, and has no {' or '.join(IN_FOLDERS[::2])}: name the file")
        path = found
    return _read_shards(path) if path.name.endswith(INDEX) else _read_file(path)


def read_index(path: Path) -> dict[str, str]:
    """Return the file beside it in which an index says each tensor is. Raises CheckpointError."""
    try:
        if _stat(path).st_size > MAX_INDEX_BYTES:
            raise CheckpointError(f"{path} has more than {MAX_INDEX_BYTES} bytes, which no index of shards needs")
        index = json.loads(path.read_bytes())
        shards = index["weight_map"]
        entries = {str(name): str(shard) for name, shard in shards.items()}
    except OSError as exc:
        raise CheckpointError(f"cannot read {path}: {exc.strerror or exc}") from exc
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as exc:
        raise CheckpointError(
            f"{path} is a damaged index of shards: it has no weight_map of tensors and files"
        ) from exc
    # Any other name would lead out of the folder. Links may do so: the hub's cache is made of them.
    if strange := [
        shard for shard in entries.values() if not re.fullmatch(r"\w[\w.-]{0,200}", shard) or shard.endswith(INDEX)
    ]:
        raise CheckpointError(f"{path} names {shown(strange[0])}, which is no file of weights beside it; refused")
    return entries


def _read_shards(path: Path) -> WeightFile:
    index = read_index(path)
    weights: dict[str, Tensor] = {}
    digest, size = hashlib.sha256(), 0
    for shard in sorted(set(index.values())):
        part = _read_file(path.with_name(shard))
        size += part.bytes
        if size > MAX_BYTES:
            raise CheckpointError(f"the shards of {path} have more than the {MAX_BYTES // 2**30} GiB that are read")
        if set(part.weights) != {_unwrapped(name) for name, file in index.items() if file == shard}:
            raise CheckpointError(f"{part.path} does not hold the tensors that {path} says: copy both again")
        weights |= part.weights
        digest.update(bytes.fromhex(part.sha256))
    if not weights:
        raise CheckpointError(f"{path} lists no shards")
    return WeightFile(path, digest.hexdigest(), size, weights, None, ())


def _read_file(path: Path) -> WeightFile:
    try:
        before = _stat(path)
        with path.open("rb") as file:
            start = file.read(64)
            bundle, content = _parse(path, start, before.st_size)
            file.seek(0)
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        changed = _identity(_stat(path)) != _identity(before)
    except OSError as exc:
        raise CheckpointError(f"cannot read {path}: {exc.strerror or exc}") from exc
    if changed:
        raise CheckpointError(f"{path} changed while it was read: try again when nothing writes to it")
    weights, ignored, average = _named_tensors(path, content)
    return WeightFile(path, digest, before.st_size, weights, bundle, ignored, average)


def shown(name: str) -> str:
    """Return a name from a file so that it can be printed: no control characters, no endless text."""
    name = name[:400]
    name = name if name.isprintable() else ascii(name)
    return name if len(name) < 400 else name[:399] + "…"


def listed(names: Sequence[str]) -> str:
    """Return the first few names, and how many more there are."""
    return ", ".join(map(shown, names[:8])) + (f" … and {len(names) - 8} more" if len(names) > 8 else "")


def not_finite(weights: Mapping[str, Tensor]) -> list[str]:
    """Return the names of the tensors with a NaN or an infinity."""
    return [name for name, tensor in weights.items() if not tensor.isfinite().all()]


def _stat(path: Path) -> os.stat_result:
    """Return the status of a file that is worth opening."""
    if not path.exists():
        raise CheckpointError(f"there is no file {path}")
    if path.is_dir():
        raise CheckpointError(f"{path} is a directory, not a weights file")
    if not path.is_file():
        raise CheckpointError(f"{path} is not a regular file")
    status = path.stat()
    if status.st_size == 0:
        raise CheckpointError(f"{path} is empty")
    if status.st_size > MAX_BYTES:
        raise CheckpointError(f"{path} has {status.st_size / 2**30:.0f} GiB; at most {MAX_BYTES // 2**30} are read")
    return status


def _identity(status: os.stat_result) -> tuple[int, ...]:
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns


def _parse(path: Path, start: bytes, size: int) -> tuple[dict[str, Any] | None, Any]:
    """Return what a bundle says about itself (None in others), and the content: names to tensors, maybe wrapped."""
    if start.startswith(b"PK\x03\x04"):
        _check_zip(path, size)
        # Mapped, so that a file with far more in it than this model needs costs no memory, and so that torch bounds
        # every tensor by the file. Whoever keeps a tensor copies it: see `checkpoint`.
        return _split_bundle(path, _torch_load(path, mmap=True))
    if LEGACY_MAGIC in start:
        return _split_bundle(path, _torch_load(path, mmap=False))  # this format cannot be mapped
    header = int.from_bytes(start[:8], "little")
    if start[8:9] == b"{" and header <= MAX_SAFETENSORS_HEADER:
        if header > size - 8:
            raise CheckpointError(f"{path} is a truncated safetensors file: copy it again")
        return _read_safetensors(path)
    text = start.removeprefix(b"\xef\xbb\xbf").lstrip()
    for beginning, words in STRANGERS.items():
        if text.startswith(beginning):
            raise CheckpointError(f"{path} {words}")
    raise CheckpointError(f"{path} is neither a torch checkpoint nor safetensors (it begins with {start[:16]!r})")


def _check_zip(path: Path, size: int) -> None:
    """Refuse an archive that is no torch checkpoint, or that would unpack to more than the file holds."""
    try:
        with zipfile.ZipFile(path) as archive:
            entries = archive.infolist()
    except (zipfile.BadZipFile, ValueError, NotImplementedError, EOFError) as exc:
        raise CheckpointError(f"{path} is a truncated or damaged torch checkpoint ({exc}): copy it again") from exc
    names = {entry.filename.rpartition("/")[2] for entry in entries}
    if "constants.pkl" in names:
        raise CheckpointError(f"{path} is a TorchScript program, not weights: save the module's state_dict() instead")
    if "data.pkl" not in names:
        raise CheckpointError(f"{path} is a ZIP archive, but not one that torch.save wrote")
    # torch.save neither compresses nor overlaps: an archive that does so is made to blow up.
    if any(e.compress_type != zipfile.ZIP_STORED for e in entries) or sum(e.file_size for e in entries) > size:
        raise CheckpointError(f"{path} has compressed or overlapping entries, which torch.save never writes")


def _torch_load(path: Path, *, mmap: bool) -> Any:
    try:
        return torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)
    except Exception as exc:
        # Anything: a damaged pickle raises whatever its broken bytes happen to call for.
        if wanted := re.search(r"GLOBAL (\S+)", str(exc)):
            name = path.name.replace("'", "")
            raise CheckpointError(
                f"{path} holds more than weights: reading it would run Python code ({shown(wanted[1])}), so it is "
                f"refused. {HOW_TO_RESAVE.format(name=shown(name))}"
            ) from exc
        reason = shown((str(exc) or type(exc).__name__).split("\n", 1)[0])
        raise CheckpointError(f"{path} is a truncated or damaged torch checkpoint: {reason}") from exc


def _split_bundle(path: Path, content: Any) -> tuple[dict[str, Any] | None, Any]:
    """Take our own `.pt` bundle apart; anything else passes."""
    if not isinstance(content, dict) or "diffiqa_format" not in content:
        return None, content
    if not isinstance(content.get("weights"), dict):
        raise CheckpointError(f"{path} is a damaged diffiqa bundle: it has no weights")
    bundle = {"format" if key == "diffiqa_format" else key: value for key, value in content.items() if key != "weights"}
    if not _is_json(bundle):
        raise CheckpointError(f"{path} is a damaged diffiqa bundle: its description is not plain data")
    return bundle, content["weights"]


def _is_json(value: Any) -> bool:
    """Whether this is plain JSON of sane size: a pickled list may contain itself, or double at every level."""
    waiting = [value]
    for _ in range(10_000):
        if not waiting:
            return True
        item = waiting.pop()
        if isinstance(item, dict) and all(isinstance(key, str) for key in item):
            waiting += item.values()
        elif isinstance(item, list):
            waiting += item
        elif not isinstance(item, str | int | float | None):
            return False
    return False


def _read_safetensors(path: Path) -> tuple[dict[str, Any] | None, Any]:
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            weights = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
            metadata = file.metadata() or {}
    except Exception as exc:  # SafetensorError, and what torch makes of an odd tensor
        raise CheckpointError(f"{path} is a truncated or damaged safetensors file: {shown(str(exc))}") from exc
    if "diffiqa" not in metadata:
        return None, weights
    try:
        bundle = json.loads(metadata["diffiqa"])
    except (ValueError, RecursionError) as exc:
        raise CheckpointError(f"{path} is a damaged diffiqa bundle: its description is not JSON") from exc
    if not isinstance(bundle, dict):
        raise CheckpointError(f"{path} is a damaged diffiqa bundle: its description is not an object")
    return bundle, weights


def _named_tensors(path: Path, content: Any) -> tuple[dict[str, Tensor], tuple[str, ...], str]:
    """Unwrap what training scripts put around a state_dict → tensors by name, what was left aside, and the average."""
    ignored: list[str] = []
    average = ""
    for _ in range(4):  # deep enough for any script; a bound, because a pickle may contain itself
        if not isinstance(content, Mapping):
            raise CheckpointError(f"{path} holds a {type(content).__name__}, not tensors by name")
        wrapper = next((key for key in AVERAGES if _holds_tensors(content.get(key))), "")
        average = average or wrapper
        wrapper = wrapper or next((key for key in WRAPPERS if isinstance(content.get(key), Mapping)), "")
        if not wrapper:
            break
        ignored += [_label(key) for key in content if key != wrapper]
        content = content[wrapper]
    if "optimizer" in content and not any(isinstance(value, Tensor) for value in content.values()):
        twin = path.name.replace("_opt.", "_gen.") if "_opt." in path.name else "…_gen.pth"
        raise CheckpointError(f"{path} is the state of an optimizer; the weights are in the file beside it, {twin}")
    weights: dict[str, Tensor] = {}
    for key, value in content.items():
        if not isinstance(key, str) or not isinstance(value, Tensor):
            ignored.append(_label(key))
            continue
        name = _unwrapped(key)
        if name in weights:
            raise CheckpointError(f"{path} holds {shown(name)} twice, with and without a wrapper's prefix")
        plain = type(value) in {Tensor, nn.Parameter} and "__torch_function__" not in vars(value)
        if not plain or value.layout != torch.strided or value.device.type != "cpu":
            raise CheckpointError(f"{path}: {shown(name)} is not a plain dense tensor")
        weights[name] = value.detach()
    if not weights:
        raise CheckpointError(f"{path} holds no tensors by name")
    return weights, tuple(ignored), average


def _holds_tensors(value: object) -> bool:
    """Whether this is a mapping with tensors in it, or a mapping around one."""
    inner = list(value.values()) if isinstance(value, Mapping) else []
    inner += [item for entry in inner if isinstance(entry, Mapping) for item in entry.values()]
    return any(isinstance(item, Tensor) for item in inner)


def _unwrapped(name: str) -> str:
    return ".".join(part for part in name.split(".") if part not in WRAPPED_PREFIXES)


def _label(key: object) -> str:
    return shown(key) if isinstance(key, str) else f"<{type(key).__name__}>"
