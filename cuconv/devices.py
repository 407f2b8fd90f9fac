"""Conversion of other libraries' arrays without copies."""

import sys
from typing import Any

import numpy as np

from cuconv.arrays import Array, is_array

# DLPack's numbers of devices that NumPy can read, and that CuPy can read.
_CPU = (1, 3)  # CPU, and host memory that CUDA has pinned
_DEVICE = (2, 13)  # CUDA, and memory that it manages


def asarray(array: Any) -> Array:
    """A NumPy or CuPy array over the memory of another library's array.

    PyTorch's and JAX's on a CPU become NumPy arrays, on CUDA CuPy arrays.  Nothing is
    copied; the other library decides whether the result is writeable.

    Parameters
    ----------
    array
        Anything with ``__dlpack__``, ``__cuda_array_interface__``,
        ``__array_interface__`` or ``__array__``.  NumPy and CuPy arrays are returned as
        they are.

    Returns
    -------
    array
        NumPy's where the memory is the host's, else CuPy's.

    Raises
    ------
    TypeError
        If it has none of these, or is on a device that neither module reads.
    RuntimeError
        If it is on a CUDA device and no GPU works here.
    BufferError
        If the other library does not share it: a PyTorch tensor that requires a
        gradient needs ``detach()`` first.  One of bfloat16 needs ml_dtypes to be
        installed.

    Examples
    --------
    >>> import numpy as np
    >>> import cuconv
    >>> class Foreign:
    ...     def __init__(self, array):
    ...         self.__array_interface__ = array.__array_interface__
    >>> x = np.arange(5.0).reshape(1, 1, 5)
    >>> cuconv.conv1d(cuconv.asarray(Foreign(x)), np.ones((1, 1, 3)))
    array([[[3., 6., 9.]]])
    """
    if is_array(array):
        return array
    if hasattr(array, "__dlpack_device__") and hasattr(array, "__dlpack__"):
        return _by_dlpack(array)
    if hasattr(array, "__cuda_array_interface__"):
        return _cupy().asarray(array)
    if hasattr(array, "__array_interface__") or hasattr(array, "__array__"):
        return np.asarray(array)
    kind = f"{type(array).__module__}.{type(array).__qualname__}"
    raise TypeError(
        f"{kind} shares no memory: it has neither __dlpack__ nor an array interface; "
        "numpy.asarray copies sequences"
    )


def _by_dlpack(array: Any) -> Array:
    device = int(array.__dlpack_device__()[0])
    if device in _DEVICE:
        return _cupy().from_dlpack(array)
    if device not in _CPU:
        raise TypeError(
            f"the array is on a device that DLPack numbers {device}; NumPy reads "
            f"{_CPU[0]} and {_CPU[1]}, CuPy {_DEVICE[0]} and {_DEVICE[1]}"
        )
    if str(getattr(array, "dtype", "")) == "torch.bfloat16":
        return _bfloat16_of(array)
    return _numpy_of(array)


def _bfloat16_of(tensor: Any) -> Array:
    """Share a tensor by its bits: NumPy's DLPack has no bfloat16."""
    try:
        from ml_dtypes import bfloat16  # noqa: PLC0415 - when first needed
    except ImportError as error:
        raise BufferError("an array of bfloat16 needs ml_dtypes") from error
    if tensor.requires_grad:  # its bits, as integers, have no gradient
        raise BufferError("the array is not shared: it requires a gradient; detach()")
    # There is no tensor where PyTorch was not imported.
    return _numpy_of(tensor.view(sys.modules["torch"].int16)).view(bfloat16)


def _numpy_of(array: Any) -> Array:
    try:
        return np.from_dlpack(array)
    except RuntimeError as error:
        # NumPy has fewer types than DLPack; PyTorch refuses tensors with gradients.
        raise BufferError(f"the array is not shared: {error}") from error


def _cupy() -> Any:
    from cuconv.backends.cuda import why_not, working_cupy  # noqa: PLC0415 - when first needed

    cupy = working_cupy()
    if cupy is None:
        raise RuntimeError(
            f"the array is on a CUDA device, and no GPU works: {why_not()}"
        )
    return cupy
