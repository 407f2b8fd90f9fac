"""Dask arrays: every block of a result is a call of its own, made later.

The graph is built from the shapes alone; nothing is computed here.  A block of the
result depends on the parts of other blocks that its windows meet (`blocks`), and is
what a public call comes to once its arguments are checked, with the geometry of that
part: `cuconv.engine.rewrites.bind`, or the function that `cuconv.pooling` passes down.  So
these modules lie below the public functions, and need no way back up to them.

They import Dask, and are imported when the first Dask array comes in.
"""
