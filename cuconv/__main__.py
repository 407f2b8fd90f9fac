"""The command line, ``cuconv``: info, plan, precompile and demo."""

import argparse
import importlib
import importlib.metadata
import importlib.util
import json
import os
import platform
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
from threadpoolctl import ThreadpoolController

from cuconv import __version__
from cuconv.backends import default_array_module, precompile
from cuconv.backends.cuda.device import why_not
from cuconv.conv import plan_conv
from cuconv.engine.plan import Plan
from cuconv.engine.problem import ROLES
from cuconv.memory import MemoryLimitError, parse_memory_limit
from cuconv.options import Options

_DEMO_PACKAGES = ("matplotlib", "PIL", "rich", "sklearn")

# What `plan_conv` takes beside the shapes: written in full, and as a `_value`.
_PLAIN_OPTIONS = ("op", "bias", "device")
_VALUE_OPTIONS = (*Options._fields, "output_padding", "output_size")

_SWITCHES = {"true": True, "false": False}
_VALUES = (
    "one number as 2, one for each axis as 2,1, (before, after) pairs as 1:0,2:2, or a "
    "string; write a value that begins with a minus sign as --padding=-1,0"
)


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _gpu() -> str:
    """The current device, or the reason why there is none."""
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


def _libraries() -> dict[str, str]:
    """NVIDIA's libraries that strategies call, or why they cannot, if a GPU works."""
    if default_array_module() is np:
        return {}
    from cuconv.backends.cuda.libraries import found  # noqa: PLC0415 - imports CuPy

    return found()


def _blas() -> str:
    libraries = ThreadpoolController().select(user_api="blas").info()
    each = (
        f"{lib['internal_api']} {lib['version']} ({lib['num_threads']} threads)"
        for lib in libraries
    )
    return ", ".join(each) or "unknown to threadpoolctl"


def information() -> dict[str, str]:
    """Versions and devices for a report about this installation, by label."""
    modules = ["numpy", "cupy"] if default_array_module() is not np else ["numpy"]
    return {
        "cuconv": __version__,
        "array modules": ", ".join(modules),
        "GPU": _gpu(),
        "BLAS": _blas(),
        "Python": f"{platform.python_version()} on {platform.platform()}",
        "numpy": np.__version__,
        **_libraries(),
        "nvtx": _version("nvtx"),
        "cupy": getattr(sys.modules.get("cupy"), "__version__", "not installed"),
    }


def _info() -> int:
    for label, value in information().items():
        print(f"{label:14} {value}")
    return 0


def _plan(chosen: argparse.Namespace) -> int:
    options = vars(chosen)
    names = (*_PLAIN_OPTIONS, *_VALUE_OPTIONS)
    given = {name: options[name] for name in names if name in options}
    try:
        plan = plan_conv(chosen.x_shape, chosen.w_shape, **given)
    except (TypeError, ValueError, MemoryLimitError, RuntimeError) as error:
        return _refuse(error)
    if chosen.json:
        print(json.dumps(plan.as_dict()))
    else:
        _show(plan)
    return 0


def _show(plan: Plan) -> None:
    console = _terminal()
    if console is None:
        print(plan)
        return
    table = importlib.import_module("rich.table").Table(show_header=False)
    text = importlib.import_module("rich.text").Text
    for name, said in plan.rows():
        table.add_row(text(name, style="bold"), text(said))
    console.print(table)


def _precompile(chosen: argparse.Namespace) -> int:
    if default_array_module() is np:
        return _refuse(f"no GPU works: {why_not()}")
    try:
        with _progress("kernels") as progress:
            ready = precompile(chosen.dtypes, chosen.ranks, progress=progress)
    except (TypeError, ValueError) as error:
        return _refuse(error)
    print(f"{ready} kernels are ready on {_gpu()}")
    return 0


def _terminal() -> Any:
    """Rich's console; None without rich, or if the output is a file."""
    try:
        console = importlib.import_module("rich.console").Console()
    except ImportError:
        return None
    return console if console.is_terminal else None


@contextmanager
def _progress(what: str) -> Iterator[Callable[[int, int], object] | None]:
    """A progress bar; None if it cannot be shown."""
    console = _terminal()
    if console is None:
        yield None
        return
    rich = importlib.import_module("rich.progress")
    columns = (*rich.Progress.get_default_columns(), rich.MofNCompleteColumn())
    with rich.Progress(*columns, console=console) as bar:
        task = bar.add_task(what, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)


def _status(doing: str) -> AbstractContextManager[object]:
    """Show what is being done, on a terminal."""
    console = _terminal()
    return nullcontext() if console is None else console.status(doing)


