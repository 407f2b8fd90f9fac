"""Settings that apply unless an option of the call overrides them.

The order of precedence: the option of the call, the innermost `config` block, the
environment, the library's default.
"""

import operator
import os
import warnings
from collections.abc import Callable
from contextvars import ContextVar
from functools import cache
from types import TracebackType
from typing import Any, Literal, NamedTuple, Never

import numpy as np

from cuconv.choices import check_choice, check_options, hint
from cuconv.memory import MemoryLimit, parse_memory_limit

PRECISIONS = ("strict", "standard", "fast")

# Not settings, but read: by ``strategy="benchmark"``; by the tests and the benchmarks.
_CACHE = "CUCONV_CACHE_DIR"
_OF_TESTS = "CUCONV_REQUIRE_GPU", "CUCONV_SHIM_", "CUCONV_TORCH_PYTHON"
_SWITCHES = {"1": True, "true": True, "0": False, "false": False}


class Settings(NamedTuple):
    """The settings of `config`; None leaves the choice to the library."""

    num_threads: int | None = None
    memory_limit: int | None = None
    precision: str = "standard"
    deterministic: bool | None = None


class config:  # noqa: N801 - read as a statement: with config(...): ...
    """Settings for the calls inside a ``with`` block.

    They apply to this thread (or asynchronous task) alone, as with `numpy.errstate`.
    Outside any block, the environment variables ``CUCONV_NUM_THREADS``,
    ``CUCONV_MEMORY_LIMIT``, ``CUCONV_PRECISION`` and ``CUCONV_DETERMINISTIC`` apply;
    another with that beginning is warned of.

    Parameters
    ----------
    num_threads
        The largest number of threads of one call with NumPy arrays; by default as many
        as NumPy's BLAS uses, and no more than there are processors.
    memory_limit, precision, deterministic
        The values that `cuconv.conv` uses where its own option is None.

    Raises
    ------
    ValueError, TypeError
        If a setting is invalid.

    Examples
    --------
    >>> import numpy as np
    >>> import cuconv
    >>> with cuconv.config(num_threads=1, memory_limit="4 MiB", precision="strict"):
    ...     cuconv.conv1d(np.ones((1, 1, 4)), np.ones((1, 1, 2)))
    array([[[2., 2., 2.]]])
    """

    def __init__(
        self,
        *,
        num_threads: int | None = None,
        memory_limit: MemoryLimit = None,
        precision: Literal["strict", "standard", "fast"] | None = None,
        deterministic: bool | None = None,
        **unknown: Never,
    ) -> None:
        check_options(unknown, _CHECKS)
        given = {
            "num_threads": num_threads,
            "memory_limit": memory_limit,
            "precision": precision,
            "deterministic": deterministic,
        }
        self._own = {
            name: _CHECKS[name](value)
            for name, value in given.items()
            if value is not None
        }

    def __enter__(self) -> None:
        _settings.set((*_settings.get(), settings()._replace(**self._own)))

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        _settings.set(_settings.get()[:-1])


def settings() -> Settings:
    """The settings that apply here."""
    inner = _settings.get()
    return inner[-1] if inner else _from_environment()


def check_precision(value: object) -> str:
    """Raise if the value is not a precision."""
    if not isinstance(value, str):
        raise TypeError(f"precision must be a str; got {value!r}")
    return check_choice("precision", value, PRECISIONS)


def check_deterministic(value: object) -> bool:
    """Raise if the value is neither True nor False."""
    if not isinstance(value, (bool, np.bool_)):
        raise TypeError(f"deterministic must be True, False or None; got {value!r}")
    return bool(value)


def _check_threads(value: Any) -> int:
    try:
        is_boolean = isinstance(value, (bool, np.bool_))
        number = None if is_boolean else operator.index(value)
    except TypeError:
        number = None
    if number is None:
        raise TypeError(f"num_threads must be an integer; got {value!r}")
    if number < 1:
        raise ValueError(f"num_threads must be at least 1; got {value}")
    return number


_CHECKS: dict[str, Callable[[Any], Any]] = {
    "num_threads": _check_threads,
    "memory_limit": parse_memory_limit,
    "precision": check_precision,
    "deterministic": check_deterministic,
}


@cache
def _from_environment() -> Settings:
    """Settings from ``CUCONV_…`` variables, read once."""
    variables = {f"CUCONV_{name.upper()}": name for name in _CHECKS}
    _warn_of_others((*variables, _CACHE))
    found = {}
    for variable, name in variables.items():
        check = _CHECKS[name]
        word = os.environ.get(variable, "").strip()
        if not word:
            continue
        try:
            found[name] = check(_meant(name, word))
        except (TypeError, ValueError) as error:
            raise ValueError(f"{variable}={word!r}: {error}") from None
    return Settings(**found)


def _warn_of_others(known: tuple[str, ...]) -> None:
    """Warn of variables that look like ours and are none."""
    for name in sorted(os.environ):
        is_ours = name in known or name.startswith(_OF_TESTS)
        if name.startswith("CUCONV_") and not is_ours:
            names = ", ".join(known)
            meant = hint(name, known)
            words = f"{name} is not read; the variables of cuconv are {names}{meant}"
            warnings.warn(words, stacklevel=4)


def _meant(name: str, word: str) -> object:
    """Parse the text of a variable."""
    if name == "num_threads" and word.isdecimal():
        return int(word)
    if name == "deterministic":
        return _SWITCHES.get(word.lower(), word)
    return word


_settings: ContextVar[tuple[Settings, ...]] = ContextVar("cuconv_settings", default=())
