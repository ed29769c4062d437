"""``python -m engine.cache list|verify|prune|build``: tokenised data and references looked at, checked, cleared out, made ahead."""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from engine.columns import columns
from engine.data import cache
from engine.data.cache import Entry
from engine.errors import EXIT_DONE, EXIT_ERROR, Parser, UserError, command, run_command
from engine.reference import store

HELP = """\
Usage: python -m engine.cache list   [--cache-dir DIR]       show what is there
       python -m engine.cache verify [--cache-dir DIR]       read every entry and compare its checksum
       python -m engine.cache prune  [--cache-dir DIR] [--older-than DAYS] [--max-gb N] [--dry-run]
                                                             remove what crashes left, and entries long not used
       python -m engine.cache build  [--cache-dir DIR] [group=choice …] [key=value …]
                                                             tokenise a recipe's data now, without training

--cache-dir is $ANNEAL_CACHE or ~/.cache/anneal unless given.
"""
DAY_S = 86_400.0
OLD_DAYS = 30.0
PATH_WIDTH = 44


def show(options: argparse.Namespace) -> int:
    """Print the entries as a table."""
    root = cache.cache_root(options.cache_dir)
    found = _found(root)
    if not found:
        print(f"{root}: the cache is empty.")
        return EXIT_DONE
    rows = [("key", "format", "rows used", "documents", "tokens", "size", "age", "path")]
    for entry in found:
        made = (_size(entry.num_bytes), _age(time.time() - entry.made))
        s = entry.summary
        if entry.whole:
            counts = (f"{s.used:,}", f"{s.documents:,}", f"{s.tokens:,}")
            rows.append((_key(entry), s.format, *counts, *made, _short(_path(entry))))
        else:
            rows.append((_key(entry), "–", "–", "–", "–", *made, "unfinished: left by a crash, or being written"))
    for line in columns(rows, left={0, 1, -1}):
        print(line)
    print(f"{_entries(len(found))}, {_size(_total(found))} in {root}")
    return EXIT_DONE


def verify(options: argparse.Namespace) -> int:
    """Compare every entry with its checksum, and say which is damaged."""
    root = cache.cache_root(options.cache_dir)
    found = _found(root)
    whole, damaged = [], 0
    for entry in found:
        if _is_aside(entry):
            print(
                f"{entry.folder}: unfinished, left by a crash or being written; python -m engine.cache prune removes it."
            )
            continue
        problem = _problem(entry)
        if problem is None:
            whole.append(entry)
            continue
        damaged += 1
        of = f" ({_path(entry)})" if entry.whole else ""
        print(f"{entry.folder}{of}: {problem}; remove the folder, and the next run that needs it makes it anew.")
    print(f"{root}: {_entries(len(whole))} whole ({_size(_total(whole))}), {damaged:,} damaged.")
    return EXIT_ERROR if damaged else EXIT_DONE


def prune(options: argparse.Namespace) -> int:
    """Remove what crashes left, entries long not used, then the longest not used until the rest is small enough."""
    root = cache.cache_root(options.cache_dir)
    for flag, value in (("--older-than", options.older_than), ("--max-gb", options.max_gb)):
        if value is not None and not value >= 0:
            raise UserError(f"{flag} {value:g}: give 0 or more.")
    found = sorted(_found(root), key=lambda entry: (entry.whole, entry.used))
    left = _total(found)
    freed, removed, failed = 0, 0, 0
    for entry in found:
        why = _why(entry, options, left)
        if why is None:
            continue
        name = f"{_key(entry)} ({_path(entry)})" if entry.whole else entry.folder.name
        try:
            if not options.dry_run and not cache.remove(entry):
                print(f"left alone: {name}, which a run is writing")
                continue
        except FileNotFoundError:  # another one has removed it
            pass
        except OSError as error:
            print(f"cannot be removed: {name} ({error.strerror}); ask the owner of {error.filename or entry.folder}")
            failed += 1
            continue
        print(f"{'would remove' if options.dry_run else 'removed'}: {name}, {_size(entry.num_bytes)}, {why}")
        left, freed, removed = left - entry.num_bytes, freed + entry.num_bytes, removed + 1
    done = "would be removed and" if options.dry_run else "removed,"
    print(f"{root}: {_entries(removed)} {done} {_size(freed)} freed; {_size(left)} left.")
    return EXIT_ERROR if failed else EXIT_DONE


