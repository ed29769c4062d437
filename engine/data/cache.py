"""Tokenised samples in a memory-mapped Arrow file, made once for everything that can change a token.

The folder of a data set is named by a hash of the rows, the tokenizer, the template and the settings. It is written aside by
one process at a time (others wait and then read) and renamed into place, so a crash leaves nothing that looks whole.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import os
import shutil
import sys
import uuid
from collections import Counter, deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass, field
from functools import partial
from itertools import chain, islice
from multiprocessing import get_context, parent_process
from pathlib import Path
from threading import Thread
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from engine import hub
from engine.config.schema import RunConfig
from engine.data import readers, rows
from engine.data.batch import trained_positions
from engine.data.encode import Encoder
from engine.data.template import template_text
from engine.errors import RunError, UserError
from engine.types import Sample

FORMAT = 2
"""Raised whenever the meaning of a cached file changes."""
ROWS_PER_BATCH = 512
DUMMY = "builtin:dummy"
"""Path of samples that are made up as they are asked for (data=dummy)."""
SCHEMA = pa.schema(
    {
        "input_ids": pa.list_(pa.int32()),
        "trained": pa.list_(pa.int32()),
        "length": pa.int32(),
    }
)

Say = Callable[[str], None]


@dataclass(kw_only=True)
class Summary:
    """What became of the rows of a source."""

    reader: str = ""
    read: int = 0
    used: int = 0
    cut: int = 0
    dropped: dict[str, int] = field(default_factory=dict)
    tokens: int = 0
    trained_tokens: int = 0
    longest: int = 0

    def sentence(self, name: str) -> str:
        """Return the figures as one line."""
        lost = "".join(f", {n:,} dropped ({reason})" for reason, n in self.dropped.items())
        cut = f", {self.cut:,} cut" if self.cut else ""
        share = self.trained_tokens / max(1, self.tokens)
        return (
            f"{name}: {self.used:,} of {self.read:,} rows used{lost}{cut}; {self.tokens:,} tokens, {share:.1%} trained, "
            f"longest {self.longest:,} (format {self.reader})"
        )


class Samples:
    """Tokenised samples, read from disk as they are asked for.

    Args:
        folder: A folder that ``prepare`` made.
    """

    def __init__(self, folder: Path) -> None:
        try:
            meta = json.loads((folder / "meta.json").read_text())
            table = pa.ipc.open_file(pa.memory_map(str(folder / "samples.arrow"))).read_all()
        except (OSError, ValueError, pa.ArrowInvalid) as error:
            raise UserError(
                f"{folder}: not a whole cache of tokenised data ({error}); set data.cache=rebuild."
            ) from error
        self.summary = Summary(**meta["summary"])
        self.fingerprint: str = meta["fingerprint"]
        self.lengths = np.concatenate([_view(chunk) for chunk in table["length"].chunks])
        self._columns = [
            [(_view(chunk.offsets), _view(chunk.values)) for chunk in table[name].chunks]
            for name in ("input_ids", "trained")
        ]
        self._starts = np.cumsum([0, *(len(chunk) for chunk in table["length"].chunks)])

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, i: int) -> Sample:
        chunk = int(np.searchsorted(self._starts, i, "right")) - 1
        row = i - int(self._starts[chunk])
        (ids, trained) = (
            values[offsets[row] : offsets[row + 1]] for offsets, values in (c[chunk] for c in self._columns)
        )
        return Sample(ids, trained.reshape(-1, 2))


def prepare(config: RunConfig, split: str, scratch: Path, say: Say = print, *, made: bool = False) -> Samples:
    """Return the tokenised samples of ``train`` or ``val``, from the cache or made now.

    Args:
        config: The recipe.
        split: "train" or "val".
        scratch: Folder that holds them with ``data.cache=off``.
        say: Told what is made and what became of the rows.
        made: Take what another rank has just made, even where the recipe has it made anew.

    Raises:
        UserError: For a row that cannot be used, naming file and line, or if no sample is left.
    """
    data = config.data
    path = data.train_path if split == "train" else data.val_path
    assert path is not None
    name = "data" if split == "train" else "validation data"
    if path == DUMMY:
        from engine.data import dummy  # built on this module

        made_up = dummy.prepare(config, split)
        say(made_up.summary.sentence(name))
        return made_up
    hub_split = data.train_split if split == "train" else data.val_split
    template = template_text(config.model)
    revision = rows.hub_revision(path)
    key = _key(config, path, hub_split, revision, template)
    root = scratch if data.cache == "off" else cache_root(data.cache_dir)
    target = root / "tokenized" / key
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with (target.parent / f"{key}.lock").open("w") as lock:
            try:
                fcntl.lockf(
                    lock, fcntl.LOCK_EX | fcntl.LOCK_NB
                )  # unlike flock's, not inherited by the processes that tokenise
            except BlockingIOError:
                say("waiting for another run that tokenises the same data")
                fcntl.lockf(lock, fcntl.LOCK_EX)
            if not target.is_dir() or (data.cache != "use" and not made):
                for leftover in target.parent.glob(f"{key}.tmp-*"):
                    shutil.rmtree(leftover)
                encoder = Encoder(hub.load_tokenizer(config.model), template, config)
                aside = target.with_name(f"{key}.tmp-{uuid.uuid4().hex[:8]}")
                try:
                    _build(aside, key, rows.read(path, hub_split, revision), path, encoder, config)
                    if target.is_dir():
                        shutil.rmtree(target)
                    os.rename(aside, target)
                finally:
                    shutil.rmtree(aside, ignore_errors=True)
            samples = Samples(target)
    except OSError as error:
        if error.errno not in (errno.EACCES, errno.EPERM, errno.EROFS, errno.EEXIST, errno.ENOTDIR):
            raise
        raise UserError(
            f"data.cache_dir={root}: {error.filename or root} is no folder that can be written to; choose another folder."
        ) from error
    say(samples.summary.sentence(name))
    return samples


def cache_root(cache_dir: str | None) -> Path:
    """Return the folder of tokenised data."""
    return Path(cache_dir or os.environ.get("ANNEAL_CACHE") or "~/.cache/anneal").expanduser()


def _build(target: Path, key: str, source: Iterator[rows.Row], path: str, encoder: Encoder, config: RunConfig) -> None:
    """Tokenise a source into a folder; everything is on disk when it returns."""
    first = next(source, None)
    if first is None:
        raise UserError(f"{path}: there are no rows.")
    name, reader = readers.find(config.data.reader, first[1], path)
    summary = Summary(reader=name)
    dropped: Counter[str] = Counter()
    target.mkdir()
    work = partial(_encode_rows, reader, encoder)
    with (target / "samples.arrow").open("wb") as file:
        with pa.ipc.new_file(file, SCHEMA) as writer:
            for batch, fates, num_trained in _progress(
                _parallel(work, chain([first], source), config.data.num_workers), path
            ):
                writer.write_batch(batch)
                lengths = _view(batch["length"])
                summary.read += len(fates)
                summary.used += len(lengths)
                summary.cut += fates.count("cut")
                dropped.update(f for f in fates if f not in ("", "cut"))
                summary.tokens += int(lengths.sum())
                summary.trained_tokens += num_trained
                summary.longest = max(summary.longest, int(lengths.max(initial=0)))
        file.flush()
        os.fsync(file.fileno())
    summary.dropped = dict(dropped)
    if not summary.used:
        raise UserError(
            f"{path}: no sample is left of {summary.read:,} rows ({_reasons(dropped)}); raise data.max_length."
        )
    with (target / "meta.json").open("w") as file_:
        json.dump({"fingerprint": key, "summary": asdict(summary)}, file_)
        file_.flush()
        os.fsync(file_.fileno())


def _encode_rows(
    reader: readers.Reader, encoder: Encoder, batch: Sequence[rows.Row]
) -> tuple[pa.RecordBatch, list[str], int]:
    """Encode some rows.

    Returns:
        The samples, for each row its fate ("" and "cut": used; else why it was dropped), and the number of trained tokens.
    """
    samples, fates = [], []
    for place, row in batch:
        try:
            sample, fate = encoder(_read(reader, row))
        except readers.RowError as error:
            raise UserError(f"{place}: {error}.") from error
        fates.append(fate)
        if sample is not None:
            samples.append(sample)
    columns: Mapping[str, Any] = {
        "input_ids": [s.input_ids for s in samples],
        "trained": [s.trained.reshape(-1) for s in samples],
        "length": [len(s.input_ids) for s in samples],
    }
    num_trained = sum(len(trained_positions(s)) for s in samples)
    return pa.RecordBatch.from_pydict(columns, SCHEMA), fates, num_trained


def _read(reader: readers.Reader, row: Mapping[str, Any]) -> list[readers.Message]:
    try:
        return reader(row)
    except readers.RowError:
        raise
    except Exception as error:  # a reader of the user's own may raise anything
        raise readers.RowError(
            f"data.reader failed on this row ({error!r}); it raises RowError on rows it cannot use"
        ) from error


def _parallel(work: Callable[[Any], Any], source: Iterator[rows.Row], num_workers: int | None) -> Iterator[Any]:
    """Map batches of rows in order, in processes of their own where there are many."""
    global _work
    batches = iter(lambda: tuple(islice(source, ROWS_PER_BATCH)), ())
    head = list(islice(batches, 2))
    workers = num_workers or min(8, os.cpu_count() or 1)
    if len(head) < 2 or workers == 1:
        yield from map(work, chain(head, batches))
        return
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    _work = work  # inherited by fork: neither tokenizer nor template is pickled
    waiting: deque[Future[Any]] = deque()
    pool = ProcessPoolExecutor(workers, mp_context=get_context("fork"), initializer=_end_with_parent)
    try:
        for batch in chain(head, batches):
            waiting.append(pool.submit(_do_work, batch))
            if len(waiting) > 3 * workers:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    except BrokenProcessPool as error:
        raise RunError("a process that tokenises was killed (out of memory?); lower data.num_workers.") from error
    finally:
        pool.shutdown(wait=True, cancel_futures=True)
        _work = None


_work: Callable[[Any], Any] | None = None


def _end_with_parent() -> None:
    """End this process when the one that started it is killed: the pool itself would wait for work for ever."""

    def watch() -> None:
        parent = parent_process()
        assert parent is not None
        parent.join()
        os._exit(1)

    Thread(target=watch, daemon=True).start()


def _do_work(batch: Any) -> Any:
    assert _work is not None
    return _work(batch)


def _progress(results: Iterator[Any], path: str) -> Iterator[Any]:
    """Show rows as they are done, on a terminal."""
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (
        TextColumn("tokenizing {task.description}"),
        BarColumn(),
        TextColumn("{task.completed:,} rows"),
        TimeElapsedColumn(),
    )
    with Progress(*columns, transient=True, disable=not sys.stderr.isatty()) as progress:
        task = progress.add_task(Path(path).name, total=None)
        for result in results:
            progress.advance(task, len(result[1]))
            yield result


def _key(config: RunConfig, path: str, split: str, revision: str | None, template: str | None) -> str:
    """Return the hash of all that can change a token."""
    data = config.data
    tokenizer = hub.tokenizer_folder(config.model)
    files = {
        f.name: hashlib.sha256(f.read_bytes()).hexdigest()
        for pattern in hub.TOKENIZER_FILES
        for f in sorted(tokenizer.glob(pattern))
    }
    reader = data.reader
    if reader is not None and ":" in reader:
        readers.find(reader, {}, path)
        source = sys.modules[reader.partition(":")[0]].__file__
        files[reader] = hashlib.sha256(Path(source).read_bytes()).hexdigest() if source else ""
    parts = {
        "format": FORMAT,
        "rows": rows.fingerprint(path, split, revision),
        "tokenizer": files,
        "template": template,
        "template_args": config.model.template_args,
        "settings": [reader, data.max_length, data.overlong, data.train_on, data.add_bos, data.add_eos],
    }
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:24]


def _view(array: pa.Array) -> NDArray[np.int32]:
    """Return an int32 array as a view of the mapped file (``to_numpy`` would import pandas)."""
    return np.frombuffer(array.buffers()[1], np.int32)[array.offset : array.offset + len(array)]


def _reasons(dropped: Mapping[str, int]) -> str:
    return ", ".join(f"{n:,} {reason}" for reason, n in dropped.items())
