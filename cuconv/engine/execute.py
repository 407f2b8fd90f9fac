"""Run the parts of a plan in one workspace."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from cuconv.arrays import Array, base_array, stub_array
from cuconv.backends import Backend
from cuconv.engine.problem import in_groups
from cuconv.engine.program import SHARED, Recording
from cuconv.engine.tile_search import Candidate
from cuconv.geometry import ConvGeometry
from cuconv.memory import Buffer, buffer_bytes, carve
from cuconv.strategies import Job


class Memory:
    """The workspace of a run: one allocation, or its stub while steps are recorded."""

    def __init__(self, raw: Array, recording: Recording | None = None) -> None:
        self.raw = raw
        self._recording = recording

    @classmethod
    def recorded(cls, nbytes: int, recording: Recording) -> "Memory":
        """A stub of a workspace of this size."""
        raw = stub_array((nbytes,), np.dtype(np.uint8), name=SHARED)
        return cls(raw, recording)

    def shared(self, start: int, buffers: Sequence[Buffer]) -> dict[str, Array]:
        """The buffers that all workers share."""
        return carve(self.raw, start, buffers)

    def own(
        self, name: str, start: int, buffers: Sequence[Buffer], workers: int
    ) -> tuple[dict[str, Array], ...]:
        """The buffers of each worker."""
        each = buffer_bytes(buffers)
        if self._recording is None:
            starts = (
                range(start, start + workers * each, each) if each else [0] * workers
            )
            return tuple(carve(self.raw, place, buffers) for place in starts)
        raw = self._recording.region(name, start, each, workers)
        return (carve(raw, 0, buffers),) * workers


class Run(NamedTuple):
    """One run of a plan's steps: on arrays, or on stubs that record it.

    ``arrays`` are those of the call and the buffers of a rewrite, by their names;
    ``candidates`` are those of all parts of the plan, of which this run uses those from
    ``first`` on.
    """

    backend: Backend
    arrays: dict[str, Array]
    candidates: Sequence[Candidate]
    memory: Memory
    start: int
    first: int = 0

    @property
    def operands(self) -> tuple[Array, Array | None, Array | None, Array]:
        """The operands of the call, in order: the second may be prepared weights."""
        arrays = self.arrays
        first = arrays["dy"] if "dy" in arrays else arrays["x"]
        second = arrays.get("w")
        if second is None and "dy" in arrays:
            second = arrays.get("x")
        return first, second, arrays.get("bias"), arrays["out"]

    def inside(
        self, first: int, arrays: dict[str, Array], buffers: Sequence[Buffer]
    ) -> "Run":
        """Run a lowering of which others are made: its parts begin at ``first``."""
        own = {**arrays, **self.memory.shared(self.start, buffers)}
        start = self.start + buffer_bytes(buffers)
        return self._replace(arrays=own, start=start, first=self.first + first)

    def convolve(
        self,
        number: int,
        first: Array,
        second: Array | None,
        bias: Array | None,
        out: Array,
    ) -> None:
        """Run a part, in the workspace after the rewrite's buffers."""
        number += self.first
        candidate = self.candidates[number]
        problem, strategy = candidate.problem, candidate.strategy
        if problem.geometry.is_empty:
            fill(self.backend, out, bias, problem.geometry)
            return
        prepared = self.arrays.get(f"weights{number}")
        job, kept = job_of(
            candidate, self.backend, self.memory, self.start, number, prepared is None
        )
        if problem.op == "weight_grad":
            _weight_grad(candidate, job, first, second, out)
            return
        weights = strategy.weights(job, second, kept) if prepared is None else prepared
        run = strategy.forward if problem.op == "forward" else strategy.input_grad
        run(job, first, weights, bias, out)


def _weight_grad(
    candidate: Candidate, job: Job, dy: Array, x: Array, out: Array
) -> None:
    if not candidate.problem.transposed:
        candidate.strategy.weight_grad(job, dy, x, out)
        return
    # With dy and x exchanged, the strategy sums the conjugate of the caller's Σ dy ·
    # x̄.
    candidate.strategy.weight_grad(job, x, dy, out)
    if candidate.problem.operand.kind == "c":
        job.backend.do(job.backend.xp.conjugate, out, out)


def job_of(
    candidate: Candidate,
    backend: Backend,
    memory: Memory,
    start: int,
    number: int,
    with_weights: bool,  # noqa: FBT001
) -> tuple[Job, dict[str, Array]]:
    """A job with its buffers, and those for its weights."""
    workspace, workers = candidate.workspace, candidate.tiling.workers
    kept = workspace.weights if with_weights else ()
    space = memory.shared(start, kept)
    start += buffer_bytes(kept)
    shared = memory.shared(start, workspace.shared)
    start += buffer_bytes(workspace.shared)
    own = memory.own(f"own{number}", start, workspace.per_worker, workers)
    job = Job(
        candidate.problem, candidate.tiling, backend, shared, own, candidate.blocks
    )
    return job, space


def fill(
    backend: Backend, out: Array, bias: Array | None, geometry: ConvGeometry
) -> None:
    """Write the empty sum: zero, or the bias."""
    out = base_array(out)
    backend.fill(out, 0)
    if bias is not None and out.size:
        ones = (1,) * geometry.rank
        offset = bias.reshape(1, geometry.groups, -1, *ones)
        backend.copy(offset, in_groups(out, geometry))
