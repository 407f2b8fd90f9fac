"""Dask arrays: every block of a result is a separate call, made later.

The graph is built from the shapes alone; nothing is computed here.  A block of the
result depends on the parts of other blocks that its windows read (`blocks`).  It is
computed by a `cuconv.engine.plan.Plan` with the geometry of that part, or by the
function that `cuconv.pooling` passes in, so that nothing here imports the public
functions.

The other modules import Dask, and are imported for the first Dask array.
"""
