"""Plans whose steps are recorded at their second run, and replayed later."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, Protocol, Self

from cuconv.arrays import (
    Array,
    DType,
    base_array,
    check_out,
    check_overlap,
    module_of,
    stub_of,
)
from cuconv.backends import Backend, refuse_capture
from cuconv.engine.costs import MOST_BLOCKS
from cuconv.engine.execute import Memory, Run
from cuconv.engine.lowering import Lowering
from cuconv.engine.program import MOST_BYTES, Program, Recording, TooManySteps
from cuconv.engine.tile_search import Candidate
from cuconv.memory import ALIGNED, Buffer, buffer_bytes, carve, with_start
from cuconv.options import Options

# Why a call without `out` is refused while a CUDA graph is captured.
NEEDS_OUT = "the result cannot be allocated: pass out="


class Recorded(ABC):
    """The steps of a call on arrays of one layout: recorded when they run again.

    Parameters
    ----------
    backend
        The backend that runs it.
    blocks
        The number of blocks of the work; many are not recorded.
    threads
        The number of threads it is for; 0 if it does not depend on them.
    """

    # Bytes of the arrays that NumPy may take buffers for, beside the workspace.
    buffered = 0

    def __init__(self, backend: Backend, blocks: int, threads: int = 0) -> None:
        self.backend, self.threads = backend, threads
        self.program: Program | None = None
        self._was_run, self._is_recordable = False, blocks <= MOST_BLOCKS

    @property
    @abstractmethod
    def nbytes(self) -> int:
        """Bytes of workspace."""

    @property
    @abstractmethod
    def workers(self) -> int:
        """The number of threads that run it."""

    @property
    def is_single_threaded(self) -> bool:
        """True if no step is large enough for a second thread."""
        return self.workers == 1

    @property
    def spare_bytes(self) -> int:
        """The bytes that the memory limit leaves for a program beside the workspace."""
        return MOST_BYTES

    @abstractmethod
    def _steps(self, backend: Any, arrays: dict[str, Array], memory: Memory) -> None:
        """Run the steps, or record them."""

    def execute_first(self, arrays: dict[str, Array]) -> None:
        """Run the steps; the second time, record them first, if that is worth it.

        Programs meet shapes that they never see again.  ``arrays`` have been checked,
        and are given by their names.
        """
        if not self._was_run:
            self._was_run = True
        elif self._is_recordable:
            self._is_recordable = False
            with self.backend.device_of(next(iter(arrays.values()))):
                self.program = self._recorded(arrays)
        if self.program is not None:
            self.backend.execute(self.program, tuple(arrays.values()))
        else:
            self._run_steps(arrays)

    def _run_steps(self, arrays: dict[str, Array]) -> None:
        """Run the steps without recording them."""
        backend = self.backend
        with (
            backend.device_of(next(iter(arrays.values()))),
            backend.alone(),
            backend.memory(self.nbytes) as raw,
        ):
            self._steps(backend, arrays, Memory(raw))

    def _recorded(self, arrays: dict[str, Array]) -> Program | None:
        """Record the steps for arrays of this layout, unless they are too many."""
        stubs = {name: stub_of(name, array) for name, array in arrays.items()}
        recording = Recording(self.backend, stubs, self.spare_bytes)
        nbytes = self.nbytes
        memory = Memory.recorded(max(nbytes - ALIGNED, 0), recording)
        try:
            self._steps(recording.backend, stubs, memory)
        except TooManySteps:
            return None
        return Program(
            recording,
            nbytes,
            self.workers,
            single_threaded=self.is_single_threaded,
            buffered=self.buffered,
        )


class LoweredCall(Recorded):
    """A call that was lowered; ``strategy="benchmark"`` times its candidates first."""

    def __init__(self, lowering: Lowering, backend: Backend, options: Options) -> None:
        self.lowering, self.options = lowering, options
        self.candidates: list[Candidate] = [part.best for part in lowering.parts]
        self._is_tuned = options.strategy != "benchmark"
        # Weights that are built in, transformed or packed, by their names.
        self.weights: dict[str, Array] = {}
        super().__init__(backend, lowering.chunks)
        self.renew()

    def renew(self) -> None:
        """Forget what was recorded, and see what the candidates that run ask for."""
        # Plans for arrays with other layouts.
        self.others: dict[Any, Any] = {}
        self._was_run = False
        self._is_recordable = self.lowering.chunks <= MOST_BLOCKS
        self.program = None
        # For how many threads it is, where that matters: a device has none.
        is_free = self.is_single_threaded or self.backend.device != "cpu"
        self.threads = 0 if is_free else self.backend.workers()

    @property
    def is_single_threaded(self) -> bool:
        """True if no product is large enough for a second thread."""
        return all(c.problem.single_threaded for c in self.candidates)

    @property
    def workers(self) -> int:
        """The number of threads that run it."""
        return max((c.tiling.workers for c in self.candidates), default=1)

    def with_candidates(self, candidates: list[Candidate]) -> Self:
        """The same call, whose parts are run by these."""
        other = object.__new__(type(self))
        other.__dict__.update(self.__dict__, candidates=candidates.copy())
        other.renew()
        return other

    def _memory_of(self, candidate: Candidate) -> int:
        """Bytes of a candidate's buffers, less those of weights that are built in."""
        needs, workers = candidate.workspace, candidate.tiling.workers
        weights = () if self.weights else needs.weights
        shared = buffer_bytes((*weights, *needs.shared))
        return shared + workers * buffer_bytes(needs.per_worker)

    @property
    def nbytes(self) -> int:
        """Bytes of all buffers."""
        each = [self._memory_of(c) if c.flops else 0 for c in self.candidates]
        return with_start(self.lowering.bytes_around(each))

    @property
    def spare_bytes(self) -> int:
        return self.lowering.memory_limit - self.lowering.workspace_bytes

    def execute_first(self, arrays: dict[str, Array]) -> None:
        """Time the candidates if that was asked; record the steps, and run them.

        Candidates without a winner yet, in a CUDA-graph capture, run unrecorded: the
        next call asks again.
        """
        if not self._is_tuned:
            self._tune(arrays)
        if self._is_tuned:
            super().execute_first(arrays)
        else:
            self._run_steps(arrays)

    def _steps(self, backend: Any, arrays: dict[str, Array], memory: Memory) -> None:
        buffers = self.lowering.buffers
        space = carve(memory.raw, 0, buffers)
        start = buffer_bytes(buffers)
        run = Run(backend, {**arrays, **space}, self.candidates, memory, start)
        self.lowering.steps(run)

    def _tune(self, arrays: dict[str, Array]) -> None:
        """Time the candidates of every part, or recall which was the fastest.

        While a CUDA graph is captured nothing is timed.
        """
        from cuconv.engine import autotune  # noqa: PLC0415 - it reads and writes files

        machine, threads = self.backend.machine(), self.backend.workers()
        for number, part in enumerate(self.lowering.parts):
            if not part.best.flops:
                continue
            key = part.best.problem.fingerprint, part.limit, threads
            winners = [autotune.Winner.of(candidate) for candidate in part.candidates]
            winner = autotune.recall(machine, key, winners)
            if winner is None and part.best.problem.captured:
                continue
            if winner is None:
                calls = [self._trial(number, c, arrays) for c in part.candidates]
                winner = winners[autotune.fastest(self.backend, calls)]
                autotune.remember(machine, key, winner)
            self.candidates[number] = part.candidates[winners.index(winner)]
        self._is_tuned = not any(c.problem.captured for c in self.candidates)
        self.renew()

    def _trial(
        self, number: int, candidate: Candidate, arrays: dict[str, Array]
    ) -> Callable[[], None]:
        """A run with another candidate for one part."""
        candidates = self.candidates.copy()
        candidates[number] = candidate
        other = self.with_candidates(candidates)
        return lambda: other._run_steps(arrays)  # noqa: SLF001 - a copy of itself


