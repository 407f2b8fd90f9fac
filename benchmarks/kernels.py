"""What every kernel takes of a multiprocessor: ``python -m benchmarks.kernels``.

Registers, shared memory, stack and spills: NVRTC compiles each variant for each
architecture, which needs no GPU.  These are facts of compilation and no times.
"""

import argparse
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NotRequired, TypedDict

from benchmarks import machine, nvrtc, records
from benchmarks.report import Table
from benchmarks.show import show_table
from cuconv.backends.cuda.elements import Variant
from cuconv.backends.cuda.variants import all_variants

KERNELS = "kernels"
# Which macros make a variant what it is; the others only check its structs' sizes.
BOOKKEEPING = "_BYTES="


class Taken(TypedDict):
    """One variant on one architecture: what it takes, or why it did not compile."""

    kernel: str
    variant: list[str]
    architecture: int
    registers: NotRequired[int]
    shared_bytes: NotRequired[int]
    stack_bytes: NotRequired[int]
    spill_store_bytes: NotRequired[int]
    spill_load_bytes: NotRequired[int]
    binary_bytes: NotRequired[int]
    error: NotRequired[str]


def taken(variant: Variant, architecture: int) -> Taken:
    words = [macro for macro in variant.macros if BOOKKEEPING not in macro]
    found: Any = {
        "kernel": variant.kernel,
        "variant": words,
        "architecture": architecture,
    }
    try:
        found |= nvrtc.compile_variant(variant, architecture).resources()
        # What a launch asks for is not in the compiler's report.
        found["shared_bytes"] += variant.shared
    except nvrtc.CompileError as error:
        found["error"] = str(error)
    return found  # type: ignore[no-any-return]


def report(
    kernels: Sequence[str] = (), architectures: Sequence[int] = nvrtc.ARCHITECTURES
) -> Iterator[Taken]:
    """Every variant of these kernels, or of all, on these architectures."""
    for architecture in architectures:
        for variant in all_variants(architecture):
            if not kernels or variant.kernel in kernels:
                yield taken(variant, architecture)


def table(rows: Iterable[Taken]) -> Table:
    """A line for each kernel and architecture, with the most that any variant takes."""
    groups: dict[tuple[str, int], list[Taken]] = {}
    for row in rows:
        groups.setdefault((row["kernel"], row["architecture"]), []).append(row)
    header = ["kernel", "sm", "variants", "registers", "shared", "stack", "spilled"]
    lines = [line(*key, each) for key, each in sorted(groups.items())]
    notes = [row["error"] for each in groups.values() for row in each if "error" in row]
    return Table(
        "Most that a variant takes: registers a thread, bytes",
        header,
        lines,
        notes=notes,
    )


def line(kernel: str, architecture: int, rows: Sequence[Taken]) -> list[str]:
    def most(*names: str) -> str:
        return str(max(sum(row.get(name, 0) for name in names) for row in rows))  # type: ignore[misc]

    return [
        kernel,
        str(architecture),
        str(len(rows)),
        *(most("registers"), most("shared_bytes"), most("stack_bytes")),
        most("spill_store_bytes", "spill_load_bytes"),
    ]


def parser() -> argparse.ArgumentParser:
    words = argparse.ArgumentParser(
        prog="python -m benchmarks.kernels", description=__doc__.partition("\n")[0]
    )
    words.add_argument("--kernel", action="append", help="may be repeated")
    words.add_argument(
        "--architecture",
        action="append",
        type=int,
        choices=nvrtc.ARCHITECTURES,
        help="may be repeated (default: all)",
    )
    words.add_argument("--out", type=Path, metavar="FOLDER", help="write JSON there")
    words.add_argument(
        "--save", action="store_true", help=f"write it to {records.RESULTS.name}/"
    )
    return words


def main(arguments: Sequence[str] | None = None) -> None:
    words = parser()
    chosen = words.parse_args(arguments)
    if chosen.save and (chosen.kernel or chosen.architecture):
        words.error("--save keeps every variant: no --kernel or --architecture")
    architectures = chosen.architecture or nvrtc.ARCHITECTURES
    rows = [*report(chosen.kernel or (), architectures)]
    if not rows:
        words.error(f"no kernel is named {' or '.join(chosen.kernel)}")
    folder = records.RESULTS if chosen.save else chosen.out
    if folder:
        found = {**machine.provenance(), "nvrtc": nvrtc.version(), "kernels": rows}
        records.write(found, KERNELS, folder)
    show_table(table(rows))


if __name__ == "__main__":
    main()
