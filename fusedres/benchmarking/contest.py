"""One workload of one network, run by everyone who can run it."""

from __future__ import annotations

import gc
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from time import perf_counter
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from .agreement import verdict
from .budget import TimeBudget
from .memory import peak_allocated, saved_bytes
from .peers import BASELINE, OURS, Peer
from .race import Entrant, Finish, race
from .referee import Referee
from .results import Measurement
from .workloads import Batch, Workload

if TYPE_CHECKING:
    from ..analysis.traffic import Traffic

__all__ = ["contest", "enter_all"]


def contest(
    subject: str,
    workload: Workload,
    model: nn.Module,
    batches: Sequence[Batch],
    peers: Sequence[Peer] = (BASELINE, OURS),
    *,
    turns: int,
    budget: TimeBudget | None = None,
    modelled: Traffic | None = None,
    memory: bool = False,
    depth: int | None = None,
    checked: Batch | None = None,
) -> tuple[Finish, ...]:
    """Prepares, checks and times copies of a network, one for each peer; the network itself stays as it is.

    Args:
        turns: samples of each contestant; fewer where the budget has no time for them.

    The other arguments are those of :func:`enter_all`.
    """
    entrants = enter_all(
        subject,
        workload,
        model,
        batches,
        peers,
        budget=budget,
        modelled=modelled,
        memory=memory,
        depth=depth,
        checked=checked,
    )
    left = None if budget is None else budget.left
    # Each has taken a step already, when it was prepared.
    finishes = race(entrants, turns=turns, warmup=1, device=batches[0].images.device, left=left)
    del entrants
    gc.collect()
    return finishes


def enter_all(
    subject: str,
    workload: Workload,
    model: nn.Module,
    batches: Sequence[Batch],
    peers: Sequence[Peer] = (BASELINE, OURS),
    *,
    budget: TimeBudget | None = None,
    modelled: Traffic | None = None,
    memory: bool = False,
    depth: int | None = None,
    checked: Batch | None = None,
) -> list[Entrant]:
    """The contestants of a workload, prepared.

    Args:
        subject: the network's name.
        model: stock, in the layout and on the device of the batches.
        batches: of one size, for the calls in turn; the first is what is checked.
        peers: the first is the baseline, as a rule :data:`.peers.BASELINE`.
        budget: what does not fit in it is missing, with that reason. The first two are always prepared.
        modelled: what the model of memory traffic says, for this network, batch, dtype and mode.
        memory: whether bytes saved for backward and bytes allocated are measured.
        depth: of the network, for plots.
        checked: what is checked instead of the first batch, where all peers take any size; float64 is slow.
    """
    budget = TimeBudget() if budget is None else budget
    torch.compiler.reset()  # else the eighth network of a class would run as eager
    stage = _Stage(workload, model, batches, memory, checked)
    entrants = []
    for place, peer in enumerate(peers):
        about = _about(subject, workload, batches[0], peer, modelled, depth)
        about = replace(about, baseline=place == 0)
        reason = peer.refuses(workload, batches[0].images.device)
        if reason is None and place > 1:
            reason = budget.refuses(f"preparing {peer.name}", peer.seconds[not workload.training])
        entrants.append(Entrant(replace(about, missing=reason)) if reason else stage.enter(peer, about, budget))
    return entrants


def _about(
    subject: str, workload: Workload, batch: Batch, peer: Peer, modelled: Traffic | None, depth: int | None
) -> Measurement:
    cost = modelled.total(peer.schedule) if modelled is not None and peer.schedule is not None else None
    return Measurement(
        "model",
        subject,
        "train step" if workload.training else "inference",
        str(workload.autocast or workload.dtype).removeprefix("torch."),
        tuple(batch.images.shape),
        peer.name,
        autocast=workload.autocast is not None,
        layout=batch.layout,
        depth=depth,
        images=len(batch),
        moved=None if cost is None else cost.nbytes,
        flops=None if cost is None else cost.flops,
        roofline=None if cost is None else cost.seconds,
    )


@dataclass(frozen=True)
class _Prepared:
    model: nn.Module
    call: Callable[[Tensor], Tensor]
    step: Callable[[], Any]
    seconds: float


class _Stage:
    """What the peers of one contest share: the stock network, the batches, the referee."""

    def __init__(
        self, workload: Workload, model: nn.Module, batches: Sequence[Batch], memory: bool, checked: Batch | None
    ) -> None:
        self._workload = workload
        self._stock = workload.prepared(model)
        self._batches = [batch.to(workload.dtype) for batch in batches]
        self._memory = memory
        judged = self._batches[0] if checked is None else checked.to(workload.dtype)
        self._referee = Referee(self._stock, judged.shifted, autocast=workload.autocast, backward=workload.training)

    def enter(self, peer: Peer, about: Measurement, budget: TimeBudget) -> Entrant:
        """Prepares a peer and has it take its first step. A failure is told, not raised: a peer may do as it likes."""
        try:
            prepared = self._prepare(peer)
        except Exception as error:
            if not peer.foreign:
                raise
            first_line = str(error).strip().partition("\n")[0]
            return Entrant(replace(about, missing=f"it failed: {type(error).__name__}: {first_line}".rstrip(" :")))
        budget.spent(f"preparing {peer.name}", peer.seconds[not self._workload.training], prepared.seconds)
        about = replace(about, first_step=prepared.seconds, note="cached" if peer.cached() else "")
        judge = None if about.baseline else lambda: verdict(self._referee.judge(prepared.model, prepared.call))
        if self._memory:
            about = replace(about, saved=self._saved(prepared), peak=self._peak(prepared))
        return Entrant(about, prepared.step, judge)

    def _prepare(self, peer: Peer) -> _Prepared:
        twin = self._workload.prepared(self._stock)
        start = perf_counter()
        call = peer.prepare(twin, self._batches[0].images)
        step = self._workload.step(twin, call, self._batches)
        step()
        return _Prepared(twin, call, step, perf_counter() - start)

    def _saved(self, prepared: _Prepared) -> int | None:
        """``None`` in inference, where nothing is saved."""
        if not self._workload.training:
            return None
        batch = self._batches[0]

        def forward() -> Tensor:
            with self._workload.autocasting(batch):
                return batch.loss(prepared.call(batch.images))

        return saved_bytes(prepared.model, forward)

    def _peak(self, prepared: _Prepared) -> int:
        return peak_allocated(prepared.step, self._batches[0].images.device)
