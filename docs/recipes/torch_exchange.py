"""Weights and results to and from PyTorch, without copies where the memory allows.

A network of torch.nn gives its weights to layers of cuconv, both run forward and
backward, and the weights go back after a step.  Arrays and tensors share memory.
"""

import numpy as np
import torch

import cuconv
from cuconv.layers import Conv2d, ConvTranspose2d

torch.manual_seed(0)
theirs = torch.nn.Sequential(
    torch.nn.Conv2d(3, 8, 3, stride=2, padding=1),
    torch.nn.Conv2d(8, 8, 3, padding=2, dilation=2, groups=2),
    torch.nn.ConvTranspose2d(8, 3, 4, stride=2, padding=1),
)
ours = [
    Conv2d(3, 8, 3, stride=2, padding=1),
    Conv2d(8, 8, 3, padding=2, dilation=2, groups=2),
    ConvTranspose2d(8, 3, 4, stride=2, padding=1),
]
for layer, module in zip(ours, theirs, strict=True):
    layer.load_state_dict(module.state_dict())

tensor = torch.randn(4, 3, 32, 32, requires_grad=True)
x = cuconv.asarray(tensor.detach())  # the same memory
assert x.ctypes.data == tensor.data_ptr()


def close(array, tensor):
    wanted = tensor.detach().numpy()
    assert array.shape == wanted.shape
    scale = np.abs(wanted).max()
    np.testing.assert_allclose(array, wanted, rtol=0, atol=2e-5 * scale)


y, wanted = x, theirs(tensor)
for layer in ours:
    y = layer(y)
close(y, wanted)

wanted.square().sum().backward()
dy = 2 * y
for layer in reversed(ours):
    dy = layer.backward(dy)
close(dy, tensor.grad)
compared = 2
for layer, module in zip(ours, theirs, strict=True):
    for name, parameter in module.named_parameters():
        close(layer.gradients[name], parameter.grad)
        compared += 1
    for name, parameter in layer.parameters.items():
        parameter -= 1e-4 * layer.gradients[name]
    state = {name: torch.from_numpy(a) for name, a in layer.state_dict().items()}
    module.load_state_dict(state)

y = x
for layer in ours:
    y = layer(y)
result = torch.from_numpy(y)  # the same memory again
assert result.data_ptr() == y.ctypes.data
close(y, theirs(tensor))
print(f"{compared + 1} results and gradients agree with PyTorch's")
