"""What the main kernels may issue: counts of their machine code, kept and compared.

A multiprocessor issues four instructions a cycle, so the share of a loop's slots that
multiply bounds its speed from above.  Nothing here is a time.
"""

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from benchmarks import sass
from benchmarks.internals import (
    Addressing,
    ContractionTiling,
    Operand,
    Variant,
    contraction_variant,
)
from benchmarks.machine import ROOT
from benchmarks.nvrtc import compile_variant, nvrtc_version
from benchmarks.report import Table

KEPT = Path(__file__).parent / "budgets.json"
DOCS = ROOT / "docs" / "gpu.md"
MARKS = ("<!-- budgets -->", "<!-- end of budgets -->")
# Compilers differ by so much, as a fraction.
ALLOWED = 0.03
# And by so much more: registers are allocated by eight, and the distance between two
# copies depends on what the compiler moves there.
SLACK = {"registers": 8, "packed": 0.5, "single": 0.5}
COPY_SLACK = 2
# Of a multiprocessor: registers, bytes of shared memory, warps.
REGISTERS = 2**16
SHARED = {75: 64, 80: 164, 90: 228, 100: 228, 120: 100}
WARPS = {75: 32, 120: 48}
# Each block takes another one from 8.0 on.
RESERVED = 1024

BY_TERMS, ACROSS = Operand(along_terms=True, vector=1), Operand(False, 1)  # noqa: FBT003


class Kernel(NamedTuple):
    """One variant of `implicit_gemm`, and the operands that lead to it."""

    name: str
    dtype: str
    size: tuple[int, int]
    dense: Operand
    x: Operand
    tensor: bool = False
    sums_terms: bool = True
    is_partial: bool = False
    architectures: tuple[int, ...] = (90,)

    @property
    def tiling(self) -> ContractionTiling:
        return ContractionTiling.of(
            np.dtype(self.dtype), *self.size, tensor=self.tensor
        )

    @property
    def variant(self) -> Variant:
        dtype = np.dtype(self.dtype)
        return contraction_variant(
            *(dtype, dtype, self.tiling, self.dense, self.x),
            addressing=Addressing(sums_terms=self.sums_terms),
            is_partial=self.is_partial,
        )


def wide(number: int, *, along_terms: bool = True) -> Operand:
    return Operand(along_terms, number)


MODERN = (80, 90, 120)
LARGE, MEDIUM = (128, 128), (64, 128)
_TENSOR: Any = {"tensor": True}
KERNELS = (
    *(
        Kernel("float32, channels first", "float32", size, BY_TERMS, ACROSS)
        for size in (LARGE, MEDIUM)
    ),
    Kernel(
        *("float32, channels first, gradient of weights", "float32", MEDIUM),
        *(BY_TERMS, BY_TERMS),
        sums_terms=False,
    ),
    Kernel(
        *("float32, channels last", "float32", LARGE),
        *(wide(4, along_terms=False), BY_TERMS),
    ),
    *(
        Kernel("TF32, channels first", "float32", size, wide(4), ACROSS, **_TENSOR)
        for size in (LARGE, MEDIUM)
    ),
    Kernel(
        *("TF32, channels first, gradient of the input", "float32", MEDIUM),
        *(BY_TERMS, ACROSS),
        **_TENSOR,
    ),
    Kernel("TF32, channels last", "float32", LARGE, wide(4), wide(4), **_TENSOR),
    Kernel("float16, channels first", "float16", MEDIUM, wide(8), ACROSS, **_TENSOR),
    Kernel("float16, channels last", "float16", LARGE, wide(8), wide(8), **_TENSOR),
    Kernel(
        *("float16, channels first, gradient of weights in parts", "float16", MEDIUM),
        *(wide(8), BY_TERMS),
        **_TENSOR,
        sums_terms=False,
        is_partial=True,
    ),
)
ON_ALL = {0, 4, 9}  # of `KERNELS`


def measured(kernel: Kernel, architecture: int) -> dict[str, Any]:
    """What a kernel takes, as one line of the file."""
    variant, tiling = kernel.variant, kernel.tiling
    compiled = compile_variant(variant, architecture)
    taken = compiled.resources()
    item = np.dtype("float32" if kernel.is_partial else kernel.dtype).itemsize
    number = tiling.filters * tiling.columns // tiling.threads
    counts = sass.counts(sass.disassembled(compiled.binary), sass.Results(number, item))
    packed = {size > item: 0.0 for size, _ in counts.epilogue}
    for size, slots in counts.epilogue:
        packed[size > item] = max(packed[size > item], round(slots, 1))
    return {
        "kernel": kernel.name,
        "sm": architecture,
        "tile": f"{tiling.filters}×{tiling.columns}×{tiling.terms}",
        "slots": counts.slots,
        "alone": counts.alone,
        "share": round(counts.share(tiling.threads), 3),
        "registers": taken["registers"],
        "spills": taken["spill_store_bytes"] + taken["spill_load_bytes"],
        "warps": warps(
            taken["registers"], variant.shared, tiling.threads, architecture
        ),
        "copies": {str(x.bytes): round(x.slots, 1) for x in counts.copies},
        "packed": packed[True],
        "single": packed[False],
    }


