"""The kernels' names of element types, and specialised kernels."""

from typing import NamedTuple

import numpy as np

from cuconv.arrays import SUPPORTED_TYPES

# Signed and unsigned integers of one width add and multiply the same way.
ELEMENTS = {
    "bool": "boolean_t",
    **{
        name: f"word{np.dtype(name).itemsize}_t"
        for name in SUPPORTED_TYPES
        if "int" in name
    },
    **{
        name: f"{name}_t"
        for name in SUPPORTED_TYPES
        if name.startswith(("float", "bfloat", "complex"))
    },
}
SUMS = {"float16_t": "float32_t", "bfloat16_t": "float32_t"}


class Variant(NamedTuple):
    """One kernel, specialised: a name and the macros that it is compiled with.

    ``shared`` is the shared memory of a launch, in bytes.
    """

    kernel: str
    macros: tuple[str, ...]
    shared: int = 0
