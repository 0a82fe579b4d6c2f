"""What the documents show works: commands parse, cheap ones run, Python blocks run, and what is named exists."""

import dataclasses
import json
import re
import shlex
import shutil
import tomllib
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path

import click
import pytest
from click.testing import CliRunner
from PIL import Image

import diffiqa
from diffiqa import Failure, Score, cli
from diffiqa.engine.codec import encode
from diffiqa.engine.manifest import MANIFEST, Source, file_sha256, read_manifest, weights_id
from diffiqa.engine.monotone import Monotone
from diffiqa.engine.reference import Reference
from diffiqa.model.bundle import save_bundle
from diffiqa.model.network import DiffV2IQA

from ..tiny import photo

ROOT = Path(cli.__file__).parent
README = ROOT / "README.md"
PAGES = [README, *sorted((ROOT / "docs").glob("*.md"))]
OTHERS = [ROOT / name for name in ("CONTRIBUTING.md", "models/mini/README.md", "training/recipes/ablations/README.md")]

# Commands that take seconds on the tiny engine. The others are parsed and no more.
CHEAP = {"run", "verify", "calibrate", "quantise", "convert", "bench"}
# What the tests have no part of: GPUs, other people's weights, a network of another size or trained, minutes of
# measuring.
ABSENT = re.compile(
    r"tensorrt|onnxruntime-gpu|inductor|CUDAExecution|bf16|iqa_net|maniqa|--preset|--peers|\.deb|--bisect|--spin|mixed"
    r"|--fast|\d\.\.\d"
)
Line = list[str]  # the words of one command line


def blocks(text: str, language: str, leave_out: str = "<!-- not run") -> Iterator[str]:
    """Return the fenced blocks in a language, but for those after a comment that begins so."""
    for before, block in re.findall(rf"([^\n]*)\n+```{language}\n(.*?)```", text, re.DOTALL):
        if not before.startswith(leave_out):
            yield block


def command_lines(text: str) -> Iterator[Line]:
    """Return every `iqa-… ` line of the shell blocks, with variables put in."""
    for block in blocks(text, "sh"):
        values: dict[str, str] = {}
        for line in block.replace("\\\n", " ").splitlines():
            if assignment := re.fullmatch(r'([A-Z]+)="(.*)"', line):
                values[assignment[1]] = assignment[2]
                continue
            for name, value in values.items():
                line = line.replace(f"${name}", value)
            for part in line.split(" | "):
                words = shlex.split(part, comments=True)
                if "diffiqa.cli" in words:  # under torchrun
                    words = words[words.index("diffiqa.cli") + 1 :]
                    words[0] = f"iqa-{words[0]}"
                if words:
                    yield words


def find(words: Line) -> tuple[click.Command, Line]:
    """Return the command that a line calls, and what the line gives it."""
    name, *rest = words
    command: click.Command = cli.main.commands[name.removeprefix("iqa-")]
    if isinstance(command, click.Group):
        command, rest = command.commands[rest[0]], rest[1:]
    return command, rest


def cheap_lines(page: Path) -> list[Line]:
    return [
        words
        for words in command_lines(page.read_text(encoding="utf-8"))
        if words[0].removeprefix("iqa-") in CHEAP and not ABSENT.search(" ".join(words))
    ]


def options_of(command: click.Command) -> set[str]:
    parts = command.commands.values() if isinstance(command, click.Group) else [command]
    return {"--help"} | {option for part in parts for parameter in part.params for option in parameter.opts}


def ids(page: Path) -> str:
    return str(page.relative_to(ROOT))


@pytest.mark.parametrize("page", [*PAGES, *OTHERS], ids=ids)
def test_every_command_line_parses(page: Path) -> None:
    for words in command_lines(page.read_text(encoding="utf-8")):
        if words[0].startswith("iqa-"):
            command, arguments = find(words)
            with command.make_context(words[0], list(arguments)) as context:
                assert context.params


def test_the_pages_show_every_command() -> None:
    shown = {words[0] for page in PAGES for words in command_lines(page.read_text(encoding="utf-8"))}
    assert {f"iqa-{name}" for name in cli.main.commands} <= shown


def test_every_option_the_pages_name_exists() -> None:
    """In text: `iqa-build --plan` names an option of that command, `--plan` alone one of any."""
    known = {option for command in cli.main.commands.values() for option in options_of(command)}
    found = set()
    for page in PAGES:
        text = re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)
        for span in re.findall(r"`([^`]+)`", re.sub(r"\n(?!\n)", " ", text)):
            named = set(re.findall(r"(?<![\w-])--[a-z][a-z0-9-]+", span))
            command = re.match(r"iqa-(\w+)", span)
            assert named <= (options_of(cli.main.commands[command[1]]) if command else known), f"{page.name}: {span}"
            found |= named
    assert len(found) > 40


