"""The files of a form, `multipart/form-data`, from a body that is in memory."""

import re

from ..errors import one_line
from .limits import Refusal

_BOUNDARY = re.compile(r'boundary=(?:"([^"\r\n]{1,70})"|([^\s;"]{1,70}))', re.IGNORECASE)
_DISPOSITION = re.compile(
    rb"^content-disposition:[ \t]*form-data((?:[ \t]*;[^\r\n]*)?)\r?$", re.IGNORECASE | re.MULTILINE
)
_HEAD_BYTES = 8192  # of a part's headers
_NAME = re.compile(r';[ \t]*(name|filename)=(?:"((?:[^"\\]|\\.)*)"|([^\s;"]*))', re.IGNORECASE)


def read_form(content_type: str, body: bytes, most: int) -> list[tuple[str, bytes]]:
    """Return name and bytes of every file. Raises Refusal for a broken form, and for more than `most` files."""
    found = _BOUNDARY.search(content_type)
    if not found:
        raise Refusal(400, "the form has no boundary in its Content-Type; let your HTTP library write this header")
    boundary = b"--" + (found[1] or found[2]).encode("latin-1", "replace")
    _, *parts = (b"\r\n" + body).split(b"\r\n" + boundary, most + 2)
    files: list[tuple[str, bytes]] = []
    for part in parts:
        if part.startswith(b"--"):
            return files
        if len(files) == most:
            raise Refusal(413, f"more than {most} files in one request; send fewer at a time")
        files.append(_file(part, len(files)))
    raise Refusal(400, "the form breaks off before its last boundary; send it again")


def _file(part: bytes, number: int) -> tuple[str, bytes]:
    head, blank, data = part.partition(b"\r\n\r\n")
    found = _DISPOSITION.search(head) if len(head) < _HEAD_BYTES else None
    if not blank or not found:
        raise Refusal(
            400, f"part {number} of the form has no `Content-Disposition: form-data` with a blank line after it"
        )
    text = found[1].decode("utf-8", "replace")
    names = {key.lower(): quoted or plain for key, quoted, plain in _NAME.findall(text)}
    if "filename" not in names:
        field = one_line(names.get("name", ""), 40)
        raise Refusal(
            422, f"the form's field {field!r} is not a file; options go into the address, as in /score?seed=1"
        )
    return names["filename"] or f"image {number}", data
