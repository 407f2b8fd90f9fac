"""Every variant of every kernel compiles for every architecture; needs no GPU."""

import pytest
from cuda.bindings import nvrtc

from benchmarks.kernels import ARCHITECTURES
from benchmarks.nvrtc import CompileError, checked, compile_variant, log_of
from cuconv.backends.cuda.elements import Variant
from cuconv.backends.cuda.source import kernel_folder, kernel_source
from cuconv.backends.cuda.variants import all_variants
from cuconv.engine.costs import MODERN

KERNELS = {
    "im2col": 48,
    "col2im_gather": 66,
    "col2im_scatter": 48,
    "matmul": 5,
    "transform_tiles": 24,
    "implicit_gemm": 238,
    "sum_parts": 11,
    "transpose": 2,
    "delay": 1,
    "depthwise": 16,
    "depthwise_weights": 16,
    "pad_copy": 30,
    "pad_adjoint": 54,
    "deform_im2col": 24,
    "deform_scatter": 24,
    "deform_gather": 24,
    "deform_offsets": 24,
    "pool": 70,
    "pool_gradient": 56,
}
# Where there are no tensor cores, or none that are used.
OLDER = {"implicit_gemm": 206}
# Of so many variants, each is compiled for one architecture; `benchmarks.kernels` takes
# all for all.
SPREAD = tuple(name for name, count in KERNELS.items() if count >= 12)


@pytest.mark.slow
@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("kernel", KERNELS)
def test_every_variant_compiles_without_spills(kernel, architecture):
    variants = variants_of(kernel, architecture)
    several = len(ARCHITECTURES) if kernel in SPREAD else 1
    first = ARCHITECTURES.index(architecture) % several
    check_variants(variants[first::several], architecture)


@pytest.mark.parametrize("kernel", KERNELS)
def test_some_variants_compile_without_spills(kernel):
    """The first and the last; of each architecture the number."""
    for architecture in ARCHITECTURES:
        variants = variants_of(kernel, architecture)
        expected = OLDER.get(kernel) if architecture < MODERN else None
        assert len(set(variants)) == len(variants) == (expected or KERNELS[kernel])
    check_variants([variants[0], variants[-1]], 90)


def variants_of(kernel, architecture):
    return [v for v in all_variants(architecture) if v.kernel == kernel]


def check_variants(variants, architecture):
    assert variants
    for variant in variants:
        compiled = compile_variant(variant, architecture)
        assert compiled.binary_bytes > 0
        assert "bytes spill stores" in compiled.log
        taken = compiled.resources()
        spilled = taken["spill_store_bytes"], taken["spill_load_bytes"]
        assert spilled == (0, 0), f"{variant} on sm_{architecture}: {compiled.log}"


def test_each_kernel_file_is_one_of_them():
    assert {path.stem for path in kernel_folder().glob("*.cu")} == set(KERNELS)


@pytest.mark.parametrize("kernel", KERNELS)
def test_a_file_compiles_by_itself(kernel):
    assert compile_variant(Variant(kernel, ()), 80).binary_bytes > 0


def test_line_numbers_are_those_of_the_file():
    source = kernel_source("im2col").replace("INDEX cell;", "INDEX cell; mistake;")
    program = checked(nvrtc.nvrtcCreateProgram(source.encode(), b"x.cu", 0, [], []))
    nvrtc.nvrtcCompileProgram(program, 1, [b"-arch=sm_80"])
    text = (kernel_folder() / "im2col.cu").read_text().splitlines()
    line = next(i for i, row in enumerate(text, 1) if "INDEX cell;" in row)
    assert f"im2col.cu({line})" in log_of(program)


def test_a_geometry_of_another_size_is_refused():
    variant = next(v for v in all_variants() if v.kernel == "im2col")
    macros = tuple(m for m in variant.macros if not m.startswith("GEOMETRY_BYTES"))
    with pytest.raises(CompileError, match="packs another Geometry"):
        compile_variant(Variant("im2col", (*macros, "GEOMETRY_BYTES=1")), 80)
