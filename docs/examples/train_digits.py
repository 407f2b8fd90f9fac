"""Train a small convolutional network on scikit-learn's handwritten digits.

The same file runs on NumPy and on CuPy: everything is written over ``xp``.

    python docs/examples/train_digits.py --device auto

Two convolutions downsample by their strides, a third is the linear layer: its kernel is
as large as what is left of the image.  The exit status is 1 if fewer than 98 % of the
digits held out for the test are read correctly.
"""

import argparse
import math
import sys
import time

import numpy as np
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

import cuconv
from cuconv.layers import Conv2d

WANTED = 0.98
EPOCHS = 40
BATCH = 64
LEARNING_RATE = 3e-3


class Network:
    """Convolution, ReLU, convolution, ReLU, convolution: (N, 1, 8, 8) to (N, 10)."""

    def __init__(self, xp, rng):
        self.layers = [
            Conv2d(1, 32, 3, padding=1, xp=xp, rng=rng),
            Conv2d(32, 64, 3, stride=2, padding=1, xp=xp, rng=rng),
            Conv2d(64, 64, 3, stride=2, padding=1, xp=xp, rng=rng),
            Conv2d(64, 10, 2, xp=xp, rng=rng),
        ]

    def forward(self, x):
        self.active = []
        for layer in self.layers[:-1]:
            y = layer(x)
            self.active.append(y > 0)
            x = y * self.active[-1]
        return self.layers[-1](x)[:, :, 0, 0]

    def backward(self, dy):
        dy = self.layers[-1].backward(dy[:, :, None, None])
        for layer, active in zip(self.layers[-2::-1], self.active[::-1], strict=True):
            dy = layer.backward(dy * active, needs_input=layer is not self.layers[0])


class Adam:
    """D. Kingma, J. Ba, "Adam: a method for stochastic optimization", 2015."""

    def __init__(self, xp, layers):
        self.xp, self.layers, self.steps = xp, layers, 0
        self.means = {
            (layer, name): xp.zeros_like(parameter)
            for layer in layers
            for name, parameter in layer.parameters.items()
        }
        self.squares = {cell: xp.zeros_like(mean) for cell, mean in self.means.items()}

    def step(self, rate):
        self.steps += 1
        rate *= (1 - 0.999**self.steps) ** 0.5 / (1 - 0.9**self.steps)
        for layer, name in self.means:
            gradient = layer.gradients[name]
            mean, square = self.means[layer, name], self.squares[layer, name]
            mean += 0.1 * (gradient - mean)
            square += 0.001 * (gradient * gradient - square)
            layer.parameters[name] -= rate * mean / (self.xp.sqrt(square) + 1e-8)


def softmax(xp, scores):
    raised = xp.exp(scores - scores.max(axis=1, keepdims=True))
    return raised / raised.sum(axis=1, keepdims=True)


def shifted(xp, images, rng):
    """Each image moved by up to one pixel along both axes."""
    wide = xp.pad(images, ((0, 0), (0, 0), (1, 1), (1, 1)))
    down, right = (xp.asarray(rng.integers(0, 3, size=len(images))) for _ in "yx")
    # Every 8×8 patch is a place that the image can be moved to: (N, 1, 3, 3, 8, 8).
    return cuconv.patches(wide, 8)[xp.arange(len(images)), :, down, right]


def load(xp, seed):
    """Read the digits as (N, 1, 8, 8), 0 to 1: three quarters to train, one to test."""
    images, labels = load_digits(return_X_y=True)
    images = (images / 16).astype(np.float32).reshape(-1, 1, 8, 8)
    parts = train_test_split(
        images, labels, test_size=0.25, stratify=labels, random_state=seed
    )
    return [xp.asarray(part) for part in parts]


def train(xp, network, images, labels, *, rng, epochs):
    # A tenth of the certainty is shared out: the network reads new digits better.
    wanted = (0.9 * xp.eye(10, dtype=xp.float32) + xp.float32(0.01))[labels]
    optimiser = Adam(xp, network.layers)
    for epoch in range(epochs):
        rate = LEARNING_RATE * 0.5 * (1 + math.cos(math.pi * epoch / epochs))
        loss = 0.0
        order = xp.asarray(rng.permutation(len(images)))
        for start in range(0, len(images), BATCH):
            batch = order[start : start + BATCH]
            guess = softmax(xp, network.forward(shifted(xp, images[batch], rng)))
            network.backward((guess - wanted[batch]) / len(batch))
            optimiser.step(rate)
            loss -= float((wanted[batch] * xp.log(guess + 1e-12)).sum())
        if epoch % 5 == 4:
            print(f"epoch {epoch + 1:3}   loss {loss / len(images):.4f}")


def accuracy(network, images, labels):
    return float((network.forward(images).argmax(axis=1) == labels).mean())


def array_module(device):
    if device == "cpu":
        return np
    xp = cuconv.default_array_module()
    if device == "cuda" and xp is np:
        sys.exit("no CUDA device works: see python -m cuconv info")
    return xp


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument("--epochs", type=int, default=EPOCHS)
    parser.add_argument("--seed", type=int, default=0)
    chosen = parser.parse_args()
    xp, rng = array_module(chosen.device), np.random.default_rng(chosen.seed)
    images, test_images, labels, test_labels = load(xp, chosen.seed)
    print(f"{len(images)} digits to train, {len(test_images)} to test, {xp.__name__}")
    network = Network(xp, rng)
    start = time.perf_counter()
    train(xp, network, images, labels, rng=rng, epochs=chosen.epochs)
    reached = accuracy(network, test_images, test_labels)
    seconds = time.perf_counter() - start
    print(f"test accuracy {reached:.2%} after {seconds:.1f} s")
    return 0 if reached >= WANTED else 1


if __name__ == "__main__":
    sys.exit(main())