class Result(NamedTuple):
    """A result of a call; ``name`` is for messages."""

    name: str
    shape: tuple[int, ...]
    dtype: DType


class Workspace(NamedTuple):
    """The buffers of every worker, and into how many pieces the work is divided."""

    buffers: tuple[Buffer, ...] = ()
    workers: int = 1
    pieces: int = 1


class Steps(Protocol):
    """The steps of a call on its arrays."""

    def run(
        self,
        backend: Any,
        arrays: dict[str, Array],
        scratch: tuple[dict[str, Array], ...],
    ) -> None:
        """Do it, or record it; ``scratch`` are the buffers of every worker."""


class RecordedPlan(Recorded):
    """The plan of a call with one kind of buffers, of pooling or of columns.

    Parameters
    ----------
    backend, threads
        As for `Recorded`.
    steps
        The steps.
    names
        The names of the arrays that it takes, in their order.
    results
        The results; where there are several, a call returns all of them.
    workspace
        What the workers need.
    buffered
        Bytes of the arrays that NumPy may take buffers for.
    spare
        What the memory limit leaves for a program beside the workspace.
    """

    def __init__(
        self,
        backend: Backend,
        steps: Steps,
        names: tuple[str, ...],
        results: tuple[Result, ...],
        workspace: Workspace,
        *,
        threads: int = 0,
        buffered: int = 0,
        spare: int = MOST_BYTES,
    ) -> None:
        super().__init__(backend, workspace.pieces, threads)
        self.names, self.results, self.workspace = names, results, workspace
        self.steps, self.buffered, self._spare = steps, buffered, spare

    @property
    def spare_bytes(self) -> int:
        return self._spare

    @property
    def workers(self) -> int:
        return self.workspace.workers

    @property
    def nbytes(self) -> int:
        return with_start(self.workers * buffer_bytes(self.workspace.buffers))

    def _steps(self, backend: Any, arrays: dict[str, Array], memory: Memory) -> None:
        scratch = memory.own("own", 0, self.workspace.buffers, self.workers)
        self.steps.run(backend, arrays, scratch)

    def run(self, arrays: Sequence[Array | None], out: Any) -> Any:
        """Run it on arrays that have been checked."""
        backend = self.backend
        outs = out if type(out) is tuple else (out,) * len(self.results)
        named = dict(zip(self.names, arrays, strict=False))
        found = []
        for (name, shape, dtype), given in zip(self.results, outs, strict=True):
            array = backend.empty(shape, dtype) if given is None else given
            named[name] = array if given is None else base_array(array)
            found.append(array)
        if self.program is None:
            self.execute_first(named)
        else:
            backend.execute(self.program, tuple(named.values()))
        return tuple(found) if len(found) > 1 else array


