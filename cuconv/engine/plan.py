"""From arrays and options to a `Plan`: what will run, why, and running it."""

from collections.abc import Iterable
from dataclasses import replace
from typing import Any, NamedTuple, Protocol

import numpy as np

from cuconv.arrays import (
    Array,
    DType,
    base_array,
    check_out,
    check_overlap,
    is_aligned,
    is_matrix_ready,
    module_of,
    resolve_types,
)
from cuconv.backends import Backend, backend_of, refuse_capture
from cuconv.engine.autotune import Winner, fastest, recall, remember
from cuconv.engine.planner import PlanningResult, decide
from cuconv.engine.tile_search import NAMES, Candidate
from cuconv.geometry import Axis, ConvGeometry
from cuconv.memory import (
    aligned_start,
    allocated,
    carve,
    workspace_bytes,
)
from cuconv.options import Options
from cuconv.profiling import stage
from cuconv.strategies import Job, Problem
from cuconv.strategies.base import TRANSPOSED, Buffers, in_groups

# The largest workspace that a plan keeps for itself.  NumPy's own buffers for arrays
# that fit into it are less than what `Leaves.overhead` counts, whatever their setting.
_PLAIN_BYTES = 2**16

# Why a call without `out` is refused while a CUDA graph is captured.
NEEDS_OUT = (
    "memory that is taken now could go to others between its launches: give the "
    "array for the result as out="
)

# The arrays of each operation, in the order in which they are given, and what each is
# to the convolution that the strategies run.
ROLES = {
    "forward": {"x": "x", "w": "w", "bias": "bias"},
    "input_grad": {"dy": "dy", "w": "w"},
    "weight_grad": {"dy": "dy", "x": "x"},
    "transpose": {"x": "dy", "w": "w", "bias": "bias"},
    "transpose_input_grad": {"dy": "x", "w": "w"},
    "transpose_weight_grad": {"dy": "x", "x": "dy"},
}
# Of each transposed operation, the one of the convolution that leads back.
CONVOLUTION = {call: op for op, call in TRANSPOSED.items()}


