"""Measure, show, and keep: ``python -m benchmarks``.

Without options: ResNet-50's layers and the cost of a small call.  Every peer runs in a
process of its own and they take turns; a peer whose result is wrong is not timed.
"""

import argparse
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import track

from benchmarks import machine, records, report, small_call
from benchmarks.cases import Case
from benchmarks.gpu.checks import probe
from benchmarks.gpu.scale import FULL, QUICK
from benchmarks.layers import OPERATIONS, Pool
from benchmarks.peers import PEERS, PRECISIONS, known_peer, on_cuda
from benchmarks.records import Record
from benchmarks.runner import Effort, measure_case, new_record, workers
from benchmarks.suites import SUITES, Suite

SMALL_CALL = "small_call"
USUAL = Effort()
# Seconds in which a GPU says what it is and how fast.
PROBE_LIMIT = 600


def parser() -> argparse.ArgumentParser:
    words = argparse.ArgumentParser(
        prog="python -m benchmarks", description=__doc__.partition("\n")[0]
    )
    add, several = words.add_argument, "may be repeated"
    add(
        "--suite",
        action="append",
        choices=(*SUITES, SMALL_CALL),
        help=f"{several} (default: resnet50 and small_call)",
    )
    add("--operation", action="append", choices=OPERATIONS, help=several)
    add("--layer", default="", help="layers whose name contains this")
    add(
        "--peer",
        action="append",
        type=peer,
        help=f"{several}: {', '.join(PEERS)}; cuconv with options is "
        "cuconv@4MiB, cuconv@fast, cuconv@im2col (default: the suite's)",
    )
    add("--batch", type=positive(int), help="(default: the suite's)")
    add(
        "--repeats",
        type=positive(int),
        default=USUAL.rounds,
        help="rounds in which the peers take turns (default: %(default)s)",
    )
    add(
        "--seconds",
        type=positive(float),
        default=USUAL.seconds,
        help="time for a peer on a case, all rounds together (default: %(default)s)",
    )
    add(
        "--quick",
        action="store_true",
        help="a smoke test: the first two layers of each suite, batch 1, few calls",
    )
    add("--device", choices=("cpu", "cuda"), default="cpu")
    add("--precision", choices=PRECISIONS, default="standard")
    add("--memory-limit", metavar="BYTES", help="such as 4MiB")
    add(
        "--out-reuse",
        action="store_true",
        help="let cuconv write into one result array, call after call",
    )
    add(
        "--torch-python",
        metavar="PATH",
        default=sys.executable,
        help="the interpreter of an environment with PyTorch (default: this one)",
    )
    keep = words.add_mutually_exclusive_group()
    keep.add_argument("--out", type=Path, metavar="FOLDER", help="write JSON there")
    keep.add_argument(
        "--save", action="store_true", help=f"write it to {records.RESULTS.name}/"
    )
    return words


def peer(name: str) -> str:
    try:
        return known_peer(name)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def positive(kind: type[int] | type[float]) -> Any:
    def number(word: str) -> float:
        value = kind(word)
        if value <= 0:
            raise ValueError(word)
        return value

    number.__name__ = f"positive {kind.__name__}"
    return number


def chosen_suites(chosen: argparse.Namespace) -> list[Suite]:
    """The suites as the command line wants them, unless nothing is left of one."""
    found = []
    for suite in map(SUITES.get, dict.fromkeys(chosen.suite)):
        if suite is None:  # the small call
            continue
        layers = [each for each in suite.layers if chosen.layer in each.name]
        usual = on_cuda(suite.peers) if chosen.device == "cuda" else suite.peers
        wanted = chosen.operation or suite.operations
        possible = suite.layers[0].operations
        narrowed = replace(
            suite,
            layers=tuple(layers[:2] if chosen.quick else layers),
            batch=1 if chosen.quick else chosen.batch or suite.batch,
            peers=tuple(dict.fromkeys(chosen.peer or usual)),
            operations=tuple(each for each in wanted if each in possible),
        )
        if narrowed.layers and narrowed.operations:
            found.append(narrowed)
    return found


def machine_of(chosen: argparse.Namespace) -> dict[str, Any]:
    """The machine of a record; it measures for some seconds."""
    if chosen.device == "cuda":
        found = probe("machine", QUICK if chosen.quick else FULL, PROBE_LIMIT)
    else:
        found = machine.apart(machine.rates, quick=chosen.quick)
    return {**machine.host(), **found}


def run_suite(
    suite: Suite, chosen: argparse.Namespace, where: dict[str, Any]
) -> Record:
    wishes = {
        "device": chosen.device,
        "precision": chosen.precision,
        "memory_limit": chosen.memory_limit,
        "reuse_out": chosen.out_reuse,
    }
    effort = Effort(2, 0.02) if chosen.quick else Effort(chosen.repeats, chosen.seconds)
    cases = [
        Case(layer, operation, suite.batch)
        for operation in suite.operations
        for layer in suite.layers
    ]
    with workers(suite.peers, wishes, chosen.torch_python) as peers:
        record = new_record(suite.name, suite.batch, wishes, effort, peers, where)
        for case in track(cases, suite.name, console=Console(stderr=True)):
            record["cases"].append(measure_case(case, peers, effort))
    return record


def show(record: Record) -> None:
    console = Console()
    for line in (report.machine_line(record), report.ceiling_line(record)):
        console.print(line, highlight=False)
    for operation in report.values_of(record, "operation"):
        report.layer_table(record, operation).show()
    if len(record["peers"]) > 1:
        legend = report.LEGEND.format(subject=report.subject_of(record))
        console.print(legend, highlight=False)


def run(chosen: argparse.Namespace, suites: Sequence[Suite]) -> None:
    folder = records.RESULTS if chosen.save else chosen.out
    where = machine_of(chosen) if suites else {}
    found = []
    for suite in suites:
        record = run_suite(suite, chosen, where)
        found.append(record)
        if folder:
            records.write(record, records.stem_of(record), folder)
    for record in found:
        show(record)
    if SMALL_CALL in chosen.suite:
        small = small_call.run(quick=chosen.quick)
        if folder:
            records.write({**machine.provenance(), **small}, SMALL_CALL, folder)
        Console().print(report.small_call_text(small), highlight=False)


def main(arguments: Sequence[str] | None = None) -> None:
    words = parser()
    chosen = words.parse_args(arguments)
    if chosen.save and (chosen.quick or chosen.layer or chosen.operation):
        words.error("--save keeps whole suites: no --quick, --layer or --operation")
    chosen.suite = chosen.suite or ["resnet50", SMALL_CALL]
    suites = chosen_suites(chosen)
    if not suites and SMALL_CALL not in chosen.suite:
        narrow = [f"--operation {name}" for name in chosen.operation or ()]
        narrow += [f"--layer {chosen.layer!r}"] * bool(chosen.layer)
        words.error(f"no suite has it: {' '.join(narrow)}")
    unknown = {each for suite in suites for each in suite.operations} & {
        *Pool.operations
    }
    if chosen.device == "cuda" and unknown:
        words.error(f"--device cuda has no check of {', '.join(sorted(unknown))}")
    run(chosen, suites)


if __name__ == "__main__":
    main()
