"""cuconv and PyTorch's cuDNN on the layers of networks, in every arithmetic."""

from collections.abc import Callable
from time import monotonic
from typing import Any, NamedTuple

from benchmarks import machine
from benchmarks.cases import Case
from benchmarks.gpu.scale import HALF_AND_WHOLE, Scale
from benchmarks.gpu.steps import Findings, StepError
from benchmarks.layers import Layer
from benchmarks.records import Record
from benchmarks.runner import Effort, Worker, measure_case, workers
from benchmarks.suites import OPERATIONS
from cuconv.strategies import strategies

# An answer that takes longer means that a kernel hangs.
PATIENCE = 60.0
WISHES = {"device": "cuda", "precision": "standard"}


class Job(NamedTuple):
    """Layers of a suite in one operation and one arithmetic."""

    suite: str
    operation: str
    arithmetic: str
    layers: tuple[Layer, ...]


def peers() -> tuple[str, ...]:
    """The library as it chooses, cuDNN, and each strategy of the library by name."""
    named = (f"cuconv@{name}" for name in strategies())
    return (
        *("cuconv", "cudnn", "cudnn@channels_last", "cuconv@channels_last"),
        *("cuconv@benchmark", *named, "cupy_im2col"),
    )


def jobs(scale: Scale) -> list[Job]:
    """What matters most comes first: forward before gradients, ResNet-50 first."""
    suites = (
        ("resnet50", scale.layers, scale.arithmetics),
        ("mobilenetv2", scale.depthwise, HALF_AND_WHOLE),
    )
    return [
        Job(suite, operation, arithmetic, layers)
        for operations in (OPERATIONS[:1], OPERATIONS[1:])
        for suite, layers, arithmetics in suites
        for arithmetic in arithmetics
        for operation in operations
    ]


class Comparison(NamedTuple):
    """How the jobs are run: who is asked, and who is told of the records."""

    scale: Scale
    where: dict[str, Any]
    keep: Callable[[Record], None]
    say: Callable[[str], None]

    def run(self, torch_python: str, limit: float) -> Findings:
        """Every job until the limit; the records are kept after each."""
        end, left = monotonic() + limit, 0
        found: dict[str, Record] = {}
        with workers(peers(), WISHES, torch_python, PATIENCE) as open_peers:
            for job in jobs(self.scale):
                record = found.setdefault(job.suite, self.record(job, open_peers))
                left += self.do(job, record, open_peers, end)
                self.keep(record)
        cases = sum(len(record["cases"]) for record in found.values())
        summary = {"cases": cases, "unmeasured": left}
        if left:
            raise StepError("late", f"{left} cases are left", (), summary)
        return summary

    def do(
        self, job: Job, record: Record, open_peers: dict[str, Worker], end: float
    ) -> int:
        """Measure the layers of a job; how many were left when the time was up."""
        self.say(f"  {job.suite} {job.operation} {job.arithmetic}")
        effort = Effort(self.scale.rounds, self.scale.seconds)
        for place, layer in enumerate(job.layers):
            if monotonic() > end:
                return len(job.layers) - place
            case = Case(layer, job.operation, self.scale.batch, job.arithmetic)
            record["cases"].append(measure_case(case, open_peers, effort))
        return 0

    def record(self, job: Job, open_peers: dict[str, Worker]) -> Record:
        return {
            "suite": job.suite,
            "device": "cuda",
            "batch": self.scale.batch,
            "wishes": WISHES,
            "rounds": self.scale.rounds,
            "seconds": self.scale.seconds,
            "peers": {name: worker.hello for name, worker in open_peers.items()},
            "machine": self.where,
            **machine.provenance(),  # type: ignore[typeddict-item]
            "cases": [],
        }
