"""Tokenised samples in memory-mapped Arrow files, made once for everything that can change a token.

The folder of a source is named by a hash of its rows, the tokenizer, the template, the settings and the code that turns one
into the other. It is written aside by one process at a time (others wait and then read) and renamed into place, and renamed
again before it is removed, so a crash leaves nothing that looks whole. What is there is read without a lock, by anyone who may.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import inspect
import json
import os
import shutil
import sys
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

from engine import hub, plugins
from engine.config.repository import cache_home
from engine.config.schema import RunConfig, SourceSection
from engine.data import rows
from engine.data.build import build, checksum
from engine.data.encode import Encoder
from engine.data.samples import Samples, Summary
from engine.data.template import template_text
from engine.errors import UserError

DUMMY = "builtin:dummy"
"""Path of samples that are made up as they are asked for (data=dummy)."""
NO_TOKENS = {"assemble", "batch", "cache", "dummy", "loader", "plan", "report"}
"""Modules of this package that decide neither on tokens nor on how they are kept."""
NOT_IN_KEY = {"source", "name", "path", "split", "subset", "revision", "limit", "weight", "chat_template"}
"""Keys of a source that change no token, or do so through its rows and its template."""
LIBRARIES = ("datasets", "jinja2", "pyarrow", "tokenizers", "transformers")
"""What turns files into rows, and rows into tokens."""

Say = Callable[[str], None]


def prepare(
    config: RunConfig, source: SourceSection, scratch: Path, say: Say = print, *, fresh: set[str] | None
) -> Samples:
    """Return the tokenised samples of a source, from the cache or made now.

    Args:
        config: The recipe.
        source: One of its sources.
        scratch: Folder that holds them with ``data.cache=off``.
        say: Told what is made.
        fresh: Keys of what this process has made or taken so far, to which this one is added: none of it is made twice, even
            where the recipe has everything made anew. None: nor is what another rank has made.

    Raises:
        UserError: For a row that cannot be used, naming file and line, or if no sample is left.
    """
    data = config.data
    if source.path == DUMMY:
        from engine.data import dummy  # built on Samples

        return dummy.prepare(config, source)
    template = template_text(config.model.model_copy(update=_own_template(source)))
    source = source.model_copy(update={"revision": rows.hub_revision(source)})
    key = _key(config, source, template, hub.tokenizer_folder(config.model))
    root = scratch if data.cache == "off" else cache_root(data.cache_dir)
    target = root / "tokenized" / key
    anew = data.cache != "use" and fresh is not None and key not in fresh

    def there() -> Samples | None:
        if anew or not target.is_dir():
            return None
        samples = Samples(target)  # of a run that skips bad rows it lacks those that another one is to name
        return None if samples.summary.bad and data.bad_rows == "error" else samples

    with writable(root):
        samples = None
        with suppress(UserError):  # moved away at this moment, or damaged: the lock will tell
            samples = there()
        if samples is None:
            with locked(target, "tokenises the same data", say):
                samples = there()
                if samples is None:
                    _make(target, config, source, template)
                    samples = Samples(target)
        with suppress(OSError):  # a shared cache may be read-only
            os.utime(target / "meta.json")
    if fresh is not None:
        fresh.add(key)
    return samples


def find(config: RunConfig, source: SourceSection) -> Samples | None:
    """Return the tokenised samples of a source as the cache has them, of the newest revision; None: it has none, or cannot tell.

    Nothing is made or downloaded.
    """
    if source.path == DUMMY:
        from engine.data import dummy

        return dummy.made_up(config, source, vocabulary=1)  # whatever its tokens are
    tokenizer = hub.known_tokenizer_folder(config.model)
    if tokenizer is None or config.data.cache == "off":
        return None
    template = template_text(config.model.model_copy(update=_own_template(source)))
    for entry in entries(cache_root(config.data.cache_dir)):
        if entry.source.get("path") == source.path:
            pinned = source.model_copy(update={"revision": entry.source["revision"]})
            with suppress(UserError):  # damaged: a run makes it anew
                if source.revision in (None, pinned.revision) and entry.folder.name == _key(
                    config, pinned, template, tokenizer
                ):
                    return Samples(entry.folder)
    return None


def _own_template(source: SourceSection) -> dict[str, Any]:
    """Return what a source changes of the recipe's model."""
    return {} if source.chat_template == "model" else {"chat_template": source.chat_template}


