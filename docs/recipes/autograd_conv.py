"""Convolution inside HIPS autograd: gradients of any order.

Each gradient of a convolution is a convolution, so three primitives whose derivatives name
one another give derivatives of every order.
"""

import autograd.numpy as np
from autograd import grad
from autograd.extend import defvjp, primitive
from autograd.test_util import check_grads

import cuconv

conv = primitive(cuconv.conv)
input_grad = primitive(cuconv.conv_input_grad)
weight_grad = primitive(cuconv.conv_weight_grad)


def over_positions(dy):
    return np.sum(dy, axis=(0, *range(2, dy.ndim)))


defvjp(
    conv,
    lambda _, x, w, bias=None, **o: lambda dy: input_grad(dy, w, x.shape, **o),
    lambda _, x, w, bias=None, **o: lambda dy: weight_grad(dy, x, w.shape, **o),
    lambda _, x, w, bias=None, **o: over_positions,
)
defvjp(  # of dx = input_grad(dy, w): linear in dy and in w
    input_grad,
    lambda _, dy, w, shape, **o: lambda ddx: conv(ddx, w, **o),
    lambda _, dy, w, shape, **o: lambda ddx: weight_grad(dy, ddx, w.shape, **o),
    argnums=(0, 1),
)
defvjp(  # of dw = weight_grad(dy, x): linear in dy and in x
    weight_grad,
    lambda _, dy, x, shape, **o: lambda ddw: conv(x, ddw, **o),
    lambda _, dy, x, shape, **o: lambda ddw: input_grad(dy, ddw, x.shape, **o),
    argnums=(0, 1),
)


def loss(x, w, bias, **options):
    return np.sum(np.tanh(conv(x, w, bias, **options)) ** 2)


if __name__ == "__main__":
    rng = np.random.RandomState(0)
    checked = 0
    for rank in (1, 2, 3):
        x, w, bias = (
            rng.standard_normal(shape)
            for shape in ((2, 4, *(7, 6, 5)[:rank]), (6, 2, *(3, 2, 2)[:rank]), (6,))
        )
        for options in (
            {"groups": 2, "padding": 1},
            {"groups": 2, "stride": 2, "dilation": 2, "padding": 2},
            {"groups": 2, "padding": 2, "padding_mode": "reflect"},
        ):

            def f(x, w, bias, options=options):
                return loss(x, w, bias, **options)

            check_grads(f, modes=["rev"], order=2)(x, w, bias)
            checked += 1
    assert checked == 9
    print(f"first and second derivatives of {checked} losses agree with differences")
    step = grad(loss, 1)(x, w, bias, groups=2)
    print("the gradient for w has the shape", step.shape)
