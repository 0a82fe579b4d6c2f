"""The pages that mkdocs builds: no warning, no dead link, and nothing that a browser would fetch from a network."""

import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest

from diffiqa import cli

ROOT = Path(cli.__file__).parent
LOADING = {"script": "src", "img": "src", "iframe": "src", "source": "src", "link": "href", "embed": "src"}
REMOTE = re.compile(r"\s*(?:https?:)?//")


class Resources(HTMLParser):
    """Collects what a browser loads for a page, as far as it is not in the folder."""

    def __init__(self) -> None:
        super().__init__()
        self.remote: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = dict(attrs)
        address = given.get(LOADING.get(tag, "")) or ""
        if REMOTE.match(address) and given.get("rel") != "canonical":
            self.remote.append(address)


def build(target: Path, *more: str | Path) -> "subprocess.CompletedProcess[str]":
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(target), *map(str, more)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    target = tmp_path_factory.mktemp("site")
    built = build(target)
    assert built.returncode == 0, built.stderr
    return target


def test_every_page_is_built(site: Path) -> None:
    pages = {path.stem for path in (ROOT / "docs").glob("*.md")}
    assert pages <= {path.stem for path in site.glob("*.html")}


def test_nothing_is_loaded_from_a_network(site: Path) -> None:
    for page in site.rglob("*.html"):
        found = Resources()
        found.feed(page.read_text(encoding="utf-8"))
        assert found.remote == [], page.name
    for style in site.rglob("*.css"):
        addresses = re.findall(r"(?:url\(|@import )['\"]?([^'\")]+)", style.read_text(encoding="utf-8"))
        assert not [address for address in addresses if REMOTE.match(address)], style.name


def test_a_dead_link_fails_the_build(tmp_path: Path) -> None:
    links = ("[x](none.md)", "[x](#none)", "[x](../README.md)", "![x](none.png)")
    docs = tmp_path / "docs"
    docs.mkdir()
    (docs / "index.md").write_text("\n\n".join(["# Page", *links]), encoding="utf-8")
    settings = (ROOT / "mkdocs.yml").read_text(encoding="utf-8")
    nav = re.compile(r"^nav:\n(  - .*\n)+", re.MULTILINE)
    (tmp_path / "mkdocs.yml").write_text(nav.sub("", settings), encoding="utf-8")
    built = build(tmp_path / "site", "--config-file", tmp_path / "mkdocs.yml")
    assert built.returncode == 1
    assert built.stderr.count("contains a link") == len(links), built.stderr
