"""What every kernel takes of a multiprocessor: ``python -m benchmarks.kernels``.

Registers, shared memory, stack and spills: NVRTC compiles each variant for each
architecture, which needs no GPU.  These are facts of compilation and no times.
"""

import argparse
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from benchmarks import machine, nvrtc, records
from benchmarks.internals import Variant, all_variants
from benchmarks.report import Table

KERNELS = "kernels"
# Which macros make a variant what it is; the others only check its structs' sizes.
BOOKKEEPING = "_BYTES="
MOST = ("registers", "shared_bytes", "stack_bytes")
SPILLS = ("spill_store_bytes", "spill_load_bytes")

# One variant on one architecture: the ``kernel``, its ``variant`` and ``architecture``,
# and what `nvrtc.Compiled.resources` says, or the ``error`` if it did not compile.
Taken = dict[str, Any]


def taken(variant: Variant, architecture: int) -> Taken:
    words = [macro for macro in variant.macros if BOOKKEEPING not in macro]
    found: Taken = {"kernel": variant.kernel, "variant": words}
    found["architecture"] = architecture
    try:
        found |= nvrtc.compile_variant(variant, architecture).resources()
        # What a launch asks for is not in the compiler's report.
        found["shared_bytes"] += variant.shared
    except nvrtc.CompileError as error:
        found["error"] = str(error)
    return found


def table(rows: Iterable[Taken]) -> Table:
    """A line for each kernel and architecture, with the most that any variant takes."""
    groups: dict[tuple[str, int], list[Taken]] = {}
    for row in rows:
        groups.setdefault((row["kernel"], row["architecture"]), []).append(row)
    lines = []
    for key, each in sorted(groups.items()):
        most = [max(row.get(name, 0) for row in each) for name in MOST]
        spilled = [row.get(SPILLS[0], 0) + row.get(SPILLS[1], 0) for row in each]
        lines.append([*key, len(each), *most, max(spilled)])
    title = "Most that a variant takes: registers a thread, bytes"
    header = ["kernel", "sm", "variants", "registers", "shared", "stack", "spilled"]
    notes = [row["error"] for each in groups.values() for row in each if "error" in row]
    return Table(title, header, lines, notes=notes)


def main(arguments: Sequence[str] | None = None) -> None:
    words = argparse.ArgumentParser(
        prog="python -m benchmarks.kernels", description=__doc__.partition("\n")[0]
    )
    add, known = words.add_argument, nvrtc.ARCHITECTURES
    add("--kernel", action="append", help="may be repeated")
    several = "may be repeated (default: all)"
    add("--architecture", action="append", type=int, choices=known, help=several)
    add("--out", type=Path, metavar="FOLDER", help="write JSON there")
    save_help = f"write it to {records.RESULTS.name}/"
    add("--save", action="store_true", help=save_help)
    chosen = words.parse_args(arguments)
    if chosen.save and (chosen.kernel or chosen.architecture):
        words.error("--save keeps every variant: no --kernel or --architecture")
    rows = [
        taken(variant, architecture)
        for architecture in chosen.architecture or known
        for variant in all_variants(architecture)
        if not chosen.kernel or variant.kernel in chosen.kernel
    ]
    if not rows:
        words.error(f"no kernel is named {' or '.join(chosen.kernel)}")
    folder = records.RESULTS if chosen.save else chosen.out
    if folder:
        found = {**machine.provenance(), "nvrtc": nvrtc.version(), "kernels": rows}
        records.write(found, KERNELS, folder)
    table(rows).show()


if __name__ == "__main__":
    main()
