"""JSON under ``results/``: a record for each suite, and what else a run finds.

A record has the name of its ``suite``, the ``device``, the ``batch``, the ``wishes`` of
the command line, ``rounds`` and ``seconds`` of each peer on each case, the versions of
its ``peers``, the ``machine``, the ``commit``, whether it was ``dirty``, the ``date``
and its ``cases``.

A case has an ``operation``, a ``batch``, an ``arithmetic``, a ``name`` and a ``kind``,
its ``multiplications`` and ``findings`` by peer; a layer is described too, with its
``moved_bytes`` (of operands and result; early records lack them), and a network has the
names of its ``layers``.

A finding has a ``status``: ok, wrong, refused, failed or missing.  If it is ok it has
``calls``, ``milliseconds``, ``quartiles``, ``extra_bytes`` and ``weighed_by``, else a
``reason``.  It may have an ``error``, a ``strategy`` and ``promised_bytes``; that of a
network has ``first_milliseconds``, and its ``layers``' milliseconds.
"""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from benchmarks.suites import SUITES

RESULTS = Path(__file__).parent / "results"
# The checks and probes of a run on a GPU, beside the suites it measured.
GPU = "gpu"
# An option of every command that asks PyTorch.
TORCH_PYTHON: Any = {
    "metavar": "PATH",
    "default": sys.executable,
    "help": "the interpreter of an environment with PyTorch and ONNX Runtime",
}

Record = dict[str, Any]
CaseRecord = dict[str, Any]
Finding = dict[str, Any]


def parser(
    module: str, words: str | None, out: Path | None = None
) -> argparse.ArgumentParser:
    """A command line that says where to write: `RESULTS` with ``--save``."""
    summary = (words or "").partition("\n")[0]
    made = argparse.ArgumentParser(prog=f"python -m {module}", description=summary)
    keep = made.add_mutually_exclusive_group()
    where: Any = {"metavar": "FOLDER", "help": "write JSON there"}
    keep.add_argument("--out", type=Path, default=out, **where)
    save: Any = {"dest": "out", "help": f"write it to {RESULTS.name}/"}
    keep.add_argument("--save", action="store_const", const=RESULTS, **save)
    return made


def stem_of(record: Record) -> str:
    return str(record["suite"]) + ("-cuda" if record["device"] == "cuda" else "")


def write(found: Any, name: str, folder: Path = RESULTS) -> None:
    """At once: who is interrupted here leaves what there was."""
    folder.mkdir(parents=True, exist_ok=True)
    text = json.dumps(found, indent=1, ensure_ascii=False, allow_nan=False)
    part = folder / f"{name}.part"
    part.write_text(text + "\n", encoding="utf-8")
    part.replace(folder / f"{name}.json")


def read(name: str, folder: Path = RESULTS) -> Any:
    """None where it was never measured."""
    path = folder / f"{name}.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else None


def read_suites(folder: Path = RESULTS) -> list[Record]:
    """Those that were measured, on the CPU first, in the order of `SUITES`."""
    names = [f"{suite}{tail}" for tail in ("", "-cuda") for suite in SUITES]
    found = [record for name in names if (record := read(name, folder)) is not None]
    for case in (case for record in found for case in record["cases"]):
        # Early records lack it.
        case.setdefault("arithmetic", "float32")
    return found
