"""What plans that are made of others share."""

import copy
from abc import abstractmethod
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple, TypeAlias, TypeVar

from cuconv.arrays import Array, Types, base_array, resolve_types
from cuconv.backends import Backend
from cuconv.config import config
from cuconv.engine.plan import Call, Plan, Planner, bind_with, problem_of, stub_array
from cuconv.geometry import ConvGeometry
from cuconv.memory import MemoryLimit, all_within
from cuconv.options import Options

Arrays: TypeAlias = dict[str, Array]
Index: TypeAlias = tuple[Any, ...]
Key = TypeVar("Key")


class ZeroPoints(NamedTuple):
    """What is taken from every cell and every weight before they are multiplied.

    Numbers, or arrays of one cell; for weights also one for each filter.
    """

    x: Any = None
    w: Any = None

    @property
    def are_given(self) -> bool:
        return self.x is not None or self.w is not None


NO_ZEROS = ZeroPoints()


class Request(NamedTuple):
    """A call that is to be planned: the arguments of `cuconv.engine.plan.Planner`."""

    call: str
    geometry: ConvGeometry
    arrays: Arrays
    out: Array | None
    options: Options
    backend: Backend
    zeros: ZeroPoints = NO_ZEROS

    @property
    def basic(self) -> tuple[Any, ...]:
        """The arguments of `plain_plan`."""
        return self[:6]

    @property
    def types(self) -> Types:
        return resolve_types(self.arrays, self.options.dtype)

    @property
    def is_input_grad(self) -> bool:
        """Whether the result is x, or lies where x would: transposed convolution."""
        return self.call in ("input_grad", "transpose")

    @property
    def is_weight_grad(self) -> bool:
        return self.call.endswith("weight_grad")

    @property
    def result(self) -> Array:
        """The array for the result, or one that lies like it."""
        if self.out is not None:
            return base_array(self.out)
        geometry = self.geometry
        shape = geometry.x_shape if self.is_input_grad else geometry.y_shape
        return stub_array(
            geometry.w_shape if self.is_weight_grad else shape, self.types.result
        )


class Composed(Plan):
    """A plan made of others, of which the first says what strategy runs.

    A part is planned for arrays that lie in a certain way: those of the plan itself
    must be C-contiguous, or the call is planned anew.
    """

    def __init__(
        self, request: Request, planner: Planner, parts: Iterable[Plan]
    ) -> None:
        self._parts, self._planner = tuple(parts), planner
        problem, decision = problem_of(*request.basic), self._parts[0].decision
        super().__init__(problem, decision, request.backend, request.options)

    @property
    def overhead_bytes(self) -> int:
        return max(part.overhead_bytes for part in self._parts)

    @property
    def is_single_threaded(self) -> bool:
        return all(part.is_single_threaded for part in self._parts)

    @property
    def workers(self) -> int:
        return max(part.workers for part in self._parts)

    def run(self, arrays: tuple[Array | None, ...], out: Array | None) -> Array:
        first, second, *bias = arrays
        with self._backend.device_of(first):
            result = self.empty(arrays) if out is None else out
            offset = bias[0] if bias else None
            self._carry_out(
                base_array(first), base_array(second), offset, base_array(result)
            )
        return result

    def with_weights(self, w: Array) -> Plan:
        other = copy.copy(self)
        other._weights = w  # noqa: SLF001 - a copy of itself
        other._prepare(w)  # noqa: SLF001
        return other

    @abstractmethod
    def _prepare(self, w: Array) -> None:
        """Build weights into every part."""

    def tune(self, arrays: tuple[Array | None, ...], out: Array) -> None:
        """Nothing: every part times its own candidates when it first runs."""
        del arrays, out

    @abstractmethod
    def _carry_out(
        self, first: Array, second: Array, bias: Array | None, result: Array
    ) -> None:
        """Run every part."""

    def _anew(self, given: Arrays, out: Array | None) -> Call:
        problem = self.problem
        call = problem.call, problem.geometry, given, out, self.options
        return bind_with(self._planner, *call)

    def _misplaced(self, given: Arrays, out: Array | None) -> list[str]:
        arrays = given if out is None else {**given, "out": out}
        return sorted(n for n, a in arrays.items() if not a.flags.c_contiguous)


def held(plans: Iterable[Plan]) -> int:
    """Bytes that plans take beyond inputs and results, run after each other.

    The largest arena stays for the next plan, whose threads may have more overhead.
    """
    each = [(plan.workspace_bytes, plan.overhead_bytes) for plan in plans]
    arenas = (total - overhead for total, overhead in each)
    return max(arenas, default=0) + max((overhead for _, overhead in each), default=0)


def within(
    calls: Mapping[Key, Callable[[], Plan]], limit: MemoryLimit
) -> dict[Key, Plan]:
    """Plans that each fit a limit, so that they do so after each other too.

    Of one thread each they have the same overhead, and the largest alone counts.
    """
    found = all_within(calls)
    if not isinstance(limit, int) or held(found.values()) <= limit:
        return found
    with config(num_threads=1):
        return all_within(calls)


def run_part(
    plan: Plan, first: Array, second: Array, bias: Array | None, out: Array
) -> None:
    """Run a plan that is part of another, or its prepared form, into ``out``."""
    offset = () if bias is None else (bias,)
    Call(plan, (first, plan.takes(second), *offset), out).run()
