"""Who is measured.  Each peer has a module of its own, loaded in its own process."""

import importlib
from collections.abc import Iterable
from typing import Any, cast

from benchmarks.peers.base import Peer, Wishes

# Where each peer is found: a module of this folder, and a class.
PEERS = {
    "cuconv": "library:Library",
    "torch": "pytorch:Torch",
    "onnxruntime": "onnx_runtime:OnnxRuntime",
    "im2col_rows": "whole_buffer:Rows",
    "im2col_columns": "whole_buffer:Columns",
    "naive": "loops:Loops",
    "scipy": "scipy_pairs:Pairs",
    "oaconvolve": "scipy_pairs:OverlapAdd",
    "ndimage": "scipy_pairs:Ndimage",
    "cudnn": "pytorch:Cudnn",
    "cupy_im2col": "whole_buffer:CupyColumns",
}
ON_CUDA = {"torch": "cudnn", "im2col_columns": "cupy_im2col"}
LAYOUTS = ("channels_first", "channels_last")
PRECISIONS = ("strict", "standard", "fast")


def is_elsewhere(peer: str) -> bool:
    """Whether another environment may have what the peer needs: PyTorch and its kin."""
    return PEERS[peer.partition("@")[0]].startswith(("pytorch:", "onnx_runtime:"))


def on_cuda(peers: Iterable[str]) -> tuple[str, ...]:
    """Their counterparts on a GPU, for those that have one; cuconv is its own."""
    found = (p if p.startswith("cuconv") else ON_CUDA.get(p) for p in peers)
    return tuple(peer for peer in found if peer)


def wishes_of(peer: str, common: dict[str, Any]) -> Wishes:
    """The options that all share, and those after each @ of this peer's name.

    A quantity is a memory limit, one of cuconv's three precisions or of the two layouts
    is that, and any other word is a strategy.  Raises if there is no such peer.
    """
    base, *words = peer.split("@")
    if base not in PEERS:
        raise ValueError(f"there is no peer {base!r}; the peers are {', '.join(PEERS)}")
    known = LAYOUTS if base == "cudnn" else ()
    if base != "cuconv" and not set(known).issuperset(words):
        raise ValueError(
            f"only cuconv takes options after an @, and cudnn a layout; got {peer!r}"
        )
    wishes = dict(common)
    for word in words:
        if word[:1].isdigit():
            wishes["memory_limit"] = word
        elif word in PRECISIONS:
            wishes["precision"] = word
        else:
            wishes["layout" if word in LAYOUTS else "strategy"] = word
    return Wishes(**wishes)


def make_peer(name: str, common: dict[str, Any]) -> Peer:
    module, kind = PEERS[name.partition("@")[0]].split(":")
    found = getattr(importlib.import_module(f"benchmarks.peers.{module}"), kind)
    return cast("Peer", found(wishes_of(name, common)))
