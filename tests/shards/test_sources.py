"""Names stand for files, lists, archives, tables, buckets and web servers, and give the right bytes."""

import contextlib
import http.server
import io
import os
import tarfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from diffiqa.errors import DatasetError, ImageError, UsageError
from diffiqa.shards import web
from diffiqa.shards.plan import Entry
from diffiqa.shards.sources import Http, entries, read, read_ahead


def bytes_of(entry: Entry, http: Http = Http.NEVER) -> bytes:
    found = read(entry, http)
    return found if isinstance(found, bytes) else Path(found).read_bytes()


@pytest.fixture
def archive(tmp_path: Path) -> Path:
    """As WebDataset writes them, with members of other kinds, a long name, and one that is no plain file."""
    path = tmp_path / "a.tar"
    with tarfile.open(path, "w", format=tarfile.PAX_FORMAT) as tar:
        for name, data in [("0.jpg", b"first"), ("0.txt", b"no"), (f"{'x' * 150}/1.PNG", b"s" * 700), ("2.webp", b"")]:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
        link = tarfile.TarInfo("3.jpg")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        tar.addfile(link)
    return path


def test_an_archive_stands_for_the_images_in_it(archive: Path) -> None:
    found = list(entries([str(archive)]))
    names = "0.jpg", f"{'x' * 150}/1.PNG", "2.webp"
    assert [entry.name for entry in found] == [f"{archive}#{name}" for name in names]
    assert [bytes_of(entry) for entry in found] == [b"first", b"s" * 700, b""]


def test_archives_that_cannot_be_read_are_named(archive: Path) -> None:
    archive.write_bytes(archive.read_bytes()[:1100])
    for name, error, why in [
        (str(archive), DatasetError, "is no whole tar archive"),
        ("b.tar.gz", UsageError, "is compressed, so no image"),
        ("none.tar", DatasetError, "none.tar cannot be opened: No such file"),
        ("https://a.example/b.tar", UsageError, "lists, archives and tables are read from files and buckets"),
        ("none.txt", DatasetError, "none.txt cannot be opened: No such file"),
        ("t.parquet", UsageError, "say which column, as t.parquet#image"),
        ("", UsageError, "an image name is empty"),
    ]:
        with pytest.raises(error, match=why):
            list(entries([name], Http.ANY))