def build(options: argparse.Namespace) -> int:
    """Tokenise a recipe's data into the cache."""
    from engine.config import compose
    from engine.data.assemble import assemble

    config = compose.compose(compose.with_quickstart(options.overrides)).config
    if config.data.cache == "off":
        raise UserError("data.cache=off: there is no cache to build; leave it out, or set data.cache=rebuild.")
    if options.cache_dir is not None:
        config = config.model_copy(update={"data": config.data.model_copy(update={"cache_dir": options.cache_dir})})
    with tempfile.TemporaryDirectory(prefix="anneal-") as scratch:
        data = assemble(config, Path(scratch))
    for samples in data.sources.values():
        if samples.folder is not None:
            print(f"in the cache: {samples.folder}")
    return EXIT_DONE


def _found(root: Path) -> list[Entry]:
    """Return everything in a cache, the newest first."""
    return sorted([*cache.entries(root), *store.entries(root)], key=lambda entry: -entry.made)


def _why(entry: Entry, options: argparse.Namespace, left: int) -> str | None:
    """Say why an entry is to go; None: it stays."""
    if not entry.whole:
        return "left by a crash" if _is_aside(entry) else "not readable"
    days = (time.time() - entry.used) / DAY_S
    if days > options.older_than:
        return f"not used for {days:.0f} days"
    if options.max_gb is not None and left > options.max_gb * 1e9:
        return f"the longest not used of more than {options.max_gb:g} GB"
    return None


def _problem(entry: Entry) -> str | None:
    """Return what is wrong with an entry."""
    if not entry.whole:
        return "meta.json cannot be read"
    try:
        return entry.problem()
    except OSError as error:
        return f"cannot be read ({error.strerror})"
    except KeyError:
        return "meta.json has no checksum"


def _is_aside(entry: Entry) -> bool:
    """Tell what is written aside, or was when its process ended, from what is in its place."""
    return ".tmp-" in entry.folder.name


def _key(entry: Entry) -> str:
    return entry.folder.name[:8]


def _path(entry: Entry) -> str:
    return str(entry.source.get("path", ""))


def _total(found: Sequence[Entry]) -> int:
    return sum(entry.num_bytes for entry in found)


def _entries(count: int) -> str:
    return f"{count:,} entr{'y' if count == 1 else 'ies'}"


def _short(path: str) -> str:
    """Return a path without its middle, if it is long."""
    if len(path) <= PATH_WIDTH:
        return path
    head = PATH_WIDTH // 3
    return f"{path[:head]}…{path[head + 1 - PATH_WIDTH :]}"


def _size(num_bytes: int) -> str:
    """Return a number of bytes as a person says it."""
    value, units = float(num_bytes), ["B", "kB", "MB", "GB", "TB"]
    while value >= 999.5 and len(units) > 1:
        value, units = value / 1000, units[1:]
    return f"{value:.0f} {units[0]}" if units[0] == "B" or value >= 99.5 else f"{value:.1f} {units[0]}"


def _age(seconds: float) -> str:
    """Return a time as a person says it."""
    for unit, length in (("day", DAY_S), ("hour", 3600.0), ("minute", 60.0)):
        count = int(seconds / length)
        if count:
            return f"{count:,} {unit}{'s' * (count > 1)}"
    return "now"


COMMANDS: dict[str, Callable[[argparse.Namespace], int]] = {
    "list": show,
    "verify": verify,
    "prune": prune,
    "build": build,
}


def _parser(command: str) -> Parser:
    parser = Parser(prog=f"python -m engine.cache {command}", description=COMMANDS[command].__doc__, allow_abbrev=False)
    parser.add_argument("--cache-dir", metavar="DIR", help="folder of tokenised data; $ANNEAL_CACHE or ~/.cache/anneal")
    if command == "prune":
        parser.add_argument(
            "--older-than", type=float, default=OLD_DAYS, metavar="DAYS", help="days without use (%(default)g)"
        )
        parser.add_argument("--max-gb", type=float, metavar="N", help="then the longest not used, until N GB are left")
        parser.add_argument("--dry-run", action="store_true", help="say what would be removed, and remove nothing")
    if command == "build":
        parser.add_argument("overrides", nargs="*", metavar="OVERRIDE", help="as for python -m engine")
    return parser


@command
def main(words: list[str]) -> int:
    """Run the command line."""
    return run_command(words, HELP, COMMANDS, _parser)


if __name__ == "__main__":
    sys.exit(main())
