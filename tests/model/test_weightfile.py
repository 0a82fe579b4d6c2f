"""Reading a weights file: what is refused and in which words, and that nothing in it ever runs."""

import hashlib
import os
import pickle
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import nn

from diffiqa.errors import CheckpointError
from diffiqa.model import weightfile
from diffiqa.model.weightfile import read

SEED = 7


def saved(path: Path, content: Any, **options: Any) -> Path:
    torch.save(content, path, **options)
    return path


def refusal(path: Path) -> str:
    with pytest.raises(CheckpointError) as info:
        read(path)
    return str(info.value)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is empty"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 5\n", "git lfs pull"),
        (b"\n<!DOCTYPE html><html><title>Sign in</title></html>", "probably a failed download"),
        (b"\x89PNG\r\n\x1a\n" + bytes(50), "is a PNG image"),
        (b"\xff\xd8\xff\xe0" + bytes(50), "is a JPEG image"),
        (b'{"weights": "none"}', "is JSON text"),
        (b"\x1f\x8b\x08" + bytes(50), "unpack it first"),
        (pickle.dumps({"a": 1}), "a Python pickle that torch.save did not write"),
        (b"epoch,loss\n1,0.5\n", "neither a torch checkpoint nor safetensors (it begins with b'epoch,loss"),
        (bytes(1000), "neither a torch checkpoint nor safetensors"),
        ((5000).to_bytes(8, "little") + b'{"a":', "truncated safetensors"),
        (b"PK\x03\x04", "truncated or damaged"),
    ],
)
def test_file_that_is_no_checkpoint_is_named_for_what_it_is(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "model.pt"
    path.write_bytes(content)
    text = refusal(path)
    assert message in text
    assert "\n" not in text


def test_paths_that_cannot_be_read_are_refused(tmp_path: Path) -> None:
    assert "there is no file" in refusal(tmp_path / "model.pt")
    assert "is a directory" in refusal(tmp_path)
    assert "not a regular file" in refusal(Path("/dev/null"))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (torch.ones(3), "holds a Tensor, not tensors by name"),
        ([torch.ones(3)], "holds a list, not tensors by name"),
        ({"epoch": 3}, "holds no tensors by name"),
        ({"diffiqa_format": 1, "config": {}}, "it has no weights"),
    ],
)
def test_torch_file_without_named_tensors_is_refused(tmp_path: Path, content: Any, message: str) -> None:
    assert message in refusal(saved(tmp_path / "m.pt", content))


def test_torchscript_program_is_refused(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "m.pt", "w") as archive:
        for name in ("m/data.pkl", "m/constants.pkl", "m/code/__torch__.py"):
            archive.writestr(name, b"x")
    assert "TorchScript" in refusal(tmp_path / "m.pt")


def test_other_archives_are_refused(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "vit.npz", "w") as archive:
        archive.writestr("cls.npy", b"x")
    assert "not one that torch.save wrote" in refusal(tmp_path / "vit.npz")


def tensors() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(SEED)
    return {f"layer.{i}.weight": torch.randn(50, i, generator=generator) for i in range(1, 9)}


WRITERS: dict[str, Callable[[Path], Any]] = {
    "zip": lambda path: torch.save(tensors(), path),
    "legacy": lambda path: torch.save(tensors(), path, _use_new_zipfile_serialization=False),
    "safetensors": lambda path: safetensors.torch.save_file(tensors(), path),
}


@pytest.mark.parametrize("write", WRITERS.values(), ids=WRITERS)
def test_every_format_is_recognised_by_content(tmp_path: Path, write: Callable[[Path], Any]) -> None:
    path = tmp_path / "weights.png"
    write(path)
    file = read(path)
    assert file.bundle is None
    assert file.ignored == ()
    assert file.bytes == path.stat().st_size
    assert file.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()
    assert {name: tensor.tolist() for name, tensor in file.weights.items()} == {
        name: tensor.tolist() for name, tensor in tensors().items()
    }


@pytest.mark.parametrize("write", WRITERS.values(), ids=WRITERS)
def test_truncated_file_is_refused_wherever_it_ends(tmp_path: Path, write: Callable[[Path], Any]) -> None:
    whole = tmp_path / "whole"
    write(whole)
    content = whole.read_bytes()
    for size in [1, 7, 8, 9, 30, 100, len(content) // 3, len(content) // 2, len(content) - 100, len(content) - 1]:
        whole.write_bytes(content[:size])
        assert "\n" not in refusal(whole)


def test_file_above_the_size_limit_is_refused_unread(tmp_path: Path) -> None:
    path = tmp_path / "m.pt"
    with path.open("wb") as file:
        file.truncate(weightfile.MAX_BYTES + 1)  # sparse: takes no disk
    assert "has 16 GiB; at most 16 are read" in refusal(path)


def test_compressed_archive_is_refused(tmp_path: Path) -> None:
    with zipfile.ZipFile(saved(tmp_path / "m.pt", {"a": torch.zeros(100_000)})) as source:
        entries = {name: source.read(name) for name in source.namelist()}
    with zipfile.ZipFile(tmp_path / "bomb.pt", "w", zipfile.ZIP_DEFLATED) as bomb:
        for name, data in entries.items():
            bomb.writestr(name, data)
    assert (tmp_path / "bomb.pt").stat().st_size < 10_000
    assert "compressed or overlapping" in refusal(tmp_path / "bomb.pt")


def test_archive_of_overlapping_entries_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "m.pt"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("m/data.pkl", bytes(1000))
        for i in range(100):  # the directory names the same bytes a hundred times
            twin = zipfile.ZipInfo(f"m/data/{i}")
            for field in ("header_offset", "file_size", "compress_size", "CRC"):
                setattr(twin, field, getattr(archive.filelist[0], field))
            archive.filelist.append(twin)
    assert "compressed or overlapping" in refusal(path)


def test_file_that_changes_while_it_is_read_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "m.pt"
    torch.save(tensors(), path)
    whole = path.read_bytes()
    real = torch.load

    def slow_load(*args: Any, **options: Any) -> Any:
        content = real(*args, **options)
        path.unlink()
        path.write_bytes(whole + b"!")
        return content

    monkeypatch.setattr(torch, "load", slow_load)
    assert "changed while it was read" in refusal(path)


class Payload:
    """Unpickled, creates the folder `marker`."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.marker),)


class Shell(Payload):
    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"mkdir {self.marker}",)


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
@pytest.mark.parametrize(("payload", "name"), [(Payload, "posix.mkdir"), (Shell, "posix.system")])
def test_pickle_that_runs_code_is_refused_and_nothing_runs(
    tmp_path: Path, payload: type[Payload], name: str, zipped: bool
) -> None:
    marker = tmp_path / "marker"
    content = {"conv1.weight": torch.ones(1), "note": payload(marker)}
    path = saved(tmp_path / "evil.pt", content, _use_new_zipfile_serialization=zipped)
    message = refusal(path)
    assert not marker.exists()
    assert f"would run Python code ({name})" in message
    torch.load(path, weights_only=False)  # the trap was armed
    assert marker.exists()


def test_pickled_module_is_refused_with_the_way_to_its_weights(tmp_path: Path) -> None:
    path = saved(tmp_path / "epoch1", nn.Linear(2, 2))
    message = refusal(path)
    assert "would run Python code (torch.nn.modules.linear.Linear)" in message
    assert "c = torch.load('epoch1', weights_only=False, map_location='cpu')" in message
    assert "torch.save(c['state_dict'] if isinstance(c, dict) else c.state_dict(), 'weights.pt')" in message
