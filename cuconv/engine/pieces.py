"""Calls that are convolutions of pieces, one after another in one workspace.

A piece is some images, or a part of one.  Pieces are as large as the memory limit
allows for them and for the steps of every kind.
"""

from abc import abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple, Protocol, Self, TypeAlias

from cuconv.arrays import Array, DType
from cuconv.backends import Backend
from cuconv.config import config
from cuconv.engine.execute import Run, fill
from cuconv.engine.lowering import Lowering, fits, held_by
from cuconv.engine.planner import PlanningResult
from cuconv.geometry import ConvGeometry
from cuconv.memory import (
    Buffer,
    MemoryLimitError,
    all_within,
    buffer_bytes,
    is_little,
    least_limit,
    workspace_bytes,
)
from cuconv.options import Options

# Steps of a kind are lowered once: see `Step`.
Kind: TypeAlias = tuple[int, str, ConvGeometry, DType]


class Tiling(NamedTuple):
    """The pieces of a call, its buffers, and the memory left for its steps.

    ``way`` goes through the pieces, of which there are ``pieces``.  ``own`` are
    buffers of every worker, for what is no convolution.
    """

    way: Any
    pieces: int
    buffers: tuple[Buffer, ...]
    limit: int
    own: tuple[Buffer, ...] = ()
    workers: int = 1


class Step(NamedTuple):
    """A convolution of a piece; ``number`` tells those of one call apart.

    ``total``, if any, is what its result is added to.
    """

    number: int
    call: str
    geometry: ConvGeometry
    operands: dict[str, Array]
    out: Array
    total: Array | None = None

    @property
    def kind(self) -> Kind:
        return self.number, self.call, self.geometry, self.out.dtype

    def later(self, arrays: dict[str, Array]) -> "Step":
        """The same after the first piece, when gradients of weights are added up."""
        if self.call != "weight_grad" or "part" not in arrays:
            return self
        part = arrays["part"][: self.out.size].reshape(self.out.shape)
        return self._replace(out=part, total=self.out)


class PiecesRequest(Protocol):
    """A call that is to be lowered to pieces."""

    @property
    def what(self) -> str:
        """What it is, for messages."""

    @property
    def options(self) -> Options:
        """The options of the call."""

    @property
    def backend(self) -> Backend:
        """The backend that runs it."""

    def counts(self) -> list[int]:
        """The numbers of positions that a piece may have, the smallest first."""

    def tiling(self, positions: int, limit: int) -> Tiling:
        """Cut into pieces of at most so many positions."""

    def kinds(self, tiling: Tiling) -> Iterator[Step]:
        """The steps of a piece of every kind, of arrays that are not there yet."""

    def lowered(self, step: Step, limit: int) -> Lowering:
        """Lower a step."""


class Pieces(Lowering):
    """The steps of every piece; ``inner`` says how those of each kind are lowered."""

    def __init__(
        self, request: Any, tiling: Tiling, inner: dict[Kind, Lowering]
    ) -> None:
        self.request, self.tiling = request, tiling
        self.inner, self.buffers = inner, tiling.buffers
        self.parts: tuple[PlanningResult, ...] = ()
        self._first: dict[Kind, int] = {}
        for kind, lowering in inner.items():
            self._first[kind] = len(self.parts)
            self.parts += lowering.parts

    @classmethod
    def of(cls, request: PiecesRequest, least: int) -> Self:
        """Lower to the largest pieces that fit, of calls that take ``least`` beside."""
        limit = request.options.memory_limit
        if isinstance(limit, int):
            return cls._within(request, limit, least)
        try:
            return cls._within(request, request.backend.default_memory_limit, least)
        except MemoryLimitError as error:
            return cls._within(request, error.smallest, least)

    @classmethod
    def _within(cls, request: PiecesRequest, limit: int, least: int) -> Self:
        tilings = _tilings(request, limit) if least <= limit else []
        # The largest pieces first, but half of the limit is for the steps if it can be:
        # in what little the largest may leave, their blocks would be tiny.
        tilings.sort(key=lambda tiling: tiling.limit < limit // 2)
        for tiling in tilings:
            if tiling.limit >= 0:
                calls = _calls(request, tiling, tiling.limit)
                try:
                    inner = all_within(calls)
                    if not fits(inner.values(), tiling.limit):
                        with config(num_threads=1):
                            inner = all_within(calls)
                except MemoryLimitError:
                    continue
                return cls(request, tiling, inner)
        raise MemoryLimitError(limit, max(least, _smallest(request)), request.what)

    @property
    def chunks(self) -> int:
        """The largest number of blocks that the work is split into."""
        steps = len({(number, call) for number, call, *_ in self.inner})
        most = max((each.chunks for each in self.inner.values()), default=0)
        return self.tiling.pieces * steps * most

    @property
    def workspace_bytes(self) -> int:
        own = self.tiling.workers * buffer_bytes(self.tiling.own)
        return workspace_bytes(self.buffers) + own + held_by(self.inner.values())

    @property
    def memory_limit(self) -> int:
        own = self.tiling.workers * buffer_bytes(self.tiling.own)
        left = self.parts[0].limit if self.parts else self.tiling.limit
        return workspace_bytes(self.buffers) + own + left

    def bytes_around(self, parts: Sequence[int]) -> int:
        each = (
            lowering.bytes_around(parts[first : first + len(lowering.parts)])
            for first, lowering in zip(
                self._first.values(), self.inner.values(), strict=True
            )
        )
        own = self.tiling.workers * buffer_bytes(self.tiling.own)
        return buffer_bytes(self.buffers) + own + max(each, default=0)

    def weights_of(self, w: Array) -> Iterable[Array]:
        raise NotImplementedError("what is computed in pieces is not prepared")

    @abstractmethod
    def steps(self, run: Run) -> None:
        """Run the steps, or record them."""

    def _convolve(self, step: Step, run: Run) -> None:
        operands, out, backend = step.operands, step.out, run.backend
        if not out.size:
            return
        if step.geometry.is_empty:
            fill(backend, out, operands.get("bias"), step.geometry)
        else:
            inner, first = self.inner[step.kind], self._first[step.kind]
            inner.steps(run.inside(first, {**operands, "out": out}, inner.buffers))
        if step.total is not None:
            backend.do(backend.xp.add, step.total, out, step.total)


def _tilings(request: PiecesRequest, limit: int) -> list[Tiling]:
    """Tilings from the whole to the first that takes little memory."""
    tilings = []
    for count in reversed(request.counts()):
        tilings.append(request.tiling(count, limit))
        if is_little(tilings[-1].buffers):
            break
    return tilings


def _calls(
    request: PiecesRequest, tiling: Tiling, limit: int
) -> dict[Kind, Callable[[], Lowering]]:
    """The functions that lower the steps of every kind under a limit."""
    steps = {step.kind: step for step in request.kinds(tiling)}
    return {kind: partial(request.lowered, s, limit) for kind, s in steps.items()}


def _smallest(request: PiecesRequest) -> int:
    """The smallest limit that would do."""
    best: int | None = None
    for tiling in reversed(_tilings(request, 0)):
        if best is None or -tiling.limit < best:
            needed = least_limit(_calls(request, tiling, 0)) - tiling.limit
            best = needed if best is None else min(best, needed)
    return best or 0