def warps(registers: int, shared: int, threads: int, architecture: int) -> int:
    """Warps on a multiprocessor at once, by registers and shared memory."""
    each = threads // 32
    by_registers = REGISTERS // (-(-registers * 32 // 256) * 256) // each
    by_shared = (
        SHARED[architecture] * 1024 // (shared + RESERVED * (architecture >= 80))
    )
    return min(by_registers * each, by_shared * each, WARPS.get(architecture, 64))


def all_measured(*, only: Sequence[int] | None = None) -> Iterator[dict[str, Any]]:
    for number, kernel in enumerate(KERNELS):
        if only is None or number in only:
            every = number in ON_ALL and only is None
            for architecture in MODERN if every else (90,):
                yield measured(kernel, architecture)


def complaints(found: dict[str, Any], kept: dict[str, Any]) -> Iterator[str]:
    """Every figure that is worse than the one that was kept, by more than `ALLOWED`."""
    name = f"{found['kernel']}, {found['tile']}, sm_{found['sm']}"
    if found["spills"]:
        yield f"{name}: {found['spills']} bytes of spills"
    for key in ("share", "warps"):
        if found[key] < kept[key] * (1 - ALLOWED):
            yield f"{name}: {key} {found[key]}, kept {kept[key]}"
    pairs = {key: (found[key], kept[key], SLACK[key]) for key in SLACK}
    for size, slots in kept["copies"].items():
        key = f"slots of a copy of {size} bytes"
        pairs[key] = found["copies"].get(size, 0), slots, COPY_SLACK
    for key, (now, before, slack) in pairs.items():
        if now > before * (1 + ALLOWED) + slack:
            yield f"{name}: {key} {now}, kept {before}"


def key_of(row: dict[str, Any]) -> tuple[Any, ...]:
    return row["kernel"], row["tile"], row["sm"]


def compared(rows: Sequence[dict[str, Any]]) -> list[str]:
    """Complaints of all rows; one that was never kept is one."""
    kept = {key_of(row): row for row in read()["kernels"]}
    found: list[str] = []
    for row in rows:
        if key_of(row) in kept:
            found += complaints(row, kept[key_of(row)])
        else:
            found.append(f"{key_of(row)} was never kept")
    return found


def read() -> dict[str, Any]:
    kept: dict[str, Any] = json.loads(KEPT.read_text(encoding="utf-8"))
    return kept


def write(rows: Sequence[dict[str, Any]]) -> None:
    """Keep these figures, and show them in the documentation."""
    kept = {"nvrtc": nvrtc_version(), "kernels": list(rows)}
    text = json.dumps(kept, indent=1, ensure_ascii=False)
    KEPT.write_text(text + "\n", encoding="utf-8")
    DOCS.write_text(page(), encoding="utf-8")


def page() -> str:
    """Return the page of the documentation as it should be."""
    kept = read()
    shown = table(kept["kernels"]).markdown()
    before, start, rest = DOCS.read_text("utf-8").partition(MARKS[0])
    _, end, after = rest.partition(MARKS[1])
    if not (start and end):
        raise ValueError(f"{DOCS.name} lacks the marks {MARKS[0]} and {MARKS[1]}")
    origin = f"Compiled by NVRTC {kept['nvrtc']}."
    return f"{before}{start}\n\n{shown}\n\n{origin}\n\n{end}{after}"


def table(rows: Sequence[dict[str, Any]]) -> Table:
    header = ["kernel", "sm", "tile", "slots (+ one warp)", "multiply"]
    header += ["registers", "warps", "slots of a copy", "slots of a result"]
    lines = []
    for row in rows:
        copies = ", ".join(f"{n} B: {slots}" for n, slots in row["copies"].items())
        lines.append(
            [
                *(row["kernel"], str(row["sm"]), row["tile"]),
                f"{row['slots']} (+ {row['alone']})",
                f"{row['share']:.0%}",
                *(str(row["registers"]), str(row["warps"]), copies),
                f"{row['packed']} packed, {row['single']}",
            ]
        )
    return Table("Budgets of kernels", header, lines)
