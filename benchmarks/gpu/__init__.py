"""Everything that has to happen on a real GPU: ``python -m benchmarks.gpu``."""
