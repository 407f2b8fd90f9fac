"""Lowering all axes but the first: its taps, its sizes and its refusals."""

import numpy as np
import pytest
from cases import Case
from support import candidates_of, plan_of

import cuconv
from cuconv.geometry import ConvGeometry
from cuconv.strategies.im2col import run_cost
from cuconv.strategies.partial_im2col import lowered


@pytest.mark.parametrize("stride", [1, 2, 3, 5])
@pytest.mark.parametrize("dilation", [1, 2, 3])
@pytest.mark.parametrize("kernel", [1, 2, 3, 7])
def test_every_tap_reads_its_element(kernel, dilation, stride) -> None:
    """Row r of phase p is element r * stride + p of the padded input."""
    options = {"stride": stride, "dilation": dilation, "padding": ((3, 2),)}
    g = ConvGeometry.of_weights((1, 1, 23), (1, 1, kernel), **options)
    low, seen = lowered(g), []
    padded = np.pad(np.arange(1, 24), (3, 2))
    columns = cuconv.im2col(np.arange(1, 24)[None, None], kernel, **options)
    for row, phases, taps in low.taps:
        each = range(*phases.indices(low.window))
        for phase, tap in zip(each, range(kernel)[taps], strict=True):
            rows = row + np.arange(g.out[0])
            assert np.array_equal(padded[rows * stride + phase], columns[:, tap])
            seen.append(tap)
    assert seen == list(range(kernel))
    assert low.geometry.out == (g.out[0] + low.halo,)


def test_the_buffer_is_smaller_by_the_taps_of_the_first_axis() -> None:
    case = Case((1, 8, 12, 12), (8, 8, 5, 3), {"padding": 1})
    rows, columns = (
        next(c for c in candidates_of(plan_of("forward", case, strategy=name)))
        for name in ("partial_im2col", "im2col")
    )
    (own, *_), (whole, *_) = rows.workspace.per_worker, columns.workspace.per_worker
    g = rows.problem.geometry
    assert own.name == "rows"
    assert whole.name == "columns"
    assert own.cells / (g.out[0] + 4) == whole.cells / g.out[0] / 5


def test_its_ways() -> None:
    def labels(case: Case, op: str = "forward") -> set[str]:
        plan = plan_of(op, case, strategy="partial_im2col")
        return {candidate.label for candidate in candidates_of(plan)}

    many = Case((4, 8, 20, 18), (8, 8, 3, 3), {})
    every = {"", " (images side by side)", " (row by row)"}
    assert labels(many) == {f"partial_im2col{way}" for way in every}
    assert labels(many, "weight_grad") == {
        "partial_im2col",
        "partial_im2col (images side by side)",
    }
    assert labels(many.in_layout("channels_last")) == labels(many, "weight_grad")
    narrow = many._replace(x_shape=(1, 8, 20, 9))
    assert labels(narrow) == {"partial_im2col"}


@pytest.mark.parametrize(
    ("kernel", "stride"), [((1, 7), 1), ((2, 3), 2), ((3, 3), 3), ((1, 1), 1)]
)
def test_windows_that_do_not_overlap_are_refused(kernel, stride) -> None:
    x, w = np.ones((1, 2, 12, 12)), np.ones((2, 2, *kernel))
    with pytest.raises(ValueError, match="do not overlap along the first axis"):
        cuconv.conv(x, w, stride=stride, strategy="partial_im2col")


def test_a_strided_input_gradient_is_refused() -> None:
    dy, w = np.ones((1, 2, 5, 5)), np.ones((2, 2, 3, 3))
    with pytest.raises(ValueError, match="only runs the forward pass"):
        cuconv.conv_input_grad(
            dy, w, (1, 2, 11, 11), stride=2, strategy="partial_im2col"
        )


@pytest.mark.parametrize("name", ["im2col", "partial_im2col"])
def test_what_was_measured_on_a_cpu_prices_no_gpu(name) -> None:
    """Weights beyond the cache, and the start of a contiguous run."""
    case = Case((8, 256, 14, 14), (256, 256, 3, 3), {"padding": 1})
    cpu, gpu = (
        candidates_of(plan_of("forward", case, strategy=name, device=device))[0]
        for device in ("cpu", "cuda")
    )
    work, other = (c.strategy.work(c.problem, c.tiling) for c in (cpu, gpu))
    assert work.reread > 0
    assert other.reread == 0
    assert run_cost(cpu.problem) == 1 + 8 / 14
    assert run_cost(gpu.problem) == 1 + 32 / 14
