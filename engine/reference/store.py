"""The records of a reference on disk: ``reference/KEY/sums.bin``, eight bytes a document, and what they are of in ``meta.json``.

A record holds its own check, mixed from key, document and value: what is not yet there, damaged, or of another key does not pass.
Records are written in place by one process at a time, and read without a lock by anyone who may.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from engine.checkpoint import is_disk_full
from engine.data import cache
from engine.data.samples import Summary
from engine.errors import RunError, UserError

FOLDER = "reference"
"""In the cache, beside what is tokenised."""
FILE = "sums.bin"
RECORD = np.dtype([("sum", "<f4"), ("check", "<u4")])


class Store:
    """The records of one source; nothing is made before something is written.

    Args:
        folder: Named by the key of what they are of.
        size: Number of documents.
    """

    def __init__(self, folder: Path, size: int) -> None:
        self.folder = folder
        self.file = folder / FILE
        self.size = size
        self._salt = np.uint64(int.from_bytes(hashlib.sha256(folder.name.encode()).digest()[:8], "little"))

    def read(self, documents: NDArray[np.int64]) -> NDArray[np.float32]:
        """Return the sums of some documents [D], float32 [D]; NaN where there is none, or a damaged one.

        Raises:
            UserError: If the file is there and cannot be read.
        """
        records = self._records()[documents]
        passed = records["check"] == self._check(documents, records["sum"])
        return np.where(passed, records["sum"], np.float32(np.nan)).astype(np.float32)

    def count(self) -> tuple[int, int]:
        """Return how many records are there, and how many of what is there are damaged."""
        records, documents = self._records(), np.arange(self.size)
        passed = records["check"] == self._check(documents, records["sum"])
        begun = (records["check"] != 0) | (records["sum"].view("<u4") != 0)
        return int(passed.sum()), int((begun & ~passed).sum())

    def begin(self, meta: Mapping[str, Any]) -> None:
        """Make what is not there yet; whoever writes holds the lock of the folder.

        Args:
            meta: What the records are of, as the cache describes its entries.

        Raises:
            RunError: If the disk is full.
            UserError: If they cannot be written.
        """
        with _in_a_sentence(self.file, "written"):
            if not self.folder.is_dir():
                self.folder.mkdir()
                with suppress(OSError):  # as open to others as the folder that it is in
                    shutil.copymode(self.folder.parent, self.folder)
            if not (self.folder / "meta.json").exists():
                self._publish("meta.json", json.dumps({"made": time.time(), **meta}, sort_keys=True))
            with self._opened():
                pass

    def write(self, documents: NDArray[np.int64], sums: NDArray[np.float32]) -> None:
        """Keep the sums [D] of some documents [D], in ascending order, where a process that is killed leaves them."""
        records = np.rec.fromarrays([sums, self._check(documents, sums)], dtype=RECORD)
        edges = [0, *(np.flatnonzero(np.diff(documents) != 1) + 1).tolist(), len(documents)]
        with _in_a_sentence(self.file, "written"), self._opened() as descriptor:
            for start, stop in zip(edges, edges[1:], strict=False):
                _put(descriptor, records[start:stop].tobytes(), int(documents[start]) * RECORD.itemsize)

    def clear(self) -> None:
        """Forget all that is there."""
        with _in_a_sentence(self.file, "written"), self._opened() as descriptor:
            os.ftruncate(descriptor, 0)

    def sync(self) -> None:
        """See what is written to the disk."""
        with _in_a_sentence(self.file, "written"), self._opened() as descriptor:
            os.fsync(descriptor)

    def used(self) -> None:
        """Note that a run has taken them."""
        with suppress(OSError):  # a shared cache may be read-only
            os.utime(self.folder / "meta.json")

    def _records(self) -> NDArray[np.void]:
        """Return all records, zero where the file ends early or is not there."""
        records = np.zeros(self.size, RECORD)
        with _in_a_sentence(self.file, "read"), suppress(FileNotFoundError):
            found = np.fromfile(self.file, RECORD, self.size)
            records[: len(found)] = found
        return records

    def _check(self, documents: NDArray[np.int64], sums: NDArray[np.float32]) -> NDArray[np.uint32]:
        """Mix key, document and bits of the sum; never 0, which is what a file begins with."""
        bits = np.ascontiguousarray(sums, np.float32).view(np.uint32).astype(np.uint64)
        x = (bits << np.uint64(32)) ^ documents.astype(np.uint64) ^ self._salt
        for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):  # splitmix64's
            x = (x ^ (x >> np.uint64(shift))) * np.uint64(factor)
        return (x >> np.uint64(32)).astype(np.uint32) | np.uint32(1)

    @contextmanager
    def _opened(self) -> Iterator[int]:
        """Open the file to write; it is made as open to others as its folder."""
        try:
            descriptor = os.open(
                self.file, os.O_RDWR
            )  # Linux may refuse O_CREAT on another one's (fs.protected_regular)
        except FileNotFoundError:
            descriptor = os.open(self.file, os.O_RDWR | os.O_CREAT, 0o666)
            os.fchmod(descriptor, self._mode)
        try:
            yield descriptor
        finally:
            os.close(descriptor)

    @property
    def _mode(self) -> int:
        return self.folder.stat().st_mode & 0o666

    def _publish(self, name: str, text: str) -> None:
        aside = self.folder / f".{name}.tmp"
        aside.write_text(text)
        aside.chmod(self._mode)
        os.replace(aside, self.folder / name)


class Entry(cache.Entry):
    """One folder of references; ``summary.used`` counts its records."""

    def problem(self) -> str | None:
        """Return what is wrong with its records, each by its own check; None: nothing."""
        if not self.whole:
            return super().problem()
        try:
            _, damaged = Store(self.folder, self.summary.documents).count()
        except UserError as error:
            return str(error).removesuffix(".")
        are = "record is" if damaged == 1 else "records are"
        return f"{damaged:,} {are} damaged, and will be computed again" if damaged else None


def describe(model: str, data: str, tokens: int, documents: int, key: Mapping[str, Any]) -> dict[str, Any]:
    """Return the ``meta.json`` of records.

    Args:
        model: Path of the reference.
        data: Path of the source.
        tokens: Of the source.
        documents: Of the source.
        key: What the key is a hash of.
    """
    summary = vars(Summary(format=FOLDER, documents=documents, tokens=tokens))
    return {"source": {"path": f"{model} on {data}", "model": model, "data": data}, "summary": summary, "key": key}


def entries(root: Path) -> list[Entry]:
    """Return every reference in a cache, the newest first."""
    found = []
    for entry in cache.entries(root, FOLDER):
        if entry.whole:
            with suppress(UserError):  # another one's: ``problem`` says so
                entry.summary.used, _ = Store(entry.folder, entry.summary.documents).count()
        found.append(Entry(**vars(entry)))
    return found


def _put(descriptor: int, content: bytes, place: int) -> None:
    while content:  # a disk that fills up takes a part, and refuses the rest
        done = os.pwrite(descriptor, content, place)
        content, place = content[done:], place + done


@contextmanager
def _in_a_sentence(file: Path, what: str) -> Iterator[None]:
    """Say what a file system refuses."""
    try:
        yield
    except OSError as error:
        if is_disk_full(error):
            raise RunError(
                f"{file}: the disk is full; free some space, or set data.cache_dir to a folder on another one, and repeat the "
                "command, which goes on from there."
            ) from error
        raise UserError(
            f"{file}: the reference's log-probabilities cannot be {what} there ({error.strerror}); remove it or change its "
            "permissions, or choose another data.cache_dir."
        ) from error
