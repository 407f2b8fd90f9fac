"""Dask arrays: every block of a result is a separate call, made later.

The graph is built from the shapes alone; nothing is computed here.  A block of the
result depends on the parts of other blocks that its windows read (`blocks`).  It is
computed by a plan with the geometry of that part (`cuconv.engine.plan.Plan`, or
`plan_of` of `cuconv.engine.pool_plan`), so that nothing here imports the public
functions.

The other modules import Dask, and are imported for the first Dask array.
"""