def _refuse(error: object) -> int:
    print(f"error: {error}", file=sys.stderr)
    return 2


def _demo(chosen: argparse.Namespace) -> int:
    missing = [
        name for name in _DEMO_PACKAGES if importlib.util.find_spec(name) is None
    ]
    if missing:
        words = ", ".join(missing)
        return _refuse(f'the demo needs {words}: pip install "cuconv[demo]"')
    with _status("loading scikit-learn and matplotlib"):
        from cuconv.demo import DemoError, run_demo  # noqa: PLC0415 - needs the extra

    try:
        passed = run_demo(
            chosen.photo,
            memory_limit=chosen.memory_limit,
            device=chosen.device,
            output=chosen.output,
        )
    except (DemoError, MemoryLimitError) as error:
        return _refuse(error)
    return 0 if passed else 1


def _bytes(word: str) -> int:
    try:
        return parse_memory_limit(int(word) if word.isdigit() else word)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def _shape(word: str) -> tuple[int, ...]:
    try:
        return tuple(map(int, re.split("[x×,]", word)))
    except ValueError:
        raise argparse.ArgumentTypeError(
            f"a shape is numbers with x between them, as 8x64x56x56; got {word!r}"
        ) from None


def _value(word: str) -> object:
    """Parse the text of an option; see ``_VALUES``."""
    try:
        axes = [tuple(map(int, axis.split(":"))) for axis in word.split(",")]
    except ValueError:
        return _SWITCHES.get(word.lower(), word)
    values = [axis if len(axis) > 1 else axis[0] for axis in axes]
    several = len(values) > 1 or isinstance(values[0], tuple)
    return tuple(values) if several else values[0]


def _words(text: str) -> tuple[str, ...]:
    return tuple(text.split(","))


def _ranks(text: str) -> tuple[int, ...]:
    ranks = tuple(int(word) for word in text.split(",") if word in ("1", "2", "3"))
    if len(ranks) != len(text.split(",")):
        raise argparse.ArgumentTypeError(f"ranks are 1, 2 and 3; got {text!r}")
    return ranks


class _Parser(argparse.ArgumentParser):
    """A parser whose errors are one line."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"error: {message}\n")


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="cuconv", description="Convolution over NumPy and CuPy arrays."
    )
    parser.add_argument("--version", action="version", version=__version__)
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser(
        "info", help="array modules, GPU, BLAS and versions"
    ).set_defaults(run=lambda _: _info())
    _add_plan(commands)
    _add_precompile(commands)
    _add_demo(commands)
    return parser


def _add_plan(commands: Any) -> None:
    parser = commands.add_parser(
        "plan",
        allow_abbrev=False,
        help="which strategy would run a convolution, why, and what it costs",
        epilog="help(cuconv.plan_conv) says what they mean, and their defaults.",
    )
    parser.set_defaults(run=_plan)
    parser.add_argument("x_shape", type=_shape, help="as 8x64x56x56")
    parser.add_argument("w_shape", type=_shape, help="as 64x64x3x3")
    parser.add_argument("--json", action="store_true", help="in one line of JSON")
    parser.add_argument("--op", choices=list(ROLES), default="forward")
    parser.add_argument("--bias", action="store_true", help="there is one")
    parser.add_argument("--device", default="cpu", help="cpu, cuda or cuda:1")
    values = parser.add_argument_group("options of convolutions", _VALUES)
    for name in _VALUE_OPTIONS:
        values.add_argument(
            f"--{name.replace('_', '-')}",
            type=_value,
            default=argparse.SUPPRESS,
            metavar="VALUE",
        )


def _add_precompile(commands: Any) -> None:
    parser = commands.add_parser(
        "precompile", help="compile CUDA kernels, to spare the first calls"
    )
    parser.set_defaults(run=_precompile)
    parser.add_argument(
        "--dtypes",
        type=_words,
        default=("float32",),
        help="types of the arrays, as float32,float16 (default: float32)",
    )
    parser.add_argument(
        "--ranks",
        type=_ranks,
        default=(1, 2, 3),
        help="numbers of spatial axes, as 2,3 (default: 1,2,3)",
    )


def _add_demo(commands: Any) -> None:
    demo = commands.add_parser(
        "demo", help="filters and a small network on a photograph, timed and checked"
    )
    demo.set_defaults(run=_demo)
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


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; the exit status is its result."""
    chosen = _parser().parse_args(arguments)
    try:
        status: int = chosen.run(chosen)
        sys.stdout.flush()
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130  # 128 + SIGINT, as shells count
    except BrokenPipeError:
        # The reader of the output has enough; nothing more may be flushed at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141  # 128 + SIGPIPE
    return status


if __name__ == "__main__":
    sys.exit(main())
