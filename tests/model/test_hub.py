"""Weights from the Hugging Face hub: what is asked for, what is said when it is not to be had, and a real download."""

import hashlib
import http.server
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
import safetensors.torch
import torch

from diffiqa.errors import CheckpointError
from diffiqa.model import hub
from diffiqa.model.weightfile import read

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    """What a repository holds: one file, and a network in two shards."""
    root = tmp_path / "repository"
    (root / "sub").mkdir(parents=True)
    shards = {"a.safetensors": {"one": torch.ones(3)}, "b.safetensors": {"two": torch.zeros(2)}}
    for name, weights in shards.items():
        safetensors.torch.save_file(weights, root / "sub" / name)
    index = {"metadata": {}, "weight_map": {n: shard for shard, weights in shards.items() for n in weights}}
    (root / "sub" / "model.safetensors.index.json").write_text(json.dumps(index))
    safetensors.torch.save_file({"all": torch.ones(1)}, root / "model.safetensors")
    return root


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch, repository: Path) -> list[tuple[str, str, str | None]]:
    """A hub in this process: what it was asked for."""
    heard: list[tuple[str, str, str | None]] = []

    def download(name: str, file: str, revision: str | None = None) -> str:
        heard.append((name, file, revision))
        if not (repository / file).is_file():
            raise OSError("404 Client Error.\n\nEntry Not Found")
        return str(repository / file)

    fake = ModuleType("huggingface_hub")
    fake.hf_hub_download = download  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "huggingface_hub", fake)
    return heard


def test_a_file_and_its_revision_are_asked_for(asked: list[tuple[str, str, str | None]], repository: Path) -> None:
    assert hub.is_remote(Path("hf://owner/name/model.safetensors"))
    assert not hub.is_remote(Path("hf/owner/name/model.safetensors"))
    local, note = hub.fetch(Path("hf://owner/name@v1/model.safetensors"))
    assert local == repository / "model.safetensors"
    assert note == "downloaded from hf://owner/name@v1/model.safetensors"
    assert asked == [("owner/name", "model.safetensors", "v1")]


def test_an_index_brings_its_shards(asked: list[tuple[str, str, str | None]]) -> None:
    local, _ = hub.fetch(Path("hf://owner/name/sub/model.safetensors.index.json"))
    assert [file for _, file, _ in asked[1:]] == ["sub/a.safetensors", "sub/b.safetensors"]
    assert set(read(local).weights) == {"one", "two"}


@pytest.mark.usefixtures("asked")
def test_what_is_not_there_is_refused_in_one_line() -> None:
    with pytest.raises(CheckpointError, match=r"^cannot download no.pt of o/n: 404 Client Error. Entry Not Found$"):
        hub.fetch(Path("hf://o/n/no.pt"))


@pytest.mark.parametrize("url", ["hf://owner", "hf://owner/name", "hf://", "hf://owner/name/", "hf:///owner/na me/x"])
def test_an_address_without_a_file_is_refused(url: str) -> None:
    with pytest.raises(CheckpointError, match="names no file: write hf://OWNER/NAME/FILE"):
        hub.fetch(Path(url))


def test_without_the_library_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(CheckpointError, match=r"needs huggingface_hub: pip install 'diffiqa\[hf\]'"):
        hub.fetch(Path("hf://owner/name/model.pt"))


@pytest.fixture
def endpoint(repository: Path) -> Iterator[str]:
    """A hub on this machine that serves the repository `owner/name`."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_HEAD(self) -> None:
            self.answer()

        def do_GET(self) -> None:
            self.wfile.write(self.answer())

        def answer(self) -> bytes:
            file = repository / self.path.removeprefix("/owner/name/resolve/main/")
            data = file.read_bytes() if file.is_file() else b""
            self.send_response(200 if data else 404)
            self.send_header("Content-Length", str(len(data)))
            self.send_header("ETag", f'"{hashlib.sha256(data).hexdigest()}"')
            self.send_header("X-Repo-Commit", COMMIT)
            if not data:
                self.send_header("X-Error-Code", "EntryNotFound")
            self.end_headers()
            return data

        def log_message(self, *_: object) -> None:
            """Say nothing."""

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


def test_the_real_library_downloads_from_an_endpoint(endpoint: str, tmp_path: Path) -> None:
    pytest.importorskip("huggingface_hub", reason="huggingface_hub is not installed")
    program = (
        "from pathlib import Path\nfrom diffiqa.model import hub\nfrom diffiqa.model.weightfile import read\n"
        "local, note = hub.fetch(Path('hf://owner/name/sub/model.safetensors.index.json'))\n"
        "print(sorted(read(local).weights), note)\n"
        "try: hub.fetch(Path('hf://owner/name/no.pt'))\nexcept Exception as exc: print(type(exc).__name__, exc)\n"
    )
    environment = os.environ | {"HF_ENDPOINT": endpoint, "HF_HOME": str(tmp_path / "home"), "NO_PROXY": "127.0.0.1"}
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=True)
    first, second = done.stdout.splitlines()
    url = "hf://owner/name/sub/model.safetensors.index.json"
    assert first == f"['one', 'two'] downloaded from {url}, commit {COMMIT}"
    assert second.startswith("CheckpointError cannot download no.pt of owner/name: 404")