def test_a_list_has_a_name_a_line_and_no_other_lists(archive: Path, tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(b"a")
    listed = tmp_path / "names.txt"
    listed.write_bytes(os.fsencode(f"{tmp_path}/a.png\r\n\n{archive}\n") + b"\xff.png\n")
    names = [entry.name for entry in entries([str(listed)])]
    assert names[0] == f"{tmp_path}/a.png"
    assert names[1].startswith(f"{archive}#0.jpg")
    assert names[-1] == "\udcff.png"
    listed.write_text("other.txt\n")
    with pytest.raises(UsageError, match=r"has the name of another list, other.txt"):
        list(entries([str(listed)]))


def test_columns_of_names_and_of_images(tmp_path: Path) -> None:
    arrow = pytest.importorskip("pyarrow", reason="the extra parquet is not installed")
    parquet = pytest.importorskip("pyarrow.parquet")
    path = tmp_path / "t.parquet"
    images = [b"zero", b"one", None, b"three", b"four"]
    table = arrow.table(
        {
            "name": [f"{i}.png" for i in range(5)],
            "image": images,
            "hub": [{"bytes": image, "path": "x"} for image in images],
            "gap": ["a", None, "b", "c", "d"],
        }
    )
    parquet.write_table(table, path, row_group_size=2)
    assert [entry.name for entry in entries([f"{path}#name"])] == [f"{i}.png" for i in range(5)]
    for column in ("image", "hub"):
        found = list(entries([f"{path}#{column}"]))
        assert found[3].name == f"{path}#{column}:3"
        assert [bytes_of(found[row]) for row in (4, 0, 3, 1)] == [b"four", b"zero", b"three", b"one"]
        with pytest.raises(ImageError, match=rf"t.parquet#{column}:2: there are no bytes of an image"):
            read(found[2])
    with pytest.raises(DatasetError, match="has no column nix, but name, image, hub, gap"):
        list(entries([f"{path}#nix"]))
    with pytest.raises(DatasetError, match="has a row without a name in column gap"):
        list(entries([f"{path}#gap"]))
    path.write_bytes(b"PAR1 no")
    with pytest.raises(DatasetError, match="is no Parquet file"):
        list(entries([f"{path}#name"]))


def test_reading_ahead_keeps_the_order_and_passes_errors_on(archive: Path) -> None:
    members = list(entries([str(archive)]))
    gone = Entry(f"{archive.parent}/gone.tar#a.jpg", 0, 5)
    wanted = [Entry("x.png"), members[0], gone, members[1], Entry("y.png")] * 9
    found = list(read_ahead(wanted, Http.NEVER))
    assert [type(one) for one in found] == [str, bytes, ImageError, bytes, str] * 9
    assert str(found[2]) == f"{archive.parent}/gone.tar#a.jpg: cannot be read (no such file)"
    assert found[-2] == b"s" * 700


Handler = Callable[[http.server.BaseHTTPRequestHandler], None]


@pytest.fixture
def server() -> Iterator[tuple[str, dict[str, Handler]]]:
    """A web server on this machine, and what it does for each path."""
    paths: dict[str, Handler] = {}

    class Answers(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            paths[self.path](self)

        def log_message(self, *_: Any) -> None:
            pass

    running = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Answers)
    running.daemon_threads = True
    thread = threading.Thread(target=running.serve_forever, args=(0.05,))
    thread.start()
    yield f"http://127.0.0.1:{running.server_port}", paths
    running.shutdown()
    thread.join()
    running.server_close()


def answer(status: int, body: bytes = b"", **headers: str) -> Handler:
    def handle(request: http.server.BaseHTTPRequestHandler) -> None:
        request.send_response(status)
        for name, value in headers.items():
            request.send_header(name, value)
        request.send_header("Content-Length", str(len(body)))
        request.end_headers()
        request.wfile.write(body)

    return handle


def test_web_names_are_for_those_who_ask(server: tuple[str, dict[str, Handler]]) -> None:
    place, paths = server
    paths["/a.png?b=1"] = answer(200, b"picture")
    paths["/gone"] = answer(404)
    name = f"{place}/a.png?b=1"
    with pytest.raises(UsageError, match="allow such names with --http public"):
        list(entries([name]))
    with pytest.raises(ImageError, match="images are read from files"):
        read(Entry(name))
    with pytest.raises(ImageError, match=r"leads to 127.0.0.1, an address of a private network"):
        read(Entry(name), Http.PUBLIC)
    assert read(next(entries([name], Http.ANY)), Http.ANY) == b"picture"
    with pytest.raises(ImageError, match="the server answers 404 Not Found"):
        read(Entry(f"{place}/gone"), Http.ANY)
    with pytest.raises(ImageError, match="cannot be fetched"):
        read(Entry("http://127.0.0.1:1/"), Http.ANY)
    with pytest.raises(ImageError, match="images are read from files"):
        read(Entry("file:///etc/passwd"), Http.ANY)


def test_redirects_are_few_and_never_lead_from_the_internet_inside(
    server: tuple[str, dict[str, Handler]], monkeypatch: pytest.MonkeyPatch
) -> None:
    place, paths = server
    paths["/a"] = answer(302, Location="/b")
    paths["/b"] = answer(200, b"picture")
    paths["/round"] = answer(302, Location="/round")
    paths["/file"] = answer(302, Location="file:///etc/passwd")
    assert web.fetch(f"{place}/a", private=True) == b"picture"
    with pytest.raises(ImageError, match="more than 5 redirects"):
        web.fetch(f"{place}/round", private=True)
    with pytest.raises(ImageError, match="only http and https are followed"):
        web.fetch(f"{place}/file", private=True)
    seen = iter([True, False])  # the first address passes for one of the internet
    monkeypatch.setattr(web, "is_public", lambda _: next(seen))
    with pytest.raises(ImageError, match="an address of a private network"):
        web.fetch(f"{place}/a", private=True)


def test_answers_that_are_too_large_or_too_slow_end(
    server: tuple[str, dict[str, Handler]], monkeypatch: pytest.MonkeyPatch
) -> None:
    place, paths = server

    def drip(request: http.server.BaseHTTPRequestHandler) -> None:
        request.send_response(200)
        request.end_headers()
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            for _ in range(100):  # each byte comes long before a timeout of the socket
                request.wfile.write(b".")
                time.sleep(0.1)

    def half(request: http.server.BaseHTTPRequestHandler) -> None:
        request.send_response(200)
        request.send_header("Content-Length", "100")
        request.end_headers()
        request.wfile.write(b"half")
        request.close_connection = True

    paths["/large"], paths["/slow"], paths["/half"] = answer(200, b"x" * 2000), drip, half
    paths["/%C3%A4%20b?c=%20"] = answer(200, b"quoted")
    assert web.fetch(f"{place}/ä b?c=%20", private=True) == b"quoted"
    with pytest.raises(ImageError, match=r"cannot be fetched .IncompleteRead.4 bytes read, 96 more expected"):
        web.fetch(f"{place}/half", private=True)
    monkeypatch.setattr(web, "MAX_BYTES", 1999)
    with pytest.raises(ImageError, match="more than 1999 bytes"):
        web.fetch(f"{place}/large", private=True)
    monkeypatch.setattr(web, "SECONDS", 0.5)
    begun = time.monotonic()
    with pytest.raises(ImageError, match=r"no answer within 0.5 s"):
        web.fetch(f"{place}/slow", private=True)
    assert time.monotonic() - begun < 8


@pytest.mark.parametrize(
    "address",
    [
        *("127.0.0.1", "10.1.2.3", "169.254.169.254", "192.168.0.1", "0.0.0.0", "100.64.0.1", "224.0.0.1"),  # noqa: S104
        *("::1", "fe80::1%eth0", "fd00::1", "::ffff:10.0.0.1", "64:ff9b::a00:1", "2002:a00:1::"),
    ],
)
def test_addresses_that_are_not_of_the_internet(address: str) -> None:
    assert not web.is_public(address)


def test_addresses_of_the_internet() -> None:
    assert web.is_public("93.184.216.34")
    assert web.is_public("2606:2800:220:1::1")
