"""Persistent ranks for tests: processes with a gloo group between them that run one function after another."""

from __future__ import annotations

import contextlib
import gc
import multiprocessing
import os
import pickle
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Sequence
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

COLLECTIVE_TIMEOUT_S = 60.0
GRACE_S = 2.0
"""How long the other ranks may go on once one has failed: they may be waiting for it."""


class RankPool:
    """Processes that run a function on all ranks at once; call it.

    They start with the first call. After a failure, or a call that was interrupted (pytest-timeout, Ctrl-C), nobody knows what
    they are in the middle of, so they are killed, and the next call starts others.

    Args:
        size: Number of ranks.
    """

    def __init__(self, size: int) -> None:
        self.size = size
        self._ranks: list[tuple[Any, Connection]] = []
        self._folder: tempfile.TemporaryDirectory[str] | None = None

    def __call__(self, work: Callable[..., Any], *args: Any, timeout_s: float = 120.0) -> list[Any]:
        """Return ``work(ranks, *args)`` of every rank, in the order of ranks.

        Args:
            work: A function of a module; the first argument is its ``engine.ranks.Ranks``.
            args: Picklable.
            timeout_s: For all of it.

        Raises:
            RuntimeError: With the tracebacks of the ranks that failed, or that did not come back.
        """
        try:
            if not self._ranks:
                self._start()
            task = pickle.dumps((work, args))
            for _, connection in self._ranks:
                connection.send_bytes(task)
            outcomes = self._collect(time.monotonic() + timeout_s)
            failed = [(rank, text) for rank, (done, text) in sorted(outcomes.items()) if not done]
            if failed:
                raise RuntimeError("\n".join(f"rank {rank} of {self.size}: {text}" for rank, text in failed))
            return [outcomes[rank][1] for rank in range(self.size)]
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """End the processes, whatever they do."""
        for process, connection in self._ranks:
            process.kill()
            connection.close()
        for process, _ in self._ranks:
            process.join()
        self._ranks = []
        if self._folder is not None:
            self._folder.cleanup()
            self._folder = None

    def _start(self) -> None:
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["tests.distributed.imports"])
        self._folder = tempfile.TemporaryDirectory(prefix="ranks-")
        store = Path(self._folder.name) / "store"
        for rank in range(self.size):
            ours, theirs = context.Pipe()
            process = context.Process(target=_serve, args=(rank, self.size, str(store), theirs), daemon=True)
            self._ranks.append((process, ours))
            process.start()
            theirs.close()

    def _collect(self, deadline: float) -> dict[int, tuple[bool, Any]]:
        """Return by rank whether it is done and its result, or what is known of its failure."""
        outcomes: dict[int, tuple[bool, Any]] = {}
        waiting = {connection: rank for rank, (_, connection) in enumerate(self._ranks)}
        while waiting and time.monotonic() < deadline:
            for connection in wait(list(waiting), timeout=0.2):
                rank = waiting.pop(connection)  # type: ignore[arg-type]
                try:
                    outcomes[rank] = pickle.loads(connection.recv_bytes())  # type: ignore[union-attr]
                except EOFError:
                    outcomes[rank] = (False, "its process is gone")
                if not outcomes[rank][0]:
                    deadline = min(deadline, time.monotonic() + GRACE_S)
        outcomes.update({rank: (False, "did not come back") for rank in waiting.values()})
        return outcomes


def whole_run(ranks: Any, overrides: Sequence[str]) -> int:
    """Do on this rank what ``python -m engine cluster=env`` does once a launcher has started it, and return the exit code.

    A process that imports all of torch for a run of some steps takes most of its time for that.
    """
    from engine import worker
    from engine.config.compose import compose
    from engine.train import StopRequest

    composed = compose([*overrides, "cluster=env"])
    return worker.main(composed.config, composed.recipe, ranks, StopRequest())


def _serve(rank: int, size: int, store: str, connection: Connection) -> None:
    """Run what the parent sends until it is gone."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    threading.Thread(target=lambda: (parent.join(), os._exit(1)), daemon=True).start()
    import torch
    import torch.distributed as dist

    from engine.ranks import Ranks

    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{store}",
        rank=rank,
        world_size=size,
        timeout=timedelta(seconds=COLLECTIVE_TIMEOUT_S),
    )
    ranks = Ranks.join(torch.device("cpu"))
    with contextlib.suppress(EOFError):
        while True:
            task = connection.recv_bytes()
            try:
                work, args = pickle.loads(task)
                outcome = pickle.dumps((True, work(ranks, *args)))
            except BaseException:
                outcome = pickle.dumps((False, traceback.format_exc()))
            connection.send_bytes(outcome)
            gc.collect()
            gc.freeze()  # what was imported stays: no later collection looks at all of torch