def _make(target: Path, config: RunConfig, source: SourceSection, template: str | None) -> None:
    """Tokenise a source aside; then what was in its place moves out of it, and is removed last."""
    for leftover in target.parent.glob(f"{target.name}.tmp-*"):
        shutil.rmtree(leftover, ignore_errors=True)
    encoder = Encoder(hub.load_tokenizer(config.model), template, config)
    aside, old = _beside(target), _beside(target)
    try:
        build(aside, {"made": time.time(), "source": source.model_dump()}, source, encoder, config.data)
        if target.is_dir():
            os.rename(target, old)
        os.rename(aside, target)
    finally:
        for folder in (aside, old):
            shutil.rmtree(folder, ignore_errors=True)


def _beside(target: Path) -> Path:
    """Return a name that nobody takes for a finished folder."""
    return target.with_name(f"{target.name}.tmp-{uuid.uuid4().hex[:8]}")


def cache_root(cache_dir: str | None) -> Path:
    """Return the folder of tokenised data."""
    return Path(cache_dir).expanduser() if cache_dir else cache_home()


@dataclass(frozen=True, kw_only=True)
class Entry:
    """One folder of the cache.

    Attributes:
        folder: Where it is.
        source: Its source's keys; empty for what a crash has left.
        summary: What became of its rows.
        made: When, in seconds since 1970.
        used: When a run last took it.
        num_bytes: Its size on disk.
    """

    folder: Path
    source: dict[str, Any]
    summary: Summary
    made: float
    used: float
    num_bytes: int

    @property
    def whole(self) -> bool:
        """Whether it is in place and readable; else something that a crash has left."""
        return bool(self.source)

    def problem(self) -> str | None:
        """Return what is wrong with its samples, by their checksum; None: nothing."""
        if not self.whole:
            return "left by a process that was ended"
        said = json.loads((self.folder / "meta.json").read_text())["samples.arrow"]
        file = self.folder / "samples.arrow"
        if not file.is_file():
            return "samples.arrow is missing"
        found = checksum(file)
        if found["bytes"] != said["bytes"]:
            return f"samples.arrow has {found['bytes']:,} bytes, not {said['bytes']:,}"
        return None if found == said else "samples.arrow is not what was written (CRC-32)"


def entries(root: Path, kind: str = "tokenized") -> list[Entry]:
    """Return everything of a kind in a cache, the newest first."""
    found = []
    for folder in (root / kind).glob("*"):
        with suppress(FileNotFoundError, NotADirectoryError):  # renamed or removed by a run at this moment, or a lock
            found.append(_entry(folder))
    return sorted(found, key=lambda entry: -entry.made)


def _entry(folder: Path) -> Entry:
    num_bytes = 0
    with suppress(PermissionError):  # another one's
        num_bytes = sum(f.stat().st_size for f in folder.iterdir())
    source: dict[str, Any] = {}
    summary, made, used = Summary(), folder.stat().st_mtime, folder.stat().st_mtime
    if ".tmp-" not in folder.name:
        file = folder / "meta.json"
        with suppress(OSError, ValueError, KeyError, TypeError):
            meta = json.loads(file.read_text())
            source, summary, made, used = meta["source"], Summary(**meta["summary"]), meta["made"], file.stat().st_mtime
    return Entry(folder=folder, source=source, summary=summary, made=made, used=used, num_bytes=num_bytes)


def remove(entry: Entry) -> bool:
    """Remove an entry, unless a process is writing it; a run that has it open keeps its data.

    Raises:
        OSError: If this user may not, or not all of it could be removed; it is then no longer in its place.
    """
    folder = entry.folder
    target = folder.with_name(folder.name.partition(".tmp-")[0])
    with _lock(target) as lock:
        if not _take(lock, target, wait=False):
            return False
        if not os.access(folder, os.R_OK | os.W_OK | os.X_OK):  # it could be moved, and not be emptied
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(folder))
        if folder == target:
            folder = _beside(target)
            os.rename(target, folder)
        shutil.rmtree(folder)
    return True


