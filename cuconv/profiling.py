"""NVTX ranges, which a profiler shows for each stage of a call.

One domain, ``cuconv``, and a range for each stage (plan, pad, gather, gemm, scatter),
whose message names the strategy and whose payload counts the chunk.  A profiler sets
``NVTX_INJECTION64_PATH`` for the process that it observes: without that, and where
`nvtx` has no build, there are no ranges.
"""

import os
from collections.abc import Callable
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
    return nvtx.get_domain(DOMAIN)


_domain = _find_domain()


def is_listening() -> bool:
    """True if a profiler receives ranges."""
    return _domain is not None and type(_domain).__name__ != "DummyDomain"


def push(message: str, chunk: int) -> None:
    """Begin a range."""
    if _domain is not None:
        _domain.push_range(message=message, payload=chunk)


def pop() -> None:
    """End the range that began last."""
    if _domain is not None:
        _domain.pop_range()


def _at_once(function: Callable[..., object], *operands: Any) -> None:
    function(*operands)


class stage:  # noqa: N801 - read as a statement: with stage("gather"): ...
    """A range around one stage of a call; ``do`` begins and ends it, or records it."""

    __slots__ = ("_chunk", "_do", "_message")

    def __init__(
        self,
        name: str,
        strategy: str = "",
        chunk: int = 0,
        do: Callable[..., None] = _at_once,
    ) -> None:
        self._message = f"{name} {strategy}" if strategy else name
        self._chunk = chunk
        self._do = do

    def __enter__(self) -> None:
        self._do(push, self._message, self._chunk)

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._do(pop)
