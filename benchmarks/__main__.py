"""Measure, show, and keep: ``python -m benchmarks``.

Without options: ResNet-50's layers and the cost of a small call.  Every peer runs in a
process of its own and they take turns; a peer whose result is wrong is not timed.
"""

import argparse
import sys
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from rich.console import Console
from rich.progress import track

from benchmarks import machine, records, report, small_call
from benchmarks.cases import TRAINING
from benchmarks.gpu.probes import command
from benchmarks.gpu.scale import FULL, QUICK
from benchmarks.gpu.steps import Step, run_step
from benchmarks.layers import OPERATIONS, Pool
from benchmarks.networks import Network
from benchmarks.peers import PEERS, PRECISIONS, on_cuda, wishes_of
from benchmarks.runner import Effort, measure_case, new_record, workers
from benchmarks.suites import SUITES, Suite

SMALL_CALL = "small_call"
ALL = (*SUITES, SMALL_CALL)
SEVERAL = "may be repeated"
# Seconds in which a GPU says what it is and how fast.
PROBE_LIMIT = 600
SUITE_HELP = f"{SEVERAL}: {', '.join(ALL)} (default: resnet50 and small_call)"
PEER_HELP = f"""{SEVERAL}: {", ".join(PEERS)}; cuconv with options is cuconv@4MiB,
cuconv@fast, cuconv@im2col (default: the suite's)"""
ROUNDS_HELP = "rounds in which the peers take turns (default: %(default)s)"
SECONDS_HELP = "time for a peer on a case, all rounds together (default: %(default)s)"
QUICK_HELP = "a smoke test: the first two layers of each suite, batch 1, few calls"
REUSE_HELP = "let cuconv write into one result array, call after call"


def parser() -> argparse.ArgumentParser:
    words, usual = records.parser("benchmarks", __doc__), Effort()
    add, operations = words.add_argument, (*OPERATIONS, TRAINING)
    suite: Any = {"dest": "suite", "metavar": "SUITE", "help": SUITE_HELP}
    add(nargs="*", action="extend", choices=[[], *ALL], **suite)
    add("--suite", action="append", choices=ALL, **suite)
    add("--operation", action="append", choices=operations, help=SEVERAL)
    add("--layer", default="", help="layers, or networks, whose name contains this")
    add("--peer", action="append", help=PEER_HELP)
    add("--batch", type=int, help="(default: the suite's)")
    add("--repeats", type=int, default=usual.rounds, help=ROUNDS_HELP)
    add("--seconds", type=float, default=usual.seconds, help=SECONDS_HELP)
    add("--quick", action="store_true", help=QUICK_HELP)
    add("--device", choices=("cpu", "cuda"), default="cpu")
    add("--precision", choices=PRECISIONS, default="standard")
    add("--memory-limit", metavar="BYTES", help="such as 4MiB")
    add("--out-reuse", dest="reuse_out", action="store_true", help=REUSE_HELP)
    add("--torch-python", **records.TORCH_PYTHON)
    return words


def chosen_suites(chosen: argparse.Namespace) -> list[Suite]:
    """The suites as the command line wants them, unless nothing is left of one."""
    found = []
    for suite in (SUITES[name] for name in chosen.suite if name in SUITES):
        layers = [each for each in suite.layers if chosen.layer in each.name]
        usual = on_cuda(suite.peers) if chosen.device == "cuda" else suite.peers
        wanted = chosen.operation or suite.operations
        narrowed = replace(
            suite,
            layers=tuple(layers[:2] if chosen.quick else layers),
            batch=1 if chosen.quick else chosen.batch or suite.batch,
            peers=tuple(dict.fromkeys(chosen.peer or usual)),
            operations=tuple(op for op in wanted if op in suite.layers[0].operations),
        )
        if narrowed.layers and narrowed.operations:
            found.append(narrowed)
    return found


def show(record: records.Record) -> None:
    print(f"{report.machine_line(record)}\n{report.ceiling_line(record)}\n")
    for table in report.tables(record):
        table.show()
    if len(record["peers"]) > 1:
        print(report.legend(record))


def run(chosen: argparse.Namespace, suites: Sequence[Suite]) -> None:
    """Measure, keep each record, and show them all."""
    quick = chosen.quick
    names = ("device", "precision", "memory_limit", "reuse_out")
    wishes = {name: getattr(chosen, name) for name in names}
    effort = Effort(2, 0.02) if quick else Effort(chosen.repeats, chosen.seconds)
    where, found = machine.host(), []
    if suites and chosen.device == "cuda":
        step = Step("machine", 1, command("machine", QUICK if quick else FULL))
        ended = run_step(step, PROBE_LIMIT)
        if "reason" in ended:
            sys.exit("\n".join([*ended.get("tail", ()), ended["reason"]]))
        where |= ended["found"]
    elif suites:
        where |= machine.apart(machine.rates, quick=quick)
    for suite in suites:
        with workers(suite.peers, wishes, chosen.torch_python) as peers:
            more = {"wishes": wishes, "machine": where}
            record = new_record(suite.name, suite.batch, effort, peers, **more)
            for case in track(suite.cases(), suite.name, console=Console(stderr=True)):
                record["cases"].append(measure_case(case, peers, effort))
        found.append(record)
        if chosen.out:
            records.write(record, records.stem_of(record), chosen.out)
    for record in found:
        show(record)
    if SMALL_CALL in chosen.suite:
        small = small_call.run(quick=quick)
        if chosen.out:
            records.write({**machine.provenance(), **small}, SMALL_CALL, chosen.out)
        print(report.small_call_text(small))


def main(arguments: Sequence[str] | None = None) -> None:
    words = parser()
    chosen = words.parse_args(arguments)
    for name in ("batch", "repeats", "seconds"):
        if (value := getattr(chosen, name)) is not None and value <= 0:
            words.error(f"--{name} must be positive, not {value}")
    for name in chosen.peer or ():
        try:
            wishes_of(name, {})
        except ValueError as error:
            words.error(f"--peer: {error}")
    narrow = [f"--operation {name}" for name in chosen.operation or ()]
    narrow += [f"--layer {chosen.layer!r}"] * bool(chosen.layer)
    if chosen.out == records.RESULTS and (chosen.quick or narrow):
        words.error("--save keeps whole suites: no --quick, --layer or --operation")
    chosen.suite = dict.fromkeys(chosen.suite or ["resnet50", SMALL_CALL])
    suites = chosen_suites(chosen)
    if not suites and SMALL_CALL not in chosen.suite:
        words.error(f"no suite has it: {' '.join(narrow)}")
    unchecked = [s.name for s in suites if isinstance(s.layers[0], Pool | Network)]
    if chosen.device == "cuda" and unchecked:
        words.error(f"--device cuda has no check of {', '.join(unchecked)}")
    run(chosen, suites)


if __name__ == "__main__":
    main()
