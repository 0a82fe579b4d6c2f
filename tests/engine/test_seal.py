"""The seal on machine code: what this account made passes; what anybody else made, or changed, does not."""

import os
from pathlib import Path

import pytest

from diffiqa.engine.manifest import FileEntry
from diffiqa.engine.seal import SEAL, check_seal, key_file, seal
from diffiqa.errors import EngineError

FILES = [FileEntry("inductor/a/unet.pt2", 3, "1" * 64), FileEntry("inductor/a/vda.pt2", 3, "2" * 64)]


@pytest.fixture(autouse=True)
def account(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    return tmp_path / "state" / "diffiqa" / "build.key"


def test_what_this_account_sealed_passes_in_any_order(tmp_path: Path, account: Path) -> None:
    seal(tmp_path, FILES)
    check_seal(tmp_path, reversed(FILES), "")
    assert key_file() == account
    assert account.stat().st_mode & 0o777 == 0o600


def test_two_seals_share_a_key(tmp_path: Path, account: Path) -> None:
    seal(tmp_path, FILES)
    before = account.read_bytes()
    (tmp_path / "other").mkdir()
    seal(tmp_path / "other", FILES[:1])
    assert account.read_bytes() == before
    check_seal(tmp_path, FILES, "")


def _other_key(_folder: Path, key: Path) -> None:
    key.write_bytes(os.urandom(32))


def _short_key(folder: Path, key: Path) -> None:
    key.write_bytes(b"")
    (folder / SEAL).write_text("")


@pytest.mark.parametrize(
    "spoil",
    [
        pytest.param(_other_key, id="another account"),
        pytest.param(_short_key, id="a key and a seal of nothing"),
        pytest.param(lambda _folder, key: key.unlink(), id="no key"),
        pytest.param(lambda folder, _key: (folder / SEAL).unlink(), id="no seal"),
        pytest.param(lambda folder, _key: (folder / SEAL).write_bytes(b"\xff" * 64), id="a seal of garbage"),
    ],
)
def test_what_it_did_not_seal_is_refused(tmp_path: Path, account: Path, spoil: object) -> None:
    seal(tmp_path, FILES)
    spoil(tmp_path, account)  # type: ignore[operator]
    with pytest.raises(EngineError, match=r"machine code that was not made here by this account.*; build it here"):
        check_seal(tmp_path, FILES, "build it here")


def test_a_file_more_or_a_file_less_is_refused(tmp_path: Path) -> None:
    seal(tmp_path, FILES)
    for files in (FILES[:1], [*FILES, FileEntry("inductor/a/vit.pt2", 3, "3" * 64)]):
        with pytest.raises(EngineError, match="not made here"):
            check_seal(tmp_path, files, "")


def test_a_key_that_others_can_read_is_refused(tmp_path: Path, account: Path) -> None:
    seal(tmp_path, FILES)
    account.chmod(0o644)
    with pytest.raises(EngineError, match="readable by its owner alone; run: chmod 600"):
        check_seal(tmp_path, FILES, "")


def test_a_home_that_cannot_be_written_names_the_way_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "file"))
    with pytest.raises(EngineError, match="set XDG_STATE_HOME"):
        seal(tmp_path, FILES)