def check_results(
    backend: Backend,
    inputs: dict[str, Array],
    results: Sequence[Result],
    outs: Sequence[Array | None],
) -> None:
    """Refuse arrays that cannot take the results, or none in a capture."""
    taken = dict(inputs)
    for (name, shape, dtype), array in zip(results, outs, strict=True):
        if array is None:
            refuse_capture(backend, NEEDS_OUT)
            continue
        module_of({**inputs, name: array})
        check_out(array, shape, dtype)
        check_overlap(backend.xp, array, taken)
        taken[name] = array


class PiecesPlan(LoweredCall):
    """The plan of a call in pieces: one result, or several gradients by name."""

    # The type of several gradients; that of the bias is the last.
    gradients: type[Any]

    def __init__(
        self,
        lowering: Lowering,
        request: Any,
        names: tuple[str, ...],
        results: Mapping[str, Array],
        bias: Any,
    ) -> None:
        super().__init__(lowering, request.backend, request.options)
        self.names, self._bias = names, bias
        self._results = [(n, a.shape, a.dtype) for n, a in results.items()]

    def run(self, arrays: Sequence[Array | None], out: Array | None) -> Any:
        """Run it on arrays that have been checked."""
        given = zip(self.names, arrays, strict=False)
        named = {name: array for name, array in given if array is not None}
        for name, *how in self._results:
            named[name] = self.backend.empty(*how) if out is None else base_array(out)
        if self._results:
            if self.program is None:
                self.execute_first(named)
            else:
                self.backend.execute(self.program, tuple(named.values()))
        if "y" in named:
            return named["y"] if out is None else out
        found = {name: named.get(f"d{name}") for name in self.gradients._fields[:-1]}
        bias = self._bias and self._bias.run(arrays[:1], None)
        return self.gradients(**found, bias=bias)
