"""What an import brings in and what may be missing, each in a fresh interpreter."""

import os
import subprocess
import sys
import textwrap

import pytest

import cuconv

CONV = """
import numpy as np
import cuconv
x = np.arange(16.0).reshape(1, 1, 4, 4)
w = np.ones((1, 1, 2, 2))
assert cuconv.conv(x, w, stride=2).tolist() == [[[[10.0, 18.0], [42.0, 50.0]]]]
gradients = cuconv.conv_backward(np.ones((1, 1, 2, 2)), x, w, stride=2)
assert gradients.x.tolist() == np.ones((1, 1, 4, 4)).tolist()
ones = np.ones((4, 32, 40, 40)), np.ones((32, 32, 3, 3))
large = cuconv.conv(*ones, precision="strict")
assert (large == 288).all()
"""

BLOCK = """
import sys
from importlib.abc import MetaPathFinder

class Blocker(MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == {name!r}:
            raise ModuleNotFoundError(f"no module named {{name}}", name=name)

sys.meta_path.insert(0, Blocker())
"""


def run_python(code: str, **environment: str) -> str:
    """The output of a program in a fresh interpreter, which must succeed in silence."""
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", textwrap.dedent(code)],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    return done.stdout


def modules_after(code: str) -> set[str]:
    return set(run_python(f"{code}\nimport sys\nprint(*sys.modules)").split())


def test_import_does_not_bring_in_cupy() -> None:
    loaded = modules_after("import cuconv")
    assert "cuconv" in loaded
    assert not {name for name in loaded if name.split(".")[0] == "cupy"}


def test_a_call_on_numpy_does_not_either() -> None:
    loaded = modules_after(CONV)
    assert not {name for name in loaded if name.split(".")[0] == "cupy"}
    assert not {name for name in loaded if name.startswith("cuconv.backends.cuda")}


def test_layers_and_testing_are_imported_when_they_are_asked_for() -> None:
    code = """
    import sys
    import cuconv
    later = {"cuconv.layers", "cuconv.testing"}
    assert not later & set(sys.modules)
    assert {"layers", "testing", "conv"} <= set(dir(cuconv))
    assert not later & set(sys.modules)
    assert cuconv.layers.Conv2d and cuconv.testing.conv_reference
    assert later <= set(sys.modules)
    assert len(dir(cuconv)) == len(set(dir(cuconv)))
    try:
        cuconv.layer
    except AttributeError as error:
        print(error)
    """
    assert run_python(code) == "module 'cuconv' has no attribute 'layer'\n"


def test_import_brings_in_nothing_heavy() -> None:
    """What the demonstration and the tests need is no business of the library."""
    heavy = {"scipy", "matplotlib", "sklearn", "rich", "PIL", "hypothesis", "pytest"}
    heavy |= {"dask", "distributed", "zarr"}
    # Of the library itself: `strategy="benchmark"` alone needs it.
    heavy |= {"cuconv.engine.autotune"}
    assert not heavy & modules_after("import cuconv, cuconv.testing")


@pytest.mark.parametrize("name", ["cupy", "nvtx", "ml_dtypes", "dask"])
def test_it_works_without(name) -> None:
    run_python(BLOCK.format(name=name) + CONV)


def test_it_works_when_an_unrelated_cupy_is_imported() -> None:
    """A module of that name without arrays, such as a half-failed import leaves."""
    run_python(
        "import sys, types\nsys.modules['cupy'] = types.ModuleType('cupy')" + CONV
    )


def test_it_works_when_no_blas_is_found() -> None:
    code = """
    import threadpoolctl
    class Nothing(threadpoolctl.ThreadpoolController):
        def select(self, **words):
            found = super().select(**words)
            found.lib_controllers = []
            return found
    threadpoolctl.ThreadpoolController = Nothing
    """
    check = """
    from cuconv.backends.cpu import threads
    assert threads.BLAS._libraries == []
    assert threads.BLAS.threads() == 1
    """
    run_python(textwrap.dedent(code) + CONV + textwrap.dedent(check))


@pytest.mark.parametrize("threads", ["1", "2", "8"])
def test_it_works_with_any_number_of_threads(threads) -> None:
    run_python(CONV, OPENBLAS_NUM_THREADS=threads, OMP_NUM_THREADS=threads)


def test_it_works_in_optimised_python() -> None:
    """Without `assert`: validation must not rest on it."""
    code = """
    import numpy as np
    import cuconv
    try:
        cuconv.conv(np.ones((1, 2, 4)), np.ones((1, 3, 2)))
    except ValueError as error:
        print(error)
    """
    done = subprocess.run(
        [sys.executable, "-OO", "-c", textwrap.dedent(code)],
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    assert "x has 2 and w expects 3" in done.stdout


def test_the_public_names_are_there() -> None:
    assert len(set(cuconv.__all__)) == len(cuconv.__all__) >= 10
    for name in cuconv.__all__:
        assert getattr(cuconv, name).__doc__
    assert cuconv.__version__
