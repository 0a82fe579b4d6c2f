"""The public names: all there, each command a function, and folders that are functions stay so."""

import ast
import importlib
import inspect
import subprocess
import sys
from pathlib import Path

import pytest

import diffiqa
from diffiqa import cli
from diffiqa.errors import DiffiqaError

COMMANDS = {
    *("bench", "build", "calibrate", "convert", "evaluate", "export", "prompts", "quantise", "score", "status"),
    "verify",
}


def test_every_public_name_can_be_had_and_is_listed_once() -> None:
    assert diffiqa.__all__ == sorted(set(diffiqa.__all__))
    for name in diffiqa.__all__:
        assert getattr(diffiqa, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'magic'"):
        _ = diffiqa.magic


def test_type_checkers_see_the_names_that_there_are() -> None:
    tree = ast.parse(Path(diffiqa.__file__).read_text(encoding="utf-8"))
    block = next(node for node in tree.body if isinstance(node, ast.If))
    seen = {
        alias.asname or alias.name for node in block.body if isinstance(node, ast.ImportFrom) for alias in node.names
    }
    assert seen | {"__version__"} == set(diffiqa.__all__)


def test_every_command_is_a_function() -> None:
    named = {"run": "score"}  # the function that says what it does; `diffiqa.run` would say how
    assert {named.get(name, name) for name in cli.main.commands} - {"eval", "evaluate", "train"} <= COMMANDS
    for name in COMMANDS:
        function = getattr(diffiqa, name)
        assert callable(function)
        assert inspect.signature(function).parameters


@pytest.mark.parametrize("room", ["bench", "export", "verify"])
def test_a_folder_that_is_a_function_stays_so_once_its_modules_are_imported(room: str) -> None:
    module = importlib.import_module(f"diffiqa.{room}.api")
    assert callable(getattr(diffiqa, room))
    assert inspect.signature(getattr(diffiqa, room)) == inspect.signature(getattr(module, room))
    with pytest.raises((DiffiqaError, TypeError)):
        getattr(diffiqa, room)("no/such/engine", ["no/such/image"])


def test_importing_the_package_imports_nothing_heavy() -> None:
    code = (
        "import sys, diffiqa, diffiqa.cli\n"
        "heavy = {'PIL', 'torch', 'onnx', 'onnxruntime', 'scipy', 'matplotlib', 'rich'} & set(sys.modules)\n"
        "print(sorted(heavy))"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "[]"