@pytest.fixture
def world(tiny_engine: Path, tiny_model: DiffV2IQA, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with everything that the pages' commands read, small: the engine, weights, photographs."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(tiny_engine, "engine")  # quantising adds statistics to it
    for name in ("model.safetensors", "models/mini/model.safetensors"):
        Path(name).parent.mkdir(parents=True, exist_ok=True)
        save_bundle(tiny_model, Path(name))
    folders = {"photos": 4, "more": 1, "samples": 1}
    pictures = [f"{folder}/{index}.png" for folder, count in folders.items() for index in range(count)]
    weights = Path("model.safetensors")
    source = Source("bundle", weights.name, weights.stat().st_size, file_sha256(weights), "diffiqa bundle")
    manifest = read_manifest(Path("engine"))
    made_of = dataclasses.replace(manifest.provenance, sources=(source,))
    opinions, places = Monotone((0.0, 1.0), (1.0, 5.0)), (weights_id([source]), manifest.scoring_id)
    reference = Reference("rated", 100, 9, "whole", tuple(range(101)), opinions, 0.5, *places)
    Path("reference.json").write_text(json.dumps(encode(reference)))
    known = dataclasses.replace(manifest.score, reference=reference)
    Path("engine", MANIFEST).write_text(dataclasses.replace(manifest, provenance=made_of, score=known).to_json())
    for index, name in enumerate(["photo.jpg", "a.png", *pictures]):
        Path(name).parent.mkdir(exist_ok=True)
        Image.fromarray(photo(index, 40, 48)).save(name)
    Path("names.txt").write_text("photos/0.png\nphotos/1.png\n")
    rows = [f"{index}.png,0.{index}" for index in range(4)]
    Path("program.csv").write_text("\n".join(["name,score", *rows]))  # its scores
    return tmp_path


def test_some_line_of_every_cheap_command_is_run() -> None:
    assert {words[0] for page in PAGES for words in cheap_lines(page)} == {f"iqa-{name}" for name in CHEAP}


@pytest.mark.parametrize("page", [page for page in PAGES if cheap_lines(page)], ids=ids)
def test_the_cheap_commands_run_in_the_order_of_the_page(page: Path, world: Path) -> None:
    for words in cheap_lines(page):
        name = words[0].removeprefix("iqa-")
        command, arguments = find(words)
        more = ["--rounds", "1", "--starts", "0"] if name == "bench" else []
        result = CliRunner().invoke(command, [*arguments, *more], input="a.png\n")
        judged = {0, 1} if name in {"verify", "bench"} else {0}  # of a tiny network and so short a run
        assert result.exit_code in judged, f"{' '.join(words)}\n{result.output}"


@pytest.mark.parametrize("page", [page for page in PAGES if "```python" in page.read_text(encoding="utf-8")], ids=ids)
def test_the_python_blocks_run(page: Path, world: Path) -> None:
    text = page.read_text(encoding="utf-8")
    for block in re.findall(r"```python\n(.*?)```", text, re.DOTALL):
        compile(block, page.name, "exec")
    names: dict[str, object] = {}
    for block in blocks(text, "python"):
        exec(compile(block, page.name, "exec"), names)  # noqa: S102 — our own example


def test_the_readmes_example_prints_scores_and_failures(world: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (example,) = blocks(README.read_text(encoding="utf-8"), "python")
    exec(compile(example, README.name, "exec"), {})  # noqa: S102
    printed = capsys.readouterr().out.splitlines()
    assert float(printed[0].split()[0]) > 0
    assert printed[1].startswith(f"{Score.__name__}(source='a.png'")
    assert printed[2].startswith(f"{Failure.__name__}(source='b.png'")  # it is missing


def test_what_the_python_blocks_call_can_be_called() -> None:
    """Blocks that are not run, too."""
    named = {
        name
        for page in PAGES
        for block in blocks(page.read_text(encoding="utf-8"), "python", leave_out="<!-- not run yet")
        for name in re.findall(r"diffiqa\.(\w+)\(", block)
    }
    assert len(named) > 5
    assert [name for name in named if not callable(getattr(diffiqa, name, None))] == []


def test_every_record_field_that_is_written_is_explained() -> None:
    from diffiqa.runtime.command.records import Record

    text = (ROOT / "docs" / "scoring.md").read_text(encoding="utf-8")
    (rows,) = re.findall(r"\| field \|.*?\n\n", text, re.DOTALL)
    assert tuple(re.findall(r"^\| `(\w+)` \|", rows, re.MULTILINE)) == tuple(field.name for field in fields(Record))


def test_every_extra_is_explained() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    text = (ROOT / "docs" / "install.md").read_text(encoding="utf-8")
    assert set(re.findall(r"^\| `(\w+)` \|", text, re.MULTILINE)) == set(project["optional-dependencies"])
    for page in PAGES:
        for named in re.findall(r"\.\[([\w,]+)\]", page.read_text(encoding="utf-8")):
            assert set(named.split(",")) <= set(project["optional-dependencies"]), page


@pytest.mark.parametrize("page", [README, *OTHERS, ROOT / "samples" / "README.md"], ids=ids)
def test_relative_links_outside_of_docs_lead_somewhere(page: Path) -> None:
    """Pages of docs/ are checked by mkdocs, anchors too."""
    text = page.read_text(encoding="utf-8")
    for target, anchor in re.findall(r"\]\((?!https?:)([^)#\s]*)(?:#([\w-]+))?\)", text):
        file = page.parent / target if target else page
        assert file.exists(), f"{page}: {target}"
        if anchor:
            titles = re.findall(r"^#+ (.*)$", file.read_text(encoding="utf-8"), re.MULTILINE)
            assert anchor in {re.sub(r"[^\w -]", "", title).lower().replace(" ", "-") for title in titles}, anchor


def test_the_readme_stays_short() -> None:
    assert len(README.read_bytes()) <= 6_000  # people read all of it, or nothing
