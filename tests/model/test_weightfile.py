"""Reading a weights file: what is refused and in which words, and that nothing in it ever runs."""

import hashlib
import json
import os
import pickle
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
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


def test_file_that_is_no_checkpoint_is_named_for_what_it_is(tmp_path: Path) -> None:
    cases: list[tuple[bytes, str]] = [
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
    ]
    for content, message in cases:
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


# ---- shards, folders, and what training programs put around the weights ----


def sharded(folder: Path, suffix: str = ".safetensors") -> Path:
    """Write `tensors` as two shards with an index, under the names that accelerate gives them."""
    stem = "model" if suffix == ".safetensors" else "pytorch_model"
    names = sorted(tensors())
    parts = {f"{stem}-0000{i}-of-00002{suffix}": names[i - 1 :: 2] for i in (1, 2)}
    for file, chosen in parts.items():
        content = {name: tensors()[name] for name in chosen}
        safetensors.torch.save_file(content, folder / file) if suffix == ".safetensors" else saved(
            folder / file, content
        )
    index = folder / f"{stem}{suffix}.index.json"
    weight_map = {name: file for file, chosen in parts.items() for name in chosen}
    index.write_text(json.dumps({"metadata": {"total_size": 7}, "weight_map": weight_map}))
    return index


@pytest.mark.parametrize("suffix", [".safetensors", ".bin"])
def test_shards_are_one_network_by_index_and_by_folder(tmp_path: Path, suffix: str) -> None:
    index = sharded(tmp_path, suffix)
    for path in (index, tmp_path):
        file = read(path)
        assert file.path == index
        assert {n: t.tolist() for n, t in file.weights.items()} == {n: t.tolist() for n, t in tensors().items()}
        assert file.bytes == sum(shard.stat().st_size for shard in tmp_path.glob("*-of-*"))
    digest = file.sha256
    shard = next(tmp_path.glob("*00001-of-*"))
    content = {name: tensor.clone() for name, tensor in read(shard).weights.items()}
    content |= {sorted(tensors())[0]: torch.full((50, 1), 7.0)}
    safetensors.torch.save_file(content, shard) if suffix == ".safetensors" else saved(shard, content)
    assert read(index).sha256 != digest


def test_one_file_in_a_folder_is_taken_before_shards(tmp_path: Path) -> None:
    sharded(tmp_path)
    safetensors.torch.save_file({"whole": torch.ones(1)}, tmp_path / "model.safetensors")
    assert list(read(tmp_path).weights) == ["whole"]


@pytest.mark.parametrize(
    "name",
    [
        "../m.safetensors",
        "/etc/passwd",
        "sub/m.safetensors",
        "..",
        ".hidden",
        "a\\b",
        "C:m",
        "",
        "model.safetensors.index.json",
    ],
)
def test_an_index_that_leads_out_of_its_folder_is_refused(tmp_path: Path, name: str) -> None:
    (tmp_path / "folder").mkdir()
    index = tmp_path / "folder" / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"layer.1.weight": name}}))
    safetensors.torch.save_file(tensors(), tmp_path / "m.safetensors")
    assert "which is no file of weights beside it; refused" in refusal(index)


def test_shards_that_are_not_what_the_index_says_are_refused(tmp_path: Path) -> None:
    index = sharded(tmp_path)
    whole = index.read_text()
    shard = sorted(tmp_path.glob("*-of-*"))[0]
    index.write_text(whole.replace("layer.1.weight", "layer.1.bias"))
    assert f"{shard} does not hold the tensors that {index} says" in refusal(index)
    index.write_text(whole)
    shard.unlink()
    assert f"there is no file {shard}" in refusal(index)


def test_shards_beyond_the_size_that_is_read_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    index = sharded(tmp_path)
    largest = max(shard.stat().st_size for shard in tmp_path.glob("*-of-*"))
    monkeypatch.setattr(weightfile, "MAX_BYTES", largest)
    assert "have more than the" in refusal(index)
    monkeypatch.setattr(weightfile, "MAX_INDEX_BYTES", 10)
    assert "more than 10 bytes, which no index" in refusal(index)


def test_an_index_without_shards_is_refused(tmp_path: Path) -> None:
    cases: list[str] = [
        "[]",
        "{}",
        "7",
        '{"weight_map": 3}',
        '{"weight_map": {}}',
        '{"weight_map": {"a": 1}}',
        "[" * 99999,
    ]
    for text in cases:
        index = tmp_path / "model.safetensors.index.json"
        index.write_text(text)
        assert "index" in refusal(index)


def test_a_damaged_index_ends_in_one_clear_error_or_in_the_same_weights(tmp_path: Path) -> None:
    index = sharded(tmp_path)
    whole = index.read_bytes()
    generator = np.random.default_rng(SEED)
    damage = [b"{", b'"', b"\xff", b":", b"..", b"[]", b"", b"\\u0000", b"0" * 5000]
    refused = 0
    for _ in range(80):
        data = bytearray(whole)
        for _ in range(generator.integers(1, 4)):
            place = int(generator.integers(len(data)))
            data[place : place + int(generator.integers(1, 4))] = damage[generator.integers(len(damage))]
        index.write_bytes(data)
        try:
            assert set(read(index).weights) == set(tensors())
        except CheckpointError as exc:
            refused += 1
            assert "\n" not in str(exc)  # noqa: PT017
            assert len(str(exc)) < 1500  # noqa: PT017
    assert refused > 40


def test_a_moving_average_is_taken_before_the_weights(tmp_path: Path) -> None:
    for key in ("ema_state_dict", "state_dict_ema", "model_ema", "params_ema", "ema_model", "ema"):
        content = {"state_dict": {"w": torch.zeros(1)}, key: {"w": torch.ones(1)}, "epoch": 3}
        file = read(saved(tmp_path / "m.pt", content))
        assert file.weights["w"].item() == 1
        assert file.average == key
        assert file.ignored == ("state_dict", "epoch")
        nested = read(
            saved(tmp_path / "n.pt", {"model": {"w": torch.zeros(1)}, key: {"state_dict": {"w": torch.ones(1)}}})
        )
        assert (nested.weights["w"].item(), nested.average) == (1, key)


def test_an_average_without_tensors_by_name_is_no_weights(tmp_path: Path) -> None:
    content = {"state_dict": {"w": torch.zeros(1)}, "ema": {"decay": 0.999, "shadow_params": [torch.ones(1)]}}
    file = read(saved(tmp_path / "m.pt", content))
    assert (file.weights["w"].item(), file.average) == (0, "")


def test_what_lightning_saves_beside_the_weights_is_left_aside(tmp_path: Path) -> None:
    content = {
        "epoch": 1,
        "pytorch-lightning_version": "2.4.0",
        "state_dict": {"model.w": torch.ones(1)},
        "callbacks": {"ModelCheckpoint{'monitor': 'srcc'}": {"best_model_score": torch.ones(())}},
        "optimizer_states": [{"state": {0: {"exp_avg": torch.ones(2)}}}],
        "hyper_parameters": {"lr": 1e-5, "model": "maniqa"},
    }
    file = read(saved(tmp_path / "last.ckpt", content))
    assert list(file.weights) == ["model.w"]
    assert "hyper_parameters" in file.ignored
