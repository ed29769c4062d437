"""The ranks of a run: which one this is, and the few figures and words that they exchange on the host."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from engine.errors import EXIT_ERROR, RunError

T = TypeVar("T")
PATIENCE = timedelta(days=1)
"""How long ranks wait for one that tokenises or writes; that one is gone shows at once."""


class PeerFailed(RunError):
    """Another rank has failed and says why; this one ends in silence."""

    def __init__(self, exit_code: int = EXIT_ERROR) -> None:
        super().__init__("")
        self.exit_code = exit_code


@dataclass(frozen=True, kw_only=True)
class Ranks:
    """This process among the processes of a run; every method but ``blame`` is to be called by all of them together."""

    rank: int = 0
    size: int = 1
    device: torch.device = torch.device("cpu")
    """The device of this rank."""
    group: Any = None
    """Process group for tensors on the host; None with one rank."""

    @classmethod
    def join(cls, device: torch.device) -> Ranks:
        """Return the ranks of the process group that the executor has set up."""
        group = dist.new_group(backend="gloo", timeout=PATIENCE)
        return cls(rank=dist.get_rank(), size=dist.get_world_size(), device=device, group=group)

    @property
    def main(self) -> bool:
        """Whether this rank writes what a run has once: folder, metrics, console."""
        return self.rank == 0

    def sum(self, values: Sequence[float], copies: int = 1) -> list[float]:
        """Return the sums over ranks.

        Args:
            values: Of this rank.
            copies: How many ranks have the same values, which count once.
        """
        sums = self._reduce(values, dist.ReduceOp.SUM)
        return sums if copies == 1 else [total / copies for total in sums]

    def max(self, values: Sequence[float]) -> list[float]:
        """Return the maxima over ranks."""
        return self._reduce(values, dist.ReduceOp.MAX)

    def gather(self, value: Any) -> list[Any]:
        """Return every rank's value, in the order of ranks; a small object."""
        if self.size == 1:
            return [value]
        found: list[Any] = [None] * self.size
        dist.all_gather_object(found, value, group=self.group)
        return found

    def together(self, work: Callable[[], T]) -> T:
        """Do something that may fail on some ranks alone; where it does, all of them end, and none waits for another.

        Args:
            work: Free of communication, or failing on every rank alike.

        Raises:
            PeerFailed: If it failed on another rank only.
        """
        error: Exception | None = None
        try:
            result = work()
        except Exception as raised:
            error = raised
        try:
            codes = self.gather(None if error is None else getattr(error, "exit_code", EXIT_ERROR))
        finally:
            if error is not None:
                raise error
        failed = [code for code in codes if code is not None]
        if failed:
            raise PeerFailed(max(failed))
        return result

    def first(self, work: Callable[[], T]) -> T:
        """Do something on the first rank alone and return its result, which is sent to all of them."""
        result: list[Any] = [self.together(lambda: work() if self.main else None)]
        if self.size > 1:
            dist.broadcast_object_list(result, src=0, group=self.group)
        found: T = result[0]
        return found

    def blame(self) -> bool:
        """Whether this rank is the first to report a failure; later ones fail because of it."""
        if self.size > 1:
            with suppress(RuntimeError):  # the rank that keeps the count is gone: it was the first
                count: int = dist.distributed_c10d._get_default_store().add("anneal/failures", 1)
                return count == 1
        return True

    def _reduce(self, values: Sequence[float], how: Any) -> list[float]:
        if self.size == 1:
            return list(values)
        reduced = torch.tensor(values, dtype=torch.float64)
        dist.all_reduce(reduced, how, group=self.group)
        return reduced.tolist()


def is_lost_peer(error: BaseException) -> bool:
    """Tell a communication that broke because another rank is gone from a failure of this rank's own."""
    words = str(error)
    return isinstance(error, RuntimeError) and any(
        sign in words
        for sign in ("Connection closed by peer", "Connection reset", "gloo", "NCCL", "TCPStore", "Broken pipe")
    )
