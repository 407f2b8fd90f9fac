"""The command line: ``python -m cuconv info`` and ``python -m cuconv demo``."""

import argparse
import importlib.metadata
import importlib.util
import platform
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from threadpoolctl import ThreadpoolController

from cuconv import __version__
from cuconv._cuda.device import why_not
from cuconv.leaves import default_array_module
from cuconv.memory import MemoryLimitError, parse_memory_limit

_DEMO_PACKAGES = ("matplotlib", "PIL", "rich", "sklearn")


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _gpu() -> str:
    """The current device, or why there is none."""
    cupy = default_array_module()
    if cupy is np:
        return f"none: {why_not()}"
    device = cupy.cuda.Device()
    name = cupy.cuda.runtime.getDeviceProperties(device.id)["name"].decode()
    major, minor = device.compute_capability[:-1], device.compute_capability[-1]
    driver = cupy.cuda.runtime.driverGetVersion()
    return (
        f"{name}, compute capability {major}.{minor}, "
        f"driver for CUDA {driver // 1000}.{driver % 1000 // 10}"
    )


def _blas() -> str:
    libraries = ThreadpoolController().select(user_api="blas").info()
    each = (
        f"{lib['internal_api']} {lib['version']} ({lib['num_threads']} threads)"
        for lib in libraries
    )
    return ", ".join(each) or "unknown to threadpoolctl"


def information() -> dict[str, str]:
    """What a report about this installation should say, label by label."""
    modules = ["numpy", "cupy"] if default_array_module() is not np else ["numpy"]
    return {
        "cuconv": __version__,
        "array modules": ", ".join(modules),
        "GPU": _gpu(),
        "BLAS": _blas(),
        "Python": f"{platform.python_version()} on {platform.platform()}",
        "numpy": np.__version__,
        "nvtx": _version("nvtx"),
        "cupy": getattr(sys.modules.get("cupy"), "__version__", "not installed"),
    }


def _info() -> int:
    for label, value in information().items():
        print(f"{label:14} {value}")
    return 0


def _demo(chosen: argparse.Namespace) -> int:
    missing = [
        name for name in _DEMO_PACKAGES if importlib.util.find_spec(name) is None
    ]
    if missing:
        print(
            f'the demo needs {", ".join(missing)}: pip install "cuconv[demo]"',
            file=sys.stderr,
        )
        return 2
    from cuconv.demo import DemoError, run_demo  # noqa: PLC0415 - needs the extra

    try:
        passed = run_demo(
            chosen.photo,
            memory_limit=chosen.memory_limit,
            device=chosen.device,
            output=chosen.output,
        )
    except (DemoError, MemoryLimitError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0 if passed else 1


def _bytes(word: str) -> int:
    try:
        return parse_memory_limit(int(word) if word.isdigit() else word)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m cuconv", description="Convolution over NumPy and CuPy arrays."
    )
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("info", help="array modules, GPU, BLAS and versions")
    demo = commands.add_parser(
        "demo", help="filters and a small network on a photograph, timed and checked"
    )
    demo.add_argument("photo", nargs="?", type=Path, help="a picture file")
    demo.add_argument(
        "--memory-limit",
        type=_bytes,
        default="4 MiB",
        help='for each convolution, as "4 MiB" or bytes (default: %(default)s)',
    )
    demo.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    demo.add_argument(
        "--output",
        type=Path,
        default=Path("demo-responses.png"),
        help="the picture of all responses (default: %(default)s)",
    )
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; the exit status is its result."""
    chosen = _parser().parse_args(arguments)
    return _info() if chosen.command == "info" else _demo(chosen)


if __name__ == "__main__":
    sys.exit(main())
