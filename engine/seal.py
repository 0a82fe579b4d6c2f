"""A seal on builds that hold machine code, so that only code which this account made is ever loaded.

A hash in a manifest shows that a file is the one that was written, not who wrote it. The seal is an HMAC over the
hashes of a build's files, with a key that only this account can read. An engine directory from somewhere else has no
such seal: its portable stages run here, its machine code does not.
"""

import hashlib
import hmac
import os
import secrets
from collections.abc import Iterable
from pathlib import Path

from ..errors import EngineError
from .atomic import replacing
from .manifest import FileEntry

SEAL = "seal"  # the file's name in the folder of a build
_KEY_BYTES = 32


def state_folder() -> Path:
    """Return where diffiqa remembers things for this account ($XDG_STATE_HOME). RuntimeError: no home folder."""
    given = os.environ.get("XDG_STATE_HOME", "")
    base = Path(given) if Path(given).is_absolute() else Path.home() / ".local" / "state"
    return base / "diffiqa"


def key_file() -> Path:
    """Return where this account's key is."""
    return state_folder() / "build.key"


def seal(folder: Path, files: Iterable[FileEntry]) -> None:
    """Seal a build that was just made in `folder`; the key is made where there is none yet."""
    (folder / SEAL).write_text(_mac(_key(make=True), files) + "\n", encoding="ascii")


def check_seal(folder: Path, files: Iterable[FileEntry], remedy: str) -> None:
    """Raise EngineError unless this account sealed these files; check their hashes first."""
    try:
        found = (folder / SEAL).read_text(encoding="ascii").strip()
    except (OSError, ValueError):
        found = ""
    key = _key(make=False)
    if not key or not hmac.compare_digest(found, _mac(key, files)):
        raise EngineError(
            f"{folder} holds machine code that was not made here by this account, so it is not run; {remedy}"
        )


def _mac(key: bytes, files: Iterable[FileEntry]) -> str:
    text = "\n".join(sorted(entry.sha256 for entry in files))
    return hmac.new(key, text.encode(), hashlib.sha256).hexdigest()


def _key(*, make: bool) -> bytes:
    """Return the account's key; empty if there is none, or others could have written it."""
    try:
        file = key_file()
        if make and not file.exists():
            file.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            with replacing(file) as stream:
                Path(stream.name).chmod(0o600)
                stream.write(secrets.token_bytes(_KEY_BYTES))
        state = file.stat()
        if hasattr(os, "getuid") and (state.st_uid != os.getuid() or state.st_mode & 0o077):
            raise EngineError(f"{file} must be readable by its owner alone; run: chmod 600 {file}")
        data = file.read_bytes()
    except FileNotFoundError:
        return b""
    except (OSError, RuntimeError) as exc:  # RuntimeError: no home folder
        raise EngineError(f"cannot use the key of this account for builds: {exc}; set XDG_STATE_HOME") from exc
    return data if len(data) == _KEY_BYTES else b""
