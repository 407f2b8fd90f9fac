"""Device memory: who holds how much, and the hooks that are told."""

import weakref

from . import stream

_ROUNDING = 512
_hooks = []
# Live allocations: (start, stop).  Single operations on a dict need no lock, and a lock
# would be taken again by finalisers that run while it is held.
live = {}


class MemoryHook:
    """Told of every allocation and release while it is entered."""

    name = "MemoryHook"

    def __enter__(self):
        _hooks.append(self)
        return self

    def __exit__(self, *_):
        _hooks.remove(self)

    def malloc_postprocess(self, **kwargs):
        pass

    def free_postprocess(self, **kwargs):
        pass


class Pool:
    """The default pool: it holds what is live and caches nothing."""

    def used_bytes(self):
        return sum(stop - start for start, stop in live.values())

    def total_bytes(self):
        return self.used_bytes()

    def free_all_blocks(self):
        pass


pool = Pool()


class Block:
    """One allocation; it lives as long as an array refers to it."""

    def __init__(self, host):
        # CuPy allows it; a graph must not hold what the pool may give to others.
        stream.refuse("memory was taken from the pool during a capture")
        size = max(-(-host.nbytes // _ROUNDING) * _ROUNDING, _ROUNDING)
        base = host
        while base.base is not None and hasattr(base.base, "__array_interface__"):
            base = base.base
        start = base.__array_interface__["data"][0]
        live[id(self)] = start, start + max(base.nbytes, 1)
        self._tell("malloc_postprocess", size, start)
        weakref.finalize(self, _release, id(self), size, start)

    @staticmethod
    def _tell(event, size, start):
        for hook in list(_hooks):
            getattr(hook, event)(
                device_id=0, size=size, mem_size=size, mem_ptr=start, pmem_id=start
            )


def _release(key, size, start):
    live.pop(key, None)
    Block._tell("free_postprocess", size, start)


def check_inside(start, stop):
    """Fail unless one live allocation holds all of [start, stop)."""
    spans = list(live.values())
    if not any(low <= start and stop <= high for low, high in spans):
        raise RuntimeError(f"{stop - start} bytes at {start:#x} are outside any array")
