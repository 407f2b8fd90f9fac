"""cuconv and PyTorch's cuDNN on the layers of networks, in every arithmetic."""

from collections.abc import Callable
from time import monotonic
from typing import Any, NamedTuple

from benchmarks.cases import Case
from benchmarks.gpu.scale import HALF_AND_WHOLE, Scale
from benchmarks.gpu.steps import Findings, StepError
from benchmarks.internals import strategies
from benchmarks.layers import Layer
from benchmarks.records import Record
from benchmarks.runner import Effort, measure_case, new_record, workers

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
        for operations in (("forward",), ("input_grad", "weight_grad"))
        for suite, layers, arithmetics in suites
        for arithmetic in arithmetics
        for operation in operations
    ]


def compare(
    scale: Scale,
    where: dict[str, Any],
    keep: Callable[[Record], None],
    say: Callable[[str], None],
    torch_python: str,
    limit: float,
) -> Findings:
    """Measure every job until the limit; ``keep`` is told of a record after each."""
    end, left = monotonic() + limit, 0
    effort = Effort(scale.rounds, scale.seconds)
    found: dict[str, Record] = {}
    with workers(peers(), WISHES, torch_python, PATIENCE) as asked:
        for job in jobs(scale):
            say(f"  {job.suite} {job.operation} {job.arithmetic}")
            record = found.setdefault(
                job.suite,
                new_record(job.suite, scale.batch, WISHES, effort, asked, where),
            )
            for layer in job.layers:
                if monotonic() > end:
                    left += 1
                    continue
                case = Case(layer, job.operation, scale.batch, job.arithmetic)
                record["cases"].append(measure_case(case, asked, effort))
            keep(record)
    cases = sum(len(record["cases"]) for record in found.values())
    summary = {"cases": cases, "unmeasured": left}
    if left:
        raise StepError("late", f"{left} cases are left", found=summary)
    return summary
