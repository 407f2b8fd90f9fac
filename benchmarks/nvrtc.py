"""NVRTC, the compiler that CuPy calls; it needs no GPU."""

import re
from typing import Any, NamedTuple

import ml_dtypes  # noqa: F401 - gives NumPy the name bfloat16
from cuda.bindings import nvrtc

from benchmarks.internals import Variant, kernel_source

# What ptxas says of a kernel; a quantity that it leaves out is zero.
QUANTITIES = {
    "registers": r"Used (\d+) registers",
    "shared_bytes": r"(\d+) bytes smem",
    "stack_bytes": r"(\d+) bytes stack frame",
    "spill_store_bytes": r"(\d+) bytes spill stores",
    "spill_load_bytes": r"(\d+) bytes spill loads",
}


class CompileError(Exception):
    """NVRTC refused; its log."""


class Compiled(NamedTuple):
    """A binary, and the compiler's report."""

    binary: bytes
    log: str

    @property
    def binary_bytes(self) -> int:
        return len(self.binary)

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
    binary = b" " * checked(nvrtc.nvrtcGetCUBINSize(program))
    checked(nvrtc.nvrtcGetCUBIN(program, binary))
    checked(nvrtc.nvrtcDestroyProgram(program))
    return Compiled(binary, log)
