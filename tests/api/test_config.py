"""Settings: blocks, threads, the environment, and what has no meaning."""

import asyncio
import os
import subprocess
import sys
import textwrap
import threading

import numpy as np
import pytest
from support import chosen

import cuconv
from cuconv.config import Settings, settings


def test_the_defaults() -> None:
    assert settings() == Settings(None, None, "standard", None)


def test_blocks_nest_and_end() -> None:
    outer = settings()
    with cuconv.config(num_threads=3, precision="strict"):
        with cuconv.config(memory_limit="1 MiB", num_threads=1):
            assert settings() == Settings(1, 2**20, "strict", None)
            with cuconv.config():
                assert settings() == Settings(1, 2**20, "strict", None)
        assert settings() == Settings(3, None, "strict", None)
    assert settings() == outer


def test_a_block_may_be_entered_again() -> None:
    """Not before it is, one after the other, inside itself, and left by an error."""
    outer, block = settings(), cuconv.config(num_threads=2)
    assert settings() == outer

    def enter() -> None:
        with block:
            with block:
                assert settings().num_threads == 2
            assert settings().num_threads == 2
            raise KeyError("inside")

    for _ in range(2):
        with pytest.raises(KeyError):
            enter()
        assert settings() == outer


def test_a_block_may_be_shared_by_threads() -> None:
    """Each leaves what it entered, in whatever order they do."""
    block = cuconv.config(num_threads=2)
    entered, left = threading.Event(), threading.Event()
    errors = []

    def other() -> None:
        try:
            with block:
                entered.set()
                assert left.wait(30)
            assert settings().num_threads is None
        except BaseException as error:  # noqa: BLE001 - brought to the main thread
            errors.append(error)

    thread = threading.Thread(target=other)
    with block:
        thread.start()
        assert entered.wait(30)
    assert settings().num_threads is None
    left.set()
    thread.join()
    assert errors == []


def test_a_new_thread_starts_with_the_defaults() -> None:
    seen = []
    with cuconv.config(precision="fast", num_threads=1):
        thread = threading.Thread(target=lambda: seen.append(settings()))
        thread.start()
        thread.join()
    assert seen == [Settings()]


def test_tasks_have_their_own() -> None:
    async def one(word: str) -> str:
        with cuconv.config(precision=word):
            await asyncio.sleep(0)
            return settings().precision

    async def both() -> list[str]:
        return await asyncio.gather(one("strict"), one("fast"))

    assert asyncio.run(both()) == ["strict", "fast"]


def test_a_calls_own_option_comes_first(choices) -> None:
    x, w = np.ones((4, 32, 28, 28), "f4"), np.ones((32, 32, 3, 3), "f4")
    with cuconv.config(precision="strict", memory_limit=3 * 2**17, deterministic=False):
        cuconv.conv(x, w)
        cuconv.conv(x, w, precision="standard", memory_limit=2**24, deterministic=True)
    first, second = choices
    assert first.problem.precision == "strict"
    assert not first.problem.deterministic
    assert first.workspace_bytes <= 3 * 2**17 < second.workspace_bytes
    assert second.problem.precision == "standard"
    assert second.problem.deterministic


def test_all_operations_heed_it(choices) -> None:
    x, w = np.ones((4, 16, 28, 28), "f4"), np.ones((16, 16, 3, 3), "f4")
    dy = np.ones((4, 16, 26, 26), "f4")
    with cuconv.config(memory_limit=2**18, num_threads=1, precision="strict"):
        cuconv.conv_backward(dy, x, w)
        cuconv.conv_input_grad(dy, w, x.shape)
        cuconv.conv_weight_grad(dy, x, w.shape)
        plan = cuconv.plan_conv(x.shape, w.shape)
    assert len(choices) == 4
    for candidate in (*choices, chosen(plan)):
        assert candidate.workspace_bytes <= 2**18
        assert candidate.tiling.workers == 1
        assert candidate.problem.precision == "strict"


@pytest.mark.parametrize("threads", [1, 2, 3, 64])
def test_num_threads_is_the_most(choices, threads) -> None:
    x, w = np.ones((8, 16, 56, 56), "f4"), np.ones((16, 16, 3, 3), "f4")
    with cuconv.config(num_threads=threads):
        cuconv.conv(x, w, strategy="im2col", memory_limit="2 MiB")
    assert 1 <= choices[0].tiling.workers <= threads
    assert choices[0].tiling.workers == 1 or threads > 1


