"""The cache command, on a cache that holds two small sources."""

from __future__ import annotations

import errno
import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from engine import cache as command
from engine.data import cache

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Run:
    """Run the command; returns exit code, output and errors."""

    def call(*words: object) -> tuple[int, str, str]:
        code = command.main([str(w) for w in words])
        out, err = capsys.readouterr()
        return code, out, err

    return call


@pytest.fixture
def root(base: list[str], run: Run, tmp_path: Path) -> Path:
    """A cache with two entries, of the same rows at two lengths, made two days and an hour ago."""
    root = tmp_path / "cache"
    for length, age_s in ((256, 48 * 3600), (128, 3600)):
        code, out, err = run("build", *base, f"data.max_length={length}", "--cache-dir", root)
        assert code == 0, err
        assert "rows used" in out
        age(Path(out.split("in the cache: ")[1].strip()), age_s)
    return root


def age(entry: Path, seconds: float) -> None:
    """Make an entry older."""
    meta = entry / "meta.json"
    then = time.time() - seconds
    meta.write_text(json.dumps({**json.loads(meta.read_text()), "made": then}))
    os.utime(meta, (then, then))


def leave(root: Path) -> Path:
    """Put there what a crash leaves."""
    folder = root / "tokenized" / f"{'0' * 24}.tmp-12345678"
    folder.mkdir(parents=True)
    (folder / "samples.arrow").write_bytes(bytes(5_000))
    return folder


def folders(root: Path) -> list[Path]:
    return [entry.folder for entry in cache.entries(root)]


