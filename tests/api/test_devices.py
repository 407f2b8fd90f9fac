"""Arrays of other libraries come in by an explicit call, and share their memory."""

import sys
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from support import integers, to_host

import cuconv
from cuconv.backends import cuda as _cuda


class ByDlpack:
    """An array of another library, on a host or a device."""

    def __init__(self, array: Any, device: int = 1) -> None:
        self.owner, self.device = array, device

    def __dlpack_device__(self) -> tuple[int, int]:
        return self.device, 0

    def __dlpack__(self, **options: Any) -> Any:
        return self.owner.__dlpack__(**options)


class ByInterface:
    def __init__(self, array: Any) -> None:
        self.owner = array
        name = "__array_interface__"
        if not isinstance(array, np.ndarray):
            name = "__cuda_array_interface__"
        setattr(self, name, getattr(array, name, {}))


def needs_cast(kind: str, array: Any) -> Any:
    on_host = isinstance(array, np.ndarray)
    if kind == "dlpack":
        return ByDlpack(array, 1 if on_host else 2)
    return ByInterface(array)


@pytest.mark.parametrize("kind", ["dlpack", "interface"])
def test_memory_is_shared(xp, kind):
    own = xp.asarray(integers((1, 2, 5), "float32"))
    seen = cuconv.asarray(needs_cast(kind, own))
    assert cuconv.array_module(seen) is xp
    own[0, 1, 2] = 77
    assert float(to_host(seen)[0, 1, 2]) == 77
    w = xp.asarray(integers((3, 2, 2), "float32", seed=1))
    wanted, got = cuconv.conv(own, w), cuconv.conv(seen, w)
    np.testing.assert_array_equal(to_host(got), to_host(wanted))


def test_arrays_of_the_two_modules_are_returned_as_they_are(xp):
    own = xp.ones((2, 3))
    assert cuconv.asarray(own) is own
    assert cuconv.asarray(own[:1]).shape == (1, 3)


@pytest.mark.parametrize("device", [3, 13])
def test_pinned_memory_is_the_hosts_and_managed_memory_the_devices(xp, device):
    host = integers((4,), "float64")
    if device == 3:
        assert cuconv.array_module(cuconv.asarray(ByDlpack(host, 3))) is np
    elif xp is not np:
        own = xp.asarray(host)
        assert cuconv.array_module(cuconv.asarray(ByDlpack(own, 13))) is xp


@pytest.mark.parametrize("kind", ["dlpack", "interface"])
def test_a_tensor_by_mistake_is_told_which_call_to_use(xp, kind):
    own = xp.asarray(integers((1, 2, 5), "float32"))
    words = (
        r"x must be a NumPy or CuPy array; got .*, of which cuconv.asarray makes one"
    )
    with pytest.raises(TypeError, match=words):
        cuconv.conv(needs_cast(kind, own), own)


def test_what_shares_nothing_is_refused():
    with pytest.raises(TypeError, match=r"builtins.list shares no memory"):
        cuconv.asarray([1, 2])
    with pytest.raises(TypeError, match=r"list, of which numpy.asarray makes one$"):
        cuconv.conv([1, 2], np.ones((1, 1, 1)))  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="device that DLPack numbers 10"):
        cuconv.asarray(ByDlpack(np.ones(3), 10))


def test_a_library_that_does_not_share_is_heard():
    class Reluctant(ByDlpack):
        def __dlpack__(self, **options: Any) -> Any:
            raise RuntimeError("it requires a gradient")

    with pytest.raises(BufferError, match=r"not shared: it requires a gradient"):
        cuconv.asarray(Reluctant(np.ones(3)))


class Tensor(ByDlpack):
    """A tensor of PyTorch, of bfloat16 or of a view of its bits."""

    requires_grad = False

    def __init__(self, array: Any, dtype: str = "torch.bfloat16") -> None:
        super().__init__(array)
        self.dtype = dtype

    def view(self, dtype: str) -> "Tensor":
        return Tensor(self.owner.view(dtype), dtype)


def test_a_tensor_of_bfloat16_shares_its_memory(monkeypatch):
    ml_dtypes = pytest.importorskip("ml_dtypes")
    monkeypatch.setitem(sys.modules, "torch", SimpleNamespace(int16="int16"))
    own = integers((1, 2, 6), "float32").astype(ml_dtypes.bfloat16)
    for array in (own, own[..., ::2]):
        seen = cuconv.asarray(Tensor(array))
        assert seen.dtype == ml_dtypes.bfloat16
        assert (seen == array).all()
        assert np.shares_memory(seen, own)
    trained = Tensor(own)
    trained.requires_grad = True
    with pytest.raises(BufferError, match=r"requires a gradient; detach\(\)"):
        cuconv.asarray(trained)
    monkeypatch.setitem(sys.modules, "ml_dtypes", None)
    with pytest.raises(BufferError, match="needs ml_dtypes"):
        cuconv.asarray(Tensor(own))


def test_a_tensor_of_torch_itself():
    torch = pytest.importorskip("torch")
    for dtype in ("bfloat16", "float16", "float32"):
        tensor = torch.arange(12).reshape(1, 2, 6).to(getattr(torch, dtype))
        for each in (tensor, tensor[..., ::2], tensor.transpose(1, 2)):
            seen = cuconv.asarray(each)
            assert seen.dtype.name == dtype
            assert seen.astype("f4").tolist() == each.tolist()
        with pytest.raises(BufferError, match="grad"):
            cuconv.asarray(tensor.requires_grad_())


def test_device_memory_without_a_gpu(monkeypatch):
    monkeypatch.setattr(_cuda, "working_cupy", lambda: None)
    monkeypatch.setattr(_cuda, "why_not", lambda: "no driver")
    with pytest.raises(RuntimeError, match="no GPU works: no driver"):
        cuconv.asarray(ByDlpack(np.ones(3), 2))
