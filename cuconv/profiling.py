"""NVTX ranges, which a profiler shows for each stage of a call.

One domain, ``cuconv``, and a range for each stage (plan, pad, gather, gemm, scatter),
whose message names the strategy and whose payload counts the chunk.  A profiler sets
``NVTX_INJECTION64_PATH`` for the process that it observes: without that, and where
`nvtx` has no build, there are no ranges.  Where it fails, they end with a warning: no
profiler breaks a call.
"""

import os
import warnings
from types import TracebackType
from typing import Any

DOMAIN = "cuconv"


def _find_domain() -> Any:
    """The domain of `nvtx`; None without a profiler, which a process is told of."""
    if "NVTX_INJECTION64_PATH" not in os.environ:
        return None
    try:
        import nvtx  # noqa: PLC0415 - importing it takes longer than all of ours
    except ImportError:
        return None
    try:
        found = nvtx.get_domain(DOMAIN)
    except Exception as error:  # noqa: BLE001 - a profiler raises whatever it likes
        _warn(error)
        return None
    return None if type(found).__name__ == "DummyDomain" else found


def _warn(error: Exception) -> None:
    words = f"there are no more NVTX ranges of cuconv: {type(error).__name__}: {error}"
    warnings.warn(words, RuntimeWarning, stacklevel=4)


# Where ranges go; None if no profiler receives them.
domain = _find_domain()


def push(message: str, chunk: int) -> None:
    """Begin a range."""
    if domain is not None:
        _tell("push_range", message=message, payload=chunk)


def pop() -> None:
    """End the range that began last."""
    if domain is not None:
        _tell("pop_range")


def _tell(name: str, **values: object) -> None:
    """Call a method of the domain; no ranges from then on if it fails."""
    global domain  # noqa: PLW0603 - one profiler for the process
    try:
        getattr(domain, name)(**values)
    except Exception as error:  # noqa: BLE001 - a profiler raises whatever it likes
        domain = None
        _warn(error)


class stage:  # noqa: N801 - read as a statement: with stage("gather"): ...
    """A range around one stage of a call."""

    __slots__ = ("chunk", "message")

    def __init__(self, name: str, strategy: str = "", chunk: int = 0) -> None:
        self.message = f"{name} {strategy}" if strategy else name
        self.chunk = chunk

    def __enter__(self) -> None:
        if domain is not None:
            push(self.message, self.chunk)

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if domain is not None:
            pop()
