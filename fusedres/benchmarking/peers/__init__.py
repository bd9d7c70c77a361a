"""Who else runs these networks: each a contestant, reported as absent with the reason where it is.

One file for each family; a peer is a :class:`~fusedres.benchmarking.peers.base.Peer` in :data:`PEERS`.
"""

from __future__ import annotations

from collections.abc import Sequence

from .apex import Apex
from .base import Peer
from .compiled import Compiled
from .eager import Eager
from .onnxruntime import OnnxRuntime
from .openvino import OpenVino
from .ours import Fusedres
from .tensorrt import TensorRT
from .torchscript import TorchScript

__all__ = ["BASELINE", "COMPILE", "OURS", "PEERS", "Peer", "peers_named"]

BASELINE = Eager("channels_last")
"""Stock PyTorch at its best layout, by which correctness is measured."""

OURS = Fusedres()

COMPILE = Compiled()

PEERS: tuple[Peer, ...] = (
    BASELINE,
    OURS,
    COMPILE,
    Eager("contiguous"),
    Fusedres("low"),
    TorchScript(),
    OpenVino(),
    OnnxRuntime(),
    Apex(),
    TensorRT(),
    Compiled(patched=True),
    Compiled("max-autotune"),
)
"""In the order in which they are prepared, so that what is left out for want of time is what takes the most."""


def peers_named(names: Sequence[str]) -> tuple[Peer, ...]:
    """Those of :data:`PEERS` with these names.

    Raises:
        ValueError: for a name that none has.
    """
    by_name = {peer.name: peer for peer in PEERS}
    if unknown := [name for name in names if name not in by_name]:
        raise ValueError(f"peers must be of {', '.join(map(repr, by_name))}, got {unknown[0]!r}")
    return tuple(by_name[name] for name in names)
