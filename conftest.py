"""What pytest passes over where an optional package is missing."""

from importlib.util import find_spec

# On machines that are lent for their GPU there may be no Dask.
collect_ignore = [] if find_spec("dask") else ["cuconv/lazy", "tests/test_lazy.py"]
