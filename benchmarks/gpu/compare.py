"""cuconv and PyTorch's cuDNN on the layers of networks, in every arithmetic."""

from collections.abc import Iterator
from itertools import product
from pathlib import Path

from benchmarks import records
from benchmarks.cases import Case
from benchmarks.gpu.scale import HALF_AND_WHOLE, Scale
from benchmarks.gpu.steps import Findings
from benchmarks.internals import strategies
from benchmarks.runner import Effort, measure_case, new_record, workers

# An answer that takes longer means that a kernel hangs.
PATIENCE = 60.0
WISHES = {"device": "cuda", "precision": "standard"}


def peers() -> tuple[str, ...]:
    """The library as it chooses, cuDNN, and each strategy of the library by name."""
    layouts = ("cuconv", "cudnn", "cudnn@channels_last", "cuconv@channels_last")
    named = (f"cuconv@{name}" for name in ("benchmark", *strategies()))
    return (*layouts, *named, "cupy_im2col")


def jobs(scale: Scale) -> list[tuple[str, list[Case]]]:
    """Suites, each with the cases of one operation and one arithmetic.

    What matters most comes first: forward before gradients, ResNet-50 first.
    """
    suites = {
        "resnet50": (scale.arithmetics, scale.layers),
        "mobilenetv2": (HALF_AND_WHOLE, scale.depthwise),
    }
    return [
        (suite, [Case(each, operation, scale.batch, arithmetic) for each in layers])
        for operations in (("forward",), ("input_grad", "weight_grad"))
        for suite, (arithmetics, layers) in suites.items()
        for arithmetic, operation in product(arithmetics, operations)
    ]


def compare(scale: Scale, folder: Path, torch_python: str) -> Iterator[Findings]:
    """Measure every job; the records in the folder grow with each."""
    origin = {"wishes": WISHES, "machine": records.read(records.GPU, folder)["machine"]}
    effort, left = Effort(scale.rounds, scale.seconds), jobs(scale)
    found: dict[str, records.Record] = {}
    with workers(peers(), WISHES, torch_python, PATIENCE) as asked:
        while left:
            suite, cases = left.pop(0)
            if suite not in found:
                found[suite] = new_record(suite, scale.batch, effort, asked, **origin)
            record = found[suite]
            try:
                for case in cases:
                    record["cases"].append(measure_case(case, asked, effort))
            finally:
                records.write(record, records.stem_of(record), folder)
            done = sum(len(record["cases"]) for record in found.values())
            unmeasured = sum(len(cases) for _, cases in left)
            yield {"suites": [*found], "cases": done, "unmeasured": unmeasured}
