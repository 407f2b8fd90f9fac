"""What pytest passes over where an optional package is missing."""

from importlib.util import find_spec
from pathlib import Path

import pytest

LAZY = Path("cuconv/dask"), Path("tests/dask")


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """Machines that are lent for their GPU may lack Dask; elsewhere its lack fails."""
    if "gpu" not in config.option.markexpr or find_spec("dask.array"):
        return None
    return True if collection_path.relative_to(config.rootpath) in LAZY else None
