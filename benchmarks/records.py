"""JSON under ``results/``: a record for each suite, and what else a run finds.

A record has the name of its ``suite``, the ``device``, the ``batch``, the ``wishes`` of
the command line, ``rounds`` and ``seconds`` of each peer on each case, the versions of
its ``peers``, the ``machine``, the ``commit``, whether it was ``dirty``, the ``date``
and its ``cases``.

A case has a ``layer``, an ``operation``, a ``batch``, an ``arithmetic``, the ``name``
and the ``kind`` of the layer, its ``multiplications``, ``moved_bytes`` (of operands and
result; early records lack them) and ``findings`` by peer.

A finding has a ``status``: ok, wrong, refused, failed or missing.  If it is ok it has
``calls``, ``milliseconds``, ``quartiles``, ``extra_bytes`` and ``weighed_by``, else a
``reason``.  It may have an ``error``, a ``strategy`` and ``promised_bytes``.
"""

import json
from pathlib import Path
from typing import Any

from benchmarks.suites import SUITES

RESULTS = Path(__file__).parent / "results"
# The checks and probes of a run on a GPU, beside the suites it measured.
GPU = "gpu"

Record = dict[str, Any]
CaseRecord = dict[str, Any]
Finding = dict[str, Any]


def stem_of(record: Record) -> str:
    return str(record["suite"]) + ("-cuda" if record["device"] == "cuda" else "")


def write(found: Any, name: str, folder: Path = RESULTS) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    text = json.dumps(found, indent=1, ensure_ascii=False, allow_nan=False)
    (folder / f"{name}.json").write_text(text + "\n", encoding="utf-8")


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
