"""SigPy's convolve and its adjoints, on cuconv: for NumPy and for CuPy arrays.

SigPy convolves CuPy arrays by bindings to cuDNN that CuPy removed in version 14, and
NumPy arrays channel by channel with SciPy.  Here its three functions are replaced by
calls of cuconv, and compared with SigPy's own for NumPy.
"""

import itertools
from time import perf_counter

import numpy as np
import sigpy

import cuconv

# The replacement.


def operands(data, filt, multi_channel):
    """Give data and filters their axes of batch and channels."""
    rank = filt.ndim - 2 * multi_channel
    channels = data.shape[-rank - 1] if multi_channel else 1
    data = data.reshape(-1, channels, *data.shape[-rank:])
    return data, filt if multi_channel else filt[None, None]


def options(mode, strides):
    return {"padding": mode, "stride": strides or 1, "flip_kernel": True}


def convolve(data, filt, mode="full", strides=None, multi_channel=False):
    x, w = operands(data, filt, multi_channel)
    y = cuconv.conv(x, w, **options(mode, strides))
    batch = data.shape[: data.ndim - x.ndim + 2 - multi_channel]
    return y.reshape(*batch, *y.shape[1 if multi_channel else 2 :])


def convolve_data_adjoint(
    output, filt, data_shape, mode="full", strides=None, multi_channel=False
):
    dy, w = operands(output, filt, multi_channel)
    x, _ = operands(np.broadcast_to(0, data_shape), filt, multi_channel)
    dx = cuconv.conv_input_grad(dy, w, x.shape, **options(mode, strides))
    return dx.reshape(data_shape)


def convolve_filter_adjoint(
    output, data, filt_shape, mode="full", strides=None, multi_channel=False
):
    filt = np.broadcast_to(0, filt_shape)
    x, w = operands(data, filt, multi_channel)
    dy, _ = operands(output, filt, multi_channel)
    dw = cuconv.conv_weight_grad(dy, x, w.shape, **options(mode, strides))
    return dw.reshape(filt_shape)


def install():
    """Let SigPy, and its linear operators, use these three."""
    for function in (convolve, convolve_data_adjoint, convolve_filter_adjoint):
        setattr(sigpy.conv, function.__name__, function)


# The comparison.


def numbers(shape, dtype):
    rng = np.random.default_rng(0)
    values = rng.standard_normal((2, *shape)).astype("f8")
    return (values[0] + 1j * values[1] if dtype == "c16" else values[0]).astype(dtype)


def close(ours, theirs):
    assert ours.shape == theirs.shape
    np.testing.assert_allclose(ours, theirs, rtol=1e-10, atol=1e-10)


def compare():
    cases = 0
    own = sigpy.conv
    for rank, mode, multi_channel, stride, batch, dtype in itertools.product(
        (1, 2, 3), ("full", "valid"), (False, True), (1, 2), ((), (2,)), ("f8", "c16")
    ):
        data = numbers((*batch, *[3] * multi_channel, *(9, 8, 7)[:rank]), dtype)
        filt = numbers((*[4, 3] * multi_channel, *(3, 4, 2)[:rank]), dtype)
        more = {"mode": mode, "strides": (stride,) * rank}
        more["multi_channel"] = multi_channel
        theirs = own.convolve(data, filt, **more)
        close(convolve(data, filt, **more), theirs)
        close(
            convolve_data_adjoint(theirs, filt, data.shape, **more),
            own.convolve_data_adjoint(theirs, filt, data.shape, **more),
        )
        close(
            convolve_filter_adjoint(theirs, data, filt.shape, **more),
            own.convolve_filter_adjoint(theirs, data, filt.shape, **more),
        )
        cases += 1
    return cases


def seconds(function, *arguments, **more):
    function(*arguments, **more)
    start = perf_counter()
    function(*arguments, **more)
    return perf_counter() - start


if __name__ == "__main__":
    cases = compare()
    assert cases == 96
    print(f"{cases} cases agree with SigPy's own")
    image, filters = numbers((8, 4, 64, 64), "f8"), numbers((8, 4, 5, 5), "f8")
    theirs = seconds(sigpy.conv.convolve, image, filters, multi_channel=True)
    ours = seconds(convolve, image, filters, multi_channel=True)
    print(f"SigPy {theirs * 1e3:.1f} ms, cuconv {ours * 1e3:.1f} ms")
    install()
    operator = sigpy.linop.ConvolveData((4, 64, 64), filters, multi_channel=True)
    x, y = numbers(operator.ishape, "f8"), numbers(operator.oshape, "f8")
    close(np.vdot(operator(x), y), np.vdot(x, operator.H(y)))
    print("the linear operator and its adjoint agree")