BAD = [
    ({"num_threads": 0}, ValueError, "num_threads must be at least 1; got 0"),
    ({"num_threads": -1}, ValueError, "got -1"),
    ({"num_threads": 2.0}, TypeError, "num_threads must be an integer; got 2.0"),
    ({"num_threads": True}, TypeError, "num_threads .* True"),
    ({"num_threads": "2"}, TypeError, "num_threads"),
    ({"memory_limit": -1}, ValueError, "memory_limit must not be negative; got -1"),
    ({"memory_limit": "lots"}, ValueError, "64 MiB"),
    ({"memory_limit": 1.5}, TypeError, "memory_limit"),
    ({"precision": "exact"}, ValueError, "'strict', 'standard', 'fast'; got 'exact'"),
    ({"precision": 32}, TypeError, "precision must be a str"),
    ({"deterministic": "yes"}, TypeError, "deterministic .* 'yes'"),
    ({"deterministic": 1}, TypeError, "deterministic"),
    ({"deterministic": np.int64(1)}, TypeError, "deterministic"),
    ({"num_threads": np.True_}, TypeError, "num_threads .* np.True_"),
    ({"num_threads": np.float64(2)}, TypeError, "num_threads must be an integer"),
    (
        {"num_thread": 2},
        TypeError,
        "no option 'num_thread'; .* are num_threads, .*: did you mean 'num_threads'",
    ),
]


@pytest.mark.parametrize(("options", "error", "words"), BAD)
def test_what_has_no_meaning_is_refused_at_once(options, error, words) -> None:
    with pytest.raises(error, match=words):
        cuconv.config(**options)


def test_numbers_and_booleans_of_numpy_are_taken() -> None:
    numbers = {"num_threads": np.int64(3), "memory_limit": np.uint32(2**20)}
    for same in (np.True_, np.False_):
        with cuconv.config(**numbers, deterministic=same):
            assert settings() == Settings(3, 2**20, "standard", bool(same))
            assert type(settings().num_threads) is int
            assert type(settings().deterministic) is bool
    plan = cuconv.plan_conv((1, 1, 3), (1, 1, 2), deterministic=np.False_)
    assert plan.as_dict()["deterministic"] is False


# The environment


def run_with(code: str, **variables: str) -> subprocess.CompletedProcess[str]:
    environment = {k: v for k, v in os.environ.items() if not k.startswith("CUCONV_")}
    return subprocess.run(
        [sys.executable, "-W", "error", "-c", textwrap.dedent(code)],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
        env={**environment, **variables},
    )


SHOW = """
import numpy as np, cuconv
from cuconv.config import settings
print(tuple(settings()))
plan = cuconv.plan_conv((8, 32, 28, 28), (32, 32, 3, 3), padding=1)
print(plan.strategy, plan.workers, plan.workspace_bytes)
with cuconv.config(num_threads=7):
    print(tuple(settings()))
"""


def test_the_environment_holds_outside_blocks() -> None:
    done = run_with(
        SHOW,
        CUCONV_NUM_THREADS=" 1 ",
        CUCONV_MEMORY_LIMIT="1 MiB",
        CUCONV_PRECISION="strict",
        CUCONV_DETERMINISTIC="False",
    )
    assert done.stderr == ""
    first, plan, inside = done.stdout.splitlines()
    assert first == "(1, 1048576, 'strict', False)"
    assert inside == "(7, 1048576, 'strict', False)"
    strategy, workers, workspace = plan.split()
    assert strategy not in ("winograd", "fft")
    assert workers == "1"
    assert int(workspace) <= 2**20


def test_an_empty_variable_says_nothing() -> None:
    names = ("NUM_THREADS", "MEMORY_LIMIT", "PRECISION", "DETERMINISTIC")
    done = run_with(SHOW, **{f"CUCONV_{name}": " " for name in names})
    assert done.stderr == ""
    assert done.stdout.startswith("(None, None, 'standard', None)")


def test_a_variable_that_is_not_read_is_warned_of_once() -> None:
    code = """
    import warnings
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        import cuconv
        for _ in range(2):
            cuconv.plan_conv((1, 1, 3), (1, 1, 2))
    for warning in seen:
        print(warning.category.__name__, warning.message)
    """
    others = {"CUCONV_CACHE_DIR": "", "CUCONV_REQUIRE_GPU": "1", "CUCONV": "1"}
    assert run_with(code, CUCONV_NUM_THREADS="1", **others).stdout == ""
    done = run_with(code, CUCONV_THREADS="1", CUCONV_NUM_THREADS="1")
    assert done.stdout.strip() == (
        "UserWarning CUCONV_THREADS is not read; the variables of cuconv are "
        "CUCONV_NUM_THREADS, CUCONV_MEMORY_LIMIT, CUCONV_PRECISION, "
        "CUCONV_DETERMINISTIC, CUCONV_CACHE_DIR: did you mean 'CUCONV_NUM_THREADS'?"
    )


WRONG = [
    ("CUCONV_NUM_THREADS", "many", "num_threads"),
    ("CUCONV_NUM_THREADS", "0", "num_threads"),
    ("CUCONV_MEMORY_LIMIT", "much", "64 MiB"),
    ("CUCONV_PRECISION", "exact", "'strict'"),
    ("CUCONV_DETERMINISTIC", "maybe", "deterministic"),
]


@pytest.mark.parametrize(("name", "value", "words"), WRONG)
def test_a_bad_variable_is_named(name, value, words) -> None:
    done = run_with(
        "import cuconv\ncuconv.plan_conv((1, 1, 3), (1, 1, 2))", **{name: value}
    )
    last = done.stderr.splitlines()[-1]
    assert done.returncode == 1
    assert last.startswith(f"ValueError: {name}={value!r}: ")
    assert words in last
