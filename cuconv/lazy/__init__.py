"""Dask arrays: every block of a result is a call of its own, made later.

The graph is built from the shapes alone; nothing is computed here.  A block of the
result depends on the parts of other blocks that its windows meet (`blocks`), and is the
eager call on them, with the geometry of that part.  These modules import Dask: they are
imported when the first Dask array comes in.
"""
