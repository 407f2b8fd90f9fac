"""NVTX ranges: what a profiler shows of a call.

One domain, ``cuconv``, and a range for each stage (plan, pad, gather, gemm, scatter),
whose message names the strategy and whose payload counts the chunk.  Where no profiler
listens, `nvtx` hands out a domain that does nothing; where `nvtx` has no build, the
ranges do nothing themselves.
"""

from types import TracebackType
from typing import Any

try:
    import nvtx
except ImportError:
    nvtx = None

DOMAIN = "cuconv"

_domain: Any = nvtx.get_domain(DOMAIN) if nvtx else None


class stage:  # noqa: N801 - read as a statement: with stage("gather"): ...
    """A range around one stage of a call."""

    __slots__ = ("_chunk", "_message")

    def __init__(self, name: str, strategy: str = "", chunk: int = 0) -> None:
        self._message = f"{name} {strategy}" if strategy else name
        self._chunk = chunk

    def __enter__(self) -> None:
        if _domain is not None:
            _domain.push_range(message=self._message, payload=self._chunk)

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if _domain is not None:
            _domain.pop_range()
