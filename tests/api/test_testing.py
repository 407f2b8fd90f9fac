"""The checks themselves: they pass what is right, and each of them can fail."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from support import LAYOUTS, Case, operands, to_device, to_host

import cuconv
from cuconv.testing import (
    assert_close,
    assert_equal,
    check_adjoint,
    conv_input_grad_reference,
    conv_reference,
    conv_weight_grad_reference,
    numerical_gradient,
    relative_error,
)

# The references, by hand


def test_reference_by_hand() -> None:
    """x · w over two windows, written out."""
    x = np.array([[[1.0, 2.0, 3.0, 4.0], [5.0, 6.0, 7.0, 8.0]]])
    w = np.array([[[1.0, -1.0], [2.0, 0.5]]])
    y = conv_reference(x, w, np.array([100.0]), stride=2)
    first = 100 + 1 - 2 + 10 + 3
    second = 100 + 3 - 4 + 14 + 4
    assert y.tolist() == [[[first, second]]]
    dy = np.array([[[1.0, 10.0]]])
    dx = conv_input_grad_reference(dy, w, x.shape, stride=2)
    assert dx.tolist() == [[[1, -1, 10, -10], [2, 0.5, 20, 5]]]
    dw = conv_weight_grad_reference(dy, x, w.shape, stride=2)
    assert dw.tolist() == [[[1 + 30, 2 + 40], [5 + 70, 6 + 80]]]


def test_reference_of_groups_and_dilation_by_hand() -> None:
    x = np.arange(1, 11).reshape(1, 2, 5)
    w = np.array([[[1, 10]], [[1, 100]]])
    y = conv_reference(x, w, groups=2, dilation=3, padding=((1, 0),))
    assert y.tolist() == [[[30, 41, 52], [800, 906, 1007]]]


@pytest.mark.parametrize("mode", ["valid", "full"])
def test_reference_agrees_with_an_independent_one(xp, mode) -> None:
    """SciPy's correlate, summed over channels; it has no stride."""
    signal = pytest.importorskip("scipy.signal")
    x, w, _ = operands(Case((2, 3, 7, 6), (4, 3, 3, 2), {}))
    wanted = np.array(
        [
            [
                sum(signal.correlate(x[n, c], w[k, c], mode) for c in range(3))
                for k in range(4)
            ]
            for n in range(2)
        ]
    )
    got = conv_reference(to_device(xp, x), to_device(xp, w), padding=mode)
    np.testing.assert_allclose(got, wanted, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_reference_gradients_are_the_numerical_ones(layout) -> None:
    options = {"stride": (2, 1), "padding": ((1, 0), (-1, 2)), "dilation": (1, 2)}
    case = Case((2, 4, 5, 6), (2, 2, 2, 3), {**options, "groups": 2}).in_layout(layout)
    x, w, dy = operands(case, "complex128")

    def loss(x: Any, w: Any) -> float:
        return (conv_reference(x, w, **case.options) * dy.conj()).real.sum()

    dx = conv_input_grad_reference(dy, w, case.x_shape, **case.options)
    dw = conv_weight_grad_reference(dy, x, case.w_shape, **case.options)
    assert_close(numerical_gradient(lambda a: loss(x, a), w), dw, rtol=1e-7, atol=1e-7)
    assert_close(numerical_gradient(lambda a: loss(a, w), x), dx, rtol=1e-7, atol=1e-7)


def test_reference_types() -> None:
    for dtype, wide in {
        "bool": "int64",
        "int8": "int64",
        "uint64": "int64",
        "float16": "float64",
        "bfloat16": "float64",
        "float64": "float64",
        "complex64": "complex128",
    }.items():
        x, w = np.ones((1, 1, 3), dtype), np.ones((1, 1, 2), dtype)
        assert conv_reference(x, w).dtype == wide
    x, w = np.ones((1, 1, 3), "int8"), np.ones((1, 1, 2), "float32")
    assert conv_reference(x, w).dtype == np.float64


def test_reference_of_integers_is_exact_and_wraps_at_64_bits() -> None:
    x = np.array([[[2**62 + 1, 2**53 + 1]]])
    w = np.array([[[1, 1]]])
    assert conv_reference(x, w).item() == 2**62 + 2**53 + 2
    wrapped = conv_reference(x, np.array([[[4, 0]]])).item()
    assert wrapped == 4
    large = np.array([[[2**64 - 1]]], dtype=np.uint64)
    assert conv_reference(large, large).astype(np.uint64).item() == 1


def test_references_refuse_what_does_not_match() -> None:
    x, w, dy = np.ones((1, 3, 5)), np.ones((2, 2, 2)), np.ones((1, 2, 3))
    with pytest.raises(ValueError, match="do not match"):
        conv_reference(x, w)
    with pytest.raises(ValueError, match="do not match"):
        conv_reference(np.ones((1, 4, 5)), np.ones((3, 2, 2)), groups=2)
    with pytest.raises(ValueError, match=r"\(1, 2, 3\) and the output \(1, 2, 4\)"):
        conv_input_grad_reference(dy, np.ones((2, 3, 2)), x.shape)
    with pytest.raises(ValueError, match=r"\(1, 2, 3\) and the output \(1, 2, 4\)"):
        conv_weight_grad_reference(dy, x, (2, 3, 2))
    with pytest.raises(ValueError, match="not 1 values"):
        conv_reference(x, np.ones((2, 3, 2)), stride=(1, 1, 1))
    with pytest.raises(TypeError, match="NumPy or CuPy array"):
        conv_reference([[[1.0]]], np.ones((1, 1, 1)))


# assert_close and assert_equal


CHECKS: list[Callable[..., None]] = [assert_close, assert_equal]


def fails(check: Callable[..., None], *arrays: Any, **options: Any) -> str:
    with pytest.raises(AssertionError) as caught:
        check(*arrays, **options)
    return str(caught.value)


@pytest.mark.parametrize("check", CHECKS)
def test_equal_arrays_pass_in_any_module_and_type(xp, check) -> None:
    host = np.array([[1.0, -2.0], [0.0, 4.0]])
    device = to_device(xp, host)
    for dtype in ("float16", "bfloat16", "float32", "int8", "complex64"):
        check(device.astype(dtype), host)
        check(host, device.astype(dtype))
    check(device, device)
    check(np.float32(3.0), np.array(3.0))
    check(np.zeros((0, 3)), np.zeros((0, 3)))
    check(np.array([np.inf, -np.inf]), np.array([np.inf, -np.inf]))
    check(np.array([True, False]), np.array([1, 0]))


@pytest.mark.parametrize("check", CHECKS)
def test_one_wrong_element_fails(xp, check) -> None:
    host = np.arange(24.0).reshape(2, 3, 4)
    wrong = host.copy()
    wrong[1, 0, 2] += 1
    wrong[1, 2, 3] += 5
    message = fails(check, to_device(xp, wrong), to_device(xp, host))
    assert "2 of 24" in message
    assert "(1, 2, 3)" in message
    assert "actual 28.0, expected 23.0" in message
    norm = np.sqrt(26.0) / np.linalg.norm(host)
    assert f"relative error {norm:.3g}" in message


@pytest.mark.parametrize("check", CHECKS)
def test_nan_is_close_to_nothing(xp, check) -> None:
    nan, one = np.array([1.0, np.nan]), np.array([1.0, 1.0])
    for actual, expected in ((nan, one), (one, nan), (nan, nan)):
        message = fails(check, to_device(xp, actual), to_device(xp, expected))
        assert "at (1,)" in message
        assert "nan" in message
    half = np.array([np.nan], dtype="bfloat16")
    fails(check, half, half)
    fails(check, np.array([complex(0, np.nan)]), np.array([complex(0, np.nan)]))


def test_nan_is_close_to_nan_on_demand_alone() -> None:
    nan = np.array([1.0, np.nan])
    assert_close(nan, nan, equal_nan=True)
    fails(assert_close, nan, np.array([1.0, 1.0]), equal_nan=True)
    fails(assert_close, np.array([1.0, 1.0]), nan, equal_nan=True)
    fails(assert_close, nan, nan, rtol=np.inf, atol=np.inf)


def test_infinity_is_close_to_itself_alone() -> None:
    inf = np.array([np.inf])
    for other in (0.0, -np.inf, np.nan, 1e308):
        fails(assert_close, inf, np.array([other]), rtol=0.5, atol=1.0)
        fails(assert_close, np.array([other]), inf, rtol=0.5, atol=1.0)


@pytest.mark.parametrize("check", CHECKS)
def test_nothing_is_broadcast(xp, check) -> None:
    for shape, other in (((3,), (1,)), ((2, 3), (3,)), ((), (1,)), ((0,), (0, 1))):
        message = fails(check, xp.ones(shape), xp.ones(other))
        assert str(shape) in message
        assert str(other) in message


@pytest.mark.parametrize("check", CHECKS)
def test_the_type_counts_on_demand(xp, check) -> None:
    array = xp.ones(3, dtype=np.float32)
    check(array, array, dtype="float32")
    message = fails(check, array, array, dtype=np.float64)
    assert "float32" in message
    assert "float64" in message


def test_tolerances() -> None:
    one = np.array([1.0, 1000.0])
    assert_close(one * (1 + 1e-6), one, rtol=1.1e-6)
    fails(assert_close, one * (1 + 1e-6), one, rtol=0.9e-6)
    assert_close(one + 1e-3, one, rtol=0, atol=1.1e-3)
    fails(assert_close, one + 1e-3, one, rtol=0, atol=0.9e-3)
    fails(assert_close, np.array([1e-300]), np.array([0.0]))


def test_equal_integers_are_compared_as_integers() -> None:
    """2^53 and its neighbour are one number in float64."""
    fails(assert_equal, np.array([2**53 + 1]), np.array([2**53]))
    fails(assert_equal, np.array([2**64 - 1], np.uint64), np.array([-1]))
    assert_equal(np.array([2**53 + 1]), np.array([2**53 + 1], np.uint64))


def test_relative_error(xp) -> None:
    a, b = to_device(xp, np.array([3.0, 4.5])), to_device(xp, np.array([3.0, 4.0]))
    assert relative_error(a, b) == pytest.approx(0.1)
    assert relative_error(b, b) == 0
    zeros = xp.zeros(2)
    assert relative_error(zeros, zeros) == 0
    assert relative_error(b, zeros) == np.inf
    assert np.isnan(relative_error(np.array([np.nan]), np.array([1.0])))


# numerical_gradient


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_numerical_gradient_of_a_known_function(xp, dtype) -> None:
    point = to_device(xp, np.array([[0.5, -1.0], [2.0, 3.0]], dtype=dtype))
    before = to_host(point).copy()
    gradient = numerical_gradient(lambda a: (a**3).sum(), point)
    assert type(gradient) is xp.ndarray
    assert_close(gradient, 3 * before.astype(float) ** 2, rtol=1e-8, dtype="float64")
    assert_equal(point, before)


def test_numerical_gradient_of_complex_numbers() -> None:
    """|z|² has the gradient 2 z, and Re(c̄ z) has c."""
    z = np.array([1 + 2j, -0.5j])
    square = numerical_gradient(lambda a: (abs(a) ** 2).sum(), z)
    assert_close(square, 2 * z, rtol=1e-8, dtype="complex128")
    c = 3 - 4j
    linear = numerical_gradient(lambda a: (np.conj(c) * a).real.sum(), z)
    assert_close(linear, np.full(2, c), rtol=1e-8)


def test_numerical_gradient_tells_a_wrong_gradient() -> None:
    x, w = np.arange(6.0).reshape(1, 1, 6), np.array([[[1.0, -2.0]]])
    right = cuconv.conv_input_grad(np.ones((1, 1, 3)), w, x.shape, stride=2)
    wrong = cuconv.conv_input_grad(np.ones((1, 1, 4)), w, x.shape, dilation=2)
    gradient = numerical_gradient(lambda a: cuconv.conv(a, w, stride=2).sum(), x)
    assert_close(gradient, right, rtol=1e-8)
    fails(assert_close, gradient, wrong, rtol=1e-3, atol=1e-3)


# check_adjoint


@pytest.mark.parametrize("dtype", ["float32", "float64", "int32", "complex64"])
def test_an_adjoint_passes(xp, dtype) -> None:
    host = np.arange(12).reshape(3, 4)
    matrix = to_device(xp, host.astype(dtype) * (1 + 2j if dtype == "complex64" else 1))
    matrix = matrix.astype(dtype)
    check_adjoint(
        lambda x: (matrix * x).sum(axis=1),
        lambda y: (matrix.conj() * y[:, None]).sum(axis=0),
        (4,),
        (3,),
        dtype=dtype,
        xp=xp,
    )


MATRIX = np.arange(12.0).reshape(3, 4)


@pytest.mark.parametrize(
    "wrong",
    [
        lambda y: MATRIX.T @ y * (1 + 1e-12),
        lambda y: -(MATRIX.T @ y),
        lambda y: np.zeros(4),
        lambda y: np.full(4, np.nan),
        lambda y: (MATRIX.T @ y)[:, None],
        lambda y: (MATRIX.T @ y)[:3],
        lambda y: (MATRIX.T @ y)[::-1],
    ],
)
def test_what_is_no_adjoint_fails(wrong) -> None:
    check_adjoint(lambda x: MATRIX @ x, lambda y: MATRIX.T @ y, (4,), (3,))
    fails(check_adjoint, lambda x: MATRIX @ x, wrong, (4,), (3,))


def test_an_adjoint_within_a_tolerance() -> None:
    pair = (lambda x: MATRIX @ x, lambda y: MATRIX.T @ y * (1 + 1e-9))
    check_adjoint(*pair, (4,), (3,), rtol=1e-8)
    fails(check_adjoint, *pair, (4,), (3,), rtol=1e-11)


def test_a_transpose_without_the_conjugate_fails() -> None:
    matrix = MATRIX * 1j
    pair = (lambda x: matrix @ x, lambda y: matrix.T @ y)
    fails(check_adjoint, *pair, (4,), (3,), dtype=complex)
    check_adjoint(pair[0], lambda y: matrix.T.conj() @ y, (4,), (3,), dtype=complex)
