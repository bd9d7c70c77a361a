"""Worker processes that stay, for tests of code that several processes run together.

Importing torch takes seconds and a test's work moments, so the workers are started once. A job is a function of an
importable module; every member of a job calls it with its own arguments inside a process group of its own.
"""

from __future__ import annotations

import contextlib
import itertools
import multiprocessing
import pickle
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from datetime import timedelta
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

__all__ = ["Gang", "MemberError"]


TIMEOUT = 30.0

Member = tuple[multiprocessing.Process, Connection]


class MemberError(AssertionError):
    """What a member of a job raised, with its traceback."""


class Gang:
    """Processes that run jobs together, over gloo."""

    def __init__(self) -> None:
        self._members: list[Member] = []
        self._folder = tempfile.TemporaryDirectory()
        self._jobs = itertools.count()

    def run(self, function: Callable[..., Any], arguments: Sequence[tuple]) -> list[Any]:
        """Calls ``function(*arguments[rank])`` in one process per rank; returns the results.

        Raises:
            MemberError: where one of them raised, ended or does not answer.
        """
        outcomes = self.outcomes(function, arguments)
        errors = [result for kind, result in outcomes if kind == "error"]
        if errors:
            raise MemberError("\n".join(errors))
        return [result for _, result in outcomes]

    def outcomes(
        self, function: Callable[..., Any], arguments: Sequence[tuple], timeout: float = TIMEOUT
    ) -> list[tuple[str, Any]]:
        """As :meth:`run`, with ``("value", result)`` or ``("error", traceback)`` of every member.

        Args:
            timeout: of a collective, in seconds; the job may take four times that.
        """
        members = self._of(len(arguments))
        store = str(Path(self._folder.name) / f"store{next(self._jobs)}")
        for rank, ((_, connection), args) in enumerate(zip(members, arguments)):
            _send(connection, (function, args, rank, len(arguments), store, timeout))
        deadline = time.monotonic() + 4 * timeout
        return [self._outcome(member, deadline) for member in members]

    def close(self) -> None:
        for process, connection in self._members:
            connection.close()
            process.kill()
            process.join()
        self._members = []

    def _of(self, size: int) -> list[Member]:
        # A server that has imported what jobs need and used none of it, so that it may be forked.
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["torch.distributed.fsdp", "torch._dynamo", "fusedres"])
        while len(self._members) < size:
            ours, theirs = context.Pipe()
            process = context.Process(target=_serve, args=(theirs,), daemon=True)
            process.start()
            theirs.close()
            self._members.append((process, ours))
        return self._members[:size]

    def _outcome(self, member: Member, deadline: float) -> tuple[str, Any]:
        process, connection = member
        try:
            if connection.poll(max(0, deadline - time.monotonic())):
                return _receive(connection)
            said = "the process did not answer in time"
        except (EOFError, ConnectionError):
            said = "the process has ended"
        self._members.remove(member)
        connection.close()
        process.kill()
        process.join()
        return "error", said


# Connections' own pickling passes tensors on as shared memory, which ends with its process.
def _send(connection: Connection, value: Any) -> None:
    connection.send_bytes(pickle.dumps(value))


def _receive(connection: Connection) -> Any:
    return pickle.loads(connection.recv_bytes())


def _serve(connection: Connection) -> None:
    import torch

    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True, warn_only=True)  # so that uninitialised memory holds NaN
    with contextlib.suppress(EOFError):
        while True:
            _send(connection, _answer(*_receive(connection)))


def _answer(function: Callable, args: tuple, rank: int, size: int, store: str, timeout: float) -> tuple[str, Any]:
    try:
        with _process_group(rank, size, store, timeout):
            return "value", function(*args)
    except Exception:
        return "error", f"rank {rank} of {size}:\n{traceback.format_exc()}"


@contextlib.contextmanager
def _process_group(rank: int, size: int, store: str, timeout: float) -> Iterator[None]:
    import torch.distributed as dist

    dist.init_process_group(
        "gloo", init_method=f"file://{store}", rank=rank, world_size=size, timeout=timedelta(seconds=timeout)
    )
    try:
        dist.barrier()  # who is done at once must not leave while others still connect
        yield
    finally:
        dist.destroy_process_group()
