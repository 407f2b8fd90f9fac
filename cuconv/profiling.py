"""NVTX ranges, which a profiler shows for each stage of a call.

One domain, ``cuconv``, and a range for each stage (plan, pad, gather, gemm, scatter),
whose message names the strategy and whose payload counts the chunk.  Without a profiler
`nvtx` gives a domain that does nothing; where `nvtx` has no build, there are no ranges.
"""

from collections.abc import Callable
from types import TracebackType
from typing import Any

try:
    import nvtx
except ImportError:
    nvtx = None

DOMAIN = "cuconv"

_domain: Any = nvtx.get_domain(DOMAIN) if nvtx else None


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