class Plan:
    """What one convolution, or a gradient of one, will do; print it to read it.

    Made by `cuconv.plan_conv`.  A plan is fixed: shapes, types, strategy, blocks and
    memory.  Calling it with arrays runs it.

    Examples
    --------
    >>> import numpy as np
    >>> import cuconv
    >>> plan = cuconv.plan_conv((1, 1, 5), (1, 1, 3), dtype="float64")
    >>> plan.strategy, plan.result_shape, plan.flops
    ('im2col', (1, 1, 3), 18)
    >>> plan(np.arange(5.0).reshape(1, 1, 5), np.ones((1, 1, 3)))
    array([[[3., 6., 9.]]])
    """

    def __init__(
        self,
        problem: Problem,
        decision: PlanningResult,
        backend: Backend,
        options: Options,
    ) -> None:
        self.problem = problem
        self.options = options
        self._decision = decision
        self._candidate = decision.best
        self._xp = backend.xp
        self._backend = backend
        self._weights: Array | None = None
        self.threads = self._backend.workers()
        self._is_plain = _is_plain(self._candidate, self._backend)
        self._shape, self._dtype = self.result_shape, problem.types.result
        self._spare: list[Job] = []
        self._accepted: tuple[object, ...] | None = None

    @property
    def decision(self) -> PlanningResult:
        """The candidates, and what was passed over."""
        return self._decision

    @property
    def candidate(self) -> Candidate:
        """The candidate that runs."""
        return self._candidate

    @property
    def memory_limit(self) -> int:
        """The limit that holds: the one that was given, or what the library chose."""
        return self._decision.limit

    @property
    def nanoseconds(self) -> float:
        """How long a run is estimated to take."""
        return self._candidate.nanoseconds

    @property
    def is_single_threaded(self) -> bool:
        """Whether it is so small that no second thread takes part."""
        return self.problem.single_threaded

    @property
    def strategy(self) -> str:
        """The name of the strategy that runs."""
        return self._candidate.strategy.name

    @property
    def workers(self) -> int:
        """How many threads work on it."""
        return self._candidate.tiling.workers

    @property
    def chunks(self) -> int:
        """How many blocks the work is cut into."""
        return self._candidate.problem.geometry.count_blocks(
            self._candidate.tiling.tile
        )

    @property
    def workspace_bytes(self) -> int:
        """Everything that a run allocates beyond inputs and result."""
        return self._candidate.workspace_bytes if self.flops else 0

    @property
    def overhead_bytes(self) -> int:
        """What of the workspace is no buffer, but what threads take beside theirs."""
        if not self.flops:
            return 0
        itemsize = self.problem.types.accumulate.itemsize
        return self._backend.overhead(self.workers, itemsize)

    @property
    def passed_over(self) -> dict[str, str]:
        """Every other strategy, and why it does not run."""
        return dict(self._decision.passed_over)

    @property
    def flops(self) -> int:
        """Operations of the plain sum of products; a multiply-add counts as two."""
        g = self.problem.geometry
        return 0 if g.is_empty else 2 * g.multiplications

    @property
    def bytes_moved(self) -> int:
        """The least that must be read and written: both operands and the result."""
        g = self.problem.geometry
        sizes = {"x": g.images * g.channels * g.cells, "w": g.filters * g.patch}
        sizes["y"] = g.results * g.filters * g.positions
        result = {"forward": "y", "input_grad": "x", "weight_grad": "w"}[
            self.problem.op
        ]
        own = sizes.pop(result) * self.problem.types.result.itemsize
        return own + sum(sizes.values()) * self.problem.source.itemsize

    @property
    def arithmetic_intensity(self) -> float:
        """Operations for each byte that must be moved."""
        return self.flops / max(self.bytes_moved, 1)

    @property
    def result_shape(self) -> tuple[int, ...]:
        g = self.problem.geometry
        return {
            "forward": g.y_shape,
            "input_grad": g.x_shape,
            "weight_grad": g.w_shape,
        }[self.problem.op]

    def __call__(self, *arrays: Array | None, out: Array | None = None) -> Array:
        """Run it.

        Parameters
        ----------
        *arrays
            ``(x, w, bias)``, ``(dy, w)`` or ``(dy, x)``, in the shapes and the type of
            the plan.  After `prepare`, the weights are left out.  Arrays that lie in
            memory otherwise than the plan assumed get a plan of their own, with the
            same options.
        out
            Array of ``result_shape`` to write the result to.

        Returns
        -------
        array
            Of ``result_shape``.

        Raises
        ------
        ValueError, TypeError
            If shapes, types, device or the number of arrays are not those of the
            plan; while a CUDA graph is captured, without ``out``, and for a prepared
            plan that a graph cannot hold.
        """
        key = signature((*arrays, out))
        if key is not None and key == self._accepted and out is None:
            return self.run(self._with_weights(arrays), None)
        arrays = tuple(map(base_array, arrays))
        names = list(ROLES[self.problem.call])
        if self._weights is not None:
            names.remove("w")
        given = {
            name: array
            for name, array in zip(names, arrays, strict=False)
            if array is not None
        }
        self._check(names, arrays, given, out)
        captured = self._backend.is_capturing()
        self.check_result(out, given, captured=captured)
        if not self._fits(given, out, captured=captured):
            return self._anew(given, out).run()
        self._accepted = key
        return self.run(self._with_weights(arrays), out)

    def _anew(self, given: dict[str, Array], out: Array | None) -> "Call":
        """The call with a plan of its own, for arrays that lie otherwise."""
        call = self.problem.call, self.problem.geometry, given, out, self.options
        return bind_with(plain_plan, *call)

    def _fits(
        self, given: dict[str, Array], out: Array | None, *, captured: bool
    ) -> bool:
        """Whether the call can follow this plan; a prepared one must, or it raises."""
        misplaced = self._misplaced(given, out)
        if self._weights is None:
            anew = misplaced or self.options.strategy == "benchmark"
            return not (anew or (captured and not self.is_capturable))
        if misplaced:
            named = {**given, "out": out}
            words = (f"{name} has strides {named[name].strides}" for name in misplaced)
            raise ValueError(
                f"a prepared plan takes C-contiguous arrays; {', '.join(words)}"
            )
        if not self.is_capturable:
            what = f"this plan was prepared for {self.strategy}, which it cannot hold"
            refuse_capture(self._backend, what, captured=captured)
        return True

    @property
    def is_capturable(self) -> bool:
        """Whether a run launches kernels alone and allocates nothing."""
        workspace = self._candidate.workspace
        kept = workspace.weights if self._weights is None else ()
        buffers = (*kept, *workspace.shared, *workspace.per_worker)
        return self._candidate.strategy.capturable and not workspace_bytes(buffers)

    def _with_weights(
        self, arrays: tuple[Array | None, ...]
    ) -> tuple[Array | None, ...]:
        """The arrays with the prepared weights, if there are any, in their place."""
        return (
            arrays if self._weights is None else (arrays[0], self._weights, *arrays[1:])
        )

    def prepare(self, w: Array) -> "Plan":
        """The same plan with these weights built in, transformed or packed once.

        Parameters
        ----------
        w
            The weights, in the shape and the type of the plan.  They are copied: what
            happens to ``w`` later does not matter.

        Returns
        -------
        Plan
            Its calls leave ``w`` out: ``(x, bias)`` or ``(dy,)``.

        Raises
        ------
        ValueError, TypeError
            If ``w`` is not of the plan's shape, type or device, the plan takes no
            weights, or a CUDA graph is being captured.

        Examples
        --------
        >>> import numpy as np
        >>> import cuconv
        >>> w = np.ones((1, 1, 2), dtype=np.float32)
        >>> prepared = cuconv.plan_conv((1, 1, 4), w.shape).prepare(w)
        >>> prepared(np.ones((1, 1, 4), dtype=np.float32))
        array([[[2., 2., 2.]]], dtype=float32)
        """
        if "w" not in ROLES[self.problem.call]:
            raise ValueError("the gradient of the weights has no weights to prepare")
        self._check(["w"], (w,), {"w": w})
        refuse_capture(self._backend, "weights are prepared before that")
        # Weights that lie ready would be read where they lie: a copy lies ready too.
        with self._backend.device_of(w):
            own = self._xp.array(
                base_array(w), dtype=self.problem.operand, order="C", copy=True
            )
        return self.with_weights(own)

    def with_weights(self, w: Array) -> "Plan":
        """The same plan with weights that nobody else writes, of the operands' type."""
        prepared = Plan(self.problem, self._decision, self._backend, self.options)
        prepared._candidate, prepared._is_plain = self._candidate, self._is_plain
        prepared._weights = prepared._prepared(w)
        return prepared

    @property
    def is_prepared(self) -> bool:
        """Whether weights are built in."""
        return self._weights is not None

    def takes(self, w: Array) -> Array:
        """What `run` wants for these weights: those that were prepared, if any were."""
        return w if self._weights is None else self._weights

    def run(self, arrays: tuple[Array | None, ...], out: Array | None) -> Array:
        """Carry it out on arrays that have been checked."""
        first, second, *bias = arrays
        if self._is_plain:
            result = np.empty(self._shape, self._dtype) if out is None else out
            self._execute_plainly(first, second, base_array(result))
            return result
        types = self.problem.types
        with self._backend.device_of(first):
            result = out
            if result is None:
                result = self._xp.empty(self.result_shape, dtype=types.result)
            if not self.flops:
                fill(base_array(result), *bias, geometry=self.problem.geometry)
            else:
                offset = bias[0] if bias else None
                self._execute(
                    self._candidate, first, second, offset, base_array(result)
                )
        return result

    def tune(self, arrays: tuple[Array | None, ...], out: Array) -> None:
        """Time every candidate on these arrays, or recall which was the fastest."""
        machine = self._backend.machine()
        key = (self.problem.fingerprint, self._decision.limit, self.threads)
        candidates = self._decision.candidates
        winner = recall(machine, key, [_winner(candidate) for candidate in candidates])
        if winner is None and self.problem.captured:
            return  # timing would wait for work that is only being recorded
        if winner is None:
            calls = [
                lambda candidate=candidate: self._on(candidate).run(arrays, out)
                for candidate in candidates
            ]
            winner = _winner(candidates[fastest(self._backend, calls)])
            remember(machine, key, winner)
        self._candidate = next(c for c in candidates if _winner(c) == winner)
        self._is_plain = False

    def empty(self, arrays: tuple[Array | None, ...]) -> Array:
        """An array for the result, on the device of the arrays."""
        with self._backend.device_of(arrays[0]):
            result: Array = self._xp.empty(
                self.result_shape, dtype=self.problem.types.result
            )
            return result

    def _on(self, candidate: Candidate) -> "Plan":
        """The same plan with another choice."""
        other = Plan(self.problem, self._decision, self._backend, self.options)
        other._candidate = candidate
        other._is_plain = False
        return other

    def _execute(
        self,
        candidate: Candidate,
        first: Array,
        second: Array,
        bias: Array | None,
        out: Array,
    ) -> None:
        strategy, workspace, workers = (
            candidate.strategy,
            candidate.workspace,
            candidate.tiling.workers,
        )
        kept = workspace.weights if self._weights is None else ()
        with self._backend.memory(
            workspace_bytes(
                (*kept, *workspace.shared, *(workspace.per_worker * workers))
            )
        ) as raw:
            job, space = _job(candidate, self._backend, raw, kept)
            if self.problem.op == "weight_grad":
                self._execute_weight_grad(job, first, second, out)
                return
            weights = second
            if self._weights is None:
                weights = strategy.weights(job, second, space)
            if candidate.problem.op == "forward":
                strategy.forward(job, first, weights, bias, out)
            else:
                strategy.input_grad(job, first, weights, bias, out)

    def _execute_weight_grad(self, job: Job, dy: Array, x: Array, out: Array) -> None:
        strategy = self._candidate.strategy
        if not self.problem.transposed:
            strategy.weight_grad(job, dy, x, out)
            return
        # Σ dy · x̄ of the caller's is the conjugate of what the strategy sums, which
        # takes the one for the other.
        strategy.weight_grad(job, x, dy, out)
        if self.problem.operand.kind == "c":
            self._xp.conjugate(out, out=out)

    def _execute_plainly(self, x: Array, w: Array, out: Array) -> None:
        """Run a plain job in buffers of its own, which wait for the next call."""
        candidate = self._candidate
        try:
            job = self._spare.pop()
        except IndexError:  # the first call, or another thread is in the last job
            workspace = candidate.workspace
            total = workspace_bytes(
                (*workspace.weights, *workspace.shared, *workspace.per_worker)
            )
            raw = self._xp.empty(total, dtype=self._xp.uint8)
            made, kept = _job(candidate, self._backend, raw, workspace.weights)
            own = (Buffers(made.own[0], keeps_views=True),)
            job = made._replace(shared={**made.shared, **kept}, own=own, is_plain=True)
        weights = self._weights
        if weights is None:
            weights = candidate.strategy.weights(job, w, job.shared)
        candidate.strategy.forward(job, x, weights, None, out)
        self._spare.append(job)

    def _prepared(self, w: Array) -> Array:
        candidate = self._candidate
        if not self.flops:
            return w
        with self._backend.device_of(w):
            kept = allocated(self._xp, candidate.workspace.weights)
            total = (
                *candidate.workspace.shared,
                *(candidate.workspace.per_worker * candidate.tiling.workers),
            )
            with self._backend.memory(workspace_bytes(total)) as raw:
                job, _ = _job(candidate, self._backend, raw, ())
                return candidate.strategy.weights(job, w, kept)

    def _check(
        self,
        names: list[str],
        arrays: tuple[Array | None, ...],
        given: dict[str, Array],
        out: Array | None = None,
    ) -> None:
        """Refuse arrays that this plan was not made for."""
        needed = [name for name in names if name != "bias"]
        if self.problem.has_bias and "bias" in names:
            needed.append("bias")
        words = ", ".join(needed)
        if len(arrays) > len(names) or any(name not in given for name in needed):
            raise TypeError(f"the plan takes {words}; got {len(arrays)} arrays")
        if "bias" in given and not self.problem.has_bias:
            why = "was made without a bias; plan_conv(bias=True)"
            if self.is_prepared:
                why = f"takes {words} alone: its weights are prepared, and it {why}"
            raise ValueError(f"the plan {why}")
        if module_of(given if out is None else {**given, "out": out}) is not self._xp:
            raise TypeError(f"the plan is for {self._xp.__name__} arrays")
        place = backend_of(self._xp, next(iter(given.values()))).device
        mine = self._backend.device
        if place != mine:
            raise ValueError(f"the arrays lie on {place} and the plan is for {mine}")
        shapes = shapes_of(self.problem.call, self.problem.geometry)
        planned = self.options.dtype and np.dtype(self.options.dtype)
        for name, array in given.items():
            check_shape(name, array, shapes[name])
            if planned is not None and array.dtype != planned:
                raise TypeError(
                    f"{name} has type {array.dtype} and the plan is for {planned}"
                )

    def check_result(
        self, out: Array | None, arrays: dict[str, Array], *, captured: bool
    ) -> None:
        """Refuse an ``out`` that cannot take the result, or none in a capture."""
        if out is None:
            refuse_capture(self._backend, NEEDS_OUT, captured=captured)
            return
        check_out(out, self.result_shape, self.problem.types.result)
        check_overlap(self._xp, out, arrays)

    def _misplaced(self, given: dict[str, Array], out: Array | None) -> list[str]:
        """The arrays that do not lie in memory as the plan assumed, by their names."""
        p, roles = self.problem, ROLES[self.problem.call]
        in_roles = {roles[name]: array for name, array in given.items()}
        missing = p.zero_copy - _zero_copy(p, in_roles, out, self._backend)
        if self._weights is not None:
            missing -= {"w"}
        return sorted(n for n in (*roles, "out") if roles.get(n, n) in missing)

    def __str__(self) -> str:
        return "\n".join(f"{name:<14}{text}" for name, text in self.rows())

    def rows(self) -> Iterable[tuple[str, str]]:
        """What `print` shows, line by line: a word and its text."""
        p, g, candidate = self.problem, self.problem.geometry, self._candidate
        tile = candidate.tiling.tile
        cells = "×".join(map(str, (tile.images, *tile.cells)))
        last = "" if self.chunks == 1 else ", the last may be smaller"
        x_shape, y_shape = self._outer_shapes
        yield "plan", f"{NAMES[p.call]}, {p.types.result.name}, {p.module}"
        yield "x", f"{x_shape}, w {g.w_shape}, y {y_shape}"
        for index, axis in enumerate(g.axes):
            yield f"axis {index}", _axis_text(axis, transposed=p.transposed)
        yield "groups", _groups_text(g)
        if g.padding_mode != "zeros":
            yield "padding mode", g.padding_mode
        if composition := self._composition():
            yield "parts", composition
        yield "strategy", f"{candidate.label}, precision {p.precision}"
        yield "chunks", f"{self.chunks} of {cells} positions{last}"
        yield "workers", f"{self.workers}"
        yield (
            "workspace",
            f"{self.workspace_bytes:,} bytes, limit {self.memory_limit:,}",
        )
        yield "work", f"{self.flops / 1e9:.4g} GFLOP, {self.bytes_moved / 1e6:.4g} MB"
        yield "intensity", f"{self.arithmetic_intensity:.4g} FLOP per byte"
        yield "estimate", f"{self.nanoseconds / 1e6:.3g} ms"
        for name, reason in self.passed_over.items():
            yield "passed over", f"{name}: {reason}"

    def _composition(self) -> str:
        """The plans that it is made of, in words; empty if there is but one."""
        return ""

    def as_dict(self) -> dict[str, Any]:
        """What `print` shows, as numbers and words that JSON can hold.

        Returns
        -------
        dict
            ``op``, ``x_shape``, ``w_shape`` and ``y_shape``; ``stride``, ``padding``
            (pairs), ``dilation`` and ``input_dilation`` axis by axis,
            ``padding_mode``, ``groups``, ``batch_groups``, ``layout`` and whether
            there is a ``bias``; ``dtype`` (of the result), ``device``, ``precision``
            and ``deterministic``; ``strategy``, with what it leaves open
            ``strategy_label``, and the ``parts`` that run it; the number of ``chunks``
            and of ``workers``; ``workspace_bytes``, ``memory_limit`` and
            ``bytes_moved`` in bytes, ``flops`` in operations, ``arithmetic_intensity``
            in operations for each byte; ``estimate_nanoseconds``, what the rates say
            and no measurement; and ``passed_over``, the reasons by the names of the
            other strategies.

        Examples
        --------
        >>> import cuconv
        >>> plan = cuconv.plan_conv((1, 1, 5), (1, 1, 3), padding=(1,))
        >>> said = plan.as_dict()
        >>> said["op"], said["y_shape"], said["padding"], said["strategy"]
        ('forward', (1, 1, 5), ((1, 1),), 'im2col')
        """
        p, g, candidate = self.problem, self.problem.geometry, self._candidate
        x_shape, y_shape = self._outer_shapes
        return {
            "op": p.call,
            "x_shape": x_shape,
            "w_shape": g.w_shape,
            "y_shape": y_shape,
            "stride": tuple(axis.stride for axis in g.axes),
            "padding": tuple((axis.before, axis.after) for axis in g.axes),
            "dilation": tuple(axis.dilation for axis in g.axes),
            "input_dilation": tuple(axis.input_dilation for axis in g.axes),
            "padding_mode": g.padding_mode,
            "groups": g.groups,
            "batch_groups": g.batch_groups,
            "layout": "channels_first" if g.channels_first else "channels_last",
            "bias": p.has_bias,
            "dtype": p.types.result.name,
            "device": self._backend.device,
            "precision": p.precision,
            "deterministic": p.deterministic,
            "strategy": self.strategy,
            "strategy_label": candidate.label,
            "parts": self._composition(),
            "chunks": self.chunks,
            "workers": self.workers,
            "workspace_bytes": self.workspace_bytes,
            "memory_limit": self.memory_limit,
            "flops": self.flops,
            "bytes_moved": self.bytes_moved,
            "arithmetic_intensity": self.arithmetic_intensity,
            "estimate_nanoseconds": self.nanoseconds,
            "passed_over": self.passed_over,
        }

    @property
    def _outer_shapes(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """The shapes of x and y as the caller knows them."""
        g = self.problem.geometry
        both = g.x_shape, g.y_shape
        return both[::-1] if self.problem.transposed else both


def signature(arrays: tuple[Array | None, ...]) -> tuple[object, ...] | None:
    """How arrays lie in memory, None where one is not plain NumPy's."""
    words: list[object] = []
    for array in arrays:
        if array is None:
            words.append(None)
        elif type(array) is not np.ndarray:
            return None
        else:
            flags = array.flags
            words += (array.shape, array.strides, array.dtype)
            words += (flags.aligned, flags.writeable)
    return tuple(words)


class Call(NamedTuple):
    """One validated and planned call; nothing is allocated before `run`."""

    plan: Plan
    arrays: tuple[Array | None, ...]
    out: Array | None

    def run(self) -> Array:
        plan, out = self.plan, self.out
        # Prepared weights are what one candidate takes, and no other.
        is_open = plan.options.strategy == "benchmark" and not plan.is_prepared
        if not is_open or not plan.flops:
            return plan.run(self.arrays, out)
        if out is None:
            # One result for all candidates: they take no more memory than one of them.
            out = plan.empty(self.arrays)
        plan.tune(self.arrays, out)
        return plan.run(self.arrays, out)


class Planner(Protocol):
    """What makes a plan for arrays, of which it asks how they lie."""

    def __call__(
        self,
        call: str,
        geometry: ConvGeometry,
        arrays: dict[str, Array],
        out: Array | None,
        options: Options,
        backend: Backend,
    ) -> Plan: ...


def plain_plan(
    call: str,
    geometry: ConvGeometry,
    arrays: dict[str, Array],
    out: Array | None,
    options: Options,
    backend: Backend,
    *,
    flipped: bool = False,
) -> Plan:
    """The plan of a plain convolution; ``flipped`` as in `Problem`."""
    problem = problem_of(call, geometry, arrays, out, options, backend, flipped=flipped)
    name = "auto" if options.strategy == "benchmark" else options.strategy
    decision = decide(problem, backend, name, options.memory_limit, backend.workers())
    return Plan(problem, decision, backend, options)


def problem_of(
    call: str,
    geometry: ConvGeometry,
    arrays: dict[str, Array],
    out: Array | None,
    options: Options,
    backend: Backend,
    *,
    flipped: bool = False,
) -> Problem:
    """What a plan for these arrays depends on."""
    types = resolve_types(arrays, options.dtype)
    operand = backend.operand_type(types)
    op, roles = CONVOLUTION.get(call, call), ROLES[call]
    if flipped:
        source = next(name for name, role in roles.items() if role == "dy")
        op, roles = "forward", {**roles, source: "x"}
    in_roles = {roles[name]: array for name, array in arrays.items()}
    needs_cast = (role for role, array in in_roles.items() if array.dtype != operand)
    problem = Problem(
        op=op,
        geometry=geometry,
        types=types,
        operand=operand,
        source=in_roles["dy" if op == "input_grad" else "x"].dtype,
        zero_copy=frozenset(),
        needs_cast=frozenset(needs_cast),
        has_bias="bias" in arrays,
        deterministic=options.deterministic is not False,
        precision=options.precision or "standard",
        module=backend.xp.__name__,
        flipped=flipped,
        captured=backend.is_capturing(),
        transposed=call in CONVOLUTION,
    )
    return replace(problem, zero_copy=_zero_copy(problem, in_roles, out, backend))


def bind_with(
    planner: Planner,
    call: str,
    geometry: ConvGeometry,
    arrays: dict[str, Array],
    out: Array | None,
    options: Options,
) -> Call:
    """Check arrays and options, and plan."""
    xp = module_of(arrays if out is None else {**arrays, "out": out})
    options = options.settled()
    arrays = {name: base_array(array) for name, array in arrays.items()}
    with stage("plan"):
        backend = backend_of(xp, next(iter(arrays.values())))
        plan = planner(call, geometry, arrays, out, options, backend)
    plan.check_result(out, arrays, captured=plan.problem.captured)
    return Call(plan, tuple(arrays.values()), out)


def shapes_of(call: str, geometry: ConvGeometry) -> dict[str, tuple[int, ...]]:
    """The shapes of an operation's arrays by their names."""
    channels = geometry.channels if call in CONVOLUTION else geometry.filters
    own = {
        "x": geometry.x_shape,
        "w": geometry.w_shape,
        "dy": geometry.y_shape,
        "bias": (channels,),
    }
    return {name: own[role] for name, role in ROLES[call].items()}


def stub_array(shape: tuple[int, ...], dtype: DType) -> Array:
    """A C-contiguous array that is only asked for its shape, strides and type."""
    steps = [dtype.itemsize]
    for size in reversed(shape[1:]):
        steps.append(steps[-1] * max(size, 1))
    strides = tuple(reversed(steps[: len(shape)]))
    cell = np.empty(1, dtype)
    return np.lib.stride_tricks.as_strided(cell, shape, strides, writeable=False)


def _zero_copy(
    problem: Problem, in_roles: dict[str, Array], out: Array | None, backend: Backend
) -> frozenset[str]:
    """The arrays that can be multiplied, or written, where they lie.

    And ``run`` where the result is one run of memory.
    """
    geometry, ready = problem.geometry, set()
    for role, array in in_roles.items():
        if array.dtype != problem.operand or role == "bias":
            continue
        if role == "w":
            fits = array.flags.c_contiguous and is_aligned(array)
            fits = fits and not (problem.conjugates_weights or problem.flipped)
        else:
            cells = in_groups(array, geometry)
            fits = is_matrix_ready(cells, geometry.rank, backend.largest_step)
        if fits:
            ready.add(role)
    if _is_direct_out(problem, out, backend):
        ready.add("out")
    if out is None or out.flags.c_contiguous:
        ready.add("run")
    return frozenset(ready)


def _is_direct_out(problem: Problem, out: Array | None, backend: Backend) -> bool:
    """Whether products can be written to the result where it lies."""
    geometry, types = problem.geometry, problem.types
    if not backend.can_store(types, types.result):
        return False
    if out is None:
        return geometry.positions <= backend.largest_step
    if problem.op == "weight_grad":
        return bool(out.flags.c_contiguous) and is_aligned(out)
    cells = in_groups(base_array(out), geometry)
    return is_matrix_ready(cells, geometry.rank, backend.largest_step)


def check_shape(name: str, array: Array, shape: tuple[int, ...]) -> None:
    """Refuse an array of another shape."""
    if array.shape != shape:
        raise ValueError(f"{name} has shape {array.shape} and must have {shape}")


def _job(
    candidate: Candidate, backend: Backend, raw: Array, kept: tuple[Any, ...]
) -> tuple[Job, dict[str, Array]]:
    """Cut one allocation into the buffers of a job."""
    workspace, workers = candidate.workspace, candidate.tiling.workers
    parts, start = [], aligned_start(raw) if raw.size else 0
    for buffers in (kept, workspace.shared, *(workspace.per_worker,) * workers):
        parts.append(carve(raw, start, buffers))
        start += sum(buffer.nbytes for buffer in buffers)
    space, shared, *own = parts
    mine = tuple(own)
    return Job(
        candidate.problem, candidate.tiling, backend, shared, mine, candidate.blocks
    ), space


def fill(out: Array, bias: Array | None = None, *, geometry: ConvGeometry) -> None:
    """The sum over nothing: zero, or the bias."""
    out[...] = 0
    if bias is not None and out.size:
        ones = (1,) * geometry.rank
        in_groups(out, geometry)[...] = bias.reshape(1, geometry.groups, -1, *ones)


def _is_plain(candidate: Candidate, backend: Backend) -> bool:
    """Whether a run is one small block of a forward pass without a bias."""
    problem, tiling = candidate.problem, candidate.tiling
    return (
        backend.xp is np
        and problem.op == "forward"
        and problem.single_threaded
        and not problem.has_bias
        and not problem.geometry.is_empty
        and problem.geometry.count_blocks(tiling.tile) == 1
        and candidate.workspace_bytes <= _PLAIN_BYTES
    )


def _winner(candidate: Candidate) -> Winner:
    strategy, variant = candidate.strategy, candidate.tiling.variant
    return Winner(strategy.name, strategy.describe(variant), candidate.problem.flipped)


def _groups_text(geometry: ConvGeometry) -> str:
    if geometry.batch_groups == 1:
        return f"{geometry.groups}"
    return f"{geometry.batch_groups}, of images"


def _axis_text(axis: Axis, *, transposed: bool) -> str:
    pads = f"padding {axis.before} and {axis.after}"
    steps = f"stride {axis.stride}, dilation {axis.dilation}"
    if axis.input_dilation > 1:
        steps += f", input dilation {axis.input_dilation}"
    size, out = axis.size, axis.out
    if transposed:
        size, out = out, size
    return f"{size} cells, {axis.kernel} taps, {steps}, {pads}, {out} out"
