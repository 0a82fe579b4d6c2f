"""`figures/tables.py`: the README's tables come from the JSON, and a check tells when they do not."""

import subprocess
import sys
from pathlib import Path

from diffiqa import cli

SCRIPT = Path(cli.__file__).parent / "figures" / "tables.py"
TABLE = "before\n<!-- table: figures -->\n{}<!-- end of table -->\nafter\n"


def call(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(SCRIPT), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_tables_are_made_and_then_checked(tmp_path: Path) -> None:
    readme = tmp_path / "README.md"
    readme.write_text(TABLE.format("old\n"), encoding="utf-8")
    stale = call("--check", "--readme", readme)
    assert stale.returncode == 1
    assert "<!-- table: figures -->" in stale.stderr
    assert readme.read_text(encoding="utf-8") == TABLE.format("old\n")
    assert call("--readme", readme).returncode == 0
    text = readme.read_text(encoding="utf-8")
    assert text.startswith("before\n<!-- table: figures -->\n\n| what | measured |\n")
    assert text.endswith(" |\n\n<!-- end of table -->\nafter\n")
    assert call("--check", "--readme", readme).returncode == 0


def test_a_table_that_cannot_be_made_is_said(tmp_path: Path) -> None:
    readme = tmp_path / "README.md"
    for text, says in (
        ("<!-- table: peers from none.json -->\n<!-- end of table -->", "none.json"),
        ("<!-- table: magic from score-full.json -->\n<!-- end of table -->", "no table is called 'magic'"),
        ("<!-- table: figures -->\n", "no <!-- end of table -->"),
        ("<!-- table: peers from score-full.json -->\n<!-- end of table -->", "is not what iqa-bench --json writes"),
    ):
        readme.write_text(text, encoding="utf-8")
        result = call("--check", "--readme", readme)
        assert result.returncode == 1
        assert says in result.stderr, result.stderr
        assert "Traceback" not in result.stderr
