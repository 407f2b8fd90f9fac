"""Who is measured.  Each peer has a module of its own, loaded in its own process."""

import importlib
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, cast

from benchmarks.peers.base import Peer, Wishes


@dataclass(frozen=True)
class Kind:
    """Where a peer is found, and which interpreter has what it needs."""

    where: str
    needs_torch: bool = False

    def make(self, wishes: Wishes) -> Peer:
        module, name = self.where.split(":")
        found = getattr(importlib.import_module(f"benchmarks.peers.{module}"), name)
        return cast("Peer", found(wishes))


PEERS = {
    "cuconv": Kind("library:Library"),
    "torch": Kind("pytorch:Torch", needs_torch=True),
    "im2col_rows": Kind("whole_buffer:Rows"),
    "im2col_columns": Kind("whole_buffer:Columns"),
    "naive": Kind("loops:Loops"),
    "scipy": Kind("scipy_pairs:Pairs"),
    "cudnn": Kind("pytorch:Cudnn", needs_torch=True),
    "cupy_im2col": Kind("whole_buffer:CupyColumns"),
}
ON_CUDA = {"torch": "cudnn", "im2col_columns": "cupy_im2col"}
LAYOUTS = ("channels_first", "channels_last")
PRECISIONS = ("strict", "standard", "fast")


def kind_of(peer: str) -> Kind:
    """The kind of ``cuconv@4MiB`` is that of ``cuconv``."""
    base, *words = peer.split("@")
    if base not in PEERS:
        raise ValueError(f"there is no peer {base!r}; the peers are {', '.join(PEERS)}")
    known = set(LAYOUTS) if base == "cudnn" else set()
    if base != "cuconv" and not known.issuperset(words):
        raise ValueError(
            f"only cuconv takes options after an @, and cudnn a layout; got {peer!r}"
        )
    return PEERS[base]


def on_cuda(peers: Iterable[str]) -> tuple[str, ...]:
    """Their counterparts on a GPU, for those that have one; cuconv is its own."""
    found = (p if p.startswith("cuconv") else ON_CUDA.get(p) for p in peers)
    return tuple(peer for peer in found if peer)


def wishes_of(peer: str, common: dict[str, Any]) -> Wishes:
    """The options that all share, and those after each @ of this peer's name.

    A quantity is a memory limit, one of cuconv's three precisions or of the two layouts
    is that, and any other word is a strategy.
    """
    wishes = Wishes(**common)
    for word in peer.split("@")[1:]:
        if word[:1].isdigit():
            wishes = wishes._replace(memory_limit=word)
        elif word in PRECISIONS:
            wishes = wishes._replace(precision=word)
        elif word in LAYOUTS:
            wishes = wishes._replace(layout=word)
        else:
            wishes = wishes._replace(strategy=word)
    return wishes
