"""`figures/tables.py`: the tables of the documents come from the JSON, and a check tells when they do not."""

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
    page = tmp_path / "page.md"
    page.write_text(TABLE.format("old\n"), encoding="utf-8")
    stale = call("--check", page)
    assert stale.returncode == 1
    assert "<!-- table: figures -->" in stale.stderr
    assert page.read_text(encoding="utf-8") == TABLE.format("old\n")
    assert call(page).returncode == 0
    text = page.read_text(encoding="utf-8")
    assert text.startswith("before\n<!-- table: figures -->\n\n| what | measured |\n")
    assert text.endswith(" |\n\n<!-- end of table -->\nafter\n")
    assert call("--check", page).returncode == 0


def test_a_table_that_cannot_be_made_is_said(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    for text, says in (
        ("<!-- table: peers from none.json -->\n<!-- end of table -->", "none.json"),
        ("<!-- table: magic from score-full.json -->\n<!-- end of table -->", "no table is called 'magic'"),
        ("<!-- table: figures -->\n", "no <!-- end of table -->"),
        ("<!-- table: peers from score-full.json -->\n<!-- end of table -->", "is not what iqa-bench --json writes"),
    ):
        page.write_text(text, encoding="utf-8")
        result = call("--check", page)
        assert result.returncode == 1
        assert says in result.stderr, result.stderr
        assert "Traceback" not in result.stderr


def test_every_page_is_checked_and_each_problem_is_said(tmp_path: Path) -> None:
    pages = [tmp_path / "a.md", tmp_path / "b.md"]
    for page in pages:
        page.write_text(TABLE.format("old\n"), encoding="utf-8")
    result = call("--check", *pages)
    assert result.returncode == 1
    assert all(f"{page} differs" in result.stderr for page in pages)


def test_the_documents_hold_the_tables_as_they_are_made_today() -> None:
    result = call("--check")
    assert result.returncode == 0, result.stderr
