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
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
)

from benchmarks import machine, records, report, small_call
from benchmarks.cases import Case
from benchmarks.definitions import DEFINITIONS, operations_on
from benchmarks.peers import PEERS, PRECISIONS, kind_of, on_cuda
from benchmarks.records import Record
from benchmarks.runner import Effort, Worker, measure_case, workers
from benchmarks.show import show_table
from benchmarks.suites import SUITES, Suite
from benchmarks.taps import REFERENCES

SMALL_CALL = "small_call"
QUICK = Effort(rounds=2, seconds=0.02)


def parser() -> argparse.ArgumentParser:
    words = argparse.ArgumentParser(
        prog="python -m benchmarks", description=__doc__.partition("\n")[0]
    )
    add_choice(words)
    add_effort(words)
    words.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    words.add_argument("--precision", choices=PRECISIONS, default="standard")
    words.add_argument("--memory-limit", metavar="BYTES", help="such as 4MiB")
    words.add_argument(
        "--out-reuse",
        action="store_true",
        help="let cuconv write into one result array, call after call",
    )
    words.add_argument(
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


def add_choice(words: argparse.ArgumentParser) -> None:
    words.add_argument(
        "--suite",
        action="append",
        choices=(*SUITES, SMALL_CALL),
        help="may be repeated (default: resnet50 and small_call)",
    )
    words.add_argument(
        "--operation", action="append", choices=DEFINITIONS, help="may be repeated"
    )
    words.add_argument("--layer", default="", help="layers whose name contains this")
    words.add_argument(
        "--peer",
        action="append",
        type=known_peer,
        help=f"may be repeated: {', '.join(PEERS)}; cuconv with options is "
        "cuconv@4MiB, cuconv@fast, cuconv@im2col (default: the suite's)",
    )
    words.add_argument("--batch", type=positive(int), help="(default: the suite's)")


def add_effort(words: argparse.ArgumentParser) -> None:
    usual = Effort()
    words.add_argument(
        "--repeats",
        type=positive(int),
        default=usual.rounds,
        help="rounds in which the peers take turns (default: %(default)s)",
    )
    words.add_argument(
        "--seconds",
        type=positive(float),
        default=usual.seconds,
        help="time for a peer on a case, all rounds together (default: %(default)s)",
    )
    words.add_argument(
        "--quick",
        action="store_true",
        help="a smoke test: the first two layers of each suite, batch 1, few calls",
    )


def known_peer(name: str) -> str:
    try:
        kind_of(name)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error
    return name


def positive(kind: type[int] | type[float]) -> Any:
    def number(word: str) -> float:
        value = kind(word)
        if value <= 0:
            raise ValueError(word)
        return value

    number.__name__ = f"positive {kind.__name__}"
    return number


def chosen_suite(name: str, chosen: argparse.Namespace) -> Suite:
    """A suite as the command line wants it."""
    suite = SUITES[name]
    layers = [each for each in suite.layers if chosen.layer in each.name]
    usual = on_cuda(suite.peers) if chosen.device == "cuda" else suite.peers
    possible = operations_on(type(suite.layers[0]))
    wanted = chosen.operation or suite.operations
    return replace(
        suite,
        layers=tuple(layers[:2] if chosen.quick else layers),
        batch=1 if chosen.quick else chosen.batch or suite.batch,
        peers=tuple(dict.fromkeys(chosen.peer or usual)),
        operations=tuple(each for each in wanted if each in possible),
    )


def run_suite(
    suite: Suite, chosen: argparse.Namespace, where: dict[str, Any], bar: Progress
) -> Record:
    wishes = {
        "device": chosen.device,
        "precision": chosen.precision,
        "memory_limit": chosen.memory_limit,
        "reuse_out": chosen.out_reuse,
    }
    effort = QUICK if chosen.quick else Effort(chosen.repeats, chosen.seconds)
    origin = machine.provenance()
    with workers(suite.peers, wishes, chosen.torch_python) as peers:
        cases = run_cases(suite, peers, effort, bar)
        hellos = {name: worker.hello for name, worker in peers.items()}
    return {
        "suite": suite.name,
        "device": chosen.device,
        "batch": suite.batch,
        "wishes": wishes,
        "rounds": effort.rounds,
        "seconds": effort.seconds,
        "peers": hellos,
        "machine": where,
        **origin,  # type: ignore[typeddict-item]
        "cases": cases,
    }


def run_cases(
    suite: Suite, peers: dict[str, Worker], effort: Effort, bar: Progress
) -> list[records.CaseRecord]:
    cases = [
        Case(layer, operation, suite.batch)
        for operation in suite.operations
        for layer in suite.layers
    ]
    steps = len(peers) + effort.rounds
    task = bar.add_task(suite.name, total=len(cases) * steps)
    found = []
    for case in cases:
        bar.update(task, description=f"{suite.name} {case.operation} {case.layer.name}")
        found.append(measure_case(case, peers, effort, lambda: bar.advance(task)))
    bar.update(task, description=suite.name)
    return found


def show(record: Record, console: Console) -> None:
    for line in (report.machine_line(record), report.ceiling_line(record)):
        console.print(line, highlight=False)
    for operation in report.operations_of(record):
        show_table(report.layer_table(record, operation))
    if len(record["peers"]) > 1:
        legend = report.LEGEND.format(subject=report.subject_of(record))
        console.print(legend, highlight=False)


def progress(console: Console) -> Progress:
    columns = (BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    words = TextColumn("{task.description}")
    return Progress(words, *columns, console=console)


def chosen_suites(chosen: argparse.Namespace) -> list[Suite]:
    """Those with a layer and an operation that are wanted."""
    names = dict.fromkeys(chosen.suite)
    suites = (chosen_suite(name, chosen) for name in names if name != SMALL_CALL)
    return [suite for suite in suites if suite.layers and suite.operations]


def asked_for(chosen: argparse.Namespace) -> str:
    """The options that narrow a suite, as they were given."""
    operations = " ".join(f"--operation {name}" for name in chosen.operation or ())
    layers = f"--layer {chosen.layer!r}" if chosen.layer else ""
    return " ".join(filter(None, (layers, operations)))


def unchecked(suites: Sequence[Suite]) -> list[str]:
    """Operations whose whole results cannot be checked on a GPU."""
    operations = dict.fromkeys(each for suite in suites for each in suite.operations)
    return [each for each in operations if each not in REFERENCES]


def run(chosen: argparse.Namespace, suites: Sequence[Suite], console: Console) -> None:
    folder = records.RESULTS if chosen.save else chosen.out
    where = machine.describe(chosen.device, quick=chosen.quick) if suites else {}
    found = []
    with progress(Console(stderr=True)) as bar:
        for suite in suites:
            record = run_suite(suite, chosen, where, bar)
            found.append(record)
            if folder:
                records.write(record, records.stem_of(record), folder)
    for record in found:
        show(record, console)
    if SMALL_CALL in chosen.suite:
        keep_small_call(chosen, folder, console)


def keep_small_call(
    chosen: argparse.Namespace, folder: Path | None, console: Console
) -> None:
    found = small_call.run(quick=chosen.quick)
    if folder:
        records.write({**machine.provenance(), **found}, SMALL_CALL, folder)
    console.print(report.small_call_text(found), highlight=False)


def main(arguments: Sequence[str] | None = None) -> None:
    words = parser()
    chosen = words.parse_args(arguments)
    if chosen.save and (chosen.quick or chosen.layer or chosen.operation):
        words.error("--save keeps whole suites: no --quick, --layer or --operation")
    chosen.suite = chosen.suite or ["resnet50", SMALL_CALL]
    suites = chosen_suites(chosen)
    if not suites and SMALL_CALL not in chosen.suite:
        words.error(f"no suite has it: {asked_for(chosen)}")
    if chosen.device == "cuda" and (unknown := unchecked(suites)):
        words.error(f"--device cuda has no check of {', '.join(unknown)}")
    run(chosen, suites, Console())


if __name__ == "__main__":
    main()
