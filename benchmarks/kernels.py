"""What every kernel takes of a multiprocessor: ``python -m benchmarks.kernels``.

Registers, shared memory, stack and spills: NVRTC compiles each variant for each
architecture as CuPy would, which needs no GPU.  These are facts of compilation and no
times.
"""

import re
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import ml_dtypes  # noqa: F401 - gives NumPy the name bfloat16
from cuda.bindings import nvrtc

from benchmarks import machine, records
from benchmarks.internals import Variant, all_variants, kernel_source
from benchmarks.report import Table

ARCHITECTURES = (75, 80, 90, 100, 120)
KERNELS = "kernels"
# Which macros make a variant what it is; the others only check its structs' sizes.
BOOKKEEPING = "_BYTES="
# What ptxas says of a kernel; a quantity that it leaves out is zero.
QUANTITIES = {
    "registers": r"Used (\d+) registers",
    "shared_bytes": r"(\d+) bytes smem",
    "stack_bytes": r"(\d+) bytes stack frame",
    "spill_store_bytes": r"(\d+) bytes spill stores",
    "spill_load_bytes": r"(\d+) bytes spill loads",
}

# One variant on one architecture: the ``kernel``, its ``variant`` and ``architecture``,
# and what `Compiled.resources` says, or the ``error`` if it did not compile.
Taken = dict[str, Any]


class CompileError(Exception):
    """NVRTC refused; its log."""


class Compiled(NamedTuple):
    """The size of a binary, and the compiler's report."""

    binary_bytes: int
    log: str

    def resources(self) -> dict[str, int]:
        """Registers a thread, bytes of shared memory, stack and spills, and the size.

        A log without the number of registers is no report, and raises ValueError.
        """
        found = {name: re.findall(way, self.log) for name, way in QUANTITIES.items()}
        if not found["registers"]:
            raise ValueError(f"ptxas reported no registers: {self.log!r}")
        sums = {name: sum(map(int, each)) for name, each in found.items()}
        sums["registers"] = max(map(int, found["registers"]))
        return {**sums, "binary_bytes": self.binary_bytes}


def nvrtc_version() -> str:
    return ".".join(str(part) for part in checked(nvrtc.nvrtcVersion()))


def checked(answer: tuple[Any, ...]) -> Any:
    """The values of an answer, without the status."""
    status, *values = answer
    if status != nvrtc.nvrtcResult.NVRTC_SUCCESS:
        raise RuntimeError(status)
    return values[0] if len(values) == 1 else values


def log_of(program: Any) -> str:
    log = b" " * checked(nvrtc.nvrtcGetProgramLogSize(program))
    checked(nvrtc.nvrtcGetProgramLog(program, log))
    return str(log.decode())


def compile_variant(variant: Variant, architecture: int) -> Compiled:
    """Compile as CuPy would, with the report of ptxas."""
    source = kernel_source(variant.kernel).encode()
    name = f"{variant.kernel}.cu".encode()
    program = checked(nvrtc.nvrtcCreateProgram(source, name, 0, [], []))
    options = [f"-D{macro}" for macro in variant.macros]
    options += [f"-arch=sm_{architecture}", "-std=c++17", "-ftz=true", "-Xptxas=-v"]
    encoded = [option.encode() for option in options]
    (status,) = nvrtc.nvrtcCompileProgram(program, len(encoded), encoded)
    log = log_of(program)
    if status != nvrtc.nvrtcResult.NVRTC_SUCCESS:
        raise CompileError(f"{variant} on sm_{architecture}: {log}")
    size = checked(nvrtc.nvrtcGetCUBINSize(program))
    checked(nvrtc.nvrtcDestroyProgram(program))
    return Compiled(size, log)


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
    chosen = words.parse_args(arguments)
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


if __name__ == "__main__":
    main()
