"""Plans: the chosen steps, the reasons, and running them."""

from collections.abc import Iterable, Sequence
from dataclasses import replace
from functools import cached_property
from itertools import zip_longest
from typing import Any

import numpy as np

from cuconv.arrays import (
    Array,
    base_array,
    check_out,
    check_overlap,
    is_array,
    layouts_of,
    module_of,
    stub_of,
)
from cuconv.backends import backend_of, backend_on, refuse_capture
from cuconv.engine.execute import Memory, job_of
from cuconv.engine.lower import lower
from cuconv.engine.lowering import Lowering
from cuconv.engine.planner import PlanningResult
from cuconv.engine.problem import NAMES, ROLES, Problem, check_shape, shapes_of
from cuconv.engine.recorded import NEEDS_OUT, LoweredCall
from cuconv.engine.request import ZERO_POINTS, Request
from cuconv.geometry import Axis, ConvGeometry
from cuconv.memory import allocated

# The most layouts of arrays for which a plan keeps another; few if each has weights.
_MOST_LAYOUTS = 64
_MOST_PREPARED = 4


class Plan(LoweredCall):
    """The plan of one convolution, or of a gradient of one; print it to read it.

    Made by `cuconv.plan_conv`.  A plan is fixed: shapes, types, strategy, blocks and
    memory.  Calling it with arrays runs it.  `pickle` and `copy` take what it was made
    from, with its weights if they are built in: it is planned again where it is loaded.

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

    # Weights as they were given, where they are built in.
    _w: Array | None = None

    def __init__(self, request: Request, lowering: Lowering | None = None) -> None:
        types = request.types
        arrays = {name: stub_of(name, a) for name, a in request.arrays.items()}
        out = None if request.out is None else stub_of("out", request.out)
        request = request._replace(arrays=arrays, out=out)
        self.request, self.call = request, request.call
        lowering = lower(request) if lowering is None else lowering
        self.flops = 0 if request.geometry.is_empty else lowering.flops
        self.captured = request.backend.is_capturing()
        self.result_shape, self.dtype = request.result_shape, types.result
        self.names = (*ROLES[self.call], *ZERO_POINTS)
        # Operands that are numbers, not arrays.
        self._numbers = {n: a for n, a in arrays.items() if not is_array(a)}
        super().__init__(lowering, request.backend, request.options)

    @cached_property
    def problem(self) -> Problem:
        """The convolution as it was asked for, as strategies would see it."""
        return replace(self.request.problem(), captured=self.captured)

    @property
    def _first(self) -> PlanningResult:
        return self.lowering.parts[0]

    @property
    def memory_limit(self) -> int:
        """The limit that applies: the one that was given, or the library's default."""
        return self.lowering.memory_limit

    @property
    def nanoseconds(self) -> float:
        """The estimated time of a run."""
        return self.lowering.nanoseconds

    @property
    def strategy(self) -> str:
        """The name of the strategy that runs."""
        return self.candidates[0].strategy.name

    @property
    def chunks(self) -> int:
        """The number of blocks that the work is split into."""
        return self.lowering.chunks

    @property
    def workspace_bytes(self) -> int:
        """Everything that a run allocates beyond inputs and result."""
        return self.lowering.workspace_bytes if self.flops else 0

    @property
    def passed_over(self) -> dict[str, str]:
        """Every other strategy, with the reason why it does not run."""
        return {**self.lowering.instead_of, **dict(self._first.passed_over)}

    @property
    def bytes_moved(self) -> int:
        """The least number of bytes to read and write: both operands and the result."""
        g = self.request.geometry
        sizes = {"x": g.images * g.channels * g.cells, "w": g.filters * g.patch}
        sizes["y"] = g.results * g.filters * g.positions
        result = {"forward": "y", "input_grad": "x", "weight_grad": "w"}[
            self.problem.op
        ]
        own = sizes.pop(result) * self.dtype.itemsize
        return own + sum(sizes.values()) * self.problem.source.itemsize

    @property
    def arithmetic_intensity(self) -> float:
        """Operations for each byte that must be moved."""
        return self.flops / max(self.bytes_moved, 1)

    @property
    def is_prepared(self) -> bool:
        """True if weights are built in."""
        return bool(self.weights)

    @property
    def is_capturable(self) -> bool:
        """True if a run launches kernels alone and allocates nothing."""
        return self.lowering.is_capturable and all(
            c.strategy.capturable and not self._memory_of(c) for c in self.candidates
        )

    def __call__(self, *arrays: Array | None, out: Array | None = None) -> Array:
        """Run it.

        Parameters
        ----------
        *arrays
            ``(x, w, bias)``, ``(dy, w)`` or ``(dy, x)``, in the shapes and the type of
            the plan.  After `prepare`, the weights are left out.  Arrays with other
            strides than those of the plan get a plan of their own, with the same
            options.
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
            plan that cannot be captured.
        """
        layouts = layouts_of((*arrays, out))
        if layouts is None:
            arrays = tuple(map(base_array, arrays))
        # What runs outside a CUDA graph may not run while one is captured.
        key = layouts, self.backend.is_capturing()
        if layouts is not None and key in self.others:
            # None is this plan: it keeps no reference to itself.
            plan = self.others[key] or self
            if out is not None:
                check_overlap(self.backend.xp, out, self._named(arrays))
            return plan.run(arrays, out)
        plan = self._checked(arrays, out)
        if layouts is not None and not plan.captured:
            most = _MOST_PREPARED if self.is_prepared else _MOST_LAYOUTS
            if len(self.others) >= most:
                self.others.clear()
            self.others[key] = None if plan is self else plan
        return plan.run(arrays, out)

    def _named(self, arrays: Sequence[Array | None]) -> dict[str, Array]:
        return dict(zip(self.names, arrays, strict=False))

    def _checked(self, arrays: tuple[Array | None, ...], out: Array | None) -> "Plan":
        """Check the arrays of a call; the plan for them, if they lie otherwise."""
        names = [n for n in ROLES[self.call] if n != "w" or not self.is_prepared]
        given = {n: a for n, a in zip(names, arrays, strict=False) if a is not None}
        self._check(names, arrays, given, out)
        captured = self.backend.is_capturing()
        self.check_result(out, given, captured=captured)
        misplaced = self._misplaced(given, out)
        needs_another = misplaced or (captured and not self.is_capturable)
        if not self.is_prepared:
            if needs_another or not self._is_tuned:
                return Plan(self.request._replace(arrays=given, out=out))
            return self
        if needs_another:
            named = {**given, "out": out}
            places = ", ".join(f"{n} has strides {named[n].strides}" for n in misplaced)
            what = f"the plan, prepared for {self.strategy}, cannot be part of it"
            if places:
                what = f"a prepared plan takes aligned C-contiguous arrays; {places}"
            refuse_capture(self.backend, what, captured=captured)
            own = {**self.request.arrays, **given}
            other = Plan(self.request._replace(arrays=own, out=out))
            return other._with_weights(self._w)
        return self

    def check_result(
        self, out: Array | None, arrays: dict[str, Array], *, captured: bool
    ) -> None:
        """Raise if ``out`` cannot take the result, or is None in a capture."""
        if out is None:
            refuse_capture(self.backend, NEEDS_OUT, captured=captured)
            return
        check_out(out, self.result_shape, self.dtype)
        check_overlap(self.backend.xp, out, arrays)

    def _misplaced(self, given: dict[str, Array], out: Array | None) -> list[str]:
        """The names of the arrays that have another layout than the plan's."""
        stubs = {**self.request.arrays, "out": self.request.result}
        arrays = given if out is None else {**given, "out": base_array(out)}
        return sorted(
            name
            for name, array in arrays.items()
            if stub_of(name, array).layout != stubs[name].layout
        )

    def prepare(self, w: Array) -> "Plan":
        """The same plan with these weights built in, transformed or packed once.

        Parameters
        ----------
        w
            The weights, in the shape and the type of the plan.  They are copied: later
            changes of ``w`` have no effect.

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
        if "w" not in ROLES[self.call]:
            raise ValueError("the gradient of the weights has no weights to prepare")
        self._check(["w"], (w,), {"w": w})
        refuse_capture(self.backend, "prepare the weights before it")
        # A strategy may read the weights in place: copy them first.
        with self.backend.device_of(w):
            own = self.backend.xp.array(
                base_array(w), dtype=self.problem.operand, order="C", copy=True
            )
            return self._with_weights(own)

    def _with_weights(self, w: Array) -> "Plan":
        """The same plan with weights that nobody else writes, of the operands' type."""
        plan = self.with_candidates(self.candidates)
        plan._w = w  # noqa: SLF001 - a copy of itself
        plan.names = tuple(name for name in self.names if name != "w")
        # Prepared weights are what one candidate takes, and no other.
        plan._is_tuned = True  # noqa: SLF001 - a copy of itself
        each = enumerate(self.lowering.weights_of(w))
        prepared = {f"weights{n}": self._prepared(n, own) for n, own in each}
        plan.weights = prepared
        return plan

    def _prepared(self, number: int, w: Array) -> Array:
        candidate, backend = self.candidates[number], self.backend
        if not self.flops:
            return w
        kept = allocated(backend.xp, candidate.workspace.weights)
        with backend.memory(self.nbytes) as raw:
            job, _ = job_of(
                candidate, backend, Memory(raw), 0, number, with_weights=False
            )
            return candidate.strategy.weights(job, w, kept)

    def __reduce__(self) -> tuple[Any, ...]:
        *given, backend = self.request
        w = self._w
        if w is not None and not isinstance(w, np.ndarray):
            w = w.get()
        return _planned_again, (given, backend.device, w)

    def run(self, arrays: Sequence[Array | None], out: Array | None) -> Array:
        """Run it on checked arrays."""
        backend = self.backend
        if out is None:
            result = target = backend.empty(self.result_shape, self.dtype)
        else:
            result, target = out, base_array(out)
        if self._numbers:
            pairs = zip_longest(self.names, arrays)
            arrays = [self._numbers.get(name, array) for name, array in pairs]
        if self.program is not None:
            backend.execute(self.program, (target, *self.weights.values(), *arrays))
        else:
            # In the same order: steps are recorded for it.
            named = {"out": target, **self.weights}
            self.execute_first(named | dict(zip(self.names, arrays, strict=False)))
        return result

    def _check(
        self,
        names: list[str],
        arrays: tuple[Array | None, ...],
        given: dict[str, Array],
        out: Array | None = None,
    ) -> None:
        """Raise if this plan is not for these arrays."""
        has_bias = self.problem.has_bias
        needed = [name for name in names if name != "bias"]
        if has_bias and "bias" in names:
            needed.append("bias")
        listed = ", ".join(needed)
        if len(arrays) > len(names) or any(name not in given for name in needed):
            raise TypeError(f"the plan takes {listed}; got {len(arrays)} arrays")
        if "bias" in given and not has_bias:
            why = "was made without a bias; plan_conv(bias=True)"
            if self.is_prepared:
                why = f"takes {listed} alone: its weights are prepared, and it {why}"
            raise ValueError(f"the plan {why}")
        xp, mine = self.backend.xp, self.backend.device
        if module_of(given if out is None else {**given, "out": out}) is not xp:
            raise TypeError(f"the plan is for {xp.__name__} arrays")
        place = backend_of(xp, next(iter(given.values()))).device
        if place != mine:
            raise ValueError(f"the arrays are on {place} and the plan is for {mine}")
        shapes = shapes_of(self.call, self.request.geometry)
        planned = self.options.dtype and np.dtype(self.options.dtype)
        for name, array in given.items():
            check_shape(name, array, shapes[name])
            if planned is not None and array.dtype != planned:
                raise TypeError(
                    f"{name} has type {array.dtype} and the plan is for {planned}"
                )

    def __str__(self) -> str:
        return "\n".join(f"{name:<14}{text}" for name, text in self.rows())

    def __repr__(self) -> str:
        x_shape, y_shape = self._outer_shapes
        return (
            f"<Plan of {NAMES[self.problem.call]}: x {x_shape}, w "
            f"{self.request.geometry.w_shape}, y {y_shape}, {self.strategy}, "
            f"{self.workspace_bytes:,} bytes of workspace>"
        )

    def _repr_html_(self) -> str:
        """The lines of `print` as a table, for notebooks."""
        rows = (
            f"<tr><th>{name}</th><td>{text.replace('<', '&lt;')}</td></tr>"
            for name, text in self.rows()
        )
        return f"<table>{''.join(rows)}</table>"

    def rows(self) -> Iterable[tuple[str, str]]:
        """The lines of `print`: a heading and its text."""
        p, g, candidate = self.problem, self.request.geometry, self.candidates[0]
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
        if self.options.flip_kernel:
            yield "kernel", "flipped"
        if composition := self.lowering.composition:
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

    def as_dict(self) -> dict[str, Any]:
        """The content of `print`, as numbers and strings for JSON.

        Returns
        -------
        dict
            ``op``, ``x_shape``, ``w_shape`` and ``y_shape``; ``stride``, ``padding``
            (pairs), ``dilation`` and ``input_dilation`` axis by axis,
            ``padding_mode``, ``groups``, ``batch_groups``, ``flip_kernel``, ``layout``
            and whether there is a ``bias``; ``dtype`` (of the result), ``device``,
            ``precision`` and ``deterministic``; ``strategy``, with its variant
            ``strategy_label``, and the ``parts`` that run it; the number of ``chunks``
            and of ``workers``;
            ``workspace_bytes``, ``memory_limit`` and ``bytes_moved`` in bytes,
            ``flops`` in operations, ``arithmetic_intensity`` in operations for each
            byte; ``estimate_nanoseconds``, which is estimated and not measured; and
            ``passed_over``, the reasons by the names of the other strategies.

        Examples
        --------
        >>> import cuconv
        >>> plan = cuconv.plan_conv((1, 1, 5), (1, 1, 3), padding=(1,))
        >>> said = plan.as_dict()
        >>> said["op"], said["y_shape"], said["padding"], said["strategy"]
        ('forward', (1, 1, 5), ((1, 1),), 'im2col')
        """
        p, g, candidate = self.problem, self.request.geometry, self.candidates[0]
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
            "flip_kernel": self.options.flip_kernel,
            "layout": "channels_first" if g.channels_first else "channels_last",
            "bias": p.has_bias,
            "dtype": p.types.result.name,
            "device": self.backend.device,
            "precision": p.precision,
            "deterministic": p.deterministic,
            "strategy": self.strategy,
            "strategy_label": candidate.label,
            "parts": self.lowering.composition,
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
        """The shapes of the caller's x and y."""
        g = self.request.geometry
        both = g.x_shape, g.y_shape
        return both[::-1] if self.problem.transposed else both


def _planned_again(given: Sequence[Any], device: str, w: Array | None) -> Plan:
    """The plan of a request; ``w``, weights to build in, are on the host."""
    backend = backend_on(device)
    plan = Plan(Request._make((*given, backend)))
    if w is None:
        return plan
    with backend.device_of(backend.empty((), w.dtype)):
        return plan._with_weights(backend.xp.asarray(w))  # noqa: SLF001


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
    return f"{size} elements, {axis.kernel} taps, {steps}, {pads}, {out} out"
