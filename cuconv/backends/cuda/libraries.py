"""The libraries of NVIDIA that strategies call, which need not be installed."""

from functools import cache

from cuconv.backends.cuda import cudnn

NAMES = {"cublas": "cuBLAS", "cudnn": "cuDNN"}


def missing(library: str) -> str:
    """The reason why a library cannot be used; empty if it can."""
    error = error_of(library)
    if not error:
        return ""
    extra = "cudnn or cudnn12" if library == "cudnn" else "cuda13 or cuda12"
    name = NAMES[library]
    return f"{name} cannot be loaded ({error}): install cuconv with the extra {extra}"


def found() -> dict[str, str]:
    """Every library by its name: its version or that it is there, or why it is not."""
    versions = {"cublas": lambda: "found", "cudnn": cudnn.version}
    return {
        name: missing(library) or versions[library]() for library, name in NAMES.items()
    }


@cache
def error_of(library: str) -> str:
    """Why a library cannot be loaded; empty if it can."""
    try:
        if library == "cudnn":
            cudnn.load()
        else:
            from cupy.cuda import cublas  # noqa: F401
    except ImportError as error:
        # What follows is every place where it was not found.
        return " ".join(str(error).split()).partition(": ")[0]
    return ""
