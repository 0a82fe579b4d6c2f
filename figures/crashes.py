"""Runs the crash tests and records how many faults they planted: `python figures/crashes.py [REPORT.xml]`.

At each change of the disk the power is cut, with four outcomes, and the change fails. REPORT.xml is what `pytest
tests/crash/test_crashes.py -o junit_family=xunit1 --junitxml=REPORT.xml` wrote; without it the tests run now.
"""

import subprocess
import sys
import tempfile
import xml.etree.ElementTree as ET
from pathlib import Path

from record import ROOT, write

OUTCOMES = 4  # of a power cut: see tests/crash/disk.py


def main() -> None:
    """Write figures/results/crashes.json."""
    with tempfile.TemporaryDirectory() as folder:
        report = Path(sys.argv[1]) if len(sys.argv) > 1 else Path(folder, "report.xml")
        if len(sys.argv) == 1:
            # The other form of reports has no properties.
            form = ["-o", "junit_family=xunit1", f"--junitxml={report}"]
            tests = [sys.executable, "-m", "pytest", "-q", "tests/crash/test_crashes.py", *form]
            subprocess.run(tests, cwd=ROOT, check=False)
        cases = ET.parse(report).getroot().iter("testcase")  # noqa: S314 — we wrote it
        found: dict[str, dict[str, int]] = {}
        for case in cases:
            if case.find("error") is not None or case.find("skipped") is not None:
                sys.exit(f"{case.get('name')} did not run; nothing is recorded")
            changes = sum(int(p.get("value", 0)) for p in case.iter("property") if p.get("name") == "changes")
            name = case.get("name", "").partition("[")[0].removeprefix("test_")
            row = found.setdefault(name, {"changes": 0, "power_cuts": 0, "failures": 0, "lost": 0})
            row["changes"] += changes
            row["power_cuts"] += OUTCOMES * changes
            row["failures"] += changes
            row["lost"] += case.find("failure") is not None
    write("crashes", {"commands": found})


if __name__ == "__main__":
    main()
