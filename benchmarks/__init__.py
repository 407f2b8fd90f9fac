"""Times, memory and errors of cuconv and its peers: ``python -m benchmarks``."""