@contextmanager
def writable(root: Path) -> Iterator[None]:
    """Turn the refusal of a file system to write below the cache into a sentence."""
    try:
        yield
    except OSError as error:
        refused = error.errno in (errno.EACCES, errno.EPERM, errno.EROFS, errno.EEXIST, errno.ENOTDIR)
        nowhere = error.errno == errno.ENOENT and root.is_relative_to(error.filename or "")  # below /proc, say
        if not refused and not nowhere:
            raise
        raise UserError(
            f"data.cache_dir={root}: {error.filename or root} is no folder that can be written to; choose another folder."
        ) from error


@contextmanager
def locked(target: Path, work: str, say: Say) -> Iterator[None]:
    """Keep others from writing the same folder.

    Args:
        target: The folder.
        work: What another run does that has the lock, as the end of a sentence.
        say: Told of it.
    """
    if not target.parent.is_dir():
        target.parent.mkdir(parents=True, exist_ok=True)
        with suppress(OSError):  # as open to others as the folder that it is in
            shutil.copymode(target.parent.parent, target.parent)
    with _lock(target) as lock:
        if not _take(lock, target, wait=False):
            say(f"waiting for another run that {work}")
            _take(lock, target, wait=True)
        yield


@contextmanager
def _lock(target: Path) -> Iterator[int]:
    """Open the lock of a folder; all who share the cache may, whoever made it and with whatever umask."""
    file = target.with_name(f"{target.name}.lock")
    try:
        lock = os.open(file, os.O_RDWR)  # Linux may refuse O_CREAT on another one's file (fs.protected_regular)
    except FileNotFoundError:
        lock = os.open(file, os.O_RDWR | os.O_CREAT, 0o666)
        with suppress(OSError):
            os.fchmod(lock, 0o666)
    try:
        yield lock
    finally:
        os.close(lock)


def _take(lock: int, target: Path, *, wait: bool) -> bool:
    """Take a lock unless another process has it; unlike flock's, it is not inherited by the processes that tokenise."""
    try:
        fcntl.lockf(lock, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in (errno.EAGAIN, errno.EACCES):
            return False
        raise UserError(
            f"data.cache_dir={target.parent.parent}: its file system has no locks ({error.strerror}); choose a folder on another "
            "one."
        ) from error
    return True


def _key(config: RunConfig, source: SourceSection, template: str | None, tokenizer: Path) -> str:
    """Return the hash of all that can change a token, or how tokens are kept."""
    data, model = config.data, config.model
    files = {f for f in Path(__file__).parent.glob("*.py") if f.stem not in NO_TOKENS}
    patterns = [*hub.TOKENIZER_FILES, "*.py"] if model.trust_remote_code else hub.TOKENIZER_FILES
    files |= {f for pattern in patterns for f in tokenizer.glob(pattern) if f.is_file()}
    if source.reader is not None and ":" in source.reader:
        files |= _code(plugins.load(source.reader, "data.reader"), source.reader.partition(":")[0])
    settings: dict[str, Any] = {}
    with suppress(FileNotFoundError, ValueError):
        settings = json.loads((tokenizer / "config.json").read_text())
    parts = {
        "files": sorted((f.name, hashlib.sha256(f.read_bytes()).hexdigest()) for f in files),
        "tokenizer": [settings.get(name) for name in ("model_type", "tokenizer_class", "auto_map")],
        "libraries": [metadata.version(name) for name in LIBRARIES],
        "rows": [rows.fingerprint(source), source.split.count("+")],  # the sum of two splits of a file is an error
        "source": source.model_dump(exclude=NOT_IN_KEY),
        "template": [template, model.template_args, model.trust_remote_code],
        "settings": [data.max_length, data.overlong, data.train_on, data.add_bos, data.add_eos],
        "algorithm": config.algorithm.name,  # pairs or conversations
    }
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:24]


def _code(function: Any, module: str) -> set[Path]:
    """Return the files that a reader of the user's own is written in: where it is named, and where it is defined."""
    found = {sys.modules[module].__file__}
    with suppress(TypeError):  # no function
        found.add(inspect.getsourcefile(inspect.unwrap(function)))
    return {Path(file) for file in found if file}
