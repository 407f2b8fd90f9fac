"""Every variant of every kernel compiles for every architecture; needs no GPU."""

import re

import pytest
from cuda.bindings import nvrtc

from cuconv._cuda.source import kernel_folder, kernel_source
from cuconv._cuda.variants import Variant, all_variants

ARCHITECTURES = (75, 80, 90, 100, 120)
KERNELS = {
    "im2col": 48,
    "col2im_gather": 66,
    "col2im_scatter": 48,
    "matmul": 5,
    "depthwise": 16,
    "depthwise_weights": 16,
}


def _checked(answer):
    status, *values = answer
    if status != nvrtc.nvrtcResult.NVRTC_SUCCESS:
        raise RuntimeError(status)
    return values[0] if values else None


def _log(program) -> str:
    size = _checked(nvrtc.nvrtcGetProgramLogSize(program))
    log = b" " * size
    _checked(nvrtc.nvrtcGetProgramLog(program, log))
    return log.decode()


def compile_variant(variant: Variant, architecture: int) -> tuple[int, str]:
    """Compile as CuPy would; the size of the binary and the compiler's report."""
    source = kernel_source(variant.kernel).encode()
    name = f"{variant.kernel}.cu".encode()
    program = _checked(nvrtc.nvrtcCreateProgram(source, name, 0, [], []))
    options = [
        *(f"-D{macro}" for macro in variant.macros),
        *(f"-arch=sm_{architecture}", "-std=c++17", "-ftz=true", "-Xptxas=-v"),
    ]
    encoded = [option.encode() for option in options]
    (status,) = nvrtc.nvrtcCompileProgram(program, len(encoded), encoded)
    log = _log(program)
    assert status == nvrtc.nvrtcResult.NVRTC_SUCCESS, f"{variant}: {log}"
    size = _checked(nvrtc.nvrtcGetCUBINSize(program))
    _checked(nvrtc.nvrtcDestroyProgram(program))
    return size, log


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("kernel", KERNELS)
def test_every_variant_compiles_without_spills(kernel, architecture):
    variants = [v for v in all_variants() if v.kernel == kernel]
    assert len(set(variants)) == len(variants) == KERNELS[kernel]
    for variant in variants:
        size, log = compile_variant(variant, architecture)
        assert size > 0
        spilled = re.findall(r"(\d+) bytes spill", log)
        assert spilled, log
        assert set(spilled) == {"0"}, f"{variant} on sm_{architecture}: {log}"


def test_each_kernel_file_is_one_of_them():
    assert {path.stem for path in kernel_folder().glob("*.cu")} == set(KERNELS)


@pytest.mark.parametrize("kernel", KERNELS)
def test_a_file_compiles_by_itself(kernel):
    size, _ = compile_variant(Variant(kernel, ()), 80)
    assert size > 0


def test_line_numbers_are_those_of_the_file():
    source = kernel_source("im2col").replace("INDEX cell;", "INDEX cell; mistake;")
    program = _checked(nvrtc.nvrtcCreateProgram(source.encode(), b"x.cu", 0, [], []))
    nvrtc.nvrtcCompileProgram(program, 1, [b"-arch=sm_80"])
    text = (kernel_folder() / "im2col.cu").read_text().splitlines()
    line = next(i for i, row in enumerate(text, 1) if "INDEX cell;" in row)
    assert f"im2col.cu({line})" in _log(program)


def test_a_geometry_of_another_size_is_refused():
    variant = next(v for v in all_variants() if v.kernel == "im2col")
    macros = tuple(m for m in variant.macros if not m.startswith("GEOMETRY_BYTES"))
    with pytest.raises(AssertionError, match="packs another Geometry"):
        compile_variant(Variant("im2col", (*macros, "GEOMETRY_BYTES=1")), 80)
