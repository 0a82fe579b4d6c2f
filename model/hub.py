"""Weights on the Hugging Face hub: `hf://owner/name/file` → the file in the local cache of huggingface_hub."""

import re
from pathlib import Path

from ..errors import CheckpointError
from .weightfile import INDEX, read_index, shown

SCHEME = "hf:/"  # what `Path` leaves of `hf://`


def is_remote(path: Path) -> bool:
    """Whether a path names a file on the hub."""
    return path.as_posix().startswith(SCHEME)


def fetch(path: Path) -> tuple[Path, str]:
    """Download `hf://owner/name/file` or `hf://owner/name@revision/file`, with its shards if it is an index.

    Returns the local file, and a note that says the commit. Raises CheckpointError, also without huggingface_hub.
    """
    url = "hf://" + path.as_posix().removeprefix(SCHEME).lstrip("/")
    parsed = re.fullmatch(r"hf://([\w.-]+/[\w.-]+)(?:@([^/]+))?/(.+)", url)
    if parsed is None:
        raise CheckpointError(f"{url} names no file: write hf://OWNER/NAME/FILE, or hf://OWNER/NAME@REVISION/FILE")
    repository, revision, file = parsed.groups()
    try:
        from huggingface_hub import hf_hub_download
    except ImportError as exc:
        raise CheckpointError(f"{url} needs huggingface_hub: pip install 'diffiqa[hf]'") from exc

    def download(name: str) -> Path:
        try:
            return Path(hf_hub_download(repository, name, revision=revision))
        except Exception as exc:  # of the hub's own kinds, and of the network's
            reason = shown(" ".join(str(exc).split()) or type(exc).__name__)  # some say it in their third line
            raise CheckpointError(f"cannot download {name} of {repository}: {reason}") from exc

    local = download(file)
    if file.endswith(INDEX):
        for shard in sorted(set(read_index(local).values())):
            download(file.rpartition("/")[0] + "/" + shard if "/" in file else shard)
    commit = re.search(r"/snapshots/([0-9a-f]{7,})/", local.as_posix())
    return local, f"downloaded from {url}" + (f", commit {commit[1]}" if commit else "")
