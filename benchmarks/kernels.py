"""What every kernel takes of a multiprocessor: ``python -m benchmarks.kernels``.

Registers, shared memory, stack and spills: NVRTC compiles each variant for each
architecture as CuPy would, which needs no GPU.  These are facts of compilation and no
times.  With ``--budgets`` the machine code of the main kernels is counted, and compared
with the counts that were kept.
"""

from collections.abc import Iterable, Sequence
from typing import Any

from benchmarks import budgets, machine, records
from benchmarks.internals import Variant, all_variants
from benchmarks.nvrtc import QUANTITIES, CompileError, compile_variant, nvrtc_version
from benchmarks.report import Table

ARCHITECTURES = (75, 80, 90, 100, 120)
KERNELS = "kernels"
# Which macros make a variant what it is; the others only check its structs' sizes.
BOOKKEEPING = "_BYTES="
# One variant on one architecture: the ``kernel``, its ``variant`` and ``architecture``,
# and what `Compiled.resources` says, or the ``error`` if it did not compile.
Taken = dict[str, Any]


def taken(variant: Variant, architecture: int) -> Taken:
    words = [macro for macro in variant.macros if BOOKKEEPING not in macro]
    found = {"kernel": variant.kernel, "variant": words, "architecture": architecture}
    try:
        resources = compile_variant(variant, architecture).resources()
    except CompileError as error:
        return {**found, "error": str(error)}
    # What a launch asks for is not in the compiler's report.
    resources["shared_bytes"] += variant.shared
    return {**found, **resources}


def table(rows: Iterable[Taken]) -> Table:
    """A line for each kernel and architecture, with the most that any variant takes."""
    groups: dict[tuple[str, int], list[Taken]] = {}
    for row in rows:
        groups.setdefault((row["kernel"], row["architecture"]), []).append(row)
    lines, notes = [], []
    for key, each in sorted(groups.items()):
        most = [max(row.get(name, 0) for row in each) for name in QUANTITIES]
        lines.append([*key, len(each), *most])
        notes += [row["error"] for row in each if "error" in row]
    title = "Most that a variant takes: registers a thread, bytes"
    header = ["kernel", "sm", "variants", *QUANTITIES]
    return Table(title, header, lines, notes=notes)


def main(arguments: Sequence[str] | None = None) -> None:
    words, several = records.parser("benchmarks.kernels", __doc__), "may be repeated"
    words.add_argument("--kernel", action="append", help=several)
    one: Any = {"action": "append", "type": int, "choices": ARCHITECTURES}
    words.add_argument("--architecture", **one, help=f"{several} (default: all)")
    kept = (
        "compare counts of the main kernels' machine code with those kept; --save them"
    )
    words.add_argument("--budgets", action="store_true", help=kept)
    chosen = words.parse_args(arguments)
    if chosen.budgets:
        _budgets(save=chosen.out == records.RESULTS)
        return
    if chosen.out == records.RESULTS and (chosen.kernel or chosen.architecture):
        words.error("--save keeps every variant: no --kernel or --architecture")
    rows = [
        taken(variant, architecture)
        for architecture in chosen.architecture or ARCHITECTURES
        for variant in all_variants(architecture)
        if not chosen.kernel or variant.kernel in chosen.kernel
    ]
    if not rows:
        words.error(f"no kernel is named {' or '.join(chosen.kernel)}")
    if chosen.out:
        found = {**machine.provenance(), "nvrtc": nvrtc_version(), "kernels": rows}
        records.write(found, KERNELS, chosen.out)
    table(rows).show()


def _budgets(*, save: bool) -> None:
    """Show the counts, and keep them or stop where one is worse."""
    rows = list(budgets.all_measured())
    budgets.table(rows).show()
    if save:
        budgets.write(rows)
    elif worse := budgets.compared(rows):
        raise SystemExit("\n".join(worse))


if __name__ == "__main__":
    main()
