"""im2col and col2im of DeZero and of "deep learning from scratch", on cuconv.

Both books write their columns as (N, C, kh, kw, oh, ow) or as rows of C · kh · kw.  The
first is ``order="batched"`` with its axes split, the second ``order="rows"``.
"""

import numpy as np

vars(np)["int"] = int  # the last DeZero uses this name, which NumPy removed

import dezero
from dezero import functions_conv

import cuconv


def im2col_array(img, kernel_size, stride, pad, to_matrix=True):
    order = "rows" if to_matrix else "batched"
    columns = cuconv.im2col(img, kernel_size, stride=stride, padding=pad, order=order)
    if to_matrix:
        return columns
    kernel = np.broadcast_to(kernel_size, 2)
    out = dezero.utils.get_conv_outsize
    sizes = zip(
        img.shape[2:],
        kernel,
        np.broadcast_to(stride, 2),
        np.broadcast_to(pad, 2),
        strict=True,
    )
    return columns.reshape(*img.shape[:2], *kernel, *(out(*each) for each in sizes))


def col2im_array(col, img_shape, kernel_size, stride, pad, to_matrix=True):
    if to_matrix:
        order = "rows"
    else:
        order, col = "batched", col.reshape(len(col), np.prod(col.shape[1:4]), -1)
    return cuconv.col2im(
        col, img_shape, kernel_size, stride=stride, padding=pad, order=order
    )


def install():
    """Let DeZero's convolution and pooling, and their gradients, use these two."""
    functions_conv.im2col_array = im2col_array
    functions_conv.col2im_array = col2im_array


def from_scratch_im2col(input_data, filter_h, filter_w, stride=1, pad=0):
    """The book's ``im2col(input_data, filter_h, filter_w, stride, pad)``."""
    return cuconv.im2col(input_data, (filter_h, filter_w), stride=stride, padding=pad)


def from_scratch_col2im(col, input_shape, filter_h, filter_w, stride=1, pad=0):
    """The book's ``col2im(col, input_shape, filter_h, filter_w, stride, pad)``."""
    return cuconv.col2im(
        col, input_shape, (filter_h, filter_w), stride=stride, padding=pad
    )


def outputs_and_gradients():
    """Convolution, transposed convolution and pooling of DeZero, with gradients."""
    rng = np.random.default_rng(0)

    def integers(*shape):
        return dezero.Variable(rng.integers(-4, 5, shape).astype("f8"))

    found = []
    for stride, pad in ((1, 0), (1, 1), (2, 1), (3, 2)):
        x, w, b = integers(2, 3, 9, 8), integers(4, 3, 3, 2), integers(4)
        back = integers(4, 3, 3, 2)
        for y in (
            dezero.functions.conv2d(x, w, b, stride, pad),
            dezero.functions.deconv2d(integers(2, 4, 5, 4), back, None, stride, pad),
            dezero.functions.pooling(x, 3, stride, pad),
            dezero.functions.average_pooling(x, 2, stride, pad),
        ):
            for variable in (x, w, b, back):
                variable.cleargrad()
            y.backward()
            grads = [v.grad.data for v in (x, w, b, back) if v.grad is not None]
            found += [y.data, *grads]
    return found


if __name__ == "__main__":
    theirs = outputs_and_gradients()
    own = functions_conv.im2col_array, functions_conv.col2im_array
    for to_matrix in (True, False):
        x = np.arange(2.0 * 3 * 9 * 8).reshape(2, 3, 9, 8)
        args = (3, 2), (2, 1), (1, 2), to_matrix
        columns = own[0](x, *args)
        np.testing.assert_array_equal(im2col_array(x, *args), columns)
        image = own[1](columns, x.shape, *args)
        np.testing.assert_array_equal(col2im_array(columns, x.shape, *args), image)
    rows = own[0](x, (3, 2), 2, 1)
    np.testing.assert_array_equal(from_scratch_im2col(x, 3, 2, 2, 1), rows)
    image = own[1](rows, x.shape, (3, 2), 2, 1)
    np.testing.assert_array_equal(from_scratch_col2im(rows, x.shape, 3, 2, 2, 1), image)
    install()
    ours = outputs_and_gradients()
    assert len(ours) == len(theirs) >= 40
    for a, b in zip(ours, theirs, strict=True):
        np.testing.assert_array_equal(a, b)
    print(f"{len(ours)} outputs and gradients of DeZero are equal")
