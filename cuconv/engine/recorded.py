"""Calls whose steps are recorded at their first run, and what every plan checks."""

from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np

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
from cuconv.engine.execute import Memory
from cuconv.engine.plan import MOST_BLOCKS, NEEDS_OUT
from cuconv.engine.program import Program, Recording, TooManySteps
from cuconv.memory import ALIGNED, Buffer, buffer_bytes, with_start


class Result(NamedTuple):
    """A result of a call; ``name`` is for messages."""

    name: str
    shape: tuple[int, ...]
    dtype: DType


class Workspace(NamedTuple):
    """The buffers of every worker, and into how many pieces the work is cut."""

    buffers: tuple[Buffer, ...] = ()
    workers: int = 1
    pieces: int = 1


class Steps(Protocol):
    """What a call does with its arrays."""

    def run(
        self,
        backend: Any,
        arrays: dict[str, Array],
        scratch: tuple[dict[str, Array], ...],
    ) -> None:
        """Do it, or record it; ``scratch`` are the buffers of every worker."""


class RecordedPlan:
    """The steps of a call with arrays of one layout.

    Parameters
    ----------
    backend
        The backend that runs them.
    steps
        The steps.
    names
        The names of the arrays that it takes, in their order.
    results
        The results; where there are several, a call returns all of them.
    workspace
        What the workers need.
    threads
        For how many threads it is; 0 where that does not matter.
    buffered
        Bytes of the arrays that NumPy may take buffers for.
    refusal
        Why it cannot run in a capture, though it is given its results.
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
        refusal: str | None = None,
    ) -> None:
        self._steps, self._refusal = steps, refusal
        self.backend, self.names, self.results = backend, names, results
        self.workspace, self.threads = workspace, threads
        self._own_bytes = buffer_bytes(workspace.buffers)
        self._nbytes = with_start(workspace.workers * self._own_bytes)
        self._buffered = buffered
        self._may_capture = backend.xp is not np
        self._program: Program | None = None
        self._is_recordable = workspace.pieces <= MOST_BLOCKS

    def run(self, arrays: Sequence[Array | None], out: Any) -> Any:
        """Run it on arrays that have been checked."""
        backend = self.backend
        outs = out if type(out) is tuple else (out,) * len(self.results)
        if self._may_capture and backend.is_capturing():
            self._refuse(outs)
        named = dict(zip(self.names, arrays, strict=False))
        found = []
        for (name, shape, dtype), given in zip(self.results, outs, strict=True):
            array = backend.empty(shape, dtype) if given is None else given
            named[name] = array if given is None else base_array(array)
            found.append(array)
        if self._program is None:
            self._run_first(named)
        else:
            backend.execute(self._program, named)
        return tuple(found) if len(found) > 1 else array

    def _refuse(self, outs: tuple[Array | None, ...]) -> None:
        """Refuse a capture of what takes memory."""
        if any(array is None for array in outs):
            refuse_capture(self.backend, NEEDS_OUT, captured=True)
        if self._refusal is not None:
            refuse_capture(self.backend, self._refusal, captured=True)

    def _run_first(self, arrays: dict[str, Array]) -> None:
        """Run it while no program is recorded; record one if that is worth it."""
        if self._is_recordable:
            try:
                self._program = self._recorded(arrays)
            except TooManySteps:
                self._is_recordable = False
        if self._program is not None:
            self.backend.execute(self._program, arrays)
            return
        backend = self.backend
        with (
            backend.device_of(arrays[self.names[0]]),
            backend.memory(self._nbytes) as raw,
        ):
            self._steps.run(backend, arrays, self._scratch(Memory(raw)))

    def _recorded(self, arrays: dict[str, Array]) -> Program:
        """Record the steps for arrays of this layout."""
        stubs = {name: stub_of(name, array) for name, array in arrays.items()}
        recording = Recording(self.backend, stubs)
        nbytes, workers = max(self._nbytes - ALIGNED, 0), self.workspace.workers
        scratch = self._scratch(Memory.recorded(nbytes, recording))
        self._steps.run(recording.backend, stubs, scratch)
        return Program(
            recording,
            self._nbytes,
            workers,
            single_threaded=workers == 1,
            buffered=self._buffered,
        )

    def _scratch(self, memory: Memory) -> tuple[dict[str, Array], ...]:
        buffers, workers, _ = self.workspace
        return memory.own("own", 0, buffers, workers)


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
