"""What a run leaves behind: one JSON file for each suite, under ``results/``."""

import json
from pathlib import Path
from typing import Any, NotRequired, TypedDict

from benchmarks.suites import SUITES

RESULTS = Path(__file__).parent / "results"
# The checks and probes of a run on a GPU, beside the suites it measured.
GPU = "gpu"


class Finding(TypedDict, total=False):
    """One peer on one case.

    ``status`` is ok, wrong, refused, failed or missing; the times are there if it is
    ok, and the reason if it is not.
    """

    status: str
    reason: str
    error: float | None
    strategy: str | None
    promised_bytes: int
    calls: int
    milliseconds: float
    quartiles: list[float]
    extra_bytes: int | None
    weighed_by: str


class CaseRecord(TypedDict):
    """One layer and operation; the findings by peer.

    The arithmetic is float32 where nothing else is said.  Operands and result have so
    many bytes, which counts where nothing is multiplied.
    """

    layer: dict[str, Any]
    operation: str
    batch: int
    arithmetic: NotRequired[str]
    name: str
    kind: str
    multiplications: int
    moved_bytes: NotRequired[int]
    findings: dict[str, Finding]


class Record(TypedDict):
    """One suite."""

    suite: str
    device: str
    batch: int
    wishes: dict[str, Any]
    rounds: int
    seconds: float
    peers: dict[str, dict[str, Any]]
    machine: dict[str, Any]
    commit: str
    dirty: bool
    date: str
    cases: list[CaseRecord]


def stem_of(record: Record) -> str:
    return record["suite"] + ("-cuda" if record["device"] == "cuda" else "")


def write(found: Any, name: str, folder: Path = RESULTS) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}.json"
    text = json.dumps(found, indent=1, ensure_ascii=False, allow_nan=False)
    path.write_text(text + "\n", encoding="utf-8")
    return path


def read(name: str, folder: Path = RESULTS) -> Any:
    """None where it was never measured."""
    path = folder / f"{name}.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else None


def read_suites(folder: Path = RESULTS) -> list[Record]:
    """Those that were measured, on the CPU first, in the order of `SUITES`."""
    names = [f"{suite}{tail}" for tail in ("", "-cuda") for suite in SUITES]
    found = (read(name, folder) for name in names)
    return [record for record in found if record is not None]
