"""Run mypy and pyright on programs of users: ``python tests/check_types.py``.

They must find nothing in ``typing/right.py``, and a mistake on each line of
``typing/wrong.py`` that is marked with ``# error``, and on no other.
"""

import json
import re
import subprocess
import sys
from pathlib import Path

PROGRAMS = Path(__file__).parent / "typing"


def marked(program: Path) -> set[int]:
    lines = program.read_text(encoding="utf-8").splitlines()
    return {n for n, line in enumerate(lines, 1) if line.endswith("# error")}


def by_mypy(program: Path) -> set[int]:
    """The lines in which mypy finds a mistake."""
    command = [sys.executable, "-m", "mypy", "--strict", "--config-file=", program]
    found = subprocess.run(command, capture_output=True, text=True, check=False).stdout
    return {int(n) for n in re.findall(rf"{program.name}:(\d+): error", found)}


def by_pyright(program: Path) -> set[int]:
    """The lines in which pyright finds a mistake."""
    command = [sys.executable, "-m", "pyright", "--outputjson"]
    command += ["--pythonpath", sys.executable, program]
    found = subprocess.run(command, capture_output=True, text=True, check=False).stdout
    every = json.loads(found)["generalDiagnostics"]
    errors = [each for each in every if each["severity"] == "error"]
    return {each["range"]["start"]["line"] + 1 for each in errors}


def main() -> int:
    failed = 0
    for program in sorted(PROGRAMS.glob("*.py")):
        wanted = marked(program)
        for checker in (by_mypy, by_pyright):
            found = checker(program)
            missed, more = sorted(wanted - found), sorted(found - wanted)
            failed += bool(missed or more)
            print(
                f"{checker.__name__} {program.name}: {len(wanted)} mistakes, "
                f"missed {missed}, found elsewhere {more}"
            )
    return min(failed, 1)


if __name__ == "__main__":
    sys.exit(main())
