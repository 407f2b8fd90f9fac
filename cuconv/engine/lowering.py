"""The result of lowering: steps over one workspace, and basic convolutions."""

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType

from cuconv.arrays import Array
from cuconv.engine.execute import Run
from cuconv.engine.planner import PlanningResult, decide
from cuconv.engine.request import Request
from cuconv.geometry import ConvGeometry
from cuconv.memory import Buffer, MemoryLimit, buffer_bytes, workspace_bytes


class Lowering(ABC):
    """Steps that compute a call.

    ``parts`` are the basic convolutions among them: each was planned alone, and the
    first gives the plan's strategy.  ``buffers`` are memory beside that of the parts.
    """

    parts: tuple[PlanningResult, ...]
    buffers: tuple[Buffer, ...] = ()
    is_capturable = True
    # Reasons against other ways to lower the call.
    instead_of: Mapping[str, str] = MappingProxyType({})

    @abstractmethod
    def steps(self, run: Run) -> None:
        """Run the steps, or record them."""

    @abstractmethod
    def weights_of(self, w: Array) -> Iterable[Array]:
        """The weights that each part takes of those of the call."""

    @property
    def composition(self) -> str:
        """A phrase for the parts; empty for a basic convolution."""
        return ""

    @property
    def chunks(self) -> int:
        """The number of blocks that the work is split into."""
        return sum(part.best.chunks for part in self.parts)

    @property
    def flops(self) -> int:
        """Operations, a multiply-add counting as two."""
        return sum(part.best.flops for part in self.parts)

    @property
    def nanoseconds(self) -> float:
        """The estimated time of a run."""
        return sum(part.best.nanoseconds for part in self.parts)

    @property
    def workspace_bytes(self) -> int:
        """Everything that a run allocates beyond inputs and result."""
        return workspace_bytes(self.buffers) + held(self.parts)

    def bytes_around(self, parts: Sequence[int]) -> int:
        """Bytes of all buffers, where those of the parts take so many."""
        return buffer_bytes(self.buffers) + max(parts, default=0)

    @property
    def memory_limit(self) -> int:
        """The memory limit that applies."""
        return workspace_bytes(self.buffers) + self.parts[0].limit


@dataclass
class Basic(Lowering):
    """One convolution, as a strategy runs it."""

    result: PlanningResult
    geometry: ConvGeometry
    parts: tuple[PlanningResult, ...] = field(init=False)

    def __post_init__(self) -> None:
        self.parts = (self.result,)

    @property
    def flops(self) -> int:
        return 2 * self.geometry.multiplications

    def steps(self, run: Run) -> None:
        run.convolve(0, *run.operands)

    def weights_of(self, w: Array) -> Iterable[Array]:
        yield w


class Viewed(Lowering):
    """Another lowering, run on other views of the call's arrays."""

    def __init__(self, inner: Lowering) -> None:
        self.inner = inner
        self.parts, self.buffers = inner.parts, inner.buffers
        self.is_capturable, self.instead_of = inner.is_capturable, inner.instead_of

    @abstractmethod
    def views(self, arrays: dict[str, Array]) -> dict[str, Array]:
        """The arrays that are seen otherwise, of those of a run."""

    @property
    def composition(self) -> str:
        return self.inner.composition

    @property
    def chunks(self) -> int:
        return self.inner.chunks

    @property
    def flops(self) -> int:
        return self.inner.flops

    @property
    def nanoseconds(self) -> float:
        return self.inner.nanoseconds

    @property
    def workspace_bytes(self) -> int:
        return self.inner.workspace_bytes

    def bytes_around(self, parts: Sequence[int]) -> int:
        return self.inner.bytes_around(parts)

    @property
    def memory_limit(self) -> int:
        return self.inner.memory_limit

    def steps(self, run: Run) -> None:
        arrays = {**run.arrays, **self.views(run.arrays)}
        self.inner.steps(run._replace(arrays=arrays))


def basic_part(request: Request, *, flipped: bool = False) -> PlanningResult:
    """Plan a basic convolution; ``flipped`` as in `Problem`."""
    options = request.options
    name = "auto" if options.strategy == "benchmark" else options.strategy
    problem, backend = request.problem(flipped=flipped), request.backend
    limit: MemoryLimit = options.memory_limit
    return decide(problem, backend, name, limit, backend.workers())


def held(parts: Iterable[PlanningResult]) -> int:
    """Bytes that parts need beyond inputs and results, run one after another.

    They share the largest workspace; the largest overhead may be another part's.
    """
    best = [part.best for part in parts]
    memory = max((each.memory_bytes for each in best), default=0)
    return memory + max((each.overhead_bytes for each in best), default=0)


def overhead_of(parts: Iterable[PlanningResult]) -> int:
    """The most bytes that parts need beside their buffers."""
    return max((part.best.overhead_bytes for part in parts), default=0)


def held_by(lowerings: Iterable[Lowering]) -> int:
    """`held` for lowerings with their own buffers, run one after another."""
    each = [(low.workspace_bytes, overhead_of(low.parts)) for low in lowerings]
    most = max((whole - overhead for whole, overhead in each), default=0)
    return most + max((overhead for _, overhead in each), default=0)


def fits(lowerings: Iterable[Lowering], limit: MemoryLimit) -> bool:
    """Whether lowerings fit a limit, run one after another.

    If they do not with all threads, plan each for one: their overheads are equal then,
    and only the largest workspace counts.
    """
    return not isinstance(limit, int) or held_by(lowerings) <= limit
