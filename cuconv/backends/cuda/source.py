"""The source text of the kernels, with headers included."""

import re
from functools import cache
from pathlib import Path

_INCLUDE = re.compile(r'^#include "([\w.]+)"$', re.MULTILINE)


def kernel_folder() -> Path:
    """The folder of the ``.cu`` files: in the package, or beside it in a checkout."""
    package = Path(__file__).resolve().parents[2]
    for folder in (package / "kernels", package.parent / "kernels"):
        if (folder / "index.cuh").is_file():
            return folder
    raise FileNotFoundError(f"no kernels in {package} or beside it: reinstall cuconv")


@cache
def kernel_source(name: str) -> str:
    """The text of a kernel with its headers included.

    CuPy keys its cache of binaries by this text and not by the headers it includes, so
    the headers are pasted into it; ``#line`` keeps the compiler's line numbers correct.
    """
    folder = kernel_folder()
    text = (folder / f"{name}.cu").read_text(encoding="utf-8")

    def included(match: re.Match[str]) -> str:
        header = match[1]
        after = text.count("\n", 0, match.start()) + 2
        body = (folder / header).read_text(encoding="utf-8")
        return f'#line 1 "{header}"\n{body}#line {after} "{name}.cu"'

    return f'#line 1 "{name}.cu"\n' + _INCLUDE.sub(included, text)
