"""What the README shows works: its Python example runs, and every command and option in it exists."""

import re
from pathlib import Path

import click
import pytest
from PIL import Image

from diffiqa import Failure, Score, cli

from .tiny import photo

README = (Path(cli.__file__).parent / "README.md").read_text(encoding="utf-8")


def test_the_python_example_runs(
    tiny_engine: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "engine").symlink_to(tiny_engine)
    for index, name in enumerate(["photo.jpg", "a.png"]):  # and b.png is missing
        Image.fromarray(photo(index, 40, 48)).save(name)
    (example,) = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    names: dict[str, object] = {}
    exec(compile(example, "README.md", "exec"), names)  # noqa: S102 — our own example
    printed = capsys.readouterr().out.splitlines()
    assert float(printed[0].split()[0]) > 0
    assert printed[1].startswith(f"{Score.__name__}(source='a.png'")
    assert printed[2].startswith(f"{Failure.__name__}(source='b.png'")


def test_every_option_the_readme_names_exists() -> None:
    known = {
        option
        for command in cli.main.commands.values()
        for part in (command.commands.values() if isinstance(command, click.Group) else [command])
        for parameter in part.params
        for option in parameter.opts
    }
    text = re.sub(r"```.*?```", "", README, flags=re.DOTALL)
    named = set(re.findall(r"(?<![\w-])--[a-z][a-z0-9-]+", text))
    assert len(named) > 15
    assert named - {"--help"} <= known, named - known


def test_every_record_field_the_readme_lists_is_written() -> None:
    from diffiqa.runtime.command.records import COLUMNS

    listed = re.search(r"\*\*Records\*\* hold `(.*?)`", README, re.DOTALL)
    assert listed is not None
    assert tuple(re.split(r",\s+", listed.group(1))) == COLUMNS