@contextmanager
def locked(entry: Path) -> Iterator[None]:
    """Hold an entry's lock in another process, as a run does that writes it."""
    lock = entry.parent / f"{entry.name.partition('.tmp-')[0]}.lock"
    code = (
        f"import fcntl; f = open({str(lock)!r}, 'w'); fcntl.lockf(f, fcntl.LOCK_EX); print('held', flush=True); input()"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as other:
        assert other.stdout is not None and other.stdin is not None
        assert other.stdout.readline() == "held\n"
        yield
        other.stdin.write("\n")


def test_build_makes_what_a_run_takes(base: list[str], run: Run, root: Path) -> None:
    before = folders(root)
    made = [(folder / "samples.arrow").stat().st_mtime_ns for folder in before]
    assert run("build", *base, f"data.cache_dir={root}")[0] == 0
    assert folders(root) == before == sorted(before, key=before.index)
    assert [(folder / "samples.arrow").stat().st_mtime_ns for folder in before] == made
    code, _, err = run("build", *base, "data.cache=off")
    assert code == 2 and err.startswith("error: data.cache=off: ")
    code, _, err = run("build", *base, "data.max_lenght=3")
    assert code == 2 and "data.max_length" in err


def test_list_shows_every_entry_and_a_total(run: Run, root: Path, rows_file: Path, tmp_path: Path) -> None:
    leave(root)
    code, out, _ = run("list", "--cache-dir", root)
    lines = out.splitlines()
    assert code == 0 and len(lines) == 5
    assert lines[0].split() == ["key", "format", "rows", "used", "documents", "tokens", "size", "age", "path"]
    newest, oldest = folders(root)[1:]
    assert "unfinished" in lines[1]
    assert lines[2].startswith(newest.name[:8]) and "1 hour" in lines[2]
    assert lines[3].startswith(oldest.name[:8]) and "2 days" in lines[3] and "messages" in lines[3]
    shown = lines[3].split()[-1]
    assert shown == str(rows_file) or ("…" in shown and str(rows_file).endswith(shown.partition("…")[2]))
    assert re.fullmatch(rf"3 entries, [\d.]+ kB in {root}", lines[4])
    assert run("list", "--cache-dir", tmp_path / "none")[:2] == (0, f"{tmp_path / 'none'}: the cache is empty.\n")


def test_verify_finds_what_is_damaged(run: Run, root: Path) -> None:
    code, out, _ = run("verify", "--cache-dir", root)
    assert code == 0 and "2 entries whole" in out and "0 damaged" in out
    leave(root)
    code, out, _ = run("verify", "--cache-dir", root)
    assert code == 0 and "prune" in out
    flipped, cut = folders(root)[1:]
    file = flipped / "samples.arrow"
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    os.truncate(cut / "samples.arrow", 100)
    code, out, _ = run("verify", "--cache-dir", root)
    assert code == 1 and "2 damaged" in out
    assert f"{flipped} (" in out and "CRC-32" in out and f"{cut} (" in out and "has 100 bytes" in out
    assert out.count("makes it anew") == 2
    (cut / "meta.json").write_text("{")
    code, out, _ = run("verify", "--cache-dir", root)
    assert code == 1 and f"{cut}: meta.json cannot be read" in out


def test_prune_removes_leftovers_and_what_is_old(run: Run, root: Path) -> None:
    left = leave(root)
    before = folders(root)
    newest, oldest = before[1:]
    code, out, _ = run("prune", "--cache-dir", root, "--older-than", 1, "--dry-run")
    assert code == 0 and folders(root) == before
    assert f"would remove: {left.name}, 5.0 kB, left by a crash" in out and f"would remove: {oldest.name[:8]}" in out
    assert "2 entries would be removed" in out and f"would remove: {newest.name[:8]}" not in out
    code, out, _ = run("prune", "--cache-dir", root)
    assert code == 0 and folders(root) == [newest, oldest] and "1 entry removed, 5.0 kB freed" in out
    code, out, _ = run("prune", "--cache-dir", root, "--older-than", 1)
    assert code == 0 and folders(root) == [newest] and "not used for 2 days" in out


def test_prune_takes_the_longest_not_used_until_little_is_left(run: Run, root: Path) -> None:
    newest, oldest = cache.entries(root)
    os.utime(oldest.folder / "meta.json")  # used just now
    limit = (newest.num_bytes + oldest.num_bytes - 1) / 1e9
    code, out, _ = run("prune", "--cache-dir", root, f"--max-gb={limit}")
    assert code == 0 and folders(root) == [oldest.folder] and f"removed: {newest.folder.name[:8]}" in out
    run("prune", "--cache-dir", root, "--max-gb=0")
    assert not folders(root)


def test_prune_leaves_alone_what_is_being_written(run: Run, root: Path) -> None:
    left = leave(root)
    oldest = folders(root)[-1]
    with locked(left), locked(oldest):
        code, out, _ = run("prune", "--cache-dir", root, "--older-than", 1)
        assert code == 0 and {left, oldest} <= set(folders(root))
        assert out.count("left alone: ") == 2 and "0 entries removed, 0 B freed" in out
    run("prune", "--cache-dir", root, "--older-than", 1)
    assert len(folders(root)) == 1


def test_prune_names_what_it_cannot_remove_and_goes_on(run: Run, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    newest, oldest = folders(root)
    remove = cache.remove

    def refuse(entry: cache.Entry) -> bool:
        if entry.folder == oldest:
            raise PermissionError(errno.EACCES, "Permission denied", str(oldest))
        return remove(entry)

    with monkeypatch.context() as patched:
        patched.setattr("engine.data.cache.remove", refuse)
        code, out, _ = run("prune", "--cache-dir", root, "--older-than", 0)
    assert code == 1 and folders(root) == [oldest]
    assert f"cannot be removed: {oldest.name[:8]} (" in out
    assert f"(Permission denied); ask the owner of {oldest}\n" in out
    assert f"removed: {newest.name[:8]}" in out and "1 entry removed" in out
    assert run("prune", "--cache-dir", root, "--older-than", 0)[0] == 0 and not folders(root)


@pytest.mark.parametrize("what", ["access", "iterdir"])
def test_another_users_entry_stays_in_its_place(
    what: str, run: Run, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is in a folder that all may write, so that it could be moved, but not emptied."""
    before = folders(root)
    if what == "access":
        monkeypatch.setattr("engine.data.cache.os.access", lambda *_: False)
    else:

        def refuse(folder: Path) -> Iterator[Path]:
            code = errno.EACCES if folder.is_dir() else errno.ENOTDIR
            raise OSError(code, os.strerror(code), str(folder))

        monkeypatch.setattr(Path, "iterdir", refuse)
        assert run("list", "--cache-dir", root)[0] == 0
        monkeypatch.setattr("engine.data.cache.os.access", lambda *_: False)
    code, out, _ = run("prune", "--cache-dir", root, "--older-than", 0)
    assert code == 1 and out.count("cannot be removed: ") == 2 and "0 entries removed" in out
    assert folders(root) == before


def test_words_that_mean_nothing_end_with_a_sentence(run: Run, tmp_path: Path) -> None:
    for words in (["clean"], ["prune", "--older-then", "3"], ["list", "data=x"], ["prune", "--max-gb", "many"]):
        code, _, err = run(*words)
        assert code == 2 and err.startswith("error: ") and err.count("\n") == 1, words
    assert run("prune", "--older-than", "-1")[0] == 2
    code, out, _ = run("--help")
    assert code == 0 and all(name in out for name in command.COMMANDS)
    assert run()[0] == 2
